"""Backbones in words: a table to choose from, and one network from its input to the embedding.

In: names. Out: plain values for programs, and lines for a terminal of 80 columns. No weights are loaded.
"""

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from typing import Any

from featcache.backbones.catalog import ALIASES, CHOSEN, BackboneFacts, counted, counted_with, facts_of_all, is_current

_WIDTH = 80  # columns of a terminal
_NO_FIGURES = {field.name: None for field in dataclasses.fields(BackboneFacts)}
_POOLINGS = {
    "cls": "the class token",
    "mean": "the mean of the patch tokens",
    "attention": "the network's attention pooler",
    "maps": "the last map, pooled as the network does",
    "joined": "joined as the network does",
}


def table_of(names: Sequence[str]) -> list[dict[str, Any]]:
    """A row of facts for each name, the chosen ones first, then by cost; None where featcache cannot take it or does not know."""
    rows = [
        {**_NO_FIGURES, "name": name} if facts is None else dataclasses.asdict(facts)
        for name, facts in facts_of_all(names).items()
    ]
    place = {name: number for number, name in enumerate(CHOSEN)}

    def order(row: dict[str, Any]) -> tuple[float, float]:
        cost = row["gmacs"]
        return place.get(row["name"], len(place)), float("inf") if cost is None else cost

    return sorted(rows, key=order)


def table_lines(rows: Iterable[dict[str, Any]], *, wrap: bool = True) -> list[str]:
    """The table as text. wrap: a name that leaves no room for its figures has a line of its own."""
    sources = _letters(rows)
    cells = [["name", "dim", "GFLOP", "input", "licence", "linear"]]
    for row in rows:
        linear = f"{row['linear_probe']} {sources[row['source']]}" if row["linear_probe"] else "-"
        figures = ["-", "-", "-"]
        if row["dim"]:
            height, width = row["input"]
            figures = [str(row["dim"]), _short(row["gmacs"]), f"{height}" if height == width else f"{height}x{width}"]
        cells.append([row["name"], *figures, _licence(row), linear])
    return columns(cells, "<>>><>", wrap=wrap)


