"""Charts as SVG. In: numbers. Out: a ``Chart``: a picture within a page, its numbers as a table, or a file for a paper.

Charts are drawn in Python, so that they are there without script, in print and for screen readers. Colours are classes of
``pages/style.css``; what colours tell apart, shapes, dashes or words tell apart, too. No style attribute: pages forbid them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from featcache.heads.metrics import accuracy_interval
from featcache.reports.elements.chart_parts import (
    BOTTOM,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    apart,
    bar_at,
    clipped,
    fitting,
    frame,
    left_of,
    line_between,
    marked_at,
    rounded,
    span_of,
    text_at,
)
from featcache.reports.elements.numbers import count_text, number_text, percent_text
from featcache.system.display import printable, quantity

_DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart: ``{{ chart }}`` in a template is its figure, caption and table included.

    Attributes:
        title: what it shows. caption: what to read from it; may be empty. svg: the picture.
        header, rows: the same numbers as a table.
    """

    title: str
    svg: Markup
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __html__(self) -> str:
        """As HTML: a figure whose numbers unfold beneath it."""
        head = Markup().join(Markup('<th scope="col">{}</th>').format(printable(cell)) for cell in self.header)
        rows = Markup().join(
            Markup("<tr>{}</tr>").format(
                Markup().join(Markup("<td><bdi>{}</bdi></td>").format(printable(cell)) for cell in row)
            )
            for row in self.rows
        )
        return Markup(
            '<figure class="chart"><figcaption><b>{title}</b>{caption}</figcaption>{svg}<details><summary>Numbers</summary>'
            '<div class="scroll" tabindex="0" role="region" aria-label="Numbers: {title}"><table><thead><tr>{head}</tr></thead>'
            "<tbody>{rows}</tbody></table></div></details></figure>"
        ).format(
            title=printable(self.title),
            caption=Markup(" {}").format(printable(self.caption)) if self.caption else "",
            svg=self.svg,
            head=head,
            rows=rows,
        )


