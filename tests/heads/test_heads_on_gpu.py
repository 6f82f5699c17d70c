"""Heads, and nearest neighbours, on a CUDA GPU: what the CPU gives, but for rounding; the same every time."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from blobs import SHORT, blobs

from featcache.curation.neighbours import nearest_rows
from featcache.heads.head import FittedHead, TorchSettings
from featcache.heads.logreg import fit_logreg
from featcache.heads.minibatch import fit_torch_head

pytestmark = pytest.mark.gpu
X, Y = blobs(3000, classes=7, spread=2.0)
ROWS = np.arange(len(Y))
TIGHT = dataclasses.replace(SHORT, memory=0, buffer=2**13)


def fit(kind: str, device: str, **options: Any) -> FittedHead:
    if kind == "logreg":
        return fit_logreg(X, ROWS, Y, device=device, **options)
    options = {"budget": SHORT, "settings": TorchSettings(epochs=8)} | options
    return fit_torch_head(X, ROWS, Y, kind=kind, n_classes=7, device=device, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [SHORT, TIGHT])
def test_a_linear_head_is_the_cpus(budget: Any) -> None:
    here, there = (fit("linear", device, budget=budget, folds=3) for device in ("cpu", "cuda"))
    for one, other in zip(*(f.head.layers for f in (here, there)), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(b, a, rtol=0.01, atol=0.01)
    np.testing.assert_allclose(there.fold_accuracies, here.fold_accuracies, atol=0.005)
    assert there.temperature == pytest.approx(here.temperature, rel=0.01)


def test_an_mlp_is_as_good_as_the_cpus() -> None:
    """Dropout draws others there."""
    here, there = (fit("mlp", device, folds=3) for device in ("cpu", "cuda"))
    assert np.mean(there.fold_accuracies) == pytest.approx(np.mean(here.fold_accuracies), abs=0.02)


@pytest.mark.parametrize("kind", ["linear", "mlp", "logreg"])
def test_two_runs_give_one_head(kind: str) -> None:
    one, two = (fit(kind, "cuda").head.layers for _ in range(2))
    for a, b in zip(one, two, strict=True):
        for mine, again in zip(a, b, strict=True):
            np.testing.assert_array_equal(mine, again)


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("float64", [False, True])
def test_logreg_chooses_what_the_cpu_chooses(classes: int, float64: bool) -> None:
    n = 3000 if float64 else 180_000  # of many values all is float32
    features, y = blobs(n, classes=classes, spread=3.0)
    here, there = (
        fit_logreg(features, np.arange(n), y, device=device, folds=3, grid=(1e-4, 1e-2, 1.0))
        for device in ("cpu", "cuda")
    )
    assert there.chosen == here.chosen
    for one, other in zip(there.curve, here.curve, strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.001)
        assert one["log_loss"] == pytest.approx(other["log_loss"], rel=0.002)
    logits = [f.head.logits(features[:500].astype(np.float32)) for f in (here, there)]
    np.testing.assert_allclose(*logits, rtol=0.01, atol=0.01)


def test_neighbours_are_the_cpus() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(60, 64))[rng.integers(0, 60, 6000)] + rng.normal(size=(6000, 64))).astype(np.float16)
    features[17] = features[4000]
    rows = np.sort(rng.permutation(6000)[:5000])
    here, there = (nearest_rows(features, rows, k=12, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_array_equal(there.similarities, here.similarities)
    np.testing.assert_array_equal(there.places, here.places)


def test_random_numbers_of_others_stay_what_they_were() -> None:
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    fit("mlp", "cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
