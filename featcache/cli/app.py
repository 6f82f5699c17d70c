"""The command line: parse, call a plain function, print. Messages go to stderr, results to stdout.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but more images were refused than --max-bad allows.
"""

import dataclasses
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from featcache import __version__
from featcache.cli import inspect as cli_inspect
from featcache.cli import options
from featcache.cli.console import (
    interruptible,
    is_first_process,
    print_json,
    printable,
    printable_row,
    say,
    show_progress,
    show_training,
)
from featcache.errors import FeatcacheError, UsageError
from featcache.system.signals import interrupt_on_signals
from featcache.system.supervisor import output_started, supervised

_DECODING = ("extract", "finetune", "predict", "evaluate")  # commands that decode images

app = typer.Typer(
    name="featcache",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Embed images once, cache the embeddings with proof of origin, train classifiers on them in seconds.",
    epilog="[bold]Three commands:[/]  featcache extract photos/ -o features.h5  ·  "
    "featcache fit-head features.h5 -o model/  ·  featcache predict model/ new_photos/",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"featcache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=options.EXAMPLES
    + "featcache extract photos/ -o features.h5  ·  featcache extract list.csv -o f.h5 --limit 100"
)
def extract(
    source: Annotated[
        Path, typer.Argument(readable=False, help="Folder of class folders, of splits of these, of images; or a CSV.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The cache file; updated if it exists.")],
    backbone: options.Backbone = "resnet50",
    weights: options.Weights = "auto",
    batch_size: options.BatchSize = "auto",
    precision: options.Precision = "auto",
    dtype: options.Dtype = "auto",
    resize: options.Resize = "auto",
    crop: options.Crop = "auto",
    interpolation: options.Interpolation = "auto",
    decode: options.Decode = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many images, evenly spread over the source.")
    ] = None,
    max_bad: options.MaxBad = 0.05,
    reuse: Annotated[
        list[Path] | None, typer.Option(help="Another cache to take embeddings from; may be given several times.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a cache made with another spec, or damaged.")] = False,
    as_json: options.Json = False,
) -> None:
    """Embed images into a cache file, or bring it up to date: only new content is embedded, an interrupted run resumes."""
    from featcache.extraction.extract import extract as run
    from featcache.extraction.request import ExtractRequest

    request = ExtractRequest(
        backbone=backbone,
        weights=weights,
        resize=options.size(resize),
        crop=options.count(crop, "crop"),
        interpolation=None if interpolation == "auto" else interpolation,
        decode=None if decode == "auto" else decode,
        precision=precision,
        dtype=dtype,
    )
    with interruptible(output), show_progress("embedding") as progress:
        report = run(
            source,
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
    rate = f", {report.images_per_second:,.0f} images/s once started" if report.embedded else ""
    say(
        f"{report.cache}: {report.embedded + report.reused} embeddings of {report.dim} dimensions; embedded {report.embedded}, "
        f"reused {report.reused}, refused {report.refused} (added {report.added}, changed {report.changed}, "
        f"removed {report.removed}) in {report.seconds:.1f} s{rate}"
    )
    if report.refused:
        say(f"why images were refused: featcache info {report.cache}")
    print_json(dataclasses.asdict(report), as_json)
    _exit_if_bad(report.refused, report.images, max_bad)


@app.command(
    epilog=options.EXAMPLES
    + "featcache fit-head features.h5 -o model/  ·  featcache fit-head features.h5 -o mlp/ --clf mlp"
)
def fit_head(
    cache: Annotated[Path, typer.Argument(readable=False, help="A cache file written by extract.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The model folder.")],
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
    """Train a classifier on cached embeddings; everything is chosen on training rows, val and test stay untouched."""
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
    say(
        f"{report.model}: {report.clf} ({chosen}scaling {report.scaling}), {report.classes} classes, {report.n_train} training images"
    )
    if report.cv_accuracy is not None:
        say(f"  cross-validated accuracy {report.cv_accuracy:.2%} (standard deviation over folds {report.cv_std:.2%})")
    for name, value in (("val", report.val_accuracy), ("test", report.test_accuracy)):
        if value is not None:
            say(f"  {name} accuracy {value:.2%}, on images nothing was chosen on")
    say(f"  {report.seconds:.1f} s; details in {report.model / 'metrics.json'}")
    print_json(dataclasses.asdict(report), as_json)


@app.command(
    epilog=options.EXAMPLES + "featcache finetune photos/ --init model/ -o model-ft/  ·  "
    "featcache finetune photos/ -o model-ft/ --backbone resnet18 --recipe gradual"
)
def finetune(
    source: Annotated[Path, typer.Argument(readable=False, help="Labelled images: folders or a CSV, as for extract.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new model folder.")],
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
    backbone: Annotated[str | None, typer.Option(help="Without --init: as for extract.")] = None,
    weights: Annotated[str | None, typer.Option(help="Without --init: as for extract.")] = None,
    resize: Annotated[str | None, typer.Option(help="Without --init: as for extract.")] = None,
    crop: Annotated[str | None, typer.Option(help="Without --init: as for extract.")] = None,
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
    as_json: options.Json = False,
) -> None:
    """Unfreeze the backbone and train end to end, from the cached head on; by default never ending below it on val."""
    from featcache.extraction.request import ExtractRequest
    from featcache.finetuning.finetune import finetune as run

    asked = {"backbone": backbone, "weights": weights}
    asked |= {"resize": resize and options.size(resize), "crop": crop and options.count(crop, "crop")}  # type: ignore[dict-item]
    wanted: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    with show_training() as progress:
        report = run(
            source,
            output,
            init=init,
            request=ExtractRequest(**wanted) if wanted else None,
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
            progress=progress,
        )
    if not is_first_process():
        return
    say(f"{report.model}: best epoch {report.best_epoch} of {report.epochs}, {report.images_per_second:,.1f} images/s")
    for line in report.comparison:
        say(f"  {line}")
    say(f"  {report.verdict}")
    say(f"  {report.seconds:.0f} s; details in {report.model / 'metrics.json'} and history.csv")
    print_json(dataclasses.asdict(report), as_json)


@app.command(
    epilog=options.EXAMPLES
    + "featcache predict model/ photo.jpg  ·  featcache predict model/ new/ -o labels.csv --top-k 3"
)
def predict(
    model: Annotated[Path, typer.Argument(readable=False, help="A model folder.")],
    inputs: Annotated[list[Path], typer.Argument(readable=False, help="Images, folders, CSV files; or cache files.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .csv or .jsonl file; stdout if not given.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to name per image.")] = 1,
    probs: Annotated[bool, typer.Option("--probs", help="Add the probability of every class.")] = False,
    batch_size: options.BatchSize = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    max_bad: options.MaxBad = 1.0,
    as_json: options.Json = False,
) -> None:
    """Label images: one row per input image, in order, refused ones included."""
    from featcache.errors import SourceError
    from featcache.models.model import load_model
    from featcache.models.predict import predict as run
    from featcache.reports.predictions_table import prediction_rows, write_rows
    from featcache.system.files import check_output, publish_file

    kind: Literal["csv", "jsonl"] = "jsonl" if output is not None and output.suffix == ".jsonl" else "csv"
    if output is not None:
        if output.suffix not in (".csv", ".jsonl"):
            raise UsageError(f"cannot tell the format of {output}; name it .csv or .jsonl")
        check_output(output)
    started = time.perf_counter()
    loaded = load_model(model)
    with show_progress("predicting", show=output is not None) as progress:
        predictions = run(
            loaded,
            inputs,
            device=device,
            workers=options.count(workers, "workers"),
            batch_size=options.count(batch_size, "batch size"),
            progress=progress,
        )
        rows = prediction_rows(predictions, loaded.classes, top_k=top_k, all_probabilities=probs)
        if output is None:
            output_started()
            if sys.stdout.isatty():  # which would obey what a name holds; a file or a pipe gets names as they are
                rows = map(printable_row, rows)
            written, refused = write_rows(rows, sys.stdout.buffer, kind)
            sys.stdout.flush()
        else:
            with publish_file(output) as file:
                written, refused = write_rows(rows, file, kind)
    seconds = time.perf_counter() - started
    say(f"{written - refused} of {written} images labelled in {seconds:.1f} s" + (f": {output}" if output else ""))
    facts = {"model": model, "output": output, "images": written, "labelled": written - refused, "refused": refused}
    print_json(facts | {"seconds": seconds}, as_json)
    if written == refused:
        raise SourceError("not one image could be labelled; each row says why in its reason column")
    _exit_if_bad(refused, written, max_bad)


@app.command(
    epilog=options.EXAMPLES + "featcache evaluate model/ photos/  ·  featcache evaluate model/ features.h5 --split val"
)
def evaluate(
    model: Annotated[Path, typer.Argument(readable=False, help="A model folder.")],
    source: Annotated[Path, typer.Argument(readable=False, help="Labelled images (folder or CSV), or a cache file.")],
    split: Annotated[
        str, typer.Option(help="train, val, test, all; auto: test if there is one, else val, else all.")
    ] = "auto",
    batch_size: options.BatchSize = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    as_json: options.Json = False,
) -> None:
    """Score a model on labelled images or on a cache."""
    from featcache.models.evaluate import evaluate as run

    with show_progress("evaluating") as progress:
        scores = run(
            model,
            source,
            split=None if split == "auto" else split,
            device=device,
            workers=options.count(workers, "workers"),
            batch_size=options.count(batch_size, "batch size"),
            progress=progress,
        )
    say(f"{scores['n']} images ({scores['split']}), refused {scores['refused']}")
    say(
        f"  accuracy {scores['accuracy']:.2%}, log loss {scores['log_loss']:.4f}, calibration error {scores['ece']:.2%}"
    )
    for name, entry in scores["per_class"].items():
        if entry["n"]:
            precision = "-" if entry["precision"] is None else f"{entry['precision']:.2%}"
            say(f"  {name}: {entry['n']} images, recall {entry['recall']:.2%}, precision {precision}")
    print_json(scores, as_json)


@app.command(
    epilog=options.EXAMPLES + "featcache export model/ -o model.onnx  ·  featcache export model/ -o model.safetensors"
)
def export(
    model: Annotated[Path, typer.Argument(readable=False, help="A model folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .onnx or .safetensors file.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write backbone and head as one file that runs without featcache, checked against the model first."""
    from featcache.models.export import export_model

    report = export_model(model, output, force=force)
    for heading, entries in (("in", report.inputs), ("out", report.outputs)):
        say(f"  {heading}: " + "; ".join(f"{name}, {what}" for name, what in entries.items()))
    say(
        f"{report.output}: {report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s; largest difference from the model "
        f"{report.max_difference:.1g} in probability, {report.max_logit_difference:.1g} in logits"
    )
    print_json(dataclasses.asdict(report), as_json)


cli_inspect.register(app)


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    _log_to_stderr()
    decodes = sys.argv[1:2] and (sys.argv[1] in _DECODING or "--repair" in sys.argv)
    if decodes and (worker_code := supervised()) is not None:
        sys.exit(worker_code)
    asked = interrupt_on_signals()
    try:
        code = app(prog_name="featcache", standalone_mode=False)
    except FeatcacheError as error:
        say(f"error: {error}")
        code = error.exit_code
    except typer.Exit as error:
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        say(f"error: {error}")
        code = 1
    except Exception as error:
        code = _usage_error(error)
    if code == 130:  # also what typer makes of an interruption
        say("interrupted")
        code = 128 + asked.signal if asked else 130
    sys.exit(code if isinstance(code, int) else 0)


def _usage_error(error: Exception) -> int:
    """Print a click error the way click does; anything else is a bug and keeps its traceback."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    return int(getattr(error, "exit_code", 2))


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + printable(record.getMessage())


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter())
    logger = logging.getLogger("featcache")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)


def _exit_if_bad(refused: int, images: int, max_bad: float) -> None:
    if refused > max_bad * images:
        say(f"{refused} of {images} images were refused, more than --max-bad {max_bad:g} allows")
        raise typer.Exit(3)
