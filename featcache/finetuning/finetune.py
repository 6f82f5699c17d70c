"""``finetune``: unfreeze the backbone and train end to end, starting from the cached head; by default never ending below it on val.

In: images and, if there is one, the model of their cached features. Out: a model folder like any other, whose backbone
travels along. Here the options are checked and the start is settled; ``tune.py`` does the work.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from featcache.errors import UsageError
from featcache.extraction.request import BackboneOptions, ExtractRequest, settle_request
from featcache.finetuning.checkpoint import check_unfinished, hold_work, is_finished, remove_work
from featcache.finetuning.recipe_files import read_recipe
from featcache.finetuning.recipes import Job, Recipe
from featcache.finetuning.result import FinetuneReport, read_report
from featcache.finetuning.start import keep_cache, prepare_start, read_source, seen_before
from featcache.images.groups import Grouping
from featcache.images.source import AnySource, ImageList, Source
from featcache.models.model import BESIDE_MODEL, check_replaceable, load_model
from featcache.system.display import State, Steps, bar_in_notebook
from featcache.system.files import check_name, named
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_device, check_runtime_options

if TYPE_CHECKING:
    from featcache.finetuning.trainer import OnStep, Status

log = logging.getLogger("featcache")


def finetune(
    source: AnySource | ImageList,
    output: AnyPath,
    *,
    init: AnyPath | None = None,
    request: ExtractRequest | None = None,
    recipe: AnyPath = "default",
    changes: dict[str, Any] | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    workers: int | None = None,
    micro_batch: int | None = None,
    groups: Grouping | None = None,
    group_column: str | None = None,
    resume: bool = False,
    force: bool = False,
    overwrite: bool = False,
    budget: str | float | None = None,
    progress: "OnStep | None" = None,
    preparing: Steps | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **options: Unpack[BackboneOptions],
) -> FinetuneReport:
    """Fine-tune a backbone and its head on labelled images.

    Under ``torchrun`` all processes call this alike; the first one writes and reports.

    Args:
        source: as for ``extract``, with labels. Without a val split a stratified tenth of train becomes one.
        output: folder of the new model; unfinished work lies beside it in ``OUTPUT.parts``.
        init: model to start from; when None, features are extracted into ``OUTPUT.features.h5`` (rows of caches beside
            it are taken over) and a head is fit first; an existing file of that name is left alone.
        request: which backbone, when there is no ``init``.
        recipe: a name of ``recipes.RECIPES``, or a TOML file of fields of ``Recipe`` (``recipe_files``).
        changes: fields of ``Recipe`` to override, as ``recipes.find_recipe`` takes them.
        seed: of everything random.
        precision: auto, fp32, bf16 or fp16 (mixed: weights stay float32).
        device, workers: as in ``extract``.
        micro_batch: most images per forward pass; when None, 4 on a CPU (8 where weights are many), 256 on an NVIDIA GPU, else 64. Changes
            speed and memory; on a GPU what dropout draws if there is any; nothing else but rounding.
        groups: a table in which ``group_column`` says what belongs together (patient, place), joined by path, or a name for each
            image of ``source``, as ``fit_head`` takes them. None: the column is one of ``source``, a table. What belongs together
            stays on one side where val is held out, and in one fold where a head is fit.
        resume: continue an interrupted run, on a CPU to the same bits, whatever the workers now. force: discard it.
        overwrite: replace a model that is there already; never the one that the run starts from.
        budget: time for the run, ``90s``, ``10m``, ``1h30m`` or seconds: the recipe's epochs, and how much of the backbone trains,
            are then the most; what fits is planned from the first steps, and kept when the run is resumed.
        progress: called after every step. preparing: called with (done, total, what) while images are embedded and decoded before
            that. Bars in notebooks when None. clock: what tells seconds.
        options: the fields of ``ExtractRequest`` but its precision as keywords, instead of ``request``.

    Raises:
        SourceError: no labels, one class, classes that ``init`` does not know, training images that the table of groups lacks.
        UsageError: impossible or contradictory values, another interrupted run is in the way, or there is none to resume.
        ModelError: ``output`` is taken, ``init`` cannot be used, or training would not start from the cached head.
        TrainingError: the loss is not finite or explodes, and no epoch was better than the start; the budget is used up before all
        images are embedded, which are kept.
        Interrupted: by a signal; a checkpoint is kept.
    """
    from featcache.finetuning.budget import check_same_budget, parse_budget
    from featcache.finetuning.pixels import start_decoding
    from featcache.finetuning.trainer import choose_training_precision
    from featcache.finetuning.tune import tune
    from featcache.system import distributed
    from featcache.system.device import choose_runtime

    started = clock()
    seconds = None if budget is None else parse_budget(budget)
    output, init = named(as_path(output)), None if init is None else as_path(init)
    check_runtime_options(device, workers=workers, batch_size=micro_batch)
    if of_recipe := [name for name in options if name in {field.name for field in dataclasses.fields(Recipe)}]:
        raise UsageError(f"{of_recipe[0]} belongs to the recipe; give changes={{{of_recipe[0]!r}: ...}}")
    request = settle_request(request, options, finetune)
    _check_options(init, request, seed=seed, resume=resume, force=force)
    _check_paths(source, output, init, request=request, resume=resume)
    check_device(device)
    _check_start_is_kept(output, init, request=request)
    recipe, settings = read_recipe(recipe, changes or {})
    check_name(output, BESIDE_MODEL)
    check_unfinished(output, resume=resume, force=force)
    if resume:
        check_same_budget(output, seconds)
    finished = resume and is_finished(output)
    if not finished:
        check_replaceable(output, overwrite=overwrite)
    images, held_out, known_groups = read_source(source, seed=seed, groups=groups, group_column=group_column)
    runtime = choose_runtime(device, workers=workers, batch_size=micro_batch)
    asked, precision = precision, choose_training_precision(precision, runtime.device)
    with distributed.init(runtime) as (processes, runtime):
        log.info(runtime.reason + (f"; {processes.world} processes" if processes.world > 1 else ""))
        job = Job(
            images,
            output,
            recipe,
            settings,
            seed,
            precision,
            runtime,
            processes,
            overwrite,
            precision_is_auto=asked == "auto",
            budget=seconds,
            clock=clock,
            started=started,
            parts_are_auto=micro_batch is None,
            groups=known_groups,
        )
        with hold_work(job, force=force):
            report = None
            if finished:
                log.info("%s was finished already", output)
            else:
                start_decoding(job)
                model, cache = prepare_start(job, init, request=request, held_out=held_out, preparing=preparing)
                earlier = seen_before(init, request=request, held_out=held_out)
                with bar_in_notebook(progress, _describe) as on_step:
                    report = tune(job, model, cache=cache, earlier=earlier, on_step=on_step, preparing=preparing)
            processes.barrier()
            if processes.is_first:
                keep_cache(output)
                remove_work(output)
            return report or read_report(output)


def _describe(status: "Status") -> State:
    text = f"epoch {status.epoch}/{status.epochs}, image {status.done}/{status.total}"
    return status.done, status.total, f"{text}: {status.scores}"


def _check_options(
    init: AnyPath | None, request: ExtractRequest | None, *, seed: int, resume: bool, force: bool
) -> None:
    if init is not None and request is not None:
        raise UsageError("--init brings its own backbone; leave the options of the backbone out")
    if resume and force:
        raise UsageError("--resume continues an interrupted run, --force discards it; choose one")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must lie between 0 and {2**32 - 1}, found {seed}")


def _check_paths(
    source: AnySource | ImageList, output: Path, init: Path | None, *, request: ExtractRequest | None, resume: bool
) -> None:
    """Raises SourceError, ModelError, BackboneError, StorageError: one of them is something else."""
    images = "SOURCE" if isinstance(source, ImageList) else Source.of(source).path
    if isinstance(images, Path):
        check_path(images, "images", ("finetune", HERE, "-o", output, *(("--init", init) if init else ())))
    if init:
        check_path(init, "model", ("finetune", images, "-o", output, "--init", HERE))
        load_model(init)  # what is wrong with it is said before anything is listed
    if request:
        request.check_paths()
        if not resume:
            request.check_named()


def _check_start_is_kept(output: Path, init: AnyPath | None, *, request: ExtractRequest | None) -> None:
    """Raise UsageError if the model would replace the one that it starts from, whatever path leads to it."""
    for start in (init, request.folder if request else None):
        same = False
        if start is not None:
            with contextlib.suppress(OSError, ValueError):  # one of them is not there
                same = Path(start).samefile(output)
        if same:
            raise UsageError(
                f"-o {output} is the model that the run starts from, which is never replaced; choose another -o"
            )
