"""Prediction sets: per image the classes that hold the truth as often as asked (conformal prediction).

In: logits of rows that did not train what gave them, their labels, a coverage. Out: thresholds, one per class; sets. NumPy.

Method: LAC, Sadinle, Lei and Wasserman (2019), "Least ambiguous set-valued classifiers with bounded error levels". A class is
in the set where its probability is high enough, so that sets are as small as they can be for their coverage. Sets may be
empty: where a model is right more often than asked, only that keeps them from holding the truth too often. APS (Romano, Sesia
and Candes 2020, "Classification with valid and adaptive coverage") reaches its coverage there by drawing lots alone, and
would give one image another set each time.

A threshold is exact, on average, for rows as new to the head as those it comes from (split conformal prediction). Those of
cross-validation come from heads of other folds (cross-conformal prediction, Vovk 2015): with the head of all rows the
coverage is then the asked one as far as both heads are alike, which ``benchmarks/limits.py`` measures.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from featcache.errors import UsageError
from featcache.heads.head import Array

METHOD = "LAC (Sadinle, Lei and Wasserman 2019)"
_ROWS_BEYOND = 5  # of a class, above its own threshold: fewer, and the threshold is a matter of luck
_BLOCK = 4096
_FAR = 1000.0  # nearer to 0 than no score is that float64 tells from infinity
_ROUNDING = 1e-9  # 20 * 0.95 is not 19


@dataclasses.dataclass(frozen=True, eq=False)
class Thresholds:
    """Which scores are low enough for a coverage.

    Attributes:
        coverage: asked for, 0..1. n: rows that they come from.
        largest: (C,) scores (``nonconformity``) up to which a class is in the set.
        own: (C,) whether a class has its own threshold, from its own rows: it then holds its truth as often as asked.
    """

    coverage: float
    largest: Array
    own: Array
    n: int

    def contain(self, logits: Array) -> Array:
        """(N, C) logits -> (N, C) whether the class is in the row's set."""
        inside = np.empty(logits.shape, bool)
        for start in range(0, len(logits), _BLOCK):
            inside[start : start + _BLOCK] = nonconformity(logits[start : start + _BLOCK]) <= self.largest
        return inside

    def to_json(self) -> dict[str, Any]:
        """As JSON values, in the order of the classes."""
        return {
            "coverage": self.coverage,
            "largest_score": self.largest.tolist(),
            "own": self.own.tolist(),
            "n": self.n,
        }


def nonconformity(logits: Array) -> Array:
    """(N, C) logits -> (N, C) scores log((1 - p) / p), p = softmax: the larger, the less the class fits.

    LAC's own score is 1 - p. This one orders classes and rows in the same way, and tells them apart where p is nearly 1.
    """
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    rows, top, e = np.arange(len(z)), z.argmax(axis=1), np.exp(z)
    others = e.sum(axis=1, keepdims=True) - e
    e[rows, top] = 0
    others[rows, top] = e.sum(axis=1)  # not 1 - p, of which nothing is left where p is nearly 1
    with np.errstate(divide="ignore"):
        scores: Array = np.log(others) - z
    return scores


def check_coverage(coverage: float) -> None:
    """Raise UsageError unless it is a share above 0 and below 1."""
    number = isinstance(coverage, float | int)
    if not (number and 0 < coverage < 1):
        hint = f"; for {coverage:g} % give {coverage / 100:g}" if number and 1 < coverage < 100 else ""
        raise UsageError(f"coverage must lie between 0 and 1, found {coverage}{hint}")


def rows_needed(coverage: float) -> int:
    """The fewest rows that a threshold of this coverage takes: 19 for 0.95."""
    return math.ceil(coverage / (1 - coverage) - _ROUNDING)


def rows_of_class_needed(coverage: float) -> int:
    """From how many rows on a class gets its own threshold: 100 for 0.95.

    Five of them lie beyond it. From one training set to the next its coverage then varies by less than half of
    1 - coverage (a standard deviation: that of a beta distribution).
    """
    return math.ceil(_ROWS_BEYOND / (1 - coverage) - _ROUNDING)


def fit_thresholds(y: Array, logits: Array, *, coverage: float) -> Thresholds:
    """Thresholds from rows that did not train what gave their logits.

    A class with enough rows gets its own (Mondrian, or class-conditional, conformal prediction: Vovk 2012, "Conditional
    validity of inductive conformal predictors"); the other classes share one, of their rows together, or if these are too few
    of all rows.

    Args:
        y: (N,) labels, copies of an image left out.
        logits: (N, C), not divided by a temperature, which has been found to make sets larger (arXiv 2412.06082).
        coverage: how often the set is to hold the truth, above 0 and below 1.

    Raises:
        UsageError: another coverage, or fewer rows than it takes; how many that is is said.
    """
    check_coverage(coverage)
    _check_rows(len(y), coverage)
    n_classes = logits.shape[1]
    blocks = (slice(start, start + _BLOCK) for start in range(0, len(y), _BLOCK))
    scores = np.concatenate([nonconformity(logits[b])[np.arange(len(y[b])), y[b]] for b in blocks])
    own = np.bincount(y, minlength=n_classes) >= rows_of_class_needed(coverage)
    shared = scores[~own[y]]
    if len(shared) < rows_needed(coverage):
        shared = scores
    largest = [_quantile(scores[y == k] if own[k] else shared, coverage) for k in range(n_classes)]
    return Thresholds(coverage, np.array(largest), own, len(y))


def _check_rows(n: int, coverage: float) -> None:
    if n >= (needed := rows_needed(coverage)):
        return
    most = math.floor(100 * n / (n + 1)) / 100
    instead = f"; ask for at most {most:g}" if most > 0 else ""
    raise UsageError(
        f"coverage {coverage:g} needs at least {needed} images with held-out scores, found {n} "
        f"({rows_of_class_needed(coverage)} of a class for a threshold of its own){instead}"
    )


def _quantile(scores: Array, coverage: float) -> float:
    """The (n + 1) coverage-th smallest of n scores: a new score is as small with that probability.

    Between two of them it is interpolated (Weibull's plotting positions). The usual conformal quantile takes the larger of the
    two: of 108 rows that is 95.4 % for 95 %.
    """
    return float(np.quantile(scores.clip(-_FAR, _FAR), coverage, method="weibull"))
