"""``extract``: bring a cache file up to date with a folder of images, embedding only what is new.

In: a source of images and an ``ExtractRequest``. Out: ``features.h5``. The order of things: list the images, settle the
spec, match what is embedded already, embed the rest into parts, pack everything into one file, atomically.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

import numpy as np

from featcache.backbones.choice import AUTO, choose_backbone, warn_of_licence
from featcache.backbones.saved import SavedBackbone
from featcache.cache.cache import FeatureCache, weights_copy
from featcache.cache.copies import find_copies
from featcache.cache.format import Provenance, Rows, encode_names, find
from featcache.cache.write import write_cache
from featcache.errors import BackboneError, Refusal, SourceError, UsageError
from featcache.extraction.match import BLOCK, gather
from featcache.extraction.parts import Embedded, embed_into_parts, open_parts, remove_parts
from featcache.extraction.plan import Plan, make_plan, of_spec, open_donors, open_old
from featcache.extraction.request import ExtractRequest, RequestOptions, load_requested, settle_request
from featcache.extraction.settings import Settings, settings_of
from featcache.images.formats import REVISION
from featcache.images.source import AnySource, ImageList, Source, list_images
from featcache.spec import SPLITS, Spec
from featcache.system.display import Shown, bar_in_notebook, describe_images, quantity
from featcache.system.files import check_free_space, check_output
from featcache.system.path_kinds import HERE, AnyPath, as_path, check_path
from featcache.system.runtime_options import check_device, check_runtime_options
from featcache.system.workdir import locked, work_folder

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.backbones.embed import Progress
    from featcache.backbones.embedder import Embedder
    from featcache.backbones.encoder import Precision
    from featcache.system.device import Runtime

log = logging.getLogger("featcache")
_NAMED = 8  # classes at most, in the summary


@dataclasses.dataclass(frozen=True, repr=False)
class ExtractReport(Shown):
    """What ``extract`` did; ``str`` gives it as a sentence.

    Attributes:
        cache: the file. images: images found; always ``embedded + reused + refused``.
        embedded, reused, refused: computed now; taken over; without an embedding (the cache says why).
        added, changed, removed: paths, compared with the cache that was there before.
        dim: D. seconds: of the whole call. images_per_second: embedded / seconds of the embedding loop, start-up left out.
        fingerprint: of the cache's spec. classes: how many. class_names: in the order of their indices.
        splits: images with an embedding in each split that has any.
        copies: ``within``, ``across_splits``, ``across_labels``, see ``cache.copies``.
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
    classes: int
    class_names: tuple[str, ...]
    splits: dict[str, int]
    copies: dict[str, int]

    _shown = ("cache", "images", "embedded", "reused", "refused", "dim", "classes", "splits", "seconds")

    def lines(self) -> list[str]:
        """What is in the cache, and what was done for it; names as they are."""
        names = [*self.class_names[:_NAMED], *(["..."] if self.classes > _NAMED else [])]
        splits = [f"{name} {count}" for name, count in self.splits.items() if name != "none"]
        held = [
            f"{quantity(self.classes, 'class')}: {', '.join(names)}" if names else "no classes",
            ", ".join(splits) or "no splits",
        ]
        rate = f", {self.images_per_second:,.0f} images/s once started" if self.embedded else ""
        return [
            f"{self.cache}: {quantity(self.embedded + self.reused, 'embedding')} of {quantity(self.dim, 'dimension')}",
            f"  {'; '.join(held)}",
            f"  embedded {self.embedded}, reused {self.reused}, refused {self.refused}; "
            f"added {self.added}, changed {self.changed}, removed {self.removed}",
            f"  {self.seconds:.1f} s{rate}",
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def extract(
    source: AnySource | ImageList,
    output: AnyPath,
    request: ExtractRequest | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    force: bool = False,
    reuse: AnyPath | Sequence[AnyPath] = (),
    progress: "Progress | None" = None,
    **options: Unpack[RequestOptions],
) -> ExtractReport:
    """Embed the images of ``source`` into the cache file ``output``, or bring that file up to date.

    Images are matched by content: only new content is embedded, removed files are dropped, renames and new labels
    cost nothing. An interrupted run is resumed by calling it again.

    Args:
        source: folder of class folders, of splits of these, of images, or a table (see ``Source``); or a list of images,
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
        progress: called with (done, total, bottleneck) when embedding starts and after every batch; a bar in notebooks when None.
        options: the fields of ``ExtractRequest`` as keywords, instead of ``request``: ``extract("photos", "f.h5", crop=224)``.

    Raises:
        SourceError: no usable image. BackboneError, ModelError: backbone or weights. SpecMismatchError: the file was made
        with another spec. CacheError: it is damaged. StorageError: it cannot be written. UsageError: impossible values.
    """
    started = time.perf_counter()
    output, request = as_path(output), settle_request(request, options, extract) or ExtractRequest()
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    if not isinstance(source, ImageList):
        check_path(Source.of(source).path, "images", ("extract", HERE, "-o", output))
    request.check_paths()
    if not (os.path.lexists(output) or work_folder(output).is_dir()):
        request.check_named()
        check_device(device)
    check_output(output)
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, found {limit}")
    images = _list(source)
    bar = bar_in_notebook(progress, describe_images("embedding"))
    with _interruption_noted(output), locked(work_folder(output)), bar as progress:
        old = open_old(output, force=force)
        own = ([old] if old else []) + open_parts(work_folder(output))
        donors = open_donors(
            [as_path(path) for path in ([reuse] if isinstance(reuse, str | os.PathLike) else reuse)], output
        )
        saved = request.saved()
        settings = settings_of(request, saved, own, output, force=force)
        job = _Job(request, saved, settings, donors, images, output, device, workers, batch_size)
        spec = job.known if job.known and not force else job.spec
        own = of_spec(own, spec, output, force=force)
        plan = make_plan(images, donors, own, spec=spec, limit=limit)
        if len(plan.todo) and job.spec != spec:
            of_spec(own, job.spec, output, force=False)
            spec = job.spec  # only donors had the other one
            plan = make_plan(images, [], own, spec=spec, limit=limit)
        reused, seconds = len(plan.images) - len(plan.matches.missing), 0.0
        if len(plan.todo):
            done = job.embed(plan, progress)
            plan, seconds = plan.once(done), done.seconds
        elif reused and plan.origin.provenance.reload is None:
            job.keep_weights(spec)
        rows = _pack(job, plan, spec)
        if not job.is_loaded:
            warn_of_licence(spec.backbone, plan.origin.provenance.source, loaded=False)
        remove_parts(work_folder(output))
        if old and old.spec.weights_sha256 != spec.weights_sha256:  # its copy of the weights has no use any more
            weights_copy(output, old.spec).unlink(missing_ok=True)
    added, changed, removed = _compare(old, rows)
    total = len(plan.images) + len(plan.images.refused)
    copies = find_copies(rows.digests, rows.labels, rows.splits, rows.paths)
    for sentence in copies.examples:
        log.warning(sentence)
    if total > len(rows):
        log.info("why images were refused: featcache info %s", output)
    return ExtractReport(
        cache=output,
        images=total,
        embedded=len(rows) - reused,
        reused=reused,
        added=added,
        changed=changed,
        removed=removed,
        refused=total - len(rows),
        dim=plan.origin.dim,
        seconds=time.perf_counter() - started,
        images_per_second=(len(rows) - reused) / seconds if seconds else 0.0,
        fingerprint=spec.fingerprint,
        classes=len(plan.images.classes),
        class_names=plan.images.classes,
        splits={SPLITS[split]: int(n) for split, n in zip(*np.unique(rows.splits, return_counts=True), strict=True)},
        copies=copies.counts(),
    )


@contextlib.contextmanager
def _interruption_noted(output: Path) -> Iterator[None]:
    """Say, when the user interrupts what is inside, how to go on, if anything is finished."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder := work_folder(output)).is_dir():
            log.warning("finished work is kept in %s; the same once more goes on from there", folder)
        raise


@dataclasses.dataclass(frozen=True)
class _Job:
    """What an extraction needs once there is something to embed; loads the model at most once, and late.

    Attributes:
        asked: the request as it came. saved: the saved model whose backbone that asks for, if it is one.
        settings: what counts where it is silent: what an earlier run settled stays, also what it measured.
        donors: other caches. images: as listed. output: the file. device, workers, batch_size: as given.
    """

    asked: ExtractRequest
    saved: SavedBackbone | None
    settings: Settings | None
    donors: list[FeatureCache]
    images: ImageList
    output: Path
    device: str
    workers: int | None
    batch_size: int | None

    @functools.cached_property
    def request(self) -> ExtractRequest:
        """The request, with a name instead of ``auto``. Raises UsageError, DownloadError."""
        if self.settings:
            self.settings.say(self.asked)
        if self.asked.backbone != AUTO:
            return self.asked
        if self.settings:
            return dataclasses.replace(self.asked, backbone=self.settings.spec.backbone)
        self.asked.check_named()
        return dataclasses.replace(self.asked, backbone=choose_backbone(self.runtime.device.type))

    @functools.cached_property
    def written(self) -> dict[str, object]:
        """The record of the request, as files were when it was first needed."""
        return self.request.record()

    @property
    def record(self) -> dict[str, object]:
        """What to keep as provenance: as it is while nothing new is computed, or asked for."""
        if self.settings is None:
            return self.written
        old = self.settings.provenance.request
        if old is not None and not self.is_loaded and self.settings.meet(self.written):
            return dict(old)
        return self.settings.record(self.written)

    @functools.cached_property
    def known(self) -> Spec | None:
        """The spec, if the cache, or one of the others, shows that this very request makes it."""
        if self.settings and self.settings.meet(self.written):
            return self.settings.spec
        # Where a donor differs from what is here, the backbone decides, not the donor.
        fitting = [cache for cache in self.donors[::-1] if not self.settings or cache.spec == self.settings.spec]
        return next((cache.spec for cache in fitting if cache.provenance.request == self.record), None)

    @property
    def before(self) -> Spec | None:
        """What an earlier run settled: it stays, also if today's sample would just pass or fail."""
        return self.settings.spec if self.settings else self.known

    @property
    def resolved(self) -> ExtractRequest:
        """The request, ``auto`` replaced by what the cache, or the saved model, says."""
        if self.settings:
            return self.settings.resolved(self.request)
        return self.request.resolved(self.saved.spec) if self.saved else self.request

    @property
    def is_loaded(self) -> bool:
        """Whether the backbone is."""
        return "backbone" in vars(self)

    @functools.cached_property
    def runtime(self) -> "Runtime":
        """Where to compute: settled before anything large is allocated."""
        from featcache.system.device import choose_runtime  # here: it takes torch

        return choose_runtime(self.device, workers=self.workers, batch_size=self.batch_size)

    @functools.cached_property
    def backbone(self) -> "Backbone":
        """Raises BackboneError, ModelError, UsageError."""
        log.log(logging.INFO if self.device == "auto" else logging.DEBUG, self.runtime.reason)
        before = self.written
        backbone = load_requested(self.resolved, self.saved, self.settings)
        if self.request.record() != before:  # it would be taken for the file that was there before
            raise BackboneError(
                f"the weights of {self.request.backbone} changed while they were read; run the command again"
            )
        warn_of_licence(backbone.name, backbone.weights, loaded=True)
        return backbone

    @functools.cached_property
    def embedder(self) -> "Embedder":
        """Raises SourceError: no image can be decoded. UsageError: impossible precision or size. Otherwise as ``backbone``."""
        from featcache.backbones.embedder import Embedder
        from featcache.images.read import refusals

        precision = cast("Precision", self.resolved.precision)
        embedder = Embedder.prepare(self.backbone, self.images, runtime=self.runtime, precision=precision)
        if advice := embedder.choice.advice:
            log.info(advice)
        if not len(embedder.sample):
            raise SourceError(self.images.all_refused(refusals(self.images, range(len(self.images)))))
        _compare_with_full_scale(embedder, self.images)
        return embedder

    @functools.cached_property
    def spec(self) -> Spec:
        """What embeddings are now. Raises as ``embedder``."""
        asked = self.resolved.precision
        settled = [spec.precision for spec in (self.before, self.saved and self.saved.spec) if spec]
        return self.embedder.spec(storage=self._storage(), precision=asked if asked in settled else None)

    def _storage(self) -> str:
        from featcache.backbones.self_check import survives_rounding

        if self.resolved.dtype != "auto":
            return self.resolved.dtype
        if self.before:
            return self.before.storage
        fits = survives_rounding(self.embedder.encoder(self.embedder.sample))
        level = logging.DEBUG if fits else logging.INFO  # what costs twice the space is worth a word
        log.log(
            level, "these embeddings %s float16, which is half the size of float32", "fit" if fits else "do not fit"
        )
        return "float16" if fits else "float32"

    def keep_weights(self, spec: Spec) -> None:
        """Put a copy of the weights beside the cache if no library provides them again. Raises StorageError."""
        copy = weights_copy(self.output, spec)
        if not copy.is_file() and self.backbone.reload is None:  # in this order: a backbone takes long to load
            from featcache.backbones.backbone import save_weights  # and so does PyTorch

            save_weights(self.backbone, copy, staging=work_folder(self.output))

    def embed(self, plan: Plan, progress: "Progress | None") -> Embedded:
        """Embed ``plan.todo`` into new parts. Raises StorageError; CacheError: what is to be reused is damaged."""
        for number in np.unique(plan.matches.source[plan.matches.source >= 0]):  # damage is found before work starts
            plan.caches[number].check_features()
        values = (len(plan.todo) + len(plan.images)) * self.backbone.dim
        check_free_space(self.output.parent, values * np.dtype(self.spec.storage).itemsize)
        self.keep_weights(self.spec)
        return embed_into_parts(
            plan.images.take(plan.todo),
            self.embedder,
            work_folder(self.output),
            spec=self.spec,
            provenance=self._provenance(),
            progress=progress,
        )

    def _provenance(self) -> Provenance:
        embedder = self.embedder
        return Provenance(
            request=self.record,
            source=embedder.backbone.weights,
            reload=embedder.backbone.reload,
            self_check=dataclasses.asdict(embedder.choice),
            decoder=REVISION,
            rest={
                "runtime": embedder.runtime.reason,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    def provenance_of(self, origin: FeatureCache) -> Provenance:
        """That of ``origin`` with this request, so that the next run recognises itself, and of rows that are all right."""
        provenance = dataclasses.replace(origin.provenance, request=self.record, decoder=REVISION)
        if self.is_loaded and provenance.reload is None:  # as of the copy that was kept, or not needed
            backbone = self.backbone
            provenance = dataclasses.replace(provenance, source=backbone.weights, reload=backbone.reload)
        return provenance


def _compare_with_full_scale(embedder: "Embedder", images: ImageList) -> None:
    """Say what decoding at a reduced scale does to embeddings."""
    from featcache.backbones.embed import sample_pixels
    from featcache.backbones.self_check import agreement

    preprocess = embedder.backbone.preprocess
    if preprocess.decode_at_least is None:
        return
    full = sample_pixels(images, dataclasses.replace(preprocess, decode="full scale"), len(embedder.sample))
    found = agreement(embedder.encoder(full), embedder.encoder(embedder.sample))
    log.log(
        logging.INFO if found.passes else logging.WARNING,
        "large JPEGs are decoded at a reduced scale: to full scale %s%s",
        found,
        "" if found.passes else ", below what passes for the same embedding; --decode full does without",
    )


def _list(source: AnySource | ImageList) -> ImageList:
    if not isinstance(source, ImageList):
        images, name = list_images(source), str(source)
        inside = images.root / "".join(images.classes[:1])
        remedy = f"or classes inside of it, give {inside} itself" if inside.is_dir() else "leave the labels out"
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


def _pack(job: _Job, plan: Plan, spec: Spec) -> Rows:
    """Publish the final file, unless it would be what is there already. Returns its rows."""
    images, caches, matches = plan.images, plan.caches, plan.matches
    order = np.flatnonzero(matches.source >= 0)
    if not len(order):
        raise SourceError(images.all_refused(plan.refused))
    digests = np.empty((len(order), 32), np.uint8)
    for start, block in zip(
        range(0, len(order), BLOCK),
        gather([each.rows.digests.__getitem__ for each in caches], matches, order),
        strict=True,
    ):
        digests[start : start + len(block)] = block
    rows = Rows(
        paths=encode_names(images.paths[index] for index in order),
        labels=images.labels[order],
        splits=images.splits[order],
        digests=digests,
        sizes=matches.sizes[order],
        mtimes=matches.mtimes[order],
    )
    refused = tuple(sorted([*images.refused, *(Refusal(images.paths[k], why) for k, why in plan.refused.items())]))
    beside = (images.classes, refused, job.record, REVISION)
    for old in caches:
        there = (old.classes, old.refused, old.provenance.request, old.provenance.decoder)
        if old.path == job.output and there == beside and old.rows.equals(rows):
            return rows
    write_cache(
        job.output,
        rows,
        gather([cache.take for cache in caches], matches, order),
        dim=plan.origin.dim,
        spec=spec,
        classes=images.classes,
        refused=refused,
        provenance=job.provenance_of(plan.origin),
        staging=work_folder(job.output),
    )
    return rows


def _compare(old: FeatureCache | None, rows: Rows) -> tuple[int, int, int]:
    """How many paths were added, changed and removed."""
    if old is None:
        return len(rows), 0, 0
    at = find(old.rows.paths, rows.paths)
    there = at >= 0
    changed = rows.keys[there] != old.rows.keys[at[there]]
    return int((~there).sum()), int(changed.sum()), int(len(old) - there.sum())
