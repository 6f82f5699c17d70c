"""From a decoded image to the numbers a backbone sees: resize, crop, scale, normalise.

In: upright 8-bit RGB pixels and a ``PreprocessSpec``. Out: uint8 pixels (H, W, 3), then float32 (N, 3, H, W).
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.spec import PreprocessSpec

if TYPE_CHECKING:
    import torch


def to_pixels(image: npt.NDArray[np.uint8], spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Resize and centre-crop, as torchvision's ``Resize`` and ``CenterCrop`` do on PIL images.

    From upright RGB, uint8 (height, width, 3), to uint8 (H, W, 3), ``(H, W) == spec.crop``.

    Bilinear and bicubic by PyTorch's antialiased filters for uint8: Pillow's algorithm, vectorised, twice as fast; its
    weights are rounded to 16 bits, so that a few values in a hundred differ by one of the 256 levels. Others by Pillow.
    """
    size = spec.resized(*image.shape[:2])
    top, left = (round((edge - kept) / 2.0) for edge, kept in zip(size, spec.crop, strict=True))
    if size == image.shape[:2]:
        resized = image
    elif spec.interpolation in ("bilinear", "bicubic"):
        resized = _resize(image, size, spec.interpolation)
    else:
        method = Image.Resampling[spec.interpolation.upper()]
        resized = np.asarray(Image.fromarray(image).resize(size[::-1], method))
    return resized[top : top + spec.crop[0], left : left + spec.crop[1]]


def _resize(pixels: npt.NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> npt.NDArray[np.uint8]:
    """(h, w, 3) -> (*size, 3)."""
    import torch
    from torch.nn.functional import interpolate

    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels_last in memory, as the fast kernel wants it
    result = interpolate(planes, size, mode=interpolation, antialias=True, align_corners=False)
    return result[0].permute(1, 2, 0).numpy()


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
