"""Scores of one model and of two on the same rows; scikit-learn, SciPy and sums by hand are the oracles."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from featcache.heads.head import softmax
from featcache.heads.metrics import (
    Answers,
    accuracy_interval,
    answer_curve,
    calibration_error_by_chance,
    evaluate_probabilities,
    expected_calibration_error,
    mcnemar,
    reliability,
    score_answers,
    score_sets,
)

CLASSES_MISSING = pytest.mark.filterwarnings("ignore:(y_pred contains classes not in|A single label was found)")


@CLASSES_MISSING
def test_metrics_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    y, probabilities = rng.integers(0, 4, 500), softmax(rng.normal(size=(500, 5)))  # class 4 never occurs
    scores = evaluate_probabilities(y, probabilities, list("abcde"))
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
    assert scores["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(y, predicted))
    assert scores["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(y, predicted, average="macro"))
    assert scores["accuracy_interval"] == accuracy_interval(int((predicted == y).sum()), 500)
    json.dumps(scores)


@pytest.mark.parametrize(
    ("y", "predicted", "balanced", "f1"),
    [
        ([0, 0, 0, 1], [0, 0, 0, 0], 0.5, (6 / 7 + 0) / 2),  # all that occurs counts alike, however rare
        (
            [0, 0, 1, 1],
            [0, 0, 1, 2],
            0.75,
            (1 + 2 / 3 + 0) / 3,
        ),  # a class that is only predicted has no recall, but an F1
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0, 1.0),  # the others neither occur nor are predicted
        ([0, 1], [1, 0], 0.0, 0.0),
    ],
)
@CLASSES_MISSING
def test_rare_classes_count_as_much_by_hand(y: list, predicted: list, balanced: float, f1: float) -> None:
    scores = evaluate_probabilities(np.array(y), np.eye(4)[predicted], list("abcd"))
    assert scores["balanced_accuracy"] == pytest.approx(balanced)
    assert scores["macro_f1"] == pytest.approx(f1)
    assert scores["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(y, predicted))
    assert scores["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(y, predicted, average="macro"))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_is_wilsons(right: int, n: int, low: float, high: float) -> None:
    assert accuracy_interval(right, n) == pytest.approx([low, high], abs=5e-5)
    mirrored = accuracy_interval(n - right, n)
    assert mirrored == pytest.approx([1 - high, 1 - low], abs=5e-5)
    z2 = 1.959964**2  # (right / n - p)^2 = z^2 p (1 - p) / n, solved
    roots = np.roots([1 + z2 / n, -(2 * right / n + z2 / n), (right / n) ** 2]).real
    assert accuracy_interval(right, n) == pytest.approx(sorted(roots), abs=1e-6)


@pytest.mark.parametrize("n", [1, 3, 10**6])
def test_interval_holds_the_accuracy_and_stays_one(n: int) -> None:
    for right in (0, n // 3, n):
        low, high = accuracy_interval(right, n)
        assert 0 <= low <= right / n <= high <= 1
        assert low < high


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    # bin of 0.9: accuracy 1/2, gap 0.4, two rows; bin of 0.6: accuracy 1, gap 0.4, two rows
    assert expected_calibration_error(Answers.of(np.array([0, 1, 0, 1]), probabilities)) == pytest.approx(0.4)


def right_or_wrong(y: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N, 3) probabilities whose most probable class is y exactly where ``right``."""
    return np.eye(3)[np.where(right, y, (y + 1) % 3)]


def compare(only_first: int, only_second: int, both: int, neither: int) -> dict:
    counts = (only_first, only_second, both, neither)
    first, second = (np.repeat(row, counts) for row in ([True, False, True, False], [False, True, True, False]))
    y = np.random.default_rng(0).integers(0, 3, sum(counts))
    return mcnemar(y, right_or_wrong(y, first), right_or_wrong(y, second))


