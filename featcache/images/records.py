"""Read the text of a table or list: its encoding, what separates its cells, its header. In: a file, or stdin. Out: a ``Table``.

Text is of a known encoding: UTF-8, UTF-16, or what the names of files prove; never what merely looks right. Memory is bounded by
one row. What kind of list it is, is told by its header or by the files it names.
"""

import codecs
import csv
import functools
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from featcache.errors import FeatcacheError, SourceError, UsageError
from featcache.images.columns import NONE, known, wrong_type
from featcache.images.folders import has_image_suffix
from featcache.images.parquet import Unread, table_header, table_rows
from featcache.system.path_kinds import Kind, kind_of
from featcache.system.safe_load import parse_json

log = logging.getLogger("featcache")
STDIN = Path("-")
MAX_ROW = 2**20  # characters
_MAX_KEYS = 10_000  # of JSON objects
_LOOKED_AT = 1000  # lines, for one that names a file
_CELLS = 50  # the same
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|", ".tab": "\t,;|"}
_UTF8 = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)  # a character beyond ASCII
_Encoding = tuple[str, str]  # a codec, and what to do about bytes that it lacks
_BYTES: _Encoding = ("utf-8-sig", "surrogateescape")  # names as a file system has them that knows no encoding
_WINDOWS: _Encoding = ("cp1252", "strict")
# How a cell begins that a spreadsheet would run; full-width signs count. Apostrophes before the sign count, too: the one that
# is added can then be taken away again.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
IsFile = Callable[[str], bool]
Row = tuple[Sequence[Any], str]  # its cells, and where it stands


class Table(NamedTuple):
    """A table or list.

    Attributes:
        name: as a message calls it. header: empty if there is none.
        rows: reads it anew: the cells of each row that is not blank, and where it stands; of JSON lines and Parquet any values.
    """

    name: str
    header: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]


def read_table(path: Path, is_file: IsFile, chosen: Mapping[str, str | None]) -> Table:
    """The table or list in a file, or in what stdin held.

    Args:
        path: the file, or ``-``. is_file: whether a cell names a file. chosen: see ``columns.find_columns``.

    Raises:
        SourceError: it is empty, or in an unknown encoding, or changes while it is read. UsageError: it can be read in two ways or in none.
    """
    if kind_of(path) is Kind.PARQUET:
        return _read_parquet(path)
    text = _Text(path, "stdin" if path == STDIN else str(path), *_BYTES)
    with text.open() as file:
        text, start = text._replace(version=_version(file)), file.read(8192)
    first, nul, _ = start.partition(b"\0")
    if codec := _utf16(start):
        return _read(text._replace(codec=codec, errors="strict"), is_file, chosen)
    if nul and first.strip() and (b"\n" not in first or is_file(os.fsdecode(first))):  # find -print0
        return Table(text.name, (), text.between_nuls)
    if (odd := _not_utf8(text)) is None:
        return _read(text._replace(errors="strict"), is_file, chosen)
    number, sample = odd
    if found := _proven(text, is_file, chosen):
        log.warning("%s, line %d: %a is not UTF-8; names and labels are kept byte for byte", text.name, number, sample)
        return found
    windows = text._replace(codec=_WINDOWS[0], errors=_WINDOWS[1])
    if not any(_UTF8.search(line) for line in text.byte_lines()) and (found := _proven(windows, is_file, chosen)):
        log.warning(
            "%s is not UTF-8; it is read as Windows-1252 (Latin-1), which the names of its files prove", text.name
        )
        return found
    raise SourceError(
        f"{text.name}, line {number}: {sample!a} is not UTF-8, and no file of such a name tells what else it is; save the table "
        "as UTF-8 (in a spreadsheet: CSV UTF-8)"
    )


