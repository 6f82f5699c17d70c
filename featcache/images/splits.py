"""Which images train and which are held out.

In: an ``ImageList``. Out: a copy with other splits. What is drawn depends on a seed and on the image, not on the order of the list.
"""

import dataclasses
import hashlib

import numpy as np

from featcache.errors import UsageError
from featcache.images.source import ImageList
from featcache.spec import SPLITS


def hold_out(images: ImageList, *, share: float = 0.1, seed: int = 0) -> ImageList:
    """A copy in which a part of each class's training images is val, for a source without a val split.

    Touched are labelled images of the split train, or of none if there are no splits at all: they become train or val.
    The seed and an image's own path decide, not the order of the list, and one more image moves at most one other.

    Args:
        images: as listed.
        share: part of each class to hold out, between 0 and 1; of two images or more at least one is, and one is not.
        seed: another one holds out other images.

    Raises:
        UsageError: impossible share.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to hold out must lie between 0 and 1, found {share}")
    train, val = SPLITS.index("train"), SPLITS.index("val")
    touched = (images.labels >= 0) & (images.splits == (train if images.splits.any() else 0))
    splits = images.splits.copy()
    splits[touched] = train
    for label in np.unique(images.labels[touched]):
        rows = np.flatnonzero(touched & (images.labels == label)).tolist()
        wanted = min(max(round(share * len(rows)), 1), len(rows) - 1)
        rows.sort(key=lambda row: _rank(images.paths[row], seed))
        splits[rows[:wanted]] = val
    return dataclasses.replace(images, splits=splits)


def _rank(path: str, seed: int) -> bytes:
    """A place in a random order that depends on nothing but the path and the seed."""
    return hashlib.sha256(f"{seed} {path}".encode("utf-8", "surrogateescape")).digest()
