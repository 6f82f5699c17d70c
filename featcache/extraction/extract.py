"""``extract``: bring a cache file up to date with a folder of images, embedding only what is new.

In: a source of images and an ``ExtractRequest``. Out: ``features.h5``. The order of things: list the images, settle the
spec, recognise what is embedded already, embed the rest into parts, pack everything into one file, atomically.
"""

import dataclasses
import functools
import logging
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from featcache.backbones.embedder import Prepared, Progress, choose_runtime, prepare_encoder
from featcache.cache.cache import FeatureCache, weights_copy, weights_source
from featcache.cache.format import Indices, Rows, digest_keys, encode_names, find
from featcache.cache.write import write_cache
from featcache.errors import BackboneError, SourceError, UsageError
from featcache.extraction.match import Known, gather
from featcache.extraction.plan import Plan, make_plan, of_spec, open_lenders, open_old
from featcache.extraction.request import ExtractRequest, load_requested
from featcache.images.decode import all_refused
from featcache.images.source import ImageList, list_images
from featcache.spec import fingerprint_of, make_spec
from featcache.system.files import check_free_space, check_output
from featcache.system.workdir import locked, work_folder

if TYPE_CHECKING:
    from featcache.backbones.encoder import Encoder, Precision
    from featcache.spec import PreprocessSpec
    from featcache.system.device import Runtime

log = logging.getLogger("featcache")


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
    source: str | Path | ImageList,
    output: str | Path,
    request: ExtractRequest | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    reuse: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> ExtractReport:
    """Embed the images of ``source`` into the cache file ``output``, or bring that file up to date.

    Images are recognised by content: only new content is embedded, removed files are dropped, renames and new labels
    cost nothing. An interrupted run is resumed by calling it again.

    Args:
        source: folder of class folders, of splits of these, of images, or a CSV (see ``list_images``); or a list of images,
            taken as it is: what changes after listing is not noticed.
        output: the cache file; its folder must exist.
        request: backbone, weights, preprocessing, precision; the defaults of ``ExtractRequest`` when None.
        device: auto, cpu, cuda, cuda:N or mps.
        workers: threads; one per usable core when None.
        batch_size: images per forward pass; chosen for the device when None.
        limit: only this many images, evenly spread over the list; rows that the cache already has are kept.
        force: replace a cache that was made with another spec, or is damaged.
        reuse: other caches, never changed, whose rows are taken over if their spec is the same; the first that has an image
            counts, and those that cannot be used are passed over.
        progress: called with (done, total, bottleneck) when embedding starts and after every chunk.

    Returns:
        Counts and figures.

    Raises:
        SourceError: no usable image. BackboneError, ModelError: backbone or weights. SpecMismatchError: the file was made
        with another spec. CacheError: it is damaged. StorageError: it cannot be written. UsageError: impossible values.
    """
    from featcache.extraction.parts import open_parts, remove_parts

    started = time.perf_counter()
    output, request = Path(output), request or ExtractRequest()
    check_output(output)
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, found {limit}")
    images = _list(source)
    with locked(work_folder(output)):
        old = open_old(output, force)
        own = ([old] if old else []) + open_parts(work_folder(output))
        lenders = open_lenders(map(Path, reuse), output)
        job = _Job(request, images, output, functools.partial(choose_runtime, device, workers, batch_size))
        spec = (None if force else job.spec_of_same_request(own, lenders)) or job.prepared.spec
        own = of_spec(own, spec, output, force)
        plan = make_plan(images, lenders, own, spec, limit)
        job.images = plan.images
        if len(plan.todo) and job.prepared.spec != spec:
            of_spec(own, job.prepared.spec, output, force=False)
            spec = job.prepared.spec  # only lenders had the other one, and are passed over now
            plan = make_plan(images, lenders, own, spec, limit)
        images = plan.images
        reused = int((plan.known.source >= 0).sum())
        if len(plan.todo):
            for number in np.unique(plan.known.source[plan.known.source >= 0]):
                plan.caches[number].check_features()  # damage in what is to be reused is found before work starts
            plan.refused |= job.embed(plan.todo, plan.known, plan.caches, progress)
        elif reused and _lacks_weights(plan.origin, output):
            job.keep_weights()
        rows = _pack(job, plan, spec)
        remove_parts(work_folder(output))
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
        dim=plan.origin.dim,
        seconds=seconds,
        images_per_second=embedded / job.embedding_seconds if embedded else 0.0,
        fingerprint=fingerprint_of(spec),
    )


