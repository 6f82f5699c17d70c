"""Learning curves: scikit-learn's fits on the same rows, SciPy's curve fit, and worlds whose truth is known are the oracles."""

import dataclasses
import warnings

import numpy as np
import pytest
from blobs import blobs
from scipy.optimize import curve_fit, nnls
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

from featcache.errors import SourceError
from featcache.heads.head import Scaling
from featcache.heads.learning_curve import (
    LearningCurve,
    curve_sizes,
    fit_power_law,
    forecast,
    learning_curve,
    nested_order,
    power_law,
)

SCALERS = {"none": FunctionTransformer, "standardise": StandardScaler, "unit": Normalizer}


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("scaling", ["none", "standardise", "unit"])
def test_accuracies_are_those_of_scikit_learn_on_the_same_rows(scaling: Scaling, balanced: bool) -> None:
    X, y = blobs(160, spread=4.0)
    judges, judges_y = blobs(90, spread=4.0, seed=1)
    features, rows, copies = np.concatenate([judges, X]), np.arange(90, 250), np.arange(160)
    copies[10:50], X[10:50], features[100:140] = 3, X[3], X[3]  # one image 41 times: it trains as often
    options = {"C": 0.1, "scaling": scaling, "balanced": balanced, "sizes": 4, "draws": 2}
    found = learning_curve(features, rows, y, copies=copies, judges=np.arange(90), judges_y=judges_y, **options)
    generator = np.random.default_rng(0)
    orders = [nested_order(y, copies, generator) for _ in range(2)]
    weights = "balanced" if balanced else None
    differ = 0
    for step, size in enumerate(found.sizes):
        for draw, order in enumerate(orders):
            train = np.flatnonzero(np.isin(copies, order[:size]))
            scaler, classifier = (
                SCALERS[scaling](),
                LogisticRegression(C=0.1, class_weight=weights, max_iter=2000, tol=1e-7),
            )
            oracle = make_pipeline(scaler, classifier).fit(X[train].astype(np.float64), y[train])
            differ += int((found.right[step, draw] != (oracle.predict(judges.astype(np.float64)) == judges_y)).sum())
    assert differ <= 0.003 * found.right.size  # rows on the border, which the solver's tolerance decides
    assert (found.pool, found.total, found.held_out) == (120, 120, False)
    assert found.accuracy == pytest.approx(found.right.mean(axis=(1, 2)))


def test_held_out_rows_judge_where_nothing_else_does() -> None:
    X, y = blobs(200, spread=3.0)
    copies = np.arange(200)
    copies[100:104] = copies[96:100]  # four images twice
    found = learning_curve(X, np.arange(200), y, C=1.0, scaling="none", copies=copies)
    judged = ~np.isnan(found.right[0])
    assert (judged.sum(axis=0) == 1).all()  # each row is judged in one draw
    assert (judged[:, 96:100] == judged[:, 100:104]).all()  # and its copies with it: they never train what judges them
    assert (found.total, found.sizes[-1], found.sampled) == (196, found.pool, False)
    assert 0.75 * 196 < found.pool <= 0.8 * 196
    again = learning_curve(X, np.arange(200), y, C=1.0, scaling="none", copies=copies)
    assert np.array_equal(again.right, found.right, equal_nan=True)


def test_every_beginning_of_an_order_is_stratified() -> None:
    y = np.repeat([0, 1, 2], [300, 90, 4])
    copies = np.arange(394)
    copies[10:20] = 5
    order = nested_order(y, copies, np.random.default_rng(3))
    assert sorted(order.tolist()) == np.unique(copies).tolist()
    assert set(y[order[:3]]) == {0, 1, 2}
    for size in (10, 50, 200):
        counts = np.bincount(y[order[:size]], minlength=3)
        assert np.abs(counts - size * np.array([290, 90, 4]) / 384).max() <= 2.0


def test_more_features_than_are_looked_at_are_sampled() -> None:
    X, y = blobs(300)
    judge = {"judges": np.arange(3), "judges_y": y[[0, 1, 2]]}
    found = learning_curve(
        X, np.arange(300), y, C=1.0, scaling="none", copies=np.arange(300), most_values=120 * 12, **judge
    )
    assert (found.pool, found.sizes[-1], found.total, found.sampled) == (120, 120, 300, True)
    assert forecast(found).refused == "the curve ends before all 300 training images, to save time"


@pytest.mark.parametrize(
    ("images", "classes", "sizes"),
    [
        (245, 2, [10, 16, 25, 39, 62, 98, 155, 245]),
        (40, 3, [10, 12, 15, 18, 22, 27, 33, 40]),
        (39, 3, None),
        (800, 101, None),
    ],
)
def test_sizes_grow_by_a_factor(images: int, classes: int, sizes: list[int] | None) -> None:
    if sizes is None:
        with pytest.raises(SourceError, match=f"{images} different training images of {classes} classes are too few"):
            curve_sizes(images, classes)
    else:
        assert curve_sizes(images, classes).tolist() == sizes


def test_what_would_take_minutes_is_left_out() -> None:
    y = np.repeat(np.arange(1000), 20)
    with pytest.raises(SourceError, match="one of 1,000 classes and 1,280 values would take minutes"):
        features = np.broadcast_to(np.zeros(1280, np.float32), (20_000, 1280))
        judge = {"judges": np.arange(2), "judges_y": y[:2]}
        learning_curve(features, np.arange(20_000), y, C=1.0, scaling="none", copies=np.arange(20_000), **judge)


