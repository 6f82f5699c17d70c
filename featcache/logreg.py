"""Logistic regression on embeddings: scikit-learn's, with C and the scaling chosen by stratified cross-validation.

In: features (N, D) and labels. Out: a ``FittedHead``. Only training rows ever come in here.
"""

import itertools
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from threadpoolctl import threadpool_limits

from featcache.heads import SCALINGS, Array, FittedHead, Head, Scaling, softmax
from featcache.metrics import accuracy, log_loss

C_GRID = tuple(float(10.0**k) for k in range(-5, 6))
_MAX_ITERATIONS = 1000
_MAX_FLOAT64_BYTES = 2**30


def fit_logreg(
    features: Array,
    rows: npt.NDArray[np.intp],
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
        features: (M, D), possibly memory-mapped. rows: the N training rows of it. y: (N,) labels from 0,
            each occurring.
        C: inverse regularisation strength as in scikit-learn; chosen from ``C_GRID`` when None.
        folds: of the cross-validation; 0 for none (needs ``C``; the scaling is then "standardise").
        balanced: weigh classes inversely to their frequency.
        seed: of the folds.
    """
    X = features[rows]
    X = X.astype(np.float64 if X.size * 8 <= _MAX_FLOAT64_BYTES else np.float32)
    grid = C_GRID if C is None else (C,)
    curve = _cross_validate(X, y, grid, folds, balanced, seed) if folds else []
    if curve:
        best = max(curve, key=lambda entry: (round(entry["accuracy"], 9), -entry["log_loss"]))
    else:
        best = {"C": grid[0], "scaling": "standardise", "fold_accuracies": ()}
    pipeline, converged = _fit(X, y, best["scaling"], best["C"], balanced)
    notes = []
    if len(grid) > 1 and best["C"] in (grid[0], grid[-1]):
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


def _fit(X: Array, y: Array, scaling: Scaling, C: float, balanced: bool) -> tuple[Any, bool]:
    pipeline = make_pipeline(_scaler(scaling), _classifier(C, balanced))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as a note
        pipeline.fit(X, y)
    return pipeline, bool(pipeline[-1].n_iter_.max() < _MAX_ITERATIONS)


def _scaler(scaling: Scaling) -> Any:
    if scaling == "standardise":
        return StandardScaler()
    return Normalizer() if scaling == "unit" else FunctionTransformer()


def _classifier(C: float, balanced: bool, **options: Any) -> LogisticRegression:
    return LogisticRegression(C=C, class_weight="balanced" if balanced else None, max_iter=_MAX_ITERATIONS, **options)


def _cross_validate(
    X: Array, y: Array, grid: tuple[float, ...], folds: int, balanced: bool, seed: int
) -> list[dict[str, Any]]:
    """Mean out-of-fold scores of every (scaling, C)."""
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(X, y))
    jobs = list(itertools.product(SCALINGS, splits))
    # Threads: the work is in BLAS, which frees the GIL, and X is not copied. One BLAS thread each, or they would fight.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        results = Parallel(n_jobs=-1, prefer="threads")(
            delayed(_path)(X, y, scaling, train, held_out, grid, balanced) for scaling, (train, held_out) in jobs
        )
    curve = []
    for s, scaling in enumerate(SCALINGS):
        scores = np.array(results[s * folds : (s + 1) * folds])  # (folds, len(grid), 2)
        for c, C in enumerate(grid):
            accuracies, losses = scores[:, c, 0], scores[:, c, 1]
            curve.append(
                {
                    "scaling": scaling,
                    "C": C,
                    "accuracy": float(accuracies.mean()),
                    "log_loss": float(losses.mean()),
                    "fold_accuracies": accuracies.tolist(),
                }
            )
    return curve


def _path(
    X: Array,
    y: Array,
    scaling: Scaling,
    train: Array,
    held_out: Array,
    grid: tuple[float, ...],
    balanced: bool,
) -> list[tuple[float, float]]:
    """(accuracy, log loss) on one held-out fold along the grid of C, each fit starting where the one before ended."""
    scaler = _scaler(scaling).fit(X[train])
    X_train, X_held_out = scaler.transform(X[train]), scaler.transform(X[held_out])
    classifier = _classifier(grid[0], balanced, warm_start=True)
    scores = []
    for C in grid:
        classifier.set_params(C=C).fit(X_train, y[train])
        logits = classifier.decision_function(X_held_out)
        logits = np.column_stack([-logits / 2, logits / 2]) if logits.ndim == 1 else logits
        probabilities = softmax(logits)
        scores.append((accuracy(y[held_out], probabilities), log_loss(y[held_out], probabilities)))
    return scores
