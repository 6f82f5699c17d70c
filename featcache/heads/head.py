"""A trained head: embeddings in, logits and probabilities out. The same few arrays whatever trained it; NumPy only."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from featcache.errors import ModelError, UsageError

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]
Kind = Literal["logreg", "linear", "mlp"]
KINDS: tuple[Kind, ...] = ("logreg", "linear", "mlp")
Scaling = Literal["none", "standardise", "unit"]
SCALINGS: tuple[Scaling, ...] = ("none", "standardise", "unit")


MAX_LOGITS = 2**24  # out of fold, that are kept: 64 MB
MAX_COUNT = 2**16  # of epochs, rows per batch, and units per layer of a head


class FeatureSource(Protocol):
    """(M, D) float16 or float32 embeddings, read by row number: an array, or the reader of an open cache."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""

    def __getitem__(self, rows: Indices, /) -> Array:
        """(n,) row numbers -> (n, D), a copy."""


class Probabilities(Protocol):
    """(N, C) probabilities, rows summing to 1: an array, or ``Scores``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""

    def __getitem__(self, rows: Indices | slice, /) -> Array:
        """Those of some rows: (n, C)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """Scaling, then linear layers with ReLU between them, then softmax.

    Attributes:
        kind: what trained it.
        scaling: ``none``; ``standardise``: (x - mean) / scale; ``unit``: x / |x|.
        mean, scale: (D,), used by ``standardise`` only.
        layers: (weight (out, in), bias (out,)) each; the last has C outputs, one per class, also for two classes.
    """

    kind: Kind
    scaling: Scaling
    mean: Array
    scale: Array
    layers: tuple[tuple[Array, Array], ...]

    @property
    def dim(self) -> int:
        """D, values per embedding."""
        return int(self.layers[0][0].shape[1])

    def logits(self, X: Array) -> Array:
        """(N, D) embeddings -> (N, C) logits, in the precision of the weights."""
        x = scale_features(X.astype(self.layers[0][0].dtype), self.scaling, self.mean, self.scale)
        for number, (weight, bias) in enumerate(self.layers):
            x = x @ weight.T + bias
            if number < len(self.layers) - 1:
                x = np.maximum(x, 0)
        return x

    def probabilities(self, X: Array) -> Array:
        """(N, D) embeddings -> (N, C) probabilities, rows summing to 1."""
        return softmax(self.logits(X))

    def at_temperature(self, temperature: float) -> "Head":
        """The head whose logits are these, divided by ``temperature``."""
        weight, bias = self.layers[-1]
        return dataclasses.replace(self, layers=(*self.layers[:-1], (weight / temperature, bias / temperature)))

    def score(self, features: FeatureSource, rows: Indices) -> Array:
        """(n, C) probabilities of (n,) ``rows`` of (M, D) features, which are read block by block."""
        return Scores(self, features.__getitem__, rows)[:]

    def to_tensors(self) -> dict[str, Array]:
        """The head as named arrays, from which ``from_tensors`` makes it again."""
        tensors: dict[str, Array] = {}
        if self.scaling == "standardise":
            tensors |= {"mean": self.mean, "scale": self.scale}
        for number, (weight, bias) in enumerate(self.layers):
            tensors |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": bias}
        return {name: np.ascontiguousarray(value) for name, value in tensors.items()}

    @classmethod
    def from_tensors(cls, kind: str, scaling: str, tensors: dict[str, Array]) -> "Head":
        """Inverse of ``to_tensors``. Raises ModelError if the arrays do not make a head."""
        try:
            count = sum(name.endswith(".weight") for name in tensors)
            layers = tuple((tensors[f"layers.{k}.weight"], tensors[f"layers.{k}.bias"]) for k in range(count))
            dim = layers[0][0].shape[1]
            mean, scale = tensors.get("mean", np.zeros(dim)), tensors.get("scale", np.ones(dim))
            sizes = [dim, *(len(bias) for _, bias in layers)]
            fits = [weight.shape[::-1] for weight, _ in layers] == list(itertools.pairwise(sizes))
        except (KeyError, IndexError, TypeError) as error:
            raise ModelError(f"the head's tensors are incomplete ({error})") from error
        floats = all(value.dtype in (np.float32, np.float64) for value in tensors.values())
        finite = floats and all(np.isfinite(value).all() for value in tensors.values()) and (scale > 0).all()
        known = kind in KINDS and scaling in SCALINGS and (scaling == "standardise") == ("mean" in tensors)
        if not (fits and finite and known and mean.shape == scale.shape == (dim,)):
            raise ModelError(f"the head's tensors do not fit together (kind {kind}, scaling {scaling})")
        return cls(kind, scaling, mean, scale, layers)  # type: ignore[arg-type]


