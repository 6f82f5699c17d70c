"""Rows filled by processes are those that threads fill, wherever the images lie and whatever is wrong with them."""

import io
import os
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, write_photo
from corpus import exif_of, saved
from PIL import Image

from featcache.images import fill as module
from featcache.images.fill import Fill, FillByProcesses, decoder, filler
from featcache.images.formats import Brightest
from featcache.images.gpu_jpeg import Undecoded
from featcache.images.read import ImageFiles, Paths
from featcache.images.source import list_images
from featcache.spec import PreprocessSpec
from featcache.system.worker_processes import SharedMemory, WorkerProcesses, WorkersLost

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
SPEC = PreprocessSpec(resize=40, crop=(32, 24), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
BY_GPU = PreprocessSpec(
    resize=40, crop=(32, 24), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, decode="gpu"
)


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkerProcesses]:
    found = WorkerProcesses(2, (module.__name__,))
    found.wait()
    assert found.ready
    yield found
    found.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fill")
    for number, (name, colour) in enumerate(COLOURS.items()):
        for each in range(4):
            write_photo(folder / name / f"{each}.jpg", colour, number, size=(80, 60 + 7 * each))
    whole = (folder / "red" / "0.jpg").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (200, 210, 3), dtype=np.uint8)
    (folder / "red" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "red" / "empty.jpg").touch()
    (folder / "red" / "none.jpg").write_text("no image")
    (folder / "red" / "turned.jpg").write_bytes(saved(noise, "JPEG", exif=exif_of(6)))
    (folder / "red" / "larger than its row.jpg").write_bytes(saved(noise, "JPEG", quality=100, subsampling=0))
    Image.fromarray(np.full((50, 60), 900, np.uint16)).save(folder / "red" / "16 bits.png")
    for path in folder.rglob("*.*"):
        # Of a file that was just written, the second reader may know a time that the first did not trust yet.
        os.utime(path, (1e9, 1e9))
    return folder


def both(files: ImageFiles, spec: PreprocessSpec, processes: WorkerProcesses) -> tuple[list[Any], list[Any], Any, Any]:
    """What threads and processes make of ``files``, five at a time, and what they have seen."""
    n = len(files.paths)
    memory, seen = SharedMemory(n * 32 * 24 * 3), (Brightest(), Brightest())
    others = np.zeros((n, 32, 24, 3), np.uint8)
    ways = (
        (Fill(files, decoder(spec), seen[0]), others),
        (
            FillByProcesses(files, decoder(spec), seen[1], processes=processes, memory=memory),
            memory.array.reshape(others.shape),
        ),
    )
    found = [
        [read for k in range(0, n, 5) for read in fill(range(k, min(k + 5, n)), rows[k : k + 5])] for fill, rows in ways
    ]
    for reads, (_, rows) in zip(found, ways, strict=True):
        for row, read in zip(rows, reads, strict=True):
            inside = read.value.data if isinstance(read.value, Undecoded) else read.value
            assert inside is None or isinstance(inside, bytes) or np.shares_memory(row, inside), "in its own row"
    return found[0], found[1], *seen


