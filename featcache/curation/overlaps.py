"""Classes that overlap so much that they may be one. In: labels and out-of-fold probabilities. Out: ``Overlap``."""

import dataclasses

from featcache.heads.head import Array


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Two classes that out-of-fold probabilities hardly tell apart.

    Attributes:
        first, second: positions among the classes. score: 0..1, see ``find_overlaps``. reason: a sentence.
    """

    first: int
    second: int
    score: float
    reason: str


def find_overlaps(y: Array, probabilities: Array) -> list[Overlap]:
    """Pairs of classes, the most alike first."""
    return []