class Scores:
    """(N, C) probabilities of a head for N rows, computed each time that they are asked for: all would take 4 C bytes a row.

    Attributes:
        shape: (N, C). dtype: the head's.
    """

    def __init__(self, head: Head, take: Callable[[Indices], Array], rows: Indices) -> None:
        """take: (n,) row numbers -> (n, D) features. rows: (N,) row numbers."""
        bias = head.layers[-1][1]
        self.shape, self.dtype = (len(rows), len(bias)), bias.dtype
        self._head, self._take, self._rows = head, take, rows

    def __getitem__(self, some: Indices | slice, *, block: int = 2048) -> Array:
        """Those of some of the rows: (n, C)."""
        rows = self._rows[some]
        scores = np.empty((len(rows), self.shape[1]), self.dtype)  # filled in place: never in memory twice
        for start in range(0, len(rows), block):
            scores[start : start + block] = self._head.probabilities(self._take(rows[start : start + block]))
        return scores


@dataclasses.dataclass(frozen=True)
class TorchSettings:
    """How a linear or MLP head is trained by mini-batches.

    Attributes:
        hidden: sizes of the MLP's hidden layers, from the embedding on.
        dropout: share dropped after each of them in training; a single one counts for all.
        epochs: exactly so many; None: as many as are best on held-out rows (early stopping).
        lr: learning rate of AdamW.
        batch_size: rows per step; None: by their number, 32 to 4,096.

    Raises:
        UsageError: a value that makes no sense.
    """

    hidden: tuple[int, ...] = (512,)
    dropout: tuple[float, ...] = (0.25,)
    epochs: int | None = None
    lr: float = 3e-3
    batch_size: int | None = None

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "batch size": self.batch_size}
        counts |= {f"hidden layer {k}": size for k, size in enumerate(self.hidden, 1)}
        for name, count in counts.items():
            if count is not None and not (type(count) is int and 1 <= count <= MAX_COUNT):
                raise UsageError(f"{name} must be a whole number from 1 to {MAX_COUNT}, found {count!r}")
        if not self.hidden:
            raise UsageError("hidden must name the size of one layer at least; without any it is clf linear")
        if not all(isinstance(share, float | int) and 0 <= share < 1 for share in self.dropout):
            raise UsageError(f"dropout must lie between 0 and below 1, found {', '.join(map(str, self.dropout))}")
        if len(self.dropout) not in (1, len(self.hidden)):
            raise UsageError(
                f"dropout has {len(self.dropout)} values for {len(self.hidden)} hidden layers; give one, or one per layer"
            )
        if not (isinstance(self.lr, float | int) and 0 < self.lr < float("inf")):
            raise UsageError(f"lr must be a positive number, found {self.lr}")

    @property
    def dropouts(self) -> tuple[float, ...]:
        """``dropout``, one per hidden layer."""
        return self.dropout * len(self.hidden) if len(self.dropout) == 1 else self.dropout


USUAL = TorchSettings()


@dataclasses.dataclass(frozen=True, eq=False)
class FittedHead:
    """A trained head and how it was chosen.

    Attributes:
        head: trained on all rows.
        fold_accuracies: out-of-fold accuracy of the chosen setting, per fold; empty without cross-validation.
        temperature: what the logits were divided by, in ``head``, ``pipeline`` and ``out_of_fold``; 1 without
            cross-validation.
        cv_accuracy, cv_log_loss: out of fold, corrected for the choice of the setting and of the temperature
            (``validation.py``).
        out_of_fold: (N, C) logits of each training row, from the head that was trained without its fold; None without
            cross-validation. kept: which rows they are of, where all would be more than ``MAX_LOGITS``; None: all.
        chosen: the setting: C, scaling, epochs, ...
        curve: every setting tried, with its cross-validated scores before any temperature.
        notes: sentences that the user should read (best C on the edge, no convergence, ...).
        history: of heads that are trained in epochs: a row per epoch (or part of one, of many rows): ``epoch``, ``train_loss``
            and ``train_accuracy`` over the epoch as it went, with dropout; and, where the training rows decided how long to
            train, ``held_out_loss`` and ``held_out_accuracy`` on the tenth of them held out for that, which the final head
            then trained on as well. Losses in nats, weighted as classes are.
        pipeline: the fitted scikit-learn pipeline (logreg only), for notebooks.
    """

    head: Head
    fold_accuracies: tuple[float, ...]
    chosen: dict[str, Any]
    curve: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    pipeline: Any = None
    cv_accuracy: float | None = None
    cv_log_loss: float | None = None
    out_of_fold: Array | None = None
    kept: Indices | None = None
    temperature: float = 1.0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def scale_features(x: Array, scaling: Scaling, mean: Array, scale: Array) -> Array:
    """Apply ``Head.scaling`` to (N, D) embeddings."""
    if scaling == "standardise":
        x = x - mean.astype(x.dtype)
        x /= scale.astype(x.dtype)
    elif scaling == "unit":
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.where(norms == 0, 1, norms)
    return x


def softmax(logits: Array) -> Array:
    """(N, C) logits -> probabilities, without overflow."""
    shifted: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def class_weights(y: Array, n_classes: int, *, balanced: bool) -> Array:
    """(C,) loss weights: all 1, or n / (C * n_c) as scikit-learn's "balanced"."""
    return len(y) / (n_classes * np.bincount(y, minlength=n_classes)) if balanced else np.ones(n_classes)
