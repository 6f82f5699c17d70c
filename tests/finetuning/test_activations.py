"""Activations in training: PyTorch's values and gradients, and no copy of what they are given."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from featcache.finetuning.activations import with_cheap_activations

KINDS = {
    "relu6": lambda inplace: nn.ReLU6(inplace),
    "hardtanh": lambda inplace: nn.Hardtanh(-0.5, 1.5, inplace),
    "hardswish": lambda inplace: nn.Hardswish(inplace),
    "hardsigmoid": lambda inplace: nn.Hardsigmoid(inplace),
    "silu": lambda inplace: nn.SiLU(inplace),
    "mish": lambda inplace: nn.Mish(inplace),
    "leaky relu": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "relu": lambda inplace: nn.ReLU(inplace),
}


class Copies(TorchDispatchMode):
    """Counts copies of whole maps."""

    def __init__(self, of: tuple[int, ...]) -> None:
        super().__init__()
        self.of, self.seen = of, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        copying = function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        self.seen += copying and tuple(result.shape) == self.of
        return result


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_pytorchs(kind: str, inplace: bool) -> None:
    torch.manual_seed(0)
    values = 3 * torch.randn(2, 6, 5, 5, dtype=torch.float64)
    values[0, 0, 0] = torch.tensor([0, 6, -0.5, 1.5, 3.0])  # where slopes change
    found, expected = [], []
    plain = nn.Sequential(nn.BatchNorm2d(6, affine=False), KINDS[kind](False)).double()
    cheap = with_cheap_activations(nn.Sequential(nn.BatchNorm2d(6, affine=False), KINDS[kind](inplace)).double())
    edges = nn.Sequential(KINDS[kind](False)), with_cheap_activations(nn.Sequential(KINDS[kind](inplace)))
    for results, after_a_norm, alone in ((expected, plain, edges[0]), (found, cheap, edges[1])):
        for module in (after_a_norm, alone):
            x = values.clone().requires_grad_()
            y = module(x * 1)
            y.square().sum().backward()
            results += [y, x.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_map_is_copied(kind: str) -> None:
    torch.manual_seed(0)
    layers = nn.BatchNorm2d(6), KINDS[kind](True)
    x = torch.randn(2, 6, 5, 5).requires_grad_()
    with Copies((2, 6, 5, 5)) as copies:
        with_cheap_activations(nn.Sequential(*layers))(x).sum().backward()
    assert copies.seen == 0


def test_what_may_not_be_changed_is_not() -> None:
    x = torch.randn(3, 4).requires_grad_()
    before = x.detach().clone()
    y = with_cheap_activations(nn.Sequential(nn.ReLU6()))(x)
    assert torch.equal(x.detach(), before)
    assert not torch.equal(y.detach(), before)
