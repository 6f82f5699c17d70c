"""A cache as a file that other programs read: Parquet, NumPy's .npz, a FAISS index, JSON for FiftyOne and Label Studio.

In: an open cache, and columns to add. Out: a file, complete or not at all, written block by block: memory does not grow with rows.

FAISS: ``IndexIDMap`` over ``IndexFlatIP``, rows at unit length, so that an inner product is a cosine; ids are row numbers of the
cache. Its bytes are those of ``faiss.write_index`` (faiss/impl/index_write.cpp), for which nothing needs to be installed.
"""

import json
import struct
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.cache.features import Features, is_finite
from featcache.cache.format import Rows, bytes_of
from featcache.cache.table import (
    INTEGER,
    NOTHING,
    REAL,
    TEXT,
    Added,
    Block,
    Texts,
    arrow,
    arrow_schema,
    blocks,
    kinds_of,
    notes_of,
    record_batches,
    rows_per_block,
    slices,
)
from featcache.errors import ExportError
from featcache.system.files import check_free_space, publish_file, target_of

if TYPE_CHECKING:
    from featcache.cache.cache import FeatureCache

_ROW_GROUP_BYTES = 1 << 26  # of vectors: what a reader of Parquet holds at a time
_WHICH = ("path", "label", "split", "sha256")  # columns beside an index
_FIELD = "fiftyone.core.fields."


def format_of(output: Path) -> str | None:
    """The ending that says what to write; None if there is none that is known."""
    name = output.name.lower()
    return next((suffix for suffix in WRITERS if name.endswith(suffix) and name != suffix), None)


def files_of(output: Path) -> tuple[Path, ...]:
    """What ``write_as`` writes: the output, and beside a FAISS index which row is which image."""
    beside = output.with_name(f"{output.name}.jsonl")
    return (beside, output) if format_of(output) == ".faiss" else (output,)


def columns_of(output: Path, rows: Rows, added: Added = NOTHING) -> tuple[str, ...]:
    """What each row has in the files of ``write_as``, by its name there."""
    kind, more = format_of(output), [*added.kinds]
    if kind == ".faiss":
        return ("id", *_WHICH, "vector")
    if kind == ".labelstudio.json":
        return ("image", "path", "sha256", "split", "label", *more)
    if kind == ".fiftyone.json":
        more = [name for name in ("prediction", "x", "y") if name in more]
        return ("filepath", "tags", "sha256", "ground_truth", *more, "embedding")
    return (*kinds_of(rows, added), "vector")


def write_as(cache: "FeatureCache", output: Path, added: Added = NOTHING, *, by: str = "") -> None:
    """Write all rows in the format that the ending of ``output`` says; replaces it.

    Args:
        added: columns beside those of the cache. by: which model predicted, in a word.

    Raises:
        CacheError: damaged. StorageError: it cannot be written. MissingDependencyError: Parquet without pyarrow.
        ExportError: class names that look the same, or no row that could be found in an index.
    """
    kind = format_of(output)
    assert kind is not None
    needed = len(cache) * (cache.dim * (4 if kind == ".faiss" else cache.dtype.itemsize) + 64)
    check_free_space(target_of(output).parent, needed)
    cache.check_features()  # before the first file is there
    for path in files_of(output):
        write = WRITERS[kind] if path == output else _write_which
        with publish_file(path) as file:
            write(file, cache, added, by)


def _write_parquet(file: BinaryIO, cache: "FeatureCache", added: Added, by: str) -> None:
    """Compressed; no dictionary and no statistics of vectors."""
    pa, schema = arrow(), arrow_schema(cache, added)
    texts = [name for name, kind in kinds_of(cache.rows, added).items() if kind == TEXT]
    others = [name for name in schema.names if name != "vector"]
    options: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": [name for name in texts if name not in ("sha256", "path")],
        "write_statistics": others,
        "write_page_checksum": True,
    }
    per_group, group, held = max(1, _ROW_GROUP_BYTES // (cache.dim * cache.dtype.itemsize)), list[Any](), 0
    with pa.parquet.ParquetWriter(file, schema, **options) as writer:
        for batch in record_batches(cache, schema, added):
            group, held = [*group, batch], held + len(batch)
            if held >= per_group:
                writer.write_table(pa.Table.from_batches(group, schema), row_group_size=held)
                group, held = [], 0
        if group:
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=held)


