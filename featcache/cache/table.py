"""The rows of a cache as a table: block by block, for Arrow and for pandas.

In: an open cache. Out: columns of plain text and numbers, one row an image; features verified before the first block.

Columns: ``sha256`` (hex), ``path``, ``label`` and ``split`` (None: none), ``size`` (bytes) and ``mtime`` (ns) of the image file,
``vector``; what a caller adds comes before the vector. Texts are UTF-8: of names that are not, bytes that do not fit are shown as
``\\xE9``, and ``path_bytes``, which such caches have besides, holds the names themselves.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.features import Features
from featcache.cache.format import Rows
from featcache.errors import ExportError, MissingDependencyError
from featcache.spec import SPLITS

if TYPE_CHECKING:
    from featcache.cache.cache import FeatureCache

TEXT, BYTES, INTEGER, REAL = "text", "bytes", "integer", "real"
BLOCK_BYTES = 1 << 25  # of features in memory at a time
_MOST_ROWS = 1 << 16
_MOST_NOTED = 1 << 28  # bytes of names, each as wide as the longest
_NOTES = b"featcache"  # the key of what Arrow's and Parquet's metadata say
Block = dict[str, Any]  # column -> n texts, or an array (n,); ``vector``: (n, D)


@dataclasses.dataclass(frozen=True)
class Added:
    """Columns beside those of the cache.

    Attributes:
        kinds: name -> ``TEXT`` or ``REAL``. compute: row numbers and features of a block -> their values.
    """

    kinds: Mapping[str, str]
    compute: Callable[[slice, Features], Block]


NOTHING = Added({}, lambda rows, features: {})


def kinds_of(rows: Rows, added: Added = NOTHING) -> dict[str, str]:
    """Column -> its kind, all but the vector, in the order in which they are written."""
    kinds = dict.fromkeys(("sha256", "path", "label", "split"), TEXT) | dict.fromkeys(("size", "mtime"), INTEGER)
    return kinds | ({} if all_utf8(rows) else {"path_bytes": BYTES}) | dict(added.kinds)


def all_utf8(rows: Rows) -> bool:
    """Whether all paths are."""
    try:
        for block in slices(len(rows), _MOST_ROWS):
            b"\0".join(rows.paths[block].tolist()).decode()
    except UnicodeDecodeError:
        return False
    return True


def slices(n: int, size: int) -> Iterator[slice]:
    """``range(n)`` in pieces."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def readable(name: str) -> str:
    """``name`` as UTF-8, bytes that do not fit shown as ``\\xE9``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def readable_classes(cache: "FeatureCache") -> list[str]:
    """C class names, as they are written. Raises ExportError where two of them look the same."""
    names = [readable(name) for name in cache.classes]
    if len(set(names)) < len(names):
        raise ExportError(f"{cache.path} has classes whose names differ only in bytes that are not UTF-8; rename one")
    return names


def blocks(cache: "FeatureCache", added: Added = NOTHING, *, size: int | None = None) -> Iterator[Block]:
    """All rows, ``size`` at a time. Raises CacheError as ``FeatureCache.reader``, ExportError."""
    size = size or rows_per_block(cache)
    texts = Texts(cache)
    features = cache.blocks(np.arange(len(cache)), size=size)
    for rows, block in zip(slices(len(cache), size), features, strict=True):
        yield texts.of(rows) | added.compute(rows, block) | {"vector": block}


def rows_per_block(cache: "FeatureCache") -> int:
    """As many as take ``BLOCK_BYTES``."""
    return max(1, min(_MOST_ROWS, BLOCK_BYTES // (cache.dim * cache.dtype.itemsize)))


class Texts:
    """The columns of a cache but for its vectors. Raises ExportError as ``readable_classes``."""

    def __init__(self, cache: "FeatureCache") -> None:
        self._rows, self._with_bytes = cache.rows, "path_bytes" in kinds_of(cache.rows)
        self._labels = [*readable_classes(cache), None]  # the last: of -1
        self._splits = [None, *SPLITS[1:]]

    def of(self, rows: slice) -> Block:
        """Of some rows."""
        there, digests = self._rows, self._rows.digests[rows].tobytes().hex()
        names = there.paths[rows].tolist()
        columns: Block = {
            "sha256": [digests[start : start + 64] for start in range(0, len(digests), 64)],
            "path": [name.decode("utf-8", "backslashreplace") for name in names],
            "label": [self._labels[label] for label in there.labels[rows].tolist()],
            "split": [self._splits[split] for split in there.splits[rows].tolist()],
            "size": there.sizes[rows],
            "mtime": there.mtimes[rows],
        }
        return columns | ({"path_bytes": names} if self._with_bytes else {})


def notes_of(cache: "FeatureCache") -> dict[str, Any]:
    """What a table says besides its rows, for whoever reads it, as JSON values; nothing of it is believed when it is read back."""
    refused = [list(refusal) for refusal in cache.refused]
    return {
        "format": 1,
        "spec": cache.spec.to_json(),
        "fingerprint": cache.fingerprint,
        "classes": list(cache.classes),
        "refused": refused,
    }


# -------------------------------------------------------------------------------------------------------------- Arrow


def arrow() -> Any:
    """The module ``pyarrow``, with its ``parquet``. Raises MissingDependencyError."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("Arrow and Parquet need pyarrow: pip install 'featcache[parquet]'") from error
    return pyarrow


