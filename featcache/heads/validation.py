"""Cross-validation that does not flatter: folds that keep copies together, the choice among settings, its honest score.

In: labels and copies of N rows, out-of-fold results of S settings. Out: folds; the chosen setting; its temperature; scores
that are corrected for having chosen both.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from featcache.errors import SourceError
from featcache.heads.head import Array, Indices, softmax
from featcache.heads.metrics import row_losses
from featcache.system.display import quantity

_DRAWS, _FEWEST_DRAWS = 500, 100  # of the bootstrap, on few rows and on many, where there is little to correct
_ROWS_DRAWN = 10**6  # in all, in between
_DRAWN_VALUES = 2**24  # draws times rows, weighed at a time: 128 MB
_LOGITS_FITTED = 2**22  # at most, by a temperature: one number, for which some of many rows do
EQUAL_LOSSES = 0.005  # nats
_STARTS = 100  # of a search for folds: one by what suits best, the others by chance
_MAX_TEMPERATURE = 20.0  # and the least is 1 / 20: beyond, logits say nothing, or they say it with certainty


def judge(y: Array, logits: Array) -> tuple[Array, Array]:
    """(N,) whether each row's class has the largest of (N, C) logits, and (N,) losses in nats."""
    probabilities = softmax(logits)
    return probabilities.argmax(axis=1) == y, row_losses(y, probabilities)


def different_images(y: Array, copies: Indices) -> Indices:
    """(C,) how many different images, or groups, each class has: the most folds that it can be dealt out to.

    Of (N,) labels below C, and ``copies`` as for ``stratified_folds``; a group of several classes counts once in each.
    """
    n = int(y.max(initial=0)) + 1
    return np.bincount(np.unique(copies * n + y) % n, minlength=n)


