"""Batches through a ring are what workers make alone: the same images, numbers, refusals. On a CPU, by a lane of its own."""

import contextlib
import functools
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPEC, TINY, make_photos, write_photo
from test_embedder import small_backbone

from featcache.backbones.embed import EmbeddedBatch, Timings, embed
from featcache.backbones.embedder import Embedder
from featcache.backbones.encoder import Encoder
from featcache.cache.cache import FeatureCache
from featcache.errors import UsageError
from featcache.extraction.executors import run_here
from featcache.extraction.extract import extract
from featcache.extraction.request import load_requested
from featcache.images import fill
from featcache.images.source import ImageList, list_images
from featcache.reports.throughput import measure
from featcache.system.device import Runtime, choose_runtime


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    """Photos, and files that are none: one in between, some side by side, a whole batch of five, the last."""
    photos = make_photos(tmp_path_factory.mktemp("ring") / "photos", each=9)
    every = sorted(photos.rglob("*.jpg"))
    for number in (3, 6, 7, *range(10, 15), len(every) - 1):
        every[number].write_text("no image")
    for path in every:
        os.utime(path, (1e9, 1e9))
    return list_images(photos)


def joined(batches: list[EmbeddedBatch]) -> dict[str, Any]:
    columns = {name: [vars(batch)[name] for batch in batches if len(batch.indices)] for name in vars(batches[0])}
    refused = {position: why for batch in batches for position, why in batch.refused.items()}
    return {name: np.concatenate(parts) for name, parts in columns.items() if name != "refused"} | {"refused": refused}


def in_a_ring(embedder: Embedder) -> Embedder:
    embedder.encoder.lane = functools.cache(embedder.encoder.new_lane)  # type: ignore[method-assign, assignment]
    return embedder


