"""The nearest neighbours of every row among all others, by cosine similarity. Exact: blocked products of matrices.

In: features (M, D) and which rows to compare. Out: ``Nearest``. Work grows with the square of the number of rows.
"""

import dataclasses
from collections.abc import Callable

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


def estimate(n: int, dim: int, *, device: str = "cpu") -> tuple[float, int]:
    """How long ``nearest_rows`` of n rows of ``dim`` values takes on this machine, in seconds, and its memory in bytes."""
    return 2.0 * n * n * dim / 1e11, 4 * n * dim + 4 * _BLOCK * n


def nearest_rows(
    features: FeatureSource,
    rows: Indices,
    *,
    k: int = 20,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Nearest:
    """Find the k nearest other rows of each of (N,) ``rows`` of (M, D) features; k is N - 1 if there are fewer.

    Args:
        device: auto, cpu, cuda, cuda:N or mps. progress: called with blocks done and blocks to do; what it raises ends the search.
    """
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
        if progress:
            progress(start // _BLOCK + 1, -(-len(rows) // _BLOCK))
    return Nearest(rows, places, similarities)
