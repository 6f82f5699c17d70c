"""How a cache came about: recorded in the file, never compared, and believed only as far as it has the right form.

In: what an extraction knows of itself, or the JSON of a file that nobody vouches for. Out: ``Provenance``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a cache's embeddings come from.

    Attributes:
        request: ``ExtractRequest.record()``: the same again means the same spec. None: not known.
        source: where the weights came from, in words.
        reload: what a library must be asked for to provide them again; None: a copy lies beside the cache.
        self_check: ``PrecisionChoice`` as JSON values: the precision in use, and what was tried.
        rest: everything else, versions and time among it.
    """

    request: Mapping[str, Any] | None = None
    source: str = "unknown"
    reload: str | None = None
    self_check: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rest: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def precision(self) -> str | None:
        """The precision that the embeddings were computed in."""
        found = self.self_check.get("precision")
        return found if isinstance(found, str) else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = dict(self.rest)
        if self.request is not None:
            values["request"] = dict(self.request)
        if (self.source, self.reload) != ("unknown", None):
            values["weights"] = {"source": self.source, "reload": self.reload}
        if self.self_check:
            values["precision"] = dict(self.self_check)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Provenance":
        """What ``to_json`` gave. What has not the form that is expected goes into ``rest``."""
        rest, known = dict(values), dict[str, Any]()
        if isinstance(rest.get("request"), dict):
            known["request"] = rest.pop("request")
        if isinstance(rest.get("precision"), dict):
            known["self_check"] = rest.pop("precision")
        weights = rest.get("weights")
        if isinstance(weights, dict) and weights.keys() == {"source", "reload"}:
            source, reload = weights["source"], weights["reload"]
            if isinstance(source, str) and (reload is None or isinstance(reload, str)):
                known |= {"source": source, "reload": reload}
                del rest["weights"]
        return cls(**known, rest=rest)
