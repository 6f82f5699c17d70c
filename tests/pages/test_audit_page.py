"""The page of an audit in a real browser: decisions by keyboard, undone, kept over a reload, saved and loaded as a plan."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import pytest
from audits import COPIES, REASONS, make_audit
from browser import WINDOWS, frame_of, opened, serious_findings
from kitchen import HOSTILE

from featcache.curation.audit import Found
from featcache.curation.finding import Finding
from featcache.curation.plan import apply_plan
from featcache.reports.audit.page import audit_page
from featcache.reports.elements.page import publish_page
from featcache.reports.notebook import framed

pytestmark = pytest.mark.slow


def written(folder: Path, found: Found, **options: Any) -> Path:
    publish_page(folder / "audit.html", audit_page(found, **options))
    return folder / "audit.html"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    folder = tmp_path_factory.mktemp("audit")
    found = make_audit(folder)
    return written(folder, found), found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    folder = tmp_path_factory.mktemp("hostile")
    names = (*HOSTILE[:11], "=cmd()", '\'=a, "b"', os.fsdecode(b"caf\xe9 \xff\xfe.jpg"))
    found = make_audit(folder, classes=tuple(HOSTILE), names=names)
    return written(folder, found), found


def look(page: Any) -> None:
    """Keys decide on what is in sight only."""
    page.evaluate("document.querySelector('[data-audit]').scrollIntoView({behavior: 'instant'})")


def heard(page: Any) -> str:
    return str(page.locator(".heard output").inner_text())


def told(page: Any, words: str) -> None:
    page.locator("[data-saved]").filter(has_text=words).wait_for()


def saved(page: Any) -> list[dict[str, str]]:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save plan.csv").click()
    text = Path(download.value.path()).read_bytes().decode("utf-8", "surrogateescape")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def decisions(page: Any) -> dict[str, tuple[str, str]]:
    return {line["path"]: (line["decision"], line["label"]) for line in saved(page) if line["decision"]}


@WINDOWS
def test_nobody_is_shut_out(browser: Any, hostile: tuple[Path, Found], width: int, scheme: str) -> None:
    with opened(browser, hostile[0], width=width, scheme=scheme) as page:
        look(page)
        assert serious_findings(page) == []
        for key in "dr?":  # copies decided, then a label suspect, keys unfolded
            page.keyboard.press(key)
        assert serious_findings(page) == []
        assert page.title().startswith("Audit of features.h5")


def test_decide_undo_reload_save_load(browser: Any, made: tuple[Path, Found], tmp_path: Path) -> None:
    path, found = made
    paths, classes, y = found.cache.paths, found.cache.classes, found.cache.y
    suspects = [finding.row for finding in found.findings["label"]]
    with opened(browser, path) as page:
        page.keyboard.press("d")  # the pictures are not in sight: nothing is decided, they come into sight
        assert "0 of 32 decided" in page.locator("[data-going]").inner_text()
        page.keyboard.press("d")
        assert heard(page) == "One kept, 1 dropped. Next: 4 near copies."
        for key in "2rkd":
            page.keyboard.press(key)
        page.keyboard.press("c")
        page.keyboard.type(classes[0])
        page.keyboard.press("Enter")
        assert "6 of 32 decided" in page.locator("[data-going]").inner_text()
        page.keyboard.press("u")
        page.keyboard.press("u")
        assert heard(page).startswith("Undone: ")
        assert page.locator("[aria-selected=true] .mark").inner_text() == ""
        page.reload()
        look(page)
        assert "4 of 32 decided" in page.locator("[data-going]").inner_text()
        expected = {paths[row]: ("keep" if row == 3 else "drop", classes[y[row]]) for row in COPIES[0]}
        expected |= {
            paths[row]: ("keep" if row == COPIES[1][1] else "drop", classes[y[row]]) for row in sorted(COPIES[1])
        }
        # Copies are listed by row, so that key 2 means the second of these.
        second = sorted(COPIES[1])[1]
        expected |= {paths[row]: ("keep" if row == second else "drop", classes[y[row]]) for row in COPIES[1]}
        expected[paths[suspects[0]]] = ("relabel", classes[found.findings["label"][0].suggested or 0])
        expected[paths[suspects[1]]] = ("keep", classes[y[suspects[1]]])
        assert decisions(page) == expected
        lines = saved(page)
        assert [line["path"] for line in lines] == list(paths)
        assert [line["sha256"] for line in lines] == [bytes(digest).hex() for digest in found.cache.rows.digests]
        assert [line["given"] for line in lines] == [classes[k] for k in y]
        assert lines[1]["found"] == "near_copy" and lines[1]["split"] == "val"
        plan = tmp_path / "plan.csv"
        edited = [
            line | {"decision": "drop"} if line["path"] == paths[59] else line for line in lines
        ]  # no case on the page
        with plan.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(edited)
    applied = apply_plan(plan, tmp_path / "clean.csv", root=path.parent)
    assert (applied.images, applied.dropped, applied.relabelled) == (60 - 5, 5, 1)
    with (tmp_path / "clean.csv").open(encoding="utf-8", newline="") as file:
        table = {line["path"]: line["label"] for line in csv.DictReader(file)}
    gone = {name for name, (decision, _) in expected.items() if decision == "drop"} | {paths[59]}
    assert table == {
        name: expected.get(name, ("", classes[k]))[1] for name, k in zip(paths, y, strict=True) if name not in gone
    }
    with opened(browser, path) as page:  # another browser, which remembers nothing
        assert "0 of 32 decided" in page.locator("[data-going]").inner_text()
        page.locator("[data-load]").set_input_files(plan)
        told(page, "8 decisions taken over. 1 decision about images that have no case here will be saved, too.")
        assert "4 of 32 decided" in page.locator("[data-going]").inner_text()
        assert decisions(page) == expected | {paths[59]: ("drop", classes[y[59]])}


def test_names_come_back_from_the_plan(browser: Any, hostile: tuple[Path, Found], tmp_path: Path) -> None:
    path, found = hostile
    escaped = [f"'{name}" if name.startswith(("=", "'=", "\t")) else name for name in found.cache.paths]
    with opened(browser, path) as page:
        look(page)
        for key in "ddrrk":
            page.keyboard.press(key)
        lines = saved(page)
        assert [line["path"] for line in lines] == escaped
        assert {line["given"].removeprefix("'") for line in lines} == {
            name.removeprefix("'") for name in found.cache.classes
        }
        before = decisions(page)
        plan = tmp_path / "plan.csv"
        with page.expect_download() as download:
            page.get_by_role("button", name="Save plan.csv").click()
        plan.write_bytes(Path(download.value.path()).read_bytes())
    with opened(browser, path) as page:
        page.locator("[data-load]").set_input_files(plan)
        told(page, "taken over")
        assert decisions(page) == before
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        page.locator("[data-load]").set_input_files(tmp_path / "other.csv")
        told(page, "other.csv is no plan")
        text = "decision;label;path;sha256\nDrop;x;nowhere.jpg;00\n"  # as a spreadsheet saves it
        for decision, line in (("burn", lines[20]), ("relabel", lines[40])):
            text += f"{decision};x;{line['path']};{line['sha256']}\n"
        (tmp_path / "odd.csv").write_text(text)
        page.locator("[data-load]").set_input_files(tmp_path / "odd.csv")
        told(
            page,
            "odd.csv: 0 decisions taken over. 1 line left out: their images are not in this cache, or have changed. 2 lines",
        )


def test_mouse_filters_and_bulk(browser: Any, made: tuple[Path, Found]) -> None:
    with opened(browser, made[0]) as page:
        page.get_by_role("link", name="5 label suspects").click()
        look(page)
        assert page.locator("[data-shown]").inner_text() == "Showing 5 of 32, 5 open"
        page.get_by_role("button", name="Relabel as suggested").click()
        assert "5 of 32 decided" in page.locator("[data-going]").inner_text()
        page.select_option("select[name=state]", "open")
        assert page.locator(".case").inner_text().startswith("None")
        page.select_option("select[name=kind]", "")
        page.select_option("select[name=crossing]", "split")
        assert page.locator(".queue b").all_inner_texts() == ["4 near copies"]
        page.get_by_role("button", name="Drop 1.jpg").click()
        page.get_by_role("button", name="Keep 2.jpg").click()
        assert page.evaluate("document.activeElement.innerText").startswith("Keep")
        assert page.locator(".case .mark").inner_text() == "2 of 4 decided"
        got = decisions(page)
        assert got["val/1.jpg"][0] == "drop" and got["test/2.jpg"][0] == "keep" and len(got) == 7
        look(page)
        for _ in range(3):
            page.get_by_role("button", name="Undo").click()
        assert decisions(page) == {}


def test_two_thousand(browser: Any, tmp_path: Path) -> None:
    path = written(tmp_path, make_audit(tmp_path, images=2010, findings=2000))
    assert path.stat().st_size < 16_000_000
    with opened(browser, path) as page:
        look(page)
        count = "document.getElementsByTagName('*').length"
        seen, most = set(), 0
        for place in range(0, 2002 * 60, 12_000):
            page.evaluate(f"document.querySelector('.queue').scrollTop = {place}")
            page.wait_for_timeout(50)
            rows = page.evaluate(
                "[...document.querySelectorAll('[role=option]')].map((row) => Number(row.ariaPosInSet))"
            )
            assert len(rows) < 40 and place // 60 + 1 in rows
            seen |= set(rows)
            most = max(most, page.evaluate(count))
        assert most < 900 and len(seen) > 150
        page.locator(".queue").focus()
        page.keyboard.press("End")
        assert page.locator("[aria-selected=true]").get_attribute("aria-posinset") == "2002"
        page.keyboard.press("Home")
        press = """(key) => { const start = performance.now(); document.body.dispatchEvent(new KeyboardEvent('keydown',
            {key, bubbles: true})); document.body.offsetHeight; return performance.now() - start; }"""
        for key in "kdnpu":  # in a frame, when nothing else keeps the machine busy
            assert min(page.evaluate(press, key) for _ in range(12)) < 16


def test_two_tabs_decide_as_one(browser: Any, made: tuple[Path, Found]) -> None:
    """What is decided or undone in one is so in the other, which else would overwrite it."""
    with opened(browser, made[0]) as page:
        other = page.context.new_page()
        other.goto(page.url)
        for done, tab, keys in ((1, page, "d"), (2, other, "nd"), (3, page, "nd"), (2, other, "u")):
            look(tab)
            for key in keys:
                tab.keyboard.press(key)
            for each in (page, other):
                each.locator("[data-going]").filter(has_text=f"{done} of 32 decided").wait_for(timeout=3000)
        assert heard(page).startswith("Decided in another tab, and taken over: 2 steps")
        other.close()


def test_without_script_it_is_a_list(browser: Any, made: tuple[Path, Found]) -> None:
    with opened(browser, made[0], script=False) as page:
        assert page.locator(".still > li").count() == 32
        assert page.locator("[data-audit]").is_hidden()
        first = page.locator(".still > li").first.inner_text()
        assert "exact copies: 2 files hold the same bytes" in first and "proposed to keep" in first
        assert page.locator(".still img").count() >= 20


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"findings": 0}, "Nothing stands out among the 60 images."),
        ({"classes": ()}, "the images have no labels"),
        ({"images": 7, "findings": 1, "classes": ("only",)}, "7 images of 7 are worth a look"),
        ({"files": 0}, "There are no pictures here"),
    ],
)
def test_whatever_was_found(browser: Any, tmp_path: Path, options: Any, says: str) -> None:
    if options.pop("files", None) is not None:
        found = make_audit(tmp_path)
        for picture in tmp_path.rglob("*.jpg"):
            picture.unlink()
    else:
        found = make_audit(tmp_path, **options)
    with opened(browser, written(tmp_path, found)) as page:
        assert says in page.locator("body").inner_text()
        assert "classes" not in options or serious_findings(page) == []
        if options.get("findings") != 0:
            look(page)
            for key in "dkru":
                page.keyboard.press(key)
            assert page.locator(".case h3").count() == 1


def test_in_a_notebook_nothing_is_kept_and_that_is_said(browser: Any, made: tuple[Path, Found], tmp_path: Path) -> None:
    host = tmp_path / "notebook.html"
    host.write_text(f"<!doctype html><title>Notebook</title><h1>A cell</h1>{framed(made[0].read_text())}")
    with opened(browser, host) as page:
        page.locator("iframe").scroll_into_view_if_needed()
        frame = frame_of(page)
        assert "keeps nothing here" in frame.locator(".heard output").inner_text()
        frame.locator(".queue").focus()
        page.keyboard.press("d")
        page.keyboard.press("d")
        assert frame.locator("[data-going]").inner_text() == "2 of 32 decided"
        with page.expect_download() as download:
            frame.get_by_role("button", name="Save plan.csv").click()
        assert Path(download.value.path()).read_text().count(",drop,") == 1 + 3


def test_on_paper_it_is_a_list(browser: Any, made: tuple[Path, Found]) -> None:
    with opened(browser, made[0]) as page:
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator(".still > li").count() == 32 and page.locator("[data-audit]").is_hidden()
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        page.emulate_media(media="screen")
        assert page.locator(".still").count() == 0 and page.locator("[data-audit]").is_visible()


def test_what_is_dropped_in_one_case_is_settled_in_all(browser: Any, tmp_path: Path) -> None:
    found = make_audit(tmp_path, images=20, findings=3)
    found.findings["tiny"].append(Finding("tiny", 4, 0.5, REASONS["tiny"]))
    with opened(browser, written(tmp_path, found)) as page:
        look(page)
        page.get_by_role("link", name="1 tiny").click()
        page.keyboard.press("k")
        assert decisions(page) == {"val/4.jpg": ("keep", "ants")}
        page.get_by_role("button", name="Undo").click()
        page.get_by_role("link", name="4 near copies").click()
        page.keyboard.press("1")
        assert "2 of 6 decided" in page.locator("[data-going]").inner_text()  # the copies, and the tiny one among them
        page.get_by_role("link", name="1 tiny").click()
        assert "among 4 near copies, dropped there" in page.locator(".case").inner_text()
        page.keyboard.press("k")
        assert decisions(page)["val/4.jpg"] == ("drop", "ants")
        for _ in range(2):
            page.get_by_role("button", name="Undo").click()
        page.get_by_role("link", name="4 near copies").click()
        page.keyboard.press("k")
        page.get_by_role("link", name="1 tiny").click()
        page.keyboard.press("d")
        assert decisions(page)["val/4.jpg"] == ("drop", "ants") and decisions(page)["val/1.jpg"] == ("keep", "bees")
