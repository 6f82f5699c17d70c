"""What a transformer does with its tokens, made fast on a CPU: linear layers with what follows them, attention, no token in vain.

In: a traced network, as ``folding.fold_batchnorm`` returns it. Out: one that computes the same up to rounding; whoever uses
it checks that it does. By what a graph says, not by names of models: what is not recognised stays as it is.
"""

import functools
import math
import operator
from typing import Any

import torch
from torch import fx, nn

from featcache.backbones.folding import (
    NOT_AT_ALL,
    Activation,
    activation_of,
    note_shapes,
    only_user,
    replace_chain,
    residual_of,
)
from featcache.backbones.tracing import finished

_DROPOUT = (nn.Dropout, nn.Dropout2d)
_READS = {operator.getitem, getattr}  # with nobody to use the result, of no effect
_PER_TOKEN = (nn.Linear, nn.GELU, nn.SiLU, nn.ReLU, nn.Sigmoid)
_PRODUCTS = {operator.mul, torch.mul}
_PER_TOKEN_CALLS = {nn.functional.gelu, nn.functional.silu, operator.add, torch.add, *_PRODUCTS}
ATTENTION = nn.functional.scaled_dot_product_attention
_THIRDS = "permute", (2, 0, 3, 1, 4)  # of (N, L, 3, heads, D)
_CACHE = 2**20  # bytes of scores at a time, which then stay in one core's cache


def fuse_tokens(module: nn.Module, sample: torch.Tensor, *, batch_size: int | None = None) -> nn.Module:
    """A network whose linear layers also scale, add the residual and apply the activation that follow them, by oneDNN.

    Where one token is read in the end, the last block computes what only concerns others no more.

    Args:
        module: on a CPU, in the precision it is to run in; changed. sample, batch_size: as in ``fuse_convolutions``.

    Raises:
        RuntimeError, AttributeError, ...: this build of PyTorch, or this CPU, cannot; do without.
    """
    if not isinstance(module, fx.GraphModule) or not any(type(part) is nn.Linear for part in module.modules()):
        return module
    note_shapes(module, sample)
    modules = dict(module.named_modules())
    leave_out_unread_tokens(module, modules)
    _ask_once(module, modules)
    modules = dict(module.named_modules())
    position = {node: number for number, node in enumerate(module.graph.nodes)}
    for node in list(position):
        if node.op == "call_module" and type(modules[str(node.target)]) is nn.Linear and has_fused_linear(sample.dtype):
            _fuse_from(module, node, modules, position, (batch_size or len(sample)) / len(sample))
        elif node.target is ATTENTION and sample.dtype == torch.bfloat16 and not has_matrix_units():
            _attend_in_parts(node)
    return finished(module)


@functools.cache
def has_fused_linear(dtype: torch.dtype) -> bool:
    """Whether PyTorch's fused linear operators are here, and this CPU has them for ``dtype``."""
    try:
        with torch.inference_mode():
            layer, x = nn.Linear(16, 16).to(dtype), torch.zeros(2, 3, 16, dtype=dtype)
            FusedLinear(layer, None, 6, ("gelu", [], "none"))(x)
            FusedLinear(layer, None, 6, NOT_AT_ALL)(x, x)
    except Exception:  # as many errors as there are builds
        return False
    return True


def has_matrix_units() -> bool:
    """Whether PyTorch's own attention is fast in bfloat16: it has kernels for AMX; with AVX-512 it is as slow as in float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


class FusedLinear(nn.Module):
    """Linear layer, a factor for each of its outputs, then a residual added or an activation applied.

    Args:
        scale: (out,), or None. rows: how many vectors most inputs will have; weights are laid out for it.
    """

    def __init__(self, linear: nn.Linear, scale: torch.Tensor | None, rows: int, activation: Activation) -> None:
        super().__init__()
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        if scale is not None:
            weight, bias = weight * scale[:, None], None if bias is None else bias * scale
        # As in folding.py: operators of TorchInductor's, and packed weights, which are no parameters.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self._bias, self.activation = bias, activation

    def __deepcopy__(self, _: object) -> "FusedLinear":
        return self  # nothing changes it, and packed weights cannot be copied

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(..., in) and, where one is added, (..., out) -> (..., out)."""
        run: Any = torch.ops.mkldnn._linear_pointwise
        if residual is None:
            return run(x, self._weight, self._bias, *self.activation)  # type: ignore[no-any-return]
        return run.binary(x, residual, self._weight, self._bias, "add")  # type: ignore[no-any-return]


