"""JPEGs decoded and resized on a CUDA GPU, for specs whose ``decode`` is ``gpu``; the one door to torchcodec.

In: files' bytes. Out: uint8 pixels of the crop, as ``read_pixels`` gives them, but other ones: nvJPEG transforms and upsamples
otherwise than libjpeg, and the resize is in float32. So they are a kind of their own, and which files are of it is decided by their
content alone, ``is_for_gpu``: never by how busy the processor is, or an embedding would depend on that. Whoever changes
``is_for_gpu`` needs another value of ``decode``.

Whether all pixels of a file are there is not asked of nvJPEG, which does not say: the CPU decodes it at an eighth of its size
first, and throws that away. That takes a third of what decoding and resizing it would take. So the same files are refused.
"""

import contextlib
import dataclasses
import functools
import queue
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.errors import MissingDependencyError, RefusedImage, UsageError
from featcache.images.decode import decode_pixels, read_pixels
from featcache.images.formats import Brightest
from featcache.images.gpu_resize import resize_and_crop
from featcache.images.jpeg_header import JpegHeader, read_jpeg_header
from featcache.images.preprocess import MOST_PIXELS
from featcache.images.read import ReadImage
from featcache.spec import PreprocessSpec

if TYPE_CHECKING:
    import torch

    Decode = Callable[
        [list["torch.Tensor"]], list["torch.Tensor"]
    ]  # files, uint8 (bytes,), to RGB, uint8 (3, h, w), on the GPU

Pixels = npt.NDArray[np.uint8]


class Undecoded(NamedTuple):
    """A file for the GPU. data: its bytes, as they are or uint8 (n,). pixels: how many it has."""

    data: bytes | Pixels
    pixels: int


_BASELINE, _ADOBE_YCBCR = 0xC0, 1
_GREY = {b"\x11"}
_COLOUR = {bytes((luma, 0x11, 0x11)) for luma in (0x11, 0x12, 0x21, 0x22)}  # 4:4:4, 4:4:0, 4:2:2, 4:2:0
_LARGEST = 2**25  # pixels of one file
_AT_ONCE, _ROOMY = (
    2**25,
    2**26,
)  # pixels of files decoded together, some 30 bytes each while they are resized; where there is room
_ROOM = 30 * 2**30  # bytes of a GPU's memory that leave some
_LARGEST_STEP = 32  # of the resize
_LANES = 2  # one batch is decoded while another one is resized
_FAULTY = re.compile(r": (3|4|9|10)\b|subsampling")  # nvjpegStatus_t: bad, not supported, not implemented, incomplete


def is_for_gpu(header: JpegHeader, spec: PreprocessSpec) -> bool:
    """Whether the GPU decodes a file: upright baseline JPEGs, grey or YCbCr, in the usual samplings and sizes."""
    names, factors = header.components[0::3], header.components[1::3]
    colour = factors in _COLOUR and names == b"\1\2\3" and header.transform in (None, _ADOBE_YCBCR)
    plain = header.kind == _BASELINE and header.interleaved and header.orientation == 1
    height, width = spec.resized(header.height, header.width)
    step = max(header.height / height, header.width / width)
    small = header.height * header.width <= _LARGEST and height * width <= MOST_PIXELS and step <= _LARGEST_STEP
    return plain and small and (colour or factors in _GREY)


def read_for_gpu(data: bytes, spec: PreprocessSpec, *, seen: Brightest | None = None) -> Pixels | Undecoded:
    """What is for the GPU as it is, all of its pixels there; pixels (H, W, 3) of all else. Raises RefusedImage."""
    if (header := read_jpeg_header(data)) is None or not is_for_gpu(header, spec):
        return read_pixels(data, dataclasses.replace(spec, decode="full scale"), seen=seen)
    decode_pixels(data, at_least=1)
    return Undecoded(data, header.width * header.height)


