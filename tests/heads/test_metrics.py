"""Comparing models on the same rows. What scores one model is tested with the heads."""

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binomtest

from featcache.heads.metrics import mcnemar, standard_error


def right_or_wrong(y: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N, 3) probabilities whose most probable class is y exactly where ``right``."""
    return np.eye(3)[np.where(right, y, (y + 1) % 3)]


def compare(only_first: int, only_second: int, both: int, neither: int) -> dict:
    counts = (only_first, only_second, both, neither)
    first, second = (np.repeat(row, counts) for row in ([True, False, True, False], [False, True, True, False]))
    y = np.random.default_rng(0).integers(0, 3, sum(counts))
    return mcnemar(y, right_or_wrong(y, first), right_or_wrong(y, second))


@pytest.mark.parametrize(
    ("only_first", "only_second"),
    [
        *((a, b) for a in range(7) for b in range(7)),
        (3, 40),
        (500, 431),
        (50_000, 50_000),
        (49_000, 51_000),
        (1, 99_999),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    found = compare(only_first, only_second, 5, 2)
    n = only_first + only_second
    expected = binomtest(only_first, n).pvalue if n else 1.0
    assert found["p_value"] == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert 0 <= found["p_value"] <= 1
    del found["p_value"]
    assert found == {"only_first_right": only_first, "only_second_right": only_second, "both": 5, "neither": 2}


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(0, 0, 1), (1, 0, 1), (0, 5, 2 / 32), (1, 4, 2 * (1 + 5) / 32), (2, 4, 2 * (1 + 6 + 15) / 64), (3, 3, 1)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p_value: float) -> None:
    """Twice the share of the 2^n equally likely outcomes that are as uneven, and never more than 1."""
    assert compare(only_first, only_second, 1, 1)["p_value"] == pytest.approx(p_value, rel=1e-12)


def test_mcnemar_ignores_rows_that_tell_nothing_and_is_symmetric() -> None:
    p = compare(3, 11, 0, 0)["p_value"]
    assert compare(3, 11, 4000, 70)["p_value"] == compare(11, 3, 8, 1)["p_value"] == p
    assert type(p) is float
    json.dumps(compare(3, 11, 1, 1))


def test_standard_error_is_the_spread_of_repeated_measurements() -> None:
    draws = np.random.default_rng(0).binomial(400, 0.9, 20_000) / 400
    assert standard_error(0.9, 400) == pytest.approx(draws.std(), rel=0.02)
    assert standard_error(1.0, 400) == standard_error(0.0, 400) == 0
    assert all(a > b for a, b in pairwise(standard_error(0.5, n) for n in (1, 10, 100)))
