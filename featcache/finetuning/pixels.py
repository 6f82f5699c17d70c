"""Decoded images, kept: every image of a run is read and decoded once, whatever the number of epochs.

In: an ``ImageList``. Out: ``Pixels`` of one split: labels, and a picture, uint8 (H, W, 3), per image, in memory, or in a file
when memory is short. The file is scratch: all bytes, a table as JSON, the table's length. It can always be made again, and
several processes of one machine share it.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from featcache.errors import SourceError
from featcache.finetuning.draw_processes import ROOM, drawing_processes
from featcache.finetuning.recipes import Job, settle
from featcache.finetuning.training_input import Picture, TrainingInput
from featcache.images.fill import fill_memory
from featcache.images.gpu_jpeg import pixel_reader
from featcache.images.read import ReadImage, read_images
from featcache.images.source import ImageList
from featcache.spec import SPLITS, PreprocessSpec
from featcache.system.display import Steps
from featcache.system.files import check_free_space, publish_file
from featcache.system.memory import available_memory
from featcache.system.workdir import work_folder
from featcache.system.worker_processes import ALIGNED, SharedMemory, WorkerProcesses

Convert = Callable[[bytes], Picture]  # a file's content to what is kept of it; raises RefusedImage
_SHARE_OF_MEMORY = 0.4
_ROOM = 4  # times what pictures are likely to take: what is not used costs nothing
_NAMED = 5  # refused images of a split that are named
_TOLD = 16  # images after which is told how far it is

log = logging.getLogger("featcache")


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded images of one list.

    Attributes:
        kept: (n,) positions in the list of the images that could be decoded. refused: position -> reason, of the others.
        pictures: n, uint8 (H, W, 3); views of a file, or the only copy in memory: do not write into them.
        labels: (n,) int64, as the list numbers its classes. paths: n, relative to the source.
        digest: sha256 (hex) over names, labels and the content of all files, in order, refused ones included.
        digests: (n, 32) uint8, sha256 of each image's file.
        memory: of the pictures, where worker processes are to see them; some of it is left for batches.
    """

    kept: npt.NDArray[np.intp]
    refused: dict[int, str]
    pictures: list[Picture]
    labels: npt.NDArray[np.int64]
    paths: tuple[str, ...]
    digest: str
    digests: npt.NDArray[np.uint8]
    memory: SharedMemory | None = None

    def __len__(self) -> int:
        return len(self.kept)


def network_input(spec: PreprocessSpec, device: torch.device | None = None) -> Convert:
    """Stored for evaluation: exactly what ``extract`` and ``predict`` feed the backbone. Raises as ``pixel_reader``."""
    return pixel_reader(spec, device)


class Apart(NamedTuple):
    """Processes that decode, and memory that they see, with ``room`` bytes for each picture; larger ones lie elsewhere."""

    processes: WorkerProcesses
    memory: SharedMemory
    room: int