class _Job:
    """What an extraction needs once there is something to embed; loads the model at most once, and late."""

    def __init__(
        self, request: ExtractRequest, images: ImageList, output: Path, choose_runtime: Callable[[], "Runtime"]
    ) -> None:
        self.images, self.output = images, output
        self._choose_runtime = choose_runtime
        self._asked, self.record, self._model = request, request.record(), request.model()
        self.request = request.resolved(self._model) if self._model else request
        self._before: dict[str, Any] = {}
        self.embedding_seconds = 0.0

    def spec_of_same_request(self, own: list[FeatureCache], lenders: list[FeatureCache]) -> dict[str, Any] | None:
        """The spec, if one of these caches was made by this very request with these very libraries."""
        # Where a lender differs from what is here, the backbone decides, not the lender.
        fitting = [*own, *(cache for cache in lenders[::-1] if not own or cache.spec == own[0].spec)]
        same = [cache.spec for cache in fitting if cache.provenance.get("request") == self.record]
        self._before = own[0].spec if own else next(iter(same), {})
        return same[0] if same else None

    @functools.cached_property
    def prepared(self) -> Prepared:
        """Backbone, encoder and spec. Raises BackboneError, UsageError, SourceError."""
        runtime = self._choose_runtime()
        log.info(runtime.reason)
        backbone = load_requested(self.request, self._model)
        if self._asked.record() != self.record:  # it would be taken for the file that was there before
            raise BackboneError(
                f"the weights of {self._asked.backbone} changed while they were read; run the command again"
            )
        precision = cast("Precision", self.request.precision)
        encoder, choice, sample = prepare_encoder(backbone, runtime, self.images, precision=precision)
        self._compare_with_full_scale(backbone.preprocess, encoder, sample)
        # What an earlier run settled by measuring stays settled, also if today's sample would just pass or fail.
        settled = (self._before, self._model.spec if self._model else {})
        again = self.request.precision in [spec.get("precision") for spec in settled]
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
        return Prepared(backbone, encoder, runtime, spec, provenance)

    def _compare_with_full_scale(
        self, preprocess: "PreprocessSpec", encoder: "Encoder", sample: "np.ndarray[Any, np.dtype[np.uint8]]"
    ) -> None:
        """Say what decoding at a reduced scale does to embeddings."""
        from featcache.backbones.embed import sample_pixels
        from featcache.backbones.self_check import agreement

        if preprocess.decode_at_least is None:
            return
        full = sample_pixels(self.images, dataclasses.replace(preprocess, decode="full scale"), len(sample))
        found = agreement(encoder(full), encoder(sample))
        log.log(
            logging.INFO if found.passes else logging.WARNING,
            "large JPEGs are decoded at a reduced scale: to full scale %s%s",
            found,
            "" if found.passes else ", below what passes for the same embedding; --decode full does without",
        )

    def keep_weights(self) -> None:
        """Put a copy of the weights beside the cache if no library provides them again. Raises StorageError."""
        from featcache.backbones.backbone import save_weights

        backbone = self.prepared.backbone
        copy = weights_copy(self.output, self.prepared.spec)
        if backbone.reload is None and not copy.is_file():
            save_weights(backbone, copy, staging=work_folder(self.output))

    def provenance(self, origin: FeatureCache) -> dict[str, Any]:
        """That of ``origin`` with this request, so that the next run recognises itself."""
        changes = {"request": self.record}
        if "prepared" in vars(self) and weights_source(origin)[1] is None:
            changes["weights"] = self.prepared.provenance["weights"]  # as of the copy that was kept, or not needed
        return origin.provenance | changes

    def _storage(self, features: "np.ndarray[Any, np.dtype[np.float32]]") -> str:
        from featcache.backbones.self_check import survives_rounding

        if self.request.dtype != "auto":
            return self.request.dtype
        if before := self._before.get("storage"):
            return str(before)
        fits = survives_rounding(features)
        reason = "half the size of float32, and these embeddings fit" if fits else "these embeddings do not fit float16"
        log.info("storage %s: %s", "float16" if fits else "float32", reason)
        return "float16" if fits else "float32"

    def embed(
        self,
        todo: Indices,
        known: Known,
        caches: list[FeatureCache],
        progress: Progress | None,
    ) -> dict[int, str]:
        """Embed the images ``todo`` into new parts, appended to ``caches`` and entered into ``known``.

        Returns:
            image -> reason, for those that could not be embedded.
        """
        from featcache.extraction.parts import embed_into_parts

        at = self.prepared
        itemsize = np.dtype(at.spec["storage"]).itemsize
        check_free_space(self.output.parent, (len(todo) + len(self.images)) * at.backbone.dim * itemsize)
        self.keep_weights()
        embedded = embed_into_parts(self.images.take(todo), at, work_folder(self.output), progress)
        self.embedding_seconds = embedded.seconds
        start, order = 0, todo[embedded.images]
        for part in embedded.parts:
            here = order[start : start + len(part)]
            known.set(here, len(caches), np.arange(len(part)))
            known.sizes[here], known.mtimes[here] = part.rows.sizes, part.rows.mtimes
            caches.append(part)
            start += len(part)
        return {int(todo[index]): reason for index, reason in embedded.refused.items()}


