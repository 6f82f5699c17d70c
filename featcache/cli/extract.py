"""``extract``: the command that makes a cache. In: what was typed. Out: a line on stdout, or facts with ``--json``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from featcache.cli import options
from featcache.cli.console import show_progress, show_result


@options.reads_source
def extract(
    source: Annotated[
        Path,
        typer.Argument(
            readable=False, help="Folder of class folders (or of splits, or of images), an archive, shards, or a table."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The cache; updated if it exists.")],
    reading: options.Reading = options.AS_FOUND,
    backbone: options.Backbone = "auto",
    weights: options.Weights = "auto",
    batch_size: options.BatchSize = "auto",
    precision: options.Precision = "auto",
    dtype: options.Dtype = "auto",
    resize: options.Resize = "auto",
    crop: options.Crop = "auto",
    interpolation: options.Interpolation = "auto",
    pool: options.Pool = "auto",
    layers: options.Layers = "auto",
    decode: options.Decode = "auto",
    white_level: options.WhiteLevel = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images, evenly spread.")] = None,
    max_bad: options.MaxBad = 0.05,
    reuse: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another cache to take embeddings from; may be repeated.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a cache of other settings, or a damaged one.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Embed images into a cache, or bring it up to date.

    Only new content is embedded, and an interrupted run goes on where it was.
    """
    from featcache.extraction.extract import extract as run
    from featcache.extraction.request import ExtractRequest

    images = reading.of(source)
    request = ExtractRequest(
        backbone=backbone,
        weights=weights,
        resize=options.size(resize),
        crop=options.count(crop, "crop"),
        interpolation=None if interpolation == "auto" else interpolation,
        pool=None if pool == "auto" else pool,
        layers=options.count(layers, "layers"),
        decode=None if decode == "auto" else decode,
        white_level=options.count(white_level, "white level"),
        precision=precision,
        dtype=dtype,
    )
    with show_progress("embedding") as progress:
        report = run(
            images,
            output,
            request,
            device=device,
            workers=options.count(workers, "workers"),
            batch_size=options.count(batch_size, "batch size"),
            limit=limit,
            force=force,
            reuse=reuse or (),
            progress=progress,
        )
    show_result(report.lines(), dataclasses.asdict(report), as_json=as_json)
    options.exit_if_bad(report.refused, report.images, max_bad)


COMMANDS: options.Commands = {
    extract: "featcache extract photos/ -o features.h5  ·  featcache extract list.csv -o f.h5 --limit 100",
}
