"""Are parts made by killed workers what one run makes, and what do two workers on one machine cost against one process?

    python benchmarks/parts.py kills [--kills 300] [--seed 0]
    python benchmarks/parts.py speed FOLDER --weights FILE [--backbone mobilenet_v2] [--pairs 3] [--limit N]

``kills``: 43 small images, a small backbone of random weights, caches of 1, 2, 7 and 64 parts. Two or three workers at a time, each a
fork of one process that has made its ``Embedder``, take parts in random order; most are killed with SIGKILL at a random
moment, or before or after a random step on the disk; ``merge`` is tried in between. In the end every
dataset must be that of one run, and at no time may a published row be gone.

``speed``: the real commands, a process with a thread for each core, then as many parts at once with one thread each. Rates are those
of the embedding loops, starting left out: every process loads its backbone.
"""

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from facts import machine_facts
from PIL import Image

from featcache import FeatureCache
from featcache.errors import SourceError
from featcache.extraction import parts
from featcache.extraction.extract import extract
from featcache.extraction.in_parts import extract_part, merge
from featcache.extraction.job import Job
from featcache.extraction.parts import open_parts
from featcache.extraction.request import ExtractRequest
from featcache.system.workdir import work_folder

TINY = ExtractRequest(backbone="squeezenet1_1", weights="none", resize=40, crop=32, precision="fp32")
STEPS = ("link", "replace", "rename", "fsync", "unlink")


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    kills = commands.add_parser("kills")
    kills.add_argument("--kills", type=int, default=300)
    kills.add_argument("--seed", type=int, default=0)
    speed = commands.add_parser("speed")
    speed.add_argument("folder")
    speed.add_argument("--backbone", default="mobilenet_v2")
    speed.add_argument("--weights", default="none")
    speed.add_argument("--pairs", type=int, default=3)
    speed.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        facts = (
            measure_kills(arguments, Path(temporary))
            if arguments.what == "kills"
            else compare(arguments, Path(temporary))
        )
    print(json.dumps(facts | machine_facts()))
    sys.exit(not facts.get("same_bytes", True))


def columns(path: Path) -> Any:
    """All datasets, byte for byte."""
    cache = FeatureCache.open(path)
    rows = {name: (column.dtype.str, column.tobytes()) for name, column in vars(cache.rows).items()}
    return cache.take(np.arange(len(cache))).tobytes(), rows, cache.classes, cache.refused, cache.fingerprint


def make_images(root: Path) -> None:
    """43 of them, and one file that is none."""
    draw = np.random.default_rng(0)
    for number in range(44):
        path = root / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 43:
            path.write_bytes(b"no image")
        else:
            Image.fromarray(draw.integers(0, 255, (40 + number, 50, 3), np.uint8)).save(path)
        os.utime(path, (1e9, 1e9))


