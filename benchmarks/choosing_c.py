"""Does the rule for C, and the temperature after it, keep accuracy and give better probabilities?

    python benchmarks/choosing_c.py CACHE... [--seeds 5] [--held-out 0.4]

For each cache and seed a stratified share of the labelled rows is held out, the others train, three ways: C and scaling of
the best out-of-fold accuracy, of equals the lowest log loss (``before``); of the settings within one standard error of the
best accuracy the one of the lowest log loss (``rule``); the same, its logits divided by the temperature (``after``).
Scores are of the held-out rows, means over seeds; copies of one image stay on one side.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np
from facts import machine_facts

from featcache.cache.cache import FeatureCache
from featcache.cache.copies import first_copies
from featcache.heads.logreg import C_GRID, Solver, fit_logreg, head_of
from featcache.heads.metrics import evaluate_probabilities
from featcache.heads.validation import stratified_folds

SCORES = ("accuracy", "log_loss", "ece")


def heads(X: np.ndarray, y: np.ndarray, copies: np.ndarray, seed: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """way -> head and chosen setting."""
    fitted = fit_logreg(X, np.arange(len(y)), y, copies=copies, seed=seed)
    best = max(fitted.curve, key=lambda entry: (round(entry["accuracy"], 9), -entry["log_loss"]))
    pipeline, _ = Solver(X.astype(np.float64), y, grid=C_GRID).fit(best["scaling"], best["C"])
    chosen = fitted.chosen | {"cv_log_loss": fitted.cv_log_loss, "temperature": fitted.temperature}
    return {
        "before": (head_of(pipeline, best["scaling"]), {"C": best["C"], "scaling": best["scaling"]}),
        "rule": (fitted.head.at_temperature(1 / fitted.temperature), fitted.chosen),
        "after": (fitted.head, chosen),
    }


def runs(path: str, seeds: int, share: float) -> list[dict[str, Any]]:
    """A row per seed and way."""
    cache = FeatureCache.open(path)
    rows = np.flatnonzero(cache.y >= 0)
    X, y, copies = cache.take(rows), cache.y[rows], first_copies(cache.rows.digests[rows])
    found = []
    for seed in range(seeds):
        folds = stratified_folds(y, copies, folds=10, seed=seed)
        held_out = np.concatenate([held_out for _, held_out in folds[: round(10 * share)]])
        train = np.setdiff1d(np.arange(len(y)), held_out)
        ways = heads(X[train], y[train], first_copies(cache.rows.digests[rows[train]]), seed)
        for way, (head, chosen) in ways.items():
            scores = evaluate_probabilities(y[held_out], head.probabilities(X[held_out]), cache.classes)
            facts = {"cache": path, "seed": seed, "way": way, "n_train": len(train), "n_test": len(held_out)}
            found.append(facts | chosen | {name: scores[name] for name in SCORES})
    return found


def main() -> None:
    """Print a line for each cache and way, and all runs as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", nargs="+", metavar="CACHE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held-out", type=float, default=0.4)
    arguments = parser.parse_args()
    found = [run for path in arguments.caches for run in runs(path, arguments.seeds, arguments.held_out)]
    for path in arguments.caches:
        for way in ("before", "rule", "after"):
            chosen = [run for run in found if (run["cache"], run["way"]) == (path, way)]
            accuracy, log_loss, ece = (np.mean([run[name] for run in chosen]) for name in SCORES)
            settings = ", ".join(f"{run['C']:g} {run['scaling']}" for run in chosen)
            n_train, n_test = chosen[0]["n_train"], chosen[0]["n_test"]
            print(
                f"{path}, {n_train} train, {n_test} held out, {way:6}: accuracy {accuracy:.2%}, log loss {log_loss:.4f}, "
                f"calibration error {ece:.2%}; C {settings}"
            )
    print(json.dumps({"runs": found, "command": " ".join(["python", *sys.argv])} | machine_facts()))


if __name__ == "__main__":
    main()
