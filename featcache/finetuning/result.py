"""What comes out of fine-tuning: which weights to keep, whether they are better, a report, and a model folder like any other.

In: logits of several networks on the same images, the network to keep, the model it started from. Out: a paired comparison with
the cached head; the report; the folder, with ``backbone.safetensors`` and the history as a table in it.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from featcache.errors import ModelError
from featcache.heads.head import Array, FittedHead, softmax
from featcache.heads.metrics import accuracy, accuracy_interval, log_loss, mcnemar
from featcache.heads.validation import fit_temperature
from featcache.models.model import Model, save_model
from featcache.models.training_rows import TrainingRows
from featcache.system.display import Shown, quantity
from featcache.system.safe_load import parse_json
from featcache.system.workdir import work_folder

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.finetuning.network import Network

_SIGNIFICANT = 0.05
UNTRAINED = "nothing was trained beyond the cached head, for lack of time: the saved model is that head, unchanged"


@dataclasses.dataclass(frozen=True, repr=False)
class FinetuneReport(Shown):
    """What ``finetune`` did; accuracies in 0..1, None where there are no such images.

    Attributes:
        model: the folder. recipe: its name.
        epochs: trained, one that was cut off included. best_epoch, best_step: whose weights were kept, of all scored on val; 0: none.
        alpha: share of the fine-tuned weights in the saved model, the rest is the start; 0: the cached head itself; None:
            the head was a new one, so that there is nothing to mix with.
        val_accuracy, head_val_accuracy: of the saved model and of the cached head, on the images by which epoch and
            alpha were chosen. test_accuracy, head_test_accuracy: on images by which nothing was chosen.
        val_accuracy_without_copies, test_accuracy_without_copies: of the saved model, on images that no training has seen.
        p_value: of McNemar's test between the two, on test, or on val where there is no test.
        verdict: the comparison in a sentence. comparison: a line per split, with 95 % intervals.
        parameters, trainable_parameters: of the network.
        temperature: what its logits were divided by, fitted on val; 1 where the saved model is the cached head.
        images_per_second: in training. seconds: of the whole call.
        budget: what was planned for it, see ``budget.Plan``, and whether time ran ``out_of_time`` before the plan's end.
        groups: as ``FitReport.groups``.
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
    val_accuracy_without_copies: float | None = None  # defaults: reports of earlier versions lack them
    test_accuracy_without_copies: float | None = None
    temperature: float = 1.0
    best_step: int | None = None
    budget: dict[str, Any] | None = None
    groups: dict[str, Any] | None = None

    _shown = (
        "model",
        "best_epoch",
        "epochs",
        "val_accuracy",
        "head_val_accuracy",
        "test_accuracy",
        "verdict",
        "seconds",
    )


