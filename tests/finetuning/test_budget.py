"""Plans for a budget of time: exact by a clock of the test's own, kept by a resumed run, and what they train is nothing new."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from test_finetune import Tuner, assert_same_model, history, made, tune  # noqa: F401 - fixtures
from test_loop import Clock, make_trainer
from test_trainer import SIMPLE

from featcache import errors
from featcache.finetuning.budget import EmbeddingWatch, in_words, make_plan, parse_budget, seconds_per_step
from featcache.finetuning.recipes import choose_recipe
from featcache.finetuning.trainer import Status, Trainer
from featcache.models.model import load_model
from featcache.system.workdir import work_folder

CHANGES: dict[str, Any] = {
    "epochs": 9,
    "batch_size": 6,
    "lr": 1e-4,
    "backbone_lr": 1e-5,
    "patience": 0,
    "unfreeze": "all",
}  # 3 steps an epoch


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), (" 2H ", 7200), ("1h30m", 5400), ("1m30s", 90), ("0.5h", 1800), (45, 45), (0.5, 0.5)],
)
def test_a_budget_is_read(text: Any, seconds: float) -> None:
    assert parse_budget(text) == seconds
    assert parse_budget(in_words(seconds)) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "0s",
        "0m",
        "10",
        "-5m",
        "10 m",
        "m",
        "30m1h",
        "1e3s",
        "nan",
        "9999999h",
        0,
        -1.0,
        True,
        np.nan,
        None,
        "١m",
    ],
)
def test_what_is_no_budget_is_refused(text: Any) -> None:
    with pytest.raises(errors.UsageError, match="a budget is a time such as 90s, 10m or 1h30m, at most a year, found "):
        parse_budget(text)


@pytest.mark.parametrize(
    ("asked", "left", "costs", "every", "expected", "words"),
    [
        # 100 s are left, 95 and a step less to train, of which a plan takes 95 %. An epoch is 10 steps and a score of 2 s.
        ("all", 100, {"all": 0.5}, None, ("all", 9), ["all, 9 epochs: an epoch takes 7s (10 steps of 0.5 s, val 2 s)"]),
        ("all", 100, {"all": 2}, None, ("all", 4), ["all, 4 epochs instead of 9: an epoch takes 22s", "93s are left"]),
        ("all", 100, {"all": 2}, 5, ("all", 3), ["an epoch takes 26s"]),  # two scores more
        ("all", 100, {"all": 10, "most": 7}, None, ("most", 1), ["one epoch of all would take 102s"]),
        ("all", 100, {"all": 10, "most": 9, "half": 9, "last-stage": 3}, None, ("last-stage", 2), ["all would take 102s", "of half"]),
        ("most", 100, {"most": 9, "half": 3}, None, ("half", 2), ["one epoch of most would take 92s"]),
        ("gradual", 100, {"all": 2}, None, ("gradual", 4), ["gradual, 4 epochs instead of 9"]),
        ("gradual", 100, {"all": 10, "most": 9, "half": 9, "last-stage": 9, "head": 1}, None, ("head", 7), ["of gradual", "of last-stage"]),
        # Later thirds of the epochs cost less. Six are twice 22, 12 and 7 s, which is 82 of 88; seven would be 104.
        ("freezeout", 100, {"all": 2, "most": 1, "half": 0.5}, None, ("freezeout", 6), ["2 s, val 2 s), of most 12s, of half 7s, 93s"]),
        # Where they decide nothing they are not measured.
        ("freezeout", 100, {"all": 7}, None, ("freezeout", 1), ["takes 72s (10 steps of 7 s, val 2 s), 88s"]),
        ("freezeout", 100, {"all": 0.5}, None, ("freezeout", 9), ["takes 7s (10 steps of 0.5 s, val 2 s), 94.5s"]),
        ("freezeout", 100, {"all": 10, "most": 7}, None, ("most", 1), ["one epoch of freezeout would take 102s"]),
        # Nor is what cannot fit: most takes half as long as all at least, half three tenths, the others a fifth.
        ("all", 100, {"all": 21, "half": 7}, None, ("half", 1), ["one epoch of all would take 212s"]),
        ("all", 100, {"all": 34, "last-stage": 7}, None, ("last-stage", 1), ["one epoch of all would take 342s"]),
        ("all", 100, {"all": 51}, None, ("all", 0), ["nothing is trained", "one epoch of all would take 512s"]),
        ("last-stage", 100, {"last-stage": 10, "head": 8}, None, ("head", 1), []),
        ("head", 100, {"head": 10}, None, ("head", 0), ["nothing is trained", "one epoch of head would take 102s"]),
        ("all", -1, {}, None, ("all", 0), ["nothing is trained and the cached head is kept: 0s of 10m are left to train"]),
    ],
)  # fmt: skip
def test_a_plan_takes_fewer_epochs_before_it_trains_less_of_the_backbone(
    asked: str, left: float, costs: dict[str, float], every: int | None, expected: tuple[str, int], words: list[str]
) -> None:
    recipe = choose_recipe("default", 320, unfreeze=asked, epochs=9, eval_every=every)
    measured = []

    def measure(tried: Any, most: float) -> float:
        measured.append(tried.unfreeze)
        assert dataclasses.replace(tried, unfreeze=asked) == recipe and most == pytest.approx(0.05 * left)
        return costs[tried.unfreeze]

    plan = make_plan(600, recipe, steps=10, evaluation=2, left=lambda: left, measure=measure)
    assert (plan.unfreeze, plan.epochs) == expected
    assert measured == list(costs)  # no other depth
    assert [each for each in words if each not in plan.about] == [], plan.about
    assert plan.seconds == (
        pytest.approx(0.95 * left - costs.get(plan.unfreeze, costs.get("all"))) if plan.epochs else 0
    )
    settled = plan.settle(recipe)
    assert (settled.unfreeze, settled.epochs) == (expected if plan.epochs else (asked, 9))


class Timed(Clock):
    """Runs in which nothing takes time but steps, as long as ``seconds`` says by what trains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tune: Tuner) -> None:  # noqa: F811
        super().__init__()
        self.seconds = {"all": 10.0, "most": 10.0, "half": 10.0, "last-stage": 4.0, "head": 1.0}
        self.tune, run_epoch = tune, Trainer.run_epoch

        def timed(trainer: Trainer, *, on_step: Any, stop: Any) -> Any:
            def after(status: Status) -> None:
                phases = trainer.recipe.phases(trainer.recipe.epochs)
                self.now += self.seconds[[depth for depth, n in phases.items() for _ in range(n)][trainer.epoch]]
                on_step(status)

            return run_epoch(trainer, on_step=after, stop=stop)

        monkeypatch.setattr(Trainer, "run_epoch", timed)

    def run(self, budget: Any, **options: Any) -> Any:
        return self.tune(budget=budget, clock=self, **{"changes": CHANGES} | options)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tune: Tuner) -> Timed:  # noqa: F811
    return Timed(monkeypatch, tune)


