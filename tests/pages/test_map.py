"""The map in a real browser: what it shows under the pointer, selects, and reaches by keyboard; against the same in Python."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import WINDOWS, opened, serious_findings
from kitchen import HOSTILE, make_images
from maps import MapPage, make_map
from matplotlib.path import Path as Outline

pytestmark = pytest.mark.slow
ROOM = 24  # pixels about the points of the whole map
CLASSES = [*HOSTILE[:4], *(f"class {k}" for k in range(8))]  # more than there are colours
COUNT, CARDS = 300, 120


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MapPage:
    folder = tmp_path_factory.mktemp("map")
    return make_map(folder, count=COUNT, classes=CLASSES, pictures=make_images(folder, 40), cards=CARDS, refused=2)


def canvas_of(page: Any) -> Any:
    page.evaluate("document.querySelector('.plane').scrollIntoView({behavior: 'instant', block: 'center'})")
    page.wait_for_function("document.querySelector('.plane canvas').width > 300")
    page.wait_for_timeout(100)
    return page.locator(".plane canvas").first


def on_screen(made: MapPage, box: Any) -> np.ndarray:
    """(N, 2) where points lie in the window, as the whole map is drawn."""
    low, high = made.points.min(axis=0), made.points.max(axis=0)
    scale = min((box["width"] - 2 * ROOM) / (high - low)[0], (box["height"] - 2 * ROOM) / (high - low)[1])
    centred = (made.points - (low + high) / 2) * scale * [1, -1]
    return np.add(centred, [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])


def selected(page: Any) -> set[int]:
    """Rows of the map that are selected, of points: refused cards, which stand between, are on no map."""
    rows = page.evaluate("selection.rows")
    assert not {CARDS, CARDS + 1} & set(rows)
    return {row if row < CARDS else row - 2 for row in rows}


def lonely(places: np.ndarray, rows: range) -> int:
    """The row of some that is the farthest from all others."""
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(places))
    return max(rows, key=lambda row: apart[row].min())


@WINDOWS
def test_nobody_is_shut_out(browser: Any, made: MapPage, width: int, scheme: str) -> None:
    with opened(browser, made.path, width=width, scheme=scheme) as page:
        canvas_of(page)
        assert serious_findings(page) == []
        page.get_by_role("button", name="class 1", exact=False).first.click()
        assert serious_findings(page) == []


def test_pointing_shows_the_picture_of_the_point(browser: Any, made: MapPage) -> None:
    with opened(browser, made.path) as page:
        places = on_screen(made, canvas_of(page).bounding_box())
        for rows in (range(39), range(40, CARDS), range(CARDS, COUNT)):  # with picture, with a card only, with neither
            row = lonely(places, rows)
            page.mouse.move(*places[row].tolist())
            tip = page.locator(".tip")
            assert f"{row}.jpg" == tip.locator("b").inner_text()
            assert tip.locator("img").count() == (row < 39)
            if row < 39:
                assert tip.locator("img").get_attribute("src") == made.cards[row].thumbnail
        page.mouse.move(5, 5)
        assert tip.is_hidden()


def test_a_lasso_selects_what_lies_inside(browser: Any, made: MapPage, tmp_path: Path) -> None:
    with opened(browser, made.path) as page:
        box = canvas_of(page).bounding_box()
        places = on_screen(made, box)
        star = [(0.2, 0.2), (0.8, 0.25), (0.35, 0.5), (0.75, 0.9), (0.15, 0.7)]  # not convex
        corners = [(round(box["x"] + x * box["width"]), round(box["y"] + y * box["height"])) for x, y in star]
        page.get_by_role("button", name="Lasso").click()
        page.mouse.move(*corners[0])
        page.mouse.down()
        for corner in corners[1:]:
            page.mouse.move(*corner)
        page.mouse.up()
        inside = set(np.flatnonzero(Outline([*corners, corners[0]]).contains_points(places)).tolist())
        found = selected(page)
        assert 20 < len(found) < COUNT
        assert found == inside
        page.get_by_role("button", name="Show them in the list").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save list of paths").click()
        download.value.save_as(tmp_path / "paths.csv")
        text = (tmp_path / "paths.csv").read_bytes()
        assert all(f"/{row}.jpg".encode() in text for row in inside)
        assert text.count(b".jpg") == len(inside)


def test_keys_reach_every_point(browser: Any, made: MapPage) -> None:
    with opened(browser, made.path) as page:
        canvas_of(page).focus()
        heard = page.locator("output.said")
        page.keyboard.press("PageDown")
        seen = {int(heard.inner_text().split(".")[0])}
        press = """(times) => Array.from({length: times}, () => {  // there and back through Playwright is 30 ms
            document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "PageDown", bubbles: true}));
            return parseInt(document.querySelector("output.said").textContent);
        })"""
        assert seen | {*page.evaluate(press, COUNT - 1)} == set(range(COUNT))
        page.keyboard.press("Escape")
        before = None
        for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowUp", 1, 1), ("ArrowLeft", 0, -1), ("ArrowDown", 1, -1)):
            page.keyboard.press(key)
            row = int(heard.inner_text().split(".")[0])
            if before is not None:
                assert sign * (made.points[row] - made.points[before])[axis] > 0
            before = row
        page.keyboard.press("Enter")
        assert selected(page) == {before}
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Shift+Enter")
        assert len(selected(page)) == 2
        page.keyboard.press("Escape")
        assert page.evaluate("selection.rows") is None


def test_zoom_keeps_what_is_under_the_pointer(browser: Any, made: MapPage) -> None:
    with opened(browser, made.path) as page:
        canvas = canvas_of(page)
        places = on_screen(made, canvas.bounding_box())
        row = lonely(places, range(COUNT))
        page.mouse.move(*places[row].tolist())
        before = page.evaluate("scrollY")
        canvas.focus()
        for _ in range(3):
            page.mouse.wheel(0, -300)
        page.wait_for_timeout(150)
        assert page.evaluate("scrollY") == before
        page.mouse.move(places[row][0] + 3, places[row][1])
        assert page.locator(".tip").is_visible()
        assert page.locator(".tip b").inner_text() == f"{row}.jpg"
        page.get_by_role("button", name="Whole map").click()


def test_colours_and_classes(browser: Any, made: MapPage) -> None:
    with opened(browser, made.path) as page:
        canvas_of(page)
        assert page.locator(".legend li").count() == 11  # ten, and a list of the others
        page.select_option(".legend select", index=2)
        name = page.locator(".map-said output").inner_text()
        assert name.startswith(f"{COUNT // len(CLASSES)} of {COUNT + 2} selected")
        page.select_option("[data-colour]", "correct")
        mistakes = np.flatnonzero((made.labels != made.predicted) & (made.predicted >= 0))
        wrong = len(mistakes)
        page.get_by_role("button", name=f"wrong {wrong}").click()
        assert selected(page) == set(mistakes.tolist())
        page.get_by_role("button", name=f"wrong {wrong}").click()
        assert page.evaluate("selection.rows") is None
        page.select_option("[data-colour]", "split")
        page.get_by_role("button", name=f"train {COUNT - CARDS}").click()
        assert selected(page) == set(range(CARDS, COUNT))
        page.evaluate("selection.set(rowsOf({label: 1}))")  # as a table of scores selects: what was scored
        assert selected(page) == set(np.flatnonzero((made.labels == 1) & (made.predicted >= 0)).tolist())
        assert "more on the map only, saved with the paths" in page.locator("form.controls output").inner_text()


def pixels(page: Any) -> bytes:
    page.wait_for_timeout(150)
    return base64.b64decode(page.evaluate("document.querySelector('.plane canvas').toDataURL().split(',')[1]"))


def test_dark_and_light_change_the_map_at_once(browser: Any, made: MapPage) -> None:
    with opened(browser, made.path) as page:
        canvas_of(page)
        light = pixels(page)
        page.emulate_media(color_scheme="dark")
        assert pixels(page) != light
        page.emulate_media(color_scheme="light")
        assert pixels(page) == light


def test_the_wall(browser: Any, made: MapPage) -> None:
    with opened(browser, made.path) as page:
        canvas_of(page)
        tiles = page.locator(".wall button")
        assert tiles.count() == 39
        order = page.evaluate("data.map.wall")
        assert tiles.nth(5).locator("img").get_attribute("src") == made.cards[order[5]].thumbnail
        tiles.nth(5).click()
        assert page.locator("dialog h2").inner_text().endswith(f"/{order[5]}.jpg")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement === document.querySelectorAll('.wall button')[5]")
        tiles.nth(9).click(modifiers=["Shift"])
        assert selected(page) == set(order[5:10])
        assert page.locator(".wall .dim").count() == 34
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        here = page.evaluate("(({left, top}) => [left, top])(document.activeElement.getBoundingClientRect())")
        above = page.evaluate(
            "(({left, top}) => [left, top])(document.querySelectorAll('.wall button')[1].getBoundingClientRect())"
        )
        assert here[0] == above[0]
        assert here[1] > above[1]
        page.keyboard.press("ArrowUp")
        assert page.evaluate("[...document.querySelectorAll('.wall button')].indexOf(document.activeElement)") == 1


def test_without_script_and_on_paper_it_is_a_picture(browser: Any, made: MapPage) -> None:
    with opened(browser, made.path, script=False) as page:
        assert page.locator(".plane svg.plot").is_visible()
        assert page.locator(".plane canvas").first.is_hidden()
        assert page.locator(".legend li").count() == 11
    with opened(browser, made.path) as page:
        canvas_of(page)
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.querySelector('.plane svg')).visibility") == "visible"
        assert page.locator(".plane canvas").first.is_hidden()
        assert page.locator(".map-tools").is_hidden()


def test_fingers(browser: Any, made: MapPage) -> None:
    with opened(browser, made.path, width=390) as page:
        canvas = canvas_of(page)
        box = canvas.bounding_box()
        middle = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
        before = pixels(page)
        touch = page.context.new_cdp_session(page)

        def send(kind: str, *apart: float) -> None:
            points = [
                {"x": middle[0] + side * d, "y": middle[1], "id": k} for d in apart for k, side in enumerate((-1, 1))
            ]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        send("touchStart", 30)
        for apart in (40, 60, 80):
            send("touchMove", apart)
        send("touchEnd")
        assert pixels(page) != before
        page.get_by_role("button", name="Whole map").click()
        assert pixels(page) == before
