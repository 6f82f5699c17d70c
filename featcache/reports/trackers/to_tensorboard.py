"""TensorBoard: event files in ``runs/MODEL/COMMAND-TIME`` beside the model, or below ``TENSORBOARD_LOGGING_DIR``."""

import os
import shlex
import time
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.reports.trackers.run import Run
from featcache.reports.trackers.tracker import runs_beside

_CARD = "README.md"


def write(run: Run) -> str:
    """Tell ``run``: scores and history as scalars, parameters for the table of HPARAMS, pictures, the model card as text.

    Returns:
        The command that shows it. Raises OSError, and what TensorBoard does.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    model = Path(run.model)
    runs = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or runs_beside(model))
    with SummaryWriter(str(_new_folder(runs / model.name, run.command))) as writer:
        for step, values in run.rows():
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        for name, value in run.scores.items():
            writer.add_scalar(name, value, 0)
        for summary in hparams(run.parameters, run.scores):  # type: ignore[no-untyped-call] # add_hparams makes another run
            writer.file_writer.add_summary(summary)
        for picture in run.pictures:
            with Image.open(picture) as image:
                writer.add_image(Path(picture).name, np.asarray(image.convert("RGB")), 0, dataformats="HWC")
        if (card := model / _CARD).is_file():
            writer.add_text("model card", card.read_text(encoding="utf-8"))
    return f"{runs}: tensorboard --logdir {shlex.quote(str(runs))}"


def _new_folder(folder: Path, command: str) -> Path:
    """A folder that was not there: runs of one second get numbers."""
    name = f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        path = folder / (f"{name}-{number}" if number else name)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise FileExistsError(f"{folder / name} and 999 more are there")
