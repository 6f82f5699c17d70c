"""A file's bytes to pixels, by the fastest decoder here that gives Pillow's pixels.

In: the bytes of an image file. Out: uint8 (H, W, 3), or ``RefusedImage``. Pillow (``images.decode``) decides what an image
is; another decoder is taken for what it decodes without a single warning, and only if its pixels are the same, so that an
embedding does not depend on what is installed. ``FEATCACHE_DECODER=pillow`` turns others off.
"""

import contextlib
import functools
import io
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.images.jpeg import may_have_many_scans
from featcache.images.preprocess import PreprocessSpec, to_pixels
from featcache.images.source import MAX_PIXELS, RefusedImage, decode, is_turned, reduction
from featcache.system.supervisor import DecoderCrashedError, decoding

Pixels = npt.NDArray[np.uint8]


def read_pixels(data: bytes, spec: PreprocessSpec) -> Pixels:
    """From a file to the pixels a backbone takes: uint8 (H, W, 3), ``(H, W) == spec.crop``. Raises RefusedImage."""
    return to_pixels(decode_pixels(data, at_least=spec.decode_at_least), spec)


def decode_pixels(data: bytes, *, at_least: int | None = None) -> Pixels:
    """Decode a file into upright 8-bit RGB, uint8 (H, W, 3), as ``images.decode`` does. Raises RefusedImage."""
    try:
        with decoding(data, at_least=at_least):
            return _decode_pixels(data, at_least)
    except DecoderCrashedError as error:
        raise RefusedImage(str(error)) from error


def _decode_pixels(data: bytes, at_least: int | None) -> Pixels:
    decode_jpeg = _fast_jpeg()
    if decode_jpeg and data.startswith(b"\xff\xd8\xff"):
        with contextlib.suppress(Exception):  # whatever is wrong with it, Pillow says so, or decodes it after all
            if size := _size_of_plain_jpeg(data):
                return decode_jpeg(data, **_smallest(size, reduction(min(size), at_least)))
    return np.array(decode(data, at_least=at_least))  # a copy: Pillow's own memory is read-only, which tensors dislike


def has_fast_decoder() -> bool:
    """Whether JPEGs are decoded by something faster than Pillow."""
    return _fast_jpeg() is not None


def decoder_in_words() -> str:
    """Which decoder is used for JPEGs, and why."""
    if has_fast_decoder():
        return "JPEGs by simplejpeg, whose pixels equal Pillow's; FEATCACHE_DECODER=pillow turns it off"
    if os.environ.get("FEATCACHE_DECODER") == "pillow":
        return "JPEGs by Pillow, as FEATCACHE_DECODER says"
    return "JPEGs by Pillow; pip install 'featcache[fast]' decodes them faster, to the same pixels"


@functools.cache
def _fast_jpeg() -> Callable[..., Pixels] | None:
    """simplejpeg, if it is installed and gives Pillow's pixels: libjpegs differ in their upsampling and cosine transform."""
    if os.environ.get("FEATCACHE_DECODER") == "pillow":
        return None
    try:
        from simplejpeg import decode_jpeg

        same = all(_are_the_same(decode_jpeg, data, factor) for data in _examples() for factor in (1, 2, 4, 8))
    except Exception:  # not installed, or broken
        return None
    return decode_jpeg if same else None


def _are_the_same(decode_jpeg: Callable[..., Pixels], data: bytes, factor: int) -> bool:
    image = decode(data)
    expected = np.asarray(decode(data, at_least=min(image.size) // (2 * factor) if factor > 1 else None))
    return np.array_equal(decode_jpeg(data, **_smallest(image.size, factor)), expected)


def _smallest(size: tuple[int, int], factor: int) -> dict[str, int]:
    """What to ask for so that an image of (width, height) is decoded at 1/``factor``."""
    return {"min_width": -(-size[0] // factor), "min_height": -(-size[1] // factor)} if factor > 1 else {}


def _examples() -> list[bytes]:
    """JPEGs of noise in every usual way of storing colour, of odd sizes."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8))
    found = []
    for image in (noise, noise.convert("L")):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            for progressive in (False, True):
                file = io.BytesIO()
                image.save(file, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
                found.append(file.getvalue())
    return found


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) if nothing about it needs a decision: no orientation, CMYK, absurd size. Reads the header only."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        small = image.width * image.height <= MAX_PIXELS
        plain = small and image.mode in ("RGB", "L") and not is_turned(image)
        plain = plain and not may_have_many_scans(image, data)
        return image.size if plain else None
