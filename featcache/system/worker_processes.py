"""Processes that work beside this one, where threads would wait for Python's lock: 16 threads that decode get done what 3 cores could.

In: the name of a module with a function ``work(memory, task)``, memory that both sides see, a task. Out: what the function
returns there. One server process imports the modules, then forks the others, which come and go with it: importing costs once.
Nothing of the program that calls is imported again, as ``multiprocessing`` would: a script needs no guard, a notebook neither.

Linux only, as memory of no name and of any size is. Elsewhere, and until they are ready, threads do the work.
"""

import atexit
import contextlib
import functools
import importlib
import logging
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.system.memory import keep_freed_memory
from featcache.system.supervisor import die_with

log = logging.getLogger("featcache")
Memory = npt.NDArray[np.uint8]
_MEMORIES = 2  # that a process keeps in sight
_READY, _DONE, _FAILED, _CRASHED = range(4)
_MOST = 64  # processes
ALIGNED = 64  # bytes


class SharedMemory:
    """Zeroed bytes that worker processes see as well. They go when nobody looks at them any more, whatever ends first.

    What is never written takes no memory.

    Attributes:
        array: (size,) uint8. used: how many were taken.
    """

    def __init__(self, size: int) -> None:
        self.used = 0
        # Not in /dev/shm, of which containers have 64 MB.
        self.descriptor, self.size = os.memfd_create("featcache", os.MFD_CLOEXEC), size
        os.ftruncate(self.descriptor, size)
        self.array = _mapped(self.descriptor, size)

    def take(self, size: int) -> Memory | None:
        """The next ``size`` bytes, from one thread; None: there are not so many left."""
        start, end = self.used, self.used + size
        if end > self.size:
            return None
        self.used = -(-end // ALIGNED) * ALIGNED
        return self.array[start:end]

    def offset(self, part: Memory) -> int | None:
        """Where a part of ``array`` begins in it; None if it is no part of it."""
        start = int(part.__array_interface__["data"][0] - self.array.__array_interface__["data"][0])
        return start if 0 <= start < self.size else None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.descriptor)


def _mapped(descriptor: int, size: int) -> Memory:
    """(size,) uint8 of a ``SharedMemory``, in small pages: of large ones, whose use some systems prefer, gaps would take memory, too."""
    mapping = mmap.mmap(descriptor, size)
    with contextlib.suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