class _Text(NamedTuple):
    """A text that can be read again and again."""

    path: Path
    name: str
    codec: str
    errors: str
    version: tuple[int, ...] = ()  # of the file, which its columns must not outlive

    def open(self) -> BinaryIO:
        if self.path != STDIN:
            file = _opened(self.path)
            if self.version and self.version != _version(file):
                file.close()
                raise SourceError(f"{self.name} was changed while it was read; run it again")
            return file
        file = os.fdopen(os.dup(0), "rb")
        try:
            file.seek(0)
        except OSError as error:
            file.close()
            raise UsageError(
                "- is for the command line, which keeps what stdin holds; give a file or a list"
            ) from error
        return file

    def lines(self, newline: str = "") -> Iterator[str]:
        """Each with its end. Raises SourceError: too long for a row."""
        with self.open() as file, io.TextIOWrapper(file, self.codec, self.errors, newline=newline) as text:
            for number in itertools.count(1):
                try:
                    line = text.readline(MAX_ROW + 1)
                except UnicodeError as error:
                    raise SourceError(
                        f"{self.name}, after line {number - 1}: not {self.codec.upper()} ({error})"
                    ) from error
                if not line:
                    return
                if len(line) > MAX_ROW:
                    raise self._too_long(number)
                yield line

    def byte_lines(self) -> Iterator[bytes]:
        with self.open() as file:
            for number in itertools.count(1):
                if not (line := file.readline(4 * MAX_ROW + 1)):
                    return
                if len(line) > 4 * MAX_ROW:
                    raise self._too_long(number)
                yield line

    def cells(self, delimiter: str) -> Iterator[Row]:
        """The rows of a CSV that are not blank."""
        size = 0

        def feed() -> Iterator[str]:
            nonlocal size
            for line in self.lines():
                size += len(line)
                if size > MAX_ROW:
                    raise self._too_long(reader.line_num)
                yield line

        reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                size = 0
                if any(map(str.strip, row)):
                    yield row, f"{self.name}, line {reader.line_num}"
        except csv.Error as error:
            raise SourceError(f"{self.name}, after line {reader.line_num}: not a CSV row ({error})") from error

    def below_header(self, delimiter: str, skipped: int) -> Iterator[Row]:
        """The rows below ``skipped`` ones, which have at most as many cells as the last of these; blank ones do not count."""
        rows = self.cells(delimiter)
        width = [0, *(len(cells) for cells, _ in itertools.islice(rows, skipped))][-1]
        for cells, where in rows:
            if any(map(str.strip, cells[width:])):
                raise SourceError(f"{where}: found {len(cells)} cells, expected at most {width}, as in the first line")
            yield [*cells[:width], *[""] * (width - len(cells))], where

    def json_rows(self, keys: Sequence[str]) -> Iterator[Row]:
        for number, line in enumerate(self.lines("\n"), 1):
            if line.strip():
                where = f"{self.name}, line {number}"
                found = _json(line, where)
                yield [found.get(key) for key in keys], where

    def whole_lines(self) -> Iterator[Row]:
        for number, line in enumerate(self.lines("\n"), 1):
            if line.strip():
                yield [line.removesuffix("\n").removesuffix("\r")], f"{self.name}, line {number}"

    def last_words(self, is_file: IsFile) -> Iterator[Row]:
        """A path and a word in each line."""
        for (line,), where in self.whole_lines():
            cells = line.rsplit(None, 1)
            if len(cells) < 2 or (not is_file(cells[0]) and is_file(line)):
                raise SourceError(
                    f"{where}: found {line[:200]!r}, expected a path, a blank and a label, as in the lines before; write it as a "
                    "CSV with the header path,label"
                )
            yield cells, where

    def between_nuls(self) -> Iterator[Row]:
        rest = b""
        with self.open() as file:
            while data := file.read(65536):
                *names, rest = re.split(rb"\0+", rest + data)
                if len(rest) > MAX_ROW:
                    raise self._too_long(1)
                for name in filter(bytes.strip, names):
                    yield [os.fsdecode(name)], f"{self.name}, {name[:200]!a}"
        if rest.strip():
            yield [os.fsdecode(rest)], f"{self.name}, {rest[:200]!a}"

    def _too_long(self, number: int) -> SourceError:
        return SourceError(
            f"{self.name}, line {number}: a row of more than {MAX_ROW:,} characters; expected a table with a row for each image"
        )


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error


