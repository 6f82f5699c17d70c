"""Edited copies agree, other pictures do not, and only files of the recorded bytes count."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from featcache.curation.pixel_check import PixelCheck, compare_pictures


def picture(seed: int, size: tuple[int, int] = (260, 200)) -> Image.Image:
    """Blobs of all sizes, as photographs have them: power falls with frequency."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(rng.normal(0, 1, (n, n, 3)).astype(np.float32)[..., 0]).resize(size, Image.Resampling.BICUBIC)) / n**0.6
        for n in (3, 6, 12, 24, 48, 96)
    ]  # fmt: skip
    grey = np.sum(layers, axis=0)
    grey = (grey - grey.min()) / np.ptp(grey) * 255
    return Image.fromarray(np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2))


def marked(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).text((20, 150), "SAMPLE 2026", font=ImageFont.load_default(size=30), fill=(255, 255, 255))
    return image


def saved(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "double": lambda image: image.resize((image.width * 2, image.height * 2)),
    "recompressed": lambda image: Image.open(io.BytesIO(saved(image, 30))),
    "cropped": lambda image: image.crop((0, 0, round(image.width * 0.9), round(image.height * 0.9))),
    "mirrored": ImageOps.mirror,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "rotated": lambda image: image.rotate(5, Image.Resampling.BICUBIC),
    "watermark": marked,
    "border": lambda image: ImageOps.expand(image, 12, (200, 30, 30)),
    "mirrored, rotated, with a border": lambda image: ImageOps.expand(ImageOps.mirror(image).rotate(-4), 8),
}


def check_of(folder: Path, files: list[bytes]) -> PixelCheck:
    for number, data in enumerate(files):
        (folder / f"{number}.jpg").write_bytes(data)
    digests = np.stack([np.frombuffer(hashlib.sha256(data).digest(), np.uint8) for data in files])
    return PixelCheck(folder, [f"{number}.jpg" for number in range(len(files))], digests, workers=1)


def test_edited_copies_agree_and_other_pictures_do_not(tmp_path: Path) -> None:
    images = [edit(picture(seed)) for seed in range(3) for edit in (lambda image: image, *EDITS.values())]
    each = len(EDITS) + 1
    check = check_of(tmp_path, [saved(image) for image in images])
    pairs = np.array([(i, j) for i in range(len(images)) for j in range(i) if j % each == 0])
    agreement, mirrored = check.compare(pairs)
    same = pairs[:, 0] // each == pairs[:, 1] // each
    wrong = [list(EDITS)[i % each - 1] for i in pairs[same & (agreement < 0.75)][:, 0]]
    assert not wrong
    assert agreement[~same].max() < 0.5
    expected = [(i % each) and "mirrored" in list(EDITS)[i % each - 1] for i in pairs[same][:, 0]]
    np.testing.assert_array_equal(mirrored[same], np.array(expected, bool))


def test_another_object_before_the_same_wall_is_another_picture() -> None:
    """A third of the picture differs, and a smooth background agrees with any other."""
    wall = np.add.outer(np.linspace(60, 200, 64), np.linspace(0, 50, 64)).astype(np.uint8)
    objects = [np.asarray(picture(seed).convert("L").resize((36, 36))) for seed in range(8)]
    pictures = np.repeat(wall[None], 8, axis=0)
    for one, what in zip(pictures, objects, strict=True):
        one[14:50, 14:50] = what
    agreement, _ = compare_pictures(pictures[:-1], pictures[1:], thorough=True)
    assert agreement.max() < 0.65


def test_agreement_does_not_depend_on_which_of_the_two_comes_first() -> None:
    grey = [np.asarray(picture(seed).convert("L").resize((64, 64))) for seed in range(6)]
    edited = [np.asarray(EDITS["border"](marked(picture(seed))).convert("L").resize((64, 64))) for seed in range(6)]
    one, other = np.stack([*grey, *grey]), np.stack([*edited, *grey[1:], grey[0]])
    there, back = (compare_pictures(*pair, thorough=True)[0] for pair in ((one, other), (other, one)))
    doubtful = np.minimum(there, back) < 0.9
    assert doubtful.any()
    np.testing.assert_array_equal(there[doubtful], back[doubtful])


def test_blank_pictures_agree_with_nothing() -> None:
    blank, noisy = np.full((2, 64, 64), 255, np.uint8), np.asarray(picture(0).convert("L").resize((64, 64)))[None]
    assert compare_pictures(blank[:1], blank[1:])[0] == 0
    assert compare_pictures(blank[:1], noisy)[0] == 0
    assert compare_pictures(noisy, noisy)[0] > 0.99


def test_a_changed_a_missing_and_a_refused_file_are_not_compared(tmp_path: Path) -> None:
    same = saved(picture(0))
    check = check_of(tmp_path, [same, same + b"\0", same, same, b"no image"])
    (tmp_path / "2.jpg").write_bytes(saved(picture(0), 91))
    (tmp_path / "3.jpg").unlink()
    agreement, _ = check.compare(np.array([[0, 1], [0, 2], [0, 3], [0, 4], [2, 3]]))
    assert agreement[0] > 0.99
    assert np.isnan(agreement[1:]).all()


def test_each_file_is_read_once_and_progress_is_said(tmp_path: Path) -> None:
    check, seen = check_of(tmp_path, [saved(picture(0)), saved(picture(0), 50)]), []
    first = check.compare(np.array([[0, 1]]), progress=lambda *done: seen.append(done))
    for file in tmp_path.iterdir():
        file.unlink()
    np.testing.assert_array_equal(check.compare(np.array([[0, 1]])).agreement, first.agreement)
    assert seen == [(1, 1)]
    assert not len(check.compare(np.empty((0, 2), np.intp)).agreement)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_of_any_mode_and_size(tmp_path: Path, mode: str) -> None:
    kind = "PNG" if mode == "RGBA" else "JPEG"
    file = io.BytesIO()
    picture(1).convert(mode).save(file, kind)
    check = check_of(tmp_path, [saved(picture(1)), file.getvalue()])
    assert check.compare(np.array([[0, 1]])).agreement[0] > 0.9
