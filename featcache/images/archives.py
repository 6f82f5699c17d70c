"""Images inside of archives: tar, gzipped tar, zip and Parquet. In: a path that goes through one, ``photos.zip/cats/1.jpg``. Out: the
file's bytes. Nothing is ever unpacked to the disk.

A file's path below its archive is its name there; of a row of Parquet it is the number of the row, from 0: ``train.parquet/17``, of
one of several columns of images ``train.parquet/left/17``. So
every path of a cache finds its image again, below the same archive or the folder of the archives. What lies where is read once for
each version of an archive, and kept for some of them: about 60 bytes per file, 350 MB at most.

What changed is noticed as with files: each has its size, and the time of its archive. Where an archive is another than when it was
looked through, it is looked through again. Of a row of Parquet no size is known unread; its time is a number made of the time and
the size of the whole file.
"""

import contextlib
import hashlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from featcache.errors import Refusal, RefusedImage, UsageError
from featcache.images.gzipped import GzipFile
from featcache.images.locations import CHANGED, Described, check_unchanged, describe, open_binary
from featcache.images.members import CUT, Member
from featcache.images.parquet import ParquetImages
from featcache.images.tar import tar_members
from featcache.images.zip import begin_zipped, read_zipped, zip_members
from featcache.system.addresses import parse
from featcache.system.path_kinds import Kind, kind_of

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip", ".parquet")
_MOST_MEMBERS, _MOST_OPEN = 6_000_000, 8  # of archives that are remembered; of those that keep a file open
_HOMES = (Kind.ARCHIVE, Kind.PARQUET, Kind.PLACE)
_TEXTS, _MAX_TEXT = (".cls", ".json", ".txt"), 2**16
_TAR, _GZIP, _ZIP, _PARQUET = "tar", "tar.gz", "zip", "parquet"


def is_archive(location: Path) -> bool:
    """Whether it is called like what images are read from without unpacking it."""
    return location.name.lower().endswith(SUFFIXES)


def archive_in(path: Path) -> tuple[Path, str] | None:
    """The archive that a path goes through, and the file inside of it; None if it goes through none."""
    if os.path.lexists(path):
        return None
    if parse(path):  # by name: scheme and place come first, and nothing is asked there
        outer = next(filter(is_archive, list(reversed(path.parents))[3:]), None)
        return (outer, path.relative_to(outer).as_posix()) if outer else None
    for parent in path.parents:
        if os.path.lexists(parent):
            if not parent.is_file():  # asked first: to tell the kind of a folder, thousands of its files may be opened
                return None
            there = is_archive(parent) or kind_of(parent) in (Kind.ARCHIVE, Kind.PARQUET)
            return (parent, path.relative_to(parent).as_posix()) if there else None
    return None


def is_home(place: Path) -> bool:
    """Whether images can lie below ``place``: it is a folder, or an archive, or a folder in one."""
    return place.is_dir() or kind_of(place) in _HOMES or archive_in(place) is not None


def read_member(location: Path, name: str) -> tuple[bytes, int, int]:
    """Read one file of an archive; as ``read.read_file``, with the time of its archive.

    What an archive holds that was listed and is another one by now is refused: its labels may be others, too.
    """
    try:
        return (archive := _remembered(location)).read(name)
    except RefusedImage as reason:
        if str(reason) != CHANGED or archive.listed:
            raise
    _archives.pop(location, None)
    return _remembered(location).read(name)


def stat_member(location: Path, name: str) -> tuple[int, int]:
    """The size and the time (ns) of one file of an archive, as it was when that was looked through last. Raises RefusedImage."""
    return _remembered(location).stat(name)


def look_through(location: Path, text: Callable[[str, bytes], None] | None = None, *, column: str = "") -> "Archive":
    """An archive with ``members`` and ``refused``, which are not kept; where they lie is.

    Of two files of one name neither is taken, nor is a damaged text that was to be read. Of an archive that is cut off what lies
    before the cut is; a refusal whose path is empty says so.

    Args:
        text: called with the name and the bytes of each small file that is called like a text.
        column: of Parquet, the one of images.

    Raises:
        RefusedImage: it cannot be read, or is no archive. UsageError: there is no such column.
    """
    archive = Archive(location, describe(location))
    archive.look_through(text)
    if archive.is_parquet:
        archive.members = archive.rows(column).members()
    archive.listed = True
    _remember(archive)
    return archive


