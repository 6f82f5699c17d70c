"""``finetune``: unfreeze the backbone and train end to end, starting from the cached head; by default never ending below it on val.

In: images and, if there is one, the model of their cached features. Out: a model folder like any other, whose backbone
travels along. Each stage hands values to the next: settle the start, decode once, prove that the assembled network is the
cached head, train with a checkpoint per epoch, choose the best epoch and the best mixture with the start on val, compare, save.
"""

import copy
import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cache.cache import FeatureCache
from featcache.errors import UsageError
from featcache.extraction.request import ExtractRequest
from featcache.finetuning.checkpoint import (
    Checkpoint,
    Position,
    check_unfinished,
    is_finished,
    open_work,
    remove_work,
)
from featcache.finetuning.compare import UNCHANGED, Candidate, Paired, choose, compare, in_words, score
from featcache.finetuning.job import Job
from featcache.finetuning.pixels import LabelledPixels
from featcache.finetuning.recipes import Recipe, choose_recipe, explain
from featcache.finetuning.save import FinetuneReport, metrics_of, read_report, save_finetuned
from featcache.finetuning.start import keep_cache, prepare_start, read_source, reference_features
from featcache.heads.head import Array
from featcache.models.model import Model, check_replaceable
from featcache.spec import fingerprint_of
from featcache.system.files import named
from featcache.system.signals import deferred_signals

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.finetuning.epochs import Trained
    from featcache.finetuning.network import Network
    from featcache.finetuning.trainer import OnStep, Trainer

log = logging.getLogger("featcache")
ALPHAS = (0.2, 0.4, 0.6, 0.8)  # between the cached head (0) and the fine-tuned weights (1)


def finetune(
    source: str | Path,
    output: str | Path,
    *,
    init: str | Path | None = None,
    request: ExtractRequest | None = None,
    recipe: str = "default",
    changes: dict[str, Any] | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    workers: int | None = None,
    micro_batch: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: "OnStep | None" = None,
) -> FinetuneReport:
    """Fine-tune a backbone and its head on labelled images.

    Under ``torchrun`` all processes call this alike; the first one writes and reports.

    Args:
        source: as for ``extract``, with labels. Without a val split a stratified tenth of train becomes one.
        output: folder of the new model; unfinished work lies beside it in ``OUTPUT.parts``.
        init: model to start from; when None, features are extracted into ``OUTPUT.features.h5`` (rows of caches beside
            it are taken over) and a head is fit first; an existing file of that name is left alone.
        request: which backbone, when there is no ``init``.
        recipe: a name of ``recipes.RECIPES``. changes: fields of ``Recipe`` to override.
        seed: of everything random.
        precision: auto, fp32, bf16 or fp16 (mixed: weights stay float32).
        device, workers: as in ``extract``.
        micro_batch: most images per forward pass; 8 on a CPU, 64 on a GPU when None. Changes speed and memory, and what
            dropout draws if there is any; nothing else but rounding.
        resume: continue an interrupted run, on a CPU to the same bits. force: discard it.
        progress: called after every step.

    Raises:
        SourceError: no labels, one class, classes that ``init`` does not know. UsageError: impossible or contradictory
        values, or another interrupted run is in the way. ModelError: ``init`` cannot be used, or the parity check failed.
        TrainingError: the loss is not finite or explodes. Interrupted: by a signal; a checkpoint is kept.
    """
    from featcache.finetuning.trainer import choose_training_precision
    from featcache.system import distributed
    from featcache.system.device import choose_runtime

    started = time.perf_counter()
    source, output, changes = Path(source), named(Path(output)), changes or {}
    _check_options(init, request, recipe, changes, seed, resume=resume, force=force)
    finished = resume and is_finished(output)
    if not finished:
        check_replaceable(output)
    check_unfinished(output, resume=resume, force=force)
    images, held_out = read_source(source, seed=seed)
    runtime = choose_runtime(device, workers=workers, batch_size=micro_batch)
    precision = choose_training_precision(precision, runtime.device)
    with distributed.init(runtime) as (processes, runtime):
        job = Job(images, output, recipe, changes, seed, precision, runtime, processes)
        job.check_processes()
        log.info(runtime.reason + (f"; {processes.world} processes" if processes.world > 1 else ""))
        with job.hold_work(force=force):
            report = None
            if finished:
                log.info("%s was finished already", output)
            else:
                model, cache = prepare_start(job, init, request, held_out=held_out)
                report = _tune(job, model, cache, progress, started)
            processes.barrier()
            if processes.is_first:
                keep_cache(output)
                remove_work(output)
            return report or read_report(output)


def _check_options(
    init: str | Path | None,
    request: ExtractRequest | None,
    recipe: str,
    changes: dict[str, Any],
    seed: int,
    *,
    resume: bool,
    force: bool,
) -> None:
    if init is not None and request is not None:
        raise UsageError("--init brings its own backbone; leave the options of the backbone out")
    if resume and force:
        raise UsageError("--resume continues an interrupted run, --force discards it; choose one")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must lie between 0 and {2**32 - 1}, found {seed}")
    choose_recipe(recipe, 1, **changes)


