"""Finished work of a running extraction: small complete caches in ``features.h5.parts/``, published one by one.

In: embedded rows as they come. Out: files that survive any interruption, until the final cache is packed from them.
"""

import contextlib
import dataclasses
import logging
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Provenance, Rows, encode_names
from featcache.cache.write import write_cache
from featcache.errors import CacheError, NewerCacheError, Refusal
from featcache.images.read import ImageFiles
from featcache.spec import Spec

if TYPE_CHECKING:
    from featcache.backbones.embed import EmbeddedBatch, Progress
    from featcache.backbones.embedder import Embedder

log = logging.getLogger("featcache")
_PARTS = "[0-9]*.h5"  # named after the time; what is called otherwise is not ours
MAX_ROWS = 4096
MAX_SECONDS = 15.0  # what an interruption can cost at most, plus the images in flight


def open_parts(folder: Path) -> list[FeatureCache]:
    """Open every intact part. One that is no part is removed: its images are embedded again. Raises CacheError."""
    parts = []
    for path in sorted(folder.glob(_PARTS)):
        try:
            part = FeatureCache.open(path)
            part.check_features()
            parts.append(part)
        except CacheError as error:
            if isinstance(error, NewerCacheError) or isinstance(error.__cause__, OSError | MemoryError):
                raise  # the part may well be intact
            log.warning("part %s is damaged and will be made again (%s)", path.name, error)
            path.unlink(missing_ok=True)
    return parts


def remove_parts(folder: Path) -> None:
    """Delete what the packed cache has made superfluous: parts, and temporary files of a run that died."""
    for pattern in (_PARTS, ".*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()


def part_name() -> str:
    """A name that no other part has, of whatever machine; in the order of time on one machine, where nothing hangs on it."""
    return f"{time.time_ns():020d}-{secrets.token_hex(4)}.h5"


class PartWriter:
    """Collects embedded rows, and refusals, and publishes them as a part when there are enough, or when it has been long enough."""

    def __init__(self, folder: Path, files: ImageFiles, *, dim: int, spec: Spec, provenance: Provenance) -> None:
        self._folder, self._files, self._dim, self._spec, self._provenance = folder, files, dim, spec, provenance
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
            path = self._folder / part_name()
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
    progress: "Progress | None" = None,
) -> Embedded:
    """Embed ``files`` into new parts in ``folder``; when interrupted, what is finished stays there.

    Raises:
        StorageError: a part cannot be written.
    """
    from featcache.backbones.embed import Timings, storable

    writer = PartWriter(folder, files, dim=embedder.backbone.dim, spec=spec, provenance=provenance)
    timings, total = Timings(), len(files.paths)
    done, started = 0, time.perf_counter()
    with contextlib.ExitStack() as last:
        last.callback(writer.flush)  # also when interrupted: what is finished is kept
        batches = last.enter_context(contextlib.closing(embedder.embed(files, timings=timings)))
        if progress:
            progress(0, total, timings.bottleneck)
        for batch in (storable(batch, spec.storage) for batch in batches):
            with timings.measure("disk"):
                writer.add(batch)
            done += len(batch)
            if progress:
                progress(done, total, timings.bottleneck)
    return Embedded(writer.written, time.perf_counter() - started)
