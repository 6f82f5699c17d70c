"""Backbones in words: a table that fits a terminal, whose rows are the catalog's; one network from input to embedding."""

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from featcache.backbones.catalog import ALIASES, CHOSEN, BackboneFacts, counted, facts_of, matching
from featcache.backbones.load import backbone_names
from featcache.reports.backbones import columns, describe_network, legend, near, network_lines, table_lines, table_of

Run = Callable[..., tuple[int, str, str]]


def test_the_table_to_choose_from_fits_a_terminal() -> None:
    rows = table_of(CHOSEN)
    assert [row["name"] for row in rows] == [*CHOSEN]
    lines = [*table_lines(rows), *legend(rows)]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for name in (*CHOSEN, *ALIASES, "gated", "DINOv2 README"):
        assert name in text
    (small,) = [line.split() for line in lines if line.startswith(f"{ALIASES['base']} ")]
    assert small[1:] == ["384", "6.2", "224", "apache-2.0", "80.9", "a"]


def test_rows_are_ordered_by_cost_and_say_what_is_not_known() -> None:
    unusable = next(line.name for line in counted().values() if not line.dim)
    rows = table_of(["vit_h_14", unusable, "resnet18", "resnet50"])
    assert [row["name"] for row in rows] == ["resnet50", "resnet18", "vit_h_14", unusable]  # the chosen one first
    assert {row["name"]: row["gmacs"] for row in rows}["resnet18"] == facts_of("resnet18").gmacs
    lines = table_lines(rows)
    assert lines[3].split() == ["vit_h_14", "1280", "167", "224", "cc-by-nc-4.0", "-"]
    assert lines[4].split() == [unusable, "-", "-", "-", "-", "-"]
    assert any(line.startswith("*, nc: ") for line in legend(rows))
    assert any(line.startswith("-: ") for line in legend(rows))


@pytest.mark.parametrize(
    ("licence", "commercial", "gated", "pretrained", "shown"),
    [
        ("apple-amlr", False, False, True, "apple-amlr*"),
        ("cc-by-nc-4.0", False, False, True, "cc-by-nc-4.0"),
        ("fair-noncommercial-research-license", False, False, True, "fair-nc"),
        ("dinov3-license", True, True, True, "dinov3 gated"),
        ("nvidia-open-model-license", None, False, True, "nvidia-open"),
        ("qwen-community-1.0", None, False, True, "qwen"),
        (None, None, False, True, "not stated"),
        (None, None, False, False, "no weights"),
    ],
)
def test_licences_in_short(licence: Any, commercial: Any, gated: bool, pretrained: bool, shown: str) -> None:
    facts = BackboneFacts("x", 8, 1.0, 9, (224, 384), pretrained, licence, commercial, gated)
    assert table_lines([vars(facts)])[1].split() == ["x", "8", "1.0", "224x384", *shown.split(), "-"]


def test_names_too_long_for_their_figures() -> None:
    rows = [["name", "dim"], ["short", "12345"], ["n" * 30, "7"]]
    assert columns(rows, "<>", width=20) == ["name             dim", "short          12345", "n" * 30, f"{'7':>20}"]
    assert columns(rows, "<>", width=20, wrap=False)[2:] == [f"{'n' * 30}     7"]  # in a pipe a row is a line


@pytest.mark.parametrize(
    ("pattern", "found"), [("dinov4", "dinov3"), ("resnet51", "resnet50"), ("mobilnet_v2", "mobilenet_v2")]
)
def test_what_looks_like_a_pattern(pattern: str, found: str) -> None:
    assert found in near(pattern, matching())
    assert near("\x1b[31m\n", matching()) == []


def test_one_network() -> None:
    facts = describe_network("base")
    assert {**vars(facts_of("base"))}.items() <= facts.items()
    assert sum(stage["parameters"] for stage in facts["stages"]) == facts["parameters"]
    assert (facts["layer"], facts["pooling"]) == ("head", "the class token")
    assert ALIASES["base"] in facts["weights"]
    lines = network_lines(json.loads(json.dumps(facts)))
    assert lines[0] == ALIASES["base"]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for words in (
        "blocks.0-11",
        "12 x Block",
        "261 x 384",
        "21,629,952",
        "crop 224x224, bicubic",
        "k-NN 79.1 %, linear 80.9 %",
    ):
        assert words in text


def test_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("backbones")
    assert (code, out.splitlines()[0].split()) == (0, ["name", "dim", "GFLOP", "input", "licence", "linear"])
    assert [line.split()[0] for line in out.splitlines()[1 : len(CHOSEN) + 1]] == [*CHOSEN]
    assert set(backbone_names()) <= {line.split()[0] for line in out.splitlines()}  # into a pipe all
    assert f"{len(backbone_names()):,} backbones" in err
    code, out, _ = run("backbones", "squeeze", "--json")
    found = json.loads(out)
    assert found["backbones"] == backbone_names("squeeze")
    assert sorted(row["name"] for row in found["table"]) == sorted(found["backbones"])
    code, out, err = run("backbones", "squeezenet1_1")
    assert (code, out.splitlines()[0]) == (0, "squeezenet1_1")
    assert "features.0" in out
    code, out, err = run("backbones", "squeezenet1_1", "--json")
    assert json.loads(out)["network"]["dim"] == 512
    code, out, err = run("backbones", "sqeezenet")
    assert (code, out) == (0, "")
    assert "0 backbones with 'sqeezenet' in their name; near: squeezenet" in err


def test_on_a_terminal_what_most_should_choose_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for words, count in (((), len(CHOSEN)), (("--all",), len(CHOSEN) + len(set(matching()) - {*CHOSEN}))):
        screen = Terminal()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", screen)
            assert run("backbones", *words)[0] == 0
        names = [line.split()[0] for line in screen.getvalue().splitlines()[1:]]
        assert len(set(names) & {*CHOSEN, *matching()}) == count
        assert max(map(len, screen.getvalue().splitlines())) <= 80
