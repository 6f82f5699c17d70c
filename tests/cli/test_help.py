"""The help: complete, in groups, and whole on narrow terminals."""

import re

import pytest
import typer

from featcache.cli.app import app
from featcache.cli.help import PANELS

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_group_and_a_text(command: str) -> None:
    options = [param for param in COMMANDS[command].params if param.param_type_name == "option"]
    assert "as_json" in {option.name for option in options}
    for option in options:
        assert option.rich_help_panel in PANELS, option.name
        assert option.help, option.name
        assert option.is_flag or option.metavar.isupper(), option.name


def shown(run, *words: str) -> str:
    """What a terminal would show, without colours, which some machines ask for."""
    return re.sub(r"\x1b\[[\d;]*m", "", run(*words)[1])


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_whole_on_a_narrow_terminal(run, monkeypatch: pytest.MonkeyPatch, command: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = shown(run, *command.split(), "--help")
    panels, _, examples = out.rpartition("╯\n")
    assert "…" not in out
    assert max(map(len, panels.splitlines())) <= width
    assert max(map(len, examples.splitlines())) <= 80  # to be copied, so never broken
    words = out.split()
    for param in COMMANDS[command].params if command else ():
        assert {word for word in param.opts if word.startswith("--")} <= set(words)
        assert set(param.help.split()) <= set(words), param.name
    assert "".join(out.replace("│", " ").split()).count("[required]") == sum(
        param.required for param in (COMMANDS[command].params if command else ())
    )


def test_defaults_are_said_where_they_say_something(run) -> None:
    out = " ".join(shown(run, "extract", "--help").replace("│", " ").split())
    assert "Default: that of the cache at -o, else DINOv2, small on a CPU, base on a GPU;" in out
    assert "Default: 0.05." in out
    assert "Default: auto" not in out and "[default" not in out


def test_common_options_come_first_and_the_work_in_its_order(run) -> None:
    out = shown(run, "extract", "--help")
    assert re.findall(r"─ (\w+) ─", out) == ["Arguments", "Output", "Backbone", "Input", "Speed"]
    assert out.index("--output") < out.index("--force") < out.index("--json")
    assert re.findall(r"─ (\w+) ─", shown(run, "finetune", "--help"))[2] == "Training"
    listed = [line.split()[1] for line in shown(run).splitlines() if re.match(r"│ [a-z]", line)]
    assert listed == list(COMMANDS)  # each on one line
