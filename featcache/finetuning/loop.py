"""Epoch after epoch: train, score on val, remember the best, write checkpoints.

In: a trainer, and images to choose by. Out: the trainer, with its history, a row per score, and the weights of the best one.
Training ends with the recipe's epochs, patience or the seconds it was given, where it diverges after a good score, and with Interrupted
when a signal asks.
"""

import logging
import math
from collections.abc import Callable

import torch

from featcache.errors import Interrupted, TrainingError
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.logits import compute_logits
from featcache.finetuning.network import training_mode
from featcache.finetuning.pixels import Pixels
from featcache.finetuning.result import score
from featcache.finetuning.trainer import OnStep, Status, Stopped, Trainer
from featcache.system.signals import StopRequest
from featcache.system.workdir import work_folder

log = logging.getLogger("featcache")
_SECONDS_BETWEEN_CHECKPOINTS = 600.0
_STEPS_BETWEEN_QUESTIONS = 4  # asking all processes whether to stop costs a round trip


class Loop:
    """Trains a network until there is a reason to end.

    Attributes:
        out_of_time: whether the seconds were used up before epochs or patience were.
        diverged: whether training broke, and ended with the best score before.
    """

    def __init__(
        self,
        trainer: Trainer,
        val: Pixels,
        *,
        checkpoint: Checkpoint,
        asked: StopRequest,
        on_step: OnStep | None = None,
        seconds: float = math.inf,
        to_beat: Callable[[], tuple[float, float]] = lambda: (0.0, -math.inf),
    ) -> None:
        """``seconds``: most of training and scoring, those before an interruption included. ``asked``: to stop. ``to_beat``: the score on
        val before the first step, asked for where training diverges, and of a cached head where an epoch is the best so far.
        """
        self._trainer, self._val, self._checkpoint = trainer, val, checkpoint
        self._asked, self._on_step, self._limit = asked, on_step, seconds
        self._clock = trainer.job.clock
        self._begun = self._clock() - trainer.seconds
        self._images = self._seconds = 0.0  # of this call, in training alone
        self._to_beat = to_beat
        self.out_of_time = self.diverged = False

    def train(self) -> float:
        """Train. A checkpoint is written at the end, after every epoch where that takes little of the time, every ten minutes (one
        process only), and before this ends early.

        Returns:
            Images per second of this call, in training alone; 0 if nothing was left to train.

        Raises:
            Interrupted: asked to. TrainingError: the loss or the weights are not finite, or the loss explodes, before any score was
                better than at the start.
        """
        while not self._is_over():
            self._mark()
            try:
                self._run_epoch()
            except TrainingError as error:
                self._end_with_best(error)
        return self._images / self._seconds if self._seconds else 0.0

    def _run_epoch(self) -> None:
        """Train an epoch, or the rest of it, and score it; or what of it there is before training is to stop."""
        try:
            self._evaluate(self._trainer.run_epoch(on_step=self._after_step, stop=self._must_stop))
            if self._checkpoint.pays or self._is_over():
                self._save()
        except Stopped:
            self._stop()

    def _end_with_best(self, error: TrainingError) -> None:
        """Training broke: it ends with the best score so far; raises TrainingError if that of the start was as good, or a signal asks."""
        trainer, best = self._trainer, self._trainer.best
        good = bool(best) and trainer.processes.broadcast((best["accuracy"], -best["loss"]) > self._to_beat())
        if good and not any(trainer.processes.all_gather(self._asked.signal)):
            self.diverged = True
            log.warning("%s; training ends here, and the best so far counts, of epoch %d", error, best["epoch"])
            return
        kept = "there is no checkpoint yet"
        if self._checkpoint.position:
            kept = f"the last good checkpoint, {self._checkpoint.position}, is kept in {self._folder}"
        if not good:
            kept = f"no score on val was better than that of the start, so that no model is saved; {kept}"
            if self._checkpoint.position:
                kept += "; from there the same settings lead here again, for others add --force"
        raise TrainingError(f"{error} ({kept})") from error

    @property
    def _folder(self) -> object:
        return work_folder(self._trainer.job.output)

    def _after_step(self, status: Status) -> None:
        trainer, every = self._trainer, self._trainer.recipe.eval_every
        # The score after an epoch's last step comes anyway.
        if every and trainer.step % every == 0 and trainer.batch < trainer.steps_per_epoch:
            self._evaluate(trainer.take_means())
            training_mode(trainer.network, trainer.recipe)
            self._mark()
        old = self._clock() - self._checkpoint.written > _SECONDS_BETWEEN_CHECKPOINTS
        if old and trainer.processes.world == 1:
            self._save()
        if self._on_step:
            self._on_step(status)

    def _must_stop(self) -> bool:
        """All processes stop after the same step."""
        trainer, over = self._trainer, self._now() >= self._limit
        if trainer.processes.world > 1:
            if trainer.batch % _STEPS_BETWEEN_QUESTIONS:
                return False
            told = trainer.processes.all_gather((self._asked.signal, over, trainer.broken))
            signals, overs, broken = zip(*told, strict=True)
            trainer.check_losses(broken)
            self._asked.signal, over = max(signals), any(overs)
        return bool(self._asked) or over

    def _stop(self) -> None:
        """After a step: for now, if a signal asks to; else for good, with a score of what there is. Raises Interrupted."""
        trainer = self._trainer
        if not self._asked:
            self.out_of_time = True
            if trainer.step > (trainer.history[-1]["step"] if trainer.history else 0):
                self._evaluate(trainer.take_means())
        self._save()
        epochs = trainer.recipe.epochs or 1
        if self._asked:
            raise Interrupted(
                f"stopped in epoch {trainer.epoch + 1} of {epochs}; the same command with --resume goes on from there "
                f"({self._folder})",
                self._asked.signal,
            )
        log.warning(
            "slower than planned: the time is used up after step %d of %d; the best so far counts",
            trainer.step,
            epochs * trainer.steps_per_epoch,
        )

    def _is_over(self) -> bool:
        return (
            self._trainer.epoch >= (self._trainer.recipe.epochs or 1)
            or self._out_of_patience()
            or self.out_of_time
            or self.diverged
        )

    def _out_of_patience(self) -> bool:
        """Whether so many whole epochs had no better score, at their end or within; that of the best does not count."""
        patience, best = self._trainer.recipe.patience, self._trainer.best.get("epoch", 0)
        return patience > 0 and best > 0 and self._trainer.epoch - best >= patience

    # ---------------------------------------------------------------------------------------------------- scores

    def _evaluate(self, means: tuple[float, float]) -> None:
        """Score on val, add to the history, remember the best, say how it went. ``means``: of training since the last row."""
        trainer, (loss, accuracy) = self._trainer, means
        rate = self._lap()
        logits = compute_logits(trainer.evaluated, self._val.pictures, job=trainer.job)
        val_accuracy, negative_loss = score(self._val.labels, logits)
        val_loss, epoch = -negative_loss, -(-trainer.step // trainer.steps_per_epoch)
        if not math.isfinite(val_loss):
            after = f"step {trainer.batch} of epoch {epoch}" if trainer.batch else f"epoch {epoch}"
            raise TrainingError(f"the loss on val is {val_loss} after {after}; try a lower learning rate")
        place = {"epoch": epoch, "step": trainer.step, "seconds": round(self._now(), 3), "images_per_second": rate}
        row = {"train_loss": loss, "train_accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}
        trainer.history.append(place | row)
        better = not trainer.best or (val_accuracy, -val_loss) > (trainer.best["accuracy"], -trainer.best["loss"])
        if better:
            weights = trainer.evaluated.state_dict().items()
            trainer.best = {
                "epoch": epoch,
                "step": trainer.step,
                "accuracy": val_accuracy,
                "loss": val_loss,
                "weights": {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights},
                "logits": torch.from_numpy(logits),
            }
        log.info(
            "epoch %d/%d%s: loss %.4f, accuracy %.2f%%; val loss %.4f, accuracy %.2f%%%s",
            epoch,
            trainer.recipe.epochs,
            f", step {trainer.batch}/{trainer.steps_per_epoch}" if trainer.batch else "",
            loss,
            100 * accuracy,
            val_loss,
            100 * val_accuracy,
            self._of_best() if better else "",
        )

    def _of_best(self) -> str:
        """What is said of the best score so far, which may still be no better than that of the cached head."""
        best = self._trainer.best
        if self._trainer.recipe.hidden is None:  # its score is asked for when all is over, too
            to_beat = self._to_beat()
            if (best["accuracy"], -best["loss"]) <= to_beat:
                only = ", which only a smaller loss can beat" if to_beat[0] == 1 else ""
                return f" (best epoch so far; the frozen head: {to_beat[0]:.2%}{only})"
        return " (best so far)"

    # ---------------------------------------------------------------------------------------------------- seconds

    def _now(self) -> float:
        """Seconds of training and scoring, of all calls."""
        return self._clock() - self._begun

    def _save(self) -> None:
        self._trainer.seconds = self._now()
        self._checkpoint.save()

    def _mark(self) -> None:
        """From now on there is training."""
        self._marked = self._clock(), self._trainer.step

    def _lap(self) -> float:
        """Images per second since the mark."""
        trainer, (since, before) = self._trainer, self._marked
        seconds, images = self._clock() - since, len(trainer.data) * (trainer.step - before) / trainer.steps_per_epoch
        self._seconds, self._images = self._seconds + seconds, self._images + images
        return float(f"{images / seconds:.4g}") if seconds > 0 else 0.0
