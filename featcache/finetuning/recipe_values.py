"""What the fields of a recipe may be. In: a value as Python, TOML or a command line has it. Out: the field's own, or why not."""

import difflib
import json
import operator
from typing import Any, Literal, get_args, get_origin

from featcache.errors import UsageError

Step = tuple[str | float, ...]  # name of an augmentation, then its numbers; see augment.py
# Of numbers: the least and the most, from 0 to a million where nothing is said. A share lies below 1.
_MOST = 1_000_000
_SHARES = ("dropout", "drop_path", "momentum", "warmup", "label_smoothing", "ema")
_LEAST = dict.fromkeys(("hidden", "epochs", "batch_size", "accumulation", "step_epochs", "eval_every"), 1)
_MOST_OF = {"layer_decay": 1, "gamma": 1}
# Augmentations: what each number is, the least and the most it can be.
STEP_NUMBERS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "resized_crop": (
        ("least share of the area", 0.001, 1),
        ("most, not below", 0.001, 1),
        ("size before a crop", 0.1, 10),
    ),
    "flip": (("share of images", 0, 1),),
    "rotate": (("degrees", 0, 180),),
    "jitter": (("brightness", 0, 1), ("contrast", 0, 1), ("saturation", 0, 1), ("hue", 0, 0.5)),
    "center_crop": (),
}


def converted(kind: Any, value: Any) -> Any:
    """``value`` as a field of this type has it, if it can be; ``check`` judges what cannot."""
    if value == "none" and type(None) in get_args(kind):
        return None
    if kind == tuple[Step, ...]:
        steps = value if isinstance(value, list | tuple) else [value]
        if len(steps) > 1 and isinstance(steps[0], str) and all(isinstance(each, int | float) for each in steps[1:]):
            steps = [steps]  # one, with its numbers
        return tuple(tuple(step) if isinstance(step, list | tuple) else (step,) for step in steps)
    if _is_tuple(kind):
        words = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(_number(word, whole=_is_whole(kind)) for word in words)
    if kind is bool or kind is str or _choices(kind):
        return value
    return _number(value, whole=_is_whole(kind))


def _choices(kind: Any) -> tuple[Any, ...]:
    """What a field of words may be, open or not; nothing, for other kinds."""
    words = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
    return get_args(words[0]) if words else ()


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple or any(get_origin(each) is tuple for each in get_args(kind))


def _is_whole(kind: Any) -> bool:
    return "int" in str(kind)  # also in a tuple, and where it may be None


def _number(value: Any, *, whole: bool) -> Any:
    """As int or float where that is what ``value`` says, else as it is."""
    if isinstance(value, bool):
        return value
    try:
        if isinstance(value, str):
            return int(value) if whole else float(value)
        return operator.index(value) if whole else float(value)
    except (ValueError, TypeError, OverflowError):
        return value


def check(name: str, kind: Any, value: Any) -> None:
    """Raise UsageError unless ``value`` can be the field ``name`` of this type."""
    if value is None and type(None) in get_args(kind):
        return
    if choices := _choices(kind):
        if value not in choices:
            raise UsageError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
    elif kind is bool or kind is str:
        if not isinstance(value, kind):
            raise UsageError(f"{name} must be {'true or false' if kind is bool else 'a text'}, found {value!r}")
    elif kind == tuple[Step, ...]:
        for step in value:
            _check_step(step)
    else:
        for number in value if _is_tuple(kind) else (value,):
            _check_number(name, number, whole=_is_whole(kind))


def _check_number(name: str, value: Any, *, whole: bool) -> None:
    least, most = _LEAST.get(name, 0), 1 if name in _SHARES else _MOST_OF.get(name, _MOST)
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or (name in _SHARES and value == 1):
        what = "a whole number" if whole else "a number"
        to = "below 1" if name in _SHARES else f"{most:,}"
        raise UsageError(f"{name} must be {what} from {least} to {to}, found {value!r}")


def _check_step(step: tuple[Any, ...]) -> None:
    """Raise UsageError unless this is an augmentation with its numbers."""
    name, *given = step or ("",)
    if not isinstance(name, str) or name not in STEP_NUMBERS:
        near = difflib.get_close_matches(str(name), STEP_NUMBERS, n=1) or STEP_NUMBERS
        raise UsageError(
            f'unknown augmentation {name!r}; choose from {", ".join(near)}, as in [["flip", 0.5], ["rotate", 15]]'
        )
    wanted = STEP_NUMBERS[name]
    plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
    fits = plain and len(given) == len(wanted)
    fits = fits and all(least <= value <= most for value, (_, least, most) in zip(given, wanted, strict=True))
    if not fits or (name == "resized_crop" and given[0] > given[1]):
        takes = ", ".join(f"{what} ({least:g} to {most:g})" for what, least, most in wanted) or "no number"
        raise UsageError(f"augmentation {name} takes {takes}; found {as_toml(given)}")


def as_toml(value: Any) -> str:
    """As TOML has it."""
    return json.dumps("none" if value is None else value, default=str)
