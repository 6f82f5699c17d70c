"""The stages of a run once its start is settled: assemble, plan, train, choose, compare, save.

In: a ``Job``, and the model to start from. Out: a ``FinetuneReport``, and the model folder. Images are decoded once; the assembled
network is proved to be the cached head; a budget of time is planned for; ``loop.py`` trains; the best of its scores and the best
mixture with the start are chosen on val.
"""

import copy
import dataclasses
import functools
import logging
import math
from typing import Any

import numpy as np
import torch

from featcache.backbones.backbone import Backbone
from featcache.backbones.encoder import Encoder, embed_sample
from featcache.cache.cache import FeatureCache
from featcache.cache.format import encode_names, find
from featcache.errors import ModelError, SourceError, UsageError
from featcache.finetuning import budget
from featcache.finetuning.budget import Plan
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.logits import compute_logits
from featcache.finetuning.loop import Loop
from featcache.finetuning.micro_batches import images_at_once
from featcache.finetuning.network import (
    Network,
    assemble,
    check_parity,
    count_parameters,
    difference_of,
    has_batch_norms,
    interpolate,
    take_weights,
    to_head,
    with_new_head,
)
from featcache.finetuning.pixels import Pixels, decode_split
from featcache.finetuning.recipes import Job, Recipe, explain, settle
from featcache.finetuning.result import (
    UNTRAINED,
    FinetuneReport,
    calibrate,
    choose,
    compare,
    in_words,
    save_finetuned,
    score,
    unchanged,
)
from featcache.finetuning.trainer import OnStep, Trainer
from featcache.heads.head import Array, Indices, softmax
from featcache.heads.metrics import evaluate_probabilities
from featcache.models.model import Model, check_replaceable
from featcache.models.training_rows import Compared, HeldOut, TrainingRows
from featcache.spec import SPLITS, fingerprint_of
from featcache.system.device import kept_random_state
from featcache.system.display import Steps, bar_in_notebook, describe_steps, quantity
from featcache.system.signals import deferred_signals

