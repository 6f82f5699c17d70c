"""Predictions as a table. In: predictions. Out: a flat dictionary per image, written as CSV (escaped) or JSON lines (exact)."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal

from featcache.errors import UsageError
from featcache.models.prediction import Prediction

TableFormat = Literal["csv", "jsonl"]
# How a cell begins that a spreadsheet would run; full-width signs count. Apostrophes before the sign count, too: the one that
# is added can then be taken away again.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def prediction_rows(
    predictions: Iterable[Prediction], classes: tuple[str, ...], *, top_k: int = 1, all_probabilities: bool = False
) -> Iterator[dict[str, Any]]:
    """``Prediction.to_row`` of each, as it is written.

    Raises:
        UsageError: ``top_k`` is not between 1 and the number of classes.
    """
    if not 1 <= top_k <= len(classes):
        raise UsageError(f"top-k must lie between 1 and {len(classes)}, the number of classes; found {top_k}")
    return (as_written(prediction.to_row(top_k=top_k, probs=all_probabilities)) for prediction in predictions)


def as_written(row: dict[str, Any]) -> dict[str, Any]:
    """Probabilities to six digits; where there is no label, an empty text."""
    row = {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
    return row | {name: "" for name, value in row.items() if value is None and name.startswith(("label", "true_label"))}


def write_rows(rows: Iterable[dict[str, Any]], file: BinaryIO, kind: TableFormat) -> tuple[int, int, int]:
    """Write ``rows`` to a binary file; returns (rows written, refused, unsure).

    CSV: UTF-8 (names that are not UTF-8 keep their bytes); a list is a JSON text; a text cell that a spreadsheet would run as a
    formula gets a leading apostrophe, and so does one with apostrophes before such a sign: taking one away gives the name.
    JSON lines: ASCII, every name comes back exactly.
    """
    written = refused = unsure = 0
    for row in rows:
        if kind == "jsonl":
            file.write(json.dumps(row, ensure_ascii=True).encode() + b"\n")
        else:
            if not written:
                file.write(_csv_line(list(row)))
            file.write(_csv_line(list(row.values())))
        written += 1
        refused += row["status"] == "refused"
        unsure += row["status"] == "unsure"
    return written, refused, unsure


def _csv_line(cells: list[Any]) -> bytes:
    text = io.StringIO()
    cells = [json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in cells]
    escaped = [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in cells]
    csv.writer(text, lineterminator="\r\n").writerow(escaped)  # with both, cells holding either are quoted
    return text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"
