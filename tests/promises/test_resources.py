"""What a run may take: file descriptors, memory, threads, folders it can write in, and that it gives all of it back.

In: real processes under limits. Out: the same results as without them, or a refusal before any work; bytes per row.
By default: memory per row of 300,000 images, 120 parts, one process that gives everything back. ``slow``: more of them, and pools.
``FEATCACHE_SOAK_SECONDS`` says how long the long run takes.
"""

import ctypes
import dataclasses
import functools
import gc
import hashlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import plain_rows
from conftest import SPEC, TINY, TINY_FLAGS, make_photos, write_photo
from faults import Program
from test_same_result import assert_same

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Provenance, Rows, encode_names
from featcache.cache.write import write_cache
from featcache.extraction.extract import extract
from featcache.images.formats import REVISION
from featcache.images.source import ImageList
from featcache.models.evaluate import evaluate, scores_of
from featcache.models.fit import fit_head
from featcache.models.limits import Limits
from featcache.models.model import load_model
from featcache.models.predict import predict
from featcache.models.scoring import score_cache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and name spaces of Linux")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, warm: Program) -> Path:
    """A folder with photos/, f.h5 and a model m/."""
    folder = tmp_path_factory.mktemp("resources")
    make_photos(folder / "photos")
    warm.check("extract", folder / "photos", "-o", folder / "f.h5", *TINY_FLAGS)
    warm.check("fit-head", folder / "f.h5", "-o", folder / "m", "--C", 1, "--folds", 0)
    return folder


# -------------------------------------------------------------------------------------------------- descriptors


@pytest.mark.parametrize("each", [40, pytest.param(300, marks=pytest.mark.soak)])
def test_many_parts_under_a_small_limit_of_open_files(tmp_path: Path, warm: Program, each: int) -> None:
    """A part per image, of a run that died before it packed them."""
    source, output, count = make_photos(tmp_path / "photos", each=each), tmp_path / "f.h5", 3 * each
    command = ("extract", source, *TINY_FLAGS, "--batch-size", 1, "--json", "-o")
    options = {"settings": {"extraction.parts.MAX_ROWS": 1}, "timeout": 3600}
    with warm.held("extraction.extract.pack", *command, output, die=True, **options) as first:
        assert len(list(tmp_path.glob("f.h5.parts/*.h5"))) == count
    assert first.result().died
    write_photo(source / "red" / "new.jpg", (1, 2, 3), 0)
    done = warm.check(*command, output, limits={"RLIMIT_NOFILE": 64}, timeout=3600)
    assert (done.result["reused"], done.result["embedded"]) == (count, 1)
    warm.check(*command, tmp_path / "whole.h5", timeout=3600)
    assert_same(output, FeatureCache.open(tmp_path / "whole.h5"))
    assert not (tmp_path / "f.h5.parts").exists()


def use_everything(made: str, work: str, *, rounds: float = math.inf, seconds: float = math.inf) -> list[list[int]]:
    """Whole jobs in one process: after each [open descriptors, threads, bytes of memory]."""
    taken, root, output, until = [], Path(made), Path(work), time.monotonic() + seconds
    while len(taken) < rounds and time.monotonic() < until:
        (output / "f.h5").unlink(missing_ok=True)
        extract(root / "photos", output / "f.h5", TINY, workers=1 + len(taken) % 3)
        fit_head(output / "f.h5", output / "m", C=1.0, folds=0)
        assert len(list(predict(output / "m", [root / "photos"]))) == 18
        assert len(list(predict(output / "m", [output / "f.h5"]))) == 18
        cache = FeatureCache.open(output / "f.h5")
        assert cache.verify() == [] and cache.X.shape[0] == 18
        del cache
        gc.collect()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        taken.append([len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), memory])
    return taken


def test_descriptors_and_threads_are_given_back(made: Path, tmp_path: Path, warm: Program) -> None:
    taken = warm.check(before=functools.partial(use_everything, str(made), str(tmp_path), rounds=6)).result
    assert {tuple(entry[:2]) for entry in taken[1:]} == {tuple(taken[0][:2])}, taken


