"""How much training fits into the time that a run is given: ``--budget 10m``.

In: seconds, a recipe, and what its first steps take. Out: a ``Plan``, settled before the schedule starts, so that it ends within the
budget, and kept with the run. Epochs and depth of the recipe are the most: a plan trains fewer epochs, and less of the backbone
only where not one epoch fits. Where even the images are not embedded in time, the run ends, and goes on when it is started again.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featcache.errors import ModelError, TrainingError, UsageError
from featcache.finetuning.checkpoint import read_identity
from featcache.finetuning.recipes import Depth, Job, Recipe
from featcache.finetuning.trainer import Stopped, Trainer
from featcache.system.device import kept_random_state
from featcache.system.display import quantity
from featcache.system.workdir import work_folder

log = logging.getLogger("featcache")
_WORDS = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
_MOST_SECONDS = 365 * 24 * 3600.0
_WARM, _MEASURED = 2, 6  # steps: the first ones allocate, and choose kernels
_SHARE_MEASURED = 0.05  # of the time that is left, after which measuring ends early
_SPARE = 0.05  # kept for saving; and as much of the rest for steps that take longer than the first ones
# What may train, and the least that a step of it takes, of one of all: less than was ever measured. Measuring takes steps as well.
_LEAST: dict[Depth, float] = {"all": 1.0, "most": 0.5, "half": 0.3, "last-stage": 0.2, "head": 0.2}
_DEPTHS = list(_LEAST)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a recipe is trained. JSON values.

    Attributes:
        budget: seconds that the run was given, from its start to its model.
        epochs: of the recipe's; 0: none, the cached head is kept. unfreeze: what of the network, as in ``Recipe``.
        seconds: for training and scoring, after which they end whatever was planned.
        about: the plan and why, in words.
    """

    budget: float
    epochs: int
    unfreeze: str
    seconds: float
    about: str

    def settle(self, recipe: Recipe) -> Recipe:
        """The recipe to train by."""
        return dataclasses.replace(recipe, epochs=self.epochs, unfreeze=self.unfreeze) if self.epochs else recipe  # type: ignore[arg-type]


def parse_budget(value: object) -> float:
    """Seconds, from ``90s``, ``10m``, ``1h30m`` or a number of them. Raises UsageError."""
    seconds = math.nan
    if isinstance(value, str):
        found = _WORDS.fullmatch(value.strip().lower())
        parts = found.groups() if found else ()
        if any(parts):
            seconds = sum(unit * float(part or 0) for unit, part in zip((3600, 60, 1), parts, strict=True))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    if not 0 < seconds <= _MOST_SECONDS:
        raise UsageError(f"a budget is a time such as 90s, 10m or 1h30m, at most a year, found {value!r}")
    return seconds


