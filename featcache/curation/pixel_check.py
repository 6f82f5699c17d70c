"""Whether two image files show the same picture. In: a folder, paths and digests of rows. Out: how far pixels of pairs agree.

The same picture: one exposure, edited. A second photograph of the same scene is another picture, however much it resembles.
A file counts only if its bytes have the row's digest.

Method: both pictures, grey and reduced to 64 x 64, are aligned, as they are and mirrored, by the affine map, gain and offset that
make them most alike: Gauss-Newton steps on 16, 32 and 64 pixels (Lucas and Kanade 1981; Baker and Matthews 2004), far-off pixels
weighing little, so that a watermark does not move it. Their agreement is the correlation of what the two show in common once the
broad light and shade are taken away; two photographs before the same wall share no more than these.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.heads.head import Indices
from featcache.images.decode import decode_pixels
from featcache.images.read import Paths, read_images
from featcache.system.runtime_options import usable_cores

if TYPE_CHECKING:
    from torch import Tensor

_EDGE = 64  # pixels; the levels are a quarter and half of it, and itself
_STEPS = {16: 10, 32: 6, 64: 5}  # on each level
_BLURS = {16: 3.0, 32: 1.0, 64: 0.7}  # pixels of 64
_PAIRS = 128  # compared together: small enough for the caches of a core
_BLOCK = 8 * _PAIRS  # pairs between two reports
_UNLIKE = {
    16: 0.5,
    32: 0.3,
}  # correlation on 16, agreement on 32 pixels, below which a pair is not looked at any further
_FAR = 2.5  # standard deviations of the residual, beyond which pixels weigh little
_STEP, _REACH = 0.15, 0.45  # the longest step, and how far a map may be from none, of half the edge
_BLUR = 3.0  # pixels of 64: what is broader is light and shade
_NOISE = 0.25  # grey values squared: where a picture varies no more it has nothing to compare
_OVERLAP = 0.7  # of the picture, that both must show
_CLEAR = 0.9  # agreement of which on it does not matter which of the two is moved
Floats = npt.NDArray[np.float64]
Pictures = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]


class Compared(NamedTuple):
    """P pairs: (P,) how far their pictures agree, 0..1, NaN where a file is missing, changed or refused; whether mirrored."""

    agreement: Floats
    mirrored: npt.NDArray[np.bool_]


class PixelCheck:
    """Compares the pictures of rows, whose files lie under ``root``.

    Each file is read once, and 4 KB of it are kept.
    """

    def __init__(
        self, root: Path, paths: Sequence[str], digests: npt.NDArray[np.uint8], *, workers: int | None = None
    ) -> None:
        """paths: of all rows, relative to root. digests: (M, 32) of these. workers: threads; one a core when None."""
        self._root, self._paths, self._digests = root, paths, digests
        self._workers = workers or usable_cores()
        self._place = np.full(len(digests), -1)  # of each row among the pictures, -1: not read yet, -2: there is none
        self._pictures: list[Pictures] = []

    def compare(self, pairs: Indices, *, thorough: bool = False, progress: Progress | None = None) -> Compared:
        """Compare (P, 2) row numbers.

        Args:
            thorough: align also what looks unlike from afar; otherwise its agreement is 0.
            progress: called with pairs done and pairs to do; what it raises ends the comparison.
        """
        agreement, mirrored = np.full(len(pairs), np.nan), np.zeros(len(pairs), np.bool_)
        for start in range(0, len(pairs), _BLOCK):
            block = pairs[start : start + _BLOCK]
            self._read(np.unique(block))
            there = start + np.flatnonzero((self._place[block] >= 0).all(axis=1))
            if len(there):
                agreement[there], mirrored[there] = self._agreements(self._place[pairs[there]], thorough)
            if progress:
                progress(min(start + _BLOCK, len(pairs)), len(pairs))
        return Compared(agreement, mirrored)

    def _read(self, rows: Indices) -> None:
        rows = rows[self._place[rows] == -1]
        files = Paths(self._root, tuple(self._paths[row] for row in rows))
        for row, read in zip(rows, read_images(files, range(len(rows)), _picture, workers=self._workers), strict=True):
            self._place[row] = -2
            if read.value is not None and read.digest == self._digests[row].tobytes():
                self._place[row] = len(self._pictures)
                self._pictures.append(read.value)

    def _agreements(self, places: Indices, thorough: bool) -> tuple[Floats, npt.NDArray[np.bool_]]:
        from featcache.system.device import one_core_each

        def compare(part: Indices) -> tuple[Floats, npt.NDArray[np.bool_]]:
            one, other = (np.stack([self._pictures[place] for place in side]) for side in part.T)
            return compare_pictures(one, other, thorough=thorough)

        parts = [places[start : start + _PAIRS] for start in range(0, len(places), _PAIRS)]
        with one_core_each(min(self._workers, len(parts)), "featcache-pixels") as pool:
            agreement, mirrored = zip(*pool.map(compare, parts), strict=True)
        return np.concatenate(agreement), np.concatenate(mirrored)


def _picture(data: bytes) -> Pictures:
    """(64, 64) uint8 grey: what an image shows, whatever its shape."""
    image = Image.fromarray(decode_pixels(data, at_least=_EDGE)).convert("L")
    way = Image.Resampling.BOX if min(image.size) >= _EDGE else Image.Resampling.BICUBIC
    return np.asarray(image.resize((_EDGE, _EDGE), way))


def compare_pictures(one: Pictures, other: Pictures, *, thorough: bool = False) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Two times (P, 64, 64) uint8 grey -> (P,) agreements, 0..1, and whether the other is mirrored.

    Steps may end at different places when the other of the two is moved; unless they agree clearly, the better way counts.
    """
    agreement, mirrored = _compare(one, other, thorough)
    doubtful = np.flatnonzero(agreement < _CLEAR)
    if len(doubtful):
        again, and_mirrored = _compare(other[doubtful], one[doubtful], thorough)
        mirrored[doubtful] = np.where(again > agreement[doubtful], and_mirrored, mirrored[doubtful])
        agreement[doubtful] = np.maximum(again, agreement[doubtful])
    return agreement, mirrored


