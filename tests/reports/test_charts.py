"""Charts: the picture holds the numbers, in and outside of a page; axes have round ticks."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
from kitchen import HOSTILE, make_charts

from featcache.reports.elements import charts
from featcache.reports.elements.chart_parts import apart
from featcache.reports.elements.numbers import bytes_text, log_ticks, number_text, percent_text, round_ticks, tick_texts
from featcache.reports.figures import figure_file

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("number", range(6))
def test_a_figure_is_a_file_that_needs_nothing(number: int) -> None:
    chart = make_charts(HOSTILE)[number]
    text = figure_file(chart)
    root = ElementTree.fromstring(text.encode())
    assert root.find(f"{SVG}title").text == chart.title
    assert "var(" not in text
    assert not re.search(r'nan|inf"|style="|href', text)
    assert {each.tag for each in root.iter()} <= {
        f"{SVG}{tag}" for tag in ["svg", "title", "desc", "style", "text", "rect", "path"]
    }
    assert all(
        name in {each.get("class") for each in root.iter()} for name in (["bar"] if number in (0, 5) else ["grid"])
    )


def test_a_chart_within_a_page_has_no_style_of_its_own() -> None:
    for chart in make_charts(HOSTILE):
        html = chart.__html__()
        assert "<style" not in html
        assert "style=" not in html
        assert all(len(row) == len(chart.header) for row in chart.rows)


def test_the_last_tick_stays_within_the_picture() -> None:
    chart = charts.histogram(
        [1e3, 1e7], [3], title="t", x_label="size", log_x=True, x_text=lambda size: f"{size:,.0f} bytes"
    )
    last = next(each for each in ElementTree.fromstring(chart.svg).iter("text") if each.text == "10,000,000 bytes")
    assert (last.get("text-anchor"), float(last.get("x"))) == ("end", charts.WIDTH)


def test_images_are_counted_in_whole_numbers() -> None:
    for most in (1, 2, 3, 8):
        svg = charts.histogram([0, 1, 2], [most, 0], title="t", x_label="size", x_text="size {}".format).svg
        texts = [str(each.text) for each in ElementTree.fromstring(svg).iter("text")]
        assert not [text for text in texts if "." in text and "size" not in text]


def test_bars_are_drawn_to_scale() -> None:
    chart = charts.bars([("a", 0.25), ("b", 0.5), ("c", 0.0)], title="t", percent=True)
    root = ElementTree.fromstring(chart.svg)
    troughs = [float(each.get("width")) for each in root.iter("rect") if each.get("class") == "trough"]
    wide = [float(each.get("width")) for each in root.iter("rect") if each.get("class") == "bar"]
    assert [w / t for w, t in zip(wide, troughs, strict=True)] == pytest.approx([0.25, 0.5, 0], abs=2e-3)
    assert chart.rows == (("a", "25.0%"), ("b", "50.0%"), ("c", "0.0%"))


def test_lines_are_drawn_to_scale_and_broken_at_gaps() -> None:
    chart = charts.lines(
        [charts.Series("s", [1, 10, 100, 1000], [0.0, None, float("nan"), 1.0])],
        title="t", x_label="x", y_label="y", log_x=True, y_range=(0, 1),
    )  # fmt: skip
    root = ElementTree.fromstring(chart.svg)
    [line] = [each.get("d") for each in root.iter("path") if each.get("class") == "line s1"]
    assert line.count("M") == 2
    ticks = {each.text: float(each.get("x")) for each in root.iter("text") if each.get("class") == "tick"}
    assert ticks["10"] - ticks["1"] == pytest.approx(ticks["1,000"] - ticks["100"], abs=0.3)
    assert [row[2] for row in chart.rows] == ["0", "–", "–", "1"]


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5], [float("nan")]])
def test_little_or_nothing_to_draw_is_no_error(values: list[float]) -> None:
    xs = list(range(len(values)))
    for log_x, percent in itertools.product((False, True), repeat=2):
        series = [charts.Series("s", xs, values), charts.Series("t", [], [])]
        made = charts.lines(series, title="t", x_label="x", y_label="y", log_x=log_x, percent_y=percent)
        ElementTree.fromstring(made.svg)
    finite = [value for value in values if value == value]
    ElementTree.fromstring(charts.bars([("a", value) for value in finite], title="t").svg)
    ElementTree.fromstring(charts.reliability(charts.Bins(finite, finite, [0] * len(finite))).svg)
    ElementTree.fromstring(charts.histogram([0, 1], [0], title="t", x_label="x").svg)


def test_labels_keep_apart() -> None:
    for places in ([100.0, 100, 100], [215.0, 216, 10], [5.0], [180.0, 180, 180, 30]):
        moved = apart(places, 14, 16, 180)
        ordered = sorted(moved)
        assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(ordered))
        assert ordered[0] >= 16
        assert ordered[-1] <= 180


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.62, 0.93, ["0.65", "0.70", "0.75", "0.80", "0.85", "0.90"]),
        (0, 1234, ["0", "250", "500", "750", "1,000"]),
        (-3, 3, ["-3", "-2", "-1", "0", "1", "2", "3"]),
        (0.99991, 0.99999, None),
    ],
)
def test_ticks_are_round(low: float, high: float, texts: list[str] | None) -> None:
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert len(set(tick_texts(ticks, percent=texts is None))) == len(ticks)
    if texts:
        assert tick_texts(ticks) == texts


def test_ticks_of_powers() -> None:
    assert log_ticks(1, 1000) == [1, 3, 10, 30, 100, 300, 1000]
    assert log_ticks(1e-6, 1e6) == [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6]
    assert log_ticks(10, 500) == [10, 20, 50, 100, 200, 500]
    assert log_ticks(11, 12) == [11, 12]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent_text(0.9346), "93.5%"),
        (percent_text(0.99999), ">99.9%"),
        (percent_text(1.0), "100.0%"),
        (percent_text(0.0001), "<0.1%"),
        (percent_text(0.0), "0.0%"),
        (percent_text(0.999, 0), ">99%"),
        (percent_text(None), "–"),
        (number_text(0.012345), "0.0123"),
        (number_text(1234567), "1,234,567"),
        (number_text(100.0), "100"),
        (number_text(0.5), "0.5"),
        (number_text(0), "0"),
        (number_text(9.999), "10"),
        (number_text(1e-7), "1e-7"),
        (number_text(-0.25), "-0.25"),
        (bytes_text(0), "0 bytes"),
        (bytes_text(999), "999 bytes"),
        (bytes_text(1234567), "1.23 MB"),
        (bytes_text(999_999), "1 MB"),
    ],
)
def test_numbers_in_words(text: str, expected: str) -> None:
    assert text == expected
