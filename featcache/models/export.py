"""``export``: a saved model, backbone and head in one file, for programs that know nothing of featcache.

In: a model folder. Out: by the suffix of the output ``.onnx`` (``as_onnx.py``) or ``.safetensors`` (``as_safetensors.py``). Both
carry classes, preprocessing and origin as metadata, and no file appears before what it computes was compared with the
model. Everything is float32: a model trained on float16 embeddings, or with bf16, differs from it by their rounding.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from featcache.backbones.backbone import Backbone
from featcache.errors import ExportError, UsageError
from featcache.heads.head import softmax
from featcache.models.as_onnx import make_onnx, require_onnx
from featcache.models.as_safetensors import make_safetensors
from featcache.models.export_candidate import Candidate, normalise_pixels, sample_pixels
from featcache.models.model import Model, load_model
from featcache.system.files import check_free_space, check_may_replace, check_output, publish_file, target_of
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path, is_model

Format = Literal["onnx", "safetensors"]
FORMATS: dict[str, Format] = {".onnx": "onnx", ".safetensors": "safetensors"}
# What float32 arithmetic in another order explains: in probability, and in logits relative to the largest one.
TOLERANCE = 1e-3


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


def export_model(model: Model | AnyPath, output: AnyPath, *, force: bool = False) -> ExportReport:
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
    output = as_path(output)
    if not isinstance(model, Model):
        check_path(model, "model", ("export", HERE, "-o", output))
    kind = _check_target(output, force=force)
    if kind == "onnx":
        require_onnx()
    model = model if isinstance(model, Model) else load_model(model)
    backbone = model.load_backbone()
    candidate = (make_onnx if kind == "onnx" else make_safetensors)(model, backbone, output.name)
    difference = _check_parity(candidate, model, backbone, output=output)
    check_free_space(target_of(output).parent, len(candidate.data))
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


def _check_target(output: Path, *, force: bool) -> Format:
    """The format, by the suffix. Refuse, before any work, what cannot or must not be written."""
    kind = FORMATS.get(output.suffix.lower())
    if kind is None:
        raise UsageError(f"cannot tell the format of {output}; name it .onnx or .safetensors")
    check_output(output)
    if is_model(target_of(output).parent):  # a backbone.safetensors there would be taken for the model's own
        raise UsageError(f"{output.parent} is a model folder, which keeps no other files; choose another -o")
    check_may_replace(output, "--force", given=force)
    return kind


def _check_parity(candidate: Candidate, model: Model, backbone: Backbone, *, output: Path) -> dict[str, float]:
    """Compare with the untouched backbone and the saved head itself, as numpy applies it. Raises ExportError."""
    pixels = sample_pixels(backbone.preprocess)
    with torch.inference_mode():
        embeddings = backbone.module(normalise_pixels(pixels, backbone.preprocess)).numpy()
    logits = model.head.logits(embeddings)
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
