"""Read and decode images into rows of a buffer: what fills the batches of a GPU, by threads or by processes beside this one.

In: ``ImageFiles``, how pixels are made of a file, rows. Out: a ``ReadImage`` per row, whose value lies in it if there is room: pixels,
or the bytes of a file that a GPU decodes. Threads spend most of the time of a row where others run, but not all: on a machine with 16 cores
8 of them decode 2,900 images a second, 16 of them 2,000, and 16 processes 9,300 (benchmarks/LOG.md).
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import RefusedImage
from featcache.images.decode import Pixels, crashed, fast_jpeg, read_pixels, refusing_errors, strict_decoding
from featcache.images.formats import Brightest
from featcache.images.gpu_jpeg import Undecoded, read_for_gpu
from featcache.images.read import ImageFiles, ReadImage, content, path_of, read_file, read_image
from featcache.images.readahead import stoppable
from featcache.spec import PreprocessSpec
from featcache.system.runtime_options import usable_cores
from featcache.system.worker_processes import (
    SharedMemory,
    WorkerCrashed,
    WorkerProcesses,
    WorkersLost,
    worker_processes,
)

log = logging.getLogger("featcache")
_FEWEST_IMAGES, _FEWEST_CORES = 4096, 6  # that are worth the seconds in which processes start
_AT_ONCE = 8  # images for which a process is asked
_MOST_THREADS = 8  # that decode at a time: more of them only wait for each other
_PIXELS, _UNDECODED, _REFUSED, _ELSEWHERE, _LARGER = range(5)
# Of a file's bytes; ``seen`` is told of 16-bit images. Raises RefusedImage.
Decode = Callable[..., "Pixels | Undecoded"]


def decoder(spec: PreprocessSpec) -> Decode:
    """What makes of a file the network's input, or leaves it to a GPU."""
    return functools.partial(read_for_gpu if spec.decode == "gpu" else read_pixels, spec=spec)


class Fill:
    """Fills rows from any thread.

    Attributes:
        seen: is told of 16-bit images.
    """

    def __init__(self, files: ImageFiles, decode: Decode, seen: Brightest, *, threads: int = _MOST_THREADS) -> None:
        """``threads``: that decode at a time; others wait."""
        self._files, self._decode, self.seen = files, decode, seen
        self._convert = functools.partial(decode, seen=seen)
        self._threads = threading.Semaphore(threads)

    def __call__(self, images: range, rows: Sequence[Pixels] | Pixels) -> list[ReadImage[Any]]:
        """What became of ``images``, each of which is for one of ``rows``, (H, W, 3) or so many bytes."""
        with self._threads:
            return [self._fill(image, row) for image, row in zip(images, rows, strict=True)]

    def _fill(self, image: int, row: Pixels) -> ReadImage[Any]:
        read: ReadImage[Any] = read_image(self._files, image, self._convert)
        return read if read.value is None else read._replace(value=_put(read.value, row))


class FillByProcesses(Fill):
    """The same by worker processes, as soon as there are any; ``memory`` holds all rows."""

    def __init__(
        self,
        files: ImageFiles,
        decode: Decode,
        seen: Brightest,
        *,
        processes: WorkerProcesses,
        memory: SharedMemory,
    ) -> None:
        super().__init__(files, decode, seen)
        self._processes, self._memory = processes, memory
        self._elsewhere = False  # whether images are in archives and such, which this process reads
        self._lost = threading.Lock()  # taken by who says it

    def __call__(self, images: range, rows: Sequence[Pixels] | Pixels) -> list[ReadImage[Any]]:
        """As ``Fill``."""
        while self._processes.ready:
            try:
                return self._by_process(images, rows)
            except WorkersLost:
                if self._lost.acquire(blocking=False):
                    log.warning("the processes that decode were killed, perhaps for want of memory: threads go on")
        return super().__call__(images, rows)

    def _by_process(self, images: range, rows: Sequence[Pixels] | Pixels) -> list[ReadImage[Any]]:
        asked = [self._asked(image) for image in images]
        where = [self._memory.offset(row) for row in rows]
        try:
            found, samples = self._processes.call(__name__, self._memory, (self._decode, rows[0].size, asked, where))
        except WorkerCrashed as crash:
            if len(images) > 1:  # which one was it?
                return [
                    read for k in range(len(images)) for read in self._by_process(images[k : k + 1], rows[k : k + 1])
                ]
            found, samples = [(_REFUSED, crashed(crash.number), b"", -1, -1)], []
        for sample in samples:
            self.seen.see(sample)
        return [self._read(image, row, *answer) for image, row, answer in zip(images, rows, found, strict=True)]

    def _asked(self, image: int) -> Any:
        """A file's path; or (bytes, size, mtime), or why there are none, where it is in no file."""
        try:
            path = None if self._elsewhere else path_of(self._files, image)
            return content(self._files, image) if path is None else path
        except RefusedImage as reason:
            return reason

    def _read(
        self, image: int, row: Pixels, kind: int, value: Any, digest: bytes, size: int, mtime: int
    ) -> ReadImage[Any]:
        if kind == _ELSEWHERE:
            read = self._fill(image, row)
            self._elsewhere = self._elsewhere or read.value is not None
            return read
        if kind == _LARGER:  # than its row: hundreds of kilobytes are sooner decoded once more than sent
            return self._fill(image, row)
        if kind == _REFUSED:
            return ReadImage(image, None, value, digest, size, mtime)
        if kind == _UNDECODED:
            data, pixels = value
            value = Undecoded(row.reshape(-1)[:data] if isinstance(data, int) else data, pixels)
        else:
            value = row if value == row.shape else row.reshape(-1)[: math.prod(value)].reshape(value)
        return ReadImage(image, value, "", digest, size, mtime)


