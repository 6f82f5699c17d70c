"""``audit``: what a cache tells about its images. In: a cache. Out: an ``Audit``, and a folder of files."""

import dataclasses
import logging
import os.path
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from featcache.cache.cache import FeatureCache
from featcache.curation.audit import Cut, Found, Progress, examine
from featcache.curation.finding import KINDS, Kind
from featcache.curation.honest_score import Score
from featcache.curation.plan import plan_lines
from featcache.errors import MissingDependencyError, SourceError, UsageError
from featcache.images.archives import is_home
from featcache.images.source import check_apart
from featcache.reports.audit.folder import COLUMNS, check_folder, write_folder
from featcache.reports.audit.page import audit_page
from featcache.reports.audit.text import audit_lines
from featcache.reports.elements.pictures import guess_root
from featcache.reports.notebook import Page, framed
from featcache.spec import SPLITS
from featcache.system.display import State, bar_in_notebook
from featcache.system.files import named
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_runtime_options, check_whole

log = logging.getLogger("featcache")
# Of the command's JSON: singular kinds in the plural.
_COUNTS: dict[str, Kind] = {
    "exact_copies": "exact_copy",
    "near_copies": "near_copy",
    "label_suspects": "label",
    "outliers": "outlier",
    "off_topic": "off_topic",
    "dark": "dark",
    "blurred": "blurred",
    "blank": "blank",
    "tiny": "tiny",
}


