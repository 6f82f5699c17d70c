"""``predict``: label images, or the rows of a cache, with a saved model.

In: a model folder and images (files, folders, tables, PIL images, arrays) or caches. Out: one ``Prediction`` per input image, in order.
"""

import contextlib
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from featcache.cache.cache import FeatureCache
from featcache.cache.features import is_finite
from featcache.cache.format import decode_names
from featcache.errors import SourceError, UsageError
from featcache.heads.head import Array
from featcache.images.archives import archive_in
from featcache.images.in_memory import Held
from featcache.images.read import ImageFiles, Paths
from featcache.images.records import STDIN
from featcache.images.source import Source, holds_images, list_images
from featcache.models.limits import Limits
from featcache.models.model import Model, load_model
from featcache.models.prediction import Prediction, Predictions
from featcache.models.training_rows import seen_words
from featcache.system.addresses import shown
from featcache.system.display import bar_in_notebook, describe_images, quantity
from featcache.system.path_advice import HERE, check_path, is_wanted, missing
from featcache.system.path_kinds import AnyPath, Kind, kind_of
from featcache.system.runtime_options import check_runtime_options

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress
    from featcache.backbones.embedder import Embedder
    from featcache.backbones.encoder import Precision

log = logging.getLogger("featcache")
_BLOCK = 4096
Input = AnyPath | Source | Held
_ARRAYS = "uint8 of shape (H, W), (H, W, 3) in the order RGB, or (H, W, 4) with alpha, or several as (N, H, W, 3)"


def predict(
    model: Model | AnyPath,
    inputs: Input | Iterable[Input],
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: "Progress | None" = None,
    coverage: float | None = None,
    evidence: AnyPath | None = None,
    abstain_below: float | None = None,
) -> Iterator[Prediction]:
    """Label images: one ``Prediction`` per input image, in the order of the inputs and of paths within a folder.

    They are yielded as they come, so that any number of images takes the memory of a few batches; ``Model.predict`` returns
    them together. An image in memory gets what the same picture in a lossless file would get, see ``in_memory.as_file``.

    Args:
        model: a model folder, or what ``load_model`` returned, which keeps its backbone ready for the next call.
        inputs: one or several, in any mixture (a list, a pandas column, ...): image files, folders, tables and lists of
            paths (or a ``Source``); PIL images; arrays, uint8, (H, W), (H, W, 3), (H, W, 4) or (N, H, W, 3), channels in the
            order RGB (OpenCV's is BGR: ``array[..., ::-1]``). Or caches of the model's own spec.
        device, workers, batch_size: as in ``extract``.
        progress: called with (done, total, bottleneck); a bar in notebooks when None.
        coverage: 0..1: ``set`` is the classes that hold the truth of so many new images (``heads.conformal``).
        evidence: the cache that the model was fit on: ``nearest`` and ``unfamiliarity`` (``heads.neighbours``).
        abstain_below: 0..1: labels less probable than this are doubted. So are those of an image whose set is not one class,
            or which is farther from the training images than 95 % of them from each other: ``status`` is then ``unsure``.

    Raises:
        ModelError, BackboneError: the model cannot be used. SourceError: an input does not exist or holds no image; no image
        of ``evidence`` trained the model. SpecMismatchError: a cache of another spec. CacheError: ``evidence`` is no cache.
        UsageError: an input is none of these, an array of another shape or type; caches mixed with images, impossible
        options, a coverage that takes more training images. All before the first image is read.
    """
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    named = list(named_inputs(inputs))
    paths = [entry.path for _, entry in named if isinstance(entry, Source)]
    if not isinstance(model, Model):
        check_path(model, "model", ("predict", HERE, *paths))
        model = load_model(model)
    limits = Limits.of(model, coverage=coverage, evidence=evidence, abstain_below=abstain_below)
    caches = _which_are_caches(model.path, paths, alone=len(paths) == len(named))
    if any(caches):
        if not all(caches) or len(paths) < len(named):
            raise UsageError("caches and images cannot be mixed in one prediction; run it once for each")
        for _, entry in named:
            cast("Source", entry).check_options("cache")
        opened = [FeatureCache.open(path) for path in paths]
        for cache in opened:
            model.check_cache(cache)
        return _note_seen(model, _predict_caches(model, opened, limits))
    model.backbone.check_embeds()
    entries, held = _list_inputs(named)
    files = Paths(None, tuple(entry.path for entry in entries if not entry.reason), held)
    found = predict_images(model, files, device, workers, batch_size, progress, limits=limits)
    return _note_seen(model, _fill_in(limits, entries, found))


def predict_all(model: Model, inputs: Input | Iterable[Input], **options: Any) -> Predictions:
    """``predict``, all of it at once; of a pandas column with one image per entry with its index."""
    index = getattr(inputs, "index", None) if _is_pandas(inputs) else None
    rows = tuple(predict(model, inputs, **options))
    return Predictions(rows, index if index is not None and len(index) == len(rows) else None)


