"""``extract``: the command that makes a cache. In: what was typed. Out: a line on stdout, or facts with ``--json``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.cli import options
from featcache.cli.console import show_progress, show_result
from featcache.errors import UsageError

if TYPE_CHECKING:
    from featcache.extraction.executors import Executor
    from featcache.extraction.extract import ExtractReport
    from featcache.extraction.in_parts import PartReport


_MAX_BAD = 0.05

_EXECUTORS = ("local", "ray")


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
    device: Annotated[
        str,
        typer.Option(metavar="NAME", help="cpu, cuda, cuda:N, cuda:all, mps. Default: all GPUs, if there are any."),
    ] = "auto",
    workers: options.Workers = "auto",
    executor: Annotated[str, typer.Option(help="Who embeds: local (this process) or ray (a Ray cluster).")] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of the Ray cluster; auto: the one that runs, else this machine; local."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images, evenly spread.")] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Embed share I of N beside the output, for `featcache merge`; auto: as a scheduler says.",
        ),
    ] = None,
    max_bad: options.MaxBad = _MAX_BAD,
    reuse: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another cache to take embeddings from; may be repeated.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace a cache of other settings, or a damaged one; drop images of a folder that cannot be read.",
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Embed images into a cache, or bring it up to date.

    Only new content is embedded, and an interrupted run goes on where it was.
    """
    from featcache.extraction.extract import extract as run
    from featcache.extraction.in_parts import extract_part
    from featcache.extraction.request import ExtractRequest

    if part is not None and force:
        raise UsageError(
            f"--force replaces {output}, and --part runs would replace each other's work; remove the file, or choose another -o"
        )
    if part is not None and max_bad != _MAX_BAD:
        raise UsageError(
            "--max-bad counts over all images; leave it out of --part runs, and give it to `featcache merge`"
        )
    embeds = _executor(executor, ray_address)
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
    threads, batch = options.count(workers, "workers"), options.count(batch_size, "batch size")
    report: ExtractReport | PartReport
    with show_progress("embedding") as progress:
        common: dict[str, Any] = {
            "device": device,
            "workers": threads,
            "batch_size": batch,
            "limit": limit,
            "reuse": reuse or (),
            "executor": embeds,
        }
        if part is None:
            report = run(images, output, request, force=force, progress=progress, **common)
        else:
            report = extract_part(images, output, part, request, progress=progress, **common)
    show_result(report.lines(), dataclasses.asdict(report), as_json=as_json)
    if part is None:
        options.exit_if_bad(report.refused, report.images, max_bad)


def _executor(name: str, ray_address: str | None) -> "Executor | None":
    """What embeds; None: this process."""
    if name not in _EXECUTORS:
        raise UsageError(f"no executor is called {name!r}; choose from {', '.join(_EXECUTORS)}")
    if name == "local":
        if ray_address is not None:
            raise UsageError("--ray-address says where Ray is; add --executor ray, or leave it out")
        return None
    from featcache.extraction.on_ray import RayExecutor

    chosen = RayExecutor(ray_address or "auto")
    chosen.check()
    return chosen


COMMANDS: options.Commands = {
    extract: "featcache extract photos/ -o features.h5  ·  featcache extract list.csv -o f.h5 --limit 100  ·  "
    "featcache extract photos/ -o features.h5 --part 1/8",
}
