"""Every entry of a source ends up listed or refused with a reason; every kind of file decodes to defined pixels."""

import dataclasses
import io
import os
import socket
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_photos, write_photo
from PIL import Image, ImageFile

from featcache.errors import RefusedImage, SourceError, UsageError
from featcache.images.decode import MAX_PIXELS, decode, strict_decoding
from featcache.images.read import read_file
from featcache.images.source import ImageList, list_images
from featcache.images.splits import hold_out, training_images, usable

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file kinds")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient() -> Image.Image:
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], axis=-1).astype(np.uint8))


# ------------------------------------------------------------------------------------------------- listing


def test_class_folders(tmp_path: Path) -> None:
    images = list_images(make_photos(tmp_path / "p", each=2))
    assert images.classes == ("blue", "green", "red")
    assert images.paths == ("blue/00.jpg", "blue/01.jpg", "green/00.jpg", "green/01.jpg", "red/00.jpg", "red/01.jpg")
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.splits.tolist() == [0] * 6
    assert images.sizes[0] == (tmp_path / "p/blue/00.jpg").stat().st_size


def test_split_folders_and_a_class_missing_from_one_split(tmp_path: Path) -> None:
    root = make_photos(tmp_path / "p", each=1, splits=("train", "validation", "test"))
    for path in (root / "validation" / "blue").iterdir():
        path.unlink()
    (root / "train" / "amber").mkdir()  # empty, yet it counts: indices must not depend on what happens to be there
    write_photo(root / "test" / "unlabelled.png", (1, 2, 3), 9)
    images = list_images(root)
    assert images.classes == ("amber", "blue", "green", "red")
    found = {
        path: (int(label), int(split))
        for path, label, split in zip(images.paths, images.labels, images.splits, strict=True)
    }
    assert found["train/blue/00.jpg"] == (1, 1)
    assert found["validation/green/00.jpg"] == (2, 2)
    assert found["test/red/00.jpg"] == (3, 3)
    assert found["test/unlabelled.png"] == (-1, 3)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.png", (1, 2, 3), 1)
    images = list_images(tmp_path)
    assert (images.classes, images.labels.tolist()) == ((), [-1])


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        write_photo(tmp_path / name / "a.png", (1, 2, 3), 1)
    assert list_images(tmp_path).classes == ("bus", "train")


@pytest.mark.parametrize("splits", [("val", "test"), ("train",), ("train", "test")])
def test_folders_all_called_like_splits_are_splits(tmp_path: Path, splits: tuple[str, ...]) -> None:
    images = list_images(make_photos(tmp_path, each=1, splits=splits))
    assert images.classes == ("blue", "green", "red")


def test_splits_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_photo(tmp_path / split / "a.png", (1, 2, 3), 1)
    images = list_images(tmp_path)
    assert (images.classes, images.splits.tolist()) == ((), [3, 1])


def test_splits_beside_other_folders_are_ambiguous(tmp_path: Path) -> None:
    make_photos(tmp_path, each=1, splits=("train", "val", "extra"))
    with pytest.raises(SourceError, match="extra"):
        list_images(tmp_path)


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.png", (1, 2, 3), 1).rename(tmp_path / "picture")
    (tmp_path / "notes.md").write_text("not an image, and not claiming to be one")
    (tmp_path / "text.jpg").write_text("claims to be one")
    (tmp_path / ".hidden.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "phone.heic").write_bytes(b"not decodable here, but an image")
    assert list_images(tmp_path).paths == ("phone.heic", "picture", "text.jpg")


@posix
def test_what_cannot_be_followed_is_refused_unopened(tmp_path: Path) -> None:
    root, outside = tmp_path / "p", tmp_path / "outside"
    write_photo(root / "ok" / "a.png", (1, 2, 3), 1)
    write_photo(outside / "b.png", (1, 2, 3), 2)
    os.mkfifo(root / "pipe.jpg")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(root / "socket.jpg"))
    server.close()
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "leaves.png").symlink_to(outside / "b.png")
    (root / "folder").symlink_to(outside)
    (root / "ok" / "up").symlink_to(root)
    (root / "inside.png").symlink_to("ok/a.png")
    images = list_images(root)
    assert set(images.paths) == {"ok/a.png", "inside.png"}
    reasons = {refusal.path: refusal.reason for refusal in images.refused}
    assert reasons == {
        "pipe.jpg": "not a regular file (pipe, socket or device)",
        "socket.jpg": "not a regular file (pipe, socket or device)",
        "dangling.jpg": "dangling link",
        "self.jpg": "link loop",
        "leaves.png": "link that leaves the source folder",
        "folder": "link that leaves the source folder",
        "ok/up": "link loop",
    }


