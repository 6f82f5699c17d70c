"""Training on a CUDA GPU: the same images, and the same numbers but for rounding, as on the CPU; no step waits for the GPU."""

import copy
import dataclasses
import gc
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_network import JOB, make_pixels, shrunk
from torch import nn

from featcache.backbones.load import load_backbone
from featcache.finetuning import gpu_steps
from featcache.finetuning.logits import compute_logits
from featcache.finetuning.network import with_new_head
from featcache.finetuning.recipes import Recipe
from featcache.finetuning.trainer import Trainer
from featcache.system.device import Runtime
from featcache.system.transfer import Feed, host_tensor, read_later

pytestmark = pytest.mark.gpu
N, EDGE = 22, 64
STEPS = (("resized_crop", 0.3, 1.0, 1.0), ("flip", 0.5), ("rotate", 20.0), ("jitter", 0.2, 0.2, 0.2, 0.1))
RECIPE = Recipe(about="", hidden=(), lr=1e-4, backbone_lr=1e-5, epochs=3, batch_size=8, augmentation=STEPS)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Any:
    return make_pixels(N, 96)


def make_trainer(
    data: Any, device: torch.device, *, name: str = "resnet18", micro_batch: int = 3, edge: int = EDGE, **changes: Any
) -> Trainer:
    recipe = dataclasses.replace(RECIPE, **{k: v for k, v in changes.items() if k != "precision"})
    network = with_new_head(shrunk(load_backbone(name, "none"), edge), recipe, 3, seed=0).to(device)
    runtime = Runtime(device, 4, micro_batch, "")
    job = dataclasses.replace(JOB, runtime=runtime, precision=changes.get("precision", "fp32"))
    return Trainer(network, data, recipe=recipe, job=job)


def assert_close(one: nn.Module, two: nn.Module, **tolerance: float) -> None:
    others = two.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), others[name].cpu(), **tolerance, msg=name)


def test_an_image_is_drawn_to_the_same_bytes(data: Any) -> None:
    here, there = (list(make_trainer(data, device)._batches()) for device in (CPU, CUDA))
    for one, other in zip(here, there, strict=True):
        assert other.pixels.is_cuda
        for mine, sent in zip(one[:3], other[:3], strict=True):
            assert torch.equal(mine, sent.cpu())


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_an_epoch_computes_what_the_cpu_computes(data: Any, optimizer: str) -> None:
    here, there = (make_trainer(data, device, optimizer=optimizer, clip_norm=0.5) for device in (CPU, CUDA))
    for _ in range(2):
        assert there.run_epoch() == pytest.approx(here.run_epoch(), rel=1e-3)
    # Adam moves a weight by its learning rate whatever its gradient: where that is near zero, rounding decides the way.
    moved = 4 * 3 * (RECIPE.lr if optimizer != "sgd" else 1e-4)
    assert_close(there.network, here.network, rtol=1e-3, atol=moved)
    np.testing.assert_allclose(
        *(compute_logits(t.network, data.pictures, job=t.job) for t in (there, here)), rtol=0.02, atol=0.02
    )


def test_what_freezes_later_stays_from_then_on(data: Any) -> None:
    """Graphs of the epochs before hold gradients of it, which no step may take."""
    trainer = make_trainer(data, CUDA, unfreeze="freezeout", epochs=6, weight_decay=0.1, micro_batch=8)
    first = trainer.network.backbone.get_parameter(next(iter(trainer.network.used)))
    moved = []
    for _ in range(6):
        before = first.detach().clone()
        trainer.run_epoch()
        moved.append(not torch.equal(first, before))
    assert moved == [True, True, False, False, False, False]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_in_any_batches_computes_what_the_cpu_computes(batch_size: int) -> None:
    pixels = make_pixels(N, EDGE)
    here, there = (make_trainer(pixels, device, micro_batch=batch_size) for device in (CPU, CUDA))
    expected, found = (compute_logits(t.network, pixels.pictures, job=t.job) for t in (here, there))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_gpu(data: Any, precision: str) -> None:
    """PyTorch itself says which calls would: copies from pageable memory, questions for values. The scores are read late."""
    trainer = make_trainer(data, CUDA, precision=precision, clip_norm=0.5, ema=0.9)
    for _ in range(3 if precision != "fp16" else 8):  # after which whatever size parts have was captured
        trainer.run_epoch()
    torch.cuda.set_sync_debug_mode("error")
    trainer.run_epoch()


def test_copies_do_not_wait_for_work_and_scores_not_for_later_work() -> None:
    torch.cuda.synchronize()
    feed, value = Feed(CUDA), torch.full((3,), 7.0, device=CUDA)
    begun = time.perf_counter()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    read = read_later(value)
    torch.cuda._sleep(4_000_000_000)  # cycles: two seconds or more
    batch = host_tensor((64, EDGE, EDGE, 3), torch.uint8, CUDA)
    batch.fill_(5)
    (sent,) = feed(batch)
    assert feed._stream is not None
    feed._stream.synchronize()
    assert (read() == 7).all()
    assert time.perf_counter() - begun < 1
    del batch
    assert (sent == 5).all()  # waits for the sleep: in order with the caller's work
    assert time.perf_counter() - begun > 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_batch_norms_are_folded_and_steps_replayed(data: Any, name: str, precision: str) -> None:
    """PyTorch's defaults allow TF32, whose rounding is no reason to refuse the folded form."""
    trainer = make_trainer(data, CUDA, name=name, micro_batch=8, edge=224, precision=precision)
    for _ in range(2 if precision != "fp16" else 8):  # whose scale of the loss begins too high
        trainer.run_epoch()
    assert trainer._gpu is not None
    assert trainer._gpu._form is not None
    graphs = trainer._gpu._graphs
    assert graphs
    assert None not in graphs.values()


def test_exhausted_memory_halves_the_micro_batch_to_the_same_step(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    whole = make_trainer(data, CUDA, micro_batch=8, edge=448)
    torch.cuda.reset_peak_memory_stats()
    with monkeypatch.context() as patch:
        patch.setattr(gpu_steps, "_MOST", 0)  # a graph has memory of its own: where there is not enough, there is none
        expected = whole.run_epoch()
    needed = torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(CUDA).total_memory
    less = make_trainer(data, CUDA, micro_batch=8, edge=448)
    del whole
    gc.collect()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.6 * needed)
        assert less.run_epoch() == pytest.approx(expected, rel=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert less.micro_batch < 8


def test_a_stopped_run_goes_on_from_its_state(data: Any) -> None:
    whole, part, again = (make_trainer(data, CUDA) for _ in range(3))
    expected = [whole.run_epoch() for _ in range(2)]
    part.run_epoch()
    again.load_state(copy.deepcopy(part.state()))
    assert again.run_epoch() == pytest.approx(expected[1], rel=1e-3)
    assert_close(again.network, whole.network, rtol=1e-3, atol=6 * RECIPE.lr)
