"""Every kind of file decodes to defined pixels; whatever decodes it, pixels and refusals are Pillow's."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photo
from corpus import UPRIGHT, chunk, exif_of, saved
from PIL import Image, ImageFile, JpegImagePlugin

from featcache.errors import RefusedImage
from featcache.images.decode import (
    MAX_PIXELS,
    decode,
    decode_pixels,
    decoder_in_words,
    fast_jpeg,
    strict_decoding,
)
from featcache.images.preprocess import to_pixels
from featcache.spec import PreprocessSpec


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    fast_jpeg.cache_clear()
    yield
    fast_jpeg.cache_clear()


def jpeg(mode: str = "RGB", size: tuple[int, int] = (73, 50), **options: object) -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return saved(noise, "JPEG", mode, **options)


FILES = {
    "photo": jpeg(),
    "4:4:4": jpeg(quality=95, subsampling=0),
    "4:2:2": jpeg(subsampling=1),
    "grey": jpeg("L"),
    "CMYK": jpeg("CMYK"),
    "progressive": jpeg(progressive=True),
    "upright": jpeg(exif=exif_of(1)),
    "turned": jpeg(exif=exif_of(6)),
    "trailing bytes": jpeg() + b"garbage",
    "not a JPEG": b"GIF89a" + bytes(10),
    "empty": b"",
    "only a header": jpeg()[:150],
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_and_refusals_are_pillows(name: str) -> None:
    assert fast_jpeg(), "the dev extra installs it"
    same_as_pillow(FILES[name])


def same_as_pillow(data: bytes, at_least: int | None = None) -> None:
    try:
        expected = np.asarray(decode(data, at_least=at_least))
    except RefusedImage as reason:
        with pytest.raises(RefusedImage) as found:
            decode_pixels(data, at_least=at_least)
        assert str(found.value) == str(reason)
        return
    pixels = decode_pixels(data, at_least=at_least)
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.flags.writeable


@pytest.mark.parametrize("at_least", [4, 8, 12, 13, 24, 200])
@pytest.mark.parametrize("name", FILES)
def test_reduced_scale_is_pillows(name: str, at_least: int) -> None:
    same_as_pillow(FILES[name], at_least)


@pytest.mark.parametrize(
    ("at_least", "factor"), [(None, 1), (64, 1), (50, 2), (49, 2), (25, 4), (13, 4), (12, 8), (1, 8)]
)
def test_reduced_scale_leaves_twice_what_is_wanted(at_least: int | None, factor: int) -> None:
    """A smooth picture, so that whatever the scale, the resized result must be nearly the same."""
    ramp = np.linspace(0, 255, 301)[None, :, None] * np.ones((201, 1, 3)) * [1, 0.5, 0.2]
    data = saved(ramp.astype(np.uint8), "JPEG", quality=95)
    pixels = decode_pixels(data, at_least=at_least)
    assert pixels.shape == (-(-201 // factor), -(-301 // factor), 3)
    spec = {"resize": (12, 12), "crop": (12, 12), "interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1)}
    small, whole = (to_pixels(p, PreprocessSpec(**spec)).astype(int) for p in (pixels, decode_pixels(data)))  # type: ignore[arg-type]
    assert np.abs(small - whole).max() <= 3


def test_only_jpegs_are_decoded_at_a_reduced_scale() -> None:
    assert decode_pixels(saved(Image.new("RGB", (300, 200)), "PNG"), at_least=10).shape == (200, 300, 3)


def test_damaged_files() -> None:
    """Cut off anywhere, or with a flipped byte: decoded alike or refused alike."""
    whole = jpeg(size=(64, 64))
    for stop in range(2, len(whole), len(whole) // 60):
        same_as_pillow(whole[:stop])
        same_as_pillow(whole[:stop] + b"\xff\xd9")
    random = np.random.default_rng(0)
    for position in random.integers(2, len(whole), 60).tolist():
        same_as_pillow(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])


@pytest.mark.parametrize("at_least", [None, 12])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}]
)
def test_half_a_picture_is_no_picture(options: dict[str, object], at_least: int | None) -> None:
    """The end mark of a JPEG does not make it whole, nor does it matter which decoder there is."""
    whole = jpeg(size=(200, 150), **options)
    middle = whole.index(b"\xff\xda") + (len(whole) - whole.index(b"\xff\xda")) // 2
    for data in (whole[:middle] + b"\xff\xd9", whole[:middle] + whole[-2:] + whole):
        for way in (decode, decode_pixels):
            with pytest.raises(RefusedImage, match="damaged: JPEG data (ends|lacks)"):
                way(data, at_least=at_least)
    for data in (whole, whole + whole[:middle], whole[:-2] + bytes(40) + whole[-2:], whole[:-2] + b"\xff" + whole[-2:]):
        same_as_pillow(data, at_least)
        decode(data, at_least=at_least)


def test_the_fast_decoder_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_jpeg()
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda image: pytest.fail("decoded by Pillow"))
    assert decode_pixels(FILES["photo"]).shape == (50, 73, 3)
    with pytest.raises(pytest.fail.Exception):
        decode_pixels(FILES["turned"])


def test_a_decoder_with_other_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import simplejpeg

    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: np.asarray(decode(data)) ^ 1)
    assert "by Pillow" in decoder_in_words()
    same_as_pillow(FILES["photo"])


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_DECODER", "pillow")
    assert "as FEATCACHE_DECODER says" in decoder_in_words()
    same_as_pillow(FILES["photo"])


def test_photos(tmp_path: Path) -> None:
    same_as_pillow(write_photo(tmp_path / "photo.jpg", (200, 80, 20), 3).read_bytes())


# ------------------------------------------------------------------------------------------ kinds of files


def gradient() -> Image.Image:
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied(orientation: int) -> None:
    stored = gradient()
    decoded = decode(saved(stored, "PNG", exif=exif_of(orientation)))
    np.testing.assert_array_equal(np.asarray(decoded), UPRIGHT[orientation](np.asarray(stored)))


def test_modes_become_rgb() -> None:
    picture = gradient()
    grey = picture.convert("L")
    expect = {"RGB": picture, "L": grey.convert("RGB"), "1": picture.convert("1").convert("RGB")}
    for mode, wanted in expect.items():
        np.testing.assert_array_equal(np.asarray(decode(saved(picture.convert(mode), "PNG"))), np.asarray(wanted))
    palette = picture.quantize(16)
    np.testing.assert_array_equal(np.asarray(decode(saved(palette, "PNG"))), np.asarray(palette.convert("RGB")))
    cmyk = decode(saved(picture.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(np.asarray(cmyk).astype(int) - np.asarray(picture)).mean() < 3


def test_alpha_is_composited_on_white() -> None:
    layers = Image.new("RGBA", (2, 1))
    layers.putpixel((0, 0), (10, 20, 30, 255))
    layers.putpixel((1, 0), (10, 20, 30, 0))
    assert np.asarray(decode(saved(layers, "PNG"))).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert np.asarray(decode(saved(grey, "PNG"))).tolist() == [[[255, 255, 255]]]
    flat = Image.new("P", (1, 1), 0)
    assert np.asarray(decode(saved(flat, "PNG", transparency=0))).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        assert np.asarray(decode(saved(deep, kind)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_unusable_files_are_refused_with_a_reason() -> None:
    jpeg = saved(gradient().resize((600, 400)), "JPEG")
    floats = saved(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF")
    cases = {
        b"": "empty file",
        b"hello": "not an image",
        jpeg[: len(jpeg) // 2]: "damaged: image file is truncated",
        bomb(): "too large",
        floats: "no defined range",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not an image",
    }
    for data, reason in cases.items():
        with pytest.raises(RefusedImage, match=reason):
            decode(data)
    assert MAX_PIXELS < 100_000**2


def test_what_a_notebook_allowed_pillow_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        whole = saved(gradient().resize((300, 200)), kind)
        with strict_decoding(), pytest.raises(RefusedImage, match="truncated"):
            decode(whole[: len(whole) * 3 // 4])
    assert ImageFile.LOAD_TRUNCATED_IMAGES
