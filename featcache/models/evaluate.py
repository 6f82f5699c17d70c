"""``evaluate``: score a saved model.

In: a model folder, and labelled images or a cache. Out: a dictionary of scores (``heads.metrics``), also without the images
that training has seen.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.cache import FeatureCache, is_cache
from featcache.cache.copies import find_copies
from featcache.cache.format import decode_names, encode_names
from featcache.errors import SourceError
from featcache.heads.head import Array
from featcache.heads.metrics import accuracy, evaluate_probabilities
from featcache.images.source import AnySource, ImageList, Source, list_images
from featcache.models.model import Model, load_model
from featcache.models.predict import predict_images
from featcache.spec import SPLITS
from featcache.system.path_kinds import HERE, as_path, check_path
from featcache.system.runtime_options import check_runtime_options

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress

log = logging.getLogger("featcache")


def evaluate(
    model: Model | str | Path,
    source: AnySource | ImageList,
    *,
    split: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: "Progress | None" = None,
) -> dict[str, Any]:
    """Score a model on labelled images or on a cache.

    Args:
        model: a model folder, or what ``load_model`` returned.
        source: what ``extract`` takes, or a cache of the model's own spec.
        split: train, val, test or all; when None, test if there is one, else val, else all.
        device, workers, batch_size, progress: as in ``predict``.

    Returns:
        n, accuracy, per_class, log_loss, ece, confusion (``metrics.evaluate_probabilities``), split, refused;
        accuracy_without_copies: on images that training has not seen; None without any, or if the model does not know;
        copies: ``within`` the split, ``across_splits`` those that training has seen (None if the model does not know),
        ``across_labels``: as in ``cache.copies``.

    Raises:
        SourceError: no labelled image in the split, or classes the model does not know. Otherwise as ``predict``.
    """
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    model = _checked(model, source)
    name = f"the list of images in {source.root}" if isinstance(source, ImageList) else str(source)
    if not isinstance(source, ImageList) and is_cache((given := Source.of(source)).path):
        given.check_options("cache")
        cache = FeatureCache.open(given.path)
        model.check_cache(cache)
        split, rows = _choose_split(cache.rows.splits, split, name)
        rows = rows[cache.y[rows] >= 0]
        y = _labels_of_model(model, cache.classes, cache.y[rows], name, split)
        cache.check_finite(rows)
        refused = len(cache.refused) if split == "all" else 0  # which split they were of is not known
        with cache.reader() as features:
            probabilities = model.head.score(features, rows)
        digests, names = cache.rows.digests[rows], cache.rows.paths[rows]
    else:
        images = list_images(source)
        split, rows = _choose_split(images.splits, split, name)
        images = images.take(rows[images.labels[rows] >= 0])
        y = _labels_of_model(model, images.classes, images.labels, name, split)
        found = list(predict_images(model, images, device, workers, batch_size, progress))
        kept = [prediction for prediction in found if prediction.probabilities is not None]
        if not kept:
            raise SourceError(
                f"all {len(images)} images of {name} ({split}) were refused, the first because {found[0].reason}"
            )
        y = y[[prediction.probabilities is not None for prediction in found]]
        probabilities = np.stack([prediction.probabilities for prediction in kept])  # type: ignore[misc]
        digests = np.frombuffer(b"".join(prediction.digest for prediction in kept), np.uint8).reshape(-1, 32)
        names = encode_names(prediction.path for prediction in kept)
        refused = len(found) - len(kept) + (len(images.refused) if split == "all" else 0)
    scores = evaluate_probabilities(y, probabilities, model.classes)
    return scores | _copies(model, y, probabilities, digests, names) | {"split": split, "refused": refused}


def _checked(model: Model | str | Path, source: AnySource | ImageList) -> Model:
    """The model, loaded; paths that are something else are refused before."""
    folder, images = (
        as_path(model.path if isinstance(model, Model) else model),
        None if isinstance(source, ImageList) else Source.of(source).path,
    )
    check_path(folder, "model", ("evaluate", HERE, images or "SOURCE"))
    if images is not None:
        check_path(images, "images or cache", ("evaluate", folder, HERE))
    return model if isinstance(model, Model) else load_model(model)


def _copies(model: Model, y: Array, probabilities: Array, digests: Array, names: Array) -> dict[str, Any]:
    """How many images repeat each other or were seen in training, and the accuracy on those that were not."""
    copies = find_copies(digests, y, np.zeros(len(y), np.int64), names)
    for sentence in copies.examples:
        log.warning(sentence)
    rows, new = model.training_rows(), np.ones(len(y), bool)
    if rows is not None:
        new = ~rows.contain(digests)
        if seen := int((~new).sum()):
            first = decode_names(names[~new][:1])[0]
            log.warning(
                "training has seen %d of the %d images, the first %s: a score on them flatters", seen, len(y), first
            )
    known = rows is not None and bool(new.any())
    return {
        "accuracy_without_copies": accuracy(y[new], probabilities[new]) if known else None,
        "copies": copies.counts() | {"across_splits": None if rows is None else int((~new).sum())},
    }


def _choose_split(splits: Array, asked: str | None, source: str) -> tuple[str, Array]:
    present = [name for number, name in enumerate(SPLITS) if (splits == number).any()]
    if asked is None:
        asked = next((name for name in ("test", "val") if name in present), "all")
        log.info(
            "split %s: %s",
            asked,
            "none was asked for" if asked == "all" else "none was asked for, and training leaves it out",
        )
    if asked == "all":
        return asked, np.arange(len(splits))
    if asked not in present:
        raise SourceError(f"{source} has no split {asked!r}; it has {', '.join(present)}; or choose all")
    return asked, np.flatnonzero(splits == SPLITS.index(asked))


def _labels_of_model(model: Model, classes: tuple[str, ...], labels: Array, source: str, split: str) -> Array:
    """Labels as indices into the model's classes: names decide, not positions."""
    if not len(labels):
        raise SourceError(f"{source} has no labelled image in {split}; evaluating needs labels")
    unknown = sorted({classes[label] for label in np.unique(labels)} - set(model.classes))
    if unknown:
        raise SourceError(
            f"{source} has images of {', '.join(unknown[:5])}, which the model does not know "
            f"(it knows {', '.join(model.classes[:10])})"
        )
    position = {name: number for number, name in enumerate(model.classes)}
    return np.array([position[classes[label]] for label in labels], np.int64)
