"""Import torchvision without PyTorch's compiler, which takes two of the seven seconds in which a command starts.

In: an ``import torchvision`` inside of ``compiler_on_demand``. Out: torchvision, and a compiler that is imported when it is used.

Expiry: entries of ``sys.modules`` are replaced for a moment, which is a risk with every new PyTorch. Delete this file when
``torch._dynamo`` is in ``sys.modules`` no more after a plain ``import torchvision`` (0.29 still imports it: ``ops/roi_align.py``).
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def compiler_on_demand() -> Iterator[None]:
    """Put off, by stand-ins for two modules, that an ``import torchvision`` in this context imports all of the compiler.

    It does so for one question, which an operator for object detection asks each time it runs: is a device supported?
    """
    names = ("torch._dynamo", "torch._dynamo.utils")
    if sys.modules.keys() & {"torchvision", *names}:
        yield
        return
    stand_ins = {name: _StandIn(name) for name in names}
    vars(stand_ins[names[1]])["is_compile_supported"] = lambda device: _real(names[1]).is_compile_supported(device)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        _remove_stand_ins()


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
