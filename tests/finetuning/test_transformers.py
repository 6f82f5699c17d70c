"""Transformers and what is built like them: stages and weight decay as timm has them, drop path, poolings that leave parts out."""

import csv
import dataclasses
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import make_photos
from test_input_size import shuffled
from test_network import CPU, JOB, fitted_head, make_pixels
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.ops import stochastic_depth

from featcache.backbones.backbone import Backbone
from featcache.backbones.encoder import Encoder
from featcache.backbones.load import load_backbone
from featcache.errors import Interrupted
from featcache.extraction.extract import extract
from featcache.finetuning import network as networks
from featcache.finetuning.finetune import finetune
from featcache.finetuning.logits import compute_logits
from featcache.finetuning.recipes import Recipe, choose_recipe
from featcache.finetuning.trainer import Trainer
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.models.predict import predict

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 2}
DINOV2, SWIN = "vit_small_patch14_reg4_dinov2.lvd142m", "swin_tiny_patch4_window7_224"
NARROW = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 1, 2, 2)}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    (DINOV2, SMALL | {"img_size": 56}),
    ("vit_base_patch16_siglip_224.v2_webli", SMALL | {"img_size": 32}),
    ("eva02_small_patch14_336.mim_in22k_ft_in1k", SMALL | {"img_size": 56}),
    ("beit_base_patch16_224", SMALL | {"img_size": 32}),
    (SWIN, NARROW),
    ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
]
PLAIN = Recipe(about="", lr=1.0, backbone_lr=1.0, layer_decay=0.5, weight_decay=0.1)


def small(name: str, options: dict[str, Any]) -> Any:
    return timm.create_model(name, num_classes=0, **options)


def names_of(module: nn.Module, parts: list[list[nn.Parameter]]) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [sorted(names[id(parameter)] for parameter in part) for part in parts]


@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_stages_are_timms_groups(name: str, options: dict[str, Any]) -> None:
    """Oracle: timm's grouping for layer-wise rates, but that a norm of its own at the end belongs to the last block."""
    module = small(name, options)
    layers = group_parameters(module, module.group_matcher(), reverse=True)
    expected = [sorted(key for key in layers if layers[key] == layer) for layer in range(max(layers.values()) + 1)]
    if all(".norm." in f".{key}" or "fc_norm." in key for key in expected[-1]):
        expected[-2:] = [sorted(expected[-2] + expected[-1])]
    assert names_of(module, networks.stages(module)) == expected


TORCHVISION: list[tuple[Any, list[str]]] = [  # how to build it, and where each stage's parameters begin
    (
        lambda: models.VisionTransformer(32, 16, 3, 2, 48, 96),
        ["class_token conv_proj encoder.pos", *(f"encoder.layers.encoder_layer_{k}." for k in (0, 1)), "encoder.l"],
    ),
    (
        lambda: models.SwinTransformer([4, 4], 12, [2, 2], [1, 1], [4, 4]),
        ["features.0.", "features.1.0.", "features.1.1.", "features.2. features.3.0.", "features.3.1. norm."],
    ),
    (
        lambda: models.ConvNeXt([CNBlockConfig(12, 24, 2), CNBlockConfig(24, None, 2)]),
        ["features.0.", "features.1.0.", "features.1.1.", "features.2. features.3.0.", "features.3.1. classifier.0."],
    ),
]


@pytest.mark.parametrize(("build", "beginnings"), TORCHVISION)
def test_stages_of_torchvision_are_blocks(build: Any, beginnings: list[str]) -> None:
    module = build()
    for head in {"heads", "head"} & {name for name, _ in module.named_children()}:
        setattr(module, head, nn.Identity())
    if isinstance(module, models.ConvNeXt):
        module.classifier[2] = nn.Identity()
    found = names_of(module, networks.stages(module))
    assert len(found) == len(beginnings)
    for stage, words in zip(found, beginnings, strict=True):
        assert all(name.startswith(tuple(words.split())) for name in stage), (words, stage)
        assert all(any(name.startswith(word) for name in stage) for word in words.split()), (words, stage)


def as_backbone(module: nn.Module, edge: int) -> Backbone:
    """An untrained network as a backbone, its LayerScale 1, so that every block matters."""
    for name, value in module.state_dict().items():
        if name.endswith("gamma"):
            value.fill_(1)
    tiny = load_backbone("squeezenet1_1", "none")
    preprocess = dataclasses.replace(tiny.preprocess, resize=edge, crop=(edge, edge))
    module.eval().requires_grad_(False)
    with torch.inference_mode():
        dim = module(torch.zeros(1, 3, edge, edge)).shape[1]
    return dataclasses.replace(tiny, module=module, dim=dim, preprocess=preprocess)


