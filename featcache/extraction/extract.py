"""``extract``: bring a cache file up to date with a folder of images, embedding only what is new.

In: a source of images and an ``ExtractRequest``. Out: ``features.h5``. The order of things: list the images, settle the
spec, match what is embedded already, embed the rest into parts, pack everything into one file, atomically.
"""

import contextlib
import dataclasses
import glob
import logging
import os
import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from featcache.backbones.choice import warn_of_licence
from featcache.cache.cache import BESIDE, FeatureCache, weights_copy
from featcache.cache.copies import find_copies
from featcache.cache.format import Provenance, Rows, encode_names, find
from featcache.cache.write import write_cache
from featcache.errors import Refusal, SourceError, UsageError
from featcache.extraction.executors import Executor
from featcache.extraction.job import Job
from featcache.extraction.match import BLOCK, gather
from featcache.extraction.on_devices import ALL_GPUS
from featcache.extraction.parts import open_parts, remove_parts, tag_of
from featcache.extraction.plan import (
    Plan,
    check_donors,
    check_kept,
    check_shared,
    make_plan,
    of_spec,
    open_donors,
    open_old,
)
from featcache.extraction.request import ExtractRequest, RequestOptions, settle_request
from featcache.extraction.settings import settings_of
from featcache.images.formats import REVISION
from featcache.images.source import AnySource, ImageList, Source, list_images
from featcache.spec import SPLITS, Spec
from featcache.system.display import Shown, bar_in_notebook, describe_images, quantity
from featcache.system.files import check_output
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_device, check_runtime_options
from featcache.system.workdir import locked, work_folder

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress

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
        rate = f", {self.images_per_second:,.0f} images/s once started" if self.images_per_second else ""
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
    executor: Executor | None = None,
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
        device: auto, cpu, cuda, cuda:N, mps; cuda:all, which auto means, too, where there are several GPUs: a process for each.
        workers: threads; one per usable core when None.
        batch_size: images per forward pass; chosen for the device when None.
        limit: only this many images, evenly spread over the list; rows that the cache already has are kept.
        force: replace a cache that was made with another spec, or is damaged, or has images of a folder that cannot be read.
        reuse: other caches, never changed, whose rows are taken over if their spec is the same; the first that has an image
            counts, and those that are damaged or of another spec are passed over.
        executor: who embeds, see ``extraction.executors``; this process when None.
        progress: called with (done, total, bottleneck) when embedding starts and after every batch; a bar in notebooks when None.
        options: the fields of ``ExtractRequest`` as keywords, instead of ``request``: ``extract("photos", "f.h5", crop=224)``.

    Raises:
        SourceError: no usable image. BackboneError, ModelError: backbone or weights. SpecMismatchError: the file was made
        with another spec. CacheError: it is damaged, or what ``reuse`` names is no cache. StorageError: it cannot be
        written. UsageError: impossible values.
    """
    started = time.perf_counter()
    request = settle_request(request, options, extract) or ExtractRequest()
    output, images = prepare(
        source, output, request, device=device, workers=workers, batch_size=batch_size, limit=limit, reuse=reuse
    )
    bar = bar_in_notebook(progress, describe_images("embedding"))
    folder = work_folder(output)
    with interruption_noted(output), locked(folder), _no_weights_left(output), bar as progress:
        old, parts = open_old(output, force=force), open_parts(folder)
        own = ([old] if old else []) + parts
        if not force:
            check_kept(images, own, output)
        donors = open_donors(reuse, output)
        saved = request.saved()
        settings = settings_of(request, saved, own, output, force=force)
        job = Job(request, saved, settings, donors, images, output, device, workers, batch_size)
        spec = job.known if job.known and not force else job.spec
        own = of_spec(own, spec, output, force=force)
        plan = make_plan(images, donors, own, spec=spec, limit=limit)
        if len(plan.todo) and job.spec != spec:
            of_spec(own, job.spec, output, force=False)
            spec = job.spec  # only donors had the other one
            plan = make_plan(images, [], own, spec=spec, limit=limit)
        check_shared(plan, [part for part in parts if part in own and tag_of(part.path)])
        reused, seconds = len(plan.images) - len(plan.matches.missing), 0.0
        if len(plan.todo):
            done = job.embed(plan, executor, progress)
            plan, seconds = plan.once(done.parts), done.seconds
        elif reused and plan.origin.provenance.reload is None:
            job.keep_weights(spec)
        rows = pack(output, plan, spec, record=job.record, provenance_of=job.provenance_of)
        if not job.is_loaded:
            warn_of_licence(spec.backbone, plan.origin.provenance.source, loaded=False)
        remove_parts(folder)
        if old and old.spec.weights_sha256 != spec.weights_sha256:  # its copy of the weights has no use any more
            weights_copy(output, old.spec).unlink(missing_ok=True)
    return report_of(
        output, plan, rows, old, spec=spec, reused=reused, seconds=(time.perf_counter() - started, seconds)
    )


def prepare(
    source: AnySource | ImageList,
    output: AnyPath,
    request: ExtractRequest,
    *,
    device: str,
    workers: int | None,
    batch_size: int | None,
    limit: int | None,
    reuse: AnyPath | Sequence[AnyPath] = (),
) -> tuple[Path, ImageList]:
    """Refuse what cannot work before any work starts; then list the images. Arguments and errors are those of ``extract``."""
    output, one = as_path(output), "cuda" if device == ALL_GPUS else device
    check_runtime_options(one, workers=workers, batch_size=batch_size)
    if not isinstance(source, ImageList):
        check_path(Source.of(source).path, "images", ("extract", HERE, "-o", output))
    request.check_paths()
    if not (os.path.lexists(output) or os.path.isdir(work_folder(output))):  # noqa: PTH112 - however long the name
        request.check_named()
        check_device(device)
        if request.decode == "gpu":
            _check_gpu_decodes(one)
    check_output(output, beside=BESIDE)
    check_donors(reuse)
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, found {limit}")
    return output, _list(source)


def _check_gpu_decodes(device: str) -> None:
    """Raise UsageError or MissingDependencyError where ``device`` cannot: before a backbone is loaded."""
    from featcache.images.gpu_jpeg import nvjpeg
    from featcache.system.device import choose_device

    nvjpeg(choose_device(device)[0])


def report_of(
    output: Path,
    plan: Plan,
    rows: Rows,
    old: FeatureCache | None,
    *,
    spec: Spec,
    reused: int,
    seconds: tuple[float, float],
) -> ExtractReport:
    """What became of ``plan``; names copies. ``seconds``: of the whole, and of embedding."""
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
        seconds=seconds[0],
        images_per_second=(len(rows) - reused) / seconds[1] if seconds[1] else 0.0,
        fingerprint=spec.fingerprint,
        classes=len(plan.images.classes),
        class_names=plan.images.classes,
        splits={SPLITS[split]: int(n) for split, n in zip(*np.unique(rows.splits, return_counts=True), strict=True)},
        copies=copies.counts(),
    )


@contextlib.contextmanager
def interruption_noted(output: Path) -> Iterator[None]:
    """Say, when the user interrupts what is inside, how to go on, if anything is finished."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder := work_folder(output)).is_dir():
            log.warning("finished work is kept in %s; the same once more goes on from there", folder)
        raise


