"""On a GPU: how near does `extract` come to what the machine can do, and how far is it ahead of the usual loop?

    python benchmarks/gpu.py [FOLDER] [--backbones resnet50,vit_b_16,mobilenet_v3_large] [--minutes 9] [--device cuda]

FOLDER holds images at any depth; without it, photograph-like JPEGs of 500x375 are generated. Weights are random: they cost
the same. For every backbone, at the precision that `extract` itself would choose, in images/s:

    forward     the backbone alone, on pixels that are there
    decode      reading, decoding and resizing alone, on all CPU threads
    end to end  both, as `extract` does it;  E = end to end / min(decode, forward)
    loop        ImageFolder, preset transforms (PIL), a DataLoader with one worker per core (16 at most), batches of 64,
                pinned memory, eager float32, as most people write it

and once, the JPEGs decoded at full size only: by Pillow and the fast decoder on all CPU threads, by the GPU (torchvision's
nvJPEG, lists of 64), and by both at once, which tells whether decoding on the GPU would be worth its code. Each side gets
an equal share of the minutes. With --device cpu the same runs without a GPU, to test the script. One JSON line at the end.
"""

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from facts import machine_facts


def usual_loop(folder: Path, backbone: str, device: str, seconds: float) -> float:
    """What tutorials do on a GPU; images/s after the first batches."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets, models

    transform = models.get_model_weights(backbone)["IMAGENET1K_V1"].transforms()
    model = models.get_model(backbone, weights=None).eval().to(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(16, cores)
    images = datasets.ImageFolder(folder, transform)
    repeated = torch.utils.data.ConcatDataset([images] * max(1, 200_000 // len(images)))
    loader = DataLoader(repeated, batch_size=64, num_workers=workers, pin_memory=device != "cpu")
    done, started = 0, 0.0
    with torch.no_grad():
        for number, (batch, _) in enumerate(loader):
            model(batch.to(device, non_blocking=True)).cpu()
            done += len(batch)
            if number == 2 * workers:  # what the workers had ready at the start is used up
                done, started = 0, time.perf_counter()
            elif started and time.perf_counter() - started > seconds:
                break
    return done / (time.perf_counter() - started)


def ours(folder: Path, backbone: str, device: str, seconds: float) -> dict[str, Any]:
    """Rates of featcache."""
    from featcache.backbones.embed import sample_pixels
    from featcache.backbones.encoder import build_encoder
    from featcache.backbones.load import load_backbone
    from featcache.images.source import list_images
    from featcache.reports.throughput import measure
    from featcache.system.device import choose_runtime

    loaded, runtime, images = load_backbone(backbone, "none"), choose_runtime(device), list_images(folder)
    encoder, choice = build_encoder(loaded, runtime, sample_pixels(images, loaded.preprocess, 32))
    rates = measure(images, encoder, runtime, seconds=seconds)
    facts = {name: getattr(rates, name) for name in ("decode", "forward", "end_to_end", "ceiling", "efficiency")}
    facts |= {"precision": choice.precision, "form": choice.form, "limit": rates.limit, "self_check": choice.tried}
    return facts | {"workers": runtime.workers, "batch_size": runtime.batch_size}


def decoding(folder: Path, device: str, seconds: float) -> dict[str, float | None]:
    """Full-size decoding of JPEGs in images/s: by Pillow, by the fast decoder, by the GPU, by the latter two at once."""
    import numpy as np

    from featcache.images.decode import decode, decode_pixels

    data = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu: list[Callable[[bytes], Any]] = [lambda file: np.asarray(decode(file)), decode_pixels]
    found: dict[str, float | None] = {
        "pillow": together([decode_forever(data, cpu[0])] * threads, seconds),
        "fast decoder": together([decode_forever(data, cpu[1])] * threads, seconds),
        "gpu": None,
        "both": None,
    }
    try:
        on_gpu = gpu_forever(data, device)
        found["gpu"] = together([on_gpu], seconds)
        found["both"] = together([on_gpu, *[decode_forever(data, cpu[1])] * max(1, threads - 1)], seconds)
    except Exception as error:  # no GPU, or a torchvision without nvJPEG
        print(f"GPU decoding is not possible here: {str(error).splitlines()[0]}")
    return found


def decode_forever(data: list[bytes], decode: Callable[[bytes], Any]) -> Callable[[threading.Event], int]:
    """A job that decodes until it is told to stop, and says how many."""

    def job(stop: threading.Event) -> int:
        for count, file in enumerate(itertools.cycle(data)):
            if stop.is_set():
                return count
            decode(file)
        raise AssertionError("a cycle does not end")

    return job


def gpu_forever(data: list[bytes], device: str, batch: int = 64) -> Callable[[threading.Event], int]:
    """The same in batches on the GPU; raises what torchvision raises if that is not possible."""
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    if device == "cpu":
        raise RuntimeError("the device is a CPU")
    files = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in data]
    decode_jpeg(files[:batch], mode=ImageReadMode.RGB, device=device)

    def job(stop: threading.Event) -> int:
        stream = itertools.cycle(files)
        count = 0
        while not stop.is_set():
            decode_jpeg(list(itertools.islice(stream, batch)), mode=ImageReadMode.RGB, device=device)
            torch.cuda.synchronize()
            count += batch
        return count

    return job


def together(jobs: list[Callable[[threading.Event], int]], seconds: float) -> float:
    """Run jobs on a thread each for so long: images/s of all together."""
    from concurrent.futures import ThreadPoolExecutor

    stop = threading.Event()
    with ThreadPoolExecutor(len(jobs)) as pool:
        started = time.perf_counter()
        futures = [pool.submit(job, stop) for job in jobs]
        time.sleep(seconds)
        stop.set()
        return sum(future.result() for future in futures) / (time.perf_counter() - started)


def make_images(folder: Path) -> Path:
    """Generated photos in one class folder, as ImageFolder wants it."""
    from featcache.reports.throughput import generated_photos

    (folder / "photos").mkdir()
    generated_photos(folder / "photos", 256)
    return folder


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--backbones", default="resnet50,vit_b_16,mobilenet_v3_large")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    names = arguments.backbones.split(",")
    slice_seconds = arguments.minutes * 60 / (1 + 3 * len(names)) * 0.7  # the rest goes into loading and warming up
    facts, rows = machine_facts(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or make_images(Path(temporary))
        decoders = decoding(folder, arguments.device, slice_seconds / 4)
        shown = ", ".join(f"{name} {'-' if rate is None else f'{rate:,.0f}'}" for name, rate in decoders.items())
        print(f"decoding alone, full size, images/s: {shown}")
        print(f"{'':22}{'forward':>10}{'decode':>10}{'end to end':>12}{'E':>7}{'loop':>10}{'times':>8}  precision")
        for name in names:
            row: dict[str, Any] = {"backbone": name} | ours(folder, name, arguments.device, 2 * slice_seconds)
            row["loop"] = usual_loop(folder, name, arguments.device, slice_seconds)
            row["times"] = row["end_to_end"] / row["loop"]
            rows.append(row)
            figures = f"{row['forward']:10,.0f}{row['decode']:10,.0f}{row['end_to_end']:12,.0f}{row['efficiency']:7.2f}"
            print(f"{name:22}{figures}{row['loop']:10,.0f}{row['times']:8.1f}  {row['precision']}", flush=True)
    print(json.dumps({"rows": rows, "decoders": decoders, "gpu": _gpu_name(arguments.device)} | facts))


def _gpu_name(device: str) -> str | None:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


if __name__ == "__main__":
    main()
