"""3 x 3 convolutions in float32 by a quarter of the multiplications: Winograd's minimal filtering F(4 x 4, 3 x 3).

In: maps and weights of a convolution with stride 1. Out: what it computes, up to rounding, and its gradients: each tile of
6 x 6 pixels becomes 36 numbers for each channel, the k-th of all tiles and channels are one product of matrices with the k-th
weights, and what comes out becomes 4 x 4 pixels. Method and matrices: Lavin and Gray (2016), Fast Algorithms for
Convolutional Neural Networks. All that is added is multiplied by powers of two, which round nothing, so that no bit depends on
how a CPU puts multiplications and additions together.

Maps are (N, C, H, W), channels last, and inside of this file (N, H, W, C); tiles are (6, 6, N, rows, columns, C).
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

_READ, _GIVEN, _POINTS = 6, 4, 36  # pixels of a tile along one side, and of what it gives; numbers for each channel
# In multiplications of a convolution, measured: one of the products, what a channel of a tile takes on its way in or out, reading
# the weights once; and by how much less than the convolution it has to be.
_PRODUCT, _CHANNEL, _READING, _WORTH = 1.15, 60, 8, 0.8
_IN_CACHE = 4 << 20  # bytes of tiles, beside which the next step finds them
# Bytes of an image's tiles, at most, to be kept for the way back, where the map is kept anyway: they are 2.25 times as large.
_KEPT = 2 << 20
_MANY_TILES = 128  # from where on more at a time do not multiply faster
# G (x) G, which makes 36 numbers of the 9 weights between two channels. Nothing of the kind is needed for pixels: see below.
_G = [
    [1 / 4, 0, 0],
    [-1 / 6] * 3,
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_WEIGHTS = torch.kron(torch.tensor(_G, dtype=torch.float64), torch.tensor(_G, dtype=torch.float64))


def pays(conv: nn.Conv2d, images: int, size: tuple[int, int]) -> bool:
    """Whether a convolution is one of these, and faster so on a CPU; ``images``, ``size``: how many at once, (H, W) of what it gives."""
    geometry = conv.kernel_size, conv.stride, conv.dilation, conv.groups
    if geometry != ((3, 3), (1, 1), (1, 1), 1) or conv.weight.dtype != torch.float32:
        return False
    (rows, columns), c, k = _tiles_of(size), conv.in_channels, conv.out_channels
    tiles = images * rows * columns
    by_tiles = _POINTS * (_PRODUCT * (tiles + _READING) * c * k + _CHANNEL * tiles * (c + k))
    return by_tiles <= _WORTH * 9 * images * size[0] * size[1] * c * k


@functools.lru_cache(maxsize=256)
def are_rows_alike(images: int, size: tuple[int, int], inside: int, out: int) -> bool:
    """Whether products of matrices as large as a convolution's give a row the same bits wherever it lies.

    It takes a few milliseconds. Where a library computes the last rows otherwise, an embedding would depend on its place in a batch.
    """
    rows, columns = _tiles_of(size)
    for count in {len(range(images)[some]) for some in _at_once(images, rows * columns, max(inside, out))}:
        tiles = count * rows * columns
        a, b = (torch.linspace(-1, 1, 2 * n * inside).sin().view(2, n, inside) for n in (tiles, out))
        expected = torch.bmm(a, b.transpose(1, 2))
        for shift in (1, 7, tiles // 2 + 1):
            if not torch.equal(torch.bmm(a.roll(shift, 1), b.transpose(1, 2)), expected.roll(shift, 1)):
                return False
    return True


def of_weights(weight: torch.Tensor) -> torch.Tensor:
    """(K, C, 3, 3), best with K and C as its last dimensions in memory -> (36, K, C)."""
    k, c = weight.shape[:2]
    return (_WEIGHTS.to(weight.dtype) @ weight.permute(2, 3, 0, 1).reshape(9, k * c)).view(_POINTS, k, c)


def of_weights_back(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of what ``of_weights`` was given, (K, C, 3, 3) laid out so, for that of (36, K, C)."""
    k, c = gradient.shape[1:]
    return (_WEIGHTS.t().to(gradient.dtype) @ gradient.view(_POINTS, k * c)).view(3, 3, k, c).permute(2, 3, 0, 1)


