"""Deal images out to train, val and test. In: labels, groups and ranks of N images. Out: a split each.

Groups are never divided. Each class is dealt in proportion to the shares, as near as its groups allow, and so that the totals are
right, too. The order of the images does not matter, only their ranks.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.images.groups import Indices
from featcache.spec import SPLITS

Array = npt.NDArray[np.float64]
Splits = npt.NDArray[np.uint8]
_TRAIN, _VAL, _TEST = (SPLITS.index(name) for name in ("train", "val", "test"))
_TOLERANCE = 0.005  # of all images: beyond, classes give more or less than their share to make up for others
_TRIES = 5
_TOTALS = 0.1  # what they count for where groups are dealt; all classes together: 1


def deal(
    labels: npt.NDArray[np.integer], groups: Indices, *, ranks: Indices, shares: Mapping[int, float], fixed: Splits
) -> Splits:
    """Deal N images out.

    First groups of several images, the largest first, each to where the distance from what is asked, as chi-squared over
    classes and totals, grows least, among the splits that have room for it. Then images that stand alone fill each class up. A
    class whose images form one group trains, and of every class something trains.

    Bounds. Where all images stand alone and every class has 1 / (share of train) images or more, and at least two, a class of n
    gives ``share * n``, rounded up or down, and the totals are ``share * N``, rounded: ups go first to classes that would have
    none. Where large groups, or classes of one image, leave a total more than 0.5 % of N off, images that stand alone make up
    for it as far as that, in proportion to their classes.

    Args:
        labels: (N,) from 0. groups: (N,) one number for images that stay together. ranks: (N,) all different; low ones are
            held out first. shares: position of val or test in ``SPLITS`` -> share of all images; their sum lies between 0 and 1.
        fixed: (N,) splits that are settled, 0: none. What shares a group with settled images follows the first of them.
    """
    splits = _follow(groups, fixed)
    n_labels = int(labels.max(initial=-1)) + 1
    counts = np.zeros((n_labels, len(SPLITS)))
    np.add.at(counts, (labels, splits), 1)
    n = counts.sum(1)
    asked = counts * (np.arange(len(SPLITS)) > 0)  # of splits that nothing is asked of
    for split, share in shares.items():
        asked[:, split] = share * n
    asked[:, _TRAIN] = n - asked[:, [_VAL, _TEST]].sum(1)
    target = _Target(asked, np.array([_TRAIN, *sorted(shares, reverse=True)]))
    only = np.isin(groups, groups[_is_in_one_group(labels, groups)]) & (splits == 0)
    splits[only] = _TRAIN
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    several = np.flatnonzero((splits == 0) & (sizes[group] > 1))
    if len(several):
        counts = _count(labels, splits, n_labels)
        splits[several] = _deal_groups(labels[several], group[several], ranks[several], counts, target)
    alone = np.flatnonzero(splits == 0)
    counts = _count(labels, splits, n_labels)
    splits[alone] = _fill_up(labels[alone], ranks[alone], counts, target)
    _let_all_train(splits, labels, groups, ranks=ranks, free=_follow(groups, fixed) == 0)
    return splits


class _Target(NamedTuple):
    """(C, 4) images asked for per class and split; the splits that are dealt out to."""

    asked: Array
    open: Indices


def _count(labels: npt.NDArray[np.integer], splits: Splits, n_labels: int) -> Array:
    """(C, 4) images per class and split, of those that have one."""
    counts = np.zeros((n_labels, len(SPLITS)))
    np.add.at(counts, (labels, splits), 1)
    counts[:, 0] = 0
    return counts


def _follow(groups: Indices, fixed: Splits) -> Splits:
    """``fixed``, and for the others the split of their group's first settled image, 0: none."""
    settled = np.flatnonzero(fixed)
    found, first = np.unique(groups[settled], return_index=True)
    splits = fixed.copy()
    if len(found):
        place = np.minimum(np.searchsorted(found, groups), len(found) - 1)
        follows = (fixed == 0) & (found[place] == groups)
        splits[follows] = fixed[settled][first][place][follows]
    return splits


def _is_in_one_group(labels: npt.NDArray[np.integer], groups: Indices) -> npt.NDArray[np.bool_]:
    """(N,) whether all images of an image's class are in its group."""
    pairs = np.unique(np.stack([labels, groups]), axis=1)
    alone: npt.NDArray[np.bool_] = (np.bincount(pairs[0]) == 1)[labels]
    return alone


