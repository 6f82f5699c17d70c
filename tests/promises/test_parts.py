"""Parts made by real processes that are killed, race, and see other clocks: what is merged is what one run makes, byte for byte.

By default one seed; hundreds of kills over 1, 2, 7 and 64 parts: ``benchmarks/parts.py kills``.
"""

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import COLOURS, TINY_FLAGS, make_photos, write_photo
from faults import Fault, Program, with_variables
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


# ------------------------------------------------------------------------------------------------- as schedulers start them

SLURM = """
#SBATCH --array=1-2
#SBATCH --output=part-%a.log
export OMP_NUM_THREADS=1
featcache extract "$PHOTOS" -o "$SHARED/features.h5" $FLAGS --part auto/2
[ "$SLURM_ARRAY_TASK_ID" = 2 ] || exit 0  # here only: the merge is a job of its own, --dependency=afterok:ARRAY
featcache merge "$SHARED/features.h5" --max-bad 1
"""
KUBERNETES = """
featcache extract "$PHOTOS" -o "$SHARED/features.h5" $FLAGS --part auto/2  # completions: 2, completionMode: Indexed
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name", "first"), [(SLURM, "SLURM_ARRAY_TASK_ID", 1), (KUBERNETES, "JOB_COMPLETION_INDEX", 0)]
)
def test_scripts_with_a_scheduler_s_variables(
    photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, script: str, name: str, first: int
) -> None:
    """The shell's commands, word for word, are run with its variables by a process that has PyTorch already."""
    (tmp_path / "featcache").write_text(f"""#!/bin/sh\nprintf '%s\\0' "${name}" "$@" '' >> '{tmp_path}/calls'\n""")
    (tmp_path / "featcache").chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PHOTOS": str(photos), "SHARED": str(tmp_path)}
    environ |= {"FLAGS": " ".join(TINY_FLAGS)}
    for task in (first, first + 1):
        subprocess.run(["bash", "-c", script], env=environ | {name: str(task)}, check=True)
    calls = [call.split("\0") for call in (tmp_path / "calls").read_text().split("\0\0")[:-1]]
    assert [(task, command[0]) for task, *command in calls[:2]] == [(str(first + k), "extract") for k in range(2)]
    for number, (task, *command) in enumerate(calls, 1):
        done = warm.check(*command, before=with_variables({name: task}))
        assert command[0] == "merge" or f"part {number}/2: {name}={task}" in done.err
    if name != "SLURM_ARRAY_TASK_ID":
        warm.check("merge", tmp_path / "features.h5", "--max-bad", "1")
    assert_same(tmp_path / "features.h5", whole)


@pytest.mark.slow
def test_torchrun(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program) -> None:
    environ = os.environ | {"FEATCACHE_FUSE": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "featcache"]
    command: list[Any] = ["extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--part", "auto"]
    done = subprocess.run([*start, *command], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warm.check("merge", tmp_path / "f.h5", "--max-bad", 1)
    assert_same(tmp_path / "f.h5", whole)
