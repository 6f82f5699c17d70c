"""One model against another on the same images, and where a model came from. In: a ``Subject``. Out: sections of its report."""

import datetime
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.format import digest_keys
from featcache.errors import UsageError
from featcache.heads.head import Array
from featcache.heads.metrics import accuracy, accuracy_interval, log_loss, mcnemar
from featcache.models.model import Model
from featcache.models.scoring import Scored
from featcache.reports.elements.numbers import NONE, number_text, percent_text
from featcache.reports.elements.page import Section
from featcache.reports.model_report.learning import read_metrics
from featcache.reports.model_report.subject import Subject
from featcache.spec import difference

_SIGNIFICANT = 0.05


def check_comparable(model: Model, other: Model) -> None:
    """Raise UsageError unless both models know the same classes, in whatever order."""
    if set(model.classes) != set(other.classes):
        missing = sorted(set(model.classes) ^ set(other.classes))
        raise UsageError(
            f"{model.path} and {other.path} know different classes (only one of them {', '.join(missing[:5])}), so that "
            "scores on the same images say little; compare models of the same classes"
        )


def other_probabilities(model: Model, scored: Scored, other: Model, of_other: Scored) -> Array:
    """(N, C) what ``other`` says of the rows of ``scored``, its classes in the order of ``model``'s; NaN where it says nothing.

    Rows are matched by the digest of their images.
    """
    keys, others = digest_keys(scored.digests), digest_keys(of_other.digests)
    order = np.argsort(others, kind="stable")
    at = order[np.searchsorted(others[order], keys).clip(0, max(len(order) - 1, 0))]
    place = {name: number for number, name in enumerate(other.classes)}
    found: Array = of_other.probabilities[at][:, [place[name] for name in model.classes]].astype(np.float64)
    found[others[at] != keys] = np.nan
    return found


def comparison_section(subject: Subject, other: Model, probabilities: Array, data: dict[str, Any]) -> Section:
    """Scores of both on the images that both have scored, images that one alone gets right, and how the models differ.

    Args:
        probabilities: of ``other_probabilities``. Selections of the won images go into ``data["selections"]``.
    """
    both = ~np.isnan(probabilities[:, 0])
    y, own, others = subject.scored.y[both], subject.scored.probabilities[both], probabilities[both]
    test = mcnemar(y, own, others) if both.any() else None
    context = {
        "names": (subject.model.path.name, other.path.name),
        "n": len(y),
        "of": len(subject.scored),
        "rows": [_scores(subject.model, y, own), _scores(other, y, others)] if both.any() else [],
        "test": test,
        "verdict": "" if test is None else _verdict(test),
        "differences": _differences(subject.model, other),
    }
    right = subject.predicted == subject.scored.y
    other_right = np.zeros(len(both), bool)
    other_right[both] = others.argmax(axis=1) == y
    won = {
        "won": both & right & ~other_right,
        "lost": both & ~right & other_right,
        "neither": both & ~right & ~other_right,
    }
    cards = subject.card_of
    for name, rows in won.items():
        data["selections"][name] = [cards[row] for row in np.flatnonzero(rows).tolist() if row in cards]
    context["shown"] = {name: len(data["selections"][name]) for name in won}
    return Section("against", f"Against {other.path.name}", "report_against.html", context, "Comparison")


def _scores(model: Model, y: Array, probabilities: Array) -> tuple[str, ...]:
    share = accuracy(y, probabilities)
    low, high = accuracy_interval(round(share * len(y)), len(y))
    interval = f"{percent_text(low)} to {percent_text(high)}"
    return model.path.name, percent_text(share), interval, number_text(log_loss(y, probabilities))


def _verdict(test: Mapping[str, Any]) -> str:
    first, second, p = test["only_first_right"], test["only_second_right"], test["p_value"]
    if first == second == 0:
        return "Both are right on the same images."
    if p >= _SIGNIFICANT:
        return (
            f"The difference is within noise: were both equally good, one as large would come up with probability "
            f"{number_text(p, 2)} (McNemar's exact test)."
        )
    better = "This model is better" if first > second else "The other model is better"
    return f"{better}: chance alone explains it with probability {number_text(p, 2)} (McNemar's exact test)."


def _differences(model: Model, other: Model) -> list[tuple[str, str, str]]:
    """Fields of spec and training in which they differ: name, this model's value, the other's."""

    def fields(values: Mapping[str, Any]) -> dict[str, str]:
        return {name: _exact(value) for name, value in _leaves(values)}

    lines = [f"spec: {line}" for line in difference(fields(model.spec.to_json()), fields(other.spec.to_json()))]
    ours, theirs = (fields(_flat(each.manifest.get("training"))) for each in (model, other))
    lines += [f"training: {line}" for line in difference(ours, theirs)]
    found = []
    for line in lines:
        kind, name, values = line.split(": ", 2)
        before, after = (
            NONE if value == "None" else value for value in values.split(" -> ", 1)
        )  # one has no such field
        if before != after:
            found.append((f"{kind}: {name}", before, after))
    return found


