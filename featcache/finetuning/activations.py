"""Activations that no convolution could take over, without the copies that autograd makes of their inputs.

In: a network whose activations may change their input in place. Out: the same with the fewest passes over memory: where the
derivative follows from what an activation gives, in place; elsewhere not in place, as autograd would first copy the input.
"""

from typing import Any

import torch
from torch import nn

from featcache.backbones.tracing import replace_module

# Changed in place, autograd clones their input first: the derivative follows from it.
_OF_INPUT = (nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Mish)


def with_cheap_activations(module: nn.Module) -> nn.Module:
    """``module``, changed."""
    for name, child in list(module.named_modules()):
        if type(child) in (nn.Hardtanh, nn.ReLU6):
            replace_module(module, name, _Clamp(child))
        elif type(child) in _OF_INPUT:
            child.inplace = False
    return module


class _Clamp(nn.Module):
    """Hardtanh, in place if that was."""

    def __init__(self, of: nn.Hardtanh) -> None:
        super().__init__()
        self._bounds, self._inplace = (of.min_val, of.max_val), of.inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        y: torch.Tensor = _ClampAndKeep.apply(x, *self._bounds, self._inplace)
        return y


class _ClampAndKeep(torch.autograd.Function):
    """Keeps for the way back what it gives, which is there anyway: whatever comes next keeps it, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float, high: float, inplace: bool) -> torch.Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x.clamp_(low, high) if inplace else x.clamp(low, high)
        ctx.save_for_backward(y)
        ctx.bounds = low, high
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        # At the bounds themselves there is no gradient: they count as outside, also for PyTorch.
        return torch.ops.aten.hardtanh_backward(g, y, *ctx.bounds), None, None, None
