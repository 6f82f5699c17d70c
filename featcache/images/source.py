"""Find the images of a source, without decoding any: their paths, labels and splits.

In: a ``Source``: a folder or table, and how to read it. Out: an ``ImageList``, in a stable order; and a table of it for the user.
The user's files are only ever read.
"""

import dataclasses
import itertools
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import Refusal, SourceError, StorageError, UsageError
from featcache.images.archives import is_home
from featcache.images.folders import Listing, list_folder
from featcache.images.layout import CLASS_LEVELS, alike, some
from featcache.images.metadata import describe
from featcache.images.parquet import is_table_of_paths
from featcache.images.records import STDIN
from featcache.images.shards import find_shards, list_shards
from featcache.images.tables import is_table, list_table
from featcache.spec import SPLITS
from featcache.system.addresses import shown
from featcache.system.display import aligned, all_refused, count_rows, html_table, quantity
from featcache.system.path_advice import HERE, check_path, missing
from featcache.system.path_kinds import AnyPath, Kind, as_path, kind_of

log = logging.getLogger("featcache")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where images are, and what decides how it is read where there are several ways; a path alone is enough for most.

    Attributes:
        path: a folder of class folders; a folder with split folders on top of that (train, val, test, and the names people use
            for them); a flat folder (no labels); a table with a column of paths, or a list of paths, see ``tables.py``; ``-``,
            the table or list that the command line finds on stdin. A folder may hold a ``metadata.csv``, see ``metadata.py``. A
            tar, gzipped tar, zip or Parquet file, a folder of such files alone, or a pattern of names, see ``shards.py``.
        class_level: of a folder: which one inside of it names the class, 1: directly in it, 2: one further down, 3: two; when
            None, 2 below folders called like splits, else 1.
        root: of a table: what its paths are relative to, and must not lead out of; when None the folder of the table, of stdin
            the current one.
        path_column, label_column, split_column: of a table: headers; known by the names people use for them when None. For label
            and split ``none``: it has no such column. Of Parquet ``path_column`` may be one of the bytes of images. group_column:
            of what belongs together (patient, place), for ``split`` and ``finetune``.

    Raises:
        UsageError: ``class_level`` is impossible; ``path`` or ``root`` is no path.
    """

    path: Path = dataclasses.field(kw_only=False)
    class_level: int | None = None
    root: Path | None = None
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None

    def __post_init__(self) -> None:
        for name in ("path", "root"):
            if (value := getattr(self, name)) is not None or name == "path":
                object.__setattr__(self, name, as_path(value))
        if self.class_level not in (None, *CLASS_LEVELS):
            raise UsageError(f"the class level must be one of {CLASS_LEVELS}, found {self.class_level}")

    @classmethod
    def of(cls, source: "AnySource") -> "Source":
        """``source``, of which perhaps only the path is given. Raises UsageError: it is no path."""
        return source if isinstance(source, Source) else cls(as_path(source))

    def __str__(self) -> str:
        return "stdin" if self.path == STDIN else shown(self.path)

    @property
    def options(self) -> dict[str, object]:
        """What is given beside the path, by its name on the command line."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return {f"--{name.replace('_', '-')}": value for name, value in given.items() if value is not None}

    @property
    def typed(self) -> str:
        """As a user would type it in a command."""
        words = [self.path, *itertools.chain.from_iterable(self.options.items())]
        return " ".join(shlex.quote(shown(str(word))) for word in words)

    @property
    def columns(self) -> dict[str, str | None]:
        """What the user said about the columns of a table."""
        columns = {"path": self.path_column, "label": self.label_column, "split": self.split_column}
        return columns | {"group": self.group_column}

    def check_options(self, kind: str) -> None:
        """Raise UsageError if an option is given that does not apply to such a source.

        ``kind``: ``folder``, ``folder with metadata``, ``archive``, ``Parquet file``, ``table``, or any other to which none applies,
        as ``cache``.
        """
        columns = {f"--{role}-column" for role in self.columns}
        applies = {
            "folder": {"--class-level"},
            "folder with metadata": {"--class-level", *columns},
            "table": {"--root", *columns},
            "archive": {"--class-level"},
            "Parquet file": {"--path-column", "--label-column", "--split-column"},
        }.get(kind, set())
        if wrong := [option for option in self.options if option not in applies]:
            what = "which folders name the classes" if wrong[0] == "--class-level" else "how a table is read"
            instead = (
                "name the table that has it, too (split: --group-table FILE; finetune: --groups FILE)"
                if wrong[0] == "--group-column"
                else "leave it out"
            )
            raise UsageError(
                f"{wrong[0]} says {what}, and {self} is {'an' if kind[0] == 'a' else 'a'} {kind}; {instead}"
            )


