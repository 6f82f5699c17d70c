"""Parquet files that hold the bytes of images, as Hugging Face's ``datasets`` writes them, or their paths: the one door to pyarrow
of the images.

In: an open file. Out: rows and what their columns say; the bytes of a row; the cells of a table of paths. Rows are read in small
blocks, the last few of which are kept; memory is that of two pages, which most libraries make of up to 1,024 rows, whatever the
size of the row group. Metadata is read as JSON; nothing of it is evaluated.
"""

import bisect
import itertools
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from featcache.errors import MissingDependencyError, RefusedImage, SourceError, UsageError
from featcache.images.columns import NONE, find_columns, known, quoted, same_header, shown, wrong_type
from featcache.images.members import MAX_FILE_BYTES, Member
from featcache.system.path_kinds import Kind, kind_of
from featcache.system.safe_load import parse_json

_BYTES = ("image", "img", "picture", "photo", "bytes", "imagebytes", "content", "data", "jpg", "jpeg", "png", "webp")
_AT_A_TIME, _MOST_ROWS, _KEPT = 2**22, 64, 12  # bytes and rows of a block; how many are kept
_MAX_LABEL = 10_000  # characters
_CELLS_ROWS = 4096  # rows of a table that are read at a time


class Columns(NamedTuple):
    """Columns of a Parquet file by name: the one of bytes, as a path into its struct; labels, splits; "" where there is none.

    ``names``: of classes, for labels that are numbers.
    """

    image: str
    label: str
    split: str
    names: tuple[str, ...]


class Unread(NamedTuple):
    """A cell that is neither text nor a whole number."""

    column: str
    type: str


