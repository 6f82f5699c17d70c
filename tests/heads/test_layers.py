"""A head's PyTorch layers compute what the head itself computes with NumPy."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featcache.heads.head import SCALINGS, Head, scale_features
from featcache.heads.layers import linear_layers

DIM, CLASSES = 40, 3


def make_head(kind: Any, scaling: Any, dtype: Any = np.float64, *, offset: float = 1.0) -> Head:
    """A made-up head; embeddings lie ``offset`` standard deviations from the origin."""
    rng = np.random.default_rng(0)
    sizes = [DIM, *([7] if kind == "mlp" else []), CLASSES]
    layers = tuple(
        (rng.normal(0, 1, (b, a)).astype(dtype), rng.normal(0, 1, b).astype(dtype)) for a, b in pairwise(sizes)
    )
    scale = rng.uniform(1e-3, 1e3, DIM).astype(dtype)
    return Head(kind, scaling, (offset * scale).astype(dtype), scale, layers)


def embeddings(head: Head) -> np.ndarray:
    return head.mean + head.scale * np.random.default_rng(1).normal(0, 1, (50, DIM))


def compute(layers: list[nn.Module], x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(nn.Sequential(*layers)(torch.from_numpy(x.astype(np.float32))).numpy())


@pytest.mark.parametrize("factor", [1.0, 0.02, 300.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", ["logreg", "linear", "mlp"])
def test_layers_compute_the_heads_logits(kind: str, scaling: Any, dtype: Any, factor: float) -> None:
    head = make_head(kind, scaling, dtype)
    X = embeddings(head).astype(np.float32)
    exact = head.logits(X)
    x = scale_features(X, "unit", head.mean, head.scale) if scaling == "unit" else X
    logits = compute(linear_layers(head, factor=factor), x * factor)
    np.testing.assert_allclose(logits, exact, atol=1e-5 * np.abs(exact).max())


def test_standardisation_is_folded_in_double_precision() -> None:
    head = make_head("linear", "standardise", np.float32, offset=1e4)
    (layer,) = linear_layers(head)
    (weight, bias), mean, scale = head.layers[0], head.mean.astype(float), head.scale.astype(float)
    expected = (bias - (weight.astype(float) / scale) @ mean).astype(np.float32)
    np.testing.assert_array_equal(layer.state_dict()["bias"].numpy(), expected)
    assert (bias - (weight / head.scale) @ head.mean != expected).any()  # as float32 would have it
