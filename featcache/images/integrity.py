"""Load an image's pixels only if they are all there: Pillow fills up some kinds of missing ones with grey or black.

In: an image that Pillow has opened, and the file's bytes. Out: the image, loaded, or ``DamagedImage``.

JPEG: see ``jpegs``. PNG: Pillow passes over the checksums of the pixel data, and over data that ends with a row; it also
leaves a transparent grey of few bits unscaled, which is mended on the way. TIFF: over strips or tiles that are not listed,
or lie nowhere. The other formats it refuses itself when something is missing.

What goes unnoticed: damage to lossy data without a checksum (WebP, AVIF, JPEG 2000) and to raw pixels (BMP, TGA, PNM, TIFF)
that leaves as many bytes as there should be; in a plain PNM, a last number that lost digits; in the PNG inside an ICO and in
JPEG data inside a TIFF, whatever Pillow passes over.
"""

import struct
import zlib
from typing import Any

from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from featcache.images.jpeg import DamagedImage, load_jpeg

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, steps


def load_whole(image: Image.Image, data: bytes) -> None:
    """``image.load()``, but raising DamagedImage instead of inventing pixels; other errors are Pillow's own."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        load_jpeg(image, data)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)
        image.load()
    elif isinstance(image, PngImagePlugin.PngImageFile):
        _load_png(image, data)
    else:
        image.load()


def _load_png(image: PngImagePlugin.PngImageFile, data: bytes) -> None:
    if any(extents != (0, 0, *image.size) for _, extents, _, _ in image.tile):
        raise DamagedImage("first frame of the PNG does not cover it")
    clear = image.info.get("transparency")
    if isinstance(clear, int) and image.tile:  # grey of 2 or 4 bits is scaled to 8 bits everywhere but here
        image.info["transparency"] = {"L;2": 85 * (clear & 3), "L;4": 17 * (clear & 15)}.get(
            str(image.tile[0][3]), clear
        )
    interlaced = bool(image.info.get("interlace"))
    pieces = _pixel_data(data)
    image.load()
    # A row that was never written is zero: only then is it worth inflating everything a second time.
    if interlaced or image.crop((0, image.height - 1, *image.size)).getbbox() is None:
        _check_length(data, pieces)


def _check_tiff(image: Any) -> None:
    """Of uncompressed pixels Pillow reads what is listed; of compressed ones, libtiff insists on all."""
    if image.use_load_libtiff:
        return
    width, height = image._tile_size
    planes = len(image.getbands()) if image._planar_configuration == 2 else 1
    covered = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), _, _ in image.tile)
    if covered < width * height * planes:
        raise DamagedImage(f"TIFF lists strips or tiles for {covered} of {width * height * planes} pixels")
    if any(offset < 8 for _, _, offset, _ in image.tile):
        raise DamagedImage("TIFF lists strips or tiles that lie nowhere")


def _pixel_data(data: bytes) -> list[memoryview]:
    """What the IDAT chunks of a PNG hold. Raises DamagedImage where a checksum is wrong."""
    view, found, at = memoryview(data), [], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            if at + 12 + length > len(data):
                break  # cut off: Pillow says so, unless only the checksum is missing
            if zlib.crc32(view[at + 4 : at + 8 + length]) != int.from_bytes(data[at + 8 + length : at + 12 + length]):
                raise DamagedImage("wrong checksum of PNG pixel data")
            found.append(view[at + 8 : at + 8 + length])
        elif kind == b"IEND":
            break
        at += 12 + length
    return found


def _check_length(data: bytes, pieces: list[memoryview]) -> None:
    """Raise DamagedImage if the chunks inflate to fewer bytes than the PNG's header promises."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in passes)
    wanted = sum(h * (1 + -(-w * depth * _CHANNELS[colour] // 8)) for w, h in sizes if w > 0 and h > 0)
    inflate, got = zlib.decompressobj(), 0
    for piece in pieces:
        rest: bytes | memoryview = piece
        while rest and got < wanted and not inflate.eof:
            got += len(inflate.decompress(rest, 1 << 20))
            rest = inflate.unconsumed_tail
    got += len(inflate.flush()) if got < wanted else 0
    if got < wanted:
        raise DamagedImage(f"PNG holds {got} of {wanted} bytes of pixels")
