"""The model card: ``README.md`` of a model folder, as people read it and as the Hugging Face hub does. Loading never looks at it.

In: what a model folder says about itself. Out: its bytes, the same for the same model. The format is the hub's: facts in YAML between
lines of ``---`` (https://huggingface.co/docs/hub/model-cards), then Markdown. Names of classes, folders and files may hold anything:
in YAML they are strings of JSON, which YAML contains; in Markdown every sign that could mean anything is written as its number.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featcache.backbones.catalog import counted, is_commercial
from featcache.heads.head import Array
from featcache.system.display import middle_out, printable, quantity

FILE = "README.md"
_MOST_CLASSES = 200  # rows of a table; model.json names all
_LONGEST = 80  # signs of a name
_FEW = 10  # training images of a class from which little can be learnt
# Licences by the names that the hub has for them; others are "other" there, with a name. The weights' own are ``catalog.csv``'s.
_ON_HUB = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "apple-ascl", "apple-amlr", "gemma"}
_PROVIDED = (
    "timm ",
    "package ",
    "torchvision ",
    "open_clip ",
    "the hub",
)  # how the sources of weights begin that a library has
_TUNED = "fine-tuned from "
_HARMLESS = r"(?<=\w)[_-](?=\w)|(?<=\d)\.(?=\d)|[',]"  # signs that mean nothing where they stand


def make_card(name: str, manifest: Mapping[str, Any], metrics: Mapping[str, Any], labels: Array | None) -> bytes:
    """The card of a model.

    Args:
        name: of its folder. manifest: ``model.json``. metrics: ``metrics.json``.
        labels: (N,) of the training images, positions among its classes, -1: of an earlier training; None: not known.
    """
    counts = None if labels is None else np.bincount(labels[labels >= 0], minlength=len(manifest["classes"])).tolist()
    parts = [
        _facts(name, manifest, metrics),
        f"# {_literal(name)}",
        _about(manifest),
        _use(manifest),
        _scores(manifest, metrics),
        _classes(manifest["classes"], counts, metrics),
        _spec(manifest),
        _licence_text(manifest),
        _limits(manifest, metrics, counts),
    ]
    return ("\n\n".join(parts) + "\n").encode()


def _facts(name: str, manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """What the hub reads, in YAML."""
    tags = ["image-classification", "featcache", *(["linear-probe"] if _is_linear(manifest) else [])]
    facts: dict[str, Any] = {"library_name": "featcache", "pipeline_tag": "image-classification", "tags": tags}
    licence = licence_of(manifest)
    if licence is not None:
        facts |= {"license": licence} if licence in _ON_HUB else {"license": "other", "license_name": licence}
    if base := _base_model(manifest):
        facts["base_model"] = base
    lines = [f"{key}: {_as_json(value)}" for key, value in facts.items()]
    if results := list(_results(manifest, metrics)):
        lines.append("metrics: " + _as_json(sorted({entry["type"] for _, entries in results for entry in entries})))
        lines += ["model-index:", f"- name: {_as_json(name)}", "  results:"]
    for dataset, entries in results:
        lines.append('  - task: {"type": "image-classification", "name": "Image classification"}')
        lines += [
            f"    dataset: {_as_json(dataset)}",
            "    metrics:",
            *(f"    - {_as_json(entry)}" for entry in entries),
        ]
    return "\n".join(["---", *lines, "---"])


def _results(
    manifest: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Iterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Each split that was scored, and its scores, as the hub's ``model-index`` has them."""
    names = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro F1")}
    for split in ("val", "test"):
        if scores := metrics.get(split):
            found = [(*names[key], scores[key]) for key in names]
            yield _dataset(split), [{"type": kind, "name": name, "value": value} for kind, name, value in found]
    if (value := metrics.get("cv_accuracy")) is not None:
        yield _dataset("train"), [{"type": "accuracy", "name": "Accuracy, cross-validated", "value": value}]


def _dataset(split: str) -> dict[str, str]:
    return {"type": "imagefolder", "name": "images of these classes", "split": split}


