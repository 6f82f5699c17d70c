"""``merge``: the command that packs what ``extract --part`` left. In: what was typed. Out: as ``extract``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from featcache.cli import options
from featcache.cli.console import show_result


def merge(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The cache that the parts are for.")],
    max_bad: options.MaxBad = 0.05,
    as_json: options.Json = False,
) -> None:
    """Pack the parts that `extract --part` runs made into one cache.

    Names the parts that are missing. The images themselves are not needed.
    """
    from featcache.extraction.in_parts import merge as run

    report = run(output)
    show_result(report.lines(), dataclasses.asdict(report), as_json=as_json)
    options.exit_if_bad(report.refused, report.images, max_bad)


COMMANDS: options.Commands = {merge: "featcache merge features.h5"}