def _deal_groups(
    labels: npt.NDArray[np.integer], group: Indices, ranks: Indices, counts: Array, target: _Target
) -> Splits:
    """The splits of images in groups that go as a whole; ``counts`` so far."""
    _, group, sizes = np.unique(group, return_inverse=True, return_counts=True)
    pairs, number = np.unique(np.stack([group, labels]), axis=1, return_counts=True)
    start = np.searchsorted(pairs[0], np.arange(len(sizes) + 1))
    rank = np.full(len(sizes), np.iinfo(np.intp).max)
    np.minimum.at(rank, group, ranks)
    asked = np.vstack([target.asked, target.asked.sum(0)])
    weights = 1 / (np.maximum(asked, 0) + 1)
    weights[-1] *= _TOTALS * len(target.asked)
    over = np.vstack([counts, counts.sum(0)]) - asked  # (C + 1, 4)
    spare = _TOLERANCE * target.asked.sum()
    chosen = np.zeros(len(sizes), np.intp)
    for each in np.lexsort((rank, -sizes)).tolist():
        at = slice(start[each], start[each + 1])
        rows = np.append(pairs[1, at], -1)
        much = np.append(number[at], sizes[each])[:, None]
        costs = ((2 * over[rows] + much) * much * weights[rows]).sum(0)[target.open]
        full = over[-1, target.open] + sizes[each] > spare
        chosen[each] = split = target.open[np.where(full & ~full.all(), np.inf, costs).argmin()]
        over[rows, split] += much[:, 0]
    return chosen[group].astype(np.uint8)


def _fill_up(labels: npt.NDArray[np.integer], ranks: Indices, counts: Array, target: _Target) -> Splits:
    """The splits of images that stand alone; ``counts`` so far."""
    n = np.bincount(labels, minlength=len(counts))
    room = np.maximum(n - (counts[:, _TRAIN] == 0), 0).astype(np.float64)
    held_out = [split for split in target.open.tolist() if split != _TRAIN]
    short = (target.asked - counts)[:, held_out].sum(0)
    wanted = _within(np.maximum(target.asked - counts, 0)[:, held_out], room)  # (C, S)
    spare = _TOLERANCE * target.asked.sum()
    totals = np.clip(wanted.sum(0), short - spare, short + spare)
    for _ in range(_TRIES):  # what some classes cannot give, or gave too much of
        more = totals - wanted.sum(0)
        wanted *= 1 + np.minimum(more, 0) / np.maximum(wanted.sum(0), 1e-9)
        weight = target.asked[:, held_out] * (wanted.sum(1) < room - 1e-9)[:, None]
        wanted = _within(wanted + np.maximum(more, 0) * weight / np.maximum(weight.sum(0), 1e-9), room)
    lowest = np.full(len(counts), np.iinfo(np.intp).max)
    np.minimum.at(lowest, labels, ranks)
    order = np.lexsort((ranks, labels))
    position = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    splits = np.full(len(labels), _TRAIN, np.uint8)
    taken = np.zeros(len(counts), np.intp)
    for place, split in enumerate(held_out):
        left = room.astype(np.intp) - taken
        number = _rounded(wanted[:, place], totals[place], counts[:, split], room=left, ties=lowest)
        here = (position >= taken[labels[order]]) & (position < (taken + number)[labels[order]])
        splits[order[here]] = split
        taken += number
    return splits


def _within(wanted: Array, room: Array) -> Array:
    """(C, S) ``wanted``, less of it in classes where it is more than (C,) ``room``."""
    total = wanted.sum(1)
    return wanted * np.minimum(room / np.where(total > 0, total, 1), 1)[:, None]


def _rounded(wanted: Array, total: float, before: Array, *, room: Indices, ties: Indices) -> Indices:
    """(C,) whole numbers, each ``wanted`` rounded up or down, that add up to ``total`` as near as they can.

    Up come first classes that have none ``before`` and would get none, then those that rounding down costs most.
    """
    down = np.minimum(np.floor(wanted + 1e-9).astype(np.intp), room)
    cost = wanted - down
    order = np.lexsort((ties, -np.round(cost, 9), before + down > 0))
    order = order[((cost > 1e-9) & (down < room))[order]]
    down[order[: max(round(total) - int(down.sum()), 0)]] += 1
    return down


def _let_all_train(
    splits: Splits, labels: npt.NDArray[np.integer], groups: Indices, *, ranks: Indices, free: npt.NDArray[np.bool_]
) -> None:
    """Move to train, in place, the smallest group of each class of which nothing trains, the last in rank, if one is free."""
    for label in np.setdiff1d(labels, labels[splits == _TRAIN]).tolist():
        numbers = np.unique(groups[(labels == label) & free])
        members = [np.flatnonzero(groups == number) for number in numbers]
        if members:
            splits[min(members, key=lambda rows: (len(rows), -ranks[rows].min()))] = _TRAIN
