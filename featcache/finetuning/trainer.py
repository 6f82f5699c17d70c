"""The steps of an epoch: decoded images in, trained weights out.

The whole state is one dictionary of tensors and numbers, so that a run can be stopped after any step and continued to the
same bits. No random state is kept: order, augmentation and dropout are drawn from (seed, epoch, image or step).
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from featcache.errors import TrainingError, UsageError
from featcache.finetuning.augment import augment_picture
from featcache.finetuning.average import MovingAverage
from featcache.finetuning.batches import Batch, Draw, draw_batches
from featcache.finetuning.draw_processes import drawing_apart
from featcache.finetuning.gpu_steps import GpuSteps
from featcache.finetuning.micro_batches import MicroBatches
from featcache.finetuning.network import Network, parameter_groups, set_drop_path, take_weights, training_mode, unfreeze
from featcache.finetuning.pixels import Pixels
from featcache.finetuning.recipes import Job, Recipe
from featcache.heads.head import Array, Indices
from featcache.system.device import (
    has_bf16_arithmetic,
    launching,
    memory_errors,
    return_memory,
    seed_random_numbers,
    threads_held,
    true_float32,
)
from featcache.system.display import quantity
from featcache.system.lazy_imports import optimizer_without_compiler
from featcache.system.transfer import read_later

log = logging.getLogger("featcache")
_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_DIVERGED = 3.0  # times the larger of the loss at first and a guess's


@dataclasses.dataclass(frozen=True)
class Status:
    """Where training is, for a display.

    ``loss`` and ``accuracy`` are means over the epoch so far, on augmented images; NaN after its first step on a GPU, which nobody
    waits for.
    """

    epoch: int
    epochs: int
    done: int
    total: int
    loss: float
    accuracy: float

    @property
    def scores(self) -> str:
        """Loss and accuracy in words."""
        return "loss not known yet" if math.isnan(self.loss) else f"loss {self.loss:.4f}, accuracy {self.accuracy:.2%}"


OnStep = Callable[[Status], None]  # called after every step


class Stopped(Exception):  # noqa: N818 - a state of the run, not an error
    """Training was asked to stop, and did so after a whole step."""


class Trainer:
    """Trains a network by a recipe, one epoch per call."""

    def __init__(self, network: Network, data: Pixels, *, recipe: Recipe, job: Job) -> None:
        """``network``: on the job's device, trained in place. ``data``: to train on. ``recipe``: the job's, settled."""
        self.network, self.data, self.recipe, self.job = network, data, recipe, job
        self.device, self.processes = job.runtime.device, job.processes
        self.micro_batch = job.runtime.batch_size  # most images per forward pass; gradients add up over a batch
        self._dtype = _TYPES[job.precision]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=job.precision == "fp16")
        if recipe.drop_path and not set_drop_path(network.backbone, recipe.drop_path):
            log.warning("drop_path = %g changes nothing: this backbone has no place for it", recipe.drop_path)
        alone = self.processes.world == 1
        # Which the run began with, and goes on with: where several compute one part, their number changes how sums are rounded.
        self.cores = self.processes.broadcast(job.runtime.workers if alone else torch.get_num_threads())
        self._cores = MicroBatches(network, recipe, job, self._dtype) if alone and self.device.type == "cpu" else None
        self._apart = drawing_apart(job, recipe, data, size=network.size, most=self.step_size)
        self._gpu = GpuSteps(network, recipe, job, self._dtype) if alone and self.device.type == "cuda" else None
        self.optimizer = make_optimizer(network, recipe)
        self._average = MovingAverage(network, decay=recipe.ema) if recipe.ema else None
        if recipe.batchnorm == "train" and len(data) // self.steps_per_epoch < 2:
            raise UsageError("batch norms that train need at least two images per step; use a larger --batch-size")
        self.epoch, self.batch = 0, 0  # the next batch to train on
        self._sums = np.zeros(3)  # loss, hits and images of this epoch, up to the step before the last
        self._pending: Callable[[], Array] | None = None  # those of the last step
        self._wrapped: tuple[list[bool], nn.Module] | None = (
            None  # the network for ``processes``, and what of it trains
        )
        self._told = np.zeros(3)  # the part of the sums that rows of the history are about
        self._first_loss: float | None = None  # of the run's first step, before it
        self._first_mean: float | None = None  # of its first epoch
        self.broken: tuple[int, float] | None = None  # step of the epoch, and loss: the first here that was not finite
        self.seconds = 0.0  # that the run has trained and evaluated for; recorded, decides no number
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}

    @property
    def evaluated(self) -> Network:
        """The network to evaluate and keep: the moving average if there is one."""
        return self._average.network if self._average else self.network

    @property
    def step_size(self) -> int:
        """Images per optimizer step."""
        return (self.recipe.batch_size or 1) * self.recipe.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return -(-len(self.data) // self.step_size)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def position(self) -> str:
        """How far training has come, in words."""
        return f"after {quantity(self.epoch, 'epoch')}" + (f" and {quantity(self.batch, 'step')}" if self.batch else "")

    def run_epoch(
        self, *, on_step: OnStep | None = None, stop: Callable[[], bool] = lambda: False
    ) -> tuple[float, float]:
        """Train the current epoch, or the rest of it.

        Returns:
            As ``take_means``, at its end.

        Raises:
            Stopped: ``stop()`` said so, after a step; ``state()`` continues from there.
            TrainingError: the loss is not finite or has exploded. UsageError: even one image does not fit into memory.
        """
        unfreeze(self.network, self.recipe, epoch=self.epoch)
        training_mode(self.network, self.recipe)
        wrapped = self._wrap()
        if self._cores and not self._cores.possible():
            self._cores = None
        most = min(self.step_size, len(self.data))
        with self._exact(), self._threads(most), contextlib.closing(self._batches()) as batches:
            for batch in batches:
                if stop():
                    self._settle()
                    self._share_sums()
                    raise Stopped
                with launching(self.device):
                    sums = read_later(self._step(wrapped, batch))
                    self._settle()
                self._pending = sums  # looked at one step later: a GPU never waits for the question how it went
                self.batch += 1
                if self.device.type == "cpu":
                    self._settle()
                if on_step:
                    on_step(self._status())
        means = self.take_means()
        loss, _, images = self.processes.broadcast(self._sums)
        self._check_divergence(loss / images)
        self.epoch, self.batch, self._sums, self._told = self.epoch + 1, 0, np.zeros(3), np.zeros(3)
        return means

    def take_means(self) -> tuple[float, float]:
        """Mean loss and accuracy over the epoch's images since the last call, as augmented, each before the step it was part of."""
        self._settle()
        if self.processes.world > 1:
            self.check_losses(self.processes.all_gather(self.broken))
        self._share_sums()
        loss, hits, images = self.processes.broadcast(self._sums - self._told)
        self._told = self._sums.copy()
        return float(loss / images), float(hits / images)

    def logits_in_training(self, pixels: Pixels, images: Indices) -> Array:
        """(n, C) logits of images as they are, in the mode and precision of the next step, with nothing dropped in the backbone."""
        unfreeze(self.network, self.recipe, epoch=self.epoch)
        training_mode(self.network, dataclasses.replace(self.recipe, backbone_dropout=False, drop_path=0.0))

        @memory_errors()
        def compute(start: int) -> Array:
            batch = np.stack([pixels.pictures[index] for index in images[start : start + self.micro_batch]])
            with torch.no_grad(), self._exact(), self._autocast():
                network = self._cores.logits if self._cores else self.network
                logits: Array = network(torch.from_numpy(batch).to(self.device)).float().cpu().numpy()
            return logits

        if self._cores:
            self._cores.refresh()
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                return np.concatenate([compute(start) for start in range(0, len(images), self.micro_batch)])
            self._halve_micro_batch(len(images))

    def _threads(self, most: int) -> contextlib.AbstractContextManager[None]:
        """As many for each part of a batch of at most so many images, whenever and wherever the run goes on."""
        if self._cores:
            return self._cores.cores(most, micro=self.job.runtime.batch_size, cores=self.cores)
        return threads_held(self.cores) if self.device.type == "cpu" else contextlib.nullcontext()

    def _exact(self) -> contextlib.AbstractContextManager[Any]:
        """Where float32 was asked for, it is float32."""
        return true_float32 if self._dtype is None else contextlib.nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None)

    def _batches(self) -> Generator[Batch]:
        """Those of the epoch's remaining steps, prepared ahead."""
        order = np.random.default_rng([self.job.seed, self.epoch]).permutation(len(self.data))
        steps = np.array_split(order, self.steps_per_epoch)[self.batch :]
        threads = 1 if self.device.type == "cpu" else self.job.runtime.workers  # a CPU's other cores train
        draw = Draw(self._draw, self.network.size, self._seed, self._apart)
        return draw_batches(self.data, steps, draw, device=self.device, threads=threads, processes=self.processes)

    def _seed(self, image: int) -> tuple[int, int, int]:
        return self.job.seed, self.epoch, int(self.data.kept[image])

    def _draw(self, image: int) -> torch.Tensor:
        options: dict[str, Any] = {"size": self.network.size, "seed": self._seed(image)}
        return augment_picture(self.data.pictures[image], self.recipe.augmentation, **options)

    def _wrap(self) -> nn.Module:
        """The network for ``processes``, made again where other parameters train than before."""
        training = [parameter.requires_grad for parameter in self.network.parameters()]
        if self._wrapped is None or self._wrapped[0] != training:
            self._wrapped = None  # its hooks first: two would average every gradient twice
            self._wrapped = training, self.processes.wrap(self.network, self.device)
        return self._wrapped[1]

    def _step(self, wrapped: nn.Module, batch: Batch) -> torch.Tensor:
        """One optimizer step. Returns (loss, hits, images) summed over this process's images, on the device."""
        number = self.epoch * self.steps_per_epoch + self.batch
        set_learning_rates(self.optimizer, self.recipe, number, self.steps_per_epoch)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            seed_random_numbers(
                hash((self.job.seed, number, self.processes.rank)) % 2**63, self.device
            )  # dropout, drop path
            with contextlib.suppress(torch.OutOfMemoryError):  # its frames hold what was computed: retry without it
                sums = self._accumulate(wrapped, batch)
                break
            self._halve_micro_batch(len(batch[0]))
        if self.recipe.clip_norm:
            self._scaler.unscale_(self.optimizer)
            trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(trained, self.recipe.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average:
            self._average.update()
        return sums

    @memory_errors()
    def _accumulate(self, wrapped: nn.Module, batch: Batch) -> torch.Tensor:
        """Gradients of the mean loss over the images of all processes, one micro-batch after the other."""
        pixels, labels, weights, size = batch
        if self._cores:
            step = self.epoch * self.steps_per_epoch + self.batch
            return self._cores.accumulate(batch, step=step, micro=self.micro_batch)
        micro = len(pixels) if self.recipe.batchnorm == "train" else self.micro_batch
        if self._gpu:
            return self._gpu.accumulate(batch, micro=micro, scale=self._scaler.scale)
        sums = torch.zeros(3, device=pixels.device)
        for start in range(0, len(pixels), micro):
            part = slice(start, start + micro)
            last = start + micro >= len(pixels)
            with self.processes.no_sync(wrapped, unless=last):
                with self._autocast():
                    logits = wrapped(pixels[part])
                smoothing = self.recipe.label_smoothing
                losses = functional.cross_entropy(
                    logits.float(), labels[part], reduction="none", label_smoothing=smoothing
                )
                loss = (losses * weights[part]).sum()
                self._scaler.scale(loss * (self.processes.world / size)).backward()  # type: ignore[no-untyped-call] # DDP divides by world
            hits = ((logits.argmax(dim=1) == labels[part]) * weights[part]).sum()
            sums += torch.stack((loss.detach(), hits, weights[part].sum()))
        return sums

    def _halve_micro_batch(self, images: int) -> None:
        micro = min(self.micro_batch, images)
        whole = self.recipe.batchnorm == "train"
        if micro == 1 or whole or self.processes.world > 1:
            why, what = "", "--micro-batch" if micro > 1 else "--crop, when the head is fit,"
            if whole:
                why, what = "; batch norms that train need whole batches", "--batch-size"
            raise UsageError(
                f"{quantity(micro, 'image at once does', 'images at once do')} not fit into {self.device}'s memory{why}: "
                f"use a smaller {what}"
            )
        self.micro_batch = micro // 2
        self.optimizer.zero_grad(set_to_none=True)
        if self._gpu:
            self._gpu.forget()
        return_memory(self.device)
        log.warning(
            "out of memory with %d images at once: going on with %d, adding up gradients to the same batch",
            micro,
            self.micro_batch,
        )

    def _settle(self) -> None:
        """Add the last step's sums, in all processes at once. Raises TrainingError, in one process, if its loss is not finite."""
        if self._pending is None:
            return
        values, self._pending = self._pending(), None
        if self._first_loss is None:
            loss, _, images = np.sum(self.processes.all_gather(values), axis=0)
            self._first_loss = float(loss / images)
        if not math.isfinite(values[0]):
            self.broken = self.broken or (self.batch, float(values[0]))
            if self.processes.world == 1:
                self.check_losses([self.broken])
        self._sums = self._sums + values

    def check_losses(self, broken: Iterable[tuple[int, float] | None]) -> None:
        """Raise TrainingError if one of the processes, whose ``broken`` these are, had a loss that is not finite: all of them at once."""
        if found := sorted(filter(None, broken)):
            step, loss = found[0]
            raise TrainingError(f"the loss is {loss} at step {step} of epoch {self.epoch + 1}: {self._remedy()}")

    def check_weights(self) -> None:
        """Raise TrainingError, in all processes at once, if a weight is not finite."""
        finite = all(bool(parameter.isfinite().all()) for parameter in self.network.parameters())
        if not all(self.processes.all_gather(finite)):
            raise TrainingError(
                f"weights are not finite after step {self.batch} of epoch {self.epoch + 1}: {self._remedy()}"
            )

    def _remedy(self) -> str:
        fp16 = "; or use --precision bf16" if self._dtype is torch.float16 else ""
        return (
            f"most likely the learning rate is too high ({self.recipe.lr:g} for the head, {self.recipe.backbone_lr:g} for the "
            f"backbone); {self._a_third()}{fp16}"
        )

    def _a_third(self) -> str:
        rates = {"--lr": self.recipe.lr, "--backbone-lr": self.recipe.backbone_lr}
        options = " ".join(f"{name} {rate / 3:.2g}" for name, rate in rates.items() if rate)
        return f"try a third of the learning rates ({options} --force)"

    def _check_divergence(self, loss: float) -> None:
        """Raise TrainingError if an epoch's mean loss is far above the first epoch's (in that: the first step's) and a guess's.

        A new random head may start anywhere: on large embeddings far above a guess.
        """
        classes = next(m for m in reversed(list(self.network.head)) if isinstance(m, nn.Linear)).out_features
        first = self._first_loss or 0.0 if self._first_mean is None else self._first_mean
        if not loss <= _DIVERGED * max(first, math.log(classes)):
            where = "that of epoch 1" if self.epoch else "before the first step it"
            raise TrainingError(
                f"training diverges: the mean loss of epoch {self.epoch + 1} is {loss:.3g}, {where} was {first:.3g}, guessing gives "
                f"{math.log(classes):.3g}; {self._a_third()}"
            )
        if not self.epoch:
            self._first_mean = float(loss)

    def _share_sums(self) -> None:
        """Add all processes' sums on the first one, whose state is saved."""
        everybody = np.sum(self.processes.all_gather(self._sums), axis=0)
        self._sums = everybody if self.processes.is_first else np.zeros(3)

    def _status(self) -> Status:
        loss, hits, images = self._sums.tolist()
        done, of = min(self.batch * self.step_size, len(self.data)), self.recipe.epochs or 1
        means = (loss / images, hits / images) if images else (math.nan, math.nan)
        return Status(self.epoch + 1, of, done, len(self.data), *means)

    # ---------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        self._settle()
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self._sums.tolist(),
            "told": self._told.tolist(),
            "seconds": self.seconds,
            "first_loss": self._first_loss,
            "first_mean": self._first_mean,
            "micro_batch": self.micro_batch,
            "cores": self.cores,
            "network": self.network.state_dict(),
            "average": self._average.state() if self._average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "history": self.history,
            "best": self.best,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``."""
        self.epoch, self.batch, self.micro_batch = state["epoch"], state["batch"], state["micro_batch"]
        self._sums, self._told = (
            np.array(state[name]) if self.processes.is_first else np.zeros(3) for name in ("sums", "told")
        )
        self.seconds = state["seconds"]
        self.cores = state.get("cores", self.cores)  # of earlier versions it is not known
        self._first_loss, self._first_mean = state["first_loss"], state["first_mean"]
        take_weights(self.network, state["network"])
        if self._average:
            self._average.load_state(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.history, self.best = state["history"], state["best"]


def make_optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over everything that it ever trains."""
    groups = parameter_groups(network, recipe)
    # One pass over all weights; and on a GPU, with a loss scaler, no question whether gradients are finite. Elsewhere: PyTorch's choice.
    fused = True if network.mean.device.type in ("cpu", "cuda") else None
    if recipe.optimizer == "sgd":
        return optimizer_without_compiler(torch.optim.SGD, groups, lr=recipe.lr, momentum=recipe.momentum, fused=fused)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return optimizer_without_compiler(kind, groups, lr=recipe.lr, fused=fused)


def set_learning_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps_per_epoch: int) -> None:
    """The learning rates of optimizer step ``step`` (from 0): peak times warm-up times schedule."""
    total = steps_per_epoch * (recipe.epochs or 1)
    warm = round(recipe.warmup * total)
    if step < warm:
        factor = (step + 1) / warm
    elif recipe.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    elif recipe.schedule == "step":
        factor = recipe.gamma ** (step // steps_per_epoch // recipe.step_epochs)
    else:
        factor = 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def choose_training_precision(asked: str, device: torch.device) -> str:
    """Mixed precision where the hardware multiplies it: bf16 before fp16, which needs loss scaling; else fp32.

    Raises:
        UsageError: unknown, or not possible on ``device``.
    """
    if asked == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if device.type == "cpu" and has_bf16_arithmetic() else "fp32"
    if asked not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"unknown precision {asked!r}; choose auto, fp32, bf16 or fp16")
    if asked == "fp16" and device.type != "cuda":
        raise UsageError(f"training in fp16 needs a CUDA GPU, found {device.type}; choose fp32 or bf16")
    return asked
