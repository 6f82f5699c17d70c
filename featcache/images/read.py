"""Read image files: the one loop over files, and the one place that reads one.

In: ``ImageFiles`` and what is to be made of a file's bytes. Out: a ``ReadImage`` per file, in order: the result or the reason
why there is none, and the sha256, size and time of the bytes that it was made of.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import BinaryIO, Generic, NamedTuple, TypeVar

from featcache.errors import RefusedImage
from featcache.images.archives import archive_in, read_member
from featcache.images.decode import decode, refusing_errors, strict_decoding
from featcache.images.in_memory import Held, as_file
from featcache.images.locations import TIME_STEP
from featcache.images.members import MAX_FILE_BYTES
from featcache.images.readahead import stoppable
from featcache.images.source import ImageList
from featcache.spec import PreprocessSpec

T = TypeVar("T")


class Paths(NamedTuple):
    """Files of images that nobody listed: ``paths`` that a file names, below ``root``; those that lead out of it are refused.

    ``root`` None: as the user typed them. ``held``: position -> image, of those that are in memory; their paths are mere names.
    """

    root: Path | None
    paths: tuple[str, ...]
    held: Mapping[int, Held] = MappingProxyType({})


ImageFiles = ImageList | Paths


class ReadImage(NamedTuple, Generic[T]):
    """What became of one file.

    Attributes:
        position: of the file. value: what was made of its bytes; None if it was refused. reason: why; empty if it was not.
        digest: sha256, empty if it could not be read. size, mtime: of the bytes that were read; see ``read_file``.
    """

    position: int
    value: T | None
    reason: str
    digest: bytes
    size: int
    mtime: int


def read_images(
    files: ImageFiles, indices: Iterable[int], convert: Callable[[bytes], T], *, workers: int = 1
) -> Generator[ReadImage[T]]:
    """Read some of ``files`` on ``workers`` threads, results in the order of ``indices``. Never far ahead of who takes them.

    ``convert`` makes what is wanted of a file's bytes, and may raise RefusedImage. A refused image never ends the loop.
    """
    pending = iter(indices)
    with strict_decoding(), ThreadPoolExecutor(workers, "featcache-read") as pool, stoppable() as stop_with:
        read = stop_with(functools.partial(read_image, files, convert=convert))
        if workers == 1:
            yield from (read_image(files, index, convert) for index in pending)
        while block := list(itertools.islice(pending, 16 * workers)):
            yield from pool.map(read, block)


def read_image(files: ImageFiles, index: int, convert: Callable[[bytes], T]) -> ReadImage[T]:
    """Read one of ``files``. Callers decode inside ``strict_decoding``."""
    digest, size, mtime = b"", -1, -1
    try:
        data, size, mtime = content(files, index)
        digest = hashlib.sha256(data).digest()
        with refusing_errors():
            return ReadImage(index, convert(data), "", digest, size, mtime)
    except RefusedImage as reason:
        return ReadImage(index, None, str(reason), digest, size, mtime)


def content(files: ImageFiles, index: int) -> tuple[bytes, int, int]:
    """As ``read_file``, also of an image in memory, as the file that it would be. Raises RefusedImage."""
    if (path := path_of(files, index)) is not None:
        return read_file(path)
    assert isinstance(files, Paths), "only these hold images"
    with refusing_errors():
        data = as_file(files.held[index])
    return data, len(data), -1


def path_of(files: ImageFiles, index: int) -> str | None:
    """Where one of ``files`` is to be read; None: in memory. Raises RefusedImage."""
    if isinstance(files, Paths) and index in files.held:
        return None
    name = files.paths[index]
    if isinstance(files, Paths) and files.root is not None and not leads_inside(name):
        raise RefusedImage("its path leads out of the folder")
    # No Path is made of it: that takes 5 microseconds, in which no other thread runs.
    return name if files.root is None else os.path.join(files.root, name)  # noqa: PTH118


def leads_inside(name: str | PurePath) -> bool:
    """Whether a path that a file names stays in the folder that it is looked for in; no other one is opened."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and not path.drive and ".." not in path.parts


def read_file(path: str | Path) -> tuple[bytes, int, int]:
    """Read one file whole, on the disk or in an archive (``archives.py``).

    Returns:
        Its bytes, its size and its modification time (ns; -1 if it is so recent that a later change could carry the
        same time stamp, which makes the next run read the file again instead of trusting the stamp).

    Raises:
        RefusedImage: it cannot be read, is no regular file, or changed meanwhile.
    """
    try:  # first, as most are files; not by an object of Python's, which takes as long again
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError):
        if inside := archive_in(Path(path)):
            return read_member(*inside)
        with _errors_refused():
            raise
    with _errors_refused():
        try:
            before = _check_regular(os.fstat(descriptor))
            data = _read_all(descriptor, before.st_size)
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    if len(data) != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise RefusedImage("changed while it was read")
    settled = time.time_ns() - after.st_mtime_ns > TIME_STEP
    return data, len(data), after.st_mtime_ns if settled else -1


# Not blocking: a pipe that took a file's place must not hang the run.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def _read_all(descriptor: int, size: int) -> bytes:
    """What is left of a file; one call if that is ``size``."""
    data = os.read(descriptor, size + 1)
    while len(data) != size and (more := os.read(descriptor, size + 1)):
        data += more
    return data


def _check_regular(status: os.stat_result) -> os.stat_result:
    """``status``. Raises RefusedImage: of no file, or of one too large."""
    if not stat.S_ISREG(status.st_mode):
        raise RefusedImage("not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise RefusedImage(f"too large: {status.st_size} bytes, at most {MAX_FILE_BYTES} are read")
    return status


@contextlib.contextmanager
def _errors_refused() -> Iterator[None]:
    """What goes wrong inside, while a file is opened or read, becomes RefusedImage."""
    try:
        yield
    except OSError as error:
        raise RefusedImage(f"cannot be read: {error.strerror}") from error
    except (ValueError, MemoryError) as error:
        raise RefusedImage(f"cannot be read: {error or 'not enough memory'}") from error


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file, opened, and its status. What goes wrong, also while it is read, becomes RefusedImage."""
    with _errors_refused(), os.fdopen(os.open(path, _FLAGS), "rb") as file:
        yield file, _check_regular(os.fstat(file.fileno()))


def refusals(
    files: ImageFiles, indices: Iterable[int], *, spec: PreprocessSpec | None = None, apart: Set[int] = frozenset()
) -> dict[int, str]:
    """index -> reason, for those of ``indices`` that cannot be decoded.

    Args:
        spec: says how; as most are, when None. apart: those that are tried in a process of their own first.
    """
    found: dict[int, str] = {}
    at_least, white_level = (spec.decode_at_least, spec.white_level) if spec else (None, None)
    convert = functools.partial(decode, at_least=at_least, white_level=white_level)
    with strict_decoding():
        for index in indices:
            if reason := read_image(files, index, functools.partial(convert, suspect=index in apart)).reason:
                found[index] = reason
    return found
