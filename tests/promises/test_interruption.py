"""Kill, fill and power cut at every step: nothing committed is lost, old files stay whole, the same command goes on.

Scenarios are commands that write. Each is broken at a step on the disk (``faults.py``), its files are examined as they then
lie there, and the same command is run again: the result must be that of a run that nobody disturbed.

By default: an extraction that dies at every third step, in the middle of writes, by six signals, in a chain of kills, by lost
power and on a full disk; a model folder that is replaced. ``slow``: every step, more signals, other commands and errors.
``soak``: every step of every command.
"""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
from conftest import TINY_FLAGS, make_photos
from faults import Fault, Outcome, Program, Step, program

from featcache.cache.cache import FeatureCache
from featcache.errors import FeatcacheError
from featcache.models.model import load_model

SETTINGS = {"extraction.parts.MAX_ROWS": 8}  # small parts, so that there are some to lose
SOAK, SLOW = pytest.mark.soak, pytest.mark.slow


@pytest.fixture(scope="module")
def featcache() -> Iterator[Program]:
    with program(SETTINGS) as started:
        yield started


def contents(path: Path) -> Any:
    """What a user gets from a file or folder that featcache wrote; raises FeatcacheError if that is not whole."""
    if path.suffix == ".h5":
        cache = FeatureCache.open(path)
        rows = tuple(getattr(cache.rows, field.name).tobytes() for field in dataclasses.fields(cache.rows))
        everything = cache.take(cache.where("none")) if not cache.rows.splits.any() else cache.X
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


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command that writes ``target`` into a folder where, perhaps, an earlier version lies.

    Attributes:
        before: what was there; None: nothing. after: what an undisturbed run leaves. listing: the folder then.
        steps: that it takes on the disk. seconds: that it takes.
    """

    arguments: tuple[object, ...]
    folder: Path
    target: Path
    base: Path
    before: Any
    after: Any
    listing: list[str]
    steps: tuple[Step, ...]
    seconds: float

    def reset(self) -> None:
        """The folder as before the command."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.base, self.folder, symlinks=True)

    def run(self, featcache: Program, **options: Any) -> Outcome:
        return featcache.run(*self.arguments, below=self.folder, **options)

    def check_whole(self, context: object) -> None:
        """The target is the earlier version or the new one; every part is whole."""
        if os.path.lexists(self.target):
            assert contents_or_damage(self.target) in (self.before, self.after), context
        else:
            assert self.before is None, (context, "the earlier version is gone")
        for part in self.folder.glob("*.parts/*.h5"):
            contents(part)

    def check_resumed(self, featcache: Program, context: object) -> Outcome:
        """Run it again: the result is that of an undisturbed run, and nothing is left lying about."""
        again = self.run(featcache)
        complete = "holds a fine-tuned model" in again.err  # nothing is left to do, and that is never replaced
        assert again.code == 0 or complete, (context, again.err)
        assert contents(self.target) == self.after, context
        assert list_files(self.folder) == self.listing, context
        return again


def list_files(folder: Path) -> list[str]:
    """What lies there, but for the curves of a saved model, which are not drawn again."""
    return sorted(name for name in os.listdir(folder) if ".curves.png" not in name)


def rehearse(featcache: Program, folder: Path, target: str, *arguments: object) -> Scenario:
    """Run a command once, undisturbed, in ``folder``."""
    base = folder.with_name(folder.name + "-before")
    shutil.copytree(folder, base, symlinks=True)
    path = folder / target
    before = contents_or_damage(path) if os.path.lexists(path) else None
    featcache.check(*arguments, below=folder)  # the first run in a folder compiles and caches this and that
    after, listing = contents(path), list_files(folder)
    scenario = Scenario(arguments, folder, path, base, before, after, listing, (), 0.0)
    scenario.reset()
    outcome = scenario.run(featcache, trace=True)
    assert outcome.code == 0, outcome.err
    assert contents(path) == after != before
    return dataclasses.replace(scenario, steps=outcome.steps, seconds=outcome.seconds)


def old_photos(folder: Path, *, each: int = 6) -> Path:
    """Photos whose time stamps are old enough to be trusted, whenever they are read."""
    for photo in make_photos(folder, each=each).rglob("*.jpg"):
        os.utime(photo, (1_600_000_000, 1_600_000_000))
    return folder


