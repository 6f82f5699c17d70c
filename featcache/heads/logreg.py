"""Logistic regression on embeddings: scikit-learn's, with C and the scaling chosen by stratified cross-validation.

In: features (N, D) and labels. Out: a ``FittedHead``. Only training rows ever come in here. ``multinomial.py`` does the
work; scikit-learn scales, has the last word on the head, and takes over should that ever fail.
"""

import itertools
import logging
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from joblib import cpu_count
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from threadpoolctl import threadpool_limits

from featcache.errors import UsageError
from featcache.heads.head import (
    SCALINGS,
    Array,
    FeatureSource,
    FittedHead,
    Head,
    Indices,
    Scaling,
    class_weights,
    softmax,
)
from featcache.heads.logreg_path import NotSolvedError, eigenbasis, regularisation_path
from featcache.heads.metrics import accuracy, log_loss
from featcache.system.memory import available_memory

log = logging.getLogger("featcache")

C_GRID = tuple(float(10.0**k) for k in range(-5, 6))
_MAX_ITERATIONS = 1000
_MAX_FLOAT64_BYTES = 2**30
_MAX_FLOAT64_SOLVED = 2**21  # values; more are solved in float32, twice as fast and accurate enough to start from
# Of the last fit, as a share of the objective; while choosing, regularisation_path's own is enough. Small data pay nothing
# for a solution in which scikit-learn finds nothing left to do.
_FINAL_TOLERANCE, _FINAL_TOLERANCE_OF_SMALL = 3e-5, 1e-8
_MAX_KEPT_BYTES = 2**28  # of the folds' solutions, which the last fit starts from

_Solution = tuple[Array, Array]  # (K, D) weights and (K,) intercepts


class CrossValidation(NamedTuple):
    """Scores as ``FittedHead.curve`` holds them, and what spares the last fit work: a basis for each scaling, and the mean of
    the folds' solutions for each setting, as far as they were kept.
    """

    curve: list[dict[str, Any]]
    bases: dict[Scaling, Array | None]
    starts: dict[tuple[Scaling, float], _Solution]


_UNTRIED = CrossValidation([], {}, {})


def fit_logreg(
    features: FeatureSource,
    rows: Indices,
    y: Array,
    *,
    C: float | None = None,
    folds: int = 5,
    balanced: bool = False,
    seed: int = 0,
) -> FittedHead:
    """Choose C and scaling on ``rows`` by cross-validation, then refit on all of them.

    The setting with the best mean out-of-fold accuracy wins; of equals, the one with the lowest log loss.

    Args:
        features: (M, D), an array or a reader of a cache. rows: the N training rows of it. y: (N,) labels from 0,
            each occurring.
        C: inverse regularisation strength as in scikit-learn; chosen from ``C_GRID`` when None.
        folds: of the cross-validation; 0 for none (needs ``C``; the scaling is then "standardise").
        balanced: weigh classes inversely to their frequency.
        seed: of the folds.

    Raises:
        UsageError: not enough memory.
    """
    _check_memory(len(rows), features.shape[1])
    X = features[rows]
    X = X.astype(np.float64 if X.size * 8 <= _MAX_FLOAT64_BYTES else np.float32)
    grid = C_GRID if C is None else (C,)
    tried = cross_validate(X, y, grid, folds=folds, balanced=balanced, seed=seed) if folds else _UNTRIED
    if curve := tried.curve:
        best = max(curve, key=lambda entry: (round(entry["accuracy"], 9), -entry["log_loss"]))
    else:
        best = {"C": grid[0], "scaling": "standardise", "fold_accuracies": ()}
    pipeline, converged = _fit(X, y, best["scaling"], best["C"], balanced, tried)
    notes = []
    within = [entry["accuracy"] for entry in curve if entry["C"] not in (grid[0], grid[-1])]
    if within and best["accuracy"] > max(within) + 1e-9:  # what ties, as all does on separable data, lacks nothing
        notes.append(
            f"the best C, {best['C']:g}, lies on the edge of the grid {grid[0]:g} to {grid[-1]:g}; try --C beyond it"
        )
    if not converged:
        notes.append(f"lbfgs did not converge in {_MAX_ITERATIONS} iterations; a smaller --C would")
    return FittedHead(
        head=head_of(pipeline, best["scaling"]),
        fold_accuracies=tuple(best["fold_accuracies"]),
        chosen={"C": best["C"], "scaling": best["scaling"]},
        curve=curve,
        notes=tuple(notes),
        pipeline=pipeline,
    )


