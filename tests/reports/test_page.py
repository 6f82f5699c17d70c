"""Pages: whatever is in names is text, and a browser obeys nothing but the style sheet and the script of the package."""

import base64
import hashlib
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
from kitchen import HOSTILE, kitchen_sink

from featcache.errors import StorageError, UsageError
from featcache.reports.elements.cards import Card, card_filters, card_sorts, cards_data
from featcache.reports.elements.page import check_page_path, environment, json_in_html, publish_page, render_page
from featcache.system.display import printable


class Reader(HTMLParser):
    """What a page consists of: elements with their attributes, texts of scripts and styles, other texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def kinds(self) -> set[tuple[str, str]]:
        return {(tag, name) for tag, attributes in self.elements for name in attributes or {"": None}}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kitchen_sink(tmp_path_factory.mktemp("hostile"))


def test_hostile_names_make_no_element_and_no_attribute(hostile: str, tmp_path: Path) -> None:
    harmless = [f"a harmless name of some length, number {k}" for k in range(len(HOSTILE))]
    page, plain = Reader(hostile), Reader(kitchen_sink(tmp_path, names=harmless))
    assert page.kinds() == plain.kinds()
    assert [len(page.of(tag)) for tag in ("script", "style", "img", "svg", "a")] == [
        len(plain.of(tag)) for tag in ("script", "style", "img", "svg", "a")
    ]
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert all(
            (attributes.get("src") or "data:").startswith("data:image/webp;base64,") for _ in "." if tag == "img"
        )
        assert "src" not in attributes or tag == "img"
        assert (attributes.get("href") or "#").startswith("#")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_whole_and_visibly(hostile: str, name: str) -> None:
    page = Reader(hostile)
    assert printable(name) in page.text
    hostile.encode()  # no surrogate is left
    assert not {"\u202e", "\x1b", "\x00", "\u2028", "\r"} & set(hostile)


def test_the_policy_allows_this_style_and_this_script_alone(hostile: str) -> None:
    page = Reader(hostile)
    [policy] = [each["content"] for each in page.of("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(each.strip().split(" ", 1) for each in (policy or "").split(";"))

    def source(kind: str) -> str:
        text = hostile.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        assert hostile.count(f"<{kind}>") == 1
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert directives == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": source("style"),
        "script-src": source("script"),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert hostile.index("http-equiv") < hostile.index("<style>")


def test_the_script_gets_names_exactly(hostile: str) -> None:
    text = hostile.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    cards = json.loads(text)["cards"]
    assert cards["classes"] == HOSTILE
    assert cards["path"][12] == f"12 {HOSTILE[12]}"


def test_numbers_that_json_lacks_become_null() -> None:
    assert json.loads(json_in_html({"a": [float("nan"), float("inf"), 1.5], 2: (True, None)})) == {
        "a": [None, None, 1.5],
        "2": [True, None],
    }


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render_page(environment().from_string("{{ missing }}"), title="")


def test_assets_are_small() -> None:
    folder = Path(__file__).parents[2] / "featcache/reports/pages"
    assert sum((folder / name).stat().st_size for name in ("style.css", "script.js")) < 45_000


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("page.txt", UsageError, r"ends in \.html"),
        ("page", UsageError, r"ends in \.html"),
        ("none/page.html", StorageError, "does not exist"),
        ("folder.html", StorageError, "it is an empty folder"),
        ("other.html", StorageError, "no page that featcache wrote"),
        ("broken.html", StorageError, "no page that featcache wrote"),
        ("pipe.html", StorageError, "no page that featcache wrote"),
    ],
)
def test_other_peoples_files_are_never_replaced(tmp_path: Path, name: str, error: type[Exception], words: str) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "other.html").write_text("<p>mine")
    if name == "broken.html":
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    if name == "pipe.html":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes with names here")
        os.mkfifo(tmp_path / name)
    for refuse in (check_page_path, lambda path: publish_page(path, "")):
        with pytest.raises(error, match=words):
            refuse(tmp_path / name)
    assert (tmp_path / "other.html").read_text() == "<p>mine"


def test_an_earlier_page_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.HTML"
    for title in ("first", "second \udcff"):
        check_page_path(path)
        publish_page(path, render_page("base.html", title=title))
    assert r"<title>second \udcff</title>" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_columns_of_cards() -> None:
    cards = [
        Card("a", label="x", predicted="y", probabilities=(("y", 0.7), ("x", 0.3))),
        Card("b", label="y", predicted="y", probabilities=(("y", 1.0),), status="unsure", reason="far"),
        Card("c", status="refused", reason="empty file"),
    ]
    columns = cards_data(cards, ["w", "x"])
    assert columns["classes"] == ["w", "x", "y"]
    assert (columns["label"], columns["predicted"], columns["correct"]) == ([1, 2, -1], [2, 2, -1], [0, 1, -1])
    assert columns["margin"] == [0.4, 1, -1]
    assert columns["top"] == [[2, 7000, 1, 3000], [2, 10000], []]
    assert "split" not in columns
    assert [(name, choices) for name, _, choices in card_filters(columns)] == [
        ("label", [(1, "x", 1), (2, "y", 1), (-1, "(no label)", 1)]),
        ("predicted", [(2, "y", 2), (-1, "(none)", 1)]),
        ("correct", [(0, "wrong", 1), (1, "right", 1), (-1, "not known", 1)]),
        ("status", [(0, "ok", 1), (1, "unsure", 1), (2, "refused", 1)]),
    ]
    assert [key for key, _ in card_sorts(cards_data([Card("a")]))] == ["order", "path"]
    assert cards[0].words == "a, x taken for y, 70%"
    assert cards[2].words == "c, refused: empty file"
