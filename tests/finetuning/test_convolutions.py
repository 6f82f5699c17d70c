"""Gradients of single convolutions against PyTorch's in float64."""

import itertools

import pytest
import torch

from featcache.finetuning import convolutions

LAST = torch.channels_last
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (2, 1), (1, 2)])
@pytest.mark.parametrize("kernel", [(5, 5), (7, 7), (3, 5), (5, 3), (1, 11), (11, 1), (4, 4), (5, 4), (9, 9)])
def test_every_gradient_of_depthwise_convolutions(kernel: tuple[int, int], stride: tuple[int, int]) -> None:
    torch.manual_seed(0)
    same, none, uneven = (kernel[0] // 2, kernel[1] // 2), (0, 0), (1, 3)
    for size, channels, padding in itertools.product([(9, 11), (14, 14), (12, 13)], [12, 16], [same, none, uneven]):
        if any(edge + 2 * more < side for edge, more, side in zip(size, padding, kernel, strict=True)):
            continue
        x, weight = (torch.randn(shape) for shape in ((2, channels, *size), (channels, 1, *kernel)))
        exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
        y = torch.conv2d(*exact, None, stride, padding, 1, channels)
        g = torch.randn(y.shape)
        expected = *torch.autograd.grad(y, exact, g.double()), g.double().sum((0, 2, 3))
        given = (tensor.contiguous(memory_format=LAST) for tensor in (g, x, weight))
        found = convolutions._back(*given, (list(padding), list(stride), [1, 1], channels), [True] * 3)
        for one, other in zip(found, expected, strict=True):
            assert float((one - other).norm()) <= 2e-6 * float(other.norm()), (size, channels, padding)


@needs_onednn
def test_wide_depthwise_weights_are_cut_into_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole oneDNN takes several times as long."""
    cut: list[tuple[int, ...]] = []
    own = convolutions._of_wide_weights
    monkeypatch.setattr(convolutions, "_of_wide_weights", lambda *args: cut.append(args[2].shape[2:]) or own(*args))
    x = torch.randn(1, 16, 9, 9).contiguous(memory_format=LAST)
    for side in (1, 3, 5, 7):
        weight = torch.randn(16, 1, side, side).requires_grad_()
        geometry = [side // 2] * 2, [1, 1], [1, 1], 16
        convolutions.convolve(x, weight, None, None, geometry, ("none", [], "")).sum().backward()
    assert cut == [(5, 5), (7, 7)]