def head_of(pipeline: Any, scaling: Scaling) -> Head:
    """The head that computes what a fitted (scaler, LogisticRegression) pipeline computes."""
    scaler, classifier = pipeline[0], pipeline[-1]
    weight, bias = classifier.coef_, classifier.intercept_
    if len(weight) == 1:  # scikit-learn keeps one row for two classes; softmax wants two
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    dim = weight.shape[1]
    mean, scale = (scaler.mean_, scaler.scale_) if scaling == "standardise" else (np.zeros(dim), np.ones(dim))
    return Head("logreg", scaling, mean, scale, ((weight, bias),))


def cross_validate(
    X: Array,
    y: Array,
    grid: tuple[float, ...],
    *,
    folds: int,
    balanced: bool = False,
    seed: int = 0,
    scalings: tuple[Scaling, ...] = SCALINGS,
    tolerance: float = 2e-4,
) -> CrossValidation:
    """Mean out-of-fold scores of every (scaling, C)."""
    X = _for_solver(X)
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(X, y))
    # A square basis is only a rotation and may come from all rows, once per scaling; a narrower one is each fold's own.
    square = min(len(train) for train, _ in splits) >= X.shape[1]
    bases = {scaling: _basis(X, scaling) if square else None for scaling in scalings}
    kept = len(scalings) * folds * len(grid) * (int(y.max()) + 1) * X.shape[1] * X.itemsize <= _MAX_KEPT_BYTES
    # Threads: the work is in BLAS, which frees the GIL, and X is not copied. One BLAS thread each, or they would fight.
    # Not joblib's: those need semaphores, and with them a shared-memory file system that can be written.
    with threadpool_limits(1), ThreadPoolExecutor(cpu_count()) as pool:
        running = [
            pool.submit(_fold, X, y, scaling, train, held_out, grid, balanced, bases[scaling], tolerance, kept)
            for scaling, (train, held_out) in itertools.product(scalings, splits)
        ]
        try:
            results = [fold.result() for fold in running]
        finally:
            pool.shutdown(cancel_futures=True)
    curve, starts = [], {}
    for s, scaling in enumerate(scalings):
        for c, C in enumerate(grid):
            accuracies, losses, solutions = zip(
                *(fold[c] for fold in results[s * folds : (s + 1) * folds]), strict=True
            )
            if kept:
                weights, intercepts = zip(*solutions, strict=True)
                starts[scaling, C] = np.mean(weights, axis=0), np.mean(intercepts, axis=0)
            curve.append(
                {
                    "scaling": scaling,
                    "C": C,
                    "accuracy": float(np.mean(accuracies)),
                    "log_loss": float(np.mean(losses)),
                    "fold_accuracies": list(accuracies),
                }
            )
    return CrossValidation(curve, bases, starts)


def _for_solver(X: Array) -> Array:
    return X.astype(np.float64 if X.size <= _MAX_FLOAT64_SOLVED else np.float32, copy=False)


def _basis(X: Array, scaling: Scaling) -> Array | None:
    try:
        return eigenbasis(_scaler(scaling).fit_transform(X))
    except (NotSolvedError, np.linalg.LinAlgError):
        return None


