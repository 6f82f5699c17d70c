"""Which images of a list are embedded already, and where.

In: an ``ImageList`` and caches of one spec. Out: ``Known``, per image the cache and row of its embedding. An image is
recognised by path, size and modification time, without reading it; failing that by the sha256 of its content.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.features import Features
from featcache.cache.format import Indices, digest_keys, encode_names, find
from featcache.images.read import read_image
from featcache.images.refusal import RefusedImage
from featcache.images.source import ImageList


@dataclasses.dataclass
class Known:
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

    def set(self, images: Indices, source: int, rows: Indices) -> None:
        """Record that ``images`` lie in ``rows`` of the cache at position ``source``."""
        self.source[images], self.row[images] = source, rows

    def take(self, images: Indices) -> "Known":
        """The same, for some of the images."""
        return Known(self.source[images], self.row[images], self.sizes[images], self.mtimes[images])

    @property
    def missing(self) -> Indices:
        """The images without an embedding."""
        return np.flatnonzero(self.source < 0)


def recognise(images: ImageList, caches: list[FeatureCache]) -> Known:
    """Find each image in the last of ``caches`` that has it.

    Reads only files whose path, size or time is new but whose size occurs.
    """
    known = Known(
        source=np.full(len(images), -1, np.intp),
        row=np.full(len(images), -1, np.intp),
        sizes=images.sizes.copy(),
        mtimes=images.mtimes.copy(),
    )
    paths = encode_names(images.paths)
    for number, cache in enumerate(caches):
        rows = find(cache.rows.paths, paths)
        same = (rows >= 0) & (cache.rows.sizes[rows] == images.sizes) & (cache.rows.mtimes[rows] == images.mtimes)
        known.set(np.flatnonzero(same), number, rows[same])
    if caches:
        _recognise_by_content(images, caches, known)
    return known


def _recognise_by_content(images: ImageList, caches: list[FeatureCache], known: Known) -> None:
    sizes = np.unique(np.concatenate([cache.rows.sizes for cache in caches]))
    suspects = known.missing[np.isin(images.sizes[known.missing], sizes)]
    indices, digests, sizes, mtimes = hash_files(images, suspects)
    known.sizes[indices], known.mtimes[indices] = sizes, mtimes
    for number, cache in enumerate(caches):
        rows = find(digest_keys(cache.rows.digests), digests)
        known.set(indices[rows >= 0], number, rows[rows >= 0])


def hash_files(
    images: ImageList, indices: Indices
) -> tuple[Indices, npt.NDArray[np.bytes_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Read those of ``images``: which could be read, and of each sha256 as a key, size and modification time."""

    def read(index: int) -> tuple[int, bytes, int, int] | None:
        try:
            data, size, mtime = read_image(images.root / images.paths[index])
        except RefusedImage:
            return None  # embedding it will give the reason
        return index, hashlib.sha256(data).digest(), size, mtime

    with ThreadPoolExecutor() as pool:
        found = [entry for entry in pool.map(read, indices.tolist()) if entry]
    numbers, digests, sizes, mtimes = zip(*found, strict=True) if found else ((), (), (), ())
    return np.array(numbers, np.intp), np.array(digests, "S32"), np.array(sizes, np.int64), np.array(mtimes, np.int64)


def gather(
    takes: Sequence[Callable[[Indices], Features]], known: Known, order: Indices, size: int = 4096
) -> Iterator[Features]:
    """The features of the images ``order``, in blocks; ``takes`` give rows, in the order that ``known`` counts."""
    for start in range(0, len(order), size):
        block = order[start : start + size]
        features: Features | None = None
        for number in np.unique(known.source[block]):
            here = known.source[block] == number
            rows = takes[number](known.row[block][here])
            if features is None:
                features = np.empty((len(block), rows.shape[1]), rows.dtype)
            features[here] = rows
        if features is not None:
            yield features
