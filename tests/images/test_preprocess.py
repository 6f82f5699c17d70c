"""Oracle: torchvision's own transforms on PIL images, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional
from torchvision.transforms._presets import ImageClassification

from featcache.images.preprocess import channel_constants, normalise, to_pixels
from featcache.spec import PreprocessSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [
    (500, 375),
    (375, 500),
    (224, 224),
    (256, 256),
    (1, 300),
    (300, 1),
    (31, 33),
    (1023, 67),
    (257, 255),
    (640, 481),
]


def spec(**changes: object) -> PreprocessSpec:
    values: dict = {"resize": 256, "crop": (224, 224), "interpolation": "bilinear", "mean": MEAN, "std": STD}
    return PreprocessSpec(**(values | changes))


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize(
    "interpolation",
    ["bilinear", "bicubic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nearest", "lanczos"))],
)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_resize_then_crop(size: tuple[int, int], interpolation: str) -> None:
    image = picture(*size)
    mode = functional.InterpolationMode(interpolation)
    crops = {256: (224, 224), 255: (224, 224), 232: (224, 224), 224: (224, 224), 40: (33, 32), (50, 61): (41, 60)}
    for resize, crop in crops.items():
        expected = functional.center_crop(functional.resize(image, resize, mode), list(crop))
        ours = to_pixels(np.array(image), spec(resize=resize, crop=crop, interpolation=interpolation))
        difference = np.abs(ours.astype(int) - np.asarray(expected))
        # Noise is the worst case: a grid off by one pixel would differ by 85 levels on average.
        assert difference.max() <= (0 if interpolation == "nearest" else 2)
        assert difference.mean() <= 0.05


@pytest.mark.parametrize("size", [(256, 256), (300, 256), (256, 411)])
def test_whole_path_equals_the_preset_bit_for_bit_where_nothing_is_resampled(size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = ImageClassification(crop_size=224, resize_size=256)(image)
    pixels = torch.from_numpy(np.stack([to_pixels(np.array(image), spec())] * 2))
    batch = normalise(pixels, *channel_constants(spec(), torch.device("cpu")))
    for ours in batch:
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert batch.is_contiguous(memory_format=torch.channels_last)
