"""Prediction sets hold the truth as often as asked. Oracles: the definition by hand, and MAPIE's split conformal classifier."""

import itertools
import math

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin

from featcache.errors import UsageError
from featcache.heads.conformal import check_coverage, fit_thresholds, nonconformity, rows_needed, rows_of_class_needed
from featcache.heads.head import softmax


def draw(n: int, classes: int = 4, *, seed: int = 0, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels and the logits of a calibrated model."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, classes))
    y = (softmax(logits).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return y, logits


class Given(ClassifierMixin, BaseEstimator):
    """A classifier whose features are its probabilities."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.classes_ = np.arange(classes)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: np.ndarray, y: np.ndarray) -> "Given":
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return X

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X.argmax(axis=1)


@pytest.mark.parametrize(("n", "coverage"), [(59, 0.95), (39, 0.9), (199, 0.99), (24, 0.8)])
def test_sets_are_those_of_mapie(n: int, coverage: float) -> None:
    """Where (n + 1) coverage is a whole number, as nothing has to be interpolated; elsewhere MAPIE's are those or larger."""
    classification = pytest.importorskip("mapie.classification")
    new = draw(300, seed=1)[1]
    for rows in (n, n + 7):
        y, logits = draw(rows)
        options = {"confidence_level": coverage, "conformity_score": "lac", "prefit": True}
        oracle = classification.SplitConformalClassifier(Given(4), **options).conformalize(softmax(logits), y)
        theirs = oracle.predict_set(softmax(new))[1][:, :, 0]
        ours = fit_thresholds(y, logits, coverage=coverage)
        assert not ours.own.any()
        assert (ours.contain(new) <= theirs).all()
        if rows == n:
            np.testing.assert_array_equal(ours.contain(new), theirs)


def test_thresholds_by_hand() -> None:
    """Two classes, of 40 and 9 rows; 0.8 asks for 25 rows of a class for its own threshold, and for 4 in all."""
    y = np.repeat([0, 1], [39, 9])
    p = np.concatenate([1 - np.arange(1, 40) / 100, 0.5 - np.arange(1, 10) / 100])
    logits = np.log(np.stack([np.where(y == 0, p, 1 - p), np.where(y == 1, p, 1 - p)], axis=1))
    found = fit_thresholds(y, logits, coverage=0.8)
    assert found.own.tolist() == [True, False] and found.n == 48
    # The (39 + 1) * 0.8 = 32nd smallest 1 - p of class 0 is 0.32, the (9 + 1) * 0.8 = 8th of class 1 is 0.58.
    np.testing.assert_allclose(found.largest, [math.log(0.32 / 0.68), math.log(0.58 / 0.42)])
    for probability, expected in (
        (0.69, [True, False]),
        (0.67, [False, False]),
        (0.57, [False, True]),
        (0.4, [False, True]),
    ):
        logit = np.log([[probability, 1 - probability]])
        assert found.contain(logit).tolist() == [expected], probability
    assert list(found.to_json()) == ["coverage", "largest_score", "own", "n"]


def test_classes_of_too_few_rows_together_take_the_threshold_of_all() -> None:
    y, logits = draw(300, 2)
    y = np.where(np.arange(300) < 297, y, 2)
    logits = np.column_stack([logits, np.full(300, -3.0)])
    found = fit_thresholds(y, logits, coverage=0.9)
    assert found.own.tolist() == [True, True, False]
    own = nonconformity(logits)[np.arange(300), y]
    assert found.largest[2] == np.quantile(own, 0.9, method="weibull")
    assert found.largest[0] == np.quantile(own[y == 0], 0.9, method="weibull")


@pytest.mark.parametrize(("n", "classes"), [(25, 4), (108, 4), (480, 3)])
def test_new_rows_are_covered_as_often_as_asked(n: int, classes: int) -> None:
    """On average over calibration sets, of every size; and each class that has enough rows, although one is much harder."""
    reached, of_class = [], []
    for seed in range(300):
        y, logits = draw(n + 400, classes, seed=seed, spread=3.0)
        y = np.where((y == 0) & (np.arange(len(y)) % 3 == 0), 1, y)  # a third of class 0 is labelled as class 1
        found = fit_thresholds(y[:n], logits[:n], coverage=0.9)
        holds = found.contain(logits[n:])[np.arange(400), y[n:]]
        reached.append(holds.mean())
        of_class.append([holds[y[n:] == k].mean() for k in (0, 1)])
    assert 0.89 <= np.mean(reached) <= 0.9 + max(0.01, 1 / (n + 1))  # which no threshold between two scores passes
    if n == 480:
        np.testing.assert_allclose(np.mean(of_class, axis=0), 0.9, atol=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_order_what_is_nearly_certain(dtype: type) -> None:
    logits = np.array([[20, 0, -5], [40, 0, 0], [80, 0, 0], [700, 0, 0], [0, 0, 0], [-60, 0, 1]], dtype)
    scores = nonconformity(logits)
    for row, k in itertools.product(range(len(logits)), range(3)):
        z = [float(value) - float(logits[row, k]) for value in np.delete(logits[row], k)]
        assert scores[row, k] == pytest.approx(np.logaddexp(*z), rel=1e-9), (row, k)
    with np.errstate(divide="ignore"):
        assert nonconformity(np.log([[1.0, 0.0]])).tolist() == [[-np.inf, np.inf]]


@pytest.mark.parametrize(
    ("coverage", "rows", "of_class"), [(0.95, 19, 100), (0.9, 9, 50), (0.99, 99, 500), (0.5, 1, 10)]
)
def test_too_few_rows_say_how_many_are_needed(coverage: float, rows: int, of_class: int) -> None:
    assert (rows_needed(coverage), rows_of_class_needed(coverage)) == (rows, of_class)
    y, logits = draw(rows)
    assert np.isfinite(fit_thresholds(y, logits, coverage=coverage).largest).all()
    with pytest.raises(UsageError, match=rf"at least {rows} images .*, found {rows - 1} \({of_class} of a class"):
        fit_thresholds(y[1:], logits[1:], coverage=coverage)


def test_what_is_advised_can_be_had() -> None:
    y, logits = draw(24)
    with pytest.raises(UsageError, match=r"ask for at most 0\.96$"):
        fit_thresholds(y, logits, coverage=0.99)
    fit_thresholds(y, logits, coverage=0.96)


@pytest.mark.parametrize("coverage", [0, 1, -0.1, float("nan"), "0.9", None])
def test_impossible_coverages(coverage: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        check_coverage(coverage)


def test_per_cent_is_understood() -> None:
    with pytest.raises(UsageError, match=r"for 95 % give 0\.95"):
        check_coverage(95)