def _tune(
    job: Job, model: Model, cache: FeatureCache | None, on_step: "OnStep | None", started: float
) -> FinetuneReport:
    """All stages after the start is settled. ``cache``: of the features that ``model`` was fit on, if that happened here."""
    from featcache.finetuning.network import count_parameters

    backbone = model.load_backbone()
    log.info("backbone %s: weights %s", backbone.name, backbone.weights)
    train, val = (job.decode(split, model, backbone) for split in ("train", "val"))
    recipe = _settle_recipe(job, len(train))
    start = _assemble_start(job, model, backbone, val, cache)
    network = _network_to_train(job, recipe, start)
    counts = count_parameters(network, recipe)
    log.info("parameters: %s, of which %s train", *(f"{count:,}" for count in counts))
    identity = _identity(job, recipe, start, train)
    trained = _train(job, recipe, start, network, train, identity, on_step)
    check_replaceable(job.output)  # again: it took a while
    chosen = _choose(job, recipe, start, trained)
    pairs = _pair(job, start, chosen)
    comparison = {split: compare(pair.y, pair.head, pair.tuned, split=split) for split, pair in pairs.items()}
    report = _report(job, trained, chosen, comparison, counts, started)
    if job.processes.is_first:
        training = _training_facts(job, recipe, identity, trained, chosen)
        training["start"] = {"fingerprint": model.fingerprint, "head": model.head.kind}
        training |= {"n_train": len(train), "n_val": len(val)}
        metrics = metrics_of(report, comparison, pairs, model.classes, trained.history)
        save_finetuned(job.output, chosen.network, backbone, model, training=training, metrics=metrics)
    return report


# ------------------------------------------------------------------------------------------------------- start


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """What training starts from and is measured against.

    Attributes:
        model: with the cached head. backbone: its backbone. network: both assembled; it computes what the head computes.
        val: images to choose by. val_logits: (n, C) of ``network``.
    """

    model: Model
    backbone: "Backbone"
    network: "Network"
    val: LabelledPixels
    val_logits: Array


def _settle_recipe(job: Job, n_train: int) -> Recipe:
    recipe = choose_recipe(job.recipe, n_train, **job.changes)
    log.info("recipe %s: %s", job.recipe, recipe.about)
    for line in explain(recipe, n_train):
        log.info("  %s", line)
    log.info("precision %s", job.precision)
    asked = job.changes.get("batch_size")
    if asked is not None and asked > n_train:
        log.warning("batch size %d is larger than the %d training images: %d", asked, n_train, n_train)
    return recipe


def _assemble_start(
    job: Job, model: Model, backbone: "Backbone", val: LabelledPixels, cache: FeatureCache | None
) -> _Start:
    """Backbone and cached head as one network. Raises ModelError unless it computes what the cached head computes."""
    from featcache.finetuning.network import assemble, check_parity

    network = assemble(backbone, model.head).to(job.runtime.device)
    val_logits = job.logits(network, val)
    images, features, tolerance = reference_features(val, model, cache, backbone, job.runtime)
    difference = check_parity(val_logits[images], model.head.logits(features), tolerance=tolerance)
    text = "parity: the assembled network gives the cached head's logits on %d images (they differ by %.4f%%)"
    log.info(text, len(images), 100 * difference)
    return _Start(model, backbone, network, val, val_logits)


def _network_to_train(job: Job, recipe: Recipe, start: _Start) -> "Network":
    """A copy of the cached head's network, or one with a new head."""
    from featcache.finetuning.network import with_new_head

    if recipe.hidden is None:
        return copy.deepcopy(start.network)
    network = with_new_head(start.backbone, recipe, len(start.model.classes), seed=job.seed)
    return network.to(job.runtime.device)


def _identity(job: Job, recipe: Recipe, start: _Start, train: LabelledPixels) -> dict[str, Any]:
    """Everything that changes the numbers, to be equal when a run is resumed."""
    return {
        "recipe": recipe.to_json(),
        "seed": job.seed,
        "precision": job.precision,
        "device": job.runtime.device.type,
        "processes": job.processes.world,
        "micro_batch": job.runtime.batch_size,
        "classes": list(start.model.classes),
        "start": {"spec": start.model.fingerprint, "head": start.model.manifest["head"]["sha256"]},
        "images": {
            "train": f"{len(train)}, {train.digest[:16]}",
            "val": f"{len(start.val)}, {start.val.digest[:16]}",
        },
    }


# ---------------------------------------------------------------------------------------------------- training


def _train(
    job: Job,
    recipe: Recipe,
    start: _Start,
    network: "Network",
    train: LabelledPixels,
    identity: dict[str, Any],
    on_step: "OnStep | None",
) -> "Trained":
    """Train ``network``, from the run's checkpoint on if there is one. Raises Interrupted, TrainingError."""
    from featcache.finetuning import epochs
    from featcache.finetuning.trainer import Trainer, TrainingImages
    from featcache.system.device import kept_random_state

    trainer = Trainer(
        network,
        TrainingImages(train.pixels, train.labels, start.backbone.preprocess.crop),
        recipe,
        seed=job.seed,
        precision=job.precision,
        micro_batch=job.runtime.batch_size,
        runtime=job.runtime,
        processes=job.processes,
    )
    checkpoint = _continue(job, trainer, identity)
    with deferred_signals() as asked, kept_random_state(job.runtime.device):
        return epochs.train(trainer, start.val, checkpoint, asked=asked, on_step=on_step)


