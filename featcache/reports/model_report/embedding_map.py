"""Map and wall of pictures. In: a projection, and what is known of its rows. Out: a section of a page; ``map``, a page by itself.

The map is drawn twice: here as SVG, for print, papers and readers without script, and by ``pages/map.js`` on a canvas, where
pictures are pointed at and selected. Rows of a page are numbered so that those that have a card come first, by its number:
map, wall, tables and the list of pictures then mean the same by a row.
"""

import base64
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from featcache.cache.cache import FeatureCache
from featcache.errors import SourceError
from featcache.heads.head import Indices
from featcache.images.archives import is_home
from featcache.reports.elements.cards import Card, cards_data
from featcache.reports.elements.charts import Chart
from featcache.reports.elements.numbers import count_text
from featcache.reports.elements.page import Section, render_sections
from featcache.reports.elements.pictures import Pictures, guess_root
from featcache.reports.elements.projection import Method, Points, Projection, check_method, project
from featcache.reports.elements.wall import WALL, order_by_similarity
from featcache.reports.model_report.subject import Subject, drawn_evenly
from featcache.reports.notebook import Page
from featcache.spec import SPLITS
from featcache.system.display import middle_out, printable, quantity
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_whole

TINTS = 10  # that can be told apart: five colours, as discs and as squares; further classes are grey
_NAMED = 200  # classes whose names may stand on the map, the most frequent ones
_DRAWN = 4000  # points of the picture that is there without script
_WIDE, _HIGHEST, _FLATTEST, _ROOM = 660, 660, 400, 24  # of that picture, and the room about its points
_CARDS = 1200  # pictures of ``map``
_PICTURES = 3_000_000  # bytes
_MORE_PICTURES, _MORE_SIZE, _MORE_BYTES = 600_000, 64, 720  # bytes, pixels, and bytes each, of rows that have no card
_NOWHERE = -(2**15)  # of a card that is not on the map: it was refused


@dataclasses.dataclass(frozen=True, eq=False)
class Mapped:
    """N rows of a map.

    Attributes:
        projection: where they are. paths: N names. labels, predicted: (N,) numbers among ``classes``, -1: not known.
        splits: (N,) numbers among ``spec.SPLITS``. card: (N,) the number of its card, -1: none.
        pictures: data URIs of rows that have no card; "" where there is none.
    """

    projection: Projection
    paths: Sequence[str]
    labels: Indices
    predicted: Indices
    splits: Indices
    card: Indices
    classes: Sequence[str]
    pictures: Sequence[str] = ()


def map_section(mapped: Mapped, data: dict[str, Any], *, wall: Sequence[int] = ()) -> Section:
    """Map and wall. What the script needs goes into ``data["map"]``.

    Args:
        data: of the page, with ``cards``. wall: numbers of cards, in the order of the wall; empty: there is none.
    """
    count = len(data["cards"]["path"])
    beyond = np.flatnonzero(mapped.card < 0)
    places = np.full((count + len(beyond), 2), _NOWHERE, np.int16)
    spread = _spread(mapped.projection.points)
    places[mapped.card[mapped.card >= 0]] = spread[mapped.card >= 0]
    places[count:] = spread[beyond]
    data["map"] = {
        "x": _packed(places[:, 0], "<i2"),
        "y": _packed(places[:, 1], "<i2"),
        "path": [mapped.paths[row] for row in beyond.tolist()],
        "label": _packed(mapped.labels[beyond], "<i4"),
        "predicted": _packed(mapped.predicted[beyond], "<i4"),
        "split": _packed(mapped.splits[beyond], "<u1"),
        "splits": ["", *SPLITS[1:]],
        "pictures": [mapped.pictures[row] for row in beyond.tolist()] if mapped.pictures else [],
        "wall": list(wall),
    }
    names = [mapped.classes[label] if label >= 0 else "(no label)" for label in mapped.labels.tolist()]
    context = {
        "picture": map_chart(mapped.projection, names),
        "count": len(names),
        "legend": _legend(names),
        "colours": _colours(mapped),
        "words": words_of(mapped.projection),
        "sample": _sample_words(len(names)),
        "wall": len(wall) > 0,
        "wall_words": _wall_words(len(wall), count),
    }
    return Section("map", "Map", "map.html", context, parts=("map.css", "map.js"))


