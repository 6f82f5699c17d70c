"""The same features, bit for bit, whatever the number of workers or processes, the order of a folder, or interruptions.

In: one folder of photos, extracted in every such way. Out: caches that must not differ from the one made in one go.
"""

import functools
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_FLAGS, make_photos
from faults import Fault, Program

from featcache.cache.cache import FeatureCache

# Of this one the bits of an embedding do depend on how many images a forward pass has: 1 to 3 are not like 8.
FLAGS = ["--backbone", "mobilenet_v3_small", *TINY_FLAGS[2:], "--max-bad", "1"]
SETTINGS = {"extraction.parts.MAX_ROWS": 4}  # parts are published often


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three batches and one with a single image; two images cannot be embedded."""
    root = make_photos(tmp_path_factory.mktemp("same") / "photos", each=8)
    (root / "blue" / "03x.jpg").touch()
    (root / "red" / "zz.jpg").write_text("no image")
    return root


@pytest.fixture(scope="module")
def whole(photos: Path, warm: Program) -> FeatureCache:
    """The cache of all photos, made in one go on one thread."""
    warm.check("extract", photos, "-o", photos.parent / "whole.h5", *FLAGS, "--workers", 1)
    return FeatureCache.open(photos.parent / "whole.h5")


def assert_same(path: Path, whole: FeatureCache, hint: object = "") -> None:
    """Rows and features are equal, and in the same order. Modification times may say "too recent" in one of them."""
    cache = FeatureCache.open(path)
    assert cache.paths == whole.paths, hint
    for column in ("labels", "splits", "digests", "sizes"):
        np.testing.assert_array_equal(getattr(cache.rows, column), getattr(whole.rows, column), str(hint))
    assert cache.X.dtype == whole.X.dtype, hint
    np.testing.assert_array_equal(cache.X.view(np.uint8), whole.X.view(np.uint8), str(hint))
    assert (cache.classes, cache.refused, cache.spec) == (whole.classes, whole.refused, whole.spec), hint


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, workers: int) -> None:
    warm.check("extract", photos, "-o", tmp_path / "f.h5", *FLAGS, "--workers", workers)
    assert_same(tmp_path / "f.h5", whole)


def test_another_batch_size_is_another_shape(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program) -> None:
    """The same again for any number of workers; to that of another shape only close."""
    for workers in (1, 3):
        output = tmp_path / f"{workers}.h5"
        warm.check("extract", photos, "-o", output, *FLAGS, "--batch-size", 5, "--workers", workers)
    assert_same(tmp_path / "3.h5", FeatureCache.open(tmp_path / "1.h5"))
    np.testing.assert_allclose(
        FeatureCache.open(tmp_path / "3.h5").X, whole.X, rtol=1e-3, atol=1e-3 * np.abs(whole.X).max()
    )


def test_two_processes_and_a_third_that_reuses(
    photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program
) -> None:
    """Each of two processes embeds a part of the folder, some images twice; a third takes what they have, and the rest."""
    halves = []
    for number in range(2):
        half = tmp_path / f"half{number}"
        for index, path in enumerate(sorted(photos.rglob("*.jpg"))):
            if index % 5 in ((0, 1, 2), (2, 3))[number]:
                (half / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, half / path.parent.name)
        warm.check("extract", half, "-o", tmp_path / f"{number}.h5", *FLAGS, "--workers", number + 1)
        halves += ["--reuse", tmp_path / f"{number}.h5"]
    done = warm.check("extract", photos, "-o", tmp_path / "f.h5", *FLAGS, *halves, "--json")
    known = {digest for n in range(2) for digest in map(bytes, FeatureCache.open(tmp_path / f"{n}.h5").rows.digests)}
    assert (done.result["reused"], done.result["embedded"]) == (len(known), 24 - len(known))
    assert 0 < done.result["embedded"] < 10
    assert_same(tmp_path / "f.h5", whole)


class _Shuffled(list[Any]):
    def __enter__(self) -> "_Shuffled":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def shuffle_folders(seed: int) -> None:
    """From now on, folders are listed in an order that the seed decides, as another file system does."""
    original = os.scandir

    def shuffled(path: Any = ".") -> _Shuffled:
        with original(path) as entries:
            found = _Shuffled(entries)
        random.Random(seed).shuffle(found)
        return found

    os.scandir = shuffled  # type: ignore[assignment]


def test_any_order_of_the_folder(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program) -> None:
    hook = functools.partial(shuffle_folders, seed=1)
    warm.check("extract", photos, "-o", tmp_path / "f.h5", *FLAGS, before=hook)
    assert_same(tmp_path / "f.h5", whole)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 101))])
def test_interrupted_and_resumed(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, seed: int) -> None:
    """Die at random steps on the disk, with any number of workers, until a run gets through."""
    random_ = random.Random(seed)
    deaths = 0
    command = ("extract", photos, "-o", tmp_path / "f.h5", *FLAGS)
    while True:
        fault = Fault(random_.choice(["die before", "die after", "torn"]), random_.randrange(12, 90))
        workers = random_.choice([1, 2, 5])
        done = warm.run(*command, "--workers", workers, below=tmp_path, fault=fault, settings=SETTINGS)
        if not done.died:
            break
        deaths += 1
        assert deaths < 60, (seed, "never gets through")
    assert done.code == 0, (seed, done.err)
    assert deaths, seed
    assert_same(tmp_path / "f.h5", whole, seed)
    assert sorted(os.listdir(tmp_path)) == ["f.h5", next(p.name for p in tmp_path.glob("f.h5.*.safetensors"))], seed