log = logging.getLogger("featcache")
ALPHAS = (0.2, 0.4, 0.6, 0.8)  # between the cached head (0) and the fine-tuned weights (1)
_COMPARED = 16  # images of the parity check, which tell how large embeddings are
_TOLERANCE = 0.01  # of the parity check: more than the rounding of cached features, less than any mistake
_TOLERANCE_REDUCED = 0.1  # against cached rows, which may be in half precision: three times what the self-check allows
_TOLERANCE_LOSS, _TOLERANCE_LOSS_REDUCED = 0.001, 0.1  # of the loss before step 1; of it relatively where it is above 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """What training starts from and is measured against.

    Attributes:
        model: with the cached head. backbone: its backbone. network: both assembled; it computes what the head computes.
        val: images to choose by. compared: some of them, with which this was checked. compared_logits: of ``network``.
        job: the run's.
    """

    model: Model
    backbone: Backbone
    network: Network
    val: Pixels
    compared: Indices
    compared_logits: Array
    job: Job

    @functools.cached_property
    def scored(self) -> tuple[Array, float]:
        """(n, C) logits of ``network`` on all of val, and the seconds that they took; training need not wait for them."""
        begun = self.job.clock()
        logits = compute_logits(self.network, self.val.pictures, job=self.job)
        return logits, self.job.clock() - begun

    @property
    def val_logits(self) -> Array:
        """(n, C) logits of ``network`` on val."""
        return self.scored[0]


def tune(
    job: Job,
    model: Model,
    *,
    cache: FeatureCache | None,
    earlier: list[TrainingRows],
    on_step: OnStep | None,
    preparing: Steps | None = None,
) -> FinetuneReport:
    """Fine-tune ``model``.

    Args:
        cache: of the features that it was fit on, if that happened in this run. earlier: what it has seen before that.
        on_step, preparing: ``progress`` and ``preparing`` of ``finetune``.
    """
    backbone = model.load_backbone()
    batch_norms = has_batch_norms(backbone.module)
    if job.processes.world > 1 and batch_norms and job.settings.trains_batch_norms:
        raise UsageError(
            f"recipe {job.recipe} trains batch norms, which would see other batches in each process; use one process, "
            "or --set batchnorm=frozen"
        )
    log.info("backbone %s: weights %s", backbone.name, backbone.weights)
    if job.parts_are_auto:
        batch_size = images_at_once(job.runtime, backbone.module)
        job = dataclasses.replace(job, runtime=dataclasses.replace(job.runtime, batch_size=batch_size))
    decode = functools.partial(decode_split, job, classes=model.classes, preprocess=backbone.preprocess)
    begun = job.clock()
    with bar_in_notebook(preparing, describe_steps) as shown:
        train, val = decode("train", progress=shown), decode("val", progress=shown)
    decoding = (job.clock() - begun) / (len(train) + len(val))
    rows = TrainingRows(train.digests, train.labels).after(earlier)
    seen = {"val": _seen(rows, val, split="val")}
    recipe = _settle_recipe(job, len(train), batch_norms=batch_norms)
    start = _assemble_start(job, model, backbone=backbone, val=val, cache=cache)
    trainer = _make_trainer(start, train, recipe=recipe, job=job)
    trainer, plan = _plan(trainer, start, decoding=decoding)
    counts = count_parameters(trainer.network, trainer.recipe)
    if plan and not plan.epochs:
        counts = counts[0], 0
    log.info("parameters: %s, of which %s train", *(f"{count:,}" for count in counts))
    checkpoint = Checkpoint(trainer, _identity(trainer, start, plan))
    with deferred_signals() as asked, kept_random_state(trainer.device):
        seconds = plan.seconds if plan else math.inf
        to_beat = functools.partial(_first_score, trainer, start)
        loop = Loop(trainer, val, checkpoint=checkpoint, asked=asked, on_step=on_step, seconds=seconds, to_beat=to_beat)
        rate = loop.train() if plan is None or plan.epochs else 0.0
    check_replaceable(job.output, overwrite=job.overwrite)  # again: it took a while
    alpha, tuned, val_logits = _choose(trainer, start)
    _check_weights(start, tuned, val_logits)
    temperature = 1.0
    if alpha != 0:
        temperature = calibrate(tuned, val.labels, val_logits)
        log.info("temperature %.3g: logits are divided by it, for the lowest log loss on val", temperature)
    val_logits, new = val_logits / np.float32(temperature), ~seen["val"]  # by new ones predictions know their limits
    rows = dataclasses.replace(rows, held_out=HeldOut(val.digests[new], val.labels[new], val_logits[new]))
    logits: dict[str, tuple[Array, ...]] = {"val": (val.labels, start.val_logits, val_logits)}
    digests = [val.digests]
    if len(test := decode("test")):  # only now
        digests.append(test.digests)
        seen["test"] = _seen(rows, test, split="test")
        logits["test"] = (
            test.labels,
            *(compute_logits(network, test.pictures, job=job) for network in (start.network, tuned)),
        )
    rows = dataclasses.replace(rows, compared=_answers(digests, logits))
    comparison = {split: compare(*facts, split=split, seen=seen[split]) for split, facts in logits.items()}
    report = _report(trainer, comparison, alpha=alpha, temperature=temperature, counts=counts, rate=rate)
    if plan:
        report = dataclasses.replace(report, budget=dataclasses.asdict(plan) | {"out_of_time": loop.out_of_time})
    if job.processes.is_first:
        metrics: dict[str, Any] = {"val": None, "test": None, "comparison": comparison, "history": trainer.history}
        for split, (y, _, after) in logits.items():
            metrics[split] = evaluate_probabilities(y, softmax(after), model.classes)
        training = _training_facts(trainer, start, identity=checkpoint.identity, report=report)
        save_finetuned(report, tuned, backbone=backbone, start=model, training=training, metrics=metrics, rows=rows)
    return report


def _answers(digests: list[Array], logits: dict[str, tuple[Array, ...]]) -> Compared:
    """What the head and the tuned network answer, image by image; ``digests`` in the order of ``logits``."""
    labels, *answers = (np.concatenate(column) for column in zip(*logits.values(), strict=True))
    return Compared(np.concatenate(digests), labels.astype(np.int64), *(column.argmax(axis=1) for column in answers))


# ------------------------------------------------------------------------------------------------------- start


def _seen(rows: TrainingRows, pixels: Pixels, *, split: str) -> Array:
    """(n,) which images of a split training has seen, or sees; said if there are any."""
    seen = rows.contain(pixels.digests)
    if seen.any():
        text = "training has seen %d of the %d %s images, the first %s: a score on them flatters"
        log.warning(text, seen.sum(), len(pixels), split, pixels.paths[int(seen.argmax())])
    return seen


def _settle_recipe(job: Job, n_train: int, *, batch_norms: bool) -> Recipe:
    recipe = settle(job.settings, n_train, batch_norms=batch_norms)
    log.info("recipe %s: %s", job.recipe, recipe.about)
    for line in explain(recipe, n_train, batch_norms=batch_norms):
        log.info("  %s", line)
    if job.settings.trains_batch_norms and not batch_norms:
        log.info("batchnorm = train changes nothing: this backbone has no batch norms")
    log.info("precision %s", job.precision)
    asked = job.settings.batch_size
    if asked is not None and asked > n_train:
        log.warning("batch size %d is larger than the %d training images: %d", asked, n_train, n_train)
    steps = -(-n_train // ((recipe.batch_size or 1) * recipe.accumulation)) * (recipe.epochs or 1)
    if recipe.eval_every is not None and recipe.eval_every >= steps:
        text = "eval_every %d changes nothing: the run has %s, and val is scored after each epoch anyway"
        log.warning(text, recipe.eval_every, quantity(steps, "step"))
    return recipe


def _assemble_start(job: Job, model: Model, *, backbone: Backbone, val: Pixels, cache: FeatureCache | None) -> _Start:
    """Backbone and cached head as one network. Raises ModelError unless it computes what the cached head computes.

    Compared with embeddings that the backbone by itself computes now, in float32; and with cached rows if there are any.
    """
    compared = np.linspace(0, len(val) - 1, min(_COMPARED, len(val))).astype(np.intp)  # from all over
    pictures = [val.pictures[k] for k in compared]
    pixels = np.stack(pictures)
    # Not build_encoder's, whose forms are proved on more images than there are here to embed.
    plain = Encoder(copy.deepcopy(backbone.module), backbone.preprocess, job.runtime.device, torch.float32)
    embeddings = embed_sample(plain, pixels, job.runtime)
    network = assemble(backbone, model.head, embeddings).to(job.runtime.device)
    logits = compute_logits(network, pictures, job=job)
    start = _Start(model, backbone, network, val, compared, logits, job)
    expected = model.head.logits(embeddings.astype(model.spec.storage))
    difference = check_parity(logits, expected, tolerance=_TOLERANCE)
    text = "parity: the assembled network gives the cached head's logits on %s (they differ by %.4f%%)"
    log.info(text, quantity(len(pixels), "image"), 100 * difference)
    if cache is not None:
        _check_cached_rows(start, cache)
    return start


def _check_cached_rows(start: _Start, cache: FeatureCache) -> None:
    """Compare the assembled network with rows of the cache that the head was fit on. Raises ModelError, SourceError.

    Which precision a row was computed in is not known: rows of every precision that passes the self-check belong together.
    Rows of a precision that did not pass were asked for, and prove nothing; how far off they are is said.
    """
    rows = find(cache.rows.paths, encode_names([start.val.paths[k] for k in start.compared]))
    images = np.flatnonzero(rows >= 0)
    if not len(images):
        count = quantity(len(rows), "val image")
        raise SourceError(f"not one of {count} is in {cache.path}, so that nothing can be compared with it")
    tolerance = _TOLERANCE_REDUCED if cache.spec.precision == "reference" else math.inf
    logits = start.model.head.logits(cache.take(rows[images]))
    difference = check_parity(start.compared_logits[images], logits, tolerance=tolerance)
    log.info("parity: from %d cached rows the cached head's logits differ by %.4f%%", len(images), 100 * difference)


def _make_trainer(start: _Start, train: Pixels, *, recipe: Recipe, job: Job) -> Trainer:
    """The trainer, proved to start from the cached head's loss; in float32 where ``auto`` took less and would not.

    Not compared where the recipe asks for another start: a new head, batch norms that train.

    Raises:
        ModelError: it would start from another loss.
    """
    trainer = Trainer(_network_to_train(start, recipe, job=job), train, recipe=recipe, job=job)
    if recipe.hidden is not None or recipe.batchnorm == "train":
        return trainer
    problem = job.processes.broadcast(_compare_first_step(trainer, start))
    if not problem:
        return trainer
    if job.precision == "fp32" or not job.precision_is_auto:
        advice = "please report it" if job.precision == "fp32" else "train with --precision fp32"
        raise ModelError(f"training would not start from the cached head: {problem}; {advice}")
    log.info("precision fp32 after all: %s", problem)
    del trainer  # before there is another one
    return _make_trainer(start, train, recipe=recipe, job=dataclasses.replace(job, precision="fp32"))


def _compare_first_step(trainer: Trainer, start: _Start) -> str:
    """Say with which loss training starts, on images as they are. Returns what is wrong with it, or nothing."""
    y, precision = start.val.labels[start.compared], trainer.job.precision
    expected = -score(y, start.compared_logits)[1]
    found = -score(y, trainer.logits_in_training(start.val, start.compared))[1]
    tolerance = (_TOLERANCE_LOSS if precision == "fp32" else _TOLERANCE_LOSS_REDUCED) * max(1.0, expected)
    if abs(found - expected) <= tolerance:
        drops = trainer.recipe.backbone_dropout or trainer.recipe.drop_path
        text = "loss before step 1, in training mode and %s%s: %.4f; the cached head's: %.4f, on the same %d images"
        log.info(text, precision, ", with nothing dropped yet" if drops else "", found, expected, len(y))
        return ""
    return (
        f"in training mode and {precision} the loss of {len(y)} images before step 1 is {found:.4g}, expected "
        f"{expected:.4g} within {tolerance:.2g}"
    )


def _network_to_train(start: _Start, recipe: Recipe, *, job: Job) -> Network:
    """A copy of the cached head's network, or one with a new head."""
    if recipe.hidden is None:
        return copy.deepcopy(start.network)
    network = with_new_head(start.backbone, recipe, len(start.model.classes), seed=job.seed)
    return network.to(job.runtime.device)


