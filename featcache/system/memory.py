"""How much memory there is, and keeping what was allocated. No torch."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path


def keep_freed_memory() -> bool:
    """Let glibc keep freed activation buffers instead of returning and faulting them in again at every layer.

    The usual loop spends half its CPU time on that. Affects the whole process, and only what is allocated later;
    ``FEATCACHE_KEEP_MEMORY=0`` turns it off. Returns whether it took effect.
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
