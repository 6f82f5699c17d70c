"""What the user sees: speeds as measured, a line now and then in a log, a bar on a terminal, names that are harmless."""

import io
import math
import re
import sys
from pathlib import Path

import pytest

from featcache.cli import console
from featcache.finetuning.trainer import Status
from featcache.system.workdir import work_folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def test_rate_counts_from_the_start_of_embedding(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.show_progress("embedding") as progress:
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


def test_training_counts_over_all_epochs(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.show_training() as progress:
        clock[0] = 140.0
        progress(Status(epoch=1, epochs=3, done=10, total=100, loss=math.nan, accuracy=math.nan))
        clock[0] = 160.0
        progress(Status(epoch=1, epochs=3, done=90, total=100, loss=1.25, accuracy=0.5))  # too soon for a line
        clock[0] = 170.0
        progress(Status(epoch=2, epochs=3, done=70, total=100, loss=0.5, accuracy=0.75))
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/3, image 10/100: loss not known yet, starting",
        "epoch 2/3, image 70/100: loss 0.5000, accuracy 75.00%, 5.3 images/s, at most 0 min 24 s left",
    ]


def test_what_comes_before_training_is_counted_by_its_kind(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.show_training() as progress:
        progress(0, 1000, "embedding")
        clock[0] += 40.0
        progress(400, 1000, "embedding")
        progress(16, 800, "decoding train")
        clock[0] += 31.0
        progress(636, 800, "decoding train")
        clock[0] += 31.0
        progress(Status(epoch=1, epochs=2, done=10, total=100, loss=0.5, accuracy=0.75))
    assert capsys.readouterr().err.splitlines() == [
        "embedding 400/1000, 10 images/s, 60 s left",
        "decoding train 636/800, 20 images/s, 8 s left",
        "epoch 1/2, image 10/100: loss 0.5000, accuracy 75.00%, starting",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with console.show_progress("embedding") as progress:
        progress(0, 1000, "decode")
        progress(250, 1000, "forward")
    with console.show_training() as progress:
        progress(Status(epoch=2, epochs=3, done=50, total=100, loss=0.5, accuracy=0.75))
    text = terminal.getvalue()
    frames = re.sub(r"\x1b\[[\d;]*m", "", text)  # without colours
    assert re.search(r"embedding \S+ +0/1000 0 images/s, limited by decode, left -:--:--", frames)
    assert re.search(r"embedding \S+ +250/1000 [\d,]+ images/s, limited by forward, left [-\d]:", frames)
    assert re.search(r"epoch 2/3 \S+ +50/100 loss 0.5000, accuracy 75.00%, starting", frames)
    assert text.endswith("\r\x1b[1A\x1b[2K")  # the line is erased


@pytest.mark.parametrize("width", [36, 40, 60, 80, 120])
def test_a_narrow_terminal_shows_count_and_time_left(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    with console.show_progress("embedding") as progress:
        progress(0, 1000, "decode")
        progress(250, 1000, "forward")
    frames = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert re.search(r"embedding .*250/1000 .*left [-\d]:[-\d]{2}:[-\d]{2}", frames) and "…" not in frames


def test_a_bar_goes_away_when_what_it_shows_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said next is not broken into lines of the terminal's width, and no bar that stands still is below it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with console.show_training() as progress:
        for report in (
            [(0, 80, "embedding"), (80, 80, "embedding")],
            [(16, 32, "decoding val"), (32, 32, "decoding val")],
            [(Status(1, 2, done, 80, loss=0.5, accuracy=0.75),) for done in (40, 80)]
            + [(Status(2, 2, done, 80, loss=0.5, accuracy=0.75),) for done in (40, 80)],
        ):
            for values in report:
                progress(*values)
            assert terminal.getvalue().endswith("\r\x1b[1A\x1b[2K")
            console.say("a long line " * 9)
            assert terminal.getvalue().endswith("a long line " * 9 + "\n")
    frames = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert re.findall(r"(embedding|decoding val|epoch 2/2) \S+ +(\d+/\d+)", frames)


def test_an_interruption_promises_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for finished in (False, True):
        if finished:
            work_folder(tmp_path / "f.h5").mkdir()
        with pytest.raises(KeyboardInterrupt), console.interruptible(tmp_path / "f.h5"):
            raise KeyboardInterrupt
        assert ("finished work is kept in" in capsys.readouterr().err) == finished


def test_silence() -> None:
    with console.show_progress("predicting", show=False) as progress:
        assert progress is None


def test_names_cannot_command_a_terminal() -> None:
    assert console.printable("a\x1b[2Jb\nc\udce9ü") == "a\\x1b[2Jb\\nc\\udce9ü"


def test_facts_become_lines() -> None:
    facts = {"a": 1, "b": {"c": [1, 2], "d": {}}, "e": [{"path": "x\ny", "reason": "z"}], "f": [], "g": None, "h": True}
    assert list(console.facts_as_lines(facts)) == [
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
