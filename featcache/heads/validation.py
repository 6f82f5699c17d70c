"""Cross-validation that does not flatter: folds that keep copies together, the choice among settings, its honest score.

In: labels and copies of N rows, out-of-fold results of S settings. Out: folds; the chosen setting; scores that are corrected
for having chosen it.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from sklearn.model_selection import StratifiedKFold

from featcache.heads.head import Array, Indices, softmax
from featcache.heads.metrics import row_losses

_DRAWS, _FEWEST_DRAWS = 500, 100  # of the bootstrap, on few rows and on many, where there is little to correct
_ROWS_DRAWN = 10**6  # in all, in between
_DRAWN_VALUES = 2**24  # draws times rows, weighed at a time: 128 MB


def judge(y: Array, logits: Array) -> tuple[Array, Array]:
    """(N,) whether each row's class has the largest of (N, C) logits, and (N,) losses in nats."""
    probabilities = softmax(logits)
    return probabilities.argmax(axis=1) == y, row_losses(y, probabilities)


def stratified_folds(y: Array, copies: Indices, *, folds: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Row numbers (train, held out) of each fold; copies of one image lie on the same side.

    Images are dealt out, and their copies follow. Without copies the folds are those of scikit-learn's ``StratifiedKFold``.

    Args:
        y: (N,) labels; of copies that differ in label the first counts.
        copies: (N,) for each row the first row that holds the same image: its own number where there is none before.
        folds: at least 2, at most the number of different images of the rarest class. seed: of the order.
    """
    images = np.unique(copies)
    fold = np.empty(len(y), np.intp)
    shuffled = StratifiedKFold(folds, shuffle=True, random_state=seed).split(images, y[images])
    for number, (_, held_out) in enumerate(shuffled):
        fold[images[held_out]] = number
    fold = fold[copies]
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(folds)]


@dataclasses.dataclass(frozen=True, eq=False)
class OutOfFold:
    """What S settings made of each of N rows while it was held out.

    Attributes:
        right: (N, S), whether the most probable class was the row's own.
        loss: (N, S), negative log-probability of the row's own class, in nats.
        fold: (N,), which fold held the row out, from 0.
    """

    right: Array
    loss: Array
    fold: Indices

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

    def best(self, weights: Array) -> Indices:
        """(B,) the setting of the best accuracy for each of (B, N) ``weights``; of equals, that of the lowest log loss."""
        accuracies, losses = self.scores(weights)
        accuracies = accuracies.round(9)
        chosen: Indices = np.where(accuracies == accuracies.max(axis=1, keepdims=True), losses, np.inf).argmin(axis=1)
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
            chosen, left = self.best(weights), weights == 0
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
