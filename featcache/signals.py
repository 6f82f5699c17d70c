"""Stopping between two steps instead of in the middle of one.

In: Ctrl-C or SIGTERM. Out: a flag that a loop looks at when it is ready; a second signal interrupts at once. Where no loop
looks, SIGTERM interrupts as Ctrl-C does, so that what is finished is kept. Schedulers like to send a signal to a process
and to its group: what comes within half a second of the first is taken for its echo.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

_ECHO = 0.5  # seconds


class _Clock:
    """Whether it was asked within the last half second; the first time it was not."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def just_now(self) -> bool:
        before, self._last = self._last, time.monotonic()
        return self._last - before < _ECHO


class StopRequest:
    """Whether a signal has come, and which."""

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0


def interrupt_on_sigterm() -> StopRequest:
    """From now on SIGTERM raises KeyboardInterrupt in the main thread, which must be the caller, and is noted."""
    request, came = StopRequest(), _Clock()

    def stop(number: int, frame: Any) -> None:
        request.signal = number
        if not came.just_now():
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    return request


@contextlib.contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a ``StopRequest``. Only the main thread can; elsewhere nothing changes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    came = _Clock()

    def note(number: int, frame: Any) -> None:
        if request and not came.just_now():
            raise KeyboardInterrupt
        request.signal = request.signal or number

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
