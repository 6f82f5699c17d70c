"""Kill, fill and power cut at every step: nothing committed is lost, old files stay whole, the same command goes on.

Scenarios are commands that write. Each is broken at a step on the disk (``faults.py``), its files are examined as they then
lie there, and the same command is run again: the result must be that of a run that nobody disturbed.

By default: an extraction that dies at every third step, in the middle of writes, by six signals, in a chain of kills, by lost
power and on a full disk; a model folder that is replaced. ``slow``: every step, more signals, other commands and errors.
``soak``: every step of every command.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import TINY_FLAGS, make_photos
from faults import Fault, Outcome, Program, Step

from featcache.cache.cache import FeatureCache
from featcache.errors import FeatcacheError
from featcache.models.model import load_model

SETTINGS = {"extraction.parts.MAX_ROWS": 8}  # small parts, so that there are some to lose
SOAK, SLOW = pytest.mark.soak, pytest.mark.slow


def contents(path: Path) -> Any:
    """What a user gets from a file or folder that featcache wrote; raises FeatcacheError if that is not whole."""
    if path.suffix == ".h5":
        cache = FeatureCache.open(path)
        rows = tuple(getattr(cache.rows, field.name).tobytes() for field in dataclasses.fields(cache.rows))
        everything = cache.take(np.arange(len(cache)))
        return everything.tobytes(), rows, cache.classes, cache.refused, cache.fingerprint
    if path.is_dir():
        load_model(path).load_backbone()
        return {name: (path / name).read_bytes() for name in ("head.safetensors", "backbone.safetensors")}
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        with contextlib.suppress(ValueError):  # what is said beside the tensors comes in any order
            size = int.from_bytes(data[:8], "little")
            return json.loads(data[8 : 8 + size]), data[8 + size :]
    return data


def contents_or_damage(path: Path) -> Any:
    """The same of what may have been damaged from the start."""
    try:
        return contents(path)
    except FeatcacheError:
        return "damaged"


class Scenario:
    """A command that writes ``target`` into a folder where, perhaps, an earlier version lies.

    Attributes:
        before: what was there; None: nothing. after: what an undisturbed run leaves. listing: the folder then.
        steps: that it takes on the disk. seconds: that it takes.
    """

    def __init__(self, program: Program, target: Path, *arguments: object) -> None:
        self._program, self.target, self.arguments = program, target, arguments
        self.folder, self.base = target.parent, target.parent.with_name("before")
        shutil.copytree(self.folder, self.base, symlinks=True)
        self.before = contents_or_damage(target) if os.path.lexists(target) else None
        first = self.run()  # in a folder: it compiles and caches this and that
        assert first.code == 0, first.err
        self.after, self.listing = contents(target), self.list_files()
        self.reset()
        outcome = self.run(trace=True)
        assert outcome.code == 0, outcome.err
        assert contents(target) == self.after != self.before
        self.steps, self.seconds = outcome.steps, outcome.seconds

    def reset(self) -> None:
        """The folder as before the command."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.base, self.folder, symlinks=True)

    def run(self, *more: object, **options: Any) -> Outcome:
        if self.target.with_name(f"{self.target.name}.parts").joinpath("run.json").exists():
            more += ("--resume",)
        return self._program.run(*self.arguments, *more, below=self.folder, settings=SETTINGS, **options)

    def list_files(self) -> list[str]:
        """What lies there, but for the curves of a saved model, which are not drawn again."""
        return sorted(name for name in os.listdir(self.folder) if ".curves.png" not in name)

    def rows_in_parts(self) -> int:
        return sum(len(FeatureCache.open(part)) for part in self.folder.glob("*.parts/*.h5"))

    def check_whole(self, context: object) -> None:
        """The target is the earlier version or the new one; every part is whole."""
        if os.path.lexists(self.target):
            assert contents_or_damage(self.target) in (self.before, self.after), context
        else:
            assert self.before is None, (context, "the earlier version is gone")
        for part in self.folder.glob("*.parts/*.h5"):
            contents(part)

    def check_resumed(self, context: object) -> Outcome:
        """Run it again: the result is that of an undisturbed run, and nothing is left lying about."""
        again = self.run()
        complete = "holds a fine-tuned model" in again.err  # nothing is left to do, and that is never replaced
        assert again.code == 0 or complete, (context, again.err)
        assert contents(self.target) == self.after, context
        assert self.list_files() == self.listing, context
        return again


