"""A backbone made fast for inference, and the self-check that it still computes the same embeddings.

In: a ``Backbone`` and a few sample images. Out: an ``Encoder``: uint8 pixels (N, H, W, 3) -> float32 embeddings (N, D),
callable from many threads; and a ``PrecisionChoice``: which precision was tried, measured and chosen.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from featcache.backbones.backbone import Backbone
from featcache.backbones.depthwise import with_own_depthwise
from featcache.backbones.folding import (
    fold_batchnorm,
    fuse_convolutions,
    fuse_relus,
)
from featcache.backbones.fused_tokens import fuse_tokens
from featcache.backbones.lanes import CudaLane, Forward, PlainLane, fitting_lane
from featcache.backbones.ring import Lane
from featcache.backbones.self_check import Agreement, agreement, only_rounded
from featcache.backbones.tracing import out_of_cycles, sources_forgotten
from featcache.errors import BackboneError, UsageError
from featcache.images.preprocess import channel_constants, normalise
from featcache.spec import PreprocessSpec
from featcache.system.device import (
    Runtime,
    has_bf16_arithmetic,
    launching,
    memory_errors,
    one_core_each,
    true_float32,
)
from featcache.system.display import quantity
from featcache.system.runtime_options import may_fuse

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class PrecisionChoice:
    """What the self-check found.

    Attributes:
        precision: the precision in use.
        form: ``plain``, the network as it came; ``folded``, without batch norms; ``fused``, what follows a layer done in it, by
            oneDNN on a CPU (``folding.py``, ``fused_tokens.py``; 3 x 3 convolutions in float32 by ``winograd.py``), by cuDNN on
            an NVIDIA GPU (ReLU after convolutions only).
        precision_class: ``reference`` if its features pass for the float32 network's own, else the precision's name.
        reason: why, in words, with the figures.
        tried: per precision and form: ``Agreement.to_json`` with plain float32.
    """

    precision: str
    form: str
    precision_class: str
    reason: str
    tried: dict[str, dict[str, float | None]]

    @property
    def advice(self) -> str:
        """What a faster precision would change, where it was not taken, or changes, where it was asked for; else empty.

        One line, for whoever can choose the precision.
        """
        found = {
            name: [math.nan if value is None else value for value in figures.values()]
            for name, figures in self.tried.items()
        }
        lower = [
            (Agreement(*figures), name.split()[0]) for name, figures in found.items() if not name.startswith("fp32")
        ]
        nearest, name = min(lower, key=lambda pair: pair[0].error, default=(None, ""))
        if nearest is None or not nearest.shortfall:
            return ""
        if self.precision == "fp32":
            return f"precision float32: {name} would change {nearest.shortfall}; -v shows more"
        return (
            "" if self.precision_class == "reference" else f"precision {name} as asked: it changes {nearest.shortfall}"
        )


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, laid out so if it has four dimensions: ``Module.to(memory_format=...)`` refuses networks with some of five."""
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


