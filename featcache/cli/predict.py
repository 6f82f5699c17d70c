"""``predict`` and ``evaluate``: the commands that use a model. In: what was typed. Out: rows or scores."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.cli import options
from featcache.cli.console import note, printable_row, show_progress, show_result
from featcache.errors import SourceError, UsageError
from featcache.system.display import printable, quantity
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import as_path, is_model
from featcache.system.supervisor import notes

if TYPE_CHECKING:
    from featcache.reports.gallery import Draw

Coverage = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Add the set of classes that holds the truth this often, such as 0.95."),
]
Evidence = Annotated[
    Path | None,
    typer.Option(
        metavar="CACHE",
        readable=False,
        help="The cache that the model was fit on: adds the three nearest training images and how unfamiliar each is.",
    ),
]
AbstainBelow = Annotated[
    float | None, typer.Option(metavar="P", help="Call labels less probable than this unsure, such as 0.9.")
]
Gallery = Annotated[
    Path | None,
    typer.Option("--gallery", metavar="FILE", help="Write a page of the images and their labels, too: a .html file."),
]


def predict(
    model: Annotated[Path, typer.Argument(readable=False, help="A model folder.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(readable=False, help="Images, folders, tables, - for stdin; or cache files."),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A .csv or .jsonl file. Default: stdout.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to name per image.")] = 1,
    probs: Annotated[bool, typer.Option("--probs", help="Add the probability of every class.")] = False,
    coverage: Coverage = None,
    abstain_below: AbstainBelow = None,
    evidence: Evidence = None,
    gallery: Gallery = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Images on the page, drawn at random. Default: all, up to 10,000.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--source", metavar="FOLDER", readable=False, help="Of caches: the folder of their images, for the page."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    root: options.Root = None,
    path_column: options.PathColumn = None,
    batch_size: options.BatchSize = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    max_bad: options.MaxBad = 1.0,
    as_json: options.Json = False,
) -> None:
    """Label images.

    One row per image, in order, refused ones included.
    """
    from featcache.cache.cache import is_cache
    from featcache.images.source import Source
    from featcache.models.model import load_model
    from featcache.models.predict import predict as run
    from featcache.reports.gallery import Draw
    from featcache.reports.predictions_table import prediction_rows
    from featcache.system.runtime_options import check_runtime_options

    threads, batch = options.count(workers, "workers"), options.count(batch_size, "batch size")
    check_runtime_options(device, workers=threads, batch_size=batch)
    output = None if output is None else as_path(output)
    _check_table(output, inputs, overwrite=overwrite)
    gallery = None if gallery is None else as_path(gallery)
    caches = evidence is not None or any(map(is_cache, inputs))
    _check_gallery(gallery, sample=sample, pictures=pictures, caches=caches)
    check_path(model, "model", ("predict", HERE, *inputs))
    started = time.perf_counter()
    loaded = load_model(model)
    with show_progress("predicting", show=output is not None) as progress:
        sources = [Source(path, root=root, path_column=path_column) for path in inputs]
        predictions = run(
            loaded,
            sources,
            device=device,
            workers=threads,
            batch_size=batch,
            progress=progress,
            coverage=coverage,
            evidence=evidence,
            abstain_below=abstain_below,
        )
        draw = None if gallery is None else Draw(loaded, sources, evidence=evidence, sample=sample)
        watched = predictions if draw is None else draw.watch(predictions)
        rows = prediction_rows(watched, loaded.classes, top_k=top_k, all_probabilities=probs)
        written, refused, unsure = _write(rows, output)
    if draw is not None and gallery is not None:
        _write_gallery(gallery, draw, pictures, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    doubts = f", {unsure} of them unsure" if unsure else ""
    line = f"{written - refused:,} of {quantity(written, 'image')} labelled{doubts} in {seconds:.1f} s"
    line += f": {output}" if output else ""
    lines = [line, *([] if gallery is None else [f"  gallery: {gallery}"])]
    facts = {
        "model": model,
        "output": output,
        "gallery": gallery,
        "images": written,
        "labelled": written - refused,
        "refused": refused,
        "unsure": unsure,
        "seconds": seconds,
    }
    if output is None:  # the rows are the result
        for each in lines:
            note(each)
    failed = written == refused
    if not (failed and as_json):
        show_result(lines if output else [], facts, as_json=as_json)
    if failed:
        raise SourceError("not one image could be labelled; each row says why in its reason column", facts=facts)
    options.exit_if_bad(refused, written, max_bad)


def _check_table(output: Path | None, inputs: list[Path], *, overwrite: bool) -> None:
    """Refuse, before any work, a file that cannot or must not be written. Raises UsageError, StorageError."""
    from featcache.system.files import check_may_replace, check_output, target_of

    if output is None:
        if overwrite:
            raise UsageError("--overwrite is for the file that -o names; leave it out, or add -o")
        return
    if output.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"cannot tell the format of {output}; name it .csv or .jsonl")
    check_output(output)
    if is_model(target_of(output).parent):
        raise UsageError(f"{output.parent} is a model folder, which keeps no other files; choose another -o")
    if not os.path.lexists(output):
        return
    if output.exists() and any(path.exists() and path.samefile(output) for path in inputs):
        raise UsageError(f"{output} is one of the inputs, and would be replaced; choose another -o")
    check_may_replace(output, "--overwrite", given=overwrite)


def _check_gallery(gallery: Path | None, *, sample: int | None, pictures: Path | None, caches: bool) -> None:
    """Refuse, before any work, a page that cannot or must not be written. Raises UsageError, StorageError."""
    from featcache.reports.elements.page import check_page_path
    from featcache.reports.gallery import check_pictures

    if gallery is None:
        if given := [name for name, value in (("--sample", sample), ("--source", pictures)) if value is not None]:
            raise UsageError(f"{given[0]} is for the page that --gallery names; leave it out, or add --gallery")
        return
    check_page_path(gallery)
    if is_model(gallery.parent):
        raise UsageError(f"{gallery.parent} is a model folder, which keeps no other files; choose another --gallery")
    check_pictures(pictures, of_caches=caches)


def _write_gallery(path: Path, draw: "Draw", pictures: Path | None, seconds: float) -> None:
    from featcache.reports.elements.page import publish_page
    from featcache.reports.gallery_page import gallery_page

    publish_page(path, gallery_page(draw, pictures=pictures, seconds=seconds))


def _write(rows: Iterator[dict[str, Any]], output: Path | None) -> tuple[int, int, int]:
    """Write ``rows`` to a file, or to stdout; how many there were, of refused images, and unsure."""
    from featcache.reports.predictions_table import write_rows
    from featcache.system.files import publish_file

    if output is not None:
        with publish_file(output) as file:
            return write_rows(rows, file, "jsonl" if output.suffix == ".jsonl" else "csv")
    notes.shared.output_started = True
    if sys.stdout.isatty():  # which would obey what a name holds; a file or a pipe gets names as they are
        rows = map(printable_row, rows)
    counts = write_rows(rows, sys.stdout.buffer, "csv")
    sys.stdout.flush()
    return counts


@options.reads_source
def evaluate(
    model: Annotated[Path, typer.Argument(readable=False, help="A model folder.")],
    source: Annotated[
        Path, typer.Argument(readable=False, help="Labelled images (folder, archive or table), or a cache file.")
    ],
    split: Annotated[
        str, typer.Option(help="train, val, test, all; auto: test if there is one, else val, else all.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="A .csv or .jsonl file: a row per image, with its label."),
    ] = None,
    coverage: Coverage = None,
    abstain_below: AbstainBelow = None,
    evidence: Evidence = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write MODEL.report.html beside the model: a page of these scores.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    figures: options.Figures = None,
    log: options.Log = None,
    reading: options.Reading = options.AS_FOUND,
    batch_size: options.BatchSize = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    as_json: options.Json = False,
) -> None:
    """Score a model on labelled images or on a cache.

    Accuracy, scores per class, and which class is taken for which.
    """
    from featcache.cache.cache import is_cache
    from featcache.models.evaluate import evaluate as run
    from featcache.reports.figures import check_figures, write_figures
    from featcache.reports.model_report.calibration import calibration_charts
    from featcache.reports.predictions_table import as_written
    from featcache.reports.scores import audit_line, evaluation_lines
    from featcache.reports.trackers.run import evaluation_run

    images = reading.of(source)
    chosen = None if split == "auto" else split
    threads, batch = options.count(workers, "workers"), options.count(batch_size, "batch size")
    output = None if output is None else as_path(output)
    _check_table(output, [source], overwrite=overwrite)
    if figures is not None:
        check_figures(figures)
    page = _page_of(model) if report else None
    if log is not None:
        check_path(model, "model", ("evaluate", HERE))
        options.check_log(log, model)
    kept: list[Any] = []
    with show_progress("evaluating") as progress:
        scores = run(
            model,
            images,
            split=chosen,
            rows=output is not None,
            device=device,
            workers=threads,
            batch_size=batch,
            progress=progress,
            coverage=coverage,
            evidence=evidence,
            abstain_below=abstain_below,
            then=None if page is None else lambda _, scored: kept.append(scored),
        )
    lines = evaluation_lines(scores, [*map(printable, scores["per_class"])])
    audited = printable(str(source)) if is_cache(source) else None
    training = scores["accuracy_without_copies"] is None
    copies = None if training else scores["copies"]["across_splits"]
    lines.append(audit_line(scores["label_suspects"], copies, audited, of=" of these images"))
    if output is not None:
        written, *_ = _write(map(as_written, scores.pop("rows")), output)
        lines.append(f"  {quantity(written, 'row')}: {output}")
    files: list[Path] = []
    if figures is not None:
        files += write_figures(calibration_charts(scores), figures)
        lines.append(f"  {quantity(len(files), 'figure')}: {figures}")
    if page is not None:
        from featcache.reports.model_report.report import report_beside

        pages = report_beside(model, cache=source if is_cache(source) else None, scored=kept[0], quick=False)
        lines += [f"  {'report' if path == page else 'contact sheet'}: {path}" for path in pages]
        files += pages
    show_result(lines, scores | {"output": output, "report": page}, as_json=as_json)
    options.log_run(log, lambda: evaluation_run(model, scores, source=source, files=files))


def _page_of(model: Path) -> Path:
    """Where the report of a model goes. Raises StorageError, before any work, if it cannot or must not be written."""
    from featcache.reports.elements.page import check_page_path
    from featcache.reports.model_report.report import page_beside

    check_path(model, "model", ("evaluate", HERE))
    page = page_beside(model)
    check_page_path(page)
    return page


COMMANDS: options.Commands = {
    predict: "featcache predict model/ photo.jpg  ·  featcache predict model/ new/ -o labels.csv --top-k 2  ·  "
    "featcache predict model/ new/ --coverage 0.95 --evidence features.h5  ·  "
    "featcache predict model/ new/ -o labels.csv --gallery labels.html",
    evaluate: "featcache evaluate model/ photos/  ·  featcache evaluate model/ features.h5 -o rows.csv --coverage 0.95",
}
