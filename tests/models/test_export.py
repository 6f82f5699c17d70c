"""An exported file computes what the model computes, says what it needs, and never takes another file's place."""

import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
import torchvision
from conftest import SPEC, write_photo
from PIL import Image
from safetensors.torch import load_file

import featcache
from featcache.backbones.backbone import Backbone, weights_bytes
from featcache.backbones.load import load_backbone
from featcache.errors import ExportError, MissingDependencyError, ModelError, StorageError, UsageError
from featcache.heads.head import SCALINGS, FittedHead, Head, softmax
from featcache.heads.logreg import fit_logreg
from featcache.images.preprocess import to_pixels
from featcache.models import as_onnx, as_safetensors, export_candidate
from featcache.models.as_safetensors import HEAD_PREFIX
from featcache.models.export import export_model
from featcache.models.model import load_model, save_model
from featcache.models.predict import predict
from featcache.models.training_rows import TrainingRows
from featcache.spec import PreprocessSpec

CLASSES = ("bird", "cat", "dög")
MEAN, STD = (0.4, 0.45, 0.5), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(path: Path, name: str, scaling: Any, hidden: int = 0, crop: int = 64) -> Path:
    """A model folder with a made-up head, scaled so that its logits are neither all alike nor saturated."""
    backbone = load_backbone(name, "none")
    preprocess = PreprocessSpec(resize=crop + 8, crop=(crop, crop), interpolation="bilinear", mean=MEAN, std=STD)
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        some = backbone.module(torch.from_numpy(rng.normal(0, 1, (8, 3, crop, crop)).astype(np.float32))).numpy()
    mean, scale = some.mean(axis=0).astype(float), some.std(axis=0).astype(float) + some.std() / 10
    size = {"none": np.linalg.norm(some, axis=1).mean(), "unit": 1.0, "standardise": backbone.dim**0.5}[scaling]
    sizes = [backbone.dim, *([hidden] if hidden else []), len(CLASSES)]
    layers = tuple((rng.normal(0, 3 / size, (b, a)), rng.normal(0, 1, b)) for a, b in pairwise(sizes))
    known = {"backbone": name, "weights_sha256": backbone.weights_sha256, "layer": backbone.layer}
    save_model(
        path,
        FittedHead(Head("mlp" if hidden else "logreg", scaling, mean, scale, layers), (), {}, []),
        classes=CLASSES,
        spec=dataclasses.replace(SPEC, **known, preprocess=preprocess, storage="float32"),
        weights={"source": "random", "reload": None},
        training={},
        metrics={"temperature": 1.5},
        rows=TrainingRows(
            rng.integers(0, 256, (150, 32), np.uint8), rng.integers(0, 3, 150), rng.normal(0, 2, (150, 3))
        ),
        files={"backbone.safetensors": weights_bytes(backbone)},
    )
    return path


