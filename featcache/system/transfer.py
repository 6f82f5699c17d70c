"""Tensors on their way to a GPU and back, while it computes. On a CPU nothing is copied.

In: tensors in this computer's memory, or on a device. Out: the same on the other side, in order with the work queued there.

A CUDA GPU fetches what lies in pinned memory by itself, on a stream of its own. PyTorch's allocators see to it that neither
side's memory is used anew before the copy, or the work that reads it, is done: pinned blocks wait for the copies that were
queued from them, blocks of the GPU for the streams that ``record_stream`` names.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt
import torch

from featcache.system.device import launching


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor in this computer's memory, from which ``device`` can fetch it without waiting."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def staged(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of ``values`` from which ``device`` can fetch them without waiting."""
    stored = torch.from_numpy(values)
    return host_tensor(tuple(stored.shape), stored.dtype, device).copy_(stored)


@contextlib.contextmanager
def pinned(memory: npt.NDArray[Any], device: torch.device, *, cuda: Any = torch.cuda) -> Iterator[None]:
    """Let a CUDA GPU fetch from ``memory``, which is not PyTorch's own, without waiting. Where the system does not, it is slower.

    cuda: a stand-in, for tests.
    """
    if device.type != "cuda":
        yield
        return
    runtime, start = cuda.cudart(), int(memory.__array_interface__["data"][0])
    taken = int(runtime.cudaHostRegister(start, memory.nbytes, 0)) == 0
    try:
        yield
    finally:
        wait_for(device, cuda=cuda)  # a copy may still read it, if a run ends early
        if taken:
            runtime.cudaHostUnregister(start)


def wait_for(device: torch.device, *, cuda: Any = torch.cuda) -> None:
    """Until a CUDA GPU has done all that it was asked for. cuda: a stand-in, for tests."""
    if device.type == "cuda":
        cuda.synchronize(device)


class Feed:
    """Sends tensors to a device, beside the work that is queued there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``tensors``, of ``host_tensor``, on the device: work that the caller queues from now on finds them there."""
        if self._stream is None:
            with launching(self._device):
                return tuple(tensor.to(self._device) for tensor in tensors)
        caller = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):  # which waits for nothing that the caller has queued
            try:
                sent = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
            except torch.OutOfMemoryError:  # other streams keep what they no longer need
                torch.cuda.empty_cache()
                sent = tuple(tensor.to(self._device, non_blocking=True) for tensor in tensors)
        caller.wait_stream(self._stream)
        for tensor in sent:
            tensor.record_stream(caller)
        return sent

    def mark(self) -> Callable[[], None]:
        """What waits until all that was sent so far is there, and where it came from may be written again."""
        if self._stream is None:
            return lambda: None
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        return done.synchronize


def read_later(values: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
    """Begin to fetch ``values`` from their device. The function returned waits for them, not for work queued since."""
    if values.device.type != "cuda":

        def read_now() -> npt.NDArray[Any]:
            with launching(values.device):
                return values.cpu().numpy()

        return read_now
    host = host_tensor(tuple(values.shape), values.dtype, values.device)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # the thread sleeps, where it would spin
    done.record(torch.cuda.current_stream(values.device))

    def read() -> npt.NDArray[Any]:
        done.synchronize()
        return host.numpy().copy()  # pinned memory is scarce: hand it back

    return read
