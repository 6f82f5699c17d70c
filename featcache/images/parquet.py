"""Parquet files that hold the bytes of images, as Hugging Face's ``datasets`` writes them: the one door to pyarrow of the images.

In: an open file. Out: rows and what their columns say; the bytes of a row. Rows are read in small blocks, the last few of which are
kept; memory is that of two pages, which most libraries make of up to 1,024 rows, whatever the size of the row group. Metadata is
read as JSON; nothing of it is evaluated.
"""

import bisect
import itertools
import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from featcache.errors import MissingDependencyError, RefusedImage, SourceError, UsageError
from featcache.images.columns import NONE, find_columns, quoted, shown
from featcache.images.members import MAX_FILE_BYTES, Member

_BYTES = ("image", "img", "picture", "photo", "bytes", "imagebytes", "content", "data", "jpg", "jpeg", "png", "webp")
_AT_A_TIME, _MOST_ROWS, _KEPT = 2**22, 64, 12  # bytes and rows of a block; how many are kept
_MAX_LABEL = 10_000  # characters


class Columns(NamedTuple):
    """Columns of a Parquet file by name: the one of bytes, as a path into its struct; labels, splits; "" where there is none.

    ``names``: of classes, for labels that are numbers.
    """

    image: str
    label: str
    split: str
    names: tuple[str, ...]


class ParquetImages:
    """The rows of one Parquet file.

    Raises:
        RefusedImage: it is none, or damaged; the same of any reading. MissingDependencyError: pyarrow is missing.
    """

    def __init__(self, file: BinaryIO) -> None:
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
            self._image = _image_column(self.schema)
            self._sizes = [self._mean_size(k) for k in range(meta.num_row_groups)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def members(self) -> list[Member]:
        """One for each row, called by its number; its size is -1: Parquet says nothing of it unread."""
        return [Member(str(row), row, -1, -1) for row in range(len(self))]

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
        features = _features(self.schema)
        top = self._image.partition(".")[0]
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
        for column in filter(None, (label, split)):
            self._check_text(column, name)
        return Columns(self._image, label, split, _class_names(features.get(label)))

    def values(self, column: str, names: tuple[str, ...] = ()) -> Iterator[str | None]:
        """The cells of a column as text; numbers that count ``names`` as these, None where there is nothing."""
        with _refusing():
            for batch in self._parquet.iter_batches(batch_size=2**14, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield _as_text(value, names)

    def _check_text(self, column: str, name: str) -> None:
        kind = self.schema.field(column).type
        types = _pyarrow().types
        if types.is_dictionary(kind):
            kind = kind.value_type
        if not (
            types.is_integer(kind) or types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind)
        ):
            raise SourceError(
                f"{name}: the column {column!r} is of the type {kind}; expected numbers or names of classes"
            )

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


def _image_column(schema: Any) -> str:
    """The path of the column of bytes. Raises RefusedImage: there is none, or there are several."""
    types, found = _pyarrow().types, dict[str, str]()
    features = _features(schema)
    for field in schema:
        inside = [field.type.field(k) for k in range(field.type.num_fields)] if types.is_struct(field.type) else []
        if any(each.name == "bytes" and _is_binary(each.type) for each in inside):
            found[field.name] = f"{field.name}.bytes"
        elif _is_binary(field.type) and (len(schema) == 1 or field.name.lower().replace("_", "") in _BYTES):
            found[field.name] = field.name
    marked = {name: path for name, path in found.items() if _kind(features.get(name)) == "Image"}
    found = marked or found
    if len(found) != 1:
        have = ", ".join(f"{field.name} ({field.type})"[:60] for field in itertools.islice(schema, 8))
        what = f"several columns of images ({shown(found)})" if found else "no column of the bytes of images"
        raise RefusedImage(f"{what}; expected one called image, of bytes or of a struct with bytes; it has {have}")
    return next(iter(found.values()))


def _is_binary(kind: Any) -> bool:
    types = _pyarrow().types
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _features(schema: Any) -> dict[str, Any]:
    """What ``datasets`` says of columns; nothing where it says nothing that can be understood."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(feature: Any) -> object:
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict):  # of an older version: number -> name
        names = [names.get(str(k)) for k in range(len(names))]
    fits = isinstance(names, list) and all(isinstance(name, str) and 0 < len(name) < _MAX_LABEL for name in names)
    return tuple(names) if fits and isinstance(names, list) else ()


def _as_text(value: Any, names: tuple[str, ...]) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and names:
        return names[value] if 0 <= value < len(names) else None
    text = str(value)
    if len(text) > _MAX_LABEL or "\0" in text:
        raise RefusedImage(f"a label of {len(text)} characters, which is no name of a class")
    return text


def _pyarrow() -> Any:
    try:
        import pyarrow
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
