"""Statistics of a source as text. In: ``Statistics``. Out: lines for a terminal of 80 columns.

Names may be of any script and length; they are harmless to a terminal before they are measured.
"""

import itertools
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from featcache.reports.elements.numbers import bytes_text
from featcache.reports.scores import shortened
from featcache.reports.source_stats.advice import images
from featcache.system.display import columns, printable, quantity

if TYPE_CHECKING:
    from featcache.reports.source_stats.stats import Statistics

_WIDTH = 80
_CLASSES = 24  # that are shown one by one; of more the largest and the smallest
_BAR = 20  # signs, of the largest class
_NAMED = 5  # images of a kind that are named
MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "palette",
    "PA": "palette with transparency",
    "RGB": "colour",
    "RGBA": "colour with transparency",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
    "I;16": "grey, 16 bits",
    "I;16B": "grey, 16 bits",
    "I": "grey, 32 bits",
    "F": "grey, floating point",
}


def stats_lines(found: "Statistics") -> list[str]:
    """What ``stats`` found, the advice last."""
    parts = (_head(found), _classes(found), _facts(found), _pictures(found), _advice(found))
    return [line for part in parts if part for line in [*part, ""]][:-1]


def _head(found: "Statistics") -> list[str]:
    unreadable = f", {len(found.unreadable):,} unreadable" if found.unreadable else ""
    splits = [name for name in found.splits if name != "none"]
    classes = quantity(len(found.classes), "class") if found.classes else "no classes"
    of = [classes, *([quantity(len(splits), "split")] if splits else [])]
    facts = f": {images(found.images)}{unreadable}, {', '.join(of)}, {bytes_text(found.total_bytes)}"
    return [shortened(printable(found.source), max(_WIDTH - columns(facts), 12)) + facts]


def _classes(found: "Statistics") -> list[str]:
    """Classes x splits, with a bar of all images of a class."""
    splits = [*found.splits]
    rows = [(printable(name), [counts[split] for split in splits]) for name, counts in found.classes.items()]
    between = len(rows) - _CLASSES
    if between > 0:
        rows = sorted(rows, key=lambda row: -sum(row[1]))
        half = _CLASSES // 2
        rows = [*rows[:half], (f"... {between:,} classes between", []), *rows[-half:]]
    if found.unlabelled and (rows or set(splits) - {"none"}):
        rows.append(("(no label)", [found.unlabelled.get(split, 0) for split in splits]))
    if not rows:
        return []
    titles = (
        ["no split" if split == "none" else split for split in splits]
        if len(splits) > 1 or "none" not in splits
        else []
    )
    sums = ["images" if not titles else "all"]
    cells = [
        [*map("{:,}".format, counts if titles else ()), f"{sum(counts):,}"] if counts else [] for _, counts in rows
    ]
    total = [*(f"{found.splits[split]:,}" for split in (splits if titles else ())), f"{found.readable:,}"]
    heads = [*titles, *sums]
    widths = [max(len(row[k]) for row in [heads, total, *cells] if row) for k in range(len(heads))]
    room = _WIDTH - sum(width + 2 for width in widths) - 2 - len("  100.0%  ") - _BAR
    front = min(max(columns(name) for name, _ in [*rows, ("class", [])]), room)
    most = max(sum(counts) for _, counts in rows) or 1
    lines = [_row("class", heads, front, widths, f"{'share':>7}")]
    for (name, counts), row in zip(rows, cells, strict=True):
        bar = "#" * round(_BAR * sum(counts) / most)
        share = f"{sum(counts) / (found.readable or 1):>7.1%}  {bar}" if counts else ""
        lines.append(_row(shortened(name, front), row, front, widths, share))
    return [*lines, _row("all", total, front, widths, "")]


def _row(name: str, cells: Sequence[str], front: int, widths: Sequence[int], behind: str) -> str:
    middle = (
        "".join(f"  {cell:>{width}}" for cell, width in itertools.zip_longest(cells, widths, fillvalue=""))
        if cells
        else ""
    )
    return f"  {name}{' ' * (front - columns(name))}{middle}{behind}".rstrip()


