"""Labels that may be wrong: what heads say that have not seen the row, and what its neighbours are labelled.

In: features, labels and groups of copies of N rows, their neighbours. Out: probabilities, and findings of kind ``label``.
``heads.confident`` decides; here it is fed, and put into words.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from featcache.curation.finding import Finding
from featcache.curation.neighbours import Nearest
from featcache.heads.confident import Votes, confident_joint, doubts, wrong_labels
from featcache.heads.head import Array, FeatureSource, Indices, Scaling, softmax
from featcache.heads.validation import different_images, fit_temperature, stratified_folds
from featcache.images.groups import first_members

if TYPE_CHECKING:
    from featcache.heads.logreg import Solver

__all__ = ["HOW_MANY_ARE_REAL", "confident_joint", "estimate", "find_label_errors", "out_of_fold"]

log = logging.getLogger("featcache")
HOW_MANY_ARE_REAL = (
    "of label suspects about half are really wrong: 51% by people's judgement on ten test sets (Northcutt et al. 2021)"
)
_ASKED = 10  # neighbours
_FOLDS, _REPEATS = 5, 3  # other folds each time: averaged, probabilities depend less on who trained with whom
_FEWEST = 3  # different images of a class: of fewer, heads have seen one or none
_MOST_VALUES = (
    2**25
)  # of features that train at a time: 1.6 GB with all that is made of them; of more rows each head sees a sample
_KEPT = 2**26  # probabilities, 256 MB; more lie in a temporary file, in half precision
_BLOCK = 2**22  # of them, worked on at a time
_SECONDS = 2e-6, 4e-8  # of one core, per value of the features: in all, and for each class
Progress = Callable[[int, int], None]  # heads trained, heads to train


def estimate(n: int, dim: int, n_classes: int, *, cores: int = 2) -> tuple[float, int]:
    """Seconds and bytes of memory that ``out_of_fold`` takes, roughly."""
    trained = min(n, _MOST_VALUES // dim)
    values = trained * min(trained, dim)
    seconds = values * (_SECONDS[0] + _SECONDS[1] * n_classes) / cores
    return seconds, 8 * trained * dim + 40 * values + 4 * min(n * n_classes, _KEPT)


def out_of_fold(
    features: FeatureSource,
    rows: Indices,
    y: Array,
    groups: Indices | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Array:
    """(N, C) probabilities of each row, from logistic regressions that were trained without it and its copies.

    C and scaling are chosen as ``heads.logreg`` chooses them, logits calibrated by temperature, and probabilities averaged over
    three ways to fold. Of more than 33 million values (26,000 rows of 1,280) each head trains on so many, and there is one way.

    Args:
        features: (M, D), finite. rows: (N,) numbers of rows among them. y: (N,) labels 0..C-1, -1: none.
        groups: (N,) the same number of rows that show the same image: they lie in one fold. None: there are no copies.
        seed: of the folds and samples. progress: called after each pass.

    Returns:
        float32; of more than 64 million float16, in a temporary file that goes when the array does. NaN of rows without a label,
        and of those whose class has fewer than 3 different images; of all where fewer than two classes have more.
    """
    n_classes = max(int(y.max(initial=-1)) + 1, 1)
    found = _table(len(rows), n_classes)
    groups = np.arange(len(rows)) if groups is None else groups
    judged, present = _judged(y, groups)
    if len(present) < 2:
        return found
    labels, copies = np.searchsorted(present, y[judged]), first_members(groups[judged])
    whole = len(judged) * features.shape[1] <= _MOST_VALUES
    passes = _passes if whole else _sampled_passes
    for part, p in passes(features, rows[judged], labels, copies, seed=seed, progress=progress or (lambda *_: None)):
        for some in np.array_split(np.arange(len(part)), max(1, p.size // _BLOCK)):  # what is left in between is 0
            block = np.zeros((len(some), n_classes), np.float32)
            block[:, present] = p[some]
            found[judged[part[some]]] = block
    return found


def _table(n: int, n_classes: int, *, kept: int = _KEPT) -> Array:
    """(n, C) NaN, in memory or in a file that nobody else sees."""
    if n * n_classes <= kept:
        return np.full((n, n_classes), np.nan, np.float32)
    with tempfile.TemporaryFile() as file:
        table: Array = np.memmap(file, np.float16, "w+", shape=(n, n_classes))
    for start in range(0, n, step := max(1, _BLOCK // n_classes)):
        table[start : start + step] = np.nan
    return table


def _judged(y: Array, groups: Indices) -> tuple[Indices, Array]:
    """Rows whose class has enough different images, and these classes."""
    known = np.flatnonzero(y >= 0)
    counts = different_images(y[known], first_members(groups[known]))
    present = np.flatnonzero(counts >= _FEWEST)
    if few := int((counts > 0).sum() - len(present)):
        classes = "1 class" if few == 1 else f"{few} classes"
        log.info("labels of %s with fewer than %d different images are not judged", classes, _FEWEST)
    return known[np.isin(y[known], present)], present


def _passes(
    features: FeatureSource, rows: Indices, y: Array, copies: Indices, *, seed: int, progress: Progress
) -> Iterator[tuple[Indices, Array]]:
    """All rows, and their (n, K) probabilities."""
    from featcache.heads.logreg import C_GRID, Solver

    X, folds = features[rows].astype(np.float64), _folds_of(y, copies)
    splits = stratified_folds(y, copies, folds=folds, seed=seed)
    solver, scaling, C, temperature, logits = _chosen(X, y, copies, splits)
    total = softmax(logits / temperature)
    progress(1, _REPEATS)
    path = C_GRID[: C_GRID.index(C) + 1]
    again = Solver(X, y, grid=path, scalings=(scaling,))
    again.basis, again.rows = solver.basis, solver.rows
    for repeat in range(1, _REPEATS):
        splits = stratified_folds(y, copies, folds=folds, seed=(seed + repeat * 7919) % 2**32)
        total += softmax(again.out_of_fold(splits, (scaling, C)).astype(np.float64) / temperature)
        progress(repeat + 1, _REPEATS)
    yield np.arange(len(y)), total / _REPEATS


def _chosen(
    X: Array, y: Array, copies: Indices, splits: list[tuple[Indices, Indices]]
) -> tuple["Solver", Scaling, float, float, Array]:
    """The solver of all settings, the scaling, C and temperature that suit, and their (n, K) logits before the latter."""
    from featcache.heads.logreg import C_GRID, Solver

    solver = Solver(X, y, grid=C_GRID)
    results = solver.cross_validate(splits)
    scaling, C = solver.settings[results.best(np.ones((1, len(y))), copies)[0]]
    logits = solver.out_of_fold(splits, (scaling, C)).astype(np.float64)
    return solver, scaling, C, fit_temperature(y, logits, results.fold)[0], logits


def _folds_of(y: Array, copies: Indices) -> int:
    """As many as the smallest class has different images, at most five."""
    return min(_FOLDS, int(different_images(y, copies).min()))


def _sampled_passes(
    features: FeatureSource,
    rows: Indices,
    y: Array,
    copies: Indices,
    *,
    seed: int,
    progress: Progress,
    most: int = _MOST_VALUES,
) -> Iterator[tuple[Indices, Array]]:
    """A fold's rows and their (n, K) probabilities, from a head that saw a sample of the others, block by block."""
    from featcache.heads.logreg import Solver, head_of

    generator, folds = np.random.default_rng(seed), _folds_of(y, copies)
    count = most // features.shape[1]
    some = _sample(np.unique(copies), y, count, generator)
    itself = np.arange(len(some))
    splits = stratified_folds(y[some], itself, folds=min(folds, _folds_of(y[some], itself)), seed=seed)
    _, scaling, C, temperature, _ = _chosen(features[rows[some]].astype(np.float64), y[some], itself, splits)
    log.info("%d heads, each trained on %d of %d images, judge the labels", folds, len(some), len(y))
    progress(1, folds + 1)
    for number, (train, held_out) in enumerate(stratified_folds(y, copies, folds=folds, seed=seed), 2):
        some = _sample(train, y, count, generator)
        solver = Solver(features[rows[some]].astype(np.float64), y[some], grid=(C,))
        head = head_of(solver.fit(scaling, C)[0], scaling).at_temperature(temperature)
        step = max(1, _BLOCK // max(features.shape[1], len(head.layers[0][1])))
        for start in range(0, len(held_out), step):
            part = held_out[start : start + step]
            yield part, head.probabilities(features[rows[part]])
        progress(number, folds + 1)


def _sample(rows: Indices, y: Array, count: int, generator: np.random.Generator) -> Indices:
    """``count`` of ``rows``, ascending; the fewest that folds need of each class among them."""
    rows = generator.permutation(rows)
    order = np.argsort(y[rows], kind="stable")
    starts = np.searchsorted(y[rows][order], y[rows][order])
    first = order[np.arange(len(rows)) - starts < _FEWEST]
    chosen = np.concatenate([first, np.arange(len(rows))])
    _, at = np.unique(chosen, return_index=True)
    kept = chosen[np.sort(at)][: max(count, len(first))]
    return np.sort(rows[kept])


def neighbour_votes(nearest: Nearest, y: Array, groups: Indices | None) -> Votes:
    """What the nearest neighbours are labelled, weighed by similarity. Copies, and rows without a label, are not asked."""
    k = min(_ASKED, nearest.k)
    places, weights = nearest.places[:, :k], np.maximum(nearest.similarities[:, :k], 0).astype(np.float64)
    weights *= y[places] >= 0
    if groups is not None:
        weights *= groups[places] != groups[:, None]
    sums = weights.sum(axis=1, keepdims=True)
    return Votes(np.maximum(y[places], 0), weights / np.where(sums == 0, 1, sums))


def find_label_errors(
    y: Array, probabilities: Array, nearest: Nearest | None = None, *, groups: Indices | None = None
) -> list[Finding]:
    """Suspects, the surest first; which and how many is said in ``heads.confident``. score: its ``doubts``, above 0.5.

    Args:
        y: (N,) labels, -1: none. probabilities: (N, C), from ``out_of_fold``. groups: as there. All three by place in
            ``nearest.rows``.
        nearest: None: neighbours are not asked, and rows are numbered as they come.
    """
    votes = None if nearest is None else neighbour_votes(nearest, y, groups)
    doubt, other = doubts(y, probabilities, votes)
    rows = np.arange(len(y)) if nearest is None else nearest.rows
    found = []
    for place in wrong_labels(y, probabilities, votes).tolist():
        p, suggested = probabilities[place], int(other[place])
        reason = f"probability {p[suggested]:.1%} of the class suggested, {p[y[place]]:.1%} of its own"
        if votes is not None and (asked := votes.weights[place] > 0).any():
            labels = votes.labels[place][asked]
            of_other, of_own = int((labels == suggested).sum()), int((labels == y[place]).sum())
            reason += f"; of its {len(labels)} nearest neighbours {of_other} are labelled so, {of_own} as it is"
        found.append(Finding("label", int(rows[place]), float(doubt[place]), reason, suggested=suggested))
    return found
