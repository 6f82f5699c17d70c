"""Logistic regression on embeddings: scikit-learn's, with C and the scaling chosen by stratified cross-validation.

In: features (N, D) and labels, of training rows alone. Out: a ``FittedHead``. ``logreg_path.py`` solves; scikit-learn scales
the features, has the last word on the head, and takes over where ``logreg_path.py`` fails.
"""

import functools
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from joblib import cpu_count
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from threadpoolctl import threadpool_limits

from featcache.errors import UsageError
from featcache.heads.head import SCALINGS, Array, FeatureSource, FittedHead, Head, Scaling, class_weights, softmax
from featcache.heads.logreg_path import NotSolvedError, eigenbasis, regularisation_path
from featcache.heads.metrics import accuracy, log_loss
from featcache.system.memory import available_memory

log = logging.getLogger("featcache")

Grid = tuple[float, ...]
C_GRID: Grid = tuple(float(10.0**k) for k in range(-5, 6))
_MAX_ITERATIONS = 1000
_MAX_FLOAT64_BYTES = 2**30
_MAX_FLOAT64_SOLVED = 2**21  # values; more are solved in float32, twice as fast and accurate enough to start from
# Of the last fit, as a share of the objective; while choosing, regularisation_path's own is enough. Small data pay nothing
# for a solution in which scikit-learn finds nothing left to do.
_FINAL_TOLERANCE, _FINAL_TOLERANCE_OF_SMALL = 3e-5, 1e-8
_FAILURES = (NotSolvedError, np.linalg.LinAlgError)

Curve = list[dict[str, Any]]  # scores per setting, as ``FittedHead.curve`` holds them
_Solution = tuple[Array, Array]  # (K, D) weights and (K,) intercepts
_Scored = tuple[float, float, _Solution | None]  # accuracy, log loss, and the solution if it is kept


def fit_logreg(
    features: FeatureSource,
    rows: Array,
    y: Array,
    *,
    grid: Grid = C_GRID,
    folds: int = 5,
    balanced: bool = False,
    seed: int = 0,
) -> FittedHead:
    """Choose C and scaling on ``rows`` by cross-validation, then refit on all of them.

    The setting with the best mean out-of-fold accuracy wins; of equals, the one with the lowest log loss.

    Args:
        features: (M, D). rows: numbers of the N training rows. y: (N,) labels from 0, each occurring.
        grid: of C, the inverse regularisation strength as in scikit-learn, ascending.
        folds: of the cross-validation; 0 for none: then the first C of ``grid`` and the scaling "standardise" are taken.
        balanced: weigh classes inversely to their frequency.
        seed: of the folds.

    Raises:
        UsageError: not enough memory.
    """
    _check_memory(len(rows), features.shape[1])
    X = features[rows]
    X = X.astype(np.float64 if X.size * 8 <= _MAX_FLOAT64_BYTES else np.float32)
    solver = Solver(X, y, grid=grid, balanced=balanced)
    curve = solver.cross_validate(folds=folds, seed=seed) if folds else []
    best: dict[str, Any] = {"C": grid[0], "scaling": "standardise", "fold_accuracies": ()}
    best = max(curve, key=lambda entry: (round(entry["accuracy"], 9), -entry["log_loss"]), default=best)
    pipeline, converged = solver.fit(best["scaling"], best["C"])
    notes = _notes_on_choice(curve, best, grid)
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


