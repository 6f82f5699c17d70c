"""What a gallery shows of predictions. In: predictions, as they pass by. Out: counts of all of them, and rows of some, drawn at random.

The page is made by ``gallery_page.py``. True labels are those of folders and tables whose classes the model knows.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from featcache.cache.cache import FeatureCache, is_cache
from featcache.errors import FeatcacheError, SourceError, UsageError
from featcache.images.archives import is_home
from featcache.images.in_memory import Held
from featcache.images.source import Source, holds_images, list_images
from featcache.models.model import Model
from featcache.models.predict import named_inputs
from featcache.models.prediction import Neighbour, Prediction
from featcache.reports.elements.cards import LIKELIEST
from featcache.system.display import quiet
from featcache.system.runtime_options import check_whole

MOST = 10_000  # images that a page shows where nobody asks for more: 15 MB
BINS = 20  # of probabilities, 0..1
MOST_REFUSED = 1000  # that are listed


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One image of a gallery; fields as in ``Prediction``.

    Attributes:
        top: the likeliest classes and their probabilities; empty: refused. reason: of a refusal or a doubt.
        seen: whether training has seen it.
    """

    path: str
    digest: bytes
    status: str
    reason: str
    top: tuple[tuple[str, float], ...]
    nearest: tuple[Neighbour, ...]
    unfamiliarity: float | None
    seen: bool


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is labelled: where its pictures are, and what it is said to be.

    Attributes:
        sources: folders, tables, files, caches. held: name -> image, of those in memory. caches: whether the sources are caches.
        labels: path -> label, of those that have one and only one.
    """

    sources: tuple[Source, ...]
    held: Mapping[str, Held]
    caches: bool
    labels: Mapping[str, str]

    @classmethod
    def of(cls, inputs: object, classes: Collection[str]) -> "Inputs":
        """``inputs`` as ``predict`` takes them, and has found them to be right; ``classes``: the model's."""
        named = list(named_inputs(inputs))
        sources = tuple(entry for _, entry in named if isinstance(entry, Source))
        held = {name: entry for name, entry in named if not isinstance(entry, Source)}
        caches = bool(sources) and is_cache(sources[0].path)
        return cls(sources, held, caches, _labels(sources, classes))


def _labels(sources: Iterable[Source], classes: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    twice: set[str] = set()
    for source in sources:
        here = dict(_labelled(source))
        if not set(here.values()) & set(classes):  # folders that mean something else
            continue
        twice |= {path for path, label in here.items() if found.get(path, label) != label}
        found |= here
    return {path: label for path, label in found.items() if path not in twice}


def _labelled(source: Source) -> Iterator[tuple[str, str]]:
    """Paths as ``predict`` gives them, and labels; nothing of a source that cannot be read as a labelled one."""
    if is_cache(source.path):
        cache = FeatureCache.open(source.path)
        yield from ((path, cache.classes[k]) for path, k in zip(cache.paths, cache.y.tolist(), strict=True) if k >= 0)
    elif holds_images(source.path):
        try:
            with quiet():  # predict has said what there is to say
                images = list_images(source)
        except FeatcacheError:  # predict takes folders that mean nothing, too
            return
        pairs = zip(images.paths, images.labels.tolist(), strict=True)
        yield from ((str(images.root / path), images.classes[k]) for path, k in pairs if k >= 0)


class Draw:
    """Watches predictions pass by: counts them all, keeps some for the page.

    Attributes:
        model, inputs: what labels, and what is labelled. evidence: the cache of training images, if any. sample: rows at most.
        seed: of the draw. asked: whether the number was asked for.
        images: how many passed. status: status -> images. predicted: class -> images. sure: images per bin of probability.
        pairs: (label, predicted) -> images, of labels that the model knows and of images that training has not seen.
        seen: images that training has seen. refused: path and reason of the first ``MOST_REFUSED``.
    """

    def __init__(
        self, model: Model, inputs: object, *, evidence: Path | None = None, sample: int | None = None, seed: int = 0
    ) -> None:
        """As ``predict``'s; only once that has accepted them. Raises UsageError: a sample of none."""
        self.model, self.inputs, self.evidence = model, Inputs.of(inputs, model.classes), evidence
        self.asked, self.sample, self.seed = sample is not None, check_sample(sample) or MOST, seed
        self._random, self._known = random.Random(seed), frozenset(model.classes)
        self._rows: list[tuple[int, Row]] = []
        self.images = self.seen = 0
        self.status, self.predicted = Counter[str](), Counter[str]()
        self.pairs = Counter[tuple[str, str]]()
        self.sure = [0] * BINS
        self.refused: list[tuple[str, str]] = []

    def watch(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same predictions."""
        for prediction in predictions:
            self._count(prediction)
            yield prediction

    @property
    def rows(self) -> list[Row]:
        """What was drawn, in the order of the inputs."""
        return [row for _, row in sorted(self._rows, key=lambda pair: pair[0])]

    def label(self, path: str) -> str | None:
        """The true class, if it is one of the model's."""
        label = self.inputs.labels.get(path)
        return label if label in self._known else None

    def _count(self, prediction: Prediction) -> None:
        number, self.images = self.images, self.images + 1
        self.status[prediction.status] += 1
        top = tuple(prediction.top(LIKELIEST))
        seen = bool(prediction.digest) and prediction.digest in self.model.digests_seen
        self.seen += seen
        if top:
            self.predicted[top[0][0]] += 1
            self.sure[min(int(top[0][1] * BINS), BINS - 1)] += 1
            if not seen and (label := self.label(prediction.path)) is not None:
                self.pairs[label, top[0][0]] += 1
        elif len(self.refused) < MOST_REFUSED:
            self.refused.append((prediction.path, prediction.reason))
        # Each has the same chance (Vitter 1985, algorithm R), whatever their number.
        place = number if number < self.sample else self._random.randrange(self.images)
        if place < self.sample:
            row = Row(
                prediction.path,
                prediction.digest,
                prediction.status,
                prediction.reason or prediction.doubt,
                top,
                prediction.nearest or (),
                prediction.unfamiliarity,
                seen,
            )
            self._rows[place : place + 1] = [(number, row)]


def check_sample(sample: int | None) -> int | None:
    """``sample``. Raises UsageError: below 1."""
    if sample is not None:
        check_whole("sample", sample, 1)
    return sample


def check_pictures(folder: Path | None, *, of_caches: bool) -> None:
    """Raise SourceError, before any work, unless ``folder`` is one or not given; UsageError: given, and there is no cache."""
    if folder is None:
        return
    if not of_caches:
        raise UsageError(f"--source {folder} is for images of caches, of --evidence, too; leave it out: there is none")
    if not is_home(folder):
        raise SourceError(f"--source {folder} is no folder; give the folder that holds the images")
