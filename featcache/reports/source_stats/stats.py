"""``stats``: what a source holds, before any work. In: a source of images. Out: ``Statistics``: plain values, and a text of them."""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.copies import find_copies, first_copies
from featcache.cache.format import encode_names
from featcache.errors import UsageError
from featcache.images.source import AnySource, ImageList, Source, check_apart, list_images
from featcache.images.statistics import Floats, Measured, Progress, Rows, measure, oddness
from featcache.reports.figures import check_figures, write_figures
from featcache.reports.notebook import framed
from featcache.reports.source_stats.advice import SMALL, advice
from featcache.reports.source_stats.page import check_folder, stats_charts, stats_page, write_folder
from featcache.reports.source_stats.text import stats_lines
from featcache.spec import SPLITS
from featcache.system.display import Shown, bar_in_notebook, describe_images
from featcache.system.files import named
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_runtime_options, check_whole, usable_cores

SHOWN = 14  # images of a kind that are picked out
_OF_ONE_ODDITY = 3  # at most, of those
_ODD = 3.5  # the score from which an image counts as odd
_MOST_SIZES = 1000
_EXAMPLES, _OF_A_CLASS = 96, 6  # images that show what classes look like, and of one class
SHAPES = (  # width:height as cameras and people make them
    "1:2",
    "9:16",
    "2:3",
    "3:4",
    "4:5",
    "1:1",
    "5:4",
    "4:3",
    "3:2",
    "16:9",
    "2:1",
)
KINDS = ("labels", "splits", "within")  # of copies, the worst first