def extracting(featcache: Program, root: Path) -> Scenario:
    """An existing cache of 6 images is brought up to date with 18, 16 of them new: two parts are published, and packed."""
    photos, folder = root / "photos", root / "extract"
    folder.mkdir()
    old_photos(photos, each=2)
    featcache.check("extract", photos, "-o", folder / "f.h5", *TINY_FLAGS)
    old_photos(photos)
    return rehearse(featcache, folder, "f.h5", "extract", photos, "-o", folder / "f.h5", *TINY_FLAGS, "--json")


def fitting(featcache: Program, root: Path) -> Scenario:
    """A model is replaced."""
    folder = root / "fit"
    folder.mkdir()
    featcache.check("extract", old_photos(root / "photos"), "-o", root / "f.h5", *TINY_FLAGS)
    featcache.check("fit-head", root / "f.h5", "-o", folder / "m", "--C", "1", "--folds", "0")
    return rehearse(featcache, folder, "m", "fit-head", root / "f.h5", "-o", folder / "m", "--C", "2", "--folds", "0")


def _model(featcache: Program, root: Path) -> Path:
    featcache.check("extract", old_photos(root / "photos"), "-o", root / "f.h5", *TINY_FLAGS)
    featcache.check("fit-head", root / "f.h5", "-o", root / "m", "--C", "1", "--folds", "0")
    return root / "m"


def predicting(featcache: Program, root: Path) -> Scenario:
    """A table is replaced."""
    model, folder = _model(featcache, root), root / "predict"
    folder.mkdir()
    (folder / "out.csv").write_text("yesterday's")
    return rehearse(featcache, folder, "out.csv", "predict", model, root / "photos", "-o", folder / "out.csv")


def exporting(featcache: Program, root: Path) -> Scenario:
    """An exported file is replaced."""
    model, folder = _model(featcache, root), root / "export"
    folder.mkdir()
    name = "w.safetensors"
    (folder / name).write_bytes(b"yesterday's")
    return rehearse(featcache, folder, name, "export", model, "-o", folder / name, "--force")


def finetuning(featcache: Program, root: Path) -> Scenario:
    """A fine-tuning of two epochs; going on is asked for with --resume, which does no harm where there is nothing yet."""
    model, folder = _model(featcache, root), root / "finetune"
    folder.mkdir()
    options = ["--epochs", 2, "--batch-size", 8, "--resume"]
    return rehearse(
        featcache, folder, "ft", "finetune", root / "photos", "--init", model, "-o", folder / "ft", *options
    )


def repairing(featcache: Program, root: Path) -> Scenario:
    """A cache with one flipped bit is repaired from its images."""
    photos, folder = old_photos(root / "photos"), root / "repair"
    folder.mkdir()
    featcache.check("extract", photos, "-o", folder / "f.h5", *TINY_FLAGS)
    with h5py.File(folder / "f.h5") as file:
        offset = file["features"].id.get_offset()
    data = bytearray((folder / "f.h5").read_bytes())
    data[offset + 100] ^= 1
    (folder / "f.h5").write_bytes(data)
    return rehearse(featcache, folder, "f.h5", "verify", folder / "f.h5", "--repair", photos)


SCENARIOS: list[Callable[[Program, Path], Scenario]] = [
    extracting,
    fitting,
    predicting,
    exporting,
    finetuning,
    repairing,
]


