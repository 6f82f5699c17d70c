"""Atomic publishing: a file or folder appears under its name complete and on disk, or not at all.

In: a target path and the code that fills it. Out: the target, replaced in one step. Every byte that featcache keeps
goes through here, so this is the one place to look at (or to break) when asking what survives a power cut.

Temporary files are locked while they are written. So what a killed process left behind differs from what a living one is
writing, on any machine that shares the folder and honours locks, and the next process to publish sweeps it away.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from featcache.errors import FeatcacheError, StorageError, UsageError
from featcache.system.path_kinds import Kind, kind_by_name, kind_of

try:
    import fcntl
except ImportError:  # Windows: left-overs of killed processes stay where they are
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
_MAX_TRIES = 100  # where another process may have been faster
_SHOWN = 50  # characters of a name in that of a temporary file: all may take four bytes, of 255
_TEMPORARY = r"\.{name}\.\d+-[0-9a-f]{{8}}\.tmp"
_REMEDIES = {
    errno.ENOSPC: "free some space",
    getattr(errno, "EDQUOT", errno.ENOSPC): "free some space, or have your quota raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write to another file system",
}
_IN_USE = {5, 32}  # Windows: access denied, sharing violation: what a rename over a file that a reader has open ends in
_PATIENCE = 5.0  # seconds to wait for that reader
_SPARE_BYTES = 16 * 2**20  # left free on purpose: other programs, and the file system's own bookkeeping, need some


def check_output(path: Path, *, folder_allowed: bool = False, beside: str = "") -> None:
    """Raise StorageError, before any work, if ``path``'s folder is missing or not writable, or ``path`` is a folder.

    ``beside``: as for ``check_name``, which is asked, too.
    """
    folder = target_of(path).parent
    if os.path.isdir(path) and not folder_allowed:  # noqa: PTH112 - however long its name is
        raise StorageError(f"cannot write {path}: it is {kind_of(path).value}; give the name of a file")
    if not os.path.isdir(folder):  # noqa: PTH112
        raise StorageError(f"cannot write {path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {path}: no permission to write in {folder}")
    check_name(target_of(path), beside)


def check_name(path: Path, beside: str = "") -> None:
    """Raise StorageError if the name of ``path`` is too long, with ``beside`` at its end: the longest ending of what is named after it."""
    try:
        most = os.pathconf(path.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows, or a file system that does not say
        most = 255
    if (length := len(os.fsencode(path.name + beside))) > most:
        whose = "the name of what lies beside it" if beside else "its name"
        raise StorageError(
            f"cannot write {path}: {whose} would have {length} bytes, and may have {most}; choose a shorter -o"
        )


def target_of(path: Path) -> Path:
    """What is written when ``path`` is: of a link the file or folder that it leads to, so that it stays a link to what is up to date."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114 - however long its name is


def check_may_replace(path: Path, option: str, *, given: bool, kind: Kind | None = None) -> None:
    """Refuse, before any work, to replace what is on ``path`` unasked, or what is of another kind than what takes its place.

    Args:
        option: that asks for it, ``--force`` or ``--overwrite``. given: whether it was. kind: of what takes its place; what the
            name says when None.

    Raises:
        UsageError: it was not. StorageError: it is of another kind, see ``path_kinds``, and nobody means that.
    """
    if not os.path.lexists(path):
        return
    if not given:
        raise UsageError(f"{path} exists; choose another -o, or give {option} to replace it")
    if (there := kind_of(path)) not in (kind or kind_by_name(path.name), Kind.EXPORT, Kind.MISSING):
        raise StorageError(
            f"cannot write {path}: it is {there.value}, which {option} does not replace; choose another -o"
        )


def check_is_folder(folder: Path, what: str, parts: str) -> None:
    """``check_output`` of a folder of files; also a file, or what is called like one, is refused. "an audit is", "a page and tables"."""
    check_output(folder, folder_allowed=True)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"cannot write {folder}: it is a file, and {what} a folder; choose another -o")
    if folder.suffix.lower() in (".html", ".csv", ".json") and not folder.exists():
        raise StorageError(f"cannot write {folder}: {what} a folder, of {parts}; leave out {folder.suffix}")