Get = Callable[..., Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Model folders by architecture and head, each made once."""
    return functools.cache(lambda *head: make_model(tmp_path_factory.mktemp("models") / "m", *head))


@pytest.fixture(scope="module")
def exported(models: Get, tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Reports of ONNX exports by architecture and head, each made once: converting takes seconds."""
    return functools.cache(lambda *head: export_model(models(*head), tmp_path_factory.mktemp("exported") / "m.onnx"))


@pytest.fixture
def model(models: Get) -> Path:
    """One of the models, where it does not matter which."""
    return models("squeezenet1_1", "standardise")


def pictures(folder: Path) -> tuple[list[Path], np.ndarray]:
    """Three photographs and their pixels, uint8 (3, 64, 64, 3)."""
    colours = ((200, 40, 30), (30, 200, 60), (90, 90, 90))
    paths = [write_photo(folder / f"{k}.png", colour, k, (90, 80)) for k, colour in enumerate(colours)]
    spec = PreprocessSpec(resize=72, crop=(64, 64), interpolation="bilinear", mean=MEAN, std=STD)
    return paths, np.stack([to_pixels(np.array(Image.open(path).convert("RGB")), spec) for path in paths])


def expected_of(model: Path, pixels: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) by the model's own head on the plain float32 backbone."""
    loaded = load_model(model)
    with torch.inference_mode():
        return loaded.head.probabilities(loaded.load_backbone().module(as_normalised(pixels)).numpy())


def as_normalised(pixels: np.ndarray) -> torch.Tensor:
    normalised = (as_input(pixels) - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    return torch.from_numpy(normalised.astype(np.float32))


def as_input(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)


# -------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize(
    "head", [("squeezenet1_1", "standardise"), pytest.param(("resnet18", "unit", 5), marks=pytest.mark.slow)]
)
def test_onnx_labels_images_as_the_model_does(exported: Get, tmp_path: Path, head: tuple[Any, ...]) -> None:
    report = exported(*head)
    _, pixels = pictures(tmp_path)
    session = onnxruntime.InferenceSession(report.output, providers=["CPUExecutionProvider"])
    expected = expected_of(report.model, pixels)
    assert expected.max() - expected.min() > 0.3  # or equality would say little
    for rows in (slice(0, 1), slice(0, 3)):
        probabilities, logits = session.run(["probabilities", "logits"], {"pixels": as_input(pixels[rows])})
        np.testing.assert_allclose(probabilities, expected[rows], atol=1e-5)
        np.testing.assert_allclose(softmax(logits), probabilities, atol=1e-6)
        assert probabilities.dtype == logits.dtype == np.float32
    assert 0 <= report.mean_difference <= report.max_difference < 1e-5
    assert (report.format, report.bytes) == ("onnx", report.output.stat().st_size)


def test_predict_agrees_to_its_precision(models: Get, tmp_path: Path, bf16_arithmetic: bool) -> None:
    """What the exports are compared with is what users get, from files on: to rounding, or to bf16's where that passes."""
    model = models("resnet18", "unit", 5)
    paths, pixels = pictures(tmp_path)
    found = np.stack([prediction.probabilities for prediction in predict(model, paths, device="cpu", workers=1)])
    np.testing.assert_allclose(found, expected_of(model, pixels), atol=0.02 if bf16_arithmetic else 1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_pipeline_model_and_exported_file_have_one_temperature(tmp_path: Path, model: Path, suffix: str) -> None:
    loaded = load_model(model)
    pixels = (
        np.random.default_rng(0).uniform(0, 1, (24, 3, 64, 64)).astype(np.float32)
        ** np.linspace(0.5, 2, 24)[:, None, None, None]
    )
    with torch.inference_mode():
        x = (torch.from_numpy(pixels.astype(np.float32)) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
            3, 1, 1
        )
        X = loaded.load_backbone().module(x).numpy()
    fitted = fit_logreg(X, np.arange(24), np.arange(24) // 4 % 3, folds=3)
    assert abs(fitted.temperature - 1) > 0.1
    files = {"backbone.safetensors": model / "backbone.safetensors"}
    facts: dict[str, Any] = {
        "weights": {"source": "random", "reload": None},
        "training": {},
        "metrics": {},
        "files": files,
    }
    save_model(tmp_path / "m", fitted, classes=CLASSES, spec=loaded.spec, **facts)
    expected = load_model(tmp_path / "m").head.probabilities(X)
    pipeline = joblib.load(tmp_path / "m" / "head.joblib")
    np.testing.assert_allclose(pipeline.predict_proba(X.astype(np.float64)), expected, atol=1e-5)
    report = export_model(tmp_path / "m", tmp_path / f"m.{suffix}")
    file = report.output
    if suffix == "onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (found,) = session.run(["probabilities"], {"pixels": pixels.astype(np.float32)})
    else:
        names: dict[str, Any] = {"safetensors": safetensors, "torch": torch, "torchvision": torchvision, "pixels": x}
        with torch.inference_mode():
            exec(report.usage.replace(repr(file.name), repr(str(file))), names)
        found = softmax(names["logits"].numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_scaling_is_in_the_network(scaling: Any) -> None:
    rng = np.random.default_rng(0)
    spec = PreprocessSpec(resize=8, crop=(8, 8), interpolation="bilinear", mean=MEAN, std=STD)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 4), torch.nn.Flatten()).eval()
    backbone = Backbone("tiny", module, 50, "", spec, "", "", None)
    head = Head(
        "logreg", scaling, rng.normal(0, 1, 50), rng.uniform(0.2, 5, 50), ((rng.normal(0, 1, (4, 50)), np.ones(4)),)
    )
    pixels = torch.from_numpy(rng.uniform(0, 1, (4, 3, 8, 8)).astype(np.float32))
    with torch.inference_mode():
        probabilities, logits = export_candidate.Network(backbone, head)(pixels)
        embeddings = module((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).numpy()
    np.testing.assert_allclose(logits, head.logits(embeddings.astype(float)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probabilities, head.probabilities(embeddings.astype(float)), atol=1e-5)


def test_onnx_describes_itself(exported: Get) -> None:
    report = exported("squeezenet1_1", "standardise")
    model, proto = load_model(report.model), onnx.load(report.output)
    onnx.checker.check_model(proto)
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert (facts["fingerprint"], facts["featcache_version"]) == (model.fingerprint, featcache.__version__)
    assert facts["head_sha256"] == model.manifest["head"]["sha256"]
    steps = json.loads(facts["preprocess"])
    assert steps["resize"] == {"shorter_edge": 72, "aspect_ratio": "kept"}
    assert steps["crop"] == {"height": 64, "width": 64, "position": "centre"}
    assert (steps["interpolation"], steps["channel_order"], steps["range"]) == ("bilinear", "RGB", [0, 1])
    assert (steps["mean"], steps["std"]) == (list(MEAN), list(STD))
    assert "inside" in steps["normalisation"]
    assert report.inputs == {"pixels": "float32 (N, 3, 64, 64), RGB in 0..1"}
    assert report.outputs == {"probabilities": "float32 (N, 3)", "logits": "float32 (N, 3)"}
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    assert shapes == {"pixels": ["batch", 3, 64, 64], "probabilities": ["batch", 3], "logits": ["batch", 3]}


@pytest.mark.parametrize("suffix", ["onnx", "safetensors"])
def test_prediction_sets_can_be_made_without_featcache(exported: Get, models: Get, tmp_path: Path, suffix: str) -> None:
    """By the rule that the file states, to the sets that ``predict`` gives."""
    if suffix == "onnx":
        facts = {
            entry.key: entry.value
            for entry in onnx.load(exported("squeezenet1_1", "standardise").output).metadata_props
        }
    else:
        report = export_model(models("squeezenet1_1", "standardise"), tmp_path / "model.safetensors")
        with safetensors.safe_open(report.output, "pt") as file:
            facts = file.metadata()
    limits = json.loads(facts["limits"])
    assert "log((1 - p[k]) / p[k]) <= largest_score[k]" in limits["rule"] and limits["temperature"] == 1.5
    assert [entry["coverage"] for entry in limits["sets"]] == [0.9, 0.95, 0.99]
    paths, _ = pictures(tmp_path)
    model = load_model(models("squeezenet1_1", "standardise"))
    for entry in limits["sets"]:
        for row in predict(model, paths, device="cpu", workers=1, coverage=entry["coverage"]):
            p = softmax(1.5 * np.log(row.probabilities)[None])[0]
            inside = np.log((1 - p) / p) <= entry["largest_score"]
            assert {name for name, there in zip(CLASSES, inside, strict=True) if there} == set(row.set or ())


def test_an_architecture_that_asks_for_a_version_is_refused_in_words(models: Get, tmp_path: Path) -> None:
    """MNASNet's, for which a file of tensors has no place; nothing is written."""
    with pytest.raises(
        ExportError, match=r"mnasnet0_5 does not take its own tensors back: version .*; export to \.onnx"
    ):
        export_model(models("mnasnet0_5", "none"), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_onnx_tells_nothing_about_the_machine(exported: Get) -> None:
    data = exported("squeezenet1_1", "standardise").output.read_bytes()
    for secret in (b"site-packages", str(Path(featcache.__file__).parent).encode(), str(Path.home()).encode() + b"/"):
        assert secret not in data


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_onnx_without_its_packages(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'featcache\[onnx\]'"):
        export_model(model, tmp_path / "model.onnx")
    export_model(model, tmp_path / "model.safetensors")  # needs none of them
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def fail(*_: Any, **__: Any) -> None:
    raise torch.onnx.OnnxExporterError("no such operator\nand forty lines")


@pytest.mark.parametrize(
    "failure",
    [
        (as_onnx, "MAX_BYTES", 10_000),
        (torch.onnx, "export", fail),
        (as_onnx, "_convert", lambda *_: b"not a graph"),
    ],
)
def test_what_cannot_be_converted_is_one_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: tuple[Any, str, Any]
) -> None:
    monkeypatch.setattr(*failure)
    with pytest.raises(ExportError, match=r"^[^\n]*export to .safetensors( instead)?$"):
        export_model(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(
    ("name", "scaling", "hidden", "layer"),
    [
        ("resnet18", "standardise", 0, "fc"),
        ("mobilenet_v2", "standardise", 0, "classifier.1"),
        ("mobilenet_v2", "none", 0, "classifier.1"),
        ("mobilenet_v2", "unit", 0, None),
        ("mobilenet_v2", "standardise", 4, None),
        # its classifier is a convolution with a ReLU behind it
        *(("squeezenet1_1", scaling, 0, None) for scaling in SCALINGS),
        *(("squeezenet1_1", scaling, 4, None) for scaling in SCALINGS),
    ],
)
def test_safetensors_load_into_the_architecture(
    models: Get, tmp_path: Path, name: str, hidden: int, layer: str | None, scaling: str
) -> None:
    model, output = models(name, scaling, hidden), tmp_path / "it's.safetensors"
    report = export_model(model, output)
    tensors = load_file(output)
    if layer is not None:
        network = torchvision.models.get_model(name, num_classes=3)
        network.load_state_dict(tensors)
        assert tensors[f"{layer}.weight"].shape[0] == 3
    else:
        assert f"{HEAD_PREFIX}.0.weight" in tensors
        assert (f"{HEAD_PREFIX}.2.weight" in tensors) == bool(hidden)
    _, pixels = pictures(tmp_path)
    names: dict[str, Any] = {"pixels": as_normalised(pixels)}
    names |= {"torch": torch, "torchvision": torchvision, "safetensors": safetensors}
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces slow initialisation
        patch.chdir(tmp_path)
        exec(report.usage, names)  # what the user is told works as it stands
    np.testing.assert_allclose(softmax(names["logits"].numpy()), expected_of(model, pixels), atol=1e-5)
    assert report.max_difference < 1e-5


def test_safetensors_describe_themselves(models: Get, tmp_path: Path) -> None:
    for name, head in (
        ("mobilenet_v2", "classifier.1.*"),
        ("squeezenet1_1", f"{HEAD_PREFIX}.*, after the network; see usage"),
    ):
        report = export_model(models(name, "standardise"), tmp_path / f"{name}.safetensors")
        with safetensors.safe_open(report.output, "pt") as file:
            facts = file.metadata()
        assert (facts["head"], facts["usage"], facts["format"]) == (head, report.usage, "pt")
        assert json.loads(facts["classes"]) == list(CLASSES)
        assert json.loads(facts["preprocess"])["normalisation"] == "subtract mean, divide by std"
        assert facts["fingerprint"] == load_model(models(name, "standardise")).fingerprint
        assert "normalised" in report.inputs["pixels"]


@pytest.mark.parametrize("name", ["timm/resnet10t", "googlenet"])
def test_architectures_with_ways_of_their_own(models: Get, tmp_path: Path, name: str) -> None:
    report = export_model(models(name, "standardise"), tmp_path / "model.safetensors")
    assert report.max_difference < 1e-5
    assert f"{HEAD_PREFIX}.0.weight" not in load_file(report.output)
    assert ("timm.create_model('resnet10t', num_classes=3)" in report.usage) == (name == "timm/resnet10t")
    assert ("transform_input=True" in report.usage) == (name == "googlenet")


@pytest.mark.slow
def test_a_final_layer_without_bias_cannot_hold_the_head(models: Get, tmp_path: Path) -> None:
    report = export_model(models("maxvit_t", "standardise", 0, 224), tmp_path / "model.safetensors")
    assert f"{HEAD_PREFIX}.0.weight" in load_file(report.output)
    assert report.max_difference < 1e-5


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("damage", [0.02, np.nan])
def test_a_file_that_differs_is_not_written(
    models: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: float
) -> None:
    right = as_safetensors.linear_layers

    def wrong(head: Head) -> list[Any]:
        layers = right(head)
        layers[0].bias.data += damage
        return layers

    monkeypatch.setattr(as_safetensors, "linear_layers", wrong)
    for name in ("mobilenet_v2", "squeezenet1_1"):
        with pytest.raises(ExportError, match="differs from"):
            export_model(models(name, "standardise"), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_is_not_written(
    model: Path, exported: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load(exported("squeezenet1_1", "standardise").output)
    bias = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [len(CLASSES)])
    wrong = onnx.numpy_helper.to_array(bias) + np.array([0.5, 0, 0], np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(wrong, bias.name))
    monkeypatch.setattr(as_onnx, "_convert", lambda *_: proto.SerializeToString())
    with pytest.raises(ExportError, match="differs from"):
        export_model(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "model.pt", "model.onnx.gz"):
        with pytest.raises(UsageError, match=r"name it \.onnx or \.safetensors"):
            export_model(model, tmp_path / name)
    taken = tmp_path / "taken.safetensors"
    taken.write_text("precious")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for path in (taken, tmp_path / "link.safetensors"):
        with pytest.raises(UsageError, match="--force"):
            export_model(model, path)
    assert taken.read_text() == "precious"
    assert export_model(model, taken, force=True).bytes == taken.stat().st_size > 1000
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(StorageError, match="it is an empty folder"):
        export_model(model, tmp_path / "folder.onnx", force=True)
    with pytest.raises(StorageError, match="does not exist"):
        export_model(model, tmp_path / "no" / "m.onnx")
    before = (model / "backbone.safetensors").read_bytes()
    for name in ("backbone.safetensors", "model.onnx"):  # would break the model, or keep it from being replaced
        with pytest.raises(UsageError, match="is a model folder"):
            export_model(model, model / name, force=True)
    assert (model / "backbone.safetensors").read_bytes() == before
    monkeypatch.setattr("os.access", lambda *_: False)  # a folder that may not be written to, also for root
    with pytest.raises(StorageError, match="no permission"):
        export_model(model, tmp_path / "new.onnx")


def test_models_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected the folder of a model"):
        export_model(tmp_path, tmp_path / "m.onnx")
    model = make_model(tmp_path / "m", "squeezenet1_1", "none")
    (model / "backbone.safetensors").unlink()
    with pytest.raises(ModelError, match="no library provides its weights"):
        export_model(model, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


# ------------------------------------------------------------------------------------------------ command line


def test_command(
    model: Path, exported: Get, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load(exported("squeezenet1_1", "standardise").output)

    def convert(*_: Any, **__: Any) -> SimpleNamespace:
        print("the exporter talks")
        warnings.warn("and warns", DeprecationWarning, stacklevel=1)
        return SimpleNamespace(model_proto=proto)

    monkeypatch.setattr(torch.onnx, "export", convert)
    output = tmp_path / "model.onnx"
    code, out, err = run("export", model, "-o", output, "--json")
    assert code == 0
    facts = json.loads(out)  # that line and nothing else
    assert (facts["output"], facts["format"], facts["bytes"]) == (str(output), "onnx", output.stat().st_size)
    assert "the exporter talks" in err
    assert run("export", model, "-o", output)[0] == 2
    code, out, err = run("export", model, "-o", tmp_path / "m.safetensors")
    assert (code, err) == (0, "")
    assert "in: pixels, float32 (N, 3, 64, 64), RGB in 0..1" in out
    assert run("export", model, "-o", tmp_path / "m.safetensors", "--force")[0] == 0
    assert featcache.export_model is export_model
