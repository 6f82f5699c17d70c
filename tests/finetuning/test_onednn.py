"""Gradients of the convolutions that oneDNN gets wrong, against a definition in float64; in networks that are not fused, too."""

import copy
import functools

import pytest
import torch
from cpus import needs_onednn_bf16
from torch import nn

from featcache.finetuning import fused
from featcache.finetuning.fused import Form
from featcache.finetuning.onednn import crashes, is_garbage, without_faults

FAULTS = {  # in, out, kernel, stride, padding, dilation, groups, image
    "colours": (3, 48, 1, 2, 0, 1, 1, 224),  # RepVGG's, MobileOne's and FastViT's first layers
    "few channels": (13, 48, 1, 2, 0, 1, 1, 112),  # GENet's
    "fewer than AVX2's vectors hold": (4, 8, 1, 2, 0, 1, 1, 32),
    "dilated groups": (128, 128, 3, 1, 2, 2, 32, 56),  # SKNet's
    "dilated depthwise": (16, 16, 3, 1, 2, 2, 16, 56),
}
RIGHT = {
    "pointwise": (3, 8, 1, 1, 0, 1, 1, 8),
    "strided": (16, 8, 1, 2, 0, 1, 1, 8),
    "strided with padding": (3, 8, 1, 2, 1, 1, 1, 8),
    "strided depthwise": (8, 8, 1, 2, 0, 1, 8, 8),
    "dilated": (8, 8, 3, 1, 2, 2, 1, 8),
    "groups": (8, 8, 3, 1, 1, 1, 2, 8),
}


def layer(geometry: tuple[int, ...]) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*geometry[:7]).to(memory_format=torch.channels_last)


def in_double(conv: nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a convolution gives, and the gradient of half its square, written as sums of products: (y, of the weights)."""
    (top, left), (down, right), (apart, _), (kernel, _) = conv.padding, conv.stride, conv.dilation, conv.kernel_size
    padded = nn.functional.pad(x.double(), (left, left, top, top))
    n, _, height, width = padded.shape
    rows, columns = (
        (length - apart * (kernel - 1) - 1) // step + 1 for length, step in ((height, down), (width, right))
    )
    reads = torch.stack(
        [
            padded[:, :, apart * i :: down, apart * j :: right][:, :, :rows, :columns]
            for i in range(kernel)
            for j in range(kernel)
        ],
        dim=2,
    ).view(n, conv.groups, -1, kernel * kernel, rows, columns)
    weight = conv.weight.detach().double().view(conv.groups, -1, conv.weight.shape[1], kernel * kernel)
    y = torch.einsum("ngikhw,goik->ngohw", reads, weight)
    if conv.bias is not None:
        y = y + conv.bias.detach().double().view(1, conv.groups, -1, 1, 1)
    gradient = torch.einsum("ngikhw,ngohw->goik", reads, y)
    return y.flatten(1, 2), gradient.reshape(conv.weight.shape)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_gradients_of_a_plain_network(name: str, precision: torch.dtype) -> None:
    conv = layer(FAULTS[name])
    edge, x = FAULTS[name][7], torch.randn(2, conv.in_channels, FAULTS[name][7], FAULTS[name][7])
    x = x.bfloat16().float().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        conv.weight.copy_(conv.weight.bfloat16())
    form = Form(copy.deepcopy(without_faults(nn.Sequential(conv))), nn.Linear(1, 1))
    assert type(form.module[0]) is nn.Conv2d
    assert form.module.state_dict().keys() == {"0.weight", "0.bias"}
    expected, of_weight = in_double(conv, x)
    assert expected.shape[2] == -(-edge // conv.stride[0])
    for _ in range(5):
        held = [torch.full((size,), 3e38) for size in (1_000, 100_000, 1_000_000)]
        del held  # what memory holds that is asked for next
        form.refresh(precision)
        y = form.embed(x)
        (found, *_) = torch.autograd.grad(y.square().sum() / 2, form.leaves, allow_unused=True)
        near = 1e-4 if precision == torch.float32 else 0.02
        assert float((y.detach().double() - expected).norm()) <= near * float(expected.norm())
        assert float((found.double() - of_weight).norm()) <= near * float(of_weight.norm())


@needs_onednn_bf16
@pytest.mark.parametrize("name", FAULTS)
def test_gradients_of_the_fused_layer(name: str) -> None:
    """In bfloat16, whose faults are more."""
    conv = layer(FAULTS[name])
    fast = fused._Convolution(conv, (), ("none", [], ""))
    x = torch.randn(2, conv.in_channels, *FAULTS[name][7:] * 2).bfloat16()
    with torch.no_grad():
        conv.weight.copy_(conv.weight.bfloat16())
    _, of_weight = in_double(conv, x)
    for _ in range(5):
        held = [torch.full((size,), 3e38) for size in (1_000, 100_000, 1_000_000)]
        del held
        list(fast.refresh(torch.bfloat16, {}))
        (found,) = torch.autograd.grad(fast(x).float().square().sum() / 2, fast._weight)
        assert float((found.double() - of_weight).norm()) <= 0.02 * float(of_weight.norm())


def test_only_what_is_wrong_is_computed_otherwise() -> None:
    for names, expected in ((FAULTS, True), (RIGHT, False)):
        for name, geometry in names.items():
            conv = layer(geometry)
            without_faults(nn.Sequential(conv))
            assert ("_conv_forward" in vars(conv)) == expected, name
            fault = crashes(conv.weight, conv.stride, conv.groups) or is_garbage(conv.dilation, conv.groups)
            assert fault or not expected


def test_what_pads_with_other_values_or_is_somebodys_own_is_left() -> None:
    class Own(nn.Conv2d):
        pass

    mirrored = functools.partial(nn.Conv2d, padding_mode="reflect")
    for make in (mirrored, Own):
        conv = make(3, 8, 1, 2)
        without_faults(nn.Sequential(conv))
        assert "_conv_forward" not in vars(conv)
