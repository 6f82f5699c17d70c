"""Logistic regression on embeddings: scikit-learn's, with C and the scaling chosen by stratified cross-validation.

In: features (N, D) and labels, of training rows alone. Out: a ``FittedHead``. ``logreg_path.py`` solves; scikit-learn scales
the features, has the last word on the head, and takes over where ``logreg_path.py`` fails.
"""

import functools
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from joblib import cpu_count
from scipy.linalg import cholesky, get_blas_funcs, solve_triangular
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from threadpoolctl import ThreadpoolController

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
    scale_features,
)
from featcache.heads.logreg_path import NotSolvedError, eigenbasis, moved, product, regularisation_path, with_direction
from featcache.heads.validation import OutOfFold, fit_temperature, judge, stratified_folds
from featcache.system.memory import available_memory
from featcache.system.runtime_options import gpu_for

log = logging.getLogger("featcache")

Grid = tuple[float, ...]
C_GRID: Grid = tuple(float(10.0**k) for k in range(-5, 6))
_MAX_ITERATIONS = 1000
_MAX_FLOAT64_BYTES = 2**30
_CHOOSING = np.float32  # while settings are compared: as good, and twice as fast
# Values of features: in the last fit more are solved in float32, twice as fast and accurate enough to start from. Folds of
# fewer are solved side by side, if they have few columns together: with more, products are fast anyway.
_MAX_SMALL, _MAX_COLUMNS = 2**21, 64
# Of the last fit, as a share of the objective; while choosing, regularisation_path's own is enough. Small data pay nothing
# for a solution in which scikit-learn finds nothing left to do.
_FINAL_TOLERANCE, _FINAL_TOLERANCE_OF_SMALL = 1e-4, 1e-8
_BLOCK = 512  # rows
# Of one core for each value and class, and as for so many more classes, however many there are (benchmarks/LOG.md).
_SECONDS, _CLASSES_MORE = 1.6e-8, 72
# Seconds of this CPU, from where on a GPU wins, which takes one or two to begin. An estimate: ``benchmarks/gpu.py`` measures it.
_WORTH_A_GPU = 10.0
_SOLVED_AT_ONCE = 3  # problems on a GPU: while one waits for it, another has NumPy's share done
_ONE_C = 1 / 30  # of the work of choosing among all
_MAX_FLOAT32 = 1e18  # beyond, squares overflow
_MAX_SPREAD = 1e4  # of squares of inverse scales, mean by least: beyond, float32 cannot tell a change of coordinates
_FAILURES = (NotSolvedError, np.linalg.LinAlgError, ZeroDivisionError)

_blas = functools.cache(ThreadpoolController)  # a look at all loaded libraries, 10 ms


def one_blas_thread() -> Any:
    """A context in which BLAS does not use threads of its own: for work that is spread over threads already."""
    return _blas().limit(limits=1)


Curve = list[dict[str, Any]]  # scores per setting, as ``FittedHead.curve`` holds them
Setting = tuple[Scaling, float]  # and C
Split = tuple[Indices, Indices]  # rows that train, rows held out


def fit_logreg(
    features: FeatureSource,
    rows: Array,
    y: Array,
    *,
    grid: Grid = C_GRID,
    folds: int = 5,
    balanced: bool = False,
    class_weight: Array | None = None,
    seed: int = 0,
    copies: Indices | None = None,
    max_logits: int = MAX_LOGITS,
    device: str = "cpu",
) -> FittedHead:
    """Choose C and scaling on ``rows`` by cross-validation, then refit on all of them.

    ``OutOfFold.best`` says which setting wins. Its weights are divided by the temperature of its out-of-fold logits.

    Args:
        features: (M, D). rows: numbers of the N training rows. y: (N,) labels from 0, each occurring.
        grid: of C, the inverse regularisation strength as in scikit-learn, ascending.
        folds: of the cross-validation; 0 for none: then the first C of ``grid`` and the scaling "standardise" are taken.
        balanced: weigh classes inversely to their frequency. class_weight: (C,) or by these weights instead, in training alone.
        seed: of the folds and of the correction for the choice.
        copies: (N,) which of the N rows are copies, as ``stratified_folds`` wants it; None: none are.
        max_logits: out of fold, that are kept; of more, those of some rows.
        device: auto, cpu, cuda or cuda:N; auto takes a GPU where there is one and enough to do. It solves the same problems to
            the same tolerance.

    Raises:
        UsageError: not enough memory; no such device, or one without float64.
    """
    check_memory(len(rows), features.shape[1])
    gpu, at_once = find_gpu(device, len(rows), features.shape[1], int(y.max()) + 1, choosing=len(grid) > 1)
    if gpu is not None:
        log.info("logreg is solved on %s, %d problems at once", gpu, at_once)
    X = features[rows]
    X = X.astype(np.float64 if X.size * 8 <= _MAX_FLOAT64_BYTES else np.float32)
    solver = Solver(X, y, grid=grid, balanced=balanced, class_weight=class_weight, gpu=gpu, at_once=at_once)
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