AnySource = AnyPath | Source
_NO_TIME = (10 * 365 + 2 + 2) * 86_400 * 10**9  # 2 January 1980: a day behind a zip's zero, wherever that is written


@dataclasses.dataclass(frozen=True, repr=False)
class ImageList:
    """The images of a source, sorted by path (table: in the order of its rows; archives: in their order).

    Attributes:
        root: what ``paths`` are relative to; it, or the path below it, may go through an archive.
        paths: N relative paths, POSIX separators; bytes that are not UTF-8 appear as surrogate escapes.
        labels: (N,) int32, index into ``classes``; -1 when unknown.
        classes: sorted class names over all splits, empty class folders included.
        splits: (N,) uint8, index into ``spec.SPLITS``.
        sizes, mtimes: (N,) int64, bytes and nanoseconds, as listed; -1: not known, of times also where they prove nothing. Of
            archives see ``archives.py``.
        refused: entries that were skipped without opening them, and why.
        refused_at: how many images are listed before each of these.
        groups: of each image what ``Source.group_column`` says, "" where nothing; empty without such a column.
    """

    root: Path
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    classes: tuple[str, ...]
    splits: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    refused: tuple[Refusal, ...] = ()
    refused_at: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        refused = f", {len(self.refused)} refused unopened" if self.refused else ""
        return f"ImageList({shown(self.root)!r}: {_counted(self)}{refused})"

    def _repr_html_(self) -> str:
        return html_table(self.count_rows(), caption=repr(self))

    def count_rows(self) -> list[list[str]]:
        """Images per class and split, with a header and a sum; empty if there are neither classes nor splits."""
        return count_rows(self.classes, self.labels, self.splits, names=SPLITS)

    def all_refused(self, refused: Mapping[int, str]) -> str:
        """What to say when not one image is left: those of the list were ``refused`` (number -> reason), too."""
        reasons = [*(Refusal(self.paths[index], reason) for index, reason in refused.items()), *self.refused]
        first = f"the first, {reasons[0].path}: {reasons[0].reason}"
        return f"{all_refused(len(reasons), self.root)}, {first}"

    def check_any(self) -> None:
        """Raise SourceError where not one image is left, as all that there was is refused unopened: no work is to start then."""
        if not len(self) and self.refused:
            raise SourceError(self.all_refused({}))

    def take(self, rows: npt.NDArray[np.intp]) -> "ImageList":
        """Return the list restricted to ``rows``, same classes and refusals."""
        picked = {name: getattr(self, name)[rows] for name in ("labels", "splits", "sizes", "mtimes")}
        at = tuple(np.searchsorted(rows, self.refused_at).tolist()) if len(self.refused_at) else ()
        groups = tuple(self.groups[row] for row in rows) if self.groups else ()
        paths = tuple(self.paths[row] for row in rows)
        return dataclasses.replace(self, paths=paths, refused_at=at, groups=groups, **picked)


