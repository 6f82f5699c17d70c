"""Curves: what is on them, read back from matplotlib's objects, and that a picture comes out, over nobody else's file."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPEC
from matplotlib.figure import Figure
from PIL import Image

from featcache.errors import ModelError, StorageError, UsageError
from featcache.heads.head import FittedHead, Head
from featcache.models.fit import fit_head
from featcache.models.model import load_model, save_model
from featcache.reports.curves import draw_curves, plot_history

HISTORY: list[dict[str, Any]] = [
    {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 0.9, "val_accuracy": 0.6},
    {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.8, "val_loss": None, "val_accuracy": None},
    {"epoch": 3, "train_loss": 0.2, "train_accuracy": 0.9, "val_loss": 0.7, "val_accuracy": 0.75},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What a fine-tuning leaves, as far as curves need it."""
    save_model(
        tmp_path / "m",
        FittedHead(Head("linear", "none", np.zeros(3), np.ones(3), ((np.eye(2, 3), np.zeros(2)),)), (), {}, []),
        classes=("a", "b"),
        spec=SPEC,
        weights={"source": "", "reload": None},
        training={"recipe": "gradual", "best_epoch": 3},
        metrics={"history": HISTORY, "head_val_accuracy": 0.7},
        finetuned=True,
    )
    return tmp_path / "m"


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_scores_between_epochs_are_drawn_by_step(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        row | {"epoch": epoch, "step": step} for row, epoch, step in zip(HISTORY, (1, 1, 2), (50, 62, 100), strict=True)
    ]
    plot_history(rows, tmp_path / "h.png", title="", best_epoch=2, best_step=100)
    loss, _ = figures[0].axes
    assert loss.get_xlabel() == "step"
    assert lines(loss)["train"] == ([50, 62, 100], [1, 0.5, 0.2])
    assert lines(loss)["best step 100"] == ([100], [0.7])


def test_both_panels_show_the_history(tmp_path: Path, figures: list[Figure]) -> None:
    global_state = "matplotlib.pyplot" in sys.modules
    plot_history(HISTORY, tmp_path / "h.png", title=r"a $\b$ model", best_epoch=1, head_val_accuracy=0.7)
    with Image.open(tmp_path / "h.png") as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image))) > 50
    loss, accuracy = figures[0].axes
    assert figures[0].get_suptitle() == r"a $\b$ model"
    assert (loss.get_xlabel(), loss.get_ylabel(), accuracy.get_ylabel()) == ("epoch", "loss (nats)", "accuracy")
    np.testing.assert_equal(
        lines(loss),
        {"train": ([1, 2, 3], [1, 0.5, 0.2]), "val": ([1, 2, 3], [0.9, np.nan, 0.7]), "best epoch 1": ([1], [0.9])},
    )
    drawn = lines(accuracy)
    assert drawn["best epoch 1"] == ([1], [0.6])
    assert drawn["frozen head, val 0.700"][1] == [0.7, 0.7]
    assert [line.get_linestyle() for line in accuracy.get_lines()].count("--") == 1
    assert [len(axes.get_lines()) for axes in (loss, accuracy)] == [3, 4]
    assert "frozen head, val 0.700" not in lines(loss)
    assert ("matplotlib.pyplot" in sys.modules) == global_state


def test_what_is_missing_is_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    history = [{"epoch": 1, "train_loss": 1.0, "train_accuracy": None, "val_loss": None, "val_accuracy": None}]
    plot_history(history, tmp_path / "h.png", title="写真", best_epoch=1)
    loss, accuracy = figures[0].axes
    assert set(lines(loss)) == {"train", "best epoch 1"}
    assert lines(accuracy) == {}
    plot_history(HISTORY, tmp_path / "h.png", title="")  # again, over the first
    assert set(lines(figures[1].axes[1])) == {"train", "val"}
    with pytest.raises(UsageError, match="no epoch"):
        plot_history([], tmp_path / "none.png", title="")
    with pytest.raises(StorageError):
        plot_history(HISTORY, tmp_path / "nowhere" / "h.png", title="")
    assert [path.name for path in tmp_path.iterdir()] == ["h.png"]


def test_curves_of_a_model_lie_beside_it(model: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    curves = model.with_name("m.curves.png")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    assert draw_curves(model) == curves
    assert figures[0].get_suptitle() == "squeezenet1_1, recipe gradual"
    assert {"train", "val", "best epoch 3", "frozen head, val 0.700"} == set(lines(figures[0].axes[1]))
    first = curves.read_bytes()
    curves.write_bytes(first[:200])  # an earlier one, and be it damaged, is replaced
    monkeypatch.chdir(model)
    assert draw_curves(Path()) == curves.resolve()
    assert curves.read_bytes() == first
    assert {path.name: path.read_bytes() for path in model.iterdir()} == files
    assert sorted(path.name for path in model.parent.iterdir()) == ["m", "m.curves.png"]


def test_a_file_of_somebody_else_is_not_replaced(model: Path) -> None:
    curves = model.with_name("m.curves.png")
    Image.new("RGB", (3, 3)).save(curves)
    theirs = curves.read_bytes()
    with pytest.raises(StorageError, match="was not drawn by featcache|it is an empty folder"):
        draw_curves(model)
    assert curves.read_bytes() == theirs
    for make in (curves.mkdir, lambda: curves.symlink_to("nowhere"), lambda: os.mkfifo(curves)):
        curves.rmdir() if curves.is_dir() else curves.unlink()
        make()
        with pytest.raises(StorageError, match="was not drawn by featcache|it is an empty folder"):
            draw_curves(model)


def test_a_model_without_a_history(model: Path) -> None:
    for text in ("{}", "[]", "no JSON", '{"history": [1], "head_val_accuracy": 0.5}'):
        (model / "metrics.json").write_text(text)
        with pytest.raises(ModelError, match="holds no history"):
            draw_curves(model)
    with pytest.raises(ModelError, match="expected the folder of a model"):
        draw_curves(model.parent)
    assert [path.name for path in model.parent.iterdir()] == ["m"]


def test_a_head_trained_in_epochs_has_curves(cache: Path, tmp_path: Path, figures: list[Figure]) -> None:
    fit_head(cache, tmp_path / "m", clf="mlp", folds=0)
    assert draw_curves(tmp_path / "m") == tmp_path / "m.curves.png"
    epochs = load_model(tmp_path / "m").manifest["training"]["epochs"]
    assert figures[0].get_suptitle() == "squeezenet1_1, mlp head"
    for axes in figures[0].axes:
        assert set(lines(axes)) == {"train", "held out of train", f"best epoch {epochs}"}
    (_, (lowest,)), (_, held_out) = (
        lines(figures[0].axes[0])[name] for name in (f"best epoch {epochs}", "held out of train")
    )
    assert lowest == min(held_out)


def test_a_head_without_epochs_says_so(model: Path, cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "logreg", C=1.0, folds=0)
    with pytest.raises(ModelError, match="logistic regression is solved"):
        draw_curves(tmp_path / "logreg")
    fit_head(cache, tmp_path / "old", clf="linear", folds=0, epochs=1)
    (tmp_path / "old" / "metrics.json").write_text("{}")  # as versions without a history wrote it
    with pytest.raises(ModelError, match=r"an earlier version of featcache saved it; train it again$"):
        draw_curves(tmp_path / "old")
