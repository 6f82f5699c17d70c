"""What can be told of images before any network sees them. In: an ``ImageList``. Out: ``Measured``, a value per image.

Headers are read of all, pixels of a sample that a seed and the images' own paths draw, and of files that have no end, because
those are probably cut off. Pixels are looked at on a small scale, the same for all, since sharpness is a matter of scale.
"""

import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.errors import RefusedImage
from featcache.images.decode import Pixels, decode_pixels, strict_decoding
from featcache.images.headers import Header, read_header
from featcache.images.read import ReadImage, read_images
from featcache.images.source import ImageList
from featcache.images.splits import rank

EDGE = 256  # pixels of the longer edge, at most, on which pictures are looked at
LOOKS = ("brightness", "contrast", "sharpness", "redness", "yellowness", "colourfulness")
MOST_LOOKED_AT = 5000  # images that are decoded unless told otherwise,
_BLOCK = 512  # headers at a time
_MOST_PIXELS = 4_000_000_000  # and pixels of them: 20,000 photographs of 500 x 400, or 330 of 12 megapixels
_ODD = {  # what may be odd about an image, in words: below and above the middle of all
    "aspect": ("narrower", "wider"),
    "pixels": ("smaller", "larger"),
    "bytes_per_pixel": ("fewer bytes a pixel", "more bytes a pixel"),
    "contrast": ("less contrast", "more contrast"),
    "redness": ("greener", "redder"),
    "yellowness": ("bluer", "yellower"),
    "colourfulness": ("paler", "more colourful"),
}
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
Progress = Callable[[int, int, str], None]  # files done, files to do, what is read of them


@dataclasses.dataclass(frozen=True)
class Measured:
    """N images.

    Attributes:
        headers: N, None of what cannot be read.
        looks: (N, 6) float64, ``LOOKS``; NaN of what was not decoded. See ``look_at``.
        digests: (N, 32) uint8 sha256 of the files that share their size with another one; zeros of the others.
        hashed: (N,) whether it has a digest.
        refused: image -> reason. opened: how many headers could be read. sampled: the images that were drawn of these. cut: others
            that were decoded because their file has no end, no more than were drawn.
    """

    headers: tuple[Header | None, ...]
    looks: Floats
    digests: npt.NDArray[np.uint8]
    hashed: npt.NDArray[np.bool_]
    refused: dict[int, str]
    opened: int
    sampled: Rows
    cut: Rows

    @property
    def readable(self) -> Rows:
        """The images that nothing was found to be wrong with."""
        return np.array([row for row in range(len(self.headers)) if row not in self.refused], np.intp)

    def of(self, field: str) -> Floats:
        """(N,) a numeric field of the headers, or one that follows from them; NaN of what cannot be read."""
        ways: dict[str, Callable[[Header], float]] = {
            "aspect": lambda header: header.width / header.height,
            "pixels": lambda header: header.width * header.height,
            "shorter_edge": lambda header: min(header.width, header.height),
            "bytes_per_pixel": lambda header: header.bytes / (header.width * header.height),
        }
        way = ways.get(field) or (lambda header: float(getattr(header, field)))
        return np.array([np.nan if header is None else way(header) for header in self.headers], np.float64)

    def look(self, name: str) -> Floats:
        """(N,) one of ``LOOKS``."""
        return self.looks[:, LOOKS.index(name)]


def measure(
    images: ImageList, *, sample: int | None = None, seed: int = 0, workers: int = 2, progress: Progress | None = None
) -> Measured:
    """Read the headers of all images, and look at the pixels of some.

    Args:
        sample: how many; when None ``MOST_LOOKED_AT``, or as many as have 4 billion pixels together, if that is fewer.
        seed: another one draws others. workers: threads. progress: called with files done, files to do and what is read.
    """
    report = progress or (lambda *_: None)
    headers, refused = _read_headers(images, workers, report)
    there = [row for row, header in enumerate(headers) if header is not None]
    sampled = _draw(images, headers, there, sample, seed)
    cut = [row for row in there if not headers[row].ends]  # type: ignore[union-attr]
    cut = sorted({*cut} - {*sampled})[: len(sampled)]
    looks = np.full((len(images), len(LOOKS)), np.nan)
    digests: dict[int, bytes] = {}
    wanted = sorted([*sampled, *cut])
    for done, read in enumerate(read_images(images, wanted, _look, workers=workers), 1):
        if read.value is None:
            headers[read.position], refused[read.position] = None, read.reason
        else:
            looks[read.position], digests[read.position] = read.value, read.digest
        report(done, len(wanted), "pixels")
    _hash_same_sizes(images, headers, digests, workers, report)
    hashed = np.zeros(len(images), np.bool_)
    hashed[[*digests]] = True
    columns = np.zeros((len(images), 32), np.uint8)
    for row, digest in digests.items():
        columns[row] = np.frombuffer(digest, np.uint8)
    rows = (np.array(sorted(part), np.intp) for part in (sampled, cut))
    return Measured(tuple(headers), looks, columns, hashed, dict(sorted(refused.items())), len(there), *rows)


