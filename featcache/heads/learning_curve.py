"""Learning curves: accuracy against the number of training images, and what twice as many would be worth.

In: embeddings, and the setting of a logistic regression. Out: a ``LearningCurve``, from fits on random parts of the training
rows; a ``Doubling``, from a power law through its points.

Sizes, draws and intervals follow Viering and Loog (2022), "The shape of learning curves: a review": several draws per size,
and a law with a floor, error = a + b n^-c (Cortes, Jackel, Solla, Vapnik and Denker 1993, "Learning curves: asymptotic values
and rate of convergence").
"""

import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from joblib import cpu_count

from featcache.errors import SourceError
from featcache.heads.head import Array, FeatureSource, Indices, Scaling
from featcache.heads.logreg import Solver, one_blas_thread
from featcache.heads.validation import stratified_folds

SIZES, DRAWS = 8, 5
_LEAST, _LEAST_OF_CLASS, _LEAST_SHARE = 10, 2, 1 / 32  # images of the smallest size: in all, per class, of all
_LEAST_SPAN = 4  # the largest size by the smallest
_MOST_VALUES = 2**24  # of features that train: 13,000 images of 1,280
_MOST_PRODUCTS = 2**30  # of images, values and classes: half a minute on two cores
_Z = 1.959963984540054
_TOLERANCE = 1e-5  # of solutions: rows on the border count here
_EXPONENTS = np.linspace(0.05, 2, 391)
_RESAMPLES = 400
_EXPLAINED = 0.9  # of the points' variance, by a law that is worth a forecast


@dataclasses.dataclass(frozen=True, eq=False)
class LearningCurve:
    """How often heads were right that were trained on some of the training images.

    Attributes:
        sizes: (S,) different training images, ascending. pool: how many each draw was drawn from; the last size.
        right: (S, draws, m) of each judged row whether it was right, 1 or 0; NaN: of another draw's judges.
        held_out: whether the judges were held out from the training rows, a share per draw; otherwise all judge all draws.
        total: different training images there are; more than ``pool`` where some were held out, or were too many.
    """

    sizes: Indices
    right: Array
    pool: int
    held_out: bool
    total: int

    @property
    def sampled(self) -> bool:
        """Whether the pool is a random part of the images, to save time."""
        return self.pool < self.total * (0.75 if self.held_out else 1)

    @property
    def accuracies(self) -> Array:
        """(S, draws), 0..1."""
        found: Array = np.nanmean(self.right, axis=2)
        return found

    @property
    def accuracy(self) -> Array:
        """(S,), means over draws."""
        found: Array = self.accuracies.mean(axis=1)
        return found

    @property
    def standard_error(self) -> Array:
        """(S,) of ``accuracy``, for other training images and other judges of the same kind.

        The variance of draws x judges, both random (Owen 2007, "The pigeonhole bootstrap"): what draws differ by, and what
        judges differ by. Draws of a share f of one pool overlap, and vary less than draws of new images, by 1 - f, while
        their mean varies with the pool. A draw's luck never grows with its size (isotonic regression), so that the whole pool's
        is that of the size before. Where judges are held out, each draw has a pool of its own.
        """
        from sklearn.isotonic import isotonic_regression

        draws = self.right.shape[1]
        of_judges: Array = np.nanmean(self.right, axis=1).var(axis=1, ddof=1)
        between = self.accuracies.var(axis=1, ddof=1)
        if self.held_out:  # draws have other judges, too, which count below
            between = np.maximum(between - of_judges * draws / self.right.shape[2], 0)
        share = self.sizes / self.pool * (not self.held_out)
        own = np.maximum(1 - share, 1e-6)  # of the whole pool: hardly known, and weighed so
        between = isotonic_regression(between / own, sample_weight=own, y_min=0, increasing=False)
        found: Array = np.sqrt(between * (share + (1 - share) / draws) + of_judges / self.right.shape[2])
        return found

    @property
    def interval(self) -> tuple[Array, Array]:
        """Lower and upper ends, (S,) each, of the 95 % interval of ``accuracy``."""
        reach = _Z * self.standard_error
        return np.maximum(self.accuracy - reach, 0), np.minimum(self.accuracy + reach, 1)


@dataclasses.dataclass(frozen=True)
class Doubling:
    """What twice the training images would be worth, by a power law through a curve's points: an extrapolation.

    Attributes:
        size: twice the curve's last. gain: accuracy (0..1) to gain on the way there; low, high: its 95 % interval. All three
            are None where ``refused`` says why there is no forecast.
        floor, factor, exponent: a, b and c of error = a + b n^-c. explained: the share of the points' variance.
    """

    size: int
    gain: float | None
    low: float | None
    high: float | None
    floor: float
    factor: float
    exponent: float
    explained: float
    refused: str = ""