@dataclasses.dataclass(frozen=True, repr=False)
class Statistics(Shown):
    """What ``stats`` found. All are plain values, fit for JSON; images are dictionaries with ``path``, ``label`` and ``split``.

    Attributes:
        source: as given. root: what paths are relative to. output: the folder that was written.
        images: how many were listed, ``readable`` of them.
        classes: class -> split -> readable images. unlabelled: split -> readable images without a label. splits: split -> images.
        constant: split (``all`` is one, too) -> what always answering its largest class scores: ``n``, ``classes`` that occur,
            ``label``, ``accuracy``, ``balanced_accuracy`` (1 / classes); None without labels.
        width, height, shorter_edge: pixels as shown. aspect: width / height. bytes: of a file. Each as ``min``, ``q1``, ``median``,
            ``q3``, ``max``; None if nothing is readable.
        total_bytes: of the readable files. sizes: width, height and how many images, the most frequent first.
        distinct_sizes: how many there are; ``sizes`` holds 1,000 at most.
        shapes: images nearest to each usual width:height, ``taller`` and ``wider`` than all of these.
        histograms: of ``shorter_edge`` and ``bytes``: ``edges`` (n + 1) and ``counts`` (n).
        formats, modes: as Pillow calls them -> images. turned: images that their EXIF data turns.
        small: images whose shorter edge has fewer than 224 pixels.
        unreadable: images, each with ``reason``.
        copies: ``within``, ``across_splits``, ``across_labels`` as ``extract`` counts them; ``groups`` of equal files, each with its
            ``kind`` (``labels``: under several, ``splits``: in several, ``within`` one) and ``images``.
        sample: how many ``images`` were drawn and decoded, ``of`` those with a readable header, by which ``seed``; how many others
            were decoded because their file has no end (``cut``).
        darkest, blurriest: of the sample, each with ``value``: mean grey from 0 to 255, variance of the Laplacian, see
            ``images.statistics.look_at``. oddest: each with ``value``, a modified z-score, and ``why``, see ``oddness``.
        examples: a few images of each class, drawn. advice: sentences. seconds: of the whole call.
    """

    source: str
    root: str
    output: str | None
    images: int
    readable: int
    classes: dict[str, dict[str, int]]
    unlabelled: dict[str, int]
    splits: dict[str, int]
    constant: dict[str, dict[str, Any]] | None
    width: dict[str, float] | None
    height: dict[str, float] | None
    shorter_edge: dict[str, float] | None
    aspect: dict[str, float] | None
    bytes: dict[str, float] | None
    total_bytes: int
    sizes: list[list[int]]
    distinct_sizes: int
    shapes: dict[str, int]
    histograms: dict[str, dict[str, list[float]]]
    formats: dict[str, int]
    modes: dict[str, int]
    turned: int
    small: int
    unreadable: list[dict[str, Any]]
    copies: dict[str, Any]
    sample: dict[str, int]
    darkest: list[dict[str, Any]]
    blurriest: list[dict[str, Any]]
    oddest: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    advice: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    _shown = ("source", "images", "readable", "splits", "formats", "seconds")

    def lines(self) -> list[str]:
        """As text for a terminal of 80 columns, names harmless to it."""
        return stats_lines(self)

    def _repr_html_(self) -> str:
        """In a notebook: the page."""
        return framed(stats_page(self))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def page(self) -> str:
        """As an HTML page that holds its pictures; they are made of the files anew, where these still are."""
        return stats_page(self)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def stats(
    source: AnySource | ImageList,
    output: AnyPath | None = None,
    *,
    figures: AnyPath | None = None,
    sample: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """What a source holds: counts, sizes, formats, unreadable files, copies, and which images stand out.

    Headers are read of all images, pixels of a sample. An unreadable image is listed with the reason for which ``extract`` would
    refuse it; damage behind the header shows only in the sample.

    Args:
        source: as for ``extract``.
        output: a folder to write ``stats.html`` and ``stats.json`` to, an earlier one is replaced; nothing is written when None.
        figures: a folder to write the charts of the page to, as SVG files.
        sample: how many images to decode; when None 5,000, or fewer if they are large.
        seed: another one draws others. workers: threads; one per usable core when None.
        progress: called with (files done, files to do, what is read of them); a bar in notebooks when None.

    Raises:
        SourceError: missing, ambiguous, or without a single image. UsageError: impossible values. StorageError: the folder
        cannot be written, holds something else, or lies among the images.
    """
    started = time.perf_counter()
    check_runtime_options("cpu", workers=workers)
    if sample is not None:
        check_whole("sample", sample, 0)
    check_whole("seed", seed, 0)
    output, drawn = (None if path is None else named(as_path(path)) for path in (output, figures))
    if not isinstance(source, ImageList):
        check_path(Source.of(source).path, "images", ("stats", HERE, *(() if output is None else ("-o", output))))
    if output is not None and drawn is not None and drawn.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"--figures {drawn} lies in {output}, which -o replaces as a whole; choose another folder")
    if output is not None:
        check_folder(output, source)
    if drawn is not None:
        check_figures(drawn)
        check_apart(drawn, source)
    images = list_images(source, counted=False)
    with bar_in_notebook(progress, describe_images("reading")) as report:
        measured = measure(images, sample=sample, seed=seed, workers=workers or usable_cores(), progress=report)
    name = str(images.root if isinstance(source, ImageList) else source)
    found = _describe(name, images, measured, seed=seed, output=output)
    found = dataclasses.replace(found, advice=advice(found))
    found = dataclasses.replace(found, seconds=round(time.perf_counter() - started, 3))
    if output is not None:
        write_folder(found, output)
    if drawn is not None:
        write_figures(stats_charts(found), drawn)
    return found


