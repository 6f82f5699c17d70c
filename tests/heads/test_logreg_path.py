"""scikit-learn, run to a tiny tolerance, is the oracle."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from joblib import cpu_count
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

from featcache.errors import UsageError
from featcache.heads import logreg
from featcache.heads.head import SCALINGS
from featcache.heads.logreg import Solver, estimate, fit_logreg
from featcache.heads.logreg_path import NotSolvedError, PathSolver, eigenbasis, regularisation_path, with_direction
from featcache.heads.validation import judge, stratified_folds

GRID = [1e-5, 1e-3, 0.1, 10, 1e3, 1e5]
SCALERS: dict[str, Any] = {"none": None, "standardise": StandardScaler(), "unit": Normalizer()}


def awkward(n: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes of uneven size far from the origin; a constant column and two that are nearly the same."""
    rng = np.random.default_rng(0)
    y = np.concatenate([np.tile(np.arange(classes), 3), rng.integers(0, classes, n - 3 * classes) // 2])
    X = rng.normal(size=(classes, dim))[y] + 2 * rng.normal(size=(n, dim)) + 5
    X[:, 1] = 7
    X[:, 3] = X[:, 2] + 1e-4 * X[:, 4]
    return X, y


def objective(X: np.ndarray, y: np.ndarray, W: np.ndarray, b: np.ndarray, C: float, weights: np.ndarray) -> float:
    """As scikit-learn documents it: C * sum of weighted losses + |W|^2 / 2."""
    logits = X.astype(np.float64) @ W.T + b
    logits = np.column_stack([np.zeros(len(X)), logits]) if len(W) == 1 else logits
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
    return float(C * (weights[y] * losses).sum() + (W.astype(np.float64) ** 2).sum() / 2)


def oracle(X: np.ndarray, y: np.ndarray, C: float, weights: np.ndarray) -> LogisticRegression:
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-9, class_weight=dict(enumerate(weights)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(X, y)


def solve(X: np.ndarray, y: np.ndarray, weights: np.ndarray, grid: list[float], **options: Any) -> Iterator[Any]:
    """Weights and intercepts along the path, of all rows."""
    basis, rows = eigenbasis(X)
    for (found,) in regularisation_path(rows, y, weights[y][:, None], grid, **options):
        W = found[:, :-1] @ basis.T
        yield W, found[:, -1] - W @ X.mean(axis=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scaling", SCALERS)
@pytest.mark.parametrize(("n", "dim", "classes"), [(200, 15, 2), (200, 15, 3), (40, 60, 2), (70, 90, 4), (120, 15, 20)])
def test_reaches_the_optimum(n: int, dim: int, classes: int, scaling: str, dtype: Any) -> None:
    assert_optimal(n, dim, classes, scaling=scaling, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "dim", "classes"), [(40, 60, 2), (200, 15, 3), (70, 90, 4)])
def test_reaches_the_optimum_with_rows_as_tensors(n: int, dim: int, classes: int, dtype: Any) -> None:
    """What a GPU computes, on the CPU."""
    assert_optimal(n, dim, classes, scaling="standardise", dtype=dtype, gpu=torch.device("cpu"))


def assert_optimal(n: int, dim: int, classes: int, *, scaling: str, dtype: Any, **options: Any) -> None:
    X, y = awkward(n, dim, classes)
    X = X if SCALERS[scaling] is None else SCALERS[scaling].fit_transform(X)
    X = X.astype(dtype)
    weights = np.linspace(0.5, 2, classes)
    path = solve(X, y, weights, GRID, tolerance=1e-6 if dtype == np.float32 else 1e-8, **options)
    for C, (W, b) in zip(GRID, path, strict=True):
        expected = oracle(X.astype(np.float64), y, C, weights)
        assert W.shape == expected.coef_.shape
        assert b.shape == expected.intercept_.shape
        best = objective(X, y, expected.coef_, expected.intercept_, C, weights)
        assert objective(X, y, W, b, C, weights) < best * (1 + (2e-3 if dtype == np.float32 else 1e-4))
        if C <= 10 and scaling == "standardise":
            probabilities = expected.predict_proba(X)
            logits = X @ W.T + b
            logits = np.column_stack([np.zeros(n), logits]) if classes == 2 else logits
            ours = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
            np.testing.assert_allclose(ours, probabilities, atol=0.01)


@pytest.mark.parametrize("gpu", [None, torch.device("cpu")])
@pytest.mark.parametrize("classes", [2, 3])
def test_problems_side_by_side_are_solved_as_if_alone(classes: int, gpu: Any) -> None:
    """Rows of weight 0 count for nothing, and another basis and origin lead to the same place."""
    X, y = awkward(200, 15, classes)
    _, rows = eigenbasis(X)
    of_classes, grid = np.linspace(0.5, 2, classes), [1e-3, 0.1]
    folds = np.arange(200) % 9 // 3
    weights = np.where(folds[:, None] == np.arange(3), 0, of_classes[y][:, None])
    *_, together = regularisation_path(rows + 1, y, weights, grid, tolerance=1e-10, gpu=gpu)
    assert together.shape == (3, classes if classes > 2 else 1, rows.shape[1] + 1)
    for number, found in enumerate(together):
        train = folds != number
        *_, (W, b) = solve(X[train], y[train], of_classes, grid, tolerance=1e-10)
        logits = [(rows + 1) @ found[:, :-1].T + found[:, -1], X @ W.T + b]
        if classes > 2:  # equal for all classes is equal to nothing
            logits = [one - one.mean(axis=1, keepdims=True) for one in logits]
        np.testing.assert_allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_start_does_not_matter_but_a_good_one_is_kept(classes: int) -> None:
    X, y = awkward(200, 15, classes)
    problem = X, y, np.ones((200, 1)), [0.1]
    (one,) = regularisation_path(*problem, tolerance=1e-10)
    (same,) = regularisation_path(*problem, tolerance=1e-4, starts=[one])  # nothing left to do
    np.testing.assert_allclose(same, one, atol=1e-9)
    for start in (one / 2, 1 - one):
        (other,) = regularisation_path(*problem, tolerance=1e-10, starts=[start])
        np.testing.assert_allclose(other[..., :-1], one[..., :-1], atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
def test_threads_share_the_work_and_change_nothing(classes: int) -> None:
    X, y = awkward(200, 15, classes)
    problem = X, y, np.ones((200, 1)), [0.1]
    alone, shared = (list(regularisation_path(*problem, tolerance=1e-10, threads=threads)) for threads in (1, 3))
    np.testing.assert_allclose(shared, alone, atol=1e-4)


def test_choosing_with_rows_as_tensors_scores_every_setting_the_same() -> None:
    X, y = awkward(300, 60, 5)
    splits = stratified_folds(y, np.arange(300), folds=3, seed=0)
    here, there = (Solver(X, y, grid=(1e-3, 0.1, 10.0), gpu=gpu, tolerance=1e-8) for gpu in (None, torch.device("cpu")))
    one, other = (solver.cross_validate(splits) for solver in (here, there))
    np.testing.assert_allclose(other.loss, one.loss, rtol=0.01, atol=1e-4)
    assert (other.right != one.right).mean() < 0.002
    pipelines = [solver.fit("standardise", 0.1)[0] for solver in (here, there)]
    np.testing.assert_allclose(*(p.predict_proba(X) for p in pipelines), atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_preconditioner_is_the_inverse_of_what_it_says(classes: int) -> None:
    """At constant predictions: p (1 - p) times the variances, and for each class the mean of its rows times its transpose."""
    X, y = np.random.default_rng(0).normal(size=(200, 5)), np.arange(200) % classes
    X += np.eye(classes, 5)[y]
    X -= X.mean(axis=0)
    found = PathSolver(X, y, np.ones((200, 1)), 1e-4).curvature(0).solve(np.ones((classes if classes > 2 else 1, 6)))
    spread = (1 - 1 / classes) / classes
    for label, solved in enumerate(found):
        mean = np.append(X[y == label].mean(axis=0), 1)
        matrix = np.diag(np.append((X**2).mean(axis=0), 1)) * spread
        matrix += np.outer(mean, mean) * spread / classes * (classes > 2)
        np.testing.assert_allclose(matrix @ solved, np.ones(6), atol=1e-9)


@pytest.mark.parametrize("n", [30, 200])
def test_the_basis_is_orthonormal_and_spans_the_rows(n: int) -> None:
    X, _ = awkward(n, 60, 2)
    for basis, rows in (eigenbasis(X), with_direction(*eigenbasis(X), X.mean(axis=0))):
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
        np.testing.assert_allclose(rows @ basis.T, X - X.mean(axis=0), atol=1e-6)
        variances = np.var(rows, axis=0)
        np.testing.assert_allclose(rows.T @ rows / n, np.diag(variances), atol=1e-8)
    np.testing.assert_allclose(basis @ (basis.T @ X.mean(axis=0)), X.mean(axis=0))


@pytest.mark.parametrize(("n", "dim"), [(70, 90), (200, 15)])
@pytest.mark.parametrize("case", ["outliers", "constant in one fold", "scales of 1 to 1e5"])
def test_each_fold_is_solved_as_if_alone(n: int, dim: int, case: str) -> None:
    """Whatever is shared by folds and scalings: against scikit-learn on the rows of the fold."""
    X, y = awkward(n, dim, 3)
    X[np.arange(n), np.arange(n) % dim] += 20  # outliers: each fold has scales of its own
    splits = stratified_folds(y, np.arange(n), folds=3, seed=0)
    if case == "constant in one fold":
        X[splits[0][0], 5] = 2
    if case == "scales of 1 to 1e5":
        X *= np.geomspace(1, 1e5, dim)
    solver = Solver(
        X, y, grid=(1e-3, 0.1, 10.0), tolerance=1e-6, scalings=SCALINGS if X.max() < 1e3 else ("standardise",)
    )
    solver.cross_validate(splits)
    for (scaling, C), (solutions, _) in solver.kept.items():
        for (train, _), found in zip(splits, solutions, strict=True):
            scaled = (SCALERS[scaling] or FunctionTransformer()).fit_transform(X[train])
            best = oracle(scaled, y[train], C, np.ones(3))
            least = objective(scaled, y[train], best.coef_, best.intercept_, C, np.ones(3))
            coordinates = solver.coordinates(scaling, train)
            W = coordinates.weights(found[:, :-1])
            moved = coordinates.rows[train] @ found[:, :-1].T + found[:, -1] - scaled @ W.T
            np.testing.assert_allclose(moved, np.broadcast_to(moved[:1], moved.shape), atol=2e-3 * np.ptp(scaled @ W.T))
            assert objective(scaled, y[train], W, moved.mean(axis=0), C, np.ones(3)) < least * 1.002, (scaling, C)


def test_a_numpy_c_keeps_float32() -> None:
    X, y = awkward(60, 15, 3)
    (found,) = regularisation_path(X.astype(np.float32), y, np.ones((60, 1)), np.array([1.0]))  # type: ignore[arg-type]
    assert found.dtype == np.float32


def test_values_that_overflow_are_not_solved() -> None:
    X, y = awkward(60, 15, 3)
    with pytest.raises((NotSolvedError, np.linalg.LinAlgError)), np.errstate(all="ignore"):
        list(regularisation_path((X * 1e30).astype(np.float32), y, np.ones((60, 1)), [1.0]))


def leave_signalling_nans_on_the_stack(depth: int) -> None:
    """Where OpenBLAS copies a vector to that is not contiguous, so many calls down."""
    nans = np.full((66, 64), 0x7FA00001, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        nans[:64] @ nans[64:].ravel()[::2]
    if depth:
        list(map(leave_signalling_nans_on_the_stack, [depth - 1]))


def test_no_warning_of_values_that_are_not_there() -> None:
    """Only OpenBLAS for AVX-512 would give one, of this shape."""
    R, y = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), np.arange(6) % 2
    path, theta = PathSolver(R, y, np.ones((6, 1)), 1e-4), np.ones((1, 6), np.float32)
    expected = path.products(theta, 0)
    for depth in range(6):
        leave_signalling_nans_on_the_stack(depth)
        with np.errstate(all="raise"):
            np.testing.assert_array_equal(path.products(theta, 0), expected)


# ------------------------------------------------------------------------------------------------------ fit_logreg


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_head_is_scikit_learns(classes: int, balanced: bool) -> None:
    X, y = awkward(200, 15, classes)
    fitted = fit_logreg(X, np.arange(200), y, grid=(0.1,), folds=0, balanced=balanced)
    scaled = StandardScaler().fit_transform(X)
    expected = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000, class_weight="balanced" if balanced else None)
    expected.fit(scaled, y)
    np.testing.assert_allclose(fitted.head.probabilities(X), expected.predict_proba(scaled), atol=3e-3)
    assert fitted.pipeline[-1].get_params() == {**expected.get_params(), "tol": 1e-4, "max_iter": 1000}
    assert fitted.pipeline[-1].n_iter_.max() < 20  # it started where the work was done


@pytest.mark.parametrize("classes", [2, 3])
def test_scikit_learn_takes_over(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = awkward(200, 15, classes)
    usual = fit_logreg(X, np.arange(200), y, grid=(0.1,), folds=3)

    def fail(*_: Any, **__: Any) -> Any:
        raise NotSolvedError("on purpose")

    monkeypatch.setattr(logreg, "regularisation_path", fail)
    rescued = fit_logreg(X, np.arange(200), y, grid=(0.1,), folds=3)
    np.testing.assert_allclose(rescued.head.probabilities(X), usual.head.probabilities(X), atol=0.01)
    for one, other in zip(rescued.curve, usual.curve, strict=True):
        assert one["log_loss"] == pytest.approx(other["log_loss"], abs=0.01)


@pytest.mark.parametrize("memory", [0, 2**28])
def test_the_last_fit_is_the_same_wherever_it_starts(memory: int) -> None:
    X, y = awkward(200, 15, 3)
    solver = Solver(X, y, grid=(0.01, 0.1), scalings=("standardise",), memory=memory)
    fresh = Solver(X, y, grid=())
    solver.cross_validate(stratified_folds(y, np.arange(200), folds=3, seed=0))
    assert len(solver.kept) == (2 if memory else 0)
    (started, _), (expected, _) = solver.fit("standardise", 0.1), fresh.fit("standardise", 0.1)
    np.testing.assert_allclose(started.predict_proba(X), expected.predict_proba(X), atol=3e-3)
    for solutions, _ in solver.kept.values():
        W = solver.coordinates("standardise", np.arange(200)).weights(np.mean(solutions, axis=0)[:, :-1])
        assert np.corrcoef(W.ravel(), expected[-1].coef_.ravel())[0, 1] > 0.9  # the folds' solutions are near


@pytest.mark.parametrize("memory", [0, 2**28])
def test_out_of_fold_logits_are_those_that_were_judged(memory: int) -> None:
    X, y = awkward(200, 15, 3)
    solver = Solver(X, y, grid=(0.01, 0.1, 1.0), memory=memory)
    splits = stratified_folds(y, np.arange(200), folds=3, seed=0)
    found = solver.cross_validate(splits)
    for number, setting in enumerate(solver.settings):
        right, loss = judge(y, solver.out_of_fold(splits, setting))
        assert (right == found.right[:, number]).all() and (loss == found.loss[:, number]).all()


def test_held_out_rows_teach_nothing() -> None:
    """Labels without relation to the features are guessed at chance, whatever basis and statistics were shared."""
    X = np.random.default_rng(1).normal(size=(400, 100))
    curve = fit_logreg(X, np.arange(400), np.arange(400) % 4, grid=(1e-3, 1.0)).curve
    assert all(entry["accuracy"] < 0.25 + 4 * (0.25 * 0.75 / 400) ** 0.5 for entry in curve)
    assert all(entry["log_loss"] > np.log(4) - 1e-3 for entry in curve)


@pytest.mark.skipif(not logreg.sys.platform.startswith("linux"), reason="memory is looked up on Linux only")
def test_too_little_memory_is_said_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge:
        shape, dtype = (1_000_000, 1280), np.dtype(np.float16)

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, rows: Any) -> Any:
            raise AssertionError("work started")

    monkeypatch.setattr(logreg, "available_memory", lambda: 18 * 10**9)
    monkeypatch.setattr(logreg, "cpu_count", lambda: 2)
    with pytest.raises(UsageError, match=r"about \d+ GB for 1,000,000 x 1,280 in memory, 18 GB are free"):
        fit_logreg(Huge(), np.arange(1_000_000), np.arange(1_000_000) % 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "dim", "classes", "measured"),
    [(150_000, 256, 2, 44), (120_000, 768, 10, 93), (300_000, 256, 10, 178), (8_700, 1280, 101, 27)],
)
def test_announced_times_are_within_a_factor_of_two(rows: int, dim: int, classes: int, measured: float) -> None:
    """CPU seconds of one core, from benchmarks/LOG.md."""
    assert 0.5 < estimate(rows, dim, classes) * cpu_count() / measured < 2
