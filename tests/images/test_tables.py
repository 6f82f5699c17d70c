"""A table's names are read in an encoding that is known or proven, or the table is refused with the line in question."""

import os
import sys
from pathlib import Path

import pytest
from conftest import write_photo

from featcache.errors import SourceError, UsageError
from featcache.images.source import list_images

TEXT = "path,label\r\nx/a.png,caf\xe9 \u03a9\r\n"
BYTES_FOR_NAMES = pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for name in ("a", "\xe4", "\u20ac"):
        write_photo(tmp_path / "x" / f"{name}.png", (1, 2, 3), 1)
    return tmp_path / "list.csv"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        b"\xff\xfe" + TEXT.encode("utf-16-le"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
    ],
    ids=["UTF-8", "UTF-8 with a mark", "UTF-16", "UTF-16, big-endian"],
)
def test_encodings_that_say_so(table: Path, data: bytes) -> None:
    table.write_bytes(data)
    images = list_images(table)
    assert (images.paths, images.classes) == (("x/a.png",), ("caf\xe9 \u03a9",))


def test_windows_tables_are_read_if_file_names_prove_it(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    table.write_bytes(b"path,label\nx/a.png,caf\xe9\nx/gone\xe9.png,b\nx/\xe4.png,b\nx/\x80.png,\x93quoted\x94\n")
    images = list_images(table)
    assert images.paths == ("x/a.png", "x/gone\xe9.png", "x/\xe4.png", "x/\u20ac.png")
    assert images.classes == ("b", "caf\xe9", "\u201cquoted\u201d")
    assert "read as Windows-1252 (Latin-1), which the names of its files prove" in caplog.text


@BYTES_FOR_NAMES
def test_names_of_bytes_are_kept_if_files_have_them(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = os.fsdecode(b"\xe4.png")
    write_photo(table.parent / "x" / "b.png", (1, 2, 3), 1).rename(table.parent / "x" / name)
    table.write_bytes(b"path,label\nx/a.png,b\nx/\xe4.png,b\n")
    assert list_images(table).paths == ("x/a.png", f"x/{name}")  # though there is an \xe4.png as well
    assert r"line 3: b'x/\xe4.png,b' is not UTF-8; names and labels are kept byte for byte" in caplog.text


@pytest.mark.parametrize(
    ("data", "line", "text"),
    [
        (b"path,label\nx/a.png,b\nx/a.png,caf\xe9\n", 3, rb"x/a.png,caf\xe9"),
        (b"path,label\nx/gone\xe9.png,b\n", 2, rb"x/gone\xe9.png"),
        (b"path,label\nx/\xe4.png,caf\xc3\xa9\n", 2, rb"x/\xe4.png"),  # both encodings in one line
        (b"path,label\nx/a.png,caf\xc3\xa9\nx/\xe4.png,b\n", 3, rb"x/\xe4.png"),  # in one file
        (b"path,label\nx/\xe4.png,b\x81\n", 2, rb"x/\xe4.png,b\x81"),  # no character of Windows
        (b"path,label\nx/a.png,\x8e\xa9\x82\xcc\n", 2, rb"\x8e\xa9"),  # Shift JIS
    ],
)
def test_other_encodings_are_refused_by_line(table: Path, data: bytes, line: int, text: bytes) -> None:
    table.write_bytes(data)
    with pytest.raises(SourceError, match=f"line {line}: .* is not UTF-8.*save the table as UTF-8") as refused:
        list_images(table)
    assert text.decode() in str(refused.value)
    assert str(refused.value).isascii()


@pytest.mark.parametrize(
    "data", [b"\xff\xfe" + TEXT.encode("utf-16-le")[:-1], TEXT.encode("utf-16-le")[:-1], b"\xff\xfe\0"]
)
def test_broken_utf16_is_refused(table: Path, data: bytes) -> None:
    table.write_bytes(data)
    with pytest.raises((SourceError, UsageError)):
        list_images(table)


@pytest.mark.parametrize(
    "header", ["PATH,Label,Split", "filename, species ,subset", "Image Path,Class,set", "file_name,category,SPLIT"]
)
def test_columns_by_the_names_people_use(table: Path, header: str) -> None:
    table.write_text(f"{header}\nx/a.png,fox,Training\n")
    images = list_images(table)
    assert (images.paths, images.classes, images.splits.tolist()) == (("x/a.png",), ("fox",), [1])


def test_two_columns_for_one_thing_are_refused(table: Path) -> None:
    table.write_text("path,filename\nx/a.png,a.png\n")
    with pytest.raises(UsageError, match="'path', 'filename'"):
        list_images(table)
