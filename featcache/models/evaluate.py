"""``evaluate``: score a saved model.

In: a model folder, and labelled images or a cache. Out: a dictionary of scores (``heads.metrics``), also without the images
that training has seen.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.copies import are_among, find_copies
from featcache.cache.format import decode_names
from featcache.heads.confident import wrong_labels
from featcache.heads.conformal import METHOD
from featcache.heads.head import Array
from featcache.heads.metrics import (
    Answers,
    answer_curve,
    blocks_of,
    calibration_error_by_chance,
    evaluate_answers,
    expected_calibration_error,
    reliability,
    score_answers,
    score_sets,
)
from featcache.images.source import AnySource, ImageList, Source
from featcache.models.limits import UNFAMILIAR, Found, Limits, Sets
from featcache.models.model import Model, load_model
from featcache.models.scoring import Scored, check_split, score_source
from featcache.models.training_rows import seen_words
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_runtime_options

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress

log = logging.getLogger("featcache")


def evaluate(
    model: Model | AnyPath,
    source: AnySource | ImageList,
    *,
    split: str | None = None,
    rows: bool = False,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: "Progress | None" = None,
    coverage: float | None = None,
    evidence: AnyPath | None = None,
    abstain_below: float | None = None,
    then: Callable[[Model, Scored], None] | None = None,
) -> dict[str, Any]:
    """Score a model on labelled images or on a cache.

    Args:
        model: a model folder, or what ``load_model`` returned.
        source: what ``extract`` takes, or a cache of the model's own spec.
        split: train, val, test or all; when None, test if there is one, else val, else all.
        rows: whether to return a row per image, too.
        device, workers, batch_size, progress, coverage, evidence, abstain_below: as in ``predict``.
        then: called with the model and the scored rows, for what else is to be made of them.

    Returns:
        n, accuracy, accuracy_interval, top5_accuracy, balanced_accuracy, macro_f1, per_class, log_loss, ece, confusion
        (``metrics.evaluate_probabilities``), split, refused, refused_of_unknown_split (not among refused, unless all are scored);
        chosen_on: how many images are of the val by which a fine-tuned model's epoch and mixture were chosen;
        accuracy_without_copies: on images that training has not seen; None without any, or if the model does not know;
        copies: ``within`` the split, ``across_splits`` those that training has seen (None if the model does not know),
        ``across_labels``: as in ``cache.copies``;
        calibration: temperature, and ``before`` and ``after`` it log_loss, ece, ece_by_chance (of as many rows, were they
        calibrated) and ``metrics.reliability``;
        answer_curve: ``metrics.answer_curve``;
        coverage: None, or asked, n_scores (rows that thresholds come from), own_thresholds (classes that have their own),
        method, and ``metrics.score_sets``;
        answered: None, or of the images whose status is ``ok`` ``metrics.score_answers``, abstain_below, and the share of all
        images that is ``unfamiliar`` (None without evidence);
        rows, if asked for: an iterator, to be gone through once, over a dictionary per image, refused ones last: the columns
        of ``Prediction.to_row`` (path, label: the most probable class, probability, status, reason, ...), then true_label,
        true_probability, correct, and seen: whether training has seen it. What is unknown is None.

    Raises:
        UsageError: the name of no split. SourceError: no labelled image in the split, or classes the model does not know; of a
        cache that it was fit on, images of these are left out, as fit-head leaves them out. Otherwise as ``predict``.
    """
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    check_split(split)
    model = _checked(model, source)
    limits = Limits.of(model, coverage=coverage, evidence=evidence, abstain_below=abstain_below)
    options = {"device": device, "workers": workers, "batch_size": batch_size, "progress": progress}
    scored = score_source(model, source, split=split, limits=limits, **options)
    known = model.training_rows()
    seen = None if known is None else known.contain(scored.digests)
    scores = scores_of(model, scored, limits, seen=seen)
    if then is not None:
        then(model, scored)
    return scores | ({"rows": _rows(model, scored, limits, seen=seen)} if rows else {})


def scores_of(model: Model, scored: Scored, limits: Limits, *, seen: Array | None) -> dict[str, Any]:
    """What ``evaluate`` returns, without rows. seen: (N,) whether training has seen the image; None: not known."""
    scores = evaluate_answers(scored.answers, model.classes) | _worth(model, scored, limits)
    unseen = seen is None or not seen.any()  # of rows that trained the head probabilities say what it was told
    suspects = len(wrong_labels(scored.y, scored.probabilities)) if unseen else None
    facts = {"label_suspects": suspects, "split": scored.split, "refused": len(scored.refused)}
    facts |= {"refused_of_unknown_split": scored.elsewhere, "chosen_on": _chosen_on(model, scored)}
    return scores | _copies(scored, seen=seen) | facts


def _chosen_on(model: Model, scored: Scored) -> int:
    """How many images are of the val by which the epoch and the mixture of a fine-tuned model were chosen."""
    known = model.training_rows() if model.manifest.get("finetuned") else None
    if known is None or known.held_out is None:
        return 0
    return int(are_among(scored.digests, known.held_out.digests).sum())


def _checked(model: Model | AnyPath, source: AnySource | ImageList) -> Model:
    """The model, loaded; paths that are something else are refused before."""
    folder = as_path(model)
    images = "SOURCE" if isinstance(source, ImageList) else Source.of(source).path
    check_path(folder, "model", ("evaluate", HERE, images))
    if isinstance(images, Path):
        check_path(images, "images or cache", ("evaluate", folder, HERE))
    return model if isinstance(model, Model) else load_model(model)


def _worth(model: Model, scored: Scored, limits: Limits) -> dict[str, Any]:
    """What probabilities, sets and answers are worth."""
    answers, sizes = scored.answers, None
    ways = {"before": _calibration(scored.before), "after": _calibration(answers)}
    worth: dict[str, Any] = {
        "calibration": {"temperature": scored.temperature} | ways,
        "answer_curve": answer_curve(answers),
        "coverage": None,
        "answered": None,
    }
    if (sets := limits.sets) is not None:
        found = {"asked": sets.thresholds.coverage, "method": METHOD, "n_scores": sets.thresholds.n}
        found["own_thresholds"] = int(sets.thresholds.own.sum())
        holds, sizes = _look_into(sets, scored)
        worth["coverage"] = found | score_sets(scored.y, holds, sizes, model.classes)
    if sets is not None or limits.evidence is not None or limits.abstain_below is not None:
        strange = [found["unfamiliarity"] > UNFAMILIAR for found in scored.found if found]
        facts = {"abstain_below": limits.abstain_below, "unfamiliar": float(np.mean(strange)) if strange else None}
        unsure = limits.unsure(answers.confidence, sizes, scored.found)
        worth["answered"] = facts | score_answers(answers, ~unsure)
    return worth


def _look_into(sets: Sets, scored: Scored) -> tuple[Array, Array]:
    """(N,) whether the truth is in the row's set, and (N,) how many classes are."""
    holds, sizes = np.empty(len(scored), bool), np.empty(len(scored), np.int32)
    for rows in blocks_of(len(scored)):
        inside = sets.contain(scored.probabilities[rows])
        holds[rows] = np.take_along_axis(inside, scored.y[rows, None], axis=1)[:, 0]
        sizes[rows] = inside.sum(axis=1)
    return holds, sizes