class ParquetImages:
    """The rows of one Parquet file.

    Args:
        column: of several that hold images; the only one, or the one that ``datasets`` marks, when empty.

    Attributes:
        prefix: what comes before the number of a row in its name, as ``left/``; empty where the column needs no choice.

    Raises:
        RefusedImage: it is none, or damaged; the same of any reading. MissingDependencyError: pyarrow is missing. UsageError: there
        is no such column.
    """

    def __init__(self, file: BinaryIO, column: str = "") -> None:
        weakref.finalize(self, file.close)
        self._lock = threading.Lock()
        self._next: tuple[int, int, Iterator[Any]] = (
            -1,
            -1,
            iter(()),
        )  # its row group, its first row: the block that comes next
        self._blocks: OrderedDict[int, list[Any]] = OrderedDict()
        with _refusing():
            self._parquet = _pyarrow().parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
            self.schema = self._parquet.schema_arrow
            meta = self._parquet.metadata
            counts = (int(meta.row_group(k).num_rows) for k in range(meta.num_row_groups))
            self._starts = [0, *itertools.accumulate(counts)]
            self._image, self.prefix = _image_column(self.schema, column)
            self._sizes = [self._mean_size(k) for k in range(meta.num_row_groups)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def members(self) -> list[Member]:
        """One for each row, called by its number, below the name of its column where there are several; its size is -1: Parquet
        says nothing of it unread."""
        return [Member(f"{self.prefix}{row}", row, -1, -1) for row in range(len(self))]

    def read(self, name: str) -> bytes:
        """The bytes of a row."""
        row = self.row(name)
        with self._lock, _refusing():
            value = self._value(row)
        if not value:
            only = (
                "; at most a path, and datasets.table.embed_table_storage puts in the bytes"
                if "." in self._image
                else ""
            )
            raise RefusedImage(f"no image in this row of Parquet{only}")
        if len(value) > MAX_FILE_BYTES:
            raise RefusedImage(f"too large: {len(value)} bytes, at most {MAX_FILE_BYTES} are read")
        return bytes(value)

    def row(self, name: str) -> int:
        """The row of that name. Raises RefusedImage: there is none."""
        if not re.fullmatch(r"0|[1-9]\d{0,17}", name, re.ASCII) or int(name) >= len(self):
            raise RefusedImage("cannot be read: not in the archive")
        return int(name)

    def columns(self, chosen: Mapping[str, str | None], name: str) -> Columns:
        """What the columns hold beside the image.

        Args:
            chosen: ``label`` and ``split`` -> header, ``none``, or None: by names that people use. name: of the file, in messages.

        Raises:
            UsageError: there is no such column, or several may be it. SourceError: it holds neither numbers nor text.
        """
        features = features_of(self.schema)
        top = self._image.removesuffix(".bytes")
        asked = {"path": top, "label": chosen["label"], "split": chosen["split"]}
        found = find_columns(name, self.schema.names, asked)
        label, split = ("" if at is None else self.schema.names[at] for at in (found.label, found.split))
        if not label and chosen["label"] is None:  # datasets says which column holds classes
            kinds = [column for column in self.schema.names if _kind(features.get(column)) == "ClassLabel"]
            if len(kinds) > 1:
                raise UsageError(
                    f"{name}: {shown(map(repr, kinds))} each hold classes; choose one, as --label-column {quoted(kinds[0])}, "
                    f"or --label-column {NONE}"
                )
            label = kinds[0] if kinds else ""
        for role, column in (("label", label), ("split", split)):
            if column and not is_cell(kind := self.schema.field(column).type):
                raise wrong_type(name, column, str(kind), role)
        return Columns(self._image, label, split, class_names(features.get(label)))

    def values(self, column: str, name: str, names: tuple[str, ...] = ()) -> Iterator[str | None]:
        """The cells of a column as text; numbers that count ``names`` as these, None where there is nothing.

        ``name``: of the file, in messages. Raises SourceError: a number that is not whole, or that no name has.
        """
        start = 0
        with _refusing():
            for batch in self._parquet.iter_batches(batch_size=2**14, columns=[column], use_threads=False):
                cells = _whole(batch.column(0).to_pylist(), column, batch.column(0).type)
                named = named_classes(cells, names, source=name, column=column, start=start)
                for row, value in enumerate(named, start):
                    if isinstance(value, Unread):
                        raise wrong_type(f"{name}, row {row}", *value)
                    yield _as_text(value)
                start += len(batch)

    def _group(self, row: int) -> int:
        return bisect.bisect_right(self._starts, row) - 1

    def _mean_size(self, group: int) -> int:
        meta = self._parquet.metadata.row_group(group)
        columns = (meta.column(k) for k in range(meta.num_columns))
        total = sum(each.total_uncompressed_size for each in columns if each.path_in_schema == self._image)
        return int(max(total, 0) // max(meta.num_rows, 1))

    def _value(self, row: int) -> bytes | None:
        """In order at the speed of one pass; what lies before begins its row group anew."""
        group = self._group(row)
        first, many = self._starts[group], self._block_size(group)
        block = first + (row - first) // many * many
        if block not in self._blocks:
            of, at, batches = self._next
            if of != group or at > block:
                at = first
                batches = self._parquet.iter_batches(
                    batch_size=many, row_groups=[group], columns=[self._image], use_threads=False
                )
            while at <= block:
                self._next = -1, -1, iter(())  # should this fail
                values = self._take(batches, min(many, self._starts[group + 1] - at))
                self._blocks[at] = values
                if len(self._blocks) > _KEPT:
                    self._blocks.popitem(last=False)
                at += len(values)
                self._next = group, at, batches
        value: bytes | None = self._blocks[block][row - block].as_py()
        return value

    def _take(self, batches: Iterator[Any], count: int) -> Any:
        """The next ``count`` values, in however many batches pyarrow gives them."""
        parts: list[Any] = []
        while (missing := count - sum(map(len, parts))) > 0:
            column = next(batches).column(0)
            parts.append(column.field("bytes") if "." in self._image else column)
        if missing:
            raise ValueError("row groups are not as long as they say")
        return parts[0] if len(parts) == 1 else _pyarrow().concat_arrays(parts)

    def _block_size(self, group: int) -> int:
        return max(1, min(_MOST_ROWS, _AT_A_TIME // max(self._sizes[group], 1)))


def is_table_of_paths(path: Path, column: str | None = None) -> bool:
    """Whether ``path`` is a Parquet file on this machine that names images and does not hold their bytes: by the column that the
    user named, or by all that it has. False where it cannot be read."""
    if kind_of(path) is not Kind.PARQUET or not path.is_file():
        return False
    try:
        with _refusing():
            schema = _pyarrow().parquet.read_schema(path)
    except (RefusedImage, MissingDependencyError):
        return False
    held = _bytes_columns(schema)
    if named := same_header(schema.names, column) if column is not None else []:
        return not any(schema.names[k] in held for k in named)
    texts = [field.name for field in schema if is_cell(field.type)]
    return not _likely_images(schema, held) and (not held or known(texts, {"path": None}) > 0)


def table_rows(path: Path) -> Iterator[tuple[list[Any], str]]:
    """The cells of a table, one row after the other, and where each stands; texts as they are, whole numbers, None, ``Unread``.

    Raises:
        SourceError: it is damaged, or a text is too long for a name. MissingDependencyError: pyarrow is missing.
    """
    pa = _pyarrow()
    try:
        with _refusing():
            schema = pa.parquet.read_schema(path)
            cells = [field.name for field in schema if is_cell(field.type)]
            # A long text that comes again and again takes memory once; pages come one after the other.
            options = {"pre_buffer": False, "buffer_size": 2**20, "read_dictionary": cells}
            features, start = features_of(schema), 0
            empty = [None if name in cells else Unread(name, str(schema.field(name).type)) for name in schema.names]
            with pa.parquet.ParquetFile(path, **options) as file:
                for batch in file.iter_batches(_CELLS_ROWS, columns=cells, use_threads=False):
                    read = {name: iter(_cells(batch.column(name), name)) for name in cells}
                    for name in filter(features.get, cells):
                        names = class_names(features[name])
                        named = named_classes([*read[name]], names, source=str(path), column=name, start=start)
                        read[name] = iter(named)
                    for row in range(start, start + len(batch)):
                        found = [next(read[name]) if name in read else empty[k] for k, name in enumerate(schema.names)]
                        yield found, f"{path}, row {row}"
                    start += len(batch)
    except RefusedImage as error:
        raise SourceError(f"{path}: {error}") from error


def table_header(path: Path) -> tuple[str, ...]:
    """Raises as ``table_rows``; SourceError: two columns have one name, or there is no row."""
    try:
        with _refusing(), _pyarrow().parquet.ParquetFile(path) as file:
            names, rows = tuple(file.schema_arrow.names), file.metadata.num_rows
    except RefusedImage as error:
        raise SourceError(f"{path}: {error}") from error
    if len({*names}) < len(names):
        raise SourceError(f"{path} has two columns of one name; expected one of each")
    if not rows:
        raise SourceError(f"{path} is empty; expected a table of images")
    return names


def _cells(column: Any, name: str) -> list[Any]:
    pa = _pyarrow()
    if pa.types.is_dictionary(column.type):
        if is_text(column.type):
            longest = pa.compute.max(pa.compute.binary_length(column.dictionary)).as_py() or 0
            if longest > _MAX_LABEL:
                raise RefusedImage(f"a text of {longest:,} bytes; expected names of at most {_MAX_LABEL:,}")
        column = column.dictionary_decode()
    if is_text(column.type):
        raw = column.cast(pa.large_binary()).to_pylist()  # what is not UTF-8 is kept byte for byte
        return [None if text is None else text.decode("utf-8", "surrogateescape") for text in raw]
    return _whole(column.to_pylist(), name, column.type)


def _whole(values: list[Any], column: str, kind: Any) -> list[Any]:
    """``values``, floats as whole numbers with gaps, as pandas keeps them; ``Unread`` of others."""
    if not any(isinstance(value, float) for value in values):
        return values
    return [_without_fraction(value, column, kind) if isinstance(value, float) else value for value in values]


def _without_fraction(value: float, column: str, kind: Any) -> int | Unread | None:
    if value != value:
        return None
    return int(value) if value.is_integer() else Unread(column, str(kind))


def _image_column(schema: Any, column: str) -> tuple[str, str]:
    """The path of the column of bytes, and what comes before the numbers of its rows. Raises RefusedImage, UsageError."""
    every = _bytes_columns(schema)
    found = _likely_images(schema, every)
    if not column and len(found) == 1:
        return next(iter(found.values())), ""
    if not column:
        have = ", ".join(f"{field.name} ({field.type})"[:60] for field in itertools.islice(schema, 8))
        choose = f"; choose one, as --path-column {quoted(next(iter(found or every)))}" if every else ""
        what = f"several columns of images ({shown(found)})" if found else "no column of the bytes of images"
        raise RefusedImage(
            f"{what}; expected one called image, of bytes or of a struct with bytes; it has {have}{choose}"
        )
    at = find_columns("the Parquet file", schema.names, {"path": column, "label": NONE, "split": NONE}).path
    name = schema.names[at]
    if name not in every:
        raise RefusedImage(
            f"the column {name!r} is of the type {schema.field(at).type}, expected the bytes of images; a table of paths has to be "
            "one file on this machine"
        )
    if re.search(r"[/\\\0]", name) or name in (".", ".."):
        raise RefusedImage(f"the column {name!r} cannot be part of a path; rename it")
    return every[name], "" if [*found] == [name] else f"{name}/"


def _bytes_columns(schema: Any) -> dict[str, str]:
    """Columns that can hold the bytes of images -> their paths in the file."""
    types, found = _pyarrow().types, dict[str, str]()
    for field in schema:
        inside = [field.type.field(k) for k in range(field.type.num_fields)] if types.is_struct(field.type) else []
        if any(each.name == "bytes" and is_binary(each.type) for each in inside):
            found[field.name] = f"{field.name}.bytes"
        elif is_binary(field.type):
            found[field.name] = field.name
    return found


def _likely_images(schema: Any, found: Mapping[str, str]) -> dict[str, str]:
    """Those of ``found`` that ``datasets`` marks as images, or else that are called and made like some."""
    features = features_of(schema)
    marked = {name: path for name, path in found.items() if _kind(features.get(name)) == "Image"}
    return marked or {
        name: path
        for name, path in found.items()
        if path != name or len(schema) == 1 or name.lower().replace("_", "") in _BYTES
    }


def is_cell(kind: Any) -> bool:
    """Whether a column of this type holds text or numbers."""
    types, kind = _pyarrow().types, _value_type(kind)
    numbers = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return is_text(kind) or any(check(kind) for check in numbers)


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds text."""
    types, kind = _pyarrow().types, _value_type(kind)
    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view))


def is_binary(kind: Any) -> bool:
    """Whether a column of this type holds bytes."""
    types, kind = _pyarrow().types, _value_type(kind)
    return any(check(kind) for check in (types.is_binary, types.is_large_binary, types.is_binary_view))


def _value_type(kind: Any) -> Any:
    return kind.value_type if _pyarrow().types.is_dictionary(kind) else kind


def features_of(schema: Any) -> dict[str, Any]:
    """What ``datasets`` says of columns; nothing where it says nothing that can be understood."""
    try:
        found = parse_json((schema.metadata or {})[b"huggingface"].decode())["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(feature: Any) -> object:
    return feature.get("_type") if isinstance(feature, dict) else None


def class_names(feature: Any) -> tuple[str, ...]:
    """The names that the numbers of a column count, by what ``datasets`` says of it; none where that has another form."""
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict):  # of an older version: number -> name
        names = [names.get(str(k)) for k in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) and 0 < len(name) < _MAX_LABEL for name in names):
        return ()
    return tuple(names) if len({*names}) == len(names) else ()


def named_classes(values: list[Any], names: Sequence[str], *, source: str, column: str, start: int) -> list[Any]:
    """``values``, from row ``start`` on, with names for the numbers that count them, and None for -1: so ``datasets`` says "no class".

    Raises SourceError: a number that no name has.
    """
    if not names:
        return values
    numbers = [isinstance(value, int) and not isinstance(value, bool) for value in values]
    for row, (value, number) in enumerate(zip(values, numbers, strict=True), start):
        if number and not -1 <= value < len(names):
            raise SourceError(f"{source}, row {row}: {column} is {value}, and its ClassLabel has {len(names)} names")
    known = [*names, None]  # the last: of -1
    return [known[value] if number else value for value, number in zip(values, numbers, strict=True)]


def _as_text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    text = str(value)
    if len(text) > _MAX_LABEL or "\0" in text:
        raise RefusedImage(f"a label of {len(text)} characters, which is no name of a class")
    return text


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("Arrow and Parquet need pyarrow: pip install 'featcache[parquet]'") from error
    return pyarrow


class _refusing:  # noqa: N801 - a context
    """What pyarrow raises becomes RefusedImage."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        arrow = _pyarrow().lib.ArrowException
        if isinstance(error, MemoryError):
            raise RefusedImage("cannot be read: not enough memory") from error
        if isinstance(error, arrow | OSError | ValueError | KeyError | IndexError | StopIteration | UnicodeError):
            raise RefusedImage(f"cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error