def _write_npz(file: BinaryIO, cache: "FeatureCache", added: Added, by: str) -> None:
    """An array per column; where there is no label or split, the text is empty. ``featcache``: what ``notes_of`` says, as JSON."""
    kinds, texts, computed = kinds_of(cache.rows, added), Texts(cache), list[Block]()
    with zipfile.ZipFile(file, "w") as archive:
        with _entry(archive, "vector", cache.dtype.newbyteorder("<"), (len(cache), cache.dim)) as entry:
            for block in blocks(cache, added):
                entry.write(bytes_of(block["vector"]))
                computed.append({name: block[name] for name in added.kinds})
        for name, kind in kinds.items():
            pieces = _of_added(computed, name) if name in added.kinds else _of_texts(texts, name, len(cache))
            dtype = _dtype_of(kind, pieces)
            with _entry(archive, name, dtype, (len(cache),), packed=True) as entry:
                for piece in pieces():
                    entry.write(bytes_of(_array(piece, dtype)))
        notes = np.array(json.dumps(notes_of(cache)))
        with _entry(archive, "featcache", notes.dtype, (), packed=True) as entry:
            entry.write(notes.tobytes())


def _of_added(computed: list[Block], name: str) -> Callable[[], Iterator[Any]]:
    return lambda: (block[name] for block in computed)


def _of_texts(texts: Texts, name: str, n: int) -> Callable[[], Iterator[Any]]:
    return lambda: (texts.of(rows)[name] for rows in slices(n, 1 << 16))


def _dtype_of(kind: str, pieces: Callable[[], Iterator[Any]]) -> np.dtype[Any]:
    """NumPy's type of a column: of texts as wide as the longest."""
    if kind in (INTEGER, REAL):
        return np.dtype("<i8" if kind == INTEGER else "<f4")
    longest = max((len(text or "") for piece in pieces() for text in piece), default=0)
    return np.dtype(f"{'<U' if kind == TEXT else 'S'}{max(1, longest)}")


