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
from featcache.cache.format import Indices, encode_names, find
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

    def put(self, images: Indices, source: int, rows: Indices) -> None:
        """Note that ``images`` are these rows of the cache ``source``, but for those whose row is -1."""
        there = rows >= 0
        self.source[images[there]], self.row[images[there]] = source, rows[there]


def match(images: ImageList, caches: Sequence[FeatureCache]) -> Matches:
    """Find each image in the last of ``caches`` that has it.

    Reads only files whose path, size or time is new but whose size occurs.
    """
    nowhere = np.full(len(images), -1, np.intp)
    matches = Matches(nowhere, nowhere.copy(), images.sizes.copy(), images.mtimes.copy())
    paths, everything = encode_names(images.paths), np.arange(len(images))
    for number, cache in enumerate(caches):
        if not len(cache):  # a part of refusals alone
            continue
        rows = find(cache.rows.paths, paths)
        same = (cache.rows.sizes[rows] == images.sizes) & (cache.rows.mtimes[rows] == images.mtimes)
        matches.put(everything, number, np.where(same, rows, -1))
    if caches:
        missing = matches.missing
        suspects = missing[np.isin(images.sizes[missing], np.concatenate([cache.rows.sizes for cache in caches]))]
        read = hash_files(images, suspects)
        matches.sizes[read["position"]], matches.mtimes[read["position"]] = read["size"], read["mtime"]
        for number, cache in enumerate(caches):
            matches.put(read["position"], number, find(cache.rows.keys, read["digest"]))
    return matches


def find_in(caches: Sequence[FeatureCache], paths: npt.NDArray[np.bytes_]) -> tuple[Indices, Indices]:
    """(n,) the first of ``caches`` that has each of ``paths`` (n,), and the row there; -1 where none has. Reads no file."""
    if not caches:
        return np.full(len(paths), -1, np.intp), np.full(len(paths), -1, np.intp)
    place = find(
        np.concatenate([cache.rows.paths for cache in caches]), paths
    )  # one sort, however many parts there are
    starts = np.cumsum([0, *map(len, caches)])
    number = np.searchsorted(starts, place, side="right") - 1
    return np.where(place < 0, -1, number), np.where(place < 0, -1, place - starts[number])


def hash_files(files: ImageFiles, indices: Indices) -> npt.NDArray[np.void]:
    """Read some of ``files``: (n,) position, digest, size and mtime of those that can be read; embedding says why others cannot."""
    workers = min(32, (os.cpu_count() or 1) + 4)
    reads = read_images(files, indices.tolist(), len, workers=workers)
    found = [(read.position, read.digest, read.size, read.mtime) for read in reads if not read.reason]
    return np.array(found, [("position", np.intp), ("digest", "S32"), ("size", np.int64), ("mtime", np.int64)])


def gather(
    takes: Sequence[Callable[[Indices], Features]], matches: Matches, order: Indices, *, size: int = 4096
) -> Iterator[Features]:
    """The features of the images ``order``, in blocks; ``takes`` give rows of the caches that ``matches`` counts."""
    for start in range(0, len(order), size):
        block = order[start : start + size]
        source, row = matches.source[block], matches.row[block]
        taken = {number: takes[number](row[source == number]) for number in np.unique(source)}
        some = next(iter(taken.values()))
        features = np.empty((len(block), some.shape[1]), some.dtype)
        for number, rows in taken.items():
            features[source == number] = rows
        yield features
