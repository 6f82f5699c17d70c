"""Every source of backbones passes the contract, on small networks with made-up weights; and what each alone has to refuse."""

import copy
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from huggingface_hub import constants
from PIL import Image
from torch import nn

from featcache.backbones.backbone import save_weights
from featcache.backbones.load import load_backbone
from featcache.errors import BackboneError, DownloadError, MissingDependencyError
from featcache.extraction.request import ExtractRequest
from featcache.testing.sources import SourceContract, same

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}
TOWERS: dict[str, dict[str, Any]] = {  # of open_clip, small
    "tiny-vit": VIT,
    "tiny-late": VIT | {"final_ln_after_pool": True, "pool_type": "avg", "no_ln_pre": True},
    "tiny-coca": VIT | {"attentional_pool": True, "output_tokens": True},
    "tiny-rn": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "tiny-timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
    "tiny-siglip": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
}
TOKENS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
TOKENS |= {"image_size": 32, "patch_size": 8}


@pytest.fixture(autouse=True, scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, which suits networks this small; open_clip knows the small towers; the hub is what lies in a folder."""
    folder, before = tmp_path_factory.mktemp("configs"), torch.get_num_threads()
    for name, vision in TOWERS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}))
    open_clip.add_model_config(folder)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield
    torch.set_num_threads(before)


def run_onnx(file: Path, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixels": pixels})
    return np.asarray(logits)


def hooked(network: Any, blocks: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What ``blocks`` put out while ``network`` runs."""
    seen: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _i, output: seen.append(output)) for block in blocks]
    network(pixels)
    for handle in handles:
        handle.remove()
    return seen


# ------------------------------------------------------------------------------------------- torchvision, timm


class TestTorchvision(SourceContract):
    name, wrong, size, left_out = "squeezenet1_1", "squeezenet1_11", 96, ("classifier.",)
    packages = ("torchvision",)

    def network(self) -> nn.Module:
        return torchvision.models.get_model(self.name)

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return network.features(pixels).mean(dim=(2, 3))

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        return torchvision.models.get_model_weights(self.name).IMAGENET1K_V1.transforms()(Image.fromarray(picture))


@pytest.mark.soak
class TestTorchvisionMaps(TestTorchvision):
    name, wrong, left_out, ways = "resnet18", "resnet1888", ("fc.",), (("own", 3),)
    stages = ("layer1", "layer2", "layer3", "layer4")

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        (found,) = torchvision.models.feature_extraction.create_feature_extractor(network, ["flatten"])(pixels).values()
        return found

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        maps = hooked(network, [network.get_submodule(stage) for stage in self.stages[-count:]], pixels)
        return [(x.mean(dim=(2, 3)), None) for x in maps]


