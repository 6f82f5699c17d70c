"""Options that several commands share, and how the text of an option becomes a value.

In: what was typed. Out: a value, or None where ``auto`` was typed and the function behind the command decides.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.cli.console import note, say
from featcache.errors import UsageError
from featcache.system.display import quantity

if TYPE_CHECKING:
    from featcache.images.source import Source
    from featcache.reports.trackers.run import Run

Commands = dict[Callable[..., None], str]  # what a file of commands offers: each, and the examples below its help

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:N, mps. Default: a GPU if there is one.")]
Workers = Annotated[str, typer.Option(help="Threads that read and decode; on a CPU also embed. Default: one a core.")]
Readers = Annotated[str, typer.Option(help="Threads that read and decode. Default: one a core.")]
Root = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", readable=False, help="Of a table: what its paths are relative to. Default: its own folder."
    ),
]
PathColumn = Annotated[str | None, typer.Option(help="Of a table: the column of paths; of Parquet also one of images.")]
BatchSize = Annotated[str, typer.Option(help="Images per forward pass; changes no result.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write MODEL.report.html beside the model.")]
MaxBad = Annotated[
    float, typer.Option(min=0.0, max=1.0, metavar="SHARE", help="Exit with 3 if more of the images are refused.")
]
Log = Annotated[
    str | None,
    typer.Option(
        metavar="TRACKER",
        help="Tell tensorboard (in runs/ beside the model), mlflow or wandb, too: parameters, scores, pictures, the model.",
    ),
]

Figures = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", readable=False, help="Where to write the charts, as SVG files for a paper."),
]

# What changes the numbers.
_BACKBONE = "One of `featcache backbones`, fast, base, best, or a model's folder. Default: "
_USUAL = "DINOv2, small on a CPU, base on a GPU; ResNet-50 without timm."
Backbone = Annotated[str, typer.Option(help=f"{_BACKBONE}that of the cache at -o, else {_USUAL}")]
BackboneAlone = Annotated[str, typer.Option(help=_BACKBONE + _USUAL)]  # where no cache is written
Weights = Annotated[
    str, typer.Option(help="none, a name of torchvision's, a .pth or .safetensors file. Default: pretrained.")
]
Precision = Annotated[str, typer.Option(help="fp32, bf16, fp16. Default: the fastest that changes nothing.")]
Dtype = Annotated[str, typer.Option(help="Stored as float16 or float32. Default: float16 if they fit.")]
Resize = Annotated[str, typer.Option(help="Shorter edge in pixels, or HEIGHTxWIDTH. Default: as the weights want.")]
Crop = Annotated[str, typer.Option(help="Edge of the centre crop in pixels. Default: as the weights want.")]
Interpolation = Annotated[str, typer.Option(help="nearest, bilinear, bicubic, lanczos. Default: as the weights want.")]
Pool = Annotated[str, typer.Option(help="own, cls, mean, cls+mean. Default: what the encoder was trained to give.")]
Layers = Annotated[str, typer.Option(help="How many of the last layers, side by side. Default: 1.")]
WhiteLevel = Annotated[
    str,
    typer.Option(help="Sample of 16-bit images that is white: 4095 for 12 bits of data. Default: 65535."),
]
Decode = Annotated[
    str, typer.Option(help="Of JPEGs: full, reduced (large ones faster) or gpu; both other pixels. Default: full.")
]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a source is read where there are several ways, see ``Source``: the options of ``reads_source``."""

    class_level: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=3,
            help="Which folder names the class: 1 the top one, 2 the one inside, 3 one deeper. Default: names decide.",
        ),
    ] = None
    root: Root = None
    path_column: PathColumn = None
    label_column: Annotated[str | None, typer.Option(help="Of a table: the column of classes.")] = None
    split_column: Annotated[str | None, typer.Option(help="Of a table: the column of splits.")] = None

    def of(self, path: Path) -> "Source":
        """What is at ``path``, read so. Raises UsageError: an option is impossible."""
        from featcache.images.source import Source

        return Source(path, **dataclasses.asdict(self))


AS_FOUND = Reading()


def reads_source(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, typed with the options of a ``Reading`` in the place of its parameter ``reading``."""
    options = inspect.signature(Reading, eval_str=True).parameters
    signature = inspect.signature(command)
    shown: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        shown += options.values() if name == "reading" else [parameter]

    @functools.wraps(command)
    def run(**typed: Any) -> None:
        command(reading=Reading(**{name: typed.pop(name) for name in options}), **typed)

    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}  # typer reads both
    return run


def count(text: str, name: str) -> int | None:
    """A whole number from 1; None for ``auto``. Raises UsageError, calling the option ``name``."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--{name.replace(' ', '-')} must be auto or a whole number from 1, found {text!r}")
    return int(text)


def number(text: str, name: str) -> float | None:
    """A number; None for ``auto``. Raises UsageError, calling the option ``name``. Its sign is not looked at."""
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--{name.replace(' ', '-')} must be auto or a positive number, found {text!r}") from None


def size(text: str) -> int | tuple[int, int] | None:
    """``HEIGHTxWIDTH`` or the shorter edge, in pixels; None for ``auto``. Raises UsageError."""
    height, cross, width = text.partition("x")
    first = count(height, "resize")
    if not cross or first is None:
        return first
    return first, count(width, "resize") or first


def check_log(tracker: str | None, model: Path) -> None:
    """Refuse, before any work, a tracker that cannot be used. Raises as ``trackers.tracker.check_tracker``."""
    if tracker is not None:
        from featcache.reports.trackers.tracker import check_tracker

        check_tracker(tracker, model)


def log_run(tracker: str | None, run: "Callable[[], Run]") -> None:
    """Tell ``tracker`` about a run. The work is done by now, so that whatever goes wrong here is only said."""
    if tracker is None:
        return
    from featcache.reports.trackers.tracker import log_run as tell

    try:
        note(f"  logged to {tell(tracker, run())}")
    except Exception as error:
        say(f"warning: not logged to {tracker}: {error}")


def exit_if_bad(refused: int, images: int, max_bad: float) -> None:
    """Exit with code 3, and say so, if more images were refused than ``--max-bad`` allows."""
    if refused > max_bad * images:
        verb = "was" if refused == 1 else "were"
        say(f"{refused:,} of {quantity(images, 'image')} {verb} refused, more than --max-bad {max_bad:g} allows")
        raise typer.Exit(3)
