"""Predictions as a table. In: predictions. Out: a flat dictionary per image, written as CSV (escaped) or JSON lines (exact)."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal

from featcache.errors import UsageError
from featcache.images.records import csv_line
from featcache.models.prediction import Prediction

TableFormat = Literal["csv", "jsonl"]


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
                file.write(csv_line(list(row)))
            file.write(csv_line(list(row.values())))
        written += 1
        refused += row["status"] == "refused"
        unsure += row["status"] == "unsure"
    return written, refused, unsure