class Coordinates(NamedTuple):
    """Scaled rows in an orthonormal basis V of their span, up to their origin: (N, r). V is ``span`` (D, r), or that times
    the inverse of the transposed ``factor``, a lower triangle."""

    rows: Array
    span: Array
    factor: Array | None = None

    def weights(self, parameters: Array) -> Array:
        """(K, r) -> (K, D) of the scaled features."""
        if self.factor is not None:
            parameters = solve_triangular(self.factor, parameters.T, lower=True, trans=1, check_finite=False).T
        weights: Array = parameters @ self.span.T
        return weights


class Solver:
    """Logistic regression on N rows: ``cross_validate`` scores settings, ``fit`` starts from what that has found.

    All settings are solved in one eigenbasis of the rows as they are, in which a row has r = min(N, D) + 1 values or less. A
    fold is a choice of these rows, a scaling changes their coordinates: no product has D rows or columns for each fold.

    Attributes:
        X: (N, D) float32 or float64. y: (N,) labels 0..K-1, each occurring.
        grid: of C, ascending. balanced: weigh classes inversely to their frequency. class_weight: (K,) weights given instead.
        tolerance: of solutions while settings are compared, see ``regularisation_path``; gpu: see there, too.
        at_once: problems that are solved side by side. One more than cores, so that the last of five folds leaves no core idle.
        settings: every (scaling, C), in the order of the results of ``cross_validate``.
        basis: (D, r), orthonormal. rows: (N, r), the centred rows in it.
        kept: per setting the parameters each fold ended with, (K, r + 1), and (N, K) out-of-fold logits, if all fit in
            ``memory``, in bytes.
    """

    def __init__(
        self,
        X: Array,
        y: Array,
        *,
        grid: Grid,
        scalings: Sequence[Scaling] = SCALINGS,
        balanced: bool = False,
        class_weight: Array | None = None,
        tolerance: float = 2e-4,
        memory: int = 2**28,
        gpu: Any = None,
        at_once: int = 0,
    ) -> None:
        self.gpu, self.at_once = gpu, at_once or cpu_count() + 1
        self.X, self.y, self.grid, self.balanced, self.class_weight = X, y, grid, balanced, class_weight
        self.scalings = scalings
        self.settings: list[Setting] = list(itertools.product(scalings, grid))
        self.tolerance, self.memory = tolerance, memory
        self.n_classes = int(y.max()) + 1
        self.small = X.size <= _MAX_SMALL
        self.kept: dict[Setting, tuple[list[Array], Array]] = {}

    def cross_validate(self, splits: Sequence[Split]) -> OutOfFold:
        """Out-of-fold results of every setting."""
        shape = (len(self.y), len(self.settings))
        right, loss = np.empty(shape, bool), np.empty(shape, _CHOOSING)
        fold = np.empty(len(self.y), np.intp)
        for number, (_, held_out) in enumerate(splits):
            fold[held_out] = number
        values = len(self.settings) * self.n_classes * (len(self.y) + len(splits) * (min(self.X.shape) + 2))
        if values * np.dtype(_CHOOSING).itemsize <= self.memory:
            empty = np.empty((len(self.y), self.n_classes), _CHOOSING)
            self.kept = {setting: ([np.empty(0)] * len(splits), empty.copy()) for setting in self.settings}

        def one(scaling: Scaling, numbers: Sequence[int]) -> None:
            for C, found in self._folds(scaling, [splits[number] for number in numbers], self.grid):
                column = self.settings.index((scaling, C))  # each at once: together they may be large
                for number, (parameters, logits) in zip(numbers, found, strict=True):
                    rows = splits[number][1]
                    right[rows, column], loss[rows, column] = judge(self.y[rows], logits)
                    if self.kept:
                        self.kept[scaling, C][0][number], self.kept[scaling, C][1][rows] = parameters, logits

        self.prepare()
        jobs = [(scaling, numbers) for scaling in self.scalings for numbers in self._side_by_side(scaling, len(splits))]
        # Threads: the work is in BLAS, which frees the GIL, and X is not copied. One BLAS thread each, or they would fight.
        # Not joblib's: those need semaphores, and with them a shared-memory file system that can be written.
        with _blas().limit(limits=1), ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(one, *zip(*jobs, strict=True)))
        return OutOfFold(right, loss, fold, path=np.repeat(np.arange(len(self.scalings)), len(self.grid)))

    def _side_by_side(self, scaling: Scaling, folds: int) -> list[list[int]]:
        """Numbers of the folds that are solved as one problem: all, if they share their rows and have few columns."""
        if self.small and scaling != "standardise" and folds * self.n_classes <= _MAX_COLUMNS:
            return [list(range(folds))]
        return [[number] for number in range(folds)]

    def out_of_fold(self, splits: Sequence[Split], setting: Setting) -> Array:
        """(N, K) logits of each row from its fold's solution, to the bit those that ``cross_validate`` judged."""
        scaling, C = setting
        if setting in self.kept:
            return self.kept[setting][1]
        logits = np.empty(
            (len(self.y), self.n_classes), _CHOOSING
        )  # along the same path, since where it starts decides its end
        with _blas().limit(limits=1):
            for numbers in self._side_by_side(scaling, len(splits)):
                chosen = [splits[number] for number in numbers]
                *_, (_, found) = self._folds(scaling, chosen, self.grid[: self.grid.index(C) + 1])
                for (_, rows), (_, z) in zip(chosen, found, strict=True):
                    logits[rows] = z
        return logits

    def held_out_logits(self, split: Split, setting: Setting) -> Array:
        """(m, K) logits of the rows held out by one split, whose other rows train; some rows may do neither."""
        scaling, C = setting
        *_, (_, found) = self._folds(scaling, [split], (C / 100, C))  # from zero by way of a stronger penalty
        return found[0][1]

    def prepare(self) -> None:
        """Set ``basis`` and ``rows``."""
        if hasattr(self, "basis"):
            return
        X = self.X.astype(np.float64 if self.small else np.float32, copy=False)
        try:
            with _blas().limit(limits=1):
                found = with_direction(*eigenbasis(X), X.mean(axis=0))  # which spans rows of unit length as well
        except _FAILURES as error:
            log.info("the features are not rotated (%s)", error)
            found = np.eye(X.shape[1]), X - X.mean(axis=0)
        dtype = _CHOOSING if np.abs(found[1]).max(initial=0) < _MAX_FLOAT32 else np.float64
        self.basis, self.rows = (part.astype(dtype, copy=False) for part in found)

    def coordinates(self, scaling: Scaling, train: Indices) -> Coordinates:
        """Of all rows, scaled as a scaler scales them that has seen those that train."""
        if scaling == "standardise":
            return self._standardised(train)
        return Coordinates(self._of_unit_length() if scaling == "unit" else self.rows, self.basis)

    def _of_unit_length(self) -> Array:
        """(N, r) rows of unit length, in the basis of rows as they are, which suits them nearly as well as their own."""
        lengths = np.linalg.norm(self.X, axis=1)
        shares = np.divide(1, lengths, out=np.ones_like(lengths), where=lengths > 0)[:, None]
        # The mean's part is taken off before it can drown the rest.
        of_mean = (shares - shares.mean()) * (self.X.mean(axis=0) @ self.basis)
        rows: Array = self.rows * shares.astype(self.rows.dtype) + of_mean.astype(self.rows.dtype)
        return rows

    def _standardised(self, train: Indices) -> Coordinates:
        """With B, the basis, and S, the scales, M = B' S^-2 B = L L': the basis S^-1 B L'^-1 is orthonormal, and rows x B
        become x B L. Where M says too little in float32, the fold has an eigenbasis of its own."""
        scaler = StandardScaler()
        for start in range(0, len(train), _BLOCK):  # arrays that stay in the cache, half the time
            scaler.partial_fit(self.X[train[start : start + _BLOCK]])
        usual = float(np.median(scaler.scale_))  # taken out of M, so that its values are near 1
        inverse = (usual / scaler.scale_)[:, None]
        span, rows = inverse.astype(self.rows.dtype) * self.basis, np.divide(self.rows, usual)
        try:
            if (inverse**2).mean() <= _MAX_SPREAD * inverse.min() ** 2:
                factor = cholesky(span.T @ span, lower=True, check_finite=False)
                # Half the work of rows @ factor.
                trmm = get_blas_funcs("trmm", (factor, rows))  # in place
                turned = trmm(1, factor, rows.T, trans_a=1, lower=1, overwrite_b=1).T
                return Coordinates(turned, span, factor)
            own, _ = eigenbasis(scaler.transform(self.X[train]).astype(self.rows.dtype))
            return Coordinates(rows @ (span.T @ own), own)
        except _FAILURES as error:
            log.info("the standardised features are not rotated (%s)", error)
            return Coordinates(
                scaler.transform(self.X).astype(self.rows.dtype), np.eye(len(inverse), dtype=self.rows.dtype)
            )

    def _folds(
        self, scaling: Scaling, splits: Sequence[Split], grid: Grid
    ) -> Iterator[tuple[float, list[tuple[Array, Array]]]]:
        """Each C with the folds' parameters and (m, K) logits of rows held out, of one fold or of several side by side.

        From the grid's beginning again if another solver has to take over.
        """
        rows, y, weights = self.coordinates(scaling, splits[0][0]).rows, self.y, np.zeros((len(self.y), len(splits)))
        held_out = [rows[held_out] for _, held_out in splits]
        for column, (train, _) in enumerate(splits):
            weights[train, column] = self._weights(self.y[train])
        if len(splits) == 1:
            rows, y, weights = (part[splits[0][0]] for part in (rows, y, weights))
        try:
            path = regularisation_path(rows, y, weights, grid, tolerance=self.tolerance, gpu=self.gpu)
            for C, found in zip(grid, path, strict=True):
                yield C, [(one, _logits(x, one)) for x, one in zip(held_out, found, strict=True)]
        except _FAILURES as error:
            log.info("scikit-learn's solver takes over in %d folds (%s)", len(splits), error)
            paths = [self._path_of_scikit_learn(rows[w > 0], y[w > 0], grid) for w in weights.T]
            for C, *others in zip(grid, *paths, strict=True):
                yield C, [(one, _logits(x, one)) for x, one in zip(held_out, others, strict=True)]

    def fit(self, scaling: Scaling, C: float) -> tuple[Any, bool]:
        """A (scaler, LogisticRegression) pipeline fitted on all rows, and whether its solver converged.

        scikit-learn starts from our solution. It finds nothing left to do, or does it: the head is what it ends with.
        """
        scaler, classifier = _scaler(scaling), self._classifier(C)
        X = scaler.fit_transform(self.X)
        if scaling == "unit" and (short := np.linalg.norm(X, axis=1) < 0.5).any():  # which scikit-learn takes for zero
            X[short] = scale_features(X[short], scaling, X[0], X[0])
        try:
            with _blas().limit(limits=1):
                W, b = self._solved(scaling, C, X.mean(axis=0))
            classifier.set_params(warm_start=True)
            classifier.coef_, classifier.intercept_ = W.astype(X.dtype), b.astype(X.dtype)
        except _FAILURES as error:
            log.info("scikit-learn's solver takes over (%s)", error)
        with _blas().limit(limits=1 if self.small else None):  # on few rows threads wait more than they work
            _fit_quietly(classifier, X, self.y)
        classifier.set_params(warm_start=False)
        return make_pipeline(scaler, classifier), bool(classifier.n_iter_.max() < _MAX_ITERATIONS)

    def _solved(self, scaling: Scaling, C: float, origin: Array) -> tuple[Array, Array]:
        """Weights and intercepts on all rows, whose mean is ``origin`` once scaled; from the mean of the folds' solutions."""
        self.prepare()
        coordinates = self.coordinates(scaling, np.arange(len(self.y)))
        R = coordinates.rows.astype(np.float64 if self.small else self.rows.dtype, copy=False)
        middle = R.mean(axis=0)
        starts = []  # of C and of the one before; a fold's coordinates are nearly these
        for one in self.grid[: self.grid.index(C) + 1][-2:] if self.kept and C in self.grid else ():
            solutions, _ = self.kept[scaling, one]
            if all(parameters.shape[1] == R.shape[1] + 1 for parameters in solutions):
                starts.append(moved(np.mean(solutions, axis=0)[None], middle))
        path = regularisation_path(
            R - middle,
            self.y,
            self._weights(self.y)[:, None],
            (C,) if starts else (C / 100, C),  # from zero by way of a stronger penalty, where the way is shorter
            tolerance=_FINAL_TOLERANCE_OF_SMALL if self.small else _FINAL_TOLERANCE,
            starts=starts,
            threads=1 if self.small else cpu_count(),
            gpu=self.gpu,
        )
        *_, found = path
        W = coordinates.weights(found[0, :, :-1])
        return W, found[0, :, -1] - W @ origin

    def _weights(self, y: Array) -> Array:
        """(n,) of rows that train, by their class."""
        if self.class_weight is not None:
            return np.asarray(self.class_weight[y])
        weights: Array = class_weights(y, self.n_classes, balanced=self.balanced)[y]
        return weights

    def _path_of_scikit_learn(self, X: Array, y: Array, grid: Grid) -> Iterator[Array]:
        classifier = self._classifier(grid[0]).set_params(warm_start=True)
        for C in grid:
            _fit_quietly(classifier.set_params(C=C), X, y)
            yield np.column_stack([classifier.coef_, classifier.intercept_])

    def _classifier(self, C: float) -> LogisticRegression:
        given = None if self.class_weight is None else dict(enumerate(self.class_weight.tolist()))
        weight = "balanced" if self.balanced else given
        return LogisticRegression(C=C, class_weight=weight, max_iter=_MAX_ITERATIONS)