@dataclasses.dataclass(frozen=True, eq=False)
class GpuJpegs:
    """Decodes what ``read_for_gpu`` leaves to it. Calls are safe from several threads.

    Attributes:
        spec: what is wanted. device: where. decode: see ``nvjpeg``. at_once: pixels of files decoded in one call, at most.
    """

    spec: PreprocessSpec
    device: "torch.device"
    decode: "Decode"
    at_once: int = _AT_ONCE

    def decode_batch(self, files: Sequence[Undecoded]) -> "torch.Tensor":
        """uint8 (n, H, W, 3) on the device, in the order of ``files``, queued on the current stream.

        Raises:
            RuntimeError: the decoder refuses one of ``files``; which, it does not say. torch.OutOfMemoryError.
        """
        import torch

        pixels = torch.empty((len(files), *self.spec.crop, 3), dtype=torch.uint8, device=self.device)
        with torch.inference_mode():
            for rows in _portions(files, self.at_once):
                images = self.decode([_as_tensor(files[row].data) for row in rows])
                for places in _alike(images):
                    done = resize_and_crop([images[place] for place in places], self.spec)
                    _set_rows(pixels, [rows[place] for place in places], done)
        return pixels

    def read(self, data: bytes) -> Pixels:
        """As ``read_pixels``, of one file. Raises RefusedImage; otherwise as ``finish``."""
        found = read_for_gpu(data, self.spec)
        [pixels] = self._on_host([found]) if isinstance(found, Undecoded) else [found]
        if isinstance(pixels, str):
            raise RefusedImage(pixels)
        return pixels

    def finish(self, reads: Iterable[ReadImage[Any]]) -> list[ReadImage[Pixels]]:
        """``reads`` by ``read_for_gpu``, with pixels where it left a file, or the reason why not.

        Raises:
            RuntimeError: the GPU failed, not an image. UsageError: its memory is too small for so many.
        """
        done = list(reads)
        left = _left_to_gpu(done)
        for place, pixels in zip(left, self._on_host(list(left.values())), strict=True):
            value, reason = (None, pixels) if isinstance(pixels, str) else (pixels, "")
            done[place] = done[place]._replace(value=value, reason=reason)
        return done

    def finish_into(self, reads: Sequence[ReadImage[Any]], batch: "torch.Tensor") -> list[ReadImage[Any]]:
        """The same into the rows of ``batch`` (N, H, W, 3) on the device, on the current stream; values stay the files."""
        done, left = list(reads), _left_to_gpu(reads)
        where = list(left)
        for places, pixels in self._decoded(list(left.values())):
            rows = [where[place] for place in places]
            if isinstance(pixels, str):
                done[rows[0]] = done[rows[0]]._replace(value=None, reason=pixels)
            else:
                _set_rows(batch, rows, pixels)
        return done

    def _on_host(self, files: list[Undecoded]) -> list[Pixels | str]:
        """Pixels (H, W, 3), or why there are none, of each of ``files``."""
        found: list[Pixels | str] = [""] * len(files)
        lanes = _lanes(self.device)
        lane = lanes.get()
        try:
            with lane:
                for places, pixels in self._decoded(files):
                    for place, each in zip(
                        places, [pixels] if isinstance(pixels, str) else pixels.cpu().numpy(), strict=True
                    ):
                        found[place] = each
        finally:
            lanes.put(lane)
        return found

    def _decoded(self, files: Sequence[Undecoded]) -> "Iterator[tuple[range, torch.Tensor | str]]":
        """Of some of ``files`` the pixels (n, H, W, 3) on the device, or of one of them why there are none; all in the end."""
        import torch

        pending = deque([range(len(files))] if files else [])
        while pending:
            places = pending.popleft()
            try:
                yield places, self.decode_batch([files[place] for place in places])
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    f"decoding {len(places)} images does not fit into {self.device}'s memory; halve --batch-size"
                ) from error
            except RuntimeError as error:
                if isinstance(error, torch.AcceleratorError) or not _FAULTY.search(text := str(error).splitlines()[0]):
                    raise
                if len(places) > 1:  # which one?
                    pending.extend(range(place, place + 1) for place in places)
                    continue
                # Not decoded by the CPU instead: its pixels would be of the other kind, as this GPU or driver happens to be.
                yield places, f"not decoded by the GPU ({text}); --decode full decodes it on the CPU"


