"""The gradient of a batch on a CUDA GPU: the form that trains fastest, its hundreds of calls replayed as a graph.

In: a network in the mode of the next steps, a batch. Out: gradients of its parameters. Frozen batch norms are folded into
convolutions (``fused.py``); a network without any computes as it is, by autocast. A processor needs longer to ask for these calls one
by one than a GPU to compute them, up to some hundred images (Nguyen et al., Accelerating PyTorch with CUDA Graphs, 2021).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from featcache.finetuning.fused import Form, make_form
from featcache.finetuning.network import Network
from featcache.finetuning.recipes import Job, Recipe
from featcache.images.preprocess import normalise
from featcache.system.cuda_graphs import capturing

log = logging.getLogger("featcache")
_EAGER = 2  # parts of a size before a graph of it is captured: kernels are chosen by then
_MOST = 4  # sizes that have a graph: a batch and what is left of one, or two sizes of batches
_CLOSE = 1e-2  # of gradients, relative to their length: far above rounding, far below any mistake
_MOVES = nn.modules.batchnorm._BatchNorm  # whose buffers a forward pass changes
Part = tuple[torch.Tensor, ...]  # pixels, labels and weights of some images, and what their loss is divided by
Scale = Callable[[torch.Tensor], torch.Tensor]  # of a loss, before gradients are taken


class GpuSteps:
    """Gradients of a network's batches, by one GPU."""

    def __init__(
        self, network: Network, recipe: Recipe, job: Job, dtype: torch.dtype | None, *, cuda: Any = torch.cuda
    ) -> None:
        """``dtype``: of the backbone's arithmetic, where not float32. cuda: a stand-in, for tests."""
        self._network, self._recipe = network, recipe
        self._dtype, self._device, self._cuda = dtype, job.runtime.device, cuda
        self._stream = cuda.Stream(self._device)  # a graph is captured on one that is not the usual
        # Listed once: to walk through a network takes a processor half a millisecond a step.
        self._parameters, self._modules = [*network.parameters()], [*network.modules()]
        self._mode: tuple[bool, ...] = ()
        self._form: Form | None = None
        self._seen: dict[int, int] = {}  # images of a part -> how many there were
        self._graphs: dict[int, _Graph | None] = {}

    def accumulate(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], *, micro: int, scale: Scale
    ) -> torch.Tensor:
        """Set ``grad`` to that of the batch's mean loss, ``micro`` images at a time; returns sums as ``Trainer._step`` does.

        ``scale``: of the loss, before gradients are taken.
        """
        pixels, labels, weights, size = batch
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        parts = []
        with self._cuda.stream(self._stream):
            self._take_over_mode()
            for start in range(0, len(pixels), micro):
                part = slice(start, start + micro)
                given = pixels[part], labels[part], weights[part], torch.full((), 1 / size, device=pixels.device)
                parts.append(self._part(given, scale))
            sums = torch.stack(parts).sum(0)
        self._cuda.current_stream(self._device).wait_stream(self._stream)
        return sums

    def forget(self) -> None:
        """Give up all graphs, whose memory is needed."""
        self._graphs, self._seen = {}, {}

    def _take_over_mode(self) -> None:
        """Make the form for what trains now, if that has changed."""
        network = self._network
        mode = (
            *(parameter.requires_grad for parameter in self._parameters),
            *(module.training for module in self._modules),
        )
        if mode == self._mode:
            return
        self.forget()
        self._mode, self._form = mode, None
        if any(parameter.requires_grad for parameter in network.backbone.parameters()):
            sample = torch.randint(0, 256, (2, *network.size, 3), generator=torch.Generator().manual_seed(0))
            images = normalise(sample.to(torch.uint8).to(self._device), network.mean, network.std)
            form = make_form(network.backbone, network.head, images, self._dtype or torch.float32)
            self._form = form if form.folded else None

    def _part(self, given: Part, scale: Scale) -> torch.Tensor:
        """Add the gradient of some images to ``grad``; their sums."""
        count = len(given[0])
        if graph := self._graphs.get(count):
            return graph.replay(given)
        self._seen[count] = self._seen.get(count, 0) + 1
        if self._seen[count] <= _EAGER or count in self._graphs or len(self._graphs) == _MOST:
            return self._compute(given, scale)
        before = {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}
        _set_gradients(list(before), [None] * len(before))
        state = self._cuda.get_rng_state(self._device)
        sums = self._compute(given, scale)
        if self._finite():  # a loss scaler begins too high, and takes some steps to come down: nothing to compare with
            self._graphs[count] = self._captured(given, scale, state)
        for parameter, gradient in before.items():
            parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        return sums

    def _compute(self, given: Part, scale: Scale) -> torch.Tensor:
        pixels, labels, weights, share = given
        network, form = self._network, self._form
        if form:
            form.refresh(self._dtype or torch.float32)
        with torch.enable_grad(), torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            inputs = normalise(pixels, network.mean, network.std)
            logits = network.head(form.embed(inputs) if form else network.backbone(inputs))
        smoothing = self._recipe.label_smoothing
        with torch.enable_grad():
            losses = functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
            loss = (losses * weights).sum()
            scaled = scale(loss * share)
        if form:
            form.settle(torch.autograd.grad(scaled, form.leaves, allow_unused=True))
        else:
            torch.autograd.backward(scaled)
        hits = ((logits.argmax(dim=1) == labels) * weights).sum()
        return torch.stack((loss.detach(), hits, weights.sum()))

    def _finite(self) -> bool:
        """Whether ``grad`` is. It waits for the GPU."""
        norms = torch._foreach_norm([p.grad for p in self._parameters if p.grad is not None])
        return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())

    def _captured(self, given: Part, scale: Scale, state: torch.Tensor) -> "_Graph | None":
        """A graph that gives the gradients which ``grad`` now holds, of the same part; None if none can be made.

        ``state``: of the random numbers, before these were computed.
        """
        trained = [p for p in self._parameters if p.grad is not None]
        expected, after = [p.grad for p in trained], self._cuda.get_rng_state(self._device)
        moved = [(b, b.clone()) for m in self._modules if isinstance(m, _MOVES) for b in m.buffers()]
        pool = next((graph.pool for graph in self._graphs.values() if graph), None)
        try:
            _set_gradients(trained, [None] * len(trained))
            graph = _Graph(lambda some: self._compute(some, scale), given, trained, self._stream, pool, self._cuda)
            self._cuda.set_rng_state(state, self._device)
            graph.replay(given)
            if not _near([p.grad for p in trained], expected):
                raise RuntimeError("it gives other gradients")
            return graph
        except Exception as error:  # a network that looks at its values, too little memory, and more
            log.debug("no CUDA graph of %d images in training: %s", len(given[0]), str(error).partition("\n")[0])
            return None
        finally:
            self._cuda.set_rng_state(after, self._device)
            _set_gradients(trained, expected)
            with torch.no_grad():
                for buffer, value in moved:
                    buffer.copy_(value)