def convolve(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    padding: Sequence[int],
    kept: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The convolution of maps (N, C, H, W), which are channels last, as is what comes of them.

    Args:
        weights: (36, K, C), as ``of_weights`` gives them. bias: (K,). padding: rows and columns of zeros at each side.
        kept: gets what spares ``back`` a tenth of its time, unless it is large.

    Returns:
        (N, K, H + 2 padding - 2, W + 2 padding - 2).
    """
    (n, c, h, w), k = x.shape, weights.shape[1]
    height, width = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    rows, columns = _tiles_of((height, width))
    y = _empty(x, n, k, rows * _GIVEN, columns * _GIVEN)
    x, parts = _last(x).contiguous(), _last(y).view(n, rows, _GIVEN, columns, _GIVEN, k)
    for some in _at_once(n, rows * columns, max(c, k)):
        part = parts[some]
        tiles = x.new_empty(_READ, _READ, len(part), rows, columns, c)
        products = torch.bmm(_of_map(x[some], padding, tiles).view(_POINTS, -1, c), weights.transpose(1, 2))
        if bias is not None:
            products[_READ + 1] += bias  # the only ones that every pixel of a tile gets once
        _to_map(products.view(_READ, _READ, len(part), rows, columns, k), part)
        if kept is not None and tiles.nbytes <= _KEPT * len(part):
            kept.append(tiles)
    if y.shape[2:] == (height, width):
        return y  # no view, which autograd lets nobody change
    return y[:, :, :height, :width].clone(memory_format=torch.channels_last)


def back(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    padding: Sequence[int],
    kept: list[torch.Tensor],
    needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of maps, of weights (36, K, C) and of the bias, as far as ``needed``, for that of what ``convolve`` gave.

    Args:
        x, weights, padding, kept: what ``convolve`` was given.
    """
    (n, k, height, width), (c, h, w) = gradient.shape, x.shape[1:]
    rows, columns = _tiles_of((height, width))
    gradient, x = _last(gradient).contiguous(), _last(x).contiguous()
    if (height, width) != (rows * _GIVEN, columns * _GIVEN):
        gradient = _padded(gradient, (0, 0), (rows * _GIVEN, columns * _GIVEN))
    gradient = gradient.view(n, rows, _GIVEN, columns, _GIVEN, k)
    of_x = _empty(gradient, n, c, h, w) if needed[0] else None
    of_w: torch.Tensor | None = None
    of_b = gradient.new_zeros(k) if needed[2] else None
    for number, some in enumerate(_at_once(n, rows * columns, max(c, k))):
        shape = _READ, _READ, len(x[some]), rows, columns
        products = _to_map_back(gradient[some], gradient.new_empty(*shape, k)).view(_POINTS, -1, k)
        if of_x is not None:
            _last(of_x)[some] = _of_map_back(torch.bmm(products, weights).view(*shape, c), padding, (h, w))
        if needed[1]:
            tiles = kept[number] if kept else _of_map(x[some], padding, x.new_empty(*shape, c))
            factors = products.transpose(1, 2), tiles.view(_POINTS, -1, c)
            of_w = torch.bmm(*factors) if of_w is None else of_w.baddbmm_(*factors)
        if of_b is not None:
            of_b += products[_READ + 1].sum(0)
    return of_x, of_w, of_b


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def _last(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, H, W, C), in the same memory."""
    return x.permute(0, 2, 3, 1)


def _tiles_of(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles that give a map of ``size``."""
    return -(-size[0] // _GIVEN), -(-size[1] // _GIVEN)


def _at_once(images: int, tiles: int, channels: int) -> Iterator[slice]:
    """Images whose tiles stay in the cache, if they are enough to multiply fast; ``tiles``, ``channels``: of one."""
    number = max(1, _IN_CACHE // (4 * _POINTS * tiles * channels), _MANY_TILES // tiles)
    number = max(1, -(-images // max(1, -(-images // number))))  # as many each time
    return (slice(start, min(start + number, images)) for start in range(0, max(1, images), number))


def _padded(x: torch.Tensor, before: Sequence[int], size: tuple[int, int]) -> torch.Tensor:
    """(N, H, W, C) with zeros around, as many as ``before`` says above and to the left, to ``size``."""
    (n, h, w, c), (top, left) = x.shape, before
    out = x.new_empty(n, *size, c)  # to fill it with zeros and then with pixels would write all of it twice
    rows = out[:, top : top + h]
    for border in (out[:, :top], out[:, top + h :], rows[:, :, :left], rows[:, :, left + w :]):
        border.zero_()
    rows[:, :, left : left + w] = x
    return out


def _of_map(x: torch.Tensor, padding: Sequence[int], out: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> tiles."""
    (n, _, _, c), (rows, columns) = x.shape, out.shape[3:5]
    height, width = (count * _GIVEN + _READ - _GIVEN for count in (rows, columns))
    padded, points = _padded(x, padding, (height, width)), x.new_empty(n, rows, _READ, width, c)
    _points_of(padded.unfold(1, _READ, _GIVEN).movedim(-1, 0), points.movedim(2, 0))
    _points_of(points.unfold(3, _READ, _GIVEN).movedim((-1, 2), (0, 1)), out.transpose(0, 1))
    return out


def _of_map_back(gradient: torch.Tensor, padding: Sequence[int], size: tuple[int, int]) -> torch.Tensor:
    """Tiles -> (N, H, W, C): the gradient of what ``_of_map`` was given."""
    n, rows, columns, c = gradient.shape[2:]
    (h, w), (top, left) = size, padding
    points = gradient.new_empty(_READ, n, rows, columns + 1, _GIVEN, c)
    _points_back(gradient.transpose(0, 1), points.movedim(4, 0), 4)
    found = gradient.new_empty(n, rows + 1, _GIVEN, (columns + 1) * _GIVEN, c)
    _points_back(points.flatten(3, 4), found.movedim(2, 0), 2)
    return found.flatten(1, 2)[:, top : top + h, left : left + w]


def _to_map(tiles: torch.Tensor, out: torch.Tensor) -> None:
    """Tiles -> (N, rows, 4, columns, 4, C)."""
    _, _, n, rows, columns, c = tiles.shape
    points = tiles.new_empty(n, rows, _GIVEN, _READ, columns, c)
    _values_of(tiles, points.permute(2, 3, 0, 1, 4, 5))
    _values_of(points.permute(3, 0, 1, 2, 4, 5), out.movedim(4, 0))


def _to_map_back(gradient: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """(N, rows, 4, columns, 4, C) -> tiles: the gradient of what ``_to_map`` was given."""
    n, rows, _, columns, _, c = gradient.shape
    points = gradient.new_empty(n, rows, _READ, columns, _GIVEN, c)
    _values_back(gradient.movedim(2, 0), points.movedim(2, 0))
    _values_back(points.movedim((4, 2), (0, 1)), out.transpose(0, 1))
    return out


# Along one side of the tiles, which comes first in what is given. Multiplied out, without the matrices, whose products have
# most factors in common; two rows are computed by one call where they lie side by side.


def _points_of(d: torch.Tensor, out: torch.Tensor) -> None:
    """B^T d: (6, ...) -> (6, ...)."""
    b, a = both = torch.add(d[3:5], d[1:3], alpha=-4)
    torch.add(a, b, out=out[1])
    torch.sub(a, b, out=out[2])
    b, a = torch.sub(d[3:5], d[1:3], out=both)
    torch.add(a, b, alpha=2, out=out[3])
    torch.sub(a, b, alpha=2, out=out[4])
    torch.add(a, torch.sub(d[0], d[2], out=out[0]), alpha=4, out=out[0])
    torch.sub(torch.sub(d[5], d[3], out=out[5]), b, alpha=4, out=out[5])


def _points_back(g: torch.Tensor, out: torch.Tensor, dim: int) -> None:
    """B g: (6, ...) -> (4, ...), pixels; along ``dim``, that of tiles, ``out`` has one more, as each reads two pixels of the next."""
    p, r = torch.add(g[1:4:2], g[2:5:2])
    q, s = torch.sub(g[1:4:2], g[2:5:2])
    tiles = g.shape[dim]
    own, following = out.narrow(dim, 0, tiles), out.narrow(dim, 1, tiles)
    out.narrow(dim, tiles, 1).zero_()
    torch.mul(g[0], 4, out=own[0])
    b = torch.sub(g[5], q)
    torch.sub(torch.mul(b, 4), s, alpha=2, out=own[1])
    torch.sub(torch.mul(s, 2), b.add_(g[5], alpha=4), out=own[3])
    a = torch.add(g[0], p)
    torch.add(torch.add(g[0], r), a, alpha=4, out=own[2]).neg_()
    following[0].add_(a).add_(r)
    following[1].add_(g[5])


def _values_of(m: torch.Tensor, out: torch.Tensor) -> None:
    """A^T m: (6, ...) -> (4, ...)."""
    p, r = torch.add(m[1:4:2], m[2:5:2])
    q, s = torch.sub(m[1:4:2], m[2:5:2])
    torch.add(m[0], p, out=out[0]).add_(r)
    torch.add(q, s, alpha=2, out=out[1])
    torch.add(p, r, alpha=4, out=out[2])
    torch.add(m[5], q, out=out[3]).add_(s, alpha=8)


def _values_back(g: torch.Tensor, out: torch.Tensor) -> None:
    """A g: (4, ...) -> (6, ...)."""
    out[0].copy_(g[0])
    out[5].copy_(g[3])
    even, odd = both = torch.add(g[0:2], g[2:4])
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    even, odd = torch.add(g[0:2], g[2:4], alpha=4, out=both)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