@dataclasses.dataclass(frozen=True)
class Series:
    """A line: ``y`` over ``x``, with the interval ``low``..``high`` about it, if given. NaN and None are gaps.

    ``points``: a dot at each value, unless the chart has none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    points: bool = True


@dataclasses.dataclass(frozen=True)
class Bins:
    """Of a reliability diagram: mean confidence and accuracy (0..1) and the number of images per bin."""

    confidence: Sequence[float]
    accuracy: Sequence[float]
    count: Sequence[int]


def bars(
    rows: Sequence[tuple[str, float]],
    *,
    title: str,
    caption: str = "",
    percent: bool = False,
    highest: float | None = None,
    line: tuple[float, str] | None = None,
    marked: Sequence[str] = (),
    columns: tuple[str, str] = ("", "value"),
) -> Chart:
    """A bar per row, with its name and value.

    Args:
        percent: values are shares, 0..1. highest: what fills the width; 1 for shares, else the largest value.
        line: a value to compare with, drawn across all bars, and what it is. marked: names whose bars stand out.
    """
    top = highest or (1.0 if percent else max([value for _, value in rows] + [line[0] if line else 0]) or 1.0)
    texts = [percent_text(value) if percent else number_text(value) for _, value in rows]
    left = min(150.0, LETTER * max([len(printable(name)) for name, _ in rows], default=0) + 10)
    right = WIDTH - 10 - LETTER * max(map(len, texts), default=0)
    axis = Axis(0, top, left, right)
    parts = [Markup()]
    for number, ((name, value), text) in enumerate(zip(rows, texts, strict=True)):
        y = 6 + 22 * number + (18 if line else 0)
        kind = "bar marked" if name in marked else "bar"
        wide = max(axis.at(min(max(value, 0), top)) - left, 1 if value else 0)
        parts += [
            text_at(left - 6, y + 12, fitting(name, left - 8), "end", whole=name),
            Markup('<rect class="trough" x="{}" y="{}" width="{}" height="14"/>').format(
                rounded(left), y, rounded(right - left)
            ),
            Markup('<rect class="{}" x="{}" y="{}" width="{}" height="14"/>').format(
                kind, rounded(left), y, rounded(wide)
            ),
            text_at(right + 6, y + 12, text, "start", "value"),
        ]
    height = 10 + 22 * len(rows) + (18 if line else 0)
    if line:
        x, label = axis.at(line[0]), f"{line[1]} {percent_text(line[0]) if percent else number_text(line[0])}"
        side = "end" if x > WIDTH / 2 else "start"
        parts += [line_between(x, 20, x, height, "reference"), text_at(x, 13, label, side, "note")]
    table = tuple((name, text) for (name, _), text in zip(rows, texts, strict=True))
    return _chart(title, caption, parts, height, columns, table)


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    caption: str = "",
    log_x: bool = False,
    percent_x: bool = False,
    percent_y: bool = False,
    y_range: tuple[float, float] | None = None,
    floor: float | None = None,
    mark: tuple[float, str] | None = None,
    level: tuple[float, str] | None = None,
    points: bool = True,
    x_text: Callable[[float], str] | None = None,
) -> Chart:
    """Lines with points, named at their ends, with a band where a series has an interval.

    Args:
        log_x: x in powers of ten; values that are not positive are left out. y_range: what the axis spans at least; what
            the values span, and a little more, when not given. floor: where the axis begins; lines below it run out of sight.
        mark: an x that was chosen, and its word. level: a y to compare with, and its word, or none.
        points: a dot at each value; false for curves of hundreds. x_text: an x in words, as ``numbers.bytes_text``.
    """
    kept = [_clean(each, log_x) for each in series]
    xs = [x for each in kept for x in each.x] + ([mark[0]] if mark else [])
    ys = [y for each in kept for y in (*each.y, *each.low, *each.high) if y is not None] + ([level[0]] if level else [])
    low, high = span_of([y for y in ys if floor is None or y >= floor], y_range, percent_y)
    low = low if floor is None else floor
    names = [fitting(each.name, 100) for each in kept]
    named = len(kept) > 1
    right = WIDTH - (28 + LETTER * max(map(len, names), default=0) if named else RIGHT)
    whole = not percent_x and all(x == round(x) for x in xs)
    top = TOP + (14 if mark else 0)
    up = Axis(low, high, 220 - BOTTOM, top, percent=percent_y)
    left = left_of(up)
    across = Axis(min(xs, default=1), max(xs, default=2), left + 4, right - 4, log_x, percent_x, x_text, whole)
    parts = frame(across, up, right, x_label, y_label, left=left)
    y_level = up.at(level[0]) if level else 0.0
    if level:
        parts.append(line_between(left, y_level, right, y_level, "reference"))
    if mark:
        parts += marked_at(across.at(mark[0]), mark[1], top, 220 - BOTTOM)
    drawn: list[Markup] = []
    for number, each in enumerate(kept):
        drawn += _drawn(each, number, across, up, points=points and each.points)
    parts += clipped(drawn, right, top - 6, 220 - BOTTOM) if floor is not None else drawn
    if level and level[1]:
        drawn_at = [[(across.at(x), up.at(y)) for x, y in zip(e.x, e.y, strict=True) if y is not None] for e in kept]
        parts.append(_beside(y_level, level[1], left + 6, right - 4, drawn_at))
    if named:
        ends = [up.at(max(next((y for y in reversed(each.y) if y is not None), low), low)) for each in kept]
        for number, (name, y) in enumerate(zip(names, apart(ends, 14, top + 4, 220 - BOTTOM), strict=True)):
            point = _point(right + 9, y, number, f"f{number % 6 + 1}")
            parts += [point, text_at(right + 18, y + 4, name, "start", "name", whole=series[number].name)]
    header = ("series", x_label, y_label) + (("low", "high") if any(each.low for each in kept) else ())
    in_words = (x_text or (percent_text if percent_x else number_text), percent_text if percent_y else number_text)
    return _chart(title, caption, parts, 220, header, _rows(kept, *in_words, len(header) > 3))


def reliability(before: Bins, after: Bins | None = None, *, title: str = "Reliability", caption: str = "") -> Chart:
    """Accuracy against confidence: on the diagonal, probabilities mean what they say. Bars below: images per bin.

    A whisker is the 95 % interval of a bin's accuracy: no line joins bins, as one of a few images would draw all eyes.
    ``after``: the same once logits are divided by the temperature (Guo et al. 2017).
    """
    size, low = 240.0, 40.0  # of the field, and of the counts beneath it
    up = Axis(0, 1, TOP + size, TOP, percent=True)
    left = left_of(up) if after else (WIDTH - size) / 2 + 10  # names to the right of the field
    across = Axis(0, 1, left, left + size, percent=True)
    base = TOP + size + 30 + low
    parts = frame(across, up, left + size, "", "accuracy", left=left)
    parts.append(line_between(across.at(0), up.at(0), across.at(1), up.at(1), "reference"))
    kinds = [("before temperature", before), ("after temperature", after)] if after else [("", before)]
    table: list[tuple[str, ...]] = []
    for number, (name, bins) in enumerate(kinds):
        most = max(max(each.count, default=0) for _, each in kinds) or 1
        there = [row for row in zip(bins.confidence, bins.accuracy, bins.count, strict=True) if row[2]]
        for confidence, accuracy, count in there:
            x, ends = across.at(confidence), accuracy_interval(round(accuracy * count), count)
            parts.append(line_between(x, up.at(ends[0]), x, up.at(ends[1]), f"whisker s{number + 1}"))
        parts += [_point(across.at(x), up.at(y), number, f"f{number + 1}") for x, y, _ in there]
        for confidence, accuracy, count in there:
            tall = max(low * count / most, 1.0)
            x = across.at(confidence) - 5 + (len(kinds) - 1) * (10 * number - 5) / 2
            parts.append(
                bar_at(x, base - tall, 9 if len(kinds) == 1 else 5, tall, f"f{number + 1}", quantity(count, "image"))
            )
            table.append(
                (*([name] if name else []), percent_text(confidence), percent_text(accuracy), count_text(count))
            )
        if name:
            x, y = left + size + 16, TOP + 6 + 18 * number
            parts += [_point(x, y, number, f"f{number + 1}"), text_at(x + 9, y + 4, name, "start", "name")]
    parts += [line_between(left, base, left + size, base, "axis"), text_at(left - 8, base, "images", "end", "tick")]
    parts.append(text_at(left + size / 2, base + 20, "probability of the answer", "middle", "label"))
    header = (*(["when"] if after else []), "probability", "accuracy", "images")
    return _chart(title, caption, parts, base + 28, header, tuple(table))


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    title: str,
    x_label: str,
    caption: str = "",
    log_x: bool = False,
    percent_x: bool = False,
    mark: tuple[float, str] | None = None,
    x_text: Callable[[float], str] | None = None,
) -> Chart:
    """``counts`` (B) of values between ``edges`` (B + 1), which are drawn to scale; see ``lines``."""
    across = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT, log_x, percent_x, x_text)
    top = TOP + (14 if mark else 0)
    up = Axis(0, max([*counts, 1]) * 1.05, 180 - BOTTOM, top, whole=True)
    parts = frame(across, up, WIDTH - RIGHT, x_label, "images")
    texts = [(x_text or (percent_text if percent_x else number_text))(edge) for edge in edges]
    ranges = [f"{low} to {high}" for low, high in itertools.pairwise(texts)]
    for number, count in enumerate(counts):
        x, stop, y = across.at(edges[number]), across.at(edges[number + 1]), up.at(count)
        hint = f"{ranges[number]}: {count_text(count)}"
        parts.append(bar_at(x + 0.5, y, max(stop - x - 1, 0.5), 180 - BOTTOM - y, "bar", hint) if count else Markup())
    if mark:
        parts += marked_at(across.at(mark[0]), mark[1], top, 180 - BOTTOM)
    table = tuple((name, count_text(count)) for name, count in zip(ranges, counts, strict=True))
    return _chart(title, caption, parts, 180, (x_label, "images"), table)


def sizes(counts: Sequence[Sequence[int]], *, title: str, caption: str = "") -> Chart:
    """How many images have which width and height: a disc for each (width, height, count), its area the count."""
    widths, heights = ([row[k] for row in counts] for k in (0, 1))
    across = Axis(min(widths) / 1.15, max(widths) * 1.15, LEFT + 6, WIDTH - RIGHT, log=True)
    up = Axis(min(heights) / 1.15, max(heights) * 1.15, 260 - BOTTOM, TOP, log=True)
    parts = frame(across, up, WIDTH - RIGHT, "width in pixels", "height", left=LEFT + 6)
    most = max(row[2] for row in counts)
    for width, height, count in counts:
        radius = max(16 * math.sqrt(count / most), 2)
        disc = Markup('<circle class="disc" cx="{}" cy="{}" r="{}"><title>{}</title></circle>')
        hint = f"{width} x {height}: {count_text(count)}"
        parts.append(disc.format(rounded(across.at(width)), rounded(up.at(height)), rounded(radius), hint))
    table = tuple((str(width), str(height), count_text(count)) for width, height, count in counts[:100])
    return _chart(title, caption, parts, 260, ("width", "height", "images"), table)


def top_bars(shares: Sequence[float]) -> Markup:
    """The likeliest classes' shares as bars, tiny and in few bytes: pages have thousands. What they are is said elsewhere."""
    path = "".join(f"M0 {3 * row}h{rounded(100 * p)}v2H0z" for row, p in enumerate(shares) if p >= 5e-4)
    return Markup('<svg class="likely" viewBox="0 0 100 {}"><path d="{}"/></svg>').format(3 * len(shares) - 1, path)


