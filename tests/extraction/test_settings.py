"""What is left unset on an existing cache is as the cache was made, whatever defaults and networks are today."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, TINY, make_photos, write_photo
from safetensors.torch import save_file
from test_extract import by_path, counts

from featcache.backbones.load import load_backbone
from featcache.cache.cache import FeatureCache, weights_copy
from featcache.cache.format import Provenance
from featcache.cache.write import write_cache
from featcache.errors import BackboneError, SpecMismatchError, UsageError
from featcache.extraction.extract import extract
from featcache.extraction.parts import open_parts
from featcache.extraction.request import ExtractRequest
from featcache.models.fit import fit_head
from featcache.system.workdir import work_folder

RESNET = ExtractRequest(backbone="resnet18", weights="none", resize=40, crop=32, precision="fp32", dtype="float32")
MORE = {
    "nothing but the network": ExtractRequest(backbone="squeezenet1_1", weights="none", precision="fp32"),
    "all that can be set": dataclasses.replace(
        TINY, resize=(44, 50), interpolation="lanczos", decode="reduced", white_level=4095, dtype="float32"
    ),
    "layers": dataclasses.replace(RESNET, layers=2, pool="mean"),
    # Far from float32, so that it is a kind of its own: what passes the check may be mixed, and differs from CPU to CPU.
    "precision": dataclasses.replace(TINY, precision="bf16", dtype="float32"),
}


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """Photos whose times can be trusted at once."""
    return make_photos(tmp_path / "photos", each=2, settled=True)


def weights_file(path: Path) -> Path:
    """Weights of squeezenet1_1 that no library provides."""
    state = {key: value + 0.01 for key, value in load_backbone("squeezenet1_1", "none").module.state_dict().items()}
    save_file(state, path)
    return path


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a backbone is loaded, or the hub asked")


@pytest.mark.parametrize("kind", [*list(MORE)[:3], pytest.param("precision", marks=pytest.mark.slow)])
def test_an_update_needs_no_option(settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Unchanged: without a backbone or a network, the file untouched. Grown: rows as of a cache with all options named."""
    cache, request = tmp_path / "f.h5", MORE[kind]
    extract(settled, cache, request)
    spec, before = FeatureCache.open(cache).spec, cache.read_bytes()
    assert spec.precision == (request.precision if kind == "precision" else "reference")
    with monkeypatch.context() as patched:
        patched.setattr("featcache.backbones.load.load_backbone", refuse)
        patched.setattr("featcache.backbones.hub.ask", refuse)
        named = {"backbone": request.backbone, "crop": spec.preprocess.crop[0], "dtype": spec.storage}
        for options in ({}, named, vars(request), {"resize": spec.preprocess.resize}, {"layers": spec.layers}):
            assert counts(extract(settled, cache, **options))[:2] == (0, 6), options
            assert cache.read_bytes() == before
    write_photo(settled / "red" / "new.jpg", COLOURS["red"], 99)
    assert counts(extract(settled, cache))[:2] == (1, 6)
    assert FeatureCache.open(cache).spec == spec
    extract(settled, tmp_path / "anew.h5", request)
    np.testing.assert_array_equal(by_path(cache)["red/new.jpg"], by_path(tmp_path / "anew.h5")["red/new.jpg"])


