"""A worker process, and this one, which waits and starts another worker when the first one crashes.

In: a process that has not loaded torch yet. Out: a worker that does the work, and the exit code of the last one. Both share
``Notes``, which survive a crash: each thread notes what it is at, so that the next worker knows what to be careful with. A
note costs less than a microsecond.
"""

import contextlib
import ctypes
import itertools
import logging
import mmap
import os
import signal
import sys
import threading
from typing import Any

from featcache.errors import Interrupted

log = logging.getLogger("featcache")
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGTSTP", "SIGUSR1", "SIGUSR2")  # Windows lacks some
_FORWARDED = tuple(number for number in signal.Signals if number.name in _NAMES)
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, getattr(signal, "SIGBUS", signal.SIGSEGV)}
_GOES_ON = "the same command goes on from what is finished"
_THREADS = 4096  # of one worker, before two share a place


class _Shared(ctypes.Structure):
    _fields_ = (
        ("places", ctypes.c_uint64 * _THREADS),
        ("crashed_images", ctypes.c_uint64),
        ("output_started", ctypes.c_bool),
    )


class Notes:
    """What survives a worker, in memory shared with all forked children.

    Attributes:
        shared: ``crashed_images``: how many images have crashed the process in which they were tried; ``output_started``:
            whether output has been handed over that another worker would hand over again, so that a crash is final.
        suspects: what was noted when a worker crashed.
    """

    def __init__(self) -> None:
        self.shared = _Shared.from_buffer(mmap.mmap(-1, ctypes.sizeof(_Shared)))
        self._places = self.shared.places
        self._threads = itertools.count()
        self._local = threading.local()
        self.suspects: frozenset[int] = frozenset()

    def write(self, key: int) -> None:
        """Note that this thread is at ``key``, between 1 and 2**64 - 1; with 0, at nothing."""
        if not hasattr(self._local, "place"):
            self._local.place = next(self._threads) % _THREADS
        self._places[self._local.place] = key

    def take(self) -> frozenset[int]:
        """Return what the threads of the worker are at, and forget it."""
        keys = frozenset(self._places) - {0}
        self._places[:] = [0] * _THREADS
        return keys


notes = Notes()  # of this process and of those that it forks; read by nobody if none of them is ``supervised``


def supervised() -> int | None:
    """Split into this process, which waits, and a worker.

    Returns:
        None in the worker (or where there are no workers: not Linux, under torchrun, with ``FEATCACHE_SUPERVISE=0``, or once
        torch is loaded), which goes on; in the process that waited the exit code of the last worker.

    Raises:
        Interrupted: in the process that waited, when a signal ended the last worker, which could say nothing about it.
    """
    parallel = (os.environ.get("WORLD_SIZE") or "1") != "1"
    if sys.platform != "linux" or os.environ.get("FEATCACHE_SUPERVISE") == "0" or parallel or "torch" in sys.modules:
        return None
    shared = notes.shared
    while True:
        crashed_images = shared.crashed_images
        # What comes before this process forwards signals waits until it does, instead of ending this process alone.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        if not (worker := _fork()):
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            return None
        code = _wait(worker, unblocked)
        if code >= 0:
            return code
        name = signal_name(-code)
        if -code not in _CRASHES:
            reason = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
            raise Interrupted(f"the process was killed ({name}){reason}; {_GOES_ON}", -code)
        suspects = notes.take() - notes.suspects
        in_vain = notes.suspects and shared.crashed_images == crashed_images  # nothing was found out last time
        if not suspects or shared.output_started or in_vain:
            advice = f", and not while decoding an image; {_GOES_ON}"
            if suspects and shared.output_started:
                advice = "; with -o FILE the same command goes on without the image that did it"
            raise Interrupted(f"the process crashed ({name}){advice}", -code)
        log.warning("a decoder crashed (%s); going on without the image that did it", name)
        notes.suspects |= suspects


def signal_name(number: int) -> str:
    """Return ``SIGSEGV`` for 11."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _fork() -> int:
    """Fork a worker, which dies with this process. Returns its process id; in the worker 0."""
    waiting = os.getpid()
    if worker := os.fork():
        return worker
    os.setpgid(0, 0)  # signals from the terminal come once, through the process that waits
    die_with(waiting)
    return 0


def die_with(parent: int) -> None:
    """Let this process, forked by the process ``parent`` a moment ago, be killed when that ends. Linux only."""
    set_death_signal = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that took effect
        os.kill(os.getpid(), signal.SIGKILL)


def _wait(worker: int, unblocked: set[signal.Signals] | set[int]) -> int:
    """Wait for the worker, and pass on every signal. Returns its exit code, negative for a signal."""

    def forward(number: int, frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGTSTP:
                os.kill(worker, signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
                os.kill(worker, signal.SIGCONT)  # reached when this process is continued
            else:
                os.kill(worker, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