def _describe(source: str, images: ImageList, measured: Measured, *, seed: int, output: Path | None) -> Statistics:
    rows, headers = measured.readable, [header for header in measured.headers if header is not None]
    sizes = Counter((header.width, header.height) for header in headers)
    return Statistics(
        source=source,
        root=str(images.root),
        output=None if output is None else str(output),
        images=len(images) + len(images.refused),
        readable=len(rows),
        **_count(images, rows),
        width=_quartiles(measured.of("width")[rows]),
        height=_quartiles(measured.of("height")[rows]),
        shorter_edge=_quartiles(measured.of("shorter_edge")[rows]),
        aspect=_quartiles(measured.of("aspect")[rows]),
        bytes=_quartiles(measured.of("bytes")[rows]),
        total_bytes=sum(header.bytes for header in headers),
        sizes=[[*size, count] for size, count in _most(sizes.items(), _MOST_SIZES)],
        distinct_sizes=len(sizes),
        shapes=_shapes(measured.of("aspect")[rows]),
        histograms={name: _histogram(measured.of(name)[rows]) for name in ("shorter_edge", "bytes") if len(rows)},
        formats=dict(_most(Counter(header.format for header in headers).items())),
        modes=dict(_most(Counter(header.mode for header in headers).items())),
        turned=sum(header.turned for header in headers),
        small=int((measured.of("shorter_edge")[rows] < SMALL).sum()),
        unreadable=_unreadable(images, measured),
        copies=_copies(images, measured),
        sample={"images": len(measured.sampled), "of": measured.opened, "seed": seed, "cut": len(measured.cut)},
        **_standing_out(images, measured),
        examples=_examples(images, rows, seed),
    )


def _most(counts: Iterable[tuple[Any, int]], most: int | None = None) -> list[tuple[Any, int]]:
    return sorted(counts, key=lambda pair: (-pair[1], pair[0]))[:most]


def image_at(images: ImageList, row: int) -> dict[str, Any]:
    """An image as a plain value."""
    label, split = images.labels[row], int(images.splits[row])
    return {
        "path": images.paths[row],
        "label": images.classes[label] if label >= 0 else None,
        "split": SPLITS[split] if split else None,
    }


def _count(images: ImageList, rows: Rows) -> dict[str, Any]:
    """``classes``, ``unlabelled``, ``splits`` and ``constant``."""
    labels, splits = images.labels[rows], images.splits[rows]
    counts = np.zeros((len(images.classes) + 1, len(SPLITS)), np.int64)
    np.add.at(counts, (labels, splits), 1)  # -1, no label, is the last row
    used = [split for split in range(len(SPLITS)) if counts[:, split].any()]
    constant = {SPLITS[split]: _constant(images.classes, counts[:-1, split]) for split in used if split}
    constant["all"] = _constant(images.classes, counts[:-1].sum(1))
    of_split = [{SPLITS[split]: int(row[split]) for split in used} for row in counts]
    return {
        "classes": dict(zip(images.classes, of_split[:-1], strict=True)),
        "unlabelled": {name: count for name, count in of_split[-1].items() if count},
        "splits": {SPLITS[split]: int(counts[:, split].sum()) for split in used},
        "constant": {name: facts for name, facts in constant.items() if facts} or None,
    }


