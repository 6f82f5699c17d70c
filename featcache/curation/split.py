"""``split``: the images of a source or cache in train, val and test. In: a path and shares. Out: a table or folders, and a ``Split``.

Images that belong together, such as copies or those of one patient, lie on one side. What has a split keeps it.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from featcache.cache.cache import FeatureCache, is_cache
from featcache.cache.copies import first_copies
from featcache.curation.manifest import check_classes, check_manifest, known_splits, prefix_of, write_manifest
from featcache.curation.near_copies import find_near_copies
from featcache.curation.neighbours import estimate, nearest_rows
from featcache.curation.pixel_check import PixelCheck
from featcache.curation.split_folders import check_new, place_images
from featcache.curation.split_result import Groups, Split
from featcache.errors import SourceError, UsageError
from featcache.images.archives import is_home
from featcache.images.deal import Splits, deal
from featcache.images.groups import Indices, group_by_name, joined, read_groups, with_group_column
from featcache.images.home import find_home, places_in, some_of
from featcache.images.source import AnySource, ImageList, Source, check_apart, list_images
from featcache.images.splits import digests_of_suspects, rank
from featcache.spec import SPLITS
from featcache.system.display import bar_in_notebook, printable, quantity
from featcache.system.files import named
from featcache.system.path_advice import HERE, check_path, typed
from featcache.system.path_kinds import as_path
from featcache.system.runtime_options import check_device, check_runtime_options, check_whole

log = logging.getLogger("featcache")
Progress = Callable[[int, int, str], None]
_TRAIN, _VAL, _TEST = (SPLITS.index(name) for name in ("train", "val", "test"))
_LONG = 10  # seconds


class _Read(NamedTuple):
    """Images, and their cache if that is what they were read from; ``known``: whether the folder that they lie in is."""

    images: ImageList
    cache: FeatureCache | None
    known: bool


def split(
    source: AnySource | ImageList,
    output: str | Path | None = None,
    *,
    val: float | None = None,
    test: float | None = None,
    groups: Groups = "exact",
    group_column: str | None = None,
    group_table: str | Path | Source | None = None,
    seed: int = 0,
    reassign: bool = False,
    pictures: str | Path | None = None,
    copy_to: str | Path | None = None,
    link_to: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Split:
    """Deal images out to train, val and test: stratified by class, groups undivided, by the seed and the images' own paths.

    What has a split keeps it: by the source (its folders, its column), or by an earlier table at ``output``, in which new
    images are dealt out beside the old ones. A split that the source lacks is drawn from train.

    Args:
        source: as for ``extract``, or a cache. output: a CSV to write, ``path,label,split``, a source for ``extract``.
        val, test: share of all labelled images, in 0..1; None: no such split, but what there is stays.
        groups: what stays together: ``exact`` copies, ``near`` copies (of a cache, by its features), or ``none``.
        group_column: of the table: images with the same text in it stay together, too (patient, place); empty: alone.
        group_table: a table with that column, where ``source`` is none; joined by path.
        seed: another one deals otherwise. reassign: deal all images anew, whatever splits they have.
        pictures: of a cache: the folder of its images; looked for near the cache when None.
        copy_to, link_to: a new or empty folder for SPLIT/CLASS/image: copies, or hard links.
        device: of the search for near copies. workers: threads that read files.
        progress: called with (done, to do, what); a bar in notebooks when None.

    Raises:
        UsageError: impossible values. SourceError: no image; a group lies in several of the splits that are to be kept; the table
        of groups lacks images. StorageError: what is to be written is there already, and something else.
    """
    started = time.perf_counter()
    shares = _check(val=val, test=test, groups=groups, seed=seed, copy_to=copy_to, link_to=link_to)
    check_runtime_options(device, workers=workers)
    if groups == "near":
        check_device(device)
    output, folder, pictures = (
        None if path is None else as_path(path) for path in (output, copy_to or link_to, pictures)
    )
    output, folder = (None if path is None else named(path) for path in (output, folder))
    source, table = _with_column(source, group_column, group_table)
    if folder is not None:
        check_new(folder)
    if output is not None:
        check_manifest(output, None if isinstance(source, ImageList) else source.path)
    read = _read(source, groups, pictures, output)
    images = read.images
    if output is not None:
        check_classes(images)
    if folder is not None:
        if not read.known:
            raise UsageError(f"the images of {source} were not found near it; say where they are, as --source FOLDER")
        check_apart(folder, images)
    prefix = prefix_of(output, images.root) if output is not None and read.known else None
    old = np.zeros(len(images), np.uint8) if reassign else _old_splits(images, output, prefix)
    rows, left_out = _dealt(read)
    together, splits = np.arange(len(images)), np.zeros(len(images), np.uint8)
    with bar_in_notebook(progress, lambda done, total, what: (done, total, f"{what}: {done} of {total}")) as report:
        named_groups = _named_groups(read, rows, table)
        copies = _copies(read, rows, groups, device=device, workers=workers or 8, progress=report)
        together[rows] = rows[joined(copies, named_groups)]
        _check_crossing(images, together[rows], old[rows], rows)
        splits[rows] = _deal(images.take(rows), together[rows], old[rows], shares, seed=seed)
        images = dataclasses.replace(images, splits=splits)
        if folder is not None:
            place_images(images, folder, link=link_to is not None, progress=report)
        if output is not None:
            write_manifest(output, images, together, prefix=prefix or "")
    moved = {name: int(((old == _TRAIN) & (splits == SPLITS.index(name))).sum()) for name in ("val", "test")}
    return Split(
        images,
        together,
        output,
        folder,
        asked={SPLITS[number]: share for number, share in shares.items()},
        kind=groups,
        column=_column(table or source),
        kept=int(((old > 0) & (old == splits)).sum()),
        moved={name: count for name, count in moved.items() if count},
        left_out=left_out,
        next=_next(read, output, folder, prefix),
        seed=seed,
        seconds=round(time.perf_counter() - started, 3),
    )


def _with_column(
    source: AnySource | ImageList, column: str | None, table: str | Path | Source | None
) -> tuple[Source | ImageList, Source | None]:
    """``source``, and the other table that has the column of groups, if there is one."""
    if table is None:
        return with_group_column(source, column), None
    table = Source.of(table)
    return with_group_column(source, None), dataclasses.replace(table, group_column=column or table.group_column)


def _column(source: Source | ImageList) -> str | None:
    """What groups are called, beside copies."""
    if isinstance(source, ImageList):
        return "groups of the list" if source.groups else None
    return source.group_column


def _old_splits(images: ImageList, output: Path | None, prefix: str | None) -> Splits:
    """(N,) what the source says, or an earlier table at ``output``, 0: nothing."""
    if output is None or not output.exists():
        return images.splits.copy()
    earlier = known_splits(output, images, prefix or "")
    return np.where(earlier > 0, earlier, images.splits)


def _dealt(read: _Read) -> tuple[Indices, dict[str, int]]:
    """Which images are dealt out, and why how many are not."""
    labelled = read.images.labels >= 0
    unsaid = (read.images.sizes < 0) & (read.images.mtimes >= 0)  # of Parquet
    usable = {
        "no label": labelled | (not labelled.any()),
        "no readable file": (read.images.sizes > 0) | unsaid | (read.cache is not None),
    }
    rows = np.flatnonzero(np.all([*usable.values()], axis=0))
    if not len(rows):
        raise SourceError(f"{read.images.root} has no image that could be dealt out: no file of them can be read")
    return rows, {reason: int((~mask).sum()) for reason, mask in usable.items() if not mask.all()}


def _check(
    *, val: float | None, test: float | None, groups: str, seed: int, copy_to: object, link_to: object
) -> dict[int, float]:
    """Position of val and test -> share, of those that are asked for. Raises UsageError."""
    given = {"val": val, "test": test}
    shares = {SPLITS.index(name): float(share) for name, share in given.items() if share is not None}
    for number, share in shares.items():
        if not 0 < share < 1:
            raise UsageError(
                f"{SPLITS[number]} must be a share between 0 and 1, such as 0.1, found {share:g}; leave it out for none"
            )
    if not shares:
        raise UsageError("say how much of the images is val or test, as --val 0.1 --test 0.2")
    if sum(shares.values()) >= 1:
        raise UsageError(
            f"val and test are {sum(shares.values()):g} of the images together, which leaves none to train on"
        )
    if groups not in get_args(Groups):
        raise UsageError(f"unknown groups {groups!r}; choose one of {', '.join(get_args(Groups))}")
    if copy_to is not None and link_to is not None:
        raise UsageError("--copy-to and --link-to exclude each other; choose one")
    check_whole("seed", seed, 0)
    return shares


def _read(source: Source | ImageList, groups: Groups, pictures: Path | None, output: Path | None) -> _Read:
    """The images of a source or cache, without a look into them."""
    if isinstance(source, ImageList) or not is_cache(source.path):
        if groups == "near":
            name = "SOURCE" if isinstance(source, ImageList) else source.typed
            raise UsageError(
                f"near copies are found by features, which a cache has: `featcache extract {name} -o features.h5`, then "
                "`featcache split features.h5 --groups near ...`"
            )
        if pictures is not None:
            raise UsageError("--source is the folder of a cache's images; leave it out")
        if not isinstance(source, ImageList):
            words = ("split", HERE, *(() if output is None else ("-o", output)))
            check_path(source.path, "images or cache", words)
        return _Read(list_images(source, counted=False), None, True)
    return _read_cache(source, pictures)


def _read_cache(source: Source, pictures: Path | None) -> _Read:
    """The same of a cache; ``pictures``: the folder of its images, if it was said."""
    if source.root is not None:
        raise UsageError(
            f"--root says how a table is read, and {source} is a cache; --source says where its images are"
        )
    source.check_options("cache")
    if pictures is not None and not is_home(pictures):
        raise SourceError(f"--source {pictures} is no folder; give the one that the images of {source} lie in")
    cache = FeatureCache.open(source.path)
    if cache.refused:
        were = quantity(len(cache.refused), "image was", "images were")
        log.info("%s: %s refused when it was made, and left out", source, were)
    looked_for = [(cache.paths[row], cache.rows.digests[row].tobytes()) for row in some_of(len(cache))]
    if pictures is None:
        pictures = find_home(looked_for, places_in(Path(), cache.path.parent), whole=True)
        where = f"taken from {pictures}" if pictures else "not found near it; --source FOLDER says where they are"
        log.info("%s: its images are %s", source, where)
    elif find_home(looked_for, [pictures]) is None:
        names = " or ".join(printable(name) for name, _ in looked_for)
        raise SourceError(
            f"--source {pictures} has no {names} with the bytes that {source} was made of; give the folder of its images"
        )
    columns = {name: getattr(cache.rows, name) for name in ("labels", "splits", "sizes", "mtimes")}
    images = ImageList(pictures or Path(), cache.paths, classes=cache.classes, **columns)
    return _Read(images, cache, pictures is not None)


def _copies(
    read: _Read, rows: Indices, groups: Groups, *, device: str, workers: int, progress: Progress | None
) -> Indices:
    """(n,) of ``rows`` the first copy of each, a position among them."""
    alone = np.arange(len(rows))
    if groups == "none":
        return alone
    if read.cache is None:
        found = digests_of_suspects(read.images, rows.tolist(), workers=workers)
        return group_by_name([found[row].hex() if row in found else "" for row in rows.tolist()])
    digests = read.cache.rows.digests
    if groups == "exact" or len(rows) < 2:
        return first_copies(digests[rows])
    read.cache.check_finite(rows)
    seconds, size = estimate(len(rows), read.cache.dim)
    if seconds > _LONG:
        log.info("near copies: comparing takes about %d s and %.1f GB", seconds, size / 1e9)

    def say(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(done, total, what)

    with read.cache.reader() as features:
        nearest = nearest_rows(features, rows, device=device, progress=say("features"))
    check = PixelCheck(read.images.root, read.images.paths, digests, workers=workers) if read.known else None
    if check is None:
        log.info("near copies are judged by their features alone, as there are no pixels to compare")
    copies = find_near_copies(nearest, digests, check=check, progress=say("pixels"))
    _, first, group = np.unique(copies.groups, return_index=True, return_inverse=True)
    # A copy of one picture of a group, not of all, is none of that group, and still must not lie on the other side.
    links = [
        (each.row, each.other) for each in copies.findings if each.other is not None and each.verified is not False
    ]
    return joined(first[group], pairs=np.searchsorted(rows, np.array(links, np.intp).reshape(-1, 2)))


def _named_groups(read: _Read, rows: Indices, table: Source | None) -> Indices:
    """(n,) of ``rows`` the first of the group that a column names, a position among them."""
    paths = [read.images.paths[row] for row in rows.tolist()]
    if table is not None:
        names = read_groups(table, paths)
    elif read.images.groups:
        names = [read.images.groups[row] for row in rows.tolist()]
    else:
        return np.arange(len(rows))
    if without := names.count(""):
        log.info("%s no group and stand alone", quantity(without, "image has", "images have"))
    return group_by_name(names)


def _check_crossing(images: ImageList, groups: Indices, old: Splits, rows: Indices) -> None:
    """Raise SourceError if one of (n,) ``groups`` of ``rows`` lies in several splits that are to be kept."""
    groups, rows, old = groups[old > 0], rows[old > 0], old[old > 0]
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    differs = np.flatnonzero(old != old[first][group])
    if len(differs):
        count = len(np.unique(group[differs]))
        pair = (first[group[differs[0]]], differs[0])
        names = " and ".join(f"{printable(images.paths[rows[at]])} in {SPLITS[old[at]]}" for at in pair)
        raise SourceError(
            f"{count} group{'s' * (count > 1)} of images that belong together {'lie' if count > 1 else 'lies'} in several splits, "
            f"the first: {names}; --reassign deals all images anew, --groups none (and no column of groups) leaves them there"
        )


def _deal(images: ImageList, groups: Indices, old: Splits, shares: Mapping[int, float], *, seed: int) -> Splits:
    """(n,) splits; first new images beside old ones, then splits that nothing is in yet."""
    labels = images.labels - images.labels.min()  # all are -1 where there are none
    ordered = sorted(range(len(images)), key=lambda row: rank(images.paths[row], seed))
    ranks = np.empty(len(images), np.intp)
    ranks[ordered] = np.arange(len(images))
    there = {split: share for split, share in shares.items() if (old == split).any()}
    lacking = {split: share for split, share in shares.items() if split not in there}
    splits = old.copy()
    if old.any() and not old.all():
        splits = deal(labels, groups, ranks=ranks, shares=there, fixed=old)
    if lacking:
        splits = deal(labels, groups, ranks=ranks, shares=lacking, fixed=np.where(splits == _TRAIN, 0, splits))
    return splits


def _next(read: _Read, output: Path | None, folder: Path | None, prefix: str | None) -> str:
    """The command that embeds what was written."""
    if output is None:
        return "" if folder is None else f"featcache extract {typed(folder)} -o features.h5"
    root = "" if prefix is not None and read.known else f" --root {typed(read.images.root) if read.known else 'FOLDER'}"
    return f"featcache extract {typed(output)}{root} -o features.h5"
