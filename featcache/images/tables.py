"""Read a table or list of images. In: a file, or stdin. Out: a ``Listing``, in the order of its rows. No image is opened.

``records.py`` reads the text, ``columns.py`` says what its columns hold, and here names become files below one root. What a name
may mean besides what is written is settled by the files that are there.
"""

import itertools
import logging
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from featcache.errors import Refusal, RefusedImage, SourceError, UsageError
from featcache.images.archives import archive_in, stat_member
from featcache.images.columns import (
    NONE,
    Columns,
    find_columns,
    printable,
    quoted,
    split_in,
    warn_of_no_classes,
    without_header,
)
from featcache.images.folders import Entry, Listing, has_image_suffix, holds_an_image
from featcache.images.parquet import is_table_of_paths
from featcache.images.records import STDIN, Table, as_text, read_table, without_escape
from featcache.system.addresses import address_of

log = logging.getLogger("featcache")
TABLES = (".csv", ".tsv", ".tab", ".txt", ".jsonl", ".ndjson")
_SAMPLE = 20  # paths that are looked for elsewhere when none is where it should be
_COLUMNS = 50  # in which paths are looked for
_FOLDERS = 200  # in which they are looked for
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # an absolute path of Windows
_ADDRESS = re.compile(r"file:(?://(?:localhost)?)?(?=/)", re.IGNORECASE)


def is_table(path: Path) -> bool:
    """Whether ``path`` is a file that is read as a table or list, or ``-``: stdin."""
    named = path.suffix.lower() in TABLES
    if path == STDIN or (named and os.path.isfile(path) and not holds_an_image(path)):  # noqa: PTH113 - never fails
        return True
    return is_table_of_paths(path)


def list_table(source: Path, root: Path, chosen: Mapping[str, str | None], *, labelled: bool) -> Listing:
    """The images that a table or list names.

    Args:
        source: the file, or ``-``. root: the folder that its paths are relative to. chosen: ``path``, ``label``, ``split``
            and ``group`` -> the header of that column; None: one of the names people use. labelled: whether labels and splits are read.

    Raises:
        SourceError: a row, or the encoding, cannot be understood; not one of its files is there. UsageError: the columns or a
        split cannot.
    """
    files = Files(root)
    table, columns = read_columns(source, files, chosen)
    columns = columns if labelled else columns._replace(label=None, split=None, group=None)
    said = columns.said(hint=labelled and chosen["label"] is None)
    log.info("%s: %s%s", table.name, "" if table.header else "no header; ", said)
    found: list[Entry] = []
    refused: list[Refusal] = []
    refused_at: list[int] = []
    seen: dict[str, Entry] = {}
    for entry, where in entries(table, columns):
        try:
            entry = files.resolved(entry)
        except RefusedImage as reason:
            refused.append(Refusal(entry.path, str(reason)))
            refused_at.append(len(found))
            continue
        known = seen.setdefault(entry.path, entry)
        if known != entry:
            raise SourceError(f"{where}: {entry.path} is listed twice, with different labels, splits or groups")
        if known is entry:
            found.append(entry)
    if (found or refused) and all(entry.size < 0 for entry in found):
        raise _not_one_there(table, columns, files)
    warn_of_no_classes(table.name, (entry.label for entry in found))
    return Listing(root, found, set(), refused, refused_at)


def read_columns(source: Path, files: "Files", chosen: Mapping[str, str | None]) -> tuple[Table, Columns]:
    """A table or list, and what its columns hold. Raises as ``list_table``."""
    table = read_table(source, files.has, chosen)
    if not table.header:
        first = [files.has(cell) or has_image_suffix(cell) for cell in next(table.rows())[0][:_COLUMNS]]
        first[0] |= not any(first)  # or it would not have been taken for a list
        return table, without_header(table.name, (cells for cells, _ in table.rows()), first)
    try:
        return table, find_columns(table.name, table.header, chosen)
    except UsageError:  # which a column of files might help to answer
        return table, find_columns(table.name, table.header, chosen, hint=_column_of_files(table, files))


