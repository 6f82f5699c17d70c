"""Thumbnails: upright, small, within the budget, the same for any number of workers, each of its own file."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.images.source import list_images
from featcache.reports.elements.thumbnails import fitting_size, thumbnails


def picture(path: Path, size: tuple[int, int] = (600, 300), *, orientation: int | None = None) -> Path:
    """Left half red, right half blue, with some noise."""
    pixels = np.random.default_rng(size[0]).integers(0, 40, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, : size[0] // 2, 0] += 200
    pixels[:, size[0] // 2 :, 2] += 200
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def opened(webp: bytes | None) -> Image.Image:
    assert webp is not None
    image = Image.open(io.BytesIO(webp))
    assert image.format == "WEBP"
    return image.convert("RGB")


def test_upright_at_the_size_asked_for(tmp_path: Path) -> None:
    files = [picture(tmp_path / "plain.jpg"), picture(tmp_path / "turned.jpg", orientation=6)]
    files += [picture(tmp_path / "small.png", (40, 20)), picture(tmp_path / "narrow.jpg", (3000, 12))]
    found = [opened(each.webp) for each in thumbnails(files, size=96)]
    assert [each.size for each in found] == [(96, 48), (48, 96), (40, 20), (96, 1)]
    red, blue = found[1].getpixel((24, 10)), found[1].getpixel((24, 86))  # orientation 6: the left edge is the top
    assert red[0] > 150 > red[2]
    assert blue[2] > 150 > blue[0]


def test_damaged_and_missing_files_have_a_reason(tmp_path: Path) -> None:
    good, bad = picture(tmp_path / "good.jpg"), tmp_path / "bad.jpg"
    bad.write_bytes(good.read_bytes()[:2000])
    first, second, third = thumbnails([bad, tmp_path / "gone.jpg", good])
    assert (first.webp, second.webp, first.uri) == (None, None, None)
    assert first.reason
    assert first.digest == hashlib.sha256(bad.read_bytes()).digest()
    assert second.reason.startswith("cannot be read")
    assert third.digest == hashlib.sha256(good.read_bytes()).digest()
    assert (third.uri or "").startswith("data:image/webp;base64,")


def test_workers_change_nothing_and_the_budget_holds(tmp_path: Path) -> None:
    files = [picture(tmp_path / f"{k}.jpg", (200 + k, 150)) for k in range(40)]
    whole = thumbnails(files, workers=1)
    assert whole == thumbnails(files, workers=4)
    sizes = [len(each.webp or b"") for each in whole]
    budget = sum(sizes[:10]) + sizes[10] // 2
    kept = thumbnails(files, workers=3, budget=budget)
    assert kept[:10] == whole[:10]
    assert all(each.webp is None and "limited to" in each.reason for each in kept[10:])
    assert thumbnails(files, [7, 3]) == [whole[7], whole[3]]


def test_of_a_listed_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture(tmp_path / "a" / "1.jpg")
    [found] = thumbnails(list_images(tmp_path), size=None, budget=10_000)
    assert opened(found.webp).size == (160, 80)


@pytest.mark.parametrize(
    ("count", "budget", "size"), [(1, None, 160), (1000, 4_000_000, 160), (10_000, 8_000_000, 64), (10**6, 1, 48)]
)
def test_sizes_follow_the_budget(count: int, budget: int | None, size: int) -> None:
    assert fitting_size(count, budget) == size
