"""The folder or archive that images probably lie in. In: some of them, by path and digest, and places to look. Out: it, or None."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from featcache.errors import RefusedImage
from featcache.images.archives import is_archive
from featcache.images.read import leads_inside, read_file

_PLACES = 200  # folders in which they are looked for
_ARCHIVES, _MOST_GZIP = 20, 2**28  # archives; bytes of one that has to be unpacked to its end to be looked through


def find_home(images: Sequence[tuple[str, bytes]], places: Sequence[Path], *, whole: bool = False) -> Path | None:
    """The first of ``places`` that holds all ``images``, or else, unless ``whole``, the one that holds the most of them.

    Their bytes must have the recorded digest: a folder that merely looks alike is none.

    Args:
        images: path below the folder, and sha256, of each; a few are enough.
    """
    images = [(name, digest) for name, digest in images if leads_inside(name)]
    best: tuple[int, Path | None] = (len(images) - 1 if whole else 0, None)
    for place in places:
        held = sum(_holds(place / name, digest) for name, digest in images)
        if held > best[0]:
            best = held, place
        if held == len(images):
            break
    return best[1]


def places_in(*tops: Path) -> list[Path]:
    """Where to look: in each of ``tops``, then in the folders directly in it, then in the archives there, which take longer."""
    return list(dict.fromkeys(place for top in tops for place in (top, *_inside(top))))


def some_of(count: int) -> list[int]:
    """The first, the middle and the last of ``count``: three that hardly lie together by chance."""
    return sorted({0, count // 2, count - 1}) if count else []


def _holds(path: Path, digest: bytes) -> bool:
    try:
        return hashlib.sha256(read_file(path)[0]).digest() == digest
    except RefusedImage:
        return False


def _inside(top: Path) -> list[Path]:
    try:
        inside = sorted(top.iterdir())
        folders = [place for place in inside if place.is_dir()][:_PLACES]
        return folders + [place for place in inside if _is_quick(place)][:_ARCHIVES]
    except OSError:
        return []


def _is_quick(place: Path) -> bool:
    """Whether it is an archive that is looked through in seconds."""
    if not is_archive(place) or not place.is_file():
        return False
    return not place.name.lower().endswith("gz") or place.stat().st_size <= _MOST_GZIP
