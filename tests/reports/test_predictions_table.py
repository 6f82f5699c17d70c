"""Rows survive CSV and JSON lines whatever their names are, and no cell is a formula."""

import csv
import io
import json

import numpy as np
import pytest

from featcache.errors import UsageError
from featcache.models.prediction import Prediction
from featcache.reports.predictions_table import prediction_rows, write_rows

HOSTILE = ["=cmd()|x", "+1", "-1", "@x", "new\nline", "cr\rx", '"quoted"', "comma,", "caf\udce9", "\u202eltr", "ñ"]
SCORES = np.array([0.2, 0.7, 0.1])


def test_names_come_back() -> None:
    predictions = [Prediction(f"p/{name}.jpg", SCORES, classes=("a", "b", "c")) for name in HOSTILE]
    for kind in ("csv", "jsonl"):
        file = io.BytesIO()
        assert write_rows(prediction_rows(predictions, ("a", "b", "c")), file, kind) == (11, 0, 0)  # type: ignore[arg-type]
        if kind == "jsonl":
            read = [json.loads(line)["path"] for line in file.getvalue().splitlines()]
        else:
            text = file.getvalue().decode("utf-8", "surrogateescape")
            read = [row["path"] for row in csv.DictReader(io.StringIO(text, newline=""))]
        assert read == [prediction.path for prediction in predictions]


def test_csv_cells_are_never_formulas() -> None:
    file = io.BytesIO()
    classes = ("=a", "=b", "=c")
    rows = [Prediction("=cmd().jpg", SCORES, classes=classes), Prediction("x.jpg", None, "-no image", classes=classes)]
    assert write_rows(prediction_rows(rows, classes, top_k=2), file, "csv") == (2, 1, 0)
    first, second = list(csv.reader(io.StringIO(file.getvalue().decode())))[1:]
    assert first == ["'=cmd().jpg", "'=b", "0.7", "ok", "", "'=a", "0.2"]
    assert second[0] == "x.jpg" and second[4] == "'-no image"


def test_more_classes_than_there_are() -> None:
    with pytest.raises(UsageError, match="top-k"):
        prediction_rows([], ("a", "b"), top_k=3)
