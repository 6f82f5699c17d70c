"""What a cache file looks like inside: format version 1, its columns and its checksums.

Datasets (all contiguous, uncompressed, little-endian; row i of each belongs to the same image)::

    features         (N, D)  float16 or float32     labels   (N,)    int32, index into classes, -1 unknown
    paths            (N,)    UTF-8 strings          splits   (N,)    uint8: 0 none, 1 train, 2 val, 3 test
    digests          (N, 32) uint8, sha256 of file  classes  (C,)    UTF-8 strings, sorted
    sizes, mtimes    (N,)    int64, bytes and ns    refused/paths, refused/reasons  (R,) UTF-8 strings

Root attributes: ``format``, ``format_version``, ``spec`` (canonical JSON of all that changes the numbers),
``fingerprint`` (sha256 of ``spec``), ``provenance`` (JSON, never compared), and the checksums: ``features_crc32`` (one
for every ``rows_per_checksum`` rows of features), ``metadata_crc32`` (all the rest) and, missing in the first files,
``column_crc32`` (one for each dataset but ``features``, in the order of ``COLUMNS``, and one for ``provenance``).
"""

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "featcache"


FORMAT_VERSION = 1
COLUMNS = (
    ("paths", "S", 1),
    ("labels", "i", 1),
    ("classes", "S", 1),
    ("splits", "u", 1),
    ("digests", "u", 2),
    ("sizes", "i", 1),
    ("mtimes", "i", 1),
    ("refused/paths", "S", 1),
    ("refused/reasons", "S", 1),
)
ROW_COLUMNS = ("paths", "labels", "splits", "digests", "sizes", "mtimes")
PROVENANCE = "provenance"
CHECKSUMS = "checksums"  # no column: what is wrong is one of the checksums themselves
Indices = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The columns beside the features; row i of each belongs to the same image.

    Attributes:
        paths: (N,) bytes, UTF-8 (or the file system's own bytes), relative to the source root.
        labels: (N,) int32. splits: (N,) uint8. digests: (N, 32) uint8. sizes, mtimes: (N,) int64.
    """

    paths: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int32]
    splits: npt.NDArray[np.uint8]
    digests: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def equals(self, other: "Rows") -> bool:
        """Whether all columns are the same."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def encode_names(names: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Names as fixed-width bytes; file names that are not UTF-8 keep their own bytes."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def decode_names(names: npt.NDArray[np.bytes_]) -> tuple[str, ...]:
    """Inverse of ``encode_names``."""
    return tuple(name.decode("utf-8", "surrogateescape") for name in names.tolist())


def metadata_checksum(columns: dict[str, npt.NDArray[Any]], texts: tuple[str, str]) -> int:
    """CRC-32 over the texts of spec and provenance, and over the name, type, shape and bytes of every column."""
    value = zlib.crc32("\0".join(texts).encode())
    for name, values in columns.items():
        value = zlib.crc32(f"{name}{values.dtype.str}{values.shape}".encode(), value)
        value = zlib.crc32(bytes_of(values), value)
    return value


def bytes_of(values: npt.NDArray[Any]) -> memoryview:
    """The memory of an array, for what takes bytes; without a copy if it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def column_checksum(name: str, values: npt.NDArray[Any]) -> int:
    """CRC-32 over the name, type, shape and bytes of a column."""
    head = zlib.crc32(f"{name}{values.dtype.str}{values.shape}".encode())
    return zlib.crc32(bytes_of(values), head)


def column_checksums(columns: dict[str, npt.NDArray[Any]], provenance: str) -> npt.NDArray[np.uint32]:
    """(C + 1,) CRC-32 of each of C columns, in their order, and of the provenance's text."""
    sums = [column_checksum(name, values) for name, values in columns.items()]
    return np.array([*sums, zlib.crc32(provenance.encode())], np.uint32)


def damaged_columns(
    columns: dict[str, npt.NDArray[Any]], provenance: str, recorded: npt.NDArray[np.uint32] | None, *, whole: bool
) -> tuple[str, ...]:
    """Names of the columns that are damaged (``PROVENANCE`` may be among them), ``CHECKSUMS`` if only a checksum is.

    Args:
        columns: C of them, as read. provenance: its text, as read.
        recorded: (C + 1,) as the file has them; None if it has none, and then all are suspects.
        whole: whether the one checksum over all columns and texts matches.

    Raises:
        ValueError: ``recorded`` is of another shape.
    """
    suspects = (*columns, PROVENANCE)
    if recorded is None:
        return () if whole else suspects
    if np.shape(recorded) != (len(suspects),):
        raise ValueError("its checksums are incomplete")
    found = column_checksums(columns, provenance)
    wrong = tuple(suspects[index] for index in np.flatnonzero(found != recorded))
    # Both kinds of checksum cover the same bytes: where they contradict each other, a checksum is what is damaged.
    return wrong if whole == (not wrong) else (CHECKSUMS,)


def update_checksums(sums: npt.NDArray[np.uint32], data: npt.NDArray[Any], start: int, per_checksum: int) -> None:
    """Continue the running CRC-32 of every checksum block that ``data``, beginning at row ``start``, touches."""
    position = 0
    while position < len(data):
        number = (start + position) // per_checksum
        stop = min(len(data), (number + 1) * per_checksum - start)
        sums[number] = zlib.crc32(bytes_of(data[position:stop]), int(sums[number]))
        position = stop


def digest_keys(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    """(N, 32) uint8 as N sortable keys."""
    return np.ascontiguousarray(digests).view("S32").reshape(-1)


def find(haystack: npt.NDArray[Any], needles: npt.NDArray[Any]) -> Indices:
    """Position of each needle in ``haystack``, -1 where it does not occur."""
    if not len(haystack):
        return np.full(len(needles), -1, np.intp)
    order = np.argsort(haystack, kind="stable")
    place = np.minimum(np.searchsorted(haystack, needles, sorter=order), len(haystack) - 1)
    candidates = order[place]
    return np.where(haystack[candidates] == needles, candidates, -1)
