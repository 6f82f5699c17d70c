"""Plans: what is written, what is read back, all that can be wrong with one, and the table that follows."""

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import plain_rows
from conftest import SPEC, make_photos

from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.curation.finding import Finding
from featcache.curation.plan import COLUMNS, apply_plan, plan_lines, read_plan
from featcache.errors import FeatcacheError, SourceError, UsageError
from featcache.images.source import Source, list_images

Edit = Callable[[list[dict[str, str]]], Any]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Of 12 photos in train and val, beside their folder photos."""
    photos = list_images(make_photos(tmp_path / "photos", each=2, splits=("train", "val")))
    digests = b"".join(hashlib.sha256((photos.root / path).read_bytes()).digest() for path in photos.paths)
    columns = {
        "labels": photos.labels,
        "splits": photos.splits,
        "digests": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }
    rows = plain_rows(photos.paths, **columns)
    write_cache(tmp_path / "f.h5", rows, [np.ones((12, 2), np.float16)], dim=2, spec=SPEC, classes=photos.classes)
    findings = [
        Finding("label", 1, 0.9, "", suggested=2),
        Finding("exact_copy", 1, 0.4, ""),
        Finding("dark", 3, 0.4, ""),
    ]
    (tmp_path / "audit").mkdir()
    path = tmp_path / "audit" / "plan.csv"
    path.write_bytes(b"".join(plan_lines(FeatureCache.open(tmp_path / "f.h5"), findings)))
    return path


def edited(plan: Path, edit: Edit, **how: Any) -> Path:
    with plan.open(newline="") as file:
        rows = list(csv.DictReader(file))
    edit(rows)
    with plan.open("w", newline="", **how) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";" if how else ",")
        writer.writeheader()
        writer.writerows(rows)
    return plan


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_plan_lists_every_image_with_what_was_found(plan: Path) -> None:
    rows = table(plan)
    assert tuple(rows[0]) == COLUMNS
    assert COLUMNS[:4] == ("path", "sha256", "decision", "label")  # the contract
    photos = plan.parents[1] / "photos"
    for row in rows:
        assert hashlib.sha256((photos / row["path"]).read_bytes()).hexdigest() == row["sha256"]
        split, label, _ = row["path"].split("/")
        assert (row["split"], row["label"], row["given"], row["decision"]) == (split, label, label, "")
    assert [row["found"] for row in rows[:4]] == ["", "exact_copy;label", "", "dark"]


def test_without_decisions_everything_is_kept(plan: Path, tmp_path: Path) -> None:
    found = apply_plan(plan, tmp_path / "clean.csv")
    assert found.root is not None and found.root.resolve() == (tmp_path / "photos").resolve()
    before = list_images(tmp_path / "photos")
    after = list_images(Source(tmp_path / "clean.csv", root=tmp_path / "photos"))
    assert (before.paths, before.classes) == (after.paths, after.classes)
    assert before.labels.tolist() == after.labels.tolist() and before.splits.tolist() == after.splits.tolist()
    assert (found.images, found.kept, found.dropped, found.relabelled) == (12, 12, 0, 0)
    assert found.splits == {"train": 6, "val": 6}


@pytest.mark.parametrize("how", [{}, {"encoding": "utf-16"}, {"encoding": "utf-8-sig"}], ids=str)
def test_decisions_become_a_table(plan: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    """Also as spreadsheets save it: semicolons, other encodings, capitals."""

    def edit(rows: list[dict[str, str]]) -> None:
        rows[0]["decision"], rows[1]["decision"] = "drop", " Keep "
        rows[2] |= {"decision": "RELABEL", "label": "red", "sha256": rows[2]["sha256"].upper()}

    found = apply_plan(edited(plan, edit, **how), tmp_path / "clean.csv")
    rows = table(tmp_path / "clean.csv")
    assert list(rows[0]) == ["path", "label", "split"]
    assert [row["label"] for row in rows] == [
        "blue",
        "red",
        "green",
        "red",
        "red",
        "blue",
        "blue",
        "green",
        "green",
        "red",
        "red",
    ]
    assert (found.images, found.kept, found.dropped, found.relabelled) == (11, 10, 1, 1)
    assert found.classes == {"blue": 3, "green": 3, "red": 5}


def test_all_that_is_wrong_is_said_at_once_and_nothing_written(plan: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "train/blue/01.jpg").write_bytes(b"another")

    def edit(rows: list[dict[str, str]]) -> None:
        rows[0]["decision"] = "dorp"
        rows[2] |= {"decision": "relabel", "label": ""}
        rows[3] |= {"decision": "relabel", "label": "rde"}
        rows[4] |= {"decision": "relabel"}
        rows[5]["label"] = "blue"
        rows[6]["path"] = "val/blue/0000.jpg"
        rows[7]["path"] = rows[8]["path"]
        rows[9]["sha256"] = "12"
        rows[10]["path"] = "../audit/plan.csv"
        rows[11]["split"] = "trian"
        rows.append(dict(rows[0], path=""))

    with pytest.raises(SourceError) as error:
        apply_plan(edited(plan, edit), tmp_path / "clean.csv", root=photos)
    problems = error.value.facts["problems"]
    expected = [
        "line 2: the decision 'dorp' is unknown (did you mean drop?)",
        "line 3: train/blue/01.jpg is another file by now: its sha256 begins with",
        "line 4: relabel needs another label than the given 'green'",
        "line 5: the label 'rde' is no class of the plan (did you mean red?)",
        "line 6: relabel needs another label than the given 'red'",
        "line 7: the label 'blue' is not the given 'red'; to change it the decision is relabel",
        "line 8: val/blue/0000.jpg is not there, below",
        "line 9: val/green/00.jpg is another file by now",
        "line 10: val/green/00.jpg is there twice, first in line 9",
        "line 11: '12' is no sha256; expected 64 hexadecimal digits",
        "line 12: ../audit/plan.csv lies outside of",
        "line 13: the split 'trian' is unknown; expected train, val, test or nothing",
        "line 14: the decision 'dorp' is unknown",
        "line 14: it has no path",
    ]
    assert len(problems) == len(expected), problems
    for problem, start in zip(sorted(problems), sorted(expected), strict=True):
        assert problem.startswith(start)
    assert "has 14 problems, and nothing is written: line 2: " in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "clean.csv").exists()


def test_a_plan_of_four_columns_will_do(plan: Path, tmp_path: Path) -> None:
    """The contract's. Splits are then those of the folders; a label is known if another image has it."""

    def edit(rows: list[dict[str, str]]) -> None:
        for row in rows:
            for name in COLUMNS[4:]:
                del row[name]
        rows[0] |= {"decision": "relabel", "label": "red"}

    found = apply_plan(edited(plan, edit), tmp_path / "clean.csv")
    assert found.splits == {"train": 6, "val": 6}
    assert found.classes == {"blue": 3, "green": 4, "red": 5}
    edited(plan, lambda rows: rows[0].update(label="purple"))
    with pytest.raises(SourceError, match="'purple' is no class of the plan"):
        apply_plan(plan, tmp_path / "other.csv")


