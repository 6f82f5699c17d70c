"""``verify --repair``: find what is damaged in a cache, compute that again from its source, and leave the rest alone.

In: a damaged cache and the source it was made from. Out: the cache as it was. Features are embedded again where a block's
checksum fails, and where nothing proves of which image a row is. The file is replaced in one step, at the end, or not at all.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from featcache.backbones.embedder import Prepared, Progress, choose_runtime, prepare_encoder
from featcache.cache.cache import FeatureCache, weights_copy, weights_source
from featcache.cache.features import Features
from featcache.cache.format import CHECKSUMS, Indices, digest_keys, find, update_checksums
from featcache.cache.write import write_cache
from featcache.errors import BackboneError, CacheError, SourceError, SpecMismatchError, StorageError
from featcache.extraction.match import Known, gather
from featcache.extraction.parts import embed_into_parts, open_parts
from featcache.extraction.restore import Files, Restored, as_it_is, locate, not_found, restore
from featcache.images.source import ImageList, list_images
from featcache.spec import make_spec, spec_difference
from featcache.system.files import check_free_space, check_output
from featcache.system.workdir import locked, work_folder

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.backbones.encoder import Precision

log = logging.getLogger("featcache")
Options = tuple[str, int | None, int | None]  # device, workers, batch size


@dataclasses.dataclass(frozen=True)
class RepairReport:
    """What ``repair`` found and did.

    Attributes:
        cache: the file. rows: N.
        damaged: (start, stop) of the rows whose features failed their checksum.
        damaged_columns: what else did; ``checksums`` if it was a checksum itself.
        embedded: images embedded again; those that an interrupted repair had finished, or other rows hold, are not.
        identical: whether all that was restored gives the checksums that were recorded, so that every bit is as it was.
        seconds: of the whole call.
    """

    cache: Path
    rows: int
    damaged: tuple[tuple[int, int], ...]
    damaged_columns: tuple[str, ...]
    embedded: int
    identical: bool
    seconds: float


def repair(
    cache: str | Path,
    source: str | Path | ImageList,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Verify ``cache`` and mend it: damaged features are embedded again, damaged columns taken from ``source`` again.

    Nothing else changes, and no image is added or dropped: ``extract`` does that. On a CPU, with the batch size it was made
    with, the file is then what it was, byte for byte. An interrupted repair goes on when it is called again.

    Args:
        cache: the file. source: what it was made from: a folder or a CSV (see ``list_images``), or a list of images.
        device, workers, batch_size: as for ``extract``.
        progress: called with (done, total, bottleneck) when embedding starts and after every chunk.

    Raises:
        DamagedCacheError: damage that cannot be repaired. SourceError: ``source`` lacks an image that is needed, or is
        another one. BackboneError, SpecMismatchError: the backbone cannot be had again. StorageError: the file cannot be
        written, or another process is writing it. The file is then as it was before.
    """
    started = time.perf_counter()
    found = FeatureCache.salvage(cache)
    damaged = tuple(found.verify())
    embedded, identical = 0, True
    if damaged or found.damaged_columns:
        check_output(found.path)
        with locked(work_folder(found.path)):
            _check_unchanged(found)
            embedded = _mend(found, damaged, source, (device, workers, batch_size), progress)
            identical = _is_as_recorded(found)
    elif work_folder(found.path).is_dir():
        _tidy(found)
    return RepairReport(
        cache=found.path,
        rows=len(found),
        damaged=damaged,
        damaged_columns=found.damaged_columns,
        embedded=embedded,
        identical=identical,
        seconds=time.perf_counter() - started,
    )


def _check_unchanged(cache: FeatureCache) -> None:
    """Raise CacheError if the file is no longer the one that ``cache`` was opened from."""
    with cache.unverified() as features:
        if features.identity != cache.opened:
            raise CacheError(f"{cache.path} was replaced or changed since it was opened; run the command again")


