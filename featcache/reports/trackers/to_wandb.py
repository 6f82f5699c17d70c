"""Weights & Biases: a run as ``WANDB_PROJECT``, ``WANDB_MODE``, ``WANDB_DIR`` and the other variables of wandb say."""

import os
import re
from pathlib import Path

from featcache.reports.trackers.run import Run


def write(run: Run) -> str:
    """Tell ``run``: parameters as its configuration, scores as its summary, pictures, and the model folder as an artefact.

    Returns:
        Its address, or where it lies when offline. Raises what wandb raises.
    """
    import wandb

    project = os.environ.get("WANDB_PROJECT", "featcache")
    with wandb.init(
        project=project, name=f"{run.command} {run.name}", job_type=run.command, config=run.parameters
    ) as active:
        for step, values in run.rows():
            active.log(values, step=step)
        active.summary.update(run.scores)
        if run.pictures:
            active.log({Path(picture).name: wandb.Image(picture) for picture in run.pictures})
        if run.keeps_model:
            named = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(run.model).name)[:100]  # all that wandb takes
            artifact = wandb.Artifact(named, type="model", metadata=run.parameters)
            artifact.add_dir(run.model)
            active.log_artifact(artifact)
    return str(active.url or active.dir)
