"""Classes that overlap so much that they may be one. In: labels and out-of-fold probabilities. Out: ``Overlap``."""

import dataclasses

import numpy as np

from featcache.heads.head import Array

_HALF = 0.25  # balanced error halfway between classes that never mix, 0, and one class under two names, 0.5
_FEWEST = 5  # images of each class: of fewer every pair might be one
_SURE = 1.645  # standard errors: the least that 95 % of such samples show
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Two classes that out-of-fold probabilities hardly tell apart.

    Attributes:
        first, second: positions among the classes. score: 0..1, 1 where they are told apart by chance alone.
        confused: shares of the images of each that look more like the other. reason: a sentence, without names.
    """

    first: int
    second: int
    score: float
    confused: tuple[float, float]
    reason: str


def find_overlaps(y: Array, probabilities: Array) -> list[Overlap]:
    """Pairs of classes, the most alike first.

    An image labelled i looks more like j if p_j / n_j > p_i / n_i, n the classes' sizes, so that a large class attracts no more
    than a small one. Of one class under two names half of the images do, of each. A pair is named if the mean of both shares is
    at least 0.25 with 95 % confidence (normal approximation), and each is 0.1 at least.

    Args:
        y: (N,) labels, -1: none. probabilities: (N, C) from ``out_of_fold``, NaN: no opinion.
    """
    n_classes = probabilities.shape[1]
    judged = np.flatnonzero((y >= 0) & ~np.isnan(probabilities[:, 0]))
    counts = np.bincount(y[judged], minlength=n_classes)
    size, confused = np.maximum(counts, 1), np.zeros((n_classes, n_classes), np.int64)
    for part in np.array_split(judged[np.argsort(y[judged], kind="stable")], max(1, len(judged) * n_classes // _BLOCK)):
        if len(part):
            p = probabilities[part].astype(np.float64) / size
            more = p > p[np.arange(len(part)), y[part]][:, None]
            labels, starts = np.unique(y[part], return_index=True)
            confused[labels] += np.add.reduceat(more, starts, axis=0, dtype=np.int64)
    share = confused / size[:, None]
    mean = (share + share.T) / 2
    variance = share * (1 - share) / size[:, None]
    least = mean - _SURE * np.sqrt((variance + variance.T) / 4)
    alike = (least >= _HALF) & (np.minimum(share, share.T) >= 0.1) & (np.minimum.outer(counts, counts) >= _FEWEST)
    pairs = sorted(zip(*np.nonzero(np.triu(alike, 1)), strict=True), key=lambda pair: (-mean[pair], pair))
    return [_overlap(int(i), int(j), float(share[i, j]), float(share[j, i])) for i, j in pairs]


def _overlap(i: int, j: int, first: float, second: float) -> Overlap:
    reason = f"{first:.0%} of the images of one look more like the other, {second:.0%} the other way; 50% each if they were one"
    return Overlap(i, j, min(1.0, first + second), (first, second), reason)
