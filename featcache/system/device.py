"""What this process computes with: device, workers, allocator. Decided once, each choice with its reason.

In: what the user asked for. Out: a frozen ``Runtime``. Nothing in here changes the numbers' meaning, only the speed.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from featcache.errors import UsageError

_LOADED_BY = os.getpid()


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where to compute.

    Attributes:
        device: torch device.
        workers: threads that read and decode images; on a CPU each also runs the backbone, on one core.
        batch_size: images per forward pass, always exactly this many.
        reason: why, in words, for the user.
    """

    device: torch.device
    workers: int
    batch_size: int
    reason: str


def choose_runtime(device: str = "auto", *, workers: int | None = None, batch_size: int | None = None) -> Runtime:
    """Decide where to compute, before anything large is allocated: freed memory is kept from now on, where possible.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        workers: threads; the number of usable cores when not given.
        batch_size: 8 on a CPU (activations stay in the cache of one core), 64 on a GPU, when not given.

    Raises:
        UsageError: no such device here, or a count below 1.
    """
    for name, value, most in (("workers", workers, 1024), ("batch size", batch_size, 8192)):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{name} must lie between 1 and {most}, found {value}")
    use_one_thread_if_forked()
    cores = usable_cores()
    chosen, reason = _choose_device(device)
    if workers is None:
        workers = cores if chosen.type == "cpu" else min(cores, 32)
    reason += f"; {workers} worker{'s' if workers > 1 else ''} for {cores} usable core{'s' if cores > 1 else ''}"
    if keep_freed_memory():
        reason += "; freed memory is kept for the next batch"
    return Runtime(chosen, workers, batch_size or (8 if chosen.type == "cpu" else 64), reason)


def _choose_device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"device cuda: {torch.cuda.get_device_name()}"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "device mps: Apple GPU, no CUDA GPU found"
        return torch.device("cpu"), "device cpu: no GPU found"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:N or mps") from error
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in found or (device.index or 0) >= found[device.type]:
        there = [kind for kind, count in found.items() if count]
        raise UsageError(f"device {name!r} is not on this machine, which has: {', '.join(there)}")
    return device, f"device {name}: as asked"


def use_one_thread_if_forked() -> None:
    """Let PyTorch use one thread per call in a process that was forked from one that had loaded it.

    The threads that it computed with there do not exist here, and waiting for them would never end.
    """
    if os.getpid() != _LOADED_BY:
        torch.set_num_threads(1)


def usable_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let glibc keep freed activation buffers instead of returning and faulting them in again at every layer.

    The usual loop spends half its CPU time on that. Affects the whole process, and only what is allocated later;
    ``FEATCACHE_KEEP_MEMORY=0`` turns it off. Returns whether it took effect.
    """
    if not sys.platform.startswith("linux") or os.environ.get("FEATCACHE_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # <malloc.h>
    options = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 64 * 2**20))
    taken = [mallopt(option, value) == 1 for option, value in options]  # every one of them, whatever the first says
    return all(taken)


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


@contextlib.contextmanager
def one_core_each(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in each of which PyTorch uses one core: small batches side by side beat one batch on all cores."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, name, initializer=torch.set_num_threads, initargs=(1,))  # OpenMP's is per thread
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def kept_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context after which PyTorch's random generators, the CPU's and ``device``'s, are as before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def has_bf16_arithmetic() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; emulation would be slower than float32."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def choose_training_precision(asked: str, device: torch.device) -> str:
    """Mixed precision where the hardware multiplies it: bf16 before fp16, which needs loss scaling; else fp32.

    Raises:
        UsageError: unknown, or not possible on ``device``.
    """
    if asked == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if device.type == "cpu" and has_bf16_arithmetic() else "fp32"
    if asked not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"unknown precision {asked!r}; choose auto, fp32, bf16 or fp16")
    if asked == "fp16" and device.type != "cuda":
        raise UsageError(f"training in fp16 needs a CUDA GPU, found {device.type}; choose fp32 or bf16")
    return asked
