"""Where fine-tuning starts: labelled images with train and val splits, and a model of their cached features.

In: a source, and a model or a request for a backbone. Out: the images, and a head-only ``Model``: the one given, or one whose
features are extracted and whose head is fit here.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featcache.backbones.choice import warn_of_licence
from featcache.cache.cache import CACHE_SUFFIXES, FeatureCache, weights_copy
from featcache.cache.copies import first_copies
from featcache.errors import SourceError
from featcache.extraction.extract import extract
from featcache.extraction.request import ExtractRequest
from featcache.finetuning.recipes import Job
from featcache.heads.validation import different_images
from featcache.images.groups import Grouping, Groups, group_by_name, joined, with_group_column
from featcache.images.layout import some
from featcache.images.source import AnySource, ImageList, list_images
from featcache.images.splits import hold_out, training_images, usable
from featcache.models.fit import fit_head
from featcache.models.model import Model, load_model
from featcache.models.training_rows import TrainingRows
from featcache.spec import SPLITS
from featcache.system.display import Steps, bar_in_notebook, describe_steps, quantity
from featcache.system.files import sync_folder, target_of
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.workdir import work_folder

log = logging.getLogger("featcache")
_CACHE = "features.h5"
_TRAIN, _VAL = SPLITS.index("train"), SPLITS.index("val")


class Labelled(NamedTuple):
    """Labelled images, each in train, val or test; whether val was held out from train here; their groups, as ``FitReport`` has them."""

    images: ImageList
    held_out: bool
    groups: dict[str, Any] | None


def read_source(
    source: AnySource | ImageList, *, seed: int, groups: Grouping | None = None, group_column: str | None = None
) -> Labelled:
    """What a source holds to train on, and to choose and judge by.

    Args:
        groups, group_column: as for ``finetune``.

    Raises:
        SourceError: no labels, or fewer than two classes to train on; the table of groups lacks training images. UsageError: no
        such column.
    """
    source = with_group_column(source, group_column if groups is None else None)
    images = list_images(source)
    images.check_any()
    named = _groups(images, groups, group_column or getattr(source, "group_column", None))
    images = dataclasses.replace(images, groups=named.names if named else ())
    name = f"the list of images in {images.root}" if isinstance(source, ImageList) else str(source)
    if not (images.labels >= 0).any():
        raise SourceError(f"{name} has no labels; fine-tuning needs class folders (SOURCE/CLASS/photo.jpg) or a CSV")
    wanted = usable(images.labels, images.splits)
    if left_out := int((~wanted).sum()):
        what = "without a label or outside the splits"
        log.info("%s left out", quantity(left_out, f"image {what} is", f"images {what} are"))
    images = images.take(np.flatnonzero(wanted))
    held_out = not (images.splits == _VAL).any()
    if held_out:
        images = hold_out(images, seed=seed)
        count, undivided = int((images.splits == _VAL).sum()), ", groups undivided," if named else ""
        text = "no val split: a stratified tenth of the training images%s becomes one: %d of %d"
        log.info(text, undivided, count, count + int((images.splits == _TRAIN).sum()))
    _check_splits(images, name)
    facts = None
    if named:
        training = images.splits == _TRAIN
        facts = Groups(images.groups, named.column).across_splits(training, images.splits, images.paths)
    return Labelled(images, held_out, facts)


def _groups(images: ImageList, given: Grouping | None, column: str | None) -> Groups | None:
    """What the user says belongs together, of the source's own column or of another table."""
    if given is None and column is None and not images.groups:
        return None
    training, _ = training_images(images.labels, images.splits)
    own = images.groups if given is None else given
    return Groups.read(own, images.paths, training=training, column=column)


def _check_splits(images: ImageList, source: str) -> None:
    in_train, in_val = (np.unique(images.labels[images.splits == split]) for split in (_TRAIN, _VAL))
    if len(in_train) < 2:
        names = ", ".join(images.classes[label] for label in in_train) or "none"
        raise SourceError(
            f"the training images of {source} are of one class ({names}); a classifier needs at least two"
        )
    if not len(in_val):
        few = "groups" if any(images.groups) else "images"
        raise SourceError(f"{source} has too few {few} to hold some out for validation; add images or a val folder")
    if missing := [images.classes[label] for label in np.setdiff1d(in_train, in_val)]:
        log.warning("no val image of %s: what is chosen on val says nothing about it", ", ".join(missing[:5]))


def prepare_start(
    job: Job,
    init: AnyPath | None,
    *,
    request: ExtractRequest | None,
    held_out: bool,
    preparing: Steps | None = None,
) -> tuple[Model, FeatureCache | None]:
    """The model to start from, and the cache it was fit on if that happened here.

    A given model is taken as it is, unless val was held out from its training images: it has seen those, so its head is
    fit again without them.

    Raises:
        ModelError, BackboneError, SourceError, ...: as ``load_model``, ``extract`` and ``fit_head``. TrainingError: the job's budget
        is used up before all images are embedded.
    """
    settings: dict[str, Any] = {"seed": job.seed}
    if init is not None:
        init = as_path(init)
        model = load_model(init)
        model.backbone.check_embeds()
        if job.processes.is_first:
            warn_of_licence(model.spec.backbone, str(model.manifest["weights"].get("source")), loaded=True)
        _check_classes(job.images, model)
        if not held_out:
            return model, None
        log.info(
            "%s was trained on images that are now held out for validation: its head is fit again without them", init
        )
        _warn_of_losses(job.images, model)
        settings |= _as_told(model)
        request = ExtractRequest(backbone=str(init))
    cache, head = work_folder(job.output) / _CACHE, work_folder(job.output) / "head"
    if job.processes.is_first:
        _extract(job, cache, request or ExtractRequest(), preparing)
        _fit(job, cache, head=head, settings=settings)
    job.processes.barrier()
    return load_model(head), FeatureCache.open(cache)


