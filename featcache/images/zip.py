"""What a zip holds, by its central directory. In: an open file. Out: a ``Member`` per file or folder, a ``Refusal`` for what is refused;
and the bytes of one.

As PKWARE's APPNOTE 6.3.10 defines it, with ZIP64; stored and deflated files alone. Refused are: encrypted files, links, files that
lie upon each other, and whose local header is another file's.
"""

import stat
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from featcache.errors import Refusal, RefusedImage
from featcache.images.members import CUT, Member, check_size, plain_name, shown_name

_END, _END64, _LOCATOR, _ENTRY, _LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
_AT_END = 22 + 65535 + 20  # bytes that its end record, with a comment, and the one before that may take
_ENCRYPTED, _UTF8, _PATCHED, _MASKED = 0x1, 0x800, 0x20, 0x2000
_STORED, _DEFLATED = 0, 8
_TO_BEGIN = 4096  # packed bytes that are enough to unpack the first ones: the tables of a block take some hundred
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


def zip_members(file: BinaryIO, size: int) -> Iterator[Member | Refusal]:
    """The members in the order of the directory. Raises RefusedImage: it has none that can be read."""
    count, start, length, shift = _find_directory(file, size)
    file.seek(start)
    ends: list[tuple[int, int, int]] = []
    found: list[Member | Refusal] = []
    while length > 0:
        if length < 46 or (head := file.read(46))[:4] != _ENTRY or len(head) < 46:
            break
        names, extras, comments = struct.unpack_from("<3H", head, 28)
        raw, extra = file.read(names), file.read(extras)
        file.seek(comments, 1)
        length -= 46 + names + extras + comments
        entry = _entry(head, raw, extra, shift)
        if isinstance(entry, Member) and not entry.name.endswith("/"):
            ends.append((entry.offset, entry.offset + 30 + names + entry.packed, len(found)))
        found.append(entry)
    if length or (len(found) - count) % 2**16:  # as so many bits count them without ZIP64
        found.append(Refusal("", f"damaged: {len(found)} members in its directory can be read, it says {count}"))
    yield from _apart(found, sorted(ends), start)


def read_zipped(file: BinaryIO, member: Member) -> bytes:
    """The bytes of one file. Raises RefusedImage: it is another file, cut off, damaged, or not as large as it says."""
    _seek_content(file, member)
    if len(data := file.read(member.packed)) < member.packed:
        raise RefusedImage(CUT)
    if member.deflated:
        data = _inflated(data, member.size)
    if len(data) != member.size:
        raise RefusedImage(f"damaged: {len(data)} bytes, the zip says {member.size}")
    if zlib.crc32(data) != member.crc:
        raise RefusedImage("damaged: its checksum is another than the zip says")
    return data


def begin_zipped(file: BinaryIO, member: Member, size: int) -> bytes:
    """The first bytes of one file, as if it were whole; fewer where packed ones come to no end. Raises RefusedImage: it is another."""
    _seek_content(file, member)
    if not member.deflated:
        return file.read(min(size, member.packed))
    packed, unpacked = file.read(min(_TO_BEGIN, member.packed)), zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return unpacked.decompress(packed, size)
    except zlib.error as error:
        raise RefusedImage(f"damaged: {error}") from error


def _seek_content(file: BinaryIO, member: Member) -> None:
    """To the first byte of what a file holds. Raises RefusedImage: another file lies there."""
    file.seek(member.offset)
    head = file.read(30)
    if head[:4] != _LOCAL or len(head) < 30:
        raise RefusedImage("damaged: the zip has no file where it says")
    flags, method = struct.unpack_from("<2H", head, 6)
    names, extras = struct.unpack_from("<2H", head, 26)
    raw = file.read(names)
    if _plain(raw, flags) != member.name or method != (_DEFLATED if member.deflated else _STORED):
        raise RefusedImage("damaged: the zip calls it otherwise where it lies")
    file.seek(extras, 1)


