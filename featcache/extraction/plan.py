"""What is there and what is left to do.

In: an ``ImageList`` and caches: the file to be brought up to date and its parts, and donors that may give rows. Out: a ``Plan``.
A cache of our own that does not fit stops the work; a donor that does not fit is passed over.
"""

import copy
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Indices, decode_names, encode_names, find
from featcache.errors import CacheError, DamagedCacheError, SourceError, SpecMismatchError, StorageError
from featcache.extraction.match import Matches, find_in, match
from featcache.extraction.parts import check_agreement
from featcache.images.decode import FATAL, was_misread
from featcache.images.formats import REVISION
from featcache.images.read import refusals
from featcache.images.source import ImageList
from featcache.spec import Spec
from featcache.system.addresses import shown
from featcache.system.display import quantity
from featcache.system.path_advice import missing, typed
from featcache.system.path_kinds import AnyPath, Kind, as_path, kind_of
from featcache.system.workdir import LISTING, work_folder

log = logging.getLogger("featcache")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is there and what to do.

    Attributes:
        images: N of them. caches: of one spec. matches: where in ``caches`` each image is.
        refused: image -> reason, for those that were refused before and would be again.
    """

    images: ImageList
    caches: tuple[FeatureCache, ...]
    matches: Matches
    refused: Mapping[int, str]

    @property
    def todo(self) -> Indices:
        """The images to embed."""
        return np.setdiff1d(self.matches.missing, list(self.refused))

    @property
    def origin(self) -> FeatureCache:
        """Whose provenance counts: the last of the caches that give rows. At least one must."""
        return self.caches[int(self.matches.source.max())]

    def once(self, parts: Sequence[FeatureCache]) -> "Plan":
        """The plan once ``todo`` is done: in ``parts``, as a row or refused. What is in none of them stays to do."""
        todo, matches, caches = self.todo, copy.deepcopy(self.matches), (*self.caches, *parts)
        number, row = find_in(parts, encode_names(self.images.paths[index] for index in todo))
        order = np.argsort(number, kind="stable")
        edges = np.searchsorted(number[order], np.arange(len(parts) + 1))
        for k, part in enumerate(parts):
            there = order[edges[k] : edges[k + 1]]
            here = todo[there]
            matches.source[here], matches.row[here] = len(self.caches) + k, row[there]
            matches.sizes[here], matches.mtimes[here] = part.rows.sizes[row[there]], part.rows.mtimes[row[there]]
        reasons = {refusal.path: refusal.reason for part in parts for refusal in part.refused}
        left = todo[number < 0].tolist()
        refused = {index: reasons[path] for index in left if (path := self.images.paths[index]) in reasons}
        return dataclasses.replace(self, caches=caches, matches=matches, refused={**self.refused, **refused})


def make_plan(
    images: ImageList, donors: list[FeatureCache], own: list[FeatureCache], *, spec: Spec, limit: int | None
) -> Plan:
    """Match the images to rows of ``own`` and, failing these, of those ``donors`` that were made with ``spec``.

    Args:
        images: as listed. spec: what embeddings must have been made with.
        donors, own: caches; the last that has an image gives its row. All of ``own`` are of ``spec``.
        limit: plan for this many images and those that ``own`` holds; for all when None.
    """
    caches, matches = _match_intact(images, donors, own, spec)
    matches = _without_misread(images, matches, caches)
    if limit is not None:
        kept = spread(matches.source >= len(caches) - len(own), limit)
        images, matches = images.take(kept), matches.take(kept)
    return Plan(images, tuple(caches), matches, _refuse_again(images, matches, caches, spec))


def _without_misread(images: ImageList, matches: Matches, caches: list[FeatureCache]) -> Matches:
    """As if rows were not there whose images an earlier version of the decoder may have made other pictures of."""
    revisions = [cache.provenance.decoder for cache in caches]
    older = [number for number, revision in enumerate(revisions) if revision < REVISION]
    misread = [
        image
        for image in np.flatnonzero(np.isin(matches.source, older)).tolist()
        if was_misread(images.root / images.paths[image], revision=revisions[matches.source[image]])
    ]
    if not misread:
        return matches
    log.warning(
        "decoded otherwise than by the version that embedded it, and therefore decoded again: %s%s",
        images.paths[misread[0]],
        f" and {len(misread) - 1} more" if len(misread) > 1 else "",
    )
    source = matches.source.copy()
    source[misread] = -1
    return dataclasses.replace(matches, source=source)


def open_old(output: Path, *, force: bool) -> FeatureCache | None:
    """The cache to be brought up to date; None if there is none. Raises CacheError, if damaged only without ``force``."""
    if not os.path.lexists(output):
        return None
    try:
        old = FeatureCache.open(output)
        if old.spec.stated is not None:
            if force:
                log.warning("%s holds vectors that were made elsewhere; replacing it, as --force says", output)
                return None
            raise SpecMismatchError(
                f"{output} holds vectors that were made elsewhere (stated: {old.spec.stated}), by a network that featcache does "
                "not know; choose another -o, remove it, or let `extract --force` replace it"
            )
        if force:
            old.check_features()
        return old
    except DamagedCacheError as error:
        if not force:
            raise
        log.warning("%s; replacing it, as --force says", error)
        return None


def of_spec(caches: list[FeatureCache], spec: Spec, output: Path, *, force: bool) -> list[FeatureCache]:
    """Those of our own caches made with ``spec``. Others raise SpecMismatchError, or with ``force`` are left aside."""
    others = [cache for cache in caches if cache.spec != spec]
    if others and not force:
        folder, there = work_folder(output), others[0].path == output
        remedy = "choose another -o, repeat the old options, or replace it with --force"
        if (folder / LISTING).exists():  # where --force would replace the work of many
            anew = output if there else folder
            remedy = f"use the same options for all parts, choose another -o, or remove {anew} to begin anew"
        raise SpecMismatchError(
            f"{'' if there else 'unfinished work for '}{output} was made with another spec "
            f"({others[0].spec.difference(spec)}); {remedy}"
        )
    return [cache for cache in caches if cache.spec == spec]


def check_kept(images: ImageList, own: Sequence[FeatureCache], output: Path) -> None:
    """Raise SourceError where rows of ``own`` are not listed because their folder, or archive, cannot be read at present."""
    if not images.refused:
        return
    root = images.root if images.root.is_dir() else images.root.parent  # an archive's refusal bears its own name
    refused = {root / path: reason for path, reason in images.refused}
    listed = encode_names(images.paths)
    for cache in own:
        gone = decode_names(cache.rows.paths[np.flatnonzero(find(listed, cache.rows.paths) < 0)])
        homes = Counter(home for path in gone for home in (images.root / path).parents if home in refused)
        for home, count in homes.items():
            raise SourceError(
                f"{shown(home)}: {refused[home]}; {output} has {quantity(count, 'image')} from there; nothing was changed; see that it "
                "can be read, or drop them with --force"
            )


def check_donors(given: AnyPath | Iterable[AnyPath]) -> None:
    """Raise CacheError, before any work, for what is no cache: a wrong name, most likely. Damaged ones are passed over later."""
    for path in _several(given):
        if (kind := kind_of(path)) is Kind.MISSING:
            raise CacheError(f"--reuse {missing(path, 'name a cache that `featcache extract` made', wanted='cache')}")
        if kind is not Kind.CACHE:
            raise CacheError(f"--reuse {typed(path)} is {kind.value}, expected a cache that `featcache extract` made")


def _several(given: AnyPath | Iterable[AnyPath]) -> list[Path]:
    return [as_path(path) for path in ([given] if isinstance(given, str | os.PathLike) else given)]


def open_donors(given: AnyPath | Iterable[AnyPath], output: Path) -> list[FeatureCache]:
    """Open the caches that may give rows to ``output``, the one to prefer last. What cannot be read is passed over."""
    donors = []
    for path in _several(given):
        try:
            cache = FeatureCache.open(path)
        except CacheError as error:
            log.info("nothing is reused from %s: %s", path, error)
            continue
        if not output.exists() or not path.samefile(output):  # its own old rows it has anyway
            donors.append(cache)
    return donors[::-1]


def check_shared(plan: Plan, parts: list[FeatureCache]) -> None:
    """Raise StorageError if ``plan`` would throw away most of what others made, as of another source; CacheError: it disagrees.

    ``parts``: made by several processes beside each other, on machines that may be gone.
    """
    check_agreement(parts)
    rows, used = (
        sum(map(len, parts)),
        int(np.isin(plan.matches.source, [plan.caches.index(part) for part in parts]).sum()),
    )
    if 2 * used < rows:
        folder = parts[0].path.parent
        raise StorageError(
            f"{folder} holds {rows:,} embeddings made by --part runs, and this source has only {used:,} of these images; choose "
            f"another -o, or remove {folder} if they are not needed"
        )


def _match_intact(
    images: ImageList, donors: list[FeatureCache], own: list[FeatureCache], spec: Spec
) -> tuple[list[FeatureCache], Matches]:
    """The caches that ``Matches`` counts, without donors of another spec or with damaged features, and ``Matches``."""
    for cache in donors:
        if cache.spec != spec:
            difference = cache.spec.difference(spec)
            log.info("nothing is reused from %s: it was made with another spec (%s)", cache.path, difference)
    donors = [cache for cache in donors if cache.spec == spec]
    while True:
        caches = [*donors, *own]
        matches = match(images, caches)
        damaged = [cache for number, cache in enumerate(donors) if number in matches.source and _is_damaged(cache)]
        if not damaged:
            return caches, matches
        donors = [cache for cache in donors if cache not in damaged]


def _is_damaged(donor: FeatureCache) -> bool:
    """Whether its features are; every one of them is read."""
    try:
        donor.check_features()
    except (CacheError, OSError) as error:
        log.warning("nothing is reused from %s: %s", donor.path, error)
        return True
    return False


def spread(there: npt.NDArray[np.bool_], limit: int) -> Indices:
    """``limit`` images evenly spread over the list, and all that are ``there`` (N,) already."""
    n = len(there)
    keep = there.copy()
    keep[np.arange(min(limit, n)) * n // min(limit, n)] = True
    return np.flatnonzero(keep)


def _refuse_again(images: ImageList, matches: Matches, caches: list[FeatureCache], spec: Spec) -> dict[int, str]:
    """Images refused before, and still not decodable, need no backbone to be refused again."""
    before = {refusal.path: refusal.reason for cache in caches for refusal in cache.refused}
    again = {index: before[path] for index in matches.missing.tolist() if (path := images.paths[index]) in before}
    crashed = {index for index, reason in again.items() if reason.startswith(FATAL)}
    return refusals(images, again, spec=spec.preprocess, apart=crashed)
