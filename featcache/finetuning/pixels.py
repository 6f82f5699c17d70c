"""Decoded images, kept: every image of a run is read and decoded once, whatever the number of epochs.

In: an ``ImageList``. Out: ``LabelledPixels`` of one split: labels, and ``Pixels``, uint8 (H, W, 3) per image, in memory, or in
a file when memory is short. The file is scratch: all bytes, a table as JSON, the table's length. It can always be made again,
and several processes of one machine share it.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.errors import SourceError
from featcache.images.decode import decode, read_pixels
from featcache.images.read import ReadImage, read_images
from featcache.images.source import ImageList
from featcache.spec import SPLITS, PreprocessSpec
from featcache.system.files import check_free_space, publish_file
from featcache.system.memory import available_memory

if TYPE_CHECKING:
    from featcache.system.device import Runtime
    from featcache.system.distributed import Processes

Picture = npt.NDArray[np.uint8]
Convert = Callable[[bytes], Picture]  # a file's content to what is kept of it; raises RefusedImage
_SHARE_OF_MEMORY = 0.4
_ENLARGED = 10 / 7  # stored edge of training images / edge of the network's input: room for random crops
_NAMED = 5  # refused images of a split that are named

log = logging.getLogger("featcache")


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded images.

    Attributes:
        kept: (n,) positions in the list of the images that could be decoded; image i below is image kept[i] of the list.
        refused: position -> reason, of the others.
        shapes: (n, 2) height and width. starts: (n + 1,) first byte of each image in ``flat``.
        flat: all bytes in a row, in memory or in a file; a slice from one start to the next is an image.
        digest: sha256 over the content of all files, in order, refused ones included.
    """

    kept: npt.NDArray[np.intp]
    refused: dict[int, str]
    shapes: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    flat: Any
    digest: str

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Picture:
        """uint8 (H, W, 3). It may be the stored array itself: do not write into it."""
        height, width = self.shapes[index]
        return np.asarray(self.flat[self.starts[index] : self.starts[index + 1]]).reshape(height, width, 3)


def network_input(spec: PreprocessSpec) -> Convert:
    """Stored for evaluation: exactly what ``extract`` and ``predict`` feed the backbone."""
    return lambda data: read_pixels(data, spec)


def training_input(spec: PreprocessSpec) -> Convert:
    """Stored for training: the whole image, its shorter edge somewhat longer than the network's input, never enlarged."""
    edge = round(max(spec.crop) * _ENLARGED)

    def shrink(data: bytes) -> Picture:
        image = decode(data)
        factor = edge / min(image.size)
        if factor < 1:
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.BILINEAR)
        return np.array(image)  # a copy: Pillow's own memory is read-only, which tensors dislike

    return shrink


def fits_memory(size: int) -> bool:
    """Whether ``size`` bytes of decoded images may be kept in this process's memory."""
    return size < _SHARE_OF_MEMORY * available_memory()


def decode_in_memory(images: ImageList, convert: Convert, *, workers: int = 1) -> Pixels:
    """Decode every image once, on ``workers`` threads, and keep them. ``convert``: a file's bytes -> uint8 (H, W, 3)."""
    pictures: list[Picture] = []
    table = _Table()
    for read in read_images(images, range(len(images)), convert, workers=workers):
        table.add(read)
        if read.value is not None:
            pictures.append(read.value.reshape(-1))
    return _to_pixels(table.to_json(), _FlatMemory(pictures, np.array(table.starts)))


def decode_into_file(images: ImageList, convert: Convert, file: Path, *, typical: int, workers: int = 1) -> None:
    """As ``decode_in_memory``, but into a file that ``open_pixels`` reads, replacing an earlier one.

    Args:
        typical: bytes of a converted image, a guess to check the free space with.

    Raises:
        StorageError: too little space.
    """
    check_free_space(file.parent, len(images) * typical)
    file.unlink(missing_ok=True)
    table = _Table()
    with publish_file(file, needed=len(images) * typical) as target:
        for read in read_images(images, range(len(images)), convert, workers=workers):
            table.add(read)
            if read.value is not None:
                target.write(np.ascontiguousarray(read.value).data)
        text = json.dumps(table.to_json()).encode()
        target.write(text + len(text).to_bytes(8, "little"))


def open_pixels(file: Path) -> Pixels:
    """What ``decode_into_file`` wrote, in this process or in another."""
    with file.open("rb") as source:
        end = source.seek(-8, os.SEEK_END)
        length = int.from_bytes(source.read(), "little")
        source.seek(end - length)
        table = json.loads(source.read(length))
    return _to_pixels(table, _FlatFile(file))