def look_at(pixels: Pixels) -> tuple[float, ...]:
    """``LOOKS`` of a picture, uint8 (H, W, 3).

    It is reduced to at most ``EDGE`` pixels along its longer edge, never enlarged. Grey is that of ITU-R BT.601, from 0 to 255.

    - brightness, contrast: mean and standard deviation of grey.
    - sharpness: variance of the Laplacian of grey, kernel 0 1 0 / 1 -4 1 / 0 1 0 (Pech-Pacheco et al., "Diatom autofocusing in
      brightfield microscopy: a comparative study", ICPR 2000). Plain surfaces are as little sharp as blurred pictures.
    - redness, yellowness: means of R - G and (R + G) / 2 - B. colourfulness: of these, root of the summed variances + 0.3 root
      of the summed squared means (Hasler and Suesstrunk, "Measuring colourfulness in natural images", SPIE 2003).
    """
    small = np.asarray(reduced(pixels), np.float32)
    red, green, blue = small[..., 0], small[..., 1], small[..., 2]
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    rg, yb = red - green, (red + green) / 2 - blue
    middle = grey[1:-1, 1:-1]
    bends = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
    sharpness = float(bends.var()) if bends.size else np.nan  # of fewer than 3 x 3 pixels nobody can tell
    a, b = float(rg.mean()), float(yb.mean())
    colourfulness = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(a, b)
    return float(grey.mean()), float(grey.std()), sharpness, a, b, float(colourfulness)


def reduced(pixels: Pixels) -> Image.Image:
    """A picture, uint8 (H, W, 3), at most ``EDGE`` pixels long, each the mean of those it stands for."""
    image = Image.fromarray(pixels)
    scale = EDGE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(edge * scale), 1) for edge in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def oddness(measured: Measured) -> tuple[Floats, list[str]]:
    """How far each image lies from the middle of all, in that of its features in which it lies farthest, and what that is.

    The modified z-score: 0.6745 x (value - median) / MAD, MAD the median absolute deviation from the median; where more than
    half of the values are equal, (value - median) / (1.2533 x mean absolute deviation) (Iglewicz and Hoaglin, "How to detect and
    handle outliers", 1993, which calls beyond 3.5 an outlier). Aspect, pixels and bytes a pixel by their logarithms, colourfulness
    by that of 1 + colourfulness.

    Returns:
        (N,) scores, NaN of what cannot be read; N texts such as ``wider``.
    """
    logs = [np.log(measured.of(name)) for name in ("aspect", "pixels", "bytes_per_pixel")]
    plain = [measured.look(name) for name in ("contrast", "redness", "yellowness")]
    scores = np.stack([_z(column) for column in (*logs, *plain, np.log1p(measured.look("colourfulness")))])  # (7, N)
    farthest = np.abs(np.nan_to_num(scores)).argmax(0)
    chosen = scores[farthest, np.arange(scores.shape[1])]
    words = [*_ODD.values()]
    return np.abs(chosen), [words[way][bool(value > 0)] for way, value in zip(farthest, chosen, strict=True)]


def _z(values: Floats) -> Floats:
    """The modified z-score of values, NaN where they are."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.full_like(values, np.nan)
    away = values - np.median(known)
    distances = np.abs(away[np.isfinite(away)])
    spread = np.median(distances) / 0.6745 or 1.2533 * distances.mean()
    return away / spread if spread else away * 0


def _read_headers(images: ImageList, workers: int, report: Progress) -> tuple[list[Header | None], dict[int, str]]:
    def read(path: str) -> Header | str:
        try:
            return read_header(images.root / path)
        except RefusedImage as reason:
            return str(reason)

    headers: list[Header | None] = []
    refused: dict[int, str] = {}
    pending = iter(images.paths)
    # More threads than cores, as they mostly wait for the disk; in blocks, so that an interruption does not wait for all.
    with strict_decoding(), ThreadPoolExecutor(4 * workers, "featcache-header") as pool:
        while block := list(itertools.islice(pending, _BLOCK)):
            for found in pool.map(read, block):
                if isinstance(found, str):
                    refused[len(headers)] = found
                headers.append(None if isinstance(found, str) else found)
            report(len(headers), len(images), "headers")
    return headers, refused


def _draw(images: ImageList, headers: list[Any], rows: list[int], count: int | None, seed: int) -> list[int]:
    """Some of ``rows``: a seed and an image's own path decide, not the order of the list."""
    order = sorted(rows, key=lambda row: rank(images.paths[row], seed))
    if count is not None:
        return order[:count]
    order = order[:MOST_LOOKED_AT]
    pixels = np.cumsum([headers[row].width * headers[row].height for row in order])
    return order[: max(int(np.searchsorted(pixels, _MOST_PIXELS, side="right")), 1)]


def _look(data: bytes) -> tuple[float, ...]:
    return look_at(decode_pixels(data, at_least=EDGE // 2))


def _hash_same_sizes(
    images: ImageList, headers: list[Any], digests: dict[int, bytes], workers: int, report: Progress
) -> None:
    """Add the digests of readable files that share their size with another one: only these can be copies."""
    sizes = np.array([-1 if header is None else header.bytes for header in headers])
    found, counts = np.unique(sizes[sizes >= 0], return_counts=True)
    suspects = np.flatnonzero(np.isin(sizes, found[counts > 1]))
    todo = [row for row in suspects.tolist() if row not in digests]
    reads: Any = read_images(images, todo, len, workers=4 * workers)
    read: ReadImage[int]
    for done, read in enumerate(reads, 1):
        if read.digest:
            digests[read.position] = read.digest
        report(done, len(todo), "copies")
    for row in {*digests} - {*suspects.tolist()}:
        del digests[row]
