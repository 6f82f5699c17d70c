"""What a prediction is worth: the set of classes that may be true, the nearest training images, whether to leave it to people.

In: a model, a coverage, the cache it was fit on, a least probability. Out: ``Prediction`` with ``set``, ``nearest``,
``unfamiliarity`` and ``doubt``. The methods are those of ``heads.conformal`` and ``heads.neighbours``.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.copies import Digests, are_among, first_copies
from featcache.cache.format import decode_names
from featcache.errors import SourceError, UsageError
from featcache.heads.conformal import METHOD, Thresholds, check_coverage, fit_thresholds, rows_of_class_needed
from featcache.heads.head import Array, Indices
from featcache.heads.neighbours import Neighbours
from featcache.models.prediction import EVIDENCE, Neighbour, Prediction
from featcache.spec import SPLITS
from featcache.system.display import quantity
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path

if TYPE_CHECKING:
    from featcache.models.model import Model

log = logging.getLogger("featcache")
Found = list[dict[str, Any]]  # evidence, per image: fields of ``Prediction``
# So many of the training images are nearer to their neighbours: beyond, an image counts as unfamiliar, as does one in twenty of
# the training's own kind. At 0.99 two thirds of other subjects are found where features are poor, at 0.95 98 % (benchmarks/LOG.md).
UNFAMILIAR = 0.95
_EXPORTED = (0.9, 0.95, 0.99)  # coverages whose thresholds travel with an exported model


@dataclasses.dataclass(frozen=True, eq=False)
class Sets:
    """Which classes may be true. ``temperature``: the one that probabilities were made with, which sets do without."""

    thresholds: Thresholds
    temperature: float

    def contain(self, probabilities: Array) -> Array:
        """(N, C) probabilities -> (N, C) whether the class is in the row's set."""
        with np.errstate(divide="ignore"):
            return self.thresholds.contain(self.temperature * np.log(probabilities.astype(np.float64)))


def sets_of(model: "Model", coverage: float) -> Sets:
    """The sets of a model, from the scores that it keeps of rows which did not train what gave them.

    Raises:
        UsageError: an impossible coverage, or one that takes more rows than there are; the model keeps no such scores.
        ModelError: they are damaged.
    """
    check_coverage(coverage)
    rows = model.training_rows()
    found = None if rows is None else rows.unseen()
    if found is None:
        again = "finetune it again" if model.manifest.get("finetuned") else "fit it again with fit-head --folds 5"
        raise UsageError(
            f"{model.path} keeps no scores of images that it was not trained on, which sets of classes are made from: it was "
            f"trained without folds, or by an earlier version; {again}"
        )
    temperature = temperature_of(model)
    return Sets(fit_thresholds(found.labels, found.logits * temperature, coverage=coverage), temperature)


def temperature_of(model: "Model") -> float:
    """What the model's logits were divided by; 1 where that is not recorded."""
    recorded = model.manifest["metrics"].get("temperature")
    return float(recorded) if isinstance(recorded, float | int) and 0 < recorded < float("inf") else 1.0


def exported_limits(model: "Model") -> dict[str, Any] | None:
    """Thresholds for other programs, as JSON values; None where the model has none."""
    found = []
    for coverage in _EXPORTED:
        try:
            found.append(sets_of(model, coverage))
        except UsageError:
            break
    if not found:
        return None
    return {
        "method": METHOD,
        "rule": "p = softmax(temperature * logits); class k is in the set where log((1 - p[k]) / p[k]) <= largest_score[k]",
        "temperature": found[0].temperature,
        "sets": [sets.thresholds.to_json() for sets in found],
    }


