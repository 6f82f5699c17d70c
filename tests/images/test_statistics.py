"""What is told of images, compared with what SciPy, Pillow, hashlib and the definitions say."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_photos, write_photo
from PIL import Image
from scipy import ndimage

from featcache.images import statistics
from featcache.images.source import ImageList, list_images
from featcache.images.statistics import LOOKS, Measured, look_at, measure, oddness

LAPLACE = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float64)


def looks_of(pixels: np.ndarray) -> dict[str, float]:
    return dict(zip(LOOKS, look_at(pixels), strict=True))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(40, 61), (256, 200), (3, 3)])
def test_looks_are_those_of_scipy_and_pillow(shape: tuple[int, int]) -> None:
    """Of pictures that are not reduced."""
    pixels = picture(*shape)
    found, exact = looks_of(pixels), pixels.astype(np.float64)
    grey = exact @ [0.299, 0.587, 0.114]
    assert found["brightness"] == pytest.approx(np.asarray(Image.fromarray(pixels).convert("L")).mean(), abs=0.6)
    assert found["brightness"] == pytest.approx(grey.mean(), rel=1e-5)
    assert found["contrast"] == pytest.approx(grey.std(), rel=1e-5)
    assert found["sharpness"] == pytest.approx(ndimage.convolve(grey, LAPLACE)[1:-1, 1:-1].var(), rel=1e-4)
    rg, yb = exact[..., 0] - exact[..., 1], (exact[..., 0] + exact[..., 1]) / 2 - exact[..., 2]
    assert (found["redness"], found["yellowness"]) == pytest.approx((rg.mean(), yb.mean()), rel=1e-3, abs=1e-3)
    colour = np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert found["colourfulness"] == pytest.approx(colour, rel=1e-4)


def test_looks_of_plain_colours() -> None:
    for colour, redness, yellowness in (((0, 0, 0), 0, 0), ((255, 255, 255), 0, 0), ((200, 100, 50), 100, 100)):
        found = looks_of(np.full((9, 9, 3), colour, np.uint8))
        expected = (np.dot(colour, [0.299, 0.587, 0.114]), 0, 0, redness, yellowness)
        assert [found[name] for name in LOOKS[:5]] == pytest.approx(expected, abs=1e-3)


def test_large_pictures_are_seen_on_one_scale() -> None:
    """Blocks of four equal pixels are the picture of a quarter of the width, each pixel the mean of its block."""
    small = picture(192, 256)
    large = small.repeat(4, axis=0).repeat(4, axis=1)
    assert look_at(large) == pytest.approx(look_at(small), rel=1e-6)
    noisy = picture(768, 1024)
    means = noisy.reshape(192, 4, 256, 4, 3).mean((1, 3))
    assert looks_of(noisy)["sharpness"] == pytest.approx(
        looks_of(np.round(means).astype(np.uint8))["sharpness"], rel=0.01
    )
    blurred = ndimage.gaussian_filter(large.astype(np.float64), (8, 8, 0)).astype(np.uint8)
    assert looks_of(blurred)["sharpness"] < looks_of(large)["sharpness"] / 10


@pytest.mark.parametrize("shape", [(1, 65000), (65000, 1), (2, 2)])
def test_of_hardly_any_pixels_sharpness_is_unknown(shape: tuple[int, int]) -> None:
    found = looks_of(picture(*shape))
    assert np.isnan(found["sharpness"])
    assert np.isfinite(found["brightness"])


@pytest.fixture
def photos(tmp_path: Path) -> ImageList:
    root = make_photos(tmp_path / "photos", each=6, splits=("train", "val"))
    shutil.copy(root / "train/red/00.jpg", root / "val/blue/copy.jpg")
    (root / "train/red/cut.jpg").write_bytes((root / "train/red/01.jpg").read_bytes()[:-30])
    (root / "train/red/empty.jpg").touch()
    (root / "train/red/text.png").write_text("no image")
    return list_images(root)


def test_every_image_is_measured_or_refused(photos: ImageList) -> None:
    found = measure(photos)
    names = {photos.paths[row]: reason for row, reason in found.refused.items()}
    assert [*names] == ["train/red/cut.jpg", "train/red/empty.jpg", "train/red/text.png"]
    assert names["train/red/empty.jpg"] == "empty file"
    for row in range(len(photos)):
        with_header, looked_at = found.headers[row] is not None, np.isfinite(found.looks[row]).all()
        assert with_header == looked_at == (row not in found.refused)
        if with_header:
            with Image.open(photos.root / photos.paths[row]) as image:
                assert (found.of("width")[row], found.of("height")[row]) == image.size
                assert found.of("aspect")[row] == pytest.approx(image.width / image.height)
                assert found.of("shorter_edge")[row] == min(image.size)
            assert found.of("bytes")[row] == photos.sizes[row]


def test_digests_are_of_all_files_that_may_be_copies(photos: ImageList) -> None:
    for sample in (0, 3, None):
        found = measure(photos, sample=sample)
        sizes = [found.of("bytes")[row] for row in found.readable]
        for row in found.readable:
            content = (photos.root / photos.paths[row]).read_bytes()
            assert found.hashed[row] == (sizes.count(len(content)) > 1)
            expected = hashlib.sha256(content).digest() if found.hashed[row] else bytes(32)
            assert found.digests[row].tobytes() == expected


def test_files_without_an_end_are_decoded_outside_of_the_sample(photos: ImageList) -> None:
    cut = photos.paths.index("train/red/cut.jpg")
    by_seed = {seed: measure(photos, sample=4, seed=seed) for seed in range(4)}
    assert any(cut in found.cut for found in by_seed.values())
    for found in by_seed.values():
        assert found.refused[cut].startswith("damaged")
        assert len(found.sampled) == 4
        looked_at = set(np.flatnonzero(np.isfinite(found.look("brightness"))))
        assert looked_at == {*found.sampled.tolist(), *found.cut.tolist()} - {cut}


def test_the_sample_depends_on_the_seed_and_the_paths_alone(photos: ImageList) -> None:
    backwards = photos.take(np.arange(len(photos))[::-1].copy())

    def drawn(images: ImageList, seed: int) -> set[str]:
        return {images.paths[row] for row in measure(images, sample=8, seed=seed, workers=1).sampled}

    assert drawn(photos, 0) == drawn(backwards, 0)
    assert len({frozenset(drawn(photos, seed)) for seed in range(5)}) == 5


def test_the_sample_is_smaller_of_large_images(photos: ImageList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_MOST_PIXELS", 10 * 61 * 47 + 5)
    assert len(measure(photos).sampled) == 10
    monkeypatch.setattr(statistics, "_MOST_PIXELS", 5)
    assert len(measure(photos).sampled) == 1


def test_progress_reaches_the_end(photos: ImageList) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    measure(photos, progress=lambda done, total, what: seen.setdefault(what, []).append((done, total)))
    assert [*seen][:2] == ["headers", "pixels"]
    for reports in seen.values():
        assert reports[-1][0] == reports[-1][1]


def test_the_odd_one_is_found_and_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(30):
        size = (100 + int(rng.integers(0, 9)), 80 + int(rng.integers(0, 9)))
        write_photo(tmp_path / f"usual/{k:02d}.jpg", (90 + k, 90, 90 + k % 7), k, size)
    odd = {
        "wider": ((90, 90, 90), (190, 40)),
        "larger": ((90, 90, 90), (400, 330)),
        "redder": ((250, 90, 170), (101, 81)),
    }
    for number, (word, (colour, size)) in enumerate(odd.items()):
        write_photo(tmp_path / f"odd/{word}.jpg", colour, 100 + number, size)
    images = list_images(tmp_path)
    scores, words = oddness(measure(images))
    for word in odd:
        row = images.paths.index(f"odd/{word}.jpg")
        assert words[row] == word
        assert scores[row] > 3.5
    usual = np.array([path.startswith("usual") for path in images.paths])
    assert scores[~usual].min() > scores[usual].max()


def test_scores_are_modified_z_scores() -> None:
    values = np.array([1.0, 2, 3, 4, 100, np.nan])
    expected = 0.6745 * (values - 3) / 1
    assert statistics._z(values) == pytest.approx(expected, nan_ok=True)
    mostly = np.array([5.0] * 8 + [6.0, 9.0])
    assert statistics._z(mostly) == pytest.approx((mostly - 5) / (1.253314 * 0.5), rel=1e-4)
    assert statistics._z(np.full(4, 7.0)).tolist() == [0] * 4
    assert np.isnan(statistics._z(np.full(3, np.nan))).all()


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for k in range(3):
        (tmp_path / f"a/{k}.jpg").touch()
    found = measure(list_images(tmp_path))
    assert isinstance(found, Measured)
    assert len(found.readable) == 0
    assert np.isnan(oddness(found)[0]).all()
