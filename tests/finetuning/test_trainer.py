"""The training loop against a loop written by hand, and what it must survive: interruptions, no memory, no numbers."""

import copy
import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from test_network import CPU, JOB, make_pixels, shrunk
from torch import nn

from featcache.backbones.load import load_backbone
from featcache.errors import TrainingError, UsageError
from featcache.finetuning.augment import augment
from featcache.finetuning.logits import compute_logits
from featcache.finetuning.network import Network, with_new_head
from featcache.finetuning.recipes import RECIPES, Recipe, choose_recipe
from featcache.finetuning.trainer import (
    Status,
    Stopped,
    Trainer,
    choose_training_precision,
    set_learning_rates,
)
from featcache.system.distributed import Processes

N, EDGE = 11, 32
DATA = make_pixels(N, EDGE)
DROPPING = shrunk(load_backbone("squeezenet1_1", "none"), EDGE)  # it has a dropout layer
BACKBONE = shrunk(load_backbone("resnet18", "none"), EDGE)  # none, but batch norms
SIMPLE = Recipe(about="", hidden=(), optimizer="sgd", lr=0.01, backbone_lr=0.001, momentum=0.9, epochs=3, batch_size=4)


def make_trainer(recipe: Recipe = SIMPLE, *, micro_batch: int = 4, backbone: Any = BACKBONE, **changes: Any) -> Trainer:
    network = with_new_head(backbone, recipe, 3, seed=0)
    runtime = dataclasses.replace(CPU, batch_size=micro_batch)
    return Trainer(network, DATA, recipe=recipe, job=dataclasses.replace(JOB, runtime=runtime, **changes))


def assert_same(one: nn.Module, two: nn.Module) -> None:
    others = two.state_dict()
    assert one.state_dict().keys() == others.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, others[name]), name


def test_an_epoch_is_the_loop_one_would_write_by_hand() -> None:
    changes = {"label_smoothing": 0.1, "weight_decay": 0.01, "clip_norm": 0.5, "augmentation": (("flip", 0.5),)}
    recipe = dataclasses.replace(SIMPLE, **changes, optimizer="adamw", lr=1e-4, backbone_lr=1e-5)
    trainer = make_trainer(recipe, micro_batch=3)
    network = copy.deepcopy(trainer.network).requires_grad_(True)
    loss, hits = trainer.run_epoch()

    head = {id(p) for p in network.head.parameters()}
    groups = [
        {"params": [p], "lr": 1e-4 if id(p) in head else 1e-5, "weight_decay": 0.01 if p.ndim > 1 else 0.0}
        for p in network.parameters()
    ]
    optimizer = torch.optim.AdamW(groups)
    network.eval()  # batch norms frozen, and nothing else here behaves otherwise in training
    losses, right = [], 0
    order = np.random.default_rng([0, 0]).permutation(N)
    for batch in np.array_split(order, 3):
        pixels = [
            augment(torch.from_numpy(DATA.pictures[k]), recipe.augmentation, size=(EDGE, EDGE), seed=(0, 0, int(k)))
            for k in batch
        ]
        y = torch.from_numpy(DATA.labels[batch])
        optimizer.zero_grad()
        logits = network(torch.stack(pixels))
        value = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, y)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        losses += [value.item()] * len(batch)
        right += int((logits.argmax(1) == y).sum())
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert hits == pytest.approx(right / N)
    for name, tensor in trainer.network.state_dict().items():
        torch.testing.assert_close(tensor, network.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


def test_accumulation_is_a_larger_batch() -> None:
    large = make_trainer(dataclasses.replace(SIMPLE, batch_size=8))
    added = make_trainer(dataclasses.replace(SIMPLE, batch_size=4, accumulation=2))
    assert large.steps_per_epoch == added.steps_per_epoch == 2
    large.run_epoch()
    added.run_epoch()
    assert_same(large.network, added.network)


RESUMED = [name for name in RECIPES if name not in ("ants-bees-frozen", "flowers-frozen")]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_stopped_after_any_step_continues_to_the_same_bits(name: str) -> None:
    recipe = dataclasses.replace(choose_recipe(name, N, epochs=3, batch_size=4), accumulation=1)
    recipe = dataclasses.replace(recipe, hidden=(5,) if recipe.hidden else (), dropout=(0.5,) if recipe.hidden else ())
    backbone = BACKBONE if recipe.batchnorm == "train" else DROPPING
    whole = make_trainer(recipe, backbone=backbone)
    expected = [whole.run_epoch() for _ in range(3)]
    part = make_trainer(recipe, backbone=backbone)
    seen = []
    stops = iter([False, True, False, False, True, True])  # after step 1, after step 3, and at once
    while part.epoch < 3:
        try:
            seen.append(part.run_epoch(stop=lambda: next(stops, False)))
        except Stopped:
            state = copy.deepcopy(part.state())
            torch.manual_seed(99)  # the caller's random state is used by nothing
            part = make_trainer(recipe, backbone=backbone)
            part.load_state(state)
    assert next(stops, None) is None
    assert seen == expected
    assert_same(whole.network, part.network)
    assert_same(whole.evaluated, part.evaluated)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "ieee"), ("bf16", "tf32")])
