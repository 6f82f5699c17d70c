"""``extract``: bring a cache file up to date with a folder of images, embedding only what is new.

In: a source of images and an ``ExtractRequest``. Out: ``features.h5``. The order of things: list the images, settle the
spec, recognise what is embedded already, embed the rest into parts, pack everything into one file, atomically.
"""

import dataclasses
import functools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from featcache.cache import FeatureCache, Features, Rows, encode_names, write_cache
from featcache.errors import DamagedCacheError, SourceError, SpecMismatchError, UsageError
from featcache.images import ImageList, RefusedImage, decode, ignore_size_warnings, list_images, read_image
from featcache.publish import check_free_space, check_output
from featcache.recognition import Known, digest_keys, find, recognise
from featcache.request import ExtractRequest, customise
from featcache.spec import fingerprint_of, make_spec, spec_difference

if TYPE_CHECKING:
    from featcache.backbones import Backbone
    from featcache.encoder import Encoder, Precision
    from featcache.runtime import Runtime

log = logging.getLogger("featcache")
Progress = Callable[[int, int, str], None]  # images done, images to do, the stage that limits


@dataclasses.dataclass(frozen=True)
class ExtractReport:
    """What ``extract`` did.

    Attributes:
        cache: the file.
        images: images found; always ``embedded + reused + refused``.
        embedded, reused, refused: computed now; taken over; without an embedding (the cache says why).
        added, changed, removed: paths, compared with the cache that was there before.
        dim: D.
        seconds: of the whole call. images_per_second: embedded / seconds of the embedding loop, start-up left out.
        fingerprint: of the cache's spec.
    """

    cache: Path
    images: int
    embedded: int
    reused: int
    added: int
    changed: int
    removed: int
    refused: int
    dim: int
    seconds: float
    images_per_second: float
    fingerprint: str