@contextlib.contextmanager
def _no_weights_left(output: Path) -> Iterator[None]:
    """Remove, when what is inside fails, the copy of weights that it put beside ``output``, unless finished work needs it."""
    pattern = f"{glob.escape(output.name)}.*.safetensors"
    before = {*output.parent.glob(pattern)}
    try:
        yield
    except BaseException:
        if not os.path.lexists(output) and not any(work_folder(output).glob("*.h5")):
            for copy in {*output.parent.glob(pattern)} - before:
                copy.unlink(missing_ok=True)
        raise


def _list(source: AnySource | ImageList) -> ImageList:
    images = source if isinstance(source, ImageList) else list_images(source)
    given = images is source
    name = f"the list of images in {images.root}" if given else str(source)
    images.check_any()
    if not len(images):
        raise SourceError(f"{name} is empty; expected at least one image")
    if len(images.classes) == 1:
        remedy = "leave the classes out and set labels to -1" if given else _without_class(images)
        raise SourceError(
            f"{name} holds one class only ({images.classes[0]}), a classifier needs at least two; "
            f"for images without labels {remedy}"
        )
    return images


def _without_class(images: ImageList) -> str:
    """How to read images of one class as images without any: by its folder, which may lie in an archive."""
    shared = f"/{posixpath.commonprefix(images.paths)}"
    above, found, _ = shared.partition(f"/{images.classes[0]}/")
    inside = images.root / above.lstrip("/") / images.classes[0] if found else images.root / images.classes[0]
    return f"or classes inside of it, give {inside} itself" if found or inside.is_dir() else "leave the labels out"


def pack(
    output: Path,
    plan: Plan,
    spec: Spec,
    *,
    record: dict[str, object],
    provenance_of: Callable[[FeatureCache], Provenance],
) -> Rows:
    """Publish the final file, unless it would be what is there already. Returns its rows.

    record: of the request. provenance_of: gives what is to be recorded, of the cache whose provenance counts.
    """
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
    beside = (images.classes, refused, record, REVISION)
    for old in caches:
        there = (old.classes, old.refused, old.provenance.request, old.provenance.decoder)
        if old.path == output and there == beside and old.rows.equals(rows):
            return rows
    write_cache(
        output,
        rows,
        gather([cache.take for cache in caches], matches, order),
        dim=plan.origin.dim,
        spec=spec,
        classes=images.classes,
        refused=refused,
        provenance=provenance_of(plan.origin),
        staging=work_folder(output),
    )
    return rows


def _compare(old: FeatureCache | None, rows: Rows) -> tuple[int, int, int]:
    """How many paths were added, changed and removed."""
    if old is None:
        return len(rows), 0, 0
    at = find(old.rows.paths, rows.paths)
    there, changed = np.flatnonzero(at >= 0), 0
    for start in range(0, len(there), BLOCK):
        block = there[start : start + BLOCK]
        changed += int((rows.digests[block] != old.rows.digests[at[block]]).any(axis=1).sum())
    return len(rows) - len(there), changed, len(old) - len(there)
