"""Folds, the choice among settings and its corrected score, against scikit-learn, plain loops and chance."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.model_selection import StratifiedKFold

from featcache.errors import SourceError
from featcache.heads.logreg import fit_logreg
from featcache.heads.minibatch import fit_torch_head
from featcache.heads.validation import OutOfFold, different_images, fit_temperature, stratified_folds
from featcache.images.groups import first_members

ALONE = np.arange(90)


def test_images_of_a_class_are_counted_once_each():
    random = np.random.default_rng(0)
    for _ in range(50):
        y = random.integers(4, size=30)
        copies = first_members(random.integers(12, size=30))
        expected = [len({copies[row] for row in range(30) if y[row] == label}) for label in range(y.max() + 1)]
        assert different_images(y, copies).tolist() == expected


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


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_several_classes_are_dealt_evenly(seed):
    """As patients have images of several classes: no group is divided, each fold holds a fifth of each class."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 12, 80)
    groups = np.repeat(np.cumsum(sizes) - sizes, sizes)
    y = random.choice(3, len(groups), p=[0.6, 0.3, 0.1])
    y[groups == 0] = 3  # of a rare class two groups
    y[groups == groups[-1]] = 3
    found = stratified_folds(y, groups, folds=5, seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([held_out for _, held_out in found])), np.arange(len(y)))
    for train, held_out in found:
        assert not {*groups[train].tolist()} & {*groups[held_out].tolist()}
        assert {*y[train].tolist()} == {0, 1, 2, 3}
        for label in range(3):
            assert abs((y[held_out] == label).sum() - (y == label).sum() / 5) <= 0.02 * len(y)
    again = stratified_folds(y, groups, folds=5, seed=seed)
    assert all(np.array_equal(one[1], other[1]) for one, other in zip(found, again, strict=True))


def test_a_class_of_two_groups_is_never_held_out_as_a_whole():
    """Beside a group that makes up most of their other class, both would go to the fold without it."""
    y = np.array([0] * 20 + [0, 1] + [0, 1])
    groups = np.repeat([0, 20, 22], [20, 2, 2])
    for seed in range(20):
        assert all({*y[train].tolist()} == {0, 1} for train, _ in stratified_folds(y, groups, folds=2, seed=seed))


def divided(y, groups, folds):
    """By all divisions: whether one leaves no fold empty, and every class to those who train without any of them."""
    names = np.unique(groups)
    for chosen in itertools.product(range(folds), repeat=len(names)):
        fold = np.array(chosen)[np.searchsorted(names, groups)]
        if len({*chosen}) == folds and all({*y[fold != k].tolist()} == {*y.tolist()} for k in range(folds)):
            return True
    return False


def test_few_groups_of_several_classes_are_divided_wherever_that_is_possible():
    """Else it is said; a class that a fold trains without would be a crash, or a class nobody knows."""
    random, said = np.random.default_rng(0), 0
    cases = [(np.array([2, 0, 1, 0, 2, 1, 1, 2, 0, 2]), np.array([0, 1, 2, 3, 1, 0, 2, 3, 2, 0]))]
    for _ in range(150):
        n = random.integers(6, 14)
        cases.append((random.integers(0, random.integers(2, 6), n), random.integers(0, random.integers(2, 7), n)))
    for each, (y, groups) in enumerate(cases):
        y = np.unique(y, return_inverse=True)[1]
        copies = np.array([np.flatnonzero(groups == group)[0] for group in groups])
        folds = min(3, min(len({*groups[y == label].tolist()}) for label in range(y.max() + 1)))
        if folds < 2 or np.array_equal(y, y[copies]):
            continue
        try:
            found = stratified_folds(y, copies, folds=folds, seed=each)
        except SourceError as error:
            said += 1
            assert "cannot be divided" in str(error)
            assert not divided(y, groups, folds)
            continue
        for train, held_out in found:
            assert len(held_out)
            assert {*y[train].tolist()} == {*y.tolist()}
            assert not {*groups[train].tolist()} & {*groups[held_out].tolist()}
    assert said


def test_scores_and_choice_are_those_of_the_drawn_rows():
    found = results(60, 4, seed=2)
    weights = np.random.default_rng(3).integers(0, 3, (5, 60)).astype(float)
    accuracies, losses = found.scores(weights)
    for draw, drawn in enumerate(np.repeat(np.arange(60), row.astype(int)) for row in weights):
        by_fold = [drawn[found.fold[drawn] == number] for number in range(5)]
        expected = np.mean([found.right[rows].mean(axis=0) for rows in by_fold], axis=0)
        expected_loss = np.mean([found.loss[rows].mean(axis=0) for rows in by_fold], axis=0)
        assert accuracies[draw] == pytest.approx(expected) and losses[draw] == pytest.approx(expected_loss)
        top = expected.max()
        good = np.flatnonzero(expected >= top - np.sqrt(top * (1 - top) / 60))
        least = min(expected_loss[good])
        assert found.best(weights, np.arange(60))[draw] == next(k for k in good if expected_loss[k] <= least + 0.005)


