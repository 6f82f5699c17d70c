"""A table's names are read in an encoding that is known or proven, or the table is refused with the line in question."""

import csv
import datetime
import logging
import os
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_photo

from featcache.errors import SourceError, UsageError
from featcache.images.columns import Columns
from featcache.images.records import csv_line, read_table, without_escape
from featcache.images.source import Source, list_images

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


# What is wrong with a table -> its file, options, and what is said of it.
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "two labels": (
        "path,label,breed\nx/a.png,0,fox\n",
        {},
        "'label', 'breed' may each hold the label; .* --label-column breed",
    ),
    "two paths": (
        "image,filepath\n7,x/a.png\n",
        {},
        "'image', 'filepath' may each hold the path; .* --path-column filepath",
    ),
    "twice": ("path,label,label\nx/a.png,a,a\n", {"label_column": "label"}, "has 2 columns called 'label'"),
    "one for two": (
        "path,label\nx/a.png,a\n",
        {"label_column": "PATH"},
        "one column cannot be two things, see --label-column PATH",
    ),
    "none known": (
        "id 2,Bild,Art\n1,x/a.png,a\n",
        {},
        "columns 'id 2', 'Bild', 'Art', none of them .* --path-column Bild",
    ),
    "unknown": (
        "path,species\nx/a.png,a\n",
        {"label_column": "specis"},
        "it has 'path', 'species'; did you mean species",
    ),
    "unknown in a list": ("x/a.png\n", {"label_column": "art"}, "no column for --label-column art; it has 'x/a.png'"),
    "folds": ("path,set\nx/a.png,3\n", {}, "line 2: set is '3', expected train.* --split-column none no splits"),
    "usage": ("path,Usage\nx/a.png,Public\n", {"split_column": "usage"}, "line 2: Usage is 'Public', expected train"),
    "neither yes nor no": ("path,is_valid\nx/a.png,maybe\n", {}, "line 2: is_valid is 'maybe'"),
    "no header, four columns": ("x/a.png,a,train,Ann\n", {}, "no header.* such as path,label,split,other3$"),
    "no header, splits only": ("x/a.png,train\n", {}, "no header.* such as path,split$"),
    "no header, an index": ("0,x/a.png,a\n", {}, "no header.* such as other0,path,label$"),
    "no header, masks": ("x/a.png,x/\xe4.png\n", {}, "no header.* such as path,other1$"),
    "no header, uneven": ("x/a.png,a\nx/\xe4.png\n", {}, "line 2: found 1 cells, expected 2"),
    "a heading": ("My photos\nx/a.png\n", {}, "'My photos'.* none of them known as one of paths"),
    "a header that is a file": ("image\nx/a.png\n", {}, "line 1: 'image' is a header, and a file"),
    "words": ("x/a.png red fox\n", {}, "begins with a file.* write a CSV .* such as x/a.png,red fox$"),
    "some words": ("x/a.png fox\nx/\xe4.png\n", {}, "line 2: found 'x/\xe4.png', expected a path, a blank and a label"),
    "a word of a name": (
        "x/a.png fox\nx/b c.png\n",
        {},
        "line 2: found 'x/b c.png', expected a path, a blank and a label",
    ),
    "too many cells": ("path,label\nx/a.png,a,b\n", {}, "line 2: found 3 cells, expected at most 2"),
    "no path": ("path,label\nx/a.png,a\n,b\n", {}, "line 3: found the path '', expected the name of a file"),
    "several labels": (
        '{"path": "x/a.png", "label": ["a", "b"]}',
        {},
        r'line 1: found \["a", "b"\], expected one text or number',
    ),
    "no JSON": ('{"path": "x/a.png"}\n{"path"\n', {}, "line 2: not a JSON object"),
    "JSON twice": ('{"path": "x/a.png", "path": "b"}\n', {}, r"line 1: not a JSON object \(a key occurs twice\)"),
    "labels that cannot be stored": ('{"path": "x/a.png", "label": "\\ud800"}', {}, r"label '\\ud800' is no text"),
    "labels with NUL": ('{"path": "x/a.png", "label": "a\\u0000"}', {}, r"label 'a\\x00' is no text"),
    "paths that cannot be stored": ('{"path": "x/\\ud800.png"}', {}, r"line 1: found the path 'x/\\ud800.png'"),
    "addresses": ("path\nhttps://example.org/1.jpg\n", {}, "addresses are not followed: download"),
    "no such root": ("path\nx/a.png\n", {"root": Path("nowhere")}, "--root nowhere is no folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_answered_in_a_line_that_helps(table: Path, case: str) -> None:
    text, options, message = MISTAKES[case]
    for name in ("image", "x/b c.png"):
        (table.parent / name).write_bytes(b"\xff\xd8\xff")
    table.write_text(text)
    with pytest.raises((SourceError, UsageError), match=message) as refused:
        list_images(Source(table, **options))
    assert "\n" not in str(refused.value)


# A table none of whose files is there -> what would find them.
ELSEWHERE = {
    "path\n1.jpg\n2.jpg\n": "--root {root}/train_images has 2 of the first 2",
    "id,label\n1,a\n2,b\n": "--root {root}/train_images has 2 of the first 2",
    "path\nphotos/x/a.png\nphotos/x/gone.png\n": "--root {parent} has 1 of the first 2",
    "{parent}/other/1.jpg\n{parent}/other/b/2.jpg\n": "--root {parent}/other takes them",
    "path\nC:\\me\\photos\\x\\a.png\n": r"x/a.png is there: leave C:\me\photos\ out of the table",
    "path\n/home/me/x/a.png\n": "x/a.png is there: leave /home/me/ out of the table",
    "path\nnowhere.png\n": "--root FOLDER says what its paths are relative to",
    "path\n../other/1.jpg\n": "--root FOLDER says what its paths are relative to",
}


@pytest.mark.parametrize("text", ELSEWHERE)
def test_a_table_of_files_elsewhere_says_where_they_are(tmp_path: Path, text: str) -> None:
    root = tmp_path / "photos"
    for path in ("x/a.png", "train_images/1.jpg", "train_images/2.jpg", "../other/1.jpg", "../other/b/2.jpg"):
        write_photo(root / path, (1, 2, 3), 1)
    (root / "list.csv").write_text(text.format(parent=tmp_path))
    with pytest.raises(SourceError) as refused:
        list_images(root / "list.csv")
    assert "not one of its images is a file below" in str(refused.value)
    assert str(refused.value).endswith(f"; {ELSEWHERE[text].format(root=root, parent=tmp_path)}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ID,filename,species,by\n1,x/a.png,fox,Ann\n", "path from 'filename', label from 'species'; ignored: ID, by"),
        (
            "path,kind,\nx/a.png,fox,\n",
            "path from 'path'; ignored: kind, 1 without a name (--label-column NAME takes one",
        ),
        ("x/a.png,fox,train\n", "no header; path from column 1, label from column 2, split from column 3"),
        ("path,label\nx/a.png,nan\n", "nan is taken for a class; leave the cell empty where there is no label"),
    ],
)
def test_what_was_decided_is_said(table: Path, caplog: pytest.LogCaptureFixture, text: str, said: str) -> None:
    caplog.set_level(logging.INFO, "featcache")
    table.write_text(text)
    assert list_images(table).paths == ("x/a.png",)
    assert f"{table}: {said}" in caplog.text


