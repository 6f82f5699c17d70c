"""Tables of vectors that other programs wrote: Parquet and NumPy's .npz. Nothing in them is trusted, and no pickle is loaded.

In: a file. Out: a ``VectorTable``: what its columns are called, and its rows block by block, so that memory does not grow with them.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from featcache.cache.features import Features
from featcache.cache.table import BLOCK_BYTES, arrow
from featcache.errors import FeatcacheError, SourceError, UsageError
from featcache.images.columns import shown
from featcache.images.parquet import class_names, features_of, is_binary, is_cell, is_text, named_classes
from featcache.system.safe_load import parse_json

_MOST_VALUES = 1 << 16  # of a vector: four times what any network gives
_MOST_TEXT = 4096  # bytes of a name
_BLOCK = 1 << 16  # rows of names at a time
_VECTORS = ("vector", "vectors", "embedding", "embeddings", "feature", "features", "emb", "x")


class VectorTable(Protocol):
    """An open table.

    Attributes:
        path: the file. n: its rows. header: columns that hold a text or a number a row. vectors: those that hold a vector a row.
        others: columns of other kinds. types: of all of them, in words.
        notes: what the file says of itself if featcache wrote it, see ``cache.table.notes_of``; empty otherwise.
    """

    path: Path
    n: int
    header: tuple[str, ...]
    vectors: tuple[str, ...]
    others: tuple[str, ...]
    types: dict[str, str]
    notes: dict[str, Any]

    def shape(self, vectors: str) -> tuple[int, np.dtype[Any]]:
        """Length and type of the vectors in a column. Raises SourceError: they differ in length, or are none."""

    def columns(self, names: list[str]) -> Iterator[dict[str, list[Any]]]:
        """Rows of some columns: texts (bytes that are not UTF-8 as surrogates), integers, or None. Raises SourceError."""

    def blocks(self, vectors: str) -> Iterator[Features]:
        """All vectors, (m, D) at a time. Raises SourceError: a row has none, a shorter one, or one with holes."""

    def close(self) -> None:
        """Close the file."""


@contextlib.contextmanager
def open_vectors(path: Path) -> Iterator[VectorTable]:
    """Open ``path`` by its content. Raises SourceError: of no known kind, or damaged. MissingDependencyError."""
    with _damage_of(path):
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            table: VectorTable = _Parquet(path)
        elif head == b"PK\x03\x04":
            table = _Npz(path)
        else:
            raise SourceError(
                f"{path} is neither a Parquet file nor a .npz; of arrays make one: "
                "numpy.savez('vectors.npz', vector=X, path=names, label=labels)"
            )
    try:
        yield table
    finally:
        table.close()


@contextlib.contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Make a SourceError of whatever goes wrong while a file is read."""
    try:
        yield
    except FeatcacheError:
        raise
    except Exception as error:  # damaged Parquet, zip and arrays raise many kinds
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{path} cannot be read: {why}") from error


def choose_vectors(table: VectorTable, chosen: str | None) -> str:
    """The column of vectors. Raises UsageError: there is none, or there are several and no name tells."""
    if chosen is not None:
        if chosen not in table.vectors:
            raise UsageError(
                f"{table.path} has no vectors in a column {chosen!r}; columns of vectors: {shown(table.vectors) or 'none'}"
            )
        return chosen
    named = [name for word in _VECTORS for name in table.vectors if name.lower() == word]
    found = named[:1] or list(table.vectors)
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{table.path}: {shown(found)} may each hold the vectors; choose one, as --vector-column {found[0]}"
        )
    raise UsageError(
        f"{table.path} has no column of vectors, lists of float16, float32 or float64 (in a .npz a table (N, D)); it has "
        f"{shown(table.header) or 'no column that can be used'}"
    )


def _check_length(path: Path, name: str, length: float) -> int:
    if length != int(length):
        raise SourceError(
            f"{path}: the vectors in {name} differ in length, or some rows have none; expected one length"
        )
    if not 1 <= length <= _MOST_VALUES:
        raise SourceError(f"{path}: vectors in {name} have {int(length)} values, expected 1 to {_MOST_VALUES}")
    return int(length)


def _too_long(path: Path, name: str, length: int) -> SourceError:
    return SourceError(f"{path}: a text in {name} has {length:,} bytes, expected names of at most {_MOST_TEXT:,}")