def in_words(seconds: float) -> str:
    """``1h30m``, ``90s``, ``0.25s``: as ``parse_budget`` reads it, to a hundredth of a second."""
    if seconds < 120 or seconds % 60:
        return f"{seconds:.4g}s" if seconds < 1000 else f"{seconds:.0f}s"
    hours, minutes = divmod(int(seconds // 60), 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes else "")


def check_same_budget(output: Path, budget: float | None) -> None:
    """Refuse to resume a run with another budget than it was planned for. Raises UsageError; ModelError: it is damaged."""
    identity = read_identity(output)
    if identity is None:
        return
    plan = _plan_in(identity, output)
    if (before := plan.budget if plan else None) != budget:
        had, asked = (
            "no budget" if seconds is None else f"a budget of {in_words(seconds)}" for seconds in (before, budget)
        )
        raise UsageError(
            f"the interrupted run in {work_folder(output)} had {had}, this command has {asked}; repeat that of the run, or "
            "discard it with --force"
        )


class EmbeddingWatch:
    """Called while a job's images are embedded: ends a run whose budget is used up, and says soon if it will be."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._first: tuple[float, int] | None = None
        self._told = False

    def __call__(self, done: int, total: int) -> None:
        """Take notice of ``done`` images of ``total``. Raises TrainingError; what is embedded is kept."""
        budget, now = self._job.budget, self._job.clock()
        if budget is None or done == total:
            return
        began, before = self._first = self._first or (now, done)  # the first call comes after the backbone was loaded
        used, images = now - self._job.started, done - before
        needed = f"about {in_words(round(used + (now - began) / images * (total - done)))}" if images else "longer"
        if used > budget:
            raise TrainingError(
                f"the budget of {in_words(budget)} is used up when {done:,} of {quantity(total, 'image')} are embedded, which takes "
                f"{needed} in all; they are kept, and the same command goes on with them, or give it more time to train as well"
            )
        if not self._told and now - began > _SHARE_MEASURED * budget and images:
            self._told = True
            if used + (now - began) / images * (total - done) > budget:
                log.warning(
                    "to embed %s takes %s, more than the budget of %s: it will end then, and what is embedded is kept",
                    quantity(total, "image"),
                    needed,
                    in_words(budget),
                )


def planned_before(output: Path) -> Plan | None:
    """The plan of the interrupted run that is resumed, if there is one. Raises ModelError: it is damaged."""
    identity = read_identity(output)
    return None if identity is None else _plan_in(identity, output)


def _plan_in(identity: dict[str, Any], output: Path) -> Plan | None:
    values = identity.get("budget")
    try:
        return (
            None
            if values is None
            else Plan(**{name: kind(values[name]) for name, kind in Plan.__annotations__.items()})
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"{work_folder(output)} is damaged (no plan of its budget); discard the run with --force"
        ) from error


def make_plan(
    budget: float,
    recipe: Recipe,
    *,
    steps: int,
    evaluation: float,
    left: Callable[[], float],
    measure: Callable[[Recipe, float], float],
) -> Plan:
    """Find how much of a settled recipe fits.

    Args:
        budget: seconds. left: those left for training, saving left out.
        steps: per epoch. evaluation: seconds of a score on val.
        measure: seconds of a step by a recipe, in about so many seconds at most.
    """
    most, scores = recipe.epochs or 1, 1 + steps / (recipe.eval_every or math.inf)
    step, needs, asked = dict[Depth, float](), list[tuple[str, float]](), recipe.unfreeze or "all"
    for unfreeze in (asked, *_DEPTHS[_DEPTHS.index(asked if asked in _DEPTHS else "all") + 1 :]):
        rest, tried = left(), dataclasses.replace(recipe, unfreeze=unfreeze)
        if rest <= 0:
            break
        slowest, *faster = tried.phases(most)
        if slowest not in step and steps * _LEAST[slowest] * step.get("all", 0.0) > rest:
            continue
        epoch, epochs = dict[Depth, float](), most
        for depth in (slowest, *faster):
            if depth != slowest and not 1 < epochs < most:
                break  # later phases decide nothing
            if depth not in step:
                step[depth] = measure(dataclasses.replace(recipe, unfreeze=depth), _SHARE_MEASURED * rest)
            epoch[depth] = steps * step[depth] + scores * evaluation
            seconds = (1 - _SPARE) * left() - step[slowest]  # it ends with a whole step
            epochs = _most_epochs(tried, epoch, most=most, seconds=(1 - _SPARE) * seconds)
        if epochs > 0:
            fewer = f"{unfreeze}, {quantity(epochs, 'epoch')}" + (f" instead of {most}" if epochs < most else "")
            of_it = f"{quantity(steps, 'step')} of {step[slowest]:.3g} s, val {evaluation:.3g} s"
            later = [f", of {depth} {in_words(epoch[depth])}" for depth in faster if depth in epoch]
            about = (
                f"{fewer}: an epoch takes {in_words(epoch[slowest])} ({of_it}){''.join(later)}, "
                f"{in_words(max(0.0, seconds))} are left to train"
            )
            why = "".join(f"; one epoch of {name} would take {in_words(took)}" for name, took in needs)
            return Plan(budget, epochs, unfreeze, seconds, about + why)
        needs.append((unfreeze, epoch[slowest]))
    rest = max(0.0, left())
    why = "; ".join(f"one epoch of {name} would take {in_words(took)}" for name, took in needs)
    about = f"nothing is trained and the cached head is kept: {in_words(rest)} of {in_words(budget)} are left to train"
    return Plan(budget, 0, asked, 0.0, f"{about}, {why}" if why else about)


def _most_epochs(recipe: Recipe, epoch: dict[Depth, float], *, most: int, seconds: float) -> int:
    """How many fit, of which each phase of the recipe takes so many seconds each; one not measured yet as many as the one before."""
    for n in range(most, 0, -1):
        needed, each = 0.0, 0.0
        for depth, of_it in recipe.phases(n).items():
            each = epoch.get(depth, each)
            needed += of_it * each
        if needed <= seconds:
            return n
    return 0


def seconds_per_step(trainer: Trainer, most: float, *, steps: int = _MEASURED) -> float:
    """Mean seconds of a trainer's first ``steps`` after warm-up, fewer if they take more than ``most``; its network has moved then."""
    clock, broadcast = trainer.job.clock, trainer.processes.broadcast
    ends = [clock()]

    def enough() -> bool:
        done, took = len(ends) - 1, ends[-1] - ends[0]
        return broadcast(done >= _WARM + steps or (done > 1 and took > most) or (done > 0 and took > 10 * most))

    with kept_random_state(trainer.device):
        while not enough():
            try:
                trainer.run_epoch(on_step=lambda _: ends.append(clock()), stop=enough)
            except Stopped:
                break
    warm = max(0, min(_WARM, len(ends) - 2))
    return broadcast((ends[-1] - ends[warm]) / (len(ends) - 1 - warm))