def _scaler(scaling: Scaling) -> Any:
    if scaling == "standardise":
        return StandardScaler()
    return Normalizer() if scaling == "unit" else FunctionTransformer()


def _logits(rows: Array, parameters: Array) -> Array:
    """(n, K), also for two classes."""
    logits = product(rows, parameters[:, :-1]) + parameters[:, -1]
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


def estimate(n: int, dim: int, n_classes: int) -> float:
    """Seconds that choosing C on n rows of ``dim`` values takes on this machine's cores, to a factor of two or so."""
    return float(_SECONDS * n * dim * (n_classes + _CLASSES_MORE) / cpu_count())


def find_gpu(device: str, n: int, dim: int, n_classes: int, *, choosing: bool) -> tuple[Any, int]:
    """The GPU to solve on, and how many problems fit there at once; None and 0: this CPU. Raises UsageError: no such device.

    ``choosing``: among values of C, not for one.
    """
    work = estimate(n, dim, n_classes) * (1 if choosing else _ONE_C)
    gpu = gpu_for(device, work, worth=_WORTH_A_GPU)
    if gpu is None:
        return None, 0
    if gpu.type != "cuda":
        raise UsageError(f"logreg needs float64, which {gpu} lacks; use --device cpu, or --clf linear")
    import torch

    # Rows; logits, residuals and what is made of them, ten times; weights.
    fit = torch.cuda.mem_get_info(gpu)[0] // (4 * n * (dim + 10 * n_classes + 10))
    if not fit:
        log.warning(
            "logreg on %s rows and %d classes does not fit into %s's memory: solved on the CPU", n, n_classes, gpu
        )
    return (gpu, min(int(fit), _SOLVED_AT_ONCE)) if fit else (None, 0)


def check_memory(n: int, dim: int) -> float:
    """Refuse what would end in swapping or a kill: features, and per thread a fold's rows scaled and rotated. Raises UsageError.

    Returns the bytes that it takes at most; 0 of so little that nobody need know.
    """
    size = 4 * n * dim
    needed = size * (2 + 3 * min(cpu_count() + 1, 15)) if size * 2 > _MAX_FLOAT64_BYTES else 0
    if sys.platform == "linux" and needed > (free := available_memory()):
        raise UsageError(
            f"logreg needs about {needed / 1e9:.0f} GB for {n:,} x {dim:,} in memory, {free / 1e9:.0f} GB are free; "
            "use --clf linear, which reads from the cache in blocks"
        )
    return needed