def _inflated(data: bytes, size: int) -> bytes:
    unpacked = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = unpacked.decompress(data, size + 1)
    except zlib.error as error:
        raise RefusedImage(f"damaged: {error}") from error
    if len(found) > size or not unpacked.eof:
        raise RefusedImage(f"damaged: it is not of {size} bytes, as the zip says")
    return found


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """How many members there are, where their directory begins, its bytes, and by how much offsets are wrong (of what was put in front)."""
    file.seek(max(size - _AT_END, 0))
    tail = file.read()
    end = len(tail)
    while (at := tail.rfind(_END, 0, end)) >= 0:
        if at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail):
            break
        end = at + 3
    else:
        raise RefusedImage("cut off or damaged: the zip has no directory at its end")
    here = size - len(tail) + at
    disk, first, _, count, length, offset = struct.unpack_from("<4H2L", tail, at + 4)
    if at >= 20 and tail[at - 20 : at - 16] == _LOCATOR:
        here = int.from_bytes(tail[at - 12 : at - 4], "little")
        file.seek(here)
        if len(record := file.read(56)) < 56 or record[:4] != _END64:
            raise RefusedImage("damaged: the zip has no ZIP64 directory where it says")
        disk, first, _, count, length, offset = struct.unpack_from("<2L4Q", record, 16)
    if disk or first:
        raise RefusedImage("a zip of several parts; join them first: `zip -s 0 PARTS.zip --out WHOLE.zip`")
    shift = here - length - offset
    if shift < 0 or length < 46 * count:
        raise RefusedImage("damaged: the directory of the zip cannot be as long as it says")
    return count, here - length, length, shift


def _entry(head: bytes, raw: bytes, extra: bytes, shift: int) -> Member | Refusal:
    flags, method = struct.unpack_from("<2H", head, 8)
    crc, packed, size = struct.unpack_from("<3L", head, 16)
    attributes, offset = struct.unpack_from("<2L", head, 38)
    try:
        name = _plain(raw, flags)
        packed, size, offset = _wide(extra, packed, size, offset)
        kind = stat.S_IFMT(attributes >> 16)
        if name.endswith("/") or kind == stat.S_IFDIR:
            return Member(name.rstrip("/") + "/", 0, 0, 0)
        if not name:
            raise RefusedImage("has no name")
        if head[5] in (3, 19) and kind not in (0, stat.S_IFREG):  # made on Unix or macOS
            what = "a link" if kind == stat.S_IFLNK else "no regular file"
            raise RefusedImage(f"{what}, which is not read from an archive")
        if flags & (_ENCRYPTED | _MASKED):
            raise RefusedImage("encrypted; unpack the zip with its password first")
        if method not in (_STORED, _DEFLATED) or flags & _PATCHED:
            raise RefusedImage(f"packed by method {method} of zip; only stored and deflated files are read")
        if method == _STORED and packed != size:
            raise RefusedImage(f"damaged: stored as {packed} bytes, and {size} long")
        check_size(size, packed)
        return Member(name, offset + shift, packed, size, method == _DEFLATED, crc)
    except RefusedImage as reason:
        return Refusal(shown_name(raw), str(reason))


def _plain(raw: bytes, flags: int) -> str:
    """UTF-8 where the file says so, or it is: macOS does not say so. Else the code page that the format names."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return plain_name(raw, "utf-8" if flags & _UTF8 else "cp437")
    return plain_name(raw)


def _wide(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """Numbers that do not fit into 32 bits stand in the extra field 1, in this order: size, packed, offset."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            numbers = [field[k : k + 8] for k in range(0, len(field) - 7, 8)]
            values = []
            for value in (size, packed, offset):
                if value == _FULL32:
                    if not numbers:
                        raise RefusedImage("damaged: the zip does not say where it is")
                    value = int.from_bytes(numbers.pop(0), "little")
                values.append(value)
            return values[1], values[0], values[2]
        at += 4 + length
    return packed, size, offset


def _apart(
    found: list[Member | Refusal], ends: list[tuple[int, int, int]], directory: int
) -> Iterator[Member | Refusal]:
    """``found``, those refused that lie upon each other or upon the directory. ``ends``: start, end and number, in order."""
    wrong, reach, owner = dict[int, str](), 0, -1
    for start, end, number in ends:
        if end > directory:
            wrong[number] = "damaged: it does not lie in the zip as a whole"
        if start < reach:
            wrong[number] = wrong[owner] = "lies upon another file of the zip"
        if end > reach:
            reach, owner = end, number
    for number, each in enumerate(found):
        yield Refusal(each.name, wrong[number]) if number in wrong and isinstance(each, Member) else each
