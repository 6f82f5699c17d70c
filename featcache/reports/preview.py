"""``preview``: what the network sees, before any work: photographs, how evaluation sees them, how a recipe changes them.

In: a source, and a recipe or a backbone. Out: a ``Preview``, a PNG with a row per image. The pixels are made by the functions that
training uses, from the numbers that it draws from: the column of epoch 3 is what ``finetune`` with the same seed would see in
epoch 3. Weights are not loaded unless their file decides the size.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image, ImageDraw

from featcache.backbones.choice import AUTO, choose_backbone
from featcache.errors import RefusedImage, SourceError
from featcache.extraction.request import BackboneOptions, ExtractRequest, preprocessing_of, settle_request
from featcache.finetuning.augment import augment_picture
from featcache.finetuning.pixels import network_input
from featcache.finetuning.recipe_files import read_recipe
from featcache.finetuning.recipes import Recipe, settle, step_in_words
from featcache.finetuning.start import read_source
from featcache.finetuning.training_input import Picture, TrainingInput
from featcache.heads.head import Array, Indices
from featcache.images.decode import decode
from featcache.images.read import read_images
from featcache.images.source import AnySource, ImageList, Source, list_images
from featcache.reports.elements import drawing
from featcache.spec import SPLITS, PreprocessSpec
from featcache.system.display import printable, quantity
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath, as_path
from featcache.system.runtime_options import check_whole

_EDGE = 224  # pixels of a view, about: smaller ones are enlarged in whole steps, larger ones beyond _MOST reduced
_MOST = 320
_GAP, _GROUP, _MARGIN, _WORDS = 8, 32, 40, 280  # pixels between views, between groups, around, of the column of labels
_TITLE, _TEXT, _SMALL = 38, 26, 20  # sizes of letters
_WIDEST = 1500  # pixels of a picture whose lines of text are longer than its rows
_N, _VIEWS = (1, 200), (1, 50)  # the least and the most there can be
_FEW_VIEWS = 4  # where nobody says how many


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Preview:
    """What was drawn; in a notebook it is the picture.

    Attributes:
        png: the picture. path: where it was written; None: nowhere.
        recipe: its name; None: evaluation alone is shown. backbone: its name. preprocess: what evaluation does to an image.
        views: how many augmented views of each image, those of epochs 1, 2, ... seed: of sample and augmentation.
        images: path, label (None: unknown) and split of each row. listed: how many images the rows were drawn from.
        refused: path and reason of those that were drawn and cannot be decoded; others took their place.
        seconds: of the whole call.
    """

    png: bytes
    path: Path | None
    recipe: str | None
    backbone: str
    preprocess: PreprocessSpec
    views: int
    seed: int
    images: tuple[dict[str, str | None], ...]
    listed: int
    refused: dict[str, str]
    seconds: float

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        what = f"{quantity(len(self.images), 'image')} of {self.listed:,} as {self.backbone} sees them"
        what += f", {quantity(self.views, 'view')} by {self.recipe}" if self.recipe else ""
        return f"Preview({what}, path={self.path and str(self.path)!r})"

    def facts(self) -> dict[str, Any]:
        """Plain values, fit for JSON, without the picture."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return {"preview": found.pop("path"), **found, "preprocess": self.preprocess.to_json()}


