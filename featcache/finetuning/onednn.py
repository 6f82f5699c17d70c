"""Convolutions whose weights' gradient oneDNN computes wrongly on a CPU, as PyTorch 2.14 brings it, and what does it rightly.

In: a network that is to train. Out: the same, but for how these few layers compute. Found by asking for the gradients of every
convolution of torchvision's and of most of timm's networks in memory full of something else (``benchmarks/convolutions.py``).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def crashes(weight: torch.Tensor, stride: Sequence[int], groups: int) -> bool:
    """Whether it writes where it must not: weights of 1 x 1 with stride, channels last, fewer inputs than a vector holds.

    oneDNN's issue 6035. Of RepVGG, MobileOne, FastViT and GENet; it may also wait for ever, or be wrong.
    """
    return weight.shape[2:] == (1, 1) and groups == 1 and max(stride) > 1 and weight.shape[1] < 16


def is_garbage(dilation: Sequence[int], groups: int) -> bool:
    """Whether in bfloat16 it is in part what memory held before, or a crash: of grouped and dilated weights, as SKNet's, on large maps."""
    return groups > 1 and max(dilation) > 1


def without_faults(module: nn.Module) -> nn.Module:
    """``module``, whose convolutions with such gradients compute otherwise; its layers and their names stay."""
    for conv in module.modules():
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
            continue
        if crashes(conv.weight, conv.stride, conv.groups) and conv.padding in ("valid", (0, 0)):
            compute = functools.partial(_read_then_multiply, stride=conv.stride)
        elif is_garbage(conv.dilation, conv.groups):
            geometry = conv.stride, conv.padding, conv.dilation, conv.groups
            compute = functools.partial(_in_float32, geometry=geometry)
        else:
            continue
        # Of this one layer, which remains PyTorch's for all who look at it: those that fuse it know these faults.
        conv._conv_forward = compute  # type: ignore[method-assign]
    return module


def _read_then_multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, stride: tuple[int, ...]
) -> torch.Tensor:
    if x.device.type != "cpu":
        return torch.conv2d(x, weight, bias, stride)
    return torch.conv2d(x[:, :, :: stride[0], :: stride[1]], weight, bias)


def _in_float32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, geometry: tuple[Any, ...]
) -> torch.Tensor:
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return torch.conv2d(x, weight, bias, *geometry)
    with torch.autocast("cpu", enabled=False):
        y = torch.conv2d(x.float(), weight, bias, *geometry)
    return y.to(torch.get_autocast_dtype("cpu"))
