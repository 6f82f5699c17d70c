"""HEIC and its relatives: the one door to pillow-heif, and whether all pixels are there, on which libheif does not insist.

In: a file's bytes. Out: an opened image, or ``RefusedImage``. libheif turns and mirrors the picture as the file's own properties
say, of which the Exif orientation is a copy that pillow-heif takes away; it takes the primary image of several, and shifts 10 and
12 bits to 8. Of a cut-off grid of tiles, which is what phones write, it makes up the tiles that are missing.

What goes unnoticed: damage that leaves as many bytes as there should be, other than zeros, as in other lossy formats.

Sources: ISO/IEC 14496-12, 8.11 (items and where they lie); ISO/IEC 23008-12 (HEIF); ITU-T H.265, 7.4.2 (what no NAL unit holds).
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import Any

from PIL import Image

from featcache.errors import RefusedImage

_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"}
_NEVER = re.compile(rb"\0\0[\0-\2]")  # in a NAL unit; a hole that was filled with zeros is full of it
_CUT = "damaged: HEIF data ends before the last pixel"


def is_heif(data: Any) -> bool:
    """Whether a file says that it is HEIF, and not AVIF, which Pillow reads itself."""
    if data[4:8] != b"ftyp":
        return False
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, min(int.from_bytes(data[:4], "big"), 256), 4))}
    return bool(brands & _BRANDS) and not brands & {b"avif", b"avis"}


def open_heif(data: bytes) -> Image.Image:
    """A Pillow image, not loaded yet. Raises RefusedImage: pillow-heif is missing. Otherwise what libheif raises."""
    try:
        from pillow_heif import HeifImageFile

        image: Image.Image = HeifImageFile(io.BytesIO(data))  # Pillow's own list of formats stays as it is
        return image
    except ImportError as error:
        raise RefusedImage("HEIC needs pillow-heif, which is not installed: pip install 'featcache[heif]'") from error
    except SyntaxError as error:  # also for what it does not support
        if {kind for kind, _, _ in _boxes(data, 0)} & {b"meta", b"moov"} == {b"moov"}:
            raise RefusedImage("an image sequence without a still image: export its pictures as JPEG or PNG") from error
        raise


def check_whole(data: bytes) -> None:
    """Raise RefusedImage unless every item of the file lies in it, and those of HEVC are made of whole NAL units."""
    meta = next((data[start + 4 : end] for kind, start, end in _boxes(data, 0) if kind == b"meta"), b"")
    found = {kind: meta[start:end] for kind, start, end in _boxes(meta, 0)}
    kinds, sizes = _kinds_of_items(found.get(b"iinf", b"")), set()
    properties = next((box for kind, *box in _boxes(found.get(b"iprp", b""), 0) if kind == b"ipco"), None)
    if properties:
        inside = found[b"iprp"][slice(*properties)]
        sizes = {1 + (inside[start + 21] & 3) for kind, start, _ in _boxes(inside, 0) if kind == b"hvcC"}
    read = 0
    for item, method, extents in _items(found.get(b"iloc", b"")):
        source = {0: data, 1: found.get(b"idat", b"")}.get(method)
        if source is None:  # made of other items
            continue
        if any(start + length > len(source) for start, length in extents):
            raise RefusedImage(_CUT)
        read += sum(length for _, length in extents)
        if read > 4 * len(data):  # which would take too long
            raise RefusedImage("damaged: HEIF items lie upon each other")
        if kinds.get(item) == b"hvc1" and len(sizes) == 1:
            _check_units(b"".join(source[start : start + length] for start, length in extents), *sizes)


def _check_units(stream: bytes, size: int) -> None:
    """``stream``: NAL units, each after its length in ``size`` bytes."""
    at = 0
    while at < len(stream):
        start = at + size
        at = start + int.from_bytes(stream[at:start], "big")
        if at <= start or at > len(stream):
            raise RefusedImage(_CUT)
        if _NEVER.search(stream, start, at):
            raise RefusedImage("damaged: HEIF data has a hole in its pixels")


def _boxes(data: bytes, at: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of what the boxes hold that follow each other from ``at`` on."""
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        start = at + (16 if size == 1 else 8)
        end = at + int.from_bytes(data[at + 8 : start], "big") if size == 1 else at + size if size else len(data)
        if end < start:
            raise RefusedImage("damaged: HEIF box of an impossible size")
        yield kind, start, min(end, len(data))
        at = end


def _kinds_of_items(iinf: bytes) -> dict[int, bytes]:
    """Item -> its type."""
    kinds = {}
    for _, start, _ in _boxes(iinf, 6 if iinf[:1] == b"\0" else 8):
        wide = iinf[start] > 2
        kinds[int.from_bytes(iinf[start + 4 : start + (8 if wide else 6)], "big")] = iinf[start + 8 + 2 * wide :][:4]
    return kinds


def _items(iloc: bytes) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Of each item its number, where it lies (0: the file, 1: ``idat``), and start and length of its pieces there."""
    fields, version = io.BytesIO(iloc[4:]), iloc[:1]  # of which libheif has counted items and pieces

    def number(size: int) -> int:
        if len(found := fields.read(size)) < size:
            raise RefusedImage("damaged: HEIF does not say where its items lie")
        return int.from_bytes(found, "big")

    of_offset, of_length, of_base, of_index = (digit for byte in fields.read(2) for digit in divmod(byte, 16))
    wide = 4 if version == b"\2" else 2
    for _ in range(number(wide)):
        item, method = number(wide), number(2) & 15 if version > b"\0" else 0
        base = (number(2), number(of_base))[1]
        extents = []
        for _ in range(number(2)):
            number(of_index if version > b"\0" else 0)
            extents.append((base + number(of_offset), number(of_length)))
        yield item, method, extents
