"""Does a fine-tuning that is killed again and again end with the very weights of an uninterrupted one?

    python benchmarks/kill_and_resume_training.py FOLDER --weights FILE [--backbone mobilenet_v2] [--crop 64] [--epochs 4]
        [--rounds 10] [--kills 2] [--seed 0]

Each round: the real command, killed with SIGKILL (every second round: SIGTERM) at a random moment, resumed, killed again,
then resumed to its end; on the CPU. Weights, head and history must be the same, bit for bit, but for how long it took. The head
that all start from is fit once. Small crops keep it short; the seed of a round is printed, so that a failure can be repeated.
"""

import argparse
import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from facts import machine_facts

WEIGHTS, HISTORY = ("backbone.safetensors", "head.safetensors"), "history.csv"
TIMES = ("seconds", "images_per_second")  # of a row of the history


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def featcache(*words: object) -> list[str]:
        return [sys.executable, "-m", "featcache", *map(str, words)]

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        size = ["--resize", arguments.crop * 8 // 7, "--crop", arguments.crop, "--device", "cpu"]
        origin = ["--backbone", arguments.backbone, "--weights", arguments.weights]
        subprocess.run(featcache("extract", arguments.folder, "-o", root / "f.h5", *origin, *size), check=True)
        subprocess.run(featcache("fit-head", root / "f.h5", "-o", root / "m"), check=True)

        def command(output: Path) -> list[str]:
            words = ["finetune", arguments.folder, "--init", root / "m", "-o", output, "--device", "cpu"]
            begun = output.with_name(f"{output.name}.parts").joinpath("run.json").exists()
            more = ["--resume"] if begun else []
            return featcache(*words, "--epochs", arguments.epochs, "--patience", 0, *more)

        started = time.perf_counter()
        subprocess.run(command(root / "whole"), check=True, stderr=subprocess.DEVNULL)
        duration = time.perf_counter() - started
        expected = outcome(root / "whole")
        same = resumed = 0
        for number in range(arguments.rounds):
            seed, output, how = arguments.seed + number, root / f"ft{number}", []
            moments = random.Random(seed)
            for _ in range(arguments.kills):
                child = subprocess.Popen(command(output), stderr=subprocess.DEVNULL)
                try:
                    child.wait(moments.uniform(0.3, 1.0) * duration)
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGTERM if number % 2 else signal.SIGKILL)
                    child.wait()
                how.append(child.returncode)
                if done := is_done(output):
                    break
                resumed += (root / f"ft{number}.parts" / "checkpoint.pt").exists()
            if not done:
                subprocess.run(command(output), check=True, stderr=subprocess.DEVNULL)
            equal = outcome(output) == expected
            same += equal
            print(f"seed {seed}: exit codes {how}, same bits: {equal}", flush=True)
    print(
        json.dumps(
            {"rounds": arguments.rounds, "same_bits": same, "resumed_from_checkpoints": resumed} | machine_facts()
        )
    )
    sys.exit(same != arguments.rounds)


def is_done(output: Path) -> bool:
    """Whether the run has ended, or was killed after its very last act."""
    return (output / "model.json").exists() and not (output.with_name(f"{output.name}.parts") / "run.json").exists()


def outcome(output: Path) -> tuple[list[bytes], list[dict[str, str]]]:
    """Weights, and rows of the history, of a model."""
    with (output / HISTORY).open(newline="") as file:
        rows = [{name: cell for name, cell in row.items() if name not in TIMES} for row in csv.DictReader(file)]
    return [(output / name).read_bytes() for name in WEIGHTS], rows


if __name__ == "__main__":
    main()
