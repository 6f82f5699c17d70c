"""Work on a CUDA GPU captured as a graph: hundreds of calls that are then made by one.

In: a stream, and work that always uses the same memory. Out: a graph to replay. Source: PyTorch's notes on CUDA semantics.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capturing(stream: Any, device: torch.device, *, pool: Any = None, cuda: Any = torch.cuda) -> Iterator[Any]:
    """Capture what is queued inside on ``stream``, from this thread; yields the graph, to be replayed afterwards.

    Args:
        pool: of another graph, whose memory this one may use as well: what one has computed the other may overwrite.
        cuda: a stand-in, for tests.

    Raises:
        Exception: whatever cannot be captured ends in. Random numbers can be drawn again after that.
    """
    graph = cuda.CUDAGraph()
    try:
        # thread_local: other threads may allocate, copy or wait meanwhile.
        with cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield graph
    except BaseException:
        with contextlib.suppress(Exception):
            _end_of_capture(stream, device, cuda)
        raise


def _end_of_capture(stream: Any, device: torch.device, cuda: Any) -> None:
    """A capture that fails leaves the generator of random numbers to believe that it goes on: one that succeeds ends that."""
    with cuda.graph(cuda.CUDAGraph(), pool=None, stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
