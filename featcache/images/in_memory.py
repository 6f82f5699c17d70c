"""An image in memory as the bytes of a file, so that it goes the very way of files: one decoder, one table of conversions.

In: a PIL image or an array. Out: bytes that ``decode`` turns into the same picture, without loss.
"""

import contextlib
import threading

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from featcache.errors import RefusedImage
from featcache.images.decode import open_image
from featcache.images.formats import Reading, is_turned, to_rgb

Held = Image.Image | npt.NDArray[np.uint8]
_one_at_a_time = threading.Lock()  # a PIL image is loaded when it is used, and several threads may hold the same one


def as_file(image: Held) -> bytes:
    """The bytes of a file that shows ``image``.

    Of a PIL image that was opened and neither loaded nor changed since: of the file it was opened from, so that damage, the
    meaning of its samples and its digest are known. Of any other: its present pixels as PNM, upright by its EXIF data;
    what its loader made of a damaged file goes unnoticed.

    Args:
        image: uint8 (H, W), (H, W, 3) or, with alpha, (H, W, 4), channels in the order RGB; or a PIL image.

    Raises:
        RefusedImage: samples without a defined range, or a closed image. Otherwise nearly anything, as ``decode`` without its guard.
    """
    if isinstance(image, np.ndarray):
        return _pnm(
            image if image.shape[2:] in ((), (3,)) else np.asarray(to_rgb(Image.fromarray(image), Reading(), b""))
        )
    with _one_at_a_time:
        if (data := _opened_from(image)) is not None:
            return data
        _check_open(image)
        upright = ImageOps.exif_transpose(image) if is_turned(image) else image
        if not upright.mode.startswith("I;16"):
            return _pnm(np.asarray(to_rgb(upright, Reading(), b"")))
        samples = np.array(upright, np.uint16)
        samples[samples == upright.info.get("transparency", -1)] = 65535
        return _pnm(samples)


def _check_open(image: Image.Image) -> None:
    """Load the pixels. Raises RefusedImage: the image was closed; nearly anything else of a damaged one."""
    try:
        image.load()
    except ValueError as error:
        if "closed" in str(error):  # by its file or by Pillow, which say so in different words
            raise RefusedImage("the image was closed before it was read; give its path, or keep it open") from error
        raise


def _opened_from(image: Image.Image) -> bytes | None:
    """The file of an opened image, if nothing was done to it since; Pillow closes it when it loads the pixels."""
    file = getattr(image, "fp", None)
    with contextlib.suppress(Exception):  # of a kind that is not read here, or closed: its pixels then decide
        if file is not None and image.tell() == 0:
            before = file.tell()
            file.seek(0)
            data: bytes = file.read()
            file.seek(before)
            with open_image(data) as fresh:
                return data if (fresh.mode, fresh.size) == (image.mode, image.size) else None
    return None


def _pnm(pixels: npt.NDArray[np.unsignedinteger]) -> bytes:
    """(H, W) grey of 8 or 16 bits, or (H, W, 3) RGB of 8."""
    if not pixels.size:
        raise RefusedImage("an image without pixels")
    kind, top, order = ("P6" if pixels.ndim == 3 else "P5"), np.iinfo(pixels.dtype).max, pixels.dtype.newbyteorder(">")
    header = f"{kind} {pixels.shape[1]} {pixels.shape[0]} {top}\n".encode()
    return b"".join([header, np.ascontiguousarray(pixels, order).data])
