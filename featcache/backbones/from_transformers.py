"""Vision models of transformers as backbones: ``transformers/OWNER/NAME``. The one door to transformers.

From a repository of the hub come ``config.json``, the image processor's configuration and ``.safetensors`` files: data, which
transformers' own classes are built from. Code of a repository is never fetched (``trust_remote_code``), pickled weights neither.
Of models of images and texts the image tower is taken, before its projection. What can be taken out of a network is found by
comparing its outputs on one input, not by its family's name.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones.backbone import (
    CONFIG,
    Backbone,
    Table,
    check_multiple,
    for_size,
    freeze,
    read_weights,
    with_input_size,
    with_pooling,
)
from featcache.backbones.hub import fetch, is_repository
from featcache.backbones.image_processor import preprocessing_of
from featcache.backbones.pooling import Taps, Tokens, of_map, set_forward
from featcache.errors import BackboneError, MissingDependencyError, UsageError
from featcache.spec import Taken
from featcache.system.safe_load import parse_json

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_LAYER = "the classifier"
_NORMS = ("layernorm", "post_layernorm", "norm", "layer_norm", "rms_norm")  # of the last block, as its families call it
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
# What a configuration can ask for that is no part of the network: code of other repositories, formats of other libraries.
_LEFT_OUT = (
    "auto_map",
    "fusion_config",
    "distributed_config",
    "attn_implementation",
    "experts_implementation",
    "dtype",
)


def names() -> list[str]:
    """None: the hub's repositories cannot be listed."""
    return []


def is_name(name: str) -> bool:
    """True: whether there is such a repository, the hub says."""
    return True


def weights_names(name: str) -> list[str]:
    """None: the weights of a model are part of its name."""
    return []


def build(
    name: str, n_classes: int, size: tuple[int, int], *, pooling: str, config: str
) -> tuple[nn.Module, list[str]]:
    """``load.build_network``: the network without a classifier, of whatever size; ``config`` as in ``Backbone``."""
    model = _build(name, parse_json(config)["model"])
    lines = [
        "config = json.loads(facts['config'])['model']",
        "network = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))",
        *(["network.pooler = None"] if getattr(model, "pooler", model) is None else []),
    ]
    return model, lines


