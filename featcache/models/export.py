"""``export``: a saved model, backbone and head in one file, for programs that know nothing of featcache.

In: a model folder. Out: by the suffix of the output

``.onnx``: float32 RGB pixels (N, 3, H, W) in 0..1 -> ``probabilities`` and ``logits``, float32 (N, C). The normalisation
is inside the graph, so that what is left to the caller is the same for every model: resize, crop, divide by 255.

``.safetensors``: the whole network's tensors for PyTorch, under the architecture's own names, which take normalised pixels,
as they do for everybody else. Where the head is one linear layer it becomes the final layer of the architecture; where it
is more than that, its layers are called ``featcache_head.*``.

Both carry classes, preprocessing and origin as metadata, and no file appears before what it computes was compared with
the model. Everything is float32: a model trained on float16 embeddings, or with bf16, differs from it by their rounding.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from featcache import __version__
from featcache.backbones.load import Backbone, build_network
from featcache.errors import ExportError, MissingDependencyError, UsageError
from featcache.heads.head import Head, softmax
from featcache.images.preprocess import PreprocessSpec, channel_constants
from featcache.models.model import Model, load_model
from featcache.system.files import check_free_space, check_output, publish_file

Format = Literal["onnx", "safetensors"]
HEAD_PREFIX = "featcache_head"  # not "head", which some architectures call layers of their own
# What float32 arithmetic in another order explains: in probability, and in logits relative to the largest one.
TOLERANCE = 1e-3
_ONNX_LIMIT = 2**31 - 2**24  # protobuf ends at 2 GiB; the graph itself needs a little
_NO_LENGTH = 1e-30
_Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What ``export_model`` wrote.

    Attributes:
        model: the folder. output: the file. format: ``onnx`` or ``safetensors``. bytes: its size.
        inputs, outputs: name -> type, shape and range.
        usage: Python lines that run the file.
        max_difference, mean_difference: between the file's probabilities and the model's, over the inputs compared.
        max_logit_difference: likewise of the logits, absolute.
        seconds: of the whole call.
    """

    model: Path
    output: Path
    format: Format
    bytes: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    usage: str
    max_difference: float
    mean_difference: float
    max_logit_difference: float
    seconds: float


def export_model(model: Model | str | Path, output: str | Path, *, force: bool = False) -> ExportReport:
    """Write a model as one file that needs no featcache; see the module for what goes in and comes out.

    Args:
        model: a model folder, or what ``load_model`` returned.
        output: a ``.onnx`` or ``.safetensors`` file.
        force: replace it if it exists.

    Raises:
        UsageError: another suffix, or an output that exists or lies in a model folder. StorageError: it cannot be
        written. ModelError, BackboneError: the model or its backbone's weights cannot be loaded.
        MissingDependencyError: ONNX without the ``onnx`` extra. ExportError: it cannot be converted, or does not compute
        what the model computes; nothing is written.
    """
    started = time.perf_counter()
    output = Path(output)
    kind = _format_of(output)
    _check_target(output, force)
    if kind == "onnx":
        _require_onnx()
    model = model if isinstance(model, Model) else load_model(model)
    backbone = model.load_backbone()
    candidate = (_make_onnx if kind == "onnx" else _make_safetensors)(model, backbone, output.name)
    difference = _check_parity(candidate, model, output)
    check_free_space(output.parent, len(candidate.data))
    with publish_file(output, needed=len(candidate.data)) as file:
        file.write(candidate.data)
    return ExportReport(
        model=model.path,
        output=output,
        format=kind,
        bytes=len(candidate.data),
        inputs=candidate.inputs,
        outputs=candidate.outputs,
        usage=candidate.usage,
        **difference,
        seconds=time.perf_counter() - started,
    )


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A file's content before it is one. ``logits``, ``probabilities``: what it makes of ``_sample_pixels``."""

    data: bytes
    inputs: dict[str, str]
    outputs: dict[str, str]
    usage: str
    embeddings: _Array  # (n, D), of the untouched backbone
    logits: _Array
    probabilities: _Array


def _format_of(output: Path) -> Format:
    suffix = output.suffix.lower()
    if suffix == ".onnx":
        return "onnx"
    if suffix == ".safetensors":
        return "safetensors"
    raise UsageError(f"cannot tell the format of {output}; name it .onnx or .safetensors")