def _first_score(trainer: Trainer, start: _Start) -> tuple[float, float]:
    """That of val before step 1, by the cached head or the recipe's own."""
    if trainer.recipe.hidden is None:
        return score(start.val.labels, start.val_logits)
    network = _network_to_train(start, trainer.recipe, job=trainer.job)
    return score(start.val.labels, compute_logits(network, start.val.pictures, job=trainer.job))


def _plan(trainer: Trainer, start: _Start, *, decoding: float) -> tuple[Trainer, Plan | None]:
    """What of the recipe fits into the job's budget, and the trainer of that; said. A run that goes on keeps its plan.

    ``decoding``: seconds per image. Before training may end there must be time to score and choose, and to look at test.
    """
    job, recipe, broadcast = trainer.job, trainer.recipe, trainer.processes.broadcast
    if job.budget is None:
        return trainer, None
    scoring, images = start.scored[1], int((job.images.splits == SPLITS.index("test")).sum())
    scores = 1 + (len(ALPHAS) if recipe.interpolate and recipe.hidden is None else 0)
    looked_at = 2 * images + len(start.compared)  # of test by head and tuned network; of val once more by what is saved
    after = scoring * (scores + looked_at / len(start.val)) + decoding * images
    until = job.started + job.budget - after

    def make(recipe: Recipe) -> Trainer:
        return Trainer(_network_to_train(start, recipe, job=job), trainer.data, recipe=recipe, job=job)

    plan = broadcast(budget.planned_before(job.output)) or budget.make_plan(
        job.budget,
        recipe,
        steps=trainer.steps_per_epoch,
        evaluation=broadcast(scoring),
        left=lambda: broadcast(until - job.clock()),
        measure=lambda recipe, most: budget.seconds_per_step(make(recipe), most),
    )
    log.info("budget %s: %s", budget.in_words(plan.budget), plan.about)
    settled = plan.settle(recipe)
    return (trainer if settled == recipe else make(settled)), plan