def _array(values: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.array([value or "" for value in values] if dtype.kind == "U" else values, dtype)


def _entry(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], *, packed: bool = False
) -> Any:
    """An array in a .npz, begun: what is written to it are its values."""
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    entry = archive.open(info, "w", force_zip64=True)
    np.lib.format.write_array_header_2_0(entry, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return entry


def _write_faiss(file: BinaryIO, cache: "FeatureCache", added: Added, by: str) -> None:
    size = rows_per_block(cache)
    found = [_norms(block) for block in cache.blocks(np.arange(len(cache)), size=size)]
    norms = np.concatenate([np.empty(0, np.float32), *found])
    ids = np.flatnonzero(norms)
    if not len(ids):
        raise ExportError(f"{cache.path} has no row that an index could hold: none, or only zeros")
    file.write(_faiss_header(b"IxMp", cache.dim, len(ids)) + _faiss_header(b"IxFI", cache.dim, len(ids)))
    file.write(struct.pack("<Q", len(ids) * cache.dim))
    for rows, block in zip(slices(len(ids), size), cache.blocks(ids, size=size), strict=True):
        file.write(bytes_of((block.astype(np.float32) / norms[ids[rows], None]).astype("<f4", copy=False)))
    file.write(struct.pack("<Q", len(ids)))
    file.write(bytes_of(ids.astype("<i8")))


def _norms(features: Features) -> npt.NDArray[np.float32]:
    """(n,) lengths of (n, D) rows; 0 where there is none that can be divided by."""
    values = features.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", values, values))
    return np.where(is_finite(features) & np.isfinite(norms), norms, np.float32(0))


def _faiss_header(kind: bytes, dim: int, n: int) -> bytes:
    """Its kind, dimension, length, two numbers that are not used, that it is trained, and the metric: inner product."""
    return struct.pack("<4siqqqBi", kind, dim, n, 1 << 20, 1 << 20, 1, 0)


def _write_which(file: BinaryIO, cache: "FeatureCache", added: Added, by: str) -> None:
    """Beside an index: a line of JSON for each row, its id first."""
    texts = Texts(cache)
    for rows in slices(len(cache), 1 << 16):
        block = texts.of(rows)
        for row, *values in zip(range(rows.start, rows.stop), *(block[name] for name in _WHICH), strict=True):
            file.write(json.dumps({"id": row} | dict(zip(_WHICH, values, strict=True))).encode() + b"\n")


def _plain(value: Any) -> Any:
    """A number of NumPy's as one of JSON's; None where it is not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write_fiftyone(file: BinaryIO, cache: "FeatureCache", added: Added, by: str) -> None:
    """What ``fiftyone.Dataset.from_json`` reads; paths are relative to its ``rel_dir``."""
    label, number = f"{_FIELD}EmbeddedDocumentField(fiftyone.core.labels.Classification)", f"{_FIELD}FloatField"
    fields = {
        "filepath": f"{_FIELD}StringField",
        "tags": f"{_FIELD}ListField({_FIELD}StringField)",
        "sha256": f"{_FIELD}StringField",
        "ground_truth": label,
        **({"prediction": label} if "prediction" in added.kinds else {}),
        **{name: number for name in ("x", "y") if name in added.kinds},
        "embedding": f"{_FIELD}ListField({number})",
    }
    head = {"name": cache.path.stem, "media_type": "image", "sample_fields": fields}
    file.write(json.dumps(head).removesuffix("}").encode() + b', "samples": [')
    _write_list(file, (_sample(row) for row in _by_row(cache, added)))
    file.write(b"}\n")


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    found = {"filepath": row["path"], "tags": [row["split"]] if row["split"] else [], "sha256": row["sha256"]}
    found["ground_truth"] = _classification(row["label"])
    if "prediction" in row:
        found["prediction"] = _classification(row["prediction"], confidence=row["probability"])
    vector = row["vector"] if np.isfinite(row["vector"]).all() else None
    embedding = None if vector is None else vector.tolist()
    return found | {name: row[name] for name in ("x", "y") if name in row} | {"embedding": embedding}


def _classification(label: str | None, **more: Any) -> dict[str, Any] | None:
    return None if label is None else {"_cls": "Classification", "label": label, **more}


def _write_label_studio(file: BinaryIO, cache: "FeatureCache", added: Added, by: str) -> None:
    """Tasks for a project with ``<Image name="image" value="$image"/>`` and ``<Choices name="label" toName="image">``."""
    file.write(b"[")
    _write_list(file, (_task(row, by) for row in _by_row(cache, added)))


def _task(row: dict[str, Any], by: str) -> dict[str, Any]:
    address = f"/data/local-files/?d={urllib.parse.quote(row.get('path_bytes') or row['path'])}"
    task: dict[str, Any] = {"data": {"image": address, **{name: row[name] for name in ("path", "sha256", "split")}}}
    if row["label"] is not None:
        task["annotations"] = [{"result": _choice(row["label"])}]
    if row.get("prediction") is not None:
        found = {"model_version": by, "score": row["probability"], "result": _choice(row["prediction"])}
        task["predictions"] = [found]
    return task


def _choice(label: str) -> list[dict[str, Any]]:
    return [{"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [label]}}]


def _by_row(cache: "FeatureCache", added: Added) -> Iterator[dict[str, Any]]:
    for block in blocks(cache, added, size=1024):
        for values in zip(*block.values(), strict=True):
            yield dict(zip(block, map(_plain, values), strict=True))


def _write_list(file: BinaryIO, values: Iterator[Any]) -> None:
    """The entries of a JSON list, and its end; a line each."""
    for number, value in enumerate(values):
        file.write((b",\n" if number else b"\n") + json.dumps(value, allow_nan=False).encode())
    file.write(b"\n]")


Writer = Callable[[BinaryIO, "FeatureCache", Added, str], None]
WRITERS: dict[str, Writer] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".faiss": _write_faiss,
    ".fiftyone.json": _write_fiftyone,
    ".labelstudio.json": _write_label_studio,
}
