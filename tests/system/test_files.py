"""What other systems do otherwise, pretended: Windows' open files, the cache of a Mac's drive, locks on NFS. And trees."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY_FLAGS

from featcache.errors import StorageError
from featcache.system import files
from featcache.system.workdir import locked

fcntl = pytest.importorskip("fcntl")
has_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are looked up there")


def in_use(winerror: int) -> PermissionError:
    error = PermissionError(errno.EACCES, "Access is denied")
    error.winerror = winerror  # type: ignore[attr-defined]
    return error


def is_open(path: Path) -> bool:
    return any(os.path.realpath(link) == os.path.realpath(path) for link in Path("/proc/self/fd").iterdir())


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither renames nor removes a file that is open."""
    for module in ("files", "workdir"):
        monkeypatch.setattr(f"featcache.system.{module}.os", SimpleNamespace(**vars(os) | {"name": "nt"}))

    def unless_open(call: Callable[..., object]) -> Callable[..., object]:
        def checked(path: Path, *arguments: object, **options: object) -> object:
            if is_open(path):
                raise in_use(32)
            return call(path, *arguments, **options)

        return checked

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, unless_open(getattr(Path, name)))


@has_proc
@pytest.mark.usefixtures("windows")
def test_windows_publishes_and_leaves_no_lock_behind(tmp_path: Path) -> None:
    with files.publish_file(tmp_path / "f.h5") as file:
        file.write(b"whole")
    with locked(tmp_path / "f.h5.parts"):
        assert (tmp_path / "f.h5.parts" / "lock").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5"]


@pytest.mark.parametrize("winerror", [5, 32])
@pytest.mark.parametrize("folder", [False, True])
def test_a_reader_that_has_the_target_open_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winerror: int, folder: bool
) -> None:
    replace, tries = Path.replace, iter([in_use(winerror)] * 3)

    def busy(source: Path, target: Path) -> Path:
        for error in tries:
            raise error
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", busy)
    if folder:
        with files.publish_folder(tmp_path / "m") as temporary:
            monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as where the system has none
            (temporary / "model.json").write_text("{}")
    else:
        with files.publish_file(tmp_path / "m") as file:
            file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not list(tries)


def test_a_reader_that_stays_is_named_as_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(source: Path, target: Path) -> Path:
        raise in_use(32)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(files, "_PATIENCE", 0.2)
    (tmp_path / "f").write_text("old")
    with pytest.raises(StorageError, match="close the program that has it open"), files.publish_file(tmp_path / "f"):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_permission_that_is_missing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(source: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", forbidden)
    monkeypatch.setattr(files.time, "sleep", None)
    with pytest.raises(StorageError, match="Permission denied; mend that"), files.publish_file(tmp_path / "f"):
        pass


@pytest.mark.parametrize("able", [True, False])
def test_on_a_mac_the_drives_own_cache_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    """fcntl(F_FULLFSYNC), by file and folder; fsync where the file system cannot."""
    called: list[object] = []

    def control(descriptor: int, command: int) -> int:
        called.append(command)
        if not able:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: called.append("fsync"))
    with files.publish_file(tmp_path / "f") as file:
        file.write(b"whole")
    assert called == ([51, 51] if able else [51, "fsync"] * 2)


def test_nfs_locks_for_itself_only_what_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def emulated(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_EX and not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", emulated)
    left_over = tmp_path / ".f.1-0123abcd.tmp"
    left_over.write_bytes(b"half")
    with files.publish_file(tmp_path / "f") as file:
        file.write(b"whole")
        files.sweep(tmp_path)  # as another process would
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_link_that_is_named_is_followed_and_one_in_the_place_of_our_own_files_is_not(tmp_path: Path) -> None:
    """Whoever hands over a folder of unfinished work could otherwise choose which file of the user is overwritten."""
    for folder in ("real", "links"):
        (tmp_path / folder).mkdir()
    target, link = tmp_path / "real" / "f", tmp_path / "links" / "f"
    target.write_bytes(b"before")
    link.symlink_to(target)
    with files.publish_file(link, staging=link.parent) as file:  # which may be on another disk
        file.write(b"after")
        assert [path.name for path in link.parent.iterdir()] == ["f"]
    assert (link.is_symlink(), target.read_bytes()) == (True, b"after")
    with files.publish_file(link, own=True) as file:
        file.write(b"ours")
    assert (link.is_symlink(), link.read_bytes(), target.read_bytes()) == (False, b"ours", b"after")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "f")
    with pytest.raises(StorageError, match="the folder .*nowhere does not exist"):
        files.check_output(tmp_path / "gone")


