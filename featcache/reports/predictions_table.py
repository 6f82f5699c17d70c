"""Predictions as a table. In: predictions. Out: a flat dictionary per image, written as CSV (escaped) or JSON lines (exact)."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal

import numpy as np

from featcache.errors import UsageError
from featcache.models.predict import Prediction

TableFormat = Literal["csv", "jsonl"]
# How a cell begins that a spreadsheet would run; full-width signs count. Apostrophes before the sign count, too: the one that
# is added can then be taken away again.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def prediction_rows(
    predictions: Iterable[Prediction], classes: tuple[str, ...], *, top_k: int = 1, all_probabilities: bool = False
) -> Iterator[dict[str, Any]]:
    """One row per prediction: path, label, probability, status (``ok`` or ``refused``), reason, then label_2,
    probability_2, ... up to ``top_k``, then ``prob:CLASS`` for every class if asked.

    Raises:
        UsageError: ``top_k`` is not between 1 and the number of classes.
    """
    if not 1 <= top_k <= len(classes):
        raise UsageError(f"top-k must lie between 1 and {len(classes)}, the number of classes; found {top_k}")
    return (_row(prediction, classes, top_k, all_probabilities) for prediction in predictions)


def _row(prediction: Prediction, classes: tuple[str, ...], top_k: int, all_probabilities: bool) -> dict[str, Any]:
    values = prediction.probabilities
    order = [] if values is None else np.argsort(-values, kind="stable")[:top_k].tolist()
    best = [(classes[k], round(float(values[k]), 6)) for k in order] if values is not None else [("", None)] * top_k
    row = {
        "path": prediction.path,
        "label": best[0][0],
        "probability": best[0][1],
        "status": "refused" if values is None else "ok",
        "reason": prediction.reason,
    }
    for number, (label, probability) in enumerate(best[1:], 2):
        row |= {f"label_{number}": label, f"probability_{number}": probability}
    if all_probabilities:
        row |= {
            f"prob:{name}": None if values is None else round(float(values[k]), 6) for k, name in enumerate(classes)
        }
    return row


def write_rows(rows: Iterable[dict[str, Any]], file: BinaryIO, kind: TableFormat) -> tuple[int, int]:
    """Write ``rows`` to a binary file; returns (rows written, rows refused).

    CSV: UTF-8 (names that are not UTF-8 keep their bytes); a text cell that a spreadsheet would run as a formula gets a
    leading apostrophe, and so does one with apostrophes before such a sign: taking one away gives the name.
    JSON lines: ASCII, every name comes back exactly.
    """
    written = refused = 0
    for row in rows:
        if kind == "jsonl":
            file.write(json.dumps(row, ensure_ascii=True).encode() + b"\n")
        else:
            if not written:
                file.write(_csv_line(list(row)))
            file.write(_csv_line(list(row.values())))
        written += 1
        refused += row["status"] == "refused"
    return written, refused


def _csv_line(cells: list[Any]) -> bytes:
    text = io.StringIO()
    escaped = [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in cells]
    csv.writer(text, lineterminator="\r\n").writerow(escaped)  # with both, cells holding either are quoted
    return text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"
