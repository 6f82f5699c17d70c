"""What does a cache of millions of rows take: time, peak memory and bytes per row of every step from parts to predictions?

    python benchmarks/scale.py [--rows 1000000] [--dim 384] [--classes 100] [--steps NAME...] [--folder FOLDER] [--base ROWS]

No image is read: parts are written as a run would write them (`PartWriter`), with random float16 features of Gaussian classes,
made-up paths (`c012/0001234.jpg`) and digests; a tenth of the rows is test. Everything else is what a user runs. Every step is
a process of its own; its peak is what the kernel says of it and of its children (`ru_maxrss`). Bytes per row are the difference
to the peak with --base rows (default: a tenth), which goes first, over the difference in rows; `x100 M` extrapolates from there.
A step that reads or writes all features cannot be faster than the disk: `GB` is what it reads and writes at least once.
Takes about 1.7 KB of disk per row of 384 values in FOLDER, in a temporary folder that is deleted at the end.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from facts import machine_facts

DISTANCE = 4.0  # of class means from the middle, in standard deviations of the noise
BATCH = 1024  # rows embedded at a time


def list_rows(rows: int, classes: int) -> Any:
    """The images, sorted by path as a folder is listed; every tenth is test."""
    from featcache.images.source import ImageList

    n = np.arange(rows, dtype=np.int64)
    labels = (n * classes // rows).astype(np.int32)
    return ImageList(
        root=Path("/nowhere"),
        paths=tuple(f"c{label:03d}/{number:09d}.jpg" for number, label in enumerate(labels.tolist())),
        labels=labels,
        classes=tuple(f"c{number:03d}" for number in range(classes)),
        splits=np.where(n % 10 == 9, 3, 1).astype(np.uint8),
        sizes=50_000 + n % 1009,
        mtimes=n + 10**18,
    )


def request() -> Any:
    """What is asked of every extraction: it names the spec of the parts, so that nothing is loaded."""
    from featcache.extraction.request import ExtractRequest

    return ExtractRequest(backbone="resnet18", precision="fp32")


def write_parts(folder: Path, images: Any, dim: int) -> None:
    """All rows, in the order of the list, and what `extract --part 1/1` agrees on before it begins."""
    from featcache.backbones.embed import EmbeddedBatch
    from featcache.cache.format import Provenance
    from featcache.extraction.listing import Listing
    from featcache.extraction.parts import PartWriter
    from featcache.images.formats import REVISION
    from featcache.spec import PreprocessSpec, Spec

    preprocess = PreprocessSpec(resize=256, crop=(224, 224), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    facts = {"weights_sha256": "0" * 64, "layer": "none", "precision": "reference", "storage": "float16"}
    spec = Spec(backbone="resnet18", preprocess=preprocess, **facts)
    provenance = Provenance(request=request().record(), source="none", reload="IMAGENET1K_V1", decoder=REVISION)
    (folder / "features.h5.parts").mkdir()
    Listing.publish(folder / "features.h5.parts", images, 1, spec=spec, provenance=provenance)
    options = {"spec": spec, "provenance": provenance}
    writer = PartWriter(folder / "features.h5.parts", images, dim=dim, tag="1of1", **options)
    rng = np.random.default_rng(0)
    centres = rng.normal(0, DISTANCE / np.sqrt(dim), (len(images.classes), dim)).astype(np.float32)
    for start in range(0, len(images), BATCH):
        rows = np.arange(start, min(start + BATCH, len(images)))
        features = centres[images.labels[rows]] + rng.standard_normal((len(rows), dim), np.float32)
        digests = rng.integers(0, 256, (len(rows), 32), np.uint8)
        writer.add(EmbeddedBatch(rows, features, digests, images.sizes[rows], images.mtimes[rows], {}))
    writer.flush()


def extract_again(folder: Path, images: Any) -> None:
    """Bring the cache up to date with a list in which nothing has changed; it packs parts, too, if they are not merged."""
    from featcache.extraction.extract import extract

    report = extract(images, folder / "features.h5", request())
    assert (report.reused, report.embedded) == (len(images), 0), report


LINEAR = ("--clf", "linear", "--epochs", "1", "--json")  # more epochs take more time, and no more memory


def command(*words: str) -> list[str]:
    """A command line, run in the temporary folder."""
    return [sys.executable, "-m", "featcache", *words]


# name -> what is run, and how often it reads or writes all features at least
STEPS: dict[str, tuple[list[str] | None, int]] = {
    "parts": (None, 1),
    "merge": (command("merge", "features.h5", "--json"), 3),  # parts are verified, and read once more
    "unchanged": (None, 0),
    "verify": (command("verify", "features.h5"), 1),
    "info": (command("info", "features.h5", "--json"), 0),
    "fit": (command("fit-head", "features.h5", "-o", "model", "--folds", "0", *LINEAR), 3),
    "fit 5 folds": (command("fit-head", "features.h5", "-o", "model5", *LINEAR), 3),
    "predict": (command("predict", "model", "features.h5", "-o", "rows.csv", "--json"), 2),
    "evaluate": (command("evaluate", "model", "features.h5", "--json"), 1),
    "evaluate all": (command("evaluate", "model", "features.h5", "--split", "all", "-o", "all.csv", "--json"), 2),
    "logreg": (command("fit-head", "features.h5", "-o", "logreg", "--json"), 1),
    "audit": (command("audit", "features.h5", "-o", "audit", "--json"), 1),
    "parquet": (command("export", "features.h5", "-o", "features.parquet", "--json"), 2),
}
USUAL = ("parts", "merge", "unchanged", "verify", "info", "fit", "predict", "evaluate", "evaluate all")


def run(name: str, folder: Path, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """One step in a process of its own: seconds, CPU seconds, peak in MB, and what it printed last."""
    words, passes = STEPS[name]
    own = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--rows", str(rows)]
    own += ["--dim", str(options.dim), "--classes", str(options.classes)]
    out, started = folder / "out.txt", time.perf_counter()
    with out.open("wb") as stdout, (folder / "err.txt").open("wb") as stderr:
        # No file of the last step may lie in memory only because there is some to spare.
        process = subprocess.Popen(words or own, cwd=folder, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    lines = (out.read_text().splitlines() or [""])[-1], (folder / "err.txt").read_text().splitlines()
    facts: dict[str, Any] = {"step": name, "rows": rows, "seconds": round(seconds, 1)}
    facts["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
    facts["peak_mb"] = round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)
    facts["least_gb"] = round(passes * rows * options.dim * 2 / 1e9, 2)
    if process.returncode:
        return facts | {"exit": process.returncode, "said": (lines[1] or [""])[-1]}
    if name.startswith(("fit", "evaluate")):
        found = json.loads(lines[0])
        facts["accuracy"] = found.get("test_accuracy", found.get("accuracy"))
    return facts


def child(name: str, rows: int, dim: int, classes: int) -> None:
    """A step that no command is for; in the temporary folder."""
    images = list_rows(rows, classes)
    if name == "parts":
        write_parts(Path.cwd(), images, dim)
    else:
        extract_again(Path.cwd(), images)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def go_through(rows: int, options: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    """All steps with so many rows."""
    place = (
        tempfile.TemporaryDirectory(dir=options.folder)
        if options.keep is None
        else contextlib.nullcontext(options.keep)
    )
    with place as name:
        for step in options.steps:
            facts = run(step, Path(name), rows, options)
            tell(facts | {"disk_gb": round(size_of(Path(name)) / 1e9, 2)})
            for superfluous in ("rows.csv", "all.csv", "features.parquet"):
                (Path(name) / superfluous).unlink(missing_ok=True)
            shutil.rmtree(Path(name) / "model5", ignore_errors=True)


def main() -> None:
    """Print a line per step, and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--base", type=int, help="rows that bytes per row are counted from")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=USUAL, metavar="NAME", help=", ".join(STEPS))
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="go on in this folder, which stays, with --rows alone"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.rows, options.dim, options.classes)
        return
    base, found = options.base or options.rows // 10, list[dict[str, Any]]()
    before: dict[str, float] = {}

    def tell(facts: dict[str, Any]) -> None:
        step, peak = facts["step"], facts["peak_mb"]
        if facts["rows"] == base != options.rows:
            before[step] = peak
            return
        if step in before:
            facts["bytes_per_row"] = round((peak - before[step]) * 1e6 / (options.rows - base))
            facts["gb_of_100_million"] = round(before[step] / 1e3 + facts["bytes_per_row"] * (1e8 - base) / 1e9, 1)
        found.append(facts)
        columns = [facts.get(key, "") for key in ("seconds", "cpu_seconds", "peak_mb", "bytes_per_row")]
        columns += [facts.get(key, "") for key in ("gb_of_100_million", "least_gb", "disk_gb")]
        note = facts.get("said") or facts.get("accuracy", "")
        print(f"{step:14}" + "".join(f"{column:>10}" for column in columns) + f"  {note}", flush=True)

    print(f"{options.rows:,} x {options.dim} float16, {options.classes} classes; bytes per row from {base:,} rows on")
    print(
        f"{'step':14}"
        + "".join(f"{head:>10}" for head in ("s", "CPU s", "peak MB", "B/row", "x100 M GB", "GB", "disk GB"))
    )
    for rows in dict.fromkeys((base, options.rows)) if options.keep is None else [options.rows]:
        go_through(rows, options, tell)
    print(json.dumps({"rows": options.rows, "base": base, "dim": options.dim, "steps": found} | machine_facts()))


if __name__ == "__main__":
    main()
