"""Devices that take batch after batch: what a ring feeds.

In: a network's forward pass and the shape of its batches. Out: a ``Lane`` (``ring.py``) whose batches fit into the memory.
Streams, events and graphs are used as in PyTorch's notes on CUDA semantics.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from featcache.backbones.ring import Change, Features, Lane
from featcache.errors import UsageError
from featcache.images.decode import Pixels
from featcache.system.cuda_graphs import capturing
from featcache.system.device import launching, memory_errors
from featcache.system.transfer import pinned

log = logging.getLogger("featcache")
Forward = Callable[[torch.Tensor], torch.Tensor]
UPLOADS = 3  # streams, one for each thread that feeds where a device decodes
_EAGER = 3  # batches before a graph is captured: a few images are sooner done without, and kernels are chosen by then


class PlainLane:
    """A device on which each step ends before the next begins: an Apple GPU, or, in tests, a CPU."""

    def __init__(self, forward: Forward, device: torch.device, shape: tuple[int, ...]) -> None:
        """``shape``: (N, H, W, 3), of a batch."""
        self._forward, self._device, self._shape = forward, device, shape

    @property
    def batch_size(self) -> int:
        """As ``Lane``."""
        return self._shape[0]

    def new_buffer(self) -> Pixels:
        """As ``Lane``; pinned where a GPU then fetches it faster, and while others compute."""
        return torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda").numpy()

    def pinned(self, buffers: Pixels) -> contextlib.AbstractContextManager[object]:
        """As ``Lane``."""
        return pinned(buffers, self._device)

    def upload(self, pixels: Pixels, change: Change | None = None) -> Any:
        """As ``Lane``."""
        with launching(self._device):
            # Where the device is this computer, ``change`` would change the buffer.
            there = torch.from_numpy(pixels).to(self._device, copy=change is not None)
            if change:
                change(there)
            return there

    def compute(self, uploaded: Any) -> Any:
        """As ``Lane``."""
        with launching(self._device):
            return self._forward(uploaded)

    def download(self, computed: Any) -> Callable[[], Features]:
        """As ``Lane``."""
        with launching(self._device):
            features: Features = computed.float().cpu().numpy()
        return lambda: features


class CudaLane(PlainLane):
    """An NVIDIA GPU: uploads, computes and downloads side by side, a stream each; the forward pass is replayed as a graph.

    No tensor is used on two streams after Python has let go of it: ``download``'s result holds all of a batch until the
    GPU is done with it, so that the allocator cannot give its memory away (which ``record_stream`` would be for).
    """

    def __init__(
        self, forward: Forward, device: torch.device, shape: tuple[int, ...], *, cuda: Any = torch.cuda
    ) -> None:
        """As ``PlainLane``. cuda: a stand-in, for tests."""
        super().__init__(forward, device, shape)
        self._cuda = cuda
        self._up = queue.SimpleQueue[
            Any
        ]()  # a stream for each thread that uploads: what it asks of the GPU there may take its time
        for _ in range(UPLOADS):
            self._up.put(cuda.Stream(device))
        self._run, self._down = cuda.Stream(device), cuda.Stream(device)
        self._run.wait_stream(cuda.current_stream(device))  # there the weights were copied
        self._lock = threading.Lock()  # several rings may share a lane; a graph has one input
        self._batches = 0
        self._graph: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def upload(self, pixels: Pixels, change: Change | None = None) -> Any:
        """As ``Lane``."""
        stream = self._up.get()
        try:
            with self._cuda.stream(stream):
                there = torch.empty(self._shape, dtype=torch.uint8, device=self._device)
                there.copy_(torch.from_numpy(pixels), non_blocking=True)
                if change:
                    change(there)
                return there, stream.record_event()
        finally:
            self._up.put(stream)

    def compute(self, uploaded: Any) -> Any:
        """As ``Lane``."""
        there, ready = uploaded
        with self._lock, self._cuda.stream(self._run):
            self._run.wait_event(ready)
            result = self._computed(there)
            return result, there, self._run.record_event()

    def download(self, computed: Any) -> Callable[[], Features]:
        """As ``Lane``."""
        result, there, ready = computed
        with self._cuda.stream(self._down):
            self._down.wait_event(ready)
            # Converted there: here all of PyTorch's threads would set about it, against those that decode.
            exact = result.float()
            host = torch.empty(exact.shape, pin_memory=self._device.type == "cuda")
            host.copy_(exact, non_blocking=True)
            done = self._cuda.Event(blocking=True)  # a wait that spins takes a core from the decoders
            done.record(self._down)
        held = [result, exact, there]

        def wait() -> Features:
            done.synchronize()
            held.clear()
            return host.numpy().copy()  # pinned memory is scarce: hand it back

        return wait

    def _computed(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._graph:
            graph, inputs, outputs = self._graph
            inputs.copy_(pixels)
            graph.replay()
            return outputs.clone()  # the next replay overwrites them
        result = self._forward(pixels)
        self._batches += 1
        if self._batches == _EAGER:
            self._capture(pixels, result)
        return result

    def _capture(self, pixels: torch.Tensor, expected: torch.Tensor) -> None:
        """Replay a graph from now on, if one can be made that gives the very bits of the forward pass."""
        try:
            inputs = pixels.clone()
            with capturing(self._run, self._device, cuda=self._cuda) as graph:
                outputs = self._forward(inputs)
            graph.replay()
            if not torch.equal(outputs.view(torch.uint8), expected.view(torch.uint8)):
                raise RuntimeError("it gives other bits")
            self._graph = graph, inputs, outputs
        except Exception as error:  # a network that looks at its values, too little memory, and more
            log.debug("no CUDA graph of batches of %d: %s", self.batch_size, str(error).partition("\n")[0])


def fitting_lane(make: Callable[[int], Lane], batch_size: int, where: object) -> Lane:
    """A lane for batches of so many images, or of half as many, and so on, until one fits into the memory of ``where``.

    Raises:
        UsageError: not a single image fits.
    """
    for size in (batch_size >> halvings for halvings in range(batch_size.bit_length())):
        if lane := _if_it_fits(make, size):
            if size < batch_size:
                log.info("batches of %d do not fit into %s's memory: %d at a time", batch_size, where, size)
            return lane
    raise UsageError(f"not a single image fits into {where}'s memory beside the backbone; --device cpu has more")


def _if_it_fits(make: Callable[[int], Lane], batch_size: int) -> Lane | None:
    try:
        with memory_errors():
            lane = make(batch_size)
            lane.download(lane.compute(lane.upload(lane.new_buffer())))()
            return lane
    except torch.OutOfMemoryError:
        pass
    # Not inside ``except``, where the error's frames still hold the memory.
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return None
