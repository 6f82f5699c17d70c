"""``report``: the page about a model. In: a model; labelled images, a cache or nothing. Out: one HTML file.

The page is a list of sections, each made from the same ``Subject``: a part that is added is one line in ``_sections``.
"""

import dataclasses
import logging
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from featcache.cache.cache import FeatureCache, is_cache
from featcache.errors import FeatcacheError, SourceError, UsageError
from featcache.heads.head import Array
from featcache.images.archives import is_home
from featcache.images.source import AnySource, ImageList, Source, list_images
from featcache.models.limits import Limits, rows_that_trained
from featcache.models.model import Model, load_model
from featcache.models.scoring import HELD_OUT, Scored, check_split, score_cache, score_held_out, score_images
from featcache.reports.contact_sheet import sheet_beside
from featcache.reports.elements.cards import cards_data
from featcache.reports.elements.numbers import count_text, percent_text
from featcache.reports.elements.page import Section, check_page_path, publish_page, render_sections
from featcache.reports.elements.pictures import MISSING, NO_FOLDER, NO_TIME, Pictures, guess_root
from featcache.reports.elements.projection import Method, check_method
from featcache.reports.figures import charts_in, check_figures, write_figures
from featcache.reports.model_report.advice import advise, headline, largest_class, suspects
from featcache.reports.model_report.calibration import calibration_section
from featcache.reports.model_report.comparison import (
    check_comparable,
    comparison_section,
    other_probabilities,
    provenance_section,
)
from featcache.reports.model_report.confusion import classes_section, confusion_section
from featcache.reports.model_report.embedding_map import report_map
from featcache.reports.model_report.learning import (
    choice_section,
    finetuned_section,
    learning_section,
    training_section,
)
from featcache.reports.model_report.subject import Subject, make_subject
from featcache.reports.notebook import framed
from featcache.reports.scores import chosen_on
from featcache.spec import SPLITS
from featcache.system.display import Shown, printable, quantity
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_runtime_options

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress

log = logging.getLogger("featcache")
_QUICK_SECONDS = 0.5  # for pictures of a page that is written on the way
_LEAST_CERTAIN = 48  # cards of that list


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Shown):
    """A page that was written: where, of how many images, how many of them have a card, bytes, and seconds."""

    report: Path
    images: int
    cards: int
    bytes: int
    seconds: float

    _shown = ("report", "images", "cards", "bytes", "seconds")

    def _repr_html_(self) -> str:
        """In a notebook: the page, as long as it is where it was written."""
        try:
            return framed(self.report.read_text(encoding="utf-8"))
        except OSError:
            return super()._repr_html_()


def report(
    model: Model | AnyPath,
    source: AnySource | None = None,
    *,
    output: AnyPath | None = None,
    pictures: AnyPath | None = None,
    split: str | None = None,
    against: Model | AnyPath | None = None,
    evidence: AnyPath | None = None,
    figures: AnyPath | None = None,
    map: Method = "auto",
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: "Progress | None" = None,
) -> Report:
    """Write a page about a model: scores, mistakes with their pictures, where it came from.

    Args:
        model: a model folder, or what ``load_model`` returned.
        source: labelled images, which are embedded; or a cache of the model's own spec, for which nothing is computed again.
            Without it, what the model keeps of images that did not train it.
        output: the page; ``MODEL.report.html`` beside the model when None. An earlier page is replaced, nothing else is.
        pictures: the folder of the images, if ``source`` is not; they are found by their digests.
        split: as in ``evaluate``. against: another model of the same classes, to compare with on the same images.
        evidence: with images as ``source``, the cache that the model was fit on, for the training images nearest to each; of a
            cache that holds them it is not needed.
        figures: a folder to write the charts of the page to, as SVG files.
        map: of embeddings, with a cache as ``source``: ``pca``; ``tsne``, which needs the ``report`` extra; ``auto``: t-SNE where
            it takes less than a minute; ``none``.
        device, workers, batch_size, progress: as in ``predict``, for images.

    Raises:
        UsageError: impossible options; the model keeps no held-out scores and there is no source. Otherwise as ``evaluate``
        and ``page.check_page_path``; StorageError: a figure would replace a file that is none.
    """
    started = time.perf_counter()
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    check_split(split)
    check_method(map)
    if map in ("pca", "tsne") and (source is None or not is_cache(Source.of(source).path)):
        raise UsageError(f"--map {map} needs embeddings: give a cache as SOURCE, or leave it out")
    model = _checked(model, source)
    output = page_beside(model.path) if output is None else as_path(output)
    check_page_path(output)
    drawn = None if figures is None else as_path(figures)
    if drawn is not None:
        check_figures(drawn)
    root = None if pictures is None else as_path(pictures)
    if root is not None and not is_home(root):
        raise SourceError(f"--source {root} is no folder; give the folder that holds the images")
    other = None if against is None else _other(model, against)
    compared = None if evidence is None else _evidence(model, evidence, source)
    options = {"device": device, "workers": workers, "batch_size": batch_size, "progress": progress}
    images, cache = _opened(model, source, other)
    limits = Limits.of(model, evidence=None if images is None else evidence)
    scored = _score(model, images, cache, split=split, limits=limits, options=options)
    if root is None:
        root = scored.root if scored.root is not None else _guess(cache)
    subject = make_subject(model, scored, cache=cache, evidence=compared, pictures=Pictures(root))
    if pictures is not None and (absent := _not_in_folder(subject)):
        log.warning(absent)
    probabilities = None
    if other is not None:
        of_other = _score(other, images, cache, split=scored.split, limits=Limits(other.classes), options=options)
        probabilities = other, other_probabilities(model, scored, other, of_other)
    return write_report(subject, output, started=started, against=probabilities, figures=drawn, map=map)


def report_beside(
    model: AnyPath,
    *,
    cache: Path | None = None,
    pictures: Path | None = None,
    scored: Scored | None = None,
    quick: bool = True,
) -> list[Path]:
    """Write ``MODEL.report.html`` beside a model, about rows that are at hand, and where their pictures are at hand, too, their
    contact sheet, ``MODEL.val.png``; what was written.

    Args:
        cache: what it was fit on, or was scored on; None: the page is about what the model keeps of images that did not train it.
        pictures: their folder; that of ``scored``, or one beside the cache that holds its images, when None.
        scored: rows that are scored already. quick: with what takes less than two seconds. Raises as ``report``.
    """
    started = time.perf_counter()
    loaded = load_model(as_path(model))
    check_page_path(output := page_beside(loaded.path))
    opened = None if cache is None else FeatureCache.open(cache)
    if scored is None:
        there = () if opened is None else np.unique(opened.rows.splits[opened.y >= 0])
        split = next((name for name in ("test", "val") if SPLITS.index(name) in there), None)
        scored = _score(loaded, None, opened, split=split, limits=Limits(loaded.classes), options={})
    root = pictures or scored.root or _guess(opened)
    # With a cache paths are known: what is not there is not searched for.
    found = Pictures(root, search=not quick or cache is None, seconds=_QUICK_SECONDS if quick else None)
    subject = make_subject(loaded, scored, cache=opened, pictures=found, quick=quick)
    written = [write_report(subject, output, started=started).report]
    try:
        sheet = sheet_beside(subject)
    except FeatcacheError as error:
        log.warning("no contact sheet: %s", error)
    else:
        written += [] if sheet is None else [sheet]
    return written


def write_report(
    subject: Subject,
    output: Path,
    *,
    started: float,
    against: tuple[Model, Array] | None = None,
    figures: Path | None = None,
    map: Method = "none",
) -> Report:
    """Write the page about ``subject``. against: another model, and ``other_probabilities``. figures: a folder for its charts.

    Raises as ``publish_page`` and ``write_figures`` do.
    """
    data: dict[str, Any] = {
        "cards": cards_data(subject.cards, subject.model.classes),
        "scores": {name: value for name, value in subject.scores.items() if name != "confusion"},
        "selections": {name: rows for _, name, rows in _lists(subject)},
    }
    name = subject.model.path.resolve().name
    sections = _sections(subject, data, against=against, map=map)
    html = render_sections(sections, title=f"Report on {name}", lead=headline(subject), data=data)
    publish_page(output, html)
    if figures is not None:
        write_figures(charts_in(sections), figures)
    size = output.stat().st_size
    return Report(output, len(subject.scored), len(subject.cards), size, time.perf_counter() - started)


def _sections(
    subject: Subject, data: dict[str, Any], *, against: tuple[Model, Array] | None, map: Method
) -> list[Section]:
    """The page, in its order. ``data``: for the script; sections may add to it, ``selections`` above all."""
    learning = learning_section(subject)
    found = [
        _summary(subject, learning=learning.context["words"] if learning.context.get("foretold") else ""),
        confusion_section(subject, data),
        classes_section(subject),
        None if against is None else comparison_section(subject, *against, data),
        finetuned_section(subject),
        report_map(subject, data, method=map),
        calibration_section(subject.scores),
        choice_section(subject),
        learning,
        training_section(subject),
        _pictures(subject),  # behind the charts, for it is long; what selects pictures leads to them
        provenance_section(subject),
    ]
    return [section for section in found if section is not None]


def _summary(subject: Subject, *, learning: str) -> Section:
    scores = subject.scores
    name, share = largest_class(subject)
    interval = (
        f"95% interval {percent_text(scores['accuracy_interval'][0])} to {percent_text(scores['accuracy_interval'][1])}"
    )
    mistakes = scores["n"] - round(scores["accuracy"] * scores["n"])
    tiles = [
        ("Accuracy", percent_text(scores["accuracy"]), interval),
        (
            "Always the largest class",
            percent_text(share),
            f"{name}; guessing {percent_text(1 / len(subject.model.classes))}",
        ),
        ("Balanced accuracy", percent_text(scores["balanced_accuracy"]), "mean recall of the classes"),
        ("Mistakes", count_text(mistakes), f"in {quantity(scores['n'], 'image')} ({subject.scored.split})"),
    ]
    if scores["top5_accuracy"] is not None:
        tiles.insert(3, ("Among the five likeliest", percent_text(scores["top5_accuracy"]), ""))
    notes = []
    estimate = None if subject.model.manifest.get("finetuned") else subject.model.manifest["metrics"].get("cv_accuracy")
    if subject.scored.split == HELD_OUT and estimate:
        notes.append(
            f"Settings of the head were chosen on these images, too: corrected for that choice, the estimate is {percent_text(estimate)}."
        )
    if chosen := scores["chosen_on"]:
        words = chosen_on(chosen, scores["n"])
        notes.append(
            f"{words[0].upper()}{words[1:]}: the accuracy is optimistic, images of a test split would tell by how much."
        )
    context = {"tiles": tiles, "advice": advise(subject, learning=learning), "notes": notes}
    return Section("summary", "In short", "report_summary.html", context)


def _lists(subject: Subject) -> list[tuple[str, str, list[int]]]:
    """Lists of cards that are worth a look: words, name among the page's selections, cards in order."""
    cards, by_row = subject.cards, subject.card_of
    margins = [(card.probability or 0) - (card.second[1] if card.second else 0) for card in cards]
    answered = [number for number, card in enumerate(cards) if card.status != "refused"]
    found = [
        ("Most confident mistakes", "mistakes", [k for k in answered if cards[k].outcome == "wrong"]),
        ("Labels in doubt", "suspects", [by_row[row] for row in suspects(subject).tolist() if row in by_row]),
        ("Least certain", "uncertain", sorted(answered, key=margins.__getitem__)[:_LEAST_CERTAIN]),
        ("Refused", "refused", [k for k, card in enumerate(cards) if card.status == "refused"]),
    ]
    return [each for each in found if each[2]]


def _pictures(subject: Subject) -> Section:
    context = {
        "cards": subject.cards,
        "lists": [(words, name, len(rows)) for words, name, rows in _lists(subject)],
        "notes": _what_is_missing(subject),
    }
    return Section("pictures", "Pictures", "report_pictures.html", context, parts=("report.css",))


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(printable(text))


def _what_is_missing(subject: Subject) -> list[str | Markup]:
    """What the page does not show, and what to do about it."""
    notes: list[str | Markup] = []
    scored, shown = subject.scored, int((subject.rows >= 0).sum())
    if shown < len(scored):
        wrong = int((subject.predicted != scored.y).sum())
        here = sum(card.outcome == "wrong" for card in subject.cards)
        mistakes = (
            "every mistake"
            if here == wrong
            else f"the {count_text(here)} most confident of {count_text(wrong)} mistakes"
        )
        notes.append(
            f"{count_text(shown)} of {quantity(len(scored), 'image')} are on this page: {mistakes}, the least sure of the right "
            "answers, and others drawn at random, as many of each class."
        )
    if scored.elsewhere:
        what = quantity(scored.elsewhere, "refused image is", "refused images are")
        notes.append(f"{what} not on this page: which split they are of is not known. --split all shows them.")
    reasons = Counter(
        card.no_thumbnail for card in subject.cards if card.thumbnail is None and card.status != "refused"
    )
    name = shlex.quote(str(subject.model.path))
    if count := reasons.pop(NO_FOLDER, 0):
        source = "" if subject.cache is None else f" {shlex.quote(str(subject.cache.path))}"
        command = _code(f"featcache report {name}{source} --source FOLDER")
        notes.append(
            Markup("{} no picture here: {} adds it from the folder.").format(
                quantity(count, "image has", "images have"), command
            )
        )
    reasons.pop(MISSING, 0)
    if absent := _not_in_folder(subject):
        notes.append(absent)
    if count := reasons.pop(NO_TIME, 0):
        command = _code(f"featcache report {name} SOURCE")
        notes.append(
            Markup("{} left out to be quick: {} makes a page with all.").format(
                quantity(count, "picture was", "pictures were"), command
            )
        )
    if count := sum(reasons.values()):
        notes.append(f"{quantity(count, 'picture is', 'pictures are')} left out: {reasons.most_common(1)[0][0]}.")
    return notes


