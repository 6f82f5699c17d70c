"""A file's bytes to upright 8-bit RGB pixels, or the reason why not; by the fastest decoder here that gives Pillow's pixels.

In: the bytes of an image file. Out: uint8 (H, W, 3), or ``RefusedImage``. Pillow decides what an image is; another decoder is
taken for what it decodes without a single warning, and only if its pixels are the same, so that an embedding does not
depend on what is installed. ``FEATCACHE_DECODER=pillow`` turns others off.

A decoder that crashes does not end the run. An image is noted for the process that waits while it is decoded. If a worker
crashed while such an image was noted, it is first tried in a process of its own, and refused if it crashes that one:
``python -m featcache.images.decode AT_LEAST`` decodes stdin by every decoder, for nothing but seeing whether it survives.
An image costs a few microseconds this way; to decode each in another process would cost copying its pixels.
"""

import contextlib
import functools
import io
import itertools
import mmap
import os
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, UnidentifiedImageError

from featcache.errors import RefusedImage
from featcache.images.formats import Brightest, is_turned, no_image, plain_png, reading_of, to_rgb
from featcache.images.heif import is_heif, open_heif
from featcache.images.integrity import load_whole
from featcache.images.jpeg import has_many_scans, may_have_many_scans
from featcache.images.jpeg_header import read_jpeg_header
from featcache.images.preprocess import to_pixels
from featcache.spec import PreprocessSpec
from featcache.system.supervisor import notes, signal_name