def share_bar(share: float, *, words: str = "", kind: str = "") -> Markup:
    """A share, 0..1, as one bar in a cell of a table; ``words``: for who does not see it; none where the cell says it."""
    hidden = Markup('role="img" aria-label="{}"').format(printable(words)) if words else Markup('aria-hidden="true"')
    return Markup(
        '<svg class="share {}" viewBox="0 0 100 8" preserveAspectRatio="none" {}><rect width="{}" height="8"/></svg>'
    ).format(kind, hidden, rounded(100 * min(max(share, 0.0), 1.0)))


def _chart(
    title: str,
    caption: str,
    parts: Sequence[Markup],
    height: float,
    header: tuple[str, ...],
    rows: tuple[tuple[str, ...], ...],
) -> Chart:
    svg = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>').format(
        WIDTH, rounded(height), printable(title), printable(caption or title), Markup().join(parts)
    )
    return Chart(title, svg, header, rows, caption)


def _beside(y: float, word: str, left: float, right: float, lines: Sequence[Sequence[tuple[float, float]]]) -> Markup:
    """A word above or below a level line, at its left or right end: where it covers the least of the ``lines``."""
    wide, some = LETTER * len(word), 40  # points between two of a line's
    between = [
        (x1 + (x2 - x1) * k / some, y1 + (y2 - y1) * k / some)
        for line in lines
        for (x1, y1), (x2, y2) in itertools.pairwise([*line, *line[-1:]])
        for k in range(some)
    ]

    def covered(place: tuple[float, str, float]) -> int:
        low = place[0] if place[1] == "start" else place[0] - wide
        return sum(low - 6 < x < low + wide + 6 and -13 < there - place[2] < 5 for x, there in between)

    places = [(x, side, at) for at in (y - 5, y + 14) for x, side in ((left, "start"), (right, "end"))]
    x, side, at = min(places, key=covered)
    return text_at(x, at, word, side, "note")


