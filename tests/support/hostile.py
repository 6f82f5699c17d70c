"""For the tests of attacks: code that leaves a trace if anything runs it, texts that are no JSON, an eye on what is opened."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.listdir", "os.scandir", "subprocess.Popen", "os.system", "ctypes.dlopen")
NO_JSON = {
    "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "rather deep": '{"a":' * 500 + "1" + "}" * 500,
    "deep and open": '{"a":' * 100_000,
    "deep list": "[" * 200_000,
    "NaN": '{"format":"featcache-model","a":NaN}',
    "infinite": '{"a":1e999}',
    "minus infinity": '{"a":-Infinity}',
    "huge number": '{"a":' + "9" * 10_000 + "}",
    "only a huge number": "9" * 9999,
    "twice": '{"a":1,"a":2}',
    "list": "[1]",
    "number": "7",
    "null": "null",
    "text": '"' + "x" * 100_000 + '"',
    "broken": '{"a":',
    "blank": " ",
    "empty": "",
}
_watching: list[list[str]] = []


class Bomb:
    """Pickled, it becomes a call that makes the file ``trace``."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and arguments and event in EVENTS:
        what = (
            arguments[0] if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        )  # a descriptor is open already
        _watching[-1].append(f"{event} {os.fsdecode(what)}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list to which every opening of a file, library or program is appended."""
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.pop()
