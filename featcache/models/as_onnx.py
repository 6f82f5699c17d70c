"""A model as ONNX. The one door to onnx, onnxruntime and onnxscript.

float32 RGB pixels (N, 3, H, W) in 0..1 -> ``probabilities`` and ``logits``, float32 (N, C). The normalisation is inside the
graph, so that what is left to the caller is the same for every model: resize, crop, divide by 255.
"""

import contextlib
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from featcache.backbones.backbone import Backbone
from featcache.errors import ExportError, MissingDependencyError
from featcache.heads.head import Array
from featcache.models.export_candidate import Candidate, Network, metadata, sample_pixels
from featcache.models.model import Model

MAX_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB; the graph itself needs a little


def require_onnx() -> tuple[Any, Any]:
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


def make_onnx(model: Model, backbone: Backbone, name: str) -> Candidate:
    """Convert. ``name`` is the file's. Raises ExportError, MissingDependencyError."""
    network = Network(backbone, model.head).eval()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > MAX_BYTES:
        raise ExportError(
            f"{backbone.name} has {size / 1e9:.1f} GB of weights, an ONNX file holds 2 GB; export to .safetensors instead"
        )
    pixels = sample_pixels(backbone.preprocess)
    data = _convert(network, pixels, metadata(model, backbone, normalisation="inside the network, do not repeat it"))
    probabilities, logits = _run_onnx(data, pixels)
    height, width = backbone.preprocess.crop
    shape = f"float32 (N, {len(model.classes)})"
    return Candidate(
        data=data,
        inputs={"pixels": f"float32 (N, 3, {height}, {width}), RGB in 0..1"},
        outputs={"probabilities": shape, "logits": shape},
        usage=f"session = onnxruntime.InferenceSession({name!r})\n"
        "probabilities, logits = session.run(['probabilities', 'logits'], {'pixels': pixels})",
        logits=logits,
        probabilities=probabilities,
    )


def _convert(network: nn.Module, pixels: torch.Tensor, metadata: dict[str, str]) -> bytes:
    onnx, _ = require_onnx()
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


def _run_onnx(data: bytes, pixels: torch.Tensor) -> tuple[Array, Array]:
    """Probabilities and logits from onnxruntime, in a batch of one and another of the rest."""
    _, onnxruntime = require_onnx()
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
