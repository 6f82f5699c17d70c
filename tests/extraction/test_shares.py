"""Shares: which images are whose, and what schedulers say about it."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from featcache.errors import UsageError
from featcache.extraction.shares import Share, listing_digest, named, owners
from featcache.images.source import ImageList


def listed(sizes: list[int]) -> ImageList:
    n = len(sizes)
    return ImageList(
        root=Path("p"),
        paths=tuple(f"{index:05d}.jpg" for index in range(n)),
        labels=np.full(n, -1, np.int32),
        classes=(),
        splits=np.zeros(n, np.uint8),
        sizes=np.array(sizes, np.int64),
        mtimes=np.arange(n),
    )


@pytest.mark.parametrize("of", [1, 2, 7, 64])
@pytest.mark.parametrize("n", [0, 1, 5, 1000])
def test_every_image_is_in_one_share_of_neighbours(of: int, n: int) -> None:
    """By the definition, in fractions: where the middle of an image's weight lies."""
    sizes = np.random.default_rng(n).lognormal(11, 1, n).astype(int).tolist()
    got = owners(listed(sizes), of)
    mean = max(1, sum(sizes) // max(1, n))
    weights = [size + mean for size in sizes]
    middles = [sum(weights[:index]) + Fraction(weight, 2) for index, weight in enumerate(weights)]
    assert got.tolist() == [int(middle * of / sum(weights)) + 1 for middle in middles]
    assert (np.diff(got) >= 0).all()
    if n == 1000:
        shares = np.bincount(got, weights=weights, minlength=of + 1)[1:]
        assert shares.max() - shares.min() <= 2 * max(weights)


def test_what_has_no_size_weighs_as_much_as_others() -> None:
    assert owners(listed([0] * 6), 3).tolist() == [1, 1, 2, 2, 3, 3]
    assert owners(listed([-1] * 4), 2).tolist() == [1, 1, 2, 2]


def test_the_digest_of_a_list_is_of_all_but_its_times() -> None:
    images = listed([5, 6, 7])
    same = dataclasses.replace(images, root=Path("elsewhere"), mtimes=images.mtimes + 5)
    assert listing_digest(same) == listing_digest(images)
    others = [
        dataclasses.replace(images, **change)
        for change in (
            {"paths": ("00000.jpg", "00001.jpg", "00003.jpg")},
            {"sizes": images.sizes + np.array([0, 0, 1])},
            {"labels": np.array([0, -1, -1], np.int32)},
            {"classes": ("a", "b")},
            {"splits": np.array([1, 0, 0], np.uint8)},
            {"paths": ("00000.jpg0", "0001.jpg", "00002.jpg")},
        )
    ]
    assert len({listing_digest(other) for other in [images, *others]}) == 1 + len(others)


SLURM = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.mark.parametrize(
    ("text", "environ", "share"),
    [
        ("3/64", {}, "3/64"),
        ("1/1", SLURM, "1/1"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "64", "SLURM_ARRAY_TASK_MIN": "0"}, "1/64"),
        ("auto", SLURM, "3/4"),
        ("auto/64", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "5"}, "5/64"),
        ("auto/8", {"JOB_COMPLETION_INDEX": "0"}, "1/8"),
        ("auto", {"JOB_COMPLETION_INDEX": "7", "JOB_COMPLETIONS": "8"}, "8/8"),
        ("auto", {"RANK": "3", "WORLD_SIZE": "4"}, "4/4"),
        ("auto/4", {"RANK": "0", "WORLD_SIZE": "4"}, "1/4"),
        ("auto/8", {"JOB_COMPLETION_INDEX": "2", "RANK": "0", "WORLD_SIZE": "1"}, "3/8"),
    ],
)
def test_the_share_that_is_meant(text: str, environ: dict[str, str], share: str) -> None:
    found = Share.parse(text, environ)
    assert str(found) == share
    assert bool(found.read) == text.startswith("auto")


@pytest.mark.parametrize(
    ("text", "environ", "words"),
    [
        ("0/4", {}, "from 1 to N"),
        ("5/4", {}, "--part 5/4"),
        ("1/1000000", {}, "at most 100,000"),
        ("4", {}, "must be I/N"),
        ("-1/4", {}, "must be I/N"),
        ("auto", {}, "none of SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX, WORLD_SIZE is set"),
        (
            "auto",
            {"RANK": "0", "WORLD_SIZE": "1"},
            "RANK is 0 and WORLD_SIZE is 1 (torchrun sets both), one process alone",
        ),
        ("auto", {"WORLD_SIZE": "1"}, "RANK is not set and WORLD_SIZE is 1"),
        ("auto", {"WORLD_SIZE": "4"}, "RANK is not set and WORLD_SIZE is 4"),
        (
            "auto",
            {"RANK": "0"},
            "WORLD_SIZE is not set (torchrun sets both), and SLURM_ARRAY_TASK_ID and JOB_COMPLETION_INDEX",
        ),
        ("auto", SLURM | {"RANK": "0", "WORLD_SIZE": "2"}, "both SLURM_ARRAY_TASK_ID and WORLD_SIZE are set"),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_ID": "4"}, "has gaps"),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_MAX": "19"}, "has gaps"),
        ("auto/64", {"SLURM_ARRAY_TASK_ID": "0"}, "from 1 to N"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS is not set"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "--part 3/2 (JOB_COMPLETION_INDEX=2"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "RANK is x"),
        ("auto/3", {"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2"),
    ],
)
def test_shares_that_there_are_not(text: str, environ: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as error:
        Share.parse(text, environ)
    assert words in str(error.value)
    assert "/N" in str(error.value)


def test_numbers_in_words() -> None:
    assert named([1, 4, 5, 6, 7, 9]) == "1, 4-7, 9"
    assert named([]) == ""
