"""The columns of a damaged cache taken from its source again, each proven before it is believed.

In: a cache opened by ``FeatureCache.salvage`` and the ``Files`` of its source. Out: ``Restored``. A column is believed if
it gives the checksum that was recorded. Failing that only what the files themselves say is taken (digests, sizes, times,
and paths where content leaves no choice), never what somebody decided (labels, splits, classes).
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.format import (
    CHECKSUMS,
    Indices,
    Rows,
    column_checksum,
    decode_names,
    digest_keys,
    encode_names,
    find,
)
from featcache.errors import DamagedCacheError, SourceError
from featcache.extraction.match import hash_files
from featcache.images.decode import refusals
from featcache.images.source import ImageList

log = logging.getLogger("featcache")
Column = npt.NDArray[Any]
_MOST_MIXED = 16  # rows; the mixtures of two columns that are tried grow with the square of it


class Files:
    """The images of a source, each read and hashed at most once, and only if it is asked for.

    Attributes:
        images: M of them. name: of the source. paths: (M,) as a cache stores them.
        known: (M,) whether ``digests``, ``sizes`` and ``mtimes`` are those of a file that was read.

    Raises:
        SourceError: there is none.
    """

    def __init__(self, images: ImageList, name: str) -> None:
        if not len(images):
            raise SourceError(f"no image in {name} can be read; nothing was changed; give the source of the cache")
        self.images, self.name, self.paths = images, name, encode_names(images.paths)
        self.known, self._tried = np.zeros(len(images), bool), np.zeros(len(images), bool)
        self.digests = np.zeros(len(images), "S32")
        self.sizes, self.mtimes = images.sizes.copy(), images.mtimes.copy()

    def read(self, files: Indices) -> None:
        """Read those of ``files`` that have not been read."""
        todo = np.unique(files[~self._tried[files]])
        self._tried[todo] = True
        read, digests, sizes, mtimes = hash_files(self.images, todo)
        self.digests[read], self.sizes[read], self.mtimes[read], self.known[read] = digests, sizes, mtimes, True

    def with_content(self, keys: npt.NDArray[np.bytes_]) -> Indices:
        """For each digest the first file read that has it, -1 if none has."""
        read = np.flatnonzero(self.known)
        found = find(self.digests[read], keys)
        return np.where(found >= 0, read[found] if len(read) else -1, -1)


def locate(rows: Rows, files: Files, wanted: Indices, *, by_stat: bool = False, by_size: bool = True) -> Indices:
    """The file that holds the image of each of the rows ``wanted``: the one of its path, else any of its content.

    Args:
        rows: whose digests are sound; wrong paths cost time and mislead nobody.
        by_stat: whether the same path, size and time prove the content, as they do for ``extract``; it is read if not.
        by_size: whether sizes are sound, so that a file of another size need not be read.

    Returns:
        Positions among ``files``, -1 where there is none.
    """
    keys = digest_keys(rows.digests)[wanted]
    at = find(files.paths, rows.paths[wanted])
    there = at >= 0
    same = there & by_stat & (files.images.sizes[at] == rows.sizes[wanted])
    same &= files.images.mtimes[at] == rows.mtimes[wanted]
    files.read(at[there & ~same])
    same |= there & files.known[at] & (files.digests[at] == keys)
    missing = np.flatnonzero(~same)
    if len(missing):
        suspects = np.isin(files.images.sizes, rows.sizes[wanted[missing]]) if by_size else files.images.sizes > -2
        files.read(np.flatnonzero(suspects))
        at[missing] = files.with_content(keys[missing])
    return at


@dataclasses.dataclass(frozen=True)
class Restored:
    """What goes beside the features again.

    Attributes:
        rows, classes, refused: as ``write_cache`` takes them.
        suspects: rows whose features are intact, and not proven to be of the image that the row now names.
    """

    rows: Rows
    classes: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    suspects: Indices


def as_it_is(cache: FeatureCache) -> Restored:
    """Nothing to restore."""
    return Restored(cache.rows, cache.classes, cache.refused, np.empty(0, np.intp))


def restore(cache: FeatureCache, files: Files) -> Restored:
    """Restore ``cache.damaged_columns`` from ``files``.

    Raises:
        DamagedCacheError: both paths and digests are damaged.
        SourceError: images are missing, or a column that only the source knows is not what was recorded.
    """
    job = _Restoration(cache, files)
    rows = {field.name: job.column(field.name) for field in dataclasses.fields(Rows) if field.name != "labels"}
    classes = job.column("classes")
    rows["labels"] = job.column("labels", classes)
    refused_paths = job.column("refused/paths")
    reasons = job.column("refused/reasons", refused_paths)
    if job.unproven:
        raise SourceError(
            f"{files.name} gives other {', '.join(job.unproven)} than {cache.path} had: it has changed since, or is another "
            f"source; nothing was changed; give it as it was, or make the cache anew with {_anew(cache, files)}"
        )
    suspects = np.flatnonzero((rows["digests"] != cache.rows.digests).any(axis=1))
    if "digests" in job.proven:
        suspects = suspects[:0]  # these are the digests that were written together with the features
    for name in ("sizes", "mtimes") if len(suspects) else ():
        rows[name] = rows[name].copy()
        rows[name][suspects] = getattr(files, name)[job.at[suspects]]
    refused = tuple(zip(decode_names(refused_paths), decode_names(reasons), strict=True))
    return Restored(Rows(**rows), decode_names(classes), refused, suspects)


def not_found(cache: FeatureCache, files: Files, rows: Indices) -> SourceError:
    """The error for ``rows`` whose images are not among ``files``."""
    paths = None if "paths" in cache.damaged_columns else cache.paths
    names = ", ".join(paths[row] if paths else f"that of row {row}" for row in rows[:3].tolist())
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return SourceError(
        f"{len(rows)} images that repairing {cache.path} takes are not in {files.name} with the content they had: {names}{more}; "
        f"nothing was changed; give a source that has them, or make the cache anew without them: {_anew(cache, files)}"
    )


def _anew(cache: FeatureCache, files: Files) -> str:
    return f"`featcache extract {files.name} -o {cache.path} --force`"


class _Restoration:
    """Columns on demand: as stored if intact, else from the source.

    Attributes:
        at: (N,) the file of each row, if a column of rows is damaged.
        proven: columns that give the recorded checksum again. unproven: that do not, and must.
    """

    def __init__(self, cache: FeatureCache, files: Files) -> None:
        self.cache, self.files = cache, files
        self.damaged = set(cache.damaged_columns) - {CHECKSUMS}
        self.proven: list[str] = []
        self.unproven: list[str] = []
        self.ambiguous = False
        self._refusals: dict[str, str] | None = None
        if {"paths", "digests"} <= self.damaged:
            what = ", ".join(cache.damaged_columns) if cache.column_checksums else "metadata"
            raise DamagedCacheError(
                f"{cache.path} is damaged beyond repair: checksum mismatch in its {what}, so that nothing tells which image "
                f"a row is of; restore it, or make it anew with {_anew(cache, files)}"
            )
        if self.damaged & {field.name for field in dataclasses.fields(Rows)}:
            self.at = self._locate()
            if (missing := np.flatnonzero(self.at < 0)).size:
                raise not_found(cache, files, missing)

    def column(self, name: str, beside: Column | None = None) -> Column:
        """The column ``name``; labels need the classes ``beside`` them, reasons for refusals their paths."""
        stored = self._stored(name)
        if name not in self.damaged:
            return stored
        candidates = self._candidates(name, stored, beside)
        recorded = self.cache.column_checksums[name]
        for candidate in candidates:
            for mixture in _mixtures(stored, candidate):
                if column_checksum(name, mixture) == recorded:
                    self.proven.append(name)
                    return mixture
        if name not in ("digests", "sizes", "mtimes") and (name != "paths" or self.ambiguous):
            self.unproven.append(name)
        else:
            log.warning(
                "%s of %s are not all what they were: taken from %s as it is now",
                name,
                self.cache.path,
                self.files.name,
            )
        return candidates[-1]

    def _stored(self, name: str) -> Column:
        cache = self.cache
        if name == "classes":
            return encode_names(cache.classes)
        if name.startswith("refused/"):
            return encode_names(pair[name == "refused/reasons"] for pair in cache.refused)
        return np.asarray(getattr(cache.rows, name))

    def _locate(self) -> Indices:
        rows, files, everything = self.cache.rows, self.files, np.arange(len(self.cache))
        if "digests" in self.damaged:
            at = find(files.paths, rows.paths)
            files.read(at[at >= 0])
            return np.where((at >= 0) & files.known[at], at, -1)
        by_stat = not self.damaged & {"paths", "sizes", "mtimes"}
        at = locate(rows, files, everything, by_stat=by_stat, by_size="sizes" not in self.damaged)
        return self._distinct(at) if "paths" in self.damaged else at

    def _distinct(self, at: Indices) -> Indices:
        """Where several files have one content, each is of another row; those that still name theirs keep it."""
        files, keys = self.files, digest_keys(self.cache.rows.digests)
        keeps = (at >= 0) & (files.paths[at] == self.cache.rows.paths)
        free: dict[bytes, list[int]] = {}
        for file in np.setdiff1d(np.flatnonzero(files.known), at[keeps]).tolist():
            free.setdefault(files.digests[file], []).append(file)
        at = at.copy()
        for row in np.flatnonzero(~keeps).tolist():
            choice = free.get(keys[row], [])
            self.ambiguous |= len(choice) > 1
            at[row] = choice.pop(0) if choice else -1
        return at

    def _candidates(self, name: str, stored: Column, beside: Column | None) -> list[Column]:
        """What the column may have been, the last to be taken if none gives the checksum."""
        files, images = self.files, self.files.images
        if name.startswith("refused/"):
            return [self._refused(name, stored, beside)]
        if name == "classes":
            return [encode_names(images.classes)]
        at = self.at
        if name == "paths":
            return [encode_names(images.paths[file] for file in at.tolist())]
        if name == "digests":
            return [files.digests[at].view(np.uint8).reshape(-1, 32)]
        if name == "sizes":
            return [files.sizes[at]]
        if name == "mtimes":  # -1 stands for a file so new that its time says nothing; it is always safe to write
            read = files.mtimes[at]
            return [read, np.where(stored == read, read, -1), np.where(stored == -1, -1, read)]
        if name == "splits":
            return [images.splits[at]]
        numbers = find(np.zeros(0, "S1") if beside is None else beside, encode_names(images.classes))
        numbers = np.append(np.where(numbers < 0, -2, numbers), -1).astype(stored.dtype)
        return [numbers[images.labels[at]]]

    def _refused(self, name: str, stored: Column, beside: Column | None) -> Column:
        """Paths of what is refused now; or reasons for those paths ``beside``, as stored where there is none now."""
        derived = self._refused_now()
        if beside is None:
            return encode_names(sorted(derived))
        before = decode_names(stored)
        return encode_names(
            derived.get(path, reason) for path, reason in zip(decode_names(beside), before, strict=False)
        )

    def _refused_now(self) -> dict[str, str]:
        """path -> reason, of files that have no row."""
        if self._refusals is None:
            images = self.files.images
            others = np.flatnonzero(~np.isin(self.files.paths, self.cache.rows.paths))
            if "paths" in self.damaged:
                others = np.setdiff1d(others, self.at)
            if "refused/paths" not in self.damaged:
                refused = {path for path, _ in self.cache.refused}
                others = others[[images.paths[file] in refused for file in others.tolist()]]
            reasons = refusals(images, others.tolist())
            listed = {refusal.path: refusal.reason for refusal in images.refused}
            self._refusals = listed | {images.paths[index]: reason for index, reason in reasons.items()}
        return self._refusals


def _mixtures(stored: Column, candidate: Column) -> Iterator[Column]:
    """``candidate``, then ``stored`` with a run of differing rows taken from it: both damage and changes are local."""
    if candidate.dtype.kind == "S" and candidate.dtype.itemsize <= stored.dtype.itemsize:
        candidate = candidate.astype(stored.dtype)
    yield candidate
    if candidate.shape != stored.shape or candidate.dtype != stored.dtype:
        return
    differing = np.flatnonzero((stored != candidate).reshape(len(stored), -1).any(axis=1))
    if len(differing) > _MOST_MIXED:
        return
    for start in range(len(differing)):
        for stop in range(start + 1, len(differing) + 1):
            run, mixture = differing[start:stop], stored.copy()
            mixture[run] = candidate[run]
            yield mixture
