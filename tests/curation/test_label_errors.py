"""Label suspects: planted errors are found, copies do not vouch for each other, and bad input has no opinion."""

from pathlib import Path

import numpy as np
import pytest

from featcache.curation import label_errors
from featcache.curation.label_errors import estimate, find_label_errors, out_of_fold
from featcache.curation.neighbours import nearest_rows

DIM = 12


def blobs(n: int = 240, n_classes: int = 3, *, seed: int = 0, apart: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Features of classes that lie apart, float32, and labels."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    X = rng.normal(0, 1, (n, DIM)) + apart * np.eye(DIM)[y]
    return X.astype(np.float32), y


def flipped(y: np.ndarray, count: int, n_classes: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(y), count, replace=False)
    noisy = y.copy()
    noisy[rows] = (y[rows] + rng.integers(1, n_classes, count)) % n_classes
    return noisy, rows


def test_planted_errors_are_found_with_what_they_were() -> None:
    X, y = blobs()
    noisy, wrong = flipped(y, 20, 3)
    rows = np.arange(len(y))
    p = out_of_fold(X, rows, noisy)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
    findings = find_label_errors(noisy, p, nearest_rows(X, rows))
    found = [finding.row for finding in findings]
    assert len(set(found) & set(wrong.tolist())) >= 16
    assert len(found) <= 24
    first = findings[0]
    assert first.kind == "label"
    assert first.suggested == y[first.row] != noisy[first.row]
    assert "nearest neighbours" in first.reason
    scores = [finding.score for finding in findings]
    assert scores == sorted(scores, reverse=True)
    assert 0.5 < min(scores) <= max(scores) <= 1


def test_rows_of_the_cache_are_named() -> None:
    """Numbers of rows, not places among those that were looked at; a row without a label is none."""
    X, y = blobs()
    noisy, wrong = flipped(y, 10, 3)
    noisy[5:9] = -1
    rows = np.arange(len(y))[::-1].copy() + 7
    features = np.concatenate([np.zeros((7, DIM), np.float32), X])
    p = out_of_fold(features, rows, noisy[::-1])
    assert np.isnan(p[::-1][5:9]).all()
    found = {finding.row - 7 for finding in find_label_errors(noisy[::-1], p, nearest_rows(features, rows))}
    assert len(found & set(wrong.tolist())) >= 6
    assert not found & {5, 6, 7, 8}


def test_the_same_seed_gives_the_same_bits() -> None:
    X, y = blobs(45)
    rows = np.arange(len(y))
    first = out_of_fold(X, rows, y, seed=3)
    np.testing.assert_array_equal(first, out_of_fold(X, rows, y, seed=3))
    assert not np.array_equal(first, out_of_fold(X, rows, y, seed=4))


def test_copies_do_not_vouch_for_a_label() -> None:
    """Ten copies of one image under a wrong label: known as one image they are doubted, as ten they vouch for each other."""
    X, y = blobs(120, apart=4)
    X[:10], y[:10] = X[11] + np.random.default_rng(1).normal(0, 1e-3, (10, DIM)), 0
    rows, groups = np.arange(len(y)), np.arange(len(y))
    groups[:10] = 0
    nearest = nearest_rows(X, rows)
    apart, together = (out_of_fold(X, rows, y, g)[:10] for g in (None, groups))
    assert together[:, 0].max() < 0.5 < apart[:, 0].min()
    found = {finding.row for finding in find_label_errors(y, out_of_fold(X, rows, y, groups), nearest, groups=groups)}
    assert set(range(10)) <= found


@pytest.mark.parametrize(
    "labels", [[-1] * 6, [0] * 6, [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2], [0, 1]]
)
def test_too_few_images_or_classes_are_no_opinion(labels: list[int]) -> None:
    y = np.array(labels)
    X = np.random.default_rng(0).normal(0, 1, (len(y), DIM)).astype(np.float32)
    rows = np.arange(len(y))
    p = out_of_fold(X, rows, y)
    assert p.shape == (len(y), max(y.max() + 1, 1))
    assert np.isnan(p).all()
    assert find_label_errors(y, p, nearest_rows(X, rows)) == []


def test_a_small_class_is_left_out_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    X, y = blobs(60, 2)
    y[:2] = 4  # two images of a class; 2 and 3 have none
    with caplog.at_level("INFO", "featcache"):
        p = out_of_fold(X, np.arange(60), y)
    assert "labels of 1 class with fewer than 3 different images are not judged" in caplog.text
    assert p.shape == (60, 5)
    assert np.isnan(p[:2]).all()
    assert (p[2:, 2:] == 0).all()
    np.testing.assert_allclose(p[2:].sum(axis=1), 1, atol=1e-5)


def test_half_of_them_copies_of_three_images() -> None:
    """Copies do not make a class large: three different images are three folds, two are no opinion."""
    X, y = blobs(60, 2)
    groups = np.arange(60)
    groups[y == 1] = np.arange(30) % 3 + 100
    assert not np.isnan(out_of_fold(X, np.arange(60), y, groups)).any()
    groups[y == 1] = np.arange(30) % 2 + 100
    assert np.isnan(out_of_fold(X, np.arange(60), y, groups)).all()


def test_on_samples_it_finds_the_same() -> None:
    """What happens to features that are too large, with a smaller limit."""
    X, y = blobs(400)
    noisy, wrong = flipped(y, 30, 3)
    rows, steps = np.arange(len(y)), []
    passes = label_errors._sampled_passes(
        X, rows, noisy, rows, seed=0, progress=lambda done, of: steps.append((done, of)), most=150 * DIM
    )
    p = np.full((400, 3), np.nan)
    for part, block in passes:
        assert np.isnan(p[part]).all()
        p[part] = block
    assert steps == [(number, 6) for number in range(1, 7)]
    found = {finding.row for finding in find_label_errors(noisy, p)}
    assert len(found & set(wrong.tolist())) >= 22
    assert len(found) <= 40


def test_a_sample_holds_every_class() -> None:
    y = np.repeat([0, 1, 2], [1000, 3, 50])
    some = label_errors._sample(np.arange(len(y)), y, 100, np.random.default_rng(0))
    assert len(some) == 100
    assert (np.bincount(y[some]) >= 3).all()
    assert (np.diff(some) > 0).all()


def test_large_tables_lie_in_a_file() -> None:
    table = label_errors._table(1000, 90, kept=80_000)
    assert isinstance(table, np.memmap)
    assert table.shape == (1000, 90)
    assert np.isnan(table).all()
    table[999, 5] = 0.5
    assert table[999, 5] == 0.5
    assert not isinstance(label_errors._table(1000, 90), np.memmap)


def test_what_it_costs_grows_until_samples_are_drawn() -> None:
    seconds, size = zip(*(estimate(n, 1280, 100) for n in (1000, 100_000, 1_000_000)), strict=True)
    assert seconds[0] < 10 < seconds[1] <= seconds[2] * 1.01
    assert size[0] < size[1]
    assert size[1] < size[2] < 2**32


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # pandas 3.1 to cleanlab 2.9
def test_cleanlabs_datalab_takes_our_features_and_probabilities(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    cleanlab = pytest.importorskip("cleanlab")
    X, y = blobs()
    noisy, wrong = flipped(y, 12, 3)
    p = out_of_fold(X, np.arange(len(y)), noisy).astype(np.float64)
    lab = cleanlab.Datalab({"label": noisy.tolist()}, label_name="label", verbosity=0)
    lab.find_issues(features=X, pred_probs=p / p.sum(axis=1, keepdims=True), issue_types={"label": {}, "outlier": {}})
    theirs = set(np.flatnonzero(lab.get_issues("label")["is_label_issue"]).tolist())
    ours = {finding.row for finding in find_label_errors(noisy, p)}
    assert len(theirs & ours & set(wrong.tolist())) >= 9
