"""Oracle: torchvision's own transforms on PIL images, bit for bit."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional
from torchvision.transforms._presets import ImageClassification

from featcache.images.preprocess import MOST_PIXELS, channel_constants, normalise, to_pixels
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

FILTERS = pytest.mark.parametrize(
    "interpolation",
    ["bilinear", "bicubic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nearest", "lanczos"))],
)


def spec(**changes: object) -> PreprocessSpec:
    values: dict = {"resize": 256, "crop": (224, 224), "interpolation": "bilinear", "mean": MEAN, "std": STD}
    return PreprocessSpec(**(values | changes))


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@FILTERS
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


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "to"),  # width, height
    [
        ((60, 118), (103, 93)),
        ((6, 118), (103, 93)),
        ((118, 60), (93, 103)),
        ((262, 562), (224, 480)),
        ((101, 672), (40, 266)),
        ((50, 60), (256, 205)),
    ],
)
def test_the_horizontal_pass_comes_first(size: tuple[int, int], to: tuple[int, int], interpolation: str) -> None:
    """Pillow 13 begins with the vertical one where the height loses more than twice what the width does; the rest is equal."""
    image, method = picture(*size), Image.Resampling[interpolation.upper()]
    ours = to_pixels(np.array(image), spec(resize=to[::-1], crop=to[::-1], interpolation=interpolation)).astype(int)
    passes = image.resize((to[0], size[1]), method).resize(to, method)
    difference = np.abs(ours - np.asarray(passes))
    assert difference.max() <= (1 if interpolation == "bilinear" else 2) and (difference > 0).mean() < 0.02
    vertical_first = size[1] - to[1] > max(2 * (size[0] - to[0]), 0)
    difference = np.abs(ours - np.asarray(image.resize(to, method)))
    assert ((difference > 0).mean() < 0.02) is not vertical_first
    assert difference.max() <= (1 if interpolation == "bilinear" else 30) and (difference > 0).mean() < 1 / 3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64)])
def test_resized_pixels_are_interleaved(size: tuple[int, int], interpolation: str) -> None:
    """Planes would be to the same values, but copying them into a batch takes as long as the resize."""
    pixels = to_pixels(np.array(picture(*size)), spec(interpolation=interpolation))
    assert pixels.strides[1:] == (3, 1)


@pytest.mark.parametrize("size", [(256, 256), (300, 256), (256, 411)])
def test_whole_path_equals_the_preset_bit_for_bit_where_nothing_is_resampled(size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = ImageClassification(crop_size=224, resize_size=256)(image)
    pixels = torch.from_numpy(np.stack([to_pixels(np.array(image), spec())] * 2))
    batch = normalise(pixels, *channel_constants(spec(), torch.device("cpu")))
    for ours in batch:
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert batch.is_contiguous(memory_format=torch.channels_last)


@FILTERS
@pytest.mark.parametrize(
    ("size", "resize", "crop"), [((1, 9000), 40, 32), ((16_001, 2), 33, 20), ((300, 40_000), 256, 224)]
)
def test_of_a_narrow_image_only_what_the_crop_shows_is_resized(
    size: tuple[int, int], resize: int, crop: int, interpolation: str
) -> None:
    """To the pixels that torchvision gets by resizing it whole."""
    y, x = (90 * np.sin(np.arange(edge)[:, None] / [3, 5, 7]) for edge in size[::-1])
    image = (120 + y[:, None] / 2 + x[None] / 2).astype(np.uint8)
    whole = functional.resize(Image.fromarray(image), resize, functional.InterpolationMode(interpolation))
    assert whole.width * whole.height > MOST_PIXELS
    expected = functional.center_crop(whole, [crop, crop])
    ours = to_pixels(image, spec(resize=resize, crop=(crop, crop), interpolation=interpolation))
    difference = np.abs(ours.astype(int) - np.asarray(expected))
    assert difference.max() <= 2 or (
        interpolation == "nearest" and (difference > 0).mean() <= 0.05
    )  # halves are rounded


@pytest.mark.skipif(sys.platform != "linux", reason="the process reads how much it has from /proc")
def test_memory_is_bounded_by_the_crop(tmp_path: Path) -> None:
    """A PNG of 270 bytes, 65,000 pixels wide, in 100 MB more than the libraries take; resized whole it would be 12.8 GB.

    Another, whose pixels alone take more, is refused, and the next image is read.
    """
    sizes = {"wide": (65_000, 1), "tall": (1, 65_000), "narrow": (4, 20_000), "large": (5000, 5000), "last": (9, 9)}
    for name, size in sizes.items():
        Image.new("L", size, 200).save(tmp_path / f"{name}.png")
    assert (tmp_path / "wide.png").stat().st_size < 300
    code = f"""
        import resource
        from pathlib import Path
        import numpy as np, torch
        from featcache.finetuning.pixels import network_input
        from featcache.finetuning.training_input import TrainingInput
        from featcache.images.read import Paths, read_images
        from featcache.spec import PreprocessSpec
        spec = PreprocessSpec(resize=256, crop=(224, 224), interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
        files = Paths(Path({str(tmp_path)!r}), tuple(f"{{name}}.png" for name in {list(sizes)}))
        inputs = network_input(spec), TrainingInput(spec)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 100_000_000,) * 2)
        for convert in inputs:
            for read in read_images(files, range(5), convert):
                print(read.reason or set(np.unique(read.value)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    lines = ["{200}"] * 3 + ["too large for the memory at hand", "{200}"]
    assert done.stdout.replace("np.uint8(200)", "200").splitlines() == 2 * lines, done.stderr