class OneQuery(nn.Module):
    """Attention of one token's queries to all tokens, whose keys and values are never computed: q (W x) = (q W) x.

    Args:
        qkv: C -> 3 C, queries, keys and values of every head in turn. token: which one asks.
    """

    def __init__(self, qkv: nn.Linear, heads: int, token: int, scale: float | None) -> None:
        super().__init__()
        weight = qkv.weight.detach().reshape(3, heads, -1, qkv.in_features)
        bias = weight.new_zeros(3, heads, weight.shape[2])
        if qkv.bias is not None:
            bias = qkv.bias.detach().reshape(bias.shape)
        # The keys' bias adds the same to all scores, of which softmax takes no notice.
        self._query, self._query_bias, self._key = weight[0].flatten(0, 1), bias[0].flatten(), weight[1]
        self._value, self._value_bias = weight[2].mT.contiguous(), bias[2][:, None]
        self._token, self._scale = token, 1 / math.sqrt(weight.shape[2]) if scale is None else scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, C) -> (N, heads, 1, D)."""
        query = nn.functional.linear(x[:, self._token], self._query, self._query_bias)
        query = query.reshape(len(x), *self._key.shape[:2]).transpose(0, 1)
        asked = torch.bmm(query * self._scale, self._key).transpose(0, 1)  # (N, heads, C)
        mixed = torch.bmm(torch.softmax(torch.bmm(asked, x.mT), dim=-1), x)
        return torch.baddbmm(self._value_bias, mixed.transpose(0, 1), self._value).transpose(0, 1)[:, :, None]


def attention_in_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None, cache: int = _CACHE
) -> torch.Tensor:
    """``scaled_dot_product_attention`` of (N, heads, L, D) tensors: products of matrices, with ``cache`` bytes of scores at a time."""
    n, heads, length, depth = query.shape
    scale = 1 / math.sqrt(depth) if scale is None else scale
    some = min(heads, max(1, cache // (length * key.shape[2] * query.element_size())))
    # In memory (N, L, heads, D), as the next linear layer reads it.
    result = query.new_empty(n, length, heads, value.shape[3]).transpose(1, 2)
    scores = query.new_empty(some, length, key.shape[2])
    for q, k, v, found in zip(query, key, value, result, strict=True):
        for first in range(0, heads, some):
            part, mine = slice(first, first + some), scores[: heads - first]
            torch.baddbmm(mine, q[part].contiguous(), k[part].contiguous().mT, beta=0, alpha=scale, out=mine)
            found[part] = torch.bmm(torch.softmax(mine, dim=-1, out=mine), v[part].contiguous())
    return result


def _attend_in_parts(node: fx.Node) -> None:
    if is_plain_attention(node):
        node.target, options = attention_in_parts, node.kwargs
        node.kwargs = {name: value for name, value in options.items() if name == "scale"}


def is_plain_attention(node: fx.Node) -> bool:
    """Whether it is of (N, heads, L, D) and masks nothing: what is given may be a default of the network's own, which nobody sets."""
    options = [value for name, value in node.kwargs.items() if name != "scale"]
    given = [x.args[0] if isinstance(x, fx.Node) and x.op == "placeholder" and x.args else x for x in options]
    four = [isinstance(x, fx.Node) and len(x.meta.get("shape", ())) == 4 for x in node.args]
    return four == [True] * 3 and not any(isinstance(value, fx.Node) or value for value in given)


def leave_out_unread_tokens(traced: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Where a few tokens are all that is read in the end, let the last block compute no others; shapes were noted, see ``note_shapes``."""
    _leave_out_nothing(traced, modules)
    _read_few_tokens(traced, modules)


def _leave_out_nothing(traced: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Take out what does nothing in its mode, and what was read for nobody."""
    for node in reversed(list(traced.graph.nodes)):
        module = modules[str(node.target)] if node.op == "call_module" else None
        if (node.args and _is_idle(module)) or (
            getattr(node.target, "__name__", "") == "stochastic_depth" and node.kwargs.get("training") is False
        ):
            node.replace_all_uses_with(node.args[0])
        elif node.op != "get_attr" and node.target not in _READS:
            continue
        if not node.users:
            traced.graph.erase_node(node)


def _is_idle(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, _DROPOUT) and not (module.training and module.p))


