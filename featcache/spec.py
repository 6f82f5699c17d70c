"""The spec: everything that changes the numbers, as one canonical, hashed JSON object.

Two embeddings may be mixed exactly when their specs are equal. A spec read from a file is checked before it is used. Nothing that
changes the numbers is decided anywhere else.
"""

import dataclasses
import hashlib
import json
import re
from typing import Any, Literal, cast, get_args

from featcache.errors import UsageError

STORAGE_TYPES = ("float16", "float32")
PRECISION_CLASSES = ("reference", "bf16", "fp16")
SPLITS = ("none", "train", "val", "test")  # position = the number stored
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
DECODING = ("full scale", "reduced scale", "gpu")
POOLS = ("auto", "own", "cls", "mean", "cls+mean")  # as asked for
OWN_POOLING = "the network's own"  # up to the input of its classifier
_POOLINGS = (OWN_POOLING, "cls", "mean", "cls+mean")
_MAX_LAYERS = 256
_MAX_STATED = 500  # characters
MAX_EDGE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """Everything between a file's bytes and the backbone's input. Raises UsageError for what makes no sense.

    Attributes:
        resize: pixels of the shorter edge (aspect ratio kept), or ``(height, width)`` (aspect ratio not kept).
        crop: ``(height, width)`` of the centre crop; also the size of the backbone's input.
        interpolation: resampling filter of the resize.
        mean, std: per-channel normalisation of values in 0..1.
        decode: ``full scale``, or ``reduced scale``: JPEGs much larger than ``resize`` are decoded at 1/2, 1/4 or 1/8 of
            their size, several times as fast, to somewhat other pixels (``images.decode.reduction``); or ``gpu``: a CUDA GPU
            decodes and resizes usual JPEGs, the CPU all else at full scale, as their content decides (``images.gpu_jpeg``).
        orientation, alpha, deep, frame, profile: how unusual files become 8-bit RGB (``images.decode.decode``).
            They are stored so that a change can never pass unnoticed; all have one value today but ``deep``: ``white_level``.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool = True
    orientation: str = "exif applied"
    alpha: str = "composited on white"
    deep: str = "16 bit scaled to 8"
    frame: str = "first"
    profile: str = "ignored"
    decode: str = "full scale"

    def __post_init__(self) -> None:
        edges = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if not all(type(edge) is int for edge in (*edges, *self.crop)) or len(edges) != 2 or len(self.crop) != 2:
            raise UsageError(f"resize {self.resize} and crop {self.crop} must be whole pixels, height and width")
        if min(*edges, *self.crop) < 1 or max(*edges, *self.crop) > MAX_EDGE:
            raise UsageError(f"resize {self.resize} and crop {self.crop} must lie between 1 and {MAX_EDGE} pixels")
        if edges[0] < self.crop[0] or edges[1] < self.crop[1]:
            raise UsageError(
                f"resize {self.resize} is smaller than crop {self.crop}; make the resize at least as large"
            )
        if self.interpolation not in get_args(Interpolation):
            raise UsageError(
                f"unknown interpolation {self.interpolation!r}; choose one of {', '.join(get_args(Interpolation))}"
            )
        numbers = all(isinstance(value, int | float) and abs(value) < 1e6 for value in (*self.mean, *self.std))
        if not numbers or len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise UsageError(f"mean and std must be three numbers, std positive; found {self.mean} and {self.std}")
        if self.decode not in DECODING:
            raise UsageError(f"unknown decoding {self.decode!r}; choose one of {', '.join(DECODING)}")
        if self.decode == "gpu" and self.interpolation not in ("bilinear", "bicubic"):
            raise UsageError(f"a GPU resizes bilinear or bicubic, not {self.interpolation}; leave --decode gpu out")
        for field in dataclasses.fields(self):
            value, only = getattr(self, field.name), field.default
            chosen = field.name == "decode" or (field.name == "deep" and self.white_level)
            if not chosen and only is not dataclasses.MISSING and value != only:
                raise UsageError(f"{field.name} {value!r} is not known, only {only!r} is")

    @property
    def decode_at_least(self) -> int | None:
        """Pixels of the shorter edge that decoding must leave; None: all of them."""
        if self.decode != "reduced scale":
            return None
        return self.resize if isinstance(self.resize, int) else max(self.resize)

    @staticmethod
    def deep_with(white_level: int) -> str:
        """``deep`` for a white level, 1 to 65535."""
        return PreprocessSpec.deep + (f", white at {white_level}" if white_level < 65535 else "")

    @property
    def white_level(self) -> int | None:
        """The sample of a 16-bit image that is white, where its data has fewer bits; None: 65535."""
        level = str(self.deep).removeprefix(f"{PreprocessSpec.deep}, white at ")
        return int(level) if re.fullmatch("[1-9][0-9]{0,4}", level) and int(level) < 65535 else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_json`` gives back an equal spec."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PreprocessSpec":
        """Rebuild a spec. Raises UsageError for unknown, missing or impossible fields."""
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise UsageError(f"not a preprocessing spec of this version: {error}") from error

    def sizes_in_words(self) -> str:
        """What of an image the backbone sees, in pixels, height first."""
        whole, middle = self.resize, f"middle {self.crop[0]} x {self.crop[1]}"
        if isinstance(whole, int):
            return f"shorter side {whole}, {middle}"
        squeezed = f"{whole[0]} x {whole[1]}, aspect ratio not kept"
        return squeezed if whole == self.crop else f"{squeezed}, {middle}"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) an image is resized to before the crop; torchvision's rounding."""
        if not isinstance(self.resize, int):
            return self.resize
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize


@dataclasses.dataclass(frozen=True)
class Taken:
    """What is taken of a network, as asked for. Raises UsageError.

    Attributes:
        size: (height, width) of its input; None: the weights' own, or the authors'. pool: one of ``POOLS``; None: ``auto``.
        layers: how many of the last ones; None: 1.
    """

    size: tuple[int, int] | None = None
    pool: str | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.pool not in (None, *POOLS):
            raise UsageError(f"unknown pool {self.pool!r}; choose one of {', '.join(POOLS)}")
        if self.layers is not None and not 1 <= self.layers <= _MAX_LAYERS:
            raise UsageError(f"layers must lie between 1 and {_MAX_LAYERS}, found {self.layers}")

    def of(self, spec: "Spec") -> "Taken":
        """The same, where nothing is asked for as ``spec`` has it."""
        own = "own" if spec.pooling == OWN_POOLING else spec.pooling
        return Taken(self.size or spec.preprocess.crop, self.pool or own, self.layers or spec.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """All that changes the numbers of an embedding. Raises UsageError for a value that this version does not know.

    Attributes:
        backbone: its name. weights_sha256: over its tensors. layer: whose input the embeddings are, in the network's own words.
        preprocess: from a file's bytes to the backbone's input.
        precision: ``reference`` if the features pass for the float32 network's own, else the precision's name.
        storage: ``float16`` or ``float32``.
        pooling: ``the network's own``, or how a layer's tokens became one vector: ``cls``, ``mean`` (of patches), ``cls+mean``.
        layers: how many of the last layers lie side by side, normalised. Not in the JSON where it is 1.
        views: one value today; stored so that a later change can never pass unnoticed.
        stated: None; of vectors that were made elsewhere, what whoever imported them says of their origin. Nobody knows more:
            there is no layer, no sha256 and no ``preprocess`` (None) then, and ``backbone`` repeats it. See ``external``.
    """

    backbone: str
    weights_sha256: str
    layer: str
    preprocess: PreprocessSpec
    precision: str
    storage: str
    pooling: str = OWN_POOLING
    layers: int = 1
    views: int = 1
    stated: str | None = None

    @classmethod
    def external(cls, stated: str, storage: str) -> "Spec":
        """Of vectors made elsewhere: equal where the statements are. Raises UsageError: not 1 to 500 printable characters."""
        unknown: dict[str, Any] = {
            "weights_sha256": "",
            "layer": "",
            "precision": "",
            "pooling": "",
            "preprocess": None,
        }
        return cls(backbone=f"external: {stated}", stated=stated, storage=storage, **unknown)

    def __post_init__(self) -> None:
        if self.stated is not None:
            text = cast("object", self.stated)
            if not isinstance(text, str) or not text.strip().isprintable() or not 0 < len(text.strip()) <= _MAX_STATED:
                raise UsageError(
                    f"what is stated of the vectors must be one line of at most {_MAX_STATED} characters, such as "
                    f"'CLIP ViT-L/14 of open_clip, laion2b'; found {str(text)[:60]!r}"
                )
            if self.storage not in STORAGE_TYPES:
                raise UsageError(f"the spec's storage is {self.storage!r}, expected {' or '.join(STORAGE_TYPES)}")
            return
        if not re.fullmatch("[0-9a-f]{64}", self.weights_sha256):  # it becomes part of a file's name
            raise UsageError("the spec's weights_sha256 is no sha256")
        known = {"precision": PRECISION_CLASSES, "storage": STORAGE_TYPES, "pooling": _POOLINGS, "views": (1,)}
        for name, allowed in known.items():
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(
                    f"the spec asks for what this version does not do: {name} is {value!r}, expected {' or '.join(map(str, allowed))}"
                )
        if type(self.layers) is not int or not 1 <= self.layers <= _MAX_LAYERS:
            raise UsageError(f"the spec's layers are {self.layers!r}, expected a number from 1 to {_MAX_LAYERS}")

    @property
    def _origin(self) -> str:
        return f"embedded by {self.backbone}" if self.stated is None else f"made elsewhere, stated: {self.stated}"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        return fingerprint_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as caches and models store them; ``from_json`` gives back an equal spec."""
        if self.stated is not None:  # without a backbone: versions that do not know of this refuse it with that reason
            return {"external": {"stated": self.stated}, "storage": self.storage, "views": self.views}
        return {
            "backbone": {
                "name": self.backbone,
                "weights_sha256": self.weights_sha256,
                "layer": f"input of {self.layer}",
                "pooling": self.pooling,
                **({"layers": self.layers} if self.layers != 1 else {}),
            },
            "preprocess": self.preprocess.to_json(),
            "precision": self.precision,
            "storage": self.storage,
            "views": self.views,
        }

    @classmethod
    def from_json(cls, values: Any) -> "Spec":
        """Rebuild a spec that nobody vouches for. Raises UsageError for missing or wrong fields, or of other versions."""
        if isinstance(values, dict) and isinstance(external := values.get("external"), dict):
            spec = cls.external(external.get("stated", ""), str(values.get("storage")))
            return _unchanged(spec, values)
        if not isinstance(values, dict) or not isinstance(backbone := values.get("backbone"), dict):
            raise UsageError("the spec is not a JSON object with a backbone")
        try:
            spec = cls(
                backbone=str(backbone["name"]),
                weights_sha256=str(backbone["weights_sha256"]),
                layer=str(backbone["layer"]).removeprefix("input of "),
                preprocess=PreprocessSpec.from_json(values["preprocess"]),
                precision=str(values["precision"]),
                storage=str(values["storage"]),
                pooling=str(backbone["pooling"]),
                layers=backbone.get("layers", 1),
            )
        except KeyError as error:
            raise UsageError(f"the spec lacks {error}") from error
        return _unchanged(spec, values)

    def difference(self, wanted: "Spec") -> str:
        """Field by field: ``preprocess.interpolation: bicubic -> bilinear; storage: float16 -> float32``."""
        if (self.stated is None) != (wanted.stated is None):
            return f"{self._origin} -> {wanted._origin}"
        return "; ".join(difference(self.to_json(), wanted.to_json()))


def _unchanged(spec: Spec, values: dict[str, Any]) -> Spec:
    """``spec``, if it says all that ``values`` do. Raises UsageError."""
    if different := difference(values, spec.to_json()):
        raise UsageError(f"the spec asks for what this version does not do: {'; '.join(different)}")
    return spec


def canonical_json(value: dict[str, Any]) -> str:
    """One text for one value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_of(value: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def difference(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two nested objects differ, a line per field: ``preprocess.interpolation: bicubic -> bilinear``."""
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {_shown(a)} -> {_shown(b)}")
    return lines


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