def assert_same(one: list[Any], other: list[Any]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine._replace(value=None) == theirs._replace(value=None)
        assert type(mine.value) is type(theirs.value)
        if isinstance(mine.value, Undecoded):
            assert bytes(mine.value.data) == bytes(theirs.value.data) and mine.value.pixels == theirs.value.pixels
        elif mine.value is not None:
            np.testing.assert_array_equal(mine.value, theirs.value)


@pytest.mark.parametrize("spec", [SPEC, BY_GPU], ids=["full", "gpu"])
def test_files(photos: Path, processes: WorkerProcesses, spec: PreprocessSpec) -> None:
    threads, by_processes, *seen = both(list_images(photos), spec, processes)
    assert_same(threads, by_processes)
    refused = [read.reason for read in by_processes if read.value is None]
    assert len(refused) == 3 and len(by_processes) == 4 * len(COLOURS) + 6
    assert [(each.images, each.sample) for each in seen] == [(1, 900)] * 2
    if spec is BY_GPU:
        left = [read.value for read in by_processes if isinstance(read.value, Undecoded)]
        assert len(left) == 4 * len(COLOURS) + 1
        assert {type(value.data) for value in left} == {bytes, np.ndarray}, "some are larger than their rows"


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_are_read_here_and_decoded_there(
    photos: Path, processes: WorkerProcesses, tmp_path: Path, kind: str
) -> None:
    archive, files = tmp_path / f"photos.{kind}", sorted(path for path in photos.rglob("*") if path.is_file())
    if kind == "tar":
        with tarfile.open(archive, "w") as tar:
            for path in files:
                tar.add(path, path.relative_to(photos))
    else:
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in files:
                zipped.write(path, path.relative_to(photos))
    assert_same(*both(list_images(archive), SPEC, processes)[:2])


def test_images_in_memory_and_paths_that_are_no_good(photos: Path, processes: WorkerProcesses) -> None:
    held: dict[int, Any] = {
        1: Image.open(io.BytesIO((photos / "red" / "1.jpg").read_bytes())),
        3: np.full((9, 50, 3), 7, np.uint8),
    }
    names = ("red/0.jpg", "a", "../red/0.jpg", "b", "red/gone.jpg", "red/2.jpg", "red", "red/3.jpg")
    threads, by_processes, *_ = both(Paths(photos, names, held), SPEC, processes)
    assert_same(threads, by_processes)
    assert [read.value is not None for read in by_processes] == [True, True, False, True, False, True, False, True]


def test_an_image_that_crashes_its_decoder_costs_no_other(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own kind: its decoder kills it at one image, again and again."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "support")
    processes = WorkerProcesses(2, ("crashing",))
    processes.wait()
    monkeypatch.setattr(module, "__name__", "crashing")
    try:
        files = Paths(photos, tuple(f"{name}/{k}.jpg" for name in COLOURS for k in range(4)))
        memory = SharedMemory(len(files.paths) * 32 * 24 * 3)
        fill = FillByProcesses(files, decoder(SPEC), Brightest(), processes=processes, memory=memory)
        found = fill(range(len(files.paths)), memory.array.reshape(-1, 32, 24, 3))
    finally:
        processes.close()
    refused = {files.paths[read.position]: read.reason for read in found if read.value is None}
    assert refused == {"red/2.jpg": "its decoder crashed (SIGSEGV)"}
    expected = Fill(files, decoder(SPEC), Brightest())(
        range(len(files.paths)), np.zeros((len(files.paths), 32, 24, 3), np.uint8)
    )
    kept = [k for k, read in enumerate(found) if read.value is not None]
    assert_same([expected[k] for k in kept], [found[k] for k in kept])


def test_threads_go_on_where_processes_are_lost(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Lost:
        ready = True

        def call(self, *_: object) -> Any:
            self.ready = False
            raise WorkersLost

    files: Any = list_images(photos)
    memory = SharedMemory(len(files) * 32 * 24 * 3)
    fill = FillByProcesses(files, decoder(SPEC), Brightest(), processes=Lost(), memory=memory)  # type: ignore[arg-type]
    found = fill(range(len(files)), memory.array.reshape(-1, 32, 24, 3))
    assert sum(read.value is not None for read in found) == len(files) - 3
    assert "were killed, perhaps for want of memory: threads go on" in caplog.text


def test_what_is_worth_processes(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many images, and cores; asked before anything is started."""
    started = []
    monkeypatch.setattr(module, "worker_processes", lambda count, *modules: started.append((count, modules)))
    monkeypatch.setattr(module, "usable_cores", lambda: 16)
    many = Paths(photos, ("red/0.jpg",) * 4096)
    for files, workers in ((many, 5), (Paths(photos, many.paths[:-1]), 16), (many, 16)):
        fill, memory = filler(files, SPEC, Brightest(), workers=workers, shape=(5, 8, 32, 24, 3))
        assert (type(fill), memory) == (Fill, None)
    assert started == [(16, (module.__name__,))]
    monkeypatch.setattr(module, "usable_cores", lambda: 5)
    filler(many, SPEC, Brightest(), workers=16, shape=(5, 8, 32, 24, 3))
    assert len(started) == 1