def extract(
    source: str | Path,
    output: str | Path,
    request: ExtractRequest | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Embed the images of ``source`` into the cache file ``output``, or bring that file up to date.

    Images are recognised by content: only new content is embedded, removed files are dropped, renames and new labels
    cost nothing. An interrupted run is resumed by calling it again.

    Args:
        source: folder of class folders, of splits of these, of images, or a CSV (see ``list_images``).
        output: the cache file; its folder must exist.
        request: backbone, weights, preprocessing, precision; the defaults of ``ExtractRequest`` when None.
        device: auto, cpu, cuda, cuda:N or mps.
        workers: threads; one per usable core when None.
        batch_size: images per forward pass; chosen for the device when None.
        limit: only this many images, evenly spread over the list; rows that the cache already has are kept.
        force: replace a cache that was made with another spec, or is damaged.
        progress: called with (done, total, bottleneck) when embedding starts and after every chunk.

    Returns:
        Counts and figures.

    Raises:
        SourceError: no usable image. BackboneError: backbone or weights. SpecMismatchError: the file was made with
        another spec. CacheError: it is damaged. StorageError: it cannot be written. UsageError: impossible values.
    """
    from featcache.parts import locked, open_parts, parts_folder, remove_parts

    started = time.perf_counter()
    output, request = Path(output), request or ExtractRequest()
    check_output(output)
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, found {limit}")
    images = list_images(Path(source))
    if len(images.classes) == 1:
        raise SourceError(
            f"{source} holds one class only ({images.classes[0]}), a classifier needs at least two; "
            f"for images without labels give {Path(source) / images.classes[0]} itself"
        )
    with locked(parts_folder(output)):
        old = _open_old(output, force)
        caches = ([old] if old else []) + open_parts(parts_folder(output))
        job = _Job(request, images, output, functools.partial(_choose_runtime, device, workers, batch_size))
        spec = (None if force else job.spec_of_same_request(caches)) or job.prepared.spec
        caches = _of_spec(caches, spec, output, force)
        known = recognise(images, caches)
        if limit is not None:
            kept = _spread(known, limit)
            images, known = images.take(kept), known.take(kept)
            job.images = images
        refused = _refuse_again(images, known, old)
        reused = len(images) - len(known.missing)
        todo = np.setdiff1d(known.missing, list(refused))
        if len(todo):
            for number in np.unique(known.source[known.source >= 0]):
                caches[number].check_features()  # damage in what is to be reused is found before work starts
            _of_spec(caches, job.prepared.spec, output, force=False)
            refused |= job.embed(todo, known, caches, progress)
        elif caches and _lacks_weights(caches[0], output):
            job.keep_weights()
        rows = _pack(job, caches, known, refused, spec)
        remove_parts(parts_folder(output))
        _remove_old_weights(old, spec, output)
    seconds = time.perf_counter() - started
    added, changed, removed = _compare(old, rows)
    embedded = len(rows) - reused
    return ExtractReport(
        cache=output,
        images=len(images) + len(images.refused),
        embedded=embedded,
        reused=reused,
        added=added,
        changed=changed,
        removed=removed,
        refused=len(images) + len(images.refused) - len(rows),
        dim=FeatureCache.open(output).dim,
        seconds=seconds,
        images_per_second=embedded / job.embedding_seconds if embedded else 0.0,
        fingerprint=fingerprint_of(spec),
    )


@dataclasses.dataclass(frozen=True)
class _Prepared:
    backbone: "Backbone"
    encoder: "Encoder"
    runtime: "Runtime"
    spec: dict[str, Any]
    provenance: dict[str, Any]


class _Job:
    """What an extraction needs once there is something to embed; loads the model at most once, and late."""

    def __init__(
        self, request: ExtractRequest, images: ImageList, output: Path, choose_runtime: Callable[[], "Runtime"]
    ) -> None:
        self.request, self.images, self.output = request, images, output
        self._choose_runtime = choose_runtime
        self.record = request.record()
        self._before: dict[str, Any] = {}
        self.embedding_seconds = 0.0

    def spec_of_same_request(self, caches: list[FeatureCache]) -> dict[str, Any] | None:
        """The spec, if one of ``caches`` was made by this very request with these very libraries."""
        for cache in caches:
            self._before = self._before or cache.spec
            if cache.provenance.get("request") == self.record:
                return cache.spec
        return None

    @functools.cached_property
    def prepared(self) -> _Prepared:
        """Backbone, encoder and spec. Raises BackboneError, UsageError, SourceError."""
        from featcache.backbones import load_backbone
        from featcache.embedding import sample_pixels
        from featcache.encoder import build_encoder

        runtime = self._choose_runtime()
        log.info(runtime.reason)
        backbone = customise(load_backbone(self.request.backbone, self.request.weights), self.request)
        log.info("backbone %s: %d dimensions, weights %s", backbone.name, backbone.dim, backbone.weights)
        sample = sample_pixels(self.images, backbone.preprocess, min(runtime.batch_size, 32))
        if not len(sample):
            raise SourceError(_all_refused(self.images, _refusals(self.images, range(len(self.images)))))
        precision = cast("Precision", self.request.precision)
        encoder, choice = build_encoder(backbone, runtime, sample, precision=precision)
        log.info("precision %s", choice.reason)
        # What an earlier run settled by measuring stays settled, also if today's sample would just pass or fail.
        again = self._before.get("precision") == self.request.precision
        spec = make_spec(
            name=backbone.name,
            weights_sha256=backbone.weights_sha256,
            layer=backbone.layer,
            preprocess=backbone.preprocess,
            precision=self.request.precision if again else choice.precision_class,
            storage=self._storage(encoder(sample)),
        )
        provenance = {
            "request": self.record,
            "weights": {"source": backbone.weights, "reload": backbone.reload},
            "runtime": runtime.reason,
            "precision": dataclasses.asdict(choice),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return _Prepared(backbone, encoder, runtime, spec, provenance)

    def keep_weights(self) -> None:
        """Put a copy of the weights beside the cache if no library provides them again. Raises StorageError."""
        from featcache.backbones import save_weights
        from featcache.parts import parts_folder

        backbone = self.prepared.backbone
        copy = weights_copy(self.output, self.prepared.spec)
        if backbone.reload is None and not copy.is_file():
            save_weights(backbone, copy, staging=parts_folder(self.output))

    def _storage(self, features: "np.ndarray[Any, np.dtype[np.float32]]") -> str:
        from featcache.encoder import fits_float16

        if self.request.dtype != "auto":
            return self.request.dtype
        if before := self._before.get("storage"):
            return str(before)
        fits = bool(fits_float16(features).all())
        reason = "half the size of float32, and these embeddings fit" if fits else "these embeddings do not fit float16"
        log.info("storage %s: %s", "float16" if fits else "float32", reason)
        return "float16" if fits else "float32"

    def embed(
        self,
        todo: "np.ndarray[Any, np.dtype[np.intp]]",
        known: Known,
        caches: list[FeatureCache],
        progress: Progress | None,
    ) -> dict[int, str]:
        """Embed the images ``todo`` into new parts, appended to ``caches`` and entered into ``known``.

        Returns:
            image -> reason, for those that could not be embedded.
        """
        from featcache.embedding import Timings, embed, storable
        from featcache.parts import PartWriter, parts_folder

        at, folder = self.prepared, parts_folder(self.output)
        itemsize = np.dtype(at.spec["storage"]).itemsize
        check_free_space(self.output.parent, (len(todo) + len(self.images)) * at.backbone.dim * itemsize)
        self.keep_weights()
        images = self.images.take(todo)
        writer = PartWriter(folder, at.spec, at.provenance, at.backbone.dim)
        timings = Timings()
        refused: dict[int, str] = {}
        embedded: list[int] = []
        done = 0
        started = time.perf_counter()
        chunks = embed(images, at.encoder, at.runtime, timings=timings)
        try:
            if progress:
                progress(0, len(todo), timings.bottleneck)
            for chunk in chunks:
                chunk = storable(chunk, at.spec["storage"])
                refused |= {int(todo[index]): reason for index, reason in chunk.refused}
                embedded += todo[chunk.indices].tolist()
                known.sizes[todo[chunk.indices]], known.mtimes[todo[chunk.indices]] = chunk.sizes, chunk.mtimes
                with timings.measure("disk"):
                    writer.add(chunk, [images.paths[index] for index in chunk.indices])
                done += len(chunk.indices) + len(chunk.refused)
                if progress:
                    progress(done, len(todo), timings.bottleneck)
        finally:
            chunks.close()
            writer.flush()  # also when interrupted: what is finished is kept
            self.embedding_seconds = time.perf_counter() - started
        start = 0
        for part in writer.written:
            known.set(np.array(embedded[start : start + len(part)]), len(caches), np.arange(len(part)))
            caches.append(part)
            start += len(part)
        return refused


def weights_copy(cache: Path, spec: dict[str, Any]) -> Path:
    """Where ``extract`` keeps the weights that no library provides again, beside the cache, for models made from it."""
    return cache.with_name(f"{cache.name}.{spec['backbone']['weights_sha256'][:12]}.safetensors")


def weights_source(cache: FeatureCache) -> tuple[str, str | None]:
    """Where a cache says its weights came from: in words, and what to pass to ``load_provided`` (None: a copy)."""
    weights = cache.provenance.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    reload = weights.get("reload")
    return str(weights.get("source", "unknown")), reload if isinstance(reload, str) else None


def _lacks_weights(cache: FeatureCache, output: Path) -> bool:
    return weights_source(cache)[1] is None and not weights_copy(output, cache.spec).is_file()


def _remove_old_weights(old: FeatureCache | None, spec: dict[str, Any], output: Path) -> None:
    """A replaced cache's copy of its weights has no use any more."""
    if old and old.spec["backbone"]["weights_sha256"] != spec["backbone"]["weights_sha256"]:
        weights_copy(output, old.spec).unlink(missing_ok=True)


def _choose_runtime(device: str, workers: int | None, batch_size: int | None) -> "Runtime":
    from featcache.runtime import choose_runtime, keep_freed_memory

    keep_freed_memory()
    return choose_runtime(device, workers=workers, batch_size=batch_size)


def _open_old(output: Path, force: bool) -> FeatureCache | None:
    if not os.path.lexists(output):
        return None
    try:
        old = FeatureCache.open(output)
        if force:
            old.check_features()
        return old
    except DamagedCacheError as error:
        if not force:
            raise
        log.warning("%s; replacing it, as --force says", error)
        return None


def _of_spec(caches: list[FeatureCache], spec: dict[str, Any], output: Path, force: bool) -> list[FeatureCache]:
    """The caches made with ``spec``. Others are an error, or with ``force`` left aside."""
    others = [cache for cache in caches if cache.spec != spec]
    if others and not force:
        what = "" if others[0].path == output else "unfinished work for "
        raise SpecMismatchError(
            f"{what}{output} was made with another spec ({'; '.join(spec_difference(others[0].spec, spec))}); "
            "choose another -o, repeat the old options, or replace it with --force"
        )
    return [cache for cache in caches if cache.spec == spec]


def _spread(known: Known, limit: int) -> "np.ndarray[Any, np.dtype[np.intp]]":
    """``limit`` images evenly spread over the list, and all that are embedded already."""
    n = len(known.source)
    keep = known.source >= 0
    keep[np.arange(min(limit, n)) * n // min(limit, n)] = True
    return np.flatnonzero(keep)


def _refuse_again(images: ImageList, known: Known, old: FeatureCache | None) -> dict[int, str]:
    """Images refused before, and still not decodable, need no backbone to be refused again."""
    before = {path for path, _ in old.refused} if old else set()
    return _refusals(images, (index for index in known.missing.tolist() if images.paths[index] in before))


def _refusals(images: ImageList, indices: Iterable[int]) -> dict[int, str]:
    """index -> reason, for those of ``indices`` that cannot be decoded."""
    refused = {}
    with ignore_size_warnings():
        for index in indices:
            try:
                decode(read_image(images.root / images.paths[index])[0])
            except RefusedImage as reason:
                refused[index] = str(reason)
    return refused


def _all_refused(images: ImageList, refused: dict[int, str]) -> str:
    reasons = [(images.paths[index], reason) for index, reason in refused.items()]
    reasons += [(refusal.path, refusal.reason) for refusal in images.refused]
    path, reason = reasons[0]
    return f"all {len(reasons)} images of {images.root} were refused, the first, {path}: {reason}"


def _pack(job: _Job, caches: list[FeatureCache], known: Known, refused: dict[int, str], spec: dict[str, Any]) -> Rows:
    """Publish the final file, unless it would be what is there already. Returns its rows."""
    images = job.images
    order = np.flatnonzero(known.source >= 0)
    if not len(order):
        raise SourceError(_all_refused(images, refused))
    digests = np.empty((len(order), 32), np.uint8)
    for number, cache in enumerate(caches):
        here = known.source[order] == number
        digests[here] = cache.rows.digests[known.row[order][here]]
    rows = Rows(
        paths=encode_names(images.paths[index] for index in order),
        labels=images.labels[order],
        splits=images.splits[order],
        digests=digests,
        sizes=known.sizes[order],
        mtimes=known.mtimes[order],
    )
    reasons = [(refusal.path, refusal.reason) for refusal in images.refused]
    reasons += [(images.paths[index], reason) for index, reason in refused.items()]
    final = tuple(sorted(reasons))
    first = caches[0]
    if (
        first.path == job.output
        and first.rows.equals(rows)
        and first.classes == images.classes
        and first.refused == final
        and first.provenance.get("request") == job.record
    ):
        return rows
    write_cache(
        job.output,
        rows,
        _gather(caches, known, order),
        dim=first.dim,
        spec=spec,
        classes=images.classes,
        refused=final,
        provenance=caches[-1].provenance | {"request": job.record},  # so that the next run recognises itself
        staging=job.output.with_name(job.output.name + ".parts"),
    )
    return rows


def _gather(
    caches: list[FeatureCache], known: Known, order: "np.ndarray[Any, np.dtype[np.intp]]", size: int = 4096
) -> Iterator[Features]:
    """The features of the images ``order``, from wherever they lie, in blocks."""
    for start in range(0, len(order), size):
        block = order[start : start + size]
        features = np.empty((len(block), caches[0].dim), caches[0].dtype)
        for number in np.unique(known.source[block]):
            here = known.source[block] == number
            features[here] = caches[number].take(known.row[block][here])
        yield features


def _compare(old: FeatureCache | None, rows: Rows) -> tuple[int, int, int]:
    """How many paths were added, changed and removed."""
    if old is None:
        return len(rows), 0, 0
    at = find(old.rows.paths, rows.paths)
    there = at >= 0
    changed = digest_keys(rows.digests)[there] != digest_keys(old.rows.digests)[at[there]]
    return int((~there).sum()), int(changed.sum()), int(len(old) - there.sum())
