"""Batches go round in a few buffers: order, ends, refusals, errors and early ends, with devices that are made up.

Oracle: what one thread computes in a loop. An image is its number, its embedding a function of that.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from featcache.backbones.ring import buffers, through_ring

SIZE = 4


class Device:
    """A lane that queues: computing happens when a thread of its own comes to it, as on a GPU. Notes what is held at a time."""

    batch_size = SIZE

    def __init__(self, delay: Callable[[], float] = lambda: 0.0, fails: str = "", at: int = 0) -> None:
        self.delay, self.fails, self.at = delay, fails, at
        self.queue = ThreadPoolExecutor(1)
        self.buffers, self.steps, self.shapes = 0, 0, set[tuple[int, ...]]()
        self.feeders = set[int]()

    def new_buffer(self) -> np.ndarray:
        self.buffers += 1
        return np.full((SIZE, 2, 2, 3), 255, np.uint8)  # stale

    def check(self, step: str) -> None:
        if step == self.fails and self.steps >= self.at:
            raise RuntimeError(f"{step} failed")

    def pinned(self, buffers: np.ndarray) -> Any:
        return contextlib.nullcontext()

    def upload(self, pixels: np.ndarray, change: Any = None) -> Any:
        self.feeders.add(threading.get_ident())
        self.check("upload")
        self.shapes.add(pixels.shape)
        return self.queue.submit(pixels.copy)

    def compute(self, uploaded: Any) -> Any:
        self.check("compute")

        def run() -> np.ndarray:
            time.sleep(self.delay())
            return np.stack([embedding(int(value)) for value in uploaded.result()[:, 0, 0, 0]])

        return self.queue.submit(run)

    def download(self, computed: Any) -> Callable[[], np.ndarray]:
        self.check("download")
        self.steps += 1
        step = self.steps

        def wait() -> np.ndarray:
            if self.fails == "wait" and step > self.at:
                raise RuntimeError("wait failed")
            return computed.result()  # type: ignore[no-any-return]

        return wait


def embedding(number: int) -> np.ndarray:
    return np.array([number, number**2, 1], np.float32)


def refused(index: int) -> bool:
    return index % 7 == 3 or 12 <= index < 12 + SIZE  # a whole batch of them, too


def ring(
    count: int, device: Device, *, workers: int = 3, delay: Callable[[], float] = lambda: 0.0, error_at: int = -1
) -> Iterator[dict[int, list[float]]]:
    """position -> embedding, batch by batch."""

    def fill_one(index: int, row: np.ndarray) -> tuple[int, np.ndarray] | None:
        time.sleep(delay())
        if index == error_at:
            raise ValueError(f"image {index}")
        if refused(index):
            return None
        row[:] = index
        return index, row

    def fill(images: range, rows: np.ndarray) -> list[tuple[int, np.ndarray] | None]:
        assert 1 <= len(images) == len(rows) <= SIZE
        return [fill_one(index, row) for index, row in zip(images, rows, strict=True)]

    def finish(found: list[tuple[int, np.ndarray] | None], features: np.ndarray) -> dict[int, list[float]]:
        kept = [(row, *each) for row, each in enumerate(found) if each is not None]
        assert all(int(pixels[0, 0, 0]) == index for _, index, pixels in kept)  # not filled again yet
        assert features.shape == (SIZE, 3)
        return {index: features[row].tolist() for row, index, _ in kept}

    before = threading.active_count()
    with ThreadPoolExecutor(workers + 1) as pool, device.queue:
        yield from through_ring(count, fill, finish, device, pool, workers=workers)
    assert threading.active_count() <= before


def expected(count: int) -> dict[int, list[float]]:
    return {index: embedding(index).tolist() for index in range(count) if not refused(index)}


def slow() -> float:
    return 0.004


@pytest.mark.parametrize("count", [0, 1, SIZE - 1, SIZE, SIZE + 1, 10 * SIZE, 41])
@pytest.mark.parametrize("workers", [1, 8])
def test_every_image_comes_once_and_in_order(count: int, workers: int) -> None:
    device = Device()
    batches = list(ring(count, device, workers=workers))
    assert len(batches) == -(-count // SIZE)
    assert list({index: None for batch in batches for index in batch}) == list(expected(count))
    assert {index: row for batch in batches for index, row in batch.items()} == expected(count)
    assert device.shapes <= {(SIZE, 2, 2, 3)}  # always whole
    assert len(device.feeders) <= 1
    assert device.buffers <= buffers(None)


@pytest.mark.parametrize(("decoding", "computing"), [(slow, lambda: 0.0), (lambda: 0.0, slow)])
def test_whoever_is_slow(decoding: Callable[[], float], computing: Callable[[], float]) -> None:
    device = Device(computing)
    found = {index: row for batch in ring(61, device, delay=decoding) for index, row in batch.items()}
    assert found == expected(61)


def test_random_schedules() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        count, workers = rng.randrange(60), rng.randrange(1, 6)
        decode, compute, take = (rng.choice((0.0, 0.0005, 0.002)) for _ in range(3))
        found: dict[int, list[float]] = {}
        device = Device(lambda: rng.random() * compute)  # noqa: B023
        for batch in ring(count, device, workers=workers, delay=lambda: rng.random() * decode):  # noqa: B023
            time.sleep(rng.random() * take)
            found |= batch
        assert (list(found), found) == (list(expected(count)), expected(count)), seed


def test_memory_is_bounded_by_the_buffers() -> None:
    """Nobody takes results: decoding stops when all buffers are full."""
    decoded = 0

    def fill(images: range, rows: np.ndarray) -> list[int]:
        nonlocal decoded
        decoded += len(images)
        return list(images)

    with ThreadPoolExecutor(2) as pool:
        results = through_ring(100 * SIZE, fill, lambda *batch: None, Device(), pool, workers=1)
        next(results)
        time.sleep(0.05)
        most = buffers(None) * SIZE
        assert most <= decoded <= most + SIZE
        results.close()
    assert decoded <= most + SIZE


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("workers", [1, 4])
def test_closing_early_ends_all_threads(taken: int, workers: int) -> None:
    results = ring(1000, Device(slow), workers=workers)
    for _ in range(taken):
        next(results)
    before = threading.active_count()
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before


@pytest.mark.parametrize("stage", ["upload", "compute", "download", "wait"])
@pytest.mark.parametrize("at", [0, 2, 9])
def test_an_error_of_the_device_ends_the_run(stage: str, at: int) -> None:
    """With that error, after the batches before it, which are right."""
    found: dict[int, list[float]] = {}
    with pytest.raises(RuntimeError, match=f"{stage} failed"):
        for batch in ring(200, Device(fails=stage, at=at)):
            found |= batch
    assert found == expected(at * SIZE)


@pytest.mark.parametrize("error_at", [0, 9, 199])
@pytest.mark.parametrize("workers", [1, 5])
def test_an_error_of_a_worker_ends_the_run(error_at: int, workers: int) -> None:
    found: dict[int, list[float]] = {}
    with pytest.raises(ValueError, match=f"image {error_at}"):
        for batch in ring(200, Device(), workers=workers, error_at=error_at):
            found |= batch
    assert list(found.items()) == list(expected(error_at // SIZE * SIZE).items())[: len(found)]


def test_an_error_of_who_takes_the_results_ends_all_threads() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), ThreadPoolExecutor(4) as pool:
        for _ in through_ring(100, lambda images, rows: list(images), lambda *_: 1 // 0, Device(), pool, workers=3):
            pass
    assert threading.active_count() <= before + 1  # the device's own
