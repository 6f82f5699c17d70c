"""``--backbone FOLDER``: the embeddings are those the saved model was trained on, or there are none."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, TINY_FLAGS
from PIL import Image
from safetensors.torch import load_file, save_file
from test_extract import by_path, counts

from featcache.backbones.backbone import hash_tensors
from featcache.backbones.load import load_backbone
from featcache.cache.cache import FeatureCache
from featcache.errors import BackboneError, ModelError, SpecMismatchError, UsageError
from featcache.extraction.extract import extract, weights_copy
from featcache.extraction.request import ExtractRequest, RequestOptions, load_requested, preprocessing_of
from featcache.finetuning.finetune import finetune
from featcache.finetuning.training_input import TrainingInput
from featcache.heads.head import FittedHead
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.model import load_model, save_model
from featcache.models.predict import predict


@pytest.fixture
def plain(photos: Path, tmp_path: Path) -> Path:
    """The cache of the untouched backbone."""
    extract(photos, tmp_path / "plain.h5", TINY)
    return tmp_path / "plain.h5"


@pytest.fixture
def tune(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a model folder whose backbone has other weights, as fine-tuning does: ``tune(name, shift, **spec)``."""
    fit_head(plain, tmp_path / "start", C=1.0, folds=0, self_contained=True)
    start = load_model(tmp_path / "start")

    def make(name: str = "tuned", shift: float = 0.05, **spec: Any) -> Path:
        tensors = load_file(tmp_path / "start" / "backbone.safetensors")
        tensors["features.0.weight"] += shift
        save_file(tensors, tmp_path / "w.safetensors")
        save_model(
            tmp_path / name,
            FittedHead(start.head, (), {}, []),
            classes=start.classes,
            spec=dataclasses.replace(start.spec, weights_sha256=hash_tensors(tensors), **spec),
            weights={"source": "fine-tuned", "reload": None},
            training={},
            metrics={},
            files={"backbone.safetensors": tmp_path / "w.safetensors"},
        )
        return tmp_path / name

    return make


def request(model: Path | str, **changes: Any) -> ExtractRequest:
    return ExtractRequest(backbone=str(model), **changes)


@pytest.mark.parametrize(("precision", "storage"), [("reference", "float16"), ("bf16", "float32")])
def test_the_cache_is_the_models_own(photos: Path, tmp_path: Path, tune, precision: str, storage: str) -> None:
    model = tune(precision=precision, storage=storage)
    before = sorted((path.name, path.read_bytes()) for path in model.iterdir())
    extract(photos, tmp_path / "f.h5", request(f"{model}/"))
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert cache.spec == load_model(model).spec
    assert cache.X.dtype == storage
    from_cache, from_images = list(predict(model, [tmp_path / "f.h5"])), list(predict(model, [photos]))
    for one, other in zip(from_cache, from_images, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-4)
    fit_head(tmp_path / "f.h5", tmp_path / "next", C=1.0, folds=0)
    assert sorted((path.name, path.read_bytes()) for path in model.iterdir()) == before
    assert evaluate(tmp_path / "next", photos)["accuracy"] == 1.0


def test_rows_are_those_of_the_models_weights(photos: Path, plain: Path, tmp_path: Path, tune) -> None:
    model = tune()
    extract(photos, tmp_path / "f.h5", request(model))
    weights = dataclasses.replace(TINY, weights=str(model / "backbone.safetensors"))
    extract(photos, tmp_path / "by_hand.h5", weights)
    rows, plain_rows = by_path(tmp_path / "f.h5"), by_path(plain)
    for path, row in by_path(tmp_path / "by_hand.h5").items():
        np.testing.assert_array_equal(rows[path], row)
        assert not np.array_equal(plain_rows[path], row)


def test_the_content_of_the_folder_counts_not_its_name(photos: Path, tmp_path: Path, tune, monkeypatch) -> None:
    model = tune()
    extract(photos, tmp_path / "f.h5", request(model))
    model.rename(tmp_path / "renamed")
    with monkeypatch.context() as patched:
        patched.setattr("featcache.backbones.load.load_backbone", None)
        assert counts(extract(photos, tmp_path / "f.h5", request(tmp_path / "renamed"))) == (0, 18, 0, 0, 0, 0)
        copy = weights_copy(tmp_path / "f.h5", FeatureCache.open(tmp_path / "f.h5").spec)
        shutil.copy(copy, tmp_path / copy.name.replace("f.h5", "g.h5"))
        assert counts(extract(photos, tmp_path / "g.h5", request(tmp_path / "renamed"), reuse=[tmp_path / "f.h5"]))[
            :2
        ] == (0, 18)
    tune(shift=0.1)  # another model of the same name
    assert request(model).record() != request(tmp_path / "renamed").record()
    with pytest.raises(SpecMismatchError, match=r"backbone\.weights_sha256: \w+… -> \w+…\)"):
        extract(photos, tmp_path / "f.h5", request(model))


