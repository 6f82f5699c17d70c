"""Many threads fill batches, one feeds a device, results come in order: a few buffers go round.

In: ``fill``, which decodes one image into its row, and a ``Lane``. Out: per batch what became of its images, and its features.
Row ``i % batch_size`` of batch ``i // batch_size`` belongs to image ``i`` whatever thread decodes it and whenever: an
embedding's place in its batch, and so every bit, is the same in every run. A refused image leaves its row as it was.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from featcache.images.decode import Pixels

T = TypeVar("T")
R = TypeVar("R")
Features = npt.NDArray[np.float32]
BUFFERS = 5  # one each being uploaded, computed and downloaded, two being filled


class Lane(Protocol):
    """A device that takes batches of one size. Its three steps only queue; what ``download`` returns waits."""

    @property
    def batch_size(self) -> int:
        """Images of every batch."""

    def new_buffer(self) -> Pixels:
        """(batch_size, H, W, 3), to upload from; of no particular content."""

    def upload(self, pixels: Pixels) -> Any:
        """Begin to copy a buffer, which stays as it is until ``download``'s result was taken."""

    def compute(self, uploaded: Any) -> Any:
        """Go on with what ``upload`` gave."""

    def download(self, computed: Any) -> Callable[[], Features]:
        """What waits for the features (batch_size, D) and returns them; it keeps alive what is computed from."""


@dataclasses.dataclass(eq=False)
class _Batch(Generic[T]):
    pixels: Pixels
    found: list[T]  # by row
    left: int  # rows to fill
    features: Callable[[], Features] | None = None  # once it was given to the device


def through_ring(
    count: int,
    fill: Callable[[int, Pixels], T],
    finish: Callable[[list[T], Features, Pixels], R],
    lane: Lane,
    pool: ThreadPoolExecutor,
    *,
    workers: int,
    idle: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Generator[R]:
    """Yield ``finish`` of every batch of ``count`` images, in order. Closing it early stops all threads.

    Args:
        fill: of an image's number and its row (H, W, 3), on one of ``workers`` threads; what it returns is kept for ``finish``.
        finish: of a batch's images, features (batch_size, D) and pixels, in the thread that takes the results.
        pool: has ``workers + 1`` threads, the last of which feeds ``lane``.
        idle: a context for the time that a worker waits for a buffer, because the device, or who takes the results, is behind.

    Raises:
        Exception: whatever a thread or the lane raises, after the batches that are with the device already.
    """
    ring = _Ring(count, fill, lane, idle)
    try:
        pool.submit(ring.feed)
        for _ in range(min(workers, count)):
            pool.submit(ring.work)
        for number in range(ring.batches):
            batch, features = ring.take(number)
            result = finish(batch.found, features(), batch.pixels)
            ring.release(number)
            del batch, features
            yield result
    finally:
        ring.stop()


class _Ring(Generic[T]):
    """What the threads share. ``_changed`` guards all of it."""

    def __init__(
        self,
        count: int,
        fill: Callable[[int, Pixels], T],
        lane: Lane,
        idle: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._count, self._fill, self._lane, self._idle = count, fill, lane, idle
        self._size = lane.batch_size
        self.batches = -(-count // self._size)
        self._changed = threading.Condition()
        self._free = [lane.new_buffer() for _ in range(min(BUFFERS, self.batches))]
        self._open: dict[int, _Batch[T]] = {}
        self._next, self._stopped = 0, False
        self._error: BaseException | None = None

    def work(self) -> None:
        """A worker: fill row after row, until there are no more."""
        try:
            while place := self._next_row():
                batch, index = place
                row = index % self._size
                batch.found[row] = self._fill(index, batch.pixels[row])
                with self._changed:
                    batch.left -= 1
                    if not batch.left:
                        self._changed.notify_all()
        except BaseException as error:
            self.stop(error)

    def feed(self) -> None:
        """The feeder: give full batches to the device, in order."""
        try:
            for number in range(self.batches):
                if not (batch := self._full(number)):
                    return
                features = self._lane.download(self._lane.compute(self._lane.upload(batch.pixels)))
                with self._changed:
                    batch.features = features
                    self._changed.notify_all()
        except BaseException as error:
            self.stop(error)

    def take(self, number: int) -> tuple[_Batch[T], Callable[[], Features]]:
        """The batch, when the device has it. Raises what stopped the threads, if that comes first."""
        with self._changed:
            while not ((batch := self._open.get(number)) and batch.features):
                if self._error:
                    raise self._error
                self._changed.wait()
            return batch, batch.features

    def release(self, number: int) -> None:
        """Let the batch's buffer be filled again."""
        with self._changed:
            self._free.append(self._open.pop(number).pixels)
            self._changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Let all threads end after what they are doing."""
        with self._changed:
            self._stopped, self._error = True, self._error or error
            self._changed.notify_all()

    def _next_row(self) -> tuple[_Batch[T], int] | None:
        """An image that nobody decodes yet, and its batch, when there is a buffer; None: no more."""
        with self._changed:
            while not self._stopped and self._next < self._count:
                index, number = self._next, self._next // self._size
                if number not in self._open and self._free:
                    rows = min(self._size, self._count - index)
                    self._open[number] = _Batch(self._free.pop(), [None] * rows, rows)  # type: ignore[list-item]
                if number in self._open:
                    self._next += 1
                    return self._open[number], index
                with self._idle():
                    self._changed.wait()
        return None

    def _full(self, number: int) -> _Batch[T] | None:
        """The batch, when it is full; None: all is to end."""
        with self._changed:
            while not self._stopped:
                if (batch := self._open.get(number)) and not batch.left:
                    return batch
                self._changed.wait()
        return None
