"""The page of statistics in a real browser: what it says, and that its parts pick out pictures."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import WINDOWS, opened, serious_findings
from conftest import make_photos, write_photo

from featcache.reports.source_stats.stats import Statistics, stats

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Statistics]:
    folder = tmp_path_factory.mktemp("stats")
    photos = make_photos(folder / "photos", each=8, splits=("train", "val"))
    shutil.copy(photos / "train/blue/00.jpg", photos / "val/red/copy.jpg")
    write_photo(photos / "train/red/long.png", (200, 90, 90), 99, (300, 40))
    (photos / "train/red/<b>empty.jpg").touch()
    return folder / "stats/stats.html", stats(photos, folder / "stats")


@WINDOWS
def test_nobody_is_shut_out(browser: Any, made: tuple[Path, Statistics], width: int, scheme: str) -> None:
    with opened(browser, made[0], width=width, scheme=scheme) as page:
        assert serious_findings(page) == []


def test_it_says_what_was_found(browser: Any, made: tuple[Path, Statistics]) -> None:
    path, found = made
    with opened(browser, path, script=False) as page:
        assert page.locator(".advice li").all_inner_texts() == found.advice
        rows = page.locator("#classes tbody tr").all_inner_texts()
        assert [row.split("\t")[:4] for row in rows] == [
            *([name, *map(str, of.values()), str(sum(of.values()))] for name, of in found.classes.items()),
            ["all", *map(str, found.splits.values()), str(found.readable)],
        ]
        assert page.locator("#unreadable tbody tr").all_inner_texts() == ["train/red/<b>empty.jpg\tempty file"]
        assert page.locator("#out .card b").first.text_content() == f"{found.darkest[0]['value']:.0f}"
        assert page.locator("#copies .copies > li").count() == 1


def test_parts_pick_out_pictures(browser: Any, made: tuple[Path, Statistics]) -> None:
    path, found = made
    with opened(browser, path) as page:
        pictures = page.locator("#pictures .card:not([hidden])")
        everything = pictures.count()
        page.get_by_role("button", name="Show both").click()
        assert pictures.count() == 2
        assert sorted(pictures.locator(".file").all_text_contents()) == ["00.jpg", "copy.jpg"]
        page.get_by_role("button", name=f"Show these {len(found.oddest)} in the list").last.click()
        assert pictures.count() == len(found.oddest)
        odd = page.locator("#out .cards").last.locator(".pic").first
        odd.focus()
        page.keyboard.press("Enter")
        assert pictures.locator(".file").all_text_contents() == ["long.png"]
        page.get_by_role("button", name="Show all").click()
        assert pictures.count() == everything
