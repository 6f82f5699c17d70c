"""The work folder of a run, ``model-ft.parts/``: which run it is, and its checkpoint.

In: a run's identity (everything that changes the numbers) and its state. Out: ``run.json`` for people to read, and
``checkpoint.pt`` with both, tensors and plain values only, replaced atomically; reading it runs no code.
"""

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.backbones.saved import MANIFEST
from featcache.errors import ModelError, StorageError, UsageError
from featcache.finetuning.recipes import Job
from featcache.spec import difference, fingerprint_of
from featcache.system.files import publish_file
from featcache.system.safe_load import DamagedFile, load_tensors, parse_json
from featcache.system.workdir import locked, work_folder

if TYPE_CHECKING:
    from featcache.finetuning.trainer import Trainer

_RUN, _STATE = "run.json", "checkpoint.pt"
# 1: dropout in the backbone, the head's steps of another size; 2: other stages, no loss at first; 3: no steps; 4: stages, and so the
# optimizer's parameters, in the order of registration.
FORMAT_VERSION = 5
_CHEAP = 0.2  # seconds
log = logging.getLogger("featcache")


class Checkpoint:
    """A trainer's state on disk, written by the first process.

    Attributes:
        identity: everything that changes the numbers of the run, JSON values.
        position: where training stood when it was written, in words; empty: there is none yet.
        written: when that was, or when the run was started or continued, by the job's clock.
    """

    _took = 0.0  # seconds, the last time

    def __init__(self, trainer: "Trainer", identity: dict[str, Any]) -> None:
        """Load the state of an interrupted run, if there is one, into ``trainer``. Raises as ``open_work``."""
        self._trainer, self.identity, self.position = trainer, identity, ""
        job = trainer.job
        state = job.processes.broadcast(open_work(job.output, identity) if job.processes.is_first else None)
        if state is not None:
            trainer.load_state(state)
            self.position = trainer.position
            log.info("resuming in epoch %d, after %d of its steps", trainer.epoch + 1, trainer.batch)
        self.written = job.clock()

    def save(self) -> None:
        """Write the state, in all processes at once. Raises StorageError, TrainingError; the checkpoint before is then still there."""
        begun = self._trainer.job.clock()
        self._trainer.check_weights()
        if self._trainer.job.processes.is_first:
            save_state(self._trainer.job.output, self.identity, self._trainer.state())
            self.position = self._trainer.position
        self.written = self._trainer.job.clock()
        self._took = self.written - begun

    @property
    def pays(self) -> bool:
        """Whether to write it costs next to nothing, or at most a tenth of the time since it was written: by the first process's clock."""
        job = self._trainer.job
        return job.processes.broadcast(self._took <= _CHEAP or job.clock() - self.written >= 9 * self._took)


def read_identity(output: Path) -> dict[str, Any] | None:
    """That of an interrupted run; None: there is no checkpoint. Raises ModelError: its file is damaged."""
    folder = work_folder(output)
    if not (folder / _STATE).is_file():
        return None
    try:
        return parse_json((folder / _RUN).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / _RUN} is damaged ({error}); discard the interrupted run with --force") from error


def is_finished(output: Path) -> bool:
    """Whether the run in the work folder has published its model, and was cut off before it removed that folder."""
    try:
        run = parse_json((work_folder(output) / _RUN).read_text())
        manifest = parse_json((output / "model.json").read_text())
        return bool(run) and manifest["training"]["run"] == fingerprint_of(run)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_unfinished(output: Path, *, resume: bool, force: bool) -> None:
    """Refuse, before any work, if something is in the way.

    Raises:
        UsageError: an interrupted run, and neither ``resume`` nor ``force`` was asked for; or ``resume``, and there is none.
        StorageError: a folder, or file, of somebody else.
    """
    folder = work_folder(output)
    if resume and not (folder / _RUN).is_file():
        done = f"; {output} is finished" if (output / MANIFEST).is_file() else ""
        raise UsageError(
            f"there is nothing to resume: {folder}, where an interrupted run would be, "
            f"{'holds none' if folder.is_dir() else 'does not exist'}{done}; leave --resume out to start one, or give the -o of that run"
        )
    if (folder / _STATE).is_file() and not (resume or force):
        raise UsageError(
            f"{folder} holds an interrupted run; add --resume to continue it, or --force to discard it and start anew"
        )
    foreign = os.path.lexists(folder) and not folder.is_dir()
    if folder.is_dir() and not (folder / _RUN).is_file():
        # a run killed at its very beginning leaves its lock, and perhaps a temporary file
        foreign = any(entry.name != "lock" and not entry.name.startswith(".run.json.") for entry in folder.iterdir())
    if foreign:
        raise StorageError(f"{folder}, where unfinished work would go, is in use for something else; choose another -o")


