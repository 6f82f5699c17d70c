"""``verify --repair``: what is damaged in a cache is computed again from its source, and the rest is left alone.

In: a damaged cache and the source it was made from. Out: the cache, mended. Damaged rows count as unknown and are embedded again;
damaged columns come from the source (``restore.py``). The file is replaced in one step, at the end, or not at all.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.features import Features
from featcache.cache.format import CHECKSUMS, Indices, find, update_checksums
from featcache.cache.write import write_cache
from featcache.errors import CacheError, DamagedCacheError, SourceError, StorageError
from featcache.extraction.executors import Work
from featcache.extraction.match import Matches, gather
from featcache.extraction.parts import Embedded, embed_into_parts, open_parts
from featcache.extraction.restore import SourceFiles, locate, not_found, restore
from featcache.images.source import AnySource, ImageList, Source
from featcache.system.display import quantity
from featcache.system.files import check_free_space, check_output
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_runtime_options
from featcache.system.workdir import LISTING, locked, work_folder

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress

log = logging.getLogger("featcache")
_Options = tuple[str, int | None, int | None]  # device, workers, batch size


@dataclasses.dataclass(frozen=True)
class RepairReport:
    """What ``repair`` found and did.

    Attributes:
        cache: the file. rows: N.
        damaged: (start, stop) of the rows whose features failed their checksum.
        damaged_columns: what else did; ``checksums`` if it was a checksum itself.
        restored_columns: those of them that were taken from the source.
        embedded: images embedded again; those that an interrupted repair had finished, or other rows hold, are not.
        seconds: of the whole call.
    """

    cache: Path
    rows: int
    damaged: tuple[tuple[int, int], ...]
    damaged_columns: tuple[str, ...]
    restored_columns: tuple[str, ...]
    embedded: int
    seconds: float


def repair(
    cache: AnyPath,
    source: AnySource | ImageList,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: "Progress | None" = None,
) -> RepairReport:
    """Verify ``cache`` and mend it: damaged features are embedded again, damaged columns taken from ``source``.

    Nothing else changes, and no image is added or dropped: ``extract`` does that. An intact row whose image is gone stays.
    An interrupted repair goes on when it is called again.

    Args:
        cache: the file. source: what it was made from: a folder or a table (see ``Source``), or a list of images.
        device, workers, batch_size: as for ``extract``.
        progress: called with (done, total, bottleneck) when embedding starts and after every batch.

    Raises:
        UsageError: impossible options. DamagedCacheError: damage that cannot be repaired. SourceError: ``source`` lacks an
        image that is needed, or is another one. BackboneError, SpecMismatchError: the backbone cannot be had again.
        StorageError: the file cannot be written, or another process is writing it. The file is then as it was before.
    """
    started, cache = time.perf_counter(), as_path(cache)
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    if not isinstance(source, ImageList):
        images = Source.of(source).path
        check_path(cache, "cache", ("verify", HERE, "--repair", images))
        check_path(images, "images", ("verify", cache, "--repair", HERE))
    found = FeatureCache.salvage(cache)
    damaged, embedded = tuple(found.verify()), 0
    if (damaged or found.damaged_columns) and found.spec.stated is not None:
        raise DamagedCacheError(f"{cache} is damaged, and its vectors were made elsewhere; {found.advice}")
    if damaged or found.damaged_columns:
        check_output(found.path)
        with locked(work_folder(found.path)):
            found.check_unchanged()
            embedded = _mend(found, damaged, source, (device, workers, batch_size), progress)
    elif work_folder(found.path).is_dir():
        _tidy(found)
    return RepairReport(
        cache=found.path,
        rows=len(found),
        damaged=damaged,
        damaged_columns=found.damaged_columns,
        restored_columns=tuple(name for name in found.damaged_columns if name != CHECKSUMS),
        embedded=embedded,
        seconds=time.perf_counter() - started,
    )


def _mend(
    found: FeatureCache,
    damaged: tuple[tuple[int, int], ...],
    source: AnySource | ImageList,
    options: _Options,
    progress: "Progress | None",
) -> int:
    """Write the mended file; returns how many images were embedded for it."""
    files, mended, anew = None, found, np.zeros(len(found), bool)
    if damaged or set(found.damaged_columns) != {CHECKSUMS}:
        files = SourceFiles(source, found.path)
        _mention_new_images(found, files)
        mended, suspects = restore(found, files)
        for rows in (suspects, *(np.arange(*block) for block in damaged)):
            anew[rows] = True
    keys = mended.rows.keys
    sources = Matches(np.where(anew, -1, 0), np.arange(len(found)), mended.rows.sizes, mended.rows.mtimes)
    parts = [part for part in open_parts(work_folder(found.path)) if part.spec == found.spec] if anew.any() else []
    _find_rows(sources, keys, [np.where(anew, b"", keys), *(part.rows.keys for part in parts)], 0)
    todo = np.sort(sources.missing[np.unique(keys[sources.missing], return_index=True)[1]])  # one of each content
    if files and len(todo):
        done = _embed(mended, files, todo, options, progress)
        _find_rows(sources, keys, [part.rows.keys for part in done.parts], 1 + len(parts))
        parts += done.parts
        _check_complete(found, files, sources, done)
    takes = [found.take_unverified, *(part.take for part in parts)]
    write_cache(
        found.path,
        mended.rows,
        _unchanged(gather(takes, sources, np.arange(len(found))), found, anew),
        dim=found.dim,
        spec=found.spec,
        classes=mended.classes,
        refused=mended.refused,
        provenance=found.provenance,
        staging=work_folder(found.path),
        rows_per_checksum=found.rows_per_checksum,
    )
    _remove_known(parts, keys)
    return len(todo)


def _find_rows(sources: Matches, keys: Any, known: list[Any], first: int) -> None:
    """Look up what is missing, by the digests ``keys`` of all rows, in further sources: ``known`` are the digests of theirs."""
    for number, digests in enumerate(known, first):
        missing = sources.missing
        sources.put(missing, number, find(digests, keys[missing]))


def _embed(
    cache: FeatureCache, files: SourceFiles, rows: Indices, options: _Options, progress: "Progress | None"
) -> Embedded:
    """Embed the images of ``rows`` into parts. Raises SourceError: not among ``files``."""
    at = locate(cache.rows, files, rows)
    if (at < 0).any():
        raise not_found(cache, files, rows[at < 0])
    images = files.images.take(at)
    embedder = Work(cache.path, images, cache.spec, cache.provenance, *options).prepare()
    folder = work_folder(cache.path)
    check_free_space(folder.parent, (len(rows) + len(cache)) * cache.dim * cache.dtype.itemsize)
    return embed_into_parts(images, embedder, folder, spec=cache.spec, provenance=cache.provenance, progress=progress)


def _check_complete(found: FeatureCache, files: SourceFiles, sources: Matches, done: Embedded) -> None:
    if missing := len(sources.missing):
        reason = next(iter(done.refused.values()), "they changed meanwhile")
        raise SourceError(
            f"{quantity(missing, 'row')} of {found.path} cannot be embedded from {files.name} ({reason}); "
            "nothing was changed; run the command again"
        )


def _unchanged(blocks: Iterable[Features], cache: FeatureCache, anew: npt.NDArray[np.bool_]) -> Iterator[Features]:
    """``blocks``, and at their end the proof that where nothing was computed ``anew`` (N,) nothing is new.

    Raises:
        CacheError: something is; the file changed, or is damaged further, since it was verified.
    """
    sums, written = np.zeros_like(cache.feature_checksums), 0
    for block in blocks:
        update_checksums(sums, block, written, cache.rows_per_checksum)
        written += len(block)
        yield block
    touched = np.flatnonzero(anew) // cache.rows_per_checksum
    if len(np.setdiff1d(np.flatnonzero(sums != cache.feature_checksums), touched)):
        raise CacheError(f"{cache.path} changed while it was repaired; nothing was changed; run the command again")


def _remove_known(parts: list[FeatureCache], keys: Any) -> None:
    """Delete parts whose every row a cache with the digests ``keys`` has; an interrupted ``extract`` may have left others."""
    for part in parts:
        if len(part) and np.isin(part.rows.keys, keys).all():
            part.path.unlink(missing_ok=True)


def _tidy(cache: FeatureCache) -> None:
    """What a repair left behind that was killed when its file was in place already."""
    folder = work_folder(cache.path)
    if (folder / LISTING).exists():  # parts of several processes, which `merge` packs
        return
    with contextlib.suppress(StorageError), locked(folder):  # otherwise somebody is at work there
        parts = [part for part in open_parts(folder) if part.spec == cache.spec]
        _remove_known(parts, cache.rows.keys)


def _mention_new_images(cache: FeatureCache, files: SourceFiles) -> None:
    new = {*files.images.paths} - {*cache.paths, *(path for path, _ in cache.refused)}
    if new and "paths" not in cache.damaged_columns:
        log.info(
            "%s not in the cache under these names; `featcache extract` brings it up to date",
            quantity(len(new), f"image of {files.name} is", f"images of {files.name} are"),
        )
