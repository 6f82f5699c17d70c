"""Oracle: a real in-memory file, under the same random operations."""

import io
import os

import numpy as np

from featcache.cache.sparse_file import SparseFile


def test_behaves_like_a_file() -> None:
    rng = np.random.default_rng(0)
    real, ours = io.BytesIO(), SparseFile()
    for _ in range(400):
        position, length = int(rng.integers(0, 30_000)), int(rng.integers(0, 9_000))
        data = rng.bytes(length)
        for file in (real, ours):
            file.seek(position)
            file.write(data)
        assert ours.seek(0, os.SEEK_END) == len(real.getvalue())
        start = int(rng.integers(0, 20_000))
        wanted, got = real.getvalue()[start : start + 7000], bytearray(7000)
        ours.seek(start)
        ours.readinto(got)
        assert bytes(got[: len(wanted)]) == wanted
    hole = range(5000, 17_001)
    rebuilt = bytearray(ours.size)
    for offset, data in ours.segments(hole):
        assert offset + len(data) <= hole.start or offset >= hole.stop
        rebuilt[offset : offset + len(data)] = data
    expected = bytearray(real.getvalue())
    expected[hole.start : hole.stop] = bytes(len(hole))
    assert rebuilt == expected
