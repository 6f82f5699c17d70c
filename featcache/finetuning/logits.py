"""Logits of images, for scores.

In: a network, decoded images as ``predict`` sees them. Out: (n, C) float32, each process computing its share.
"""

import dataclasses
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from featcache.finetuning.network import Network
from featcache.finetuning.recipes import Job
from featcache.finetuning.training_input import Picture
from featcache.heads.head import Array
from featcache.system.device import Runtime, launching, memory_errors, one_core_each, return_memory, true_float32
from featcache.system.transfer import Feed, host_tensor, read_later


@true_float32
def compute_logits(network: Network, pictures: list[Picture], *, job: Job) -> Array:
    """(n, C) float32 logits of all ``pictures``, each process computing its share; float32 whatever training used."""
    network.eval()
    runtime, processes = job.runtime, job.processes
    mine = pictures[processes.rank :: processes.world]
    parts: list[Array] | None = None
    while parts is None:
        try:
            parts = _in_batches(network, mine, runtime=runtime)
        except torch.OutOfMemoryError:
            if runtime.batch_size == 1 or processes.world > 1:
                raise
        if parts is None:  # only now: until its block is left, the exception's frames hold what was computed
            runtime = dataclasses.replace(runtime, batch_size=runtime.batch_size // 2)
            return_memory(runtime.device)
    shares = processes.all_gather(np.concatenate(parts) if parts else None)
    width = next(share.shape[1] for share in shares if share is not None)
    logits = np.empty((len(pictures), width), np.float32)
    for rank, share in enumerate(shares):
        if share is not None:
            logits[rank :: processes.world] = share
    return logits


def _in_batches(network: Network, pictures: list[Picture], *, runtime: Runtime) -> list[Array]:
    """Logits of each batch; while a GPU computes one, the next is on its way."""
    feed, device = Feed(runtime.device), runtime.device

    @memory_errors()
    def begin(start: int) -> Callable[[], Array]:
        chosen = pictures[start : start + runtime.batch_size]
        batch = host_tensor((len(chosen), *chosen[0].shape), torch.uint8, device)
        np.stack(chosen, out=batch.numpy())
        with torch.inference_mode(), launching(device):  # the mode is per thread
            return read_later(network(*feed(batch)).float())

    starts = range(0, len(pictures), runtime.batch_size)
    if device.type == "cpu":
        with one_core_each(runtime.workers, "featcache-evaluate") as pool:
            return list(pool.map(lambda start: begin(start)(), starts))
    found, queued = list[Array](), deque[Callable[[], Array]]()
    for start in starts:
        queued.append(begin(start))
        if len(queued) > 1:
            found.append(queued.popleft()())
    return found + [read() for read in queued]
