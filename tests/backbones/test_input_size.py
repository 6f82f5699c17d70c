"""Networks at other input sizes than their weights': positions resampled as their library does, weights hashed as published."""

import dataclasses
import logging
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from featcache.backbones.backbone import Backbone, hash_tensors, save_weights
from featcache.backbones.load import build_network, load_again, load_backbone
from featcache.cache.cache import FeatureCache
from featcache.errors import BackboneError, UsageError
from featcache.extraction.executors import backbone_of
from featcache.extraction.extract import extract
from featcache.extraction.request import ExtractRequest, RequestOptions, load_requested
from featcache.finetuning.finetune import finetune
from featcache.models.export import export_model
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.spec import Spec, Taken

DINOV2 = "timm/vit_small_patch14_reg4_dinov2.lvd142m"
TINY_VIT, OF_ONE_SIZE = "timm/test_vit", "timm/test_vit3"  # 160 px, patches of 16


def shuffled(network: nn.Module, path: Path) -> Path:
    """Weights of ``network`` in which every block and position matters: LayerScale 1, positions random."""
    torch.manual_seed(5)
    state = network.state_dict()
    for key, value in state.items():
        if key.endswith("gamma"):
            value.fill_(1)
        elif "pos_embed" in key:
            value.normal_()
    torch.save(state, path)
    return path


def pixels(edge: int) -> torch.Tensor:
    return torch.randn(2, 3, edge, edge, generator=torch.Generator().manual_seed(1))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Within 1e-5 of the spread that is left when the mean of both images is taken away."""
    centred = theirs - theirs.mean(dim=0)
    return bool((ours - theirs).norm() <= 1e-5 * centred.norm())


def spec_of(backbone: Backbone) -> Spec:
    return Spec(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        preprocess=backbone.preprocess,
        precision="reference",
        storage="float32",
    )


def test_dinov2_at_224_is_timm_told_img_size_224(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: timm, told ``img_size=224``, given the tensors of 518 px; and the size is that of the authors."""
    short = DINOV2.removeprefix("timm/")
    path = shuffled(timm.create_model(short, num_classes=0), tmp_path / "w.pth")
    caplog.set_level(logging.INFO, "featcache")
    backbone = load_backbone(DINOV2, path)
    assert (backbone.preprocess.resize, backbone.preprocess.crop) == (256, (224, 224))
    assert "resize 256, crop 224: so the authors of DINOv2 evaluate; --crop 518 is timm's setting" in caplog.text
    published = torch.load(path)
    assert backbone.weights_sha256 == hash_tensors(published)
    network = timm.create_model(short, img_size=224, num_classes=0).eval()
    network.load_state_dict(checkpoint_filter_fn(published, network))
    with torch.inference_mode():
        assert same(backbone.module(pixels(224)), network(pixels(224)))


def test_dinov2_at_518_is_as_timm_has_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "featcache")
    backbone = load_requested(ExtractRequest(backbone=DINOV2, weights="none", crop=518), None)
    assert (backbone.preprocess.resize, backbone.preprocess.crop) == (518, (518, 518))
    assert not backbone.published and not caplog.text
    assert backbone.module.get_parameter("pos_embed").shape == (1, 37 * 37, 384)


TIMM = [  # name, edge
    ("test_vit", 96),
    ("test_vit3", 224),
    *(
        pytest.param(name, edge, marks=pytest.mark.slow)
        for name, edge in [
            ("deit_tiny_distilled_patch16_224", 192),
            ("eva02_tiny_patch14_224", 252),
            ("vit_relpos_small_patch16_224", 256),
            ("vit_small_patch16_dinov3", 224),
            ("vit_pe_core_tiny_patch16_384", 224),
        ]
    ),
]


@pytest.mark.filterwarnings("ignore:.*searchsorted", "ignore:.*non-tuple")
@pytest.mark.parametrize(("name", "edge"), TIMM)
def test_timm_at_another_size(tmp_path: Path, name: str, edge: int) -> None:
    """Oracle: timm's ``set_input_size`` on its own network; the published tensors are hashed, saved and found again."""
    path = shuffled(timm.create_model(name), tmp_path / "w.pth")
    backbone, usual = (load_backbone(f"timm/{name}", path, size=size, pool="own") for size in ((edge, edge), None))
    assert backbone.weights_sha256 == usual.weights_sha256
    assert backbone.preprocess.crop == (edge, edge) != usual.preprocess.crop
    network = timm.create_model(name).eval()
    network.load_state_dict(torch.load(path))
    network.set_input_size(img_size=(edge, edge))
    with torch.inference_mode():
        ours = backbone.module(pixels(edge))
        assert same(ours, network.forward_head(network.forward_features(pixels(edge)), pre_logits=True))
    save_weights(backbone, tmp_path / "copy.safetensors")
    again = load_again(spec_of(backbone), tmp_path / "copy.safetensors", None)
    assert again is not None and again.weights_sha256 == usual.weights_sha256
    with torch.inference_mode():
        assert torch.equal(again.module(pixels(edge)), ours)
    other = load_again(spec_of(backbone), tmp_path / "copy.safetensors", None, taken=Taken(usual.preprocess.crop))
    assert other is not None and not other.published  # not resampled to and fro


@pytest.mark.slow  # Swin changes its windows with the size
def test_swin_at_another_size() -> None:
    backbone = load_backbone("timm/swin_tiny_patch4_window7_224", "none", size=(256, 256))
    network, lines = build_network(backbone.name, 3, (256, 256))
    assert "network.set_input_size(img_size=(256, 256))" in lines
    missing, unexpected = network.load_state_dict(backbone.module.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("head.") for key in missing)


