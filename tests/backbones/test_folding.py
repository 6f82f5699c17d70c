"""A fused network computes what the plain one computes, whatever stands around its convolutions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from featcache.backbones import folding
from featcache.backbones.backbone import OFFLINE_BACKBONE
from featcache.backbones.folding import fold_batchnorm, fuse_convolutions, fuse_relus
from featcache.backbones.load import load_backbone

SLOW = {"mobilenet_v2": 52, "efficientnet_b0": 81, "googlenet": 57, "densenet121": 120, "vit_b_32": 1}


def with_statistics(module: nn.Module) -> nn.Module:
    """Batch norms that do something, as after training."""
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    return module.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "after",
    [
        None,
        nn.ReLU(),
        nn.ReLU6(),
        nn.Hardtanh(-1, 2),
        nn.Hardswish(),
        nn.SiLU(),
        nn.Sigmoid(),
        nn.GELU(),
        nn.GELU("tanh"),
    ],
    ids=str,
)
def test_a_tiled_convolution_does_what_a_fused_one_does(after: nn.Module | None, residual: bool) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(64, 72, 3, padding=1), torch.randn(3, 64, 13, 9).to(memory_format=torch.channels_last)
    activation = folding.NOT_AT_ALL if after is None else folding._ACTIVATIONS[type(after)](after)
    with torch.inference_mode():
        expected = conv(x)
        added = torch.randn_like(expected) if residual else None
        expected = expected if added is None else expected + added
        found = folding._TiledConvolution(conv, activation)(x, added)
    torch.testing.assert_close(found, expected if after is None else after(expected), rtol=1e-4, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def check(module: nn.Module, x: torch.Tensor, fused: int) -> None:
    """Compare with the plain network; ``fused`` convolutions must have become one step with what follows them."""
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = module(x)
        folded = fold_batchnorm(module, x.shape[2:])
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
        faster = fuse_convolutions(folded.to(memory_format=torch.channels_last), x)
        torch.testing.assert_close(faster(x), expected, rtol=1e-4, atol=1e-4)
        other = torch.rand_like(x[:1])  # another batch size, other values
        torch.testing.assert_close(faster(other), module(other), rtol=1e-4, atol=1e-4)
    assert sum(type(m).__name__ in ("_FusedConvolution", "_TiledConvolution") for m in faster.modules()) == fused


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.GELU, lambda: nn.Hardtanh(-0.5, 2.0)]
)
def test_activations(activation: Callable[[], nn.Module]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 4, 1))
    check(with_statistics(module), torch.randn(2, 3, 9, 9), fused=2)


class Network(nn.Module):
    """Layers, called by a function."""

    def __init__(self, compute: Callable[["Network", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.third = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.second, self.relu = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.ReLU(inplace=True)
        self.norm, self.other, self.compute = nn.BatchNorm2d(3), nn.BatchNorm2d(3), compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


def other_in_place(net: Network, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a += net.second(a)  # whoever reads a below sees the sum
    return net.third(a) + a


def own_in_place(net: Network, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    b += a
    return net.third(b)


def changed_before_the_addition(net: Network, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = net.third(a)
    net.relu(a)
    return b + c


@pytest.mark.parametrize(
    ("compute", "fused"),
    [
        pytest.param(lambda net, a, b: net.third(net.relu(b + a)) + a, 3, id="relu after"),
        pytest.param(lambda net, a, b: net.third(a) + b, 3, id="other first"),
        (other_in_place, 4),
        (own_in_place, 3),
        pytest.param(lambda net, a, b: net.third(net.relu(b.clone())) + b, 3, id="used twice"),
        pytest.param(lambda net, a, b: b + b, 2, id="twice itself"),
        pytest.param(lambda net, a, b: b + a.mean((2, 3), keepdim=True), 2, id="broadcast"),
        pytest.param(lambda net, a, b: torch.add(b, a, alpha=2), 2, id="alpha"),
        pytest.param(lambda net, a, b: net.relu(a) * torch.relu(b), 2, id="input changed before the activation"),
        (changed_before_the_addition, 3),
    ],
)
def test_residuals(compute: Callable[..., torch.Tensor], fused: int) -> None:
    """Additions in every order, some of which must not be fused."""

    def forward(net: Network, x: torch.Tensor) -> torch.Tensor:
        a = net.conv(x)
        return compute(net, a, net.second(a))

    check(Network(forward).eval(), torch.randn(2, 3, 8, 8), fused)


@pytest.mark.parametrize(
    ("compute", "left", "fused"),
    [
        pytest.param(lambda net, x: net.other(net.conv(net.norm(net.conv(x)))), 2, 2, id="convolution called twice"),
        pytest.param(lambda net, x: torch.relu(net.other(net.norm(net.conv(x)))), 0, 1, id="two norms in a row"),
        pytest.param(lambda net, x: net.norm(net.conv(x)) + net.conv.weight.mean(), 1, 1, id="weights read elsewhere"),
        pytest.param(lambda net, x: net.norm(input=net.conv(x)), 1, 1, id="called by keyword"),
        pytest.param(lambda net, x: net.norm(net.conv(x if x.sum() > 0 else -x)), 2, 0, id="not to be traced"),
    ],
)
def test_calls(compute: Callable[[Network, torch.Tensor], torch.Tensor], left: int, fused: int) -> None:
    network = with_statistics(Network(compute))
    assert norms(fold_batchnorm(network, (8, 8))) == left
    check(network, torch.randn(2, 3, 8, 8), fused)


@pytest.mark.parametrize("padding", ["same", "reflect"])
def test_convolutions_that_onednn_does_not_know(padding: str) -> None:
    options = {"padding": "same"} if padding == "same" else {"padding": 1, "padding_mode": "reflect"}
    module = Conv2dNormActivation(3, 4, 3)
    check(with_statistics(nn.Sequential(module, nn.Conv2d(4, 4, 3, **options))), torch.randn(2, 3, 8, 8), fused=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("mobilenet_v3_small", 52),
        ("resnet18", 20),
        *(pytest.param(name, fused, marks=pytest.mark.slow) for name, fused in SLOW.items()),
    ],
)
def test_torchvision(name: str, fused: int) -> None:
    edge = 224 if name.startswith("vit") else 96
    check(with_statistics(load_backbone(name, "none").module), torch.randn(2, 3, edge, edge), fused)


def test_timm_with_real_weights() -> None:
    check(load_backbone(OFFLINE_BACKBONE).module, torch.randn(2, 3, 96, 96), fused=49)


@pytest.mark.parametrize(("name", "there"), [("resnet18", 20), (OFFLINE_BACKBONE, 49)])
def test_folding_removes_batch_norms_and_keeps_the_original(name: str, there: int) -> None:
    module = load_backbone(name, "none").module
    assert (norms(fold_batchnorm(module, (32, 32))), norms(module)) == (0, there)


def conv_relu(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> torch.Tensor:
    """What ``aten::cudnn_convolution_relu`` computes, by the arguments of its schema."""
    return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()


def conv_add_relu(x: Any, weight: Any, z: torch.Tensor, alpha: float, *rest: Any) -> torch.Tensor:
    bias, *geometry = rest
    return (nn.functional.conv2d(x, weight, bias, *geometry) + alpha * z).relu()


@pytest.mark.parametrize(("name", "fused", "left"), [("resnet18", 17, 3), ("regnet_y_400mf", 1 + 3 * 16, None)])
def test_what_cudnn_can_do(monkeypatch: pytest.MonkeyPatch, name: str, fused: int, left: int | None) -> None:
    """ReLU with and without an addition; no groups, no other activations. On a GPU itself: ``test_embed_on_gpu.py``."""
    for operator, stand_in in (("cudnn_convolution_relu", conv_relu), ("cudnn_convolution_add_relu", conv_add_relu)):
        [schema] = [getattr(torch.ops.aten, operator).default._schema]
        assert [argument.name for argument in schema.arguments][-5:] == [
            "bias",
            "stride",
            "padding",
            "dilation",
            "groups",
        ]
        monkeypatch.setattr(torch, operator, stand_in)
    module = with_statistics(load_backbone(name, "none").module)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = module(x)
        faster = fuse_relus(fold_batchnorm(module, (64, 64)), x)
        torch.testing.assert_close(faster(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    kinds = [type(module).__name__ for module in faster.modules()]
    assert kinds.count("_CudnnConvolution") == fused
    assert left is None or kinds.count("Conv2d") == left


def test_without_a_relu_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 1)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(fuse_relus(fold_batchnorm(module, (8, 8)), x)(x), module(x))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"), [(3, 2, 1, 1), (5, 2, 1, 4), (3, 1, 2, 1), (2, 3, 1, 1)]
)
def test_padding_as_in_tensorflow(kernel: int, stride: int, dilation: int, groups: int) -> None:
    """timm's own module is the reference, for images of other sizes as well: how much is padded depends on them."""
    from timm.layers import Conv2dSame

    conv = Conv2dSame(4, 8, kernel, stride, dilation=dilation, groups=groups)
    network = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU6()).eval()
    network[1].running_mean.normal_()
    sample = torch.randn(2, 4, 16, 15)
    with torch.inference_mode():
        folded = fold_batchnorm(network, (16, 15))
        assert not any(isinstance(part, Conv2dSame | nn.BatchNorm2d) for part in folded.modules())
        for x in (sample, torch.randn(1, 4, 23, 12), torch.randn(1, 4, 8, 9)):
            torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fuse_convolutions(folded, sample)(sample), network(sample), rtol=1e-4, atol=1e-5)
    assert type(network[0]) is Conv2dSame
