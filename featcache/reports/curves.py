"""Curves of a training. In: a model that was trained in epochs, or its history. Out: a PNG, beside the model's folder.

matplotlib is optional (the ``report`` extra) and is used through its objects only: no pyplot, no window, no global state.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.backbones.saved import own_file
from featcache.errors import MissingDependencyError, ModelError, UsageError
from featcache.models.model import load_model
from featcache.reports.elements.drawing import MARK, check_picture_path
from featcache.system.files import publish_file
from featcache.system.safe_load import parse_json

_TRAIN, _VAL, _HEAD = "#4477aa", "#ee6677", "#555555"  # Tol's bright scheme: told apart by colour-blind readers, too
_DPI = 120
_CURVES = (("train", "train", _TRAIN), ("val", "val", _VAL), ("held_out", "held out of train", _VAL))  # columns, names


def draw_curves(model: Path) -> Path:
    """Draw the history of a fine-tuned model, or of a linear or mlp head.

    Returns:
        The picture, ``MODEL.curves.png`` beside the folder ``MODEL``. An earlier one is replaced.

    Raises:
        ModelError: not a model, or one without a history. StorageError: the picture cannot be written, or its name belongs
        to a file that was not drawn here. MissingDependencyError: matplotlib is not installed.
    """
    folder = model.resolve() if model.name in ("", "..") else model  # those are no names
    path = folder.with_name(f"{folder.name}.curves.png")
    check_picture_path(path)
    manifest = load_model(model).manifest
    try:
        metrics, training = parse_json(own_file(model, "metrics.json").read_text()), manifest["training"]
        if not metrics.get("history"):
            raise ModelError(f"{model} holds no history: {_why_none(manifest)}")
        tuned = bool(manifest.get("finetuned"))
        trained = f"recipe {training['recipe']}" if tuned else f"{manifest['head']['kind']} head"
        plot_history(
            metrics["history"],
            path,
            title=f"{manifest['spec']['backbone']['name']}, {trained}",
            best_epoch=training["best_epoch" if tuned else "epochs"],
            best_step=training.get("best_step"),
            head_val_accuracy=metrics["head_val_accuracy"] if tuned else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{model} holds no history of a training ({type(error).__name__}: {error})") from error
    return path


def _why_none(manifest: dict[str, Any]) -> str:
    if manifest.get("finetuned") and manifest["training"].get("budget"):
        return "its budget left no time to train"
    if manifest["head"]["kind"] == "logreg" and not manifest.get("finetuned"):
        return "logistic regression is solved, not trained in epochs"
    return "an earlier version of featcache saved it; train it again"


def plot_history(
    history: Sequence[dict[str, Any]],
    path: Path,
    *,
    title: str,
    best_epoch: int | None = None,
    best_step: int | None = None,
    head_val_accuracy: float | None = None,
) -> None:
    """Draw loss and accuracy, side by side, against the step where the history has steps, else against the epoch.

    Args:
        history: a row per score: ``epoch``, perhaps ``step``, ``train_loss``, ``val_loss`` (nats), ``train_accuracy``, ``val_accuracy``
            (0..1); of heads ``held_out_`` instead of ``val_``, see ``heads.head.FittedHead``. A value may be None or absent:
            a gap in its curve; a curve without values is left out.
        path: the PNG; replaced if it exists.
        title: above both panels, taken literally.
        best_epoch, best_step: the epoch, or step, of ``history`` to mark in both panels.
        head_val_accuracy: 0..1; a dashed line at what the frozen backbone's head reached.

    Raises:
        MissingDependencyError: matplotlib is not installed. UsageError: there is no epoch to draw.
        StorageError: ``path`` cannot be written; it is then unchanged.
    """
    if not history:
        raise UsageError("the history holds no epoch, nothing can be drawn; train for at least one epoch")
    figure = _new_figure()
    figure.suptitle(title, parse_math=False)  # a $ in a folder's name is no formula
    loss, accuracy = figure.subplots(1, 2)
    for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
        _draw_panel(axes, history, what, best={"epoch": best_epoch, "step": best_step})
    loss.set_ylabel("loss (nats)")
    accuracy.set_ylabel("accuracy")
    if head_val_accuracy is not None:
        label = f"frozen head, val {head_val_accuracy:.3f}"
        accuracy.axhline(head_val_accuracy, color=_HEAD, linestyle="--", linewidth=1.2, label=label)
    for axes in (loss, accuracy):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    png = io.BytesIO()  # drawing takes a while; the file is there only once it is complete
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a title in a script the font lacks is drawn as boxes
        figure.savefig(png, format="png", dpi=_DPI, metadata=MARK)
    with publish_file(path) as file:
        file.write(png.getbuffer())


def _new_figure() -> Any:
    """An empty figure that draws into memory; the one door to matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib: pip install 'featcache[report]'") from error
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axis_of(history: Sequence[Mapping[str, Any]]) -> str:
    """What the rows of a history lie along: ``step`` if all of them have one, else ``epoch``."""
    return "step" if all(row.get("step") for row in history) else "epoch"


def _draw_panel(axes: Any, history: Sequence[dict[str, Any]], what: str, best: Mapping[str, float | None]) -> None:
    """Draw the curves of ``what``. A star marks the best row on the last one, which chose it, else on the training curve."""
    axis = axis_of(history)
    places, marked = [row[axis] for row in history], best[axis]
    star, colours = math.nan, {name: colour for _, name, colour in _CURVES}
    for name, values in values_of(history, what).items():
        colour = colours[name]
        axes.plot(places, values, color=colour, marker="o", markersize=3, label=name)  # dots: one row is no line
        value = values[places.index(marked)] if marked in places else math.nan
        star = value if math.isfinite(value) else star
    if math.isfinite(star):
        label = f"best {axis} {marked}"
        axes.plot([marked], [star], "*", color="black", markersize=12, linestyle="none", label=label)
    axes.set_xlabel(axis)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def values_of(history: Sequence[Mapping[str, Any]], what: str) -> dict[str, list[float]]:
    """``what``, loss or accuracy, of each row, by a name of a curve: NaN where it is missing, nothing where all of it is."""
    columns = {name: [_number(row.get(f"{split}_{what}")) for row in history] for split, name, _ in _CURVES}
    return {name: values for name, values in columns.items() if any(map(math.isfinite, values))}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