class Solver:
    """Logistic regression on N rows: ``cross_validate`` scores settings, ``fit`` starts from what that has found.

    Attributes:
        X: (N, D) float32 or float64. y: (N,) labels 0..K-1, each occurring.
        grid: of C, ascending. balanced: weigh classes inversely to their frequency.
        tolerance: of solutions while settings are compared, see ``regularisation_path``.
        bases: per scaling, a basis of all rows that suits every fold; None where there is none.
        starts: per (scaling, C), the mean of the folds' solutions, if those fit in ``memory``, in bytes.
    """

    def __init__(
        self, X: Array, y: Array, *, grid: Grid, balanced: bool = False, tolerance: float = 2e-4, memory: int = 2**28
    ) -> None:
        self.X, self.y, self.grid, self.balanced = X, y, grid, balanced
        self.tolerance, self.memory = tolerance, memory
        self.n_classes = int(y.max()) + 1
        self.dtype = np.dtype(np.float64 if X.size <= _MAX_FLOAT64_SOLVED else np.float32)
        self.bases: dict[Scaling, Array | None] = {}
        self.starts: dict[tuple[Scaling, float], _Solution] = {}

    def cross_validate(self, *, folds: int, seed: int = 0, scalings: Sequence[Scaling] = SCALINGS) -> Curve:
        """Mean out-of-fold scores of every (scaling, C)."""
        splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(self.X, self.y))
        # A square basis is only a rotation and may come from all rows; a narrower one is each fold's own.
        square = min(len(train) for train, _ in splits) >= self.X.shape[1]
        self.bases = {scaling: self._basis(scaling) if square else None for scaling in scalings}
        solution_bytes = self.n_classes * self.X.shape[1] * self.dtype.itemsize
        keep = len(scalings) * folds * len(self.grid) * solution_bytes <= self.memory
        jobs = [(scaling, *split) for scaling in scalings for split in splits]
        # Threads: the work is in BLAS, which frees the GIL, and X is not copied. One BLAS thread each, or they would fight.
        # Not joblib's: those need semaphores, and with them a shared-memory file system that can be written.
        with threadpool_limits(1), ThreadPoolExecutor(cpu_count()) as pool:
            results = list(pool.map(functools.partial(self._fold, keep=keep), *zip(*jobs, strict=True)))
        curve = []
        for number, scaling in enumerate(scalings):
            of_folds = results[number * folds : (number + 1) * folds]
            for C, scored in zip(self.grid, zip(*of_folds, strict=True), strict=True):
                accuracies, losses, solutions = zip(*scored, strict=True)
                if keep:
                    weights, intercepts = zip(*solutions, strict=True)
                    self.starts[scaling, C] = np.mean(weights, axis=0), np.mean(intercepts, axis=0)
                scores = {"accuracy": float(np.mean(accuracies)), "log_loss": float(np.mean(losses))}
                curve.append({"scaling": scaling, "C": C, **scores, "fold_accuracies": list(accuracies)})
        return curve

    def _basis(self, scaling: Scaling) -> Array | None:
        try:
            return eigenbasis(_scaler(scaling).fit_transform(self.X.astype(self.dtype, copy=False)))
        except _FAILURES:
            return None

    def _fold(self, scaling: Scaling, train: Array, held_out: Array, *, keep: bool) -> list[_Scored]:
        """Scores on one held-out fold along the grid of C."""
        scaler, y, y_held_out = _scaler(scaling), self.y[train], self.y[held_out]
        X = scaler.fit_transform(self.X[train].astype(self.dtype, copy=False))
        X_held_out = scaler.transform(self.X[held_out].astype(self.dtype, copy=False))

        def scored(solutions: Iterable[_Solution]) -> list[_Scored]:  # each at once: together they may be large
            return [(*_scores(X_held_out @ W.T + b, y_held_out), (W, b) if keep else None) for W, b in solutions]

        try:
            return scored(self._path(X, y, self.grid, basis=self.bases[scaling], tolerance=self.tolerance))
        except _FAILURES as error:
            log.info("scikit-learn's solver takes over in one fold (%s)", error)
            return scored(self._path_of_scikit_learn(X, y))

    def fit(self, scaling: Scaling, C: float) -> tuple[Any, bool]:
        """A (scaler, LogisticRegression) pipeline fitted on all rows, and whether its solver converged.

        scikit-learn starts from our solution. It finds nothing left to do, or does it: the head is what it ends with.
        """
        scaler, classifier = _scaler(scaling), self._classifier(C)
        X = scaler.fit_transform(self.X)
        start, basis = self.starts.get((scaling, C)), self.bases.get(scaling)
        grid = (C,) if start else (C / 100, C)  # from zero by way of a stronger penalty, where the way is shorter
        tolerance = _FINAL_TOLERANCE_OF_SMALL if self.dtype == np.float64 else _FINAL_TOLERANCE
        try:
            x = X.astype(self.dtype, copy=False)
            *_, (W, b) = self._path(x, self.y, grid, basis=basis, tolerance=tolerance, start=start)
            classifier.set_params(warm_start=True)
            classifier.coef_, classifier.intercept_ = W.astype(X.dtype), b.astype(X.dtype)
        except _FAILURES as error:
            log.info("scikit-learn's solver takes over (%s)", error)
        _fit_quietly(classifier, X, self.y)
        classifier.set_params(warm_start=False)
        return make_pipeline(scaler, classifier), bool(classifier.n_iter_.max() < _MAX_ITERATIONS)

    def _path(self, X: Array, y: Array, grid: Grid, **options: Any) -> Iterator[_Solution]:
        return regularisation_path(X, y, class_weights(y, self.n_classes, balanced=self.balanced), grid, **options)

    def _path_of_scikit_learn(self, X: Array, y: Array) -> Iterator[_Solution]:
        classifier = self._classifier(self.grid[0]).set_params(warm_start=True)
        for C in self.grid:
            _fit_quietly(classifier.set_params(C=C), X, y)
            yield classifier.coef_, classifier.intercept_

    def _classifier(self, C: float) -> LogisticRegression:
        return LogisticRegression(C=C, class_weight="balanced" if self.balanced else None, max_iter=_MAX_ITERATIONS)


def _scaler(scaling: Scaling) -> Any:
    if scaling == "standardise":
        return StandardScaler()
    return Normalizer() if scaling == "unit" else FunctionTransformer()


def _scores(logits: Array, y: Array) -> tuple[float, float]:
    logits = np.column_stack([-logits / 2, logits / 2]) if logits.shape[1] == 1 else logits
    probabilities = softmax(logits)
    return accuracy(y, probabilities), log_loss(y, probabilities)


def _fit_quietly(classifier: LogisticRegression, X: Array, y: Array) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as a note
        classifier.fit(X, y)


def _notes_on_choice(curve: Curve, best: dict[str, Any], grid: Grid) -> list[str]:
    within = [entry["accuracy"] for entry in curve if entry["C"] not in (grid[0], grid[-1])]
    if not within or best["accuracy"] <= max(within) + 1e-9:  # what ties, as all does on separable data, lacks nothing
        return []
    return [f"the best C, {best['C']:g}, lies on the edge of the grid {grid[0]:g} to {grid[-1]:g}; try --C beyond it"]


def _check_memory(n: int, dim: int) -> None:
    """Refuse what would end in swapping or a kill: features, and per thread a fold's rows scaled and rotated."""
    size = 4 * n * dim
    needed = size * max(4, 1 + 3 * min(cpu_count(), 15)) if size * 2 > _MAX_FLOAT64_BYTES else 0
    if sys.platform == "linux" and needed > (free := available_memory()):
        raise UsageError(
            f"logreg needs about {needed / 1e9:.0f} GB for {n:,} x {dim:,} in memory, {free / 1e9:.0f} GB are free; "
            "use --clf linear, which reads from the cache in blocks"
        )
