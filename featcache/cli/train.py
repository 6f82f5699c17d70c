"""``fit-head`` and ``finetune``: the commands that make a model. In: what was typed. Out: scores, or facts with ``--json``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.cli import options
from featcache.cli.console import is_first_process, note, say, show_result, show_training

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
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of folds, initial weights and batches.")] = 0,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Copy the backbone's weights into the model.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Train a classifier on cached embeddings, in seconds.

    Everything is chosen on training rows; val and test stay untouched.
    """
    from featcache.models.fit import fit_head as run

    report = run(
        cache,
        output,
        clf=clf,  # type: ignore[arg-type]
        C=options.number(c, "C"),
        folds=folds,
        class_weight=class_weight,  # type: ignore[arg-type]
        seed=seed,
        self_contained=self_contained,
    )
    chosen = f"C {report.C:g}, " if report.C is not None else ""
    lines = [
        f"{report.model}: {report.clf} ({chosen}scaling {report.scaling}), {report.classes} classes, {report.n_train} training images"
    ]
    if report.cv_accuracy is not None:
        choice = "corrected for the choice of the setting; " if report.clf == "logreg" else ""
        lines.append(
            f"  cross-validated accuracy {report.cv_accuracy:.2%} ({choice}standard deviation over folds {report.cv_std:.2%})"
        )
    for name in ("val", "test"):
        value, without = (getattr(report, f"{name}_accuracy{which}") for which in ("", "_without_copies"))
        if value is not None and not report.copies["across_splits"]:
            lines.append(f"  {name} accuracy {value:.2%}, on images nothing was chosen on")
        elif value is not None:
            new = (
                "all of them are copies of training images"
                if without is None
                else f"{without:.2%} without copies of training images"
            )
            lines.append(f"  {name} accuracy {value:.2%}, {new}")
    lines.append(f"  {report.seconds:.1f} s; details in {report.model / 'metrics.json'}")
    show_result(lines, dataclasses.asdict(report), as_json=as_json)


def finetune(
    source: Annotated[Path, typer.Argument(readable=False, help="Labelled images: folders or a CSV, as for extract.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The new model.")],
    class_level: options.ClassLevel = None,
    root: options.Root = None,
    path_column: options.PathColumn = None,
    label_column: options.LabelColumn = None,
    split_column: options.SplitColumn = None,
    init: Annotated[
        Path | None,
        typer.Option(readable=False, help="Model to start from; without it, one is extracted and fit first."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="default, gradual, ants-bees, ants-bees-frozen, cats-dogs, flowers, flowers-frozen, caltech101."
        ),
    ] = "default",
    backbone: _AsForExtract = None,
    weights: _AsForExtract = None,
    resize: _AsForExtract = None,
    crop: _AsForExtract = None,
    white_level: _AsForExtract = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per batch, instead of the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of the head, instead of the recipe's.")] = None,
    backbone_lr: Annotated[float | None, typer.Option(help="Of the backbone's last stage.")] = None,
    unfreeze: Annotated[str | None, typer.Option(help="head, last-stage, all or gradual.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=0, help="Stop after so many epochs without a better one; 0: never.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of order, augmentation, new weights.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32, or mixed: bf16, fp16.")] = "auto",
    micro_batch: Annotated[
        str, typer.Option(help="Most images per forward pass, or auto; gradients add up to the batch.")
    ] = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Discard an interrupted run and start anew.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there already.")] = False,
    as_json: options.Json = False,
) -> None:
    """Train the backbone, too, end to end, from the cached head on.

    The result is by default never below that head on val.
    """
    from featcache.extraction.request import ExtractRequest
    from featcache.finetuning.finetune import finetune as run
    from featcache.images.source import Source

    asked: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights,
        "resize": None if resize is None else options.size(resize),
        "crop": None if crop is None else options.count(crop, "crop"),
        "white_level": None if white_level is None else options.count(white_level, "white level"),
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    images = Source(
        source,
        class_level=class_level,
        root=root,
        path_column=path_column,
        label_column=label_column,
        split_column=split_column,
    )
    with show_training() as progress:
        report = run(
            images,
            output,
            init=init,
            request=ExtractRequest(**asked) if asked else None,
            recipe=recipe,
            changes={
                "epochs": epochs,
                "batch_size": batch_size,
                "lr": lr,
                "backbone_lr": backbone_lr,
                "unfreeze": unfreeze,
                "patience": patience,
            },
            seed=seed,
            precision=precision,
            device=device,
            workers=options.count(workers, "workers"),
            micro_batch=options.count(micro_batch, "micro batch"),
            resume=resume,
            force=force,
            overwrite=overwrite,
            progress=progress,
        )
    if not is_first_process():
        return
    lines = [
        f"{report.model}: best epoch {report.best_epoch} of {report.epochs}, {report.images_per_second:,.1f} images/s",
        *(f"  {line}" for line in (*report.comparison, report.verdict)),
        f"  {report.seconds:.0f} s; details in {report.model / 'metrics.json'} and history.csv",
    ]
    try:
        show_result(lines, dataclasses.asdict(report), as_json=as_json)
    finally:  # also where the reader of stdout went away
        _draw_curves(report.model)


def _draw_curves(model: Path) -> None:
    """Draw the history beside the model. The model is saved by now, so that whatever goes wrong here is only said."""
    from featcache.reports.curves import draw_curves

    try:
        note(f"  curves in {draw_curves(model)}")
    except Exception as error:
        say(f"no curves of {model}: {error}")


COMMANDS: options.Commands = {
    fit_head: "featcache fit-head features.h5 -o model/  ·  featcache fit-head features.h5 -o mlp/ --clf mlp",
    finetune: "featcache finetune photos/ --init model/ -o model-ft/  ·  "
    "featcache finetune photos/ -o model-ft/ --backbone resnet18 --recipe gradual",
}
