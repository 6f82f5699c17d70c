"""``info``: what a file or folder of ours holds. In: its path. Out: plain values, for people and programs."""

from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.models.model import load_model
from featcache.spec import SPLITS
from featcache.system.path_kinds import HERE, as_path, check_path


def describe(path: str | Path) -> dict[str, Any]:
    """What a cache file or a model folder holds, and where it came from.

    Returns:
        Plain values, fit for JSON; ``kind`` is ``cache`` or ``model``. Of a cache: ``classes`` counts its images per class
        and split, ``image_bytes`` are the quartiles of the sizes of the image files, smallest to largest.

    Raises:
        CacheError, ModelError: it is neither, or damaged.
    """
    path = as_path(path)
    check_path(path, "cache or model", ("info", HERE))
    return _describe_model(path) if path.is_dir() else _describe_cache(path)


def _describe_cache(path: Path) -> dict[str, Any]:
    cache = FeatureCache.open(path)
    splits, sizes, known = cache.rows.splits, cache.rows.sizes, cache.y >= 0
    pairs = cache.y[known] * len(SPLITS) + splits[known]
    counts = np.bincount(pairs, minlength=len(cache.classes) * len(SPLITS)).reshape(-1, len(SPLITS))  # (C, splits)
    used = np.unique(splits)
    return {
        "kind": "cache",
        "path": str(path),
        "images": len(cache),
        "dim": cache.dim,
        "dtype": cache.spec.storage,
        "bytes": path.stat().st_size,
        "refused": [{"path": name, "reason": reason} for name, reason in cache.refused],
        "unlabelled": int((~known).sum()),
        "classes": {
            name: {SPLITS[split]: int(row[split]) for split in used}
            for name, row in zip(cache.classes, counts, strict=True)
        },
        "image_bytes": [int(size) for size in np.percentile(sizes, (0, 25, 50, 75, 100))] if len(sizes) else [],
        "fingerprint": cache.fingerprint,
        "spec": cache.spec.to_json(),
        "provenance": cache.provenance.to_json(),
    }


def _describe_model(path: Path) -> dict[str, Any]:
    manifest = load_model(path).manifest
    keys = ("classes", "head", "training", "metrics", "weights", "fingerprint", "spec", "versions")
    return {"kind": "model", "path": str(path), **{key: manifest[key] for key in keys}}
