"""A frozen backbone and its weights: read from a file, loaded strictly, hashed, saved."""

import dataclasses
import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones.pooling import Taps, choose_pooling, pooling_lines, set_pooling
from featcache.errors import BackboneError, UsageError
from featcache.spec import OWN_POOLING, PreprocessSpec, Taken
from featcache.system.files import publish_file
from featcache.system.safe_load import DamagedFile, ForeignFile, load_tensors

log = logging.getLogger("featcache")
OFFLINE_BACKBONE = "timm/tf_efficientnet_lite0"  # its ImageNet weights come with the `offline` extra
CONFIG = "config"  # among the metadata of a safetensors file: ``Backbone.config``
_COUNTER = "num_batches_tracked"  # no embedding depends on it, and older checkpoints lack it
_SAVE = "save it with torch.save(model.state_dict(), ...)"
_CONVERT = (
    "if you trust it, convert it where it was made: x = torch.load({0!r}, weights_only=False), then "
    "torch.save(x.state_dict(), 'weights.pth') of a whole network, or torch.save(x['state_dict'], 'weights.pth') of what holds more"
)
# What is meant where several entries hold the network: it comes before averages of it.
_ENTRIES = ("", "state_dict", "model_state_dict", "model", "ema", "params")
_WRAPPERS = {"_orig_mod": "torch.compile", "module": "DataParallel or an average", "ema_model": "EMA"}
_INNER = frozenset({"_orig_mod", "module"})  # also in the middle of names, where a part of the network was wrapped
_MAX_DEPTH, _MAX_PLACES = 8, 16  # of wrappers in wrappers, of networks in a table


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
        pooling, layers: as in ``Spec``. own_pooling: what the network's own is, as in ``Taps``.
        lines: Python lines from ``network`` and ``pixels`` to ``embeddings``, for whoever has no
            featcache; none where the network's own forward pass gives them.
        reload: the ``weights`` argument with which a library provides them again; None if they must travel along.
        published: tensors as they were before they were resampled to ``preprocess.crop``; these are hashed and saved.
        config: JSON that its library builds it from, where its name alone does not say that without a network.
    """

    name: str
    module: nn.Module
    dim: int
    layer: str
    preprocess: PreprocessSpec
    weights: str
    weights_sha256: str
    reload: str | None
    published: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    pooling: str = OWN_POOLING
    layers: int = 1
    own_pooling: str = ""
    lines: tuple[str, ...] = ()
    config: str = ""


def save_weights(backbone: Backbone, path: Path, *, staging: Path | None = None) -> None:
    """Publish ``weights_bytes``; ``load_backbone(name, path)`` reads them. Raises StorageError."""
    data = weights_bytes(backbone)
    with publish_file(path, staging=staging, needed=len(data)) as file:
        file.write(data)


def weights_bytes(backbone: Backbone) -> bytes:
    """The backbone's tensors, as published, in safetensors' format."""
    from safetensors.torch import save

    # clones: safetensors refuses tensors that share memory
    tensors = {**backbone.module.state_dict(), **backbone.published}
    facts = {CONFIG: backbone.config} if backbone.config else None
    data: bytes = save({key: value.clone().contiguous() for key, value in tensors.items()}, facts)
    return data


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 (hex) over names, types, shapes and bytes, in the order of names.

    ``num_batches_tracked`` is left out: it never touches an embedding, and older checkpoints lack it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith(_COUNTER):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def freeze(
    name: str, model: nn.Module, dim: int, layer: str, preprocess: PreprocessSpec, source: str, reload: str | None
) -> Backbone:
    """The last step of every loader: ``model`` in eval mode, without gradients, its weights hashed."""
    model.eval().requires_grad_(False)
    empty = any(tensor.is_meta for tensor in model.state_dict().values())  # ``load.build_empty``
    digest = "" if empty else hash_tensors(model.state_dict())
    return Backbone(name, model, dim, layer, preprocess, source, digest, reload)


def for_size(preprocess: PreprocessSpec, size: tuple[int, int] | None) -> PreprocessSpec:
    """The preprocessing with another crop (height, width), and a resize that is at least as large. Raises UsageError."""
    if size is None or size == preprocess.crop:
        return preprocess
    resize = preprocess.resize
    edges = (resize, resize) if isinstance(resize, int) else resize
    least = (max(edges[0], size[0]), max(edges[1], size[1]))
    return dataclasses.replace(preprocess, crop=size, resize=max(least) if isinstance(resize, int) else least)


def with_input_size(
    backbone: Backbone, preprocess: PreprocessSpec, set_size: Callable[[nn.Module, tuple[int, int]], None]
) -> Backbone:
    """The backbone for pixels of ``preprocess``; ``set_size`` changes a network in place, as its library does. Raises UsageError."""
    changed: Mapping[str, torch.Tensor] = {}
    if preprocess.crop != backbone.preprocess.crop:
        before = backbone.module.state_dict()
        set_size(backbone.module, preprocess.crop)
        after = backbone.module.state_dict()
        changed = {key: value for key, value in before.items() if not _same(value, after[key])}
    return dataclasses.replace(backbone, preprocess=preprocess, published=changed)


def with_pooling(backbone: Backbone, taps: Taps, taken: Taken) -> Backbone:
    """The backbone with another pooling, or more layers; the log says what ``auto`` took. Raises UsageError."""
    pool, layers = taken.pool or "auto", taken.layers or 1
    pooling, why = choose_pooling(backbone.name, taps, pool, layers)
    log.log(
        logging.DEBUG if pooling == OWN_POOLING or pool != "auto" else logging.INFO,
        f"pooling {pooling}{f' of the last {layers} layers' if layers > 1 else ''}: {why}",
    )
    backbone = dataclasses.replace(backbone, own_pooling=taps.own)
    if pooling == OWN_POOLING and layers == 1:
        return backbone
    set_pooling(backbone.module, taps, pooling, layers)
    with torch.inference_mode():
        dim = backbone.module(torch.zeros(1, 3, *backbone.preprocess.crop)).shape[1]
    lines = tuple(pooling_lines(taps, pooling, layers))
    return dataclasses.replace(backbone, dim=dim, pooling=pooling, layers=layers, lines=lines)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def check_multiple(name: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raises UsageError, with the nearest sizes, if patches of ``patch`` pixels do not fill ``size``."""
    for edge, of in zip(size, patch, strict=True):
        if edge % of:
            near = [str(edge - edge % of)] * (edge > of) + [str(edge - edge % of + of)]
            raise UsageError(
                f"{name} cuts its input into patches of {of} pixels, which {edge} is no multiple of; "
                f"the nearest --crop: {' or '.join(near)}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Tensors of a checkpoint file, by name.

    Attributes:
        tensors: with the versions of modules that PyTorch notes beside them.
        entry: of the file in which they lie: ``state_dict``, ``checkpoint.model``; empty for the file itself.
        prefix, inner: what wrappers had put before their names, and into them. others: tensors without that prefix.
    """

    tensors: dict[str, torch.Tensor]
    entry: str
    prefix: str = ""
    inner: tuple[str, ...] = ()
    others: int = 0

    def __str__(self) -> str:
        parts = [*self.prefix.split(".")[:-1], *self.inner]
        makers = ", ".join(dict.fromkeys(_WRAPPERS.get(part, "Lightning or the like") for part in parts))
        taken = " and ".join(repr(text[:60]) for text in (self.prefix, *(f"{part}." for part in self.inner)) if text)
        words = (
            f", entry {self.entry[:60]!r}" if self.entry else "",
            f", names without {taken} ({makers})" if taken else "",
            f", other tensors left out: {self.others}" if self.others else "",
        )
        return "".join(words)


def read_weights(path: Path, names: list[str]) -> list[Table]:
    """The tables of tensors in a checkpoint file, outer ones first; no code in it is run. Raises BackboneError."""
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
            f"{path} cannot be read as weights: expected tensors only, in a .pth or .safetensors file ({reason}); "
            + (_CONVERT.format(path.name) if isinstance(error, ForeignFile) else _SAVE)
        ) from error
    if tables := list(_tables(state)):
        return tables
    raise BackboneError(f"{path} holds no table of tensors; {_SAVE}")


def _tables(state: Any, entry: str = "", depth: int = 3) -> Iterator[Table]:
    if not isinstance(state, dict) or not depth:
        return
    if own := {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}:
        yield Table(rename_tensors(state if len(own) == len(state) else own, str), entry)
    for key, value in state.items():
        yield from _tables(value, f"{entry}.{key}".lstrip("."), depth - 1)


def rename_tensors(state: Mapping[str, torch.Tensor], new_name: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    """Rename tensors, leaving out what ``new_name`` gives None for.

    The versions of modules, which old checkpoints are migrated by, come along: under the new name of what begins with the
    module's name and a dot, so that a wrapper's own version makes way for that of the network in it.
    """
    renamed = OrderedDict((name, value) for key, value in state.items() if (name := new_name(str(key))) is not None)
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, dict) and all(isinstance(version, dict) for version in versions.values()):
        moved = ((new_name(f"{key}." if key else ""), version) for key, version in versions.items())
        renamed._metadata = OrderedDict((key.rstrip("."), version) for key, version in moved if key is not None)  # type: ignore[attr-defined]
    return renamed


def load_tables(model: nn.Module, tables: list[Table], *, ignore: tuple[str, ...], source: str) -> str:
    """Load the network from the table it lies in, without what wrappers have put before its names and into them.

    What is before them is taken away if every tensor of the network is there then, in its shape. What lies beside the
    network in a wrapper (a loss, a count of averages) is left out; nothing may be left over among its own.

    Args:
        ignore: as in ``load_state``. source: where the tables are from, in words.

    Returns:
        ``source``, and where in it the weights were found.

    Raises:
        BackboneError: they fit nowhere (what comes nearest is compared), or in several places that differ.
    """
    expected = {key: _form(value) for key, value in model.state_dict().items() if not key.endswith(_COUNTER)}
    found = [place for table in tables for place in _unwrapped(table, expected.keys())]
    whole = [
        place
        for place in found
        if all(key in place.tensors and _form(place.tensors[key]) == form for key, form in expected.items())
    ]
    chosen = [place for place in whole if _rank(place) == min(map(_rank, whole))]
    chosen = chosen or [max(found, key=lambda place: len(place.tensors.keys() & expected.keys()))]
    for other in chosen[1:]:
        if not all(torch.equal(chosen[0].tensors[key], other.tensors[key]) for key in expected):
            places = " and once".join(str(place) or ", names as they are" for place in (chosen[0], other))
            raise BackboneError(f"{source} holds this network twice, once{places}; keep one of them: {_SAVE}")
    spare = "".join(f"; also there{place}" for place in whole if place not in chosen)
    source = f"{source}{chosen[0]}{spare}"
    load_state(model, chosen[0].tensors, ignore=ignore, source=source)
    return source


def _rank(table: Table) -> int:
    name = table.entry.rpartition(".")[2]
    return _ENTRIES.index(name) if name in _ENTRIES else len(_ENTRIES)


def _unwrapped(table: Table, expected: Collection[str]) -> list[Table]:
    """``table`` below each prefix that makes some of its names ``expected`` ones, most of them first."""
    inner = _INNER - {part for key in expected for part in key.split(".")}  # a few networks have a part called "module"

    def own(key: str) -> str:
        return ".".join(part for part in key.split(".") if part not in inner)

    counts: Counter[str] = Counter()
    for key in table.tensors:
        parts = key.split(".")
        for depth in range(min(len(parts), _MAX_DEPTH)):
            if parts[depth] not in inner and own(".".join(parts[depth:])) in expected:
                counts["".join(f"{part}." for part in parts[:depth])] += 1
    return [_below(table, prefix, own) for prefix, _ in counts.most_common(_MAX_PLACES) or [("", 0)]]


def _below(table: Table, prefix: str, own: Callable[[str], str]) -> Table:
    below = rename_tensors(table.tensors, lambda key: key[len(prefix) :] if key.startswith(prefix) else None)
    tensors = rename_tensors(below, own)
    if len(tensors) < len(below):  # two names would become one
        tensors = below
    parts = {part for key in below.keys() - tensors.keys() for part in key.split(".")}
    inner = tuple(sorted(parts & _INNER))
    return Table(tensors, table.entry, prefix, inner, len(table.tensors) - len(below))


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
        reason = " ".join(str(error).split())[:300]  # PyTorch names hundreds of keys
        raise BackboneError(f"the weights ({source}) do not fit this backbone: {reason}") from error
    missing = [key for key in missing if not key.endswith(_COUNTER)]
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
