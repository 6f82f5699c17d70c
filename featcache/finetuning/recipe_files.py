"""Recipes that users write: a file of TOML, ``FIELD=VALUE`` on a command line. In: their text. Out: a ``Recipe``.

A file holds fields of ``Recipe``, and perhaps ``base``: which recipe the others come from, ``default`` if it does not say.
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from featcache.errors import UsageError
from featcache.finetuning.recipes import Recipe, find_recipe
from featcache.system.path_kinds import AnyPath, as_path

_MOST_BYTES = 2**16


def read_recipe(recipe: AnyPath, changes: Mapping[str, Any]) -> tuple[str, Recipe]:
    """What a recipe is called, and the recipe with the user's ``changes``.

    Args:
        recipe: a name of ``recipes.RECIPES``, or a file that ends in .toml.
        changes: as ``recipes.find_recipe`` takes them; they come before what the file says.

    Raises:
        UsageError: the file cannot be read, or holds what is no recipe; otherwise as ``find_recipe``.
    """
    if not str(recipe).lower().endswith(".toml"):
        return str(recipe), find_recipe(str(recipe), dict(changes))
    path = as_path(recipe)
    values = _read(path)
    base = values.pop("base", "default")
    asked = {name.replace("-", "_"): value for name, value in changes.items() if value is not None}
    try:
        return path.name, find_recipe(str(base), values | asked)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """The table in a file, its names with _ for -."""
    if not path.is_file():
        raise UsageError(f"the recipe {path} is not a file; give one of TOML, or the name of a recipe")
    try:
        data = path.read_bytes()
        if len(data) > _MOST_BYTES:
            raise UsageError(f"the recipe {path} has {len(data):,} bytes; a recipe has a few lines")
        table = tomllib.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the recipe {path} cannot be read as TOML ({error}); write lines as lr = 0.001") from error
    return {name.replace("-", "_"): value for name, value in table.items()}


def parse_settings(texts: Iterable[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields to change, from ``FIELD=VALUE`` and from options of the same meaning (None: not given).

    A value is TOML; what is none is a text, so that ``optimizer=sgd`` needs no quotes.

    Raises:
        UsageError: no ``=``, or a field that is given twice.
    """
    found = {name: value for name, value in options.items() if value is not None}
    by = {name: f"--{name.replace('_', '-')}" for name in found}
    for text in texts:
        field, equals, value = text.partition("=")
        name = field.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--set takes FIELD=VALUE, as in --set lr=0.001; found {text!r}")
        if name in by:
            raise UsageError(f"{name} is given twice, by {by[name]} and by --set {text}; leave one out")
        found[name], by[name] = _parse(value.strip()), f"--set {text}"
    return found


def _parse(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text  # a line break could add others
