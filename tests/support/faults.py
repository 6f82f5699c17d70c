"""Break the real program at a chosen moment: the one helper for dying, failing, full disks, signals and lost power.

In: a featcache command line and what is to go wrong. Out: an ``Outcome``: how it ended, what it printed, which steps it took
on the disk. ``faults.c`` does the breaking from inside the C library, so that Python, h5py, safetensors and joblib are all
caught. Commands run in forks of one warm process, because importing torch takes seconds and there are hundreds of them;
``cold=True`` starts the program as a user does.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import importlib
import json
import os
import pickle
import pkgutil
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

_SOURCE = Path(__file__).with_suffix(".c")
MODES = ("count", "die before", "die after", "fail", "fail once", "short", "torn", "full")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong, at which step on the disk.

    Attributes:
        mode: one of ``MODES``. Die before or after the step; fail it with ``error``, ``once`` or with all that follow; write
            ``short`` (half; the caller must go on); ``torn`` (half, then die); ``full``: a disk with room for ``budget`` bytes.
        step: counted from 0.
    """

    mode: str
    step: int = 0
    error: int = errno.ENOSPC
    budget: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One change on the disk: open, truncate, write, resize, fsync, rename, exchange, unlink, mkdir, rmdir; or failed."""

    what: str
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, negative for a signal; its output; seconds; most bytes of memory it took."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    steps: tuple[Step, ...] = ()

    @property
    def died(self) -> bool:
        """Killed, itself or (as the supervisor then says) its worker."""
        return self.code in (-signal.SIGKILL, 128 + signal.SIGKILL)

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object at the end of its output."""
        return json.loads(self.out.splitlines()[-1])


@functools.cache
def library() -> Path:
    """``faults.c`` compiled. Tests that need it are skipped where that is impossible, but never in CI."""
    if sys.platform != "linux" or not shutil.which("cc"):
        if os.environ.get("CI"):
            pytest.fail("the tests that break things need Linux and a C compiler, cc")
        pytest.skip("needs Linux and a C compiler, cc")
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", folder / "faults.so", _SOURCE, "-ldl", "-lpthread"], check=True)
    return folder / "faults.so"


def _environment() -> dict[str, str]:
    # Without fusing, which takes a second per start and is the same on the disk. One core: threads that spin waiting for
    # each other take minutes where other processes run.
    ours = {"LD_PRELOAD": str(library()), "FEATCACHE_FUSE": "0", "OMP_NUM_THREADS": "1"}
    return os.environ | ours | {"PYTHONPATH": os.pathsep.join(sys.path)}  # where what is called before was pickled


