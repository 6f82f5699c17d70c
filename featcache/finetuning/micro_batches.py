"""The gradient of a batch on a CPU: a few images at a time, each part forward and back on one core, several parts at once.

In: a network in the mode of the next steps, a batch. Out: gradients of its parameters. They are added up in the order of the parts,
and nothing random depends on the parts, so that the number of cores changes no bit, and that of images in a part only rounding. Where
there are at least twice as many cores as parts, each part is computed by several, and how many does change how sums are rounded: that
number belongs to the run, which keeps it when it is resumed, on whatever machine.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from featcache.finetuning.draws import draw_by_image, drawn_by_image, draws_otherwise
from featcache.finetuning.fused import IMAGES, Form, make_form
from featcache.finetuning.network import Network
from featcache.finetuning.recipes import Job, Recipe
from featcache.images.preprocess import normalise
from featcache.system.device import Runtime, one_core_each, threads_held

_MANY_WEIGHTS = 8_000_000  # which each part lays out, and adds gradients of: a tenth of ResNet-18's step in parts of 4
_WATCHED = 1.0  # seconds over which is looked at how many cores there were
_CROWDED = 0.7  # of them: 0.95 and more on an idle machine, half beside a busy process per core
Part = TypeVar("Part")
Result = TypeVar("Result")


def images_at_once(runtime: Runtime, backbone: nn.Module) -> int:
    """How many images a forward pass takes in training, where nobody asks for so many: on a CPU few, more where weights are many."""
    if runtime.device.type != "cpu":
        return runtime.batch_size
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    return 2 * IMAGES if weights >= _MANY_WEIGHTS else IMAGES


class MicroBatches:
    """Gradients of a network's batches, by all cores."""

    def __init__(self, network: Network, recipe: Recipe, job: Job, dtype: torch.dtype | None) -> None:
        """``dtype``: of the backbone's arithmetic, where not float32."""
        self._network, self._recipe, self._job = network, recipe, job
        self._dtype = dtype or torch.float32
        draw_by_image(network.head)
        if recipe.backbone_dropout:
            draw_by_image(network.backbone)
        self._form: Form | None = None
        self._mode: tuple[object, ...] = ()
        self._workers = 0
        self._pool: ThreadPoolExecutor | None = None
        self._own_thread: OwnThread | None = None  # where there is no pool
        self._held = contextlib.ExitStack()

    @property
    def form(self) -> Form:
        """What computes embeddings, in the mode that the network is in."""
        backbone = self._network.backbone
        mode = (
            *(p.requires_grad for p in self._network.parameters()),
            *(module.training for module in backbone.modules()),
        )
        if self._form is None or mode != self._mode:
            self._form, self._mode = make_form(backbone, self._network.head, self._sample(), self._dtype), mode
        return self._form

    def possible(self) -> bool:
        """Whether all that is random, in the network's mode, belongs to an image: attention's own dropout does not."""
        if not self._recipe.backbone_dropout:
            return True
        return not draws_otherwise(self._network.backbone, self._sample())

    def _sample(self) -> torch.Tensor:
        pixels = torch.randint(0, 256, (2, *self._network.size, 3), generator=torch.Generator().manual_seed(0))
        return normalise(pixels.to(torch.uint8), self._network.mean, self._network.std)

    @contextlib.contextmanager
    def cores(self, images: int, *, micro: int, cores: int) -> Iterator[None]:
        """Hold the threads for batches of at most so many images.

        ``cores``: which the run has, or had when it began; where there are fewer parts, each gets several, also where fewer are left.
        """
        parts = len(self._parts(images, micro))
        each = max(1, cores // parts)
        self._workers = max(1, min(self._job.runtime.workers // each, parts))
        with self._held:
            self._held.callback(setattr, self, "_pool", None)
            # Adding up needs no more, threads that wait for each other stop under load, and a sum has the same bits everywhere.
            self._held.enter_context(threads_held(1))
            if parts > 1:
                self._hold_pool(each)
            else:
                self._own_thread = OwnThread(each)
            yield

    def _hold_pool(self, cores: int) -> None:
        pool = one_core_each(self._workers, "featcache-train", cores=cores)
        self._pool, self._own_thread = self._held.enter_context(pool), None

    def _parts(self, images: int, micro: int) -> list[range]:
        """A batch's images, cut into parts of at most ``micro``, whatever the number of cores."""
        size = images if self.form.whole else micro
        return [range(start, min(start + size, images)) for start in range(0, images, size)]

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (n, H, W, 3) -> (n, C), as the next step computes them."""
        network = self._network
        assert self._form is not None, "refresh() made it"
        logits: torch.Tensor = network.head(self._form.embed(normalise(pixels, network.mean, network.std)))
        return logits

    def refresh(self) -> None:
        """Take over the network's mode and weights."""
        self.form.refresh(self._dtype)

    def accumulate(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], *, step: int, micro: int
    ) -> torch.Tensor:
        """Set ``grad`` to that of the batch's mean loss, at most ``micro`` images at a time; returns sums as ``Trainer._step`` does."""
        pixels, labels, weights, size = batch
        self.refresh()
        form, seed = self.form, self._job.seed

        def compute(part: range) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
            chosen = slice(part.start, part.stop)
            with drawn_by_image(seed, step, part), torch.enable_grad():
                logits = self.logits(pixels[chosen])
                losses = functional.cross_entropy(
                    logits, labels[chosen], reduction="none", label_smoothing=self._recipe.label_smoothing
                )
                loss = (losses * weights[chosen]).sum()
                gradients = torch.autograd.grad(loss / size, form.leaves, allow_unused=True)
            hits = ((logits.argmax(dim=1) == labels[chosen]) * weights[chosen]).sum()
            sums = torch.stack((loss.detach(), hits, weights[chosen].sum()))
            return sums, [None if g is None else g.float() for g in gradients]

        sums, total = torch.zeros(3), list[torch.Tensor | None]()
        with contextlib.closing(self._computed(compute, self._parts(len(pixels), micro))) as results:
            for found, gradients in results:
                sums += found
                total = _added(total, gradients)
        form.settle(total)
        if not form.is_finite():
            sums[0] = torch.nan  # what oneDNN makes of NaN in an activation is 0: the loss alone may not tell
        if self._own_thread and self._own_thread.is_crowded():
            self._hold_pool(self._own_thread.cores)
        return sums

    def _computed(self, compute: Callable[[range], Result], parts: list[range]) -> Generator[Result]:
        """Results of ``parts``, in order."""
        if self._pool is None:
            run = (self._own_thread or OwnThread(1)).run
            return (run(compute, part) for part in parts)
        return in_order(self._pool, compute, parts, ahead=self._workers)


class OwnThread:
    """Computes parts in the thread that asks, on all cores, as long as these are not wanted by other processes.

    OpenMP's threads stay awake between one thread's calls. With those for another thread there would be more of them than cores, and
    they would sleep after each call: half as fast, unless other processes want the cores.
    """

    def __init__(
        self,
        cores: int,
        *,
        seconds: Callable[[], float] = time.perf_counter,
        worked: Callable[[], float] = time.process_time,
    ) -> None:
        """``seconds``: a clock. ``worked``: seconds that cores have worked for this process, waiting awake included."""
        self.cores, self._clocks = cores, (seconds, worked)
        self._begun = seconds(), worked()

    def run(self, compute: Callable[[Part], Result], part: Part) -> Result:
        """``compute(part)``."""
        with threads_held(self.cores):
            return compute(part)

    def is_crowded(self) -> bool:
        """To be asked after every step; True if for a while this process had far fewer cores than it keeps busy."""
        now = self._clocks[0](), self._clocks[1]()
        seconds, worked = (after - before for after, before in zip(now, self._begun, strict=True))
        if seconds < _WATCHED or self.cores == 1:
            return False
        self._begun = now
        return worked < _CROWDED * self.cores * seconds


def _added(total: list[torch.Tensor | None], more: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """``more`` added to ``total``, in place where it can be."""
    if not total:
        return more
    pairs = [(a, b) for a, b in zip(total, more, strict=True) if a is not None and b is not None]
    torch._foreach_add_([a for a, _ in pairs], [b for _, b in pairs])
    return [b if a is None else a for a, b in zip(total, more, strict=True)]


def in_order(
    pool: ThreadPoolExecutor, compute: Callable[[Part], Result], parts: Iterable[Part], *, ahead: int
) -> Generator[Result]:
    """Results in the order of ``parts``; at most ``ahead`` + 1 of them are computed, or there, before one is taken."""
    futures: deque[Future[Result]] = deque()
    try:
        for part in parts:
            futures.append(pool.submit(compute, part))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # whoever tries again has the cores, and the memory, for itself
