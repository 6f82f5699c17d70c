"""Logistic regression on embeddings: scikit-learn's, with C and the scaling chosen by stratified cross-validation.

In: features (N, D) and labels, of training rows alone. Out: a ``FittedHead``. ``logreg_path.py`` solves; scikit-learn scales
the features, has the last word on the head, and takes over where ``logreg_path.py`` fails.
"""

import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from joblib import cpu_count
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from threadpoolctl import threadpool_limits

from featcache.errors import UsageError
from featcache.heads.head import (
    MAX_LOGITS,
    SCALINGS,
    Array,
    FeatureSource,
    FittedHead,
    Head,
    Indices,
    Scaling,
    class_weights,
)
from featcache.heads.logreg_path import NotSolvedError, eigenbasis, orthonormalised, regularisation_path, with_direction
from featcache.heads.validation import OutOfFold, fit_temperature, judge, stratified_folds
from featcache.system.memory import available_memory

log = logging.getLogger("featcache")

Grid = tuple[float, ...]
C_GRID: Grid = tuple(float(10.0**k) for k in range(-5, 6))
_MAX_ITERATIONS = 1000
_MAX_FLOAT64_BYTES = 2**30
_MAX_SHARED_BYTES = 2**29  # of X; more is not rotated once for all folds, which takes memory
_CHOOSING = np.float32  # while settings are compared: as good, and twice as fast
_MAX_FLOAT64_SOLVED = 2**21  # values; more are solved in float32, twice as fast and accurate enough to start from
# Of the last fit, as a share of the objective; while choosing, regularisation_path's own is enough. Small data pay nothing
# for a solution in which scikit-learn finds nothing left to do.
_FINAL_TOLERANCE, _FINAL_TOLERANCE_OF_SMALL = 3e-5, 1e-8
_MAX_RATIO = 10  # of scales of features, those of all rows to those of a fold's: beyond, a basis of its own is surer
_FAILURES = (NotSolvedError, np.linalg.LinAlgError)

Curve = list[dict[str, Any]]  # scores per setting, as ``FittedHead.curve`` holds them
Setting = tuple[Scaling, float]  # and C
Split = tuple[Indices, Indices]  # rows that train, rows held out
_Solution = tuple[Array, Array]  # (K, D) weights and (K,) intercepts
_Result = tuple[float, Array, _Solution]  # C, (m, K) logits of rows held out, and the solution that gave them


