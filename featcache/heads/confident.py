"""Which labels the probabilities contradict: confident learning. NumPy.

In: labels and out-of-fold probabilities of N rows. Out: how many labels are wrong, and which come first.

Method: Northcutt, Jiang and Chuang (2021), "Confident learning: estimating uncertainty in dataset labels", says how many, by
the confident joint. Which ones follows from the margin of logits between the best other class and the given one; where the labels
of nearest neighbours are known they have a quarter of the say (SimiFeat; Zhu, Dong and Liu 2022), which ranks planted errors
better than either alone (``benchmarks/LOG.md``).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from featcache.heads.head import Array, Indices, Probabilities

_BLOCK = 2**22  # probabilities that are worked on at a time
_NEIGHBOURS = 0.25  # weight of the neighbours' opinion
_LEAST = 1e-4  # added to opinions, so that none is certain: rows are ranked by how they differ, not by rounding


class Votes(NamedTuple):
    """What k neighbours of each of N rows are labelled.

    Attributes:
        labels: (N, k) classes. weights: (N, k), of a row summing to 1; 0 of neighbours that are not asked, and all 0 of rows
            that have none.
    """

    labels: Indices
    weights: Array


def confident_joint(y: Array, probabilities: Probabilities) -> Array:
    """(C, C) int64: how many rows labelled i count confidently as j.

    A row does if its probability of j is at least the mean one of the rows labelled j, and the largest for which that holds. Rows
    for which it holds of no class are not counted, and of each class that occurs one row at least counts as right.

    Args:
        y: (N,) labels 0..C-1. probabilities: (N, C), each from a head that the row did not train; NaN: no opinion.
    """
    return _confident_joint(y, probabilities)[0]


def _confident_joint(y: Array, probabilities: Probabilities) -> tuple[Array, Array]:
    """And (C,) how many rows of each class there is an opinion of."""
    n_classes = probabilities.shape[1]
    sums, counts = np.zeros(n_classes), np.zeros(n_classes, np.int64)
    for rows, p in _blocks(y, probabilities):
        sums += np.bincount(y[rows], p[np.arange(len(p)), y[rows]], n_classes)
        counts += np.bincount(y[rows], minlength=n_classes)
    thresholds = np.where(counts, sums / np.maximum(counts, 1), np.inf) - 1e-6  # equal to rounding is enough
    joint = np.zeros((n_classes, n_classes), np.int64)
    for rows, p in _blocks(y, probabilities):
        sure = np.where(p >= thresholds, p, -1.0)
        guess = sure.argmax(axis=1)
        kept = sure[np.arange(len(p)), guess] >= 0
        np.add.at(joint, (y[rows][kept], guess[kept]), 1)
    np.fill_diagonal(joint, np.maximum(joint.diagonal(), counts > 0))
    return joint, counts


def count_wrong_labels(y: Array, probabilities: Probabilities) -> int:
    """How many labels are wrong, as the confident joint estimates it: also among rows that it did not count.

    Each class's share of wrong labels, of its rows that were counted, is taken for all of its rows.
    """
    joint, judged = _confident_joint(y, probabilities)
    rows = joint.sum(axis=1)
    wrong = 1 - joint.diagonal() / np.maximum(rows, 1)
    return round(float((wrong * judged).sum()))


def doubts(y: Array, probabilities: Probabilities, votes: Votes | None = None) -> tuple[Array, Indices]:
    """(N,) in 0..1, how far another class outweighs the label: q_other / (q_other + q_label); and (N,) which one.

    That is the logit margin put through a sigmoid: above 0.5 the other class is the more probable. 0 and -1 without opinion.

    Args:
        y, probabilities: as for ``confident_joint``. votes: of the nearest neighbours; None: they are not asked.
    """
    doubt, other = np.zeros(len(y)), np.full(len(y), -1, np.intp)
    for rows, p in _blocks(y, probabilities):
        q = p if votes is None else _heard(p, votes.labels[rows], votes.weights[rows])
        q = q + _LEAST
        at = np.arange(len(q)), y[rows]
        own = q[at]
        q[at] = -1
        other[rows] = q.argmax(axis=1)
        most = q[at[0], other[rows]]
        doubt[rows] = most / (most + own)
    return doubt, other


def _heard(p: Array, labels: Indices, weights: Array) -> Array:
    """(n, C) probabilities, mixed with the neighbours' votes (n, k)."""
    q = p * (1 - _NEIGHBOURS * weights.sum(axis=1, keepdims=True))
    for column in range(labels.shape[1]):
        q[np.arange(len(q)), labels[:, column]] += _NEIGHBOURS * weights[:, column]
    heard: Array = q
    return heard


def wrong_labels(y: Array, probabilities: Probabilities, votes: Votes | None = None) -> Indices:
    """Rows whose label may be wrong, the surest first: as many as ``count_wrong_labels``, if another class outweighs each."""
    doubt, _ = doubts(y, probabilities, votes)
    found: Indices = np.argsort(-doubt, kind="stable")[: count_wrong_labels(y, probabilities)]
    return found[doubt[found] > 0.5]


def _blocks(y: Array, probabilities: Probabilities, *, values: int = _BLOCK) -> Iterator[tuple[Indices, Array]]:
    """Row numbers and (n, C) float64 probabilities of the rows of which there is an opinion and a label."""
    size = max(1, values // probabilities.shape[1])
    for start in range(0, len(y), size):
        p = np.asarray(probabilities[start : start + size], np.float64)
        known = np.flatnonzero(~np.isnan(p[:, 0]) & (y[start : start + size] >= 0))
        yield start + known, p[known]