@pytest.mark.soak
class TestTorchvisionViT(TestTorchvision):
    name, wrong, size, left_out = "vit_b_32", "vit_b_322", 64, ("heads.",)
    ways = (("mean", 1), ("cls+mean", 2), ("cls", 3))

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return network.encoder(self.embedded(network, pixels))[:, 0]

    def embedded(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        x = network._process_input(pixels)
        return torch.cat([network.class_token.expand(len(x), -1, -1), x], dim=1)

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        seen = map(network.encoder.ln, hooked(network, list(network.encoder.layers)[-count:], pixels))
        return [(x[:, 1:], x[:, 0]) for x in seen]

    def at_size(self, network: Any, edge: int) -> Any:
        larger = torchvision.models.get_model(self.name, image_size=edge).eval()
        resample = torchvision.models.vision_transformer.interpolate_embeddings
        larger.load_state_dict(resample(edge, 32, network.state_dict()))
        return larger


class TestTimm(SourceContract):
    name, wrong, size, left_out = "timm/test_vit", "timm/test_vitt", 96, ("head.",)
    ways, packages = (("mean", 1), ("cls+mean", 2), ("cls", 3)), ("timm",)

    def network(self) -> nn.Module:
        return timm.create_model(self.name.removeprefix("timm/"))

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return network.forward_head(network.forward_features(pixels), pre_logits=True)

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        seen = map(network.norm, hooked(network, list(network.blocks)[-count:], pixels))
        return [(x[:, network.num_prefix_tokens :], x[:, 0]) for x in seen]

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        config = timm.data.resolve_model_data_config(self.network())
        return timm.data.create_transform(**config, is_training=False)(Image.fromarray(picture))

    def at_size(self, network: Any, edge: int) -> Any:
        if hasattr(network, "set_input_size"):
            network.set_input_size(img_size=(edge, edge))
        return network


@pytest.mark.soak
class TestTimmMaps(TestTimm):
    name, wrong, size = "timm/test_convnext", "timm/test_convnextt", 96
    left_out, ways = ("head.fc.",), (("own", 3),)

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        return [(x.mean(dim=(2, 3)), None) for x in network.forward_intermediates(pixels, indices=count)[1]]


# --------------------------------------------------------------------------------------------------- open_clip


class TestOpenClip(SourceContract):
    name, wrong, listed, size = "openclip/tiny-vit", "openclip/tiny-vit/nobody", False, 48
    left_out = ("visual.proj", "transformer.", "token_", "positional_", "ln_", "text_", "attn_mask")
    ways, packages = (("mean", 1), ("cls+mean", 2), ("cls", 3)), ("open_clip",)

    def network(self) -> nn.Module:
        return open_clip.create_model(self.name.removeprefix("openclip/"))

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        tower = copy.copy(network.visual)
        tower._parameters = {**tower._parameters, "proj": None}
        return tower(pixels)

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        tower = network.visual
        seen = map(tower.ln_post, hooked(tower, list(tower.transformer.resblocks)[-count:], pixels))
        return [(x[:, 1:], x[:, 0]) for x in seen]

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        config = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.network()))
        return open_clip.transform.image_transform_v2(config, is_train=False)(Image.fromarray(picture))

    def at_size(self, network: Any, edge: int) -> Any:
        larger = open_clip.create_model(self.name.removeprefix("openclip/"), force_image_size=edge).eval()
        state = network.state_dict()
        open_clip.model.resize_pos_embed(state, larger)
        larger.load_state_dict(state)
        return larger


@pytest.mark.slow
class TestOpenClipLateNorm(TestOpenClip):
    name, wrong = "openclip/tiny-late", "openclip/tiny-latee"
    ways = (("cls", 1), ("cls+mean", 2), ("mean", 3))

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        tower = network.visual  # its norm comes behind the pooling
        seen = hooked(tower, list(tower.transformer.resblocks)[-count:], pixels)
        return [(tower.ln_post(x[:, 1:].mean(dim=1))[:, None], tower.ln_post(x[:, 0])) for x in seen]


@pytest.mark.slow
class TestOpenClipResNet(TestOpenClip):
    name, wrong, size, ways = "openclip/tiny-rn", "openclip/tiny-rnn", None, (("own", 3),)

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return network.encode_image(pixels)

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        stages = [network.visual.get_submodule(f"layer{number}") for number in range(5 - count, 5)]
        return [(x.mean(dim=(2, 3)), None) for x in hooked(network.visual, stages, pixels)]


@pytest.mark.soak
class TestOpenClipCoCa(TestOpenClip):
    name, wrong, ways = "openclip/tiny-coca", "openclip/tiny-cocaa", ()

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return super().embed(network, pixels)[0]


@pytest.mark.slow
class TestOpenClipOfTimm(TestOpenClip):
    name, wrong, size = "openclip/tiny-timm", "openclip/tiny-timmm", 96
    left_out = ("visual.head.", *TestOpenClip.left_out)

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return network.visual.trunk(pixels)

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        return TestTimm.layers(self, network.visual.trunk, pixels, count)  # type: ignore[arg-type]

    def at_size(self, network: Any, edge: int) -> Any:
        network.visual.set_input_size(edge)
        return network


@pytest.mark.soak
class TestOpenClipSigLip(TestOpenClipOfTimm):
    name, wrong = "openclip/tiny-siglip", "openclip/tiny-siglipp"
    ways = (("mean", 1), ("mean", 2))


# ------------------------------------------------------------------------------------------------ transformers