def _fold(
    X: Array,
    y: Array,
    scaling: Scaling,
    train: Array,
    held_out: Array,
    grid: tuple[float, ...],
    balanced: bool,
    basis: Array | None,
    tolerance: float,
    kept: bool,
) -> list[tuple[float, float, _Solution | None]]:
    """(accuracy, log loss, solution if it is kept) on one held-out fold along the grid of C."""
    scaler = _scaler(scaling)
    X_train, X_held_out = scaler.fit_transform(X[train]), scaler.transform(X[held_out])
    weights = class_weights(y[train], int(y.max()) + 1, balanced)
    scores: list[tuple[float, float, _Solution | None]] = []
    try:
        for W, b in regularisation_path(X_train, y[train], weights, grid, basis=basis, tolerance=tolerance):
            scores.append((*_scores(X_held_out @ W.T + b, y[held_out]), (W, b) if kept else None))
    except (NotSolvedError, np.linalg.LinAlgError) as error:
        log.info("scikit-learn's solver takes over in one fold (%s)", error)
        scores = []
        classifier = _classifier(grid[0], balanced, warm_start=True)
        for C in grid:
            _quietly(classifier.set_params(C=C), X_train, y[train])
            W, b = classifier.coef_, classifier.intercept_
            scores.append((*_scores(X_held_out @ W.T + b, y[held_out]), (W, b) if kept else None))
    return scores


def _scores(logits: Array, y: Array) -> tuple[float, float]:
    logits = np.column_stack([-logits / 2, logits / 2]) if logits.shape[1] == 1 else logits
    probabilities = softmax(logits)
    return accuracy(y, probabilities), log_loss(y, probabilities)


def _fit(
    X: Array, y: Array, scaling: Scaling, C: float, balanced: bool, tried: CrossValidation = _UNTRIED
) -> tuple[Any, bool]:
    """A fitted (scaler, LogisticRegression) pipeline, and whether its solver converged.

    scikit-learn starts from our solution. It finds nothing left to do, or does it: the head is what it ends with.
    """
    scaler = _scaler(scaling)
    X = scaler.fit_transform(X)
    classifier = _classifier(C, balanced)
    weights = class_weights(y, int(y.max()) + 1, balanced)
    try:
        start, basis = tried.starts.get((scaling, C)), tried.bases.get(scaling)
        grid = (C,) if start else (C / 100, C)  # from zero by way of a stronger penalty, where the way is shorter
        tolerance = _FINAL_TOLERANCE_OF_SMALL if X.size <= _MAX_FLOAT64_SOLVED else _FINAL_TOLERANCE
        path = regularisation_path(_for_solver(X), y, weights, grid, basis=basis, tolerance=tolerance, start=start)
        *_, (W, b) = path
        classifier.set_params(warm_start=True)
        classifier.coef_, classifier.intercept_ = W.astype(X.dtype), b.astype(X.dtype)
    except (NotSolvedError, np.linalg.LinAlgError) as error:
        log.info("scikit-learn's solver takes over (%s)", error)
    _quietly(classifier, X, y)
    classifier.set_params(warm_start=False)
    return make_pipeline(scaler, classifier), bool(classifier.n_iter_.max() < _MAX_ITERATIONS)


def _quietly(classifier: LogisticRegression, X: Array, y: Array) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as a note
        classifier.fit(X, y)


def _scaler(scaling: Scaling) -> Any:
    if scaling == "standardise":
        return StandardScaler()
    return Normalizer() if scaling == "unit" else FunctionTransformer()


def _classifier(C: float, balanced: bool, **options: Any) -> LogisticRegression:
    return LogisticRegression(C=C, class_weight="balanced" if balanced else None, max_iter=_MAX_ITERATIONS, **options)


def _check_memory(n: int, dim: int) -> None:
    """Refuse what would end in swapping or a kill: features, and per thread a fold's rows scaled and rotated."""
    size = 4 * n * dim
    needed = size * max(4, 1 + 3 * min(cpu_count(), 15)) if size * 2 > _MAX_FLOAT64_BYTES else 0
    if sys.platform == "linux" and needed > (free := available_memory()):
        raise UsageError(
            f"logreg needs about {needed / 1e9:.0f} GB for {n:,} x {dim:,} in memory, {free / 1e9:.0f} GB are free; "
            "use --clf linear, which reads from the cache in blocks"
        )
