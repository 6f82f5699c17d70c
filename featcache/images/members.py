"""One file inside of an archive: its name, and where its bytes lie. In: a name as an archive has it. Out: a ``Member``, or why not."""

import re
from typing import NamedTuple

from featcache.errors import RefusedImage

MAX_FILE_BYTES = 2**30  # of one image
MAX_NAME = 4096  # bytes
CUT = "cut off"
_RATIO, _FREE = 200, 2**26  # how much larger than its packed form anything may become, beyond so many bytes
_OUTSIDE = re.compile(r"[A-Za-z]:|[/\\]")


class Member(NamedTuple):
    """A file or folder in an archive.

    Attributes:
        name: POSIX, relative, without ``.`` and ``..``; bytes that are not UTF-8 appear as surrogate escapes. A folder's ends in /.
        offset: where in the archive its bytes begin; of a zip its local header.
        packed, size: bytes there, and as a file. deflated: whether they differ. crc: CRC-32 of the file, -1 where there is none.
    """

    name: str
    offset: int
    packed: int
    size: int
    deflated: bool = False
    crc: int = -1


def plain_name(raw: bytes, codec: str = "utf-8") -> str:
    """The name of a member as a path below its archive. Raises RefusedImage: it has none, or it leads out."""
    if len(raw) > MAX_NAME:
        raise RefusedImage(f"its name has {len(raw)} bytes, at most {MAX_NAME} are read")
    name = raw.decode(codec, "surrogateescape")
    if "\0" in name:
        raise RefusedImage("its name has a zero in it")
    if _OUTSIDE.match(name) or ".." in re.split(r"[/\\]", name):
        raise RefusedImage("its path leads out of the archive")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join(parts) + ("/" if name.endswith("/") and parts else "")


def shown_name(raw: bytes) -> str:
    """What to call a member that is refused."""
    return raw[:MAX_NAME].split(b"\0")[0].decode("utf-8", "surrogateescape")


def check_size(size: int, packed: int) -> None:
    """Raise RefusedImage for what is too large to be read, or too large for what it is made of."""
    if size > MAX_FILE_BYTES:
        raise RefusedImage(f"too large: {size} bytes, at most {MAX_FILE_BYTES} are read")
    if is_bomb(size, packed):
        raise RefusedImage(f"a decompression bomb: {packed} bytes that become {size}")


def is_bomb(size: int, packed: int) -> bool:
    """Whether no images are packed like that."""
    return size > _FREE and size > _RATIO * packed
