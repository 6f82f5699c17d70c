"""Sync, resume and refusal: what a cache holds after every kind of change, interruption and mistake."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import COLOURS, TINY, TINY_FLAGS, settle, write_photo
from corpus import png

from featcache import doctor, finetune, preview
from featcache.backbones import embed as embedding
from featcache.backbones.load import load_backbone
from featcache.backbones.self_check import cosine
from featcache.cache.cache import FeatureCache
from featcache.cli import app as cli
from featcache.errors import (
    BackboneError,
    CacheError,
    SourceError,
    SpecMismatchError,
    StorageError,
    UsageError,
)
from featcache.extraction import parts
from featcache.extraction.executors import Published, Work, run_part
from featcache.extraction.extract import ExtractReport, extract, weights_copy
from featcache.extraction.request import ExtractRequest, load_requested
from featcache.images.decode import decode
from featcache.images.preprocess import channel_constants, normalise, to_pixels
from featcache.images.source import list_images
from featcache.images.splits import hold_out
from featcache.models.fit import fit_head
from featcache.models.predict import predict
from featcache.system.workdir import work_folder

WEIGHTS = f"f.h5.{load_backbone(TINY.backbone, TINY.weights).weights_sha256[:12]}.safetensors"


def counts(report: ExtractReport) -> tuple[int, ...]:
    assert report.images == report.embedded + report.reused + report.refused
    return (report.embedded, report.reused, report.added, report.changed, report.removed, report.refused)


def by_path(cache: Path) -> dict[str, np.ndarray]:
    opened = FeatureCache.open(cache)
    return dict(zip(opened.paths, opened.X, strict=True))


def oracle(path: Path) -> np.ndarray:
    backbone = load_requested(TINY, None)
    pixels = to_pixels(np.array(decode(path.read_bytes())), backbone.preprocess)
    with torch.inference_mode():
        constants = channel_constants(backbone.preprocess, torch.device("cpu"))
        return backbone.module(normalise(torch.from_numpy(pixels.copy())[None], *constants))[0].numpy()


def break_a_row(cache: Path, row: int = 7) -> bytes:
    """Flip a bit of its features; returns the file."""
    features = FeatureCache.open(cache).X[row].tobytes()
    cache.write_bytes(cache.read_bytes().replace(features, features[:-1] + bytes([features[-1] ^ 1])))
    return cache.read_bytes()


def stop_after(images: int) -> Callable[[int, int, str], None]:
    """As ``progress``: ends the run as Ctrl-C does, once so many are embedded."""

    def progress(done: int, _total: int, _bottleneck: str) -> None:
        if done >= images:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_every_row_is_its_own_image(photos: Path, tmp_path: Path, precision: str, bf16_arithmetic: bool) -> None:
    report = extract(photos, tmp_path / "f.h5", dataclasses.replace(TINY, precision=precision))
    assert counts(report) == (18, 0, 18, 0, 0, 0)
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert cache.classes == ("blue", "green", "red")
    rounding = 2e-3 if precision == "fp32" or not bf16_arithmetic else 3e-2
    for path, label, row in zip(cache.paths, cache.y, cache.X, strict=True):
        assert path.split("/")[0] == cache.classes[label]
        expected = oracle(photos / path)
        np.testing.assert_allclose(row, expected, rtol=rounding, atol=rounding * np.abs(expected).max())
    assert cache.spec.precision == "reference"


def test_copies_are_counted_and_named(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, *_ = sorted((photos / "blue").iterdir())
    shutil.copy(first, photos / "blue" / "zz.jpg")
    shutil.copy(first, photos / "red" / "zz.jpg")
    report = extract(photos, tmp_path / "f.h5", TINY)
    assert report.copies == {"within": 2, "across_splits": 0, "across_labels": 1}
    assert (report.classes, report.splits) == (3, {"none": 20})
    assert f"1 image lies under several labels, the first as blue/{first.name} and as red/zz.jpg" in caplog.text


def test_a_precision_that_overflows_is_written_down(photos: Path, tmp_path: Path) -> None:
    """Figures that are no numbers go into the provenance as JSON has them."""
    request = dataclasses.replace(TINY, backbone="resnet18", precision="fp16", dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.backbones.encoder._features_or_nan", lambda *_: np.full((8, 512), np.nan, np.float32))
        extract(photos, tmp_path / "f.h5", request)
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert cache.spec.precision == "fp16"
    assert all(figures["mean_cosine"] is None for figures in cache.provenance.self_check["tried"].values())


def test_unchanged_folder_is_left_alone_without_a_model(photos: Path, tmp_path: Path, monkeypatch) -> None:
    extract(photos, tmp_path / "f.h5", TINY)
    before = (tmp_path / "f.h5").read_bytes()
    monkeypatch.setattr("featcache.backbones.load.load_backbone", None)
    assert counts(extract(photos, tmp_path / "f.h5", TINY)) == (0, 18, 0, 0, 0, 0)  # fresh files: recognised by content
    for path in photos.rglob("*.jpg"):
        settle(path)
    extract(photos, tmp_path / "f.h5", TINY)
    monkeypatch.setattr("featcache.images.read.read_file", None)  # settled files: not even read
    settled = (tmp_path / "f.h5").stat()
    assert counts(extract(photos, tmp_path / "f.h5", TINY)) == (0, 18, 0, 0, 0, 0)
    assert (tmp_path / "f.h5").stat().st_mtime_ns == settled.st_mtime_ns
    assert len(before) == settled.st_size
    assert sorted(os.listdir(tmp_path)) == ["f.h5", WEIGHTS, "photos"]
    program = "import sys, atexit, os; from featcache.cli.app import app; "
    program += "atexit.register(lambda: 'torch' in sys.modules and os._exit(99)); app()"
    arguments = ["extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS]
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True)  # nor is PyTorch imported


def test_add_change_rename_relabel_remove(photos: Path, tmp_path: Path) -> None:
    cache = tmp_path / "f.h5"
    extract(photos, cache, TINY)
    first = by_path(cache)

    write_photo(photos / "red" / "new.png", (200, 0, 0), 99)
    assert counts(extract(photos, cache, TINY)) == (1, 18, 1, 0, 0, 0)

    write_photo(photos / "red" / "00.jpg", (255, 255, 0), 100)
    assert counts(extract(photos, cache, TINY)) == (1, 18, 0, 1, 0, 0)
    assert not np.array_equal(by_path(cache)["red/00.jpg"], first["red/00.jpg"])

    (photos / "red" / "01.jpg").rename(photos / "red" / "renamed.jpg")
    (photos / "red" / "02.jpg").rename(photos / "blue" / "moved.jpg")
    assert counts(extract(photos, cache, TINY)) == (0, 19, 2, 0, 2, 0)
    np.testing.assert_array_equal(by_path(cache)["red/renamed.jpg"], first["red/01.jpg"])
    opened = FeatureCache.open(cache)
    assert opened.y[opened.paths.index("blue/moved.jpg")] == 0

    (photos / "green" / "03.jpg").unlink()
    assert counts(extract(photos, cache, TINY)) == (0, 18, 0, 0, 1, 0)
    assert "green/03.jpg" not in by_path(cache)

    fresh = tmp_path / "fresh.h5"
    extract(photos, fresh, TINY)
    for path, row in by_path(fresh).items():
        np.testing.assert_array_equal(row, by_path(cache)[path])


def test_swapped_contents_swap_embeddings(photos: Path, tmp_path: Path) -> None:
    """Same names, sizes that may be equal, new time stamps: content decides."""
    cache = tmp_path / "f.h5"
    extract(photos, cache, TINY)
    first = by_path(cache)
    a, b = photos / "red" / "00.jpg", photos / "blue" / "00.jpg"
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    assert counts(extract(photos, cache, TINY))[:2] == (0, 18)
    np.testing.assert_array_equal(by_path(cache)["red/00.jpg"], first["blue/00.jpg"])
    np.testing.assert_array_equal(by_path(cache)["blue/00.jpg"], first["red/00.jpg"])


def test_new_content_of_the_same_size_is_noticed_by_its_time(photos: Path, tmp_path: Path) -> None:
    cache, image = tmp_path / "f.h5", write_photo(photos / "red" / "new.bmp", (200, 0, 0), 1)
    os.utime(image, (1e9, 1e9))
    extract(photos, cache, TINY)
    size = image.stat().st_size
    write_photo(image, (0, 200, 0), 2)
    os.utime(image, (1e9, 1e9 + 1))
    assert image.stat().st_size == size
    assert counts(extract(photos, cache, TINY)) == (1, 18, 0, 1, 0, 0)


NO_TIMES = [
    0,
    1,
    315_532_800,
    315_619_200,
    10**9,
]  # of a tar, of Nix, a zip's first one and in another zone, of a build


def packed_photos(root: Path, seed: int, seconds: int) -> Path:
    """Bitmaps, which are all of one size, of one time, as a package without times unpacks them."""
    for name in ("blue", "red"):
        for number in range(3):
            path = write_photo(root / name / f"{number}.bmp", COLOURS[name], seed + number)
            os.utime(path, (seconds, seconds))
    return root


def sha256s(cache: Path) -> dict[str, bytes]:
    rows = FeatureCache.open(cache).rows
    return dict(zip(map(bytes.decode, rows.paths.tolist()), map(bytes, rows.digests), strict=True))


@pytest.mark.parametrize("seconds", [NO_TIMES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in NO_TIMES[1:])])
@pytest.mark.parametrize("way", ["folder", "other folder", "donor", "unfinished", "limited"])
def test_times_that_are_none_prove_no_content(way: str, seconds: int, tmp_path: Path) -> None:
    """The next version of a data set, of the same names, sizes and times: each row is of the image that is there."""
    before, after = packed_photos(tmp_path / "a", 1, seconds), tmp_path / "a"
    extract(before, tmp_path / "f.h5", TINY, limit=4 if way == "limited" else None)
    if way in ("other folder", "donor"):
        after = tmp_path / "b"
    reuse, output = (tmp_path / "f.h5", tmp_path / "g.h5") if way == "donor" else ((), tmp_path / "f.h5")
    if way == "unfinished":
        work_folder(output).mkdir()
        output.rename(work_folder(output) / "00.h5")
    packed_photos(after, 11, seconds)
    report = extract(after, output, TINY, reuse=reuse)
    assert (report.embedded, report.reused) == (6, 0)
    expected = {
        str(path.relative_to(after)): hashlib.sha256(path.read_bytes()).digest() for path in after.rglob("*.bmp")
    }
    assert sha256s(output) == expected
    extract(after, tmp_path / "anew.h5", TINY)
    for path, row in by_path(tmp_path / "anew.h5").items():
        np.testing.assert_array_equal(by_path(output)[path], row)


def test_a_tar_of_another_version_with_a_time_that_is_none(tmp_path: Path) -> None:
    for seed in (1, 11):
        with tarfile.open(tmp_path / "photos.tar", "w") as archive:
            archive.add(packed_photos(tmp_path / str(seed), seed, 0), ".")
        os.utime(tmp_path / "photos.tar", (0, 0))
        report = extract(tmp_path / "photos.tar", tmp_path / "f.h5", TINY)
    assert (report.embedded, report.changed) == (6, 6)


def test_times_that_prove_content(photos: Path) -> None:
    """Nanoseconds, which a clock counts for every few files; whole seconds of one file alone."""
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))):
        os.utime(path, ns=(0, 10**18 + (number % 2 if number < 9 else 10**9 * number)))
    times = list_images(photos).mtimes
    seconds = [path.stat().st_mtime_ns for path in sorted(photos.rglob("*.jpg"))]
    expected = [-1 if time % 10**9 == 0 and seconds.count(time) > 1 else time for time in seconds]
    assert times.tolist() == expected
    assert expected.count(-1) == 5 and len({*expected}) == 1 + 1 + 9


HIDDEN = ["folder", "link", "shard", "shard's end", "archive"]


@pytest.mark.parametrize("what", HIDDEN)
def test_rows_stay_while_their_images_cannot_be_read(what: str, photos: Path, tmp_path: Path, monkeypatch) -> None:
    source, hidden = photos, photos / "red"
    if what == "link":
        hidden.rename(photos / ".red")
        hidden.symlink_to(photos / ".red")
        (photos / "outside").symlink_to("nowhere")  # always refused, of which no row is
    elif what != "folder":
        shards = tmp_path / "shards"
        shards.mkdir()
        for name in ("train-0.tar", "train-1.tar"):
            with tarfile.open(shards / name, "w") as archive:
                for path in sorted(photos.rglob(f"*{name[6]}.jpg")):
                    archive.add(path, path.relative_to(photos))
        source, hidden = shards, shards / "train-1.tar"
        if what == "archive":
            source = hidden
    cache = tmp_path / "f.h5"
    report = extract(source, cache, TINY)
    before = cache.read_bytes()
    with contextlib.ExitStack() as back:
        if what == "folder":
            scandir = os.scandir

            def denied(path: Any) -> Any:
                if Path(path) == hidden:
                    raise PermissionError(13, "Permission denied", str(path))
                return scandir(path)

            back.enter_context(pytest.MonkeyPatch.context()).setattr("os.scandir", denied)
        elif what == "link":
            (photos / ".red").rename(photos / ".away")
            back.callback((photos / ".away").rename, photos / ".red")
        else:
            content = hidden.read_bytes()
            hidden.write_bytes(content[: 200 if what == "shard" else 4000])
            back.callback(hidden.write_bytes, content)
        with pytest.raises(
            SourceError, match=r"f\.h5 has \d images? from there; nothing was changed; .* with --force"
        ) as error:
            extract(source, cache, TINY)
        assert str(hidden) in str(error.value)
        assert cache.read_bytes() == before
        forced = extract(source, cache, TINY, force=True)
        assert (forced.embedded, forced.reused + forced.removed) == (0, report.embedded)
        cache.write_bytes(before)
    assert extract(source, cache, TINY).reused == report.embedded


def test_refused_images_are_listed_and_cost_no_model_again(photos: Path, tmp_path: Path, monkeypatch) -> None:
    (photos / "red" / "empty.jpg").touch()
    (photos / "red" / "text.jpg").write_text("no")
    whole = (photos / "blue" / "00.jpg").read_bytes()
    (photos / "blue" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    report = extract(photos, tmp_path / "f.h5", TINY)
    assert counts(report) == (18, 0, 18, 0, 0, 3)
    refused = dict(FeatureCache.open(tmp_path / "f.h5").refused)
    assert list(refused) == ["blue/half.jpg", "red/empty.jpg", "red/text.jpg"]
    assert refused["red/empty.jpg"] == "empty file"
    for path, row in by_path(tmp_path / "f.h5").items():  # no neighbour slipped into a gap
        expected = oracle(photos / path)
        np.testing.assert_allclose(row, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    with monkeypatch.context() as patched:
        patched.setattr("featcache.backbones.load.load_backbone", None)
        assert counts(extract(photos, tmp_path / "f.h5", TINY)) == (0, 18, 0, 0, 0, 3)
    write_photo(photos / "red" / "empty.jpg", (1, 2, 3), 5)  # mended
    assert counts(extract(photos, tmp_path / "f.h5", TINY)) == (1, 18, 1, 0, 0, 2)


def test_what_only_a_white_level_refuses_costs_no_model_again(photos: Path, tmp_path: Path, monkeypatch) -> None:
    level, deep = dataclasses.replace(TINY, white_level=4095), photos / "red" / "deep.png"
    deep.write_bytes(png(np.full((47, 61, 2), 4095, np.uint16), 16, 4))  # grey with alpha, of which Pillow has 8 bits
    assert counts(extract(photos, tmp_path / "f.h5", level)) == (18, 0, 18, 0, 0, 1)
    with monkeypatch.context() as patched:
        patched.setattr("featcache.backbones.load.load_backbone", None)
        assert counts(extract(photos, tmp_path / "f.h5", level)) == (0, 18, 0, 0, 0, 1)
    assert counts(extract(photos, tmp_path / "g.h5", TINY)) == (19, 0, 19, 0, 0, 0)
    for path in photos.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(SourceError, match="white level"):
        extract(photos, tmp_path / "h.h5", level)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resize": 41}, "preprocess.resize: 40 -> 41"),
        ({"interpolation": "bicubic"}, "preprocess.interpolation: bilinear -> bicubic"),
        ({"dtype": "float32"}, "storage: float16 -> float32"),
        ({"backbone": "squeezenet1_0"}, "backbone.name: squeezenet1_1 -> squeezenet1_0"),
    ],
)
def test_another_spec_is_refused_with_the_difference(photos: Path, tmp_path: Path, changes: dict, words: str) -> None:
    cache = tmp_path / "f.h5"
    extract(photos, cache, TINY)
    before = cache.read_bytes()
    other = dataclasses.replace(TINY, **changes)
    with pytest.raises(SpecMismatchError) as error:
        extract(photos, cache, other)
    assert words in str(error.value)
    assert cache.read_bytes() == before
    assert counts(extract(photos, cache, other, force=True))[:2] == (18, 0)
    assert counts(extract(photos, cache, other))[:2] == (0, 18)


def test_other_weights_in_the_same_file_are_refused(photos: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    state = load_backbone(TINY.backbone, "none").module.state_dict()
    torch.save(state, weights)
    request = dataclasses.replace(TINY, weights=str(weights))
    extract(photos, tmp_path / "f.h5", request)
    state["features.0.weight"] += 0.01
    torch.save(state, weights)
    with pytest.raises(SpecMismatchError, match=r"backbone\.weights_sha256"):
        extract(photos, tmp_path / "f.h5", request)


def test_the_same_spec_asked_for_in_other_words_is_recognised_from_then_on(
    photos: Path, tmp_path: Path, monkeypatch
) -> None:
    extract(photos, tmp_path / "f.h5", TINY)
    other = dataclasses.replace(TINY, interpolation="bilinear")  # which it is by default
    assert counts(extract(photos, tmp_path / "f.h5", other)) == (0, 18, 0, 0, 0, 0)
    monkeypatch.setattr("featcache.backbones.load.load_backbone", None)
    assert counts(extract(photos, tmp_path / "f.h5", other)) == (0, 18, 0, 0, 0, 0)


def test_a_list_of_images_is_taken_as_it_is(photos: Path, tmp_path: Path, monkeypatch) -> None:
    (photos / "red" / "link.jpg").symlink_to(tmp_path / "gone")
    (photos / "red" / "empty.jpg").touch()
    images = hold_out(list_images(photos))
    write_photo(photos / "red" / "later.jpg", (1, 2, 3), 5)  # not in the list
    with monkeypatch.context() as patched:
        patched.setattr("featcache.extraction.extract.list_images", None)
        assert counts(extract(images, tmp_path / "f.h5", TINY)) == (18, 0, 18, 0, 0, 2)
        some = images.take(np.arange(0, len(images), 2))
        assert counts(extract(some, tmp_path / "f.h5", TINY)) == (0, 9, 0, 0, 9, 2)
    cache = FeatureCache.open(tmp_path / "f.h5")
    splits = dict(zip(images.paths, images.splits, strict=True))
    assert [splits[path] for path in cache.paths] == cache.rows.splits.tolist()
    np.testing.assert_allclose(cache.X[4], oracle(photos / cache.paths[4]), rtol=2e-3, atol=2e-2)
    assert counts(extract(photos, tmp_path / "f.h5", TINY)) == (10, 9, 10, 0, 0, 2)


def test_useless_lists(photos: Path, tmp_path: Path) -> None:
    images = list_images(photos)
    with pytest.raises(SourceError, match=rf"list of images in {photos} is empty"):
        extract(images.take(np.arange(0)), tmp_path / "f.h5", TINY)
    one = dataclasses.replace(images.take(np.arange(6)), classes=("blue",))
    with pytest.raises(SourceError, match=rf"list of images in {photos} holds one class only \(blue\)"):
        extract(one, tmp_path / "f.h5", TINY)
    for path in photos.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(SourceError, match=rf"all 18 images of {photos} were refused.*cannot be read"):
        extract(images, tmp_path / "f.h5", TINY)


def test_limit_spreads_and_never_drops(photos: Path, tmp_path: Path) -> None:
    cache = tmp_path / "f.h5"
    assert counts(extract(photos, cache, TINY, limit=3)) == (3, 0, 3, 0, 0, 0)
    assert list(by_path(cache)) == ["blue/00.jpg", "green/00.jpg", "red/00.jpg"]
    assert counts(extract(photos, cache, TINY)) == (15, 3, 15, 0, 0, 0)
    assert counts(extract(photos, cache, TINY, limit=3)) == (0, 18, 0, 0, 0, 0)


def test_storage_auto_takes_float32_when_float16_would_lose_the_embeddings(photos: Path, tmp_path: Path) -> None:
    request = dataclasses.replace(TINY, backbone="mobilenet_v3_small")  # random: about 1e-10, zero in float16
    extract(photos, tmp_path / "f.h5", request)
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert cache.X.dtype == np.float32
    assert (np.abs(cache.X).max(axis=1) > 0).all()
    with pytest.raises(SourceError, match="does not fit float16"):
        extract(photos, tmp_path / "g.h5", dataclasses.replace(request, dtype="float16"))


def test_features_too_large_for_float16_are_refused_not_infinite(photos: Path, tmp_path: Path, monkeypatch) -> None:
    original = embedding.storable

    def magnify(chunk, dtype):
        features = chunk.features.copy()
        features[chunk.indices == 4] = 1e6
        return original(dataclasses.replace(chunk, features=features), dtype)

    monkeypatch.setattr(embedding, "storable", magnify)
    report = extract(photos, tmp_path / "f.h5", TINY)
    assert report.refused == 1
    assert FeatureCache.open(tmp_path / "f.h5").refused == (
        ("blue/04.jpg", "its embedding does not fit float16; use --dtype float32"),
    )


# ------------------------------------------------------------------------------------------------ interruption


def test_ctrl_c_keeps_what_is_finished(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        extract(photos, tmp_path / "f.h5", TINY, workers=1, progress=stop_after(8))
    assert not (tmp_path / "f.h5").exists()
    assert not [
        thread.name for thread in threading.enumerate() if thread.name.startswith("featcache")
    ]  # no worker is left
    report = extract(photos, tmp_path / "f.h5", TINY)
    assert (report.embedded, report.reused) == (10, 8)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_part_is_made_again(photos: Path, tmp_path: Path, monkeypatch, damage: str) -> None:
    monkeypatch.setattr(parts, "MAX_ROWS", 8)
    with pytest.raises(KeyboardInterrupt):
        extract(photos, tmp_path / "f.h5", TINY, progress=stop_after(16))
    files = sorted((tmp_path / "f.h5.parts").glob("*.h5"))
    assert len(files) == 2
    if damage == "flipped":
        break_a_row(files[0], 3)
    else:
        os.truncate(files[0], files[0].stat().st_size - 100)
    report = extract(photos, tmp_path / "f.h5", TINY)
    assert (report.embedded, report.reused) == (10, 8)
    extract(photos, tmp_path / "whole.h5", TINY)
    np.testing.assert_array_equal(FeatureCache.open(tmp_path / "f.h5").X, FeatureCache.open(tmp_path / "whole.h5").X)


def test_parts_of_another_spec_are_not_mixed_in(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        extract(photos, tmp_path / "f.h5", TINY, progress=stop_after(1))
    other = dataclasses.replace(TINY, resize=41)
    with pytest.raises(SpecMismatchError, match="unfinished work"):
        extract(photos, tmp_path / "f.h5", other)
    assert extract(photos, tmp_path / "f.h5", other, force=True).embedded == 18


def test_disk_full_while_embedding_loses_nothing(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "MAX_ROWS", 8)
    full = StorageError("cannot write: No space left on device")
    write_once = mock.Mock(wraps=parts.write_cache, side_effect=[mock.DEFAULT, full, full])
    with monkeypatch.context() as patched, pytest.raises(StorageError):
        patched.setattr(parts, "write_cache", write_once)
        extract(photos, tmp_path / "f.h5", TINY)
    report = extract(photos, tmp_path / "f.h5", TINY)
    assert (report.embedded, report.reused) == (10, 8)


# --------------------------------------------------------------------------------------------------- bad input


def test_damage_is_found_before_work_starts(photos: Path, tmp_path: Path) -> None:
    cache = tmp_path / "f.h5"
    extract(photos, cache, TINY)
    break_a_row(cache)
    write_photo(photos / "red" / "new.png", (200, 0, 0), 99)
    with pytest.raises(CacheError, match="damaged"):
        extract(photos, cache, TINY)
    assert counts(extract(photos, cache, TINY, force=True))[:2] == (19, 0)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda root: root.mkdir(), "no image found"),
        (lambda root: write_photo(root / "only" / "a.png", (1, 2, 3), 1), "one class only"),
        (lambda root: [(root / c).mkdir(parents=True) or (root / c / "a.jpg").touch() for c in "ab"], "all 2 images"),
    ],
)
def test_useless_sources(tmp_path: Path, prepare: Callable[[Path], object], words: str) -> None:
    prepare(tmp_path / "p")
    with pytest.raises(SourceError, match=words):
        extract(tmp_path / "p", tmp_path / "f.h5", TINY)
    assert not (tmp_path / "f.h5").exists()
    assert not (tmp_path / "f.h5.parts").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backbone": "resnet5"}, "no backbone is called 'resnet5'; near: resnet50"),
        ({"crop": 100_000}, "between 1 and 2048 pixels, found 100000"),
        ({"resize": (224, 0)}, "between 1 and 2048 pixels, found 0"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"interpolation": "x"}, "unknown interpolation 'x'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not on this machine"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_listed(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, options: dict, says: str
) -> None:
    monkeypatch.setattr("featcache.extraction.extract._list", lambda _: pytest.fail("listed"))
    with pytest.raises((BackboneError, UsageError), match=says):
        extract(photos, tmp_path / "f.h5", **options)


def test_useless_requests(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        extract(photos, tmp_path / "nowhere" / "f.h5", TINY)
    with pytest.raises(BackboneError, match="no backbone is called"):
        extract(photos, tmp_path / "f.h5", dataclasses.replace(TINY, backbone="resnet"))
    with pytest.raises(UsageError, match="smaller than crop"):
        extract(photos, tmp_path / "f.h5", dataclasses.replace(TINY, resize=20))
    with pytest.raises(UsageError, match="unknown dtype"):
        dataclasses.replace(TINY, dtype="int8")


def test_weights_no_library_provides_lie_beside_the_cache(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path / "f.h5", TINY)
    spec = FeatureCache.open(tmp_path / "f.h5").spec
    copy = weights_copy(tmp_path / "f.h5", spec)
    assert load_backbone(TINY.backbone, copy).weights_sha256 == spec.weights_sha256
    copy.unlink()
    assert counts(extract(photos, tmp_path / "f.h5", TINY))[:2] == (0, 18)  # restored, nothing else done
    assert copy.is_file()
    extract(photos, tmp_path / "f.h5", dataclasses.replace(TINY, backbone="squeezenet1_0"), force=True)
    assert not copy.exists()


def test_a_batch_of_refused_images_only(photos: Path, tmp_path: Path) -> None:
    for number in range(20):  # sorts last: at least one whole chunk without a single image
        (photos / "red" / f"zz{number}.jpg").touch()
    assert counts(extract(photos, tmp_path / "f.h5", TINY)) == (18, 0, 18, 0, 0, 20)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_not_ours_is_never_replaced(photos: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.h5").write_text("ten years of work")
    with pytest.raises(CacheError, match="not an HDF5 file"):
        extract(photos, tmp_path / "thesis.h5", TINY, force=force)
    assert (tmp_path / "thesis.h5").read_text() == "ten years of work"
    (tmp_path / "g.h5.parts").mkdir()
    (tmp_path / "g.h5.parts" / "thesis.txt").write_text("another one")
    extract(photos, tmp_path / "g.h5", TINY, force=force)
    assert (tmp_path / "g.h5.parts" / "thesis.txt").exists()


def test_outputs_inside_the_source_are_no_images_and_no_classes(photos: Path) -> None:
    extract(photos, photos / "f.h5", TINY)
    (photos / "model").mkdir()
    (photos / "model" / "model.json").touch()
    (photos / "f.h5.parts").mkdir()
    assert counts(extract(photos, photos / "f.h5", TINY)) == (0, 18, 0, 0, 0, 0)


def test_reduced_scale_is_part_of_the_spec_and_of_every_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Large JPEGs: another spec, other pixels, and predict reads images as the model's features were read."""
    for number, colour in enumerate(COLOURS.values()):
        for seed in range(4):
            write_photo(tmp_path / "large" / str(number) / f"{seed}.jpg", colour, seed, size=(400, 333))
    full = extract(tmp_path / "large", tmp_path / "full.h5", TINY)
    reduced = dataclasses.replace(TINY, decode="reduced")
    with pytest.raises(SpecMismatchError, match="preprocess.decode: full scale -> reduced scale"):
        extract(tmp_path / "large", tmp_path / "full.h5", reduced)
    with caplog.at_level("INFO", "featcache"):
        report = extract(tmp_path / "large", tmp_path / "reduced.h5", reduced)
    assert "large JPEGs are decoded at a reduced scale: to full scale cosine mean 0.9" in caplog.text
    assert (report.embedded, report.refused) == (12, 0)
    assert report.fingerprint != full.fingerprint
    a, b = (np.asarray(FeatureCache.open(tmp_path / f"{name}.h5").X, float) for name in ("full", "reduced"))
    assert 0.9 < cosine(a, b)[1] < 1
    fit_head(tmp_path / "reduced.h5", tmp_path / "model", C=1.0, folds=0)
    from_cache, from_images = (list(predict(tmp_path / "model", [tmp_path / name])) for name in ("reduced.h5", "large"))
    for cached, image in zip(from_cache, from_images, strict=True):
        np.testing.assert_allclose(cached.probabilities, image.probabilities, atol=1e-3)
    again = extract(tmp_path / "large", tmp_path / "again.h5", ExtractRequest(backbone=str(tmp_path / "model")))
    assert again.fingerprint == report.fingerprint
    with pytest.raises(UsageError, match="unknown decode 'half'"):
        dataclasses.replace(TINY, decode="half")


