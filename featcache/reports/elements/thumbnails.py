"""Small pictures for pages. In: image files. Out: WebP thumbnails within a budget of bytes, or the reason why there is none.

Files are read and decoded as everywhere else, at a reduced scale: upright, 16 bits and transparency by the same rules, damaged
ones refused. The same files and arguments give the same bytes on a given version of Pillow, whatever the number of workers.
"""

import base64
import functools
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from featcache.images.decode import decode_pixels
from featcache.images.read import ImageFiles, Paths, read_images
from featcache.reports.elements.numbers import bytes_text

_TYPICAL = {160: 2800, 128: 2000, 96: 1300, 64: 720, 48: 490}  # pixels of the longer edge: bytes, of 1,000 photographs
_METHOD = 4  # of libwebp, 0..6: 6 saves 3 % of the bytes for twice the time


class Thumbnail(NamedTuple):
    """What became of one file.

    Attributes:
        webp: the picture's file; None: there is none. reason: why; empty if there is one.
        digest: sha256 of the file it was made of, to tell whether it is the image that was meant; empty if it cannot be read.
    """

    webp: bytes | None
    reason: str = ""
    digest: bytes = b""

    @property
    def uri(self) -> str | None:
        """The picture as an address that holds it whole."""
        return None if self.webp is None else f"data:image/webp;base64,{base64.b64encode(self.webp).decode()}"


def thumbnails(
    files: ImageFiles | Sequence[Path],
    indices: Iterable[int] | None = None,
    *,
    size: int | None = 96,
    quality: int = 60,
    budget: int | None = None,
    workers: int | None = None,
) -> list[Thumbnail]:
    """Thumbnails of image files, in their order.

    Args:
        files: a list of images, or paths. indices: which of them, in which order; all when not given.
        size: pixels of the longer edge; smaller images keep their size. None: as large as ``fitting_size`` says.
        quality: 1..100, WebP's.
        budget: bytes for all of them. The first ones fit; where the budget is used up, the others have none, and say so.
            Put first what matters most.
        workers: threads; as many as this process has cores when not given.
    """
    if isinstance(files, Sequence) and not isinstance(files, Paths):
        files = Paths(None, tuple(map(str, files)))
    wanted = list(range(len(files.paths)) if indices is None else indices)
    edge = size or fitting_size(len(wanted), budget)
    convert = functools.partial(_thumbnail, size=edge, quality=quality)
    found: list[Thumbnail] = []
    left = float("inf") if budget is None else budget
    images = read_images(files, wanted, convert, workers=workers or _cores())
    for image in images:
        cost = len(image.value or b"")
        if cost > left:
            images.close()
            break
        left -= cost
        found.append(Thumbnail(image.value, image.reason, image.digest))
    omitted = Thumbnail(None, f"left out: pictures on this page are limited to {bytes_text(budget)}")
    return found + [omitted] * (len(wanted) - len(found))


def fitting_size(count: int, budget: int | None) -> int:
    """Pixels of the longer edge at which ``count`` photographs usually fit into ``budget`` bytes; 48 at least."""
    if budget is None:
        return max(_TYPICAL)
    return next((size for size, each in _TYPICAL.items() if count * each <= budget), min(_TYPICAL))


def _thumbnail(data: bytes, *, size: int, quality: int) -> bytes:
    # Decoded to a shorter edge of ``size`` at least: what resizes the rest is the filter below, whatever the decoder.
    picture = Image.fromarray(decode_pixels(data, at_least=-(-size // 2)))
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=quality, method=_METHOD)
    return file.getvalue()


def _cores() -> int:
    with_affinity = getattr(os, "sched_getaffinity", None)
    return len(with_affinity(0)) if with_affinity else os.cpu_count() or 1
