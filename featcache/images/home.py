"""The folder that images probably lie in. In: some of them, by path and digest, and places to look. Out: the folder, or None."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from featcache.errors import RefusedImage
from featcache.images.read import leads_inside, read_file

_PLACES = 200  # folders in which they are looked for


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
    """Folders to look in: each of ``tops``, then the folders directly in it."""
    return list(dict.fromkeys(place for top in tops for place in (top, *_folders(top))))


def some_of(count: int) -> list[int]:
    """The first, the middle and the last of ``count``: three that hardly lie together by chance."""
    return sorted({0, count // 2, count - 1}) if count else []


def _holds(path: Path, digest: bytes) -> bool:
    try:
        return hashlib.sha256(read_file(path)[0]).digest() == digest
    except RefusedImage:
        return False


def _folders(top: Path) -> list[Path]:
    try:
        return [place for place in sorted(top.iterdir()) if place.is_dir()][:_PLACES]
    except OSError:
        return []
