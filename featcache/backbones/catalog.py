"""What is known of a backbone before it is built or downloaded: width, cost, licence, published figures.

In: a name. Out: ``BackboneFacts``. ``catalog.csv`` holds what had to be counted (``.ci/count_backbones.py`` writes it), so
that a table of all names takes neither a network nor PyTorch; what it does not know is counted without weights.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.errors import BackboneError

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone

# A name that stands for one network, on whatever machine: a cache made on a GPU and a laptop that predicts must agree.
ALIASES = {
    "fast": "timm/tf_efficientnet_lite0",
    "base": "timm/vit_small_patch14_reg4_dinov2.lvd142m",
    "best": "timm/vit_so400m_patch14_siglip_224.v2_webli",
}
# Licences by their names on the hub, beside those whose name says it. Read: Apple's sample code licence, which that of FastViT
# and CVNets repeats; SEER's, for non-commercial research; of Meta's, that commercial use is meant (dinov3 #28, sapiens2 #18).
_COMMERCIAL = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "apple-ascl", "fastvit-license", "cvnets-license"}
_COMMERCIAL |= {"dinov3-license", "sapiens2-license"}
_NON_COMMERCIAL = {"apple-amlr", "seer-license"}
_GATED = {"dinov3-license"}
_DINOV2 = "DINOv2 README (github.com/facebookresearch/dinov2)"
_EP = "Psomas et al. 2026, github.com/billpsomas/efficient-probing"
# ImageNet-1k top-1 in per cent of frozen features: k nearest neighbours, linear classifier, and who says so.
_PUBLISHED: dict[str, tuple[float | None, float | None, str]] = {
    "timm/vit_small_patch14_dinov2.lvd142m": (79.0, 81.1, _DINOV2),
    "timm/vit_base_patch14_dinov2.lvd142m": (82.1, 84.5, _DINOV2),
    "timm/vit_large_patch14_dinov2.lvd142m": (83.5, 86.3, _DINOV2),
    "timm/vit_giant_patch14_dinov2.lvd142m": (83.5, 86.5, _DINOV2),
    "timm/vit_small_patch14_reg4_dinov2.lvd142m": (79.1, 80.9, _DINOV2),
    "timm/vit_base_patch14_reg4_dinov2.lvd142m": (82.0, 84.6, _DINOV2),
    "timm/vit_large_patch14_reg4_dinov2.lvd142m": (83.8, 86.7, _DINOV2),
    "timm/vit_giant_patch14_reg4_dinov2.lvd142m": (83.7, 87.1, _DINOV2),
    "timm/vit_base_patch16_dinov3.lvd1689m": (79.6, 83.9, f"{_EP}, at 224 px"),
    "timm/vit_large_patch16_dinov3.lvd1689m": (83.4, 86.6, f"{_EP}, at 224 px"),
    "timm/vit_large_patch16_siglip_256.v2_webli": (81.1, 87.0, f"{_EP}, own pooler"),
    "timm/vit_so400m_patch14_siglip_224.v2_webli": (81.8, 87.4, f"{_EP}, own pooler"),
    "timm/vit_pe_core_large_patch14_336.fb": (82.7, 87.8, f"{_EP}, own pooler"),
    "timm/aimv2_large_patch14_224.apple_pt": (76.0, 84.7, f"{_EP}, mean"),
}
# What most should choose from: the three classes, then by cost.
CHOSEN = (
    *ALIASES.values(),
    "resnet50",
    "timm/convnext_tiny.dinov3_lvd1689m",
    "timm/vit_pe_core_tiny_patch16_384.fb",
    "timm/vit_small_patch16_dinov3.lvd1689m",
    "timm/vit_pe_core_small_patch16_384.fb",
    "timm/vit_base_patch16_siglip_224.v2_webli",
    "timm/vit_pe_core_base_patch16_224.fb",
    "timm/vit_base_patch14_reg4_dinov2.lvd142m",
    "timm/vit_base_patch16_dinov3.lvd1689m",
    "timm/vit_large_patch16_siglip_256.v2_webli",
    "timm/vit_large_patch14_reg4_dinov2.lvd142m",
    "timm/aimv2_large_patch14_224.apple_pt",
    "timm/vit_large_patch16_dinov3.lvd1689m",
    "timm/vit_pe_core_large_patch14_336.fb",
)
_FEW = (
    10  # backbones that are counted for one table, half a second each; of more a table says that it does not know them
)


@dataclasses.dataclass(frozen=True)
class BackboneFacts:
    """A backbone in figures, at the input size that featcache takes by default.

    Attributes:
        name: as the library has it, aliases resolved.
        dim: D, values per image.
        gmacs: 1e9 multiply-adds per image, attention included: what papers and tables call GFLOPs (ResNet-50: 4.1), half of
            the floating-point operations.
        parameters: of what is run, without the classifier (ResNet-50: 23.5 million; 25.6 with its classifier).
        input: (height, width) in pixels.
        pretrained: whether the library provides weights.
        licence: of the weights, as the library records it; None if it records none.
        commercial: whether the licence allows commercial use, whatever its other terms; None: read it.
        gated: whether the publisher hands the original weights out on request only. The copy that a library provides may be
            free: whether it is, the hub says when it is asked.
        knn, linear_probe: top-1 on ImageNet-1k in per cent, of frozen features; None if none was found. source: whose figures.
    """

    name: str
    dim: int
    gmacs: float
    parameters: int
    input: tuple[int, int]
    pretrained: bool
    licence: str | None
    commercial: bool | None
    gated: bool
    knn: float | None = None
    linear_probe: float | None = None
    source: str | None = None


@dataclasses.dataclass(frozen=True)
class Counted:
    """A line of ``catalog.csv``: a name, and what had to be counted for it; zeros for one that featcache cannot take."""

    name: str
    height: int
    width: int
    dim: int
    macs: int
    parameters: int
    licence: str | None


def facts_of(name: str, *, size: tuple[int, int] | None = None) -> BackboneFacts:
    """What is known of the backbone ``name``: one that ``load_backbone`` takes, or an alias. Nothing is downloaded.

    Args:
        size: (height, width) of another input than the default one, for which the network is then built without weights.

    Raises:
        BackboneError: there is no such backbone, or featcache cannot take it. UsageError: it does not take ``size``.
        MissingDependencyError: timm is missing, and ``catalog.csv`` does not know the name.
    """
    name = ALIASES.get(name, name)
    known = _known(name)
    facts = _facts(name, known if known and known.dim else count_live(name))
    if size is None or size == facts.input:
        return facts
    from featcache.backbones.load import build_empty

    backbone = build_empty(name, size=size)
    macs, parameters = count_macs(backbone), count_parameters(backbone)
    return dataclasses.replace(facts, input=size, gmacs=round(macs / 1e9, 3), parameters=parameters)


def facts_of_built(backbone: "Backbone") -> BackboneFacts:
    """The same, counted anew on a ``build_empty`` or a loaded backbone at its default size."""
    return _facts(backbone.name, _count(backbone))


def facts_of_all(names: Sequence[str]) -> dict[str, BackboneFacts | None]:
    """``facts_of`` each; None for what featcache cannot take, and for what ``catalog.csv`` does not know if that is much."""
    known = {name: _known(name) for name in names}
    few = sum(line is None for line in known.values()) <= _FEW
    found: dict[str, BackboneFacts | None] = {}
    for name, line in known.items():
        found[name] = _facts(name, line) if line and line.dim else None
        if line is None and few:
            with contextlib.suppress(BackboneError):
                found[name] = facts_of(name)
    return found


def matching(pattern: str = "") -> list[str]:
    """``load.backbone_names``, at once if ``catalog.csv`` was counted with what is installed; failing those, names of weights.

    ``timm/ARCH.TAG`` names one of several weights of ``timm/ARCH``, which takes the first of them. open_clip's names are looked for
    where the pattern says so, as asking it takes seconds.
    """
    if pattern.lower().startswith("openclip"):
        from featcache.backbones.load import backbone_names

        return backbone_names(pattern)
    if is_current("timm") and is_current("torchvision"):
        usable = [name for name in _lines() if importlib.util.find_spec("timm") or not name.startswith("timm/")]
        names, tagged = list(dict.fromkeys(name.split(".")[0] for name in usable)), usable
    else:
        from featcache.backbones.load import backbone_names, tagged_names

        names, tagged = backbone_names(), tagged_names()
    wanted = pattern.lower()
    return [name for name in names if wanted in name] or [name for name in tagged if wanted in name]


def _facts(name: str, of: Counted) -> BackboneFacts:
    knn, linear, source = _PUBLISHED.get(of.name, (None, None, None))
    return BackboneFacts(
        name=name,
        dim=of.dim,
        gmacs=round(of.macs / 1e9, 3),
        parameters=of.parameters,
        input=(of.height, of.width),
        pretrained="." in of.name or not of.name.startswith("timm/"),
        licence=of.licence,
        commercial=is_commercial(of.licence),
        gated=of.licence in _GATED,
        knn=knn,
        linear_probe=linear,
        source=source,
    )


def is_commercial(licence: str | None) -> bool | None:
    """Whether a licence, by its name on the hub, allows commercial use; None: its name does not say, read it."""
    name = (licence or "").lower()
    if name in _NON_COMMERCIAL or re.search(r"\bnc\b|non-?commercial|research", name):
        return False
    return True if name in _COMMERCIAL else None


@functools.cache
def _lines() -> dict[str, Counted]:
    """``catalog.csv`` by name, in the libraries' order."""
    with Path(__file__).with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        file.readline()  # the versions
        rows = (
            Counted(name, int(height), int(width), int(dim), int(macs), int(parameters), licence or None)
            for name, height, width, dim, macs, parameters, licence in csv.reader(file)
        )
        return {row.name: row for row in rows}