def put_on_hub(name: str, *parts: Any) -> Path:
    """Save models and processors as the repository ``name`` in the hub's local cache; where its files lie."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    files = folder / "snapshots" / "abc"
    files.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    for part in parts:
        part.save_pretrained(files)
    note_what_is_missing(files)
    return files


def note_what_is_missing(files: Path) -> None:
    """As the hub's client notes what it asked for in vain."""
    for entry in (
        "model.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
    ):
        note = files.parents[1] / ".no_exist" / files.name / entry
        note.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        if not (files / entry).exists():
            note.touch()


class TestTransformers(SourceContract):
    name, wrong, listed, size = "transformers/tiny/dinov2", "transformers/tiny/nothing", False, 48
    ways, packages = (("mean", 1), ("cls+mean", 2), ("cls", 3)), ("transformers",)
    config: Any = functools.partial(transformers.Dinov2Config, **TOKENS)
    processor: Any = functools.partial(
        transformers.BitImageProcessor, size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    )

    @pytest.fixture(autouse=True)
    def _on_hub(self) -> None:
        put_on_hub(self.name.removeprefix("transformers/"), self.network(), type(self).processor())

    def network(self) -> Any:
        config = type(self).config()
        return transformers.MODEL_MAPPING[type(config)](config)

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return network(pixels).pooler_output.flatten(1)

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        states = network(pixels, output_hidden_states=True).hidden_states[-count:]
        return [(x[:, 1:], x[:, 0]) for x in map(network.layernorm, states)]

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        files = put_on_hub(self.name.removeprefix("transformers/"))
        return transformers.AutoImageProcessor.from_pretrained(files)(picture, return_tensors="pt")["pixel_values"][0]


BY_EDGE = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}


@pytest.mark.slow
class TestTransformersViT(TestTransformers):
    """Without its pooler, a dense layer that most repositories lack: the class token."""

    name, config = "transformers/tiny/vit", functools.partial(transformers.ViTConfig, **TOKENS)
    processor, left_out = functools.partial(transformers.ViTImageProcessor, **SQUARE), ("pooler.",)

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return network(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]


@pytest.mark.soak
class TestTransformersClip(TestTransformers):
    name, config = "transformers/tiny/clip", functools.partial(transformers.CLIPVisionConfig, **TOKENS)
    processor = functools.partial(transformers.CLIPImageProcessor, **BY_EDGE)

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return network(pixels, interpolate_pos_encoding=True).pooler_output

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        states = network(pixels, output_hidden_states=True).hidden_states[-count:]
        return [(x[:, 1:], x[:, 0]) for x in map(network.post_layernorm, states)]


@pytest.mark.slow
class TestTransformersSigLip(TestTransformersClip):
    name, config = "transformers/tiny/siglip", functools.partial(transformers.SiglipVisionConfig, **TOKENS)
    processor = functools.partial(transformers.SiglipImageProcessor, **SQUARE)
    ways = (("mean", 1), ("mean", 3))

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        states = network(pixels, output_hidden_states=True).hidden_states[-count:]
        return [(x, None) for x in map(network.post_layernorm, states)]


STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}


@pytest.mark.slow
class TestTransformersConvNeXt(TestTransformers):
    name, config = "transformers/tiny/convnext", functools.partial(transformers.ConvNextConfig, **STAGES)
    processor = functools.partial(transformers.ConvNextImageProcessor, size={"shortest_edge": 64}, crop_pct=0.8)
    size, ways = 96, (("own", 3),)

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        maps = network(pixels, output_hidden_states=True).hidden_states[-count:]
        return [(x.mean(dim=(2, 3)), None) for x in maps]


@pytest.mark.soak
class TestTransformersSwin(TestTransformers):
    name = "transformers/tiny/swin"
    config = functools.partial(
        transformers.SwinConfig,
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=4,
    )
    processor, ways = functools.partial(transformers.ViTImageProcessor, **SQUARE), (("own", 2),)
    size = None

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        maps = network(pixels, output_hidden_states=True).reshaped_hidden_states[-count:]
        return [(x.mean(dim=(2, 3)), None) for x in maps]


