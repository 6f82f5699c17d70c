"""``--log``: what TensorBoard and MLflow have stored, read back by themselves; what becomes of a run whose tracker fails.

wandb is not installed: a stand-in of its few names writes down what it was told.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import HISTORY, save_tuned
from PIL import Image

from featcache.errors import MissingDependencyError, StorageError, TrackerError, UsageError
from featcache.models.evaluate import evaluate
from featcache.models.model import load_model
from featcache.reports.trackers import to_tensorboard
from featcache.reports.trackers.run import Run, evaluation_run, training_run
from featcache.reports.trackers.tracker import check_tracker, log_run

# A module that has no more than what we call, with wandb's signatures; what it is told goes to a file in WANDB_DIR.
STAND_IN = """
import json, os
told = {"log": [], "summary": {}, "artifacts": []}
class Artifact:
    def __init__(self, name, type, metadata): self.facts = {"name": name, "type": type, "metadata": metadata}
    def add_dir(self, path): self.facts["files"] = sorted(os.listdir(path))
class _Run:
    url, dir, summary = None, os.environ.get("WANDB_DIR", "."), told["summary"]
    def __enter__(self): return self
    def __exit__(self, *error):
        with open(os.path.join(self.dir, "told.json"), "w") as file: json.dump(told, file)
    def log(self, values, step=None): told["log"].append([step, values])
    def log_artifact(self, artifact): told["artifacts"].append(artifact.facts)
def Image(path): return os.path.basename(path)
def init(*, project, name, job_type, config):
    told.update(project=project, name=name, job_type=job_type, config=config, mode=os.environ.get("WANDB_MODE"))
    return _Run()
"""
HANGS = """
import os, subprocess, time
def init(**_):
    child = subprocess.Popen(["sleep", "300"])
    with open(os.environ["WANDB_DIR"] + "/child", "w") as file: file.write(str(child.pid))
    time.sleep(300)
"""
FAILS = "def init(**_): raise ValueError('no\\nservice')"


NAME, SHOWN = "m <b>\udce9", r"m <b>\udce9"  # of a model's folder: not UTF-8


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a module in the place of wandb, here and in what is started from here; the folder it writes to."""

    def put(text: str) -> Path:
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / "wandb.py").write_text(text)
        (tmp_path / "wandb-dir").mkdir()
        monkeypatch.syspath_prepend(tmp_path / "place")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'place'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb-dir"))
        return tmp_path / "wandb-dir"

    return put


@pytest.fixture
def tuned(tmp_path: Path) -> Run:
    """A fine-tuning of three epochs, with a picture of 4 x 3 pixels and a page."""
    save_tuned(tmp_path / NAME)
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3)).save(tmp_path / "curves.png")
    (tmp_path / "page.html").write_text("a page")
    return training_run("finetune", tmp_path / NAME, [tmp_path / "curves.png", tmp_path / "page.html"])


def epochs(name: str) -> list[tuple[int, float]]:
    return [(row["epoch"], row[name]) for row in HISTORY if row[name] is not None]


def test_what_is_told_is_what_the_model_holds(tuned: Run, model: Path, cache: Path) -> None:
    assert tuned.parameters["recipe"] == "gradual" and tuned.parameters["spec.preprocess.resize"] == 40
    assert tuned.scores["comparison/val/p_value"] == 1.0 and tuned.pictures == tuned.files[:1]
    scores = evaluate(model, cache, split="test")
    told = evaluation_run(model, scores, source="caf\udce9", files=[])
    assert told.scores["accuracy"] == scores["accuracy"] and not told.history and not told.keeps_model
    assert [told.scores[f"accuracy_interval_{end}"] for end in ("low", "high")] == scores["accuracy_interval"]
    assert told.parameters["evaluated.split"] == "test" and told.parameters["evaluated.source"] == r"caf\udce9"
    assert not any("per_class" in name for name in told.scores)  # names of classes may hold anything
    metrics = load_model(model).manifest["metrics"]
    fitted = training_run("fit-head", model, [])
    assert {
        name: fitted.scores[name] for name in metrics if isinstance(metrics[name], float)
    }.items() <= metrics.items()


def test_rows_are_told_by_step_where_there_are_steps(tuned: Run) -> None:
    assert [place for place, _ in tuned.rows()] == [1, 2, 3]  # of models that know epochs only
    by_step = dataclasses.replace(tuned, history=[row | {"step": 50 * row["epoch"]} for row in HISTORY])
    assert [(place, values["epoch/epoch"]) for place, values in by_step.rows()] == [(50, 1), (100, 2), (150, 3)]


