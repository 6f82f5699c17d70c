"""What the header of an image file says: format, mode, size as shown. In: a file. Out: ``Header``, or ``RefusedImage``.

No pixel is decoded, and of JPEGs and PNGs, which most are, no more is read than it takes. The content decides what a file is,
never its name. A file whose header cannot be read this way is read whole, the way ``decode`` does, so that both refuse the same
headers for the same reasons.

Sources: JPEG ITU-T T.81, B.1 (markers); PNG ISO 15948, 5 (chunks).
"""

import contextlib
import io
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from featcache.errors import RefusedImage
from featcache.images.archives import archive_in, read_member
from featcache.images.decode import MAX_PIXELS, guarded, open_image
from featcache.images.formats import orientation, plain_png, reading_of
from featcache.images.read import open_regular, read_file

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND\xaeB`\x82"
_MOST_CHUNKS = 10_000  # of a PNG that is walked through chunk by chunk
_TAIL = 64  # bytes behind the end of a JPEG that are tolerated


class Header(NamedTuple):
    """One image.

    Attributes:
        format, mode: as Pillow calls them. width, height: in pixels, as shown, EXIF orientation applied.
        turned: whether that orientation is another than upright. bytes: of the file.
        ends: whether the file ends as its format says; of JPEG and PNG only, others count as if they did.
    """

    format: str
    mode: str
    width: int
    height: int
    turned: bool
    bytes: int
    ends: bool = True


def read_header(path: Path) -> Header:
    """The header of one file. Called inside of ``strict_decoding``. Raises RefusedImage, as ``decode`` would."""
    if inside := archive_in(path):
        data = read_member(*inside)[0]
        with contextlib.suppress(Exception):
            if (found := _quick(io.BytesIO(data), len(data))) is not None:
                return found
        return header_of(data)
    with open_regular(path) as (file, status), contextlib.suppress(Exception):  # nearly anything: then read it whole
        if (found := _quick(file, status.st_size)) is not None:
            return found
    return header_of(read_file(path)[0])


def header_of(data: bytes) -> Header:
    """The header of a file's content; ``ends`` is not looked at. Called inside of ``strict_decoding``. Raises RefusedImage."""
    size = len(data)
    with guarded(data, None), open_image(data := plain_png(data)) as image:
        header = _header(image, size)
        reading_of(image, data)
        return header


def _quick(file: BinaryIO, size: int) -> Header | None:
    """Of a JPEG or a PNG; None for others. Raises nearly anything."""
    start = file.read(8)
    if start.startswith(_JPEG):
        file.seek(max(size - _TAIL, 0))
        ends = b"\xff\xd9" in file.read()
        file.seek(0)
        with Image.open(file, formats=("JPEG",)) as image:
            return _header(image, size)._replace(ends=ends)
    if start == _PNG:
        outline, ends = _without_pixels(file, size)
        with Image.open(io.BytesIO(plain_png(outline)), formats=("PNG",)) as image:
            # Pillow would load the pixels to see whether EXIF data follows them. Here nothing can.
            image.info.setdefault("exif", None)
            return _header(image, size)._replace(ends=ends)
    return None


def _header(image: Any, size: int) -> Header:
    if image.width * image.height > MAX_PIXELS:
        raise RefusedImage(f"too large: {image.width}x{image.height} pixels, at most {MAX_PIXELS} are decoded")
    turned, (width, height) = orientation(image), image.size
    if turned > 4 and image.format != "TIFF":  # of which Pillow gives the size as shown
        width, height = height, width
    return Header(image.format, image.mode, width, height, turned > 1, size)


def _without_pixels(file: BinaryIO, size: int) -> tuple[bytes, bool]:
    """A PNG whose pixel data is left out, read from behind its signature on, and whether it has an end. Raises ValueError."""
    kept, at = [_PNG], len(_PNG)
    for _ in range(_MOST_CHUNKS):
        length, kind = struct.unpack(">I4s", head) if len(head := file.read(8)) == 8 else (0, b"")
        if not kind or at + 12 + length > size:
            return b"".join([*kept, _END]), False  # with which Pillow reads its header all the same
        at += 12 + length
        if kind in (b"IDAT", b"fdAT"):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        kept += [head, file.read(length + 4)]
        if kind == b"IEND":
            return b"".join(kept), True
    raise ValueError("too many chunks")
