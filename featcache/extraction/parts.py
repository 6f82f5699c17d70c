"""Finished work of a running extraction: small complete caches in ``features.h5.parts/``, published one by one.

In: embedded rows as they come. Out: files that survive any interruption, until the final cache is packed from them.
"""

import contextlib
import dataclasses
import logging
import secrets
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Indices, Provenance, Rows, encode_names, find
from featcache.cache.write import write_cache
from featcache.errors import CacheError, NewerCacheError, Refusal
from featcache.images.read import ImageFiles
from featcache.spec import Spec
from featcache.system.display import quantity
from featcache.system.workdir import LISTING

if TYPE_CHECKING:
    from featcache.backbones.embed import EmbeddedBatch, Progress, Timings
    from featcache.backbones.embedder import Embedder

log = logging.getLogger("featcache")
_PARTS = "[0-9]*.h5"  # named after the time; what is called otherwise is not ours
MAX_ROWS = 4096
MEAN_COSINE = 0.9995  # as in ``backbones.self_check``
MAX_SECONDS = 15.0  # what an interruption can cost at most, plus the images in flight


def open_parts(folder: Path, *, tag: str | None = None, shared: bool = False) -> list[FeatureCache]:
    """Open every intact part. One that is no part is removed: its images are embedded again. Raises CacheError.

    Args:
        folder: where they are. tag: those of this tag and those without one; all when None.
        shared: others write there, too: what is no part is left to whoever has the folder alone.
    """
    parts = []
    for path in sorted(folder.glob(_PARTS)):
        if tag is not None and tag_of(path) not in ("", tag):
            continue
        try:
            part = FeatureCache.open(path)
            part.check_features()
            parts.append(part)
        except CacheError as error:
            if isinstance(error, NewerCacheError) or isinstance(error.__cause__, OSError | MemoryError):
                raise  # the part may well be intact
            reason = (
                str(error).removeprefix(f"{path} ").partition("; ")[0]
            )  # what to do about a cache is of no use here
            log.warning("part %s is damaged and will be made again (it %s)", path.name, reason)
            if not shared:
                path.unlink(missing_ok=True)
    return parts