def prepared(images: ImageList, runtime: Runtime) -> Embedder:
    return Embedder.prepare(small_backbone(), images, runtime=runtime, precision="fp32")


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 5), (3, 5), (8, 64)])
def test_the_ring_gives_what_workers_give(images: ImageList, workers: int, batch_size: int) -> None:
    runtime = choose_runtime("cpu", workers=workers, batch_size=batch_size)
    embedder, timings = prepared(images, runtime), Timings()
    expected = joined(list(embedder.embed(images)))
    batches = list(in_a_ring(embedder).embed(images, timings=timings))
    found = joined(batches)
    assert [len(batch) for batch in batches] == [
        len(images.paths[i : i + batch_size]) for i in range(0, 27, batch_size)
    ]
    assert found.pop("refused") == expected.pop("refused")
    for name, column in found.items():
        if name == "features":
            np.testing.assert_allclose(column, expected[name], rtol=1e-4, atol=1e-5 * np.abs(column).max())
        else:
            np.testing.assert_array_equal(column, expected[name])
    assert timings.seconds["decode"] > 0
    again = joined(list(embedder.embed(images)))
    np.testing.assert_array_equal(again["features"], found["features"])  # bit for bit


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_processes_fill_the_ring_to_the_same_bits(images: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = in_a_ring(prepared(images, choose_runtime("cpu", workers=3, batch_size=5)))
    expected = joined(list(embedder.embed(images)))
    monkeypatch.setattr(fill, "_FEWEST_IMAGES", 1)
    monkeypatch.setattr(fill, "_FEWEST_CORES", 1)
    processes = fill.start_decoding(3, len(images))
    assert processes is not None
    processes.wait()
    tasks, call = list[int](), processes.call
    monkeypatch.setattr(processes, "call", lambda *given: tasks.append(len(given[2][2])) or call(*given))
    found = joined(list(embedder.embed(images)))
    assert sum(tasks) == len(images)
    assert found.pop("refused") == expected.pop("refused")
    for name, column in found.items():
        np.testing.assert_array_equal(column, expected[name])


class Overflows:
    """An encoder whose lane gives infinity for what is brighter than 150; in float32 only what is brighter than 220."""

    preprocess = SPEC.preprocess

    def __init__(self, most: float, exact: "Overflows | None") -> None:
        self.most, self.exact, self.shapes = most, exact, set[int]()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.shapes.add(len(pixels))
        level = pixels.mean((1, 2, 3), dtype=np.float32)
        return np.stack([level, np.where(level > self.most, np.inf, 1)], axis=1)

    new_buffer = None


class Direct:
    """A lane around an encoder."""

    def __init__(self, encoder: Any, batch_size: int) -> None:
        self.batch_size, self._encoder = batch_size, encoder

    def new_buffer(self) -> np.ndarray:
        return np.full((self.batch_size, *SPEC.preprocess.crop, 3), 255, np.uint8)  # what is stale overflows, too

    def pinned(self, buffers: np.ndarray) -> Any:
        return contextlib.nullcontext()

    def upload(self, pixels: np.ndarray, change: Any = None) -> np.ndarray:
        return pixels

    def compute(self, uploaded: np.ndarray) -> np.ndarray:
        return self._encoder(uploaded)  # type: ignore[no-any-return]

    def download(self, computed: np.ndarray) -> Any:
        return lambda: computed


def test_what_overflows_is_computed_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    levels = [10, 200, 40, 250, 160, 30, 20, 180]
    for number, level in enumerate(levels):
        write_photo(tmp_path / f"{number}.png", (level, level, level), number)
    (tmp_path / "2.png").write_text("no image")
    encoder = Overflows(150, Overflows(220, None))
    runtime = Runtime(torch.device("cpu"), 2, 5, "")
    with caplog.at_level(logging.INFO, "featcache"):
        files = list_images(tmp_path)
        found = joined(list(embed(files, encoder, runtime, lane=Direct(encoder, 5))))  # type: ignore[arg-type]
    assert found["indices"].tolist() == [0, 1, 4, 5, 6, 7]
    np.testing.assert_allclose(found["features"][:, 0], [levels[k] for k in found["indices"]], atol=12)
    assert (found["features"][:, 1] == 1).all()
    assert found["refused"][3] == "its embedding is not finite"
    assert sorted(found["refused"]) == [2, 3]
    assert encoder.exact is not None
    assert encoder.exact.shapes == {5}  # always so many
    assert caplog.messages[-1:] == ["images that overflowed and were embedded again in float32: 4, 1.png first"]


def test_memory_that_another_program_takes_meanwhile(images: ImageList) -> None:
    class Full(Direct):
        def compute(self, uploaded: np.ndarray) -> np.ndarray:
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoder: Any = Overflows(300, None)
    runtime = Runtime(torch.device("cpu"), 2, 8, "")
    with pytest.raises(UsageError, match="a batch of 8 no longer fits .* --batch-size 4"):
        list(embed(images, encoder, runtime, lane=Full(encoder, 8)))


def test_a_device_whose_memory_holds_less(images: ImageList) -> None:
    """Halved once; asking for more again does not try again."""
    embedder, tried = prepared(images, choose_runtime("cpu", batch_size=16)), list[int]()
    encoder = embedder.encoder

    def new_lane(batch_size: int) -> Any:
        tried.append(batch_size)

        def forward(pixels: np.ndarray) -> np.ndarray:
            if batch_size > 6:
                raise torch.OutOfMemoryError("MPS backend out of memory")
            return np.zeros((batch_size, 2), np.float32)

        return Direct(forward, batch_size)

    encoder.device, encoder.new_lane = torch.device("meta"), new_lane  # type: ignore[method-assign]
    lanes = [encoder.lane(asked) for asked in (16, 16, 4, 4, 100)]
    assert [lane and lane.batch_size for lane in lanes] == [4, 4, 4, 4, 4]
    assert tried == [16, 8, 4]
    smaller = encoder.lane(3)
    assert smaller is not None
    assert (smaller.batch_size, tried[3:]) == (3, [3])


def test_extract_in_a_ring_resumed(tmp_path: Path, images: ImageList) -> None:
    """Through parts, an interruption and packing: the very file."""
    source, runtime = images.root, choose_runtime("cpu", workers=2, batch_size=4)
    extract(source, tmp_path / "plain.h5", TINY, device="cpu", batch_size=4)
    embedder = in_a_ring(Embedder.prepare(load_requested(TINY, None), images, runtime=runtime, precision="fp32"))

    def stop(done: int, total: int, stage: str) -> None:
        if done > 12:
            raise KeyboardInterrupt

    run = functools.partial(run_here, embedder=embedder)
    with pytest.raises(KeyboardInterrupt):
        extract(source, tmp_path / "ring.h5", TINY, executor=run, progress=stop)
    report = extract(source, tmp_path / "ring.h5", TINY, executor=run)
    assert 0 < report.reused < report.images - report.refused  # what was finished was kept
    one, two = (FeatureCache.open(tmp_path / f"{name}.h5") for name in ("plain", "ring"))
    assert (one.paths, one.refused, one.fingerprint) == (two.paths, two.refused, two.fingerprint)
    np.testing.assert_array_equal(one.rows.digests, two.rows.digests)
    np.testing.assert_allclose(one.X, two.X, rtol=2e-3, atol=1e-3)


def test_rates_of_a_lane(images: ImageList) -> None:
    """Forward takes 50 ms for 8 images, and is what limits."""
    embedder = in_a_ring(prepared(images, choose_runtime("cpu", workers=2, batch_size=8)))
    encoder: Encoder = embedder.encoder
    original = encoder._forward()

    def slowly(pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return original(pixels)

    encoder._forward = lambda: slowly  # type: ignore[method-assign]
    rates = measure(images, encoder, embedder.runtime, seconds=1.5)
    assert rates.limit == "forward"
    assert 0.1 < rates.forward / (8 / 0.05) < 1.02
    assert rates.end_to_end < 1.05 * 8 / 0.05
