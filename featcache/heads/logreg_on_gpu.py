"""The solver of ``logreg_path.py`` with all that has a value per row on a GPU: features, logits, residuals. PyTorch.

In: the same. Out: the same, but for rounding. Parameters, and what L-BFGS does with them, stay in NumPy: they are small. A step sends
the direction there and fetches the gradient; sums of losses are in float64, which MPS lacks: CUDA alone.
"""

from typing import Any

import numpy as np
import torch

from featcache.heads.head import Array
from featcache.heads.logreg_path import PathSolver, Point, penalised
from featcache.system.device import true_float32


class PathOnGpu(PathSolver):
    """``PathSolver`` whose logits and residuals are tensors on ``device``; what its methods do is said there."""

    def __init__(self, R: Array, y: Array, weights: Array, tolerance: float, *, device: torch.device) -> None:
        self.device = device
        self._rows, self._y = self._there(R), self._there(y.astype(np.int64))
        self._w = self._there(weights.T * (weights.shape[1] / weights.sum()))  # (F, n) float64
        self._members = torch.nn.functional.one_hot(self._y).to(self._rows.dtype)  # (n, K)
        super().__init__(R, y, weights, tolerance)

    def _there(self, values: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    @true_float32
    def means_of_classes(self, n_classes: int) -> Array:  # noqa: D102
        if n_classes == 2:
            return super().means_of_classes(n_classes)
        members = self._members.T[:, None] * self._w.to(self._members.dtype)  # (K, F, n)
        members = (members / members.sum(2, keepdim=True).clamp_min(torch.finfo(members.dtype).tiny)).flatten(0, 1)
        means = (members @ self._rows).cpu().numpy()
        return np.column_stack([means, np.ones(len(means), means.dtype)])

    @true_float32
    def products(self, theta: Array, first: int) -> Any:  # noqa: D102
        parameters = self._there(theta)
        return torch.addmm(parameters[:, -1:], parameters[:, first:-1], self._rows[:, first:].T)

    def along(self, residual: Any, move: Any) -> float:  # noqa: D102
        return float(torch.dot(residual.flatten(), move.flatten()))

    def at(self, theta: Array, logits: Any) -> Point:  # noqa: D102
        logits = self._there(logits) if isinstance(logits, np.ndarray) else logits
        if self.sign is not None:
            sign = self._members[:, 1] * 2 - 1
            margins = sign * logits
            small = torch.exp(-margins.abs())
            missing = torch.where(margins > 0, small, 1) / (1 + small)  # 1 - p of the own class
            losses = torch.log1p(small) + (-margins).clamp_min(0)
            residual = (-self._w * missing).to(logits.dtype) * sign
            return Point(theta, logits, residual, float((self._w * losses).sum()))
        z = logits.view(-1, *self._w.shape)  # (K, F, n)
        own_class = self._y.expand(1, *self._w.shape)
        top = z.amax(dim=0)
        odds = torch.exp(z - top)
        own = torch.exp((z.gather(0, own_class)[0] - top).clamp_min(-700).double())
        odds.scatter_(0, own_class, 0.0)  # 1 - p of the own class comes from the sum of the others: no cancellation
        others = odds.sum(dim=0).double()
        share = self._w / (others + own)
        odds *= share.to(odds.dtype)
        odds.scatter_(0, own_class, (-others * share).to(odds.dtype)[None])
        return Point(theta, logits, odds.view(logits.shape), float((self._w * torch.log1p(others / own)).sum()))

    @true_float32
    def gradient(self, first: int) -> Array:  # noqa: D102
        gradient = penalised(self.point.theta, self.penalty)
        gradient[:, :first] = 0
        residual = self.point.residual
        gradient[:, first:-1] += (residual @ self._rows[:, first:]).cpu().numpy()
        gradient[:, -1] = residual.sum(dim=1).cpu().numpy()
        return gradient

    @true_float32
    def spreads(self) -> tuple[Array, Array]:  # noqa: D102
        residual = self.point.residual
        size = residual.abs().view(-1, *self._w.shape)
        missing = torch.where(self._w > 0, size / self._w, 0).to(size.dtype)
        size = size * (1 - missing)
        spread = size.sum(dim=2).flatten().cpu().numpy()
        own = np.zeros((len(spread), 1), spread.dtype)
        if self.sign is None:
            of_rows = size.gather(0, self._y.expand(1, *self._w.shape))[0]  # (F, n)
            own[:, 0] = (of_rows @ self._members).T.flatten().cpu().numpy()  # by a product: the same sums every time
        return spread, own