def _read_few_tokens(traced: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Where a few tokens are all that is read in the end, compute no others behind the last attention's keys and values."""
    nodes = list(traced.graph.nodes)
    for place, read in enumerate(nodes):
        tokens = _tokens(read)
        if tokens is None:
            continue
        few = {read: None}  # a set that keeps its order: what is to be computed for these tokens alone
        for node in reversed(nodes[:place]):
            if node.users and few.keys() >= node.users.keys() and _may_be_cut(node, modules):
                few[node] = None
        _cut(traced, list(few), tokens)


def _tokens(read: fx.Node) -> slice | None:
    """Which tokens of (N, L, C) it reads, if a few of them by constant indices, and nothing but them."""
    if read.target is not operator.getitem or not isinstance(read.args[0], fx.Node):
        return None
    shape, index = read.args[0].meta.get("shape", ()), read.args[1]
    if len(shape) != 3 or not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None):
        return None
    found = slice(index[1], index[1] + 1) if isinstance(index[1], int) else index[1]
    if not isinstance(found, slice) or found.step is not None or not isinstance(found.stop, int):
        return None
    found = slice(found.start or 0, found.stop)
    return found if 0 <= found.start < found.stop <= shape[1] // 2 else None


def _may_be_cut(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether each token of its result depends on the same token of its inputs alone; of attention's, on that of the queries."""
    if node.target is ATTENTION:
        return is_plain_attention(node)
    if _splits_heads(node) or _joins_heads(node):
        return True
    shapes = [x.meta.get("shape", ()) for x in (node, *node.all_input_nodes)]
    if len(shapes[0]) != 3:
        return False
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        over_last = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
        return over_last or (type(module) in _PER_TOKEN and not getattr(module, "inplace", False))
    known = node.target in _PER_TOKEN_CALLS and not node.kwargs.get("inplace")
    if node.target is nn.functional.layer_norm:
        known = len(node.args) == 2 and len(node.args[1]) == 1  # type: ignore[arg-type]
    # (C,) or tokens: of (L, C) every token would have to take its own row.
    return known and all(len(shape) in (1, 3) for shape in shapes)


def _splits_heads(node: Any) -> bool:
    """(N, heads, L, D) of attention to (N, L, heads, D)."""
    source = node.args[0] if node.target == "transpose" and node.args[1:] == (1, 2) else None
    return source is not None and source.target is ATTENTION and is_plain_attention(source)


def _joins_heads(node: fx.Node) -> bool:
    """(N, L, heads, D) of attention to (N, L, C)."""
    if node.target != "reshape" or len(node.args) != 4 or not _splits_heads(node.args[0]):
        return False
    return bool(node.meta["shape"][:2] == node.args[0].meta["shape"][:2])  # type: ignore[union-attr]


def _cut(traced: fx.GraphModule, few: list[fx.Node], tokens: slice) -> None:
    """Let ``few``, last one first, compute ``tokens`` only, of inputs that are not among them."""
    width, cuts = tokens.stop - tokens.start, dict[fx.Node, fx.Node]()

    def cut(node: fx.Node, *before: slice) -> fx.Node:
        if node not in cuts:
            with traced.graph.inserting_after(node):
                cuts[node] = traced.graph.call_function(operator.getitem, (node, (*before, tokens)))
            n, *rest = node.meta["shape"]
            cuts[node].meta["shape"] = (n, width, *rest[1:]) if len(before) == 1 else (n, rest[0], width, rest[2])
        return cuts[node]

    read = few[0]
    for node in reversed(few[1:]):
        if node.target is ATTENTION:
            node.args = (cut(node.args[0], slice(None), slice(None)), *node.args[1:])  # type: ignore[arg-type]
        elif _joins_heads(node):
            node.args = (*node.args[:2], width, node.args[3])
        elif not _splits_heads(node):
            length = node.meta["shape"][1]
            for x in node.all_input_nodes:
                if x not in few and x.meta["shape"][1:2] == (length,) and len(x.meta["shape"]) == 3:
                    node.replace_input_with(x, cut(x, slice(None)))
        if len(node.meta["shape"]) == 3:
            node.meta["shape"] = (node.meta["shape"][0], width, node.meta["shape"][2])
    if len(few) > 1:
        read.args = (read.args[0], (slice(None), 0 if isinstance(read.args[1][1], int) else slice(0, width)))  # type: ignore[index]


def _ask_once(traced: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Where one token alone is left to ask, compute no keys and values."""
    position = {node: number for number, node in enumerate(traced.graph.nodes)}
    for node in list(position):
        chain = _from_linear(node, modules) if node.target is ATTENTION and is_plain_attention(node) else None
        if chain is not None:
            layer: Any = modules[str(chain[0].target)]
            heads, token, scale = chain[1].meta["shape"][3], chain[-2].args[1][-1].start, node.kwargs.get("scale")
            replace_chain(traced, chain, OneQuery(layer, heads, token, scale), None, position)


def _from_linear(attention: fx.Node, modules: dict[str, nn.Module]) -> list[Any] | None:
    """All from a linear layer to one token's attention, if queries, keys and values are the thirds of what the layer gives."""
    cut: Any = attention.args[0]
    index: Any = cut.args[1] if cut.target is operator.getitem else None
    if cut.meta.get("shape", ())[2:3] != (1,) or not isinstance(index, tuple) or index[:-1] != (slice(None),) * 2:
        return None
    if not isinstance(index[-1], slice) or not isinstance(index[-1].start, int):
        return None
    thirds: list[Any] = [cut.args[0], *attention.args[1:]]
    split: Any = thirds[0].args[0] if thirds[0].args else None
    if [(third.target, third.args) for third in thirds] != [(operator.getitem, (split, i)) for i in range(3)]:
        return None
    order: Any = split.args[0] if split.target == "unbind" and split.args[1:] == (0,) else None
    if order is None or (order.target, order.args[1:]) != _THIRDS:
        return None
    parts = order.args[0]
    linear, shape = parts.args[0], parts.meta["shape"]
    chain = [linear, parts, order, split, *thirds, cut, attention]
    if linear.op != "call_module" or type(modules[str(linear.target)]) is not nn.Linear:
        return None
    whole = parts.target == "reshape" and shape[:3] == (*linear.meta["shape"][:2], 3)
    alone = all(user in chain for node in chain[:-1] for user in node.users)
    return chain if whole and alone else None


def _fuse_from(
    traced: fx.GraphModule, linear: fx.Node, modules: dict[str, nn.Module], position: dict[fx.Node, int], batches: float
) -> None:
    """Replace a linear layer and what follows it by one call; most inputs have ``batches`` times the rows of the sample."""
    layer: Any = modules[str(linear.target)]
    chain, activation, residual = [linear], NOT_AT_ALL, None
    scale = _scale(traced, linear, layer.out_features)
    if scale is not None:
        chain += [*linear.users]  # the product
    after = only_user(chain[-1])
    if after is not None:
        residual, found = residual_of(after, chain[-1], position), activation_of(after, modules)
        activation = found or NOT_AT_ALL
        chain += [after] if residual is not None or found else []
    rows = round(batches * math.prod(linear.args[0].meta["shape"][:-1]))  # type: ignore[union-attr]
    replace_chain(traced, chain, FusedLinear(layer, scale, rows, activation), residual, position)


def _scale(traced: fx.GraphModule, linear: fx.Node, width: int) -> torch.Tensor | None:
    """The vector (width,) that alone multiplies what ``linear`` gives, if one does: LayerScale."""
    after = only_user(linear)
    if after is None or after.target not in _PRODUCTS or len(after.args) != 2 or after.kwargs:
        return None
    other = after.args[after.args[0] is linear]
    if not isinstance(other, fx.Node) or other.op != "get_attr":
        return None
    value: Any = functools.reduce(getattr, str(other.target).split("."), traced)
    fits = isinstance(value, torch.Tensor) and value.shape[-1:] == (width,) == (value.numel(),)
    return value.detach().reshape(-1) if fits else None
