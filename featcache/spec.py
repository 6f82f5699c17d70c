"""The spec: everything that changes the numbers, as one canonical, hashed JSON object.

Two embeddings may be mixed exactly when their specs are equal. A spec read from a file is checked before it is used.
"""

import hashlib
import json
import math
import re
from typing import Any

from featcache.errors import UsageError
from featcache.images.preprocess import PreprocessSpec

STORAGE_TYPES = ("float16", "float32")
PRECISION_CLASSES = ("reference", "bf16", "fp16")
_MAX_DEPTH = 32  # of nested JSON; ours has four levels


def make_spec(
    *, name: str, weights_sha256: str, layer: str, preprocess: PreprocessSpec, precision: str, storage: str
) -> dict[str, Any]:
    """Build a spec.

    Args:
        name: of the backbone. weights_sha256: over its tensors. layer: whose input the embeddings are.
        preprocess: from a file's bytes to the backbone's input.
        precision: ``reference`` if the features pass for the float32 network's own, else the precision's name.
        storage: ``float16`` or ``float32``.
    """
    return {
        "backbone": {
            "name": name,
            "weights_sha256": weights_sha256,
            "layer": f"input of {layer}",
            "pooling": "the network's own",
        },
        "preprocess": preprocess.to_json(),
        "precision": precision,
        "storage": storage,
        "views": 1,
    }


def check_spec(spec: Any) -> dict[str, Any]:
    """Return ``spec`` if it is one that this version can honour to the letter.

    Raises:
        UsageError: a field is missing, of the wrong type, or asks for something this version does not do.
    """
    if not isinstance(spec, dict) or not isinstance(backbone := spec.get("backbone"), dict):
        raise UsageError("the spec is not a JSON object with a backbone")
    try:
        rebuilt = make_spec(
            name=str(backbone["name"]),
            weights_sha256=str(backbone["weights_sha256"]),
            layer=str(backbone["layer"]).removeprefix("input of "),
            preprocess=PreprocessSpec.from_json(spec["preprocess"]),
            precision=str(spec["precision"]),
            storage=str(spec["storage"]),
        )
    except KeyError as error:
        raise UsageError(f"the spec lacks {error}") from error
    if not re.fullmatch("[0-9a-f]{64}", rebuilt["backbone"]["weights_sha256"]):  # it becomes part of a file's name
        raise UsageError("the spec's weights_sha256 is no sha256")
    if rebuilt != spec or spec["precision"] not in PRECISION_CLASSES or spec["storage"] not in STORAGE_TYPES:
        raise UsageError(
            f"the spec asks for what this version does not do: {'; '.join(spec_difference(spec, rebuilt))}"
        )
    return spec


def parse_json(text: str) -> dict[str, Any]:
    """The object in a JSON text that nobody vouches for.

    Raises:
        ValueError: no JSON, no object, a key twice, NaN or infinity (which JSON does not have), or nested beyond reason.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no JSON number")
        return value

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level = [found]
    for _ in range(_MAX_DEPTH):
        level = [entry for value in level if isinstance(value, dict | list) for entry in _entries(value)]
    if level:
        raise ValueError("nested too deep")
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return found


def _entries(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def canonical_json(value: dict[str, Any]) -> str:
    """One text for one value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_of(value: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def spec_difference(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Field by field: ``preprocess.interpolation: bicubic -> bilinear``."""
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += spec_difference(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {_shown(a)} -> {_shown(b)}")
    return lines


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
