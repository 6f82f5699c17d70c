"""The page of an audit. In: findings, and the folder of their images. Out: HTML on which people decide, picture by picture.

Decisions are made, kept and saved by ``pages/audit.js``; without script the page is a list of what is to be looked at first.
"""

import datetime
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.curation.finding import KINDS, Kind
from featcache.reports.audit.columns import COPIES_SHOWN, Material, columns, gather, keep
from featcache.reports.audit.items import KEEPS, Item, Subject, items_of
from featcache.reports.elements.charts import Chart
from featcache.reports.elements.numbers import bytes_text, count_text
from featcache.reports.elements.page import render_page

MOST = 3000  # items on a page
BUDGET = 15_000_000  # bytes of a page's pictures
_STILL = 200  # items that are listed without script
WORDS: Mapping[Kind, tuple[str, str, str]] = {  # one of it, a heading, what it is
    "exact_copy": ("exact copies", "Exact copies", "files of the same bytes"),
    "near_copy": ("near copies", "Near copies", "one picture resized, cropped, recompressed"),
    "label": ("label suspect", "Label suspects", "another label fits better"),
    "outlier": ("outlier", "Outliers", "far from others of the class"),
    "off_topic": ("off topic", "Off topic", "like no class at all"),
    "dark": ("dark", "Dark", "hardly any light"),
    "blurred": ("blurred", "Blurred", "no sharp edge"),
    "blank": ("blank", "Blank", "next to no content"),
    "tiny": ("tiny", "Tiny", "too few pixels"),
}
HALF = (
    "About half of such flags are real: where people checked those of ten test sets, 51 % of the flagged labels were wrong "
    "(Northcutt et al. 2021). So look before you drop or relabel."
)


def audit_page(
    subject: Subject,
    *,
    title: str,
    root: Path | None,
    scores: Sequence[Sequence[str]] = (),
    chart: Chart | None = None,
    advice: Sequence[str] = (),
    not_done: Sequence[tuple[str, str]] = (),
    facts: Sequence[tuple[str, str]] = (),
    plan: str = "plan.csv",
    budget: int = BUDGET,
    most: int = MOST,
) -> str:
    """The page, as text. Files are only read.

    Args:
        root: the folder of the images; None: there are no pictures.
        scores: rows of texts: what is counted, accuracy, interval, images. chart: the same, drawn.
        advice: sentences. not_done: what was not looked for, and why. facts: where it comes from.
        plan: the name under which decisions are saved. budget: bytes of all pictures. most: items; the first of each kind.
    """
    items = items_of(subject, most=most)
    material = gather(subject, items, root, budget=budget)
    sentences = [*advice, *([HALF] if any(finding.kind == "label" for finding in subject.findings) else [])]
    return render_page(
        "audit.html",
        title=title,
        data={"audit": columns(material, [WORDS[kind][0] for kind in KINDS], KINDS, listed=_STILL) | {"plan": plan}},
        lead=_lead(subject),
        tiles=_tiles(subject),
        scores=scores,
        chart=chart,
        advice=sentences,
        not_done=not_done,
        review=_review(subject, items, material),
        kinds=[(KINDS.index(kind), WORDS[kind][1], n) for kind, n in _counts(items)],
        classes=subject.classes,
        splits=sorted({one.split for one in material.images.values() if one.split}, key=("train", "val", "test").index),
        crossing={"splits": _any_crossing(subject, items, "splits"), "labels": _any_crossing(subject, items, "labels")},
        items=items,
        still=[_still(material, item) for item in items[:_STILL]],
        keeps=KEEPS if any(item.is_copies for item in items) else "",
        plan=plan,
        facts=[
            *facts,
            ("made", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
            ("featcache", importlib.metadata.version("featcache")),
        ],
    )


def _things(count: int, one: str, several: str = "") -> str:
    return f"{count_text(count)} {one if count == 1 else several or one + 's'}"


def _lead(subject: Subject) -> str:
    n = len(subject.paths)
    concerned = len({finding.row for finding in subject.findings})
    if not concerned:
        return f"Nothing stands out among the {_things(n, 'image')}: no copies, no doubtful label, no odd picture was found."
    return f"{_things(concerned, 'image')} of {count_text(n)} {'is' if concerned == 1 else 'are'} worth a look. You decide; no file is touched."


def _tiles(subject: Subject) -> list[tuple[int, str, str, str]]:
    """Number, heading, count and note of each kind that was found."""
    counts = Counter(finding.kind for finding in subject.findings)
    found = []
    for number, kind in enumerate(KINDS):
        if counts[kind]:
            groups = len({finding.group for finding in subject.findings if finding.kind == kind})
            note = f"in {_things(groups, 'group')}: {WORDS[kind][2]}" if kind.endswith("copy") else WORDS[kind][2]
            found.append((number, WORDS[kind][1], count_text(counts[kind]), note))
    return found


def _counts(items: Sequence[Item]) -> list[tuple[Kind, int]]:
    counts = Counter(kind for item in items for kind in item.kinds)
    return [(kind, counts[kind]) for kind in KINDS if counts[kind]]


def _any_crossing(subject: Subject, items: Sequence[Item], what: str) -> bool:
    column = getattr(subject, what)
    return any(item.is_copies and len({int(column[row]) for row in item.rows}) > 1 for item in items)


def _review(subject: Subject, items: Sequence[Item], material: Material) -> list[str]:
    """What is to be said above the pictures."""
    said = []
    everything = len(items_of(subject, most=len(subject.findings) + 1)) if len(items) >= MOST else len(items)
    if everything > len(items):
        said.append(
            f"The page holds the {count_text(len(items))} of {count_text(everything)} that come first by score of their kind; "
            "audit.csv lists all."
        )
    if items and not material.uris:
        said.append(
            "There are no pictures: the images were not found where they were embedded from. Run the audit again with --source FOLDER "
            "to see them."
        )
    elif material.missing:
        said.append(
            f"{_things(material.missing, 'image')} could not be shown: the file is gone, was changed since, or cannot be decoded."
        )
    if material.left_out:
        said.append(
            f"{_things(material.left_out, 'picture')} are left out: those of this page are limited to {bytes_text(BUDGET)}."
        )
    return said


def _still(material: Material, item: Item) -> dict[str, Any]:
    """An item of the list without script."""
    images = [material.images[row] for row in item.rows]
    suggested = None if item.suggested is None else material.subject.classes[item.suggested]
    return {
        "kinds": ", ".join(WORDS[kind][0] for kind in item.kinds),
        "reasons": item.reasons,
        "images": images[:COPIES_SHOWN],
        "more": max(len(images) - COPIES_SHOWN, 0),
        "keep": keep(material, item),
        "suggested": suggested,
    }
