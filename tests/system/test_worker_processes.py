"""Processes beside this one: what they return, what becomes of a crash, and that none is left over."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.system import worker_processes as module
from featcache.system.worker_processes import (
    SharedMemory,
    WorkerCrashed,
    WorkerProcesses,
    WorkersLost,
    worker_processes,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.fixture
def processes() -> Iterator[WorkerProcesses]:
    found = WorkerProcesses(3, ("tasks",))
    found.wait()
    assert found.ready
    yield found
    found.close()


def call(processes: WorkerProcesses, memory: SharedMemory, *task: Any) -> Any:
    return processes.call("tasks", memory, task)


def alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    return False


def gone(*processes: int) -> bool:
    """Within two seconds."""
    for _ in range(100):
        if not any(map(alive, processes)):
            return True
        time.sleep(0.02)
    return False


def test_both_sides_see_the_memory(processes: WorkerProcesses) -> None:
    memories = [SharedMemory(10_000) for _ in range(5)]  # more than a process keeps in sight
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(call, processes, memories[k % 5], "add", 7 * (k % 1000), 1 + k % 3) for k in range(3000)]
        [job.result() for job in jobs]
    for number, memory in enumerate(memories):
        expected = [0] * 10_000
        for k in range(number, 3000, 5):
            expected[7 * (k % 1000)] += 1 + k % 3
        assert memory.array.tolist() == expected
        assert memory.offset(memory.array[17:20]) == 17
        assert memory.offset(np.zeros(3, np.uint8)) is None


def test_what_one_raises_is_said(processes: WorkerProcesses) -> None:
    memory = SharedMemory(1)
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        call(processes, memory, "raise", "no such thing")
    assert call(processes, memory, "add", 0, 3) == 3


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_one_that_crashes_is_replaced(processes: WorkerProcesses, number: int) -> None:
    memory = SharedMemory(1)
    for _ in range(5):
        with pytest.raises(WorkerCrashed) as crash:
            call(processes, memory, "kill", number)
        assert crash.value.number == number
    assert len({call(processes, memory, "pid")[0] for _ in range(6)}) == 3
    assert call(processes, memory, "add", 0, 3) == 3


def test_one_that_is_killed_is_the_end_of_all(processes: WorkerProcesses) -> None:
    """For want of memory, most likely: no image is to blame."""
    memory = SharedMemory(1)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(call, processes, memory, "sleep", 0.3) for _ in range(4)]
        with pytest.raises(WorkersLost):
            call(processes, memory, "kill", signal.SIGKILL)
        for job in waiting:
            with contextlib.suppress(WorkersLost):
                job.result(timeout=5)
    assert processes.lost
    with pytest.raises(WorkersLost):
        call(processes, memory, "pid")


def test_signals_for_this_process_do_not_end_them(processes: WorkerProcesses) -> None:
    """Ctrl-C, and what a scheduler sends to every process of a job: this one decides what is finished first."""
    memory = SharedMemory(1)
    workers = {call(processes, memory, "signals") for _ in range(3)}
    server = processes._server.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(server, number)
    assert {call(processes, memory, "pid") for _ in range(9)} == workers
    assert os.getsid(server) != os.getsid(0), "nor does a terminal"


def test_none_is_left_over(processes: WorkerProcesses) -> None:
    memory = SharedMemory(1)
    found = {call(processes, memory, "pid") for _ in range(3)}
    everyone = {process for pair in found for process in pair}
    assert len(everyone) == 4
    processes.close()
    assert gone(*everyone)


SCRIPT = """
import os, signal, sys, tasks
from featcache.system.worker_processes import SharedMemory, worker_processes
processes, memory = worker_processes(2, "tasks"), SharedMemory(1)
processes.wait()
print(*{process for _ in range(4) for process in processes.call("tasks", memory, ("pid",))}, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_none_outlives_its_program(end: str, tmp_path: Path) -> None:
    """However that ends; and a script needs no guard against being imported again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{end}", end))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert len(done.stdout.splitlines()) == 1 and not done.stderr, done.stderr
    found = list(map(int, done.stdout.split()))
    assert len(found) == 3 and gone(*found)


def test_they_are_shared_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_shared_processes", made := Made())
    assert worker_processes(2, "tasks") is made
    made.lost = True
    assert worker_processes(2, "tasks") is None
    made.lost = False
    monkeypatch.setenv("FEATCACHE_PROCESSES", "0")
    assert worker_processes(2, "tasks") is None
    monkeypatch.delenv("FEATCACHE_PROCESSES")
    monkeypatch.delattr(os, "memfd_create")
    assert worker_processes(2, "tasks") is None, "not Linux"


class Made:
    lost = False

    def __call__(self, *_: object) -> "Made":
        return self


def test_a_server_that_cannot_start_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    processes = WorkerProcesses(2, ("no_such_module",))
    processes.wait()
    assert processes.lost and not processes.ready
    processes.close()
    assert "no_such_module" in capfd.readouterr().err


def test_memory_is_taken_piece_by_piece() -> None:
    memory = SharedMemory(200)
    pieces = [memory.take(size) for size in (10, 64, 100, 8)]
    assert [None if piece is None else (memory.offset(piece), len(piece)) for piece in pieces] == [
        (0, 10),
        (64, 64),
        None,
        (128, 8),
    ]


def test_memory_goes_with_its_last_reader() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        SharedMemory(1 << 20).array[:] = 1
    assert len(os.listdir("/proc/self/fd")) <= before + 1
