"""Finished work of a running extraction: small complete caches in ``features.h5.parts/``, published one by one.

In: embedded rows as they come. Out: files that survive any interruption, until the final cache is packed from them.
"""

import dataclasses
import logging
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Indices, Rows, encode_names
from featcache.cache.write import write_cache
from featcache.errors import CacheError, NewerCacheError
from featcache.images.source import ImageList

if TYPE_CHECKING:
    from featcache.backbones.embed import Chunk
    from featcache.backbones.embedder import Prepared, Progress

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

    def __init__(self, folder: Path, spec: dict[str, Any], provenance: dict[str, Any], dim: int) -> None:
        self._folder, self._spec, self._provenance, self._dim = folder, spec, provenance, dim
        self._pending: list[tuple[Chunk, list[str]]] = []
        self._rows = 0
        self._since = time.monotonic()
        self.written: list[FeatureCache] = []

    def add(self, chunk: "Chunk", paths: list[str]) -> None:
        """Take a chunk and its rows' paths. Raises StorageError when publishing fails."""
        if paths:
            self._pending.append((chunk, paths))
            self._rows += len(paths)
        if self._rows >= MAX_ROWS or time.monotonic() - self._since > MAX_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Publish what has been collected. Raises StorageError."""
        if self._pending:
            chunks = [chunk for chunk, _ in self._pending]
            paths = [path for _, paths in self._pending for path in paths]
            rows = Rows(
                paths=encode_names(paths),
                labels=np.full(len(paths), -1, np.int32),
                splits=np.zeros(len(paths), np.uint8),
                digests=np.concatenate([chunk.digests for chunk in chunks]),
                sizes=np.concatenate([chunk.sizes for chunk in chunks]),
                mtimes=np.concatenate([chunk.mtimes for chunk in chunks]),
            )
            path = self._folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.h5"
            blocks = (chunk.features for chunk in chunks)
            write_cache(path, rows, blocks, dim=self._dim, spec=self._spec, provenance=self._provenance)
            self.written.append(FeatureCache.open(path))
        self._pending, self._rows, self._since = [], 0, time.monotonic()


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What ``embed_into_parts`` did with a list of images.

    Attributes:
        parts: what was written. images: (n,) positions in the list, in the order of the parts' rows.
        refused: position -> reason, for those that could not be embedded. seconds: in the loop.
    """

    parts: list[FeatureCache]
    images: Indices
    refused: dict[int, str]
    seconds: float


def embed_into_parts(images: ImageList, at: "Prepared", folder: Path, progress: "Progress | None") -> Embedded:
    """Embed ``images`` into new parts in ``folder``; when interrupted, what is finished stays there.

    Raises:
        StorageError: a part cannot be written.
    """
    from featcache.backbones.embed import Timings, embed, storable

    writer = PartWriter(folder, at.spec, at.provenance, at.backbone.dim)
    timings = Timings()
    refused: dict[int, str] = {}
    embedded: list[Indices] = [np.empty(0, np.intp)]
    done = 0
    started = time.perf_counter()
    chunks = embed(images, at.encoder, at.runtime, timings=timings)
    try:
        if progress:
            progress(0, len(images), timings.bottleneck)
        for chunk in chunks:
            chunk = storable(chunk, at.spec["storage"])
            refused |= dict(chunk.refused)
            embedded.append(chunk.indices)
            with timings.measure("disk"):
                writer.add(chunk, [images.paths[index] for index in chunk.indices])
            done += len(chunk.indices) + len(chunk.refused)
            if progress:
                progress(done, len(images), timings.bottleneck)
    finally:
        chunks.close()
        writer.flush()  # also when interrupted: what is finished is kept
    return Embedded(writer.written, np.concatenate(embedded), refused, time.perf_counter() - started)
