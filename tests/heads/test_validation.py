"""Folds, the choice among settings and its corrected score, against scikit-learn, plain loops and chance."""

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from featcache.heads.logreg import fit_logreg
from featcache.heads.minibatch import fit_torch_head
from featcache.heads.validation import OutOfFold, stratified_folds

ALONE = np.arange(90)


def test_without_copies_folds_are_those_of_scikit_learn():
    y = np.random.default_rng(0).integers(0, 3, 90)
    folds = stratified_folds(y, ALONE, folds=5, seed=3)
    for (train, held_out), (theirs, left) in zip(
        folds, StratifiedKFold(5, shuffle=True, random_state=3).split(y, y), strict=True
    ):
        assert train.tolist() == theirs.tolist() and held_out.tolist() == left.tolist()


def test_copies_share_a_fold_and_each_row_is_held_out_once():
    generator = np.random.default_rng(1)
    copies = np.sort(generator.integers(0, 30, 90))
    copies = np.unique(copies, return_index=True)[1][np.unique(copies, return_inverse=True)[1]]  # the first row of each
    y = (copies * 7 % 3).astype(int)
    folds = stratified_folds(y, copies, folds=4, seed=0)
    for train, held_out in folds:
        assert not set(copies[train]) & set(copies[held_out])
    assert sorted(np.concatenate([held_out for _, held_out in folds])) == list(range(90))


def results(n: int, settings: int, seed: int) -> OutOfFold:
    """Settings that are right by chance half of the time."""
    generator = np.random.default_rng(seed)
    right = generator.random((n, settings)) < 0.5
    return OutOfFold(
        right, np.where(right, 0.4, 1.1) + generator.random((n, settings)), generator.permutation(np.arange(n) % 5)
    )


def test_scores_and_choice_are_those_of_the_drawn_rows():
    found = results(60, 4, seed=2)
    weights = np.random.default_rng(3).integers(0, 3, (5, 60)).astype(float)
    accuracies, losses = found.scores(weights)
    for draw, drawn in enumerate(np.repeat(np.arange(60), row.astype(int)) for row in weights):
        by_fold = [drawn[found.fold[drawn] == number] for number in range(5)]
        expected = np.mean([found.right[rows].mean(axis=0) for rows in by_fold], axis=0)
        expected_loss = np.mean([found.loss[rows].mean(axis=0) for rows in by_fold], axis=0)
        assert accuracies[draw] == pytest.approx(expected) and losses[draw] == pytest.approx(expected_loss)
        best = max(range(4), key=lambda k: (round(expected[k], 9), -expected_loss[k]))
        assert found.best(weights)[draw] == best


def test_the_best_of_many_chances_is_corrected_to_chance():
    found = [results(100, 33, seed) for seed in range(200)]
    raw = np.mean([one.scores(np.ones((1, 100)))[0].max() for one in found])
    corrected = np.mean([one.corrected(np.arange(100), seed=0)[0] for one in found])
    assert raw > 0.59
    assert corrected == pytest.approx(0.5, abs=0.01)


def test_a_setting_that_nobody_chose_keeps_its_score():
    found = results(100, 1, seed=0)
    assert found.corrected(np.arange(100), seed=0)[0] == pytest.approx(found.scores(np.ones((1, 100)))[0][0, 0])


@pytest.mark.parametrize("kind", ["logreg", "linear", "mlp"])
def test_copies_of_noise_are_no_knowledge(kind):
    """30 images of random labels, each five times: 100 % if copies of one image lie on both sides of a fold."""
    accuracies = []
    for seed in range(6 if kind == "logreg" else 3):
        generator = np.random.default_rng(seed)
        X = np.repeat(generator.normal(size=(30, 16)), 5, axis=0).astype(np.float32)
        y = np.repeat(generator.permutation(np.arange(30) % 2), 5)
        copies = np.arange(150) // 5 * 5
        rows = np.arange(150)
        if kind == "logreg":
            fitted = fit_logreg(X, rows, y, copies=copies)
        else:
            fitted = fit_torch_head(X, rows, y, copies=copies, kind=kind, n_classes=2)
        accuracies.append(fitted.cv_accuracy)
    assert 0.3 < np.mean(accuracies) < 0.7


@pytest.mark.slow
def test_noise_cross_validates_to_chance():
    accuracies, raw = [], []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        fitted = fit_logreg(generator.normal(size=(100, 64)), np.arange(100), generator.permutation(np.arange(100) % 2))
        accuracies.append(fitted.cv_accuracy)
        raw.append(np.mean(fitted.fold_accuracies))
    assert np.mean(raw) > 0.53
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.01)
