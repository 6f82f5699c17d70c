"""``fit-head``: train a head on a cache's training rows, score it on untouched rows, save a model.

In: a cache file. Out: a model folder and a ``FitReport``. Everything is chosen on training rows alone.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcache.backbones.saved import MANIFEST, WEIGHTS
from featcache.cache.cache import FeatureCache, weights_copy
from featcache.cache.copies import find_copies, first_copies
from featcache.errors import SourceError, UsageError
from featcache.heads.confident import wrong_labels
from featcache.heads.head import KINDS, Array, FittedHead, Head, Indices, Kind, Scores, TorchSettings, softmax
from featcache.heads.metrics import Answers, evaluate_answers
from featcache.heads.validation import different_images
from featcache.images.groups import Grouping, Groups, group_by_name, joined
from featcache.images.layout import some
from featcache.images.splits import training_images, usable
from featcache.models.model import check_replaceable, save_model
from featcache.models.scoring import NOT_SCORED
from featcache.models.training_rows import HeldOut, TrainingRows
from featcache.system.display import Shown, quantity
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_device, check_runtime_options

log = logging.getLogger("featcache")
_OF_SPLITS = ("accuracy", "accuracy_interval", "balanced_accuracy", "macro_f1", "accuracy_without_copies")
# Of metrics.json and the report.
_SCORES = (
    "cv_accuracy",
    "cv_std",
    "cv_log_loss",
    "temperature",
    *(f"{split}_{name}" for split in ("val", "test") for name in _OF_SPLITS),
)
_TAKEN_BY = {"C": "logreg", "hidden": "mlp", "dropout": "mlp"}
_TAKEN_BY |= dict.fromkeys(("epochs", "lr", "batch_size"), "linear and mlp")
_MANY_ROWS = 100_000  # from here on training takes minutes


@dataclasses.dataclass(frozen=True, repr=False)
class FitReport(Shown):
    """What ``fit_head`` did; scores are accuracies in 0..1, None where there are no such rows.

    Attributes:
        model: the folder. clf: kind of head. C, scaling: as chosen (C is None for torch heads).
        classes: how many; class_names: which. n_train: training rows.
        cv_accuracy, cv_log_loss: out of fold, corrected for having chosen setting and temperature (``heads.validation``).
        cv_std: standard deviation over folds of the chosen setting's accuracy.
        temperature: what the head's logits were divided by, so that probabilities are calibrated; 1 without folds.
        val_accuracy, test_accuracy: on rows that nothing was chosen on, unless they are copies of training images.
        val_accuracy_interval, ..., test_macro_f1: of these rows, as ``heads.metrics.evaluate_probabilities`` has them.
        val_accuracy_without_copies, test_accuracy_without_copies: without those.
        copies: within, across_splits, across_labels (``cache.copies``), over all labelled rows.
        groups: what stayed in one fold besides: column, training (groups that train), across_splits (images of val and test in
            one of them); None: nothing.
        settings: what the head was trained with: C and scaling, or epochs, lr, batch_size, and of an mlp hidden and dropout.
        seconds: of the whole call.
        label_suspects: labels of training images in doubt (``heads.confident``, out of fold, without neighbours); None where there
            was no cross-validation, or too much of it to keep.
    """

    model: Path
    clf: Kind
    C: float | None
    scaling: str
    classes: int
    class_names: tuple[str, ...]
    n_train: int
    cv_accuracy: float | None
    cv_std: float | None
    cv_log_loss: float | None
    temperature: float
    val_accuracy: float | None
    val_accuracy_interval: list[float] | None
    val_balanced_accuracy: float | None
    val_macro_f1: float | None
    val_accuracy_without_copies: float | None
    test_accuracy: float | None
    test_accuracy_interval: list[float] | None
    test_balanced_accuracy: float | None
    test_macro_f1: float | None
    test_accuracy_without_copies: float | None
    copies: dict[str, int]
    groups: dict[str, Any] | None
    settings: dict[str, Any]
    seconds: float
    label_suspects: int | None = None

    _shown = ("model", "clf", "C", "classes", "n_train", "cv_accuracy", "val_accuracy", "test_accuracy", "seconds")


def fit_head(
    cache: AnyPath,
    output: AnyPath,
    *,
    clf: Kind = "logreg",
    C: float | None = None,
    folds: int = 5,
    class_weight: Literal["none", "balanced"] = "none",
    hidden: int | Sequence[int] | None = None,
    dropout: float | Sequence[float] | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    groups: Grouping | None = None,
    group_column: str | None = None,
    seed: int = 0,
    device: str = "auto",
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
        hidden, dropout: for mlp: size of its hidden layer, or of each; share dropped after all of them, or after each; 512
            and 0.25 when None.
        epochs: for linear and mlp: exactly so many; when None, as many as are best on a held-out tenth.
        lr, batch_size: for linear and mlp: AdamW's learning rate, 0.003 when None; rows per step, by their number when None.
        groups: a table in which ``group_column`` says what belongs together (patient, place), joined by path, or a name for each
            row of the cache: such rows, as copies always, lie in one fold. An empty name, None, NaN or NA stands alone.
        seed: of folds, initial weights and batches.
        device: auto, cpu, cuda, cuda:N or mps; auto takes a CUDA GPU where there is one and enough to do.
        self_contained: copy the backbone's weights into the model even if a library provides them.

    Raises:
        CacheError: unreadable or damaged. SourceError: labels missing, fewer than two classes, too few images or groups,
        features that are not finite, training images that the table of groups lacks.
        ModelError, StorageError: the model cannot be written. UsageError: impossible values.
        TrainingError: the head does not stay finite.
    """
    started = time.perf_counter()
    check_runtime_options(device)
    check_device(device)
    _check_options(clf, C, folds=folds, class_weight=class_weight, seed=seed)
    given = {"hidden": hidden, "dropout": dropout, "epochs": epochs, "lr": lr, "batch_size": batch_size}
    given = {name: value for name, value in given.items() if value is not None}
    torch_settings = _torch_settings(clf, given)
    cache, output = as_path(cache), as_path(output)
    check_path(cache, "cache", ("fit-head", HERE, "-o", output))
    check_replaceable(output)
    replaces = (output / MANIFEST).exists()
    opened = FeatureCache.open(cache)
    rows, labels = _training_rows(opened)
    present, y = np.unique(labels, return_inverse=True)
    classes = tuple(opened.classes[index] for index in present)
    if clf == "logreg":
        _announce_logreg(len(rows), opened.dim, len(classes), choosing=C is None, device=device)
    copies, known_groups = _kept_together(opened, rows, groups, group_column)
    once = (
        ", each group counted once"
        if known_groups
        else ", copies not counted"
        if (copies != np.arange(len(y))).any()
        else ""
    )
    folds = _possible_folds(opened, y, copies, present=present, folds=folds, once=once)
    opened.check_finite(np.arange(len(opened)))  # checksums in the same pass; what follows reads rows that are verified
    options = {"folds": folds, "balanced": class_weight == "balanced", "seed": seed, "copies": copies}
    fitted = _train(opened, rows, y, clf=clf, C=C, settings=torch_settings, device=device, **options)
    for note in fitted.notes:
        log.warning(note)
    settings: dict[str, Any] = {
        "clf": clf,
        "C": C,
        "folds": folds,
        "class_weight": class_weight,
        "seed": seed,
        "n_train": len(rows),
        "asked": given | ({} if C is None else {"C": C}),  # of what ``fitted.chosen`` holds
    }
    if known_groups is not None:
        settings["group_column"] = known_groups["column"]
    seen = _seen(opened.rows.digests[rows], y, fitted)
    metrics = _metrics(opened, fitted, seen, present=present) | {"groups": known_groups}
    save_model(
        output,
        fitted,
        classes=classes,
        spec=opened.spec,
        weights={"source": opened.provenance.source, "reload": opened.provenance.reload},
        training=settings | fitted.chosen,
        metrics=metrics,
        rows=seen,
        files=_weights_to_keep(opened, self_contained=self_contained),
    )
    if replaces:
        log.info("the head-only model that was in %s is replaced", output)
    scores: dict[str, Any] = {name: metrics[name] for name in _SCORES}
    return FitReport(
        model=output,
        clf=clf,
        C=fitted.chosen.get("C"),
        scaling=fitted.head.scaling,
        classes=len(classes),
        class_names=classes,
        n_train=len(rows),
        **scores,
        copies=metrics["copies"],
        groups=metrics["groups"],
        settings=fitted.chosen,
        seconds=time.perf_counter() - started,
        label_suspects=metrics["label_suspects"],
    )


