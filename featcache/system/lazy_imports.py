"""Import torchvision, and use optimizers, without PyTorch's compiler, which takes two to four of the seconds in which a command starts.

In: an ``import torchvision`` inside of ``compiler_on_demand``; an optimizer's class. Out: the same things, and a compiler that is imported
when it is used.

Expiry: entries of ``sys.modules`` are replaced for a moment, and PyTorch's decorators for what it is not to compile are put off, which
is a risk with every new PyTorch. Delete this file when ``torch._dynamo`` is in ``sys.modules`` no more after a plain ``import
torchvision.transforms.v2`` (0.29 still imports it: ``ops/roi_align.py``, ``tv_tensors``) and a new ``torch.optim.SGD``.
"""

import contextlib
import functools
import importlib
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def compiler_on_demand() -> Iterator[None]:
    """Put off, by stand-ins for two modules, that an ``import torchvision`` in this context imports all of the compiler.

    It does so for one question, which an operator for object detection asks each time it runs: is a device supported?
    """
    names = ("torch._dynamo", "torch._dynamo.utils")
    if sys.modules.keys() & {"torchvision", *names}:
        yield
        return
    import torch

    stand_ins = {name: _StandIn(name) for name in names}
    vars(stand_ins[names[1]])["is_compile_supported"] = lambda device: _real(names[1]).is_compile_supported(device)
    sys.modules.update(stand_ins)
    disable, torch.compiler.disable = torch.compiler.disable, _disabled_on_demand  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compiler.disable = disable
        _remove_stand_ins()


Optimizer = TypeVar("Optimizer", bound="torch.optim.Optimizer")


def optimizer_without_compiler(kind: "type[Optimizer]", *given: Any, **named: Any) -> Optimizer:
    """An optimizer that is made, saved, restored and takes its steps without importing the compiler, which has no part in that."""
    import torch

    decorated = vars(torch)["_disable_dynamo"](lambda: None).__code__
    for function in vars(torch.optim.Optimizer).values():
        inner = getattr(function, "__wrapped__", None)
        if inner and getattr(function, "__code__", None) is decorated and not hasattr(inner, _CACHED):
            setattr(inner, _CACHED, _disabled_on_demand(inner))  # what it would keep of its first call
    optimizer = kind(*given, **named)
    step, itself = inspect.unwrap(kind.step), weakref.ref(optimizer)  # held by its own step, it would stay in memory

    @torch.no_grad()
    def take(*given: Any, **named: Any) -> Any:
        return step(itself(), *given, **named)

    optimizer.step = take  # type: ignore[method-assign]
    return optimizer


def _disabled_on_demand(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, kept from the compiler as soon as there is one."""

    @functools.cache
    def disabled() -> Callable[..., Any]:
        import torch._dynamo

        return torch._dynamo.disable(function)  # type: ignore[no-any-return, no-untyped-call]

    @functools.wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        return (disabled() if "torch._dynamo" in sys.modules else function)(*given, **named)

    return run


_CACHED = "__dynamo_disable"  # PyTorch's own, of ``torch._disable_dynamo``


class _StandIn(types.ModuleType):
    """A module in place of another one, which is imported as soon as anything is wanted that this one lacks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> Any:
    _remove_stand_ins()
    return importlib.import_module(name)


def _remove_stand_ins() -> None:
    for name in [name for name, module in list(sys.modules.items()) if isinstance(module, _StandIn)]:
        del sys.modules[name]