def preview(
    source: AnySource | ImageList,
    output: AnyPath | None = None,
    *,
    recipe: AnyPath | None = None,
    changes: dict[str, Any] | None = None,
    request: ExtractRequest | None = None,
    n: int = 8,
    views: int | None = None,
    seed: int = 0,
    **options: Unpack[BackboneOptions],
) -> Preview:
    """Draw photographs beside what the network sees of them, with the normalisation left out.

    Args:
        source: as for ``extract``. With a recipe training images are drawn from, as ``finetune`` would split it.
        output: a PNG; None: the picture is only returned. An earlier one is replaced.
        recipe, changes: as for ``finetune``; when both and ``views`` are None, evaluation alone is shown if a backbone is named, else
            the recipe ``default``.
        request: of which backbone, with which size, resize and interpolation. options: its fields as keywords instead.
        n: images, the classes in turn, at random in each. views: augmented ones of each image; 4 when None. seed: of both.

    Raises:
        SourceError: no image, or none that can be decoded. UsageError: impossible values. BackboneError, ModelError: no such
        backbone or model. StorageError: ``output`` cannot be written, or is something else.
    """
    started = time.perf_counter()
    output = None if output is None else as_path(output)
    if output is not None:
        drawing.check_picture_path(output)
    for what, value, (least, most) in (
        ("n", n, _N),
        ("views", _FEW_VIEWS if views is None else views, _VIEWS),
        ("seed", seed, (0, 2**32 - 1)),
    ):
        check_whole(what, value, least, most)
    request = settle_request(request, options, preview) or ExtractRequest()
    if recipe is None and (changes or views is not None or request.backbone == AUTO):
        recipe = "default"
    name: str | None = None
    settings: Recipe | None = None
    if recipe is not None:
        name, settings = read_recipe(recipe, changes or {})
    if not isinstance(source, ImageList):
        check_path(Source.of(source).path, "images", ("preview", HERE))
    request.check_named()
    request.check_paths()
    network = None if request.backbone == AUTO else preprocessing_of(request)  # refused before anything is listed
    images = list_images(source)
    images.check_any()
    if settings is not None:
        images = _training_images(images, seed=seed)
        settings = settle(settings, len(images))
    backbone, spec = network or preprocessing_of(_named(request))
    rows, refused = _decode_some(images, spec, n=n, seed=seed)
    shown = _Shown(images, spec, settings, name, backbone, (views or _FEW_VIEWS) if settings else 0, seed)
    png = drawing.to_png(_draw(rows, shown))
    if output is not None:
        drawing.publish_picture(output, png)
    listed = tuple(_facts(images, row.position) for row in rows)
    seconds = time.perf_counter() - started
    return Preview(png, output, name, backbone, spec, shown.views, seed, listed, len(images), refused, seconds)


def _named(request: ExtractRequest) -> ExtractRequest:
    """``request`` with a name instead of ``auto``, chosen as for a new cache."""
    if request.backbone != AUTO:
        return request
    from featcache.system.device import choose_runtime

    return dataclasses.replace(request, backbone=choose_backbone(choose_runtime().device.type))


def _training_images(images: ImageList, *, seed: int) -> ImageList:
    """Those that ``finetune`` would train on, numbered as there; all, where it would refuse the source."""
    try:
        split = read_source(images, seed=seed).images
    except SourceError:
        return images
    return split.take(np.flatnonzero(split.splits == SPLITS.index("train")))


