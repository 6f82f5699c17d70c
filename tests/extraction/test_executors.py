"""Executors: what all pass, and what each is alone in. See ``featcache.testing.executors``."""

import contextlib
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import SPEC
from objects import Bucket, allow_this_machine, environment, files_of, forwarded, s3_server, serving
from packing import parquet, tar, zipped

from featcache.cache.format import Provenance
from featcache.errors import NoAccessError, RefusedImage, StorageError, UsageError
from featcache.extraction import on_ray
from featcache.extraction.executors import Published, Work, blocks, run_here, run_part
from featcache.extraction.on_ray import RayExecutor, _share, _stderr_into_log, _unseen, _watched
from featcache.images.source import ImageList, list_images
from featcache.system.path_kinds import as_path
from featcache.testing.executors import ExecutorContract, pictures


class TestInProcess(ExecutorContract):
    def executor(self) -> Any:
        return run_here


class TestInPieces(ExecutorContract):
    """As any scheduler would: block by block, in any order, and some of them twice."""

    def executor(self) -> Any:
        def run(work: Work, positions: Any, *, progress: Any = None) -> Published:
            progress = progress or (lambda *_: None)
            pieces, names, done = list(blocks(positions, size=5)), list[str](), 0
            progress(0, len(positions), "tests")
            for number in np.random.default_rng(1).permutation(len(pieces)):
                for _ in range(1 + number % 2):
                    names += run_part(work, pieces[number])
                done += len(pieces[number])
                progress(done, len(positions), "tests")
            return Published(work.folder, tuple(names), 1.0)

        return run


@pytest.fixture(scope="class")
def store() -> Iterator[Bucket]:
    """Of a server of S3, which nodes that are started now know as this process does."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as port, serving(forwarded(port)) as server:
        for name, value in environment(server).items():
            patch.setenv(name, value)
        bucket = Bucket("bucket", server, port)
        bucket.create()
        yield bucket


@pytest.fixture(scope="class")
def cluster(request: pytest.FixtureRequest, store: Bucket) -> Iterator[None]:
    """Three nodes of one core each beside a head without one, as processes of this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    size = {"object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as short:
        patch.setenv("RAY_TMPDIR", short)  # names of sockets may have 107 characters
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # nodes import what this process does
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
        patch.setenv("RAY_ADDRESS", cluster.address)
        nodes = [cluster.add_node(num_cpus=1, **size) for _ in range(3)]
        request.cls.cluster, request.cls.nodes, request.cls.store = cluster, nodes, store
        yield
        cluster.shutdown()


class OnRay(ExecutorContract):
    cluster: Any
    nodes: list[Any]

    def executor(self) -> Any:
        return RayExecutor(block=8)

    def kill_a_worker(self) -> None:
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)


class Packed(OnRay):
    """``pictures`` in an archive, by ``kind``."""

    store: Bucket
    kind = "folder"

    def source(self, folder: Path) -> Any:
        photos, kind = pictures(folder), "tar" if self.kind == "s3" else self.kind
        if kind == "folder":
            return photos
        files = {path.relative_to(photos).as_posix(): path.read_bytes() for path in sorted(photos.rglob("*.png"))}
        if not (packed := folder / f"packed.{kind}").exists():
            if kind == "parquet":
                parquet(packed, [*files.values()], ("one", "two"), label=[int("two" in name) for name in files])
            else:
                {"tar": tar, "zip": zipped}[kind](packed, files)
            self.store.put(f"{folder.name}.tar", packed.read_bytes())
        return f"s3://{self.store.name}/{folder.name}.tar" if self.kind == "s3" else packed


RAYS_OWN = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@pytest.mark.slow
@RAYS_OWN
@pytest.mark.usefixtures("cluster")
class TestRayLosesANode:
    cluster: Any
    nodes: list[Any]
    store: Bucket

    def test_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """While it reads a shard of a bucket."""
        allow_this_machine(monkeypatch)
        tried = Packed()
        tried.cluster, tried.nodes, tried.store, tried.kind = self.cluster, self.nodes, self.store, "s3"
        tried.test_a_worker_that_dies_costs_nothing(tmp_path)


