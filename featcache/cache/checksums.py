"""Checksums of a cache's columns, one each, so that damage can be told apart: what is broken, and what can be trusted.

In: the columns beside the features and what a file has recorded. Out: CRC-32 values, and the names of damaged columns.
Files of the first releases have one checksum over all columns and none of these.
"""

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

PROVENANCE = "provenance"
CHECKSUMS = "checksums"  # no column: what is wrong is one of the checksums themselves


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
