"""One convolution of training with the residual and the activation behind it, forward and back.

In: maps (N, C, H, W), channels last, effective weights and biases. Out: maps, and gradients of all of these, by the fastest
right way for each kind of convolution and device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from featcache.backbones import winograd
from featcache.backbones.folding import Activation, apply_activation
from featcache.finetuning.onednn import crashes, is_garbage

FROM_RESULT = ("relu", "hardtanh")  # activations whose derivative follows from what they give
_LAST = torch.channels_last
_COLUMNS = 3  # of depthwise weights, at most, whose gradient oneDNN computes fast
Geometry = tuple[list[int], list[int], list[int], int]  # padding, stride, dilation, groups


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    geometry: Geometry,
    activation: Activation,
    *,
    rounded: torch.Tensor | None = None,
    of_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(convolution of ``x`` + ``residual``), whose gradients are those of ``x``, weight, bias and residual.

    Args:
        rounded: ``bias`` in the type of ``x``, where that is known. of_weight: what ``winograd.of_weights`` makes of ``weight``,
            in float32 on a CPU, to compute by tiles.
    """
    y: torch.Tensor
    if of_weight is None:
        y = _Convolve.apply(x, weight, bias, residual, rounded, geometry, activation)
    else:
        y = _ConvolveByTiles.apply(x, weight, of_weight, bias, residual, geometry[0], activation)
    return y


class _Convolve(torch.autograd.Function):
    """activation(convolution(x) + residual), with the cheapest right way back for each kind of convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        rounded: torch.Tensor | None,
        geometry: Geometry,
        activation: Activation,
    ) -> torch.Tensor:
        run = _by_onednn if x.device.type == "cpu" else _by_cudnn
        y = run(x, weight, bias, residual, rounded, geometry, activation)
        ctx.settings = geometry, activation
        ctx.save_for_backward(x, weight, None if activation[0] == "none" else y)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        geometry, activation = ctx.settings
        g = _before(activation, g, y)
        needed = ctx.needs_input_grad
        by_products = weight.shape[2:] == (1, 1) and geometry == ([0, 0], [1, 1], [1, 1], 1)
        back = _back_by_products if by_products and g.device.type == "cpu" else _back
        return *back(g, x, weight, geometry, needed[:3]), g if needed[3] else None, None, None, None


class _ConvolveByTiles(torch.autograd.Function):
    """The same of 3 x 3 convolutions in float32 on a CPU, by fewer multiplications forward and back (``winograd.py``)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        of_weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        padding: Sequence[int],
        activation: Activation,
    ) -> torch.Tensor:
        kept: list[torch.Tensor] | None = [] if ctx.needs_input_grad[1] else None
        y = apply_activation(winograd.convolve(x, of_weight, bias, padding, kept), residual, activation)
        ctx.settings = padding, activation
        ctx.save_for_backward(*(kept or ()), x, of_weight, None if activation[0] == "none" else y)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *kept, x, of_weight, y = ctx.saved_tensors
        padding, activation = ctx.settings
        g = _before(activation, g, y)
        needed = ctx.needs_input_grad
        gx, gw, gb = winograd.back(g, x, of_weight, padding, kept, (needed[0], needed[1], needed[3]))
        gw = None if gw is None else winograd.of_weights_back(gw)
        return gx, gw, None, gb, g if needed[4] else None, None, None


def _before(activation: Activation, g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The gradient of what ``activation`` was given, for that of ``y``, which it gave."""
    name, options, _ = activation
    if name == "relu":
        g = torch.ops.aten.threshold_backward(g, y, 0)
    elif name == "hardtanh":
        g = torch.ops.aten.hardtanh_backward(g, y, *options)
    return g.contiguous(memory_format=_LAST)


def _by_onednn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    rounded: torch.Tensor | None,
    geometry: Geometry,
    activation: Activation,
) -> torch.Tensor:
    run: Any = torch.ops.mkldnn._convolution_pointwise
    name, *options = activation
    if residual is None:
        return run(x, weight, bias, *geometry, *activation)  # type: ignore[no-any-return]
    after = None if name == "none" else name
    same = _rounded(bias, rounded, x.dtype)  # a demand of this operator's alone
    return run.binary(x, residual, weight, same, *geometry, "add", 1.0, after, *options)  # type: ignore[no-any-return]


def _by_cudnn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    rounded: torch.Tensor | None,
    geometry: Geometry,
    activation: Activation,
) -> torch.Tensor:
    padding, stride, dilation, groups = geometry
    name, options, _ = activation
    bias = _rounded(bias, rounded, x.dtype)
    if name == "relu" and groups == 1 and x.device.type == "cuda":
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y.add_(residual)
    if name == "relu":
        return y.relu_()
    return nn.functional.hardtanh_(y, *options) if name == "hardtanh" else y


def _rounded(bias: torch.Tensor | None, rounded: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """``bias`` in ``dtype``, unless it is there already."""
    return bias.to(dtype) if rounded is None and bias is not None else rounded


def _back_by_products(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, _: object, needed: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of a 1 x 1 convolution with stride 1: products of matrices with a row for each pixel."""
    (n, _, height, width), w = g.shape, weight.flatten(1)
    rows, inputs = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (g, x))
    gx = (rows @ w).view(n, height, width, -1).permute(0, 3, 1, 2) if needed[0] else None
    gw = None
    if needed[1]:  # the narrower one first: up to a fifth faster
        narrow = rows.shape[1] <= inputs.shape[1]
        gw = (rows.t() @ inputs if narrow else (inputs.t() @ rows).t()).reshape(weight.shape)
    return gx, gw, _sum_of_pixels(g) if needed[2] else None


