"""Rows of features are read as they lie in the file, by any number of threads, and never from another file. Oracle: the map."""

import dataclasses
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from caches import make_cache, make_rows
from conftest import SPEC

from featcache.cache.cache import FeatureCache
from featcache.cache.features import is_finite
from featcache.cache.write import write_cache
from featcache.errors import CacheError, SourceError


@pytest.fixture(params=["preadv", "seek"])
def way_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading: with a position, and without where the system has no such call."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.usefixtures("way_of_reading")
def test_rows_read_are_those_of_the_map(tmp_path: Path, dtype: str) -> None:
    make_cache(tmp_path / "f.h5", 3000, spec=dataclasses.replace(SPEC, storage=dtype))
    cache, rng = FeatureCache.open(tmp_path / "f.h5"), np.random.default_rng(0)
    lists = [
        rng.integers(0, 3000, 500),  # random, some repeated
        np.sort(rng.choice(3000, 500, replace=False)),
        np.arange(2999, -1, -1),
        np.arange(3000),
        np.repeat(np.arange(10), 3),
        np.array([2999]),
        np.array([], np.intp),
    ]
    with cache.reader() as features:
        assert (features.shape, features.dtype, len(features)) == ((3000, 8), cache.dtype, 3000)
        for rows in lists:
            np.testing.assert_array_equal(features[rows], cache.X[rows], strict=True)
            np.testing.assert_array_equal(cache.take(rows), cache.X[rows], strict=True)
            np.testing.assert_array_equal(np.concatenate([cache.X[:0], *cache.blocks(rows, size=7)]), cache.X[rows])
        np.testing.assert_array_equal(np.concatenate([block.copy() for block in features.scan(700)]), cache.X)
        for wrong in (-1, 3000):
            with pytest.raises(IndexError, match="between 0 and 2999"):
                features[np.array([0, wrong])]


@pytest.mark.usefixtures("way_of_reading")
def test_several_threads_read_at_a_time(tmp_path: Path) -> None:
    X = make_cache(tmp_path / "f.h5", 3000)
    rows = [np.sort(np.random.default_rng(seed).choice(3000, 300, replace=False)) for seed in range(40)]
    with FeatureCache.open(tmp_path / "f.h5").reader() as features, ThreadPoolExecutor(8) as pool:
        for picked, got in zip(rows, pool.map(features.__getitem__, rows), strict=True):
            np.testing.assert_array_equal(got, X[picked])


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads are counted as preadv")
def test_neighbouring_rows_take_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(tmp_path / "f.h5", 3000)
    with h5py.File(tmp_path / "f.h5") as file:
        start = file["features"].id.get_offset()
    reads, preadv = [], os.preadv
    with FeatureCache.open(tmp_path / "f.h5").reader() as features:
        monkeypatch.setattr(os, "preadv", lambda *call: (reads.append((call[2] - start) // 16), preadv(*call))[1])
        features[np.r_[5:900, 1000, 1500:3000]]
    assert reads == [5, 1000, 1500]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    make_cache(tmp_path / "f.h5", 3000)
    before = len(os.listdir("/proc/self/fd"))
    cache = FeatureCache.open(tmp_path / "f.h5")
    cache.verify()
    cache.take(np.arange(5))
    cache.check_finite(np.arange(3000))
    next(blocks := cache.blocks(np.arange(3000)))
    blocks.close()
    with pytest.raises(RuntimeError), cache.reader():
        raise RuntimeError
    assert len(os.listdir("/proc/self/fd")) == before


def test_features_are_verified_once_and_again_when_the_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "f.h5", []
    X = make_cache(path, 3000)
    crc32 = zlib.crc32
    cache = FeatureCache.open(path)
    monkeypatch.setattr(zlib, "crc32", lambda *data: (calls.append(0), crc32(*data))[1])
    for _ in range(3):
        cache.take(np.arange(5))
    assert len(calls) == 3  # blocks of 1,024 rows
    with cache.reader() as features:
        make_cache(tmp_path / "other.h5", 3000, spec=dataclasses.replace(SPEC, storage="float32"))
        (tmp_path / "other.h5").replace(path)
        np.testing.assert_array_equal(features[np.arange(3000)], X)  # of the file that was verified
    with pytest.raises(CacheError, match="replaced or changed since it was opened") as found:
        cache.take(np.arange(5))
    assert "--force" not in str(found.value)  # the advice for a damaged file, which this one is not
    assert FeatureCache.open(path).take(np.arange(3)).shape == (3, 8)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    make_cache(tmp_path / "f.h5", 3000)
    with FeatureCache.open(tmp_path / "f.h5").reader() as features:
        os.truncate(tmp_path / "f.h5", 20_000)
        with pytest.raises(CacheError, match="ends too early"):
            features[np.arange(3000)]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65504.0, 6e-8, -0.0])
def test_finite_is_what_numpy_calls_finite(dtype: str, value: float) -> None:
    X = np.random.default_rng(0).normal(size=(5, 7)).astype(dtype)
    X[3, 2] = value
    np.testing.assert_array_equal(is_finite(X), np.isfinite(X).all(axis=1))


def test_an_embedding_that_is_not_finite_is_named(tmp_path: Path) -> None:
    X = np.ones((300, 8), np.float16)
    X[[120, 200], 3] = np.nan
    write_cache(tmp_path / "f.h5", make_rows(300), [X], dim=8, spec=SPEC, classes=("a", "b"))
    cache = FeatureCache.open(tmp_path / "f.h5")
    cache.check_finite(np.arange(120))
    with pytest.raises(SourceError, match="of 2 images are not finite, the first is row 120"):
        cache.check_finite(np.arange(300))


def test_damage_is_said_before_values_that_are_not_finite(tmp_path: Path) -> None:
    X = np.ones((3000, 8), np.float16)
    X[5] = np.nan
    write_cache(tmp_path / "f.h5", make_rows(3000), [X], dim=8, spec=SPEC, classes=("a", "b"))
    content = bytearray((tmp_path / "f.h5").read_bytes())
    content[content.index(X.tobytes()) + 2000 * 16] ^= 1
    (tmp_path / "f.h5").write_bytes(content)
    with pytest.raises(CacheError, match="checksum mismatch in rows 1024-2047"):
        FeatureCache.open(tmp_path / "f.h5").check_finite(np.arange(3000))
