"""All findings about a cache: what is looked for, in which order, and what could not be. In: a cache. Out: ``Found``.

The cheap comes first, so that an interruption keeps the most. Rows that were not finite are compared with nothing and named.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.copies import first_copies
from featcache.curation.copies import find_exact_copies
from featcache.curation.finding import KINDS, Finding, Kind
from featcache.curation.honest_score import Rows, Score, copies_of, honest_scores
from featcache.curation.label_errors import estimate as estimate_labels
from featcache.curation.label_errors import find_label_errors, out_of_fold
from featcache.curation.looks import measure_looks
from featcache.curation.near_copies import NearCopies, find_near_copies
from featcache.curation.neighbours import Nearest, estimate, nearest_rows
from featcache.curation.outliers import find_off_topic, find_outliers
from featcache.curation.overlaps import Overlap, find_overlaps
from featcache.curation.pixel_check import PixelCheck
from featcache.curation.quality import find_poor_images
from featcache.errors import SourceError, UsageError
from featcache.heads.head import Array, Indices
from featcache.spec import SPLITS
from featcache.system.display import quantity
from featcache.system.memory import available_memory
from featcache.system.runtime_options import usable_cores

log = logging.getLogger("featcache")
NO_PICTURES = "the images were not found; --source FOLDER says where they are"
Progress = Callable[[int, int, str], None]  # done, to do, and what of
_LONG = 10.0  # seconds, from which on work is announced
_OF_PICTURES = (
    8e-3,
    5e-3,
)  # seconds of a core for an image of usual size: to be compared with two or three, to be looked at


@dataclasses.dataclass(frozen=True, eq=False)
class Opinions:
    """What classifiers say of n rows that did not train them: evidence for label suspects.

    Attributes:
        rows: (n,) their numbers in the cache, ascending. probabilities: (n, C) of the cache's classes up to the last that
            occurs; NaN of rows without a label and of classes with too few images.
    """

    rows: Indices
    probabilities: Array

    @property
    def known(self) -> Indices:
        """Rows of which there are probabilities."""
        return self.rows[~np.isnan(self.probabilities[:, 0])]

    def probabilities_of(self, rows: Indices) -> Array:
        """(m, C) of (m,) rows that are among ``rows``."""
        found: Array = self.probabilities[np.searchsorted(self.rows, rows)]
        return found

    def of(self, row: int) -> dict[int, float]:
        """Class -> probability, the most probable first; empty of a row without."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row or np.isnan(values := self.probabilities[place]).any():
            return {}
        return {int(k): float(values[k]) for k in np.argsort(-values, kind="stable")}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Found:
    """What was found about the M rows of a cache.

    Attributes:
        cache: of which all rows speak. root: the folder of its images; None: there were no pictures to look at.
        findings: kind -> its findings, by falling score, groups together; a kind that was not looked for is not there.
        not_done: kind, or ``scores`` or ``overlaps`` -> why it was not looked for.
        notes: sentences about what was left out, with names.
        groups: (M,) rows that hold the same image, exactly or nearly, share a number; others have their own. pairs: (P, 2)
            near copies beyond these: each two of a group are copies of each other.
        nearest: the nearest neighbours that findings rest on; None where nothing was compared.
        opinions: out-of-fold probabilities of labelled rows; None where there are none.
        near: thresholds and counts of the search for near copies. overlaps: pairs of classes that may be one.
        scores: accuracies before and after, see ``honest_score``.
        seconds: step -> how long it took. interrupted: whether it was cut short.
    """

    cache: FeatureCache
    root: Path | None = None
    findings: dict[Kind, list[Finding]] = dataclasses.field(default_factory=dict)
    not_done: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    groups: Indices = dataclasses.field(default_factory=lambda: np.empty(0, np.intp))
    pairs: Indices = dataclasses.field(default_factory=lambda: np.empty((0, 2), np.intp))
    nearest: Nearest | None = None
    near: NearCopies | None = None
    opinions: Opinions | None = None
    overlaps: tuple[Overlap, ...] = ()
    scores: tuple[Score, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    interrupted: bool = False

    def __iter__(self) -> Iterator[Finding]:
        """All findings, in the order of ``KINDS``."""
        return itertools.chain.from_iterable(self.findings.get(kind, ()) for kind in KINDS)

    def across_splits(self) -> Indices:
        """Rows of val and test whose image, exactly or nearly, also lies in a split before theirs (train, val, test)."""
        splits = self.cache.rows.splits
        if not len(self.groups):
            return np.empty(0, np.intp)
        later = [
            (splits > split) & copies_of(self.groups, self.pairs, splits == split)
            for split in range(1, len(SPLITS) - 1)
        ]
        return np.flatnonzero(np.any(later, axis=0))


class Cut(KeyboardInterrupt):
    """Ctrl-C in the middle: ``found`` holds what was finished by then."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found


def examine(
    cache: FeatureCache,
    *,
    root: Path | None = None,
    kinds: Collection[Kind] = KINDS,
    device: str = "auto",
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Found:
    """Look for everything in ``kinds``; what is not possible is said in ``Found.not_done``.

    Args:
        root: the folder of the cache's images, for what needs their pixels; None: there is none.
        device: for the neighbours: auto, cpu, cuda, cuda:N or mps. seed: of folds. workers: threads that read images.
        progress: called with steps done and to do, and the name of what is being done.

    Raises:
        UsageError: an unknown kind. CacheError: the cache is damaged. Cut: interrupted, with what was finished by then.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"no kind of finding is called {unknown[0]!r}; choose from {', '.join(KINDS)}")
    work = _Work(cache, root, frozenset(kinds), device, seed, workers or usable_cores(), progress or (lambda *_: None))
    try:
        for step in work.steps:
            step()
    except KeyboardInterrupt:
        raise Cut(work.found(interrupted=True)) from None
    return work.found()


