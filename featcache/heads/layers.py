"""A trained head as PyTorch layers. In: a ``Head``. Out: the ``nn.Linear`` and ``nn.ReLU`` modules that compute its logits."""

import numpy as np
import torch
from torch import nn

from featcache.heads.head import Head

NO_LENGTH = 1e-30


def linear_layers(head: Head, *, factor: float = 1.0) -> list[nn.Module]:
    """Linear layers in float32 with ReLU between them; the first holds the standardisation as well.

    W ((x - mean) / scale) + b = (W / scale) x + (b - (W / scale) mean), computed in float64 and rounded once. Embeddings
    of the scaling ``unit`` have to come in with unit length: no linear layer can do that.

    Args:
        head: whose layers.
        factor: the layers take embeddings multiplied by it; their first weights are divided by it.
    """
    arrays = [(weight.astype(np.float64), bias.astype(np.float64)) for weight, bias in head.layers]
    weight, bias = arrays[0]
    if head.scaling == "standardise":
        weight = weight / head.scale.astype(np.float64)
        bias = bias - weight @ head.mean.astype(np.float64)
    arrays[0] = weight / factor, bias
    modules: list[nn.Module] = []
    for weight, bias in arrays:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        modules += [nn.ReLU(), layer] if modules else [layer]
    return modules


class UnitLength(nn.Module):
    """``unit_length`` as a layer, (N, D) -> (N, D)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return unit_length(x)


def as_module(head: Head) -> nn.Sequential:
    """The whole head, (N, D) float32 embeddings -> (N, C) logits."""
    return nn.Sequential(*([UnitLength()] if head.scaling == "unit" else []), *linear_layers(head))


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """As ``heads.scale_features``: a row of zeros stays one, any other length that float32 can square is divided by."""
    return nn.functional.normalize(x, dim=1, eps=NO_LENGTH)