def leave_tensors(made: str, work: str) -> dict[str, int]:
    """Tensors with some hundred values and more that each job has left, where what gets old is never looked through for cycles."""
    import torch

    from featcache.finetuning.finetune import finetune

    root, output, left = Path(made), Path(work), {}
    changes = {"epochs": 1, "batch_size": 6, "lr": 1e-6, "backbone_lr": 1e-7, "unfreeze": "all"}
    jobs: dict[str, Callable[[], Any]] = {
        "extract": lambda: extract(root / "photos", output / "f.h5", dataclasses.replace(TINY, backbone="resnet18")),
        "fit_head": lambda: fit_head(output / "f.h5", output / "m", C=1.0, folds=0),
        "predict": lambda: len(list(predict(output / "m", [root / "photos"]))),
        "finetune": lambda: finetune(
            root / "photos", output / "t", init=output / "m", changes=changes, budget="1h", precision="fp32"
        ),
    }
    for job in jobs.values():  # what is loaded first, stays
        job()
    (output / "f.h5").unlink()
    shutil.rmtree(output / "t")
    gc.collect()
    gc.set_threshold(700, 10, 10**6)
    for name, job in jobs.items():
        job()
        gc.collect(1)
        left[name] = sum(isinstance(each, torch.Tensor) and each.numel() > 500 for each in gc.get_objects())
    return left


def test_networks_are_given_back_at_once(made: Path, tmp_path: Path, warm: Program) -> None:
    """Not when Python looks for cycles next: it counts objects, not a GPU's memory."""
    left = warm.check(before=functools.partial(leave_tensors, str(made), str(tmp_path))).result
    assert left == dict.fromkeys(("extract", "fit_head", "predict", "finetune"), 0)


# -------------------------------------------------------------------------------------------------------- memory


def make_many(folder: str, rows: int) -> None:
    """A cache of ``rows`` images that do not exist, as ``extract`` would have made it."""
    images = list_many(rows)
    digests = np.random.default_rng(0).integers(0, 256, (rows, 32), np.uint8)
    columns = Rows(encode_names(images.paths), images.labels, images.splits, digests, images.sizes, images.mtimes)
    blocks = (np.full((min(4096, rows - start), 64), 1, np.float16) for start in range(0, rows, 4096))
    provenance = Provenance(request=TINY.record(), source="somewhere", reload="IMAGENET1K_V1", decoder=REVISION)
    path = Path(folder) / "f.h5"
    write_cache(path, columns, blocks, dim=64, spec=SPEC, classes=images.classes, provenance=provenance)


def list_many(rows: int, shift: int = 0) -> ImageList:
    n = np.arange(rows, dtype=np.int64)
    return ImageList(
        root=Path("/nowhere"),
        paths=tuple(f"c{number % 10}/{number:09d}.jpg" for number in range(rows)),
        labels=((n + shift) % 10).astype(np.int32),
        classes=tuple(f"c{number}" for number in range(10)),
        splits=np.zeros(rows, np.uint8),
        sizes=n + 1000,
        mtimes=n + 10**18,
    )


def go_over_many(folder: str, rows: int, way: str) -> tuple[int, int]:
    """One of the ways in which rows are handled; (embedded, reused), or the rows found damaged."""
    cache = Path(folder) / "f.h5"
    if way == "verify":
        return len(FeatureCache.open(cache).verify()), rows
    images, output = list_many(rows, shift=way == "packing"), Path(folder) / "g.h5" if way == "reuse" else cache
    report = extract(images, output, TINY, reuse=[cache] if way == "reuse" else [])
    return report.embedded, report.reused


# Bytes per row, of which the list of images itself takes about 150 (a Python string and five numbers), a cache's columns,
# with paths of 16 bytes, about 70: as found, and a quarter more. Features are never in memory but for a block.
MOST = {"verify": 90, "unchanged": 410, "packing": 410, "reuse": 380}


