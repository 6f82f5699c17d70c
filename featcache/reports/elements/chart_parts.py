"""What charts as SVG are made of: axes and their frame, lines, bars, words. In: numbers and places in units. Out: markup.

``charts.py`` puts them together. Colours are classes of ``pages/style.css``.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from featcache.reports.elements.numbers import log_ticks, number_text, round_ticks, tick_texts
from featcache.system.display import middle_out, printable

WIDTH = 440  # units, near to pixels: small enough that its texts can be read on a phone
LETTER = 6.4  # units, of the 12-unit type on average
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40  # around the field of a chart with axes


@dataclasses.dataclass(frozen=True)
class Axis:
    """From values to positions, along one edge of the field."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    percent: bool = False
    text: Callable[[float], str] | None = None  # of a tick
    whole: bool = False  # no ticks between whole numbers

    def at(self, value: float) -> float:
        """The place of a value, in units."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = math.log(max(value, 1e-300)) if self.log else value
        return round(self.start + (self.stop - self.start) * (place - low) / ((high - low) or 1.0), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Values at which the axis is labelled, and the labels."""
        about = max(2, round(abs(self.stop - self.start) / (60 if self.start < self.stop else 42)))
        found = log_ticks(self.low, self.high) if self.log else round_ticks(self.low, self.high, about=about)
        found = [tick for tick in found if tick == round(tick)] if self.whole else found
        if self.text or self.log:
            return [(tick, (self.text or number_text)(tick)) for tick in found]
        return list(zip(found, tick_texts(found, percent=self.percent), strict=True))


def frame(across: Axis, up: Axis, right: float, x_label: str, y_label: str, *, left: float = LEFT) -> list[Markup]:
    """Grid, ticks and names of both axes."""
    bottom = up.start
    parts = []
    for tick, text in up.ticks():
        y = up.at(tick)
        parts += [line_between(left, y, right, y, "grid"), text_at(left - 6, y + 4, text, "end", "tick")]
    for tick, text in across.ticks():
        x = across.at(tick)
        fits = x + len(text) * LETTER / 2 <= WIDTH  # in a file of its own nothing is drawn beyond the edge
        place = text_at(x if fits else WIDTH, bottom + 17, text, "middle" if fits else "end", "tick")
        parts += [line_between(x, bottom, x, bottom + 4, "axis"), place]
    parts.append(line_between(left, bottom, right, bottom, "axis"))
    if x_label:
        parts.append(text_at((left + right) / 2, bottom + 35, x_label, "middle", "label"))
    turned = Markup('<text class="label" text-anchor="middle" transform="translate({} {}) rotate(-90)">{}</text>')
    return [
        *parts,
        turned.format(rounded(left - left_of(up) + 10), rounded((up.start + up.stop) / 2), printable(y_label)),
    ]


def left_of(up: Axis) -> float:
    """Where the field begins: beyond the axis's name and its widest tick."""
    return max(LEFT, 28 + LETTER * max((len(text) for _, text in up.ticks()), default=0))


def clipped(parts: Sequence[Markup], right: float, top: float, bottom: float) -> list[Markup]:
    """What lies within the field; an inner svg clips without a name that another chart of the page might have, too."""
    box = {"top": rounded(top), "wide": rounded(right + 6), "tall": rounded(bottom - top)}
    opening = '<svg x="0" y="{top}" width="{wide}" height="{tall}" viewBox="0 {top} {wide} {tall}" overflow="hidden">'
    return [Markup(opening).format(**box), *parts, Markup("</svg>")]


def marked_at(x: float, word: str, top: float, bottom: float) -> list[Markup]:
    """A line across the field at ``x``, its word above it."""
    side = "start" if x < WIDTH * 0.3 else "end" if x > WIDTH * 0.7 else "middle"
    return [line_between(x, top - 4, x, bottom, "reference"), text_at(x, top - 9, word, side, "note")]


def span_of(values: Sequence[float], asked: tuple[float, float] | None, percent: bool) -> tuple[float, float]:
    """What an axis spans: all values and a little room; of shares never beyond 0..1."""
    low, high = min([*values, *(asked or ())], default=0.0), max([*values, *(asked or ())], default=1.0)
    room = 0.08 * (high - low) or (0.05 if percent else abs(high) * 0.1 or 1.0)
    if asked:
        return low, high
    return (
        (max(low - room, 0.0), min(high + room, 1.0))
        if percent
        else (low - room if low < 0 else max(low - room, 0), high + room)
    )


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places of labels, moved until they are ``gap`` apart, in their order, within ``low``..``high``."""
    order = sorted(range(len(places)), key=places.__getitem__)
    found = list(places)
    for before, here in itertools.pairwise(order):
        found[here] = max(found[here], found[before] + gap)
    over = max((found[order[-1]] - high) if order else 0, 0)
    for here in reversed(order):
        found[here] = min(found[here], high - gap * (len(order) - 1 - order.index(here))) if over else found[here]
    return [max(place, low) for place in found]


def fitting(text: str, width: float) -> str:
    """``text``, its middle left out if it is wider than ``width`` units."""
    return middle_out(printable(text), max(int(width / LETTER), 3))


def text_at(x: float, y: float, text: str, anchor: str, kind: str = "", *, whole: str | None = None) -> Markup:
    """A text; ``anchor``: which end of it is at x. ``whole``: what it stands for, where it was shortened."""
    hint = (
        Markup("<title>{}</title>").format(printable(whole))
        if whole is not None and printable(whole) != text
        else Markup()
    )
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}{}</text>').format(
        kind, rounded(x), rounded(y), anchor, escape(text), hint
    )


def line_between(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line; ``kind``: its class in the style sheet."""
    return Markup('<path class="{}" d="M{} {}L{} {}"/>').format(
        kind, rounded(x1), rounded(y1), rounded(x2), rounded(y2)
    )


def bar_at(x: float, y: float, width: float, height: float, kind: str, hint: str) -> Markup:
    """A rectangle that says its ``hint`` under the pointer."""
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
        kind, rounded(x), rounded(y), rounded(width), rounded(height), hint
    )


def rounded(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