@pytest.fixture(scope="module")
def plain(made: Path) -> Path:  # noqa: F811
    """Three epochs without a budget."""
    Tuner(made, made / "plain")(changes=CHANGES | {"epochs": 3})
    return made / "plain"


def test_a_plan_trains_what_the_same_epochs_without_a_budget_would(timed: Timed, plain: Path) -> None:
    """Measuring takes two steps of 10 s; of 130 s 113.5 are for training: three epochs of 30 s."""
    started = timed.now
    report = timed.run("150s")
    assert "budget 150s: all, 3 epochs instead of 9: an epoch takes 30s (3 steps of 10 s" in timed.tune.log.text
    assert (report.epochs, report.budget["out_of_time"], report.seconds) == (3, False, 20 + 90)
    assert report.budget["seconds"] == 113.5 and timed.now - started == 110
    assert_same_model(plain, timed.tune.ft)
    training = load_model(timed.tune.ft).manifest["training"]
    assert training["settings"]["epochs"] == 3 and training["budget"] == report.budget


def test_a_plan_knows_that_later_epochs_train_less(timed: Timed) -> None:
    """Measuring takes 38 s; of 112 s 96.4 are for training: two epochs of 30 s, one of 15 and one of 12, where three of 30 would fit."""
    timed.seconds |= {"most": 5.0, "half": 4.0}
    changes = CHANGES | {"unfreeze": "freezeout"}
    report = timed.run("150s", changes=changes)
    told = "freezeout, 4 epochs instead of 9: an epoch takes 30s (3 steps of 10 s, val 0 s), of most 15s, of half 12s, 96.4s are"
    assert told in timed.tune.log.text
    assert (report.epochs, report.budget["unfreeze"], report.budget["out_of_time"]) == (4, "freezeout", False)
    assert report.seconds == 38 + 2 * 30 + 15 + 12
    timed.tune(output=timed.tune.ft.parent / "plain", changes=changes | {"epochs": 4})
    assert_same_model(timed.tune.ft.parent / "plain", timed.tune.ft)