def _version(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(text: _Text, is_file: IsFile, chosen: Mapping[str, str | None]) -> Table:
    """What kind of table or list it is."""
    first = next((line.strip("\r\n") for line in text.lines() if line.strip()), "")
    if not first:
        raise SourceError(f"{text.name} is empty; expected a table of images, or a path on each line")
    if re.match(r'\s*\{\s*"', first):
        return _read_json(text)
    marked = re.fullmatch(r" *sep=([^ ]) *", first, re.IGNORECASE)  # Excel's first line
    delimiters = marked[1] if marked else _DELIMITERS.get(text.path.suffix.lower(), ",;\t|")
    skipped = 2 if marked else 1
    headers = {delimiter: row for delimiter in delimiters if (row := _row(text, delimiter, skipped - 1))}
    found = max(headers, key=lambda each: (known(headers[each], chosen), len(headers[each])), default=",")
    header = headers.get(found, [first])
    rows = functools.partial(text.below_header, found, skipped)
    options = any(name not in (None, NONE) for name in chosen.values())
    if known(header, chosen) or options or marked:
        if not options and len(header) == 1 and is_file(first):
            raise UsageError(
                f"{text.name}, line 1: {first!r} is a header, and a file; put the line path above it, or rename the file"
            )
        return Table(text.name, tuple(header), rows)
    if without := _without_header(text, first, headers, is_file):
        return without
    if len(header) == 1 and text.path.suffix.lower() not in _DELIMITERS:
        raise SourceError(
            f"{text.name}, line 1: {first[:200]!r} is no file, and no header that is known; expected a path on each line, or a "
            "table with a header such as path,label"
        )
    return Table(text.name, tuple(header), rows)  # whose columns the user will have to name


def _without_header(text: _Text, first: str, headers: Mapping[str, Sequence[str]], is_file: IsFile) -> Table | None:
    """A list or table that begins with its first image; None if nothing says that it does."""

    def is_path(cell: str) -> bool:
        return is_file(cell) or has_image_suffix(cell)

    whole = Table(text.name, (), text.whole_lines)
    words = Table(text.name, (), functools.partial(text.last_words, is_file))
    before = first.rsplit(None, 1)[0]
    if is_file(first):
        return whole
    for delimiter, cells in headers.items():
        if any(map(is_path, cells[:_CELLS])) and (len(cells) > 1 or cells[0] != first):
            return Table(text.name, (), functools.partial(_as_wide, text, delimiter, len(cells)))
    if not (is_path(before) or is_path(first) or re.search(r"[/\\]", first)):
        return None
    for (line,), _ in itertools.islice(text.whole_lines(), _LOOKED_AT):
        if is_file(line):
            return whole
        if " " in line.strip() and is_file(line.rsplit(None, 1)[0]):
            return words
    for blank in itertools.islice(re.finditer(r"\s+", first), _CELLS):
        if is_file(first[: blank.start()]):
            line = f"{first[: blank.start()]},{first[blank.end() :]}"
            raise SourceError(
                f"{text.name}, line 1: {first[:200]!r} begins with a file, and what follows is more than a word; write a CSV "
                f"with the header path,label and lines such as {line[:200]}"
            )
    return words if has_image_suffix(before) and not has_image_suffix(first) else whole


def _as_wide(text: _Text, delimiter: str, width: int) -> Iterator[Row]:
    for cells, where in text.cells(delimiter):
        if len(cells) != width:
            raise SourceError(f"{where}: found {len(cells)} cells, expected {width}, as in the first line")
        yield cells, where


def _row(text: _Text, delimiter: str, number: int) -> list[str]:
    """The row of that number, from 0; empty if there is none."""
    try:
        return next(([*cells] for cells, _ in itertools.islice(text.cells(delimiter), number, None)), [])
    except SourceError:  # of another kind of table
        return []


def _read_parquet(path: Path) -> Table:
    with _opened(path) as file:
        version = _version(file)

    def rows() -> Iterator[Row]:
        with _opened(path) as file:
            if _version(file) != version:
                raise SourceError(f"{path} was changed while it was read; run it again")
        yield from (row for row in table_rows(path) if any(str(cell).strip() for cell in row[0] if cell is not None))

    return Table(str(path), table_header(path), rows)


def _read_json(text: _Text) -> Table:
    keys: dict[str, None] = {}
    for number, line in enumerate(text.lines("\n"), 1):
        if line.strip():
            keys |= dict.fromkeys(_json(line, f"{text.name}, line {number}"))
        if len(keys) > _MAX_KEYS:
            raise SourceError(
                f"{text.name}, line {number}: more than {_MAX_KEYS:,} different keys; expected those of a table"
            )
    return Table(text.name, tuple(keys), functools.partial(text.json_rows, tuple(keys)))


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        return parse_json(line)
    except ValueError as error:
        raise SourceError(f"{where}: not a JSON object ({error})") from error


def as_text(value: Any, where: str) -> str:
    """A cell as text: what JSON holds as it is written. Raises SourceError: several values, or of a type that is no text."""
    if isinstance(value, Unread):
        raise wrong_type(where, value.column, value.type)
    if isinstance(value, dict | list):
        raise SourceError(f"{where}: found {json.dumps(value)[:200]}, expected one text or number")
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _utf16(start: bytes) -> str | None:
    """The codec, by its mark, or by what ASCII looks like in it: every other byte of the first characters is NUL."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = start[0:8:2], start[1:8:2]
    if len(start) < 8:
        return None
    return "utf-16-le" if not any(odd) and all(even) else "utf-16-be" if not any(even) and all(odd) else None


def _not_utf8(text: _Text) -> tuple[int, bytes] | None:
    """The first line that is not UTF-8, from 1, and its first odd bytes with what is around them."""
    for number, line in enumerate(text.byte_lines(), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return number, line[max(error.start - 12, 0) : error.end + 12].strip()
    return None


def _proven(text: _Text, is_file: IsFile, chosen: Mapping[str, str | None]) -> Table | None:
    """The table, if it names a file whose name takes this encoding to be read."""
    try:
        table = _read(text, is_file, chosen)
        for cells, _ in table.rows():
            for cell in cells:
                telling = (
                    isinstance(cell, str) and not cell.isascii() and (text.codec == "cp1252" or not _is_text(cell))
                )
                if telling and is_file(cell):
                    return table
    except FeatcacheError:  # for one, bytes that the codec lacks
        pass
    return None


def _is_text(name: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in name)


def csv_line(cells: Sequence[Any]) -> bytes:
    """A row as CSV, escaped: an apostrophe before what a spreadsheet would run; bytes that are not UTF-8 stay as they are."""
    text = io.StringIO()
    cells = [json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in cells]
    escaped = [with_escape(cell) if isinstance(cell, str) else cell for cell in cells]
    csv.writer(text, lineterminator="\r\n").writerow(escaped)  # with both, cells holding either are quoted
    return text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"


def with_escape(cell: str) -> str:
    """As a cell of a CSV: an apostrophe in front of what a spreadsheet would run."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def without_escape(cell: str) -> str:
    """The text that ``with_escape`` made ``cell`` of."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell
