"""What to do next, in sentences with their figures. In: a ``Subject``. Out: a few ``Advice``, the most urgent first.

The rules are conservative: each needs evidence that chance explains badly, and none promises a gain. Where a number is a
threshold, its reason stands beside it. When no rule applies, that is said.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from markupsafe import Markup

from featcache.backbones.catalog import ALIASES, counted
from featcache.heads.confident import wrong_labels
from featcache.heads.head import Array
from featcache.heads.metrics import chance_of_at_most
from featcache.models.scoring import HELD_OUT
from featcache.reports.elements.numbers import count_text, number_text, percent_text
from featcache.reports.model_report.subject import Subject
from featcache.system.display import printable, quantity

# A difference of five points is one that people act on: where the interval spans ten, the score cannot show it.
_WIDE = 0.10
# A class counts as recognised worse than all only if its recall would be that low by chance once in twenty reports: 0.05,
# divided by the number of classes looked at (Bonferroni), as among a hundred classes some always look bad.
_RARE = 0.05
# So few mistakes that the next one changes the picture: to change the model for their sake is to fit the test images.
_FEW = 3
# Fewer images a class than this, and fine-tuning is a gamble. Of the tutorials whose figures are known, it won 2.5 points with
# some 60 images a class (Caltech-101) and lost 3.3 with 120 (ants and bees); with fewer none reports a gain.
_FEW_PER_CLASS = 50
# A network of this part of another's cost: names of one family differ by less, and a change of family is what helps.
_SMALL = 0.5
_ROOM = (
    0.98  # accuracy from which on a stronger backbone has too little to win to be worth another pass over the images
)
_MOST_CLASSES = 3  # that are named


@dataclasses.dataclass(frozen=True)
class Advice:
    """A sentence or two. select: what ``part.select`` takes, for the images meant; link: the words to click."""

    words: Markup
    link: str = ""
    select: Any = None


def _said(words: str, *names: object) -> Markup:
    """``words``, names in the place of each {}: what they hold is text, in its own direction of writing."""
    return Markup(words).format(*(Markup("<bdi>{}</bdi>").format(printable(str(name))) for name in names))


def advise(subject: Subject, *, learning: str = "") -> list[Advice]:
    """What to do next.

    Args:
        learning: what twice as many training images would be worth, as a sentence; empty where it is not known.
    """
    found = [*_about_the_score(subject), *_about_labels(subject), *_about_classes(subject, learning=learning)]
    found += _about_the_model(subject)
    if found:
        return found
    return [
        Advice(_said("Nothing stands out: no class is recognised worse than chance explains, no label is in doubt."))
    ]


def suspects(subject: Subject) -> Array:
    """Rows whose label may be wrong, the surest first (``heads.confident``); none where some rows trained the head."""
    if subject.scores["label_suspects"] is None:
        return np.empty(0, np.intp)
    return wrong_labels(subject.scored.y, subject.scored.probabilities)


def largest_class(subject: Subject) -> tuple[str, float]:
    """The class that occurs most among the rows, and what always answering it would score."""
    counts = np.bincount(subject.scored.y, minlength=len(subject.model.classes))
    return subject.model.classes[int(counts.argmax())], float(counts.max() / len(subject.scored))


def _about_the_score(subject: Subject) -> Iterator[Advice]:
    scores = subject.scores
    low, high = map(percent_text, scores["accuracy_interval"])
    if subject.seen is not None and (count := int(subject.seen.sum())):
        new = scores["accuracy_without_copies"]
        one = scores["n"] == 1
        what = ("it" if one else "all of them") if new is None else f"{count_text(count)} of them"
        then = "score images that it has not seen" if new is None else f"on the others accuracy is {percent_text(new)}"
        yield Advice(_said(f"Do not rely on this score. Training has seen {what}, so that it flatters: {then}."))
    name, share = largest_class(subject)
    if share == 1:
        words = "Score images of other classes, too. All of these are {}: nothing is known of the others, or of what is taken for it."
        yield Advice(_said(words, name))
    elif scores["accuracy_interval"][0] <= share:
        worse = scores["accuracy_interval"][1] < share
        constant = f"which is right in {percent_text(share)}: the interval {f'ends at {high}' if worse else f'begins at {low}'}"
        than = f"{'is worse' if worse else 'may be no better'} than always answering {{}}, {constant}"
        words = f"Check labels and images first. Accuracy {than}."
        yield Advice(_said(words, name))
    if np.ptp(scores["accuracy_interval"]) > _WIDE:
        n = count_text(scores["n"])
        words = (
            f"Score more images. {n} fix the accuracy only to within {low} to {high}; four times as many halve that."
        )
        yield Advice(_said(words))


def _about_labels(subject: Subject) -> Iterator[Advice]:
    if count := len(suspects(subject)):
        images = "1 image whose label" if count == 1 else f"{count_text(count)} images whose labels"
        cache = "FEATURES.h5" if subject.cache is None else str(subject.cache.path)
        words = f"Look at {images} may be wrong: that many contradict the probabilities (confident learning). "
        words += "<code>featcache audit {} -o audit/</code> looks at all images, copies and outliers, too."
        yield Advice(_said(words, cache), "Show it" if count == 1 else "Show them", "suspects")


def _about_classes(subject: Subject, *, learning: str) -> Iterator[Advice]:
    counts = np.array(subject.scores["confusion"])
    sums, hits, accuracy = counts.sum(axis=1), np.diag(counts), subject.scores["accuracy"]
    there = np.flatnonzero(sums)
    chances = {k: chance_of_at_most(int(hits[k]), int(sums[k]), accuracy) for k in there.tolist()}
    worse = sorted((k for k in chances if chances[k] < _RARE / len(there)), key=chances.__getitem__)
    trained = images_trained_on(subject)
    for k in worse[:_MOST_CLASSES]:
        yield _about_class(subject, k, counts, trained)
    if learning:
        yield Advice(_said("{}", learning))


def _about_class(subject: Subject, k: int, counts: Array, trained: Array | None) -> Advice:
    classes = subject.model.classes
    n, right = int(counts[k].sum()), int(counts[k, k])
    others = np.where(np.arange(len(counts)) == k, 0, counts[k])
    other, most = int(others.argmax()), int(others.max())
    recall, accuracy = percent_text(right / n), percent_text(subject.scores["accuracy"])
    words = f"{recall} of its {quantity(n, 'image is', 'images are')} recognised, {accuracy} of all"
    words += "." if trained is None else f"; it trained on {quantity(int(trained[k]), 'image')}."
    names = [classes[k]]
    # Most of the missed in one other class: what tells these two apart is missing, not images of one of them.
    if 2 * most > n - right and most > _FEW:
        words += f" Most of the missed are called {{}} ({most} of {n - right})."
        names.append(classes[other])
    # Twice the usual number already: more of the same is the less likely cure.
    plenty = trained is not None and trained[k] >= 2 * np.median(trained[trained > 0])
    do = "Look at the labels of {}, and at what it looks like." if plenty else "Label more of {}."
    return Advice(_said(f"{do} {words}", *names), "Show the missed", {"label": k, "correct": 0})


def images_trained_on(subject: Subject) -> Array | None:
    """(C,) training images of each class; None where the model does not know."""
    known, n = subject.model.training_rows(), len(subject.model.classes)
    if known is None:
        return None
    return np.bincount(known.labels[(known.labels >= 0) & (known.labels < n)], minlength=n)


def _about_the_model(subject: Subject) -> Iterator[Advice]:
    scores, model = subject.scores, subject.model
    n, mistakes = count_text(scores["n"]), scores["n"] - round(scores["accuracy"] * scores["n"])
    if largest_class(subject)[1] == 1:  # of the other classes nothing is known
        return
    if mistakes <= _FEW:
        what = quantity(mistakes, "mistake") if mistakes else "no mistake"
        leave = f"in {quantity(scores['n'], 'image')} leave{'s' * (mistakes < 2)} nothing to choose another one by"
        yield Advice(_said(f"Keep this model: {what} {leave}."))
        return
    if (stronger := _stronger(model.spec.backbone, scores["accuracy"])) is not None:
        yield stronger
    trained = images_trained_on(subject)
    if model.manifest.get("finetuned") or trained is None or not trained.any():
        return
    usual = int(np.median(trained[trained > 0]))
    if usual < _FEW_PER_CLASS:
        few = f"{usual} training images a class (the median) are few for it"
        yield Advice(_said(f"Do not fine-tune yet: {few}. More labels come first."))
        return
    words = f"Fine-tuning is worth a try: {count_text(mistakes)} of {n} are wrong, and there are {count_text(usual)} training "
    words += "images a class (the median). <code>featcache finetune SOURCE -o {}-ft --init {}</code> keeps this head unless it "
    yield Advice(_said(words + "finds something better.", model.path.name, model.path.name))


def _stronger(backbone: str, accuracy: float) -> Advice | None:
    """A backbone to try, if this one is much smaller and there is room above ``accuracy``."""
    own, other = counted().get(backbone), counted()[ALIASES["base"]]
    if own is None or not own.macs or accuracy >= _ROOM or own.macs > _SMALL * other.macs:
        return None
    costs = [number_text(each.macs / 1e9, 2) for each in (own, other)]
    words = f"Try a stronger backbone first: {{}} takes {costs[0]} GFLOP an image, featcache's base {costs[1]}. "
    return Advice(_said(words + "<code>featcache extract SOURCE -o base.h5 --backbone base</code>", backbone))


def headline(subject: Subject) -> Markup:
    """How many are right, how sure that is, and against what."""
    scores, split = subject.scores, subject.scored.split
    right, (low, high) = round(scores["accuracy"] * scores["n"]), scores["accuracy_interval"]
    tuned, chosen = bool(subject.model.manifest.get("finetuned")), scores["chosen_on"]
    which = {
        HELD_OUT: " of val" if tuned else " held out of the training, scored by heads that had not seen them,",
        "train": " of the training itself",
        "all": "",
    }.get(split, f" of {split}")
    if chosen:
        some = "which" if chosen == scores["n"] else f"{count_text(chosen)} of which"
        which += f", on {some} epoch and mixture were chosen,"
    name, share = largest_class(subject)
    chance = 1 / len(subject.model.classes)
    words = (
        f"{count_text(right)} of {quantity(scores['n'], 'image')}{which} {'is' if scores['n'] == 1 else 'are'} classified correctly: "
        f"{percent_text(scores['accuracy'])}, 95% interval {percent_text(low)} to {percent_text(high)}. Always answering {{}} "
        f"would score {percent_text(share)}, guessing {percent_text(chance)}."
    )
    return _said(words, name)
