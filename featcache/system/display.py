"""How values show themselves in Python: tables of counts, tables in HTML, short texts of reports, a bar in notebooks.

In: plain values, whatever names are in them. Out: rows of text; HTML, escaped; in a Jupyter kernel a bar that is gone at the end.
"""

import contextlib
import html
import logging
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from featcache.errors import with_slashes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MOST_CLASSES = 20  # that a table shows one by one; of more the largest and smallest
_PAUSE = 0.1  # seconds between two changes of a bar: more than a browser can follow
Callback = TypeVar("Callback", bound=Callable[..., None])
State = tuple[int, int, str]  # images done and to do, and a line that says so
Steps = Callable[[int, int, str], None]  # what is told how much is done, how much there is to do, and of what


def count_rows(
    classes: Sequence[str],
    labels: "npt.NDArray[np.integer]",
    splits: "npt.NDArray[np.integer]",
    *,
    names: Sequence[str],
) -> list[list[str]]:
    """Images per class and split, with a header and a sum; empty if there are neither classes nor splits.

    Args:
        labels: (N,) positions among ``classes``, -1: none. splits: (N,) positions among ``names``, 0: none.
    """
    import numpy as np  # late: every message of the command line comes through this file

    if not len(labels) or not (classes or splits.any()):
        return []
    counts = np.zeros((len(classes) + 1, len(names)), np.int64)
    np.add.at(counts, (labels, splits), 1)  # -1, no label, is the last row
    there = np.flatnonzero(counts.any(0))
    titles = [names[split] if split else "no split" for split in there.tolist()] if there.any() else ["images"]
    order = np.arange(len(classes))
    if many := len(order) > _MOST_CLASSES:
        order = np.argsort(-counts[order].sum(1), kind="stable")
    rows = [[classes[row][:40], *map(str, counts[row, there])] for row in order.tolist()]
    if many:
        rows[5:-5] = [[f"... {len(rows) - 10} classes between", *("" for _ in titles)]]
    if counts[-1].any():
        rows.append(["(no label)", *map(str, counts[-1, there])])
    return [["class", *titles], *rows, ["all", *map(str, counts[:, there].sum(0))]]


def aligned(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right; nothing if there are no rows."""
    if not rows:
        return []
    first, *others = (max(map(columns, column)) for column in zip(*rows, strict=True))
    return [
        f"  {row[0]}{' ' * (first - columns(row[0]))}"
        + "".join(f"  {' ' * (width - columns(cell))}{cell}" for cell, width in zip(row[1:], others, strict=True))
        for row in rows
    ]


def columns(text: str) -> int:
    """How many columns of a terminal ``text`` takes: by Unicode's East Asian Width, marks none."""
    return sum(map(width_of, unicodedata.normalize("NFC", text)))


def width_of(character: str) -> int:
    """How many of them a character takes."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def printable(text: str) -> str:
    """``text`` on one line, without what a terminal would obey or a reader be misled by. Names may hold anything."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return with_slashes(shown)


def quantity(n: float, one: str, several: str = "") -> str:
    """``1 image``, ``1,234 images``, ``2 classes``; ``several`` where that rule does not hold."""
    number = f"{n:,g}" if isinstance(n, float) else f"{n:,}"
    return f"{number} {one if n == 1 else several or one + ('es' if one.endswith('s') else 's')}"


def all_refused(n: int, source: object) -> str:
    """``all 24 images of SOURCE were refused``, ``the only image of ...``."""
    return f"the only image of {source} was refused" if n == 1 else f"all {n:,} images of {source} were refused"


def middle_out(text: str, most: int) -> str:
    """``text``, or its two ends around an ellipsis if it is longer than ``most`` characters: names differ at their ends."""
    head = (most - 1) // 2
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def html_table(rows: Iterable[Sequence[object]], *, caption: str = "", header: bool = True) -> str:
    """A table whose cells say what they hold and nothing that a browser would obey; ``header``: the first row is one."""
    lines = [f"<table><caption>{_escaped(caption)}</caption>"]
    for number, row in enumerate(rows):
        tag = "th" if header and not number else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _escaped(cell: object) -> str:
    """Also without what is no Unicode, which would keep a notebook from being saved."""
    return html.escape(str(cell)).encode("utf-8", "backslashreplace").decode()


class Shown:
    """What a function reports, in a notebook: the fields that ``_shown`` names, unless they are None."""

    _shown: ClassVar[tuple[str, ...]] = ()

    def _values(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self._shown}
        return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}

    def __repr__(self) -> str:
        values = {name: value for name, value in self._values().items() if value is not None}
        texts = [
            f"{name}={f'{value:.4g}' if isinstance(value, float) else repr(value)}" for name, value in values.items()
        ]
        return f"{type(self).__name__}({', '.join(texts)})"

    def _repr_html_(self) -> str:
        rows = [(name.replace("_", " "), in_words(name, value)) for name, value in self._values().items()]
        return html_table([row for row in rows if row[1]], caption=type(self).__name__, header=False)


