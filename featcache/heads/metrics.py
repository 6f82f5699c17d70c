"""Labels and probabilities in, scores out. NumPy, and SciPy for exact tests.

Functions take ``y`` (N,) integer labels in 0..C-1 and ``probabilities`` (N, C), rows summing to 1, or ``Answers``: what most
scores need of both, four numbers a row.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from featcache.heads.head import Array, Indices, Probabilities

BINS = 15  # of confidence
_TOP = 5  # classes
_BLOCK = 2048  # rows that are looked at in one go
_SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)  # of rows that are answered, on the curve
_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


class Answers(NamedTuple):
    """What most scores need of N rows.

    Attributes:
        y: (N,) labels. predicted: (N,) the most probable class, of equals the first. confidence: (N,) its probability.
        own: (N,) the probability of the label's class. in_top: (N,) whether that is among the five most probable ones, of
            equal probabilities the first.
    """

    y: Array
    predicted: Array
    confidence: Array
    own: Array
    in_top: Array

    @classmethod
    def to_fill(cls, y: Array, dtype: np.dtype[Any]) -> "Answers":
        """Room for those of ``y``, of probabilities of a dtype."""
        n = len(y)
        return cls(y, np.empty(n, np.int32), np.empty(n, dtype), np.empty(n, dtype), np.empty(n, bool))

    @classmethod
    def of(cls, y: Array, probabilities: Probabilities) -> "Answers":
        """Of (N, C) probabilities, of which a block is looked at in one go."""
        answers = cls.to_fill(y, probabilities.dtype)
        for rows in blocks_of(len(y)):
            answers.fill(rows, probabilities[rows])
        return answers

    def fill(self, rows: slice, p: Array) -> None:
        """(n, C) probabilities of some rows."""
        true = self.y[rows, None]
        own = np.take_along_axis(p, true, axis=1)
        better = (p > own).sum(axis=1) + ((p == own) & (np.arange(p.shape[1]) < true)).sum(axis=1)
        self.predicted[rows], self.confidence[rows] = p.argmax(axis=1), p.max(axis=1)
        self.own[rows], self.in_top[rows] = own[:, 0], better < _TOP

    @property
    def right(self) -> Array:
        """(N,) whether the most probable class is the label's."""
        found: Array = self.predicted == self.y
        return found

    @property
    def log_loss(self) -> float:
        """Mean of ``row_losses``."""
        return float(_losses(self.own).mean())


def blocks_of(n: int) -> Iterator[slice]:
    """Of n rows those that are looked at in one go."""
    return (slice(start, start + _BLOCK) for start in range(0, n, _BLOCK))


def accuracy(y: Array, probabilities: Array) -> float:
    """Share of rows whose most probable class is ``y``; 0..1."""
    return float((probabilities.argmax(axis=1) == y).mean())


def row_losses(y: Array, probabilities: Array) -> Array:
    """(N,) negative log-probability of the true class, in nats; probabilities are clipped at 1e-12."""
    return _losses(probabilities[np.arange(len(y)), y])


def _losses(own: Array) -> Array:
    losses: Array = -np.log(np.clip(own, 1e-12, 1.0))
    return losses


def log_loss(y: Array, probabilities: Array) -> float:
    """Mean of ``row_losses``."""
    return float(row_losses(y, probabilities).mean())


