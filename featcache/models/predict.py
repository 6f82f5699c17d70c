"""``predict``: label images, or the rows of a cache, with a saved model.

In: a model folder and images, folders, CSV files or caches. Out: one ``Prediction`` per input image, in order.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from featcache.backbones.embedder import Progress
from featcache.cache.cache import FeatureCache
from featcache.cache.features import is_finite
from featcache.errors import SourceError, UsageError
from featcache.heads.head import Array
from featcache.images.source import ImageList, list_images
from featcache.models.model import Model, load_model

log = logging.getLogger("featcache")
_BLOCK = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """One input image.

    Attributes:
        path: as the user would type it (from a cache: relative to the source of the cache).
        probabilities: (C,), in the order of the model's classes; None if the image was refused.
        reason: why it was refused, else empty.
    """

    path: str
    probabilities: Array | None
    reason: str = ""


def predict(
    model: Model | str | Path,
    inputs: Sequence[str | Path],
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Prediction]:
    """Label images.

    Args:
        model: a model folder, or what ``load_model`` returned.
        inputs: image files, folders, CSV files with a ``path`` column; or caches (``.h5``) of the model's own spec.
        device, workers, batch_size: as in ``extract``.
        progress: called with (done, total, bottleneck).

    Yields:
        One ``Prediction`` per input image, in the order of the inputs and of paths within a folder.

    Raises:
        ModelError, BackboneError: the model cannot be used. SourceError: an input does not exist or holds no image.
        SpecMismatchError: a cache of another spec. UsageError: caches mixed with images.
    """
    model = model if isinstance(model, Model) else load_model(model)
    paths = [Path(entry) for entry in inputs]
    if missing := [path for path in paths if not os.path.lexists(path)]:
        raise SourceError(f"{missing[0]} does not exist; give image files, folders, a CSV or a cache")
    caches = [path.suffix == ".h5" for path in paths]
    if any(caches):
        if not all(caches):
            raise UsageError("caches and images cannot be mixed in one prediction; run it once for each")
        opened = [FeatureCache.open(path) for path in paths]
        for cache in opened:
            model.check_cache(cache)
        return _predict_caches(model, opened)
    return _predict_images(model, _list_inputs(paths), device, workers, batch_size, progress)


def _predict_caches(model: Model, caches: list[FeatureCache]) -> Iterator[Prediction]:
    """The rows of each cache in their order, then the images it has no embedding of."""
    for cache in caches:
        for number, block in enumerate(cache.blocks(np.arange(len(cache)), size=_BLOCK)):
            names = cache.paths[number * _BLOCK : (number + 1) * _BLOCK]
            finite = is_finite(block)
            scores = model.head.probabilities(np.where(finite[:, None], block, 0))
            for name, row, usable in zip(names, scores, finite, strict=True):
                yield Prediction(name, row) if usable else Prediction(name, None, "its embedding is not finite")
        for name, reason in cache.refused:
            yield Prediction(name, None, reason)


_Entry = tuple[str, str]  # path as typed; why it is refused already, or empty


def _list_inputs(paths: list[Path]) -> list[_Entry]:
    entries: list[_Entry] = []
    for path in paths:
        if path.is_dir() or path.suffix.lower() == ".csv":
            images = list_images(path, labelled=path.is_file())
            here = [(str(images.root / name), "") for name in images.paths]
            for refusal in reversed(images.refused):  # from the end, so that positions stay true
                here.insert(refusal.position, (str(images.root / refusal.path), refusal.reason))
            entries += here
        else:
            entries.append((str(path), ""))
    return entries


def _predict_images(
    model: Model,
    entries: list[_Entry],
    device: str,
    workers: int | None,
    batch_size: int | None,
    progress: Progress | None,
) -> Iterator[Prediction]:
    todo = [path for path, reason in entries if not reason]
    images = _as_images(todo)
    results = embed_and_score(model, images, device, workers, batch_size, progress)
    for path, reason in entries:
        if reason:
            yield Prediction(path, None, reason)
        else:
            probabilities, refusal = next(results)
            yield Prediction(path, probabilities, refusal)


def _as_images(paths: list[str]) -> ImageList:
    n = len(paths)
    nothing = np.full(n, -1, np.int64)
    return ImageList(Path(), tuple(paths), nothing.astype(np.int32), (), np.zeros(n, np.uint8), nothing, nothing)


def embed_and_score(
    model: Model,
    images: ImageList,
    device: str,
    workers: int | None,
    batch_size: int | None,
    progress: Progress | None,
) -> Iterator[tuple[Array | None, str]]:
    """(probabilities or None, reason) per image, in order."""
    from featcache.backbones.embed import Timings, embed, sample_pixels, storable
    from featcache.backbones.encoder import Precision, build_encoder
    from featcache.system.device import choose_runtime

    runtime = choose_runtime(device, workers=workers, batch_size=batch_size)
    runtime = dataclasses.replace(runtime, batch_size=max(1, min(runtime.batch_size, len(images))))
    log.info(runtime.reason)
    backbone = model.load_backbone()
    log.info("backbone %s: weights %s", backbone.name, backbone.weights)
    sample = sample_pixels(images, backbone.preprocess, min(runtime.batch_size, 32))
    if not len(sample):  # nothing to run the backbone on; reading each image again gives its reason
        sample = np.zeros((1, *backbone.preprocess.crop, 3), np.uint8)
    precision = model.spec["precision"]
    asked = cast(Precision, "auto" if precision == "reference" else precision)
    encoder, choice = build_encoder(backbone, runtime, sample, precision=asked)
    log.info("precision %s", choice.reason)
    timings = Timings()
    done = 0
    if progress:
        progress(0, len(images), timings.bottleneck)
    with contextlib.closing(embed(images, encoder, runtime, timings=timings)) as chunks:
        for chunk in chunks:
            chunk = storable(chunk, model.spec["storage"])
            results: dict[int, tuple[Array | None, str]] = {index: (None, reason) for index, reason in chunk.refused}
            if len(chunk.indices):
                stored = chunk.features.astype(model.spec["storage"])  # what the head saw in training
                scores = model.head.probabilities(stored)
                results |= {int(index): (row, "") for index, row in zip(chunk.indices, scores, strict=True)}
            yield from (results[index] for index in sorted(results))
            done += len(results)
            if progress:
                progress(done, len(images), timings.bottleneck)