def extracting(program: Program, root: Path, work: Path) -> Scenario:
    """An existing cache of 6 images is brought up to date with 18, 16 of them new: two parts are published, and packed."""
    command = ("extract", root / "photos", "-o", work / "f.h5", *TINY_FLAGS)
    make_photos(root / "photos", each=2, settled=True)
    program.check(*command)
    make_photos(root / "photos", settled=True)
    return Scenario(program, work / "f.h5", *command, "--json")


def _model(program: Program, root: Path, folder: Path) -> Path:
    program.check("extract", make_photos(root / "photos", settled=True), "-o", root / "f.h5", *TINY_FLAGS)
    program.check("fit-head", root / "f.h5", "-o", folder / "m", "--C", "1", "--folds", "0")
    return folder / "m"


def fitting(program: Program, root: Path, work: Path) -> Scenario:
    """A model is replaced."""
    model = _model(program, root, work)
    return Scenario(program, model, "fit-head", root / "f.h5", "-o", model, "--C", "2", "--folds", "0")


def predicting(program: Program, root: Path, work: Path) -> Scenario:
    """A table is replaced."""
    target = work / "out.csv"
    target.write_text("yesterday's")
    command = ("predict", _model(program, root, root), root / "photos", "-o", target, "--overwrite")
    return Scenario(program, target, *command)


def exporting(program: Program, root: Path, work: Path) -> Scenario:
    """An exported file is replaced."""
    target = work / "w.safetensors"
    target.write_bytes(b"yesterday's")
    return Scenario(program, target, "export", _model(program, root, root), "-o", target, "--force")


def finetuning(program: Program, root: Path, work: Path) -> Scenario:
    """A fine-tuning of two epochs; ``Scenario.run`` asks for --resume where there is something to go on with."""
    command = ("finetune", root / "photos", "--init", _model(program, root, root), "-o", work / "ft")
    return Scenario(program, work / "ft", *command, "--epochs", 2, "--batch-size", 8)


def repairing(program: Program, root: Path, work: Path) -> Scenario:
    """A cache with one flipped bit is repaired from its images."""
    photos, target = make_photos(root / "photos", settled=True), work / "f.h5"
    program.check("extract", photos, "-o", target, *TINY_FLAGS)
    with h5py.File(target) as file:
        offset = file["features"].id.get_offset()
    data = bytearray(target.read_bytes())
    data[offset + 100] ^= 1
    target.write_bytes(data)
    return Scenario(program, target, "verify", target, "--repair", photos)


Make = Callable[[Program, Path, Path], Scenario]
Rehearsed = Callable[[Make], Scenario]
SCENARIOS: list[Make] = [extracting, fitting, predicting, exporting, finetuning, repairing]


