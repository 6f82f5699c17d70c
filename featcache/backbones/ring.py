"""Many threads fill batches, one or a few feed a device, results come in order: a few buffers go round.

In: ``fill``, which decodes a few images into their rows, and a ``Lane``. Out: per batch what became of its images, and its features.
Row ``i % batch_size`` of batch ``i // batch_size`` belongs to image ``i`` whatever thread decodes it and whenever: an
embedding's place in its batch, and so every bit, is the same in every run. A refused image leaves its row as it was.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from featcache.images.decode import Pixels

T = TypeVar("T")
R = TypeVar("R")
Features = npt.NDArray[np.float32]
Change = Callable[[Any], None]  # of a tensor (batch_size, H, W, 3) on the device, before it is computed from
_BESIDE = 4  # buffers beside those of the feeders: one each being computed and downloaded, two being filled
_FEEDERS = 3  # where a device decodes: each waits for it most of the time, and for Python's lock
_AT_ONCE = 16  # rows that a thread fills before it asks for more
_ROUNDS = 4  # of each thread at least, so that all end at about the same time


class Lane(Protocol):
    """A device that takes batches of one size. Its three steps only queue; what ``download`` returns waits."""

    @property
    def batch_size(self) -> int:
        """Images of every batch."""

    def new_buffer(self) -> Pixels:
        """(batch_size, H, W, 3), to upload from; of no particular content."""

    def pinned(self, buffers: Pixels) -> contextlib.AbstractContextManager[object]:
        """A context in which ``upload`` takes parts of these bytes as fast as a ``new_buffer``."""

    def upload(self, pixels: Pixels, change: "Change | None" = None) -> Any:
        """Begin to copy a buffer, which stays as it is until ``download``'s result was taken; ``change`` what has arrived."""

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
    fill: Callable[[range, Pixels], list[T]],
    finish: Callable[[list[T], Features], R],
    lane: Lane,
    pool: ThreadPoolExecutor,
    *,
    workers: int,
    own: Sequence[Pixels] | None = None,
    complete: Callable[[list[T], Any], list[T]] | None = None,
    idle: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Generator[R]:
    """Yield ``finish`` of every batch of ``count`` images, in order. Closing it early stops all threads.

    Args:
        fill: of some images' numbers and their rows (n, H, W, 3), on one of ``workers`` threads; what it returns of each image is
            kept for ``finish``.
        finish: of a batch's images and features (batch_size, D), in the thread that takes the results; the rows are still there.
        own: ``buffers(complete)`` of them, to go round; ``lane``'s own when None.
        complete: of a full batch's images and its tensor on the device, to be changed, in a feeder's thread: better images.
        pool: has ``workers + feeders(complete)`` threads, the last of which feed ``lane``.
        idle: a context for the time that a worker waits for a buffer, because the device, or who takes the results, is behind.

    Raises:
        Exception: whatever a thread or the lane raises, after the batches that are with the device already.
    """
    at_once = max(1, min(_AT_ONCE, count // (_ROUNDS * workers)))
    ring = _Ring(count, at_once, fill, lane, own, idle, complete)
    try:
        for _ in range(feeders(complete)):
            pool.submit(ring.feed)
        for _ in range(min(workers, count)):
            pool.submit(ring.work)
        for number in range(ring.batches):
            batch, features = ring.take(number)
            result = finish(batch.found, features())
            ring.release(number)
            del batch, features
            yield result
    finally:
        ring.stop()


def feeders(complete: object) -> int:
    """Threads that feed the lane: more than one where it would wait for what it asks of the device."""
    return 1 if complete is None else _FEEDERS


def buffers(complete: object) -> int:
    """Batches that go round."""
    return _BESIDE + feeders(complete)


class _Ring(Generic[T]):
    """What the threads share. ``_changed`` guards all of it."""

    def __init__(
        self,
        count: int,
        at_once: int,
        fill: Callable[[range, Pixels], list[T]],
        lane: Lane,
        own: Sequence[Pixels] | None,
        idle: Callable[[], contextlib.AbstractContextManager[None]],
        complete: Callable[[list[T], Any], list[T]] | None,
    ) -> None:
        self._count, self._at_once, self._fill = count, at_once, fill
        self._lane, self._idle, self._complete = lane, idle, complete
        self._size = lane.batch_size
        self.batches = -(-count // self._size)
        self._changed = threading.Condition()
        self._free = list(own) if own is not None else self._lanes_buffers()
        self._open: dict[int, _Batch[T]] = {}
        self._next, self._fed, self._stopped = 0, 0, False
        self._error: BaseException | None = None

    def _lanes_buffers(self) -> list[Pixels]:
        return [self._lane.new_buffer() for _ in range(min(buffers(self._complete), self.batches))]

    def work(self) -> None:
        """A worker: fill row after row, until there are no more."""
        try:
            while place := self._next_rows():
                batch, images = place
                row = images.start % self._size
                rows = slice(row, row + len(images))
                batch.found[rows] = self._fill(images, batch.pixels[rows])
                with self._changed:
                    batch.left -= len(images)
                    if not batch.left:
                        self._changed.notify_all()
        except BaseException as error:
            self.stop(error)

    def feed(self) -> None:
        """A feeder: give full batches to the device, in order."""
        try:
            while batch := self._next_full():
                features = self._lane.download(self._lane.compute(self._uploaded(batch)))
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

    def _uploaded(self, batch: _Batch[T]) -> Any:
        if self._complete is None:
            return self._lane.upload(batch.pixels)
        complete = self._complete

        def change(pixels: Any) -> None:
            batch.found = complete(batch.found, pixels)

        return self._lane.upload(batch.pixels, change)

    def _next_rows(self) -> tuple[_Batch[T], range] | None:
        """A few images that nobody decodes yet, and their batch, when there is a buffer; None: no more."""
        with self._changed:
            while not self._stopped and self._next < self._count:
                index, number = self._next, self._next // self._size
                if number not in self._open and self._free:
                    rows = min(self._size, self._count - index)
                    self._open[number] = _Batch(self._free.pop(), [None] * rows, rows)  # type: ignore[list-item]
                if number in self._open:
                    self._next = min(index + self._at_once, (number + 1) * self._size, self._count)
                    return self._open[number], range(index, self._next)
                with self._idle():
                    self._changed.wait()
        return None

    def _next_full(self) -> _Batch[T] | None:
        """The next batch that no feeder has, when it is full; None: all is to end."""
        with self._changed:
            number = self._fed
            self._fed += 1
            while not self._stopped and number < self.batches:
                if (batch := self._open.get(number)) and not batch.left:
                    return batch
                self._changed.wait()
        return None
