"""Every kind of pixels that a format can hold is decoded to the right picture or refused, never to another picture."""

import logging
from pathlib import Path

import formats
import numpy as np
import pytest
from corpus import UPRIGHT, chunk, exif_of, png, saved
from formats import FORMATS, samples, tiff

from featcache.errors import RefusedImage
from featcache.images.decode import decode_pixels, strict_decoding, was_misread
from featcache.images.formats import Brightest, plain_png

# At least; the rest is refused.
RIGHT = {"PNG": 87, "TIFF": 349, "TGA": 128, "BMP": 178, "PNM": 42, "WebP": 2, "JPEG 2000": 19}


@pytest.mark.parametrize("name", FORMATS)
def test_right_or_refused(name: str) -> None:
    faults, right = [], 0
    if not (entries := list(FORMATS[name]())):
        pytest.skip(f"this build of Pillow has no codec of {name}")
    with strict_decoding():
        for entry in entries:
            try:
                fault = formats.wrong(entry, decode_pixels(entry.data))
            except RefusedImage as reason:
                assert str(reason).strip(), entry.name
            else:
                faults += [fault] if fault else []
                right += not fault
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)
    assert right >= RIGHT[name]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_texts_that_turn_a_png_are_kept(orientation: int) -> None:
    """Where there is no EXIF, XMP says how to turn it; a text of any other name, however it is called, says nothing."""
    rgb = samples(3, 255)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="%d"/>' % orientation
    others = [chunk(b"tEXt", name + b"\0\0\0") for name in (b"transparency", b"interlace", b"icc_profile")]
    pixels = decode_pixels(png(rgb, 8, 2, chunk(b"iTXt", xmp), *others))
    np.testing.assert_array_equal(pixels, UPRIGHT[orientation](rgb))
    exif = saved(rgb.astype(np.uint8), "PNG", exif=exif_of(orientation))
    np.testing.assert_array_equal(decode_pixels(exif), UPRIGHT[orientation](rgb))


def test_a_png_loses_only_what_says_nothing_of_the_picture() -> None:
    needed = png(samples(1, 255), 8, 3, chunk(b"PLTE", bytes(768)), chunk(b"tRNS", b"\0"), pieces=3)
    noted = needed[:33] + chunk(b"tEXt", b"a\0b") + needed[33:-12] + chunk(b"tIME", bytes(7)) + needed[-12:]
    assert plain_png(noted) == needed
    assert plain_png(needed) is needed
    assert plain_png(noted[:-20]) == needed[:-12] + noted[-31:-20]  # what is cut off stays as it is


# ------------------------------------------------------------------------------------------- 16 bits, and fewer in them

BANDS = {"grey": 1, "rgb": 3, "rgba": 4}
COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # of PNG, by bands


def deep_files(bands: int, values: np.ndarray) -> list[bytes]:
    """The same samples of 16 bits in every way they are read with all their bits."""
    extra = {"extra": [2]} if bands == 4 else {}
    ways = [{"order": order, "deflate": deflate, **extra} for order in "<>" for deflate in (False, True)]
    ways += [{"order": "<", "planar": True}, {"order": ">", "planar": True}] if bands == 3 else []
    tiffs = [tiff(values, 16, 1 if bands == 1 else 2, **way) for way in ways]  # type: ignore[arg-type]
    pngs = [png(values, 16, COLOUR_TYPES[bands], interlaced=interlaced) for interlaced in (False, True)]
    pnms = [b"P5 %d %d 65535\n" % values.shape[1::-1] + values.astype(">u2").tobytes()] if bands == 1 else []
    return [*pngs, *tiffs, *pnms]


