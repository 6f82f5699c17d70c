"""Executors: what all pass, and what each is alone in. See ``featcache.testing.executors``."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import StorageError
from featcache.extraction.executors import Published, Work, blocks, run_here
from featcache.testing.executors import ExecutorContract


class TestInProcess(ExecutorContract):
    def executor(self) -> Any:
        return run_here


RUN_PART = (
    "import pickle, sys, numpy; from featcache.extraction.executors import run_part; "
    "work, positions = pickle.load(sys.stdin.buffer); print(*run_part(work, positions))"
)


class InProcesses:
    """As any scheduler would: a process for each block, and again for those that died."""

    def __init__(self) -> None:
        self.running: dict[subprocess.Popen[str], Any] = {}

    def __call__(self, work: Work, positions: Any, *, progress: Any = None) -> Published:
        names: list[str] = []
        todo, done = list(blocks(positions, size=12)), 0
        if progress:
            progress(0, len(positions), "processes")
        try:
            while todo or self.running:
                for block in todo:
                    self.start(work, block)
                todo = []
                for process, block in list(self.running.items()):
                    output, _ = process.communicate()
                    del self.running[process]
                    if process.returncode == -signal.SIGKILL:
                        todo.append(block)
                        continue
                    if process.returncode:
                        raise StorageError("a worker failed")
                    names += output.split()
                    done += len(block)
                    if progress:
                        progress(done, len(positions), "processes")
        finally:
            for process in self.running:
                process.kill()
                process.communicate()
        return Published(work.folder, tuple(names), 1.0)

    def start(self, work: Work, block: Any) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN_PART], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdin
        process.stdin.write(pickle.dumps((work, block)))
        process.stdin.close()
        process.stdin = None
        self.running[process] = block


@pytest.mark.slow
class TestInProcesses(ExecutorContract):
    def executor(self) -> Any:
        self.made = InProcesses()
        return self.made

    def kill_a_worker(self) -> None:
        for process in self.made.running:
            process.kill()
