"""Attention of a transformer that trains on a CPU in bfloat16: products of matrices, forward and back.

In: queries, keys and values. Out: what ``scaled_dot_product_attention`` gives, which takes two to six times as long there, where the CPU
has no matrix units (AMX).
"""

import math
from typing import Any

import torch

_KEPT = 2**22  # bytes of an image's scores that are kept for the way back; more are computed once more, image by image


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None, kept: int = _KEPT
) -> torch.Tensor:
    """(N, heads, L, D) queries, (N, heads, M, D) keys and values -> (N, heads, L, D); ``scale``: of scores, 1 / sqrt(D) when None."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    if query.shape[1] * query.shape[2] * key.shape[2] * query.element_size() <= kept:
        whole: torch.Tensor = _Attend.apply(query, key, value, scale, True)
        return whole
    images = zip(*(torch.split(t, 1) for t in (query, key, value)), strict=True)
    return torch.cat([_Attend.apply(*image, scale, False) for image in images])


class _Attend(torch.autograd.Function):
    """softmax(scale query key^T) value."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, keep: bool
    ) -> torch.Tensor:
        q, k, v = (t.flatten(0, 1).contiguous() for t in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            shares = _shares(q, k, scale)
            result = torch.bmm(shares, v).view(*query.shape[:3], -1)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, shares if keep else None)
        return result

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, shares = ctx.saved_tensors
        heads, scale = g.shape[:2], ctx.scale
        shares = _shares(q, k, scale) if shares is None else shares
        g = g.to(q.dtype).flatten(0, 1).contiguous()
        of_scores = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.mT), shares, -1, q.dtype)
        found = (_product(of_scores, k, scale), _product(of_scores.mT, q, scale), torch.bmm(shares.mT, g))
        return *(t.view(*heads, *t.shape[1:]) for t in found), None, None


def _shares(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, L, D), (B, M, D) -> (B, L, M): which share of each value a query takes."""
    scores = _product(q, k.mT, scale)
    return torch.softmax(scores, dim=-1, out=scores)


def _product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b, rounded once."""
    return torch.baddbmm(a.new_empty(len(a), a.shape[1], b.shape[2]), a, b, beta=0, alpha=scale)
