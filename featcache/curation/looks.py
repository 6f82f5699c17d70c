"""What the pixels of rows say: how bright, how sharp, how large. In: a folder, paths and digests. Out: numbers, one row each.

A file counts only if its bytes have the row's digest.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.images.decode import decode_pixels
from featcache.images.headers import header_of
from featcache.images.read import Paths, read_images
from featcache.images.statistics import EDGE, LOOKS, look_at

Floats = npt.NDArray[np.float64]


def measure_looks(
    root: Path,
    paths: Sequence[str],
    digests: npt.NDArray[np.uint8],
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Floats, Floats]:
    """(N, 6) ``images.statistics.LOOKS``, and (N,) shorter edges in pixels; NaN of files that are not there or were changed.

    Args:
        paths: N, relative to ``root``. digests: (N, 32). workers: threads. progress: called with files done and to do.
    """
    looks, edges = np.full((len(paths), len(LOOKS)), np.nan), np.full(len(paths), np.nan)
    for read in read_images(Paths(root, tuple(paths)), range(len(paths)), _look, workers=workers):
        if read.value is not None and read.digest == digests[read.position].tobytes():
            looks[read.position], edges[read.position] = read.value
        progress(read.position + 1, len(paths))
    return looks, edges


def _look(data: bytes) -> tuple[tuple[float, ...], int]:
    header = header_of(data)
    return look_at(decode_pixels(data, at_least=EDGE // 2)), min(header.width, header.height)