@contextlib.contextmanager
def hold_work(job: Job, *, force: bool) -> Iterator[None]:
    """Hold the work folder, which the first process writes, marked as that of a fine-tuning; ``force``: emptied before.

    At the end it is gone if it has nothing to keep. Raises StorageError: another run holds it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        if job.processes.is_first:
            stack.enter_context(locked(work_folder(job.output)))
            stack.callback(_tidy, job.output)
            if force:
                remove_work(job.output)
            if not (run := work_folder(job.output) / _RUN).is_file():
                with publish_file(run, own=True) as file:
                    file.write(b"{}\n")
        job.processes.barrier()
        yield


def _tidy(output: Path) -> None:
    """Remove the files of a run that ended before it had features or a checkpoint to keep."""
    folder = work_folder(output)
    if not any((folder / name).exists() for name in (_STATE, "features.h5", work_folder(folder / "features.h5"))):
        remove_work(output)


def open_work(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Start a run, or find the state of an interrupted one.

    Args:
        output: the model folder to be written. identity: of this run, JSON values.

    Returns:
        The state to continue from; None: there is no checkpoint.

    Raises:
        UsageError: it belongs to other settings (named). ModelError: its files are damaged. StorageError: the folder
        cannot be written.
    """
    folder = work_folder(output)
    if not (folder / _STATE).is_file():
        with publish_file(folder / _RUN, own=True) as file:
            file.write((json.dumps(identity, indent=2) + "\n").encode())
        return None
    state = _read_state(folder / _STATE)
    before = state.pop("identity")
    if before != identity:
        raise UsageError(
            f"the interrupted run in {folder} had other settings ({'; '.join(difference(before, identity))}); "
            "repeat them, or discard that run with --force"
        )
    return state


def save_state(output: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the checkpoint atomically. Raises StorageError; the one before is then still there."""
    import torch

    buffer = io.BytesIO()
    torch.save(state | {"identity": identity, "version": FORMAT_VERSION}, buffer)
    with publish_file(work_folder(output) / _STATE, needed=buffer.getbuffer().nbytes, own=True) as file:
        file.write(buffer.getbuffer())


def remove_work(output: Path) -> None:
    """Remove the files of a run: its model is saved, or nothing of it is worth keeping. Files of somebody else stay."""
    folder = work_folder(output)
    if not (folder / _RUN).is_file():
        return
    shutil.rmtree(folder / "head", ignore_errors=True)
    shutil.rmtree(work_folder(folder / "features.h5"), ignore_errors=True)
    for pattern in ("*.h5", "*.pixels", "*.safetensors", ".*.tmp", _STATE, _RUN):  # what tells of the run comes last
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = load_tensors(path)
        version, identity = state.pop("version"), state["identity"]
    except (DamagedFile, KeyError, TypeError, AttributeError) as error:
        # the last three: another file than a checkpoint
        reason = error if isinstance(error, DamagedFile) else type(error).__name__
        raise ModelError(f"{path} is damaged ({reason}); discard the interrupted run with --force") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if version != FORMAT_VERSION or not isinstance(identity, dict):
        raise ModelError(
            f"{path} was written by another version of featcache, which trains otherwise; finish that run with it, or "
            "discard the interrupted run with --force"
        )
    return dict(state)
