"""Progress: what is printed about speed is what was measured."""

import pytest

from featcache.cli import console as display


def test_rate_counts_from_the_start_of_embedding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(display.time, "perf_counter", lambda: clock[0])
    with display.show_progress("embedding") as progress:
        clock[0] = 160.0  # a minute of loading does not count
        progress(0, 1000, "decode")
        clock[0] = 164.0
        progress(8, 1000, "decode")
        progress(16, 1000, "forward")  # results come in bunches: the rate must not jump to millions
        clock[0] = 180.0
        progress(200, 1000, "forward")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "embedding 8/1000, 2 images/s, limited by decode, 496 s left"
    assert lines[1:] == ["embedding 200/1000, 10 images/s, limited by forward, 80 s left"]


def test_names_cannot_command_a_terminal() -> None:
    assert display.printable("a\x1b[2Jb\nc\udce9ü") == "a\\x1b[2Jb\\nc\\udce9ü"


def test_facts_become_lines() -> None:
    facts = {"a": 1, "b": {"c": [1, 2], "d": {}}, "e": [{"path": "x\ny", "reason": "z"}], "f": [], "g": None, "h": True}
    lines = [line for key, value in facts.items() for line in display.facts_as_lines(key, value, "")]
    assert lines == [
        "a: 1",
        "b:",
        "  c: 1, 2",
        "  d: none",
        "e:",
        "  path: x\\ny, reason: z",
        "f: none",
        "g: none",
        "h: yes",
    ]