def _not_in_folder(subject: Subject) -> str:
    """How many images are not where they were looked for; empty if all are."""
    if not (count := sum(card.thumbnail is None and card.no_thumbnail == MISSING for card in subject.cards)):
        return ""
    are = quantity(count, "image is", "images are")
    return f"{are} not in {subject.pictures.root}, or changed since: --source names another folder."


def page_beside(model: Path) -> Path:
    """Where the page of a model is written unless another place is named: never inside, a model travels without it."""
    folder = model.resolve() if model.name in ("", "..") else model  # those are no names
    return folder.with_name(f"{folder.name}.report.html")


def _checked(model: Model | AnyPath, source: AnySource | None) -> Model:
    """The model, loaded; paths that are something else are refused before."""
    folder = as_path(model)
    words = () if source is None else (Source.of(source).path,)
    check_path(folder, "model", ("report", HERE, *words))
    for path in words:
        check_path(path, "images or cache", ("report", folder, HERE))
    return model if isinstance(model, Model) else load_model(folder)


def _other(model: Model, against: Model | AnyPath) -> Model:
    """The model to compare with."""
    if not isinstance(against, Model):
        check_path(against, "model", ("report", model.path, "--against", HERE))
        against = load_model(as_path(against))
    check_comparable(model, against)
    return against


def _evidence(model: Model, evidence: AnyPath, source: AnySource | None) -> FeatureCache:
    """The cache of training images; refused before any work where it is none of the model's, or there is nothing to compare."""
    if source is None:
        raise UsageError("--evidence goes with images or a cache as SOURCE; give them, or leave it out")
    cache = FeatureCache.open(as_path(evidence))
    model.check_cache(cache, advice="give as evidence the cache that the model was fit on")
    rows_that_trained(model, cache)
    return cache


def _opened(
    model: Model, source: AnySource | None, other: Model | None
) -> tuple[ImageList | None, FeatureCache | None]:
    """Images or a cache, or neither. Raises before any work if a model cannot score them."""
    if source is None:
        return None, None
    if not is_cache((given := Source.of(source)).path):
        return list_images(given), None
    given.check_options("cache")
    cache = FeatureCache.open(given.path)
    model.check_cache(cache)
    if other is not None:
        other.check_cache(cache, advice="give the images as SOURCE, which both models can embed")
    return None, cache


def _score(
    model: Model,
    images: ImageList | None,
    cache: FeatureCache | None,
    *,
    split: str | None,
    limits: Limits,
    options: dict[str, Any],
) -> Scored:
    """Score images, a cache, or where there is neither what the model keeps."""
    if images is not None:
        return score_images(model, images, split=split, limits=limits, **options)
    if cache is None and split not in (None, HELD_OUT):
        raise UsageError("--split chooses among labelled images; give them or a cache as SOURCE, or leave it out")
    if cache is None or split == HELD_OUT or (split is None and _keeps_all(model, cache)):
        return score_held_out(model, cache)
    return score_cache(model, cache, split=split, limits=limits)


def _keeps_all(model: Model, cache: FeatureCache) -> bool:
    """Whether a cache has nothing that training left out, and the model keeps scores of heads that its rows did not train."""
    known, labelled = model.training_rows(), cache.y >= 0
    if known is None or np.isin(cache.rows.splits, (2, 3)).any() or known.unseen() is None:
        return False
    return bool(labelled.any() and known.contain(cache.rows.digests[labelled]).all())


def _guess(cache: FeatureCache | None) -> Path | None:
    return None if cache is None else guess_root(cache)