def named_inputs(inputs: Any, name: str = "inputs") -> Iterator[tuple[str, Source | Held]]:
    """Each input and its name in messages and results; of an array of several images, each. Raises UsageError.

    ``name``: of the argument.
    """
    one = isinstance(inputs, str | os.PathLike | Source | Image.Image | np.ndarray)
    if one and not (isinstance(inputs, np.ndarray) and inputs.ndim and inputs.dtype.kind in "OU"):  # of paths
        yield from _named_one(name, inputs)
    elif isinstance(inputs, bytes | dict) or not hasattr(inputs, "__iter__") or _advice(inputs):
        raise _unusable(name, inputs)
    else:
        for number, entry in enumerate(inputs):
            yield from _named_one(f"{name}[{number}]", entry)


def _named_one(name: str, entry: Any) -> Iterator[tuple[str, Source | Held]]:
    if isinstance(entry, str | os.PathLike | Source):
        yield str(entry), Source.of(entry)
    elif isinstance(entry, Image.Image):
        yield name, entry
    elif not isinstance(entry, np.ndarray) or not _is_picture(entry):
        raise _unusable(name, entry)
    elif entry.ndim == 4:
        yield from ((f"{name}[{number}]", image) for number, image in enumerate(entry))
    else:
        yield name, entry


def _is_picture(array: Array) -> bool:
    colours = array.ndim == 2 or (array.ndim in (3, 4) and array.shape[-1] in (3, 4))
    return array.dtype == np.uint8 and array.size > 0 and colours


def _is_pandas(value: object) -> bool:
    return type(value).__module__.split(".")[0] == "pandas"


def _unusable(name: str, value: Any) -> UsageError:
    """What it is, what is expected and what to do."""
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray):
        return UsageError(f"{name} is an array of {value.dtype} {value.shape}; expected {_ARRAYS}{_advice(value)}")
    return UsageError(f"{name} is a {kind}; give paths, PIL images or arrays ({_ARRAYS}){_advice(value)}")


def _advice(value: Any) -> str:
    """What to do about the usual mistakes, to be put behind a sentence; nothing for others."""
    if type(value).__module__.split(".")[0] == "torch":
        return "; of a tensor (3, H, W) of values 0..1 give (255 * tensor).byte().permute(1, 2, 0).numpy()"
    if _is_pandas(value) and hasattr(value, "columns"):
        return '; of a data frame give the column of paths, frame["path"]'
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return "; of values 0..1 give (255 * array).round().astype('uint8')"
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[0] == 3:
        return "; channels come last: array.transpose(1, 2, 0)"
    return ""


def _which_are_caches(model: Path, paths: list[Path], *, alone: bool) -> list[bool]:
    """Raises SourceError for what is never an image; for files that are none, which are refused, only if there is nothing else."""
    kinds = [kind_of(path) for path in paths]
    hopeless = alone and not any(is_wanted(kind, "inputs") for kind in kinds)
    for place, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        if hopeless or not os.path.isfile(path):  # noqa: PTH113 - of any name, wherever it lies
            check_path(path, "inputs", ("predict", model, *paths[:place], HERE, *paths[place + 1 :]))
        gone = kind is Kind.MISSING and path != STDIN and not os.path.lexists(path) and archive_in(path) is None
        if gone and not holds_images(path):
            raise SourceError(missing(path, "give image files, folders, a CSV or a cache", wanted="inputs"))
    return [kind is Kind.CACHE for kind in kinds]


def _note_seen(model: Model, predictions: Iterator[Prediction]) -> Iterator[Prediction]:
    """The same; says in the end how many of them training has seen, and how many are unsure."""
    known, labelled, seen, unsure, first = model.digests_seen, 0, 0, 0, ""
    looked_at: list[tuple[str, bytes]] = []  # and not yet looked up, which is done of many at a time

    def look_up() -> None:
        nonlocal seen, first
        digests = np.frombuffer(b"".join(digest for _, digest in looked_at), np.uint8).reshape(-1, 32)
        found = np.flatnonzero(known.contain(digests))
        seen, first = seen + len(found), first or (looked_at[found[0]][0] if len(found) else "")
        looked_at.clear()

    for prediction in predictions:
        yield prediction
        unsure += prediction.status == "unsure"
        if prediction.probabilities is not None:
            labelled += 1
            looked_at.append((prediction.path, prediction.digest))
        if len(looked_at) == _BLOCK:
            look_up()
    look_up()
    if seen:
        log.info(seen_words(seen, labelled, first))
    if unsure:
        verb = "is" if unsure == 1 else "are"
        some = f"{unsure} of these {quantity(labelled, 'image')}" if labelled > 1 else "the only image"
        log.info("%s %s unsure; the column reason says why", some, verb)


