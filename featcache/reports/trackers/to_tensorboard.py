"""TensorBoard: event files in ``runs/MODEL/COMMAND-TIME`` beside the model, or below ``TENSORBOARD_LOGGING_DIR``."""

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from featcache.models.card import FILE
from featcache.reports.trackers.run import Run
from featcache.reports.trackers.tracker import runs_beside


def write(run: Run) -> str:
    """Tell ``run``: scores and history as scalars, parameters for the table of HPARAMS, pictures, the model card as text.

    By TensorBoard's own writer: that of PyTorch writes the same, and takes two seconds more to import.

    Returns:
        The command that shows it. Raises OSError, and what TensorBoard does.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    model = Path(run.model)
    runs = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or runs_beside(model))
    writer = EventFileWriter(str(_new_folder(runs / run.name, run.command)))
    for step, summary in _summaries(run):
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
    return f"{runs}: tensorboard --logdir {shlex.quote(str(runs))}"


def _summaries(run: Run) -> Iterator[tuple[int, Any]]:
    """What TensorBoard keeps of a run, each with its step."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.text.metadata import create_summary_metadata

    def of(tag: str, **value: Any) -> Any:
        return Summary(value=[Summary.Value(tag=tag, **value)])

    yield 0, hparams_pb(run.parameters, trial_id=f"{run.command} {run.name} {time.time()}")
    for step, values in [*run.rows(), (0, run.scores)]:
        for name, number in values.items():
            yield step, of(name, simple_value=number)
    for picture in map(Path, run.pictures):
        with Image.open(picture) as image:
            size = {"width": image.width, "height": image.height}
        yield 0, of(picture.name, image=Summary.Image(**size, colorspace=3, encoded_image_string=picture.read_bytes()))
    if run.keeps_model:  # just saved here: that of somebody else's model may be a link to anything
        text = TensorProto(dtype="DT_STRING", string_val=[(Path(run.model) / FILE).read_bytes()])
        yield 0, of(f"{FILE}/text_summary", tensor=text, metadata=create_summary_metadata("model card", ""))


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
