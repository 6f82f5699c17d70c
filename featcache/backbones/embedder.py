"""``Embedder``: what embeds images. A backbone, its preprocessing, a device, a precision that passed the self-check.

In: a ``Backbone``, a ``Runtime`` and some images to check on. Out: embeddings of images, and the ``Spec`` that says what they are.
"""

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Generator

import numpy as np

from featcache.backbones.backbone import Backbone
from featcache.backbones.embed import EmbeddedBatch, Timings, embed, sample_pixels
from featcache.backbones.encoder import Encoder, Precision, PrecisionChoice, build_encoder
from featcache.images.decode import Pixels, decoder_in_words
from featcache.images.fill import start_decoding
from featcache.images.read import ImageFiles
from featcache.spec import Spec
from featcache.system.device import Runtime, choose_runtime

log = logging.getLogger("featcache")
SAMPLE = 32  # images at most


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """A backbone ready to embed images.

    Attributes:
        backbone: as loaded. encoder: made fast. runtime: where it computes.
        choice: what the self-check tried and found.
        sample: (n, H, W, 3) uint8, the images it was made on; n is 0 if none could be decoded.
    """

    backbone: Backbone
    encoder: Encoder
    runtime: Runtime
    choice: PrecisionChoice
    sample: Pixels

    @classmethod
    def prepare(
        cls, backbone: Backbone, files: ImageFiles, *, runtime: Runtime | None = None, precision: Precision = "auto"
    ) -> "Embedder":
        """Make ``backbone`` fast, check on the first of ``files`` that it stayed itself; the log says what was chosen.

        Args:
            backbone: as ``load_backbone`` returns it. files: an ``ImageList``, or anything with a root and paths.
            runtime: where to compute; the best device here when None.
            precision: ``auto`` takes the fastest that passes the self-check; another is obeyed, and named if it does not.

        Raises:
            UsageError: unknown precision, an input size that the network does not take, too little memory for a single image,
                no GPU to decode on. MissingDependencyError: torchcodec, to decode on it. BackboneError: weights that are not finite.
        """
        runtime = runtime or choose_runtime()
        if runtime.device.type == "cuda":
            start_decoding(runtime.workers, len(files.paths))
        about = backbone.name, backbone.dim, backbone.weights, backbone.preprocess.sizes_in_words()
        log.info("backbone %s: %d dimensions, weights %s; %s", *about)
        sample = sample_pixels(files, backbone.preprocess, min(runtime.batch_size, SAMPLE), device=runtime.device)
        pixels = sample if len(sample) else np.zeros((1, *backbone.preprocess.crop, 3), np.uint8)
        encoder, choice = build_encoder(backbone, runtime, pixels, precision=precision)
        if lane := encoder.lane(runtime.batch_size):  # settled before anything is embedded, and recorded as it is
            runtime = dataclasses.replace(runtime, batch_size=lane.batch_size)
        log.debug("precision %s", choice.reason)
        slow = importlib.util.find_spec("simplejpeg") is None and os.environ.get("FEATCACHE_DECODER") != "pillow"
        log.log(logging.INFO if slow else logging.DEBUG, "decoder: %s", decoder_in_words())
        return cls(backbone, encoder, runtime, choice, sample)

    def embed(self, files: ImageFiles, *, timings: Timings | None = None) -> Generator[EmbeddedBatch]:
        """Embed ``files`` in their order; see ``embed.embed``."""
        lane = self.encoder.lane(self.runtime.batch_size)
        return embed(files, self.encoder, self.runtime, timings=timings, lane=lane)

    def spec(self, *, storage: str, precision: str | None = None) -> Spec:
        """What its embeddings are, stored as ``storage``; of the class ``precision`` where that was settled before."""
        return Spec(
            backbone=self.backbone.name,
            weights_sha256=self.backbone.weights_sha256,
            layer=self.backbone.layer,
            pooling=self.backbone.pooling,
            layers=self.backbone.layers,
            preprocess=self.backbone.preprocess,
            precision=precision or self.choice.precision_class,
            storage=storage,
        )
