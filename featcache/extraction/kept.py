"""Embeddings kept by content: what was embedded once, under one spec, is not embedded again, whoever asks, in whatever order.

In: images, and what embeds them if need be. Out: their embeddings, and reasons for those that have none. The folder holds, for
each request, the spec that it was settled to mean, and for each spec immutable parts as ``parts.py`` writes them.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Indices, Provenance, Rows, find
from featcache.cache.write import write_cache
from featcache.errors import CacheError, SpecMismatchError, StorageError, UsageError
from featcache.extraction.parts import MAX_ROWS, embed_into_parts, open_parts, part_name
from featcache.images.formats import REVISION
from featcache.images.read import Paths, read_images
from featcache.spec import Spec, fingerprint_of
from featcache.system.display import bar_in_notebook, describe_images
from featcache.system.files import publish_file
from featcache.system.safe_load import parse_json
from featcache.system.workdir import locked, work_folder

if TYPE_CHECKING:
    from featcache.backbones.embedder import Embedder

MAX_SMALL = 32  # parts that are not full: more of them are packed into one, as each costs a look
Found = tuple[npt.NDArray[np.float32], dict[int, str]]  # (N, D), NaN where there is none; position -> reason, of those


@dataclasses.dataclass(frozen=True)
class Settled:
    """What a request means: ``spec``, and ``dim``, the number of values of an embedding."""

    spec: Spec
    dim: int


def embed_now(files: Paths, embedder: "Embedder", settled: Settled) -> Found:
    """Embed ``files``, rounded as they would be stored. Raises SpecMismatchError: ``embedder`` embeds otherwise."""
    from featcache.backbones.embed import Timings, storable

    _check_spec(embedder, settled.spec)
    found, refused = np.full((len(files.paths), settled.dim), np.nan, np.float32), dict[int, str]()
    timings, done = Timings(), 0
    with _bar() as progress, contextlib.closing(embedder.embed(files, timings=timings)) as batches:
        if progress:
            progress(0, len(found), timings.bottleneck)
        for batch in (storable(batch, settled.spec.storage) for batch in batches):
            if len(batch.indices):
                found[batch.indices] = batch.features.astype(settled.spec.storage)
            refused |= batch.refused
            done += len(batch)
            if progress:
                progress(done, len(found), timings.bottleneck)
    return found, refused


@dataclasses.dataclass(frozen=True)
class KeptEmbeddings:
    """A folder of embeddings, made when it is first needed. Any number of processes may use it at once; what is damaged in it
    is made again.
    """

    folder: Path

    def settle(self, record: Mapping[str, Any], settle: Callable[[], Settled]) -> Settled:
        """What the request of ``record`` was first settled to mean here, else what ``settle`` returns.

        Args:
            record: as ``ExtractRequest.record`` gives it: the same again means the same spec.

        Raises:
            StorageError: the folder cannot be written. Otherwise what ``settle`` raises.
        """
        path = self.folder / f"{fingerprint_of(dict(record))}.json"
        if known := _read_settled(path, record):
            return known
        with self._alone(path):
            if known := _read_settled(path, record):  # another process was faster
                return known
            settled = settle()
            values = {"record": dict(record), "spec": settled.spec.to_json(), "dim": settled.dim}
            with publish_file(path, own=True) as file:
                file.write(json.dumps(values | {"sha256": fingerprint_of(values)}, indent=1).encode())
        return settled

    def embed(
        self, files: Paths, settled: Settled, embedder: Callable[[], "Embedder"], record: Mapping[str, Any]
    ) -> Found:
        """Embeddings of ``files``: those that are here, and of each content that is not, one that is made now and kept.

        While one process embeds, others wait for what it makes instead of making it as well.

        Args:
            files: N of them. settled: what embeddings are. record: of the request, for the provenance.
            embedder: called if any is missing; must give embeddings of just this spec.

        Raises:
            StorageError: the folder cannot be written. SpecMismatchError: ``embedder`` embeds otherwise.
        """
        keys, refused = _keys(files)
        found = np.full((len(keys), settled.dim), np.nan, np.float32)
        missing, folder = np.flatnonzero(keys != b""), work_folder(self.folder / settled.spec.fingerprint)
        with contextlib.suppress(CacheError):  # also if a part was packed away at this very moment
            missing = _fill(found, keys, missing, map(FeatureCache.open, sorted(folder.glob("[0-9]*.h5"))), settled)
        if not len(missing):
            return found, refused
        with self._alone(self.folder / settled.spec.fingerprint):
            parts = open_parts(folder)
            missing = _fill(found, keys, missing, parts, settled)
            if len(missing):
                made = embedder()
                _check_spec(made, settled.spec)
                _, first = np.unique(keys[missing], return_index=True)
                todo, provenance = missing[np.sort(first)].tolist(), _provenance(made, record)
                with _bar() as progress:
                    done = embed_into_parts(
                        _some(files, todo),
                        made,
                        folder,
                        spec=settled.spec,
                        provenance=provenance,
                        progress=progress,
                    )
                why = {keys[k]: done.refused[path] for k in todo if (path := files.paths[k]) in done.refused}
                missing = _fill(found, keys, missing, done.parts, settled)
                refused |= {k: why.get(keys[k], "changed while it was read") for k in missing.tolist()}
                parts += done.parts
            _pack([part for part in parts if _is_of(part, settled)], folder)
        return found, dict(sorted(refused.items()))

    @contextlib.contextmanager
    def _alone(self, output: Path) -> Iterator[None]:
        """While no other process works on ``output``, however long that takes. Raises StorageError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot write in {self.folder}: {error.strerror}; give the cache another folder"
            ) from error
        with locked(work_folder(output), patience=math.inf):
            yield