def words_of(projection: Projection) -> str:
    """How the map was made, and how far to trust it."""
    trust = ""
    if projection.trustworthiness is not None:
        of = "" if projection.sampled == len(projection.points) else f", of {count_text(projection.sampled)} images"
        trust = (
            f" Trustworthiness {projection.trustworthiness:.3f} (k = {projection.neighbours}{of}): 1 where all neighbours on "
            "the map are neighbours among the embeddings, about 0.5 by chance."
        )
    far = " Distances between groups, and their sizes, mean little." if projection.method == "tsne" else ""
    return f"{projection.words}{trust}{far}"


def map_chart(projection: Projection, names: Sequence[str]) -> Chart:
    """The map as a picture, coloured by ``names`` (N); of many rows a sample. The table: rows by name."""
    tints = _tints(names)
    rows = np.arange(len(names))
    if len(rows) > _DRAWN:
        rows = np.sort(np.random.default_rng(0).choice(rows, _DRAWN, replace=False))
    points = projection.points
    low, high = points.min(axis=0), points.max(axis=0)
    across, up = (high - low).tolist()
    tall = float(np.clip((_WIDE - 2 * _ROOM) * up / (across or 1) + 2 * _ROOM, _FLATTEST, _HIGHEST).round())
    scale = min((_WIDE - 2 * _ROOM) / (across or 1), (tall - 2 * _ROOM) / (up or 1))
    middle = (low + high) / 2
    x = _WIDE / 2 + (points[:, 0] - middle[0]) * scale
    y = tall / 2 - (points[:, 1] - middle[1]) * scale
    of_row = np.array([tints.get(name, 0) for name in names])
    wide = float(np.clip(28 / max(len(rows), 1) ** 0.22, 3, 8))
    parts = []
    for tint in sorted(set(of_row.tolist())):  # grey ones first, beneath the others
        path = "".join(f"M{x[row]:.1f} {y[row]:.1f}h0" for row in rows[of_row[rows] == tint].tolist())
        size = wide if _is_disc(tint) else wide * 0.88
        parts.append(
            Markup('<path class="dots {} {}" stroke-width="{:.1f}" d="{}"/>').format(
                _colour(tint, "s"), "" if _is_disc(tint) else "square", size, path
            )
        )
    if len(set(names)) > 1:
        parts += _named(x, y, names)
    title, words = "Map of embeddings", f"{words_of(projection)} {_sample_words(len(names))}".strip()
    svg = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>').format(
        _WIDE, f"{tall:.0f}", title, words, Markup().join(parts)
    )
    table = tuple((printable(name), count_text(n)) for name, n in Counter(names).most_common())
    return Chart(title, svg, ("class", "images"), table, words)


def order_wall(features: Any, rows: Indices, cards: Indices, shown: Sequence[bool]) -> list[int]:
    """Numbers of cards, similar ones beside each other: those that have a picture, at most ``WALL``, drawn evenly.

    Args:
        features: (M, D). rows: (n,) rows of it, cards: (n,) their cards. shown: of each card of the page, has it a picture?
    """
    kept = np.flatnonzero(np.array(shown, bool)[cards]) if len(cards) else np.empty(0, np.intp)
    if len(kept) > WALL:
        kept = np.sort(np.random.default_rng(0).choice(kept, WALL, replace=False))
    if not len(kept):
        return []
    X = np.asarray(features[rows[kept]], np.float32)
    norms = np.linalg.norm(X, axis=1, keepdims=True)
    order = order_by_similarity(X / np.where(norms == 0, 1, norms))
    found: list[int] = cards[kept[order]].tolist()
    return found


def report_map(subject: Subject, data: dict[str, Any], *, method: Method) -> Section | None:
    """Map and wall of a report: all rows of its cache; None where there is no cache, or hardly a row."""
    cache, scored = subject.cache, subject.scored
    if method == "none" or cache is None or scored.rows is None or len(cache) < 3:
        return None
    names: list[str] = data["cards"]["classes"]
    names += [name for name in cache.classes if name not in set(names)]
    number = {name: k for k, name in enumerate(names)}
    of_cache = np.array([*(number[name] for name in cache.classes), -1])  # the last: of -1
    card, predicted = np.full(len(cache), -1), np.full(len(cache), -1)
    has_row = subject.rows >= 0
    card[scored.rows[subject.rows[has_row]]] = np.flatnonzero(has_row)
    predicted[scored.rows] = subject.predicted
    shown = [one.thumbnail is not None for one in subject.cards]
    with cache.reader() as features:
        projection = project(features, np.arange(len(cache)), method=method)
        placed = np.flatnonzero(card >= 0)
        wall = order_wall(features, placed, card[placed], shown)
    assert projection is not None
    splits = cache.rows.splits.astype(np.intp)
    pictures = _more_pictures(cache, card, subject.pictures)
    mapped = Mapped(projection, cache.paths, of_cache[cache.y], predicted, splits, card, names, pictures)
    return map_section(mapped, data, wall=wall)


