"""What a cache file looks like inside: format version 1, its columns and its checksums.

Datasets (all contiguous, uncompressed, little-endian; row i of each belongs to the same image)::

    features         (N, D)  float16 or float32     labels   (N,)    int32, index into classes, -1 unknown
    paths            (N,)    UTF-8 strings          splits   (N,)    uint8: 0 none, 1 train, 2 val, 3 test
    digests          (N, 32) uint8, sha256 of file  classes  (C,)    UTF-8 strings, sorted
    sizes, mtimes    (N,)    int64, bytes and ns    refused/paths, refused/reasons  (R,) UTF-8 strings

Root attributes: ``format``, ``format_version``, ``spec`` (canonical JSON of all that changes the numbers),
``fingerprint`` (sha256 of ``spec``), ``provenance`` (JSON), and the checksums: ``features_crc32`` (one
for every ``rows_per_checksum`` rows of features), ``metadata_crc32`` (all the rest) and, missing in the first files,
``column_crc32`` (one for each dataset but ``features``, in the order of ``COLUMNS``, and one for ``provenance``).
"""

import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "featcache"
FORMAT_VERSION = 1
COLUMNS = (  # name, type, dimensions
    ("paths", "S", 1),
    ("labels", "<i4", 1),
    ("classes", "S", 1),
    ("splits", "u1", 1),
    ("digests", "u1", 2),
    ("sizes", "<i8", 1),
    ("mtimes", "<i8", 1),
    ("refused/paths", "S", 1),
    ("refused/reasons", "S", 1),
)
ROW_COLUMNS = ("paths", "labels", "splits", "digests", "sizes", "mtimes")
PROVENANCE = "provenance"
CHECKSUMS = "checksums"  # no column: what is wrong is one of the checksums themselves
Indices = npt.NDArray[np.intp]
_NAMES = 2**16  # that are Python objects at a time


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
        pairs, starts = zip(vars(self).values(), vars(other).values(), strict=True), range(0, len(self), _NAMES)
        blocks = ((a[start : start + _NAMES], b[start : start + _NAMES]) for a, b in pairs for start in starts)
        return len(self) == len(other) and all(np.array_equal(*block) for block in blocks)

    @property
    def keys(self) -> npt.NDArray[np.bytes_]:
        """(N,) the digests as sortable keys."""
        return digest_keys(self.digests)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a cache came about: never compared, and believed only as far as it has the right form.

    Attributes:
        request: ``ExtractRequest.record()``: the same again means the same spec. None: not known.
        source: where the weights came from, in words.
        reload: what a library must be asked for to provide them again; None: a copy lies beside the cache.
        self_check: ``PrecisionChoice`` as JSON values: the precision in use, and what was tried.
        decoder: revision of what turned the files into pixels (``images.formats``); 0: from before that was recorded.
        rest: everything else, versions and time among it.
    """

    request: Mapping[str, Any] | None = None
    source: str = "unknown"
    reload: str | None = None
    self_check: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoder: int = 0
    rest: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def precision(self) -> str | None:
        """The precision that the embeddings were computed in."""
        found = self.self_check.get("precision")
        return found if isinstance(found, str) else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = dict(self.rest)
        if self.request is not None:
            values["request"] = dict(self.request)
        if (self.source, self.reload) != ("unknown", None):
            values["weights"] = {"source": self.source, "reload": self.reload}
        if self.self_check:
            values["precision"] = dict(self.self_check)
        if self.decoder:
            values["decoder_revision"] = self.decoder
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Provenance":
        """What ``to_json`` gave. What has not the form that is expected goes into ``rest``."""
        rest, known = dict(values), dict[str, Any]()
        if isinstance(rest.get("request"), dict):
            known["request"] = rest.pop("request")
        if isinstance(rest.get("precision"), dict):
            known["self_check"] = rest.pop("precision")
        if type(rest.get("decoder_revision")) is int:
            known["decoder"] = rest.pop("decoder_revision")
        match rest.get("weights"):
            case {"source": str(source), "reload": (str() | None) as reload, **more} if not more:
                known |= {"source": source, "reload": reload}
                del rest["weights"]
        return cls(**known, rest=rest)


def encode_names(names: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Names as fixed-width bytes; file names that are not UTF-8 keep their own bytes."""
    pending, blocks = iter(names), [np.empty(0, "S1")]
    while block := [name.encode("utf-8", "surrogateescape") for name in itertools.islice(pending, _NAMES)]:
        blocks.append(
            np.array(block, f"S{max(1, *map(len, block))}")
        )  # of all at once objects would take the most memory
    return np.concatenate(blocks)