def decode_in_memory(
    images: ImageList,
    convert: Convert,
    *,
    workers: int = 1,
    apart: Apart | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Decode every image once, on ``workers`` threads, or as many processes, and keep them.

    Args:
        convert: a file's bytes -> uint8 (H, W, 3); for ``apart`` as ``fill_memory`` takes it. progress: called with (done, total)
            now and then.
    """
    if apart is None:
        reads = read_images(images, range(len(images)), convert, workers=workers)
    else:
        reads = fill_memory(images, convert, **apart._asdict(), workers=workers)
    pictures: list[Picture] = []
    table = _keep_each(images, reads, pictures.append, progress=progress)
    return dataclasses.replace(_to_pixels(images, table, pictures), memory=apart and apart.memory)


def decode_into_file(
    images: ImageList,
    convert: Convert,
    file: Path,
    *,
    typical: int,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """As ``decode_in_memory``, but into a file that ``open_pixels`` reads, replacing an earlier one.

    Args:
        typical: bytes of a converted image, a guess to check the free space with.

    Raises:
        StorageError: too little space.
    """
    check_free_space(file.parent, len(images) * typical)
    file.unlink(missing_ok=True)
    shapes: list[tuple[int, ...]] = []
    with publish_file(file, needed=len(images) * typical) as target:

        def write(picture: Picture) -> None:
            target.write(np.ascontiguousarray(picture).data)
            shapes.append(picture.shape)

        reads = read_images(images, range(len(images)), convert, workers=workers)
        table = _keep_each(images, reads, write, progress=progress)
        text = json.dumps(table | {"shapes": shapes}).encode()
        target.write(text + len(text).to_bytes(8, "little"))


def open_pixels(images: ImageList, file: Path) -> Pixels:
    """What ``decode_into_file`` wrote of ``images``, in this process or in another."""
    flat = np.asarray(np.memmap(file, np.uint8, "r"))
    length = int.from_bytes(flat[-8:].tobytes(), "little")
    table = json.loads(flat[-8 - length : -8].tobytes())
    shapes = table.pop("shapes")
    parts = np.split(flat, np.cumsum([math.prod(shape) for shape in shapes], dtype=np.intp))[:-1]  # the last: the table
    return _to_pixels(images, table, [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])


def _keep_each(
    images: ImageList,
    reads: Generator[ReadImage[Picture]],
    keep: Callable[[Picture], None],
    *,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Give every picture to ``keep``, in order. Returns, as JSON values, which were kept, which refused, and digests."""
    kept, refused, digests, digest = [], [], [], hashlib.sha256()
    for number, read in enumerate(reads, 1):
        if progress and (number % _TOLD == 0 or number == len(images)):
            progress(number, len(images))
        digest.update(read.digest or b"unreadable")
        if read.value is None:
            refused.append((read.position, read.reason))
        else:
            kept.append(read.position)
            digests.append(read.digest.hex())
            keep(read.value)
    return {"kept": kept, "refused": refused, "digest": digest.hexdigest(), "digests": digests}


def _to_pixels(images: ImageList, table: dict[str, Any], pictures: list[Picture]) -> Pixels:
    kept = np.array(table["kept"], np.intp)
    labels, paths = images.labels[kept].astype(np.int64), tuple(images.paths[position] for position in kept)
    text = "\n".join([*paths, table["digest"], *map(str, labels)])
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    digests = np.frombuffer(bytes.fromhex("".join(table["digests"])), np.uint8).reshape(-1, 32)
    return Pixels(kept, dict(table["refused"]), pictures, labels, paths, digest, digests)


def decode_split(
    job: Job, split: str, *, classes: tuple[str, ...], preprocess: PreprocessSpec, progress: Steps | None = None
) -> Pixels:
    """Decode the images of a split once: train with room for random crops, the others exactly as in prediction.

    Args:
        classes: as the model numbers them; images of others are left out, with a warning.
        progress: called with (done, total, what) now and then.

    Raises:
        SourceError: nothing left to train on or to choose by. StorageError: too little space.
    """
    number = {name: position for position, name in enumerate(classes)}
    to_model = np.array([number.get(name, -1) for name in job.images.classes], np.int32)
    images = job.images.take(np.flatnonzero(job.images.splits == SPLITS.index(split)))
    images = dataclasses.replace(images, labels=to_model[images.labels], classes=classes)
    if unknown := int((images.labels < 0).sum()):
        log.warning("%d %s images are of classes that the model does not know: left out", unknown, split)
    images = images.take(np.flatnonzero(images.labels >= 0))
    told = functools.partial(_tell, progress, f"decoding {split}") if progress else None
    pixels = _decode(job, images, split=split, preprocess=preprocess, progress=told)
    for position, reason in list(pixels.refused.items())[:_NAMED]:
        log.warning("%s is left out: %s", images.paths[position], reason)
    if len(pixels.refused) > _NAMED:
        log.warning("and %d more %s images are left out", len(pixels.refused) - _NAMED, split)
    if not len(pixels) and split != "test":
        raise SourceError(f"not one {split} image of {images.root} could be decoded")
    if split == "train" and len(np.unique(pixels.labels)) < 2:
        raise SourceError(f"the training images of {images.root} that could be decoded are all of one class")
    return pixels


def _tell(progress: Steps, what: str, done: int, total: int) -> None:
    progress(done, total, what)


def start_decoding(job: Job) -> WorkerProcesses | None:
    """Let the processes start that ``decode_split`` will want: whoever knows so seconds before need not wait. None: threads decode."""
    n_train = _training_images(job)
    return drawing_processes(job, settle(job.settings, n_train), n_train)


def _training_images(job: Job) -> int:
    return int((job.images.splits == SPLITS.index("train")).sum())


def _decode(
    job: Job, images: ImageList, *, split: str, preprocess: PreprocessSpec, progress: Callable[[int, int], None] | None
) -> Pixels:
    """In memory if they fit; else, or with several processes, in a file that one process per machine writes."""
    evaluated = network_input(preprocess, job.runtime.device)  # refused before hours are spent on training images
    convert: Convert = TrainingInput(preprocess) if split == "train" else evaluated
    typical = 3 * preprocess.crop[0] * preprocess.crop[1] * (3 if split == "train" else 1)
    processes, workers = job.processes, job.runtime.workers
    if processes.world == 1 and len(images) * typical < _SHARE_OF_MEMORY * available_memory():
        apart = None
        if preprocess.decode != "gpu" or split == "train":
            apart = _apart(job, len(images), typical, draws=split == "train")
        return decode_in_memory(images, convert, workers=workers, apart=apart, progress=progress)
    file = work_folder(job.output) / f"{split}-{processes.node}.pixels"
    if processes.local_rank == 0:
        log.info("decoded %s images go to %s, about %.1f GB", split, file, len(images) * typical / 1e9)
        decode_into_file(images, convert, file, typical=typical, workers=workers, progress=progress)
    processes.barrier()
    return open_pixels(images, file)


def _apart(job: Job, images: int, typical: int, *, draws: bool) -> Apart | None:
    """The processes that draw for ``job``, if there are any, and memory for so many images, and for batches if it is of these they draw."""
    if not images or (processes := start_decoding(job)) is None:
        return None
    recipe, room = settle(job.settings, _training_images(job)), _ROOM * typical
    batches = ROOM * (recipe.batch_size or 1) * recipe.accumulation if draws else 0
    return Apart(processes, SharedMemory((images + batches) * (room + ALIGNED)), room)
