"""An executor for several GPUs of one machine: a process each, the first of them this one.

In: names of devices. Out: parts. Blocks go to whichever device is free. A process that dies is started again, and its block given
again; when that does not help, the others do its work.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from featcache.cache.format import Indices
from featcache.extraction.executors import Executor, Published, Work, blocks, run_here, run_part
from featcache.extraction.parts import MAX_ROWS
from featcache.system.display import quantity
from featcache.system.runtime_options import usable_cores

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress
    from featcache.backbones.embedder import Embedder

log = logging.getLogger("featcache")
ALL_GPUS = "cuda:all"
_TRIES = 3  # processes that may die for one device
_LEAST = 1024  # images for each device, or starting it takes longer than it helps


def executor_for(device: str, embedder: "Embedder", images: int) -> Executor:
    """Who embeds so many ``images``: every GPU of this machine, if there are several and that is wanted; else this process."""
    if device in ("auto", ALL_GPUS) and embedder.runtime.device.type == "cuda":
        import torch

        count = min(torch.cuda.device_count(), images // _LEAST)
        if count > 1:
            return OnDevices(tuple(f"cuda:{number}" for number in range(count)), embedder)
    return functools.partial(run_here, embedder=embedder)


def own_device(device: str, workers: int | None, environ: Mapping[str, str] = os.environ) -> tuple[str, int | None]:
    """Device and threads of one of several processes that ``torchrun`` started on this machine; as given if it did not."""
    local, world = (environ.get(f"LOCAL_{name}", "") for name in ("RANK", "WORLD_SIZE"))
    if not (local.isdecimal() and world.isdecimal()) or int(world) < 2:
        return device, workers
    if device in ("auto", ALL_GPUS):
        import torch

        count = torch.cuda.device_count()
        device = f"cuda:{int(local) % count}" if count else device
    return device, workers or max(1, usable_cores() // int(world))


@dataclasses.dataclass(frozen=True)
class OnDevices:
    """The executor. devices: names, the first is that of ``embedder``, which stays in this process."""

    devices: tuple[str, ...]
    embedder: "Embedder"

    def __call__(self, work: Work, positions: Indices, *, progress: "Progress | None" = None) -> Published:
        """As ``Executor``. Raises as ``run_part``."""
        threads = work.workers or max(1, usable_cores() // len(self.devices))
        log.info("devices %s: a process each, of %s", ", ".join(self.devices), quantity(threads, "worker"))
        size = max(1, min(MAX_ROWS, len(positions) // (4 * len(self.devices))))
        run = _Run(deque(blocks(positions, size=size)), len(positions), progress)
        runtime = dataclasses.replace(self.embedder.runtime, workers=threads)
        here = functools.partial(run_part, work, embedder=dataclasses.replace(self.embedder, runtime=runtime))
        with concurrent.futures.ThreadPoolExecutor(len(self.devices), "featcache-device") as threads_of:
            elsewhere = [dataclasses.replace(work, device=name, workers=threads) for name in self.devices[1:]]
            others = [threads_of.submit(run.in_a_process, other) for other in elsewhere]
            try:
                run.take_all(here)
                for other in others:
                    other.result()
            finally:
                run.stopped = True
        run.take_all(here)  # of a device that was given up at the very end
        return Published(work.folder, tuple(run.names), time.perf_counter() - run.started)


class _Run:
    """What is to be done, and what is: shared by the threads that stand for devices."""

    def __init__(self, left: deque[Indices], total: int, progress: "Progress | None") -> None:
        self._left, self._total, self._progress = left, total, progress
        self._lock, self._count = threading.Lock(), 0
        self.names, self.stopped, self.started = list[str](), False, time.perf_counter()
        if progress:
            progress(0, total, "forward")

    def take_all(self, work_on: Callable[[Indices], tuple[str, ...]]) -> None:
        """Take block after block while there are any. One that fails is left to others, and the error raised."""
        while not self.stopped:
            try:
                block = self._left.popleft()
            except IndexError:
                return
            try:
                names = work_on(block)
            except BaseException as error:
                self._left.appendleft(block)
                self.stopped |= not isinstance(error, BrokenProcessPool)
                raise
            with self._lock:
                self.names += names
                self._count += len(block)
                if self._progress:
                    self._progress(self._count, self._total, "forward")

    def in_a_process(self, work: Work) -> None:
        """The same in a process of its own, started again if it dies. Raises what it raises."""
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        for left in reversed(range(_TRIES)):
            with concurrent.futures.ProcessPoolExecutor(1, context, _begin, (work,)) as pool:
                try:
                    self.take_all(lambda block: pool.submit(_embed, block).result())
                    return
                except BrokenProcessPool:
                    log.warning(
                        "the process of device %s died; %s",
                        work.device,
                        "starting another" if left else "the others go on",
                    )


_work: Work | None = None
_embedder: "Embedder | None" = None


def _begin(work: Work) -> None:
    """In a new process: keep what it works on, and end when the process that started it is gone."""
    global _work

    def watch() -> None:
        parent = multiprocessing.parent_process()
        multiprocessing.connection.wait([parent.sentinel] if parent else [])
        os._exit(1)

    _work = work
    threading.Thread(target=watch, daemon=True).start()


def _embed(block: Indices) -> tuple[str, ...]:
    """In that process: ``run_part``, with the one ``Embedder`` that it makes."""
    global _embedder
    assert _work is not None
    _embedder = _embedder or _work.prepare()
    return run_part(_work, block, embedder=_embedder)
