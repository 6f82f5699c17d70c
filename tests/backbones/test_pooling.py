"""Which tensor is taken: features equal the library's own with the same pool and layers, and old specs stay what they were."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from test_input_size import pixels, same, shuffled

from featcache.backbones.load import load_backbone
from featcache.cache.cache import FeatureCache
from featcache.errors import SpecMismatchError, UsageError
from featcache.extraction.executors import backbone_of
from featcache.extraction.extract import extract
from featcache.extraction.request import ExtractRequest, RequestOptions
from featcache.finetuning.finetune import finetune
from featcache.models.export import export_model
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.spec import OWN_POOLING, PreprocessSpec, Spec

TOKEN, MEAN, ATTENTION, MAPS = "timm/test_vit", "timm/test_vit2", "timm/test_vit3", "timm/test_convnext"
IMAGENET = PreprocessSpec(
    resize=256, crop=(224, 224), interpolation="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
DINOV3 = "timm/vit_small_patch16_dinov3.lvd1689m"


def make_spec(**changes: Any) -> Spec:
    usual: dict[str, Any] = {"backbone": "resnet50", "weights_sha256": "ab" * 32, "layer": "fc", "preprocess": IMAGENET}
    return Spec(**usual | {"precision": "reference", "storage": "float16"} | changes)


@pytest.mark.parametrize(
    ("name", "layer", "fingerprint"),
    [  # computed before there was a choice of pooling
        ("resnet50", "fc", "45ab7c33a4500f831477bc66fa00f214182081deeac24ef9a3b520f0b4d7d14f"),
        ("timm/vit_base_patch16_224.mae", "head", "059cdb615966ccf4367107f7d8186dd155cdbb2d9a21bd6f471a4005b7ee913f"),
        (
            "timm/tf_efficientnet_lite0",
            "classifier",
            "8be56623c6e3adbe4b42b82b4c068786102fdeb8494c1b3ff620a99a29918a57",
        ),
    ],
)
def test_fingerprints_of_earlier_versions_stay(name: str, layer: str, fingerprint: str) -> None:
    assert make_spec(backbone=name, layer=layer).fingerprint == fingerprint


def test_a_spec_with_a_pooling_goes_through_json() -> None:
    spec = make_spec(pooling="cls+mean", layers=4)
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert make_spec().difference(spec) == f"backbone.layers: None -> 4; backbone.pooling: {OWN_POOLING} -> cls+mean"
    for key, value in (("pooling", "max"), ("layers", 0), ("layers", 1), ("layers", True), ("layers", "4")):
        values = spec.to_json()
        values["backbone"][key] = value
        with pytest.raises(UsageError, match=r"the spec|this version does not do"):
            Spec.from_json(values)


AUTO = [  # name, what auto takes
    (TOKEN, OWN_POOLING),
    (MEAN, OWN_POOLING),  # a classifier was trained on its mean
    (ATTENTION, OWN_POOLING),
    (MAPS, OWN_POOLING),
    ("resnet18", OWN_POOLING),
    (DINOV3, "cls"),
    *(
        pytest.param(name, pooling, marks=pytest.mark.slow)
        for name, pooling in [
            ("timm/eva02_tiny_patch14_224.mim_in22k", "cls"),
            ("timm/vit_small_patch14_reg4_dinov2.lvd142m", OWN_POOLING),
            ("timm/vit_pe_core_tiny_patch16_384.fb", OWN_POOLING),
            ("timm/deit_tiny_distilled_patch16_224", OWN_POOLING),
            ("timm/swin_tiny_patch4_window7_224", OWN_POOLING),
            ("timm/mobilenetv3_small_050", OWN_POOLING),
            ("vit_b_32", OWN_POOLING),
        ]
    ),
]


@pytest.mark.parametrize(("name", "pooling"), AUTO)
def test_auto_takes_what_the_encoder_was_trained_to_give(
    name: str, pooling: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "featcache")
    backbone = load_backbone(name, "none")
    assert (backbone.pooling, backbone.layers) == (pooling, 1)
    said = [record for record in caplog.records if record.getMessage().startswith("pooling ")]
    assert [record.levelno for record in said] == [logging.DEBUG if pooling == OWN_POOLING else logging.INFO]


def tokens_of(network: Any, layer: int, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(patches, first token) of block ``layer`` from the end by a hook, normalised as behind the last one."""
    seen: list[torch.Tensor] = []
    handle = network.blocks[-layer].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    network(pixels(edge))
    handle.remove()
    x = network.norm(seen[0])
    return x[:, network.num_prefix_tokens :], x[:, 0]


SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
FAMILIES: list[Any] = [  # name, how to build it small, which pooling auto takes
    ("vit_small_patch14_reg4_dinov2.lvd142m", SMALL, OWN_POOLING),
    ("vit_small_patch16_dinov3.lvd1689m", SMALL, "cls"),
    ("vit_base_patch16_siglip_224.v2_webli", SMALL, OWN_POOLING),
    ("vit_pe_core_base_patch16_224.fb", SMALL, OWN_POOLING),
    ("vit_base_patch16_clip_224.openai", SMALL, OWN_POOLING),
    ("vit_base_patch16_224.mae", SMALL, OWN_POOLING),
    ("aimv2_large_patch14_224.apple_pt", SMALL, OWN_POOLING),
    ("eva02_small_patch14_224.mim_in22k", SMALL, "cls"),
    ("eva02_small_patch14_336.mim_in22k_ft_in1k", SMALL, OWN_POOLING),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, OWN_POOLING),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 1, 2, 2)}, OWN_POOLING),
    ("resnet10t", {}, OWN_POOLING),
    ("mobilenetv3_small_050", {}, OWN_POOLING),
    ("test_efficientnet", {}, OWN_POOLING),
]


@pytest.mark.parametrize(("name", "small", "pooling"), FAMILIES)
def test_families_give_what_their_library_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, small: dict[str, Any], pooling: str
) -> None:
    """Oracle: timm's own network, built small, told the pooling."""
    build = timm.create_model
    network: Any = build(name, **small)
    path = shuffled(network, tmp_path / "w.pth")
    network.load_state_dict(torch.load(path))
    monkeypatch.setattr(timm, "create_model", lambda *given, **options: build(*given, **options, **small))
    own = load_backbone(f"timm/{name}", path, size=network.pretrained_cfg["input_size"][1:], pool="own")
    backbone = load_backbone(f"timm/{name}", path, size=own.preprocess.crop)
    assert backbone.pooling == pooling and own.pooling == OWN_POOLING
    assert backbone.weights_sha256 == own.weights_sha256
    x = pixels(own.preprocess.crop[0])
    with torch.inference_mode():
        features = network.eval().forward_features(x)
        assert same(own.module(x), network.forward_head(features, pre_logits=True))
        if pooling == "cls":
            assert same(backbone.module(x), network.fc_norm(network.pool(features, pool_type="token")))
        if hasattr(network, "num_prefix_tokens"):
            joined = load_backbone(f"timm/{name}", path, size=own.preprocess.crop, pool="mean", layers=2)
            means = [tokens_of(network, layer, own.preprocess.crop[0])[0].mean(1) for layer in (2, 1)]
            after = getattr(network, "fc_norm", torch.nn.Identity())
            assert same(joined.module(x), torch.cat([after(x) for x in means], dim=1))