class _Parquet:
    """A Parquet file. Texts are read as dictionaries: a long one that is repeated does not take memory for each row."""

    def __init__(self, path: Path) -> None:
        pa = self._pa = arrow()
        self.path = path
        with pa.parquet.ParquetFile(path) as file:
            schema, self.n, metadata = file.schema_arrow, file.metadata.num_rows, file.schema_arrow.metadata or {}
        if len(set(schema.names)) < len(schema.names):
            raise SourceError(f"{path} has two columns of one name; expected one of each")
        self._types = {field.name: _storage(pa, field.type) for field in schema}
        self.types = {name: str(kind) for name, kind in self._types.items()}
        self.header = tuple(name for name, kind in self._types.items() if is_cell(kind) or is_binary(kind))
        self.vectors = tuple(name for name, kind in self._types.items() if _is_vector(pa, kind))
        self.others = tuple(name for name in self._types if name not in (*self.header, *self.vectors))
        self._named = {name: class_names(feature) for name, feature in features_of(schema).items()}
        self.notes = _notes(metadata.get(b"featcache", b""))
        texts = [name for name in self.header if _is_text(self._types[name])]
        # One page after the other, not whole columns: row groups may be of any size.
        options = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
        self._file = pa.parquet.ParquetFile(path, read_dictionary=texts, **options)

    def shape(self, vectors: str) -> tuple[int, np.dtype[Any]]:
        kind, metadata = self._types[vectors], self._file.metadata
        dtype = np.dtype(kind.value_type.to_pandas_dtype())
        if self._pa.types.is_fixed_size_list(kind):
            return _check_length(self.path, vectors, kind.list_size), dtype
        with _damage_of(self.path):
            paths = [self._file.schema.column(k).path for k in range(len(self._file.schema))]
            (leaf,) = (k for k, path in enumerate(paths) if path.startswith(f"{vectors}."))
            values = sum(metadata.row_group(k).column(leaf).num_values for k in range(metadata.num_row_groups))
        return _check_length(self.path, vectors, values / max(self.n, 1)), dtype

    def columns(self, names: list[str]) -> Iterator[dict[str, list[Any]]]:
        start = 0
        with _damage_of(self.path):
            for batch in self._file.iter_batches(_BLOCK, columns=names):
                found = {name: self._plain(name, batch.column(name)) for name in names}
                yield {name: self._with_classes(name, cells, start) for name, cells in found.items()}
                start += len(batch)

    def _with_classes(self, name: str, cells: list[Any], start: int) -> list[Any]:
        if not (names := self._named.get(name)):
            return cells
        numbers = [int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in cells]
        return named_classes(numbers, names, source=str(self.path), column=name, start=start)

    def _plain(self, name: str, column: Any) -> list[Any]:
        pa = self._pa
        column = getattr(column, "storage", column)
        if pa.types.is_dictionary(column.type):
            values = [*self._texts(name, column.dictionary), None]
            return [values[k] for k in column.indices.fill_null(len(values) - 1).to_pylist()]
        return self._texts(name, column)

    def _texts(self, name: str, column: Any) -> list[Any]:
        if not _is_text(column.type):
            found: list[Any] = column.to_pylist()
            return found
        raw = column.cast(self._pa.large_binary()).to_pylist()
        if (longest := max((len(text) for text in raw if text is not None), default=0)) > _MOST_TEXT:
            raise _too_long(self.path, name, longest)
        return [None if text is None else text.decode("utf-8", "surrogateescape") for text in raw]

    def blocks(self, vectors: str) -> Iterator[Features]:
        dim, dtype = self.shape(vectors)
        size, start = max(1, min(_BLOCK, BLOCK_BYTES // (dim * dtype.itemsize))), 0
        with _damage_of(self.path):
            for batch in self._file.iter_batches(size, columns=[vectors]):
                yield self._rows(vectors, batch.column(0), dim, start)
                start += len(batch)

    def _rows(self, name: str, column: Any, dim: int, start: int) -> Features:
        column = getattr(column, "storage", column)
        holes = column.is_null().to_numpy(zero_copy_only=False)
        lengths = self._pa.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        if len(wrong := np.flatnonzero(holes | (lengths != dim))):
            what = "no vector" if holes[wrong[0]] else f"a vector of {lengths[wrong[0]]} values"
            raise SourceError(f"{self.path}: row {start + wrong[0]} has {what} in {name}, expected {dim} values")
        values = column.flatten()
        if values.null_count:
            row = start + int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // dim
            raise SourceError(f"{self.path}: row {row} has a vector with empty values in {name}; expected numbers")
        found: Features = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
        return found

    def close(self) -> None:
        self._file.close()


def _storage(pa: Any, kind: Any) -> Any:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_text(kind: Any) -> bool:
    """Bytes count: names that are not UTF-8."""
    return is_text(kind) or is_binary(kind)


def _is_vector(pa: Any, kind: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in lists) and pa.types.is_floating(kind.value_type)


def _notes(text: bytes) -> dict[str, Any]:
    try:
        return parse_json(text.decode())
    except ValueError:
        return {}


class _Npz:
    """A .npz: a zip of arrays, read as a stream; never unpickled, never whole in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(path)
        names = self._archive.namelist()
        if len(set(names)) < len(names) or not all(name.endswith(".npy") for name in names):
            raise SourceError(
                f"{path} is no .npz as NumPy writes them: expected arrays (.npy), each under a name of its own"
            )
        self._shapes = {name.removesuffix(".npy"): self._header(name) for name in names}
        arrays = {name: found for name, found in self._shapes.items() if found[0]}
        self.vectors = tuple(name for name, (shape, dtype) in arrays.items() if len(shape) == 2 and dtype.kind == "f")
        self.header = tuple(
            name for name, (shape, dtype) in arrays.items() if len(shape) == 1 and dtype.kind in "USiubf"
        )
        self.types = {name: f"{dtype} {shape}" for name, (shape, dtype) in self._shapes.items() if name != "featcache"}
        self.others = tuple(name for name in self.types if name not in (*self.header, *self.vectors))
        lengths = {name: arrays[name][0][0] for name in (*self.vectors, *self.header)}
        if len(set(lengths.values())) > 1:
            raise SourceError(
                f"{path}: its arrays differ in length ({', '.join(f'{k} {n}' for k, n in lengths.items())})"
            )
        self.n = next(iter(lengths.values()), 0)
        self.notes = self._own_notes()

    def _header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        with self._archive.open(name) as entry:
            return self._begin(entry, name)

    def _begin(self, entry: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        version = np.lib.format.read_magic(entry)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise SourceError(f"{self.path}: {name} is an array of an unknown format; save it by numpy.savez")
        shape, by_columns, dtype = read(entry)
        if dtype.hasobject or (by_columns and len(shape) > 1):
            what = "holds Python objects" if dtype.hasobject else "is stored column by column"
            how = "array.astype(str)" if dtype.hasobject else "numpy.ascontiguousarray(array)"
            raise SourceError(f"{self.path}: {name} {what}, which is not read; save {how}")
        return shape, dtype

    def _own_notes(self) -> dict[str, Any]:
        shape, dtype = self._shapes.get("featcache", ((0,), np.dtype("V1")))
        if shape or dtype.kind != "U" or dtype.itemsize > 1 << 26:
            return {}
        return _notes(str(next(self._read("featcache", 1))[0]).encode("utf-8", "surrogatepass"))

    def shape(self, vectors: str) -> tuple[int, np.dtype[Any]]:
        shape, dtype = self._shapes[vectors]
        return _check_length(self.path, vectors, shape[1]), dtype

    def columns(self, names: list[str]) -> Iterator[dict[str, list[Any]]]:
        for name in names:
            if (kind := self._shapes[name][1]).kind in "US" and kind.itemsize > 4 * _MOST_TEXT:
                raise _too_long(self.path, name, kind.itemsize)
        readers = [self._read(name, _BLOCK) for name in names]
        with _damage_of(self.path):
            for pieces in zip(*readers, strict=True):
                yield {name: _as_texts(piece) for name, piece in zip(names, pieces, strict=True)}

    def blocks(self, vectors: str) -> Iterator[Features]:
        dim, dtype = self.shape(vectors)
        with _damage_of(self.path):
            for block in self._read(vectors, max(1, BLOCK_BYTES // (dim * dtype.itemsize))):
                yield block.reshape(-1, dim)

    def _read(self, name: str, rows: int) -> Iterator[Any]:
        """The values of an array in order, those of ``rows`` rows at a time."""
        with self._archive.open(f"{name}.npy") as entry:
            shape, dtype = self._begin(entry, name)
            left, per_row = math.prod(shape), math.prod(shape[1:])
            while left:
                values = min(left, rows * per_row)
                yield np.frombuffer(_exactly(entry, values * dtype.itemsize), dtype)
                left -= values
            if entry.read(1):
                raise ValueError(f"{name} has more bytes than its shape says")

    def close(self) -> None:
        self._archive.close()


def _exactly(entry: Any, size: int) -> bytes:
    file: BinaryIO = entry
    if len(data := file.read(size)) != size:
        raise ValueError("an array is cut off")
    return data


def _as_texts(values: Any) -> list[Any]:
    if values.dtype.kind == "S":
        return [text.decode("utf-8", "surrogateescape") for text in values.tolist()]
    found: list[Any] = values.tolist()
    return found
