"""Charts as files: whole, deterministic, and over nobody else's file."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from kitchen import HOSTILE, make_charts

from featcache.errors import StorageError
from featcache.reports.elements.page import Section
from featcache.reports.figures import charts_in, check_figures, write_figures

Run = Callable[..., tuple[int, str, str]]


def test_names_and_bytes_are_always_the_same(tmp_path: Path) -> None:
    charts = [*make_charts(HOSTILE), *make_charts(HOSTILE)[:1]]
    names = [path.name for path in write_figures(charts, tmp_path / "f")]
    assert names[:2] == ["recall.svg", "reliability.svg"]
    assert names[-1] == "recall-2.svg"
    before = {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()}
    write_figures(charts, tmp_path / "f")  # over its own
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()} == before
    assert all(ElementTree.fromstring(data).get("viewBox") for data in before.values())


def test_nothing_is_written_where_one_name_is_somebody_else_s(tmp_path: Path) -> None:
    charts = make_charts(["a"])
    (tmp_path / "reliability.svg").write_text('<svg class="plot">mine</svg>')
    with pytest.raises(StorageError, match=r"reliability\.svg exists and is no figure that featcache wrote"):
        write_figures(charts, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["reliability.svg"]
    assert "mine" in (tmp_path / "reliability.svg").read_text()


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.json").write_text("{}")
    for name, says in (("file", "is a file"), ("model", "is a model"), ("missing/f", "missing")):
        with pytest.raises(StorageError, match=says):
            check_figures(tmp_path / name)


def test_charts_are_found_in_all_sections() -> None:
    one, two, three = make_charts(["a"])[:3]
    sections = [
        Section("a", "A", "x.html", {"charts": [one, two], "words": "w"}),
        Section("b", "B", "x.html", {"c": three}),
    ]
    assert charts_in(sections) == [one, two, three]


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_the_commands_write_them(cache: Path, model: Path, tmp_path: Path, run: Run, command: str) -> None:
    output = ("-o", tmp_path / "page.html") if command == "report" else ()
    code, _, err = run(command, model, cache, *output, "--figures", tmp_path / "figures")
    assert code == 0, err
    assert {"reliability.svg", "coverage-against-accuracy.svg"} <= {
        path.name for path in (tmp_path / "figures").iterdir()
    }
    code, _, err = run(command, model, cache, *output, "--figures", model)
    assert (code, "is a model" in err) == (1, True)
