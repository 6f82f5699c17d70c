"""The only embedding loop: read -> hash -> decode -> forward, in parallel, results in order.

In: an ``ImageList`` and an encoder. Out: an iterator of ``Chunk`` in the order of the list. Every forward pass has
exactly the same shape and, on a CPU, runs on one core, so that an image's embedding does not depend on its neighbours, on
the number of workers, or on where an earlier run was interrupted.
"""

import contextlib
import dataclasses
import hashlib
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featcache.backbones.self_check import fits_float16
from featcache.images.decode import Pixels, read_pixels, strict_decoding
from featcache.images.read import read_image
from featcache.images.refusal import RefusedImage
from featcache.images.source import ImageList
from featcache.spec import PreprocessSpec
from featcache.system.device import Runtime, one_core_each


class EmbedsPixels(Protocol):
    """An ``Encoder``, or a stand-in for one: turns images of the size ``preprocess`` gives into embeddings."""

    preprocess: PreprocessSpec

    def new_buffer(self, batch_size: int) -> Pixels:
        """Pixels (batch_size, H, W, 3) for a worker to fill."""

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """(N, H, W, 3) -> (N, D)."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some consecutive images of the list.

    Attributes:
        indices: (n,) positions in the list that were embedded, ascending.
        features: (n, D) float32; digests (n, 32) uint8; sizes, mtimes (n,) int64: of the bytes that were decoded.
        refused: (position, reason) of the others.
    """

    indices: npt.NDArray[np.intp]
    features: npt.NDArray[np.float32]
    digests: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    refused: tuple[tuple[int, str], ...]


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
    images: ImageList, encoder: EmbedsPixels, runtime: Runtime, *, timings: Timings | None = None
) -> Generator[Chunk]:
    """Embed ``images``, ``runtime.batch_size`` at a time, on ``runtime.workers`` threads.

    An image that cannot be embedded is reported in its chunk's ``refused``; it never ends the run. Memory is bounded by
    workers times batch size, whatever the length of the list. Closing the iterator early stops the workers.
    """
    job = _Job(images, encoder, runtime, timings or Timings())
    starts = iter(range(0, len(images), runtime.batch_size))
    pending: deque[Future[Chunk]] = deque()
    with strict_decoding(), one_core_each(runtime.workers, "featcache-worker") as pool:
        for start in starts:
            pending.append(pool.submit(job.run, start))
            if len(pending) >= 2 * runtime.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def storable(chunk: Chunk, dtype: str) -> Chunk:
    """``chunk`` with those embeddings refused that ``dtype`` cannot hold, instead of storing infinity or zero."""
    if dtype == "float32" or (fits := fits_float16(chunk.features)).all():
        return chunk
    reason = "its embedding does not fit float16; use --dtype float32"
    columns = ("indices", "features", "digests", "sizes", "mtimes")
    refused = [*chunk.refused, *((int(index), reason) for index in chunk.indices[~fits])]
    kept: dict[str, Any] = {name: getattr(chunk, name)[fits] for name in columns}
    return dataclasses.replace(chunk, **kept, refused=tuple(sorted(refused)))


def sample_pixels(images: ImageList, preprocess: PreprocessSpec, count: int) -> npt.NDArray[np.uint8]:
    """The first ``count`` images that can be decoded, as uint8 (n, H, W, 3); n may be smaller, even 0."""
    found: list[npt.NDArray[np.uint8]] = []
    with strict_decoding():
        for path in images.paths:
            with contextlib.suppress(RefusedImage):
                found.append(read_pixels(read_image(images.root / path)[0], preprocess))
            if len(found) == count:
                break
    return np.stack(found) if found else np.empty((0, *preprocess.crop, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class _Job:
    images: ImageList
    encoder: EmbedsPixels
    runtime: Runtime
    timings: Timings
    _local: threading.local = dataclasses.field(default_factory=threading.local)

    def run(self, start: int) -> Chunk:
        """Embed the images from ``start`` on. Runs on a worker thread."""
        indices = range(start, min(start + self.runtime.batch_size, len(self.images)))
        pixels = self._buffer()
        kept: list[int] = []
        digests: list[bytes] = []
        stats: list[tuple[int, int]] = []
        refused: list[tuple[int, str]] = []
        with self.timings.measure("decode"):
            for index in indices:
                try:
                    data, size, mtime = read_image(self.images.root / self.images.paths[index])
                    pixels[len(kept)] = read_pixels(data, self.encoder.preprocess)
                except RefusedImage as reason:
                    refused.append((index, str(reason)))
                    continue
                kept.append(index)
                digests.append(hashlib.sha256(data).digest())
                stats.append((size, mtime))
        with self.timings.measure("forward"):
            # The whole buffer, always: unused rows cost little and keep the shape, and so every bit, the same.
            features = self.encoder(pixels)[: len(kept)] if kept else np.empty((0, 0), np.float32)
        finite = np.isfinite(features).all(axis=1)
        refused += [(kept[row], "its embedding is not finite") for row in np.flatnonzero(~finite)]
        return Chunk(
            indices=np.array(kept, np.intp)[finite],
            features=features[finite],
            digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)[finite],
            sizes=np.array([size for size, _ in stats], np.int64)[finite],
            mtimes=np.array([mtime for _, mtime in stats], np.int64)[finite],
            refused=tuple(sorted(refused)),
        )

    def _buffer(self) -> npt.NDArray[np.uint8]:
        if not hasattr(self._local, "pixels"):
            self._local.pixels = self.encoder.new_buffer(self.runtime.batch_size)
        return self._local.pixels  # type: ignore[no-any-return]