def _read_settled(path: Path, record: Mapping[str, Any]) -> Settled | None:
    """What was published under ``path``; None if it is not there, damaged or of another request."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UsageError):
        values = parse_json(path.read_text())
        if values.pop("sha256") == fingerprint_of(values) and values["record"] == record:
            return Settled(Spec.from_json(values["spec"]), int(values["dim"]))
    return None


def _keys(files: Paths) -> tuple[npt.NDArray[np.bytes_], dict[int, str]]:
    """(N,) digests as keys, empty where a file cannot be read; and position -> reason, of those."""
    keys, refused = np.zeros(len(files.paths), "S32"), dict[int, str]()
    for read in read_images(files, range(len(keys)), len, workers=min(32, (os.cpu_count() or 1) + 4)):
        if read.reason:
            refused[read.position] = read.reason
        else:
            keys[read.position] = read.digest
    return keys, refused


def _fill(
    found: npt.NDArray[np.float32],
    keys: npt.NDArray[np.bytes_],
    missing: Indices,
    parts: Iterator[FeatureCache] | Sequence[FeatureCache],
    settled: Settled,
) -> Indices:
    """Copy to ``found`` what ``parts`` have of ``missing``; return what is missing still. Raises CacheError."""
    for part in parts:
        if len(missing) and _is_of(part, settled):
            rows = find(part.rows.keys, keys[missing])
            found[missing[rows >= 0]] = part.take(rows[rows >= 0])
            missing = missing[rows < 0]
    return missing


def _is_of(part: FeatureCache, settled: Settled) -> bool:
    """Whether its embeddings are what is wanted: a file's name says nothing."""
    return (part.spec, part.dim, part.provenance.decoder) == (settled.spec, settled.dim, REVISION)


def _bar() -> Any:
    return bar_in_notebook(None, describe_images("embedding"))


def _check_spec(embedder: "Embedder", wanted: Spec) -> None:
    precision = None if wanted.precision == "reference" else wanted.precision
    if (now := embedder.spec(storage=wanted.storage, precision=precision)) != wanted:
        raise SpecMismatchError(
            f"the backbone {now.backbone} is not what was fitted (fitted -> now: {wanted.difference(now)}); fit again, or "
            "give it the weights and settings of before"
        )


def _some(files: Paths, positions: Sequence[int]) -> Paths:
    held = {number: files.held[k] for number, k in enumerate(positions) if k in files.held}
    return Paths(files.root, tuple(files.paths[k] for k in positions), held)


def _provenance(embedder: "Embedder", record: Mapping[str, Any]) -> Provenance:
    return Provenance(
        request=record,
        source=embedder.backbone.weights,
        reload=embedder.backbone.reload,
        self_check=dataclasses.asdict(embedder.choice),
        decoder=REVISION,
        rest={"runtime": embedder.runtime.reason, "python": platform.python_version(), "platform": platform.platform()},
    )


def _pack(parts: list[FeatureCache], folder: Path) -> None:
    """Make one part of those that are not full, if they are many. Whoever is reading one looks again. Raises StorageError."""
    small = [part for part in parts if len(part) < MAX_ROWS]
    if len(small) <= MAX_SMALL:
        return
    names = [field.name for field in dataclasses.fields(Rows)]
    rows = Rows(**{name: np.concatenate([getattr(part.rows, name) for part in small]) for name in names})
    blocks = (part.take(np.arange(len(part))) for part in small)
    path = folder / part_name("")
    write_cache(path, rows, blocks, dim=small[0].dim, spec=small[0].spec, provenance=small[-1].provenance)
    for part in small:
        part.path.unlink()
