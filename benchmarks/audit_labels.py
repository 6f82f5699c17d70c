"""Does the audit find wrong labels, and images of other subjects, and how does it compare with cleanlab?

    python benchmarks/audit_labels.py CACHE... [--off-topic CACHE...] [--shares 0.05 0.1] [--seeds 5] [--usual 1] [--most 2000]

For each cache, share and seed so many labels are replaced by another class, at random. Ranking: average precision of the replaced
labels, ours and cleanlab's, by self-confidence and normalised margin, on the same out-of-fold probabilities; and of cleanlab's own
usual way, `CleanLearning.find_label_issues` with scikit-learn's logistic regression, for `--usual` of the seeds, as it is slow.
Flags: precision and recall of what is flagged, ours and that of `cleanlab.filter.find_label_issues`. Suggested: how often the class
suggested for a found label is the one that was replaced. Untouched: what is flagged before anything is replaced.

With `--off-topic`, for each other cache of the same backbone, so many of its rows are added under random labels: area under the
curve of `find_off_topic`'s order, precision and recall of what it flags. Of caches with more rows than `--most`, every so manieth.
"""

import argparse
import contextlib
import io
import json
import time
import warnings
from typing import Any

import numpy as np
from cleanlab.classification import CleanLearning
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from facts import machine_facts
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from featcache.cache.cache import FeatureCache
from featcache.cache.copies import first_copies
from featcache.curation.label_errors import find_label_errors, neighbour_votes, out_of_fold
from featcache.curation.neighbours import Nearest, nearest_rows
from featcache.curation.outliers import find_off_topic, find_outliers, off_topic_scores
from featcache.curation.overlaps import find_overlaps
from featcache.heads.confident import doubts

USUAL = ("cleanlab's usual way", "its precision", "its recall")