def test_caches_of_other_weights_are_refused_both_ways(photos: Path, plain: Path, tmp_path: Path, tune) -> None:
    model = tune()
    with pytest.raises(
        SpecMismatchError, match=r"plain\.h5 was made with another spec \(backbone\.weights_sha256: \w+… ->"
    ):
        extract(photos, plain, request(model))
    extract(photos, tmp_path / "f.h5", request(model))
    with pytest.raises(SpecMismatchError, match=r"\(backbone\.weights_sha256: \w+… -> \w+…\)"):
        extract(photos, tmp_path / "f.h5", TINY)
    with pytest.raises(SpecMismatchError, match=r"backbone\.weights_sha256"):
        list(predict(model, [plain]))


def test_options_override_the_models_preprocessing(photos: Path, tmp_path: Path, tune) -> None:
    changes = {"resize": 44, "crop": 36, "interpolation": "bicubic", "dtype": "float32", "precision": "fp32"}
    extract(photos, tmp_path / "f.h5", request(tune(), **changes))
    spec = FeatureCache.open(tmp_path / "f.h5").spec
    assert (spec.preprocess.resize, spec.preprocess.crop, spec.preprocess.interpolation) == (44, (36, 36), "bicubic")
    assert (spec.storage, spec.precision) == ("float32", "reference")


def test_weights_that_are_not_the_models_are_refused(photos: Path, tmp_path: Path, tune) -> None:
    model = tune()
    shutil.copy(tmp_path / "start" / "backbone.safetensors", model / "backbone.safetensors")
    with pytest.raises(ModelError, match="was trained on other weights"):
        extract(photos, tmp_path / "f.h5", request(model))
    (model / "backbone.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no backbone\.safetensors"):
        extract(photos, tmp_path / "f.h5", request(model))
    manifest = json.loads((model / "model.json").read_text())
    manifest["spec"]["backbone"]["weights_sha256"] = "0" * 64
    (model / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="is damaged"):
        extract(photos, tmp_path / "f.h5", request(model))
    assert not (tmp_path / "f.h5").exists()


def test_impossible_folders(photos: Path, tmp_path: Path, tune, monkeypatch) -> None:
    model = tune()
    with pytest.raises(UsageError, match="weights of its own"):
        extract(photos, tmp_path / "f.h5", request(model, weights="none"))
    with pytest.raises(BackboneError, match="photos is a folder of images, expected the folder of a model, or a name"):
        extract(photos, tmp_path / "f.h5", request(photos))
    with pytest.raises(BackboneError, match="gone does not exist"):
        extract(photos, tmp_path / "f.h5", request(tmp_path / "gone"))
    monkeypatch.chdir(model)
    assert request(".").saved() is not None
    for nothing in ("", "model.json"):
        assert request(nothing).saved() is None


def test_names_win_over_folders(photos: Path, tmp_path: Path, tune, monkeypatch) -> None:
    model = tune()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    for name in ("squeezenet1_1", "timm/resnet18", "mine"):
        shutil.copytree(model, tmp_path / name)
    assert request("squeezenet1_1").saved() is None
    assert request("timm/resnet18").saved() is None
    for folder in ("./squeezenet1_1", "squeezenet1_1/", "./timm/resnet18", "mine"):
        assert request(folder).saved() is not None
    extract(photos, tmp_path / "f.h5", TINY)
    sha256 = load_backbone(TINY.backbone, "none").weights_sha256
    assert FeatureCache.open(tmp_path / "f.h5").spec.weights_sha256 == sha256


