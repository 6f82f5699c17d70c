"""Random changes: reproducible per image, distributed as torchvision's, and every recipe's steps exist."""

import inspect

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from featcache.finetuning.augment import STEPS, _random_box, augment
from featcache.finetuning.recipe_values import STEP_NUMBERS
from featcache.finetuning.recipes import RECIPES, Recipe

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def test_the_seed_decides_and_nothing_else() -> None:
    steps = RECIPES["caltech101"].augmentation
    one = augment(PIXELS, steps, size=(32, 32), seed=(0, 3, 7))
    torch.manual_seed(99)  # global random state must not matter
    assert torch.equal(one, augment(PIXELS, steps, size=(32, 32), seed=(0, 3, 7)))
    for other in ((1, 3, 7), (0, 4, 7), (0, 3, 8)):
        assert not torch.equal(one, augment(PIXELS, steps, size=(32, 32), seed=other))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_pixels_of_the_networks_size(name: str) -> None:
    result = augment(PIXELS, RECIPES[name].augmentation, size=(24, 40), seed=(0, 0, 0))
    assert (result.shape, result.dtype) == ((24, 40, 3), torch.uint8)
    assert result.float().std() > 10  # still a picture


def test_no_step_is_a_plain_resize() -> None:
    result = augment(PIXELS, (), size=(30, 40), seed=(0, 0, 0))
    assert torch.equal(result, v2.functional.resize(PIXELS.permute(2, 0, 1), [30, 40], antialias=True).permute(1, 2, 0))


def test_boxes_are_distributed_as_torchvisions() -> None:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.zeros(3, 90, 120)
    theirs = np.array([list(v2.RandomResizedCrop(8).make_params([image]).values()) for _ in range(4000)], float)
    ours = np.array([_random_box(random, 90, 120, 0.08, 1.0) for _ in range(4000)], float)
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        assert np.abs(a - b).max() < 9  # of 90 or 120 pixels, over all quantiles
        assert abs(a.mean() - b.mean()) < 1.5


def test_boxes_of_extreme_pictures_stay_inside() -> None:
    random = np.random.default_rng(0)
    for height, width in ((1, 500), (500, 1), (1, 1), (3, 2)):
        top, left, h, w = _random_box(random, height, width, 0.9, 1.0)
        assert 0 <= top < top + h <= height
        assert 0 <= left < left + w <= width


def test_flip_mirrors_half_of_the_images() -> None:
    flipped = [
        torch.equal(augment(PIXELS, (("flip", 0.5),), size=(60, 80), seed=(0, 0, k)), PIXELS.flip(1))
        for k in range(400)
    ]
    assert 160 < sum(flipped) < 240


def test_rotation_and_jitter_change_what_they_say() -> None:
    assert torch.equal(augment(PIXELS, (("rotate", 0.0),), size=(60, 80), seed=(0, 0, 0)), PIXELS)
    same = augment(PIXELS, (("jitter", 0.0, 0.0, 0.0, 0.0),), size=(60, 80), seed=(0, 0, 0))
    assert (same.int() - PIXELS.int()).abs().max() <= 1
    brighter = [
        augment(PIXELS, (("jitter", 0.5, 0.0, 0.0, 0.0),), size=(60, 80), seed=(0, 0, k)).float().mean()
        for k in range(40)
    ]
    assert max(brighter) > PIXELS.float().mean() + 20 > PIXELS.float().mean() - 20 > min(brighter)


@pytest.mark.parametrize("extreme", [1, 2], ids=["least", "most"])
@pytest.mark.parametrize("name", STEP_NUMBERS)
def test_what_a_recipe_may_ask_for_can_be_done(name: str, extreme: int) -> None:
    """The numbers of a step are as many as its function takes, and their bounds give a picture."""
    assert STEPS.keys() == STEP_NUMBERS.keys()
    assert len(inspect.signature(STEPS[name]).parameters) == 3 + len(STEP_NUMBERS[name])
    step = (name, *(number[extreme] for number in STEP_NUMBERS[name]))
    Recipe(about="", augmentation=(step,))
    for k in range(20):
        result = augment(PIXELS, (step,), size=(24, 40), seed=(0, 0, k))
        assert (result.shape, result.dtype) == ((24, 40, 3), torch.uint8)
