"""Whatever decodes a file, pixels and refusals are Pillow's. Kinds of files: ``tests/promises/test_image_corpus.py``."""

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from corpus import exif_of, saved
from PIL import Image, ImageFile, JpegImagePlugin

from featcache.errors import RefusedImage
from featcache.images.decode import decode, decode_pixels, decoder_in_words, fast_jpeg, strict_decoding
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


@pytest.mark.parametrize("at_least", [None, 4, 8, 12, 13, 24, 200])
@pytest.mark.parametrize("name", FILES)
def test_pixels_and_refusals_are_pillows(name: str, at_least: int | None) -> None:
    assert fast_jpeg(), "the dev extra installs it"
    same_as_pillow(FILES[name], at_least)


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


@pytest.mark.parametrize(
    ("at_least", "factor"), [(None, 1), (64, 1), (50, 2), (49, 2), (25, 4), (13, 4), (12, 8), (1, 8)]
)
def test_reduced_scale_leaves_twice_what_is_wanted(at_least: int | None, factor: int) -> None:
    """A smooth picture, so that whatever the scale, the resized result must be nearly the same."""
    ramp = np.linspace(0, 255, 301)[None, :, None] * np.ones((201, 1, 3)) * [1, 0.5, 0.2]
    ramp = ramp.astype(np.uint8)
    assert decode_pixels(saved(ramp, "PNG"), at_least=at_least).shape == (201, 301, 3)  # only JPEGs are reduced
    data = saved(ramp, "JPEG", quality=95)
    pixels = decode_pixels(data, at_least=at_least)
    assert pixels.shape == (-(-201 // factor), -(-301 // factor), 3)
    spec = {"resize": (12, 12), "crop": (12, 12), "interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1)}
    small, whole = (to_pixels(p, PreprocessSpec(**spec)).astype(int) for p in (pixels, decode_pixels(data)))  # type: ignore[arg-type]
    assert np.abs(small - whole).max() <= 3


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

    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data, **_: np.asarray(decode(data)) ^ 1)
    assert "by Pillow" in decoder_in_words()
    same_as_pillow(FILES["photo"])


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_DECODER", "pillow")
    assert "as FEATCACHE_DECODER says" in decoder_in_words()
    same_as_pillow(FILES["photo"])


def test_unusable_files_are_refused_with_a_reason() -> None:
    whole = jpeg(size=(600, 400))
    cases = {
        b"hello": "not an image",
        whole[: len(whole) // 2]: "damaged: image file is truncated",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not an image",
    }
    for data, reason in cases.items():
        with pytest.raises(RefusedImage, match=reason):
            decode(data)


def test_what_a_notebook_allowed_pillow_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    picture = Image.radial_gradient("L")
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        whole = saved(picture, kind)
        with strict_decoding(), pytest.raises(RefusedImage, match="truncated"):
            decode(whole[: len(whole) * 3 // 4])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_of_several_runs_the_last_restores_what_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters, first, second = warnings.filters[:], contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(strict_decoding())
    second.enter_context(strict_decoding())
    first.close()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    second.close()
    assert ImageFile.LOAD_TRUNCATED_IMAGES and warnings.filters == filters
