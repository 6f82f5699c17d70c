"""Stop between two steps, not in the middle of one.

In: Ctrl-C or SIGTERM. Out: a flag that a loop looks at when it is ready; a second signal interrupts at once. Where no loop
looks, SIGTERM interrupts as Ctrl-C does, so that what is finished is kept. Schedulers like to send a signal to a process
and to its group: what comes within half a second of a signal is taken for its echo.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_ECHO = 0.5  # seconds
_IMPORT_MACHINERY = "<frozen importlib._bootstrap>"  # the file name of its frames


class StopRequest:
    """Whether a signal has come, which, and when: ``signal`` is 0 if none has."""

    def __init__(self) -> None:
        self.signal = 0
        self.came = float("-inf")

    def __bool__(self) -> bool:
        return self.signal != 0

    def is_echo(self) -> bool:
        """Note that a signal comes. Returns whether another one came just before."""
        before, self.came = self.came, time.monotonic()
        return self.came - before < _ECHO


def interrupt_on_signals() -> StopRequest:
    """Let SIGTERM raise KeyboardInterrupt in the main thread, as SIGINT does. The main thread must be the caller.

    A signal that comes while a module is imported waits for the end of the import: the C++ libraries behind PyTorch abort the
    process when their initialisation is interrupted. A second signal interrupts at once, also then. Where the shell has
    told the process to ignore SIGINT, as it does in the background, that stays so. Returns what holds the last signal.
    """
    request = StopRequest()

    def stop(number: int, frame: FrameType | None) -> None:
        first, request.signal = not request, number
        if request.is_echo():
            return
        if first and _is_importing(frame):
            threading.Thread(target=_send_after_imports, args=(number, request), daemon=True).start()
            return
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    return request


@contextlib.contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Let the first SIGINT or SIGTERM only be noted, in the ``StopRequest`` that is yielded; a second one interrupts.

    Only the main thread can do so; elsewhere nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: Any) -> None:
        if request and not request.is_echo():
            raise KeyboardInterrupt
        request.signal = request.signal or number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != _IMPORT_MACHINERY:
        frame = frame.f_back
    return frame is not None


def _send_after_imports(number: int, request: StopRequest) -> None:
    """Send this process the signal again once its main thread imports nothing any more."""
    main = threading.main_thread().ident or 0
    while _is_importing(sys._current_frames().get(main)):
        time.sleep(0.02)
    request.came = float("-inf")  # no echo
    os.kill(os.getpid(), number)
