"""Depthwise convolutions on an NVIDIA GPU by PyTorch's own kernels.

In: a frozen network. Out: the same one, its small depthwise convolutions replaced. cuDNN, which PyTorch asks where channels come last,
compiles its kernels of them when they are first called: half a second for each layer, type and batch size (cuDNN 9.10 and later,
NVIDIA/cudnn-frontend issue 1066). PyTorch's own wait for nothing. They take longer, but less than the decoding of so many images.
"""

from typing import TypeGuard

import torch
from torch import nn

from featcache.backbones.folding import is_plain_convolution
from featcache.backbones.tracing import replace_module

_LARGEST = 5  # of the edges for which PyTorch has kernels of their own


class _Depthwise(nn.Module):
    """A depthwise convolution of any layout of pixels; its result has channels last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._geometry = conv.stride, conv.padding, conv.dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.contiguous()
        run = torch.ops.aten._conv_depthwise2d
        y: torch.Tensor = run(x.contiguous(), weight, weight.shape[2:], self.bias, *self._geometry)
        return y.contiguous(memory_format=torch.channels_last)


def with_own_depthwise(module: nn.Module) -> nn.Module:
    """``module``, changed; for CUDA alone."""
    for name, conv in list(module.named_modules()):
        if name and _is_small_depthwise(conv):
            replace_module(module, name, _Depthwise(conv))
    return module


def _is_small_depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution each of whose channels has small filters of its own."""
    if not isinstance(module, nn.Conv2d) or not is_plain_convolution(module):
        return False
    return module.groups == module.in_channels > 1 and max(module.kernel_size) <= _LARGEST