def sample(labels: Array, *, seed: int) -> Indices:
    """All positions of (N,) ``labels`` at random, but so that the classes take turns as long as they last."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = np.argsort(labels[order], kind="stable")
    _, first, counts = np.unique(labels[order][by_class], return_index=True, return_counts=True)
    turn = np.empty(len(order), np.intp)
    turn[by_class] = np.arange(len(order)) - np.repeat(first, counts)
    return order[np.argsort(turn, kind="stable")]


# ------------------------------------------------------------------------------------------------------ pixels


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """One image: its position in the list, the photograph upright, and what is kept of it for evaluation and training."""

    position: int
    photo: Image.Image
    evaluated: Picture
    trained_on: Picture


def _decode_some(images: ImageList, spec: PreprocessSpec, *, n: int, seed: int) -> tuple[list[_Row], dict[str, str]]:
    """The first ``n`` of the sample that can be decoded, class by class, and why others cannot. Raises SourceError: none can."""

    def convert(data: bytes) -> tuple[Image.Image, Picture, Picture]:
        photo = decode(data, white_level=spec.white_level)
        if min(photo.size) < 1:
            raise RefusedImage("an image without pixels")
        return photo, network_input(spec)(data), TrainingInput(spec)(data)

    rows: list[_Row] = []
    refused: dict[str, str] = {}
    for read in read_images(images, map(int, sample(images.labels, seed=seed)), convert):
        if read.value is None:
            refused[images.paths[read.position]] = read.reason
        else:
            rows.append(_Row(read.position, *read.value))
        if len(rows) == n:
            break
    if not rows:
        raise SourceError(images.all_refused(dict(enumerate(refused.values()))))
    return sorted(rows, key=lambda row: (images.labels[row.position], row.position)), refused


def _facts(images: ImageList, position: int) -> dict[str, str | None]:
    label, split = images.labels[position], images.splits[position]
    return {
        "path": images.paths[position],
        "label": images.classes[label] if label >= 0 else None,
        "split": SPLITS[split] if split else None,
    }


# ----------------------------------------------------------------------------------------------------- drawing


@dataclasses.dataclass(frozen=True, eq=False)
class _Shown:
    """What the picture is of."""

    images: ImageList
    spec: PreprocessSpec
    recipe: Recipe | None
    recipe_name: str | None
    backbone: str
    views: int
    seed: int

    @functools.cached_property
    def cell(self) -> tuple[int, int]:
        """(width, height) of a view in the picture."""
        height, width = self.spec.crop
        if max(height, width) > _MOST:
            factor = _EDGE / max(height, width)
            return max(1, round(width * factor)), max(1, round(height * factor))
        times = max(1, _EDGE // max(height, width))
        return width * times, height * times

    @property
    def photo_width(self) -> int:
        """Room for a photograph, as high as a view: most are up to half as wide again as high."""
        return round(max(self.cell[1] * 1.5, self.cell[0]))

    def pictures(self, row: _Row) -> Iterator[Picture]:
        """Evaluation's view, then those of epochs 1, 2, ..."""
        yield row.evaluated
        for epoch in range(self.views if self.recipe else 0):
            steps, seed = self.recipe.augmentation if self.recipe else (), (self.seed, epoch, row.position)
            yield augment_picture(row.trained_on, steps, size=self.spec.crop, seed=seed).numpy()

    def columns(self) -> list[tuple[int, str, str]]:
        """Left edge, heading, and a line below it, of the photograph and of each view."""
        x = _MARGIN + _WORDS + _GROUP
        found = [(x, "photograph", "frame: what evaluation sees")]
        x += self.photo_width + _GROUP
        found.append((x, "evaluation", "val, test, predict"))
        x += self.cell[0] + _GROUP
        for epoch in range(1, self.views + 1):
            found.append((x, f"epoch {epoch}", "" if epoch > 1 else "augmented for training"))
            x += self.cell[0] + _GAP
        return found

    def lines(self) -> list[str]:
        """What is above the rows: backbone, then recipe."""
        spec = self.spec
        height, width = spec.crop
        resize = (
            f"shorter edge to {spec.resize}" if isinstance(spec.resize, int) else "to {1} x {0}".format(*spec.resize)
        )
        cut = "" if spec.resize == spec.crop else f", the middle {width} x {height}"
        reduced = f"; drawn at {self.cell[0]} x {self.cell[1]}" if self.cell[0] < width else ""
        lines = [f"{self.backbone}: {resize} pixels ({spec.interpolation}){cut}{reduced}"]
        if self.recipe:
            steps = ", ".join(map(step_in_words, self.recipe.augmentation)) or "no augmentation"
            lines.append(f"recipe {self.recipe_name}: {steps}")
            if self.views > (self.recipe.epochs or 1):
                lines[-1] += f"; it ends after epoch {self.recipe.epochs}"
        return lines


def _draw(rows: list[_Row], shown: _Shown) -> Image.Image:
    columns, lines = shown.columns(), shown.lines()
    top = _MARGIN + _TITLE + len(lines) * (_TEXT + 12) + 3 * _TEXT + 40
    step = shown.cell[1] + _GAP
    words = max(drawing.text_width(line, _TEXT) for line in lines)
    width = max(columns[-1][0] + shown.cell[0], min(_MARGIN + math.ceil(words), _WIDEST)) + _MARGIN
    image = Image.new("RGB", (width, top + len(rows) * step + _TEXT + _MARGIN), drawing.PAPER)
    draw = ImageDraw.Draw(image)
    _draw_head(draw, columns, lines, top=top, width=width - 2 * _MARGIN)
    for number, row in enumerate(rows):
        _draw_row(image, draw, row, shown, columns=columns, top=top + number * step)
    kind = "training images" if shown.recipe and shown.images.splits.any() else "images"
    foot = f"{len(rows)} of {len(shown.images):,} {kind}, the classes in turn, at random in each (seed {shown.seed})"
    drawing.write(draw, (_MARGIN, image.height - _MARGIN), foot, _SMALL, fill=drawing.QUIET)
    return image