def in_words(name: str, value: object) -> str:
    """A value for people, by its name: accuracies in per cent; nothing for None and for what is empty."""
    if isinstance(value, float):
        return f"{value:.2%}" if "accuracy" in name else f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return "" if value is None else str(value)


def in_kernel() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def bar_in_notebook(
    progress: Callback | None, describe: Callable[..., State], *, delay: float = 0.5
) -> Iterator[Callback | None]:
    """``progress`` if there is one; else, in a notebook, a bar that takes the same reports and is gone at the end; else None.

    Args:
        describe: puts a report into words. delay: seconds of work after which the bar appears: short work shows none.
    """
    if progress is not None or not in_kernel() or logging.getLogger("featcache").level > logging.INFO:
        yield progress
        return
    bar = _Bar(describe, delay)
    try:
        yield bar  # type: ignore[misc]
    finally:
        bar.close()


def describe_images(what: str) -> Callable[[int, int, str], State]:
    """For reports of images done, images to do, and the stage that limits."""
    first: list[tuple[float, int]] = []  # the time and the images of the first report

    def describe(done: int, total: int, bottleneck: str) -> State:
        now = time.perf_counter()
        since, before = (first or first.append((now, done)) or first)[0]  # type: ignore[func-returns-value]
        rate = (done - before) / (now - since) if now > since else 0.0
        return done, total, f"{what} {done}/{total}, {rate:,.0f} images/s, limited by {bottleneck}"

    return describe


def describe_steps(done: int, total: int, what: str) -> State:
    """For reports of what is done and to do, and of what kind."""
    return done, total, f"{what} {done:,}/{total:,}"


class _Bar:
    def __init__(self, describe: Callable[..., State], delay: float) -> None:
        self._describe, self._delay, self._handle = describe, delay, None
        self._next: float | None = None

    def __call__(self, *report: Any) -> None:
        done, total, text = self._describe(*report)
        now = time.perf_counter()
        if self._next is None:  # the first report comes when the work starts: loading a model does not count
            self._next = now + self._delay
        if now < self._next:
            return
        self._next = now + _PAUSE
        self._show(
            {"text/html": f'<progress value="{done}" max="{total}"></progress> {_escaped(text)}', "text/plain": text}
        )

    def _show(self, content: dict[str, str]) -> None:
        from IPython.display import display

        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def close(self) -> None:
        """Leave nothing behind."""
        if self._handle is not None:
            self._show({"text/html": "", "text/plain": ""})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out notes and warnings of this thread: of what is read once more, and has been told."""
    log, here = logging.getLogger("featcache"), threading.get_ident()

    def is_told(record: logging.LogRecord) -> bool:
        return record.thread != here or record.levelno >= logging.ERROR

    log.addFilter(is_told)
    try:
        yield
    finally:
        log.removeFilter(is_told)
