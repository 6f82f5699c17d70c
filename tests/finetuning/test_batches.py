"""Batches drawn ahead: the same images in the same order for any number of threads and processes, none too many."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_network import JOB

from featcache.errors import TrainingError
from featcache.finetuning import draw_processes
from featcache.finetuning.augment import augment
from featcache.finetuning.batches import Batch, Draw, draw_batches
from featcache.finetuning.draw_processes import DrawByProcesses
from featcache.finetuning.pixels import Pixels
from featcache.finetuning.recipes import RECIPES
from featcache.system.device import Runtime
from featcache.system.distributed import Processes
from featcache.system.worker_processes import SharedMemory, WorkerProcesses

N, SIZE = 13, (16, 24)
RANDOM = np.random.default_rng(0)
PICTURES = list(RANDOM.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8))
DATA = Pixels(np.arange(N), {}, PICTURES, np.arange(N) % 3, (), "", np.zeros((N, 32), np.uint8))
STEPS = np.array_split(RANDOM.permutation(N), 5)  # of 3, 3, 3, 2 and 2 images
CHANGES = (("resized_crop", 0.3, 1.0, 1.0), ("flip", 0.5))
CPU, ALONE = torch.device("cpu"), Processes()


def draw(image: int) -> torch.Tensor:
    time.sleep(0.002 * (image % 3))  # so that threads finish in another order than they began in
    pixels = torch.from_numpy(DATA.pictures[image])
    return augment(pixels, CHANGES, size=SIZE, seed=(0, 2, image))


def seed(image: int) -> tuple[int, int, int]:
    return 0, 2, image


BY_THREADS = Draw(draw, SIZE, seed)


def drawn(threads: int = 1, processes: Processes = ALONE) -> list[Batch]:
    return list(draw_batches(DATA, STEPS, BY_THREADS, device=CPU, threads=threads, processes=processes))


@pytest.mark.parametrize("threads", [1, 4])
def test_every_step_gets_its_images_in_order(threads: int) -> None:
    for step, batch in zip(STEPS, drawn(threads), strict=True):
        assert torch.equal(batch.pixels, torch.stack([draw(int(image)) for image in step]))
        assert batch.labels.tolist() == DATA.labels[step].tolist()
        assert batch.weights.tolist() == [1.0] * len(step)
        assert batch.size == len(step)


def test_processes_share_each_step_and_lack_none_of_its_images() -> None:
    shares = [drawn(2, Processes(rank=rank, world=3)) for rank in range(3)]
    for step, *batches in zip(STEPS, *shares, strict=True):
        assert sum(int(batch.weights.sum()) for batch in batches) == len(step)
        for rank, batch in enumerate(batches):
            mine = step[rank::3] if rank < len(step) else step[:1]  # without weight, but there: all take part
            assert torch.equal(batch.pixels, torch.stack([draw(int(image)) for image in mine]))
            assert batch.weights.tolist() == [float(rank < len(step))] * len(mine)
            assert batch.size == len(step)


def test_no_more_is_drawn_than_two_batches_ahead() -> None:
    begun: list[int] = []

    def counted(image: int) -> torch.Tensor:
        begun.append(image)
        return draw(image)

    by = Draw(counted, SIZE, seed)
    batches = draw_batches(DATA, STEPS, by, device=CPU, threads=4, processes=ALONE)
    next(batches)
    time.sleep(0.1)
    assert sorted(begun) == sorted(np.concatenate(STEPS[:3]).tolist())
    batches.close()  # as a run that stops does
    assert len(begun) == 9


def test_an_image_that_cannot_be_drawn_ends_the_epoch_at_its_step() -> None:
    def failing(image: int) -> torch.Tensor:
        if image == STEPS[1][0]:
            raise TrainingError("no")
        return draw(image)

    by = Draw(failing, SIZE, seed)
    batches = draw_batches(DATA, STEPS, by, device=CPU, threads=2, processes=ALONE)
    next(batches)
    with pytest.raises(TrainingError, match="no"):
        next(batches)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_processes_draw_the_same_into_buffers_that_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many steps, so that every buffer is written again; until the processes are ready, and if they are lost, threads draw."""
    memory = SharedMemory(1 << 20)
    pictures = []
    for picture in PICTURES[:-1]:
        place = memory.take(picture.size)
        assert place is not None
        place.reshape(picture.shape)[:] = picture
        pictures.append(place.reshape(picture.shape))
    data = dataclasses.replace(DATA, pictures=[*pictures, PICTURES[-1]], memory=memory)  # the last found no room
    processes = WorkerProcesses(2, ("featcache.finetuning.augment",))
    calls, call = list[int](), processes.call
    monkeypatch.setattr(processes, "call", lambda *given: calls.append(len(given[2][2])) or call(*given))
    apart = DrawByProcesses(processes, data, CHANGES, size=SIZE, most=3)
    steps = STEPS * 6
    try:
        batches = draw_batches(
            data, steps, dataclasses.replace(BY_THREADS, apart=apart), device=CPU, threads=2, processes=ALONE
        )
        for number, (step, batch) in enumerate(zip(steps, batches, strict=True)):
            assert torch.equal(batch.pixels, torch.stack([draw(int(image)) for image in step])), number
            assert batch.labels.tolist() == DATA.labels[step].tolist()
            if number == 8:
                processes.wait()
    finally:
        processes.close()
    assert sum(calls) > 3 * N


def test_buffers_are_pinned_once_and_read_before_the_next_epoch_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextlib.contextmanager
    def pinned(rows: np.ndarray, device: torch.device) -> Iterator[None]:
        told.append(f"pinned {rows.size}")
        yield
        told.append("given back")

    monkeypatch.setattr(draw_processes, "pinned", pinned)
    monkeypatch.setattr(draw_processes, "wait_for", lambda device: told.append("all is read"))
    data = dataclasses.replace(DATA, memory=SharedMemory(1 << 20))
    apart = DrawByProcesses(None, data, CHANGES, size=SIZE, most=3)  # type: ignore[arg-type]
    for _ in range(2):
        with apart.buffers(CPU) as buffers:
            assert {rows.shape for rows in buffers} == {(3, *SIZE, 3)}
    with contextlib.suppress(KeyboardInterrupt), apart.buffers(CPU):
        raise KeyboardInterrupt
    whole = draw_processes.ROOM * 3 * SIZE[0] * SIZE[1] * 3
    assert told == [f"pinned {whole}", *["all is read"] * 3]
    del apart
    assert told[4:] == ["given back"]


def test_what_is_worth_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many draws, cores, and a GPU that waits."""
    started = []
    monkeypatch.setattr(draw_processes, "worker_processes", lambda *given: started.append(given))
    monkeypatch.setattr(draw_processes, "usable_cores", lambda: 16)
    cuda, recipe = Runtime(torch.device("cuda"), 16, 256, ""), dataclasses.replace(RECIPES["default"], epochs=4)
    for runtime, changes, images in (
        (dataclasses.replace(cuda, device=CPU), {}, 1024),
        (dataclasses.replace(cuda, workers=5), {}, 1024),
        (cuda, {"augmentation": ()}, 1024),
        (cuda, {}, 1023),
        (cuda, {}, 1024),
    ):
        job = dataclasses.replace(JOB, runtime=runtime)
        assert draw_processes.drawing_processes(job, dataclasses.replace(recipe, **changes), images) is None
    assert started == [(16, "featcache.finetuning.augment", "featcache.images.fill")]
