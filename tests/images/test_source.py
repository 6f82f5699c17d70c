"""Every entry of a source ends up listed, or refused with a reason; a share of every class can be held out."""

import dataclasses
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import make_photos, write_photo

from featcache.errors import SourceError, UsageError
from featcache.images.groups import group_by_name, joined
from featcache.images.source import ImageList, list_images
from featcache.images.splits import hold_out, training_images, usable

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file kinds")


# What is in a folder -> its classes; each image's label and split.
LAYOUTS = {
    "class folders": ("blue/0 blue/1 red/0", "blue red", "0 0 1", "0 0 0"),
    "flat": ("0", "", "-1", "0"),
    "classes called like splits": ("bus/0 train/0", "bus train", "0 1", "0 0"),
    "splits": ("test/0 train/a/0 train/b/0 validation/b/0", "a b", "-1 0 1 1", "3 1 1 2"),
    "nothing but splits": ("test/a/0 val/b/0", "a b", "0 1", "3 2"),
    "one split with class folders": ("train/a/0 train/b/0", "a b", "0 1", "1 1"),
    "splits without class folders": ("test/0 train/0", "", "-1 -1", "3 1"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_are_classes_or_splits(tmp_path: Path, layout: str) -> None:
    paths, classes, labels, splits = (text.split() for text in LAYOUTS[layout])
    for path in paths:
        write_photo(tmp_path / f"{path}.jpg", (1, 2, 3), 1)
    images = list_images(tmp_path)
    assert images.paths == tuple(f"{path}.jpg" for path in paths)
    assert images.sizes.tolist() == [(tmp_path / path).stat().st_size for path in images.paths]
    assert (list(images.classes), images.labels.tolist()) == (classes, [int(label) for label in labels])
    assert images.splits.tolist() == [int(split) for split in splits]


def test_an_empty_class_folder_counts(tmp_path: Path) -> None:
    """Indices must not depend on what happens to be there."""
    (make_photos(tmp_path, each=1, splits=("train", "test")) / "train" / "amber").mkdir()
    assert list_images(tmp_path).classes == ("amber", "blue", "green", "red")


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
    (root / "long.jpg").symlink_to(300 * "x")
    (root / "through.jpg").symlink_to("ok/a.png/1.jpg")
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
        "long.jpg": "link that cannot be followed: File name too long",
        "through.jpg": "link that cannot be followed: Not a directory",
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
        ("Bild,label\na.png,x\n", UsageError),
        ("", SourceError),
        ("path,split\na.png,practice\n", UsageError),
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


# ------------------------------------------------------------------------------------- splits, by seed and paths alone


def image_list(names: dict[str, int]) -> ImageList:
    """A list of ``names``: path -> label."""
    labels, zeros = np.array(list(names.values()), np.int32), np.zeros(len(names), np.int64)
    return ImageList(Path(), tuple(names), labels, ("a", "b", "c"), zeros.astype(np.uint8), zeros, zeros)


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


def test_copies_are_held_out_together(tmp_path: Path) -> None:
    for k in range(40):  # 20 images of 2 classes, each twice, all of one size; one lies in both classes
        path = tmp_path / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%3d" % (k // 4 * 2 + k % 2))
    (tmp_path / "a" / "x.jpg").write_bytes(b"  1")
    images = list_images(tmp_path)
    for seed in range(10):
        out = hold_out(images, share=0.3, seed=seed)
        sides: dict[bytes, set[int]] = {}
        for path, split in zip(out.paths, out.splits.tolist(), strict=True):
            sides.setdefault((tmp_path / path).read_bytes(), set()).add(split)
        assert all(len(side) == 1 for side in sides.values())
        assert 6 <= (out.splits[out.labels == 0] == 2).sum() <= 9


def sides_of(images: ImageList, names: Sequence[str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for name, split in zip(names, images.splits.tolist(), strict=True):
        found.setdefault(name, set()).add(split)
    return found


def grouped(names: dict[str, int], groups: Callable[[str], str]) -> ImageList:
    return dataclasses.replace(image_list(names), groups=tuple(map(groups, names)))


def test_groups_are_held_out_undivided() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        of = {name: f"patient {random.integers(12)}" for name in NAMES}
        images = grouped(NAMES, of.__getitem__)
        out = hold_out(images, share=0.2, seed=int(random.integers(100)))
        assert all(len(side) == 1 for side in sides_of(out, images.groups).values())
        assert set(out.splits.tolist()) == {1, 2}
        assert 0.1 < (out.splits == 2).mean() < 0.3
        assert {*out.labels[out.splits == 1].tolist()} == {0, 1, 2}
        backwards = hold_out(images.take(np.arange(len(images))[::-1]), share=0.2, seed=1)
        assert held(backwards) == held(hold_out(images, share=0.2, seed=1))


def test_where_groups_are_large_one_of_each_class_is_held_out_and_one_trains() -> None:
    images = grouped(NAMES, lambda name: f"{name[0]}{int(name[1:]) % 2}")  # two a class; c has one image in each
    out = hold_out(images, share=0.1)
    assert {name: side for name, side in sides_of(out, [*NAMES]).items() if len(side) > 1} == {}
    assert [{*out.splits[out.labels == label].tolist()} for label in range(3)] == [{1, 2}] * 3
    alone = hold_out(grouped(NAMES, lambda name: name[0]), share=0.1)
    assert (alone.splits == 1).all()  # a class of one group trains
    across = hold_out(grouped(NAMES, lambda name: str(int(name[1:]) % 2)), share=0.1)  # groups of all classes
    assert [{*across.splits[across.labels == label].tolist()} for label in range(3)] == [{1, 2}] * 3


def test_an_image_without_a_group_stands_alone() -> None:
    out = hold_out(grouped(NAMES, lambda name: "x" if name[0] == "a" else ""), share=0.2)
    assert np.bincount(out.labels[out.splits == 2], minlength=3)[0] == 0
    assert (out.splits[out.labels == 1] == 2).sum() >= 3


def test_copies_join_groups(tmp_path: Path) -> None:
    for k in range(30):
        path = tmp_path / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%3d" % (k // 4))  # in both classes, and in two groups
    images = list_images(tmp_path)
    images = dataclasses.replace(images, groups=tuple(str(int(Path(path).stem) // 3) for path in images.paths))
    out = hold_out(images, share=0.3)
    together = joined(group_by_name(images.groups), group_by_name([str(int(Path(p).stem) // 4) for p in images.paths]))
    assert all(len(side) == 1 for side in sides_of(out, [str(number) for number in together]).values())


def test_what_a_list_shows_of_itself(photos: Path) -> None:
    images = dataclasses.replace(list_images(photos), classes=("<script>", "b", "c\udce9"))
    assert repr(images) == f"ImageList({str(photos)!r}: 18 images, 3 classes)"
    assert repr(list_images(photos / "red")).endswith("6 images, no classes)")
    assert "1 image, 3 classes" in repr(images.take(np.array([0])))
    shown = images._repr_html_()
    assert "<tr><td>&lt;script&gt;</td><td>6</td></tr>" in shown and "<script>" not in shown and shown.encode()