def test_where_the_images_are_gone_that_is_said(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").rename(tmp_path / "kept")
    assert apply_plan(plan, tmp_path / "a.csv").root == tmp_path / "kept"  # found beside the plan's folder
    moved = tmp_path / "elsewhere" / "deep" / "photos"
    moved.parent.mkdir(parents=True)
    (tmp_path / "kept").rename(moved)
    assert apply_plan(plan, tmp_path / "b.csv").root is None
    assert apply_plan(plan, tmp_path / "c.csv", root=moved).root == moved
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes() == (tmp_path / "c.csv").read_bytes()
    with pytest.raises(SourceError, match="is no folder"):
        apply_plan(plan, tmp_path / "d.csv", root=tmp_path / "photos")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("clean.txt", "name it .csv"),
        ("audit/plan.csv", "it is the plan|is the plan"),
        ("list.csv", "exists; choose another -o"),
    ],
)
def test_no_file_is_replaced_that_should_not_be(plan: Path, tmp_path: Path, output: str, words: str) -> None:
    (tmp_path / "list.csv").write_text("path,label\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    with pytest.raises(UsageError, match=words):
        apply_plan(plan, tmp_path / output)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    apply_plan(plan, tmp_path / "list.csv", overwrite=True)
    assert len(table(tmp_path / "list.csv")) == 12


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("path,label\na.jpg,b\n", "is no plan: it has no column sha256 and no column decision"),
        ("path,sha256,decision,label\n", "holds no image"),
        (f"path,sha256,decision,label\na.jpg,{'0' * 64},drop,b\n", "drops every image"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "plan.csv").write_text(content)
    with pytest.raises(FeatcacheError, match=words):
        apply_plan(tmp_path / "plan.csv", tmp_path / "clean.csv")


def test_names_that_break_things_survive(tmp_path: Path) -> None:
    """Not UTF-8, formulas, quotes and line ends: written, read back, written again, listed."""
    names = ["=cmd()|'.png", "'=a.png", 'q"uo,te.png', "\udcff.png", "zwei\nlines.png", "+1/-2.png"]
    photos = make_photos(tmp_path / "photos", each=1)
    content = (photos / "red" / "00.jpg").read_bytes()
    for name in names:
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(content)
    digests = np.tile(np.frombuffer(hashlib.sha256(content).digest(), np.uint8), (len(names), 1))
    labels = np.arange(len(names), dtype=np.int32) % 2
    rows = plain_rows(names, digests=digests, labels=labels)
    features = np.ones((len(names), 2), np.float16)
    write_cache(tmp_path / "f.h5", rows, [features], dim=2, spec=SPEC, classes=("-1", "=b"))
    plan = tmp_path / "plan.csv"
    plan.write_bytes(b"".join(plan_lines(FeatureCache.open(tmp_path / "f.h5"), [])))
    assert [line.path for line in read_plan(plan)] == names
    found = apply_plan(plan, tmp_path / "clean.csv", root=photos)
    assert found.classes == {"-1": 3, "=b": 3}
    listed = list_images(Source(tmp_path / "clean.csv", root=photos))
    assert (set(listed.paths), listed.classes, listed.refused) == ({*names}, ("-1", "=b"), ())


def test_classes_that_differ_in_blanks_alone_are_not_merged(plan: Path, tmp_path: Path) -> None:
    """A table has no blanks around labels: what a tool puts around all of them is nothing, between two classes it would be all."""

    def pad(rows: list[dict[str, str]], blank: Callable[[int], str]) -> None:
        for number, row in enumerate(rows):
            row["given"] = row["label"] = blank(number) + row["label"].strip()

    assert len(apply_plan(edited(plan, lambda rows: pad(rows, lambda _: " ")), tmp_path / "a.csv").classes) == 3
    edited(plan, lambda rows: pad(rows, lambda number: " " * (number == 1)))
    with pytest.raises(
        SourceError, match="differ in blanks around them alone, which do not count in a table; rename one"
    ):
        apply_plan(plan, tmp_path / "b.csv")
    assert not (tmp_path / "b.csv").exists()