POOLED = [
    *((name, pool) for name in (TOKEN, DINOV3) for pool in ("cls", "mean", "cls+mean")),
    *((name, "mean") for name in (MEAN, ATTENTION)),  # with a register, without a class token
    *(
        pytest.param("timm/eva02_tiny_patch14_224.mim_in22k", pool, marks=pytest.mark.slow)
        for pool in ("cls", "cls+mean")
    ),
]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("name", "pool"), POOLED)
def test_tokens_are_pooled_as_asked(tmp_path: Path, name: str, pool: str, layers: int) -> None:
    """Oracle: timm's network with hooks on its blocks; register tokens are in no mean."""
    network: Any = timm.create_model(name.removeprefix("timm/"))
    path = shuffled(network, tmp_path / "w.pth")
    network.load_state_dict(torch.load(path))
    size = (64, 64) if name == DINOV3 else None  # it takes any
    backbone = load_backbone(name, path, size=size, pool=pool, layers=layers)
    edge = backbone.preprocess.crop[0]
    with torch.inference_mode():
        expected = []
        for layer in range(layers, 0, -1):
            patches, cls = tokens_of(network.eval(), layer, edge)
            parts = {"cls": [cls], "mean": [patches.mean(1)], "cls+mean": [cls, patches.mean(1)]}[pool]
            expected += [network.fc_norm(part) for part in parts]
        theirs = torch.cat(expected, dim=1)
        assert same(backbone.module(pixels(edge)), theirs)
    assert backbone.dim == theirs.shape[1]
    assert list(backbone.module.state_dict()) == [key for key in network.state_dict() if not key.startswith("head.")]


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_dinov3_is_as_timm_pools_it_when_told(tmp_path: Path, pool: str) -> None:
    short = DINOV3.removeprefix("timm/")
    network = timm.create_model(short, global_pool={"cls": "token", "mean": "avg"}[pool])
    path = shuffled(network, tmp_path / "w.pth")
    network.load_state_dict(torch.load(path))
    backbone = load_backbone(DINOV3, path, pool=pool)
    with torch.inference_mode():
        assert same(backbone.module(pixels(256)), network.eval()(pixels(256)))
    assert backbone.pooling == {"cls": "cls", "mean": OWN_POOLING}[pool]  # its mean is timm's own


@pytest.mark.parametrize(
    "name",
    [
        MAPS,
        "timm/test_efficientnet",
        *(
            pytest.param(f"timm/{x}", marks=pytest.mark.slow)
            for x in ("resnet18", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224")
        ),
    ],
)
def test_stages_lie_side_by_side(name: str) -> None:
    """Oracle: means of timm's ``features_only`` maps, each of mean 0 and variance 1; of the last stage the own embedding."""
    own, joined = load_backbone(name, "none"), load_backbone(name, "none", layers=3)
    edge = own.preprocess.crop[0]
    with torch.inference_mode():
        ours, last = joined.module(pixels(edge)), own.module(pixels(edge))
        _, maps = own.module.forward_intermediates(pixels(edge), output_fmt="NCHW")  # type: ignore[operator]
    parts = [m.mean((2, 3)) for m in maps[-3:-1]]
    parts = [(p - p.mean(1, keepdim=True)) / (p.var(1, keepdim=True, correction=0) + 1e-5).sqrt() for p in parts]
    torch.testing.assert_close(ours, torch.cat([*parts, last], dim=1), rtol=1e-4, atol=1e-4)
    assert (joined.pooling, joined.layers, joined.dim) == (OWN_POOLING, 3, ours.shape[1])


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ["layer2", "layer3"]),
        *(pytest.param(n, ["features.3", "features.5"], marks=pytest.mark.slow) for n in ("convnext_tiny", "swin_t")),
    ],
)
def test_stages_of_torchvision(name: str, stages: list[str]) -> None:
    """Oracle: hooks on the stages of torchvision's own network."""
    joined, own = load_backbone(name, "none", layers=3), load_backbone(name, "none").module
    seen: list[torch.Tensor] = []
    for stage in stages:
        own.get_submodule(stage).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        last, ours = own(pixels(96)), joined.module(pixels(96))
    parts = [m.mean((1, 2) if name == "swin_t" else (2, 3)) for m in seen]
    parts = [(p - p.mean(1, keepdim=True)) / (p.var(1, keepdim=True, correction=0) + 1e-5).sqrt() for p in parts]
    torch.testing.assert_close(ours, torch.cat([*parts, last], dim=1), rtol=1e-4, atol=1e-4)
    assert joined.dim == ours.shape[1]


