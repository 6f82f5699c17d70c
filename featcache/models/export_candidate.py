"""The content of an exported file before there is a file, and what every format shares.

In: a model and its backbone. Out: ``Candidate``: bytes, how to use them, and what they compute on a few made-up pictures.
"""

import dataclasses
import importlib.metadata
import json

import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.heads.head import Array, Head
from featcache.heads.layers import as_module
from featcache.images.preprocess import channel_constants
from featcache.models.limits import exported_limits
from featcache.models.model import Model
from featcache.spec import PreprocessSpec


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A file's content before it is one. ``logits``, ``probabilities``: what it makes of ``sample_pixels``."""

    data: bytes
    inputs: dict[str, str]
    outputs: dict[str, str]
    usage: str
    logits: Array
    probabilities: Array


class Network(nn.Module):
    """Pixels (N, 3, H, W) in 0..1 -> probabilities, logits (N, C)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        mean, std = channel_constants(backbone.preprocess, torch.device("cpu"))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.backbone = backbone.module
        self.head = as_module(head).requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probabilities, logits)."""
        logits = self.head(self.backbone((pixels - self.mean) / self.std))
        return logits.softmax(dim=1), logits


def sample_pixels(spec: PreprocessSpec) -> torch.Tensor:
    """Four made-up pictures, float32 (4, 3, H, W) in 0..1: blurred patches with noise, as photographs are, seeded."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand((4, 3, 5, 5), generator=generator)
    smooth = nn.functional.interpolate(patches, size=spec.crop, mode="bilinear")
    noise = torch.randn(smooth.shape, generator=generator)
    return (smooth + 0.05 * noise).clamp(0, 1)


def normalise_pixels(pixels: torch.Tensor, spec: PreprocessSpec) -> torch.Tensor:
    """(n, 3, H, W) in 0..1 -> what a backbone takes."""
    mean, std = channel_constants(spec, torch.device("cpu"))
    return (pixels - mean) / std


def metadata(model: Model, backbone: Backbone, *, normalisation: str) -> dict[str, str]:
    """Classes, preprocessing, origin, and thresholds of prediction sets with their rule if the model has any, as both formats
    carry them. ``normalisation``: who does it, in words.
    """
    return {
        "featcache_version": importlib.metadata.version("featcache"),
        "fingerprint": model.fingerprint,
        "head_sha256": model.manifest["head"]["sha256"],
        "backbone": backbone.name,
        # Names of files may hold bytes that are not UTF-8, on which both formats insist.
        "weights": backbone.weights.encode("utf-8", "backslashreplace").decode(),
        "weights_sha256": backbone.weights_sha256,
        "classes": json.dumps(model.classes),
        "preprocess": _preprocess_in_words(backbone.preprocess, normalisation),
    } | ({} if (limits := exported_limits(model)) is None else {"limits": json.dumps(limits)})


def _preprocess_in_words(spec: PreprocessSpec, normalisation: str) -> str:
    """Words that need no featcache, as JSON, in the order of the steps."""
    height, width = spec.crop
    resize = (
        {"shorter_edge": spec.resize, "aspect_ratio": "kept"}
        if isinstance(spec.resize, int)
        else {"height": spec.resize[0], "width": spec.resize[1], "aspect_ratio": "not kept"}
    )
    steps = {
        "decode": f"{spec.decode}; 8 bit per channel; orientation: {spec.orientation}; alpha: {spec.alpha}; deep: {spec.deep}; "
        f"frame: {spec.frame}; colour profile: {spec.profile}",
        "channel_order": "RGB",
        "resize": resize,
        "interpolation": spec.interpolation,
        "antialias": spec.antialias,
        "crop": {"height": height, "width": width, "position": "centre"},
        "range": [0.0, 1.0],
        "scale": "divide by 255",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "normalisation": normalisation,
        "layout": "NCHW",
    }
    return json.dumps(steps)
