"""Depthwise convolutions by PyTorch's own operator, which only GPUs have: here ``conv2d`` stands in for it, asked as it is asked."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

from featcache.backbones.depthwise import _Depthwise, with_own_depthwise
from featcache.backbones.load import load_backbone


@pytest.fixture
def _operator() -> Iterator[None]:
    def convolve(x: Any, weight: Any, size: Any, bias: Any, stride: Any, padding: Any, dilation: Any) -> torch.Tensor:
        assert x.is_contiguous()  # what the operator takes other layouts for is not documented
        assert weight.is_contiguous()
        assert tuple(size) == tuple(weight.shape[2:])
        return torch.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])

    library = torch.library.Library("aten", "IMPL")
    library.impl("_conv_depthwise2d", convolve, "CPU")
    yield
    library._destroy()


def convolution(*given: Any, **named: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*given, **named).eval()


OWN = {
    "3 x 3": {"kernel_size": 3, "groups": 6, "padding": 1},
    "stride 2, no bias": {"kernel_size": 3, "groups": 6, "stride": 2, "bias": False},
    "5 x 3, dilated": {"kernel_size": (5, 3), "groups": 6, "padding": (4, 1), "dilation": (2, 1)},
    "two for each channel": {"kernel_size": 3, "groups": 6, "out_channels": 12},
}
OTHERS = {
    "7 x 7": {"kernel_size": 7, "groups": 6},
    "groups of two": {"kernel_size": 3, "groups": 3},
    "whole": {"kernel_size": 3},
    "reflected": {"kernel_size": 3, "groups": 6, "padding": 1, "padding_mode": "reflect"},
    "as large as before": {"kernel_size": 3, "groups": 6, "padding": "same"},
}


@pytest.mark.usefixtures("_operator")
@pytest.mark.parametrize("how", OWN)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.inference_mode()
def test_small_depthwise_convolutions_give_the_same(how: str, layout: torch.memory_format) -> None:
    conv = convolution(**{"in_channels": 6, "out_channels": 6} | OWN[how]).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 6, 11, 9).to(memory_format=layout)
    expected = conv(x)
    changed = with_own_depthwise(nn.Sequential(conv))
    assert isinstance(changed[0], _Depthwise)  # type: ignore[index]
    found = changed(x)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("how", OTHERS)
def test_others_are_left_alone(how: str) -> None:
    conv = convolution(**{"in_channels": 6, "out_channels": 6} | OTHERS[how])
    assert with_own_depthwise(nn.Sequential(conv))[0] is conv  # type: ignore[index]


@pytest.mark.usefixtures("_operator")
@torch.inference_mode()
def test_a_whole_network_traced_or_not() -> None:
    backbone = load_backbone("mobilenet_v3_small", "none", size=(64, 64))
    x = torch.rand(2, 3, 64, 64)
    expected, depthwise = backbone.module(x), 11
    for module in (fx.symbolic_trace(backbone.module), backbone.module):
        changed = with_own_depthwise(module)
        assert sum(isinstance(each, _Depthwise) for each in changed.modules()) == depthwise
        torch.testing.assert_close(changed(x), expected)