def _calibration(answers: Answers) -> dict[str, Any]:
    return {
        "log_loss": answers.log_loss,
        "ece": expected_calibration_error(answers),
        "ece_by_chance": calibration_error_by_chance(answers.confidence),
        "reliability": reliability(answers),
    }


def _rows(model: Model, scored: Scored, limits: Limits, *, seen: Array | None) -> Iterator[dict[str, Any]]:
    """A row per image, made when it is asked for: of those that were scored, in order, then of the refused ones."""

    def row(path: str, values: Array | None, found: Found, reason: str, true: int | None) -> dict[str, Any]:
        path = path if scored.root is None else str(scored.root / path)
        label, probability, right = None if true is None else model.classes[true], None, None
        prediction = limits.refuse(path, reason)
        if values is not None:
            (prediction,) = limits.describe([path], values[None], [b""], found)
            probability, right = float(values[true]), prediction.label == label
        known = {"true_label": label, "true_probability": probability, "correct": right, "seen": None}
        return prediction.to_row() | known

    for rows in blocks_of(len(scored)):
        columns = scored.relative(rows), scored.probabilities[rows], scored.y[rows].tolist()
        for k, (path, values, true) in enumerate(zip(*columns, strict=True), rows.start):
            yield row(path, values, scored.found[k : k + 1], "", true) | {
                "seen": None if seen is None else bool(seen[k])
            }
    for (path, reason), label in scored.refused:
        yield row(path, None, [], reason, label)


def _copies(scored: Scored, *, seen: Array | None) -> dict[str, Any]:
    """How many images repeat each other or were ``seen`` in training, and the accuracy on those that were not."""
    y = scored.y
    copies = find_copies(scored.digests, y, np.zeros(len(y), np.int64), scored.names)
    for sentence in copies.examples:
        log.warning(sentence)
    if seen is None:
        return {"accuracy_without_copies": None, "copies": copies.counts() | {"across_splits": None}}
    if count := int(seen.sum()):
        first = decode_names(scored.names[seen][:1])[0]
        log.warning(
            "%s: a score on %s flatters", seen_words(count, len(y), first, which="the"), "it" if count == 1 else "them"
        )
    without = None if seen.all() else float(scored.answers.right[~seen].mean())
    return {"accuracy_without_copies": without, "copies": copies.counts() | {"across_splits": count}}
