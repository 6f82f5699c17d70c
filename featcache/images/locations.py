"""Where bytes lie, on this machine or elsewhere: what matches a pattern, how large and of which version it is, the bytes themselves.

In: a location: a path, or an address (``s3://bucket/key``), also as the ``Path`` that has lost one of its slashes. Out: locations,
``Described``, or an open file that can be sought in. Nothing is ever written, and no byte of another version is given.
"""

import contextlib
import glob
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from featcache.errors import RefusedImage, SourceError, UsageError
from featcache.images import remote
from featcache.images.readahead import RemoteFile, open_remote
from featcache.images.remote import CHANGED as CHANGED
from featcache.images.remote import PATIENT, Patience
from featcache.images.remote import Described as Described
from featcache.system.addresses import AnyPath, address_of, shown
from featcache.system.path_advice import typed
from featcache.system.path_kinds import as_path

MAX_LOCATIONS = 100_000  # of one pattern
TIME_STEP = 2_000_000_000  # ns: FAT, the coarsest file system in use, counts times in 2 s
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_BRACES = re.compile(r"\{((?:[^{},]*,)+[^{},]*|\d{1,18}\.\.\d{1,18})\}")


def describe(location: AnyPath, patience: Patience = PATIENT) -> Described:
    """What lies at ``location``. Nothing that is elsewhere is waited for longer than ``patience`` says.

    Raises:
        RefusedImage: nothing, or no regular file. SourceError: what is elsewhere is not to be had, and why: no access, no answer.
        MissingDependencyError: it takes the ``remote`` extra.
    """
    if address := address_of(location):
        return remote.describe(address, patience)
    with open_binary(location) as file:
        return _described(os.fstat(file.fileno()))


def open_binary(location: AnyPath, described: Described | None = None, patience: Patience = PATIENT) -> BinaryIO:
    """Open ``location`` for reading and seeking, in one thread at a time; cheap enough to be done once for each image.

    Of what is elsewhere every byte that is read is of the version ``described``; of a file on this machine ``check_unchanged``
    tells that afterwards.

    Args:
        location: a path or address. described: of which version the bytes have to be; of the present one when None.
        patience: how long to wait for what is elsewhere.

    Raises:
        RefusedImage: it is not there, cannot be read, or is of another version, also later while it is read. SourceError,
        MissingDependencyError: as ``describe``, also later.
    """
    if address := address_of(location):
        return cast(BinaryIO, open_remote(address, described or remote.describe(address, patience), patience))
    with _reasons():
        # Not blocking: a pipe that took a file's place must not hang the run.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(location, flags), "rb")
        try:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RefusedImage("not a regular file")
            check_unchanged(file, described)
        except BaseException:
            file.close()
            raise
        return file


def check_unchanged(file: BinaryIO, described: Described | None) -> None:
    """Raise RefusedImage if an open file is no longer of the version ``described``; elsewhere every read has been checked."""
    if isinstance(file, RemoteFile):
        return
    now = _described(os.fstat(file.fileno()))
    if described is not None and now[:2] != described[:2]:
        raise RefusedImage(CHANGED)


def expand(pattern: AnyPath, patience: Patience = PATIENT) -> list[Path]:
    """The locations that ``pattern`` means, in order: ``train-{000..009}.tar``, ``{train,val}.tar``, ``train-*.tar``, or one alone.

    Of ``s3://`` and ``gs://``, what holds nothing itself means everything directly below it.

    Raises:
        UsageError: it means more than ``MAX_LOCATIONS``, or a web server is to list its files. SourceError: nothing matches
        it; otherwise as ``describe``.
    """
    if os.path.lexists(pattern):  # a name may hold braces and stars
        return [Path(pattern)]
    if address := address_of(pattern := as_path(pattern)):
        found = _expand_address(address, patience)
    else:
        found = [path for text in expand_braces(str(pattern)) for path in _matching(text)]
    if len(found) > MAX_LOCATIONS:
        raise UsageError(f"{typed(pattern)} means more than {MAX_LOCATIONS:,} files; give a narrower one")
    if not found:
        raise SourceError(f"nothing matches {typed(pattern)}; in a shell put a pattern in quotes")
    return found


def _matching(text: str) -> list[Path]:
    if os.path.lexists(text) or not glob.has_magic(text):
        return [Path(text)]
    found = itertools.islice(glob.iglob(text), MAX_LOCATIONS + 1)  # noqa: PTH207 - of any depth, absolute or not
    return sorted(map(Path, found))


def _expand_address(address: str, patience: Patience) -> list[Path]:
    found: list[str] = []
    for each in (one := expand_braces(address)):
        found += remote.find(each, MAX_LOCATIONS, patience) if remote.is_pattern(each) else [each]
    if found == one == [address] and remote.has_listing(address) and not Path(address).suffix:
        found = remote.find(f"{address}/", MAX_LOCATIONS, patience) or found
    return [as_path(each) for each in found]


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of ``{a,b}`` and ``{000..009}``, in its order. Raises UsageError: more than ``MAX_LOCATIONS``."""
    done: list[str] = []
    for text in _braces(pattern):
        done.append(text)
        if len(done) > MAX_LOCATIONS:
            raise UsageError(f"{shown(pattern)} means more than {MAX_LOCATIONS:,} files; give a narrower one")
    return done


def _braces(pattern: str) -> Iterator[str]:
    if not (found := _BRACES.search(pattern)):
        yield pattern
        return
    for word in _words(found[1]):
        yield from _braces(f"{pattern[: found.start()]}{word}{pattern[found.end() :]}")


def _words(inside: str) -> Iterator[str]:
    if not (ends := _RANGE.fullmatch(inside)):
        yield from inside.split(",")
        return
    first, last = ends.groups()
    width = max(map(len, ends.groups())) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    yield from (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))


def _described(status: os.stat_result) -> Described:
    settled = time.time_ns() - status.st_mtime_ns > TIME_STEP
    return Described(status.st_size, str(status.st_mtime_ns), settled)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """What goes wrong with a file becomes RefusedImage."""
    try:
        yield
    except OSError as error:
        raise RefusedImage(f"cannot be read: {error.strerror}") from error
    except (ValueError, MemoryError) as error:
        raise RefusedImage(f"cannot be read: {error or 'not enough memory'}") from error
