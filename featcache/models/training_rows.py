"""What a model was trained on, kept beside it: so that a score can tell images that training has seen from others, and that
a prediction can be told how often the model is right on new ones.

In and out: ``training.safetensors`` in the model's folder.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.copies import are_among, first_copies
from featcache.errors import ModelError
from featcache.heads.head import Array
from featcache.system.display import quantity

FILE = "training.safetensors"
_HELD_OUT = "held_out."  # before the names of its tensors
_COMPARED = "compared."
_NO_LABEL = -1


def seen_words(count: int, n: int, first: str, *, which: str = "these") -> str:
    """That training has seen ``count`` of n images, the first of them ``first``."""
    some = f"{count} of {which} {quantity(n, 'image')}" if n > 1 else "the only image"
    return f"training has seen {some}, {'the first ' * (count > 1)}{first}"


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """n rows that did not train the model that gives their logits.

    Attributes: as of ``TrainingRows``; every row has logits, and a label among the model's classes.
    """

    digests: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    logits: Array

    def once(self) -> "HeldOut":
        """Each image once: the first of its copies."""
        kept = np.unique(first_copies(self.digests))
        kept = kept[self.labels[kept] != _NO_LABEL]
        return HeldOut(self.digests[kept], self.labels[kept], self.logits[kept])


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """Answers to n images that trained neither model, of the frozen backbone's head and of the fine-tuned model.

    Attributes:
        digests, labels: as of ``TrainingRows``. head, tuned: (n,) int64, positions among the model's classes.
    """

    digests: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    head: npt.NDArray[np.int64]
    tuned: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRows:
    """The N rows that trained a model.

    Attributes:
        digests: (N, 32) uint8, sha256 of each image's bytes.
        labels: (N,) int64, positions among the model's classes; -1: of an earlier training, from which this one started.
        logits: (N, C) float32, each from a head that was trained without the row's fold; None where there was no
            cross-validation, or too much of them.
        held_out: instead: of a fine-tuned model rows of val, which trained nothing; of many rows some, with their logits.
        compared: of a fine-tuned model its answers on val and test, and those of the head it started from.
    """

    digests: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    logits: Array | None = None
    held_out: HeldOut | None = None
    compared: Compared | None = None

    def unseen(self) -> HeldOut | None:
        """Rows with logits of a model that they did not train, each image once; None where there are none."""
        own = None if self.logits is None else HeldOut(self.digests, self.labels, self.logits)
        return None if (found := self.held_out or own) is None else found.once()

    def fit(self, n_classes: int) -> bool:
        """Whether there are rows, and all that is kept of them is of ``n_classes`` classes; a damaged file may say anything."""
        own = HeldOut(self.digests, self.labels, np.zeros((0, n_classes)) if self.logits is None else self.logits)
        parts = [own] if self.held_out is None else [own, self.held_out]
        labels = np.concatenate([part.labels for part in parts])
        logits = [part.logits for part in parts]
        answers = [] if self.compared is None else [self.compared.labels, self.compared.head, self.compared.tuned]
        return bool(
            all(len(part.labels) for part in parts)
            and ((labels >= _NO_LABEL) & (labels < n_classes)).all()
            and all(scores.shape[1] == n_classes and np.isfinite(scores).all() for scores in logits)
            and all(((found >= 0) & (found < n_classes)).all() for found in answers)
        )

    def contain(self, digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """(M, 32) digests -> (M,) whether training has seen an image of these bytes."""
        return are_among(digests, self.digests)

    def after(self, earlier: Sequence["TrainingRows"]) -> "TrainingRows":
        """These rows, and those of ``earlier`` trainings, without their labels, which are positions among other classes."""
        new = [rows.digests[~self.contain(rows.digests)] for rows in earlier]
        unknown = np.full(sum(map(len, new)), -1, np.int64)
        return TrainingRows(np.concatenate([self.digests, *new]), np.concatenate([self.labels, unknown]))

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        from safetensors.numpy import save

        tensors = {"digests": self.digests, "labels": self.labels.astype(np.int64)}
        if self.logits is not None:
            tensors["logits"] = self.logits.astype(np.float32)
        if (held_out := self.held_out) is not None:
            columns = {"digests": held_out.digests, "labels": held_out.labels.astype(np.int64)}
            columns["logits"] = held_out.logits.astype(np.float32)
            tensors |= {_HELD_OUT + name: column for name, column in columns.items()}
        if self.compared is not None:
            tensors |= {_COMPARED + name: column for name, column in vars(self.compared).items()}
        data: bytes = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "TrainingRows":
        """Inverse of ``to_bytes``. Raises ModelError if the tensors do not fit together."""
        from safetensors.numpy import load

        tensors = load(data)
        found = _columns(tensors, "")
        if found is None:
            raise ModelError(f"its {FILE} does not hold digests and labels of training rows")
        held_out = _columns(tensors, _HELD_OUT)
        if held_out is None and any(name.startswith(_HELD_OUT) for name in tensors):
            raise ModelError(f"its {FILE} does not hold digests and labels of held-out rows")
        digests, labels, logits = held_out or found
        rows = HeldOut(digests, labels, logits) if held_out and logits is not None else None
        return cls(*found, rows, _compared(tensors))


def _compared(tensors: dict[str, Array]) -> Compared | None:
    """Raises ModelError: it does not fit together."""
    if not any(name.startswith(_COMPARED) for name in tensors):
        return None
    columns = {field.name: tensors.get(_COMPARED + field.name) for field in dataclasses.fields(Compared)}
    n = columns["labels"].size if columns["labels"] is not None else 0
    expected: dict[str, Any] = dict.fromkeys(columns, (np.int64, (n,))) | {"digests": (np.uint8, (n, 32))}
    for name, column in columns.items():
        if column is None or (column.dtype, column.shape) != expected[name]:
            raise ModelError(f"its {FILE} holds answers of other rows")
    return Compared(**columns)  # type: ignore[arg-type]


def _columns(tensors: dict[str, Array], prefix: str) -> tuple[Array, Array, Array | None] | None:
    """Digests, labels, and logits if there are any; None if the first two are missing or do not fit together."""
    digests, labels, logits = (tensors.get(prefix + name) for name in ("digests", "labels", "logits"))
    if digests is None or labels is None or digests.dtype != np.uint8 or digests.shape != (len(labels), 32):
        return None
    if labels.ndim != 1 or labels.dtype.kind != "i":
        return None
    if logits is not None and (logits.ndim != 2 or len(logits) != len(labels) or logits.dtype.kind != "f"):
        raise ModelError(f"its {FILE} holds logits of other rows")
    return digests, labels, logits