def _column_of_files(table: Table, files: "Files") -> str:
    """The header of the first column that holds names of files; empty if none does."""
    for cells, _ in itertools.islice(table.rows(), _SAMPLE):
        for name, cell in zip(table.header[:_COLUMNS], cells, strict=False):
            if files.has(str(cell)):
                return name
    return ""


def entries(table: Table, columns: Columns) -> Iterator[tuple[Entry, str]]:
    """Each row as it is written, and where it stands. Raises SourceError, UsageError."""
    for cells, where in table.rows():
        path = as_text(cells[columns.path], where)
        if not path.strip() or not _is_storable(path):
            raise SourceError(
                f"{where}: found the path {path[:200]!a}, expected the name of a file in each row that is not blank"
            )
        label = None if columns.label is None else _label(as_text(cells[columns.label], where), where)
        split = 0 if columns.split is None else _split(as_text(cells[columns.split], where), columns, where)
        group = "" if columns.group is None else as_text(cells[columns.group], where).strip()
        yield Entry(path, -1, -1, label, split, group), where


def _label(cell: str, where: str) -> str | None:
    label = cell.strip()
    # "a" after a blank: quotes that CSV takes for text.
    if label != cell and len(label) > 1 and label[0] == label[-1] == '"':
        label = label[1:-1].strip()
    label = without_escape(label)
    if "\0" in label or not _is_storable(label):
        raise SourceError(f"{where}: the label {label[:200]!a} is no text; expected the name of a class")
    return label or None


def _is_storable(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeError:
        return False
    return True


def _split(cell: str, columns: Columns, where: str) -> int:
    header = columns.header[columns.split or 0] if columns.header else "split"
    if (split := split_in(header, cell)) is None:
        raise UsageError(
            f"{where}: {header} is {cell.strip()[:60]!r}, expected train, val, test (or what people call them) or nothing; "
            f"--split-column NAME takes another column, --split-column {NONE} no splits"
        )
    return split


def _in_archive(path: str) -> tuple[int, int]:
    """Size and time of a file in an archive; -1 if there is none."""
    try:
        return stat_member(*inside) if (inside := archive_in(Path(path))) else (-1, -1)
    except RefusedImage:
        return -1, -1


class Files:
    """The files below a folder, by the names that people write for them."""

    def __init__(self, root: Path) -> None:
        self.root, self.is_elsewhere = root, address_of(root) is not None
        self.real_root = self._real(str(root))
        self._stems: dict[str, dict[str, list[str]]] = {}  # folder -> names of images by their names without suffix

    def has(self, cell: str) -> bool:
        """Whether ``cell`` names a file below the root."""
        try:
            found = self.resolved(Entry(cell, -1, -1))
        except RefusedImage:
            return False
        path = os.path.join(self.real_root, found.path)  # noqa: PTH118
        if found.size < 0 or self.is_elsewhere or os.path.isfile(path):  # noqa: PTH113
            return found.size >= 0
        return not os.path.lexists(path)  # then it is in an archive

    def _real(self, path: str) -> str:
        return os.path.normpath(path) if self.is_elsewhere else os.path.realpath(path)

    def resolved(self, entry: Entry) -> Entry:
        """The entry under its one real path, so that no spelling of it counts twice.

        A missing file stays in the list: reading it gives the reason, in its place.

        Raises:
            RefusedImage: it lies elsewhere, or may be one of several files.
        """
        outside, written, tried = RefusedImage("cannot be found"), None, set[str]()
        for spelling in _spellings(entry.path):
            if spelling in tried:
                continue
            try:
                found = self._at(entry, spelling)
            except RefusedImage as reason:
                outside = outside if tried else reason
            else:
                if found.size >= 0:
                    return found
                written = written or found
            tried.add(spelling)
        if written and (named := self._without_suffix(written)):
            return self._at(entry, named)
        if os.name != "nt" and _DRIVE.match(entry.path):
            raise RefusedImage("is a whole path of Windows, outside of the table's folder or --root")
        if not written:
            raise outside
        return written

    def _at(self, entry: Entry, path: str) -> Entry:
        try:
            target = self._real(os.path.join(self.real_root, path))  # noqa: PTH118 - an absolute path may replace it
            if os.path.commonpath([self.real_root, target]) != self.real_root:
                raise RefusedImage("lies outside of the table's folder or --root")
        except ValueError as error:  # another drive, or a NUL in the name
            raise RefusedImage(f"cannot be found: {error}") from error
        path = os.path.relpath(target, self.real_root).replace(os.sep, "/")
        try:
            status = os.stat(target)  # noqa: PTH116
        except OSError:
            size, mtime = _in_archive(target)
            return entry._replace(path=path, size=size, mtime=mtime)
        return entry._replace(path=path, size=status.st_size, mtime=status.st_mtime_ns)

    def _without_suffix(self, entry: Entry) -> str | None:
        """The one image of this name and a suffix, as in Kaggle's tables. Raises RefusedImage: there are several."""
        folder, _, stem = entry.path.rpartition("/")
        if has_image_suffix(stem):
            return None
        if folder not in self._stems:
            names: dict[str, list[str]] = {}
            try:
                for name in os.listdir(os.path.join(self.real_root, folder)):  # noqa: PTH118, PTH208
                    if has_image_suffix(name):
                        names.setdefault(name[: name.rfind(".")], []).append(name)
            except OSError:
                pass
            self._stems[folder] = names
        found = self._stems[folder].get(stem, [])
        if len(found) > 1:
            raise RefusedImage(f"may be any of {', '.join(sorted(found))}")
        return f"{folder}/{found[0]}" if folder and found else next(iter(found), None)


def _spellings(cell: str) -> Iterator[str]:
    """As it is written, and what else it may mean: the first that is there counts."""
    yield cell
    text = cell.strip().strip('"').strip()
    yield text
    yield text.removeprefix("'")  # before what a spreadsheet would take for a formula, see ``csv_line``
    if (address := _ADDRESS.match(text)) and _is_storable(text):
        yield os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(text[address.end() :])))
    text = text.replace("\\", "/")
    yield text
    yield unicodedata.normalize("NFC", text)
    yield unicodedata.normalize("NFD", text)


