"""Scores between the steps of an epoch: they change nothing, are those of a loop written by hand, and survive interruptions."""

import copy
import dataclasses
import itertools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_network import CPU, JOB, make_pixels
from test_trainer import DATA, DROPPING, EDGE, SIMPLE, assert_same
from torch.nn import functional

from featcache.errors import Interrupted, TrainingError
from featcache.finetuning.checkpoint import Checkpoint, hold_work
from featcache.finetuning.logits import compute_logits
from featcache.finetuning.loop import Loop
from featcache.finetuning.network import Network, with_new_head
from featcache.finetuning.recipes import Recipe
from featcache.finetuning.trainer import Status, Trainer
from featcache.system.signals import StopRequest

VAL = make_pixels(7, EDGE)
N = len(DATA)  # 11: steps of 4, 4 and 3 images
EVERY_2 = dataclasses.replace(SIMPLE, eval_every=2)


class Clock:
    """Tells the seconds that it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_trainer(recipe: Recipe, *, clock: Clock | None = None) -> Trainer:
    job = dataclasses.replace(
        JOB, output=Path("ft"), runtime=dataclasses.replace(CPU, batch_size=4), clock=clock or Clock()
    )
    return Trainer(with_new_head(DROPPING, recipe, 3, seed=0), DATA, recipe=recipe, job=job)


def train(
    trainer: Trainer, *, on_step: Callable[[Status], None] | None = None, pays: bool = True, **how: Any
) -> tuple[Loop, list[Any]]:
    """The loop, at its end, and the states of its checkpoints."""
    saved: list[Any] = []
    kept = SimpleNamespace(position="", written=1000.0, pays=pays)

    def save() -> None:
        trainer.check_weights()
        saved.append(copy.deepcopy(trainer.state()))

    kept.save = save
    how.setdefault("asked", StopRequest())
    loop = Loop(trainer, VAL, checkpoint=kept, on_step=on_step, **how)  # type: ignore[arg-type]
    try:
        loop.train()
    except Interrupted:
        assert how["asked"]
    return loop, saved


def decided(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what is recorded only."""
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in rows
    ]


