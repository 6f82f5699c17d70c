"""The batches of an epoch: augmented on CPU threads ahead of the steps that take them, whatever the device.

In: decoded images, which of them each step takes, how one is drawn. Out: a ``Batch`` per step, on the device. An image is drawn from
(seed, epoch, image) alone, on the CPU: the same pixels for every device, number of threads and of processes.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from featcache.finetuning.pixels import Pixels
from featcache.heads.head import Indices
from featcache.system.device import one_core_each
from featcache.system.distributed import Processes
from featcache.system.transfer import Feed, host_tensor

_AHEAD = 2  # batches that are drawn, or being drawn, while a step computes
Draw = Callable[[int], torch.Tensor]  # position of an image -> uint8 (H, W, 3), augmented, on the CPU


class Batch(NamedTuple):
    """A process's share of a step: (n, H, W, 3) uint8, (n,) labels, (n,) weights; images of all processes."""

    pixels: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    size: int


def draw_batches(
    data: Pixels,
    steps: Sequence[Indices],
    draw: Draw,
    *,
    size: tuple[int, int],
    device: torch.device,
    threads: int,
    processes: Processes,
) -> Generator[Batch]:
    """The batches of ``steps``, positions in ``data`` of each one's images, in order; ``threads`` draw, together at one batch.

    ``size``: (H, W).
    """
    feed, ahead = Feed(device), deque[tuple[Batch, list[Future[None]]]]()
    with one_core_each(threads, "featcache-augment") as pool:

        def finished() -> Batch:
            batch, images = ahead.popleft()
            for image in images:
                image.result()
            # Queued beside the step before, which the GPU still computes.
            pixels, labels, weights = feed(batch.pixels, batch.labels, batch.weights)
            return Batch(pixels, labels, weights, batch.size)

        for step in steps:
            ahead.append(_begin(data, step, draw, size=size, processes=processes, pool=pool, device=device))
            if len(ahead) > _AHEAD:
                yield finished()
        while ahead:
            yield finished()


def _begin(
    data: Pixels,
    step: Indices,
    draw: Draw,
    *,
    size: tuple[int, int],
    processes: Processes,
    pool: ThreadPoolExecutor,
    device: torch.device,
) -> tuple[Batch, list["Future[None]"]]:
    """A batch in this computer's memory, and its images on their way into it."""
    mine = step[processes.rank :: processes.world]
    weight = 1.0
    if not len(mine):  # fewer images than processes: take part in the backward pass, without weight
        mine, weight = step[:1], 0.0
    pixels = host_tensor((len(mine), *size, 3), torch.uint8, device)
    labels, weights = host_tensor((len(mine),), torch.int64, device), host_tensor((len(mine),), torch.float32, device)
    labels.copy_(torch.from_numpy(data.labels[mine]))
    weights.fill_(weight)

    def fill(slot: int, image: int) -> None:
        pixels[slot] = draw(image)

    images = [pool.submit(fill, slot, image) for slot, image in enumerate(np.asarray(mine).tolist())]
    return Batch(pixels, labels, weights, len(step)), images
