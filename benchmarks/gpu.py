"""On a GPU: how near does featcache come to what the machine can do, and how far is it ahead of the usual loops?

    python benchmarks/gpu.py [FOLDER] [--minutes 9.5] [--device cuda] [--backbones resnet50,vit_b_16,...] [--images 8192]

One command, all of it, no network. FOLDER holds JPEGs at any depth; they are made into --images files of about 500x375, each
another crop at another quality, so that no two are the same bytes; without FOLDER photograph-like ones are generated. All
sides read these. Weights are random: they cost the same. Every part runs in a process of its own, so that none meets
another's settings (PyTorch's defaults: TF32 in convolutions), gets a share of the minutes that are left, is ended when that
is used up, and is printed at once. In images/s:

    decoders    JPEGs at full size alone: Pillow and the fast decoder on all CPU threads, the GPU (nvJPEG, by torchcodec), both;
                and rows of a batch, read, hashed, decoded and resized, by so many threads, and by processes
    ours        decode: reading, decoding, resizing alone; forward: the backbone alone; end to end: both, as ``extract`` does
                it; E = end to end / min(decode, forward); extract: the command into a cache, start left out
    ours_gpu    the same with ``--decode gpu``, where torchcodec is installed
    plain       ImageFolder, preset transforms (PIL), DataLoader, 16 workers at most, batches of 64, float32, pinned memory
    careful     the same with channels_last, float16 by autocast, batches of 256, workers that stay, cuDNN's search
    train       fine-tuning ResNet-50, crop and flip, batches of 64: train_ours, most weights, as in the second third of the recipe's
                epochs, train_all, all weights, as in the first, and the careful loop, all weights, fused AdamW
    heads       seconds of fitting heads and finding neighbours, on the CPU and on the GPU
    tests       pytest -m gpu

At the end a table for LOG.md and one JSON line. ``--device cpu --minutes 2`` runs the same without a GPU on smaller networks,
which shows that the script works, nothing else.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import usual_loops
from facts import machine_facts

Note = Callable[..., None]
DINO = "timm/vit_small_patch14_reg4_dinov2.lvd142m"
# backbones, images, images to train on, the network to train, rows and dimensions of embeddings
ON_GPU = (f"resnet50,vit_b_16,{DINO},mobilenet_v3_large", 8192, 2048, "resnet50", (40_000, 1024))
ON_CPU = ("mobilenet_v3_small", 96, 48, "squeezenet1_1", (2_000, 64))


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--backbones", help=f"with a GPU {ON_GPU[0]}")
    parser.add_argument("--images", type=int)
    parser.add_argument("--only", default="", help="these parts alone, separated by commas: PART or PART:NETWORK")
    arguments = parser.parse_args()
    end = time.time() + 60 * arguments.minutes
    names, images, training, tuned, _ = ON_CPU if arguments.device == "cpu" else ON_GPU
    facts = machine_facts() | {"gpu": gpu_name(arguments.device)}
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = Path(temporary)
        made = make_images(arguments.folder, arguments.work, arguments.images or images, training)
        print(f"{facts['gpu']}; {facts['cores']} cores of {facts['cpu']}; {made}", flush=True)
        importlib.import_module("torchvision")  # for all
        results = run_parts(plan((arguments.backbones or names).split(","), tuned), arguments, end)
    print("\n".join(["", *table(results)]))
    print(json.dumps({"benchmark": "gpu", "parts": results, "images": made} | facts))


def plan(backbones: list[str], tuned: str) -> list[tuple[str, str, float]]:
    """(part, network, share of the time), the most wanted first."""
    shares = {
        "ours": 5.0,
        "ours_gpu": 5.0,
        "plain": 2.5,
        "careful": 5.0,
    }  # cuDNN's search takes the careful loop seconds
    sides = [(part, name, share) for name in backbones for part, share in shares.items()]
    rest = [("train_ours", tuned, 10.0), ("train_careful", tuned, 6.0), ("train_all", tuned, 8.0)]
    rest += [("heads", "", 4.0), ("decoders", "", 2.5)]
    return [*sides[:4], *rest[:2], *sides[4:], *rest[2:], ("tests", "", 9.0)]


def run_parts(parts: list[tuple[str, str, float]], arguments: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    """Run each in a process of its own, none longer than its share of what is left."""
    only = {asked for asked in arguments.only.split(",") if asked}
    wanted = [part for part in parts if not only or {part[0], f"{part[0]}:{part[1]}"} & only]
    results = []
    for number, (part, name, share) in enumerate(wanted):
        seconds = (end - time.time()) * share / sum(each for *_, each in wanted[number:])
        started = time.time()
        found = run_part(part, name, arguments, seconds)
        results.append({"part": part, "name": name} | found | {"seconds": round(time.time() - started, 1)})
        print(json.dumps(results[-1]), flush=True)
    return results


def run_part(part: str, name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What it returns; or why there is nothing."""
    arguments.part, arguments.name, arguments.until = part, name, time.time() + 0.85 * seconds
    answer = arguments.work / f"{time.time_ns()}.json"
    # Forked, so that libraries are imported once; nothing has been computed in this process, nor has featcache been imported.
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(arguments, answer))
    child.start()
    child.join(seconds)
    cut = {"failed": f"not done in its {seconds:.0f} s"} if child.is_alive() else {}
    if cut:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)  # its loader's workers, too
        child.join()
    elif child.exitcode:
        cut = {"failed": f"exit code {child.exitcode}"}
    return (dict(json.loads(answer.read_text())) if answer.exists() else {}) | cut


