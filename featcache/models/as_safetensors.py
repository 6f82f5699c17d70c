"""A model as safetensors: the whole network's tensors for PyTorch, under the architecture's own names.

They take normalised pixels, as they do for everybody else. Where the head is one linear layer it becomes the final layer of
the architecture; where it is more than that, its layers are called ``featcache_head.*``.
"""

import numpy as np
import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.load import build_network
from featcache.errors import ExportError
from featcache.heads.head import Head, softmax
from featcache.heads.layers import linear_layers
from featcache.images.preprocess import channel_constants
from featcache.models.export_candidate import (
    HEAD_PREFIX,
    NO_LENGTH,
    Array,
    Candidate,
    embed_sample,
    metadata,
    output_shape,
    sample_pixels,
    unit_length,
)
from featcache.models.model import Model


def make_safetensors(model: Model, backbone: Backbone, name: str) -> Candidate:
    """Convert. ``name`` is the file's. Raises ExportError."""
    from safetensors.torch import load, save

    layers = nn.Sequential(*linear_layers(model.head))
    network, build = build_network(backbone.name, len(model.classes), backbone.preprocess.crop[0])
    original = _fits_original(network, backbone, model.head)
    prefix = f"{backbone.layer}." if original else f"{HEAD_PREFIX}."
    head = layers[0].state_dict() if original else layers.state_dict()
    tensors = backbone.module.state_dict() | {prefix + key: value for key, value in head.items()}
    usage = _usage(build, name, backbone, None if original else model.head)
    facts = metadata(model, backbone, normalised_inside=False) | {
        "format": "pt",
        "head": f"{prefix}*" + ("" if original else ", after the network; see usage"),
        "usage": usage,
    }
    # clones: safetensors refuses tensors that share memory
    data = save({key: value.clone().contiguous() for key, value in tensors.items()}, facts)
    pixels = sample_pixels(backbone.preprocess)
    mean, std = channel_constants(backbone.preprocess, torch.device("cpu"))
    logits = _reload(network, load(data), (pixels - mean) / std, backbone, None if original else model.head)
    height, width = backbone.preprocess.crop
    return Candidate(
        data=data,
        inputs={"pixels": f"float32 (N, 3, {height}, {width}), RGB in 0..1, then normalised by mean and std"},
        outputs={"logits": output_shape(model)},
        usage=usage,
        embeddings=embed_sample(backbone, pixels),
        logits=logits,
        probabilities=softmax(logits),
    )


def _fits_original(network: nn.Module, backbone: Backbone, head: Head) -> bool:
    """Whether the head can be the architecture's own final layer: one linear layer in place of one, and its bias."""
    if len(head.layers) > 1 or head.scaling == "unit" or len(_final_layers(backbone)) != 1:
        return False
    final = network.get_submodule(_final_layers(backbone)[0])
    # SqueezeNet's is a convolution with a ReLU behind it, MaxViT's has no bias.
    return isinstance(final, nn.Linear) and final.bias is not None and final.in_features == head.dim


def _final_layers(backbone: Backbone) -> list[str]:
    """Names that the backbone took its classifier out of: mostly one; timm has some with two, or none."""
    names = backbone.layer.split(" and ")
    return [name for name in names if isinstance(_submodule(backbone.module, name), nn.Identity)]


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _usage(build: str, name: str, backbone: Backbone, head: Head | None) -> str:
    """Python lines from the file to logits. head: None if it is part of the network."""
    lines = [f"tensors = safetensors.torch.load_file({name!r})", f"network = {build}.eval()"]
    if head is None:
        return "\n".join([*lines, "network.load_state_dict(tensors)", "logits = network(pixels)"])
    sizes = [f"torch.nn.Linear({weight.shape[1]}, {weight.shape[0]})" for weight, _ in head.layers]
    of_head = f"k.startswith('{HEAD_PREFIX}.')"
    lines += [f"network.set_submodule({layer!r}, torch.nn.Identity())" for layer in _final_layers(backbone)]
    lines += [
        f"network.load_state_dict({{k: v for k, v in tensors.items() if not {of_head}}})",
        f"head = torch.nn.Sequential({', torch.nn.ReLU(), '.join(sizes)})",
        f"head.load_state_dict({{k.removeprefix('{HEAD_PREFIX}.'): v for k, v in tensors.items() if {of_head}}})",
        "embeddings = network(pixels)",
    ]
    if head.scaling == "unit":
        lines.append(f"embeddings = torch.nn.functional.normalize(embeddings, dim=1, eps={NO_LENGTH})")
    return "\n".join([*lines, "logits = head(embeddings)"])


def _reload(
    network: nn.Module, tensors: dict[str, torch.Tensor], inputs: torch.Tensor, backbone: Backbone, head: Head | None
) -> Array:
    """Logits (n, C) of normalised ``inputs`` the way ``_usage`` says. Raises ExportError."""
    own = {key: value for key, value in tensors.items() if not key.startswith(f"{HEAD_PREFIX}.")}
    for layer in _final_layers(backbone) if head is not None else ():
        network.set_submodule(layer, nn.Identity())
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        raise ExportError(f"{backbone.name} does not take its own tensors back: {error}; export to .onnx") from error
    with torch.inference_mode():
        outputs = network(inputs)
        if head is not None:
            layers = nn.Sequential(*linear_layers(head))
            layers.load_state_dict({k.removeprefix(f"{HEAD_PREFIX}."): tensors[k] for k in tensors.keys() - own.keys()})
            outputs = layers(unit_length(outputs) if head.scaling == "unit" else outputs)
        return np.asarray(outputs.numpy())