def expected_calibration_error(answers: Answers, *, bins: int = BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins (Guo et al. 2017); 0..1."""
    confidence = answers.confidence
    return _calibration_error(confidence, answers.right, _bin_of(confidence, bins), bins)


def reliability(answers: Answers, *, bins: int = BINS) -> list[dict[str, float]]:
    """What ``expected_calibration_error`` is made of: n, mean confidence and accuracy of each bin that holds rows."""
    confidence, correct = answers.confidence, answers.right
    bin_of = _bin_of(confidence, bins)
    counts = np.bincount(bin_of, minlength=bins)
    sums = (np.bincount(bin_of, values, bins) for values in (confidence, correct))
    means = (of_bins / np.maximum(counts, 1) for of_bins in sums)
    columns = zip(counts.tolist(), *(of_bins.tolist() for of_bins in means), strict=True)
    return [{"n": n, "confidence": sure, "accuracy": right} for n, sure, right in columns if n]


def calibration_error_by_chance(confidence: Array, *, bins: int = BINS, draws: int = 100, seed: int = 0) -> float:
    """The ``expected_calibration_error`` to expect on as many rows if each answer were right with its own probability.

    Few rows never lie on the diagonal: the mean over draws of who is right (Bröcker and Smith 2007, "Increasing the
    reliability of reliability diagrams").
    """
    generator, bin_of = np.random.default_rng(seed), _bin_of(confidence, bins)
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


def score_sets(y: Array, holds: Array, sizes: Array, classes: Sequence[str]) -> dict[str, Any]:
    """What prediction sets hold, as plain JSON values. holds: (N,) whether the truth is in the row's set. sizes: (N,) classes.

    Returns:
        reached: the share of rows whose set holds the truth, and its ``interval`` (``accuracy_interval``);
        mean_size; the shares of sets that are ``empty``, of ``one_class``, of ``several``; largest: the most classes in a set;
        per_class: name -> n, reached (None where the class does not occur).
    """
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


def score_answers(answers: Answers, answered: Array) -> dict[str, Any]:
    """Accuracy of those rows that are ``answered``, (N,) bool, as plain JSON values; None where none is."""
    right, n = answers.right, int(answered.sum())
    return {
        "n": n,
        "share": n / len(right),
        "accuracy": float(right[answered].mean()) if n else None,
        "accuracy_interval": accuracy_interval(int(right[answered].sum()), n) if n else None,
    }


def answer_curve(answers: Answers) -> list[dict[str, float]]:
    """Accuracy of the surest rows against their share (El-Yaniv and Wiener 2010, "On the foundations of noise-free selective
    classification"), from all rows to half of them: share, n, accuracy, and the least probability among them.
    """
    sure = answers.confidence
    order = np.argsort(-sure, kind="stable")
    right = np.cumsum(answers.right[order])
    counts = [max(1, math.ceil(share * len(sure))) for share in _SHARES]
    return [
        {"share": share, "n": n, "accuracy": float(right[n - 1] / n), "least_probability": float(sure[order[n - 1]])}
        for share, n in zip(_SHARES, counts, strict=True)
    ]


def evaluate_probabilities(y: Array, probabilities: Probabilities, classes: Sequence[str]) -> dict[str, Any]:
    """``evaluate_answers`` of (N, C) probabilities."""
    return evaluate_answers(Answers.of(y, probabilities), classes)


def evaluate_answers(answers: Answers, classes: Sequence[str]) -> dict[str, Any]:
    """Scores of one model as plain JSON values.

    Returns:
        n, accuracy, accuracy_interval, log_loss, ece, confusion (a row of counts per true class, a column per predicted one);
        top5_accuracy: share of rows whose class is among the five most probable; None below six classes;
        balanced_accuracy: mean recall of the classes that occur;
        macro_f1: mean of 2 TP / (2 TP + FP + FN) over the classes that occur or are predicted, as scikit-learn has it;
        per_class: name -> n, precision, recall (None where undefined).
    """
    c = len(classes)
    confusion = np.bincount(answers.y * c + answers.predicted, minlength=c * c).reshape(c, c)
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
        "n": (n := len(answers.y)),
        "accuracy": float(answers.right.mean()),
        "accuracy_interval": accuracy_interval(int(hit.sum()), n),
        "top5_accuracy": int(answers.in_top.sum()) / n if c > _TOP else None,
        "balanced_accuracy": float((hit[occurs] / true[occurs]).mean()),
        "macro_f1": float((2 * hit[concerned] / (true + predicted)[concerned]).mean()),
        "per_class": per_class,
        "log_loss": answers.log_loss,
        "ece": expected_calibration_error(answers),
        "confusion": confusion.tolist(),
    }
