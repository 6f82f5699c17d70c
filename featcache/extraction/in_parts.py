"""``extract --part I/N`` and ``merge``: one cache made by several processes, on one machine or many, that know nothing of each other.

In: a source that all see alike, an output on a file system that all share. Out: each process's share as parts beside the
output (``parts.py``), under what the first of them settled (``listing.py``); from these, ``merge`` packs the cache that one
process alone would have made.

No lock is needed and no clock is compared: files appear complete, under names of their own, and only who has packed everything removes
any. So a share may be made twice, at once or later, and a process that still writes when everything is packed writes what
is not needed.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import BESIDE, FeatureCache
from featcache.cache.format import Indices, Provenance, Rows, encode_names
from featcache.cache.write import write_cache
from featcache.errors import CacheError, Refusal, SourceError, StorageError
from featcache.extraction.executors import Executor
from featcache.extraction.extract import ExtractReport, interruption_noted, pack, prepare, report_of
from featcache.extraction.job import Job
from featcache.extraction.listing import Listing
from featcache.extraction.match import Matches, find_in, gather, match
from featcache.extraction.on_devices import own_device
from featcache.extraction.parts import MAX_ROWS, check_agreement, open_parts, part_name, remove_parts
from featcache.extraction.plan import Plan, make_plan, of_spec, open_donors, open_old, spread
from featcache.extraction.request import ExtractRequest, RequestOptions, settle_request
from featcache.extraction.settings import settings_of
from featcache.extraction.shares import Share, named, owners
from featcache.images.source import AnySource, ImageList
from featcache.system.display import Shown, bar_in_notebook, describe_images, quantity
from featcache.system.files import check_output
from featcache.system.path_advice import typed
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.workdir import LISTING, is_work_folder, locked, shared, work_folder

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress

log = logging.getLogger("featcache")


@dataclasses.dataclass(frozen=True, repr=False)
class PartReport(Shown):
    """What ``extract_part`` did; ``str`` gives it as a sentence.

    Attributes:
        cache: the file that the share is for. part, parts: the share's number, and how many there are.
        images: in this share; always ``embedded + reused + refused``. embedded: now. reused: finished before, or taken over.
        refused: without an embedding; ``merge`` says why.
        dim: D. seconds: of the whole call. images_per_second: embedded / seconds of the embedding loop.
        fingerprint: of the spec.
    """

    cache: Path
    part: int
    parts: int
    images: int
    embedded: int
    reused: int
    refused: int
    dim: int
    seconds: float
    images_per_second: float
    fingerprint: str

    _shown = ("cache", "part", "parts", "images", "embedded", "reused", "refused", "seconds")

    def lines(self) -> list[str]:
        """What was done, and what is to be done once all shares are."""
        rate = f", {self.images_per_second:,.0f} images/s once started" if self.images_per_second else ""
        return [
            f"part {self.part} of {self.parts} for {self.cache}: embedded {self.embedded}, reused {self.reused}, refused "
            f"{self.refused}; {self.seconds:.1f} s{rate}",
            f"  when all are done: featcache merge {typed(self.cache)}",
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def extract_part(
    source: AnySource | ImageList,
    output: AnyPath,
    part: str,
    request: ExtractRequest | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    reuse: AnyPath | Sequence[AnyPath] = (),
    executor: Executor | None = None,
    progress: "Progress | None" = None,
    **options: Unpack[RequestOptions],
) -> PartReport:
    """Embed one share of the images of ``source`` into parts beside ``output``. ``merge`` packs them when all shares are done.

    The first share that is begun settles backbone, precision and storage for all. Shares may be made in any order, at once, again.

    Args:
        part: ``I/N``, I from 1 to N, or ``auto``: as Slurm's arrays, Kubernetes or ``torchrun`` say (``Share.parse``).
        limit: share only this many images, evenly spread over the list.
        source, output, request, device, workers, batch_size, reuse, executor, progress, options: as for ``extract``. What is taken
            over from ``reuse`` is copied.

    Raises:
        SpecMismatchError: the other parts are of another spec, list of images or number of shares. StorageError: ``output`` exists
        and lacks some of these images; another process packs, or writes alone. Otherwise as ``extract``.
    """
    started, share = time.perf_counter(), Share.parse(str(part))
    request = settle_request(request, options, extract_part) or ExtractRequest()
    device, workers = own_device(device, workers)
    output, images = prepare(
        source, output, request, device=device, workers=workers, batch_size=batch_size, limit=limit, reuse=reuse
    )
    log.info("part %s%s", share, f": {share.read}" if share.read else "")
    if limit is not None:
        images = images.take(spread(np.zeros(len(images), bool), limit))
    positions, folder = np.flatnonzero(owners(images, share.of) == share.number), work_folder(output)
    bar = bar_in_notebook(progress, describe_images("embedding"))
    with interruption_noted(output), shared(folder), bar as progress:
        donors, saved = open_donors(reuse, output), request.saved()
        own, found = open_parts(folder, tag=share.tag, shared=True), Listing.find(folder)
        there = open_old(output, force=False) if found is None else None

        def job_after(cache: FeatureCache | None) -> Job:  # that of a listing has no rows, and is false
            settings = settings_of(request, saved, own if cache is None else [cache], output, force=False)
            return Job(request, saved, settings, donors, images, output, device, workers, batch_size)

        if there is not None:
            return _done(there, job_after(there), images.take(positions), share, started)
        job = job_after(found.cache if found else None)
        if found is None:
            job.keep_weights(job.spec)
            Listing.publish(folder, images, share.of, spec=job.spec, provenance=job.provenance)
            found = Listing.find(folder)
            if found and found.cache.spec != job.spec:  # another was first, perhaps on another kind of machine
                job = job_after(found.cache)
        if found is None:
            raise StorageError(f"{folder} was removed, or packed, at this moment; run the same command again")
        found.check(images, share.of)
        spec = job.known or job.spec
        of_spec([found.cache, *own], spec, output, force=False)
        plan = make_plan(images.take(positions), donors, own, spec=spec, limit=None)
        if len(plan.todo):
            of_spec([found.cache], job.spec, output, force=False)
        done, failed = None, None
        try:
            reused = _publish_known(job, plan, own, share)
            done = job.embed(plan, executor, progress, tag=share.tag) if len(plan.todo) else None
        except StorageError as error:
            failed = error
        if not (folder / LISTING).exists() and os.path.lexists(output):
            log.info("%s was packed meanwhile, from what others made of this share", output)
            for name in done.names if done else ():
                (folder / name).unlink(missing_ok=True)
            there = FeatureCache.open(output)
            return _done(there, job_after(there), images.take(positions), share, started)
        if failed:
            raise failed
    plan = plan.once(done.parts) if done else plan
    left = len(plan.todo)
    if left:
        raise StorageError(f"{quantity(left, 'image')} of part {share} ended in no part; run the same command again")
    refused = len(plan.matches.missing)
    embedded = len(positions) - refused - reused
    return PartReport(
        cache=output,
        part=share.number,
        parts=share.of,
        images=len(positions),
        embedded=embedded,
        reused=reused,
        refused=refused,
        dim=plan.origin.dim if embedded + reused else job.backbone.dim,
        seconds=time.perf_counter() - started,
        images_per_second=embedded / done.seconds if done and done.seconds else 0.0,
        fingerprint=spec.fingerprint,
    )


def _done(there: FeatureCache, job: Job, images: ImageList, share: Share, started: float) -> PartReport:
    """The report of a share all of which the finished cache has. Raises StorageError: it has not."""
    missing = match(images, [there]).missing
    refused = {refusal.path for refusal in there.refused}
    lacking = [index for index in missing.tolist() if images.paths[index] not in refused]
    if lacking or job.known != there.spec:
        what = f"lacks {quantity(len(lacking), 'image')} of part {share}" if lacking else "may be of another spec"
        name = typed(there.path)
        raise StorageError(
            f"{name} exists, and {what}; bring it up to date with `featcache extract` without --part, or choose another -o and "
            f"add --reuse {name}"
        )
    log.info("%s has all of part %s; nothing is left to do", there.path, share)
    return PartReport(
        cache=there.path,
        part=share.number,
        parts=share.of,
        images=len(images),
        embedded=0,
        reused=len(images) - len(missing),
        refused=len(missing),
        dim=there.dim,
        seconds=time.perf_counter() - started,
        images_per_second=0.0,
        fingerprint=there.fingerprint,
    )


def _publish_known(job: Job, plan: Plan, own: list[FeatureCache], share: Share) -> int:
    """Publish what this share's parts lack and is known: rows of other caches or of copies, refusals. Returns how many rows are."""
    images, matches = plan.images, plan.matches
    known = np.flatnonzero(matches.source >= 0)
    number, row = find_in(own, encode_names(images.paths[index] for index in known))
    wanted, there = _digests(plan.caches, matches.source[known], matches.row[known]), _digests(own, number, row)
    lacking = known[(number < 0) | (wanted != there).any(axis=1)]
    before = {refusal.path for part in own for refusal in part.refused}
    refused = [Refusal(images.paths[index], why) for index, why in plan.refused.items()]
    refused = [refusal for refusal in refused if refusal.path not in before]
    blocks = [lacking[start : start + MAX_ROWS] for start in range(0, len(lacking), MAX_ROWS)]
    for block in blocks or ([lacking] if refused else []):
        _publish_copy(job, plan, block, refused, share)
        refused = []
    return len(known)


