"""``Model.network()``: one PyTorch module that computes what ``predict`` says, whatever the head, pooling and training."""

import copy
import dataclasses
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPEC

import featcache
from featcache.backbones.backbone import weights_bytes
from featcache.backbones.load import load_backbone
from featcache.heads.head import SCALINGS, FittedHead, Head
from featcache.models.model import Model, load_model, save_model
from featcache.spec import PreprocessSpec

EDGE, MEAN, STD = 32, (0.4, 0.45, 0.5), (0.2, 0.25, 0.3)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, EDGE, EDGE, 3)).astype(np.uint8)  # as large as the input: neither resized nor cropped
IMAGES = torch.from_numpy(
    ((PIXELS / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
)  # as the docstring says


def make(path: Path, name: str, scaling: Any, hidden: int = 0, finetuned: bool = False, **taken: Any) -> Model:
    """A model with a made-up head whose probabilities are neither all alike nor 0 and 1."""
    backbone = load_backbone(name, "none", size=(EDGE, EDGE), **taken)
    with torch.inference_mode():
        some = backbone.module(torch.randn(8, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(1))).numpy()
    mean, scale = some.mean(axis=0).astype(float), some.std(axis=0).astype(float) + some.std() / 10
    size = {"none": np.linalg.norm(some, axis=1).mean(), "unit": 1.0, "standardise": backbone.dim**0.5}[scaling]
    rng, sizes = np.random.default_rng(0), [backbone.dim, *([hidden] if hidden else []), 3]
    layers = tuple((rng.normal(0, 3 / size, (b, a)), rng.normal(0, 1, b)) for a, b in pairwise(sizes))
    head = Head("mlp" if hidden else "logreg", scaling, mean, scale, layers).at_temperature(1.7)
    preprocess = PreprocessSpec(resize=EDGE, crop=(EDGE, EDGE), interpolation="bilinear", mean=MEAN, std=STD)
    same = {"weights_sha256": backbone.weights_sha256, "pooling": backbone.pooling, "layers": backbone.layers}
    save_model(
        path,
        FittedHead(head, (), {}, []),
        classes=("a", "b", "c"),
        spec=dataclasses.replace(
            SPEC, backbone=name, layer=backbone.layer, preprocess=preprocess, storage="float32", **same
        ),
        weights={"source": "random", "reload": None},
        training={},
        metrics={},
        files={"backbone.safetensors": weights_bytes(backbone)},
        finetuned=finetuned,
    )
    return load_model(path)


def probabilities(network: torch.nn.Module, images: torch.Tensor = IMAGES) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(network(images).double().softmax(1).numpy())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("squeezenet1_1", {"scaling": scaling}) for scaling in SCALINGS),
        ("squeezenet1_1", {"scaling": "standardise", "hidden": 7}),
        ("squeezenet1_1", {"scaling": "standardise", "finetuned": True}),
        ("timm/vit_tiny_patch16_224", {"scaling": "standardise", "pool": "cls+mean", "layers": 2}),
        pytest.param(
            "timm/vit_tiny_patch16_224", {"scaling": "unit", "pool": "mean", "hidden": 7}, marks=pytest.mark.slow
        ),
        pytest.param("resnet18", {"scaling": "none", "layers": 3}, marks=pytest.mark.slow),
    ],
)
def test_it_computes_what_predict_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("featcache.backbones.encoder.has_bf16_arithmetic", lambda: False)
    model = make(tmp_path / "m", name, **options)
    network = model.network()
    expected = np.stack([row.probabilities for row in model.predict(PIXELS)])
    assert expected.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(probabilities(network), expected, atol=2e-5)
    assert (network.training, next(network.parameters()).dtype) == (False, torch.float32)


@pytest.mark.parametrize("finetuned", [False, True])
def test_info_counts_the_same(tmp_path: Path, finetuned: bool) -> None:
    model = make(tmp_path / "m", "timm/vit_tiny_patch16_224", "standardise", finetuned=finetuned, layers=2)
    network, facts = model.network(), featcache.describe(model.path)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    assert facts["parameters"] == sum(size for size, _ in sizes)
    trained = sum(size for size, trains in sizes if trains)
    head = sum(parameter.numel() for parameter in network.head.parameters())
    assert trained == (facts["parameters"] if finetuned else head)
    assert facts["trainable_parameters"] == (None if finetuned else head)  # which only its training's own record says
    assert (facts["backbone"]["dim"], facts["backbone"]["input"]) == (model.head.dim, (EDGE, EDGE))
    assert "licence" not in facts["backbone"]  # of these weights, which no library provides


def test_it_is_a_module_like_others(tmp_path: Path) -> None:
    model = make(tmp_path / "m", "timm/vit_tiny_patch16_224", "unit", pool="cls+mean", layers=2)
    network = model.network()
    expected = probabilities(network)
    twin = copy.deepcopy(network)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(probabilities(twin), expected)  # a copy of its own
    network.load_state_dict(torch.load(file, weights_only=True))
    np.testing.assert_array_equal(probabilities(network), expected)
    np.testing.assert_array_equal(probabilities(model.network()), expected)
    np.testing.assert_allclose(probabilities(twin.double(), IMAGES.double()), expected, atol=1e-5)
    assert twin.to("meta")(IMAGES.to("meta", torch.float64)).is_meta  # nothing stays behind on the CPU
    network.requires_grad_(True)(IMAGES).sum().backward()
    assert all(p.grad is not None for p in network.head.parameters())