class Audit(Found):
    """What was found about a cache, see ``curation.audit.Found``, with names: rows, text, data frames, a page, a folder.

    ``audit.findings["label"]`` is a list of ``Finding``; ``audit.frame("label")`` the same as a pandas data frame, and
    ``audit.frame()`` all kinds; ``audit.not_done`` says what was not looked for and why; ``audit.scores`` are accuracies as
    given, without leaks and without label suspects.
    """

    def rows(self, kind: Kind | None = None) -> Iterator[dict[str, Any]]:
        """A row per finding, of one kind or all: the columns of ``audit.csv``, then ``reason``; None where it has none."""
        cache = self.cache
        for finding in self if kind is None else self.findings.get(kind, ()):
            label, suggested = int(cache.y[finding.row]), finding.suggested
            yield {
                "path": cache.paths[finding.row],
                "label": cache.classes[label] if label >= 0 else None,
                "split": SPLITS[split] if (split := int(cache.rows.splits[finding.row])) else None,
                "kind": finding.kind,
                "score": round(finding.score, 6),
                "group": finding.group,
                "verified": finding.verified,
                "other_path": None if finding.other is None else cache.paths[finding.other],
                "suggested_label": None if suggested is None else cache.classes[suggested],
                "reason": finding.reason,
            }

    def frame(self, kind: Kind | None = None) -> Any:
        """``rows`` as a ``pandas.DataFrame``, indexed by the number of the row in the cache, as ``FeatureCache.X`` is.

        Raises:
            MissingDependencyError: pandas is not installed. UsageError: an unknown kind.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingDependencyError("a data frame needs pandas: pip install pandas") from error
        if kind is not None and kind not in KINDS:
            raise UsageError(f"no kind of finding is called {kind!r}; choose from {', '.join(KINDS)}")
        rows = list(self.rows(kind))
        index = [finding.row for finding in (self if kind is None else self.findings.get(kind, ()))]
        # Texts as objects: a name that is not UTF-8 does not fit into pandas' own type.
        types = {"score": float, "group": "Int64", "verified": "boolean"}
        columns = {
            name: pd.Series([row[name] for row in rows], index, types.get(name, object))
            for name in (*COLUMNS, "reason")
        }
        return pd.DataFrame(columns)

    def to_json(self) -> dict[str, Any]:
        """What the command prints: how many findings of each kind (None: not looked for), images of val and test that an earlier
        split holds, accuracy as given and on honest terms, all scores, what was not done and why, seconds.
        """
        counts = {f"{name}": self._count(kind) for name, kind in _COUNTS.items()}
        given, clean = self._main_scores()
        return {
            "cache": str(self.cache.path),
            "source": None if self.root is None else str(self.root),
            "rows": len(self.cache),
            **counts,
            "cross_split": len(self.across_splits()),
            "overlaps": [
                {
                    "first": self.cache.classes[pair.first],
                    "second": self.cache.classes[pair.second],
                    "score": pair.score,
                }
                for pair in self.overlaps
            ],
            "accuracy": given and given.accuracy,
            "accuracy_interval": given and given.interval,
            "accuracy_clean": clean and clean.accuracy,
            "accuracy_clean_interval": clean and clean.interval,
            "scores": [dataclasses.asdict(score) for score in self.scores],
            "not_done": self.not_done,
            "notes": list(self.notes),
            "interrupted": self.interrupted,
            "steps": self.seconds,
            "seconds": round(sum(self.seconds.values()), 3),
        }

    def _count(self, kind: Kind) -> int | None:
        return len(self.findings[kind]) if kind in self.findings else None

    def _main_scores(self) -> tuple[Score | None, Score | None]:
        """As given and on honest terms: of test if there is one, else of val, else out of fold."""
        for split in ("test", "val", "out_of_fold"):
            if of_split := {score.terms: score for score in self.scores if score.split == split}:
                return of_split.get("as_given"), of_split.get("without_suspects") or of_split.get("without_leaks")
        return None, None

    def lines(self) -> list[str]:
        """As text for a terminal of 80 columns, names harmless to it."""
        return audit_lines(self)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind} {len(findings)}" for kind, findings in self.findings.items())
        return f"Audit({str(self.cache.path)!r}: {len(self.cache)} images; {counts})"

    def show(self) -> Page:
        """The page on which people decide; in a notebook the last value of a cell shows itself."""
        return Page(audit_page(self))

    def _repr_html_(self) -> str:
        return framed(audit_page(self))

    def save(self, folder: AnyPath, *, progress: Progress = lambda *_: None) -> Path:
        """Write audit.csv, audit.html, plan.csv and audit.json; returns where the plan is.

        An earlier audit is replaced. A plan.csv that was edited since stays, and the new one is called plan.new.csv.

        Args:
            progress: called with pictures made and to make, and what is being done.

        Raises:
            StorageError: the folder holds other things, lies among the images, or cannot be written.
        """
        target = named(as_path(folder))
        check_folder(target)
        _check_apart(target, self.cache, self.root)
        plan = plan_lines(self.cache, self)
        page = audit_page(self, progress=lambda done, total: progress(done, total, "pictures of the page"))
        name = write_folder(target, rows=self.rows(), page=page, plan=plan, facts=self.to_json())
        return target / name


def audit(
    cache: FeatureCache | AnyPath,
    output: AnyPath | None = None,
    *,
    source: AnyPath | None = None,
    kinds: Collection[Kind] = KINDS,
    device: str = "auto",
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Audit:
    """What a cache tells about its images: copies, wrong labels, outliers, poor pictures; and the score without leaks.

    Found are exact copies (by digest) and near copies (by neighbours, then by pixels), labels that out-of-fold probabilities
    and neighbours contradict, images far from their class or from all, classes that may be one, and pictures too dark, blurred,
    blank or tiny. About half of the flagged labels of well-known sets are wrong (Northcutt et al. 2021): look before you act.

    For cleanlab's Datalab, which takes the same features and probabilities (of labelled rows)::

        found, cache = featcache.audit("features.h5"), featcache.FeatureCache.open("features.h5")
        rows = found.opinions.known  # rows of which there are out-of-fold probabilities
        lab = cleanlab.Datalab({"y": cache.y[rows]}, label_name="y")
        lab.find_issues(features=cache.X[rows].astype("f4"), pred_probs=found.opinions.probabilities_of(rows))

    Args:
        cache: a file that ``extract`` wrote, or one that is open.
        output: a folder for audit.csv, audit.html and plan.csv, see ``Audit.save``; nothing is written when None.
        source: the folder of its images, for pixels and pictures; looked for near the cache when None. Files are only read, and
            count only where their bytes have the recorded digest.
        kinds: of findings to look for; with all of them comes the score.
        device: for neighbours: auto, cpu, cuda, cuda:N or mps. seed: of folds. workers: threads that read images.
        progress: called with steps done and to do, and what is being done; a bar in notebooks when None.

    Raises:
        CacheError: missing, not a cache, or damaged. UsageError: impossible values. SourceError: ``source`` is no folder.
        StorageError: as ``Audit.save``. KeyboardInterrupt: interrupted; what was finished is in ``output``.
    """
    started = time.perf_counter()
    check_runtime_options(device, workers=workers)
    check_whole("seed", seed, 0, 2**32 - 1)
    output = None if output is None else named(as_path(output))
    if not isinstance(cache, FeatureCache):
        cache = as_path(cache)
        check_path(cache, "cache", ("audit", HERE, *(() if output is None else ("-o", output))))
    if output is not None:
        check_folder(output)
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    root = _root(opened, source)
    if output is not None:
        _check_apart(output, opened, root)
    options: dict[str, Any] = {"root": root, "kinds": kinds, "device": device, "seed": seed, "workers": workers}
    try:
        with bar_in_notebook(progress, _describe) as report:
            found = _finished(examine(opened, progress=report, **options), started)
            if output is not None:
                _save_finished(found, output, report)
    except Cut as cut:
        if output is not None and cut.found.findings:
            log.warning(
                "interrupted: what is finished is in %s, the rest is named there as not done", _saved(cut.found, output)
            )
        raise
    return found


def _root(cache: FeatureCache, source: AnyPath | None) -> Path | None:
    if source is None:
        return guess_root(cache)
    root = as_path(source)
    if not is_home(root):
        raise SourceError(f"--source {root} is no folder; give the folder that holds the images")
    return root


def _check_apart(output: Path, cache: FeatureCache, root: Path | None) -> None:
    """Raise StorageError if ``output`` lies among the images. Beside a folder of all images, as a table names it, it does not."""
    if root is not None:
        top = os.path.commonpath([min(cache.paths), max(cache.paths)]) if len(cache) else ""
        check_apart(output, root / top)


def _finished(found: Found, started: float) -> Audit:
    """With names, and with the time that no step counts."""
    facts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    rest = time.perf_counter() - started - sum(found.seconds.values())
    return Audit(**facts | {"seconds": found.seconds | {"opening": round(rest, 3)}})


def _save_finished(found: Audit, output: Path, progress: Progress | None) -> None:
    """Interrupted while pictures are made: without them, as they are what takes long."""
    try:
        _saved(found, output, progress)
    except KeyboardInterrupt:
        place = _saved(dataclasses.replace(found, root=None, interrupted=True), output)
        log.warning("interrupted: all findings are in %s, the page has no pictures", place)
        raise


def _saved(found: Found, output: Path, progress: Progress | None = None) -> Path:
    audited = found if isinstance(found, Audit) else _finished(found, time.perf_counter())
    plan = audited.save(output, progress=progress or (lambda *_: None))
    if plan.name != "plan.csv":
        log.warning(
            "%s was edited since the last audit and stays as it is; the new plan is %s", output / "plan.csv", plan
        )
    return output


def _describe(done: int, total: int, what: str) -> State:
    return done, total, f"{what} {done}/{total}"