def learning_curve(
    features: FeatureSource,
    rows: Indices,
    y: Array,
    *,
    C: float,
    scaling: Scaling,
    copies: Indices,
    judges: Indices | None = None,
    judges_y: Array | None = None,
    whole: Array | None = None,
    balanced: bool = False,
    seed: int = 0,
    sizes: int = SIZES,
    draws: int = DRAWS,
    most_values: int = _MOST_VALUES,
) -> LearningCurve:
    """Fit logistic regressions on random parts of the training rows, which grow by a factor, and judge them.

    C stays as it is, the scaling is that of the rows that train. All fits share one eigenbasis, which changes no optimum.

    Args:
        features: (M, D). rows: numbers of the N training rows. y: (N,) labels from 0, each occurring.
        copies: (N,) which rows are copies, as ``stratified_folds`` wants it: they train or judge together.
        judges, judges_y: rows that do not train, and their labels; None: each draw holds out another part of the training
            rows.
        whole: (m,) bool, of each of ``judges`` whether the head that all N rows train is right, where there is one: rows on
            the border fall as the solver ends, and two figures of one head should not differ. None: it is fit.
        most_values: of features that train; of more, a random part is the pool.

    Raises:
        SourceError: too few images, or so many classes that it would take minutes.
    """
    generator = np.random.default_rng(seed)
    images = np.unique(copies)
    if judges is not None and judges_y is not None:
        everything, labels = np.concatenate([rows, judges]), np.concatenate([y, judges_y])
        parts = [(np.arange(len(rows)), np.arange(len(rows), len(labels)))] * draws
    else:
        _check_images(np.bincount(y[images]), least=draws)
        everything, labels = rows, y
        parts = stratified_folds(y, copies, folds=draws, seed=seed)
    orders = [nested_order(y[train], copies[train], generator) for train, _ in parts]
    pool = _pool(min(map(len, orders)), features.shape[1], int(y.max()) + 1, most_values=most_values)
    steps = curve_sizes(pool, int(y.max()) + 1, sizes)
    X = features[everything].astype(np.float32, copy=False)
    solver = Solver(X, labels, grid=(C,), scalings=(scaling,), balanced=balanced, tolerance=_TOLERANCE)
    right = np.full((len(steps), draws, len(labels)), np.nan, np.float32)
    known = whole is not None and pool == len(images)
    if known:  # every draw is all rows
        right[-1, :, len(rows) :] = whole

    def one(job: tuple[int, int]) -> None:
        step, draw = job
        train, held_out = parts[draw]
        chosen = train[np.isin(copies[train], train[orders[draw][: steps[step]]])]
        logits = solver.held_out_logits((chosen, held_out), (scaling, C))
        right[step, draw, held_out] = logits.argmax(axis=1) == labels[held_out]

    with one_blas_thread(), ThreadPoolExecutor(cpu_count()) as workers:
        solver.prepare()
        jobs = itertools.product(reversed(range(len(steps) - known)), range(draws))  # the longest first
        list(workers.map(one, jobs))
    judged = np.unique(np.concatenate([held_out for _, held_out in parts]))
    return LearningCurve(steps, right[:, :, judged], pool, judges is None, len(images))


