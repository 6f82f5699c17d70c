"""``Finding``: a row of a cache, what is remarkable about it, and why. What every file of this room returns lists of."""

import dataclasses
from typing import Literal

Kind = Literal["exact_copy", "near_copy", "label", "outlier", "off_topic", "dark", "blurred", "blank", "tiny"]
KINDS: tuple[Kind, ...] = (
    "exact_copy",
    "near_copy",
    "label",
    "outlier",
    "off_topic",
    "dark",
    "blurred",
    "blank",
    "tiny",
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One image, one thing to look at.

    Attributes:
        kind: of ``KINDS``. row: its number in the cache.
        score: 0..1, what to look at first within its kind; what it measures is said where it is computed.
        reason: a sentence with its figures, without names of images or classes.
        group: findings of one kind with the same number belong together, from 0; None: it stands alone.
        verified: of a near copy whether the pixels were compared and agree; None: they were not.
        other: the row to compare it with; None: there is none.
        suggested: of a label suspect the class that fits better, a position among the classes; None: none does.
    """

    kind: Kind
    row: int
    score: float
    reason: str
    group: int | None = None
    verified: bool | None = None
    other: int | None = None
    suggested: int | None = None
