"""The saved model, version 1: a folder with everything needed to label images, and nothing that runs when loaded.

``model.json`` (what it is, classes, spec, training, metrics), ``head.safetensors``, ``metrics.json``; with weights that no
library provides, ``backbone.safetensors``; ``training.safetensors``, what training has seen; ``history.csv``, how training went, a
row per epoch, also in ``metrics.json``; ``README.md``, the model card, for people and the Hugging Face hub; for logistic regression
``head.joblib``, the scikit-learn pipeline for notebooks, written and never read: loading a pickle runs code.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.backbones import saved
from featcache.cache.cache import BESIDE, FeatureCache
from featcache.cache.copies import Digests
from featcache.cache.format import encode_names
from featcache.errors import ModelError, SpecMismatchError
from featcache.heads.head import FittedHead, Head
from featcache.models import card, training_rows
from featcache.models.training_rows import TrainingRows
from featcache.spec import Spec, fingerprint_of
from featcache.system.display import html_table, in_words, quantity
from featcache.system.files import check_output, named, publish_folder, read_published, recover_folder
from featcache.system.path_kinds import AnyPath, Kind, as_path, kind_of
from featcache.system.safe_load import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from featcache.backbones.backbone import Backbone
    from featcache.models.predict import Input
    from featcache.models.prediction import Predictions

log = logging.getLogger("featcache")
_HEAD, METRICS, _PIPELINE, _HISTORY = "head.safetensors", "metrics.json", "head.joblib", "history.csv"
BESIDE_MODEL = (
    f".features.h5{BESIDE}"  # the longest ending of what is named after a model: of what fine-tuning started from
)
_FILES = (
    _HEAD,
    saved.WEIGHTS,
    saved.MANIFEST,
    METRICS,
    _PIPELINE,
    training_rows.FILE,
    _HISTORY,
    "curves.png",
    card.FILE,
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A loaded model.

    Attributes:
        path: its folder.
        classes: C names, in the order of the head's outputs.
        head: (N, D) embeddings -> (N, C) probabilities.
        backbone: what made the embeddings; its ``spec`` is what they must have been made with.
        manifest: all of ``model.json``.
    """

    path: Path
    classes: tuple[str, ...]
    head: Head
    backbone: saved.SavedBackbone
    manifest: dict[str, Any]

    def __fspath__(self) -> str:
        """Its folder: whatever takes the path of a model takes the loaded model."""
        return str(self.path)

    @property
    def spec(self) -> Spec:
        """What embeddings must have been made with."""
        return self.backbone.spec

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the spec."""
        return self.spec.fingerprint

    def predict(self, inputs: "Input | Iterable[Input]", **options: Any) -> "Predictions":
        """Label images: paths, PIL images, arrays, a pandas column; one ``Prediction`` per image, in order, together.

        The backbone is loaded and checked by the first call, and stays in memory as long as the model: later calls take
        milliseconds. ``options``, inputs and errors are those of ``featcache.predict``, which yields predictions one by one.
        """
        from featcache.models.predict import predict_all

        return predict_all(self, inputs, **options)

    def load_backbone(self) -> "Backbone":
        """The backbone that the model was trained on. Raises ModelError, BackboneError: as ``SavedBackbone.load``."""
        backbone = self.backbone.load()
        self._check_width(backbone.dim)
        return backbone

    def network(self) -> "nn.Sequential":
        """Backbone and head as one PyTorch module, a copy of its own: on the CPU, in float32, in eval mode.

        In: (N, 3, H, W) float32 images as the backbone wants them, RGB values in 0..1, resized and cropped to
        ``spec.preprocess.crop``, less ``mean``, divided by ``std`` of ``spec.preprocess``. Out: (N, C) logits in the order of
        ``classes``, already divided by the temperature: their softmax is what ``predict`` gives, up to the rounding of the
        precision that it computes in and of the type that embeddings are stored as.

        Its parts are ``backbone``, (N, D) out, and ``head``. Of its parameters those require gradients that training may have
        changed: the head's, and after ``finetune`` all.

        Raises:
            ModelError, BackboneError: as ``load_backbone``.
        """
        from torch import nn

        from featcache.heads.layers import as_module

        backbone = self.load_backbone().module.requires_grad_(bool(self.manifest.get("finetuned")))
        return nn.Sequential(OrderedDict(backbone=backbone, head=as_module(self.head))).eval()

    def training_rows(self) -> TrainingRows | None:
        """What the model was trained on; None for one that an earlier version saved. Raises ModelError if it is damaged."""
        return self._training_rows

    @functools.cached_property
    def _training_rows(self) -> TrainingRows | None:  # of many images, reading them takes seconds and much memory
        if "training_rows" not in self.manifest:
            return None
        with saved.as_model_error(self.path):
            file = saved.own_file(self.path, training_rows.FILE)
            data = file.read_bytes() if file.is_file() else b""
            if hashlib.sha256(data).hexdigest() != self.manifest["training_rows"]["sha256"]:
                raise ModelError(
                    f"{self.path} is damaged: {training_rows.FILE} is not the file that was saved; train it again"
                )
            rows = TrainingRows.from_bytes(data)
            if not rows.fit(len(self.classes)):
                raise ModelError(
                    f"{self.path} is damaged: its scores do not fit its {len(self.classes)} classes; train it again"
                )
            return rows

    @functools.cached_property
    def digests_seen(self) -> Digests:
        """sha256 of each image that training has seen; empty if the model does not know. Raises as ``training_rows``."""
        rows = self.training_rows()
        return Digests(np.empty((0, 32), np.uint8) if rows is None else rows.digests)

    def __repr__(self) -> str:
        some = ", ".join(map(repr, self.classes[:5])) + (", ..." if len(self.classes) > 5 else "")
        held = f"{self.head.kind} on {self.spec.backbone}, {quantity(len(self.classes), 'class')}"
        return f"Model({str(self.path)!r}: {held}: {some})"

    def _repr_html_(self) -> str:
        scores = {k: v for k, v in self.manifest["metrics"].items() if k.endswith("accuracy") and isinstance(v, float)}
        facts = {
            "head": self.head.kind,
            "backbone": self.spec.backbone,
            "classes": ", ".join(self.classes[:20]),
        } | scores
        rows = [(name.replace("_", " "), in_words(name, value)) for name, value in facts.items()]
        return html_table(rows, caption=f"Model {self.path}, {quantity(len(self.classes), 'class')}", header=False)

    def check_cache(self, cache: FeatureCache, *, advice: str = "predict from the images instead") -> None:
        """Raise SpecMismatchError unless ``cache`` was made with this model's spec, ModelError if the head takes other rows."""
        if self.spec.stated is not None:
            advice = "give a cache that was imported with the same statement"
        if cache.spec != self.spec:
            raise SpecMismatchError(
                f"{cache.path} and the model {self.path} do not belong together (cache -> model: "
                f"{cache.spec.difference(self.spec)}); {advice}"
            )
        self._check_width(cache.dim)

    def _check_width(self, dim: int) -> None:
        """Raise ModelError unless the head takes embeddings of ``dim`` values, which those of its spec have."""
        if self.head.dim != dim:
            raise ModelError(
                f"{self.path} is damaged: its head takes {quantity(self.head.dim, 'value')}, embeddings of its spec have {dim}; "
                "train it again"
            )


