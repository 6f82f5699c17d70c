"""What the user sees besides results: messages, progress, facts as readable lines.

In: plain values. Out: text on stderr (``say``, ``show_progress``), results on stdout (``print_facts``, ``print_json``).
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class _Rate:
    """Images per second since the first report, which comes when embedding starts: loading a model does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int) -> float:
        now = time.perf_counter()
        if self._first is None:
            self._first = (now, done)
            return 0.0
        return (done - self._first[1]) / (now - self._first[0])


@contextlib.contextmanager
def show_progress(what: str, *, show: bool = True) -> Iterator[Any]:
    """Yield a ``Progress`` callback: a live bar on a terminal, a line now and then elsewhere."""
    if not show or not sys.stderr.isatty():
        yield _progress_in_lines(what) if show else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} images/s, limited by {task.fields[bottleneck]}, left"),
        TimeRemainingColumn(),
    )
    bar, rate = Bar(*columns, console=Console(stderr=True), transient=True), _Rate()

    def update(done: int, total: int, bottleneck: str) -> None:
        if not bar.task_ids:
            bar.add_task(what, total=total, rate=0.0, bottleneck=bottleneck)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, rate=rate(done), bottleneck=bottleneck)

    try:
        yield update
    finally:
        bar.stop()


def _progress_in_lines(what: str, every: float = 10.0) -> Any:
    rate, last = _Rate(), time.perf_counter()

    def update(done: int, total: int, bottleneck: str) -> None:
        nonlocal last
        speed = rate(done)
        if done and time.perf_counter() - last >= every:
            last = time.perf_counter()
            left = (total - done) / speed
            say(f"{what} {done}/{total}, {speed:,.0f} images/s, limited by {bottleneck}, {left:,.0f} s left")

    return update


@contextlib.contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """Say, when the user interrupts what is inside, how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        from featcache.system.workdir import work_folder

        say(f"finished work is kept in {work_folder(output)}; the same command goes on from there")
        raise


def is_first_process() -> bool:
    """Whether this process talks to the user: of those that ``torchrun`` started, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a message of one line for the user, whatever names are in it: to stderr, stdout is for results."""
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Names may hold anything; a terminal gets it on one line, with nothing that it would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def printable_row(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with its keys and texts ``printable``."""
    return {printable(key): printable(value) if isinstance(value, str) else value for key, value in row.items()}


def facts_as_lines(key: str, value: Any, indent: str) -> Iterable[str]:
    """One readable line per value of a nested dictionary."""
    if isinstance(value, dict) and value:
        yield f"{indent}{printable(str(key))}:"
        for name, entry in value.items():
            yield from facts_as_lines(name, entry, indent + "  ")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield f"{indent}{printable(str(key))}:"
        for entry in value:
            yield f"{indent}  " + ", ".join(printable(f"{name}: {text}") for name, text in entry.items())
    else:
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else _word(value)
        yield f"{indent}{printable(str(key))}: {printable(text)}"


def _word(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print results to stdout: readable lines, or one JSON object."""
    if as_json:
        print_json(facts, as_json)
        return
    for key, value in facts.items():
        for line in facts_as_lines(key, value, ""):
            print(line)


def print_json(facts: dict[str, Any], wanted: bool) -> None:
    """Print ``facts`` to stdout as one line of JSON, if that is wanted."""
    if wanted:
        print(json.dumps(facts, default=str), flush=True)


@contextlib.contextmanager
def show_training() -> Iterator[Any]:
    """Yield a callback for ``trainer.Status``: a live bar on a terminal, a line now and then elsewhere."""
    if not is_first_process():
        yield None
        return
    pace = _Pace()
    if not sys.stderr.isatty():
        yield _training_in_lines(pace)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
    bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def update(status: Any) -> None:
        if not bar.task_ids:
            bar.add_task("", total=status.total, facts="")
            bar.start()
        facts = f"loss {status.loss:.4f}, accuracy {status.accuracy:.2%}, {pace(status)}"
        bar.update(
            bar.task_ids[0],
            description=f"epoch {status.epoch}/{status.epochs}",
            completed=status.done,
            total=status.total,
            facts=facts,
        )

    try:
        yield update
    finally:
        bar.stop()


class _Pace:
    """Images per second and the time left, from the first report on; pauses for validation count, as they will recur."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def __call__(self, status: Any) -> str:
        done = (status.epoch - 1) * status.total + status.done
        now = time.perf_counter()
        if self._first is None:
            self._first = (now, done)
            return "starting"
        rate = (done - self._first[1]) / (now - self._first[0])
        left = (status.epochs * status.total - done) / rate
        return f"{rate:,.1f} images/s, at most {left // 60:.0f} min {left % 60:02.0f} s left"


def _training_in_lines(pace: _Pace, every: float = 30.0) -> Any:
    last = time.perf_counter()

    def update(status: Any) -> None:
        nonlocal last
        facts = pace(status)
        if time.perf_counter() - last >= every:
            last = time.perf_counter()
            say(
                f"epoch {status.epoch}/{status.epochs}, image {status.done}/{status.total}: loss {status.loss:.4f}, "
                f"accuracy {status.accuracy:.2%}, {facts}"
            )

    return update
