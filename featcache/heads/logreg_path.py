"""Softmax regression with an L2 penalty, along a path of regularisation strengths. NumPy and SciPy only.

In: features (n, D), labels and values of C. Out: weights and intercepts for each C.

The objective is scikit-learn's: ``C * sum_i w_i loss_i + |W|^2 / 2``, without a penalty on intercepts. The code works on it
divided by ``C * sum_i w_i``. The optimum is unique: how it is found changes speed, not the result.

- Features are centred, which the intercepts absorb, and rotated into the eigenbasis of their covariance, which leaves the
  penalty as it is. In that basis the Hessian is nearly diagonal: the class's mean p (1 - p) times the direction's variance,
  plus the penalty. (Böhning 1992, "Multinomial logistic regression algorithm", bounds the matrix of which this is the diagonal.)
- Of three classes or more, each one's own rows add a multiple of m m', m their mean: where its probabilities are still open,
  these rows hold much of the curvature. The inverse of both together is Sherman's and Morrison's.
- This matrix preconditions L-BFGS (Liu & Nocedal 1989). The pairs of L-BFGS survive a change of C: only the penalty's
  part of the Hessian changes, and that part is known.
- For each C, the directions that hold two thirds of the variance are solved first, then all together.
- Each C starts on the line through the last two solutions, not where the one before ended. Logits are linear along a line,
  so that a search on it costs no product with the features.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from featcache.heads.head import Array

_MEMORY = 10  # pairs of L-BFGS
_MAX_ITERATIONS = 500
_MANY = 64  # directions; with fewer, products with a part of them save nothing
_MAX_TRIALS = 25  # of one line search
_DECREASE, _CURVATURE = 1e-4, 0.5  # strong Wolfe conditions; trials are cheap, so the second is stricter than usual


class NotSolvedError(ArithmeticError):
    """Values overflowed or the line search got stuck; another solver has to take over."""


class Point(NamedTuple):
    """A point on the path: parameters (K * F, r + 1), the last column intercepts; logits and w (p - y), (K * F, n), which may
    be tensors on a GPU."""

    theta: Array
    logits: Any
    residual: Any
    loss: float


class _Pair(NamedTuple):
    """A step of L-BFGS: s is the change of the parameters, y that of the gradient; rho = 1 / (s y)."""

    s: Array
    y: Array
    rho: float


class _Curvature(NamedTuple):
    """An approximate Hessian: per class D + c m m', ``diagonal`` D (K * F, r + 1), ``reduced`` D^-1 m, ``share`` the factor
    of the correction to D^-1, (K * F, 1)."""

    diagonal: Array
    reduced: Array
    share: Array

    def solve(self, q: Array) -> Array:
        """The inverse times (K * F, r + 1)."""
        along = np.einsum("ij,ij->i", self.reduced, q)[:, None]
        solved: Array = q / self.diagonal - self.share * along * self.reduced
        return solved


def eigenbasis(X: Array) -> tuple[Array, Array]:
    """(n, D) -> (D, r), r <= min(n, D), an orthonormal basis of the centred rows, in ascending order of variance; and
    (n, r), these rows in it.

    With n >= D the basis is square, a rotation, and suits other rows of the same kind as well: no rotation moves the
    optimum. A basis of more rows than those that train makes training faster and tells it nothing.

    Raises:
        NotSolvedError: the covariance is not finite. LinAlgError: from NumPy.
    """
    centred = X - X.mean(axis=0)
    if len(X) >= X.shape[1]:
        basis = np.linalg.eigh(centred.T @ centred)[1]
        rows = centred @ basis
    else:  # the optimum lies in the rows' span: weights outside of it only add to the penalty
        centred = centred.astype(np.float64)  # the Gram matrix squares the spread of variances
        values, vectors = np.linalg.eigh(centred @ centred.T)
        kept = values > values[-1] * 1e-12
        vectors, lengths = vectors[:, kept], np.sqrt(values[kept])
        basis, rows = (centred.T @ vectors / lengths).astype(X.dtype), (vectors * lengths).astype(X.dtype)
    if not np.isfinite(basis).all():
        raise NotSolvedError("the features' covariance is not finite")
    return basis, rows


def with_direction(basis: Array, rows: Array, direction: Array) -> tuple[Array, Array]:
    """(D, r) orthonormal basis and (n, r) rows in it -> those with ``direction`` (D,) spanned, too; the new vector is first."""
    rest = direction - basis @ (basis.T @ direction)
    length = np.linalg.norm(rest)
    if basis.shape[0] == basis.shape[1] or not length > 1e-6 * np.linalg.norm(direction):
        return basis, rows
    return np.column_stack([(rest / length).astype(basis.dtype), basis]), np.pad(rows, ((0, 0), (1, 0)))


def regularisation_path(
    R: Array,
    y: Array,
    weights: Array,
    grid: Sequence[float],
    *,
    tolerance: float = 2e-4,
    starts: Sequence[Array] = (),
    threads: int = 1,
    gpu: Any = None,
) -> Iterator[Array]:
    """Solve F problems, which differ in the weights of their rows, for each C of ``grid``; an ascending one is the fastest.

    Args:
        R: (n, r) float32 or float64, the rows in an eigenbasis, wherever their origin is. The work is done in this
            precision, sums of losses in float64.
        y: (n,) labels 0..K-1. weights: (n, F) of the rows' losses; 0 leaves a row out of a problem. Few columns of several
            problems side by side take half the time of as many columns one after the other.
        tolerance: the search ends when a further step promises to lower the objectives by less than this share of them, or
            of their distance to the objectives of constant predictions, whichever is smaller.
        starts: parameters of similar problems, in the shape yielded: the search starts on the line through the last two.
        threads: that share a product with the features; each expects BLAS to have one of its own. BLAS's would spin between
            products, which doubles the CPU time.
        gpu: the torch.device to keep rows and their logits on; None: this CPU.

    Yields:
        (F, K, r + 1) parameters, the last of which are intercepts; for two classes (F, 1, r + 1), of the logit of class 1.

    Raises:
        NotSolvedError: rarely; what was yielded before is then not to be relied on.
    """
    mean = R.mean(axis=0)
    with ThreadPoolExecutor(threads) as pool:  # which starts no thread before it has work
        if gpu is None:
            path = PathSolver(R - mean, y, weights, tolerance, threads, pool.map if threads > 1 else map)
        else:
            from featcache.heads.logreg_on_gpu import PathOnGpu

            path = PathOnGpu(R - mean, y, weights, tolerance, device=gpu)
        for start in starts:
            path.begin(moved(start, mean).swapaxes(0, 1))
        for C in grid:
            yield moved(path.solve(C).swapaxes(0, 1), -mean)


def product(rows: Array, weights: Array) -> Array:
    """(n, r) and (K, r) -> (n, K), without a warning of invalid values: ``PathSolver.descend`` looks for them itself.

    For a (2, 5), (3, 5), (6, 5), ... float32 matrix and one vector, OpenBLAS for AVX-512 also multiplies what was left on the
    stack. It throws that away, but the processor's flag stays, and NumPy would warn of a value that is not there.
    """
    with np.errstate(invalid="ignore"):
        found: Array = rows @ weights.T
    return found


def moved(parameters: Array, origin: Array) -> Array:
    """(..., r + 1) parameters that give rows, less their origin (r,), the logits they had before."""
    shift = parameters[..., :-1] @ origin
    return np.concatenate([parameters[..., :-1], (parameters[..., -1] + shift)[..., None]], axis=-1)


class PathSolver:
    """Solutions on one training set, each of which starts from those before.

    Arrays have classes and problems first, which makes sums over classes and products with few columns fast: parameters
    (K * F, r + 1), logits and residuals (K * F, n), K = 1 for two classes.
    """

    def __init__(
        self, R: Array, y: Array, weights: Array, tolerance: float, parts: int = 1, map: Callable[..., Any] = map
    ) -> None:
        self.parts, self.map = parts, map
        self.R, self.y, self.rows, self.problems = R, y, np.arange(len(y)), np.arange(weights.shape[1])[:, None]
        n_classes = int(y.max()) + 1
        self.sign = np.where(y == 1, 1, -1).astype(R.dtype) if n_classes == 2 else None
        self.total = float(weights.sum() / weights.shape[1])  # one for all problems, so that they share a penalty
        self.w = np.ascontiguousarray(weights.T) / self.total  # (F, n)
        self.tolerance = tolerance
        self.noise = 10 * float(np.finfo(R.dtype).eps)
        variances = np.einsum("ij,ij->j", R, R) / len(R)
        if not np.isfinite(variances).all():
            raise NotSolvedError("the features' variances are not finite")
        self.variances = np.append(variances, 1).astype(R.dtype)  # (r + 1,); of the intercept: 1
        third = int(np.searchsorted(np.cumsum(variances), variances.sum() / 3))  # the small directions that hold it
        self.coarse = third if len(variances) >= _MANY else 0
        self.penalty = 0.0
        self.pairs: list[_Pair] = []
        shares = np.log([np.bincount(y, w, n_classes) for w in self.w]).T  # (K, F)
        shares = shares[1:] - shares[:1] if n_classes == 2 else shares
        self.means = self.means_of_classes(n_classes)
        theta = np.zeros((shares.size, R.shape[1] + 1), R.dtype)
        theta[:, -1] = shares.ravel()  # the optimum without features
        self.before: Point | None = None
        self.point = self.at(theta, np.tile(theta[:, -1:], len(y)))
        self.null = self.point.loss

    def means_of_classes(self, n_classes: int) -> Array:
        """(K * F, r + 1) weighted means of each class's rows, and 1; zeros for two classes, whose one logit has no own rows."""
        if n_classes == 2:
            return np.zeros((len(self.w), len(self.variances)), self.R.dtype)
        members = np.zeros((n_classes, *self.w.shape), self.R.dtype)
        members[self.y, self.problems, self.rows] = self.w
        members /= np.maximum(members.sum(axis=2, keepdims=True), np.finfo(members.dtype).tiny)
        members = members.reshape(-1, len(self.y))
        return np.column_stack([members @ self.R, np.ones(len(members), members.dtype)])

    def begin(self, parameters: Array) -> None:
        """Start from (K, F, r + 1) parameters, if that beats zeros; the next solution on the line from the start before."""
        theta = np.ascontiguousarray(parameters.reshape(self.point.theta.shape), self.R.dtype)
        point = self.at(theta, self.products(theta, 0))
        if point.loss < self.null:
            self.before, self.point = self.point, point

    def products(self, theta: Array, first: int) -> Any:
        """(K * F, n) logits of parameters of which the ``first`` are 0."""
        logits = np.empty((len(theta), len(self.R)), self.R.dtype)

        def part(of: slice) -> None:
            np.add(product(self.R[of, first:], theta[:, first:-1]).T, theta[:, -1:], out=logits[:, of])

        list(self.map(part, self.shares(0, len(self.R))))
        return logits

    def shares(self, first: int, last: int) -> list[slice]:
        """Of the threads."""
        edges = np.linspace(first, last, self.parts + 1).astype(int).tolist()
        return [slice(*edge) for edge in itertools.pairwise(edges)]

    def at(self, theta: Array, logits: Any) -> Point:
        """The point's mean loss and residuals, accurate also where probabilities are close to 0 or 1."""
        if self.sign is not None:
            margins = self.sign * logits
            small = np.exp(-np.abs(margins))
            losses = np.log1p(small) + np.maximum(-margins, 0)
            missing = np.where(margins > 0, small, 1) / (1 + small)  # 1 - p of the own class
            residual = (-self.w * missing).astype(logits.dtype) * self.sign
            return Point(theta, logits, residual, float(np.vdot(self.w, losses)))
        z = logits.reshape(-1, *self.w.shape)  # (K, F, n)
        top = z.max(axis=0)
        odds = np.exp(z - top)
        own = np.exp(np.maximum(z[self.y, self.problems, self.rows] - top, -700).astype(np.float64))
        odds[self.y, self.problems, self.rows] = (
            0  # 1 - p of the own class comes from the sum of the others: no cancellation
        )
        others = odds.sum(axis=0).astype(np.float64)
        share = self.w / (others + own)
        odds *= share.astype(odds.dtype)
        odds[self.y, self.problems, self.rows] = -others * share
        return Point(theta, logits, odds.reshape(logits.shape), float(np.vdot(self.w, np.log1p(others / own))))

    def solve(self, C: float) -> Array:
        """(K, F, r + 1) parameters at the optimum for this C."""
        penalty = float(1 / (C * self.total))  # a Python float: a NumPy one would turn float32 arrays into float64
        self.pairs = [_pair(s, y + penalised(s, penalty - self.penalty)) for s, y, _ in self.pairs]
        self.penalty = penalty
        start = self.point
        if self.before is not None:
            self.extrapolate(self.before)
        self.before = start
        for first in (self.coarse, 0):
            self.descend(self.curvature(first), first)
        return self.point.theta.reshape(-1, len(self.w), self.point.theta.shape[1])

    def descend(self, scale: _Curvature, first: int) -> None:
        """Go to the optimum over all parameters but the ``first`` ones, which stay as they are.

        A step along the few directions of large variance costs a fraction of a step along all and covers most of the way.
        """
        gradient = self.gradient(first)
        for _ in range(_MAX_ITERATIONS):
            direction = self.direction(gradient, scale)
            # What is left still descends: principal blocks of a positive definite matrix are that, too.
            direction[:, :first] = 0
            slope = _dot(gradient, direction)
            if not np.isfinite(slope) or slope > 0:
                raise NotSolvedError(f"slope {slope}")
            if -slope / 2 <= self.tolerance * self.explained():
                return
            t = self.search(direction, self.products(direction, first), slope)
            if t is None:
                raise NotSolvedError("line search failed")
            before, gradient = gradient, self.gradient(first)
            self.pairs = [*self.pairs, _pair(t * direction, gradient - before)][-_MEMORY:]
        raise NotSolvedError(f"{_MAX_ITERATIONS} iterations")

    def objective(self, point: Point) -> float:
        """Mean loss plus penalty."""
        return point.loss + self.penalty / 2 * _dot(point.theta[:, :-1], point.theta[:, :-1])

    def explained(self) -> float:
        """The scale of the tolerance: the objective or, if that is less, how far the features have lowered it."""
        objective = self.objective(self.point)
        return max(min(objective, self.null - objective), self.noise * objective)

    def gradient(self, first: int) -> Array:
        """(K * F, r + 1) of the objective; the ``first`` are set to 0."""
        gradient = penalised(self.point.theta, self.penalty)
        gradient[:, :first] = 0

        def part(of: slice) -> None:
            gradient[:, of] += self.point.residual @ self.R[:, of]

        list(self.map(part, self.shares(first, self.R.shape[1])))
        gradient[:, -1] = self.point.residual.sum(axis=1)
        return gradient

    def curvature(self, first: int) -> _Curvature:
        """Approximate Hessian: variance times mean p (1 - p), plus the penalty, plus what each class's own rows add."""
        spread, own = self.spreads()
        spread = np.maximum(spread, max(1e-6 * spread.max(), np.finfo(spread.dtype).tiny))  # never divide by zero
        diagonal: Array = spread[:, None] * self.variances
        diagonal[:, :-1] += self.penalty
        means = self.means.copy()
        means[:, :first] = 0
        reduced = means / diagonal
        return _Curvature(diagonal, reduced, own / (1 + own * np.einsum("ij,ij->i", reduced, means)[:, None]))

    def spreads(self) -> tuple[Array, Array]:
        """(K * F,) sums over rows of weighted p (1 - p), and (K * F, 1) over each class's own rows, zeros for two classes."""
        size = np.abs(self.point.residual).reshape(-1, *self.w.shape)
        missing = np.divide(size, self.w, out=np.zeros_like(size), where=self.w > 0, casting="same_kind")
        size *= 1 - missing
        spread = size.sum(axis=2).ravel()
        own = np.zeros((len(spread), 1), size.dtype)
        if self.sign is None:
            of_rows = size[self.y, self.problems, self.rows]
            own[:, 0] = np.stack([np.bincount(self.y, one, len(size)) for one in of_rows], axis=1).ravel()
        return spread, own

    def along(self, residual: Any, move: Any) -> float:
        """How fast the mean loss changes along a (K * F, n) change of the logits."""
        return _dot(residual, move)

    def direction(self, gradient: Array, scale: _Curvature) -> Array:
        """(K * F, r + 1), a direction of descent: the two loops of L-BFGS around the preconditioner."""
        q, shares = gradient.copy(), []
        for s, y, rho in reversed(self.pairs):
            shares.append(rho * _dot(s, q))
            q -= shares[-1] * y
        q = scale.solve(q)
        if self.pairs:  # the latest step sets the preconditioner's overall size
            _, y, rho = self.pairs[-1]
            q *= 1 / (rho * _dot(y, scale.solve(y)))
        for (s, y, rho), share in zip(self.pairs, reversed(shares), strict=True):
            q += (share - rho * _dot(y, q)) * s
        return -q

    def extrapolate(self, earlier: Point) -> None:
        """Continue along the line from the last solution but one to the last, as far as that helps."""
        direction, move = self.point.theta - earlier.theta, self.point.logits - earlier.logits
        slope = self.along(self.point.residual, move) + self.penalty * _dot(self.point.theta[:, :-1], direction[:, :-1])
        if slope < 0:
            self.search(direction, move, slope)

    def search(self, direction: Array, move: Array, slope: float) -> float | None:
        """Step to a point on the line that meets the strong Wolfe conditions; return its distance, None if there is none."""
        start, weights, change = self.point, self.point.theta[:, :-1], direction[:, :-1]
        size, along, square = _dot(weights, weights), _dot(weights, change), _dot(change, change)
        objective = start.loss + self.penalty / 2 * size
        low, low_slope, high, t = 0.0, slope, np.inf, 1.0
        for _ in range(_MAX_TRIALS):
            point = self.at(start.theta + t * direction, start.logits + t * move)
            here = self.along(point.residual, move) + self.penalty * (along + t * square)
            value = point.loss + self.penalty / 2 * (size + 2 * t * along + t * t * square)
            lower = value <= objective * (1 + self.noise) + _DECREASE * t * slope
            if lower and abs(here) <= -_CURVATURE * slope:
                self.point = point
                return t
            if lower and here < 0:
                low, low_slope = t, here
            else:
                high, high_slope = t, here
            if high == np.inf:
                t *= 4
            else:  # the zero of the slope if it were linear, kept away from both ends
                share = low_slope / (low_slope - high_slope) if high_slope > low_slope else 0.5
                t = low + (high - low) * min(0.9, max(0.1, share))
        return None


def _dot(a: Array, b: Array) -> float:
    return float(np.vdot(a, b))


def penalised(theta: Array, penalty: float) -> Array:
    """Gradient of the penalty, which the last column, the intercepts, does not have."""
    gradient = penalty * theta
    gradient[:, -1] = 0
    return gradient


def _pair(s: Array, y: Array) -> _Pair:
    product = _dot(s, y)
    if not product > 0:
        raise NotSolvedError(f"curvature {product}")
    return _Pair(s, y, 1 / product)
