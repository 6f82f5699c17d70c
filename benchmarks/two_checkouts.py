"""Is this checkout as fast as another one? Whole processes, in pairs.

    git worktree add OLD COMMIT
    python benchmarks/two_checkouts.py OLD FOLDER --weights FILE [--images 100] [--pairs 15]

Each pair runs `featcache --help`, `extract` of some images of FOLDER and `fit-head` on their embeddings once by OLD and once
by this checkout, in alternating order, each in a new process and into a new file. A ratio is OLD's seconds by this one's: above 1 this
one is faster. Printed are medians, and the 95 % interval of the median ratio (bootstrap over pairs).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from facts import machine_facts

HERE = Path(__file__).parents[1]


def seconds(checkout: Path, *arguments: object) -> float:
    """Wall time of one command by the code of ``checkout``."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "featcache", *map(str, arguments)]
    started = time.perf_counter()
    subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True)
    return time.perf_counter() - started


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of resampled pairs lie in it."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), float(high)


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="a file, or none")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    weights = arguments.weights if str(arguments.weights) == "none" else arguments.weights.resolve()
    options = ["--backbone", arguments.backbone, "--weights", weights, "--precision", "fp32"]
    sides = {"old": arguments.old.resolve(), "new": HERE}
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = arguments.folder.resolve()
        for pair in range(-1, arguments.pairs):  # the first warms file caches up
            for side in sorted(sides, reverse=bool(pair % 2)):
                cache, model = work / f"{side}{pair}.h5", work / f"{side}{pair}"
                commands = {
                    "--help": ("--help",),
                    "extract": ("extract", source, "-o", cache, "--limit", arguments.images, *options),
                    "fit-head": ("fit-head", cache, "-o", model),
                }
                for what, command in commands.items():
                    took = seconds(sides[side], *command)
                    if pair >= 0:
                        times.setdefault(what, {}).setdefault(side, []).append(took)
    rows = []
    for what, both in times.items():
        ratios = [old / new for old, new in zip(both["old"], both["new"], strict=True)]
        low, high = interval(ratios)
        row = {"what": what, **{side: statistics.median(both[side]) for side in sides}}
        rows.append(row | {"ratio": statistics.median(ratios), "interval": [low, high]})
        print(
            f"{what:9} old {row['old']:6.3f} s, new {row['new']:6.3f} s, ratio {statistics.median(ratios):.3f} "
            f"({low:.3f} to {high:.3f})",
            flush=True,
        )
    print(json.dumps({"pairs": arguments.pairs, "images": arguments.images, "rows": rows, **machine_facts()}))


if __name__ == "__main__":
    main()
