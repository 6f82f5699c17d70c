"""A backbone as it trains fastest: batch norms in the convolutions, activations and residuals, too, by oneDNN or cuDNN.

In: a backbone in the mode of the next steps. Out: a ``Form`` that computes the same up to rounding from ``leaves``: effective
weights, which are computed once per step from the network's own parameters, and whose summed gradients become those of
the parameters by the chain rule. What cannot be traced, or does not agree with the plain network, stays as it is.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from featcache.backbones import winograd
from featcache.backbones.folding import (
    Activation,
    chain_from,
    foldable,
    is_plain_convolution,
    note_shapes,
    replace_chain,
    weights_read,
)
from featcache.backbones.fused_tokens import ATTENTION, has_matrix_units, is_plain_attention, leave_out_unread_tokens
from featcache.backbones.tracing import evaluating, finished, sources_forgotten, trace, with_plain_attention
from featcache.finetuning.activations import with_cheap_activations
from featcache.finetuning.attention import attend
from featcache.finetuning.convolutions import FROM_RESULT, Geometry, convolve
from featcache.system.device import true_float32
from featcache.system.runtime_options import may_fuse

_CLOSE = 1e-2  # of gradients, relative to their length: far above rounding, far below any mistake
_LAST = torch.channels_last
IMAGES = 4  # at once on a CPU, half of prediction's: a core's cache also holds the activations that are kept for the way back
_ALIGNED = 8  # channels whose biases, rounded to 16 bits, begin where any kernel can read them


class Form:
    """What computes embeddings in training, and the tensors that gradients are taken of.

    Attributes:
        module: (N, 3, H, W) -> (N, D).
        fused: whether it is not simply the backbone. folded: whether batch norms are part of convolutions.
        whole: whether a batch must be computed at once, as batch norms follow it.
    """

    def __init__(self, module: nn.Module, head: nn.Module) -> None:
        self.module = module
        self._convolutions = [m for m in module.modules() if isinstance(m, _Convolution)]
        norms = [norm for each in self._convolutions for norm in each.sources[1]]
        # Apart, so that what is frozen has no gradient.
        self._norms = [_Norms([norm for norm in norms if _trains(norm) == trains]) for trains in (True, False)]
        self.fused, self.folded = bool(self._convolutions), bool(norms)
        self.whole = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())
        self._others = [p for p in (*module.parameters(), *head.parameters()) if p.requires_grad]
        self._dtype = torch.float32
        self._roots: list[torch.Tensor | _Scaled] = []
        self.leaves: list[torch.Tensor] = []

    def refresh(self, dtype: torch.dtype) -> None:
        """Compute the effective weights, once for each ``settle``; the module is to compute in ``dtype``."""
        self._dtype = dtype
        scales = {norm: scale for norms in self._norms for norm, scale in norms.scales(dtype)}
        pairs = [pair for convolution in self._convolutions for pair in convolution.refresh(dtype, scales)]
        self._roots = [*(root for root, _ in pairs), *self._others]
        self.leaves = [*(leaf for _, leaf in pairs), *self._others]

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, D), float32; in several threads at once."""
        with torch.autocast(x.device.type, self._dtype, enabled=self._dtype != torch.float32):
            embedding: torch.Tensor = self.module(x)
        return embedding.float()

    def is_finite(self) -> bool:
        """Whether all weights are numbers. For a CPU."""
        # In their own type: to ask for float32 would first copy them.
        norms = torch._foreach_norm([leaf.detach() for leaf in self.leaves])
        return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())

    def settle(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add gradients of ``leaves``, in float32, to ``grad`` of the parameters."""
        given = [(root, g) for root, g in zip(self._roots, gradients, strict=True) if g is not None]
        found = [each for root, g in given for each in _of_factors(root, g)]
        others, taken = [], set()
        for root, gradient in found:
            # Autograd, too, keeps without a copy what is laid out as its parameter, if it knows that nobody else holds it.
            own = gradient.untyped_storage().data_ptr()
            if root.is_leaf and root.grad is None and gradient.stride() == root.stride() and own not in taken:
                root.grad = gradient
                taken.add(own)
            else:  # of plain parameters as well: it gives them the parameter's layout, which fused optimizers need
                others.append((root, gradient))
        if others:
            torch.autograd.backward(_Given.apply([gradient for _, gradient in others], *(root for root, _ in others)))
        self._roots = []  # with them goes what autograd keeps of this stream, which the next step may not be on


class _Scaled(NamedTuple):
    """Where an effective weight comes from: (O, I, h, w) weights times (O,) scales."""

    weight: torch.Tensor
    scale: torch.Tensor

    @property
    def requires_grad(self) -> bool:
        return self.weight.requires_grad or self.scale.requires_grad

    @torch.no_grad()
    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Computed in float32, channels last."""
        weight, scale = self.weight, self.scale.reshape(-1, 1, 1, 1)
        if weight.device.type == "cpu":
            return (weight * scale).to(dtype).contiguous(memory_format=_LAST)
        # In one call, which a CPU takes four times as long for.
        return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype, memory_format=_LAST))