def _check_target(output: Path, force: bool) -> None:
    """Refuse, before any work, what cannot or must not be written."""
    check_output(output)
    if (output.parent / "model.json").exists():  # a backbone.safetensors there would be taken for the model's own
        raise UsageError(f"{output.parent} is a model folder, which keeps no other files; choose another -o")
    if os.path.lexists(output) and not force:
        raise UsageError(f"{output} exists; choose another -o, or give --force to replace it")


# ------------------------------------------------------------------------------------------------- the network


class _Network(nn.Module):
    """Pixels (N, 3, H, W) in 0..1 -> probabilities, logits (N, C)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        mean, std = channel_constants(backbone.preprocess, torch.device("cpu"))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.backbone = backbone.module
        self.unit = head.scaling == "unit"
        self.layers = nn.Sequential(*_linear_layers(head))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.backbone((pixels - self.mean) / self.std)
        logits = self.layers(_unit_length(embeddings) if self.unit else embeddings)
        return logits.softmax(dim=1), logits


def _unit_length(x: torch.Tensor) -> torch.Tensor:
    """As ``heads.scale_features``: a row of zeros stays one, any other length that float32 can square is divided by."""
    return nn.functional.normalize(x, dim=1, eps=_NO_LENGTH)


def _linear_layers(head: Head) -> list[nn.Module]:
    """The head's layers, with the standardising folded into the first; computed in double precision."""
    arrays = [(weight.astype(np.float64), bias.astype(np.float64)) for weight, bias in head.layers]
    if head.scaling == "standardise":  # W ((x - m) / s) + b = (W / s) x + (b - (W / s) m)
        weight = arrays[0][0] / head.scale
        arrays[0] = weight, arrays[0][1] - weight @ head.mean
    modules: list[nn.Module] = []
    for weight, bias in arrays:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        modules += [nn.ReLU()] * bool(modules) + [layer.requires_grad_(False)]
    return modules


# ------------------------------------------------------------------------------------------------------ parity


def _sample_pixels(spec: PreprocessSpec) -> torch.Tensor:
    """Four made-up pictures, float32 (4, 3, H, W) in 0..1: blurred patches with noise, as photographs are, seeded."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand((4, 3, 5, 5), generator=generator)
    smooth = nn.functional.interpolate(patches, size=spec.crop, mode="bilinear")
    noise = torch.randn(smooth.shape, generator=generator)
    return (smooth + 0.05 * noise).clamp(0, 1)


def _embed(backbone: Backbone, pixels: torch.Tensor) -> _Array:
    mean, std = channel_constants(backbone.preprocess, torch.device("cpu"))
    with torch.inference_mode():
        return np.asarray(backbone.module((pixels - mean) / std).numpy())


def _check_parity(candidate: _Candidate, model: Model, output: Path) -> dict[str, float]:
    """Compare with the saved head itself, as numpy applies it. Raises ExportError."""
    logits = model.head.logits(candidate.embeddings)
    in_logits = np.abs(candidate.logits - logits)
    in_probability = np.abs(candidate.probabilities - softmax(logits))
    allowed = TOLERANCE * max(1.0, float(np.abs(logits).max()))
    if not (in_probability.max() <= TOLERANCE and in_logits.max() <= allowed):  # so that NaN fails, too
        raise ExportError(
            f"{output} was not written: its network differs from {model.path} by {in_probability.max():.2g} in probability "
            f"and {in_logits.max():.2g} in logits, allowed are {TOLERANCE:.2g} and {allowed:.2g}; try the other format"
        )
    return {
        "max_difference": float(in_probability.max()),
        "mean_difference": float(in_probability.mean()),
        "max_logit_difference": float(in_logits.max()),
    }


# ---------------------------------------------------------------------------------------------------- metadata


def describe_preprocess(spec: PreprocessSpec, *, normalised_inside: bool) -> dict[str, Any]:
    """A preprocessing in words that need no featcache, as JSON values, in the order of the steps."""
    height, width = spec.crop
    resize = (
        {"shorter_edge": spec.resize, "aspect_ratio": "kept"}
        if isinstance(spec.resize, int)
        else {"height": spec.resize[0], "width": spec.resize[1], "aspect_ratio": "not kept"}
    )
    return {
        "decode": f"{spec.decode}; 8 bit per channel; orientation: {spec.orientation}; alpha: {spec.alpha}; deep: {spec.deep}; "
        f"frame: {spec.frame}; colour profile: {spec.profile}",
        "channel_order": "RGB",
        "resize": resize,
        "interpolation": spec.interpolation,
        "antialias": spec.antialias,
        "crop": {"height": height, "width": width, "position": "centre"},
        "range": [0.0, 1.0],
        "scale": "divide by 255",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "normalisation": "inside the network, do not repeat it"
        if normalised_inside
        else "subtract mean, divide by std",
        "layout": "NCHW",
    }


def _metadata(model: Model, backbone: Backbone, *, normalised_inside: bool) -> dict[str, str]:
    preprocess = describe_preprocess(backbone.preprocess, normalised_inside=normalised_inside)
    return {
        "featcache_version": __version__,
        "fingerprint": model.fingerprint,
        "head_sha256": model.manifest["head"]["sha256"],
        "backbone": backbone.name,
        "weights": _encodable(backbone.weights),
        "weights_sha256": backbone.weights_sha256,
        "classes": json.dumps(model.classes),
        "preprocess": json.dumps(preprocess),
    }


def _encodable(text: str) -> str:
    """File names may hold bytes that are not UTF-8; both formats insist on it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _shape(model: Model) -> str:
    return f"float32 (N, {len(model.classes)})"