def _digests(caches: Sequence[FeatureCache], numbers: Indices, rows: Indices) -> npt.NDArray[np.uint8]:
    """(n, 32) those of some rows; zeros where the number is -1."""
    digests = np.zeros((len(numbers), 32), np.uint8)
    for number in np.unique(numbers[numbers >= 0]):
        here = numbers == number
        digests[here] = caches[number].rows.digests[rows[here]]
    return digests


def _publish_copy(job: Job, plan: Plan, block: Indices, refused: list[Refusal], share: Share) -> None:
    """Publish a part of rows that are known; ``block`` may be empty."""
    matches, caches = plan.matches, plan.caches
    rows = Rows(
        paths=encode_names(plan.images.paths[index] for index in block.tolist()),
        labels=np.full(len(block), -1, np.int32),
        splits=np.zeros(len(block), np.uint8),
        digests=_digests(caches, matches.source[block], matches.row[block]),
        sizes=matches.sizes[block],
        mtimes=matches.mtimes[block],
    )
    origin = caches[int(matches.source[block].max()) if len(block) else -1]
    write_cache(
        work_folder(job.output) / part_name(share.tag),
        rows,
        gather([cache.take for cache in caches], matches, block),
        dim=origin.dim,
        spec=origin.spec,
        refused=refused,
        provenance=origin.provenance,
    )


