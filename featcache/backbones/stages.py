"""A network from its input to the embedding, in a few rows: its parts in the order in which they run.

In: a ``Backbone``, with weights or without. Out: ``Stage``s, whose parameters add up to the network's.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from featcache.backbones.backbone import Backbone

_FEWEST, _LARGEST = 4, 0.8  # parts with parameters that are shown at least, and the share of one that is shown whole


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a network.

    Attributes:
        name: in the network; ``blocks.0-11`` for several in a row that give the same shape.
        kind: class of the module, with how many there are; ``parameters`` for those that belong to no part of it.
        shape: of what it gives for one image; None where it gives no tensor, or is not run.
        parameters: of its own; what several parts share counts for the first.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int


def stages_of(backbone: Backbone) -> list[Stage]:
    """The parts of a backbone, in order. The network runs once, on whatever device it is on.

    What holds more than four fifths of the parameters is divided into its children, and the largest part until there are four:
    that gives a transformer's blocks, a convolutional network's stages. Neighbours of one kind and shape are joined; parts that
    have no parameters and leave the shape as it is are left out.
    """
    ran = _run(backbone)
    parts = _divide(backbone.module, ran)
    after = len(ran)
    places = []
    for name, _ in reversed(parts):  # what does not run by itself stands before what follows it
        after = ran[name][0] if name in ran else after
        places.append(after)
    rows: list[Stage] = []
    seen: set[int] = set()
    shape: tuple[int, ...] | None = (3, *backbone.preprocess.crop)
    for _, (name, part) in sorted(zip(reversed(places), parts, strict=True), key=lambda entry: entry[0]):
        own = {id(p): p.numel() for p in _parameters(part) if id(p) not in seen}
        seen |= own.keys()
        found = ran[name][1] if name in ran else None
        if own or (found and found != shape):
            kind = "parameters" if isinstance(part, nn.Parameter) else type(part).__name__
            rows.append(Stage(name, kind, found, sum(own.values())))
        shape = found or shape
    return [_join(list(rows)) for _, rows in itertools.groupby(rows, key=_sort_of)]


def _run(backbone: Backbone) -> dict[str, tuple[int, tuple[int, ...] | None]]:
    """name -> when it ended first, and the shape of what it gave for one image; of all modules that are called."""
    found: dict[str, tuple[int, tuple[int, ...] | None]] = {}

    def note(name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple | list) and output else output
        shape = tuple(output.shape[output.shape[0] == 1 :]) if isinstance(output, torch.Tensor) else None
        found[name] = (found[name][0] if name in found else len(found), shape)

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name, module in backbone.module.named_modules()
    ]
    try:
        with next(backbone.module.parameters()).device, torch.no_grad():
            backbone.module(torch.zeros(1, 3, *backbone.preprocess.crop))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _divide(network: nn.Module, ran: Collection[str]) -> list[tuple[str, nn.Module | nn.Parameter]]:
    parts: list[tuple[str, nn.Module | nn.Parameter]] = list(_children("", network))
    total = _size(network)
    while dividable := [part for part in parts if isinstance(part[1], nn.Module) and any(part[1].children())]:
        name, largest = max(dividable, key=lambda part: (part[0] not in ran and _size(part[1]) > 0, _size(part[1])))
        several = sum(_size(part) > 0 for _, part in parts) >= _FEWEST
        if name in ran and several and _size(largest) <= _LARGEST * total:
            break
        place = next(k for k, part in enumerate(parts) if part[0] == name)
        parts[place : place + 1] = _children(f"{name}.", largest)  # type: ignore[arg-type]
    return parts


def _children(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        yield prefix + name, child


def _parameters(part: nn.Module | nn.Parameter) -> Iterable[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else part.parameters()


def _size(part: nn.Module | nn.Parameter) -> int:
    return sum(parameter.numel() for parameter in _parameters(part))


def _sort_of(row: Stage) -> tuple[str, str, object]:
    """What neighbours that are shown as one have in common."""
    return row.name.rpartition(".")[0], row.kind, row.shape


def _join(rows: list[Stage]) -> Stage:
    if len(rows) == 1:
        return rows[0]
    names = [row.name for row in rows]
    first, last = rows[0], rows[-1]
    parent, _, number = last.name.rpartition(".")
    if first.kind == "parameters":
        name, kind = ", ".join(names), first.kind
    else:
        name = f"{first.name}-{number}" if parent and number.isdigit() else f"{first.name} to {last.name}"
        kind = f"{len(rows)} x {first.kind}"
    return Stage(name, kind, first.shape, sum(row.parameters for row in rows))
