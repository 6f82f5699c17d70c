"""What an extraction needs once there is something to embed: the model, loaded at most once, and late.

In: a request, and what is known of the cache that it is for. Out: the ``Spec`` and ``Provenance`` of its embeddings, and new parts.
"""

import dataclasses
import functools
import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from featcache.backbones.choice import AUTO, choose_backbone, warn_of_licence
from featcache.backbones.saved import SavedBackbone
from featcache.cache.cache import FeatureCache, weights_copy
from featcache.cache.format import Provenance
from featcache.errors import BackboneError, SourceError
from featcache.extraction.executors import Executor, Published, Work, machine_facts
from featcache.extraction.on_devices import ALL_GPUS, executor_for
from featcache.extraction.plan import Plan
from featcache.extraction.request import ExtractRequest, load_requested
from featcache.extraction.settings import Settings
from featcache.images.formats import REVISION
from featcache.images.source import ImageList
from featcache.spec import Spec
from featcache.system.files import check_free_space, give_name
from featcache.system.workdir import work_folder

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.backbones.embed import Progress
    from featcache.backbones.embedder import Embedder
    from featcache.backbones.encoder import Precision
    from featcache.system.device import Runtime

log = logging.getLogger("featcache")


@dataclasses.dataclass(frozen=True)
class Job:
    """What an extraction needs once there is something to embed; loads the model at most once, and late.

    Attributes:
        asked: the request as it came. saved: the saved model whose backbone that asks for, if it is one.
        settings: what counts where it is silent: what an earlier run settled stays, also what it measured.
        donors: other caches. images: as listed. output: the file. device, workers, batch_size: as given.
    """

    asked: ExtractRequest
    saved: SavedBackbone | None
    settings: Settings | None
    donors: list[FeatureCache]
    images: ImageList
    output: Path
    device: str
    workers: int | None
    batch_size: int | None

    @functools.cached_property
    def request(self) -> ExtractRequest:
        """The request, with a name instead of ``auto``. Raises UsageError, DownloadError."""
        if self.settings:
            self.settings.say(self.asked)
        if self.asked.backbone != AUTO:
            return self.asked
        if self.settings:
            return dataclasses.replace(self.asked, backbone=self.settings.spec.backbone)
        self.asked.check_named()
        return dataclasses.replace(self.asked, backbone=choose_backbone(self.runtime.device.type))

    @functools.cached_property
    def written(self) -> dict[str, object]:
        """The record of the request, as files were when it was first needed."""
        return self.request.record()

    @property
    def record(self) -> dict[str, object]:
        """What to keep as provenance: as it is while nothing new is computed, or asked for."""
        if self.settings is None:
            return self.written
        old = self.settings.provenance.request
        if old is not None and not self.is_loaded and self.settings.meet(self.written):
            return dict(old)
        return self.settings.record(self.written)

    @functools.cached_property
    def known(self) -> Spec | None:
        """The spec, if the cache, or one of the others, shows that this very request makes it."""
        if self.settings and self.settings.meet(self.written):
            return self.settings.spec
        # Where a donor differs from what is here, the backbone decides, not the donor.
        fitting = [cache for cache in self.donors[::-1] if not self.settings or cache.spec == self.settings.spec]
        return next((cache.spec for cache in fitting if cache.provenance.request == self.record), None)

    @property
    def before(self) -> Spec | None:
        """What an earlier run settled: it stays, also if today's sample would just pass or fail."""
        return self.settings.spec if self.settings else self.known

    @property
    def resolved(self) -> ExtractRequest:
        """The request, ``auto`` replaced by what the cache, or the saved model, says."""
        if self.settings:
            return self.settings.resolved(self.request)
        return self.request.resolved(self.saved.spec) if self.saved else self.request

    @property
    def is_loaded(self) -> bool:
        """Whether the backbone is."""
        return "backbone" in vars(self)

    @functools.cached_property
    def runtime(self) -> "Runtime":
        """Where to compute: settled before anything large is allocated."""
        from featcache.system.device import choose_runtime  # here: it takes torch

        return choose_runtime(self.device, workers=self.workers, batch_size=self.batch_size)

    @functools.cached_property
    def backbone(self) -> "Backbone":
        """Raises BackboneError, ModelError, UsageError."""
        log.log(logging.INFO if self.device == "auto" else logging.DEBUG, self.runtime.reason)
        before = self.written
        backbone = load_requested(self.resolved, self.saved, self.settings)
        if self.request.record() != before:  # it would be taken for the file that was there before
            raise BackboneError(
                f"the weights of {self.request.backbone} changed while they were read; run the command again"
            )
        warn_of_licence(backbone.name, backbone.weights, loaded=True)
        return backbone

    @functools.cached_property
    def embedder(self) -> "Embedder":
        """Raises SourceError: no image can be decoded. UsageError: impossible precision or size. Otherwise as ``backbone``."""
        from featcache.backbones.embedder import Embedder
        from featcache.images.read import refusals

        precision = cast("Precision", self.resolved.precision)
        embedder = Embedder.prepare(self.backbone, self.images, runtime=self.runtime, precision=precision)
        if advice := embedder.choice.advice:
            log.info(advice)
        if not len(embedder.sample):
            every = refusals(self.images, range(len(self.images)), spec=self.backbone.preprocess)
            raise SourceError(self.images.all_refused(every))
        _compare_with_full_scale(embedder, self.images)
        return embedder

    @functools.cached_property
    def spec(self) -> Spec:
        """What embeddings are now. Raises as ``embedder``."""
        asked = self.resolved.precision
        settled = [spec.precision for spec in (self.before, self.saved and self.saved.spec) if spec]
        return self.embedder.spec(storage=self._storage(), precision=asked if asked in settled else None)

    def _storage(self) -> str:
        from featcache.backbones.self_check import survives_rounding

        if self.resolved.dtype != "auto":
            return self.resolved.dtype
        if self.before:
            return self.before.storage
        fits = survives_rounding(self.embedder.encoder(self.embedder.sample))
        level = logging.DEBUG if fits else logging.INFO  # what costs twice the space is worth a word
        log.log(
            level, "these embeddings %s float16, which is half the size of float32", "fit" if fits else "do not fit"
        )
        return "float16" if fits else "float32"

    def keep_weights(self, spec: Spec) -> None:
        """Put a copy of the weights beside the cache if no library provides them again. Raises StorageError."""
        copy = weights_copy(self.output, spec)
        if not copy.is_file() and self.backbone.reload is None:  # in this order: a backbone takes long to load
            from featcache.backbones.backbone import save_weights  # and so does PyTorch

            own = work_folder(self.output) / f"weights-{secrets.token_hex(8)}.safetensors"
            save_weights(self.backbone, own)
            give_name(own, copy)  # others may do the same at this moment

    def embed(self, plan: Plan, executor: Executor | None, progress: "Progress | None", *, tag: str = "") -> Published:
        """Embed ``plan.todo`` into new parts, ``tag`` in their names. Raises StorageError; CacheError: what is to be reused is damaged."""
        for number in np.unique(plan.matches.source[plan.matches.source >= 0]):  # damage is found before work starts
            plan.caches[number].check_features()
        values = (len(plan.todo) + len(plan.images)) * self.backbone.dim
        check_free_space(work_folder(self.output).parent, values * np.dtype(self.spec.storage).itemsize)
        self.keep_weights(self.spec)
        run = executor or executor_for(self.device, self.embedder, len(plan.todo))
        device = "auto" if self.device == ALL_GPUS else self.device
        options = (device, self.workers, self.batch_size, tag)
        return run(Work(self.output, plan.images, self.spec, self.provenance, *options), plan.todo, progress=progress)

    @functools.cached_property
    def provenance(self) -> Provenance:
        """Of what is embedded now. Raises as ``embedder``."""
        embedder = self.embedder
        return Provenance(
            request=self.record,
            source=embedder.backbone.weights,
            reload=embedder.backbone.reload,
            self_check=dataclasses.asdict(embedder.choice),
            decoder=REVISION,
            rest=machine_facts(embedder.runtime),
        )

    def provenance_of(self, origin: FeatureCache) -> Provenance:
        """That of ``origin`` with this request, so that the next run recognises itself, and of rows that are all right."""
        provenance = dataclasses.replace(origin.provenance, request=self.record, decoder=REVISION)
        if self.is_loaded and provenance.reload is None:  # as of the copy that was kept, or not needed
            backbone = self.backbone
            provenance = dataclasses.replace(provenance, source=backbone.weights, reload=backbone.reload)
        return provenance


def _compare_with_full_scale(embedder: "Embedder", images: ImageList) -> None:
    """Say what decoding at a reduced scale, or by a GPU, does to embeddings."""
    from featcache.backbones.embed import sample_pixels
    from featcache.backbones.self_check import agreement

    preprocess = embedder.backbone.preprocess
    if preprocess.decode == "full scale":
        return
    full = sample_pixels(images, dataclasses.replace(preprocess, decode="full scale"), len(embedder.sample))
    found = agreement(embedder.encoder(full), embedder.encoder(embedder.sample))
    log.log(
        logging.INFO if found.passes else logging.WARNING,
        "%s: to full scale %s%s",
        "usual JPEGs are decoded by the GPU"
        if preprocess.decode == "gpu"
        else "large JPEGs are decoded at a reduced scale",
        found,
        "" if found.passes else ", below what passes for the same embedding; --decode full does without",
    )