def test_python_is_told_what_the_console_says(
    photos: Path, tmp_path: Path, run, caplog: pytest.LogCaptureFixture
) -> None:
    """The same lines, by way of the logger "featcache"; the report is the line on stdout."""
    (photos / "red" / "broken.jpg").write_text("no image")
    shutil.copy(photos / "red" / "00.jpg", photos / "blue" / "copy.jpg")
    logging.getLogger("featcache").addHandler(cli._ToStderr())
    _, out, err = run("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--max-bad", 1)
    (tmp_path / "f.h5").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO):  # as by logging.basicConfig(level="INFO")
        report = extract(photos, tmp_path / "f.h5", TINY)
    lines = [("warning: " if record.levelno > logging.INFO else "") + record.getMessage() for record in caplog.records]
    lines = [line for line in lines if not line.startswith("embedding ")]  # said only where it takes its time
    assert lines == [line for line in err.splitlines() if not line.startswith("embedding ")]
    assert lines[0] == f"{photos}: 20 images, 3 classes"
    assert lines[-2].startswith("warning: 1 image lies under several labels")
    assert lines[-1] == f"why images were refused: featcache info {tmp_path / 'f.h5'}"
    assert report.lines()[:-1] == str(report).splitlines()[:-1] == out.splitlines()[:-1]
    assert re.fullmatch(r"  [\d.]+ s, [\d,]+ images/s once started", report.lines()[-1])
    assert out.startswith(
        f"{tmp_path / 'f.h5'}: 19 embeddings of 512 dimensions\n  3 classes: blue, green, red; no splits\n"
    )


