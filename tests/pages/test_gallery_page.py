"""The gallery in a real browser, by itself and in the frame of a notebook."""

from pathlib import Path
from typing import Any

import pytest
from browser import WINDOWS, frame_of, opened, serious_findings
from conftest import TINY, make_photos, write_photo

import featcache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> featcache.Page:
    """Twelve images of three classes with evidence, one of them in the wrong folder and one refused."""
    folder = tmp_path_factory.mktemp("gallery")
    featcache.extract(make_photos(folder / "photos", each=8), folder / "f.h5", TINY)
    featcache.fit_head(folder / "f.h5", folder / "m")
    make_photos(folder / "new", each=3)
    write_photo(folder / "new" / "red" / "blue.jpg", (30, 40, 200), 77)
    (folder / "new" / "red" / "broken.jpg").write_bytes(b"no image")
    return featcache.gallery(folder / "m", folder / "new", evidence=folder / "f.h5", abstain_below=0.9)


@pytest.fixture(scope="module")
def path(page_of: featcache.Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of.save(tmp_path_factory.mktemp("page") / "gallery.html")


@WINDOWS
def test_nobody_is_shut_out(browser: Any, path: Path, width: int, scheme: str) -> None:
    with opened(browser, path, width=width, scheme=scheme) as page:
        assert serious_findings(page) == []
        page.locator(".pic img").first.click()
        assert serious_findings(page) == []


def test_sort_and_filter(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        cards = page.locator(".cards[data-main] > .card:not([hidden])")
        assert cards.count() == 11
        page.get_by_role("button", name="the mistakes").click()
        assert cards.locator(".file").all_text_contents() == ["blue.jpg"]
        cards.locator(".pic").press("Enter")
        facts = page.locator("dialog dl").inner_text()
        assert "red" in facts and "blue" in facts and "unfamiliar" in facts
        assert page.locator("dialog .evidence img").count() == 3
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Show all").click()
        page.select_option("select[name=status]", label="refused (1)")
        assert cards.locator(".file").all_text_contents() == ["broken.jpg"]
        page.select_option("select[name=status]", "")
        page.select_option("select[name=sort]", "-unfamiliarity")
        shown = page.evaluate("shown.map((row) => cards.unfamiliarity[row])")
        assert shown == sorted(shown, reverse=True) and shown[-1] == -1


def test_in_a_frame_it_works_and_reaches_nothing(browser: Any, page_of: featcache.Page, tmp_path: Path) -> None:
    host = tmp_path / "notebook.html"
    host.write_text(f"<!doctype html><title>Notebook</title><h1>A cell</h1>{page_of._repr_html_()}")
    with opened(browser, host) as page:
        frame = frame_of(page)
        assert frame.title() == "11 images, labelled by m"
        frame.get_by_role("link", name="How it was made").click()
        assert frame.title() == "11 images, labelled by m" and frame.evaluate("scrollY") > 0
        frame.get_by_role("button", name="the mistakes").click()
        with page.expect_download() as download:
            frame.get_by_role("button", name="Save list of paths").click()
        assert Path(download.value.path()).read_text().endswith("/new/red/blue.jpg\n")
        reach = "(() => { try { return parent.document.title; } catch (error) { return error.name; } })()"
        assert frame.evaluate(reach) == "SecurityError"
