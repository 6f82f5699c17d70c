"""Are two sets of embeddings the same for every purpose? Measured on a few images, before anything is stored. numpy only.

In: embeddings (N, D) of the plain float32 network, and of the same images by another precision, form, storage type or
decoder. Out: an ``Agreement``. A head standardises, or learns an intercept: what all images share is nothing to it. So the
cosine is also taken after the sample's mean was taken away, and the error is measured by the spread that is left.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# Below these, features are no longer the network's own.
MEAN_COSINE, MIN_COSINE = 0.9995, 0.995
MAX_ERROR = math.sqrt(2 * (1 - MEAN_COSINE))  # of the spread, 3.2 %: the chord of the angle that MEAN_COSINE allows
# Folding and fusing in float32 only round otherwise: 1 - cosine is below 1e-11 in 45 architectures. What differs more is
# wrong, also in length, which a cosine does not see.
_MIN_COSINE_FP32, _MAX_ERROR_FP32 = 1 - 1e-6, 1e-3


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far other embeddings are from the reference; NaN where a value is not finite, or there is no spread.

    Attributes:
        mean_cosine, min_cosine: over rows, of the embeddings as they are.
        centred_mean_cosine, centred_min_cosine: over rows, the reference's mean taken away from both.
        error: root mean square of the differences' lengths, relative to that of the centred reference's.
    """

    mean_cosine: float
    min_cosine: float
    centred_mean_cosine: float
    centred_min_cosine: float
    error: float

    @property
    def passes(self) -> bool:
        """Whether both may be mixed. Always false where there is no spread to measure by: one image proves nothing."""
        means, minima = (self.mean_cosine, self.centred_mean_cosine), (self.min_cosine, self.centred_min_cosine)
        return (
            all(value >= MEAN_COSINE for value in means)
            and all(value >= MIN_COSINE for value in minima)
            and self.error <= MAX_ERROR
        )

    @property
    def shortfall(self) -> str:
        """What is too much, in words that go behind "change"; empty if it passes, or nothing can be measured."""
        if self.error > MAX_ERROR:
            return f"these embeddings by {100 * self.error:.1f} % ({100 * MAX_ERROR:.1f} % is allowed)"
        if (lowest := min(self.min_cosine, self.centred_min_cosine)) < MIN_COSINE:
            return f"one of these embeddings too much (cosine {lowest:.4f}, {MIN_COSINE} is needed)"
        if (mean := min(self.mean_cosine, self.centred_mean_cosine)) < MEAN_COSINE:
            return f"these embeddings too much (mean cosine {mean:.5f}, {MEAN_COSINE} is needed)"
        return ""

    def to_json(self) -> dict[str, float | None]:
        """Plain values for the provenance; JSON has no NaN, so None."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}

    def __str__(self) -> str:
        text = f"cosine mean {self.mean_cosine:.6f} min {self.min_cosine:.6f}"
        if math.isnan(self.error):
            return f"{text}, no spread to measure an error by"
        centred = f"centred mean {self.centred_mean_cosine:.6f} min {self.centred_min_cosine:.6f}"
        return f"{text}, {centred}, error {self.error:.2%} of the spread"


def agreement(reference: Array, other: Array) -> Agreement:
    """Compare two (N, D) arrays row by row; N at least 1."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    with np.errstate(all="ignore"):
        mean = a.mean(axis=0)
        spread = float(np.sqrt(np.square(a - mean).sum(axis=1).mean()))
        if not spread > 1e-9 * float(np.linalg.norm(mean)):  # false for NaN: nothing but rounding tells the rows apart
            return Agreement(*cosine(a, b), math.nan, math.nan, math.nan)
        error = float(np.sqrt(np.square(a - b).sum(axis=1).mean()) / spread)
        return Agreement(*cosine(a, b), *cosine(a - mean, b - mean), error)


def cosine(reference: Array, other: Array) -> tuple[float, float]:
    """Mean and minimum over rows of the cosine between two (N, D) arrays; NaN if a value is not finite."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    same = np.all(a == b, axis=1)  # also covers rows of zeros, which have no direction
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)  # inf or nan where a value is
        values = np.where(same, 1.0, (a * b).sum(axis=1) / np.where(norms == 0, np.nan, norms))
    return float(values.mean()), float(values.min())


def only_rounded(reference: Array, other: Array) -> bool:
    """Whether ``other`` (N, D) differs from float32 ``reference`` by no more than the order of its operations explains."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    with np.errstate(all="ignore"):
        lengths, errors = np.linalg.norm(a, axis=1), np.linalg.norm(a - b, axis=1)
    return cosine(a, b)[1] >= _MIN_COSINE_FP32 and bool((errors <= _MAX_ERROR_FP32 * lengths).all())


def fits_float16(features: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(N,) whether each row of (N, D) survives rounding to float16: no overflow, no underflow, cosine as in the check."""
    # A value is rounded by 2**-11 of itself, or, where float16 ends, by 2**-25. So the cosine is above 0.9955 for sure if the
    # largest value is finite in float16 and 11 times the most that sqrt(D) roundings of 2**-25 come to: hardly a row is left.
    largest = np.maximum(features.max(axis=1, initial=0), -features.min(axis=1, initial=0))
    fits = np.asarray((largest <= 65504) & (largest >= 11 * 2.0**-25 * features.shape[1] ** 0.5))
    if not fits.all():
        fits[~fits] = _fits_float16(features[~fits])
    return fits


def _fits_float16(features: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """The same, of any row, at 35 times the cost."""
    with np.errstate(all="ignore"):
        a, b = features.astype(np.float64), features.astype(np.float16).astype(np.float64)
        cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return np.asarray((cosines >= MIN_COSINE) | (a == 0).all(axis=1))


def survives_rounding(features: npt.NDArray[np.float32]) -> bool:
    """Whether embeddings (N, D) may be stored as float16: each row fits, and what tells them apart is left."""
    if not fits_float16(features).all():
        return False
    found = agreement(features, features.astype(np.float16))
    return found.passes or math.isnan(found.error)  # of a single image there is nothing to tell apart
