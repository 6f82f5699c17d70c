"""Photographs to measure with where the user gave none. In: an empty folder. Out: JPEGs in it that cost what photographs cost."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.images.source import ImageList, list_images


def generated_photos(folder: Path, count: int = 64) -> ImageList:
    """Write JPEGs that cost a decoder as much as photographs do. Every call writes the same ones.

    Args:
        folder: exists, and is empty.
        count: of files of 500x375 pixels and some 25 to 60 KB.
    """
    rng = np.random.default_rng(0)
    fine = _noise(rng, (1024, 768), 1) + _noise(rng, (1024, 768), 3)  # costly: each photo gets a part of the same
    for number in range(count):
        pixels = 128 + sum(_noise(rng, (500, 375), step) for step in (8, 20, 50, 125))
        left, top = (int(rng.integers(edge)) for edge in (1024 - 500, 768 - 375))
        pixels += rng.uniform(0.4, 1.6) * fine[top : top + 375, left : left + 500]  # some are smooth, some textured
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        picture.save(folder / f"{number:04d}.jpg", quality=90)
    return list_images(folder, labelled=False)


def _noise(rng: np.random.Generator, size: tuple[int, int], step: int) -> npt.NDArray[np.float32]:
    """Noise (height, width, 3) around 0, smooth over ``step`` pixels; the finer the fainter, as in natural images."""
    width, height = size
    coarse = (height // step + 2, width // step + 2)
    levels = 128 + 40 * rng.standard_normal((*coarse, 1), np.float32)
    levels = levels + 16 * rng.standard_normal((*coarse, 3), np.float32)
    layer = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return (np.asarray(layer, np.float32) - 128) * np.float32(step**0.5 / 14)
