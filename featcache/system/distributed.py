"""Several processes that train one network, as ``torchrun`` starts them; one process is the case of world 1.

In: torchrun's environment. Out: ``Processes``: who this one is, and the few things they do together. The only user of
``torch.distributed``, whose words these are.
"""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from featcache.errors import UsageError
from featcache.system.device import Runtime

T = TypeVar("T")
_TIMEOUT = timedelta(hours=12)  # the others wait while the first extracts


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among ``world``."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among the processes of this machine
    node: int = 0  # number of this machine

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.all_gather(None)  # by the CPU: PyTorch's barrier is NCCL's where a GPU is bound, which spins on it

    def all_gather(self, value: T) -> list[T]:
        """Every process's ``value``, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The first process's ``value``."""
        if self.world == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """``network`` whose backward pass also averages gradients over all processes. Its buffers are taken to be equal."""
        if self.world == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
            return network
        ids = [device.index] if device.type == "cuda" else None
        kind: Any = nn.parallel.DistributedDataParallel
        # Not before each forward pass: they are equal. PyTorch 2.14 gave this option another name.
        new = "forward_sync_buffers" in inspect.signature(kind.__init__).parameters
        equal = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return kind(network, device_ids=ids, **equal)  # type: ignore[no-any-return]

    def no_sync(self, wrapped: nn.Module, *, unless: bool) -> contextlib.AbstractContextManager[None]:
        """A context in which backward passes add up gradients here and average them over no other process yet."""
        if unless or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()


def _this_one() -> Processes:
    """Who this process is, as the environment says. Raises UsageError."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK")
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    if found.get("WORLD_SIZE", "1") == "1":
        return Processes()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        what = f"WORLD_SIZE is {found['WORLD_SIZE']} and {', '.join(missing)} not set"
    elif wrong := [f"{name} is {value!r}" for name, value in found.items() if not value.isdecimal()]:
        what = f"{' and '.join(wrong)}, expected a number"
    else:
        rank, world, local, node = (
            int(found.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
        )
        if rank < world:
            return Processes(rank, world, local, node)
        what = f"RANK is {rank} and WORLD_SIZE {world}"
    raise UsageError(f"{what}; start several processes with torchrun, or one with WORLD_SIZE unset")


@contextlib.contextmanager
def init(runtime: Runtime) -> Iterator[tuple[Processes, Runtime]]:
    """Join the processes that torchrun started (none: world 1); yields this one, and ``runtime`` with its own device.

    Raises UsageError if this machine has fewer GPUs than processes, or only half of torchrun's environment is there.
    """
    processes = _this_one()
    if processes.world == 1:
        yield processes, runtime
        return
    local = processes.local_rank
    if runtime.device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU: {torch.cuda.device_count()} found; start fewer processes"
            )
        runtime = dataclasses.replace(runtime, device=torch.device("cuda", local))
        torch.cuda.set_device(local)
    if runtime.device.type == "cuda":  # objects go by gloo: waiting for hours in NCCL would keep a GPU and a core busy
        distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT, device_id=runtime.device)
    else:
        distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield processes, runtime
    finally:
        distributed.destroy_process_group()