def in_child(arguments: argparse.Namespace, answer: Path) -> None:
    """Do a part, as the first of a group of processes; write what it has found, again and again."""
    os.setsid()

    def note(**found: Any) -> None:
        noted.update(found)
        answer.with_suffix(".part").write_text(json.dumps(noted))
        answer.with_suffix(".part").rename(answer)

    noted: dict[str, Any] = {}
    try:
        PARTS[arguments.part](arguments, note)
    except Exception as error:
        traceback.print_exc()
        note(failed=f"{type(error).__name__}: {str(error)[:400]}")
    sys.stdout.flush()
    os._exit(0)  # workers of a loader in full swing would be waited for


def gpu_name(device: str) -> str:
    """Asked in another process, as a GPU that this one had opened could not be used by forked workers."""
    code = f"import torch; print(torch.cuda.get_device_name({device!r}))"
    if not device.startswith("cuda"):
        return f"no GPU, {device}"
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def make_images(source: Path | None, work: Path, count: int, training: int) -> str:
    """Write work/photos and work/train, two classes each, the latter links to some of the former; says what they are."""
    if source is None:
        source = work / "generated"
        source.mkdir()
        with ProcessPoolExecutor(1) as pool:
            pool.submit(generate, source).result()
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    for folder in (work / kind / name for kind in ("photos", "train") for name in "ab"):
        folder.mkdir(parents=True)
    with ProcessPoolExecutor(usual_loops.usable_cores()) as pool:
        targets = [work / "photos" / "ab"[number % 2] / f"{number:06d}.jpg" for number in range(count)]
        jobs = [(files[number % len(files)], number // len(files), target) for number, target in enumerate(targets)]
        size = sum(pool.map(write_copy, jobs, chunksize=16))
    for target in targets[:training]:
        os.link(target, work / "train" / target.parent.name / target.name)
    return f"{count} JPEGs of {len(files)} pictures, {size / count / 1000:.0f} KB each, {training} of them to train on"


def generate(folder: Path) -> None:
    """Photograph-like pictures, in a process that may import featcache."""
    from featcache.reports.throughput import generated_photos

    generated_photos(folder, 128)


def write_copy(job: tuple[Path, int, Path]) -> int:
    """The n-th copy of a picture: at most 500 pixels wide or high, its corner and quality by n; returns bytes."""
    from PIL import Image

    path, n, target = job
    with Image.open(path) as image:
        image.thumbnail((508, 508))
        left, top = n % 8, n // 8 % 8
        part = image.convert("RGB").crop((left, top, image.width - 8 + left, image.height - 8 + top))
    part.save(target, quality=85 + n // 64 % 10)
    return target.stat().st_size


def ours(arguments: argparse.Namespace, note: Note) -> None:
    """Rates of featcache, and of its command."""
    from featcache import extract, list_images, load_backbone
    from featcache.backbones.embed import sample_pixels
    from featcache.backbones.encoder import build_encoder
    from featcache.reports.throughput import measure
    from featcache.system.device import choose_runtime

    loaded, runtime = load_backbone(arguments.name, "none"), choose_runtime(arguments.device)
    by_gpu = arguments.part == "ours_gpu"
    if by_gpu:
        loaded = dataclasses.replace(loaded, preprocess=dataclasses.replace(loaded.preprocess, decode="gpu"))
    images = list_images(arguments.work / "photos")
    sample = sample_pixels(images, loaded.preprocess, 32, device=runtime.device)
    started = time.perf_counter()
    encoder, choice = build_encoder(loaded, runtime, sample)
    checked = time.perf_counter() - started
    rates = measure(images, encoder, runtime, seconds=max(1.0, 0.4 * (arguments.until - time.time())))
    found = {name: getattr(rates, name) for name in ("decode", "forward", "end_to_end", "ceiling", "efficiency")}
    found |= {"limit": rates.limit, "precision": choice.precision, "form": choice.form, "self_check": choice.tried}
    found["seconds_to_check"] = round(checked, 1)
    note(**found, workers=runtime.workers, batch_size=runtime.batch_size)
    some = min(len(images), int(rates.end_to_end * 0.6 * max(0.0, arguments.until - time.time())))
    if some >= min(len(images), 4 * runtime.batch_size):
        asked: dict[str, Any] = {"backbone": arguments.name, "weights": "none", "device": arguments.device}
        asked |= {"decode": "gpu"} if by_gpu else {}
        found["extract"] = extract(
            images, arguments.work / f"{time.time_ns()}.h5", limit=some, **asked
        ).images_per_second
        note(**found)


def loop(arguments: argparse.Namespace, note: Note) -> None:
    """Rates of a usual loop."""
    careful = arguments.part == "careful"
    where = arguments.work / "photos"
    note(**usual_loops.embed(where, arguments.name, arguments.device, arguments.until, careful=careful))


class TimeIsUpError(Exception):
    """Ends a fine-tuning."""


def train_ours(arguments: argparse.Namespace, note: Note, *, unfreeze: str = "most") -> None:
    """Images/s of fine-tuning so much of the network: of steps, and with what the careful loop leaves out after epochs."""
    from featcache import finetune

    clock: list[tuple[float, int, int]] = []
    started = time.time()

    def after_step(status: Any) -> None:
        clock.append((time.perf_counter(), status.epoch, status.done))
        if time.time() > arguments.until:
            raise TimeIsUpError

    size = 64 if arguments.device != "cpu" else 4
    changes = {"epochs": 1000, "batch_size": size, "unfreeze": unfreeze, "warmup": 0.0, "patience": 0, "hidden": ()}
    changes["augmentation"] = (("resized_crop", 0.08, 1.0, 1.0), ("flip", 0.5))
    try:
        output = arguments.work / f"{time.time_ns()}"
        asked: dict[str, Any] = {"backbone": arguments.name, "weights": "none", "device": arguments.device}
        asked["dtype"] = "float32"  # embeddings by random weights are so much alike that float16 is too coarse
        finetune(arguments.work / "train", output, changes=changes, progress=after_step, **asked)
    except TimeIsUpError:
        pass
    first = time.time() - time.perf_counter() + clock[0][0] - started
    note(batch_size=size, steps=len(clock), seconds_to_first_step=round(first, 1))
    later = [moment for moment in clock if moment[1] > 1]  # in the first epoch kernels are chosen, processes start
    pairs = [(a, b) for a, b in itertools.pairwise(later) if a[1] == b[1]]
    done, seconds = (sum(b[k] - a[k] for a, b in pairs) for k in (2, 0))
    note(rate=done / seconds)
    ends = [a for a, b in itertools.pairwise(clock) if a[1] < b[1]]
    if len(ends) > 1:
        took = ends[-1][0] - ends[0][0]
        note(rate_with_val_and_checkpoints=(ends[-1][1] - ends[0][1]) * ends[0][2] / took)


def train_careful(arguments: argparse.Namespace, note: Note) -> None:
    """The same by the careful loop."""
    note(**usual_loops.train(arguments.work / "train", arguments.name, arguments.device, arguments.until))


def heads(arguments: argparse.Namespace, note: Note) -> None:
    """Seconds of heads and neighbours, here and there; None where there is no such choice."""
    import numpy as np
    from out_of_core import write

    from featcache import FeatureCache, fit_head
    from featcache.curation.neighbours import nearest_rows

    (rows, dim), cache = (ON_CPU if arguments.device == "cpu" else ON_GPU)[4], arguments.work / "heads.h5"
    write(cache, rows, dim, 100, 8.0)
    features = np.asarray(FeatureCache.open(cache).X, np.float32)
    note(rows=rows, dim=dim)
    choice = "device" in inspect.signature(fit_head).parameters
    jobs: dict[str, Callable[[dict[str, Any]], Any]] = {
        "neighbours": lambda where: nearest_rows(features, np.arange(rows), **where),
        "linear": lambda where: fit_head(cache, arguments.work / "m", clf="linear", folds=0, epochs=10, **where),
        "mlp": lambda where: fit_head(cache, arguments.work / "m", clf="mlp", folds=0, epochs=10, **where),
        "logreg": lambda where: fit_head(cache, arguments.work / "m", C=0.01, folds=0, **where),
    }
    for name, job in jobs.items():
        for device in dict.fromkeys((arguments.device, "cpu")):  # the CPU last, as it may not end in time
            chosen = choice or name == "neighbours"
            if not chosen and device != "cpu":
                continue
            started = time.perf_counter()
            if time.time() > arguments.until:
                return
            job({"device": device} if chosen else {})
            note(**{f"{name} {device}": round(time.perf_counter() - started, 2)})


def tests(_: argparse.Namespace, note: Note) -> None:
    """``pytest -m gpu``: how its summary reads."""
    root = Path(__file__).resolve().parent.parent
    files = [str(path) for path in sorted((root / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    note(files=len(files), summary=lines[-1], exit_code=done.returncode, failures=bad[:40])


def decoders(arguments: argparse.Namespace, note: Note) -> None:
    """Full-size decoding of JPEGs in images/s: by Pillow, by the fast decoder, by the GPU, by the latter two at once."""
    import numpy as np

    from featcache.images.decode import decode, decode_pixels

    data = [path.read_bytes() for path in sorted((arguments.work / "photos").rglob("*.jpg"))[:2048]]
    threads, seconds = usual_loops.usable_cores(), max(0.5, (arguments.until - time.time()) / 10)
    fast = decode_forever(data, decode_pixels)
    note(pillow=together([decode_forever(data, lambda file: np.asarray(decode(file)))] * threads, seconds))
    note(fast=together([fast] * threads, seconds))
    for count in sorted({1, 4, 8, threads}):
        note(**{f"rows by {count} threads": together(row_jobs(arguments, count, apart=False), seconds)})
    if jobs := row_jobs(arguments, threads, apart=True):
        note(**{f"rows by {threads} processes": together(jobs, seconds)})
    try:
        on_gpu = gpu_forever(data, arguments.device)
        note(gpu=together([on_gpu], seconds))
        note(both=together([on_gpu, *[fast] * max(1, threads - 1)], seconds))
    except Exception as error:  # no GPU, or a torchvision without nvJPEG
        note(no_gpu=str(error).splitlines()[0][:200])


def row_jobs(arguments: argparse.Namespace, count: int, *, apart: bool) -> list[Callable[[threading.Event], int]]:
    """Jobs that fill rows, as many at a time as a ring asks for; ``apart``: by processes, none where there are none."""
    import numpy as np

    from featcache import list_images, load_backbone
    from featcache.images.fill import Fill, FillByProcesses, decoder
    from featcache.images.formats import Brightest
    from featcache.system.worker_processes import SharedMemory, worker_processes

    images, spec = list_images(arguments.work / "photos"), load_backbone("resnet50", "none").preprocess
    height, width = spec.crop
    if apart:
        if (processes := worker_processes(count, "featcache.images.fill")) is None:
            return []
        processes.wait()
        memory = SharedMemory(count * 16 * height * width * 3)
        fill: Fill = FillByProcesses(images, decoder(spec), Brightest(), processes=processes, memory=memory)
        rows = memory.array.reshape(count, 16, height, width, 3)
    else:
        fill, rows = (
            Fill(images, decoder(spec), Brightest(), threads=count),
            np.empty((count, 16, height, width, 3), np.uint8),
        )

    def job(stop: threading.Event, number: int) -> int:
        starts = itertools.cycle(range(16 * number % (len(images) - 16), len(images) - 16, 16 * count))
        for done, start in enumerate(starts):
            if stop.is_set():
                return 16 * done
            fill(range(start, start + 16), rows[number])
        raise AssertionError("a cycle does not end")

    return [functools.partial(job, number=number) for number in range(count)]


def decode_forever(data: list[bytes], decode: Callable[[bytes], Any]) -> Callable[[threading.Event], int]:
    """A job that decodes until it is told to stop, and says how many."""

    def job(stop: threading.Event) -> int:
        for count, file in enumerate(itertools.cycle(data)):
            if stop.is_set():
                return count
            decode(file)
        raise AssertionError("a cycle does not end")

    return job


def gpu_forever(data: list[bytes], device: str, batch: int = 128) -> Callable[[threading.Event], int]:
    """The same in batches on the GPU; raises what torchvision raises if that is not possible."""
    import numpy as np
    import torch

    if device == "cpu":
        raise RuntimeError("the device is a CPU")
    from torchcodec.decoders import decode_jpeg

    files = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in data]
    decode_jpeg(files[:batch], mode="RGB", device=device)

    def job(stop: threading.Event) -> int:
        stream = itertools.cycle(files)
        count = 0
        while not stop.is_set():
            decode_jpeg(list(itertools.islice(stream, batch)), mode="RGB", device=device)
            torch.cuda.synchronize()
            count += batch
        return count

    return job


def together(jobs: list[Callable[[threading.Event], int]], seconds: float) -> float:
    """Run jobs on a thread each for so long: images/s of all together."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(jobs)) as pool:
        started = time.perf_counter()
        futures = [pool.submit(job, stop) for job in jobs]
        time.sleep(seconds)
        stop.set()
        return sum(future.result() for future in futures) / (time.perf_counter() - started)


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    by_part = {(row["part"], row["name"]): row for row in results}
    lines = ["| images/s | precision | decode | forward | end to end | E | extract | plain loop | careful loop |"]
    lines.append("|---" * 9 + "|")
    for (part, name), row in by_part.items():
        if part not in ("ours", "ours_gpu"):
            continue
        whole = row.get("end_to_end")
        loops = [by_part.get((side, name), {}).get("rate") for side in ("plain", "careful")]
        cells = [shown(row.get(key)) for key in ("decode", "forward", "end_to_end")]
        cells += [f"{row['efficiency']:.2f}" if whole else row.get("failed", "-"), shown(row.get("extract"))]
        cells += [f"{shown(rate)} ({whole / rate:.1f} times)" if rate and whole else shown(rate) for rate in loops]
        name += ", decode gpu" if part == "ours_gpu" else ""
        lines.append(f"| {name} | {row.get('precision', '-')} {row.get('form', '')} | {' | '.join(cells)} |")
    lines += ["", "| part | found |", "|---|---|"]
    beside = ("train_ours", "train_all", "train_careful", "heads", "decoders", "tests")
    kept = [{k: v for k, v in row.items() if k not in ("part", "name")} for row in results if row["part"] in beside]
    names = [f"{row['part']} {row['name']}".strip() for row in results if row["part"] in beside]
    figures = ["; ".join(f"{k} {shown(v)}" for k, v in row.items() if v not in ([], "")) for row in kept]
    return lines + [f"| {name} | {found} |" for name, found in zip(names, figures, strict=True)]


def shown(value: Any) -> str:
    """A cell."""
    if value is None:
        return "-"
    return (
        f"{value:,.0f}"
        if isinstance(value, float) and value >= 100
        else f"{value:.3g}"
        if isinstance(value, float)
        else str(value)
    )


PARTS: dict[str, Callable[[argparse.Namespace, Note], None]] = {
    "ours": ours,
    "ours_gpu": ours,
    "plain": loop,
    "careful": loop,
    "train_ours": train_ours,
    "train_all": functools.partial(train_ours, unfreeze="all"),
    "train_careful": train_careful,
    "heads": heads,
    "decoders": decoders,
    "tests": tests,
}


if __name__ == "__main__":
    main()
