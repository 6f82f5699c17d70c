"""The saved model, version 1: a folder with everything needed to label images, and nothing that runs when loaded.

``model.json`` (what it is, classes, spec, training, metrics), ``head.safetensors``, ``metrics.json``; with weights that no
library provides, ``backbone.safetensors``; for logistic regression ``head.joblib``, the scikit-learn pipeline for
notebooks, written and never read: loading a pickle runs code.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cache.cache import FeatureCache
from featcache.cache.format import encode_names
from featcache.errors import FeatcacheError, ModelError, SpecMismatchError
from featcache.heads.head import FittedHead, Head
from featcache.spec import check_spec, fingerprint_of, spec_difference
from featcache.system.files import check_output, publish_folder, read_published, recover_folder
from featcache.system.safe_load import parse_json

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone

log = logging.getLogger("featcache")
FORMAT = "featcache-model"
FORMAT_VERSION = 1
_HEAD, _BACKBONE, _MANIFEST, _METRICS = "head.safetensors", "backbone.safetensors", "model.json", "metrics.json"
_PIPELINE = "head.joblib"
_FIELDS = dict.fromkeys(("head", "weights", "training", "metrics", "versions"), dict) | {"classes": list}
_FILES = (_HEAD, _BACKBONE, _MANIFEST, _METRICS, _PIPELINE, "history.csv", "curves.png")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
        path: its folder.
        classes: C names, in the order of the head's outputs.
        head: (N, D) embeddings -> (N, C) probabilities.
        spec: what the embeddings must have been made with. fingerprint: its sha256.
        manifest: all of ``model.json``.
    """

    path: Path
    classes: tuple[str, ...]
    head: Head
    spec: dict[str, Any]
    fingerprint: str
    manifest: dict[str, Any]

    def check_cache(self, cache: FeatureCache) -> None:
        """Raise SpecMismatchError unless ``cache`` was made with this model's spec."""
        if cache.fingerprint != self.fingerprint:
            raise SpecMismatchError(
                f"{cache.path} and the model {self.path} do not belong together (cache -> model: "
                f"{'; '.join(spec_difference(cache.spec, self.spec))}); predict from the images instead"
            )

    def load_backbone(self) -> "Backbone":
        """The backbone this model was trained on.

        Raises:
            ModelError: its weights are missing, or are not those the model was trained on.
            BackboneError: the library cannot provide them here.
        """
        try:
            return self._load_backbone()
        except FeatcacheError:
            if _saved_fingerprint(self.path) != fingerprint_of(self.manifest):
                raise ModelError(f"{self.path} was replaced since it was loaded; run the command again") from None
            raise

    def _load_backbone(self) -> "Backbone":
        from featcache.backbones.load import load_again

        wanted = self.spec["backbone"]
        copy, reload = own_file(self.path, _BACKBONE), self.manifest["weights"].get("reload")
        backbone = load_again(self.spec, copy, reload if isinstance(reload, str) else None)
        if backbone is None:
            raise ModelError(
                f"{self.path} has no {_BACKBONE}, and no library provides its weights ({self.manifest['weights'].get('source')}); "
                "it can label caches, not images"
            )
        if backbone.weights_sha256 != wanted["weights_sha256"]:
            raise ModelError(
                f"{self.path} was trained on other weights of {wanted['name']}: found {backbone.weights_sha256[:12]} "
                f"({backbone.weights}), expected {wanted['weights_sha256'][:12]}; train it again, or copy the original "
                f"weights to {copy}"
            )
        return backbone


def check_replaceable(path: Path) -> None:
    """Refuse, before any work, to write a model where something precious lies.

    Heads are trained again in seconds from their cache, so a head-only model may be replaced; anything else is kept.

    Raises:
        ModelError: ``path`` exists and is not a head-only model, or holds files of somebody else.
        StorageError: its folder is missing or not writable.
    """
    path = path if path.name else path.resolve()
    recover_folder(path)
    check_output(path, folder_allowed=True)
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        manifest = parse_json((path / _MANIFEST).read_text()) if path.is_dir() else None
    except (OSError, ValueError):
        manifest = None
    if manifest is None or manifest.get("format") != FORMAT:
        raise ModelError(f"{path} exists and is not a featcache model; choose another -o")
    if foreign := sorted(entry.name for entry in path.iterdir() if entry.name not in _FILES):
        raise ModelError(
            f"{path} also holds {', '.join(foreign[:3])}, not part of a model; choose another -o or move that out"
        )
    if manifest.get("finetuned"):
        raise ModelError(f"{path} holds a fine-tuned model, which took long to make; choose another -o")