def test_the_line_that_says_so_and_the_licence(
    settled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[tuple[str, str, bool]] = []
    notes = ("featcache.extraction.job.warn_of_licence", "featcache.extraction.extract.warn_of_licence")
    for note in notes:
        monkeypatch.setattr(note, lambda name, source, *, loaded: warned.append((name, source, loaded)))
    extract(settled, tmp_path / "f.h5", dataclasses.replace(TINY, layers=1, dtype="float32"))
    for options, words in (
        ({}, ["backbone squeezenet1_1, weights none, resize 40, crop 32, layers 1, precision fp32, dtype float32"]),
        (
            {"backbone": "squeezenet1_1", "crop": 32},
            ["weights none, resize 40, layers 1, precision fp32, dtype float32"],
        ),
        (vars(TINY) | {"layers": 1, "dtype": "float32"}, []),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "featcache"):
            extract(settled, tmp_path / "f.h5", **options)
        said = [message for message in caplog.messages if "goes on as it was made" in message]
        assert said == [f"{tmp_path / 'f.h5'} goes on as it was made: {text}" for text in words]
    assert warned == [("squeezenet1_1", "random, seed 0", loaded) for loaded in (True, False, False, False)]


@pytest.mark.parametrize("kind", ["file", pytest.param("model", marks=pytest.mark.slow)])
def test_weights_that_no_library_provides(settled: Path, tmp_path: Path, kind: str) -> None:
    """They lie beside the cache; where they do not, what to give is said; other ones are refused."""
    cache, file = tmp_path / "f.h5", weights_file(tmp_path / "w.safetensors")
    of_file = dataclasses.replace(TINY, weights=str(file))
    again: dict[str, Any] = {"weights": file}
    if kind == "model":
        extract(settled, tmp_path / "start.h5", of_file)
        fit_head(tmp_path / "start.h5", tmp_path / "m", C=1.0, folds=0)
        again = {"backbone": tmp_path / "m"}
    extract(settled, cache, ExtractRequest(backbone=str(tmp_path / "m")) if kind == "model" else of_file)
    spec, elsewhere = FeatureCache.open(cache).spec, tmp_path / "elsewhere"
    copy = weights_copy(cache, spec)
    elsewhere.mkdir()
    for moved in (cache, copy):
        shutil.copy(moved, elsewhere)
    file.rename(tmp_path / "renamed.safetensors")
    again = {"weights": tmp_path / "renamed.safetensors"} if kind == "file" else again
    write_photo(settled / "red" / "new.jpg", COLOURS["red"], 99)
    assert counts(extract(settled, cache))[:2] == (1, 6)
    source = FeatureCache.open(cache).provenance.source
    assert source == ("file w.safetensors" if kind == "file" else "file backbone.safetensors of m")

    cache = elsewhere / "f.h5"
    copy = weights_copy(cache, spec)
    copy.unlink()
    remedy = (
        "--backbone FOLDER, the model's" if kind == "model" else "--weights FILE, whose sha256 begins with [0-9a-f]{12}"
    )
    with pytest.raises(BackboneError, match=f"no copy .* is beside it any more; say where they are with {remedy}, or"):
        extract(settled, cache)
    shutil.copy(tmp_path / "renamed.safetensors", copy)
    other = load_backbone("squeezenet1_1", "none").module.state_dict()
    save_file(other, copy)
    with pytest.raises(BackboneError, match="was made with other weights of squeezenet1_1: found"):
        extract(settled, cache)
    copy.unlink()
    assert counts(extract(settled, cache, **again))[:2] == (1, 6)
    assert FeatureCache.open(cache).spec == spec
    assert copy.is_file()  # there again


def test_caches_of_before_requests_were_recorded(settled: Path, tmp_path: Path) -> None:
    cache = tmp_path / "f.h5"
    extract(settled, cache, TINY)
    old = FeatureCache.open(cache)
    beside = {"spec": old.spec, "classes": old.classes, "refused": (), "provenance": Provenance(), "dim": old.dim}
    write_cache(cache, old.rows, [np.array(old.X)], **beside, staging=tmp_path)
    assert counts(extract(settled, cache))[:2] == (0, 6)
    write_photo(settled / "red" / "new.jpg", COLOURS["red"], 99)
    assert counts(extract(settled, cache))[:2] == (1, 6)
    assert FeatureCache.open(cache).spec == old.spec


def test_what_was_left_unset_never_passes_for_the_library_s_weights(settled: Path, tmp_path: Path) -> None:
    """An update by name, of weights from a file, must not make a record by which other caches would take these rows."""
    cache, plain = tmp_path / "f.h5", tmp_path / "plain.h5"
    extract(settled, cache, dataclasses.replace(TINY, weights=str(weights_file(tmp_path / "w.safetensors"))))
    write_photo(settled / "red" / "new.jpg", COLOURS["red"], 99)
    named = {name: value for name, value in vars(TINY).items() if name != "weights"}
    extract(settled, cache, **named)
    record = FeatureCache.open(cache).provenance.request
    assert record is not None and record["weights"].startswith("sha256:")
    old = FeatureCache.open(cache)
    beside = {"spec": old.spec, "classes": old.classes, "refused": (), "provenance": Provenance(), "dim": old.dim}
    write_cache(cache, old.rows, [np.array(old.X)], **beside, staging=tmp_path)
    write_photo(settled / "red" / "newer.jpg", COLOURS["red"], 100)
    extract(settled, cache, **named)
    record = FeatureCache.open(cache).provenance.request
    assert record is not None and record["weights"] == f"tensors:{old.spec.weights_sha256}"
    with pytest.raises(BackboneError, match="could not be downloaded"):
        extract(settled, plain, **named, reuse=cache)


@pytest.mark.parametrize("finished", [True, False])
def test_another_backbone_is_refused_before_it_is_loaded(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    cache = tmp_path / "f.h5"
    extract(settled, cache, TINY)
    if not finished:
        work_folder(cache).mkdir()
        cache.rename(work_folder(cache) / "00000000000000000001-part.h5")
        assert len(open_parts(work_folder(cache))) == 1
    monkeypatch.setattr("featcache.backbones.load.load_backbone", refuse)
    what = "f.h5 was made" if finished else "unfinished work for .*f.h5 was made"
    with pytest.raises(SpecMismatchError, match=rf"{what} .*\(backbone.name: squeezenet1_1 -> resnet18\)"):
        extract(settled, cache, backbone="resnet18")
    with pytest.raises(BackboneError, match="no backbone is called 'resnet1'; near: resnet1"):
        extract(settled, cache, backbone="resnet1")
    if not finished:
        shutil.copy(work_folder(cache) / "00000000000000000001-part.h5", tmp_path / "part.h5")
        assert counts(extract(settled, cache))[:2] == (0, 6)  # the parts say what it is


def test_force_keeps_what_it_is_not_told(settled: Path, tmp_path: Path) -> None:
    cache = tmp_path / "f.h5"
    extract(settled, cache, dataclasses.replace(TINY, white_level=4095, dtype="float32"))
    first = FeatureCache.open(cache).spec
    extract(settled, cache, interpolation="nearest", force=True)
    changed = dataclasses.replace(first, preprocess=dataclasses.replace(first.preprocess, interpolation="nearest"))
    assert FeatureCache.open(cache).spec == changed
    data = bytearray(cache.read_bytes())
    start = data.find(bytes(np.array(FeatureCache.open(cache).X).data)[:64])
    data[start] ^= 255
    cache.write_bytes(data)
    assert counts(extract(settled, cache, force=True))[0] == 6  # damaged: what it was is still known
    assert FeatureCache.open(cache).spec == changed
    extract(settled, cache, RESNET, force=True)
    assert FeatureCache.open(cache).spec.preprocess.white_level is None  # of another network nothing is taken over
    cache.write_bytes(cache.read_bytes()[:300])
    extract(settled, cache, TINY, force=True)
    assert FeatureCache.open(cache).spec.backbone == TINY.backbone


def test_weights_need_a_network(settled: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    file = weights_file(tmp_path / "w.safetensors")
    for weights in (file, "none", "IMAGENET1K_V2"):
        with pytest.raises(
            UsageError, match=r"--weights \S+ belongs to one network, and none is named; add --backbone NAME"
        ):
            extract(settled, tmp_path / "f.h5", weights=weights)
    code, _, err = run("finetune", settled, "-o", tmp_path / "m", "--weights", file)
    assert (code, err.count("\n")) == (2, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "w.safetensors"}
    extract(settled, tmp_path / "f.h5", TINY)
    extract(settled, tmp_path / "f.h5", weights="none")  # the cache names it
    with pytest.raises(SpecMismatchError, match=r"backbone\.weights_sha256"):
        extract(settled, tmp_path / "f.h5", weights=file)


def test_auto_stays_what_it_was_whatever_the_network_says(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made offline, then online on a GPU: the same spec, with no backbone chosen anew."""
    cache = tmp_path / "f.h5"
    small = {"resize": 40, "crop": 32, "precision": "fp32"}
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        extract(settled, cache, **small)
    spec = FeatureCache.open(cache).spec
    assert spec.backbone == "timm/tf_efficientnet_lite0"
    monkeypatch.setattr("featcache.extraction.job.choose_backbone", refuse)
    os.utime(write_photo(settled / "red" / "new.jpg", COLOURS["red"], 99), (1e9, 1e9))
    for _ in range(2):
        extract(settled, cache, **small)
        assert FeatureCache.open(cache).spec == spec
