"""The page of an audit. In: what was found. Out: HTML on which people decide, picture by picture.

Decisions are made, kept and saved by ``pages/audit.js``; without script the page is a list of what is to be looked at first.
"""

import datetime
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from featcache.curation.audit import Found
from featcache.curation.finding import KINDS, Kind
from featcache.curation.honest_score import Score
from featcache.reports.audit.columns import COPIES_SHOWN, LISTED, Material, columns, gather
from featcache.reports.audit.items import KEEPS, Item, items_of
from featcache.reports.audit.text import how_sure, score_title, telling
from featcache.reports.elements.numbers import bytes_text, count_text, percent_text
from featcache.reports.elements.page import render_page
from featcache.system.path_advice import typed

MOST = 3000  # items on a page
BUDGET = 15_000_000  # bytes of a page's pictures
_STILL = 200  # items that are listed without script
WORDS: Mapping[Kind, tuple[str, str, str]] = {  # of one item, a heading, what it is
    "exact_copy": ("exact copies", "Exact copies", "the same bytes"),
    "near_copy": ("near copies", "Near copies", "one picture resized, cropped, recompressed"),
    "label": ("label suspect", "Label suspects", "another label fits better"),
    "outlier": ("outlier", "Outliers", "unusual for the class: look, most may be right"),
    "off_topic": ("off topic", "Off topic", "unlike every class: look, most may be right"),
    "dark": ("dark", "Dark", "hardly any light"),
    "blurred": ("blurred", "Blurred", "no sharp edge"),
    "blank": ("blank", "Blank", "next to no content"),
    "tiny": ("tiny", "Tiny", "too few pixels"),
}


