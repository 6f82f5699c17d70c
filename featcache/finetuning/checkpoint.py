"""The folder of a fine-tuning that is under way: ``model-ft.parts/`` with what it is, and how far it has come.

In: a run's identity (everything that changes the numbers) and its state. Out: ``run.json`` for people to read, and
``checkpoint.pt`` with both, tensors and plain values only, replaced atomically; reading it runs no code.
"""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

from featcache.errors import ModelError, StorageError, UsageError
from featcache.spec import difference, fingerprint_of
from featcache.system.files import publish_file
from featcache.system.safe_load import DamagedFile, load_tensors, parse_json
from featcache.system.workdir import work_folder

_RUN, _STATE = "run.json", "checkpoint.pt"
FORMAT_VERSION = 1


def has_state(output: Path) -> bool:
    """Whether there is a checkpoint."""
    return (work_folder(output) / _STATE).is_file()


def is_finished(output: Path) -> bool:
    """Whether the run in the work folder has published its model already, and was only cut off before tidying up."""
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
    """Mark the work folder, which exists, as a fine-tuning's; with ``force`` empty it first."""
    if force:
        _empty(output)
    run = work_folder(output) / _RUN
    if not run.is_file():
        with publish_file(run) as file:
            file.write(b"{}\n")


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
    """The model is saved; nothing here is needed any more. What is not a fine-tuning's stays."""
    _empty(output)


def tidy_work(output: Path) -> None:
    """Leave no trace of a run that ended before it had anything worth keeping: neither features nor a checkpoint."""
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
    except (DamagedFile, KeyError, TypeError, AttributeError) as error:  # the last ones: not our state at all
        reason = error if isinstance(error, DamagedFile) else type(error).__name__
        raise ModelError(f"{path} is damaged ({reason}); discard the interrupted run with --force") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if version != FORMAT_VERSION or not isinstance(identity, dict):
        raise ModelError(f"{path} was written by another version of featcache; discard it with --force")
    return dict(state)
