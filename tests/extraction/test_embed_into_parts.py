"""Parts are written beside the computing: what is finished is kept, in order, whatever the disk or the user does."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import SPEC

from featcache.backbones.embed import EmbeddedBatch
from featcache.cache.cache import FeatureCache
from featcache.cache.format import Provenance
from featcache.errors import StorageError
from featcache.extraction import parts
from featcache.extraction.parts import Embedded, PartWriter, embed_into_parts
from featcache.images.read import Paths

COUNT, SIZE = 40, 4


def batch(start: int) -> EmbeddedBatch:
    """The third image of each is refused."""
    indices = np.array([start, start + 1, start + 3])
    features = indices[:, None] + np.arange(5, dtype=np.float32)
    digests = np.repeat(indices[:, None].astype(np.uint8), 32, axis=1)
    return EmbeddedBatch(indices, features, digests, indices + 100, indices + 7, {start + 2: "broken"})


class Embeds:
    """An embedder that has computed already. handed: batches that were taken from it."""

    backbone = SimpleNamespace(dim=5)

    def __init__(self, stop_at: int = COUNT) -> None:
        self.handed, self._stop_at = 0, stop_at

    def embed(self, files: Paths, *, timings: object) -> Iterator[EmbeddedBatch]:
        for start in range(0, COUNT, SIZE):
            if start >= self._stop_at:
                raise KeyboardInterrupt
            self.handed += 1
            yield batch(start)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(parts, "MAX_ROWS", 8)
    provenance = Provenance(request=None, source="", reload=None, self_check={}, decoder=1)

    def call(embedder: Any) -> Embedded:
        files = Paths(tmp_path, tuple(f"{number}.jpg" for number in range(COUNT)))
        return embed_into_parts(files, embedder, tmp_path, spec=SPEC, provenance=provenance)

    return call


def images_in(found: list[FeatureCache]) -> list[str]:
    """Of parts in their order, checked row by row."""
    for part in found:
        numbers = [int(path.removesuffix(".jpg")) for path in part.paths]
        np.testing.assert_array_equal(part.X, np.array(numbers)[:, None] + np.arange(5))
        np.testing.assert_array_equal(part.rows.digests[:, 0], numbers)
    return [name for part in found for name in (*part.paths, *(refusal.path for refusal in part.refused))]


def test_all_of_it(run: Any) -> None:
    found = run(Embeds())
    assert sorted(images_in(found.parts)) == sorted(f"{number}.jpg" for number in range(COUNT))
    assert [len(part) + len(part.refused) for part in found.parts] == [8] * 5
    assert set(found.refused.values()) == {"broken"}


def test_computing_goes_on_while_a_part_is_written(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not further than a part's worth: memory is bounded."""
    embedder, original = Embeds(), PartWriter.flush
    seen = list[int]()
    ahead = threading.Event()

    def slow(writer: PartWriter) -> None:
        if not seen:
            ahead.wait(0.3)
            seen.append(embedder.handed)
        original(writer)

    monkeypatch.setattr(PartWriter, "flush", slow)
    found = run(embedder)
    assert len(images_in(found.parts)) == COUNT
    assert 2 < seen[0] <= 2 * 8 / SIZE + 1  # a part is being written, another waits, one batch is at the door


@pytest.mark.parametrize("stop_at", [0, 4, 8, 20, 36])
def test_what_was_handed_over_is_kept_when_interrupted(run: Any, tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Embeds(stop_at))
    kept = images_in([FeatureCache.open(path) for path in sorted(tmp_path.glob("*.h5"))])
    assert sorted(kept) == sorted(f"{number}.jpg" for number in range(stop_at))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featcache")]


@pytest.mark.parametrize(("at", "tries"), [(2, [6, 6, 6]), (5, [6, 6, 6, 6, 6, 6])])
def test_an_error_of_the_disk_ends_the_run(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, tries: list[int]
) -> None:
    """Also that of the last part. What was computed meanwhile is not put behind the gap; one more try is made at the end."""
    tried, original = list[int](), parts.write_cache

    def fails(path: Path, rows: Any, *rest: Any, **more: Any) -> None:
        tried.append(len(rows.paths))
        if len(tried) == at:
            time.sleep(0.1)  # more batches come
            raise StorageError("disk full")
        original(path, rows, *rest, **more)

    monkeypatch.setattr(parts, "write_cache", fails)
    with pytest.raises(StorageError, match="disk full"):
        run(Embeds())
    assert tried == tries
    kept = images_in([FeatureCache.open(path) for path in sorted(tmp_path.glob("*.h5"))])
    assert sorted(kept) == sorted(f"{number}.jpg" for number in range(8 * at))