def _exact(value: Any) -> str:
    """A value as people write it, to its last digit: 1000.0 as ``1000``."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_exact, value))
    return NONE if value is None else f"{value:.15g}" if isinstance(value, float) else str(value)


def _flat(values: Any) -> dict[str, Any]:
    return values if isinstance(values, dict) else {}


def provenance_section(subject: Subject, *, command: str = "") -> Section:
    """Spec, hash of the weights, versions, commands, times: from the model and the cache. ``command``: of this page."""
    model, cache = subject.model, subject.cache
    manifest = model.manifest
    versions = manifest.get("versions", {})
    about_model = [
        ("model", str(model.path)),
        ("head", _in_words(manifest["head"])),
        ("training", _in_words(_flat(manifest.get("training")))),
        ("backbone", model.spec.backbone),
        ("weights", manifest["weights"]["source"]),
        *([("weights' sha256", sha256)] if (sha256 := model.spec.weights_sha256) else []),
        ("fingerprint of the spec", model.fingerprint),
        ("versions", _in_words(versions)),
    ]
    about_cache = [] if cache is None else _about_cache(cache)
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    context = {
        "model": about_model,
        "cache": about_cache,
        "commands": [line for line in (_extract_command(cache), _fit_command(subject), command) if line],
        "spec": [(name, _exact(value)) for name, value in _leaves(model.spec.to_json())],
        "written": written,
    }
    return Section("provenance", "Where it came from", "report_provenance.html", context, "Provenance", ("report.css",))


def _about_cache(cache: FeatureCache) -> list[tuple[str, str]]:
    rest = cache.provenance.rest
    facts = [("cache", str(cache.path)), ("images", f"{len(cache):,}, {len(cache.refused):,} refused")]
    facts += [("extracted", str(rest[name])) for name in ("time",) if name in rest]
    facts += [(name, str(rest[name])) for name in ("platform", "runtime") if name in rest]
    if cache.provenance.precision:
        facts.append(("precision", cache.provenance.precision))
    return facts


def _extract_command(cache: FeatureCache | None) -> str:
    """What was asked for when the cache was made, as a command; empty where that is not recorded."""
    if cache is None or not isinstance(request := cache.provenance.request, Mapping):
        return ""
    words = ["featcache", "extract", "SOURCE", "-o", cache.path.name]
    for name, value in request.items():
        if value is None or value == "auto" or name == "versions":
            continue
        text = "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", "FILE" if name == "weights" and text.startswith("sha256:") else text]
    return shlex.join(words)


def _fit_command(subject: Subject) -> str:
    """What trained the model, as a command; of a fine-tuned one what is recorded of it."""
    manifest, model = subject.model.manifest, subject.model.path.name
    training = _flat(manifest.get("training"))
    if manifest.get("finetuned"):
        recipe = training.get("recipe")
        return shlex.join(
            ["featcache", "finetune", "SOURCE", "-o", model, *(["--recipe", str(recipe)] if recipe else [])]
        )
    cache = "features.h5" if subject.cache is None else subject.cache.path.name
    words = ["featcache", "fit-head", cache, "-o", model]
    usual = {"clf": "logreg", "folds": 5, "class_weight": "none", "seed": 0}
    own = ("C",) if training.get("clf") == "logreg" else ("hidden", "dropout", "epochs", "lr", "batch_size")
    # What was chosen was not typed; typed, it would make another command, whose estimate is not corrected for the choice.
    searched = len({row.get("C") for row in read_metrics(subject.model).get("curve") or ()}) > 1
    asked = training.get("asked", [name for name in own if name != "C" or not searched])
    names = [*usual, *(name for name in own if name in asked)]
    for name in names:
        value = training.get(name)
        if value is None or value == usual.get(name) or value in ([], ()):
            continue
        text = (
            ",".join(map(str, value))
            if isinstance(value, list | tuple)
            else f"{value:g}"
            if type(value) is float
            else str(value)
        )
        words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words) + (
        f"  # C was chosen: {training['C']:g}" if "C" in own and "C" not in names and training.get("C") else ""
    )


def _in_words(values: Mapping[str, Any]) -> str:
    def word(value: Any) -> str:
        if isinstance(value, list | tuple):
            return " ".join(map(word, value)) or "none"
        return number_text(value, 4) if isinstance(value, float) else "none" if value is None else str(value)

    return ", ".join(f"{name} {word(value)}" for name, value in _leaves(values) if name != "sha256")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found