def test_a_resumed_run_keeps_its_plan_and_its_budget(timed: Timed, plain: Path) -> None:
    steps = itertools.count(1)

    def interrupt(status: Status) -> None:
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(errors.Interrupted, match="stopped in epoch 2 of 3"):
        timed.run("150s", progress=interrupt)
    for budget, message in (("90s", "had a budget of 150s, this command has a budget of 90s"), (None, "has no budget")):
        with pytest.raises(errors.UsageError, match=message):
            timed.run(budget, resume=True)
    run = work_folder(timed.tune.ft) / "run.json"
    facts = json.loads(run.read_text())
    run.write_text(json.dumps(facts | {"budget": None}))
    with pytest.raises(
        errors.UsageError, match="had no budget, this command has a budget of 10m; repeat that of the run"
    ):
        timed.run("10m", resume=True)
    run.write_text(json.dumps(facts))
    timed.now += 3600
    timed.seconds["all"] = 1.0  # a plan of its own would have nine epochs
    report = timed.run(150, resume=True)
    assert (report.epochs, {"out_of_time": False} | facts["budget"]) == (3, report.budget)
    assert_same_model(plain, timed.tune.ft)


@pytest.mark.parametrize(
    ("most", "first", "expected", "moved"), [(1e9, 100, 10, 8), (50, 100, 100, 2), (50, 1000, 1000, 1)]
)
def test_a_step_is_measured_after_warm_up(most: float, first: float, expected: float, moved: int) -> None:
    """Two steps that take longer, then six of 10 s; fewer where that takes too long."""
    clock = Clock()
    trainer = make_trainer(SIMPLE, clock=clock)
    epoch = trainer.run_epoch

    def timed(*, on_step: Any, stop: Any) -> Any:
        def after(status: Status) -> None:
            clock.now += first if trainer.step <= 2 else 10.0
            on_step(status)

        return epoch(on_step=after, stop=stop)

    trainer.run_epoch = timed  # type: ignore[method-assign]
    assert (seconds_per_step(trainer, most), trainer.step) == (expected, moved)


