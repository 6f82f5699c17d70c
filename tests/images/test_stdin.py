"""A list on stdin, and tables whose images lie elsewhere, through the commands that take them."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_FLAGS, make_photos, write_photo

from featcache.cache.cache import FeatureCache
from featcache.errors import UsageError
from featcache.images.source import Source, list_images
from featcache.models.predict import predict

Run = Callable[..., tuple[int, str, str]]
Pipe = Callable[[bytes], None]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    """Put bytes (few enough for a pipe's buffer) into the stdin of this process."""
    before = os.dup(0)

    def put(data: bytes) -> None:
        read, write = os.pipe()
        os.write(write, data)
        os.close(write)
        os.dup2(read, 0)
        os.close(read)
        monkeypatch.setattr(sys, "stdin", open(0, closefd=False))  # noqa: SIM115

    yield put
    os.dup2(before, 0)
    os.close(before)


def test_a_list_on_stdin_gives_what_the_folder_gives(
    photos: Path, tmp_path: Path, pipe: Pipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("extract", "photos", "-o", "folder.h5", *TINY_FLAGS)
    assert code == 0, err
    folder = FeatureCache.open(Path("folder.h5"))
    pipe(b"".join(b"./photos/" + os.fsencode(path) + b"\0" for path in folder.paths))
    code, out, err = run("extract", "-", "-o", "list.h5", *TINY_FLAGS, "--json")
    assert (code, json.loads(out)["embedded"]) == (0, len(folder)), err
    listed = FeatureCache.open(Path("list.h5"))
    assert [*listed.paths] == [f"photos/{path}" for path in folder.paths]
    assert np.array_equal(listed.take(np.arange(len(listed))), folder.take(np.arange(len(folder))))
    assert not listed.classes


def test_a_table_on_stdin_may_have_a_root(photos: Path, pipe: Pipe, run: Run, tmp_path: Path) -> None:
    pipe(b"species;file\nred;red/00.jpg\nblue;blue/00.jpg\nblue;blue/01.jpg\n")
    code, _, err = run("extract", "-", "-o", tmp_path / "f.h5", "--root", photos, *TINY_FLAGS)
    assert code == 0, err
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert ([*cache.paths], cache.classes, [*cache.y]) == (
        ["red/00.jpg", "blue/00.jpg", "blue/01.jpg"],
        ("blue", "red"),
        [1, 0, 0],
    )


def test_predict_takes_a_list_and_prints_its_rows(
    trained: Path, pipe: Pipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    pipe(b"photos/red/00.jpg\nphotos/gone.jpg\nphotos/blue/00.jpg\n")
    code, out, err = run("predict", "m", "-")
    assert code == 0, err
    rows = [line.split(",") for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["photos/red/00.jpg", "photos/gone.jpg", "photos/blue/00.jpg"]
    assert [row[3] for row in rows] == ["ok", "refused", "ok"]


def test_predict_takes_tables_of_images_elsewhere(trained: Path, tmp_path: Path, run: Run) -> None:
    table = tmp_path / "list.tsv"
    table.write_text("Bild\tArt\nred/00.jpg\tx\nblue/00.jpg\ty\n")
    code, out, err = run("predict", trained / "m", table, "--root", trained / "photos", "--path-column", "bild")
    assert code == 0, err
    expected = [trained / "photos" / name for name in ("red/00.jpg", "blue/00.jpg")]
    assert [Path(line.split(",")[0]) for line in out.splitlines()[1:]] == expected
    for other, what in ((trained / "photos", "folder"), (expected[0], "single image"), (trained / "f.h5", "cache")):
        with pytest.raises(UsageError, match=f"--root says how a table is read, and .* is a {what}; leave it out"):
            predict(trained / "m", Source(other, root=tmp_path))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict m - -", "can be read once; give it once"),
        (
            "predict m a.jpg -o -",
            "-o takes the name of what is to be written, found -; predict without -o writes to stdout",
        ),
        ("extract photos --output -", "-o takes the name of what is to be written"),
        ("fit-head f.h5 -o -", "-o takes the name of what is to be written"),
        ("export m --output=-", "-o takes the name of what is to be written"),
        ("predict m -", "stdin is empty; expected a table of images, or a path on each line"),
        ("predict - photos", "- "),
        ("evaluate - photos", "- "),
        ("verify - --repair photos", "- "),
        ("extract -o f.h5 -- -", "stdin is empty"),
    ],
)
def test_dashes_that_stand_for_nothing_are_refused(
    model: Path, pipe: Pipe, run: Run, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(model.parent)
    make_photos(Path("photos"), each=1)
    pipe(b"")
    before = sorted(Path().iterdir())
    code, out, err = run(*command.split())
    assert code in (1, 2), err
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert sorted(Path().iterdir()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_is_not_waited_for(pipe: Pipe, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(b"")
    terminal, keyboard = os.openpty()
    os.dup2(keyboard, 0)
    os.write(terminal, b"\x04")  # the end of what is typed, for whoever waits
    code, _, err = run("predict", "m", "-")
    os.close(terminal)
    os.close(keyboard)
    assert (code, "`find photos -name '*.jpg' | featcache ... -`; nothing is" in err) == (2, True), err


def test_several_processes_do_not_share_a_pipe(pipe: Pipe, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would get a part of the list."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    pipe(b"a.jpg\n")
    code, _, err = run("finetune", "-", "-o", "m")
    assert (code, "several processes cannot all read; give a file" in err) == (2, True), err


def test_python_is_told_that_a_pipe_is_the_command_lines(pipe: Pipe) -> None:
    pipe(b"a.jpg\n")
    with pytest.raises(UsageError, match="- is for the command line"):
        list_images("-")


def test_a_cache_of_a_table_elsewhere_is_kept_up_to_date_and_mended(tmp_path: Path, pipe: Pipe, run: Run) -> None:
    photos, table, cache = (
        make_photos(tmp_path / "photos", each=2, settled=True),
        tmp_path / "lists" / "t.csv",
        tmp_path / "f.h5",
    )
    table.parent.mkdir()
    rows = [f"{path.relative_to(photos).as_posix()},{path.parent.name}\n" for path in sorted(photos.rglob("*.jpg"))]
    table.write_text("image,kind\n" + "".join(rows))
    options = ("--root", photos, "--label-column", "kind")
    code, _, err = run("extract", table, "-o", cache, *options, *TINY_FLAGS)
    assert code == 0, err
    whole = cache.read_bytes()
    code, out, err = run("extract", table, "-o", cache, *options, *TINY_FLAGS, "--json")
    found = json.loads(out)
    assert (code, found["reused"], found["embedded"], found["added"], found["removed"]) == (0, 6, 0, 0, 0), err
    assert cache.read_bytes() == whole
    at = whole.index(b"blue/00.jpg")
    cache.write_bytes(whole[:at] + b"XXXX" + whole[at + 4 :])
    code, _, err = run("verify", cache)
    assert (code, "paths" in err) == (1, True), err
    pipe(table.read_bytes())
    code, _, err = run("verify", cache, "--repair=-", *options)
    assert code == 0, err
    assert [*FeatureCache.open(cache).paths] == [row.split(",")[0] for row in rows]
    shutil.rmtree(photos / "red")
    write_photo(photos / "blue" / "00.jpg", (200, 1, 2), 9)
    code, out, _ = run("extract", table, "-o", cache, *options, *TINY_FLAGS, "--json", "--max-bad", 1)
    found = json.loads(out)
    assert (code, found["changed"], found["removed"], found["refused"]) == (0, 1, 2, 2)
