"""Atomic publishing: a file or folder appears under its name complete and on disk, or not at all.

In: a target path and the code that fills it. Out: the target, replaced in one step. Every byte that featcache keeps
goes through here, so this is the one place to look at (or to break) when asking what survives a power cut.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from featcache.errors import StorageError

_REPLACED = ".replaced"
_SPARE_BYTES = 16 * 2**20  # left free on purpose: other programs, and the file system's own bookkeeping, need some


def check_output(path: Path, *, folder_allowed: bool = False) -> None:
    """Refuse early, before any work, if ``path`` could not be created in its folder.

    Raises:
        StorageError: the folder is missing or not writable, or a folder is where a file is to be.
    """
    folder = path.parent
    if path.is_dir() and not folder_allowed:
        raise StorageError(f"cannot write {path}: it is a folder; give the name of a file")
    if not folder.is_dir():
        raise StorageError(f"cannot write {path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {path}: no permission to write in {folder}")


def check_free_space(folder: Path, needed: int) -> None:
    """Raise StorageError unless ``folder``'s file system has ``needed`` bytes and a little to spare."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise StorageError(
            f"not enough space in {folder}: {free / 1e6:,.0f} MB free, {(needed + _SPARE_BYTES) / 1e6:,.0f} MB needed; "
            "free some space and run the same command again"
        )


@contextlib.contextmanager
def publish_file(path: Path, *, staging: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file; on success fsync it, rename it over ``path`` and fsync the folder.

    Args:
        path: what the file is called once it is complete.
        staging: folder for the temporary file, on the same file system; beside ``path`` when not given.

    Raises:
        StorageError: the operating system refused a step (disk full, no permission). ``path`` is then unchanged.
    """
    temporary = _temporary_name(path, staging or path.parent)
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; mend that and run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on success it becomes ``path``, replacing what was there.

    Raises:
        StorageError: the operating system refused a step. ``path`` is then unchanged.
    """
    temporary = _temporary_name(path, path.parent)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync_file(file)
        _sync_folder(temporary)
        if path.exists():  # a folder cannot be renamed over a full one: step aside, step in, then delete
            replaced = path.with_name(f".{path.name}{_REPLACED}")
            path.rename(replaced)
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(path)


def recover_folder(path: Path) -> None:
    """Finish or undo a replacement of ``path`` that was cut off between its two renames."""
    path = path if path.name else path.resolve()  # "." has no name
    replaced = path.with_name(f".{path.name}{_REPLACED}")
    if replaced.is_dir():
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(path)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows has no such call and its rename needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path, folder: Path) -> Path:
    return folder / f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def available_memory() -> int:
    """Bytes that this process may still use: the machine's, or its control group's limit."""
    candidates: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:  # noqa: PTH123
        candidates.append(1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
        candidates.append(int(limit.read_text()) - int(used.read_text()))  # "max" is no number: no limit
    if not candidates:
        with contextlib.suppress(AttributeError, ValueError, OSError):
            candidates.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return min(candidates, default=4 * 2**30)