def named(path: Path) -> Path:
    """``path`` as typed, but for ``.`` and ``..``: what lies beside an output is named after it, so it needs a name.

    Raises StorageError for the root of a file system, which has none.
    """
    if path.name in ("", ".."):
        path = path.resolve()
    if not path.name:
        raise StorageError(f"cannot write {path}: it is the root of a file system; choose another -o")
    return path


def check_free_space(folder: Path, needed: int) -> None:
    """Raise StorageError unless ``folder``'s file system has ``needed`` bytes and a little to spare."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(
            f"cannot write in {folder}: {error.strerror}; mend that and run the same command again"
        ) from error
    if free < needed + _SPARE_BYTES:
        raise StorageError(
            f"not enough space in {folder}: {free / 1e6:,.0f} MB free, {(needed + _SPARE_BYTES) / 1e6:,.0f} MB needed; "
            "free some space and run the same command again"
        )


@contextlib.contextmanager
def publish_file(
    path: Path, *, staging: Path | None = None, needed: int | None = None, own: bool = False
) -> Iterator[BinaryIO]:
    """Open a temporary file; on success fsync it, rename it over ``path`` and fsync the folder.

    Args:
        path: what the file is called once it is complete; of a link that somebody named what it leads to, see ``target_of``.
        staging: folder for the temporary file, on the same file system; beside ``path`` when not given, or a link.
        needed: how many bytes it will have, if that is known: for the message when the disk is full.
        own: it is a name of ours, that nobody gave: whatever put a link there, nothing is written behind it.

    Raises:
        StorageError: the operating system refused a step (disk full, no permission). ``path`` is then unchanged.
    """
    linked, path = path.is_symlink() and not own, path if own else target_of(path)
    folder = path.parent if linked or staging is None else staging
    written = 0
    try:
        temporary, lock = _claim(path, folder, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0))
        try:
            with os.fdopen(lock, "r+b") as file:
                try:
                    yield file
                    file.flush()
                    _sync(file.fileno())
                finally:
                    written = os.fstat(file.fileno()).st_size
                if os.name != "nt":  # Windows renames no open file; elsewhere it stays locked until it has its name
                    _move(temporary, path)
            if os.name == "nt":
                _move(temporary, path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _failure(path, error, written, needed) from error


def give_name(file: Path, path: Path) -> bool:
    """Give a complete ``file`` the name ``path`` in the same folder unless that is taken; of several processes, on any machines, one wins.

    Returns whether this one did. ``file`` is gone then, in either case. Raises StorageError.
    """
    try:
        try:
            os.link(file, path)
            won = True
        except FileExistsError:
            won = path.samefile(file)  # the answer to a first try was lost on the way, as NFS may do
        except OSError:  # a file system without hard links
            won = _give_name_without_links(file, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _failure(path, error, None, None) from error
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return won


def _give_name_without_links(file: Path, path: Path) -> bool:
    """As ``give_name``: a folder, too, can be made only once. Raises StorageError, OSError."""
    claim, deadline = path.with_name(f"{path.name}.claim"), time.monotonic() + _PATIENCE
    while not path.exists():
        try:
            claim.mkdir()
        except FileExistsError:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{path} was about to be written by a process that is gone; remove {claim}"
                ) from None
            time.sleep(0.05)
            continue
        try:
            if path.exists():  # somebody was faster, and has removed the claim since
                return False
            _move(file, path)
            return True
        finally:
            claim.rmdir()
    return False


@contextlib.contextmanager
def publish_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on success it replaces ``path``. Raises as ``publish_file`` does.

    With ``replace`` false it may become a tree, with links to files that are not ours; a ``path`` that is not empty is left alone.
    """
    path = target_of(path)
    try:
        temporary, lock = _claim(path, path.parent, None)
        try:
            yield temporary
            if replace:
                for path_inside in temporary.iterdir():
                    with path_inside.open("rb+") as file:
                        _sync(file.fileno())
                sync_folder(temporary)
                _take_name(temporary, path)
            else:
                getattr(os, "sync", lambda: None)()  # once, where there may be a million files
                with contextlib.suppress(FileNotFoundError):
                    path.rmdir()  # fails if anything is in it by now
                _move(temporary, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # what failed, or what was replaced
            if lock >= 0:
                os.close(lock)
            with contextlib.suppress(OSError):
                recover_folder(path)
    except OSError as error:
        raise _failure(path, error, None, None) from error


def read_published(path: Path, read: Callable[[Path], T]) -> T:
    """Return ``read(path)`` of one version of a file or folder that other processes may publish again at any moment.

    Opening several files, or one several times, may give half of one version and half of the next. Then ``read`` is called
    again, whether it raised an error or not. Raises StorageError if ``path`` is replaced each time.
    """
    for _ in range(_MAX_TRIES):
        before = _identity(path)
        try:
            result = read(path)
        except FeatcacheError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return result
    raise StorageError(f"{path} is being replaced again and again; run the command again once that is over")


def recover_folder(path: Path) -> None:
    """Finish or undo a replacement of ``path`` that was cut off between two renames, where the system has no exchange."""
    path = target_of(path) if path.name else path.resolve()  # "." has no name
    replaced = _replaced(path)
    if os.path.isdir(replaced):  # noqa: PTH112 - however long its name is
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(path)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and folders of ``name`` (None: of any name) that no living process writes. Never fails."""
    if fcntl is None:
        return
    pattern = re.compile(_TEMPORARY.format(name=re.escape(name[:_SHOWN]) if name else ".+"))
    with contextlib.suppress(OSError):
        for entry in [entry for entry in folder.iterdir() if pattern.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                descriptor = _open_to_lock(entry)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                finally:
                    os.close(descriptor)


def _open_to_lock(entry: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.suppress(OSError):  # a folder, or another user's
        return os.open(entry, os.O_RDWR | flags)  # NFS locks exclusively only what is open for writing
    return os.open(entry, os.O_RDONLY | flags)


def sync_folder(folder: Path) -> None:
    """Make durable what was created, renamed or removed in ``folder``. Raises OSError."""
    if os.name == "nt":  # has no such call, and its rename needs none
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Make durable what was written. On macOS fsync alone leaves it in the drive's own cache, which loses its power, too."""
    if full_sync := getattr(fcntl, "F_FULLFSYNC", None):
        with contextlib.suppress(OSError):  # a file system that cannot
            fcntl.fcntl(descriptor, full_sync)
            return
    os.fsync(descriptor)


def _move(source: Path, target: Path) -> None:
    """Rename ``source``, over ``target`` if that is a file. On Windows a reader that has it open is waited for."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            source.replace(target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _IN_USE or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _claim(path: Path, folder: Path, flags: int | None) -> tuple[Path, int]:
    """Make and lock a temporary file, or without ``flags`` a folder. Returns its path and descriptor (-1: no such locks)."""
    sweep(folder, path.name)
    while True:
        temporary = folder / f".{path.name[:_SHOWN]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        if flags is None:
            temporary.mkdir()
            if fcntl is None:
                return temporary, -1
        try:
            descriptor = os.open(temporary, os.O_RDONLY if flags is None else flags, 0o666)
        except FileNotFoundError:
            if flags is not None:
                raise
            continue  # swept away before it was even opened
        if fcntl is None:
            return temporary, descriptor
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(temporary.stat(), os.fstat(descriptor)):
                return temporary, descriptor
        os.close(descriptor)  # swept away in the moment before it was locked


def _take_name(temporary: Path, path: Path) -> None:
    """Give a folder the name ``path``. One that has this name, or is given it at this very moment, makes room."""
    for tries_left in reversed(range(_MAX_TRIES)):
        if _exchange(temporary, path):
            return
        try:
            if path.exists():  # a folder cannot be renamed over a full one: step aside, step in
                _move(path, _replaced(path))
            _move(temporary, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not tries_left:
                raise
            recover_folder(path)  # another process was faster


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step. Returns False where the system or the file system cannot."""
    names = os.fsencode(first), os.fsencode(second)
    at_working_folder, swap = -100, 2
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, swap) == 0)
        if sys.platform == "linux":
            return bool(library.renameat2(at_working_folder, names[0], at_working_folder, names[1], swap) == 0)
    return False


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what differs between a file or folder and another that has its name later."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _failure(path: Path, error: OSError, written: int | None, needed: int | None) -> StorageError:
    """Return the error for a step that the operating system refused."""
    what = f"cannot write {path}: {error.strerror or error}"
    if error.errno in _REMEDIES and (needed or written):
        what += f" ({needed:,} bytes are needed)" if needed else f" after {written:,} bytes"
    remedy = _REMEDIES.get(error.errno or 0, "mend that")
    if getattr(error, "winerror", None) in _IN_USE:
        remedy = "close the program that has it open"
    return StorageError(f"{what}; {remedy} and run the same command again")