def _continue(job: Job, trainer: "Trainer", identity: dict[str, Any]) -> Checkpoint:
    """Load the state of an interrupted run, if there is one, into ``trainer``."""
    first = job.processes.is_first
    state = job.processes.broadcast(open_work(job.output, identity) if first else None)
    position = None
    if state is not None:
        trainer.load_state(state)
        position = Position(trainer.epoch, trainer.batch)
        log.info("resuming in epoch %d, after %d of its steps", trainer.epoch + 1, trainer.batch)
    return Checkpoint(job.output, identity, position=position, writes=first)


# ------------------------------------------------------------------------------------------------------ result


@dataclasses.dataclass(frozen=True, eq=False)
class _Chosen:
    """The weights to keep.

    Attributes:
        alpha: share of the fine-tuned weights; None: their head was a new one. network: with these weights.
        val_logits: (n, C) of ``network`` on val.
    """

    alpha: float | None
    network: "Network"
    val_logits: Array


def _choose(job: Job, recipe: Recipe, start: _Start, trained: "Trained") -> _Chosen:
    """The best epoch, or its best mixture with the start (WiSE-FT), on val."""
    from featcache.finetuning.network import interpolate

    def mix(alpha: float) -> "Network":
        network = copy.deepcopy(trained.network)
        network.load_state_dict(interpolate(_weights(start.network), _weights(trained.network), alpha))
        return network

    log.info("best epoch on val: %d", trained.best_epoch)
    if not recipe.interpolate or recipe.hidden is not None:
        return _Chosen(None if recipe.hidden is not None else 1.0, trained.network, trained.val_logits)
    candidates = [Candidate(0.0, start.val_logits), Candidate(1.0, trained.val_logits)]
    candidates += [Candidate(alpha, job.logits(mix(alpha), start.val)) for alpha in ALPHAS]
    best = choose(start.val.labels, candidates)
    scores = {c.alpha: score(start.val.labels, c.logits)[0] for c in candidates}
    log.info(
        "share of the fine-tuned weights: %g, the best on val of %s",
        best.alpha,
        ", ".join(f"{alpha:g} ({scores[alpha]:.2%})" for alpha in sorted(scores)),
    )
    return _Chosen(best.alpha, mix(best.alpha), best.logits)


def _weights(network: "Network") -> dict[str, Any]:
    """On the CPU."""
    return {name: tensor.cpu() for name, tensor in network.state_dict().items()}


def _pair(job: Job, start: _Start, chosen: _Chosen) -> dict[str, Paired]:
    """Cached head and chosen network on val and, if there are any, on test images, which are decoded only now."""
    pairs = {"val": Paired(start.val.labels, start.val_logits, chosen.val_logits)}
    test = job.decode("test", start.model, start.backbone)
    if len(test):
        pairs["test"] = Paired(test.labels, job.logits(start.network, test), job.logits(chosen.network, test))
    return pairs


def _training_facts(
    job: Job, recipe: Recipe, identity: dict[str, Any], trained: "Trained", chosen: _Chosen
) -> dict[str, Any]:
    """How the model was trained, for its manifest; ``is_finished`` reads ``run``."""
    return {
        "recipe": job.recipe,
        "settings": recipe.to_json(),
        "run": fingerprint_of(identity),
        "seed": job.seed,
        "precision": job.precision,
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch,
        "alpha": chosen.alpha,
    }


def _report(
    job: Job,
    trained: "Trained",
    chosen: _Chosen,
    comparison: dict[str, dict[str, Any]],
    counts: tuple[int, int],
    started: float,
) -> FinetuneReport:
    """The report. Warns if a new head ended below the cached one."""
    val, test = comparison["val"], comparison.get("test")
    decisive = test or val
    if chosen.alpha is None and val["tuned_accuracy"] < val["head_accuracy"]:
        log.warning(
            "this recipe's own head ended below the cached head on val: use the cached head's model, or --recipe default"
        )
    return FinetuneReport(
        model=job.output,
        recipe=job.recipe,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        alpha=chosen.alpha,
        val_accuracy=val["tuned_accuracy"],
        head_val_accuracy=val["head_accuracy"],
        test_accuracy=test["tuned_accuracy"] if test else None,
        head_test_accuracy=test["head_accuracy"] if test else None,
        p_value=decisive["p_value"],
        verdict=decisive["verdict"] if chosen.alpha != 0 else UNCHANGED,
        comparison=tuple(in_words(facts) for facts in comparison.values()),
        parameters=counts[0],
        trainable_parameters=counts[1],
        images_per_second=trained.images_per_second,
        seconds=time.perf_counter() - started,
    )