def _about(manifest: Mapping[str, Any]) -> str:
    backbone, stated, head = _backbone(manifest), manifest["spec"].get("external"), manifest["head"]["kind"]
    heads = {"logreg": "Logistic regression", "linear": "A linear classifier", "mlp": "A small network"}
    made = f"{heads.get(head, 'A classifier')} on embeddings of the frozen network {_literal(backbone)}"
    if manifest["finetuned"]:
        made = f"The network {_literal(backbone)}, fine-tuned as a whole"
    elif stated:  # vectors that were imported
        made = f"{heads.get(head, 'A classifier')} on vectors made elsewhere, stated: {_literal(_in_words(stated.get('stated')))}"
    n, classes = manifest["training"].get("n_train"), quantity(len(manifest["classes"]), "class")
    trained = "" if n is None else f", trained on {quantity(n, 'image')}"
    return f"{made}: tells {classes} of images apart{trained}. Made by featcache {manifest['versions']['featcache']}."


def _use(manifest: Mapping[str, Any]) -> str:
    if not _backbone(manifest):
        return (
            "## Use\n\nIt labels caches of vectors that were imported with the same statement, not images; with featcache "
            "installed:\n\n```sh\nfeatcache predict model vectors.h5 -o labels.csv\n```"
        )
    return (
        "## Use\n\n"
        "With featcache installed; `model` is this folder, or a copy of it (`hf download OWNER/NAME --local-dir model`):\n\n"
        "```sh\nfeatcache predict model new_photos -o labels.csv\n```\n\n"
        "```python\nimport featcache\n\n"
        'model = featcache.load_model("model")\n'
        'print(model.predict(["photo.jpg"])[0].top(' + str(min(3, len(manifest["classes"]))) + "))\n```"
    )


