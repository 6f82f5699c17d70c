"""What is held out: a share of every class, decided by seed and paths alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from featcache.errors import UsageError
from featcache.images.source import ImageList
from featcache.images.splits import hold_out, training_images, usable


def image_list(names: dict[str, int]) -> ImageList:
    """A list of ``names``: path -> label."""
    labels, zeros = np.array(list(names.values()), np.int32), np.zeros(len(names), np.int64)
    return ImageList(Path(), tuple(names), labels, ("a", "b", "c"), zeros.astype(np.uint8), zeros, zeros)


@pytest.mark.parametrize("n_splits", [1, 3, 4])
def test_which_images_train(n_splits: int) -> None:
    random = np.random.default_rng(n_splits)
    labels, splits = random.integers(-1, 3, 60), random.integers(0, n_splits, 60).astype(np.uint8)
    own = 1 if n_splits > 1 else 0  # the split that trains
    train, left_out = training_images(labels, splits)
    assert train.tolist() == [label >= 0 and split == own for label, split in zip(labels, splits, strict=True)]
    assert left_out == sum(split <= 1 for split in splits) - train.sum()
    later = [label >= 0 and split > 1 for label, split in zip(labels, splits, strict=True)]
    assert usable(labels, splits).tolist() == (train | later).tolist()


def held(images: ImageList) -> set[str]:
    return {path for path, split in zip(images.paths, images.splits, strict=True) if split == 2}


NAMES = {
    f"{name}{number}": label for label, (name, n) in enumerate((("a", 40), ("b", 15), ("c", 2))) for number in range(n)
}


def test_held_out_images_are_a_share_of_each_class() -> None:
    images = image_list(NAMES)
    out = hold_out(images, share=0.2)
    assert np.bincount(out.labels[out.splits == 2]).tolist() == [8, 3, 1]
    assert (out.splits[out.splits != 2] == 1).all()
    assert not images.splits.any()  # the list given is left alone
    out = hold_out(images, share=0.01)
    assert np.bincount(out.labels[out.splits == 2]).tolist() == [1, 1, 1]
    out = hold_out(images, share=0.99)
    assert np.bincount(out.labels[out.splits == 1]).tolist() == [1, 1, 1]
    assert held(hold_out(image_list({"a": 0, "b": 1, "c": 1}))) < {"b", "c"}  # a class's only image trains
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(UsageError, match="share"):
            hold_out(images, share=share)


def test_what_is_held_out_depends_on_seed_and_paths_alone() -> None:
    images = image_list(NAMES)
    backwards = images.take(np.arange(len(images))[::-1])
    assert held(hold_out(images)) == held(hold_out(backwards))
    assert held(hold_out(images)) != held(hold_out(images, seed=1))
    before = held(hold_out(images, share=0.25))
    moved = [before ^ held(hold_out(image_list(NAMES | {f"new{k}": 0}), share=0.25)) - {f"new{k}"} for k in range(30)]
    assert max(len(paths) for paths in moved) == 1
    assert sum(len(paths) for paths in moved) < 15  # mostly none at all


def test_holding_out_leaves_test_and_unlabelled_images_alone() -> None:
    images = image_list(NAMES | {"no label": -1})
    out = hold_out(images)
    assert out.splits[-1] == 0
    splits = np.full(len(images), 1, np.uint8)
    splits[:10], splits[10:20] = 3, 0  # as soon as there are splits, an image outside them is not for training
    out = hold_out(dataclasses.replace(images, splits=splits), share=0.5)
    assert out.splits[:20].tolist() == splits[:20].tolist()
    assert np.bincount(out.labels[:-1][out.splits[:-1] == 2]).tolist() == [10, 8, 1]
    assert out.splits[-1] == 1
