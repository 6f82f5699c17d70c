"""How much faster is the cross-validation of C than scikit-learn's LogisticRegressionCV, and is it as good?

    python benchmarks/logreg_vs_sklearn.py [--cache FILE] [--rows 8700] [--classes 101] [--pairs 3] [--tight]
    python benchmarks/logreg_vs_sklearn.py --sizes CACHE:ROWS:CLASSES ... [--pairs 3]

Both sides try the same 12 values of C (scikit-learn's ``Cs=12``) on the same 5 stratified folds of the same float32
features, with two threads, then fit the best C on all rows; both in this process, in turn. The peer is LogisticRegressionCV
(lbfgs) on features standardised beforehand, once with ``max_iter=1000`` and, in the first pair, once with its default of 100.
featcache gets the raw features and standardises within each fold, as fit-head does. ``--tight`` adds a peer with
``tol=1e-6``, in the first pair: with its default of 1e-4, lbfgs stops early where C is large.

Objectives are compared at both sides' best C, on all rows standardised, in float64: the peer there is a LogisticRegression
fit from zero with ``max_iter=1000``, whose tol is the default.

With ``--cache`` features and labels are those of a file that ``extract`` wrote: the first ``--classes`` classes, and of each
as many rows as make ``--rows``. Else they are made up.

``--sizes`` instead prints one table, a line for each cache and size: wall and CPU time of both sides, and of fit-head's whole
choice, which is 33 settings (11 C, three scalings), the correction for it and the temperature.

Made-up features imitate those of a network after global average pooling: non-negative, sparse, of uneven scale, with a
power-law spectrum. 400 latent factors of variance 1/j; a class is a normal centre in them plus normal scatter of 2.8 times
its size; a random mixture of the factors plus a little noise goes through a ReLU and is scaled per dimension; 6 % of the
labels are random. Seeded: two runs have the same data.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
import warnings
from typing import Any

import numpy as np
import sklearn
from facts import machine_facts
from joblib.externals.loky import get_reusable_executor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from featcache.cache.cache import FeatureCache
from featcache.heads.logreg import Solver, fit_logreg
from featcache.heads.validation import stratified_folds

GRID = np.logspace(-4, 4, 12)
FOLDS = 5
TIMES = ("seconds", "cpu_seconds")


def embeddings(rows: int, dim: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, dim) float32 and labels, as the module says."""
    rng = np.random.default_rng(seed)
    deviations = np.arange(1, 401) ** -0.5
    deviations /= np.linalg.norm(deviations)
    mixture = rng.normal(size=(400, dim))
    y = rng.permutation(np.arange(rows) % classes)
    factors = (rng.normal(size=(classes, 400))[y] + 2.8 * rng.normal(size=(rows, 400))) * deviations
    X = np.maximum(factors @ mixture + 0.84 * rng.normal(size=(rows, dim)) - 0.5, 0) * rng.gamma(2, 0.5, dim)
    wrong = rng.random(rows) < 0.06
    y[wrong] = rng.integers(0, classes, wrong.sum())
    return X.astype(np.float32), y