class WorkerCrashed(Exception):  # noqa: N818 - of another process, which was replaced
    """A signal ended the process while it worked. ``number``: which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class WorkersLost(Exception):  # noqa: N818
    """The processes are gone: killed, or never there."""


class WorkerProcesses:
    """So many processes. Calls are safe from several threads, each of which waits for one process."""

    def __init__(self, count: int, modules: tuple[str, ...]) -> None:
        """They start at once; nobody waits for that. ``modules``: what tasks are for, imported before the processes fork."""
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [there.fileno() for _, there in pairs]
        # It imports from where this process does, never from the user's working folder.
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-P", "-W", "ignore", "-m", __name__, ",".join(modules), *map(str, theirs)]
        options: dict[str, Any] = {"pass_fds": theirs, "env": environment, "start_new_session": True}
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **options)
        for _, there in pairs:
            there.close()
        self._workers = tuple(_Worker(here) for here, _ in pairs)
        self._starting = list(self._workers)
        self._free: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._lock, self.lost = threading.Lock(), False
        self.count = count

    @property
    def ready(self) -> bool:
        """Whether one of them takes tasks by now."""
        if not self._starting:
            return not self.lost
        with self._lock:
            for worker in [worker for worker in self._starting if worker.has_answered()]:
                self._starting.remove(worker)
                try:
                    worker.answer()
                    self._free.put(worker)
                except WorkersLost:
                    self.lost = True
        return not self.lost and len(self._starting) < self.count

    def wait(self, seconds: float = 60.0) -> None:
        """Until all of them are ready, or lost, or so long: for whoever measures how fast they are."""
        end = time.monotonic() + seconds
        while not (self.ready and not self._starting) and not self.lost and time.monotonic() < end:
            time.sleep(0.02)

    def call(self, module: str, memory: SharedMemory, task: Any) -> Any:
        """What ``module.work(memory.array, task)`` returns in a process that is free, or becomes so.

        Raises:
            WorkerCrashed: it crashed; another one took its place. WorkersLost. RuntimeError: what it raised, in words.
        """
        after: _Worker | None = None  # for all who wait, if this one is gone
        try:
            if (worker := self._free.get()) is None or self.lost:
                raise WorkersLost
            after = worker
            return worker.call(module, memory, task)
        except WorkersLost:
            self.lost, after = True, None
            raise
        finally:
            self._free.put(after)

    def close(self) -> None:
        """End them. Whoever waits for one gets WorkersLost."""
        self.lost = True
        self._free.put(None)  # whoever takes it puts it back
        for worker in self._workers:
            worker.close()
        try:
            self._server.wait(1)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


class _Worker:
    """This side of one process."""

    def __init__(self, here: socket.socket) -> None:
        self._connection = Connection(here.detach())
        self._seen: OrderedDict[int, SharedMemory] = OrderedDict()  # as ``_serve`` keeps them

    def has_answered(self) -> bool:
        return self._connection.poll()

    def call(self, module: str, memory: SharedMemory, task: Any) -> Any:
        try:
            new = id(memory) not in self._seen
            self._connection.send((module, id(memory), memory.size if new else 0, task))
            if new:
                reduction.send_handle(self._connection, memory.descriptor, 0)
        except OSError as error:
            raise WorkersLost from error
        _keep_latest(self._seen, id(memory), memory)
        return self.answer()

    def answer(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkersLost from error
        if kind == _CRASHED:
            self._seen.clear()
            raise WorkerCrashed(value)
        if kind == _FAILED:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        self._connection.close()


def _keep_latest(seen: "OrderedDict[int, Any]", key: int, value: Any) -> None:
    """The same on both sides, so that each knows what the other one has in sight."""
    seen[key] = value
    seen.move_to_end(key)
    if len(seen) > _MEMORIES:
        seen.popitem(last=False)


@functools.cache
def _shared_processes(count: int, modules: tuple[str, ...], _: int) -> WorkerProcesses:
    processes = WorkerProcesses(count, modules)
    atexit.register(processes.close)
    return processes


def worker_processes(count: int, *modules: str) -> WorkerProcesses | None:
    """The ``count`` processes of this one for tasks of ``modules``, started at the first call; None where there cannot be any."""
    if not hasattr(os, "memfd_create") or os.environ.get("FEATCACHE_PROCESSES") == "0":
        return None
    try:
        processes = _shared_processes(min(count, _MOST), modules, os.getpid())
    except OSError as error:  # too many processes, or open files
        log.debug("no worker processes: %s", error)
        return None
    return None if processes.lost else processes


# --------------------------------------------------------------------------------------------------- the other side


def _serve(connection: Connection) -> None:
    """Work until the other side is gone."""
    seen: OrderedDict[int, Memory] = OrderedDict()
    while True:
        try:
            module, key, size, task = connection.recv()
            if size:
                descriptor = reduction.recv_handle(connection)
                _keep_latest(seen, key, _mapped(descriptor, size))
                os.close(descriptor)
            else:
                _keep_latest(seen, key, seen[key])
        except (EOFError, OSError):
            return
        try:
            answer = _DONE, importlib.import_module(module).work(seen[key], task)
        except Exception as error:
            answer = _FAILED, f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            connection.send(answer)


def _fork(connection: Connection, connections: list[Connection], *, ready: bool) -> int:
    """A process that serves one of ``connections``, and dies with this one. Returns its process id."""
    server = os.getpid()
    if worker := os.fork():
        return worker
    code = 1
    try:
        die_with(server)
        for other in connections:
            if other is not connection and not other.closed:
                other.close()  # or the end of its process would go unnoticed
        if ready:
            connection.send((_READY, None))
        _serve(connection)
        code = 0
    finally:
        os._exit(code)


def _main(modules: str, *descriptors: str) -> None:
    """The server: import, fork, and replace what crashes, until all have come to their end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end comes with that of the connection
    keep_freed_memory()
    for module in modules.split(","):
        importlib.import_module(module).prepare()
    connections = [Connection(int(descriptor)) for descriptor in descriptors]
    workers = {_fork(connection, connections, ready=True): connection for connection in connections}
    for worker, status in _ended(workers):
        connection, code = workers.pop(worker), os.waitstatus_to_exitcode(status)
        if code < 0 and -code != signal.SIGKILL:
            connection.send((_CRASHED, -code))
            workers[_fork(connection, connections, ready=False)] = connection
        else:
            connection.close()


def _ended(workers: dict[int, Connection]) -> Iterator[tuple[int, int]]:
    while workers:
        yield os.wait()


if __name__ == "__main__":
    _main(*sys.argv[1:])
