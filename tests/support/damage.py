"""Damaged, malicious and odd images, each with what must become of it.

In: the intact ones of ``corpus``, or a seed. Out: ``Case``s.
"""

import dataclasses
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from corpus import Array, Case, chunk, grey_as_rgb, packed, picture, png, saved, tiff
from PIL import Image


def cut(case: Case, rng: np.random.Generator, how: int) -> Case:
    """The file ends too early: anywhere, near its end, near its beginning, or with its format's end mark put back."""
    n = len(case.data)
    at = [int(rng.integers(1, n)), n - int(rng.integers(1, min(40, n))), int(rng.integers(1, min(n, 60)))][how % 3]
    data = case.data[:at]
    name = f"{case.name} cut at {at} of {n}"
    if how >= 3:
        data, name = with_end(case.data, at), name + ", ended"
    return dataclasses.replace(case, name=name, data=data, fate="cut", whole=case.data, at=at)


def with_end(data: bytes, at: int) -> bytes:
    """``data`` up to ``at``, and then whatever ends a file of its format, so that it looks whole."""
    short = data[:at]
    if data.startswith(b"\xff\xd8"):
        return short + b"\xff\xd9"
    if data.startswith(b"\x89PNG"):
        return _sealed(short) + chunk(b"IEND", b"")
    if data.startswith(b"GIF8"):
        return short + b"\0;"
    if data.startswith((b"\0\0\0\x0c", b"\xff\x4f\xff\x51")):
        return short + b"\xff\xd9"
    return short


def _sealed(short: bytes) -> bytes:
    """A PNG that was cut off within a chunk, that chunk made whole again: right length, right checksum."""
    at = 8
    while at + 12 <= len(short) and at + 12 + int.from_bytes(short[at : at + 4], "big") <= len(short):
        at += 12 + int.from_bytes(short[at : at + 4], "big")
    return short[:at] + (chunk(short[at + 4 : at + 8], short[at + 8 :]) if len(short) > at + 8 else b"")


