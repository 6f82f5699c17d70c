"""Neighbours propose, pixels decide, groups are complete-link. A table of agreements stands for the pixels."""

import itertools

import numpy as np
import pytest

from featcache.curation.near_copies import find_near_copies
from featcache.curation.neighbours import Nearest, nearest_rows
from featcache.curation.pixel_check import Compared


class Table:
    """Agreements by row numbers; what is not in it disagrees, or is not known."""

    def __init__(self, agreements: dict[tuple[int, int], float], *, otherwise: float = 0.1) -> None:
        self.agreements, self.otherwise = agreements, otherwise
        self.asked: set[tuple[int, int]] = set()

    def compare(self, pairs: np.ndarray, *, thorough: bool = False, progress: object = None) -> Compared:
        self.asked |= set() if thorough else {(min(pair), max(pair)) for pair in pairs.tolist()}
        found = [self.agreements.get((min(pair), max(pair)), self.otherwise) for pair in pairs.tolist()]
        return Compared(np.array(found, float), np.zeros(len(pairs), bool))


def scene(copies: dict[int, list[int]], n: int = 60, dim: int = 32, *, far: float = 0.15) -> tuple[Nearest, np.ndarray]:
    """Random rows, some of them near others, and digests of their own."""
    rng = np.random.default_rng(0)
    X = rng.normal(0.3, 1, (n, dim)).astype(np.float32)
    for original, others in copies.items():
        X[others] = X[original] + far * rng.normal(size=(len(others), dim))
    return nearest_rows(X, np.arange(n)), rng.integers(0, 256, (n, 32)).astype(np.uint8)


def test_pixels_decide() -> None:
    nearest, digests = scene({0: [50], 1: [51]})
    found = find_near_copies(nearest, digests, check=Table({(0, 50): 0.9}))
    assert [(one.row, one.other, one.group, one.verified, one.score) for one in found.findings] == [
        (0, 50, 0, True, 0.9),
        (50, 0, 0, True, 0.9),
    ]
    assert len(np.unique(found.groups)) == 59
    assert found.groups[50] == found.groups[0] == 0
    assert found.checked == found.candidates <= 3 * 60
    assert "pixels agree to 0.90" in found.findings[0].reason


def test_without_pixels_what_stands_out_counts_and_says_so() -> None:
    nearest, digests = scene({0: [50], 1: [51]})
    for check in (None, Table({}, otherwise=np.nan)):
        found = find_near_copies(nearest, digests, check=check)
        assert {(one.row, one.other) for one in found.findings} == {(0, 50), (50, 0), (1, 51), (51, 1)}
        assert all(one.verified is None and "no pixels" in one.reason for one in found.findings)
        assert np.isnan(found.agreement)
        assert found.checked == 0


def test_the_bar_is_the_sets_own() -> None:
    """Where all pictures are much alike, as digits are, more is asked."""
    nearest, digests = scene({0: [50]})
    rng = np.random.default_rng(1)
    alike = {pair: float(rng.uniform(0.5, 0.9)) for pair in itertools.combinations(range(60), 2)} | {(0, 50): 0.95}
    found = find_near_copies(nearest, digests, check=Table(alike))
    assert found.agreement > 0.99
    assert not found.findings
    assert find_near_copies(nearest, digests, check=Table({(0, 50): 0.95})).agreement == pytest.approx(0.65)


def test_a_chain_is_no_group() -> None:
    nearest, digests = scene({0: [50, 51]})
    found = find_near_copies(nearest, digests, check=Table({(0, 50): 0.95, (0, 51): 0.9, (50, 51): 0.2}))
    assert found.groups[0] == found.groups[50] != found.groups[51]
    assert [(one.row, one.other, one.group) for one in found.findings] == [(0, 50, 0), (50, 0, 0), (51, 0, None)]


def test_groups_are_what_their_definition_says() -> None:
    """Every pair of a group agrees, and no two groups could be one."""
    rng = np.random.default_rng(3)
    nearest, digests = scene({0: list(range(50, 56)), 1: list(range(56, 60))})
    agreements = {pair: float(rng.choice([0.2, 0.8, 0.9])) for pair in itertools.combinations([0, *range(50, 56)], 2)}
    agreements |= dict.fromkeys(itertools.combinations([1, *range(56, 60)], 2), 0.99)
    table = Table(agreements)
    found = find_near_copies(nearest, digests, check=table)
    groups = [set(np.flatnonzero(found.groups == group).tolist()) for group in np.unique(found.groups)]
    agree = {pair for pair, value in agreements.items() if value >= 0.65} & table.asked
    assert {1, *range(56, 60)} in groups
    for group in groups:
        assert set(itertools.combinations(sorted(group), 2)) <= agree
    for one, other in itertools.combinations(groups, 2):
        assert not {(min(pair), max(pair)) for pair in itertools.product(one, other)} <= agree
    np.testing.assert_array_equal(np.unique(found.groups), np.arange(len(groups)))


def test_exact_copies_are_one_picture_and_no_near_copies() -> None:
    nearest, digests = scene({0: [50, 51, 52, 53, 54], 1: [55]}, far=0.01)
    digests[[50, 51, 52, 53]] = digests[0]
    digests[55] = digests[1]
    found = find_near_copies(nearest, digests, check=Table({(0, 54): 0.9}))
    assert len(set(found.groups[[0, 50, 51, 52, 53, 54]])) == 1
    assert found.groups[55] == found.groups[1]
    assert [one.row for one in found.findings] == [0, 50, 51, 52, 53, 54]
    assert {one.other for one in found.findings} == {0, 54}


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_of_next_to_nothing(n: int) -> None:
    X = np.eye(4, dtype=np.float32)[:n]
    nearest, digests = nearest_rows(X, np.arange(n)), np.arange(n * 32, dtype=np.uint8).reshape(n, 32)
    for check in (None, Table({(0, 1): 0.9})):
        found = find_near_copies(nearest, digests, check=check)
        assert len(found.groups) == n
        assert len(found.findings) in (0, 2)


def test_it_is_the_same_again() -> None:
    nearest, digests = scene({0: [50, 51], 7: [52]})
    runs = [
        find_near_copies(nearest, digests, check=Table({(0, 50): 0.9, (0, 51): 0.8, (50, 51): 0.7, (7, 52): 0.7}))
        for _ in range(2)
    ]
    assert runs[0].findings == runs[1].findings
    np.testing.assert_array_equal(runs[0].groups, runs[1].groups)
    assert [one.row for one in runs[0].findings] == [0, 7, 50, 51, 52]
