"""How much faster is `extract` than the loop a tutorial would have you write?

    python benchmarks/extract_vs_loop.py FOLDER --weights FILE [--backbone mobilenet_v2] [--pairs 3]

FOLDER holds class folders. Both sides embed all its images once on the CPU, each in a process of its own, in turn, so that
a drifting machine hits both. The loop: torchvision's ImageFolder and preset transforms (PIL), DataLoader with 2 workers,
batches of 32, eager float32. Counted is the embedding itself ("steady") and the whole process ("cold"). Medians are
printed, and one JSON line at the end. Features of both sides are compared, too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def usual_loop(arguments: argparse.Namespace, output: Path) -> float:
    """What tutorials do; returns seconds, model loading left out."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets, models

    weights = models.get_model_weights(arguments.backbone)["IMAGENET1K_V1"]
    model = models.get_model(arguments.backbone, weights=None)
    if arguments.weights != "none":
        model.load_state_dict(torch.load(arguments.weights, weights_only=True), strict=False)
    for name in ("fc", "classifier", "head", "heads"):
        if hasattr(model, name):
            setattr(model, name, torch.nn.Identity())
    model.eval()
    loader = DataLoader(datasets.ImageFolder(arguments.folder, weights.transforms()), batch_size=32, num_workers=2)
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
    import numpy as np

    from featcache import ExtractRequest, FeatureCache, extract

    request = ExtractRequest(backbone=arguments.backbone, weights=arguments.weights, precision=arguments.precision)
    with tempfile.TemporaryDirectory() as folder:
        report = extract(arguments.folder, Path(folder) / "features.h5", request, device="cpu")
        np.save(output, FeatureCache.open(Path(folder) / "features.h5").X)
    return report.embedded / report.images_per_second


def one_run(arguments: argparse.Namespace, side: str, output: Path) -> dict[str, float]:
    """Run one side in a child process: seconds of embedding and of the whole process."""
    started = time.perf_counter()
    child = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--side", side, "--output", output], check=True, stdout=-1
    )
    return {"cold": time.perf_counter() - started, "steady": json.loads(child.stdout)["seconds"]}


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="none", help="a .pth file, or none for random ones")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=["loop", "featcache"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        seconds = (usual_loop if arguments.side == "loop" else ours)(arguments, arguments.output)
        print(json.dumps({"seconds": seconds}))
        return

    import numpy as np

    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.npy" for side in ("loop", "featcache")}
        for number in range(arguments.pairs):
            pairs.append({side: one_run(arguments, side, files[side]) for side in files})
            print(f"pair {number + 1}: {pairs[-1]}", file=sys.stderr, flush=True)
        a, b = (np.load(files[side]).astype(np.float64) for side in ("loop", "featcache"))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    def median(side: str, what: str) -> float:
        return statistics.median(pair[side][what] for pair in pairs)

    def ratio(what: str) -> float:
        return statistics.median(pair["loop"][what] / pair["featcache"][what] for pair in pairs)

    n = len(a)
    print(f"{n} images, {arguments.backbone}, {os.cpu_count()} cores, median of {len(pairs)} pairs")
    print(f"{'':12}{'steady img/s':>14}{'cold s':>10}")
    for side in files:
        print(f"{side:12}{n / median(side, 'steady'):14.1f}{median(side, 'cold'):10.1f}")
    print(f"{'ratio':12}{ratio('steady'):14.2f}{ratio('cold'):10.2f}")
    print(f"cosine of the features of both sides: mean {cosine.mean():.6f}, minimum {cosine.min():.6f}")
    facts = {"images": n, "backbone": arguments.backbone, "steady_ratio": ratio("steady"), "cold_ratio": ratio("cold")}
    facts |= {
        "mean_cosine": cosine.mean(),
        "min_cosine": cosine.min(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    print(json.dumps(facts | {"pairs": pairs}))


if __name__ == "__main__":
    main()