@pytest.mark.parametrize(
    ("right", "losses", "chosen"),
    [
        ((95, 90, 99), (0.2, 0.1, 0.3), 2),  # 4 points are more than a standard error
        ((95, 98, 99), (0.2, 0.1, 0.3), 1),  # 1 point is less
        ((98, 98, 99), (0.104, 0.1, 0.3), 0),  # equal to five thousandths of a nat: the first, most regularised
        ((98, 98, 99), (0.106, 0.1, 0.3), 1),
        ((90, 98, 99), (0.104, 0.1, 0.3), 1),  # but too often wrong
        ((99, 100, 100), (0.2, 0.4, 0.3), 0),  # one row of 100 is within the error of 100 %, too
        ((97, 100, 100), (0.2, 0.4, 0.3), 2),
    ],
)
def test_the_lowest_loss_within_one_standard_error_is_chosen(right, losses, chosen):
    rights = np.arange(100)[:, None] < np.array(right)
    found = OutOfFold(rights, np.tile(losses, (100, 1)), np.arange(100) % 2)
    assert found.best(np.ones((1, 100)), np.arange(100)).tolist() == [chosen]


def test_regularisation_is_compared_on_one_path():
    rights, losses = np.ones((100, 4), bool), np.tile([0.101, 0.104, 0.102, 0.1], (100, 1))
    found = OutOfFold(rights, losses, np.arange(100) % 2, path=np.array([0, 0, 1, 1]))
    assert found.best(np.ones((1, 100)), np.arange(100)).tolist() == [2]


def test_copies_make_no_standard_error_smaller():
    rights = np.arange(400)[:, None] // 4 < np.array([98, 99])
    found = OutOfFold(rights, np.tile([0.1, 0.3], (400, 1)), np.arange(400) % 2)
    assert found.best(np.ones((1, 400)), np.arange(400)) == [1]
    assert found.best(np.ones((1, 400)), np.arange(400) // 4 * 4) == [0]


# ------------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(classes, true):
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (20_000, classes))
    y = (logits / true + generator.gumbel(size=logits.shape)).argmax(axis=1)  # a draw from softmax(logits / true)
    temperature, change = fit_temperature(y, logits, np.arange(20_000) % 5)
    assert temperature == pytest.approx(true, rel=0.05)
    assert change <= 1e-4


def test_the_temperature_is_the_minimum_of_the_smoothed_loss():
    generator = np.random.default_rng(1)
    logits, y = generator.normal(0, 5, (60, 3)), generator.integers(0, 3, 60)
    targets = np.full((60, 3), 1 / 62 / 2)
    targets[np.arange(60), y] = 61 / 62
    found = minimize_scalar(lambda t: -(targets * log_softmax(logits / t, axis=1)).sum(), bounds=(0.05, 20))
    assert fit_temperature(y, logits)[0] == pytest.approx(found.x, rel=1e-3)


def test_a_row_has_no_part_in_the_temperature_that_it_is_judged_with():
    generator = np.random.default_rng(2)
    logits, fold = generator.normal(0, 3, (400, 3)), np.arange(400) % 4
    y = (logits / 2 + generator.gumbel(size=logits.shape)).argmax(axis=1)
    losses = np.empty(400)
    for number in range(4):
        held_out = fold == number
        temperature, _ = fit_temperature(y[~held_out], logits[~held_out])
        losses[held_out] = -log_softmax(logits[held_out] / temperature, axis=1)[np.arange(100), y[held_out]]
    before = -log_softmax(logits, axis=1)[np.arange(400), y]
    assert fit_temperature(y, logits, fold)[1] == pytest.approx((losses - before).mean(), abs=1e-4)


@pytest.mark.parametrize(
    ("logits", "low", "high"),
    [
        (np.zeros((50, 2)), 1, 1),  # nothing to tell
        (np.eye(2)[np.arange(50) % 2] * 8, 1.9, 2.1),  # all right: 51 of 52, whose logit is log 51 = 3.93
        (np.eye(2)[np.arange(50) % 2] * -8, 19, 20),  # all wrong: as little said as possible
        (np.eye(2)[np.arange(50) % 2] * 1e30, 19, 20),
    ],
)
def test_no_logits_lead_to_a_temperature_beyond_its_bounds(logits, low, high):
    temperature, change = fit_temperature(np.arange(50) % 2, logits, np.arange(50) % 5)
    assert low <= temperature <= high and np.isfinite(change)


def test_many_logits_give_the_temperature_of_some():
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 3, (3_000_000, 2)).astype(np.float32)
    y = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    assert fit_temperature(y, logits, np.arange(len(y)) % 2)[0] == pytest.approx(1, rel=0.01)


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
    for seed in range(40):
        generator = np.random.default_rng(seed)
        fitted = fit_logreg(generator.normal(size=(100, 64)), np.arange(100), generator.permutation(np.arange(100) % 2))
        accuracies.append(fitted.cv_accuracy)
        raw.append(max(entry["accuracy"] for entry in fitted.curve))
    assert np.mean(raw) > 0.53
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.02)
