"""What every source of backbones passes: tests for pytest, which ships them beside what they test and needs no pytest itself.

A subclass names one network of the source and says how the library itself computes; ``Test...`` in its name, pytest runs it::

    class TestMine(SourceContract):
        name = "mine/small"

        def network(self): ...

Weights are made up: every block and every position matters in them, or a wrong block would not show.
"""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featcache.backbones.backbone import Backbone, hash_tensors, save_weights
from featcache.backbones.load import backbone_names, load_again, load_backbone
from featcache.errors import BackboneError, UsageError
from featcache.finetuning.network import stages
from featcache.heads.head import FittedHead, Head
from featcache.images.preprocess import channel_constants, normalise, to_pixels
from featcache.models.export import export_model
from featcache.models.model import save_model
from featcache.spec import Spec
from featcache.system.safe_load import load_tensors

ERROR = 1e-5  # of the features' spread, once what all images share is taken away
ROUNDING = 1e-6  # of the length of logits: what a head in float32 adds, however little embeddings vary


class SourceContract:
    """Tests of one network.

    Attributes:
        name: as ``load_backbone`` takes it. wrong: a name of this source that there is not.
        listed: whether ``backbone_names`` knows it. size: edge of another input than its own; None: it takes no other.
        left_out: tensors of the library's file that the backbone has no use for begin so.
        ways: (pool, layers) that it takes. packages: what the lines of an exported file import.
    """

    name: str
    wrong: str
    listed: bool = True
    size: int | None = None
    left_out: tuple[str, ...] = ()
    ways: tuple[tuple[str, int], ...] = ()
    packages: tuple[str, ...] = ()

    def network(self) -> nn.Module:
        """The library's own network, untrained, as its users build it."""
        raise NotImplementedError

    def state(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """What the library saves of it."""
        return network.state_dict()

    def embed(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        """(N, D) of normalised pixels by the library's own call: what enters its classifier, or projection."""
        raise NotImplementedError

    def layers(self, network: Any, pixels: torch.Tensor, count: int) -> list[tuple[Any, Any]]:
        """Of the last ``count`` layers (patches (N, L, C), class token (N, C) or None), normalised, by the library's own means."""
        raise NotImplementedError

    def prepare(self, picture: np.ndarray[Any, Any]) -> torch.Tensor:
        """(3, H, W) of a picture, uint8 (H, W, 3), as the library's own record of the weights has it."""
        raise NotImplementedError

    def at_size(self, network: Any, edge: int) -> Any:
        """The library's network told another input size."""
        return network

    # ---------------------------------------------------------------------------------------------------- tools

    def written(self, folder: Path, *, seed: int = 0) -> tuple[Any, Path]:
        """The library's network with made-up weights in eval mode, and a file of them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.network().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, value in network.state_dict().items():
                if key.endswith(("gamma", "lambda", "lambda1", "layer_scale")):
                    value.fill_(1)
                elif "pos" in key and value.is_floating_point():
                    value.copy_(torch.randn(value.shape, generator=generator))
                elif key.endswith("running_mean"):
                    value.copy_(torch.randn(value.shape, generator=generator) / 10)
        path = folder / f"weights{seed}.pth"
        torch.save(self.state(network), path)
        return network, path

    def matrix_of(self, state: dict[str, torch.Tensor]) -> str:
        """Name of a tensor that the backbone needs."""
        return next(
            k for k, v in state.items() if v.ndim > 1 < min(v.shape[:2]) and not k.startswith(self.left_out or "\0")
        )

    def load(self, weights: Path | str, **taken: Any) -> Backbone:
        """The network, pooled as the library does unless told otherwise."""
        return load_backbone(self.name, weights, **({"pool": "own"} | taken))

    def pixels(self, backbone: Backbone, count: int = 3) -> torch.Tensor:
        """Made-up images, normalised, float32 (count, 3, H, W)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(count, 3, *backbone.preprocess.crop, generator=generator)

    # ---------------------------------------------------------------------------------------------------- names

    def test_names(self) -> None:
        assert (self.name in backbone_names()) == self.listed
        message = refusal(lambda: load_backbone(self.wrong, "none"))
        assert self.wrong in message or self.wrong.partition("/")[2] in message, message

    # ------------------------------------------------------------------------------------------------- features

    def test_what_it_gives(self) -> None:
        backbone = self.load("none")
        with torch.inference_mode():
            found = backbone.module(self.pixels(backbone))
        assert found.shape == (3, backbone.dim) and found.dtype == torch.float32
        assert not backbone.module.training
        assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
        assert backbone.reload is None and backbone.name == self.name

    def test_features_equal_the_librarys(self, tmp_path: Path) -> None:
        network, path = self.written(tmp_path)
        backbone = self.load(path)
        pixels = self.pixels(backbone)
        with torch.inference_mode():
            assert same(backbone.module(pixels), self.embed(network, pixels))
            assert torch.equal(copy.deepcopy(backbone.module)(pixels), backbone.module(pixels))

    def test_every_pool_and_layer_equals_the_librarys(self, tmp_path: Path) -> None:
        network, path = self.written(tmp_path)
        for pool, count in self.ways:
            backbone = self.load(path, pool=pool, layers=count)
            pixels = self.pixels(backbone)
            with torch.inference_mode():
                found = backbone.module(pixels)
                theirs = self.layers(network, pixels, count)
                if pool == "own":  # of stages: the last one is the network's own
                    parts = [nn.functional.layer_norm(x, x.shape[1:]) for x, _ in theirs[:-1]]
                    expected = torch.cat([*parts, self.embed(network, pixels)], dim=1)
                else:
                    of_layer = [{"cls": cls, "mean": patches.mean(dim=1)} for patches, cls in theirs]
                    expected = torch.cat([x[part] for x in of_layer for part in pool.split("+")], dim=1)
            assert same(found, expected), (pool, count)
            assert backbone.dim == expected.shape[1]

    def test_pools_and_layers_that_it_has_not(self) -> None:
        refusal(lambda: self.load("none", layers=200), UsageError)
        if not any("cls" in pool for pool, _ in self.ways):
            refusal(lambda: self.load("none", pool="cls"), UsageError)

    def test_another_size(self, tmp_path: Path) -> None:
        network, path = self.written(tmp_path)
        if self.size is None:
            return
        usual, backbone = self.load(path), self.load(path, size=(self.size, self.size))
        assert backbone.preprocess.crop == (self.size, self.size) != usual.preprocess.crop
        assert backbone.weights_sha256 == usual.weights_sha256
        pixels = self.pixels(backbone)
        with torch.inference_mode():
            assert same(backbone.module(pixels), self.embed(self.at_size(network, self.size), pixels))

    # -------------------------------------------------------------------------------------------- preprocessing

    def test_preprocessing_is_the_librarys(self) -> None:
        """Within the rounding of filters: on average half of one of 256 levels."""
        spec = self.load("none").preprocess
        short = spec.resize if isinstance(spec.resize, int) else min(spec.resize)
        coarse = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
        picture = nn.functional.interpolate(coarse, (2 * short, 3 * short), mode="bicubic").clamp(0, 1)
        pixels = (picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        mean, std = channel_constants(spec, torch.device("cpu"))
        ours = normalise(torch.from_numpy(to_pixels(pixels, spec)[None].copy()), mean, std)
        theirs = self.prepare(pixels)[None]
        assert ours.shape == theirs.shape
        assert float(((ours - theirs) * std * 255).abs().mean()) <= 0.5

    # -------------------------------------------------------------------------------------------------- weights

    def test_hash_of_the_weights(self, tmp_path: Path) -> None:
        """Stable, the same after save and reload, of the published tensors; another one of other weights."""
        _, path = self.written(tmp_path)
        _, other = self.written(tmp_path, seed=1)
        size = (self.size, self.size) if self.size else None
        backbone, resized = self.load(path), self.load(path, size=size)
        assert self.load(path).weights_sha256 == backbone.weights_sha256 == resized.weights_sha256
        assert backbone.weights_sha256 == hash_tensors(backbone.module.state_dict())
        state = load_tensors(path)
        changed = self.matrix_of(state)
        state[changed] = state[changed] + 1
        torch.save(state, other)
        assert self.load(other).weights_sha256 != backbone.weights_sha256
        save_weights(resized, tmp_path / "copy.safetensors")
        again = load_again(spec_of(resized), tmp_path / "copy.safetensors", None)
        assert again is not None and again.weights_sha256 == backbone.weights_sha256
        with torch.inference_mode():
            pixels = self.pixels(resized)
            assert torch.equal(again.module(pixels), resized.module(pixels))

    def test_loads_only_what_is_safe_and_whole(self, tmp_path: Path) -> None:
        _, path = self.written(tmp_path)
        whole = load_tensors(path)
        key = self.matrix_of(whole)
        torch.save({k: v for k, v in whole.items() if k != key}, tmp_path / "short.pth")
        assert "do not fit" in refusal(lambda: self.load(tmp_path / "short.pth"))
        torch.save({**whole, key: whole[key][:1, :1]}, tmp_path / "cut.pth")
        assert "do not fit" in refusal(lambda: self.load(tmp_path / "cut.pth"))
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        torch.save({"model": Evil(tmp_path / "ran"), **whole}, tmp_path / "evil2.pth")
        for name in ("evil.pth", "evil2.pth"):
            assert "cannot be read as weights" in refusal(lambda name=name: self.load(tmp_path / name))
        assert not (tmp_path / "ran").exists()

    # ---------------------------------------------------------------------------------------------- fine-tuning

    def test_stages_cover_all_parameters_in_order(self) -> None:
        module = self.load("none").module
        parts = [parameter for stage in stages(module) for parameter in stage]
        assert sorted(map(id, parts)) == sorted(map(id, module.parameters()))
        module.requires_grad_(True)
        module(torch.randn(2, 3, *self.load("none").preprocess.crop)).square().mean().backward()
        assert sum(p.grad is not None for p in module.parameters()) > 0.5 * len(parts)

    # --------------------------------------------------------------------------------------------------- export

    def test_export_as_safetensors(self, tmp_path: Path) -> None:
        """The lines of the file, run without featcache, give the embedding of the library's network: own, pooled, layers."""
        _, path = self.written(tmp_path)
        size = (self.size, self.size) if self.size else None
        asked: list[dict[str, Any]] = [{}, *({"pool": p, "layers": n} for p, n in self.ways), {"size": size}]
        for number, taken in enumerate(asked):
            backbone = self.load(path, **taken)
            folder = save_as_model(backbone, tmp_path / f"m{number}")
            report = export_model(folder, tmp_path / f"{number}.safetensors")
            pixels = self.pixels(backbone)
            usage = report.usage.replace(repr(report.output.name), repr(str(report.output)))
            names: dict[str, Any] = {"pixels": pixels, "torch": torch, "json": json}
            names |= {
                package.partition(".")[0]: __import__(package) for package in ("safetensors.torch", *self.packages)
            }
            with torch.inference_mode():
                exec(usage, names)
                expected = logits_of(backbone, pixels)
                assert same(names["logits"], expected, error=10 * ERROR, rounding=ROUNDING), (taken, usage)

    def export_as_onnx(self, folder: Path, *, run: Any, ways: tuple[tuple[str, int], ...]) -> None:
        """The same for ONNX, in seconds for each of ``ways``: ``run(file, pixels)`` gives logits by another program."""
        _, path = self.written(folder)
        for number, (pool, layers) in enumerate(ways):
            backbone = self.load(path, pool=pool, layers=layers)
            report = export_model(save_as_model(backbone, folder / f"m{number}"), folder / f"{number}.onnx")
            mean, std = channel_constants(backbone.preprocess, torch.device("cpu"))
            raw = torch.rand(3, 3, *backbone.preprocess.crop, generator=torch.Generator().manual_seed(2))
            with torch.inference_mode():
                expected = logits_of(backbone, (raw - mean) / std)
            found = [torch.from_numpy(run(report.output, raw[rows].numpy())) for rows in (slice(0, 1), slice(1, 3))]
            assert same(torch.cat(found), expected, error=10 * ERROR, rounding=ROUNDING), (pool, layers)


class Evil:
    """What a pickle of it would do: make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def refusal(call: Any, kind: type[Exception] = BackboneError) -> str:
    """The one line that ``call`` is refused with."""
    try:
        call()
    except kind as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError(f"expected {kind.__name__}")


def same(ours: torch.Tensor, theirs: torch.Tensor, *, error: float = ERROR, rounding: float = 0.0) -> bool:
    """Within ``error`` of the spread that is left when the mean of all images is taken away, and ``rounding`` of the length."""
    spread = (theirs - theirs.mean(dim=0)).norm()
    allowed = error * spread + rounding * theirs.norm()
    return ours.shape == theirs.shape and spread > 0 and bool((ours - theirs).norm() <= allowed)


def spec_of(backbone: Backbone) -> Spec:
    """The spec of features in float32."""
    return Spec(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        preprocess=backbone.preprocess,
        precision="reference",
        storage="float32",
        pooling=backbone.pooling,
        layers=backbone.layers,
    )


def head_of(backbone: Backbone) -> Head:
    """A made-up head of three classes that takes embeddings as they are."""
    rng = np.random.default_rng(0)
    layers = ((rng.normal(0, 1, (3, backbone.dim)), rng.normal(0, 1, 3)),)
    return Head("logreg", "none", np.zeros(backbone.dim), np.ones(backbone.dim), layers)


def logits_of(backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3) by the head itself, as numpy applies it."""
    return torch.from_numpy(np.asarray(head_of(backbone).logits(backbone.module(pixels).numpy()), dtype=np.float32))


def save_as_model(backbone: Backbone, folder: Path) -> Path:
    """A model folder of the backbone and ``head_of`` it."""
    save_weights(backbone, folder.with_suffix(".safetensors"))
    save_model(
        folder,
        FittedHead(head_of(backbone), (), {}, []),
        classes=("a", "b", "c"),
        spec=spec_of(backbone),
        weights={"source": backbone.weights, "reload": None},
        training={},
        metrics={},
        files={"backbone.safetensors": folder.with_suffix(".safetensors").read_bytes()},
    )
    return folder
