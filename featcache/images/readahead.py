"""An object elsewhere as an open file. In: its address and version. Out: reads, of blocks that neighbouring reads share.

Whoever goes through an object in order, as a listing does and then the images one after the other, gets it in few large requests,
several at a time; whoever jumps about gets what was asked for and no more.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec, TypeVar

from featcache.errors import RefusedImage
from featcache.images.remote import PATIENT, Described, Patience, start_fetch

P = ParamSpec("P")
T = TypeVar("T")
MOST = 4 << 20  # bytes of one request
_FIRST = 512 << 10  # ahead of a first read that goes on from the last; doubled from read to read
_NEAR = 1 << 20  # bytes that are sooner read than jumped over: what a connection brings in the time of one request
_AHEAD = 4  # requests under way beyond what is read
_KEPT = 32  # blocks at most: 128 MiB; of reads in one order 8
_ORDERS = 32  # that are followed at a time: threads may be far from each other


class _Block(NamedTuple):
    start: int
    stop: int
    data: "concurrent.futures.Future[bytes]"


@dataclasses.dataclass
class _Order:
    """Reads one after the other: where what was fetched of them ends, and how much is fetched ahead."""

    end: int
    window: int = _FIRST


class Blocks:
    """What is held of one object, shared by all that read it, from any thread."""

    def __init__(self, address: str, described: Described, patience: Patience) -> None:
        self.address, self.described, self.patience = address, described, patience
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []  # the latest last, as are orders
        self._orders = [_Order(0)]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``, which lie inside. Errors as of ``remote.start_fetch``."""
        pieces = []
        while start < stop:
            with self._lock:
                block = self._holding(start) or self._fetch(start, stop)
                self._go_ahead(start)
            try:
                _wait_for(block.data)
                piece = block.data.result()[start - block.start : stop - block.start]
            except BaseException:
                with self._lock:  # whoever comes next asks again
                    self._blocks = [each for each in self._blocks if each is not block]
                raise
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _holding(self, position: int) -> _Block | None:
        return next((block for block in self._blocks if block.start <= position < block.stop), None)

    def _fetch(self, start: int, stop: int) -> _Block:
        """Begin with a block that holds ``start``: from the end of the order that goes on there, or what is asked for alone."""
        for order in self._orders:
            if 0 <= start - order.end <= _NEAR:
                self._orders.append(self._orders.pop(self._orders.index(order)))
                while (block := self._extend(order, stop)).stop <= start:
                    pass
                return block
        block = self._request(start, min(stop, start + MOST))
        going_on = [order for order in self._orders if not self._holding(order.end)]  # others have come to each other
        self._orders = [*going_on, _Order(block.stop)][-_ORDERS:]
        return block

    def _extend(self, order: _Order, stop: int) -> _Block:
        """The next block in order, up to ``stop`` or further; one that is there already if it is."""
        if (block := self._holding(order.end)) is None:
            order.window = min(2 * order.window, MOST)
            length = min(max(stop - order.end, order.window), MOST, self.described.size - order.end)
            block = self._request(order.end, order.end + length)
        order.end = block.stop
        return block

    def _go_ahead(self, position: int) -> None:
        """Begin with what comes next where reads are in order and at full speed."""
        for order in self._orders:
            while (
                order.window == MOST and 0 <= order.end - position < _AHEAD * MOST and order.end < self.described.size
            ):
                self._extend(order, order.end)

    def _request(self, start: int, stop: int) -> _Block:
        stop = min([stop, *(block.start for block in self._blocks if block.start > start)])
        block = _Block(start, stop, start_fetch(self.address, start, stop, self.described, self.patience))
        kept = min(_AHEAD + 4 * len(self._orders), _KEPT)  # what threads that follow one another have between them
        self._blocks = [*self._blocks, block][-kept:]
        return block


_thread = threading.local()  # its ``stopped``: the event that ends its waiting


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[Callable[P, T]], Callable[P, T]]]:
    """What makes work for threads end, at the end of this context, as if the server that it waits for had nothing."""
    stopped = threading.Event()

    def stop_with(work: Callable[P, T]) -> Callable[P, T]:
        def run(*given: P.args, **named: P.kwargs) -> T:
            _thread.stopped = stopped
            return work(*given, **named)

        return run

    try:
        yield stop_with
    finally:
        stopped.set()


def _wait_for(data: "concurrent.futures.Future[bytes]") -> None:
    """Raise RefusedImage when it is to be given up: nobody waits for the result."""
    stopped = getattr(_thread, "stopped", None)
    while stopped is not None and not concurrent.futures.wait([data], timeout=0.2).done:
        if stopped.is_set():
            raise RefusedImage("the run was stopped")


class RemoteFile(io.RawIOBase):
    """One reader of an object; every thread needs its own."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._at = blocks, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to ``offset`` from the start, from here or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blocks.described.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, fewer only at the end; all that follow when negative."""
        end = self._blocks.described.size
        stop = end if size is None or size < 0 else min(end, self._at + size)
        data = self._blocks.read(self._at, stop) if self._at < stop else b""
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        """All that follows."""
        return self.read()

    def readinto(self, buffer: "memoryview[int] | bytearray") -> int:  # type: ignore[override]
        """Fill ``buffer``; returns how many bytes there were."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


_lock = threading.Lock()
_shared: "weakref.WeakValueDictionary[tuple[str, Described, Patience], Blocks]" = weakref.WeakValueDictionary()
_latest: "collections.deque[Blocks]" = collections.deque(maxlen=4)  # not given up between one reader and the next


def open_remote(address: str, described: Described, patience: Patience = PATIENT) -> RemoteFile:
    """A reader of the object at ``address``, of the version ``described`` and no other. Nothing is fetched yet."""
    with _lock:
        blocks = _shared.get(key := (address, described, patience))
        if blocks is None:
            blocks = _shared[key] = Blocks(address, described, patience)
        if blocks not in _latest:
            _latest.append(blocks)
    return RemoteFile(blocks)