@pytest.fixture(scope="module")
def extraction(featcache: Program, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return extracting(featcache, tmp_path_factory.mktemp("extraction"))


# ------------------------------------------------------------------------------------------------ every step


def committed(steps: tuple[Step, ...]) -> int:
    """Rows of the parts that are under their names on the disk."""
    renamed = [step for step in steps if step.what == "rename" and ".h5.parts/" in step.other]
    return 8 * len(renamed)


def die_everywhere(featcache: Program, scenario: Scenario, mode: str, steps: list[int]) -> None:
    for number in steps:
        scenario.reset()
        step = scenario.steps[number] if number < len(scenario.steps) else "the end"
        outcome = scenario.run(featcache, fault=Fault(mode, number))
        context = (mode, number, step)
        assert outcome.died or mode == "short", context
        scenario.check_whole(context)
        again = scenario.check_resumed(featcache, context)
        if "extract" in scenario.arguments and mode.startswith("die"):
            done = committed(scenario.steps[: number + (mode == "die after")])
            assert again.result["embedded"] == 16 - done, context
    assert steps


def numbers(scenario: Scenario, *what: str) -> list[int]:
    """The steps of these kinds; of many writes to one file the first, one in the middle, and the last."""
    found: list[int] = []
    steps = scenario.steps
    for number, step in enumerate(steps):
        if what and step.what not in what:
            continue
        same = [k for k, other in enumerate(steps) if (other.what, other.path) == (step.what, step.path)]
        if number in (same[0], same[len(same) // 2], same[-1]):
            found.append(number)
    return found


def without_second_part(scenario: Scenario) -> list[int]:
    """All steps but those in which the second part is like the first."""
    parts = [step.path for step in scenario.steps if step.what == "rename" and ".h5.parts/" in step.other]
    return [number for number in numbers(scenario) if scenario.steps[number].path not in parts[1:]]


# Dying after a step is dying before the next one, so that one of both is enough, and the very last.
@pytest.mark.parametrize("first", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW)])
def test_dying_at_every_third_step_of_commits_and_of_packing(
    featcache: Program, extraction: Scenario, first: int
) -> None:
    die_everywhere(featcache, extraction, "die before", without_second_part(extraction)[first::3])
    if first == 0:
        die_everywhere(featcache, extraction, "die after", [len(extraction.steps) - 1])


def test_dying_in_the_middle_of_a_write(featcache: Program, extraction: Scenario) -> None:
    largest = sorted(numbers(extraction, "write"), key=lambda number: -len(extraction.steps[number].data))
    die_everywhere(featcache, extraction, "torn", largest[:2])


def test_a_system_that_writes_less_than_it_is_given(featcache: Program, extraction: Scenario) -> None:
    die_everywhere(featcache, extraction, "short", numbers(extraction, "write")[:2])


@pytest.mark.parametrize("make", [fitting, pytest.param(predicting, marks=SLOW), pytest.param(repairing, marks=SLOW)])
def test_dying_while_something_is_replaced(featcache: Program, tmp_path: Path, make: Any) -> None:
    scenario = make(featcache, tmp_path)
    die_everywhere(featcache, scenario, "die before", numbers(scenario, "rename", "exchange", "rmdir"))
    die_everywhere(featcache, scenario, "die after", numbers(scenario, "rename", "exchange"))


KINDS = {
    "die before": (),
    "die after": ("rename", "exchange", "unlink", "rmdir"),
    "torn": ("write",),
    "short": ("write",),
}


@SOAK
@pytest.mark.parametrize("make", SCENARIOS)
@pytest.mark.parametrize("mode", KINDS)
def test_every_step_of_every_command(featcache: Program, tmp_path: Path, make: Any, mode: str) -> None:
    scenario = make(featcache, tmp_path)
    steps = numbers(scenario, *KINDS[mode])[:: 3 if make is finetuning else 1]
    print(f"{make.__name__}: {mode} at {len(steps)} of {len(scenario.steps)} steps")
    die_everywhere(featcache, scenario, mode, steps)


# --------------------------------------------------------------------------------- signals at random moments

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def interrupt(featcache: Program, scenario: Scenario, seed: int, *, cold: bool) -> None:
    """One signal at a random moment; every second one in the first second of a new process."""
    chance = random.Random(seed)
    number = SIGNALS[seed % 3]
    after = chance.uniform(0, 1.0 if cold else 1.2 * scenario.seconds)
    context = (f"seed {seed}", number, after, "cold" if cold else "warm")
    scenario.reset()
    outcome = scenario.run(featcache, kill=number, after=after, cold=cold)
    starting = cold and "Fatal Python error: init" in outcome.err  # what Python makes of a signal while it starts
    over = outcome.code in (0, -number, 128 + number)  # before the signal came, or nobody was listening yet
    assert over or starting, (context, outcome.code, outcome.err)
    # Where Python cannot raise an exception, in a finalizer, it prints it and goes on.
    assert "Traceback" not in outcome.err or cold or "Exception ignored in" in outcome.err, (context, outcome.err)
    scenario.check_whole(context)
    scenario.check_resumed(featcache, context)


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 25), marks=SLOW)], ids=["few", "more"])
def test_signals_at_random_moments_of_extract(featcache: Program, extraction: Scenario, seeds: range) -> None:
    for seed in seeds:  # six: each signal, to a warm process and to a cold one
        interrupt(featcache, extraction, seed, cold=seed % 2 == 0)


@SLOW
@pytest.mark.parametrize(("make", "count"), [(fitting, 6), (predicting, 6), (finetuning, 3)])
def test_signals_at_random_moments(featcache: Program, tmp_path: Path, make: Any, count: int) -> None:
    scenario = make(featcache, tmp_path)
    for seed in range(count):
        interrupt(featcache, scenario, seed, cold=seed % 2 == 0)


