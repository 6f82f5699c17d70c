"""Commands that look: ``stats``, ``preview``, ``info``, ``verify``, ``backbones``, ``doctor``. In: what was typed. Out: facts on stdout."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featcache.cli import options
from featcache.cli.console import facts_as_lines, interruptible, note, show_progress, show_result
from featcache.errors import DamagedCacheError, DownloadError, UsageError
from featcache.system.display import quantity
from featcache.system.path_advice import HERE, check_path

if TYPE_CHECKING:
    from featcache.images.source import Source


@options.reads_source
def stats(
    source: Annotated[
        Path,
        typer.Argument(
            readable=False, help="Folder of class folders (or of splits, or of images), an archive, shards, or a table."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Where to write stats.html and stats.json.")
    ] = None,
    figures: options.Figures = None,
    reading: options.Reading = options.AS_FOUND,
    sample: Annotated[
        int | None, typer.Option(min=0, help="How many images to decode. Default: 5000, fewer large ones.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another one draws another sample.")] = 0,
    workers: options.Readers = "auto",
    as_json: options.Json = False,
) -> None:
    """Look at images before any work: classes, sizes, damage, copies.

    Headers are read of all of them, pixels of a sample.
    """
    from featcache.reports.source_stats.stats import stats as run

    images = reading.of(source)
    with show_progress("reading") as progress:
        found = run(
            images,
            output,
            figures=figures,
            sample=sample,
            seed=seed,
            workers=options.count(workers, "workers"),
            progress=progress,
        )
    show_result([] if as_json else found.lines(), found.to_json(), as_json=as_json)


def info(
    path: Annotated[Path, typer.Argument(readable=False, help="A cache file or a model folder.")],
    as_json: options.Json = False,
) -> None:
    """Show what a cache or a model holds and where it came from."""
    from featcache.reports.info import describe

    facts = describe(path)
    shown = facts
    if facts["kind"] == "parts" and facts["missing"]:  # numbers of parts, which alone would read as a count
        shown = facts | {"missing": f"part{'s' * (not facts['missing'].isdecimal())} {facts['missing']}"}
    show_result(facts_as_lines(shown), facts, as_json=as_json)


@options.reads_source
def verify(
    cache: Annotated[Path, typer.Argument(readable=False, help="A cache file.")],
    repair: Annotated[
        Path | None,
        typer.Option(metavar="SOURCE", readable=False, help="Mend it from the images it was made from."),
    ] = None,
    reading: options.Reading = options.AS_FOUND,
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    batch_size: options.BatchSize = "auto",
    as_json: options.Json = False,
) -> None:
    """Compare every byte of a cache with its checksums; mend it.

    With --repair what is damaged is embedded again, and only that.
    """
    threads, batch = options.count(workers, "workers"), options.count(batch_size, "batch size")
    if repair is not None:
        images = reading.of(repair)
        _mend(cache, images, device=device, workers=threads, batch_size=batch, as_json=as_json)
        return
    given = {
        **reading.of(cache).options,
        "--device": None if device == "auto" else device,
        "--workers": threads,
        "--batch-size": batch,
    }
    if wrong := [option for option, value in given.items() if value is not None]:
        raise UsageError(f"{wrong[0]} is for repairing; add --repair SOURCE or leave it out")
    from featcache.cache.cache import FeatureCache

    check_path(cache, "cache", ("verify", HERE))
    opened = FeatureCache.salvage(cache)
    damaged = opened.verify()
    facts = {"cache": cache, "rows": len(opened), "damaged": damaged, "damaged_columns": opened.damaged_columns}
    if damaged or opened.damaged_columns:
        what = damage_in_words(damaged, opened.damaged_columns)
        raise DamagedCacheError(f"{cache} is damaged: checksum mismatch in {what}; {opened.advice}", facts=facts)
    show_result([f"{cache}: {quantity(len(opened), 'row')}, all intact"], facts, as_json=as_json)


def _mend(
    cache: Path,
    source: "Source",
    *,
    device: str,
    workers: int | None,
    batch_size: int | None,
    as_json: bool,
) -> None:
    from featcache.extraction.repair import repair

    with interruptible(cache), show_progress("embedding") as progress:
        report = repair(
            cache,
            source,
            device=device,
            workers=workers,
            batch_size=batch_size,
            progress=progress,
        )
    if report.damaged or report.damaged_columns:
        restored = ", ".join(report.restored_columns) or "no column"
        lines = [
            f"{cache}: {quantity(report.rows, 'row')}; damaged were {damage_in_words(report.damaged, report.damaged_columns)}",
            f"  embedded {quantity(report.embedded, 'image')} again, took {restored} from {source} ({report.seconds:.1f} s)",
        ]
    else:
        lines = [f"{cache}: {quantity(report.rows, 'row')}, all intact, nothing to repair"]
    show_result(lines, dataclasses.asdict(report), as_json=as_json)


def damage_in_words(damaged: Sequence[tuple[int, int]], columns: Sequence[str]) -> str:
    """``rows 0-1023, 2048-3071, digests``: the first few ranges of rows, then the columns."""
    ranges = ", ".join(f"{start}-{stop - 1}" for start, stop in damaged[:20])
    more = f" and {len(damaged) - 20} ranges more" if len(damaged) > 20 else ""
    return ", ".join([*([f"rows {ranges}{more}"] if damaged else []), *columns])


def backbones(
    pattern: Annotated[
        str, typer.Argument(help="Only names that contain this; one whole name shows that network.")
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="The table of all that match, also on a terminal.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show backbones to choose from: size, cost, licence, accuracy.

    On a terminal those that most should choose from, into a pipe all.
    """
    from featcache.backbones.catalog import ALIASES, CHOSEN, counted, matching
    from featcache.reports.backbones import describe_network, legend, near, network_lines, table_lines, table_of

    names = matching(pattern)
    one = pattern in ALIASES or pattern in names or pattern in counted() or pattern.startswith("transformers/")
    try:
        network = describe_network(pattern) if one and not everything else None
    except DownloadError as error:
        error.instead = ""  # the command that is advised elsewhere has a --backbone
        raise
    if network and not as_json:
        show_result(network_lines(network), network, as_json=False)
        others = len([name for name in names if name != network["name"]])
        if others:
            note(f"{others} other names contain {pattern!r}: featcache backbones {pattern} --all")
        return
    few = not (pattern or everything or as_json) and sys.stdout.isatty()
    rows = table_of([*([] if pattern else CHOSEN), *([] if few else names)])
    facts = {"backbones": names, "table": rows} | ({"network": network} if network else {})
    show_result(table_lines(rows, wrap=sys.stdout.isatty()) if rows else [], facts, as_json=as_json)
    for line in legend(rows) if rows else []:
        note(line)
    hint = f"; near: {', '.join(found)}" if not names and (found := near(pattern, matching())) else ""
    more = (
        "; `featcache backbones PATTERN` shows those that contain it, --all all, openclip those of open_clip"
        if few
        else ""
    )
    note(quantity(len(names), "backbone") + (f" with {pattern!r} in their name" if pattern else "") + hint + more)


