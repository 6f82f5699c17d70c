"""A picture in memory is embedded as the same picture in a file is: the oracle is a lossless file, decoded."""

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.errors import RefusedImage
from featcache.images.decode import decode
from featcache.images.in_memory import as_file
from featcache.images.read import Paths, read_images

RGB = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (21, 34, 4), dtype=np.uint8)
PICTURE = Image.fromarray(RGB)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def clear_palette() -> Image.Image:
    image = PICTURE.convert("P")
    image.info["transparency"] = 3
    return image


def clear_deep() -> Image.Image:
    image = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)
    image.info["transparency"] = int(RGB[0, 0, 0]) * 257
    return image


@pytest.mark.parametrize(
    "make",
    [
        *(lambda mode=mode: PICTURE.convert(mode) for mode in ("1", "L", "LA", "P", "RGB")),
        *(lambda array=array: Image.fromarray(array) for array in (ALPHA, RGB[..., 1].astype(np.uint16) * 200)),
        clear_palette,
        clear_deep,
    ],
)
def test_pil_images_are_read_as_the_png_that_they_become(make: Callable[[], Image.Image]) -> None:
    expected = decode(saved(make()))
    assert np.array_equal(decode(as_file(make())), expected)
    opened = Image.open(io.BytesIO(saved(make())))
    opened.load()  # which makes it an image in memory
    assert np.array_equal(decode(as_file(opened)), expected)


def test_modes_that_png_lacks() -> None:
    cmyk = PICTURE.convert("CMYK")
    assert np.array_equal(decode(as_file(cmyk)), decode(saved(cmyk, "TIFF")))
    premultiplied = Image.fromarray(np.full((2, 2, 4), (50, 0, 0, 100), np.uint8)).convert("RGBa")
    assert np.asarray(decode(as_file(premultiplied)))[0, 0] == pytest.approx(
        [175, 155, 155], abs=2
    )  # on white, by hand


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB, RGB),
        (RGB[::-1, ::2], RGB[::-1, ::2]),  # not contiguous
        (RGB[..., 0], np.dstack([RGB[..., 0]] * 3)),
        (np.full((3, 2, 4), (10, 20, 30, 0), np.uint8), np.full((3, 2, 3), 255, np.uint8)),
    ],
)
def test_arrays_are_the_pixels_that_they_hold(array: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(decode(as_file(array)), expected)


def test_a_white_level_applies_to_samples_of_16_bits() -> None:
    deep = Image.fromarray(RGB[..., 0].astype(np.uint16) * 16)
    for level in (None, 4095):
        assert np.array_equal(decode(as_file(deep), white_level=level), decode(saved(deep), white_level=level))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("turned", range(1, 9))
def test_orientation_is_applied_once(turned: int, *, loaded: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    data = saved(PICTURE, exif=exif)
    image = Image.open(io.BytesIO(data))
    if loaded:
        image.load()
    assert np.array_equal(decode(as_file(image)), decode(data))


def test_what_is_only_opened_is_read_as_its_file(tmp_path: Path) -> None:
    """Damage is then seen, and the digest is that of the file; what was done to an image counts nevertheless."""
    data = saved(PICTURE, "JPEG", quality=95)
    (tmp_path / "a.jpg").write_bytes(data)
    with Image.open(tmp_path / "a.jpg") as image:
        assert as_file(image) == data
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))  # it can still be used
        image.putpixel((0, 0), (1, 2, 3))
        assert decode(as_file(image)).getpixel((0, 0)) == (1, 2, 3)
    small = Image.open(io.BytesIO(data))
    small.draft("RGB", (17, 10))
    assert decode(as_file(small)).size == small.size == (17, 11)
    for kind in ("GIF", "TIFF"):  # the second of two frames
        frames = Image.open(io.BytesIO(saved(PICTURE, kind, save_all=True, append_images=[PICTURE.rotate(180)])))
        frames.seek(1)
        assert np.array_equal(decode(as_file(frames)), frames.convert("RGB"))
    cut = Image.open(io.BytesIO(data[: len(data) // 2] + b"\xff\xd9"))
    with pytest.raises(RefusedImage, match="damaged"):
        decode(as_file(cut))


def test_what_has_no_meaning_is_refused_with_its_reason() -> None:
    closed = [Image.open(io.BytesIO(saved(PICTURE))) for _ in range(2)]
    closed[1].load()
    for image in closed:
        image.close()
    images = [PICTURE, PICTURE.convert("F"), PICTURE.convert("I"), Image.new("RGB", (0, 3)), *closed]
    reads = read_images(Paths(None, tuple("abcdef"), dict(enumerate(images))), range(6), decode, workers=2)
    reasons = [read.reason.split(":")[0] for read in reads]
    gone = "the image was closed before it was read; give its path, or keep it open"
    deep = "32-bit pixels (mode {}) have no defined range; save it with 8 or 16 bits"
    assert reasons == ["", deep.format("F"), deep.format("I"), "an image without pixels", gone, gone]


def test_no_two_threads_load_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow loads an image when it is used."""
    opened = Image.open(io.BytesIO(saved(PICTURE, "PCX")))  # of a kind that is not read as its file
    load, inside, most = opened.load, [], []

    def slow() -> object:
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return load()

    monkeypatch.setattr(opened, "load", slow)
    files = Paths(None, ("x",) * 16, dict.fromkeys(range(16), opened))
    for read in read_images(files, range(16), decode, workers=8):
        assert np.array_equal(read.value, RGB)
    assert max(most) == 1