class Archive:
    """One version of an archive, and where its files lie in it.

    Attributes:
        members: files and folders in their order. refused: what of it is not read. Both are empty where it was looked through merely
            to read from it; whoever lists them empties them. mtime: its time (ns), for rows of a cache.
        listed: whether its images are in a list, with labels.
    """

    def __init__(self, location: Path, described: Described) -> None:
        self.location, self.described = location, described
        self.listed = False
        self.members: list[Member] = []
        self.refused: list[Refusal] = []
        self._parquet: dict[str, ParquetImages] = {}  # by column
        self._gzip: GzipFile | None = None
        self._keys, self._places = np.empty(0, "S16"), np.empty((0, 5), np.int64)
        with self._opened() as file:
            self.form = _form(file)
        version = described.version
        self.mtime = _as_time(f"{version} {described.size}" if self.is_parquet else version)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def is_parquet(self) -> bool:
        """Whether it has rows, and no files."""
        return self.form == _PARQUET

    def rest(self) -> None:
        """Let go of what keeps a file open, as soon as nobody reads it; it is opened again where it is needed."""
        self._gzip, self._parquet = None, {}

    def look_through(self, text: Callable[[str, bytes], None] | None = None) -> None:
        """See ``look_through``."""
        if self.is_parquet:
            return
        found: list[Member] = []
        with self._opened() as plain:
            file: Any = self._unpacked() if self.form == _GZIP else plain
            for one in zip_members(file, self.described.size) if self.form == _ZIP else tar_members(file, self._size):
                if isinstance(one, Refusal):
                    self.refused.append(one)
                    continue
                try:
                    if text and one.size <= _MAX_TEXT and one.name.lower().endswith(_TEXTS):
                        text(one.name, self._bytes(file, one))
                    found.append(one)
                except RefusedImage as fault:  # what lies beside a damaged file may be whole
                    if str(fault) == CHANGED:
                        raise
                    self.refused.append(Refusal(one.name, str(fault)))
            if isinstance(file, GzipFile) and (reason := _fault_of(file)):
                found = [] if file.damaged else found
                self.refused = [one for one in self.refused if one.path and not file.damaged] + [Refusal("", reason)]
        self.members, twice = _once_each(found)
        self.refused += twice
        self._remember_places(self.members)

    def read(self, name: str) -> tuple[bytes, int, int]:
        """As ``read_member``. Raises RefusedImage(CHANGED): it is another version by now."""
        with self._opened() as file:
            if self.form == _PARQUET:
                rows, row = self._row(name)
                data = rows.read(row)
                return data, len(data), self._settled()
            member = self._find(name)
            data = self._bytes(self._unpacked() if self.form == _GZIP else file, member)
            return data, member.size, self._settled()

    def begin(self, name: str, size: int) -> bytes:
        """The first ``size`` bytes of a file, to see what it may be; no checksum proves them. Raises RefusedImage: as ``read``."""
        with self._opened() as file:
            member = self._find(name)
            if self.form == _ZIP:
                return begin_zipped(file, member, size)
            content: Any = self._unpacked() if self.form == _GZIP else file
            content.seek(member.offset)
            return bytes(content.read(min(size, member.size)))

    def stat(self, name: str) -> tuple[int, int]:
        """See ``stat_member``."""
        if self.is_parquet:
            rows, row = self._row(name)
            rows.row(row)
        return -1 if self.is_parquet else self._find(name).size, self.mtime

    def _bytes(self, file: Any, member: Member) -> bytes:
        """Of one file. ``file``: the archive, of gzip unpacked."""
        if self.form == _ZIP:
            return read_zipped(file, member)
        file.seek(member.offset)
        if len(data := file.read(member.size)) < member.size:
            raise RefusedImage(CUT)
        return bytes(data)

    def _settled(self) -> int:
        """The time to record: -1 where a later version might carry the same, see ``read.read_file``."""
        if not self.described.settled and (now := describe(self.location))[:2] == self.described[:2]:
            self.described = now
        return self.mtime if self.described.settled else -1

    @property
    def _size(self) -> int | None:
        return None if self.form == _GZIP else self.described.size

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The archive's own bytes, of this version."""
        with _refusing(), open_binary(self.location, self.described) as file:
            yield file
            check_unchanged(file, self.described)

    def _unpacked(self) -> GzipFile:
        file = self._gzip
        if file is None:
            file = self._gzip = GzipFile(lambda: open_binary(self.location, self.described))
        return file

    def rows(self, column: str = "") -> ParquetImages:
        """Of a Parquet file, by the column of images."""
        rows = self._parquet.get(column)
        if rows is None:
            rows = self._parquet[column] = ParquetImages(open_binary(self.location, self.described), column)
        return rows

    def _row(self, name: str) -> tuple[ParquetImages, str]:
        """Where a row of that name is. Raises RefusedImage: there is none that is called exactly so."""
        column, _, row = name.rpartition("/")
        try:
            rows = self.rows(column)
        except UsageError as error:
            raise RefusedImage("cannot be read: not in the archive") from error
        if rows.prefix + row != name:
            raise RefusedImage("cannot be read: not in the archive")
        return rows, row

    def _remember_places(self, members: list[Member]) -> None:
        files = [member for member in members if not member.name.endswith("/")]
        keys = np.fromiter((_key(member.name) for member in files), "S16", len(files))
        order = np.argsort(keys)
        numbers = itertools.chain.from_iterable((m.offset, m.packed, m.size, m.deflated, m.crc) for m in files)
        places = np.fromiter(numbers, np.int64, 5 * len(files))  # no list of them: there may be millions
        self._keys, self._places = keys[order], places.reshape(-1, 5)[order]

    def _find(self, name: str) -> Member:
        key = np.array([_key(name)], "S16")[0]  # as the others: without zeros at its end
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            raise RefusedImage("cannot be read: not in the archive")
        offset, packed, size, deflated, crc = self._places[at].tolist()
        return Member(name, offset, packed, size, bool(deflated), crc)