def remove_parts(folder: Path) -> None:
    """Delete what the packed cache has made superfluous: the listing first, parts, and temporary files of a run that died."""
    for pattern in (LISTING, _PARTS, "listing-*.h5", "weights-*.safetensors", ".*.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def part_name(tag: str) -> str:
    """A name that no other part has, on whatever machine it is made. Of time and ``tag`` nothing hangs on the time."""
    return f"{time.time_ns():020d}-{secrets.token_hex(4)}{'.' if tag else ''}{tag}.h5"


def tag_of(path: Path) -> str:
    """The tag in a part's name: ``3of7`` of what was made for share 3 of 7; empty without one."""
    return path.name.removesuffix(".h5").partition(".")[2]


def check_agreement(parts: list[FeatureCache], *, contents: bool = False) -> None:
    """Compare images that are in several of ``parts``, by path; the first of them counts.

    Raises CacheError where one content has two embeddings, unless they were made on machines of two kinds and agree as the
    self-check has it; with ``contents`` also where one path has two contents, which only the source can decide.
    """
    paths = np.concatenate([np.empty(0, "S1"), *(part.rows.paths for part in parts)])
    first = find(paths, paths)
    again = np.flatnonzero(first != np.arange(len(paths)))
    if not len(again):
        return
    starts = np.cumsum([0, *map(len, parts)])
    one, two = (np.searchsorted(starts, rows, side="right") - 1 for rows in (first[again], again))
    pairs, which = np.unique(one * len(parts) + two, return_inverse=True)  # of parts
    order, rounded = np.argsort(which, kind="stable"), 0
    for pair, here in zip(pairs.tolist(), np.split(order, np.cumsum(np.bincount(which))[:-1]), strict=True):
        a, b = parts[pair // len(parts)], parts[pair % len(parts)]
        rows_a = first[again[here]] - starts[pair // len(parts)]
        rows_b = again[here] - starts[pair % len(parts)]
        same = (a.rows.digests[rows_a] == b.rows.digests[rows_b]).all(axis=1)
        if contents and not same.all():
            raise _disagreement(
                a, b, rows_a[~same][0], "its file changed in between; `featcache extract SOURCE` decides by it"
            )
        rounded += _compare(a, b, rows_a[same], rows_b[same])
    if rounded:
        log.warning(
            "%s embedded on machines of several kinds, with roundings of their own; the first part by name counts",
            quantity(rounded, "image was", "images were"),
        )


def _compare(a: FeatureCache, b: FeatureCache, rows_a: Indices, rows_b: Indices) -> int:
    """How many rows differ by roundings of other machines. Raises CacheError: by more."""
    found = 0
    for start in range(0, len(rows_a), MAX_ROWS):
        block = rows_a[start : start + MAX_ROWS]
        x, y = a.take(block), b.take(rows_b[start : start + MAX_ROWS])
        differ = (x.view(np.uint8) != y.view(np.uint8)).any(axis=1)
        if not differ.any():
            continue
        x, y = x[differ].astype(np.float64), y[differ].astype(np.float64)
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        near = (x * y).sum(axis=1) >= MEAN_COSINE * norms
        if a.provenance.rest.get("kind") == b.provenance.rest.get("kind") or not near.all():
            row = block[differ][int(near.argmin())]
            raise _disagreement(a, b, row, "one of them is wrong; remove both, and make them again")
        found += len(x)
    return found


def _disagreement(a: FeatureCache, b: FeatureCache, row: int, what: str) -> CacheError:
    return CacheError(f"{a.paths[row]} is in {a.path} and in {b.path.name} with another embedding: {what}")


class PartWriter:
    """Collects embedded rows, and refusals, and publishes them as a part when there are enough, or when it has been long enough."""

    def __init__(
        self, folder: Path, files: ImageFiles, *, dim: int, spec: Spec, provenance: Provenance, tag: str
    ) -> None:
        self._folder, self._files, self._dim, self._spec = folder, files, dim, spec
        self._provenance, self._tag = provenance, tag
        self._pending: list[EmbeddedBatch] = []
        self._images = 0
        self._since = time.monotonic()
        self.written: list[FeatureCache] = []

    def add(self, batch: "EmbeddedBatch") -> None:
        """Take a batch. Raises StorageError when publishing fails."""
        self._pending.append(batch)
        self._images += len(batch)
        if self._images >= MAX_ROWS or time.monotonic() - self._since > MAX_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Publish what has been collected. Raises StorageError."""
        if self._images:
            batches = [batch for batch in self._pending if len(batch.indices)]
            refused = {position: why for batch in self._pending for position, why in batch.refused.items()}
            n = sum(len(batch.indices) for batch in batches)
            rows = Rows(
                paths=encode_names(self._files.paths[index] for batch in batches for index in batch.indices),
                labels=np.full(n, -1, np.int32),
                splits=np.zeros(n, np.uint8),
                digests=np.concatenate([np.empty((0, 32), np.uint8), *(batch.digests for batch in batches)]),
                sizes=np.concatenate([np.empty(0, np.int64), *(batch.sizes for batch in batches)]),
                mtimes=np.concatenate([np.empty(0, np.int64), *(batch.mtimes for batch in batches)]),
            )
            path = self._folder / part_name(self._tag)
            write_cache(
                path,
                rows,
                [batch.features for batch in batches],
                dim=self._dim,
                spec=self._spec,
                refused=[Refusal(self._files.paths[position], why) for position, why in refused.items()],
                provenance=self._provenance,
            )
            self.written.append(FeatureCache.open(path))
        self._pending, self._images, self._since = [], 0, time.monotonic()


class _WritesBeside:
    """Has a ``PartWriter`` write on a thread of its own: whoever computes goes on while a disk takes its time."""

    def __init__(self, writer: PartWriter, timings: "Timings") -> None:
        self._writer, self._timings = writer, timings
        self._pool = ThreadPoolExecutor(1, "featcache-parts")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._images, self._failed = 0, False

    def __enter__(self) -> "_WritesBeside":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()  # what was handed over is written, also when interrupted
        self._writer.flush()

    def add(self, batch: "EmbeddedBatch") -> None:
        """Hand a batch over; waits while more than a part's worth does. Raises StorageError: one before could not be written."""
        self._waiting.append((self._pool.submit(self._add, batch), len(batch)))
        self._images += len(batch)
        while self._waiting and (self._images > MAX_ROWS or self._waiting[0][0].done()):
            self._take()

    def wait(self) -> None:
        """Until all is written, or waits for more. Raises StorageError."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        future, images = self._waiting.popleft()
        future.result()
        self._images -= images

    def _add(self, batch: "EmbeddedBatch") -> None:
        if self._failed:  # what comes after would fail alike, each batch in its time
            return
        self._failed = True
        with self._timings.measure("disk"):
            self._writer.add(batch)
        self._failed = False


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What became of some images: rows, and refusals, of ``parts``. seconds: in the loop."""

    parts: list[FeatureCache]
    seconds: float

    @property
    def refused(self) -> dict[str, str]:
        """path -> reason, of those without an embedding."""
        return {refusal.path: refusal.reason for part in self.parts for refusal in part.refused}


def embed_into_parts(
    files: ImageFiles,
    embedder: "Embedder",
    folder: Path,
    *,
    spec: Spec,
    provenance: Provenance,
    tag: str = "",
    progress: "Progress | None" = None,
) -> Embedded:
    """Embed ``files`` into new parts in ``folder``, with ``tag`` in their names; when interrupted, what is finished stays there.

    Raises:
        StorageError: a part cannot be written.
    """
    from featcache.backbones.embed import Timings, storable

    writer = PartWriter(folder, files, dim=embedder.backbone.dim, spec=spec, provenance=provenance, tag=tag)
    timings, total = Timings(), len(files.paths)
    done, started = 0, time.perf_counter()
    with _WritesBeside(writer, timings) as parts, contextlib.closing(embedder.embed(files, timings=timings)) as batches:
        if progress:
            progress(0, total, timings.bottleneck)
        for batch in (storable(batch, spec.storage) for batch in batches):
            parts.add(batch)
            done += len(batch)
            if progress:
                progress(done, total, timings.bottleneck)
        parts.wait()
    return Embedded(writer.written, time.perf_counter() - started)