@pytest.mark.parametrize(
    "many",
    [300_000, pytest.param(10_000_000, marks=pytest.mark.soak)],
)
def test_memory_per_row(tmp_path: Path, warm: Program, many: int) -> None:
    """Peak memory with many rows less that with few, over the difference."""
    few, folder = 10_000, str(tmp_path)
    peaks: dict[str, list[int]] = {way: [] for way in MOST}
    for rows in (few, many):
        warm.check(before=functools.partial(make_many, folder, rows), timeout=3600)
        for way in MOST:
            done = warm.check(before=functools.partial(go_over_many, folder, rows, way), timeout=3600)
            assert done.result == [0, rows], (way, done.result)
            peaks[way].append(done.peak)
        (tmp_path / "g.h5").unlink()
    found = {way: (peak[1] - peak[0]) / (many - few) for way, peak in peaks.items()}
    print({way: round(value) for way, value in found.items()}, "bytes per row,", many, "rows")
    assert {way: value for way, value in found.items() if value > MOST[way]} == {}, found


# Bytes per row of a cache of 4 values in 10 classes, of which half train and half are test: as found, and a quarter more.
# Among them are about 80 of columns, and what a model keeps of the images that it saw, 40 of each; of scored rows, 40 each time.
MOST_OF_MODELS = {"fit": 240, "predict": 180, "evaluate": 290}


def test_memory_per_row_of_what_models_do(tmp_path: Path) -> None:
    """As NumPy and Python allocate it: what is kept of each row, and nothing of what is computed of it but for a block."""
    peaks: dict[str, list[int]] = {way: [] for way in MOST_OF_MODELS}
    for rows in (100, 9_000, 19_000):  # the first: what is imported late, and kept for good
        images = list_many(rows)
        labels, splits = np.arange(rows) * 10 // rows, np.arange(rows) % 2 * 2 + 1
        columns = plain_rows(images.paths, labels=labels.astype(np.int32), splits=splits.astype(np.uint8))
        noise = np.random.default_rng(0).normal(size=(rows, 4))
        X = (noise + 3 * np.eye(10, 4)[labels]).astype(np.float16)
        cache, model = tmp_path / f"{rows}.h5", tmp_path / f"m{rows}"
        write_cache(cache, columns, [X], dim=4, spec=SPEC, classes=images.classes, provenance=Provenance(reload="none"))
        ways: dict[str, Callable[[], object]] = {
            "fit": lambda: fit_head(cache, model, clf="linear", folds=0, epochs=1),  # noqa: B023
            "predict": lambda: deque(predict(model, cache), maxlen=0),  # noqa: B023
            "evaluate": lambda: evaluate(model, cache),  # noqa: B023
        }
        for way, do in ways.items():
            if rows > 100:
                tracemalloc.start()
            try:
                do()
                peaks[way].append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
    found = {way: (peak[2] - peak[1]) / 10_000 for way, peak in peaks.items()}
    print({way: round(value) for way, value in found.items()}, "bytes per row")
    assert {way: value for way, value in found.items() if value > MOST_OF_MODELS[way]} == {}, found


def test_scores_of_many_classes_take_no_memory_per_class(tmp_path: Path) -> None:
    """400 classes: probabilities alone would be 1,600 bytes a row, and as much again before the temperature."""
    peaks = []
    for rows in (400, 2_500, 6_500):  # the first: what is imported late, and kept for good
        columns = plain_rows(list_many(rows).paths, labels=np.arange(rows, dtype=np.int32) % 400)
        X = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float16)
        path, classes = tmp_path / f"{rows}.h5", tuple(f"c{k:03d}" for k in range(400))
        write_cache(path, columns, [X], dim=4, spec=SPEC, classes=classes, provenance=Provenance(reload="none"))
        if rows == 400:
            fit_head(path, tmp_path / "m", clf="linear", folds=0, epochs=1)
        model, cache = load_model(tmp_path / "m"), FeatureCache.open(path)
        limits = Limits(model.classes, abstain_below=0.5)
        tracemalloc.start()
        try:
            scored = score_cache(model, cache, split="all", limits=limits, most=0)
            assert scores_of(model, scored, limits, seen=np.ones(rows, bool))["n"] == rows
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    found = (peaks[2] - peaks[1]) / 4_000
    print(round(found), "bytes per row")
    assert found < 250