def _predict_caches(model: Model, caches: list[FeatureCache], limits: Limits) -> Iterator[Prediction]:
    """The rows of each cache in their order, then the images it has no embedding of."""
    for cache in caches:
        for number, block in enumerate(cache.blocks(np.arange(len(cache)), size=_BLOCK)):
            here = slice(number * _BLOCK, (number + 1) * _BLOCK)
            names, digests = decode_names(cache.rows.paths[here]), [row.tobytes() for row in cache.rows.digests[here]]
            finite = is_finite(block)
            block = np.where(finite[:, None], block, 0)
            scored = limits.describe(names, model.head.probabilities(block), digests, limits.find(block, digests))
            for name, prediction, usable in zip(names, scored, finite, strict=True):
                yield prediction if usable else limits.refuse(name, "its embedding is not finite")
        yield from (limits.refuse(name, reason) for name, reason in cache.refused)


def _list_inputs(named: list[tuple[str, Source | Held]]) -> tuple[list[Prediction], dict[int, Held]]:
    """What is refused already, with its reason, and in its place what has to be looked at, without; and of that, by its number
    among what has to be looked at, what is in memory.
    """
    entries: list[Prediction] = []
    in_memory: dict[int, Held] = {}
    for name, entry in named:
        if isinstance(entry, Source) and holds_images(entry.path):
            images = list_images(entry, labelled=False)
            here = [Prediction(shown(images.root / path), None) for path in images.paths]
            refused = zip(images.refused_at, images.refused, strict=True)
            for position, refusal in reversed(list(refused)):  # from the end, so that positions stay true
                here.insert(position, Prediction(shown(images.root / refusal.path), None, refusal.reason))
            entries += here
        elif isinstance(entry, Source):
            entry.check_options("single image")
            entries.append(Prediction(str(entry), None))
        else:
            in_memory[len(entries)] = entry
            entries.append(Prediction(name, None))
    looked_at = [position for position, entry in enumerate(entries) if not entry.reason]
    return entries, {number: in_memory[k] for number, k in enumerate(looked_at) if k in in_memory}


def _fill_in(limits: Limits, entries: list[Prediction], predictions: Iterator[Prediction]) -> Iterator[Prediction]:
    for entry in entries:
        yield limits.refuse(entry.path, entry.reason) if entry.reason else next(predictions)
    next(predictions, None)  # to its end, where it says what there is to say of all images


def predict_images(
    model: Model,
    files: ImageFiles,
    device: str,
    workers: int | None,
    batch_size: int | None,
    progress: "Progress | None",
    *,
    limits: Limits | None = None,
) -> Iterator[Prediction]:
    """One per image, in order; without ``limits`` labels and probabilities alone."""
    from featcache.backbones.embed import Timings, storable

    total, limits = len(files.paths), limits or Limits(model.classes)
    embedder = _ready_embedder(model, files, device, workers=workers, batch_size=batch_size)
    timings, done = Timings(), 0
    batches = contextlib.closing(embedder.embed(files, timings=timings))
    with bar_in_notebook(progress, describe_images("predicting")) as report, batches as found_batches:
        if report:
            report(0, total, timings.bottleneck)
        for batch in (storable(batch, model.spec.storage) for batch in found_batches):
            found = {k: limits.refuse(files.paths[k], why) for k, why in batch.refused.items()}
            if len(batch.indices):
                stored = batch.features.astype(model.spec.storage)  # what the head saw in training
                names = [files.paths[k] for k in batch.indices.tolist()]
                digests = [digest.tobytes() for digest in batch.digests]
                scored = limits.describe(names, model.head.probabilities(stored), digests, limits.find(stored, digests))
                found |= zip(batch.indices.tolist(), scored, strict=True)
            yield from (found[k] for k in sorted(found))
            done += len(batch)
            if report:
                report(done, total, timings.bottleneck)


# Per model and device: an embedder, and on how many images it may have been checked. Not part of a model, which is data.
_ready: "weakref.WeakKeyDictionary[Model, dict[str, tuple[Embedder, int]]]" = weakref.WeakKeyDictionary()
_getting_ready = threading.Lock()


def _ready_embedder(
    model: Model, files: ImageFiles, device: str, *, workers: int | None, batch_size: int | None
) -> "Embedder":
    """The model's embedder for ``files``: loaded and checked on the first of them, once per model and device; once more where
    that first time there were fewer images than the check asks for, as so few prove no fast precision.
    """
    from featcache.backbones.embedder import SAMPLE, Embedder
    from featcache.system.device import choose_runtime

    runtime = choose_runtime(device, workers=workers, batch_size=batch_size)
    enough = min(runtime.batch_size, SAMPLE)
    runtime = dataclasses.replace(runtime, batch_size=max(1, min(runtime.batch_size, len(files.paths))))
    with _getting_ready:
        there = _ready.setdefault(model, {})
        embedder, checked = there.get(str(runtime.device), (None, 0))
        if embedder is None or checked < enough <= runtime.batch_size:
            log.info(runtime.reason)
            precision = cast("Precision", "auto" if model.spec.precision == "reference" else model.spec.precision)
            backbone = embedder.backbone if embedder else model.load_backbone()
            embedder = Embedder.prepare(backbone, files, runtime=runtime, precision=precision)
            there[str(runtime.device)] = embedder, min(runtime.batch_size, SAMPLE)
    return dataclasses.replace(embedder, runtime=runtime)
