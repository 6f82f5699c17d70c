"""What must be ready before something can be embedded: a backbone, its encoder, a spec."""

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from featcache.errors import SourceError
from featcache.images.decode import all_refused, refusals
from featcache.images.source import ImageList

if TYPE_CHECKING:
    import numpy as np

    from featcache.backbones.backbone import Backbone
    from featcache.backbones.encoder import Encoder, Precision, PrecisionChoice
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
