"""Parts made by real processes that are killed, race, and see other clocks: what is merged is what one run makes, byte for byte.

By default one seed; hundreds of kills over 1, 2, 7 and 64 parts: ``benchmarks/parts.py kills``.
"""

import functools
import itertools
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import COLOURS, TINY_FLAGS, make_photos, write_photo
from faults import Fault, Program
from packing import FORMS, parquet, read_folder
from test_same_result import assert_same

from featcache.cache.cache import FeatureCache
from featcache.extraction.parts import open_parts
from featcache.system.workdir import work_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and held on Linux only")
SETTINGS = {"extraction.parts.MAX_ROWS": 4}  # small parts, so that there are some to lose


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_photos(tmp_path_factory.mktemp("parts") / "photos", each=14, settled=True)
    (root / "green" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    os.utime(root / "green" / "broken.jpg", (1e9, 1e9))
    return root


@pytest.fixture(scope="module")
def whole(photos: Path, warm: Program) -> FeatureCache:
    warm.check("extract", photos, "-o", photos.parent / "whole.h5", *TINY_FLAGS)
    return FeatureCache.open(photos.parent / "whole.h5")


def rows_in(output: Path) -> set[str]:
    """Images that published parts hold."""
    parts = open_parts(work_folder(output), shared=True) if work_folder(output).is_dir() else []
    return {path for part in parts for path in part.paths}


@pytest.mark.parametrize(("of", "kills"), [(2, 3), pytest.param(7, 8, marks=pytest.mark.slow)])
def test_workers_killed_at_random(
    photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, of: int, kills: int
) -> None:
    """Two at a time take parts in random order; each is killed at a random step on the disk, until so many are."""
    output, chance, left, seen = tmp_path / "f.h5", random.Random(of), [*range(1, of + 1)], set[str]()
    while left:
        batch = [left.pop() for _ in range(min(2, len(left)))]
        with ThreadPoolExecutor(2) as threads:
            tries = []
            for number in batch:
                mode, step = chance.choice(["die before", "die after"]), chance.randrange(10, 20 + 50 // of)
                fault = Fault(mode, step) if kills > 0 else None
                command = ("extract", photos, "-o", output, *TINY_FLAGS, "--part", f"{number}/{of}")
                tries.append(threads.submit(warm.run, *command, below=tmp_path, settings=SETTINGS, fault=fault))
        for number, outcome in zip(batch, (entry.result() for entry in tries), strict=True):
            assert outcome.code == 0 or outcome.died, (number, outcome)
            kills -= outcome.died
            left = [number, *left] if outcome.died else left
        found = rows_in(output)
        assert seen <= found, "what was published is gone"
        seen = found
    warm.check("merge", output, "--max-bad", 1)
    assert_same(output, whole)
    assert not work_folder(output).exists()


@pytest.mark.parametrize(  # dying after a step is dying before the next one
    ("mode", "at_most"),
    [
        pytest.param("die before", 8, marks=pytest.mark.slow),
        *(pytest.param(mode, 1000, marks=pytest.mark.soak) for mode in ("die before", "die after")),
    ],
)
def test_death_at_a_step_on_the_disk(
    photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, mode: str, at_most: int
) -> None:
    """Of the first part: also while it settles and publishes what counts for all."""
    command = ("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--part", "1/2")
    steps = len(warm.check(*command, below=tmp_path, trace=True, settings=SETTINGS).steps)
    assert steps > 20
    for step in range(0, steps, max(1, steps // at_most)):
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert warm.run(*command, below=tmp_path, fault=Fault(mode, step), settings=SETTINGS).died, step
        warm.check(*command)
        warm.check(*command[:-1], "2/2")
        warm.check("merge", tmp_path / "f.h5", "--max-bad", 1)
        assert_same(tmp_path / "f.h5", whole, step)


@pytest.mark.parametrize("at_most", [2, pytest.param(1000, marks=pytest.mark.soak)])
def test_merge_killed_at_a_step(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, at_most: int) -> None:
    output, before = tmp_path / "work" / "f.h5", tmp_path / "before"
    output.parent.mkdir()
    for number in (1, 2):
        warm.check("extract", photos, "-o", output, *TINY_FLAGS, "--part", f"{number}/2", settings=SETTINGS)
    shutil.copytree(output.parent, before)
    merge = ("merge", output, "--max-bad", 1)
    steps = len(warm.check(*merge, below=output.parent, trace=True).steps)
    for step in range(steps // 2, steps, max(1, steps // 2 // at_most)):  # from when the file is about to be there
        shutil.rmtree(output.parent)
        shutil.copytree(before, output.parent)
        assert warm.run(*merge, below=output.parent, fault=Fault("die before", step)).died, step
        warm.check(*merge)
        assert_same(output, whole, step)


def _die_at(moment: str, call: int) -> None:
    """In the process: be killed when ``featcache.MOMENT`` is called so often."""
    where, _, name = moment.rpartition(".")
    home, calls = pkgutil.resolve_name(f"featcache.{where}"), itertools.count(1)
    original = getattr(home, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(home, name, counted)


KILLS = (  # which command; where it is killed, and the how manieth time
    ("1/2", "extraction.listing.give_name", 1),  # all is settled, and not published
    ("1/2", "extraction.in_parts.make_plan", 1),  # it is, and nothing embedded
    ("1/2", "extraction.parts.part_name", 2),  # between two parts
    ("2/2", "extraction.in_parts.PartReport", 1),  # the last part is published
    ("merge", "extraction.in_parts.pack", 1),
    ("merge", "extraction.in_parts.remove_parts", 1),
)


@pytest.mark.parametrize(
    ("form", "kills"),
    [
        ("a.tar.gz", KILLS[2:3]),
        *(pytest.param(form, KILLS, marks=pytest.mark.slow) for form in ("deflated.zip", "train.parquet")),
    ],
)
def test_an_archive_killed_at_each_stage(
    photos: Path, tmp_path: Path, warm: Program, form: str, kills: tuple[tuple[str, str, int], ...]
) -> None:
    """One after the other, upon what the one before left; meanwhile two processes make the same share at once."""
    files, output = read_folder(photos), tmp_path / "f.h5"
    if form == "train.parquet":
        pytest.importorskip("pyarrow")
        names = tuple(sorted({name.split("/")[0] for name in files}))
        source = parquet(
            tmp_path / form, [*files.values()], names, label=[names.index(name.split("/")[0]) for name in files]
        )
    else:
        source = FORMS[form](tmp_path / form, files)
    part = ("extract", source, "-o", output, *TINY_FLAGS, "--part")
    seen = set[str]()
    for what, moment, call in kills:
        command = ("merge", output, "--max-bad", 1) if what == "merge" else (*part, what)
        if what == "merge":
            warm.check(*part, "2/2")
        assert warm.run(*command, before=functools.partial(_die_at, moment, call), settings=SETTINGS).died, moment
        seen |= (found := rows_in(output))
        assert seen == found or output.exists(), moment
        if moment.endswith("part_name"):
            assert found, "one part was published"
            with warm.held("extraction.parts.part_name", *part, "1/2", settings=SETTINGS) as first:
                warm.check(*part, "1/2")
            assert first.result().code == 0, first.result().err
    if kills[-1][0] != "merge":
        warm.check(*part, "2/2")
    warm.check("merge", output, "--max-bad", 1)
    warm.check("extract", source, "-o", tmp_path / "one.h5", *TINY_FLAGS, "--max-bad", 1)
    assert_same(output, FeatureCache.open(tmp_path / "one.h5"))
    assert not [*tmp_path.glob("*.parts")]


def test_two_first_parts_in_a_race(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program) -> None:
    """Both have settled everything and are about to publish it; one wins, and both go on."""
    commands = [("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--part", f"{number}/2") for number in (1, 2)]
    with warm.held("extraction.listing.give_name", *commands[0]) as first:
        with warm.held("extraction.listing.give_name", *commands[1]) as second:
            pass
        refused = warm.run("merge", tmp_path / "f.h5", settings={"system.workdir.PATIENCE": 0.1})
        assert refused.code == 1
        assert "are being made, or packed, at this moment" in refused.err or second.result().code
    assert (first.result().code, second.result().code) == (0, 0), (first.result().err, second.result().err)
    warm.check("merge", tmp_path / "f.h5", "--max-bad", 1)
    assert_same(tmp_path / "f.h5", whole)


def _yesterday() -> None:
    """A machine whose clock is a day behind."""
    import time

    now = time.time_ns
    time.time_ns = lambda: now() - 86_400_000_000_000


@pytest.mark.slow
def test_clocks_that_differ(photos: Path, tmp_path: Path, warm: Program) -> None:
    """A part named earlier was made later, of a file that changed: its content decides, not a clock."""
    source, output = tmp_path / "photos", tmp_path / "f.h5"
    shutil.copytree(photos, source)
    command = ("extract", source, "-o", output, *TINY_FLAGS)
    warm.check(*command, "--part", "1/2")
    warm.check(*command, "--part", "2/2", before=_yesterday)
    path = write_photo(source / "red" / "00.png", COLOURS["red"], 7).rename(source / "red" / "00.jpg")
    os.utime(path, (1, 1))
    warm.check(*command, "--max-bad", 1, before=_yesterday)
    warm.check("extract", source, "-o", tmp_path / "one.h5", *TINY_FLAGS)
    assert_same(output, FeatureCache.open(tmp_path / "one.h5"))


# -------------------------------------- as schedulers start them; Slurm and Kubernetes: ``tests/test_examples.py``


@pytest.mark.slow
def test_torchrun(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program) -> None:
    environ = os.environ | {"FEATCACHE_FUSE": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "featcache"]
    command: list[Any] = ["extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--part", "auto"]
    done = subprocess.run([*start, *command], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warm.check("merge", tmp_path / "f.h5", "--max-bad", 1)
    assert_same(tmp_path / "f.h5", whole)