def read_report(output: Path) -> FinetuneReport:
    """The report that was saved with the model. Raises ModelError if it cannot be read."""
    try:
        facts = parse_json((output / "metrics.json").read_text())["report"]
        return FinetuneReport(model=output, **(facts | {"comparison": tuple(facts["comparison"])}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{output} holds no report of a fine-tuning ({error})") from error


def score(y: Array, logits: Array) -> tuple[float, float]:
    """(accuracy, -log loss): better is larger; the loss decides between equal accuracies, which are common on few images."""
    probabilities = softmax(logits.astype(np.float64))
    return accuracy(y, probabilities), -log_loss(y, probabilities)


def choose(y: Array, candidates: dict[float, Array]) -> float:
    """The share of the fine-tuned weights whose logits (n, C) have the best ``score``; of equal ones the smallest."""
    return max(sorted(candidates), key=lambda alpha: score(y, candidates[alpha]))


def calibrate(network: "Network", y: Array, logits: Array) -> float:
    """Divide ``network``'s logits by the temperature of its (n, C) ``logits`` on val, in its last layer; return that."""
    temperature, _ = fit_temperature(y, logits)
    last = [module for module in network.head if isinstance(module, nn.Linear)][-1]
    for parameter in (last.weight, last.bias):
        parameter.data /= temperature
    return temperature


def compare(
    y: Array, head_logits: Array, tuned_logits: Array, *, split: str, seen: Array | None = None
) -> dict[str, Any]:
    """Frozen head against fine-tuned model on the same images.

    Args:
        y: (n,) labels. head_logits, tuned_logits: (n, C). seen: (n,) whether training has seen the image; None: no.

    Returns:
        split, n, head_accuracy, tuned_accuracy and their intervals (Wilson, 95 %), the counts and p-value of McNemar's test, a
        verdict in words, how many images training has ``seen``, and tuned_accuracy_without_copies, on the others.
    """
    new = np.ones(len(y), bool) if seen is None else ~seen
    head, tuned = softmax(head_logits.astype(np.float64)), softmax(tuned_logits.astype(np.float64))
    test = mcnemar(y, head, tuned)
    before, after = accuracy(y, head), accuracy(y, tuned)
    facts = {
        "split": split,
        "n": len(y),
        "head_accuracy": before,
        "head_interval": accuracy_interval(round(before * len(y)), len(y)),
        "tuned_accuracy": after,
        "tuned_interval": accuracy_interval(round(after * len(y)), len(y)),
        "seen": int((~new).sum()),
        "tuned_accuracy_without_copies": accuracy(y[new], tuned[new]) if new.any() else None,
        **test,
    }
    return facts | {"verdict": _verdict(before, after, test, split, len(y))}


def in_words(facts: dict[str, Any]) -> str:
    """``compare``'s accuracies as a line."""
    remark = ", by which epoch and mixture were chosen" if facts["split"] == "val" else ", by which nothing was chosen"
    if facts["seen"]:
        without = facts["tuned_accuracy_without_copies"]
        score_without = "no score without them" if without is None else f"fine-tuned {without:.2%} without them"
        remark = f", of which training has seen {facts['seen']}: {score_without}"
    head, tuned = (f"{facts[name][0]:.1%} to {facts[name][1]:.1%}" for name in ("head_interval", "tuned_interval"))
    return (
        f"{facts['split']}: frozen head {facts['head_accuracy']:.2%} (95% interval {head}), fine-tuned "
        f"{facts['tuned_accuracy']:.2%} ({tuned}), on {quantity(facts['n'], 'image')}{remark}"
    )


def _verdict(before: float, after: float, test: dict[str, Any], split: str, n: int) -> str:
    remark = "; optimistic, as epoch and mixture were chosen on these images" if split == "val" else ""
    won, lost, p = test["only_second_right"], test["only_first_right"], test["p_value"]
    counts = f"{quantity(won, 'image')} won, {lost} lost of {n} in {split}; McNemar p = {p:.2g}{remark}"
    if won == lost == 0:
        return f"fine-tuned and frozen head agree on every image of {split}: fine-tuning made no difference"
    if p >= _SIGNIFICANT:
        return f"the difference is within noise ({counts}): the frozen head may serve you just as well"
    better = "better" if after > before else "worse"
    return f"the fine-tuned model is {better} than the frozen head ({counts})"


def unchanged(val: dict[str, Any]) -> str:
    """The verdict where the cached head was kept; ``val``: as ``compare`` gives it."""
    text = "nothing better than the cached head was found on val: the saved model is that head, unchanged"
    if val["head_accuracy"] < 1:
        return text
    return f"{text}; it is right on all of the {quantity(val['n'], 'image')}, of which only more could tell whether fine-tuning helps"


def save_finetuned(
    report: FinetuneReport,
    network: "Network",
    *,
    backbone: "Backbone",
    start: Model,
    training: dict[str, Any],
    metrics: dict[str, Any],
    rows: TrainingRows,
) -> None:
    """Publish the model folder atomically.

    Args:
        report: stored in ``metrics.json``; its accuracies and temperature stand there twice, as both are read. With ``alpha`` 0 the
            cached head is saved as it was.
        network: with the weights to keep. backbone, start: what it was made from; its spec becomes that of the new model,
            with the new weights.
        training: settings. metrics: further scores, with ``history``: a row per score on val. rows: all that training has seen.

    Raises:
        StorageError: it cannot be written.
    """
    from featcache.backbones.backbone import save_weights
    from featcache.finetuning.network import to_backbone, to_head

    origin = start.manifest["weights"]["source"]
    head, source = to_head(network), f"fine-tuned from {origin}"
    if report.alpha == 0:
        head, source = start.head, origin
    tuned = to_backbone(network, backbone, source)
    work = work_folder(report.model)
    save_weights(tuned, work / "backbone.safetensors")
    facts = dataclasses.asdict(report)
    accuracies = ("val_accuracy", "test_accuracy", "head_val_accuracy", "head_test_accuracy")
    save_model(
        facts.pop("model"),
        FittedHead(head, (), {}, []),
        classes=start.classes,
        spec=dataclasses.replace(start.spec, weights_sha256=tuned.weights_sha256),
        weights={"source": source, "reload": None},
        training=training,
        metrics={name: facts[name] for name in (*accuracies, "temperature")} | metrics | {"report": facts},
        files={"backbone.safetensors": work / "backbone.safetensors"},
        rows=rows,
        finetuned=True,
    )
