"""The nearest neighbours of every row among all others, by cosine similarity. Exact: blocked products of matrices.

In: features (M, D) and which rows to compare. Out: ``Nearest``. Work grows with the square of the number of rows, memory with the
number; what does not fit into half a gigabyte as float32 is read again block by block. Each product serves both of its sides,
and of each only what beats the k-th best so far is looked at: sorting everything would take longer than the products. Blocks
meet in rounds, as teams do in a tournament, so that cores need not wait for each other.

Beyond 300,000 rows, without a GPU and with the extra ``neighbours``, an index proposes (HNSW: Malkov and Yashunin 2018) instead of
all products, and how many of the true neighbours it finds is measured on 1,000 rows.
"""

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from featcache.curation.best_so_far import EMPTY, Keys, keep, keys_of, places_of, similarities_of
from featcache.errors import UsageError
from featcache.heads.head import Array, FeatureSource, Indices
from featcache.system.runtime_options import gpu_for, usable_cores

_BLOCK = 1024  # rows on each side of a product: its 4 MB of similarities stay in the caches while they are sifted
_LARGE = 2048  # rows read at a time where they are not kept, or on each side of a GPU's product
_SPARE = 8  # neighbours more than asked for: exact arithmetic then puts in order what float32 does not tell apart
_MEMORY = 2**29  # bytes; rows that fit as float32 are kept in memory, of more each block is read again
_AT_A_TIME = 128  # rows whose similarities are computed again in float64
EXACT_BELOW = 300_000  # rows; of more, an index may propose
_MEASURED = 1000  # rows whose neighbours in an index are compared with the true ones
# Multiplications; of fewer, loading PyTorch takes longer. An estimate: ``benchmarks/gpu.py`` measures it.
_WORTH_A_GPU = 10**12
_WORKING = 2**25  # bytes of each core: a product, and what of it is among the best
_SIFTED = 3e-7  # seconds for each that was among the best of its row when they met
_READ = 4e-9  # seconds a value takes that is read and scaled again
_IN_ORDER = 3e-9  # seconds a value takes in float64
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Nearest:
    """N rows and the k nearest others of each.

    Attributes:
        rows: (N,) their numbers in the cache.
        places: (N, k) positions in ``rows``, nearest first, never the row itself; of equal similarities the first row first, of
            up to eight more than k.
        similarities: (N, k) float32 cosines, descending.
        recall: the share of the true neighbours that are among them, measured on 1,000 rows where an index was used; 1: exact.
    """

    rows: Indices
    places: Indices
    similarities: npt.NDArray[np.float32]
    recall: float = 1.0

    @property
    def k(self) -> int:
        """How many neighbours each row has."""
        return int(self.places.shape[1])


def nearest_rows(
    features: FeatureSource,
    rows: Indices,
    *,
    k: int = 20,
    device: str = "auto",
    memory: int = _MEMORY,
    exact_below: int = EXACT_BELOW,
    progress: Progress | None = None,
) -> Nearest:
    """Find the k nearest other rows of each of (N,) ``rows`` of (M, D) features; k is N - 1 if there are fewer.

    Args:
        device: auto, cpu, cuda, cuda:N or mps; auto takes a GPU where there is one and enough to do.
        memory: bytes that rows may take as float32.
        exact_below: of so many rows or more an index proposes neighbours, where ``has_index`` and there is no GPU.
        progress: called with steps done and steps to do; what it raises ends the search.

    Raises:
        UsageError: features that are not finite; no such device.
    """
    count = max(len(rows) - 1, 0)
    k, kept = min(k, count), min(k + _SPARE, count)
    work = len(rows) ** 2 * features.shape[1]
    report, gpu = progress or (lambda *_: None), gpu_for(device, work, worth=_WORTH_A_GPU, auto=("cuda", "mps"))
    blocks, best = _Blocks(features, rows, memory, _LARGE if gpu else _BLOCK), np.full((len(rows), kept), EMPTY)
    indexed = gpu is None and len(rows) >= exact_below and has_index()
    if gpu is not None:
        steps, todo = _search_on(gpu, blocks, best), len(blocks) ** 2
    elif indexed:
        steps, todo = _search_index(blocks, best), 2 * len(blocks)
    else:
        steps, todo = _search(blocks, best), _products(len(blocks))
    with contextlib.closing(steps):
        for done, _ in enumerate(steps if k else (), 1):
            report(done, todo)
    places, similarities = _in_order(blocks, best, k)
    recall = _recall(blocks, similarities) if indexed and k else 1.0
    return Nearest(rows, places, similarities, recall)


def has_index() -> bool:
    """Whether the extra ``neighbours`` is installed."""
    return importlib.util.find_spec("usearch") is not None


