"""The moving average of a network's weights over its steps, which is then what is evaluated and kept.

In: a network that trains. Out: a copy of it that follows. Source: Polyak and Juditsky 1992, with the decay of today's recipes.
"""

from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel

from featcache.finetuning.network import Network, take_weights

Tensors = list[torch.Tensor]


class MovingAverage:
    """An exponential moving average whose decay grows to ``decay``, so that a short run is not stuck at its start."""

    def __init__(self, network: Network, *, decay: float) -> None:
        """A copy of ``network``, which from now on changes its tensors in place only."""
        self._average, self._decay = AveragedModel(network), decay
        # Listed once: to walk through a network takes as long as all else here.
        self._weights: tuple[Tensors, Tensors] = [*self.network.parameters()], [*network.parameters()]
        mine, theirs = [*self.network.buffers()], [*network.buffers()]
        # A call for all takes tensors of one type.
        self._buffers = [
            tuple([b for b in some if b.dtype == kind] for some in (mine, theirs)) for kind in {b.dtype for b in mine}
        ]

    @property
    def network(self) -> Network:
        """The copy."""
        return cast(Network, self._average.module)

    @torch.no_grad()
    def update(self) -> None:
        """Follow a step. Not by ``AveragedModel``'s own method, which asks the GPU for a number, and so waits for it."""
        n = int(self._average.n_averaged)  # on the CPU
        torch._foreach_lerp_(*self._weights, 1 - min(self._decay, (1 + n) / (10 + n)) if n else 1.0)
        for kept, current in self._buffers:
            torch._foreach_copy_(kept, current)
        self._average.n_averaged += 1

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return self._average.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``. Raises RuntimeError: of another network."""
        take_weights(self._average, state)
