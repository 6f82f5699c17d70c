"""What comes out of fine-tuning: a report, and a model folder like any other, with its history as a table.

In: the network, the model it started from, the scores. Out: the report; the folder, with ``backbone.safetensors`` in it.
"""

import csv
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import ModelError
from featcache.finetuning.compare import Paired
from featcache.heads.head import FittedHead, softmax
from featcache.heads.metrics import evaluate_probabilities
from featcache.models.model import Model, save_model
from featcache.system.safe_load import parse_json
from featcache.system.workdir import work_folder

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.finetuning.network import Network


@dataclasses.dataclass(frozen=True)
class FinetuneReport:
    """What ``finetune`` did; accuracies in 0..1, None where there are no such images.

    Attributes:
        model: the folder. recipe: its name.
        epochs: trained. best_epoch: the one kept.
        alpha: share of the fine-tuned weights in the saved model, the rest is the start; 0: the cached head itself; None:
            the head was a new one, so that there is nothing to mix with.
        val_accuracy, head_val_accuracy: of the saved model and of the cached head, on the images by which epoch and
            alpha were chosen. test_accuracy, head_test_accuracy: on images by which nothing was chosen.
        p_value: of McNemar's test between the two, on test, or on val where there is no test.
        verdict: the comparison in a sentence. comparison: a line per split, with standard errors.
        parameters, trainable_parameters: of the network.
        images_per_second: in training. seconds: of the whole call.
    """

    model: Path
    recipe: str
    epochs: int
    best_epoch: int
    alpha: float | None
    val_accuracy: float
    head_val_accuracy: float
    test_accuracy: float | None
    head_test_accuracy: float | None
    p_value: float
    verdict: str
    comparison: tuple[str, ...]
    parameters: int
    trainable_parameters: int
    images_per_second: float
    seconds: float


def metrics_of(
    report: FinetuneReport,
    comparison: dict[str, dict[str, Any]],
    pairs: dict[str, Paired],
    classes: tuple[str, ...],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of ``metrics.json``: accuracies, all scores of val and test (None: no images), comparison, history, report.

    Four accuracies stand there twice, by themselves and in ``report``: both are read.
    """
    accuracies = ("val_accuracy", "test_accuracy", "head_val_accuracy", "head_test_accuracy")
    scores = {name: evaluate_probabilities(pair.y, softmax(pair.tuned), classes) for name, pair in pairs.items()}
    return {
        **{name: getattr(report, name) for name in accuracies},
        "val": scores["val"],
        "test": scores.get("test"),
        "comparison": comparison,
        "history": history,
        "report": {name: value for name, value in dataclasses.asdict(report).items() if name != "model"},
    }


def read_report(output: Path) -> FinetuneReport:
    """The report that was saved with the model. Raises ModelError if it cannot be read."""
    try:
        facts = parse_json((output / "metrics.json").read_text())["report"]
        return FinetuneReport(model=output, **(facts | {"comparison": tuple(facts["comparison"])}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{output} holds no report of a fine-tuning ({error})") from error


def save_finetuned(
    output: Path,
    network: "Network",
    backbone: "Backbone",
    start: Model,
    *,
    training: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Publish the model folder ``output`` atomically.

    Args:
        network: with the weights to keep. backbone, start: what it was made from; its spec becomes that of the new model,
            with the new weights.
        training: settings, with ``alpha`` (0: the cached head is saved as it was).
        metrics: scores, with ``history``: a row per epoch.

    Raises:
        StorageError: it cannot be written.
    """
    from featcache.backbones.backbone import save_weights
    from featcache.finetuning.network import to_backbone, to_head

    origin = start.manifest["weights"]["source"]
    head, source = to_head(network), f"fine-tuned from {origin}"
    if training["alpha"] == 0:
        head, source = start.head, origin
    tuned = to_backbone(network, backbone, source)
    spec = dataclasses.replace(start.spec, weights_sha256=tuned.weights_sha256)
    work = work_folder(output)
    save_weights(tuned, work / "backbone.safetensors")
    save_model(
        output,
        FittedHead(head, (), {}, []),
        classes=start.classes,
        spec=spec,
        weights={"source": source, "reload": None},
        training=training,
        metrics=metrics,
        files={"backbone.safetensors": work / "backbone.safetensors", "history.csv": _as_table(metrics["history"])},
        finetuned=True,
    )


def _as_table(history: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()
