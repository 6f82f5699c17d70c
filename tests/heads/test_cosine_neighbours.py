"""Neighbours are exact and in order, whatever memory allows; unfamiliarity is a rank among the training rows' own distances.

Oracle: scikit-learn's brute force.
"""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from featcache.errors import UsageError
from featcache.heads.neighbours import Neighbours


def draw(n: int, dim: int = 16, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1, 1, (n, dim)).astype(np.float16)


@pytest.mark.parametrize("memory", [2**29, 0], ids=["kept in memory", "read in blocks"])
@pytest.mark.parametrize("n", [40, 5000])
def test_neighbours_are_those_of_scikit_learn(n: int, memory: int) -> None:
    X, queries = draw(n), draw(600, seed=1)
    rows = np.arange(0, n, 2)
    found, similarities = Neighbours(X, rows, memory=memory).nearest(queries, count=5)
    oracle = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(X[rows].astype(float))
    distances, expected = oracle.kneighbors(queries.astype(float))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-12)


def test_of_equal_rows_the_first_comes_first() -> None:
    X = draw(5000)
    same = np.array([3, 8, 11, 4090, 4095, 4097, 4999])  # in two blocks
    X[same] = X[3] * 2  # scaling by a power of two keeps the direction, to the bit
    found, similarities = Neighbours(X, np.arange(5000)).nearest(X[same], count=len(same))
    np.testing.assert_array_equal(found, np.tile(same, (len(same), 1)))
    np.testing.assert_allclose(similarities, 1, atol=1e-12)


def test_what_float32_does_not_tell_apart_is_in_order() -> None:
    """Angles of 1e-5, 2e-5, ...: cosines differ by 1e-10."""
    angles = np.random.default_rng(0).permutation(12) * 1e-5
    X = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    found, similarities = Neighbours(X, np.arange(12)).nearest(X[np.argmin(angles)][None], count=5)
    np.testing.assert_array_equal(found[0], np.argsort(angles)[:5])
    np.testing.assert_allclose(1 - similarities[0], (np.arange(5) * 1e-5) ** 2 / 2, atol=1e-14)


def test_own_distances_leave_a_row_itself_out() -> None:
    X = draw(300)
    neighbours = Neighbours(X, np.arange(300), k=4)
    oracle = NearestNeighbors(n_neighbors=4, metric="cosine", algorithm="brute").fit(X.astype(float))
    expected = oracle.kneighbors()[0].mean(axis=1)  # without itself
    np.testing.assert_allclose(neighbours.own_distances, np.sort(expected), atol=1e-12)
    places, similarities = neighbours.nearest(X, count=5)
    np.testing.assert_allclose(neighbours.distances(places, similarities, np.arange(300)), expected, atol=1e-12)
    unknown = neighbours.distances(places, similarities, np.full(300, -1))
    assert (unknown < expected).all()  # among its own neighbours


def test_unfamiliarity_is_a_rank() -> None:
    X = draw(200)
    neighbours = Neighbours(X, np.arange(200), k=3)
    own = neighbours.own_distances
    np.testing.assert_array_equal(neighbours.unfamiliarity(own), np.arange(200) / 200)
    assert neighbours.unfamiliarity(np.array([-1, own[-1] + 1, own[99] + 1e-9])).tolist() == [0, 1, 0.5]
    far = -draw(5, seed=2)
    places, similarities = neighbours.nearest(far, count=4)
    assert (neighbours.unfamiliarity(neighbours.distances(places, similarities, np.full(5, -1))) == 1).all()


def test_few_rows_and_rows_of_zeros() -> None:
    X = draw(3)
    X[1] = 0
    neighbours = Neighbours(X, np.arange(3))
    assert neighbours.k == 2
    found, similarities = neighbours.nearest(X[:2], count=3)
    assert found[0, 0] == 0 and found.shape == (2, 3)
    assert similarities[1].tolist() == [0, 0, 0] and found[1].tolist() == [0, 1, 2]
    assert neighbours.nearest(X[:0], count=3)[0].shape == (0, 3)
    with pytest.raises(UsageError, match="at least two different images"):
        Neighbours(X, np.array([1]))
