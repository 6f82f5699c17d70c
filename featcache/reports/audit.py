"""``audit``: what a cache tells about its images, in words, tables and a folder. In: a cache. Out: an ``Audit``."""

import dataclasses
import time
from collections.abc import Collection, Iterator
from typing import Any

from featcache.cache.cache import FeatureCache
from featcache.curation.audit import Found, Progress, examine
from featcache.curation.finding import KINDS, Kind
from featcache.reports.elements.pictures import guess_root
from featcache.spec import SPLITS
from featcache.system.path_kinds import AnyPath, as_path


class Audit(Found):
    """``curation.audit.Found``, with names: rows of tables, text, data frames, a folder of files."""

    def rows(self, kind: Kind | None = None) -> Iterator[dict[str, Any]]:
        """A row per finding, of one kind or all, the columns of ``audit.csv``; what a finding does not have is None."""
        cache = self.cache
        for finding in self if kind is None else self.findings.get(kind, ()):
            label, suggested = int(cache.y[finding.row]), finding.suggested
            yield {
                "path": cache.paths[finding.row],
                "label": cache.classes[label] if label >= 0 else None,
                "split": SPLITS[cache.rows.splits[finding.row]],
                "kind": finding.kind,
                "score": finding.score,
                "group": finding.group,
                "verified": finding.verified,
                "other_path": None if finding.other is None else cache.paths[finding.other],
                "suggested_label": None if suggested is None else cache.classes[suggested],
            }


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
    """What a cache tells about its images: copies, wrong labels, outliers, poor pictures, and the score without them."""
    started = time.perf_counter()
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(as_path(cache))
    root = guess_root(opened) if source is None else as_path(source)
    found = examine(opened, root=root, kinds=kinds, device=device, seed=seed, workers=workers, progress=progress)
    facts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return Audit(**facts | {"seconds": facts["seconds"] | {"all": round(time.perf_counter() - started, 3)}})
