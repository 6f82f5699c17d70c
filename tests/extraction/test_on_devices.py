"""Several GPUs of one machine, with CPUs for GPUs: the same bytes, also when a process dies; and which devices are taken."""

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, make_photos

from featcache.cache.cache import FeatureCache
from featcache.errors import StorageError, UsageError
from featcache.extraction import on_devices
from featcache.extraction.executors import Published, Work, run_here, run_part
from featcache.extraction.extract import extract
from featcache.extraction.on_devices import OnDevices, executor_for, own_device


class _Here:
    """A pool of one process that is this one; of the blocks that it is given first, ``deaths`` end in its death."""

    deaths = 0

    def __init__(self, _workers: int, _context: Any, begin: Any, arguments: tuple[Work]) -> None:
        begin(*arguments)

    def __enter__(self) -> "_Here":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, call: Any, block: Any) -> Any:
        def result() -> Any:
            if type(self).deaths:
                type(self).deaths -= 1
                raise on_devices.BrokenProcessPool
            return call(block)

        return SimpleNamespace(result=result)


prepared: list[Any] = []


def embedded_on(devices: tuple[str, ...], photos: Path, output: Path, progress: Any = None) -> FeatureCache:
    """What ``extract`` makes with this executor."""

    def executor(work: Work, positions: Any, *, progress: Any = None) -> Published:
        prepared[:] = [work.prepare()]
        return OnDevices(devices, prepared[0])(work, positions, progress=progress)

    extract(photos, output, TINY, executor=executor, progress=progress)
    return FeatureCache.open(output)


def assert_same(first: FeatureCache, second: FeatureCache) -> None:
    assert (first.rows.equals(second.rows), first.refused) == (True, second.refused)
    assert first.X.tobytes() == second.X.tobytes()


@pytest.mark.parametrize("deaths", [1, 9])
def test_blocks_go_to_whoever_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, deaths: int
) -> None:
    """A process that dies is started again; after the third the others do its work."""
    photos = make_photos(tmp_path / "p", settled=True)
    (photos / "red" / "broken.jpg").write_bytes(b"no")
    os.utime(photos / "red" / "broken.jpg", (1e9, 1e9))
    extract(photos, tmp_path / "one.h5", TINY)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", _Here)
    monkeypatch.setattr(_Here, "deaths", deaths)

    def begin(work: Work) -> None:  # with an embedder that is there: networks are not traced on two threads at once
        monkeypatch.setattr(on_devices, "_work", work)
        monkeypatch.setattr(on_devices, "_embedder", prepared[0])

    monkeypatch.setattr(on_devices, "_begin", begin)
    seen: list[tuple[int, int]] = []
    found = embedded_on(("cpu", "cpu"), photos, tmp_path / "f.h5", lambda done, total, _: seen.append((done, total)))
    assert_same(found, FeatureCache.open(tmp_path / "one.h5"))
    assert (seen[0], seen[-1]) == ((0, 19), (19, 19))
    assert sorted(seen) == seen
    said = [record.getMessage() for record in caplog.records if "died" in record.getMessage()]
    assert len(said) <= min(deaths, 3)


def test_an_error_that_is_no_death_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise StorageError("disk full")

    monkeypatch.setattr(on_devices, "run_part", full)
    with pytest.raises(StorageError, match="disk full"):
        embedded_on(("cpu",), make_photos(tmp_path / "p"), tmp_path / "f.h5")


@pytest.mark.slow
def test_real_processes_one_of_which_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = make_photos(tmp_path / "p", each=200, settled=True)
    extract(photos, tmp_path / "one.h5", TINY)
    killed: list[int] = []

    def progress(_done: int, _total: int, _: str) -> None:
        if not killed and (children := multiprocessing.active_children()):
            killed.append(children[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    found = embedded_on(("cpu", "cpu"), photos, tmp_path / "f.h5", progress)
    assert_same(found, FeatureCache.open(tmp_path / "one.h5"))
    assert killed


def test_who_embeds(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cuda")))
    cpu: Any = SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for device in ("auto", "cuda:all"):
        found = executor_for(device, gpu, 10**6)
        assert isinstance(found, OnDevices)
        assert found.devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
        assert len(executor_for(device, gpu, 3000).devices) == 2  # type: ignore[attr-defined]
    for device, embedder, images in (
        ("cuda", gpu, 10**6),
        ("cuda:1", gpu, 10**6),
        ("auto", cpu, 10**6),
        ("auto", gpu, 100),
    ):
        assert executor_for(device, embedder, images).func is run_here  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert executor_for("cuda:all", gpu, 10**6).func is run_here  # type: ignore[attr-defined]


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    monkeypatch.setattr(on_devices, "usable_cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("auto", None, environ) == ("cuda:3", 4)
    assert own_device("cpu", 2, environ) == ("cpu", 2)
    assert (
        own_device("auto", None, {})
        == own_device("auto", None, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
        == ("auto", None)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert own_device("auto", None, environ) == ("auto", 4)


def test_all_gpus_where_there_are_none(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are some")
    with pytest.raises(UsageError, match="device 'cuda:all' is not on this machine, which has: .*; auto takes"):
        extract(make_photos(tmp_path / "p"), tmp_path / "f.h5", TINY, device="cuda:all")


def test_work_can_be_sent_elsewhere(tmp_path: Path) -> None:
    """By pickle; the embedder is made there, and what it makes is what this process makes."""
    import pickle

    photos = make_photos(tmp_path / "p", settled=True)
    extract(photos, tmp_path / "one.h5", TINY)

    def executor(work: Work, positions: Any, *, progress: Any = None) -> Published:
        data = pickle.dumps(work)
        names = run_part(pickle.loads(data), positions[::-1][:7][::-1])
        names += run_part(pickle.loads(data), positions[:12])  # some of them twice
        return Published(work.folder, names, 0.0)

    extract(photos, tmp_path / "f.h5", TINY, executor=executor)
    assert_same(FeatureCache.open(tmp_path / "f.h5"), FeatureCache.open(tmp_path / "one.h5"))
