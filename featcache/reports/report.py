"""``report``: the page about a model. In: a model; labelled images, a cache or nothing. Out: one HTML file.

The page is a list of sections, each made from the same ``Subject``: a part that is added is one line in ``_sections``.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.cache import FeatureCache, is_cache
from featcache.errors import SourceError, UsageError
from featcache.images.source import AnySource, Source
from featcache.models.limits import Limits
from featcache.models.model import Model, load_model
from featcache.models.scoring import Scored, score_cache, score_held_out, score_images
from featcache.reports.cards import cards_data
from featcache.reports.confusion import classes_section, confusion_section
from featcache.reports.page import Section, check_page_path, publish_page, render_sections
from featcache.reports.pictures import Pictures, guess_root
from featcache.reports.subject import Subject, make_subject
from featcache.system.display import Shown
from featcache.system.path_kinds import HERE, AnyPath, as_path, check_path
from featcache.system.runtime_options import check_runtime_options

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress

log = logging.getLogger("featcache")


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Shown):
    """A page that was written: where, of how many images, how many of them have a card, bytes, and seconds."""

    report: Path
    images: int
    cards: int
    bytes: int
    seconds: float

    _shown = ("report", "images", "cards", "bytes", "seconds")


def report(
    model: Model | AnyPath,
    source: AnySource | None = None,
    *,
    output: AnyPath | None = None,
    pictures: AnyPath | None = None,
    split: str | None = None,
    against: Model | AnyPath | None = None,
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
        split: as in ``evaluate``. against: another model, to compare with on the same images.
        device, workers, batch_size, progress: as in ``predict``, for images.

    Raises:
        UsageError: impossible options; the model keeps no held-out scores and there is no source. Otherwise as ``evaluate``
        and ``page.check_page_path``.
    """
    started = time.perf_counter()
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    model = _checked(model, source)
    output = page_beside(model.path) if output is None else as_path(output)
    check_page_path(output)
    options = {"device": device, "workers": workers, "batch_size": batch_size, "progress": progress}
    root = None if pictures is None else as_path(pictures)
    if root is not None and not root.is_dir():
        raise SourceError(f"--source {root} is no folder; give the folder that holds the images")
    scored, cache = _score(model, source, split, options)
    if root is None:
        root = scored.root if scored.root is not None else _guess(cache)
    subject = make_subject(model, scored, cache=cache, training=cache, pictures=Pictures(root))
    return write_report(subject, output, started=started)


def write_report(subject: Subject, output: Path, *, started: float) -> Report:
    """Write the page about ``subject``. Raises as ``publish_page`` does."""
    data = {"cards": cards_data(subject.cards, subject.model.classes), "selections": {}}
    html = render_sections(_sections(subject, data), title=f"Report on {subject.model.path.name}", data=data)
    publish_page(output, html)
    size = output.stat().st_size
    return Report(output, len(subject.scored), len(subject.cards), size, time.perf_counter() - started)


def _sections(subject: Subject, data: dict[str, Any]) -> list[Section]:
    """The page, in its order. ``data``: for the script; sections may add to it, ``selections`` above all."""
    found = [
        Section("summary", "In short", "report_summary.html", {"subject": subject}),
        confusion_section(subject, data),
        classes_section(subject),
        Section("pictures", "Pictures", "report_pictures.html", {"cards": subject.cards}),
    ]
    return [section for section in found if section is not None]


def page_beside(model: Path) -> Path:
    """Where the page of a model is written unless another place is named: never inside, a model travels without it."""
    folder = model.resolve() if model.name in ("", "..") else model  # those are no names
    return folder.with_name(f"{folder.name}.report.html")


def _checked(model: Model | AnyPath, source: AnySource | None) -> Model:
    """The model, loaded; paths that are something else are refused before."""
    folder = as_path(model.path if isinstance(model, Model) else model)
    words = () if source is None else (Source.of(source).path,)
    check_path(folder, "model", ("report", HERE, *words))
    for path in words:
        check_path(path, "images or cache", ("report", folder, HERE))
    return model if isinstance(model, Model) else load_model(folder)


def _score(
    model: Model, source: AnySource | None, split: str | None, options: dict[str, Any]
) -> tuple[Scored, FeatureCache | None]:
    """Scored rows, and the cache that they come from."""
    limits = Limits(model.classes)
    if source is None:
        if split is not None:
            raise UsageError("--split chooses among labelled images; give them or a cache as SOURCE, or leave it out")
        return score_held_out(model), None
    if not is_cache((given := Source.of(source)).path):
        return score_images(model, given, split=split, limits=limits, **options), None
    given.check_options("cache")
    cache = FeatureCache.open(given.path)
    model.check_cache(cache)
    if split is None and not np.isin(cache.rows.splits, (2, 3)).any() and (kept := _held_out(model, cache)) is not None:
        return kept, cache
    return score_cache(model, cache, split=split, limits=limits), cache


def _held_out(model: Model, cache: FeatureCache) -> Scored | None:
    """Where a cache has nothing that training left out: its rows with scores of heads that they did not train."""
    known = model.training_rows()
    if known is None or known.unseen() is None or not known.contain(cache.rows.digests).all():
        return None
    return score_held_out(model, cache)


def _guess(cache: FeatureCache | None) -> Path | None:
    return None if cache is None else guess_root(cache.path, cache.paths[:3], cache.rows.digests[:3])
