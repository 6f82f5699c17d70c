"""What stays the same through all stages of a run, and what several of them need.

In: the images, what the user asked for, what to compute with. Out: a ``Job``, which decodes a split, computes logits, and holds
the work folder.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import UsageError
from featcache.finetuning.checkpoint import claim_work, tidy_work
from featcache.finetuning.pixels import LabelledPixels, decode_split
from featcache.finetuning.recipes import choose_recipe
from featcache.heads.head import Array
from featcache.images.source import ImageList
from featcache.models.model import Model
from featcache.system.workdir import locked, work_folder

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.finetuning.network import Network
    from featcache.system.device import Runtime
    from featcache.system.distributed import Processes


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        images: labelled, each in train, val or test. output: the model folder to be written.
        recipe: its name. changes: fields of ``Recipe`` to override. seed: of everything random.
        precision: fp32, bf16 or fp16, of training.
        runtime: what to compute with. processes: who computes along.
    """

    images: ImageList
    output: Path
    recipe: str
    changes: dict[str, Any]
    seed: int
    precision: str
    runtime: "Runtime"
    processes: "Processes"

    def check_processes(self) -> None:
        """Raise UsageError if the recipe cannot be trained by several processes."""
        if self.processes.world > 1 and choose_recipe(self.recipe, 1, **self.changes).batchnorm == "train":
            raise UsageError(
                f"recipe {self.recipe} trains batch norms, which would see other batches in each process; use one process"
            )

    def decode(self, split: str, model: Model, backbone: "Backbone") -> LabelledPixels:
        """The images of a split, with labels as ``model`` numbers its classes."""
        return decode_split(
            self.images,
            split,
            model.classes,
            backbone.preprocess,
            folder=work_folder(self.output),
            runtime=self.runtime,
            processes=self.processes,
        )

    def logits(self, network: "Network", split: LabelledPixels) -> Array:
        """(n, C) float32."""
        from featcache.finetuning.trainer import compute_logits

        return compute_logits(
            network, split.pixels, runtime=self.runtime, processes=self.processes, batch_size=self.runtime.batch_size
        )

    @contextlib.contextmanager
    def hold_work(self, *, force: bool) -> Iterator[None]:
        """Hold the work folder, which the first process writes. It is gone at the end if it has nothing to keep.

        Args:
            force: remove what an interrupted run left in it.

        Raises:
            StorageError: another run holds it, or it cannot be made.
        """
        with contextlib.ExitStack() as stack:
            if self.processes.is_first:
                stack.enter_context(locked(work_folder(self.output)))
                stack.callback(tidy_work, self.output)
                claim_work(self.output, force=force)
            self.processes.barrier()
            yield
