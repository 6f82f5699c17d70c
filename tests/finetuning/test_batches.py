"""Batches drawn ahead: the same images in the same order for any number of threads and processes, none too many."""

import time

import numpy as np
import pytest
import torch

from featcache.errors import TrainingError
from featcache.finetuning.augment import augment
from featcache.finetuning.batches import Batch, draw_batches
from featcache.finetuning.pixels import Pixels
from featcache.system.distributed import Processes

N, SIZE = 13, (16, 24)
RANDOM = np.random.default_rng(0)
PICTURES = list(RANDOM.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8))
DATA = Pixels(np.arange(N), {}, PICTURES, np.arange(N) % 3, (), "", np.zeros((N, 32), np.uint8))
STEPS = np.array_split(RANDOM.permutation(N), 5)  # of 3, 3, 3, 2 and 2 images
CPU, ALONE = torch.device("cpu"), Processes()


def draw(image: int) -> torch.Tensor:
    time.sleep(0.002 * (image % 3))  # so that threads finish in another order than they began in
    pixels = torch.from_numpy(DATA.pictures[image])
    return augment(pixels, (("resized_crop", 0.3, 1.0, 1.0), ("flip", 0.5)), size=SIZE, seed=(0, 2, image))


def drawn(threads: int = 1, processes: Processes = ALONE) -> list[Batch]:
    return list(draw_batches(DATA, STEPS, draw, size=SIZE, device=CPU, threads=threads, processes=processes))


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

    batches = draw_batches(DATA, STEPS, counted, size=SIZE, device=CPU, threads=4, processes=ALONE)
    next(batches)
    time.sleep(0.1)
    assert begun == np.concatenate(STEPS[:3]).tolist()
    batches.close()  # as a run that stops does
    assert len(begun) == 9


def test_an_image_that_cannot_be_drawn_ends_the_epoch_at_its_step() -> None:
    def failing(image: int) -> torch.Tensor:
        if image == STEPS[1][0]:
            raise TrainingError("no")
        return draw(image)

    batches = draw_batches(DATA, STEPS, failing, size=SIZE, device=CPU, threads=2, processes=ALONE)
    next(batches)
    with pytest.raises(TrainingError, match="no"):
        next(batches)
