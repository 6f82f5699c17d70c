"""Epoch after epoch: train, score on val, remember the best, write a checkpoint.

In: a ``Trainer``, the val images, the ``Checkpoint`` to write. Out: ``Trained``: the best epoch's network, the history, the rate.
It ends with the recipe's epochs or patience, and with Interrupted when a signal asks.
"""

import copy
import dataclasses
import logging
import math
import time
from typing import Any

import torch

from featcache.errors import Interrupted, TrainingError
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.compare import score
from featcache.finetuning.network import Network
from featcache.finetuning.pixels import LabelledPixels
from featcache.finetuning.trainer import OnStep, Status, Stopped, Trainer, compute_logits
from featcache.heads.head import Array
from featcache.system.signals import StopRequest

log = logging.getLogger("featcache")
_SECONDS_BETWEEN_CHECKPOINTS = 600.0
_STEPS_BETWEEN_QUESTIONS = 4  # asking all processes whether to stop costs a round trip


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What training came to.

    Attributes:
        epochs: trained, those before an interruption included. best_epoch: the best of them on val.
        network: with the weights of the best epoch. val_logits: (n, C) its logits on val.
        history: a row per epoch.
        images_per_second: of this call, evaluation left out; 0 if nothing was left to train.
    """

    epochs: int
    best_epoch: int
    network: Network
    val_logits: Array
    history: list[dict[str, Any]]
    images_per_second: float


def train(
    trainer: Trainer, val: LabelledPixels, checkpoint: Checkpoint, *, asked: StopRequest, on_step: OnStep | None = None
) -> Trained:
    """Train until the epochs are used up, or patience is.

    Args:
        trainer: new, or continued from a checkpoint; its network is trained in place.
        val: chooses the best epoch.
        checkpoint: written after every epoch, every ten minutes (one process only), and before Interrupted is raised.
        asked: whether to stop. on_step: called after every step.

    Raises:
        Interrupted: ``asked`` to. TrainingError: the loss or the weights are not finite, or the loss explodes.
    """

    def after_step(status: Status) -> None:
        if trainer.processes.world == 1 and checkpoint.age > _SECONDS_BETWEEN_CHECKPOINTS:
            checkpoint.save(trainer)
        if on_step:
            on_step(status)

    seconds = images = 0.0
    while trainer.epoch < (trainer.recipe.epochs or 1) and not _out_of_patience(trainer):
        begun, first = time.perf_counter(), trainer.batch
        try:
            loss, accuracy = trainer.run_epoch(on_step=after_step, stop=lambda: _asked_to_stop(trainer, asked))
            seconds += time.perf_counter() - begun
            images += len(trainer.data.labels) * (1 - first / trainer.steps_per_epoch)
            _end_epoch(trainer, val, checkpoint, loss, accuracy)
        except Stopped:
            checkpoint.save(trainer)
            raise Interrupted(
                f"stopped in epoch {trainer.epoch + 1} of {trainer.recipe.epochs}; the same command with --resume goes on "
                f"from there ({checkpoint.folder})",
                asked.signal,
            ) from None
        except TrainingError as error:
            kept = "there is no checkpoint yet"
            if checkpoint.position is not None:
                kept = f"the last good checkpoint, {checkpoint.position}, is kept in {checkpoint.folder}"
            raise TrainingError(f"{error} ({kept})") from error
    return _result(trainer, images / seconds if seconds else 0.0)


def _asked_to_stop(trainer: Trainer, asked: StopRequest) -> bool:
    """All processes stop after the same step."""
    if trainer.processes.world > 1:
        if trainer.batch % _STEPS_BETWEEN_QUESTIONS:
            return False
        asked.signal = max(trainer.processes.all_gather(asked.signal))
    return bool(asked)


def _out_of_patience(trainer: Trainer) -> bool:
    patience, best = trainer.recipe.patience, trainer.best.get("epoch", 0)
    return patience > 0 and best > 0 and trainer.epoch - best >= patience


def _end_epoch(trainer: Trainer, val: LabelledPixels, checkpoint: Checkpoint, loss: float, accuracy: float) -> None:
    """Score on val, add to the history, remember the best, write the checkpoint, say how it went."""
    runtime, processes = trainer.runtime, trainer.processes
    logits = compute_logits(
        trainer.evaluated, val.pixels, runtime=runtime, processes=processes, batch_size=runtime.batch_size
    )
    val_accuracy, negative_loss = score(val.labels, logits)
    val_loss = -negative_loss
    if not math.isfinite(val_loss):
        raise TrainingError(f"the loss on val is {val_loss} after epoch {trainer.epoch}; try a lower learning rate")
    row = {"train_loss": loss, "train_accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}
    trainer.history.append({"epoch": trainer.epoch, **row})
    better = not trainer.best or (val_accuracy, -val_loss) > (trainer.best["accuracy"], -trainer.best["loss"])
    if better:
        trainer.best = {
            "epoch": trainer.epoch,
            "accuracy": val_accuracy,
            "loss": val_loss,
            "weights": {name: tensor.detach().cpu().clone() for name, tensor in trainer.evaluated.state_dict().items()},
            "logits": torch.from_numpy(logits),
        }
    checkpoint.save(trainer)
    log.info(
        "epoch %d/%d: loss %.4f, accuracy %.2f%%; val loss %.4f, accuracy %.2f%%%s",
        trainer.epoch,
        trainer.recipe.epochs,
        loss,
        100 * accuracy,
        val_loss,
        100 * val_accuracy,
        " (best so far)" if better else "",
    )


def _result(trainer: Trainer, images_per_second: float) -> Trained:
    best, network = trainer.best, copy.deepcopy(trainer.evaluated)
    network.load_state_dict(best["weights"])
    return Trained(
        epochs=trainer.epoch,
        best_epoch=best["epoch"],
        network=network,
        val_logits=best["logits"].numpy(),
        history=trainer.history,
        images_per_second=images_per_second,
    )