def _as_told(model: Model) -> dict[str, Any]:
    """Arguments of ``fit_head`` for another head of the kind of ``model``'s: what was asked for, nothing that its images decided."""
    told, kind = model.manifest["training"], model.head.kind
    # Earlier versions did not record what was asked for. C and epochs may have been chosen; a fine-tuning has none of these.
    names = ("dropout", "lr", "batch_size", *(("C",) if told.get("folds") == 0 and kind == "logreg" else ()))
    settings: dict[str, Any] = told.get("asked", {name: told[name] for name in names if name in told})
    if kind == "mlp":
        settings = settings | {"hidden": [len(bias) for _, bias in model.head.layers[:-1]]}
    return settings | {"clf": kind, "class_weight": told.get("class_weight", "none"), "folds": told.get("folds", 5)}


def _warn_of_losses(images: ImageList, model: Model) -> None:
    """Say what of ``model`` a head that is fit again on these images does without."""
    found = {images.classes[label] for label in np.unique(images.labels[images.splits == _TRAIN])}
    if lost := [name for name in model.classes if name not in found]:
        log.warning(
            "no image of %s is here: the head that is fit again, and the new model, will not know %s; a val split keeps the head of %s",
            some(lost),
            "them" if lost[1:] else "it",
            model.path,
        )
    column = model.manifest["training"].get("group_column")
    if column and not any(images.groups):
        log.warning(
            "%s was fit with groups (%s), which the tenth that is held out, and the head that is fit again, do not keep together: scores "
            "on val flatter; give them here, too (--groups TABLE --group-column COLUMN)",
            model.path,
            column,
        )


def seen_before(init: AnyPath | None, *, request: ExtractRequest | None, held_out: bool) -> list[TrainingRows]:
    """What earlier trainings of the backbone have seen, and those of the head if it was not fit again; as far as known."""
    start = init or (request.folder if request else None)
    if start is None:
        return []
    model = load_model(start)
    rows = model.training_rows()
    counts = model.manifest.get("finetuned") or (init is not None and not held_out)
    return [rows] if rows is not None and counts else []


def _extract(job: Job, cache: Path, request: ExtractRequest, preparing: Steps | None) -> None:
    """Features of the job's images, taken over from caches beside the output where they have them."""
    from featcache.finetuning.budget import EmbeddingWatch

    neighbours = job.output.absolute().parent.iterdir()
    beside = sorted(path for path in neighbours if path.suffix.lower() in CACHE_SUFFIXES)
    runtime = job.runtime
    options: dict[str, Any] = {"device": str(runtime.device), "workers": runtime.workers, "reuse": beside}
    with bar_in_notebook(preparing, describe_steps) as shown:
        watch = EmbeddingWatch(job)

        def progress(done: int, total: int, _: str) -> None:
            watch(done, total)
            if shown:
                shown(done, total, "embedding")

        report = extract(job.images, cache, request, progress=progress, **options)
    log.info("features: embedded %d, reused %d, refused %d", report.embedded, report.reused, report.refused)


def _fit(job: Job, cache: Path, *, head: Path, settings: dict[str, Any]) -> None:
    """The head."""
    opened = FeatureCache.open(cache)
    rows = np.flatnonzero(training_images(opened.y, opened.rows.splits)[0])
    labels, together = opened.y[rows], first_copies(opened.rows.digests[rows])
    if job.groups:
        # Of training images alone: which others are of their groups was said when they were listed.
        trains = np.flatnonzero(job.images.splits == _TRAIN).tolist()
        of = {job.images.paths[row]: job.images.groups[row] for row in trains}
        names = [of.get(path, "") for path in opened.paths]
        together = joined(together, group_by_name([names[row] for row in rows.tolist()]))
        settings = settings | {"groups": names, "group_column": job.groups["column"]}
    counts = different_images(labels, together)
    if (counts[np.unique(labels)] < 2).any():
        settings = settings | {"folds": 0}  # nothing to cross-validate with
        if settings.get("clf", "logreg") == "logreg":
            settings |= {"C": settings.get("C") or 1.0}
    fitted = fit_head(cache, head, **settings)
    scores = {"cross-validated": fitted.cv_accuracy, "val": fitted.val_accuracy}
    log.info(
        "cached head: %s, %s",
        fitted.clf,
        ", ".join(f"{name} accuracy {value:.2%}" for name, value in scores.items() if value is not None),
    )


def keep_cache(output: Path) -> None:
    """Move the features that were extracted for the start to ``OUTPUT.features.h5``, unless that name is taken."""
    source, target = work_folder(output) / _CACHE, target_of(output).with_name(f"{output.name}.{_CACHE}")
    if not source.is_file() or target.exists():
        return
    spec = FeatureCache.open(source).spec
    if weights_copy(source, spec).is_file():
        weights_copy(source, spec).replace(weights_copy(target, spec))
    source.replace(target)
    sync_folder(target.parent)  # before the rest of the work folder is removed


def _check_classes(images: ImageList, model: Model) -> None:
    found = {images.classes[label] for label in np.unique(images.labels[images.splits == _TRAIN])}
    if unknown := sorted(found - set(model.classes)):
        raise SourceError(
            f"the images are of {', '.join(unknown[:5])}, which the model {model.path} does not know (it knows "
            f"{', '.join(model.classes[:10])}); fit a head on these images first, or leave --init out"
        )
