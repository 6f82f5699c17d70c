"""Pages in a notebook. In: a page, as HTML. Out: a frame that shows it in a cell's output, or a file."""

import dataclasses
from pathlib import Path
from typing import Any

from featcache.reports.elements.numbers import bytes_text
from featcache.reports.elements.page import publish_page, title_of
from featcache.system.display import printable
from featcache.system.path_kinds import AnyPath, as_path

_HEIGHT = 720  # pixels of the frame: a laptop's window less what notebooks put around it


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Page:
    """A page. As the last value of a notebook's cell it shows itself; ``save`` writes it to a file that opens offline.

    Attributes:
        html: all of it, pictures, style and script included. It asks for nothing from anywhere.
    """

    html: str

    def save(self, path: AnyPath) -> Path:
        """Write it to a file whose name ends in .html; returns the path.

        Raises:
            UsageError: another name. StorageError: it cannot be written, or the file is none that featcache wrote.
        """
        target = as_path(path)
        publish_page(target, self.html)
        return target

    def __repr__(self) -> str:
        return f"Page({printable(title_of(self.html))!r}, {bytes_text(len(self.html))})"

    def _repr_html_(self) -> str:
        return framed(self.html)


def framed(html: str) -> str:
    """A page as an element of another one: the same page, in a frame that shares nothing with the notebook around it.

    The sandbox gives it an origin of its own, so that its script cannot reach the notebook, whose scripts run what the user
    could; it may run, and save a file. In single quotes: the page is full of double ones, which would all be escaped.
    """
    source = html.encode("utf-8", "backslashreplace").decode().replace("&", "&amp;").replace("'", "&#39;")
    title = printable(title_of(html)).replace("&", "&amp;").replace("'", "&#39;")
    return (
        f"<iframe title='{title}' width='100%' height='{_HEIGHT}' style='border:1px solid #8886' loading='lazy' "
        f"sandbox='allow-scripts allow-downloads' srcdoc='{source}'></iframe>"
    )


def gallery(
    model: Any,
    inputs: Any,
    *,
    sample: int | None = None,
    seed: int = 0,
    pictures: AnyPath | None = None,
    **options: Any,
) -> Page:
    """Label images and show them: a page of the pictures, each with its likeliest classes, to sort, filter and enlarge.

    Args:
        model, inputs, options: as in ``featcache.predict``; images in memory have pictures, too.
        sample: how many images are shown, drawn at random; all, but 10,000 at most, when None. seed: another one draws others.
        pictures: of caches, of ``evidence``, too, the folder that they were made of, which is looked for near them when None.

    Raises:
        UsageError: an impossible sample; ``pictures`` without a cache. SourceError: ``pictures`` is no folder. Otherwise as
        ``featcache.predict``.
    """
    from featcache.cache.cache import is_cache
    from featcache.images.source import Source
    from featcache.models.model import Model, load_model
    from featcache.models.predict import named_inputs, predict
    from featcache.reports.gallery import Draw, check_pictures, check_sample
    from featcache.reports.gallery_page import gallery_page

    check_sample(sample)
    if not hasattr(inputs, "__len__") and hasattr(inputs, "__iter__"):  # what can be gone through once only
        inputs = list(inputs)
    evidence, folder = options.get("evidence"), None if pictures is None else as_path(pictures)
    sources = [entry.path for _, entry in named_inputs(inputs) if isinstance(entry, Source)]
    check_pictures(folder, of_caches=evidence is not None or any(map(is_cache, sources)))
    predictions = predict(model, inputs, **options)
    loaded = model if isinstance(model, Model) else load_model(model)
    draw = Draw(loaded, inputs, evidence=None if evidence is None else as_path(evidence), sample=sample, seed=seed)
    for _ in draw.watch(predictions):
        pass
    return Page(gallery_page(draw, pictures=folder))