# Archives that were looked through, the one used last at the end; a lock for each, so that threads wait for one look at it.
_archives: OrderedDict[Path, Archive] = OrderedDict()
_locks: dict[Path, threading.Lock] = {}
_guard = threading.Lock()


def _remembered(location: Path) -> Archive:
    """The archive as it was when it was looked through last."""
    with _guard:
        lock = _locks.setdefault(location, threading.Lock())
    with lock:
        with _guard:
            if (found := _archives.get(location)) is not None:
                _archives.move_to_end(location)
                return found
        archive = Archive(location, describe(location))
        archive.look_through()
        archive.members, archive.refused = [], []
        _remember(archive)
        return archive


def _remember(archive: Archive) -> None:
    with _guard:
        _archives.pop(archive.location, None)
        _archives[archive.location] = archive
        while sum(map(len, _archives.values())) > _MOST_MEMBERS and len(_archives) > 1:
            _locks.pop(_archives.popitem(last=False)[0], None)
        for one in list(_archives.values())[:-_MOST_OPEN]:
            one.rest()


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _form(file: BinaryIO) -> str:
    head = file.read(4)
    forms = {b"PK\3\4": _ZIP, b"PK\5\6": _ZIP, b"PAR1": _PARQUET}
    return forms.get(head, _GZIP if head[:2] == b"\x1f\x8b" else _TAR)


def _fault_of(file: GzipFile) -> str:
    """Why not all of a gzip file is to be trusted; it is read to its end for that, where its checksum is."""
    try:
        while file.read(2**20):
            pass
    except RefusedImage as reason:
        return f"{reason}; nothing of it is read"
    return f"{file.fault}; what lies before is read" if file.fault else ""


def _once_each(members: list[Member]) -> tuple[list[Member], list[Refusal]]:
    """Those whose name no other one has, and a refusal for each name that several have; folders may come again."""
    seen, twice = set[str](), dict[str, int]()
    for member in members:
        if member.name in seen and not member.name.endswith("/"):
            twice[member.name] = twice.get(member.name, 1) + 1
        seen.add(member.name)
    refused = [Refusal(name, f"{count} files of the archive have this name") for name, count in twice.items()]
    return [member for member in members if member.name not in twice], refused


def _as_time(version: str) -> int:
    """A version as a number that fits into the column of times: of a file its time, of others a part of their hash."""
    if version.isdecimal() and len(version) < 20 and int(version) < 2**63:
        return int(version)
    return int.from_bytes(hashlib.sha256(version.encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What goes wrong with an open file becomes RefusedImage."""
    try:
        yield
    except OSError as error:
        raise RefusedImage(f"cannot be read: {error.strerror or error}") from error
    except (ValueError, MemoryError) as error:
        raise RefusedImage(f"cannot be read: {error or 'not enough memory'}") from error
