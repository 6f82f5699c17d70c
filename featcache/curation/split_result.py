"""What ``split`` did: counts, groups, and what could not be had. In: images with their splits. Out: text and JSON."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.images.groups import Indices
from featcache.images.layout import some
from featcache.images.source import ImageList
from featcache.spec import SPLITS
from featcache.system.display import Shown, aligned, count_rows, printable, quantity

Groups = Literal["exact", "near", "none"]
_MAY_DIFFER = 0.01  # of all images, without a word about it


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Split(Shown):
    """What ``split`` did with N images.

    Attributes:
        images: the list, with its new splits; those without one are left out: without a label where others have one, or no file.
        groups: (N,) for each image the first of its group. output, folder: what was written; None: nothing.
        asked: share of val and test, of those that are dealt. kind, column: what groups are made of.
        kept: images that had a split and keep it. moved: split -> images that were in train.
        left_out: reason -> images.
        next: the command that reads the table. seconds: of the whole call.
    """

    images: ImageList
    groups: Indices
    output: Path | None
    folder: Path | None
    asked: Mapping[str, float]
    kind: Groups
    column: str | None
    kept: int
    moved: Mapping[str, int]
    left_out: Mapping[str, int]
    next: str
    seed: int
    seconds: float = 0.0

    _shown = ("output", "folder", "counts", "kind", "column", "kept", "seconds")

    @property
    def splits(self) -> npt.NDArray[np.uint8]:
        """(N,) positions in ``spec.SPLITS``, 0: left out."""
        return self.images.splits

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {name: int((self.splits == SPLITS.index(name)).sum()) for name in ("train", "val", "test")}

    @property
    def together(self) -> tuple[int, int]:
        """How many groups of several images there are among those that are dealt, and how many images lie in them."""
        sizes = self._sizes
        return int((sizes > 1).sum()), int(sizes[sizes > 1].sum())

    @functools.cached_property
    def unmet(self) -> tuple[str, ...]:
        """Sentences on what could not be had, and why."""
        n, found = sum(self.counts.values()), []
        for name, share in self.asked.items():
            got = self.counts[name]
            if abs(got - share * n) > max(_MAY_DIFFER * n, 1):
                why = "; ".join(self._reasons(n))
                found.append(f"{name} is {got / n:.1%} of the images, {share:.1%} was asked for{why and f': {why}'}")
            if lacking := self._lacking(name):
                what = "too few images" if self._sizes.max() == 1 else "too few images or groups"
                found.append(f"no {name} image of {some(lacking)}: {what}")
        return tuple(found)

    @property
    def _sizes(self) -> Indices:
        """Images in each group, of those that are dealt."""
        return np.unique(self.groups[self.splits > 0], return_counts=True)[1]

    def _reasons(self, n: int) -> Iterator[str]:
        """Why a share was missed."""
        rows = np.flatnonzero(self.splits)
        if self.kept:
            yield f"{quantity(self.kept, 'image keeps', 'images keep')} the split they had, --reassign deals them anew"
        if (most := int(self._sizes.max())) > max(_MAY_DIFFER * n, 1):
            yield f"the largest group holds {quantity(most, 'image')}"
        pairs = np.unique(np.stack([self.images.labels[rows], self.groups[rows]]), axis=1)
        if single := int((np.unique(pairs[0], return_counts=True)[1] == 1).sum()):
            yield f"{quantity(single, 'class is', 'classes are')} one image or group, which trains"

    def _lacking(self, split: str) -> list[str]:
        """Classes of which no image is in it."""
        labels = self.images.labels
        absent = np.setdiff1d(labels[self.splits > 0], labels[self.splits == SPLITS.index(split)])
        return [printable(self.images.classes[label]) for label in absent.tolist() if label >= 0]

    def lines(self) -> list[str]:
        """As text for a terminal, names harmless to it."""
        written = [str(path) for path in (self.output, self.folder) if path is not None]
        counts, used = self.counts, self.splits > 0
        n = sum(counts.values())
        titles = [printable(name) for name in self.images.classes]
        table = count_rows(titles, self.images.labels[used], self.splits[used], names=SPLITS)
        asked = ", ".join(
            f"{name} {counts[name]:,} of {share * n:,.0f} asked for ({counts[name] / n:.1%})"
            for name, share in self.asked.items()
        )
        lines = [f"{' and '.join(written) or 'nothing written'}: {quantity(n, 'image')}; {asked}", *aligned(table)]
        groups, inside = self.together
        if groups:
            what = {"exact": "copies", "near": "copies and near copies", "none": ""}[self.kind]
            words = " and ".join(filter(None, [what, self.column and printable(self.column)]))
            lines.append(f"  {quantity(inside, 'image')} in {quantity(groups, 'group')} kept together ({words})")
        if self.kept:
            moved = "".join(
                f", {quantity(count, 'moves', 'move')} from train to {name}" for name, count in self.moved.items()
            )
            lines.append(f"  {quantity(self.kept, 'image keeps', 'images keep')} the split they had{moved}")
        if self.left_out:
            lines.append(
                "  left out: " + ", ".join(f"{count:,} with {reason}" for reason, count in self.left_out.items())
            )
        return [*lines, *(f"  not met: {sentence}" for sentence in self.unmet)]

    def to_json(self) -> dict[str, Any]:
        """What was done, as JSON values; the assignment itself is in the table."""
        table = np.zeros((len(self.images.classes) + 1, len(SPLITS)), np.int64)
        np.add.at(table, (self.images.labels, self.splits), 1)
        names = SPLITS[1:]
        classes = {
            name: dict(zip(names, row[1:], strict=True))
            for name, row in zip(self.images.classes, table.tolist(), strict=False)
        }
        n_groups, inside = self.together
        return {
            "output": self.output and str(self.output),
            "folder": self.folder and str(self.folder),
            "images": sum(self.counts.values()),
            "splits": self.counts,
            "asked": dict(self.asked),
            "classes": classes,
            "groups": {"kind": self.kind, "column": self.column, "together": n_groups, "images": inside},
            "kept": self.kept,
            "moved": dict(self.moved),
            "left_out": dict(self.left_out),
            "unmet": list(self.unmet),
            "next": self.next,
            "seed": self.seed,
            "seconds": self.seconds,
        }
