"""``fit-head``: train a head on a cache's training rows, score it on untouched rows, save a model.

In: ``features.h5``. Out: a model folder and a ``FitReport``. Everything is chosen on training rows alone.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache, weights_copy, weights_source
from featcache.errors import SourceError, UsageError
from featcache.heads.head import KINDS, Array, FittedHead, Kind
from featcache.heads.metrics import evaluate_probabilities
from featcache.models.model import check_replaceable, library_versions, save_model

log = logging.getLogger("featcache")
_MANY_ROWS = 100_000  # from here on training takes minutes


@dataclasses.dataclass(frozen=True)
class FitReport:
    """What ``fit_head`` did; scores are accuracies in 0..1, None where there are no such rows.

    Attributes:
        model: the folder. clf: kind of head. C, scaling: as chosen (C is None for torch heads).
        classes: how many. n_train: training rows.
        cv_accuracy, cv_std: mean and standard deviation over folds, out of fold, for the chosen setting.
        val_accuracy, test_accuracy: on rows that nothing was chosen on.
        seconds: of the whole call.
    """

    model: Path
    clf: Kind
    C: float | None
    scaling: str
    classes: int
    n_train: int
    cv_accuracy: float | None
    cv_std: float | None
    val_accuracy: float | None
    test_accuracy: float | None
    seconds: float


def fit_head(
    cache: str | Path,
    output: str | Path,
    *,
    clf: Kind = "logreg",
    C: float | None = None,
    folds: int = 5,
    class_weight: Literal["none", "balanced"] = "none",
    seed: int = 0,
    self_contained: bool = False,
) -> FitReport:
    """Train a head on the rows of the split "train" (on all labelled rows if the cache has no splits).

    Args:
        cache: file written by ``extract``.
        output: model folder; an earlier head-only model there is replaced.
        clf: ``logreg`` (scikit-learn), ``linear`` or ``mlp`` (torch, mini-batches read from the cache).
        C: for logreg: inverse regularisation strength; chosen by cross-validation when None.
        folds: of the cross-validation; 0 for none.
        class_weight: ``balanced`` weighs classes inversely to their frequency.
        seed: of folds, initial weights and batches.
        self_contained: copy the backbone's weights into the model even if a library provides them.

    Raises:
        CacheError: unreadable or damaged. SourceError: labels missing, fewer than two classes, too few images, features
        that are not finite. ModelError, StorageError: the model cannot be written. UsageError: impossible values.
    """
    started = time.perf_counter()
    _check_options(clf, C, folds, class_weight, seed)
    cache, output = Path(cache), Path(output)
    check_replaceable(output)
    features = FeatureCache.open(cache)
    rows, labels = _training_rows(features)
    present, y = np.unique(labels, return_inverse=True)
    folds = _possible_folds(features, y, present, folds)
    features.check_finite(np.arange(len(features)))
    balanced = class_weight == "balanced"
    with features.reader() as stored:
        if clf == "logreg":
            from featcache.heads.logreg import C_GRID, fit_logreg

            grid = C_GRID if C is None else (C,)
            fitted = fit_logreg(stored, rows, y, grid=grid, folds=folds, balanced=balanced, seed=seed)
        else:
            from featcache.heads.minibatch import fit_torch_head

            if folds and len(rows) > _MANY_ROWS:
                log.info("the head is trained %d times, for an estimate and for good; --folds 0: once", folds + 1)
            fitted = fit_torch_head(
                stored, rows, y, kind=clf, n_classes=len(present), folds=folds, balanced=balanced, seed=seed
            )
    for note in fitted.notes:
        log.warning(note)
    classes = tuple(features.classes[index] for index in present)
    settings = {"clf": clf, "C": C, "folds": folds, "class_weight": class_weight, "seed": seed, "n_train": len(rows)}
    metrics = _metrics(features, fitted, present, classes)
    _save(output, cache, features, fitted, classes, settings | fitted.chosen, metrics, self_contained)
    return FitReport(
        model=output,
        clf=clf,
        C=fitted.chosen.get("C"),
        scaling=fitted.head.scaling,
        classes=len(classes),
        n_train=len(rows),
        cv_accuracy=metrics["cv_accuracy"],
        cv_std=metrics["cv_std"],
        val_accuracy=metrics["val_accuracy"],
        test_accuracy=metrics["test_accuracy"],
        seconds=time.perf_counter() - started,
    )


def _check_options(clf: str, C: float | None, folds: int, class_weight: str, seed: int) -> None:
    if clf not in KINDS:
        raise UsageError(f"unknown clf {clf!r}; choose one of {', '.join(KINDS)}")
    if class_weight not in ("none", "balanced"):
        raise UsageError(f"unknown class weight {class_weight!r}; choose none or balanced")
    if C is not None and clf != "logreg":
        raise UsageError(f"C belongs to logreg, not to {clf}; leave it out")
    if C is not None and not 0 < C < float("inf"):
        raise UsageError(f"C must be a positive number, found {C}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must lie between 0 and {2**32 - 1}, found {seed}")
    if folds < 0 or folds == 1:
        raise UsageError(f"folds must be 0 (none) or at least 2, found {folds}")
    if folds == 0 and clf == "logreg" and C is None:
        raise UsageError("without folds nothing can choose C; give --C as well")


def _training_rows(cache: FeatureCache) -> tuple[npt.NDArray[np.intp], Array]:
    splits, labels = cache.rows.splits, cache.y
    if not (labels >= 0).any():
        raise SourceError(
            f"{cache.path} has no labels; expected a source of class folders (SOURCE/CLASS/photo.jpg) or a CSV with a label column"
        )
    wanted = splits == (1 if splits.any() else 0)
    rows = np.flatnonzero(wanted & (labels >= 0))
    if not len(rows):
        raise SourceError(f"{cache.path} has splits, but no labelled image in train")
    if left_out := int((wanted & (labels < 0)).sum()) + int((splits == 0).sum() if splits.any() else 0):
        log.info("%d images without a label or outside the splits are left out", left_out)
    return rows, labels[rows]


def _possible_folds(cache: FeatureCache, y: Array, present: Array, folds: int) -> int:
    if len(present) < 2:
        raise SourceError(
            f"the training rows of {cache.path} hold one class only ({cache.classes[present[0]]}); a classifier needs at least two"
        )
    missing = [name for index, name in enumerate(cache.classes) if index not in present]
    if missing:
        log.warning(
            "no training image of %s: the model will not know %s",
            ", ".join(missing[:5]),
            "them" if missing[1:] else "it",
        )
    counts = np.bincount(y)
    single = [cache.classes[present[k]] for k in np.flatnonzero(counts < 2)]
    if folds and single:
        raise SourceError(
            f"class {', '.join(single[:5])} has one training image; cross-validation needs at least two of each class: "
            "add images, take the class out, or do without (--folds 0 --C 1)"
        )
    if folds > counts.min():
        log.info("folds: %d instead of %d, the smallest class has that many training images", counts.min(), folds)
        return int(counts.min())
    return folds


def _metrics(cache: FeatureCache, fitted: FittedHead, present: Array, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of metrics.json."""
    folds = np.array(fitted.fold_accuracies)
    metrics: dict[str, Any] = {
        "cv_accuracy": float(folds.mean()) if len(folds) else None,
        "cv_std": float(folds.std()) if len(folds) else None,
    }
    position = np.full(len(cache.classes) + 1, -1)
    position[present] = np.arange(len(present))
    for split in ("val", "test"):
        rows = cache.where(split)
        y = position[cache.y[rows]]
        if len(rows) and (unknown := int((y < 0).sum())):
            log.warning(
                "%d of %d %s images have no label that training knows and are not scored", unknown, len(rows), split
            )
        rows, y = rows[y >= 0], y[y >= 0]
        scores = None
        if len(rows):
            with cache.reader() as features:
                scores = evaluate_probabilities(y, fitted.head.score(features, rows), classes)
        metrics[split] = scores
        metrics[f"{split}_accuracy"] = scores["accuracy"] if scores else None
    return metrics | {"curve": fitted.curve}


