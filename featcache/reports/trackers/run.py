"""What is told of a run: a plain value of JSON. In: a model folder, or the scores of an evaluation. Out: ``Run``."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from featcache.backbones.saved import own_file, read_manifest
from featcache.models.model import METRICS
from featcache.system.display import printable
from featcache.system.safe_load import parse_json

_NO_SCORES = {"per_class", "history", "report", "curve"}  # named by users' classes, told otherwise, or tables


@dataclasses.dataclass(frozen=True)
class Run:
    """One fit-head, finetune or evaluate.

    Attributes:
        command: which. model: the folder's path.
        parameters: what it was made with. scores: numbers; ``val/accuracy`` is the accuracy among what is told of val.
        history: a row per score, or epoch: ``epoch``, perhaps ``step``, and numbers or None.
        files: pictures (.png) and pages about it, outside the folder. keeps_model: whether the folder is a result of it.
    """

    command: str
    model: str
    parameters: dict[str, Any]
    scores: dict[str, float]
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    keeps_model: bool = False

    @property
    def name(self) -> str:
        """Of the model's folder, as it can be shown."""
        return printable(Path(self.model).name)

    @property
    def pictures(self) -> list[str]:
        """Those of the files."""
        return [file for file in self.files if file.endswith(".png")]

    def rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The step, or epoch, of each row of the history, and the numbers that there are of it."""
        for row in self.history:
            axis = "step" if row.get("step") else "epoch"
            yield int(row[axis]), {f"epoch/{name}": value for name, value in _numbers(row) if name != axis}


def training_run(command: str, model: Path, files: Iterable[Path]) -> Run:
    """Of a model that was just saved. Raises ModelError, OSError: it cannot be read any more."""
    manifest = read_manifest(model)
    metrics = parse_json(own_file(model, METRICS).read_text())
    history = metrics.get("history") or []
    return Run(
        command, _path(model), _parameters(manifest), dict(_numbers(metrics)), history, [*map(_path, files)], True
    )


def evaluation_run(model: Path, scores: Mapping[str, Any], *, source: object, files: Iterable[Path]) -> Run:
    """Of ``evaluate``: its scores, and the model they are of. Raises ModelError: the model cannot be read."""
    of_run = {"evaluated.source": printable(str(source)), "evaluated.split": scores["split"]}
    parameters = _parameters(read_manifest(model)) | of_run
    return Run("evaluate", _path(model), parameters, dict(_numbers(scores)), files=[*map(_path, files)])


def _path(path: Path) -> str:
    return str(path.absolute())


def _parameters(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the model was trained, and the spec, by names with dots."""
    facts = dict(manifest["training"]) | {"spec": manifest["spec"], "weights": manifest["weights"]["source"]}
    facts |= {"fingerprint": manifest["fingerprint"], "classes": len(manifest["classes"])}
    return dict(_flat(facts | {"featcache": manifest["versions"]["featcache"]}))


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value if isinstance(value, bool | int | float) else printable(str(value))


def _numbers(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers in a tree, an interval as its two ends."""
    for key, value in facts.items():
        if key in _NO_SCORES:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif key.endswith("interval") and value is not None:
            yield from zip((f"{prefix}{key}_low", f"{prefix}{key}_high"), value, strict=True)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + key, value