def check_replaceable(path: Path, *, overwrite: bool | None = None) -> None:
    """Refuse, before any work, to write a model where something precious lies.

    Args:
        overwrite: whether a model may be replaced; None: a head-only one, as heads are trained again in seconds from
            their cache.

    Raises:
        ModelError: ``path`` is a model that is to be kept, is something else, or holds files of somebody else.
        StorageError: its folder is missing or not writable.
    """
    path = named(path)
    recover_folder(path)
    check_output(path, folder_allowed=True, beside=BESIDE_MODEL)
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    manifest: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        manifest = parse_json((path / saved.MANIFEST).read_text())
    if manifest.get("format") != saved.FORMAT:
        what = "" if kind_of(path) is Kind.MODEL else f"{kind_of(path).value}, "
        raise ModelError(f"cannot write {path}: it is {what}not a featcache model; choose another -o")
    if foreign := sorted(entry.name for entry in path.iterdir() if entry.name not in _FILES):
        raise ModelError(
            f"{path} also holds {', '.join(foreign[:3])}, not part of a model; choose another -o or move that out"
        )
    if (path / card.FILE).is_file() and _digest(path / card.FILE) != manifest.get("card"):
        raise ModelError(
            f"{path / card.FILE} is not as featcache wrote it; choose another -o, or move that file out first"
        )
    kind = "a fine-tuned model, which took long to make" if manifest.get("finetuned") else "a model"
    if overwrite is False:
        raise ModelError(f"{path} holds {kind}; choose another -o, or replace it with --overwrite")
    if overwrite is None and manifest.get("finetuned"):
        raise ModelError(f"{path} holds {kind}; choose another -o")


