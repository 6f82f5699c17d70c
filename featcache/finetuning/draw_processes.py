"""Augmentation by worker processes, where threads would keep a GPU waiting: 16 of them draw 1,400 images a second, 16 processes 9,000.

In: pictures in memory that processes see (``Pixels.memory``), which of them a batch takes. Out: the very pixels that
``augment_picture`` gives here, in rows of that memory. Until there are processes, and where there are none, threads draw.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from featcache.finetuning.recipe_values import Step
from featcache.system.runtime_options import usable_cores
from featcache.system.transfer import pinned, wait_for
from featcache.system.worker_processes import WorkerCrashed, WorkerProcesses, WorkersLost, worker_processes

if TYPE_CHECKING:
    from featcache.finetuning.pixels import Pixels
    from featcache.finetuning.recipes import Job, Recipe

Rows = npt.NDArray[np.uint8]  # (n, H, W, 3)
Seed = tuple[int, int, int]
_FEWEST_DRAWS, _FEWEST_CORES = 4096, 6  # that are worth the seconds in which processes start
_BUFFERS = 4  # batches: one copied, those drawn ahead
ROOM = _BUFFERS  # batches that ``Pixels.memory`` has to have room for


def drawing_processes(job: "Job", recipe: "Recipe", images: int) -> WorkerProcesses | None:
    """Those that draw for ``job``, by its settled recipe, and decode what they draw from, starting at the first call.

    None where threads are as fast. ``images``: to train on.
    """
    runtime = job.runtime
    many = images * (recipe.epochs or 1) >= _FEWEST_DRAWS and min(runtime.workers, usable_cores()) >= _FEWEST_CORES
    if runtime.device.type != "cuda" or job.processes.world > 1 or not (many and recipe.augmentation):
        return None
    return worker_processes(runtime.workers, "featcache.finetuning.augment", "featcache.images.fill")


class DrawByProcesses:
    """Draws images of ``data`` for one network."""

    def __init__(
        self, processes: WorkerProcesses, data: "Pixels", steps: Sequence[Step], *, size: tuple[int, int], most: int
    ) -> None:
        """``size``: (H, W) of what is drawn. ``most``: images of a batch."""
        assert data.memory is not None, "drawing_apart() sees to it"
        self._processes, self._memory, self._pictures = processes, data.memory, data.pictures
        self._steps, self._size, self._shape = tuple(steps), size, (_BUFFERS, most, *size, 3)
        self._rows = data.memory.take(int(np.prod(self._shape)))
        self._pinned: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def buffers(self, device: torch.device) -> Iterator[Sequence[Rows]]:
        """Rows for batches that go round, which ``device`` can fetch without waiting; none if there is no room.

        At the end ``device`` has read all that it was to.
        """
        if self._rows is None:
            yield ()
            return
        if self._pinned is None:
            # Until this object goes: it takes a millisecond a megabyte, which short epochs would notice.
            self._pinned = contextlib.ExitStack()
            self._pinned.enter_context(pinned(self._rows, device))
            weakref.finalize(self, self._pinned.close)
        try:
            yield list(self._rows.reshape(self._shape))
        finally:
            wait_for(device)

    def __call__(self, images: Sequence[int], rows: Rows, seed: Callable[[int], Seed]) -> bool:
        """Draw ``images`` into ``rows`` of a buffer; False: threads have to."""
        where = [self._memory.offset(self._pictures[image]) for image in images]
        if not self._processes.ready or None in where:
            return False
        places = [
            (start, self._pictures[image].shape, seed(image), self._memory.offset(row))
            for start, image, row in zip(where, images, rows, strict=True)
        ]
        try:
            self._processes.call("featcache.finetuning.augment", self._memory, (self._steps, self._size, places))
        except (WorkerCrashed, WorkersLost):
            return False
        return True


def drawing_apart(
    job: "Job", recipe: "Recipe", data: "Pixels", *, size: tuple[int, int], most: int
) -> DrawByProcesses | None:
    """What draws ``data`` by processes, if there are any, and they see it."""
    processes = drawing_processes(job, recipe, len(data)) if data.memory is not None else None
    return DrawByProcesses(processes, data, recipe.augmentation, size=size, most=most) if processes else None
