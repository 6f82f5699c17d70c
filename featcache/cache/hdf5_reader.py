"""The little of HDF5 that a cache consists of, read byte by byte, for files that nobody vouches for.

In: an open file. Out: ``PlainFile``: its root attributes (texts and numbers), and where its plain datasets lie.

libhdf5 loops for ever on some flipped bits and writes outside its memory on others, and h5py makes pointers of what
an attribute's type claims to be one; so neither sees a cache that is read, only caches that are being written. What is
understood is what they write by default: superblock 0, version 1 object headers, symbol tables, contiguous data
(HDF5 File Format Specification 3.0, sections II.A, III.A, III.D, III.E, IV.A). All else (links, filters, external and
virtual storage, newer layouts, other types) is refused. Every loop is bounded, nothing is larger than the file.
"""

import dataclasses
import io
import math
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = 2**64 - 1  # HDF5's address of what is not there
_MAX_BLOCK = 2**26  # no piece of structure is anywhere near
_MAX_PIECES = 256  # nor does anything have as many pieces
_DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE, _CONTINUATION, _SYMBOLS = 0x1, 0x3, 0x8, 0xC, 0x10, 0x11
# Besides those, in a dataset's header: nothing, fill values, a comment, times, a reference count.
_HARMLESS = {0x0, 0x4, 0x5, 0xD, 0xE, 0x12, 0x16}


class Malformed(Exception):  # noqa: N818 - cache.py makes an error of it that names the file
    """The file's structure is broken; ``str()`` says what."""


class NotPlain(Malformed):
    """A dataset is not plain: links, filters, storage elsewhere, or a type no cache has."""


