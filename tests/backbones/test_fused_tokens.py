"""A transformer made fast computes what the plain one computes, whatever stands around its linear layers."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from timm import layers
from timm.models import eva
from timm.models import vision_transformer as vit
from torch import fx, nn
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from featcache.backbones.encoder import build_encoder
from featcache.backbones.folding import fold_batchnorm
from featcache.backbones.from_torchvision import _taps
from featcache.backbones.fused_tokens import FusedLinear, OneQuery, attention_in_parts, fuse_tokens, has_fused_linear
from featcache.backbones.load import load_backbone
from featcache.backbones.pooling import set_pooling
from featcache.backbones.self_check import agreement
from featcache.system.device import choose_runtime

SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}


def with_values(module: nn.Module) -> nn.Module:
    """Scales, tokens and positions that do something: as they are made, what is wrong in a block hardly shows."""
    torch.manual_seed(0)
    for name, value in module.named_parameters():
        if value.ndim == 1 or any(part in name for part in ("gamma", "scale", "pos", "token")):
            nn.init.normal_(value, 1.0 if value.ndim == 1 else 0.0, 0.4)
    return module.eval()


def fused(module: nn.Module, x: torch.Tensor) -> nn.Module:
    with torch.inference_mode():
        folded = fold_batchnorm(module, x.shape[2:])
        assert isinstance(folded, fx.GraphModule)
        return fuse_tokens(folded, x[:2], batch_size=len(x))


def rows(module: nn.Module, x: torch.Tensor) -> list[int]:
    """How many vectors of an image each fused linear layer gets, in turn."""
    found: list[int] = []
    for part in module.modules():
        if isinstance(part, FusedLinear):
            part.register_forward_hook(lambda _, inputs, __: found.append(inputs[0].numel() // inputs[0].shape[-1]))
    with torch.inference_mode():
        module(x[:1])
    return found


NETWORKS: dict[
    str, tuple[Callable[[], nn.Module], int, int, int]
] = {  # fused layers, those with activation, on one token
    "class token": (lambda: vit.VisionTransformer(**SIZE, init_values=1, reg_tokens=4), 7, 2, 3),
    "mean": (lambda: vit.VisionTransformer(**SIZE, global_pool="avg"), 8, 2, 0),
    "attention pool": (lambda: vit.VisionTransformer(**SIZE, global_pool="map", class_token=False), 13, 3, 4),
    "normalised queries": (lambda: vit.VisionTransformer(**SIZE, qk_norm=True, scale_attn_norm=True), 8, 2, 3),
    "SwiGLU": (lambda: vit.VisionTransformer(**SIZE, mlp_layer=layers.SwiGLUPacked, init_values=1), 8, 0, 1),
    "parallel": (lambda: vit.VisionTransformer(**SIZE, block_fn=vit.ParallelScalingBlock), 6, 0, 2),
    "rotary": (lambda: eva.Eva(**SIZE, use_rot_pos_emb=True, init_values=1, global_pool="token"), 6, 2, 3),
    "tanh": (lambda: vit.VisionTransformer(**SIZE, act_layer="gelu_tanh"), 7, 2, 3),
    "torchvision's ViT": (lambda: VisionTransformer(32, 8, 2, 4, 64, 96), 7 + 1, 2, 3 + 1),
    "Swin": (lambda: SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4]), 9 + 1, 4, 1),
    "ConvNeXt": (lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]), 4 + 1, 2, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_transformers(name: str) -> None:
    make, there, activations, cut = NETWORKS[name]
    torch.manual_seed(0)
    network = with_values(make())
    x = torch.randn(3, 3, 32, 32)
    faster = fused(network, x)
    with torch.inference_mode():
        torch.testing.assert_close(faster(x), network(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(faster(x[:1]), network(x[:1]), rtol=1e-4, atol=1e-4)  # another batch size
    found = [part for part in faster.modules() if isinstance(part, FusedLinear)]
    assert len(found) == there
    assert sum(part.activation[0] == "gelu" for part in found) == activations
    assert rows(faster, x).count(1) == cut


@pytest.mark.parametrize(
    ("library", "pool", "layers", "cut"),
    [
        ("timm", "cls", 2, 3),
        ("timm", "cls+mean", 1, 0),
        ("torchvision", "mean", 1, 0),
        ("torchvision", "cls", 2, 3),
        ("torchvision", "cls+mean", 1, 0),
    ],
)
def test_pools(library: str, pool: str, layers: int, cut: int) -> None:
    """Only what is read of the last block counts; what other blocks compute is read by the next one."""
    if library == "timm":
        network, edge = (
            load_backbone("timm/vit_tiny_patch16_224", "none", pool=pool, layers=layers, size=(64, 64)).module,
            64,
        )
    else:  # one of its architectures, made small
        network, edge = VisionTransformer(32, 8, 3, 4, 64, 96), 32
        network.heads = nn.Identity()
        set_pooling(network, _taps("vit_b_32", network), pool, layers)
    network, x = with_values(network), torch.randn(2, 3, edge, edge)
    faster = fused(network, x)
    with torch.inference_mode():
        torch.testing.assert_close(faster(x), network(x), rtol=1e-4, atol=1e-4)
    assert rows(faster, x).count(1) == cut


class Network(nn.Module):
    """Layers of (N, 6, 8) tokens, made of pixels, called by a function."""

    def __init__(self, compute: Callable[["Network", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.relu = *(nn.Linear(8, 8) for _ in range(3)), nn.ReLU(inplace=True)
        self.gamma, self.places, self.compute = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(6, 8)), compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, self.first(x.flatten(1).reshape(x.shape[0], 6, 8)))


def mixed_in_place(net: Network, x: torch.Tensor) -> torch.Tensor:
    y = net.second(x)
    x += net.third(x)  # whoever reads x below sees the sum
    return (x + y)[:, 0]


def attend(x: torch.Tensor, **options: Any) -> torch.Tensor:
    heads = x.reshape(x.shape[0], 6, 2, 4).transpose(1, 2)
    found = nn.functional.scaled_dot_product_attention(heads, heads, heads, **options)
    return found.transpose(1, 2).reshape(x.shape[0], 6, 8)


def first_head(net: Network, x: torch.Tensor) -> torch.Tensor:
    heads = net.second(x).reshape(x.shape[0], 6, 2, 4).transpose(1, 2)
    found = nn.functional.scaled_dot_product_attention(heads, heads, heads)
    return found.transpose(1, 2).reshape(x.shape[0] * 6, 2, 4)[:, 0]


COMPUTATIONS: dict[str, Callable[[Network, torch.Tensor], torch.Tensor]] = {
    "scaled": lambda net, x: (net.gamma * net.second(x) + x)[:, 0],
    "scaled by place": lambda net, x: (net.second(x)[:, :, None] * net.places[0]).flatten(1),
    "position added": lambda net, x: net.second(net.third(x) + net.places)[:, 0],
    "one vector added": lambda net, x: (net.second(x) + x.mean(1, keepdim=True))[:, 2],
    "alpha": lambda net, x: torch.add(x, net.second(x), alpha=2)[:, 0],
    "norm of all tokens": lambda net, x: nn.functional.layer_norm(net.second(x), (6, 8))[:, 0],
    "tokens exchanged": lambda net, x: net.second(net.third(x).flip(1))[:, 0],
    "activation in place": lambda net, x: (net.relu(net.second(x)) + x)[:, 0],
    "all tokens changed in place": lambda net, x: net.relu(x)[:, 0] + net.second(x).mean(1),
    "position added, second token": lambda net, x: net.second(net.third(x) + net.places)[:, 1],
    "input changed in place": lambda net, x: (net.relu(x) + net.second(x))[:, 0],
    "mixed in place": mixed_in_place,
    "used twice": lambda net, x: net.second(net.second(x))[:, 0],
    "two readers": lambda net, x: net.third(x[:, 0]) + net.second(x)[:, 1],
    "from the end": lambda net, x: net.second(x)[:, -1],
    "several": lambda net, x: net.third(net.second(x))[:, 1:3].flatten(1),
    "a step": lambda net, x: net.third(net.second(x))[:, 0:3:2].flatten(1),
    "attention": lambda net, x: net.third(attend(net.second(x)))[:, 0],
    "attention, scaled": lambda net, x: net.third(attend(net.second(x), scale=2.0))[:, 2],
    "attention, one head": first_head,
    "attention, causal": lambda net, x: net.third(attend(net.second(x), is_causal=True))[:, 2],
    "attention, masked": lambda net, x: net.third(attend(net.second(x), attn_mask=net.places[:, :6]))[:, 2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_computations(name: str, dtype: torch.dtype) -> None:
    """What may be fused or cut, and what must not."""
    torch.manual_seed(0)
    network, x = Network(COMPUTATIONS[name]).eval(), torch.randn(3, 3, 4, 4)
    with torch.inference_mode():
        expected = network(x.clone())
        faster = fuse_tokens(fold_batchnorm(network, (4, 4)).to(dtype), x[:2].to(dtype), batch_size=3)
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(faster(x.to(dtype)).float(), expected, rtol=tolerance, atol=tolerance)


def of_thirds(net: Network, x: torch.Tensor, *, order: tuple[int, ...] = (0, 1, 2), **options: Any) -> torch.Tensor:
    thirds = net.thirds(x).reshape(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    found = nn.functional.scaled_dot_product_attention(*(thirds[place] for place in order), **options)
    return net.third(found.transpose(1, 2).reshape(x.shape[0], 6, 8))


def keys_read_again(net: Network, x: torch.Tensor) -> torch.Tensor:
    q, k, v = net.thirds(x).reshape(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    found = nn.functional.scaled_dot_product_attention(q, k, v)
    return found.transpose(1, 2).reshape(x.shape[0], 6, 8)[:, 0] + k.flatten(1)[:, :8]


def own_query(net: Network, x: torch.Tensor, index: Any) -> torch.Tensor:
    q, k, v = net.thirds(x).reshape(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return nn.functional.scaled_dot_product_attention(q[index], k, v).flatten(1)


ONE_QUERY: dict[str, tuple[Callable[[Network, torch.Tensor], torch.Tensor], int]] = {
    "first token": (lambda net, x: of_thirds(net, x)[:, 0], 1),
    "third token, scaled": (lambda net, x: of_thirds(net, x, scale=2.0)[:, 2], 1),
    "two tokens": (lambda net, x: of_thirds(net, x)[:, 1:3].flatten(1), 0),
    "all tokens": (lambda net, x: of_thirds(net, x).mean(1), 0),
    "causal": (lambda net, x: of_thirds(net, x, is_causal=True)[:, 2], 0),
    "other order": (lambda net, x: of_thirds(net, x, order=(1, 0, 2))[:, 0], 0),
    "keys are values": (lambda net, x: of_thirds(net, x, order=(0, 1, 1))[:, 0], 0),
    "keys read again": (keys_read_again, 0),
    "the network's own, last": (lambda net, x: own_query(net, x, (slice(None), slice(None), slice(-1, None))), 1),
    "the network's own, first": (lambda net, x: own_query(net, x, (slice(None), slice(None), slice(1))), 0),
    "of the first head": (lambda net, x: own_query(net, x, (slice(None), slice(0, 1), slice(2, 3))), 0),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ONE_QUERY)
def test_one_query_needs_no_keys(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    network, x = Network(ONE_QUERY[name][0]).eval(), torch.randn(3, 3, 4, 4)
    network.thirds = nn.Linear(8, 24, bias=bias)
    nn.init.normal_(network.thirds.weight)
    faster = fused(network, x)
    assert sum(isinstance(part, OneQuery) for part in faster.modules()) == ONE_QUERY[name][1]
    with torch.inference_mode():
        torch.testing.assert_close(faster(x), network(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(faster(x[:1]), network(x[:1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("cache", [1, 2 * 4 * 7 * 5, 2**20])  # one head at a time, two of three, all
def test_attention_in_parts(cache: int, scale: float | None) -> None:
    """By definition: softmax(q k^T scale) v."""
    q, k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    weights = ((q @ k.mT).double() * (scale or 0.5)).exp()
    expected = (weights / weights.sum(-1, keepdim=True) @ v.double()).float()
    torch.testing.assert_close(attention_in_parts(q, k, v, scale=scale, cache=cache), expected)
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(attention_in_parts(*strided, scale=scale, cache=cache), expected)


@pytest.mark.parametrize("name", ["class token", "mean", "attention pool", "rotary"])
def test_bfloat16_errs_no_more_than_the_plain_network_in_it(name: str) -> None:
    network = with_values(NETWORKS[name][0]())
    x = torch.randn(16, 3, 32, 32)
    with torch.inference_mode():
        exact = network(x).numpy()
        plain = copy.deepcopy(network).bfloat16()(x.bfloat16()).float().numpy()
        folded = fold_batchnorm(network, (32, 32)).bfloat16()
        faster = fuse_tokens(folded, x[:2].bfloat16(), batch_size=16)(x.bfloat16()).float().numpy()
    assert agreement(exact, faster).error <= 1.5 * agreement(exact, plain).error


def test_copies_and_threads() -> None:
    network, x = with_values(NETWORKS["class token"][0]()), torch.randn(8, 3, 32, 32)
    faster = fused(network, x[:2])
    with torch.inference_mode():
        expected = faster(x)

    @torch.inference_mode()
    def run(module: nn.Module) -> torch.Tensor:
        return module(x)  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, [faster, copy.deepcopy(faster)] * 8):
            torch.testing.assert_close(found, expected)


def test_operators_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build of PyTorch may not have them: linear layers stay, the rest is as fast."""
    monkeypatch.delattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    has_fused_linear.cache_clear()
    network, x = with_values(NETWORKS["class token"][0]()), torch.randn(2, 3, 32, 32)
    try:
        faster = fused(network, x)
    finally:
        has_fused_linear.cache_clear()
    assert not any(isinstance(part, FusedLinear) for part in faster.modules())
    with torch.inference_mode():
        torch.testing.assert_close(faster(x), network(x), rtol=1e-4, atol=1e-4)


def test_encoder_takes_it() -> None:
    backbone = load_backbone("timm/test_vit3", "none")
    pixels = np.random.default_rng(0).integers(0, 255, (4, *backbone.preprocess.crop, 3), dtype=np.uint8)
    encoder, choice = build_encoder(backbone, choose_runtime("cpu", workers=1), pixels, precision="fp32")
    assert choice.form == "fused"
    assert any(isinstance(part, FusedLinear) for part in encoder._module.modules())
