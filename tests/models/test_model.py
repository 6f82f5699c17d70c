"""What a model folder admits, and what may be replaced by one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_classes
from conftest import SPEC

from featcache.errors import ModelError
from featcache.heads.head import FittedHead, Head
from featcache.models.fit import fit_head
from featcache.models.model import load_model, save_model
from featcache.system.safe_load import parse_json


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"format": "other"}, "is not a featcache model's"), ({"classes": ["c", "b", "a"]}, "is not what was saved")],
)
def test_a_changed_manifest_is_refused(model: Path, changes: dict[str, Any], words: str) -> None:
    manifest = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(ModelError, match=words):
        load_model(model)


def test_a_head_only_model_is_replaced_and_nothing_else_is(
    model: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "featcache"):
        fit_head(cache, model, C=2.0)
    assert caplog.messages[-1] == f"the head-only model that was in {model} is replaced"
    assert load_model(model).manifest["training"]["C"] == 2.0
    (tmp_path / "link").symlink_to(model)
    fit_head(cache, tmp_path / "link", C=3.0)
    assert (tmp_path / "link").is_symlink()
    assert load_model(model).manifest["training"]["C"] == 3.0
    (model / "notes.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name in ("m", "mine", "file"):
        with pytest.raises(ModelError, match="choose another -o"):
            fit_head(cache, tmp_path / name)
    assert (model / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.h5", "file", "link", "m", "mine"]


def test_a_replacement_cut_off_between_its_renames_is_undone(model: Path) -> None:
    model.rename(model.with_name(".m.replaced"))
    assert load_model(model).manifest["training"]["C"] == 1.0


def test_what_a_model_shows_of_itself(cache: Path, tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>", "caf\udce9", "dog")
    make_classes(tmp_path / "f.h5", np.arange(150) % 3, 1 + np.arange(150) // 50, classes=names)
    model = load_model(fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0).model)
    assert repr(model) == (
        f"Model({str(tmp_path / 'm')!r}: logreg on squeezenet1_1, 3 classes: "
        r"'<script>alert(1)</script>', 'caf\udce9', 'dog')"
    )
    shown = model._repr_html_()
    assert "<script>" not in shown and shown.encode()
    accuracy = model.manifest["metrics"]["test_accuracy"]
    assert f"<td>test accuracy</td><td>{accuracy:.2%}</td>" in shown


def test_metrics_hold_a_row_of_the_confusion_matrix_a_line(tmp_path: Path) -> None:
    """Of many classes the matrix is most of the file: with a number a line it was five times as large."""
    classes = tuple(f"c{k}" for k in range(300))
    metrics: dict[str, Any] = {
        "val": {"accuracy": 0.5, "confusion": np.eye(300, dtype=int).tolist(), "per_class": {"ä": {"f1": None}}},
        "curve": [{"C": 1.0, "fold_accuracies": [0.5, 1.0]}, {}],
        "copies": {},
        "none": [],
    }
    head = Head("logreg", "none", np.zeros(3), np.ones(3), ((np.zeros((300, 3)), np.zeros(300)),))
    facts: dict[str, Any] = {"spec": SPEC, "weights": {"source": "x"}, "training": {}}
    save_model(tmp_path / "m", FittedHead(head, (), {}, []), classes=classes, metrics=metrics, **facts)
    text = (tmp_path / "m" / "metrics.json").read_text()
    assert parse_json(text) == metrics
    assert len(text) < 2.2 * 300**2
    assert text.count("\n") < 350
