"""Read archives like a folder. In: an archive, a folder of nothing else, or a pattern. Out: a ``Listing``, in the order of the archives.

Folders inside of a tar or zip mean what they mean on a disk (``layout.py``); a folder that holds all the others means nothing, unless
it is the only class of the folder that was packed. In shards as WebDataset writes them a file beside the image, of the same name up
to the first dot, says its class: ``.cls``, ``.json`` with a label, ``.txt``; a number counts the lines of ``classes.txt``. Parquet
has columns (``parquet.py``). Names of shards may say the split, as those of folders do: ``train-000.tar``. Paths: see
``archives.py``.
"""

import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from featcache.errors import NoAccessError, Refusal, RefusedImage, SourceError
from featcache.images.archives import Archive, archive_in, is_archive, look_through, stat_member
from featcache.images.columns import is_label, printable, shown, split_in, warn_of_no_classes
from featcache.images.folders import HIDDEN, OTHERS, Entry, Listing, has_image_suffix, meaning, say_passed_over
from featcache.images.layout import is_system, read_layout, some, split_of
from featcache.images.locations import expand, open_binary
from featcache.system.addresses import address_of
from featcache.system.addresses import shown as shown_path
from featcache.system.display import quantity
from featcache.system.path_advice import fetch_line, typed
from featcache.system.path_kinds import Kind, begins_like_an_image, kind_by_name, kind_of
from featcache.system.safe_load import parse_json

log = logging.getLogger("featcache")
_ARCHIVES = (Kind.ARCHIVE, Kind.PARQUET)
_CLASSES = "classes.txt"
_MOST_FOLDERS = 10_000  # that are looked into for archives
_MAX_CLASSES, _MAX_LABEL = 2**24, 200  # bytes of the file, characters
_BESIDE = (".cls", ".json", ".txt")  # in this order: the first that there is says the class
_TABLES = ("metadata.csv", "metadata.jsonl")


class Shards(NamedTuple):
    """Archives that are one source: where they lie, and what paths are relative to; ``inside``: a folder in the only one."""

    archives: tuple[Path, ...]
    root: Path
    inside: str = ""


def find_shards(path: Path) -> Shards | None:
    """The archives that ``path`` means; None if it means something else. Raises UsageError, SourceError: of patterns, ``expand``."""
    kind = kind_of(path)
    if kind in (*_ARCHIVES, Kind.PLACE) and address_of(path):
        return _find_elsewhere(path)
    if kind in _ARCHIVES:
        return Shards((path,), path)
    if kind is Kind.BARE:
        found = tuple(sorted(_archives_below(path)))
        return Shards(found, path) if found else None
    if kind is Kind.MISSING and (through := archive_in(path)):
        return None if _is_file(*through) else Shards((through[0],), path, through[1])
    if kind is not Kind.MISSING or not (glob.has_magic(str(path)) or "{" in path.name) or not is_archive(path):
        return None
    return _several(expand(path))


def _is_file(location: Path, name: str) -> bool:
    """Whether an archive holds a file of that name, not a folder."""
    try:
        stat_member(location, name)
    except RefusedImage:
        return False
    return True


def _find_elsewhere(path: Path) -> Shards:
    locations = [location for location in expand(path) if is_archive(location)]
    if not locations:
        line, target = fetch_line(path)
        what = "holds no archive directly, and images one by one are not read from there"
        raise SourceError(f"{typed(path)} {what}; fetch them: `{line}`, and give the folder {typed(target)}")
    return Shards((path,), path) if locations == [path] else _several(locations)


def _several(locations: list[Path]) -> Shards:
    return Shards(tuple(locations), Path(os.path.commonpath([location.parent for location in locations])))


