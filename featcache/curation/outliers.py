"""Images unlike their class, and images that belong to no class. In: neighbours, or features, and labels. Out: findings.

Both compare an image's distance with the class's own distances. The scale is taken from the lower half of these alone: wrong
images lie in the upper one, and where there are many of them they would hide themselves. Photographs that are right have a longer
tail above than below, so that the bar from which images are named is wider where the middle of the set's upper half is.
"""

from collections.abc import Iterator

import numpy as np

from featcache.curation.finding import Finding, Kind
from featcache.curation.neighbours import Nearest
from featcache.heads.head import Array, FeatureSource, Indices, scale_features

_ASKED = 10  # neighbours
# Deviations of a normal distribution above the median (Iglewicz and Hoaglin 1993 call what lies beyond an outlier).
_FAR = 3.0
_UPPER, _OF_NORMAL = 0.65, 0.38532  # a share that wrong images hardly change, and the deviations it lies at if normal
_OWN = 30  # rows of a class that has a scale of its own: of fewer, the lowest tenth are one or two
_FEWEST = 10  # rows of all that have a scale, which smaller classes share
_LEAST = 1e-3  # of a scale, in cosines: features in half precision tell no less
_BLOCK = 2**23  # values at a time


def find_outliers(nearest: Nearest, y: Array, *, groups: Indices | None = None) -> list[Finding]:
    """Rows whose mean distance to their ten nearest neighbours is unusual among the rows of their class, the farthest first.

    score: z / (z + bar), z the deviations above the class's median; above 0.5. The bar is 3, and more where all z spread more.

    Args:
        y: (N,) labels by place in ``nearest.rows``, -1: none; rows without one are a class, too.
        groups: (N,) the same number of rows that show the same image: these are not counted as neighbours.
    """
    distances = 1 - nearest.similarities.astype(np.float64)
    if groups is not None:
        distances[groups[nearest.places] == groups[:, None]] = np.nan
    distances = np.sort(distances, axis=1)[:, :_ASKED]  # NaN last
    counts = np.isfinite(distances).sum(axis=1)
    mean = np.divide(np.nansum(distances, axis=1), counts, out=np.full(len(y), np.nan), where=counts > 0)
    middle, scale = _scales(mean, y)
    z = (mean - middle[y]) / scale[y]  # of -1 the last
    words = "distance {:.3f} to its nearest neighbours, {:.3f} at the median of its class"
    return _findings("outlier", nearest.rows, z, (mean, middle[y]), words)


def find_off_topic(features: FeatureSource, rows: Indices, y: Array) -> list[Finding]:
    """Rows far from the mean of every class, the farthest first.

    It is the distance to means that counts, not to neighbours: off-topic images are often several of a kind, and then each other's
    nearest neighbours. score: z / (z + bar), z the least of the deviations above the classes' medians; above 0.5. The bar: as above.

    Args:
        features: (M, D). rows: (N,) numbers of rows among them. y: (N,) labels, -1: none; where nobody has one, all are one class.
            Of classes with fewer than 3 rows nothing is said.
    """
    z, distance, usual = off_topic_scores(features, rows, y)
    words = "distance {:.3f} to the mean of the nearest class, whose images have {:.3f} at the median"
    return _findings("off_topic", rows, z, (distance, usual), words)


def off_topic_scores(features: FeatureSource, rows: Indices, y: Array) -> tuple[Array, Array, Array]:
    """(N,) deviations z, distances to the nearest class, and that class's median; NaN where nothing is said."""
    found = np.full((3, len(rows)), np.nan)
    labels = y if (y >= 0).any() else np.zeros(len(y), np.intp)
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    present, counts = present[counts > 2], counts[counts > 2]
    judged = np.flatnonzero(np.isin(labels, [*present, -1]))
    if not len(present):
        return found[0], found[1], found[2]
    place = np.full(int(labels.max()) + 2, -1)  # and of -1 the last
    place[present] = np.arange(len(present))
    own = place[labels]
    sums = np.zeros((len(present), features.shape[1]))
    for part, X in _blocks(features, rows, judged, len(present)):
        known = own[part] >= 0
        np.add.at(sums, own[part][known], X[known])
    to_own = np.full(len(rows), np.nan)
    for part, X in _blocks(features, rows, judged, len(present)):
        known = own[part] >= 0
        to_own[part[known]] = _distances(X[known], own[part][known], sums)[
            np.arange(int(known.sum())), own[part][known]
        ]
    middle, scale = _scales(to_own, own)
    for part, X in _blocks(features, rows, judged, len(present)):
        distances = _distances(X, own[part], sums)
        z = (distances - middle[: len(present)]) / scale[: len(present)]
        best = z.argmin(axis=1)
        at = np.arange(len(part)), best
        found[:, part] = z[at], distances[at], middle[best]
    return found[0], found[1], found[2]


def _blocks(features: FeatureSource, rows: Indices, judged: Indices, n_classes: int) -> Iterator[tuple[Indices, Array]]:
    """Places and (n, D) float64 features of unit length."""
    step = max(1, _BLOCK // max(features.shape[1], n_classes))
    for start in range(0, len(judged), step):
        part = judged[start : start + step]
        X = features[rows[part]].astype(np.float64)
        yield part, scale_features(X, "unit", X, X)


def _distances(X: Array, own: Indices, sums: Array) -> Array:
    """(n, K) cosine distances of unit rows to the classes' means; of its own class without the row itself."""
    products, squares = X @ sums.T, (sums**2).sum(axis=1)
    itself = own[:, None] == np.arange(len(sums))
    lengths = np.sqrt(np.maximum(squares - itself * (2 * products - 1), 1e-12))
    distances: Array = 1 - (products - itself) / lengths
    return distances


def _scales(values: Array, y: Array) -> tuple[Array, Array]:
    """(C + 1,) median and deviation of each class's values, the last of rows without a label; of all where they are few."""

    def scale(some: Array) -> tuple[float, float]:
        some = some[np.isfinite(some)]
        if len(some) < _FEWEST:
            return np.nan, np.nan
        median, low = np.quantile(some, [0.5, 0.1])
        return median, max((median - low) / 1.2816, _LEAST)  # what 10 % of a normal distribution lie below

    of_all = scale(values)
    counts = np.bincount(y[np.isfinite(values)] + 1, minlength=int(y.max(initial=-1)) + 2)
    order = np.argsort(y, kind="stable")
    parts = np.split(values[order], np.searchsorted(y[order], np.arange(0, len(counts) - 1)))  # -1, 0, 1, ...
    found = [scale(part) if count >= _OWN else of_all for part, count in zip(parts, counts, strict=True)]
    median, deviation = np.roll(np.array(found), -1, axis=0).T
    return median, deviation


def _findings(kind: Kind, rows: Indices, z: Array, figures: tuple[Array, Array], words: str) -> list[Finding]:
    bar = _bar(z)
    far = np.flatnonzero(z > bar)  # NaN is not
    far = far[np.argsort(-z[far], kind="stable")]
    distance, usual = figures
    return [
        Finding(kind, int(rows[place]), float(z[place] / (z[place] + bar)), words.format(distance[place], usual[place]))
        for place in far.tolist()
    ]


def _bar(z: Array) -> float:
    """The z beyond which an image stands apart: 3 deviations, taken from below the median or from above, whichever are larger."""
    if not (known := np.isfinite(z)).any():
        return _FAR
    median, upper = np.quantile(z[known], [0.5, _UPPER])
    return float(max(_FAR, median + _FAR * (upper - median) / _OF_NORMAL))
