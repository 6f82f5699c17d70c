"""Who embeds: this process, several of this machine, a cluster. The contract, ``run_part`` that all call, and the first executor.

An executor gets ``Work``, a frozen value that can be pickled and holds all that a worker needs on whatever machine sees the
images and the folder of the output, and positions in ``Work.images``. It cuts the positions into blocks as it likes
(``blocks``), and has ``run_part`` called for each, in any order, at once, several times. What it promises: when it returns,
every position is in a published part, as a row or as a refusal with its reason, or else it raises; and it returns the names
of parts in which every position occurs.

A part is an immutable file, published atomically. So a worker may die at any instant, and its block is given again: what it
published stays there and is superfluous, what it did not is nowhere. A block that is embedded twice does no harm. A worker
never deletes, and never writes under a name that another may have. Whoever opened the folder packs what is in it.

Workers compute what ``Work.spec`` says or raise: each makes its own ``Embedder`` (``Work.prepare``, which takes seconds and is
kept for further blocks) of the very weights, and in a precision that passes for the same.
"""

import dataclasses
import logging
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from featcache.cache.cache import FeatureCache, weights_copy
from featcache.cache.format import Indices, Provenance
from featcache.errors import BackboneError, SpecMismatchError
from featcache.extraction.parts import embed_into_parts
from featcache.images.source import ImageList
from featcache.spec import Spec
from featcache.system.addresses import know, typed_below
from featcache.system.workdir import work_folder

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.backbones.embed import Progress
    from featcache.backbones.embedder import Embedder
    from featcache.backbones.encoder import Precision
    from featcache.system.device import Runtime

log = logging.getLogger("featcache")
BLOCK = 512  # images; some seconds of work: what a dead worker costs, and far more than what handing it over costs