@pytest.fixture(scope="module")
def rehearsed(warm: Program, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    """A scenario, which runs undisturbed before any test breaks it."""

    @functools.cache
    def rehearse(make: Make) -> Scenario:
        root = tmp_path_factory.mktemp(make.__name__)
        (root / "work").mkdir()
        return make(warm, root, root / "work")

    return rehearse


@pytest.fixture
def extraction(rehearsed: Rehearsed) -> Scenario:
    return rehearsed(extracting)


# ------------------------------------------------------------------------------------------------ every step


def committed(steps: tuple[Step, ...]) -> int:
    """Rows of the parts that are under their names on the disk."""
    renamed = [step for step in steps if step.what == "rename" and ".h5.parts/" in step.other]
    return 8 * len(renamed)


def die_everywhere(scenario: Scenario, mode: str, steps: list[int]) -> None:
    for number in steps:
        scenario.reset()
        outcome = scenario.run(fault=Fault(mode, number))
        context = (mode, number, scenario.steps[number])
        assert outcome.died or mode == "short", context
        scenario.check_whole(context)
        again = scenario.check_resumed(context)
        if "extract" in scenario.arguments and mode.startswith("die"):
            done = committed(scenario.steps[: number + (mode == "die after")])
            assert again.result["embedded"] == 16 - done, context
    assert steps


def numbers(scenario: Scenario, *what: str) -> list[int]:
    """The steps of these kinds; of many writes to one file the first, one in the middle, and the last."""
    same: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for number, step in enumerate(scenario.steps):
        if not what or step.what in what:
            same[step.what, step.path].append(number)
    return sorted({alike[place] for alike in same.values() for place in (0, len(alike) // 2, -1)})


def without_second_part(scenario: Scenario) -> list[int]:
    """All steps but those in which the second part is like the first."""
    parts = [step.path for step in scenario.steps if step.what == "rename" and ".h5.parts/" in step.other]
    return [number for number in numbers(scenario) if scenario.steps[number].path not in parts[1:]]


# Dying after a step is dying before the next one, so that one of both is enough, and the very last.
@pytest.mark.parametrize("first", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW)])
def test_dying_at_every_third_step_of_commits_and_of_packing(extraction: Scenario, first: int) -> None:
    die_everywhere(extraction, "die before", without_second_part(extraction)[first::3])
    if first == 0:
        die_everywhere(extraction, "die after", [len(extraction.steps) - 1])


def test_dying_in_the_middle_of_a_write(extraction: Scenario) -> None:
    largest = sorted(numbers(extraction, "write"), key=lambda number: -len(extraction.steps[number].data))
    die_everywhere(extraction, "torn", largest[:2])


def test_a_system_that_writes_less_than_it_is_given(extraction: Scenario) -> None:
    die_everywhere(extraction, "short", numbers(extraction, "write")[:2])


@pytest.mark.parametrize("make", [fitting, pytest.param(predicting, marks=SLOW), pytest.param(repairing, marks=SLOW)])
def test_dying_while_something_is_replaced(rehearsed: Rehearsed, make: Make) -> None:
    scenario = rehearsed(make)
    die_everywhere(scenario, "die before", numbers(scenario, "rename", "exchange", "rmdir"))
    die_everywhere(scenario, "die after", numbers(scenario, "rename", "exchange"))


KINDS = {
    "die before": (),
    "die after": ("rename", "exchange", "unlink", "rmdir"),
    "torn": ("write",),
    "short": ("write",),
}


@SOAK
@pytest.mark.parametrize("make", SCENARIOS)
@pytest.mark.parametrize("mode", KINDS)
def test_every_step_of_every_command(rehearsed: Rehearsed, make: Make, mode: str) -> None:
    scenario = rehearsed(make)
    steps = numbers(scenario, *KINDS[mode])[:: 3 if make is finetuning else 1]
    print(f"{make.__name__}: {mode} at {len(steps)} of {len(scenario.steps)} steps")
    die_everywhere(scenario, mode, steps)


# --------------------------------------------------------------------------------- signals at random moments

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize(
    ("make", "seeds"),
    [
        (extracting, range(6)),  # each signal, to a warm process and to a cold one
        *(pytest.param(make, range(3), marks=SLOW) for make in (fitting, predicting)),
        # A fine-tuning that is killed or gets a signal: tests/finetuning/test_finetune.py
        pytest.param(extracting, range(1000, 1450), marks=SOAK),
        *(pytest.param(make, range(1000, 1250), marks=SOAK) for make in (fitting, predicting)),
        pytest.param(finetuning, range(1000, 1050), marks=SOAK),
    ],
)
def test_signals_at_random_moments(rehearsed: Rehearsed, make: Make, seeds: range) -> None:
    """Every second one in the first second of a new process."""
    scenario = rehearsed(make)
    for seed in seeds:
        chance, number, cold = random.Random(seed), SIGNALS[seed % 3], seed % 2 == 0
        after = chance.uniform(0, 1.0 if cold else 1.2 * scenario.seconds)
        context = (f"seed {seed}", number, after, "cold" if cold else "warm")
        scenario.reset()
        outcome = scenario.run(kill=number, after=after, cold=cold)
        starting = cold and "Fatal Python error: init" in outcome.err  # what Python makes of a signal while it starts
        over = outcome.code in (0, -number, 128 + number)  # before the signal came, or nobody was listening yet
        assert over or starting, (context, outcome.code, outcome.err)
        # Where Python cannot raise an exception, in a finalizer, it prints it and goes on.
        assert "Traceback" not in outcome.err or cold or "Exception ignored in" in outcome.err, (context, outcome.err)
        scenario.check_whole(context)
        scenario.check_resumed(context)


# ---------------------------------------------------------------------------------------- chains of kills


@pytest.mark.parametrize(
    ("seed", "rounds"),
    [(0, 6), *(pytest.param(seed, 20, marks=SOAK) for seed in range(1, 51))],
)
def test_a_chain_of_kills(extraction: Scenario, seed: int, rounds: int) -> None:
    """Killed again and again on one cache, with any number of workers; whatever is committed by then stays."""
    chance = random.Random(seed)
    extraction.reset()
    kept = 0
    for number in range(rounds):
        context = (f"seed {seed}", f"round {number}")
        extraction.run("--workers", chance.choice([1, 2, 5]), after=chance.uniform(0.3, 1.0) * extraction.seconds)
        extraction.check_whole(context)
        rows = extraction.rows_in_parts()
        packed = contents(extraction.target) == extraction.after
        assert packed or rows >= kept, context
        kept = rows
        if packed:
            extraction.reset()
            kept = 0
    extraction.check_resumed((f"seed {seed}", "the last round"))


# ------------------------------------------------------------------------------------------------ lost power

Names = dict[str, "Inode | None"]  # path -> what a file's name stands for; None: a folder


@dataclasses.dataclass(eq=False)
class Inode:
    """A file: its bytes as a running system sees them, as last synced, and the (offset, length) written since then."""

    now: bytearray
    durable: bytes
    written: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def sync(self) -> None:
        self.durable, self.written = bytes(self.now), []

    def after_power_cut(self, chance: random.Random) -> bytes:
        """One of the states in which a disk may hold it."""
        new, old = self.now, self.durable
        if not self.written and len(new) == len(old):
            return old
        size = chance.choice([len(old), len(new), chance.randint(0, max(len(new), len(old)))])
        data = bytearray(old[:size].ljust(size, b"\0"))
        touched = {
            sector for start, length in self.written for sector in range(start // 512, (start + length) // 512 + 1)
        }
        whole = chance.random() < 0.5  # pages of 4 KiB arrive, or sectors of 512 bytes
        arrived: dict[int, bool] = {}
        for sector in sorted(touched):
            if arrived.setdefault(sector // 8 if whole else -sector, chance.random() < 0.5):
                data[sector * 512 : (sector + 1) * 512] = new[sector * 512 : (sector + 1) * 512]
        return bytes(data[:size])


class Disk:
    """What a disk may hold after its power was cut, given the steps until then.

    Data counts as written once its file is synced, names once their folder is. Of the rest any page of a file may be there,
    be missing or be torn in sectors of 512 bytes, and of what happened to the names in a folder any first part may be
    there: a journal keeps their order, and promises no more.
    """

    def __init__(self, base: Path, root: Path, steps: tuple[Step, ...]) -> None:
        self._root = root
        self._names: Names = {}  # as a running system sees them
        for path in base.rglob("*"):
            inode = None if path.is_dir() else Inode(bytearray(path.read_bytes()), path.read_bytes())
            self._names[str(root / path.relative_to(base))] = inode
        self._kept = dict(self._names)
        self._pending: list[tuple[set[str], Callable[[Names], object]]] = []  # folders, and what happens to the names
        for step in steps:
            self._take(step)

    def _change(self, folders: set[str], change: Callable[[Names], object]) -> None:
        change(self._names)
        self._pending.append((folders, change))

    def _take(self, step: Step) -> None:
        here, inode = {str(Path(step.path).parent)}, self._names.get(step.path)
        if step.what in ("open", "truncate"):
            if inode:
                del inode.now[0 if step.what == "truncate" else len(inode.now) :]
            else:
                created = Inode(bytearray(), b"")
                self._change(here, lambda names: names.update({step.path: created}))
        elif step.what == "write" and inode:
            stop = step.offset + len(step.data)
            inode.now.extend(bytes(max(0, stop - len(inode.now))))
            inode.now[step.offset : stop] = step.data
            inode.written.append((step.offset, len(step.data)))
        elif step.what == "resize" and inode:
            del inode.now[step.offset :]
            inode.now.extend(bytes(step.offset - len(inode.now)))
        elif step.what == "fsync" and inode:
            inode.sync()
        elif step.what == "fsync":
            self._settle(step.path)
        elif step.what == "mkdir":
            self._change(here, lambda names: names.update({step.path: None}))
        elif step.what in ("rmdir", "unlink"):
            self._change(here, lambda names: names.pop(step.path, None))
        elif step.what in ("rename", "exchange"):
            self._change({*here, str(Path(step.other).parent)}, lambda names: _rename(names, step))
        else:
            assert step.what == "failed", step

    def _settle(self, folder: str) -> None:
        """Names in ``folder`` are durable now; a journal takes along all that came before."""
        last = max((k for k, (folders, _) in enumerate(self._pending) if folder in folders), default=-1)
        for _, change in self._pending[: last + 1]:
            change(self._kept)
        self._pending = self._pending[last + 1 :]

    def after_power_cut(self, target: Path, chance: random.Random) -> None:
        """Write one of the states it may be in into ``target``."""
        names = dict(self._kept)
        for _, change in self._pending[: chance.randint(0, len(self._pending))]:
            change(names)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name in sorted(names):
            path, inode = target / Path(name).relative_to(self._root), names[name]
            if inode is None:
                path.mkdir(parents=True, exist_ok=True)
            elif path.parent.is_dir():  # a file in a folder that was never recorded is lost with it
                path.write_bytes(inode.after_power_cut(chance))


def _rename(names: Names, step: Step) -> None:
    """Rename or exchange files, or folders with all that is in them."""
    pairs = [(step.path, step.other), (step.other, step.path)][: 2 if step.what == "exchange" else 1]
    moves = [(name, old, new) for old, new in pairs for name in names if Path(name).is_relative_to(old)]
    moved = {new + name[len(old) :]: names.pop(name) for name, old, new in moves}
    names.update(moved)


@pytest.mark.parametrize(
    ("make", "count", "resume_every"),
    [(extracting, 200, 20), *(pytest.param(make, 1000, 25, marks=SOAK) for make in SCENARIOS)],
)
def test_power_lost_at_any_step(rehearsed: Rehearsed, make: Make, count: int, resume_every: int) -> None:
    """After any number of steps, in any state the disk may be in."""
    scenario = rehearsed(make)
    for seed in range(count):
        cut = seed % (len(scenario.steps) + 1)  # every first part of the steps in turn
        steps = scenario.steps[:cut]
        Disk(scenario.base, scenario.folder, steps).after_power_cut(scenario.folder, random.Random(seed))
        context = (f"seed {seed}", f"after {cut} steps", steps[-1:])
        scenario.check_whole(context)
        if make is extracting and contents(scenario.target) != scenario.after:
            assert scenario.rows_in_parts() >= synced_rows(steps), (context, "committed rows are gone")
        if seed % resume_every == 0:
            scenario.check_resumed(context)


def synced_rows(steps: tuple[Step, ...]) -> int:
    """Rows in parts whose commit was over: renamed, and the folder synced."""
    synced = max(
        (k for k, step in enumerate(steps) if step.what == "fsync" and step.path.endswith(".h5.parts")), default=0
    )
    return committed(steps[:synced])


# ------------------------------------------------------------------------------------------------ full disks


def fill(scenario: Scenario, fault: Fault | None, limits: dict[str, int] | None = None) -> bool:
    """Fail as ``fault`` or the limits say, then go on with room: whether it failed at all."""
    scenario.reset()
    outcome = scenario.run(fault=fault, limits=limits)
    context = (fault, limits, outcome.err)
    if outcome.code == 0:  # a step that may fail, such as removing what is not needed any more
        assert contents(scenario.target) == scenario.after, context
        return False
    assert outcome.code == 1, context
    reason = outcome.err.splitlines()[-1]
    assert reason.startswith("error: "), context
    assert str(scenario.folder) in reason, context
    assert "Traceback" not in outcome.err, context
    scenario.check_whole(context)
    scenario.check_resumed(context)
    return True


def offsets(scenario: Scenario, count: int) -> list[int]:
    total = sum(len(step.data) for step in scenario.steps)
    return [total * k // count for k in range(count)]


@pytest.mark.parametrize(
    "error",
    [errno.ENOSPC, pytest.param(errno.EDQUOT, marks=SLOW), pytest.param(errno.EIO, marks=SLOW)],
    ids=["ENOSPC", "EDQUOT", "EIO"],
)
def test_disk_full_at_many_offsets(extraction: Scenario, error: int) -> None:
    for budget in offsets(extraction, 5):
        assert fill(extraction, Fault("full", error=error, budget=budget))


def test_the_message_says_how_much_is_needed(extraction: Scenario) -> None:
    extraction.reset()
    outcome = extraction.run(fault=Fault("full", budget=0))
    needed = next(step.offset for step in extraction.steps if step.what == "resize")  # the first part's final size
    assert outcome.err.splitlines()[-1].endswith(
        f"No space left on device ({needed:,} bytes are needed); free some space and run the same command again"
    )


@SLOW
def test_a_limit_on_the_size_of_files(extraction: Scenario) -> None:
    largest = max(len(step.data) for step in extraction.steps)
    for limit in (1000, 30_000, largest - 1):
        assert fill(extraction, None, {"RLIMIT_FSIZE": limit}), limit


def test_a_step_that_fails_once(extraction: Scenario) -> None:
    failed = [fill(extraction, Fault("fail once", number, errno.EIO)) for number in numbers(extraction, "fsync")]
    assert sum(failed) >= 4


@SOAK
@pytest.mark.parametrize("make", SCENARIOS)
def test_every_step_fails(rehearsed: Rehearsed, make: Make) -> None:
    scenario = rehearsed(make)
    steps = numbers(scenario)[:: 4 if make is finetuning else 1]
    for mode in ("fail", "fail once"):
        failed = [
            fill(scenario, Fault(mode, number, error))
            for number, error in zip(steps, [errno.ENOSPC, errno.EDQUOT, errno.EIO] * len(steps), strict=False)
        ]
        print(f"{make.__name__}: {mode} at {len(steps)} steps, {sum(failed)} ended with exit 1")
    full = [fill(scenario, Fault("full", budget=budget)) for budget in offsets(scenario, 30)]
    assert all(full)


@SOAK
def test_a_small_disk(extraction: Scenario) -> None:
    """A real one: a tmpfs with room for less and less."""
    for size in (64, 2900, 3000, 5700, 5800, 5850):  # KiB
        shutil.rmtree(extraction.folder)
        extraction.folder.mkdir()
        if os.system(f"mount -t tmpfs -o size={size}k none {extraction.folder}"):
            pytest.skip("mounting a file system is not allowed here")
        try:
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(extraction.base, extraction.folder, dirs_exist_ok=True)
            outcome = extraction.run()
            assert outcome.code == 1, (size, outcome.err)
            assert any(words in outcome.err for words in ("not enough space", "No space left", "damaged")), outcome.err
        finally:
            os.system(f"umount {extraction.folder}")


def test_contents_notice_damage(tmp_path: Path) -> None:
    """The tests above rest on this: what is not whole raises."""
    (tmp_path / "f.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(FeatcacheError):
        contents(tmp_path / "f.h5")