@SOAK
@pytest.mark.parametrize(("make", "count"), [(extracting, 450), (fitting, 250), (predicting, 250), (finetuning, 50)])
def test_a_thousand_signals(featcache: Program, tmp_path: Path, make: Any, count: int) -> None:
    scenario = make(featcache, tmp_path)
    for seed in range(1000, 1000 + count):
        interrupt(featcache, scenario, seed, cold=seed % 2 == 0)


# ---------------------------------------------------------------------------------------- chains of kills


def chain(featcache: Program, scenario: Scenario, seed: int, rounds: int) -> None:
    """Killed again and again on one cache; whatever is committed by then stays."""
    chance = random.Random(seed)
    scenario.reset()
    kept = 0
    for number in range(rounds):
        context = (f"seed {seed}", f"round {number}")
        scenario.run(featcache, after=chance.uniform(0.3, 1.0) * scenario.seconds)
        scenario.check_whole(context)
        rows = sum(len(FeatureCache.open(part)) for part in scenario.folder.glob("*.parts/*.h5"))
        packed = contents(scenario.target) == scenario.after
        assert packed or rows >= kept, context
        kept = rows
        if packed:
            scenario.reset()
            kept = 0
    scenario.check_resumed(featcache, (f"seed {seed}", "the last round"))


@pytest.mark.parametrize("rounds", [6, pytest.param(20, marks=SLOW)])
def test_a_chain_of_kills(featcache: Program, extraction: Scenario, rounds: int) -> None:
    chain(featcache, extraction, seed=0, rounds=rounds)


@SOAK
@pytest.mark.parametrize("seed", range(1, 51))
def test_chains_of_kills(featcache: Program, extraction: Scenario, seed: int) -> None:
    chain(featcache, extraction, seed, rounds=20)


# ------------------------------------------------------------------------------------------------ lost power