def map(
    cache: FeatureCache | AnyPath, source: AnyPath | None = None, *, method: Method = "auto", seed: int = 0
) -> Page:
    """Lay the images of a cache out on a plane, similar ones near each other, and beside it on a wall of pictures.

    Args:
        cache: a cache, or its path. source: the folder of its images; looked for near the cache when None. Pictures are shown
            of files whose bytes are those that were embedded, of a sample if there are many.
        method: ``pca``; ``tsne`` (needs the ``report`` extra); ``auto``: t-SNE where it takes less than a minute.
        seed: of t-SNE, and of the sample that has pictures.

    Returns:
        A page, which shows itself in a notebook.

    Raises:
        SourceError: the cache has no rows; ``source`` is no folder. UsageError, MissingDependencyError: as ``project``.
        CacheError: the cache cannot be read.
    """
    check_method(method, ("auto", "pca", "tsne"))
    check_whole("seed", seed, 0, 2**32 - 1)
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    if not len(opened):
        raise SourceError(f"{opened.path} has no rows; a map needs some")
    root = None if source is None else as_path(source)
    if root is not None and not is_home(root):
        raise SourceError(f"{root} is no folder; give the folder that holds the images of {opened.path}")
    root = root or guess_root(opened)
    chosen = np.sort(drawn_evenly(np.arange(len(opened)), opened.y, _CARDS, seed=seed))
    cards = _cards(opened, chosen, Pictures(root))
    data: dict[str, Any] = {"cards": cards_data(cards, opened.classes)}
    nothing = np.full(len(opened), -1)
    card = nothing.copy()
    card[chosen] = np.arange(len(chosen))
    with opened.reader() as features:
        projection = project(features, np.arange(len(opened)), method=method, seed=seed)
        wall = order_wall(features, chosen, card[chosen], [one.thumbnail is not None for one in cards])
    assert projection is not None
    splits = opened.rows.splits.astype(np.intp)
    mapped = Mapped(projection, opened.paths, opened.y.astype(np.intp), nothing, splits, card, opened.classes)
    sections = [
        map_section(mapped, data, wall=wall),
        Section("pictures", "Pictures", "report_pictures.html", {"cards": cards, "lists": [], "notes": []}),
    ]
    title = f"Map of {opened.path.name}"
    return Page(render_sections(sections, title=title, lead=_lead(opened, cards, root), data=data))


def _lead(cache: FeatureCache, cards: Sequence[Card], root: Path | None) -> str:
    shown = sum(card.thumbnail is not None for card in cards)
    pictures = f"{count_text(shown)} of them have their picture here."
    if root is None:
        pictures = "No pictures: give the folder of the images as source."
    elif shown == len(cache):
        pictures = "All of them have their picture here."
    classes = f", {quantity(len(cache.classes), 'class')}" if len(cache.classes) > 1 else ""
    return f"{quantity(len(cache), 'image')}{classes}, embedded by {cache.spec.backbone}. {pictures}"


def _cards(cache: FeatureCache, rows: Indices, pictures: Pictures) -> list[Card]:
    names = [cache.paths[row] for row in rows.tolist()]
    digests = [digest.tobytes() for digest in cache.rows.digests[rows]]
    small = pictures.thumbnails(names, digests, budget=_PICTURES)
    return [
        Card(
            name,
            one.uri,
            one.reason,
            None if cache.y[row] < 0 else cache.classes[cache.y[row]],
            split=SPLITS[cache.rows.splits[row]] if cache.rows.splits[row] else "",
        )
        for name, one, row in zip(names, small, rows.tolist(), strict=True)
    ]