def _facts(found: "Statistics") -> list[str]:
    if not (found.width and found.height and found.shorter_edge and found.aspect and found.bytes):
        return []
    width, height, aspect, size = found.width, found.height, found.aspect, found.bytes
    frequent = ", ".join(f"{w}x{h} ({count / found.readable:.0%})" for w, h, count in found.sizes[:3])
    shapes = sorted(found.shapes.items(), key=lambda pair: -pair[1])[:4]
    facts = {
        "width": f"{_span(width)} pixels",
        "height": f"{_span(height)} pixels",
        "sizes": f"{found.distinct_sizes:,} different, {frequent}",
        "aspect": f"{aspect['min']:.2f} to {aspect['max']:.2f}, median {aspect['median']:.2f}; nearest "
        + ", ".join(f"{name} {count / found.readable:.0%}" for name, count in shapes if count),
        "file size": f"{bytes_text(size['min'])} to {bytes_text(size['max'])}, median {bytes_text(size['median'])}",
        "formats": _tally(found.formats),
        "modes": _tally({MODES.get(mode, mode): count for mode, count in found.modes.items()}),
        "turned": f"{images(found.turned)} by EXIF data" if found.turned else "",
    }
    return _fields(facts)


def _pictures(found: "Statistics") -> list[str]:
    copies, sample = found.copies, found.sample
    kinds = {"across_labels": "under several labels", "across_splits": "across splits", "within": "within one split"}
    said = [f"{copies[kind]:,} {words}" for kind, words in kinds.items() if copies[kind]]
    pixels = f"of {images(sample['images'])}" if sample["images"] < sample["of"] else "of all images"
    drawn = f" (drawn with seed {sample['seed']})" if sample["images"] < sample["of"] else ""
    cut_off = f", and of {sample['cut']:,} without an end" if sample["cut"] else ""
    groups = []
    for group in copies["groups"][:_NAMED]:
        paths = [printable(image["path"]) for image in group["images"]]
        more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
        room = (_WIDTH - 4 - len(" = ") - len(more)) // 2
        groups.append("    " + " = ".join(shortened(path, room) for path in paths[:2]) + more)
    lines = [*_fields({"copies": ", ".join(said) or "none, byte for byte"}), *groups, *_more(len(copies["groups"]))]
    if found.unreadable:
        lines.append(f"  unreadable: {images(len(found.unreadable))}")
        for image in found.unreadable[:_NAMED]:
            lines += _wrapped(f"{shortened(printable(image['path']), 60)}: {printable(image['reason'])}", "    ")
        lines += _more(len(found.unreadable))
    lines += _fields({"pixels": f"{pixels}{drawn}{cut_off}"})
    lines += _listed("darkest (mean grey, 0 to 255)", found.darkest, lambda image: f"{image['value']:.0f}")
    lines += _listed("blurriest (variance of Laplacian)", found.blurriest, lambda image: f"{image['value']:.0f}")
    odd = "oddest (robust z-score)"
    return lines + _listed(odd, found.oddest, lambda image: f"{score(image['value'])} {image['why']}")


def _listed(title: str, found: Sequence[dict[str, Any]], say: Callable[[dict[str, Any]], str]) -> list[str]:
    """A few images below ``title``, each with what is said of it."""
    said = [say(image) for image in found[:_NAMED]]
    width = max(map(len, said), default=0)
    rows = [
        f"    {text:<{width}}  {shortened(printable(image['path']), _WIDTH - width - 6)}"
        for image, text in zip(found, said, strict=False)
    ]
    return [f"  {title}", *rows] if rows else []


def _more(n: int) -> list[str]:
    return [f"    ... {n - _NAMED:,} more in --json"] if n > _NAMED else []


def _advice(found: "Statistics") -> list[str]:
    return [line for sentence in found.advice for line in _wrapped(printable(sentence), "  ", first="- ")]


def _fields(facts: dict[str, str]) -> list[str]:
    """``name   value``, a value on as many lines as it takes."""
    front = max(map(len, facts)) + 2
    lines = []
    for name, text in facts.items():
        if text:
            first, *rest = textwrap.wrap(text, _WIDTH - 2 - front) or [""]
            lines += [f"  {name:<{front}}{first}", *(f"  {'':<{front}}{line}" for line in rest)]
    return lines


def _wrapped(text: str, indent: str, *, first: str = "") -> list[str]:
    """``text`` in lines of at most 80 columns; wide characters count as two."""
    lines, line = [], indent + first
    for word in text.split(" "):
        if columns(line) + columns(word) > _WIDTH and line.strip():
            lines.append(line.rstrip())
            line = indent + " " * max(len(first), 2)
        line += word + " "
    return [*lines, line.rstrip()]


def _span(values: dict[str, float]) -> str:
    return f"{values['min']:,.0f} to {values['max']:,.0f}, median {values['median']:,.0f}"


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def score(value: float) -> str:
    """A z-score; where nearly all values are equal it says nothing but that it is large."""
    return f"{value:.1f}" if value < 99.95 else ">99"
