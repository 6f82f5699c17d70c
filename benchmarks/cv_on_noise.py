"""Does cross-validation call noise knowledge? Labels without any relation to the features; the truth is chance.

    python benchmarks/cv_on_noise.py [--sets 200]

For each kind of data: the mean accuracy of the best of 33 settings as it is, and corrected for having been chosen
(`featcache/heads/validation.py`), with standard errors over data sets.
"""

import argparse
import json
import sys

import numpy as np
from facts import machine_facts

from featcache.heads.logreg import fit_logreg

#        rows, values, classes, copies of each row
KINDS = ((100, 64, 2, 1), (100, 64, 5, 1), (40, 64, 2, 1), (400, 64, 2, 1), (150, 16, 2, 5))


def accuracies(n: int, dim: int, classes: int, copies: int, seed: int) -> tuple[float, float]:
    """(as it is, corrected), on one data set with classes of equal size."""
    generator = np.random.default_rng(seed)
    X = np.repeat(generator.normal(size=(n // copies, dim)), copies, axis=0)
    y = np.repeat(generator.permutation(np.arange(n // copies) % classes), copies)
    fitted = fit_logreg(X, np.arange(n), y, copies=np.arange(n) // copies * copies, seed=seed)
    assert fitted.cv_accuracy is not None
    return max(entry["accuracy"] for entry in fitted.curve), fitted.cv_accuracy


def main() -> None:
    """Print a line for each kind of data, and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200)
    sets = parser.parse_args().sets
    rows = []
    for n, dim, classes, copies in KINDS:
        found = np.array([accuracies(n, dim, classes, copies, seed) for seed in range(sets)])
        (raw, corrected), (_, error) = found.mean(axis=0).tolist(), (found.std(axis=0) / sets**0.5).tolist()
        rows.append({"rows": n, "dim": dim, "classes": classes, "copies": copies, "raw": raw, "corrected": corrected})
        name = f"{n} rows of {dim} values, {classes} classes" + (f", each row {copies} times" if copies > 1 else "")
        print(
            f"{name}: best {raw:.2%}, corrected {corrected:.2%} (standard error {error:.2%}), chance {1 / classes:.0%}"
        )
    print(json.dumps({"sets": sets, "rows": rows, "command": " ".join(["python", *sys.argv])} | machine_facts()))


if __name__ == "__main__":
    main()