@functools.cache
def counted() -> dict[str, Counted]:
    """``catalog.csv`` by name; ``timm/ARCH`` is the first line of that architecture, its default weights."""
    known = dict(_lines())
    for name, row in _lines().items():
        known.setdefault(name.split(".")[0], row)
    return known


@functools.cache
def counted_with() -> dict[str, str]:
    """library -> version, with which ``catalog.csv`` was counted."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8") as file:
        words = file.readline().strip("# \n").split()
    return dict(zip(words[::2], words[1::2], strict=True))


@functools.cache
def is_current(library: str) -> bool:
    """Whether ``catalog.csv`` was counted with the installed version of ``library``; also if none is installed."""
    try:
        return importlib.metadata.version(library) == counted_with()[library]
    except importlib.metadata.PackageNotFoundError:
        return True


def _known(name: str) -> Counted | None:
    """The line of ``catalog.csv``, if the installed library still means the same weights and input by ``name``."""
    known = counted().get(name)
    if known is None or not known.dim or is_current("timm" if name.startswith("timm/") else "torchvision"):
        return known
    from featcache.backbones.load import published

    with contextlib.suppress(BackboneError):
        if published(name) == (known.name, known.licence, (known.height, known.width)):
            return known
    return None


def count_live(name: str) -> Counted:
    """Build ``name`` without weights, and count. Raises as ``facts_of``."""
    from featcache.backbones.load import build_empty

    return _count(build_empty(name))


def _count(backbone: "Backbone") -> Counted:
    from featcache.backbones.load import published

    full, licence, _ = published(backbone.name)
    height, width = backbone.preprocess.crop
    return Counted(full, height, width, backbone.dim, count_macs(backbone), count_parameters(backbone), licence)


def count_parameters(backbone: "Backbone") -> int:
    """Values in all its parameters."""
    return sum(parameter.numel() for parameter in backbone.module.parameters())


def count_macs(backbone: "Backbone") -> int:
    """Multiply-adds per image at the backbone's input size, as PyTorch's flop counter sees them; runs it once.

    Raises:
        BackboneError: it does not run at that size.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device, size = next(backbone.module.parameters()).device, backbone.preprocess.crop
    try:
        with device, torch.no_grad(), FlopCounterMode(display=False) as counter:
            backbone.module(torch.zeros(1, 3, *size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(f"{backbone.name} does not run on {size[0]}x{size[1]} pixels ({reason})") from error
    return int(counter.get_total_flops()) // 2
