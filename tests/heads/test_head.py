"""One contract for every kind of head, and oracles for what each adds."""

from typing import Any

import numpy as np
import pytest
from blobs import SHORT, D, blobs
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from featcache.errors import ModelError
from featcache.heads import metrics
from featcache.heads.head import KINDS, FittedHead, Head, TorchSettings, class_weights, softmax
from featcache.heads.logreg import C_GRID, Solver, fit_logreg, head_of
from featcache.heads.minibatch import fit_torch_head
from featcache.heads.validation import fit_temperature, stratified_folds

DEEP = TorchSettings(hidden=(24, 16), dropout=(0.1, 0.2), epochs=30, lr=5e-3, batch_size=50)


def fit(kind: str, X: np.ndarray, y: np.ndarray, rows: np.ndarray | None = None, **options: Any) -> FittedHead:
    rows = np.arange(len(X)) if rows is None else rows
    options = {"folds": 3} | options
    if kind == "deep mlp":
        kind, options["settings"] = "mlp", DEEP
    if kind == "logreg":
        return fit_logreg(X, rows, y, **options)
    options = {"n_classes": int(y.max()) + 1, "budget": SHORT} | options
    return fit_torch_head(X, rows, y, kind=kind, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", [*KINDS, "deep mlp"])
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

    def test_logits_out_of_fold_are_as_calibrated_as_a_temperature_makes_them(self, kind: str, classes: int) -> None:
        X, y = blobs(classes=classes, spread=4.0)
        fitted = fit(kind, X, y)
        assert fitted.out_of_fold is not None and fitted.temperature != 1
        assert fit_temperature(y, fitted.out_of_fold)[0] == pytest.approx(1, abs=1e-3)
        without = fit(kind, X, y, folds=0)
        assert without.temperature == 1
        if kind == "logreg":
            plain = clone(fitted.pipeline).fit(X.astype(np.float64), y).predict_log_proba(X.astype(np.float64))
        else:
            plain = without.head.logits(X)
        scaled = softmax(plain / fitted.temperature)
        np.testing.assert_allclose(fitted.head.probabilities(X), scaled, atol=1e-3 if kind == "logreg" else 1e-5)

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
    # Where C is tiny all rows have nearly the same probabilities: which is the largest, only a tight solution tells.
    solver = Solver(X.astype(np.float64), y, grid=(1e-3, 0.1, 10.0), scalings=("standardise", "unit"), tolerance=1e-7)
    tight = solver.cross_validate(stratified_folds(y, np.arange(len(y)), folds=3, seed=0))
    losses = {(entry["scaling"], entry["C"]): entry["log_loss"] for entry in fitted.curve}
    for (scaling, C), accuracies in zip(solver.settings, tight.of_folds(tight.right).T, strict=True):
        pipeline = make_pipeline(
            StandardScaler() if scaling == "standardise" else Normalizer(), LogisticRegression(C=C)
        )
        found = cross_validate(pipeline, X.astype(np.float64), y, cv=folds, scoring=("accuracy", "neg_log_loss"))
        np.testing.assert_allclose(accuracies, found["test_accuracy"], atol=0.013)  # one image in a fold of 80
        assert losses[scaling, C] == pytest.approx(-found["test_neg_log_loss"].mean(), rel=0.03)
    best = max(entry["accuracy"] for entry in fitted.curve)
    good = [entry for entry in fitted.curve if entry["accuracy"] >= best - (best * (1 - best) / 240) ** 0.5]
    chosen = next(e for e in fitted.curve if (e["C"], e["scaling"]) == (fitted.chosen["C"], fitted.chosen["scaling"]))
    assert chosen in good and len(good) < len(fitted.curve)
    assert chosen["log_loss"] == pytest.approx(min(entry["log_loss"] for entry in good), abs=1e-3)


@pytest.mark.parametrize("classes", [2, 4])
def test_head_computes_what_the_pipeline_computes(classes: int) -> None:
    X, y = blobs(classes=classes)
    fitted = fit("logreg", X, y)
    unseen = blobs(classes=classes, seed=5)[0].astype(np.float64)
    np.testing.assert_allclose(fitted.head.probabilities(unseen), fitted.pipeline.predict_proba(unseen), atol=1e-9)
    assert fitted.temperature != 1


def test_a_large_c_that_wins_nothing_is_not_taken() -> None:
    X, y = blobs(spread=0.1)  # separable: every C but the smallest is right on all rows
    assert 0.01 < fit("logreg", X, y).chosen["C"] < C_GRID[-1]


def test_given_c_is_used_and_edges_that_win_are_reported() -> None:
    X, y = blobs()
    assert fit("logreg", X, y, grid=(0.3,)).chosen["C"] == 0.3
    assert fit("logreg", X, y, grid=(0.3,), folds=0).fold_accuracies == ()
    # Every C is as good: there is nothing to gain beyond the grid.
    assert fit("logreg", np.zeros_like(X), y).notes == ()
    assert fit("logreg", np.eye(3, 12)[y], y).notes == ()  # likewise where nothing is left to gain
    few = np.concatenate([np.flatnonzero(y != 0)[:15], np.flatnonzero(y == 0)])
    grid = (1e-9, 1e-8, 1.0)  # the first two only see the majority
    assert "edge of the grid" in " ".join(fit("logreg", X[few], y[few], grid=grid).notes)


@pytest.mark.parametrize("value", [0, 3.3])
@pytest.mark.parametrize("dim", [8, 90])
def test_features_that_say_nothing_give_the_shares_of_classes(value: float, dim: int) -> None:
    y = np.arange(60) % 3 // 2  # two thirds, one third
    fitted = fit("logreg", np.full((60, dim), value, np.float16), y)
    np.testing.assert_allclose(fitted.head.probabilities(np.full((1, dim), value)), [[2 / 3, 1 / 3]], atol=0.01)
    assert fitted.temperature == pytest.approx(1, abs=0.1)
    assert fitted.cv_log_loss == pytest.approx(np.log(3) - 2 / 3 * np.log(2), abs=0.01)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_class_of_two_rows_and_a_feature_of_one_value_are_no_obstacle(balanced: bool) -> None:
    X, y = np.random.default_rng(0).normal(size=(50, 90)).astype(np.float16), np.array([0] * 48 + [1] * 2)
    X[:, 3], X[:, 4] = 2, 1000 * (np.arange(50) == 7)
    fitted = fit("logreg", X, y, folds=2, balanced=balanced)
    assert np.isfinite(fitted.head.probabilities(X)).all()
    assert fitted.cv_accuracy is not None and fitted.cv_accuracy > 0.9


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


LAYER = {"layers.0.weight": np.ones((3, D)), "layers.0.bias": np.ones(3)}


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("linear", {}),
        ("linear", {"layers.0.weight": np.ones((3, D))}),
        ("linear", LAYER | {"mean": np.zeros(D)}),  # for which the scaling "none" has no use
        ("forest", LAYER),
    ],
)
def test_tensors_that_make_no_head_are_refused(kind: str, tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelError, match="the head's tensors"):
        Head.from_tensors(kind, "none", tensors)


def test_rows_of_next_to_no_length_are_scaled_to_one_as_others() -> None:
    """scikit-learn's Normalizer takes them for zero; the folds and the head do not."""
    X, y = blobs(90)
    X = X.astype(np.float64)
    usual, tiny = (Solver(X * factor, y, grid=(1.0,)).fit("unit", 1.0)[0] for factor in (1.0, 1e-20))
    np.testing.assert_allclose(tiny[-1].coef_, usual[-1].coef_, atol=1e-6)
    np.testing.assert_allclose(head_of(tiny, "unit").probabilities(X * 1e-20), usual.predict_proba(X), atol=1e-6)


def test_no_penalty_to_speak_of_is_no_crash() -> None:
    X, y = blobs(90)
    head = fit_logreg(X, np.arange(90), y, grid=(1e50,), folds=3).head
    assert (head.probabilities(X).argmax(axis=1) == y).mean() > 0.9
