"""The score on honest terms, against fit-head, against scikit-learn, and against its definition written out."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_classes
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

from featcache.cache.cache import FeatureCache
from featcache.curation.honest_score import Rows, Score, _Fitted, _Folds, honest_scores
from featcache.errors import SourceError
from featcache.heads.confident import wrong_labels
from featcache.heads.metrics import accuracy_interval
from featcache.models.fit import fit_head

SCALERS = {"none": FunctionTransformer, "unit": Normalizer, "standardise": StandardScaler}


def rows_of(X: Any, labels: Any, splits: Any = None, *, groups: Any = None, usable: Any = None) -> Rows:
    n = len(labels)
    return Rows(
        features=np.asarray(X, np.float32),
        labels=np.asarray(labels),
        splits=np.zeros(n, np.uint8) if splits is None else np.asarray(splits, np.uint8),
        exact=np.arange(n),
        groups=np.arange(n) if groups is None else np.asarray(groups),
        usable=np.ones(n, np.bool_) if usable is None else usable,
    )


def by_terms(scores: tuple[Score, ...], split: str) -> dict[str, Score]:
    return {score.terms: score for score in scores if score.split == split}


@pytest.fixture
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """150 rows of three classes that lie apart."""
    labels = np.arange(150) % 3
    centres = np.eye(3, 8) * 6
    return centres[labels] + np.random.default_rng(0).normal(0, 1, (150, 8)), labels


def test_as_given_is_what_fit_head_says(tmp_path: Path) -> None:
    labels, splits = np.arange(150) % 3, 1 + np.arange(150) // 50
    X = make_classes(tmp_path / "f.h5", labels, splits, spread=4.0)
    report = fit_head(tmp_path / "f.h5", tmp_path / "m")
    found = honest_scores(rows_of(X, labels, splits))
    for split in ("val", "test"):
        score = by_terms(found, split)["as_given"]
        assert score.accuracy == getattr(report, f"{split}_accuracy")
        assert score.interval == getattr(report, f"{split}_accuracy_interval")
    make_classes(tmp_path / "g.h5", labels, spread=4.0)
    report = fit_head(tmp_path / "g.h5", tmp_path / "n")
    score = by_terms(honest_scores(rows_of(FeatureCache.open(tmp_path / "g.h5").X, labels)), "out_of_fold")["as_given"]
    assert (score.accuracy, score.n) == (report.cv_accuracy, 150)
    assert score.interval == accuracy_interval(round(report.cv_accuracy * 150), 150)


def test_leaks_leave_val_and_test_only_where_training_has_a_copy(tmp_path: Path) -> None:
    """Against scikit-learn at the setting that fit-head chose."""
    labels, splits = np.arange(150) % 3, 1 + np.arange(150) // 50
    X = make_classes(tmp_path / "f.h5", labels, splits, spread=4.0).astype(np.float32)
    groups = np.arange(150)
    groups[[50, 51, 52]] = [0, 1, 2]  # of val in train
    groups[[100, 101]] = [3, 60]  # of test in train, and in val, which trains nothing
    groups[103] = 102  # twice in test
    report = fit_head(tmp_path / "f.h5", tmp_path / "m")
    oracle = make_pipeline(SCALERS[report.scaling](), LogisticRegression(C=report.C, max_iter=1000))
    oracle.fit(X[:50].astype(np.float64), labels[:50])
    right = oracle.predict(X.astype(np.float64)) == labels
    found = honest_scores(rows_of(X, labels, splits, groups=groups))
    for split, rows in (("val", np.arange(53, 100)), ("test", np.arange(101, 150))):
        score = by_terms(found, split)["without_leaks"]
        assert (score.n, score.left_out) == (len(rows), 50 - len(rows))
        assert score.accuracy == pytest.approx(right[rows].mean())


def test_suspects_leave_training_and_never_val(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, truth = blobs
    labels, splits = truth.copy(), 1 + np.arange(150) // 75
    wrong = np.arange(0, 75, 7)
    labels[wrong] = (labels[wrong] + 1) % 3
    labels[[80, 90]] = (labels[[80, 90]] + 1) % 3  # wrong in val, too: each costs, whatever the model thinks of it
    score = by_terms(honest_scores(rows_of(X, labels, splits)), "val")["without_suspects"]
    assert (score.n, score.left_out, score.accuracy) == (75, len(wrong), 73 / 75)


def test_without_splits_no_fold_has_a_say_in_its_own_training(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    """The definition written out, with scikit-learn's solver."""
    X, labels = blobs[0], blobs[1].copy()
    labels[::8] = (labels[::8] + 1) % 3
    rows = rows_of(X, labels)
    head = _Fitted(rows, np.arange(150), rows.exact, 0)
    folds = _Folds(head, 0)
    scaling, C = folds.setting

    def model(train: np.ndarray) -> Any:
        pipeline = make_pipeline(SCALERS[scaling](), LogisticRegression(C=C, max_iter=5000))
        return pipeline.fit(X[train], labels[train])

    held_out = [rows for _, rows in folds.splits]
    for number, rest in enumerate(folds.without_suspects()):
        opinion = np.full((150, 3), np.nan)
        for other in {0, 1, 2, 3, 4} - {number}:
            both = np.concatenate([held_out[number], held_out[other]])
            logits = model(np.delete(np.arange(150), both)).decision_function(X[held_out[other]])
            exponents = np.exp(logits / folds.temperature)
            opinion[held_out[other]] = exponents / exponents.sum(axis=1, keepdims=True)
        suspects = wrong_labels(labels, opinion)
        assert len(suspects) > 8
        assert rest.tolist() == sorted({*range(150)} - {*held_out[number].tolist(), *suspects.tolist()})
    found = by_terms(honest_scores(rows), "out_of_fold")
    assert found["without_suspects"].left_out == 19  # all that were flipped
    assert found["without_suspects"].accuracy >= found["without_leaks"].accuracy
    assert {score.n for score in found.values()} == {150}


