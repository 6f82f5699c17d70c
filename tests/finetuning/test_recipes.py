"""Recipes are data: complete, checked, and settled by the number of images."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import UsageError
from featcache.finetuning.recipes import RECIPES, choose_recipe, explain, find_recipe, settle


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_settles_and_explains_itself(name: str) -> None:
    recipe = choose_recipe(name, 1000)
    assert recipe.epochs
    assert recipe.batch_size
    assert len(recipe.dropout) in (0, len(recipe.hidden or ()))
    text = "\n".join(explain(recipe, 1000))
    assert f"{recipe.epochs} epoch{'s' * (recipe.epochs != 1)} of 1,000 images" in text
    assert f"learning rate {recipe.lr:g}" in text
    assert json.loads(json.dumps(recipe.to_json())) == recipe.to_json()


def test_the_default_starts_from_the_cached_head_at_the_rate_of_its_kind_of_network() -> None:
    recipe = choose_recipe("default", 1000)
    assert recipe.hidden is None
    other = settle(RECIPES["default"], 1000, batch_norms=False)
    assert [(each.backbone_lr, each.layer_decay) for each in (recipe, other)] == [(3e-4, 1.0), (3e-5, 0.9)]
    given = find_recipe("default", {"backbone_lr": 1e-6, "layer_decay": 0.5})
    settled = [settle(given, 1000, batch_norms=kind) for kind in (True, False)]
    assert [(each.backbone_lr, each.layer_decay) for each in settled] == [(1e-6, 0.5)] * 2
    assert (recipe.batchnorm, recipe.unfreeze, recipe.interpolate) == ("frozen", "most", True)
    assert [choose_recipe("default", n).unfreeze for n in (2, 499, 500)] == ["freezeout", "freezeout", "most"]
    assert choose_recipe("default", 200, unfreeze="most").unfreeze == "most"


def test_stages_freeze_from_below_a_third_of_the_epochs_each() -> None:
    recipe = find_recipe("default", {"unfreeze": "freezeout"})
    phases = {epochs: recipe.phases(epochs) for epochs in range(1, 31)}
    assert [phases[n] for n in (1, 2, 3)] == [{"all": 1}, {"all": 1, "most": 1}, {"all": 1, "most": 1, "half": 1}]
    for epochs, found in phases.items():
        # The definition: epoch e trains what the third that it begins in does.
        expected = [("all", "most", "half")[3 * epoch // epochs] for epoch in range(epochs)]
        assert [depth for depth, n in found.items() for _ in range(n)] == expected
    assert find_recipe("gradual", {}).phases(7) == {"all": 7}
    assert find_recipe("default", {"unfreeze": "last-stage"}).phases(7) == {"last-stage": 7}
    whole, short, half = (
        explain(settle(dataclasses.replace(recipe, **changes), 200), 200)[1].partition("; adamw")[0]
        for changes in ({}, {"epochs": 2}, {"unfreeze": "half"})
    )
    assert whole == (
        "trains: of the backbone all, from epoch 6 on all but its first stages, with 2 % of its weights at most, from epoch 11 on all but "
        "its first stages, with half of its weights at most: the first stages cost most to train, and learn first (FreezeOut, Brock et al. "
        "2017)"
    )
    assert "from epoch 2 on" in short and "half" not in short
    assert half.startswith("trains: of the backbone all but its first stages, with half of its weights at most: ")


def test_few_images_make_more_steps_of_fewer_each() -> None:
    found = {n: choose_recipe("default", n).batch_size for n in (4, 8, 149, 150, 4999, 5000)}
    assert found == {4: 4, 8: 8, 149: 8, 150: 32, 4999: 32, 5000: 64}
    assert choose_recipe("default", 40, batch_size=32).batch_size == 32
    assert choose_recipe("ants-bees", 40).batch_size == RECIPES["ants-bees"].batch_size


def test_of_batch_norms_nothing_is_asked_or_said_where_there_are_none() -> None:
    given = find_recipe("ants-bees", {"batch_size": 1})
    texts = {}
    for there in (True, False):
        settled = settle(given, 300, batch_norms=there)
        assert settled.batchnorm == ("train" if there else "frozen")
        texts[there] = "\n".join(explain(settled, 300, batch_norms=there))
    assert "batch-norm statistics following the data; dropout" in texts[True]
    assert "batch-norm" not in texts[False]
    assert "dropout and drop path of the backbone off" in texts[False]
    assert (
        settle(find_recipe("ants-bees", {"unfreeze": "head"}), 300).batchnorm == "frozen"
    )  # theirs do not train either


@pytest.mark.parametrize(("there", "network"), [(True, "MobileNetV2: "), (False, "a ViT-S/14, ")])
def test_the_default_cites_figures_of_the_log_and_nothing_else_does(there: bool, network: str) -> None:
    default = settle(RECIPES["default"], 300, batch_norms=there)
    cited = explain(default, 300, batch_norms=there)[-1]
    log = (Path(__file__).parents[2] / "benchmarks" / "LOG.md").read_text().partition("## Which recipe")[2]
    assert cited.startswith(f"measured on {network}")
    assert (figures := re.findall(r"\d\d\.\d", cited)) and all(figure in log for figure in figures)
    others = [settle(find_recipe("default", {"ema": 0.9}), 300, batch_norms=there)]
    others += [
        settle(RECIPES["gradual"], 300, batch_norms=there),
        settle(RECIPES["default"], 300, batch_norms=not there),
    ]
    assert not [line for recipe in others for line in explain(recipe, 300, batch_norms=there) if "measured" in line]


def test_mirroring_is_said_to_be_wrong_for_digits_where_there_is_any() -> None:
    texts = {
        name: "\n".join(explain(choose_recipe(name, 300, augmentation=steps), 300))
        for name, steps in (("default", None), ("gradual", [["rotate", 10]]), ("flowers", []))
    }
    assert ["digit or letter mirrored" in text for text in texts.values()] == [True, False, False]


def test_cats_and_dogs_has_the_course_s_head() -> None:
    """On DenseNet-121, whose embeddings have 1,024 values, as the course counts its parameters."""
    sizes = [1024, *(choose_recipe("cats-dogs", 1000).hidden or ()), 2]
    assert sum(a * b + b for a, b in itertools.pairwise(sizes)) == 262_914


@pytest.mark.parametrize("n", [1, 2, 20, 22, 24, 100])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_said_to_be_as_large_as_they_are(n: int, accumulation: int) -> None:
    """As ``Trainer`` deals them."""
    recipe = choose_recipe("default", n, batch_size=8, accumulation=accumulation)
    sizes = {len(step) for step in np.array_split(np.arange(n), math.ceil(n / (min(8, n) * accumulation)))}
    words = f"steps of {'at most ' if len(sizes) > 1 else ''}{max(sizes)}; schedule"
    assert any(words in line for line in explain(recipe, n))


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
        ({"epoch": 3}, "a recipe has no epoch; did you mean epochs\\?"),
        ({"zzz": 3}, "a recipe has no zzz; it has about, hidden, .*, interpolate$"),
        ({"lr": "fast"}, "lr must be a number from 0 to .*, found 'fast'"),
        ({"lr": True}, "lr must be a number .*, found True"),
        ({"lr": float("inf")}, "lr must .*, found inf"),
        ({"epochs": 2.5}, "epochs must be a whole number from 1 .*, found 2.5"),
        ({"epochs": [3]}, "epochs must be a whole number"),
        ({"gamma": float("nan")}, "gamma must be a number from 0 to 1, found nan"),
        ({"layer_decay": 1.1}, "layer_decay must be a number from 0 to 1"),
        ({"interpolate": "yes"}, "interpolate must be true or false, found 'yes'"),
        ({"backbone_dropout": 1}, "backbone_dropout must be true or false"),
        ({"drop_path": 1.0}, "drop_path must be a number from 0 to below 1, found 1.0"),
        ({"about": 3}, "about must be a text"),
        ({"hidden": [0]}, "hidden must be a whole number from 1"),
        ({"hidden": "500;200"}, "hidden must be a whole number .*, found '500;200'"),
        ({"hidden": {"a": 1}}, "hidden must be a whole number"),
        ({"hidden": [8], "dropout": [1.0]}, "dropout must be a number from 0 to below 1, found 1.0"),
        ({"hidden": [8], "dropout": [0.1, 0.2]}, r"dropout = \[0.1, 0.2\] does not fit hidden = \[8\]: give a share"),
        ({"dropout": 0.2}, r"dropout = \[0.2\] does not fit hidden = \"none\""),
        ({"augmentation": [["flipp", 0.5]]}, "unknown augmentation 'flipp'; choose from flip, as in"),
        ({"augmentation": [["sharpen", 0.5]]}, "choose from resized_crop, flip, rotate, jitter, center_crop"),
        ({"augmentation": 5}, "unknown augmentation 5"),
        ({"augmentation": [[["flip"], 0.5]]}, "unknown augmentation"),
        ({"augmentation": [[]]}, "unknown augmentation ''"),
        ({"augmentation": [["flip"]]}, r"augmentation flip takes share of images \(0 to 1\); found \[\]"),
        ({"augmentation": [["flip", 1.5]]}, r"takes share of images \(0 to 1\); found \[1.5\]"),
        ({"augmentation": [["flip", "often"]]}, r'found \["often"\]'),
        ({"augmentation": [["flip", True]]}, r"found \[true\]"),
        ({"augmentation": [["rotate", float("nan")]]}, r"takes degrees \(0 to 180\)"),
        ({"augmentation": [["resized_crop", 0.8, 0.5, 1]]}, "most, not below"),
        ({"augmentation": [["center_crop", 1]]}, "augmentation center_crop takes no number"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        choose_recipe("default", 100, **changes)


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("hidden", 500, (500,)),
        ("hidden", [500, 200], (500, 200)),
        ("hidden", "500, 200", (500, 200)),
        ("hidden", [], ()),
        ("epochs", np.int64(3), 3),
        ("epochs", "3", 3),
        ("lr", 1, 1.0),
        ("lr", ".5", 0.5),
        ("lr", np.float32(0.5), 0.5),
        ("backbone-lr", 0, 0.0),
        ("interpolate", False, False),
        ("optimizer", "sgd", "sgd"),
        ("augmentation", [["flip", 1], "center_crop"], (("flip", 1), ("center_crop",))),
        ("augmentation", "center_crop", (("center_crop",),)),
        ("augmentation", ["flip", 0.5], (("flip", 0.5),)),  # one step, as it was meant
        ("augmentation", ["resized_crop", 0.5, 1, 1], (("resized_crop", 0.5, 1, 1),)),
        ("augmentation", ["center_crop", ["flip", 1]], (("center_crop",), ("flip", 1))),
        ("augmentation", [], ()),
    ],
)
def test_values_become_what_the_field_is(field: str, given: Any, value: Any) -> None:
    found = getattr(find_recipe("default", {field: given}), field.replace("-", "_"))
    assert (found, type(found)) == (value, type(value))


def test_what_is_left_open_and_one_dropout_for_all() -> None:
    cats_dogs = RECIPES["cats-dogs"]
    assert (cats_dogs.hidden, cats_dogs.epochs) == ((256,), 1)
    recipe = find_recipe("cats-dogs", {"hidden": "none", "epochs": "none", "dropout": [], "lr": None})
    assert (recipe.hidden, recipe.epochs, recipe.lr) == (None, None, cats_dogs.lr)
    assert choose_recipe("cats-dogs", 100, hidden=[30, 20, 10]).dropout == (0.2, 0.2, 0.2)


def test_a_changed_recipe_says_what_it_is() -> None:
    """Not what the one says that it comes from."""
    recipe = choose_recipe("default", 1000, hidden=50, optimizer="sgd", lr=3e-4)
    assert recipe.about == 'as default, but hidden = [50], optimizer = "sgd"'
    text = "\n".join(explain(recipe, 1000))
    assert "start: a new random head 50\n" in text
    assert "WiSE-FT" not in text  # a new head has nothing to be mixed with
    assert choose_recipe("default", 1000, lr=3e-4) == choose_recipe("default", 1000)
    assert choose_recipe("default", 1000, lr=1.0, about="mine").about == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"momentum": 0.5}, 'momentum changes nothing: it takes optimizer = "sgd", found "adamw"'),
        ({"gamma": 0.5}, 'gamma changes nothing: it takes schedule = "step", found "cosine"'),
        ({"unfreeze": "head", "backbone_lr": 0.1}, 'backbone_lr changes nothing: it takes unfreeze = "last-stage" or'),
        (
            {"unfreeze": "last-stage", "layer_decay": 0.5},
            'takes unfreeze = "half" or "most" or "all" or "freezeout" or "gradual", found "last-stage"',
        ),
        ({"unfreeze": "head", "drop_path": 0.1}, 'drop_path changes nothing: it takes unfreeze = "last-stage" or'),
        ({"hidden": 5, "interpolate": True}, ""),  # as it is in the recipe
        ({"momentum": 0.5, "optimizer": "sgd"}, ""),
        ({"unfreeze": "head"}, ""),
    ],
)
def test_a_change_that_does_nothing_is_said(
    changes: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    find_recipe("default", changes)
    assert words in caplog.text
    assert bool(words) == bool(caplog.records)


def test_an_unknown_recipe_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="no recipe is called 'list'; choose ") as error:
        choose_recipe("list", 100)
    for name, recipe in RECIPES.items():
        assert f"{name} ({recipe.about})" in str(error.value)
    with pytest.raises(UsageError, match=r"choose default \(200 to 20,000 images, .*\); or a file that ends in .toml$"):
        choose_recipe("defualt", 100)