# -------------------------------------------------------------------------------------------------------- ONNX


def _require_onnx() -> tuple[Any, Any]:
    """The one door to onnx and onnxruntime; onnxscript is what torch converts with."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "exporting to ONNX needs onnx, onnxruntime and onnxscript: pip install 'featcache[onnx]'"
        ) from error
    return onnx, onnxruntime


def _make_onnx(model: Model, backbone: Backbone, name: str) -> _Candidate:
    network = _Network(backbone, model.head).eval()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _ONNX_LIMIT:
        raise ExportError(
            f"{backbone.name} has {size / 1e9:.1f} GB of weights, an ONNX file holds 2 GB; export to .safetensors instead"
        )
    pixels = _sample_pixels(backbone.preprocess)
    data = _convert(network, pixels, _metadata(model, backbone, normalised_inside=True))
    probabilities, logits = _run_onnx(data, pixels)
    height, width = backbone.preprocess.crop
    return _Candidate(
        data=data,
        inputs={"pixels": f"float32 (N, 3, {height}, {width}), RGB in 0..1"},
        outputs={"probabilities": _shape(model), "logits": _shape(model)},
        usage=f"session = onnxruntime.InferenceSession({name!r})\n"
        "probabilities, logits = session.run(['probabilities', 'logits'], {'pixels': pixels})",
        embeddings=_embed(backbone, pixels),
        logits=logits,
        probabilities=probabilities,
    )


def _convert(network: nn.Module, pixels: torch.Tensor, metadata: dict[str, str]) -> bytes:
    onnx, _ = _require_onnx()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        warnings.simplefilter("ignore")  # the exporter's, about its own and torch's internals
        try:
            program = torch.onnx.export(
                network,
                (pixels,),
                dynamo=True,  # the older exporter is on its way out, and cannot do torchvision's ViTs
                input_names=["pixels"],
                output_names=["probabilities", "logits"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"torch cannot convert this backbone to ONNX ({reason}); export to .safetensors"
            ) from error
    proto: Any = program.model_proto  # type: ignore[union-attr]  # None comes from the older exporter only
    for node in proto.graph.node:  # where in which source file each came from: paths of this machine
        node.ClearField("metadata_props")
    onnx.helper.set_model_props(proto, metadata)
    return bytes(proto.SerializeToString())


def _run_onnx(data: bytes, pixels: torch.Tensor) -> tuple[_Array, _Array]:
    """Probabilities and logits from onnxruntime, in a batch of one and another of the rest."""
    _, onnxruntime = _require_onnx()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about the graph's style
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        names = ["probabilities", "logits"]
        batches = [session.run(names, {"pixels": batch.numpy()}) for batch in (pixels[:1], pixels[1:])]
    except Exception as error:  # onnxruntime has a dozen kinds without a base of their own
        raise ExportError(
            f"onnxruntime cannot run what torch converted ({type(error).__name__}: {error}); export to .safetensors"
        ) from error
    return np.concatenate([batch[0] for batch in batches]), np.concatenate([batch[1] for batch in batches])


# ------------------------------------------------------------------------------------------------- safetensors


def _make_safetensors(model: Model, backbone: Backbone, name: str) -> _Candidate:
    from safetensors.torch import load, save

    layers = nn.Sequential(*_linear_layers(model.head))
    network, build = build_network(backbone.name, len(model.classes), backbone.preprocess.crop[0])
    original = _fits_original(network, backbone, model.head)
    prefix = f"{backbone.layer}." if original else f"{HEAD_PREFIX}."
    head = layers[0].state_dict() if original else layers.state_dict()
    tensors = backbone.module.state_dict() | {prefix + key: value for key, value in head.items()}
    usage = _usage(build, name, backbone, None if original else model.head)
    metadata = _metadata(model, backbone, normalised_inside=False) | {
        "format": "pt",
        "head": f"{prefix}*" + ("" if original else ", after the network; see usage"),
        "usage": usage,
    }
    # clones: safetensors refuses tensors that share memory
    data = save({key: value.clone().contiguous() for key, value in tensors.items()}, metadata)
    pixels = _sample_pixels(backbone.preprocess)
    mean, std = channel_constants(backbone.preprocess, torch.device("cpu"))
    logits = _reload(network, load(data), (pixels - mean) / std, backbone, None if original else model.head)
    height, width = backbone.preprocess.crop
    return _Candidate(
        data=data,
        inputs={"pixels": f"float32 (N, 3, {height}, {width}), RGB in 0..1, then normalised by mean and std"},
        outputs={"logits": _shape(model)},
        usage=usage,
        embeddings=_embed(backbone, pixels),
        logits=logits,
        probabilities=softmax(logits),
    )


def _fits_original(network: nn.Module, backbone: Backbone, head: Head) -> bool:
    """Whether the head can be the architecture's own final layer: one linear layer in place of one, and its bias."""
    if len(head.layers) > 1 or head.scaling == "unit" or len(_final_layers(backbone)) != 1:
        return False
    final = network.get_submodule(_final_layers(backbone)[0])
    # SqueezeNet's is a convolution with a ReLU behind it, MaxViT's has no bias.
    return isinstance(final, nn.Linear) and final.bias is not None and final.in_features == head.dim


