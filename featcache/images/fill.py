"""Read and decode images into rows of a buffer: what fills the batches of a GPU, by threads or by processes beside this one.

In: ``ImageFiles``, how pixels are made of a file, rows. Out: a ``ReadImage`` per row, whose value lies in it: pixels, or the bytes
of a file that a GPU decodes. Threads spend most of the time of a row where others run, but not all: on a machine with 16 cores
8 of them decode 2,900 images a second, 16 of them 2,000, and 16 processes 9,300 (benchmarks/LOG.md).
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import RefusedImage
from featcache.images.decode import Pixels, crashed, fast_jpeg, read_pixels, refusing_errors, strict_decoding
from featcache.images.formats import Brightest
from featcache.images.gpu_jpeg import Undecoded, read_for_gpu
from featcache.images.read import ImageFiles, ReadImage, content, path_of, read_file, read_image
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
_MOST_THREADS = 8  # that decode at a time: more of them only wait for each other
_PIXELS, _UNDECODED, _REFUSED, _ELSEWHERE = range(4)


class Fill:
    """Fills rows from any thread.

    Attributes:
        seen: is told of 16-bit images.
    """

    def __init__(
        self, files: ImageFiles, spec: PreprocessSpec, seen: Brightest, *, threads: int = _MOST_THREADS
    ) -> None:
        """``threads``: that decode at a time; others wait."""
        self._files, self._spec, self.seen = files, spec, seen
        self._decode = functools.partial(read_for_gpu if spec.decode == "gpu" else read_pixels, spec=spec, seen=seen)
        self._threads = threading.Semaphore(threads)

    def __call__(self, images: range, rows: Pixels) -> list[ReadImage[Any]]:
        """What became of ``images``, each of which is for one of ``rows`` (n, H, W, 3)."""
        with self._threads:
            return [self._fill(image, row) for image, row in zip(images, rows, strict=True)]

    def _fill(self, image: int, row: Pixels) -> ReadImage[Any]:
        read: ReadImage[Any] = read_image(self._files, image, self._decode)
        return read if read.value is None else read._replace(value=_put(read.value, row))


class FillByProcesses(Fill):
    """The same by worker processes, as soon as there are any; ``memory`` holds all rows."""

    def __init__(
        self,
        files: ImageFiles,
        spec: PreprocessSpec,
        seen: Brightest,
        *,
        processes: WorkerProcesses,
        memory: SharedMemory,
    ) -> None:
        super().__init__(files, spec, seen)
        self._processes, self._memory = processes, memory
        self._elsewhere = False  # whether images are in archives and such, which this process reads
        self._lost = threading.Lock()  # taken by who says it

    def __call__(self, images: range, rows: Pixels) -> list[ReadImage[Any]]:
        """As ``Fill``."""
        while self._processes.ready:
            try:
                return self._by_process(images, rows)
            except WorkersLost:
                if self._lost.acquire(blocking=False):
                    log.warning("the processes that decode were killed, perhaps for want of memory: threads go on")
        return super().__call__(images, rows)

    def _by_process(self, images: range, rows: Pixels) -> list[ReadImage[Any]]:
        asked = [self._asked(image) for image in images]
        where = [self._memory.offset(row) for row in rows]
        try:
            found, samples = self._processes.call(__name__, self._memory, (self._spec, asked, where))
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
        if kind == _REFUSED:
            return ReadImage(image, None, value, digest, size, mtime)
        if kind == _UNDECODED:
            data, pixels = value
            value = Undecoded(row.reshape(-1)[:data] if isinstance(data, int) else data, pixels)
        return ReadImage(image, row if kind == _PIXELS else value, "", digest, size, mtime)


def _put(value: Pixels | Undecoded, row: Pixels) -> Pixels | Undecoded:
    """``value`` in its row; a file that is larger than that as it is."""
    if not isinstance(value, Undecoded):
        row[:] = value
        return row
    data = np.frombuffer(value.data, np.uint8)
    if data.size > row.size:
        return value
    place = row.reshape(-1)[: data.size]
    place[:] = data
    return value._replace(data=place)


def filler(
    files: ImageFiles, spec: PreprocessSpec, seen: Brightest, *, workers: int, shape: tuple[int, ...]
) -> tuple[Fill, npt.NDArray[np.uint8] | None]:
    """What fills rows for a GPU, and the memory, of such a ``shape``, in which these are to lie; None: in any.

    ``workers``: that decode at a time.
    """
    if (processes := start_decoding(workers, len(files.paths))) is None:
        return Fill(files, spec, seen), None
    memory = SharedMemory(math.prod(shape))
    return FillByProcesses(files, spec, seen, processes=processes, memory=memory), memory.array.reshape(shape)


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
    spec, asked, where = task
    height, width = spec.crop
    rows = (memory[start : start + height * width * 3].reshape(height, width, 3) for start in where)
    samples = _Samples()
    return [_fill(each, row, spec, samples) for each, row in zip(asked, rows, strict=True)], samples.all


def _fill(asked: Any, row: Pixels, spec: PreprocessSpec, samples: _Samples) -> tuple[Any, ...]:
    digest, size, mtime = b"", -1, -1
    try:
        if isinstance(asked, str) and not os.path.lexists(asked):
            return _ELSEWHERE, None, digest, size, mtime
        if isinstance(asked, RefusedImage):
            raise asked
        data, size, mtime = read_file(asked) if isinstance(asked, str) else asked
        digest = hashlib.sha256(data).digest()
        decode: Callable[..., Pixels | Undecoded] = read_for_gpu if spec.decode == "gpu" else read_pixels
        with refusing_errors():
            value = _put(decode(data, spec, seen=samples), row)
        if isinstance(value, Undecoded):  # in the row, or not
            there = len(value.data) if isinstance(value.data, np.ndarray) else value.data
            return _UNDECODED, (there, value.pixels), digest, size, mtime
        return _PIXELS, None, digest, size, mtime
    except RefusedImage as reason:
        return _REFUSED, str(reason), digest, size, mtime
