"""Nearest neighbours by cosine similarity, and how unfamiliar a row is to those it is compared with. Exact; NumPy.

In: features (M, D) and which of them to compare with. Out: neighbours and their similarities; unfamiliarity in 0..1.

Method: the distance to nearest neighbours among the training rows, by the angle between embeddings, tells images of other
subjects from those of the training's kind (Sun, Ming, Zhu and Li 2022, "Out-of-distribution detection with deep nearest
neighbors"). Theirs is the distance to the k-th, the mean of k tells them apart a little better (``benchmarks/LOG.md``). It is
compared with the same distances of the training rows themselves, each without itself, as in a conformal test for outliers
(Bates, Candes, Lei, Romano and Sesia 2023).
"""

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError
from featcache.heads.head import Array, FeatureSource, Indices, scale_features

_BLOCK = 4096  # rows compared with at a time
_QUERIES = 512  # at a time: similarities of both take 8 MB, and 32 while the largest are looked for
_SPARE = 8  # candidates more than asked for: exact arithmetic then puts in order what float32 does not tell apart
_MEMORY = 2**29  # bytes; rows that fit as float32 are kept in memory, of more each block is read again
_OWN = 4096  # rows whose own distances are computed; of more, so many from all over


class Neighbours:
    """N rows to compare others with.

    Attributes:
        rows: (N,) numbers of the rows among ``features``. k: how many neighbours make a distance.
    """

    def __init__(self, features: FeatureSource, rows: Indices, *, k: int = 10, memory: int = _MEMORY) -> None:
        """features: (M, D). rows: (N,) numbers of the rows to compare with, no two of the same image.

        Raises:
            UsageError: fewer than two rows.
        """
        if len(rows) < 2:
            raise UsageError(f"neighbours need at least two different images to compare with, found {len(rows)}")
        self.rows, self.k = rows, min(k, len(rows) - 1)
        self._features = features
        fits = 4 * len(rows) * features.shape[1] <= memory
        self._kept = [_unit(features[rows[b]]) for b in self._slices()] if fits else None

    def _slices(self) -> list[slice]:
        return [slice(start, start + _BLOCK) for start in range(0, len(self.rows), _BLOCK)]

    def _blocks(self) -> Iterator[tuple[int, Array]]:
        """The position of the first row, and (b, D) rows of unit length."""
        for number, block in enumerate(self._slices()):
            unit = self._kept[number] if self._kept else _unit(self._features[self.rows[block]])
            yield block.start, unit

    def nearest(self, X: Array, *, count: int) -> tuple[Indices, Array]:
        """(n, D) rows -> their nearest ones, (n, c) positions in ``rows``, and (n, c) cosine similarities, the largest first.

        c is ``count``, or N if there are fewer. Of equal similarities the first row comes first, of up to eight more than
        are asked for.
        """
        parts = [self._nearest(X[start : start + _QUERIES], count) for start in range(0, len(X), _QUERIES)]
        places, similarities = (
            zip(*parts, strict=True) if parts else ([np.empty((0, count), np.intp)], [np.empty((0, count))])
        )
        return np.concatenate(places), np.concatenate(similarities)

    def _nearest(self, X: Array, count: int) -> tuple[Indices, Array]:
        queries = _unit(X)
        found: Indices = np.empty((len(X), 0), np.intp)
        keys: Array = np.empty((len(X), 0), np.float32)
        for start, block in self._blocks():
            here = queries @ block.T
            best = np.argpartition(-here, min(count + _SPARE, len(block)) - 1, axis=1)[:, : count + _SPARE]
            found = np.concatenate([found, best + start], axis=1)
            keys = np.concatenate([keys, np.take_along_axis(here, best, axis=1)], axis=1)
            kept = np.argsort(-keys, axis=1)[:, : count + _SPARE]
            found, keys = np.take_along_axis(found, kept, axis=1), np.take_along_axis(keys, kept, axis=1)
        similarities = self._exactly(X, found)
        order = np.lexsort((found, -similarities), axis=1)[:, :count]
        return np.take_along_axis(found, order, axis=1), np.take_along_axis(similarities, order, axis=1)

    def _exactly(self, X: Array, found: Indices) -> Array:
        """(n, c) similarities in float64: equal rows are equally similar, wherever in a block they lie."""
        X, similar = _unit(X, np.float64), np.empty(found.shape)
        for number, places in enumerate(found):
            rows = _unit(self._features[self.rows[places]], np.float64)
            similar[number] = np.einsum("cd,d->c", rows, X[number])  # not by BLAS, whose rounding depends on the place
        return similar.clip(-1, 1)

    def distances(self, places: Indices, similarities: Array, itself: Indices) -> Array:
        """(n,) mean cosine distances to the k nearest others.

        Args:
            places, similarities: (n, k + 1), from ``nearest``. itself: (n,) its own position in ``rows``, -1: it has none.
        """
        others = np.argsort(places == itself[:, None], axis=1, kind="stable")[:, : self.k]
        distances: Array = 1 - np.take_along_axis(similarities, others, axis=1).mean(axis=1)
        return distances

    @functools.cached_property
    def own_distances(self) -> Array:
        """(n,) ``distances`` of the rows themselves, ascending; of many rows those of some."""
        some = np.unique(np.linspace(0, len(self.rows) - 1, min(_OWN, len(self.rows))).astype(np.intp))
        found = [
            self.distances(*self.nearest(self._features[self.rows[part]], count=self.k + 1), part)
            for part in np.array_split(some, -(-len(some) // _QUERIES))
        ]
        return np.sort(np.concatenate(found))

    def unfamiliarity(self, distances: Array) -> Array:
        """(n,) ``distances`` -> (n,) the share of the rows that are nearer to their own neighbours; 0..1."""
        shares: Array = np.searchsorted(self.own_distances, distances) / len(self.own_distances)
        return shares


def _unit(X: Array, dtype: npt.DTypeLike = np.float32) -> Array:
    """(n, D) rows of length 1; of zeros, zeros."""
    return scale_features(X.astype(dtype), "unit", X, X)
