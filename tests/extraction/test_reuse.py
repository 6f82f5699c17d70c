"""Rows from other caches: taken over when they are the image's own, passed over when anything about them is not."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, TINY_FLAGS, make_photos, settle, write_photo
from formats import samples, tiff
from test_extract import break_a_row, by_path, counts

from featcache.backbones.backbone import Backbone
from featcache.backbones.load import load_backbone
from featcache.cache.cache import FeatureCache
from featcache.cache.format import Rows
from featcache.cache.write import write_cache
from featcache.errors import CacheError
from featcache.extraction.extract import extract, weights_copy
from featcache.extraction.request import ExtractRequest
from featcache.images.formats import REVISION

OTHER = dataclasses.replace(TINY, resize=41)


@pytest.fixture
def other(photos: Path, tmp_path: Path) -> Path:
    extract(photos, tmp_path / "other.h5", TINY)
    return tmp_path / "other.h5"


def rewrite(path: Path, request: ExtractRequest | None = None, **changes: object) -> None:
    """Write a cache again with other features, provenance or spec."""
    cache = FeatureCache.open(path)
    values = {"spec": cache.spec, "classes": cache.classes, "refused": cache.refused, "provenance": cache.provenance}
    features, rows = changes.pop("features", cache.X.copy()), changes.pop("rows", cache.rows)
    if request:
        changes["provenance"] = dataclasses.replace(cache.provenance, request=request.record())
    assert isinstance(rows, Rows)
    write_cache(path, rows, [features], dim=cache.dim, **(values | changes))  # type: ignore[arg-type, list-item]


def test_known_rows_are_taken_over_and_the_other_file_is_left_alone(photos: Path, other: Path, tmp_path: Path) -> None:
    (photos / "red" / "00.jpg").rename(photos / "blue" / "moved.jpg")  # known by its content
    (photos / "red" / "01.jpg").unlink()
    write_photo(photos / "red" / "new.jpg", (200, 0, 0), 99)
    write_photo(photos / "red" / "02.jpg", (0, 0, 200), 98)  # another image under a known path
    before = other.read_bytes(), other.stat().st_mtime_ns
    assert counts(extract(photos, tmp_path / "f.h5", TINY, reuse=[other])) == (2, 16, 18, 0, 0, 0)
    assert (other.read_bytes(), other.stat().st_mtime_ns) == before
    rows, source = by_path(tmp_path / "f.h5"), by_path(other)
    np.testing.assert_array_equal(rows["blue/moved.jpg"], source["red/00.jpg"])
    np.testing.assert_array_equal(rows["green/03.jpg"], source["green/03.jpg"])
    extract(photos, tmp_path / "alone.h5", TINY)
    for path, row in by_path(tmp_path / "alone.h5").items():
        np.testing.assert_array_equal(rows[path], row)
    assert counts(extract(photos, tmp_path / "f.h5", TINY)) == (0, 18, 0, 0, 0, 0)


def test_settled_files_are_recognised_without_being_read(photos: Path, tmp_path: Path, monkeypatch) -> None:
    for path in photos.rglob("*.jpg"):
        settle(path)
    extract(photos, tmp_path / "other.h5", TINY)
    monkeypatch.setattr("featcache.images.read.read_file", None)
    assert counts(extract(photos, tmp_path / "f.h5", TINY, reuse=[tmp_path / "other.h5"]))[:2] == (0, 18)


def test_a_model_is_needed_for_the_copy_of_the_weights_only(
    photos: Path, other: Path, tmp_path: Path, no_model: None, monkeypatch
) -> None:
    with monkeypatch.context() as loading:
        loading.setattr("featcache.backbones.load.load_backbone", load_backbone)
        assert counts(extract(photos, tmp_path / "f.h5", TINY, reuse=[other])) == (0, 18, 18, 0, 0, 0)
    spec = FeatureCache.open(tmp_path / "f.h5").spec
    copy = weights_copy(tmp_path / "f.h5", spec)
    assert load_backbone(TINY.backbone, copy).weights_sha256 == spec.weights_sha256
    (tmp_path / "f.h5").unlink()  # its copy stays
    assert counts(extract(photos, tmp_path / "f.h5", TINY, reuse=[other])) == (0, 18, 18, 0, 0, 0)
    weights = {"source": "a library", "reload": "IMAGENET1K_V1"}
    rewrite(other, provenance=dataclasses.replace(FeatureCache.open(other).provenance, **weights))
    (photos / "red" / "empty.jpg").touch()
    rewrite(other, refused=(("red/empty.jpg", "empty file"),))  # known to be refused, and looked at again
    assert counts(extract(photos, tmp_path / "g.h5", TINY, reuse=[other])) == (0, 18, 18, 0, 0, 1)
    assert FeatureCache.open(tmp_path / "g.h5").provenance.source == weights["source"]


def test_provenance_says_where_the_weights_of_this_cache_are(photos: Path, other: Path, tmp_path: Path) -> None:
    """The other cache's copy lies elsewhere; here the library provides the same weights."""
    provenance = FeatureCache.open(other).provenance
    assert provenance.reload is None
    original = load_backbone

    def provided(*arguments: str, **taken: Any) -> Backbone:
        return dataclasses.replace(original(*arguments, **taken), reload="IMAGENET1K_V1")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("featcache.backbones.load.load_backbone", provided)
        extract(photos, tmp_path / "f.h5", TINY, reuse=[other])
    assert FeatureCache.open(tmp_path / "f.h5").provenance.reload == "IMAGENET1K_V1"
    assert not list(tmp_path.glob("f.h5.*"))


