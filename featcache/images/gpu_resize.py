"""Resize and crop images of different sizes together, on the GPU that decoded them.

In: RGB images of about one size, uint8 (3, h, w), and a ``PreprocessSpec``. Out: uint8 (n, H, W, 3). Each is a product of matrices,
weights of rows x pixels x weights of columns: a few calls for all of them, where a resize of each would take a GPU less time than
the processor needs to ask for it.

Weights are those of PyTorch's antialiased ``interpolate``, which are Pillow's: a filter as wide as the step between two results.
As there, they are rounded to integers, and what one direction gives is rounded before the other one. All sums are then whole
numbers below 2**24, which float32 holds exactly: no bit of an image depends on its neighbours, or on which GPU adds up in what order.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featcache.images.preprocess import cropped_at
from featcache.spec import PreprocessSpec

if TYPE_CHECKING:
    import torch

_REACH = {"bilinear": 1.0, "bicubic": 2.0}  # of the filter, in steps
_PARTS = 4096, 2048  # what weights are counted in, of columns and of rows
_LEVELS = 16  # what values are counted in between the two
_A = -0.5  # Keys's cubic (1981), as Pillow has it


def resize_and_crop(images: "Sequence[torch.Tensor]", spec: PreprocessSpec) -> "torch.Tensor":
    """uint8 (n, H, W, 3) of ``images``, each uint8 (3, h, w): what an antialiased resize and a centred crop leave of them."""
    import torch

    from featcache.system.device import true_float32

    sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    height, width = (max(edges) for edges in zip(*sizes, strict=True))
    whole = torch.empty((len(images), 3, height, width), dtype=torch.uint8, device=images[0].device)
    # What lies beside an image has no weight.
    places = [
        each if size == (height, width) else each[:, : size[0], : size[1]]
        for each, size in zip(whole.unbind(), sizes, strict=True)
    ]
    torch._foreach_copy_(places, list(images))
    columns, rows = _weights(sizes, spec, whole.device)  # (n, W, width), (n, H, height)
    with true_float32:
        wide = whole.flatten(1, 2).float() @ columns.transpose(1, 2)  # (n, 3 * height, W)
        wide = wide.mul_(_LEVELS / _PARTS[0]).round_().view(len(images), 3, height, -1)
        done: torch.Tensor = rows[:, None] @ wide  # (n, 3, H, W)
    done = done.mul_(1 / (_LEVELS * _PARTS[1])).round_().clamp_(0, 255)
    return done.to(torch.uint8).permute(0, 2, 3, 1)


def _weights(
    sizes: Sequence[tuple[int, int]], spec: PreprocessSpec, device: "torch.device"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """float32 (n, W, longest width), (n, H, longest height): what each pixel along an edge counts in each that is kept.

    In ``_PARTS``. Both edges at once: what a processor asks a GPU for, with Python's lock between one thing and the next, takes longer
    than the GPU does.
    """
    import torch

    resized = [spec.resized(*size) for size in sizes]
    corners = [cropped_at(size, spec) for size in resized]
    given: npt.NDArray[np.float32] = np.array([sizes, resized, corners], np.float32)[
        :, :, ::-1
    ]  # (3, n, 2): columns, rows
    parts = np.broadcast_to(np.array(_PARTS, np.float32), (1, len(sizes), 2))
    numbers = torch.from_numpy(np.concatenate([given, parts]).transpose(0, 2, 1).reshape(4, -1, 1, 1).copy())
    edge, whole, corner, part = numbers.to(device, non_blocking=True).unbind()  # each (2 n, 1, 1)
    step = edge / whole
    width = step.clamp(min=1)
    kept, longest = max(spec.crop), max(max(size) for size in sizes)
    centre = step * (corner + torch.arange(kept, device=device)[:, None] + 0.5)  # (2 n, kept, 1)
    pixel = torch.arange(longest, device=device)
    reach = _REACH[spec.interpolation] * width
    inside = (pixel >= (centre - reach + 0.5).floor_().clamp_(min=0)) & (
        pixel < (centre + reach + 0.5).floor_().minimum(edge)
    )
    weights: torch.Tensor = _filter((pixel - centre + 0.5) / width, spec.interpolation) * inside
    # Each row of weights sums to 1, but beyond the crop's shorter edge, which nobody reads.
    columns, rows = (weights / weights.sum(2, keepdim=True)).mul_(part).round_().chunk(2)
    heights, widths = zip(*sizes, strict=True)
    return columns[:, : spec.crop[1], : max(widths)], rows[:, : spec.crop[0], : max(heights)]


def _filter(x: "torch.Tensor", interpolation: str) -> "torch.Tensor":
    """The filter at ``x`` steps from its middle."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_(min=0)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return near.where(x < 1, far.where(x < 2, x.new_zeros(())))
