"""What every executor passes: tests for pytest, which ships them beside what they test and needs no pytest itself.

A subclass makes the executor; ``Test...`` in its name, pytest runs it::

    class TestMine(ExecutorContract):
        def executor(self):
            return MyExecutor(block=5)

The oracle is ``run_here``, one process that embeds everything in one go. Pictures and weights are made up.
"""

import contextlib
import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Indices
from featcache.errors import FeatcacheError
from featcache.extraction.executors import Executor, Published, Work
from featcache.extraction.extract import ExtractReport, extract
from featcache.extraction.request import ExtractRequest
from featcache.system.workdir import work_folder

IMAGES = 23  # odd, so that no block size divides it
BROKEN = ("one/07.png", "two/16.png")
REQUEST = ExtractRequest(backbone="squeezenet1_1", weights="none", resize=40, crop=32, precision="fp32")


class Death(BaseException):
    """What a test throws into a run."""


class ExecutorContract:
    """Tests of one executor, which works in blocks of five images, or in any other way that gives it several to do."""

    def executor(self) -> Executor:
        """A new one."""
        raise NotImplementedError

    def kill_a_worker(self) -> None:
        """Kill one of the workers that are at work now, as a machine that loses power would; called once in a run."""

    def end(self) -> None:
        """Wait until nothing of an interrupted run goes on."""

    def source(self, folder: Path) -> Any:
        """The images, made below ``folder``; wherever they lie, what is in them is as in ``pictures``."""
        return pictures(folder)

    # ------------------------------------------------------------------------------------------------------ tests

    def test_the_same_bytes_as_one_process(self, tmp_path: Path) -> None:
        one, report = self._extract(tmp_path, "one", None), self._extract(tmp_path, "own", self.executor())
        assert (report.embedded, report.refused) == (one.embedded, one.refused) == (IMAGES - len(BROKEN), len(BROKEN))
        assert_same(one.cache, report.cache)
        assert not work_folder(report.cache).exists()

    def test_every_position_is_published_whatever_the_order(self, tmp_path: Path) -> None:
        work = self._work(tmp_path)
        positions = np.random.default_rng(0).permutation(IMAGES)[: IMAGES - 4]
        found = self.executor()(work, positions)
        assert covered(work, found) == {work.images.paths[position] for position in positions}
        assert found.seconds > 0

    def test_nothing_to_do(self, tmp_path: Path) -> None:
        assert self.executor()(self._work(tmp_path), np.empty(0, np.intp)).names == ()

    def test_the_same_twice_is_harmless(self, tmp_path: Path) -> None:
        one, work = self._extract(tmp_path, "one", None), self._work(tmp_path)
        for _ in range(2):
            self.executor()(work, np.arange(IMAGES))
        report = self._extract(tmp_path, "own", None)
        assert (report.embedded, report.reused) == (0, IMAGES - len(BROKEN))
        assert_same(one.cache, report.cache)

    def test_an_interruption_keeps_what_is_finished(self, tmp_path: Path) -> None:
        one = self._extract(tmp_path, "one", None)

        def die(done: int, total: int, bottleneck: str) -> None:
            if done:
                raise Death

        with contextlib.suppress(Death):
            self._extract(tmp_path, "own", self.executor(), progress=die)
        self.end()
        report = self._extract(tmp_path, "own", self.executor())
        assert report.reused > 0 and report.reused + report.embedded == IMAGES - len(BROKEN)
        assert_same(one.cache, report.cache)

    def test_progress_ends_with_all(self, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        self.executor()(self._work(tmp_path), np.arange(IMAGES), progress=lambda *call: calls.append(call[:2]))
        assert calls[0] == (0, IMAGES) and calls[-1] == (IMAGES, IMAGES)
        assert calls == sorted(calls)

    def test_a_worker_that_dies_costs_nothing(self, tmp_path: Path) -> None:
        if type(self).kill_a_worker is ExecutorContract.kill_a_worker:
            return  # it has none
        killed: list[int] = []

        def kill(done: int, total: int, bottleneck: str) -> None:
            if done and not killed:
                killed.append(done)
                self.kill_a_worker()

        one = self._extract(tmp_path, "one", None)
        report = self._extract(tmp_path, "own", self.executor(), progress=kill)
        assert killed and killed[0] < IMAGES
        assert_same(one.cache, report.cache)

    def test_other_weights_are_no_work_for_it(self, tmp_path: Path) -> None:
        work = self._work(tmp_path)
        work = dataclasses.replace(work, spec=dataclasses.replace(work.spec, weights_sha256="0" * 64))
        with contextlib.suppress(FeatcacheError):
            self.executor()(work, np.arange(IMAGES))
            raise AssertionError("embedded with weights that are not those of the spec")

    def test_nothing_is_left_running(self, tmp_path: Path) -> None:
        before = children()
        self.executor()(self._work(tmp_path), np.arange(5))
        assert children() <= before

    # ------------------------------------------------------------------------------------------------------ tools

    def _extract(self, folder: Path, name: str, executor: Executor | None, **options: Any) -> ExtractReport:
        return extract(self.source(folder), folder / f"{name}.h5", REQUEST, executor=executor, **options)

    def _work(self, folder: Path) -> Work:
        """What ``extract`` would have an executor do."""
        found: list[Work] = []
        weights: dict[Path, bytes] = {}

        def note(work: Work, positions: Indices, *, progress: Any = None) -> Published:
            assert positions.tolist() == list(range(IMAGES))
            assert pickle.dumps((work, positions))
            found.append(work)
            weights.update((path, path.read_bytes()) for path in folder.glob("own.h5.*.safetensors"))
            raise Death

        with contextlib.suppress(Death):
            self._extract(folder, "own", note)
        work_folder(folder / "own.h5").mkdir(exist_ok=True)
        for path, content in weights.items():  # which a run that ends so takes away
            path.write_bytes(content)
        return found[0]


def pictures(folder: Path) -> Path:
    """A folder of two classes of made-up pictures, two of which are broken."""
    source = folder / "pictures"
    if not source.exists():
        for number in range(IMAGES):
            path = source / ("one" if number < IMAGES // 2 else "two") / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (48, 40, 3), np.uint8)
            Image.fromarray(pixels).save(path)
        for name in BROKEN:
            (source / name).write_bytes((source / name).read_bytes()[:200])
        for path in source.rglob("*.png"):
            os.utime(path, (1e9, 1e9))  # what is younger than two seconds has no time that could be trusted
    return source


def covered(work: Work, found: Published) -> set[str]:
    """The paths of rows and refusals of what was published. A refusal has a reason."""
    parts = found.parts
    assert all(part.spec == work.spec for part in parts)
    refused = [refusal for part in parts for refusal in part.refused]
    assert all(refusal.reason for refusal in refused)
    return {path for part in parts for path in part.paths} | {refusal.path for refusal in refused}


def assert_same(one: Path, other: Path) -> None:
    """All that two caches hold is the same, byte for byte, but for their provenance."""
    a, b = FeatureCache.open(one), FeatureCache.open(other)
    assert a.spec == b.spec and a.classes == b.classes and a.refused == b.refused
    assert a.rows.equals(b.rows)
    assert a.X.tobytes() == b.X.tobytes()


def children() -> set[int]:
    """Processes below this one, where the system tells."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{os.getpid()}/task"):  # noqa: PTH208
            found |= set(map(int, Path(f"/proc/{os.getpid()}/task/{task}/children").read_text().split()))
    return found
