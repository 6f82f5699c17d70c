"""Confident learning against its definition, and against cleanlab where that is installed."""

import numpy as np
import pytest

from featcache.heads.confident import Votes, _blocks, confident_joint, count_wrong_labels, doubts, wrong_labels


def noisy(
    seed: int = 0, n: int = 600, n_classes: int = 4, share: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of which some are wrong, probabilities that mostly know better, and which are wrong."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, n_classes, n)
    logits = rng.normal(0, 1, (n, n_classes)) + 3 * (np.arange(n_classes) == true[:, None])
    p = np.exp(logits)
    wrong = rng.random(n) < share
    y = np.where(wrong, (true + rng.integers(1, n_classes, n)) % n_classes, true)
    return y, p / p.sum(axis=1, keepdims=True), wrong


def test_confident_joint_by_definition() -> None:
    y, p, _ = noisy()
    thresholds = [np.mean([row[k] for row, label in zip(p, y, strict=True) if label == k]) for k in range(4)]
    expected = np.zeros((4, 4), int)
    for row, label in zip(p, y, strict=True):
        sure = [k for k in range(4) if row[k] >= thresholds[k]]
        if sure:
            expected[label, max(sure, key=lambda k: row[k])] += 1
    np.testing.assert_array_equal(confident_joint(y, p), expected)


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_confident_joint_is_cleanlabs(n_classes: int, share: float) -> None:
    """Where the most probable class is confident, if any is: otherwise cleanlab takes the former, the paper the latter."""
    count = pytest.importorskip("cleanlab.count")
    y, p, _ = noisy(n_classes, n_classes=n_classes, share=share)
    ours, theirs = confident_joint(y, p), count.compute_confident_joint(y, p, calibrate=False)
    thresholds = count.get_confident_thresholds(y, p)
    sure = p >= thresholds - 1e-6
    differ = sure.any(axis=1) & ~sure[np.arange(len(y)), p.argmax(axis=1)]
    assert np.abs(ours - theirs).sum() <= 2 * differ.sum()
    assert differ.sum() < 0.01 * len(y)
    if not differ.any():
        np.testing.assert_array_equal(ours, theirs)
        scaled = count.compute_confident_joint(y, p)  # to the number of rows of each class, rounded by row
        assert abs(count_wrong_labels(y, p) - (scaled.sum() - np.trace(scaled))) <= n_classes


def test_ranking_of_two_classes_is_cleanlabs() -> None:
    """There margin and self-confidence are one; of more classes the logit margin is another order."""
    filters = pytest.importorskip("cleanlab.filter")
    y, p, _ = noisy(1, n_classes=2)
    theirs = filters.find_label_issues(y, p, return_indices_ranked_by="self_confidence", n_jobs=1)
    ours = wrong_labels(y, p)
    assert len(np.intersect1d(ours, theirs)) > 0.9 * max(len(ours), len(theirs)) > 20  # it counts by pair of classes
    np.testing.assert_array_equal(ours[np.isin(ours, theirs)], theirs[np.isin(theirs, ours)])


def test_doubts_by_definition() -> None:
    y, p, _ = noisy(2)
    doubt, other = doubts(y, p)
    for row, label, found, best in zip(p, y, doubt, other, strict=True):
        rest = np.delete(row, label)
        assert row[best] == rest.max()
        np.testing.assert_allclose(found, (rest.max() + 1e-4) / (rest.max() + row[label] + 2e-4))


def test_neighbours_have_a_quarter_of_the_say() -> None:
    p = np.array([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4]])
    votes = Votes(np.array([[1, 1], [1, 0], [0, 0]]), np.array([[0.5, 0.5], [0.7, 0.3], [0.0, 0.0]]))
    doubt, other = doubts(np.zeros(3, int), p, votes)
    q = np.array([0.75 * 0.4 + 0.25, 0.75 * 0.4 + 0.25 * 0.7, 0.4])
    np.testing.assert_allclose(doubt, (q + 1e-4) / (1 + 2e-4))
    assert other.tolist() == [1, 1, 1]


def test_planted_errors_come_first() -> None:
    y, p, wrong = noisy(3, n=2000)
    found = wrong_labels(y, p)
    assert wrong[found].mean() > 0.9
    assert 0.8 * wrong.sum() < len(found) < 1.2 * wrong.sum()
    assert wrong[found[:50]].mean() == 1


def test_labels_without_errors_are_not_doubted() -> None:
    y = np.arange(100) % 3
    p = np.full((100, 3), 0.05)
    p[np.arange(100), y] = 0.9
    assert count_wrong_labels(y, p) == 0
    assert len(wrong_labels(y, p)) == 0


def test_rows_without_opinion_or_label_are_left_out() -> None:
    y, p, _ = noisy(4)
    more_y, more_p = np.concatenate([[-1, 2, 1], y]), np.concatenate([np.full((2, 4), np.nan), p[:1], p])
    more_p[0], more_y[2] = 0.25, -1
    np.testing.assert_array_equal(confident_joint(more_y, more_p), confident_joint(y, p))
    np.testing.assert_array_equal(wrong_labels(more_y, more_p), wrong_labels(y, p) + 3)
    doubt, other = doubts(more_y, more_p)
    assert (doubt[:3] == 0).all()
    assert (other[:3] == -1).all()


@pytest.mark.parametrize(("n", "n_classes"), [(0, 2), (1, 2), (5, 1), (2, 2)])
def test_few_rows_and_one_class(n: int, n_classes: int) -> None:
    y, p = np.arange(n) % n_classes, np.full((n, n_classes), 1 / n_classes)
    assert len(wrong_labels(y, p)) == 0
    assert confident_joint(y, p).sum() >= 0


def test_a_class_that_nobody_has_is_suggested_to_nobody_by_the_joint() -> None:
    y, p, _ = noisy(5, n_classes=3)
    p4 = np.column_stack([p * 0.5, np.full(len(y), 0.5)])
    assert confident_joint(y, p4)[:, 3].sum() == 0


def test_blocks_are_all_rows_that_count() -> None:
    y, p, _ = noisy(6, n=100)
    y[3:20:5], p[[50, 99]] = -1, np.nan
    rows, blocks = zip(*_blocks(y, p, values=50), strict=True)
    assert len(rows) == 9  # of 12 rows
    expected = [k for k in range(100) if y[k] >= 0 and not np.isnan(p[k]).any()]
    assert np.concatenate(rows).tolist() == expected
    np.testing.assert_array_equal(np.concatenate(blocks), p[expected])