def stratified_folds(y: Array, copies: Indices, *, folds: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Row numbers (train, held out) of each fold; copies of one image lie on the same side.

    Images are dealt out, and their copies follow. Without copies the folds are those of scikit-learn's ``StratifiedKFold``.
    Where copies, or groups of rows in their place, hold several classes, all are dealt out by ``_dealt_groups``.

    Args:
        y: (N,) labels.
        copies: (N,) for each row the first row that holds the same image, or is of the same group (patient): its own number
            where there is none before.
        folds: at least 2, at most ``different_images`` of the rarest class. seed: of the order.

    Raises:
        SourceError: groups of several classes, of which no division was found that leaves every class to train in each fold.
    """
    if not np.array_equal(y, y[copies]):
        fold = _dealt_groups(y, copies, folds=folds, seed=seed)
        return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(folds)]
    from sklearn.model_selection import (
        StratifiedKFold,  # takes seconds to import, and whoever deals nothing out needs none
    )

    images = np.flatnonzero(copies == np.arange(len(copies)))
    fold = np.empty(len(y), np.intp)
    shuffled = StratifiedKFold(folds, shuffle=True, random_state=seed).split(images, y[images])
    for number, (_, held_out) in enumerate(shuffled):
        fold[images[held_out]] = number
    fold = fold[copies]
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(folds)]


def _dealt_groups(y: Array, copies: Indices, *, folds: int, seed: int) -> Indices:
    """(N,) a fold for each row, one for all of a group: large ones first, each to where its classes are rarest so far."""
    _, group, sizes = np.unique(copies, return_inverse=True, return_counts=True)
    pairs, number = np.unique(np.stack([group, y]), axis=1, return_counts=True)
    start = np.searchsorted(pairs[0], np.arange(len(sizes) + 1))
    shares = number / np.bincount(y)[pairs[1]]  # of each class that lies in a group
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    held = np.zeros((y.max() + 2, folds))  # such shares of each class, and of all rows, in a fold
    fold = np.empty(len(sizes), np.intp)
    for each in shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist():
        rows = slice(start[each], start[each + 1])
        cost = number[rows] @ held[pairs[1, rows]]
        fold[each] = best = np.lexsort((held[-1], np.round(cost, 9)))[0]
        held[pairs[1, rows], best] += shares[rows]
        held[-1, best] += sizes[each]
    generator = np.random.default_rng([seed, folds])
    for _ in range(_STARTS):
        if _mended(fold, pairs, start[:-1], sizes, folds=folds):
            return fold[group]
        fold = generator.integers(folds, size=len(sizes))
    fewer = "fewer folds (--folds 2), or none" if folds > 2 else "no folds"
    raise SourceError(
        f"{quantity(len(sizes), 'group')} of several classes cannot be divided into {folds} folds so that each class lies in two "
        f"at least; choose {fewer} (--folds 0 --C 1), take a class out, or add images of other groups"
    )


def _mended(fold: Indices, pairs: Indices, start: Indices, sizes: Indices, *, folds: int) -> bool:
    """Move groups to other folds, in place, until none is empty and each class lies in two at least; False if that fails.

    Otherwise heads of the other folds would train without a class.

    Args:
        fold: (G,) of each group. pairs: (2, P) group and class, ascending. start: (G,) where a group's begin. sizes: (G,) rows.
    """
    group, label = pairs
    while True:
        lies = np.zeros((label.max() + 1, folds), np.intp)  # groups of a class in a fold
        np.add.at(lies, (label, fold[group]), 1)
        groups = np.bincount(fold, minlength=folds)
        spread = (lies > 0).sum(axis=1)
        if not (spread == 1).any() and groups.all():
            return True
        own = lies[label, fold[group]] == 1
        after = spread[label, None] - own[:, None] + (lies[label] == 0)  # (P, F), with the group in that fold
        change = np.add.reduceat((after == 1).astype(np.intp) - (spread[label] == 1)[:, None], start)
        change += (groups[fold] == 1)[:, None].astype(np.intp) - (groups == 0)
        change[np.arange(len(fold)), fold] = 0
        rows = np.bincount(fold, sizes, minlength=folds)
        best = np.lexsort((np.tile(rows, len(fold)), np.repeat(sizes, folds), change.reshape(-1)))[0]
        which, target = divmod(int(best), folds)
        if change[which, target] >= 0:
            return False
        fold[which] = target


@np.errstate(over="ignore")  # of steps, which then end at a bound
def fit_temperature(y: Array, logits: Array, fold: Indices | None = None) -> tuple[float, float]:
    """The temperature T > 0 for which softmax(logits / T) is calibrated best, and what dividing by it adds to the log loss.

    T minimises the log loss (Guo et al. 2017, "On calibration of modern neural networks"). The true class counts as
    (n + 1) / (n + 2), the others share the rest (Platt 1999), so that T stays above 0 where every row is right.

    Args:
        y: (n,) labels. logits: (n, C) of rows that did not train what gave them.
        fold: (n,) from 0; each row is then judged with the T of the other folds' rows, so that the change is honest.
            None: all rows with the same T.

    Returns:
        T within 1 / 20..20, and the mean change of the rows' losses in nats, mostly below 0. 1 and 0 for logits that are
        all equal.
    """
    some = slice(None, None, -(-logits.size // _LOGITS_FITTED))
    y, logits, fold = y[some], logits[some], None if fold is None else fold[some]
    z = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    low, high, beta = 1 / _MAX_TEMPERATURE, _MAX_TEMPERATURE, 1.0  # beta = 1 / T, in which the loss is convex
    for _ in range(50):  # Newton's method, within the interval in which the slope changes its sign
        slopes, curvatures = _slopes(y, z, beta)
        slope, curvature = slopes.sum(), curvatures.sum()
        if slope == 0:
            break
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else high
        before, beta = beta, step if low < step < high else math.sqrt(low * high)
        if abs(beta - before) <= 1e-6 * beta:
            break
    own = np.full(len(y), beta)
    if fold is not None and len(fold):
        slopes, curvatures = _slopes(y, z, beta)
        without = [np.bincount(fold, values).sum() - np.bincount(fold, values) for values in (slopes, curvatures)]
        moved = beta - without[0] / np.maximum(without[1], np.finfo(float).tiny)  # a step of Newton's, from near
        own = np.clip(moved, max(beta / 2, 1 / _MAX_TEMPERATURE), min(beta * 2, _MAX_TEMPERATURE))[fold]
    change = judge(y, z * own[:, None])[1] - judge(y, z)[1]
    return 1 / beta, float(change.mean())


def _slopes(y: Array, z: Array, beta: float) -> tuple[Array, Array]:
    """(n,) first and second derivatives by beta of each row's loss at softmax(beta z), with Platt's targets."""
    p = softmax(beta * z)
    mean = (p * z).sum(axis=1)
    own, rest = z[np.arange(len(y)), y], 1 / (len(y) + 2)
    target = (1 - rest) * own + rest * (z.sum(axis=1) - own) / (z.shape[1] - 1)
    return mean - target, (p * z**2).sum(axis=1) - mean**2


def good_enough(best: Any, n: int) -> Any:
    """Accuracies that ``OutOfFold.best`` does not tell from ``best``, of ``n`` different images, begin here."""
    return best - np.maximum(np.sqrt(best * np.maximum(1 - best, 0) / n), 1 / n)


@dataclasses.dataclass(frozen=True, eq=False)
class OutOfFold:
    """What S settings made of each of N rows while it was held out.

    Attributes:
        right: (N, S), whether the most probable class was the row's own.
        loss: (N, S), negative log-probability of the row's own class, in nats.
        fold: (N,), which fold held the row out, from 0.
        path: (S,), which settings lie on one path, from the strongest regularisation to the weakest; all if None.
    """

    right: Array
    loss: Array
    fold: Indices
    path: Indices | None = None

    def of_folds(self, results: Array) -> Array:
        """(N, S) results of rows -> (F, S), means over the rows of each fold."""
        return np.stack([results[self.fold == number].mean(axis=0) for number in range(self.fold.max() + 1)])

    def scores(self, weights: Array) -> tuple[Array, Array]:
        """(B, S) accuracies and log losses, means over folds, with the rows weighed by each of (B, N) ``weights``."""
        folds = np.stack([self.fold == number for number in range(self.fold.max() + 1)])  # (F, N)
        of_fold = weights @ folds.T.astype(weights.dtype)  # (B, F)
        filled = np.maximum((of_fold > 0).sum(axis=1, keepdims=True), 1)
        shares = weights / np.maximum(of_fold, 1)[:, self.fold] / filled
        return shares @ self.right, shares @ self.loss

    def best(self, weights: Array, copies: Indices) -> Indices:
        """(B,) the chosen setting for each of (B, N) ``weights``; ``copies`` as for ``stratified_folds``.

        Of the settings within one standard error of the best accuracy (Breiman et al. 1984, "Classification and Regression
        Trees"), the one of the lowest log loss: accuracy tells such settings apart by luck. Of those on its path whose losses
        equal it to 0.005 nats the most regularised. The standard error is the binomial's, and one image at least.
        """
        accuracies, losses = self.scores(weights)
        n = len(np.unique(copies))
        best = accuracies.max(axis=1, keepdims=True)
        good = accuracies >= good_enough(best, n) - 1e-9
        losses = np.where(good, losses, np.inf)
        path = np.zeros(losses.shape[1]) if self.path is None else self.path
        same_path = path == path[losses.argmin(axis=1)][:, None]
        chosen: Indices = (same_path & (losses <= losses.min(axis=1, keepdims=True) + EQUAL_LOSSES)).argmax(axis=1)
        return chosen

    def corrected(self, copies: Indices, *, seed: int) -> tuple[float, float]:
        """Accuracy and log loss to expect of a setting that is chosen as ``best`` chooses it.

        The best of many settings is partly the luckiest. Hence the bootstrap bias correction of Tsamardinos, Greasidou and
        Borboudakis (2018), "Bootstrapping the out-of-sample predictions for efficient and accurate cross-validation": in each
        draw of rows the setting is chosen anew, and scored on the rows that were not drawn. Nothing is trained again.

        Args:
            copies: as for ``stratified_folds``: copies of one image are drawn together. seed: of the bootstrap.
        """
        if self.right.shape[1] == 1:  # nothing was chosen
            accuracies, losses = self.scores(np.ones((1, len(self.fold))))
            return float(accuracies[0, 0]), float(losses[0, 0])
        means = []
        draws = int(np.clip(_ROWS_DRAWN // len(copies), _FEWEST_DRAWS, _DRAWS))
        for weights in _bootstrap(copies, draws=draws, seed=seed):
            chosen, left = self.best(weights, copies), weights == 0
            for setting, rows in zip(chosen, left, strict=True):
                if rows.any():
                    means.append((self.right[rows, setting].mean(), self.loss[rows, setting].mean()))
        accuracy, log_loss = np.mean(means, axis=0).tolist()
        return accuracy, log_loss


def _bootstrap(copies: Indices, *, draws: int, seed: int) -> Iterator[Array]:
    """(b, N) how often each row is drawn, in blocks of b draws, ``draws`` in all."""
    images, image = np.unique(copies, return_inverse=True)
    generator, block = np.random.default_rng(seed), max(1, _DRAWN_VALUES // len(copies))
    for start in range(0, draws, block):
        drawn = generator.integers(len(images), size=(min(block, draws - start), len(images)))
        yield np.stack([np.bincount(row, minlength=len(images)) for row in drawn])[:, image].astype(np.float64)
