"""Images that belong together: of one patient, one place, one scene. In: names of groups, or a table of them. Out: first members.

A partition of N images is an array (N,): for each the number of the first image of its group, its own where it stands alone.
"""

import dataclasses
import itertools
import logging
import posixpath
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import SourceError, UsageError
from featcache.images.columns import NONE, printable
from featcache.images.home import some_of
from featcache.images.layout import some
from featcache.images.records import without_escape
from featcache.images.source import AnySource, ImageList, Source
from featcache.images.tables import Files, entries, is_table, read_columns
from featcache.spec import SPLITS
from featcache.system.display import quantity
from featcache.system.path_kinds import kind_of

log = logging.getLogger("featcache")
Indices = npt.NDArray[np.intp]
Grouping = str | Path | Source | Sequence[Any]  # a table with a column of groups, or a name for each image
_Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Groups:
    """What belongs together: a name for each of N images, "" for those that stand alone; the column that says so."""

    names: tuple[str, ...]
    column: str

    @classmethod
    def read(
        cls, given: Grouping | None, paths: Sequence[str], *, training: _Mask, column: str | None = None
    ) -> "Groups":
        """Of a table, or as they are.

        Args:
            given: a table in which ``column`` says what belongs together, joined by path; or a name for each of the N ``paths``,
                as ``group_name`` takes them. training: (N,) which images train: the table has to name these.

        Raises:
            UsageError: a column without a table, a table without a column, or not as many names as images. SourceError: as
            ``read_groups``.
        """
        if given is None:
            raise UsageError(f"--group-column {column} is of a table; say which, as --groups TABLE")
        if isinstance(given, str | Path | Source):
            table = Source.of(given)
            column = column or table.group_column
            if column is None:
                raise UsageError(
                    f"--groups {table} needs the column that says what belongs together, as --group-column patient"
                )
            table = dataclasses.replace(table, group_column=column)
            names = read_groups(table, paths, needed=training.tolist())
        elif len(names := [group_name(name) for name in given]) != len(paths):
            raise UsageError(f"groups are {len(names)} names, expected one for each of the {len(paths)} images")
        if alone := sum(not names[row] for row in np.flatnonzero(training).tolist()):
            log.info("%d of %d training images have no group and stand alone", alone, training.sum())
        return cls(tuple(names), column or "as given")

    def across_splits(
        self, training: _Mask, splits: npt.NDArray[np.integer], paths: Sequence[str]
    ) -> dict[str, str | int]:
        """How many groups train, and how many images of val and test are of one of them, which is said; as JSON values."""
        trained = {self.names[row] for row in np.flatnonzero(training).tolist()} - {""}
        later = np.flatnonzero((splits > SPLITS.index("train")) & ~training).tolist()
        across = [row for row in later if self.names[row] in trained]
        if across:
            log.warning(
                "%s of groups that train, the first %s of %s: a score on them flatters; "
                "`featcache split` keeps groups on one side",
                quantity(len(across), "image of val or test is", "images of val or test are"),
                printable(paths[across[0]]),
                printable(self.names[across[0]]),
            )
        return {"column": self.column, "training": len(trained), "across_splits": len(across)}


def group_name(given: Any) -> str:
    """A group's name as text; "" for what stands alone: None, NaN, pandas' NA or NaT, or an empty text."""
    try:
        return "" if given is None or given != given else str(given)
    except TypeError:  # NA, which is neither equal to itself nor unequal
        return ""


def with_group_column(source: AnySource | ImageList, column: str | None) -> Source | ImageList:
    """``source``, read with its own column of groups if one is named. Raises UsageError: a list of images has no columns."""
    if isinstance(source, ImageList):
        if column is not None:
            raise UsageError(
                f"a list of images has no column {column!r}; list it with Source(..., group_column={column!r})"
            )
        return source
    source = Source.of(source)
    return source if column is None else dataclasses.replace(source, group_column=column)


