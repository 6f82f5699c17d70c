"""Does any of what makes `extract` fast change the embeddings, or what a classifier makes of them?

    python benchmarks/parity.py HYMENOPTERA CATS_DOGS --weights FILE [--backbone mobilenet_v2]

The reference is plain: torchvision's preset transforms on PIL images, the eager float32 network, one image after the
other. Against it, on every image of both data sets, whose embeddings are stored the same way: each fast path alone and
what a user gets. Printed are the cosines of the embeddings (rounded to the stored type on both sides), and the accuracy of
logistic regressions trained and scored on each side's own embeddings, on val (or test): the mean over five values of C, as
which of them cross-validation would pick may hang on a single image. At most 0.1 percentage points may lie between the
sides. Exits with 1 if a path is over that, or its cosines are below the self-check's.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import machine_facts
from PIL import Image, ImageOps
from torchvision.transforms._presets import ImageClassification

from featcache import ExtractRequest, FeatureCache, extract, fit_head
from featcache.backbones.load import load_backbone
from featcache.backbones.self_check import agreement
from featcache.cache.format import Rows
from featcache.cache.write import write_cache
from featcache.system.device import has_bf16_arithmetic

# What is turned off, and the precision asked for.
PATHS: dict[str, tuple[dict[str, str], str]] = {
    "folded": ({"FEATCACHE_FUSE": "0", "FEATCACHE_DECODER": "pillow"}, "fp32"),
    "fused": ({"FEATCACHE_DECODER": "pillow"}, "fp32"),
    "fused, fast decoder": ({}, "fp32"),
    "as users get it (auto)": ({}, "auto"),
    "bf16": ({}, "bf16"),
}


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Set variables for a while."""
    from featcache.images import decode as decoders

    before = dict(os.environ)
    os.environ.update(changes)
    decoders.fast_jpeg.cache_clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def plain_features(cache: FeatureCache, folder: Path, arguments: argparse.Namespace) -> np.ndarray:
    """(N, D) float32, for the rows of ``cache``, without anything of ours but the network's definition."""
    backbone = load_backbone(arguments.backbone, arguments.weights)
    spec = backbone.preprocess
    transform = ImageClassification(crop_size=spec.crop[0], resize_size=spec.resize, mean=spec.mean, std=spec.std)
    features = []
    with torch.inference_mode():
        for path in cache.paths:
            with Image.open(folder / path) as image:
                pixels = transform(ImageOps.exif_transpose(image).convert("RGB"))
            features.append(backbone.module(pixels[None])[0].numpy())
    return np.stack(features)


def accuracy(cache: Path, folder: Path) -> float:
    """On test, or val, the mean over heads of several strengths of regularisation."""
    reports = [fit_head(cache, folder, C=C, folds=0) for C in (0.001, 0.01, 0.1, 1.0, 10.0)]
    return statistics.mean(
        float(report.val_accuracy if report.test_accuracy is None else report.test_accuracy) for report in reports
    )


def with_features(cache: FeatureCache, features: np.ndarray, path: Path) -> Path:
    """The same cache with other features."""
    rows = Rows(**{field.name: getattr(cache.rows, field.name) for field in dataclasses.fields(Rows)})
    write_cache(path, rows, [features], dim=cache.dim, spec=cache.spec, classes=cache.classes)
    return path


def compare(folder: Path, arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A row for each path."""
    reference: np.ndarray | None = None
    plain_accuracy, rows = 0.0, []
    for number, (name, (changes, precision)) in enumerate(PATHS.items()):
        if precision == "bf16" and not has_bf16_arithmetic():
            print(f"{folder.name:12} {name:24} not measured: this CPU would emulate it")
            continue
        cache = work / f"{folder.name}-{number}.h5"
        started = time.perf_counter()
        with environment(changes):
            request = ExtractRequest(backbone=arguments.backbone, weights=arguments.weights, precision=precision)
            extract(folder, cache, request, device="cpu")
        opened = FeatureCache.open(cache)
        if reference is None:
            reference = plain_features(opened, folder, arguments).astype(opened.dtype)
            plain = with_features(opened, reference, work / f"{folder.name}-plain.h5")
            plain_accuracy = accuracy(plain, work / f"{folder.name}-plain")
        same = agreement(reference, opened.X)
        found = accuracy(cache, work / f"{folder.name}-{number}")
        row = {"data": folder.name, "path": name, "class": opened.spec.precision, "images": len(opened)}
        row |= {**same.to_json(), "plain_accuracy": plain_accuracy, "accuracy": found}
        row["passes"] = same.passes and abs(found - plain_accuracy) <= 0.001
        rows.append(row | {"seconds": time.perf_counter() - started})
        verdict = ("same" if row["passes"] else "DIFFERS") + f", class {row['class']}"
        print(f"{folder.name:12} {name:24} {same}", end="  ")
        print(f"accuracy {found:.2%}, plain {plain_accuracy:.2%}: {verdict}", flush=True)
    return rows


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="none", help="a .pth file, or none for random ones")
    arguments = parser.parse_args()
    facts, rows = machine_facts(), []
    with tempfile.TemporaryDirectory() as work:
        for folder in arguments.folders:
            rows += compare(folder, arguments, Path(work))
    print(json.dumps({"rows": rows} | facts))
    # An explicit precision that is not the network's own is named so in the spec, and may differ.
    sys.exit(not all(row["passes"] for row in rows if row["class"] == "reference"))


if __name__ == "__main__":
    main()