def test_a_class_too_small_to_hold_out_is_said() -> None:
    X, y = blobs(120)
    y[:-3], y[-3:] = y[:-3] % 2, 2
    with pytest.raises(SourceError, match="takes 5 different ones of each class; one class has 3"):
        learning_curve(X, np.arange(120), y, C=1.0, scaling="none", copies=np.arange(120))


# ------------------------------------------------------------------------------------------------------- power law

SIZES = np.array([10, 20, 40, 80, 160, 320, 640.0])


@pytest.mark.parametrize(("floor", "factor", "exponent"), [(0.03, 1.5, 0.75), (0.0, 0.6, 0.3), (0.1, 2.0, 1.0)])
def test_the_law_is_found_again(floor: float, factor: float, exponent: float) -> None:
    errors = floor + factor * SIZES**-exponent
    law = fit_power_law(SIZES, errors[None], np.ones(7))
    assert law[0] == pytest.approx([floor, factor, exponent], abs=1e-9)


def test_the_law_is_the_one_of_scipy() -> None:
    noise = np.random.default_rng(0).normal(0, 0.004, (5, 7))
    errors = 0.05 + 1.2 * SIZES**-0.6 + noise
    sigma = np.linspace(0.02, 0.005, 7)
    for row in errors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a covariance that cannot be estimated at a bound
            bounds = ([0, 0, 0.05], [1, 100, 2])
            oracle, _ = curve_fit(
                lambda n, a, b, c: a + b * n**-c, SIZES, row, (0.05, 1, 0.5), sigma=sigma, bounds=bounds
            )
        law = fit_power_law(SIZES, row[None], sigma**-2)

        def left(found: np.ndarray, row: np.ndarray = row) -> float:
            return float((((power_law(found[None], SIZES)[0] - row) / sigma) ** 2).sum())

        assert left(law[0]) <= left(oracle) * 1.005  # the grid of exponents is fine enough
        assert power_law(law, np.array([1280.0])) == pytest.approx(
            power_law(oracle[None], np.array([1280.0])), abs=2e-3
        )


def test_no_floor_below_zero() -> None:
    errors = 0.6 - 0.2 * np.log10(SIZES)  # steeper than any law with a floor
    found = fit_power_law(SIZES, errors[None], np.ones(7))[0]
    left = {}
    for exponent in np.linspace(0.05, 2, 391):
        (floor, factor), rest = nnls(np.column_stack([np.ones(7), SIZES**-exponent]), errors)
        left[rest] = (floor, factor, exponent)
    assert found == pytest.approx(left[min(left)], abs=1e-9)
    assert found[0] == 0


def curve_of(accuracy: np.ndarray, *, judges: int = 2000, draws: int = 5, seed: int = 0) -> LearningCurve:
    """Judges that are right as often as told, each with a difficulty of its own, so that they agree over sizes."""
    difficulty = np.random.default_rng(seed).permutation(np.linspace(0, 1, judges))
    jitter = np.random.default_rng(seed + 1).normal(0, 0.004, (len(accuracy), draws, 1))
    right = (difficulty < accuracy[:, None, None] + jitter).astype(np.float32)
    return LearningCurve(SIZES.astype(np.intp), right, 640, False, 640)


def test_what_twice_as_many_are_worth() -> None:
    law = lambda n: 0.04 + 1.6 * n**-0.6  # noqa: E731
    found = forecast(curve_of(1 - law(SIZES)))
    assert (found.size, found.refused) == (1280, "")
    assert found.gain == pytest.approx(law(640) - law(1280), abs=0.004)
    assert found.low < found.gain < found.high
    assert found.explained > 0.98


@pytest.mark.parametrize(
    ("accuracy", "why"),
    [
        (np.full(7, 0.9), "does not rise"),
        (np.array([0.5, 0.9, 0.5, 0.9, 0.5, 0.9, 0.7]), "a power law explains only"),
        (np.array([0.6, 0.61, 0.62, 0.63, 0.64, 0.66, 0.95]), "a power law"),
    ],
)
def test_no_forecast_where_the_law_does_not_fit(accuracy: np.ndarray, why: str) -> None:
    found = forecast(curve_of(accuracy))
    assert why in found.refused
    assert (found.gain, found.low, found.high) == (None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_intervals_hold_what_they_promise(held_out: bool) -> None:
    """Of many worlds drawn from one law, nine in ten intervals at least hold the mean over worlds, at every size."""
    curves = []
    for world in range(60):
        generator = np.random.default_rng(world)
        y = np.concatenate([np.arange(3), generator.integers(3, size=237)])
        X = (np.random.default_rng(7).normal(size=(3, 20))[y] * 0.45 + generator.normal(size=(240, 20))).astype(
            np.float32
        )
        rows, judges = np.arange(120), np.arange(120, 240)
        judge = {} if held_out else {"judges": judges, "judges_y": y[judges]}
        options = {"C": 0.1, "scaling": "standardise", "copies": rows, "sizes": 5, "seed": world}
        curves.append(learning_curve(X, rows, y[rows], **options, **judge))
    truth = np.mean([curve.accuracy for curve in curves], axis=0)
    low, high = (np.stack(ends) for ends in zip(*(curve.interval for curve in curves), strict=True))
    assert (((low <= truth) & (truth <= high)).mean(axis=0) >= 0.87).all()
    widths = np.sqrt(np.mean([curve.standard_error**2 for curve in curves], axis=0))
    assert widths / np.std([curve.accuracy for curve in curves], axis=0) == pytest.approx(np.ones(5), abs=0.33)


def test_the_interval_is_wider_with_fewer_judges() -> None:
    many = curve_of(np.linspace(0.7, 0.9, 7))
    few = dataclasses.replace(many, right=many.right[:, :, :100])
    assert (few.standard_error > 2.5 * many.standard_error).all()
