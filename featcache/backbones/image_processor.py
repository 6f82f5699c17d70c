"""What an image processor of transformers does, as a ``PreprocessSpec``: read from its settings, then compared on a picture.

In: a processor. Out: the spec; a processor that does more than the spec can say is refused, as is one whose settings mean something
else in its own code.
"""

from typing import Any

import numpy as np

from featcache.errors import BackboneError
from featcache.images.preprocess import to_pixels
from featcache.spec import PreprocessSpec

_WARPED = 384  # pixels from which on ConvNeXt's processor resizes without a crop
_ROUNDING = 1.5  # levels of 256, on average: what filters with rounded weights differ by; another filter, ten
_OF_PIL = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def preprocessing_of(name: str, processor: Any) -> PreprocessSpec:
    """What ``processor`` does for the backbone ``name``. Raises BackboneError: it does something that no spec says."""
    try:
        spec = _spec_of(processor)
        picture = _picture(spec)
        theirs = processor(picture, return_tensors="pt")["pixel_values"]
    except Exception as error:  # of a class that takes other things, or asks for other steps
        raise BackboneError(
            f"{name} prepares images in a way featcache does not know: {' '.join(str(error).split())[:200]}"
        ) from error
    shown = tuple(theirs.shape)
    if shown == (1, 3, *spec.crop):
        levels = theirs[0].permute(1, 2, 0).numpy() * np.array(spec.std) + np.array(spec.mean)
        if np.abs(levels * 255 - to_pixels(picture, spec)).mean() <= _ROUNDING:
            return spec
    raise BackboneError(
        f"{name} prepares images in a way featcache does not know ({type(processor).__name__}, its output is {shown})"
    )


def _spec_of(processor: Any) -> PreprocessSpec:
    """The steps that most processors do: resize, centre crop, normalise."""
    size, edge = processor.size, processor.size.shortest_edge
    if not processor.do_resize:
        raise BackboneError("it does not resize")
    resize: int | tuple[int, int] = int(edge) if edge else (int(size.height), int(size.width))
    if getattr(processor, "crop_pct", None) and edge:  # of ConvNeXt
        crop = (int(edge), int(edge))
        resize = int(edge / processor.crop_pct) if edge < _WARPED else crop
    elif processor.do_center_crop:
        crop = (int(processor.crop_size.height), int(processor.crop_size.width))
    elif isinstance(resize, tuple):
        crop = resize
    else:
        raise BackboneError("its images differ in shape")
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    kind: Any = _OF_PIL.get(int(processor.resample), f"filter {processor.resample}")
    return PreprocessSpec(resize=resize, crop=crop, interpolation=kind, mean=tuple(mean), std=tuple(std))


def _picture(spec: PreprocessSpec) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise, uint8 (H, W, 3), of such a size that the crop cuts a whole number of pixels off each side."""
    short = spec.resize if isinstance(spec.resize, int) else min(spec.resize)
    wide = spec.crop[1] + 4 * (max(short - spec.crop[1], 0) // 4 + short // 8 + 1)
    return np.random.default_rng(0).integers(0, 256, (2 * short, 2 * wide, 3), dtype=np.uint8)
