"""Load an image only if all of its pixels are there: Pillow shows some kinds of missing ones in grey or black.

In: an image that Pillow has opened, and the file's bytes. Out: the image, loaded, or ``RefusedImage``.

- JPEG: see ``jpeg``. HEIF: see ``heif``.
- PNG: Pillow ignores the checksums of the pixel data, and rows that are missing at the end. It also leaves a transparent
  grey of 2 or 4 bits unscaled, which is mended here.
- TIFF: Pillow ignores that strips or tiles are not listed, or lie nowhere.
- Of the other formats Pillow itself refuses what is incomplete.

What goes unnoticed:
- damage that leaves as many bytes as there should be, to lossy data without a checksum (WebP, AVIF, HEIF, JPEG 2000) and to raw
  pixels (BMP, TGA, PNM, TIFF);
- in a plain PNM, a last number that lost digits;
- in the PNG inside of an ICO and in JPEG data inside of a TIFF, whatever Pillow ignores.
"""

import struct
import zlib
from typing import Any

from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from featcache.errors import RefusedImage
from featcache.images.heif import check_whole
from featcache.images.jpeg import load_jpeg

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
# Of the seven passes of an interlaced PNG: x and y of the first pixel, steps to the next ones.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def load_whole(image: Image.Image, data: bytes) -> None:
    """Load as ``image.load()`` does, but raise RefusedImage instead of inventing pixels. Other errors are Pillow's."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        load_jpeg(image, data)
    elif isinstance(image, PngImagePlugin.PngImageFile):
        _load_png(image, data)
    else:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image)
        elif image.format == "HEIF":
            check_whole(data)
        image.load()


def _load_png(image: PngImagePlugin.PngImageFile, data: bytes) -> None:
    if any(extents != (0, 0, *image.size) for _, extents, _, _ in image.tile):
        raise RefusedImage("damaged: first frame of the PNG does not cover it")
    clear = image.info.get("transparency")
    if isinstance(clear, int) and image.tile:  # grey of 2 or 4 bits is scaled to 8 bits everywhere but here
        scaled = {"L;2": 85 * (clear & 3), "L;4": 17 * (clear & 15)}
        image.info["transparency"] = scaled.get(str(image.tile[0][3]), clear)
    interlaced = bool(image.info.get("interlace"))
    pieces = _pixel_data(data)
    image.load()
    # A row that was never written is zero: only then is it worth inflating everything a second time.
    if interlaced or image.crop((0, image.height - 1, *image.size)).getbbox() is None:
        _check_length(data, pieces)


def _check_tiff(image: Any) -> None:
    """Raise RefusedImage if uncompressed pixels are not all listed. Of compressed ones libtiff insists on all."""
    if image.use_load_libtiff:
        return
    width, height = image._tile_size
    planes = len(image.getbands()) if image._planar_configuration == 2 else 1
    covered = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), _, _ in image.tile)
    if covered < width * height * planes:
        raise RefusedImage(f"damaged: TIFF lists strips or tiles for {covered} of {width * height * planes} pixels")
    if any(offset < 8 for _, _, offset, _ in image.tile):
        raise RefusedImage("damaged: TIFF lists strips or tiles that lie nowhere")


def _pixel_data(data: bytes) -> list[memoryview]:
    """Return what the IDAT chunks of a PNG hold. Raises RefusedImage where a checksum is wrong."""
    view, found, at = memoryview(data), [], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            if at + 12 + length > len(data):
                break  # cut off: Pillow says so, unless only the checksum is missing
            if zlib.crc32(view[at + 4 : at + 8 + length]) != int.from_bytes(data[at + 8 + length : at + 12 + length]):
                raise RefusedImage("damaged: wrong checksum of PNG pixel data")
            found.append(view[at + 8 : at + 8 + length])
        elif kind == b"IEND":
            break
        at += 12 + length
    return found


def _check_length(data: bytes, pieces: list[memoryview]) -> None:
    """Raise RefusedImage if the chunks inflate to fewer bytes than the PNG's header promises."""
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
        raise RefusedImage(f"damaged: PNG holds {got} of {wanted} bytes of pixels")
