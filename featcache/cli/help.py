"""How the help shows options: in groups, what is typed most often first, each with a word for what to type behind it.

In: a command as typer builds it from its function. Out: the same, its parameters arranged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

from featcache.cli.usage import check_words, value_type

# Groups and the options in each, in this order. What means something else in one command is named with it.
PANELS = {
    "Output": "output copy_to link_to gallery figures everything top_k probs folder dtype overwrite resume force self_contained "
    "apply map_method report no_report log max_bad as_json help",
    "Dealing": "val test groups group_column group_table reassign split.seed",
    "Training": "init clf c recipe settings hidden dropout epochs fit-head.batch_size finetune.batch_size lr backbone_lr unfreeze "
    "patience eval_every budget class_weight folds finetune.group_column finetune.groups fit-head.groups fit-head.group_column "
    "fit-head.path_column views n seed",
    "Backbone": "backbone weights pool layers resize crop interpolation",
    "Input": "stated predictions vector_column images repair pictures against split limit part sample reuse class_level root path_column "
    "label_column split_column decode white_level",
    "How sure": "coverage abstain_below evidence",
    "Speed": "seconds train device precision batch_size micro_batch workers executor ray_address",
    "Everywhere": "quiet verbose version featcache.help install_completion show_completion",
}
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
_ORDER = {name: place for place, name in enumerate(_PANEL_OF)}
# What stands behind an option that does not say so itself: by the type of its value, or its name (numbers that may be auto).
_TYPED = {int: "N", float: "NUMBER", Path: "PATH", str: "NAME"}
_NUMBERS = ("batch_size", "c", "crop", "layers", "micro_batch", "resize", "white_level", "workers")


class Command(TyperCommand):
    """A command of ours."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _arrange(self)

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``, in its group."""
        return _described(super().get_help_option(ctx), self)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help, and examples behind it."""
        _show(self, super().format_help, ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does. Raises UsageError where typer would take one option for the value of another."""
        if not ctx.resilient_parsing:  # as it is while a shell completes words
            check_words(self.get_params(ctx), args)
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """All commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own options, in their group; typer adds some of them last."""
        return _sorted([_described(param, self) for param in super().get_params(ctx)], self)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help, and examples behind it."""
        _show(self, super().format_help, ctx, formatter)


def _show(command: Any, show: Callable[[Any, Any], None], ctx: Any, formatter: Any) -> None:
    """Show the help, then the epilog line by line: some versions of typer make one paragraph of it."""
    epilog, command.epilog = command.epilog, None
    try:
        show(ctx, formatter)
    finally:
        command.epilog = epilog
    print("\n".join(f" {line}" for line in epilog.splitlines()))


def _arrange(command: Any) -> None:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    for param in arguments:
        param.metavar = param.metavar or str(param.name).upper()
    options = [_described(param, command) for param in command.params if param not in arguments]
    command.params = [*arguments, *_sorted(options, command)]


def _sorted(options: list[Any], command: Any) -> list[Any]:
    return sorted(options, key=lambda param: _ORDER.get(_key(param, command), len(_ORDER)))


def _described(param: Any, command: Any) -> Any:
    """An option in its group, with a word for its value; its default in its text, on whose last line it often fits."""
    param.rich_help_panel = _PANEL_OF.get(_key(param, command))
    number = "N" if param.name in _NUMBERS else ""  # and nothing behind a flag
    param.metavar = param.metavar or number or _TYPED.get(value_type(command, param)[0], "")
    param.min = param.max = None  # of the range that typer shows; what checks has its own
    if (
        param.show_default
        and isinstance(param.default, str | int | float)
        and param.default is not False
        and param.default != "auto"
    ):
        default = f"{param.default:g}" if isinstance(param.default, float) else param.default
        param.help += f" Default: {default}."
    param.show_default = False
    return param


def _key(param: Any, command: Any) -> str:
    special = f"{command.name}.{param.name}"
    return special if special in _PANEL_OF else str(param.name)
