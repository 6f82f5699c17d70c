"""Options that several commands share, and how the text of an option becomes a value.

In: what was typed. Out: a value, or None where ``auto`` was typed and the function behind the command decides.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from featcache.cli.console import say
from featcache.errors import UsageError

Commands = dict[Callable[..., None], str]  # what a file of commands offers: each, and the examples below its help

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Workers = Annotated[str, typer.Option(help="Threads that read and decode (on a CPU: that do everything), or auto.")]
ClassLevel = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=3,
        help="Which folder of SOURCE names the class: 1 the top one, 2 the one inside of it, 3 one deeper; if not given, names decide.",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(readable=False, help="Of a table: the folder that its paths are relative to; its own if not given."),
]
PathColumn = Annotated[str | None, typer.Option(help="Of a table: the column of paths, if its name does not say so.")]
LabelColumn = Annotated[
    str | None, typer.Option(help="Of a table: the column of classes, if its name does not say so.")
]
SplitColumn = Annotated[str | None, typer.Option(help="Of a table: the column of splits, if its name does not say so.")]
BatchSize = Annotated[str, typer.Option(help="Images per forward pass, or auto. Never changes what is computed.")]
MaxBad = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of refused images above which to exit with 3.")]

# What changes the numbers.
Backbone = Annotated[str, typer.Option(help="A name (see `featcache backbones`), or a model's folder.")]
Weights = Annotated[str, typer.Option(help="auto, none, a torchvision weights name, or a .pth / .safetensors file.")]
Precision = Annotated[str, typer.Option(help="auto (fastest that passes the self-check), fp32, bf16 or fp16.")]
Dtype = Annotated[str, typer.Option(help="How embeddings are stored: auto (float16 if they fit), float16, float32.")]
Resize = Annotated[str, typer.Option(help="Shorter edge in pixels, or HEIGHTxWIDTH; auto: the weights' own.")]
Crop = Annotated[str, typer.Option(help="Edge of the centre crop in pixels; auto: the weights' own.")]
Interpolation = Annotated[str, typer.Option(help="nearest, bilinear, bicubic, lanczos; auto: the weights' own.")]
WhiteLevel = Annotated[
    str, typer.Option(help="Sample of 16-bit images that is white: 4095 for 12 bits of data; auto: 65535.")
]
Decode = Annotated[
    str, typer.Option(help="Scale at which large JPEGs are decoded: full, reduced (faster, other pixels), auto: full.")
]


def count(text: str, name: str) -> int | None:
    """A whole number from 1; None for ``auto``. Raises UsageError, calling the option ``name``."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{name} must be auto or a whole number from 1, found {text!r}")
    return int(text)


def number(text: str, name: str) -> float | None:
    """A number; None for ``auto``. Raises UsageError, calling the option ``name``. Its sign is not looked at."""
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{name} must be auto or a positive number, found {text!r}") from None


def size(text: str) -> int | tuple[int, int] | None:
    """``HEIGHTxWIDTH`` or the shorter edge, in pixels; None for ``auto``. Raises UsageError."""
    height, cross, width = text.partition("x")
    first = count(height, "resize")
    if not cross or first is None:
        return first
    return first, count(width, "resize") or first


def exit_if_bad(refused: int, images: int, max_bad: float) -> None:
    """Exit with code 3, and say so, if more images were refused than ``--max-bad`` allows."""
    if refused > max_bad * images:
        say(f"{refused} of {images} images were refused, more than --max-bad {max_bad:g} allows")
        raise typer.Exit(3)
