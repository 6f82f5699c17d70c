"""``export`` of a cache: its rows as a file for other programs, with the places on a map and what a model says of them.

In: a cache; a model, if predictions are asked for. Out: a file in the format that its ending says (``cache.export``).
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.export import WRITERS, columns_of, files_of, format_of, write_as
from featcache.cache.features import Features, is_finite
from featcache.cache.table import REAL, TEXT, Added, Block, all_utf8, arrow, readable
from featcache.errors import SourceError, UsageError
from featcache.models.model import Model, load_model
from featcache.reports.elements.projection import Method, check_method, project
from featcache.system.display import Shown
from featcache.system.files import check_may_replace, check_output, target_of
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path, is_model

log = logging.getLogger("featcache")
_USAGE = {
    ".parquet": "pandas.read_parquet({name!r})",
    ".npz": "numpy.load({name!r})['vector']",
    ".faiss": "faiss.read_index({name!r}).search(unit_vectors, 10)",
    ".fiftyone.json": "fiftyone.Dataset.from_json({name!r}, rel_dir=SOURCE)",
    ".labelstudio.json": "import {name} into a project with Image name=image value=$image, Choices name=label toName=image",
}
_LACKS = {".faiss": ("model", "map"), ".labelstudio.json": ("map",)}  # what has no place in such a file


@dataclasses.dataclass(frozen=True, repr=False)
class CacheExport(Shown):
    """What ``export_cache`` wrote.

    Attributes:
        cache: the file. output: the file written, files: with those beside it. format: its ending. rows: N. dim: D.
        columns: by their names in the files. model: whose predictions they are. bytes: of all files. usage: a line that reads it.
        seconds: of the whole call.
    """

    cache: Path
    output: Path
    files: tuple[Path, ...]
    format: str
    rows: int
    dim: int
    columns: tuple[str, ...]
    model: Path | None
    bytes: int
    usage: str
    seconds: float

    _shown = ("cache", "output", "rows", "dim", "columns", "bytes", "seconds")


def export_cache(
    cache: FeatureCache | AnyPath,
    output: AnyPath,
    *,
    model: Model | AnyPath | None = None,
    map: Method = "none",
    seed: int = 0,
    force: bool = False,
) -> CacheExport:
    """Write the rows of a cache as one file for other programs; what is in it: ``cache.table`` and ``cache.export``.

    Args:
        cache: a cache, or its path.
        output: a .parquet (extra ``parquet``), .npz, .faiss, .fiftyone.json or .labelstudio.json file.
        model: adds ``prediction`` and ``probability``, of a model of the cache's own spec.
        map: adds ``x`` and ``y``: pca, tsne (extra ``report``), auto (t-SNE if it takes less than a minute) or none. seed: of it.
        force: replace the output if it exists.

    Raises:
        UsageError: another ending, one that has no place for ``model`` or ``map``, or an output that exists. CacheError: damaged.
        StorageError: it cannot be written.
        SpecMismatchError: the model was trained on vectors of another spec. SourceError: rows that no map can hold.
        MissingDependencyError: an extra is missing. ExportError: as ``write_as``.
    """
    started, output = time.perf_counter(), as_path(output)
    if not isinstance(cache, FeatureCache):
        check_path(cache, "cache", ("export", HERE, "-o", output))
    check_method(map)
    kind = _check_target(output, force=force, asked={"model": model is not None, "map": map != "none"})
    if kind == ".parquet":
        arrow()
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    predicting = None if model is None else model if isinstance(model, Model) else load_model(model)
    if predicting is not None:
        predicting.check_cache(opened, advice="give the cache that it belongs to")
    if not all_utf8(opened.rows):
        log.warning("%s: some paths are not UTF-8; path shows their bytes as \\xE9, path_bytes holds them", opened.path)
    parts = [part for part in (_places(opened, map, seed), _predictions(predicting)) if part is not None]
    added = Added(
        {name: kind for part in parts for name, kind in part.kinds.items()},
        lambda rows, block: {name: column for part in parts for name, column in part.compute(rows, block).items()},
    )
    write_as(opened, output, added, by="" if predicting is None else predicting.path.name)
    return CacheExport(
        cache=opened.path,
        output=output,
        files=files_of(output),
        format=kind.removeprefix("."),
        rows=len(opened),
        dim=opened.dim,
        columns=columns_of(output, opened.rows, added),
        model=None if predicting is None else predicting.path,
        bytes=sum(path.stat().st_size for path in files_of(output)),
        usage=_USAGE[kind].format(name=str(output)),
        seconds=time.perf_counter() - started,
    )


def _check_target(output: Path, *, force: bool, asked: dict[str, bool]) -> str:
    """The format, by the ending. Refuse, before any work, what cannot or must not be written, or has no place for what is ``asked``."""
    kind = format_of(output)
    if kind is None:
        raise UsageError(
            f"cannot tell the format of {output}; name it {', '.join([*WRITERS][:-1])} or {[*WRITERS][-1]}"
        )
    for name in _LACKS.get(kind, ()):
        if asked[name]:
            raise UsageError(
                f"a {kind} has no place for what --{name} adds; leave it out, or name the file .parquet or .npz"
            )
    for path in files_of(output):
        check_output(path)
        check_may_replace(path, "--force", given=force)
    if is_model(target_of(output).parent):
        raise UsageError(f"{output.parent} is a model folder, which keeps no other files; choose another -o")
    return kind


def _places(cache: FeatureCache, method: Method, seed: int) -> Added | None:
    if method == "none":
        return None
    if len(cache) < 3:
        raise SourceError(f"{cache.path} has {len(cache)} rows; a map needs three")
    cache.check_finite(np.arange(len(cache)))
    with cache.reader() as features:
        found = project(features, np.arange(len(cache)), method=method, seed=seed)
    assert found is not None
    points = found.points.astype(np.float32)
    return Added({"x": REAL, "y": REAL}, lambda rows, block: {"x": points[rows, 0], "y": points[rows, 1]})


def _predictions(model: Model | None) -> Added | None:
    if model is None:
        return None
    names: list[Any] = [
        *(readable(name) for name in model.classes),
        None,
    ]  # the last: of an embedding that is not finite

    def compute(rows: slice, block: Features) -> Block:
        finite = is_finite(block)
        probabilities = model.head.probabilities(np.where(finite[:, None], block, 0))
        best = np.where(finite, probabilities.argmax(axis=1), -1)
        certainty = np.where(finite, probabilities.max(axis=1), np.nan).astype(np.float32)
        return {"prediction": [names[k] for k in best.tolist()], "probability": certainty}

    return Added({"prediction": TEXT, "probability": REAL}, compute)
