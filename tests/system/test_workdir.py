"""Where unfinished work lies, and who may write there."""

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
