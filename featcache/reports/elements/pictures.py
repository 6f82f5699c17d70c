"""The image files that rows were made of. In: names and digests of rows, and a folder. Out: thumbnails of exactly these images.

A file counts only if its bytes have the row's digest: of one that was changed or replaced no picture is shown, and one that was
moved within the folder is found again by hashing.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from featcache.cache.cache import FeatureCache
from featcache.errors import FeatcacheError, RefusedImage
from featcache.images.home import find_home, places_in, some_of
from featcache.images.read import Paths, read_file
from featcache.images.source import list_images
from featcache.reports.elements.thumbnails import Thumbnail, fitting_size, thumbnails

log = logging.getLogger("featcache")
_AT_A_TIME = 32  # files, between two looks at the clock

MISSING = "no picture: not in the folder, or changed"
NO_FOLDER = "no picture here"
NO_TIME = "left out to be quick"


@dataclasses.dataclass
class Pictures:
    """Finds pictures. ``root``: the folder; None: there are none. ``search``: whether to hash the folder for what was moved.

    ``seconds``: for all pictures together; None: as long as it takes. ``progress``: called with pictures made and to make, each time
    that some are asked for.
    """

    root: Path | None
    search: bool = True
    seconds: float | None = None
    progress: Callable[[int, int], None] = lambda *_: None
    _by_digest: dict[bytes, str] | None = None

    def thumbnails(
        self,
        names: Sequence[str],
        digests: Sequence[bytes],
        *,
        budget: int,
        size: int | None = None,
    ) -> list[Thumbnail]:
        """One for each row, in their order; without a picture where there is none of these bytes. Arguments: ``thumbnails``.

        names: paths below the folder; empty where not known.
        """
        if self.root is None:
            return [Thumbnail(None, NO_FOLDER)] * len(names)
        size = size or fitting_size(len(names), budget)
        end = None if self.seconds is None else time.perf_counter() + self.seconds
        found = self._made(self.root, dict(enumerate(names)), size=size, budget=budget, end=end)
        result = [found.get(k, Thumbnail(None, NO_TIME)) for k in range(len(names))]
        wrong = [
            k for k, one in enumerate(result) if k in found and one.digest != digests[k] and one.reason[:4] != "left"
        ]
        moved = {k: path for k in wrong if (path := self._moved(digests[k])) is not None}
        left = budget - sum(len(one.webp or b"") for k, one in enumerate(result) if k not in wrong)
        again = self._made(self.root, moved, size=size, budget=max(left, 0), end=end) if moved else {}
        for k in wrong:
            one = again.get(k, Thumbnail(None, MISSING))
            result[k] = one if one.digest == digests[k] or not one.digest else Thumbnail(None, MISSING)
        if self.seconds is not None and end is not None:
            self.seconds = max(end - time.perf_counter(), 0.0)
        return result

    def path_of(self, digest: bytes) -> str | None:
        """Where in the folder an image of this digest lies."""
        return self._moved(digest)

    def _made(
        self, root: Path, wanted: dict[int, str], *, size: int, budget: int, end: float | None
    ) -> dict[int, Thumbnail]:
        """Thumbnails of files by the number of their row; those missing for which there was no time."""
        found: dict[int, Thumbnail] = {}
        numbers = [k for k, name in wanted.items() if name]
        found |= {k: Thumbnail(None, MISSING) for k, name in wanted.items() if not name}
        for start in range(0, len(numbers), _AT_A_TIME):
            if end is not None and time.perf_counter() > end:
                break
            some = numbers[start : start + _AT_A_TIME]
            files = Paths(root, tuple(wanted[k] for k in some))
            made = thumbnails(files, size=size, budget=max(budget, 0))
            budget -= sum(len(one.webp or b"") for one in made)
            found |= zip(some, made, strict=True)
            self.progress(start + len(some), len(numbers))
        return found

    def _moved(self, digest: bytes) -> str | None:
        if self.root is None or not self.search:
            return None
        if self._by_digest is None:
            # Half of the time is for finding, half for decoding.
            self._by_digest = _hashed(self.root, None if self.seconds is None else self.seconds / 2)
        return self._by_digest.get(digest)


def _hashed(root: Path, seconds: float | None) -> dict[bytes, str]:
    """digest -> path of every image of a folder, of copies the first; or of as many as there is time for."""
    found: dict[bytes, str] = {}
    end = None if seconds is None else time.perf_counter() + seconds
    try:
        paths = list_images(root, labelled=False).paths
    except FeatcacheError:  # no image in it
        return found
    for path in sorted(paths, key=lambda path: path.lower().startswith("train")):  # held-out images lie elsewhere
        if end is not None and time.perf_counter() > end:
            break
        try:
            found.setdefault(hashlib.sha256(read_file(root / path)[0]).digest(), path)
        except RefusedImage:
            continue
    return found


def guess_root(cache: FeatureCache, *, near: Sequence[Path] = ()) -> Path | None:
    """The folder that a cache was probably made from: of ``near``, beside it, or in the working folder; the first that holds
    its first, middle and last image, or most of these.

    Their bytes must have the recorded digest: a folder that merely looks alike is none.
    """
    images = [(cache.paths[row], cache.rows.digests[row].tobytes()) for row in some_of(len(cache))]
    found = find_home(images, [*near, *places_in(Path(), cache.path.parent)])
    log.debug("%s: its images are taken from %s", cache.path, found or "nowhere: they are not found near it")
    return found
