"""What to do about a source of images, in sentences, each with its figure. In: ``Statistics``. Out: sentences, names as they are."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from featcache.system.display import quantity

if TYPE_CHECKING:
    from featcache.reports.source_stats.stats import Statistics

_UNEVEN = (
    1.5  # times as many images in the largest class as in the smallest, from which that is said; advice from _SKEWED on
)
_SKEWED = 3.0
_FEW = 10  # training images of a class: fewer leave hardly one for each fold of a cross-validation
SMALL = 224  # pixels of the shorter edge, what most backbones take
_NAMED = 3  # classes at most in a sentence


def advice(found: "Statistics") -> list[str]:
    """The sentences, what a score has to beat first."""
    parts = (_constant, _copies, _balance, _gaps, _files, _pictures)
    return [sentence for part in parts for sentence in part(found)]


def _constant(found: "Statistics") -> Iterator[str]:
    if not found.constant:
        if len(found.unreadable) < found.images:
            yield "No image has a label: this source can be predicted on, not trained on."
        return
    if found.constant["all"]["classes"] < 2:
        yield f"All labelled images are {found.constant['all']['label']}: one class alone cannot be told from anything."
        return
    held_out: list[str] = [split for split in ("val", "test") if split in found.constant]
    scores = []
    for split in held_out or ["all"]:
        facts = found.constant[split]
        scores.append(
            f"{facts['accuracy']:.1%} of {images(facts['n'])}{f' of {split}' if held_out else ''} ({facts['label']})"
        )
    balanced = " and ".join({f"{found.constant[split]['balanced_accuracy']:.1%}": 0 for split in held_out or ["all"]})
    yield (
        f"Always answering the largest class is right for {' and '.join(scores)}, balanced accuracy {balanced}: what a model "
        "has learnt is what it scores beyond that."
    )


def _balance(found: "Statistics") -> Iterator[str]:
    """How even the classes are among the training images."""
    there = {name: count for name, count in training_counts(found).items() if count}
    if len(there) < 2:
        return
    smallest, *_, largest = sorted(there, key=lambda name: there[name])
    ratio = there[largest] / there[smallest]
    figures = f"{there[largest]:,} of {largest}, {there[smallest]:,} of {smallest}"
    if ratio >= _SKEWED:
        yield (
            f"The largest class has {ratio:.1f} times as many training images as the smallest ({figures}): compare balanced "
            "accuracy and recall per class, try fit-head --class-weight balanced, and label more of the small ones."
        )
    elif ratio >= _UNEVEN:
        yield f"Classes are a little uneven, {ratio:.1f} to 1 in training images ({figures}): look at recall per class, too."
    elif ratio > 1:
        yield f"Classes are even, {ratio:.2f} to 1 in training images ({figures}): plain accuracy is a fair measure."
    else:
        one = quantity(there[largest], "training image")
        yield f"Each class has {one}: classes are of one size, plain accuracy is a fair measure."
    if few := sorted((count, name) for name, count in there.items() if count < _FEW):
        names = [f"{name} ({count})" for count, name in few]
        yield (
            f"Fewer than {_FEW} training images: {some(names)}. Label more of {'it' if len(few) == 1 else 'these'} first."
        )


def training_counts(found: "Statistics") -> dict[str, int]:
    """Training images of each class: those of train, or all where there are no splits."""
    splits = ["train"] if set(found.splits) - {"none"} else list(found.splits)
    return {name: sum(counts.get(split, 0) for split in splits) for name, counts in found.classes.items()}


def _gaps(found: "Statistics") -> Iterator[str]:
    """What is missing where."""
    if empty := [name for name, counts in found.classes.items() if not any(counts.values())]:
        yield f"Without a single readable image: {some(empty)}."
    splits = [split for split in found.splits if split != "none"]
    for split in splits:
        names = [name for name, counts in found.classes.items() if any(counts.values()) and not counts[split]]
        if names and split == "train":
            yield f"In no training image: {some(names)}. No model can answer {'these' if len(names) > 1 else 'it'}."
        elif names and "train" in splits:
            yield f"Not in {split}: {some(names)}. How well {'they are' if len(names) > 1 else 'it is'} known stays open there."
    if (unlabelled := sum(found.unlabelled.values())) and found.constant:
        yield f"{images(unlabelled)} without a label {'is' if unlabelled == 1 else 'are'} left out of training and scores."
    if not splits and found.constant:
        yield "There are no splits: fit-head cross-validates, finetune holds out a tenth."


def _files(found: "Statistics") -> Iterator[str]:
    if n := len(found.unreadable):
        yield f"{images(n)} cannot be read; extract will refuse {'it' if n == 1 else 'them'} for the same reasons."
    if found.turned:
        yield (
            f"EXIF data turns {images(found.turned)}. featcache shows them upright; programs that ignore it see them lying."
        )
    deep = sum(count for mode, count in found.modes.items() if mode.startswith("I;16"))
    if deep:
        yield f"{images(deep)} of 16 bits: if their samples use fewer, extract needs --white-level."


def _copies(found: "Statistics") -> Iterator[str]:
    counts = found.copies
    if n := counts["across_labels"]:
        what = "One picture lies" if n == 1 else f"{n:,} pictures lie"
        yield f"{what} under two labels or more: at least one of them is wrong. Look at these first."
    if n := counts["across_splits"]:
        what = "image of val or test is a copy" if n == 1 else "images of val or test are copies"
        yield f"{n:,} {what} of what an earlier split holds: a score on them flatters. Remove them there."
    if n := counts["within"]:
        yield f"{images(n)} repeat{'s' if n == 1 else ''} another of the same split, byte for byte."


def _pictures(found: "Statistics") -> Iterator[str]:
    if found.small >= 0.05 * found.readable > 0:
        yield (
            f"{found.small / found.readable:.0%} of the images have an edge shorter than {SMALL} pixels, what most backbones take: "
            "they will be enlarged, which adds no detail."
        )


def images(n: int) -> str:
    """``1 image``, ``1,234 images``."""
    return quantity(n, "image")


def some(names: Sequence[str]) -> str:
    """The first few names, and how many there are more."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
