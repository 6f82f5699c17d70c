"""``audit``: what a cache tells about its images, and the table that follows from a plan. In: what was typed. Out: findings."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from featcache.cli import options
from featcache.cli.console import note, say, show_result, show_steps
from featcache.errors import SourceError, UsageError
from featcache.system.display import quantity
from featcache.system.path_advice import typed


def audit(
    cache: Annotated[Path | None, typer.Argument(readable=False, help="A cache file. With --apply: none.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="For audit.html and tables. With --apply: a .csv file."),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option("--apply", metavar="PLAN", readable=False, help="Make a table of what a plan.csv keeps."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--source", metavar="FOLDER", readable=False, help="Of the images. Default: looked for near the cache."
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", metavar="FOLDER", readable=False, help="With --apply: of the images. Default: looked for near."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --apply: replace the table if it exists.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of folds.")] = 0,
    device: options.Device = "auto",
    workers: options.Readers = "auto",
    as_json: options.Json = False,
) -> None:
    """Find copies, wrong labels and odd images; the score without them.

    Files are never touched: you decide on the page, or in plan.csv, and --apply makes a table of it.
    """
    if output is None:
        raise UsageError("say where to write to: -o audit, or with --apply -o clean.csv")
    threads = options.count(workers, "workers")
    if apply is not None:
        wrong = [name for name, value in (("a cache", cache), ("--source", pictures)) if value is not None]
        if wrong:
            instead = "; --root says where the images are" if "--source" in wrong else ""
            raise UsageError(f"--apply needs the plan alone, found {wrong[0]} as well{instead}")
        _apply(apply, output, root=root, overwrite=overwrite, workers=threads, as_json=as_json)
        return
    if cache is None:
        raise UsageError(
            "audit takes a cache, as `featcache audit features.h5 -o audit`, or a plan, as --apply plan.csv"
        )
    if root is not None:
        raise UsageError("--root is for --apply; the images of a cache are where --source says")
    if overwrite:
        raise UsageError(
            "--overwrite is for --apply; an earlier audit is replaced in any case, an edited plan never is"
        )
    from featcache.reports.audit.audit import audit as run

    with show_steps() as progress:
        found = run(cache, output, source=pictures, seed=seed, device=device, workers=threads, progress=progress)
    show_result(found.lines(), found.to_json() | {"output": output}, as_json=as_json)
    # That of --source may lie where nobody would look for it.
    place = "" if pictures is None and found.root is not None else f" --root {_place(found.root)}"
    plan = typed(output / "plan.csv")
    note(
        f"  decide on {typed(output / 'audit.html')}, whose plan your browser saves, or in {plan}; then "
        f"`featcache audit --apply {plan} -o clean.csv{place}`"
    )


def _apply(plan: Path, output: Path, *, root: Path | None, overwrite: bool, workers: int | None, as_json: bool) -> None:
    from featcache.curation.plan import apply_plan
    from featcache.system.runtime_options import check_runtime_options, usable_cores

    check_runtime_options("cpu", workers=workers)
    try:
        with show_steps() as progress:

            def report(done: int, total: int) -> None:
                if progress is not None:
                    progress(done, total, "comparing images")

            found = apply_plan(
                plan, output, root=root, overwrite=overwrite, workers=workers or usable_cores(), progress=report
            )
    except SourceError as error:
        for problem in error.facts.get("problems", ()):
            say(f"  {problem}")
        raise
    splits = "".join(f", {split} {count:,}" for split, count in found.splits.items())
    lines = [
        f"{found.output}: {quantity(found.images, 'image')}, {quantity(len(found.classes), 'class')}{splits}",
        f"  kept {found.kept:,}, relabelled {found.relabelled:,}, dropped {found.dropped:,}",
    ]
    if found.root is None:
        say(f"warning: the images of {plan} were not found and not looked at; --root FOLDER says where they are")
    show_result(lines, dataclasses.asdict(found), as_json=as_json)
    note(f"  next: featcache extract {typed(found.output)} --root {_place(found.root)} -o features.h5")


def _place(root: Path | None) -> str:
    """Of images, as typed; a word to be replaced where they were not found."""
    return "FOLDER" if root is None else typed(root)


COMMANDS: options.Commands = {
    audit: "featcache audit features.h5 -o audit/  ·  featcache audit --apply plan.csv -o clean.csv --root photos/",
}
