"""HEIC: pixels as before encoding, upright once, whole or refused; and what is said without its decoder."""

import contextlib
import io
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, make_photos
from corpus import exif_of, saved
from PIL import Image, ImageFile

from featcache.cache.cache import FeatureCache
from featcache.errors import RefusedImage
from featcache.extraction.extract import extract
from featcache.images.decode import decode, decode_pixels, strict_decoding
from featcache.images.heif import is_heif
from featcache.images.in_memory import as_file

LOSSLESS: dict[str, Any] = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}
y, x = np.mgrid[0:96, 0:160]
PHOTO = np.stack([x * 255 // 159, y * 255 // 95, (x * y) % 256], -1).astype(np.uint8)
WITHOUT = "HEIC needs pillow-heif, which is not installed: pip install 'featcache[heif]'"


def encoded(picture: np.ndarray, mode: str = "", **options: Any) -> bytes:
    """Skips the test where nothing is installed that could encode."""
    heif = pytest.importorskip("pillow_heif")
    picture, file = np.ascontiguousarray(picture), io.BytesIO()
    size = (picture.shape[1], picture.shape[0])
    mode = mode or {2: "L"}.get(picture.ndim) or ("RGB", "RGBA")[picture.shape[2] == 4]
    options = {
        name: value for name, value in (LOSSLESS | options).items() if mode[0] != "L" or name != "matrix_coefficients"
    }
    heif.from_bytes(mode, size, picture.tobytes()).save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"tile_size": 64}], ids=["one piece", "grid"])
def test_pixels_are_those_that_were_encoded(options: dict[str, Any]) -> None:
    data = encoded(PHOTO, **options)
    np.testing.assert_array_equal(decode_pixels(data), PHOTO)
    lossy = decode_pixels(
        encoded(PHOTO, **(options | {"quality": 80, "chroma": 420, "matrix_coefficients": 6}))
    ).astype(int)
    assert np.abs(lossy[..., :2] - PHOTO[..., :2]).mean() < 6
    assert "HEIF" not in Image.OPEN, "Pillow's own list of formats is left alone"