def _left_to_gpu(reads: Sequence[ReadImage[Any]]) -> dict[int, Undecoded]:
    """Those whose value is a file, by their places."""
    return {place: read.value for place, read in enumerate(reads) if isinstance(read.value, Undecoded)}


def _as_tensor(data: bytes | Pixels) -> "torch.Tensor":
    """uint8 (bytes,)."""
    import torch

    # Bytes are copied: tensors of what cannot be written to make PyTorch warn.
    return torch.from_numpy(data if isinstance(data, np.ndarray) else np.frombuffer(bytearray(data), np.uint8))


def _alike(images: "Sequence[torch.Tensor]") -> "Iterable[list[int]]":
    """Places of images (3, h, w) whose longer edges have the same power of two: they are resized together."""
    groups: dict[int, list[int]] = {}
    for place, image in enumerate(images):
        groups.setdefault(max(image.shape[1:]).bit_length(), []).append(place)
    return groups.values()


def _set_rows(target: "torch.Tensor", rows: list[int], values: "torch.Tensor") -> None:
    """``target[rows] = values``, without waiting for the device."""
    import torch

    if rows == list(range(rows[0], rows[0] + len(rows))):
        target[rows[0] : rows[0] + len(rows)] = values
    else:
        target.index_copy_(0, torch.tensor(rows).to(target.device, non_blocking=True), values)


def _portions(files: Sequence[Undecoded], at_once: int) -> Iterator[list[int]]:
    """Positions of ``files`` that are decoded together, in order."""
    rows, whole = list[int](), 0
    for row, file in enumerate(files):
        if rows and whole + file.pixels > at_once:
            yield rows
            rows, whole = [], 0
        rows.append(row)
        whole += file.pixels
    if rows:
        yield rows


@functools.cache
def _lanes(device: "torch.device") -> "queue.SimpleQueue[contextlib.AbstractContextManager[object]]":
    """Streams of a device: whoever holds one has it to himself."""
    import torch

    lanes: queue.SimpleQueue[contextlib.AbstractContextManager[object]] = queue.SimpleQueue()
    for _ in range(_LANES):
        cuda = device.type == "cuda"
        lanes.put(torch.cuda.stream(torch.cuda.Stream(device)) if cuda else contextlib.nullcontext())  # type: ignore[no-untyped-call]
    return lanes


def gpu_jpegs(spec: PreprocessSpec, device: "torch.device") -> GpuJpegs | None:
    """What decodes JPEGs for ``spec`` on ``device``; None if the spec leaves that to the CPU.

    Raises:
        UsageError: ``device`` is no CUDA GPU. MissingDependencyError: torchcodec is missing.
    """
    return GpuJpegs(spec, device, nvjpeg(device), _at_once(device)) if spec.decode == "gpu" else None


def _at_once(device: "torch.device") -> int:
    """Pixels that are decoded in one call: as many as a batch of the usual photographs has, where there is room."""
    import torch

    roomy = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= _ROOM
    return _ROOMY if roomy else _AT_ONCE


def pixel_reader(spec: PreprocessSpec, device: "torch.device | None") -> Callable[[bytes], Pixels]:
    """``read_pixels`` for ``spec``, by whoever decodes for it; ``device``: the CPU when None. Raises as ``gpu_jpegs``."""
    import torch

    gpu = gpu_jpegs(spec, device or torch.device("cpu"))
    return gpu.read if gpu else functools.partial(read_pixels, spec=spec)


def nvjpeg(device: "torch.device") -> "Decode":
    """torchcodec's decoder. Raises UsageError: no CUDA GPU. MissingDependencyError: no torchcodec."""
    if device.type != "cuda":
        raise UsageError(
            f"the spec says decode gpu, whose pixels only a CUDA GPU gives, and this would run on {device.type}: use a machine "
            "that has one, or make cache and model again with --decode full"
        )
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:  # also one that does not fit this PyTorch
        raise MissingDependencyError(
            f"decode gpu takes torchcodec 0.17 or newer, which cannot be imported ({error}): pip install 'featcache[gpu]'"
        ) from error
    return functools.partial(decode_jpeg, mode="RGB", device=device)
