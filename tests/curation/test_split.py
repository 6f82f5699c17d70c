"""``split``: of folders, tables and caches, into a table or folders; what is kept, what is refused."""

import csv
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from caches import CLASSES_DIM, make_classes, plain_rows
from conftest import COLOURS, SPEC, TINY_FLAGS, make_photos, write_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import FORMS

from featcache.cache.write import write_cache
from featcache.curation import split_folders
from featcache.curation.manifest import prefix_of
from featcache.curation.split import split
from featcache.errors import FeatcacheError, SourceError, StorageError, UsageError
from featcache.images.home import find_home, places_in
from featcache.images.source import ImageList, Source, list_images
from featcache.spec import SPLITS
from featcache.system.path_kinds import as_path


def image_list(names: dict[str, int], **changes: object) -> ImageList:
    n = len(names)
    columns = {"splits": np.zeros(n, np.uint8), "sizes": np.arange(1, n + 1), "mtimes": np.zeros(n, np.int64)}
    labels = np.array([*names.values()], np.int32)
    return ImageList(Path(), tuple(names), labels, ("a", "b", "c"), **(columns | changes))


def read(table: Path, column: str = "split") -> dict[str, str]:
    with table.open(newline="") as file:
        return {row["path"]: row[column] for row in csv.DictReader(file)}


def by_path(images: ImageList) -> dict[str, int]:
    return dict(zip(images.paths, images.splits.tolist(), strict=True))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_the_seed_and_names_decide_and_a_table_keeps_what_it_says(tmp_path_factory, seed, added) -> None:
    random = np.random.default_rng(seed)
    names = {f"{k}.jpg": int(label) for k, label in enumerate(random.integers(0, 3, 120))}
    table = tmp_path_factory.mktemp("split") / "m.csv"
    first = split(image_list(names), table, val=0.1, test=0.2, groups="none", seed=seed % 100)
    turned = image_list(dict(reversed(names.items())))
    assert by_path(first.images) == by_path(split(turned, val=0.1, test=0.2, groups="none", seed=seed % 100).images)
    more = dict(random.permutation([*names.items(), *((f"new{k}.jpg", k % 3) for k in range(added))]).tolist())
    more = {name: int(label) for name, label in more.items()}
    second = split(image_list(more), table, val=0.1, test=0.2, groups="none", seed=seed % 100)
    assert by_path(first.images).items() <= by_path(second.images).items()
    assert (second.kept, second.unmet) == (120, ())
    assert abs(second.counts["test"] - 0.2 * len(more)) <= 0.01 * len(more) + 0.5
    assert {path: SPLITS[number] for path, number in by_path(second.images).items()} == read(table)
    third = split(image_list(names), table, val=0.1, test=0.2, groups="none")  # some are gone, the seed is another
    assert by_path(third.images) == by_path(first.images)


