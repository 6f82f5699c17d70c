"""Batch norms folded into the convolutions before them.

In: a frozen network in eval mode. Out: a copy that computes the same up to rounding, by symbolic tracing (``torch.fx``);
whoever uses it checks that it does.
"""

import contextlib
import copy
import linecache
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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


def fold_batchnorm(module: nn.Module) -> nn.Module:
    """A copy with each batch norm folded into the convolution before it; an unfolded one if it cannot be traced.

    The formula is ``torch.nn.utils.fusion.fuse_conv_bn_eval``'s.
    """
    try:
        traced = _trace(_with_plain_batchnorms(copy.deepcopy(module).eval()))
    except Exception:  # data-dependent control flow: tracing fails in as many ways as there are models
        return copy.deepcopy(module).eval()
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        conv = node.args[0] if node.args else None
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or conv.target in read:
            continue  # read: something else computes with its weights
        once = len(conv.users) == calls[conv.target] == calls[node.target] == 1
        if once and isinstance(modules[str(conv.target)], nn.Conv2d) and modules[node.target].running_var is not None:
            folded = fuse_conv_bn_eval(modules[str(conv.target)], modules[node.target])
            modules[str(conv.target)] = folded  # the next batch norm may fold into it, too
            _put(traced, str(conv.target), folded)
            node.replace_all_uses_with(conv)
            traced.graph.erase_node(node)
    return finished(traced)


class _Tracer(fx.Tracer):
    """Convolutions of other libraries that extend PyTorch's stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    return fx.GraphModule(tracer.root if hasattr(tracer, "root") else module, tracer.trace(module))


def _with_plain_batchnorms(module: nn.Module) -> nn.Module:
    """timm's batch norms hold their activation: make them two modules, the first of which can be folded."""
    for name, child in list(module.named_modules()):
        if (
            type(child).__name__ == "BatchNormAct2d"
            and isinstance(child, nn.BatchNorm2d)
            and child.running_var is not None
        ):
            norm = nn.BatchNorm2d(child.num_features, child.eps)
            norm.load_state_dict(child.state_dict(), strict=False)
            rest = [getattr(child, part) for part in ("drop", "act")]
            _put(
                module, name, nn.Sequential(norm, *(part for part in rest if not isinstance(part, nn.Identity))).eval()
            )
    return module


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)


def finished(traced: fx.GraphModule) -> fx.GraphModule:
    """``traced`` after its graph was changed, checked and compiled to Python."""
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced
