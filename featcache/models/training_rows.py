"""What a model was trained on, kept beside it: so that a score can tell images that training has seen from others.

In and out: ``training.safetensors`` in the model's folder.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from featcache.cache.copies import are_among
from featcache.errors import ModelError
from featcache.heads.head import Array

FILE = "training.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRows:
    """The N rows that trained a model.

    Attributes:
        digests: (N, 32) uint8, sha256 of each image's bytes.
        labels: (N,) int64, positions among the model's classes; -1: of an earlier training, from which this one started.
        logits: (N, C) float32, each from a head that was trained without the row's fold; None where there was no
            cross-validation, or too much of them.
    """

    digests: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    logits: Array | None = None

    def contain(self, digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """(M, 32) digests -> (M,) whether training has seen an image of these bytes."""
        return are_among(digests, self.digests)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        from safetensors.numpy import save

        tensors = {"digests": self.digests, "labels": self.labels.astype(np.int64)}
        if self.logits is not None:
            tensors["logits"] = self.logits.astype(np.float32)
        data: bytes = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "TrainingRows":
        """Inverse of ``to_bytes``. Raises ModelError if the tensors do not fit together."""
        from safetensors.numpy import load

        tensors = load(data)
        digests, labels, logits = (tensors.get(name) for name in ("digests", "labels", "logits"))
        if digests is None or labels is None or digests.dtype != np.uint8 or digests.shape != (len(labels), 32):
            raise ModelError(f"its {FILE} does not hold digests and labels of training rows")
        if logits is not None and (logits.ndim != 2 or len(logits) != len(labels)):
            raise ModelError(f"its {FILE} holds logits of other rows")
        return cls(digests, labels, logits)
