"""The best similarities of each row so far, and whose they are, as blocks of similarities come. In: blocks. Out: sorted numbers.

Of a block only what surpasses the worst that is kept is looked at. A similarity and its place make one number, a key.
"""

import numpy as np
import numpy.typing as npt

from featcache.heads.head import Array, Indices

EMPTY = (-0x7F800001 << 32) | 0xFFFFFFFF  # the key of -inf at place 0, from which the first other may be subtracted
Keys = npt.NDArray[np.int64]


def keep(best: Keys, worst: Keys, similar: Array, first: int) -> None:
    """Put those of (n, m) similarities that are among the best of their row into ``best``; m rows from ``first`` on.

    worst: (n,) least of each row of ``best``, kept up with it.
    """
    count = best.shape[1]
    bar = similarities_of(worst - (0xFFFFFFFF - first))  # what equals the worst and comes before it surpasses this
    if worst[0] == EMPTY and similar.shape[1] >= count:  # these rows have met nobody
        bar = _surpassed(similar, count)
    if similar.flags.c_contiguous:
        row, column = np.divmod(np.flatnonzero(similar > bar[:, None]), similar.shape[1])
    else:  # the other side of a product, as it lies in memory
        column, row = np.divmod(np.flatnonzero(bar < similar.T), similar.shape[0])
        order = np.argsort(row.astype(np.uint16), kind="stable")
        row, column = row[order], column[order]
    if not len(row):
        return
    counts = np.bincount(row, minlength=len(best))
    changed, starts = np.flatnonzero(counts), np.cumsum(counts) - counts
    keys = np.full((len(changed), count + counts.max()), EMPTY)
    keys[:, :count] = best[changed]
    keys[(np.cumsum(counts > 0) - 1)[row], np.arange(count, len(row) + count) - starts[row]] = keys_of(
        similar[row, column], column + first
    )
    keys.partition(counts.max(), axis=1)
    best[changed] = keys = keys[:, -count:]
    worst[changed] = keys.min(axis=1)


def _surpassed(similar: Array, count: int) -> npt.NDArray[np.float32]:
    """(n,) values that at least ``count`` of each row of (n, m) surpass: the least maximum of so many parts of the row."""
    each = similar.shape[1] // count
    if similar.flags.c_contiguous:
        parts = similar[:, : each * count].reshape(len(similar), count, each).max(axis=2).min(axis=1)
    else:
        parts = similar.T[: each * count].reshape(count, each, len(similar)).max(axis=1).min(axis=0)
    bar: npt.NDArray[np.float32] = np.nextafter(parts, -np.inf, dtype=np.float32)
    return bar


def keys_of(similarities: npt.NDArray[np.float32], places: Indices) -> Keys:
    """Numbers in the order of similarities and, of equal ones, against that of places: NumPy sorts them many times faster."""
    bits = (similarities + np.float32(0)).view(np.int32)  # of two zeros one
    bits = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))  # negative numbers count backwards
    return (bits.astype(np.int64) << 32) | (0xFFFFFFFF - places)


def places_of(keys: Keys) -> Indices:
    """The places in keys."""
    return (0xFFFFFFFF - (keys & 0xFFFFFFFF)).astype(np.intp)


def similarities_of(keys: Keys) -> npt.NDArray[np.float32]:
    """The similarities in keys, to the bit."""
    bits = (keys >> 32).astype(np.int32)
    found: npt.NDArray[np.float32] = (bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    return found