def _mend(
    found: FeatureCache,
    damaged: tuple[tuple[int, int], ...],
    source: str | Path | ImageList,
    options: Options,
    progress: Progress | None,
) -> int:
    """Write the mended file; returns how many images were embedded for it."""
    files = restored = None
    if damaged or set(found.damaged_columns) != {CHECKSUMS}:
        images = source if isinstance(source, ImageList) else list_images(Path(source))
        files = Files(images, str(images.root if source is images else source))
        _mention_new_images(found, files)
        restored = restore(found, files)
    restored = restored or as_it_is(found)
    anew = np.concatenate([restored.suspects, *(np.arange(start, stop) for start, stop in damaged)])
    anew = np.unique(anew).astype(np.intp)
    collection = _Collection(found, restored, anew)
    embedded = collection.embed_missing(files, options, progress) if files else 0
    write_cache(
        found.path,
        restored.rows,
        _unchanged(collection.blocks(), found, anew),
        dim=found.dim,
        spec=found.spec,
        classes=restored.classes,
        refused=restored.refused,
        provenance=found.provenance,
        staging=work_folder(found.path),
    )
    collection.remove_parts()
    return embedded


class _Collection:
    """Where the features of each row come from: the cache itself, another row of the same image, or parts.

    Attributes:
        known: source 0 is the cache, the others are ``parts``; -1 if the row is to be embedded.
    """

    def __init__(self, cache: FeatureCache, restored: Restored, anew: Indices) -> None:
        self.cache, self.rows = cache, restored.rows
        self.folder = work_folder(cache.path)
        self.keys = digest_keys(restored.rows.digests)
        everything = np.arange(len(cache))
        self.known = Known(np.zeros(len(cache), np.intp), everything, restored.rows.sizes, restored.rows.mtimes)
        self.known.source[anew] = -1
        sound = np.setdiff1d(everything, anew)
        self._find(0, self.keys[sound], sound)
        self.parts: list[FeatureCache] = []
        self._add([part for part in open_parts(self.folder) if part.spec == cache.spec] if len(anew) else [])

    def _find(self, number: int, keys: Any, rows: Indices) -> None:
        """Look for missing rows among those of one source, which have the digests ``keys``."""
        missing = self.known.missing
        at = find(keys, self.keys[missing])
        self.known.set(missing[at >= 0], number, rows[at[at >= 0]])

    def _add(self, parts: list[FeatureCache]) -> None:
        for part in parts:
            self.parts.append(part)
            self._find(len(self.parts), digest_keys(part.rows.digests), np.arange(len(part)))

    def embed_missing(self, files: Files, options: Options, progress: Progress | None) -> int:
        """Embed the images of rows that are still missing into parts; returns how many.

        Raises:
            SourceError: images are not among ``files``, cannot be embedded, or changed meanwhile.
        """
        missing = self.known.missing
        if not len(missing):
            return 0
        rows = np.sort(missing[np.unique(self.keys[missing], return_index=True)[1]])  # one of each content
        at = locate(self.rows, files, rows)
        if (at < 0).any():
            raise not_found(self.cache, files, rows[at < 0])
        images = files.images.take(at)
        prepared = _prepare(self.cache, images, options)
        values = (len(rows) + len(self.cache)) * self.cache.dim
        check_free_space(self.cache.path.parent, values * self.cache.dtype.itemsize)
        done = embed_into_parts(images, prepared, self.folder, progress)
        self._add(done.parts)
        if len(self.known.missing):
            reason = next(
                (f"{images.paths[index]}: {why}" for index, why in done.refused.items()), "they changed meanwhile"
            )
            raise SourceError(
                f"{len(self.known.missing)} rows of {self.cache.path} cannot be embedded from {files.name} ({reason}); "
                "nothing was changed; run the command again"
            )
        return len(rows)

    def blocks(self) -> Iterator[Features]:
        """All N rows, in order."""
        takes = [self._own, *(part.take for part in self.parts)]
        return gather(takes, self.known, np.arange(len(self.cache)))

    def _own(self, rows: Indices) -> Features:
        with self.cache.unverified() as features:
            return features[rows]

    def remove_parts(self) -> None:
        """Delete what the mended cache has made superfluous."""
        _remove_known(self.parts, self.keys)


def _remove_known(parts: list[FeatureCache], keys: Any) -> None:
    """Delete parts whose every row a cache with the digests ``keys`` has; an interrupted ``extract`` may have left others."""
    for part in parts:
        if np.isin(digest_keys(part.rows.digests), keys).all():
            part.path.unlink(missing_ok=True)


