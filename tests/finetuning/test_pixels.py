"""Decoded images: every image once, the same from memory and from a file, refused ones named."""

import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_network import JOB

from featcache.errors import StorageError
from featcache.finetuning import pixels
from featcache.finetuning.draw_processes import DrawByProcesses
from featcache.finetuning.pixels import (
    Apart,
    Pixels,
    decode_in_memory,
    decode_into_file,
    decode_split,
    network_input,
    open_pixels,
)
from featcache.finetuning.recipes import RECIPES
from featcache.finetuning.training_input import TrainingInput
from featcache.images.decode import decode
from featcache.images.preprocess import MOST_PIXELS, to_pixels
from featcache.images.read import read_file
from featcache.images.source import ImageList, list_images
from featcache.spec import PreprocessSpec
from featcache.system.memory import available_memory
from featcache.system.worker_processes import SharedMemory, WorkerProcesses

PLAIN = PreprocessSpec(resize=40, crop=(32, 32), interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_memory_and_file_hold_the_same(photos: Path, tmp_path: Path) -> None:
    (photos / "red" / "02.jpg").write_bytes(b"no picture")
    images = list_images(photos)
    convert = TrainingInput(PLAIN)
    kept = decode_in_memory(images, convert, workers=2)
    decode_into_file(images, convert, tmp_path / "p.pixels", typical=10_000, workers=2)
    shared = open_pixels(images, tmp_path / "p.pixels")
    assert len(kept) == len(shared) == 17
    broken = images.paths.index("red/02.jpg")
    assert kept.refused == shared.refused == {broken: "not an image, or of an unsupported format"}
    np.testing.assert_array_equal(kept.kept, np.setdiff1d(np.arange(18), [broken]))
    np.testing.assert_array_equal(kept.kept, shared.kept)
    assert kept.digest == shared.digest
    for number, position in enumerate(kept.kept):
        expected = convert(read_file(photos / images.paths[position])[0])
        np.testing.assert_array_equal(kept.pictures[number], expected)
        np.testing.assert_array_equal(shared.pictures[number], expected)
        assert kept.paths[number] == images.paths[position]
        assert kept.labels[number] == images.labels[position]


def test_evaluation_sees_exactly_what_prediction_sees(photos: Path) -> None:
    images = list_images(photos)
    kept = decode_in_memory(images, network_input(PLAIN))
    expected = [to_pixels(np.array(decode(read_file(photos / path)[0])), PLAIN) for path in images.paths]
    np.testing.assert_array_equal(kept.pictures, expected)


@pytest.mark.parametrize(("size", "stored"), [((400, 200), (92, 46)), ((200, 400), (46, 92)), ((30, 20), (30, 20))])
def test_training_images_keep_their_shape_and_are_never_enlarged(
    size: tuple[int, int], stored: tuple[int, int]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    picture = TrainingInput(PLAIN)(file.getvalue())
    assert picture.shape == (stored[1], stored[0], 3)
    assert picture.flags.writeable


def test_training_images_are_resized_as_by_pillow() -> None:
    """Up to the rounding of weights, one of 256 levels, as ``to_pixels``; a JPEG's orientation applied."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((300, 200), Image.Resampling.BICUBIC)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    image.save(file, "JPEG", exif=exif)
    expected = decode(file.getvalue()).resize((46, 69), Image.Resampling.BILINEAR)
    found = TrainingInput(PLAIN)(file.getvalue())
    difference = np.abs(found.astype(int) - np.asarray(expected, int))
    assert difference.max() <= 1
    assert difference.mean() < 0.1


@pytest.mark.parametrize("size", [(300_000, 60), (60, 300_000), (300_000, 30)])
def test_of_narrow_training_images_the_middle_is_kept(size: tuple[int, int]) -> None:
    """As much as ``MOST_PIXELS``, resized as the whole is."""
    ramp = np.abs(np.linspace(-255, 255, max(size))).astype(np.uint8)[:, None].repeat(min(size), axis=1)
    file = io.BytesIO()
    image = Image.fromarray(ramp if size[1] > size[0] else ramp.T)
    image.save(file, "PNG")
    picture = TrainingInput(PLAIN)(file.getvalue())
    height, width = picture.shape[:2]
    assert min(height, width) == min(46, *size)
    assert 0.99 * MOST_PIXELS < height * width <= MOST_PIXELS
    line = picture[:, 0, 0] if height > width else picture[0, :, 0]
    np.testing.assert_array_equal(line[: len(line) // 2], line[: -len(line) // 2 - 1 : -1][: len(line) // 2])
    assert line.min() == 0


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkerProcesses]:
    found = WorkerProcesses(2, ("featcache.finetuning.augment", "featcache.images.fill"))
    found.wait()
    yield found
    found.close()


def wide_and_narrow(photos: Path) -> ImageList:
    """With one that cannot be read, and one larger than it has room."""
    (photos / "red" / "02.jpg").write_bytes(b"no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 900, 3), np.uint8)).save(photos / "red" / "w.png")
    return list_images(photos)


def assert_same(found: Pixels, expected: Pixels) -> None:
    for name in ("kept", "labels", "digests"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.refused, found.paths, found.digest) == (expected.refused, expected.paths, expected.digest)
    for mine, theirs in zip(found.pictures, expected.pictures, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("convert", [TrainingInput(PLAIN), network_input(PLAIN)], ids=["training", "evaluation"])
def test_processes_decode_the_same_pictures(
    photos: Path, processes: WorkerProcesses, convert: Any, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, room, asked = wide_and_narrow(photos), 3 * 50 * 100, list[int]()
    call = processes.call
    monkeypatch.setattr(processes, "call", lambda *given: asked.append(len(given[2][2])) or call(*given))
    monkeypatch.setattr(WorkerProcesses, "ready", ready)
    memory = SharedMemory(len(images) * (room + 64))
    found = decode_in_memory(images, convert, workers=2, apart=Apart(processes, memory, room))
    assert sum(asked) == (len(images) if ready else 0)
    assert_same(found, decode_in_memory(images, convert))
    assert found.memory is memory
    where = [memory.offset(picture) for picture in found.pictures]
    assert [place is None for place in where] == [3 * len(p[0]) * len(p) > room for p in found.pictures]
    assert (None in where) == isinstance(convert, TrainingInput)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_gpus_run_decodes_by_the_processes_that_draw(
    photos: Path, processes: WorkerProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose memory has room for the batches, and which find nearly every picture there; a GPU's own JPEGs are left to it."""
    images = wide_and_narrow(photos)
    images = dataclasses.replace(images, splits=np.where(np.arange(len(images)) % 4, 1, 2).astype(np.uint8))
    job = dataclasses.replace(JOB, images=images, output=tmp_path / "ft", settings=RECIPES["default"])
    options: Any = {"classes": images.classes, "preprocess": PLAIN}
    expected = {split: decode_split(job, split, **options) for split in ("train", "val")}
    asked: list[Any] = []
    monkeypatch.setattr(pixels, "drawing_processes", lambda *given: asked.append(given) or processes)
    for split, plain in expected.items():
        found = decode_split(job, split, **options)
        assert_same(found, plain)
        assert plain.memory is None
        assert found.memory is not None
    n_train = int((images.splits == 1).sum())
    assert [(given[1].epochs, given[1].batch_size, given[2]) for given in asked] == [(15, 8, n_train)] * 2
    assert not len(decode_split(job, "test", **options))  # there are none
    train = decode_split(job, "train", **options)
    draw = DrawByProcesses(processes, train, (("flip", 0.5),), size=(32, 32), most=n_train)
    with draw.buffers(torch.device("cpu")) as buffers:
        assert draw(range(3), buffers[0][:3], lambda image: (0, 0, image))
    assert pixels._apart(job, 1, 1, draws=True) is not None
    monkeypatch.setattr(pixels, "_apart", None)  # not asked
    monkeypatch.setattr(pixels, "network_input", lambda *_: network_input(PLAIN))
    by_gpu = decode_split(job, "val", classes=images.classes, preprocess=dataclasses.replace(PLAIN, decode="gpu"))
    assert_same(by_gpu, expected["val"])


def test_the_digest_follows_content_and_order(photos: Path) -> None:
    before = decode_in_memory(list_images(photos), network_input(PLAIN)).digest
    first, second = photos / "red" / "00.jpg", photos / "red" / "01.jpg"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert decode_in_memory(list_images(photos), network_input(PLAIN)).digest != before


def test_too_little_space_is_refused_before_the_file_exists(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not enough space"):
        decode_into_file(list_images(photos), network_input(PLAIN), tmp_path / "p.pixels", typical=2**50)
    assert not (tmp_path / "p.pixels").exists()


def test_memory_is_measured() -> None:
    assert 2**20 < available_memory() < 2**45
