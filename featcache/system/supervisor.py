"""A decoder that crashes must not take the run down with it.

In: a process that is about to decode images. Out: a worker process that does it, and this one, which waits. Every thread
notes what it is decoding in memory that both share. When the worker crashes, another one takes its place; the images that
were being decoded are then first tried in a process of their own, and those that crash that one are refused. An image
costs two notes, about a microsecond, where decoding it in another process would cost copying its pixels.
"""

import contextlib
import ctypes
import itertools
import logging
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("featcache")
CRASHED = "its decoder crashed"
_CRASHES = (
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    *filter(None, [getattr(signal, "SIGBUS", None)]),
)
_SLOTS = 4096
_PATIENCE = 120.0  # seconds for one image in a process of its own
_TRY = (
    "import sys; from featcache.images.decode import decode_pixels; from featcache.images.source import RefusedImage\n"
    "try: decode_pixels(sys.stdin.buffer.read(), at_least=int(sys.argv[1]) or None)\n"
    "except RefusedImage: pass"
)


class DecoderCrashedError(Exception):
    """The decoder took down the process in which an image was tried; ``str()`` says how."""


class _Notes:
    """What survives a worker: per thread the key of what it decodes, how many images crashed, whether to give up.

    Attributes:
        suspects: keys of what was being decoded when a worker crashed.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * (_SLOTS + 2))  # shared with forked children
        self._slots = itertools.count()
        self._local = threading.local()
        self.suspects: frozenset[int] = frozenset()

    def write(self, key: int) -> None:
        if not hasattr(self._local, "slot"):
            self._local.slot = 2 + next(self._slots) % _SLOTS
        struct.pack_into("Q", self._memory, 8 * self._local.slot, key)

    def take(self) -> frozenset[int]:
        """All keys, which are then forgotten."""
        keys = struct.unpack_from(f"{_SLOTS}Q", self._memory, 16)
        self._memory[16:] = bytes(8 * _SLOTS)
        return frozenset(keys) - {0}

    @property
    def convicted(self) -> int:
        return int(struct.unpack_from("Q", self._memory, 0)[0])

    @convicted.setter
    def convicted(self, count: int) -> None:
        struct.pack_into("Q", self._memory, 0, count)

    @property
    def final(self) -> bool:
        return bool(self._memory[8])

    @final.setter
    def final(self, value: bool) -> None:
        self._memory[8] = value


_notes: _Notes | None = None


@contextlib.contextmanager
def decoding(data: bytes, *, at_least: int | None = None) -> Iterator[None]:
    """Around decoding ``data``: note it, and if a worker crashed on what looks like it, try it elsewhere first.

    Raises:
        DecoderCrashedError: it crashes there, too.
    """
    if _notes is None:
        yield
        return
    key = _key(data)
    if key in _notes.suspects:
        try_apart(data, at_least=at_least)
    _notes.write(key)
    try:
        yield
    finally:
        _notes.write(0)


def try_apart(data: bytes, *, at_least: int | None = None) -> None:
    """Decode ``data`` in a process of its own, for nothing but seeing whether it survives.

    Raises:
        DecoderCrashedError: it does not, or takes more than two minutes.
    """
    command = [sys.executable, "-c", _TRY, str(at_least or 0)]
    try:
        code = subprocess.run(command, input=data, capture_output=True, timeout=_PATIENCE, check=False).returncode
    except subprocess.TimeoutExpired:
        code, how = -1, f"its decoder comes to no end, {_PATIENCE:g} s were not enough"
    else:
        how = f"{CRASHED} ({_name(-code)})"
    if code < 0:
        if _notes:
            _notes.convicted += 1
        raise DecoderCrashedError(how)


def never_again() -> None:
    """From here on a crash is final: output has been handed over that another worker would hand over again."""
    if _notes:
        _notes.final = True


def supervised() -> int | None:
    """Split into this process, which waits, and a worker.

    Returns:
        None in the worker (or where there are no workers: not Linux, under torchrun, with ``FEATCACHE_SUPERVISE=0``, or once
        torch is loaded), which goes on; in the process that waited the exit code of the last worker.
    """
    global _notes
    parallel = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if sys.platform != "linux" or os.environ.get("FEATCACHE_SUPERVISE") == "0" or parallel or "torch" in sys.modules:
        return None
    _notes = _Notes()
    while True:
        convicted = _notes.convicted
        if not (worker := _fork()):
            return None
        code = _wait(worker)
        if code == -signal.SIGKILL:
            log.error(
                "the process was killed, perhaps for want of memory; the same command goes on from what is finished"
            )
        if -code not in _CRASHES:
            return code if code >= 0 else 128 - code
        suspects = _notes.take() - _notes.suspects
        if not suspects or _notes.final or (_notes.suspects and _notes.convicted == convicted):
            log.error("the process crashed (%s)%s", _name(-code), _advice(_notes.final and bool(suspects)))
            return 128 - code
        log.warning("a decoder crashed (%s); going on without the image that did it", _name(-code))
        _notes.suspects |= suspects


def _fork() -> int:
    """The process id of a worker, which dies with this process; in the worker 0."""
    waiting = os.getpid()
    if worker := os.fork():
        return worker
    os.setpgid(0, 0)  # signals from the terminal come once, through the process that waits
    set_death_signal = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != waiting:  # it died before that took effect
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _wait(worker: int) -> int:
    """Pass on every signal; the worker's exit code, negative for a signal."""

    def forward(number: int, frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGTSTP:
                os.kill(worker, signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
                os.kill(worker, signal.SIGCONT)  # reached when this process is continued
            else:
                os.kill(worker, number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, forward) for number in signals}
    try:
        return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _key(data: bytes) -> int:
    """Tells this file's content from others, well enough: whoever is suspected wrongly is only tried apart."""
    return (len(data) << 32 | zlib.crc32(data[-4096:], zlib.crc32(data[:4096]))) & (2**64 - 1) or 1


def _name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _advice(streaming: bool) -> str:
    if streaming:
        return "; with -o FILE the same command goes on without the image that did it"
    return ", and not while decoding an image; the same command goes on from what is finished"
