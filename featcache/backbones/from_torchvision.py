"""torchvision's classification models as backbones."""

import dataclasses
import functools
import hashlib
import logging
import math
import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones import hub
from featcache.backbones.backbone import (
    Backbone,
    Table,
    check_multiple,
    for_size,
    freeze,
    load_tables,
    read_weights,
    rename_tensors,
    with_input_size,
    with_pooling,
)
from featcache.backbones.pooling import Taps, Tokens, lines_of_blocks, lines_of_maps, of_map
from featcache.errors import BackboneError, DownloadError, UsageError
from featcache.spec import PreprocessSpec, Taken
from featcache.system.lazy_imports import compiler_on_demand

with compiler_on_demand():
    import torchvision

log = logging.getLogger("featcache")
_POSITIONS = "encoder.pos_embedding"  # of its ViTs
_LICENCE = " (its licence is non-commercial, CC-BY-NC 4.0)"
# Built this way, both behave as with torchvision's own weights: no auxiliary heads, inputs re-normalised inside.
_STAGED = (torchvision.models.ResNet, torchvision.models.ConvNeXt, torchvision.models.SwinTransformer)
_BUILD = {
    name: {"aux_logits": False, "transform_input": True, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}


def names() -> list[str]:
    """All of torchvision's classification models."""
    return list(torchvision.models.list_models(module=torchvision.models))


def is_name(name: str) -> bool:
    """Whether torchvision has a classification model of this name."""
    return name in names()


def weights_names(name: str) -> list[str]:
    """Names of the weights that torchvision provides for ``name``; none if that is no model of its."""
    return [member.name for member in torchvision.models.get_model_weights(name)] if is_name(name) else []


def published(name: str) -> tuple[str, str | None, PreprocessSpec]:
    """``load.published`` of the weights that ``auto`` takes, and the preprocessing."""
    available = {member.name: member for member in torchvision.models.get_model_weights(name)}
    chosen, _ = _prefer(list(available))
    licence = "cc-by-nc-4.0" if "SWAG" in chosen else "bsd-3-clause"  # torchvision's own, but for those of SWAG
    return name, licence, _preset_spec(available[chosen].transforms())


def build(
    name: str, n_classes: int, size: tuple[int, int], *, pooling: str = "", config: str = ""
) -> tuple[nn.Module, list[str]]:
    """``load.build_network``."""
    options = {"num_classes": n_classes, **_BUILD.get(name, {})}
    if name.startswith("vit_"):
        options["image_size"] = size[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces slow initialisation of weights we replace
        network = torchvision.models.get_model(name, **options)
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return network, [f"network = torchvision.models.get_model({name!r}, {arguments})"]


def load(name: str, weights: str | Path, *, taken: Taken) -> Backbone:
    """``load.load_backbone`` for a model of torchvision's."""
    available = {member.name: member for member in torchvision.models.get_model_weights(name)}
    chosen, reason = _prefer(list(available))
    tables: list[Table] = []
    reload: str | None = None
    if weights == "none":
        source = "random, seed 0"
    elif weights == "auto" or str(weights) in available:
        if weights != "auto":
            chosen, reason = str(weights), "as asked"
        log.debug("weights %s: %s", chosen, reason)
        source, reload = f"torchvision {chosen}{_LICENCE if 'SWAG' in chosen else ''}", chosen
        tables = [_download(name, available[chosen])]
    else:
        tables, source = read_weights(Path(weights), list(available)), f"file {Path(weights).name}"
    preprocess = _preset_spec(available[chosen].transforms())
    edge = _vit_input_size(name, tables)
    if edge and edge != preprocess.crop[0]:
        preprocess = dataclasses.replace(preprocess, resize=edge, crop=(edge, edge))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _ = build(name, 1000, preprocess.crop)
    layer = _classifier(model, name)
    classifier: Any = model.get_submodule(layer)
    model.set_submodule(layer, nn.Identity())
    # SqueezeNet classifies with a convolution; the pooling after it is the network's own.
    dim = int(classifier.in_channels if isinstance(classifier, nn.Conv2d) else classifier.in_features)
    if name.startswith("densenet"):  # its published files carry names from before modules could not have dots
        tables = [dataclasses.replace(table, tensors=rename_tensors(table.tensors, _without_dots)) for table in tables]
    if tables:
        source = load_tables(model, tables, ignore=(f"{layer}.", "aux1.", "aux2.", "AuxLogits."), source=source)
    backbone = freeze(name, model, dim, layer, preprocess, source, reload)
    backbone = with_input_size(backbone, for_size(preprocess, taken.size), functools.partial(_set_size, name))
    return with_pooling(backbone, _taps(name, model), taken)


def _taps(name: str, model: Any) -> Taps:
    if isinstance(model, _STAGED):
        return Taps("maps", depth=4, read=_read_maps, lines=functools.partial(_lines_of_stages, model))
    if not name.startswith("vit_"):
        return Taps("maps")
    blocks = [f"encoder.layers.{block}" for block, _ in model.encoder.layers.named_children()]
    return Taps(
        "cls",
        has_cls=True,
        has_tokens=True,
        depth=len(blocks),
        read=_read_tokens,
        lines=lambda layers: lines_of_blocks(blocks[-layers:], "encoder.ln"),
    )


def _lines_of_stages(model: Any, layers: int) -> list[str]:
    of_resnet = isinstance(model, torchvision.models.ResNet)
    stages = [f"layer{number}" if of_resnet else f"features.{2 * number - 1}" for number in range(1, 5)]
    spatial = (1, 2) if isinstance(model, torchvision.models.SwinTransformer) else (2, 3)
    return lines_of_maps(stages[-layers:-1], spatial)


def _read_maps(model: Any, pixels: torch.Tensor, layers: int) -> list[Tokens]:
    """The mean of each stage's map; of the last one what enters the classifier."""
    if isinstance(model, torchvision.models.ResNet):
        x = model.maxpool(model.relu(model.bn1(model.conv1(pixels))))
        parts = [(part, True) for part in (model.layer1, model.layer2, model.layer3, model.layer4)]
    else:  # stem or merging of patches, and a stage, by turns
        x, parts = pixels, [(part, index % 2 == 1) for index, part in enumerate(model.features)]
    maps = []
    for part, is_stage in parts:
        x = part(x)
        maps += [x] if is_stage else []
    if isinstance(model, torchvision.models.SwinTransformer):
        maps = [model.permute(x) for x in maps]  # to (N, C, H, W)
        x = model.permute(model.norm(x))
    x = model.avgpool(x)
    own = model.classifier(x) if isinstance(model, torchvision.models.ConvNeXt) else x.flatten(1)
    return [*map(of_map, maps[-layers:-1]), Tokens(own[:, None])]


def _read_tokens(model: Any, pixels: torch.Tensor, layers: int) -> list[Tokens]:
    """The last blocks of a ViT, as its own forward pass computes them."""
    x = model._process_input(pixels)
    x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)  # not len(x), which cannot be traced
    x = model.encoder.dropout(x + model.encoder.pos_embedding)
    found = [x]
    for block in model.encoder.layers:
        x = block(x)
        found = [*found, x][-layers:]
    normalised = [model.encoder.ln(x) for x in found]
    return [Tokens(x[:, 1:], x[:, 0]) for x in normalised]


def _set_size(name: str, model: Any, size: tuple[int, int]) -> None:
    """Resample a ViT's position embeddings as torchvision does; its other networks take any size, or say so. Raises UsageError."""
    if not name.startswith("vit_"):
        return
    edge, patch = size[0], model.patch_size
    check_multiple(name, size, (patch, patch))
    if size != (edge, edge):
        raise UsageError(f"{name} takes square inputs only, found {size[0]}x{size[1]}")
    state = OrderedDict({_POSITIONS: model.encoder.pos_embedding.data})
    positions = torchvision.models.vision_transformer.interpolate_embeddings(edge, patch, state)[_POSITIONS]
    model.encoder.pos_embedding = nn.Parameter(positions, requires_grad=False)
    model.image_size, model.seq_length = edge, positions.shape[1]


def _without_dots(key: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key)


def _vit_input_size(name: str, tables: list[Table]) -> int | None:
    """Pixels per edge that a ViT's position embeddings were made for; None if ``tables`` fix no size."""
    for table in tables if name.startswith("vit_") else []:
        for key, position in table.tensors.items():
            if key.endswith(_POSITIONS) and position.ndim == 3:
                return math.isqrt(position.shape[1] - 1) * int(name.rsplit("_", 1)[1])
    return None


def _prefer(names: list[str]) -> tuple[str, str]:
    """Which generation of weights to take, and why."""
    first, swag = "IMAGENET1K_V1", "IMAGENET1K_SWAG_LINEAR_V1"
    if swag in names and first not in names:
        return swag, "made for frozen use"
    if first not in names:
        return names[-1], "there are no others"
    others = [name for name in names if name != first]
    if "IMAGENET1K_V2" in others:
        # Kornblith et al. 2021, "Why do better loss functions lead to less transferable features?"
        return first, "V2's label smoothing and mixup score higher on ImageNet but transfer worse frozen"
    return (
        first,
        f"also there, under a non-commercial licence: {', '.join(others)}" if others else "there are no others",
    )


def _download(name: str, member: Any) -> Table:
    path = Path(torch.hub.get_dir()) / "checkpoints" / member.url.rsplit("/", 1)[-1]
    try:
        _check_downloaded(path)
        if not path.exists():
            log.info("downloading %s", member.url)
        with hub.downloading():
            state = member.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return Table(rename_tensors(state, str), "")
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # a wrong hash is a RuntimeError
        reason = str(error).strip("<>").removeprefix("urlopen error ")
        failed = DownloadError(f"the weights {member.name} of {name} could not be downloaded ({reason})")
        failed.place = str(path)
        raise failed from error


def _check_downloaded(path: Path) -> None:
    """Compare weights of an earlier download with the sha256 in their name; PyTorch does so only while downloading.

    Raises:
        BackboneError: they are not what was published.
    """
    expected = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if expected is None or not path.is_file():
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected[1]):
        raise BackboneError(f"{path} is damaged: its sha256 begins with {found[:8]}; delete it to download it again")


def _classifier(model: nn.Module, name: str) -> str:
    """Name of the final classification layer: the last linear or convolutional layer, in order of registration."""
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise BackboneError(f"{name} has no classification layer to take the input of")
    return str(layers[-1])


def _preset_spec(preset: Any) -> PreprocessSpec:
    crop = (preset.crop_size * 2)[:2]
    return PreprocessSpec(
        resize=preset.resize_size[0] if len(preset.resize_size) == 1 else tuple(preset.resize_size),
        crop=(crop[0], crop[1]),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
