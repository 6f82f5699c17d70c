"""The nearest neighbours of every row among all others, by cosine similarity. Exact: blocked products of matrices.

In: features (M, D) and which rows to compare. Out: ``Nearest``. Work grows with the square of the number of rows.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from featcache.heads.head import Array, FeatureSource, Indices, scale_features

_BLOCK = 2048  # rows whose similarities to all others are held at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Nearest:
    """N rows and the k nearest others of each.

    Attributes:
        rows: (N,) their numbers in the cache.
        places: (N, k) positions in ``rows``, nearest first, never the row itself; of equal similarities the first row first.
        similarities: (N, k) float32 cosines, descending.
    """

    rows: Indices
    places: Indices
    similarities: npt.NDArray[np.float32]

    @property
    def k(self) -> int:
        """How many neighbours each row has."""
        return int(self.places.shape[1])


def nearest_rows(features: FeatureSource, rows: Indices, *, k: int = 20) -> Nearest:
    """Find the k nearest other rows of each of (N,) ``rows`` of (M, D) features; k is N - 1 if there are fewer."""
    k = min(k, len(rows) - 1)
    X: Array = features[rows].astype(np.float32)
    X = scale_features(X, "unit", X, X)
    places, similarities = np.empty((len(rows), k), np.intp), np.empty((len(rows), k), np.float32)
    for start in range(0, len(rows), _BLOCK):
        here = X[start : start + _BLOCK] @ X.T
        here[np.arange(len(here)), np.arange(start, start + len(here))] = -np.inf
        best = np.argsort(-here, axis=1, kind="stable")[:, :k]
        places[start : start + len(here)] = best
        similarities[start : start + len(here)] = np.take_along_axis(here, best, axis=1)
    return Nearest(rows, places, similarities)
