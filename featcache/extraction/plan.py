"""What of a list of images is embedded already, in which caches, and what is left to do.

In: an ``ImageList`` and caches: the file to be brought up to date and its parts, and others that may lend rows. Out: a
``Plan``. A cache of our own that does not fit stops the work; a lender that does not fit is passed over.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Indices
from featcache.errors import CacheError, DamagedCacheError, SpecMismatchError
from featcache.extraction.match import Known, recognise
from featcache.images.crash_guard import FATAL
from featcache.images.decode import refusals
from featcache.images.source import ImageList
from featcache.spec import spec_difference

log = logging.getLogger("featcache")


@dataclasses.dataclass
class Plan:
    """What is there and what to do.

    Attributes:
        images: N of them. caches: of one spec, lenders first. known: where in ``caches`` each image is.
        refused: image -> reason, for those that were refused before and would be again.
        todo: the images to embed.
    """

    images: ImageList
    caches: list[FeatureCache]
    known: Known
    refused: dict[int, str]
    todo: Indices

    @property
    def origin(self) -> FeatureCache:
        """Whose provenance counts: the last of the caches that give rows. At least one must."""
        return self.caches[int(self.known.source.max())]


def make_plan(
    images: ImageList,
    lenders: list[FeatureCache],
    own: list[FeatureCache],
    spec: dict[str, Any],
    limit: int | None,
) -> Plan:
    """Find the images in ``own`` and, failing these, in those ``lenders`` that were made with ``spec``.

    Args:
        images: as listed.
        lenders, own: caches; the last that has an image gives its row. All of ``own`` are of ``spec``.
        spec: what embeddings must have been made with.
        limit: plan for this many images and those that ``own`` holds; for all when None.
    """
    caches, known = _recognise_intact(images, lenders, own, spec)
    if limit is not None:
        kept = _spread(known.source >= len(caches) - len(own), limit)
        images, known = images.take(kept), known.take(kept)
    refused = _refuse_again(images, known, caches)
    return Plan(images, caches, known, refused, np.setdiff1d(known.missing, list(refused)))


def open_old(output: Path, force: bool) -> FeatureCache | None:
    """The cache to be brought up to date; None if there is none. Raises CacheError, if damaged only without ``force``."""
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


def of_spec(caches: list[FeatureCache], spec: dict[str, Any], output: Path, force: bool) -> list[FeatureCache]:
    """Those of our own caches made with ``spec``. Others raise SpecMismatchError, or with ``force`` are left aside."""
    others = [cache for cache in caches if cache.spec != spec]
    if others and not force:
        what = "" if others[0].path == output else "unfinished work for "
        raise SpecMismatchError(
            f"{what}{output} was made with another spec ({'; '.join(spec_difference(others[0].spec, spec))}); "
            "choose another -o, repeat the old options, or replace it with --force"
        )
    return [cache for cache in caches if cache.spec == spec]


def open_lenders(paths: Iterable[Path], output: Path) -> list[FeatureCache]:
    """Open the caches that may lend rows to ``output``, the one to prefer last. What cannot be read is passed over."""
    lenders = []
    for path in paths:
        try:
            cache = FeatureCache.open(path)
        except CacheError as error:
            log.info("nothing is reused from %s: %s", path, error)
            continue
        if not output.exists() or not path.samefile(output):  # its own old rows it has anyway
            lenders.append(cache)
    return lenders[::-1]


def _recognise_intact(
    images: ImageList, lenders: list[FeatureCache], own: list[FeatureCache], spec: dict[str, Any]
) -> tuple[list[FeatureCache], Known]:
    """The caches that ``Known`` counts, without lenders of another spec or with damaged features, and ``Known``."""
    for cache in lenders:
        if cache.spec != spec:
            difference = "; ".join(spec_difference(cache.spec, spec))
            log.info("nothing is reused from %s: it was made with another spec (%s)", cache.path, difference)
    lenders = [cache for cache in lenders if cache.spec == spec]
    while True:
        caches = [*lenders, *own]
        known = recognise(images, caches)
        damaged = [cache for number, cache in enumerate(lenders) if number in known.source and _is_damaged(cache)]
        if not damaged:
            return caches, known
        lenders = [cache for cache in lenders if cache not in damaged]


def _is_damaged(lender: FeatureCache) -> bool:
    """Whether its features are; every one of them is read."""
    try:
        lender.check_features()
    except (CacheError, OSError) as error:
        log.warning("nothing is reused from %s: %s", lender.path, error)
        return True
    return False


def _spread(there: npt.NDArray[np.bool_], limit: int) -> Indices:
    """``limit`` images evenly spread over the list, and all that are ``there`` (N,) already."""
    n = len(there)
    keep = there.copy()
    keep[np.arange(min(limit, n)) * n // min(limit, n)] = True
    return np.flatnonzero(keep)


def _refuse_again(images: ImageList, known: Known, caches: list[FeatureCache]) -> dict[int, str]:
    """Images refused before, and still not decodable, need no backbone to be refused again."""
    before = {path: reason for cache in caches for path, reason in cache.refused}
    again = {index: before.get(images.paths[index]) for index in known.missing.tolist()}
    fatal = {index for index, reason in again.items() if reason and reason.startswith(FATAL)}
    return refusals(images, (index for index, reason in again.items() if reason is not None), apart=fatal)
