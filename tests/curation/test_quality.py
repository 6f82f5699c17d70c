"""Poor images: pictures made dark, blurred, blank or tiny are found, others are not, and a set's own way is no fault."""

import functools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from featcache.curation.finding import Finding
from featcache.curation.quality import find_poor_images
from featcache.images.statistics import LOOKS, look_at


@functools.cache
def picture(seed: int = 0, size: int = 200) -> np.ndarray:
    """Shapes of all sizes in several colours, with edges, as photographs have them."""
    rng = np.random.default_rng(seed)
    canvas = np.full((size, size, 3), 128, np.uint8)
    for _ in range(150):
        x, y, w, h = rng.integers(0, size, 4)
        canvas[y : y + h // 6 + 2, x : x + w // 6 + 2] = rng.integers(20, 236, 3)
    return canvas


def found(pictures: list[np.ndarray], edges: list[float] | None = None) -> list[Finding]:
    looks = np.array([look_at(pixels) for pixels in pictures])
    sizes = [min(pixels.shape[:2]) for pixels in pictures] if edges is None else edges
    return find_poor_images(np.arange(len(pictures)) + 100, looks, np.array(sizes, float))


def blurred(pixels: np.ndarray, radius: float = 3) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


PLAIN = np.full((120, 120, 3), (200, 30, 60), np.uint8)
POOR = {
    "tiny": picture(size=20),
    "blank": PLAIN,
    "dark": (picture() * 0.25).astype(np.uint8),
    "blurred": blurred(picture()),
}


@pytest.mark.parametrize("kind", POOR)
def test_each_kind_is_found_and_nothing_else(kind: str) -> None:
    (finding,) = found([*(picture(seed) for seed in range(1, 30)), POOR[kind]])
    assert (finding.kind, finding.row) == (kind, 129)
    assert 0 < finding.score <= 1
    assert any(character.isdigit() for character in finding.reason)


def test_an_image_has_one_finding() -> None:
    """Black is blank, dark and without any edge."""
    (finding,) = found([*(picture(seed) for seed in range(9)), np.zeros((50, 50, 3), np.uint8)])
    assert finding.kind == "blank"
    assert finding.score == 1


def test_worse_images_come_first() -> None:
    pictures = [picture(seed) for seed in range(40)]
    findings = found([*pictures, blurred(pictures[0], 2.5), blurred(pictures[0], 8)])
    assert [finding.row for finding in findings] == [141, 140]
    assert findings[0].score > findings[1].score


def test_colours_of_one_grey_are_not_blank() -> None:
    """Red and green of equal brightness, by BT.601."""
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[:30], pixels[30:] = (196, 0, 0), (0, 100, 0)
    assert not [finding for finding in found([pixels, *map(picture, range(9))]) if finding.kind == "blank"]


@pytest.mark.parametrize("kind", POOR)
def test_the_way_of_a_set_is_no_fault(kind: str) -> None:
    assert found([POOR[kind]] * 20 + [picture(seed) for seed in range(60)]) == []


def test_small_among_large_is_tiny() -> None:
    looks = np.array([look_at(picture())] * 30)
    edges = np.full(30, 2000.0)
    edges[4] = 150
    (finding,) = find_poor_images(np.arange(30), looks, edges)
    assert (finding.kind, finding.row) == ("tiny", 4)


def test_nothing_is_known_of_images_that_were_not_decoded() -> None:
    assert find_poor_images(np.arange(3), np.full((3, len(LOOKS)), np.nan), np.full(3, np.nan)) == []
    assert find_poor_images(np.arange(0), np.empty((0, len(LOOKS))), np.empty(0)) == []
