"""Attention by products of matrices, and its gradients, against the definition in double precision."""

import math
from typing import Any

import pytest
import torch

from featcache.finetuning.attention import attend


def defined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """A query's share of each value is proportional to exp(scale q k)."""
    weights = torch.exp(scale * torch.einsum("nhld,nhmd->nhlm", q, k))
    return torch.einsum("nhlm,nhmd->nhld", weights / weights.sum(-1, keepdim=True), v)


def thirds(n: int, length: int, heads: int, depth: int) -> torch.Tensor:
    """(3, N, heads, L, D) as a linear layer lays them out: (N, L, 3, heads, D)."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(n, length, 3, heads, depth, generator=generator).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("kept", [0, 2**22])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("queries", "tokens", "heads", "depth", "scale"),
    [(7, 7, 3, 8, None), (1, 33, 2, 16, None), (5, 20, 1, 24, 0.3), (65, 65, 6, 64, None)],
)
def test_results_and_gradients_are_those_of_the_definition(
    queries: int, tokens: int, heads: int, depth: int, scale: float | None, dtype: torch.dtype, close: float, kept: int
) -> None:
    given = thirds(3, tokens, heads, depth).to(dtype)
    expected, found = given.double().requires_grad_(), given.clone().requires_grad_()
    weights = torch.randn(3, heads, queries, depth, generator=torch.Generator().manual_seed(1))
    results = []
    for values, run in (
        (expected, lambda q, k, v: defined(q, k, v, scale or 1 / math.sqrt(depth))),
        (found, lambda q, k, v: attend(q, k, v, scale=scale, kept=kept)),
    ):
        q, k, v = values.unbind(0)
        result = run(q[:, :, :queries], k, v)
        results.append((result, *torch.autograd.grad((result * weights.to(result.dtype)).sum(), values)))
    for exact, mine in zip(*results, strict=True):
        assert mine.dtype == dtype and mine.shape == exact.shape
        assert float((mine.detach().double() - exact.detach()).norm() / exact.detach().norm()) < close


def test_autocast_takes_what_is_given_in_its_own_type() -> None:
    """As ``scaled_dot_product_attention``: queries and keys may come out of a norm, in float32."""
    q, k, v = (t.requires_grad_() for t in thirds(2, 9, 2, 8).unbind(0))
    with torch.autocast("cpu", torch.bfloat16):
        result = attend(q, k, v.bfloat16())
    assert result.dtype == torch.bfloat16
    gradients = torch.autograd.grad(result.float().square().sum(), (q, k, v))
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    exact = torch.autograd.grad(defined(q, k, v, 1 / math.sqrt(8)).square().sum(), (q, k, v))
    assert all(float((g - e).norm() / e.norm()) < 0.03 for g, e in zip(gradients, exact, strict=True))


def test_few_scores_are_kept_for_the_way_back() -> None:
    """More of them are computed once more: no (L, M) tensor is held then."""
    for kept, expected in ((2 * 9 * 9 * 4, True), (2 * 9 * 9 * 4 - 1, False)):
        held: list[Any] = []
        q, k, v = (t.requires_grad_() for t in thirds(2, 9, 2, 8).unbind(0))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.shape) or t, lambda t: t):
            attend(q, k, v, kept=kept)
        assert any(shape[-2:] == (9, 9) for shape in held) == expected
