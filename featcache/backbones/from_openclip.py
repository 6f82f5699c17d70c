"""The image towers of open_clip as backbones: ``openclip/ARCH/TAG``. The one door to open_clip.

The embedding is what enters the projection to the space shared with texts: so Radford et al. 2021 (CLIP, appendix A) evaluate
linear probes of their ViTs. Towers without such a layer give what they give. Text towers are never built or kept.
"""

import contextlib
import dataclasses
import functools
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from featcache.backbones import from_timm, hub
from featcache.backbones.backbone import (
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
from featcache.backbones.pooling import Taps, Tokens, lines_of_maps, of_map
from featcache.errors import BackboneError, MissingDependencyError, UsageError
from featcache.spec import PreprocessSpec, Taken

log = logging.getLogger("featcache")
_NO_PROJECTION = "the contrastive loss"  # enters it as it is


def names() -> list[str]:
    """All of open_clip's pretrained models, as ``openclip/ARCH/TAG``. Raises MissingDependencyError."""
    return [f"openclip/{arch}/{tag}" for arch, tag in _open_clip().list_pretrained()]


def is_name(name: str) -> bool:
    """Whether open_clip has such a model; ``openclip/ARCH`` alone is a name for weights of one's own. Raises MissingDependencyError."""
    arch, tag = _parts(name)
    return arch in _open_clip().list_models() and (not tag or tag in _open_clip().list_pretrained_tags_by_model(arch))


def weights_names(name: str) -> list[str]:
    """None: the weights of a model are part of its name."""
    return []


def build(
    name: str, n_classes: int, size: tuple[int, int], *, pooling: str, config: Any
) -> tuple[nn.Module, list[str]]:
    """``load.build_network``: the tower without its projection, in whose place a head has no room."""
    arch, tag = _parts(name)
    gelu = _is_quick_gelu(arch, tag)
    tower, layer = _build(arch, gelu)
    lines = [
        f"config = open_clip.get_model_config({arch!r})",
        f"network = open_clip.model._build_vision_tower(config['embed_dim'], config['vision_cfg'], {gelu})",
    ]
    if layer == "proj":
        lines += ["network.proj, network.output_tokens = None, False"]
    elif layer != _NO_PROJECTION:
        lines.append(f"network.set_submodule({layer!r}, torch.nn.Identity())")
    if _pair(tower.image_size) != size:
        _set_size(name, tower, size)
        if not hasattr(tower, "trunk"):
            shape = tuple(tower.positional_embedding.shape)
            lines.append(f"network.positional_embedding = torch.nn.Parameter(torch.empty{shape})")
        elif from_timm.is_of_one_size(tower.trunk):
            lines.append(f"network.trunk.set_input_size(img_size={size})")
    return tower, lines


def load(name: str, weights: str | Path, *, taken: Taken) -> Backbone:
    """``load.load_backbone`` for an image tower of open_clip's."""
    arch, tag = _parts(name)
    record = _open_clip().get_pretrained_cfg(arch, tag) if tag else {}
    tables: list[Table] = []
    if weights == "auto":
        tables, source = _download(name, record), f"open_clip {tag}"
    elif weights == "none":
        source = "random, seed 0"
    else:
        tables, source = read_weights(Path(weights), []), f"file {Path(weights).name}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower, layer = _build(arch, _is_quick_gelu(arch, tag, said=True))
    spec = _preprocessing(name, record, _pair(tower.image_size))
    if tables:
        ignore = ("proj",) if layer == "proj" else (f"{layer}.",)
        source = load_tables(tower, tables, ignore=ignore, source=source)
    with torch.inference_mode():
        dim = int(tower.eval()(torch.zeros(1, 3, *spec.crop)).shape[1])
    backbone = freeze(name, tower, dim, layer, spec, source, "auto" if weights == "auto" else None)
    backbone = with_input_size(backbone, for_size(spec, taken.size), functools.partial(_set_size, name))
    return with_pooling(backbone, _taps(tower), taken)


def _parts(name: str) -> tuple[str, str]:
    """(ARCH, TAG); ARCH is empty if ``name`` cannot be a name of open_clip's, which would also take folders and addresses."""
    found = re.fullmatch(r"openclip/([\w.-]+)(?:/([\w.-]+))?", name)
    return (found[1], found[2] or "") if found else ("", "")


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _is_quick_gelu(arch: str, tag: str, *, said: bool = False) -> bool:
    """Whether the activation is QuickGELU: as the architecture has it, or as the weights were trained with."""
    own = bool(_open_clip().get_model_config(arch).get("quick_gelu"))
    trained = bool(tag and _open_clip().get_pretrained_cfg(arch, tag).get("quick_gelu"))
    if said and trained and not own:
        log.info("activation QuickGELU: so %s was trained; the architecture %s alone would take GELU", tag, arch)
    return own or trained


def _build(arch: str, quick_gelu: bool) -> tuple[Any, str]:
    """The image tower with random weights, without its projection; and the projection's name."""
    config = _open_clip().get_model_config(arch)
    try:
        # Not create_model: it builds the text tower as well, whose configuration may have to be downloaded.
        tower: Any = _open_clip().model._build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu)
    except Exception as error:  # of a configuration that is the user's own, or a timm without that network
        raise BackboneError(f"open_clip cannot build {arch}: {' '.join(str(error).split())[:200]}") from error
    if hasattr(tower, "proj"):
        tower.proj, tower.output_tokens = None, False
        return tower, "proj"
    if not hasattr(tower, "trunk"):  # a ResNet, whose attention pooling ends in the projection
        return tower, _NO_PROJECTION
    inner = tower.trunk.pretrained_cfg.get("classifier")
    for layer in ("head.proj", "head.mlp", f"trunk.{inner}"):
        with contextlib.suppress(AttributeError):
            if not isinstance(tower.get_submodule(layer), nn.Identity):
                tower.set_submodule(layer, nn.Identity())
                return tower, layer
    return tower, _NO_PROJECTION


