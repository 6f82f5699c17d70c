"""The folder beside an output where unfinished work lies, and the right to write into it.

In: the output, ``features.h5`` or ``model-ft/``. Out: ``features.h5.parts/`` or ``model-ft.parts/``, held by one process at a time.
"""

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from featcache.errors import StorageError
from featcache.system.files import sweep, sync_folder, target_of

try:
    import fcntl
except ImportError:  # Windows: several that write one folder keep no other out
    fcntl = None  # type: ignore[assignment]

LISTING = "listing.h5"  # there while several, on whatever machines, write parts for one output
# At least one of these is there, while it is in use or to be resumed.
_CONTENT = re.compile(r"lock|run\.json|listing\.h5|\d{20}-[0-9a-f]{8}(\.\d+of\d+)?\.h5")
PATIENCE = 3.0  # seconds to wait for a writer: one that was killed may take a moment to be gone


def work_folder(output: Path) -> Path:
    """Where the unfinished work for the file or folder ``output`` lies."""
    output = target_of(output)  # whatever leads there, one process writes it
    return output.with_name(output.name + ".parts")


def is_work_folder(path: str) -> bool:
    """Whether a folder is the ``work_folder`` of some output: by its name, and as it holds nothing, or what we put there."""
    if not path.endswith(".parts"):
        return False
    try:
        names = os.listdir(path)  # noqa: PTH208 - names are enough
    except OSError:
        return False  # whoever walks it says why
    return not names or any(_CONTENT.fullmatch(name) for name in names)


@contextlib.contextmanager
def locked(folder: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the right to write into ``folder`` (made if missing), so that two runs never write one output.

    The operating system frees the lock of a process that died. An empty folder is removed at the end. Raises StorageError
    if another process holds the right for longer than ``patience``, in seconds, or the folder cannot be made.
    """
    try:
        lock = _acquire(folder, patience)
        if not (
            folder / LISTING
        ).exists():  # where locks are not seen from machine to machine, a writer may live elsewhere
            sweep(folder)
    except filelock.Timeout as error:
        raise _in_use(folder) from error
    except OSError as error:
        raise StorageError(f"cannot write in {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if os.name == "nt":  # removes no file that is open
            lock.release()
        with contextlib.suppress(OSError):
            # Elsewhere before releasing: whoever waits then holds a lock on a file that is gone, which filelock notices.
            (folder / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails, as it should, while parts remain
        lock.release()


def _acquire(folder: Path, patience: float) -> filelock.BaseFileLock:
    """The lock in ``folder``, which is made if missing. Raises OSError, filelock.Timeout."""
    deadline = time.monotonic() + patience
    while True:
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)  # parts are as durable as the folder they lie in
        lock = filelock.FileLock(folder / "lock", timeout=max(0.0, deadline - time.monotonic()))
        try:
            lock.acquire()
            return lock
        except FileNotFoundError:  # whoever had it is done, and has removed the folder
            continue


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Write new files into ``folder`` (made if missing) beside others that do the same, on whatever machines; delete none.

    This needs no lock. One is held all the same, so that ``locked`` keeps out while anybody is seen to write; where locks of
    another machine are not seen, ``locked`` gets in, and what writers publish later must be superfluous.

    Raises StorageError if a process has locked the folder, or it cannot be made.
    """
    try:
        descriptor = _join(folder)
    except OSError as error:
        raise StorageError(f"cannot write in {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if fcntl and not [name for name in os.listdir(folder) if name != "lock"]:  # noqa: PTH208 - names are enough
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if others are here
                (folder / "lock").unlink()
                folder.rmdir()
        os.close(descriptor)


def _join(folder: Path) -> int:
    """The descriptor of the lock in ``folder``, shared with others. Raises OSError, StorageError."""
    deadline = time.monotonic() + PATIENCE
    while True:
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
        try:
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was removed just now
            continue
        try:
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat((folder / "lock").stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return descriptor  # a file system without locks
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise _in_use(folder) from error
            time.sleep(0.05)
        os.close(descriptor)


def _in_use(folder: Path) -> StorageError:
    output = folder.with_suffix("")
    if (folder / LISTING).exists():
        return StorageError(
            f"parts of {output} are being made, or packed, at this moment; wait for the others, or end them, and run the "
            "same command again"
        )
    return StorageError(f"another featcache is writing {output}; wait for it, or choose another -o")