@pytest.mark.slow
def test_a_damaged_plan_is_said(timed: Timed) -> None:
    with pytest.raises(errors.Interrupted):
        timed.run("150s", progress=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    run = work_folder(timed.tune.ft) / "run.json"
    facts = json.loads(run.read_text())
    for text in ("[", json.dumps(facts | {"budget": {"epochs": 3}}), json.dumps(facts | {"budget": 7})):
        run.write_text(text)
        with pytest.raises(errors.ModelError, match="ft.parts.* is damaged .* with --force"):
            timed.run("150s", resume=True)
    facts["budget"]["epochs"] = 2  # another plan than that of the checkpoint
    run.write_text(json.dumps(facts))
    with pytest.raises(errors.UsageError, match="other settings .*budget.epochs: 3 -> 2; recipe.epochs: 3 -> 2"):
        timed.run("150s", resume=True)


@pytest.mark.slow
def test_a_run_slower_than_planned_ends_with_the_best_so_far(timed: Timed) -> None:
    """Planned are three epochs in 113.5 s; a step of 10 s and four of 30 s are more than that."""

    def slower(status: Status) -> None:
        timed.seconds["all"] = 30.0

    report = timed.run("150s", progress=slower)
    assert [(row["epoch"], row["step"]) for row in history(timed.tune.ft)] == [("1", "3"), ("2", "5")]
    assert (report.epochs, report.budget["out_of_time"]) == (2, True)
    assert "slower than planned: the time is used up after step 5 of 9; the best so far counts" in timed.tune.log.text


@pytest.mark.parametrize(
    ("reports", "warned", "ended"),
    [
        # (seconds, images) of 100, after 20 s of start; a budget of 100 s is used up at 100.
        ([(20, 0), (24, 5), (60, 60), (99, 95), (120, 100)], "", ""),  # looked at after 40 s: 87 s in all
        ([(20, 0), (24, 5), (26, 5), (101, 90)], "takes about 140s, more than the budget of 100s", "takes about 110s in all"),
        ([(20, 0), (101, 0)], "", "0 of 100 images are embedded, which takes longer in all"),
        ([(20, 50), (30, 60), (101, 99)], "", "99 of 100 images are embedded, which takes about 103s in all"),  # resumed
        ([(105, 0)], "", "0 of 100 images"),
        ([(105, 100)], "", ""),  # nothing to embed
    ],
)  # fmt: skip
def test_embedding_ends_with_the_budget(
    reports: list[tuple[float, int]], warned: str, ended: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    trainer = make_trainer(SIMPLE, clock=clock)
    watch = EmbeddingWatch(dataclasses.replace(trainer.job, budget=100.0, started=clock.now))
    began, message = clock.now, ""
    for seconds, images in reports:
        clock.now = began + seconds
        try:
            watch(images, 100)
        except errors.TrainingError as error:
            message = str(error)
    told = [record.getMessage() for record in caplog.records]
    assert (warned in told[0] and len(told) == 1) if warned else not told
    assert (ended in message and "the budget of 100s is used up" in message) if ended else not message


def test_a_budget_used_up_before_all_is_embedded_costs_nothing_that_is_embedded(timed: Timed) -> None:
    reports: list[tuple[int, int, str]] = []

    def preparing(done: int, total: int, what: str) -> None:
        reports.append((done, total, what))
        timed.now += 100.0  # seconds of a batch

    options: dict[str, Any] = {"request": TINY, "preparing": preparing}
    with pytest.raises(errors.TrainingError, match="the budget of 150s is used up when .* of 48 images are embedded"):
        timed.run("150s", **options)
    embedded = max(done for done, _, _ in reports)  # of the report after that the run has ended
    assert not timed.tune.ft.exists()
    reports.clear()
    report = timed.run("10000s", **options)
    assert 0 < embedded < 48 and reports[0][1] < 48 - embedded
    assert {what for _, _, what in reports} == {"embedding", "decoding train", "decoding val"}
    assert report.epochs == 9


def test_what_a_plan_trains_is_what_is_counted(timed: Timed) -> None:
    timed.seconds |= {"all": 100.0, "most": 100.0}
    planned = timed.run("500s")
    assert planned.budget["unfreeze"] == "half"
    asked = timed.tune(changes=CHANGES | {"unfreeze": "half", "epochs": 1}, overwrite=True)
    assert planned.trainable_parameters == asked.trainable_parameters < planned.parameters
    assert timed.run("3s", overwrite=True).trainable_parameters == 0


def test_where_nothing_fits_the_cached_head_is_kept(timed: Timed) -> None:
    report = timed.run("3s")
    assert "budget 3s: nothing is trained and the cached head is kept: 0s of 3s are left" in timed.tune.log.text
    assert (report.epochs, report.best_epoch, report.alpha) == (0, 0, 0)
    assert report.val_accuracy == report.head_val_accuracy and "is that head, unchanged" in report.verdict
    assert not (timed.tune.ft / "history.csv").exists()