def _taps(tower: Any) -> Taps:
    """What can be taken out of an image tower."""
    if hasattr(tower, "trunk"):
        return _taps_of_timm(tower)
    if not hasattr(tower, "transformer"):
        return Taps("attention", depth=4, read=_read_stages, lines=_lines_of_stages)
    if tower.attn_pool is not None:  # its last norm is of the pooler's width, not the tokens'
        return Taps("attention")
    own = {"tok": "cls", "avg": "mean"}.get(tower.pool_type, tower.pool_type)
    late = tower.final_ln_after_pool
    return Taps(
        own,
        has_cls=True,
        has_tokens=True,
        depth=len(tower.transformer.resblocks),
        read=_read_tokens,
        finish="ln_post" if late else "",
        lines=functools.partial(_lines_of_tokens, late=late),
    )


def _taps_of_timm(tower: Any) -> Taps:
    """timm's, of the trunk: a head without a projection has nothing left but a pooling of its own."""
    if "pool" in dict(tower.head.named_children()):
        return Taps("attention")
    return dataclasses.replace(from_timm.taps(tower.trunk, several=False), trained=True).below("trunk")


def _read_tokens(tower: Any, pixels: torch.Tensor, layers: int) -> list[Tokens]:
    found = tower.forward_intermediates(
        pixels,
        indices=layers,
        normalize_intermediates=not tower.final_ln_after_pool,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    patches, prefix = found["image_intermediates"], found["image_intermediates_prefix"]
    return [Tokens(x, cls[:, 0]) for x, cls in zip(patches, prefix, strict=True)]


def _lines_of_tokens(layers: int, *, late: bool) -> list[str]:
    return [
        f"found = network.forward_intermediates(pixels, indices={layers}, normalize_intermediates={not late}, "
        "intermediates_only=True, output_fmt='NLC', output_extra_tokens=True)",
        "found = list(zip(found['image_intermediates'], (x[:, 0] for x in found['image_intermediates_prefix'])))",
    ]


def _read_stages(tower: Any, pixels: torch.Tensor, layers: int) -> list[Tokens]:
    """The mean of each stage's map of a ResNet; of the last one what its attention pooling gives."""
    x, maps = tower.stem(pixels), []
    for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        x = stage(x)
        maps.append(x)
    return [*map(of_map, maps[-layers:-1]), Tokens(tower.attnpool(x)[:, None])]


def _lines_of_stages(layers: int) -> list[str]:
    return lines_of_maps([f"layer{number}" for number in range(5 - layers, 4)], (2, 3))


def _set_size(name: str, tower: Any, size: tuple[int, int]) -> None:
    """Resample position embeddings as open_clip does when told ``force_image_size``. Raises UsageError."""
    if hasattr(tower, "trunk"):
        from_timm.set_size(name, tower.trunk, size)
    elif hasattr(tower, "attnpool"):
        own = _pair(tower.image_size)
        raise UsageError(f"{name} takes inputs of {own[0]}x{own[1]} pixels only; leave --crop out")
    else:
        check_multiple(name, size, tower.patch_size)
        tower.grid_size = tuple(edge // of for edge, of in zip(size, tower.patch_size, strict=True))
        state = {"visual.positional_embedding": tower.positional_embedding.data}
        _open_clip().model.resize_pos_embed(state, SimpleNamespace(visual=tower))
        tower.positional_embedding = nn.Parameter(state["visual.positional_embedding"], requires_grad=False)
    tower.image_size = size


def _preprocessing(name: str, record: dict[str, Any], size: tuple[int, int]) -> PreprocessSpec:
    """open_clip's own record of the weights, as ``image_transform`` follows it. Raises BackboneError: it cannot be followed."""
    config = _open_clip().transform.PreprocessCfg(
        **{key: record[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in record}
    )
    if config.resize_mode != "squash" and (config.resize_mode != "shortest" or size[0] != size[1]):
        raise BackboneError(
            f"{name} resizes its input in a way featcache does not know ({config.resize_mode}, {size[0]}x{size[1]})"
        )
    return PreprocessSpec(
        resize=size if config.resize_mode == "squash" else size[0],
        crop=size,
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",  # as there
        mean=tuple(config.mean),
        std=tuple(config.std),
    )


def _download(name: str, record: dict[str, Any]) -> list[Table]:
    """The tables of the published weights. Raises DownloadError; BackboneError: there are none, or no safe file of them."""
    if not record:
        tags = ", ".join(_open_clip().list_pretrained_tags_by_model(_parts(name)[0])) or "none"
        raise BackboneError(f"{name} has no weights of its own: give --weights FILE, or one of its tags: {tags}")
    with hub.reaching(str(record.get("hf_hub") or "").rpartition("/")[0], name=name):
        path = _open_clip().download_pretrained(record)
    return read_weights(Path(path), [])


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(
            "openclip/... backbones need open_clip: pip install 'featcache[openclip]'"
        ) from error
    return open_clip
