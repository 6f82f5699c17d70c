"""Memory: how much this process may still use, and keeping what it freed. No torch.

In: nothing but the machine. Out: bytes; a C allocator that keeps freed memory.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory, where it would return each layer's buffers to the system and fault them in again.

    The usual loop over images spends half its CPU time on that. The setting is of the whole process, and of what is
    allocated later. ``FEATCACHE_KEEP_MEMORY=0`` turns it off. Returns whether it took effect; never without glibc.
    """
    if not sys.platform.startswith("linux") or os.environ.get("FEATCACHE_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # <malloc.h>
    options = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 64 * 2**20))
    taken = [mallopt(option, value) == 1 for option, value in options]  # every one of them, whatever the first says
    return all(taken)


def available_memory() -> int:
    """Return how many bytes this process may still use: of the machine, or of its control group if that has fewer left.

    Where the system does not say, half of its memory, or 4 GiB.
    """
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