def _draw_head(
    draw: ImageDraw.ImageDraw, columns: list[tuple[int, str, str]], lines: list[str], *, top: int, width: int
) -> None:
    y = _MARGIN + _TITLE
    drawing.write(draw, (_MARGIN, y), "What the network sees", _TITLE)
    for line in lines:
        y += _TEXT + 12
        drawing.write(draw, (_MARGIN, y), line, _TEXT, fill=drawing.QUIET, width=width)
    draw.line((_MARGIN, y + 24, _MARGIN + width, y + 24), fill=drawing.RULE, width=2)
    for x, heading, below in columns:
        drawing.write(draw, (x, top - _SMALL - 20), heading, _TEXT)
        drawing.write(draw, (x, top - 12), below, _SMALL, fill=drawing.QUIET)


def _draw_row(
    image: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: _Row,
    shown: _Shown,
    *,
    columns: list[tuple[int, str, str]],
    top: int,
) -> None:
    facts = _facts(shown.images, row.position)
    y = top + _TEXT
    label = facts["label"] or "no label"
    drawing.write(draw, (_MARGIN, y), label, _TEXT if drawing.fits(label, _TEXT, _WORDS) else _SMALL, width=_WORDS)
    for text in (Path(str(facts["path"])).name, f"{row.photo.width} x {row.photo.height}"):
        y += _SMALL + 10
        drawing.write(draw, (_MARGIN, y), text, _SMALL, fill=drawing.QUIET, width=_WORDS)
    (photo_left, *_), *others = columns
    photo = drawing.fitted(row.photo, shown.photo_width, shown.cell[1])
    corner = (photo_left, top + (shown.cell[1] - photo.height) // 2)
    image.paste(photo, corner)
    _draw_frame(draw, shown.spec, row.photo.size, corner, photo.size)
    for (left, *_), pixels in zip(others, shown.pictures(row), strict=True):
        view = Image.fromarray(pixels)
        if view.size != shown.cell:
            smaller = view.width > shown.cell[0]
            view = view.resize(shown.cell, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)
        image.paste(view, (left, top))


def _draw_frame(
    draw: ImageDraw.ImageDraw,
    spec: PreprocessSpec,
    whole: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Around the part of a photograph of ``whole`` pixels that evaluation sees, where it is drawn at ``corner`` in ``size``."""
    height, width = spec.resized(whole[1], whole[0])
    edges = []
    for start, length, resized, kept in zip(corner, size, (width, height), spec.crop[::-1], strict=True):
        low = (resized - kept) / 2 / resized
        first = start + round(low * length)
        edges.append((first, max(start + round((1 - low) * length) - 1, first + 4)))  # of a photograph like a thread
    (left, right), (upper, lower) = edges
    if (left, upper, right - left + 1, lower - upper + 1) == (*corner, *size):
        return  # all of it
    draw.rectangle((left, upper, right, lower), outline="#000000", width=4)
    draw.rectangle((left + 1, upper + 1, right - 1, lower - 1), outline="#ffffff", width=2)


def summary(made: Preview) -> list[str]:
    """Lines for people: what was drawn, and of which images."""
    what = f"{quantity(made.views, 'view')} of each by the recipe {made.recipe}" if made.recipe else "evaluation alone"
    lines = [
        f"{made.path}: {len(made.images)} of {quantity(made.listed, 'image')} as {made.backbone} sees them, {what}"
    ]
    for row in made.images:
        lines.append(f"  {row['label'] or 'no label'}: {printable(str(row['path']))}")
    return lines + [f"  refused: {path}: {reason}" for path, reason in made.refused.items()]