def list_shards(
    source: Path | str, shards: Shards, chosen: Mapping[str, str | None], *, labelled: bool, class_level: int | None
) -> Listing:
    """The images in ``shards``, if ``labelled`` with classes and splits.

    Args:
        source: as typed. chosen: headers of columns, of Parquet. class_level: as for a folder.

    Raises:
        SourceError: it can be read in two ways; the only archive cannot be read. UsageError: the columns or splits cannot.
    """
    forms = {location.suffix.lower() == ".parquet" for location in shards.archives}
    if len(forms) > 1:
        raise SourceError(f"{source} holds Parquet files and other archives; give the ones or the others")
    reading = _Reading(shards, chosen, labelled=labelled)
    for location in shards.archives:
        reading.take(location)
    say_passed_over(source, reading.passed)
    entries, classes = reading.meant(source, class_level) if labelled else (reading.entries, set[str]())
    if reading.parquet:
        warn_of_no_classes(source, (entry.label for entry in entries))
    return Listing(shards.root, entries, classes, reading.refused, reading.refused_at)


class _Reading:
    """What was found in the archives so far.

    Attributes:
        entries: images; the labels of Parquet are theirs. inner: of each the folder inside of its archive. beside: of each what a file
        beside it says, and which kind of file.
    """

    def __init__(self, shards: Shards, chosen: Mapping[str, str | None], *, labelled: bool) -> None:
        self.shards, self.chosen, self.labelled = shards, chosen, labelled
        self.entries: list[Entry] = []
        self.inner: list[str] = []
        self.beside: list[tuple[str, str] | None] = []
        self.refused: list[Refusal] = []
        self.refused_at: list[int] = []
        self.passed: Counter[tuple[str, str]] = Counter()
        self.folders, self.classes, self.tables = set[str](), set[str](), set[str]()
        self.names: tuple[str, ...] | None = None  # of classes, by number
        self.parquet = False
        self._alone = len(shards.archives) == 1 and shards.root in (
            shards.archives[0],
            shards.archives[0] / shards.inside,
        )

    def take(self, location: Path) -> None:
        """Look through one archive. Raises SourceError: the only one cannot be read."""
        prefix = "" if self._alone else f"{location.relative_to(self.shards.root).as_posix()}/"
        said: dict[str, tuple[str, str]] = {}
        try:
            archive = look_through(
                location,
                (lambda name, text: self._note(said, name, text)) if self.labelled else None,
                column=self._column,
            )
            split = 0 if self._alone else _split_of_shard(prefix.rstrip("/"))
            self._take_rows(archive, prefix, split) if archive.is_parquet else self._take_files(
                archive, prefix, split, said
            )
        except RefusedImage as error:
            if len(self.shards.archives) == 1:
                raise SourceError(f"{shown_path(location)}: {error}") from error
            self._refuse(prefix.rstrip("/"), str(error))
            return
        for path, reason in archive.refused:
            self._refuse(f"{prefix}{path}" if path else prefix.rstrip("/") or location.name, reason)
        archive.members, archive.refused = [], []

    @property
    def _column(self) -> str:
        """Of Parquet, that of images: named by the user, or part of the path."""
        return self.chosen["path"] or self.shards.inside

    def _refuse(self, path: str, reason: str) -> None:
        self.refused.append(Refusal(path, reason))
        self.refused_at.append(len(self.entries))

    def _take_rows(self, archive: Archive, prefix: str, split: int) -> None:
        rows, self.parquet = archive.rows(self._column), True
        inside = f"{self.shards.inside}/" if self.shards.inside else ""
        if inside not in ("", rows.prefix):
            raise RefusedImage(
                f"{self.shards.inside} is no choice of a column: it has one of images; give the file itself"
            )
        labels: Iterator[str | None] = iter(())
        splits: Iterator[str | None] = iter(())
        if self.labelled:
            columns = rows.columns(self.chosen, str(archive.location))
            log.debug("%s: image from %s, label from %s", archive.location, columns.image, columns.label or "nowhere")
            self.classes |= {*columns.names}
            name = str(archive.location)
            labels = rows.values(columns.label, name, columns.names) if columns.label else labels
            splits = rows.values(columns.split, name) if columns.split else splits
        for member in archive.members:
            label, cell = next(labels, None), next(splits, None)
            at = split if cell is None else split_in(columns.split, cell)
            if at is None:
                raise SourceError(
                    f"{archive.location}, row {member.name}: {cell!r} is no split; expected train, val or test"
                )
            self.entries.append(Entry(prefix + member.name.removeprefix(inside), member.size, archive.mtime, label, at))

    def _take_files(self, archive: Archive, prefix: str, split: int, said: Mapping[str, tuple[str, str]]) -> None:
        inside, names = f"{self.shards.inside}/" if self.shards.inside else "", dict[str, str]()
        left, archive.members = archive.members[::-1], []
        while left:  # each is let go of once it is an entry: there may be millions
            member = left.pop()
            if not member.name.startswith(inside):
                continue
            name = member.name[len(inside) :]
            folder, _, file = name.rpartition("/")
            folder = names.setdefault(folder, folder)
            if odd := next((each for each in name.split("/") if each.startswith(".") or is_system(each)), None):
                self.passed[HIDDEN, odd] += 1
            elif not file:
                self.folders |= {*_with_parents(folder)}
            elif file in _TABLES:
                self.tables.add(prefix + name)
            elif has_image_suffix(file) or self._begins_like_one(archive, member.name):
                self.folders |= {*_with_parents(folder)}
                self.entries.append(Entry(prefix + name, member.size, archive.mtime, None, split))
                self.inner.append(folder)
                self.beside.append(said.get(_key(member.name)))
            elif not (file.endswith(_BESIDE) and _key(member.name) in said) and file != _CLASSES:
                suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122
                self.passed[OTHERS, suffix or file] += 1

    @staticmethod
    def _begins_like_one(archive: Archive, name: str) -> bool:
        """Of a file whose name does not say what it is."""
        if kind_by_name(name) is not Kind.FILE:
            return False
        try:
            return begins_like_an_image(archive.begin(name, 32))
        except RefusedImage:
            return False

    def _note(self, said: dict[str, tuple[str, str]], name: str, text: bytes) -> None:
        """What a file beside an image says of it."""
        if name.rpartition("/")[2] == _CLASSES:
            self.names = _lines(text)
            return
        suffix = name[name.rfind(".") :].lower()
        key, known = _key(name), said.get(_key(name))
        if (label := _label_in(text, suffix)) is None:
            return
        if known is None or _BESIDE.index(suffix) < _BESIDE.index(known[1]):
            said[key] = label, suffix

    def meant(self, source: Path | str, class_level: int | None) -> tuple[list[Entry], set[str]]:
        """The entries with labels and splits, and all classes. Raises SourceError, UsageError: as ``read_layout``."""
        if self.parquet:
            return self.entries, self.classes
        if self.tables:
            raise SourceError(
                f"{source} holds {some(self.tables)}, which says what its images are, and is read in folders only; unpack it, and "
                "give the folder"
            )
        if (labels := self._labels_beside(source)) is not None:
            for row, (entry, folder, label) in enumerate(zip(self.entries, self.inner, labels, strict=True)):
                split = entry.split or split_of(folder.split("/")[0])
                self.entries[row] = entry._replace(label=label, split=split)  # in its place: there may be millions
            return self.entries, {*(self.names or ())}
        filled = {*self.inner}
        wrap = _wrap(filled, self.folders)
        if wrap in filled and (self.shards.inside or "/" in wrap):
            wrap = wrap.rpartition("/")[0]  # as of the folder that the archive holds, in which this is the one class
        start = len(wrap) + 1 if wrap else 0
        folders = {folder[start:] for folder in self.folders if folder[start:]}
        inner = {folder: folder[start:] for folder in filled}
        layout = read_layout(self.shards.root / wrap, folders, {*inner.values()}, class_level)
        found = {folder: meaning(folder, layout) for folder in {*inner.values(), *folders}}
        for row, (entry, folder) in enumerate(zip(self.entries, self.inner, strict=True)):
            label, split = found[inner[folder]]
            self.entries[row] = entry._replace(label=label, split=split or entry.split)
        return self.entries, {label for label, _ in found.values() if label is not None}

    def _labels_beside(self, source: Path | str) -> list[str | None] | None:
        """The labels that files beside the images give; None if they give none."""
        kinds = Counter(each[1] for each in self.beside if each)
        for group in ((".cls", ".json"), (".txt",)):
            count = sum(kinds[kind] for kind in group)
            if 2 * count < max(len(self.entries), 1):
                continue
            labels = [each[0] if each and each[1] in group else None for each in self.beside]
            different = len({*labels} - {None})
            if group == (".txt",) and different > max(2, count // 2):
                log.info("%s: .txt files say something else of nearly every image, and are no classes", source)
                return None
            names = self.names if self.names is not None else _names_beside(self.shards)
            log.info("%s: labels from %s", source, " and ".join(kind for kind in group if kinds[kind]))
            if missing := len(labels) - count:
                log.warning("%s: %s without a label", source, quantity(missing, "image"))
            self.names = names
            return [None if label is None else _named(label, names, source) for label in labels]
        return None


def _archives_below(folder: Path) -> Iterator[Path]:
    """Those of a tree that are called like archives, whatever they turn out to be; not behind links that leave it."""
    root = os.path.realpath(folder)

    def say(error: OSError) -> None:
        log.warning("%s: folder cannot be read: %s", error.filename, error.strerror)

    for at, folders, names in itertools.islice(os.walk(folder, onerror=say), _MOST_FOLDERS):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for path in (Path(at, name) for name in names if not name.startswith(".")):
            if not is_archive(path):
                continue
            if os.path.commonpath([root, os.path.realpath(path)]) == root:
                yield path
            else:
                log.warning("%s: link that leaves the source folder; it is not read", path)


def _split_of_shard(path: str) -> int:
    """The split that the name of a shard says, or of a folder that it lies in; 0 if they say none, or several."""
    for part in reversed(path.split("/")):
        words = {split_of(word) for word in re.split(r"[^A-Za-z]+", part) if word} - {0}
        if words:
            return words.pop() if len(words) == 1 else 0
    return 0


def _with_parents(folder: str) -> Iterator[str]:
    parts = folder.split("/") if folder else []
    yield from ("/".join(parts[: k + 1]) for k in range(len(parts)))


def _key(name: str) -> str:
    """What WebDataset calls the key of a file: its path up to the first dot of its name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label_in(text: bytes, suffix: str) -> str | None:
    """What a file beside an image says is its class; None if it says nothing that could be one."""
    try:
        found: object = text.decode("utf-8-sig")
        if suffix == ".json":
            content = parse_json(str(found))
            found = next((content[key] for key in content if is_label(key)), None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, str | int) or isinstance(found, bool):
        return None
    label = str(found).strip()
    return label if 0 < len(label) <= _MAX_LABEL and printable(label) == label else None


def _lines(text: bytes) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.decode("utf-8", "surrogateescape").splitlines() if line.strip())


def _names_beside(shards: Shards) -> tuple[str, ...] | None:
    """Names of classes from a file in the folder of the shards."""
    folder = shards.archives[0].parent if shards.root == shards.archives[0] else shards.root
    try:
        with open_binary(folder / _CLASSES) as file:
            return _lines(file.read(_MAX_CLASSES))
    except (RefusedImage, NoAccessError):  # who may read only the shards cannot ask whether there is one
        return None


def _named(label: str, names: tuple[str, ...] | None, source: Path | str) -> str:
    """The class of that number, if there are ``names``. Raises SourceError: there is none of that number."""
    if names is None or not label.isdecimal() or label in names:
        return label
    if int(label) >= len(names):
        raise SourceError(
            f"{source}: an image is of the class {label}, and {_CLASSES} names {len(names)} ({shown(names[:3])}, ...)"
        )
    return names[int(label)]


def _wrap(filled: set[str], folders: set[str]) -> str:
    """The deepest folder that all images lie in; empty if there is none, or its name is that of a split."""
    wrap = ""
    while True:
        start = len(wrap) + 1 if wrap else 0
        tops = {folder[start:].partition("/")[0] for folder in filled}
        below = f"{wrap}/{min(tops)}" if wrap and tops else min(tops, default="")
        if len(tops) != 1 or not below or split_of(min(tops)) or wrap in filled:
            return wrap
        if any(not (f"{folder}/".startswith(f"{below}/") or below.startswith(f"{folder}/")) for folder in folders):
            return wrap  # an empty class lies beside it
        wrap = below
