"""Accuracy on honest terms: as given, without leaks, and without label suspects in training.

In: features, labels, splits and groups of copies of M rows. Out: a ``Score`` for each. Val and test are never cleaned by the
model's own opinion: only images whose copies train are taken out of them. Who is suspected is decided on training rows alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt

from featcache.errors import SourceError
from featcache.heads.confident import wrong_labels
from featcache.heads.head import Array, FeatureSource, Indices, softmax
from featcache.heads.metrics import accuracy_interval
from featcache.heads.validation import different_images
from featcache.images.groups import first_members, joined
from featcache.images.splits import training_images
from featcache.spec import SPLITS
from featcache.system.runtime_options import usable_cores

Progress = Callable[[int, int], None]
Terms = Literal["as_given", "without_leaks", "without_suspects"]
_MOST_VALUES = 2**27  # of features that train a head
_FOLDS, _FEWEST_FOLDS = 5, 3  # with fewer than three, nobody is left to judge a fold's training rows
_MOST_OPINIONS = 2**28  # probabilities, 1 GB


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
        n_train: images that trained; of very many a sample does (128 million features).
    """

    split: str
    terms: Terms
    accuracy: float
    interval: list[float]
    n: int
    left_out: int
    n_train: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """M rows, and which of them to use.

    Attributes:
        features: (M, D). labels: (M,), -1: none. splits: (M,) positions in ``SPLITS``, 0: none.
        exact, groups: (M,) rows of the same bytes, or of the same image, share a number. usable: (M,) with finite features.
        pairs: (P, 2) near copies beyond the groups: each two of a group copy each other, which of a pair need not be.
    """

    features: FeatureSource
    labels: npt.NDArray[np.integer]
    splits: npt.NDArray[np.integer]
    exact: Indices
    groups: Indices
    usable: npt.NDArray[np.bool_]
    pairs: Indices = dataclasses.field(default_factory=lambda: np.empty((0, 2), np.intp))

    def copies_of(self, members: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """(M,) some rows -> (M,) these, and all that copy one of them."""
        return copies_of(self.groups, self.pairs, members)

    def together(self) -> "Rows":
        """With pairs as groups, too: for folds, which must not divide any."""
        return dataclasses.replace(self, groups=joined(first_members(self.groups), pairs=self.pairs))


def copies_of(groups: Indices, pairs: Indices, members: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(M,) group numbers, (P, 2) pairs beyond them, (M,) some rows -> (M,) these, and all that copy one of them."""
    found = np.isin(groups, groups[members])
    for one, other in (pairs.T, pairs.T[::-1]):
        found[one[members[other]]] = True
    return found


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
    most = _MOST_VALUES // rows.features.shape[1]
    sample = np.sort(np.random.default_rng(seed).permutation(train)[:most])
    sample = sample[_has_folds(rows.labels[sample], rows.exact[sample])]
    if not rows.splits.any():
        return tuple(_out_of_fold(rows.together(), sample, seed, progress))
    trains = np.zeros(len(rows.labels), np.bool_)
    trains[train] = True
    return tuple(_of_splits(rows.together(), rows.copies_of(trains), sample, seed, progress))


def _has_folds(labels: Array, copies: Indices) -> npt.NDArray[np.bool_]:
    """Which rows are of a class with two different images at least: of fewer none could be held out."""
    return different_images(labels, first_members(copies))[labels] >= 2


def _of_splits(
    rows: Rows, leaks: npt.NDArray[np.bool_], train: Indices, seed: int, progress: Progress
) -> Iterator[Score]:
    """By one head for the first two terms, and one for the third. ``leaks``: (M,) rows that train, or copy one that does."""
    progress(0, 2)
    judge: _Fitted | None
    head = judge = _Fitted(rows, train, rows.exact, seed)
    if not _same_partition(rows.exact[train], rows.groups[train]):  # near copies would vouch for each other's labels
        judged = _with_folds(rows, train, rows.groups)  # the others are of classes that nobody can judge
        judge = _Fitted(rows, judged, rows.groups, seed) if len(judged) else None
    progress(1, 2)
    suspects = train[:0] if judge is None else judge.train[judge.suspects()]
    rest = _with_folds(rows, np.setdiff1d(train, suspects), rows.exact)
    better = head if len(rest) == len(train) else _Fitted(rows, rest, rows.exact, seed) if len(rest) else None
    for split in ("val", "test"):
        here = np.flatnonzero((rows.splits == SPLITS.index(split)) & rows.usable & np.isin(rows.labels, head.present))
        new = ~leaks[here]
        if len(here):
            right = head.right(here)
            yield _score(split, "as_given", right, 0, len(train))
        if new.any():
            yield _score(split, "without_leaks", right[new], int((~new).sum()), len(train))
        if new.any() and better is not None:
            yield _score(split, "without_suspects", better.right(here[new]), len(train) - len(rest), len(rest))
    progress(2, 2)


def _out_of_fold(rows: Rows, train: Indices, seed: int, progress: Progress) -> Iterator[Score]:
    """As ``fit-head`` has it, corrected for the choice among settings; without suspects it changes by what the same folds say."""
    progress(0, 2)
    fitted = _Fitted(rows, train, rows.exact, seed)
    yield _share("out_of_fold", "as_given", fitted.cv_accuracy, len(train), 0, len(train))
    if not _same_partition(rows.exact[train], rows.groups[train]):
        train = _with_folds(rows, train, rows.groups)
        if not len(train):
            return
        fitted = _Fitted(rows, train, rows.groups, seed)
    yield _share("out_of_fold", "without_leaks", fitted.cv_accuracy, len(train), 0, len(train))
    progress(1, 2)
    if (found := fitted.gain_without_suspects(seed)) is not None:
        gain, left_out = found
        n = len(train)
        yield _share("out_of_fold", "without_suspects", fitted.cv_accuracy + gain, n, left_out, n - left_out)
    progress(2, 2)


def _with_folds(rows: Rows, train: Indices, partition: Indices) -> Indices:
    """``train`` without classes of which too little is left; empty if no two classes are left."""
    train = train[_has_folds(rows.labels[train], partition[train])]
    return train if len(np.unique(rows.labels[train])) > 1 else train[:0]


def _same_partition(first: Indices, second: Indices) -> bool:
    return bool((first_members(first) == first_members(second)).all())


class _Fitted:
    """A head as ``fit-head`` trains it on ``train``; copies by ``partition`` lie in one fold."""

    def __init__(self, rows: Rows, train: Indices, partition: Indices, seed: int) -> None:
        from featcache.heads.logreg import fit_logreg  # SciPy and scikit-learn, late

        self.rows, self.train = rows, train
        self.present, self.y = np.unique(rows.labels[train], return_inverse=True)
        self.copies = first_members(partition[train])
        self.folds = min(_FOLDS, int(different_images(self.y, self.copies).min()))
        self.fitted = fit_logreg(rows.features, train, self.y, folds=self.folds, copies=self.copies, seed=seed)
        self.cv_accuracy = self.fitted.cv_accuracy or 0.0

    def right(self, held_out: Indices) -> npt.NDArray[np.bool_]:
        """(n,) whether the most probable class is the row's label."""
        answers = self.present[self.fitted.head.score(self.rows.features, held_out).argmax(axis=1)]
        return np.asarray(answers == self.rows.labels[held_out])

    def suspects(self) -> Indices:
        """Positions in ``train`` of labels that the out-of-fold probabilities contradict."""
        logits, kept = self.fitted.out_of_fold, self.fitted.kept
        if logits is None:
            return np.empty(0, np.intp)
        found = wrong_labels(self.y if kept is None else self.y[kept], softmax(logits))
        return found if kept is None else kept[found]

    def gain_without_suspects(self, seed: int) -> tuple[float, int] | None:
        """What leaving suspects out of each fold's training adds to the out-of-fold accuracy, and how many these are on average.

        None: too little is left of a class, or there are too many rows.
        """
        before, n = self.fitted.out_of_fold, len(self.y)
        opinions = self.folds * n * len(self.present)
        if self.folds < _FEWEST_FOLDS or before is None or len(before) < n or opinions > _MOST_OPINIONS:
            return None
        folds = _Folds(self, seed)
        rests = folds.without_suspects()
        if any(len(np.unique(self.y[rest])) < len(self.present) for rest in rests):
            return None
        gain = folds.right(rests) - int((before.argmax(axis=1) == self.y).sum())
        left_out = sum(len(inside) - len(rest) for (inside, _), rest in zip(folds.splits, rests, strict=True))
        return gain / n, round(left_out / (self.folds - 1))


class _Folds:
    """The folds of a fitted head once more, at the setting that was chosen, with other rows to train on.

    Nothing of a fold decides what its head is trained on: for each two folds a head that saw neither judges the rows of both,
    and the suspects of a fold's training rows are those of the heads that have not seen that fold.
    """

    def __init__(self, head: _Fitted, seed: int) -> None:
        from featcache.heads.logreg import Solver
        from featcache.heads.validation import stratified_folds

        self.y, self.temperature = head.y, head.fitted.temperature
        self.setting = head.fitted.chosen["scaling"], head.fitted.chosen["C"]
        self.splits = stratified_folds(head.y, head.copies, folds=head.folds, seed=seed)
        X = head.rows.features[head.train].astype(np.float32)
        self.solver = Solver(X, head.y, grid=self.setting[1:], scalings=self.setting[:1])
        self.solver.prepare()

    def without_suspects(self) -> list[Indices]:
        """Of each fold the rows that train it, without suspects."""
        opinions = np.full((len(self.splits), len(self.y), int(self.y.max()) + 1), np.nan, np.float32)
        pairs = [*itertools.combinations(range(len(self.splits)), 2)]
        held_out = [rows for _, rows in self.splits]
        both = [np.concatenate([held_out[one], held_out[other]]) for one, other in pairs]
        trained = [np.delete(np.arange(len(self.y)), rows) for rows in both]
        for (one, other), logits in zip(pairs, self._logits(trained, both), strict=True):
            parts = np.split(softmax(logits / self.temperature), [len(held_out[one])])
            opinions[other, held_out[one]], opinions[one, held_out[other]] = parts
        return [
            np.setdiff1d(inside, wrong_labels(self.y, opinion))
            for opinion, (inside, _) in zip(opinions, self.splits, strict=True)
        ]

    def right(self, trained: Sequence[Indices]) -> int:
        """How many rows are right out of fold, if each fold's head is trained on ``trained``."""
        held_out = [rows for _, rows in self.splits]
        answers = self._logits(trained, held_out)
        return sum(int((z.argmax(axis=1) == self.y[rows]).sum()) for z, rows in zip(answers, held_out, strict=True))

    def _logits(self, trained: Sequence[Indices], held_out: Sequence[Indices]) -> list[Array]:
        from featcache.heads.logreg import one_blas_thread

        def one(split: tuple[Indices, Indices]) -> Array:
            return self.solver.held_out_logits(split, self.setting)

        with one_blas_thread(), ThreadPoolExecutor(usable_cores()) as pool:
            return list(pool.map(one, zip(trained, held_out, strict=True)))


def _score(split: str, terms: Terms, right: npt.NDArray[np.bool_], left_out: int, n_train: int) -> Score:
    return _share(split, terms, float(right.mean()), len(right), left_out, n_train)


def _share(split: str, terms: Terms, share: float, n: int, left_out: int, n_train: int) -> Score:
    right = min(max(round(share * n), 0), n)
    return Score(split, terms, share, accuracy_interval(right, n), n, left_out, n_train)
