"""Where fine-tuning starts: labelled images with train and val splits, and a model of their cached features.

In: a source, and a model or a request for a backbone. Out: the images, and a head-only ``Model``: the one given, or one whose
features are extracted and whose head is fit here.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbones.choice import warn_of_licence
from featcache.cache.cache import CACHE_SUFFIXES, FeatureCache, weights_copy
from featcache.errors import SourceError
from featcache.extraction.extract import extract
from featcache.extraction.request import ExtractRequest
from featcache.finetuning.recipes import Job
from featcache.images.layout import some
from featcache.images.source import AnySource, ImageList, list_images
from featcache.images.splits import hold_out, usable
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


def read_source(source: AnySource | ImageList, *, seed: int) -> tuple[ImageList, bool]:
    """The labelled images of a source, each in train, val or test.

    Returns:
        The images, and whether val was held out from train here.

    Raises:
        SourceError: no labels, or fewer than two classes to train on.
    """
    images = list_images(source)
    images.check_any()
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
        count = int((images.splits == _VAL).sum())
        log.info("no val split: a stratified tenth of the training images, %d, becomes one", count)
    _check_splits(images, name)
    return images, held_out


def _check_splits(images: ImageList, source: str) -> None:
    in_train, in_val = (np.unique(images.labels[images.splits == split]) for split in (_TRAIN, _VAL))
    if len(in_train) < 2:
        names = ", ".join(images.classes[label] for label in in_train) or "none"
        raise SourceError(
            f"the training images of {source} are of one class ({names}); a classifier needs at least two"
        )
    if not len(in_val):
        raise SourceError(f"{source} has too few images to hold some out for validation; add images or a val folder")
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
    if column := model.manifest["training"].get("group_column"):
        log.warning(
            "%s was fit with groups (%s), which the tenth that is held out, and the head that is fit again, do not keep together: scores "
            "on val flatter; `featcache split --group-column` makes a val split that does",
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
    counts = np.bincount(job.images.labels[job.images.splits == _TRAIN])
    if counts[counts > 0].min() < 2:
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