def _check_options(clf: str, C: float | None, *, folds: int, class_weight: str, seed: int) -> None:
    problems = (
        (clf not in KINDS, f"unknown clf {clf!r}; choose one of {', '.join(KINDS)}"),
        (class_weight not in ("none", "balanced"), f"unknown class weight {class_weight!r}; choose none or balanced"),
        (C is not None and clf != "logreg", _not_taken("C", clf)),
        (C is not None and not 0 < C < float("inf"), f"C must be a positive number, found {C}"),
        (not 0 <= seed < 2**32, f"seed must lie between 0 and {2**32 - 1}, found {seed}"),
        (folds < 0 or folds == 1, f"folds must be 0 (none) or at least 2, found {folds}"),
        (folds == 0 and clf == "logreg" and C is None, "without folds nothing can choose C; give --C as well"),
    )
    for found, sentence in problems:
        if found:
            raise UsageError(sentence)


def _not_taken(name: str, clf: str) -> str:
    """What is wrong with an option that other classifiers take."""
    return f"{name} belongs to {_TAKEN_BY[name]}, not to {clf}; leave it out"


def _torch_settings(clf: Kind, given: dict[str, Any]) -> TorchSettings:
    """Raises UsageError: ``given`` to another classifier, or impossible."""
    for name in given:
        if clf not in _TAKEN_BY[name]:
            raise UsageError(_not_taken(name, clf))
    for name in {"hidden", "dropout"} & set(given):
        given[name] = tuple(given[name]) if isinstance(given[name], Sequence) else (given[name],)
    return TorchSettings(**given)


