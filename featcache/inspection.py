"""``info`` and ``doctor``: facts about a cache, a model, or this machine, as plain values for the command line to print."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import SPLITS, FeatureCache


def describe(path: Path) -> dict[str, Any]:
    """Facts about a cache file or a model folder.

    Raises:
        CacheError, ModelError: it is neither, or damaged.
    """
    if path.is_dir():
        return describe_model(path)
    cache = FeatureCache.open(path)
    counts = {
        name: {
            split: int((cache.rows.splits[cache.y == label] == number).sum())
            for number, split in enumerate(SPLITS)
            if (cache.rows.splits == number).any()
        }
        for label, name in enumerate(cache.classes)
    }
    return {
        "kind": "cache",
        "path": str(path),
        "images": len(cache),
        "dim": cache.dim,
        "dtype": cache.spec["storage"],
        "bytes": path.stat().st_size,
        "refused": [{"path": name, "reason": reason} for name, reason in cache.refused],
        "unlabelled": int((cache.y < 0).sum()),
        "classes": counts,
        "image_bytes": _quartiles(cache.rows.sizes),
        "fingerprint": cache.fingerprint,
        "spec": cache.spec,
        "provenance": cache.provenance,
    }


def describe_model(path: Path) -> dict[str, Any]:
    """Facts about a model folder. Raises ModelError."""
    from featcache.model import load_model

    model = load_model(path)
    keys = ("classes", "head", "training", "metrics", "weights", "fingerprint", "spec", "versions")
    return {"kind": "model", "path": str(path), **{key: model.manifest[key] for key in keys}}


def machine() -> dict[str, Any]:
    """What this machine and installation can do."""
    import h5py
    import torch
    from PIL import features

    from featcache.runtime import choose_runtime, has_bf16_arithmetic

    packages = ("featcache", "torch", "torchvision", "timm", "h5py", "numpy", "scikit-learn", "pillow", "safetensors")
    found = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(_module(name))}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "runtime": choose_runtime().reason,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": has_bf16_arithmetic(),
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "packages": found,
        "hdf5": h5py.version.hdf5_version,
        "codecs": {name: features.version(name) for name in ("jpg", "zlib", "webp", "libtiff", "avif", "jpg_2000")},
    }


def _module(package: str) -> str:
    return {"scikit-learn": "sklearn", "pillow": "PIL"}.get(package, package)


def _quartiles(values: Any) -> list[int]:
    return [int(value) for value in np.percentile(values, (0, 25, 50, 75, 100))] if len(values) else []