def _put(value: Pixels | Undecoded, row: Pixels) -> Pixels | Undecoded:
    """``value`` in its row; what is larger than that as it is."""
    data = np.frombuffer(value.data, np.uint8) if isinstance(value, Undecoded) else value
    if data.size > row.size:
        return value
    place = row if data.shape == row.shape else row.reshape(-1)[: data.size].reshape(data.shape)
    place[:] = data
    return value._replace(data=place) if isinstance(value, Undecoded) else place


def filler(
    files: ImageFiles, spec: PreprocessSpec, seen: Brightest, *, workers: int, shape: tuple[int, ...]
) -> tuple[Fill, npt.NDArray[np.uint8] | None]:
    """What fills rows for a GPU, and the memory, of such a ``shape``, in which these are to lie; None: in any.

    ``workers``: that decode at a time.
    """
    if (processes := start_decoding(workers, len(files.paths))) is None:
        return Fill(files, decoder(spec), seen), None
    memory = SharedMemory(math.prod(shape))
    return FillByProcesses(files, decoder(spec), seen, processes=processes, memory=memory), memory.array.reshape(shape)


def fill_memory(
    files: ImageFiles,
    decode: Decode,
    *,
    processes: WorkerProcesses,
    memory: SharedMemory,
    room: int,
    workers: int,
) -> Generator[ReadImage[Any]]:
    """As ``read_images`` of all ``files``, by ``processes``, until they are ready by threads; each value in ``room`` bytes of ``memory``.

    What takes more lies anywhere. ``decode``: a module's, which can be sent. ``memory``: with room for all. Closing it early stops
    the threads.
    """
    fill, pending = FillByProcesses(files, decode, Brightest(), processes=processes, memory=memory), deque[Any]()
    with strict_decoding(), ThreadPoolExecutor(workers, "featcache-read") as pool, stoppable() as stop_with:
        work = stop_with(fill)
        for start in range(0, len(files.paths), _AT_ONCE):
            images = range(start, min(start + _AT_ONCE, len(files.paths)))
            rows = [row for _ in images if (row := memory.take(room)) is not None]
            assert len(rows) == len(images), "the memory has room for all"
            pending.append(pool.submit(work, images, rows))
            if len(pending) >= 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def start_decoding(workers: int, images: int) -> WorkerProcesses | None:
    """Let processes start that ``filler`` will want: whoever knows so seconds before need not wait. None: threads are as fast."""
    pays = images >= _FEWEST_IMAGES and min(workers, usable_cores()) >= _FEWEST_CORES
    return worker_processes(workers, __name__) if pays else None


# -------------------------------------------------------------------------------------- in another process


class _Samples(Brightest):
    """Largest samples of 16-bit images, one by one, for the other side's ``Brightest``."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[int] = []

    def see(self, sample: int) -> None:
        """One more."""
        self.all.append(sample)


def prepare() -> None:
    """Load what decoding takes, before processes are forked."""
    import torch

    torch.set_num_threads(1)
    fast_jpeg()
    contextlib.ExitStack().enter_context(strict_decoding())


def work(memory: npt.NDArray[np.uint8], task: Any) -> Any:
    """Fill rows; what ``FillByProcesses`` asks for, and reads."""
    decode, room, asked, where = task
    rows, samples = (memory[start : start + room] for start in where), _Samples()
    return [_fill(each, row, decode, samples) for each, row in zip(asked, rows, strict=True)], samples.all


def _fill(asked: Any, row: Pixels, decode: Decode, samples: _Samples) -> tuple[Any, ...]:
    digest, size, mtime = b"", -1, -1
    try:
        if isinstance(asked, str) and not os.path.lexists(asked):
            return _ELSEWHERE, None, digest, size, mtime
        if isinstance(asked, RefusedImage):
            raise asked
        data, size, mtime = read_file(asked) if isinstance(asked, str) else asked
        digest = hashlib.sha256(data).digest()
        with refusing_errors():
            value = _put(decode(data, seen=samples), row)
        if isinstance(value, Undecoded):  # in the row, or not
            there = len(value.data) if isinstance(value.data, np.ndarray) else value.data
            return _UNDECODED, (there, value.pixels), digest, size, mtime
        if value.size > row.size:
            return _LARGER, None, digest, size, mtime
        return _PIXELS, value.shape, digest, size, mtime
    except RefusedImage as reason:
        return _REFUSED, str(reason), digest, size, mtime
