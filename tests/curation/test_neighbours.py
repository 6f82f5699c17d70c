"""Neighbours are exact and in order, whatever memory allows and in whatever blocks. Oracle: scikit-learn's brute force."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from featcache.curation import best_so_far, neighbours
from featcache.curation.neighbours import Nearest, estimate, nearest_rows
from featcache.errors import UsageError


def draw(n: int, dim: int = 16, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 1, (n, dim)).astype(np.float16)


def on_a_device(X: np.ndarray, rows: np.ndarray, *, k: int, memory: int = 2**29) -> Nearest:
    """The path of a GPU, on PyTorch's CPU."""
    blocks = neighbours._Blocks(X, rows, memory)
    best = np.full((len(rows), min(k + neighbours._SPARE, len(rows) - 1)), best_so_far.EMPTY)
    for _ in neighbours._search_on(torch.device("cpu"), blocks, best):
        pass
    return Nearest(
        rows, *neighbours._exactly(blocks, slice(0, len(rows)), best_so_far.places_of(best), min(k, len(rows) - 1))
    )


@pytest.mark.parametrize("search", [nearest_rows, on_a_device])
@pytest.mark.parametrize("memory", [2**29, 0], ids=["kept in memory", "read in blocks"])
@pytest.mark.parametrize("n", [2, 40, 2500])
def test_neighbours_are_those_of_scikit_learn(n: int, memory: int, search: Callable[..., Nearest]) -> None:
    X, rows = draw(2 * n), np.arange(0, 2 * n, 2)
    found = search(X, rows, k=7, memory=memory)
    oracle = NearestNeighbors(n_neighbors=min(7, n - 1), metric="cosine", algorithm="brute").fit(X[rows].astype(float))
    distances, expected = oracle.kneighbors()
    differs = found.places != expected
    assert differs.mean() < 1e-3  # rows that float32 does not tell apart
    np.testing.assert_allclose(found.similarities, 1 - distances, atol=1e-6)
    np.testing.assert_array_equal(found.rows, rows)


def test_of_equal_rows_the_first_comes_first() -> None:
    X = draw(2100)
    same = np.array([3, 8, 11, 2040, 2047, 2049, 2099])  # in two blocks
    X[same] = X[3] * 2  # scaling by a power of two keeps the direction, to the bit
    found = nearest_rows(X, np.arange(2100), k=6)
    for row in same:
        np.testing.assert_array_equal(found.places[row], same[same != row])
    np.testing.assert_allclose(found.similarities[same], 1, atol=1e-6)


def test_of_very_many_equal_rows_some_are_found() -> None:
    X = np.ones((2100, 4), np.float32)
    found = nearest_rows(X, np.arange(2100), k=3)
    assert (found.places != np.arange(2100)[:, None]).all()
    np.testing.assert_array_equal(found.places[2090], [0, 1, 2])


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, -2.0], [np.float32(-0.0), 1.0]])
def test_keys_keep_order_and_value(values: list[float]) -> None:
    similar, places = np.array([*values, 0.5, -0.5, 1e-30], np.float32), np.arange(5) * 7
    keys = best_so_far.keys_of(similar, places)
    np.testing.assert_array_equal(best_so_far.similarities_of(keys), similar)
    np.testing.assert_array_equal(best_so_far.places_of(keys), places)
    np.testing.assert_array_equal(np.argsort(-keys), np.lexsort((places, -similar)))


def test_rows_of_zeros_are_like_nothing() -> None:
    X = draw(30)
    X[4] = 0
    np.testing.assert_array_equal(nearest_rows(X, np.arange(30), k=3).similarities[4], 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    X = draw(30)
    X[12, 3] = value
    with pytest.raises(UsageError, match="row 12 are not finite"):
        nearest_rows(X, np.arange(30))
    nearest_rows(X, np.arange(12))


def test_progress_ends_at_the_last_product_and_may_end_the_search() -> None:
    seen: list[tuple[int, int]] = []
    nearest_rows(draw(2500), np.arange(2500), k=2, progress=lambda done, todo: seen.append((done, todo)))
    assert seen == [(done, 6) for done in range(1, 7)]

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nearest_rows(draw(2500), np.arange(2500), k=2, progress=stop)


def test_the_estimate_grows_with_the_square() -> None:
    small, large = estimate(20_000, 64), estimate(2_000_000, 64)
    assert large[0] > 1000 * small[0] > 0
    assert large[1] < 3e9  # a million rows of any size: 0.5 GB of features, and what was found of them


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_block_meets_each_other_once_and_one_at_a_time(count: int) -> None:
    rounds = neighbours._rounds(count)
    met = sorted(pair for pairs in rounds for pair in pairs)
    assert met == [(one, other) for one in range(count) for other in range(one, count)]
    for pairs in rounds:
        busy = [block for one, other in pairs for block in {one, other}]
        assert len(busy) == len(set(busy))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="device"):
        nearest_rows(draw(30), np.arange(30), device="abacus")


def test_an_index_finds_nearly_all_and_says_how_many() -> None:
    pytest.importorskip("usearch")
    X = draw(2500, 24)
    found, exact = nearest_rows(X, np.arange(2500), k=5, exact_below=2500), nearest_rows(X, np.arange(2500), k=5)
    shared = np.mean([len(np.intersect1d(*pair)) / 5 for pair in zip(found.places, exact.places, strict=True)])
    assert found.recall == pytest.approx(shared, abs=0.01)
    assert found.recall > 0.95
    assert exact.recall == nearest_rows(X, np.arange(2499), k=5, exact_below=2500).recall == 1


def test_recall_is_the_share_of_true_neighbours() -> None:
    X = draw(300)
    blocks = neighbours._Blocks(X, np.arange(300), 2**29)
    exact = nearest_rows(X, np.arange(300), k=6)
    assert neighbours._recall(blocks, exact.similarities[:, :5]) == 1
    assert neighbours._recall(blocks, exact.similarities[:, 1:]) == pytest.approx(0.8)
    np.testing.assert_array_equal(
        best_so_far.places_of(neighbours._true(blocks, np.array([2, 9]), 1))[:, 0], exact.places[[2, 9], 0]
    )
