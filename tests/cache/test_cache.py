"""The file format: what is written is read back, by us and by plain h5py; what was tampered with never is."""

import os
import resource
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import SPEC

from featcache.cache import format as cache_format
from featcache.cache.cache import FeatureCache
from featcache.cache.features import is_finite
from featcache.cache.format import Rows, encode_names
from featcache.cache.write import write_cache
from featcache.errors import CacheError, SourceError, StorageError
from featcache.spec import canonical_json, fingerprint_of

GOLDEN = Path(__file__).with_name("golden-v1.h5")


def make_rows(n: int) -> Rows:
    rng = np.random.default_rng(n)
    return Rows(
        paths=encode_names([f"class/ü-{number}.jpg" for number in range(n)]),
        labels=(np.arange(n) % 3 - 1).astype(np.int32),
        splits=(np.arange(n) % 4).astype(np.uint8),
        digests=rng.integers(0, 256, (n, 32), dtype=np.uint8),
        sizes=np.arange(n, dtype=np.int64) * 1000,
        mtimes=np.arange(n, dtype=np.int64) * 10**18,
    )


def make_cache(path: Path, n: int = 50, dim: int = 8, **changes: Any) -> np.ndarray:
    X = np.random.default_rng(n).normal(size=(n, dim)).astype(np.float16)
    options: dict[str, Any] = {"spec": SPEC, "classes": ("a", "b"), "refused": (("x.jpg", "empty file"),)}
    write_cache(path, make_rows(n), [X[: n // 3], X[n // 3 :]], dim=dim, **(options | changes))
    return X


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
    assert cache.fingerprint == fingerprint_of(SPEC)
    assert cache.verify() == []
    with h5py.File(path) as plain:  # any HDF5 reader sees the same
        np.testing.assert_array_equal(plain["features"][:], X)
        assert list(plain["paths"].asstr()[:]) == list(cache.paths)


def test_float32_is_kept(tmp_path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    write_cache(tmp_path / "f.h5", make_rows(7), [X], dim=5, spec=SPEC | {"storage": "float32"}, classes=("a", "b"))
    np.testing.assert_array_equal(FeatureCache.open(tmp_path / "f.h5").X, X)


def test_names_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    names = ["caf\udce9.jpg", "new\nline", '"quoted"', "=cmd()", "\u202eltr", "n\u0303", "\u00f1"]
    rows = make_rows(len(names))
    rows = Rows(**(vars(rows) | {"paths": encode_names(names)}))
    write_cache(tmp_path / "f.h5", rows, [np.zeros((len(names), 2))], dim=2, spec=SPEC, classes=("a", "b"))
    assert FeatureCache.open(tmp_path / "f.h5").paths == tuple(names)


def test_splits(tmp_path: Path) -> None:
    X = make_cache(tmp_path / "f.h5")
    cache = FeatureCache.open(tmp_path / "f.h5")
    got, y = cache.split("train")
    np.testing.assert_array_equal(got, X[1::4])
    np.testing.assert_array_equal(y, cache.y[1::4])


def test_golden_file_of_version_1() -> None:
    """Written once by the first release; every later one must read it."""
    cache = FeatureCache.open(GOLDEN)
    np.testing.assert_array_equal(cache.X, np.arange(12).reshape(4, 3) / 4)
    assert cache.paths == ("cat/ä.jpg", "cat/b.jpg", "dog/c.jpg", "dog/d.jpg")
    assert cache.y.tolist() == [0, 0, 1, -1]
    assert cache.rows.splits.tolist() == [1, 2, 3, 0]
    assert cache.classes == ("cat", "dog")
    assert cache.refused == (("dog/e.jpg", "empty file"),)
    assert cache.spec == SPEC
    assert cache.fingerprint == "6ba49cf65b4e03fa46a0bdb104ab43ff8c0fb18f8b9e85c8fa38e36be6a9e763"


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


# -------------------------------------------------------------------------------------------------- reading


@pytest.fixture(params=["preadv", "seek"])
def way_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading: with a position, and without where the system has no such call."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.usefixtures("way_of_reading")
def test_rows_read_are_those_of_the_map(tmp_path: Path, dtype: str) -> None:
    make_cache(tmp_path / "f.h5", 3000, spec=SPEC | {"storage": dtype})
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


def test_neighbouring_rows_take_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(tmp_path / "f.h5", 3000)
    with FeatureCache.open(tmp_path / "f.h5").reader() as features:
        reads, fill = [], features._fill
        monkeypatch.setattr(features, "_fill", lambda memory, first: (reads.append(first), fill(memory, first)))
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
        make_cache(tmp_path / "other.h5", 3000, spec=SPEC | {"storage": "float32"})
        (tmp_path / "other.h5").replace(path)
        np.testing.assert_array_equal(features[np.arange(3000)], X)  # of the file that was verified
    with pytest.raises(CacheError, match="replaced or changed since it was opened"):
        cache.take(np.arange(5))


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


# --------------------------------------------------------------------------------------------------- damage


def outcome(path: Path) -> tuple[Any, ...] | None:
    """Everything a reader gets, or None if it was refused."""
    try:
        cache = FeatureCache.open(path)
        rows = tuple(getattr(cache.rows, name).tobytes() for name in vars(cache.rows))
        return (
            np.asarray(cache.X).tobytes(),
            rows,
            cache.classes,
            cache.refused,
            cache.fingerprint,
            str(cache.provenance),
        )
    except CacheError:
        return None


def test_a_flipped_bit_is_never_read_as_truth(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    make_cache(path, provenance={"time": "now"})
    original, truth = path.read_bytes(), outcome(path)
    rng = np.random.default_rng(0)
    refused = 0
    for position in [*range(0, 512, 3), *rng.integers(0, len(original), 500).tolist()]:
        data = bytearray(original)
        data[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        got = outcome(path)
        assert got is None or got == truth, f"byte {position} changed what was read"
        refused += got is None
    assert refused > 50  # the rest hit padding, which nothing reads


def test_truncation_at_any_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    make_cache(path, 300)
    original, truth = path.read_bytes(), outcome(path)
    for length in np.linspace(0, len(original) - 1, 60).astype(int):
        path.write_bytes(original[:length])
        assert outcome(path) is None
    path.write_bytes(original)
    assert outcome(path) == truth


def test_verify_names_the_damaged_rows(tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    make_cache(path, 3000)
    with h5py.File(path) as file:
        offset = file["features"].id.get_offset()
    with path.open("r+b") as file:
        file.seek(offset + 1500 * 8 * 2)
        file.write(b"\xff\xff")
    cache = FeatureCache.open(path)
    assert cache.verify() == [(1024, 2048)]
    with pytest.raises(CacheError, match="1024-2047"):
        cache.X  # noqa: B018


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int4"},
        {"storage": "object"},
        {"views": 2},
        {"backbone": "x"},
        {"preprocess": {}},
        {"zoom": 1},
        {"backbone": {}},
    ],
)
def test_a_spec_this_version_cannot_honour_is_refused(tmp_path: Path, change: dict) -> None:
    make_cache(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "r+") as file:  # a well-formed file, every checksum right
        text = canonical_json(SPEC | change)
        columns = {name: file[name][()] for name, _, _ in cache_format.COLUMNS}
        file.attrs["spec"] = text
        file.attrs["fingerprint"] = fingerprint_of(SPEC | change)
        file.attrs["metadata_crc32"] = cache_format.metadata_checksum(columns, (text, file.attrs["provenance"]))
    with pytest.raises(CacheError, match="spec"):
        FeatureCache.open(tmp_path / "f.h5")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_place_of_a_cache_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.h5")
    with pytest.raises(CacheError, match="no regular file"):
        FeatureCache.open(tmp_path / "f.h5")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + b"\0" * 5000])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.h5").write_bytes(content)
    with pytest.raises(CacheError):
        FeatureCache.open(tmp_path / "f.h5")


def test_missing_folder_and_foreign_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["features"] = np.zeros((2, 2))
    for name, words in (("gone.h5", "does not exist"), ("", "no regular file"), ("foreign.h5", "another program")):
        with pytest.raises(CacheError, match=words):
            FeatureCache.open(tmp_path / name)


def test_newer_version_is_named(tmp_path: Path) -> None:
    make_cache(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(CacheError, match="format version 2, this featcache reads 1"):
        FeatureCache.open(tmp_path / "f.h5")


def replace_features(path: Path, kind: str) -> None:
    """Put something else in the place of ``features`` that h5py would happily follow."""
    secret = path.with_name("secret.h5")
    with h5py.File(secret, "w") as file:
        file["features"] = np.zeros((50, 8), np.float16)
    with h5py.File(path, "r+") as file:
        del file["features"]
        if kind == "external link":
            file["features"] = h5py.ExternalLink(secret.name, "/features")
        elif kind == "soft link":
            file["other"] = np.zeros((50, 8), np.float16)
            file["features"] = h5py.SoftLink("/other")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((50, 8), np.float16)
            layout[:] = h5py.VirtualSource(secret, "features", (50, 8))
            file.create_virtual_dataset("features", layout)
        elif kind == "external storage":
            file.create_dataset("features", (50, 8), np.float16, external=[(secret.name, 0, h5py.h5f.UNLIMITED)])
        elif kind == "compressed":
            file.create_dataset("features", data=np.zeros((50, 8), np.float16), compression="gzip")
        elif kind == "wrong type":
            file["features"] = np.zeros((50, 8), np.int16)
        elif kind == "wrong shape":
            file["features"] = np.zeros((50, 8, 1), np.float16)
        elif kind == "group":
            file.create_group("features")
        elif kind == "huge":
            file.create_dataset("features", (10**9, 8), np.float16)


@pytest.mark.parametrize(
    "kind",
    [
        "external link",
        "soft link",
        "virtual",
        "external storage",
        "compressed",
        "wrong type",
        "wrong shape",
        "group",
        "huge",
        "none",
    ],
)
def test_storage_outside_the_file_is_never_followed(tmp_path: Path, kind: str) -> None:
    make_cache(tmp_path / "f.h5")
    replace_features(tmp_path / "f.h5", kind)
    with pytest.raises(CacheError, match="refused|damaged"):
        FeatureCache.open(tmp_path / "f.h5")


def test_laying_out_a_huge_cache_takes_no_memory() -> None:
    from featcache.cache.write import _columns, _layout

    columns = _columns(make_rows(10), ("a",), ())
    for n in (10, 10**5, 10**8):
        frame, region = _layout(columns, ("{}", "{}"), (n, 1280), np.dtype("<f2"), 1024, np.zeros(4096, np.uint32))
        assert len(region) == n * 2560
        assert sum(len(data) for _, data in frame.segments(region)) < 2**17


def test_a_cache_replaced_between_opening_and_reading_is_not_called_damaged(tmp_path: Path) -> None:
    """The advice for a damaged file, to make it anew, must not be given for an intact one."""
    make_cache(tmp_path / "a.h5")
    make_cache(tmp_path / "b.h5", spec=SPEC | {"storage": "float32"})
    opened = FeatureCache.open(tmp_path / "a.h5")
    (tmp_path / "b.h5").replace(tmp_path / "a.h5")
    with pytest.raises(CacheError, match="was replaced or changed since it was opened") as found:
        opened.take(np.arange(3))
    assert "--force" not in str(found.value)
    assert FeatureCache.open(tmp_path / "a.h5").take(np.arange(3)).shape == (3, 8)