def _training_rows(cache: FeatureCache) -> tuple[Indices, Array]:
    """Row numbers and labels of what trains: the split train, or every row of a cache without splits, if labelled."""
    splits, labels = cache.rows.splits, cache.y
    if not (labels >= 0).any():
        raise SourceError(
            f"{cache.path} has no labels; expected a source of class folders (SOURCE/CLASS/photo.jpg) or a CSV with a label column"
        )
    wanted, left_out = training_images(labels, splits)
    rows = np.flatnonzero(wanted)
    if not len(rows):
        raise SourceError(f"{cache.path} has splits, but no labelled image in train")
    if left_out:
        what = "without a label or outside the splits"
        log.info("%s left out", quantity(left_out, f"image {what} is", f"images {what} are"))
    return rows, labels[rows]


def _kept_together(
    cache: FeatureCache, rows: Indices, groups: Grouping | None, column: str | None
) -> tuple[Indices, dict[str, Any] | None]:
    """(n,) for each of the ``rows`` that train the first one of its copies, and of its group; what is known of groups, if there are any."""
    copies = first_copies(cache.rows.digests[rows])
    if groups is None and column is None:  # nothing needs the names of all rows in memory
        return copies, None
    training = np.isin(np.arange(len(cache)), rows)
    grouped = Groups.read(groups, cache.paths, training=training, column=column)
    named = group_by_name([grouped.names[row] for row in rows.tolist()])
    return joined(copies, named), grouped.across_splits(training, cache.rows.splits, cache.paths)


def _possible_folds(cache: FeatureCache, y: Array, copies: Indices, *, present: Array, folds: int, once: str) -> int:
    """``folds``, or as many as the smallest class has different training images, or groups of them.

    Args:
        y: (N,) and copies (N,): of the training rows. present: the labels that train, ascending. once: what is counted so.
    """
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
    counts = different_images(y, copies)
    single = [cache.classes[present[k]] for k in np.flatnonzero(counts < 2)]
    if folds and single:
        raise SourceError(
            f"{'classes' if single[1:] else 'class'} {some(single)} {'have' if single[1:] else 'has'} one training image{once}; "
            "cross-validation needs at least two of each class: add images, take the class out, or do without (--folds 0 --C 1)"
        )
    if folds > counts.min():
        text = "folds: %d instead of %d, the smallest class has that many training images%s"
        log.info(text, counts.min(), folds, once)
        return int(counts.min())
    return folds


def _announce_logreg(n: int, dim: int, n_classes: int, *, choosing: bool, device: str) -> None:
    """Refuse, before features are read, what does not fit into memory; say how long much of it takes a CPU. Raises UsageError."""
    from featcache.heads.logreg import check_memory, estimate, find_gpu

    needed = check_memory(n, dim)
    gpu, _ = find_gpu(device, n, dim, n_classes, choosing=choosing)
    if n > _MANY_ROWS and choosing and gpu is None:
        minutes = max(1, round(estimate(n, dim, n_classes) / 60))
        memory = f" and up to {needed / 1e9:.0f} GB" if needed else ""
        text = (
            "choosing C on %s of %d values and %d classes takes some %s%s here; --clf linear needs less time and memory"
        )
        log.info(text, quantity(n, "row"), dim, n_classes, quantity(minutes, "minute"), memory)