@pytest.mark.parametrize("bands", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("level", [1023, 4095, 30000])
def test_white_level(bands: int, level: int) -> None:
    """Samples up to the level are spread over 0 to 255, those above are white."""
    values = samples(bands, level)
    values[0, :4, :3] = level + np.arange(4)[:, None]
    colour = np.minimum(values[..., : min(bands, 3)] * (255 / level), 255)
    right = formats.on_white(colour, values[..., 3:] / 65535) if bands == 4 else np.broadcast_to(colour, (7, 13, 3))
    for number, data in enumerate(deep_files(bands, values)):
        assert np.abs(decode_pixels(data, white_level=level) - right).max() <= (2 if bands == 4 else 1), number


def test_a_white_level_that_cannot_be_applied_is_a_refusal_and_what_has_its_own_white_needs_none() -> None:
    values = samples(2, 65535)
    ppm = b"P6 13 7 65535\n" + samples(3, 65535).astype(">u2").tobytes()
    for data in (png(values, 16, 4), ppm, tiff(np.dstack([values, values]), 16, 2, extra=[1])):
        with pytest.raises(RefusedImage, match="white level"):
            decode_pixels(data, white_level=4095)
    for own in (tiff(samples(1, 4095), 12, 1), png(samples(3, 255), 8, 2), tiff(samples(1, 255), 8, 1)):
        np.testing.assert_array_equal(decode_pixels(own, white_level=9), decode_pixels(own))


def test_a_folder_of_dark_16_bit_images_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    seen, bright = Brightest(), Brightest()
    for data in deep_files(1, samples(1, 4095)) + deep_files(3, samples(3, 4095)):
        decode_pixels(data, seen=seen)
    for other in (png(samples(3, 25), 8, 2), tiff(samples(1, 4095), 12, 1)):  # white is what they say
        decode_pixels(other, seen=bright)
    assert bright.images == 0
    decode_pixels(png(samples(1, 65535), 16, 0), seen=bright)
    with caplog.at_level(logging.WARNING, "featcache"):
        for brightest in (seen, seen, bright, Brightest()):
            brightest.warn(at_least=seen.images + 1)
            brightest.warn()
    assert [record.getMessage() for record in caplog.records] == [
        f"images of 16 bits use at most 6 % of the range (4095 of 65535, in {seen.images} seen) and come out nearly black; if "
        "their samples have 12 bits, extract with --white-level 4095"
    ]


# ------------------------------------------------------------------------------------------- what is refused, and why

RAW = "a camera's raw data: export it as JPEG or TIFF"
REFUSED = {
    "CR3": (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", RAW),
    "RAF": (b"FUJIFILMCCD-RAW 0201", RAW),
    "ORF": (b"IIRO\x08\0\0\0", RAW),
    "RW2": (b"IIU\0\x18\0\0\0", RAW),
    "X3F": (b"FOVb\2\0\0\0", RAW),
    "MRW": (b"\0MRM\0\0\0\0", RAW),
    "CR2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), RAW),
    "PEF": (b"MM\0*\0\0\0\x08" + bytes(99), f"a TIFF of a kind that is not read, or {RAW}"),
    "SVG": (
        b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='http://www.w3.org/2000/svg'/>",
        "not an image of pixels but SVG",
    ),
    "PSD": (b"8BPS\0\1", "a Photoshop file"),
    "PDF": (b"%PDF-1.7\n", "not an image but a PDF"),
    "MP4": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "not an image but a video"),
    "MKV": (b"\x1aE\xdf\xa3", "not an image but a video"),
    "JPEG XL": (b"\xff\x0a", "JPEG XL is not read"),
    "DICOM": (bytes(128) + b"DICM", "DICOM leaves open"),
    "EXR": (b"v/1\x01", "OpenEXR leaves open"),
    "ZIP": (b"PK\x03\x04", "not an image but an archive"),
    "HTML": (b"\n<!DOCTYPE html><html>404", "not an image but a web page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not an image but what Git LFS leaves"),
    "damaged AVIF": (b"\0\0\0\x14ftypavif\0\0\0\0avif", "not an image, or of an unsupported format$"),
    "text": (b"hello", "not an image, or of an unsupported format$"),
}
THUMBNAIL = {254: ("I", [1])}  # NewSubfileType: a smaller version of another image
DEEPER = {330: ("I", [8])}  # SubIFDs: where that one is
DNG = {50706: ("B", [1, 4, 0, 0])}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_says_what_it_is_and_what_to_do(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(RefusedImage, match=f"^{reason}"):
        decode_pixels(data)


def test_raw_data_is_never_taken_for_the_thumbnail_that_it_begins_with(tmp_path: Path) -> None:
    """TIFF/EP, DNG 1.7. A pyramid, whose first image is the largest, and pages of which the first is small stay what they are."""
    small = samples(3, 255)
    for number, more in enumerate((DNG, DNG | THUMBNAIL, THUMBNAIL | DEEPER)):
        data = tiff(small, 8, 2, more=more)
        (tmp_path / f"{number}.nef").write_bytes(data)
        with pytest.raises(RefusedImage, match=f"^{RAW}"):
            decode_pixels(data)
        assert was_misread(tmp_path / f"{number}.nef", revision=1)
    for more in (None, THUMBNAIL, DEEPER):
        np.testing.assert_array_equal(decode_pixels(tiff(small, 8, 2, more=more)), small)


# ------------------------------------------------------------------------------------- what earlier versions misread


def test_what_was_misread_is_known_by_its_header(tmp_path: Path) -> None:
    """All rows of the table that came out as another picture before, and no photograph."""
    one, rgb = samples(1, 255), samples(3, 255)
    deep = samples(3, 65535)
    clear = chunk(b"tRNS", bytes(6))
    tga = next(entry for entry in formats.tgas() if "32 alpha 0" in entry.name).data
    opaque = next(entry for entry in formats.tgas() if "32 alpha 8" in entry.name).data
    files = {
        "a.png": (png(deep, 16, 2, clear), True),
        "b.tif": (tiff(samples(1, 65535), 16, 0), True),
        "c.tiff": (tiff(samples(1, 4095), 12, 1), True),
        "d.tif": (tiff(one - 128, 8, 1, kind="i"), True),
        "e.tga": (tga, True),
        "no suffix": (tga, True),
        "f.png": (png(deep, 16, 2), False),
        "g.png": (png(rgb, 8, 2, clear), False),
        "h.tif": (tiff(samples(1, 65535), 16, 1), False),
        "i.tga": (opaque, False),
        "j.jpg": (saved(rgb.astype(np.uint8), "JPEG"), False),
        "k.bmp": (saved(rgb.astype(np.uint8), "BMP"), False),
        "gone.tif": (b"II*\0", True),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    assert {name: was_misread(tmp_path / name) for name in files} == {name: known for name, (_, known) in files.items()}
    later = {name for name in files if was_misread(tmp_path / name, revision=1)}  # what cannot be read counts each time
    assert later == {"d.tif", "gone.tif"}