def _final_layers(backbone: Backbone) -> list[str]:
    """Names that the backbone took its classifier out of: mostly one; timm has some with two, or none."""
    names = backbone.layer.split(" and ")
    return [name for name in names if isinstance(_submodule(backbone.module, name), nn.Identity)]


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _usage(build: str, name: str, backbone: Backbone, head: Head | None) -> str:
    """Python lines from the file to logits. head: None if it is part of the network."""
    lines = [f"tensors = safetensors.torch.load_file({name!r})", f"network = {build}.eval()"]
    if head is None:
        return "\n".join([*lines, "network.load_state_dict(tensors)", "logits = network(pixels)"])
    sizes = [f"torch.nn.Linear({weight.shape[1]}, {weight.shape[0]})" for weight, _ in head.layers]
    of_head = f"k.startswith('{HEAD_PREFIX}.')"
    lines += [f"network.set_submodule({layer!r}, torch.nn.Identity())" for layer in _final_layers(backbone)]
    lines += [
        f"network.load_state_dict({{k: v for k, v in tensors.items() if not {of_head}}})",
        f"head = torch.nn.Sequential({', torch.nn.ReLU(), '.join(sizes)})",
        f"head.load_state_dict({{k.removeprefix('{HEAD_PREFIX}.'): v for k, v in tensors.items() if {of_head}}})",
        "embeddings = network(pixels)",
    ]
    if head.scaling == "unit":
        lines.append(f"embeddings = torch.nn.functional.normalize(embeddings, dim=1, eps={_NO_LENGTH})")
    return "\n".join([*lines, "logits = head(embeddings)"])


def _reload(
    network: nn.Module, tensors: dict[str, torch.Tensor], inputs: torch.Tensor, backbone: Backbone, head: Head | None
) -> _Array:
    """Logits (n, C) of normalised ``inputs`` the way ``_usage`` says. Raises ExportError."""
    own = {key: value for key, value in tensors.items() if not key.startswith(f"{HEAD_PREFIX}.")}
    for layer in _final_layers(backbone) if head is not None else ():
        network.set_submodule(layer, nn.Identity())
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        raise ExportError(f"{backbone.name} does not take its own tensors back: {error}; export to .onnx") from error
    with torch.inference_mode():
        outputs = network(inputs)
        if head is not None:
            layers = nn.Sequential(*_linear_layers(head))
            layers.load_state_dict({k.removeprefix(f"{HEAD_PREFIX}."): tensors[k] for k in tensors.keys() - own.keys()})
            outputs = layers(_unit_length(outputs) if head.scaling == "unit" else outputs)
        return np.asarray(outputs.numpy())
