"""Headers: the size that ``decode`` gives, the reasons for which it refuses, and no pixel decoded."""

import io
import os
from pathlib import Path

import corpus
import damage
import numpy as np
import pytest
from PIL import Image, ImageOps

from featcache.errors import RefusedImage
from featcache.images.decode import decode_pixels, strict_decoding
from featcache.images.headers import Header, read_header

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)


def header_of(path: Path, data: bytes) -> Header | str:
    path.write_bytes(data)
    with strict_decoding():
        try:
            return read_header(path)
        except RefusedImage as reason:
            return str(reason)


def jpeg(**options: object) -> bytes:
    return corpus.saved(PHOTO, "JPEG", **options)


def test_the_size_is_that_of_the_picture_and_reasons_are_those_of_decoding(tmp_path: Path) -> None:
    """Of intact, odd and damaged files of every format, all called .jpg."""
    intact = corpus.intact(0)
    cases = [*intact, *damage.odd(0), *damage.damaged(intact, 150, 1)]
    refused = 0
    for case in cases:
        found = header_of(tmp_path / "image.jpg", case.data)
        try:
            with strict_decoding():
                pixels = decode_pixels(case.data)
        except RefusedImage as reason:
            refused += isinstance(found, str)
            assert not isinstance(found, str) or found == str(reason), case.name
        else:
            assert isinstance(found, Header), (case.name, found)
            assert (found.height, found.width) == pixels.shape[:2], case.name
            assert found.bytes == len(case.data)
    assert refused > 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_as_shown(tmp_path: Path, kind: str, orientation: int) -> None:
    data = corpus.saved(PHOTO, kind, exif=corpus.exif_of(orientation))
    found = header_of(tmp_path / "image", data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert isinstance(found, Header)
    assert (found.width, found.height) == upright.size
    assert (found.format, found.mode, found.turned) == (kind, "RGB", orientation > 1)


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    whole = corpus.saved(PHOTO, "PNG")
    turned = corpus.exif_of(6).tobytes().removeprefix(b"Exif\0\0")
    data = whole[:-12] + corpus.chunk(b"eXIf", turned) + whole[-12:]
    found = header_of(tmp_path / "image", data)
    assert isinstance(found, Header)
    assert (found.width, found.height, found.turned) == (40, 61, True)
    assert decode_pixels(data).shape == (61, 40, 3)


@pytest.mark.parametrize("behind", [False, True])
def test_an_orientation_in_the_texts_of_a_png_counts(tmp_path: Path, behind: bool) -> None:
    whole = corpus.saved(PHOTO, "PNG")
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="8"/>'
    at = len(whole) - 12 if behind else 33
    data = whole[:at] + corpus.chunk(b"iTXt", text) + whole[at:]
    found = header_of(tmp_path / "image", data)
    assert isinstance(found, Header)
    assert (found.width, found.height, found.turned) == (40, 61, True)
    assert decode_pixels(data).shape == (61, 40, 3)


def test_samples_without_a_range_are_refused_by_the_header(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(PHOTO[..., 0].astype(np.float32)).save(file, "TIFF")
    assert "floating-point samples have no defined range" in str(header_of(tmp_path / "image", file.getvalue()))


def test_a_file_without_an_end_shows(tmp_path: Path) -> None:
    for data in (jpeg(), corpus.saved(PHOTO, "PNG")):
        for kept, ends in ((len(data), True), (len(data) * 2 // 3, False)):
            found = header_of(tmp_path / "image", data[:kept])
            assert isinstance(found, Header)
            assert found.ends is ends
    found = header_of(tmp_path / "image", jpeg() + bytes(20))  # as some cameras pad them
    assert isinstance(found, Header)
    assert found.ends


def test_pixels_are_neither_read_nor_decoded(tmp_path: Path) -> None:
    """A hole of 900 MB in the pixels of a PNG and of a JPEG costs nothing."""
    hole = 900 * 2**20
    start = corpus.png(PHOTO[..., :1], 8, 0)[:33]
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(start + hole.to_bytes(4, "big") + b"IDAT")
        file.seek(hole + 4, 1)
        file.write(corpus.chunk(b"IEND", b""))
    with strict_decoding():
        found = read_header(path)
    assert (found.width, found.height, found.ends, found.bytes) == (61, 40, True, path.stat().st_size)
    with path.open("wb") as file:
        file.write(jpeg()[:-2])
        file.seek(hole, 1)
        file.write(b"\xff\xd9")
    with strict_decoding():
        assert read_header(path)[:4] == ("JPEG", "RGB", 61, 40)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (("pipe.jpg", "not a regular file"), (".", "directory|regular"), ("gone", "cannot be read")):
        with pytest.raises(RefusedImage, match=f"(?i){reason}"):
            read_header(tmp_path / name)