def test_float32_is_float32_in_steps_and_in_the_loss_before_them(
    precision: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's TF32 would move that loss by more than it may differ from the cached head's."""
    switch: Any = torch.backends.cudnn.conv
    before, trainer, seen = switch.fp32_precision, make_trainer(precision=precision), list[str]()
    trainer.network.register_forward_pre_hook(lambda *_: seen.append(switch.fp32_precision))
    trainer.network.head.register_forward_pre_hook(lambda *_: seen.append(switch.fp32_precision))
    try:
        switch.fp32_precision = "tf32"
        trainer.logits_in_training(DATA, np.arange(3))
        first = len(seen)
        trainer.run_epoch()
    finally:
        switch.fp32_precision = before
    assert 0 < first < len(seen)
    assert set(seen) == {expected}


def test_the_moving_average_is_that_of_the_weights_after_each_step() -> None:
    """Its decay grows, so that it is not stuck at its start: after n steps (1 + n) / (10 + n), or what the recipe says, if that is less."""
    trainer = make_trainer(dataclasses.replace(SIMPLE, ema=0.3, batchnorm="train"))
    expected: dict[str, torch.Tensor] = {}

    def follow(_: Status) -> None:
        n = trainer.step - 1
        decay = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        for name, now in trainer.network.state_dict().items():
            moves = n and name in dict(trainer.network.named_parameters())
            expected[name] = decay * expected[name] + (1 - decay) * now if moves else now.clone()

    for _ in range(3):
        trainer.run_epoch(on_step=follow)
    assert (1 + 3) / (10 + 3) > 0.3  # both of them decided
    found = trainer.evaluated.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    counted = [value for name, value in found.items() if name.endswith("num_batches_tracked")]
    assert counted and set(map(int, counted)) == {9}


@dataclasses.dataclass(frozen=True)
class Counted(Processes):
    """One process that remembers, as real ones do, for which parameters it wrapped the network."""

    wrapped: list[int] = dataclasses.field(default_factory=list)

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        self.wrapped.append(sum(parameter.requires_grad for parameter in network.parameters()))
        return super().wrap(network, device)


def test_the_network_is_wrapped_again_only_where_other_parameters_train() -> None:
    for unfreeze, epochs, times in (("all", 2, 1), ("gradual", 4, 3)):  # of four: the head, half of it, all, all
        recipe, processes = dataclasses.replace(SIMPLE, epochs=epochs, unfreeze=unfreeze, batch_size=11), Counted()
        trainer = make_trainer(recipe, processes=processes)
        for _ in range(epochs):
            trainer.run_epoch()
        assert len(processes.wrapped) == times
        assert processes.wrapped == sorted(set(processes.wrapped))
        assert processes.wrapped[-1] == len(list(trainer.network.parameters()))


def test_batch_norms_cannot_train_on_single_images() -> None:
    with pytest.raises(UsageError, match="at least two images per step"):
        make_trainer(dataclasses.replace(SIMPLE, batchnorm="train", batch_size=1))


def test_progress_reports_the_epoch_so_far() -> None:
    seen: list[Status] = []
    trainer = make_trainer()
    loss, hits = trainer.run_epoch(on_step=seen.append)
    assert [status.done for status in seen] == [4, 8, 11]
    assert {(status.epoch, status.epochs, status.total) for status in seen} == {(1, 3, 11)}
    assert (seen[0].loss, seen[-1].loss) == pytest.approx((trainer.state()["first_loss"], loss))
    assert seen[-1].accuracy == pytest.approx(hits)


def test_a_loss_that_nobody_has_waited_for_is_no_number() -> None:
    trainer = make_trainer()
    assert trainer._status().scores == "loss not known yet"
    trainer._sums = np.array([6.0, 3.0, 4.0])
    assert trainer._status().scores == "loss 1.5000, accuracy 75.00%"


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    trainer = make_trainer(recipe)
    found = []
    for step in range(steps_per_epoch * (recipe.epochs or 1)):
        set_learning_rates(trainer.optimizer, recipe, step, steps_per_epoch)
        found.append(trainer.optimizer.param_groups[0]["lr"])
    return found


def test_learning_rates_over_time() -> None:
    cosine = rates(dataclasses.replace(SIMPLE, schedule="cosine", warmup=0.2, epochs=10), 5)
    assert cosine[:10] == pytest.approx([0.001 * k for k in range(1, 11)])
    assert cosine[10] == pytest.approx(0.01)
    assert cosine[30] == pytest.approx(0.005)
    assert 0 < cosine[-1] < 1e-4
    step = rates(dataclasses.replace(SIMPLE, schedule="step", step_epochs=2, gamma=0.1, epochs=5), 3)
    assert step == pytest.approx([0.01] * 6 + [0.001] * 6 + [0.0001] * 3)
    assert rates(SIMPLE, 2) == [0.01] * 6


def refuse_more_than(limit: int, network: Network) -> None:
    """Make ``network`` run out of memory with more than ``limit`` images."""
    forward = network.head.forward

    def limited(embeddings: torch.Tensor) -> torch.Tensor:
        if len(embeddings) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(embeddings)

    network.head.forward = limited  # type: ignore[method-assign]


def test_out_of_memory_halves_the_micro_batch_and_not_the_batch_down_to_one(caplog: pytest.LogCaptureFixture) -> None:
    whole = make_trainer(micro_batch=1)
    loss, _ = whole.run_epoch()
    trainer = make_trainer(micro_batch=4)
    refuse_more_than(1, trainer.network)
    assert trainer.run_epoch()[0] == pytest.approx(loss, rel=1e-4)
    assert trainer.micro_batch == 1
    assert [record.getMessage() for record in caplog.records if "out of memory with 4" in record.getMessage()]
    assert_same(trainer.network, whole.network)
    refuse_more_than(0, trainer.network)
    with pytest.raises(UsageError, match="1 image at once does not fit .* smaller --crop"):
        trainer.run_epoch()


def test_retrying_lets_go_of_what_the_failed_attempt_held() -> None:
    """Activations of an attempt that ran out of memory are gone when the next one starts, in training and in evaluation."""
    trainer, held, alive = make_trainer(micro_batch=4), list[Any](), list[bool]()
    forward = trainer.network.head.forward

    def limited(pixels: torch.Tensor) -> torch.Tensor:
        alive.extend(reference() is not None for reference in held)
        held.clear()
        activation = forward(pixels)
        if len(pixels) > 2:
            held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return activation

    trainer.network.head.forward = limited  # type: ignore[method-assign]
    trainer.run_epoch()
    assert (trainer.micro_batch, alive) == (2, [False])
    trainer.micro_batch = 4
    trainer.logits_in_training(DATA, np.arange(N))
    assert (trainer.micro_batch, alive) == (2, [False] * 2)
    job = dataclasses.replace(JOB, runtime=dataclasses.replace(CPU, batch_size=4))
    four = make_pixels(4, EDGE)
    logits = compute_logits(trainer.network, four.pictures, job=job)
    assert alive == [False] * 3
    trainer.network.head.forward = forward  # type: ignore[method-assign]
    np.testing.assert_allclose(logits, compute_logits(trainer.network, four.pictures, job=job), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (
            {"lr": 9e5, "backbone_lr": 6e5},
            r"1: most likely .* \(900000 for .*\(--lr 3e\+05 --backbone-lr 2e\+05 --force\)",
        ),
        (
            {"lr": 30.0, "backbone_lr": 0.0},
            r"training diverges: the mean loss of epoch 1 .*; try a third .* \(--lr 10 --force\)",
        ),
    ],
)
def test_a_loss_that_is_no_number_or_explodes_stops_the_run(rates: dict[str, float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make_trainer(dataclasses.replace(SIMPLE, **rates)).run_epoch()


def test_a_start_far_above_a_guess_is_no_divergence() -> None:
    """A new head may start anywhere; what the loss was at first is part of the state."""

    def high(**rates: float) -> Trainer:
        trainer = make_trainer(dataclasses.replace(SIMPLE, **rates))
        trainer.network.head[-1].weight.data *= 300
        return trainer

    whole, part, again = (high(lr=1e-9, backbone_lr=0.0) for _ in range(3))
    loss, _ = whole.run_epoch()
    assert loss > 10 * np.log(3)
    stops = iter([False, True])
    with pytest.raises(Stopped):
        part.run_epoch(stop=lambda: next(stops))
    again.load_state(copy.deepcopy(part.state()))
    assert again.run_epoch()[0] == loss
    assert again.state()["first_loss"] == whole.state()["first_loss"] != loss
    with pytest.raises(
        TrainingError, match=r"epoch 1 is \d\S+, before the first step it was \d\S+, guessing gives 1.1;"
    ):
        high(lr=1e3, backbone_lr=0.0).run_epoch()


def test_training_takes_bfloat16_where_the_cpu_multiplies_it(bf16_arithmetic: bool) -> None:
    assert choose_training_precision("auto", CPU.device) == ("bf16" if bf16_arithmetic else "fp32")
    assert choose_training_precision("fp32", CPU.device) == "fp32"


def test_bfloat16_stays_near_float32() -> None:
    one, other = make_trainer(), make_trainer(precision="bf16")
    a, b = one.run_epoch()[0], other.run_epoch()[0]
    assert a != b
    assert a == pytest.approx(b, rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in other.network.parameters())


def test_memory_runs_out_on_mps_in_other_words() -> None:
    """In training, and before it, where the loss is compared with the head's."""
    trainer = make_trainer(micro_batch=4)
    forward = trainer.network.head.forward

    def limited(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 2:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)")
        return forward(pixels)

    trainer.network.head.forward = limited  # type: ignore[method-assign]
    trainer.run_epoch()
    assert trainer.micro_batch == 2
    trainer.micro_batch = 4
    trainer.logits_in_training(DATA, np.arange(N))
    assert trainer.micro_batch == 2


@pytest.mark.parametrize(("precision", "inside"), [("fp32", "ieee"), ("bf16", "tf32")])
def test_training_and_evaluation_in_float32_are_not_rounded(precision: str, inside: str) -> None:
    switch, seen = torch.backends.cudnn.conv, []
    trainer = make_trainer(precision=precision)
    trainer.network.head.register_forward_pre_hook(lambda *_: seen.append(switch.fp32_precision))
    trainer.run_epoch()
    assert set(seen) == {inside}
    seen.clear()
    compute_logits(trainer.network, trainer.data.pictures, job=trainer.job)
    assert set(seen) == {"ieee"}
    assert switch.fp32_precision == "tf32"
