"""The order of a wall of pictures: similar ones are neighbours in the grid."""

import numpy as np
import pytest

from featcache.heads.head import Array, Indices
from featcache.reports.elements.wall import order_by_similarity


def grid_similarity(X: Array, order: Indices, columns: int) -> float:
    """Mean cosine similarity of pictures beside and below each other in a grid of ``columns`` filled row by row."""
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    laid = unit[order]
    beside = (laid[:-1] * laid[1:]).sum(axis=1)[np.arange(1, len(laid)) % columns != 0]
    below = (laid[:-columns] * laid[columns:]).sum(axis=1)
    return float(np.concatenate([beside, below]).mean())


def test_neighbours_in_the_grid_are_similar() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    X = random.normal(size=(20, 16))[groups] * 2 + random.normal(size=(200, 16)) + 1
    shuffled = random.permutation(200)
    X = X[shuffled]
    order = order_by_similarity(X / np.linalg.norm(X, axis=1, keepdims=True))
    assert sorted(order) == list(range(200))
    by_group = np.argsort(groups[shuffled], kind="stable")
    for columns in (6, 16, 30):
        values = [grid_similarity(X, each, columns) for each in (np.arange(200), by_group, order)]
        assert values == sorted(values)
    assert (order == order_by_similarity(X / np.linalg.norm(X, axis=1, keepdims=True))).all()


def test_similarity_of_a_grid_by_hand() -> None:
    angles = np.radians([0, 60, 90, 180])
    X = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 3
    pairs = [60, 90, 90, 120]  # 0-1, 2-3 beside each other; 0-2, 1-3 below each other
    assert grid_similarity(X, np.arange(4), 2) == pytest.approx(np.cos(np.radians(pairs)).mean())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_a_picture(count: int) -> None:
    assert list(order_by_similarity(np.ones((count, 3)))) == list(range(count))