def of_cache(path: str, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows or a few less, dim) float32 and labels: as many of each class."""
    cache = FeatureCache.open(path)
    picked = np.concatenate([np.flatnonzero(cache.y == label)[: rows // classes] for label in range(classes)])
    return cache.take(picked).astype(np.float32), cache.y[picked]


def peer(X: np.ndarray, y: np.ndarray, **options: Any) -> dict[str, Any]:
    """LogisticRegressionCV on standardised features."""
    started, cpu = time.perf_counter(), cpu_seconds()
    X = StandardScaler().fit_transform(X)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    n_jobs = 2 if len(X) >= 2000 else None  # with fewer rows it takes longer to start processes than to fit
    model = LogisticRegressionCV(
        Cs=GRID, cv=folds, n_jobs=n_jobs, use_legacy_attributes=False, l1_ratios=(0,), **options
    )
    model.fit(X, y)
    seconds = time.perf_counter() - started
    accuracies = np.asarray(model.scores_).reshape(FOLDS, len(GRID)).mean(axis=0)
    facts = {"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu, "C": float(np.ravel(model.C_)[0])}
    return facts | {"accuracies": accuracies.tolist()}


def ours(X: np.ndarray, y: np.ndarray, tolerance: float) -> dict[str, Any]:
    """The same by featcache; like fit-head, but one scaling."""
    started, cpu = time.perf_counter(), cpu_seconds()
    solver = Solver(X, y, grid=tuple(GRID), scalings=("standardise",), tolerance=tolerance)
    found = solver.cross_validate(stratified_folds(y, np.arange(len(y)), folds=FOLDS, seed=0))
    (accuracies,), (losses,) = found.scores(np.ones((1, len(y))))
    C = max(zip(accuracies.round(9), -losses, GRID, strict=True))[
        2
    ]  # as the peer does; log loss decides between equals
    chosen = time.perf_counter() - started
    solver.fit("standardise", C)
    seconds = time.perf_counter() - started
    facts = {"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu, "cv_seconds": chosen, "C": float(C)}
    return facts | {"accuracies": accuracies.tolist()}


def everything(X: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The whole of fit-head's choice and fit."""
    started, cpu = time.perf_counter(), cpu_seconds()
    fitted = fit_logreg(X, np.arange(len(y)), y)
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu} | fitted.chosen


def sizes(specifications: list[str], pairs: int) -> list[dict[str, Any]]:
    """Print the table, and return its rows: medians of times, and ratios as medians over pairs."""
    print(
        f"{'rows x dim x classes':24}{'scikit-learn':>19}{'featcache':>19}{'ratio':>13}{'best C, accuracy':>33}{'fit-head':>19}"
    )
    print(f"{'':24}{'s (CPU)':>19}{'s (CPU)':>19}{'s (CPU)':>13}{'scikit-learn, featcache':>33}{'s (CPU)':>19}")
    table = []
    for specification in specifications:
        path, rows, classes = specification.rsplit(":", 2)
        X, y = of_cache(path, int(rows), int(classes))
        runs = [(peer(X, y, max_iter=1000), ours(X, y, 2e-4), everything(X, y)) for _ in range(pairs)]
        facts: dict[str, Any] = {"cache": path, "rows": len(X), "dim": X.shape[1], "classes": int(classes)}
        for name, of_side in zip(("scikit-learn", "featcache", "fit-head"), zip(*runs, strict=True), strict=True):
            facts[name] = {key: statistics.median(run[key] for run in of_side) for key in TIMES}
        for key in TIMES:
            facts[f"ratio_{key}"] = statistics.median(theirs[key] / mine[key] for theirs, mine, _ in runs)
        columns = [f"{facts[name]['seconds']:.2f} ({facts[name]['cpu_seconds']:.2f})" for name in list(facts)[4:7]]
        columns.insert(2, f"{facts['ratio_seconds']:.1f} ({facts['ratio_cpu_seconds']:.1f})")
        columns.insert(3, ", ".join(f"{run['C']:.3g} {max(run['accuracies']):.2%}" for run in runs[0][:2]))
        widths = (19, 19, 13, 33, 19)
        size = f"{len(X):,} x {X.shape[1]:,} x {classes}"
        print(
            f"{size:24}" + "".join(f"{text:>{width}}" for text, width in zip(columns, widths, strict=True)), flush=True
        )
        table.append(facts | {"runs": runs})
    return table


def cpu_seconds() -> float:
    """Of this process and of joblib's workers, which are ended for that: only then are they counted."""
    get_reusable_executor().shutdown(wait=True)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def objective(X: np.ndarray, y: np.ndarray, model: Any, C: float) -> float:
    """scikit-learn's objective divided by C times the number of rows, in float64."""
    W, b = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    logits = X.astype(np.float64) @ W.T + b
    top = logits.max(axis=1)
    losses = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(len(y)), y]
    return float(losses.mean() + (W**2).sum() / (2 * C * len(y)))