def _compare(one: Pictures, other: Pictures, thorough: bool) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """``compare_pictures``, the other one moved."""
    import torch

    with torch.inference_mode():
        a, b = (torch.from_numpy(side.astype(np.float32))[:, None] for side in (one, other))
        low_a, low_b = _level(a, 16), _level(b, 16)
        found = torch.zeros(len(one), dtype=torch.float64)
        mirrored = torch.zeros(len(one), dtype=torch.bool)
        for mirror in (False, True):
            maps = torch.eye(2, 3).repeat(len(one), 1, 1)
            maps[:, 0] *= -1 if mirror else 1
            maps = _align(low_a, low_b, maps)
            todo, likeness = torch.arange(len(one)), _correlation(low_a, *_moved(low_b, maps))
            for edge in (32, 64):
                if not thorough:
                    alike = likeness >= _UNLIKE[edge // 2]
                    todo, maps = todo[alike], maps[alike]
                if not len(todo):
                    break
                some_a, some_b = _level(a[todo], edge), _level(b[todo], edge)
                maps = _align(some_a, some_b, maps)
                likeness = _agreement(some_a, some_b, maps)
            else:
                mirrored[todo] = torch.where(likeness > found[todo], mirror, mirrored[todo])
                found[todo] = torch.maximum(likeness, found[todo])
        return found.numpy(), mirrored.numpy()


def _level(x: "Tensor", edge: int) -> "Tensor":
    """(P, 1, 64, 64) -> (P, 1, edge, edge), blurred so that a step of Gauss-Newton reaches a pixel or two."""
    blur = _blurring(_EDGE, _BLURS[edge])
    ways = blur.view(edge, _EDGE // edge, _EDGE).mean(1)
    return ways @ x @ ways.T


def _blur(x: "Tensor", sigma: float) -> "Tensor":
    ways = _blurring(x.shape[-1], sigma)
    return ways @ x @ ways.T


@functools.cache
def _blurring(n: int, sigma: float) -> "Tensor":
    """(n, n): what makes of a row of pixels a blurred one, as if the last pixel went on. Ten times as fast as a convolution."""
    import torch

    reach = int(np.ceil(2.5 * sigma))
    kernel = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * sigma * sigma))
    ways, rows = np.zeros((n, n)), np.repeat(np.arange(n), len(kernel))
    at = (np.arange(n)[:, None] + np.arange(-reach, reach + 1)).clip(0, n - 1)
    np.add.at(ways, (rows, at.ravel()), np.tile(kernel / kernel.sum(), n))
    return torch.from_numpy(ways.astype(np.float32))


