"""Accuracy on honest terms: as given, without leaks, and without label suspects in training.

In: features, labels, splits and groups of copies of M rows. Out: a ``Score`` for each. Val and test are never cleaned by the
model's own opinion: only images whose copies train are taken out of them. Who is suspected is decided on training rows alone.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from featcache.curation.label_errors import find_label_errors, first_of_groups, out_of_fold
from featcache.errors import SourceError
from featcache.heads.head import Array, FeatureSource, Indices
from featcache.heads.metrics import accuracy_interval
from featcache.images.splits import training_images
from featcache.spec import SPLITS

Progress = Callable[[int, int], None]
Terms = Literal["as_given", "without_leaks", "without_suspects"]
_PARTITIONS: tuple[tuple[Terms, str], ...] = (("as_given", "exact"), ("without_leaks", "groups"))
_FOLDS = 5
_VALUES = 10**7  # features: of more, one fold in five is scored without suspects, not all


@dataclasses.dataclass(frozen=True)
class Score:
    """One accuracy.

    Attributes:
        split: ``val``, ``test``, or ``out_of_fold``: of training rows, each by a head that was trained without its fold.
        terms: ``as_given``: as ``fit-head`` has it; ``without_leaks``: and without images that copy, exactly or nearly, a
            training image (out of fold: with all copies of an image in one fold); ``without_suspects``: and with a head
            that was trained without its label suspects.
        accuracy: 0..1. interval: [low, high] of 95 %, ``heads.metrics.accuracy_interval``. n: images that are scored.
        left_out: images that these terms leave out: of the score, or ``without_suspects`` of training.
    """

    split: str
    terms: Terms
    accuracy: float
    interval: list[float]
    n: int
    left_out: int


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """M rows, and which of them to use.

    Attributes:
        features: (M, D). labels: (M,), -1: none. splits: (M,) positions in ``SPLITS``, 0: none.
        exact, groups: (M,) rows of the same bytes, or of the same image, share a number. usable: (M,) with finite features.
    """

    features: FeatureSource
    labels: npt.NDArray[np.integer]
    splits: npt.NDArray[np.integer]
    exact: Indices
    groups: Indices
    usable: npt.NDArray[np.bool_]


def honest_scores(rows: Rows, *, seed: int = 0, progress: Progress = lambda *_: None) -> tuple[Score, ...]:
    """Scores of logistic regression as ``fit-head`` trains it: of val and test, or out of fold where there are no splits.

    Args:
        seed: of folds. progress: called with heads trained and heads to train.

    Raises:
        SourceError: fewer than two classes have two different training images or more. UsageError: not enough memory.
    """
    train = np.flatnonzero(training_images(rows.labels, rows.splits)[0] & rows.usable)
    train = train[_has_folds(rows.labels[train], rows.exact[train])]
    if len(np.unique(rows.labels[train])) < 2:
        raise SourceError("a score needs two classes with two different training images each")
    if rows.splits.any():
        return tuple(_of_splits(rows, train, seed, progress))
    return tuple(_out_of_fold(rows, train, seed, progress))


def _has_folds(labels: Array, copies: Indices) -> npt.NDArray[np.bool_]:
    """Which rows are of a class with two different images at least: of fewer none could be held out."""
    counts = np.bincount(labels[np.unique(first_of_groups(copies))], minlength=int(labels.max(initial=0)) + 1)
    return counts[labels] >= 2


def _of_splits(rows: Rows, train: Indices, seed: int, progress: Progress) -> Iterator[Score]:
    """By one head for the first two terms, and one for the third."""
    progress(0, 3)
    head = _Fitted(rows, train, rows.exact, seed)
    progress(1, 3)
    rest = _without_suspects(rows, train, rows.exact, seed)
    progress(2, 3)
    better = _Fitted(rows, rest, rows.exact, seed) if len(rest) else None
    for split in ("val", "test"):
        here = np.flatnonzero((rows.splits == SPLITS.index(split)) & rows.usable & np.isin(rows.labels, head.present))
        new = ~np.isin(rows.groups[here], rows.groups[train])
        if len(here):
            right = head.right(here)
            yield _score(split, "as_given", right, 0)
            yield from [_score(split, "without_leaks", right[new], int((~new).sum()))] if new.any() else ()
            if new.any() and better is not None:
                yield _score(split, "without_suspects", better.right(here[new]), len(train) - len(rest))
    progress(3, 3)


def _out_of_fold(rows: Rows, train: Indices, seed: int, progress: Progress) -> Iterator[Score]:
    """The first two corrected for the choice among settings, as ``fit-head`` has it; the third chooses within each fold."""
    from featcache.heads.validation import stratified_folds  # scikit-learn, late

    y = np.unique(rows.labels[train], return_inverse=True)[1]
    copies = first_of_groups(rows.groups[train])
    folds = min(_FOLDS, int(np.bincount(y[np.unique(copies)]).min()))
    tried = folds if len(train) * rows.features.shape[1] <= _VALUES else 1
    for step, (terms, partition) in enumerate(_PARTITIONS):
        progress(step, 2 + tried)
        if step and folds < 2:
            return
        share = _Fitted(rows, train, getattr(rows, partition), seed).cv_accuracy
        yield _score("out_of_fold", terms, np.arange(len(train)) < round(share * len(train)), 0)
    answers, left_out = [], 0
    for step, (inside, held_out) in enumerate(stratified_folds(y, copies, folds=folds, seed=seed)[:tried]):
        progress(2 + step, 2 + tried)
        rest = _without_suspects(rows, train[inside], rows.groups, seed)
        if not len(rest):
            return
        left_out += len(inside) - len(rest)
        answers.append(_Fitted(rows, rest, rows.groups, seed).right(train[held_out]))
    yield _score("out_of_fold", "without_suspects", np.concatenate(answers), round(left_out / max(tried - 1, 1)))
    progress(2 + tried, 2 + tried)


def _without_suspects(rows: Rows, train: Indices, partition: Indices, seed: int) -> Indices:
    """``train`` without those rows whose labels other training rows speak against; empty if no two classes are left."""
    y = rows.labels[train]
    probabilities = out_of_fold(rows.features, train, y, rows.groups[train], seed=seed)
    suspects = [finding.row for finding in find_label_errors(y, probabilities)]  # positions
    rest = np.delete(train, suspects)
    rest = rest[_has_folds(rows.labels[rest], partition[rest])]
    return rest if len(np.unique(rows.labels[rest])) > 1 else rest[:0]


class _Fitted:
    """A head as ``fit-head`` trains it on ``train``; copies by ``partition`` lie in one fold."""

    def __init__(self, rows: Rows, train: Indices, partition: Indices, seed: int) -> None:
        from featcache.heads.logreg import fit_logreg  # SciPy and scikit-learn, late

        self.rows = rows
        self.present, y = np.unique(rows.labels[train], return_inverse=True)
        copies = first_of_groups(partition[train])
        folds = min(_FOLDS, int(np.bincount(y[np.unique(copies)]).min()))
        fitted = fit_logreg(rows.features, train, y, folds=folds, copies=copies, seed=seed)
        self.head, self.cv_accuracy = fitted.head, fitted.cv_accuracy or 0.0

    def right(self, held_out: Indices) -> npt.NDArray[np.bool_]:
        """(n,) whether the most probable class is the row's label."""
        answers = self.present[self.head.score(self.rows.features, held_out).argmax(axis=1)]
        return np.asarray(answers == self.rows.labels[held_out])


def _score(split: str, terms: Terms, right: npt.NDArray[np.bool_], left_out: int) -> Score:
    hits, n = int(right.sum()), len(right)
    return Score(split, terms, hits / n, accuracy_interval(hits, n), n, left_out)
