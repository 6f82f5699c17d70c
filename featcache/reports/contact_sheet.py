"""The contact sheet: predicted images with their labels, mistakes first, as one picture.

In: judged images, files or pixels. Out: a PNG. Mistakes have a thick frame and a cross, right ones a thin frame and a tick: shape
tells them apart, colour only helps.
"""

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from featcache.errors import SourceError
from featcache.images.decode import decode
from featcache.images.in_memory import Held
from featcache.images.read import Paths, read_images
from featcache.models.scoring import HELD_OUT
from featcache.reports.elements import drawing
from featcache.reports.elements.numbers import percent_text
from featcache.system.display import printable
from featcache.system.runtime_options import usable_cores

if TYPE_CHECKING:
    from featcache.reports.model_report.subject import Subject

_EDGE, _GAP, _MARGIN = 180, 16, 40  # pixels of a picture, between pictures, around
_TITLE, _TEXT, _SMALL = 38, 26, 20  # sizes of letters
_LINE = _SMALL + 8
_WRONG, _RIGHT, _EMPTY = "#c44601", "#5b7c99", "#f0f1f3"  # vermilion and slate differ in lightness, too
_SHARE_OF_MISTAKES = 5 / 6  # of the sheet, at most, where there are right ones to compare with


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """One image and what was said of it.

    Attributes:
        image: its file; or a PIL image, or uint8 (H, W, 3).
        label, predicted: the true class and the likeliest one. probability: of that, 0..1.
        digest: sha256 of the file that was judged, of which alone a picture is shown; empty: of whatever is there.
    """

    image: str | Path | Held
    label: str
    predicted: str
    probability: float
    digest: bytes = b""


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Pictures under a heading; each has ``lines`` of words below it."""

    heading: str
    rows: tuple[Judged, ...]
    lines: int


def contact_sheet(
    rows: Sequence[Judged],
    *,
    title: str,
    about: str = "",
    most: int = 48,
    columns: int = 8,
    seed: int = 0,
    workers: int = 1,
) -> bytes:
    """Draw predicted images: mistakes, the most confident first, then right ones at random.

    Args:
        rows: all of a split, in any order; it is counted over all of them.
        title: what they are, as ``val``; the count of right ones follows. about: a line below, as the model.
        most: pictures. columns: in a row. seed: which right ones. workers: threads that decode.

    Returns:
        A PNG. An image that cannot be read is an empty frame with the reason in it.

    Raises:
        SourceError: there are no ``rows``.
    """
    if not rows:
        raise SourceError("a contact sheet needs predicted images with labels, and there are none")
    parts = _choose(rows, most=most, columns=columns, seed=seed)
    right = sum(row.label == row.predicted for row in rows)
    head = f"{title}: {right:,} of {len(rows):,} right ({percent_text(right / len(rows))})"
    width = 2 * _MARGIN + columns * (_EDGE + _GAP) - _GAP
    top = _MARGIN + _TITLE + (_LINE + 4 if about else 0)
    height = top + sum(_height(part, columns) for part in parts) + _MARGIN
    sheet = Image.new("RGB", (width, height), drawing.PAPER)
    draw = ImageDraw.Draw(sheet)
    drawing.write(draw, (_MARGIN, _MARGIN + _TITLE - 8), head, _TITLE, width=width - 2 * _MARGIN)
    if about:
        drawing.write(draw, (_MARGIN, top - 4), about, _SMALL, fill=drawing.QUIET, width=width - 2 * _MARGIN)
    pictures = iter(_pictures([row for part in parts for row in part.rows], workers=workers))
    for part in parts:
        drawing.write(draw, (_MARGIN, top + 2 * _TEXT), part.heading, _TEXT, width=width - 2 * _MARGIN)
        for number, (row, picture) in enumerate(
            zip(part.rows, itertools.islice(pictures, len(part.rows)), strict=True)
        ):
            down, across = divmod(number, columns)
            place = (_MARGIN + across * (_EDGE + _GAP), top + 3 * _TEXT + down * _step(part))
            _draw_one(sheet, draw, row, picture, place=place)
        top += _height(part, columns)
    return drawing.to_png(sheet)


def sheet_beside(subject: "Subject") -> Path | None:
    """Draw the contact sheet of a report beside its model; None where none of its pictures is at hand.

    Raises StorageError: it cannot be written, or there is a file of its name that was not drawn here.
    """
    scored, model, pictures = subject.scored, subject.model, subject.pictures
    split = {HELD_OUT: "val"}.get(scored.split, scored.split)
    folder = model.path.resolve() if model.path.name in ("", "..") else model.path
    path = folder.with_name(f"{folder.name}.{split}.png")
    drawing.check_picture_path(path)
    if pictures.root is None:
        return None
    rows, there = [], False
    predicted, sure = subject.predicted.tolist(), scored.answers.confidence.tolist()
    for k, name in enumerate(scored.relative()):
        digest = scored.digests[k].tobytes()
        file = pictures.root / (name or pictures.path_of(digest) or "")
        there = there or file.is_file()
        rows.append(Judged(file, model.classes[scored.y[k]], model.classes[predicted[k]], sure[k], digest))
    if not there:
        return None
    about = f"{folder.name}, {model.spec.backbone}"
    drawing.publish_picture(path, contact_sheet(rows, title=scored.split, about=about, workers=usable_cores()))
    return path


def _choose(rows: Sequence[Judged], *, most: int, columns: int, seed: int) -> list[_Part]:
    """The mistakes and the right ones that are shown, each under what is said of them."""
    wrong = sorted((row for row in rows if row.label != row.predicted), key=lambda row: -row.probability)
    right = [row for row in rows if row.label == row.predicted]
    room = max(most - len(right), round(_SHARE_OF_MISTAKES * most))
    shown = tuple(wrong[:room])
    left = most - len(shown)
    chosen = np.random.default_rng(seed).permutation(len(right))[: left - left % columns or left]  # full rows
    some = tuple(right[k] for k in sorted(chosen.tolist()))
    number = f"{len(shown)} of {len(wrong):,} mistakes" if len(shown) < len(wrong) else f"{len(wrong)} mistakes"
    number = "1 mistake" if len(wrong) == 1 else f"{number}, the most confident first"
    parts = [_Part(f"{number}: the answer, below it the truth", shown, 2)] if wrong else []
    if some:
        number = f"{len(some)} of {len(right):,} right ones, at random" if len(some) < len(right) else "all right ones"
        parts.append(_Part(number if wrong else f"no mistake; {number}", some, 1))
    return parts


def _step(part: _Part) -> int:
    """Pixels from one row of pictures to the next."""
    return _EDGE + 8 + part.lines * _LINE + _GAP


def _height(part: _Part, columns: int) -> int:
    return 3 * _TEXT + -(-len(part.rows) // columns) * _step(part)


def _pictures(rows: Sequence[Judged], *, workers: int) -> list[Image.Image | str]:
    """Each row's picture, small; or why there is none."""
    paths = tuple(str(row.image) if isinstance(row.image, str | Path) else "" for row in rows)
    held = {number: row.image for number, row in enumerate(rows) if not isinstance(row.image, str | Path)}
    reads = read_images(
        Paths(None, paths, held),
        range(len(rows)),
        lambda data: drawing.fitted(decode(data, at_least=_EDGE), _EDGE, _EDGE),
        workers=workers,
    )
    return [
        "changed since" if row.digest not in (b"", read.digest) else read.value or read.reason
        for row, read in zip(rows, reads, strict=True)
    ]