def objectives(X: np.ndarray, y: np.ndarray, C: float) -> dict[str, float]:
    """Of both sides' final fits at one C."""
    standardised = StandardScaler().fit_transform(X)
    pipeline, _ = Solver(X, y, grid=(C,)).fit("standardise", C)
    theirs = LogisticRegression(C=C, max_iter=1000).fit(standardised, y)
    return {
        "featcache": objective(standardised, y, pipeline[-1], C),
        "scikit-learn": objective(standardised, y, theirs, C),
    }


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", metavar="FILE", help="embeddings of real images")
    parser.add_argument("--rows", type=int, default=8700)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=101)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tight", action="store_true", help="also the peer with tol=1e-6")
    parser.add_argument("--tolerance", type=float, default=2e-4, help="featcache's while it chooses")
    parser.add_argument("--sizes", nargs="+", metavar="CACHE:ROWS:CLASSES", help="one table of these instead")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.simplefilter("ignore", FutureWarning)
    if arguments.sizes:
        with threadpool_limits(2):
            table = sizes(arguments.sizes, arguments.pairs)
        print(json.dumps({"sizes": table} | machine_facts()))
        return
    X, y = embeddings(arguments.rows, arguments.dim, arguments.classes, 0)
    if arguments.cache:
        X, y = of_cache(arguments.cache, arguments.rows, arguments.classes)
    peers = {"scikit-learn": {"max_iter": 1000}, "scikit-learn max_iter=100": {"max_iter": 100}}
    if arguments.tight:
        peers["scikit-learn tol=1e-6"] = {"max_iter": 1000, "tol": 1e-6}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("featcache", *peers)}
    with threadpool_limits(2):
        for number in range(arguments.pairs):
            for name, options in peers.items():
                if number == 0 or name == "scikit-learn":
                    runs[name].append(peer(X, y, **options))
            runs["featcache"].append(ours(X, y, arguments.tolerance))
            line = ", ".join(f"{name} {run[-1]['seconds']:.1f} s" for name, run in runs.items() if len(run) > number)
            print(f"pair {number + 1}: {line}", file=sys.stderr, flush=True)
        final = {C: objectives(X, y, C) for C in {runs[name][0]["C"] for name in ("featcache", "scikit-learn")}}

    pairs = list(zip(runs["scikit-learn"], runs["featcache"], strict=True))
    ratio = statistics.median(theirs["seconds"] / mine["seconds"] for theirs, mine in pairs)
    cpu_ratio = statistics.median(theirs["cpu_seconds"] / mine["cpu_seconds"] for theirs, mine in pairs)
    print(
        f"{len(X):,} x {X.shape[1]:,}, {arguments.classes} classes, {len(GRID)} C, {FOLDS} folds, {os.cpu_count()} cores"
    )
    print(f"numpy {np.__version__}, scikit-learn {sklearn.__version__}; median of {arguments.pairs} pairs")
    print(f"{'':28}{'s':>8}{'best C':>10}{'accuracy':>10}")
    for name, run in runs.items():
        seconds = statistics.median(entry["seconds"] for entry in run)
        print(f"{name:28}{seconds:8.1f}{run[0]['C']:10.4g}{max(run[0]['accuracies']):10.2%}")
    print(f"featcache is {ratio:.1f} times as fast, by CPU time of all processes {cpu_ratio:.1f} times")
    print(f"{'C':>10}" + "".join(f"{name:>28}" for name in runs) + "   (cross-validated accuracy)")
    for k, C in enumerate(GRID):
        print(f"{C:10.4g}" + "".join(f"{run[0]['accuracies'][k]:28.2%}" for run in runs.values()))
    for C, values in final.items():
        relative = values["featcache"] / values["scikit-learn"] - 1
        print(f"objective at C {C:.4g}: {values}, featcache's is {relative:+.1e} of scikit-learn's")
    facts = {
        "rows": len(X),
        "dim": X.shape[1],
        "classes": arguments.classes,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "final": final,
    }
    print(json.dumps(facts | {"runs": runs} | machine_facts()))


if __name__ == "__main__":
    main()
