"""A real browser for the tests of pages: Debian's Chromium through Playwright. In: pages. Out: what it shows, asks for and says.

Where either is missing the tests are skipped, except where CI=true says that nothing may be missing.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WIDTHS = {1440: 900, 390: 844}  # of a window, and its height
SCHEMES = ("light", "dark")
# No width has colours of its own, so two windows try both; the page that holds every part is tried in all four.
WINDOWS = pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])


def _program() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        import axe_playwright_python  # noqa: F401
        import playwright  # noqa: F401
    except ImportError:
        found = None
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("the tests of pages need chromium, playwright and axe-playwright-python, see .ci/run")
    if found is None:
        pytest.skip("needs chromium (apt-get install chromium), playwright and axe-playwright-python")
    return found


@contextlib.contextmanager
def running_browser() -> Iterator[Any]:
    """A Chromium, without a window."""
    program = _program()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=program, args=["--no-sandbox"])  # as root there is no sandbox
        try:
            yield browser
        finally:
            browser.close()


def frame_of(page: Any) -> Any:
    """The frame of a page that has one, loaded: such frames load lazily, and the page does not wait for them."""
    frame = page.frames[1]
    frame.locator("head title").wait_for(state="attached")
    frame.wait_for_load_state()
    return frame


@contextlib.contextmanager
def opened(browser: Any, path: Path, *, width: int = 1440, scheme: str = "light", script: bool = True) -> Iterator[Any]:
    """A page, opened. At the end it must have asked for nothing, said nothing on the console, and fit into the window."""
    said: list[str] = []
    context = browser.new_context(
        viewport={"width": width, "height": WIDTHS.get(width, 900)},
        color_scheme=scheme,
        java_script_enabled=script,
        accept_downloads=True,
    )
    try:
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: said.append(request.url))
        page.goto(path.resolve().as_uri())
        yield page
        if script:
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        own = (path.resolve().as_uri(), "data:", "blob:")
        assert [each for each in said if not each.startswith(own)] == []
    finally:
        context.close()


def serious_findings(page: Any, within: str | None = None) -> list[str]:
    """What axe-core finds that is serious or critical: rule and the first elements. ``within``: a selector."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, within).response["violations"]
    return [
        f"{each['id']}: {[node['html'][:200] for node in each['nodes'][:3]]} {each['nodes'][0].get('failureSummary', '')}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