def test_what_cannot_be_used_is_passed_over_with_a_reason(
    photos: Path, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "featcache")
    extract(photos, tmp_path / "spec.h5", OTHER)
    (tmp_path / "text.h5").write_text("mine")
    (tmp_path / "cut.h5").write_bytes(other.read_bytes()[:-100])
    reasons = {
        "text.h5": "is not an HDF5 file",
        "cut.h5": "is damaged",
        "spec.h5": r"another spec (preprocess.resize: 41 -> 40)",
    }
    caplog.clear()
    assert counts(extract(photos, tmp_path / "f.h5", TINY, reuse=[tmp_path / name for name in reasons]))[:2] == (18, 0)
    said = [record.getMessage() for record in caplog.records if "nothing is reused" in record.getMessage()]
    assert len(said) == 3
    for name, reason in reasons.items():
        assert [
            line for line in said if line.startswith(f"nothing is reused from {tmp_path / name}") and reason in line
        ]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    caplog.clear()
    assert counts(extract(photos, tmp_path / "f.h5", TINY, reuse=str(tmp_path / "f.h5")))[:2] == (0, 18)
    assert "reused" not in caplog.text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "missing does not exist; name a cache"),
        ("othr.h5", "did you mean .*other.h5"),
        ("text.md", "text.md is a document, expected a cache"),
        ("photos", "photos is a folder of images, expected a cache"),
    ],
)
def test_what_is_no_cache_is_refused_before_anything_is_listed(
    photos: Path, other: Path, tmp_path: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.extraction.extract.list_images", None)
    (tmp_path / "text.md").write_text("mine")
    with pytest.raises(CacheError, match=f"--reuse .*{says}"):
        extract(photos, tmp_path / "f.h5", TINY, reuse=[other, tmp_path / name])


def test_damaged_features_are_passed_over_before_work_starts(
    photos: Path, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.h5").write_bytes(other.read_bytes())
    damaged = break_a_row(other)
    write_photo(photos / "red" / "new.jpg", (200, 0, 0), 99)
    assert counts(extract(photos, tmp_path / "f.h5", TINY, reuse=[other]))[:2] == (19, 0)
    assert [record.levelno for record in caplog.records if "checksum mismatch in rows" in record.getMessage()] == [30]
    report = extract(photos, tmp_path / "g.h5", TINY, reuse=[other, tmp_path / "good.h5"])
    assert counts(report)[:2] == (1, 18)
    assert other.read_bytes() == damaged
    caplog.clear()
    assert counts(extract(photos, tmp_path / "g.h5", TINY, reuse=[other]))[:2] == (0, 19)  # not needed: not even read
    assert not caplog.records


def test_own_rows_come_first_then_the_caches_in_their_order(photos: Path, other: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("f.h5", "a.h5", "b.h5")):
        (tmp_path / name).write_bytes(other.read_bytes())
        features = np.full_like(FeatureCache.open(other).X, number)
        rewrite(tmp_path / name, features=features)
    write_photo(photos / "red" / "new.jpg", (200, 0, 0), 99)
    extract(photos, tmp_path / "f.h5", TINY, reuse=[tmp_path / "a.h5", tmp_path / "b.h5"])
    assert by_path(tmp_path / "f.h5")["red/00.jpg"].max() == 0
    (tmp_path / "f.h5").unlink()
    extract(photos, tmp_path / "f.h5", TINY, reuse=[tmp_path / "b.h5", tmp_path / "a.h5"])
    assert by_path(tmp_path / "f.h5")["red/00.jpg"].min() == 2


def test_limit_counts_rows_of_others_as_new(photos: Path, other: Path, tmp_path: Path) -> None:
    assert counts(extract(photos, tmp_path / "f.h5", TINY, limit=3, reuse=[other])) == (0, 3, 3, 0, 0, 0)
    assert counts(extract(photos, tmp_path / "f.h5", TINY, limit=6, reuse=[other])) == (0, 6, 3, 0, 0, 0)


def test_another_cache_never_decides_what_the_spec_is(photos: Path, other: Path, tmp_path: Path) -> None:
    """It may say that the very same request means something else: measured on other images, or by mistake."""
    rewrite(other, OTHER)
    write_photo(photos / "red" / "new.jpg", (200, 0, 0), 99)
    assert counts(extract(photos, tmp_path / "f.h5", OTHER, reuse=[other]))[:2] == (19, 0)
    assert FeatureCache.open(tmp_path / "f.h5").spec.preprocess.resize == 41
    write_photo(photos / "red" / "newer.jpg", (200, 0, 0), 100)
    rewrite(tmp_path / "f.h5", TINY)  # as if it had been asked for in other words
    assert counts(extract(photos, tmp_path / "f.h5", OTHER, reuse=[other]))[:2] == (1, 19)


def test_reuse_on_the_command_line(tmp_path: Path, run) -> None:
    photos = make_photos(tmp_path / "photos", each=2)
    assert run("extract", photos, "-o", tmp_path / "a.h5", *TINY_FLAGS, "--limit", 3)[0] == 0
    arguments = ("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS)
    code, _, err = run(*arguments, "--reuse", tmp_path / "a.h5", "--reuse", tmp_path / "b.h5")
    assert code == 1 and "b.h5 does not exist; did you mean" in err
    shutil.copy(tmp_path / "a.h5", tmp_path / "b.h5")
    code, out, _ = run(*arguments, "--reuse", tmp_path / "a.h5", "--reuse", tmp_path / "b.h5")
    assert code == 0
    assert "embedded 3, reused 3" in out


def test_rows_of_files_that_an_older_version_misread_are_embedded_again(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those alone, once, and said; whether the cache is brought up to date or gives its rows to another."""
    (photos / "red" / "inverted.tif").write_bytes(tiff(samples(1, 65535), 16, 0))
    (photos / "red" / "plain.tif").write_bytes(tiff(samples(1, 255), 8, 1))
    extract(photos, tmp_path / "old.h5", TINY)
    cache, right = FeatureCache.open(tmp_path / "old.h5"), by_path(tmp_path / "old.h5")["red/inverted.tif"]
    assert cache.provenance.decoder == REVISION
    older = dataclasses.replace(cache.provenance, decoder=0)
    rewrite(tmp_path / "old.h5", features=np.ones_like(cache.X), provenance=older)  # any reused row is one of ones
    assert "decoder_revision" not in FeatureCache.open(tmp_path / "old.h5").provenance.to_json()
    shutil.copy(tmp_path / "old.h5", tmp_path / "donor.h5")
    for name, reuse in (("old.h5", []), ("new.h5", [tmp_path / "donor.h5"])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "featcache"):
            report = extract(photos, tmp_path / name, TINY, reuse=reuse)
        assert (report.embedded, report.reused) == (1, 19)
        assert "therefore decoded again: red/inverted.tif\n" in caplog.text
        rows = by_path(tmp_path / name)
        np.testing.assert_array_equal(rows.pop("red/inverted.tif"), right)
        assert all((row == 1).all() for row in rows.values())
        assert FeatureCache.open(tmp_path / name).provenance.decoder == REVISION
        assert extract(photos, tmp_path / name, TINY).embedded == 0
