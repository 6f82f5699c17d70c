"""The batches of an epoch: augmented on the CPU ahead of the steps that take them, whatever the device.

In: decoded images, which of them each step takes, how one is drawn. Out: a ``Batch`` per step, on the device. An image is drawn from
(seed, epoch, image) alone, on the CPU: the same pixels for every device, number of threads and of processes.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from featcache.finetuning.draw_processes import DrawByProcesses, Rows, Seed
from featcache.finetuning.pixels import Pixels
from featcache.heads.head import Indices
from featcache.system.device import one_core_each
from featcache.system.distributed import Processes
from featcache.system.transfer import Feed, host_tensor

_AHEAD = 2  # batches that are drawn, or being drawn, while a step computes


class Batch(NamedTuple):
    """A process's share of a step: (n, H, W, 3) uint8, (n,) labels, (n,) weights; images of all processes."""

    pixels: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    size: int


@dataclasses.dataclass(frozen=True)
class Draw:
    """How an image is drawn.

    Attributes:
        image: position -> uint8 (H, W, 3), augmented, on the CPU. size: (H, W). seed: position -> what decides it.
        apart: draws in processes of its own, if there are any.
    """

    image: Callable[[int], torch.Tensor]
    size: tuple[int, int]
    seed: Callable[[int], Seed]
    apart: DrawByProcesses | None = None


@dataclasses.dataclass
class _Begun:
    """A batch in this computer's memory, its images on their way into it. slot: of the buffer that it lies in."""

    batch: Batch
    slot: int | None
    jobs: list["Future[None]"]


def draw_batches(
    data: Pixels,
    steps: Sequence[Indices],
    draw: Draw,
    *,
    device: torch.device,
    threads: int,
    processes: Processes,
) -> Generator[Batch]:
    """The batches of ``steps``, positions in ``data`` of each one's images, in order; ``threads`` draw, together at one batch."""
    shared = draw.apart.buffers(device) if draw.apart else contextlib.nullcontext(())
    with one_core_each(threads, "featcache-augment") as pool, shared as buffers:
        drawing, ahead = _Drawing(data, draw, pool, threads, Feed(device), buffers, device), deque[_Begun]()
        for step in steps:
            mine, weight = step[processes.rank :: processes.world], 1.0
            if not len(mine):  # fewer images than processes: take part in the backward pass, without weight
                mine, weight = step[:1], 0.0
            ahead.append(drawing.begin(mine, weight, len(step)))
            if len(ahead) > _AHEAD:
                yield drawing.finish(ahead.popleft())
        while ahead:
            yield drawing.finish(ahead.popleft())


class _Drawing:
    """Begins batches, and finishes them in the same order."""

    def __init__(
        self,
        data: Pixels,
        draw: Draw,
        pool: ThreadPoolExecutor,
        threads: int,
        feed: Feed,
        buffers: Sequence[Rows],
        device: torch.device,
    ) -> None:
        self._data, self._draw, self._pool, self._threads, self._feed = data, draw, pool, threads, feed
        self._device, self._buffers, self._begun = device, buffers, 0
        self._sent: dict[int, Callable[[], None]] = {}  # slot -> what waits until the buffer may be written again

    def begin(self, images: Indices, weight: float, size: int) -> _Begun:
        slot = self._begun % len(self._buffers) if self._buffers and len(images) <= len(self._buffers[0]) else None
        self._begun += 1
        shape = len(images), *self._draw.size, 3
        if slot is None:
            pixels = host_tensor(shape, torch.uint8, self._device)
        else:
            if slot in self._sent:
                self._sent.pop(slot)()
            pixels = torch.from_numpy(self._buffers[slot][: len(images)])
        labels = host_tensor(shape[:1], torch.int64, self._device)
        weights = host_tensor(shape[:1], torch.float32, self._device)
        labels.copy_(torch.from_numpy(self._data.labels[images]))
        weights.fill_(weight)
        begun = _Begun(Batch(pixels, labels, weights, size), slot, [])
        # Processes get as few tasks as keep them all busy with the batches ahead: each task takes Python's lock from who trains.
        chunk = -(-_AHEAD * len(images) // self._threads) if slot is not None else 1
        for start in range(0, len(images), chunk):
            some = np.asarray(images)[start : start + chunk].tolist()
            begun.jobs.append(self._pool.submit(self._fill, begun, start, some))
        return begun

    def _fill(self, begun: _Begun, start: int, images: list[int]) -> None:
        rows, apart = begun.batch.pixels[start : start + len(images)], self._draw.apart
        if begun.slot is None or not (apart and apart(images, rows.numpy(), self._draw.seed)):
            for row, image in zip(rows, images, strict=True):
                row.copy_(self._draw.image(image))

    def finish(self, begun: _Begun) -> Batch:
        for job in begun.jobs:
            job.result()
        # Queued beside the step before, which the GPU still computes.
        pixels, labels, weights = self._feed(*begun.batch[:3])
        if begun.slot is not None:
            self._sent[begun.slot] = self._feed.mark()
        return Batch(pixels, labels, weights, begun.batch.size)
