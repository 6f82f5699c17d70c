"""The folder of a fine-tuning that is under way: ``model-ft.parts/`` with what it is, and how far it has come.

In: a run's identity (everything that changes the numbers) and its state. Out: ``run.json``, readable, and
``checkpoint.pt``, tensors and numbers only, both replaced atomically; reading them runs no code.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

from featcache.errors import ModelError, UsageError
from featcache.publish import publish_file
from featcache.spec import spec_difference

_RUN, _STATE = "run.json", "checkpoint.pt"
FORMAT_VERSION = 1


def work_folder(output: Path) -> Path:
    """Where the unfinished work for the model folder ``output`` lies."""
    return output.with_name(output.name + ".parts")


def has_state(output: Path) -> bool:
    """Whether there is a checkpoint."""
    return (work_folder(output) / _STATE).is_file()


def check_unfinished(output: Path, *, resume: bool, force: bool) -> None:
    """Raise UsageError if an interrupted run is in the way; before any work."""
    if has_state(output) and not (resume or force):
        raise UsageError(
            f"{work_folder(output)} holds an interrupted run; add --resume to continue it, or --force to discard it and start anew"
        )


def open_work(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Settle whether to start or to continue.

    Args:
        output: the model folder that is to be. identity: of this run, JSON values.

    Returns:
        The state of an interrupted run to continue; None: there is none.

    Raises:
        UsageError: it belongs to other settings (named). ModelError: its files are damaged. StorageError: the folder
        cannot be written.
    """
    folder = work_folder(output)
    if not has_state(output):
        with publish_file(folder / _RUN) as file:
            file.write((json.dumps(identity, indent=2) + "\n").encode())
        return None
    before = _read_identity(folder / _RUN)
    if before != identity:
        raise UsageError(
            f"the interrupted run in {folder} had other settings ({'; '.join(spec_difference(before, identity))}); "
            "repeat them, or discard that run with --force"
        )
    return _read_state(folder / _STATE)


def save_state(output: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint atomically. Raises StorageError; the one before is then still there."""
    import torch

    buffer = io.BytesIO()
    torch.save(state | {"version": FORMAT_VERSION}, buffer)
    with publish_file(work_folder(output) / _STATE) as file:
        file.write(buffer.getbuffer())


def remove_work(output: Path) -> None:
    """The model is saved; nothing here is needed any more."""
    shutil.rmtree(work_folder(output), ignore_errors=True)


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); discard the interrupted run with --force") from error
    return found if isinstance(found, dict) else {}


def _read_state(path: Path) -> dict[str, Any]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state.pop("version")
    except Exception as error:  # pickle and zip raise many kinds
        raise ModelError(
            f"{path} is damaged ({type(error).__name__}); discard the interrupted run with --force"
        ) from error
    if version != FORMAT_VERSION:
        raise ModelError(f"{path} was written by another version of featcache; discard it with --force")
    return dict(state)
