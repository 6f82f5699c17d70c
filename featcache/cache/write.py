"""Write a cache file, complete or not at all. The one user of h5py.

libhdf5 only ever lays out metadata in memory; feature bytes go through plain file I/O at the dataset's offset, because
libhdf5 takes the process down when it meets a full disk.
"""

import functools
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from featcache.cache.features import Features
from featcache.cache.format import (
    COLUMNS,
    FORMAT,
    FORMAT_VERSION,
    Provenance,
    Rows,
    bytes_of,
    column_checksums,
    encode_names,
    metadata_checksum,
    update_checksums,
)
from featcache.errors import Refusal
from featcache.spec import Spec, canonical_json
from featcache.system.files import check_free_space, publish_file, target_of

_MAX_CHECKSUMS = 4096  # an HDF5 attribute holds at most 64 KiB
_ALIGNMENT = 4096


def write_cache(
    path: Path,
    rows: Rows,
    blocks: Iterable[Features],
    *,
    dim: int,
    spec: Spec,
    classes: tuple[str, ...] = (),
    refused: Sequence[Refusal] = (),
    provenance: Provenance | None = None,
    staging: Path | None = None,
    rows_per_checksum: int = 1024,
) -> None:
    """Publish a complete cache file under ``path``, atomically.

    Args:
        path: the file; replaced if it exists. rows: N of them.
        blocks: arrays (n, D) whose rows, one block after the other, are the N feature rows; cast to ``spec.storage``.
        dim: D. spec: everything that changes the numbers; ``spec.storage`` is float16 or float32.
        classes: sorted class names. refused: each image without an embedding. provenance: recorded, never compared.
        staging: folder for the temporary file, on the same file system.
        rows_per_checksum: how finely damage is found; more, if there would be too many checksums.

    Raises:
        StorageError: too little space, or the operating system refused a step; ``path`` is then unchanged.
        ValueError: ``blocks`` do not add up to N rows of D values.
    """
    path, dtype = target_of(path), np.dtype(spec.storage).newbyteorder("<")
    per_checksum = max(rows_per_checksum, -(-len(rows) // _MAX_CHECKSUMS))
    texts = (canonical_json(spec.to_json()), canonical_json((provenance or Provenance()).to_json()))
    columns = _columns(rows, classes, refused)
    layout = functools.partial(_layout, columns, texts, (len(rows), dim), dtype, per_checksum)

    checksums = np.zeros(-(-len(rows) // per_checksum), np.uint32)
    frame, places = layout(checksums)
    region = range(places["features"], places["features"] + len(rows) * dim * dtype.itemsize)
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
        # The first layout told where the values go; this one, alike, carries the checksums of what was written.
        frame, _ = layout(checksums)
        for offset, segment in frame.written:
            file.seek(offset)
            file.write(segment)
        for name, values in columns.items():
            file.seek(places[name])
            file.write(bytes_of(values))
        file.truncate(frame.size)


def _columns(rows: Rows, classes: tuple[str, ...], refused: Sequence[Refusal]) -> dict[str, npt.NDArray[Any]]:
    """The datasets other than ``features``, in the order in which they are laid out and checksummed."""
    values = {
        **vars(rows),
        "classes": encode_names(classes),
        "refused/paths": encode_names(path for path, _ in refused),
        "refused/reasons": encode_names(reason for _, reason in refused),
    }
    return {name: values[name].astype(dtype, copy=False) for name, dtype, _ in COLUMNS}


def _layout(
    columns: dict[str, npt.NDArray[Any]],
    texts: tuple[str, str],
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    per_checksum: int,
    checksums: npt.NDArray[np.uint32],
) -> "tuple[_SparseFile, dict[str, int]]":
    """Lay out the whole file in memory, except for the values of datasets; also return at which offset each has its own."""
    frame, shapes = _SparseFile(), {name: (values.shape, values.dtype) for name, values in columns.items()}
    with h5py.File(
        frame, "w", libver="earliest", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT
    ) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["spec"], file.attrs["provenance"] = texts
        file.attrs["fingerprint"] = hashlib.sha256(texts[0].encode()).hexdigest()
        file.attrs["rows_per_checksum"] = per_checksum
        file.attrs["features_crc32"] = checksums
        file.attrs["metadata_crc32"] = np.uint32(metadata_checksum(columns, texts))
        file.attrs["column_crc32"] = column_checksums(columns, texts[1])
        places = {name: _reserve(file, name, *kind) for name, kind in {**shapes, "features": (shape, dtype)}.items()}
    return frame, places


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Make a dataset whose space is reserved and left for plain I/O to fill. Returns its offset."""
    creation, links = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5p.create(h5py.h5p.LINK_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)  # the same content gives the same bytes, whenever it is written
    links.set_create_intermediate_group(True)
    kind = h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype
    space, number = h5py.h5s.create_simple(shape), h5py.h5t.py_create(kind, logical=True)
    dataset = h5py.h5d.create(file.id, name.encode(), number, space, creation, links)
    return int(dataset.get_offset() or 0)  # HDF5 gives no offset to an empty dataset


class _SparseFile(io.RawIOBase):
    """A file in memory for h5py's driver of file objects: only what is ``written``, (offset, bytes), takes any; the rest reads as zeros."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []
        self._position = 0
        self.size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def write(self, data: Any) -> int:
        self.written.append((self._position, bytes(data)))
        self._position += len(self.written[-1][1])
        self.size = max(self.size, self._position)
        return len(self.written[-1][1])

    def readinto(self, buffer: Any) -> int:
        view, start = memoryview(buffer).cast("B"), self._position
        view[:] = bytes(len(view))
        for offset, data in self.written:
            first, last = max(start, offset), min(start + len(view), offset + len(data))
            if first < last:
                view[first - start : last - start] = data[first - offset : last - offset]
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size
