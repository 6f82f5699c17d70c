"""On an NVIDIA GPU: what a CPU computes, the same bits every time, as much as the memory holds. ``pytest -m gpu -n 0``.

The machine needs no network: weights are random. Oracle: the plain network in float32 on the CPU.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache.backbones.embed import sample_pixels
from featcache.backbones.embedder import Embedder
from featcache.backbones.load import load_backbone
from featcache.backbones.self_check import MAX_ERROR, agreement, only_rounded
from featcache.cache.cache import FeatureCache
from featcache.extraction.extract import extract
from featcache.extraction.request import ExtractRequest
from featcache.images.preprocess import channel_constants, normalise
from featcache.images.source import ImageList, list_images
from featcache.reports.throughput import generated_photos
from featcache.system.device import choose_runtime

pytestmark = pytest.mark.gpu
COUNT, BROKEN, BATCH = 150, (5, 17, 18, 149), 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    """Photographs, and some files that are none."""
    folder = tmp_path_factory.mktemp("gpu")
    generated_photos(folder, COUNT)
    for number in BROKEN:
        (folder / f"{number:04d}.jpg").write_text("no image")
    return list_images(folder, labelled=False)


@functools.cache
def backbone(name: str) -> Any:
    torch.manual_seed(0)
    return load_backbone(name, "none", size=(64, 64) if not name.startswith("vit") else None)


@pytest.fixture(scope="module")
def expected(photos: ImageList) -> Any:
    """name -> embeddings by the plain network."""

    @functools.cache
    @torch.inference_mode()
    def compute(name: str) -> np.ndarray:
        loaded = backbone(name)
        pixels = torch.from_numpy(sample_pixels(photos, loaded.preprocess, COUNT))
        constants = channel_constants(loaded.preprocess, torch.device("cpu"))
        return torch.cat([loaded.module(normalise(some, *constants)) for some in pixels.split(25)]).numpy()

    return compute


def prepared(photos: ImageList, name: str, precision: Any = "auto", batch_size: int = BATCH) -> Embedder:
    runtime = choose_runtime("cuda", batch_size=batch_size)
    return Embedder.prepare(backbone(name), photos, runtime=runtime, precision=precision)


def features(embedder: Embedder, photos: ImageList) -> np.ndarray:
    batches = list(embedder.embed(photos))
    assert sorted(position for batch in batches for position in batch.refused) == list(BROKEN)
    positions = np.concatenate([batch.indices for batch in batches])
    np.testing.assert_array_equal(positions, np.setdiff1d(np.arange(COUNT), BROKEN))
    return np.concatenate([batch.features for batch in batches])


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "squeezenet1_1", "regnet_y_400mf", "vit_b_32"])
def test_embeddings_are_those_of_the_cpu(photos: ImageList, expected: Any, name: str, precision: str) -> None:
    embedder = prepared(photos, name, precision)
    found = features(embedder, photos)
    if embedder.choice.precision == "fp32":
        assert only_rounded(expected(name), found)
    elif embedder.choice.precision_class == "reference":  # measured on 32 of the images; here on all
        assert agreement(expected(name), found).error <= 1.5 * MAX_ERROR
    else:
        assert agreement(expected(name), found).mean_cosine > 0.98
    np.testing.assert_array_equal(features(embedder, photos), found)  # every bit, with the graph from the start


@pytest.mark.parametrize("name", ["resnet50", "vit_b_32"])
def test_two_runs_give_the_same_bits(photos: ImageList, name: str) -> None:
    one, two = (prepared(photos, name) for _ in range(2))
    assert (one.choice.precision, one.choice.form) == (two.choice.precision, two.choice.form)
    np.testing.assert_array_equal(features(one, photos), features(two, photos))


def test_convolutions_are_fused_and_a_graph_is_replayed(
    photos: ImageList, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "featcache"):
        embedder = prepared(photos, "resnet50")
        features(embedder, photos)
    assert embedder.choice.form == "fused", embedder.choice.reason
    assert "no CUDA graph" not in caplog.text
    assert getattr(embedder.encoder.lane(BATCH), "_graph", None)


def test_without_fusing(photos: ImageList, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_FUSE", "0")
    embedder = prepared(photos, "resnet50", "fp32")
    assert embedder.choice.form == "folded"
    assert only_rounded(expected("resnet50"), features(embedder, photos))


def test_threads_share_a_lane(photos: ImageList) -> None:
    embedder = prepared(photos, "resnet18")
    alone = features(embedder, photos)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: features(embedder, photos), range(6)):
            np.testing.assert_array_equal(found, alone)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two GB of it."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2e9) / whole)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_exhausted_memory_halves_the_batch(photos: ImageList, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "featcache"):
        embedder = prepared(photos, "resnet50", "fp32", batch_size=8192)
        found = features(embedder, photos)
    assert embedder.runtime.batch_size in {8192 >> halvings for halvings in range(1, 9)}
    assert len([message for message in caplog.messages if message.startswith("batches of 8192 do not fit")]) == 1
    assert only_rounded(expected("resnet50"), found)


def test_an_interrupted_extraction_goes_on(photos: ImageList, tmp_path: Path) -> None:
    request = ExtractRequest(backbone="resnet18", weights="none", resize=64, crop=64)
    run = functools.partial(extract, photos.root, request=request, device="cuda", batch_size=BATCH)
    run(tmp_path / "whole.h5")

    def stop(done: int, total: int, stage: str) -> None:
        if done > COUNT // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "f.h5", progress=stop)
    report = run(tmp_path / "f.h5")
    assert report.reused > 0
    whole, resumed = (FeatureCache.open(tmp_path / f"{name}.h5") for name in ("whole", "f"))
    assert (whole.paths, whole.refused, whole.spec) == (resumed.paths, resumed.refused, resumed.spec)
    # A row has another place in its batch now.
    assert agreement(whole.X, resumed.X).error < 0.01


def test_what_overflows_in_float16_is_computed_in_float32(photos: ImageList) -> None:
    from test_encoder import OVERFLOWS, Net, tiny

    net = Net(OVERFLOWS["in the middle"])
    torch.nn.init.constant_(net.mix.weight, 3.0)
    small, _ = tiny(net)
    embedder = Embedder.prepare(small, photos, runtime=choose_runtime("cuda", batch_size=BATCH), precision="fp16")
    exact = dataclasses.replace(embedder, encoder=embedder.encoder.exact or embedder.encoder)
    np.testing.assert_allclose(features(embedder, photos), features(exact, photos), rtol=0.05, atol=0.05)
