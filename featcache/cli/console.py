"""What the user sees: what a command found on stdout; errors, notes and progress on stderr.

In: plain values. Out: text on stderr (``say``, ``note``, ``show_progress``, ``show_training``) and stdout (``show_result``).
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from featcache.errors import with_slashes
from featcache.system.display import printable as printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from featcache.finetuning.trainer import Status

# How far a job is: a title before the bar (none: no bar now), images done and to do, facts behind the bar; all of it as a line of a log.
_State = tuple[str, int, int, str, str]
_WIDE = 72  # columns of a terminal from which facts have room beside the bar, the count and the time left


class _Progress:
    """Shows how far a job is: by a live bar on a terminal, elsewhere by a line now and then.

    It is called with what the job reports, and ``describe`` puts that into words.
    """

    def __init__(self, describe: Callable[..., _State], *, seconds_per_line: float, time_left: bool) -> None:
        self._describe, self._seconds_per_line = describe, seconds_per_line
        self._last, self._time_left = time.perf_counter(), time_left
        self._on_terminal = sys.stderr.isatty()
        self._bar: Bar | None = None

    def __call__(self, *report: Any) -> None:
        title, done, total, facts, line = self._describe(*report)
        if not self._on_terminal:
            if done and time.perf_counter() - self._last >= self._seconds_per_line:
                self._last = time.perf_counter()
                say(line)
            return
        if not title:
            self.close()
            return
        if self._bar is None:
            self._bar = _new_bar(time_left=self._time_left)
            self._bar.add_task(title, total=total, facts=facts)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=title, completed=done, total=total, facts=facts)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _new_bar(*, time_left: bool) -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, title, count = Console(stderr=True), TextColumn("{task.description}"), MofNCompleteColumn()
    facts, left = TextColumn("{task.fields[facts]}"), (TimeRemainingColumn(),) if time_left else ()
    if time_left and console.width < _WIDE:  # cut off, facts would take count and time left with them
        return Progress(title, count, TextColumn("left"), *left, console=console, transient=True)
    return Progress(title, BarColumn(), count, facts, *left, console=console, transient=True)


class _Speed:
    """Images per second since the first report, which comes when the work starts: loading a model does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int) -> float:
        now = time.perf_counter()
        since, before = self._first = self._first or (now, done)
        return (done - before) / (now - since) if now > since else 0.0


def show_progress(what: str, *, show: bool = True) -> AbstractContextManager[_Progress | None]:
    """A context with a callback (images done, images to do, the stage that limits); with None unless ``show``, or if quiet."""
    speed = _Speed()

    def describe(done: int, total: int, bottleneck: str) -> _State:
        rate = speed(done)
        facts = f"{rate:,.0f} images/s, limited by {bottleneck}"
        left = f"{(total - done) / rate:,.0f} s left" if rate else "starting"
        return what, done, total, f"{facts}, left", f"{what} {done}/{total}, {facts}, {left}"

    if not show or is_quiet():
        return contextlib.nullcontext()
    return contextlib.closing(_Progress(describe, seconds_per_line=10.0, time_left=True))


def show_steps() -> AbstractContextManager[_Progress | None]:
    """A context with a callback (parts done and to do, and of what); with None if quiet."""

    def describe(done: int, total: int, what: str) -> _State:
        return what, done, total, "", f"{what}: {done:,} of {total:,}"

    if is_quiet():
        return contextlib.nullcontext()
    return contextlib.closing(_Progress(describe, seconds_per_line=10.0, time_left=True))


def show_training() -> AbstractContextManager[_Progress | None]:
    """A context with a callback (a ``Status`` of training; or, of what comes before, as for ``show_steps``); with None if quiet."""
    speed = _Speed()  # pauses for validation count, as they will recur
    before: dict[str, _Speed] = {}

    def describe(*report: Any) -> _State:
        return training(*report) if len(report) == 1 else preparing(*report)

    def preparing(done: int, total: int, what: str) -> _State:
        rate = before.setdefault(what, _Speed())(done)
        facts = f"{rate:,.0f} images/s, {(total - done) / rate:,.0f} s left" if rate else "starting"
        return what if done < total else "", done, total, facts, f"{what} {done}/{total}, {facts}"

    def training(status: "Status") -> _State:
        done = (status.epoch - 1) * status.total + status.done
        rate, pace = speed(done), "starting"
        if rate:
            left = (status.epochs * status.total - done) / rate
            pace = f"{rate:,.1f} images/s, at most {left // 60:.0f} min {left % 60:02.0f} s left"
        title = f"epoch {status.epoch}/{status.epochs}"
        facts = f"{status.scores}, {pace}"
        line = f"{title}, image {status.done}/{status.total}: {facts}"
        ended = status.epoch == status.epochs and status.done == status.total
        return "" if ended else title, status.done, status.total, facts, line

    if is_quiet():
        return contextlib.nullcontext()
    return contextlib.closing(_Progress(describe, seconds_per_line=30.0, time_left=False))


@contextlib.contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """Say, when the user interrupts what is inside, how to go on, if anything is finished."""
    from featcache.system.workdir import work_folder

    try:
        yield
    except KeyboardInterrupt:
        if (folder := work_folder(output)).is_dir():
            say(f"finished work is kept in {folder}; the same command goes on from there")
        raise


def is_first_process() -> bool:
    """Whether this process talks to the user: of those that ``torchrun`` started, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def is_quiet() -> bool:
    """Whether notes and progress are left out: with ``-q``, and in processes that do not talk to the user."""
    return not is_first_process() or logging.getLogger("featcache").level > logging.INFO


def open_missing_streams() -> None:
    """Let stdin, stdout and stderr lead nowhere where they are closed, as for daemons and under pythonw.

    Each gets back the number that is free. Otherwise the next file that is opened gets it, and with it what libraries print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for as long as this process
    with contextlib.suppress(AttributeError, OSError):  # as stderr: a name that cannot be shown ends no run
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def silence(stream: TextIO) -> None:
    """Let a stream that takes nothing any more lead nowhere, what it still holds included."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print a message of one line for the user, whatever names are in it: to stderr, stdout is for results."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:  # its reader went away, or the disk of a log is full: no reason to stop the work
        silence(sys.stderr)


def note(text: str) -> None:
    """``say`` it, unless notes are not wanted."""
    if not is_quiet():
        say(text)


def printable_row(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with its keys and texts ``printable``."""

    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return [shown(entry) for entry in value]
        return printable(value) if isinstance(value, str) else value

    return {printable(key): shown(value) for key, value in row.items()}


def facts_as_lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """One readable line per value of a nested dictionary."""
    for key, value in facts.items():
        start = f"{indent}{printable(str(key))}:"
        if isinstance(value, dict) and value:
            yield start
            yield from facts_as_lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield start
            for entry in value:
                yield f"{indent}  " + ", ".join(printable(f"{name}: {text}") for name, text in entry.items())
        else:
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else _word(value)
            yield f"{start} {printable(text)}"


def _word(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def show_result(lines: Iterable[str], facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a command found to stdout: ``lines``, whatever names are in them; or else ``facts`` as one line of JSON."""
    for line in (
        [json.dumps(facts, default=lambda value: with_slashes(str(value)))] if as_json else map(printable, lines)
    ):
        print(line)
    sys.stdout.flush()
