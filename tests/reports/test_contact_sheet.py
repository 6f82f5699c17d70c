"""The contact sheet: which images are on it, in which order, and that shape tells right from wrong."""

import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photo
from PIL import Image

from featcache.errors import SourceError
from featcache.reports import contact_sheet as module
from featcache.reports.contact_sheet import Judged, contact_sheet


def judged(number: int, *, right: bool, probability: float = 0.9) -> Judged:
    """An image whose one colour is its number."""
    image = np.full((40, 40, 3), (number % 256, 7, 200 + number // 256), np.uint8)
    return Judged(image, "a", "a" if right else "b", probability)


def drawn(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def numbers_on(png: bytes) -> list[int]:
    """Those of the images, in the order of reading."""
    pixels = drawn(png).astype(int)
    numbers = np.where(
        (pixels[..., 1] == 7) & (pixels[..., 2] >= 200), pixels[..., 0] + 256 * (pixels[..., 2] - 200), -1
    )
    found, first = np.unique(numbers, return_index=True)
    return [int(number) for number in found[np.argsort(first)] if number >= 0]


def test_mistakes_come_first_and_the_confident_before_others() -> None:
    rows = [judged(k, right=True) for k in range(10)]
    rows += [judged(10 + k, right=False, probability=p) for k, p in enumerate((0.6, 0.99, 0.8))]
    shown = numbers_on(contact_sheet(rows, title="val", columns=4, most=12))
    assert shown[:3] == [11, 12, 10] and len(shown) == 11 and shown[3:] == sorted(shown[3:])


@pytest.mark.parametrize(
    ("wrong", "right", "expected"),
    [(0, 100, (0, 48)), (100, 100, (40, 8)), (100, 0, (48, 0)), (40, 5, (40, 5)), (3, 2, (3, 2)), (1, 500, (1, 40))],
)
def test_how_many_of_each(wrong: int, right: int, expected: tuple[int, int]) -> None:
    rows = [judged(k, right=k >= wrong) for k in range(wrong + right)]
    shown = numbers_on(contact_sheet(rows, title="val", seed=1))
    assert (sum(k < wrong for k in shown), sum(k >= wrong for k in shown)) == expected
    assert shown == numbers_on(contact_sheet(rows, title="val", seed=1))


def test_shape_tells_right_from_wrong() -> None:
    """Of pictures in black and white, whatever the colours: another badge, and a thicker frame."""
    corners = []
    for right in (True, False):
        pixels = drawn(contact_sheet([judged(0, right=right)], title="val")).astype(int)
        corners.append(pixels)
    ticked, crossed = (1 * (pixels[:300, :300].min(axis=2) < 128) for pixels in corners)
    assert (ticked != crossed).sum() > 300
    frames = [np.argwhere((pixels == [0, 7, 200]).all(axis=2)) for pixels in corners]
    assert len(frames[0]) - len(frames[1]) > 4 * 3 * 150


def test_files_of_any_name_and_kind(tmp_path: Path) -> None:
    good = write_photo(tmp_path / "line\nbreak <b>\u202e.png", (200, 30, 30), 1, (3000, 20))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    labels = ("<script>", "\udcff", "\u05d7\u05ea\u05d5\u05dc", "x" * 300)
    paths = [good, str(good), tmp_path / "bad.jpg", tmp_path / "gone.jpg"]
    rows = [Judged(path, label, "other", 0.5) for path, label in zip(paths, labels, strict=True)]
    pixels = drawn(contact_sheet(rows, title="\x1b[31m", about="\n" * 500))
    assert pixels.shape[1] == 1632
    with pytest.raises(SourceError, match="there are none"):
        contact_sheet([], title="val")


def test_a_photograph_is_decoded_at_a_reduced_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    fitted = module.drawing.fitted
    monkeypatch.setattr(
        module.drawing, "fitted", lambda image, *size: (sizes.append(image.size), fitted(image, *size))[1]
    )
    path = write_photo(tmp_path / "large.jpg", (9, 99, 9), 1, (2400, 1600))
    contact_sheet([Judged(path, "a", "a", 1.0)], title="val")
    assert sizes == [(600, 400)]


def test_it_lies_beside_the_model_with_pictures_of_what_was_judged(
    trained: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """``evaluate --report`` writes it where pictures are at hand, ``fit-head --no-report`` does not."""
    shutil.copytree(trained / "m", tmp_path / "m")
    code, out, err = run("evaluate", tmp_path / "m", trained / "photos", "--report")
    assert code == 0, err
    assert f"  contact sheet: {tmp_path / 'm.all.png'}\n" in out
    with Image.open(tmp_path / "m.all.png") as sheet:
        assert sheet.text["Software"] == "featcache" and sheet.width > 1000  # type: ignore[attr-defined]
    (tmp_path / "m.all.png").write_bytes(b"mine")
    code, out, err = run("evaluate", tmp_path / "m", trained / "photos", "--report")
    assert code == 0 and "contact sheet" not in out and "  report: " in out
    assert (tmp_path / "m.all.png").read_bytes() == b"mine"
    code, out, err = run("fit-head", trained / "f.h5", "-o", tmp_path / "m2", "--no-report")
    assert code == 0 and {path.name for path in tmp_path.glob("m2*")} == {"m2"}


def test_a_file_that_is_not_what_was_judged_is_not_shown(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", (0, 0, 255), 1)
    digest = hashlib.sha256(path.read_bytes()).digest()
    shown, other = (
        contact_sheet([Judged(path, "a", "a", 0.9, given)], title="val", columns=1) for given in (digest, bytes(32))
    )

    def blue(png: bytes) -> int:
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int16)
        return int((pixels[..., 2] - pixels[..., 0] > 120).sum())

    assert blue(shown) > 10_000 > 100 > blue(other)
