"""``info``: facts about a cache or a model, as plain values for the command line to print."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.spec import SPLITS

if TYPE_CHECKING:
    pass


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
        "dtype": cache.spec.storage,
        "bytes": path.stat().st_size,
        "refused": [{"path": name, "reason": reason} for name, reason in cache.refused],
        "unlabelled": int((cache.y < 0).sum()),
        "classes": counts,
        "image_bytes": _quartiles(cache.rows.sizes),
        "fingerprint": cache.fingerprint,
        "spec": cache.spec.to_json(),
        "provenance": cache.provenance.to_json(),
    }


def describe_model(path: Path) -> dict[str, Any]:
    """Facts about a model folder. Raises ModelError."""
    from featcache.models.model import load_model

    model = load_model(path)
    keys = ("classes", "head", "training", "metrics", "weights", "fingerprint", "spec", "versions")
    return {"kind": "model", "path": str(path), **{key: model.manifest[key] for key in keys}}


def _quartiles(values: Any) -> list[int]:
    return [int(value) for value in np.percentile(values, (0, 25, 50, 75, 100))] if len(values) else []