def _pool(images: int, dim: int, classes: int, *, most_values: int) -> int:
    """How many of the images are drawn from. Raises SourceError: what takes seconds would be too few for so many classes."""
    most = min(most_values // dim, _MOST_PRODUCTS // (dim * classes))
    if images > most and most < _LEAST_SPAN * _LEAST_OF_CLASS * classes:
        raise SourceError(f"one of {classes:,} classes and {dim:,} values would take minutes")
    return min(images, most)


def curve_sizes(images: int, classes: int, count: int = SIZES) -> Indices:
    """``count`` sizes up to ``images``, each the same multiple of the one before. Raises SourceError: too few images."""
    least = max(_LEAST, _LEAST_OF_CLASS * classes, round(images * _LEAST_SHARE))
    if images < _LEAST_SPAN * least:
        raise SourceError(
            f"{images} different training images of {classes} classes are too few for a learning curve, "
            f"which begins with {least} and needs {_LEAST_SPAN * least}"
        )
    found: Indices = np.unique(np.geomspace(least, images, count).round().astype(np.intp))
    return found


def _check_images(counts: Array, *, least: int) -> None:
    if counts.min() < least:
        raise SourceError(
            f"without images of val or test a learning curve holds out a part of the training images, which takes {least} "
            f"different ones of each class; one class has {counts.min()}"
        )


def nested_order(y: Array, copies: Indices, generator: np.random.Generator) -> Indices:
    """Different images in a random order of which each beginning holds every class, and shares of classes as the whole does.

    Args:
        y: (n,) labels. copies: (n,) the same value for rows of one image.

    Returns:
        Row numbers, one of each image.
    """
    _, first, image = np.unique(copies, return_index=True, return_inverse=True)
    shuffled = generator.permutation(len(first))
    key = np.empty(len(first))
    labels = y[first]
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        key[members] = (np.arange(len(members)) + generator.random()) / len(members)
    for label in np.unique(y):  # copies may be of several classes
        members = image[y == label]
        key[members[key[members].argmin()]] = -1
    order: Indices = first[np.argsort(key, kind="stable")]
    return order


# ----------------------------------------------------------------------------------------------------- twice as many


def forecast(curve: LearningCurve, *, seed: int = 0) -> Doubling:
    """What twice the images of the last size would be worth.

    The law is fitted by least squares, points weighed by their standard errors; the interval is that of fits to resampled
    draws and judges (Owen 2007). No forecast is made where the pool is a part of the images, the curve does not rise beyond its
    noise, the law explains less than nine tenths of the points' variance, or it would not have foretold the last point from
    those of half its size.
    """
    sizes, errors = curve.sizes.astype(np.float64), 1 - curve.accuracy
    noise = np.maximum(curve.standard_error, 1e-6)
    law = fit_power_law(sizes, errors[None], 1 / noise**2)
    fitted = power_law(law, sizes)[0]
    explained = _explained(errors, fitted, noise**-2)
    resampled = 1 - _resampled(curve, seed=seed)
    ends = np.array([curve.sizes[-1], 2 * curve.sizes[-1]], np.float64)
    gains = -np.diff(power_law(fit_power_law(sizes, resampled, 1 / noise**2), ends))[:, 0]
    gain = float(-np.diff(power_law(law, ends))[0, 0])
    low, high = np.quantile(gains, (0.025, 0.975)).tolist()
    refused = f"the curve ends before all {curve.total:,} training images, to save time" if curve.sampled else ""
    refused = refused or _why_not(sizes, errors, resampled, noise=noise, explained=explained)
    floor, factor, exponent = law[0].tolist()
    return Doubling(
        size=2 * int(curve.sizes[-1]),
        gain=None if refused else gain,
        low=None if refused else min(low, gain),
        high=None if refused else max(high, gain),
        floor=floor,
        factor=factor,
        exponent=exponent,
        explained=explained,
        refused=refused,
    )


def _explained(values: Array, fitted: Array, weights: Array) -> float:
    """The weighted share of the variance of ``values``."""
    spread = np.average((values - np.average(values, weights=weights)) ** 2, weights=weights)
    return float(1 - np.average((values - fitted) ** 2, weights=weights) / spread) if spread else 0.0


def _why_not(sizes: Array, errors: Array, resampled: Array, *, noise: Array, explained: float) -> str:
    """Why there should be no forecast; empty if nothing speaks against it."""
    rises = resampled[:, 0] - resampled[:, -1]
    if np.quantile(rises, 0.025) <= 0:
        return "accuracy does not rise with the training images beyond the noise of the points"
    if explained < _EXPLAINED:
        return f"a power law explains only {math.floor(100 * max(explained, 0))}% of what the points differ by"
    half = sizes <= sizes[-1] / 2
    if half.sum() >= 4:
        foretold = power_law(fit_power_law(sizes[half], resampled[:, half], noise[half] ** -2), sizes[-1:])[:, 0]
        low, high = np.quantile(foretold - resampled[:, -1], (0.025, 0.975))
        if not low <= 0 <= high:
            return "a power law through the points of up to half the images does not meet the last point"
    return ""


def _resampled(curve: LearningCurve, *, seed: int) -> Array:
    """(B, S) accuracies of draws and judges drawn with replacement."""
    generator = np.random.default_rng(seed)
    steps, draws, judges = curve.right.shape
    there, right = ~np.isnan(curve.right[0]), np.nan_to_num(curve.right)
    found = np.empty((_RESAMPLES, steps))
    for number in range(_RESAMPLES):
        of_draws = np.bincount(generator.integers(draws, size=draws), minlength=draws).astype(np.float32)
        of_judges = np.bincount(generator.integers(judges, size=judges), minlength=judges).astype(np.float32)
        weights = of_draws[:, None] * there * of_judges
        found[number] = right.reshape(steps, -1) @ weights.ravel() / max(weights.sum(), 1)
    return found


def power_law(law: Array, sizes: Array) -> Array:
    """(B, 3) floor, factor, exponent; (S,) sizes -> (B, S) errors."""
    floor, factor, exponent = law.T[:, :, None]
    found: Array = floor + factor * sizes**-exponent
    return found


def fit_power_law(sizes: Array, errors: Array, weights: Array) -> Array:
    """(B, 3): floor, factor >= 0 and exponent of the least weighted squares for each of (B, S) ``errors``.

    For each exponent of a fine grid the two others are those of a linear regression; a negative one of them is zero.
    """
    x = sizes ** -_EXPONENTS[:, None]  # (E, S)
    w = weights / weights.sum()
    mean_x, mean_e = x @ w, errors @ w  # (E,), (B,)
    spread = (x**2) @ w - mean_x**2
    together = (errors * w) @ x.T - mean_e[:, None] * mean_x  # (B, E)
    factor = np.maximum(together / spread, 0)
    floor = mean_e[:, None] - factor * mean_x
    through_zero = ((errors * w) @ x.T) / ((x**2) @ w)  # where the floor would be negative
    factor = np.where(floor < 0, through_zero, factor)
    floor = np.maximum(floor, 0)
    left = ((floor[..., None] + factor[..., None] * x - errors[:, None, :]) ** 2) @ w  # (B, E)
    best = left.argmin(axis=1)
    picked = np.arange(len(errors)), best
    return np.column_stack([floor[picked], factor[picked], _EXPONENTS[best]])
