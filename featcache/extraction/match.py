"""Match images to cached rows: by path, size and modification time, without reading them; failing that by sha256.

In: an ``ImageList`` and caches of one spec. Out: ``Matches``, per image the cache and the row of its embedding.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.features import Features
from featcache.cache.format import Indices, digest_keys, encode_names, find
from featcache.images.read import ImageFiles, read_images
from featcache.images.source import ImageList


@dataclasses.dataclass(frozen=True)
class Matches:
    """Where the embedding of each of N images lies.

    Attributes:
        source: (N,) position in the list of caches, -1 if nowhere yet.
        row: (N,) row in that cache.
        sizes, mtimes: (N,) what to record for each image.
    """

    source: Indices
    row: Indices
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]

    def take(self, images: Indices) -> "Matches":
        """The same, for some of the images."""
        return Matches(self.source[images], self.row[images], self.sizes[images], self.mtimes[images])

    @property
    def missing(self) -> Indices:
        """The images without an embedding."""
        return np.flatnonzero(self.source < 0)

    def without(self, sources: int) -> "Matches":
        """As if the first so many caches were not there."""
        return dataclasses.replace(self, source=np.where(self.source < sources, -1, self.source))

    def with_parts(self, images: Indices, parts: Sequence[FeatureCache], number: int) -> "Matches":
        """``images`` as the rows of ``parts``, one after the other; these are the caches from position ``number`` on."""
        changed = Matches(self.source.copy(), self.row.copy(), self.sizes.copy(), self.mtimes.copy())
        start = 0
        for offset, part in enumerate(parts):
            here = images[start : start + len(part)]
            changed.source[here], changed.row[here] = number + offset, np.arange(len(part))
            changed.sizes[here], changed.mtimes[here] = part.rows.sizes, part.rows.mtimes
            start += len(part)
        return changed


def match(images: ImageList, caches: Sequence[FeatureCache]) -> Matches:
    """Find each image in the last of ``caches`` that has it.

    Reads only files whose path, size or time is new but whose size occurs.
    """
    source, row = np.full(len(images), -1, np.intp), np.full(len(images), -1, np.intp)
    sizes, mtimes = images.sizes.copy(), images.mtimes.copy()
    paths = encode_names(images.paths)
    for number, cache in enumerate(caches):
        rows = find(cache.rows.paths, paths)
        same = (rows >= 0) & (cache.rows.sizes[rows] == images.sizes) & (cache.rows.mtimes[rows] == images.mtimes)
        source[same], row[same] = number, rows[same]
    if caches:
        missing = np.flatnonzero(source < 0)
        suspects = missing[np.isin(images.sizes[missing], np.concatenate([cache.rows.sizes for cache in caches]))]
        read = hash_files(images, suspects)
        sizes[read.indices], mtimes[read.indices] = read.sizes, read.mtimes
        for number, cache in enumerate(caches):
            rows = find(digest_keys(cache.rows.digests), read.digests)
            found = read.indices[rows >= 0]
            source[found], row[found] = number, rows[rows >= 0]
    return Matches(source, row, sizes, mtimes)


@dataclasses.dataclass(frozen=True)
class HashedFiles:
    """What reading n files told.

    Attributes:
        indices: (n,) which, of those that could be read. digests: (n,) sha256, as ``digest_keys``. sizes, mtimes: (n,).
    """

    indices: Indices
    digests: npt.NDArray[np.bytes_]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]


def hash_files(files: ImageFiles, indices: Indices) -> HashedFiles:
    """Read some of ``files``; those that cannot be read are left out: embedding them will give the reason."""
    workers = min(32, (os.cpu_count() or 1) + 4)
    reads = [read for read in read_images(files, indices.tolist(), len, workers=workers) if not read.reason]
    return HashedFiles(
        np.array([read.position for read in reads], np.intp),
        np.array([read.digest for read in reads], "S32"),
        np.array([read.size for read in reads], np.int64),
        np.array([read.mtime for read in reads], np.int64),
    )


def gather(
    takes: Sequence[Callable[[Indices], Features]], matches: Matches, order: Indices, *, size: int = 4096
) -> Iterator[Features]:
    """The features of the images ``order``, in blocks; ``takes`` give rows of the caches that ``matches`` counts."""
    for start in range(0, len(order), size):
        block = order[start : start + size]
        features: Features | None = None
        for number in np.unique(matches.source[block]):
            here = matches.source[block] == number
            rows = takes[number](matches.row[block][here])
            if features is None:
                features = np.empty((len(block), rows.shape[1]), rows.dtype)
            features[here] = rows
        if features is not None:
            yield features
