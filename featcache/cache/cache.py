"""``FeatureCache``: a cache file open for reading. Nothing in the file is trusted (``hdf5_reader.py``); libhdf5 never sees it.

In: a path. Out: rows as arrays, features verified before first use, and where the weights lie that belong to them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from featcache.cache.features import FeatureReader, Features, Identity, identity_of, is_finite
from featcache.cache.format import (
    COLUMNS,
    FORMAT,
    FORMAT_VERSION,
    PROVENANCE,
    ROW_COLUMNS,
    Provenance,
    Rows,
    bytes_of,
    damaged_columns,
    decode_names,
)
from featcache.cache.hdf5_reader import SIGNATURE, Malformed, NotPlain, PlainDataset, PlainFile
from featcache.errors import (
    CacheError,
    DamagedCacheError,
    FeatcacheError,
    NewerCacheError,
    Refusal,
    SourceError,
    repair_advice,
)
from featcache.spec import SPLITS, Spec
from featcache.system.display import count_rows, html_table, quantity
from featcache.system.files import read_published, target_of
from featcache.system.memory import available_memory
from featcache.system.path_advice import missing, place_for, typed
from featcache.system.path_kinds import CACHE_SUFFIXES as CACHE_SUFFIXES
from featcache.system.path_kinds import Kind, as_path, kind_of
from featcache.system.safe_load import parse_json

Labels = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureCache:
    """A cache file, open for reading. Structure and metadata are verified by ``open``, features before first use.

    Attributes:
        path: the file. spec: all that changes the numbers. provenance: how the file came about.
        classes: C class names. rows: the columns beside the features.
        refused: each image without an embedding, and why.
        dtype: of the features. dim: D, the number of values per embedding.
        feature_checksums, rows_per_checksum: as recorded.
        damaged_columns: none, except after ``salvage``. opened: which file it was, see ``FeatureReader.identity``.
    """

    path: Path
    spec: Spec
    provenance: Provenance
    classes: tuple[str, ...]
    rows: Rows
    refused: tuple[Refusal, ...]
    dtype: np.dtype[Any]
    dim: int
    feature_checksums: npt.NDArray[np.uint32]
    rows_per_checksum: int
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
                f"{path} is damaged: checksum mismatch in its {', '.join(cache.damaged_columns)}; {cache.advice}"
            )
        return cache

    @classmethod
    def salvage(cls, path: str | os.PathLike[str]) -> "FeatureCache":
        """Open ``path`` for repair: as ``open``, but the columns that ``damaged_columns`` names may hold anything."""
        return read_published(as_path(path), cls._open)

    @classmethod
    def _open(cls, path: Path) -> "FeatureCache":
        if not os.path.lexists(path):
            raise CacheError(
                missing(path, f"make it with `featcache extract SOURCE -o {place_for(path)}`", wanted="cache")
            )
        if not path.is_file():
            raise CacheError(f"{path} is {kind_of(path).value}; expected a cache written by `featcache extract`")
        try:
            with path.open("rb") as file:
                if file.read(len(SIGNATURE)) != SIGNATURE:
                    kind = kind_of(path)
                    what = "not an HDF5 file" if kind in (Kind.CACHE, Kind.FILE) else kind.value
                    raise CacheError(f"{path} is {what}; expected a cache written by `featcache extract`")
                opened = identity_of(file.fileno())
                return cls(path, **_read(path, PlainFile(file)), opened=opened)
        except FeatcacheError:
            raise
        except NotPlain as error:
            raise CacheError(f"{path} is refused: {error}; expected a cache written by `featcache extract`") from error
        except Exception as error:  # damaged JSON, for one, raises several kinds
            if isinstance(error, MemoryError) or getattr(error, "errno", None):  # not the file's fault
                raise CacheError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
            what = f": {error}" if isinstance(error, Malformed) else f" ({type(error).__name__} while reading it)"
            raise DamagedCacheError(
                f"{path} is damaged beyond repair{what}; restore it, or make it anew with "
                f"`featcache extract SOURCE -o {typed(path)} --force`"
            ) from error

    def __len__(self) -> int:
        return len(self.rows)

    def __fspath__(self) -> str:
        """Its file: whatever takes the path of a cache takes the open cache, and opens what is there by then."""
        return str(self.path)

    def __repr__(self) -> str:
        refused = f", {quantity(len(self.refused), 'image')} refused" if self.refused else ""
        made = f"{quantity(len(self), 'row')} of {self.dim} {self.dtype.name} by {self.spec.backbone}"
        return f"FeatureCache({str(self.path)!r}: {made}, {quantity(len(self.classes), 'class')}{refused})"

    def _repr_html_(self) -> str:
        return html_table(count_rows(self.classes, self.y, self.rows.splits, names=SPLITS), caption=repr(self))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the spec."""
        return self.spec.fingerprint

    @property
    def advice(self) -> str:
        """What to do if it is damaged."""
        return repair_advice(self.path, external=self.spec.stated is not None)

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
                self._check(features)
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
            return self._scan(features)[0]

    def unverified(self) -> FeatureReader:
        """Features to be read from the open file without any check."""
        return FeatureReader(self.path, self._offset, (len(self), self.dim), self.dtype)

    def take_unverified(self, rows: npt.NDArray[np.intp]) -> Features:
        """Features of ``rows``, copied, without any check."""
        with self.unverified() as features:
            return features[rows]

    def check_unchanged(self) -> None:
        """Raise CacheError if the file is no longer the one that was opened."""
        with self.unverified() as features:
            if features.identity != self.opened:
                raise self._replaced()

    def _replaced(self) -> CacheError:
        return CacheError(f"{self.path} was replaced or changed since it was opened; run the command again")

    def _check(self, features: FeatureReader, *, finite: bool = False) -> npt.NDArray[np.intp]:
        """Verify this file's features; return the rows that are not finite, if ``finite`` asks. Raises CacheError."""
        identity = features.identity  # as it is before reading
        damaged, not_finite = self._scan(features, finite=finite)
        if damaged:
            rows = ", ".join(f"{start}-{stop - 1}" for start, stop in damaged[:5])
            raise DamagedCacheError(f"{self.path} is damaged: checksum mismatch in rows {rows}; {self.advice}")
        self._verified.add(identity)
        return not_finite

    def _scan(
        self, features: FeatureReader, *, finite: bool = False
    ) -> tuple[list[tuple[int, int]], npt.NDArray[np.intp]]:
        """One pass over all features: damaged row ranges (start, stop) and, if ``finite`` asks, rows that are not finite."""
        identity = features.identity  # as it is before reading
        damaged, not_finite = [], [np.empty(0, np.intp)]
        for number, block in enumerate(features.scan(self.rows_per_checksum)):
            start = number * self.rows_per_checksum
            if zlib.crc32(bytes_of(block)) != self.feature_checksums[number]:
                damaged.append((start, start + len(block)))
            if finite:
                not_finite.append(start + np.flatnonzero(~is_finite(block)))
        if damaged and identity != self.opened:
            raise self._replaced()
        return damaged, np.concatenate(not_finite)

    def take(self, rows: npt.NDArray[np.intp]) -> Features:
        """Verified features of ``rows``, copied; unlike ``X`` it leaves no file open. Raises CacheError."""
        with self.reader() as features:
            return features[rows]

    def where(self, split: str) -> npt.NDArray[np.intp]:
        """Row numbers of a split: "train", "val", "test" or "none". Raises SourceError for another name."""
        if split not in SPLITS:
            raise SourceError(f"no split is called {split!r}; choose one of {', '.join(SPLITS)}")
        return np.flatnonzero(self.rows.splits == SPLITS.index(split))

    @overload
    def split(self, name: str) -> tuple[Features, Labels]: ...
    @overload
    def split(self, name: str, *, paths: Literal[True]) -> tuple[Features, Labels, npt.NDArray[np.object_]]: ...
    def split(self, name: str, *, paths: bool = False) -> tuple[npt.NDArray[Any], ...]:
        """(X, y) of one split's rows, copied into memory; with ``paths`` also their (n,) paths, to be indexed as y is.

        Raises:
            SourceError: an unknown split, or one without a row. CacheError: as ``reader``.
        """
        rows = self.where(name)
        if not len(rows):
            there = ", ".join(SPLITS[number] for number in np.unique(self.rows.splits) if number)
            what = (
                f"no image in the split {name!r}, only in {there}" if there else "no splits; X and y hold all its rows"
            )
            raise SourceError(f"{self.path} has {what}")
        pair = self.take(rows), self.y[rows]
        return (*pair, np.array(self.paths, object)[rows]) if paths else pair

    def to_arrow(self) -> Any:
        """A ``pyarrow.Table``, a row an image: the columns of ``cache.table``, ``vector`` on the file's own memory, like ``X``.

        Raises:
            MissingDependencyError: pyarrow is not installed. CacheError, ExportError: as ``X``, and ``readable_classes``.
        """
        from featcache.cache.table import to_arrow  # which takes what is above

        return to_arrow(self)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with the same columns; each ``vector`` is an array (D,) on the file's own memory.

        Raises:
            MissingDependencyError: pandas is not installed. CacheError, ExportError: as ``to_arrow``.
        """
        from featcache.cache.table import to_pandas

        return to_pandas(self)

    def rows_not_finite(self) -> npt.NDArray[np.intp]:
        """Verify all features; in the same pass find the rows that are not finite. Raises CacheError as ``reader``."""
        with self.unverified() as features:
            return self._check(features, finite=True)

    def check_finite(self, rows: npt.NDArray[np.intp]) -> None:
        """Verify all features and, in the same pass, look for numbers that are not finite.

        Raises:
            SourceError: features of ``rows`` are not finite; the first is named. CacheError: as ``reader``.
        """
        bad = rows[np.isin(rows, self.rows_not_finite())]
        if len(bad):
            raise SourceError(
                f"{self.path}: the features of {quantity(len(bad), 'image')} are not finite, the first is row {bad[0]} "
                f"({self.paths[bad[0]]}); extract again with --dtype float32 or --precision fp32"
            )

    def blocks(self, rows: npt.NDArray[np.intp], *, size: int = 4096) -> Iterator[Features]:
        """Yield the features of ``rows`` in order, ``size`` rows at a time. Raises CacheError."""
        with self.reader() as features:
            for start in range(0, len(rows), size):
                yield features[rows[start : start + size]]


def _read(path: Path, file: PlainFile) -> dict[str, Any]:
    """Everything in the file, checked. Raises CacheError or Malformed with the reason, KeyError for a lost attribute."""
    if file.attrs.get("format") != FORMAT:
        raise CacheError(f"{path} is an HDF5 file of another program; expected a cache written by `featcache extract`")
    version = int(file.attrs["format_version"])
    if version != FORMAT_VERSION:
        raise NewerCacheError(
            f"{path} has format version {version}, this featcache reads {FORMAT_VERSION}; upgrade featcache"
        )
    texts = (str(file.attrs["spec"]), str(file.attrs["provenance"]))
    if file.attrs["fingerprint"] != hashlib.sha256(texts[0].encode()).hexdigest():
        raise Malformed("the spec does not match its fingerprint")

    features = _dataset(path, file, "features", "f", 2)
    n, dim = features.shape
    if features.dtype.str not in ("<f2", "<f4") or dim < 1:
        raise Malformed(f"features are {features.dtype} of shape {features.shape}")
    wanted = {name: _dataset(path, file, name, dtype, ndim) for name, dtype, ndim in COLUMNS}
    if (needed := sum(found.nbytes for found in wanted.values())) > 2**28 and needed > available_memory():
        raise CacheError(f"{path} cannot be read: {needed / 1e9:,.1f} GB of rows do not fit into this machine's memory")
    columns = {name: file.read(found) for name, found in wanted.items()}
    lengths = {n, *(len(columns[name]) for name in ROW_COLUMNS)}
    refused = columns["refused/paths"], columns["refused/reasons"]
    if len(lengths) > 1 or columns["digests"].shape[1] != 32 or len(refused[0]) != len(refused[1]):
        raise Malformed("its datasets differ in length")
    recorded = file.attrs.get("column_crc32")
    wrong = damaged_columns(columns, texts, recorded, whole=int(file.attrs["metadata_crc32"]))
    if PROVENANCE in wrong:
        raise Malformed("checksum mismatch in its " + ("metadata" if recorded is None else "provenance"))
    classes = decode_names(columns["classes"])
    in_range = (columns["labels"] >= -1) & (columns["labels"] < len(classes)) & (columns["splits"] <= 3)
    if not (wrong or in_range.all()):
        raise Malformed("labels or splits out of range")
    if features.offset + features.nbytes > path.stat().st_size:
        raise Malformed("it is truncated")
    per_checksum = int(file.attrs["rows_per_checksum"])
    checksums = np.asarray(file.attrs["features_crc32"], np.uint32)
    if per_checksum < 1 or checksums.shape != (-(-n // per_checksum),):
        raise Malformed("its checksums are incomplete")
    try:
        spec = Spec.from_json(parse_json(texts[0]))
    except FeatcacheError as error:
        raise CacheError(f"{path} cannot be used: {error}") from error
    if spec.storage != features.dtype.name:
        raise Malformed(f"features are {features.dtype}, its spec says {spec.storage}")
    try:
        provenance = Provenance.from_json(parse_json(texts[1]))
    except ValueError as error:
        raise Malformed(f"its provenance is unreadable: {error}") from error
    return {
        "spec": spec,
        "provenance": provenance,
        "classes": classes,
        "rows": Rows(**{name: columns[name] for name in ROW_COLUMNS}),
        "refused": tuple(map(Refusal, *map(decode_names, refused))),
        "dtype": features.dtype,
        "dim": dim,
        "damaged_columns": wrong,
        "_offset": features.offset,
        "feature_checksums": checksums,
        "rows_per_checksum": per_checksum,
    }


def _dataset(path: Path, file: PlainFile, name: str, dtype: str, ndim: int) -> PlainDataset:
    """A dataset that really lies in this file: hard-linked, contiguous, no external, virtual or filtered storage."""
    found = file.dataset(name)
    if found is None:
        raise CacheError(f"{path} is refused: {name} is missing or a link to somewhere else")
    if found.dtype.kind != np.dtype(dtype).kind or len(found.shape) != ndim:
        raise CacheError(f"{path} is refused: {name} is not a plain contiguous dataset of the expected type")
    return found


def is_cache(path: Path) -> bool:
    """Whether ``path`` is meant to be a cache: it begins as HDF5 files do, or its suffix says so and its content nothing else."""
    return kind_of(path) is Kind.CACHE


# The longest ending of what ``extract`` names after a cache: the copy of its weights.
BESIDE = f".{'0' * 12}.safetensors"


def weights_copy(cache: Path, spec: Spec) -> Path:
    """Where ``extract`` keeps the weights that no library provides again, beside the cache, for models made from it."""
    cache = target_of(cache)
    return cache.with_name(f"{cache.name}.{spec.weights_sha256[:12]}.safetensors")