def merge(output: AnyPath) -> ExtractReport:
    """Pack the parts beside ``output`` into it, once those of all shares are there. The source is not needed.

    Of an image that is in several parts the first, by name, counts; they are compared. Parts are removed when the file is in place.

    Raises:
        SourceError: shares are missing, which are named; all images were refused. SpecMismatchError: parts are of different specs.
        CacheError: parts contradict each other; ``output`` or the listing is damaged; there are no parts. StorageError: parts are being
        made at this moment, as far as that can be seen; the file cannot be written.
    """
    started, output = time.perf_counter(), as_path(output)
    if is_work_folder(str(output)):
        raise CacheError(
            f"{output} is a folder of parts; name the cache that they are for: `featcache merge {typed(output.with_suffix(''))}`"
        )
    folder = work_folder(output)
    check_output(output, beside=BESIDE)
    if not folder.is_dir() or not (folder / LISTING).exists():
        return _merged_before(output, started)
    with locked(folder):
        listing = Listing.find(folder)
        if listing is None:
            return _merged_before(output, started)
        old = open_old(output, force=False)
        spec, images = listing.cache.spec, listing.images
        parts = open_parts(folder)
        of_spec([*([old] if old else []), *parts], spec, output, force=False)
        if len(missing := listing.missing(parts)):
            some = listing.shares_of(missing)[0]
            raise SourceError(
                f"{listing.describe_missing(missing)} missing in {folder}; make them with `featcache extract SOURCE -o "
                f"{typed(output)} --part {some}/{listing.of}`, or all that is missing without --part"
            )
        check_agreement(parts, contents=True)
        nowhere = np.full(len(images), -1, np.intp)
        matches = Matches(nowhere, nowhere.copy(), images.sizes, images.mtimes)  # of which the plan makes its own
        plan = Plan(images, (), matches, {}).once(parts)
        del nowhere, matches

        def provenance_of(origin: FeatureCache) -> Provenance:
            revisions = {part.provenance.decoder for part in parts if len(part)}
            record = listing.cache.provenance.request
            return dataclasses.replace(origin.provenance, request=record, decoder=min(revisions))

        record = dict(listing.cache.provenance.request or {})
        rows = pack(output, plan, spec, record=record, provenance_of=provenance_of)
        remove_parts(folder)
    return report_of(output, plan, rows, old, spec=spec, reused=0, seconds=(time.perf_counter() - started, 0.0))