class Evidence:
    """Training images to compare with.

    Attributes:
        neighbours: of their embeddings.
    """

    def __init__(self, model: "Model", path: str | os.PathLike[str]) -> None:
        """path: a cache of the model's spec that holds images the model was trained on.

        Raises:
            CacheError: not a readable cache. SpecMismatchError: one of another spec. SourceError: none of its images trained
            the model, or their features are not finite. UsageError: there is only one.
        """
        path = as_path(path)
        check_path(path, "cache", ("predict", model.path, "IMAGES", "--evidence", HERE))
        cache = FeatureCache.open(path)
        model.check_cache(cache, advice="give as evidence the cache that the model was fit on")
        rows = rows_that_trained(model, cache)
        cache.check_finite(rows)
        self._names = cache.rows.paths
        self.neighbours = Neighbours(cache.X, rows)
        self._digests = Digests(cache.rows.digests[rows])
        text = "evidence: %s of %s; unfamiliar is what is farther from its %d nearest ones than %.0f%% of them are"
        log.info(text, quantity(len(rows), "training image"), path, self.neighbours.k, 100 * UNFAMILIAR)

    def find(self, features: Array, digests: Iterable[bytes]) -> Found:
        """Per (n, D) row ``nearest`` and ``unfamiliarity``; an image that is among the training images has itself left out
        of its unfamiliarity, and as its nearest one itself.
        """
        itself = self._digests.places(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
        count = max(self.neighbours.k + 1, EVIDENCE)
        places, similarities = self.neighbours.nearest(features, count=count)
        used = slice(self.neighbours.k + 1)
        distances = self.neighbours.distances(places[:, used], similarities[:, used], itself)
        near = self.neighbours.rows[places[:, :EVIDENCE]]
        names = np.array(decode_names(self._names[near.reshape(-1)]), object).reshape(near.shape)
        pairs = (zip(*row, strict=True) for row in zip(names, similarities[:, :EVIDENCE].tolist(), strict=True))
        return [
            {"nearest": tuple(Neighbour(path, value) for path, value in found), "unfamiliarity": share}
            for found, share in zip(pairs, self.neighbours.unfamiliarity(distances).tolist(), strict=True)
        ]


def rows_that_trained(model: "Model", cache: FeatureCache) -> Indices:
    """Rows of the images that trained the model, each image once; of an older model, which does not know, those of train."""
    known = model.training_rows()
    if known is not None:
        rows = np.flatnonzero(are_among(cache.rows.digests, known.digests))
    else:
        rows = cache.where("train")
        rows = rows if len(rows) else np.flatnonzero(cache.y >= 0)
        log.warning(
            "%s does not know what it was trained on; taken are %s",
            model.path,
            quantity(len(rows), "labelled image"),
        )
    if not len(rows):
        raise SourceError(
            f"no image of {cache.path} trained {model.path}; give as evidence the cache that it was fit on"
        )
    rows = rows[np.argsort(cache.rows.splits[rows] != SPLITS.index("train"), kind="stable")]  # of copies, that in train
    once: Indices = np.sort(rows[first_copies(cache.rows.digests[rows]) == np.arange(len(rows))])
    return once


@dataclasses.dataclass(frozen=True, eq=False)
class Limits:
    """Makes predictions, and says what they are worth.

    Attributes:
        classes: the model's. sets, evidence, abstain_below: None if not asked for.
    """

    classes: tuple[str, ...]
    sets: Sets | None = None
    evidence: Evidence | None = None
    abstain_below: float | None = None

    @classmethod
    def of(
        cls,
        model: "Model",
        *,
        coverage: float | None = None,
        evidence: AnyPath | None = None,
        abstain_below: float | None = None,
    ) -> "Limits":
        """What was asked for, settled. Raises as ``sets_of`` and ``Evidence``; UsageError: ``abstain_below`` is not in 0..1."""
        if abstain_below is not None and not (isinstance(abstain_below, float | int) and 0 < abstain_below <= 1):
            raise UsageError(f"abstain-below must be a probability above 0 and at most 1, found {abstain_below}")
        sets = None if coverage is None else sets_of(model, coverage)
        if sets is not None:
            _say(sets.thresholds)
        return cls(model.classes, sets, None if evidence is None else Evidence(model, evidence), abstain_below)

    def find(self, features: Array, digests: Iterable[bytes]) -> Found:
        """Evidence of (n, D) rows; nothing of each if none was asked for."""
        return [{}] * len(features) if self.evidence is None else self.evidence.find(features, digests)

    def unsure(self, confidence: Array, sizes: Array | None, found: Found) -> Array:
        """(N,) whether ``doubt`` would say anything, by probabilities of the likeliest class, sizes of sets and evidence."""
        doubtful = np.array([evidence.get("unfamiliarity", 0) > UNFAMILIAR for evidence in found], bool)
        if sizes is not None:
            doubtful |= sizes != 1
        if self.abstain_below is not None:
            doubtful |= confidence < self.abstain_below
        return doubtful

    def describe(
        self, names: Sequence[str], probabilities: Array, digests: Sequence[bytes], found: Found
    ) -> list[Prediction]:
        """A prediction for each of n images, from (n, C) probabilities and what ``find`` found."""
        inside = [None] * len(names) if self.sets is None else self.sets.contain(probabilities)
        return [self._one(*row) for row in zip(names, probabilities, digests, inside, found, strict=True)]

    def _one(self, name: str, row: Array, digest: bytes, inside: Array | None, found: dict[str, Any]) -> Prediction:
        likely = None
        if inside is not None:
            likely = tuple(self.classes[k] for k in np.argsort(-row, kind="stable") if inside[k])
        doubt = "; ".join(self._doubts(float(row.max()), likely, found.get("unfamiliarity")))
        return Prediction(name, row, "", digest, self.classes, likely, doubt=doubt, **found)

    def _doubts(self, probability: float, likely: tuple[str, ...] | None, unfamiliarity: float | None) -> list[str]:
        doubts = []
        if likely is not None and len(likely) != 1:
            doubts.append(f"{quantity(len(likely), 'class')} in the set" if likely else "no class in the set")
        if unfamiliarity is not None and unfamiliarity > UNFAMILIAR:
            doubts.append(f"farther from the training images than {unfamiliarity:.1%} of them from each other")
        if self.abstain_below is not None and probability < self.abstain_below:
            doubts.append(f"probability below {self.abstain_below:g}")
        return doubts

    def refuse(self, name: str, reason: str) -> Prediction:
        """An image that could not be embedded, with the columns of the others."""
        nothing: dict[str, Any] = {} if self.sets is None else {"set": ()}
        return Prediction(
            name, None, reason, classes=self.classes, **nothing | ({"nearest": ()} if self.evidence else {})
        )


def _say(thresholds: Thresholds) -> None:
    """What the sets come from."""
    own, classes = int(thresholds.own.sum()), len(thresholds.own)
    text = "sets that hold the truth in %g%% of new images: %s, from held-out scores of %s; %s"
    of_class = "every class has its own threshold"
    if own < classes:
        needed = rows_of_class_needed(thresholds.coverage)
        of_class = (
            f"{own} of {classes} classes have their own threshold, the others, of fewer than {needed} images, share one"
        )
    log.info(text, 100 * thresholds.coverage, METHOD, quantity(thresholds.n, "image"), of_class)
