"""Images are matched to rows of any number of caches. Oracle: a dictionary per cache, looked into in order."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from caches import plain_rows

from featcache.extraction.match import Matches, gather, match
from featcache.images.source import ImageList


def listed(paths: list[str], sizes: np.ndarray) -> ImageList:
    n = len(paths)
    columns = {"labels": np.full(n, -1, np.int32), "splits": np.zeros(n, np.uint8), "mtimes": np.zeros(n, np.int64)}
    return ImageList(root=Path("/nowhere"), paths=tuple(paths), classes=(), sizes=sizes.astype(np.int64), **columns)


def cached(paths: list[str], sizes: np.ndarray) -> Any:
    return SimpleNamespace(rows=plain_rows(paths, sizes=sizes.astype(np.int64)))


@pytest.mark.parametrize("seed", range(20))
def test_each_image_is_found_in_the_last_cache_that_has_it(seed: int) -> None:
    """Paths of all lengths, in any order, also several times in a list or in a cache, also longer ones that begin alike."""
    rng = np.random.default_rng(seed)
    names = [f"c/{'ü' * (number % 4)}{number}{'x' * (40 * (number % 5 == 0))}.jpg" for number in range(60)]
    images = listed(rng.choice(names, 40).tolist(), rng.integers(1, 4, 40))
    caches = [cached(rng.choice(names, n).tolist(), rng.integers(1, 4, n)) for n in (0, 1, 30, 5, 30)]
    found = match(images, caches)
    for position, path in enumerate(images.paths):
        wanted = (-1, -1)
        for number, cache in enumerate(caches):
            rows = np.flatnonzero((cache.rows.paths == path.encode()) & (cache.rows.sizes == images.sizes[position]))
            wanted = (number, int(rows[0])) if len(rows) else wanted
        assert (found.source[position], found.row[position]) == wanted


def test_many_parts_cost_no_more_than_few() -> None:
    """Each part looks for its rows among all images: looking for all images in each part would take 300 times as long."""
    n = 30_000
    paths, sizes = [f"c{number % 10}/{number:09d}.jpg" for number in range(n)], np.arange(n)
    images, spent = listed(paths, sizes), []
    for parts in (3, 300):
        size = n // parts
        caches = [cached(paths[start : start + size], sizes[start : start + size]) for start in range(0, n, size)]
        started = time.thread_time()
        found = match(images, caches)
        digests = list(gather([cache.rows.digests.__getitem__ for cache in caches], found, np.arange(n)))
        spent.append(time.thread_time() - started)
        assert (found.source == np.arange(n) // size).all()
        assert (np.concatenate(digests) == np.concatenate([cache.rows.digests for cache in caches])).all()
    assert spent[1] < 20 * spent[0], spent


def test_rows_are_gathered_from_several_caches_in_any_order() -> None:
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(n, 3)).astype(np.float16) for n in (5000, 1, 9000)]
    source, n = rng.choice(3, 10_000), 10_000
    row = np.array([rng.integers(len(tables[number])) for number in source])
    zeros = np.zeros(n, np.int64)
    order = rng.permutation(n)
    blocks = gather([table.__getitem__ for table in tables], Matches(source, row, zeros, zeros), order)
    wanted = [tables[source[image]][row[image]] for image in order.tolist()]
    assert (np.concatenate(list(blocks)) == np.array(wanted)).all()