class _Graph:
    """Sums and gradients of as many images, computed by one call. pool: of its memory, which others may share."""

    def __init__(
        self,
        compute: Callable[[Part], torch.Tensor],
        given: Part,
        trained: list[nn.Parameter],
        stream: Any,
        pool: Any,
        cuda: Any,
    ) -> None:
        """What ``compute`` does on ``stream``. Raises any error: it cannot be captured."""
        self._trained, self._given = trained, tuple(tensor.clone() for tensor in given)
        with capturing(stream, given[0].device, pool=pool, cuda=cuda) as self._graph:
            self._sums = compute(self._given)
        self._gradients = [p.grad for p in trained]
        _set_gradients(trained, [None] * len(trained))
        self.pool = self._graph.pool()

    def replay(self, given: Part) -> torch.Tensor:
        """Add gradients to ``grad``; the sums."""
        # Copies: the memory in which they lie may be written again.
        before = [parameter.grad.clone() for parameter in self._trained if parameter.grad is not None]
        for mine, theirs in zip(self._given, given, strict=True):
            mine.copy_(theirs)
        self._graph.replay()
        if before:
            torch._foreach_add_(before, self._gradients)  # type: ignore[arg-type] # all of them have one
        _set_gradients(self._trained, before or self._gradients)
        return self._sums.clone()


def _set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _near(found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> bool:
    """Whether gradients are the same but for rounding."""
    if any(gradient is None for gradient in found):
        return False
    mine, theirs = (torch.cat([g.flatten().float() for g in some if g is not None]) for some in (found, expected))
    return bool((mine - theirs).norm() <= _CLOSE * theirs.norm())