def test_on_the_command_line(photos: Path, tmp_path: Path, tune, run) -> None:
    model = tune()
    arguments = ("extract", photos, "-o", tmp_path / "f.h5", "--backbone", f"{model}/")
    assert run(*arguments)[0] == 0
    assert run("predict", model, tmp_path / "f.h5")[0] == 0
    code, _, err = run(*arguments, "--weights", "none")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = run("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS)
    assert (code, err.count("\n")) == (1, 1)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """By featcache; libraries that another test has started may have threads that say something, too."""
    return [record.getMessage() for record in caplog.records if record.name == "featcache"]


def test_a_white_level_is_part_of_the_spec_and_of_every_model(
    tmp_path: Path, run, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures of 12 bits in files of 16 give, with it, what the same pictures of 8 bits give."""
    for name, darkest in (("a", 0), ("b", 90)):
        for number in range(4):
            grey = np.random.default_rng(number).integers(darkest, 160 + darkest // 2, (33, 47)).astype(np.uint8)
            deep = np.round(grey * (4095 / 255)).astype(np.uint16)
            for kind, pixels in (("plain", grey), ("deep", deep)):
                (tmp_path / kind / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / kind / name / f"{number}.png")
    level = dataclasses.replace(TINY, white_level=4095)
    extract(tmp_path / "plain", tmp_path / "plain.h5", TINY)
    with caplog.at_level(logging.WARNING, "featcache"):
        extract(tmp_path / "deep", tmp_path / "deep.h5", level)
        assert not _said(caplog)
        extract(tmp_path / "deep", tmp_path / "dark.h5", TINY)
    assert ["--white-level 4095" in message for message in _said(caplog)] == [True]
    deep, plain = (FeatureCache.open(tmp_path / f"{kind}.h5") for kind in ("deep", "plain"))
    np.testing.assert_array_equal(deep.X, plain.X)
    assert (
        plain.spec.difference(deep.spec) == "preprocess.deep: 16 bit scaled to 8 -> 16 bit scaled to 8, white at 4095"
    )
    arguments = (tmp_path / "deep", "-o", tmp_path / "deep.h5", *TINY_FLAGS, "--json")
    assert run("extract", *arguments, "--white-level", 4095)[0] == 0
    assert run("extract", *arguments)[0] == 0  # unset: as the cache was made
    assert run("extract", *arguments, "--white-level", 4094)[0] == 1
    model = load_model(fit_head(deep.path, tmp_path / "m").model)
    for other, cache in ((None, deep.path), (65535, tmp_path / "dark.h5")):  # the model's own, or as asked for
        extract(tmp_path / "deep", tmp_path / "own.h5", request(model.path, white_level=other), force=True)
        np.testing.assert_array_equal(FeatureCache.open(tmp_path / "own.h5").X, FeatureCache.open(cache).X)
    files = [tmp_path / kind / "a" / "0.png" for kind in ("deep", "plain")]
    one, other = (row.probabilities for row in predict(model, files))
    np.testing.assert_array_equal(one, other)
    convert = TrainingInput(model.spec.preprocess)
    np.testing.assert_array_equal(*(convert(file.read_bytes()) for file in files))
    for impossible in (0, 65536):
        with pytest.raises(UsageError, match="white level"):
            dataclasses.replace(TINY, white_level=impossible)


def test_the_fields_of_a_request_are_keywords(photos: Path, tmp_path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(ExtractRequest)}
    assert set(RequestOptions.__annotations__) == fields
    extract(photos, tmp_path / "f.h5", TINY)
    report = extract(photos, tmp_path / "f.h5", **vars(TINY))  # the same request: nothing to do
    assert (report.reused, report.embedded) == (18, 0)
    extract(photos, tmp_path / "g.h5", backbone=TINY.backbone, weights="none", crop=32, resize=40, dtype="float32")
    assert FeatureCache.open(tmp_path / "g.h5").spec.storage == "float32"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbon": "resnet18"}, "extract has no option 'backbon'; did you mean backbone?"),
        ({"batchsize": 8}, "extract has no option 'batchsize'; did you mean batch_size?"),
        ({"zzz": 8}, "extract has no option 'zzz'; it takes backbone, weights, .*, progress$"),
        ({"request": TINY, "crop": 32, "resize": 40}, "request= and crop=, resize= say what is wanted twice"),
    ],
)
def test_keywords_that_are_wrong(photos: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        extract(photos, tmp_path / "f.h5", **options)
    assert not (tmp_path / "f.h5.parts").exists()


def test_keywords_of_finetune(photos: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"backbon": "resnet18"}, "finetune has no option 'backbon'; did you mean backbone?"),
        ({"epochs": 3}, "epochs belongs to the recipe; give changes={'epochs': ...}"),
        ({"init": tmp_path / "m", "backbone": Path("x")}, "--init brings its own backbone"),
        ({"request": TINY, "crop": 32}, "twice"),
    ):
        with pytest.raises(UsageError, match=words):
            finetune(photos, tmp_path / "ft", **options)


def test_a_path_is_a_name(photos: Path, tmp_path: Path, tune) -> None:
    model = tune()
    extract(photos, tmp_path / "f.h5", backbone=Path(model))
    assert load_model(model).spec == FeatureCache.open(tmp_path / "f.h5").spec


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop": 36, "white_level": 4095},
        {"resize": (50, 60), "interpolation": "bicubic", "decode": "reduced"},
        {"backbone": "timm/vit_tiny_patch16_224", "resize": None, "crop": None},
        {"backbone": "vit_b_16", "resize": None, "crop": 96},
        {"backbone": "timm/vit_small_patch14_reg4_dinov2.lvd142m", "resize": None, "crop": None},
    ],
)
def test_preprocessing_is_known_without_weights(options: dict[str, Any]) -> None:
    request = dataclasses.replace(TINY, **options)
    found = preprocessing_of(dataclasses.replace(request, weights="auto"))
    assert found == (request.backbone, load_requested(request, None).preprocess)


@pytest.mark.parametrize("options", [{}, {"crop": 48}, {"interpolation": "bicubic"}])
def test_preprocessing_of_a_model_is_known_without_weights(tune: Callable[..., Path], options: dict[str, Any]) -> None:
    request = ExtractRequest(backbone=str(tune()), **options)
    expected = load_requested(request, request.saved()).preprocess
    (Path(request.backbone) / "backbone.safetensors").unlink()
    assert preprocessing_of(request) == ("squeezenet1_1", expected)
