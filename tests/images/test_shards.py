"""What is in archives, by their folders, by files beside images, by columns: as a folder of the same files would be read."""

import json
import os
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_FLAGS, write_photo
from packing import FORMS, parquet, read_folder, tar, zipped

from featcache.errors import FeatcacheError, RefusedImage, SourceError, UsageError
from featcache.images.layout import SPLITS
from featcache.images.read import Paths, read_file, read_images
from featcache.images.source import ImageList, Source, holds_images, list_images

JPEG = b"\xff\xd8\xff\xe0 as it begins"


def meaning(images: ImageList, *, below: str = "") -> Counter[tuple[str, str | None, str]]:
    labels = (images.classes[k] if k >= 0 else None for k in images.labels.tolist())
    paths = (path.removeprefix(below) for path in images.paths)
    return Counter(zip(paths, labels, (SPLITS[k] for k in images.splits.tolist()), strict=True))


TREES = {
    "classes": ["cats/1.jpg", "cats/2.jpg", "dogs/1.jpg"],
    "splits": ["train/cats/1.jpg", "train/dogs/1.jpg", "val/cats/2.jpg", "test/dogs/3.jpg"],
    "flat": ["1.jpg", "2.jpg"],
    "odd": [
        "cats/1.jpg",
        "dogs/a/2.JPEG",
        ".hidden/3.jpg",
        "__MACOSX/cats/._1.jpg",
        "dogs/notes.txt",
        "dogs/unnamed",
        "cats/x.html",
    ],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tree", TREES)
def test_folders_mean_what_they_mean_on_a_disk(tmp_path: Path, tree: str, form: str) -> None:
    files = {name: b"text" if name.endswith((".txt", ".html")) else JPEG + name.encode() for name in TREES[tree]}
    for name, data in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(data)
    plain = list_images(tmp_path / "tree")
    images = list_images(FORMS[form](tmp_path / form, files))
    assert meaning(images) == meaning(plain) and images.classes == plain.classes
    wrapped = list_images(
        FORMS[form](tmp_path / f"wrapped{form}", {f"./my data/{name}": data for name, data in files.items()})
    )
    assert meaning(wrapped, below="my data/") == meaning(plain)
    assert meaning(list_images(tmp_path / f"wrapped{form}" / "my data")) == meaning(plain)  # a folder in it


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_with_one_class_is_one_packed_or_not(tmp_path: Path, form: str, run) -> None:
    """Whichever folder is named; and the images alone, without a class, are those of the folder that the sentence names."""
    for k in range(2):
        write_photo(tmp_path / "pets" / "cat" / f"{k}.jpg", (1, 2, 3), k)
    files = {f"pets/{name}": data for name, data in read_folder(tmp_path / "pets").items()}
    archive = FORMS[form](tmp_path / form, files)
    for place, folder in ((archive, "pets"), (archive / "pets", "pets"), (archive / "pets" / "cat", "pets/cat")):
        assert meaning(list_images(place), below="pets/") == meaning(list_images(tmp_path / folder)), place
    for place in (tmp_path / "pets", archive, archive / "pets"):
        code, _, err = run("extract", place, "-o", tmp_path / "f.h5", *TINY_FLAGS)
        inside = archive / "pets" / "cat" if place != tmp_path / "pets" else place / "cat"
        assert code == 1 and f"{place} holds one class only (cat)" in err and f"give {inside} itself" in err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/train/1.jpg", "a/test/1.jpg", "b/train/1.jpg", "b/test/1.jpg"], "can be read in two ways"),
        (["a/x.txt"], "no image found"),
        (["cats/1.jpg", "dogs/1.jpg", "metadata.csv"], "holds metadata.csv, which says .* unpack it"),
    ],
)
def test_what_is_refused_as_of_a_folder(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        list_images(zipped(tmp_path / "x.zip", dict.fromkeys(files, JPEG)))


def test_a_level_that_is_said(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", dict.fromkeys(["a/cats/1.jpg", "b/cats/2.jpg", "b/dogs/2.jpg"], JPEG))
    assert list_images(Source(path, class_level=2)).classes == ("cats", "dogs")
    with pytest.raises(UsageError, match="--label-column says how a table is read, and .* is an archive"):
        list_images(Source(path, label_column="x"))


def samples(*said: tuple[str, Any]) -> dict[str, bytes]:
    """Images of WebDataset, each with a file beside it: (suffix, content)."""
    files = {}
    for number, (suffix, content) in enumerate(said):
        files[f"{number:06}.jpg"] = JPEG + str(number).encode()
        if suffix:
            files[f"{number:06}.{suffix}"] = content if isinstance(content, bytes) else json.dumps(content).encode()
    return files


BESIDE = {
    "names": (samples(("cls", b"cat"), ("cls", b"dog\n")), ["cat", "dog"]),
    "numbers": (samples(("cls", b"1"), ("cls", b"0")), ["1", "0"]),
    "numbers of lines": (samples(("cls", b"1"), ("cls", b"0")) | {"classes.txt": b"cat\ndog\n"}, ["dog", "cat"]),
    "json": (samples(("json", {"label": "cat"}), ("json", {"a": 1, "Class": "dog"})), ["cat", "dog"]),
    "json numbers": (
        samples(("json", {"label": 0}), ("json", {"cls": 1})) | {"classes.txt": b"cat\ndog"},
        ["cat", "dog"],
    ),
    "cls before json": (samples(("cls", b"cat")) | {"000000.json": b'{"label": "dog"}'}, ["cat"]),
    "text": (samples(*[("txt", b"cat")] * 3, ("txt", b"dog")), ["cat", "cat", "cat", "dog"]),
    "captions": (samples(*[("txt", f"a photo of {k}".encode()) for k in range(5)]), [None] * 5),
    "one is missing": (samples(("cls", b"cat"), ("cls", b"dog"), ("", b"")), ["cat", "dog", None]),
    "what is no label": (
        samples(("cls", b"cat"), ("cls", b"\xff\xfe\xff"), ("cls", b"a\nb"), ("cls", b"x")),
        ["cat", None, None, "x"],
    ),
    "json that is none": (samples(("json", b"{"), ("json", [1]), ("json", b"{" * 9999)), [None] * 3),
}


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.parametrize("form", ["a.tar", "a.tar.gz", "deflated.zip"])
def test_labels_beside_images(tmp_path: Path, case: str, form: str) -> None:
    files, labels = dict(BESIDE[case][0]), BESIDE[case][1]
    images = list_images(FORMS[form](tmp_path / form, files))
    assert [images.classes[k] if k >= 0 else None for k in images.labels] == labels
    if case == "numbers of lines":
        del files["classes.txt"]
        (tmp_path / "classes.txt").write_bytes(b"cat\ndog\nfox\n")
        images = list_images(FORMS[form](tmp_path / form, files))
        assert images.classes == ("cat", "dog", "fox") and images.labels.tolist() == [1, 0]
        (tmp_path / "classes.txt").write_bytes(b"cat\n")
        with pytest.raises(SourceError, match="is of the class 1, and classes.txt names 1"):
            list_images(tmp_path / form)


@pytest.mark.parametrize("place", [b"PK\3\4", b"hello"], ids=["its header", "its bytes"])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_lies_beside_a_damaged_text_is_read(tmp_path: Path, place: bytes, shards: int) -> None:
    """Python's ``zipfile`` gives the images of such a zip, too, and refuses the text alone."""
    files = {"cats/1.jpg": JPEG, "dogs/1.jpg": JPEG + b"1", "dogs/readme.txt": b"hello"}
    for number in range(shards):
        path = zipped(tmp_path / f"{number}.zip", files)
    data = bytearray(path.read_bytes())
    data[data.rindex(place, 0, data.index(b"PK\1\2")) + (30 if place == b"PK\3\4" else 0)] ^= 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert [archive.read(name) for name in ("cats/1.jpg", "dogs/1.jpg")] == [JPEG, JPEG + b"1"]
        with pytest.raises(zipfile.BadZipFile):
            archive.read("dogs/readme.txt")
    images = list_images(path if shards == 1 else tmp_path)
    assert images.classes == ("cats", "dogs") and len(images) == 2 * shards
    assert [path for path, _ in images.refused] == ["1.zip/" * (shards > 1) + "dogs/readme.txt"]
    assert images.refused[0].reason.startswith("damaged: ")


SHARDS = {
    "train-000.tar": ["cat", "dog"], "train-001.tar": ["dog"], "val-000.tar": ["cat"], "imagenet_TEST_0.tar": ["cat"], "x.tar": ["dog"],
}  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    for name, labels in SHARDS.items():
        tar(tmp_path / "shards" / name, samples(*[("cls", label.encode()) for label in labels]))
    (tmp_path / "shards" / "README.md").write_text("about")
    return tmp_path / "shards"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", sorted(SHARDS)),
        ("train-*.tar", ["train-000.tar", "train-001.tar"]),
        ("train-{000..001}.tar", ["train-000.tar", "train-001.tar"]),
        ("{val,train}-000.tar", ["val-000.tar", "train-000.tar"]),
        ("val-00?.tar", ["val-000.tar"]),
    ],
)
def test_several_shards(shards: Path, pattern: str, names: list[str]) -> None:
    images = list_images(shards / pattern)
    splits = {"train-000.tar": 1, "train-001.tar": 1, "val-000.tar": 2, "imagenet_TEST_0.tar": 3, "x.tar": 0}
    assert images.root == shards
    assert images.paths == tuple(f"{name}/{k:06}.jpg" for name in names for k in range(len(SHARDS[name])))
    assert images.splits.tolist() == [splits[name] for name in names for _ in SHARDS[name]]
    assert [images.classes[k] for k in images.labels] == [label for name in names for label in SHARDS[name]]


