"""A network as a graph of calls (``torch.fx``), which others change; and parts that cannot be traced as parts that can.

In: a network. Out: a ``fx.GraphModule`` that computes the same of its first input. Tracing runs a network's own code once with
symbols for tensors. Where this asks for sizes to decide by, they are those of images of one size, whatever their number.
"""

import contextlib
import copy
import dis
import linecache
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

_TRACING = threading.Lock()
_ASKED = "_autowrap_function_ids"  # of a tracer by every call of a module, also of another thread that comes late
_BATCHES = (2, 3)  # what differs between batches of so many images depends on their number


@contextlib.contextmanager
def sources_forgotten() -> Iterator[None]:
    """Drop the source texts of the modules that are traced inside.

    PyTorch keeps them as long as the process lives, to show them in tracebacks: 27 KB for every encoder, which adds up in
    a service that makes one for every request.
    """
    kept: dict[str, Any] = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
    before = set(kept)
    try:
        yield
    finally:
        for name in set(kept) - before:
            kept.pop(name, None)
            linecache.cache.pop(name, None)


def trace(module: nn.Module, size: tuple[int, int]) -> fx.GraphModule:
    """``module``, whose batch norms may change their place in it, as a graph, for images of ``size`` (H, W).

    Raises any error: it cannot be traced, as it decides by what is in the images.
    """
    plain = _with_plain_convolutions(_with_plain_batchnorms(module))
    try:
        return _traced(plain, _Tracer())
    except Exception:  # as many kinds as there are models, for what is decided by sizes, too
        with evaluating(plain):  # which has parts forget the symbols that they may have kept
            pass
        return _traced(plain, _SizeTracer(plain, size))


def _traced(module: nn.Module, tracer: "_Tracer") -> fx.GraphModule:
    # While PyTorch traces, it replaces methods of all modules, for all threads: two at once would each restore the other's.
    with _TRACING:
        try:
            return fx.GraphModule(module, tracer.trace(module))
        finally:  # a recursive function of its own holds it, and with it all weights
            for name in vars(tracer).keys() - {_ASKED}:
                delattr(tracer, name)


class _Tracer(fx.Tracer):
    """Convolutions of other libraries that extend PyTorch's stay whole, and other threads may compute meanwhile."""

    _thread: int | None = None  # none any more when a call of another thread comes late

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._asks() else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._asks() else attr_val

    def _asks(self) -> bool:
        """Whether it is the traced network that calls."""
        return self._thread == threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | _SamePadding) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)


class _Unpacked(fx.Proxy):
    """Unpacks into as many as there are names, as PyTorch's symbols do, which leave frames that hold the network in a cycle."""

    def __iter__(self) -> Iterator[Any]:
        asking = sys._getframe(1)
        names = next(step for step in dis.get_instructions(asking.f_code) if step.offset >= asking.f_lasti)
        if names.opname != "UNPACK_SEQUENCE":
            return self.tracer.iter(self)
        return iter([operator.getitem(self, k) for k in range(names.argval)])