@dataclasses.dataclass(frozen=True)
class Work:
    """What every worker needs. Can be pickled.

    Attributes:
        output: the cache that the parts are for, on a file system that all workers see; the weights lie beside it where no
            library provides them.
        images: what positions count in. Workers read the files below its root.
        spec, provenance: settled: what each part has to be, where the weights come from, in which precision they passed.
        device, workers, batch_size: as for ``extract``; of the worker's machine where they are auto or None.
        tag: what the names of parts carry: whose they are, where several runs write beside each other.
    """

    output: Path
    images: ImageList
    spec: Spec
    provenance: Provenance
    device: str = "auto"
    workers: int | None = None
    batch_size: int | None = None
    tag: str = ""

    def __getstate__(self) -> dict[str, Any]:  # a worker asks for images with the password that was typed here
        return vars(self) | {"typed": typed_below(self.images.root)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        know(state["typed"])
        vars(self).update({name: value for name, value in state.items() if name != "typed"})

    @property
    def folder(self) -> Path:
        """Where parts are published."""
        return work_folder(self.output)

    @property
    def path(self) -> Path:
        """As of a cache."""
        return self.output

    def prepare(self) -> "Embedder":
        """The worker's own ``Embedder``: of the weights of ``spec``, in the precision that it was settled with, if that is to be had here.

        Raises:
            BackboneError, SpecMismatchError: as ``backbone_of``.
            UsageError: no such device here.
        """
        from featcache.backbones.embedder import Embedder  # here: they take torch
        from featcache.backbones.encoder import candidates
        from featcache.system.device import choose_runtime

        runtime = choose_runtime(self.device, workers=self.workers, batch_size=self.batch_size)
        log.info(runtime.reason)
        backbone, wanted = backbone_of(self), self.spec.precision
        precision = wanted
        if wanted == "reference":
            before = self.provenance.precision
            precision = before if before in candidates(runtime.device) else "auto"
        embedder = Embedder.prepare(backbone, self.images, runtime=runtime, precision=cast("Precision", precision))
        if wanted == "reference" != embedder.choice.precision_class:  # what passed elsewhere need not pass here
            embedder = Embedder.prepare(backbone, self.images, runtime=runtime, precision="fp32")
        return embedder

    def provenance_of(self, embedder: "Embedder") -> Provenance:
        """That of parts which ``embedder`` makes: the same work, on its machine."""
        choice = dataclasses.asdict(embedder.choice)
        return dataclasses.replace(self.provenance, self_check=choice, rest=machine_facts(embedder.runtime))


@dataclasses.dataclass(frozen=True)
class Published:
    """What an executor did. names: of the parts in ``Work.folder``, opened as ``parts``. seconds: without starting."""

    folder: Path
    names: tuple[str, ...]
    seconds: float

    @property
    def parts(self) -> list[FeatureCache]:
        """Raises CacheError: one is gone, or damaged."""
        return [FeatureCache.open(self.folder / name) for name in self.names]


class Executor(Protocol):
    """Embeds some positions of ``work``; see the top of this file."""

    def __call__(self, work: Work, positions: Indices, *, progress: "Progress | None" = None) -> Published:
        """Returns when every position is published. Raises StorageError, BackboneError, SpecMismatchError, UsageError."""


def run_part(
    work: Work, positions: Indices, *, embedder: "Embedder | None" = None, progress: "Progress | None" = None
) -> tuple[str, ...]:
    """Embed some images of ``work`` into new parts; returns their names. The one thing that any scheduler calls.

    Args:
        work: as above. positions: (n,) in ``work.images``.
        embedder: what ``work.prepare`` gave; made here when None. progress: as for ``extract``, of these n.

    Raises:
        As ``work.prepare``. StorageError: a part cannot be written.
    """
    return run_here(work, positions, embedder=embedder, progress=progress).names


def run_here(
    work: Work, positions: Indices, *, embedder: "Embedder | None" = None, progress: "Progress | None" = None
) -> Published:
    """The executor that is this very process; its threads are those of ``embedder``. Raises as ``run_part``."""
    embedder = embedder or work.prepare()
    done = embed_into_parts(
        work.images.take(positions),
        embedder,
        work.folder,
        spec=work.spec,
        provenance=work.provenance_of(embedder),
        tag=work.tag,
        progress=progress,
    )
    return Published(work.folder, tuple(part.path.name for part in done.parts), done.seconds)


def blocks(positions: Indices, *, size: int = BLOCK) -> Iterator[Indices]:
    """``positions`` in blocks of neighbours: what lies side by side on the disk, or in one archive, is read together."""
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def machine_facts(runtime: "Runtime") -> dict[str, Any]:
    """What is recorded about where and when something was embedded. ``kind``: the same kind gives the same bits."""
    import torch  # here: it takes seconds

    from featcache.system.device import has_bf16_arithmetic

    cpu = torch.backends.cpu.get_cpu_capability()
    bf16 = ", bf16" if has_bf16_arithmetic() else ""
    name = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else f"{cpu}{bf16}"
    return {
        "runtime": runtime.reason,
        "kind": f"{runtime.device.type}: {name}; batches of {runtime.batch_size}; torch {torch.__version__}",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def backbone_of(cache: "FeatureCache | Work") -> "Backbone":
    """The backbone that a cache was made with, or work is for.

    Raises:
        BackboneError: its weights are missing, or a library cannot provide them here.
        SpecMismatchError: what was found is another backbone, or has other weights.
    """
    from featcache.backbones.load import load_again

    copy, spec = weights_copy(cache.path, cache.spec), cache.spec
    backbone = load_again(spec, copy, cache.provenance.reload)
    if backbone is None:
        raise BackboneError(
            f"{copy} is missing, and no library provides the weights of {cache.path} ({cache.provenance.source}); copy the "
            "weights file to that name and run the same command again"
        )
    found = dataclasses.replace(
        spec,
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        layer=backbone.layer,
        pooling=backbone.pooling,
        layers=backbone.layers,
    )
    if found != spec:
        raise SpecMismatchError(
            f"{cache.path} was made with another backbone than {backbone.weights} gives "
            f"({spec.difference(found)}); copy the original weights to {copy}"
        )
    return backbone
