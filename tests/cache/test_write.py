"""What is written is read back, by us and by plain h5py; a cache is complete or as it was before."""

import dataclasses
import io
import itertools
import os
import resource
import shutil
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from caches import make_cache, make_rows
from conftest import SPEC

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Rows, encode_names
from featcache.cache.write import _columns, _layout, _SparseFile, write_cache
from featcache.errors import Refusal, StorageError


@pytest.mark.parametrize("n", [0, 1, 3, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("dim", [1, 8, 2048])
def test_round_trip(tmp_path: Path, n: int, dim: int) -> None:
    path = tmp_path / "f.h5"
    X = make_cache(path, n, dim)
    cache = FeatureCache.open(path)
    np.testing.assert_array_equal(cache.X, X)
    assert cache.X.flags.aligned
    assert cache.rows.equals(make_rows(n))
    assert (cache.spec, cache.classes, cache.refused) == (SPEC, ("a", "b"), (("x.jpg", "empty file"),))
    assert cache.fingerprint == SPEC.fingerprint
    assert cache.verify() == []
    with h5py.File(path) as plain:  # any HDF5 reader sees the same
        np.testing.assert_array_equal(plain["features"][:], X)
        assert list(plain["paths"].asstr()[:]) == list(cache.paths)


def test_float32_is_kept(tmp_path: Path) -> None:
    X, spec = (
        np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32),
        dataclasses.replace(SPEC, storage="float32"),
    )
    write_cache(tmp_path / "f.h5", make_rows(7), [X], dim=5, spec=spec, classes=("a", "b"))
    np.testing.assert_array_equal(FeatureCache.open(tmp_path / "f.h5").X, X)


def test_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    names = ["caf\udce9.jpg", "new\nline", '"quoted"', "=cmd()", "\u202eltr", "n\u0303", "\u00f1"]
    rows = make_rows(len(names))
    rows = Rows(**(vars(rows) | {"paths": encode_names(names)}))
    write_cache(tmp_path / "f.h5", rows, [np.zeros((len(names), 2))], dim=2, spec=SPEC, classes=("a", "b"))
    assert FeatureCache.open(tmp_path / "f.h5").paths == tuple(names)


def test_wrong_number_of_rows_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    X = make_cache(tmp_path / "f.h5")
    for blocks in ([np.zeros((3, 8))], [np.zeros((50, 7))]):
        with pytest.raises(ValueError, match="rows|shape"):
            write_cache(tmp_path / "f.h5", make_rows(50), blocks, dim=8, spec=SPEC, classes=("a", "b"))
    np.testing.assert_array_equal(FeatureCache.open(tmp_path / "f.h5").X, X)
    assert os.listdir(tmp_path) == ["f.h5"]


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    X = make_cache(tmp_path / "f.h5")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 5000, 20_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(StorageError, match="cannot write"):
                make_cache(tmp_path / "f.h5", 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    np.testing.assert_array_equal(FeatureCache.open(tmp_path / "f.h5").X, X)
    assert os.listdir(tmp_path) == ["f.h5"]


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="not enough space"):
        make_cache(tmp_path / "f.h5")


def test_what_is_laid_out_in_memory_leaves_out_the_features(tmp_path: Path) -> None:
    """Whatever their size: all that is taken is a block at a time."""
    row = np.ones((1, 8_000_000), np.float16)
    tracemalloc.start()
    try:
        write_cache(tmp_path / "f.h5", make_rows(3), [row] * 3, dim=row.size, spec=SPEC)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < row.nbytes / 4
    assert (tmp_path / "f.h5").stat().st_size > 3 * row.nbytes


def test_a_sparse_file_behaves_like_a_file() -> None:
    """Oracle: a real one in memory, under the same random operations."""
    rng = np.random.default_rng(0)
    real, ours = io.BytesIO(), _SparseFile()
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
    rebuilt = bytearray(ours.size)
    for offset, data in ours.written:
        rebuilt[offset : offset + len(data)] = data
    assert rebuilt == real.getvalue()


def test_libhdf5_writes_nothing_where_values_go() -> None:
    """Values are written by plain I/O, in any order: what is laid out must not touch them, nor they each other."""
    rng = np.random.default_rng(0)
    for n in (0, 1, 7, *rng.integers(1, 5000, 20).tolist()):
        dim, width = rng.integers(1, 300, 2).tolist()
        rows = dataclasses.replace(make_rows(n), paths=np.full(n, b"x" * width))
        columns = _columns(rows, ("a",), [Refusal("b", "c" * width)] * (n % 3))
        texts = ("{}", "x" * (width * 300))
        frame, places = _layout(columns, texts, (n, dim), np.dtype("<f2"), n + 1, np.ones(min(n, 1), np.uint32))
        sizes = {name: values.nbytes for name, values in columns.items()} | {"features": n * dim * 2}
        spans = sorted((places[name], places[name] + size) for name, size in sizes.items() if size)
        spans += [(offset, offset + len(data)) for offset, data in frame.written]
        values, written = spans[: -len(frame.written)], spans[-len(frame.written) :]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(values))
        assert not any(max(a, c) < min(b, d) for a, b in values for c, d in written)
        assert values[-1][1] <= frame.size
