"""Dropout and drop path whose random numbers belong to an image, not to a batch.

In: (seed, step, images) of what a thread computes next. Out: modules that draw from these three alone, so that the numbers
depend neither on how a batch is cut nor on which thread computes a part. Elsewhere they draw as PyTorch's own do.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional

_thread = threading.local()


@contextlib.contextmanager
def drawn_by_image(seed: int, step: int, images: Iterable[int]) -> Iterator[None]:
    """Let this thread draw for a batch of ``images``, each with random numbers of its own."""
    # Tuples of integers have the same hash everywhere.
    _thread.generators = [torch.Generator().manual_seed(hash((seed, step, image)) % 2**63) for image in images]
    try:
        yield
    finally:
        del _thread.generators


def draw_like(x: torch.Tensor, shape: Iterable[int]) -> torch.Tensor | None:
    """Uniform numbers (N, *shape) in [0, 1) for the N rows of ``x``, the same number for each image; None outside.

    None, too, where an image is no whole number of rows, as where tokens come before images.
    """
    generators: list[torch.Generator] = getattr(_thread, "generators", [])
    if not generators or len(x) % len(generators):
        return None
    rows = (len(x) // len(generators), *shape)  # windows of an image lie one after the other
    return torch.cat([torch.rand(rows, generator=generator) for generator in generators])


class Dropout(nn.Dropout):
    """``nn.Dropout`` that draws by image."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102 - (N, ...) -> (N, ...)
        drawn = draw_like(input, input.shape[1:]) if self.training and 0 < self.p < 1 else None
        if drawn is None:
            return functional.dropout(input, self.p, self.training)
        return input * (drawn >= self.p).to(input.dtype).div_(1 - self.p)


class DropPath(nn.Module):
    """The end of a residual block's branch: in training nothing, for a share of the images; the others are scaled up for it.

    Stochastic depth (Huang et al. 2016), by image, as in timm and torchvision.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102 - (N, ...) -> (N, ...)
        if not self.training or self.rate == 0:
            return x
        ones = [1] * (x.ndim - 1)
        drawn = draw_like(x, ones)
        kept = x.new_empty(len(x), *ones).bernoulli_(1 - self.rate) if drawn is None else (drawn >= self.rate).to(x)
        return x * kept.div_(1 - self.rate)


def draw_by_image(module: nn.Module) -> None:
    """Replace dropout and stochastic depth by those above, wherever they stand as modules of their own."""
    for name, child in list(module.named_modules()):
        found: nn.Module
        if type(child) is nn.Dropout:
            found = Dropout(child.p, child.inplace)
        elif type(child).__name__ == "StochasticDepth" and getattr(child, "mode", "") == "row":  # torchvision's
            found = DropPath(float(child.p))
        elif type(child).__name__ == "DropPath" and getattr(child, "scale_by_keep", False):  # timm's
            found = DropPath(float(child.drop_prob or 0.0))
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, found.train(child.training))


def draws_otherwise(module: nn.Module, sample: torch.Tensor) -> bool:
    """Whether ``module``, in its present mode, draws random numbers that are nobody's: dropout within attention, say."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.eval()  # their statistics are not to move
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), drawn_by_image(0, 0, range(len(sample))):
            before = torch.get_rng_state()
            module(sample)
            return not torch.equal(before, torch.get_rng_state())
    finally:
        for norm in norms:
            norm.train()
