"""What goes to stdout, what to stderr, and that a run survives the loss of either."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_FLAGS
from faults import Program
from test_app import last_json

from featcache.cache.cache import FeatureCache
from featcache.cli import app as cli
from featcache.errors import Interrupted

Run = Callable[..., tuple[int, str, str]]

# What a command is given, with names in capitals for what is there; and a word of what it finds.
COMMANDS = {
    "extract": ("extract PHOTOS -o CACHE", "24 embeddings of 512 dimensions"),
    "fit-head": ("fit-head CACHE -o NEW --C 1", "3 classes, 24 training images"),
    "predict": ("predict MODEL CACHE -o TABLE --overwrite", "24 of 24 images labelled"),
    "evaluate": ("evaluate MODEL CACHE", "accuracy "),
    "export": ("export MODEL -o EXPORTED --force", "largest difference from the model"),
    "info": ("info MODEL", "kind: model"),
    "verify": ("verify CACHE", "24 rows, all intact"),
    "verify --repair": ("verify CACHE --repair PHOTOS", "nothing to repair"),
    "backbones": ("backbones squeezenet", "squeezenet1_1 "),
    "doctor": ("doctor --seconds 0", "torch_uses: "),
}


def arguments(text: str, trained: Path) -> list[str]:
    names = {
        "PHOTOS": "photos",
        "CACHE": "f.h5",
        "MODEL": "m",
        "NEW": "new",
        "TABLE": "t.csv",
        "EXPORTED": "e.safetensors",
    }
    extra = TINY_FLAGS if text.startswith("extract") else []
    return [str(trained / names[word]) if word in names else word for word in text.split()] + extra


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_found_goes_to_stdout(trained: Path, run: Run, command: str) -> None:
    text, found = COMMANDS[command]
    words = arguments(text, trained)
    code, out, err = run(*words)
    assert code == 0, err
    assert found in out
    assert found not in err
    code, out, err = run(*words, "--json")
    assert (code, out.count("\n")) == (0, 1)
    assert isinstance(json.loads(out), dict)
    assert found not in err
    code, out, err = run(words[0], "-q", *words[1:])
    assert (code, err) == (0, "")
    assert found in out


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("extract NOWHERE -o OUT", 1),
        ("extract PHOTOS", 2),
        ("fit-head NOWHERE -o OUT", 1),
        ("fit-head CACHE -o OUT --C small", 2),
        ("finetune NOWHERE -o OUT", 1),
        ("finetune PHOTOS -o OUT --epochs 0", 2),
        ("predict NOWHERE PHOTOS", 1),
        ("predict MODEL", 2),
        ("evaluate MODEL NOWHERE", 1),
        ("evaluate MODEL CACHE --device gpu", 2),
        ("export NOWHERE -o OUT.onnx", 1),
        ("export MODEL -o OUT.txt", 2),
        ("info NOWHERE", 1),
        ("verify NOWHERE", 1),
        ("verify CACHE --workers 2", 2),
        ("backbones --nonsense", 2),
        ("doctor --images NOWHERE --seconds 0", 1),
        ("demo --nonsense", 2),
        ("nonsense", 2),
    ],
)
def test_a_failure_is_an_object_too(trained: Path, run: Run, text: str, code: int) -> None:
    words = arguments(text.replace("OUT", str(trained / "out")), trained)
    found, out, err = run(*words, "--json")
    error = json.loads(out)["error"]  # that line and nothing else
    assert (found, error["exit_code"]) == (code, code)
    assert error["message"] in err
    assert error["type"].isidentifier()
    assert run(*words)[1] == ""
    assert run(*words, "--", "--json")[1] == ""  # the name of a file


@pytest.mark.parametrize("output", [None, "out.csv"])
def test_what_was_found_before_it_failed_is_in_the_object(trained: Path, tmp_path: Path, run: Run, output: str) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    options = ("-o", tmp_path / output) if output else ()
    code, out, _ = run("predict", trained / "m", tmp_path / "bad.jpg", *options, "--json")
    facts = last_json(out)
    assert (code, facts["refused"], facts["error"]["type"]) == (1, 1, "SourceError")
    assert out.count("\n") == (1 if output else 3)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (KeyboardInterrupt(), "Interrupted", 130),
        (Interrupted("a checkpoint is kept", 15), "Interrupted", 143),
        (OSError(28, "No space left on device"), "OSError", 1),
        (ZeroDivisionError("a bug"), "ZeroDivisionError", 1),
    ],
)
@pytest.mark.parametrize("raised_by", ["app", "supervised"])  # in the worker, and in the process that waits for it
def test_whatever_ends_a_command(
    capfd: pytest.CaptureFixture[str],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    kind: str,
    code: int,
    raised_by: str,
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, raised_by, fail)
    if kind == "ZeroDivisionError":  # keeps its traceback
        with pytest.raises(ZeroDivisionError):
            run("predict", "m", "x.jpg", "--json")
        out = capfd.readouterr().out
    else:
        found, out, _ = run("predict", "m", "x.jpg", "--json")
        assert found == code
    error_found = json.loads(out)["error"]
    assert (error_found["type"], error_found["exit_code"]) == (kind, code)


def test_more_and_fewer_words(cache: Path, tmp_path: Path, run: Run) -> None:
    for words in (("-q", "verify", cache), ("verify", cache, "--quiet")):
        code, out, err = run(*words)
        assert (code, out.count("\n"), err) == (0, 1, "")
    code, _, err = run("-q", "info", tmp_path / "nowhere")
    assert (code, err.count("\n")) == (1, 1)
    code, _, err = run("info", tmp_path / "nowhere", "-v")
    assert code == 1
    assert err.startswith("error: ")
    assert "\nTraceback (most recent call last):\n" in err
    assert run("info", tmp_path / "nowhere", "-vv") == (code, "", err)
    assert run("info", cache, "-q", "-v")[0] == 2
    assert "-q does not exist" in run("info", "--", "-q")[2]


def lose(*streams: int) -> None:
    """Close them, as a shell does by ``2>&-``; Python then has None in their place."""
    for number in streams:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def break_pipe(number: int) -> None:
    """Let a stream lead into a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.dup2(writing, number)
    os.close(reading)
    os.close(writing)


