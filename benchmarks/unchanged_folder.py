"""What does `extract` cost when nothing has changed, compared with looking at every file once?

    python benchmarks/unchanged_folder.py [--images 10000] [--classes 20] [--repeats 5] [--folder FOLDER]

Small JPEGs are made in a temporary folder below FOLDER and embedded once, with random weights. Then, in turn, so that a
drifting machine hits all: a bare walk (os.scandir, one stat per file), `extract` again as a Python call, and `extract`
again as a whole process. Medians count. A last, untimed call is watched: it must not open an image, decode, hash one, or
rewrite the cache.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from facts import machine_facts
from PIL import Image

OPTIONS = ["--backbone", "squeezenet1_1", "--weights", "none", "--resize", "32", "--crop", "32"]


def make_images(root: Path, count: int, classes: int) -> None:
    """Different JPEGs of 40 x 40 pixels, old enough for their time stamps to be trusted."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        (root / f"class-{number:03d}").mkdir(parents=True)
    for number in range(count):
        memory = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(memory, "JPEG")
        path = root / f"class-{number % classes:03d}" / f"{number:07d}.jpg"
        path.write_bytes(memory.getvalue())
        os.utime(path, (1e9, 1e9))


def walk(folder: str) -> int:
    """Every file looked at once: how many there are."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                count += walk(entry.path)
            else:
                entry.stat()
                count += 1
    return count


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def opened_files(work: Callable[[], object]) -> list[str]:
    """The files that ``work`` opens, by whatever way of Python's."""
    found: list[str] = []
    watching = True

    def note(event: str, details: tuple[object, ...]) -> None:
        if watching and event == "open" and isinstance(details[0], str | bytes | os.PathLike):
            found.append(os.fsdecode(details[0]))

    sys.addaudithook(note)
    work()
    watching = False
    return found


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    arguments = parser.parse_args()

    from featcache import ExtractRequest, extract
    from featcache.images import decode, read

    request = ExtractRequest(backbone="squeezenet1_1", weights="none", resize=32, crop=32)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root, cache = Path(folder) / "images", Path(folder) / "features.h5"
        make_images(root, arguments.images, arguments.classes)
        first = extract(root, cache, request)
        assert first.embedded == arguments.images
        before = cache.stat()
        command = [sys.executable, "-m", "featcache", "extract", str(root), "-o", str(cache), *OPTIONS]

        def again() -> None:
            report = extract(root, cache, request)
            assert (report.embedded, report.reused) == (0, arguments.images)

        sides: dict[str, Callable[[], object]] = {
            "scandir and stat": lambda: walk(str(root)),
            "extract, a call": again,
            "extract, a process": lambda: subprocess.run(command, check=True, capture_output=True),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.repeats):
            for name, work in sides.items():
                times[name].append(seconds(work))

        forbidden = AssertionError("an unchanged image was read")
        with (
            mock.patch.object(read, "read_file", side_effect=forbidden),
            mock.patch.object(decode, "decode_pixels", side_effect=forbidden),
            mock.patch.object(read.hashlib, "sha256", wraps=read.hashlib.sha256) as hashing,
        ):
            opened = opened_files(again)
        hashed = hashing.call_count
        assert hashed < 20, f"{hashed} digests"  # of the spec's text, not of images
        assert not [path for path in opened if path.endswith(".jpg")]
        after = cache.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "the cache was rewritten"

    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{arguments.images:,} unchanged images, median of {arguments.repeats}")
    for name, value in medians.items():
        print(f"{name:20}{value * 1e3:9.1f} ms{value / arguments.images * 1e6:8.1f} us per image")
    facts = {"images": arguments.images, "seconds": medians, "all": times, "hashed": hashed, "opened": len(opened)}
    print(json.dumps(facts | {"embedded": 0} | machine_facts()))


if __name__ == "__main__":
    main()