class Disk:
    """What a disk may hold after its power was cut, given the steps until then.

    Data counts as written once its file is synced, names once their folder is. Of the rest any page of a file may be there,
    be missing or be torn in sectors of 512 bytes, and of what happened to the names in a folder any first part may be
    there: a journal keeps their order, and promises no more.
    """

    def __init__(self, base: Path, root: Path, steps: tuple[Step, ...], chance: random.Random) -> None:
        self._root, self._chance = root, chance
        self._files: dict[int, bytearray] = {}  # inode -> what a running system sees
        self._durable: dict[int, bytearray] = {}  # inode -> what has been synced
        self._written: dict[int, list[tuple[int, int]]] = {}  # inode -> (offset, length) since then
        self._names: dict[str, int] = {}
        self._folders: set[str] = set()
        self._inodes = 0
        for path in sorted(base.rglob("*")):
            name = str(root / path.relative_to(base))
            if path.is_dir():
                self._folders.add(name)
            else:
                inode = self._new(bytearray(path.read_bytes()))
                self._names[name] = inode
        self._kept = (dict(self._names), set(self._folders))
        self._pending: list[tuple[set[str], Callable[[dict[str, int], set[str]], None]]] = []
        for step in steps:
            self._take(step)

    def _new(self, data: bytearray) -> int:
        self._inodes += 1
        self._files[self._inodes], self._durable[self._inodes] = data, bytearray(data)
        self._written[self._inodes] = []
        return self._inodes

    def _change(self, folders: set[str], change: Callable[[dict[str, int], set[str]], None]) -> None:
        change(self._names, self._folders)
        self._pending.append((folders, change))

    def _take(self, step: Step) -> None:
        here = {str(Path(step.path).parent)}
        if step.what in ("open", "truncate"):
            if step.path not in self._names:
                inode = self._new(bytearray())
                self._change(here, lambda names, _: names.__setitem__(step.path, inode))
            elif step.what == "truncate":
                self._files[self._names[step.path]].clear()
        elif step.what == "write":
            inode = self._names[step.path]
            data = self._files[inode]
            data.extend(bytes(max(0, step.offset + len(step.data) - len(data))))
            data[step.offset : step.offset + len(step.data)] = step.data
            self._written[inode].append((step.offset, len(step.data)))
        elif step.what == "resize":
            data = self._files[self._names[step.path]]
            del data[step.offset :]
            data.extend(bytes(step.offset - len(data)))
        elif step.what == "fsync" and step.path in self._names:
            inode = self._names[step.path]
            self._durable[inode], self._written[inode] = bytearray(self._files[inode]), []
        elif step.what == "fsync":
            self._settle(step.path)
        elif step.what == "mkdir":
            self._change(here, lambda _, folders: folders.add(step.path))
        elif step.what == "rmdir":
            self._change(here, lambda _, folders: folders.discard(step.path))
        elif step.what == "unlink":
            self._change(here, lambda names, _: names.pop(step.path, None))
        elif step.what != "failed":
            self._change({*here, str(Path(step.other).parent)}, lambda *disk: _rename(*disk, step))

    def _settle(self, folder: str) -> None:
        """Names in ``folder`` are durable now; a journal takes along all that came before."""
        last = max((k for k, (folders, _) in enumerate(self._pending) if folder in folders), default=-1)
        for _, change in self._pending[: last + 1]:
            change(*self._kept)
        self._pending = self._pending[last + 1 :]

    def after_power_cut(self, target: Path) -> None:
        """Write one of the states it may be in into ``target``."""
        names, folders = dict(self._kept[0]), set(self._kept[1])
        for _, change in self._pending[: self._chance.randint(0, len(self._pending))]:
            change(names, folders)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for folder in sorted(folders):
            (target / Path(folder).relative_to(self._root)).mkdir(parents=True, exist_ok=True)
        for name, inode in names.items():
            path = target / Path(name).relative_to(self._root)
            if path.parent.is_dir():  # a file in a folder that was never recorded is lost with it
                path.write_bytes(self._torn(inode))

    def _torn(self, inode: int) -> bytes:
        new, old, chance = self._files[inode], self._durable[inode], self._chance
        if not self._written[inode] and len(new) == len(old):
            return bytes(old)
        size = chance.choice([len(old), len(new), chance.randint(0, max(len(new), len(old)))])
        data = bytearray(old[:size].ljust(size, b"\0"))
        touched = {
            page for start, length in self._written[inode] for page in range(start // 512, (start + length) // 512 + 1)
        }
        whole = chance.random() < 0.5  # pages of 4 KiB arrive, or sectors of 512 bytes
        arrived: dict[int, bool] = {}
        for sector in sorted(touched):
            if arrived.setdefault(sector // 8 if whole else -sector, chance.random() < 0.5):
                data[sector * 512 : (sector + 1) * 512] = new[sector * 512 : (sector + 1) * 512]
        return bytes(data[:size])


def _rename(names: dict[str, int], folders: set[str], step: Step) -> None:
    """Rename or exchange files, or folders with all that is in them."""
    moved: list[tuple[str, str]] = []
    pairs = [(step.path, step.other), (step.other, step.path)][: 2 if step.what == "exchange" else 1]
    for first, second in pairs:
        moved += [(name, second + name[len(first) :]) for name in (*names, *folders) if _below(name, first)]
    inodes = {old: names.pop(old) for old, _ in moved if old in names}
    there = {old for old, _ in moved if old in folders}
    folders -= there
    for old, new in moved:
        if old in inodes:
            names[new] = inodes[old]
        elif old in there:
            folders.add(new)


def _below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(folder + "/")


def lose_power(featcache: Program, scenario: Scenario, seeds: range, *, resume_every: int) -> None:
    """After any number of steps, in any state the disk may be in."""
    scenario.reset()
    for seed in seeds:
        chance = random.Random(seed)
        cut = (seed - seeds.start) % (len(scenario.steps) + 1)  # every first part of the steps in turn
        disk = Disk(scenario.base, scenario.folder, scenario.steps[:cut], chance)
        disk.after_power_cut(scenario.folder)
        context = (f"seed {seed}", f"after {cut} steps", scenario.steps[cut - 1] if cut else None)
        scenario.check_whole(context)
        if "extract" in scenario.arguments and contents(scenario.target) != scenario.after:
            rows = sum(len(contents_of_part(part)) for part in scenario.folder.glob("*.parts/*.h5"))
            assert rows >= synced_rows(scenario.steps[:cut]), (context, "committed rows are gone")
        if seed % resume_every == 0:
            scenario.check_resumed(featcache, context)


def contents_of_part(path: Path) -> FeatureCache:
    cache = FeatureCache.open(path)
    cache.check_features()
    return cache


def synced_rows(steps: tuple[Step, ...]) -> int:
    """Rows in parts whose commit was over: renamed, and the folder synced."""
    synced = max(
        (k for k, step in enumerate(steps) if step.what == "fsync" and step.path.endswith(".h5.parts")), default=0
    )
    return committed(steps[:synced])


def test_power_lost_at_any_step(featcache: Program, extraction: Scenario) -> None:
    lose_power(featcache, extraction, range(200), resume_every=20)


@SOAK
@pytest.mark.parametrize("make", SCENARIOS)
def test_power_lost_a_thousand_times(featcache: Program, tmp_path: Path, make: Any) -> None:
    lose_power(featcache, make(featcache, tmp_path), range(1000), resume_every=25)


# ------------------------------------------------------------------------------------------------ full disks


def fill(featcache: Program, scenario: Scenario, fault: Fault | None, limits: dict[str, int] | None = None) -> bool:
    """Fail as ``fault`` or the limits say, then go on with room: whether it failed at all."""
    scenario.reset()
    outcome = scenario.run(featcache, fault=fault, limits=limits)
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
    scenario.check_resumed(featcache, context)
    return True


def offsets(scenario: Scenario, count: int) -> list[int]:
    total = sum(len(step.data) for step in scenario.steps)
    return [total * k // count for k in range(count)]


@pytest.mark.parametrize(
    "error",
    [errno.ENOSPC, pytest.param(errno.EDQUOT, marks=SLOW), pytest.param(errno.EIO, marks=SLOW)],
    ids=["ENOSPC", "EDQUOT", "EIO"],
)
def test_disk_full_at_many_offsets(featcache: Program, extraction: Scenario, error: int) -> None:
    for budget in offsets(extraction, 5):
        assert fill(featcache, extraction, Fault("full", error=error, budget=budget))


def test_the_message_says_how_much_is_needed(featcache: Program, extraction: Scenario) -> None:
    extraction.reset()
    outcome = extraction.run(featcache, fault=Fault("full", budget=0))
    needed = next(step.offset for step in extraction.steps if step.what == "resize")  # the first part's final size
    assert outcome.err.splitlines()[-1].endswith(
        f"No space left on device ({needed:,} bytes are needed); free some space and run the same command again"
    )


@SLOW
def test_a_limit_on_the_size_of_files(featcache: Program, extraction: Scenario) -> None:
    largest = max(len(step.data) for step in extraction.steps)
    for limit in (1000, 30_000, largest - 1):
        assert fill(featcache, extraction, None, {"RLIMIT_FSIZE": limit}), limit


def test_a_step_that_fails_once(featcache: Program, extraction: Scenario) -> None:
    failed = [
        fill(featcache, extraction, Fault("fail once", number, errno.EIO)) for number in numbers(extraction, "fsync")
    ]
    assert sum(failed) >= 4


@SOAK
@pytest.mark.parametrize("make", SCENARIOS)
def test_every_step_fails(featcache: Program, tmp_path: Path, make: Any) -> None:
    scenario = make(featcache, tmp_path)
    steps = numbers(scenario)[:: 4 if make is finetuning else 1]
    for mode in ("fail", "fail once"):
        failed = [
            fill(featcache, scenario, Fault(mode, number, error))
            for number, error in zip(steps, [errno.ENOSPC, errno.EDQUOT, errno.EIO] * len(steps), strict=False)
        ]
        print(f"{make.__name__}: {mode} at {len(steps)} steps, {sum(failed)} ended with exit 1")
    full = [fill(featcache, scenario, Fault("full", budget=budget)) for budget in offsets(scenario, 30)]
    assert all(full)


@SOAK
def test_a_small_disk(featcache: Program, tmp_path: Path) -> None:
    """A real one: a tmpfs with room for less and less."""
    scenario = extracting(featcache, tmp_path)
    for size in (64, 2900, 3000, 5700, 5800, 5850):  # KiB
        scenario.reset()
        kept = tmp_path / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.move(scenario.folder, kept)
        scenario.folder.mkdir()
        if os.system(f"mount -t tmpfs -o size={size}k none {scenario.folder}"):
            pytest.skip("mounting a file system is not allowed here")
        try:
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(kept, scenario.folder, dirs_exist_ok=True)
            outcome = scenario.run(featcache)
            assert outcome.code == 1, (size, outcome.err)
            assert any(words in outcome.err for words in ("not enough space", "No space left", "damaged")), outcome.err
        finally:
            os.system(f"umount {scenario.folder}")


def test_contents_notice_damage(tmp_path: Path) -> None:
    """The tests above rest on this: what is not whole raises."""
    (tmp_path / "f.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(FeatcacheError):
        contents(tmp_path / "f.h5")
