"""From a decoded image to the numbers a backbone sees: resize, crop, scale, normalise.

In: upright 8-bit RGB pixels and a ``PreprocessSpec``. Out: uint8 pixels (H, W, 3), then float32 (N, 3, H, W).
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.spec import PreprocessSpec

if TYPE_CHECKING:
    import torch

MOST_PIXELS = 2**23  # of an image resized whole: 128 times as long as wide at 256 pixels


def to_pixels(image: npt.NDArray[np.uint8], spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Resize and centre-crop, as torchvision's ``Resize`` and ``CenterCrop`` do on PIL images.

    From upright RGB, uint8 (height, width, 3), to uint8 (H, W, 3), ``(H, W) == spec.crop``.

    Bilinear and bicubic by PyTorch's antialiased filters for uint8: Pillow's algorithm, vectorised, twice as fast; its
    weights are rounded to 16 bits, so that a few values in a hundred differ by one of the 256 levels, bicubic ones hardly
    ever by two. Its horizontal pass comes first, as in Pillow before 13, which begins with the vertical one where the height
    loses more than twice the pixels that the width does, as in shrinking what is more than twice as tall as wide. Rounded and
    cut off in between is then something else: up to a third of the values differ, bilinear ones by one level, bicubic ones by
    a few in photos and by up to 30 in noise. Others by Pillow, as is what the crop shows of images so narrow that whole they
    would have more than ``MOST_PIXELS``.
    """
    size = spec.resized(*image.shape[:2])
    top, left = cropped_at(size, spec)
    if size == image.shape[:2]:
        resized = image
    elif size[0] * size[1] > MOST_PIXELS:
        return _resize_window(image, size, (top, left), spec)
    elif spec.interpolation in ("bilinear", "bicubic"):
        resized = resize(image, size, spec.interpolation)
    else:
        resized = np.asarray(Image.fromarray(image).resize(size[::-1], _method(spec)))
    return resized[top : top + spec.crop[0], left : left + spec.crop[1]]


def cropped_at(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """Top and left of the crop of an image resized to ``size``; torchvision's rounding."""
    top, left = (round((edge - kept) / 2.0) for edge, kept in zip(size, spec.crop, strict=True))
    return top, left


def resize(pixels: npt.NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> npt.NDArray[np.uint8]:
    """uint8 (h, w, 3) -> (*size, 3), bilinear or bicubic, antialiased."""
    import torch
    from torch.nn.functional import interpolate

    # The batch's own stride has to be right, too, though there is one image: else the result is planar, and slow to copy.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    result = interpolate(planes, size, mode=interpolation, antialias=True, align_corners=False)
    return result[0].permute(1, 2, 0).numpy()


def _resize_window(
    pixels: npt.NDArray[np.uint8], size: tuple[int, int], corner: tuple[int, int], spec: PreprocessSpec
) -> npt.NDArray[np.uint8]:
    """What the crop at ``corner`` (top, left) shows of (h, w, 3) resized to ``size``, without resizing the rest."""
    kept, box = [], []
    for edge, whole, first, count in zip(pixels.shape, size, corner, spec.crop, strict=False):
        scale = edge / whole
        start, stop, reach = (
            first * scale,
            (first + count) * scale,
            math.ceil(3 * max(scale, 1)),
        )  # 3: Lanczos's support
        low, high = max(int(start) - reach, 0), min(math.ceil(stop) + reach, edge)
        kept.append(slice(low, high))
        box.append((start - low, min(stop, high) - low))
    (top, bottom), (left, right) = box
    window = Image.fromarray(np.ascontiguousarray(pixels[kept[0], kept[1]]))
    return np.asarray(window.resize(spec.crop[::-1], _method(spec), box=(left, top, right, bottom)))


def _method(spec: PreprocessSpec) -> Image.Resampling:
    return Image.Resampling[spec.interpolation.upper()]


def channel_constants(spec: PreprocessSpec, device: "torch.device") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mean and std as float32 tensors (1, 3, 1, 1) on ``device``."""
    import torch  # here, so that reading a spec or a cache needs no torch (seconds of import)

    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1).to(device) for values in (spec.mean, spec.std)
    )
    return mean, std


def normalise(pixels: "torch.Tensor", mean: "torch.Tensor", std: "torch.Tensor") -> "torch.Tensor":
    """Scale uint8 pixels (N, H, W, 3) to 0..1 and normalise per channel, on the device they are on.

    By ``channel_constants``. Returns float32 (N, 3, H, W), channels_last in memory.
    """
    n, height, width, _ = pixels.shape
    # Over whole rows, the constants repeated: across three interleaved channels the same arithmetic takes eight times as long.
    means, stds = (values.flatten().repeat(width) for values in (mean, std))  # (W * 3,)
    rows = pixels.reshape(n * height, 3 * width).to(mean.dtype).div_(255).sub_(means).div_(stds)
    return rows.view(n, height, width, 3).permute(0, 3, 1, 2)
