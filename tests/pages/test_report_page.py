"""The report of a model in a real browser: a cell of the matrix shows its images, by mouse and by keyboard; tables sort; classes zoom."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import WINDOWS, opened, serious_findings
from caches import plain_rows, save_head
from conftest import SPEC, TINY, make_photos
from kitchen import HOSTILE

from featcache.cache.format import Provenance
from featcache.cache.write import write_cache
from featcache.extraction.extract import extract
from featcache.heads.head import Head
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.reports.model_report.report import report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos.html``, of a model and another on photographs; ``many.html``, of hundreds of classes with hostile names."""
    place = tmp_path_factory.mktemp("report")
    extract(make_photos(place / "photos", each=10, splits=("train", "val")), place / "f.h5", TINY)
    fit_head(place / "f.h5", place / "m", C=1e-4)
    fit_head(place / "f.h5", place / "other", C=1e-6)
    pictures = place / "photos"
    report(place / "m", place / "f.h5", output=place / "photos.html", pictures=pictures, against=place / "other")
    n, classes, rng = 800, 400, np.random.default_rng(0)
    names = tuple(
        sorted({*(name.replace("\0", "") for name in HOSTILE), *(f"species {k:04d}" for k in range(classes))})[:classes]
    )
    y, centres = np.arange(n) % classes, rng.normal(0, 1, (classes, 16)).astype(np.float32)
    X = (centres[y] + rng.normal(0, 0.8, (n, 16))).astype(np.float16)
    rows = plain_rows((f"{names[k]}/{row}.jpg" for row, k in enumerate(y)), labels=y.astype(np.int32))
    write_cache(place / "many.h5", rows, [X], dim=16, spec=SPEC, classes=names, provenance=Provenance())
    layers = ((centres, -(centres**2).sum(1) / 2),)
    head = Head("linear", "none", np.zeros(16, np.float32), np.ones(16, np.float32), layers)
    save_head(place / "many", head, names, 0)
    report(place / "many", place / "many.h5", output=place / "many.html")
    return place


def result(page: Any) -> str:
    return str(page.locator("form.controls output").inner_text())


@WINDOWS
@pytest.mark.parametrize("name", ["photos", "many"])
def test_nobody_is_shut_out(browser: Any, folder: Path, name: str, width: int, scheme: str) -> None:
    with opened(browser, folder / f"{name}.html", width=width, scheme=scheme) as page:
        assert page.title() == f"Report on {'m' if name == 'photos' else 'many'}"
        if name == "many" and width == 1440:
            return  # axe-core takes a while for so many classes, of which it then sees those at both ends
        rows = "document.querySelectorAll('#classes tr:nth-child(n+30):nth-last-child(n+30)')"
        page.evaluate(f"{rows}.forEach((row) => row.remove())")
        assert serious_findings(page) == []
        page.locator("button[data-by=p]").click()
        assert serious_findings(page, "#confusion") == []


def test_a_cell_shows_its_images(browser: Any, folder: Path) -> None:
    confusion = evaluate(folder / "m", folder / "f.h5")["confusion"]
    with opened(browser, folder / "photos.html") as page:
        everything = result(page)
        cells = page.locator("table.matrix td button")
        for number in range(cells.count()):
            words = cells.nth(number).locator(".why").inner_text()
            count = int(cells.nth(number).locator(".k").inner_text())
            cells.nth(number).click()
            assert result(page) == f"Showing {count} of 30: {words}"
            assert page.locator(".cards .card").count() == count
            assert cells.nth(number).get_attribute("aria-pressed") == "true"
        assert sum(map(sum, confusion)) == 30
        cells.last.focus()
        page.keyboard.press("Enter")  # again: all
        assert result(page) == everything
        page.keyboard.press("Enter")
        assert result(page) != everything
        page.locator(".cards .pic").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("dialog .evidence img").count() == 3
        assert page.locator("dialog .likeliest li").count() == 3


def test_counts_or_shares(browser: Any, folder: Path) -> None:
    counts = np.array(evaluate(folder / "m", folder / "f.h5")["confusion"])
    shares = {"k": counts, "r": counts / counts.sum(1, keepdims=True), "p": counts / np.maximum(counts.sum(0), 1)}
    with opened(browser, folder / "photos.html") as page:
        for way, expected in shares.items():
            page.locator(f"button[data-by={way}]").click()
            shown = page.locator(f"table.matrix td button .{way}").all_inner_texts()
            wanted = [f"{value}" if way == "k" else f"{value:.0%}" for value in expected[counts > 0].tolist()]
            assert shown == wanted
            others = [each for each in shares if each != way]
            assert not any(page.locator(f"table.matrix td button .{each}").first.is_visible() for each in others)


