"""Labels that may be wrong: what heads say that have not seen the row, and what its neighbours are labelled.

In: features, labels and groups of copies of N rows, their neighbours. Out: probabilities, and findings of kind ``label``. What
``heads.confident`` decides is put into words here.
"""

import logging

import numpy as np

from featcache.curation.finding import Finding
from featcache.curation.neighbours import Nearest
from featcache.heads.confident import confident_joint, doubts, wrong_labels
from featcache.heads.head import Array, FeatureSource, Indices, softmax
from featcache.heads.validation import fit_temperature, stratified_folds

__all__ = ["confident_joint", "find_label_errors", "neighbour_shares", "out_of_fold"]

log = logging.getLogger("featcache")
_K = 10  # neighbours that are asked
_FOLDS = 5
_FEWEST = 3  # different images of a class: of fewer, one head in two has hardly seen it
_REPEATS = 3  # other folds, over which probabilities are averaged


def out_of_fold(
    features: FeatureSource, rows: Indices, y: Array, groups: Indices | None = None, *, seed: int = 0
) -> Array:
    """(N, C) float32 probabilities of each row, from logistic regressions that were trained without it and its copies.

    C and scaling are chosen as ``heads.logreg`` chooses them, logits are calibrated by temperature, and probabilities averaged
    over several ways to fold.

    Args:
        features: (M, D), finite. rows: (N,) numbers of rows among them. y: (N,) labels 0..C-1, -1: none.
        groups: (N,) of rows that show the same image the same number; they lie in one fold. None: there are no copies.
        seed: of the folds.

    Returns:
        NaN of rows without a label, or whose class has fewer than 3 different images; of all where fewer than two classes have.
    """
    n_classes = int(y.max(initial=-1)) + 1
    found = np.full((len(rows), max(n_classes, 1)), np.nan, np.float32)
    groups = np.arange(len(rows)) if groups is None else groups
    judged, present, labels = _judged(y, groups)
    if len(present) < 2:
        return found
    from featcache.heads.logreg import C_GRID, Solver

    X = features[rows[judged]].astype(np.float64)
    copies = first_of_groups(groups[judged])
    folds = min(_FOLDS, int(np.bincount(labels[np.unique(copies)]).min()))
    splits = stratified_folds(labels, copies, folds=folds, seed=seed)
    solver = Solver(X, labels, grid=C_GRID)
    results = solver.cross_validate(splits)
    setting = solver.settings[results.best(np.ones((1, len(labels))), copies)[0]]
    logits = solver.out_of_fold(splits, setting).astype(np.float64)
    temperature, _ = fit_temperature(labels, logits, results.fold)
    total = softmax(logits / temperature)
    for repeat in range(1, _REPEATS):
        splits = stratified_folds(labels, copies, folds=folds, seed=(seed + repeat * 7919) % 2**32)
        again = Solver(X, labels, grid=C_GRID[: C_GRID.index(setting[1]) + 1], scalings=setting[:1])
        again.prepare()
        total += softmax(again.out_of_fold(splits, setting).astype(np.float64) / temperature)
    found[judged] = 0
    found[np.ix_(judged, present)] = total / _REPEATS
    return found


def _judged(y: Array, groups: Indices) -> tuple[Indices, Array, Array]:
    """Rows whose class has enough different images, these classes, and the rows' positions among them."""
    first = first_of_groups(groups)
    different = np.unique(first[y >= 0])
    counts = np.bincount(y[different][y[different] >= 0], minlength=1)
    present = np.flatnonzero(counts >= _FEWEST)
    judged = np.flatnonzero(np.isin(y, present))
    if few := int((counts > 0).sum() - len(present)):
        log.info("labels of %d classes with fewer than %d different images are not judged", few, _FEWEST)
    return judged, present, np.searchsorted(present, y[judged])


def first_of_groups(groups: Indices) -> Indices:
    """(N,) group numbers -> (N,) the first row of each row's group, as ``stratified_folds`` wants it."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return first[group]


def neighbour_shares(nearest: Nearest, y: Array, n_classes: int, *, groups: Indices | None = None) -> Array:
    """(N, C) shares of the classes among the labels of the nearest neighbours, weighed by similarity.

    Copies of the row, and neighbours without a label, are not asked; zeros where nobody is left.
    """
    k = min(_K, nearest.k)
    places, weights = nearest.places[:, :k], np.maximum(nearest.similarities[:, :k], 0).astype(np.float64)
    weights = weights * (y[places] >= 0)
    if groups is not None:
        weights *= groups[places] != groups[:, None]
    shares = np.zeros((len(y), n_classes))
    for column in range(k):
        shares[np.arange(len(y)), y[places[:, column]]] += weights[:, column]
    sums = shares.sum(axis=1, keepdims=True)
    return shares / np.where(sums == 0, 1, sums)


def find_label_errors(
    y: Array, probabilities: Array, nearest: Nearest | None = None, *, groups: Indices | None = None
) -> list[Finding]:
    """Suspects, the surest first. score: ``heads.confident.doubts``.

    Args:
        y: (N,) labels, -1: none. probabilities: (N, C), from ``out_of_fold``; y, probabilities and groups by place in
            ``nearest.rows``. nearest: None: neighbours are not asked, and rows are numbered as they come.
    """
    shares = None if nearest is None else neighbour_shares(nearest, y, probabilities.shape[1], groups=groups)
    doubt, other = doubts(y, probabilities, shares)
    rows = np.arange(len(y)) if nearest is None else nearest.rows
    found = []
    for place in wrong_labels(y, probabilities, shares):
        p = probabilities[place]
        reason = f"another class has probability {p[other[place]]:.2f}, its own {p[y[place]]:.2f}"
        found.append(Finding("label", int(rows[place]), float(doubt[place]), reason, suggested=int(other[place])))
    return found