def arrow_schema(cache: "FeatureCache", added: Added = NOTHING) -> Any:
    """A ``pyarrow.Schema``; ``vector`` is a list of fixed size, of float16 or float32, in the file's own type."""
    pa = arrow()
    types = {TEXT: pa.string(), BYTES: pa.binary(), INTEGER: pa.int64(), REAL: pa.float32()}
    fields = [
        pa.field(name, types[kind], nullable=name not in ("sha256", "path", "size", "mtime"))
        for name, kind in kinds_of(cache.rows, added).items()
    ]
    fields.append(pa.field("vector", _vector_type(pa, cache), nullable=False))
    return pa.schema(fields, metadata={_NOTES: json.dumps(notes_of(cache))})


def _vector_type(pa: Any, cache: "FeatureCache") -> Any:
    item = pa.float16() if cache.dtype == np.float16 else pa.float32()
    return pa.list_(pa.field("element", item, nullable=False), cache.dim)


def as_vectors(pa: Any, features: Features, kind: Any) -> Any:
    """(n, D) features as an Arrow array on the same memory."""
    return pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), type=kind)


def record_batches(cache: "FeatureCache", schema: Any, added: Added = NOTHING) -> Iterator[Any]:
    """All rows as ``pyarrow.RecordBatch``. Raises as ``blocks``."""
    pa = arrow()
    for block in blocks(cache, added):
        block["vector"] = as_vectors(pa, block["vector"], schema.field("vector").type)
        columns = [pa.array(block[field.name], field.type) for field in list(schema)[:-1]]
        yield pa.RecordBatch.from_arrays([*columns, block["vector"]], schema=schema)


def to_arrow(cache: "FeatureCache") -> Any:
    """``FeatureCache.to_arrow``."""
    pa, schema = arrow(), arrow_schema(cache)
    features, texts = cache.X, Texts(cache)
    pieces = [texts.of(rows) for rows in slices(len(cache), _MOST_ROWS)]
    columns = [
        pa.chunked_array([pa.array(piece[field.name], field.type) for piece in pieces], field.type)
        for field in list(schema)[:-1]
    ]
    return pa.Table.from_arrays([*columns, as_vectors(pa, features, schema.field("vector").type)], schema=schema)


def to_pandas(cache: "FeatureCache") -> Any:
    """``FeatureCache.to_pandas``."""
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError("a table for pandas needs pandas: pip install pandas") from error
    return pd.DataFrame(Texts(cache).of(slice(0, len(cache))) | {"vector": list(cache.X)})


def original_names(notes: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Classes and refused images that ``notes_of`` wrote. Raises ValueError: they are not of that form, or take too much memory."""
    classes, refused = notes["classes"], [(path, reason) for path, reason in notes["refused"]]
    names = [*classes, *(text for pair in refused for text in pair)]
    if not all(isinstance(name, str) for name in names) or classes != sorted(set(classes)):
        raise ValueError("its classes are not sorted names")
    longest = max((len(name.encode("utf-8", "surrogateescape")) for name in names), default=0)
    if longest * len(names) > _MOST_NOTED:
        raise ValueError("its names are too long")
    return classes, refused
