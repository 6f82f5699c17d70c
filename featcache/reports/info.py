"""``info``: what a file or folder of ours holds. In: its path. Out: plain values, for people and programs."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbones import saved
from featcache.backbones.catalog import facts_of, is_commercial
from featcache.cache.cache import FeatureCache
from featcache.errors import FeatcacheError
from featcache.extraction.in_parts import describe_parts
from featcache.models.card import is_provided, licence_of
from featcache.models.model import METRICS, Model, load_model
from featcache.spec import SPLITS
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.safe_load import parse_json
from featcache.system.workdir import is_work_folder


def describe(path: AnyPath) -> dict[str, Any]:
    """What a cache file or a model folder holds, and where it came from.

    Returns:
        Plain values, fit for JSON; ``kind`` is ``cache``, ``model`` or ``parts`` (unfinished work, see ``describe_parts``). Of a
        model: ``parameters`` of backbone and head,
        ``trainable_parameters``, those that its training could change, and ``backbone``, the facts of ``backbones.catalog`` at
        the model's own input size, those of its weights only if a library provides them; None where this installation does not know.
        Of a cache: ``classes`` counts its images per class
        and split, ``image_bytes`` are the quartiles of the sizes of the image files, smallest to largest.

    Raises:
        CacheError, ModelError: it is neither, or damaged.
    """
    path = as_path(path)
    if path.is_dir() and is_work_folder(str(path)) and not (path / "run.json").exists():
        return describe_parts(path)
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
    model = load_model(path)
    keys = ("classes", "head", "training", "metrics", "weights", "fingerprint", "spec", "versions")
    return {
        "kind": "model",
        "path": str(path),
        **{key: model.manifest[key] for key in keys},
        **_describe_network(model),
    }


def _describe_network(model: Model) -> dict[str, Any]:
    """How large it is and what its backbone is."""
    head = sum(weight.size + bias.size for weight, bias in model.head.layers)
    facts: dict[str, Any] | None = None
    known = model.spec.stated is None  # by which network
    if known and not model.spec.backbone.startswith("transformers/"):  # for which the hub would have to be asked
        with contextlib.suppress(FeatcacheError):  # this installation does not know the backbone
            facts = dataclasses.asdict(facts_of(model.spec.backbone, size=model.spec.preprocess.crop))
            facts |= {"dim": model.head.dim}  # of the model's own pooling and layers
            licence = licence_of(model.manifest)
            facts |= {"licence": licence, "commercial": is_commercial(licence)}
            if not is_provided(model.manifest):  # then what is known of the library's weights is not of these
                for name in ("pretrained", "licence", "commercial", "gated", "knn", "linear_probe", "source"):
                    del facts[name]
    trained: int | None = head
    total: int | None = facts["parameters"] + head if facts else None
    if model.manifest.get("finetuned"):
        trained = None
        with contextlib.suppress(FeatcacheError, OSError, ValueError, LookupError, TypeError):  # of an early version
            report = parse_json(saved.own_file(model.path, METRICS).read_text())["report"]
            trained, total = int(report["trainable_parameters"]), total or int(report["parameters"])
    return {"parameters": total, "trainable_parameters": trained, "backbone": facts}
