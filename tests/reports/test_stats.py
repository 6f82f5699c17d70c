"""``stats``: counts against counting by hand, copies and refusals against ``extract``'s, outputs with names that break things."""

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import TINY, make_photos, write_photo
from kitchen import HOSTILE
from PIL import Image

import featcache
from featcache.cache.cache import FeatureCache
from featcache.errors import SourceError, StorageError, UsageError
from featcache.extraction.extract import extract
from featcache.images.source import list_images
from featcache.reports.source_stats.page import check_folder
from featcache.reports.source_stats.stats import SHAPES, Statistics, stats
from featcache.system.display import columns

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of three classes, with copies of every kind and files that cannot be read."""
    root = make_photos(tmp_path_factory.mktemp("stats") / "photos", each=4, splits=("train", "val"))
    for number in range(10, 14):
        write_photo(root / f"train/red/{number}.png", (90, 10, 10), number, (30 + number, 200))
    for copy, original in (
        ("val/blue/leak.jpg", "train/blue/00.jpg"),
        ("train/green/wrong.jpg", "train/blue/00.jpg"),
        ("train/red/twice.jpg", "train/red/00.jpg"),
    ):
        shutil.copy(root / original, root / copy)
    (root / "train/red/empty.jpg").touch()
    (root / "val/red/cut.jpg").write_bytes((root / "val/red/00.jpg").read_bytes()[:-40])
    (root / "val/red/gone.jpg").symlink_to("nowhere")
    (root / "train/nothing").mkdir()
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> Statistics:
    return stats(root)


def readable(root: Path) -> dict[str, Path]:
    bad = ("empty.jpg", "cut.jpg", "gone.jpg")
    files = (file for file in root.rglob("*.*") if file.name not in bad)
    return {file.relative_to(root).as_posix(): file for file in files}


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), float)


def test_counts_are_those_of_the_files(root: Path, found: Statistics) -> None:
    files = readable(root)
    by_hand = Counter(tuple(path.split("/")[:2]) for path in files)
    assert found.classes == {
        name: {split: by_hand[split, name] for split in ("train", "val")}
        for name in ("blue", "green", "nothing", "red")
    }
    assert (found.images, found.readable) == (len(files) + 3, len(files))
    assert found.splits == Counter(path.split("/")[0] for path in files)
    assert found.total_bytes == sum(file.stat().st_size for file in files.values())
    assert found.formats == Counter({"jpg": "JPEG", "png": "PNG"}[path[-3:]] for path in files)
    sizes = Counter(pixels(file).shape[1::-1] for file in files.values())
    assert {(w, h): n for w, h, n in found.sizes} == sizes
    assert found.distinct_sizes == len(sizes)
    widths, heights = np.array([size for size, n in sizes.items() for _ in range(n)]).T
    assert found.width is not None and found.shorter_edge is not None and found.aspect is not None
    assert [*found.width.values()] == np.percentile(widths, (0, 25, 50, 75, 100)).tolist()
    assert found.shorter_edge["max"] == np.minimum(widths, heights).max()
    assert found.aspect["median"] == pytest.approx(np.median(widths / heights))
    assert found.small == (np.minimum(widths, heights) < 224).sum()
    for name, values in (
        ("shorter_edge", np.minimum(widths, heights)),
        ("bytes", [f.stat().st_size for f in files.values()]),
    ):
        edges = np.array(found.histograms[name]["edges"])
        expected = [sum(low <= value < high for value in values) for low, high in itertools.pairwise(edges)]
        assert found.histograms[name]["counts"] == expected
        assert sum(expected) == len(files)


def test_shapes_are_the_nearest(found: Statistics) -> None:
    ratios = {shape: np.log(int(shape.split(":")[0]) / int(shape.split(":")[1])) for shape in SHAPES}
    expected: Counter[str] = Counter()
    for width, height, n in found.sizes:
        aspect = np.log(width / height)
        nearest = min(SHAPES, key=lambda shape: abs(ratios[shape] - aspect))
        expected["taller" if aspect < -np.log(2.2) else "wider" if aspect > np.log(2.2) else nearest] += n
    assert {name: n for name, n in found.shapes.items() if n} == expected
    assert expected["taller"] == 4


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((44, 100), "taller"),
        ((46, 100), "1:2"),
        ((80, 80), "1:1"),
        ((133, 100), "4:3"),
        ((219, 100), "2:1"),
        ((221, 100), "wider"),
    ],
)
def test_shapes_by_name(tmp_path: Path, size: tuple[int, int], shape: str) -> None:
    write_photo(tmp_path / "a/1.png", (9, 9, 9), 0, size)
    assert [name for name, n in stats(tmp_path).shapes.items() if n] == [shape]


def test_what_one_answer_scores(root: Path, found: Statistics) -> None:
    assert found.constant is not None
    for split, facts in found.constant.items():
        labels = [path.split("/")[1] for path in readable(root) if split in ("all", path.split("/")[0])]
        [(_, most)] = Counter(labels).most_common(1)
        assert (facts["n"], facts["classes"]) == (len(labels), 3)
        assert facts["accuracy"] == most / len(labels) == labels.count(facts["label"]) / len(labels)
        assert facts["balanced_accuracy"] == pytest.approx(1 / 3)


def test_copies_and_refusals_are_those_of_extract(root: Path, found: Statistics, tmp_path: Path) -> None:
    report = extract(root, tmp_path / "f.h5", TINY)
    assert {key: found.copies[key] for key in ("within", "across_splits", "across_labels")} == report.copies
    assert report.copies == {"within": 2, "across_splits": 1, "across_labels": 1}
    refused = FeatureCache.open(tmp_path / "f.h5").refused
    assert [(image["path"], image["reason"]) for image in found.unreadable] == [tuple(each) for each in refused]
    assert len(found.unreadable) == report.refused == 3


def test_groups_of_copies_are_equal_files(root: Path, found: Statistics) -> None:
    digests: dict[bytes, list[str]] = {}
    for path, file in sorted(readable(root).items()):
        digests.setdefault(hashlib.sha256(file.read_bytes()).digest(), []).append(path)
    expected = sorted(paths for paths in digests.values() if len(paths) > 1)
    groups = found.copies["groups"]
    assert sorted([image["path"] for image in group["images"]] for group in groups) == expected
    assert [group["kind"] for group in groups] == ["labels", "within"]


def test_what_stands_out(root: Path, found: Statistics) -> None:
    grey = {path: (pixels(file) @ [0.299, 0.587, 0.114]).mean() for path, file in readable(root).items()}
    darkest = sorted(grey, key=lambda path: grey[path])[:4]
    assert {image["path"] for image in found.darkest[:4]} == {*darkest}
    for image in found.darkest:
        assert image["value"] == pytest.approx(grey[image["path"]], rel=1e-5)
    assert {image["path"] for image in found.oddest[:3]} <= {f"train/red/{k}.png" for k in range(10, 14)}
    assert {image["why"] for image in found.oddest[:3]} <= {"narrower", "more bytes a pixel"}
    assert [image["value"] for image in found.oddest] == sorted((i["value"] for i in found.oddest), reverse=True)
    assert [image["label"] for image in found.examples] == ["blue"] * 4 + ["green"] * 5 + ["red"] * 6


def test_the_files_are_left_as_they_are(root: Path, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in root.rglob("*")}

    before = state()
    stats(root, tmp_path / "stats")
    assert state() == before


# ---------------------------------------------------------------------------------------------------------- advice


def advice_of(tmp_path: Path, counts: dict[str, int]) -> str:
    number = 0
    for place, n in counts.items():
        for _ in range(n):
            number += 1
            write_photo(tmp_path / "photos" / place / f"{number}.jpg", (90, 90, 90), number, (8, 8))
    return " ".join(stats(tmp_path / "photos").advice)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (
            {"a": 12, "b": 12},
            (
                "50.0% of 24 images (a)",
                "Each class has 12 training images: classes are of one size, plain accuracy is a fair measure",
                "There are no splits",
            ),
        ),
        ({"a": 36, "b": 12}, ("75.0% of 48 images (a)", "3.0 times as many", "--class-weight balanced")),
        ({"a": 18, "b": 12}, ("a little uneven, 1.5 to 1", "18 of a, 12 of b")),
        ({"train/a": 12, "train/b": 11, "val/a": 1}, ("100.0% of 1 image of val (a)", "Not in val: b")),
        ({"train/a": 12, "val/a": 1, "val/c": 2}, ("66.7% of 3 images of val (c)", "In no training image: c")),
        ({"train/a": 3, "train/b": 12, "test/a": 1, "test/b": 1}, ("Fewer than 10 training images: a (3)",)),
        ({"a": 3}, ("All labelled images are a",)),
        ({"": 3}, ("No image has a label",)),
    ],
)
def test_advice_has_its_figures(tmp_path: Path, counts: dict[str, int], says: tuple[str, ...]) -> None:
    text = advice_of(tmp_path, counts)
    for words in says:
        assert words in text


def test_advice_about_files(found: Statistics) -> None:
    text = " ".join(found.advice)
    for words in (
        "One picture lies under two labels",
        "1 image of val or test is a copy",
        "2 images repeat another",
        "3 images cannot be read",
        "Without a single readable image: nothing",
    ):
        assert words in text


# ------------------------------------------------------------------------------------------- text, JSON, folder, page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Names that break things, as folders and files; every picture is a copy of another."""
    root = tmp_path_factory.mktemp("hostile")
    data = write_photo(root / "photo.jpg", (90, 90, 90), 1).read_bytes()
    for number, name in enumerate(HOSTILE):
        name = name.replace("/", "∕").replace("\0", "")[:80]
        for split in ("train", "val"):
            folder = os.fsencode(root) + b"/photos/" + split.encode() + b"/" + os.fsencode(name)
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - of any bytes
            for k in range(2):
                with open(folder + b"/" + os.fsencode(name) + b"%d.jpg" % k, "wb") as file:  # noqa: PTH123
                    file.write(data if k else data[: 200 + number])
    return stats(root / "photos")


