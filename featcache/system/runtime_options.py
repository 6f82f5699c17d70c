"""What may be asked of a machine, checked before any work and without torch, also where nothing has to be computed."""

import numbers
import os
import re
from typing import TYPE_CHECKING

from featcache.errors import UsageError

if TYPE_CHECKING:
    import torch


def check_runtime_options(device: str, *, workers: int | None = None, batch_size: int | None = None) -> None:
    """Raise UsageError for the name of no device, or for counts that no machine has; None is for choosing by oneself."""
    if not re.fullmatch(r"auto|(cpu|mps)(:0)?|cuda(:\d{1,2})?", str(device), re.ASCII):
        raise UsageError(f"unknown device {str(device)!r}; choose auto, cpu, cuda, cuda:N or mps")
    for name, value, most in (("workers", workers, 1024), ("batch size", batch_size, 8192)):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{name} must lie between 1 and {most}, found {value}")


def check_device(device: str) -> None:
    """Raise UsageError if a GPU that is asked for by its name is not here; asking for another one loads no torch."""
    if str(device) not in ("auto", "cpu"):
        from featcache.system.device import choose_device

        choose_device(str(device))


def gpu_for(device: str, work: float, *, worth: float, auto: tuple[str, ...] = ("cuda",)) -> "torch.device | None":
    """The GPU for some work on arrays; None: this CPU, without torch. ``auto`` takes one of its kinds, from ``worth`` on.

    Raises UsageError: no such device here.
    """
    check_runtime_options(device)
    if device == "cpu" or (device == "auto" and work < worth):
        return None
    from featcache.system.device import choose_device

    chosen, _ = choose_device(device)
    return chosen if chosen.type in (auto if device == "auto" else ("cuda", "mps")) else None


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise UsageError unless ``value`` is a whole number within its limits."""
    found = int(value) if isinstance(value, numbers.Integral) else None
    if found is None or found < least or (most is not None and found > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{name} must be a whole number, {limits}, found {value!r}")


def may_fuse() -> bool:
    """Return whether layers may be fused, in prediction and in training; FEATCACHE_FUSE=0 turns that off."""
    return os.environ.get("FEATCACHE_FUSE") != "0"


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
