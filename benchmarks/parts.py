"""Are parts made by killed workers what one run makes, and what do two workers on one machine cost against one process?

    python benchmarks/parts.py kills [--kills 300] [--seed 0]
    python benchmarks/parts.py ray-kills [--runs 10] [--seed 0]
    python benchmarks/parts.py speed FOLDER --weights FILE [--backbone mobilenet_v2] [--pairs 3] [--limit N]

``kills``: 43 small images, a small backbone of random weights, caches of 1, 2, 7 and 64 parts. Two or three workers at a time, each a
fork of one process that has made its ``Embedder``, take parts in random order; most are killed with SIGKILL at a random
moment, or before or after a random step on the disk; ``merge`` is tried in between. In the end every
dataset must be that of one run, and at no time may a published row be gone.

``ray-kills``: a Ray cluster of three nodes of one core each beside a head without one, all processes of this machine; 240 images in 31
blocks. In each run one node loses its processes: in every other at a moment drawn from all that Ray does in an undisturbed run, starting
of actors included, else once a random number of images is done. It comes back for the next. Every cache must be that of one process.

``speed``: the real commands, a process with a thread for each core, then as many parts at once with one thread each. Rates are those
of the embedding loops, starting left out: every process loads its backbone.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
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
from featcache.extraction.on_ray import RayExecutor
from featcache.extraction.parts import open_parts
from featcache.extraction.request import ExtractRequest
from featcache.system.workdir import work_folder

TINY = ExtractRequest(backbone="squeezenet1_1", weights="none", resize=40, crop=32, precision="fp32")
SLOWER = dataclasses.replace(TINY, resize=256, crop=224)
STEPS = ("link", "replace", "rename", "fsync", "unlink")


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    kills = commands.add_parser("kills")
    kills.add_argument("--kills", type=int, default=300)
    kills.add_argument("--seed", type=int, default=0)
    ray_kills = commands.add_parser("ray-kills")
    ray_kills.add_argument("--runs", type=int, default=10)
    ray_kills.add_argument("--seed", type=int, default=0)
    speed = commands.add_parser("speed")
    speed.add_argument("folder")
    speed.add_argument("--backbone", default="mobilenet_v2")
    speed.add_argument("--weights", default="none")
    speed.add_argument("--pairs", type=int, default=3)
    speed.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure = {"kills": measure_kills, "ray-kills": measure_ray_kills, "speed": compare}[arguments.what]
        facts = measure(arguments, Path(temporary))
    print(json.dumps(facts | machine_facts()))
    sys.exit(not facts.get("same_bytes", True))


def columns(path: Path) -> Any:
    """All datasets, byte for byte."""
    cache = FeatureCache.open(path)
    rows = {name: (column.dtype.str, column.tobytes()) for name, column in vars(cache.rows).items()}
    return cache.take(np.arange(len(cache))).tobytes(), rows, cache.classes, cache.refused, cache.fingerprint


def make_images(root: Path, count: int = 43) -> None:
    """So many, and one file that is none."""
    draw = np.random.default_rng(0)
    for number in range(count + 1):
        path = root / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == count:
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


def measure_ray_kills(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One cluster; a run, undisturbed, then ``--runs`` in each of which a node is killed."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_TMPDIR": str(folder), "RAY_BACKEND_LOG_LEVEL": "fatal", "PYTHONPATH": os.pathsep.join(sys.path)}
    make_images(folder / "photos", 240)
    extract(folder / "photos", folder / "one.h5", SLOWER)
    whole, chance = columns(folder / "one.h5"), random.Random(arguments.seed)
    size = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
    nodes = [cluster.add_node(num_cpus=1, **size) for _ in range(3)]
    run = functools.partial(ray_run, cluster, folder)
    usual, rows, late = run("usual")["seconds"], list[dict[str, Any]](), 0
    print(f"undisturbed: {usual:.1f} s\nrun   killed after s   images done   seconds   parts not needed   same bytes")
    while len(rows) < arguments.runs:
        node, name = nodes.pop(chance.randrange(3)), f"{len(rows)}-{late}"
        moment, images = chance.uniform(0.0, 1.0) * usual, chance.randrange(8, 200)
        found = run(name, node, **{"images": images} if len(rows) % 2 else {"moment": moment})
        found["same_bytes"] = columns(folder / f"{name}.h5") == whole
        nodes.append(cluster.add_node(num_cpus=1, **size))
        if found["done"] == 241:  # says nothing
            late += 1
            continue
        rows.append(found)
        row = f"{found['killed_after']:15.1f} {found['done']:13} {found['seconds']:9.1f} {found['superfluous']:18}"
        print(f"{len(rows):3} {row} {found['same_bytes']!s:>12}", flush=True)
    cluster.shutdown()
    same = sum(row["same_bytes"] for row in rows)
    print(f"{same} of {len(rows)} the same")
    return {"usual_seconds": usual, "runs": rows, "too_late": late, "same": same, "same_bytes": same == arguments.runs}


def ray_run(
    cluster: Any, folder: Path, name: str, node: Any = None, *, moment: float = 1e9, images: int = 241
) -> dict[str, Any]:
    """One cache by Ray; ``node`` is killed ``moment`` seconds after actors were asked for, or once so many ``images`` are done."""
    executor, found = RayExecutor(cluster.address, block=8), {"done": 0, "killed_after": 0.0, "superfluous": 0}
    begun, now = list[float](), [0]

    def progress(done: int, total: int, bottleneck: str) -> None:
        begun.append(time.monotonic())
        now.append(done)

    def kill() -> None:
        while not begun or (time.monotonic() - begun[0] < moment and now[-1] < images):
            time.sleep(0.01)
        found.update(done=now[-1], killed_after=time.monotonic() - begun[0])
        cluster.remove_node(node, allow_graceful=False)

    def embed(*arguments: Any, **options: Any) -> Any:
        done = executor(*arguments, **options)
        found["superfluous"] = len({path.name for path in done.folder.glob("*.h5")} - {*done.names, "listing.h5"})
        return done

    killer = threading.Thread(target=kill)
    if node is not None:
        killer.start()
    extract(folder / "photos", folder / f"{name}.h5", SLOWER, executor=embed, progress=progress)
    found["seconds"] = begun[-1] - begun[0]
    if node is not None:
        killer.join()
    return found


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