@dataclasses.dataclass(frozen=True)
class PlainDataset:
    """Where a dataset's values lie: contiguous, at ``offset``, inside the file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize  # Python's integers do not overflow


class PlainFile:
    """An HDF5 file of the plainest kind.

    Attributes:
        attrs: of the root group: text as str, numbers as NumPy scalars or arrays; those of any other type are left out.

    Raises:
        Malformed: the structure does not hold.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        head = self._at(0, 96)
        versions, widths = head[8:13], head[13:15]
        base, _, end, driver = struct.unpack_from("<4Q", head, 24)
        if head[:8] != SIGNATURE or any(versions) or widths != b"\x08\x08" or base or driver != _UNDEFINED:
            raise Malformed("its superblock is not one that featcache writes")
        if end > self._size:
            raise Malformed("it is truncated")
        messages = self._messages(struct.unpack_from("<Q", head, 64)[0])
        self._names = self._group(messages)
        self.attrs: dict[str, Any] = {}
        for kind, data in messages:
            if kind == _ATTRIBUTE:
                name, value = self._attribute(io.BytesIO(data))
                if name in self.attrs:
                    raise Malformed(f"it has two attributes called {name!r}")
                self.attrs[name] = value
        self.attrs = {name: value for name, value in self.attrs.items() if value is not None}

    def dataset(self, name: str) -> PlainDataset | None:
        """The dataset ``name`` (``group/name``), or None if there is none that is hard-linked. Raises Malformed."""
        names = self._names
        *groups, last = name.split("/")
        for group in groups:
            if group not in names:
                return None
            names = self._group(self._messages(names[group]))
        return self._dataset(name, self._messages(names[last])) if last in names else None

    def read(self, dataset: PlainDataset) -> npt.NDArray[Any]:
        """All values of ``dataset``."""
        data = self._at(dataset.offset, dataset.nbytes, limit=self._size)
        return np.frombuffer(data, dataset.dtype).reshape(dataset.shape)

    # ------------------------------------------------------------------------------------------------- structures

    def _at(self, offset: int, size: int, *, limit: int = _MAX_BLOCK) -> bytes:
        if offset + size > self._size or size > limit:
            raise Malformed(f"something of {size} bytes at {offset} is not inside the file")
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise Malformed("it is truncated")
        return data

    def _messages(self, address: int) -> list[tuple[int, bytes]]:
        """(type, content) of each message in the object header at ``address``."""
        version, _, _, _, size = struct.unpack("<BBHII", self._at(address, 12))
        if version != 1:
            raise Malformed("an object header is of an unknown version")
        blocks: list[tuple[int, int]] = [(address + 16, size)]
        messages: list[tuple[int, bytes]] = []
        for start, length in blocks:
            data, position = self._at(start, length), 0
            while position + 8 <= length:
                kind, size, flags = struct.unpack_from("<HHB", data, position)
                content = data[position + 8 : position + 8 + size]
                if len(content) != size or flags & 2 or len(messages) >= _MAX_PIECES:
                    raise Malformed("an object header does not hold together")
                messages.append((kind, content))
                if kind == _CONTINUATION:
                    blocks.append(struct.unpack_from("<QQ", content))
                position += 8 + size
        return messages

    def _group(self, messages: list[tuple[int, bytes]]) -> dict[str, int]:
        """Names in a group, and the address of what each is hard-linked to; other links are left out."""
        tables = [content for kind, content in messages if kind == _SYMBOLS]
        if len(tables) != 1:
            raise NotPlain("a group is missing, or of a kind that featcache does not write")
        tree, heap = struct.unpack_from("<QQ", tables[0])
        mark, size, _, start = struct.unpack("<4s4xQQQ", self._at(heap, 32))
        if mark != b"HEAP":
            raise Malformed("a group has lost its names")
        texts, names = self._at(start, size), {}
        for offset, address, link in self._entries(tree):
            stop = texts.find(b"\0", offset)
            name = texts[offset:stop].decode("utf-8", "surrogateescape")
            if stop < 0 or name in names:
                raise Malformed("a group's names do not hold together")
            if link < 2:  # 2: a soft link
                names[name] = address
        return names

    def _entries(self, tree: int) -> Iterator[tuple[int, int, int]]:
        """(offset of the name, address, kind of link) of every entry below the B-tree node at ``tree``."""
        pending, seen = [tree], 0
        while pending:
            address, seen = pending.pop(), seen + 1
            mark, kind, _, used = struct.unpack("<4sBBH", self._at(address, 8))
            if seen > _MAX_PIECES:
                raise Malformed("a group's index never ends")
            if mark == b"TREE" and kind == 0:
                keys = struct.unpack(f"<{2 * used + 1}Q", self._at(address + 24, 16 * used + 8))
                pending += keys[1::2]
            elif mark == b"SNOD" and kind == 1:
                data = self._at(address + 8, 40 * used)
                yield from (struct.unpack_from("<QQI", data, 40 * number) for number in range(used))
            else:
                raise Malformed("a group has lost its index")

    def _dataset(self, name: str, messages: list[tuple[int, bytes]]) -> PlainDataset:
        parts = {kind: content for kind, content in messages if kind in (_DATASPACE, _DATATYPE, _LAYOUT)}
        known = _HARMLESS | {_DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE, _CONTINUATION}
        refusal = NotPlain(f"{name} is not a plain contiguous dataset of the expected type")
        if len(parts) != 3 or not {kind for kind, _ in messages} <= known:
            raise refusal
        shape, dtype = _shape(parts[_DATASPACE]), _dtype(parts[_DATATYPE])
        version, layout, offset, size = struct.unpack_from("<BBQQ", parts[_LAYOUT].ljust(18, b"\0"))
        if shape is None or not isinstance(dtype, np.dtype) or (version, layout) != (3, 1):
            raise refusal
        found = PlainDataset(shape, dtype, 0 if offset == _UNDEFINED and not size else offset)
        if found.nbytes > self._size:
            raise Malformed(f"{name} is larger than the file")
        if found.nbytes != size:
            raise Malformed(f"{name} has {size} bytes, its shape asks for {found.nbytes}")
        return found

    def _attribute(self, message: io.BytesIO) -> tuple[str, Any]:
        """Name and value; the value is None if it is neither text nor numbers."""
        version, flags, *sizes = struct.unpack("<BBHHH", message.read(8))
        if version == 3:
            message.read(1)  # the name's encoding
        if version not in (1, 2, 3) or (version > 1 and flags):
            raise Malformed("an attribute is of an unknown version")
        parts = [message.read(-(-size // 8) * 8 if version == 1 else size)[:size] for size in sizes]
        name, kind, shape = parts[0].rstrip(b"\0").decode(), _dtype(parts[1]), _shape(parts[2])
        value = message.read()
        if kind == "text" and shape == ():
            return name, self._text(*struct.unpack_from("<IQI", value))
        if not isinstance(kind, np.dtype) or kind.kind == "S" or shape is None:
            return name, None
        if math.prod(shape) * kind.itemsize > len(value):
            raise Malformed(f"the attribute {name!r} is incomplete")
        return name, np.frombuffer(value, kind, math.prod(shape)).reshape(shape)[()]

    def _text(self, length: int, heap: int, index: int) -> str:
        """A text of variable length, which lies in a global heap."""
        if not length:
            return ""
        mark, version, size = struct.unpack("<4sB3xQ", self._at(heap, 16))
        if mark != b"GCOL" or version != 1:
            raise Malformed("a text is lost")
        data, position = self._at(heap, size), 16
        while position + 16 <= size:
            number, _, length_there = struct.unpack_from("<HH4xQ", data, position)
            if number == index and length <= length_there <= size - position - 16:
                return data[position + 16 : position + 16 + length].decode("utf-8", "surrogateescape")
            if not number:  # free space, always the last
                break
            position += 16 + -(-length_there // 8) * 8
        raise Malformed("a text is lost")


# ------------------------------------------------------------------------------------------------------ messages


def _shape(message: bytes) -> tuple[int, ...] | None:
    """Dimensions in a dataspace message; () for one value; None for what no cache has: none at all, or growing ones."""
    version, ndim, flags, kind = struct.unpack_from("<4B", message)
    start = {1: 8, 2: 4}.get(version)
    if start is None or ndim > 32 or (version == 2 and kind == 2):
        return None
    lengths = struct.unpack_from(f"<{ndim * (2 if flags & 1 else 1)}Q", message, start)
    if flags & ~1 or (flags & 1 and lengths[:ndim] != lengths[ndim:]):
        return None
    return lengths[:ndim]


def _integer(size: int, signed: int) -> bytes:
    return struct.pack("<B3sIHH", 0x10, bytes((8 * signed, 0, 0)), size, 0, 8 * size)


_NUMBERS = {
    **{_integer(size, 0): np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{_integer(size, 1): np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    struct.pack("<B3sIHHBBBBI", 0x11, b"\x20\x0f\0", 2, 0, 16, 10, 5, 0, 10, 15): np.dtype("<f2"),
    struct.pack("<B3sIHHBBBBI", 0x11, b"\x20\x1f\0", 4, 0, 32, 23, 8, 0, 23, 127): np.dtype("<f4"),
}


def _dtype(message: bytes) -> "np.dtype[Any] | str | None":
    """The type in a datatype message: one of NumPy's, ``text`` of variable length, or None for what no cache has."""
    for encoded, dtype in _NUMBERS.items():
        if message.startswith(encoded) and not message[len(encoded) :].strip(b"\0"):
            return dtype
    kind, bits, more, size = struct.unpack_from("<BBBxI", message)
    if kind == 0x13 and bits & 0xF < 3 and bits >> 4 < 2 and 0 < size < 2**31:
        return np.dtype(f"S{size}")
    return "text" if kind == 0x19 and bits & 0xF == 1 and more < 2 and size == 16 else None