def test_what_stands_there_counts_before_what_it_may_mean(tmp_path: Path) -> None:
    """Backslashes, blanks, a leading apostrophe, a name without suffix: first as a name of its own."""
    names = ("a\\1.jpg", " 2.jpg", "'=3.jpg", "4")
    if sys.platform == "win32":
        pytest.skip("such names cannot be")
    for name in (*names, "a/1.jpg", "2.jpg", "=3.jpg", "4.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\xff\xd8\xff")
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{name}\n" for name in names))
    assert list_images(tmp_path / "list.csv").paths == names
    for name in names:
        (tmp_path / name).unlink()
    assert list_images(tmp_path / "list.csv").paths == ("a/1.jpg", "2.jpg", "=3.jpg", "4.jpg")


def test_a_name_without_suffix_that_several_images_have_is_refused(tmp_path: Path) -> None:
    for name in ("1.jpg", "1.PNG", "1.txt", "2.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff")
    (tmp_path / "list.csv").write_text("id,label\n1,a\n2,b\n3,b\n")
    images = list_images(tmp_path / "list.csv")
    assert images.paths == ("2.jpg", "3")
    assert images.refused == (("1", "may be any of 1.PNG, 1.jpg"),)


def test_names_of_other_unicode_forms_are_found(tmp_path: Path) -> None:
    """As macOS writes them, and as Linux does."""
    (tmp_path / unicodedata.normalize("NFD", "\xe4.jpg")).write_bytes(b"\xff\xd8\xff")
    (tmp_path / "list.csv").write_text("path\n\xe4.jpg\n")
    images = list_images(tmp_path / "list.csv")
    assert images.sizes.tolist() == [3]