def test_links_that_leave_the_folder_of_shards(shards: Path, tmp_path: Path) -> None:
    tar(tmp_path / "secret.tar", samples(("cls", b"secret")))
    (shards / "train-002.tar").symlink_to(tmp_path / "secret.tar")
    (shards / "train-003.tar").symlink_to("train-001.tar")
    images = list_images(shards)
    assert images.classes == ("cat", "dog") and not [path for path in images.paths if "002" in path]
    assert "train-003.tar/000000.jpg" in images.paths


def test_shards_that_cannot_be_reached_are_named(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (shards / "locked").mkdir()
    (shards / "train-002.tar").symlink_to("nowhere")
    scandir = os.scandir

    def scan(folder: str) -> Any:
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    images = list_images(shards)
    assert len(images) == 6 and dict(images.refused) == {"train-002.tar": "cannot be read: No such file or directory"}
    assert f"{shards / 'locked'}: folder cannot be read: Permission denied" in caplog.messages


def test_a_shard_that_is_missing_is_named(shards: Path) -> None:
    images = list_images(shards / "train-{000..002}.tar")
    assert len(images) == 3
    assert images.refused == (("train-002.tar", "cannot be read: No such file or directory"),)


def test_a_pattern_of_nothing(shards: Path, run) -> None:
    code, _, err = run("extract", shards / "tst-*.tar", "-o", shards / "f.h5")
    assert code == 1 and "nothing matches" in err and "in a shell put a pattern in quotes" in err


def test_folders_of_classes_in_several_archives(tmp_path: Path) -> None:
    """Layouts count over all of them; a damaged one is refused, and the rest is read."""
    (tmp_path / "zips").mkdir()
    zipped(tmp_path / "zips" / "1.zip", {"photos/cats/1.jpg": JPEG, "photos/dogs/1.jpg": JPEG})
    zipped(tmp_path / "zips" / "2.zip", {"photos/cats/1.jpg": JPEG})
    (tmp_path / "zips" / "3.zip").write_bytes(b"PK\3\4 and no more")
    images = list_images(tmp_path / "zips")
    assert images.paths == ("1.zip/photos/cats/1.jpg", "1.zip/photos/dogs/1.jpg", "2.zip/photos/cats/1.jpg")
    assert images.classes == ("cats", "dogs") and images.labels.tolist() == [0, 1, 0]
    assert [(refusal.path, refusal.reason) for refusal in images.refused] == [
        ("3.zip", "cut off or damaged: the zip has no directory at its end")
    ]
    with pytest.raises(SourceError, match=r"3\.zip: cut off or damaged"):
        list_images(tmp_path / "zips" / "3.zip")


def test_images_win_over_archives_beside_them(tmp_path: Path) -> None:
    write_photo(tmp_path / "cats" / "1.jpg", (1, 2, 3), 0)
    tar(tmp_path / "more.tar", {"dogs/1.jpg": JPEG})
    assert list_images(tmp_path).paths == ("cats/1.jpg",)


# ------------------------------------------------------------------------------------------------------------ Parquet

PHOTOS: list[bytes | None] = [JPEG + bytes([k]) for k in range(10)]


def test_parquet_of_datasets(tmp_path: Path) -> None:
    """Splits by names of files, classes by their numbers, also one that no row has."""
    (tmp_path / "data").mkdir()
    for name, labels in (
        ("train-00000-of-00002", [0, 1, -1, 2, 0, 1, 1, 1, 1, 1]),
        ("validation-00000-of-00001", [1] * 10),
    ):
        parquet(tmp_path / "data" / f"{name}.parquet", PHOTOS, ("cat", "dog", "emu", "fox"), label=labels)
    images = list_images(tmp_path)
    assert images.classes == ("cat", "dog", "emu", "fox")
    assert images.labels[:5].tolist() == [0, 1, -1, 2, 0]
    assert images.splits.tolist() == [1] * 10 + [2] * 10
    assert images.paths[3] == "data/train-00000-of-00002.parquet/3"
    assert list_images(tmp_path / "data" / "train-*.parquet").paths[3] == "train-00000-of-00002.parquet/3"
    assert list_images(tmp_path / "data" / "train-00000-of-00002.parquet").paths[3] == "3"


def test_rows_that_hold_only_a_path_say_how_to_put_in_the_bytes(tmp_path: Path) -> None:
    """So ``datasets`` writes images of a folder by ``to_parquet``."""
    path = parquet(tmp_path / "x.parquet", [None])
    with pytest.raises(
        RefusedImage, match=r"^no image in this row of Parquet; .*embed_table_storage puts in the bytes$"
    ):
        read_file(path / "0")


def written(to: Path, /, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), to)
    return to


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_rows_of_parquet_in_any_order(tmp_path: Path, group: int) -> None:
    """Of several row groups, on several threads, each row has its own bytes."""
    rows: list[bytes | None] = [f"{k}".encode() * (1 + 50 * (k % 3)) for k in range(300)]
    files = Paths(parquet(tmp_path / "x.parquet", rows, group=group), tuple(map(str, range(300))))
    orders = [list(range(300)), list(range(299, -1, -1)), random.Random(0).sample(range(300), 300)]
    for order in orders:
        for workers in (1, 8):
            read = read_images(files, order, bytes, workers=workers)
            assert [one.value for one in read] == [rows[k] for k in order]


