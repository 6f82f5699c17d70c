"""Tables inside of a folder that say what its images are: used where they do, and never silently against the folders."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_photo
from test_ways import read

from featcache.errors import FeatcacheError, SourceError
from featcache.images.source import Source, list_images

OTHERS = "file_name,label\nfox/1.jpg,red\nfox/2.jpg,grey\nowl/3.jpg,grey\n"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for path in ("fox/1.jpg", "fox/2.jpg", "owl/3.jpg"):
        write_photo(tmp_path / path, (1, 2, 3), 1)
    return tmp_path


@pytest.mark.parametrize(("column", "classes"), [("label", ("grey", "red")), ("none", ("fox", "owl"))])
def test_folders_and_metadata_of_different_classes_are_two_readings(
    photos: Path, column: str, classes: tuple[str, ...]
) -> None:
    (photos / "metadata.csv").write_text(OTHERS)
    with pytest.raises(SourceError, match="fox where the metadata says grey; say --label-column label to .* none to"):
        list_images(photos)
    assert list_images(Source(photos, label_column=column)).classes == classes


def test_the_same_classes_are_one_reading(photos: Path) -> None:
    (photos / "metadata.csv").write_text("file_name,label\nfox/1.jpg,fox\nfox/2.jpg,fox\nowl/3.jpg,owl\n")
    assert read(Source(photos)) == ["fox/1.jpg|fox|none", "fox/2.jpg|fox|none", "owl/3.jpg|owl|none"]


def test_every_row_and_every_image_is_accounted_for(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photo(photos / "fox" / ".kept.jpg", (1, 2, 3), 1)
    (photos / "fox" / "metadata.csv").write_text("file_name,label\n1.jpg,a\n.kept.jpg,b\ngone.jpg,b\n../owl/3.jpg,b\n")
    with pytest.raises(SourceError, match="a folder is called fox where the metadata says nothing;"):
        list_images(photos)
    images = list_images(Source(photos, label_column="label"))
    labels = dict(zip(images.paths, [(*images.classes, "-")[label] for label in images.labels], strict=True))
    assert labels == {"fox/.kept.jpg": "b", "fox/1.jpg": "a", "fox/2.jpg": "-", "fox/gone.jpg": "b", "owl/3.jpg": "-"}
    assert [refusal.path for refusal in images.refused] == ["fox/../owl/3.jpg"]
    assert "2 images without a label, which no metadata names (fox/2.jpg, owl/3.jpg)" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name;size\nhard drive;3\n", "no image is named by metadata.csv, which is not used"),
        ("city,population\nBonn,3\n", "is not read: .* none of them known as one of paths"),
        ("", "is not read: .* is empty"),
        ("fox/1.jpg,red\n", "is not read: .* has no header"),
        ("file_name,text\nfox/1.jpg,a fox\n", "path from 'file_name'; ignored: text"),
    ],
)
def test_tables_about_something_else_leave_it_to_the_folders(
    photos: Path, caplog: pytest.LogCaptureFixture, text: str, said: str
) -> None:
    caplog.set_level(logging.INFO, "featcache")
    (photos / "metadata.csv").write_text(text)
    assert read(Source(photos)) == ["fox/1.jpg|fox|none", "fox/2.jpg|fox|none", "owl/3.jpg|owl|none"]
    assert re.search(said, caplog.text), caplog.text


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {"label_column": "label"}, "--label-column says how a table is read, and .* is a folder"),
        ({"metadata.csv": OTHERS}, {"root": "/"}, "--root says how a table is read, and .* is a folder with metadata"),
        ({"metadata.csv": OTHERS}, {"label_column": "art"}, "no column for --label-column art"),
        ({"metadata.csv": OTHERS, "fox/metadata.jsonl": '{"file_name": "1.jpg", "label": "b"}\n'}, {}, "named twice"),
        ({"metadata.csv": OTHERS + "owl/3.jpg,red\n"}, {}, "named twice"),
        ({"metadata.csv": "file_name,fold\nfox/1.jpg,3\n"}, {"split_column": "fold"}, "fold is '3', expected train"),
    ],
)
def test_what_contradicts_itself_is_refused(
    photos: Path, files: dict[str, str], options: dict[str, Any], message: str
) -> None:
    for name, text in files.items():
        (photos / name).write_text(text)
    with pytest.raises(FeatcacheError, match=message):
        list_images(Source(photos, **options))


def test_splits_are_those_of_folder_and_metadata(tmp_path: Path) -> None:
    for path in ("train/1.jpg", "test/2.jpg"):
        write_photo(tmp_path / path, (1, 2, 3), 1)
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,label,split\ntrain/1.jpg,a,train\ntest/2.jpg,b,\n")
    assert read(Source(tmp_path)) == ["test/2.jpg|b|test", "train/1.jpg|a|train"]
    table.write_text("file_name,label,split\ntrain/1.jpg,a,val\ntest/2.jpg,b,test\n")
    with pytest.raises(SourceError, match=r"train/1.jpg lies in the folder of one split.*--split-column none"):
        list_images(tmp_path)
    assert read(Source(tmp_path, split_column="none")) == ["test/2.jpg|b|test", "train/1.jpg|a|train"]


@pytest.mark.skipif(sys.platform == "win32", reason="links take rights there")
def test_links_keep_the_names_of_the_folder(photos: Path) -> None:
    os.link(photos / "fox" / "1.jpg", photos / "hard.jpg")
    (photos / "soft.jpg").symlink_to("fox/1.jpg")
    (photos / "metadata.csv").write_text("file_name,label\nsoft.jpg,a\nhard.jpg,b\n")
    assert [line for line in read(Source(photos, label_column="label")) if "|-|" not in line] == [
        "hard.jpg|b|none",
        "soft.jpg|a|none",
    ]


def test_to_label_images_no_metadata_is_needed(photos: Path) -> None:
    (photos / "metadata.csv").write_text(OTHERS)
    assert list_images(photos, labelled=False).classes == ()
