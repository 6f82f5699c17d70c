"""``finetune``: unfreeze the backbone and train end to end, starting from the cached head; by default never ending below it on val.

In: images and, if there is one, the model of their cached features. Out: a model folder like any other, whose backbone
travels along. The order of things: settle the start, decode once, prove that the assembled network is the cached head,
train with a checkpoint per epoch, choose the best epoch and the best mixture with the start on val, compare, save.
"""

import contextlib
import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cache.cache import FeatureCache
from featcache.errors import Interrupted, TrainingError, UsageError
from featcache.extraction.request import ExtractRequest
from featcache.finetuning.checkpoint import (
    check_unfinished,
    claim_work,
    is_finished,
    open_work,
    remove_work,
    save_state,
    tidy_work,
)
from featcache.finetuning.compare import UNCHANGED, Candidate, choose, compare, in_words, score
from featcache.finetuning.pixels import LabelledPixels, decode_split
from featcache.finetuning.recipes import choose_recipe, explain
from featcache.finetuning.save import FinetuneReport, read_report, save_finetuned
from featcache.finetuning.start import keep_cache, prepare_start, read_source, reference_features
from featcache.heads.head import Array, softmax
from featcache.heads.metrics import evaluate_probabilities
from featcache.images.source import ImageList
from featcache.models.model import Model, check_replaceable
from featcache.spec import fingerprint_of
from featcache.system.signals import StopRequest, deferred_signals
from featcache.system.workdir import locked, work_folder

if TYPE_CHECKING:
    from featcache.finetuning.network import Network
    from featcache.finetuning.trainer import Status, Trainer
    from featcache.system.device import Runtime
    from featcache.system.distributed import Processes

log = logging.getLogger("featcache")
Progress = Callable[["Status"], None]
ALPHAS = (0.2, 0.4, 0.6, 0.8)  # between the cached head (0) and the fine-tuned weights (1)
_SECONDS_BETWEEN_CHECKPOINTS = 600.0
_STEPS_BETWEEN_QUESTIONS = 4  # asking all processes whether to stop costs a round trip


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
    progress: Progress | None = None,
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
    from featcache.system.device import choose_runtime, kept_random_state

    started = time.perf_counter()
    source, output, changes = Path(source), Path(output), changes or {}
    _check_options(init, request, recipe, changes, seed, resume, force)
    finished = resume and is_finished(output)
    if not finished:
        check_replaceable(output)
    check_unfinished(output, resume=resume, force=force)
    images, held_out = read_source(source, seed=seed)
    runtime = choose_runtime(device, workers=workers, batch_size=micro_batch)
    settings = _Settings(output, recipe, changes, seed, choose_training_precision(precision, runtime.device))
    with contextlib.ExitStack() as stack:
        processes, runtime = stack.enter_context(distributed.init(runtime))
        if processes.world > 1 and choose_recipe(recipe, 1, **changes).batchnorm == "train":
            raise UsageError(
                f"recipe {recipe} trains batch norms, which would see other batches in each process; use one process"
            )
        log.info(runtime.reason + (f"; {processes.world} processes" if processes.world > 1 else ""))
        if processes.is_first:
            stack.enter_context(locked(work_folder(output)))
            stack.callback(tidy_work, output)
            claim_work(output, force=force)
        processes.barrier()
        if finished:
            log.info("%s was finished already", output)
            if processes.is_first:
                keep_cache(output)
                remove_work(output)
            return read_report(output)
        start, cache = prepare_start(
            images,
            output,
            Path(init) if init is not None else None,
            request,
            held_out=held_out,
            processes=processes,
            runtime=runtime,
            seed=seed,
        )
        run = _Run(settings, images, start, cache, runtime, processes)
        with deferred_signals() as asked, kept_random_state(runtime.device):
            run.train(progress, asked)
        check_replaceable(output)  # again: it took a while
        report = run.finish(started)
        processes.barrier()
        if processes.is_first:
            keep_cache(output)
            remove_work(output)
    return report