def _scores(manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    rows = []
    for split in ("val", "test"):
        if not (scores := metrics.get(split)):
            continue
        compared = metrics.get("comparison", {}).get(split, {})
        without = scores.get("accuracy_without_copies", compared.get("tuned_accuracy_without_copies"))
        low, high = scores["accuracy_interval"]
        remark = "epoch and mixture were chosen on these" if manifest["finetuned"] and split == "val" else ""
        figures = [scores["accuracy"], scores["balanced_accuracy"], scores["macro_f1"], without]
        accuracy, *others = ["-" if value is None else f"{value:.2%}" for value in figures]
        rows.append([split, f"{scores['n']:,}", accuracy, f"{low:.2%} to {high:.2%}", *others, remark])
    if (value := metrics.get("cv_accuracy")) is not None:
        n = f"{manifest['training']['n_train']:,}"
        remark = "each image by a model that was trained without it; corrected for the choice of the setting"
        rows.append(["train, cross-validated", n, f"{value:.2%}", "-", "-", "-", "-", remark])
    if not rows:
        return "## Scores\n\nNone: there were no images to score on. Score it on your own with `featcache evaluate`."
    heads = ["images", "number", "accuracy", "95 % interval", "balanced accuracy", "macro F1"]
    return "## Scores\n\n" + _table([*heads, "accuracy without copies of training images", "remark"], rows)


def _classes(classes: Sequence[str], counts: Sequence[int] | None, metrics: Mapping[str, Any]) -> str:
    scored = next((split for split in ("test", "val") if metrics.get(split)), None)
    per_class = list(metrics[scored]["per_class"].values()) if scored else []
    rows = []
    for k, name in enumerate(classes[:_MOST_CLASSES]):
        row = [_literal(name), "-" if counts is None else f"{counts[k]:,}"]
        if scored:
            entry = per_class[k]
            shares = [entry["recall"], entry["precision"]]
            row += [f"{entry['n']:,}", *("-" if value is None else f"{value:.2%}" for value in shares)]
        rows.append(row)
    heads = ["class", "training images", *([f"in {scored}", "recall", "precision"] if scored else [])]
    more = len(classes) - _MOST_CLASSES
    return "## Classes\n\n" + _table(heads, rows) + (f"\n\nAnd {more:,} more: see `model.json`." if more > 0 else "")


def _spec(manifest: Mapping[str, Any]) -> str:
    """All that changes the numbers."""
    spec, weights = manifest["spec"], manifest["weights"]
    stated = "external" in spec  # whose origin is the statement
    facts = {} if stated else {"weights": weights["source"]}
    for key, value in spec.items():
        facts |= {f"{key} {name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
    rows = [[_literal(name.replace("_", " ")), _literal(_in_words(value))] for name, value in facts.items()]
    rows.append(["fingerprint", manifest["fingerprint"]])
    text = "What decides the numbers. featcache checks it before it labels an image, and refuses other weights."
    if stated:
        text = "What decides the numbers. featcache labels no vectors that were imported with another statement."
    return f"## Spec\n\n{text}\n\n" + _table(["field", "value"], rows)


def _licence_text(manifest: Mapping[str, Any]) -> str:
    licence = licence_of(manifest)
    if licence is None:
        what = "The licence of the network's weights is not on record; find out before you pass this model on."
    else:
        what = f"The network's weights are under {_literal(licence)}, as their library records it."
        what += " It excludes commercial use." if is_commercial(licence) is False else ""
    return f"## Licence\n\n{what} The images that it was trained on may have terms of their own."


def _limits(manifest: Mapping[str, Any], metrics: Mapping[str, Any], counts: Sequence[int] | None) -> str:
    text = [
        "Every image gets one of these classes, an image of anything else, too. `featcache predict --abstain-below 0.8` leaves "
        "unsure answers open, `--coverage 0.95` names all classes that come into question.",
        "The scores hold for images like those that they were measured on; an interval says what chance alone would do.",
    ]
    if counts is not None and (few := sum(count < _FEW for count in counts)):
        text.append(f"{quantity(few, 'class has', 'classes have')} fewer than {_FEW} training images.")
    if across := (metrics.get("copies") or {}).get("across_splits"):
        text.append(f"{quantity(across, 'image')} of val or test also trained: see the accuracy without copies.")
    if "training_rows" in manifest:
        text.append(
            "`training.safetensors` holds sha256 and label of each training image: who has an image can tell whether it trained."
        )
    if manifest["head"]["kind"] == "logreg" and not manifest["finetuned"]:
        text.append("`head.joblib` is a pickle, for notebooks: loading one runs code. featcache never loads it.")
    return "## Limits\n\n" + "\n".join(f"- {sentence}" for sentence in text)


def _is_linear(manifest: Mapping[str, Any]) -> bool:
    return not manifest["finetuned"] and manifest["head"]["kind"] in ("logreg", "linear")


def _backbone(manifest: Mapping[str, Any]) -> str:
    """Its name; none of vectors that were made elsewhere."""
    return str(manifest["spec"].get("backbone", {}).get("name", ""))


def _origin(manifest: Mapping[str, Any]) -> str:
    """Where the weights come from that training, however often, began with."""
    return re.sub(f"^({_TUNED})+", "", str(manifest["weights"]["source"]))


def is_provided(manifest: Mapping[str, Any]) -> bool:
    """Whether the weights that training began with are a library's, so that what is known of those holds."""
    return _origin(manifest).startswith(_PROVIDED)


def licence_of(manifest: Mapping[str, Any]) -> str | None:
    """Of the weights, by its name on the hub; None where it is not on record, as of weights in files."""
    if not is_provided(manifest):
        return None
    if "CC-BY-NC 4.0" in _origin(manifest):  # of some of torchvision's, beside others under its own
        return "cc-by-nc-4.0"
    known = counted().get(_backbone(manifest))
    return known.licence if known and known.licence != "unknown" else None


def _base_model(manifest: Mapping[str, Any]) -> str | None:
    """The repository on the hub that has the weights, if their library is the hub's."""
    name = _backbone(manifest)
    if not is_provided(manifest):
        return None
    if name.startswith("timm/"):
        known = counted().get(name)
        return known.name if known and "." in known.name else None
    owned = re.fullmatch(r"transformers/([^\W_][\w.-]*/[^\W_][\w.-]*)", name, re.ASCII)
    return owned[1] if owned else None


def _in_words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def _literal(text: str) -> str:
    """``text`` in Markdown and in HTML, no sign of it obeyed: as numbers all that is neither letter, digit nor harmless."""
    shown = middle_out(printable(text), _LONGEST)
    return re.sub(rf"(?!{_HARMLESS})[!-/:-@\[-`{{-~]", lambda found: f"&#{ord(found[0])};", shown) or "-"


def _as_json(value: object) -> str:
    """JSON that is YAML, too: what YAML does not take is written out before."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_as_json(key)}: {_as_json(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_json, value)) + "]"
    return json.dumps(printable(value) if isinstance(value, str) else value, ensure_ascii=False)
