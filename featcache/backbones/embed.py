"""The only embedding loop: read -> hash -> decode -> forward, in parallel, results in order.

In: files and an encoder. Out: an iterator of ``EmbeddedBatch`` in the order of the files. Every forward pass has
exactly the same shape and, on a CPU, runs on one core, so that an image's embedding does not depend on its neighbours, on
the number of workers, or on where an earlier run was interrupted.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from featcache.backbones.self_check import fits_float16
from featcache.images.decode import Pixels, read_pixels, strict_decoding
from featcache.images.formats import Brightest
from featcache.images.gpu_jpeg import GpuJpegs, gpu_jpegs, pixel_reader, read_for_gpu
from featcache.images.read import ImageFiles, ReadImage, read_image, read_images
from featcache.images.readahead import stoppable
from featcache.spec import PreprocessSpec
from featcache.system.device import Runtime, one_core_each

log = logging.getLogger("featcache")
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
    files: ImageFiles, encoder: EmbedsPixels, runtime: Runtime, *, timings: Timings | None = None
) -> Generator[EmbeddedBatch]:
    """Embed ``files``, ``runtime.batch_size`` at a time, on ``runtime.workers`` threads.

    An image that cannot be embedded is reported in its batch's ``refused``; it never ends the run. One that overflows in a
    lower precision is embedded again in float32, which is said at the end. Memory is bounded by workers times batch size,
    whatever the number of files. Closing the iterator early stops the workers.
    """
    seen, again = Brightest(), list[int]()
    gpu = gpu_jpegs(encoder.preprocess, runtime.device)
    work = functools.partial(
        _embed_from, files, encoder, gpu, runtime, timings or Timings(), threading.local(), seen, again
    )
    pending: deque[Future[EmbeddedBatch]] = deque()
    with strict_decoding(), one_core_each(runtime.workers, "featcache-worker") as pool, stoppable() as stop_with:
        work_until = stop_with(work)
        for start in range(0, len(files.paths), runtime.batch_size):
            pending.append(pool.submit(work_until, start))
            if len(pending) >= 2 * runtime.workers:
                yield pending.popleft().result()
                seen.warn(at_least=_MANY)
        while pending:
            yield pending.popleft().result()
        seen.warn()
    if again:
        first = files.paths[min(again)]
        log.info("images that overflowed and were embedded again in float32: %d, %s first", len(again), first)


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


def _embed_from(
    files: ImageFiles,
    encoder: EmbedsPixels,
    gpu: GpuJpegs | None,
    runtime: Runtime,
    timings: Timings,
    own: threading.local,
    seen: Brightest,
    again: list[int],
    start: int,
) -> EmbeddedBatch:
    """Embed the images from ``start`` on, by way of a buffer of this worker's ``own``; note which were computed ``again``."""
    if not hasattr(own, "pixels"):
        own.pixels = encoder.new_buffer(runtime.batch_size)
    pixels: Pixels = own.pixels
    kept: list[ReadImage[Pixels]] = []
    refused: dict[int, str] = {}
    convert = functools.partial(read_for_gpu if gpu else read_pixels, spec=encoder.preprocess, seen=seen)
    indices = range(start, min(start + runtime.batch_size, len(files.paths)))
    reads: Iterable[ReadImage[Any]] = (read_image(files, index, convert) for index in indices)
    with timings.measure("decode"):
        for read in gpu.finish(reads) if gpu else reads:
            if read.value is None:
                refused[read.position] = read.reason
            else:
                pixels[len(kept)] = read.value
                kept.append(read._replace(value=None))
    with timings.measure("forward"):
        # The whole buffer, always: unused rows cost little and keep the shape, and so every bit, the same.
        features = encoder(pixels)[: len(kept)] if kept else np.empty((0, 0), np.float32)
        wrong = np.asarray(~np.isfinite(features).all(axis=1))
        if wrong.any() and encoder.exact:
            features[wrong] = encoder.exact(pixels)[: len(kept)][wrong]
            again.extend(read.position for read, row in zip(kept, wrong, strict=True) if row)
    batch = EmbeddedBatch(
        indices=np.array([read.position for read in kept], np.intp),
        features=features,
        digests=np.frombuffer(b"".join(read.digest for read in kept), np.uint8).reshape(-1, 32),
        sizes=np.array([read.size for read in kept], np.int64),
        mtimes=np.array([read.mtime for read in kept], np.int64),
        refused=refused,
    )
    return _without(batch, np.asarray(~np.isfinite(features).all(axis=1)), "its embedding is not finite")
