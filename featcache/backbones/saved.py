"""The backbone of a saved model: what its folder says about it, and the backbone itself.

In: a model folder. Out: its checked manifest (``model.json``) and a ``SavedBackbone``, for ``extract --backbone FOLDER`` as for
``models.model``. Nothing in the folder is executed, and no link in it is followed out of it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import FeatcacheError, ModelError
from featcache.spec import Spec, Taken, fingerprint_of
from featcache.system.files import read_published, recover_folder
from featcache.system.path_advice import HERE, check_path, missing, place_for
from featcache.system.safe_load import parse_json

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone

FORMAT = "featcache-model"
FORMAT_VERSION = 1
MANIFEST, WEIGHTS = "model.json", "backbone.safetensors"
_FIELDS = dict.fromkeys(("head", "weights", "training", "metrics", "versions"), dict) | {"classes": list}

_NUMBERS = ("accuracy", "uncorrected", "std", "loss", "f1", "without_copies", "temperature", "suspects")  # of metrics


@dataclasses.dataclass(frozen=True, eq=False)
class SavedBackbone:
    """The backbone that a model was trained on.

    Attributes:
        path: the model's folder. spec: what embeddings must have been made with.
        source, reload: of the weights, as in ``Backbone``. manifest: fingerprint of ``model.json``.
    """

    path: Path
    spec: Spec
    source: str
    reload: str | None
    manifest: str

    @classmethod
    def open(cls, folder: Path) -> "SavedBackbone":
        """What the model in ``folder`` says. Raises ModelError: no model, of a newer version, or damaged."""
        recover_folder(folder)
        return read_published(folder, lambda path: cls.of(path, read_manifest(path)))

    @classmethod
    def of(cls, path: Path, manifest: dict[str, Any]) -> "SavedBackbone":
        """What a manifest says, as ``read_manifest`` returns it. Raises ModelError."""
        weights, reload = manifest["weights"], manifest["weights"].get("reload")
        with as_model_error(path):
            spec = Spec.from_json(manifest["spec"])
        reload = reload if isinstance(reload, str) else None
        return cls(path, spec, str(weights.get("source")), reload, fingerprint_of(manifest))

    def check_embeds(self) -> None:
        """Raise ModelError if nobody knows the network: the model was trained on vectors that were made elsewhere."""
        if self.spec.stated is not None:
            raise ModelError(
                f"{self.path} was trained on vectors that were made elsewhere (stated: {self.spec.stated}), by a network that "
                "featcache does not know: it labels caches imported with the same statement, not images"
            )

    def load(self, *, taken: Taken = Taken()) -> "Backbone":  # noqa: B008 - frozen
        """The backbone itself. taken: what is asked for otherwise than the model was trained on.

        Raises:
            ModelError: its weights are missing, or are not those the model was trained on; or as ``check_embeds``.
            BackboneError: the library cannot provide them here.
        """
        self.check_embeds()
        try:
            return self._load(taken)
        except FeatcacheError:
            if _fingerprint_now(self.path) != self.manifest:
                raise ModelError(f"{self.path} was replaced since it was loaded; run the command again") from None
            raise

    def _load(self, taken: Taken) -> "Backbone":
        from featcache.backbones.load import load_again

        copy = own_file(self.path, WEIGHTS)
        backbone = load_again(self.spec, copy, self.reload, taken=taken)
        if backbone is None:
            raise ModelError(
                f"{self.path} has no {WEIGHTS}, and no library provides its weights ({self.source}); "
                "it can label caches, not images"
            )
        if backbone.weights_sha256 != self.spec.weights_sha256:
            raise ModelError(
                f"{self.path} was trained on other weights of {self.spec.backbone}: found {backbone.weights_sha256[:12]} "
                f"({backbone.weights}), expected {self.spec.weights_sha256[:12]}; train it again, or copy the original "
                f"weights to {copy}"
            )
        return backbone


def read_manifest(path: Path) -> dict[str, Any]:
    """``model.json`` of a model folder, compared with its own checksum, which is left out.

    Raises:
        ModelError: no model, of a newer version, or damaged.
    """
    if not (path / MANIFEST).is_file():
        check_path(path, "model", ("predict", HERE, "IMAGES"))
        raise ModelError(
            missing(path, f"make one with `featcache fit-head features.h5 -o {place_for(path)}`", wanted="model")
        )
    with as_model_error(path):
        manifest = parse_json(own_file(path, MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise ModelError(f"{path / MANIFEST} is not a featcache model's")
        if manifest["version"] != FORMAT_VERSION:
            raise ModelError(
                f"{path} has format version {manifest['version']}, this featcache reads {FORMAT_VERSION}; upgrade featcache"
            )
        if manifest.pop("sha256") != fingerprint_of(manifest):
            raise ModelError(f"{path} is damaged: {MANIFEST} is not what was saved; train it again")
        for key, kind in _FIELDS.items():
            if not isinstance(manifest[key], kind):
                raise ModelError(f"{path} is damaged: {key} in {MANIFEST} is no {kind.__name__}; train it again")
        if not isinstance(manifest["weights"].get("source"), str):
            raise ModelError(f"{path} is damaged: weights in {MANIFEST} have no source; train it again")
        for key, value in manifest["metrics"].items():
            if key.endswith(_NUMBERS) and not isinstance(value, int | float | None):
                raise ModelError(f"{path} is damaged: {key} in {MANIFEST} is no number; train it again")
        return manifest


@contextlib.contextmanager
def as_model_error(path: Path) -> Iterator[None]:
    """Make a ModelError that names the folder of whatever goes wrong while it is read."""
    try:
        yield
    except ModelError:
        raise
    except FeatcacheError as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged JSON or safetensors raise many kinds
        raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}); train it again") from error


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


def _fingerprint_now(path: Path) -> str | None:
    """The checksum in the manifest that lies in a model folder now."""
    try:
        return str(parse_json((path / MANIFEST).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