def _constant(classes: tuple[str, ...], counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """What always answering the largest class scores; nothing without labelled images."""
    if not (n := int(counts.sum())):
        return {}
    there, largest = int((counts > 0).sum()), int(counts.argmax())
    accuracy = float(counts[largest] / n)
    return {
        "n": n,
        "classes": there,
        "label": classes[largest],
        "accuracy": accuracy,
        "balanced_accuracy": 1 / there,
    }


def _quartiles(values: Floats) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
    return dict(zip(("min", "q1", "median", "q3", "max"), found, strict=True))


def _histogram(values: Floats) -> dict[str, list[float]]:
    edges = _steps(values)
    return {"edges": edges, "counts": np.histogram(values, edges)[0].tolist()}


def _shapes(aspects: Floats) -> dict[str, int]:
    """How many images are nearest to each of ``SHAPES``; more than a tenth beyond the first and the last is another one."""
    ratios = np.array([int(a) / int(b) for a, b in (shape.split(":") for shape in SHAPES)])
    edges = [0, ratios[0] / 1.1, *np.sqrt(ratios[1:] * ratios[:-1]), ratios[-1] * 1.1, np.inf]
    return dict(zip(("taller", *SHAPES, "wider"), np.histogram(aspects, edges)[0].tolist(), strict=True))


def _steps(values: Floats) -> list[float]:
    """Round numbers around all of ``values``, from each to the next about the same factor."""
    lowest, highest = max(values.min(), 1), values.max()
    powers = range(int(np.log10(lowest)) - 1, int(np.log10(max(highest, 1))) + 2)
    wide = np.log10(max(highest, 1) / lowest) > 2.5
    digits = (1, 2, 5) if wide else (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.4, 8)
    steps = [digit * 10.0**power for power in powers for digit in digits]
    first = max(k for k, step in enumerate(steps) if step <= lowest)
    last = min(k for k, step in enumerate(steps) if step > highest)
    return [*steps[first : last + 1]] if values.min() >= 1 else [0.0, *steps[first : last + 1]]


def _unreadable(images: ImageList, measured: Measured) -> list[dict[str, Any]]:
    """In the order of the list; where a name alone was refused, before the image it was listed before."""
    found = [((row, 1), image_at(images, row) | {"reason": why}) for row, why in measured.refused.items()]
    for at, (path, reason) in zip(images.refused_at, images.refused, strict=True):
        found.append(((at, 0), {"path": path, "label": None, "split": None, "reason": reason}))
    return [image for _, image in sorted(found, key=lambda pair: pair[0])]


def _copies(images: ImageList, measured: Measured) -> dict[str, Any]:
    rows = np.intersect1d(np.flatnonzero(measured.hashed), measured.readable)
    paths = encode_names(images.paths[row] for row in rows)
    columns = measured.digests[rows], images.labels[rows], images.splits[rows]
    first = first_copies(columns[0])
    groups = []
    for content in np.unique(first[first != np.arange(len(first))]).tolist():
        members = [image_at(images, row) for row in rows[first == content].tolist()]
        labels, splits = ({member[key] for member in members} - {None} for key in ("label", "split"))
        kind = KINDS[0] if len(labels) > 1 else KINDS[1] if len(splits) > 1 else KINDS[2]
        groups.append({"kind": kind, "images": members})
    groups.sort(key=lambda group: KINDS.index(group["kind"]))
    return {**find_copies(*columns, paths).counts(), "groups": groups}


def _standing_out(images: ImageList, measured: Measured) -> dict[str, Any]:
    scores, words = oddness(measured)
    rows = [row for row in np.argsort(-np.nan_to_num(scores), kind="stable").tolist() if scores[row] > _ODD]
    seen: Counter[str] = Counter()
    odd: list[dict[str, Any]] = []
    for row in itertools.takewhile(lambda _: len(odd) < SHOWN, rows):
        seen[words[row]] += 1
        if seen[words[row]] <= _OF_ONE_ODDITY:
            odd.append(image_at(images, row) | {"value": float(scores[row]), "why": words[row]})
    return {
        "darkest": _lowest(images, measured.look("brightness")),
        "blurriest": _lowest(images, measured.look("sharpness")),
        "oddest": odd,
    }


def _lowest(images: ImageList, values: Floats) -> list[dict[str, Any]]:
    rows = np.argsort(values, kind="stable")[: min(SHOWN, int(np.isfinite(values).sum()))]
    return [image_at(images, row) | {"value": float(values[row])} for row in rows.tolist()]


def _examples(images: ImageList, rows: Rows, seed: int) -> list[dict[str, Any]]:
    """A few readable images of each class, from its training images where there are splits; none of very many classes."""
    labelled = rows[images.labels[rows] >= 0]
    if (images.splits[labelled] == 1).any():
        labelled = labelled[images.splits[labelled] == 1]
    each = min(_EXAMPLES // max(len(images.classes), 1), _OF_A_CLASS)
    drawn = np.random.default_rng(seed).permutation(labelled)
    of_class = [drawn[images.labels[drawn] == label][:each].tolist() for label in range(len(images.classes)) if each]
    return [image_at(images, row) for row in itertools.chain.from_iterable(of_class)]