def test_csv(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_photo(tmp_path / "x" / f"{name}.png", (1, 2, 3), 1)
    listing = tmp_path / "list.csv"
    listing.write_text(
        "path,label,split\nx/b.png,cat,train\nx/a.png,dog,val\nx/c.png,,test\nx/gone.png,cat,\n../out.png,cat,\n"
    )
    images = list_images(listing)
    assert images.paths == ("x/b.png", "x/a.png", "x/c.png", "x/gone.png")  # its own order; reading the last says why
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, -1, 0]
    assert images.splits.tolist() == [1, 2, 3, 0]
    assert ([refusal.path for refusal in images.refused], images.refused_at) == (["../out.png"], (4,))


def test_one_file_under_several_spellings_is_one_image(tmp_path: Path) -> None:
    write_photo(tmp_path / "x" / "a.png", (1, 2, 3), 1)
    (tmp_path / "list.csv").write_text(f"path,label\nx/a.png,cat\n./x/../x/a.png,cat \n{tmp_path}/x/a.png,cat\n")
    assert list_images(tmp_path / "list.csv").paths == ("x/a.png",)
    (tmp_path / "list.csv").write_text("path,label\nx/a.png,cat\n./x/a.png,dog\n")
    with pytest.raises(SourceError, match="listed twice"):
        list_images(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("file,label\na.png,x\n", UsageError),
        ("", UsageError),
        ("path,split\na.png,training\n", UsageError),
        ("path,label\na.png,x\na.png,y\n", SourceError),
        ("path\na.png,x\n", SourceError),
        ("path,path\na.png,a.png\n", UsageError),
        ('"path"x,label\na.png,x\n', SourceError),
        ("path,label\n", SourceError),
    ],
)
def test_csv_mistakes_are_named(tmp_path: Path, text: str, error: type[Exception]) -> None:
    write_photo(tmp_path / "a.png", (1, 2, 3), 1)
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(error):
        list_images(tmp_path / "list.csv")


@pytest.mark.parametrize("name", ["nowhere", "file.txt", "empty"])
def test_sources_without_images(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError):
        list_images(tmp_path / name)


def test_a_running_fine_tuning_is_no_class_and_its_files_are_no_images(tmp_path: Path) -> None:
    write_photo(tmp_path / "red" / "a.png", (1, 2, 3), 1)
    write_photo(tmp_path / "model-ft.parts" / "sample.png", (1, 2, 3), 2)
    write_photo(tmp_path / "old.parts" / "b.png", (1, 2, 3), 3)  # spare parts of old cars, for all we know
    write_photo(tmp_path / "runs" / "c.png", (1, 2, 3), 4)
    for name in ("model-ft.parts", "runs"):
        (tmp_path / name / "run.json").touch()
    images = list_images(tmp_path)
    assert images.classes == ("old.parts", "red", "runs")
    assert images.paths == ("old.parts/b.png", "red/a.png", "runs/c.png")


# ------------------------------------------------------------------------------------------------- holding out


def image_list(names: dict[str, int], splits: int = 0) -> ImageList:
    """A list of ``names``: path -> label."""
    n = len(names)
    return ImageList(
        Path(),
        tuple(names),
        np.array(list(names.values()), np.int32),
        ("a", "b", "c"),
        np.full(n, splits, np.uint8),
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
    )


@pytest.mark.parametrize("n_splits", [1, 3, 4])
def test_which_images_train(n_splits: int) -> None:
    random = np.random.default_rng(n_splits)
    labels, splits = random.integers(-1, 3, 60), random.integers(0, n_splits, 60).astype(np.uint8)
    own = 1 if n_splits > 1 else 0  # the split that trains
    train, left_out = training_images(labels, splits)
    assert train.tolist() == [label >= 0 and split == own for label, split in zip(labels, splits, strict=True)]
    assert left_out == sum(split <= 1 for split in splits) - train.sum()
    later = [label >= 0 and split > 1 for label, split in zip(labels, splits, strict=True)]
    assert usable(labels, splits).tolist() == (train | later).tolist()


def held(images: ImageList) -> set[str]:
    return {path for path, split in zip(images.paths, images.splits, strict=True) if split == 2}


NAMES = {
    f"{name}{number}": label for label, (name, n) in enumerate((("a", 40), ("b", 15), ("c", 2))) for number in range(n)
}


