"""From a decoded image to the numbers a backbone sees: resize, crop, scale, normalise.

In: upright 8-bit RGB pixels and a ``PreprocessSpec``. Out: uint8 pixels (H, W, 3), then float32 (N, 3, H, W).
The spec is frozen and stored with every embedding; nothing that changes the numbers is decided anywhere else.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.errors import UsageError

if TYPE_CHECKING:
    import torch

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
DECODING = ("full scale", "reduced scale")
_MAX_EDGE = 2048
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """Everything between a file's bytes and the backbone's input.

    Attributes:
        resize: pixels of the shorter edge (aspect ratio kept), or ``(height, width)`` (aspect ratio not kept).
        crop: ``(height, width)`` of the centre crop; also the size of the backbone's input.
        interpolation: resampling filter of the resize.
        mean, std: per-channel normalisation of values in 0..1.
        decode: ``full scale``, or ``reduced scale``: JPEGs much larger than ``resize`` are decoded at 1/2, 1/4 or 1/8 of
            their size, several times as fast, to somewhat other pixels (``images.reduction``).
        orientation, alpha, deep, frame, profile: how unusual files become 8-bit RGB (``images.decode``).
            They have one value each today; they are stored so that a later change can never pass unnoticed.

    Raises:
        UsageError: sizes, filter or normalisation make no sense.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool = True
    orientation: str = "exif applied"
    alpha: str = "composited on white"
    deep: str = "16 bit scaled to 8"
    frame: str = "first"
    profile: str = "ignored"
    decode: str = "full scale"

    def __post_init__(self) -> None:
        edges = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if not all(type(edge) is int for edge in (*edges, *self.crop)) or len(edges) != 2 or len(self.crop) != 2:
            raise UsageError(f"resize {self.resize} and crop {self.crop} must be whole pixels, height and width")
        if min(*edges, *self.crop) < 1 or max(*edges, *self.crop) > _MAX_EDGE:
            raise UsageError(f"resize {self.resize} and crop {self.crop} must lie between 1 and {_MAX_EDGE} pixels")
        if edges[0] < self.crop[0] or edges[1] < self.crop[1]:
            raise UsageError(
                f"resize {self.resize} is smaller than crop {self.crop}; make the resize at least as large"
            )
        if self.interpolation not in _RESAMPLING:
            raise UsageError(f"unknown interpolation {self.interpolation!r}; choose one of {', '.join(_RESAMPLING)}")
        numbers = all(isinstance(value, int | float) and abs(value) < 1e6 for value in (*self.mean, *self.std))
        if not numbers or len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise UsageError(f"mean and std must be three numbers, std positive; found {self.mean} and {self.std}")
        if self.decode not in DECODING:
            raise UsageError(f"unknown decoding {self.decode!r}; choose one of {', '.join(DECODING)}")
        for field in dataclasses.fields(self):
            if field.name == "decode":
                continue
            if field.default is not dataclasses.MISSING and getattr(self, field.name) != field.default:
                raise UsageError(f"{field.name} {getattr(self, field.name)!r} is not known, only {field.default!r} is")

    @property
    def decode_at_least(self) -> int | None:
        """Pixels of the shorter edge that decoding must leave; None: all of them."""
        if self.decode == "full scale":
            return None
        return self.resize if isinstance(self.resize, int) else max(self.resize)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_json`` gives back an equal spec."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PreprocessSpec":
        """Rebuild a spec. Raises UsageError for unknown, missing or impossible fields."""
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise UsageError(f"not a preprocessing spec of this version: {error}") from error

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) an image is resized to before the crop; torchvision's rounding."""
        if not isinstance(self.resize, int):
            return self.resize
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize


def to_pixels(image: npt.NDArray[np.uint8], spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Resize and centre-crop, as torchvision's ``Resize`` and ``CenterCrop`` do on PIL images.

    Bilinear and bicubic by PyTorch's antialiased filters for uint8: Pillow's algorithm, vectorised, twice as fast; its
    weights are rounded to 16 bits, so that a few values in a hundred differ by one of the 256 levels. Others by Pillow.

    Args:
        image: upright RGB, uint8 (height, width, 3), as ``decoders.decode_pixels`` returns it.
        spec: sizes and filter.

    Returns:
        uint8 array (H, W, 3), ``(H, W) == spec.crop``.
    """
    size = spec.resized(*image.shape[:2])
    top, left = (round((edge - kept) / 2.0) for edge, kept in zip(size, spec.crop, strict=True))
    if size == image.shape[:2]:
        resized = image
    elif spec.interpolation in ("bilinear", "bicubic"):
        resized = _resize(image, size, spec.interpolation)
    else:
        resized = np.asarray(Image.fromarray(image).resize(size[::-1], _RESAMPLING[spec.interpolation]))
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
    """Scale uint8 pixels to 0..1 and normalise per channel, on the device they are on.

    Args:
        pixels: uint8 tensor (N, H, W, 3).
        mean, std: as ``channel_constants`` returns them.

    Returns:
        float32 tensor (N, 3, H, W), channels_last in memory.
    """
    n, height, width, _ = pixels.shape
    # Over whole rows, the constants repeated: across three interleaved channels the same arithmetic takes eight times as long.
    means, stds = (values.flatten().repeat(width) for values in (mean, std))  # (W * 3,)
    rows = pixels.reshape(n * height, 3 * width).to(mean.dtype).div_(255).sub_(means).div_(stds)
    return rows.view(n, height, width, 3).permute(0, 3, 1, 2)
