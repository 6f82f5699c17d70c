"""Score a model on labelled images: the rows that evaluations and reports are made of.

In: a model, and labelled images, a cache, or nothing but what the model keeps. Out: ``Scored``: labels and probabilities of the
images of a split, and those that were refused.
"""

import dataclasses
import functools
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.cache import FeatureCache, is_cache
from featcache.cache.format import decode_names, encode_names
from featcache.errors import Refusal, SourceError, UsageError
from featcache.heads.head import MAX_LOGITS, Array, Indices, Probabilities, Scores, softmax
from featcache.heads.metrics import Answers, blocks_of
from featcache.images.source import AnySource, ImageList, Source, list_images
from featcache.models.limits import Found, Limits, temperature_of
from featcache.models.model import Model
from featcache.models.predict import predict_images
from featcache.models.prediction import Prediction
from featcache.spec import SPLITS
from featcache.system.addresses import shown
from featcache.system.display import all_refused, quantity
from featcache.system.runtime_options import check_device

log = logging.getLogger("featcache")
NOT_SCORED = "%d of %d %s images have no label that training knows and are not scored"
HELD_OUT = "held out"  # the split of rows that the model keeps, with logits of heads that they did not train


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """The labelled images of a split.

    Attributes:
        split: train, val, test, all, or ``HELD_OUT``.
        y: (N,) labels, probabilities: (N, C), digests: (N, 32), names: (N,) encoded paths of those that were scored.
        temperature: that probabilities were made with.
        found: evidence of each of those, fields of ``Prediction``.
        refused: the others, with their label where that is known.
        root: what paths are relative to; None: they stay as they are.
        rows: (N,) their numbers in the cache that they come from; None: they come from none.
        elsewhere: how many images more were refused of which the split is not known; they are not among ``refused``.
    """

    split: str
    y: Array
    probabilities: Probabilities
    digests: Array
    names: Array
    found: Found
    refused: list[tuple[Refusal, int | None]]
    temperature: float
    root: Path | None = None
    rows: Indices | None = None
    elsewhere: int = 0

    def __len__(self) -> int:
        return len(self.y)

    @property
    def answers(self) -> Answers:
        """What most scores need of ``probabilities``."""
        return self._answers[0]

    @property
    def before(self) -> Answers:
        """The same of what they were before logits were divided by ``temperature``."""
        return self._answers[1]

    @functools.cached_property
    def _answers(self) -> tuple[Answers, Answers]:
        """In one pass, since probabilities may be computed when they are asked for."""
        after, before = (Answers.to_fill(self.y, self.probabilities.dtype) for _ in range(2))
        for rows in blocks_of(len(self)):
            after.fill(rows, p := self.probabilities[rows])
            before.fill(rows, at_temperature(p, self.temperature))
        return after, before

    def paths(self, rows: Indices | slice = slice(None)) -> tuple[str, ...]:
        """Of some of the rows, as the user would type them."""
        names = self.relative(rows)
        return names if self.root is None else tuple(shown(self.root / name) for name in names)

    def relative(self, rows: Indices | slice = slice(None)) -> tuple[str, ...]:
        """Their paths relative to ``root``, or to the source of the cache; empty where not known."""
        return decode_names(self.names[rows])


@np.errstate(divide="ignore")
def at_temperature(probabilities: Array, temperature: float) -> Array:
    """(n, C) what they were before logits were divided by it."""
    return softmax(temperature * np.log(probabilities.astype(np.float64))).astype(probabilities.dtype)


def check_split(split: str | None) -> None:
    """Raise UsageError, before anything is listed, for the name of no split; None is for choosing by oneself."""
    if split is not None and split not in (*SPLITS, "all"):
        raise UsageError(f"unknown split {split!r}; choose train, val, test or all")


def score_source(
    model: Model, source: AnySource | ImageList, *, split: str | None, limits: Limits, **options: Any
) -> Scored:
    """Score a cache, or the images of a source; arguments and errors are those of ``evaluate``.

    ``options``: device, workers, batch_size and progress, for images.
    """
    if not isinstance(source, ImageList) and is_cache((given := Source.of(source)).path):
        given.check_options("cache")
        return score_cache(model, FeatureCache.open(given.path), split=split, limits=limits)
    return score_images(model, source, split=split, limits=limits, **options)