# ----------------------------------------------------------------------------------------------- processes of a user


def outcome_of(task: tuple[str, str, Any, Any]) -> list[str]:
    """What a worker of a user's pool does with objects that its parent made; sha256 of what it gets."""
    made, work, cache, model = task
    rows = cache.take(np.arange(len(cache))[::2])
    output = Path(work) / f"{os.getpid()}.h5"
    extract(Path(made) / "photos", output, TINY)
    fit_head(output, output.with_suffix(""), clf="linear", folds=0)
    probabilities = [row.probabilities for row in predict(model, [Path(made) / "f.h5"])]
    arrays = (rows, cache.X, FeatureCache.open(output).X, np.stack(probabilities))  # type: ignore[arg-type]
    return [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]


FOLDERS = [folder for folder in Path(__file__).parents[1].iterdir() if folder.is_dir()]  # as in conftest.py


def work_in_pools(made: str, work: str) -> None:
    """A user's script: do it here, then in pools of processes that are forked from here, and started anew."""
    cache, model = FeatureCache.open(Path(made) / "f.h5"), load_model(Path(made) / "m")
    task = (made, work, cache, model)
    found = {"here": [outcome_of(task)]}
    for method, processes in (("fork", 2), ("spawn", 1)):
        with multiprocessing.get_context(method).Pool(processes) as pool:
            found[method] = pool.map_async(outcome_of, [task] * processes, 1).get(timeout=100)
    print(json.dumps(found))


