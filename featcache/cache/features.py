"""Feature rows out of an open file: plain reads, where a memory map would keep every page it ever touched in memory.

In: a file and where in it an (N, D) array lies. Out: copies of some rows, or all of them block by block. The file stays
open from the first row to the last, so that a file put in its place meanwhile cannot mix its rows with these.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.format import bytes_of
from featcache.errors import CacheError, DamagedCacheError

Features = npt.NDArray[np.floating[Any]]
Identity = tuple[int, ...]


class FeatureReader:
    """(N, D) features in an open file. Indexed with row numbers, like an array; closed by leaving its ``with``.

    Several threads may read at a time.

    Attributes:
        shape: (N, D). dtype: as stored.

    Raises:
        CacheError: the file cannot be opened or read, or ends too early.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self._path, self._offset, self._row_bytes = path, offset, shape[1] * dtype.itemsize
        self._lock = threading.Lock()
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error

    def __enter__(self) -> "FeatureReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def identity(self) -> Identity:
        """What tells this file from another under the same name, and from itself after a change."""
        return identity_of(self._file.fileno())

    def __getitem__(self, rows: npt.NDArray[np.integer[Any]]) -> Features:
        """Copy of ``rows``, (n,) numbers in any order, also repeated: (n, D). Raises CacheError, IndexError."""
        rows = np.asarray(rows, np.intp)
        if not len(rows):
            return np.empty((0, self.shape[1]), self.dtype)
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"rows must lie between 0 and {len(self) - 1}, found {rows.min()} to {rows.max()}")
        steps = np.diff(rows)
        if (steps <= 0).any():  # the file is read once, from its beginning to its end
            unique, inverse = np.unique(rows, return_inverse=True)
            return np.asarray(self[unique][inverse.reshape(-1)])
        values: Features = np.empty((len(rows), self.shape[1]), self.dtype)
        cuts = [0, *(np.flatnonzero(steps > 1) + 1).tolist(), len(rows)]
        firsts = rows[cuts[:-1]].tolist()
        memory = bytes_of(values)
        for first, start, stop in zip(firsts, cuts[:-1], cuts[1:], strict=True):  # neighbours in one read
            self._fill(memory[start * self._row_bytes : stop * self._row_bytes], first)
        return values

    def scan(self, size: int) -> Iterator[Features]:
        """Yield all rows in order, ``size`` at a time, in memory that the next block overwrites. Raises CacheError."""
        buffer = np.empty((min(size, len(self)), self.shape[1]), self.dtype)
        for start in range(0, len(self), size):
            block = buffer[: min(size, len(self) - start)]
            self._fill(bytes_of(block), start)
            yield block

    def map(self) -> Features:
        """The features as a read-only array on the file, which keeps itself open."""
        if not len(self):
            return np.empty(self.shape, self.dtype)
        mapped = np.asarray(np.memmap(self._file, self.dtype, "r", self._offset, self.shape))
        return mapped if mapped.flags.aligned else mapped.copy()  # HDF5 packs features below a few KiB anywhere

    def _fill(self, memory: memoryview, first: int) -> None:
        """Fill ``memory`` with the bytes of the rows from ``first`` on."""
        position = self._offset + first * self._row_bytes
        try:
            while memory:  # one read gives at most 2 GiB, and may give less
                if not (count := self._read(memory, position)):
                    raise DamagedCacheError(
                        f"{self._path} ends too early: it was cut off or replaced since it was opened; run the command again"
                    )
                memory, position = memory[count:], position + count
        except OSError as error:
            raise CacheError(f"{self._path} cannot be read: {error.strerror or error}") from error

    def _read(self, memory: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [memory], position)
        with self._lock:  # Windows: the position in the file is shared by all threads
            self._file.seek(position)
            return self._file.readinto(memory) or 0


def identity_of(descriptor: int) -> Identity:
    """``FeatureReader.identity`` of an open file."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_finite(features: Features) -> npt.NDArray[np.bool_]:
    """(n, D) features -> (n,), whether all values of a row are finite."""
    if features.dtype != np.float16:
        return np.asarray(np.isfinite(features).all(axis=1))
    # NumPy takes float16 one by one; comparing exponents is ten times as fast: all ones mean infinity or NaN.
    exponents = features.view(np.uint16) & np.uint16(0x7C00)
    return np.asarray((exponents != 0x7C00).all(axis=1))