def legend(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What the columns of ``table_lines`` mean, whose the figures are, and what the short names stand for."""
    rows = list(rows)
    lines = ["GFLOP: 1e9 multiply-adds (GMACs) per image at this input size, as papers count"]
    if sources := _letters(rows):
        lines.append("linear: % top-1 on ImageNet-1k of a linear classifier on frozen features, by")
        lines += [f"  {letter}  {source}" for source, letter in sources.items()]
    if any(row["gated"] for row in rows):
        lines.append("gated: its publisher gives weights on request; timm's copy may be free to load")
    if any(row["commercial"] is False for row in rows):
        lines.append("*, nc: no commercial use")
    if any(not row["dim"] for row in rows):
        lines.append("-: not known here, or not for featcache; `featcache backbones NAME` says more")
    names = {row["name"] for row in rows}
    lines += [f"{alias}: {name}" for alias, name in ALIASES.items() if name in names]
    if not importlib.util.find_spec("timm") and any(name.startswith("timm/") for name in names):
        lines.append("timm/...: these need pip install 'featcache[timm]'")
    stale = [library for library in ("timm", "torchvision") if not is_current(library)]
    lines += [f"counted with {library} {counted_with()[library]}, another is installed" for library in stale]
    return lines


def near(pattern: str, names: Iterable[str]) -> list[str]:
    """Parts of ``names``, and names, that look like ``pattern``; the nearest first."""
    words = {word for name in names for word in (name, name.split("/")[-1], *re.split(r"[/_.]", name))}
    return difflib.get_close_matches(pattern.lower(), sorted(words), n=4, cutoff=0.6)


def describe_network(name: str) -> dict[str, Any]:
    """One backbone from its input to the embedding: built without weights, so that nothing is downloaded, and counted anew.

    Returns:
        Plain values: those of ``BackboneFacts``, ``stages`` (name, kind, shape, parameters), ``layer`` whose input the
        embedding is, ``pooling`` in words, ``preprocess``, and ``weights``: all names of the same network with others.

    Raises:
        BackboneError: no such name, or featcache cannot take it.
    """
    from featcache.backbones.catalog import facts_of_built
    from featcache.backbones.load import build_empty
    from featcache.backbones.stages import stages_of

    backbone = build_empty(ALIASES.get(name, name))
    pooling = backbone.own_pooling if backbone.pooling.startswith("the ") else backbone.pooling
    arch = backbone.name.split(".")[0]
    return dataclasses.asdict(facts_of_built(backbone)) | {
        "stages": [dataclasses.asdict(stage) for stage in stages_of(backbone)],
        "layer": backbone.layer,
        "pooling": _POOLINGS.get(pooling, pooling),
        "preprocess": backbone.preprocess.to_json(),
        "weights": [other for other in counted() if other.startswith(f"{arch}.")],
    }


def network_lines(facts: dict[str, Any]) -> list[str]:
    """``describe_network`` as text."""
    spec = facts["preprocess"]
    height, width = spec["crop"]
    resize = spec["resize"] if isinstance(spec["resize"], int) else "x".join(map(str, spec["resize"]))
    cells = [["part", "", "output", "parameters"], ["input", "", _shape((3, height, width)), ""]]
    cells += [[row["name"], row["kind"], _shape(row["shape"]), f"{row['parameters']:,}"] for row in facts["stages"]]
    cells += [["total", "", "", f"{facts['parameters']:,}"]]
    allowed = {True: "commercial use allowed", False: "no commercial use", None: "read it before commercial use"}
    licence = f"{facts['licence'] or 'not stated'} ({allowed[facts['commercial']]})" if facts["pretrained"] else "-"
    figures = [
        f"{key} {facts[field]} %" for key, field in (("k-NN", "knn"), ("linear", "linear_probe")) if facts[field]
    ]
    others = [name for name in facts["weights"] if name != facts["name"]]
    return [
        facts["name"],
        *(f"  {line}" for line in columns(cells, "<<>>", width=_WIDTH - 2)),
        f"  embedding: {facts['dim']} values, {facts['pooling']}: what enters {facts['layer']}",
        f"  cost: {facts['gmacs']:,.2f} GFLOP (1e9 multiply-adds) per image; {facts['parameters'] / 1e6:,.1f} million parameters",
        f"  preprocessing: resize {resize}, crop {height}x{width}, {spec['interpolation']}",
        f"    mean {', '.join(f'{x:.3g}' for x in spec['mean'])}; std {', '.join(f'{x:.3g}' for x in spec['std'])}",
        f"  weights: {'licence ' + licence if facts['pretrained'] else 'none published'}"
        + ("; the publisher's own are gated" if facts["gated"] else ""),
        *([f"  ImageNet-1k, frozen: {', '.join(figures)}, by", f"    {facts['source']}"] if figures else []),
        *([f"  with other weights: {others[0]}", *(f"    {name}" for name in others[1:])] if others else []),
    ]


def columns(rows: Sequence[Sequence[str]], align: str, *, width: int = _WIDTH, wrap: bool = True) -> list[str]:
    """Rows as lines of at most ``width`` columns; ``align``: < or > for each cell.

    A first cell that leaves no room for the others stands on a line of its own, or without ``wrap`` pushes them out.
    """
    widths = [max(len(row[place]) for row in rows) for place in range(len(align))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= width else " "
    widths[0] = min(widths[0], width - sum(widths[1:]) - len(gap) * (len(widths) - 1))
    lines = []
    for first, *others in rows:
        if wrap and len(first) > widths[0]:
            lines.append(first)
            first = ""
        cells = [f"{cell:{side}{size}}" for cell, side, size in zip([first, *others], align, widths, strict=True)]
        lines.append(gap.join(cells).rstrip())
    return lines


def _letters(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """A letter for each source of figures."""
    sources = dict.fromkeys(row["source"] for row in rows if row["linear_probe"])
    return {source: chr(ord("a") + number) for number, source in enumerate(sources)}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _licence(row: dict[str, Any]) -> str:
    if not row["dim"]:
        return "-"
    if not row["pretrained"]:
        return "no weights"
    licence: str = row["licence"] or "not stated"
    name = re.sub("-license$|-model-license$|-community-.*|-noncommercial(?=-research)", "", licence).replace(
        "-research", "-nc"
    )
    unmarked = row["commercial"] is False and "nc" not in name.split("-")
    return f"{name}{'*' * unmarked}{' gated' if row['gated'] else ''}"


def _shape(shape: Sequence[int] | None) -> str:
    return " x ".join(map(str, shape)) if shape else "-"
