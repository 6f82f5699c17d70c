"""What is decided at once. In: findings, and what is known of their rows. Out: items, and columns for the page's script.

Copies that belong together are one item; whatever else is remarkable about an image is one item, too, so that nobody is asked
twice about one image. Of copies one is proposed to be kept; ``KEEPS`` is that rule in words.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from featcache.cache.format import Rows
from featcache.curation.audit import Found
from featcache.curation.finding import KINDS, Finding, Kind

COPIES: tuple[Kind, ...] = ("exact_copy", "near_copy")
KEEPS = (
    "Of copies the one in test is proposed to be kept, else the one in val, so that scores stay comparable; within a split the one "
    "whose label most of the group share, then the largest in pixels, then in bytes, as it was compressed least."
)
_LIKE = 5  # most similar images that an item shows
_ANSWERS = 4  # probabilities


@dataclasses.dataclass(frozen=True)
class Item:
    """Copies, or one image.

    Attributes:
        findings: what was found about it, the most important kind first. rows: in the order in which they are shown.
        score: the highest of its findings'.
    """

    findings: tuple[Finding, ...]
    rows: tuple[int, ...]

    @property
    def kinds(self) -> list[Kind]:
        """In the order of ``KINDS``."""
        there = {finding.kind for finding in self.findings}
        return [kind for kind in KINDS if kind in there]

    @property
    def score(self) -> float:
        """0..1."""
        return max(finding.score for finding in self.findings)

    @property
    def is_copies(self) -> bool:
        """Whether it is a group of copies."""
        return self.findings[0].kind in COPIES

    @property
    def suggested(self) -> int | None:
        """The class that fits better."""
        return next((finding.suggested for finding in self.findings if finding.suggested is not None), None)

    @property
    def reasons(self) -> list[str]:
        """Each once, in the order of the findings."""
        return list(dict.fromkeys(finding.reason for finding in self.findings))


def items_of(found: Found, *, most: int) -> list[Item]:
    """The items of the findings that are looked at first of each kind, ``most`` at most; by kind, then by score."""
    copies = [_copies(findings) for findings in _groups(found)]
    by_row: defaultdict[int, list[Finding]] = defaultdict(list)
    for finding in found:
        if finding.kind not in COPIES or finding.group is None:
            by_row[finding.row].append(finding)
    alone = [Item(tuple(sorted(of_row, key=_importance)), (row,)) for row, of_row in by_row.items()]
    items = sorted([*copies, *alone], key=lambda item: (_importance(item.findings[0])[0], -item.score, item.rows))
    if len(items) <= most:
        return items
    rank: defaultdict[Kind, int] = defaultdict(int)
    ranks = []
    for item in items:
        ranks.append(rank[item.kinds[0]])
        rank[item.kinds[0]] += 1
    first = sorted(range(len(items)), key=lambda k: (ranks[k], k))[:most]
    return [items[k] for k in sorted(first)]


def _importance(finding: Finding) -> tuple[int, float]:
    return KINDS.index(finding.kind), -finding.score


def _groups(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings about copies, together where they share a row or a group of their kind: exact copies of a near one are one group."""
    copies = [finding for finding in findings if finding.kind in COPIES and finding.group is not None]
    parents: dict[Any, Any] = {}

    def leader(key: Any) -> Any:
        while parents.setdefault(key, key) != key:
            parents[key] = key = parents[parents[key]]
        return key

    for finding in copies:
        parents[leader((finding.kind, finding.group))] = leader(finding.row)
    groups: defaultdict[Any, list[Finding]] = defaultdict(list)
    for finding in copies:
        groups[leader(finding.row)].append(finding)
    return list(groups.values())


def _copies(findings: Sequence[Finding]) -> Item:
    rows = sorted({finding.row for finding in findings})
    return Item(tuple(sorted(findings, key=_importance)), tuple(rows))


def proposed(rows: Rows, copies: Sequence[int], pixels: Sequence[int]) -> int:
    """The place among ``copies`` of the one to keep, by the rule that ``KEEPS`` says. ``pixels``: of each, 0: not known."""
    labels = rows.labels[list(copies)].tolist()
    keys = [
        (int(rows.splits[row]), labels.count(label), size, int(rows.sizes[row]), -place)
        for place, (row, label, size) in enumerate(zip(copies, labels, pixels, strict=True))
    ]
    return max(range(len(copies)), key=keys.__getitem__)


def answers(found: Found, item: Item) -> list[tuple[int, float]]:
    """Of one image the likeliest classes by a model that has not seen it, and its label, wherever that comes."""
    if item.is_copies or found.opinions is None:
        return []
    of = found.opinions.of(item.rows[0])
    best = [*of][:_ANSWERS]
    label = int(found.cache.y[item.rows[0]])
    if label in of and label not in best:
        best[-1] = label
    return [(k, of[k]) for k in best]


def most_alike(found: Found, item: Item) -> list[tuple[int, float]]:
    """Of one image the rows most similar to it, with their cosines."""
    nearest = found.nearest
    if item.is_copies or nearest is None:
        return []
    at = int(np.searchsorted(nearest.rows, item.rows[0]))
    if at == len(nearest.rows) or nearest.rows[at] != item.rows[0]:
        return []
    rows = nearest.rows[nearest.places[at, :_LIKE]].tolist()
    return list(zip(rows, nearest.similarities[at, :_LIKE].tolist(), strict=True))
