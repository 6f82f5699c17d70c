"""Recipes are data: complete, checked, and settled by the number of images."""

import itertools
import json
from typing import Any

import pytest

from featcache.errors import UsageError
from featcache.finetuning.recipes import RECIPES, choose_recipe, explain


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_settles_and_explains_itself(name: str) -> None:
    recipe = choose_recipe(name, 1000)
    assert recipe.epochs
    assert recipe.batch_size
    assert len(recipe.dropout) in (0, len(recipe.hidden or ()))
    text = "\n".join(explain(recipe, 1000))
    assert f"{recipe.epochs} epochs of 1000 images" in text
    assert f"learning rate {recipe.lr:g}" in text
    assert json.loads(json.dumps(recipe.to_json())) == recipe.to_json()


def test_the_default_starts_from_the_cached_head_with_the_backbone_far_below_it() -> None:
    recipe = choose_recipe("default", 1000)
    assert recipe.hidden is None
    assert recipe.backbone_lr * 9 < recipe.lr
    assert (recipe.batchnorm, recipe.unfreeze, recipe.interpolate) == ("frozen", "all", True)


def test_cats_and_dogs_has_the_course_s_head() -> None:
    """On DenseNet-121, whose embeddings have 1,024 values, as the course counts its parameters."""
    sizes = [1024, *(choose_recipe("cats-dogs", 1000).hidden or ()), 2]
    assert sum(a * b + b for a, b in itertools.pairwise(sizes)) == 262_914


def test_epochs_and_batch_follow_the_number_of_images() -> None:
    assert [choose_recipe("default", n).epochs for n in (300, 3000, 15000)] == [15, 10, 6]
    assert choose_recipe("default", 300, epochs=2, lr=None).epochs == 2
    assert choose_recipe("default", 7, batch_size=64).batch_size == 7


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"unfreeze": "everything"}, "last-stage"),
        ({"lr": 0.0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"backbone_lr": float("nan")}, "backbone_lr"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"optimizer": "lion"}, "adamw"),
        ({"ema": 1.5}, "ema"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"epoch": 3}, "no epoch"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        choose_recipe("default", 100, **changes)