def audit_page(
    found: Found,
    *,
    budget: int = BUDGET,
    most: int = MOST,
    listed: int = LISTED,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> str:
    """The page, as text. Files are only read.

    Args:
        budget: bytes of all pictures, about. most: items on the page; those of the highest scores of each kind are shown.
        listed: images of a cache up to which the page writes a plan of all by itself; of more it needs the one beside it.
        progress: called with pictures made and to make.
    """
    items = items_of(found, most=most)
    material = gather(found, items, budget=budget, progress=progress)
    cache = found.cache
    splits = sorted({one.split for one in material.images.values() if one.split}, key=("train", "val", "test").index)
    return render_page(
        "audit.html",
        title=f"Audit of {cache.path.name}",
        parts=("stats.css", "audit.css", "audit.js"),
        data={"audit": columns(material, [WORDS[kind][0] for kind in KINDS], still=_STILL, listed=listed)},
        lead=_lead(found),
        tiles=_tiles(found),
        scores=_scores(found.scores),
        unchanged=[
            f"{some[0].split.replace('_', ' ')}: {nothing}" for some, nothing in telling(found.scores) if nothing
        ],
        advice=_advice(found),
        not_done=[(_heading(name), why) for name, why in found.not_done.items()],
        review=_review(found, items, material),
        kinds=[(KINDS.index(kind), WORDS[kind][1], n) for kind, n in _counts(items)],
        classes=cache.classes,
        splits=splits,
        across_splits=_is_crossing(items, cache.rows.splits),
        across_labels=_is_crossing(items, cache.y),
        items=items,
        still=[_still(material, item) for item in items[:_STILL]],
        keeps=KEEPS if any(item.is_copies for item in items) else "",
        whole=len(cache) <= listed,
        extract=f"featcache extract clean.csv --root {typed(found.root or Path('FOLDER'))} -o {typed(cache.path)}",
        facts=_facts(found),
    )


def _things(count: int, one: str, several: str = "") -> str:
    return f"{count_text(count)} {one if count == 1 else several or one + 's'}"


def _heading(name: str) -> str:
    return {"scores": "The score", "overlaps": "Classes that are one"}.get(name) or WORDS[name][1]  # type: ignore[index]


def _lead(found: Found) -> str:
    n, concerned = len(found.cache), len({finding.row for finding in found})
    if concerned:
        are = "is" if concerned == 1 else "are"
        return f"{_things(concerned, 'image')} of {count_text(n)} {are} worth a look. You decide; no file is touched."
    if not found.findings:
        return f"Nothing was looked for among the {_things(n, 'image')}."
    looked = ", ".join(WORDS[kind][1].lower() for kind in found.findings)
    return f"Nothing stands out among the {_things(n, 'image')}. Looked for: {looked}."


def _tiles(found: Found) -> list[tuple[int, str, str, str]]:
    """Number, heading, count and note of each kind that was found."""
    tiles = []
    for kind in KINDS:
        if findings := found.findings.get(kind):
            groups = len({finding.group for finding in findings})
            note = f"in {_things(groups, 'group')}: {WORDS[kind][2]}" if kind.endswith("copy") else WORDS[kind][2]
            tiles.append((KINDS.index(kind), WORDS[kind][1], count_text(len(findings)), note))
    return tiles


def _scores(scores: Sequence[Score]) -> list[tuple[Any, ...]]:
    """Rows of a table: what is counted, accuracy, interval, images, and where the interval lies among all."""
    low = min((score.interval[0] for score in scores), default=0.0)
    high = max((score.interval[1] for score in scores), default=1.0)
    return [
        (
            score_title(score),
            percent_text(score.accuracy),
            f"{percent_text(score.interval[0])} to {percent_text(score.interval[1])}",
            count_text(score.n),
            _interval(score, low, high),
        )
        for some, _ in telling(scores)
        for score in some
    ]


def _interval(score: Score, low: float, high: float) -> Markup:
    """A bar from one end of the interval to the other, with a mark at the accuracy."""
    span = max(high - low, 1e-9)
    start, end, here = (100 * (value - low) / span for value in (*score.interval, score.accuracy))
    return Markup(
        '<svg class="share interval" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect x="{}" y="2" width="{}" height="4" class="band f1"/><rect x="{}" width="1.2" height="8"/></svg>'
    ).format(round(start, 2), round(max(end - start, 0.5), 2), round(min(max(here - 0.6, 0), 98.8), 2))


def _advice(found: Found) -> list[str]:
    """Sentences."""
    crossing = len(found.across_splits())
    said = []
    if crossing:
        said.append(
            f"{_things(crossing, 'image')} of val or test {'is' if crossing == 1 else 'are'} in an earlier split, too: scores on them "
            "count what was learnt by heart."
        )
    said += how_sure(found)
    names = found.cache.classes
    said += [
        f"{names[pair.first]} and {names[pair.second]} may be one class: {pair.reason}." for pair in found.overlaps[:5]
    ]
    if found.interrupted:
        said.append("The audit was interrupted; what was finished by then is here.")
    return [*said, *(note[:1].upper() + note[1:] + "." * (note[-1:] != ".") for note in found.notes)]


def _counts(items: Sequence[Item]) -> list[tuple[Kind, int]]:
    counts = Counter(kind for item in items for kind in item.kinds)
    return [(kind, counts[kind]) for kind in KINDS if counts[kind]]


def _is_crossing(items: Sequence[Item], column: Any) -> bool:
    return any(item.is_copies and len({int(column[row]) for row in item.rows}) > 1 for item in items)


def _review(found: Found, items: Sequence[Item], material: Material) -> list[str]:
    """What is to be said above the pictures."""
    said = []
    shown = {row for item in items for row in item.rows}
    if more := len({finding.row for finding in found} - shown):
        said.append(
            f"Here {'is' if len(items) == 1 else 'are'} the {_things(len(items), 'case')} that come first by the scores of their kinds; "
            f"{_things(more, 'image')} more {'is' if more == 1 else 'are'} in audit.csv."
        )
    if items and not material.uris:
        cut = "the audit was interrupted before they were made, or " if found.interrupted else ""
        said.append(
            f"There are no pictures here: {cut}the images were not found where they were embedded from. To see them, run "
            "featcache audit again with --source FOLDER."
        )
    elif material.missing:
        said.append(
            f"{_things(material.missing, 'image')} could not be shown: the file is gone, has changed since, or cannot be decoded."
        )
    if material.left_out:
        said.append(
            f"{_things(material.left_out, 'picture')} {'is' if material.left_out == 1 else 'are'} left out, to keep the page below "
            f"{bytes_text(BUDGET)}; those of higher scores are there."
        )
    return said


def _still(material: Material, item: Item) -> dict[str, Any]:
    """An item of the list without script."""
    images = [material.images[row] for row in item.rows]
    return {
        "kinds": ", ".join(WORDS[kind][0] for kind in item.kinds),
        "reasons": item.reasons,
        "images": images[:COPIES_SHOWN],
        "more": max(len(images) - COPIES_SHOWN, 0),
        "keep": material.keep(item),
        "suggested": None if item.suggested is None else material.found.cache.classes[item.suggested],
    }


def _facts(found: Found) -> list[tuple[str, str]]:
    """Where it comes from."""
    cache = found.cache
    pairs = [
        ("cache", str(cache.path)),
        ("images", f"{count_text(len(cache))}, embedded by {cache.spec.backbone}"),
        ("pictures from", "" if found.root is None else str(found.root)),
        ("took", ", ".join(f"{step} {seconds:.1f} s" for step, seconds in found.seconds.items())),
        ("made", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("featcache", importlib.metadata.version("featcache")),
    ]
    return [(word, value) for word, value in pairs if value]
