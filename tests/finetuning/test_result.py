"""Which weights are kept, and what is said about them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from featcache.finetuning.result import calibrate, choose, compare, in_words, unchanged

Y = np.array([0, 1, 0, 1, 0, 1])


def logits(right: str, margin: float = 1.0) -> np.ndarray:
    """For each of ``Y``: "+" right, "-" wrong, by ``margin``."""
    signs = np.array([1 if mark == "+" else -1 for mark in right]) * margin
    return np.stack([np.where(Y == 0, signs, -signs), np.zeros(len(Y))], axis=1)


def test_the_most_accurate_is_chosen_then_the_surest_then_the_nearest_to_the_start() -> None:
    start, better, surer = logits("++++--"), logits("+++++-"), logits("+++++-", margin=1.5)
    assert choose(Y, {0.0: start, 0.4: better}) == 0.4
    assert choose(Y, {0.0: start, 0.4: better, 0.6: surer}) == 0.6
    assert choose(Y, {1.0: start, 0.0: start}) == 0.0


def test_the_temperature_of_val_goes_into_the_last_layer() -> None:
    head = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    x, first = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), head[0].weight.clone()
    with torch.no_grad():
        before = head(x).numpy()
        temperature = calibrate(SimpleNamespace(head=head), Y, before)  # type: ignore[arg-type]
        assert temperature != 1
        np.testing.assert_allclose(head(x).numpy(), before / temperature, rtol=1e-5)
    assert torch.equal(head[0].weight, first)


def test_it_can_never_end_below_the_start() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        candidates = {alpha: random.normal(size=(6, 2)) for alpha in (1.0, 0.5, 0.0)}
        accuracies = {alpha: (values.argmax(1) == Y).mean() for alpha, values in candidates.items()}
        assert accuracies[choose(Y, candidates)] == max(accuracies.values())


def test_a_difference_within_noise_is_called_that() -> None:
    facts = compare(Y, logits("++++--"), logits("+++++-"), split="test")
    assert (facts["head_accuracy"], facts["tuned_accuracy"]) == (4 / 6, 5 / 6)
    for name, right in (("head", 4), ("tuned", 5)):
        interval = binomtest(right, 6).proportion_ci(method="wilson")
        assert facts[f"{name}_interval"] == pytest.approx([interval.low, interval.high], abs=1e-4)
    assert "within noise (1 image won, 0 lost of 6 in test" in facts["verdict"]
    assert "test: frozen head 66.67% (95% interval 30.0% to 90.3%)" in in_words(facts)
    assert "by which nothing was chosen" in in_words(facts)


def test_a_clear_difference_is_called_by_its_sign() -> None:
    y = np.tile(Y, 10)
    good, bad = np.tile(logits("++++++"), (10, 1)), np.tile(logits("++++--"), (10, 1))
    assert compare(y, bad, good, split="test")["verdict"].startswith(
        "the fine-tuned model is better than the frozen head"
    )
    assert compare(y, good, bad, split="test")["verdict"].startswith("the fine-tuned model is worse")
    assert "optimistic" in compare(y, bad, good, split="val")["verdict"]
    assert "agree on every image" in compare(y, good, good, split="test")["verdict"]
    perfect, other = (unchanged(compare(y, head, bad, split="val")) for head in (good, bad))
    assert other == "nothing better than the cached head was found on val: the saved model is that head, unchanged"
    assert (
        perfect
        == f"{other}; it is right on all of the {len(y)} images, of which only more could tell whether fine-tuning helps"
    )