def test_text_fits_a_terminal_whatever_the_names(hostile: Statistics, found: Statistics) -> None:
    for each in (hostile, found):
        lines = each.lines()
        assert all(line.isprintable() for line in lines)
        assert max(map(columns, lines)) <= 80
    assert "train  val  all" in "\n".join(found.lines())


def test_text_of_many_classes_is_short(tmp_path: Path) -> None:
    for k in range(60):
        write_photo(tmp_path / f"class {k}" / "a.jpg", (90, 90, 90), k, (9, 9))
    lines = stats(tmp_path).lines()
    assert any("36 classes between" in line for line in lines)
    assert len(lines) < 80


def test_a_page_of_hostile_names_is_text(hostile: Statistics) -> None:
    from test_page import Reader

    html = hostile.page()
    html.encode()
    page = Reader(html)
    assert not {"\u202e", "\x1b", "\x00", "\u2028", "\r"} & set(html)
    assert len(page.of("script")) == 2
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert tag not in ("iframe", "link", "object", "base")
        assert (attributes.get("src") or "data:image/webp;base64,").startswith("data:image/webp;base64,")


def test_names_in_advice_do_not_turn_what_stands_beside_them(tmp_path: Path) -> None:
    """Without <bdi> a reader sees 3 as the count of the first name."""
    for number, name in enumerate(("שלום/1.jpg", "שלום/2.jpg", "b/1.jpg")):
        write_photo(tmp_path / "s" / name, (200, 0, 0), number)
    assert "2 of <bdi>שלום</bdi>, 1 of b" in stats(tmp_path / "s").page()


