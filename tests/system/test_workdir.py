"""Where unfinished work lies, and who may write there."""

import contextlib
from pathlib import Path

import pytest

from featcache.errors import StorageError
from featcache.system.workdir import locked, work_folder


def test_it_lies_beside_its_output() -> None:
    assert work_folder(Path("features.h5")) == Path("features.h5.parts")
    assert work_folder(Path("runs/model-ft/")) == Path("runs/model-ft.parts")


def test_nothing_is_left_but_what_is_unfinished(tmp_path: Path) -> None:
    folder = tmp_path / "f.h5.parts"
    with locked(folder):
        assert (folder / "lock").is_file()
    assert not folder.exists()
    with pytest.raises(RuntimeError, match="half done"), locked(folder):
        (folder / "part").touch()
        raise RuntimeError("half done")
    assert [path.name for path in folder.iterdir()] == ["part"]
    with locked(folder):
        (folder / "part").unlink()
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "f.h5.parts").touch()
    with (
        pytest.raises(StorageError, match="cannot write in .*f.h5.parts: File exists"),
        locked(tmp_path / "f.h5.parts"),
    ):
        pytest.fail("it was locked")


@pytest.mark.parametrize("unfinished", [False, True])
def test_whoever_waits_never_holds_a_lock_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfinished: bool
) -> None:
    """The holder removes the file and lets go just after the waiter has opened it: filelock notices since 3.21."""
    fcntl = pytest.importorskip("fcntl")
    folder, holder, flock = tmp_path / "f.h5.parts", contextlib.ExitStack(), fcntl.flock
    holder.enter_context(locked(folder))
    if unfinished:
        (folder / "part").touch()

    def overtaken(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        holder.close()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    with locked(folder):
        assert (folder / "lock").is_file()
        assert fcntl.flock is flock  # it came to that