def test_every_depth_and_alpha_becomes_what_its_samples_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    deep = np.tile(np.arange(1024, dtype=np.uint16), (64, 1))
    ten = decode_pixels(encoded(np.stack([deep] * 3, -1) << 6, "RGB;16"))
    np.testing.assert_array_equal(ten[..., 0], deep >> 2)
    monkeypatch.setattr(heif.options, "SAVE_HDR_TO_12_BIT", True)
    deep = np.tile(np.arange(4096, dtype=np.uint16), (64, 1))
    twelve = decode_pixels(encoded(deep << 4, "L;16"))
    np.testing.assert_array_equal(twelve[..., 1], np.round(deep / 4095 * 255))
    grey = decode_pixels(encoded(PHOTO[..., 0]))
    np.testing.assert_array_equal(grey, np.stack([PHOTO[..., 0]] * 3, -1))
    alpha = (x * 255 // 159)[..., None]
    seen = decode_pixels(encoded(np.dstack([PHOTO, alpha.astype(np.uint8)])))
    assert np.abs(seen - (PHOTO * (alpha / 255) + 255 - alpha)).max() <= 1  # on white


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_once_as_the_same_picture_in_a_png(orientation: int) -> None:
    data = encoded(PHOTO, exif=exif_of(orientation).tobytes())  # of which the encoder makes properties of the file
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    np.testing.assert_array_equal(decode_pixels(data), decode_pixels(saved(PHOTO, "PNG", exif=exif_of(orientation))))


def test_exif_alone_turns_nothing() -> None:
    """ISO/IEC 23008-12: only ``irot`` and ``imir`` say how a picture is shown."""
    data = encoded(PHOTO, exif=exif_of(6).tobytes()).replace(b"irot", b"skip")
    np.testing.assert_array_equal(decode_pixels(data), PHOTO)


def test_of_several_images_the_primary_one_counts() -> None:
    heif = pytest.importorskip("pillow_heif")
    several = heif.from_pillow(Image.new("RGB", (64, 64), "red"))
    several.add_from_pillow(Image.fromarray(PHOTO))
    for primary, size in enumerate([(64, 64), (160, 96)]):
        file = io.BytesIO()
        several.save(file, primary_index=primary, **LOSSLESS)
        assert decode(file.getvalue()).size == size


@pytest.mark.parametrize("options", [{}, {"tile_size": 64}], ids=["one piece", "grid"])
def test_what_is_cut_off_or_full_of_holes_is_refused(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """libheif alone shows the first tiles of a cut grid, and makes up the others."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(PHOTO, **(options | {"quality": 90}))
    start = whole.index(b"mdat") + 4
    damaged = [whole[:length] for length in (*range(1, len(whole), 97), len(whole) - 1)]
    damaged += [whole[:at] + bytes(100) + whole[at + 100 :] for at in range(start, len(whole) - 100, 211)]
    for data in damaged:
        with strict_decoding(), pytest.raises(RefusedImage, match="damaged|not an image"):
            decode(data)
        import pillow_heif

        opened = None
        with contextlib.suppress(SyntaxError):  # by somebody's own program
            opened = pillow_heif.HeifImageFile(io.BytesIO(data))
        if opened:
            with pytest.raises(RefusedImage, match="damaged"):
                decode(as_file(opened))
    decode(whole + b"what follows the last box does not matter")


@pytest.mark.parametrize("edge", [1, 20_000, 60_000])
def test_a_size_that_is_untrue_or_absurd_is_refused(edge: int) -> None:
    data = encoded(PHOTO)
    at = data.index(b"ispe") + 8
    data = data[:at] + struct.pack(">II", edge, edge) + data[at + 8 :]
    with pytest.raises(RefusedImage, match=f"too large: {edge}x{edge} pixels" if edge > 1 else "damaged"):
        decode(data)


def test_any_flipped_byte_ends_in_a_picture_or_a_reason() -> None:
    random = np.random.default_rng(0)
    whole = [encoded(PHOTO[:64], quality=50), encoded(PHOTO[:64], quality=50, tile_size=64)]
    for number in range(300):
        data = bytearray(whole[number % 2])
        for at in random.integers(0, data.index(b"mdat"), random.integers(1, 5)):
            data[at] = random.integers(256)
        try:
            assert decode_pixels(bytes(data)).dtype == np.uint8
        except RefusedImage as reason:
            assert str(reason).startswith(("damaged", "not an image", "too large"))


def test_a_sequence_without_a_still_image_is_said_to_be_that() -> None:
    pytest.importorskip("pillow_heif")
    with pytest.raises(RefusedImage, match="^an image sequence without a still image"):
        decode(b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc" + b"\0\0\0\x08moov")


def test_threads_do_not_disturb_each_other() -> None:
    files = [encoded(np.roll(PHOTO, number, axis=1), tile_size=64) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for number, pixels in enumerate(pool.map(decode_pixels, files * 4)):
            np.testing.assert_array_equal(pixels, np.roll(PHOTO, number % 8, axis=1))


def test_avif_stays_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = saved(PHOTO, "AVIF")
    assert not is_heif(data)
    assert decode(data).size == (160, 96)
    for brands, heif in ((b"mif1heic", True), (b"mif1avif", False), (b"msf1hevc", True), (b"isommp42", False)):
        assert is_heif(b"\0\0\0\x14ftyp" + brands[:4] + bytes(4) + brands[4:]) is heif


def test_a_phones_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the decoder each is refused with the line that adds it; with it the same command embeds them."""
    photos = make_photos(tmp_path / "photos", each=1)
    data = encoded(PHOTO) if _is_there() else b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    names = ("a.heic", "b.HEIF", "c.hif", "d.heics", "e.heifs", "f")
    for name in names:
        (photos / "red" / name).write_bytes(data + name.encode())
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        report = extract(photos, tmp_path / "f.h5", TINY)
    assert (report.embedded, report.refused) == (3, 6)
    assert {reason for _, reason in FeatureCache.open(tmp_path / "f.h5").refused} == {WITHOUT}
    if _is_there():
        report = extract(photos, tmp_path / "f.h5", TINY)
        assert (report.embedded, report.reused, report.refused) == (6, 3, 0)


def _is_there() -> bool:
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        return False
    return True