def before_next(moment: str, act: Callable[[], object], *, patch: Callable[..., None] = setattr) -> None:
    """When ``featcache.MOMENT`` is next called in this process, ``act`` first."""
    where, _, name = moment.rpartition(".")
    home = pkgutil.resolve_name(f"featcache.{where}")
    original = getattr(home, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if getattr(home, name) is call:
            patch(home, name, original)
            act()
        return original(*arguments, **options)

    patch(home, name, call)


def with_variables(variables: dict[str, str], *, folder: Path | None = None) -> Callable[[], None]:
    """To be called ``before``: these environment variables are set, and the command runs in ``folder``."""
    return functools.partial(_set_variables, variables, folder)


def _set_variables(variables: dict[str, str], folder: Path | None) -> None:
    os.environ.update(variables)
    if folder:
        os.chdir(folder)


class Gate:
    """Where one process waits for the test, so that two things happen in a chosen order without sleeping."""

    def __init__(self, folder: str) -> None:
        self._arrived, self._go = f"{folder}/arrived", f"{folder}/go"
        os.mkfifo(self._arrived)
        os.mkfifo(self._go)

    def pass_through(self, *, die: bool) -> None:
        """The process's side: say that it is here, and wait; then go on, or be killed."""
        Path(self._arrived).write_text("here")
        Path(self._go).read_text()
        if die:
            os.kill(os.getpid(), signal.SIGKILL)

    def wait(self, seconds: float) -> None:
        """The test's side: wait until the process is there."""
        pipe = os.open(self._arrived, os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert select.select([pipe], [], [], seconds)[0], "nobody came to the gate"
        finally:
            os.close(pipe)

    def open(self) -> None:
        """The test's side: let it go on."""
        Path(self._go).write_text("go")


class Program:
    """featcache, to be run and broken; ``server`` forks it. Several threads may each have something running."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server, self._lock = server, threading.Lock()

    def run(
        self,
        *arguments: object,
        below: Path | None = None,
        fault: Fault | None = None,
        kill: int = signal.SIGKILL,
        after: float | None = None,
        trace: bool = False,
        limits: dict[str, int] | None = None,
        before: Callable[[], Any] | None = None,
        settings: dict[str, Any] | None = None,
        cold: bool = False,
        timeout: float = 120.0,
    ) -> Outcome:
        """Run ``featcache ARGUMENTS``; without arguments only what is to be called ``before``.

        Args:
            below: the folder whose changes count as steps. fault: what goes wrong there. trace: return all steps.
            kill: signal to send, ``after`` so many seconds. limits: resource limits, ``{"RLIMIT_NOFILE": 64}``.
            before: called first, in the process that is to run; it is pickled. What it returns is the outcome's ``result``.
            settings: module variables, ``{"extraction.parts.MAX_ROWS": 8}``.
            cold: start a new process, as a user does, instead of forking a warm one. timeout: fail after it.
        """
        fault = fault or Fault("count")
        with tempfile.TemporaryDirectory(prefix="outcome-") as folder:
            plan = {
                "arguments": [os.fsdecode(str(argument)) for argument in arguments],
                "root": str(below or ""),
                "fault": (fault.step, MODES.index(fault.mode), fault.error, fault.budget),
                "kill": int(kill),
                "after": after,
                "limits": limits or {},
                "before": base64.b64encode(pickle.dumps(before)).decode(),
                "settings": settings or {},
                **{name: f"{folder}/{name}" for name in ("out", "err", "log", "answer")},
                "timeout": timeout,
                "trace": trace,
                "cold": cold,
            }
            for name in ("out", "err", "log"):  # also of a process that is killed at once
                Path(plan[name]).touch()
            code, seconds, peak = self._ask(plan)
            texts = [Path(plan[name]).read_bytes().decode("utf-8", "replace") for name in ("out", "err")]
            steps = tuple(read_log(Path(plan["log"]).read_bytes()))
        if code == -signal.SIGALRM:
            pytest.fail(f"featcache {arguments} took longer than {timeout} s: {texts}")
        return Outcome(code, *texts, seconds, peak, steps)

    def check(self, *arguments: object, **options: Any) -> Outcome:
        """``run``, which must succeed."""
        outcome = self.run(*arguments, **options)
        assert outcome.code == 0, (arguments, options, outcome.code, outcome.err)
        return outcome

    @contextlib.contextmanager
    def held(
        self, moment: str, *arguments: object, die: bool = False, timeout: float = 120.0, **options: Any
    ) -> Iterator[concurrent.futures.Future[Outcome]]:
        """``run``, waiting before ``featcache.MOMENT`` while the block runs; then it goes on, or is killed."""
        thread = concurrent.futures.ThreadPoolExecutor(1)
        with tempfile.TemporaryDirectory(prefix="gate-") as folder:
            gate = Gate(folder)
            hook = functools.partial(before_next, moment, functools.partial(gate.pass_through, die=die))
            running = thread.submit(self.run, *arguments, before=hook, timeout=timeout, **options)
            gate.wait(timeout)
            try:
                yield running
            finally:
                gate.open()
                thread.shutdown(wait=False)

    def _ask(self, plan: dict[str, Any]) -> tuple[int, float, int]:
        assert self._server.stdin
        os.mkfifo(plan["answer"])
        answer = os.open(plan["answer"], os.O_RDONLY | os.O_NONBLOCK)
        try:
            with self._lock:
                self._server.stdin.write(json.dumps(plan) + "\n")
                self._server.stdin.flush()
            assert select.select([answer], [], [], plan["timeout"] + 60)[0], "the warm process is gone"
            code, seconds, peak = json.loads(os.read(answer, 4096))
        finally:
            os.close(answer)
        return code, seconds, peak


@contextlib.contextmanager
def program() -> Iterator[Program]:
    """A ``Program``, whose warm process is ended at the end."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=_environment(), text=True) as server:
        yield Program(server)


def read_log(data: bytes) -> Iterator[Step]:
    """The steps that ``faults.c`` wrote down."""
    position = 0
    while position < len(data):
        (length,) = struct.unpack_from("=I", data, position)
        head = data[position + 4 : position + 4 + length].rstrip(b"\n").split(b"\0")
        position += 4 + length
        size = int(head[4])
        what, first, second = (os.fsdecode(text) for text in head[:3])
        yield Step(what, first, second, int(head[3]), data[position : position + size])
        position += size


# ------------------------------------------------------------------------------------------------- inside


# What ``python -m featcache`` does, with other settings.
_COLD = """
import faults, json, sys
faults.change(json.loads(sys.argv.pop(1)))
import featcache.__main__
"""


def _wait(pid: int, plan: dict[str, Any], started: float) -> tuple[int, float, int]:
    """Wait for a child, sending it what the plan says: exit code, seconds, most bytes of memory."""
    descriptor = os.pidfd_open(pid)
    try:
        if plan["after"] is not None:
            select.select([descriptor], [], [], max(0.0, started + plan["after"] - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, plan["kill"])
        late = not select.select([descriptor], [], [], plan["timeout"])[0]
        if late:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
    finally:
        os.close(descriptor)
    code = -signal.SIGALRM if late else os.waitstatus_to_exitcode(status)
    return code, time.monotonic() - started, used.ru_maxrss * 1024


def change(settings: dict[str, Any]) -> None:
    """Set module variables of featcache."""
    for name, value in settings.items():
        module, _, variable = name.rpartition(".")
        setattr(importlib.import_module(f"featcache.{module}"), variable, value)


# All that commands import, also late; simplejpeg may be missing.
_IMPORTED = "models.fit models.predict models.export finetuning.finetune backbones.load backbones.embed heads.logreg"
_IMPORTED += " heads.minibatch extraction.parts extraction.in_parts backbones.embedder finetuning.trainer cli.app"
_IMPORTED += " reports.model_report.report reports.curves reports.gallery reports.info"
# Of others what takes a command a tenth of a second or, PyTorch's compiler, two.
_OTHERS = "sklearn.linear_model simplejpeg torch._dynamo typer._adapters jinja2 safetensors.torch matplotlib.figure"


def _serve() -> None:
    """Fork a child for every plan on stdin. Imports everything first, and computes nothing: no thread may be running."""
    for name in (*(f"featcache.{module}" for module in _IMPORTED.split()), *_OTHERS.split()):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    Image.init()
    for line in sys.stdin:
        plan = json.loads(line)
        if not os.fork():  # a process that waits, so that the next plan need not
            started = time.monotonic()
            pid = os.fork()
            if not pid:
                _become(plan)
            Path(plan["answer"]).write_text(json.dumps(_wait(pid, plan, started)))
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    os._exit(0)  # at once: unloading PyTorch takes seconds


def _become(plan: dict[str, Any]) -> None:
    """The child: take the plan's files, limits and fault, and be featcache."""
    import ctypes
    import resource

    for number, name in ((0, os.devnull), (1, plan["out"]), (2, plan["err"])):
        os.dup2(os.open(name, os.O_RDWR), number)
    os.setpgid(0, 0)
    for name, limit in plan["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if plan["cold"]:
        command = [sys.executable, "-c", _COLD, json.dumps(plan["settings"]), *plan["arguments"]]
        os.execve(sys.executable, command, os.environ | {"FAULTS": ":".join(map(str, (*plan["fault"], plan["root"])))})
    log = os.open(plan["log"], os.O_WRONLY) if plan["trace"] else -1
    arm = ctypes.CDLL(os.environ["LD_PRELOAD"]).faults_arm
    arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_int]
    arm(os.fsencode(plan["root"]), *plan["fault"], log)
    from featcache.cli import app as cli

    change(plan["settings"])
    sys.argv = ["featcache", *plan["arguments"]]
    try:
        before = pickle.loads(base64.b64decode(plan["before"]))
        result = before() if before else None
        if plan["arguments"]:
            cli.main()
        print(json.dumps(result))
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70  # a bug: no error of featcache's own
    else:
        code = 0
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
