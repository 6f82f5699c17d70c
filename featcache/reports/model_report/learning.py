"""How a model was trained and chosen, in pictures. In: a report's ``Subject``. Out: sections, and their charts.

The choice of C and scaling; accuracy against the number of training images; loss and accuracy epoch by epoch; the frozen head
against the fine-tuned model. A section is None where the model has nothing of the kind.
"""

import functools
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from featcache.backbones.saved import own_file
from featcache.cache.cache import FeatureCache
from featcache.cache.copies import first_copies
from featcache.cache.format import digest_keys
from featcache.errors import FeatcacheError, ModelError, SourceError
from featcache.heads.head import Array, Indices
from featcache.heads.learning_curve import Doubling, LearningCurve, forecast, learning_curve
from featcache.heads.validation import EQUAL_LOSSES, good_enough
from featcache.images.splits import training_images
from featcache.models.model import METRICS, Model
from featcache.models.training_rows import TrainingRows
from featcache.reports.curves import axis_of, values_of
from featcache.reports.elements import charts
from featcache.reports.elements.charts import Chart, Series
from featcache.reports.elements.numbers import count_text, number_text, percent_text
from featcache.reports.elements.page import Section
from featcache.reports.model_report.subject import Subject
from featcache.system.display import printable, quantity
from featcache.system.safe_load import parse_json

log = logging.getLogger("featcache")
Curve = Sequence[Mapping[str, Any]]
_LITTLE = 0.001  # of accuracy, that is not worth a figure
_ON_TRAIN = (
    "On train of augmented images and as the loss is trained, on val of images as they are: compare each with itself."
)