def _check_options(
    init: str | Path | None,
    request: ExtractRequest | None,
    recipe: str,
    changes: dict[str, Any],
    seed: int,
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


@dataclasses.dataclass(frozen=True)
class _Settings:
    output: Path
    recipe: str
    changes: dict[str, Any]
    seed: int
    precision: str


class _Run:
    """One fine-tuning: what its stages hand on to each other."""

    def __init__(
        self,
        settings: _Settings,
        images: ImageList,
        start: Model,
        cache: FeatureCache | None,
        runtime: "Runtime",
        processes: "Processes",
    ) -> None:
        from featcache.finetuning.network import assemble, count_parameters

        self.settings, self.images, self.start = settings, images, start
        self.runtime, self.processes = runtime, processes
        self.backbone = start.load_backbone()
        log.info("backbone %s: weights %s", self.backbone.name, self.backbone.weights)
        train, self.val = self._decode("train"), self._decode("val")
        self.recipe = choose_recipe(settings.recipe, len(train), **settings.changes)
        self._describe(len(train))
        self.frozen = assemble(self.backbone, start.head).to(runtime.device)  # computes what the cached head computes
        self.head_val = self._logits(self.frozen, self.val)
        self._check_parity(cache)
        network = self._network()
        self.parameters, self.trainable = count_parameters(network, self.recipe)
        log.info("parameters: %s, of which %s train", f"{self.parameters:,}", f"{self.trainable:,}")
        self.trainer = self._trainer(network, train)
        self.rate = 0.0

    def _describe(self, n_train: int) -> None:
        log.info("recipe %s: %s", self.settings.recipe, self.recipe.about)
        for line in explain(self.recipe, n_train):
            log.info("  %s", line)
        log.info("precision %s", self.settings.precision)
        asked = self.settings.changes.get("batch_size")
        if asked is not None and asked > n_train:
            log.warning("batch size %d is larger than the %d training images: %d", asked, n_train, n_train)

    def _decode(self, split: str) -> LabelledPixels:
        return decode_split(
            self.images,
            split,
            self.start.classes,
            self.backbone.preprocess,
            folder=work_folder(self.settings.output),
            runtime=self.runtime,
            processes=self.processes,
        )

    def _logits(self, network: "Network", split: LabelledPixels) -> Array:
        from featcache.finetuning.trainer import compute_logits

        return compute_logits(
            network, split.pixels, runtime=self.runtime, processes=self.processes, batch_size=self.runtime.batch_size
        )

    def _network(self) -> "Network":
        """What trains: the cached head's network, or one with a new head."""
        from featcache.finetuning.network import with_new_head

        if self.recipe.hidden is None:
            return copy.deepcopy(self.frozen)
        network = with_new_head(self.backbone, self.recipe, len(self.start.classes), seed=self.settings.seed)
        return network.to(self.runtime.device)

    def _check_parity(self, cache: FeatureCache | None) -> None:
        """The assembled network against the cached head."""
        from featcache.finetuning.network import check_parity

        images, features, tolerance = reference_features(self.val, self.start, cache, self.backbone, self.runtime)
        difference = check_parity(self.head_val[images], self.start.head.logits(features), tolerance=tolerance)
        text = "parity: the assembled network gives the cached head's logits on %d images (they differ by %.4f%%)"
        log.info(text, len(images), 100 * difference)

    def _trainer(self, network: "Network", train: LabelledPixels) -> "Trainer":
        from featcache.finetuning.trainer import Trainer, TrainingImages

        trainer = Trainer(
            network,
            TrainingImages(train.pixels, train.labels, self.backbone.preprocess.crop),
            self.recipe,
            seed=self.settings.seed,
            precision=self.settings.precision,
            micro_batch=self.runtime.batch_size,
            runtime=self.runtime,
            processes=self.processes,
        )
        self.identity = self._identity(train)
        state = open_work(self.settings.output, self.identity) if self.processes.is_first else None
        state = self.processes.broadcast(state)
        self.kept = ""  # where the checkpoint on disk stands
        if state is not None:
            trainer.load_state(state)
            self.kept = _position(trainer)
            log.info("resuming in epoch %d, after %d of its steps", trainer.epoch + 1, trainer.batch)
        return trainer

    def _identity(self, train: LabelledPixels) -> dict[str, Any]:
        """Everything that changes the numbers, to be equal when a run is resumed."""
        return {
            "recipe": self.recipe.to_json(),
            "seed": self.settings.seed,
            "precision": self.settings.precision,
            "device": self.runtime.device.type,
            "processes": self.processes.world,
            "micro_batch": self.runtime.batch_size,
            "classes": list(self.start.classes),
            "start": {"spec": self.start.fingerprint, "head": self.start.manifest["head"]["sha256"]},
            "images": {
                "train": f"{len(train)}, {train.digest[:16]}",
                "val": f"{len(self.val)}, {self.val.digest[:16]}",
            },
        }

    # ---------------------------------------------------------------------------------------------- training

    def train(self, progress: Progress | None, asked: StopRequest) -> None:
        """Train until the epochs are used up, or patience is. Raises Interrupted, TrainingError."""
        from featcache.finetuning.trainer import Stopped

        trainer = self.trainer
        saved = time.perf_counter()
        seconds = images = 0.0

        def on_step(status: "Status") -> None:
            nonlocal saved
            if self.processes.world == 1 and time.perf_counter() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                saved = time.perf_counter()
                self._save_state()
            if progress:
                progress(status)

        while trainer.epoch < (self.recipe.epochs or 1) and not self._out_of_patience():
            begun, first = time.perf_counter(), trainer.batch
            try:
                loss, hits = trainer.run_epoch(on_step=on_step, stop=lambda: self._asked_to_stop(asked))
                seconds += time.perf_counter() - begun
                images += len(trainer.data.labels) * (1 - first / trainer.steps_per_epoch)
                self._end_epoch(loss, hits)
            except Stopped:
                self._save_state()
                raise Interrupted(
                    f"stopped in epoch {trainer.epoch + 1} of {self.recipe.epochs}; the same command with --resume goes on from "
                    f"there ({work_folder(self.settings.output)})",
                    asked.signal,
                ) from None
            except TrainingError as error:
                kept = f"the last good checkpoint, {self.kept}, is kept in {work_folder(self.settings.output)}"
                raise TrainingError(f"{error} ({kept if self.kept else 'there is no checkpoint yet'})") from error
            saved = time.perf_counter()
        self.rate = images / seconds if seconds else 0.0

    def _asked_to_stop(self, asked: StopRequest) -> bool:
        """All processes stop after the same step."""
        if self.processes.world > 1:
            if self.trainer.batch % _STEPS_BETWEEN_QUESTIONS:
                return False
            asked.signal = max(self.processes.all_gather(asked.signal))
        return bool(asked)

    def _out_of_patience(self) -> bool:
        best = self.trainer.best.get("epoch", 0)
        return bool(self.recipe.patience) and best > 0 and self.trainer.epoch - best >= self.recipe.patience

    def _end_epoch(self, loss: float, hits: float) -> None:
        """Evaluate, remember the best, write the checkpoint."""
        import torch

        trainer = self.trainer
        logits = self._logits(trainer.evaluated, self.val)
        val_accuracy, negative_loss = score(self.val.labels, logits)
        if not math.isfinite(negative_loss):
            raise TrainingError(
                f"the loss on val is {-negative_loss} after epoch {trainer.epoch}; try a lower learning rate"
            )
        row = {
            "epoch": trainer.epoch,
            "train_loss": loss,
            "train_accuracy": hits,
            "val_loss": -negative_loss,
            "val_accuracy": val_accuracy,
        }
        trainer.history.append(row)
        better = not trainer.best or (val_accuracy, negative_loss) > (trainer.best["accuracy"], -trainer.best["loss"])
        if better:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in trainer.evaluated.state_dict().items()}
            trainer.best = {
                "epoch": trainer.epoch,
                "accuracy": val_accuracy,
                "loss": -negative_loss,
                "weights": weights,
                "logits": torch.from_numpy(logits),
            }
        self._save_state()
        log.info(
            "epoch %d/%d: loss %.4f, accuracy %.2f%%; val loss %.4f, accuracy %.2f%%%s",
            trainer.epoch,
            self.recipe.epochs,
            loss,
            100 * hits,
            -negative_loss,
            100 * val_accuracy,
            " (best so far)" if better else "",
        )

    def _save_state(self) -> None:
        if self.processes.is_first:
            save_state(self.settings.output, self.identity, self.trainer.state())
            self.kept = _position(self.trainer)

    # --------------------------------------------------------------------------------------------- finishing

    def finish(self, started: float) -> FinetuneReport:
        """Choose, compare, save."""
        alpha, network, val_logits = self._choose()
        comparison = {"val": compare(self.val.labels, self.head_val, val_logits, split="val")}
        test = self._decode("test")
        if len(test):
            head_test, test_logits = self._logits(self.frozen, test), self._logits(network, test)
            comparison["test"] = compare(test.labels, head_test, test_logits, split="test")
        decisive = comparison.get("test", comparison["val"])
        metrics = {
            "val_accuracy": comparison["val"]["tuned_accuracy"],
            "test_accuracy": comparison["test"]["tuned_accuracy"] if len(test) else None,
            "head_val_accuracy": comparison["val"]["head_accuracy"],
            "head_test_accuracy": comparison["test"]["head_accuracy"] if len(test) else None,
            "val": evaluate_probabilities(self.val.labels, softmax(val_logits), self.start.classes),
            "test": evaluate_probabilities(test.labels, softmax(test_logits), self.start.classes)
            if len(test)
            else None,
            "comparison": comparison,
            "history": self.trainer.history,
        }
        if alpha is None and metrics["val_accuracy"] < metrics["head_val_accuracy"]:
            log.warning(
                "this recipe's own head ended below the cached head on val: use the cached head's model, or --recipe default"
            )
        report = FinetuneReport(
            model=self.settings.output,
            recipe=self.settings.recipe,
            epochs=self.trainer.epoch,
            best_epoch=self.trainer.best["epoch"],
            alpha=alpha,
            val_accuracy=metrics["val_accuracy"],
            head_val_accuracy=metrics["head_val_accuracy"],
            test_accuracy=metrics["test_accuracy"],
            head_test_accuracy=metrics["head_test_accuracy"],
            p_value=decisive["p_value"],
            verdict=decisive["verdict"] if alpha != 0 else UNCHANGED,
            comparison=tuple(in_words(facts) for facts in comparison.values()),
            parameters=self.parameters,
            trainable_parameters=self.trainable,
            images_per_second=self.rate,
            seconds=time.perf_counter() - started,
        )
        if self.processes.is_first:
            facts = {key: value for key, value in dataclasses.asdict(report).items() if key != "model"}
            self._save(network, alpha, metrics | {"report": facts})
        return report

    def _choose(self) -> tuple[float | None, "Network", Array]:
        """(alpha, network with the weights to keep, its val logits)."""
        from featcache.finetuning.network import mixed

        best, network = self.trainer.best, copy.deepcopy(self.trainer.evaluated)
        network.load_state_dict(best["weights"])
        tuned: Array = best["logits"].numpy()
        log.info("best epoch on val: %d", best["epoch"])
        if not self.recipe.interpolate or self.recipe.hidden is not None:
            return (None if self.recipe.hidden is not None else 1.0), network, tuned
        start = {name: tensor.cpu() for name, tensor in self.frozen.state_dict().items()}
        candidates = [Candidate(0.0, self.head_val), Candidate(1.0, tuned)]
        for alpha in ALPHAS:
            network.load_state_dict(mixed(start, best["weights"], alpha))
            candidates.append(Candidate(alpha, self._logits(network, self.val)))
        chosen = choose(self.val.labels, candidates)
        network.load_state_dict(mixed(start, best["weights"], chosen.alpha))
        log.info(
            "share of the fine-tuned weights: %g, the best on val of %s",
            chosen.alpha,
            ", ".join(
                f"{c.alpha:g} ({score(self.val.labels, c.logits)[0]:.2%})"
                for c in sorted(candidates, key=lambda candidate: candidate.alpha)
            ),
        )
        return chosen.alpha, network, chosen.logits

    def _save(self, network: "Network", alpha: float | None, metrics: dict[str, Any]) -> None:
        training = {
            "recipe": self.settings.recipe,
            "settings": self.recipe.to_json(),
            "run": fingerprint_of(self.identity),
            "seed": self.settings.seed,
            "precision": self.settings.precision,
            "epochs": self.trainer.epoch,
            "best_epoch": self.trainer.best["epoch"],
            "alpha": alpha,
            "start": {"fingerprint": self.start.fingerprint, "head": self.start.head.kind},
            "n_train": len(self.trainer.data.labels),
            "n_val": len(self.val),
        }
        save_finetuned(self.settings.output, network, self.backbone, self.start, training=training, metrics=metrics)


def _position(trainer: "Trainer") -> str:
    steps = f" and {trainer.batch} steps" if trainer.batch else ""
    return f"after {trainer.epoch} epochs{steps}"