@pytest.mark.parametrize(("name", "options"), [FAMILIES[0], FAMILIES[4], FAMILIES[5]])
def test_rates_by_block_and_no_decay_where_timm_has_none(name: str, options: dict[str, Any]) -> None:
    """Norms, biases, tokens, positions, LayerScale and tables of relative positions are not decayed."""
    module = small(name, options)
    network = networks.with_new_head(as_backbone(module, options.get("img_size", 224)), PLAIN, 3, seed=0)
    found = {id(p): group for group in networks.parameter_groups(network, PLAIN) for p in group["params"]}
    skip = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
    free, decayed = param_groups_weight_decay(module.requires_grad_(True), 0.1, no_weight_decay_list=skip)
    expected = {id(parameter): group["weight_decay"] for group in (free, decayed) for parameter in group["params"]}
    parts = networks.stages(network.backbone)
    depth = {id(parameter): len(parts) - 1 - k for k, part in enumerate(parts) for parameter in part}
    for theirs, ours in zip(module.parameters(), network.backbone.parameters(), strict=True):
        assert found[id(ours)]["weight_decay"] == expected[id(theirs)]
        assert found[id(ours)]["peak_lr"] == 0.5 ** depth[id(ours)]


def rates(module: nn.Module) -> list[float]:
    return [part.rate for part in module.modules() if isinstance(part, networks.DropPath)]


def test_drop_path_is_torchvisions() -> None:
    x = torch.randn(50, 3, 4)
    torch.manual_seed(0)
    ours = networks.DropPath(0.4)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, stochastic_depth(x, 0.4, "row"))


@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_drop_path_grows_as_in_timm(name: str, options: dict[str, Any]) -> None:
    """Oracle: timm, told the rate when it builds the network; no tensor is added."""
    theirs, ours = small(name, options | {"drop_path_rate": 0.3}), small(name, options)
    names = list(ours.state_dict())
    assert networks.set_drop_path(ours, 0.3) == (5 if "depths" in options else 3)
    expected = [m.drop_prob for m in theirs.modules() if type(m).__name__ == "DropPath"]
    assert [rate for rate in rates(ours) if rate] == pytest.approx(expected)
    assert list(ours.state_dict()) == names


def test_drop_path_replaces_what_a_network_was_built_with() -> None:
    module = models.SwinTransformer([4, 4], 12, [2, 2], [1, 1], [4, 4], stochastic_depth_prob=0.5)
    assert networks.set_drop_path(module, 0.3) == 4
    assert rates(module) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert networks.set_drop_path(models.VisionTransformer(32, 16, 3, 2, 48, 96), 0.3) == 0


def test_drop_path_is_on_in_training_alone() -> None:
    """Steps see it, the check of the first one and predictions do not; what can be dropped is an image's whole branch."""
    data = make_pixels(6, 56)
    recipe = dataclasses.replace(PLAIN, hidden=(), drop_path=0.6, epochs=2, batch_size=6, lr=1e-9, backbone_lr=0.0)
    backbone = as_backbone(small(*FAMILIES[0]), 56)
    trainer = Trainer(networks.with_new_head(backbone, recipe, 3, seed=0), data, recipe=recipe, job=JOB)
    plain = Trainer(
        networks.with_new_head(backbone, recipe, 3, seed=0),
        data,
        recipe=dataclasses.replace(recipe, drop_path=0.0),
        job=JOB,
    )
    logits = compute_logits(plain.network, data.pictures, job=JOB)
    np.testing.assert_array_equal(compute_logits(trainer.network, data.pictures, job=JOB), logits)
    np.testing.assert_allclose(trainer.logits_in_training(data, np.arange(6)), logits, rtol=1e-5, atol=1e-6)
    losses = [trainer.run_epoch()[0], trainer.run_epoch()[0], plain.run_epoch()[0]]  # the weights do not move
    assert all(abs(a - b) > 1e-4 for a, b in itertools.combinations(losses, 2))
    np.testing.assert_allclose(compute_logits(trainer.network, data.pictures, job=JOB), logits, rtol=1e-5, atol=1e-6)


VIT, ATTENTION, MAPS = "timm/test_vit", "timm/test_vit3", "timm/test_convnext"
POOLED = [  # name, pool, layers, what no embedding depends on
    (VIT, "cls+mean", 2, ""),
    (ATTENTION, None, 1, ""),
    (ATTENTION, "mean", 1, "attn_pool."),
    (MAPS, None, 3, ""),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            *((VIT, pool, layers, "") for pool in ("cls", "mean") for layers in (1, 2)),
            (ATTENTION, None, 2, "attn_pool."),
            ("resnet18", None, 3, ""),
            ("swin_t", None, 2, ""),
            ("convnext_tiny", None, 2, ""),
            ("vit_b_32", "cls+mean", 2, ""),
        ]
    ),
]