def _train(
    cache: FeatureCache, rows: Indices, y: Array, *, clf: Kind, C: float | None, settings: TorchSettings, **options: Any
) -> FittedHead:
    with cache.reader() as features:
        if clf == "logreg":
            from featcache.heads.logreg import C_GRID, fit_logreg

            grid = C_GRID if C is None else (C,)
            return fit_logreg(features, rows, y, grid=grid, **options)
        from featcache.heads.minibatch import fit_torch_head

        if options["folds"] and len(rows) > _MANY_ROWS:
            text = "the head is trained %d times, for an estimate and for good; --folds 0: once"
            log.info(text, options["folds"] + 1)
        return fit_torch_head(features, rows, y, kind=clf, n_classes=int(y.max()) + 1, settings=settings, **options)


def _seen(digests: Array, y: Array, fitted: FittedHead) -> TrainingRows:
    """What trained the head, with out-of-fold logits of all rows or of some."""
    logits, kept = fitted.out_of_fold, fitted.kept
    if logits is None or kept is None:
        return TrainingRows(digests, y, logits)
    return TrainingRows(digests, y, held_out=HeldOut(digests[kept], y[kept], logits))


def _metrics(cache: FeatureCache, fitted: FittedHead, seen: TrainingRows, *, present: Array) -> dict[str, Any]:
    """The content of metrics.json."""
    folds = np.array(fitted.fold_accuracies)
    metrics: dict[str, Any] = {
        "cv_accuracy": fitted.cv_accuracy,
        "cv_accuracy_uncorrected": float(folds.mean()) if len(folds) else None,
        "cv_std": float(folds.std()) if len(folds) else None,
        "cv_log_loss": fitted.cv_log_loss,
        "temperature": fitted.temperature,
    }
    for split in ("val", "test"):
        metrics[split] = scores = _score(cache, fitted.head, seen, split=split, present=present)
        metrics |= {f"{split}_{name}": scores and scores[name] for name in _OF_SPLITS}
    rows = np.flatnonzero(usable(cache.y, cache.rows.splits))
    columns = cache.rows.digests[rows], cache.y[rows], cache.rows.splits[rows]
    copies = find_copies(*columns, cache.rows.paths[rows])
    for sentence in copies.examples:
        log.warning(sentence)
    history = {"history": fitted.history} if fitted.history else {}
    suspects = None if seen.logits is None else len(wrong_labels(seen.labels, softmax(seen.logits)))
    return metrics | {"copies": copies.counts(), "label_suspects": suspects, "curve": fitted.curve} | history


def _score(cache: FeatureCache, head: Head, seen: TrainingRows, *, split: str, present: Array) -> dict[str, Any] | None:
    """Scores on the rows of a split whose class training knows; None where there are none."""
    position = np.full(len(cache.classes) + 1, -1)
    position[present] = np.arange(len(present))
    rows = cache.where(split)
    y = position[cache.y[rows]]
    if unknown := int((y < 0).sum()):
        log.warning(NOT_SCORED, unknown, len(rows), split)
    rows, y = rows[y >= 0], y[y >= 0]
    if not len(rows):
        return None
    with cache.reader() as features:
        answers = Answers.of(y, Scores(head, features.__getitem__, rows))
    new = ~seen.contain(cache.rows.digests[rows])
    without = {"accuracy_without_copies": float(answers.right[new].mean()) if new.any() else None}
    return evaluate_answers(answers, [cache.classes[index] for index in present]) | without


def _weights_to_keep(cache: FeatureCache, *, self_contained: bool) -> dict[str, bytes | Path]:
    """The backbone's weights if they have to travel with the model: under their file name, the content or the file to copy."""
    if cache.spec.stated is not None:
        log.info("%s holds vectors that were made elsewhere: the model will label such caches, not images", cache.path)
        return {}
    copy, reload = weights_copy(cache.path, cache.spec), cache.provenance.reload
    if reload is None and copy.is_file():
        return {WEIGHTS: copy}
    if reload is None:
        log.warning(
            "%s is missing: the model will label caches, not images; run the same extract command again to restore it",
            copy,
        )
    elif self_contained:  # though a library provides them again
        from featcache.backbones.backbone import weights_bytes
        from featcache.backbones.load import load_provided

        return {WEIGHTS: weights_bytes(load_provided(cache.spec.backbone, reload))}
    return {}