def flipped(case: Case, rng: np.random.Generator) -> Case:
    """One to three bits are the other way round; a PNG's checksums notice."""
    data = bytearray(case.data)
    for bit in rng.integers(0, 8 * len(data), int(rng.integers(1, 4))).tolist():
        data[bit // 8] ^= 1 << bit % 8
    fate = "cut" if case.suffix == ".png" else "any"
    return dataclasses.replace(case, name=f"{case.name} flipped", data=bytes(data), fate=fate)


def holed(case: Case, rng: np.random.Generator) -> Case:
    """Some bytes are gone, or zero, or noise."""
    n = len(case.data)
    at = int(rng.integers(0, n))
    stop = min(n, at + int(rng.integers(1, 1 + max(1, n // 3))))
    middle = [b"", bytes(stop - at), rng.bytes(stop - at)][int(rng.integers(3))]
    data = case.data[:at] + middle + case.data[stop:]
    return dataclasses.replace(case, name=f"{case.name} {at} to {stop} replaced", data=data, fate="any")


def followed(case: Case, rng: np.random.Generator, other: Case) -> Case:
    """Behind the image stands something else: noise, zeros, or another image."""
    tail = [rng.bytes(200), bytes(3000), other.data][int(rng.integers(3))]
    # These end where they say; the others are read up to the end of the file, and may mind.
    fate = "embedded" if case.suffix in (".jpg", ".png", ".gif", ".bmp") else "cut"
    return dataclasses.replace(case, name=f"{case.name} followed", data=case.data + tail, fate=fate)


def damaged(cases: list[Case], count: int, seed: int) -> list[Case]:
    """``count`` of them, damaged in one way each."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        case, other = (cases[index] for index in rng.integers(0, len(cases), 2).tolist())
        way = number % 10
        if way < 6:
            found.append(cut(case, rng, way))
        else:
            found.append([flipped, flipped, holed][way - 6](case, rng) if way < 9 else followed(case, rng, other))
    return found


# ---------------------------------------------------------------------------------------- odd ones, one by one


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    """A JPEG with this behind ``Exif``, whatever it is."""
    body = b"Exif\0\0" + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def _entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


def odd_exif(rgb: Array) -> Iterator[Case]:
    """Metadata that makes no sense says nothing about the pixels: they stay as they are."""
    head = b"II*\0\x08\0\0\0"
    loop = struct.pack("<H", 1) + _entry(0x8769, 4, 1, 8) + struct.pack("<I", 8)
    many = struct.pack("<H", 4000) + b"".join(_entry(0x8769 + k % 2, 4, 1, 8) for k in range(4000)) + b"\x08\0\0\0"
    kinds = {
        "empty": b"",
        "noise": bytes(range(200)),
        "cut": head + b"\x05",
        "loop": head + loop,
        "many": head + many,
        "far": b"II*\0" + struct.pack("<I", 2**32 - 2),
        "huge count": head + struct.pack("<H", 1) + _entry(0x0112, 3, 2**31, 0) + bytes(4),
        "pointer out": head + struct.pack("<H", 1) + _entry(0x010F, 2, 2**20, 2**31) + bytes(4),
        "no such type": head + struct.pack("<H", 1) + _entry(0x0112, 99, 1, 6) + bytes(4),
        "text": head + struct.pack("<H", 1) + _entry(0x0112, 2, 2, 0x36) + bytes(4),
        "no value": head + struct.pack("<H", 1) + _entry(0x0112, 3, 0, 6) + bytes(4),
        **{f"value {v}": head + struct.pack("<H", 1) + _entry(0x0112, 3, 1, v) + bytes(4) for v in (0, 9, 65535)},
    }
    jpeg, alike = saved(rgb, "JPEG", quality=95, subsampling=0), saved(rgb, "PNG")
    for name, exif in kinds.items():
        yield Case(f"jpg exif {name}", with_exif(jpeg, exif), rgb, 4)
        yield Case(f"png exif {name}", alike[:33] + chunk(b"eXIf", exif) + alike[33:], rgb)


def bombs(rgb: Array) -> Iterator[Case]:
    """Small files that ask for much: time, memory, or both."""
    blown = zlib.compress(bytes(60_000_000))
    for kind, head in ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")):
        yield Case(f"png {kind.decode()} bomb", png(rgb, 8, 2, chunk(kind, head + blown)), rgb)  # never inflated
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + blown)  # which may say how to turn the picture
    yield Case("png XMP bomb", png(rgb, 8, 2, xmp), fate="refused", reason="large")
    rows = packed(rgb, 8)
    more = chunk(b"IDAT", zlib.compress(rows + bytes(60_000_000)))
    whole = png(rgb, 8, 2)
    yield Case("png IDAT bomb", whole[:33] + more + chunk(b"IEND", b""), rgb)
    for width, height in ((100_000, 100_000), (1, 2**31 - 1), (2**31 - 1, 1), (200_000_000, 1)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        yield Case(f"png {width}x{height}", whole[:8] + header + whole[33:], fate="refused", reason="too large")
        size = {256: ("I", [width]), 257: ("I", [height])}
        yield Case(f"tif {width}x{height}", tiff(rgb, more=size), fate="refused", reason="too large")
        yield Case(f"ppm {width}x{height}", b"P6 %d %d 255\n" % (width, height), fate="refused", reason="too large")
    for edge in (16_000, 65_535):
        screen = struct.pack("<HHBBB", 10, 10, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, edge, edge, 0)
        yield Case(f"gif {edge}", b"GIF89a" + screen + b"\x08\0;", fate="refused", reason="too large")
    yield Case("jpg 65500", _resized(saved(rgb, "JPEG"), 65_500), fate="refused", reason="too large")
    yield Case("tif pages", tiff(rgb, rows=5, pages=3000), rgb)
    strips = {256: ("I", [1]), 257: ("I", [20_000_000]), 278: ("I", [1])}
    yield Case("tif strips", tiff(rgb, rows=5, more=strips), fate="refused", reason="strips or tiles for")
    yield Case("tif strips deflated", tiff(rgb, rows=5, compression=8, more=strips), fate="refused", reason="damaged")
    yield Case("jpg scans", _scans(saved(rgb, "JPEG", progressive=True), 600), fate="refused", reason="scans")
    frames = [Image.new("L", (8, 8), number % 256) for number in range(400)]
    still = saved(rgb[..., 0].copy(), "GIF", save_all=True, append_images=frames)
    yield Case("gif frames", still, grey_as_rgb(rgb[..., 0]))


def _resized(jpeg: bytes, edge: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", edge, edge) + jpeg[at + 4 :]


def _scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes ``count`` times more."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * count + jpeg[-2:]


def impostors(rgb: Array) -> Iterator[Case]:
    """Files that look like images, up to a point."""
    texts = {"jpg text": b"hello", "png zeros": bytes(5000), "gif html": b"<html><body>404 not found</body></html>"}
    texts |= {"jpg eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "png svg": b"<svg xmlns='x'/>"}
    texts |= {"jpg signature": b"\xff\xd8\xff", "png signature": b"\x89PNG\r\n\x1a\n", "webp riff": b"RIFF\0\0\0\0WEBP"}
    for name, data in texts.items():
        yield Case(name, data, fate="refused", reason="not an image|damaged")
    yield Case("jpg empty", b"", fate="refused", reason="empty")
    floats = saved(rgb[..., 0].astype(np.float32), "TIFF")
    yield Case("tif float", floats, fate="refused", reason="no defined range")
    for name, kind in (("jpg is png", "PNG"), ("png is bmp", "BMP"), ("gif is tif", "TIFF"), ("webp is tga", "TGA")):
        yield Case(name, saved(rgb, kind), rgb)
    large = np.dstack([np.kron(rgb[:16, :16], np.ones((8, 8, 1), np.uint8)), np.full((128, 128), 255, np.uint8)])
    icon = saved(large, "ICO", bitmap_format="bmp", sizes=[(128, 128)])  # its size, read as a TGA's depth, would do
    yield Case("ico that could be a tga", icon, large[..., :3])


def missing(rgb: Array) -> Iterator[Case]:
    """Well-formed files that hold too few pixels."""
    height, width = rgb.shape[:2]
    body = packed(rgb, 8)
    line = len(body) // height
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    for rows in (1, height // 2, height - 1):
        pixels = chunk(b"IDAT", zlib.compress(body[: rows * line]))
        data = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
        yield Case(f"png {rows} of {height} rows", data, fate="refused", reason="damaged")
    wrong = bytearray(png(rgb, 8, 2))
    wrong[-13] ^= 1
    yield Case("png wrong checksum", bytes(wrong), fate="refused", reason="checksum")
    for order in "<>":
        for omit in (1, 3):
            for how in ({"rows": 4}, {"tile": 16}):
                for compression in (1, 8):
                    data = tiff(rgb, order=order, omit=omit, compression=compression, **how)
                    name = f"tif {order} {how} {compression} without {omit}"
                    yield Case(name, data, fate="refused", reason="damaged")
    nowhere = {273: ("I", [0] * -(-height // 4))}
    yield Case("tif nowhere", tiff(rgb, rows=4, more=nowhere), fate="refused", reason="lie nowhere")


def odd(seed: int) -> list[Case]:
    """Everything that is neither intact nor damaged by chance."""
    rng = np.random.default_rng(seed)
    rgb = picture(rng, int(rng.integers(17, 45)), int(rng.integers(17, 45)))
    return [*odd_exif(rgb), *bombs(rgb), *impostors(rgb), *missing(rgb)]
