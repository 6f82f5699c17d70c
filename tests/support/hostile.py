"""For the tests beside it: code that leaves a trace if anything runs it, and an eye on every file that is opened.

In: a folder. Out: objects to pickle, and the list of paths that Python opened meanwhile.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_watching: list[list[str]] = []


class Bomb:
    """Pickled, it becomes a call that makes the file ``trace``."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "os.listdir", "os.scandir", "subprocess.Popen", "os.system", "ctypes.dlopen"):
        what = (
            arguments[0] if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        )  # a descriptor is open already
        _watching[-1].append(f"{event} {os.fsdecode(what)}")


sys.addaudithook(lambda event, arguments: _hook(event, arguments) if _watching and arguments else None)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list to which every opening of a file, library or program is appended."""
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.pop()