def val_scores(network: Network) -> tuple[float, float]:
    """Mean loss and accuracy, by PyTorch alone."""
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(torch.from_numpy(np.stack(VAL.pictures)))
    y = torch.from_numpy(VAL.labels)
    return functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_scores_between_steps_are_those_of_the_network_there_and_change_nothing(ema: float) -> None:
    recipe = dataclasses.replace(SIMPLE, ema=ema, hidden=(5,), dropout=(0.5,), backbone_dropout=True)
    undisturbed, scored = (make_trainer(dataclasses.replace(recipe, eval_every=every)) for every in (None, 2))
    found: dict[int, tuple[float, float]] = {}

    def look(status: Status) -> None:
        found[undisturbed.step] = val_scores(undisturbed.evaluated)

    train(undisturbed, on_step=look)
    train(scored)
    assert_same(undisturbed.network, scored.network)
    assert [(row["epoch"], row["step"]) for row in scored.history] == [(1, 2), (1, 3), (2, 4), (2, 6), (3, 8), (3, 9)]
    assert [(row["epoch"], row["step"]) for row in undisturbed.history] == [(1, 3), (2, 6), (3, 9)]
    for row in scored.history:
        assert (row["val_loss"], row["val_accuracy"]) == pytest.approx(found[row["step"]], rel=1e-4), row
    best = max(scored.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert (scored.best["epoch"], scored.best["step"]) == (best["epoch"], best["step"])


def test_an_epoch_is_not_called_the_best_where_the_cached_head_is_as_good(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train(found := make_trainer(SIMPLE), to_beat=lambda: pytest.fail("a new head has none to beat"))
    best, to_beat = found.best["epoch"] - 1, (found.best["accuracy"], -found.best["loss"])
    assert caplog.messages[best].endswith(" (best so far)")
    for beaten, words in (
        ((to_beat[0], to_beat[1] - 1e-3), " (best so far)"),
        (to_beat, f" (best epoch so far; the frozen head: {to_beat[0]:.2%})"),
        ((1.0, -0.1), " (best epoch so far; the frozen head: 100.00%, which only a smaller loss can beat)"),
    ):
        caplog.clear()
        trainer = make_trainer(SIMPLE)
        trainer.recipe = dataclasses.replace(SIMPLE, hidden=None)  # as if the network had begun as a cached head's
        train(trainer, to_beat=lambda beaten=beaten: beaten)
        assert caplog.messages[best].endswith(words)


def test_an_epoch_that_is_sooner_trained_than_saved_waits_for_later_ones() -> None:
    for pays, saved in ((True, [1, 2, 3]), (False, [3])):  # a finished run is always saved
        _, states = train(make_trainer(SIMPLE), pays=pays)
        assert [state["epoch"] for state in states] == saved


@pytest.mark.parametrize(("takes", "after", "pays"), [(0.125, 0.0, True), (3.0, 26.9, False), (3.0, 27.0, True)])
def test_checkpoints_take_a_tenth_of_the_time_at_most(
    takes: float, after: float, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    trainer = make_trainer(SIMPLE, clock=clock)
    trainer.job = dataclasses.replace(trainer.job, output=tmp_path / "ft")

    def save(*_: Any) -> None:
        clock.now += takes

    monkeypatch.setattr("featcache.finetuning.checkpoint.save_state", save)
    with hold_work(trainer.job, force=False):
        kept = Checkpoint(trainer, {})
        assert kept.pays  # the first one
        kept.save()
        clock.now += after
        assert kept.pays == pays


def test_a_row_tells_of_the_images_since_the_one_before() -> None:
    trainer = make_trainer(dataclasses.replace(EVERY_2, lr=1e-12, backbone_lr=0.0, epochs=2))  # nothing moves
    train(trainer)
    with torch.no_grad():
        logits = copy.deepcopy(trainer.network).eval()(torch.from_numpy(np.stack(DATA.pictures)))
    losses = functional.cross_entropy(logits, torch.from_numpy(DATA.labels), reduction="none").numpy()
    right = logits.argmax(1).numpy() == DATA.labels
    for row, images in zip(trainer.history, [[0, 1], [2], [0], [1, 2]], strict=True):
        order = np.random.default_rng([0, row["epoch"] - 1]).permutation(N)
        since = np.concatenate([np.array_split(order, 3)[step] for step in images])
        assert row["train_loss"] == pytest.approx(losses[since].mean(), rel=1e-4)
        assert row["train_accuracy"] == pytest.approx(right[since].mean())


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_stopped_after_any_step_has_the_same_rows_and_best(stop: int) -> None:
    recipe = dataclasses.replace(EVERY_2, hidden=(5,), dropout=(0.5,), epochs=2)
    whole, part, again = (make_trainer(recipe) for _ in range(3))
    train(whole)
    steps, asked = itertools.count(1), StopRequest()

    def interrupt(status: Status) -> None:
        if next(steps) == stop:
            asked.signal = signal.SIGTERM

    _, saved = train(part, on_step=interrupt, asked=asked)
    again.load_state(saved[-1])
    train(again)
    assert decided(again.history) == decided(whole.history)
    assert_same(whole.network, again.network)
    for name, tensor in whole.best["weights"].items():
        assert torch.equal(tensor, again.best["weights"][name]), name


def test_patience_counts_whole_epochs_after_the_best_score(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.2, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3])  # the best within epoch 2, at step 4
    monkeypatch.setattr("featcache.finetuning.loop.score", lambda *_: (next(scores), -1.0))
    trainer = make_trainer(dataclasses.replace(EVERY_2, epochs=9, patience=2))
    train(trainer)
    assert (trainer.best["epoch"], trainer.best["step"], trainer.epoch) == (2, 4, 4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By it a step takes 10 s."""
    clock, run_epoch = Clock(), Trainer.run_epoch

    def timed(self: Trainer, *, on_step: Any, stop: Any) -> Any:
        def after(status: Status) -> None:
            clock.now += 10
            on_step(status)

        return run_epoch(self, on_step=after, stop=stop)

    monkeypatch.setattr(Trainer, "run_epoch", timed)
    return clock


def test_seconds_and_rates_are_those_of_the_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score takes 5 s; an interruption of an hour counts nowhere."""

    def slow(*what: Any, **how: Any) -> Any:
        clock.now += 5
        return compute_logits(*what, **how)

    monkeypatch.setattr("featcache.finetuning.loop.compute_logits", slow)
    steps, asked = itertools.count(1), StopRequest()

    def interrupt(status: Status) -> None:
        if next(steps) == 4:
            asked.signal = signal.SIGTERM

    _, saved = train(make_trainer(EVERY_2, clock=clock), on_step=interrupt, asked=asked)
    clock.now += 3600
    trainer = make_trainer(EVERY_2, clock=clock)
    trainer.load_state(saved[-1])
    train(trainer)
    assert [row["seconds"] for row in trainer.history] == [25, 40, 55, 80, 105, 120]
    assert [row["images_per_second"] for row in trainer.history] == [pytest.approx(N / 3 / 10, rel=1e-3)] * 6


@pytest.mark.parametrize(
    ("seconds", "rows", "out_of_time"),
    [
        (math.inf, [3, 6, 9], False),
        (90, [3, 6, 9], False),  # used up after the last step: it was in time
        (80, [3, 6, 8], True),
        (60, [3, 6], True),  # at the end of an epoch, which is scored once
        (5, [1], True),
        (0, [], True),
    ],
)
def test_time_that_is_used_up_ends_training_with_a_score_of_what_there_is(
    clock: Clock, seconds: float, rows: list[int], out_of_time: bool
) -> None:
    trainer = make_trainer(SIMPLE, clock=clock)
    loop, saved = train(trainer, seconds=seconds)
    assert ([row["step"] for row in trainer.history], loop.out_of_time) == (rows, out_of_time)
    if out_of_time and rows:  # killed before the model is there, it ends the same when it is resumed
        again = make_trainer(SIMPLE, clock=clock)
        again.load_state(saved[-1])
        loop, _ = train(again, seconds=seconds)
        assert loop.out_of_time and again.history == trainer.history


def break_weights(trainer: Trainer) -> None:
    trainer.network.head[-1].bias.data.fill_(math.nan)


def break_average(trainer: Trainer) -> None:
    trainer.evaluated.head[-1].bias.data.fill_(math.nan)


def explode(trainer: Trainer) -> None:
    trainer._sums[0] = 1e9


# What breaks, after which step of nine, what is found, how many epochs are scored before.
BREAKS = {
    "the loss": (break_weights, 7, "the loss is nan at step 2 of epoch 3", 2),
    "the mean loss": (explode, 9, "training diverges: the mean loss of epoch 3", 2),
    "the scores": (break_average, 9, "the loss on val is nan after epoch 3", 2),
    "the weights": (break_weights, 9, "weights are not finite after step 0 of epoch 4", 3),
}


@pytest.mark.parametrize("name", BREAKS)
def test_training_that_breaks_ends_with_the_best_before(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """As if the recipe had had so many epochs; where none was better than the start, or a signal asks, it fails."""
    broken, step, message, epochs = BREAKS[name]
    recipe = dataclasses.replace(SIMPLE, ema=0.5)
    whole = make_trainer(dataclasses.replace(recipe, epochs=epochs))
    train(whole)

    def run(**how: Any) -> tuple[Trainer, Loop, list[Any]]:
        trainer = make_trainer(recipe)

        def on_step(status: Status) -> None:
            if trainer.step == step:
                broken(trainer)
                if "asked" in how:
                    how["asked"].signal = signal.SIGTERM

        return trainer, *train(trainer, on_step=on_step, **how)

    trainer, loop, saved = run()
    assert (loop.diverged, loop.out_of_time, trainer.best["epoch"]) == (True, False, whole.best["epoch"])
    assert message in caplog.text
    assert f"training ends here, and the best so far counts, of epoch {whole.best['epoch']}" in caplog.text
    assert decided(trainer.history) == decided(whole.history)
    for key, tensor in whole.best["weights"].items():
        assert torch.equal(tensor, trainer.best["weights"][key]), key
    assert [state["epoch"] for state in saved] == [1, 2]
    as_good = trainer.best["accuracy"], -trainer.best["loss"]
    with pytest.raises(TrainingError, match=f"{message}.*no score on val was better than that of the start"):
        run(to_beat=lambda: as_good)
    with pytest.raises(TrainingError, match=r"\(there is no checkpoint yet\)$"):
        run(asked=StopRequest())