def _slopes(x: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Across and down, per half of the edge, as maps count."""
    from torch.nn.functional import pad

    x, scale = pad(x, (1, 1, 1, 1), mode="replicate"), x.shape[-1] / 4
    return (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) * scale, (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) * scale


def _moved(x: "Tensor", maps: "Tensor") -> tuple["Tensor", "Tensor"]:
    """(P, C, n, n) pictures seen through (P, 2, 3) maps, and where there is a picture: (P, 1, n, n) 0 or 1."""
    from torch.nn.functional import affine_grid, grid_sample

    grid = affine_grid(maps, list(x.shape), align_corners=False)
    there = (grid.abs() <= 1).all(-1)[:, None].to(x.dtype)
    return grid_sample(x, grid, padding_mode="border", align_corners=False), there


def _align(a: "Tensor", b: "Tensor", maps: "Tensor") -> "Tensor":
    """Maps through which b looks most like a, of (P, 1, n, n) pictures: Gauss-Newton from ``maps``."""
    import torch

    n, flat = a.shape[-1], a.flatten(1)
    at = (torch.arange(n) + 0.5) / n * 2 - 1
    y, x = (side.reshape(1, -1) for side in torch.meshgrid(at, at, indexing="ij"))
    start = torch.eye(2, 3).repeat(len(a), 1, 1)
    start[:, 0] *= torch.sign(maps[:, 0, :1])
    slopes = torch.cat([b, *_slopes(b)], 1)
    for _ in range(_STEPS[n]):
        moved, there = _moved(slopes, maps)
        (seen, across, down), weight = moved.flatten(2).unbind(1), there.flatten(1)
        total = weight.sum(1, keepdim=True).clamp_min(1)
        from_a, from_b = (side - (weight * side).sum(1, keepdim=True) / total for side in (flat, seen))
        spread_a, spread_b = ((weight * side * side).sum(1, keepdim=True) for side in (from_a, from_b))
        # The gain of least squares is small while the two do not match yet; it may not fall so far that nothing pulls.
        gain = (weight * from_a * from_b).sum(1, keepdim=True) / (spread_b + 1e-6)
        alike = (spread_a / (spread_b + 1e-6)).sqrt()
        gain = torch.where(gain < 0.2 * alike, alike, gain)
        rest = from_a - gain * from_b
        if n > 16:
            usual = 1.25 * (weight * rest.abs()).sum(1, keepdim=True) / total + 1e-3
            weight = weight / (1 + (rest / (_FAR * usual)) ** 2)
        across, down = across * gain, down * gain
        ways = torch.stack(
            [across * x, across * y, across, down * x, down * y, down, from_b, torch.ones_like(x) + 0 * seen], 1
        )
        weighted = ways * weight[:, None]
        normal = weighted @ ways.transpose(1, 2)
        most = torch.diagonal(normal, dim1=1, dim2=2)
        normal += torch.diag_embed(most * 1e-2 + 1e-6 * most.amax(1, keepdim=True) + 1e-9)
        step = torch.linalg.solve(normal, weighted @ rest[..., None])[:, :6, 0].reshape(-1, 2, 3)
        maps = start + (maps + step.clamp(-_STEP, _STEP) - start).clamp(-_REACH, _REACH)
    return maps


def _correlation(a: "Tensor", b: "Tensor", weight: "Tensor") -> "Tensor":
    """(P,) weighted correlations of (P, 1, n, n) pictures."""
    a, b, weight = a.flatten(1), b.flatten(1), weight.flatten(1)
    total = weight.sum(1, keepdim=True).clamp_min(1)
    a, b = (side - (weight * side).sum(1, keepdim=True) / total for side in (a, b))
    var_a, var_b = ((weight * side * side).sum(1) + _NOISE * total[:, 0] for side in (a, b))
    return (weight * a * b).sum(1) / (var_a * var_b).sqrt()


def _agreement(a: "Tensor", b: "Tensor", maps: "Tensor") -> "Tensor":
    """(P,) float64, 0..1: the correlation of a and the aligned b without light and shade, where both are to be seen."""
    from torch.nn.functional import max_pool2d

    b, there = _moved(b, maps)
    inside = 1 - max_pool2d(1 - there, 5, 1, 2)  # the rim of the other picture is no part of it
    sigma = _BLUR * a.shape[-1] / _EDGE
    share = _blur(there, sigma).clamp_min(1e-3)
    fine_a, fine_b = ((side - _blur(side * there, sigma) / share) * inside for side in (a, b))
    enough = there.mean((1, 2, 3)) >= _OVERLAP
    return (_correlation(fine_a, fine_b, inside) * enough).clamp(0, 1).double()
