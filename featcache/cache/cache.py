"""The cache file, format version 1: embeddings and what proves where they came from, in one plain HDF5 file.

Datasets (all contiguous, uncompressed, little-endian; row i of each belongs to the same image)::

    features         (N, D)  float16 or float32     labels   (N,)    int32, index into classes, -1 unknown
    paths            (N,)    UTF-8 strings          splits   (N,)    uint8: 0 none, 1 train, 2 val, 3 test
    digests          (N, 32) uint8, sha256 of file  classes  (C,)    UTF-8 strings, sorted
    sizes, mtimes    (N,)    int64, bytes and ns    refused/paths, refused/reasons  (R,) UTF-8 strings

Root attributes: ``format``, ``format_version``, ``spec`` (canonical JSON of all that changes the numbers),
``fingerprint`` (sha256 of ``spec``), ``provenance`` (JSON, never compared), and the checksums: ``features_crc32`` (one
for every ``rows_per_checksum`` rows of features), ``metadata_crc32`` (all the rest) and, missing in the first files,
``column_crc32`` (one for each dataset but ``features``, in the order of ``_COLUMNS``, and one for ``provenance``).

libhdf5 only ever lays out metadata in memory; feature bytes go through plain file I/O at the dataset's offset, because
libhdf5 takes the process down when it meets a full disk. When read, nothing in the file is trusted.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from featcache.cache.checksums import PROVENANCE, bytes_of, column_checksums, damaged_columns, update_checksums
from featcache.cache.features import FeatureReader, Features, Identity, identity_of, is_finite
from featcache.cache.hdf5_reader import SIGNATURE, Malformed, NotPlain, PlainDataset, PlainFile
from featcache.cache.sparse_file import SparseFile
from featcache.errors import CacheError, DamagedCacheError, FeatcacheError, NewerCacheError, SourceError, advice
from featcache.spec import canonical_json, check_spec, parse_json
from featcache.system.files import available_memory, check_free_space, publish_file, read_published

FORMAT = "featcache"
FORMAT_VERSION = 1
SPLITS = ("none", "train", "val", "test")  # position = the number stored
_ROWS_PER_CHECKSUM = 1024  # or more, if there would be too many:
_MAX_CHECKSUMS = 4096  # an HDF5 attribute holds at most 64 KiB
_ALIGNMENT = 4096


@dataclasses.dataclass(frozen=True)
class Rows:
    """The columns beside the features; row i of each belongs to the same image.

    Attributes:
        paths: (N,) bytes, UTF-8 (or the file system's own bytes), relative to the source root.
        labels: (N,) int32. splits: (N,) uint8. digests: (N, 32) uint8. sizes, mtimes: (N,) int64.
    """

    paths: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int32]
    splits: npt.NDArray[np.uint8]
    digests: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def equals(self, other: "Rows") -> bool:
        """Whether all columns are the same."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def encode_names(names: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Names as fixed-width bytes; file names that are not UTF-8 keep their own bytes."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def decode_names(names: npt.NDArray[np.bytes_]) -> tuple[str, ...]:
    """Inverse of ``encode_names``."""
    return tuple(name.decode("utf-8", "surrogateescape") for name in names.tolist())


# ---------------------------------------------------------------------------------------------------- writing


def write_cache(
    path: Path,
    rows: Rows,
    blocks: Iterable[Features],
    *,
    dim: int,
    spec: dict[str, Any],
    classes: tuple[str, ...] = (),
    refused: tuple[tuple[str, str], ...] = (),
    provenance: dict[str, Any] | None = None,
    staging: Path | None = None,
) -> None:
    """Publish a complete cache file under ``path``, atomically.

    Args:
        path: the file; replaced if it exists.
        rows: N rows.
        blocks: arrays (n, D) whose rows, one block after the other, are the N feature rows; cast to ``spec["storage"]``.
        dim: D.
        spec: everything that changes the numbers; ``spec["storage"]`` is float16 or float32.
        classes: sorted class names.
        refused: (path, reason) of each image without an embedding.
        provenance: recorded, never compared.
        staging: folder for the temporary file, on the same file system.

    Raises:
        StorageError: too little space, or the operating system refused a step; ``path`` is then unchanged.
        ValueError: ``blocks`` do not add up to N rows of D values.
    """
    dtype = np.dtype(spec["storage"]).newbyteorder("<")
    per_checksum = max(_ROWS_PER_CHECKSUM, -(-len(rows) // _MAX_CHECKSUMS))
    texts = (canonical_json(spec), canonical_json(provenance or {}))
    columns = _columns(rows, classes, refused)
    layout = functools.partial(_layout, columns, texts, (len(rows), dim), dtype, per_checksum)

    checksums = np.zeros(-(-len(rows) // per_checksum), np.uint32)
    frame, region = layout(checksums)
    check_free_space(path.parent, region.stop)
    with publish_file(path, staging=staging, needed=max(frame.size, region.stop)) as file:
        file.seek(region.start)
        written = 0
        for block in blocks:
            if block.ndim != 2 or block.shape[1] != dim:
                raise ValueError(f"block of shape {block.shape}, expected (n, {dim})")
            data = np.ascontiguousarray(block, dtype)
            update_checksums(checksums, data, written, per_checksum)
            file.write(bytes_of(data))
            written += len(data)
        if written != len(rows):
            raise ValueError(f"{written} feature rows for {len(rows)} images")
        # The first layout told where the features go; this one, alike, carries the checksums of what was written.
        frame, _ = layout(checksums)
        for offset, segment in frame.segments(region):
            file.seek(offset)
            file.write(segment)
        file.truncate(frame.size)


def _columns(rows: Rows, classes: tuple[str, ...], refused: tuple[tuple[str, str], ...]) -> dict[str, npt.NDArray[Any]]:
    """The datasets other than ``features``, in the order in which they are laid out and checksummed."""
    return {
        "paths": rows.paths,
        "labels": rows.labels.astype("<i4"),
        "classes": encode_names(classes),
        "splits": rows.splits.astype("u1"),
        "digests": rows.digests.astype("u1"),
        "sizes": rows.sizes.astype("<i8"),
        "mtimes": rows.mtimes.astype("<i8"),
        "refused/paths": encode_names(path for path, _ in refused),
        "refused/reasons": encode_names(reason for _, reason in refused),
    }


def _layout(
    columns: dict[str, npt.NDArray[Any]],
    texts: tuple[str, str],
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    per_checksum: int,
    checksums: npt.NDArray[np.uint32],
) -> tuple[SparseFile, range]:
    """Lay out the whole file in memory, except for the feature bytes; also return the byte range where they go."""
    frame = SparseFile()
    with h5py.File(
        frame, "w", libver="earliest", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT
    ) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["spec"], file.attrs["provenance"] = texts
        file.attrs["fingerprint"] = hashlib.sha256(texts[0].encode()).hexdigest()
        file.attrs["rows_per_checksum"] = per_checksum
        file.attrs["features_crc32"] = checksums
        file.attrs["metadata_crc32"] = np.uint32(_metadata_checksum(columns, texts))
        file.attrs["column_crc32"] = column_checksums(columns, texts[1])
        for name, values in columns.items():
            kind = h5py.string_dtype("utf-8", values.dtype.itemsize) if values.dtype.kind == "S" else values.dtype
            file.create_dataset(name, data=values.astype(kind))
        # Space for the features is reserved and left for plain I/O to fill.
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_layout(h5py.h5d.CONTIGUOUS)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        creation.set_obj_track_times(False)  # the same content gives the same bytes, whenever it is written
        space = h5py.h5s.create_simple(shape)
        dataset = h5py.h5d.create(file.id, b"features", h5py.h5t.py_create(dtype), space, creation)
        start = dataset.get_offset() or 0  # HDF5 gives no offset to an empty dataset
        del dataset
    return frame, range(start, start + shape[0] * shape[1] * dtype.itemsize)


def _metadata_checksum(columns: dict[str, npt.NDArray[Any]], texts: tuple[str, str]) -> int:
    value = zlib.crc32("\0".join(texts).encode())
    for name, values in columns.items():
        value = zlib.crc32(f"{name}{values.dtype.str}{values.shape}".encode(), value)
        value = zlib.crc32(bytes_of(values), value)
    return value


# ---------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureCache:
    """A cache file, open for reading. Structure and metadata are verified by ``open``, features before first use.

    Attributes:
        path: the file.
        spec: all that changes the numbers. fingerprint: its sha256. provenance: how the file came about.
        classes: C class names.
        rows: the columns beside the features.
        refused: (path, reason) of each image without an embedding.
        dtype: of the features. dim: D, the number of values per embedding.
        feature_checksums, rows_per_checksum, column_checksums: as recorded; the last are empty in the first files.
        damaged_columns: none, except after ``salvage``. opened: which file it was, see ``FeatureReader.identity``.
    """

    path: Path
    spec: dict[str, Any]
    fingerprint: str
    provenance: dict[str, Any]
    classes: tuple[str, ...]
    rows: Rows
    refused: tuple[tuple[str, str], ...]
    dtype: np.dtype[Any]
    dim: int
    feature_checksums: npt.NDArray[np.uint32]
    rows_per_checksum: int
    column_checksums: dict[str, int]
    damaged_columns: tuple[str, ...]
    _offset: int
    opened: Identity
    _verified: set[Identity] = dataclasses.field(default_factory=set)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "FeatureCache":
        """Open ``path``.

        Raises:
            CacheError: missing, not a featcache file, written by a newer version, or damaged.
        """
        cache = cls.salvage(path)
        if cache.damaged_columns:
            raise DamagedCacheError(
                f"{path} is damaged: checksum mismatch in its {', '.join(cache.damaged_columns)}; {advice(path)}"
            )
        return cache

    @classmethod
    def salvage(cls, path: str | os.PathLike[str]) -> "FeatureCache":
        """Open ``path`` for repair: as ``open``, but the columns that ``damaged_columns`` names may hold anything."""
        return read_published(Path(path), cls._open)

    @classmethod
    def _open(cls, path: Path) -> "FeatureCache":
        if not os.path.lexists(path):
            raise CacheError(f"{path} does not exist; make it with `featcache extract SOURCE -o {path}`")
        if not path.is_file():
            raise CacheError(f"{path} is no regular file; expected a cache written by `featcache extract`")
        try:
            with path.open("rb") as file:
                if file.read(len(SIGNATURE)) != SIGNATURE:
                    raise CacheError(f"{path} is not an HDF5 file; expected a cache written by `featcache extract`")
                opened = identity_of(file.fileno())
                return cls(path, **_read(path, PlainFile(file)), opened=opened)
        except FeatcacheError:
            raise
        except NotPlain as error:
            raise CacheError(f"{path} is refused: {error}; expected a cache written by `featcache extract`") from error
        except Malformed as error:
            raise DamagedCacheError(f"{path} is damaged beyond repair: {error}; {_anew(path)}") from error
        except Exception as error:  # damaged JSON, for one, raises several kinds
            if isinstance(error, MemoryError) or getattr(error, "errno", None):  # not the file's fault
                raise CacheError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
            what = f"{path} is damaged beyond repair ({type(error).__name__} while reading it); {_anew(path)}"
            raise DamagedCacheError(what) from error

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """N relative paths."""
        return decode_names(self.rows.paths)

    @property
    def y(self) -> npt.NDArray[np.int32]:
        """(N,) labels, -1 where unknown."""
        return self.rows.labels

    @functools.cached_property
    def X(self) -> Features:  # noqa: N802 - the field's name for it
        """(N, D) features, memory-mapped and read-only, for notebooks: verified once, then read where they are used.

        The pages used count as this process's memory until the system needs them elsewhere; ``reader`` takes no more
        than what it is asked for.

        Raises:
            CacheError: a checksum does not match; the damaged rows are named.
        """
        with self.reader() as features:
            return features.map()

    @contextlib.contextmanager
    def reader(self) -> Iterator[FeatureReader]:
        """Verified features to be read from the open file, which is closed at the end of the ``with``.

        They are verified when first read from, and again only if the file is no longer the one that was verified.

        Raises:
            CacheError: the file cannot be read; a checksum does not match, the damaged rows are named.
        """
        with self.unverified() as features:
            if features.identity not in self._verified:
                identity = features.identity  # as it is before reading
                if damaged := self._damaged(features):
                    rows = ", ".join(f"{start}-{stop - 1}" for start, stop in damaged[:5])
                    raise DamagedCacheError(
                        f"{self.path} is damaged: checksum mismatch in rows {rows}; {advice(self.path)}"
                    )
                self._verified.add(identity)
            yield features

    def check_features(self) -> None:
        """Verify all features, once. Raises CacheError with the damaged rows."""
        with self.reader():
            pass

    def verify(self) -> list[tuple[int, int]]:
        """Read every feature byte; return the (start, stop) row ranges whose checksum does not match.

        Raises:
            CacheError: the file cannot be read, or was replaced since it was opened.
        """
        with self.unverified() as features:
            return self._damaged(features)

    def unverified(self) -> FeatureReader:
        """Features to be read from the open file without any check."""
        return FeatureReader(self.path, self._offset, (len(self), self.dim), self.dtype)

    def _damaged(self, features: FeatureReader) -> list[tuple[int, int]]:
        step, identity = self.rows_per_checksum, features.identity  # as it is before reading
        damaged = [
            (number * step, min((number + 1) * step, len(self)))
            for number, block in enumerate(features.scan(step))
            if zlib.crc32(bytes_of(block)) != self.feature_checksums[number]
        ]
        if damaged and identity != self.opened:
            raise CacheError(f"{self.path} was replaced or changed since it was opened; run the command again")
        return damaged

    def take(self, rows: npt.NDArray[np.intp]) -> Features:
        """Verified features of ``rows``, copied; unlike ``X`` it leaves no file open. Raises CacheError."""
        with self.reader() as features:
            return features[rows]

    def where(self, split: str) -> npt.NDArray[np.intp]:
        """Row numbers of a split: "train", "val", "test" or "none". Raises SourceError for another name."""
        if split not in SPLITS:
            raise SourceError(f"no split is called {split!r}; choose one of {', '.join(SPLITS)}")
        return np.flatnonzero(self.rows.splits == SPLITS.index(split))

    def split(self, name: str) -> tuple[Features, npt.NDArray[np.int32]]:
        """(X, y) of one split's rows, copied into memory. Raises SourceError, CacheError."""
        rows = self.where(name)
        return self.take(rows), self.y[rows]

    def check_finite(self, rows: npt.NDArray[np.intp], *, size: int = 8192) -> None:
        """Raise SourceError, naming the first, if features of ``rows`` are not finite."""
        with self.reader() as features:
            for start in range(0, len(rows), size):
                block = rows[start : start + size]
                bad = block[~is_finite(features[block])]
                if len(bad):
                    raise SourceError(
                        f"{self.path}: the features of {len(bad)} images are not finite, the first is row {bad[0]} "
                        f"({self.paths[bad[0]]}); extract again with --dtype float32 or --precision fp32"
                    )

    def blocks(self, rows: npt.NDArray[np.intp], *, size: int = 4096) -> Iterator[Features]:
        """Yield the features of ``rows`` in order, ``size`` rows at a time. Raises CacheError."""
        with self.reader() as features:
            for start in range(0, len(rows), size):
                yield features[rows[start : start + size]]


def _anew(path: Path) -> str:
    return f"restore it, or make it anew with `featcache extract SOURCE -o {path} --force`"


def _read(path: Path, file: PlainFile) -> dict[str, Any]:
    """Everything in the file, checked. Raises CacheError or Malformed with the reason, KeyError for a lost attribute."""

    def damaged(what: str) -> CacheError:
        return DamagedCacheError(f"{path} is damaged beyond repair: {what}; {_anew(path)}")

    if file.attrs.get("format") != FORMAT:
        raise CacheError(f"{path} is an HDF5 file of another program; expected a cache written by `featcache extract`")
    version = int(file.attrs["format_version"])
    if version != FORMAT_VERSION:
        raise NewerCacheError(
            f"{path} has format version {version}, this featcache reads {FORMAT_VERSION}; upgrade featcache"
        )
    texts = (str(file.attrs["spec"]), str(file.attrs["provenance"]))
    fingerprint = hashlib.sha256(texts[0].encode()).hexdigest()
    if file.attrs["fingerprint"] != fingerprint:
        raise damaged("the spec does not match its fingerprint")

    features = _dataset(path, file, "features", "f", 2)
    n, dim = features.shape
    if features.dtype.str not in ("<f2", "<f4") or dim < 1:
        raise damaged(f"features are {features.dtype} of shape {features.shape}")
    wanted = {name: _dataset(path, file, name, kind, ndim) for name, kind, ndim in _COLUMNS}
    if (needed := sum(found.nbytes for found in wanted.values())) > 2**28 and needed > available_memory():
        raise CacheError(f"{path} cannot be read: {needed / 1e9:,.1f} GB of rows do not fit into this machine's memory")
    columns = {name: file.read(found) for name, found in wanted.items()}
    if any(len(columns[name]) != n for name in _ROW_COLUMNS) or columns["digests"].shape[1] != 32:
        raise damaged("its datasets differ in length")
    if len(columns["refused/paths"]) != len(columns["refused/reasons"]):
        raise damaged("its datasets differ in length")
    recorded = file.attrs.get("column_crc32")
    whole = int(file.attrs["metadata_crc32"]) == _metadata_checksum(columns, texts)
    wrong = damaged_columns(columns, texts[1], recorded, whole=whole)
    if PROVENANCE in wrong:
        raise damaged("checksum mismatch in its " + ("metadata" if recorded is None else "provenance"))
    classes = decode_names(columns["classes"])
    labels = columns["labels"]
    if (
        not wrong
        and len(labels)
        and not (labels.min() >= -1 and labels.max() < len(classes) and columns["splits"].max() <= 3)
    ):
        raise damaged("labels or splits out of range")

    if features.offset + features.nbytes > path.stat().st_size:
        raise damaged("it is truncated")
    per_checksum = int(file.attrs["rows_per_checksum"])
    checksums = np.asarray(file.attrs["features_crc32"], np.uint32)
    if per_checksum < 1 or checksums.shape != (-(-n // per_checksum),):
        raise damaged("its checksums are incomplete")
    try:
        spec = check_spec(parse_json(texts[0]))
    except FeatcacheError as error:
        raise CacheError(f"{path} cannot be used: {error}") from error
    if spec["storage"] != features.dtype.name:
        raise damaged(f"features are {features.dtype}, its spec says {spec['storage']}")
    try:
        provenance = parse_json(texts[1])
    except ValueError as error:
        raise damaged(f"its provenance is unreadable: {error}") from error
    return {
        "spec": spec,
        "fingerprint": fingerprint,
        "provenance": provenance,
        "classes": classes,
        "rows": Rows(**{name: columns[name] for name in _ROW_COLUMNS}),
        "refused": tuple(
            zip(decode_names(columns["refused/paths"]), decode_names(columns["refused/reasons"]), strict=True)
        ),
        "dtype": features.dtype,
        "dim": dim,
        "damaged_columns": wrong,
        "column_checksums": {} if recorded is None else dict(zip(columns, recorded.tolist(), strict=False)),
        "_offset": features.offset,
        "feature_checksums": checksums,
        "rows_per_checksum": per_checksum,
    }


_COLUMNS = (
    ("paths", "S", 1),
    ("labels", "i", 1),
    ("classes", "S", 1),
    ("splits", "u", 1),
    ("digests", "u", 2),
    ("sizes", "i", 1),
    ("mtimes", "i", 1),
    ("refused/paths", "S", 1),
    ("refused/reasons", "S", 1),
)
_ROW_COLUMNS = ("paths", "labels", "splits", "digests", "sizes", "mtimes")


def _dataset(path: Path, file: PlainFile, name: str, kind: str, ndim: int) -> PlainDataset:
    """A dataset that really lies in this file: hard-linked, contiguous, no external, virtual or filtered storage."""
    found = file.dataset(name)
    if found is None:
        raise CacheError(f"{path} is refused: {name} is missing or a link to somewhere else")
    if found.dtype.kind != kind or len(found.shape) != ndim:
        raise CacheError(f"{path} is refused: {name} is not a plain contiguous dataset of the expected type")
    return found
