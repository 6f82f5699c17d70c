"""What must be ready before something can be embedded: a backbone, its encoder, a spec; and weights found again.

In: a backbone, or a cache that names one. Out: ``Prepared``, or the very backbone that the cache was made with.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cache.cache import FeatureCache
from featcache.errors import BackboneError, SourceError, SpecMismatchError
from featcache.extraction.plan import all_refused, refusals
from featcache.images.source import ImageList
from featcache.spec import make_spec, spec_difference

if TYPE_CHECKING:
    import numpy as np

    from featcache.backbones.encoder import Encoder, Precision, PrecisionChoice
    from featcache.backbones.load import Backbone
    from featcache.system.device import Runtime

log = logging.getLogger("featcache")
Progress = Callable[[int, int, str], None]  # images done, images to do, the stage that limits


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What embeds, and what is written down about it."""

    backbone: "Backbone"
    encoder: "Encoder"
    runtime: "Runtime"
    spec: dict[str, Any]
    provenance: dict[str, Any]


def prepare_encoder(
    backbone: "Backbone", runtime: "Runtime", images: ImageList, *, precision: "Precision"
) -> tuple["Encoder", "PrecisionChoice", "np.ndarray[Any, np.dtype[np.uint8]]"]:
    """The encoder of ``backbone``, what its self-check found, and the pixels (n, H, W, 3) it was made on.

    Raises:
        SourceError: not one of ``images`` can be decoded. UsageError: as ``build_encoder``.
    """
    from featcache.backbones.embed import sample_pixels
    from featcache.backbones.encoder import build_encoder
    from featcache.images.decode import decoder_in_words

    log.info("backbone %s: %d dimensions, weights %s", backbone.name, backbone.dim, backbone.weights)
    sample = sample_pixels(images, backbone.preprocess, min(runtime.batch_size, 32))
    if not len(sample):
        raise SourceError(all_refused(images, refusals(images, range(len(images)))))
    encoder, choice = build_encoder(backbone, runtime, sample, precision=precision)
    log.info("precision %s", choice.reason)
    log.info("decoder: %s", decoder_in_words())
    return encoder, choice, sample


def choose_runtime(device: str, workers: int | None, batch_size: int | None) -> "Runtime":
    """``runtime.choose_runtime``, imported when it is called: it takes torch. Raises UsageError."""
    from featcache.system import device as runtime

    return runtime.choose_runtime(device, workers=workers, batch_size=batch_size)


def weights_copy(cache: Path, spec: dict[str, Any]) -> Path:
    """Where ``extract`` keeps the weights that no library provides again, beside the cache, for models made from it."""
    return cache.with_name(f"{cache.name}.{spec['backbone']['weights_sha256'][:12]}.safetensors")


def weights_source(cache: FeatureCache) -> tuple[str, str | None]:
    """Where a cache says its weights came from: in words, and what to pass to ``load_provided`` (None: a copy)."""
    weights = cache.provenance.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    reload = weights.get("reload")
    return str(weights.get("source", "unknown")), reload if isinstance(reload, str) else None


def backbone_of(cache: FeatureCache) -> "Backbone":
    """The backbone that ``cache`` was made with.

    Raises:
        BackboneError: its weights are missing, or a library cannot provide them here.
        SpecMismatchError: what was found is another backbone, or has other weights.
    """
    from featcache.backbones.load import load_again

    copy, (source, reload) = weights_copy(cache.path, cache.spec), weights_source(cache)
    backbone = load_again(cache.spec, copy, reload)
    if backbone is None:
        raise BackboneError(
            f"{copy} is missing, and no library provides the weights of {cache.path} ({source}); copy the weights file to "
            "that name and run the same command again"
        )
    found = make_spec(
        name=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        preprocess=backbone.preprocess,
        precision=cache.spec["precision"],
        storage=cache.spec["storage"],
    )
    if found != cache.spec:
        raise SpecMismatchError(
            f"{cache.path} was made with another backbone than {backbone.weights} gives "
            f"({'; '.join(spec_difference(cache.spec, found))}); copy the original weights to {copy}"
        )
    return backbone
