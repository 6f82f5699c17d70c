"""PyTorch's compiler is imported when it is used, not on every start: two of seven seconds.

It replaces entries of ``sys.modules`` for a moment. To be deleted when torchvision no longer asks the compiler while it is imported.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def compiler_on_demand() -> Iterator[None]:
    """Import torchvision inside, and PyTorch's compiler is imported when it is used, not on every start.

    One of torchvision's operators for object detection asks the compiler, when it runs, whether it supports a device, and
    for that imports all of it: more than two of the seven seconds in which a command of ours would start.
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
    """A module that is replaced by the real one as soon as anything else is wanted from it."""

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
