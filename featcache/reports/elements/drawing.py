"""What pictures made of photographs and words need: letters of any script, sizes that fit, PNG files that are known again.

In: texts, whatever is in them; Pillow images. Out: the same, drawn. Pillow's own font has the letters of western Europe;
others come from fonts of this machine, and what none of them has is written out: ``\\u732b``.
"""

import bisect
import functools
import importlib.util
import io
import itertools
import os
import re
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, features

from featcache.errors import StorageError, UsageError
from featcache.system.display import printable
from featcache.system.files import check_output, publish_file

INK, QUIET, RULE, PAPER = "#1c1e21", "#62666d", "#d8dbe0", "#ffffff"
MARK = {"Software": "featcache"}  # in every PNG that is drawn here
_DPI = (144, 144)  # drawn at twice the size at which it is shown
_LONGEST = 400  # characters of a text that are looked at
# Files by which systems know fonts of other scripts; Pillow finds them in the usual folders.
_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "segoeui.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc"),
    *("wqy-zenhei.ttc", "PingFang.ttc", "msyh.ttc", "malgun.ttf", "NotoSansDevanagari-Regular.ttf", "Nirmala.ttf"),
)
_Font = ImageFont.FreeTypeFont


def check_picture_path(path: Path) -> None:
    """Raise, before any work, if ``path`` cannot become a picture drawn here.

    Raises:
        UsageError: it is not called .png. StorageError: its folder is missing or not writable, or it is something else.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"the picture is a PNG; give -o a name that ends in .png, found {path}")
    if os.path.lexists(path) and not _is_drawn_here(path):
        raise StorageError(f"{path} exists and was not drawn by featcache; move it away")
    check_output(path)


def _is_drawn_here(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"tEXtSoftware\0featcache" in file.read(100)


def to_png(image: Image.Image) -> bytes:
    """A PNG that ``check_picture_path`` knows again."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in MARK.items():
        info.add_text(key, value)
    image.save(file, "PNG", pnginfo=info, dpi=_DPI)
    return file.getvalue()


def publish_picture(path: Path, png: bytes) -> None:
    """Write ``png``, replacing what ``check_picture_path`` has passed. Raises StorageError."""
    check_picture_path(path)  # again: it took a while
    with publish_file(path, needed=len(png)) as file:
        file.write(png)


def write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, *, fill: str = INK, width: float = 0
) -> float:
    """Draw ``text`` from ``place``, the left end of its baseline; its width. ``width``: pixels there are, if not any number."""
    x = place[0]
    for run, font in _runs(shortened(text, size, width) if width else printable(text[:_LONGEST]), size):
        draw.text((x, place[1]), run, fill=fill, font=font, anchor="ls")
        x += font.getlength(run)
    return x - place[0]


def shortened(text: str, size: int, width: float) -> str:
    """``text`` as it is drawn, its middle left out if it is wider than ``width`` pixels: both ends of a path tell most."""
    text = _known(
        printable(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"), size
    )
    if text_width(text, size) <= width:
        return text

    def keep(count: int) -> str:
        return f"{text[: count // 2]}…{text[len(text) - (count - count // 2) :]}"

    return keep(bisect.bisect_right(range(1, len(text)), width, key=lambda count: text_width(keep(count), size)))


def fits(text: str, size: int, width: float) -> bool:
    """Whether ``text`` is drawn whole in ``width`` pixels."""
    return len(text) <= _LONGEST and text_width(printable(text), size) <= width


def text_width(text: str, size: int) -> float:
    """Pixels that ``text`` takes."""
    return float(sum(font.getlength(run) for run, font in _runs(text, size)))


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """``image`` within ``width`` x ``height``, its aspect kept, reduced smoothly or enlarged."""
    factor = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _known(text: str, size: int) -> str:
    """``text`` in composed letters, those that no font has written out. They are no part of a line any more: it fits or not."""
    letters = unicodedata.normalize("NFC", text)
    return "".join(c if _font_of(c, size) else c.encode("unicode_escape").decode() for c in letters)


def _runs(text: str, size: int) -> list[tuple[str, _Font]]:
    """Stretches of ``text``, each with the font that draws it.

    A word is drawn by one font if there is one that can; so is all of a text of letters from right to left, to keep its order.
    """
    text = _known(text, size)
    found: list[tuple[str, _Font]] = []
    whole_text = any(map(_is_right_to_left, text)) and _font_of(text, size)
    for word in [text] if whole_text else re.split("( +)", text):
        whole = [word] if word.isspace() or _font_of(word, size) else word
        for part in whole:
            font = found[-1][1] if found and part.isspace() else _font_of(part, size) or _own_font(size)
            if found and found[-1][1] is font:
                found[-1] = (found[-1][0] + part, font)
            elif part:
                found.append((part, font))
    return found if features.check("raqm") else [(_turned(run), font) for run, font in found]


def _turned(run: str) -> str:
    """Letters from right to left in the order in which they are seen, where no library orders and joins them."""
    groups = itertools.groupby(run, _is_right_to_left)
    return "".join("".join(group)[:: -1 if right_to_left else 1] for right_to_left, group in groups)


def _is_right_to_left(char: str) -> bool:
    return unicodedata.bidirectional(char) in ("R", "AL")


@functools.lru_cache(4096)
def _font_of(text: str, size: int) -> _Font | None:
    """The first font that has all of ``text``."""
    fonts = itertools.chain([_own_font(size)], (font for name in _FONTS if (font := _other_font(name, size))))
    return next((font for font in fonts if all(_has(font, char) for char in text)), None)


@functools.lru_cache(4096)
def _has(font: _Font, char: str) -> bool:
    """Whether ``font`` draws something for ``char`` that it does not draw for what is no character."""
    if char.isspace():
        return True
    # Other engines add what a letter lacks, as a mark its circle.
    plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    mask, none = plain.getmask(char), plain.getmask("\uffff")
    return (mask.size, bytes(mask)) != (none.size, bytes(none))


@functools.cache
def _own_font(size: int) -> _Font:
    font = ImageFont.load_default(size)
    assert isinstance(font, _Font)
    return font


@functools.cache
def _other_font(name: str, size: int) -> _Font | None:
    """A font of this machine, or of matplotlib, if it is installed."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        found = importlib.util.find_spec("matplotlib")
        try:
            return ImageFont.truetype(
                Path(str(found and found.origin)).parent / "mpl-data" / "fonts" / "ttf" / name, size
            )
        except OSError:
            return None
