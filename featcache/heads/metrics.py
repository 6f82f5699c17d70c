"""Labels and probabilities in, scores out. NumPy, and SciPy for one test.

All functions take ``y`` (N,) integer labels in 0..C-1 and ``probabilities`` (N, C), rows summing to 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.heads.head import Array

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


def expected_calibration_error(y: Array, probabilities: Array, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins (Guo et al. 2017); 0..1."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    bucket = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bucket, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(y))


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


def evaluate_probabilities(y: Array, probabilities: Array, classes: Sequence[str]) -> dict[str, Any]:
    """Scores of one model as plain JSON values.

    Returns:
        n, accuracy, accuracy_interval, log_loss, ece, confusion (a row of counts per true class, a column per predicted one);
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
        "balanced_accuracy": float((hit[occurs] / true[occurs]).mean()),
        "macro_f1": float((2 * hit[concerned] / (true + predicted)[concerned]).mean()),
        "per_class": per_class,
        "log_loss": log_loss(y, probabilities),
        "ece": expected_calibration_error(y, probabilities),
        "confusion": confusion.tolist(),
    }
