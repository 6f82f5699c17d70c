"""Whether two image files show the same picture. In: a folder, paths and digests of rows. Out: how far pixels of pairs agree.

A file counts only if its bytes have the row's digest.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.heads.head import Indices
from featcache.images.decode import decode_pixels
from featcache.images.read import Paths, read_images

_EDGE = 64
Floats = npt.NDArray[np.float64]


class PixelCheck:
    """Compares the pixels of rows, whose files lie under ``root``."""

    def __init__(self, root: Path, paths: Sequence[str], digests: npt.NDArray[np.uint8], *, workers: int = 2) -> None:
        """paths: of all rows, relative to root. digests: (M, 32) of these. workers: threads that read."""
        self._root, self._paths, self._digests, self._workers = root, paths, digests, workers

    def agreements(self, pairs: Indices, *, progress: Callable[[int, int], None] | None = None) -> Floats:
        """(P, 2) row numbers -> (P,) how far the pictures agree, 0..1; NaN where one of them cannot be read or was changed."""
        rows = np.unique(pairs)
        grey = self._read(rows)
        result = np.full(len(pairs), np.nan)
        for number, (one, other) in enumerate(np.searchsorted(rows, pairs).tolist()):
            a, b = grey[one], grey[other]
            if a is not None and b is not None:
                result[number] = max((a * b).mean(), (a * b[:, ::-1]).mean(), 0)
            if progress:
                progress(number + 1, len(pairs))
        return result

    def _read(self, rows: Indices) -> list[Floats | None]:
        files = Paths(self._root, tuple(self._paths[row] for row in rows))
        reads = read_images(files, range(len(rows)), _small, workers=self._workers)
        return [
            read.value if read.digest == self._digests[row].tobytes() else None
            for row, read in zip(rows, reads, strict=True)
        ]


def _small(data: bytes) -> Floats:
    image = Image.fromarray(decode_pixels(data, at_least=_EDGE)).convert("L")
    grey = np.asarray(image.resize((_EDGE, _EDGE), Image.Resampling.BOX), np.float64)
    standard: Floats = (grey - grey.mean()) / (grey.std() or 1)
    return standard
