"""Does an extraction that is killed again and again end with the very bits of an uninterrupted one?

    python benchmarks/kill_and_resume.py FOLDER --weights FILE [--backbone mobilenet_v2] [--rounds 10] [--seed 0]

Each round: a fresh cache, the real command killed with SIGKILL at a random moment, then the same command to its end. The
seed of a round is printed, so that a failure can be repeated. Parts are published every second, so that short runs have
some to lose.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from facts import machine_facts

from featcache import FeatureCache

_RUN = """import sys; from featcache.cli import app; from featcache.extraction import parts
parts.MAX_SECONDS = 1.0; sys.argv[0] = 'featcache'; app.main()"""


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def command(output: Path) -> list[str]:
        options = ["--backbone", arguments.backbone, "--weights", arguments.weights, "--json", "--max-bad", "1"]
        return [sys.executable, "-c", _RUN, "extract", arguments.folder, "-o", str(output), *options]

    def finish(output: Path) -> dict:
        done = subprocess.run(command(output), check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        whole = Path(temporary) / "whole.h5"
        finish(whole)
        duration = time.perf_counter() - started
        expected = FeatureCache.open(whole)
        same = with_parts = 0
        for number in range(arguments.rounds):
            seed = arguments.seed + number
            output = Path(temporary) / f"{seed}.h5"
            moment = random.Random(seed).uniform(0.3, 1.0) * duration
            child = subprocess.Popen(command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                child.wait(moment)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.wait()
            report = finish(output)
            got = FeatureCache.open(output)
            equal = (
                np.array_equal(got.X, expected.X) and got.paths == expected.paths and np.array_equal(got.y, expected.y)
            )
            same += equal
            with_parts += 0 < report["reused"] < len(got)
            how = f"killed after {moment:.1f} s" if child.returncode == -signal.SIGKILL else "finished before its kill"
            print(f"seed {seed}: {how}, reused {report['reused']}, embedded {report['embedded']}, same bits: {equal}")
    print(
        json.dumps({"rounds": arguments.rounds, "same_bits": same, "resumed_from_parts": with_parts} | machine_facts())
    )
    sys.exit(same != arguments.rounds)


if __name__ == "__main__":
    main()