class _Work:
    """Facts collected step by step."""

    def __init__(
        self,
        cache: FeatureCache,
        root: Path | None,
        kinds: frozenset[Kind],
        device: str,
        seed: int,
        workers: int,
        progress: Progress,
    ) -> None:
        self.cache, self.root, self.kinds = cache, root, kinds
        self.device, self.seed, self.workers, self.progress = device, seed, workers, progress
        self.facts: dict[str, Any] = {"findings": {}, "not_done": {}, "seconds": {}, "groups": np.arange(len(cache))}
        self.notes: list[str] = []
        self.rows = np.arange(len(cache))  # with finite features
        self.nearest: Nearest | None = None
        self.steps = (
            self._exact_copies,
            self._features,
            self._neighbours,
            self._near_copies,
            self._outliers,
            self._labels,
            self._scores,
            self._pictures,
        )

    def found(self, *, interrupted: bool = False) -> Found:
        """What there is by now."""
        facts = dict(self.facts)
        if interrupted:
            later = [*(kind for kind in KINDS if kind in self.kinds), "scores", "overlaps"]
            reasons = {kind: "interrupted" for kind in later if kind not in facts["findings"]}
            facts["not_done"] = reasons | facts["not_done"]
        return Found(self.cache, self.root, notes=tuple(self.notes), interrupted=interrupted, **facts)

    def _exact_copies(self) -> None:
        rows = self.cache.rows
        self.facts["groups"] = np.unique(first_copies(rows.digests), return_inverse=True)[1]
        if "exact_copy" in self.kinds:
            with self._timed("exact copies"):
                self._add("exact_copy", find_exact_copies(rows.digests, rows.labels, rows.splits))

    def _features(self) -> None:
        with self._timed("reading features"):
            bad = self.cache.rows_not_finite()
        if len(bad):
            self.rows = np.setdiff1d(self.rows, bad)
            self.notes.append(
                f"the features of {quantity(len(bad), 'image')} are not finite and compared with nothing, the first is "
                f"{self.cache.paths[bad[0]]}; extract again with --dtype float32 or --precision fp32"
            )

    def _neighbours(self) -> None:
        wanted = self.kinds & {"near_copy", "label", "outlier", "off_topic"}
        if not wanted:
            return
        seconds, size = estimate(len(self.rows), self.cache.dim)
        if len(self.rows) < 2:
            why = "there are no two images to compare"
        elif size > (free := available_memory()):
            why = f"comparing {len(self.rows):,} images needs about {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
        else:
            self._compare(seconds, size)
            return
        self._not_done(wanted, why)

    def _compare(self, seconds: float, size: int) -> None:
        """The neighbours, on which most findings rest."""
        _announce(f"comparing {len(self.rows):,} images on this CPU", seconds, size)
        with self._timed("comparing images") as report, self.cache.reader() as features:
            self.nearest = nearest_rows(features, self.rows, device=self.device, progress=report)
        self.facts["nearest"] = self.nearest

    def _near_copies(self) -> None:
        if self.nearest is None or "near_copy" not in self.kinds:
            return
        check = None
        if self.root is not None:
            _announce("comparing pictures", len(self.rows) * _OF_PICTURES[0] / self.workers, 0)
            check = PixelCheck(self.root, self.cache.paths, self.cache.rows.digests, workers=self.workers)
        with self._timed("near copies") as report:
            found = find_near_copies(
                self.nearest, self.cache.rows.digests, check=check, seed=self.seed, progress=report
            )
        groups = self.facts["groups"] + len(found.groups)  # of rows that were compared with nothing their exact copies
        groups[self.nearest.rows] = found.groups
        self.facts |= {"near": found, "groups": np.unique(groups, return_inverse=True)[1]}
        pairs = [(finding.row, finding.other) for finding in found.findings if finding.other is not None]
        self.facts["pairs"] = np.array(pairs, np.intp).reshape(-1, 2)
        self._add("near_copy", found.findings)

    def _outliers(self) -> None:
        if self.nearest is None:
            return
        y, groups = self.cache.y[self.nearest.rows], self.facts["groups"][self.nearest.rows]
        off_topic: list[Finding] = []
        if "off_topic" in self.kinds:
            with self._timed("off topic"), self.cache.reader() as features:
                self._add("off_topic", off_topic := find_off_topic(features, self.nearest.rows, y))
        if "outlier" in self.kinds:
            known = {finding.row for finding in off_topic}  # like no class at all: not like its own, either
            with self._timed("outliers"):
                found = find_outliers(self.nearest, y, groups=groups)
                self._add("outlier", [finding for finding in found if finding.row not in known])

    def _labels(self) -> None:
        """Suspects among all labelled rows, each judged by heads that saw neither it nor its copies."""
        wanted = self.kinds & {"label"}
        if not wanted or self.nearest is None:
            return
        y, groups = self.cache.y[self.nearest.rows], self.facts["groups"][self.nearest.rows]
        if not (y >= 0).any():
            self._not_done({*wanted, "overlaps"}, "there are no labels")
            return
        seconds, size = self._judging()
        if size > (free := available_memory()):
            self._not_done(
                {*wanted, "overlaps"}, f"it needs about {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
            )
            return
        _announce("judging labels", seconds, size)
        try:
            with self._timed("judging labels") as report, self.cache.reader() as features:
                probabilities = out_of_fold(features, self.nearest.rows, y, groups, seed=self.seed, progress=report)
        except SourceError as error:
            self._not_done({*wanted, "overlaps"}, str(error))
            return
        if np.isnan(probabilities).all():
            self._not_done(
                {*wanted, "overlaps"}, "there are no two classes with enough different images to judge labels by"
            )
            return
        self.facts["opinions"] = Opinions(self.nearest.rows, probabilities)
        self._add("label", find_label_errors(y, probabilities, self.nearest, groups=groups))
        self.facts["overlaps"] = tuple(find_overlaps(y, probabilities))

    def _judging(self) -> tuple[float, int]:
        """Seconds and bytes that ``out_of_fold`` takes."""
        labelled = int((self.cache.y >= 0).sum())
        return estimate_labels(labelled, self.cache.dim, len(self.cache.classes), cores=usable_cores())

    def _scores(self) -> None:
        """The score before and after; it speaks of all kinds, so that it is left out where only some are asked for."""
        if self.kinds != frozenset(KINDS):
            return
        usable = np.zeros(len(self.cache), np.bool_)
        usable[self.rows] = True
        exact = np.unique(first_copies(self.cache.rows.digests), return_inverse=True)[1]
        pairs = self.facts.get("pairs", np.empty((0, 2), np.intp))
        columns = self.cache.y, self.cache.rows.splits, exact, self.facts["groups"], usable, pairs
        _announce("scoring", 2 * self._judging()[0], 0)
        try:
            with self._timed("scores") as report, self.cache.reader() as features:
                self.facts["scores"] = honest_scores(Rows(features, *columns), seed=self.seed, progress=report)
        except (SourceError, UsageError) as error:
            self._not_done({"scores"}, str(error))

    def _pictures(self) -> None:
        wanted = self.kinds & {"dark", "blurred", "blank", "tiny"}
        if not wanted:
            return
        if self.root is None:
            self._not_done(wanted, NO_PICTURES)
            return
        _announce("looking at pictures", len(self.cache) * _OF_PICTURES[1] / self.workers, 0)
        with self._timed("pictures") as report:
            cache, workers = self.cache, self.workers
            looks, edges = measure_looks(self.root, cache.paths, cache.rows.digests, workers=workers, progress=report)
            missing = int(np.isnan(edges).sum())
            found = find_poor_images(np.arange(len(cache)), looks, edges)
        if missing == len(cache):
            self._not_done(wanted, f"no image of the cache lies unchanged below {self.root}")
            return
        if missing:
            self.notes.append(
                f"{quantity(missing, 'image was', 'images were')} not found unchanged below {self.root}; of these no pixels were seen"
            )
        for kind in KINDS:
            if kind in wanted:
                self._add(kind, [finding for finding in found if finding.kind == kind])

    def _add(self, kind: Kind, findings: list[Finding]) -> None:
        """The most remarkable first, groups together."""
        best: dict[int | None, float] = {}
        for finding in findings:
            best[finding.group] = max(best.get(finding.group, 0.0), finding.score)

        def place(finding: Finding) -> tuple[float, int, float, int]:
            if finding.group is None:
                return -finding.score, -1, 0.0, finding.row
            return -best[finding.group], finding.group, -finding.score, finding.row

        self.facts["findings"][kind] = sorted(findings, key=place)

    def _not_done(self, names: Collection[str], why: str) -> None:
        self.facts["not_done"] |= {name: why for name in [*KINDS, "scores", "overlaps"] if name in names}

    @contextmanager
    def _timed(self, step: str) -> Iterator[Callable[[int, int], None]]:
        """Time a step; what is yielded reports its progress."""
        started = time.perf_counter()
        self.progress(0, 1, step)
        try:
            yield lambda done, total: self.progress(done, total, step)
        finally:
            self.facts["seconds"][step] = round(time.perf_counter() - started, 3)


def _announce(what: str, seconds: float, size: int) -> None:
    """Say of long work how long it is, before it starts."""
    if seconds > _LONG:
        memory = f" and {size / 1e9:.1f} GB of memory" if size else ""
        log.info("%s takes about %s%s; Ctrl-C keeps what is finished", what, in_words(seconds), memory)


def in_words(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