def group_by_name(names: Sequence[str]) -> Indices:
    """(N,) the first image of each one's name; images without a name ("") stand alone."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(name, row) if name else row for row, name in enumerate(names)], np.intp)


def first_members(groups: Indices) -> Indices:
    """(N,) numbers that the images of a group share -> (N,) the first image of each one's group."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return first[group]


def joined(*partitions: Indices, pairs: Indices | None = None) -> Indices:
    """(N,) the finest partition that keeps together what any of ``partitions`` does, and (P, 2) ``pairs``: connected components."""
    result = np.arange(len(partitions[0]))
    while True:
        before = result.copy()
        for partition in partitions:
            lowest = np.full(len(result), len(result))
            np.minimum.at(lowest, partition, result)
            result = lowest[partition]
        if pairs is not None and len(pairs):
            lower = result[pairs].min(axis=1)
            np.minimum.at(result, pairs[:, 0], lower)
            np.minimum.at(result, pairs[:, 1], lower)
        result = result[result]  # of a chain this halves the length
        if (result == before).all():
            return result


def read_groups(table: Source, paths: Sequence[str], *, needed: Sequence[bool] | None = None) -> list[str]:
    """The group of each of N images by a table that names them; "" where its cell is empty.

    Paths are compared as text, in the spellings that people use. Where all of the table's lead through folders that ``paths``
    leave out, or the other way round, these are passed over.

    Args:
        table: a CSV, TSV or JSON lines with a column of paths, and its ``group_column``. paths: of the images.
        needed: (N,) which images it has to name; all when None.

    Raises:
        SourceError: the table is missing, cannot be read, names an image twice in different groups, or lacks some.
        UsageError: no column is called so.
    """
    if not is_table(table.path):
        what = f"is {kind_of(table.path).value}" if table.path.exists() else "does not exist"
        raise SourceError(f"{table} {what}; expected a table with a column of paths and one of groups")
    table.check_options("table")
    chosen = table.columns | {"label": NONE, "split": NONE}
    read, columns = read_columns(table.path, Files(table.path.parent), chosen)
    if columns.group is None:
        raise UsageError(
            f"{table} has no header, or no column of groups is named; say which, as --group-column patient"
        )
    found: dict[str, str] = {}
    for entry, where in entries(read, columns):
        if found.setdefault(path := _plain(without_escape(entry.path.strip())), entry.group) != entry.group:
            raise SourceError(f"{where}: {path} is listed twice, in the groups {found[path]!r} and {entry.group!r}")
    wanted = [True] * len(paths) if needed is None else needed
    keys = _as_in(found, [*map(_plain, paths)], wanted)
    missing = [path for path, key, each in zip(paths, keys, wanted, strict=True) if each and key not in found]
    if missing:
        first = printable(next(iter(found), "none"))
        if len(missing) == sum(wanted):
            raise SourceError(
                f"{table} has none of the images: its first path is {first}, theirs {printable(missing[0])}; give their table"
            )
        raise SourceError(
            f"{table} has no row for {len(missing):,} of {quantity(sum(wanted), 'image')} ({some(missing)}); add them, with an "
            f"empty cell where an image stands alone; its own first path is {first}"
        )
    return [found.get(key, "") for key in keys]


def _plain(path: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(path.replace("\\", "/")))


def _as_in(table: dict[str, str], names: list[str], wanted: Sequence[bool]) -> list[str]:
    """``names`` as the table has them: as they are, below folders of its own, without folders of theirs, or without suffix."""
    asked = [*itertools.compress(names, wanted)]
    probes = [asked[k] for k in some_of(len(asked))]  # one of them may be missing
    longer = {path[: -len(probe)] for probe in probes for path in table if path.endswith(f"/{probe}")}
    shorter = {probe[: -len(path)] for probe in probes for path in table if path and probe.endswith(f"/{path}")}
    ways = [names, *([prefix + name for name in names] for prefix in sorted(longer))]
    ways += [[name.removeprefix(prefix) for name in names] for prefix in sorted(shorter)]
    stems = [posixpath.splitext(name)[0] for name in names]
    if len({*stems}) == len(names):
        ways.append(stems)
    return max(ways, key=lambda way: sum(name in table for name in itertools.compress(way, wanted)))