def estimate(n: int, dim: int, *, k: int = 20, memory: int = _MEMORY) -> tuple[float, int]:
    """How long ``nearest_rows`` takes for n rows of ``dim`` values on this CPU, in seconds, and what memory, in bytes.

    It times products of random rows on all cores, a tenth of a second or two, as busy as they are now.
    """
    X = np.random.default_rng(0).normal(size=(min(n, _BLOCK), dim)).astype(np.float32)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    none, all_found = (
        np.zeros((len(X), 1), np.int64),
        keys_of(np.full(len(X), 2, np.float32), np.zeros(len(X), np.intp)),
    )

    def meet(_: int) -> None:
        similar = X @ X.T
        for side in (similar, similar.T):
            keep(none, all_found, side, 0)

    cores, blocks, kept = usable_cores(), -(-n // _BLOCK), 4 * n * dim <= memory
    with _on_each_core() as pool:
        list(pool.map(meet, range(cores)))  # wakes up threads
        start = time.perf_counter()
        list(pool.map(meet, range(8 * cores)))
        each = (time.perf_counter() - start) / (8 * cores)
    once = (k + _SPARE) * (1 + np.log(blocks + 1)) * _SIFTED + (k + _SPARE) * dim * _IN_ORDER
    again = 0 if kept else n / _LARGE * dim * _READ
    memory = 4 * n * dim if kept else cores * _LARGE * (12 * dim + 8 * _LARGE)
    working = cores * (_WORKING + 8 * _AT_A_TIME * (k + _SPARE) * dim)
    return float(each * _products(blocks) + n * (once + again) / cores), memory + working + n * (20 * k + 8 * _SPARE)


@contextlib.contextmanager
def _on_each_core() -> Iterator[ThreadPoolExecutor]:
    """Threads in which NumPy multiplies on one core: none waits for another."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(usable_cores(), "featcache-neighbours") as pool:
        yield pool


def _products(blocks: int) -> int:
    return blocks * (blocks + 1) // 2


class _Blocks:
    """Rows of unit length, ``size`` at a time."""

    def __init__(self, features: FeatureSource, rows: Indices, memory: int, size: int = _BLOCK) -> None:
        self.rows, self.dim, self._features, self._size = rows, features.shape[1], features, size
        self._kept: Array | None = None
        if 4 * len(rows) * features.shape[1] <= memory:
            self._kept = np.empty((len(rows), features.shape[1]), np.float32)
            for here in self.slices():
                self._kept[here] = self._read(here)
        else:
            self._size = _LARGE

    def __len__(self) -> int:
        return -(-len(self.rows) // self._size)

    def slices(self) -> list[slice]:
        return [slice(start, start + self._size) for start in range(0, len(self.rows), self._size)]

    def __getitem__(self, here: "slice | Indices") -> Array:
        """(b, D) float32 rows."""
        return self._read(here) if self._kept is None else self._kept[here]

    def _read(self, here: "slice | Indices") -> Array:
        X = self._features[self.rows[here]].astype(np.float32)
        lengths = np.sqrt(np.einsum("nd,nd->n", X, X))
        if not np.isfinite(lengths).all() and len(bad := self.rows[here][~np.isfinite(X).all(axis=1)]):
            raise UsageError(f"the features of row {bad[0]} are not finite; expected numbers, extract it again")
        X /= np.where(lengths == 0, 1, lengths)[:, None]
        return X


def _search(blocks: _Blocks, best: Keys) -> Generator[None]:
    """Fill ``best`` (N, c) with keys of neighbours, unsorted; yields after each product.

    Every core multiplies, and sifts what it multiplied, on its own.
    """
    slices, worst = blocks.slices(), np.full(len(best), EMPTY)

    def meet(pair: tuple[int, int]) -> None:
        here, there = (slices[number] for number in pair)
        X = blocks[here]
        similar = X @ (X if here is there else blocks[there]).T
        if here is there:
            np.fill_diagonal(similar, -np.inf)
        else:
            keep(best[there], worst[there], similar.T, here.start)
        keep(best[here], worst[here], similar, there.start)

    with _on_each_core() as pool:
        for pairs in _rounds(len(slices)):
            for _ in pool.map(meet, pairs):
                yield


def _rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of ``count`` blocks, each with itself too; none occurs twice in a round, so pairs of a round may meet at once."""
    size = count | 1
    return [[(one, (r - one) % size) for one in range(count) if one <= (r - one) % size < count] for r in range(size)]


def _search_index(blocks: _Blocks, best: Keys) -> Generator[None]:
    """As ``_search``, by an index of all rows: not all of the nearest are found."""
    from usearch.index import Index

    cores = usable_cores()
    index = Index(ndim=blocks.dim, metric="cos", dtype="f16", expansion_search=4 * best.shape[1])
    for here in blocks.slices():
        X = blocks[here]
        index.add(np.arange(here.start, here.start + len(X)), X, threads=cores)
        yield
    for here in blocks.slices():
        found = index.search(X := blocks[here], best.shape[1] + 1, threads=cores)
        places = found.keys.reshape(len(X), -1).astype(np.intp)
        keys = keys_of((1 - found.distances).astype(np.float32).reshape(places.shape), places)
        itself = places == np.arange(here.start, here.start + len(X))[:, None]
        keys[itself | (np.arange(keys.shape[1]) >= found.counts[:, None])] = EMPTY
        best[here] = np.partition(keys, 1, axis=1)[:, 1:]
        yield
    lacking = np.flatnonzero((best == EMPTY).any(axis=1))  # an index may come back with fewer than it was asked for
    best[lacking] = _true(blocks, lacking, best.shape[1])


def _recall(blocks: _Blocks, similarities: Array) -> float:
    """The share of neighbours that are as near as the true k-th one, of some rows."""
    some = np.sort(np.random.default_rng(0).permutation(len(similarities))[:_MEASURED])
    farthest = similarities_of(_true(blocks, some, similarities.shape[1]).min(axis=1))
    return float((similarities[some] >= farthest[:, None] - 1e-6).mean())


def _true(blocks: _Blocks, some: Indices, count: int) -> Keys:
    """(n, count) keys of the nearest of (n,) places, by all products."""
    best, worst = np.full((len(some), count), EMPTY), np.full(len(some), EMPTY)
    queries = blocks[some]
    for there in blocks.slices() if len(some) else ():
        similar = queries @ blocks[there].T
        own = np.flatnonzero((some >= there.start) & (some < there.stop))
        similar[own, some[own] - there.start] = -np.inf
        keep(best, worst, similar, there.start)
    return best


def _in_order(blocks: _Blocks, best: Keys, k: int) -> tuple[Indices, npt.NDArray[np.float32]]:
    """(N, k) places and similarities of the best keys, computed again."""
    places, similarities = np.empty((len(best), k), np.intp), np.empty((len(best), k), np.float32)

    def finish(start: int) -> None:
        here = slice(start, start + _AT_A_TIME)
        places[here], similarities[here] = _exactly(blocks, here, places_of(best[here]), k)

    with ThreadPoolExecutor(usable_cores(), "featcache-neighbours") as pool:
        for _ in pool.map(finish, range(0, len(best), _AT_A_TIME) if k else ()):
            pass
    return places, similarities


def _exactly(blocks: _Blocks, here: slice, found: Indices, k: int) -> tuple[Indices, Array]:
    """The k nearest of (n, c) places, in order, with similarities added up in float64: equal rows are equally similar."""
    some, inverse = np.unique(found, return_inverse=True)
    others = blocks[some][inverse.reshape(found.shape)]  # (n, c, D)
    # Not by BLAS, whose rounding depends on where a row lies.
    similar = np.einsum("ncd,nd->nc", others, blocks[here], dtype=np.float64).clip(-1, 1)
    order = np.lexsort((found, -similar), axis=1)[:, :k]
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(similar, order, axis=1)


def _search_on(device: Any, blocks: _Blocks, best: Keys) -> Generator[None]:
    """As ``_search``, by PyTorch on a device; which of equal similarities stay is its choice."""
    import torch

    from featcache.system.device import launching, true_float32

    slices, count = blocks.slices(), best.shape[1]
    kept: dict[int, Any] = {}

    def block(number: int) -> Any:
        if number not in kept:
            rows = torch.from_numpy(np.ascontiguousarray(blocks[slices[number]])).to(device)
            if len(kept) * rows.nbytes > _MEMORY * 8:  # of 4 GB on, blocks are sent again
                return rows
            kept[number] = rows
        return kept[number]

    for number, here in enumerate(slices):
        X = block(number)
        values = torch.full((len(X), count), -torch.inf, device=device)
        places = torch.zeros((len(X), count), dtype=torch.int64, device=device)
        for other, there in enumerate(slices):
            with launching(device), torch.inference_mode(), true_float32:
                similar = X @ block(other).T
                if there is here:
                    similar.fill_diagonal_(-torch.inf)
                near, at = torch.topk(similar, min(count, similar.shape[1]), dim=1)
                values, order = torch.topk(torch.cat([values, near], 1), count, dim=1)
                places = torch.cat([places, at + there.start], 1).gather(1, order)
            yield
        best[here] = keys_of(values.cpu().numpy(), places.cpu().numpy())