def _identity(trainer: Trainer, start: _Start, plan: Plan | None) -> dict[str, Any]:
    """Everything that changes the numbers, to be equal when a run is resumed."""
    job = trainer.job
    return {
        "recipe": trainer.recipe.to_json(),
        "seed": job.seed,
        "precision": job.precision,
        "device": job.runtime.device.type,
        "processes": job.processes.world,
        "micro_batch": job.runtime.batch_size,
        "classes": list(start.model.classes),
        "start": {"spec": start.model.fingerprint, "head": start.model.manifest["head"]["sha256"]},
        "images": {
            split: f"{len(pixels)}, {pixels.digest[:16]}"
            for split, pixels in (("train", trainer.data), ("val", start.val))
        },
        "budget": plan and dataclasses.asdict(plan),
    }


# ------------------------------------------------------------------------------------------------------ result


def _choose(trainer: Trainer, start: _Start) -> tuple[float | None, Network, Array]:
    """The best epoch, or its best mixture with the start (WiSE-FT), on val.

    Returns:
        Share of the fine-tuned weights (None: their head was a new one), the network with these weights, and its logits on val.
    """
    recipe, best, y = trainer.recipe, trainer.best, start.val.labels
    if not best:  # the budget left no time
        return 0.0, copy.deepcopy(start.network), start.val_logits
    tuned, tuned_logits = trainer.evaluated, best["logits"].numpy()
    take_weights(tuned, best["weights"])
    log.info("best epoch on val: %d, after step %d of the run", best["epoch"], best["step"])
    if not recipe.interpolate or recipe.hidden is not None:
        return None if recipe.hidden is not None else 1.0, tuned, tuned_logits
    logits = {0.0: start.val_logits, 1.0: tuned_logits}
    for share in ALPHAS:
        logits[share] = compute_logits(
            interpolate(start.network, tuned, alpha=share), start.val.pictures, job=trainer.job
        )
    alpha = choose(y, logits)
    log.info(
        "share of the fine-tuned weights: %g, the best on val of %s",
        alpha,
        ", ".join(f"{share:g} ({score(y, logits[share])[0]:.2%})" for share in sorted(logits)),
    )
    return alpha, interpolate(start.network, tuned, alpha=alpha), logits[alpha]