class _Symbol(_Unpacked):
    """What stands for a tensor while a network is traced."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)


class _Attribute(_Unpacked, fx.proxy.Attribute):
    """What stands for an attribute of it."""


class _SizeTracer(_Tracer):
    """Also computes each step, of two batches, so that sizes are numbers where the network asks for them.

    Of sizes that differ between the batches it gives symbols, so that the graph takes any number of images.
    """

    def __init__(self, module: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        tensors = [*module.parameters(), *module.buffers()]
        # Of all tensors only the sizes: nothing is really computed, and no memory needed.
        self._sizes = copy.deepcopy(module, {id(t): _without_values(t) for t in tensors})
        self._batches = tuple(torch.empty(n, 3, *size, device="meta") for n in _BATCHES)
        self._computing = False
        self.values: dict[fx.Node, tuple[Any, ...]] = {}  # what each node gives, of each batch

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]  # other inputs have their defaults

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *names: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *names, **more)
        if kind == "placeholder":
            self.values[node] = self._batches
        elif kind != "output":
            self._computing = True
            try:
                with torch.no_grad():
                    self.values[node] = tuple(self._compute(node, batch) for batch in range(len(_BATCHES)))
            finally:
                self._computing = False
        return node

    def _compute(self, node: fx.Node, batch: int) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda other: self.values[other][batch])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda other: self.values[other][batch])
        target: Any = node.target
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_module":
            return self._sizes.get_submodule(target)(*args, **kwargs)
        return _without_values(operator.attrgetter(target)(self.root))

    def _asks(self) -> bool:
        return super()._asks() and not self._computing


def _without_values(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class _Sized(_Symbol):
    """A symbol that knows its sizes."""

    tracer: _SizeTracer

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.size()  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        return len(self.tracer.values[self.node][0].shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        found = [tuple(value.shape) for value in self.tracer.values[self.node]]
        if dim is None:
            return tuple(self.size(k) for k in range(len(found[0])))
        sizes = {shape[dim] for shape in found}
        return sizes.pop() if len(sizes) == 1 else self.tracer.create_proxy("call_method", "size", (self, dim), {})

    def __len__(self) -> int:
        return len(self.tracer.values[self.node][0])

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, k) for k in range(len(self))])


def _with_plain_batchnorms(module: nn.Module) -> nn.Module:
    """timm's batch norms hold their activation: make them two modules, the first of which can be folded."""
    for name, child in list(module.named_modules()):
        if (
            type(child).__name__ == "BatchNormAct2d"
            and isinstance(child, nn.BatchNorm2d)
            and child.running_var is not None
        ):
            norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
            for own in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(norm, own, getattr(child, own))  # its own, not copies: they may train
            norm.training = child.training
            rest = [part for part in map(child.get_submodule, ("drop", "act")) if not isinstance(part, nn.Identity)]
            replace_module(module, name, nn.Sequential(norm, *rest))
    return module


def _with_plain_convolutions(module: nn.Module) -> nn.Module:
    """timm's convolutions that pad as TensorFlow does: make them two modules, the second of which is PyTorch's."""
    for name, child in list(module.named_modules()):
        if type(child).__name__ == "Conv2dSame" and isinstance(child, nn.Conv2d) and not any(child.padding):
            plain = copy.copy(child)  # with its weights, which may train
            plain.__class__ = nn.Conv2d
            replace_module(module, name, nn.Sequential(_SamePadding(child), plain))
    return module


class _SamePadding(nn.Module):
    """As many zeros around an image that a convolution gives its size / stride, of an odd number the last one behind."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.geometry = tuple(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        sides: list[int] = []  # of the width first
        for size, (kernel, stride, dilation) in zip(x.shape[:1:-1], self.geometry[::-1], strict=True):
            missing = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            sides += [missing // 2, missing - missing // 2]
        return nn.functional.pad(x, sides) if any(sides) else x


def with_plain_attention(module: nn.Module) -> nn.Module:
    """torchvision's blocks call PyTorch's attention, which cannot be traced: the same in steps that can."""
    for name, child in list(module.named_modules()):
        plain = isinstance(child, nn.MultiheadAttention) and child.batch_first and child.in_proj_weight is not None
        drops = plain and child.training and child.dropout
        if plain and not drops and type(module.get_submodule(name.rpartition(".")[0])).__name__ == "EncoderBlock":
            replace_module(module, name, _SelfAttention(child).eval())
    return module


class _SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of one sequence with itself, without masks."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        self.heads = attention.num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.qkv.weight, self.qkv.bias = attention.in_proj_weight, attention.in_proj_bias
        self.proj.weight, self.proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        n, length, width = x.shape
        split = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(found.transpose(1, 2).reshape(n, length, width)), None


def replace_module(module: nn.Module, name: str, child: nn.Module) -> None:
    """Put ``child`` where ``module`` has its part ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)


def finished(traced: fx.GraphModule) -> fx.GraphModule:
    """``traced`` after its graph was changed, checked and compiled to Python."""
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    out_of_cycles(traced)
    return traced


def out_of_cycles(module: nn.Module) -> nn.Module:
    """``module``, traced or not, whose weights are given back as soon as it is: a GPU's memory may wait long for Python's collector."""
    if isinstance(module, fx.GraphModule):
        module.graph.owning_module = None  # it is asked in checks while a graph is changed
    return module


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Let ``module`` compute as in prediction; at both ends its parts forget what they computed of their weights."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        module.eval()
        for part, mode in modes.items():
            part.training = mode