class _Table:
    """Where each picture lies, as they come."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.refused: dict[int, str] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.starts = [0]
        self.digest = hashlib.sha256()

    def add(self, read: ReadImage[Picture]) -> None:
        self.digest.update(read.digest or b"unreadable")
        if read.value is None:
            self.refused[read.position] = read.reason
            return
        self.kept.append(read.position)
        self.shapes.append(read.value.shape[:2])
        self.starts.append(self.starts[-1] + read.value.size)

    def to_json(self) -> dict[str, Any]:
        columns = {"kept": self.kept, "shapes": self.shapes, "starts": self.starts, "digest": self.digest.hexdigest()}
        return columns | {"refused_at": list(self.refused), "reasons": list(self.refused.values())}


def _to_pixels(table: dict[str, Any], flat: Any) -> Pixels:
    return Pixels(
        kept=np.array(table["kept"], np.intp),
        refused=dict(zip(table["refused_at"], table["reasons"], strict=True)),
        shapes=np.array(table["shapes"], np.int64).reshape(-1, 2),
        starts=np.array(table["starts"], np.int64),
        flat=flat,
        digest=table["digest"],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _FlatMemory:
    """Pictures that lie one by one in memory, addressed as if in a row: no second copy is ever made."""

    pictures: list[Picture]
    starts: npt.NDArray[np.int64]

    def __getitem__(self, span: slice) -> Picture:
        return self.pictures[int(np.searchsorted(self.starts, span.start))]


class _FlatFile:
    """The bytes of a scratch file, copied out of a memory map."""

    def __init__(self, path: Path) -> None:
        self._flat = np.memmap(path, np.uint8, "r")

    def __getitem__(self, span: slice) -> Picture:
        return np.array(self._flat[span])


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledPixels:
    """Decoded images of one split.

    Attributes:
        pixels: n images. labels: (n,) int64, as the model numbers its classes. paths: n, relative to the source.
    """

    pixels: Pixels
    labels: npt.NDArray[np.int64]
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """sha256 (hex) over names, labels and content."""
        text = "\n".join([*self.paths, self.pixels.digest, *map(str, self.labels)])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def decode_split(
    images: ImageList,
    split: str,
    classes: tuple[str, ...],
    preprocess: PreprocessSpec,
    *,
    folder: Path,
    runtime: "Runtime",
    processes: "Processes",
) -> LabelledPixels:
    """Decode the images of a split once: train with room for random crops, the others exactly as in prediction.

    Args:
        classes: as the model numbers them; images of others are left out, with a warning.
        folder: for the scratch file, if memory is short or several processes share it.

    Raises:
        SourceError: nothing left to train on or to choose by. StorageError: too little space.
    """
    number = {name: position for position, name in enumerate(classes)}
    to_model = np.array([number.get(name, -1) for name in images.classes], np.int64)
    rows = np.flatnonzero(images.splits == SPLITS.index(split))
    known = to_model[images.labels[rows]] >= 0
    if not known.all():
        log.warning("%d %s images are of classes that the model does not know: left out", int((~known).sum()), split)
    images = images.take(rows[known])
    pixels = _decode(images, split, preprocess, folder, runtime, processes)
    _name_refused(pixels.refused, images, split)
    labels = to_model[images.labels[pixels.kept]]
    if not len(labels) and split != "test":
        raise SourceError(f"not one {split} image of {images.root} could be decoded")
    if split == "train" and len(np.unique(labels)) < 2:
        raise SourceError(f"the training images of {images.root} that could be decoded are all of one class")
    return LabelledPixels(pixels, labels, tuple(images.paths[position] for position in pixels.kept))


def _name_refused(refused: dict[int, str], images: ImageList, split: str) -> None:
    for position, reason in list(refused.items())[:_NAMED]:
        log.warning("%s is left out: %s", images.paths[position], reason)
    if len(refused) > _NAMED:
        log.warning("and %d more %s images are left out", len(refused) - _NAMED, split)


def _decode(
    images: ImageList,
    split: str,
    preprocess: PreprocessSpec,
    folder: Path,
    runtime: "Runtime",
    processes: "Processes",
) -> Pixels:
    """In memory if they fit; else, or with several processes, in a file that one process per machine writes."""
    convert = training_input(preprocess) if split == "train" else network_input(preprocess)
    typical = 3 * preprocess.crop[0] * preprocess.crop[1] * (3 if split == "train" else 1)
    if processes.world == 1 and fits_memory(len(images) * typical):
        return decode_in_memory(images, convert, workers=runtime.workers)
    file = folder / f"{split}-{processes.node}.pixels"
    if processes.local_rank == 0:
        log.info("decoded %s images go to %s, about %.1f GB", split, file, len(images) * typical / 1e9)
        decode_into_file(images, convert, file, typical=typical, workers=runtime.workers)
    processes.barrier()
    return open_pixels(file)
