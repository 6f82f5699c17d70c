"""Sections about training in a real browser: nobody is shut out, and images that fine-tuning won are selected by a click."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import WINDOWS, opened, serious_findings
from caches import make_classes, save_tuned

from featcache.models.fit import fit_head
from featcache.reports.model_report.report import report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a head with its choice of C and its learning curve, and of a fine-tuned model."""
    folder = tmp_path_factory.mktemp("pages")
    make_classes(folder / "f.h5", np.arange(300) % 3, np.repeat([1, 3], [180, 120]), spread=4.0)
    fit_head(folder / "f.h5", folder / "m")
    return {
        "head": report(folder / "m", folder / "f.h5").report,
        "tuned": report(save_tuned(folder / "t")).report,
    }


@WINDOWS
@pytest.mark.parametrize("name", ["head", "tuned"])
def test_nobody_is_shut_out(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    with opened(browser, pages[name], width=width, scheme=scheme) as page:
        assert serious_findings(page) == []
        expected = {"head": ["calibration", "choice", "learning"], "tuned": ["calibration", "training", "finetuned"]}
        assert [page.locator(f"#{anchor} svg.plot, #{anchor} table").count() > 0 for anchor in expected[name]] == [
            True
        ] * 3


def test_images_that_fine_tuning_won_are_selected(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["tuned"]) as page:
        page.get_by_role("button", name="2 won by fine-tuning").press("Enter")
        assert page.locator("ul.cards[data-main] > .card:not([hidden])").count() == 2
        assert "images that only the fine-tuned model has right" in page.locator("form.controls output").inner_text()
