"""Do predictions know their limits: sets that hold the truth as often as asked, images of other subjects told apart?

    python benchmarks/limits.py CACHE... [--off-topic CACHE...] [--digits FILE.h5] [--seeds 5] [--held-out 0.4]

For each cache and seed a stratified share of the labelled rows is held out, the others train; copies of one image stay on one
side. Coverage: how often the set of a held-out row holds its class, with thresholds from the out-of-fold scores of the rows
that train, as `predict --coverage` has them, and with thresholds from one half of the held-out rows on the other half; both are
means over 100 random halves. Area under the curve: how well unfamiliarity, as `predict --evidence` has it, tells held-out rows
from those of an off-topic cache of the same backbone. Scores are means over seeds; log loss and calibration error before and
after the temperature. `--digits` adds scikit-learn's digits, made into pictures and embedded by the offline backbone.
"""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from facts import machine_facts
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from featcache.cache.cache import FeatureCache
from featcache.cache.copies import first_copies
from featcache.extraction.extract import extract
from featcache.heads.conformal import Thresholds, fit_thresholds
from featcache.heads.head import softmax
from featcache.heads.logreg import fit_logreg
from featcache.heads.metrics import evaluate_probabilities
from featcache.heads.neighbours import Neighbours
from featcache.heads.validation import stratified_folds
from featcache.models.limits import UNFAMILIAR

HALVES = 100


def embed_digits(path: Path, *, keep: Path | None = None) -> None:
    """scikit-learn's 1,797 digits of 8 x 8 as PNG files (in ``keep``, if given), embedded into a cache unless that is there."""
    if path.exists():
        return
    digits = load_digits()
    with tempfile.TemporaryDirectory() if keep is None else contextlib.nullcontext(keep) as folder:
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            file = Path(folder) / str(label) / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(file)
        extract(folder, path, backbone="timm/tf_efficientnet_lite0")


def held(thresholds: Thresholds, y: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Whether the set of each row holds its class."""
    return thresholds.contain(logits)[np.arange(len(y)), y]


def coverages(y: np.ndarray, logits: np.ndarray, thresholds: Thresholds, seed: int) -> dict[str, float]:
    """Means over random halves: of out-of-fold thresholds, and of thresholds from the other half."""
    rng, found = np.random.default_rng(seed), {"out_of_fold": [], "from_a_half": []}
    holds = held(thresholds, y, logits)
    for _ in range(HALVES):
        half = rng.permutation(len(y)) < len(y) // 2
        found["out_of_fold"].append(holds[~half].mean())
        from_half = fit_thresholds(y[half], logits[half], coverage=thresholds.coverage)
        found["from_a_half"].append(held(from_half, y[~half], logits[~half]).mean())
    return {name: float(np.mean(values)) for name, values in found.items()}


def unfamiliarity(neighbours: Neighbours, X: np.ndarray) -> np.ndarray:
    """Of rows that are not among the neighbours."""
    places, similarities = neighbours.nearest(X, count=neighbours.k + 1)
    return neighbours.unfamiliarity(neighbours.distances(places, similarities, np.full(len(X), -1)))


def one_run(
    cache: FeatureCache, seed: int, *, share: float, coverage: float, off_topic: dict[str, np.ndarray]
) -> dict[str, Any]:
    """All scores of one split."""
    rows = np.flatnonzero(cache.y >= 0)
    X, y, copies = cache.take(rows), cache.y[rows], first_copies(cache.rows.digests[rows])
    folds = stratified_folds(y, copies, folds=10, seed=seed)
    test = np.concatenate([held_out for _, held_out in folds[: round(10 * share)]])
    train = np.setdiff1d(np.arange(len(y)), test)
    own_copies = first_copies(cache.rows.digests[rows[train]])
    fitted = fit_logreg(X[train], np.arange(len(train)), y[train], copies=own_copies, seed=seed)
    once, T = np.unique(own_copies), fitted.temperature
    thresholds = fit_thresholds(y[train][once], fitted.out_of_fold[once] * T, coverage=coverage)
    logits = fitted.head.logits(X[test])
    facts: dict[str, Any] = {"n_train": len(train), "n_test": len(test), "temperature": T}
    facts |= coverages(y[test], logits * T, thresholds, seed)
    sizes = thresholds.contain(logits * T).sum(axis=1)
    facts |= {
        "set_size": float(sizes.mean()),
        "empty": float((sizes == 0).mean()),
        "own_thresholds": int(thresholds.own.sum()),
    }
    for way, factor in (("before", T), ("after", 1.0)):
        scores = evaluate_probabilities(y[test], softmax(logits.astype(np.float64) * factor), cache.classes)
        facts |= {"accuracy": scores["accuracy"], f"log_loss_{way}": scores["log_loss"], f"ece_{way}": scores["ece"]}
    neighbours = Neighbours(X, train[once])
    familiar = unfamiliarity(neighbours, X[test])
    facts["false_alarms"] = float((familiar > UNFAMILIAR).mean())
    for name, features in off_topic.items():
        other = unfamiliarity(neighbours, features)
        truth = np.repeat([0, 1], [len(familiar), len(other)])
        facts[f"auc of {name}"] = float(roc_auc_score(truth, np.concatenate([familiar, other])))
        facts[f"alarms of {name}"] = float((other > UNFAMILIAR).mean())
    return facts


def main() -> None:
    """Print what was found for each cache, and all runs as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", nargs="*", metavar="CACHE")
    parser.add_argument("--off-topic", nargs="+", default=[], metavar="CACHE")
    parser.add_argument("--digits", type=Path, metavar="FILE.h5")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held-out", type=float, default=0.4)
    parser.add_argument("--coverage", type=float, default=0.95)
    arguments = parser.parse_args()
    if arguments.digits:
        embed_digits(arguments.digits)
    others = [FeatureCache.open(path) for path in arguments.off_topic]
    found = []
    for path in [*arguments.caches, *([arguments.digits] if arguments.digits else [])]:
        cache = FeatureCache.open(path)
        there = [other for other in others if other.spec == cache.spec and other.path != cache.path]
        features = {other.path.name: other.take(np.arange(len(other))) for other in there}
        options = {"share": arguments.held_out, "coverage": arguments.coverage, "off_topic": features}
        runs = [one_run(cache, seed, **options) for seed in range(arguments.seeds)]
        mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        print(f"{cache.path.name}, {cache.spec.backbone}, {len(cache.classes)} classes, means of {len(runs)} splits:")
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in mean.items()), flush=True)
        found += [
            {"cache": cache.path.name, "backbone": cache.spec.backbone, "seed": seed} | run
            for seed, run in enumerate(runs)
        ]
    print(json.dumps({"runs": found} | machine_facts()))


if __name__ == "__main__":
    main()
