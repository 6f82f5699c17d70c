"""Match images to cached rows: by path, size and modification time, without reading them; failing that by sha256.

In: an ``ImageList`` and caches of one spec. Out: ``Matches``, per image the cache and the row of its embedding.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Indices, Rows, encode_names
from featcache.images.read import ImageFiles, read_images
from featcache.images.source import ImageList

BLOCK = 4096  # rows that are gathered at a time


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
    if not caches:
        return matches
    # There may be thousands of parts: each looks for its few rows among all images, not the other way round.
    places = _Places(encode_names(images.paths))
    for number, cache in enumerate(caches):
        for found, rows in places.of(cache.rows.paths):
            same = unread_alike(images, found, cache.rows, rows)
            matches.put(found[same], number, rows[same])
            matches.sizes[found[same]] = cache.rows.sizes[rows[same]]
    del places
    if len(missing := matches.missing):
        occurs = np.isin(images.sizes[missing], np.concatenate([cache.rows.sizes for cache in caches]))
        suspects = missing[occurs | (images.sizes[missing] < 0)]
        read = hash_files(images, suspects)
        matches.sizes[read["position"]], matches.mtimes[read["position"]] = read["size"], read["mtime"]
        places = _Places(read["digest"])
        for number, cache in enumerate(caches):
            for found, rows in places.of(cache.rows.keys):
                matches.put(read["position"][found], number, rows)
    return matches


class _Places:
    """Where in (N,) ``keys`` others lie, of which some may occur several times."""

    def __init__(self, keys: npt.NDArray[np.bytes_]) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def of(self, wanted: npt.NDArray[np.bytes_]) -> Iterator[tuple[Indices, Indices]]:
        """All pairs of equal ones, some at a time: positions in ``keys`` and in ``wanted``, these descending: the first comes last."""
        for start in range(0, len(wanted), BLOCK)[::-1]:
            found, rows = self._of_some(wanted[start : start + BLOCK])
            yield found, start + rows

    def _of_some(self, wanted: npt.NDArray[np.bytes_]) -> tuple[Indices, Indices]:
        keys = wanted.astype(self._sorted.dtype)  # or all of the others would be made as wide as these, each time
        first, end = (np.searchsorted(self._sorted, keys, side) for side in ("left", "right"))
        counts = np.where(keys == wanted, end - first, 0)
        rows = np.repeat(np.arange(len(wanted)), counts)
        nth = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        return self._order[first[rows] + nth][::-1], rows[::-1]


def find_in(caches: Sequence[FeatureCache], paths: npt.NDArray[np.bytes_]) -> tuple[Indices, Indices]:
    """(n,) the first of ``caches`` that has each of ``paths`` (n,), and the row there; -1 where none has. Reads no file."""
    number, row, places = np.full(len(paths), -1, np.intp), np.full(len(paths), -1, np.intp), _Places(paths)
    for position in range(len(caches))[::-1]:
        for found, rows in places.of(caches[position].rows.paths):
            number[found], row[found] = position, rows
    return number, row


def unread_alike(images: ImageList, at: Indices, rows: Rows, row: Indices) -> npt.NDArray[np.bool_]:
    """(n,) whether size and time prove that the images ``at`` are what ``rows`` have in ``row``; -1: nowhere.

    A time that is not known proves nothing, nor does one that several files may have by no accident: see ``ImageList``. Of images
    in Parquet no size is listed; their time is of the file's size, too.
    """
    sizes, times = images.sizes[at], images.mtimes[at]
    alike = (times >= 0) & ((rows.sizes[row] == sizes) | (sizes < 0))
    found: npt.NDArray[np.bool_] = (at >= 0) & (row >= 0) & alike & (rows.mtimes[row] == times)
    return found


def hash_files(files: ImageFiles, indices: Indices) -> npt.NDArray[np.void]:
    """Read some of ``files``: (n,) position, digest, size and mtime of those that can be read; embedding says why others cannot."""
    workers = min(32, (os.cpu_count() or 1) + 4)
    reads = read_images(files, indices.tolist(), len, workers=workers)
    found = [(read.position, read.digest, read.size, read.mtime) for read in reads if not read.reason]
    return np.array(found, [("position", np.intp), ("digest", "S32"), ("size", np.int64), ("mtime", np.int64)])


def gather(
    takes: Sequence[Callable[[Indices], npt.NDArray[Any]]], matches: Matches, order: Indices
) -> Iterator[npt.NDArray[Any]]:
    """The features, or digests, of the images ``order``, in blocks; ``takes`` give rows of the caches that ``matches`` counts."""
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        source, row = matches.source[block], matches.row[block]
        taken = {number: takes[number](row[source == number]) for number in np.unique(source)}
        some = next(iter(taken.values()))
        features = np.empty((len(block), some.shape[1]), some.dtype)
        for number, rows in taken.items():
            features[source == number] = rows
        yield features
