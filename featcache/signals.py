"""Stopping between two steps instead of in the middle of one.

In: Ctrl-C or SIGTERM. Out: a flag that a loop looks at when it is ready; a second signal interrupts at once.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """Whether a signal has come, and which."""

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0


@contextlib.contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a ``StopRequest``. Only the main thread can; elsewhere nothing changes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        if request:
            raise KeyboardInterrupt
        request.signal = number

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