def score_cache(
    model: Model, cache: FeatureCache, *, split: str | None, limits: Limits, most: int = MAX_LOGITS
) -> Scored:
    """Score the rows of a cache; see ``score_source``. most: probabilities that are kept; more are computed when asked for."""
    model.check_cache(cache)
    split, chosen = choose_split(cache.rows.splits, split, str(cache.path))
    chosen = chosen[cache.y[chosen] >= 0]
    strange = ~np.isin(cache.classes, model.classes)[cache.y[chosen]]
    if strange.any() and not strange.all() and _was_fit_on(model, cache):
        log.warning(NOT_SCORED, int(strange.sum()), len(chosen), split)
        chosen = chosen[~strange]
    y = _labels_of_model(model, cache.classes, cache.y[chosen], str(cache.path), split)
    cache.check_finite(chosen)
    probabilities: Probabilities = Scores(model.head, cache.take, chosen)
    if len(chosen) * len(model.classes) <= most:
        probabilities = probabilities[:]
    found: Found = [{}] * len(chosen)
    if limits.evidence is not None:
        known = (digest.tobytes() for digest in cache.rows.digests[chosen])
        found = [
            one for block in cache.blocks(chosen) for one in limits.find(block, itertools.islice(known, len(block)))
        ]
    refused = cache.refused if split == "all" else ()
    refusals: list[tuple[Refusal, int | None]] = [(refusal, None) for refusal in refused]
    elsewhere = len(cache.refused) - len(refusals)
    columns = split, y, probabilities, cache.rows.digests[chosen], cache.rows.paths[chosen], found, refusals
    return Scored(*columns, temperature_of(model), rows=chosen, elsewhere=_said(elsewhere))


def _was_fit_on(model: Model, cache: FeatureCache) -> bool:
    """Whether images of ``cache`` trained the model: then it does without classes that only val or test has, as fit-head said."""
    rows = model.training_rows()
    return rows is not None and bool(rows.contain(cache.rows.digests).any())


def score_images(
    model: Model,
    source: AnySource | ImageList,
    *,
    split: str | None,
    limits: Limits,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: Any = None,
) -> Scored:
    """Embed and score labelled images; see ``score_source``. Raises SourceError if all were refused."""
    check_device(device)
    model.backbone.check_embeds()
    name = f"the list of images in {source.root}" if isinstance(source, ImageList) else str(source)
    images = list_images(source)
    images.check_any()
    split, chosen = choose_split(images.splits, split, name)
    images = images.take(chosen[images.labels[chosen] >= 0])
    y = _labels_of_model(model, images.classes, images.labels, name, split)
    found = list(predict_images(model, images, device, workers, batch_size, progress, limits=limits))
    return _of_predictions(images, y, found, name=name, split=split, temperature=temperature_of(model))


def score_held_out(model: Model, cache: FeatureCache | None = None) -> Scored:
    """What the model keeps of images that did not train what scores them: out of fold, or val of a fine-tuned model.

    Args:
        cache: gives them their paths, by digest; without it, names are empty.

    Raises:
        UsageError: the model keeps none. ModelError: they are damaged.
    """
    known = model.training_rows()
    found = None if known is None else known.unseen()
    if found is None:
        raise UsageError(
            f"{model.path} keeps no scores of images that it was not trained on; give labelled images or a cache as SOURCE"
        )
    names, rows = np.full(len(found.labels), b"", "S1"), None
    if cache is not None:
        order = np.argsort(cache.rows.keys, kind="stable")
        keys = np.ascontiguousarray(found.digests).view("S32").reshape(-1)
        at = np.searchsorted(cache.rows.keys[order], keys).clip(0, len(order) - 1)
        rows = order[at]
        there = (cache.rows.digests[rows] == found.digests).all(axis=1)
        names = np.where(there, cache.rows.paths[rows], b"")
        rows = rows if there.all() else None
    probabilities = softmax(found.logits.astype(np.float64)).astype(np.float32)
    columns = found.labels, probabilities, found.digests, names
    return Scored(HELD_OUT, *columns, [{}] * len(names), [], temperature_of(model), rows=rows)


def _of_predictions(
    images: ImageList, y: Array, found: list[Prediction], *, name: str, split: str, temperature: float
) -> Scored:
    """``found``: for each of ``images``."""
    right = [k for k, prediction in enumerate(found) if prediction.probabilities is not None]
    if not right:
        raise SourceError(f"{all_refused(len(images), f'{name} ({split})')}, the first because {found[0].reason}")
    refused: list[tuple[Refusal, int | None]] = [
        (Refusal(prediction.path, prediction.reason), label)
        for prediction, label in zip(found, y.tolist(), strict=True)
        if prediction.probabilities is None
    ]
    unopened = [(refusal, None) for refusal in images.refused if split == "all"]
    refused += unopened
    probabilities = np.stack([found[k].probabilities for k in right])  # type: ignore[misc]
    digests = np.frombuffer(b"".join(found[k].digest for k in right), np.uint8).reshape(-1, 32)
    names = encode_names(found[k].path for k in right)
    evidence: Found = [
        {} if found[k].nearest is None else {"nearest": found[k].nearest, "unfamiliarity": found[k].unfamiliarity}
        for k in right
    ]
    elsewhere = _said(len(images.refused) - len(unopened))
    columns = split, y[right], probabilities, digests, names, evidence, refused, temperature
    return Scored(*columns, images.root, elsewhere=elsewhere)


def _said(elsewhere: int) -> int:
    """The number of refused images that a split may lack: a guess by their folders could be wrong, a table's column is not kept."""
    if elsewhere:
        what = quantity(elsewhere, "refused image is", "refused images are")
        log.info("%s not counted: which split they are of is not known; --split all lists them", what)
    return elsewhere


def choose_split(splits: Array, asked: str | None, source: str) -> tuple[str, Array]:
    """The split that was ``asked`` for, or the one to score on, and its rows. Raises SourceError: there is no such split."""
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