def test_torchvision_vit() -> None:
    """Oracle: hooks on the blocks of torchvision's own network."""
    backbone, own = (
        load_backbone("vit_b_32", "none", **options) for options in ({"pool": "cls+mean", "layers": 2}, {})
    )
    seen: list[torch.Tensor] = []
    encoder: Any = own.module.encoder
    for block in encoder.layers[-2:]:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        last = own.module(pixels(224))
        tokens = [encoder.ln(x) for x in seen]
        theirs = torch.cat([part for x in tokens for part in (x[:, 0], x[:, 1:].mean(1))], dim=1)
        assert same(backbone.module(pixels(224)), theirs) and same(theirs[:, 2 * 768 : 3 * 768], last)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (MAPS, {"pool": "cls"}, "has no class token, which --pool cls asks for; choose mean, or leave it out$"),
        ("resnet18", {"pool": "cls+mean"}, "has no class token"),
        (TOKEN, {"pool": "max"}, "unknown pool 'max'; choose one of auto, own, cls, mean, cls\\+mean$"),
        (TOKEN, {"layers": 99}, "gives [0-9]+ layers, --layers 99 asks for more; choose 1 to [0-9]+$"),
        ("resnet18", {"layers": 5}, "resnet18 gives 4 layers"),
        ("squeezenet1_1", {"layers": 2}, "squeezenet1_1 gives 1 layer, --layers 2 asks for more$"),
        (TOKEN, {"layers": 0}, "layers must lie between 1 and 256, found 0$"),
        (
            ATTENTION,
            {"pool": "own", "layers": 2},
            "pools its last layer alone by attention; choose --pool mean with --layers 2$",
        ),
    ],
)
def test_what_a_network_does_not_have(name: str, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_backbone(name, "none", **options)
    if "max" in words or "256" in words:
        with pytest.raises(UsageError, match=words):  # before a model is loaded
            ExtractRequest(backbone=name, **options)


@pytest.mark.parametrize(("name", "pool"), [(TOKEN, "cls+mean"), pytest.param(MAPS, None, marks=pytest.mark.slow)])
def test_pool_and_layers_from_extraction_to_export(photos: Path, tmp_path: Path, name: str, pool: str | None) -> None:
    """Every command computes what the cache holds; a cache of another pooling is refused with the difference."""
    options: RequestOptions = {"backbone": name, "weights": "none", "precision": "fp32", "pool": pool, "layers": 2}
    extract(photos, tmp_path / "f.h5", **options, dtype="float32")
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert (cache.spec.pooling, cache.spec.layers) == (pool or OWN_POOLING, 2)
    again = backbone_of(cache)  # for repair
    assert (again.pooling, again.layers, again.weights_sha256) == (pool or OWN_POOLING, 2, cache.spec.weights_sha256)
    with pytest.raises(SpecMismatchError, match="backbone.layers: 2 -> None"):
        extract(photos, tmp_path / "f.h5", backbone=name, weights="none", precision="fp32", dtype="float32", layers=1)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0, folds=0)
    finetune(photos, tmp_path / "ft", init=tmp_path / "m", changes={"epochs": 1}, device="cpu", precision="fp32")
    for model in ("m", "ft"):
        export_model(tmp_path / model, tmp_path / f"{model}.onnx")  # compares with the model
        export_model(tmp_path / model, tmp_path / f"{model}.safetensors")
        extract(photos, tmp_path / f"{model}.h5", backbone=str(tmp_path / model), precision="fp32")
        assert FeatureCache.open(tmp_path / f"{model}.h5").spec == load_model(tmp_path / model).spec
    same_again = FeatureCache.open(tmp_path / "m.h5")
    with cache.reader() as a, same_again.reader() as b:
        assert np.array_equal(a[np.arange(len(cache))], b[np.arange(len(cache))])