def describe_parts(folder: Path) -> dict[str, Any]:
    """How far the unfinished work in ``folder`` is; plain values. Only reads, whoever writes there.

    ``parts``: how many shares; None if one process works alone, and then what it lists is not known either. ``complete``: shares;
    ``missing``: their numbers, in words. ``images``: listed. ``embedded``, ``refused``: distinct images.

    Raises:
        CacheError: the listing is damaged.
    """
    listing, parts = Listing.find(folder), open_parts(folder, shared=True)
    missing = listing.missing(parts) if listing else np.empty(0, np.intp)
    behind = listing.shares_of(missing) if listing else []
    rows = np.unique(np.concatenate([np.empty(0, "S1"), *(part.rows.paths for part in parts)]))
    refused = np.setdiff1d(encode_names(refusal.path for part in parts for refusal in part.refused), rows)
    some = listing.cache if listing else parts[0] if parts else None
    return {
        "kind": "parts",
        "path": str(folder),
        "parts": listing.of if listing else None,
        "complete": listing.of - len(behind) if listing else None,
        "missing": named(behind) if listing else None,
        "images": len(listing.images) if listing else None,
        "missing_images": len(missing) if listing else None,
        "embedded": len(rows),
        "refused": len(refused),
        "files": len(parts),
        "fingerprint": None if some is None else some.fingerprint,
        "spec": None if some is None else some.spec.to_json(),
        "provenance": None if some is None else some.provenance.to_json(),
    }


def _merged_before(output: Path, started: float) -> ExtractReport:
    """The report of a file that is complete, so that merging twice does no harm. Raises CacheError: there is none."""
    folder = work_folder(output)
    if not os.path.lexists(output):
        what = "holds no listing of parts" if folder.is_dir() else "does not exist"
        raise CacheError(
            f"nothing to merge: {folder} {what}; make parts with `featcache extract SOURCE -o {typed(output)} --part I/N`"
        )
    old = FeatureCache.open(output)
    log.info("%s is complete, and there are no parts to pack", output)
    images = ImageList(
        root=output.parent,
        paths=old.paths,
        labels=old.rows.labels,
        classes=old.classes,
        splits=old.rows.splits,
        sizes=old.rows.sizes,
        mtimes=old.rows.mtimes,
        refused=old.refused,
    )
    every = np.arange(len(old))
    matches = Matches(np.zeros(len(old), np.intp), every, old.rows.sizes, old.rows.mtimes)
    seconds = (time.perf_counter() - started, 0.0)
    plan = Plan(images, (old,), matches, {})
    return report_of(output, plan, old.rows, old, spec=old.spec, reused=len(old), seconds=seconds)
