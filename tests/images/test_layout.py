"""Folders mean classes, splits or neither by their names; where there are two ways to read them the user is asked."""

import logging
import os
import sys
import unicodedata
from pathlib import Path

import pytest

from featcache.errors import SourceError, UsageError
from featcache.images.layout import split_of
from featcache.images.source import Source, list_images
from featcache.spec import SPLITS

links = pytest.mark.skipif(sys.platform == "win32", reason="links take rights there")

# A folder as people have it -> the class and split of each image in the order of its path, as "class split".
READINGS = {
    "any case": ("TRAIN/a/0 Test/b/0 VaL/a/0", None, "a train, b test, a val"),
    "other words": ("Testing/a/0 Training/b/0 valid/a/0", None, "a test, b train, a val"),
    "what stands beside them": ("test_images/b/0 train-set/a/0 val2017/a/0", None, "b test, a train, a val"),
    "dev": ("dev/a/0 test/b/0 train/a/0", None, "a val, b test, a train"),
    "without classes": ("test1/0 train/0", None, "- test, - train"),
    "a class called like a split": ("bus/0 dev/0 ship/0", None, "bus none, dev none, ship none"),
    "numbered classes": ("test1/0 test2/0", None, "test1 none, test2 none"),
    "one name in every class": ("cat/images/0 dog/images/0", None, "cat none, dog none"),
    "other names in every class": ("cat/tabby/0 dog/pug/0", None, "cat none, dog none"),
    "classes with months": ("cat/may/0 dog/june/0 dog/may/0", 1, "cat none, dog none, dog none"),
    "places with species": ("north/fox/0 south/deer/0 south/fox/0", 2, "fox none, deer none, fox none"),
    "splits in classes": ("cat/test/0 cat/train/0 dog/train/0", 1, "cat test, cat train, dog train"),
    "splits beside others": ("holdout/a/0 train/a/0 train/b/0", 2, "a none, a train, b train"),
    "two folders of a split": ("train_1/a/0 train_2/b/0 val/a/0", 2, "a train, b train, a val"),
    "splits, places, species": ("test/east/fox/0 train/north/deer/0", 3, "fox test, deer train"),
}
# A folder that can be read in two ways -> what is said of it.
AMBIGUOUS = {
    "places with species": (
        "north/deer/0 north/fox/0 south/fox/0",
        r"of the same names \(fox\) in its folders north, south",
    ),
    "in other capitals": ("north/Fox/0 north/deer/0 south/fox/0", r"of the same names \(Fox, fox\)"),
    "unknown splits": ("a/cat/0 a/dog/0 b/cat/0 b/dog/0", r"of the same names \(cat, dog\)"),
    "one known split": ("holdout/cat/0 holdout/dog/0 train/cat/0", r"of the same names \(cat\)"),
    "splits in classes": ("cat/test/0 cat/train/0 dog/train/0", r"has splits \(test, train\) inside"),
    "splits below one folder": ("images/train/0 images/val/0", r"give .*images itself"),
    "two folders of a split": ("train_1/a/0 train_2/b/0 val/a/0", r"one split \(train_1, train_2, val\)"),
    "dev and eval": ("dev/a/0 eval/a/0 train/a/0", r"one split \(dev, eval, train\)"),
    "splits beside another": (
        "extra/0 test/0 train/0",
        r"holds test, train, named like splits, beside other folders \(extra\)",
    ),
    "a split beside another": ("train/a/0 train/b/0 unlabeled/0", r"beside other folders \(unlabeled\)"),
}


def make_files(root: Path, paths: str) -> None:
    for path in paths.split():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{path}.jpg").touch()


def read(root: Path, class_level: int | None = None) -> str:
    images = list_images(Source(root, class_level=class_level))
    names = [*images.classes, "-"]
    pairs = zip(images.labels.tolist(), images.splits.tolist(), strict=True)
    return ", ".join(f"{names[label]} {SPLITS[split]}" for label, split in pairs)


@pytest.mark.parametrize("case", READINGS)
def test_what_folders_mean(tmp_path: Path, case: str) -> None:
    paths, class_level, expected = READINGS[case]
    make_files(tmp_path, paths)
    assert read(tmp_path, class_level) == expected


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_two_ways_to_read_a_folder_are_both_named(tmp_path: Path, case: str) -> None:
    paths, found = AMBIGUOUS[case]
    make_files(tmp_path, paths)
    with pytest.raises(SourceError, match=f"{found}.*--class-level 1 .*--class-level 2 ") as refused:
        list_images(tmp_path)
    assert "\n" not in str(refused.value)
    for level in (1, 2) if "/a/0" in paths or "/fox/" in paths else (1,):
        list_images(Source(tmp_path, class_level=level))  # settled
    assert len(list_images(tmp_path, labelled=False)) == len(paths.split())  # predict does not ask