def _drawn(each: Series, number: int, across: Axis, up: Axis, *, points: bool = True) -> list[Markup]:
    """Band, line and points of a series; the line is broken where a value is missing."""
    parts = []
    colour, dash = f"s{number % 6 + 1}", _DASHES[number % len(_DASHES)]
    if each.low:
        there = [(across.at(x), up.at(lo), up.at(hi)) for x, lo, hi in zip(each.x, each.low, each.high, strict=True)]
        ring = [f"{rounded(x)} {rounded(hi)}" for x, _, hi in there] + [
            f"{rounded(x)} {rounded(lo)}" for x, lo, _ in reversed(there)
        ]
        parts.append(Markup('<path class="band {}" d="M{}z"/>').format(colour.replace("s", "f"), "L".join(ring)))
    path, pen = "", "M"
    for x, y in zip(each.x, each.y, strict=True):
        path += "" if y is None else f"{pen}{rounded(across.at(x))} {rounded(up.at(y))}"
        pen = "M" if y is None else "L"
    dashes = Markup(' stroke-dasharray="{}"').format(dash) if dash else Markup()
    parts.append(Markup('<path class="line {}"{} d="{}"/>').format(colour, dashes, path))
    if points:
        for x, y in zip(each.x, each.y, strict=True):
            if y is not None:
                parts.append(_point(across.at(x), up.at(y), number, f"f{number % 6 + 1}"))
    return parts


def _point(x: float, y: float, number: int, colour: str) -> Markup:
    """A disc, square, triangle or diamond."""
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
        "m-3-3h6v6h-6z",
        "m0-4l4 7h-8z",
        "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
    )
    return Markup('<path class="point {}" d="M{} {}{}"/>').format(
        colour, rounded(x), rounded(y), shapes[number % len(shapes)]
    )


def _clean(each: Series, log_x: bool) -> Series:
    """Without values that cannot be drawn; those of y become None."""
    kept = [row for row, x in enumerate(each.x) if math.isfinite(x) and (x > 0 or not log_x)]

    def finite(y: float | None) -> float | None:
        return None if y is None or not math.isfinite(y) else float(y)

    band = bool(each.low) and all(math.isfinite(value) for value in (*each.low, *each.high))
    return Series(
        each.name,
        [float(each.x[row]) for row in kept],
        [finite(each.y[row]) for row in kept],
        [float(each.low[row]) for row in kept] if band else (),
        [float(each.high[row]) for row in kept] if band else (),
        each.points,
    )


def _rows(
    kept: Sequence[Series], x_text: Callable[[float], str], y_text: Callable[[float | None], str], band: bool
) -> tuple[tuple[str, ...], ...]:
    def interval(each: Series, row: int) -> tuple[str, ...]:
        return tuple(y_text(edge[row] if edge else None) for edge in (each.low, each.high)) if band else ()

    return tuple(
        (each.name, x_text(x), y_text(y), *interval(each, row))
        for each in kept
        for row, (x, y) in enumerate(zip(each.x, each.y, strict=True))
    )
