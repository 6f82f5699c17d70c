"""Embeddings on a plane. In: features and row numbers. Out: a point per row, how it was made, and how far to trust it.

Rows are taken at unit length, so that near on the map means what it means for nearest training images: a large cosine.

Methods: principal components, exact; t-SNE by openTSNE (Policar, Strazar and Zupan 2024), on 50 principal components and from
their first two, as Kobak and Berens 2019 advise ("The art of using t-SNE for single-cell transcriptomics"); trustworthiness
(Venna and Kaski 2001, "Neighborhood preservation in nonlinear projection methods").
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.errors import MissingDependencyError, UsageError
from featcache.heads.head import FeatureSource, Indices, scale_features
from featcache.reports.elements.numbers import count_text, percent_text

Points = npt.NDArray[np.floating[Any]]
Method = Literal["auto", "pca", "tsne", "none"]
METHODS: tuple[Method, ...] = ("auto", "pca", "tsne", "none")
TSNE_ROWS = 10_000  # half a minute on one core; of more only if asked for
_COMPONENTS = 50  # that t-SNE starts from: Kobak and Berens
_PERPLEXITY = 30
_FEWEST = 10  # rows for t-SNE: a perplexity of 3
_BLOCK = 4096  # rows in memory at a time
_PAIRS = 10_000_000  # distances that trustworthiness looks at: a second or two


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """N rows on a plane.

    Attributes:
        points: (N, 2), y upwards. components: (N, c), the first principal components, c <= 50; c = 2 for ``pca``.
        method: ``pca`` or ``tsne``. words: what was done, and why not the other method, for people.
        trustworthiness: 0..1; None for fewer than 4 rows. neighbours: its k. sampled: of how many rows it is the mean.
    """

    points: Points
    components: Points
    method: Literal["pca", "tsne"]
    words: str
    trustworthiness: float | None
    neighbours: int
    sampled: int


def project(features: FeatureSource, rows: Indices, *, method: Method = "auto", seed: int = 0) -> Projection | None:
    """Lay ``rows`` of ``features`` (M, D) out on a plane; None for ``none``.

    Args:
        method: ``pca``; ``tsne``; ``auto``: t-SNE where it is installed and takes less than a minute, see ``TSNE_ROWS``.
        seed: of t-SNE, and of the rows that trustworthiness looks at.

    Raises:
        UsageError: no such method. MissingDependencyError: t-SNE was asked for and is not installed.
    """
    check_method(method)
    if method == "none":
        return None
    chosen, why = _chosen(method, len(rows))
    components, share = principal_components(features, rows, _COMPONENTS if chosen == "tsne" else 2)
    if chosen == "tsne":
        points = _tsne(components, seed)
        words = f"t-SNE (openTSNE) of {count_text(components.shape[1])} principal components{why}"
    else:
        points = components
        words = f"The first two principal components, which hold {percent_text(float(share[:2].sum()))} of the variance{why}"
    k = min(15, (len(rows) - 1) // 2)
    sample = _sample(len(rows), seed)
    trust = trustworthiness(features, rows, points, k=k, sample=sample) if k else None
    return Projection(points, components, chosen, words, trust, k, len(sample))


def check_method(method: str, methods: tuple[Method, ...] = METHODS) -> None:
    """Before any work. Raises as ``project``."""
    if method not in methods:
        raise UsageError(f"no map is called {method!r}; choose one of {', '.join(methods)}")
    if method == "tsne":
        _open_tsne()


def principal_components(features: FeatureSource, rows: Indices, count: int) -> tuple[Points, Points]:
    """The first principal components of ``rows``, each of unit length first; read in blocks.

    Returns:
        (N, c) coordinates, c = min(``count``, N, D) and at least 2, missing ones 0: the largest loading of each component is
        positive. (c,) the share of the variance that each holds.
    """
    from scipy.linalg import eigh

    n, dim = len(rows), features.shape[1]
    first = next(_blocks(features, rows), np.empty((0, dim), np.float32))
    shift = first.mean(axis=0) if n else np.zeros(dim, np.float32)  # near to the mean: squares then lose no digits
    total, square = np.zeros(dim), np.zeros((dim, dim))
    for block in _blocks(features, rows):
        centred = block - shift
        total += centred.sum(axis=0, dtype=np.float64)
        square += centred.T @ centred
    mean = total / max(n, 1)
    kept = max(min(count, n, dim), 1)
    covariance = square / max(n, 1) - np.outer(mean, mean)
    values, vectors = eigh(covariance, subset_by_index=(dim - kept, dim - 1))
    axes = vectors[:, ::-1]  # (D, c), the largest first
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(kept)] < 0, -1, 1)
    found = np.zeros((n, max(kept, 2)), np.float32)
    for start, block in zip(range(0, n, _BLOCK), _blocks(features, rows), strict=True):
        found[start : start + len(block), :kept] = (block - shift - mean) @ axes
    share = values[::-1].clip(0) / (np.trace(covariance) or 1.0)
    return found, share


def trustworthiness(
    features: FeatureSource, rows: Indices, points: Points, *, k: int = 15, sample: Indices | None = None
) -> float:
    """How far neighbours on the map are neighbours among the embeddings: 1: all; about 0.5: no more than by chance.

    1 - 2 / (n k (2 N - 3 k - 1)) times the sum, over n rows and those of their k nearest on the map that are not among their
    k nearest by cosine, of rank - k, where rank is the place by cosine, of copies the first of theirs (Venna and Kaski 2001).

    Args:
        points: (N, 2). k: below N / 2. sample: (n,) positions in ``rows`` to take the mean over; all when not given.
    """
    n, k = len(rows), int(k)
    chosen = np.arange(n) if sample is None else sample
    penalty, size = 0, max(_PAIRS // (2 * n), 1)  # in two passes over all rows if there are many
    for start in range(0, len(chosen), size):
        here = chosen[start : start + size]
        queries = _unit(features[rows[here]])
        similar = np.concatenate([queries @ block.T for block in _blocks(features, rows)], axis=1)  # (h, N)
        x, y = points.T.astype(np.float64)
        away = (x[here, None] - x) ** 2 + (y[here, None] - y) ** 2
        similar[np.arange(len(here)), here] = np.inf  # itself: rank 0
        away[np.arange(len(here)), here] = np.inf
        for near in np.argpartition(away, k - 1, axis=1)[:, :k].T:  # (h,) each: sorting everything takes longer
            ranks = (similar > similar[np.arange(len(here)), near][:, None]).sum(axis=1)
            penalty += int((ranks - k).clip(0).sum())
    return 1 - 2 * penalty / (len(chosen) * k * (2 * n - 3 * k - 1))


def _chosen(method: Method, count: int) -> tuple[Literal["pca", "tsne"], str]:
    """The method, and how its sentence ends."""
    if method == "pca":
        return "pca", "."
    if count < _FEWEST:
        return "pca", f"; t-SNE needs {_FEWEST} images."
    if method == "tsne":
        _open_tsne()
        return "tsne", "."
    if count > TSNE_ROWS:
        return "pca", f"; t-SNE of more than {count_text(TSNE_ROWS)} images can take minutes: ask for it by its name."
    try:
        _open_tsne()
    except MissingDependencyError:
        return "pca", "; t-SNE, which keeps neighbours together, needs pip install 'featcache[report]'."
    return "tsne", "."


def _open_tsne() -> Any:
    try:
        import openTSNE
    except ImportError as error:
        raise MissingDependencyError("a t-SNE map needs openTSNE: pip install 'featcache[report]'") from error
    return openTSNE


def _tsne(components: Points, seed: int) -> Points:
    """(N, c) -> (N, 2). From the first two components, as small as 1e-4; learning rate N / 12, both as advised."""
    library = _open_tsne()
    start = components[:, :2].astype(np.float64)
    start = start / (start[:, 0].std() or 1.0) * 1e-4
    perplexity = min(_PERPLEXITY, (len(components) - 1) / 3)
    affinity = library.affinity.PerplexityBasedNN(
        components, perplexity, method="exact" if len(components) <= TSNE_ROWS else "annoy", random_state=seed, n_jobs=1
    )
    # One thread: those of openTSNE wait by spinning, and on a busy machine take ten times as long as one.
    tsne = library.TSNE(perplexity=perplexity, random_state=seed, n_jobs=1)
    return np.asarray(tsne.fit(affinities=affinity, initialization=start), np.float32)


def _sample(count: int, seed: int) -> Indices:
    most = max(_PAIRS // max(count, 1), 100)
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _blocks(features: FeatureSource, rows: Indices) -> Iterator[Points]:
    for start in range(0, len(rows), _BLOCK):
        yield _unit(features[rows[start : start + _BLOCK]])


def _unit(X: Points) -> Points:
    X = X.astype(np.float32)
    return scale_features(X, "unit", X, X)