def _check_weights(start: _Start, tuned: Network, logits: Array) -> None:
    """Raise ModelError unless weights and head, as they are saved, give the ``logits`` on val that they were chosen by.

    A backbone that keeps more from step to step than its weights would give others once it is loaded.
    """
    backbone, runtime = start.backbone, start.job.runtime
    module = copy.deepcopy(backbone.module)
    take_weights(module, tuned.backbone.state_dict())
    plain = Encoder(module, backbone.preprocess, runtime.device, torch.float32)
    embeddings = embed_sample(plain, np.stack([start.val.pictures[k] for k in start.compared]), runtime)
    difference = difference_of(to_head(tuned).logits(embeddings), logits[start.compared])
    if not difference <= _TOLERANCE:
        raise ModelError(
            f"the weights of the trained network give other logits than it did: on {quantity(len(start.compared), 'image')} of val they "
            f"differ by {difference:.2%} of their spread, expected at most {_TOLERANCE:.2%}; {backbone.name} keeps something outside its "
            "weights, so that nothing is saved; please report it"
        )


def _report(
    trainer: Trainer,
    comparison: dict[str, dict[str, Any]],
    *,
    alpha: float | None,
    temperature: float,
    counts: tuple[int, int],
    rate: float,
) -> FinetuneReport:
    """The report. Warns if a new head ended below the cached one."""
    val, test = comparison["val"], comparison.get("test")
    decisive = test or val
    verdict = decisive["verdict"] if alpha != 0 else unchanged(val) if trainer.step else UNTRAINED
    if alpha is None and val["tuned_accuracy"] < val["head_accuracy"]:
        log.warning(
            "this recipe's own head ended below the cached head on val: use the cached head's model, or --recipe default"
        )
    return FinetuneReport(
        model=trainer.job.output,
        recipe=trainer.job.recipe,
        epochs=trainer.epoch + (trainer.batch > 0),
        best_epoch=trainer.best.get("epoch", 0),
        best_step=trainer.best.get("step", 0),
        alpha=alpha,
        temperature=temperature,
        val_accuracy=val["tuned_accuracy"],
        head_val_accuracy=val["head_accuracy"],
        test_accuracy=test["tuned_accuracy"] if test else None,
        val_accuracy_without_copies=val["tuned_accuracy_without_copies"],
        test_accuracy_without_copies=test["tuned_accuracy_without_copies"] if test else None,
        head_test_accuracy=test["head_accuracy"] if test else None,
        p_value=decisive["p_value"],
        verdict=verdict,
        comparison=tuple(in_words(facts) for facts in comparison.values()),
        parameters=counts[0],
        trainable_parameters=counts[1],
        images_per_second=rate,
        seconds=trainer.job.clock() - trainer.job.started,
        groups=trainer.job.groups,
    )


def _training_facts(
    trainer: Trainer, start: _Start, *, identity: dict[str, Any], report: FinetuneReport
) -> dict[str, Any]:
    """How the model was trained, for its manifest; ``is_finished`` reads ``run``."""
    return {
        "recipe": report.recipe,
        "settings": trainer.recipe.to_json(),
        "run": fingerprint_of(identity),
        "seed": trainer.job.seed,
        "precision": trainer.job.precision,
        "cores": trainer.cores if trainer.device.type == "cpu" else None,
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "best_step": report.best_step,
        "budget": report.budget,
        "alpha": report.alpha,
        "start": {"fingerprint": start.model.fingerprint, "head": start.model.head.kind},
        "n_train": len(trainer.data),
        "n_val": len(start.val),
        "group_column": trainer.job.groups["column"] if trainer.job.groups else None,
    }