def test_a_folder_becomes_a_table_that_extract_takes(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"), each=20)
    shutil.copy("photos/red/00.jpg", "photos/red/copy.jpg")
    shutil.copy("photos/red/01.jpg", "photos/blue/copy.jpg")
    code, out, err = run("split", "photos", "--val", "0.1", "--test", "0.2", "-o", "m.csv", "--json")
    facts = json.loads(out)
    assert (code, facts["images"], facts["splits"]) == (0, 62, {"train": 44, "val": 6, "test": 12})
    assert facts["groups"] == {"kind": "exact", "column": None, "together": 2, "images": 4}
    assert facts["classes"]["green"] == {"train": 14, "val": 2, "test": 4}
    assert "next: featcache extract m.csv -o features.h5" in err
    splits = read(Path("m.csv"))
    assert splits["photos/red/00.jpg"] == splits["photos/red/copy.jpg"]
    assert splits["photos/red/01.jpg"] == splits["photos/blue/copy.jpg"]
    found = list_images("m.csv")
    assert {name: int((found.splits == k).sum()) for k, name in enumerate(SPLITS) if k} == facts["splits"]
    Path("elsewhere").mkdir()
    code, _, err = run("split", "photos", "--val", "0.1", "-o", "elsewhere/m.csv")
    assert "next: featcache extract elsewhere/m.csv --root photos -o features.h5" in err
    assert list_images(Source("elsewhere/m.csv", root="photos")).splits.any()  # the images lie on another branch


@pytest.mark.slow
def test_extract_takes_the_table(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"), each=10)
    shutil.copy("photos/red/00.jpg", "photos/red/copy.jpg")
    facts = json.loads(run("split", "photos", "--val", "0.1", "--test", "0.2", "-o", "m.csv", "--json")[1])
    code, out, _ = run("extract", "m.csv", "-o", "f.h5", *TINY_FLAGS, "--json")
    assert code == 0 and json.loads(out)["splits"] == facts["splits"]
    assert json.loads(out)["copies"] == {"within": 1, "across_splits": 0, "across_labels": 0}
    code, out, err = run("split", "f.h5", "--val", "0.1", "--test", "0.2", "-o", "n.csv", "--json")
    assert json.loads(out)["kept"] == 31 and json.loads(out)["splits"] == facts["splits"]
    assert err.endswith("next: featcache extract n.csv -o features.h5\n")  # its images were found
    assert read(Path("n.csv")) == read(Path("m.csv"))


def test_the_table_reads_well(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"), each=10)
    write_photo(Path("photos/solo/1.jpg"), (0, 0, 0), 1)
    out = run("split", "photos", "--val", "0.1", "--test", "0.2", "-o", "m.csv")[1].splitlines()
    assert out == [
        "m.csv: 31 images; val 3 of 3 asked for (9.7%), test 6 of 6 asked for (19.4%)",
        "  class  train  val  test",
        "  blue       7    1     2",
        "  green      7    1     2",
        "  red        7    1     2",
        "  solo       1    0     0",
        "  all       22    3     6",
        "  not met: no val image of solo: too few images",
        "  not met: no test image of solo: too few images",
    ]
    make_photos(Path("photos"), each=12)
    out = run("split", "photos", "--val", "0.1", "--test", "0.2", "-o", "m.csv")[1].splitlines()
    assert out[0] == "m.csv: 37 images; val 4 of 4 asked for (10.8%), test 7 of 7 asked for (18.9%)"
    assert out[7] == "  31 images keep the split they had"


@pytest.mark.parametrize("there", [("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_splits_that_there_are_stay_and_others_are_drawn_from_train(tmp_path: Path, there: tuple[str, ...]) -> None:
    photos = make_photos(tmp_path / "photos", each=20, splits=there)
    before, made = by_path(list_images(photos)), split(photos, val=0.1, test=0.2)
    after = by_path(made.images)
    lacking = {"val", "test"} - {*there}
    for path, number in before.items():
        assert after[path] == number or (number == 1 and SPLITS[after[path]] in lacking)
    n = len(after)
    assert made.moved == {name: round({"val": 0.1, "test": 0.2}[name] * n) for name in lacking}
    assert made.kept == n - sum(made.moved.values())
    anew = split(photos, val=0.1, test=0.2, reassign=True)
    assert anew.counts == {"train": n - round(0.1 * n) - round(0.2 * n), "val": round(0.1 * n), "test": round(0.2 * n)}
    assert not anew.unmet and any("keep the split they had" in sentence for sentence in made.unmet)


def test_copies_across_splits_that_are_to_stay_are_named(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=6, splits=("train", "test"))
    shutil.copy(photos / "train/red/00.jpg", photos / "test/red/copy.jpg")
    with pytest.raises(
        SourceError, match=r"1 group of .* the first: test/red/copy.jpg in test and train/red/00.jpg in train; --reas"
    ):
        split(photos, val=0.1)
    assert split(photos, val=0.1, groups="none").counts["test"] == 19
    made = by_path(split(photos, val=0.2, test=0.2, reassign=True).images)
    assert made["train/red/00.jpg"] == made["test/red/copy.jpg"]


def patients(root: Path, n: int = 60) -> Path:
    """A table of photos, three of each patient, in two classes; two patients share a file."""
    table = root / "list.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "species", "patient", "note"])
        for k in range(n):
            path = write_photo(root / "p" / f"{k}.png", (9, 9, 9), k, (8, 8))
            writer.writerow([path.relative_to(root), "ab"[k % 2], f"patient {k // 3}" if k > 3 else "", "x"])
    shutil.copy(root / "p/10.png", root / "p/20.png")  # so that the patients 3 and 6 belong together
    return table


def test_a_column_of_a_table_and_copies_are_joined(run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    table, out = patients(tmp_path), tmp_path / "m.csv"
    code, said, _ = run("split", table, "--val", "0.15", "--test", "0.2", "--group-column", "Patient", "-o", out)
    assert code == 0 and "4 images have no group and stand alone" in caplog.text
    assert "group from 'patient'; ignored: note" in caplog.text
    assert "  56 images in 18 groups kept together (copies and Patient)" in said
    splits = read(out)
    for k in range(4, 60):
        assert splits[f"p/{k}.png"] == splits[f"p/{max(k // 3 * 3, 4)}.png"]
    assert splits["p/9.png"] == splits["p/10.png"] == splits["p/20.png"] == splits["p/18.png"]
    groups = read(out, "group")
    assert groups["p/0.png"] == "" and groups["p/9.png"] == groups["p/18.png"] != groups["p/12.png"]
    again = split(out, val=0.15, test=0.2, group_column="group", reassign=True)  # what belongs together is in the table
    assert {k: SPLITS[v] for k, v in by_path(again.images).items()} == splits


def test_a_list_brings_its_groups(tmp_path: Path) -> None:
    images = list_images(Source(patients(tmp_path), group_column="patient"))
    made = split(images, test=0.2, groups="none")
    assert made.together == (19, 56) and "  56 images in 19 groups kept together (groups of the list)" in made.lines()
    with pytest.raises(UsageError, match="a list of images has no column"):
        split(images, test=0.2, group_column="patient")


def test_a_folder_takes_groups_of_another_table(tmp_path: Path) -> None:
    patients(tmp_path)
    made = split(tmp_path / "p", test=0.2, group_table=tmp_path / "list.csv", group_column="patient")
    splits = by_path(made.images)
    assert made.column == "patient" and all(splits[f"{k}.png"] == splits[f"{k // 3 * 3}.png"] for k in range(6, 60))
    with pytest.raises(SourceError, match=r"no row for 1 of 61 images \(new.png\)"):
        write_photo(tmp_path / "p/new.png", (0, 0, 0), 1)
        split(tmp_path / "p", test=0.2, group_table=tmp_path / "list.csv", group_column="patient")


def test_a_cache_is_split_as_its_images_are(cache: Path, tmp_path: Path, run) -> None:
    made = split(cache, tmp_path / "m.csv", val=0.1, test=0.2, reassign=True)
    images = image_list({f"{k:04d}.jpg": k % 3 for k in range(150)})
    assert by_path(made.images) == by_path(split(images, val=0.1, test=0.2).images)
    assert made.next == f"featcache extract {tmp_path}/m.csv --root FOLDER -o features.h5"
    code, _, err = run("split", cache, "--val", "0.1", "--copy-to", tmp_path / "x")
    assert code == 2 and err.endswith("were not found near it; say where they are, as --source FOLDER\n")
    code, _, err = run("split", cache, "--val", "0.1", "-o", tmp_path / "n.csv", "--source", tmp_path)
    assert code == 1 and f"--source {tmp_path} has no 0000.jpg or 0075.jpg or 0149.jpg with the bytes that" in err


def test_a_folder_that_holds_some_images_of_a_cache_is_not_its_home(tmp_path: Path) -> None:
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        write_photo(tmp_path / "all" / name, (9, 9, 9), int(name[0]))
    shutil.copytree(tmp_path / "all", tmp_path / "a few")
    (tmp_path / "a few/1.jpg").unlink()
    digests = [hashlib.sha256((tmp_path / "all" / f"{k}.jpg").read_bytes()).digest() for k in range(3)]
    images = [(f"{k}.jpg", digest) for k, digest in enumerate(digests)]
    places = [tmp_path / "a few", tmp_path / "nothing"]
    assert find_home(images, places) == find_home(images[:1], places, whole=True) == tmp_path / "a few"
    assert find_home(images, places, whole=True) is None
    assert find_home(images, [*places, tmp_path / "all"], whole=True) == tmp_path / "all"


@pytest.mark.parametrize("address", ["s3://bucket/a.zip", "https://host/a.tar"])
def test_what_lies_elsewhere_does_not_lie_below_a_table(tmp_path: Path, address: str) -> None:
    assert prefix_of(tmp_path / "m.csv", as_path(address)) is None
    assert prefix_of(Path("m.csv"), as_path(address)) is None


@pytest.mark.parametrize("form", FORMS)
def test_archives_are_homes_that_are_looked_for_after_folders(tmp_path: Path, monkeypatch, form: str) -> None:
    files = {"cats/1.jpg": b"one", "dogs/2.jpg": b"two"}
    images = [(name, hashlib.sha256(data).digest()) for name, data in files.items()]
    archive = FORMS[form](tmp_path / form, files)
    assert find_home(images, places_in(tmp_path), whole=True) == archive
    for name, data in files.items():
        (tmp_path / "a.zip" / name).parent.mkdir(parents=True)  # a folder may be called so
        (tmp_path / "a.zip" / name).write_bytes(data)
    assert find_home(images, places_in(tmp_path), whole=True) == tmp_path / "a.zip"
    monkeypatch.setattr("featcache.images.home._MOST_GZIP", 10)
    assert (archive in places_in(tmp_path)) == (not form.endswith("gz"))


def test_the_table_of_groups_is_read_before_images_are_compared(tmp_path: Path, monkeypatch) -> None:
    make_classes(tmp_path / "f.h5", np.zeros(30, int))
    monkeypatch.setattr("featcache.curation.split.nearest_rows", lambda *_, **__: pytest.fail("compared"))
    with pytest.raises(SourceError, match="nothing.csv does not exist"):
        split(tmp_path / "f.h5", val=0.1, groups="near", group_table=tmp_path / "nothing.csv", group_column="x")


def test_near_copies_of_a_cache_stay_together(tmp_path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(200, CLASSES_DIM)).astype(np.float16)
    X[1:20:2] = X[0:20:2]  # of other files
    rows = plain_rows((f"{k}.jpg" for k in range(200)), labels=(np.arange(200) // 2 % 2).astype(np.int32))
    write_cache(tmp_path / "f.h5", rows, [X], dim=CLASSES_DIM, spec=SPEC, classes=("a", "b"))
    made = split(tmp_path / "f.h5", val=0.1, test=0.2, groups="near")
    assert (made.splits[0:20:2] == made.splits[1:20:2]).all() and made.together[0] >= 10
    assert abs(made.counts["test"] - 40) <= 2
    X[7, 3] = np.nan
    write_cache(tmp_path / "g.h5", rows, [X], dim=CLASSES_DIM, spec=SPEC, classes=("a", "b"))
    with pytest.raises(SourceError, match="features of 1 image are not finite, the first is row 7"):
        split(tmp_path / "g.h5", val=0.1, groups="near")
    apart = split(tmp_path / "f.h5", val=0.1, test=0.2).splits
    assert (apart[0:20:2] != apart[1:20:2]).any()


@pytest.mark.parametrize("link", [False, True])
def test_folders_of_copies_or_links_are_a_source(tmp_path: Path, run, link: bool) -> None:
    photos = make_photos(tmp_path / "photos", each=10)
    for number in range(8):  # of one name in one class, also but for capitals, which some disks do not tell apart
        write_photo(photos / "red" / f"{number}" / ("A.jpg" if number % 2 else "a.jpg"), COLOURS["red"], 90 + number)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(photos.rglob("*.jpg"))}
    out = tmp_path / "out"
    out.mkdir()
    option = "--link-to" if link else "--copy-to"
    code, said, _ = run("split", photos, "--val", "0.2", "--test", "0.2", option, out, "-o", tmp_path / "m.csv")
    assert code == 0 and said.startswith(f"{tmp_path}/m.csv and {out}: 38 images")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(photos.rglob("*.jpg"))} == before
    images, table = list_images(out), list_images(tmp_path / "m.csv")
    assert images.count_rows() == table.count_rows() and len(images) == 38
    content = Counter((out / path).read_bytes() for path in images.paths)
    assert content == Counter(data for data, _ in before.values())
    folded = Counter(path.lower() for path in images.paths)
    assert max(folded.values()) == 1
    assert {(out / path).stat().st_nlink for path in images.paths} == {2 if link else 1}
    code, _, err = run("split", photos, "--val", "0.2", option, out)
    assert code == 1 and "it is not empty, and nothing in it is replaced" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "out", "photos"]


def test_what_stops_copying_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_photos(tmp_path / "photos", each=5)

    def interrupt(done: int, total: int, what: str) -> None:
        if (done, what) == (7, "files"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(photos, val=0.2, copy_to=tmp_path / "out", progress=interrupt)

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="cross-device link; --copy-to copies instead"):
        split(photos, val=0.2, link_to=tmp_path / "out")

    def fill(done: int, total: int, what: str) -> None:
        if what == "files":
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "mine").touch()

    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    with pytest.raises(StorageError):  # somebody wrote there meanwhile
        split(photos, val=0.2, copy_to=tmp_path / "out", progress=fill)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", [" red", "red ", "red\n", "\u00a0red", "=red "])
def test_classes_that_a_table_would_give_another_name_are_refused(photos: Path, tmp_path: Path, name: str) -> None:
    """One that blanks around it are part of is read back without them, and may be another one then."""
    (photos / "blue").rename(photos / name)
    with pytest.raises(SourceError, match=r"the class .*red.* cannot be written to a table, where blanks around"):
        split(photos, tmp_path / "list.csv", val=0.2)
    assert not (tmp_path / "list.csv").exists()


@pytest.mark.parametrize("name", ["\tred", "\n=red", '"red"', "'", "'=red", "r  ed", "\u200bred"])
def test_odd_classes_come_back_from_the_table(photos: Path, tmp_path: Path, name: str) -> None:
    (photos / "blue").rename(photos / name)
    split(photos, tmp_path / "list.csv", val=0.2)
    assert list_images(tmp_path / "list.csv").classes == list_images(photos).classes


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", " a", "x" * 256, "@eaDir"])
def test_classes_that_are_no_names_of_folders_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match="cannot be the name of a folder"):
        split_folders._folder_name(name)


ODD = ("=1+1", "'=x", "-5", 'say "hi", she', "ü\nv", "'q", "two  words")


def test_names_and_classes_come_back_from_the_table(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for k, name in enumerate(ODD):
        for number in range(4):
            write_photo(photos / name / f"{name[:3]}{number}.png", (k, 0, 0), 10 * k + number, (8, 8))
    odd = os.fsencode(photos / ODD[0]) + b"/\xff.png"
    os.link(photos / ODD[0] / f"{ODD[0][:3]}0.png", odd)
    made = split(photos, tmp_path / "m.csv", test=0.25)
    found = list_images(tmp_path / "m.csv")
    assert found.classes == made.images.classes == tuple(sorted(ODD))
    assert [f"photos/{path}" for path in made.images.paths] == [*found.paths]
    np.testing.assert_array_equal(found.labels, made.images.labels)
    np.testing.assert_array_equal(found.splits, made.splits)
    assert split(photos, tmp_path / "m.csv", test=0.25).kept == len(found)
    assert b"\n=" not in (tmp_path / "m.csv").read_bytes()


def test_images_without_label_or_file_are_left_out_and_counted(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=10)
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(photos.rglob("*.jpg"))]
    (photos / "empty.jpg").touch()
    lines += ["photos/blue/00.jpg,", "gone.jpg,red", "photos/empty.jpg,red"]
    (tmp_path / "l.csv").write_text("path,label\n" + "\n".join(lines[1:]) + "\n")
    made = split(tmp_path / "l.csv", tmp_path / "m.csv", test=0.2)
    assert made.left_out == {"no label": 1, "no readable file": 2} and made.counts["test"] == 6
    assert "  left out: 1 with no label, 2 with no readable file" in made.lines()
    assert list(read(tmp_path / "m.csv").values()).count("") == 3
    flat = split(photos / "red", val=0.2)  # no labels at all: all are dealt
    assert flat.counts == {"train": 8, "val": 2, "test": 0} and not flat.left_out


BAD = [
    ({"val": 0.5, "test": 0.5}, UsageError, "leaves none to train on"),
    ({"val": 0.0}, UsageError, "between 0 and 1"),
    ({"test": -0.1}, UsageError, "between 0 and 1"),
    ({"val": float("nan")}, UsageError, "between 0 and 1"),
    ({"test": 1.0}, UsageError, "between 0 and 1"),
    ({}, UsageError, "say how much"),
    ({"val": 0.1, "groups": "all"}, UsageError, "unknown groups"),
    ({"val": 0.1, "groups": "near"}, UsageError, "near copies are found by features.*extract photos -o features.h5"),
    ({"val": 0.1, "seed": -1}, UsageError, "seed"),
    ({"val": 0.1, "workers": 0}, UsageError, "workers"),
    ({"val": 0.1, "group_column": "patient"}, UsageError, "photos is a folder; name .* --group-table FILE"),
    ({"val": 0.1, "pictures": "photos"}, UsageError, "leave it out"),
    ({"val": 0.1, "copy_to": "a", "link_to": "b"}, UsageError, "choose one"),
    ({"val": 0.1, "copy_to": "photos/out"}, StorageError, "counts as a class"),
    ({"val": 0.1, "copy_to": "no/out"}, StorageError, "create it first"),
    ({"val": 0.1, "link_to": "mine.csv"}, StorageError, "not|folder"),
    ({"val": 0.1, "output": "photos"}, StorageError, "give the name of a file"),
    ({"val": 0.1, "output": "m.xlsx"}, StorageError, "call it m.csv"),
    ({"val": 0.1, "output": "mine.csv"}, StorageError, "no table of a split"),
    ({"val": 0.1, "output": "wide.csv"}, StorageError, "no table of a split"),
    ({"val": 0.1, "output": "other.csv"}, StorageError, "names other images, the first x/1.jpg"),
]


@pytest.mark.parametrize(("options", "error", "says"), BAD, ids=[says for *_, says in BAD])
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], error: type[FeatcacheError], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"), each=2)
    Path("mine.csv").write_text("my own notes\n")
    Path("wide.csv").write_text("path,label,split,patient\nphotos/red/00.jpg,red,val,1\n")
    Path("other.csv").write_text("path,label,split\nx/1.jpg,red,val\n")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(error, match=says):
        split("photos", **options)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_the_source_itself_is_never_replaced(run, tmp_path: Path) -> None:
    table = patients(tmp_path)
    code, _, err = run("split", table, "--val", "0.1", "-o", table)
    assert code == 1 and "it is what is read" in err
    code, _, err = run("split", table, "--val", "0.1")
    assert code == 2 and "say what to write" in err


def test_a_cache_takes_the_folder_of_its_images_by_another_option(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(8) % 2)
    with pytest.raises(UsageError, match="f.h5 is a cache; --source says where its images are"):
        split(Source(tmp_path / "f.h5", root=tmp_path), val=0.2)


def test_what_a_split_shows_of_itself(tmp_path: Path) -> None:
    make_classes(tmp_path / "one.h5", np.zeros(30, int))
    assert repr(split(tmp_path / "one.h5", val=0.1)).startswith("Split(counts={'train': 27, 'val': 3, 'test': 0}")