class Encoder:
    """A frozen backbone on its device. Calls are safe from several threads.

    Attributes:
        exact: the plain network in float32, for what overflows here; None if this one computes in float32 itself.
    """

    exact: "Encoder | None" = None

    def __init__(self, module: nn.Module, preprocess: PreprocessSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.preprocess = preprocess
        self.device = device
        self._dtype = dtype
        if device.type == "cuda":
            module = with_own_depthwise(module)
        self._module = out_of_cycles(module).to(device=device, dtype=dtype)._apply(channels_last)  # type: ignore[no-untyped-call]
        self._constants = channel_constants(preprocess, device)
        self._gpu = threading.Lock()  # a GPU takes one batch at a time; a CPU as many as there are workers
        self._lane: Lane | None = None  # the latest
        self._most: int | None = None  # images that fit into the GPU's memory, if more did not
        self._making = threading.Lock()

    def new_buffer(self, batch_size: int) -> npt.NDArray[np.uint8]:
        """Zeroed pixels (batch_size, H, W, 3)."""
        return torch.zeros((batch_size, *self.preprocess.crop, 3), dtype=torch.uint8).numpy()

    def lane(self, batch_size: int) -> Lane | None:
        """What takes batches of so many images, or fewer where these exceed the GPU's memory, said once; None on a CPU, whose
        workers compute themselves. Raises UsageError: not even one image fits.
        """
        if self.device.type == "cpu":
            return None
        with self._making:
            wanted = min(batch_size, self._most or batch_size)
            if self._lane is None or self._lane.batch_size != wanted:
                self._lane = None  # its graph holds memory
                self._lane = fitting_lane(self.new_lane, wanted, self.device)
                if self._lane.batch_size < wanted:
                    self._most = self._lane.batch_size
            return self._lane

    def new_lane(self, batch_size: int) -> Lane:
        """A lane of its own, on any device, whether its batches fit or not."""
        kind = CudaLane if self.device.type == "cuda" else PlainLane
        return kind(self._forward(), self.device, (batch_size, *self.preprocess.crop, 3))

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed a few images: uint8 (N, H, W, 3) -> float32 (N, D). A GPU is fed by a ``lane`` when there are many.

        Raises:
            UsageError: the batch does not fit into the GPU's memory.
        """
        lock = self._gpu if self.device.type == "cuda" else launching(self.device)
        try:
            with memory_errors(), lock:
                return self._forward()(torch.from_numpy(pixels).to(self.device)).float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"a batch of {len(pixels)} does not fit into {self.device}'s memory; halve --batch-size"
            ) from error

    def fuse(self, batch_size: int) -> bool:
        """Let convolutions and linear layers do what follows them, for batches of this size; whether that is possible here."""
        of_two = (2, *self.preprocess.crop, 3)  # of one, a residual might be everyone's
        pixels = torch.zeros(of_two, dtype=torch.uint8, device=self.device)
        try:
            with torch.inference_mode(), _precise(self._dtype):
                inputs = normalise(pixels, *self._constants).to(self._dtype)
                if self.device.type == "cuda":
                    self._module = fuse_relus(self._module, inputs)
                else:
                    fused = fuse_tokens(self._module, inputs, batch_size=batch_size)
                    self._module = fuse_convolutions(fused, inputs, batch_size=batch_size)
        except Exception:  # operators that another PyTorch or CPU lacks: as many errors as there are builds
            return False
        return True

    def _forward(self) -> Forward:
        """Without this encoder, which holds the lane that holds it."""
        return functools.partial(_infer, self._module, self._constants, self._dtype)


def _infer(
    module: nn.Module, constants: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, pixels: torch.Tensor
) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> (N, D) in the network's type, on its device, from any thread."""
    with torch.inference_mode(), _precise(dtype):
        return module(normalise(pixels, *constants).to(dtype))  # type: ignore[no-any-return]


def _precise(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    return true_float32 if dtype == torch.float32 else contextlib.nullcontext()


@sources_forgotten()
def build_encoder(
    backbone: Backbone, runtime: Runtime, sample: npt.NDArray[np.uint8], *, precision: Precision = "auto"
) -> tuple[Encoder, PrecisionChoice]:
    """Make ``backbone`` fast on ``runtime.device`` and prove on ``sample`` that it stayed itself.

    Args:
        backbone: frozen, on the CPU; left unchanged. precision: as in ``Embedder.prepare``.
        sample: uint8 (N, H, W, 3), a few of the images to embed.

    Raises:
        UsageError: unknown precision, or a sample that does not fit into memory. BackboneError: weights that are not finite.
    """
    if precision not in ("auto", *_TYPES):
        raise UsageError(f"unknown precision {precision!r}; choose auto, {', '.join(_TYPES)}")
    plain = Encoder(copy.deepcopy(backbone.module), backbone.preprocess, runtime.device, torch.float32)
    reference = _try_input(plain, backbone, sample, runtime)
    names = _candidates(runtime.device, len(sample)) if precision == "auto" else [precision]
    tried: dict[str, Agreement] = {}
    nearest, nearest_form, least = plain, "plain", (True, math.inf)
    for encoder, name, form in _encoders(backbone, runtime, names):
        # In order of known speed, not by a stopwatch: a resumed run must choose what the first one chose.
        features = _features_or_nan(encoder, sample, backbone.dim, runtime)
        found = tried[f"{name} {form}"] = agreement(reference, features)
        encoder.exact = None if name == "fp32" else plain
        if only_rounded(reference, features) if name == "fp32" else found.passes:
            return encoder, _choice(
                name, form, "reference", _reason(name, precision, runtime, len(sample), tried), tried
            )
        if nearest is plain or _clearly_less(_distance(found), least):
            nearest, nearest_form, least = encoder, form, _distance(found)
    figures = _figures(tried)
    if "fp32" in names:  # folding did harm (a batch norm with tiny variance, say): do without
        return plain, _choice("fp32", "plain", "reference", f"fp32 plain: {figures} did not pass", tried)
    return nearest, _choice(
        precision, nearest_form, precision, f"{precision} as asked: {figures}, below the bar", tried
    )


def _distance(found: Agreement) -> tuple[bool, float]:
    """The less, the nearer."""
    return math.isnan(found.mean_cosine), math.inf if math.isnan(found.error) else found.error


def _clearly_less(found: tuple[bool, float], least: tuple[bool, float]) -> bool:
    """Whether a form tried later is worth its time: forms of one precision differ by how they round, a few per cent."""
    return found < (least[0], 0.9 * least[1])


def _choice(precision: str, form: str, group: str, reason: str, tried: dict[str, Agreement]) -> PrecisionChoice:
    return PrecisionChoice(precision, form, group, reason, {name: found.to_json() for name, found in tried.items()})


def _encoders(backbone: Backbone, runtime: Runtime, precisions: Sequence[str]) -> Iterator[tuple[Encoder, str, str]]:
    """(encoder, precision, form), fastest first."""
    folded = fold_batchnorm(backbone.module, backbone.preprocess.crop)
    form = "folded" if isinstance(folded, fx.GraphModule) else "plain"
    for name in precisions:
        if form == "folded" and runtime.device.type != "mps" and may_fuse():
            encoder = Encoder(copy.deepcopy(folded), backbone.preprocess, runtime.device, _TYPES[name])
            with one_core_each(1, "featcache-check") as core:
                fused = core.submit(encoder.fuse, runtime.batch_size).result()
            if fused:
                yield encoder, name, "fused"
        yield Encoder(copy.deepcopy(folded), backbone.preprocess, runtime.device, _TYPES[name]), name, form


def embed_sample(encoder: Encoder, sample: npt.NDArray[np.uint8], runtime: Runtime) -> npt.NDArray[np.float32]:
    """(N, D) of a few images, as ``embed`` does it: in such batches, on a CPU each on one core. All cores at a batch wait for each other,
    which takes seconds where other programs run."""
    pieces = [sample[start : start + runtime.batch_size] for start in range(0, len(sample), runtime.batch_size)]
    if runtime.device.type != "cpu":
        return np.concatenate([encoder(piece) for piece in pieces])
    with one_core_each(runtime.workers, "featcache-check") as cores:
        return np.concatenate(list(cores.map(encoder, pieces)))


def _features_or_nan(
    encoder: Encoder, sample: npt.NDArray[np.uint8], dim: int, runtime: Runtime
) -> npt.NDArray[np.float32]:
    """(N, D) embeddings; NaN if this form of the network fails where the plain one does not, so that it cannot pass."""
    try:
        return embed_sample(encoder, sample, runtime)
    except (UsageError, torch.AcceleratorError):  # memory; a GPU that failed, after which nothing works
        raise
    except Exception:
        return np.full((len(sample), dim), np.nan, np.float32)


def _try_input(
    encoder: Encoder, backbone: Backbone, sample: npt.NDArray[np.uint8], runtime: Runtime
) -> npt.NDArray[np.float32]:
    """The first forward pass: some networks take one input size only."""
    try:
        features = embed_sample(encoder, sample, runtime)
    except torch.AcceleratorError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = backbone.preprocess.crop
        raise UsageError(
            f"{backbone.name} does not take inputs of {height}x{width} pixels ({error}); leave --crop out"
        ) from error
    if features.shape != (len(sample), backbone.dim):
        raise BackboneError(f"{backbone.name} gives {features.shape[1:]} values per image, expected ({backbone.dim},)")
    if not np.isfinite(features).all():  # only then are the weights looked at: an image may do that, too
        tensors = backbone.module.state_dict().items()
        if wrong := [name for name, tensor in tensors if not tensor.isfinite().all()]:
            raise BackboneError(
                f"{backbone.name} (weights {backbone.weights}) has {quantity(len(wrong), 'tensor')} with values that are not finite, "
                f"{wrong[0]} first: nothing can be embedded with them; give weights that are whole"
            )
    return features


def candidates(device: torch.device) -> list[str]:
    """Precisions that ``auto`` tries on ``device``, fastest first."""
    if device.type == "cuda":
        return ["fp16", "bf16", "fp32"]
    if device.type == "mps":
        return ["fp16", "bf16", "fp32"]  # bf16 from macOS 14 on; a precision that fails cannot pass
    return ["bf16", "fp32"] if has_bf16_arithmetic() else ["fp32"]


def _candidates(device: torch.device, images: int) -> list[str]:
    """The same for a sample of so many images: a single one proves nothing, so nothing else is tried."""
    return candidates(device)[-1 if images == 1 else 0 :]


def _reason(best: str, asked: str, runtime: Runtime, images: int, tried: dict[str, Agreement]) -> str:
    if asked != "auto":
        return f"{best} as asked ({_figures(tried)})"
    if len(candidates(runtime.device)) == 1:
        return f"{best}: this {runtime.device.type} has nothing faster (self-check {_figures(tried)})"
    if images == 1:
        return f"{best}: a single image proves nothing faster (self-check {_figures(tried)})"
    return f"{best}: the fastest that passes the self-check ({_figures(tried)})"


def _figures(tried: dict[str, Agreement]) -> str:
    return "; ".join(f"{name} {found}" for name, found in tried.items())
