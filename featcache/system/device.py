"""What this process computes with: device, workers, batch size. Each is chosen once, with a reason.

In: what the user asked for. Out: a frozen ``Runtime``, which changes only the speed, never what the numbers mean.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from featcache.errors import UsageError
from featcache.system.display import quantity
from featcache.system.memory import keep_freed_memory
from featcache.system.runtime_options import check_runtime_options, usable_cores

log = logging.getLogger("featcache")
_LOADED_BY = os.getpid()
_APPLE = threading.RLock()
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in messages of MPS and of the CPU


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What to compute with."""

    device: torch.device
    workers: int  # threads that read and decode images; on a CPU each also runs the backbone, on one core
    batch_size: int  # images per forward pass, always exactly this many
    reason: str  # why these were chosen, in words for the user


def choose_runtime(device: str = "auto", *, workers: int | None = None, batch_size: int | None = None) -> Runtime:
    """Choose what to compute with. Call it before anything large is allocated: from now on freed memory is kept.

    Args:
        device: auto, cpu, cuda, cuda:N or mps; of cuda:all the first.
        workers: threads; one per usable core when None, at most 32 with a GPU.
        batch_size: when None, 8 on a CPU (activations stay in the cache of one core), 256 on an NVIDIA GPU, else 64.

    Raises:
        UsageError: no such device here, or a count below 1.
    """
    check_runtime_options(device.removesuffix(":all"), workers=workers, batch_size=batch_size)
    use_one_thread_if_forked()
    cores = usable_cores()
    chosen, reason = choose_device(device)
    if workers is None:
        workers = cores if chosen.type == "cpu" else min(cores, 32)
    batch_size = batch_size or {"cpu": 8, "cuda": 256}.get(chosen.type, 64)
    kept = "kept" if keep_freed_memory() else "not kept"
    log.debug(
        "%d workers for %d usable cores; %s per batch; freed memory is %s",
        workers,
        cores,
        quantity(batch_size, "image"),
        kept,
    )
    return Runtime(chosen, workers, batch_size, f"{reason}; {workers} worker{'s' if workers > 1 else ''}")


def use_one_thread_if_forked() -> None:
    """Let PyTorch use one thread per call in a process that was forked from one that had loaded PyTorch.

    PyTorch's threads do not survive a fork, and waiting for them would never end.
    """
    if os.getpid() != _LOADED_BY:
        torch.set_num_threads(1)


@contextlib.contextmanager
def threads_held(count: int) -> Iterator[None]:
    """A context in which PyTorch uses so many threads for what this thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_core_each(workers: int, name: str, *, cores: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads in each of which PyTorch uses one core: small batches side by side beat one on all cores.

    ``cores``: for each thread, where there are fewer threads than cores.
    """
    before = torch.get_num_threads()
    # OpenMP's number of threads is each thread's own.
    pool = ThreadPoolExecutor(workers, name, initializer=torch.set_num_threads, initargs=(cores,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def launching(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context for all that queues work on ``device``: an Apple GPU takes it from one thread of a process at a time.

    PyTorch keeps one queue for MPS, which threads may not fill side by side.
    """
    return _APPLE if device.type == "mps" else contextlib.nullcontext()


def return_memory(device: torch.device) -> None:
    """Hand back the blocks that PyTorch keeps for reuse, and what libraries left in cycles, after something did not fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """A context that leaves PyTorch's random generators, the CPU's and ``device``'s, as they were before."""
    apple = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng asks for those of numbered devices
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if apple is not None:
            torch.mps.set_rng_state(apple)


def seed_random_numbers(seed: int, device: torch.device) -> None:
    """Seed PyTorch's random generators, the CPU's and ``device``'s, in place of ``torch.manual_seed``.

    That one also seeds every device that is not there, a traceback written down for each.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def has_bf16_arithmetic() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware; emulation would be slower than float32."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class _TrueFloat32(contextlib.ContextDecorator):
    """A context in which float32 is float32, in convolutions and matrix products on every device; for several threads.

    By default cuDNN's convolutions round their inputs to TF32, and a program may allow more. The switches are the
    process's: the first thread to enter turns them, the last to leave turns them back. What the program chose, by the new
    interface (``fp32_precision``) or the old one (``allow_tf32``), is then there again, to be read by either.
    """

    def __init__(self) -> None:
        backends: Any = torch.backends
        self._switches = backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul
        self._lock, self._inside, self._before = threading.Lock(), 0, list[str]()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = [switch.fp32_precision for switch in self._switches]
                for switch in self._switches:
                    switch.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            for switch, before in zip(self._switches, self._before, strict=True) if not self._inside else ():
                switch.fp32_precision = "none"  # follow the switch of all operations, if that comes to the same
                if switch.fp32_precision != before:
                    switch.fp32_precision = before


true_float32 = _TrueFloat32()


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Let memory that runs out inside be a torch.OutOfMemoryError; on MPS and the CPU it is some RuntimeError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError)
        if known or not (isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device and why, by one of the names that ``check_runtime_options`` lets pass. Raises UsageError: it is not here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"device cuda: {torch.cuda.get_device_name()}"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "device mps: Apple GPU, no CUDA GPU found"
        return torch.device("cpu"), "device cpu: no GPU found"
    device = torch.device(name.removesuffix(":all"))
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in found or (device.index or 0) >= found[device.type]:
        there = [kind for kind, count in found.items() if count]
        raise UsageError(
            f"device {name!r} is not on this machine, which has: {', '.join(there)}; auto takes the best of it"
        )
    return device, f"device {name}: as asked"
