"""How long does Python keep other threads waiting per image, beside decoding?

    python benchmarks/reading.py [--folder FOLDER]

A JPEG of 8x8 pixels has next to nothing to decode: what reading it takes is the interpreter's work, most of it under its lock. That
is the CPU time of ``read_image``, hash, header and decoding included, and of ``read_pixels``, without the file; a median of nine
rounds. With EXIF data; of photographs of 500x375 pixels, too, and what it takes to have a GPU decode these: its CPU's part alone.
The files go below FOLDER, and are thrown away.
"""

import argparse
import dataclasses
import functools
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from facts import machine_facts
from PIL import Image

from featcache.images.decode import decoder_in_words, read_pixels, strict_decoding
from featcache.images.gpu_jpeg import read_for_gpu
from featcache.images.read import Paths, read_image
from featcache.spec import PreprocessSpec

GREY = (0.5, 0.5, 0.5)
SMALL = PreprocessSpec(resize=8, crop=(8, 8), interpolation="bilinear", mean=GREY, std=GREY)
USUAL = dataclasses.replace(SMALL, resize=256, crop=(224, 224))


def jpeg(width: int, height: int, **options: object) -> bytes:
    """Smooth noise, so that files are as large as photographs."""
    walk = np.random.default_rng(0).normal(0, 3, (height, width, 3)).cumsum(1) + 128
    file = io.BytesIO()
    Image.fromarray(walk.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90, **options)  # type: ignore[arg-type]
    return file.getvalue()


def microseconds(work: Callable[[], object], count: int) -> float:
    """CPU time of this thread per call."""
    rounds = []
    for _ in range(9):
        start = time.thread_time_ns()
        for _ in range(count):
            work()
        rounds.append((time.thread_time_ns() - start) / count / 1000)
    return statistics.median(rounds)


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    exif = Image.Exif()
    exif.update({0x0112: 1, 0x010F: "Camera", 0x011A: 72.0, 0x0128: 2, 0x0132: "2026:01:01 00:00:00"})
    files = {
        "8x8": (jpeg(8, 8), SMALL),
        "8x8, EXIF": (jpeg(8, 8, exif=exif), SMALL),
        "500x375": (jpeg(500, 375), USUAL),
    }
    found: dict[str, dict[str, float]] = {}
    print(f"{decoder_in_words()}\n{'':10} {'read_image':>12} {'read_pixels':>12} {'for a GPU':>12}  microseconds")
    with strict_decoding(), tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, (data, spec) in files.items():
            count = 1000 if spec is SMALL else 100
            path = Path(folder) / "image.jpg"
            path.write_bytes(data)
            convert = functools.partial(read_pixels, spec=spec)
            for_gpu = functools.partial(read_for_gpu, spec=dataclasses.replace(spec, decode="gpu"))
            image = functools.partial(read_image, Paths(None, (str(path),)), 0)
            ways: dict[str, Callable[[], object]] = {
                "read_image": functools.partial(image, convert),
                "read_pixels": functools.partial(convert, data),
                "gpu": functools.partial(image, for_gpu),
            }
            found[name] = {way: microseconds(work, count) for way, work in ways.items()}
            print(f"{name:10}", *(f"{value:12.1f}" for value in found[name].values()))
    print(json.dumps({"benchmark": "reading", **machine_facts(), "microseconds": found}))


if __name__ == "__main__":
    main()
