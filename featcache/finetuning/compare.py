"""Which weights to keep, and whether fine-tuning was worth it. numpy only.

In: logits of several models on the same images. Out: the best candidate; a paired comparison with the cached head.
"""

import dataclasses
from typing import Any

import numpy as np

from featcache.heads.head import Array, softmax
from featcache.heads.metrics import accuracy, log_loss, mcnemar, standard_error

_SIGNIFICANT = 0.05
UNCHANGED = "nothing better than the cached head was found on val: the saved model is that head, unchanged"


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """Weights between the start (``alpha`` 0) and the fine-tuned ones (1), and their logits (n, C) on val."""

    alpha: float
    logits: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Paired:
    """The images of one split under both models: labels (n,), logits (n, C) of the cached head and of the tuned model."""

    y: Array
    head: Array
    tuned: Array


def score(y: Array, logits: Array) -> tuple[float, float]:
    """(accuracy, -log loss): better is larger; the loss decides between equal accuracies, which are common on few images."""
    probabilities = softmax(logits.astype(np.float64))
    return accuracy(y, probabilities), -log_loss(y, probabilities)


def choose(y: Array, candidates: list[Candidate]) -> Candidate:
    """The candidate with the best ``score``; of equal ones the nearest to the start."""
    return max(sorted(candidates, key=lambda c: c.alpha), key=lambda c: score(y, c.logits))


def compare(y: Array, head_logits: Array, tuned_logits: Array, *, split: str) -> dict[str, Any]:
    """Frozen head against fine-tuned model on the same images.

    Returns:
        split, n, head_accuracy, tuned_accuracy and their standard errors, the counts and p-value of McNemar's test, and a
        verdict in words.
    """
    head, tuned = softmax(head_logits.astype(np.float64)), softmax(tuned_logits.astype(np.float64))
    test = mcnemar(y, head, tuned)
    before, after = accuracy(y, head), accuracy(y, tuned)
    facts = {
        "split": split,
        "n": len(y),
        "head_accuracy": before,
        "head_standard_error": standard_error(before, len(y)),
        "tuned_accuracy": after,
        "tuned_standard_error": standard_error(after, len(y)),
        **test,
    }
    return facts | {"verdict": _verdict(before, after, test, split, len(y))}


def in_words(facts: dict[str, Any]) -> str:
    """``compare``'s accuracies as a line."""
    remark = ", by which epoch and mixture were chosen" if facts["split"] == "val" else ", by which nothing was chosen"
    return (
        f"{facts['split']}: frozen head {facts['head_accuracy']:.2%} (standard error {facts['head_standard_error']:.2%}), "
        f"fine-tuned {facts['tuned_accuracy']:.2%} ({facts['tuned_standard_error']:.2%}), on {facts['n']} images{remark}"
    )


def _verdict(before: float, after: float, test: dict[str, Any], split: str, n: int) -> str:
    remark = "; optimistic, as epoch and mixture were chosen on these images" if split == "val" else ""
    won, lost, p = test["only_second_right"], test["only_first_right"], test["p_value"]
    counts = f"{won} image{'s' * (won != 1)} won, {lost} lost of {n} in {split}; McNemar p = {p:.2g}{remark}"
    if won == lost == 0:
        return f"fine-tuned and frozen head agree on every image of {split}: fine-tuning made no difference"
    if p >= _SIGNIFICANT:
        return f"the difference is within noise ({counts}): the frozen head may serve you just as well"
    better = "better" if after > before else "worse"
    return f"the fine-tuned model is {better} than the frozen head ({counts})"
