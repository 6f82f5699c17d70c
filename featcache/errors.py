"""Every error featcache raises on purpose. The command line turns each into one line and an exit code.

A message says what was found, what was expected and what to do. An image that is refused is no error: the run goes on, and the
reason is kept.
"""

import os
import re
import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_ONE_SLASH = re.compile(r"(?<![\w./-])((?:https?|s3|gs|gcs|hf|ftp):/)(?=[^/\s])")


def with_slashes(text: str) -> str:
    """``text`` with both slashes of every address in it, of which a ``Path`` has one left: ``s3:/bucket`` is shown as ``s3://bucket``."""
    return _ONE_SLASH.sub(r"\1/", text)


class FeatcacheError(Exception):
    """Base of all errors below; ``exit_code`` is what the command line exits with.

    ``facts``: what was found before it failed, for ``--json``.
    """

    exit_code = 1

    def __init__(self, *message: str, facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(*map(with_slashes, message))
        self.facts = dict(facts)


class UsageError(FeatcacheError):
    """The request contradicts itself or names an option value that does not exist."""

    exit_code = 2


class SourceError(FeatcacheError):
    """The images (folder, CSV, cache) cannot be used for what was asked."""


class NoAccessError(SourceError):
    """What lies elsewhere is not given to whoever asks, or only to those whose credentials are missing here."""


class BackboneError(FeatcacheError):
    """No such backbone, or its weights are missing, unreadable or do not fit."""


class DownloadError(BackboneError):
    """The weights that a library provides are not on this machine and could not be downloaded.

    ``place``: the file that they would be in, if known. ``instead``: a backbone whose weights need no download; empty
    where no other one would do.
    """

    place = instead = ""


class AccessError(DownloadError):
    """The hub that has the weights answers, and does not give them to everybody."""


class CacheError(FeatcacheError):
    """A cache file cannot be read: not ours, newer, or damaged."""


class DamagedCacheError(CacheError):
    """A cache file that is ours, and broken: what ``--force`` may replace."""


class NewerCacheError(CacheError):
    """A cache file of a format version that this featcache does not read."""


class SpecMismatchError(FeatcacheError):
    """Two things made with different specs were about to be mixed."""


class ModelError(FeatcacheError):
    """A saved model cannot be read, or cannot be replaced."""


class ExportError(FeatcacheError):
    """A model cannot be converted, or what it was converted to does not compute what the model computes."""


class TrainingError(FeatcacheError):
    """Training went wrong: a loss that is not finite, or that explodes."""


class Interrupted(FeatcacheError):  # noqa: N818 - asked for, not an error
    """A signal stopped the work; what is finished is kept, and the message says how to go on if that is known."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class StorageError(FeatcacheError):
    """The output cannot be written: missing folder, no permission, disk full, or another writer."""


class MissingDependencyError(FeatcacheError):
    """An optional package is needed; the message holds the pip line that adds it."""


class TrackerError(FeatcacheError):
    """A run could not be told to TensorBoard, MLflow or Weights & Biases."""


class RefusedImage(Exception):  # noqa: N818 - a state of an image, not an error of the program
    """One image cannot be embedded; ``str()`` is the reason, fit to be stored and shown."""


class Refusal(NamedTuple):
    """An image that was not embedded: its path relative to the root of its source, and why.

    Where images are numbered, as during a run, refusals are a dictionary: number -> reason.
    """

    path: str
    reason: str


def repair_advice(cache: str | os.PathLike[str], *, external: bool = False) -> str:
    """What to do about a damaged cache that can be repaired; ``external``: whose vectors were made elsewhere."""
    name = shlex.quote(os.fspath(cache))
    if external:
        return f"import it again: `featcache import TABLE -o {name} --force`"
    return f"`featcache verify {name} --repair SOURCE` mends it, `featcache extract SOURCE -o {name} --force` makes it anew"