@pytest.mark.parametrize("after", [0, 8])
def test_an_interruption_says_where_the_work_is(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    """If there is any."""

    def interrupt(done: int, *_: object) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(photos, tmp_path / "f.h5", TINY, progress=interrupt)
    kept = f"finished work is kept in {tmp_path / 'f.h5.parts'}; the same once more goes on from there"
    assert caplog.messages == ([kept] if after else [])
    assert (tmp_path / "f.h5.parts").is_dir() == bool(after)


@pytest.mark.parametrize("finished", [0, 1])
def test_a_first_run_that_fails_leaves_its_weights_only_to_finished_work(
    photos: Path, tmp_path: Path, finished: int
) -> None:
    def fail(work: Work, *_: object, **__: object) -> Published:
        if finished:
            run_part(work, np.arange(4))
        raise StorageError("no room")

    with pytest.raises(StorageError, match="no room"):
        extract(photos, tmp_path / "f.h5", TINY, executor=fail)
    assert (tmp_path / WEIGHTS).exists() == bool(finished) == (tmp_path / "f.h5.parts").exists()
    assert extract(photos, tmp_path / "f.h5", TINY).reused == 4 * finished
    assert (tmp_path / WEIGHTS).exists()


def test_a_source_of_refusals_alone_is_refused_before_anything_is_loaded(tmp_path: Path, no_model: None) -> None:
    (tmp_path / "a.tar").write_bytes(b"no archive" * 200)
    with pytest.raises(SourceError, match=r"^the only image of .*a\.tar was refused, the first, a\.tar: damaged: "):
        extract(tmp_path / "a.tar", tmp_path / "f.h5", TINY)
    for other in (finetune, preview, lambda source, output: doctor(images=source)):
        with pytest.raises(SourceError, match=r"^the only image of .*a\.tar was refused"):
            other(tmp_path / "a.tar", tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