def test_tables_sort(browser: Any, folder: Path) -> None:
    with opened(browser, folder / "many.html") as page:
        table = page.locator("#classes table")
        page.evaluate("document.querySelector('#classes th:nth-child(2) button').click()")
        assert table.locator("th:nth-child(2)").get_attribute("aria-sort") == "descending"
        recalls = page.evaluate(
            "[...document.querySelectorAll('#classes tbody tr')].map(row => parseFloat(row.cells[2].textContent))"
        )
        page.locator("#classes thead button", has_text="recall").click()
        found = page.evaluate(
            "[...document.querySelectorAll('#classes tbody tr')].map(row => parseFloat(row.cells[2].textContent))"
        )
        assert found == sorted(recalls, reverse=True)
        page.locator("#classes thead button", has_text="class").first.click()
        first = page.locator("#classes tbody tr").first.inner_text()
        assert "species" not in first  # names with other characters come first


def test_many_classes_are_zoomed(browser: Any, folder: Path) -> None:
    """What the script draws is what Python drew; typed names choose classes; a cell still shows its images."""
    with opened(browser, folder / "many.html") as page:
        texts = "[...document.querySelectorAll('table.matrix td')].map(cell => cell.className + ' ' + cell.textContent.trim())"
        before = page.evaluate(texts)
        page.fill("[data-zoom]", "0123")
        assert page.locator("table.matrix tbody th").all_inner_texts().count("species 0123") == 1
        assert "1 class fits" in page.locator("#confusion output").inner_text()
        page.fill("[data-zoom]", "")
        assert page.evaluate(texts) == before
        cell = page.locator("table.matrix td.miss button").first
        count, words = int(cell.locator(".k").inner_text()), cell.locator(".why").inner_text()
        cell.click()
        assert result(page).startswith(f"Showing {count} of ")
        assert result(page).endswith(words)
        grid = page.locator("table.matrix :is(th, td):visible")
        page.fill("[data-zoom]", " no such\u202e ")
        assert grid.count() == 0
        assert page.locator("table.matrix caption").inner_text() == (
            "No name of a class that occurs here contains “no such\\u202e”."
        )
        assert page.locator("table.matrix caption").bounding_box()["height"] < 80  # not a letter a line
        page.fill("[data-zoom]", "0123")
        assert grid.count() > 4
        assert page.locator("table.matrix caption").inner_text().startswith("Images of each class")
        page.fill("[data-zoom]", "script>document")
        assert page.locator("table.matrix tbody th").count() > 1
        assert page.title() == "Report on many"


def test_cards_come_in_steps(browser: Any, folder: Path) -> None:
    with opened(browser, folder / "many.html") as page:
        assert page.locator(".cards .card").count() == 60
        page.get_by_role("button", name="Show 240 more of").press("Enter")  # on a busy machine a click once missed it
        assert page.locator(".cards .card").count() == 300
        assert page.evaluate(
            "document.activeElement.closest('.card') === document.querySelectorAll('.cards .card')[60]"
        )
        page.get_by_role("button", name="Most confident mistakes").click()
        assert page.locator(".cards .card.is-wrong").count() == 60


def test_without_script_all_is_there(browser: Any, folder: Path) -> None:
    with opened(browser, folder / "photos.html", script=False) as page:
        assert page.locator(".card").count() == 30
        assert page.locator("table.matrix").is_visible()
        assert not page.locator(".matrix-controls").is_visible()
        assert page.locator("#against table").count() >= 1


@pytest.mark.parametrize("name", ["photos", "many"])
def test_it_prints(browser: Any, folder: Path, name: str) -> None:
    """Tables are printed whole, and nothing lies on anything else: once the longest did."""
    with opened(browser, folder / f"{name}.html") as page:
        assert page.pdf().startswith(b"%PDF")
        page.emulate_media(media="print")
        heights = page.eval_on_selector_all(".scroll", "all => all.map(each => each.scrollHeight - each.clientHeight)")
        assert heights and max(heights) <= 1
        sections = page.eval_on_selector_all(
            "main > section", "all => all.map(each => [each.offsetTop, each.offsetTop + each.scrollHeight])"
        )
        assert all(one[1] <= other[0] + 1 for one, other in pairwise(sections))