def _draw_one(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: Judged,
    picture: Image.Image | str,
    *,
    place: tuple[int, int],
) -> None:
    (x, y), is_right = place, row.label == row.predicted
    draw.rectangle((x, y, x + _EDGE - 1, y + _EDGE - 1), fill=_EMPTY)
    if isinstance(picture, str):
        for number, text in enumerate(textwrap.wrap(printable(picture), 17)[:4]):
            line = y + 72 + number * _LINE
            drawing.write(draw, (x + 12, line), text, _SMALL, fill=drawing.QUIET, width=_EDGE - 24)
    else:
        sheet.paste(picture, (x + (_EDGE - picture.width) // 2, y + (_EDGE - picture.height) // 2))
    colour, thick = (_RIGHT, 2) if is_right else (_WRONG, 6)
    draw.rectangle((x, y, x + _EDGE - 1, y + _EDGE - 1), outline=colour, width=thick)
    _draw_badge(draw, (x, y), is_right=is_right, fill=colour)
    share = percent_text(row.probability, 0)
    room = _EDGE - drawing.text_width(share, _SMALL) - 8
    line = y + _EDGE + 8 + _SMALL
    drawing.write(draw, (x, line), row.predicted, _SMALL, fill=drawing.INK if is_right else _WRONG, width=room)
    left = x + _EDGE - drawing.text_width(share, _SMALL)
    drawing.write(draw, (left, line), share, _SMALL, fill=drawing.QUIET)
    if not is_right:
        before = drawing.write(draw, (x, line + _LINE), "is ", _SMALL, fill=drawing.QUIET)
        drawing.write(draw, (x + before, line + _LINE), row.label, _SMALL, width=_EDGE - before)


def _draw_badge(draw: ImageDraw.ImageDraw, corner: tuple[int, int], *, is_right: bool, fill: str) -> None:
    """A tick or a cross in a corner, drawn: not every font has them."""
    x, y = corner
    draw.rectangle((x, y, x + 33, y + 33), fill=fill)
    strokes = [[(9, 18), (15, 24), (25, 11)]] if is_right else [[(10, 10), (24, 24)], [(24, 10), (10, 24)]]
    for stroke in strokes:
        draw.line([(x + across, y + down) for across, down in stroke], fill=drawing.PAPER, width=4, joint="curve")