def _save(
    output: Path,
    cache_path: Path,
    cache: FeatureCache,
    fitted: FittedHead,
    classes: tuple[str, ...],
    training: dict[str, Any],
    metrics: dict[str, Any],
    self_contained: bool,
) -> None:
    source, reload = weights_source(cache)
    copy: Path | None = weights_copy(cache_path, cache.spec)
    provided: dict[str, bytes] = {}
    if reload is not None:
        copy = None
        provided = _provided_weights(cache, reload) if self_contained else {}
    elif not weights_copy(cache_path, cache.spec).is_file():
        log.warning(
            "%s is missing: the model will label caches, not images; run the same extract command again to restore it",
            weights_copy(cache_path, cache.spec),
        )
        copy = None
    save_model(
        output,
        fitted,
        classes=classes,
        spec=cache.spec,
        weights={"source": source, "reload": reload},
        training=training,
        metrics=metrics,
        versions=library_versions(),
        backbone_file=copy,
        extra=provided,
    )


def _provided_weights(cache: FeatureCache, reload: str) -> dict[str, bytes]:
    from featcache.backbones.backbone import weights_bytes
    from featcache.backbones.load import load_provided

    return {"backbone.safetensors": weights_bytes(load_provided(cache.spec["backbone"]["name"], reload))}
