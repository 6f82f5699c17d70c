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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featcache.errors import MissingDependencyError, RefusedImage, UsageError
from featcache.images.decode import decode_pixels, read_pixels
from featcache.images.formats import Brightest
from featcache.images.jpeg_header import JpegHeader, read_jpeg_header
from featcache.images.preprocess import MOST_PIXELS, cropped_at
from featcache.images.read import ReadImage
from featcache.spec import PreprocessSpec

if TYPE_CHECKING:
    import torch

    Decode = Callable[
        [list["torch.Tensor"]], list["torch.Tensor"]
    ]  # files, uint8 (bytes,), to RGB, uint8 (3, h, w), on the GPU

Pixels = npt.NDArray[np.uint8]
_BASELINE, _ADOBE_YCBCR = 0xC0, 1
_GREY = {b"\x11"}
_COLOUR = {bytes((luma, 0x11, 0x11)) for luma in (0x11, 0x12, 0x21, 0x22)}  # 4:4:4, 4:4:0, 4:2:2, 4:2:0
_AT_ONCE = 2**25  # pixels, also of one file: 12 bytes each while they are resized
_LARGEST_STEP = 32  # of the resize: the shared memory that PyTorch's kernel takes grows with it
_LANES = 2  # one batch is decoded while another one is resized
_FAULTY = re.compile(r": (3|4|9|10)\b|subsampling")  # nvjpegStatus_t: bad, not supported, not implemented, incomplete


def is_for_gpu(header: JpegHeader, spec: PreprocessSpec) -> bool:
    """Whether the GPU decodes a file: upright baseline JPEGs, grey or YCbCr, in the usual samplings and sizes."""
    names, factors = header.components[0::3], header.components[1::3]
    colour = factors in _COLOUR and names == b"\1\2\3" and header.transform in (None, _ADOBE_YCBCR)
    plain = header.kind == _BASELINE and header.interleaved and header.orientation == 1
    height, width = spec.resized(header.height, header.width)
    step = max(header.height / height, header.width / width)
    small = header.height * header.width <= _AT_ONCE and height * width <= MOST_PIXELS and step <= _LARGEST_STEP
    return plain and small and (colour or factors in _GREY)


def read_for_gpu(data: bytes, spec: PreprocessSpec, *, seen: Brightest | None = None) -> Pixels | bytes:
    """What is for the GPU as it is, all of its pixels there; pixels (H, W, 3) of all else. Raises RefusedImage."""
    if (header := read_jpeg_header(data)) is None or not is_for_gpu(header, spec):
        return read_pixels(data, dataclasses.replace(spec, decode="full scale"), seen=seen)
    decode_pixels(data, at_least=1)
    return data


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

    def decode_batch(self, files: Sequence[bytes]) -> "torch.Tensor":
        """uint8 (n, H, W, 3) on the device, in the order of ``files``, queued on the current stream.

        Raises:
            RuntimeError: the decoder refuses one of ``files``; which, it does not say. torch.OutOfMemoryError.
        """
        import torch

        pixels = torch.empty((len(files), *self.spec.crop, 3), dtype=torch.uint8, device=self.device)
        with torch.inference_mode():
            for rows in _portions(files, self.at_once):
                # Of memory of their own: tensors of what cannot be written to make PyTorch warn.
                images = self.decode([torch.frombuffer(bytearray(files[row]), dtype=torch.uint8) for row in rows])
                alike: dict[tuple[int, ...], list[int]] = {}
                for place, image in enumerate(images):
                    alike.setdefault(tuple(image.shape), []).append(place)
                for places in alike.values():
                    for place, done in zip(places, self._resized([images[place] for place in places]), strict=True):
                        pixels[rows[place]] = done
        return pixels

    def _resized(self, images: "list[torch.Tensor]") -> "torch.Tensor":
        """n images uint8 (3, h, w) of one size -> uint8 (n, H, W, 3)."""
        import torch
        from torch.nn.functional import interpolate

        planes = torch.stack(images)
        size = self.spec.resized(*planes.shape[2:])
        if size != planes.shape[2:]:
            mode = self.spec.interpolation
            planes = interpolate(planes.float(), size, mode=mode, antialias=True, align_corners=False)
            planes = planes.round_().clamp_(0, 255)
        (top, left), (height, width) = cropped_at(size, self.spec), self.spec.crop
        return planes[:, :, top : top + height, left : left + width].to(torch.uint8).permute(0, 2, 3, 1)

    def read(self, data: bytes) -> Pixels:
        """As ``read_pixels``, of one file. Raises RefusedImage; otherwise as ``finish``."""
        found = read_for_gpu(data, self.spec)
        [pixels] = self._on_host([found]) if isinstance(found, bytes) else [found]
        if isinstance(pixels, str):
            raise RefusedImage(pixels)
        return pixels

    def finish(self, reads: Iterable[ReadImage[Pixels | bytes]]) -> list[ReadImage[Pixels]]:
        """``reads`` by ``read_for_gpu``, with pixels where it left bytes, or the reason why not.

        Raises:
            RuntimeError: the GPU failed, not an image. UsageError: its memory is too small for so many.
        """
        done = list(reads)
        left = [place for place, read in enumerate(done) if isinstance(read.value, bytes)]
        for place, pixels in zip(left, self._on_host([done[place].value for place in left]), strict=True):  # type: ignore[misc]
            refused = isinstance(pixels, str)
            done[place] = done[place]._replace(value=None if refused else pixels, reason=pixels if refused else "")  # type: ignore[arg-type]
        return done  # type: ignore[return-value]

    def _on_host(self, files: list[bytes]) -> list[Pixels | str]:
        """Pixels (H, W, 3), or why there are none, of each of ``files``."""
        import torch

        if not files:
            return []
        lanes = _lanes(self.device)
        lane = lanes.get()
        try:
            with lane:
                return list(self.decode_batch(files).cpu().numpy())
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"decoding {len(files)} images does not fit into {self.device}'s memory; halve --batch-size"
            ) from error
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError) or not _FAULTY.search(text := str(error).splitlines()[0]):
                raise
        finally:
            lanes.put(lane)
        if len(files) == 1:
            # Not decoded by the CPU instead: its pixels would be of the other kind, as this GPU or driver happens to be.
            return [f"not decoded by the GPU ({text}); --decode full decodes it on the CPU"]
        return [found for file in files for found in self._on_host([file])]


def _portions(files: Sequence[bytes], at_once: int) -> Iterator[list[int]]:
    """Positions of ``files`` that are decoded together, in order."""
    rows, whole = list[int](), 0
    for row, data in enumerate(files):
        header = read_jpeg_header(data)
        size = header.width * header.height if header else at_once
        if rows and whole + size > at_once:
            yield rows
            rows, whole = [], 0
        rows, whole = [*rows, row], whole + size
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
    return GpuJpegs(spec, device, nvjpeg(device)) if spec.decode == "gpu" else None


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
