"""Batch norms folded into the convolutions before them, and what follows a convolution done in it.

In: a frozen network in eval mode. Out: a copy that computes the same up to rounding, by symbolic tracing (``torch.fx``);
whoever uses it checks that it does. Fusing is by private operators of PyTorch's: what ``torch.compile`` finds in many
seconds, in a fraction of one. Where fewer multiplications will do, they are done in ``winograd.py``.
"""

import copy
import functools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from featcache.backbones import winograd
from featcache.backbones.tracing import finished, replace_module, trace, with_plain_attention

# oneDNN's name and arguments for what it can apply to a convolution's result before that leaves the cache
Activation = tuple[str, list[float], str]
NOT_AT_ALL: Activation = ("none", [], "")
RELU: Activation = ("relu", [], "")
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda _: RELU,
    nn.ReLU6: lambda _: ("hardtanh", [0.0, 6.0], ""),
    nn.Hardtanh: lambda module: ("hardtanh", [float(module.min_val), float(module.max_val)], ""),
    nn.Hardswish: lambda _: ("hardswish", [], ""),
    nn.SiLU: lambda _: ("swish", [], ""),
    nn.Sigmoid: lambda _: ("sigmoid", [], ""),
    nn.GELU: lambda module: ("gelu", [], module.approximate),
}
# The same of a result that is there, in place.
_APPLIED: dict[str, Callable[..., torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "hardtanh": nn.functional.hardtanh_,
    "hardswish": functools.partial(nn.functional.hardswish, inplace=True),
    "swish": functools.partial(nn.functional.silu, inplace=True),
    "sigmoid": torch.sigmoid_,
    "gelu": nn.functional.gelu,
}
_RELUS = {torch.relu, nn.functional.relu}
_ADDITIONS = {operator.add, torch.add}


def fold_batchnorm(module: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A copy with each batch norm folded into the convolution before it; an unfolded one if it cannot be traced.

    ``size``: (H, W) of the images that it will be given. The formula is ``torch.nn.utils.fusion.fuse_conv_bn_eval``'s.
    """
    try:
        traced = trace(with_plain_attention(copy.deepcopy(module).eval()), size)
    except Exception:  # data-dependent control flow: tracing fails in as many ways as there are models
        return copy.deepcopy(module).eval()
    modules = dict(traced.named_modules())
    for node, conv in foldable(traced, modules):
        folded = fuse_conv_bn_eval(modules[str(conv.target)], modules[str(node.target)])
        modules[str(conv.target)] = folded  # the next batch norm may fold into it, too
        replace_module(traced, str(conv.target), folded)
        node.replace_all_uses_with(conv)
        traced.graph.erase_node(node)
    return finished(traced)


def foldable(traced: fx.GraphModule, modules: dict[str, nn.Module]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Batch norms that keep their statistics, each with the convolution that nothing else reads; to be erased one by one."""
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    read = weights_read(traced)
    for node in list(traced.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(norm) is not nn.BatchNorm2d or norm.training or norm.running_var is None:
            continue
        conv = node.args[0] if node.args else None
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or conv.target in read:
            continue  # read: something else computes with its weights
        once = len(conv.users) == calls[conv.target] == calls[node.target] == 1
        if once and isinstance(modules[str(conv.target)], nn.Conv2d):
            yield node, conv


def weights_read(traced: fx.GraphModule) -> set[str]:
    """Names of the modules whose weights something else computes with."""
    return {str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}


def fuse_convolutions(module: nn.Module, sample: torch.Tensor, *, batch_size: int | None = None) -> nn.Module:
    """A network whose convolutions also add the residual and apply the activation that follow them, by oneDNN.

    Args:
        module: as ``fold_batchnorm`` returns it, on a CPU, in the precision and memory format it is to run in; changed.
        sample: an input (N, 3, H, W) of the size that most others will have. batch_size: theirs, if it is not N. Weights
            are laid out for it; other inputs work as well.

    Raises:
        RuntimeError, AttributeError, ...: this build of PyTorch, or this CPU, cannot; do without.
    """
    return _fuse_each(module, sample, functools.partial(_fuse_from, batch_size=batch_size))


def fuse_relus(module: nn.Module, sample: torch.Tensor) -> nn.Module:
    """The same on an NVIDIA GPU by cuDNN, which takes ReLU alone, and an addition only with a ReLU behind it."""
    return _fuse_each(module, sample, _fuse_relu_from)


def _fuse_each(module: nn.Module, sample: torch.Tensor, fuse_from: Callable[..., None]) -> nn.Module:
    if not isinstance(module, fx.GraphModule):
        return module
    note_shapes(module, sample)
    modules = dict(module.named_modules())
    position = {node: number for number, node in enumerate(module.graph.nodes)}
    for node in list(position):
        if node.op == "call_module" and is_plain_convolution(modules[node.target]):
            fuse_from(module, node, modules, position)
    return finished(module)


def note_shapes(module: fx.GraphModule, sample: torch.Tensor) -> None:
    """Note the shape of every tensor in ``node.meta["shape"]``, for an input like ``sample``, unless that was done."""
    first = next(iter(module.graph.nodes))
    if first.meta.get("shape") != tuple(sample.shape):
        _Shapes(module).run(sample)


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor, as PyTorch's ShapeProp does; that imports an algebra system, which takes a second."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


class _FusedConvolution(nn.Module):
    """Convolution, optionally plus a residual, then an activation."""

    def __init__(self, conv: nn.Conv2d, shape: list[int], activation: Activation) -> None:
        super().__init__()
        self._geometry = [list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups]
        self._activation = activation
        # TorchInductor's own operators, used without its compiler; a packed weight is opaque, so no parameter.
        pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        weight = conv.weight.detach().contiguous(memory_format=torch.channels_last).to_mkldnn()
        self._weight = pack(weight, *self._geometry, shape)
        self._bias = None if conv.bias is None else conv.bias.detach()

    def __deepcopy__(self, _: object) -> "_FusedConvolution":
        return self  # nothing changes it, and packed weights cannot be copied

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weights = (self._weight, self._bias, *self._geometry)
        run: Any = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return run(x, *weights, *self._activation)  # type: ignore[no-any-return]
        name, *options = self._activation
        after = None if name == "none" else name
        return run.binary(x, residual, *weights, "add", 1.0, after, *options)  # type: ignore[no-any-return]


class _TiledConvolution(nn.Module):
    """The same of a 3 x 3 convolution, by fewer multiplications."""

    def __init__(self, conv: nn.Conv2d, activation: Activation) -> None:
        super().__init__()
        self._padding: Any = conv.padding
        self._activation = activation
        self._weights = winograd.of_weights(conv.weight.detach())
        self._bias = None if conv.bias is None else conv.bias.detach()

    def __deepcopy__(self, _: object) -> "_TiledConvolution":
        return self  # nothing changes it

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = winograd.convolve(x, self._weights, self._bias, self._padding)
        return apply_activation(y, residual, self._activation)


def apply_activation(y: torch.Tensor, residual: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """What oneDNN does in a convolution, with what that gave, in place."""
    if residual is not None:
        y.add_(residual)
    name, options, algorithm = activation
    return _APPLIED[name](y, *options, **({"approximate": algorithm} if algorithm else {}))


class _CudnnConvolution(nn.Module):
    """Convolution, optionally plus a residual, then ReLU."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._geometry: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self._geometry)
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *self._geometry)


def _fuse_relu_from(
    traced: fx.GraphModule, conv: fx.Node, modules: dict[str, nn.Module], position: dict[fx.Node, int]
) -> None:
    """Replace ``conv``, a residual added to it if there is one, and the ReLU behind, by one call; nothing without a ReLU."""
    chain, residual, after = _sum_from(conv, position)
    module: Any = modules[str(conv.target)]
    # Of groups, such as depthwise, cuDNN's fused kernels know little.
    if after is not None and module.groups == 1 and activation_of(after, modules) == RELU:
        replace_chain(traced, [*chain, after], _CudnnConvolution(module), residual, position)


def _sum_from(conv: fx.Node, position: dict[fx.Node, int]) -> tuple[list[fx.Node], fx.Node | None, fx.Node | None]:
    """``conv``, and the addition behind it if there is one; what that adds; what alone reads the result, if it comes next."""
    after = only_user(conv)
    residual = None if after is None else residual_of(after, conv, position)
    if after is None or residual is None:
        return [conv], None, after
    return [conv, after], residual, only_user(after)


def chain_from(
    conv: fx.Node, modules: dict[str, nn.Module], position: dict[fx.Node, int], *, among: Collection[str] = ()
) -> tuple[list[fx.Node], fx.Node | None, Activation]:
    """``conv`` and what follows that oneDNN can do along with it: the residual it adds, and an activation (``among`` some)."""
    # oneDNN adds nothing to grouped ones, and PyTorch then not in bfloat16.
    whole: Any = modules[str(conv.target)].groups == 1
    chain, residual, after = _sum_from(conv, position) if whole else ([conv], None, only_user(conv))
    found = None if after is None else activation_of(after, modules)
    # ReLU is the only activation that oneDNN's addition takes.
    allowed = found is not None and (residual is None or found[0] == "relu") and (not among or found[0] in among)
    if after is None or found is None or not allowed:
        return chain, residual, NOT_AT_ALL
    return [*chain, after], residual, found


def _fuse_from(
    traced: fx.GraphModule,
    conv: fx.Node,
    modules: dict[str, nn.Module],
    position: dict[fx.Node, int],
    batch_size: int | None,
) -> None:
    """Replace ``conv`` and what follows it by one call."""
    chain, residual, activation = chain_from(conv, modules, position)
    n, *rest = conv.args[0].meta["shape"]  # type: ignore[union-attr]
    module: Any = modules[str(conv.target)]
    fused: nn.Module
    images, size = batch_size or n, conv.meta["shape"][2:]
    alike = functools.partial(winograd.are_rows_alike, images, size, module.in_channels, module.out_channels)
    if winograd.pays(module, images, size) and alike():
        fused = _TiledConvolution(module, activation)
    else:
        fused = _FusedConvolution(module, [images, *rest], activation)
    replace_chain(traced, chain, fused, residual, position)


def replace_chain(
    traced: fx.GraphModule,
    chain: list[fx.Node],
    module: nn.Module,
    residual: fx.Node | None,
    position: dict[fx.Node, int],
) -> None:
    """Let one call of ``module`` stand for ``chain``: of what enters its first node, and the residual."""
    first, last, name = chain[0], chain[-1], f"{type(module).__name__.lstrip('_')}_{position[chain[0]]}"
    traced.add_submodule(name, module)
    with traced.graph.inserting_after(last):
        fused = traced.graph.call_module(name, (first.args[0],) if residual is None else (first.args[0], residual))
    fused.meta, position[fused] = dict(last.meta), position[last]
    last.replace_all_uses_with(fused)
    for node in reversed(chain):
        traced.graph.erase_node(node)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether oneDNN knows all about it."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def only_user(node: fx.Node) -> fx.Node | None:
    """What alone reads ``node``, if it comes right after it: whatever lay between could change an input in place."""
    after = node.next
    while after.op == "get_attr":
        after = after.next
    return after if list(node.users) == [after] else None


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """oneDNN's words for the activation that ``node`` is, if it is one."""
    if node.op == "call_function" and node.target in _RELUS:
        return RELU
    if node.op == "call_function" and node.target is nn.functional.gelu and len(node.args) == 1:
        return "gelu", [], str(node.kwargs.get("approximate", "none"))
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    describe = _ACTIVATIONS.get(type(module)) if module is not None else None
    return describe(module) if describe else None


def residual_of(node: fx.Node, conv: fx.Node, position: dict[fx.Node, int]) -> fx.Node | None:
    """What ``node`` adds to ``conv``'s result, if it does, and if that is known before ``conv`` runs."""
    if node.op != "call_function" or node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
        return None
    other = node.args[1] if node.args[0] is conv else node.args[0]
    if not isinstance(other, fx.Node) or other is conv or position[other] > position[conv]:
        return None
    return other if other.meta.get("shape") == conv.meta["shape"] else None
