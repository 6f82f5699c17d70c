"""A network in rows: every parameter counts once, shapes are those of the published architectures."""

import pytest
import torch

from featcache.backbones.load import build_empty, load_backbone
from featcache.backbones.stages import Stage, stages_of

NAMES = ["squeezenet1_1", "timm/convnext_atto"]
MORE = [
    "vgg11",
    "timm/crossvit_9_240",
    "inception_v3",
    "swin_v2_t",
    "densenet121",
    "maxvit_t",
    "timm/hrnet_w18_small",
    "timm/xcit_nano_12_p8_224",
]
MORE += ["timm/swinv2_cr_tiny_ns_224", "timm/eva02_tiny_patch14_224", "timm/vit_base_patch16_siglip_224", "googlenet"]


@pytest.mark.parametrize("name", NAMES + [pytest.param(name, marks=pytest.mark.slow) for name in MORE])
def test_every_parameter_counts_once(name: str) -> None:
    backbone = build_empty(name)
    rows = stages_of(backbone)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in backbone.module.parameters())
    assert 4 <= len(rows) <= 30
    assert all(row.parameters or row.shape for row in rows)
    assert not any(module._forward_hooks for module in backbone.module.modules())


def test_resnet_50() -> None:
    """Table 1 of He et al. 2016; the numbers of parameters from its kernels and batch norms."""
    rows = {row.name: (row.shape, row.parameters) for row in stages_of(build_empty("resnet50"))}
    assert [*rows] == ["conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    assert rows["conv1"] == ((64, 112, 112), 64 * 3 * 7 * 7)
    assert rows["maxpool"] == ((64, 56, 56), 0)
    for stage, (blocks, before, edge) in enumerate(((3, 64, 56), (4, 256, 28), (6, 512, 14), (3, 1024, 7))):
        width, out = 64 * 2**stage, 256 * 2**stage
        first = before * width + 9 * width**2 + width * out + before * out + 2 * (2 * width + 2 * out)
        rest = out * width + 9 * width**2 + width * out + 2 * (2 * width + out)
        assert rows[f"layer{stage + 1}"] == ((out, edge, edge), first + (blocks - 1) * rest)
    assert rows["fc"] == ((2048,), 0)


def test_a_transformer() -> None:
    dim, edge = 384, 224 // 14
    rows = stages_of(build_empty("timm/vit_small_patch14_reg4_dinov2.lvd142m"))
    assert rows[0] == Stage("cls_token, reg_token, pos_embed", "parameters", None, (1 + 4 + edge**2) * dim)
    assert rows[1] == Stage("patch_embed", "PatchEmbed", (edge**2, dim), (3 * 14**2 + 1) * dim)
    (blocks,) = [row for row in rows if row.name == "blocks.0-11"]
    block = 12 * dim**2 + 9 * dim + 4 * dim + 2 * dim  # matrices, their biases, two norms, two layer scales
    assert blocks == Stage("blocks.0-11", "12 x Block", (edge**2 + 5, dim), 12 * block)
    assert rows[-1].shape == (dim,)


def test_without_values_it_is_the_same_network() -> None:
    empty, full = build_empty("squeezenet1_1"), load_backbone("squeezenet1_1", "none")
    assert stages_of(empty) == stages_of(full)
    assert all(tensor.is_meta for tensor in empty.module.state_dict().values())
    assert (empty.weights_sha256, empty.dim, empty.preprocess) == ("", full.dim, full.preprocess)
    assert not torch.zeros(1).is_meta  # the default device is as before


def test_what_reads_values_while_it_is_built() -> None:
    backbone = build_empty("regnet_y_400mf")
    assert all(tensor.is_meta for tensor in backbone.module.state_dict().values())
    assert stages_of(backbone)[-1].shape == (440,)
