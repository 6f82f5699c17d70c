"""Opening a cache: everything it says, or a refusal. Damage at random: ``tests/promises/test_mutated_caches.py``."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from caches import make_cache, make_classes
from conftest import SPEC
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from featcache.cache import format as cache_format
from featcache.cache.cache import FeatureCache
from featcache.errors import CacheError, SourceError
from featcache.spec import canonical_json, fingerprint_of

GOLDEN = Path(__file__).with_name("golden-v1.h5")


def test_splits(tmp_path: Path) -> None:
    X = make_cache(tmp_path / "f.h5")
    cache = FeatureCache.open(tmp_path / "f.h5")
    got, y = cache.split("train")
    np.testing.assert_array_equal(got, X[1::4])
    np.testing.assert_array_equal(y, cache.y[1::4])


def test_a_split_with_its_paths_finds_the_images_of_mistakes(tmp_path: Path) -> None:
    make_cache(tmp_path / "f.h5")
    cache = FeatureCache.open(tmp_path / "f.h5")
    X, y, paths = cache.split("val", paths=True)
    np.testing.assert_array_equal(X, cache.split("val")[0])
    assert tuple(paths) == cache.paths[2::4] and isinstance(paths[0], str)
    assert paths[y != y[0]].tolist() == [path for path, label in zip(paths, y, strict=True) if label != y[0]]


def test_scikit_learn_takes_x_and_y_as_they_are(cache: Path) -> None:
    opened = FeatureCache.open(cache)
    assert cross_val_score(LogisticRegression(), opened.X, opened.y).min() > 0.9


def test_what_a_cache_shows_of_itself(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(20) % 2, 1 + np.arange(20) // 10, classes=("<script>", "b"))
    cache = FeatureCache.open(tmp_path / "f.h5")
    name = str(tmp_path / "f.h5")
    assert repr(cache) == f"FeatureCache({name!r}: 20 rows of {cache.dim} float16 by squeezenet1_1, 2 classes)"
    assert "<tr><td>&lt;script&gt;</td><td>5</td><td>5</td></tr>" in cache._repr_html_()
    assert "<script>" not in cache._repr_html_()


def test_a_split_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Not an empty table that trains or scores nothing; which row numbers a split has is another question."""
    make_classes(tmp_path / "some.h5", np.arange(20) % 2, 1 + np.arange(20) // 10)
    make_classes(tmp_path / "none.h5", np.arange(20) % 2)
    some, none = FeatureCache.open(tmp_path / "some.h5"), FeatureCache.open(tmp_path / "none.h5")
    for cache, name, words in (
        (some, "test", "has no image in the split 'test', only in train, val"),
        (some, "none", "has no image in the split 'none', only in train, val"),
        (none, "train", "has no splits; X and y hold all its rows"),
        (some, "Train", "choose one of none, train, val, test"),
    ):
        with pytest.raises(SourceError, match=words):
            cache.split(name)
    assert len(none.split("none")[1]) == 20
    assert len(some.where("test")) == 0


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


@pytest.mark.parametrize("change", [{"precision": "int4"}, {"zoom": 1}])
def test_a_spec_this_version_cannot_honour_is_refused(tmp_path: Path, change: dict) -> None:
    make_cache(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "r+") as file:  # a well-formed file, every checksum right
        text = canonical_json(SPEC.to_json() | change)
        columns = {name: file[name][()] for name, _, _ in cache_format.COLUMNS}
        file.attrs["spec"] = text
        file.attrs["fingerprint"] = fingerprint_of(SPEC.to_json() | change)
        file.attrs["metadata_crc32"] = cache_format.metadata_checksum(columns, (text, file.attrs["provenance"]))
    with pytest.raises(CacheError, match="spec"):
        FeatureCache.open(tmp_path / "f.h5")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_place_of_a_cache_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.h5")
    with pytest.raises(CacheError, match="is a pipe, socket or device; expected a cache"):
        FeatureCache.open(tmp_path / "f.h5")


def test_truncation_at_any_length_is_refused(tmp_path: Path) -> None:
    """Also where only padding is missing."""
    make_cache(tmp_path / "f.h5", 300)
    original = (tmp_path / "f.h5").read_bytes()
    for length in np.linspace(0, len(original) - 1, 60).astype(int):
        (tmp_path / "f.h5").write_bytes(original[:length])
        with pytest.raises(CacheError):
            FeatureCache.open(tmp_path / "f.h5")


@pytest.mark.parametrize("features", [None, np.zeros((50, 8), np.int16), np.zeros((50, 8, 1), np.float16)])
def test_features_of_another_form_are_refused(tmp_path: Path, features: np.ndarray | None) -> None:
    """Other datasets, and what links, filters and other storage hide: ``tests/attacks``."""
    make_cache(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        del file["features"]
        if features is not None:
            file["features"] = features
    with pytest.raises(CacheError, match="refused: features is"):
        FeatureCache.open(tmp_path / "f.h5")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + b"\0" * 5000])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.h5").write_bytes(content)
    with pytest.raises(CacheError):
        FeatureCache.open(tmp_path / "f.h5")


def test_missing_folder_and_foreign_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["features"] = np.zeros((2, 2))
    for name, words in (
        ("gone.h5", "does not exist"),
        ("", "is a folder without images"),
        ("foreign.h5", "another program"),
    ):
        with pytest.raises(CacheError, match=words):
            FeatureCache.open(tmp_path / name)


def test_newer_version_is_named(tmp_path: Path) -> None:
    make_cache(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(CacheError, match="format version 2, this featcache reads 1"):
        FeatureCache.open(tmp_path / "f.h5")
