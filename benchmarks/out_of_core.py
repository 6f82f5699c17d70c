"""Does `fit-head` train on a cache that is larger than the memory it may have, and how fast does it read?

    python benchmarks/out_of_core.py [--rows 1000000] [--dim 1280] [--classes 101] [--folds 0 5] [--folder FOLDER]

A cache of random float16 features, sorted by class as caches are, is written into a temporary folder below FOLDER and
thrown away at the end. `fit-head --clf linear` then runs in a process of its own, once per number of folds. Measured are
that process's peak of resident memory (VmHWM: pages of mapped files count), what importing the libraries alone
takes, and the time spent inside the reads. --rounds N cuts training off after N looks at the loss (of 131,072 rows each):
memory is the same, time is not. The cache was just written: its pages are warm if memory allows.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from facts import machine_facts

BLOCK = 4096


def blocks(rows: int, dim: int, labels: np.ndarray, classes: int, distance: float) -> Iterator[np.ndarray]:
    """Gaussian classes ``distance`` standard deviations from the middle, one block after the other."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, distance / np.sqrt(dim), (classes, dim)).astype(np.float32)
    for start in range(0, rows, BLOCK):
        here = labels[start : start + BLOCK]
        yield (centres[here] + rng.standard_normal((len(here), dim), np.float32)).astype(np.float16)


def write(path: Path, rows: int, dim: int, classes: int, distance: float) -> None:
    """The cache: every tenth row is test, the others are train."""
    from featcache.cache.format import Provenance, Rows, encode_names
    from featcache.cache.write import write_cache
    from featcache.spec import PreprocessSpec, Spec

    labels = np.sort(np.arange(rows) % classes).astype(np.int32)
    names = tuple(f"class-{number:04d}" for number in range(classes))
    columns = Rows(
        paths=encode_names(f"{names[label]}/{number:07d}.jpg" for number, label in enumerate(labels.tolist())),
        labels=labels,
        splits=np.where(np.arange(rows) % 10 == 9, 3, 1).astype(np.uint8),
        digests=np.zeros((rows, 32), np.uint8),
        sizes=np.zeros(rows, np.int64),
        mtimes=np.zeros(rows, np.int64),
    )
    preprocess = PreprocessSpec(resize=256, crop=(224, 224), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    spec = Spec(
        backbone="synthetic",
        weights_sha256="0" * 64,
        layer="none",
        preprocess=preprocess,
        precision="reference",
        storage="float16",
    )
    provenance = Provenance(source="none", reload="none")
    data = blocks(rows, dim, labels, classes, distance)
    write_cache(path, columns, data, dim=dim, spec=spec, classes=names, provenance=provenance)


def peak() -> float:
    """Most resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count what the parent had when it forked
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def child(cache: Path, model: Path, folds: int, rounds: int | None) -> dict[str, Any]:
    """Run in a process of its own: train, and measure."""
    import sklearn.model_selection  # noqa: F401
    import torch

    from featcache import fit_head
    from featcache.cache.features import FeatureReader
    from featcache.heads import feature_batches, minibatch

    imports = peak()
    if rounds:
        budget = feature_batches.Budget(max_rounds=rounds)
        minibatch.fit_torch_head = functools.partial(minibatch.fit_torch_head, budget=budget)
    spent = {"seconds": 0.0, "bytes": 0, "reads": 0}
    fill = FeatureReader._fill

    def timed(self: FeatureReader, memory: memoryview, first: int) -> None:
        started = time.perf_counter()
        fill(self, memory, first)
        spent["seconds"] += time.perf_counter() - started
        spent["bytes"] += len(memory)
        spent["reads"] += 1

    FeatureReader._fill = timed
    report = fit_head(cache, model, clf="linear", folds=folds)
    facts = {"folds": folds, "peak_mb": peak(), "imports_mb": imports, "seconds": report.seconds}
    facts |= {"read_gb": spent["bytes"] / 1e9, "read_gb_per_s": spent["bytes"] / 1e9 / spent["seconds"]}
    facts |= {"mean_read_kb": spent["bytes"] / spent["reads"] / 1e3, "test_accuracy": report.test_accuracy}
    epochs = json.loads((model / "model.json").read_text())["training"]["epochs"]
    return facts | {"cv_accuracy": report.cv_accuracy, "epochs": epochs, "threads": torch.get_num_threads()}


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=101)
    parser.add_argument("--distance", type=float, default=4.0, help="of classes: a small one makes them overlap")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--rounds", type=int, help="at most so many looks at the loss, instead of 100")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(child(arguments.folder, Path(folder) / "m", arguments.child, arguments.rounds)))
        return

    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cache = Path(folder) / "features.h5"
        started = time.perf_counter()
        write(cache, arguments.rows, arguments.dim, arguments.classes, arguments.distance)
        size = cache.stat().st_size / 1e9
        print(f"{arguments.rows:,} x {arguments.dim}: {size:.2f} GB, written in {time.perf_counter() - started:.0f} s")
        print(
            f"{'folds':>5}{'peak MB':>9}{'imports':>9}{'seconds':>9}{'epochs':>8}{'read GB':>9}{'GB/s':>6}{'test':>8}"
        )
        for folds in arguments.folds:
            command = [sys.executable, __file__, "--child", str(folds), "--folder", str(cache)]
            command += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            f = json.loads(done.stdout)
            results.append(f)
            print(
                f"{folds:5}{f['peak_mb']:9.0f}{f['imports_mb']:9.0f}{f['seconds']:9.1f}{f['epochs']:8.2f}"
                f"{f['read_gb']:9.1f}{f['read_gb_per_s']:6.2f}{f['test_accuracy']:8.2%}",
                flush=True,
            )
    facts = {"rows": arguments.rows, "dim": arguments.dim, "classes": arguments.classes}
    print(json.dumps(facts | {"rounds": arguments.rounds, "runs": results} | machine_facts()))


if __name__ == "__main__":
    main()
