"""How much faster is `extract` than the loop a tutorial would have you write, and how near to what the machine can do?

    python benchmarks/extract_vs_loop.py FOLDER... --weights FILE [--backbone mobilenet_v2] [--images 1000] [--pairs 3]

Each FOLDER holds images in folders of classes, at any depth; so many of them, evenly spread, are copied into one folder.
Both sides embed them once on the CPU, each in a process of its own, in turn, so that a drifting machine hits both. The
loop: torchvision's ImageFolder and preset transforms (PIL), DataLoader with 2 workers, batches of 32, eager float32.
Counted is the embedding itself ("steady"), the whole process ("cold") and its CPU seconds, which tell most where other programs
run. ``--backbone timm/NAME`` works as well, at 224 pixels. Medians are printed, and one JSON line at the
end. Features of both sides are compared, too.

After the pairs the ceiling of this machine is measured: images/s of decoding alone and of the forward pass alone, by the
same threads. On a CPU they share the cores, so the ceiling is 1 / (1/decode + 1/forward); E is end to end / ceiling,
measured in turn with them.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import machine_facts
from usual_loops import network

_READ = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # what ImageFolder reads


def usual_loop(arguments: argparse.Namespace, output: Path) -> float:
    """What tutorials do; returns seconds, model loading left out."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets

    model, transform = network(arguments.backbone)
    if arguments.weights != "none":
        model.load_state_dict(torch.load(arguments.weights, weights_only=True), strict=False)
    loader = DataLoader(datasets.ImageFolder(arguments.copy, transform), batch_size=32, num_workers=2)
    started = time.perf_counter()
    features = []
    with torch.no_grad():
        for images, _ in loader:
            features.append(model(images).numpy())
    seconds = time.perf_counter() - started
    np.save(output, np.concatenate(features))
    return seconds


def ours(arguments: argparse.Namespace, output: Path) -> float:
    """`extract` into a new cache; returns seconds, model loading left out."""
    from featcache import ExtractRequest, extract

    request = ExtractRequest(backbone=arguments.backbone, weights=arguments.weights, precision=arguments.precision)
    output.unlink(missing_ok=True)
    report = extract(arguments.copy, output, request, device="cpu")
    return report.embedded / report.images_per_second


def one_run(arguments: argparse.Namespace, side: str, output: Path) -> dict[str, float]:
    """Run one side in a child process: seconds of embedding and of the whole process."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["--side", side, "--output", str(output), "--copy", str(arguments.copy)]
    child = subprocess.run([sys.executable, __file__, *sys.argv[1:], *options], check=True, stdout=subprocess.PIPE)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # workers of the loader included
    return {"cold": seconds, "cpu": cpu, "steady": json.loads(child.stdout)["seconds"]}


def ceiling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode alone, forward alone and end to end, in turn, in this process."""
    from featcache.backbones.embed import sample_pixels
    from featcache.backbones.encoder import build_encoder
    from featcache.backbones.load import load_backbone
    from featcache.images.source import list_images
    from featcache.reports.throughput import measure
    from featcache.system.device import choose_runtime

    backbone, runtime = load_backbone(arguments.backbone, arguments.weights), choose_runtime("cpu")
    images = list_images(arguments.copy)
    sample = sample_pixels(images, backbone.preprocess, runtime.batch_size)
    encoder, choice = build_encoder(backbone, runtime, sample, precision=arguments.precision)
    rates = measure(images, encoder, runtime, seconds=arguments.seconds)
    facts = {name: getattr(rates, name) for name in ("decode", "forward", "end_to_end", "ceiling", "efficiency")}
    return facts | {"precision": choice.precision, "form": choice.form}


def copy_images(folders: list[Path], count: int | None, target: Path) -> int:
    """Copy ``count`` images, evenly spread, into ``target``/CLASS; returns how many there are."""
    found = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in _READ)
    count = min(count or len(found), len(found))
    for number in range(count):
        path = found[number * len(found) // count]
        folder = target / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{number:06d}{path.suffix}")
    return count


def compare(loop: Path, cache: Path) -> tuple[float, float]:
    """Mean and minimum cosine between the features of both sides."""
    import numpy as np

    from featcache import FeatureCache

    a, b = np.load(loop).astype(np.float64), np.asarray(FeatureCache.open(cache).X, np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(cosines.mean()), float(cosines.min())


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="none", help="a .pth file, or none for random ones")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--images", type=int, help="only so many")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="to measure the ceiling in; 0: do not")
    parser.add_argument("--side", choices=["loop", "featcache"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--copy", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        seconds = (usual_loop if arguments.side == "loop" else ours)(arguments, arguments.output)
        print(json.dumps({"seconds": seconds}))
        return

    pairs = []
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as folder:
        arguments.copy = Path(folder) / "images"
        n = copy_images(arguments.folders, arguments.images, arguments.copy)
        files = {"loop": Path(folder) / "loop.npy", "featcache": Path(folder) / "features.h5"}
        for number in range(arguments.pairs):
            pairs.append({side: one_run(arguments, side, files[side]) for side in files})
            print(f"pair {number + 1}: {pairs[-1]}", file=sys.stderr, flush=True)
        mean, minimum = compare(files["loop"], files["featcache"])
        limits = ceiling(arguments) if arguments.seconds else {}

    def median(side: str, what: str) -> float:
        return statistics.median(pair[side][what] for pair in pairs)

    def ratio(what: str) -> float:
        return statistics.median(pair["loop"][what] / pair["featcache"][what] for pair in pairs)

    print(f"{n} images, {arguments.backbone}, {facts['cores']} cores, median of {len(pairs)} pairs")
    print(f"{'':12}{'steady img/s':>14}{'cold s':>10}{'CPU s':>10}")
    for side in files:
        print(f"{side:12}{n / median(side, 'steady'):14.1f}{median(side, 'cold'):10.1f}{median(side, 'cpu'):10.1f}")
    print(f"{'ratio':12}{ratio('steady'):14.2f}{ratio('cold'):10.2f}{ratio('cpu'):10.2f}")
    if arguments.weights != "none":  # random weights are not the same on both sides
        print(f"cosine of the features of both sides: mean {mean:.6f}, minimum {minimum:.6f}")
    if limits:
        print(f"images/s: decode {limits['decode']:.1f}, forward {limits['forward']:.1f} ({limits['form']} ", end="")
        print(f"{limits['precision']}), together at most {limits['ceiling']:.1f}; ", end="")
        print(f"end to end {limits['end_to_end']:.1f}: E = {limits['efficiency']:.3f}")
    result = {"images": n, "backbone": arguments.backbone, "precision": arguments.precision}
    result |= {
        "steady_ratio": ratio("steady"),
        "cold_ratio": ratio("cold"),
        "cpu_ratio": ratio("cpu"),
        "ceiling": limits,
    }
    cosines = {"mean_cosine": mean, "min_cosine": minimum} if arguments.weights != "none" else {}
    result |= cosines | {"pairs": pairs}
    print(json.dumps(result | facts))


if __name__ == "__main__":
    main()
