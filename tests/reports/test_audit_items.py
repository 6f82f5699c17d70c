"""What is decided at once on the page of an audit: groups of copies, single images, which copy stays, what fits in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audits import make_audit
from caches import plain_rows

from featcache.curation.audit import Found
from featcache.curation.finding import KINDS, Finding
from featcache.reports.audit.columns import Shown, columns, gather
from featcache.reports.audit.items import answers, items_of, proposed
from featcache.reports.audit.page import audit_page
from featcache.reports.elements.thumbnails import Thumbnail


def found_with(findings: list[Finding]) -> Found:
    by_kind = {kind: [finding for finding in findings if finding.kind == kind] for kind in KINDS}
    return Found(cache=None, findings=by_kind)  # type: ignore[arg-type]


def test_copies_that_share_an_image_are_one_case() -> None:
    exact = [Finding("exact_copy", row, 0.4, "e", group=row // 2) for row in range(4)]
    near = [Finding("near_copy", row, 0.9, "n", group=5) for row in (1, 7)]
    others = [Finding("near_copy", row, 0.8, "n", group=6) for row in (8, 9)]
    single = [Finding("label", 1, 0.3, "l", suggested=2), Finding("dark", 1, 0.99, "d"), Finding("dark", 4, 0.5, "d")]
    items = items_of(found_with([*exact, *near, *others, *single]), most=10)
    assert [item.rows for item in items] == [(0, 1, 7), (2, 3), (8, 9), (1,), (4,)]
    assert [item.kinds for item in items][:1] == [["exact_copy", "near_copy"]]
    assert items[3].kinds == ["label", "dark"] and items[3].score == 0.99 and items[3].suggested == 2
    assert items[3].reasons == ["l", "d"]


def test_of_too_many_the_first_of_each_kind_stay() -> None:
    found = found_with(
        [Finding(kind, 1000 * k + n, 1 - n / 500, "") for k, kind in enumerate(KINDS[2:]) for n in range(500)]
    )
    items = items_of(found, most=70)
    assert [(item.kinds[0], item.rows[0] % 1000) for item in items] == [
        (kind, n) for kind in KINDS[2:] for n in range(10)
    ]
    assert len(items_of(found_with([Finding("near_copy", row, 1, "", group=0) for row in range(50_000)]), most=9)) == 1


@pytest.mark.parametrize(
    ("splits", "labels", "pixels", "sizes", "kept"),
    [
        ([1, 3, 2], [0, 1, 1], [900, 10, 20], [9, 1, 1], 1),  # test, whatever else
        ([1, 2, 1], [0, 1, 0], [900, 10, 20], [9, 1, 1], 1),  # val
        ([1, 1, 1], [0, 1, 1], [900, 10, 20], [9, 1, 1], 2),  # the label of most, then pixels
        ([0, 0, 0], [-1, -1, -1], [20, 20, 20], [5, 9, 1], 1),  # bytes
        ([0, 0, 0], [-1, -1, -1], [0, 0, 0], [5, 5, 5], 0),  # the first
    ],
)
def test_which_copy_stays(splits: Any, labels: Any, pixels: list[int], sizes: Any, kept: int) -> None:
    columns = {"splits": np.array(splits, np.uint8), "labels": np.array(labels, np.int32), "sizes": np.array(sizes)}
    assert proposed(plain_rows("abc", **columns), [0, 1, 2], pixels) == kept


@pytest.mark.parametrize(
    ("size", "count", "facts"),
    [((0, 0), 0, ""), ((0, 0), 2000, "2 kB"), ((40, 30), 0, "40 × 30 px"), ((40, 30), 2000, "40 × 30 px, 2 kB")],
)
def test_facts_that_are_not_known_are_left_out(size: tuple[int, int], count: int, facts: str) -> None:
    """As of vectors that were imported: no file's size is known, and none is 0 bytes."""
    assert Shown(0, "a.jpg", None, "", count, size, Thumbnail(None, ""), -1).facts == facts


def test_pictures_come_once_and_only_of_what_was_embedded(tmp_path: Path) -> None:
    found = make_audit(tmp_path, images=40, findings=20, files=24)
    (tmp_path / "train/6.jpg").write_bytes((tmp_path / "train/9.jpg").read_bytes())  # changed since
    items = items_of(found, most=100)
    material = gather(found, items, budget=10**7)
    assert len(set(material.uris)) == len(material.uris) == 22  # 24, of which two are copies and one is gone
    assert material.images[6].number == -1 and material.missing == 2  # 30 holds the same bytes
    data = columns(material, KINDS, still=3)
    assert json.loads(json.dumps(data)) and len(data["images"]["path"]) == len(found.cache)
    shown = {number for item in items[3:] for row in item.rows if (number := material.images[row].number) >= 0}
    assert all(
        data["pictures"][number]
        for number in shown
        if number not in {material.images[r].number for i in items[:3] for r in i.rows}
    )
    small = gather(found, items, budget=6000)
    assert sum(map(len, small.uris)) < 6000 * 1.2 and small.left_out


def test_answers_hold_the_given_label(tmp_path: Path) -> None:
    found = make_audit(tmp_path, classes=tuple("abcdefgh"), images=40)
    item = next(item for item in items_of(found, most=100) if "label" in item.kinds)
    given = int(found.cache.y[item.rows[0]])
    assert len(answers(found, item)) == 4 and given in dict(answers(found, item))
    assert answers(found, item)[0] == (item.suggested, 0.9)


def test_a_fingerprint_belongs_to_what_is_asked(tmp_path: Path) -> None:
    found = make_audit(tmp_path)
    items = items_of(found, most=100)
    marks = {
        columns(gather(found, some, budget=0), KINDS, still=0)["fingerprint"] for some in (items, items, items[1:])
    }
    assert len(marks) == 2


def test_a_cache_too_large_for_a_whole_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_audit(tmp_path, images=60, findings=3)
    material = gather(found, items_of(found, most=100), budget=0)
    data = columns(material, KINDS, still=0, listed=59)
    assert not data["whole"] and len(data["images"]["path"]) == len(material.images) < 60
    assert "beside this page" in audit_page(found, listed=59) and "beside this page" not in audit_page(found)