def test_the_numbers_of_the_page_are_those_found(found: Statistics) -> None:
    from test_page import Reader

    page = Reader(found.page())
    text = " ".join(page.text.split())
    for sentence in found.advice:
        assert sentence in text
    for image in found.unreadable:
        assert image["reason"] in text
    data = json.loads(text.split('{"cards":', 1)[1].join(['{"cards":', ""]).split("}}")[0] + "}}")["cards"]
    shown = {image["path"] for part in (found.darkest, found.blurriest, found.oddest, found.examples) for image in part}
    copies = {image["path"] for group in found.copies["groups"] for image in group["images"]}
    assert {*data["path"]} == shown | copies
    assert len(data["path"]) == len({*data["path"]})


def test_a_folder_with_page_and_numbers(root: Path, tmp_path: Path, run: Run) -> None:
    code, out, _ = run("stats", root, "-o", tmp_path / "stats", "--json")
    assert code == 0
    printed = json.loads(out.splitlines()[-1], parse_constant=pytest.fail)  # NaN is no JSON
    written = json.loads((tmp_path / "stats/stats.json").read_text())
    assert written == {"kind": "stats", **printed}
    assert printed["output"] == str(tmp_path / "stats")
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == ["stats.html", "stats.json"]
    assert '<meta name="generator" content="featcache">' in (tmp_path / "stats/stats.html").read_text()
    code, out, _ = run("stats", root, "-o", tmp_path / "stats")  # again
    assert code == 0
    assert out.splitlines() == stats(root).lines()