@has_proc
def test_a_name_is_durable_only_once_its_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content before it gets its name, then the folder that holds the name."""
    synced: list[tuple[str, list[str]]] = []

    def sync(descriptor: int) -> None:
        synced.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), sorted(os.listdir(tmp_path))))

    monkeypatch.setattr(files, "_sync", sync)
    with files.publish_file(tmp_path / "f") as file:
        file.write(b"x")
    (content, before), (folder, after) = synced
    assert Path(content).parent == tmp_path
    assert (folder, after) == (str(tmp_path), ["f"])
    assert "f" not in before
    synced.clear()
    with files.publish_folder(tmp_path / "m") as made:
        (made / "part").write_bytes(b"x")
    assert Path(synced[0][0]).name == "part"  # what is in it first, the folder that names it last
    assert [path for path, _ in synced[1:]][-1] == str(tmp_path)


def test_a_tree_with_links_appears_whole_and_replaces_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jpg"
    mine.write_bytes(b"mine")
    mine.chmod(0o400)
    before = mine.stat().st_mtime_ns
    (tmp_path / "out").mkdir()
    with files.publish_folder(tmp_path / "out", replace=False) as folder:
        (folder / "train" / "a").mkdir(parents=True)
        (folder / "train" / "a" / "1.jpg").hardlink_to(mine)
        assert not [*(tmp_path / "out").iterdir()]
    assert (tmp_path / "out/train/a/1.jpg").read_bytes() == b"mine"
    assert (mine.stat().st_mtime_ns, mine.stat().st_mode & 0o777) == (before, 0o400)
    with pytest.raises(StorageError), files.publish_folder(tmp_path / "out", replace=False) as folder:
        (folder / "2.jpg").touch()
    assert [path.name for path in (tmp_path / "out").rglob("*.jpg")] == ["1.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jpg", "out"]


@pytest.mark.parametrize("character", ["n", "\u5199", "\U0001f9d1"])
def test_a_name_that_fits_is_written_whatever_its_characters(tmp_path: Path, character: str) -> None:
    """Also as a temporary file, whose name is made of it; one byte more is refused before any work."""
    size = len(character.encode())
    path = tmp_path / (character * (255 // size) + "x" * (255 % size))
    files.check_output(path)
    with files.publish_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole" and len([*tmp_path.iterdir()]) == 1
    for long, beside in (
        (path.with_name(f"{path.name}x"), ""),
        (path, ".parts"),
        (path.with_name(f"{path.name}x"), "y"),
    ):
        bytes_ = len(os.fsencode(long.name + beside))
        with pytest.raises(StorageError, match=f"would have {bytes_} bytes, and may have 255; choose a shorter -o$"):
            files.check_output(long, beside=beside)
    with pytest.raises(StorageError, match="does not exist; create it first"):
        files.check_output(tmp_path / f"{path.name}x" / "f.h5")


@pytest.mark.parametrize("length", [215, 225, 235, 250, 260])
def test_a_name_too_long_for_what_lies_beside_it_is_refused_at_once(
    photos: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run, length: int
) -> None:
    monkeypatch.chdir(tmp_path)
    before, name = {*tmp_path.iterdir()}, "n" * length
    commands = {
        f"{name}.012345678901.safetensors": [
            ("extract", photos, *TINY_FLAGS),
            ("extract", photos, *TINY_FLAGS, "--part", "1/2"),
            ("merge",),
        ],
        f"{name}.features.h5.012345678901.safetensors": [("fit-head", cache), ("finetune", photos, *TINY_FLAGS)],
        f"{name}.parts": [("import", tmp_path / "v.npz")],
    }
    np.savez(tmp_path / "v.npz", vector=np.ones((3, 2), np.float32), path=["a", "b", "c"])
    before.add(tmp_path / "v.npz")
    for longest, each in commands.items():
        for command in each if len(longest) > 255 else []:
            code, _, err = run(*command, *(() if command == ("merge",) else ("-o",)), name)
            assert (code, f"would have {len(longest)} bytes" in err.splitlines()[-1]) == (1, True), (command, err)
    assert {*tmp_path.iterdir()} == before