def _back(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Any, needed: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of any convolution."""
    padding, stride, dilation, groups = geometry

    def run(g: torch.Tensor, x: torch.Tensor, mask: list[bool]) -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = torch.ops.aten.convolution_backward(
            g, x, weight.to(g.dtype), None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return found

    on_cpu, gb = g.device.type == "cpu", _sum_of_pixels(g) if needed[2] else None
    if on_cpu and crashes(weight, stride, groups) and not any(padding):
        gx = run(g, x, [True, False, False])[0] if needed[0] else None
        read = x[:, :, :: stride[0], :: stride[1]]
        return gx, _back_by_products(g, read, weight, geometry, [False, needed[1], False])[1], gb
    depthwise, rounded = on_cpu and groups > 1 and weight.shape[1] == 1, on_cpu and g.dtype == torch.bfloat16
    # oneDNN has no fast kernels in bfloat16 for these: 1.5 to 80 times the time of float32, with AVX-512.
    slow_x = depthwise and rounded and max(stride) > 1
    slow_w = rounded and (is_garbage(dilation, groups) or (depthwise and max(weight.shape[2:]) > _COLUMNS))
    by_columns = depthwise and len(weight) == groups and _may_be_cut(weight, stride, dilation)
    usual = [needed[0] and not slow_x, needed[1] and not (slow_w or by_columns), False]
    gx, gw = run(g, x, usual)[:2] if any(usual) else (None, None)
    if needed[0] and slow_x:
        like_x = torch.empty_like(x, dtype=torch.float32)  # only its shape counts here
        exact = run(g.float(), like_x, [True, False, False])[0]
        gx = None if exact is None else exact.to(g.dtype)
    if needed[1] and by_columns:
        gw = _of_wide_weights(g, x, weight, padding, stride)
    elif needed[1] and slow_w:
        gw = run(g.float(), x.float(), [False, True, False])[1]
    return gx, gw, gb


def _may_be_cut(weight: torch.Tensor, stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether ``_of_wide_weights`` knows the geometry of a depthwise convolution."""
    more = weight.shape[3] - _COLUMNS
    return more > 0 and max(dilation) == 1 and stride[1] <= _COLUMNS and more % stride[1] == 0


def _of_wide_weights(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, padding: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """The gradient of depthwise weights (C, 1, h, w) with more than three columns, three at a time, in float32.

    oneDNN's kernels for the gradient of depthwise weights take any number of rows, but no more columns; its others multiply
    eight channels by eight, of which one each counts.
    """
    (n, c, height, width), (rows, columns), (tall, wide) = x.shape, g.shape[2:], weight.shape[2:]
    padded = x.new_zeros(n, height, width + 2 * padding[1], c, dtype=torch.float32)
    padded[:, :, padding[1] : padding[1] + width] = x.permute(0, 2, 3, 1)
    given = (padded.shape[2] - _COLUMNS) // stride[1] + 1  # columns of what three columns of weights give
    # Zeros behind each row of the gradient: read from so many pixels earlier on, the same memory has them before.
    last = wide - _COLUMNS
    memory = g.new_zeros(last // stride[1] + n * rows * given, c, dtype=torch.float32)
    memory[last // stride[1] :].view(n, rows, given, c)[:, :, :columns] = g.permute(0, 2, 3, 1)
    found, some = (g.new_empty(c, 1, tall, number, dtype=torch.float32) for number in (wide, _COLUMNS))
    geometry: Any = list(stride), [padding[0], 0], [1, 1], False, [0, 0], c
    for first in (*range(0, last, _COLUMNS - _COLUMNS % stride[1]), last):
        begin = (last - first) // stride[1]
        shifted = memory[begin : begin + n * rows * given].view(n, rows, given, c)
        maps = shifted.permute(0, 3, 1, 2), padded.permute(0, 3, 1, 2)
        back = torch.ops.aten.convolution_backward(*maps, some, None, *geometry, [False, True, False])
        found[..., first : first + _COLUMNS] = back[1]
    return found


def _sum_of_pixels(g: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W), channels last, -> (C,) float32."""
    if g.device.type == "cpu":
        return g.sum((0, 2, 3)).float()  # added up in float32; to ask for that would first make a copy in it
    rows = g.permute(0, 2, 3, 1).flatten(0, 2)
    ones = rows.new_ones(1, len(rows))  # a product of matrices reads them at twice the speed of a sum
    return (ones @ rows)[0].float()
