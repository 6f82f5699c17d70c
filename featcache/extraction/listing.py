"""What several processes agree on that make parts for one output: ``listing.h5``, published by the first of them, the same for all.

It is a cache without embeddings (one column of zeros): the images as listed, the spec, and as provenance how many shares there are.
Parts themselves are ordinary (``parts.py``); which shares are done follows from what is in them.
"""

import dataclasses
import secrets
from pathlib import Path

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Indices, Provenance, Rows, encode_names, find
from featcache.cache.write import write_cache
from featcache.errors import CacheError, DamagedCacheError, NewerCacheError, SpecMismatchError
from featcache.extraction.match import find_in
from featcache.extraction.shares import listing_digest, named, owners
from featcache.images.archives import archive_in
from featcache.images.locations import TIME_STEP
from featcache.images.source import ImageList
from featcache.spec import Spec
from featcache.system.addresses import parse, shown
from featcache.system.display import quantity
from featcache.system.files import give_name
from featcache.system.path_advice import typed
from featcache.system.workdir import LISTING

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Listing:
    """What was agreed on.

    Attributes:
        cache: the file, without its rows. images: as listed. of: how many shares. digest: of the images.
    """

    cache: FeatureCache
    images: ImageList
    of: int
    digest: str

    @classmethod
    def find(cls, folder: Path) -> "Listing | None":
        """That in ``folder``; None if there is none. Raises CacheError: it is damaged, or of a newer version."""
        if not (path := folder / LISTING).exists():
            return None
        try:
            cache = FeatureCache.open(path)
        except DamagedCacheError as error:
            reason = str(error).removeprefix(f"{path} ").partition("; ")[0]
            raise CacheError(
                f"{path}, what --part runs agreed on, {reason}; `featcache extract SOURCE -o {typed(folder.with_suffix(''))}`, without "
                "--part, goes on from what they made"
            ) from error
        match cache.provenance.rest.get("parts"):
            case {"version": int(version), "of": int(of), "root": str(root), "listing": str(digest)} if of > 0:
                if version != _VERSION:
                    raise NewerCacheError(
                        f"{path} is of version {version} of parts, this featcache reads {_VERSION}; use the same one for all"
                    )
            case _:
                raise CacheError(f"{path} is a cache, expected what --part runs agreed on; remove it")
        rows = cache.rows
        images = ImageList(
            root=Path(root),
            paths=cache.paths,
            labels=rows.labels,
            classes=cache.classes,
            splits=rows.splits,
            sizes=rows.sizes,
            mtimes=rows.mtimes,
            refused=cache.refused,
        )
        nothing = Rows(**{name: column[:0].copy() for name, column in vars(rows).items()})
        return cls(
            dataclasses.replace(cache, rows=nothing), images, of, digest
        )  # what is of use of many rows are the images

    @classmethod
    def publish(cls, folder: Path, images: ImageList, of: int, *, spec: Spec, provenance: Provenance) -> None:
        """Agree on this, unless others have agreed on something: the first counts. Raises StorageError."""
        digest = listing_digest(images)
        root = shown(images.root if parse(images.root) else images.root.absolute())
        facts = {"version": _VERSION, "of": of, "root": root, "listing": digest}
        rows = Rows(
            paths=encode_names(images.paths),
            labels=images.labels,
            splits=images.splits,
            digests=np.zeros((len(images), 32), np.uint8),  # nothing is read for a list
            sizes=images.sizes,
            mtimes=images.mtimes,
        )
        own = folder / f"listing-{secrets.token_hex(8)}.h5"
        write_cache(
            own,
            rows,
            [np.zeros((len(images), 1), spec.storage)],
            dim=1,
            spec=spec,
            classes=images.classes,
            refused=images.refused,
            provenance=dataclasses.replace(provenance, rest={**provenance.rest, "parts": facts}),
        )
        give_name(own, folder / LISTING)

    def check(self, images: ImageList, of: int) -> None:
        """Raise SpecMismatchError unless ``images`` are those listed, in as many shares."""
        folder = self.cache.path.parent
        remedy = f"use the same for all parts, choose another -o, or remove {folder} to begin anew"
        if of != self.of:
            raise SpecMismatchError(f"{folder} holds parts of {self.of}, found --part of {of}; {remedy}")
        if (found := listing_digest(images)) == self.digest:
            self._check_versions(images)
            return
        counts = f"{len(images):,} images here, {len(self.images):,} when the first part was begun"
        raise SpecMismatchError(
            f"{folder} is for another list of images (digest {self.digest[:12]}, found {found[:12]}: {counts}; "
            f"{self._difference(images)}); {remedy}"
        )

    def _difference(self, images: ImageList) -> str:
        """The first thing that tells ``images`` from those listed."""
        if unopened := sorted({*images.refused} - {*self.images.refused}):
            return f"refused now: {unopened[0].path}: {unopened[0].reason}"
        listed, here = encode_names(self.images.paths), encode_names(images.paths)
        if len(new := np.flatnonzero(find(listed, here) < 0)):
            return f"new: {images.paths[new[0]]}"
        if len(gone := np.flatnonzero(find(here, listed) < 0)):
            return f"gone: {self.images.paths[gone[0]]}"
        at, before = find(here, listed), self.images
        for what, column, old in (
            ("size", images.sizes, before.sizes),
            ("split", images.splits, before.splits),
            ("class", np.array([*images.classes, ""])[images.labels], np.array([*before.classes, ""])[before.labels]),
        ):
            if (differ := column[at] != old).any():
                return f"of another {what}: {before.paths[int(differ.argmax())]}"
        return "order, names of classes or refusals differ"

    def _check_versions(self, images: ImageList) -> None:
        """Raise SpecMismatchError for an archive of another version, of whose images even the sizes need not tell it.

        Files of a folder are of the times of their copies, and count by their content alone.
        """
        apart = np.abs(images.mtimes - self.images.mtimes) >= TIME_STEP
        if not apart.any() or not (inside := archive_in(images.root / images.paths[int(apart.argmax())])):
            return
        folder = self.cache.path.parent
        output = typed(folder.with_suffix(""))
        raise SpecMismatchError(
            f"{shown(inside[0])} is of another version, or time, than when the first part in {folder} was begun; give a copy its time "
            f"(`cp -p`), let `featcache extract SOURCE -o {output}` without --part compare every image, or remove {folder} to begin anew"
        )

    def missing(self, parts: list[FeatureCache]) -> Indices:
        """Positions of images that are in none of ``parts``, neither as a row nor as a refusal."""
        number, _ = find_in(parts, encode_names(self.images.paths))
        refused = encode_names(refusal.path for part in parts for refusal in part.refused)
        left = np.flatnonzero(number < 0)
        return left[find(refused, encode_names(self.images.paths[index] for index in left)) < 0]

    def shares_of(self, positions: Indices) -> list[int]:
        """The numbers of the shares that ``positions`` are in."""
        return [int(number) for number in np.unique(owners(self.images, self.of)[positions])]

    def describe_missing(self, positions: Indices) -> str:
        """``parts 1, 4-7 of 64 (1,234 images of 10,000)``."""
        numbers = self.shares_of(positions)
        word = "part" if len(numbers) == 1 else "parts"
        return f"{word} {named(numbers)} of {self.of} ({quantity(len(positions), 'image')} of {len(self.images):,})"
