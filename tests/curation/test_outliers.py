"""Outliers and off-topic images by their definitions; classes that are one under two names."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featcache.curation.label_errors import out_of_fold
from featcache.curation.neighbours import Nearest, nearest_rows
from featcache.curation.outliers import find_off_topic, find_outliers, off_topic_scores
from featcache.curation.overlaps import find_overlaps

DIM = 16


def classes(sizes: list[int], *, seed: int = 0, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Directions around an axis of each class, float32, and labels."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(sizes)), sizes)
    return (np.eye(DIM)[y] + spread * rng.normal(0, 1, (len(y), DIM)) / 4).astype(np.float32), y


def strangers(count: int, *, axis: int = 10) -> np.ndarray:
    """Images of another subject, all of one kind."""
    rng = np.random.default_rng(99)
    return (np.eye(DIM)[axis] + 0.3 * rng.normal(0, 1, (count, DIM)) / 4).astype(np.float32)


def test_an_image_away_from_all_others_is_an_outlier() -> None:
    X, y = classes([80, 60])
    X[7] = np.eye(DIM)[0] + 0.9 * np.eye(DIM)[12]
    findings = find_outliers(nearest_rows(X, np.arange(len(y))), y)
    assert findings[0].row == 7
    assert findings[0].kind == "outlier"
    assert len(findings) < 5
    assert all(0.5 < finding.score < 1 for finding in findings)


def test_outliers_by_definition() -> None:
    """Ten nearest neighbours; median and lower tenth of the class itself, and the middle of the upper half of all."""
    X, y = classes([40, 30], seed=3)
    X[[5, 50]] += 3 * np.eye(DIM)[[13, 14]].astype(np.float32)
    U = X / np.linalg.norm(X, axis=1, keepdims=True)
    distances = np.sort(1 - U @ U.T + 9 * np.eye(len(U)), axis=1)[:, :10].mean(axis=1)
    z = np.empty(len(y))
    for k, distance in enumerate(distances):
        own = distances[y == y[k]]
        z[k] = (distance - np.median(own)) / ((np.median(own) - np.quantile(own, 0.1)) / 1.2816)
    bar = np.median(z) + 3 * (np.quantile(z, 0.65) - np.median(z)) / 0.38532
    assert bar > 3.6
    expected = [(k, value / (value + bar)) for k, value in enumerate(z) if value > bar]
    found = {finding.row: finding.score for finding in find_outliers(nearest_rows(X, np.arange(len(y))), y)}
    assert found == pytest.approx(dict(expected), rel=1e-3)
    assert found


def test_copies_are_no_company() -> None:
    X, y = classes([60])
    far = np.eye(DIM)[11].astype(np.float32)
    X = np.concatenate([X, np.repeat(far[None], 12, axis=0)])
    y = np.concatenate([y, np.zeros(12, int)])
    nearest, groups = nearest_rows(X, np.arange(72), k=40), np.arange(72)
    groups[60:] = 60
    assert not {finding.row for finding in find_outliers(nearest, y)} & set(range(60, 72))
    assert {finding.row for finding in find_outliers(nearest, y, groups=groups)} >= set(range(60, 72))


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("labelled", [True, False])
def test_other_subjects_are_off_topic(count: int, labelled: bool) -> None:
    """Also where they are several of a kind, under labels drawn at random or none; rows are those of the cache."""
    X, y = classes([100, 80, 40])
    X, labels = (
        np.concatenate([X, strangers(count)]),
        np.concatenate([y, np.arange(count) % 3 if labelled else np.full(count, -1)]),
    )
    rows = np.arange(len(X))[::-1].copy()
    findings = find_off_topic(X, rows, labels[::-1])
    assert {finding.row for finding in findings[:count]} == set(range(220, 220 + count))
    assert len(findings) <= count + 6
    assert findings[0].kind == "off_topic"


def test_without_labels_all_are_one_class() -> None:
    X = np.concatenate([classes([150])[0], strangers(4)])
    findings = find_off_topic(X, np.arange(154), np.full(154, -1))
    assert {finding.row for finding in findings[:4]} == {150, 151, 152, 153}


def test_off_topic_by_definition() -> None:
    X, y = classes([40, 30], seed=2)
    U = X / np.linalg.norm(X.astype(np.float64), axis=1, keepdims=True)
    means = [[U[(y == k) & (np.arange(70) != row)].sum(axis=0) for k in range(2)] for row in range(70)]
    D = np.array([[1 - U[row] @ mean / np.linalg.norm(mean) for mean in of_row] for row, of_row in enumerate(means)])
    expected = np.full(70, np.inf)
    for k in range(2):
        own = D[y == k, k]
        z = (D[:, k] - np.median(own)) / ((np.median(own) - np.quantile(own, 0.1)) / 1.2816)
        expected = np.minimum(expected, z)
    np.testing.assert_allclose(off_topic_scores(X, np.arange(70), y)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("labels", [[], [0], [0, 1], [0, 1, 2, 3], [-1, -1], [0, 0, 0, 1], [-1, 0, 1]])
def test_few_images_are_no_opinion(labels: list[int]) -> None:
    y = np.array(labels, int)
    X = np.random.default_rng(0).normal(0, 1, (len(y), DIM)).astype(np.float32)
    rows = np.arange(len(y))
    assert find_off_topic(X, rows, y) == []
    if len(y) > 1:
        assert find_outliers(nearest_rows(X, rows), y) == []


def test_images_that_are_all_equal_are_not_unusual() -> None:
    X, y = np.ones((30, DIM), np.float32), np.arange(30) % 2
    assert find_off_topic(X, np.arange(30), y) == []
    assert find_outliers(nearest_rows(X, np.arange(30)), y) == []


def test_neighbours_that_are_all_copies_are_no_opinion() -> None:
    nearest = Nearest(np.arange(3), np.array([[1, 2], [0, 2], [0, 1]]), np.full((3, 2), 0.5, np.float32))
    assert find_outliers(nearest, np.zeros(3, int), groups=np.zeros(3, int)) == []


# ------------------------------------------------------------------------------------------------------- overlaps


def test_one_class_under_two_names_is_found() -> None:
    X, y = classes([80, 80, 80])
    y[:80] = np.random.default_rng(7).integers(0, 2, 80) * 3  # class 0 is also called 3
    (pair,) = find_overlaps(y, out_of_fold(X, np.arange(240), y))
    assert (pair.first, pair.second) == (0, 3)
    assert pair.score > 0.7
    assert "50% by chance" in pair.reason


def test_sizes_do_not_matter() -> None:
    """A small second name for a large class."""
    X, y = classes([200, 80])
    y[np.random.default_rng(8).choice(200, 40, replace=False)] = 2
    assert [(pair.first, pair.second) for pair in find_overlaps(y, out_of_fold(X, np.arange(280), y))] == [(0, 2)]


def test_classes_that_touch_are_two() -> None:
    X, y = classes([100, 100], spread=1.2)
    p = out_of_fold(X, np.arange(200), y)
    assert 0 < (p.argmax(axis=1) != y).mean() < 0.25
    assert find_overlaps(y, p) == []


def test_overlaps_by_definition() -> None:
    """The area under scikit-learn's curve; its standard error keeps small classes from being named."""
    rng = np.random.default_rng(4)
    y = np.repeat([0, 1], [70, 40])
    share = np.clip(rng.normal(0.5 + 0.05 * y, 0.2), 0.01, 0.99)
    p = np.column_stack([1 - share, share])
    (pair,) = find_overlaps(y, p)
    assert pair.auc == pytest.approx(roc_auc_score(y, share))
    assert pair.score == pytest.approx(min(1, 2 - 2 * pair.auc))
    assert find_overlaps(y[67:73], p[67:73]) == []
    assert find_overlaps(np.full(110, -1), p) == []
    assert find_overlaps(y, np.full((110, 2), np.nan)) == []
    assert find_overlaps(np.zeros(110, int), np.ones((110, 1))) == []
