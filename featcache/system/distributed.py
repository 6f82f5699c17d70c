"""Several processes that train one network, as ``torchrun`` starts them; one process is the case of world 1.

In: torchrun's environment. Out: ``Processes``: who this one is, and the few things they do together. The only user of
``torch.distributed``, whose words these are.
"""

import contextlib
import dataclasses
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
        if self.world > 1:
            distributed.barrier()

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
        """``network`` whose backward pass also averages gradients over all processes."""
        if self.world == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
            return network
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=ids)

    def no_sync(self, wrapped: nn.Module, *, unless: bool) -> contextlib.AbstractContextManager[None]:
        """A context in which backward passes add up gradients here and average them over no other process yet."""
        if unless or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()


@contextlib.contextmanager
def init(runtime: Runtime) -> Iterator[tuple[Processes, Runtime]]:
    """Join the processes that torchrun started (none: world 1); yields this one, and ``runtime`` with its own device.

    Raises UsageError if this machine has fewer GPUs than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(), runtime
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    processes = Processes(int(os.environ["RANK"]), world, local, int(os.environ.get("GROUP_RANK", "0")))
    if runtime.device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU: {torch.cuda.device_count()} found; start fewer processes"
            )
        runtime = dataclasses.replace(runtime, device=torch.device("cuda", local))
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if runtime.device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield processes, runtime
    finally:
        distributed.destroy_process_group()