def precision_recall(flagged: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Of two masks; a precision of nothing is 1."""
    return float(true[flagged].mean()) if flagged.any() else 1.0, float(flagged[true].mean())


def labels_run(
    X: np.ndarray, y: np.ndarray, groups: np.ndarray, nearest: Nearest, share: float, seed: int, *, usual: bool
) -> dict[str, float]:
    """Replace labels, and look for them. usual: also cleanlab's usual way."""
    generator, n_classes, places = np.random.default_rng(seed), int(y.max()) + 1, np.arange(len(y))
    wrong = np.zeros(len(y), bool)
    wrong[generator.choice(len(y), round(share * len(y)), replace=False)] = True
    noisy = np.where(wrong, (y + generator.integers(1, n_classes, len(y))) % n_classes, y)
    started = time.process_time()
    p = out_of_fold(X, places, noisy, groups, seed=seed).astype(np.float64)
    seconds = time.process_time() - started
    p /= p.sum(axis=1, keepdims=True)
    doubt, _ = doubts(noisy, p, neighbour_votes(nearest, noisy, groups))
    findings = find_label_errors(noisy, p, nearest, groups=groups)
    flagged = np.isin(places, [finding.row for finding in findings])
    right = [finding.suggested == y[finding.row] for finding in findings if wrong[finding.row]]
    found: dict[str, float] = {"ours": float(average_precision_score(wrong, doubt)), "seconds": seconds}
    for method in ("self_confidence", "normalized_margin"):
        quality = get_label_quality_scores(noisy, p, method=method)
        found[f"cleanlab {method}"] = float(average_precision_score(wrong, -quality))
    found["precision"], found["recall"] = precision_recall(flagged, wrong)
    issues = find_label_issues(noisy, p, n_jobs=1)
    found["cleanlab precision"], found["cleanlab recall"] = precision_recall(issues, wrong)
    found |= dict.fromkeys(USUAL, np.nan)
    if usual:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            table = CleanLearning(LogisticRegression(max_iter=1000), seed=seed).find_label_issues(X, noisy)
        precision = average_precision_score(wrong, -table["label_quality"].to_numpy())
        found |= dict(
            zip(USUAL, (precision, *precision_recall(table["is_label_issue"].to_numpy(), wrong)), strict=True)
        )
    found["suggested"] = float(np.mean(right)) if right else 1.0
    return found


def off_topic_run(X: np.ndarray, y: np.ndarray, other: np.ndarray, share: float, seed: int) -> dict[str, float]:
    """Add rows of another subject under random labels, and look for them."""
    generator = np.random.default_rng(seed)
    count = max(3, round(share * len(X)))
    added = other[generator.choice(len(other), count, replace=False)]
    strange = np.arange(len(X) + count) >= len(X)
    both, labels = np.concatenate([X, added]), np.concatenate([y, generator.integers(0, y.max() + 1, count)])
    rows = np.arange(len(both))
    z, *_ = off_topic_scores(both, rows, labels)
    flagged = np.isin(rows, [finding.row for finding in find_off_topic(both, rows, labels)])
    precision, recall = precision_recall(flagged, strange)
    return {"auc": float(roc_auc_score(strange, z)), "precision": precision, "recall": recall}


def untouched(X: np.ndarray, y: np.ndarray, groups: np.ndarray, nearest: Nearest) -> dict[str, int]:
    """How many of each kind."""
    rows = np.arange(len(X))
    p = out_of_fold(X, rows, y, groups)
    return {
        "rows": len(X),
        "label": len(find_label_errors(y, p, nearest, groups=groups)),
        "outlier": len(find_outliers(nearest, y, groups=groups)),
        "off_topic": len(find_off_topic(X, rows, y)),
        "overlaps": len(find_overlaps(y, p)),
    }


def load(path: str, most: int) -> tuple[FeatureCache, np.ndarray, np.ndarray, np.ndarray]:
    """The cache, features, labels from 0 and copies of its labelled rows, or of some."""
    cache = FeatureCache.open(path)
    rows = np.flatnonzero(cache.y >= 0)
    rows = rows[:: -(-len(rows) // most)]
    labels = np.unique(cache.y[rows], return_inverse=True)[1]
    return cache, cache.take(rows).astype(np.float32), labels, first_copies(cache.rows.digests[rows])


def mean(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    known = {name: [run[name] for run in runs if not np.isnan(run[name])] for name in runs[0]}
    return {name: float(np.mean(values)) for name, values in known.items() if values}


def main() -> None:
    """Print what was found for each cache, and all runs as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", nargs="+", metavar="CACHE")
    parser.add_argument("--off-topic", nargs="+", default=[], metavar="CACHE")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.1])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--usual", type=int, default=1, metavar="SEEDS")
    parser.add_argument("--most", type=int, default=2000)
    arguments = parser.parse_args()
    strangers = [load(path, arguments.most) for path in arguments.off_topic]
    found: list[dict[str, Any]] = []
    for path in arguments.caches:
        cache, X, y, groups = load(path, arguments.most)
        nearest = nearest_rows(X, np.arange(len(X)))
        facts = {"cache": cache.path.name, "backbone": cache.spec.backbone}
        print(f"{cache.path.name}, {cache.spec.backbone}, {y.max() + 1} classes", flush=True)
        found.append(facts | {"untouched": untouched(X, y, groups, nearest)})
        print(
            "  untouched:", ", ".join(f"{name} {count}" for name, count in found[-1]["untouched"].items()), flush=True
        )
        for share in arguments.shares:
            runs = [
                labels_run(X, y, groups, nearest, share, seed, usual=seed < arguments.usual)
                for seed in range(arguments.seeds)
            ]
            found.append(facts | {"wrong": share, "runs": runs, "mean": mean(runs)})
            print(f"  {share:.0%} wrong:", ", ".join(f"{k} {v:.4g}" for k, v in mean(runs).items()), flush=True)
        for other, features, *_ in strangers:
            if other.spec != cache.spec or other.path.name == cache.path.name:
                continue
            for share in arguments.shares:
                runs = [off_topic_run(X, y, features, share, seed) for seed in range(arguments.seeds)]
                found.append(facts | {"off_topic": other.path.name, "added": share, "runs": runs, "mean": mean(runs)})
                words = ", ".join(f"{k} {v:.4g}" for k, v in mean(runs).items())
                print(f"  {share:.0%} of {other.path.name} added: {words}", flush=True)
    print(json.dumps({"runs": found} | machine_facts()))


if __name__ == "__main__":
    main()
