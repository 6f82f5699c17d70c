"""A model as safetensors: the whole network's tensors for PyTorch, under the architecture's own names.

They take normalised pixels, as they do for everybody else. Where the head is one linear layer it becomes the final layer of
the architecture; where it is more than that, its layers are called ``featcache_head.*``.
"""

import dataclasses

import numpy as np
import torch
from torch import nn

from featcache.backbones.backbone import CONFIG, Backbone
from featcache.backbones.load import build_network
from featcache.errors import ExportError
from featcache.heads.head import Array, Head, softmax
from featcache.heads.layers import NO_LENGTH, linear_layers, unit_length
from featcache.models.export_candidate import Candidate, metadata, normalise_pixels, sample_pixels
from featcache.models.model import Model
from featcache.spec import OWN_POOLING

HEAD_PREFIX = "featcache_head"  # not "head", which some architectures call layers of their own


def make_safetensors(model: Model, backbone: Backbone, name: str) -> Candidate:
    """Convert. ``name`` is the file's. Raises ExportError."""
    from safetensors.torch import load, save

    pooling = backbone.pooling if backbone.layers == 1 else OWN_POOLING
    network, build = build_network(
        backbone.name, len(model.classes), backbone.preprocess.crop, pooling=pooling, config=backbone.config
    )
    if getattr(network, "global_pool", "") == "token" and pooling == "cls":  # timm, told so, does it by itself
        backbone = dataclasses.replace(backbone, lines=())
    apart = None if _fits_original(network, backbone, model.head) else model.head
    prefix = f"{backbone.layer}." if apart is None else f"{HEAD_PREFIX}."
    layers = nn.Sequential(*linear_layers(model.head))
    head = layers[0] if apart is None else layers
    tensors = backbone.module.state_dict() | head.state_dict(prefix=prefix)
    usage = _usage(build, name, backbone, apart)
    facts = metadata(model, backbone, normalisation="subtract mean, divide by std") | {
        "format": "pt",
        "head": f"{prefix}*" + ("" if apart is None else ", after the network; see usage"),
        "usage": usage,
        **({CONFIG: backbone.config} if backbone.config else {}),
    }
    # clones: safetensors refuses tensors that share memory
    data = save({key: value.clone().contiguous() for key, value in tensors.items()}, facts)
    inputs = normalise_pixels(sample_pixels(backbone.preprocess), backbone.preprocess)
    logits = _reload(network, load(data), inputs, backbone, apart)
    height, width = backbone.preprocess.crop
    return Candidate(
        data=data,
        inputs={"pixels": f"float32 (N, 3, {height}, {width}), RGB in 0..1, then normalised by mean and std"},
        outputs={"logits": f"float32 (N, {len(model.classes)})"},
        usage=usage,
        logits=logits,
        probabilities=softmax(logits),
    )


def _fits_original(network: nn.Module, backbone: Backbone, head: Head) -> bool:
    """Whether the head can be the architecture's own final layer: one linear layer in place of one, and its bias."""
    if backbone.lines or len(head.layers) > 1 or head.scaling == "unit" or len(_final_layers(backbone)) != 1:
        return False
    final = network.get_submodule(_final_layers(backbone)[0])
    # SqueezeNet's is a convolution with a ReLU behind it, MaxViT's has no bias.
    return isinstance(final, nn.Linear) and final.bias is not None and final.in_features == head.dim


def _final_layers(backbone: Backbone) -> list[str]:
    """Names that the backbone took its classifier out of: mostly one; timm has some with two, or none."""
    modules = dict(backbone.module.named_modules(remove_duplicate=False))
    return [name for name in backbone.layer.split(" and ") if isinstance(modules.get(name), nn.Identity)]


def _usage(build: str, name: str, backbone: Backbone, head: Head | None) -> str:
    """Python lines from the file to logits. head: None if it is part of the network."""
    lines = [f"tensors = safetensors.torch.load_file({name!r})"]
    lines += [f"facts = safetensors.safe_open({name!r}, 'pt').metadata()"] * bool(backbone.config) + [build]
    if head is None:
        return "\n".join([*lines, "network.load_state_dict(tensors)", "logits = network(pixels)"])
    sizes = [f"torch.nn.Linear({weight.shape[1]}, {weight.shape[0]})" for weight, _ in head.layers]
    of_head = f"k.startswith('{HEAD_PREFIX}.')"
    lines += [f"network.set_submodule({layer!r}, torch.nn.Identity())" for layer in _final_layers(backbone)]
    lines += [
        f"network.load_state_dict({{k: v for k, v in tensors.items() if not {of_head}}})",
        f"head = torch.nn.Sequential({', torch.nn.ReLU(), '.join(sizes)})",
        f"head.load_state_dict({{k.removeprefix('{HEAD_PREFIX}.'): v for k, v in tensors.items() if {of_head}}})",
        *(backbone.lines or ["embeddings = network(pixels)"]),
    ]
    if head.scaling == "unit":
        lines.append(f"embeddings = torch.nn.functional.normalize(embeddings, dim=1, eps={NO_LENGTH})")
    return "\n".join([*lines, "logits = head(embeddings)"])


def _reload(
    network: nn.Module, tensors: dict[str, torch.Tensor], inputs: torch.Tensor, backbone: Backbone, head: Head | None
) -> Array:
    """Logits (n, C) of normalised ``inputs`` the way ``_usage`` says. Raises ExportError."""
    if backbone.lines:  # what they say, on the network just built
        network.__class__ = type(backbone.module)
    own = {key: value for key, value in tensors.items() if not key.startswith(f"{HEAD_PREFIX}.")}
    for layer in _final_layers(backbone) if head is not None else ():
        network.set_submodule(layer, nn.Identity())
    try:
        network.load_state_dict(own)
    except (RuntimeError, ValueError) as error:  # MNASNet asks for a version, which such a file has no place for
        raise ExportError(f"{backbone.name} does not take its own tensors back: {error}; export to .onnx") from error
    with torch.inference_mode():
        outputs = network(inputs)
        if head is not None:
            layers = nn.Sequential(*linear_layers(head))
            layers.load_state_dict({k.removeprefix(f"{HEAD_PREFIX}."): tensors[k] for k in tensors.keys() - own.keys()})
            outputs = layers(unit_length(outputs) if head.scaling == "unit" else outputs)
        return np.asarray(outputs.numpy())
