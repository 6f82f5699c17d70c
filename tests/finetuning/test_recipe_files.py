"""Recipes as users write them: what a file or ``--set`` means, and that neither starts work if it means nothing."""

from pathlib import Path
from typing import Any

import pytest

from featcache.errors import UsageError
from featcache.finetuning.recipe_files import parse_settings, read_recipe
from featcache.finetuning.recipes import RECIPES, find_recipe

MINE = """\ufeff# my own
base = "flowers"
about = "for my orchids"
hidden = [500]
dropout = 0.3
batch-size = 16
interpolate = false
augmentation = [["flip", 0.5], ["rotate", 15], "center_crop"]
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_changes_the_recipe_that_it_comes_from(tmp_path: Path) -> None:
    name, recipe = read_recipe(write(tmp_path / "orchids.TOML", MINE), {"lr": 0.1, "batch_size": 8, "epochs": None})
    steps = (("flip", 0.5), ("rotate", 15), ("center_crop",))
    changes = {"hidden": 500, "dropout": [0.3], "augmentation": steps, "lr": 0.1, "batch_size": 8}
    assert name == "orchids.TOML"
    assert recipe == find_recipe("flowers", changes | {"about": "for my orchids"})
    _, plain = read_recipe(write(tmp_path / "plain.toml", "lr = 1e-2"), {})
    assert (plain.lr, plain.ema) == (0.01, RECIPES["default"].ema)
    assert read_recipe("gradual", {}) == ("gradual", RECIPES["gradual"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = fast", "cannot be read as TOML"),
        ("lr = 1\nlr = 2", "cannot be read as TOML"),
        ("x = " + "[" * 20_000, "cannot be read as TOML"),
        ("# " + "x" * 70_000, "has 70,002 bytes; a recipe has a few lines"),
        ("learn = 1", "mine.toml: a recipe has no learn; "),
        ('lr = "fast"', "mine.toml: lr must be a number"),
        ("[hidden]\nsize = 3", "hidden must be a whole number from 1"),
        ('base = "flwers"', "no recipe is called 'flwers'; choose flowers "),
        ("base = [1]", "no recipe is called"),
        ("lr = nan", "lr must be a number .*, found nan"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        read_recipe(write(tmp_path / "mine.toml", text), {})
    assert "mine.toml" in str(error.value)


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "bytes.toml").write_bytes(b"lr = 1 # \xff")
    for name, words in (
        ("none.toml", "is not a file"),
        ("folder.toml", "is not a file"),
        ("bytes.toml", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=words):
            read_recipe(tmp_path / name, {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hidden=500", 500),
        ("hidden=500,200", "500,200"),
        ("hidden=[500, 200]", [500, 200]),
        ('hidden="500,200"', "500,200"),
        ("hidden = none", "none"),
        ("hidden=", ""),
        ("hidden=[", "["),
        ("hidden=a=b", "a=b"),
        ("hidden=1\nlr=2", "1\nlr=2"),
        ("hidden=[" * 1 + "[" * 20_000, "[" * 20_001),
        ("hidden=1e-3", 1e-3),
        ("hidden=true", True),
    ],
)
def test_a_setting_is_toml_or_a_word(text: str, value: Any) -> None:
    assert parse_settings([text], {}) == {"hidden": value}


def test_settings_join_options_and_contradict_none() -> None:
    options = {"lr": 0.1, "epochs": None}
    assert parse_settings(["epochs=3", "backbone-lr=0"], options) == {"lr": 0.1, "epochs": 3, "backbone_lr": 0}
    for texts, words in (
        (["lr=2"], "lr is given twice, by --lr and by --set lr=2; leave one out"),
        (["ema=0", "ema=0.5"], "ema is given twice, by --set ema=0 and by --set ema=0.5"),
        (["momentum"], "--set takes FIELD=VALUE, as in --set lr=0.001; found 'momentum'"),
        (["=3"], "--set takes FIELD=VALUE"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_settings(texts, options)
