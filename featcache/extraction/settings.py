"""What an existing cache was made with: what a request leaves unset is as it was, whatever the defaults or the network say today.

In: a request, and the caches at its output (finished, or parts). Out: ``Settings``, which tell whether anything new is asked for
and load the cache's own backbone again; an unchanged folder needs neither PyTorch nor a network.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.backbones.choice import AUTO
from featcache.backbones.saved import SavedBackbone
from featcache.cache.cache import FeatureCache, weights_copy
from featcache.cache.format import PROVENANCE, Provenance
from featcache.errors import BackboneError, CacheError
from featcache.extraction.plan import of_spec
from featcache.extraction.request import ExtractRequest
from featcache.spec import OWN_POOLING, Spec

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone

log = logging.getLogger("featcache")
_UNSET = (None, AUTO)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a cache, or unfinished work for one, was made with.

    Attributes:
        output: the cache. spec, provenance: its own.
    """

    output: Path
    spec: Spec
    provenance: Provenance

    @property
    def recorded(self) -> Mapping[str, Any]:
        """The record of the request that it was made by; empty if that is not known."""
        return self.provenance.request or {}

    def meet(self, record: Mapping[str, Any]) -> bool:
        """Whether the request of ``record`` asks of the same backbone for nothing but what the cache is.

        Where that cannot be told from the cache alone, the answer is no, and the backbone itself decides.
        """
        spec, preprocess = self.spec, self.spec.preprocess
        known: dict[str, Any] = {
            "resize": preprocess.to_json()["resize"],
            "crop": preprocess.crop[0] if len({*preprocess.crop}) == 1 else None,
            "interpolation": preprocess.interpolation,
            "pool": "own" if spec.pooling == OWN_POOLING else spec.pooling,
            "layers": spec.layers,
            "decode": preprocess.decode.removesuffix(" scale"),
            "white_level": preprocess.white_level or 65535,
            "precision": "fp32" if spec.precision == "reference" else spec.precision,
            "dtype": spec.storage,
        }
        if record["weights"] not in (AUTO, self.recorded.get("weights"), self.provenance.reload):
            return False
        return all(record.get(name) in (*_UNSET, value, self.recorded.get(name)) for name, value in known.items())

    def record(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """``record`` of a request, with what the cache says where that is unset."""
        merged = {name: self.recorded[name] for name in self._left_open(record)}
        # Of weights that are not named the record must not say "pretrained" where they are others.
        if record["weights"] == AUTO and not str(record["backbone"]).startswith("model:"):
            merged["backbone"] = self.recorded.get("backbone", self.spec.backbone)
            merged["weights"] = self.recorded.get("weights", f"tensors:{self.spec.weights_sha256}")
        return {**record, **merged}

    def resolved(self, request: ExtractRequest) -> ExtractRequest:
        """``request`` with precision and storage as in the cache where they are unset."""
        # Of the class that others may pass for.
        if request.precision == AUTO and self.recorded.get("precision") == "fp32":
            request = dataclasses.replace(request, precision="fp32")
        return request.resolved(self.spec)

    def say(self, request: ExtractRequest) -> None:
        """Log, on one line, what the cache decides because ``request`` does not."""
        words = [f"backbone {self.spec.backbone}"] if request.backbone == AUTO else []
        for name in self._left_open(vars(request)):
            value = str(self.recorded[name])
            words += [f"{name.replace('_', ' ')} {value[:19]}"] if name != "backbone" else []
        if words:
            log.info("%s goes on as it was made: %s", self.output, ", ".join(words))

    def _left_open(self, values: Mapping[str, Any]) -> list[str]:
        """Fields of a request that ``values`` leave unset, and that were set when the cache was made."""
        fields = [field.name for field in dataclasses.fields(ExtractRequest)]
        return [name for name in fields if values.get(name) in _UNSET and self.recorded.get(name) not in _UNSET]

    def load(self, request: ExtractRequest, saved: SavedBackbone | None) -> "Backbone":
        """The backbone of ``request``, which is that of the cache; what ``request`` leaves unset is as in the cache.

        Raises:
            BackboneError: the cache's weights are not to be had, or are others by now. UsageError: impossible sizes.
        """
        from featcache.backbones.backbone import for_size
        from featcache.backbones.load import load_backbone

        taken = request.taken.of(self.spec)
        if saved:
            backbone = saved.load(taken=taken)
        elif request.weights != AUTO:
            backbone = load_backbone(self.spec.backbone, request.weights, **vars(taken))
        else:
            backbone = self._load_again(request)
        return dataclasses.replace(backbone, preprocess=for_size(self.spec.preprocess, taken.size))

    def _load_again(self, request: ExtractRequest) -> "Backbone":
        from featcache.backbones.load import load_again, load_backbone

        copy, recorded = weights_copy(self.output, self.spec), self.recorded.get("weights", AUTO)
        backbone = load_again(self.spec, copy, self.provenance.reload, taken=request.taken)
        if backbone is None and recorded in (AUTO, "none") and not self._of_model:
            backbone = load_backbone(self.spec.backbone, recorded, **vars(request.taken.of(self.spec)))
        if backbone is None:
            raise BackboneError(
                f"{self.output} was made with weights of which no copy ({copy.name}) is beside it any more; {self._remedy()}"
            )
        if backbone.weights_sha256 != self.spec.weights_sha256:
            raise BackboneError(
                f"{self.output} was made with other weights of {self.spec.backbone}: found {backbone.weights_sha256[:12]} "
                f"({backbone.weights}), expected {self.spec.weights_sha256[:12]}; {self._remedy()}"
            )
        known = self.provenance
        return dataclasses.replace(backbone, weights=known.source, reload=known.reload) if copy.is_file() else backbone

    @property
    def _of_model(self) -> bool:
        return str(self.recorded.get("backbone")).startswith("model:")

    def _remedy(self) -> str:
        recorded = str(self.recorded.get("weights"))
        of_file = f", whose sha256 begins with {recorded[7:19]}" if recorded.startswith("sha256:") else ""
        again = "--backbone FOLDER, the model's" if self._of_model else f"--weights FILE{of_file}"
        return f"say where they are with {again}, or choose another -o"


def settings_of(
    request: ExtractRequest, saved: SavedBackbone | None, own: list[FeatureCache], output: Path, *, force: bool
) -> Settings | None:
    """What decides where ``request`` is silent: the first of the caches ``own``; None if there is none.

    force: of another backbone nothing is taken over, and of a damaged cache what can still be read.

    Raises:
        SpecMismatchError: the cache is of another backbone. BackboneError: there is no such backbone.
    """
    found = own[0] if own else _damaged(output) if force else None
    if found is None:
        return None
    name, weights = request.backbone, found.spec.weights_sha256
    if saved:
        name, weights = saved.spec.backbone, saved.spec.weights_sha256
    if name in (AUTO, found.spec.backbone) and weights == found.spec.weights_sha256:
        whole = PROVENANCE not in found.damaged_columns
        return Settings(output, found.spec, found.provenance if whole else Provenance())
    if not force:
        if saved is None:
            from featcache.backbones.load import check_name

            check_name(name)
        of_spec(own, dataclasses.replace(found.spec, backbone=name, weights_sha256=weights), output, force=False)
    return None


def _damaged(output: Path) -> FeatureCache | None:
    try:
        found = FeatureCache.salvage(output)
    except CacheError:
        return None
    return found if found.spec.stated is None else None  # of vectors made elsewhere there is nothing to go on with