@pytest.mark.soak  # two minutes: every run starts actors, which import PyTorch
@RAYS_OWN
@pytest.mark.usefixtures("cluster")
class TestRay(Packed):
    @pytest.mark.parametrize("kind", ["tar", "zip", "parquet", "s3"])
    def test_packed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        allow_this_machine(monkeypatch)
        self.kind = kind
        self.test_the_same_bytes_as_one_process(tmp_path)

    def test_a_node_that_does_not_see_the_output(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(on_ray, "_token", lambda work: contextlib.nullcontext("elsewhere.tmp"))
        with pytest.raises(StorageError, match=r"the Ray node [\d.]+ does not see .*own\.h5\.parts; put the output on"):
            self._extract(tmp_path, "own", self.executor())


def node(**resources: float) -> dict[str, Any]:
    return {"Resources": resources, "Alive": True}


@pytest.mark.parametrize(
    ("nodes", "device", "tasks", "expected"),
    [
        ([node(CPU=16)], "auto", 100, (1, 16, 0)),
        ([node(), node(CPU=4), node(CPU=8)], "auto", 100, (3, 4, 0)),
        ([node(CPU=16, GPU=4), node(CPU=64, GPU=8)], "auto", 100, (12, 4, 1)),
        ([node(CPU=16, GPU=4), node(CPU=64)], "auto", 100, (4, 4, 1)),
        ([node(CPU=16, GPU=4)], "cpu", 100, (1, 16, 0)),
        ([node(CPU=2)] * 8, "auto", 3, (3, 2, 0)),
    ],
)
def test_what_each_actor_gets(nodes: list[Any], device: str, tasks: int, expected: tuple[int, ...]) -> None:
    assert _share(nodes, device, tasks)[:3] == expected


def test_a_cluster_without_cores() -> None:
    with pytest.raises(UsageError, match="has no CPUs; add a node"):
        _share([node(memory=1)], "auto", 1)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'featcache\[ray\]'"):
        RayExecutor().check()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "auto"])
def test_no_cluster_is_noticed_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(is_initialized=lambda: False, data=None))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    RayExecutor().check()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # no other is started instead
    with pytest.raises(
        UsageError, match=r"no Ray cluster answers at .*(:1|nonsense) \(.*HOST:PORT; .* --ray-address local"
    ):
        RayExecutor(address).check()


def test_another_server_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for ever."""
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(is_initialized=lambda: False, data=None))
    allow_this_machine(monkeypatch)
    with serving(files_of({})) as web, pytest.raises(UsageError, match="not Ray's own port, by default 6379"):
        RayExecutor(f"127.0.0.1:{web.port}").check()


def test_a_cluster_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of which Ray says nothing."""
    answers = iter([None, None, OSError, None, OSError, OSError])  # one alone may be a pause
    monkeypatch.setattr(on_ray, "_knock", Mock(side_effect=answers))
    with _watched("127.0.0.1:1", pause=0.0):
        for _ in range(1000):
            time.sleep(0.0 if caplog.text else 0.01)
    assert caplog.text.count("the Ray cluster at 127.0.0.1:1 no longer answers") == 1


def test_what_ray_writes_goes_to_the_log(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "featcache"), _stderr_into_log():
        os.write(2, b"[I] logging.cc: hello\n")
    assert "ray: [I] logging.cc: hello" in caplog.text and "hello" not in capfd.readouterr().err


def test_what_a_node_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images lie in folders, in archives and at addresses."""
    monkeypatch.setattr("featcache.extraction.on_ray.describe", Mock())  # nobody answers
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    (tmp_path / "token").touch()
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos" / "a.jpg", "a.jpg")

    def unseen(root: Path, token: str = "token") -> str:
        images = ImageList(root, ("a.jpg",), np.zeros(1, np.int32), (), *(np.zeros(1, np.int64),) * 3)  # type: ignore[arg-type]
        return _unseen(SimpleNamespace(folder=tmp_path, images=images), token)  # type: ignore[arg-type]

    for root in (tmp_path / "photos", tmp_path / "photos.tar", as_path("s3://bucket/photos.tar")):
        assert not unseen(root)
    assert "put the images on" in unseen(tmp_path / "none")
    assert "put the images on" in unseen(tmp_path / "none.tar")
    assert "put the output on" in unseen(tmp_path / "photos", "other")
    for error in (NoAccessError("s3://b/k: refuses access; set KEYS"), RefusedImage("there is no such object")):
        monkeypatch.setattr("featcache.extraction.on_ray.describe", Mock(side_effect=error))
        assert f"cannot read the images: {error}; a node has" in unseen(as_path("s3://bucket/photos.tar"))


def test_a_worker_asks_with_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, too, the password of an address is there; that of another address is not."""
    allow_this_machine(monkeypatch)
    packed = tar(tmp_path / "a.tar", {f"a/{number}.png": b"no image" for number in range(3)}).read_bytes()
    with serving(files_of({"/a.tar": packed, "/b.tar": packed})) as web:
        list_images(f"http://eve:0ther@127.0.0.1:{web.port}/b.tar")
        images = list_images(f"http://ann:pa55word@127.0.0.1:{web.port}/a.tar?sig=TOPSECRET")
        web.requests.clear()
        sent = pickle.dumps(Work(tmp_path / "f.h5", images, SPEC, Provenance()))
        code = "import pickle, sys; from featcache.images.read import refusals\n"
        code += "print(*refusals(pickle.load(sys.stdin.buffer).images, range(3)).values())"
        child = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert child.stdout.count(b"not an image") == 3 and b"0ther" not in sent
    assert web.requests and all("sig=TOPSECRET" in one.path and "Authorization" in one.headers for one in web.requests)
