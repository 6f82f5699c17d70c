"""``import``: vectors that other programs made become a cache, whose spec says so, and what is stated of them.

In: a table of vectors (``vectors.py``). Out: ``features.h5``. Heads, audit and reports work on it; nothing embeds images with it, as
nobody knows the network. All of the table is checked before a byte is written.

A table that ``export`` wrote gives the same datasets again. Its spec becomes a statement like any other: whoever had the file may
have changed it.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.copies import find_copies
from featcache.cache.features import Features, is_finite
from featcache.cache.format import Provenance, Rows, decode_names
from featcache.cache.table import original_names, readable
from featcache.cache.write import write_cache
from featcache.errors import DamagedCacheError, Refusal, SourceError, UsageError
from featcache.extraction.vectors import VectorTable, choose_vectors, open_vectors
from featcache.images.columns import find_columns, printable, shown, split_in, warn_of_no_classes, wrong_type
from featcache.images.read import Paths, ReadImage, read_images
from featcache.spec import SPLITS, Spec
from featcache.system.display import Shown, quantity
from featcache.system.files import check_may_replace, check_output
from featcache.system.memory import available_memory
from featcache.system.path_advice import HERE, check_path, missing
from featcache.system.path_kinds import AnyPath, Kind, as_path
from featcache.system.workdir import work_folder

log = logging.getLogger("featcache")
_NAMED = 200  # characters of a column's name that are kept
_OF_FILES, _OF_VECTORS = "of image files, as the table says", "of vectors: the table has no sha256"
_OF_FOLDER = "of image files, as they are now"


@dataclasses.dataclass(frozen=True, repr=False)
class ImportReport(Shown):
    """What ``import_vectors`` did.

    Attributes:
        cache: the file. source: the table. rows: N. dim: D. dtype: as stored. stated: what the spec says of their origin.
        digests: what identifies an image. classes: how many. class_names: in the order of their indices.
        splits: rows in each split that has any. copies: as in ``cache.copies``. fingerprint: of the spec. seconds: of the call.
    """

    cache: Path
    source: Path
    rows: int
    dim: int
    dtype: str
    stated: str
    digests: str
    classes: int
    class_names: tuple[str, ...]
    splits: dict[str, int]
    copies: dict[str, int]
    fingerprint: str
    seconds: float

    _shown = ("cache", "source", "rows", "dim", "stated", "classes", "splits", "seconds")


def import_vectors(
    source: AnyPath,
    output: AnyPath,
    *,
    stated: str | None = None,
    pictures: AnyPath | None = None,
    vector_column: str | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    force: bool = False,
) -> ImportReport:
    """Make a cache of vectors that were computed elsewhere.

    Args:
        source: a Parquet file (extra ``parquet``) or a .npz: a row an image, in any order, which is kept.
        output: the cache file.
        stated: what made the vectors, in a line; caches of the same statement belong together. What the file says if ``export``
            wrote it and this is None.
        pictures: the folder that paths are relative to: sha256, sizes and times are those of its files; all must be there, and be
            those that the table has a sha256 of.
        vector_column: lists of one length, of float16, float32 or float64 (stored as float32); found by its type when None.
        path_column, label_column, split_column: as in tables of images, see ``images.columns``; ``none``: there is no such.
            Labels are texts or whole numbers, with the names of a ClassLabel where datasets noted them. Besides ``sha256`` (hex) of
            the image file, if there is one: without it, and without ``pictures``, rows of the same vector count as copies.
        force: replace the output if it exists.

    Raises:
        UsageError: nothing is stated; no column, or several, for one thing; an output that exists. MissingDependencyError.
        SourceError: the table cannot be read; no rows; a path twice or none; vectors that are missing, not finite or of several
            lengths; texts that are no split or no sha256; files that are missing or others. StorageError: the cache cannot be written.
    """
    started, source, output = time.perf_counter(), as_path(source), as_path(output)
    _check_places(source, output, force=force)
    before = _identity(source)
    with open_vectors(source) as table:
        original = _original_spec(table)
        stated = _statement(table, stated, original)
        vectors = choose_vectors(table, vector_column)
        if not table.n:
            raise SourceError(f"{source} has no rows; expected an image in each")
        dim, found = table.shape(vectors)
        storage = "float16" if found == np.float16 else "float32"
        spec = Spec.external(stated, storage)
        chosen = {"path": path_column, "label": label_column, "split": split_column}
        rows, classes, refused, digests = _read_rows(table, {**chosen, "vector": vectors})
        if pictures is not None:
            rows, digests = _with_files(rows, as_path(pictures), known=digests == _OF_FILES), _OF_FOLDER
        own = _check_vectors(table, vectors, rows, storage, digest=digests == _OF_VECTORS)
        rows = rows if own is None else dataclasses.replace(rows, digests=own)
        imported: dict[str, Any] = {"from": source.name, "vectors": vectors[:_NAMED], "digests": digests}
        imported |= {"stated_spec": original.to_json()} if original else {}
        rest = {"imported": imported, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        write_cache(
            output,
            rows,
            _unchanged(table, vectors, before),
            dim=dim,
            spec=spec,
            classes=classes,
            refused=refused,
            provenance=Provenance(source=stated, rest=rest),
        )
    copies = find_copies(rows.digests, rows.labels, rows.splits, rows.paths)
    for sentence in copies.examples:
        log.warning(sentence)
    return ImportReport(
        cache=output,
        source=source,
        rows=len(rows),
        dim=dim,
        dtype=storage,
        stated=stated,
        digests=digests,
        classes=len(classes),
        class_names=classes,
        splits={SPLITS[split]: int(n) for split, n in zip(*np.unique(rows.splits, return_counts=True), strict=True)},
        copies=copies.counts(),
        fingerprint=spec.fingerprint,
        seconds=time.perf_counter() - started,
    )


def _check_places(source: Path, output: Path, *, force: bool) -> None:
    check_path(source, "vectors", ("import", HERE, "-o", output))
    if not os.path.lexists(source):
        raise SourceError(missing(source, "give a Parquet file or a .npz of vectors", wanted="vectors"))
    check_output(output, beside=".parts")
    check_may_replace(output, "--force", given=force, kind=Kind.CACHE)
    if os.path.lexists(output):
        with contextlib.suppress(DamagedCacheError):
            FeatureCache.salvage(output)  # what is no cache, or a newer one, stays
    if work_folder(output).is_dir():
        raise UsageError(f"unfinished work for {output} lies in {work_folder(output)}; finish it, or choose another -o")


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _unchanged(table: VectorTable, vectors: str, before: tuple[int, ...]) -> Iterator[Features]:
    """All vectors, which were checked already. Raises SourceError: the file is another one by now."""
    yield from table.blocks(vectors)
    if _identity(table.path) != before:
        raise SourceError(f"{table.path} changed while it was read; run the command again")


def _original_spec(table: VectorTable) -> Spec | None:
    """Of the cache that a table says it was exported from."""
    with contextlib.suppress(KeyError, TypeError, UsageError):
        return Spec.from_json(table.notes["spec"])
    return None


def _statement(table: VectorTable, stated: str | None, original: Spec | None) -> str:
    """What the spec is to say. Raises UsageError."""
    if stated is not None:
        return stated.strip()
    if original is None:
        raise UsageError(
            f"nothing says what made the vectors of {table.path}; say it, as --stated 'CLIP ViT-L/14 of open_clip, laion2b'"
        )
    return original.stated or f"{original.backbone}, exported by featcache, spec {original.fingerprint[:12]}"


def _read_rows(
    table: VectorTable, chosen: dict[str, str | None]
) -> tuple[Rows, tuple[str, ...], tuple[Refusal, ...], str]:
    """All columns beside the vectors, the classes, refused images, and what the digests are of."""
    unread = (*table.others, *table.vectors)
    columns = find_columns(str(table.path), (*table.header, *unread), chosen, unread=unread)
    try:
        classes, refused = original_names(table.notes)
    except (KeyError, ValueError, TypeError):
        classes, refused = [], []
    roles = {"path": columns.path, "label": columns.label, "split": columns.split}
    names = {role: columns.header[at] for role, at in roles.items() if at is not None}
    digests = next((name for name in columns.header if name.lower() == "sha256"), None)
    names |= {} if digests is None else {"sha256": digests}
    for role, name in names.items():
        if name in unread:
            raise wrong_type(str(table.path), name, table.types[name], role)
    if table.notes:
        names |= {name: name for name in ("size", "mtime", "path_bytes") if name in table.header}
    ignored = [name for name in columns.header if name not in (*names.values(), chosen["vector"])]
    said = ", ".join(f"{role} from {name!r}" for role, name in names.items() if role != "path_bytes")
    log.info("%s: %s%s", table.path, printable(said), f"; ignored: {printable(shown(ignored))}" if ignored else "")
    classes = classes if names.get("label") == "label" else []  # they are those of that column
    reading = _Reading(table.path, names, classes)
    for block in table.columns(list(dict.fromkeys(names.values()))):
        reading.add(block)
    of = _OF_VECTORS if digests is None else _OF_FILES
    return *reading.finish(), tuple(Refusal(*pair) for pair in refused), of


class _Reading:
    """Columns, as blocks of them come."""

    def __init__(self, path: Path, names: dict[str, str], classes: list[str]) -> None:
        self.path, self.names, self.n = path, names, 0
        self.room, self.widest = available_memory() // 3, 1  # columns are twice in memory when they are joined
        self.known = list(classes)
        self.number = {readable(name): k for k, name in enumerate(classes)}
        self.pieces: dict[str, list[npt.NDArray[Any]]] = {}

    def add(self, block: dict[str, list[Any]]) -> None:
        """Raises SourceError for the first row that cannot be understood."""
        column = {role: [*map(_without_gaps, block[name])] for role, name in self.names.items()}
        count = len(column["path"])
        paths = [self._path(k, path) for k, path in enumerate(_preferred(column))]
        self.widest = max(self.widest, max(map(len, paths), default=1))
        if self.widest * (self.n + count) > self.room:
            raise SourceError(
                f"{self.path}: paths of up to {self.widest:,} bytes do not fit into this machine's memory"
            )
        found: dict[str, npt.NDArray[Any]] = {
            "paths": np.array(paths, f"S{max(map(len, paths), default=1)}"),
            "labels": np.array([self._label(k, label) for k, label in enumerate(column.get("label", ()))], np.int32),
            "splits": np.array([self._split(k, split) for k, split in enumerate(column.get("split", ()))], np.uint8),
            "digests": self._digests(column.get("sha256", [])),
            "sizes": self._whole(column.get("size", [])),
            "mtimes": self._whole(column.get("mtime", [])),
        }
        missing: dict[str, npt.NDArray[Any]] = {
            "labels": np.full(count, -1, np.int32),
            "splits": np.zeros(count, np.uint8),
        }
        missing |= {"digests": np.zeros((count, 32), np.uint8), "sizes": np.zeros(count, np.int64)}
        missing |= {"mtimes": np.zeros(count, np.int64)}
        for name, values in found.items():
            self.pieces.setdefault(name, []).append(values if len(values) == count else missing[name])
        self.n += count

    def finish(self) -> tuple[Rows, tuple[str, ...]]:
        """All rows, and sorted classes. Raises SourceError: a path occurs twice, or names of classes do not fit into the memory."""
        if max((len(name) for name in self.known), default=0) * len(self.known) * 4 > self.room:
            raise SourceError(
                f"{self.path}: names of {len(self.known):,} classes do not fit into this machine's memory"
            )
        rows = Rows(**{name: np.concatenate(pieces) for name, pieces in self.pieces.items()})
        paths = _spelled_alike(rows.paths)
        order = np.argsort(paths, kind="stable")
        if len(twice := np.flatnonzero(paths[order[1:]] == paths[order[:-1]])):
            first, second = order[twice[0]], order[twice[0] + 1]
            name = printable(rows.paths[first].decode("utf-8", "backslashreplace"))
            raise SourceError(
                f"{self.path}: rows {first} and {second} have the same path, {name}; expected each image once"
            )
        classes = sorted(self.known)
        warn_of_no_classes(self.path, classes)
        place = np.array([*np.argsort(np.argsort(np.array(self.known, object), kind="stable")), -1], np.int32)
        return dataclasses.replace(rows, labels=place[rows.labels]), tuple(classes)

    def _wrong(self, k: int, role: str, value: Any, expected: str) -> SourceError:
        return SourceError(
            f"{self.path}: row {self.n + k}: {self.names[role]} is {str(value)[:80]!a}, expected {expected}"
        )

    def _path(self, k: int, value: Any) -> bytes:
        text = str(value) if isinstance(value, str | int) else ""
        try:
            name = text.encode("utf-8", "surrogateescape")
        except UnicodeError:
            name = b""
        if not name.strip() or b"\0" in name:
            raise self._wrong(k, "path", value, "the name of an image")
        return name

    def _label(self, k: int, value: Any) -> int:
        if value is None:
            return -1
        if isinstance(value, float):
            raise self._wrong(k, "label", value, "the name of a class, or a whole number")
        text = str(value)
        if text not in self.number:
            text = text.strip()
            if not text:
                return -1
            try:
                text.encode("utf-8", "surrogateescape")
            except UnicodeError:
                raise self._wrong(k, "label", value, "the name of a class") from None
            if "\0" in text:
                raise self._wrong(k, "label", value, "the name of a class")
        if text not in self.number:
            self.number[text] = len(self.known)
            self.known.append(text)
        return self.number[text]

    def _split(self, k: int, value: Any) -> int:
        found = 0 if value is None else split_in(self.names["split"], str(value))
        if found is None:
            raise self._wrong(k, "split", value, "train, val, test (or what people call them) or nothing")
        return found

    def _digests(self, values: list[Any]) -> npt.NDArray[np.uint8]:
        for k, value in enumerate(values):
            if not isinstance(value, str) or len(value) != 64 or not _is_hex(value):
                raise self._wrong(k, "sha256", value, "64 hexadecimal digits")
        return np.frombuffer(bytes.fromhex("".join(values)), np.uint8).reshape(-1, 32)

    def _whole(self, values: list[Any]) -> npt.NDArray[np.int64]:
        usable = all(isinstance(value, int) and abs(value) < 2**63 for value in values)
        return np.array(values if usable else [], np.int64)


def _with_files(rows: Rows, folder: Path, *, known: bool) -> Rows:
    """``rows`` with digests, sizes and times of the files below ``folder``; ``known``: they have digests to be compared with."""
    if not folder.is_dir():
        raise SourceError(
            missing(folder, "give the folder that the paths of the table are relative to", wanted=Path.is_dir)
        )
    files, found = Paths(folder, decode_names(rows.paths)), list[ReadImage[int]]()
    for read in read_images(files, range(len(rows)), len, workers=8):
        if read.reason:
            raise SourceError(
                f"{folder / files.paths[read.position]} {read.reason}; all images of the table must be there"
            )
        if known and read.digest != rows.digests[read.position].tobytes():
            raise SourceError(
                f"{folder / files.paths[read.position]} is not the image whose sha256 the table has; leave --source out"
            )
        found.append(read)
    digests = np.frombuffer(b"".join(read.digest for read in found), np.uint8).reshape(-1, 32)
    sizes, mtimes = (np.array([getattr(read, name) for read in found], np.int64) for name in ("size", "mtime"))
    return dataclasses.replace(rows, digests=digests, sizes=sizes, mtimes=mtimes)


def _preferred(column: dict[str, list[Any]]) -> list[Any]:
    """Paths; their own bytes where the table has them because they are not UTF-8."""
    return column.get("path_bytes", column["path"])


def _spelled_alike(paths: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bytes_]:
    """``paths`` without what no file system counts: ``./``, and slashes but the first. ``..`` may lead behind a link, and a backslash
    be part of a name."""
    odd = np.flatnonzero((np.char.find(paths, b"//") >= 0) | (np.char.find(paths, b"./") >= 0))
    if not len(odd):
        return paths
    plain = paths.copy()
    for k, path in zip(odd, paths[odd].tolist(), strict=True):
        first, *rest = path.split(b"/")
        plain[k] = b"/".join([*({first} - {b"."}), *(part for part in rest if part not in (b"", b"."))])
    return plain


def _without_gaps(value: Any) -> Any:
    """Floats that are whole numbers with gaps, as pandas keeps them, as such."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else None if value != value else value


def _is_hex(text: str) -> bool:
    return text.isascii() and not set(text.lower()) - set("0123456789abcdef")


def _check_vectors(
    table: VectorTable, vectors: str, rows: Rows, storage: str, *, digest: bool
) -> npt.NDArray[np.uint8] | None:
    """Read all vectors once. Raises SourceError: not as many as rows, or not finite as they are stored. Returns digests if asked."""
    found, start = list[bytes](), 0
    for block in table.blocks(vectors):
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(block, np.dtype(storage).newbyteorder("<"))
        if len(wrong := np.flatnonzero(~is_finite(stored))):
            row = start + int(wrong[0])
            name = printable(rows.paths[row].decode("utf-8", "backslashreplace"))
            raise SourceError(
                f"{table.path}: the vector of row {row} ({name}) is not finite as {storage}; leave the row out"
            )
        if digest:
            found += [hashlib.sha256(row.tobytes()).digest() for row in stored]
        start += len(block)
    if start != len(rows):
        raise SourceError(f"{table.path}: {start} vectors for {quantity(len(rows), 'row')}; it is damaged")
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32) if digest else None