def fill(number: int) -> None:
    """Let a stream lead to a disk that is full."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


@pytest.mark.parametrize(
    "broken",
    [
        (lose, 0, 1, 2),
        (break_pipe, 2),
        (fill, 2),
        *(pytest.param(broken, marks=pytest.mark.slow) for broken in ((lose, 1), (lose, 2), (lose, 1, 2))),
    ],
    ids=lambda broken: " ".join([broken[0].__name__, *map(str, broken[1:])]),
)
def test_a_run_survives_the_loss_of_its_streams(trained: Path, tmp_path: Path, warm: Program, broken: tuple) -> None:
    command = ("extract", trained / "photos", "-o", tmp_path / "f.h5", *TINY_FLAGS, "--json")
    done = warm.check(*command, before=functools.partial(*broken))
    assert "Traceback" not in done.err
    if 1 not in broken[1:]:
        assert done.result["embedded"] == 24
    cache, expected = FeatureCache.open(tmp_path / "f.h5"), FeatureCache.open(trained / "f.h5")
    assert cache.verify() == []
    assert cache.paths == expected.paths
    np.testing.assert_allclose(cache.X, expected.X, rtol=0.01, atol=0.01)
    done = warm.check("predict", trained / "m", tmp_path / "f.h5", before=functools.partial(*broken))
    if 1 not in broken[1:]:
        assert done.out.count("\n") == 25


@pytest.mark.parametrize("command", ["info MODEL", "predict MODEL CACHE", "--version"])
@pytest.mark.parametrize(
    ("broken", "code", "words"), [(break_pipe, 128 + 13, ""), (fill, 1, "error: [Errno 28] No space left on device\n")]
)
def test_results_that_nobody_takes(
    trained: Path, warm: Program, command: str, broken: object, code: int, words: str
) -> None:
    """A reader that goes away stops the program as SIGPIPE does others; only a failure, which is 1, has a line."""
    done = warm.run(*arguments(command, trained), before=functools.partial(broken, 1))
    assert done.code == code
    assert done.err.endswith(words)
    assert "Traceback" not in done.err and "BrokenPipe" not in done.err


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    program = (
        "import os, sys; from featcache.cli.console import open_missing_streams, say; open_missing_streams()\n"
        "file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY); os.write(2, b'noise'); say('more'); print('and more')\n"
        "sys.exit(0 if file > 2 else 3)"
    )
    command = ["sh", "-c", '"$0" "$@" <&- >&- 2>&-', sys.executable, "-c", program, str(tmp_path / "file")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_name_that_stdout_cannot_show_ends_no_run(cache: Path) -> None:
    named = cache.rename(cache.with_name("ü日.h5"))
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "featcache", "verify", named]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\\xfc\\u65e5.h5: 150 rows, all intact\n")
