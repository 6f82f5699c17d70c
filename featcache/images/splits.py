"""Which images train and which are held out. In: labels and splits, or an ``ImageList``. Out: a mask, or a list with other splits.

What is drawn depends on a seed and on the image, not on the order of the list.
"""

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError
from featcache.images.deal import Splits, deal
from featcache.images.groups import group_by_name, joined
from featcache.images.read import read_images
from featcache.images.source import ImageList
from featcache.spec import SPLITS

_Mask = npt.NDArray[np.bool_]
_TRAIN, _VAL = SPLITS.index("train"), SPLITS.index("val")


def usable(labels: npt.NDArray[np.integer], splits: npt.NDArray[np.integer]) -> _Mask:
    """(N,) which images have a label (N,), and a split (N,) if any image has one."""
    return (labels >= 0) & ((splits > 0) | (not splits.any()))


def training_images(labels: npt.NDArray[np.integer], splits: npt.NDArray[np.integer]) -> tuple[_Mask, int]:
    """Which images train: the labelled ones of the split train, or all labelled ones if there are no splits.

    Of class indices (N,), -1: none, and positions in ``SPLITS`` (N,), 0: none. Returns a mask (N,), and how many images
    without a label or outside the splits are left out; val and test do not count.
    """
    wanted, elsewhere = usable(labels, splits), splits > _TRAIN
    return wanted & ~elsewhere, int((~wanted & ~elsewhere).sum())


def hold_out(images: ImageList, *, share: float = 0.1, seed: int = 0) -> ImageList:
    """A copy in which a part of each class's training images is val, for a source without a val split.

    Touched are labelled images of the split train, or of none if there are no splits at all: they become train or val.
    The seed and an image's own path decide, not the order of the list, and one more image moves at most one other. Raises
    UsageError for an impossible share. Copies of an image lie on one side, that of the class it is first found in; so do the
    images of each of ``images.groups``, in which case ``deal`` decides.

    Args:
        share: part of each class to hold out, between 0 and 1; of two images (or groups) or more at least one is, and one is not.
        seed: another one holds out other images.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to hold out must lie between 0 and 1, found {share}")
    touched, _ = training_images(images.labels, images.splits)
    splits = images.splits.copy()
    splits[touched] = _TRAIN
    rows = sorted(np.flatnonzero(touched).tolist(), key=lambda row: rank(images.paths[row], seed))
    copies = _copies(images, rows)
    if any(images.groups):
        splits[rows] = _deal_groups(images, rows, copies, share=share)
        return dataclasses.replace(images, splits=splits)
    for label in np.unique(images.labels[touched]):
        groups = [group for group in copies if images.labels[group[0]] == label]
        n, held_out = sum(map(len, groups)), 0
        for group in groups[:-1]:
            if held_out < min(max(round(share * n), 1), n - 1):
                splits[group] = _VAL
                held_out += len(group)
    return dataclasses.replace(images, splits=splits)


def _deal_groups(images: ImageList, rows: list[int], copies: list[list[int]], *, share: float) -> Splits:
    """(n,) train or val for each of ``rows``, which are in order of rank, so that neither copies nor groups are divided."""
    place = {row: position for position, row in enumerate(rows)}
    pairs = [(place[group[0]], place[row]) for group in copies for row in group[1:]]
    named = group_by_name([images.groups[row] for row in rows])
    together = joined(named, pairs=np.array(pairs, np.intp).reshape(-1, 2))
    labels, ranks, fixed = images.labels[rows], np.arange(len(rows)), np.zeros(len(rows), np.uint8)
    splits = deal(labels, together, ranks=ranks, shares={_VAL: share}, fixed=fixed)
    for label in np.setdiff1d(labels, labels[splits == _VAL]).tolist():  # its groups are so large that none went there
        members = [np.flatnonzero(together == number) for number in np.unique(together[labels == label])]
        trains = np.bincount(labels[splits == _TRAIN], minlength=labels.max() + 1)
        left = [trains - np.bincount(labels[few], minlength=len(trains)) for few in members]
        spare = [few for few, others in zip(members, left, strict=True) if others.all(where=trains > 0)]
        if spare:
            splits[min(spare, key=len)] = _VAL
    return splits


def _copies(images: ImageList, rows: list[int]) -> list[list[int]]:
    """``rows`` in their order, those of equal content together."""
    digests = digests_of_suspects(images, rows)
    groups: dict[bytes | int, list[int]] = {}
    for row in rows:
        groups.setdefault(digests.get(row, row), []).append(row)
    return list(groups.values())


def digests_of_suspects(images: ImageList, rows: list[int], *, workers: int = 8) -> dict[int, bytes]:
    """row -> sha256 of those of ``rows`` that may have copies: only files that share their size with others are read."""
    sizes, counts = np.unique(images.sizes[rows], return_counts=True)
    suspects = np.array(rows, np.intp)[np.isin(images.sizes[rows], sizes[counts > 1])]
    reads = read_images(images, suspects.tolist(), len, workers=workers)
    return {read.position: read.digest for read in reads if read.digest}


def rank(path: str, seed: int) -> bytes:
    """A place in a random order that depends on nothing but the path and the seed."""
    return hashlib.sha256(f"{seed} {path}".encode("utf-8", "surrogateescape")).digest()
