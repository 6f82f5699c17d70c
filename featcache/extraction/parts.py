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
from featcache.cache.format import Indices, Provenance, Rows, encode_names
from featcache.cache.write import write_cache
from featcache.errors import CacheError, NewerCacheError
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


class PartWriter:
    """Collects embedded rows and publishes them as a part when there are enough, or when it has been long enough."""

    def __init__(self, folder: Path, files: ImageFiles, *, spec: Spec, provenance: Provenance) -> None:
        self._folder, self._files, self._spec, self._provenance = folder, files, spec, provenance
        self._pending: list[EmbeddedBatch] = []
        self._rows = 0
        self._since = time.monotonic()
        self.written: list[FeatureCache] = []

    def add(self, batch: "EmbeddedBatch") -> None:
        """Take a batch. Raises StorageError when publishing fails."""
        if len(batch.indices):
            self._pending.append(batch)
            self._rows += len(batch.indices)
        if self._rows >= MAX_ROWS or time.monotonic() - self._since > MAX_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Publish what has been collected. Raises StorageError."""
        if batches := self._pending:
            rows = Rows(
                paths=encode_names(self._files.paths[index] for batch in batches for index in batch.indices),
                labels=np.full(self._rows, -1, np.int32),
                splits=np.zeros(self._rows, np.uint8),
                digests=np.concatenate([batch.digests for batch in batches]),
                sizes=np.concatenate([batch.sizes for batch in batches]),
                mtimes=np.concatenate([batch.mtimes for batch in batches]),
            )
            path = self._folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.h5"
            blocks, dim = [batch.features for batch in batches], batches[0].features.shape[1]
            write_cache(path, rows, blocks, dim=dim, spec=self._spec, provenance=self._provenance)
            self.written.append(FeatureCache.open(path))
        self._pending, self._rows, self._since = [], 0, time.monotonic()


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What ``embed_into_parts`` did with n images.

    Attributes:
        parts: what was written. images: positions of those embedded, in the order of the parts' rows.
        refused: position -> reason, for the others. seconds: in the loop.
    """

    parts: list[FeatureCache]
    images: Indices
    refused: dict[int, str]
    seconds: float


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

    writer = PartWriter(folder, files, spec=spec, provenance=provenance)
    timings, total = Timings(), len(files.paths)
    refused: dict[int, str] = {}
    embedded: list[Indices] = [np.empty(0, np.intp)]
    done, started = 0, time.perf_counter()
    with contextlib.ExitStack() as last:
        last.callback(writer.flush)  # also when interrupted: what is finished is kept
        batches = last.enter_context(contextlib.closing(embedder.embed(files, timings=timings)))
        if progress:
            progress(0, total, timings.bottleneck)
        for batch in (storable(batch, spec.storage) for batch in batches):
            refused |= batch.refused
            embedded.append(batch.indices)
            with timings.measure("disk"):
                writer.add(batch)
            done += len(batch)
            if progress:
                progress(done, total, timings.bottleneck)
    return Embedded(writer.written, np.concatenate(embedded), refused, time.perf_counter() - started)