def _more_pictures(cache: FeatureCache, card: Indices, pictures: Pictures) -> list[str]:
    """Small pictures of some of the rows that have no card, as data URIs; "" of the others."""
    found = [""] * len(cache)
    beyond = np.flatnonzero(card < 0)
    rows = drawn_evenly(beyond, cache.y[beyond], _MORE_PICTURES // _MORE_BYTES).tolist()
    names, digests = [cache.paths[row] for row in rows], [cache.rows.digests[row].tobytes() for row in rows]
    small = pictures.thumbnails(names, digests, budget=_MORE_PICTURES, size=_MORE_SIZE)
    for row, one in zip(rows, small, strict=True):
        found[row] = one.uri or ""
    return found


def _spread(points: Points) -> npt.NDArray[np.int16]:
    """(N, 2) -> the same about 0, the longer side as far as int16 goes."""
    low, high = points.min(axis=0), points.max(axis=0)
    half = float((high - low).max()) / 2 or 1.0
    return np.asarray(np.rint((points - (low + high) / 2) / half * 32767), np.int16)


def _packed(values: Any, kind: str) -> str:
    return base64.b64encode(np.asarray(values).astype(kind).tobytes()).decode()


def _tints(names: Sequence[str]) -> dict[str, int]:
    """The most frequent names, in the order of their first letters: 1..``TINTS``. The script does the same."""
    most = [name for name, _ in sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0]))[:TINTS]]
    return {name: number for number, name in enumerate(sorted(most), 1)}


def _is_disc(tint: int) -> bool:
    return tint <= 5


def _colour(tint: int, kind: str) -> str:
    return f"{kind}{(tint - 1) % 5 + 1}" if tint else f"{kind}0"


def _sample_words(count: int) -> str:
    return f"{count_text(_DRAWN)} of {count_text(count)} images are drawn." if count > _DRAWN else ""


def _legend(names: Sequence[str]) -> list[tuple[str, str, str, int]]:
    counts, tints = Counter(names), _tints(names)
    rows = [("●" if _is_disc(tint) else "■", _colour(tint, "k"), name, counts[name]) for name, tint in tints.items()]
    if rest := sum(counts.values()) - sum(row[3] for row in rows):
        rows.append(("●", "k0", f"{quantity(len(counts) - len(tints), 'other class', 'other classes')}", rest))
    return rows


def _named(x: Points, y: Points, names: Sequence[str]) -> list[Markup]:
    """The names of classes where most of their points are; those that would cover another are left out."""
    parts: list[Markup] = []
    taken: list[tuple[float, float, float]] = []
    number = {name: k for k, name in enumerate(dict.fromkeys(names))}
    of_row = np.array([number[name] for name in names])  # an array of the names would cut NUL off their ends
    _, spread = _middle(x, y)
    for name, count in Counter(names).most_common(_NAMED):
        rows = np.flatnonzero(of_row == number[name])
        nearest, near = _middle(x[rows], y[rows])
        middle = rows[nearest]
        if len(number) > TINTS and near > 0.4 * spread:  # it lies all over the map
            continue
        text = middle_out(printable(name), 24)
        at, up, wide = float(x[middle]), float(y[middle]), 7.5 * len(text)
        if count < 3 or any(abs(at - a) < (wide + w) / 2 and abs(up - b) < 16 for a, b, w in taken):
            continue
        taken.append((at, up, wide))
        parts.append(
            Markup('<text class="place" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(at, up + 4, text)
        )
    return parts


def _middle(x: Points, y: Points) -> tuple[int, float]:
    """Which of some points is the nearest to where most of them are, and how near half of them are to it."""
    nearest = int(((x - np.median(x)) ** 2 + (y - np.median(y)) ** 2).argmin())
    return nearest, float(np.median(np.hypot(x - x[nearest], y - y[nearest])))


def _colours(mapped: Mapped) -> list[tuple[str, str]]:
    """What the map can be coloured by: keys of the script, and words."""
    ways = [("label", "label", mapped.labels), ("predicted", "prediction", mapped.predicted)]
    found = [(key, word) for key, word, column in ways if (column >= 0).any()]
    if ((mapped.labels >= 0) & (mapped.predicted >= 0)).any():
        found.append(("correct", "outcome"))
    if len(np.unique(mapped.splits)) > 1:
        found.append(("split", "split"))
    return found or [("label", "label")]


def _wall_words(count: int, cards: int) -> str:
    some = f"{count_text(count)} of {count_text(cards)} pictures. " if count < cards else ""
    return f"{some}In the order of a hierarchical clustering (Ward) whose leaves are ordered optimally."