def _not_one_there(table: Table, columns: Columns, files: Files) -> SourceError:
    """What to say of a table none of whose files is there; and where they are, if that can be seen."""
    sample = [str(cells[columns.path]) for cells, _ in itertools.islice(table.rows(), _SAMPLE)]
    looked = Path(os.path.normpath(files.root / sample[0]))
    hint = _where_they_are(sample, files) or "--root FOLDER says what its paths are relative to"
    return SourceError(
        f"{table.name}: not one of its images is a file below {files.root}; the first, {sample[0][:200]!r}, was looked for as "
        f"{str(looked)!r}; {hint}"
    )


def _where_they_are(sample: Sequence[str], files: Files) -> str:
    """The option that would find some of ``sample``, or what to leave out of the table; empty if nothing does."""
    first = sample[0].strip()
    if first.startswith("/") and not first.startswith("//") and os.path.isfile(first):  # noqa: PTH113
        folder = os.path.commonpath([os.path.dirname(path.strip()) for path in sample if path.strip().startswith("/")])  # noqa: PTH120
        return f"--root {quoted(folder)} takes them"
    if first.startswith("/") or _DRIVE.match(first):
        parts = re.split(r"[\\/]+", first)
        tails = ("/".join(parts[k:]) for k in range(1, len(parts)))
        if tail := next(filter(files.has, tails), ""):
            return f"{printable(tail)} is there: leave {printable(first[: len(first) - len(tail)])} out of the table"
        return ""
    if re.match(r"[a-z][a-z\d+.-]+://", first, re.IGNORECASE):
        return "addresses are not followed: download what is to be embedded, and name the files"
    real, here = Path(files.real_root), Path.cwd()
    folders = [here, *itertools.islice(real.parents, 8), *_folders_in(files.root)]
    found = {folder: sum(map(Files(folder).has, sample)) for folder in folders}
    best = max(found, key=lambda folder: found[folder])
    typed = "." if best == here else str(best)
    return f"--root {quoted(typed)} has {found[best]} of the first {len(sample)}" if found[best] else ""


def _folders_in(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as inside:
            each_one = itertools.islice(inside, 100_000)
            names = sorted(each.name for each in each_one if each.is_dir() or each.name.lower().endswith(".zip"))
    except OSError:
        return []
    return [root / name for name in names[:_FOLDERS]]