def doctor(
    images: Annotated[
        Path | None,
        typer.Option(metavar="SOURCE", readable=False, help="What to measure with. Default: generated photos."),
    ] = None,
    backbone: options.BackboneAlone = "auto",
    weights: Annotated[
        str | None, typer.Option(help="As for extract. Default: random ones, as fast, no download.")
    ] = None,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    batch_size: options.BatchSize = "auto",
    seconds: Annotated[
        float, typer.Option(min=0.0, max=3600.0, help="How long to measure; 0 only shows the facts.")
    ] = 20.0,
    train: Annotated[
        bool,
        typer.Option("--train", help="Also time steps of finetune, as long; without --device on the CPU and all GPUs."),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure how fast this machine embeds (and trains), and what limits.

    What it has and what would help is shown, too.
    """
    from featcache.reports.doctor import doctor as run
    from featcache.reports.doctor import table_lines

    facts = run(
        images,
        backbone=backbone,
        weights=weights,
        precision=precision,
        device=device,
        workers=options.count(workers, "workers"),
        batch_size=options.count(batch_size, "batch size"),
        seconds=seconds,
        train=train,
    )
    shown, sentences = dict(facts), table_lines(facts["devices"]) if train else []
    shown.pop("devices", None)
    if seconds:
        shown["measured"] = dict(facts["measured"])
        sentences += shown["measured"].pop("advice")
    show_result([*facts_as_lines(shown), *sentences], facts, as_json=as_json)


@options.reads_source
def preview(
    source: Annotated[
        Path, typer.Argument(readable=False, help="Images: folders, archives or a table, as for extract.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The picture. Default: preview.png.")
    ] = Path("preview.png"),
    recipe: Annotated[
        str | None,
        typer.Option(
            help="As for finetune. Default: only what evaluation sees if a backbone and no --views is named, else default."
        ),
    ] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe, as for finetune.")
    ] = [],  # noqa: B006 - typer's own
    backbone: options.BackboneAlone = "auto",
    weights: options.Weights = "auto",
    resize: options.Resize = "auto",
    crop: options.Crop = "auto",
    interpolation: options.Interpolation = "auto",
    white_level: options.WhiteLevel = "auto",
    reading: options.Reading = options.AS_FOUND,
    n: Annotated[int, typer.Option("--n", min=1, max=200, help="Images.")] = 8,
    views: Annotated[
        int | None, typer.Option(min=1, max=50, help="Augmented views of each. Default: 4, none without a recipe.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of sample and augmentation.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Draw what the network sees: photographs, evaluation, augmentation.

    The pixels are those of training, with the normalisation left out.
    """
    from featcache.extraction.request import ExtractRequest
    from featcache.finetuning.recipe_files import parse_settings
    from featcache.reports.preview import preview as run
    from featcache.reports.preview import summary

    made = run(
        reading.of(source),
        output,
        recipe=recipe,
        changes=parse_settings(settings, {}),
        request=ExtractRequest(
            backbone=backbone,
            weights=weights,
            resize=options.size(resize),
            crop=options.count(crop, "crop"),
            interpolation=None if interpolation == "auto" else interpolation,
            white_level=options.count(white_level, "white level"),
        ),
        n=n,
        views=views,
        seed=seed,
    )
    show_result(summary(made), made.facts(), as_json=as_json)


COMMANDS: options.Commands = {
    stats: "featcache stats photos/  ·  featcache stats photos/ -o stats/  ·  featcache stats list.csv --json",
    preview: "featcache preview photos/  ·  featcache preview photos/ --recipe flowers --backbone resnet50 -o flowers.png",
    info: "featcache info features.h5  ·  featcache info model/",
    verify: "featcache verify features.h5  ·  featcache verify features.h5 --repair photos/",
    backbones: "featcache backbones  ·  featcache backbones dinov2  ·  featcache backbones resnet50",
    doctor: "featcache doctor  ·  featcache doctor --images photos/ --backbone mobilenet_v3_large",
}
