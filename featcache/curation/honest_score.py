"""Accuracy on honest terms: as given, without leaks, and without label suspects in training.

In: features, labels, splits and groups of copies. Out: a ``Score`` for each. Val and test are never cleaned by the model's own
opinion: only images whose copies train are taken out of them.
"""

import dataclasses
from typing import Literal

Terms = Literal["as_given", "without_leaks", "without_suspects"]


@dataclasses.dataclass(frozen=True)
class Score:
    """One accuracy.

    Attributes:
        split: ``val``, ``test``, or ``out_of_fold``: of training rows, each by a head that was trained without its fold.
        terms: ``as_given``: as ``fit-head`` has it; ``without_leaks``: and without images that copy, exactly or nearly, a
            training image (out of fold: with all copies of an image in one fold); ``without_suspects``: and with a head
            that was trained without its label suspects.
        accuracy: 0..1. interval: [low, high] of 95 %, ``heads.metrics.accuracy_interval``. n: images that are scored.
        left_out: images that these terms leave out of the score, or of training for ``without_suspects``.
    """

    split: str
    terms: Terms
    accuracy: float
    interval: list[float]
    n: int
    left_out: int