ONNX: list[Any] = [
    pytest.param(TestTransformers, 1, marks=pytest.mark.slow),  # of its ways: one, or all
    *(
        pytest.param(source, 9, marks=pytest.mark.soak)
        for source in (TestTimm, TestOpenClip, TestTransformersViT, TestTransformersSigLip, TestTransformersConvNeXt)
    ),
]


@pytest.mark.parametrize(("source", "count"), ONNX)
def test_export_as_onnx(tmp_path: Path, source: type[SourceContract], count: int) -> None:
    contract: Any = source()
    if issubclass(source, TestTransformers):
        put_on_hub(source.name.removeprefix("transformers/"), contract.network(), source.processor())
    contract.export_as_onnx(tmp_path, run=run_onnx, ways=(("own", 1), *source.ways)[-count:])


# ------------------------------------------------------------------------------------------- what each has to say


def test_weights_of_a_tag_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of the tag decides preprocessing and activation; of the architecture alone QuickGELU would be missing."""
    record = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "resize_mode": "squash"}
    network, path = TestOpenClip().written(tmp_path)
    known = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(known, "tiny-vit", {"mine": {**record, "quick_gelu": True, "file": str(path)}})
    backbone = load_backbone("openclip/tiny-vit/mine")
    assert backbone.weights.startswith("open_clip mine, names without 'visual.'") and backbone.reload == "auto"
    spec = backbone.preprocess
    assert (spec.mean, spec.std, spec.interpolation, spec.resize) == (
        record["mean"],
        record["std"],
        "bilinear",
        (32, 32),
    )
    theirs = open_clip.create_model("tiny-vit", pretrained=str(path), force_quick_gelu=True).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert same(backbone.module(pixels), TestOpenClip().embed(theirs, pixels))
        assert not same(backbone.module(pixels), TestOpenClip().embed(network, pixels))
    with pytest.raises(BackboneError, match="give --weights FILE, or one of its tags: mine$"):
        load_backbone("openclip/tiny-vit")
    known["tiny-vit"]["mine"]["resize_mode"] = "longest"
    with pytest.raises(BackboneError, match="resizes its input in a way featcache does not know"):
        load_backbone("openclip/tiny-vit/mine")
    del known["tiny-vit"]["mine"]["file"]
    known["tiny-vit"]["mine"]["hf_hub"] = "nobody/nothing/"
    with pytest.raises(DownloadError, match="^the weights of openclip/tiny-vit/mine could not be downloaded"):
        load_backbone("openclip/tiny-vit/mine")


@pytest.mark.parametrize(("library", "package"), [("openclip", "open_clip"), ("transformers", "transformers")])
def test_without_the_library(monkeypatch: pytest.MonkeyPatch, library: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'featcache\[{library}\]'$"):
        load_backbone(f"{library}/some/name")


@pytest.mark.parametrize("name", ["transformers/./x", "transformers//tmp/x", "transformers/../x", "transformers/x"])
def test_folders_are_no_names_of_the_hub(name: str) -> None:
    with pytest.raises(BackboneError, match="OWNER/NAME"):
        load_backbone(name)


def vit(**changes: Any) -> Any:
    return transformers.ViTConfig(**TOKENS | changes)


def square() -> Any:
    return transformers.ViTImageProcessor(**SQUARE)


@pytest.mark.parametrize("classes", [transformers.ViTForImageClassification, transformers.ViTModel])
def test_weights_that_a_repository_has(classes: Any) -> None:
    """As saved by the library, whatever is beside the network in them; the source says where they are from."""
    network = classes(vit()).eval()
    put_on_hub("tiny/saved", network, square())
    backbone = load_backbone("transformers/tiny/saved")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        inner = getattr(network, "vit", network)
        assert same(backbone.module(pixels), inner(pixels).last_hidden_state[:, 0])
    assert (backbone.weights, backbone.reload) == ("the hub", "auto")


def test_image_tower_of_a_model_of_images_and_texts_in_several_files() -> None:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 64,
    }
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    network = transformers.CLIPModel(transformers.CLIPConfig(vision_config=dict(TOKENS), text_config=text)).eval()
    files = put_on_hub("tiny/shards", transformers.CLIPImageProcessor(**BY_EDGE))
    network.save_pretrained(files, max_shard_size="60KB")
    note_what_is_missing(files)
    assert len(list(files.glob("*.safetensors"))) > 2
    backbone = load_backbone("transformers/tiny/shards")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert same(backbone.module(pixels), network.vision_model(pixels).pooler_output)
    index = files / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(BackboneError, match="has no file '../model-00001.*', which its index names"):
        load_backbone("transformers/tiny/shards")


def test_a_copy_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved weights bring their configuration; a folder of save_pretrained has it beside them."""
    files = put_on_hub("tiny/moved", transformers.ViTModel(vit()), square())
    backbone = load_backbone("transformers/tiny/moved")
    save_weights(backbone, tmp_path / "copy.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(DownloadError, match="offline mode is enabled"):
        load_backbone("transformers/tiny/moved")
    for path in (tmp_path / "copy.safetensors", files / "model.safetensors"):
        again = load_backbone("transformers/tiny/moved", path)
        assert (again.weights_sha256, again.preprocess) == (backbone.weights_sha256, backbone.preprocess)


def spoil(files: Path, entry: str, **changes: Any) -> None:
    path = files / entry
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED: list[Any] = [  # what a repository has, what is said
    ("text", lambda files: spoil(files, "config.json", model_type="bert"), "takes no images .model_type 'bert'."),
    (
        "code",
        lambda files: spoil(files, "config.json", model_type="mine", auto_map={"AutoModel": "evil.Evil"}),
        "needs code of its repository .*, which is never run$",
    ),
    (
        "unknown",
        lambda files: spoil(files, "config.json", model_type="mine"),
        "upgrade transformers, or choose another$",
    ),
    ("small", lambda files: spoil(files, "config.json", quantization_config={"bits": 4}), "is quantised"),
    ("wrapped", lambda files: spoil(files, "config.json", model_type="timm_wrapper"), "name it timm/NAME$"),
    ("depth", lambda files: spoil(files, "config.json", num_hidden_layers=4), "do not fit .*missing"),
    ("width", lambda files: spoil(files, "config.json", hidden_size=48, num_attention_heads=3), "do not fit"),
    ("json", lambda files: (files / "config.json").write_text("[1"), "cannot be used"),
    (
        "unprepared",
        lambda files: (files / "preprocessor_config.json").unlink(),
        "does not say how its images are prepared",
    ),
    ("pickled", lambda files: (files / "model.safetensors").unlink(), "pickled weights of the hub are not loaded"),
    (
        "flipped",
        lambda files: spoil(files, "preprocessor_config.json", do_rescale=False),
        "prepares images in a way featcache does not know",
    ),
    (
        "ownsteps",
        lambda files: spoil(files, "preprocessor_config.json", image_processor_type="MineImageProcessor"),
        "prepares images by MineImageProcessor, which this transformers does not know",
    ),
    (
        "levit",
        lambda files: spoil(files, "preprocessor_config.json", image_processor_type="LevitImageProcessor"),
        "in a way",
    ),
    (
        "loose",
        lambda files: spoil(files, "preprocessor_config.json", size={"shortest_edge": 32}),
        "its images differ in shape",
    ),
    (
        "masking",
        lambda files: spoil(files, "config.json", model_type="vit_mae"),
        "gives one image two embeddings .it draws at random.; choose another$",
    ),
]


@pytest.mark.parametrize(("owner", "change", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_repositories_that_are_refused(owner: str, change: Any, words: str) -> None:
    files = put_on_hub(f"{owner}/vit", transformers.ViTModel(vit(), add_pooling_layer=False), square())
    change(files)
    note_what_is_missing(files)
    with pytest.raises(BackboneError, match=words) as caught:
        load_backbone(f"transformers/{owner}/vit")
    assert "\n" not in str(caught.value)


def test_records_name_the_packages_that_decide() -> None:
    versions = ExtractRequest(backbone="transformers/a/b").record()["versions"]
    assert versions["transformers"] == transformers.__version__ and "timm" not in versions
    assert {"open_clip_torch", "timm"} < ExtractRequest(backbone="openclip/ViT-B-32/openai").record()["versions"].keys()