@pytest.mark.slow
def test_pools_of_processes(made: Path, tmp_path: Path) -> None:
    """Forked from a process that has embedded already, with all its threads, or started anew: the same results."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parents[1]), *map(str, FOLDERS)]!r}\n"
        "from test_resources import work_in_pools\n"
        "if __name__ == '__main__': work_in_pools(*sys.argv[1:])\n"
    )
    command = [sys.executable, script, made, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [len(found[name]) for name in ("here", "fork", "spawn")] == [1, 2, 1]
    for results in found.values():
        assert all(result == found["here"][0] for result in results), found


# ---------------------------------------------------------------------------------------- folders without permission


def read_only_but(*folders: str, temporary: str | None = None) -> None:
    """From here on this process finds everything read-only but some folders, as on a file system mounted so.

    There is then no temporary folder either, unless it is one of these, and the working folder is no way out.
    """
    new_mounts, readonly, remount, bind, recursive, private = 0x00020000, 1, 32, 4096, 16384, 1 << 18
    mount = ctypes.CDLL(None, use_errno=True).mount
    os.chdir("/")

    def do(source: str, target: str, flags: int) -> None:
        if mount(os.fsencode(source), os.fsencode(target), None, flags, None):
            raise OSError(ctypes.get_errno(), f"mount {target}")

    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    do("none", "/", recursive | private)
    for folder in folders:
        do(folder, folder, bind)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        target, kind = line.split()[1].encode().decode("unicode_escape"), line.split()[2]
        if target not in folders and kind not in ("proc", "sysfs", "devpts", "cgroup2", "mqueue"):
            mount(None, os.fsencode(target), None, remount | bind | readonly, None)  # some are so already
    for name in ("TMPDIR", "TEMP", "TMP"):
        os.environ.pop(name, None)
    if temporary:
        os.environ["TMPDIR"] = temporary
    writable = [path for path in ("/tmp", "/var/tmp", "/dev/shm", "/") if os.access(path, os.W_OK)]
    assert not writable, writable


@pytest.fixture(scope="module")
def _may_mount(warm: Program) -> None:
    """Root may, unless in a container that forbids it."""
    if warm.run(before=read_only_but).code:
        pytest.skip("needs the right to mount in a name space of its own")


@pytest.mark.usefixtures("_may_mount")
def test_only_the_folder_of_the_output_is_written_in(made: Path, tmp_path: Path, warm: Program) -> None:
    """Sources, caches and models may lie on read-only file systems, and there may be no folder for temporary files."""
    for command in (
        ("extract", made / "photos", "-o", tmp_path / "f.h5", *TINY_FLAGS),
        ("extract", made / "photos", "-o", tmp_path / "f.h5", *TINY_FLAGS),
        ("extract", made / "photos", "-o", tmp_path / "g.h5", *TINY_FLAGS, "--reuse", made / "f.h5"),
        ("fit-head", tmp_path / "f.h5", "-o", tmp_path / "m", "--folds", 3),
        ("fit-head", made / "f.h5", "-o", tmp_path / "m", "--clf", "linear", "--folds", 0),
        ("predict", made / "m", made / "photos", "-o", tmp_path / "out.csv"),
        ("predict", made / "m", made / "f.h5"),
        ("evaluate", made / "m", made / "photos"),
        ("finetune", made / "photos", "-o", tmp_path / "ft", "--init", made / "m", "--epochs", 1),
        ("export", made / "m", "-o", tmp_path / "model.safetensors"),
        ("info", made / "f.h5"),
        ("info", made / "m"),
        ("verify", made / "f.h5"),
        ("doctor", "--seconds", 0),
    ):
        # PyTorch's optimisers import its compiler, which does not start without a temporary folder.
        temporary = str(tmp_path) if command[0] == "finetune" else None
        done = warm.run(*command, before=functools.partial(read_only_but, str(tmp_path), temporary=temporary))
        assert done.code == 0, (command, done.err)
    assert_same(tmp_path / "f.h5", FeatureCache.open(made / "f.h5"))


@pytest.mark.usefixtures("_may_mount")
def test_an_output_that_cannot_be_written_is_refused_before_work(made: Path, tmp_path: Path, warm: Program) -> None:
    """Also for root, whom permission bits do not stop."""
    locked = tmp_path / "locked"
    locked.mkdir()
    for command in (
        ("extract", made / "photos", "-o", locked / "f.h5", *TINY_FLAGS),
        ("extract", made / "photos", "-o", made / "f.h5", *TINY_FLAGS),
        ("fit-head", made / "f.h5", "-o", locked / "m"),
        ("predict", made / "m", made / "photos", "-o", locked / "out.csv"),
        ("finetune", made / "photos", "-o", locked / "ft", "--init", made / "m", "--epochs", 1),
        ("export", made / "m", "-o", locked / "model.safetensors"),
    ):
        done = warm.run(*command, before=read_only_but)
        assert done.code == 1, (command, done)
        assert done.err.count("\n") == 1 and "no permission to write in" in done.err, (command, done.err)
    assert os.listdir(locked) == []


# ---------------------------------------------------------------------------------------------------- the long run


SECONDS = float(os.environ.get("FEATCACHE_SOAK_SECONDS", "1800"))


@pytest.mark.soak
def test_one_process_for_long(made: Path, tmp_path: Path, warm: Program) -> None:
    """Descriptors, threads and memory do not grow, whatever the number of jobs."""
    hook = functools.partial(use_everything, str(made), str(tmp_path), seconds=SECONDS)
    taken = warm.check(before=hook, timeout=2 * SECONDS + 600).result
    half = np.array(taken[len(taken) // 2 :], float)
    grows = np.polyfit(np.arange(len(half)), half, 1)[0]  # per round, by least squares
    per_round = f"per round: descriptors {grows[0]:+.4f}, threads {grows[1]:+.4f}, memory {grows[2] / 1024:+.1f} KiB"
    print(f"{len(taken)} rounds of extract, fit-head, predict twice, verify; {per_round}; at the end {taken[-1]}")
    assert abs(grows[0]) < 0.01 and abs(grows[1]) < 0.01, per_round
    assert grows[2] < 4 * 1024 + 2**20 / len(taken), per_round  # few rounds say little