def test_held_out_images_are_a_share_of_each_class() -> None:
    images = image_list(NAMES)
    out = hold_out(images, share=0.2)
    assert np.bincount(out.labels[out.splits == 2]).tolist() == [8, 3, 1]
    assert (out.splits[out.splits != 2] == 1).all()
    assert not images.splits.any()  # the list given is left alone
    out = hold_out(images, share=0.01)
    assert np.bincount(out.labels[out.splits == 2]).tolist() == [1, 1, 1]
    out = hold_out(images, share=0.99)
    assert np.bincount(out.labels[out.splits == 1]).tolist() == [1, 1, 1]
    assert held(hold_out(image_list({"a": 0, "b": 1, "c": 1}))) < {"b", "c"}  # a class's only image trains
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(UsageError, match="share"):
            hold_out(images, share=share)


def test_what_is_held_out_depends_on_seed_and_paths_alone() -> None:
    images = image_list(NAMES)
    backwards = images.take(np.arange(len(images))[::-1])
    assert held(hold_out(images)) == held(hold_out(backwards))
    assert held(hold_out(images)) != held(hold_out(images, seed=1))
    before = held(hold_out(images, share=0.25))
    moved = [before ^ held(hold_out(image_list(NAMES | {f"new{k}": 0}), share=0.25)) - {f"new{k}"} for k in range(30)]
    assert max(len(paths) for paths in moved) == 1
    assert sum(len(paths) for paths in moved) < 15  # mostly none at all


def test_holding_out_leaves_test_and_unlabelled_images_alone() -> None:
    images = image_list(NAMES | {"no label": -1})
    out = hold_out(images)
    assert out.splits[-1] == 0
    splits = np.full(len(images), 1, np.uint8)
    splits[:10], splits[10:20] = 3, 0  # as soon as there are splits, an image outside them is not for training
    out = hold_out(dataclasses.replace(images, splits=splits), share=0.5)
    assert out.splits[:20].tolist() == splits[:20].tolist()
    assert np.bincount(out.labels[:-1][out.splits[:-1] == 2]).tolist() == [10, 8, 1]
    assert out.splits[-1] == 1


# ------------------------------------------------------------------------------------------------- decoding


UPRIGHT = {  # what a viewer must do to stored pixels, from the EXIF specification
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p.transpose(1, 0, 2), 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied(orientation: int) -> None:
    stored = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded), UPRIGHT[orientation](np.asarray(stored)))


def test_modes_become_rgb() -> None:
    picture = gradient()
    grey = picture.convert("L")
    expect = {"RGB": picture, "L": grey.convert("RGB"), "1": picture.convert("1").convert("RGB")}
    for mode, wanted in expect.items():
        np.testing.assert_array_equal(np.asarray(decode(encoded(picture.convert(mode), "PNG"))), np.asarray(wanted))
    palette = picture.quantize(16)
    np.testing.assert_array_equal(np.asarray(decode(encoded(palette, "PNG"))), np.asarray(palette.convert("RGB")))
    cmyk = decode(encoded(picture.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(np.asarray(cmyk).astype(int) - np.asarray(picture)).mean() < 3


def test_alpha_is_composited_on_white() -> None:
    layers = Image.new("RGBA", (2, 1))
    layers.putpixel((0, 0), (10, 20, 30, 255))
    layers.putpixel((1, 0), (10, 20, 30, 0))
    assert np.asarray(decode(encoded(layers, "PNG"))).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert np.asarray(decode(encoded(grey, "PNG"))).tolist() == [[[255, 255, 255]]]
    flat = Image.new("P", (1, 1), 0)
    assert np.asarray(decode(encoded(flat, "PNG", transparency=0))).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        assert np.asarray(decode(encoded(deep, kind)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_unusable_files_are_refused_with_a_reason() -> None:
    jpeg = encoded(gradient().resize((600, 400)), "JPEG")
    floats = encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF")
    cases = {
        b"": "empty file",
        b"hello": "not an image",
        jpeg[: len(jpeg) // 2]: "damaged: image file is truncated",
        bomb(): "too large",
        floats: "no defined range",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not an image",
    }
    for data, reason in cases.items():
        with pytest.raises(RefusedImage, match=reason):
            decode(data)
    assert MAX_PIXELS < 100_000**2


def test_what_a_notebook_allowed_pillow_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        whole = encoded(gradient().resize((300, 200)), kind)
        with strict_decoding(), pytest.raises(RefusedImage, match="truncated"):
            decode(whole[: len(whole) * 3 // 4])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@posix
def test_reading_never_hangs_and_says_why(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("pipe", "not a regular file"),
        ("gone", "cannot be read"),
        ("", "not a regular|cannot be read"),
    ):
        with pytest.raises(RefusedImage, match=reason):
            read_file(tmp_path / name)


def test_a_fresh_time_stamp_is_not_trusted(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", (1, 2, 3), 1)
    assert read_file(path)[2] == -1
    os.utime(path, ns=(0, 1_500_000_000_000_000_000))
    assert read_file(path)[1:] == (path.stat().st_size, 1_500_000_000_000_000_000)
