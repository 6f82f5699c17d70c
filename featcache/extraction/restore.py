"""The columns of a damaged cache taken from its source again.

In: a cache opened by ``FeatureCache.salvage`` and the ``SourceFiles`` of its source. Out: it as it should be. Intact columns stay as
they are, whatever the source says now. A row of which nothing tells the image, or whose image is gone, cannot be restored.
"""

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.format import ROW_COLUMNS, Indices, Rows, encode_names, find
from featcache.errors import DamagedCacheError, Refusal, SourceError
from featcache.extraction.match import hash_files, unread_alike
from featcache.images.read import refusals
from featcache.images.source import AnySource, ImageList, Source, list_images
from featcache.system.display import quantity


class SourceFiles:
    """The images of a source, each read and hashed once, and only if it is asked for.

    Attributes:
        images: M of them. name: of the source, as given. paths: (M,) as a cache stores them.
        anew: the command that makes the cache from it.
        digests: (M,) sha256 of those that were read, whose ``sizes`` and ``mtimes`` are sound, too; empty for the others.

    Raises:
        SourceError: there is none.
    """

    def __init__(self, source: AnySource | ImageList, cache: Path) -> None:
        source = source if isinstance(source, ImageList) else Source.of(source)
        self.images = images = list_images(source)
        self.name = str(source.root if isinstance(source, ImageList) else source)
        if not len(images):
            raise SourceError(f"no image in {self.name} can be read; nothing was changed; give the source of the cache")
        typed = source.typed if isinstance(source, Source) else self.name
        self.anew = f"`featcache extract {typed} -o {shlex.quote(str(cache))} --force`"
        self.paths = encode_names(images.paths)
        self.digests = np.zeros(len(images), "S32")
        self.sizes, self.mtimes = images.sizes.copy(), images.mtimes.copy()

    def read(self, files: Indices) -> None:
        """Read those of ``files`` that have not been read."""
        todo = np.unique(files[self.digests[files] == b""])
        read = hash_files(self.images, todo)
        at = read["position"]
        self.digests[at], self.sizes[at], self.mtimes[at] = read["digest"], read["size"], read["mtime"]


def locate(rows: Rows, files: SourceFiles, wanted: Indices, *, by_stat: bool = False, by_size: bool = True) -> Indices:
    """The file that holds the image of each of the rows ``wanted``: the one of its path, else any of its content.

    Args:
        rows: whose digests are sound; wrong paths cost time and mislead nobody.
        by_stat: whether the same path, size and time prove the content, as they do for ``extract``; it is read if not.
        by_size: whether sizes are sound, so that a file of another size need not be read.

    Returns:
        Positions among ``files``, -1 where there is none.
    """
    keys = rows.keys[wanted]
    at = find(files.paths, rows.paths[wanted])
    there = at >= 0
    same = by_stat & unread_alike(files.images, at, rows, wanted)
    files.read(at[there & ~same])
    same |= there & (files.digests[at] == keys)
    missing = np.flatnonzero(~same)
    if len(missing):
        sizes = files.images.sizes
        suspects = np.isin(sizes, rows.sizes[wanted[missing]]) | (sizes < 0) | (not by_size)
        files.read(np.flatnonzero(suspects))
        at[missing] = find(files.digests, keys[missing])
    return at


def restore(cache: FeatureCache, files: SourceFiles) -> tuple[FeatureCache, Indices]:
    """Take ``cache.damaged_columns`` from ``files``.

    Returns:
        The cache as it should be, and the rows whose features are not known to be of the image that the row now names.

    Raises:
        DamagedCacheError: both paths and digests are damaged.
        SourceError: images are missing, or the source has other classes or labels.
    """
    damaged = {*cache.damaged_columns}
    if {"paths", "digests"} <= damaged:
        raise DamagedCacheError(
            f"{cache.path} is damaged beyond repair: checksum mismatch in its {', '.join(cache.damaged_columns)}, so that "
            f"nothing tells which image a row is of; restore it, or make it anew with {files.anew}"
        )
    rows, suspects = dict(vars(cache.rows)), np.empty(0, np.intp)
    classes = files.images.classes if "classes" in damaged else cache.classes
    if damaged & {*ROW_COLUMNS}:
        at = _files_of_rows(cache, files)
        if (missing := np.flatnonzero(at < 0)).size:
            raise not_found(cache, files, missing)
        suspects = _unproven(cache, files, at) if "digests" in damaged else suspects
        found = {
            "paths": encode_names(files.images.paths[file] for file in at.tolist()),
            "digests": np.ascontiguousarray(files.digests[at]).view(np.uint8).reshape(-1, 32),
            "sizes": files.sizes[at],
            "mtimes": files.mtimes[at],
            "splits": files.images.splits[at],
            "labels": _labels(files.images, at, classes),
        }
        rows |= {name: found[name] for name in damaged & {*ROW_COLUMNS}}
        for name in ("sizes", "mtimes"):
            rows[name] = rows[name].copy()
            rows[name][suspects] = found[name][suspects]
    _check_labels(cache, files, rows["labels"], classes)
    refused = _refused(cache, files, rows["paths"])
    return dataclasses.replace(cache, rows=Rows(**rows), classes=classes, refused=refused), suspects