@pytest.mark.parametrize("edge", [64, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("small_vits")
def test_torchvision_vit_at_another_size(tmp_path: Path, edge: int) -> None:
    """Oracle: torchvision's own ``interpolate_embeddings``, in a network built for the size."""
    path = tmp_path / "w.pth"
    torch.save(torchvision.models.vit_b_32().state_dict(), path)
    backbone = load_backbone("vit_b_32", path, size=(edge, edge))
    published = torch.load(path)
    assert backbone.weights_sha256 == hash_tensors({k: v for k, v in published.items() if not k.startswith("heads.")})
    network = torchvision.models.vit_b_32(image_size=edge).eval()
    state = torchvision.models.vision_transformer.interpolate_embeddings(edge, 32, published)
    network.load_state_dict(state)
    network.heads = nn.Sequential()
    with torch.inference_mode():
        assert same(backbone.module(pixels(edge)), network(pixels(edge)))
    network, _ = build_network("vit_b_32", 1000, (edge, edge))
    network.load_state_dict(state)


def test_tensors_of_another_size_say_their_own(tmp_path: Path) -> None:
    """A file that was trained at 96 px is used at 96 px, at 160 if told so, and never taken for the published one."""
    network = timm.create_model("test_vit3", img_size=96)
    path = shuffled(network, tmp_path / "w.pth")
    backbone = load_backbone(OF_ONE_SIZE, path)
    assert backbone.preprocess.crop == (96, 96) and not backbone.published
    network.load_state_dict(torch.load(path))
    with torch.inference_mode():
        assert same(
            backbone.module(pixels(96)), network.eval().forward_head(network.forward_features(pixels(96)), True)
        )
    larger = load_backbone(OF_ONE_SIZE, path, size=(160, 160))
    assert larger.preprocess.crop == (160, 160) and list(larger.published) == ["pos_embed"]
    assert larger.weights_sha256 == backbone.weights_sha256
    state = load_file(_saved(larger, tmp_path))
    assert state["pos_embed"].shape == network.pos_embed.shape
    torch.save({"pos_embed": torch.zeros(1, 7, 96)}, path)
    with pytest.raises(BackboneError, match=r"pos_embed is \(1, 7, 96\), expected \(1, 101, 96\)"):
        load_backbone(OF_ONE_SIZE, path)


def _saved(backbone: Backbone, folder: Path) -> Path:
    save_weights(backbone, folder / "saved.safetensors")
    return folder / "saved.safetensors"


@pytest.mark.parametrize("name", ["timm/test_convnext", "resnet18"])
def test_what_takes_any_size_is_left_alone(name: str) -> None:
    module = load_backbone(name, "none").module
    backbone = load_backbone(name, "none", size=(96, 96))
    assert not backbone.published
    with torch.inference_mode():
        assert torch.equal(backbone.module(pixels(96)), module(pixels(96)))


@pytest.mark.parametrize(
    ("name", "edge", "words"),
    [
        (TINY_VIT, 100, "patches of 16 pixels, which 100 is no multiple of; the nearest --crop: 96 or 112$"),
        (TINY_VIT, 7, "the nearest --crop: 16$"),
        ("vit_b_32", 225, "patches of 32 pixels, which 225 is no multiple of; the nearest --crop: 224 or 256$"),
        (TINY_VIT, 4096, "must lie between 1 and 2048 pixels$"),
        ("timm/test_mambaout", 0, "must lie between 1 and 2048 pixels$"),
    ],
)
def test_sizes_that_a_network_cannot_take(name: str, edge: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_backbone(name, "none", size=(edge, edge))


def test_a_larger_crop_takes_the_resize_along_unless_that_was_given() -> None:
    backbone = load_requested(ExtractRequest(backbone="resnet18", weights="none", crop=320), None)
    assert (backbone.preprocess.resize, backbone.preprocess.crop) == (320, (320, 320))
    with pytest.raises(UsageError, match="resize 256 is smaller than crop"):
        load_requested(ExtractRequest(backbone="resnet18", weights="none", crop=320, resize=256), None)
    assert (
        dataclasses.replace(backbone.preprocess, crop=(224, 224), resize=256)
        == load_backbone("resnet18", "none").preprocess
    )


def test_a_model_at_another_size_from_extraction_to_export(photos: Path, tmp_path: Path) -> None:
    """Fine-tuned weights are of the size that they were tuned at; a model's next extraction has the model's spec."""
    options: RequestOptions = {"backbone": OF_ONE_SIZE, "weights": "none", "crop": 96, "precision": "fp32"}
    extract(photos, tmp_path / "f.h5", **options)
    assert backbone_of(FeatureCache.open(tmp_path / "f.h5")).preprocess.crop == (96, 96)  # for repair
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0, folds=0)
    finetune(photos, tmp_path / "ft", init=tmp_path / "m", changes={"epochs": 1}, device="cpu", precision="fp32")
    settings = load_model(tmp_path / "ft").manifest["training"]["settings"]
    assert settings["backbone_lr"] == 3e-5  # no batch norms
    for model, tokens in (("m", 101), ("ft", 37)):
        assert load_file(tmp_path / model / "backbone.safetensors")["pos_embed"].shape == (1, tokens, 96)
        export_model(tmp_path / model, tmp_path / f"{model}.safetensors")  # compares with the model
        extract(photos, tmp_path / f"{model}.h5", backbone=str(tmp_path / model))
        cache = FeatureCache.open(tmp_path / f"{model}.h5")
        assert cache.spec == load_model(tmp_path / model).spec and cache.spec.preprocess.crop == (96, 96)
    extract(photos, tmp_path / "160.h5", backbone=str(tmp_path / "ft"), crop=160)