def test_near_copies_lie_in_one_fold(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    """Noise that was copied can be learnt by heart; with copies in one fold it cannot."""
    random = np.random.default_rng(1)
    noise = random.normal(size=(60, 30))
    labels = np.repeat(random.integers(0, 2, 60), 2)
    X = np.repeat(noise, 2, axis=0) + random.normal(0, 0.01, (120, 30))
    found = by_terms(honest_scores(rows_of(X, labels, groups=np.arange(120) // 2)), "out_of_fold")
    assert found["as_given"].accuracy > 0.75
    assert found["without_leaks"].accuracy < 0.65


def test_what_cannot_be_scored_is_left_out(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, labels = blobs
    usable = np.ones(150, np.bool_)
    usable[:10] = False
    X[:10] = np.nan
    assert by_terms(honest_scores(rows_of(X, labels, usable=usable)), "out_of_fold")["as_given"].n == 140
    splits = 1 + np.arange(150) // 75
    single = labels.copy()
    single[[20, 100, 101]] = 3  # one image in train, two in val: a class that no fold could hold out
    assert by_terms(honest_scores(rows_of(X, single, splits, usable=usable)), "val")["as_given"].n == 73
    unlabelled = np.where(np.arange(150) % 5 == 0, -1, labels)
    assert by_terms(honest_scores(rows_of(X, unlabelled, splits, usable=usable)), "val")["as_given"].n == 60
    for few in (np.zeros(150, int), np.full(150, -1), np.arange(150)):
        with pytest.raises(SourceError, match="two classes"):
            honest_scores(rows_of(X, few, usable=usable))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_class_of_near_copies_alone_is_scored_and_judges_nobody(
    blobs: tuple[np.ndarray, np.ndarray], mixed: bool
) -> None:
    """No two of its images could lie in two folds; suspects are those that the other classes have without it."""
    X, labels = blobs
    labels, splits, groups = labels.copy(), np.where(np.arange(150) < 120, 1, 2), np.arange(150)
    labels[6] = 1  # wrong
    few = np.flatnonzero((labels == 2) & (splits == 1))
    groups[few] = few[0]
    if mixed:
        groups[[0, 1]] = few[0]
    found = by_terms(honest_scores(rows_of(X, labels, splits, groups=groups)), "val")
    others = np.flatnonzero((splits == 1) & (labels != 2))
    expected = others[_Fitted(rows_of(X, labels, splits, groups=groups), others, groups, 0).suspects()]
    assert 6 in expected
    assert found["as_given"].n_train == 120
    assert found["without_suspects"].left_out == len(expected)
    labels[labels == 1] = 0  # and with one class left, nobody is suspected
    alone = by_terms(honest_scores(rows_of(X, labels, splits, groups=groups)), "val")
    assert alone["without_suspects"].left_out == 0


def test_everything_in_val_may_be_a_copy(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    X, labels = blobs
    found = honest_scores(rows_of(X, labels, 1 + np.arange(150) // 75, groups=np.arange(150) % 75))
    assert [(score.split, score.terms) for score in found] == [("val", "as_given")]


def test_a_near_copy_beyond_its_group_leaks_too(blobs: tuple[np.ndarray, np.ndarray]) -> None:
    """Rows 0 (train) and 80 (val) are a pair, 80 and 90 (val) another one: 90 copies nothing that trains."""
    X, labels = blobs
    rows = dataclasses.replace(rows_of(X, labels, 1 + np.arange(150) // 75), pairs=np.array([[80, 0], [80, 90]]))
    assert by_terms(honest_scores(rows), "val")["without_leaks"].n == 74
    trains = np.arange(150) < 75
    assert np.flatnonzero(rows.copies_of(trains) & ~trains).tolist() == [80]
    assert len({*rows.together().groups[[0, 80, 90]].tolist()}) == 1  # but no fold divides them
