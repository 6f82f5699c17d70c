"""Embeddings are the network's own: compared with the eager float32 model, and bit for bit with themselves."""

import copy
import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_photos
from PIL import Image
from torch import nn
from torchvision.transforms import functional

from featcache.backbones.backbone import OFFLINE_BACKBONE, Backbone
from featcache.backbones.embed import embed, sample_pixels
from featcache.backbones.encoder import Encoder, Precision, PrecisionChoice, build_encoder
from featcache.backbones.load import load_backbone
from featcache.backbones.self_check import agreement, cosine
from featcache.errors import BackboneError, UsageError
from featcache.images.decode import decode
from featcache.images.preprocess import channel_constants, normalise
from featcache.images.source import ImageList, list_images
from featcache.system.device import Runtime, choose_runtime


def features(images: ImageList, backbone: Backbone, runtime: Runtime, precision: Precision = "fp32") -> np.ndarray:
    encoder, _ = build_encoder(backbone, runtime, sample_pixels(images, backbone.preprocess, 8), precision=precision)
    return np.concatenate([chunk.features for chunk in embed(images, encoder, runtime)])


def test_features_equal_eager_torchvision_style_inference(tmp_path: Path, bf16_arithmetic: bool) -> None:
    """Real weights; the oracle resizes, crops and normalises by torchvision and runs the plain float32 network."""
    images = list_images(make_photos(tmp_path, each=8))
    backbone = load_backbone(OFFLINE_BACKBONE)
    spec = backbone.preprocess
    assert (spec.resize, spec.crop, spec.interpolation) == (256, (224, 224), "bicubic")
    batch = []
    for path in images.paths:
        picture = functional.resize(decode((tmp_path / path).read_bytes()), 256, functional.InterpolationMode.BICUBIC)
        tensor = functional.to_tensor(functional.center_crop(picture, [224, 224]))
        batch.append(functional.normalize(tensor, list(spec.mean), list(spec.std)))
    with torch.inference_mode():
        expected = backbone.module(torch.stack(batch)).numpy()
    mean, minimum = cosine(expected, features(images, backbone, choose_runtime("cpu")).astype(np.float16))
    assert minimum >= 0.9999
    assert mean >= 0.99999
    chosen = features(images, backbone, choose_runtime("cpu"), "auto")  # bf16 where it passes, so within its bars
    assert cosine(expected, chosen)[0] >= 0.9995
    assert agreement(expected, chosen).error <= 0.04


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "vit_b_32"))]
)
def test_an_embedding_does_not_depend_on_neighbours_or_workers(tmp_path: Path, name: str) -> None:
    images = list_images(make_photos(tmp_path, each=3))
    backbone = load_backbone(name, "none", size=(96, 96))
    one = features(images, backbone, choose_runtime("cpu", workers=1, batch_size=8))
    two = features(images, backbone, choose_runtime("cpu", workers=3, batch_size=8))
    np.testing.assert_array_equal(one, two)
    order = np.random.default_rng(0).permutation(len(images))[:7]
    np.testing.assert_array_equal(
        features(images.take(order), backbone, choose_runtime("cpu", batch_size=8)), one[order]
    )


def test_each_worker_computes_on_one_core_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    images = list_images(make_photos(tmp_path, each=2))
    before, seen = torch.get_num_threads(), []

    class Recorder:
        preprocess = load_backbone("squeezenet1_1", "none").preprocess

        def new_buffer(self, batch_size: int) -> np.ndarray:
            return np.zeros((batch_size, 224, 224, 3), np.uint8)

        def __call__(self, pixels: np.ndarray) -> np.ndarray:
            seen.append(torch.get_num_threads())
            return np.ones((len(pixels), 3), np.float32)

    assert sum(len(chunk.indices) for chunk in embed(images, Recorder(), choose_runtime("cpu", batch_size=2))) == 6  # type: ignore[arg-type]
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == before


