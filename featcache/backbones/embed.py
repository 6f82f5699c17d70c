"""The only embedding loop: read -> hash -> decode -> forward, in parallel, results in order.

In: files and an encoder. Out: an iterator of ``EmbeddedBatch`` in the order of the files. Every forward pass has
exactly the same shape and, on a CPU, runs on one core, so that an image's embedding does not depend on its neighbours, on
the number of workers, or on where an earlier run was interrupted. On a CPU a worker decodes a small batch and computes it;
for a GPU all workers decode into the same large batches (``ring.py``).
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from featcache.backbones.ring import Features, Lane, buffers, feeders, through_ring
from featcache.backbones.self_check import fits_float16
from featcache.errors import UsageError
from featcache.images.decode import Pixels, read_pixels, strict_decoding
from featcache.images.fill import Fill, filler
from featcache.images.formats import Brightest
from featcache.images.gpu_jpeg import Undecoded, gpu_jpegs, pixel_reader, read_for_gpu
from featcache.images.read import ImageFiles, ReadImage, read_image, read_images
from featcache.images.readahead import stoppable
from featcache.spec import PreprocessSpec
from featcache.system.device import Runtime, one_core_each

log = logging.getLogger("featcache")
_FEW = 32  # images to embed again at a time
_MANY = 64  # images of 16 bits that tell what the others will be like
Progress = Callable[[int, int, str], None]  # images done, images to do, the stage that limits


class EmbedsPixels(Protocol):
    """An ``Encoder``, or a stand-in for one: turns images of the size that ``preprocess`` gives into embeddings."""

    preprocess: PreprocessSpec

    @property
    def exact(self) -> "EmbedsPixels | None":
        """The same in float32, for images that overflow; None if there is no such thing."""

    def new_buffer(self, batch_size: int) -> Pixels:
        """Pixels (batch_size, H, W, 3) for a worker to fill."""

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """(N, H, W, 3) -> (N, D)."""


@dataclasses.dataclass(frozen=True)
class EmbeddedBatch:
    """Some consecutive images.

    Attributes:
        indices: (n,) their positions, of those that were embedded, ascending.
        features: (n, D) float32; digests (n, 32) uint8; sizes, mtimes (n,) int64: of the bytes that were decoded.
        refused: position -> reason, of the others.
    """

    indices: npt.NDArray[np.intp]
    features: npt.NDArray[np.float32]
    digests: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    refused: dict[int, str]

    def __len__(self) -> int:
        return len(self.indices) + len(self.refused)


class Timings:
    """Seconds spent per stage, summed over workers: what a progress display calls the bottleneck."""

    def __init__(self) -> None:
        self.seconds = {"decode": 0.0, "forward": 0.0, "disk": 0.0}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] += time.perf_counter() - start

    @property
    def bottleneck(self) -> str:
        """The stage that took the most time."""
        return max(self.seconds, key=lambda stage: self.seconds[stage])


def embed(
    files: ImageFiles,
    encoder: EmbedsPixels,
    runtime: Runtime,
    *,
    timings: Timings | None = None,
    lane: Lane | None = None,
) -> Generator[EmbeddedBatch]:
    """Embed ``files`` on ``runtime.workers`` threads, which call ``encoder`` for ``runtime.batch_size`` at a time, or fill the
    batches of a ``lane`` of its.

    An image that cannot be embedded is reported in its batch's ``refused``; it never ends the run. One that overflows in a
    lower precision is embedded again in float32, which is said at the end. Memory is bounded by workers times batch size, or
    by the ring, whatever the number of files. Closing the iterator early stops the workers.

    Raises:
        UsageError: the memory of a GPU is exhausted.
    """
    job = _Job(files, encoder, runtime, timings or Timings())
    threads = runtime.workers + (feeders(job.complete) if lane else 0)
    with strict_decoding(), one_core_each(threads, "featcache-worker") as pool, stoppable() as stop_with:
        batches = job.by_ring(lane, pool, stop_with) if lane else job.by_worker(pool, stop_with)
        with contextlib.closing(batches):
            for batch in batches:
                yield batch
                job.seen.warn(at_least=_MANY)
        job.seen.warn()
    if job.again:
        first = files.paths[min(job.again)]
        log.info("images that overflowed and were embedded again in float32: %d, %s first", len(job.again), first)


def storable(batch: EmbeddedBatch, dtype: str) -> EmbeddedBatch:
    """``batch`` with those embeddings refused that ``dtype`` cannot hold, instead of storing infinity or zero."""
    if dtype == "float32" or (fits := fits_float16(batch.features)).all():
        return batch
    return _without(batch, ~fits, "its embedding does not fit float16; use --dtype float32")


def _without(batch: EmbeddedBatch, wrong: npt.NDArray[np.bool_], reason: str) -> EmbeddedBatch:
    """``batch`` with its rows that are ``wrong`` (n,) refused."""
    refused = batch.refused | dict.fromkeys(batch.indices[wrong].tolist(), reason)
    kept: dict[str, Any] = {name: column[~wrong] for name, column in vars(batch).items() if name != "refused"}
    return EmbeddedBatch(**kept, refused=refused)


def sample_pixels(
    files: ImageFiles, preprocess: PreprocessSpec, count: int, *, device: torch.device | None = None
) -> Pixels:
    """The first ``count`` images that can be decoded, as uint8 (n, H, W, 3); n may be smaller, even 0.

    ``device``: the CPU when None. Raises UsageError: it cannot decode as ``preprocess`` says. MissingDependencyError.
    """
    reads = read_images(files, range(len(files.paths)), pixel_reader(preprocess, device))
    with contextlib.closing(reads):
        found = list(itertools.islice((read.value for read in reads if read.value is not None), count))
    return np.stack(found) if found else np.empty((0, *preprocess.crop, 3), np.uint8)


class _Job:
    """What the threads of one run share. seen: of 16-bit images. again: positions of those embedded again in float32."""

    def __init__(self, files: ImageFiles, encoder: EmbedsPixels, runtime: Runtime, timings: Timings) -> None:
        self.files, self.encoder, self.runtime, self.timings = files, encoder, runtime, timings
        self.seen, self.again = Brightest(), list[int]()
        self._gpu = gpu_jpegs(encoder.preprocess, runtime.device)
        self._own = threading.local()  # ``pixels``: the buffer of a worker

    def by_worker(self, pool: ThreadPoolExecutor, stop_with: Callable[..., Any]) -> Generator[EmbeddedBatch]:
        """Each worker decodes a batch and computes it."""
        work, pending = stop_with(self._embed_from), deque[Future[EmbeddedBatch]]()
        for start in range(0, len(self.files.paths), self.runtime.batch_size):
            pending.append(pool.submit(work, start))
            if len(pending) >= 2 * self.runtime.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    @property
    def complete(self) -> Callable[[list[ReadImage[Any]], torch.Tensor], list[ReadImage[Any]]] | None:
        """What a GPU that decodes does with a batch."""
        return self._gpu.finish_into if self._gpu else None

    def by_ring(self, lane: Lane, pool: ThreadPoolExecutor, stop_with: Callable[..., Any]) -> Generator[EmbeddedBatch]:
        """Workers decode, into batches that one or a few more threads give to ``lane``."""
        idle = functools.partial(self.timings.measure, "forward")  # a worker without a buffer waits for the GPU
        options: dict[str, Any] = {"workers": self.runtime.workers, "idle": idle, "complete": self.complete}
        shape = (buffers(self.complete), lane.batch_size, *self.encoder.preprocess.crop, 3)
        count = len(self.files.paths)
        fill, memory = filler(self.files, self.encoder.preprocess, self.seen, workers=self.runtime.workers, shape=shape)
        work = stop_with(functools.partial(self._fill, fill))
        with lane.pinned(memory) if memory is not None else contextlib.nullcontext():
            try:
                own = None if memory is None else list(memory)
                yield from through_ring(count, work, self._finish, lane, pool, own=own, **options)
            except torch.OutOfMemoryError as error:  # it did fit at the start: another program has taken memory since
                raise UsageError(
                    f"a batch of {lane.batch_size} no longer fits into the GPU's memory; run the command again with "
                    f"--batch-size {max(1, lane.batch_size // 2)}"
                ) from error

    def _embed_from(self, start: int) -> EmbeddedBatch:
        """Embed the images from ``start`` on, by way of a buffer of this worker's own."""
        size = self.runtime.batch_size
        if not hasattr(self._own, "pixels"):
            self._own.pixels = self.encoder.new_buffer(size)
        pixels: Pixels = self._own.pixels
        reads, kept = list[ReadImage[Any]](), 0
        with self.timings.measure("decode"):
            for index in range(start, min(start + size, len(self.files.paths))):
                reads.append(self._read(index, pixels[kept]))
                kept += reads[-1].value is not None
            if self._gpu:
                reads = self._gpu.finish(reads)
                for kept, value in enumerate((read.value for read in reads if read.value is not None), 1):
                    pixels[kept - 1] = value
        with self.timings.measure("forward"):
            # The whole buffer, always: unused rows cost little and keep the shape, and so every bit, the same.
            features = self.encoder(pixels)[:kept] if kept else np.empty((0, 0), np.float32)
            return self._batch(reads, features, size)

    def _fill(self, fill: Fill, images: range, rows: Pixels) -> list[ReadImage[Any]]:
        with self.timings.measure("decode"):
            return fill(images, rows)

    def _finish(self, reads: Sequence[ReadImage[Any]], features: Features) -> EmbeddedBatch:
        kept: slice | list[int] = slice(len(reads))
        if any(read.value is None for read in reads):
            kept = [row for row, read in enumerate(reads) if read.value is not None]
        return self._batch(reads, features[kept], min(_FEW, len(features)))

    def _read(self, index: int, row: Pixels) -> ReadImage[Pixels]:
        """Decode one image into ``row`` (H, W, 3), which is then its value, or leave it to the GPU."""
        read: ReadImage[Any] = read_image(self.files, index, self._decode)
        if read.value is None or isinstance(read.value, Undecoded):
            return read
        row[:] = read.value
        return read._replace(value=row)

    def _decode(self, data: bytes) -> Pixels | Undecoded:
        return (read_for_gpu if self._gpu else read_pixels)(data, self.encoder.preprocess, seen=self.seen)

    def _batch(self, reads: Sequence[ReadImage[Any]], features: Features, few: int) -> EmbeddedBatch:
        """What became of ``reads``; features (n, D) are of those n that were decoded, ``few`` is for ``_in_float32``."""
        kept = [read for read in reads if read.value is not None]
        finite = np.asarray(np.isfinite(features).all(axis=1))
        if not finite.all() and self.encoder.exact:
            wrong = [read for read, fine in zip(kept, finite, strict=True) if not fine]
            pixels = [read.value for read in (self._gpu.finish(wrong) if self._gpu else wrong)]
            features[~finite] = _in_float32(self.encoder.exact, np.stack(pixels), few)  # type: ignore[arg-type] # all were decoded
            self.again += [read.position for read in wrong]
            finite = np.asarray(np.isfinite(features).all(axis=1))
        batch = EmbeddedBatch(
            indices=np.array([read.position for read in kept], np.intp),
            features=features,
            digests=np.frombuffer(b"".join(read.digest for read in kept), np.uint8).reshape(-1, 32),
            sizes=np.array([read.size for read in kept], np.int64),
            mtimes=np.array([read.mtime for read in kept], np.int64),
            refused={read.position: read.reason for read in reads if read.value is None},
        )
        return batch if finite.all() else _without(batch, ~finite, "its embedding is not finite")


def _in_float32(exact: EmbedsPixels, pixels: Pixels, size: int) -> Features:
    """Embed the few images (n, H, W, 3) that overflow, ``size`` at a time, always exactly so many."""
    found = []
    for start in range(0, len(pixels), size):
        some = pixels[start : start + size]
        whole = np.zeros((size, *pixels.shape[1:]), np.uint8)
        whole[: len(some)] = some
        found.append(exact(whole)[: len(some)])
    return np.concatenate(found)
