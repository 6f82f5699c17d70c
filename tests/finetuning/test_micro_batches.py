"""Parts of a batch on several cores: the same bits for any number of them, one gradient for any cutting; several cores a part."""

import copy
import dataclasses
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pytest
import torch
from test_network import CPU, JOB, make_pixels, shrunk
from torch import nn

from featcache.backbones.load import load_backbone
from featcache.finetuning.micro_batches import MicroBatches, OwnThread, in_order
from featcache.finetuning.network import unfreeze, with_new_head
from featcache.finetuning.recipes import Recipe
from featcache.finetuning.trainer import Stopped, Trainer, make_optimizer

N, EDGE = 12, 32
DATA = make_pixels(N, EDGE)
MOBILE = shrunk(load_backbone("mobilenet_v3_small", "none"), EDGE)
DROPPING = shrunk(load_backbone("efficientnet_b0", "none"), EDGE)  # stochastic depth in its blocks
RECIPE = Recipe(
    about="", hidden=(8, 8), dropout=(0.3, 0.3), optimizer="adamw", lr=1e-3, backbone_lr=1e-4, epochs=2, batch_size=6
)


def trained(recipe: Recipe, *, workers: int, micro: int, backbone: object = MOBILE, precision: str = "fp32") -> Trainer:
    network = with_new_head(backbone, recipe, 3, seed=0)  # type: ignore[arg-type]
    runtime = dataclasses.replace(CPU, workers=workers, batch_size=micro)
    job = dataclasses.replace(JOB, precision=precision, runtime=runtime)
    trainer = Trainer(network, DATA, recipe=recipe, job=job)
    trainer.run_epoch()
    return trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cores_change_no_bit(precision: str, bf16_arithmetic: bool) -> None:
    if precision == "bf16" and not bf16_arithmetic:
        pytest.skip("nothing is fused here")
    one, *others = (trained(RECIPE, workers=n, micro=2, precision=precision).network.state_dict() for n in (1, 2, 3))
    for other in others:
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("batchnorm", "micro", "each"), [("train", 2, 4), ("frozen", 3, 2), ("frozen", 2, 1)])
def test_a_run_goes_on_by_the_cores_that_it_began_with(
    batchnorm: Literal["train", "frozen"], micro: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any machine: where several of them share a part, another number of them rounds sums otherwise."""
    monkeypatch.setattr(OwnThread, "is_crowded", lambda _: False)  # whatever else this machine does now
    recipe, threads = dataclasses.replace(RECIPE, batchnorm=batchnorm), set()

    def begun(workers: int) -> Trainer:
        network = with_new_head(MOBILE, recipe, 3, seed=0)
        network.head.register_forward_hook(lambda *_: threads.add(torch.get_num_threads()))
        job = dataclasses.replace(JOB, runtime=dataclasses.replace(CPU, workers=workers, batch_size=micro))
        return Trainer(network, DATA, recipe=recipe, job=job)

    whole = begun(4)
    expected = [whole.run_epoch() for _ in range(2)]
    assert threads == {each}
    part, steps = begun(4), itertools.count()
    with pytest.raises(Stopped):
        part.run_epoch(stop=lambda: next(steps) == 1)
    for workers in (1, 3, 9):
        resumed = begun(workers)
        resumed.load_state(copy.deepcopy(part.state()))
        assert [resumed.run_epoch() for _ in range(2)] == expected
        for name, tensor in whole.network.state_dict().items():
            assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    assert threads == {each}


def test_so_it_does_where_parts_cannot_be_computed_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout that belongs to no image: the plain network, one part after the other."""
    monkeypatch.setattr(MicroBatches, "possible", lambda _: False)
    network, threads, before = with_new_head(MOBILE, RECIPE, 3, seed=0), set(), torch.get_num_threads()
    network.head.register_forward_hook(lambda *_: threads.add(torch.get_num_threads()))
    trainer = Trainer(network, DATA, recipe=RECIPE, job=JOB)
    trainer.load_state(trainer.state() | {"cores": before + 2})
    monkeypatch.setattr(trainer.optimizer, "step", lambda: threads.add(torch.get_num_threads()))
    trainer.run_epoch()
    assert (threads, torch.get_num_threads()) == ({before + 2}, before)


@pytest.mark.parametrize("changes", [{}, {"backbone_dropout": True}, {"drop_path": 0.3}])
def test_the_cutting_changes_only_rounding(changes: dict[str, object]) -> None:
    """Dropout of the head, and stochastic depth of the backbone, are drawn for an image, whichever part it is in."""
    recipe = dataclasses.replace(RECIPE, optimizer="sgd", lr=1e-2, backbone_lr=1e-3, **changes)
    a, b = (trained(recipe, workers=1, micro=micro, backbone=DROPPING) for micro in (6, 1))
    assert a._first_loss == pytest.approx(b._first_loss, rel=1e-5)
    start = with_new_head(DROPPING, recipe, 3, seed=0)
    rows = [torch.cat([p.detach().reshape(-1) for p in n.parameters()]) for n in (start, a.network, b.network)]
    moved, apart = float((rows[1] - rows[0]).norm()), float((rows[1] - rows[2]).norm())
    assert apart < 0.01 * moved


@pytest.mark.parametrize("unfreeze", ["head", "last-stage", "gradual"])
def test_what_the_recipe_freezes_stays(unfreeze: str) -> None:
    recipe = dataclasses.replace(RECIPE, unfreeze=unfreeze)  # type: ignore[arg-type]
    start = with_new_head(MOBILE, recipe, 3, seed=0)
    trainer = trained(recipe, workers=2, micro=2)

    def moved() -> list[bool]:
        pairs = zip(trainer.network.backbone.parameters(), start.backbone.parameters(), strict=True)
        return [not torch.equal(a, b) for a, b in pairs]

    after = moved()
    assert any(after) == (unfreeze == "last-stage")  # gradual: the first epoch is the head's
    assert not after[0]
    trainer.run_epoch()
    assert any(moved()) == (unfreeze != "head")
    assert moved()[0] == (unfreeze == "gradual")


def test_what_the_recipe_freezes_later_stays_from_then_on() -> None:
    """With weight decay and what the optimizer remembers of gradients, neither of which moves it further."""
    recipe = dataclasses.replace(RECIPE, unfreeze="freezeout", epochs=5, weight_decay=0.1)
    trainer = trained(recipe, workers=2, micro=2)
    named, moved = dict(trainer.network.backbone.named_parameters()), []
    for _ in range(
        4
    ):  # the second to the fifth epoch, of which the second is the last one of all, the fifth the one of half
        before = {name: p.detach().clone() for name, p in named.items()}
        trainer.run_epoch()
        moved.append({name for name, p in named.items() if not torch.equal(p, before[name])})
    still = {}
    for depth in ("most", "half"):
        unfreeze(trainer.network, dataclasses.replace(recipe, unfreeze=depth), epoch=0)  # type: ignore[arg-type]
        still[depth] = {name for name, p in named.items() if not p.requires_grad}
    assert still["most"] < still["half"] and still["most"] & moved[0]
    assert [bool(later & still["most"]) for later in moved] == [True, False, False, False]
    assert [bool(later & (still["half"] - still["most"])) for later in moved] == [True, True, True, False]
    assert all(moved)


def test_batch_norms_that_train_see_the_whole_batch() -> None:
    """Against a step written by hand: statistics and weights."""
    recipe = dataclasses.replace(
        RECIPE, hidden=(), dropout=(), optimizer="sgd", batchnorm="train", epochs=1, batch_size=N
    )
    start = with_new_head(MOBILE, recipe, 3, seed=0)
    network, trainer = copy.deepcopy(start), trained(recipe, workers=2, micro=2)
    network.requires_grad_(True).train()
    network.backbone.eval()
    for norm in (m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train()
    optimizer = make_optimizer(network, recipe)
    order = np.random.default_rng([0, 0]).permutation(N)
    pixels = torch.from_numpy(np.stack([DATA.pictures[k] for k in order]))
    nn.functional.cross_entropy(network(pixels), torch.from_numpy(DATA.labels[order])).backward()
    optimizer.step()
    initial = start.state_dict()
    for name, tensor in network.state_dict().items():
        moved = float((tensor - initial[name]).float().norm())
        apart = float((tensor - trainer.network.state_dict()[name]).float().norm())
        assert apart <= 0.02 * moved + 1e-6, name


@pytest.mark.parametrize(
    ("batchnorm", "micro", "own_thread", "cores"),
    [("train", 2, True, 2), ("frozen", 6, True, 2), ("frozen", 3, False, 1)],
)
def test_a_batch_that_is_one_part_is_computed_here_by_all_cores(
    batchnorm: Literal["train", "frozen"], micro: int, own_thread: bool, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP puts its threads to sleep after every call as soon as there are more of them than cores, as with another team."""
    recipe = dataclasses.replace(RECIPE, hidden=(), dropout=(), batchnorm=batchnorm)
    network, seen, outside = with_new_head(MOBILE, recipe, 3, seed=0), set(), set()
    before = torch.get_num_threads()
    network.head.register_forward_hook(lambda *_: seen.add((threading.get_ident(), torch.get_num_threads())))
    runtime = dataclasses.replace(CPU, workers=2, batch_size=micro)
    trainer = Trainer(network, DATA, recipe=recipe, job=dataclasses.replace(JOB, runtime=runtime))
    monkeypatch.setattr(trainer.optimizer, "step", lambda: outside.add(torch.get_num_threads()))
    monkeypatch.setattr(OwnThread, "is_crowded", lambda _: False)  # whatever else this machine does now
    trainer.run_epoch()
    assert {thread == threading.get_ident() for thread, _ in seen} == {own_thread}
    assert {threads for _, threads in seen} == {cores}
    assert outside == {1}  # a norm of gradients is the same sum, wherever the part was computed
    assert torch.get_num_threads() == before


def test_threads_sleep_between_calls_where_others_want_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on another thread computes, with as many cores, to the same bits."""
    recipe = dataclasses.replace(RECIPE, batchnorm="train", batch_size=4)

    def run() -> tuple[list[bool], dict[str, torch.Tensor]]:
        network, here = with_new_head(MOBILE, recipe, 3, seed=0), list[bool]()
        network.head.register_forward_hook(lambda *_: here.append(threading.get_ident() == caller))
        runtime = dataclasses.replace(CPU, workers=2)
        Trainer(network, DATA, recipe=recipe, job=dataclasses.replace(JOB, runtime=runtime)).run_epoch()
        return here, network.state_dict()

    caller, before, asked = threading.get_ident(), torch.get_num_threads(), itertools.count(1)
    monkeypatch.setattr(OwnThread, "is_crowded", lambda _: False)  # whatever else this machine does now
    alone, expected = run()
    monkeypatch.setattr(OwnThread, "is_crowded", lambda _: next(asked) == 2)
    crowded, found = run()
    assert (alone, crowded) == ([True] * 3, [True, True, False])
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("cores", "busy", "crowded"), [(2, 1.9, False), (2, 1.0, True), (8, 4.0, True), (1, 1.0, False)]
)
def test_crowding_is_having_far_fewer_cores_than_are_kept_busy(cores: int, busy: float, crowded: bool) -> None:
    clock, worked, found = [100.0], [5.0], list[bool]()
    thread = OwnThread(cores, seconds=lambda: clock[0], worked=lambda: worked[0])
    for _ in range(16):
        clock[0], worked[0] = clock[0] + 0.125, worked[0] + 0.125 * busy
        found.append(thread.is_crowded())
    assert found == ([False] * 7 + [crowded]) * 2


def test_results_come_in_order_and_few_at_a_time() -> None:
    alive, most, lock = 0, 0, threading.Lock()

    def compute(part: int) -> int:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.01 if part == 0 else 0)  # the first one is done last
        return part

    with ThreadPoolExecutor(3) as pool:
        found = []
        for part in in_order(pool, compute, range(20), ahead=3):
            alive -= 1
            found.append(part)
    assert found == list(range(20))
    assert most <= 4


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_fused_optimizers_step_as_plain_ones(kind: str) -> None:
    """In one pass over weights whose layout is channels-last, gradients as autograd lays them."""
    recipe = dataclasses.replace(RECIPE, optimizer=kind, weight_decay=0.1)  # type: ignore[arg-type]
    networks = [with_new_head(MOBILE, recipe, 3, seed=0).requires_grad_(True) for _ in range(2)]
    fused, plain = (make_optimizer(network, recipe) for network in networks)
    assert all(group["fused"] for group in fused.param_groups)
    for group in plain.param_groups:
        group["fused"], group["foreach"] = None, False
    pixels = torch.from_numpy(np.stack(DATA.pictures[:4]))
    for _ in range(2):
        for network, optimizer in zip(networks, (fused, plain), strict=True):
            network.zero_grad()
            network.eval()(pixels).square().mean().backward()
            optimizer.step()
    start = with_new_head(MOBILE, recipe, 3, seed=0)
    for (name, a), b, c in zip(
        networks[0].named_parameters(), networks[1].parameters(), start.parameters(), strict=True
    ):
        assert float((a - b).detach().norm()) <= 0.02 * float((b - c).detach().norm()) + 1e-6, name
