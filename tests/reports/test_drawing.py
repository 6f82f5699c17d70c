"""Letters: any text is drawn, within its width; what no font has is written out. Files: our own are known, others kept."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from featcache.errors import StorageError, UsageError
from featcache.reports.elements import drawing

TEXTS = [
    "ants",
    "\x1b[31m\n\t\u202e",
    "bad\udcff",
    "\U0001f408 \u732b \u0939\u093f",
    "\u05d7\u05ea 7 x",
    "x" * 10**6,
    "",
    "\u732b" * 999,
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_any_text_keeps_within_its_width(text: str) -> None:
    image = Image.new("RGB", (400, 60), "white")
    used = drawing.write(ImageDraw.Draw(image), (10, 40), text, 26, width=200)
    rows, columns = np.nonzero(np.asarray(image).min(axis=2) < 255)
    assert used <= 200 and (not text or 5 <= columns.min() < columns.max() <= 215)
    assert not text or 5 < rows.min() < rows.max() < 55


def test_what_no_font_has_is_written_out() -> None:
    """U+0378 is no character, U+E000 nobody's."""
    assert drawing.shortened("a\u0378\ue000b", 26, 999) == "a\\u0378\\ue000b"
    assert drawing.shortened("cafe\u0301", 26, 999) == "café"  # as macOS spells it
    assert drawing.text_width("\u0378", 26) == drawing.text_width("\\u0378", 26)


def test_the_middle_is_left_out() -> None:
    short = drawing.shortened("beginning " * 20 + "end", 26, 300)
    assert short.startswith("beginning") and short.endswith("end") and short.count("…") == 1
    assert 270 < drawing.text_width(short, 26) <= 300


def test_letters_of_right_to_left_are_in_the_order_of_reading_without_a_library() -> None:
    assert drawing._turned("a \u05d0\u05d1\u05d2 7") == "a \u05d2\u05d1\u05d0 7"


def test_own_pictures_are_known(tmp_path: Path) -> None:
    path = tmp_path / "a.PNG"
    for colour in ("red", "blue"):
        drawing.publish_picture(path, drawing.to_png(Image.new("RGB", (4, 4), colour)))
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "c.png").mkdir()
    for name in ("b.png", "c.png", "no/d.png"):
        with pytest.raises(StorageError):
            drawing.publish_picture(tmp_path / name, path.read_bytes())
    with pytest.raises(UsageError, match=r"ends in \.png"):
        drawing.check_picture_path(tmp_path / "a.jpg")
