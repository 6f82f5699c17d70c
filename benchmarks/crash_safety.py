"""What does it cost to survive a decoder that crashes: noting what is decoded, or decoding in processes of their own?

    python benchmarks/crash_safety.py FOLDER [--backbone mobilenet_v2] [--weights none] [--images 500] [--pairs 5]

Three ways to embed the same images, in turn: threads as ``extract`` uses them, with and without the notes of
``images/decode.py``; and as many spawned processes that read, decode and resize into shared memory while threads of this one run
the backbone. All give the same embeddings, which is checked. The ceiling is what the first takes.
"""

import argparse
import json
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from facts import machine_facts

_AHEAD = 4  # batches decoded ahead of the backbone, per worker


def in_threads(images: Any, encoder: Any, runtime: Any) -> np.ndarray:
    """As extract does it."""
    from featcache.backbones.embed import embed

    return np.concatenate([chunk.features for chunk in embed(images, encoder, runtime)])


def _decode_into(name: str, shape: tuple[int, ...], slot: int, paths: list[Path], preprocess: Any) -> None:
    from featcache.images.decode import read_pixels
    from featcache.images.read import read_file

    memory = SharedMemory(name)
    pixels = np.ndarray(shape, np.uint8, memory.buf)
    for row, path in enumerate(paths):
        pixels[slot, row] = read_pixels(read_file(path)[0], preprocess)
    del pixels
    memory.close()


def in_processes(images: Any, encoder: Any, runtime: Any, pool: ProcessPoolExecutor) -> np.ndarray:
    """Decoding in ``pool``, the backbone in threads of this process."""
    shape = (_AHEAD * runtime.workers, *encoder.new_buffer(runtime.batch_size).shape)
    memory = SharedMemory(create=True, size=int(np.prod(shape)))
    try:
        return _through(memory, shape, images, encoder, runtime, pool)
    finally:
        memory.close()
        memory.unlink()


def _through(
    memory: SharedMemory, shape: tuple[int, ...], images: Any, encoder: Any, runtime: Any, pool: ProcessPoolExecutor
) -> np.ndarray:
    from featcache.system.device import one_core_each

    pixels = np.ndarray(shape, np.uint8, memory.buf)
    slots, size = shape[:2]
    paths = [images.root / path for path in images.paths]
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]

    def forward(decoded: Any, number: int) -> np.ndarray:
        decoded.result()
        return encoder(pixels[number % slots])[: len(batches[number])].copy()

    found, pending = [], {}
    with one_core_each(runtime.workers, "forward") as threads:
        for number in range(len(batches) + slots):
            if number >= slots and number - slots in pending:  # its slot is free again
                found.append(pending.pop(number - slots).result())
            if number < len(batches):
                slot = number % slots
                decoded = pool.submit(_decode_into, memory.name, shape, slot, batches[number], encoder.preprocess)
                pending[number] = threads.submit(forward, decoded, number)
    return np.concatenate(found)


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()

    from featcache.backbones.embed import sample_pixels
    from featcache.backbones.encoder import build_encoder
    from featcache.backbones.load import load_backbone
    from featcache.images import decode
    from featcache.images.source import list_images
    from featcache.system.device import choose_runtime
    from featcache.system.supervisor import Notes

    backbone, runtime = load_backbone(arguments.backbone, arguments.weights), choose_runtime("cpu")
    images = list_images(arguments.folder, labelled=False)
    images = images.take(np.arange(min(arguments.images, len(images))))
    encoder, _ = build_encoder(backbone, runtime, sample_pixels(images, backbone.preprocess, runtime.batch_size))
    started = time.perf_counter()
    seconds: dict[str, list[float]] = {"threads": [], "threads and notes": [], "processes": []}
    with ProcessPoolExecutor(runtime.workers, get_context("spawn")) as pool:
        in_processes(images.take(np.arange(min(64, len(images)))), encoder, runtime, pool)  # starts them
        start_up = time.perf_counter() - started
        expected = in_threads(images, encoder, runtime)
        for number in range(arguments.pairs):
            order = list(seconds) if number % 2 else list(seconds)[::-1]
            for way in order:
                nobody = SimpleNamespace(suspects=(), write=lambda key: None)
                with mock.patch.object(decode, "notes", Notes() if way == "threads and notes" else nobody):
                    started = time.perf_counter()
                    got = (
                        in_processes(images, encoder, runtime, pool)
                        if way == "processes"
                        else in_threads(images, encoder, runtime)
                    )
                    seconds[way].append(time.perf_counter() - started)
                assert np.array_equal(got, expected), way
    worker_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    rates = {way: len(images) / statistics.median(times) for way, times in seconds.items()}
    ratios = {
        way: statistics.median(base / time for base, time in zip(seconds["threads"], times, strict=True))
        for way, times in seconds.items()
    }
    for way, rate in rates.items():
        print(f"{way:18} {rate:7.1f} images/s, {ratios[way]:.3f} of threads")
    print(f"processes start in {start_up:.1f} s and take {worker_mb:,.0f} MB each")
    result = {"images": len(images), "backbone": arguments.backbone, "images_per_second": rates, "of_threads": ratios}
    print(json.dumps(result | {"start_seconds": start_up, "worker_mb": worker_mb} | machine_facts()))


if __name__ == "__main__":
    main()
