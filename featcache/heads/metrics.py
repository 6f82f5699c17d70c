"""Labels and probabilities in, scores out. NumPy, and SciPy for exact tests.

All functions take ``y`` (N,) integer labels in 0..C-1 and ``probabilities`` (N, C), rows summing to 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.heads.head import Array, Indices

BINS = 15  # of confidence
_TOP = 5  # classes
_BLOCK = 4096  # rows that are compared at a time
_SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)  # of rows that are answered, on the curve
_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def accuracy(y: Array, probabilities: Array) -> float:
    """Share of rows whose most probable class is ``y``; 0..1."""
    return float((probabilities.argmax(axis=1) == y).mean())


def row_losses(y: Array, probabilities: Array) -> Array:
    """(N,) negative log-probability of the true class, in nats; probabilities are clipped at 1e-12."""
    losses: Array = -np.log(np.clip(probabilities[np.arange(len(y)), y], 1e-12, 1.0))
    return losses


def log_loss(y: Array, probabilities: Array) -> float:
    """Mean of ``row_losses``."""
    return float(row_losses(y, probabilities).mean())


def top_accuracy(y: Array, probabilities: Array, n: int) -> float:
    """Share of rows whose true class is among the ``n`` most probable ones; of equal probabilities the first counts; 0..1."""
    hits = 0
    for start in range(0, len(y), _BLOCK):
        p, true = probabilities[start : start + _BLOCK], y[start : start + _BLOCK, None]
        own = np.take_along_axis(p, true, axis=1)
        better = (p > own).sum(axis=1) + ((p == own) & (np.arange(p.shape[1]) < true)).sum(axis=1)
        hits += int((better < n).sum())
    return hits / len(y)


def expected_calibration_error(y: Array, probabilities: Array, *, bins: int = BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins (Guo et al. 2017); 0..1."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    return _calibration_error(confidence, correct, _bin_of(confidence, bins), bins)


def reliability(y: Array, probabilities: Array, *, bins: int = BINS) -> list[dict[str, float]]:
    """What ``expected_calibration_error`` is made of: n, mean confidence and accuracy of each bin that holds rows."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    bin_of = _bin_of(confidence, bins)
    counts = np.bincount(bin_of, minlength=bins)
    sums = (np.bincount(bin_of, values, bins) for values in (confidence, correct))
    means = (of_bins / np.maximum(counts, 1) for of_bins in sums)
    columns = zip(counts.tolist(), *(of_bins.tolist() for of_bins in means), strict=True)
    return [{"n": n, "confidence": sure, "accuracy": right} for n, sure, right in columns if n]


def calibration_error_by_chance(probabilities: Array, *, bins: int = BINS, draws: int = 100, seed: int = 0) -> float:
    """The ``expected_calibration_error`` to expect on as many rows if each answer were right with its own probability.

    Few rows never lie on the diagonal: the mean over draws of who is right (Bröcker and Smith 2007, "Increasing the
    reliability of reliability diagrams").
    """
    confidence, generator = probabilities.max(axis=1), np.random.default_rng(seed)
    bin_of = _bin_of(confidence, bins)
    return float(
        np.mean(
            [
                _calibration_error(confidence, generator.random(len(confidence)) < confidence, bin_of, bins)
                for _ in range(draws)
            ]
        )
    )


def _bin_of(confidence: Array, bins: int) -> Indices:
    bin_of: Indices = np.minimum((confidence * bins).astype(int), bins - 1)
    return bin_of


def _calibration_error(confidence: Array, correct: Array, bin_of: Indices, bins: int) -> float:
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def standard_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy in 0..1 on ``n`` independent rows, the binomial's: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def accuracy_interval(right: int, n: int) -> list[float]:
    """[low, high] of the accuracy that ``right`` of ``n`` independent rows are evidence of: the 95 % interval of Wilson (1927).

    Its ends are the accuracies p that lie 1.96 of their own standard errors from what was found:
    (right / n - p)^2 = z^2 p (1 - p) / n. It never leaves 0..1, and is of use for few rows and for accuracies near 1.
    """
    share, extra = right / n, _Z**2 / n
    centre, half = share + extra / 2, _Z * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    low, high = ((centre + sign * half) / (1 + extra) for sign in (-1, 1))
    return [low if right else 0.0, high if right < n else 1.0]  # where rounding would miss it


def chance_of_at_most(right: int, n: int, accuracy: float) -> float:
    """The probability that of ``n`` independent rows at most ``right`` are, if each is with probability ``accuracy``: exact."""
    from scipy.special import bdtr  # late, as below

    return float(bdtr(right, n, accuracy))