@pytest.mark.parametrize(
    ("split", "names"),
    {
        "train": "train Train TRAINING training_set trainset train-images images_train train2017 01_train trainval",
        "val": "val valid Validation dev devset development eval evaluation val_imgs validation-data",
        "test": "test TESTING test_set Test.Images data_test test1 3-test",
        "none": "trains trainer pretrain testes contest latest device evaluate valentine ab_test train_dogs bus images set 17 _",
    }.items(),
)
def test_names_of_splits(split: str, names: str) -> None:
    assert {name: SPLITS[split_of(name)] for name in names.split()} == dict.fromkeys(names.split(), split)


@links
def test_links_to_folders_are_folders(tmp_path: Path) -> None:
    make_files(tmp_path / "p", ".store/a/x/0 .store/a/y/0 .store/b/x/0")
    (tmp_path / "p" / "Train").symlink_to(".store/a")
    (tmp_path / "p" / "test").symlink_to(tmp_path / "p" / ".store" / "b")
    assert read(tmp_path / "p") == "x train, y train, x test"
    (tmp_path / "outside").mkdir()
    (tmp_path / "p" / "val").symlink_to(tmp_path / "outside")
    assert read(tmp_path / "p") == "x train, y train, x test"
    assert list_images(tmp_path / "p").refused == (("val", "link that leaves the source folder"),)


@pytest.mark.parametrize("level", [0, 3, 4])
def test_an_impossible_class_level_is_refused(tmp_path: Path, level: int) -> None:
    make_files(tmp_path, "north/fox/0 south/fox/0")
    with pytest.raises(UsageError, match="one of|no image 3 folders deep"):
        list_images(Source(tmp_path, class_level=level))
    (tmp_path / "list.csv").write_text("path\nnorth/fox/0.jpg\n")
    with pytest.raises(UsageError, match="leave it out|one of"):
        list_images(Source(tmp_path / "list.csv", class_level=level))


@pytest.mark.skipif(sys.platform == "darwin", reason="one name there")
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_classes_that_look_alike_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str) -> None:
    names = [unicodedata.normalize(form, "\xe9"), unicodedata.normalize("NFD" if form == "NFC" else "NFC", "\xc9")]
    for split, name in zip(("train", "test"), names, strict=True):
        make_files(tmp_path, f"{split}/b/0")
        os.makedirs(tmp_path / split / name)  # noqa: PTH103 - the form as it is
        (tmp_path / split / name / "0.jpg").touch()
    assert len(list_images(tmp_path).classes) == 3
    (said,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert all(ascii(name) in said for name in names)


@links
def test_a_table_of_classes_and_splits_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "featcache")
    make_files(tmp_path, "Training/ant/0 Training/ant/1 Training/bee/0 valid/bee/0 valid/1 extra")
    (tmp_path / "Training" / "wasp").mkdir()
    (tmp_path / "pipe").symlink_to("nothing")
    list_images(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: split folders: Training as train, valid as val",
        f"{tmp_path}: 6 images, 3 classes, 1 refused unopened (the first, pipe: dangling link)",
        "  class       no split  train  val",
        "  ant                0      2    0",
        "  bee                0      1    1",
        "  wasp               0      0    0",
        "  (no label)         1      0    1",
        "  all                1      3    2",
    ]


def test_of_many_classes_the_largest_and_smallest_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "featcache")
    make_files(tmp_path, " ".join(f"{number:02d}/{k}" for number in range(21) for k in range(30 - number)))
    list_images(tmp_path)
    lines = [record.getMessage().split() for record in caplog.records][2:]
    assert lines[:5] == [[f"{number:02d}", str(30 - number)] for number in range(5)]
    assert lines[5] == ["...", "11", "classes", "between"]
    assert lines[6:] == [[f"{number:02d}", str(30 - number)] for number in range(16, 21)] + [["all", "420"]]


@links
@pytest.mark.parametrize(("names", "lines"), [("0 1", 1), ("north/fox/0 south/deer/0 south/fox/0", 5), ("", 1)])
def test_what_is_no_table_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, names: str, lines: int) -> None:
    """Images without labels; classes in places, which are no splits; nothing but what is refused."""
    caplog.set_level("INFO", "featcache")
    make_files(tmp_path, names)
    (tmp_path / "a" if not names else tmp_path).mkdir(exist_ok=True)
    (tmp_path / "pipe").symlink_to("nothing")
    list_images(Source(tmp_path, class_level=2 if "/" in names else None))
    assert len(caplog.records) == lines


def test_places_below_splits_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_files(tmp_path, "test/east/fox/0 train/north/fox/0 train/south/deer/0")
    assert read(tmp_path) == "east test, north train, south train"
    assert "(fox); if those are the classes, say --class-level 3" in caplog.text
    caplog.clear()
    read(tmp_path, 2)
    assert not caplog.text
