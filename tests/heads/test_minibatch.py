"""Training by mini-batches: what is read and when, in memory and not; NumPy, PyTorch and logistic regression are the oracles."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from blobs import SHORT, D, blobs

from featcache.heads import metrics
from featcache.heads.head import FittedHead
from featcache.heads.logreg import fit_logreg
from featcache.heads.minibatch import Budget, FeatureBatches, fit_torch_head

# Nothing fits in memory: mini-batches come from a buffer of some 256 rows.
TIGHT = dataclasses.replace(SHORT, memory=0, buffer=256 * 2 * D)


def fit(kind: Any, X: Any, y: np.ndarray, *, budget: Budget = SHORT, **options: Any) -> FittedHead:
    options = {"rows": np.arange(len(y)), "folds": 0} | options
    return fit_torch_head(X, y=y, kind=kind, n_classes=int(y.max()) + 1, budget=budget, **options)


class Recorded:
    """Features that remember which rows were read."""

    def __init__(self, X: np.ndarray) -> None:
        self.X, self.shape, self.dtype = X, X.shape, X.dtype
        self.reads: list[np.ndarray] = []

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.reads.append(rows)
        return self.X[rows]


# ------------------------------------------------------------------------------------------------ what is read


def test_features_that_fit_in_memory_are_read_once() -> None:
    X, y = blobs(300)
    rows = np.flatnonzero(np.arange(300) % 7)
    source = Recorded(X)
    fit("linear", source, y[rows], rows=rows, folds=3)
    (read,) = source.reads
    np.testing.assert_array_equal(read, rows)


def mini_batches(n: int, size: int, memory: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(row numbers per batch, row numbers per read) of half the rows, ten classes in order; each has its right label."""
    source = Recorded(np.arange(2 * n, dtype=np.float32)[:, None])
    rows = np.sort(np.random.default_rng(1).choice(2 * n, n, replace=False))
    data = FeatureBatches(source, rows, np.arange(n) * 10 // n, budget=Budget(memory=memory, buffer=4 * size))
    batches = []
    for x, labels in data.mini_batches(np.arange(n), size, np.random.default_rng(seed)):
        places = np.searchsorted(rows, x[:, 0].numpy())
        np.testing.assert_array_equal(labels, places * 10 // n)
        batches.append(places)
    return batches, [np.searchsorted(rows, read) for read in source.reads]


@pytest.mark.parametrize("memory", [0, 2**28])
@pytest.mark.parametrize("size", [40, 700])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 999, 5000])
def test_mini_batches_hold_every_row_once(n: int, size: int, memory: int) -> None:
    batches, reads = mini_batches(n, size, memory)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(n))
    assert max(map(len, batches)) <= size
    others, _ = mini_batches(n, size, memory, seed=1)
    assert n < 100 or any(set(one) != set(other) for one, other in zip(batches, others, strict=True))
    for read in reads:
        assert (np.diff(read) > 0).all()  # from the beginning of the file to its end
        assert (np.diff(read) > 1).sum() <= len(read) / 16  # in runs


def test_mini_batches_from_a_buffer_are_of_every_class() -> None:
    for batch in mini_batches(5000, 700, 0)[0]:  # rows of a class are neighbours
        assert np.bincount(batch // 500, minlength=10).min() > 0.05 * len(batch)


def test_early_stopping_takes_few_rows_of_a_large_class() -> None:
    y = np.repeat([0, 1, 2, 3], [2000, 2000, 2, 1])
    source = Recorded(np.random.default_rng(0).normal(size=(len(y), D)).astype(np.float16))
    fit("linear", source, y, budget=Budget(memory=2000, held_out_rows=50, max_rounds=1))
    held_out, _, train = source.reads[:3]  # these fit in memory; then come a first row and all, for mean and deviation
    np.testing.assert_array_equal(np.sort(np.r_[train, held_out]), np.arange(len(y)))
    np.testing.assert_array_equal(np.bincount(y[held_out], minlength=4), [25, 25, 1, 0])


# ------------------------------------------------------------------------------------------- what is computed


def test_features_are_standardised_by_the_training_rows() -> None:
    X, y = blobs(600)
    X[:, 3] = 7
    rows = np.sort(np.random.default_rng(0).choice(600, 200, replace=False))
    exact = X[rows].astype(np.float64)
    for budget in (SHORT, dataclasses.replace(TIGHT, batch_rows=64)):
        head = fit("linear", X, y[rows], rows=rows, budget=budget).head
        np.testing.assert_allclose(head.mean, exact.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(head.scale, np.where(np.arange(D) == 3, 1, exact.std(axis=0)), rtol=1e-5)


def test_small_data_are_trained_as_by_pytorchs_adamw() -> None:
    X, y = blobs(30)  # one batch
    fitted = fit("linear", X, y, budget=Budget(max_rounds=25, patience=25))
    x = torch.from_numpy((X.astype(np.float64) - fitted.head.mean) / fitted.head.scale).float()
    layer = torch.nn.Linear(D, 3)
    layer.load_state_dict({"weight": torch.zeros(3, D), "bias": torch.zeros(3)})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=1e-2)
    assert fitted.chosen["epochs"] > 10
    for _ in range(fitted.chosen["epochs"]):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x), torch.from_numpy(y)).backward()
        optimizer.step()
    ((weight, bias),) = fitted.head.layers
    np.testing.assert_allclose(weight, layer.weight.detach(), atol=1e-5)
    np.testing.assert_allclose(bias, layer.bias.detach(), atol=1e-5)


def test_training_leaves_the_random_state_alone() -> None:
    X, y = blobs(60)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit("mlp", X, y, folds=2, budget=Budget(max_rounds=2))
    assert torch.equal(torch.rand(3), expected)


def test_linear_head_comes_close_to_the_convex_optimum() -> None:
    X, y = blobs(600, spread=2.5)
    unseen, truth = blobs(600, spread=2.5, seed=5)
    exact, ours = fit_logreg(X, np.arange(600), y, folds=3).head, fit("linear", X, y).head
    limit = metrics.log_loss(truth, exact.probabilities(unseen)) * 1.15
    assert metrics.log_loss(truth, ours.probabilities(unseen)) < limit


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_out_of_core_training_is_as_good(kind: str) -> None:
    X, y = blobs(1200, spread=2.5)
    unseen, truth = blobs(600, spread=2.5, seed=5)
    ours, usual = fit(kind, X, y, budget=TIGHT).head, fit(kind, X, y).head
    limit = metrics.log_loss(truth, usual.probabilities(unseen)) * 1.05
    assert metrics.log_loss(truth, ours.probabilities(unseen)) < limit


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_out_of_core_training_looks_at_the_loss_within_an_epoch(kind: str) -> None:
    X, y = blobs(300)
    budget = dataclasses.replace(TIGHT, round_rows=100, max_rounds=6)
    ours, again = (fit(kind, X, y, seed=3, folds=3, budget=budget) for _ in range(2))
    np.testing.assert_array_equal(ours.head.logits(X), again.head.logits(X))
    assert len(ours.fold_accuracies) == 3
    assert min(ours.fold_accuracies) > 0.8
    assert ours.chosen["epochs"] <= 2  # six rounds, three of them an epoch
    assert ("trained for 2 epochs" in "".join(ours.notes)) == (ours.chosen["epochs"] == 2)