@torch.no_grad()
def _of_factors(root: "torch.Tensor | _Scaled", gradient: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients, float32, of what an effective weight was computed from, for that of the weight; autograd makes twice the calls."""
    if isinstance(root, torch.Tensor):
        yield root, gradient.to(root.dtype)
        return
    weight, scale = root
    if scale.requires_grad:
        yield scale, (gradient * weight).sum((1, 2, 3))
    if weight.requires_grad:  # laid out as the weights
        yield weight, torch.mul(gradient, scale.reshape(-1, 1, 1, 1), out=torch.empty_like(weight))


class _Given(torch.autograd.Function):
    """A number whose gradients are those given. To give them to ``backward`` itself would import an algebra system: two seconds."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *roots: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return roots[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.gradients


class _Scale(NamedTuple):
    """What a norm multiplies a channel by, and what it adds then; the latter rounded, too. All (C,)."""

    factor: torch.Tensor
    shift: torch.Tensor
    rounded: torch.Tensor | None


class _Norms:
    """Batch norms that keep their statistics, all at once: on a GPU a few calls, where each would take as many."""

    def __init__(self, norms: Sequence[nn.BatchNorm2d]) -> None:
        self._norms, self._sizes = norms, [norm.num_features for norm in norms]
        device = _statistics(norms[0])[0].device if norms else None
        self._eps = torch.tensor([norm.eps for norm in norms for _ in range(norm.num_features)], device=device)
        self._ones, self._zeros = torch.ones_like(self._eps), torch.zeros_like(self._eps)

    def scales(self, dtype: torch.dtype) -> Iterator[tuple[nn.BatchNorm2d, _Scale]]:
        """What each of them comes to; rounded to ``dtype``."""
        if not self._norms:
            return
        mean, variance = (torch.cat(values) for values in zip(*map(_statistics, self._norms), strict=True))
        scale = torch.rsqrt(variance + self._eps) * self._joined("weight", self._ones)
        shift = self._joined("bias", self._zeros) - mean * scale
        rounded: Sequence[torch.Tensor | None] = self._cut(shift.detach().to(dtype))
        if any(size % _ALIGNED for size in self._sizes):  # a kernel may ask for the start of memory
            rounded = [None] * len(self._norms)
        yield from zip(self._norms, map(_Scale, self._cut(scale), self._cut(shift), rounded), strict=True)

    def _joined(self, name: str, otherwise: torch.Tensor) -> torch.Tensor:
        own = [getattr(norm, name) for norm in self._norms]
        return torch.cat([b if a is None else a for a, b in zip(own, self._cut(otherwise), strict=True)])

    def _cut(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(values, self._sizes)


def _statistics(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None  # foldable: it has them
    return norm.running_mean, norm.running_var


def _trains(norm: nn.BatchNorm2d) -> bool:
    return any(parameter.requires_grad for parameter in norm.parameters())


class _Convolution(nn.Module):
    """A convolution with the batch norms, the residual and the activation that follow it."""

    def __init__(
        self, conv: nn.Conv2d, norms: Sequence[nn.BatchNorm2d], activation: Activation, *, by_tiles: bool = False
    ) -> None:
        """``by_tiles``: in float32 by fewer multiplications, where ``winograd.pays``."""
        super().__init__()
        self.sources = conv, tuple(norms)  # a tuple: their parameters are the backbone's
        padding: Any = conv.padding  # no name: is_plain_convolution
        geometry: Geometry = list(padding), list(conv.stride), list(conv.dilation), conv.groups
        self._settings = geometry, activation
        self._by_tiles = by_tiles
        self._of_weight: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._rounded: torch.Tensor | None = None

    def refresh(
        self, dtype: torch.dtype, scales: Mapping[nn.BatchNorm2d, _Scale]
    ) -> Iterator[tuple["torch.Tensor | _Scaled", torch.Tensor]]:
        """Pairs of what training moves: (weight or bias of one convolution for all, leaf with the same values)."""
        conv, norms = self.sources
        bias, factor = conv.bias, None
        self._rounded = None
        for norm in norms:
            scale = scales[norm]
            self._rounded = scale.rounded if bias is None else None
            bias = scale.shift if bias is None else bias * scale.factor + scale.shift
            factor = scale.factor if factor is None else factor * scale.factor
        weight: torch.Tensor | _Scaled = conv.weight
        if factor is None:
            values = conv.weight.detach().to(dtype).contiguous(memory_format=_LAST)
        else:
            weight = _Scaled(conv.weight, factor)
            values = weight.product(dtype)
        self._of_weight = winograd.of_weights(values) if self._by_tiles and dtype == torch.float32 else None
        self._weight = values.requires_grad_(weight.requires_grad)
        # Biases stay float32: rounded, they would shift whole maps, which no average over pixels takes away again.
        self._bias = None if bias is None else bias.detach().requires_grad_(bias.requires_grad)
        for root, leaf in ((weight, self._weight), (bias, self._bias)):
            if root is not None and leaf is not None and root.requires_grad:
                yield root, leaf

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self._weight is None:
            raise RuntimeError("the form was not refreshed")
        dtype = self._weight.dtype
        x = x.to(dtype).contiguous(memory_format=_LAST)
        if residual is not None:
            residual = residual.to(dtype).contiguous(memory_format=_LAST)
        return convolve(
            x, self._weight, self._bias, residual, *self._settings, rounded=self._rounded, of_weight=self._of_weight
        )


@sources_forgotten()
def make_form(backbone: nn.Module, head: nn.Module, sample: torch.Tensor, dtype: torch.dtype) -> Form:
    """The fastest form that agrees with ``backbone``, in its present mode, on a ``sample`` (2, 3, H, W) of any numbers.

    The plain one where there is no other, or fusing is turned off.
    """
    plain = Form(backbone, head)
    if not may_fuse():
        return plain
    try:
        form = Form(_fused(backbone, sample, dtype), head)
        agrees = form.fused and _agree(form, plain, sample, dtype)
    except Exception:  # tracing fails in as many ways as there are models, and other CPUs lack these operators
        agrees = False
    return form if agrees else plain


def _fused(backbone: nn.Module, sample: torch.Tensor, dtype: torch.dtype) -> fx.GraphModule:
    """``backbone`` traced, with its own parameters and statistics, its convolutions and, for ``dtype``, its attention replaced."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    size = sample.shape[2], sample.shape[3]
    traced = trace(with_plain_attention(copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors})), size)
    with evaluating(traced), torch.no_grad():
        note_shapes(traced, sample)
    modules = dict(traced.named_modules())
    leave_out_unread_tokens(traced, modules)
    if sample.device.type == "cpu" and dtype == torch.bfloat16 and not has_matrix_units():
        for node in traced.graph.nodes:
            if node.target is ATTENTION and is_plain_attention(node):
                node.target, scale = attend, node.kwargs.get("scale")
                node.kwargs = {"scale": scale}
    norms: dict[fx.Node, list[Any]] = {}
    for node, conv in foldable(traced, modules):
        norms.setdefault(conv, []).append(modules[str(node.target)])
        node.replace_all_uses_with(conv)
        traced.graph.erase_node(node)
    read = weights_read(traced)
    position = {node: number for number, node in enumerate(traced.graph.nodes)}
    slowly_multiplied = sample.device.type == "cpu" and dtype == torch.float32
    for node in list(position):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and is_plain_convolution(module) and node.target not in read:
            chain, residual, activation = chain_from(node, modules, position, among=FROM_RESULT)
            tiled = slowly_multiplied and winograd.pays(module, IMAGES, node.meta["shape"][2:])
            convolution = _Convolution(module, norms.get(node, ()), activation, by_tiles=tiled)
            replace_chain(traced, chain, convolution, residual, position)
        elif norms.get(node):
            raise TypeError("a batch norm was folded into a convolution of another kind")
    with_cheap_activations(traced)
    return finished(traced)


def _agree(form: Form, plain: Form, sample: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether embeddings and gradients are the plain network's, as in prediction and in float32; and it runs in ``dtype``."""
    with evaluating(form.module), evaluating(plain.module):
        # Rounding may move a value over the edge of a ReLU6, and a small network's gradient by more than 1 %: hardly twice.
        near = any(_is_near(form, plain, images) for images in (sample, sample.flip(3)))
        if not near or dtype == torch.float32:
            return near
        return all(bool(values.isfinite().all()) for values in _embed_and_back(form, plain.module, sample, dtype))


@true_float32
def _is_near(form: Form, plain: Form, images: torch.Tensor) -> bool:
    found, expected = (_embed_and_back(each, plain.module, images, torch.float32) for each in (form, plain))
    return all(float((a - b).norm()) <= _CLOSE * float(b.norm()) for a, b in zip(found, expected, strict=True))


def _embed_and_back(
    form: Form, backbone: nn.Module, sample: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and the gradient of their weighted mean in one row."""
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    form.refresh(dtype)
    with torch.enable_grad():
        embedding = form.embed(sample)
        if not parameters:
            return embedding, torch.zeros(1)
        # Of squares it would vanish below a last layer norm, and show no mistake there.
        weights = torch.linspace(-1, 1, embedding.shape[1], device=embedding.device)
        form.settle(torch.autograd.grad((embedding * weights).mean(), form.leaves, allow_unused=True))
    row = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return embedding.detach(), row
