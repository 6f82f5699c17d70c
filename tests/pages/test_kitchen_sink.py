"""Every part of a page in a real browser: what it shows, selects, enlarges, exports and prints; by mouse and by keyboard."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from browser import SCHEMES, WIDTHS, opened, serious_findings
from kitchen import HOSTILE, kitchen_sink

from featcache.reports import elements
from featcache.reports.elements.cards import Card, cards_data
from featcache.reports.elements.page import compact, environment, publish_page, render_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kitchen")
    publish_page(folder / "page.html", kitchen_sink(folder))
    return folder / "page.html"


def shown(page: Any) -> list[int]:
    """Numbers of the cards that are shown, in their order."""
    return page.eval_on_selector_all(
        ".cards[data-main] > .card:not([hidden]) .file bdi", "all => all.map(each => parseInt(each.textContent))"
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nobody_is_shut_out(browser: Any, path: Path, width: int, scheme: str) -> None:
    with opened(browser, path, width=width, scheme=scheme) as page:
        assert page.title().startswith("Kitchen sink <script>")
        assert serious_findings(page) == []


def test_nobody_is_shut_out_of_a_picture(browser: Any, path: Path) -> None:
    with opened(browser, path, width=360) as page:
        page.locator(".pic img").first.click()
        assert serious_findings(page) == []


def test_everything_is_there_without_script(browser: Any, path: Path) -> None:
    with opened(browser, path, script=False) as page:
        assert page.locator(".card").count() == 40
        assert page.locator("form.controls").is_hidden()
        assert page.locator("svg.plot").count() == 6


def test_pictures_are_whole(browser: Any, path: Path) -> None:
    """Once the lower part of an upright one was cut off."""
    with opened(browser, path) as page:
        boxes = "all => all.map(img => img.offsetHeight - img.parentElement.clientHeight)"
        assert max(page.eval_on_selector_all(".cards .pic img", boxes)) <= 0


def test_a_click_selects_and_another_shows_all(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        everything = shown(page)
        page.get_by_role("button", name="the mistakes").click()
        wrong = page.locator(".card.is-wrong:not([hidden])").count()
        assert 0 < wrong == len(shown(page)) < len(everything)
        assert page.locator("form.controls output").inner_text() == f"Showing {wrong} of 40: the mistakes"
        page.get_by_role("button", name="worst").click()
        assert len(shown(page)) == 3
        assert page.get_by_role("button", name="the mistakes").get_attribute("aria-pressed") == "false"
        page.get_by_role("button", name="worst").click()
        assert shown(page) == everything
        page.get_by_role("button", name="worst").click()
        page.get_by_role("button", name="Show all").click()
        assert shown(page) == everything


def test_filters_and_sorts(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        for key, decreasing in (("-probability", True), ("probability", False)):
            page.select_option("select[name=sort]", key)
            texts = page.locator(".card:not([hidden]) .pic + p").all_text_contents()
            values = [float(found[1]) for text in texts if (found := re.search(r"([\d.]+)%", text))]
            assert values == sorted(values, reverse=decreasing)
            assert page.locator(".card").last.get_attribute("class") == "card is-refused"
        page.select_option("select[name=label]", "3")
        page.select_option("select[name=correct]", "1")
        assert page.locator(".card:not([hidden])").count() == 3
        page.get_by_role("button", name="Show all").click()
        page.fill("input[name=text]", "\\u202E")  # as it is shown, in any case
        assert page.locator(".card:not([hidden])").count() > 0
        page.fill("input[name=text]", "no such path")
        assert page.locator("form.controls output").inner_text() == "Showing 0 of 40"
        assert page.get_by_role("button", name="Save list of paths").is_disabled()


HERE = "parseInt(document.activeElement.closest('.card').querySelector('.file bdi').textContent)"


def test_keyboard_alone(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        page.get_by_role("button", name="the mistakes").focus()
        page.keyboard.press("Enter")
        order = shown(page)
        page.get_by_role("button", name="Copy paths").focus()
        page.keyboard.press("Tab")

        def here() -> int:
            return page.evaluate(HERE)

        assert here() == order[0]
        page.keyboard.press("ArrowRight")
        assert here() == order[1]
        page.keyboard.press("ArrowDown")
        across = order.index(here()) - 1
        assert across > 2
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert here() == order[0]
        page.keyboard.press("End")
        assert here() == order[-1]
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        dialog = page.locator("dialog")
        assert dialog.is_visible()
        assert "taken for" not in dialog.locator("dl").inner_text()
        assert dialog.locator(".likeliest li").count() == 5
        assert dialog.locator(".evidence img").count() == 3
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Escape")
        assert dialog.is_hidden()
        page.wait_for_function(f"{HERE} === {order[2]}")  # "close" is said a moment later


def test_paths_leave_as_the_bytes_they_are(browser: Any, path: Path, tmp_path: Path) -> None:
    with opened(browser, path) as page:
        number = next(k for k, name in enumerate(HOSTILE) if any("\udc80" <= c <= "\udcff" for c in name))
        page.select_option("select[name=label]", str(number))
        with page.expect_download() as download:
            page.get_by_role("button", name="Save list of paths").click()
        download.value.save_as(tmp_path / "paths")
        assert download.value.suggested_filename == "paths.txt"
        expected = [f"{k} {HOSTILE[number]}" if k % 3 == 0 else f"{HOSTILE[number]}/{k}.jpg" for k in (12, 28)]
        assert (tmp_path / "paths").read_bytes() == b"".join(os.fsencode(each) + b"\n" for each in expected)
        page.get_by_role("button", name="Show all").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save list of paths").click()
        assert download.value.suggested_filename == "paths.csv"  # there are line breaks in names


def many_cards(folder: Path, count: int) -> Path:
    """A page of nothing but cards of two classes, without pictures."""
    cards = [Card(f"{k}.jpg", label="ab"[k % 2], predicted="ab"[k % 3 % 2]) for k in range(count)]
    template = environment().from_string(
        '{% extends "base.html" %}{% import "macros.html" as part %}{% block main %}{{ part.pictures(cards, data.cards) }}{% endblock %}'
    )
    path = folder / "many.html"
    publish_page(path, render_page(template, title="many", data={"cards": cards_data(cards)}, cards=cards))
    return path


def test_thousands_of_pictures_are_sorted_and_filtered_at_once(browser: Any, tmp_path: Path) -> None:
    """Hidden list items once made it quadratic: 88 s for 10,000."""
    path = many_cards(tmp_path, 4000)
    change = """([name, value]) => {
        const start = performance.now(), field = document.querySelector(`[name=${name}]`);
        field.value = value;
        field.dispatchEvent(new Event("input", {bubbles: true}));
        return [document.body.offsetHeight, performance.now() - start];
    }"""
    with opened(browser, path) as page:
        for name, value in (("sort", "predicted"), ("correct", "0"), ("correct", ""), ("text", "99")):
            assert page.evaluate(change, [name, value])[1] < 3000


def test_print(browser: Any, path: Path, tmp_path: Path) -> None:
    with opened(browser, path, scheme="dark") as page:
        pdf = page.pdf(format="A4")
        assert pdf.startswith(b"%PDF")
        assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20
        assert pdf.count(b"/Subtype /Image") >= 39  # also pictures that were never on the screen
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("nav.contents").is_hidden()


def test_on_paper_are_all_pictures(browser: Any, tmp_path: Path) -> None:
    """Once the first 60. Of a list that is neither selected nor filtered the first 1,000, and that is said."""
    folder = tmp_path / "photos"
    folder.mkdir()
    publish_page(tmp_path / "photos.html", kitchen_sink(folder, count=130))
    with opened(browser, tmp_path / "photos.html") as page:
        assert page.locator(".card img").count() == 60
        assert page.pdf(format="A4").count(b"/Subtype /Image") >= 129  # one is damaged
        assert page.locator(".card img").count() == 60
    printed = """() => {  // as printing does, without drawing it
        dispatchEvent(new Event("beforeprint"));
        const found = [document.querySelectorAll(".card").length, more.textContent];
        dispatchEvent(new Event("afterprint"));
        return found;
    }"""
    with opened(browser, many_cards(tmp_path, 2200)) as page:
        page.locator(".pic").nth(3).focus()
        said = "The other 1,200 are not printed; what is selected or filtered is."
        assert page.evaluate(printed) == [1000, said]
        assert page.locator(".card").count() == 60
        assert page.evaluate("document.activeElement === document.querySelectorAll('.pic')[3]")
        page.select_option("select[name=label]", label="a (1,100)")
        assert page.evaluate(printed)[0] == 1100


@pytest.mark.parametrize("name", ["style", "report", "stats", "map"])
def test_a_browser_reads_the_same_style_in_what_pages_hold(browser: Any, name: str) -> None:
    sheet = (Path(elements.__file__).parents[1] / f"pages/{name}.css").read_text("utf-8")
    context = browser.new_context()
    read = """(texts) => texts.map((text) => {
        const sheet = new CSSStyleSheet();
        sheet.replaceSync(text);
        return [...sheet.cssRules].map((rule) => rule.cssText.replaceAll(", ", ","));
    })"""
    before, after = context.new_page().evaluate(read, [sheet, compact(sheet, css=True)])
    context.close()
    assert len(before) > 5
    assert after == before