def test_figures_are_the_charts_of_the_page(root: Path, tmp_path: Path, run: Run) -> None:
    for _ in range(2):  # of an earlier run are replaced
        assert run("stats", root, "--figures", tmp_path / "figures")[0] == 0
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == ["file-sizes.svg", "formats.svg", "shorter-edge.svg", "width-and-height.svg", "width-height.svg"]
    for name in files:
        assert ElementTree.parse(tmp_path / "figures" / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    (tmp_path / "figures/formats.svg").write_text("mine")
    code, _, err = run("stats", root, "--figures", tmp_path / "figures")
    assert (code, "is no figure" in err) == (1, True)
    (tmp_path / "file").touch()
    code, _, err = run("stats", root, "--figures", tmp_path / "file")
    assert (code, "give the name of a folder" in err) == (1, True)
    for figures in ("stats", "stats/figures"):  # -o replaces the folder as a whole
        code, _, err = run("stats", root, "-o", tmp_path / "stats", "--figures", tmp_path / figures)
        assert (code, "choose another folder" in err, (tmp_path / "stats").exists()) == (2, True, False)
    code, _, err = run("stats", root, "-o", tmp_path / "stats.html")
    assert (code, "leave out .html" in err, (tmp_path / "stats.html").exists()) == (1, True, False)
    code, _, err = run("stats", root, "--figures", root / "figures")
    assert (code, "counts as a class" in err, (root / "figures").exists()) == (1, True, False)


def test_a_moved_source_leaves_a_page_without_pictures(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=2)
    found = stats(photos)
    photos.rename(tmp_path / "moved")
    assert "cannot be read: No such file or directory" in found.page()


@pytest.mark.parametrize("what", ["others", "foreign numbers", "page alone", "file", "inside", "no parent", "link"])
def test_folders_that_must_not_be_written(tmp_path: Path, what: str, run: Run) -> None:
    photos = make_photos(tmp_path / "photos", each=1)
    folder = tmp_path / "stats"
    if what == "others":
        write_photo(folder / "holiday.jpg", (1, 2, 3), 0)
    elif what == "foreign numbers":
        folder.mkdir()
        (folder / "stats.json").write_text('{"mine": 1}')
    elif what == "page alone":
        folder.mkdir()
        (folder / "stats.html").write_text("mine")
    elif what == "file":
        folder.write_text("mine")
    elif what == "inside":
        folder = photos / "stats"
    elif what == "no parent":
        folder = tmp_path / "no" / "stats"
    elif what == "link":
        (tmp_path / "others").mkdir()
        (tmp_path / "others/mine").touch()
        folder.symlink_to("others")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(StorageError):
        check_folder(folder, list_images(photos))
    code, out, err = run("stats", photos, "-o", folder)
    assert (code, out) == (1, "")
    assert err.startswith("error: cannot write")
    assert "images" not in err  # nothing was listed before
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_other_sources(root: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        "path,label,split",
        *(f"{path},{path.split('/')[1]},{path.split('/')[0]}" for path in sorted(readable(root))),
    ]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    code, out, _ = run("stats", tmp_path / "table.csv", "--root", root, "--json")
    from_table, from_folder = json.loads(out.splitlines()[-1]), stats(root)
    assert code == 0
    for name in ("sizes", "bytes", "formats", "splits", "readable"):
        assert from_table[name] == getattr(from_folder, name)
    assert {key: value for key, value in from_folder.classes.items() if key != "nothing"} == from_table["classes"]
    flat = stats(root / "train" / "blue")
    assert (flat.classes, flat.constant, flat.unlabelled) == ({}, None, {"none": 4})
    assert stats(list_images(root)).classes == from_folder.classes


def test_wrong_use(root: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [({"workers": 0}, "workers")]
    wrong += [({"sample": n}, "sample must be a whole number, at least 0") for n in (-1, 1.5, "3")]
    wrong += [({"seed": n}, "seed must be a whole number, at least 0") for n in (-1, 1.5, None)]
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            stats(root, **options)
    with pytest.raises(SourceError, match="does not exist"):
        stats(tmp_path / "gone")
    (tmp_path / "f.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(SourceError, match="is a cache, expected a folder"):
        stats(tmp_path / "f.h5")


def test_all_unreadable(tmp_path: Path) -> None:
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "photos/a/1.jpg").touch()
    found = stats(tmp_path / "photos", tmp_path / "stats")
    assert (found.images, found.readable, found.width, found.constant) == (1, 0, None, None)
    assert "1 image cannot be read" in " ".join(found.advice)
    assert "empty file" in (tmp_path / "stats/stats.html").read_text()
    assert any("unreadable" in line for line in found.lines())
    assert not any("No image has a label" in line for line in found.lines())


def test_the_public_function() -> None:
    assert featcache.stats is stats
    fields: Any = Statistics.__dataclass_fields__
    described = Statistics.__doc__ or ""
    assert [name for name in fields if f"{name}" not in described] == []