def not_found(cache: FeatureCache, files: SourceFiles, rows: Indices) -> SourceError:
    """The error for ``rows`` whose images are not among ``files``."""
    paths = None if "paths" in cache.damaged_columns else cache.paths
    names = ", ".join(paths[row] if paths else f"that of row {row}" for row in rows[:3].tolist())
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    takes = f"that repairing {cache.path} takes"
    what = quantity(len(rows), f"image {takes} is", f"images {takes} are")
    return SourceError(
        f"{what} not in {files.name} with the content they had: {names}{more}; "
        f"nothing was changed; give a source that has them, or make the cache anew without them: {files.anew}"
    )


def _files_of_rows(cache: FeatureCache, files: SourceFiles) -> Indices:
    """(N,) the file of each row, -1 where there is none."""
    damaged = {*cache.damaged_columns}
    if "digests" in damaged:
        at = find(files.paths, cache.rows.paths)
        files.read(at[at >= 0])
        return np.where((at >= 0) & (files.digests[at] != b""), at, -1)
    by_stat = not damaged & {"paths", "sizes", "mtimes"}
    at = locate(cache.rows, files, np.arange(len(cache)), by_stat=by_stat, by_size="sizes" not in damaged)
    return _one_each(cache, files, at) if "paths" in damaged else at


def _one_each(cache: FeatureCache, files: SourceFiles, at: Indices) -> Indices:
    """Where several files have one content, each is of another row: the one that still names it, or has its label and split."""
    keys = cache.rows.keys
    keeps = (at >= 0) & (files.paths[at] == cache.rows.paths)
    free: dict[bytes, list[int]] = {}
    for file in np.setdiff1d(np.flatnonzero(files.digests != b""), at[keeps]).tolist():
        free.setdefault(files.digests[file], []).append(file)
    labels = _labels(files.images, np.arange(len(files.paths)), cache.classes)
    for row in np.flatnonzero(~keeps).tolist():
        choice = free.get(keys[row], [])
        if not {"labels", "classes"} & {*cache.damaged_columns}:
            choice.sort(key=lambda file: labels[file] != cache.y[row])
        if "splits" not in cache.damaged_columns:
            choice.sort(key=lambda file: files.images.splits[file] != cache.rows.splits[row])
        at[row] = choice.pop(0) if choice else -1
    return at


def _unproven(cache: FeatureCache, files: SourceFiles, at: Indices) -> Indices:
    """Rows whose features may be of other content than their file has now: neither digest nor size and time say so."""
    same = cache.rows.keys == files.digests[at]
    if not {"sizes", "mtimes"} & {*cache.damaged_columns}:
        read = (files.mtimes[at] == files.images.mtimes[at]) & (files.sizes[at] == cache.rows.sizes)
        same |= read & unread_alike(files.images, at, cache.rows, np.arange(len(at)))
    return np.flatnonzero(~same)


def _labels(images: ImageList, at: Indices, classes: tuple[str, ...]) -> npt.NDArray[np.int32]:
    """(N,) labels of the files ``at`` as positions in ``classes``; -2 where these lack the class."""
    numbers = {name: number for number, name in enumerate(classes)}
    table = np.array([*(numbers.get(name, -2) for name in images.classes), -1], np.int32)
    return table[images.labels[at]]


def _check_labels(
    cache: FeatureCache, files: SourceFiles, labels: npt.NDArray[np.int32], classes: tuple[str, ...]
) -> None:
    """Labels and classes must fit where one of them comes from the source. Raises SourceError."""
    damaged = sorted({"labels", "classes"} & {*cache.damaged_columns})
    if not damaged:
        return
    wrong = bool(len(labels)) and not -1 <= labels.min() <= labels.max() < len(classes)
    if "classes" in damaged:  # every name must be seen on an image that has the recorded label
        at = _files_of_rows(cache, files)
        there = (at >= 0) & (labels >= 0)
        wrong |= not np.array_equal(_labels(files.images, at[there], classes), labels[there])
        wrong |= len(np.unique(labels[there])) < len(np.unique(labels[labels >= 0]))
    if wrong:
        raise SourceError(
            f"{files.name} gives other {' and '.join(damaged)} than {cache.path} had: it has "
            "changed since, or is another source; nothing was changed; give it as it was, or make the cache anew with "
            f"{files.anew}"
        )


def _refused(cache: FeatureCache, files: SourceFiles, paths: npt.NDArray[np.bytes_]) -> tuple[Refusal, ...]:
    """What is refused now, of files that have no row, where the columns about that are damaged. Raises SourceError."""
    known = "refused/paths" not in cache.damaged_columns
    if known and "refused/reasons" not in cache.damaged_columns:
        return cache.refused
    others = np.flatnonzero(~np.isin(files.paths, paths))
    reasons = {
        files.images.paths[file]: why
        for file, why in refusals(files.images, others.tolist(), spec=cache.spec.preprocess).items()
    }
    now = dict(files.images.refused) | reasons
    if known and any(path in now for path, _ in cache.refused):
        return tuple(Refusal(path, now.get(path, "refused before; the reason was lost")) for path, _ in cache.refused)
    if known or len(now) != len(cache.refused):
        raise SourceError(
            f"{files.name} has {quantity(len(now), 'refused image')}, {cache.path} had {len(cache.refused)} others; nothing was "
            f"changed; give it as it was, or make the cache anew with {files.anew}"
        )
    return tuple(Refusal(*entry) for entry in sorted(now.items()))
