"""``report``: the commands that write pages. In: what was typed. Out: a page, and where it is."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from featcache.cli import options
from featcache.cli.console import show_progress, show_result
from featcache.system.display import quantity

if TYPE_CHECKING:
    from featcache.reports.elements.projection import Method


@options.reads_source
def report(
    model: Annotated[Path, typer.Argument(readable=False, help="A model folder.")],
    source: Annotated[
        Path | None,
        typer.Argument(
            readable=False,
            help="Labelled images (folder, archive or table), or a cache file. Default: what the model keeps of held-out images.",
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option("--source", metavar="FOLDER", readable=False, help="Of a cache: the folder of its images."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="train, val, test, all; auto: test if there is one, else val, else all.")
    ] = "auto",
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", readable=False, help="Another model to compare with.")
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(metavar="CACHE", readable=False, help="With images: the cache that the model was fit on."),
    ] = None,
    map_method: Annotated[
        str,
        typer.Option(
            "--map", help="With a cache: pca, tsne (extra `report`), none; auto: t-SNE if it takes < 1 minute."
        ),
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A .html file. Default: beside the model.")
    ] = None,
    figures: options.Figures = None,
    reading: options.Reading = options.AS_FOUND,
    batch_size: options.BatchSize = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    as_json: options.Json = False,
) -> None:
    """Write a page about a model: scores, mistakes with pictures.

    One file that opens offline and asks for nothing.
    """
    from featcache.reports.elements.numbers import bytes_text
    from featcache.reports.model_report.report import report as run

    threads, batch = options.count(workers, "workers"), options.count(batch_size, "batch size")
    images = None
    if source is not None:
        images = reading.of(source)
    with show_progress("predicting") as progress:
        found = run(
            model,
            images,
            output=output,
            pictures=pictures,
            split=None if split == "auto" else split,
            against=against,
            evidence=evidence,
            figures=figures,
            map=cast("Method", map_method),
            device=device,
            workers=threads,
            batch_size=batch,
            progress=progress,
        )
    line = f"{found.report}: {quantity(found.images, 'image')}, {bytes_text(found.bytes)}, in {found.seconds:.1f} s"
    show_result([line], dataclasses.asdict(found), as_json=as_json)


COMMANDS: options.Commands = {
    report: "featcache report model/ features.h5 --source photos/  ·  featcache report model/ photos/ -o report.html",
}
