"""One contract for every kind of head, and oracles for what each adds."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from featcache.errors import ModelError
from featcache.heads import metrics
from featcache.heads import minibatch as torchheads
from featcache.heads.head import KINDS, FittedHead, Head, class_weights, softmax
from featcache.heads.logreg import C_GRID, fit_logreg
from featcache.heads.minibatch import fit_torch_head

D = 12


@pytest.fixture(autouse=True)
def _short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for blobs."""
    monkeypatch.setattr(torchheads, "MAX_EPOCHS", 40)
    monkeypatch.setattr(torchheads, "PATIENCE", 5)


def blobs(n: int = 240, classes: int = 3, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping Gaussian classes, as float16 like a cache's."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(0, 2, (classes, D))
    y = rng.permutation(np.arange(n) % classes)
    return (centres[y] + rng.normal(0, spread, (n, D)) + 3).astype(np.float16), y


def fit(kind: str, X: np.ndarray, y: np.ndarray, rows: np.ndarray | None = None, **options: Any) -> FittedHead:
    rows = np.arange(len(X)) if rows is None else rows
    options = {"folds": 3} | options
    if kind == "logreg":
        return fit_logreg(X, rows, y, **options)
    return fit_torch_head(X, rows, y, kind=kind, n_classes=int(y.max()) + 1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
class TestEveryHead:
    def test_learns_and_generalises(self, kind: str, classes: int) -> None:
        X, y = blobs(classes=classes)
        fitted = fit(kind, X, y)
        unseen, truth = blobs(classes=classes, seed=5)
        probabilities = fitted.head.probabilities(unseen)
        assert probabilities.shape == (240, classes)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
        score = metrics.accuracy(truth, probabilities)
        assert score > 0.95
        assert len(fitted.fold_accuracies) == 3
        assert abs(np.mean(fitted.fold_accuracies) - score) < 0.05  # the estimate estimates

    def test_sees_only_its_rows(self, kind: str, classes: int) -> None:
        X, y = blobs(classes=classes)
        rows = np.arange(0, 240, 2)
        poisoned = X.copy()
        poisoned[1::2] = 1000
        clean, other = fit(kind, X[rows], y[rows]).head, fit(kind, poisoned, y[rows], rows).head
        np.testing.assert_allclose(clean.logits(X), other.logits(X), rtol=1e-6, atol=1e-6)

    def test_same_seed_same_head(self, kind: str, classes: int) -> None:
        X, y = blobs(classes=classes)
        one, two = fit(kind, X, y, seed=3), fit(kind, X, y, seed=3)
        assert one.fold_accuracies == two.fold_accuracies
        for a, b in zip(one.head.to_tensors().values(), two.head.to_tensors().values(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_survives_its_tensors(self, kind: str, classes: int) -> None:
        X, y = blobs(classes=classes)
        head = fit(kind, X, y).head
        again = Head.from_tensors(head.kind, head.scaling, head.to_tensors())
        np.testing.assert_array_equal(head.logits(X), again.logits(X))

    def test_balanced_weights_find_the_rare_class(self, kind: str, classes: int) -> None:
        X, y = blobs(600, classes, spread=4.0)
        keep = (y != 0) | (np.arange(600) % 15 == 0)
        X, y = X[keep], y[keep]
        test_X, test_y = blobs(600, classes, spread=4.0, seed=9)

        def recall(head: Head) -> float:
            return float((head.probabilities(test_X).argmax(axis=1) == 0)[test_y == 0].mean())

        assert recall(fit(kind, X, y, balanced=True).head) > recall(fit(kind, X, y).head) + 0.1

    def test_pure_noise_is_estimated_as_chance(self, kind: str, classes: int) -> None:
        X = np.random.default_rng(0).normal(size=(300, D)).astype(np.float16)
        y = np.arange(300) % classes
        assert abs(np.mean(fit(kind, X, y).fold_accuracies) - 1 / classes) < 0.15


# ---------------------------------------------------------------------------------------------------- logreg


def test_cross_validation_equals_scikit_learn() -> None:
    X, y = blobs(spread=3.0)
    fitted = fit("logreg", X, y)
    assert len(fitted.curve) == 3 * len(C_GRID)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    for scaling, scaler in (("standardise", StandardScaler()), ("unit", Normalizer())):
        for entry in (entry for entry in fitted.curve if entry["scaling"] == scaling and 1e-3 <= entry["C"] <= 10):
            pipeline = make_pipeline(scaler, LogisticRegression(C=entry["C"], max_iter=1000))
            expected = cross_val_score(pipeline, X.astype(np.float64), y, cv=folds)
            np.testing.assert_allclose(entry["fold_accuracies"], expected, atol=0.013)  # one image in a fold of 80
    best = max(entry["accuracy"] for entry in fitted.curve)
    chosen = next(e for e in fitted.curve if (e["C"], e["scaling"]) == (fitted.chosen["C"], fitted.chosen["scaling"]))
    assert chosen["accuracy"] == best
    assert chosen["log_loss"] == min(e["log_loss"] for e in fitted.curve if e["accuracy"] == best)


@pytest.mark.parametrize("classes", [2, 4])
def test_head_computes_what_the_pipeline_computes(classes: int) -> None:
    X, y = blobs(classes=classes)
    fitted = fit("logreg", X, y)
    unseen = blobs(classes=classes, seed=5)[0].astype(np.float64)
    np.testing.assert_allclose(fitted.head.probabilities(unseen), fitted.pipeline.predict_proba(unseen), atol=1e-9)


def test_given_c_is_used_and_edges_that_win_are_reported() -> None:
    X, y = blobs()
    assert fit("logreg", X, y, grid=(0.3,)).chosen["C"] == 0.3
    assert fit("logreg", X, y, grid=(0.3,), folds=0).fold_accuracies == ()
    assert (
        fit("logreg", np.zeros_like(X), y).notes == ()
    )  # every C is as good: there is nothing to gain beyond the grid
    assert fit("logreg", np.eye(3, 12)[y], y).notes == ()  # likewise where nothing is left to gain
    few = np.concatenate([np.flatnonzero(y != 0)[:15], np.flatnonzero(y == 0)])
    grid = (1e-9, 1e-8, 1.0)  # the first two only see the majority
    assert "edge of the grid" in " ".join(fit("logreg", X[few], y[few], grid=grid).notes)


# ------------------------------------------------------------------------------------------------ torch heads


def test_reads_from_disk_without_taking_everything(tmp_path: Any) -> None:
    X, y = blobs(600)
    stored = np.memmap(tmp_path / "x", np.float16, "w+", shape=X.shape)
    stored[:] = X
    in_memory, from_disk = fit("linear", X, y, folds=0).head, fit("linear", stored, y, folds=0).head
    np.testing.assert_array_equal(in_memory.logits(X), from_disk.logits(X))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits: mini-batches come from a buffer of some 256 rows."""
    monkeypatch.setattr(torchheads, "_MEMORY", 0)
    monkeypatch.setattr(torchheads, "_BUFFER", 256 * 2 * D)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_out_of_core_training_is_as_good(kind: str, little_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = blobs(1200, spread=2.5)
    order = np.argsort(y, kind="stable")  # as in a cache
    X, y = X[order], y[order]
    unseen, truth = blobs(600, spread=2.5, seed=5)
    ours = fit(kind, X, y, folds=0).head
    monkeypatch.setattr(torchheads, "_MEMORY", 2**28)
    usual = fit(kind, X, y, folds=0).head
    expected = metrics.log_loss(truth, usual.probabilities(unseen))
    assert metrics.log_loss(truth, ours.probabilities(unseen)) < expected * 1.05


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_out_of_core_training_looks_at_the_loss_within_an_epoch(
    kind: str, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchheads, "_ROUND", 100)
    monkeypatch.setattr(torchheads, "MAX_EPOCHS", 6)
    X, y = blobs(300)
    ours, again = fit(kind, X, y, seed=3), fit(kind, X, y, seed=3)
    np.testing.assert_array_equal(ours.head.logits(X), again.head.logits(X))
    assert len(ours.fold_accuracies) == 3
    assert min(ours.fold_accuracies) > 0.8
    assert ours.chosen["epochs"] <= 2  # six rounds, three of them an epoch
    assert ("trained for 2 epochs" in "".join(ours.notes)) == (ours.chosen["epochs"] == 2)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 999, 5000])
@pytest.mark.parametrize("size", [40, 700])
def test_mixtures_hold_every_row_once_and_of_every_class(n: int, size: int) -> None:
    picked = np.sort(np.random.default_rng(1).choice(2 * n, n, replace=False))
    mixtures = list(torchheads._mixtures(picked, size, np.random.default_rng(0)))
    np.testing.assert_array_equal(np.sort(np.concatenate(mixtures)), picked)
    again = list(torchheads._mixtures(picked, size, np.random.default_rng(1)))
    assert n < 100 or not all(np.array_equal(a, b) for a, b in zip(mixtures, again, strict=True))
    for mixture in mixtures:
        assert (np.diff(mixture) > 0).all()  # read from the beginning of the file to its end
        if n == 5000 and size == 700:  # sorted by class, each of 500 rows
            shares = np.bincount(np.searchsorted(picked, mixture) // 500, minlength=10) / len(mixture)
            assert shares.min() > 0.05


def test_out_of_core_moments_equal_numpy(little_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchheads, "_BLOCK", 64)
    X, y = blobs(600)
    X[:, 3] = 7
    picked = np.sort(np.random.default_rng(0).choice(600, 200, replace=False))
    data = torchheads._Data(X, np.arange(600), y, 3, False)
    assert not data.in_memory
    mean, scale = data.moments(picked)
    exact = X[picked].astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(scale, np.where(np.arange(D) == 3, 1, exact.std(axis=0)), rtol=1e-5)


def test_a_large_class_lends_few_rows_to_early_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchheads, "_HELD_OUT", 50)
    y = np.repeat([0, 1, 2, 3], [2000, 2000, 2, 1])
    train, held_out = torchheads._hold_out(y, np.arange(len(y)), 0)
    np.testing.assert_array_equal(np.sort(np.r_[train, held_out]), np.arange(len(y)))
    np.testing.assert_array_equal(np.bincount(y[held_out]), [25, 25, 1])


def test_optimizer_equals_that_of_pytorch() -> None:
    torch.manual_seed(0)
    one, two = torch.nn.Linear(9, 4), torch.nn.Linear(9, 4)
    two.load_state_dict(one.state_dict())
    ours, theirs = torchheads._AdamW(one), torch.optim.AdamW(two.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(20):
        x = torch.randn(16, 9)
        for network, optimizer in ((one, ours), (two, theirs)):
            network.zero_grad()
            (network(x) ** 2).mean().backward()
            optimizer.step()
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one.bias, two.bias, rtol=1e-6, atol=1e-7)


def test_linear_head_comes_close_to_the_convex_optimum() -> None:
    X, y = blobs(600, spread=2.5)
    unseen, truth = blobs(600, spread=2.5, seed=5)
    exact, ours = fit("logreg", X, y).head, fit("linear", X, y).head
    assert (
        metrics.log_loss(truth, ours.probabilities(unseen))
        < metrics.log_loss(truth, exact.probabilities(unseen)) * 1.15
    )


# --------------------------------------------------------------------------------------------------- pieces


def test_class_weights_equal_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    y = np.array([0, 0, 0, 1, 2, 2])
    np.testing.assert_allclose(
        class_weights(y, 3, balanced=True), compute_class_weight("balanced", classes=np.arange(3), y=y)
    )
    np.testing.assert_array_equal(class_weights(y, 3, balanced=False), np.ones(3))


def test_softmax_does_not_overflow() -> None:
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4], [-1e4, 0]])), [[0.5, 0.5], [0, 1]])


@pytest.mark.parametrize(
    "broken", ["missing bias", "wrong shape", "not finite", "no layers", "foreign kind", "mean without need"]
)
def test_tensors_that_make_no_head_are_refused(broken: str) -> None:
    kind, scaling = "linear", "none"
    tensors = {"layers.0.weight": np.ones((3, D)), "layers.0.bias": np.ones(3)}
    if broken == "missing bias":
        del tensors["layers.0.bias"]
    elif broken == "wrong shape":
        tensors["layers.0.bias"] = np.ones(4)
    elif broken == "not finite":
        tensors["layers.0.bias"] = np.array([1, np.nan, 1])
    elif broken == "no layers":
        tensors = {}
    elif broken == "foreign kind":
        kind = "forest"
    else:
        tensors["mean"] = np.zeros(D)
    with pytest.raises(ModelError):
        Head.from_tensors(kind, scaling, tensors)


def test_metrics_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    y, probabilities = rng.integers(0, 4, 500), softmax(rng.normal(size=(500, 5)))  # class 4 never occurs
    scores = metrics.evaluate_probabilities(y, probabilities, list("abcde"))
    predicted = probabilities.argmax(axis=1)
    labels = np.arange(5)
    assert scores["n"] == 500
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(y, predicted))
    assert scores["log_loss"] == pytest.approx(sklearn_metrics.log_loss(y, probabilities, labels=labels))
    assert scores["confusion"] == sklearn_metrics.confusion_matrix(y, predicted, labels=labels).tolist()
    recall = sklearn_metrics.recall_score(y, predicted, labels=labels, average=None, zero_division=np.nan)
    for k, name in enumerate("abcd"):
        assert scores["per_class"][name]["recall"] == pytest.approx(recall[k])
    assert scores["per_class"]["e"]["recall"] is None


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    # bin of 0.9: accuracy 1/2, gap 0.4, two rows; bin of 0.6: accuracy 1, gap 0.4, two rows
    assert metrics.expected_calibration_error(np.array([0, 1, 0, 1]), probabilities) == pytest.approx(0.4)