def test_tensorboard_reads_back_what_was_told(tuned: Run, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert log_run("tensorboard", tuned).startswith(f"{tmp_path / 'runs'}: tensorboard --logdir ")
    (folder,) = (tmp_path / "runs" / SHOWN).iterdir()
    found = accumulators.EventAccumulator(str(folder)).Reload()
    for name in ("train_loss", "val_loss", "val_accuracy"):
        events = found.Scalars(f"epoch/{name}")
        assert [(event.step, event.value) for event in events] == [(k, np.float32(v)) for k, v in epochs(name)], name
    assert found.Scalars("head_val_accuracy")[0].value == 0.5
    assert {*tuned.scores, "epoch/train_loss"} < {*found.Tags()["scalars"]}
    image = found.Images("curves.png")[0]
    assert (image.width, image.height) == (4, 3)
    card = found.Tensors("README.md/text_summary")[0].tensor_proto.string_val[0]
    assert card == (Path(tuned.model) / "README.md").read_bytes()
    hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = hparams.FromString(content).session_start_info.hparams
    assert told["recipe"].string_value == "gradual" and told["spec.preprocess.resize"].number_value == 40
    tags = [
        summary.value[0].tag for _, summary in to_tensorboard._summaries(dataclasses.replace(tuned, keeps_model=False))
    ]
    assert "README.md/text_summary" not in tags  # of a model that somebody else made, it may be a link to anything


@pytest.mark.slow  # its import alone takes seconds, twice
def test_mlflow_reads_back_what_was_told(tuned: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # kept, and off by default since MLflow 3.7
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow = pytest.importorskip("mlflow")
        check_tracker("mlflow", tmp_path / "m")
        assert str(tmp_path / "store") in log_run("mlflow", tuned)
        client = mlflow.MlflowClient(str(tmp_path / "store"))
        (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
        history = client.get_metric_history(run.info.run_id, "epoch/val_accuracy")
        artifacts = {entry.path for entry in client.list_artifacts(run.info.run_id)}
        kept = {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "model")}
    assert (run.info.run_name, run.info.status) == (f"finetune {SHOWN}", "FINISHED")
    assert run.data.params == {name: str(value) for name, value in tuned.parameters.items()}
    assert tuned.scores.items() <= run.data.metrics.items()
    assert sorted((metric.step, metric.value) for metric in history) == epochs("val_accuracy")
    assert artifacts == {"curves.png", "page.html", "model"}
    assert kept == {entry.name for entry in Path(tuned.model).iterdir()}


def test_wandb_is_told_by_its_own_names(tuned: Run, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stand_in(STAND_IN)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert log_run("wandb", tuned) == str(folder)
    told = json.loads((folder / "told.json").read_text())
    assert (told["project"], told["name"], told["mode"]) == ("featcache", f"finetune {SHOWN}", "offline")
    assert (told["config"], told["summary"]) == (tuned.parameters, tuned.scores)
    assert [(step, row.get("epoch/val_loss")) for step, row in told["log"][:3]] == [(1, 0.9), (2, None), (3, 0.7)]
    assert told["log"][3] == [None, {"curves.png": "curves.png"}]
    (artifact,) = told["artifacts"]
    assert artifact["name"] == "m--b--" and "model.json" in artifact["files"]


def test_a_tracker_that_hangs_is_ended_with_all_it_started(tuned: Run, stand_in: Any) -> None:
    folder, begun = stand_in(HANGS), time.perf_counter()
    with pytest.raises(TrackerError, match="no end after 4 s"):
        log_run("wandb", tuned, seconds=4.0)
    assert time.perf_counter() - begun < 60
    child = int((folder / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":  # nobody waits for it here
            return
        time.sleep(0.1)
    raise AssertionError("what it started still runs")


def test_a_tracker_that_fails_costs_neither_the_model_nor_the_exit_code(
    run: Any, cache: Path, tmp_path: Path, stand_in: Any
) -> None:
    stand_in(FAILS)
    code, out, err = run("fit-head", cache, "-o", tmp_path / "m", "--C", "1", "--no-report", "--log", "wandb", "-q")
    assert (code, out.count("\n")) == (0, 10)
    assert err == "warning: not logged to wandb: ValueError: no service\n"
    assert load_model(tmp_path / "m").classes == ("a", "b", "c")


def test_what_cannot_be_used_is_said_before_the_work(
    run: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.models.fit.fit_head", None)
    code, _, err = run("fit-head", cache, "-o", tmp_path / "m", "--log", "comet")
    assert (code, err) == (2, "error: --log must be one of tensorboard, mlflow, wandb, found 'comet'\n")
    model = tmp_path / "m"
    (tmp_path / "wandb").mkdir()  # as wandb makes one where it runs: no package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        check_tracker("wandb", model)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(MissingDependencyError, match="pip install mlflow"):
        check_tracker("mlflow", model)
    (tmp_path / "runs").touch()
    with pytest.raises(StorageError, match="runs: it is a file"):
        check_tracker("tensorboard", model)
    with pytest.raises(UsageError, match="found ''"):
        check_tracker("", model)


def test_evaluate_takes_it_too(run: Any, model: Path, cache: Path, stand_in: Any) -> None:
    folder = stand_in(STAND_IN)
    code, _, err = run("evaluate", model, cache, "--log", "wandb", "--json")
    assert (code, err) == (0, f"  logged to {folder}\n")
    told = json.loads((folder / "told.json").read_text())
    assert told["job_type"] == "evaluate" and told["artifacts"] == []


@pytest.mark.slow
def test_finetune_takes_it_too(run: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    words = ("finetune", trained / "photos", "-o", tmp_path / "t", "--init", trained / "m", "--epochs", "2")
    assert run(*words, "--log", "comet")[0] == 2
    code, _, err = run(*words, "--log", "tensorboard", "--no-report")
    assert code == 0 and f"  logged to {tmp_path / 'logs'}: tensorboard --logdir {tmp_path / 'logs'}\n" in err
    (folder,) = (tmp_path / "logs" / "t").iterdir()
    found = accumulators.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in found.Scalars("epoch/val_loss")] == [1, 2]
    assert found.Tags()["images"] == (["t.curves.png"] if importlib.util.find_spec("matplotlib") else [])
