"""Read a table of images. In: a CSV. Out: a ``Listing``, in the order of its rows. No image is opened.

Names and labels are text of a known encoding: UTF-8, UTF-16, or what the file names prove; never what merely looks right.
"""

import codecs
import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from featcache.errors import Refusal, RefusedImage, SourceError, UsageError
from featcache.images.folders import Entry, Listing
from featcache.images.layout import split_of

log = logging.getLogger("featcache")
# Headers of tables, small and without what separates words -> what the column is.
_COLUMNS = dict.fromkeys(("path", "file", "filename", "filepath", "image", "imagepath"), "path")
_COLUMNS |= dict.fromkeys(("label", "class", "category", "species"), "label")
_COLUMNS |= dict.fromkeys(("split", "set", "subset"), "split")
_UTF8 = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)  # a character beyond ASCII
_Encoding = tuple[str, str]  # a codec, and what to do about bytes that it lacks
_BYTES: _Encoding = ("utf-8-sig", "surrogateescape")  # names as a file system has them that knows no encoding
_WINDOWS: _Encoding = ("cp1252", "strict")


def list_table(source: Path, root: Path, chosen: Mapping[str, str | None]) -> Listing:
    """The images that a CSV with the header ``path[,label[,split]]`` names.

    Args:
        source: the file. root: the folder that its paths are relative to. chosen: ``path``, ``label`` and ``split`` -> the
            header of that column; None: one of the names people use.

    Raises:
        SourceError: a row, or the encoding, cannot be understood. UsageError: the header or a split cannot.
    """
    real_root = os.path.realpath(root)
    found: list[Entry] = []
    refused: list[Refusal] = []
    refused_at: list[int] = []
    seen: dict[str, Entry] = {}
    encoding = _encoding_of(source, real_root)
    for entry, where in _entries(source, encoding):
        try:
            entry = _resolved(entry, real_root)
        except RefusedImage as reason:
            refused.append(Refusal(entry.path, str(reason)))
            refused_at.append(len(found))
            continue
        known = seen.setdefault(entry.path, entry)
        if known != entry:
            raise SourceError(f"{where}: {entry.path} is listed twice, with different labels or splits")
        if known is entry:
            found.append(entry)
    return Listing(root, found, set(), refused, refused_at)


def _encoding_of(source: Path, real_root: str) -> _Encoding:
    """Raises SourceError: neither UTF-8, nor UTF-16, and no file tells what else."""
    with source.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16", "strict"
    if (odd := _not_utf8(source)) is None:
        return "utf-8-sig", "strict"
    number, text = odd
    if _files_proving(source, _BYTES, real_root):
        log.warning("%s, line %d: %a is not UTF-8; names and labels are kept byte for byte", source, number, text)
        return _BYTES
    if not _is_partly_utf8(source) and _files_proving(source, _WINDOWS, real_root):
        log.warning("%s is not UTF-8; it is read as Windows-1252 (Latin-1), which the names of its files prove", source)
        return _WINDOWS
    raise SourceError(
        f"{source}, line {number}: {text!a} is not UTF-8, and no file of such a name tells what else it is; save the table as "
        "UTF-8 (in a spreadsheet: CSV UTF-8)"
    )


def _not_utf8(source: Path) -> tuple[int, bytes] | None:
    """The first line that is not UTF-8, from 1, and its first odd bytes with what is around them."""
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, line[max(error.start - 12, 0) : error.end + 12].strip()
    return None


def _is_partly_utf8(source: Path) -> bool:
    """Whether there is a character of UTF-8 beyond ASCII: lines of several tables, which no one encoding reads."""
    with source.open("rb") as file:
        return any(map(_UTF8.search, file))


def _files_proving(source: Path, encoding: _Encoding, real_root: str) -> bool:
    """Whether a file is there whose name takes this encoding to be read."""
    try:
        for entry, _ in _entries(source, encoding):
            telling = not entry.path.isascii() and (encoding != _BYTES or not _is_text(entry.path))
            if telling and _is_there(entry, real_root):
                return True
    except (SourceError, UsageError):  # for one, bytes that the codec lacks
        pass
    return False


def _is_text(name: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in name)


def _is_there(entry: Entry, real_root: str) -> bool:
    try:
        return _resolved(entry, real_root).size >= 0
    except RefusedImage:
        return False


def _entries(source: Path, encoding: _Encoding) -> Iterator[tuple[Entry, str]]:
    """Each row, and where it stands. Raises SourceError, UsageError."""
    for row, where in _rows(source, encoding):
        yield _entry(row, where), where


def _rows(source: Path, encoding: _Encoding) -> Iterator[tuple[dict[str, str | None], str]]:
    """Each row, and where it stands."""
    with source.open(newline="", encoding=encoding[0], errors=encoding[1]) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = [_column(name) for name in reader.fieldnames or []]
            unexpected = Counter(columns) - Counter(("path", "label", "split"))  # unknown, or twice
            if "path" not in columns or unexpected:
                raise UsageError(
                    f"{source} has the columns {reader.fieldnames}, expected the header path[,label[,split]]"
                )
            reader.fieldnames = columns
            for row in reader:
                yield row, f"{source}, line {reader.line_num}"
        except (csv.Error, UnicodeError) as error:
            raise SourceError(f"{source}, after line {reader.line_num}: not a CSV row ({error})") from error


def _column(header: str) -> str:
    """``path``, ``label`` or ``split`` by any of its names; any other header as it is."""
    return _COLUMNS.get(re.sub(r"[\s_-]", "", header).lower(), header.strip())


def _entry(row: dict[str, str | None], where: str) -> Entry:
    path, label, split = row.get("path"), (row.get("label") or "").strip() or None, (row.get("split") or "").strip()
    if not path or None in row:
        raise SourceError(f"{where}: found {len(row)} fields with path {path!r}, expected the header's columns")
    if not split_of(split) and split.lower() not in ("", "none"):
        raise UsageError(f"{where}: split {split!r} is not one of train, val, test or empty")
    return Entry(path, -1, -1, label, split_of(split))


def _resolved(entry: Entry, real_root: str) -> Entry:
    """The entry under its one real path, so that no spelling of it counts twice; refused if that lies elsewhere.

    A missing file stays in the list: reading it gives the reason, in its place.
    """
    try:
        target = os.path.realpath(os.path.join(real_root, entry.path))  # noqa: PTH118 - an absolute path may replace it
        if os.path.commonpath([real_root, target]) != real_root:
            raise RefusedImage("lies outside the folder of the CSV")
    except ValueError as error:  # another drive, or a NUL in the name
        raise RefusedImage(f"cannot be found: {error}") from error
    path = os.path.relpath(target, real_root).replace(os.sep, "/")
    try:
        status = os.stat(target)  # noqa: PTH116
    except OSError:
        return entry._replace(path=path)
    return entry._replace(path=path, size=status.st_size, mtime=status.st_mtime_ns)