def list_images(source: AnySource | ImageList, *, labelled: bool = True, counted: bool = True) -> ImageList:
    """List the images of ``source`` without decoding any, and log how many there are of each class in each split.

    Args:
        source: a folder, a table, or either with how to read it; a list is returned as it is.
        labelled: whether folders mean classes and splits; if not, any tree of folders will do, and nothing is counted.
        counted: whether the counts are logged.

    Raises:
        SourceError: missing, ambiguous, without a single image, or a table in an unknown encoding.
        UsageError: the table's header or a split name is not understood; an option does not apply.
    """
    if isinstance(source, ImageList):
        return source
    source = Source.of(source)
    path = source.path
    names = is_table_of_paths(path, source.path_column)  # of images, which other Parquet files hold
    shards = None if names else find_shards(path)
    if shards:
        rows = shards.archives[0].suffix.lower() == ".parquet" or kind_of(shards.archives[0]) is Kind.PARQUET
        source.check_options("Parquet file" if rows else "archive")
        listing = list_shards(str(source), shards, source.columns, labelled=labelled, class_level=source.class_level)
    elif os.path.isdir(path):  # noqa: PTH112 - of any name, wherever it lies
        source.check_options("folder with metadata" if labelled else "folder")
        listing = list_folder(path, labelled=labelled, class_level=source.class_level)
        source.check_options("folder with metadata" if listing.metadata else "folder")
        if listing.metadata:
            listing = describe(listing, source.columns)
    elif names or is_table(path):
        source.check_options("table")
        if not is_home(root := source.root or path.parent):
            raise SourceError(f"--root {root} is no folder; give the one that the paths of {path} are relative to")
        listing = list_table(path, root, source.columns, labelled=labelled)
    else:
        check_path(path, "images", ("extract", HERE, "-o", "features.h5"))
        if os.path.exists(path):  # noqa: PTH110
            raise SourceError(f"{path} is {kind_of(path).value}; expected a folder of images, or a table called .csv")
        raise SourceError(
            missing(path, "give a folder of images or a CSV with the header path,label,split", wanted="images")
        )
    if not listing.entries and not listing.refused:
        photo = path / "CLASS" / "photo.jpg" if labelled else path / "photo.jpg"
        expected = "rows below its header" if is_table(path) else f"files such as {photo}"
        raise SourceError(f"no image found in {source}; expected {expected}")
    images = _image_list(listing, grouped=source.group_column is not None, packed=shards is not None)
    if labelled:
        _say(source, images, counted=counted)
    return images


def holds_images(path: Path) -> bool:
    """Whether ``path`` is listed, as a folder, table or archives are; else it is one file."""
    return os.path.isdir(path) or is_table(path) or find_shards(path) is not None  # noqa: PTH112 - of any name


def check_apart(folder: Path, source: AnySource | ImageList) -> None:
    """Raise StorageError if ``folder`` lies among the images."""
    root = source.root if isinstance(source, ImageList) else Source.of(source).path
    if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        raise StorageError(
            f"cannot write {folder}: it lies in {root}, where a folder counts as a class; choose another one"
        )


def _image_list(listing: Listing, *, grouped: bool, packed: bool) -> ImageList:
    """packed: all of them lie in archives."""
    found = listing.entries
    classes = tuple(sorted(listing.classes | {entry.label for entry in found if entry.label is not None}))
    index = {name: number for number, name in enumerate(classes)}
    return ImageList(
        root=listing.root,
        paths=tuple(entry.path for entry in found),
        labels=np.array([-1 if entry.label is None else index[entry.label] for entry in found], np.int32),
        classes=classes,
        splits=np.array([entry.split for entry in found], np.uint8),
        sizes=np.array([entry.size for entry in found], np.int64),
        mtimes=_proving(np.array([entry.mtime for entry in found], np.int64), packed=packed),
        refused=tuple(listing.refused),
        refused_at=tuple(listing.refused_at),
        groups=tuple(entry.group for entry in found) if grouped else (),
    )


def _proving(times: npt.NDArray[np.int64], *, packed: bool) -> npt.NDArray[np.int64]:
    """(N,) ``times``, -1 where they prove nothing: another image in the file's place may well have the same.

    That are those that programs put in the place of a time, such as 0, or the first one that a zip can hold, and whole seconds
    that several files share: they may be of no clock, but of a package. Files of one archive share its own time by right.
    """
    proving = times > _NO_TIME
    if not packed:
        _, kind, files = np.unique(times, return_inverse=True, return_counts=True)
        proving &= (times % 10**9 != 0) | (files[kind] == 1)
    return np.where(proving, times, -1)


def _counted(images: ImageList) -> str:
    """How many images and classes there are, in words."""
    named = quantity(len(images.classes), "class") if images.classes else "no classes"
    return f"{quantity(len(images), 'image')}, {named}"


def _say(source: Source, images: ImageList, *, counted: bool) -> None:
    """Log the table, and what is probably a mistake in the names of classes."""
    refused = f", {len(images.refused)} refused unopened" if images.refused else ""
    first = f" (the first, {images.refused[0].path}: {images.refused[0].reason})" if images.refused else ""
    log.info("%s: %s%s%s", source, _counted(images), refused, first)
    for line in aligned(images.count_rows()) if counted else ():
        log.info("%s", line)
    if groups := [" and ".join(map(ascii, names)) for names in alike(images.classes)]:
        differ = "classes that differ in capitals, blanks or Unicode form alone count as different ones"
        log.warning("%s: %s: %s", source, differ, some(groups))