def load(name: str, weights: str | Path, *, taken: Taken) -> Backbone:
    """``load.load_backbone`` for a vision model of transformers'."""
    _transformers()
    if not is_repository(name.removeprefix("transformers/")):
        raise BackboneError(
            f"{name} is no name of the hub, expected transformers/OWNER/NAME; a folder on this machine is none: give the name of "
            "what its weights are of, and --weights FOLDER/model.safetensors"
        )
    file = None if weights in ("auto", "none") else Path(weights)
    source = f"file {file.name}" if file else {"auto": "the hub", "none": "random, seed 0"}[str(weights)]
    tables = read_weights(file, []) if file else []
    record = _record_of(name, file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build(name, record["model"])
    if weights == "auto":
        tables = _download(name)
    if tables:
        model = _with_weights(name, model, tables, source)
    with _quiet():
        spec = preprocessing_of(name, _processor_of(name, record))
    outputs, taps, dim = _prepare(name, model.eval(), spec.crop)
    backbone = freeze(name, model, dim, _LAYER, spec, source, "auto" if weights == "auto" else None)
    backbone = dataclasses.replace(backbone, config=json.dumps(record, sort_keys=True), lines=outputs.lines())
    backbone = with_input_size(backbone, for_size(spec, taken.size), functools.partial(_check_size, name))
    return with_pooling(backbone, taps, taken)


# ------------------------------------------------------------------------------- what a repository says, and holds


def _record_of(name: str, file: Path | None) -> dict[str, Any]:
    """Configuration of the model and of its image processor: from the weights' file, beside it, or from the hub."""
    if file and file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
        if CONFIG in facts:
            return _parsed(facts[CONFIG], str(file), ("model", "processor"))
    repository, folder = name.removeprefix("transformers/"), file.parent if file else None
    if folder is None or not (folder / "config.json").is_file():
        folder = None

    def find(entry: str) -> dict[str, Any] | None:
        path = folder / entry if folder else fetch(repository, entry, name=name)
        return _parsed(path.read_text(), f"{entry} of {folder or name}", ()) if path and path.is_file() else None

    model = find("config.json")
    if model is None:
        raise BackboneError(
            f"{name} has no config.json: it is no model of transformers'; for timm's there is timm/NAME"
        )
    processor = find(_PROCESSORS[0]) or (find(_PROCESSORS[1]) or {}).get("image_processor")
    if not processor:
        raise BackboneError(
            f"{name} does not say how its images are prepared ({_PROCESSORS[0]} is missing); choose another"
        )
    return {"model": model, "processor": processor}


def _parsed(text: str, source: str, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = parse_json(text)
        if all(isinstance(found[key], dict) for key in keys):
            return found
        raise ValueError(f"{' and '.join(keys)} are no objects")
    except (ValueError, KeyError) as error:
        raise BackboneError(f"the configuration in {source} cannot be used: {error}") from error


def _download(name: str) -> list[Table]:
    """The tensors of a repository, of ``.safetensors`` files only. Raises DownloadError, BackboneError."""
    repository = name.removeprefix("transformers/")
    whole = fetch(repository, "model.safetensors", name=name)
    if whole:
        return read_weights(whole, [])
    index = fetch(repository, "model.safetensors.index.json", name=name)
    if index is None:
        raise BackboneError(
            f"{name} has no .safetensors file, and pickled weights of the hub are not loaded; give --weights FILE, or choose another"
        )
    files = set(_parsed(index.read_text(), index.name, ("weight_map",))["weight_map"].values())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(map(str, files)):
        part = fetch(repository, file, name=name) if re.fullmatch(r"[\w.-]+\.safetensors", file) else None
        if part is None:
            raise BackboneError(f"{name} has no file {file!r}, which its index names")
        tensors |= read_weights(part, [])[0].tensors
    return [Table(tensors, "")]


def _config_of(name: str, values: dict[str, Any]) -> Any:
    """The configuration of the image tower, as transformers' own class. Raises BackboneError."""
    transformers, kind = _transformers(), str(values.get("model_type"))
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if kind not in known:
        remedy = "which is never run" if values.get("auto_map") else "upgrade transformers, or choose another"
        needs = (
            "needs code of its repository" if values.get("auto_map") else "is of a kind this transformers does not know"
        )
        raise BackboneError(f"{name} {needs} (model_type {kind[:60]!r}), {remedy}")
    if kind in ("timm_wrapper", "timm_backbone"):
        raise BackboneError(f"{name} is a model of timm's; name it timm/NAME")
    if "quantization_config" in values:
        raise BackboneError(f"{name} is quantised; choose the repository of its full weights")
    plain = {k: v for k, v in values.items() if k not in _LEFT_OUT and not k.startswith("_")}
    try:
        config = known[kind].from_dict(plain)
    except Exception as error:  # of values that its class does not take
        raise BackboneError(f"the configuration of {name} cannot be used: {_words(error)}") from error
    return getattr(config, "vision_config", None) or config


def _class_of(name: str, config: Any) -> Any:
    """The class of networks that ``config`` is of. Raises BackboneError: it takes no images."""
    found = _transformers().MODEL_MAPPING.get(type(config), None)
    if not isinstance(found, type) or getattr(found, "main_input_name", "") != "pixel_values":
        raise BackboneError(f"{name} takes no images (model_type {config.model_type!r}); choose a vision model")
    return found


def _build(name: str, values: dict[str, Any]) -> Any:
    """The network with random weights, without a pooler that no classifier of its family looks at. Raises BackboneError."""
    config = _config_of(name, values)
    kind = _class_of(name, config)
    try:
        with _quiet():
            return _without_dense(kind._from_config(config, dtype=torch.float32))
    except Exception as error:  # of sizes that do not fit
        raise BackboneError(f"transformers cannot build {name}: {_words(error)}") from error


def _without_dense(model: Any) -> Any:
    """BERT's pooler, a dense layer with tanh, is random in most repositories: classifiers look at the class token."""
    if hasattr(getattr(model, "pooler", None), "dense"):
        model.pooler = None
    return model


def _with_weights(name: str, model: Any, tables: list[Table], source: str) -> Any:
    """The network with the tensors that transformers itself finds for it, whatever its earlier versions called them."""
    load_by_name = type(model).from_pretrained
    reasons = []
    for table in tables:
        try:
            with _quiet():
                loaded, info = load_by_name(
                    None,
                    config=model.config,
                    state_dict=dict(table.tensors),
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        except Exception as error:  # of shapes
            reasons.append(_words(error))
            continue
        loaded = _without_dense(loaded)
        missing = [key for key in loaded.state_dict() if key in set(info["missing_keys"])]
        if missing and all(key.startswith("pooler.") for key in missing):
            loaded.pooler, missing = None, []
        if not missing:
            return loaded
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        reasons.append(f"missing {shown}")
    raise BackboneError(f"the weights ({source}) do not fit {name}: {reasons[0]}")


# ------------------------------------------------------------------------------------------- what comes out of it


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """How one network is called, and what of its output is taken.

    Attributes:
        plain: its class as transformers has it. resamples: whether it takes other sizes only when told so.
        pooled: whether it has a pooler. has_cls: whether the first token is a class token. maps: of which output, if it gives maps.
        norm: name of what follows the last block; empty: nothing. prefix: how many tokens come before the patches'; -1: unknown.
    """

    plain: Any
    resamples: bool
    pooled: bool = False
    has_cls: bool = False
    maps: str = ""
    norm: str = ""
    prefix: int = 0

    def call(self, network: Any, pixels: torch.Tensor, **options: Any) -> Any:
        if self.resamples:  # at its own size this changes nothing
            options["interpolate_pos_encoding"] = True
        return self.plain.forward(network, pixel_values=pixels, **options)

    def vector(self, found: Any) -> torch.Tensor:
        """(N, D): what the pooler gives; without one the class token, else the mean of tokens or of the map."""
        if self.pooled:
            return torch.as_tensor(found.pooler_output).flatten(1)
        last: torch.Tensor = found.last_hidden_state
        if last.ndim == 4:
            return last.mean(dim=(2, 3))
        return last[:, 0] if self.has_cls else last.mean(dim=1)

    def tokens(self, network: Any, state: torch.Tensor) -> Tokens:
        x = getattr(network, self.norm)(state) if self.norm else state
        return Tokens(x[:, self.prefix :], x[:, 0] if self.has_cls else None)

    def read_tokens(self, network: Any, pixels: torch.Tensor, layers: int) -> list[Tokens]:
        states = self.call(network, pixels, output_hidden_states=True).hidden_states
        return [self.tokens(network, x) for x in states[-layers:]]

    def read_maps(self, network: Any, pixels: torch.Tensor, layers: int) -> list[Tokens]:
        """The mean of each stage's map; of the last one the network's own embedding."""
        found = self.call(network, pixels, output_hidden_states=True)
        return [*map(of_map, found[self.maps][-layers:-1]), Tokens(self.vector(found)[:, None])]

    def lines(self) -> tuple[str, ...]:
        """Python lines from ``network`` and ``pixels`` to ``embeddings``, as ``vector`` has them."""
        call = f"output = network(pixel_values=pixels{', interpolate_pos_encoding=True' if self.resamples else ''})"
        taken = "last_hidden_state[:, 0]" if self.has_cls else "last_hidden_state.mean(dim=1)"
        if self.pooled:
            taken = "pooler_output.flatten(1)"
        elif self.maps == "hidden_states":
            taken = "last_hidden_state.mean(dim=(2, 3))"
        return call, f"embeddings = output.{taken}"

    def lines_of_layers(self, layers: int) -> list[str]:
        """``Taps.lines``."""
        call, own = self.lines()
        call = f"{call[:-1]}, output_hidden_states=True)"
        if self.maps:
            means = f"(x.mean(dim=(2, 3)) for x in output.{self.maps}[{-layers}:-1])"
            return [
                call,
                own,
                f"parts = [torch.nn.functional.layer_norm(x, x.shape[1:]) for x in {means}]",
                "parts.append(embeddings)",
            ]
        normed = f"network.{self.norm}(x)" if self.norm else "x"
        return [
            call,
            f"found = [{normed} for x in output.hidden_states[{-layers}:]]",
            f"found = [(x[:, {self.prefix}:], {'x[:, 0]' if self.has_cls else None}) for x in found]",
        ]


def _prepare(name: str, model: Any, size: tuple[int, int]) -> tuple[_Outputs, Taps, int]:
    """Let the network's forward pass give vectors, in place; and what can be taken out of it, seen on one input."""
    plain = type(model)
    resamples = "interpolate_pos_encoding" in inspect.signature(plain.forward).parameters
    outputs = _Outputs(plain, resamples)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode(), _quiet():
            found, again = (outputs.call(model, pixels, output_hidden_states=True) for _ in range(2))
            prefix, pooled = _prefix_of(model, found, size), found.get("pooler_output") is not None
            named = any(key.rpartition(".")[2] in _CLASS_TOKENS for key, _ in model.named_parameters())
            has_cls = named and prefix != 0  # a pooler may have one of its own
            outputs = dataclasses.replace(outputs, pooled=pooled, has_cls=has_cls, prefix=prefix)
            same = torch.equal(outputs.vector(found), outputs.vector(again))
            outputs, taps = _taps(model, outputs, found)
            dim = int(outputs.vector(found).shape[1])
    except Exception as error:  # of inputs that it lacks, or sizes that it does not take
        raise BackboneError(f"{name} gives no embedding of an image alone: {_words(error)}") from error
    if not same:
        raise BackboneError(f"{name} gives one image two embeddings (it draws at random); choose another")
    set_forward(model, lambda network, pixels: outputs.vector(outputs.call(network, pixels)))
    return outputs, taps, dim


def _taps(model: Any, outputs: _Outputs, found: Any) -> tuple[_Outputs, Taps]:
    states: Any = found.hidden_states or ()
    for maps in ("reshaped_hidden_states", "hidden_states"):
        stages = found.get(maps) or ()
        if stages and all(x.ndim == 4 for x in stages):
            outputs = dataclasses.replace(outputs, maps=maps)
            return outputs, Taps("maps", depth=len(stages) - 1, read=outputs.read_maps, lines=outputs.lines_of_layers)
    norm = _norm_of(model, found)
    if norm is None or outputs.prefix < outputs.has_cls:
        return outputs, Taps("attention")
    outputs = dataclasses.replace(outputs, norm=norm)
    tokens = outputs.tokens(model, states[-1])
    ways = {"cls": tokens.cls, "mean": tokens.patches.mean(dim=1)}
    own = [how for how, x in ways.items() if x is not None and _close(x, outputs.vector(found))]
    return outputs, Taps(
        own[0] if own else "attention",
        has_cls=outputs.has_cls,
        has_tokens=True,
        depth=len(states) - 1,
        read=outputs.read_tokens,
        lines=outputs.lines_of_layers,
    )


def _norm_of(model: Any, found: Any) -> str | None:
    """Name of the norm behind the last block, empty if there is none; None: blocks that differ in shape, or something else."""
    last, shown = found.hidden_states[-1] if found.hidden_states else None, found.last_hidden_state
    if last is None or {tuple(x.shape) for x in found.hidden_states} != {tuple(shown.shape)}:
        return None
    for norm in _NORMS:
        if not isinstance(getattr(model, norm, nn.Identity()), nn.Identity):
            bare = torch.equal(shown, last)  # some normalise in the pooler only
            return norm if bare or _close(getattr(model, norm)(last), shown) else None
    return "" if torch.equal(shown, last) else None


def _prefix_of(model: Any, found: Any, size: tuple[int, int]) -> int:
    """How many tokens come before those of patches; -1 if that cannot be known."""
    patch = getattr(model.config, "patch_size", None)
    if not isinstance(patch, int) or found.last_hidden_state.ndim != 3:
        return -1
    return int(found.last_hidden_state.shape[1] - (size[0] // patch) * (size[1] // patch))


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _check_size(name: str, model: Any, size: tuple[int, int]) -> None:
    """Positions are resampled in its forward pass, as transformers does. Raises UsageError: not for this size."""
    patch = getattr(model.config, "patch_size", None)
    if isinstance(patch, int) and hasattr(model.config, "num_hidden_layers"):  # others pad
        check_multiple(name, size, (patch, patch))
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, *size))
    except Exception as error:  # of the family's own
        raise UsageError(
            f"{name} does not take inputs of {size[0]}x{size[1]} pixels ({_words(error)}); leave --crop out"
        ) from error


def _processor_of(name: str, record: dict[str, Any]) -> Any:
    """The image processor, as a class of transformers' own. Raises BackboneError."""
    transformers, values = _transformers(), record["processor"]
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    if not kind:
        found = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
        kind = str((found.get(record["model"].get("model_type")) or {}).get("torchvision", ""))
    known = getattr(transformers, kind, None) if kind.endswith("ImageProcessor") else None
    if known is None:
        raise BackboneError(
            f"{name} prepares images by {kind[:60] or 'nothing'}, which this transformers does not know"
        )
    plain = {k: v for k, v in values.items() if k not in _LEFT_OUT and not k.endswith("_type")}
    try:
        return known.from_dict(plain)
    except Exception as error:
        raise BackboneError(f"the image processor of {name} cannot be used: {_words(error)}") from error


# ------------------------------------------------------------------------------------------------------ the door


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context in which transformers draws no bars and reports nothing about tensors that are not needed."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "transformers/... backbones need transformers: pip install 'featcache[transformers]'"
        ) from error
    return transformers