@pytest.mark.parametrize(
    ("only_first", "only_second"),
    [
        *((a, b) for a in range(7) for b in range(7)),
        (3, 40),
        (500, 431),
        (50_000, 50_000),
        (49_000, 51_000),
        (1, 99_999),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    found = compare(only_first, only_second, 5, 2)
    n = only_first + only_second
    expected = binomtest(only_first, n).pvalue if n else 1.0
    assert found["p_value"] == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert 0 <= found["p_value"] <= 1
    del found["p_value"]
    assert found == {"only_first_right": only_first, "only_second_right": only_second, "both": 5, "neither": 2}


def test_mcnemar_ignores_rows_that_tell_nothing_and_is_symmetric() -> None:
    p = compare(3, 11, 0, 0)["p_value"]
    assert compare(3, 11, 4000, 70)["p_value"] == compare(11, 3, 8, 1)["p_value"] == p
    assert type(p) is float
    json.dumps(compare(3, 11, 1, 1))


# ------------------------------------------------------------------------------------------------------------- limits


def test_top_five_equals_scikit_learn_and_counts_ties_in_order() -> None:
    rng = np.random.default_rng(0)
    y, probabilities = rng.integers(0, 9, 400), softmax(rng.normal(size=(400, 9)))
    expected = sklearn_metrics.top_k_accuracy_score(y, probabilities, k=5, labels=np.arange(9))
    assert evaluate_probabilities(y, probabilities, list("abcdefghi"))["top5_accuracy"] == pytest.approx(expected)
    assert evaluate_probabilities(y % 5, probabilities[:, :5], list("abcde"))["top5_accuracy"] is None
    assert evaluate_probabilities(y % 6, probabilities[:, :6], list("abcdef"))["top5_accuracy"] < 1
    assert Answers.of(np.arange(7), np.full((7, 7), 1 / 7)).in_top.tolist() == [True] * 5 + [False] * 2


def test_sets_and_answers_by_hand() -> None:
    y = np.array([0, 0, 1, 1, 1])
    inside = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]], bool)
    scores = score_sets(y, inside[np.arange(5), y], inside.sum(axis=1), ["a", "b", "c"])
    assert scores == {
        "reached": 3 / 5,
        "interval": accuracy_interval(3, 5),
        "mean_size": 7 / 5,
        "empty": 1 / 5,
        "one_class": 2 / 5,
        "several": 2 / 5,
        "largest": 3,
        "per_class": {"a": {"n": 2, "reached": 0.5}, "b": {"n": 3, "reached": 2 / 3}, "c": {"n": 0, "reached": None}},
    }
    answers = Answers.of(y, np.eye(3)[[0, 1, 1, 1, 0]])
    found = score_answers(answers, np.array([True, True, True, False, False]))
    assert found == {"n": 3, "share": 0.6, "accuracy": 2 / 3, "accuracy_interval": accuracy_interval(2, 3)}
    assert score_answers(answers, np.zeros(5, bool))["accuracy"] is None
    json.dumps([scores, found])


def test_the_surest_rows_come_first() -> None:
    sure = np.linspace(0.51, 0.99, 20)
    right = np.arange(20) >= 4  # the four least sure ones are wrong
    probabilities = np.stack([np.where(right, sure, 1 - sure), np.where(right, 1 - sure, sure)], axis=1)
    curve = answer_curve(Answers.of(np.zeros(20, int), probabilities))
    assert [(point["n"], point["accuracy"]) for point in curve] == [
        *((20, 0.8), (19, 16 / 19), (18, 16 / 18), (16, 1.0), (14, 1.0), (12, 1.0), (10, 1.0))
    ]
    assert [point["least_probability"] for point in curve] == pytest.approx([sure[20 - point["n"]] for point in curve])
    assert [point["n"] for point in answer_curve(Answers.of(np.zeros(1, int), probabilities[:1]))] == [1] * 7


def test_reliability_is_that_of_scikit_learn_and_makes_up_the_error() -> None:
    rng = np.random.default_rng(0)
    y, probabilities = rng.integers(0, 4, 800), softmax(2 * rng.normal(size=(800, 4)))
    right, confidence = probabilities.argmax(axis=1) == y, probabilities.max(axis=1)
    bins = reliability(answers := Answers.of(y, probabilities))
    accuracies, means = calibration_curve(right, confidence, n_bins=15)
    assert [entry["accuracy"] for entry in bins] == pytest.approx(accuracies)
    assert [entry["confidence"] for entry in bins] == pytest.approx(means)
    assert [entry["n"] for entry in bins] == [n for n in np.histogram(confidence, 15, (0, 1))[0] if n]
    error = sum(entry["n"] * abs(entry["accuracy"] - entry["confidence"]) for entry in bins) / 800
    assert error == pytest.approx(expected_calibration_error(answers))


@pytest.mark.parametrize("n", [60, 4000])
def test_a_calibrated_model_errs_by_chance(n: int) -> None:
    rng = np.random.default_rng(1)
    probabilities = softmax(2 * rng.normal(size=(n, 3)))
    errors = []
    for _ in range(300):  # labels as probable as the model says
        y = (probabilities.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
        errors.append(expected_calibration_error(Answers.of(y, probabilities)))
    assert calibration_error_by_chance(probabilities.max(axis=1)) == pytest.approx(np.mean(errors), rel=0.08)
    assert calibration_error_by_chance(np.ones(2)) == 0
