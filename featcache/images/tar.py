"""What a tar holds, by its headers alone. In: an open file. Out: a ``Member`` per file or folder, a ``Refusal`` for everything else.

As POSIX.1-2017 (pax, "ustar Interchange Format") and GNU tar define it; strict, and bounded by one header at a time. What is no
plain file is refused and never followed: links, devices, sparse files. A damaged or missing header ends the archive, with a reason.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

from featcache.errors import Refusal, RefusedImage
from featcache.images.members import CUT, MAX_FILE_BYTES, MAX_NAME, Member, plain_name, shown_name

_BLOCK = 512
_MAX_EXTENDED = 2**20  # bytes of one header's pax records
_BEHIND = 2**16  # bytes behind the end mark that are looked at
_FILES, _FOLDER, _SPARSE = b"\x000 7", b"5", b"S"
_REFUSED = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_RECORD = re.compile(rb"(\d{1,7}) ([^=\0]{1,200})=")


def tar_members(file: BinaryIO, size: int | None) -> Iterator[Member | Refusal]:
    """The members in their order.

    Args:
        file: at any place. size: its bytes, None: not known.

    Yields:
        Folders, files, and refusals; one whose path is empty is about the archive from there on, and the last.

    Raises:
        RefusedImage: ``file`` cannot be read.
    """
    at, start, name, pax = 0, 0, b"", dict[bytes, bytes]()
    try:
        while True:
            header = _read(file, at, _BLOCK)
            if not header.strip(b"\0"):
                if file.read(_BEHIND).strip(b"\0"):
                    raise RefusedImage("more follows its end mark, as if two archives were joined")
                return
            _check(header)
            kind, length, at = header[156:157], _number(header[124:136]), at + _BLOCK
            if kind in b"LxXg":
                if length > (MAX_NAME + 1 if kind == b"L" else _MAX_EXTENDED):
                    raise RefusedImage(f"a header of {length} bytes")
                content = _read(file, at, length)
                if kind == b"L":
                    name = content.rstrip(b"\0")
                elif kind in b"xX":
                    pax |= _records(content)
                elif {b"path", b"size"} & _records(content).keys():
                    raise RefusedImage("one name or size for all members")
                at = start = _padded(at + length)
                continue
            if kind == b"K":
                at = start = _padded(at + length)
                continue
            if kind not in b"123456":  # these have no content, whatever size they claim
                length = int(pax.get(b"size", length))
                at += _extensions(file, at, header) if kind == _SPARSE else 0
                _check_end(file, at, length, size)
            raw = pax.get(b"path", name or _name(header))
            yield _member(kind, raw, at, length, sparse=any(key.startswith(b"GNU.sparse") for key in pax))
            at = start = at if kind in b"123456" else _padded(at + length)
            name, pax = b"", {}
    except RefusedImage as reason:
        what = reason if str(reason) == CUT else f"damaged: {reason}"
        yield Refusal("", f"{what}; nothing is read from byte {start} on")


def _member(kind: bytes, raw: bytes, at: int, length: int, *, sparse: bool) -> Member | Refusal:
    try:
        if kind == _FOLDER or (kind in _FILES and raw.endswith(b"/")):
            return Member(plain_name(raw.rstrip(b"/") + b"/"), at, 0, 0)
        if kind not in _FILES or sparse:
            what = "a sparse file" if sparse or kind == _SPARSE else _REFUSED.get(kind, "of an unknown kind")
            return Refusal(shown_name(raw), f"{what}, which is not read from an archive")
        if not (name := plain_name(raw)):
            raise RefusedImage("has no name")
        if length > MAX_FILE_BYTES:
            raise RefusedImage(f"too large: {length} bytes, at most {MAX_FILE_BYTES} are read")
        return Member(name, at, length, length)
    except RefusedImage as reason:
        return Refusal(shown_name(raw), str(reason))


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    if len(data := file.read(size)) < size:
        raise RefusedImage(CUT)
    return data


def _check_end(file: BinaryIO, at: int, length: int, size: int | None) -> None:
    """Raise RefusedImage unless a member's bytes are all there."""
    if size is not None and at + length > size:
        raise RefusedImage(CUT)
    if size is None and length:
        _read(file, at + length - 1, 1)


def _check(header: bytes) -> None:
    """Raise RefusedImage unless the header has the checksum that it says: of its bytes, taken as unsigned or as signed numbers."""
    rest = header[:148] + b" " * 8 + header[156:]
    total, written = sum(rest), _number(header[148:156])
    if written != total and written != total - 256 * sum(byte > 127 for byte in rest):
        raise RefusedImage("a header has another checksum")


def _number(field: bytes) -> int:
    """Octal, or base 256 with the first bit set, as GNU writes what is too large."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        raise RefusedImage("a header has a number that is none")
    return int(text or b"0", 8)


def _name(header: bytes) -> bytes:
    """With the prefix that POSIX has; GNU keeps other things there."""
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _records(content: bytes) -> dict[bytes, bytes]:
    """``LENGTH KEY=VALUE`` lines, ``LENGTH`` of the whole line. Raises RefusedImage."""
    found, at = dict[bytes, bytes](), 0
    while at < len(content) and content[at]:
        record = _RECORD.match(content, at)
        end = at + int(record[1]) if record else 0
        if not record or end <= record.end() - 1 or content[end - 1 : end] != b"\n":
            raise RefusedImage("its pax records cannot be understood")
        found[record[2]] = content[record.end() : end - 1]
        at = end
    if not re.fullmatch(rb"\d{1,18}", found.get(b"size", b"0")):
        raise RefusedImage("its pax records cannot be understood")
    return found


def _extensions(file: BinaryIO, at: int, header: bytes) -> int:
    """Bytes of the further headers of a sparse file in GNU's old format."""
    length, more = 0, header[482]
    while more:
        more = _read(file, at + length, _BLOCK)[504]
        length += _BLOCK
    return length


def _padded(at: int) -> int:
    return -(-at // _BLOCK) * _BLOCK
