"""``predict``: label images, or the rows of a cache, with a saved model.

In: a model folder and images, folders, CSV files or caches. Out: one ``Prediction`` per input image, in order.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.features import is_finite
from featcache.errors import SourceError, UsageError
from featcache.heads.head import Array
from featcache.images.read import ImageFiles, Paths
from featcache.images.source import list_images
from featcache.models.model import Model, load_model
from featcache.system.path_kinds import HERE, Kind, as_path, check_path, is_wanted, kind_of, missing
from featcache.system.runtime_options import check_runtime_options

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress
    from featcache.backbones.encoder import Precision

log = logging.getLogger("featcache")
_BLOCK = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """One input image.

    Attributes:
        path: as the user would type it (from a cache: relative to the source of the cache).
        probabilities: (C,), in the order of the model's classes; None if the image was refused.
        reason: why it was refused, else empty.
        digest: sha256 of the image's bytes; empty if it was refused.
    """

    path: str
    probabilities: Array | None
    reason: str = ""
    digest: bytes = b""


def predict(
    model: Model | str | Path,
    inputs: str | Path | Sequence[str | Path],
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: "Progress | None" = None,
) -> Iterator[Prediction]:
    """Label images: one ``Prediction`` per input image, in the order of the inputs and of paths within a folder.

    Args:
        model: a model folder, or what ``load_model`` returned.
        inputs: one or several: image files, folders, CSV files with a ``path`` column; or caches of the model's own spec.
        device, workers, batch_size: as in ``extract``.
        progress: called with (done, total, bottleneck).

    Raises:
        ModelError, BackboneError: the model cannot be used. SourceError: an input does not exist or holds no image.
        SpecMismatchError: a cache of another spec. UsageError: caches mixed with images, impossible options.
    """
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    paths = [as_path(entry) for entry in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    if not isinstance(model, Model):
        check_path(model, "model", ("predict", HERE, *paths))
        model = load_model(model)
    caches = _which_are_caches(model.path, paths)
    if any(caches):
        if not all(caches):
            raise UsageError("caches and images cannot be mixed in one prediction; run it once for each")
        opened = [FeatureCache.open(path) for path in paths]
        for cache in opened:
            model.check_cache(cache)
        return _note_seen(model, _predict_caches(model, opened))
    entries = _list_inputs(paths)
    files = Paths(Path(), tuple(entry.path for entry in entries if not entry.reason))
    return _note_seen(model, _fill_in(entries, predict_images(model, files, device, workers, batch_size, progress)))


def _which_are_caches(model: Path, paths: list[Path]) -> list[bool]:
    """Raises SourceError for what is never an image; for files that are none, which are refused, only if there are no others."""
    kinds = [kind_of(path) for path in paths]
    hopeless = not any(is_wanted(kind, "inputs") for kind in kinds)
    for place, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        if hopeless or not path.is_file():
            check_path(path, "inputs", ("predict", model, *paths[:place], HERE, *paths[place + 1 :]))
        if kind is Kind.MISSING and not os.path.lexists(path):
            raise SourceError(missing(path, "give image files, folders, a CSV or a cache"))
    return [kind is Kind.CACHE for kind in kinds]


def _note_seen(model: Model, predictions: Iterator[Prediction]) -> Iterator[Prediction]:
    """The same; says in the end how many of them training has seen."""
    rows, labelled, seen, first = model.training_rows(), 0, 0, ""
    known = set() if rows is None else {digest.tobytes() for digest in rows.digests}
    for prediction in predictions:
        yield prediction
        labelled += prediction.probabilities is not None
        if prediction.digest in known:
            seen, first = seen + 1, first or prediction.path
    if seen:
        log.info("training has seen %d of these %d images, the first %s", seen, labelled, first)


def _predict_caches(model: Model, caches: list[FeatureCache]) -> Iterator[Prediction]:
    """The rows of each cache in their order, then the images it has no embedding of."""
    for cache in caches:
        for number, block in enumerate(cache.blocks(np.arange(len(cache)), size=_BLOCK)):
            here = slice(number * _BLOCK, (number + 1) * _BLOCK)
            names, digests = cache.paths[here], cache.rows.digests[here]
            finite = is_finite(block)
            scores = model.head.probabilities(np.where(finite[:, None], block, 0))
            for name, digest, row, usable in zip(names, digests, scores, finite, strict=True):
                scored = Prediction(name, row, digest=digest.tobytes())
                yield scored if usable else Prediction(name, None, "its embedding is not finite")
        for name, reason in cache.refused:
            yield Prediction(name, None, reason)


def _list_inputs(paths: list[Path]) -> list[Prediction]:
    """What is refused already, with its reason, and in its place what has to be looked at, without."""
    entries: list[Prediction] = []
    for path in paths:
        if path.is_dir() or path.suffix.lower() == ".csv":
            images = list_images(path, labelled=False)
            here = [Prediction(str(images.root / name), None) for name in images.paths]
            refused = zip(images.refused_at, images.refused, strict=True)
            for position, refusal in reversed(list(refused)):  # from the end, so that positions stay true
                here.insert(position, Prediction(str(images.root / refusal.path), None, refusal.reason))
            entries += here
        else:
            entries.append(Prediction(str(path), None))
    return entries


def _fill_in(entries: list[Prediction], predictions: Iterator[Prediction]) -> Iterator[Prediction]:
    for entry in entries:
        yield entry if entry.reason else next(predictions)


def predict_images(
    model: Model,
    files: ImageFiles,
    device: str,
    workers: int | None,
    batch_size: int | None,
    progress: "Progress | None",
) -> Iterator[Prediction]:
    """One per image, in order."""
    from featcache.backbones.embed import Timings, storable
    from featcache.backbones.embedder import Embedder
    from featcache.system.device import choose_runtime

    runtime, total = choose_runtime(device, workers=workers, batch_size=batch_size), len(files.paths)
    runtime = dataclasses.replace(runtime, batch_size=max(1, min(runtime.batch_size, total)))
    log.info(runtime.reason)
    precision = cast("Precision", "auto" if model.spec.precision == "reference" else model.spec.precision)
    embedder = Embedder.prepare(model.backbone.load(), files, runtime=runtime, precision=precision)
    timings, done = Timings(), 0
    if progress:
        progress(0, total, timings.bottleneck)
    with contextlib.closing(embedder.embed(files, timings=timings)) as batches:
        for batch in (storable(batch, model.spec.storage) for batch in batches):
            found = {k: Prediction(files.paths[k], None, why) for k, why in batch.refused.items()}
            if len(batch.indices):
                stored = batch.features.astype(model.spec.storage)  # what the head saw in training
                scores = model.head.probabilities(stored)
                rows = zip(batch.indices, scores, batch.digests, strict=True)
                found |= {k: Prediction(files.paths[k], row, "", digest.tobytes()) for k, row, digest in rows}
            yield from (found[k] for k in sorted(found))
            done += len(batch)
            if progress:
                progress(done, total, timings.bottleneck)