def fit_logreg(
    features: FeatureSource,
    rows: Array,
    y: Array,
    *,
    grid: Grid = C_GRID,
    folds: int = 5,
    balanced: bool = False,
    seed: int = 0,
    copies: Indices | None = None,
    max_logits: int = MAX_LOGITS,
) -> FittedHead:
    """Choose C and scaling on ``rows`` by cross-validation, then refit on all of them.

    ``OutOfFold.best`` says which setting wins. Its weights are divided by the temperature of its out-of-fold logits.

    Args:
        features: (M, D). rows: numbers of the N training rows. y: (N,) labels from 0, each occurring.
        grid: of C, the inverse regularisation strength as in scikit-learn, ascending.
        folds: of the cross-validation; 0 for none: then the first C of ``grid`` and the scaling "standardise" are taken.
        balanced: weigh classes inversely to their frequency.
        seed: of the folds and of the correction for the choice.
        copies: (N,) which of the N rows are copies, as ``stratified_folds`` wants it; None: none are.
        max_logits: out of fold, that are kept; of more, those of some rows.

    Raises:
        UsageError: not enough memory.
    """
    _check_memory(len(rows), features.shape[1])
    X = features[rows]
    X = X.astype(np.float64 if X.size * 8 <= _MAX_FLOAT64_BYTES else np.float32)
    solver = Solver(X, y, grid=grid, balanced=balanced)
    copies = np.arange(len(rows)) if copies is None else copies
    best: dict[str, Any] = {"C": grid[0], "scaling": "standardise", "fold_accuracies": ()}
    temperature = 1.0
    curve: Curve = []
    validation: dict[str, Any] = {}
    if folds:
        splits = stratified_folds(y, copies, folds=folds, seed=seed)
        found = solver.cross_validate(splits)
        curve = _curve(found, solver.settings)
        best = curve[found.best(np.ones((1, len(y))), copies)[0]]
        logits = solver.out_of_fold(splits, (best["scaling"], best["C"]))
        temperature, change = fit_temperature(y, logits, found.fold)
        validation["cv_accuracy"], log_loss = found.corrected(copies, seed=seed)
        validation["cv_log_loss"] = log_loss + change
        stride = -(-logits.size // max_logits)
        validation["out_of_fold"] = logits[::stride] / temperature
        validation["kept"] = np.arange(0, len(y), stride) if stride > 1 else None
    pipeline, converged = solver.fit(best["scaling"], best["C"])
    for parameters in (pipeline[-1].coef_, pipeline[-1].intercept_):
        parameters /= temperature
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
        temperature=temperature,
        **validation,
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
        settings: every (scaling, C), in the order of the results of ``cross_validate``.
        scale: (D,) of the features, over all rows.
        rotated: per scaling, all rows in that basis; None where folds scale rows differently.
        solutions: per setting, what each fold ended with, if all those fit in ``memory``, in bytes.
    """

    def __init__(
        self,
        X: Array,
        y: Array,
        *,
        grid: Grid,
        scalings: Sequence[Scaling] = SCALINGS,
        balanced: bool = False,
        tolerance: float = 2e-4,
        memory: int = 2**28,
    ) -> None:
        self.X, self.y, self.grid, self.balanced = X, y, grid, balanced
        self.settings: list[Setting] = list(itertools.product(scalings, grid))
        self.tolerance, self.memory = tolerance, memory
        self.n_classes = int(y.max()) + 1
        self.dtype = np.dtype(np.float64 if X.size <= _MAX_FLOAT64_SOLVED else np.float32)
        self.bases: dict[Scaling, Array | None] = {}
        self.rotated: dict[Scaling, Array | None] = {}
        self.scale: Array = np.ones(X.shape[1])
        self.solutions: dict[Setting, list[_Solution]] = {}

    def cross_validate(self, splits: Sequence[Split]) -> OutOfFold:
        """Out-of-fold results of every setting."""
        scalings = list(dict.fromkeys(scaling for scaling, _ in self.settings))
        self.scale = StandardScaler().fit(self.X).scale_
        # Rows of unit length lie in the span of the rows as they are, of which a basis suits them nearly as well as their own.
        kinds: list[Scaling] = sorted({"standardise" if scaling == "standardise" else "none" for scaling in scalings})
        with threadpool_limits(1), ThreadPoolExecutor(cpu_count()) as pool:
            found = dict(zip(kinds, pool.map(self._basis, kinds), strict=True))
            self.bases = {scaling: found["standardise" if scaling == "standardise" else "none"] for scaling in scalings}
            if self.X.nbytes <= _MAX_SHARED_BYTES:
                self.rotated = dict(zip(scalings, pool.map(self._rotated, scalings), strict=True))
        solution_bytes = self.n_classes * self.X.shape[1] * np.dtype(_CHOOSING).itemsize
        keep = len(self.settings) * len(splits) * solution_bytes <= self.memory
        shape = (len(self.y), len(self.settings))
        right, loss = np.empty(shape, bool), np.empty(shape, _CHOOSING)
        fold = np.empty(len(self.y), np.intp)
        for number, (_, held_out) in enumerate(splits):
            fold[held_out] = number

        def one(scaling: Scaling, split: Split) -> dict[Setting, _Solution]:
            kept, held_out = {}, split[1]
            for C, logits, solution in self._fold(
                scaling, split, self.grid
            ):  # each at once: together they may be large
                number = self.settings.index((scaling, C))
                right[held_out, number], loss[held_out, number] = judge(self.y[held_out], logits)
                if keep:
                    kept[scaling, C] = solution
            return kept

        jobs = [(scaling, split) for scaling in scalings for split in splits]
        # Threads: the work is in BLAS, which frees the GIL, and X is not copied. One BLAS thread each, or they would fight.
        # Not joblib's: those need semaphores, and with them a shared-memory file system that can be written.
        with threadpool_limits(1), ThreadPoolExecutor(cpu_count()) as pool:
            for kept in pool.map(one, *zip(*jobs, strict=True)):
                for setting, solution in kept.items():
                    self.solutions.setdefault(setting, []).append(solution)
        return OutOfFold(right, loss, fold, path=np.repeat(np.arange(len(scalings)), len(self.grid)))

    def out_of_fold(self, splits: Sequence[Split], setting: Setting) -> Array:
        """(N, K) logits of each row from its fold's solution, to the bit those that ``cross_validate`` judged."""
        scaling, C = setting
        logits = np.empty((len(self.y), self.n_classes), _CHOOSING)
        for number, (train, held_out) in enumerate(splits):
            if setting in self.solutions:
                *_, X = self._scaled(scaling, train, held_out)
                logits[held_out] = _logits(X, *self.solutions[setting][number])
            else:  # along the same path, since where it starts decides where it ends
                grid = self.grid[: self.grid.index(C) + 1]
                *_, (_, logits[held_out], _) = self._fold(scaling, (train, held_out), grid)
        return logits

    def _basis(self, scaling: Scaling) -> Array | None:
        try:
            X = _scaler(scaling).fit_transform(self.X.astype(self.dtype, copy=False))
            return eigenbasis(X) if scaling == "standardise" else with_direction(eigenbasis(X), X.mean(axis=0))
        except _FAILURES:
            return None

    def _basis_of_fold(self, scaling: Scaling, scaler: Any) -> Array | None:
        """The basis of all rows, which spans those of a fold, too; where these have scales of their own, made to span them."""
        basis = self.bases[scaling]
        if basis is None or scaling != "standardise" or basis.shape[0] == basis.shape[1]:
            return None if basis is None else basis.astype(_CHOOSING, copy=False)
        ratio = self.scale / scaler.scale_
        if ratio.max() > _MAX_RATIO * ratio.min():
            return None
        return orthonormalised((basis * ratio[:, None]).astype(_CHOOSING))

    def _rotated(self, scaling: Scaling) -> Array | None:
        """All rows in their basis, if the scaling of a row is the same in every fold."""
        basis = self.bases[scaling]
        if basis is None or scaling == "standardise":
            return None
        X = _scaler(scaling).fit_transform(self.X).astype(_CHOOSING)
        rotated: Array = (X - X.mean(axis=0)) @ basis.astype(_CHOOSING)
        return rotated

    def _scaled(self, scaling: Scaling, train: Indices, held_out: Indices) -> tuple[Any, Array, Array]:
        """The scaler of a fold, its rows that train and its rows held out."""
        scaler = _scaler(scaling)
        X = scaler.fit_transform(self.X[train].astype(_CHOOSING, copy=False))
        return scaler, X, scaler.transform(self.X[held_out].astype(_CHOOSING, copy=False))

    def _fold(self, scaling: Scaling, split: Split, grid: Grid) -> Iterator[_Result]:
        """Results on one held-out fold along a grid of C; from its beginning again if another solver has to take over."""
        y, (scaler, X, X_held_out) = self.y[split[0]], self._scaled(scaling, *split)
        try:
            basis, rotated = self._basis_of_fold(scaling, scaler), self.rotated.get(scaling)
            shared = None if rotated is None else rotated[split[0]]
            path = self._path(X, y, grid, basis=basis, rotated=shared, tolerance=self.tolerance)
            for C, solution in zip(grid, path, strict=True):
                yield C, _logits(X_held_out, *solution), solution
        except _FAILURES as error:
            log.info("scikit-learn's solver takes over in one fold (%s)", error)
            for C, solution in zip(grid, self._path_of_scikit_learn(X, y, grid), strict=True):
                yield C, _logits(X_held_out, *solution), solution

    def fit(self, scaling: Scaling, C: float) -> tuple[Any, bool]:
        """A (scaler, LogisticRegression) pipeline fitted on all rows, and whether its solver converged.

        scikit-learn starts from our solution. It finds nothing left to do, or does it: the head is what it ends with.
        """
        scaler, classifier = _scaler(scaling), self._classifier(C)
        X = scaler.fit_transform(self.X)
        solutions, basis = self.solutions.get((scaling, C)), self.bases.get(scaling)
        start = tuple(np.mean(parts, axis=0) for parts in zip(*solutions, strict=True)) if solutions else None
        grid = (C,) if start else (C / 100, C)  # from zero by way of a stronger penalty, where the way is shorter
        tolerance = _FINAL_TOLERANCE_OF_SMALL if self.dtype == np.float64 else _FINAL_TOLERANCE
        with threadpool_limits(1 if self.dtype == np.float64 else None):  # on few rows threads wait more than they work
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

    def _path_of_scikit_learn(self, X: Array, y: Array, grid: Grid) -> Iterator[_Solution]:
        classifier = self._classifier(grid[0]).set_params(warm_start=True)
        for C in grid:
            _fit_quietly(classifier.set_params(C=C), X, y)
            yield classifier.coef_, classifier.intercept_

    def _classifier(self, C: float) -> LogisticRegression:
        return LogisticRegression(C=C, class_weight="balanced" if self.balanced else None, max_iter=_MAX_ITERATIONS)


def _scaler(scaling: Scaling) -> Any:
    if scaling == "standardise":
        return StandardScaler()
    return Normalizer() if scaling == "unit" else FunctionTransformer()


def _logits(X: Array, weights: Array, intercepts: Array) -> Array:
    """(n, K), also for two classes."""
    logits = X @ weights.T + intercepts
    return np.column_stack([-logits / 2, logits / 2]) if logits.shape[1] == 1 else logits


def _curve(found: OutOfFold, settings: Sequence[Setting]) -> Curve:
    """Per setting its scores, means over folds."""
    accuracies, losses = found.of_folds(found.right), found.of_folds(found.loss).mean(axis=0)
    return [
        {
            "scaling": scaling,
            "C": C,
            "accuracy": float(row.mean()),
            "log_loss": float(loss),
            "fold_accuracies": row.tolist(),
        }
        for (scaling, C), row, loss in zip(settings, accuracies.T, losses, strict=True)
    ]


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