def _tidy(cache: FeatureCache) -> None:
    """What a repair left behind that was killed when its file was in place already."""
    folder = work_folder(cache.path)
    with contextlib.suppress(StorageError), locked(folder):  # otherwise somebody is at work there
        parts = [part for part in open_parts(folder) if part.spec == cache.spec]
        _remove_known(parts, digest_keys(cache.rows.digests))


def _prepare(cache: FeatureCache, images: ImageList, options: Options) -> Prepared:
    """The backbone of ``cache`` in the precision that it was made with, if that is to be had here."""
    from featcache.backbones.encoder import candidates

    runtime = choose_runtime(*options)
    log.info(runtime.reason)
    backbone = backbone_of(cache)
    wanted = cache.spec["precision"]
    if wanted == "reference":
        chosen = cache.provenance.get("precision")
        before = chosen.get("precision") if isinstance(chosen, dict) else None
        precision = before if before in candidates(runtime.device) else "auto"
    else:
        precision = wanted
    encoder, choice, _ = prepare_encoder(backbone, runtime, images, precision=cast("Precision", precision))
    if wanted == "reference" != choice.precision_class:  # what passed on other images need not on these
        encoder, choice, _ = prepare_encoder(backbone, runtime, images, precision="fp32")
    return Prepared(backbone, encoder, runtime, cache.spec, cache.provenance)


def _unchanged(blocks: Iterable[Features], cache: FeatureCache, anew: Indices) -> Iterator[Features]:
    """``blocks``, and at their end the proof that where nothing was computed ``anew`` nothing is new.

    Raises:
        CacheError: something is; the file changed, or is damaged further, since it was verified.
    """
    sums, written = np.zeros_like(cache.feature_checksums), 0
    for block in blocks:
        update_checksums(sums, block, written, cache.rows_per_checksum)
        written += len(block)
        yield block
    touched = np.unique(anew // cache.rows_per_checksum)
    wrong = np.setdiff1d(np.flatnonzero(sums != cache.feature_checksums), touched)
    if len(wrong):
        raise CacheError(f"{cache.path} changed while it was repaired; nothing was changed; run the command again")


def _is_as_recorded(found: FeatureCache) -> bool:
    """Whether the mended file gives the checksums that the damaged one had."""
    mended = FeatureCache.open(found.path)
    if not np.array_equal(mended.feature_checksums, found.feature_checksums):
        log.warning(
            "what was computed anew is not bit for bit what was lost: other libraries, another device or batch size round "
            "otherwise, or the source has changed"
        )
        return False
    recorded = {} if CHECKSUMS in found.damaged_columns else found.column_checksums
    return all(mended.column_checksums[name] == value for name, value in recorded.items())


def _mention_new_images(cache: FeatureCache, files: Files) -> None:
    if "paths" in cache.damaged_columns:
        return
    refused = {path for path, _ in cache.refused}
    new = [
        path
        for path in np.setdiff1d(files.paths, cache.rows.paths).tolist()
        if path.decode("utf-8", "surrogateescape") not in refused
    ]
    if new:
        log.info(
            "%d images of %s are not in the cache under these names; `featcache extract` brings it up to date",
            len(new),
            files.name,
        )


def backbone_of(cache: FeatureCache) -> "Backbone":
    """The backbone that ``cache`` was made with.

    Raises:
        BackboneError: its weights are missing, or a library cannot provide them here.
        SpecMismatchError: what was found is another backbone, or has other weights.
    """
    from featcache.backbones.load import load_again

    copy, (source, reload) = weights_copy(cache.path, cache.spec), weights_source(cache)
    backbone = load_again(cache.spec, copy, reload)
    if backbone is None:
        raise BackboneError(
            f"{copy} is missing, and no library provides the weights of {cache.path} ({source}); copy the weights file to "
            "that name and run the same command again"
        )
    found = make_spec(
        name=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        preprocess=backbone.preprocess,
        precision=cache.spec["precision"],
        storage=cache.spec["storage"],
    )
    if found != cache.spec:
        raise SpecMismatchError(
            f"{cache.path} was made with another backbone than {backbone.weights} gives "
            f"({'; '.join(spec_difference(cache.spec, found))}); copy the original weights to {copy}"
        )
    return backbone
