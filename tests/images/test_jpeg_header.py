"""A header read without Pillow says what Pillow says, and of nothing that Pillow refuses."""

import io
import random
import struct
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from corpus import exif_of, saved
from PIL import Image

from featcache.errors import RefusedImage
from featcache.images.decode import decode, decode_pixels, fast_jpeg, strict_decoding
from featcache.images.formats import orientation
from featcache.images.jpeg_header import read_jpeg_header

NOISE = np.random.default_rng(1).integers(0, 256, (19, 27, 3), dtype=np.uint8)


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    return saved(NOISE, "JPEG", mode, **options)


def segment(kind: int, content: bytes, *, length: int | None = None) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(content) + 2 if length is None else length) + content


def behind_soi(data: bytes, *more: bytes) -> bytes:
    return data[:2] + b"".join(more) + data[2:]


def tiff(*entries: tuple[int, int, int, bytes], order: str = "<", rest: bytes = b"", first: int = 8) -> bytes:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", first)
    table = b"".join(struct.pack(order + "HHL", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0" + head + struct.pack(order + "H", len(entries)) + table + bytes(4) + rest


def camera(value: int, order: str = "<") -> bytes:
    """EXIF as a camera writes it: texts and fractions lie behind the table."""
    short = struct.pack(order + "HH", value, 0)
    places = [struct.pack(order + "L", 8 + 2 + 4 * 12 + 4 + more) for more in (0, 8)]
    entries = (0x010F, 2, 8, places[0]), (0x0112, 3, 1, short), (0x011A, 5, 1, places[1])
    unit = (0x0128, 3, 1, struct.pack(order + "HH", 2, 0))
    return tiff(*entries, unit, order=order, rest=b"Camera!\0" + struct.pack(order + "LL", 72, 1))


XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="
USUAL = {
    **{f"subsampling {way}": jpeg(subsampling=way) for way in range(3)},
    "grey": jpeg("L"),
    "progressive": jpeg(progressive=True),
    "restarts": jpeg(restart_marker_rows=1),
    "one table": jpeg(qtables=[[3] * 64]),
    "comment": jpeg(comment=b"anything"),
    "colour profile": jpeg(icc_profile=bytes(3000)),
    "resolution": jpeg(dpi=(300, 300)),
    "other applications": behind_soi(jpeg(), segment(0xEC, b"Ducky"), segment(0xE5, b""), segment(0xE1, b"anything")),
    "Adobe": behind_soi(jpeg(), segment(0xEE, b"Adobe\0\x64\0\0\0\0\1")),
    **{f"Pillow's EXIF {value}": jpeg(exif=exif_of(value)) for value in (0, 1, 3, 6, 8, 9)},
    **{f"EXIF {v} {o}": behind_soi(jpeg(), segment(0xE1, camera(v, o))) for v in range(10) for o in "<>"},
    "EXIF before XMP": behind_soi(jpeg(), segment(0xE1, XMP + b'"6"'), segment(0xE1, camera(1))),
    "XMP": behind_soi(jpeg(), segment(0xE1, XMP[:40])),
}
UNUSUAL = {
    "CMYK": jpeg("CMYK"),
    "filled": behind_soi(jpeg(), b"\xff\xff"),
    "junk": behind_soi(jpeg(), b"junk"),
    "escaped": behind_soi(jpeg(), b"\xff\0"),
    "12 bits": jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "arithmetic": jpeg().replace(b"\xff\xc0", b"\xff\xc9"),
    "no height": jpeg().replace(b"\xff\xc0\0\x11\x08\0\x13", b"\xff\xc0\0\x11\x08\0\0"),
    "two frames": jpeg().replace(b"\xff\xc0", jpeg()[jpeg().index(b"\xff\xc0") :][:19] + b"\xff\xc0", 1),
    "more than the frame": jpeg().replace(b"\xff\xc0\0\x11", b"\xff\xc0\0\x12"),
    "short JFIF": behind_soi(jpeg(), segment(0xE0, b"JFIF\0")),
    "short Adobe": behind_soi(jpeg(), segment(0xEE, b"Adobe\0")),
    "short profile": behind_soi(jpeg(), segment(0xE2, b"ICC_PROFILE\0")),
    "length 0": behind_soi(jpeg(), segment(0xEC, b"", length=0)),
    "table cut off": behind_soi(jpeg(), segment(0xDB, bytes(64))),
    "table of 16 bits": behind_soi(jpeg(), segment(0xDB, b"\x10" + bytes(128))),
    "Photoshop": behind_soi(jpeg(), segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04")),
    "several pictures": behind_soi(jpeg(), segment(0xE2, b"MPF\0" + bytes(20))),
    "turned by XMP": behind_soi(jpeg(), segment(0xE1, XMP + b'"6"')),
    "turned by XMP, EXIF silent": behind_soi(jpeg(), segment(0xE1, XMP + b'"6"'), segment(0xE1, tiff())),
    "two EXIFs": behind_soi(jpeg(), segment(0xE1, camera(1)), segment(0xE1, camera(6))),
    "resolution as a text": behind_soi(jpeg(), segment(0xE1, tiff((0x0128, 3, 1, bytes(4)), (0x011A, 2, 1, bytes(4))))),
    "orientation as a long": behind_soi(jpeg(), segment(0xE1, tiff((0x0112, 4, 1, b"\6\0\0\0")))),
    "orientation twice": behind_soi(jpeg(), segment(0xE1, tiff(*[(0x0112, 3, 1, b"\6\0\0\0")] * 2))),
    "EXIF of nothing": behind_soi(jpeg(), segment(0xE1, b"Exif\0\0")),
    "EXIF elsewhere": behind_soi(jpeg(), segment(0xE1, tiff(first=2**31))),
    "EXIF cut off": behind_soi(jpeg(), segment(0xE1, camera(6)[:40])),
    "EXIF whose text lies outside": behind_soi(
        jpeg(), segment(0xE1, tiff((0x010F, 2, 99, b"\xff\0\0\0"), (0x0112, 3, 1, b"\6\0\0\0")))
    ),
    "EXIF with more texts than bytes": behind_soi(
        jpeg(), segment(0xE1, tiff(*[(tag, 2, 60, bytes(4)) for tag in range(4)], (0x0112, 3, 1, b"\6\0\0\0")))
    ),
    "header only": jpeg()[: jpeg().index(b"\xff\xda") + 6],
}  # fmt: skip


def check(data: bytes) -> bool:
    """Whether the header is read without Pillow: then Pillow must open it and find the same. Either way pixels stay the same."""
    header = read_jpeg_header(data)
    with strict_decoding(), warnings.catch_warnings():
        if header:
            warnings.simplefilter("error")  # not even that
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                assert image.format == "JPEG" and image.size == (header.width, header.height)
                assert image.mode == {3: "L", 9: "RGB"}[len(header.components)]
                assert orientation(image) == header.orientation
                assert ("progressive" in image.info) == header.is_progressive
                assert image.info.get("adobe_transform") == header.transform
                layers = [
                    (name, factors >> 4, factors & 15, table) for name, factors, table in threes(header.components)
                ]
                assert image.layer == layers
        warnings.simplefilter("ignore")
        found = outcome(data, decode_pixels)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("featcache.images.decode.read_jpeg_header", lambda _: None)
            assert outcome(data, decode_pixels) == found
    return header is not None


def outcome(data: bytes, way: Callable[[bytes], object]) -> bytes | str:
    try:
        return np.asarray(way(data)).tobytes()
    except RefusedImage as reason:
        return str(reason)


def threes(values: bytes) -> Iterator[tuple[int, int, int]]:
    return zip(values[0::3], values[1::3], values[2::3], strict=True)


@pytest.mark.parametrize("name", USUAL)
def test_usual_headers_are_read_as_pillow_reads_them(name: str) -> None:
    assert check(USUAL[name])
    assert outcome(USUAL[name], decode_pixels) == outcome(USUAL[name], decode)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_headers_are_left_to_pillow(name: str) -> None:
    assert not check(UNUSUAL[name])


def test_a_header_cut_off_anywhere_is_left_to_pillow() -> None:
    data = USUAL["EXIF 6 <"]
    end = data.index(b"\xff\xda") + 14  # of the scan's header
    assert not any(check(data[:length]) for length in range(end))


PARTS = (
    *(b"JFIF", b"JFIF\0\1", b"Exif\0\0", b"Exif\0\0II*\0", camera(6), camera(1, ">"), XMP, XMP + b'"3"', b"Adobe"),
    *(b"Adobe\0\x64\0\0\0\0\2", b"MPF\0", b"ICC_PROFILE\0\1", b"FPXR\0", b"Photoshop 3.0\0", b"8BIM\x03\xed", b""),
)


@pytest.mark.parametrize("seed", range(4))
def test_no_header_is_read_otherwise_than_by_pillow(seed: int) -> None:
    """Bytes changed, segments repeated, left out, exchanged and put in at random, by the number of the test."""
    chance, read = random.Random(seed), 0
    bases = [list(_segments(data)) for data in USUAL.values()]
    for _ in range(400):
        parts = list(chance.choice(bases))
        for _ in range(chance.choice((0, 1, 1, 2))):
            at = chance.randrange(1, len(parts))
            what = chance.randrange(4)
            if what == 0:
                parts.insert(at, chance.choice(parts[1:-1]))
            elif what == 1 and at < len(parts) - 1:
                del parts[at]
            elif what == 2:
                content = chance.choice(PARTS) + chance.randbytes(chance.choice((0, 0, 1, 7, 60)))
                parts.insert(
                    at, segment(chance.choice((*range(0xE0, 0xF0), 0xE0, 0xE1, 0xE2, 0xEE, 0xED, 0xFE, 0xDB)), content)
                )
            elif at < len(parts) - 1:
                changed = bytearray(parts[at])
                changed[chance.randrange(len(changed))] = chance.choice((0, 1, 2, 3, 6, 8, 255, chance.randrange(256)))
                parts[at] = bytes(changed)
        read += check(b"".join(parts))
    assert 100 < read < 390


def _segments(data: bytes) -> Iterator[bytes]:
    yield data[:2]
    at = 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at:end]
        at = end
    yield data[at:]


def test_pillow_opens_no_usual_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_jpeg()
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened by Pillow"))
    for name in ("subsampling 2", "grey", "progressive", "EXIF 1 >"):
        assert decode_pixels(USUAL[name]).shape == NOISE.shape
