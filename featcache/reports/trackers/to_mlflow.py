"""MLflow: a run where ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say, as for every program that uses MLflow."""

import os

from featcache.reports.trackers.run import Run
from featcache.system.display import printable

_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # its own: minutes


def write(run: Run) -> str:
    """Tell ``run``: parameters, metrics by step or epoch, pictures and pages, and the model folder as artefacts.

    Returns:
        Where MLflow keeps it. Raises what MLflow raises.
    """
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    import mlflow

    with mlflow.start_run(run_name=f"{run.command} {run.name}") as active:
        mlflow.log_params(run.parameters)
        for step, values in run.rows():
            mlflow.log_metrics(values, step=step)
        mlflow.log_metrics(run.scores)
        mlflow.set_tags({"featcache.command": run.command, "featcache.model": printable(run.model)})
        for file in run.files:
            mlflow.log_artifact(file)
        if run.keeps_model:
            mlflow.log_artifacts(run.model, "model")
    return f"{mlflow.get_tracking_uri()}, run {active.info.run_id}"