@pytest.mark.parametrize(("name", "pool", "layers", "idle"), POOLED)
@pytest.mark.usefixtures("small_vits")
def test_training_through_every_pooling(name: str, pool: str | None, layers: int, idle: str) -> None:
    """It starts from the cached head; gradients reach exactly what trains, as several processes need; the rest is not counted."""
    edge = {MAPS: 32, "resnet18": 32, VIT: 160, ATTENTION: 160}.get(name, 64)
    backbone, data = load_backbone(name, "none", size=(edge, edge), pool=pool, layers=layers), make_pixels(4, edge)
    X = Encoder(backbone.module, backbone.preprocess, CPU.device, torch.float32)(np.stack(data.pictures))
    head = fitted_head("standardise", X)
    expected = -np.log(head.probabilities(X.astype(np.float64))[np.arange(4), data.labels]).mean()
    plain: dict[str, Any] = {"augmentation": (), "label_smoothing": 0.0, "optimizer": "sgd", "ema": 0.0, "epochs": 2}
    recipe = choose_recipe("default", 4, unfreeze="all", **plain)
    trainer = Trainer(networks.assemble(backbone, head, X), data, recipe=recipe, job=JOB)
    assert trainer.run_epoch()[0] == pytest.approx(expected, abs=1e-3)
    parameters = dict(trainer.network.backbone.named_parameters())
    assert {key for key in parameters if parameters[key].grad is None} == {
        key for key in parameters if idle and key.startswith(idle)
    }
    assert all(parameter.requires_grad == (parameter.grad is not None) for parameter in parameters.values())
    total, trained = networks.count_parameters(trainer.network, recipe)
    assert total - trained == sum(p.numel() for p in parameters.values() if p.grad is None)
    assert bool(idle) == (trained < total)
    networks.unfreeze(trainer.network, dataclasses.replace(recipe, unfreeze="last-stage"), epoch=0)
    assert any(parameter.requires_grad for parameter in parameters.values())


def _rows(history: Path) -> list[dict[str, str]]:
    """Of the table, without what is recorded but never compared."""
    rows = list(csv.DictReader(history.read_text().splitlines()))
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in rows
    ]


@pytest.mark.parametrize(
    ("name", "changes", "positions"),  # of what is saved: timm resamples those of VIT on the way
    [(ATTENTION, {"pool": "mean"}, 17), pytest.param(VIT, {"layers": 2}, 101, marks=pytest.mark.slow)],
)
def test_resampled_and_pooled_it_resumes_moves_and_predicts_alike(
    tmp_path: Path, name: str, changes: dict[str, Any], positions: int
) -> None:
    """Positions resampled to another size train and are saved at it; a run stopped by a signal ends in the same bits."""
    photos = make_photos(tmp_path / "photos", each=3, splits=("train", "val"))
    weights = shuffled(timm.create_model(name.removeprefix("timm/")), tmp_path / "w.pth")
    given: dict[str, Any] = {"backbone": name, "weights": weights, "precision": "fp32", "crop": 64} | changes
    extract(photos, tmp_path / "f.h5", **given)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0, folds=0)
    weights.unlink()
    usual: dict[str, Any] = {"init": tmp_path / "m", "device": "cpu", "precision": "fp32"}
    usual["changes"] = {"epochs": 2, "batch_size": 4, "drop_path": 0.3, "interpolate": False, "backbone_lr": 1e-4}
    finetune(photos, tmp_path / "whole", **usual)
    steps = itertools.count(1)
    with pytest.raises(Interrupted):
        finetune(
            photos,
            tmp_path / "part",
            progress=lambda _: os.kill(os.getpid(), signal.SIGTERM) if next(steps) == 2 else None,
            **usual,
        )
    finetune(photos, tmp_path / "part", resume=True, **usual)
    before, after = (
        load_model(tmp_path / model).load_backbone().module.get_parameter("pos_embed") for model in ("m", "part")
    )
    assert before.shape[1] == after.shape[1] == positions and not torch.equal(before, after)
    (tmp_path / "part").rename(tmp_path / "moved")
    for file in ("backbone.safetensors", "head.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "moved" / file).read_bytes()
    whole, moved = (_rows(tmp_path / model / "history.csv") for model in ("whole", "moved"))
    assert whole == moved
    for one, two in zip(*(predict(tmp_path / model, photos) for model in ("whole", "moved")), strict=True):
        np.testing.assert_array_equal(one.probabilities, two.probabilities)