def decode_names(names: npt.NDArray[np.bytes_]) -> tuple[str, ...]:
    """Inverse of ``encode_names``."""
    starts = range(0, len(names), _NAMES)
    blocks = (names[start : start + _NAMES].tolist() for start in starts)
    return tuple(name.decode("utf-8", "surrogateescape") for block in blocks for name in block)


def digest_keys(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    """(N, 32) -> (N,), sortable."""
    return np.ascontiguousarray(digests).view("S32").reshape(-1)


def metadata_checksum(columns: dict[str, npt.NDArray[Any]], texts: tuple[str, str]) -> int:
    """CRC-32 over the texts of spec and provenance, and over the name, type, shape and bytes of every column."""
    value = zlib.crc32("\0".join(texts).encode())
    for name, values in columns.items():
        value = column_checksum(name, values, value)
    return value


def bytes_of(values: npt.NDArray[Any]) -> memoryview:
    """The memory of an array, for what takes bytes; without a copy if it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def column_checksum(name: str, values: npt.NDArray[Any], before: int = 0) -> int:
    """CRC-32 over what came ``before``, and the name, type, shape and bytes of a column."""
    head = zlib.crc32(f"{name}{values.dtype.str}{values.shape}".encode(), before)
    return zlib.crc32(bytes_of(values), head)


def column_checksums(columns: dict[str, npt.NDArray[Any]], provenance: str) -> npt.NDArray[np.uint32]:
    """(C + 1,) CRC-32 of each of C columns, in their order, and of the provenance's text."""
    sums = [column_checksum(name, values) for name, values in columns.items()]
    return np.array([*sums, zlib.crc32(provenance.encode())], np.uint32)


def damaged_columns(
    columns: dict[str, npt.NDArray[Any]], texts: tuple[str, str], recorded: npt.NDArray[np.uint32] | None, *, whole: int
) -> tuple[str, ...]:
    """Names of the columns that are damaged (``PROVENANCE`` may be among them), ``CHECKSUMS`` if only a checksum is.

    Args:
        columns: C of them, as read. texts: spec and provenance, as read.
        recorded: (C + 1,) as the file has them; None if it has none, and then all are suspects.
        whole: the one checksum over all columns and texts, as the file has it.

    Raises:
        ValueError: ``recorded`` is of another shape.
    """
    suspects, intact = (*columns, PROVENANCE), whole == metadata_checksum(columns, texts)
    if recorded is None:
        return () if intact else suspects
    if np.shape(recorded) != (len(suspects),):
        raise ValueError("its checksums are incomplete")
    found = column_checksums(columns, texts[1])
    wrong = tuple(suspects[index] for index in np.flatnonzero(found != recorded))
    # Both kinds of checksum cover the same bytes: where they contradict each other, a checksum is what is damaged.
    return wrong if intact == (not wrong) else (CHECKSUMS,)


def update_checksums(sums: npt.NDArray[np.uint32], data: npt.NDArray[Any], start: int, per_checksum: int) -> None:
    """Continue the running CRC-32 of every checksum block that ``data``, beginning at row ``start``, touches."""
    position = 0
    while position < len(data):
        number = (start + position) // per_checksum
        stop = min(len(data), (number + 1) * per_checksum - start)
        sums[number] = zlib.crc32(bytes_of(data[position:stop]), int(sums[number]))
        position = stop


def find(haystack: npt.NDArray[Any], needles: npt.NDArray[Any]) -> Indices:
    """Position of each needle in ``haystack``, -1 where it does not occur."""
    if not len(haystack):
        return np.full(len(needles), -1, np.intp)
    order = np.argsort(haystack, kind="stable")
    place = np.minimum(np.searchsorted(haystack, needles, sorter=order), len(haystack) - 1)
    candidates = order[place]
    return np.where(haystack[candidates] == needles, candidates, -1)