def test_parquet_as_others_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    texts = pa.array(["b", "a", None, "b"]).dictionary_encode()
    bare = written(tmp_path / "bare.parquet", content=PHOTOS[:4], species=texts, is_valid=[True, False, False, True])
    images = list_images(bare)
    assert (
        images.classes == ("a", "b")
        and images.labels.tolist() == [1, 0, -1, 1]
        and images.splits.tolist() == [2, 1, 1, 2]
    )
    assert list_images(Source(bare, label_column="none", split_column="none")).classes == ()
    numbers = written(tmp_path / "numbers.parquet", image=PHOTOS[:3], label=[10, 2, 2], other=["x", "y", "z"])
    assert list_images(numbers).classes == ("10", "2")
    assert list_images(Source(numbers, label_column="other")).classes == ("x", "y", "z")


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "dictionary"])
@pytest.mark.parametrize("inside", [False, True])
def test_bytes_of_every_type(tmp_path: Path, kind: str, inside: bool) -> None:
    """Of several row groups, read in blocks that end within one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def piece(rows: list[bytes]) -> Any:
        column = pa.array(rows).dictionary_encode() if kind == "dictionary" else pa.array(rows, getattr(pa, kind)())
        if inside:
            column = pa.StructArray.from_arrays([column, pa.nulls(len(rows), pa.string())], ["bytes", "path"])
        return pa.table({"image": column, "label": ["a"] * len(rows)})

    rows = [f"{k % 7}".encode() * 90 for k in range(300)]
    with pq.ParquetWriter(tmp_path / "x.parquet", piece(rows).schema) as file:
        for start in range(0, 300, 70):
            file.write_table(piece(rows[start : start + 70]))
    images = list_images(tmp_path / "x.parquet")
    assert [read_file(images.root / name)[0] for name in images.paths] == rows


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no bytes": (
        {"left": [b"a"], "label": ["x"]},
        r"no column of the bytes of images; .*; choose one, as --path-column left",
    ),
    "a struct without": ({"image": [{"path": "a.jpg"}]}, "the column 'image' is of the type struct"),
    "text": ({"image": ["a.jpg"]}, "not one of its images is a file"),
    "lists": ({"image": [[b"a", b"b"]]}, "the column 'image' is of the type list"),
    "two": (
        {"image": [JPEG], "jpg": [JPEG]},
        r"several columns of images \(image, jpg\).*; choose one, as --path-column image",
    ),
    "labels that are lists": ({"image": [JPEG], "label": [["a"]]}, "the column 'label' is of the type list"),
    "labels that are parts": ({"image": [JPEG], "label": [0.5]}, "the column 'label' is of the type double"),
    "labels beyond reason": ({"image": [JPEG], "label": ["x" * 20_000]}, "a label of 20000 characters"),
    "no split": ({"image": [JPEG], "split": ["huh"]}, "row 0: 'huh' is no split"),
    "several labels": ({"image": [JPEG], "label": ["a"], "class": ["b"]}, "may each hold the label; choose one"),
    "none": ({"image": []}, "is empty"),
}


@pytest.mark.parametrize("marked", [True, False])
def test_one_of_several_columns_of_images(tmp_path: Path, marked: bool) -> None:
    """Its name is part of the paths, so that each finds its bytes again without the option."""
    features = {name: {"_type": "Image"} for name in ("left", "right")} if marked else {}
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    path = written(tmp_path / "x.parquet", said, left=PHOTOS[:3], right=PHOTOS[3:6], label=["a", "b", "a"])
    images = list_images(Source(path, path_column="RIGHT"))
    assert images.paths == ("right/0", "right/1", "right/2") and images.classes == ("a", "b")
    assert [read_file(images.root / name)[0] for name in (*images.paths, "left/1")] == [*PHOTOS[3:6], PHOTOS[1]]
    with pytest.raises(UsageError, match=r"no column for --path-column lef; .*did you mean left\?"):
        list_images(Source(path, path_column="lef"))
    assert list_images(path / "left").paths == ("0", "1", "2") and read_file(path / "left" / "2")[0] == PHOTOS[2]
    assert not holds_images(path / "left" / "2") and holds_images(path / "left")
    for wrong in ("up/0", "left/3", "0", "label/0", "LEFT/0", "left/left/0"):
        with pytest.raises(RefusedImage):
            read_file(path / wrong)


@pytest.mark.parametrize("case", BAD)
def test_parquet_that_is_refused(tmp_path: Path, case: str) -> None:
    columns, message = BAD[case]
    with pytest.raises(FeatcacheError, match=message):
        list_images(written(tmp_path / "x.parquet", **columns))


def test_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "x.parquet", PHOTOS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(FeatcacheError, match=r"pip install 'featcache\[parquet\]'"):
        list_images(path)


def test_files_are_only_read(shards: Path) -> None:
    before = read_folder(shards)
    list_images(shards)
    assert read_folder(shards) == before