def read_metrics(model: Model) -> dict[str, Any]:
    """metrics.json of a model; empty if it cannot be read."""
    try:
        found = parse_json(own_file(model.path, METRICS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_metrics(section: Callable[[Subject], Section | None]) -> Callable[[Subject], Section | None]:
    """``section``, which is made from metrics.json. Raises ModelError: that is not what was saved."""

    @functools.wraps(section)
    def made(subject: Subject) -> Section | None:
        try:
            return section(subject)
        except (TypeError, LookupError, AttributeError, ValueError) as error:
            raise ModelError(
                f"{subject.model.path} is damaged: its {METRICS} is not what was saved ({type(error).__name__}: {error}); train it again"
            ) from error

    return made


# ------------------------------------------------------------------------------------------------------ C and scaling


@_of_metrics
def choice_section(subject: Subject) -> Section | None:
    """Every C and scaling that cross-validation tried, and why one of them was chosen."""
    model = subject.model
    curve, training = read_metrics(model).get("curve") or [], model.manifest["training"]
    if not curve or "C" not in training:
        return None
    chosen = (training["scaling"], training["C"])
    n = _different_images(model)
    context = {"charts": choice_charts(curve, chosen, n), "words": why_chosen(curve, chosen, n)}
    return Section("choice", "Choice of C and scaling", "section_charts.html", context, "C and scaling")


def _different_images(model: Model) -> int:
    """That train; all training rows where the model does not know."""
    rows = model.training_rows()
    return (
        len(np.unique(first_copies(rows.digests))) if rows is not None else int(model.manifest["training"]["n_train"])
    )


def choice_charts(curve: Curve, chosen: tuple[str, float], n: int) -> list[Chart]:
    """Accuracy and log loss of each setting, by cross-validation; of ``n`` different images. ``chosen``: scaling and C."""
    best = max(entry["accuracy"] for entry in curve)
    if len({entry["C"] for entry in curve}) == 1:
        rows = {f"scaling {entry['scaling']}": entry for entry in curve}
        marked = [f"scaling {chosen[0]}"]
        return [
            charts.bars(
                [(name, entry["accuracy"]) for name, entry in rows.items()],
                title=f"Accuracy by scaling, C {chosen[1]:g}",
                caption="Cross-validated. The chosen one stands out.",
                percent=True,
                marked=marked,
                columns=("scaling", "accuracy"),
            )
        ]
    least, floor = good_enough(best, n), _floor(best, n)
    options: dict[str, Any] = {"x_label": "C, weaker regularisation to the right", "log_x": True}
    options["mark"] = (chosen[1], f"chosen: C {chosen[1]:g}, {chosen[0]}")
    return [
        charts.lines(
            _by_scaling(curve, "accuracy"),
            title="Accuracy over C",
            caption="Cross-validated, of each scaling. Above the dashed line, one standard error below the best, accuracy does not "
            "tell settings apart.",
            y_label="accuracy",
            percent_y=True,
            floor=floor if any(entry["accuracy"] < floor for entry in curve) else None,
            level=(least, ""),
            **options,
        ),
        charts.lines(
            _by_scaling(curve, "log_loss"),
            title="Log loss over C",
            caption="Cross-validated, of each scaling, before any temperature. It decides between settings that are as accurate.",
            y_label="log loss (nats)",
            y_range=(0, max(entry["log_loss"] for entry in curve)),
            **options,
        ),
    ]


def _floor(best: float, n: int) -> float:
    """Where the picture of accuracies begins: what lies below does not matter, and would flatten what does."""
    return max(0.0, best - max(0.08, 6 * (best - float(good_enough(best, n)))))


def _by_scaling(curve: Curve, what: str) -> list[Series]:
    names = dict.fromkeys(entry["scaling"] for entry in curve)
    rows = {name: [entry for entry in curve if entry["scaling"] == name] for name in names}
    return [Series(name, [e["C"] for e in some], [e[what] for e in some]) for name, some in rows.items()]


def why_chosen(curve: Curve, chosen: tuple[str, float], n: int) -> str:
    """The rule of ``OutOfFold.best``, with the figures that it went by."""
    best = max(entry["accuracy"] for entry in curve)
    least = good_enough(best, n)
    good = [entry for entry in curve if entry["accuracy"] >= least - 1e-9]
    lowest = min(good, key=lambda entry: entry["log_loss"])
    own = next((entry for entry in curve if (entry["scaling"], entry["C"]) == chosen), None)
    if own is None:
        return ""
    words = (
        f"{len(good)} of {len(curve)} settings lie within one standard error ({_points(best - least)} points on "
        f"{count_text(n)} different images) of the best cross-validated accuracy, {percent_text(best)}. Of these "
    )
    taken = f"C {chosen[1]:g} with scaling {chosen[0]}"
    if own is lowest:
        return f"{words}{taken} has the lowest log loss, {number_text(own['log_loss'])}."
    same = [e for e in good if e["scaling"] == lowest["scaling"] and e["log_loss"] <= lowest["log_loss"] + EQUAL_LOSSES]
    if own in same and own is min(same, key=lambda entry: entry["C"]):
        return (
            f"{words}C {lowest['C']:g} with scaling {lowest['scaling']} has the lowest log loss, {number_text(lowest['log_loss'])}; "
            f"{taken} equals it to {EQUAL_LOSSES:g} nats with more regularisation, and is taken."
        )
    return f"{words}C {lowest['C']:g} with scaling {lowest['scaling']} has the lowest log loss; the model uses {taken}."


# ---------------------------------------------------------------------------------------------------- learning curve


def learning_section(subject: Subject) -> Section:
    """Accuracy against the number of training images, from fits on parts of them, which take seconds; or why there is no curve."""
    model, cache, title = subject.model, subject.cache, "Would more images help?"
    why: str | Markup | None = _why_no_curve(subject)
    if why is None and cache is not None:
        try:
            curve, judges = _fit_curve(model, cache)
        except FeatcacheError as error:
            why = f"{error}."
    if why is not None:
        context: dict[str, Any] = {"charts": [], "words": Markup("There is no learning curve: {}").format(why)}
        return Section("learning", title, "section_charts.html", context, "Learning curve")
    doubling = forecast(curve)
    context = {
        "charts": [learning_chart(curve, doubling)],
        "words": _worth(curve, doubling),
        "notes": _how(curve, judges, model),
        "foretold": doubling.gain is not None,
    }
    return Section("learning", title, "section_charts.html", context, "Learning curve")


def _why_no_curve(subject: Subject) -> str | Markup | None:
    """What keeps a page from one, and what helps; None: nothing."""
    model, cache = subject.model, subject.cache
    if model.manifest.get("finetuned"):
        return "the features of a fine-tuned model have seen all of its training images, and would flatter it."
    if model.head.kind != "logreg":
        words = f"only logreg heads are fit fast enough for one, and this is of kind {model.head.kind}"
        return f"{words}: the page of a logreg head on the same cache has one."
    if cache is not None and not subject.quick:
        return None
    words = "it takes some seconds more." if cache is not None else "it takes the cache that the model was fit on."
    command = ["featcache", "report", str(model.path), "CACHE" if cache is None else str(cache.path)]
    return Markup("{} <code>{}</code> draws it, and a map.").format(words, printable(shlex.join(command)))


def _fit_curve(model: Model, cache: FeatureCache) -> tuple[LearningCurve, str]:
    """The curve, and who judges."""
    known, training = model.training_rows(), model.manifest["training"]
    position = {name: number for number, name in enumerate(model.classes)}
    own = np.array([position.get(name, -1) for name in cache.classes])
    y = np.where(cache.y >= 0, own[cache.y], -1)
    seen = np.zeros(len(y), bool) if known is None else known.contain(cache.rows.digests)
    trains, _ = training_images(y, cache.rows.splits)
    rows = np.flatnonzero(trains if known is None else trains & seen)
    split, judges = _judges(cache, (y >= 0) & ~seen)
    if (missing := np.setdiff1d(np.arange(len(model.classes)), y[rows])).size:
        raise SourceError(f"{cache.path} holds no training image of {model.classes[missing[0]]}")
    if not len(judges) and (column := training.get("group_column")):
        raise SourceError(f"its folds would divide the groups of {column!r} that the model was fit with")
    cache.check_finite(np.concatenate([rows, judges]))
    with cache.reader() as features:
        whole = None
        if known is not None and len(judges) and _are_those(known, cache.rows.keys[rows], y[rows]):
            whole = model.head.score(features, judges).argmax(axis=1) == y[judges]
        found = learning_curve(
            features,
            rows,
            y[rows],
            C=training["C"],
            scaling=training["scaling"],
            copies=first_copies(cache.rows.digests[rows]),
            balanced=training.get("class_weight") == "balanced",
            judges=judges if len(judges) else None,
            judges_y=y[judges] if len(judges) else None,
            whole=whole,
        )
    return found, split


def _are_those(known: TrainingRows, keys: Array, y: Array) -> bool:
    """Whether rows, by their digests as keys and their labels, are all those that the model was trained on, in any order."""
    own = digest_keys(known.digests)
    order, own_order = np.lexsort((y, keys)), np.lexsort((known.labels, own))
    return np.array_equal(keys[order], own[own_order]) and np.array_equal(y[order], known.labels[own_order])


def _judges(cache: FeatureCache, free: Array) -> tuple[str, Indices]:
    """The split that judges, and its ``free`` rows, (N,) bool: those that training has not seen; empty where there are none."""
    for name, split in (("test", 3), ("val", 2)):
        rows = np.flatnonzero(free & (cache.rows.splits == split))
        if len(rows):
            return name, rows
    return "", np.empty(0, np.intp)


def learning_chart(curve: LearningCurve, doubling: Doubling) -> Chart:
    """Mean accuracy and its interval at each size; the law and its forecast, if there is one."""
    low, high = curve.interval
    sizes = curve.sizes.tolist()
    series = [Series("measured", sizes, curve.accuracy.tolist(), low.tolist(), high.tolist())]
    caption = (
        "Mean of the draws; the band is a 95% interval for other training images and other judges of the same kind."
    )
    if doubling.gain is not None:
        steps = np.geomspace(sizes[0], doubling.size, 24)
        law = 1 - doubling.floor - doubling.factor * steps**-doubling.exponent
        series.append(Series("power law", steps.tolist(), law.tolist(), points=False))
        caption += " The dashed line beyond the last point is an extrapolation."
    return charts.lines(
        series,
        title="Learning curve",
        caption=caption,
        x_label="different training images",
        y_label="accuracy",
        log_x=True,
        percent_y=True,
        x_text=count_text,
    )


def _worth(curve: LearningCurve, doubling: Doubling) -> str:
    """One sentence about twice the images."""
    last = f"{percent_text(float(curve.accuracy[-1]))} with {count_text(curve.sizes[-1])} training images"
    if doubling.gain is None or doubling.low is None or doubling.high is None:
        return f"Accuracy is {last}. What twice as many would be worth is not foretold: {doubling.refused}."
    if doubling.high < _LITTLE:
        return f"Accuracy is {last}; twice as many would be worth less than {100 * _LITTLE:g} points, if the power law holds."
    return (
        f"Accuracy is {last}; twice as many, {count_text(doubling.size)}, would be worth about {_points(doubling.gain)} points "
        f"more ({_points(doubling.low)} to {_points(doubling.high)}), if the power law that explains "
        f"{percent_text(doubling.explained)} of the points' variance holds beyond them: an extrapolation."
    )


def _points(share: float) -> str:
    return f"{100 * share:.1f}" if abs(share) >= _LITTLE else f"{100 * share:.2f}"


def _how(curve: LearningCurve, judges: str, model: Model) -> str:
    """How the curve was made."""
    steps, draws = curve.right.shape[:2]
    who = (
        f"the {quantity(curve.right.shape[2], f'{judges} image that is no copy', f'{judges} images that are no copies')} of training images"
        if judges
        else f"a {_ORDINALS.get(draws, f'{draws}th')} of the training images that each draw holds out"
    )
    training = model.manifest["training"]
    some = f" The draws are from {count_text(curve.pool)} of {count_text(curve.total)} images, picked at random, to save time."
    return (
        f"{steps} sizes, {draws} random draws each, classes in proportion, copies of an image together; judged by {who}. C stays "
        f"{training['C']:g}, scaling {training['scaling']}, as chosen on all training images: chosen anew for few images it "
        f"might do a little better there.{some if curve.sampled else ''} Method: Viering and Loog (2022), "
        "The shape of learning curves; intervals: Owen (2007), The pigeonhole bootstrap; law: error = a + b / n^c, Cortes and "
        "others (1993)."
    )


_ORDINALS = {5: "fifth", 10: "tenth"}


# ------------------------------------------------------------------------------------------------- epoch after epoch


@_of_metrics
def training_section(subject: Subject) -> Section | None:
    """Loss and accuracy epoch by epoch, of fine-tuning or of a linear or mlp head."""
    history = read_history(subject.model)
    if not history:
        return None
    words = _best_in_words(history, _best(subject.model, axis_of(history)))
    context = {"charts": training_charts(subject.model), "words": words}
    return Section("training", "Training, epoch by epoch", "section_charts.html", context, "Training")


def _best(model: Model, axis: str) -> float | None:
    """Of fine-tuning the step, or epoch, that was kept; of a head as many epochs as it was trained for."""
    found = model.manifest["training"].get(f"best_{axis}" if model.manifest.get("finetuned") else "epochs")
    return float(found) if isinstance(found, int | float) else None


def read_history(model: Model) -> list[dict[str, Any]]:
    """A row per score, or epoch, as ``curves.plot_history`` takes it; empty where there is none that can be drawn."""
    history = read_metrics(model).get("history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    numbers = all(value is None or isinstance(value, int | float) for row in rows for value in row.values())
    return [row for row in rows if row.get("epoch")] if numbers else []


def training_charts(model: Model) -> list[Chart]:
    """Loss and accuracy, with the best epoch and the frozen head; the numbers that ``curves.plot_history`` draws."""
    history = read_history(model)
    axis = axis_of(history)
    best = _best(model, axis)
    head_val_accuracy = read_metrics(model).get("head_val_accuracy")
    places = [float(row[axis]) for row in history]
    mark = None if best is None or best not in places else (best, f"best {axis} {best:g}")
    found = []
    for what, label in (("loss", "loss (nats)"), ("accuracy", "accuracy")):
        series = [Series(split, places, values) for split, values in values_of(history, what).items()]
        if not series:
            continue
        level = None
        if what == "accuracy" and head_val_accuracy is not None:
            level = (head_val_accuracy, f"frozen head, val {percent_text(head_val_accuracy)}")
        found.append(
            charts.lines(
                series,
                title=what.capitalize(),
                caption=_ON_TRAIN if model.manifest.get("finetuned") else "",
                x_label=axis,
                y_label=label,
                percent_y=what == "accuracy",
                mark=mark,
                level=level,
                points=len(places) <= 40,
            )
        )
    return found


def _best_in_words(history: Sequence[Mapping[str, Any]], best: float | None) -> str:
    """What the best epoch or step reached, and whether training may have ended too early."""
    axis, last = axis_of(history), history[-1]
    row = next((row for row in history if row[axis] == best), {})
    for split, judged in (("val", "on val"), ("held_out", "on a tenth held out, after which all trained for as long")):
        if row.get(f"{split}_accuracy") is not None:
            accuracy, loss = percent_text(row[f"{split}_accuracy"]), number_text(row.get(f"{split}_loss"))
            step = f", at step {best:g} of {last[axis]:g}," if axis == "step" else ""
            words = f"Epoch {row['epoch']:g} of {last['epoch']:g}{step} was the best {judged}: accuracy {accuracy}, loss {loss}."
            ended = best == last[axis] and last["epoch"] > 1
            return f"{words} It was the last one: more epochs may do better." if ended else words
    return f"Trained for {quantity(last['epoch'], 'epoch')}, without images held out to choose by."


# ---------------------------------------------------------------------------------------------- frozen or fine-tuned


@_of_metrics
def finetuned_section(subject: Subject) -> Section | None:
    """The frozen head against the fine-tuned model: accuracies, McNemar's test, and the images that each won."""
    metrics, known = read_metrics(subject.model), subject.model.training_rows()
    comparison = metrics.get("comparison")
    if not isinstance(comparison, dict) or not comparison:
        return None
    table = [
        [
            f"{split}, {quantity(facts['n'], 'image')}",
            percent_text(facts["head_accuracy"]),
            percent_text(facts["tuned_accuracy"]),
            count_text(facts["only_second_right"]),
            count_text(facts["only_first_right"]),
            number_text(facts["p_value"], 2),
        ]
        for split, facts in comparison.items()
    ]
    report = metrics.get("report") or {}
    context = {"rows": table, "verdict": report.get("verdict", ""), "won": None, "lost": None, "known": False}
    if known is not None and known.compared is not None:
        context |= _won_and_lost(subject, known) | {"known": True}
    return Section("finetuned", "Frozen or fine-tuned", "section_finetuned.html", context)


def _won_and_lost(subject: Subject, known: TrainingRows) -> dict[str, list[int]]:
    """Cards of images that only the fine-tuned model has right, and only the frozen head."""
    compared = known.compared
    assert compared is not None
    head, tuned = compared.head == compared.labels, compared.tuned == compared.labels
    cards = subject.card_of
    by_digest = {digest.tobytes(): row for row, digest in enumerate(subject.scored.digests)}
    found = {}
    for name, rows in (("won", tuned & ~head), ("lost", head & ~tuned)):
        numbers = (by_digest.get(digest.tobytes()) for digest in compared.digests[rows])
        found[name] = sorted(cards[row] for row in numbers if row is not None and row in cards)
    return found