def measure_kills(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One cache after another, of 1, 2, 7, 64 parts."""
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    parts.MAX_ROWS = 4
    for name in ("backbone", "embedder"):
        _keep(name)
    make_images(folder / "photos")
    for name in ("first", "one"):  # the second without loading anything
        started = time.perf_counter()
        extract(folder / "photos", folder / f"{name}.h5", TINY)
        usual = time.perf_counter() - started
    whole, total = (
        columns(folder / "one.h5"),
        {"kills": 0, "finished": 0, "killed_after_publishing": 0, "merges_refused": 0, "caches": 0},
    )
    same = True
    while total["kills"] < arguments.kills:
        seed = arguments.seed + total["caches"]
        of = (1, 2, 7, 64)[seed % 4]
        found = one_cache(folder / "photos", folder / f"{seed}.h5", of, random.Random(seed), usual=usual / min(of, 7))
        equal = columns(folder / f"{seed}.h5") == whole and not work_folder(folder / f"{seed}.h5").exists()
        same &= equal
        print(f"seed {seed}, {of} parts: {found}, same bytes: {equal}", flush=True)
        total = {name: count + found.get(name, 1) for name, count in total.items()}
    return total | {"same_bytes": same}


def _keep(name: str) -> None:
    """Let what takes a second to make be made once, and forks have it."""
    make, made = getattr(Job, name).func, []

    def kept(job: Job) -> Any:
        made.extend([] if made else [make(job)])
        return made[0]

    setattr(Job, name, functools.cached_property(kept))
    getattr(Job, name).__set_name__(Job, name)


def one_cache(photos: Path, output: Path, of: int, chance: random.Random, *, usual: float) -> dict[str, int]:
    """Make it; most workers are to die on the way, within ``usual`` seconds or at a step."""
    left, seen = [*range(1, of + 1)], set[str]()
    chance.shuffle(left)
    found = {"kills": 0, "finished": 0, "killed_after_publishing": 0, "merges_refused": 0}
    while left:
        batch = [left.pop() for _ in range(min(2, len(left)))]
        batch += batch[:1] if chance.random() < 0.2 else []  # a straggler's, given to a second worker
        running = {}
        for number in batch:
            fate = chance.random()
            step = chance.randrange(10 + 50 // of) if fate < 0.5 else None
            moment = chance.uniform(0.02, 1.0) * usual if 0.5 <= fate < 0.8 else None
            running[fork(photos, output, f"{number}/{of}", step, before=chance.random() < 0.5)] = (number, moment)
        started = time.monotonic()
        for pid, (_, moment) in sorted(running.items(), key=lambda entry: entry[1][1] or 0):
            if moment is not None:
                time.sleep(max(0.0, started + moment - time.monotonic()))
                os.kill(pid, signal.SIGKILL)
        died = False
        for pid, (number, _) in running.items():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code not in (0, -signal.SIGKILL):
                sys.exit(f"part {number} of {of} failed with {code}")
            found["kills" if code else "finished"] += 1
            died |= bool(code)
            if code and number not in left:
                left.insert(chance.randrange(len(left) + 1), number)
            usual = usual if code else 0.9 * usual + 0.1 * (time.monotonic() - started)
        now = (
            {path for part in open_parts(work_folder(output), shared=True) for path in part.paths}
            if work_folder(output).is_dir()
            else set()
        )
        if seen - now:
            sys.exit(f"published rows are gone: {seen - now}")
        found["killed_after_publishing"] += died and bool(now - seen)
        seen = now
        if left and chance.random() < 0.1:
            try:
                merge(output)
                return found
            except SourceError:
                found["merges_refused"] += 1
    merge(output)
    return found


def fork(photos: Path, output: Path, part: str, step: int | None, *, before: bool) -> int:
    """Begin a worker, which kills itself before or after that ``step`` on the disk; returns its process id."""
    if pid := os.fork():
        return pid
    count = iter(range(10**9))

    def deadly(call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            here = next(count) == step
            if here and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for name in STEPS:
        setattr(os, name, deadly(getattr(os, name)))
    try:
        extract_part(photos, output, part, TINY)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(70)
    os._exit(0)


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pairs of one process and of parts at once."""
    cores, ratios, rates = len(os.sched_getaffinity(0)), [], []
    options = ["--backbone", arguments.backbone, "--weights", arguments.weights, "--json", "--max-bad", "1", "-q"]
    options += ["--limit", str(arguments.limit)] if arguments.limit else []

    def start(output: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "featcache", "extract", arguments.folder, "-o", str(output), *options, *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def result(process: subprocess.Popen[str]) -> dict[str, Any]:
        out, _ = process.communicate()
        return dict(json.loads(out.splitlines()[-1]))

    print("one process   parts at once   ratio   (images/s)    load before")
    for pair in range(arguments.pairs):
        load = os.getloadavg()[0]
        one = result(start(folder / f"one{pair}.h5", "--workers", str(cores)))["images_per_second"]
        options[options.index("--max-bad") + 1] = "0.05"
        output = folder / f"parts{pair}.h5"
        several = [start(output, "--workers", "1", "--part", f"{number}/{cores}") for number in range(1, cores + 1)]
        done = [result(process) for process in several]
        options[options.index("--max-bad") + 1] = "1"
        seconds = max(report["embedded"] / report["images_per_second"] for report in done)
        both = sum(report["embedded"] for report in done) / seconds
        merge(output)
        ratios.append(both / one)
        rates.append((one, both))
        print(f"{one:11,.0f} {both:15,.0f} {both / one:7.3f} {load:26.1f}", flush=True)
    same = all(
        columns(folder / f"one{pair}.h5") == columns(folder / f"parts{pair}.h5") for pair in range(arguments.pairs)
    )
    return {"rates": rates, "ratio_median": float(np.median(ratios)), "same_bytes": same, "parts": cores}


if __name__ == "__main__":
    main()
