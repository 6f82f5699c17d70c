"""Classes that overlap so much that they may be one. In: labels and out-of-fold probabilities. Out: ``Overlap``."""

import dataclasses
import math

import numpy as np

from featcache.heads.head import Array, Indices

# Area under the curve halfway between classes that never mix, 1, and one class under two names, 0.5.
_HALF = 0.75
_CONFUSED = 0.25  # mean share of images that look more like the other class: of pairs below, the area is above
_SURE = 1.645  # standard errors: the true area is lower with 95 % confidence
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Two classes that out-of-fold probabilities hardly tell apart.

    Attributes:
        first, second: positions among the classes. score: 0..1, 1 where they are told apart by chance alone.
        auc: how often an image of one looks more like it than an image of the other does. reason: a sentence, without names.
    """

    first: int
    second: int
    score: float
    auc: float
    reason: str


def find_overlaps(y: Array, probabilities: Array) -> list[Overlap]:
    """Pairs of classes, the most alike first.

    Images labelled i or j are ordered by p_j / p_i. A pair is named if the area under the curve of that order, which is 0.5 for one
    class under two names whatever their sizes, lies below 0.75 with 95 % confidence (Hanley and McNeil 1982).

    Args:
        y: (N,) labels, -1: none. probabilities: (N, C) from ``out_of_fold``, NaN: no opinion.
    """
    judged = np.flatnonzero((y >= 0) & ~np.isnan(probabilities[:, 0]))
    judged = judged[np.argsort(y[judged], kind="stable")]
    members = np.split(judged, np.searchsorted(y[judged], np.arange(1, probabilities.shape[1])))
    found = []
    for i, j in zip(*np.nonzero(np.triu(_confused(y, probabilities, judged) >= _CONFUSED, 1)), strict=True):
        auc, error = _auc(*(_ratio(probabilities[rows], i, j) for rows in (members[i], members[j])))
        if auc + _SURE * error < _HALF:
            reason = f"an image is told from one of the other class {max(auc, 0.5):.0%} of the time, 50% by chance (area under the curve)"
            found.append(Overlap(int(i), int(j), min(1.0, 2 - 2 * auc), auc, reason))
    return sorted(found, key=lambda pair: (-pair.score, pair.first, pair.second))


def _confused(y: Array, probabilities: Array, judged: Indices) -> Array:
    """(C, C) mean shares of the images of two classes that look more like the other, p / n being higher; n are sizes.

    ``judged``: rows in the order of their labels.
    """
    n_classes = probabilities.shape[1]
    size = np.maximum(np.bincount(y[judged], minlength=n_classes), 1)
    confused = np.zeros((n_classes, n_classes), np.int64)
    for part in np.array_split(judged, max(1, len(judged) * n_classes // _BLOCK)):
        if len(part):
            p = probabilities[part].astype(np.float64) / size
            more = p >= p[np.arange(len(part)), y[part]][:, None]
            labels, starts = np.unique(y[part], return_index=True)
            confused[labels] += np.add.reduceat(more, starts, axis=0, dtype=np.int64)
    share = confused / size[:, None]
    mean: Array = (share + share.T) / 2
    return mean


def _ratio(p: Array, i: int, j: int) -> Array:
    """(n, C) probabilities -> (n,) how much of both classes' is the second's."""
    both: Array = p[:, j].astype(np.float64) + p[:, i]
    share: Array = np.divide(p[:, j], both, out=np.full(len(p), 0.5), where=both > 0)
    return share


def _auc(lower: Array, upper: Array) -> tuple[float, float]:
    """Area under the curve, ties counting half, and its standard error; 1 and 0 where a side is empty."""
    n, m = len(lower), len(upper)
    if not n * m:
        return 1.0, 0.0
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, upper, "left") + np.searchsorted(ordered, upper, "right")
    a = float(below.mean() / (2 * n))
    first, second = a / (2 - a) - a * a, 2 * a * a / (1 + a) - a * a
    variance = (a * (1 - a) + (m - 1) * first + (n - 1) * second) / (n * m)
    return a, math.sqrt(max(variance, 0.0))
