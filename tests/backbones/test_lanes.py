"""Batches on a device: the numbers of the plain network, no step before the one it needs, and as many as fit.

A GPU is a stand-in here (``streams.py``) that tells what a real one might do too early. On a real one: ``test_embed_on_gpu.py``.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from streams import Cuda, RaceError

from featcache.backbones import lanes
from featcache.backbones.lanes import UPLOADS, CudaLane, PlainLane, fitting_lane
from featcache.errors import UsageError

CPU, SHAPE = torch.device("cpu"), (4, 6, 5, 3)


def forward(pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return (pixels.float().mean((1, 2)) * 3 + 1).half()


def batches(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, SHAPE, dtype=np.uint8) for _ in range(count)]


def expected(pixels: np.ndarray) -> np.ndarray:
    return (pixels.mean((1, 2), dtype=np.float64) * 3 + 1).astype(np.float16).astype(np.float32)


def run(lane: Any, given: list[np.ndarray], *, ahead: int) -> list[np.ndarray]:
    """As a ring does: so many batches with the device at a time, each buffer written again when its features were taken."""
    buffers = [lane.new_buffer() for _ in range(ahead)]
    waiting, found = [], []
    for number, pixels in enumerate(given):
        if len(waiting) == ahead:
            found.append(waiting.pop(0)())
        torch.from_numpy(buffers[number % ahead]).copy_(torch.from_numpy(pixels))  # as PyTorch's, so that it is watched
        waiting.append(lane.download(lane.compute(lane.upload(buffers[number % ahead]))))
    return found + [wait() for wait in waiting]


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("captures", [True, False])
def test_streams_wait_for_each_other_and_a_graph_gives_the_same(
    captures: bool, ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    given = batches(12)
    with caplog.at_level(logging.DEBUG, "featcache"), Cuda(captures=captures) as cuda:
        found = run(CudaLane(forward, CPU, SHAPE, cuda=cuda), given, ahead=ahead)
    np.testing.assert_allclose(found, [expected(pixels) for pixels in given], rtol=2e-3)
    for features, pixels in zip(found, given, strict=True):
        np.testing.assert_array_equal(features, forward(torch.from_numpy(pixels)).float().numpy())
    assert all(features.dtype == np.float32 for features in found)
    assert cuda.streams == 2 + UPLOADS
    graph = cuda.graphs[0]
    assert len(cuda.graphs) == 2 - captures  # a capture that failed is followed by one that is to succeed
    assert graph.replays == (10 if captures else 0)  # to compare, and every batch but the first three
    said = [record.getMessage() for record in caplog.records]
    assert said == (
        [] if captures else ["no CUDA graph of batches of 4: operation not permitted when stream is capturing"]
    )


def test_a_graph_that_gives_other_bits_is_not_used() -> None:
    calls = 0

    def drifting(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(pixels) + (calls == 4)  # what is captured

    with Cuda() as cuda:
        found = run(CudaLane(drifting, CPU, SHAPE, cuda=cuda), batches(8), ahead=2)
    assert [graph.replays for graph in cuda.graphs] == [1]
    np.testing.assert_allclose(found, [expected(pixels) for pixels in batches(8)], rtol=2e-3)


@pytest.mark.parametrize("broken", ["upload", "compute", "wait"])
def test_the_stand_in_sees_what_does_not_wait(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle itself: each of the waits is needed."""

    class Event:
        clock: ClassVar[dict[str, int]] = {}

        def synchronize(self) -> None:
            """Not at all."""

        def record(self, stream: object) -> None:
            """Nor this."""

    class Careless(CudaLane):
        def compute(self, uploaded: Any) -> Any:
            result, there, ready = super().compute((uploaded[0], Event() if broken == "upload" else uploaded[1]))
            return result, there, Event() if broken == "compute" else ready

    with Cuda() as cuda, pytest.raises(RaceError):
        lane = Careless(forward, CPU, SHAPE, cuda=cuda)
        if broken == "wait":
            cuda.Event = lambda **_: Event()  # type: ignore[method-assign, assignment, return-value]
        run(lane, batches(6), ahead=2)


def test_the_plain_lane() -> None:
    given = batches(5)
    found = run(PlainLane(forward, CPU, SHAPE), given, ahead=3)
    np.testing.assert_allclose(found, [expected(pixels) for pixels in given], rtol=2e-3)


class Full(PlainLane):
    """A device that computes at most so many images, and remembers what was being computed when it failed."""

    most, tried, held = 0, list[int](), list[weakref.ref[torch.Tensor]]()

    def compute(self, uploaded: Any) -> Any:
        assert all(reference() is None for reference in self.held), "the memory of the failed attempt is still held"
        self.tried.append(len(uploaded))
        activation = uploaded.float()
        if len(uploaded) > self.most:
            self.held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().compute(uploaded)


def make(most: int) -> Callable[[int], Full]:
    Full.most, Full.tried, Full.held = most, [], []
    return lambda size: Full(forward, CPU, (size, *SHAPE[1:]))


@pytest.mark.parametrize(
    ("asked", "most", "tried"), [(256, 256, [256]), (256, 100, [256, 128, 64]), (7, 1, [7, 3, 1]), (1, 1, [1])]
)
def test_a_batch_that_does_not_fit_is_halved(
    asked: int, most: int, tried: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "featcache"):
        lane = fitting_lane(make(most), asked, "cuda:0")
    assert (lane.batch_size, Full.tried) == (tried[-1], tried)
    assert len(caplog.messages) == (len(tried) > 1)
    if caplog.messages:
        assert caplog.messages[0] == f"batches of {asked} do not fit into cuda:0's memory: {tried[-1]} at a time"


def test_where_not_a_single_image_fits() -> None:
    with pytest.raises(UsageError, match="not a single image fits into cuda:0's memory"):
        fitting_lane(make(0), 8, "cuda:0")
    assert Full.tried == [8, 4, 2, 1]


def test_other_errors_are_none_of_memory() -> None:
    def broken(pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such operator")

    with pytest.raises(RuntimeError, match="no such operator"):
        fitting_lane(lambda size: PlainLane(broken, CPU, (size, *SHAPE[1:])), 8, "cuda:0")


def test_eager_batches_come_first() -> None:
    """A few images are done without a graph."""
    with Cuda() as cuda:
        run(CudaLane(forward, CPU, SHAPE, cuda=cuda), batches(lanes._EAGER - 1), ahead=2)
    assert cuda.graphs == []