def save_model(
    path: Path,
    fitted: FittedHead,
    *,
    classes: tuple[str, ...],
    spec: Spec,
    weights: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any],
    rows: TrainingRows | None = None,
    files: Mapping[str, bytes | Path] = {},
    finetuned: bool = False,
) -> None:
    """Publish a model folder atomically, replacing an earlier one.

    Args:
        path: the folder; see ``check_replaceable``.
        fitted: the head, and for logreg its pipeline.
        classes: C names. spec: of the cache it was trained on. weights: ``source`` and ``reload`` of the backbone.
        training: settings. metrics: scores, as JSON values; a ``history`` among them also becomes a table.
        rows: what trained it.
        files: further ones, name -> content, or the file to copy: ``backbone.safetensors`` if the weights must travel along.
        finetuned: whether it took long to make, so that it is never replaced.

    Raises:
        StorageError: it cannot be written; ``path`` is then unchanged.
    """
    import joblib
    from safetensors.numpy import save

    with publish_folder(named(path)) as folder:
        head = save(fitted.head.to_tensors())
        (folder / _HEAD).write_bytes(head)
        if fitted.pipeline is not None:
            joblib.dump(fitted.pipeline, folder / _PIPELINE)
        seen = {} if rows is None else {training_rows.FILE: rows.to_bytes()}
        history = {_HISTORY: _as_table(metrics["history"])} if metrics.get("history") else {}
        for name, content in (seen | history | dict(files)).items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(content)
        (folder / METRICS).write_text(_as_json(metrics) + "\n")
        manifest = {
            "format": saved.FORMAT,
            "version": saved.FORMAT_VERSION,
            "classes": list(classes),
            "head": {
                "kind": fitted.head.kind,
                "scaling": fitted.head.scaling,
                "sha256": hashlib.sha256(head).hexdigest(),
            },
            "spec": spec.to_json(),
            "fingerprint": spec.fingerprint,
            "weights": weights,
            "training": training,
            "metrics": {key: value for key, value in metrics.items() if not isinstance(value, (dict, list))},
            "versions": _versions(),
            "finetuned": finetuned,
        }
        if rows is not None:
            digest = hashlib.sha256(seen[training_rows.FILE]).hexdigest()
            manifest["training_rows"] = {"n": len(rows.digests), "sha256": digest}
        if text := _card(path, manifest, metrics, rows):
            (folder / card.FILE).write_bytes(text)
            manifest["card"] = hashlib.sha256(text).hexdigest()
        manifest["sha256"] = fingerprint_of(manifest)
        (folder / saved.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _as_json(value: Any, indent: str = "\n") -> str:
    """As ``json.dumps`` with an indent of 2, but what holds plain values only, as a row of a confusion matrix, on one line."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        entries = (f"{inner}{json.dumps(str(key))}: {_as_json(entry, inner)}" for key, entry in value.items())
        return "{" + ",".join(entries) + indent + "}"
    if isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        return "[" + ",".join(inner + _as_json(entry, inner) for entry in value) + indent + "]"
    return json.dumps(value, separators=(",", ":"))


def _card(path: Path, manifest: dict[str, Any], metrics: dict[str, Any], rows: TrainingRows | None) -> bytes:
    """The model card; nothing if it cannot be made: it never costs a model that may have taken hours."""
    try:
        return card.make_card(path.resolve().name, manifest, metrics, None if rows is None else rows.labels)
    except Exception as error:
        log.warning("no model card of %s (%s: %s); please report it", path, type(error).__name__, error)
        return b""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _as_table(history: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def load_model(path: AnyPath) -> Model:
    """Load a model folder. Nothing in it is executed.

    Raises:
        ModelError: missing, not a model, written by a newer version, or damaged.
    """
    path = as_path(path)
    recover_folder(path)
    return read_published(path, _load)


def _load(path: Path) -> Model:
    from safetensors.numpy import load

    manifest = saved.read_manifest(path)
    with saved.as_model_error(path):
        head_file = saved.own_file(path, _HEAD)
        data = head_file.read_bytes() if head_file.is_file() else b""  # read once: checked and loaded
        if hashlib.sha256(data).hexdigest() != manifest["head"]["sha256"]:
            raise ModelError(f"{path} is damaged: {_HEAD} is not the file that was saved; train it again")
        backbone = saved.SavedBackbone.of(path, manifest)
        try:
            head = Head.from_tensors(manifest["head"]["kind"], manifest["head"]["scaling"], load(data))
        except ModelError as error:
            raise ModelError(f"{path} cannot be used: {error}; train it again") from error
        classes = _check_classes(path, manifest["classes"], len(head.layers[-1][1]))
    return Model(path, classes, head, backbone, manifest)


def _check_classes(path: Path, classes: list[Any], outputs: int) -> tuple[str, ...]:
    """``classes`` if they are as many different names as the head has outputs, fit to be written. Raises ModelError."""
    if not len(set(classes)) == len(classes) == outputs or not all(isinstance(name, str) for name in classes):
        raise ModelError(f"{path} is damaged: {len(set(classes))} classes for {outputs} outputs; train it again")
    encode_names(classes)
    return tuple(classes)


def _versions() -> dict[str, str]:
    """What computes; of a folder of sources that nobody has installed none is known."""
    found = {"python": platform.python_version()}
    for name in ("featcache", "numpy", "scikit-learn", "torch", "torchvision"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
