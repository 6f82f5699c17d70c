"""``export`` and ``import``: to other programs, and from them. In: what was typed. Out: a file."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from featcache.cli import options
from featcache.cli.console import show_result
from featcache.errors import UsageError
from featcache.system.display import quantity
from featcache.system.path_kinds import Kind, kind_of


def export(
    model: Annotated[Path, typer.Argument(readable=False, help="A model folder, or a cache file.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Of a model .onnx or .safetensors; of a cache .parquet, .npz, .faiss, .fiftyone.json or .labelstudio.json.",
        ),
    ],
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="MODEL", readable=False, help="Of a cache: add what this model says of each image."
        ),
    ] = None,
    map_method: Annotated[
        str, typer.Option("--map", help="Of a cache: add places on a map: pca, tsne (extra `report`), auto or none.")
    ] = "none",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a model or a cache as one file for other programs.

    A model runs without featcache, and is checked first; of a cache the rows.
    """
    from featcache.cache.export import format_of

    what = kind_of(model)
    rows = what is Kind.CACHE and output.suffix.lower() not in (".onnx", ".safetensors")
    if rows or (what is Kind.MISSING and format_of(output) is not None):
        _export_cache(model, output, predictions, map_method, force=force, as_json=as_json)
        return
    if given := "--model" if predictions is not None else "--map" if map_method != "none" else "":
        raise UsageError(f"{given} is for the rows of a cache; leave it out, or give a cache")
    if (kind := format_of(output)) is not None and kind_of(model) is Kind.MODEL:
        raise UsageError(f"{kind} is for the rows of a cache; name {output} .onnx or .safetensors, or give a cache")
    from featcache.models.export import export_model
    from featcache.reports.elements.numbers import bytes_text

    report = export_model(model, output, force=force)
    lines = [
        f"  {heading}: " + "; ".join(f"{name}, {what}" for name, what in entries.items())
        for heading, entries in (("in", report.inputs), ("out", report.outputs))
    ]
    lines += [
        f"{report.output}: {bytes_text(report.bytes)} in {report.seconds:.1f} s; largest difference from the model:",
        f"  {report.max_difference:.1g} in probability, {report.max_logit_difference:.1g} in logits",
    ]
    show_result(lines, dataclasses.asdict(report), as_json=as_json)


def _export_cache(
    cache: Path, output: Path, model: Path | None, map_method: str, *, force: bool, as_json: bool
) -> None:
    from featcache.reports.elements.numbers import bytes_text
    from featcache.reports.tables import export_cache

    report = export_cache(cache, output, model=model, map=cast("Any", map_method), force=force)
    beside = [f"  {path} says which row is which image" for path in report.files if path != report.output]
    dim = f" ({report.dim})" if report.columns[-1] in ("vector", "embedding") else ""
    lines = [
        f"{report.output}: {quantity(report.rows, 'row')}, {bytes_text(report.bytes)} in {report.seconds:.1f} s",
        f"  {', '.join(report.columns)}{dim}",
        *beside,
        f"  {report.usage}",
    ]
    show_result(lines, dataclasses.asdict(report), as_json=as_json)


def import_(
    table: Annotated[Path, typer.Argument(readable=False, help="Vectors and paths: a Parquet file, or a .npz.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The cache file.")],
    stated: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What made the vectors, in a line; same words, same spec. Default: what an exported cache says.",
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--source",
            metavar="FOLDER",
            readable=False,
            help="The images: identified by their bytes, and shown on pages.",
        ),
    ] = None,
    vector_column: Annotated[
        str | None, typer.Option(help="The column of vectors. Default: the only one, or one called so.")
    ] = None,
    path_column: options.PathColumn = None,
    label_column: Annotated[str | None, typer.Option(help="Of a table: the column of classes.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Of a table: the column of splits.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the cache if it exists.")] = False,
    as_json: options.Json = False,
) -> None:
    """Make a cache of vectors that were computed elsewhere.

    Heads, audit and reports work on it; images cannot be embedded for it.
    """
    from featcache.extraction.external import import_vectors

    report = import_vectors(
        table,
        output,
        stated=stated,
        pictures=pictures,
        vector_column=vector_column,
        path_column=path_column,
        label_column=label_column,
        split_column=split_column,
        force=force,
    )
    splits = ", ".join(f"{name} {n}" for name, n in report.splits.items() if name != "none") or "no splits"
    lines = [
        f"{report.cache}: {quantity(report.rows, 'vector')} of {quantity(report.dim, 'dimension')}, stated: {report.stated}",
        f"  {quantity(report.classes, 'class')}; {splits}; images identified by sha256 {report.digests} ({report.seconds:.1f} s)",
    ]
    show_result(lines, dataclasses.asdict(report), as_json=as_json)


import_.__name__ = "import"  # a word of Python's: no function can be called so where it is defined
COMMANDS: options.Commands = {
    export: "featcache export model/ -o model.onnx  ·  featcache export features.h5 -o features.parquet  ·  "
    "featcache export features.h5 -o x.fiftyone.json --model model/ --map auto",
    import_: "featcache import clip.parquet -o clip.h5 --stated 'CLIP ViT-L/14'  ·  featcache import exported.npz -o f.h5",
}