class Net(nn.Module):
    """Four values per image, by a function of it and of these layers."""

    def __init__(self, compute: Callable[["Net", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mix, self.conv, self.compute = nn.Linear(3, 4), nn.Conv2d(3, 4, 8, 8), compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


def colours(gain: float) -> Net:
    """Mean colours, magnified until low precision shows (or overflows)."""

    def compute(net: Net, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3))
        return net.mix((pooled - pooled.mean(0)) * gain)

    return Net(compute)


def tiny(module: nn.Module) -> tuple[Backbone, np.ndarray]:
    backbone = load_backbone("squeezenet1_1", "none")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    return dataclasses.replace(backbone, module=module.eval(), dim=4), pixels


@torch.inference_mode()
def plain(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    inputs = normalise(torch.from_numpy(pixels), *channel_constants(backbone.preprocess, torch.device("cpu")))
    return backbone.module(inputs).numpy()  # type: ignore[no-any-return]


def test_a_network_may_hold_constants_of_five_dimensions() -> None:
    """As a traced Swin does."""
    net = colours(1.0)
    net.register_buffer("mask", torch.zeros(1, 1, 1, 1, 1))
    backbone, pixels = tiny(net)
    encoder, _ = build_encoder(backbone, choose_runtime("cpu"), pixels, precision="fp32")
    np.testing.assert_allclose(encoder(pixels), plain(backbone, pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", ["auto", "fp32"])
def test_precision_that_passes_is_the_reference_class(asked: Precision) -> None:
    backbone, pixels = tiny(colours(1.0))
    encoder, choice = build_encoder(backbone, choose_runtime("cpu"), pixels, precision=asked)
    assert choice.precision_class == "reference"
    assert choice.tried[f"{choice.precision} {choice.form}"]["min_cosine"] >= 0.995
    assert encoder(pixels).shape == (8, 4)


@pytest.mark.parametrize(
    ("errors", "taken"),
    [
        ({"fused": 0.04, "folded": 0.05}, "fused"),
        ({"fused": 0.05, "folded": 0.04}, "folded"),
        ({"fused": 0.1753, "folded": 0.1746}, "fused"),  # MobileNetV2 in bf16: a fifth slower for nothing
    ],
)
def test_precision_that_fails_runs_in_the_form_that_errs_least_or_the_faster_of_equals(
    monkeypatch: pytest.MonkeyPatch, errors: dict[str, float], taken: str
) -> None:
    """Fused layers round less than others, and are faster: that nothing passes is no reason to do without."""
    backbone, pixels = tiny(colours(1.0))
    expected = plain(backbone, pixels)
    features = {form: expected + error * (expected - expected.mean(0)) for form, error in errors.items()}
    encoders = [(SimpleNamespace(form=form), "bf16", form) for form in errors]
    monkeypatch.setattr("featcache.backbones.encoder._encoders", lambda *_: iter(encoders))
    monkeypatch.setattr("featcache.backbones.encoder._features_or_nan", lambda encoder, *_: features[encoder.form])
    encoder, choice = build_encoder(backbone, choose_runtime("cpu"), pixels, precision="bf16")
    assert choice.form == encoder.form == taken  # type: ignore[attr-defined]


def test_precision_that_fails_is_obeyed_and_named() -> None:
    backbone, pixels = tiny(colours(1e8))  # float16 overflows
    _, choice = build_encoder(backbone, choose_runtime("cpu"), pixels, precision="fp16")
    assert (choice.precision, choice.precision_class) == ("fp16", "fp16")
    assert "below the bar" in choice.reason
    with pytest.raises(UsageError, match="unknown precision"):
        build_encoder(backbone, choose_runtime("cpu"), pixels, precision="int8")  # type: ignore[arg-type]


def test_what_all_embeddings_share_hides_no_error(bf16_arithmetic: bool) -> None:
    """bfloat16 counts in steps of 0.8 % at 1: the differences, about 0.01, are gone, and the cosine does not show it."""
    backbone, pixels = tiny(Net(lambda net, x: net.mix(x.mean((2, 3))) * 0.01 + 1.0))
    _, choice = build_encoder(backbone, choose_runtime("cpu"), pixels, precision="bf16")
    assert all((figures["min_cosine"] or 0) > 0.9999 for figures in choice.tried.values())
    assert choice.precision_class == "bf16"
    assert "error" in choice.reason
    encoder, choice = build_encoder(backbone, choose_runtime("cpu"), pixels)
    assert (choice.precision, choice.precision_class) == ("fp32", "reference")
    np.testing.assert_allclose(encoder(pixels), plain(backbone, pixels), rtol=1e-6)


def test_one_image_proves_no_precision(bf16_arithmetic: bool) -> None:
    backbone, pixels = tiny(colours(1.0))
    _, choice = build_encoder(backbone, choose_runtime("cpu"), pixels[:1])
    assert (choice.precision, choice.precision_class) == ("fp32", "reference")
    assert {name.split()[0] for name in choice.tried} == {"fp32"}  # what cannot pass takes no time
    _, choice = build_encoder(backbone, choose_runtime("cpu"), pixels[:1], precision="bf16")
    assert (choice.precision, choice.precision_class) == ("bf16", "bf16")


def figures(error: float | None) -> dict[str, float | None]:
    names = ("mean_cosine", "min_cosine", "centred_mean_cosine", "centred_min_cosine")
    return dict.fromkeys(names, 1.0) | {"error": error}


@pytest.mark.parametrize(
    ("precision", "group", "tried", "advice"),
    [
        ("bf16", "reference", {"bf16 fused": 0.02}, ""),
        ("fp32", "reference", {"fp32 fused": 0.0}, ""),  # a CPU that has nothing faster, or as asked
        (
            "fp32",
            "reference",
            {"bf16 fused": 0.17, "bf16 folded": 0.165, "fp32 fused": 0.0},
            "precision float32: bf16 would change these embeddings by 16.5 % (3.2 % is allowed); -v shows more",
        ),
        ("fp32", "reference", {"bf16 fused": None, "fp32 fused": 0.0}, ""),  # images that are all alike
        ("bf16", "reference", {"fp16 folded": 0.2, "bf16 folded": 0.01}, ""),  # a GPU's second is fast, too
        (
            "bf16",
            "bf16",
            {"bf16 fused": 0.1},
            "precision bf16 as asked: it changes these embeddings by 10.0 % (3.2 % is allowed)",
        ),
    ],
)
def test_what_the_user_is_told_of_it(precision: str, group: str, tried: dict[str, float | None], advice: str) -> None:
    found = {name: figures(error) for name, error in tried.items()}
    assert PrecisionChoice(precision, "fused", group, "", found).advice == advice


def wrong(*_: object, **__: object) -> nn.Module:
    return colours(-1.0).eval()


def too_long(module: nn.Module, *_: object, **__: object) -> nn.Module:
    """The right direction, so that a cosine is 1."""
    return Net(lambda _, x: module(x) * 1.01)


def fails(*_: object, **__: object) -> nn.Module:
    raise RuntimeError("no such operator")


def fails_when_run(*_: object, **__: object) -> nn.Module:
    return Net(fails)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("folding", "fusing", "form"),
    [
        (None, None, "fused"),
        (None, wrong, "folded"),
        (None, too_long, "folded"),
        (None, fails, "folded"),
        (None, fails_when_run, "folded"),
        (wrong, wrong, "plain"),
    ],
)
def test_what_does_harm_is_left_out(
    monkeypatch: pytest.MonkeyPatch, folding: object, fusing: object, form: str
) -> None:
    """A transformation that changes the embeddings, or that this machine cannot do, never reaches the user."""
    backbone, pixels = tiny(colours(1.0))
    expected = plain(backbone, pixels)
    for name, replacement in (("fold_batchnorm", folding), ("fuse_convolutions", fusing)):
        if replacement:
            monkeypatch.setattr(f"featcache.backbones.encoder.{name}", replacement)
    encoder, choice = build_encoder(backbone, choose_runtime("cpu"), pixels, precision="fp32")
    assert (choice.form, choice.precision_class) == (form, "reference")
    np.testing.assert_allclose(encoder(pixels), expected, rtol=1e-5, atol=1e-6)


def test_float32_may_only_round_otherwise() -> None:
    """A difference that would pass for bfloat16's is a fault of tracing if it is float32's."""

    def nudge(net: Net, x: torch.Tensor) -> torch.Tensor:
        same = x = x * 1
        same += 0.005  # in place and under another name; tracing takes that for an addition to that name alone
        return net.mix(x.mean((2, 3)))

    backbone, pixels = tiny(Net(nudge))
    _, choice = build_encoder(backbone, choose_runtime("cpu"), pixels, precision="fp32")
    assert choice.form == "plain"
    assert all(0.999 < (tried["min_cosine"] or 0) < 1 - 1e-6 for tried in choice.tried.values())


def test_a_single_sample_does_not_hide_what_is_broadcast() -> None:
    """What one image gives is added to all; with a single image it looks like any other residual."""

    def add(net: Net, x: torch.Tensor) -> torch.Tensor:
        everyone = net.conv(x)
        return torch.relu(net.conv(x[:1]) + everyone).mean((2, 3))

    backbone, pixels = tiny(Net(add))
    encoder, choice = build_encoder(backbone, choose_runtime("cpu"), pixels[:1], precision="fp32")
    assert choice.form == "fused"
    np.testing.assert_allclose(encoder(pixels), plain(backbone, pixels), rtol=1e-4, atol=1e-5)


def test_fusing_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_FUSE", "0")
    backbone, pixels = tiny(colours(1.0))
    assert build_encoder(backbone, choose_runtime("cpu"), pixels)[1].form == "folded"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_blamed_on_no_image(value: float) -> None:
    backbone, pixels = tiny(colours(1.0))
    backbone.module.mix.weight.data[2, 1] = value  # type: ignore[union-attr,operator,index]
    with pytest.raises(BackboneError, match=r"1 tensor with values that are not finite, mix\.weight first"):
        build_encoder(backbone, choose_runtime("cpu"), pixels)


OVERFLOWS: dict[str, Callable[[Net, torch.Tensor], torch.Tensor]] = {
    "in the middle": lambda net, x: net.mix(x.mean((2, 3)) * 4e4) * 1e-4,  # float16 ends at 65,504; white is 2.2 to 2.6
    "everywhere": lambda net, x: net.mix(x.mean((2, 3)) * 1e38),
}


@pytest.mark.parametrize("where", OVERFLOWS)
def test_what_overflows_in_float16_is_computed_in_float32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """And only that; what is not finite in float32 either is refused."""
    rng = np.random.default_rng(0)
    for number in range(5):
        grey = rng.integers(90, 140, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(grey if number != 3 else np.full_like(grey, 255)).save(tmp_path / f"{number}.png")
    torch.manual_seed(0)
    net = Net(OVERFLOWS[where])
    nn.init.constant_(net.mix.weight, 1.0)
    backbone, _ = tiny(net)
    images, runtime = list_images(tmp_path), choose_runtime("cpu", workers=2, batch_size=2)
    encoder, _ = build_encoder(backbone, runtime, sample_pixels(images, backbone.preprocess, 3), precision="fp16")
    with caplog.at_level(logging.INFO, "featcache"):
        batches = list(embed(images, encoder, runtime))
    found = np.concatenate([batch.features for batch in batches])
    refused = {index: reason for batch in batches for index, reason in batch.refused.items()}
    if where == "everywhere":
        assert refused == {3: "its embedding is not finite"}
        return
    assert not refused
    expected = plain(backbone, sample_pixels(images, backbone.preprocess, 5))
    np.testing.assert_array_equal(found[3], expected[3])
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)
    assert not np.array_equal(found, expected)  # the others are float16's
    said = [record.getMessage() for record in caplog.records]
    assert said == ["images that overflowed and were embedded again in float32: 1, 3.png first"]


def observed(see: Callable[[], None]) -> Net:
    """A network that cannot be traced and calls ``see`` in every forward pass."""

    def compute(net: Net, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) != 1e9:
            see()
        return net.mix(x.mean((2, 3)))

    return Net(compute)


@pytest.mark.parametrize(("precision", "inside"), [("fp32", {"ieee"}), ("bf16", {"ieee", "tf32"})])
def test_float32_is_not_rounded_and_the_programs_switch_stays(precision: Precision, inside: set[str]) -> None:
    """The reference is float32 in any case; a bf16 network computes as the program lets it."""
    switch, seen = torch.backends.cudnn.conv, []
    assert switch.fp32_precision == "tf32"  # PyTorch's default
    backbone, pixels = tiny(observed(lambda: seen.append(switch.fp32_precision)))
    encoder, _ = build_encoder(backbone, choose_runtime("cpu"), pixels, precision=precision)
    encoder(pixels)
    assert set(seen) == inside
    assert switch.fp32_precision == "tf32"


@pytest.mark.parametrize("calls_before", [0, 1])
@pytest.mark.parametrize(
    ("error", "becomes", "words"),
    [
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), UsageError, "halve --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), UsageError, "halve --batch-size"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), torch.AcceleratorError, "device-side"),
    ],
)
def test_want_of_memory_and_a_failed_gpu_are_no_faults_of_the_network(
    error: Exception, becomes: type[Exception], words: str, calls_before: int
) -> None:
    """In the first forward pass, which an unfit input size would fail, as in the self-check's, which may fail."""
    calls: list[None] = []

    def fail_later() -> None:
        calls.append(None)
        if len(calls) > calls_before:
            raise error

    backbone, pixels = tiny(observed(fail_later))
    with pytest.raises(becomes, match=words):
        build_encoder(backbone, choose_runtime("cpu"), pixels, precision="fp32")


def test_an_encoder_and_its_lane_hold_no_memory_when_they_are_gone() -> None:
    """A lane has a graph, buffers and the network's weights, on a GPU; whoever looks for cycles there does not look soon."""
    backbone, pixels = tiny(nn.Identity())
    encoder = Encoder(copy.deepcopy(backbone.module), backbone.preprocess, torch.device("cpu"), torch.float32)
    encoder._lane = lane = encoder.new_lane(len(pixels))
    np.testing.assert_array_equal(lane.download(lane.compute(lane.upload(pixels)))(), encoder(pixels))
    network, held = weakref.ref(encoder._module), weakref.ref(lane)
    gc.disable()
    try:
        del encoder, lane
        assert network() is None and held() is None
    finally:
        gc.enable()
