"""The folder beside an output where unfinished work lies, and the right to write into it.

In: the output, ``features.h5`` or ``model-ft/``. Out: ``features.h5.parts/`` or ``model-ft.parts/``, held by one process at a time.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from featcache.errors import StorageError
from featcache.system.files import sweep, sync_folder

# At least one of these is there, while it is in use or to be resumed.
_CONTENT = re.compile(r"lock|run\.json|\d{20}-[0-9a-f]{8}\.h5")
PATIENCE = 3.0  # seconds to wait for a writer: one that was killed may take a moment to be gone


def work_folder(output: Path) -> Path:
    """Where the unfinished work for the file or folder ``output`` lies."""
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
        sweep(folder)
    except filelock.Timeout as error:
        raise StorageError(
            f"another featcache is writing {folder.with_suffix('')}; wait for it, or choose another -o"
        ) from error
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
