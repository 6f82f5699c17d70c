"""``fit-head`` and ``finetune``: the commands that make a model. In: what was typed. Out: scores, or facts with ``--json``."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.cli import options
from featcache.cli.console import is_first_process, note, say, show_result, show_training
from featcache.errors import UsageError
from featcache.system.display import printable, quantity

if TYPE_CHECKING:
    from featcache.finetuning.result import FinetuneReport
    from featcache.images.source import Source

_AsForExtract = Annotated[str | None, typer.Option(help="Without --init: as for extract.")]


def fit_head(
    cache: Annotated[Path, typer.Argument(readable=False, help="A cache file written by extract.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The model.")],
    clf: Annotated[str, typer.Option(help="logreg, linear or mlp.")] = "logreg",
    c: Annotated[
        str, typer.Option("--C", help="Inverse regularisation strength of logreg; auto: cross-validated.")
    ] = "auto",
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation on training rows; 0 for none.")] = 5,
    class_weight: Annotated[str, typer.Option(help="none, or balanced: rare classes weigh more.")] = "none",
    hidden: Annotated[
        str | None, typer.Option(metavar="N,N", help="Of mlp: sizes of its hidden layers. Default: 512.")
    ] = None,
    dropout: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Of mlp: dropped after hidden layers, or a list. Default: 0.25.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Of linear, mlp: exactly so many. Default: what suits held-out images.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Of linear, mlp: learning rate. Default: 0.003.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of linear, mlp: images per step. Default: by their number.")
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(metavar="FILE", readable=False, help="A table, joined by path, that says what stays in one fold."),
    ] = None,
    group_column: Annotated[str | None, typer.Option(help="Its column that does (patient, place).")] = None,
    path_column: options.PathColumn = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of folds, initial weights and batches.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:N, mps. Default: a CUDA GPU if there is enough to do.")
    ] = "auto",
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Copy the backbone's weights into the model.")
    ] = False,
    no_report: options.NoReport = False,
    log: options.Log = None,
    as_json: options.Json = False,
) -> None:
    """Train a classifier on cached embeddings, in seconds.

    Everything is chosen on training rows; val and test stay untouched.
    """
    from featcache.models.fit import fit_head as run
    from featcache.reports.scores import audit_line, fit_lines

    options.check_log(log, output)
    report = run(
        cache,
        output,
        clf=clf,  # type: ignore[arg-type]
        C=options.number(c, "C"),
        folds=folds,
        class_weight=class_weight,  # type: ignore[arg-type]
        hidden=_numbers(hidden, "hidden", int),
        dropout=_numbers(dropout, "dropout", float),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        groups=_table(groups, path_column),
        group_column=group_column,
        seed=seed,
        device=device,
        self_contained=self_contained,
    )
    lines = fit_lines(report, [*map(printable, report.class_names)])
    lines.append(
        audit_line(
            report.label_suspects, report.copies["across_splits"], printable(str(cache)), of=" of training images"
        )
    )
    try:
        show_result(lines, dataclasses.asdict(report), as_json=as_json)
    finally:  # also where the reader of stdout went away
        files = [] if no_report else write_report_beside(report.model, cache=cache)
        _log(log, "fit-head", report.model, files)


def _table(groups: Path | None, path_column: str | None) -> "Source | None":
    from featcache.images.source import Source

    if groups is None and path_column is not None:
        raise UsageError(f"--path-column {path_column} is of a table of groups; say which, as --groups TABLE")
    return None if groups is None else Source(groups, path_column=path_column)


def write_report_beside(model: Path, **about: Any) -> list[Path]:
    """Write the page about a model beside it. The model is saved by now, so that whatever goes wrong here is only said."""
    from featcache.reports.model_report.report import report_beside

    try:
        paths = report_beside(model, **about)
        for path in paths:
            note(f"  {'report' if path.suffix == '.html' else 'contact sheet'} in {path}")
        return paths
    except Exception as error:
        say(f"no report of {model}: {error}")
        return []


def _log(tracker: str | None, command: str, model: Path, files: Iterable[Path]) -> None:
    """Tell ``tracker`` about a model that was just saved."""
    from featcache.reports.trackers.run import training_run

    options.log_run(tracker, lambda: training_run(command, model, files))


def _numbers(text: str | None, name: str, kind: Callable[[str], float]) -> Any:
    """``256,128`` as a tuple. Raises UsageError, calling the option ``name``."""
    try:
        return None if text is None else tuple(kind(word) for word in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{name} takes {what} with commas between them, found {text!r}") from None


@options.reads_source
def finetune(
    source: Annotated[
        Path, typer.Argument(readable=False, help="Labelled images: folders, archives or a table, as for extract.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The new model.")],
    reading: options.Reading = options.AS_FOUND,
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", readable=False, help="Model to start from. Default: one is extracted and fit first."
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="default, gradual, ants-bees, ants-bees-frozen, cats-dogs, flowers, flowers-frozen, caltech101; "
            "or a .toml file of its fields."
        ),
    ] = "default",
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe: lr=0.001, hidden=500,200."),
    ] = [],  # noqa: B006 - typer's own
    backbone: _AsForExtract = None,
    weights: _AsForExtract = None,
    resize: _AsForExtract = None,
    crop: _AsForExtract = None,
    pool: _AsForExtract = None,
    layers: _AsForExtract = None,
    white_level: _AsForExtract = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per batch, instead of the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of the head, instead of the recipe's.")] = None,
    backbone_lr: Annotated[float | None, typer.Option(help="Of the backbone's last stage.")] = None,
    unfreeze: Annotated[
        str | None,
        typer.Option(help="head, last-stage, half, most (all but the first stages), all, freezeout or gradual."),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=0, help="Stop after so many epochs without a better score; 0: never.")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Score val every so many steps, too. Default: after each epoch.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="90s, 10m, 1h30m: plan fewer epochs, or train less, so that it ends in time."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of order, augmentation, new weights.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32, or mixed: bf16, fp16.")] = "auto",
    micro_batch: Annotated[
        str, typer.Option(help="Most images per forward pass, or auto; gradients add up to the batch.")
    ] = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    groups: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", readable=False, help="The table that has this column, joined by path. Default: SOURCE."
        ),
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Of a table: what it says belongs together (patient, place) stays on one side.")
    ] = None,
    figures: options.Figures = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Discard an interrupted run and start anew.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there already.")] = False,
    no_report: options.NoReport = False,
    log: options.Log = None,
    as_json: options.Json = False,
) -> None:
    """Train the backbone, too, end to end, from the cached head on.

    The result is by default never below that head on val.
    """
    from featcache.extraction.request import ExtractRequest
    from featcache.finetuning.finetune import finetune as run
    from featcache.finetuning.recipe_files import parse_settings
    from featcache.images.archives import is_home
    from featcache.reports.figures import check_figures

    named = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "backbone_lr": backbone_lr}
    changes = parse_settings(settings, named | {"unfreeze": unfreeze, "patience": patience, "eval_every": eval_every})
    asked: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights,
        "resize": None if resize is None else options.size(resize),
        "crop": None if crop is None else options.count(crop, "crop"),
        "pool": None if pool == "auto" else pool,
        "layers": None if layers is None else options.count(layers, "layers"),
        "white_level": None if white_level is None else options.count(white_level, "white level"),
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    images = reading.of(source)
    if figures is not None:
        check_figures(figures)
    options.check_log(log, output)
    with show_training() as progress:
        report = run(
            images,
            output,
            init=init,
            request=ExtractRequest(**asked) if asked else None,
            recipe=recipe,
            changes=changes,
            seed=seed,
            precision=precision,
            device=device,
            workers=options.count(workers, "workers"),
            micro_batch=options.count(micro_batch, "micro batch"),
            groups=groups,
            group_column=group_column,
            resume=resume,
            force=force,
            overwrite=overwrite,
            budget=budget,
            progress=progress,
            preparing=progress,
        )
    if not is_first_process():
        return
    lines = [
        f"{report.model}: best epoch {report.best_epoch} of {report.epochs} (step {report.best_step}), "
        f"{report.images_per_second:,.1f} images/s"
        if report.best_epoch
        else f"{report.model}: the cached head, nothing was trained",
        *(f"  {line}" for line in (*report.comparison, report.verdict)),
        *(f"  {line}" for line in _of_groups(report)),
        f"  {report.seconds:.0f} s{_of_budget(report)}; details in {report.model / 'metrics.json'} and history.csv",
    ]
    try:
        show_result(lines, dataclasses.asdict(report), as_json=as_json)
    finally:  # also where the reader of stdout went away
        files = _draw_curves(report.model, figures) if report.epochs else []
        if not no_report:
            files += write_report_beside(report.model, pictures=source if is_home(source) else None)
        _log(log, "finetune", report.model, files)


def _of_groups(report: "FinetuneReport") -> list[str]:
    if report.groups is None:
        return []
    training, across = report.groups["training"], report.groups["across_splits"]
    verb = "trains" if training == 1 else "train"
    seen = f"; {quantity(across, 'image')} of val and test {'is' if across == 1 else 'are'} of them" if across else ""
    return [
        f"{quantity(training, 'group')} ({printable(report.groups['column'])}) {verb}{seen or ', no image of val or test is of them'}"
    ]


def _of_budget(report: "FinetuneReport") -> str:
    from featcache.finetuning.budget import in_words

    if report.budget is None:
        return ""
    late = ", which ended training before its plan did" if report.budget["out_of_time"] else ""
    return f" of {in_words(report.budget['budget'])}{late}"


def _draw_curves(model: Path, figures: Path | None) -> list[Path]:
    """Draw the history beside the model. The model is saved by now, so that whatever goes wrong here is only said."""
    from featcache.models.model import load_model
    from featcache.reports.curves import draw_curves
    from featcache.reports.figures import write_figures
    from featcache.reports.model_report.learning import training_charts

    files: list[Path] = []
    try:
        if figures is not None:
            files += write_figures(training_charts(load_model(model)), figures)
        curves = draw_curves(model)
        note(f"  curves in {curves}")
        files.append(curves)
    except Exception as error:
        say(f"no curves of {model}: {error}")
    return files


COMMANDS: options.Commands = {
    fit_head: "featcache fit-head features.h5 -o model/  ·  featcache fit-head features.h5 -o mlp/ --clf mlp",
    finetune: "featcache finetune photos/ --init model/ -o model-ft/  ·  "
    "featcache finetune photos/ -o model-ft/ --backbone resnet18 --recipe gradual",
}
