"""Images dealt out: no group divided, shares kept class by class and in all, whatever the order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.images.deal import deal

SHARES = st.sampled_from([{2: 0.1, 3: 0.2}, {3: 0.25}, {2: 0.05}, {2: 0.3, 3: 0.3}, {2: 0.01, 3: 0.4}])
FEW_TRAIN = st.sampled_from([{2: 0.45, 3: 0.45}, {3: 0.6}])


@st.composite
def problems(draw):
    """Labels, groups and ranks of some images: few classes of very unequal sizes; groups of one or several classes."""
    sizes = draw(st.lists(st.integers(1, draw(st.sampled_from([5, 60]))), min_size=1, max_size=6))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    n = len(labels)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = random.integers(0, draw(st.integers(1, 60)), n)
    if draw(st.booleans()):
        groups = np.random.default_rng(0).integers(0, 4, n) + 10 * labels  # of one class each
    alone = random.random(n) < draw(st.sampled_from([0, 0.5, 0.9]))
    groups[alone] = 1000 + np.flatnonzero(alone)
    return labels, groups, random.permutation(n), random


def dealt(labels, groups, ranks, shares, fixed=None):
    fixed = np.zeros(len(labels), np.uint8) if fixed is None else fixed
    return deal(labels, groups, ranks=ranks, shares=shares, fixed=fixed)


@settings(max_examples=70, deadline=None)
@given(problems(), SHARES | FEW_TRAIN)
def test_no_group_is_divided_and_every_class_trains(problem, shares) -> None:
    labels, groups, ranks, random = problem
    splits = dealt(labels, groups, ranks, shares)
    assert set(splits.tolist()) <= {1, *shares}
    for number in np.unique(groups):
        assert len(set(splits[groups == number].tolist())) == 1
    assert set(labels[splits == 1].tolist()) == set(labels.tolist())
    order = random.permutation(len(labels))  # neither the order nor what groups are called matters
    again = dealt(labels[order], groups[order] * 7 + 3, ranks[order], shares)
    np.testing.assert_array_equal(again, splits[order])


@settings(max_examples=70, deadline=None)
@given(st.lists(st.integers(4, 80), min_size=1, max_size=12), SHARES, st.integers(0, 2**32 - 1))
def test_images_that_stand_alone_are_dealt_to_one_image(sizes, shares, seed) -> None:
    """With n >= 1 / (share of train): each class's share * n is rounded up or down, and so is the total."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    n = len(labels)
    splits = dealt(labels, np.arange(n), np.random.default_rng(seed).permutation(n), shares)
    for split, share in shares.items():
        for label, size in enumerate(sizes):
            assert abs(((splits == split) & (labels == label)).sum() - share * size) < 1
        assert abs((splits == split).sum() - share * n) <= 0.5 + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 8), st.integers(0, 2**32 - 1), SHARES)
def test_totals_hold_to_one_per_cent_beside_tiny_classes(tiny, large, seed, shares) -> None:
    """Classes of one image train; the others make up for them."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(tiny), np.repeat(tiny + np.arange(large), random.integers(150, 300, large))])
    n = len(labels)
    splits = dealt(labels, np.arange(n), random.permutation(n), shares)
    assert (splits[:tiny] == 1).all()
    for split, share in shares.items():
        assert abs((splits == split).sum() - share * n) <= 0.01 * n


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, 12), SHARES)
def test_totals_hold_to_one_per_cent_with_groups_of_bounded_size(seed, classes, largest, shares) -> None:
    """Patients with images of any class: val, test and each class's part of them."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, largest + 1, 200)
    groups = np.repeat(np.arange(200), sizes)
    labels = random.integers(0, classes, len(groups))
    splits = dealt(labels, groups, random.permutation(len(groups)), shares)
    for split, share in shares.items():
        assert abs((splits == split).sum() - share * len(groups)) <= 0.01 * len(groups)
        for label in range(classes):
            of_class = labels == label
            assert abs((splits[of_class] == split).mean() - share) <= 0.02 + largest / of_class.sum()


@pytest.mark.parametrize("shares", [{2: 0.1, 3: 0.2}, {3: 0.3}])
@pytest.mark.parametrize("mixed", [False, True])
def test_totals_hold_to_one_per_cent_with_a_few_large_groups(mixed: bool, shares: dict[int, float]) -> None:
    """Groups of up to a quarter of all images, as long as many others are small."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        groups = np.repeat(np.arange(40), random.zipf(1.5, 40).clip(1, 120))
        labels = random.integers(0, 4, len(groups)) if mixed else random.integers(0, 4, 40)[groups]
        splits = dealt(labels, groups, random.permutation(len(groups)), shares)
        for split, share in shares.items():
            assert abs((splits == split).mean() - share) <= 0.01


@settings(max_examples=50, deadline=None)
@given(problems(), SHARES, st.integers(0, 2**32 - 1))
def test_what_is_settled_stays_and_its_group_follows(problem, shares, seed) -> None:
    labels, groups, ranks, _ = problem
    first = dealt(labels, groups, ranks, shares)
    known = np.random.default_rng(seed).random(len(labels)) < 0.6
    fixed = np.where(known, first, 0).astype(np.uint8)
    again = dealt(labels, groups, ranks, shares, fixed)
    np.testing.assert_array_equal(again[known], first[known])
    for number in np.unique(groups[known]):
        assert len(set(again[groups == number].tolist())) == 1


def test_one_more_image_moves_few_others() -> None:
    """Also where nobody knows what was before: ranks decide."""
    random, sizes = np.random.default_rng(0), (200, 90, 40)
    labels, ranks = np.repeat(np.arange(3), sizes), np.random.default_rng(1).permutation(10_000)[: sum(sizes)]
    before = dealt(labels, np.arange(len(labels)), ranks, {2: 0.1, 3: 0.2})
    for label in random.integers(0, 3, 20):
        new = np.append(labels, label), np.arange(len(labels) + 1), np.append(ranks, random.integers(10_000, 20_000))
        assert (dealt(*new, {2: 0.1, 3: 0.2})[:-1] != before).sum() <= 4


def test_a_class_of_one_group_trains_and_a_huge_group_is_made_up_for() -> None:
    labels = np.repeat([0, 1, 2], [1000, 1000, 40])
    groups = np.arange(len(labels))
    groups[:900] = 0
    groups[2000:] = 2000
    splits = dealt(labels, groups, np.random.default_rng(0).permutation(len(labels)), {2: 0.1, 3: 0.2})
    assert set(splits[2000:].tolist()) == {1} and len(set(splits[:900].tolist())) == 1
    assert (splits == 3).mean() == pytest.approx(0.2, abs=0.01)
    assert (splits == 2).mean() == pytest.approx(0.1, abs=0.01)


def test_rare_classes_come_first_where_sizes_are_rounded() -> None:
    labels = np.repeat(np.arange(300), 3)  # a fifth of 900 is 180: of so many classes one image each
    splits = dealt(labels, np.arange(900), np.random.default_rng(0).permutation(900), {3: 0.2})
    assert np.bincount(labels[splits == 3], minlength=300).max() == 1 and (splits == 3).sum() == 180
    labels = np.concatenate([np.repeat(np.arange(50), 2), 50 + np.repeat(np.arange(50), 9)])
    splits = dealt(labels, np.arange(550), np.random.default_rng(0).permutation(550), {3: 0.2})
    assert np.bincount(labels[splits == 3])[:50].tolist() == [1] * 50 and (splits == 3).sum() == 110
