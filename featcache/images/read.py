"""Read image files whole, and notice when they change meanwhile."""

import os
import stat
import time
from pathlib import Path

from featcache.images.refusal import RefusedImage

MAX_FILE_BYTES = 2**30


def read_image(path: Path) -> tuple[bytes, int, int]:
    """Read one file whole.

    Returns:
        Its bytes, its size and its modification time (ns; -1 if it is so recent that a later change could carry the
        same time stamp, which makes the next run read the file again instead of trusting the stamp).

    Raises:
        RefusedImage: it cannot be read, is no regular file, or changed meanwhile.
    """
    try:
        # Not blocking: a pipe that took a file's place must not hang the run.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise RefusedImage("not a regular file")
            if before.st_size > MAX_FILE_BYTES:
                raise RefusedImage(f"too large: {before.st_size} bytes, at most {MAX_FILE_BYTES} are read")
            data = file.read()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise RefusedImage(f"cannot be read: {error.strerror}") from error
    except (ValueError, MemoryError) as error:
        raise RefusedImage(f"cannot be read: {error or 'not enough memory'}") from error
    if len(data) != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise RefusedImage("changed while it was read")
    settled = time.time_ns() - after.st_mtime_ns > 2_000_000_000  # FAT, the coarsest in use, counts in 2 s
    return data, len(data), after.st_mtime_ns if settled else -1