def _lacks_weights(cache: FeatureCache, output: Path) -> bool:
    return weights_source(cache)[1] is None and not weights_copy(output, cache.spec).is_file()


def _remove_old_weights(old: FeatureCache | None, spec: dict[str, Any], output: Path) -> None:
    """A replaced cache's copy of its weights has no use any more."""
    if old and old.spec["backbone"]["weights_sha256"] != spec["backbone"]["weights_sha256"]:
        weights_copy(output, old.spec).unlink(missing_ok=True)


def _list(source: str | Path | ImageList) -> ImageList:
    if not isinstance(source, ImageList):
        images = list_images(Path(source))
        name, remedy = source, f"give {Path(source) / ''.join(images.classes[:1])} itself"
    else:
        images, name = source, f"the list of images in {source.root}"
        remedy = "leave the classes out and set labels to -1"
    if not len(images) and not images.refused:
        raise SourceError(f"{name} is empty; expected at least one image")
    if len(images.classes) == 1:
        raise SourceError(
            f"{name} holds one class only ({images.classes[0]}), a classifier needs at least two; "
            f"for images without labels {remedy}"
        )
    return images


def _pack(job: _Job, plan: Plan, spec: dict[str, Any]) -> Rows:
    """Publish the final file, unless it would be what is there already. Returns its rows."""
    images, caches, known, refused = plan.images, plan.caches, plan.known, plan.refused
    order = np.flatnonzero(known.source >= 0)
    if not len(order):
        raise SourceError(all_refused(images, refused))
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
    old = next((cache for cache in caches if cache.path == job.output), None)
    if (
        old
        and old.rows.equals(rows)
        and old.classes == images.classes
        and old.refused == final
        and old.provenance.get("request") == job.record
    ):
        return rows
    write_cache(
        job.output,
        rows,
        gather([cache.take for cache in caches], known, order),
        dim=plan.origin.dim,
        spec=spec,
        classes=images.classes,
        refused=final,
        provenance=job.provenance(plan.origin),
        staging=work_folder(job.output),
    )
    return rows


def _compare(old: FeatureCache | None, rows: Rows) -> tuple[int, int, int]:
    """How many paths were added, changed and removed."""
    if old is None:
        return len(rows), 0, 0
    at = find(old.rows.paths, rows.paths)
    there = at >= 0
    changed = digest_keys(rows.digests)[there] != digest_keys(old.rows.digests)[at[there]]
    return int((~there).sum()), int(changed.sum()), int(len(old) - there.sum())