def test_a_table_that_changes_meanwhile_is_refused(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns are those of the old one."""
    table.write_text("path,label,breed\nx/a.png,b,fox\n")

    def swap(*_: object, **__: object) -> Columns:
        table.write_text("path,breed,label\nx/a.png,b,fox\n")
        os.utime(table, (1, 1))
        return Columns(0, 1, None, ("path", "label", "breed"))

    monkeypatch.setattr("featcache.images.tables.find_columns", swap)
    with pytest.raises(SourceError, match="was changed while it was read; run it again"):
        list_images(table)


def test_only_paths_are_read_where_images_are_to_be_labelled(table: Path) -> None:
    table.write_text("path,label,set\nx/a.png,a,fold 3\nx/a.png,b,fold 4\n")
    assert list_images(table, labelled=False).paths == ("x/a.png",)


def test_a_column_of_groups_is_read_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,label,patient\n1.jpg,a, p 7 \n2.jpg,b,\n")
    for name in ("1.jpg", "2.jpg"):
        write_photo(tmp_path / name, (1, 2, 3), 1)
    images = list_images(Source(tmp_path / "l.csv", group_column="PATIENT"))
    assert images.groups == ("p 7", "") and images.take(np.array([1])).groups == ("",)
    assert list_images(tmp_path / "l.csv").groups == ()
    (tmp_path / "l.csv").write_text("path,label,patient\n1.jpg,a,p\n./1.jpg,a,q\n2.jpg,b,r\n")
    assert len(list_images(tmp_path / "l.csv")) == 2
    with pytest.raises(SourceError, match="listed twice, with different labels, splits or groups"):
        list_images(Source(tmp_path / "l.csv", group_column="patient"))
    with pytest.raises(UsageError, match=r"no column for --group-column patent; .* did you mean patient\?"):
        list_images(Source(tmp_path / "l.csv", group_column="patent"))
    write_photo(tmp_path / "photos/1.jpg", (1, 2, 3), 1)
    with pytest.raises(UsageError, match="--group-column says how a table is read"):
        list_images(Source(tmp_path / "photos", group_column="patient"))
    (tmp_path / "photos/metadata.csv").write_text("file_name,patient\n1.jpg,p\n")
    write_photo(tmp_path / "photos/2.jpg", (1, 2, 3), 1)
    assert list_images(Source(tmp_path / "photos", group_column="patient")).groups == ("p", "")


@pytest.mark.parametrize("name", ["=a", "'=a", "''-a", "+1", "'q", "-5", "@x"])
def test_what_is_escaped_comes_back(name: str) -> None:
    cell = csv_line([name]).decode().strip()
    assert without_escape(cell) == name and not cell.startswith(("=", "+", "-", "@"))


# ------------------------------------------------------------------------------------------------------------ Parquet


def parquet(to: Path, /, **columns: Any) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), to)
    return to


def in_parquet(kind: str, texts: list[str | None]) -> Any:
    pa = pytest.importorskip("pyarrow")
    return pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts, getattr(pa, kind)())


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
@pytest.mark.parametrize("options", [{}, {"path_column": "FILE"}, {"label_column": "other", "split_column": "none"}])
def test_parquet_of_paths_is_the_csv_of_the_same_rows(table: Path, kind: str, options: dict[str, str]) -> None:
    """Of the same names, numbers and holes; vectors and other columns beside them are not read."""
    columns: dict[str, list[Any]] = {
        "file": ["x/a.png", "x\\\xe4.png", "x/gone.png", "../out.png", "x/\u20ac"],
        "Species": ["cat", " dog", None, "cat", "caf\xe9"],
        "set": ["Training", "valid", None, "test", "test"],
        "other": [3, 0, None, 3, 0],
    }
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[*columns], *zip(*columns.values(), strict=True)])
    arrow = {name: in_parquet(kind, values) for name, values in columns.items() if name != "other"}
    path = parquet(table.with_name("t.parquet"), **arrow, other=columns["other"], vector=[[0.5]] * 5, blob=[b"b"] * 5)
    found, expected = (list_images(Source(each, **options)) for each in (path, table))
    assert len(expected) == 4 and len(expected.classes) == (2 if "label_column" in options else 3)
    for field in ("root", "paths", "classes", "refused", "refused_at"):
        assert getattr(found, field) == getattr(expected, field)
    for field in ("labels", "splits", "sizes", "mtimes"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


def test_numbers_of_classes_in_parquet_have_the_names_that_datasets_gives(table: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    said = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    rows = pa.table({"file_name": ["x/a.png", "x/\xe4.png"], "label": [1, 0]})
    pq.write_table(rows.replace_schema_metadata({"huggingface": said}), path := table.with_name("t.parquet"))
    assert list_images(path).classes == ("cat", "dog") and list_images(path).labels.tolist() == [1, 0]


NO_TABLES: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "parts": ({"label": [0.5]}, {}, "row 0: the column 'label' is of the type double; expected text or whole numbers"),
    "dates": ({"label": [datetime.date(2026, 1, 1)]}, {}, "the column 'label' is of the type date32"),
    "nested": ({"label": [["a"]]}, {}, "the column 'label' is of the type list"),
    "a vector for a path": ({"v": [[1.0]]}, {"path_column": "v"}, "the column 'v' is of the type list"),
    "bytes for a label": ({"label": [b"a"]}, {}, "the column 'label' is of the type binary"),
    "no path": (
        {"path": [None], "label": ["a"]},
        {},
        r"row 0: found the path '', expected the name of a file in each row",
    ),
    "long": ({"label": ["a" * 10_001]}, {}, "a text of 10,001 bytes; expected names of at most 10,000"),
    "no split": ({"split": ["huh"]}, {}, "row 0: split is 'huh', expected train, val, test"),
    "two labels": (
        {"label": ["a"], "class": ["b"]},
        {},
        "may each hold the label; choose one, as --label-column class",
    ),
    "no name": ({"path": ["b.png"]}, {}, "not one of its images is a file below .*; --root FOLDER says what"),
    "elsewhere": ({"path": ["a.png"]}, {}, "--root .*x has 1 of the first 1"),
    "unknown": ({"path": [["x"]], "where": ["x/a.png"]}, {"path_column": "wher"}, "no column for .*did you mean where"),
}


@pytest.mark.parametrize("case", NO_TABLES)
def test_parquet_that_is_no_table_is_answered_in_a_line(table: Path, case: str) -> None:
    columns, options, message = NO_TABLES[case]
    path = parquet(table.with_name("t.parquet"), **{"path": ["x/a.png"], **columns})
    with pytest.raises((SourceError, UsageError), match=message) as raised:
        list_images(Source(path, **options))
    assert "\n" not in str(raised.value)


def test_parquet_that_changes_meanwhile_is_refused(table: Path) -> None:
    path = parquet(table.with_name("t.parquet"), path=["x/a.png"])
    read = read_table(path, lambda _: True, {"path": None})
    assert [cells for cells, _ in read.rows()] == [["x/a.png"]]
    parquet(path, path=["x/a.png", "x/b.png"])
    with pytest.raises(SourceError, match="was changed while it was read"):
        next(read.rows())


def test_a_column_of_text_beside_images_can_be_the_one_of_paths(table: Path) -> None:
    path = parquet(table.with_name("t.parquet"), path=["x/a.png"], image=[(table.parent / "x" / "a.png").read_bytes()])
    assert list_images(path).paths == ("0",)
    assert list_images(Source(path, path_column="path")).paths == ("x/a.png",)


def test_a_table_of_what_a_zip_near_it_holds_says_so(table: Path) -> None:
    """So ``audit --apply`` writes it for a cache of an archive."""
    with zipfile.ZipFile(table.with_name("photos.zip"), "w") as archive:
        archive.write(table.parent / "x" / "a.png", "cats/1.png")
    table.write_text("path,label\ncats/1.png,cat\n")
    with pytest.raises(SourceError, match=r"--root .*photos\.zip has 1 of the first 1"):
        list_images(table)
    assert list_images(Source(table, root=table.with_name("photos.zip"))).paths == ("cats/1.png",)


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def locked(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "list.csv").write_text("path,label\na.jpg,b\n")
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(SourceError, match=f"{name} cannot be read: Permission denied$"):
        read_table(tmp_path / name, lambda _: False, {})
