"""The door to programs that keep track of runs: one that is missing is said before the work, one that fails costs nothing.

In: the name of one, and a ``Run``. Out: where it was told. Their libraries run in a process of their own, for a bounded time: they
start threads, bend signals and wait at exit for servers that may never answer, and by now the model is saved.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from featcache.errors import MissingDependencyError, StorageError, TrackerError, UsageError
from featcache.reports.trackers.run import Run
from featcache.system.display import printable
from featcache.system.files import check_output

_PIP = {"tensorboard": "'featcache[log]'", "mlflow": "mlflow", "wandb": "wandb"}
_SECONDS, _BYTES_PER_SECOND = 60.0, 1e6  # to connect and tell; to upload at least
_ROOT = Path(__file__).parents[3]
_CHILD = f"import sys; sys.path.append({str(_ROOT)!r}); from featcache.reports.trackers.tracker import _tell; _tell()"


def check_tracker(name: str, model: Path) -> None:
    """Refuse, before any work, what cannot be used.

    Raises:
        UsageError: ``name`` is none. MissingDependencyError: its package is not installed. StorageError: of TensorBoard, nothing
        can be written beside ``model``.
    """
    if name not in _PIP:
        raise UsageError(f"--log must be one of {', '.join(_PIP)}, found {name!r}")
    if getattr(importlib.util.find_spec(name), "origin", None) is None:  # a mere folder, as wandb itself makes one
        raise MissingDependencyError(f"--log {name} needs a package: pip install {_PIP[name]}")
    where = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:")
    if name == "mlflow" and where.startswith("sqlite:") and importlib.util.find_spec("sqlalchemy") is None:
        raise MissingDependencyError(
            "--log mlflow keeps runs in a database, for which mlflow-skinny is not enough: pip install mlflow, or set "
            "MLFLOW_TRACKING_URI to a server's address"
        )
    if name == "tensorboard":
        check_output(runs_beside(model), folder_allowed=True)
        if os.path.lexists(runs_beside(model)) and not runs_beside(model).is_dir():
            raise StorageError(f"cannot write to {runs_beside(model)}: it is a file; move it away")


def runs_beside(model: Path) -> Path:
    """Where TensorBoard is told: ``runs`` beside the folder of a model, as its users expect it."""
    return model.absolute().parent / "runs"


def log_run(name: str, run: Run, *, seconds: float | None = None) -> str:
    """Tell a run to a tracker, in a process that is ended after ``seconds`` (a minute and a second a megabyte when None).

    Returns:
        Where it was told, in words.

    Raises:
        TrackerError: it failed, or took longer.
    """
    seconds = _SECONDS + _size(run) / _BYTES_PER_SECOND if seconds is None else seconds
    command = [sys.executable, "-P", "-c", _CHILD, name]  # -P: nothing is imported from the working folder
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, errors="replace", start_new_session=True, **pipes) as child:
        try:
            out, err = child.communicate(json.dumps(dataclasses.asdict(run)), seconds)
        except subprocess.TimeoutExpired:
            raise TrackerError(f"no end after {seconds:.0f} s") from None
        finally:  # also what it started itself, and where this process is interrupted
            _end(child)
    if child.returncode:
        lines = [line.strip() for line in err.splitlines() if line.strip()]
        raise TrackerError(lines[-1][:500] if lines else f"its process ended with {child.returncode}")
    return str(out).splitlines()[-1]


def _end(child: "subprocess.Popen[str]") -> None:
    """End a process, if it has not ended, and what it started."""
    if os.name == "nt":  # has no such groups
        child.kill()
        return
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)


def _size(run: Run) -> int:
    files = [*map(Path, run.files), *(Path(run.model).iterdir() if run.keeps_model else ())]
    return sum(file.stat().st_size for file in files if file.is_file())


def _tell() -> None:
    """What the child does: read a run, tell it, say where. An error is said in its last line."""
    run = Run(**json.load(sys.stdin))
    try:
        where = importlib.import_module(f"featcache.reports.trackers.to_{sys.argv[1]}").write(run)
    except Exception as error:
        raise SystemExit(printable(" ".join(f"{type(error).__name__}: {error}".split()))) from error
    sys.stdout.write(f"\n{printable(where)}\n")