def mcnemar(y: Array, first: Array, second: Array) -> dict[str, Any]:
    """Do two models differ in accuracy on the same rows? The exact, paired test of McNemar (1947).

    Only rows that exactly one of the two gets right tell them apart. If both were equally good, each such row would be a
    toss of a fair coin. The p-value is the two-sided, exact one of the binomial distribution, not the chi-squared one.

    Args:
        y: (N,) labels. first, second: (N, C) probabilities of two models for the same rows.

    Returns:
        only_first_right, only_second_right, both, neither: counts of who is right, which sum to N;
        p_value in 0..1, 1 where no row tells the two apart.
    """
    from scipy.special import bdtr  # late: it takes longer to import than all else that scores need

    a, b = first.argmax(axis=1) == y, second.argmax(axis=1) == y
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    return {
        "only_first_right": only_first,
        "only_second_right": only_second,
        "both": int((a & b).sum()),
        "neither": int((~a & ~b).sum()),
        "p_value": min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5))),
    }


def score_sets(y: Array, inside: Array, classes: Sequence[str]) -> dict[str, Any]:
    """What prediction sets hold, as plain JSON values. inside: (N, C) whether a class is in the row's set.

    Returns:
        reached: the share of rows whose set holds the truth, and its ``interval`` (``accuracy_interval``);
        mean_size; the shares of sets that are ``empty``, of ``one_class``, of ``several``; largest: the most classes in a set;
        per_class: name -> n, reached (None where the class does not occur).
    """
    holds, sizes = inside[np.arange(len(y)), y], inside.sum(axis=1)
    counts, held = np.bincount(y, minlength=len(classes)), np.bincount(y, holds, minlength=len(classes))
    return {
        "reached": float(holds.mean()),
        "interval": accuracy_interval(int(holds.sum()), len(y)),
        "mean_size": float(sizes.mean()),
        "empty": float((sizes == 0).mean()),
        "one_class": float((sizes == 1).mean()),
        "several": float((sizes > 1).mean()),
        "largest": int(sizes.max()),
        "per_class": {
            name: {"n": int(n), "reached": float(hit / n) if n else None}
            for name, n, hit in zip(classes, counts, held, strict=True)
        },
    }


def score_answers(y: Array, probabilities: Array, answered: Array) -> dict[str, Any]:
    """Accuracy of those rows that are ``answered``, (N,) bool, as plain JSON values; None where none is."""
    right, n = probabilities.argmax(axis=1) == y, int(answered.sum())
    return {
        "n": n,
        "share": n / len(y),
        "accuracy": float(right[answered].mean()) if n else None,
        "accuracy_interval": accuracy_interval(int(right[answered].sum()), n) if n else None,
    }


def answer_curve(y: Array, probabilities: Array) -> list[dict[str, float]]:
    """Accuracy of the surest rows against their share (El-Yaniv and Wiener 2010, "On the foundations of noise-free selective
    classification"), from all rows to half of them: share, n, accuracy, and the least probability among them.
    """
    sure = probabilities.max(axis=1)
    order = np.argsort(-sure, kind="stable")
    right = np.cumsum((probabilities.argmax(axis=1) == y)[order])
    counts = [max(1, math.ceil(share * len(y))) for share in _SHARES]
    return [
        {"share": share, "n": n, "accuracy": float(right[n - 1] / n), "least_probability": float(sure[order[n - 1]])}
        for share, n in zip(_SHARES, counts, strict=True)
    ]


def evaluate_probabilities(y: Array, probabilities: Array, classes: Sequence[str]) -> dict[str, Any]:
    """Scores of one model as plain JSON values.

    Returns:
        n, accuracy, accuracy_interval, log_loss, ece, confusion (a row of counts per true class, a column per predicted one);
        top5_accuracy: share of rows whose class is among the five most probable; None below six classes;
        balanced_accuracy: mean recall of the classes that occur;
        macro_f1: mean of 2 TP / (2 TP + FP + FN) over the classes that occur or are predicted, as scikit-learn has it;
        per_class: name -> n, precision, recall (None where undefined).
    """
    c = probabilities.shape[1]
    confusion = np.bincount(y * c + probabilities.argmax(axis=1), minlength=c * c).reshape(c, c)
    true, predicted, hit = confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion)
    occurs, concerned = true > 0, true + predicted > 0
    per_class = {
        name: {
            "n": int(true[k]),
            "precision": float(hit[k] / predicted[k]) if predicted[k] else None,
            "recall": float(hit[k] / true[k]) if true[k] else None,
        }
        for k, name in enumerate(classes)
    }
    return {
        "n": len(y),
        "accuracy": accuracy(y, probabilities),
        "accuracy_interval": accuracy_interval(int(hit.sum()), len(y)),
        "top5_accuracy": top_accuracy(y, probabilities, _TOP) if c > _TOP else None,
        "balanced_accuracy": float((hit[occurs] / true[occurs]).mean()),
        "macro_f1": float((2 * hit[concerned] / (true + predicted)[concerned]).mean()),
        "per_class": per_class,
        "log_loss": log_loss(y, probabilities),
        "ece": expected_calibration_error(y, probabilities),
        "confusion": confusion.tolist(),
    }
