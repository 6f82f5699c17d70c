"""Random changes to training images, with torchvision's v2 kernels, on the CPU whatever device trains.

In: uint8 pixels (H, W, 3) of one image, the steps of a recipe, (seed, epoch, image). Out: uint8 (height, width, 3). These three
numbers alone decide what is drawn: not the batch, the worker, the process, or where a run was resumed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featcache.finetuning.recipe_values import Step
from featcache.finetuning.training_input import Picture
from featcache.system.lazy_imports import compiler_on_demand

with compiler_on_demand():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

_RATIO = (3 / 4, 4 / 3)  # of RandomResizedCrop, as usual


def augment(
    pixels: torch.Tensor, steps: Sequence[Step], *, size: tuple[int, int], seed: tuple[int, int, int]
) -> torch.Tensor:
    """Apply ``steps`` to one image.

    Args:
        pixels: uint8 (H, W, 3).
        steps: each a name of ``STEPS`` and its numbers, as ``recipe_values.STEP_NUMBERS`` bounds them.
        size: (height, width) of the result; an image that no step brings to it is resized.
        seed: (seed, epoch, image): the same gives the same result.
    """
    random = np.random.default_rng(seed)
    image = pixels.permute(2, 0, 1)
    for name, *numbers in steps:
        image = STEPS[str(name)](image, random, size, *(float(number) for number in numbers))
    if image.shape[1:] != size:
        image = _resize(image, size)
    return image.permute(1, 2, 0)


def augment_picture(
    picture: Picture, steps: Sequence[Step], *, size: tuple[int, int], seed: tuple[int, int, int]
) -> torch.Tensor:
    """``augment`` for a decoded picture as ``pixels`` keeps it: what an epoch shows the network of an image."""
    # Of a file's pictures a copy: tensors dislike memory that is not writable.
    writable = np.require(picture, requirements=["C", "W"])
    return augment(torch.from_numpy(writable), steps, size=size, seed=seed)


def prepare() -> None:
    """Called where a worker process is to draw."""
    torch.set_num_threads(1)


def work(memory: npt.NDArray[np.uint8], task: tuple[Any, ...]) -> None:
    """Draw in a worker process: from pictures in ``memory`` to rows there. Of each its place, shape, seed, and its row's place."""
    steps, size, places = task
    for start, shape, seed, row in places:
        picture = memory[start : start + math.prod(shape)].reshape(shape)
        drawn = augment_picture(picture, steps, size=size, seed=seed)
        memory[row : row + drawn.numel()].reshape(drawn.shape)[:] = drawn.numpy()


def _resized_crop(
    image: torch.Tensor, random: np.random.Generator, size: tuple[int, int], least: float, most: float, margin: float
) -> torch.Tensor:
    """A random part of ``least`` to ``most`` of the area, resized to ``margin`` times the result's size (Szegedy 2015)."""
    height, width = image.shape[1:]
    top, left, h, w = _random_box(random, height, width, least, most)
    target = (round(size[0] * margin), round(size[1] * margin))
    return _resize(image[:, top : top + h, left : left + w], target)


def _random_box(
    random: np.random.Generator, height: int, width: int, least: float, most: float
) -> tuple[int, int, int, int]:
    """(top, left, height, width): ten tries, then the largest centred box of an allowed ratio, as torchvision does."""
    for _ in range(10):
        area = height * width * random.uniform(least, most)
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    resized: torch.Tensor = functional.resize(
        image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    return resized


def _flip(image: torch.Tensor, random: np.random.Generator, _: tuple[int, int], share: float) -> torch.Tensor:
    return image.flip(2) if random.random() < share else image


def _rotate(image: torch.Tensor, random: np.random.Generator, _: tuple[int, int], degrees: float) -> torch.Tensor:
    angle = float(random.uniform(-degrees, degrees))
    rotated: torch.Tensor = functional.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)
    return rotated


def _jitter(
    image: torch.Tensor,
    random: np.random.Generator,
    _: tuple[int, int],
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> torch.Tensor:
    image = functional.adjust_brightness(image, float(random.uniform(1 - brightness, 1 + brightness)))
    image = functional.adjust_contrast(image, float(random.uniform(1 - contrast, 1 + contrast)))
    image = functional.adjust_saturation(image, float(random.uniform(1 - saturation, 1 + saturation)))
    return functional.adjust_hue(image, float(random.uniform(-hue, hue))) if hue else image


def _center_crop(image: torch.Tensor, _: np.random.Generator, size: tuple[int, int]) -> torch.Tensor:
    cropped: torch.Tensor = functional.center_crop(image, list(size))
    return cropped


STEPS: dict[str, Callable[..., torch.Tensor]] = {
    "resized_crop": _resized_crop,
    "flip": _flip,
    "rotate": _rotate,
    "jitter": _jitter,
    "center_crop": _center_crop,
}
