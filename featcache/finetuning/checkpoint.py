"""The work folder of a run, ``model-ft.parts/``: which run it is, and its checkpoint.

In: a run's identity (everything that changes the numbers) and its state. Out: ``run.json`` for people to read, and
``checkpoint.pt`` with both, tensors and plain values only, replaced atomically; reading it runs no code.
"""

import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from featcache.errors import ModelError, StorageError, UsageError
from featcache.spec import difference, fingerprint_of
from featcache.system.files import publish_file
from featcache.system.safe_load import DamagedFile, load_tensors, parse_json
from featcache.system.workdir import work_folder

if TYPE_CHECKING:
    from featcache.finetuning.trainer import Trainer

_RUN, _STATE = "run.json", "checkpoint.pt"
FORMAT_VERSION = 1


class Position(NamedTuple):
    """How far training has come: whole epochs, and steps of the next one."""

    epochs: int
    steps: int

    def __str__(self) -> str:
        steps = f" and {self.steps} steps" if self.steps else ""
        return f"after {self.epochs} epochs{steps}"


class Checkpoint:
    """The checkpoint of one run on disk, and what is known of it.

    Attributes:
        position: where training stood when it was written; None: there is none yet.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, position: Position | None, writes: bool) -> None:
        """``writes``: whether this process is the one that writes."""
        self.position = position
        self._output, self._identity, self._writes = output, identity, writes
        self._written = time.perf_counter()

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return work_folder(self._output)

    @property
    def age(self) -> float:
        """Seconds since it was written, or since the run was started or continued."""
        return time.perf_counter() - self._written

    def save(self, trainer: "Trainer") -> None:
        """Write the trainer's state. Raises StorageError, TrainingError; the checkpoint before is then still there."""
        if self._writes:
            save_state(self._output, self._identity, trainer.state())
            self.position = Position(trainer.epoch, trainer.batch)
        self._written = time.perf_counter()


def has_state(output: Path) -> bool:
    """Whether there is a checkpoint."""
    return (work_folder(output) / _STATE).is_file()


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
        UsageError: an interrupted run, and neither ``resume`` nor ``force`` was asked for. StorageError: a folder, or
        file, of somebody else.
    """
    folder = work_folder(output)
    if has_state(output) and not (resume or force):
        raise UsageError(
            f"{folder} holds an interrupted run; add --resume to continue it, or --force to discard it and start anew"
        )
    foreign = os.path.lexists(folder) and not folder.is_dir()
    if folder.is_dir() and not (folder / _RUN).is_file():
        # a run killed at its very beginning leaves its lock, and perhaps a temporary file
        foreign = any(entry.name != "lock" and not entry.name.startswith(".run.json.") for entry in folder.iterdir())
    if foreign:
        raise StorageError(f"{folder}, where unfinished work would go, is in use for something else; choose another -o")


def claim_work(output: Path, *, force: bool) -> None:
    """Mark the work folder, which exists, as that of a fine-tuning; with ``force`` remove an earlier run's files first."""
    if force:
        _empty(output)
    run = work_folder(output) / _RUN
    if not run.is_file():
        with publish_file(run) as file:
            file.write(b"{}\n")


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
    if not has_state(output):
        with publish_file(folder / _RUN) as file:
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
    with publish_file(work_folder(output) / _STATE, needed=buffer.getbuffer().nbytes) as file:
        file.write(buffer.getbuffer())


def remove_work(output: Path) -> None:
    """Remove the files of a run whose model is saved. Files of somebody else stay."""
    _empty(output)


def tidy_work(output: Path) -> None:
    """Remove the files of a run that ended before it had features or a checkpoint to keep."""
    folder = work_folder(output)
    if not any((folder / name).exists() for name in (_STATE, "features.h5", work_folder(folder / "features.h5"))):
        _empty(output)


def _empty(output: Path) -> None:
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
    except (
        DamagedFile,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # the last three: another file than a checkpoint
        reason = error if isinstance(error, DamagedFile) else type(error).__name__
        raise ModelError(f"{path} is damaged ({reason}); discard the interrupted run with --force") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if version != FORMAT_VERSION or not isinstance(identity, dict):
        raise ModelError(f"{path} was written by another version of featcache; discard it with --force")
    return dict(state)
