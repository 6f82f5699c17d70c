"""Which class is taken for which, and how well each is recognised. In: a ``Subject``. Out: sections of its report.

The matrix is a table of HTML whose cells are buttons that select pictures. Counts and shares of rows and columns all stand in
it; the page shows one of the three. Of many classes it shows those with the most mistakes; the script redraws it for others.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.heads.head import Array
from featcache.heads.metrics import accuracy_interval
from featcache.reports.elements.numbers import count_text, percent_text
from featcache.reports.elements.page import Section
from featcache.reports.model_report.advice import images_trained_on
from featcache.reports.model_report.subject import Subject
from featcache.system.display import quantity

IN_FULL = 40  # classes that the matrix shows all of
ZOOMED = 20  # of more, so many at a time
_WORST_PAIRS = 50
_LEVELS = 6  # shades of a cell


@dataclasses.dataclass(frozen=True)
class Cell:
    """Of the matrix: n images of the row's class that were called the column's.

    Attributes:
        n: how many. of_row, of_column: their share as text. levels: the shades of count and shares, 0..``_LEVELS`` - 1, as
        classes of the style sheet. select, why: what a click selects, and in words.
    """

    n: int
    of_row: str
    of_column: str
    levels: str
    select: dict[str, int]
    why: str


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A part of the confusion matrix. rows: (class, cells, others, sum) each; None: an empty cell."""

    classes: Sequence[str]
    numbers: Sequence[int]
    rows: Sequence[tuple[str, Sequence[Cell | None], int, int]]
    sums: Sequence[int]
    others: bool


def confusion_section(subject: Subject, data: dict[str, Any]) -> Section:
    """The matrix, and the pairs that are confused most. What the script needs goes into ``data["confusion"]``."""
    counts = np.array(subject.scores["confusion"])
    there = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    zoomed = len(there) > IN_FULL
    shown = there
    if zoomed:
        shown = _most_confused(counts, there)
        rows, columns = np.nonzero(counts)
        data["confusion"] = {
            "cells": np.stack([rows, columns, counts[rows, columns]], axis=1).ravel().tolist(),
            "most": ZOOMED,
            "levels": _LEVELS,
        }
    context = {
        "matrix": _matrix(subject, counts, shown),
        "pairs": _worst_pairs(subject, counts),
        "zoomed": zoomed,
        "n_classes": len(there),
        "classes": subject.model.classes,
        "subject": subject,
    }
    title, parts = "Which class is taken for which", ("report.css", "report.js", *(["matrix.js"] if zoomed else []))
    return Section("confusion", title, "report_confusion.html", context, "Confusion", parts)


def _matrix(subject: Subject, counts: Array, shown: Array) -> Matrix:
    classes = subject.model.classes
    on_page = _on_page(subject)
    by_row, by_column = counts.sum(axis=1), counts.sum(axis=0)
    right = np.eye(len(counts), dtype=bool)
    most = {True: max(counts[right].max(), 1), False: max(counts[~right].max(initial=0), 1)}

    def cell(i: int, j: int) -> Cell | None:
        if not (n := int(counts[i, j])):
            return None
        shares = n / most[i == j], n / by_row[i], n / by_column[j]
        levels = " ".join(f"{kind}{_level(share)}" for kind, share in zip("krp", shares, strict=True))
        why = f"{classes[i]}, recognised" if i == j else f"{classes[i]} taken for {classes[j]}"
        here = on_page.get((i, j), 0)
        if here < n:
            why += f": {quantity(n, 'image')}, {count_text(here)} of them on this page"
        texts = percent_text(shares[1], 0), percent_text(shares[2], 0)
        return Cell(n, *texts, f"{'hit' if i == j else 'miss'} {levels}", {"label": i, "predicted": j}, why)

    numbers = shown.tolist()
    rows = [
        (classes[i], [cell(i, j) for j in numbers], int(by_row[i] - counts[i, shown].sum()), int(by_row[i]))
        for i in numbers
    ]
    sums = by_column[shown].tolist()
    return Matrix(
        [classes[i] for i in numbers], numbers, rows, sums, len(shown) < int(np.count_nonzero(by_row + by_column))
    )


def _most_confused(counts: Array, there: Array) -> Array:
    """``ZOOMED`` classes, ascending: those of the pairs that are confused most; without mistakes the first ones."""
    rows, columns = np.nonzero(counts * ~np.eye(len(counts), dtype=bool))
    chosen: set[int] = set()
    for place in np.argsort(-counts[rows, columns], kind="stable").tolist():
        if len(both := chosen | {int(rows[place]), int(columns[place])}) <= ZOOMED:
            chosen = both
    return np.array(sorted(chosen), np.intp) if chosen else there[:ZOOMED]


def _level(share: float) -> int:
    """A shade by the root of a share: the rare mistakes are what a reader looks for."""
    return min(int(_LEVELS * np.sqrt(share)), _LEVELS - 1)


def _on_page(subject: Subject) -> dict[tuple[int, int], int]:
    """(class, predicted class) -> how many cards of them there are."""
    rows = subject.rows[subject.rows >= 0]
    pairs, counts = np.unique(np.stack([subject.scored.y[rows], subject.predicted[rows]]), axis=1, return_counts=True)
    return dict(zip(map(tuple, pairs.T.tolist()), counts.tolist(), strict=True))


def _worst_pairs(subject: Subject, counts: Array) -> list[dict[str, Any]]:
    """Pairs of a true class and another that it is taken for, the most frequent first."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    flat = np.flatnonzero(wrong)
    flat = flat[np.argsort(-wrong.ravel()[flat], kind="stable")][:_WORST_PAIRS]
    classes, sums = subject.model.classes, counts.sum(axis=1)
    return [
        {
            "label": classes[i],
            "predicted": classes[j],
            "n": int(counts[i, j]),
            "of": int(sums[i]),
            "share": float(counts[i, j] / sums[i]),
            "select": {"label": i, "predicted": j},
            "why": f"{classes[i]} taken for {classes[j]}",
        }
        for i, j in zip(*(place.tolist() for place in np.divmod(flat, len(counts))), strict=True)
    ]


def classes_section(subject: Subject) -> Section:
    """Precision, recall, F1 and support of each class, the worst first, and its mistakes."""
    counts = np.array(subject.scores["confusion"])
    true, called, hit = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    trained = images_trained_on(subject)
    rows = []
    for number, (name, entry) in enumerate(subject.scores["per_class"].items()):
        n, right = int(true[number]), int(hit[number])
        low, high = accuracy_interval(right, n) if n else (None, None)
        rows.append(
            {
                "name": name,
                "number": number,
                "n": n,
                "trained": None if trained is None else int(trained[number]),
                "recall": entry["recall"],
                "low": low,
                "high": high,
                "precision": entry["precision"],
                "f1": 2 * right / (n + int(called[number])) if n + called[number] else None,
                "missed": n - right,
                "wrongly": int(called[number]) - right,
            }
        )
    rows.sort(key=lambda row: 2.0 if row["f1"] is None else row["f1"])
    context = {"rows": rows, "with_training": trained is not None, "all_occur": bool(true.all())}
    return Section("classes", "Each class", "report_classes.html", context, "Classes", ("report.css", "report.js"))
