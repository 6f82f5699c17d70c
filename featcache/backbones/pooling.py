"""From what a network gives of an image to one vector: the one place where tokens are pooled and layers joined.

In: a network and ``Taps``, by which a source (``from_<library>.py``) says what can be taken out of it. Out: the same network,
whose forward pass gives (N, D). Its tensors keep their names, so that weights are hashed, saved and trained as before.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from featcache.errors import UsageError
from featcache.spec import OWN_POOLING


class Tokens(NamedTuple):
    """What one layer gives of N images, normalised.

    Attributes:
        patches: (N, L, C), without class and register tokens. cls: (N, C), the class token; None if there is none.
    """

    patches: torch.Tensor
    cls: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Taps:
    """What can be taken out of a network.

    Attributes:
        own: which pooling its own forward pass does: ``cls``, ``mean``; ``attention`` or another word for what is no such pooling.
        has_cls: whether it has a class token. has_tokens: whether it gives tokens at all, not maps.
        depth: how many layers ``read`` can give. trained: whether a classifier was trained on what the own pooling gives.
        read: (network, pixels, n) -> the last n layers, the last one last; None: nothing but the own forward pass.
        finish: name of the network's norm that belongs behind the pooling; empty where there is none.
        lines: n -> Python lines that compute what ``read`` does, for whoever has no featcache: of ``network`` and ``pixels`` they
            make ``found``, a list of (patches, cls); of maps ``parts``, a list of vectors.
    """

    own: str
    has_cls: bool = False
    has_tokens: bool = False
    depth: int = 1
    trained: bool = True
    read: Callable[[Any, torch.Tensor, int], list[Tokens]] | None = None
    finish: str = ""
    lines: Callable[[int], list[str]] = lambda _: []

    def below(self, part: str) -> "Taps":
        """The same of a network that has this one as its ``part``."""
        read, lines = self.read, self.lines
        return dataclasses.replace(
            self,
            read=read and (lambda network, pixels, n: read(network.get_submodule(part), pixels, n)),
            finish=self.finish and f"{part}.{self.finish}",
            lines=lambda n: [line.replace("network", f"network.{part}") for line in lines(n)],
        )


def choose_pooling(name: str, taps: Taps, pool: str, layers: int) -> tuple[str, str]:
    """Which pooling ``pool`` is for this network, as the spec has it, and why. Raises UsageError: not for this network."""
    if layers > taps.depth:
        few = "1 layer" if taps.depth == 1 else f"{taps.depth} layers"
        remedy = "" if taps.depth == 1 else f"; choose 1 to {taps.depth}"
        raise UsageError(f"{name} gives {few}, --layers {layers} asks for more{remedy}")
    if "cls" in pool and not taps.has_cls:
        raise UsageError(f"{name} has no class token, which --pool {pool} asks for; choose mean, or leave it out")
    how, why = pool, "as asked"
    if pool == "mean" and not taps.has_tokens and taps.own == "attention":
        raise UsageError(
            f"{name} pools by attention, and its tokens have no norm to be pooled behind; leave --pool out"
        )
    if pool == "mean" and not taps.has_tokens:
        how, why = taps.own, "the network's own, of its maps"
    elif pool in ("auto", "own"):
        how, why = taps.own, "the network's own"
        if pool == "auto" and how == "mean" and taps.has_cls and not taps.trained:
            how, why = (
                "cls",
                "the class token is what this encoder was trained to give, the library takes the mean of patches",
            )
    if layers > 1 and taps.has_tokens and how not in ("cls", "mean", "cls+mean"):
        if pool == "own":
            raise UsageError(f"{name} pools its last layer alone by {how}; choose --pool mean with --layers {layers}")
        how = "cls" if taps.has_cls else "mean"
        why = f"the network's own is of the last layer alone ({taps.own})"
    own = how == taps.own and (layers == 1 or not taps.has_tokens)
    return OWN_POOLING if own else how, why


def pool_tokens(tokens: Tokens, how: str) -> list[torch.Tensor]:
    """(N, C) vectors of one layer: of ``cls+mean`` two, in this order."""
    found = [tokens.cls if part == "cls" else tokens.patches.mean(dim=1) for part in how.split("+")]
    return [vector for vector in found if vector is not None]


def of_map(features: torch.Tensor) -> Tokens:
    """A stage's map (N, C, H, W) as one token: its mean, normalised over channels, as the stages' scales differ."""
    mean = features.mean(dim=(2, 3))
    return Tokens(nn.functional.layer_norm(mean, mean.shape[1:])[:, None])


def lines_of_maps(stages: list[str], spatial: tuple[int, int]) -> list[str]:
    """``Taps.lines`` of a network whose last stage is its own embedding: hooks on the stages before it. spatial: a map's axes."""
    return [
        "maps = []",
        *_hooks(stages, "maps"),
        "last = network(pixels)",
        f"maps = [x.mean(dim={spatial}) for x in maps]",
        "parts = [*(torch.nn.functional.layer_norm(x, x.shape[1:]) for x in maps), last]",
    ]


def lines_of_blocks(blocks: list[str], norm: str) -> list[str]:
    """``Taps.lines`` of a network whose first token is its class token: hooks on its blocks. norm: what follows the last one."""
    return [
        "found = []",
        *_hooks(blocks, "found"),
        "network(pixels)",
        f"found = [network.{norm}(x) for x in found]",
        "found = [(x[:, 1:], x[:, 0]) for x in found]",
    ]


def _hooks(modules: list[str], into: str) -> list[str]:
    hook = f"lambda module, inputs, output: {into}.append(output)"
    return [
        f"for name in {modules!r}:",
        f"    network.get_submodule(name).register_forward_hook({hook})",
    ]


def pooling_lines(taps: Taps, pooling: str, layers: int) -> list[str]:
    """Python lines, for whoever has no featcache, from ``network`` and ``pixels`` to ``embeddings`` pooled by ``set_pooling``."""
    lines = taps.lines(layers)
    if taps.has_tokens:
        vectors = {"cls": "cls", "mean": "patches.mean(dim=1)"}
        pooled = ", ".join(vectors[part] for part in pooling.split("+"))
        lines += [f"parts = [x for patches, cls in found for x in ({pooled},)]"]
        lines += [f"parts = [network.{taps.finish}(x) for x in parts]"] if taps.finish else []
    return [*lines, "embeddings = torch.cat(parts, dim=1)"]


def set_pooling(network: nn.Module, taps: Taps, pooling: str, layers: int) -> None:
    """Let the network's forward pass give the last ``layers`` layers, pooled and side by side; changes it in place."""
    read = taps.read
    if read is None or (pooling == OWN_POOLING and layers == 1):
        return
    how = "mean" if pooling == OWN_POOLING else pooling  # of maps, which come as one token

    def forward(self: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        found = read(self, pixels, layers)
        parts = [x for tokens in found for x in pool_tokens(tokens, how)]
        finish = self.get_submodule(taps.finish) if taps.finish else nn.Identity()
        return torch.cat([finish(x) for x in parts], dim=1)

    set_forward(network, forward)


def set_forward(network: nn.Module, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Let the network compute ``forward(network, pixels)``; changes it in place.

    The class is exchanged, not wrapped, as PyTorch's own parametrizations do: copies keep it, and names of tensors stay. The new
    one is of the same module, by whose name transformers knows which states a network may show.
    """
    kind = type(network)
    network.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