def save_model(
    path: Path,
    fitted: FittedHead,
    *,
    classes: tuple[str, ...],
    spec: dict[str, Any],
    weights: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any],
    versions: dict[str, Any],
    backbone_file: Path | None = None,
    finetuned: bool = False,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Publish a model folder atomically, replacing an earlier one.

    Args:
        path: the folder; see ``check_replaceable``.
        fitted: the head, and for logreg its pipeline.
        classes: C names. spec: of the cache it was trained on. weights: ``source`` and ``reload`` of the backbone.
        training: settings. metrics: scores, as JSON values. versions: of the libraries.
        backbone_file: safetensors to copy in, if the weights must travel along.
        finetuned: whether it took long to make, so that it is never replaced. extra: further files, name -> content.

    Raises:
        StorageError: it cannot be written; ``path`` is then unchanged.
    """
    import joblib
    from safetensors.numpy import save

    with publish_folder(path.resolve()) as folder:  # a link to a folder keeps being one
        (folder / _HEAD).write_bytes(save(fitted.head.to_tensors()))
        if fitted.pipeline is not None:
            joblib.dump(fitted.pipeline, folder / _PIPELINE)
        if backbone_file is not None:
            shutil.copyfile(backbone_file, folder / _BACKBONE)
        for name, content in (extra or {}).items():
            (folder / name).write_bytes(content)
        (folder / _METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "classes": list(classes),
            "head": {"kind": fitted.head.kind, "scaling": fitted.head.scaling, "sha256": _sha256(folder / _HEAD)},
            "spec": spec,
            "fingerprint": fingerprint_of(spec),
            "weights": weights,
            "training": training,
            "metrics": {key: value for key, value in metrics.items() if not isinstance(value, (dict, list))},
            "versions": versions,
            "finetuned": finetuned,
        }
        manifest["sha256"] = fingerprint_of(manifest)
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load_model(path: str | Path) -> Model:
    """Load a model folder. Nothing in it is executed.

    Raises:
        ModelError: missing, not a model, written by a newer version, or damaged.
    """
    path = Path(path)
    recover_folder(path)
    return read_published(path, _load)


def _load(path: Path) -> Model:
    from safetensors.numpy import load

    if not (path / _MANIFEST).is_file():
        raise ModelError(
            f"{path} is not a model: no {_MANIFEST} in it; make one with `featcache fit-head features.h5 -o {path}`"
        )
    try:
        manifest = parse_json(own_file(path, _MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise ModelError(f"{path / _MANIFEST} is not a featcache model's")
        if manifest["version"] != FORMAT_VERSION:
            raise ModelError(
                f"{path} has format version {manifest['version']}, this featcache reads {FORMAT_VERSION}; upgrade featcache"
            )
        if manifest.pop("sha256") != fingerprint_of(manifest):
            raise ModelError(f"{path} is damaged: {_MANIFEST} is not what was saved; train it again")
        for key, kind in _FIELDS.items():
            if not isinstance(manifest[key], kind):
                raise ModelError(f"{path} is damaged: {key} in {_MANIFEST} is no {kind.__name__}; train it again")
        head_file = own_file(path, _HEAD)
        data = head_file.read_bytes() if head_file.is_file() else b""  # read once: checked and loaded
        if hashlib.sha256(data).hexdigest() != manifest["head"]["sha256"]:
            raise ModelError(f"{path} is damaged: {_HEAD} is not the file that was saved; train it again")
        spec = check_spec(manifest["spec"])
        try:
            head = Head.from_tensors(manifest["head"]["kind"], manifest["head"]["scaling"], load(data))
        except ModelError as error:
            raise ModelError(f"{path} cannot be used: {error}; train it again") from error
        classes = _check_classes(path, manifest["classes"], len(head.layers[-1][1]))
        return Model(path, classes, head, spec, fingerprint_of(spec), manifest)
    except ModelError:
        raise
    except FeatcacheError as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged JSON or safetensors raise many kinds
        raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}); train it again") from error


def _saved_fingerprint(path: Path) -> str | None:
    """The checksum in the manifest that lies in a model folder now."""
    try:
        return str(parse_json((path / _MANIFEST).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_classes(path: Path, classes: list[Any], outputs: int) -> tuple[str, ...]:
    """``classes`` if they are as many different names as the head has outputs, fit to be written. Raises ModelError."""
    if not len(set(classes)) == len(classes) == outputs or not all(isinstance(name, str) for name in classes):
        raise ModelError(f"{path} is damaged: {len(set(classes))} classes for {outputs} outputs; train it again")
    encode_names(classes)
    return tuple(classes)


def own_file(folder: Path, name: str) -> Path:
    """``folder / name``, which may be missing, unless it is a link to somewhere outside ``folder``.

    A model folder may itself be a link, and a model sent by somebody else may hold links; following those would read
    whatever files of the user they name.

    Raises:
        ModelError: it is such a link.
    """
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise ModelError(f"{path} is refused: it is a link to {path.readlink()}; put a copy of that file in its place")
    return path


def library_versions() -> dict[str, str]:
    """Versions of what computes, for a model's manifest."""
    packages = ("featcache", "numpy", "scikit-learn", "torch", "torchvision")
    return {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