Pixels = npt.NDArray[np.uint8]
# A list of its own, not "whatever Pillow opens": EPS, for one, would start another program. TGA, which has no signature,
# comes last: some icons would pass for one.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
_CRASHED, _ENDLESS = "its decoder crashed", "its decoder comes to no end"
FATAL = (_CRASHED, _ENDLESS)  # how the reasons begin
_TRIAL = ("-m", "featcache.images.decode")  # Python's arguments; AT_LEAST follows
_ALWAYS_RIGHT = {".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".avif", ".ico", ".ppm", ".pgm", ".pbm", ".pnm"}
_MENDED = {".png", ".apng", ".bmp", ".dib", ".tga", ".jp2", ".j2k"}  # in revision 1
MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte once decoded


def read_pixels(data: bytes, spec: PreprocessSpec, *, seen: Brightest | None = None) -> Pixels:
    """From a file to the pixels a backbone takes: uint8 (H, W, 3), ``(H, W) == spec.crop``. Raises RefusedImage.

    By the CPU; where a GPU may have a say in it, ``gpu_jpeg.pixel_reader`` knows who reads.
    """
    if spec.decode == "gpu":
        raise ValueError("these pixels are made by a GPU")
    pixels = decode_pixels(data, at_least=spec.decode_at_least, white_level=spec.white_level, seen=seen)
    return to_pixels(pixels, spec)


def decode_pixels(
    data: bytes, *, at_least: int | None = None, white_level: int | None = None, seen: Brightest | None = None
) -> Pixels:
    """Decode a file into upright 8-bit RGB, uint8 (H, W, 3), as ``decode`` does, but faster. Raises RefusedImage."""
    with guarded(data, at_least):
        pixels = _decode_fast(data, at_least)
        return _decode_whole(data, at_least, white_level, seen) if pixels is None else pixels


def decode(
    data: bytes,
    *,
    at_least: int | None = None,
    white_level: int | None = None,
    seen: Brightest | None = None,
    suspect: bool = False,
) -> Image.Image:
    """Decode a file's bytes into an upright 8-bit RGB image, by Pillow.

    Orientation is applied; palettes are expanded, CMYK converted, grey replicated, alpha composited on white, 16 bits
    scaled to 8; of several frames the first counts; colour profiles are ignored, as the backbones' training did.
    Where pixels are missing or known to be damaged the image is refused (``integrity`` says what goes unnoticed), and where
    black and white are not defined, as of signed and floating-point samples (``formats``).

    Args:
        at_least: JPEGs may be decoded at a reduced scale that leaves their shorter edge twice this.
        white_level, seen: of 16-bit images, see ``formats.to_rgb``.
        suspect: try it in a process of its own first.

    Raises:
        RefusedImage: not an image, truncated, too large, of a kind without a defined conversion, or its decoder crashes.
    """
    with guarded(data, at_least, suspect=suspect):
        return _decode(data, at_least, white_level, seen)


def try_apart(data: bytes, at_least: int | None, *, patience: float = 120.0) -> None:
    """Decode ``data`` in a process of its own. Raises RefusedImage if it crashes, or is not done in ``patience`` seconds."""
    # It imports from where this process does, never from the user's working folder.
    command = [sys.executable, "-P", *_TRIAL, str(at_least or 0)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=patience, check=False, env=environment)
        reason = crashed(-done.returncode) if done.returncode < 0 else ""
    except subprocess.TimeoutExpired:
        reason = f"{_ENDLESS}, {patience:g} s were not enough"
    if reason:
        notes.shared.crashed_images += 1
        raise RefusedImage(reason)


def crashed(number: int) -> str:
    """Why an image is refused whose decoder ended a process of its own by this signal."""
    return f"{_CRASHED} ({signal_name(number)})"


class _StrictDecoding:
    """A context that silences Pillow's warnings, about images it considers large (``MAX_PIXELS`` is the limit here) and odd
    metadata; nor may Pillow load truncated images in it, as notebooks like to allow it.

    Such settings are the process's, so this belongs around a whole run, never around one image; of several runs at a time
    the first changes them, and the last to end restores them.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
                ImageFile.LOAD_TRUNCATED_IMAGES = False
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.close()


_strict = _StrictDecoding()


def strict_decoding() -> contextlib.AbstractContextManager[None]:
    """See ``_StrictDecoding``."""
    return _strict


def reduction(shorter_edge: int, at_least: int | None) -> int:
    """1, 2, 4 or 8: the scale at which a JPEG may be decoded if ``at_least`` pixels of its shorter edge are wanted.

    Twice as many are left, so that the filter which resizes the rest, not the decoder, decides what is seen.
    """
    return next((factor for factor in (8, 4, 2) if at_least and shorter_edge >= 2 * factor * at_least), 1)


def was_misread(file: Path, *, revision: int = 0) -> bool:
    """Whether the version of this ``formats.REVISION`` may have made another picture of a file; its header tells.

    Suffixes of formats that it always read right are taken at their word, so that photographs need not be opened.
    """
    if file.suffix.lower() in (_ALWAYS_RIGHT | _MENDED if revision else _ALWAYS_RIGHT):
        return False
    try:
        with file.open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if is_heif(data) or (data[:4] == b"\x89PNG" and data[24:26] != b"\x10\x02"):  # all but RGB of 16 bits
                return False
            with Image.open(content, formats=_formats()) as image:
                return reading_of(image, data).is_new and not revision
    except Exception:  # nearly anything; what cannot be opened is not known to be right
        return True


def decoder_in_words() -> str:
    """Which decoder is used for JPEGs, and why."""
    if fast_jpeg():
        return "JPEGs by simplejpeg, whose pixels equal Pillow's; FEATCACHE_DECODER=pillow turns it off"
    if os.environ.get("FEATCACHE_DECODER") == "pillow":
        return "JPEGs by Pillow, as FEATCACHE_DECODER says"
    return "JPEGs by Pillow; pip install 'featcache[fast]' decodes them faster, to the same pixels"


@functools.cache
def fast_jpeg() -> Callable[..., Pixels] | None:
    """simplejpeg, if it is installed and gives Pillow's pixels: libjpegs differ in their upsampling and cosine transform."""
    if os.environ.get("FEATCACHE_DECODER") == "pillow":
        return None
    try:
        from simplejpeg import decode_jpeg

        files = [(data, at_least) for data in _examples() for at_least in (None, 9, 4, 2)]  # at every scale
        same = all(np.array_equal(_decode_plain(decode_jpeg, *file), _decode_whole(*file)) for file in files)
    except Exception:  # not installed, or broken
        return None
    return decode_jpeg if same else None


@contextlib.contextmanager
def guarded(data: bytes, at_least: int | None, *, suspect: bool = False) -> Iterator[None]:
    """Around decoding one file: what a decoder ends in, an error or a crash, becomes RefusedImage. Entered once per file."""
    if not data:
        raise RefusedImage("empty file")
    # It tells this content from others, well enough: whatever is suspected wrongly is only tried apart.
    key = (len(data) << 32 | zlib.crc32(data[-4096:], zlib.crc32(data[:4096]))) & (2**64 - 1) or 1
    try:
        with refusing_errors():
            if suspect or key in notes.suspects:
                try_apart(data, at_least)
            notes.write(key)
            yield
    finally:
        notes.write(0)


@contextlib.contextmanager
def refusing_errors() -> Iterator[None]:
    """Around whatever is done to one image: what it ends in, be it memory that ran out, becomes RefusedImage."""
    try:
        yield
    except RefusedImage:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedImage(f"too large: more than {MAX_PIXELS} pixels") from error
    except MemoryError as error:
        raise RefusedImage("too large for the memory at hand") from error
    except Exception as error:  # decoders raise nearly anything on damaged files; one image must not end a run
        text = " ".join(str(error).split()) or type(error).__name__
        if "allocate memory" in text:  # PyTorch's allocator
            raise RefusedImage("too large for the memory at hand") from error
        raise RefusedImage(f"damaged: {text}"[:300]) from error


def _decode(
    data: bytes, at_least: int | None, white_level: int | None = None, seen: Brightest | None = None
) -> Image.Image:
    """``decode`` without the guard. Raises nearly anything."""
    data = plain_png(data)
    with open_image(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise RefusedImage(f"too large: {image.width}x{image.height} pixels, at most {MAX_PIXELS} are decoded")
        factor = reduction(min(image.size), at_least)
        if factor > 1 and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft(image.mode, (image.width // factor, image.height // factor))
        reading = reading_of(image, data)
        load_whole(image, data)
        upright = ImageOps.exif_transpose(image) if is_turned(image) else image
        return to_rgb(upright, reading, data, white_level=white_level, seen=seen)


def open_image(data: bytes) -> Image.Image:
    """A file's bytes as a Pillow image that is not loaded yet. Raises RefusedImage: it is none, or HEIF without its decoder."""
    if is_heif(data):
        return open_heif(data)
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        raise RefusedImage(no_image(data)) from error


def _decode_whole(
    data: bytes, at_least: int | None, white_level: int | None = None, seen: Brightest | None = None
) -> Pixels:
    image = _decode(data, at_least, white_level, seen)
    return np.array(image)  # a copy: Pillow's own memory is read-only, which tensors dislike


def _decode_fast(data: bytes, at_least: int | None) -> Pixels | None:
    """By something faster than Pillow; None if there is nothing, or it has any objection: Pillow then decides."""
    if (decode_jpeg := fast_jpeg()) and data.startswith(b"\xff\xd8\xff"):
        with contextlib.suppress(Exception):
            return _decode_plain(decode_jpeg, data, at_least)
    return None


def _decode_plain(decode_jpeg: Callable[..., Pixels], data: bytes, at_least: int | None) -> Pixels:
    """Raises anything if anything about a JPEG needs a decision: orientation, CMYK, absurd size."""
    width, height = _plain_size(data)
    factor = reduction(min(width, height), at_least)
    return decode_jpeg(data, min_width=-(-width // factor), min_height=-(-height // factor))


def _plain_size(data: bytes) -> tuple[int, int]:
    """Width and height of a JPEG about which nothing needs a decision. Raises anything about others. Pillow reads unusual headers."""
    if header := read_jpeg_header(data):
        size, plain = (header.width, header.height), header.orientation == 1
        scans = (header.is_progressive or not header.interleaved) and has_many_scans(data)
    else:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            size, plain = image.size, image.mode in ("RGB", "L") and not is_turned(image)
            scans = may_have_many_scans(image, data)
    if scans or not plain or size[0] * size[1] > MAX_PIXELS:
        raise ValueError("not for this decoder")
    return size


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _examples() -> list[bytes]:
    """JPEGs of noise in every usual way of storing colour, of odd sizes."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8))
    found = []
    ways = itertools.product((noise, noise.convert("L")), ("4:4:4", "4:2:2", "4:2:0"), (False, True))
    for image, subsampling, progressive in ways:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
        found.append(file.getvalue())
    return found


if __name__ == "__main__":
    content, wanted = sys.stdin.buffer.read(), int(sys.argv[1]) or None
    for decoder in (_decode_fast, _decode_whole):
        with contextlib.suppress(Exception):
            decoder(content, wanted)
