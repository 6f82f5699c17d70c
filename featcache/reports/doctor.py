"""How fast images are decoded and embedded on this machine, which of the two limits, and what would help.

In: images, an encoder, a runtime, some seconds. Out: ``Rates`` in images per second, and sentences for the user. Every
rate is that of the code which ``extract`` runs, ``embedding.embed`` and the encoder, with a stand-in for what is left out.
"""

import contextlib
import dataclasses
import logging
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.backbones.embed import embed, sample_pixels
from featcache.backbones.encoder import Encoder, Precision, build_encoder
from featcache.errors import SourceError, UsageError
from featcache.extraction.request import ExtractRequest, load_requested
from featcache.images.decode import has_fast_decoder
from featcache.images.source import ImageList, RefusedImage, decode, list_images, read_image, strict_decoding
from featcache.system.device import Runtime, has_bf16_arithmetic, one_core_each, usable_cores

if TYPE_CHECKING:
    from featcache.backbones.load import Backbone

log = logging.getLogger("featcache")
Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]
_ROUNDS = 3
_SLICES = 3 * _ROUNDS  # decode, forward, both
_MOST_IMAGES = 200_000  # in one slice
_SMALL = ("mobile", "squeeze", "shuffle", "mnas", "lite", "b0")  # in names of backbones that have no much faster ones


@dataclasses.dataclass(frozen=True)
class Rates:
    """What was measured, in images per second of all workers together.

    Attributes:
        decode: reading, hashing, decoding, resizing, and nothing else.
        forward: the backbone on pixels that are there already.
        end_to_end: both, as ``extract`` does it.
        shared: whether both run on the same cores, as on a CPU; with a GPU they run side by side.
    """

    decode: float
    forward: float
    end_to_end: float
    shared: bool

    @property
    def ceiling(self) -> float:
        """The end-to-end rate if nothing came on top of decoding and the backbone, in images per second."""
        if self.shared:
            return 1 / (1 / self.decode + 1 / self.forward)
        return min(self.decode, self.forward)

    @property
    def efficiency(self) -> float:
        """The part of the ceiling that is reached, about 0 to 1."""
        return self.end_to_end / self.ceiling

    @property
    def limit(self) -> str:
        """``decode`` or ``forward``: the slower one, of which more speed would help most."""
        return "decode" if self.decode < self.forward else "forward"


def measure(images: ImageList, encoder: Encoder, runtime: Runtime, *, seconds: float) -> Rates:
    """Measure the rates of decoding, of the backbone, and of both.

    The three take turns, in slices, so that a machine which is not quiet disturbs all alike; medians are returned. The
    images come in a random order, seeded, over and over: what fits into the system's file cache is read from there.

    Args:
        images: of a list that one slice gets through, the three rates are of the very same images.
        encoder: as ``extract`` would use it; likewise ``runtime``.
        seconds: for all of it. It takes longer where a batch takes longer than a slice, a ninth of it.

    Raises:
        SourceError: not one of the images can be decoded. UsageError: impossible seconds.
    """
    if not 0 < seconds <= 3600:
        raise UsageError(f"the seconds to measure for must lie between 0 and 3600, found {seconds}")
    stand = _Stand(images, encoder, runtime)
    slices = {"decode": stand.decode, "forward": stand.forward, "end_to_end": stand.end_to_end}
    # First calls allocate, build kernels, fill file caches; they also tell how long one batch takes.
    slowest = min(stand.decode(seconds / 40), stand.forward(seconds / 40))
    one_batch = runtime.workers * runtime.batch_size / slowest
    rounds = _ROUNDS if one_batch <= seconds / _SLICES else 1
    found: dict[str, list[float]] = {name: [] for name in slices}
    for _ in range(rounds):
        for name, rate in slices.items():
            found[name].append(rate(seconds / (rounds * len(slices))))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    return Rates(**medians, shared=runtime.device.type == "cpu")


class _Clocked:
    """What ``embed`` takes for an encoder; notes when each worker starts and when it ends each batch.

    The rate is of each worker's own whole batches: the results of all arrive in bunches, and counting those between two
    moments would be wrong by a batch per worker.
    """

    def __init__(self, encoder: Encoder, forward: Callable[[Pixels], Features]) -> None:
        self.preprocess = encoder.preprocess
        self._encoder = encoder
        self._forward = forward
        self._times: dict[int, list[float]] = {}

    def new_buffer(self, batch_size: int) -> Pixels:
        """The first that a worker asks for."""
        buffer = self._encoder.new_buffer(batch_size)
        self._times[threading.get_ident()] = [time.perf_counter()]
        return buffer

    def __call__(self, pixels: Pixels) -> Features:
        features = self._forward(pixels)
        self._times[threading.get_ident()].append(time.perf_counter())
        return features

    def rate(self, batch_size: int) -> float:
        """Images per second, summed over workers. Raises SourceError if there was no batch."""
        total = 0.0
        for times in self._times.values():
            if len(times) > 3:
                times = times[1:]  # the first batch of a thread finds its memory and caches cold
            if len(times) > 1:
                total += batch_size * (len(times) - 1) / (times[-1] - times[0])
        if not total:
            raise SourceError("not one image could be decoded, so that there is nothing to measure")
        return total


class _Stand:
    """The three measurements, on the same images, encoder and runtime."""

    def __init__(self, images: ImageList, encoder: Encoder, runtime: Runtime) -> None:
        sample = sample_pixels(images, encoder.preprocess, runtime.batch_size)
        if not len(sample):
            raise SourceError(f"not one image in {images.root} can be decoded, so that there is nothing to measure")
        self._images, self._encoder, self._runtime = images, encoder, runtime
        self._pixels = np.resize(sample, (runtime.batch_size, *sample.shape[1:]))  # repeated to a whole batch
        self._zeros = np.zeros_like(encoder(self._pixels))
        self._order = np.random.default_rng(0).permutation(len(images))
        self._next = 0

    def decode(self, seconds: float) -> float:
        """``embed`` with a backbone that takes no time: images per second."""
        return self._embed(_Clocked(self._encoder, lambda pixels: self._zeros), seconds)

    def end_to_end(self, seconds: float) -> float:
        """``embed`` as it is: images per second."""
        return self._embed(_Clocked(self._encoder, self._encoder), seconds)

    def forward(self, seconds: float) -> float:
        """Every worker embeds its own full buffer again and again: images per second."""
        clocked = _Clocked(self._encoder, self._encoder)
        end = time.perf_counter() + seconds

        def work() -> None:
            buffer = clocked.new_buffer(self._runtime.batch_size)
            buffer[:] = self._pixels
            clocked(buffer)
            while time.perf_counter() < end:
                clocked(buffer)

        with one_core_each(self._runtime.workers, "featcache-worker") as pool:
            for job in [pool.submit(work) for _ in range(self._runtime.workers)]:
                job.result()
        return clocked.rate(self._runtime.batch_size)

    def _embed(self, clocked: _Clocked, seconds: float) -> float:
        images = self._more_images(seconds)
        end = time.perf_counter() + seconds
        with contextlib.closing(embed(images, cast("Encoder", clocked), self._runtime)) as chunks:
            for chunk in chunks:
                self._next += len(chunk.indices) + len(chunk.refused)
                if time.perf_counter() >= end:
                    break
        return clocked.rate(self._runtime.batch_size)

    def _more_images(self, seconds: float) -> ImageList:
        """Whole batches, more than a slice of so many seconds gets through, from where the last one stopped."""
        batch, workers = self._runtime.batch_size, self._runtime.workers
        wanted = min(int(2000 * workers * seconds), _MOST_IMAGES)  # a core decodes some hundreds a second
        count = batch * max(math.ceil(wanted / batch), 4 * workers)
        return self._images.take(self._order[(self._next + np.arange(count)) % len(self._order)])


# ------------------------------------------------------------------------------------------------------ photos


def generated_photos(folder: Path, count: int = 64) -> ImageList:
    """Write JPEGs that cost a decoder what photographs cost it, always the same ones.

    Args:
        folder: exists, and is empty.
        count: of files of 500x375 pixels and some 25 to 60 KB.
    """
    rng = np.random.default_rng(0)
    fine = _noise(rng, (1024, 768), 1) + _noise(
        rng, (1024, 768), 3
    )  # costly, so that each photo gets a part of the same
    for number in range(count):
        pixels = 128 + sum(_noise(rng, (500, 375), step) for step in (8, 20, 50, 125))
        left, top = (int(rng.integers(edge)) for edge in (1024 - 500, 768 - 375))
        pixels += rng.uniform(0.4, 1.6) * fine[top : top + 375, left : left + 500]  # some are smooth, some textured
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        picture.save(folder / f"{number:04d}.jpg", quality=90)
    return list_images(folder, labelled=False)


def _noise(rng: np.random.Generator, size: tuple[int, int], step: int) -> npt.NDArray[np.float32]:
    """(height, width, 3) around 0, smooth over ``step`` pixels; the finer the fainter, as in natural images."""
    width, height = size
    coarse = (height // step + 2, width // step + 2)
    levels = (
        128 + 40 * rng.standard_normal((*coarse, 1), np.float32) + 16 * rng.standard_normal((*coarse, 3), np.float32)
    )
    layer = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return (np.asarray(layer, np.float32) - 128) * np.float32(step**0.5 / 14)


# ------------------------------------------------------------------------------------------------------ advice


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was measured with, as far as it bears on advice.

    Attributes:
        device: cpu, cuda or mps. workers, cores: threads, and the cores they may use. backbone: its name.
        batch_size: images per forward pass. seconds: for which was measured.
        precision: in use. bf16: whether this CPU multiplies bfloat16.
        fast_decoder: whether JPEGs are decoded faster than by Pillow.
        edge, resize: median shorter edge of the images, and what the backbone takes it to, in pixels.
    """

    device: str
    workers: int
    cores: int
    batch_size: int
    seconds: float
    backbone: str
    precision: str
    bf16: bool
    fast_decoder: bool
    edge: int
    resize: int


def advice(rates: Rates, setting: Setting) -> list[str]:
    """What limits, in numbers, and what would help: sentences, the most important first."""
    sentences = [_what_limits(rates, setting)]
    remedies = _for_decoding(setting) if rates.limit == "decode" else _for_the_backbone(setting)
    if remedies:
        sentences.append(f"What would help: {', or '.join(remedies)}.")
    return sentences + _doubts(rates, setting)


def _doubts(rates: Rates, setting: Setting) -> list[str]:
    """What speaks against taking the rates as they are."""
    enough = math.ceil(_SLICES * setting.workers * setting.batch_size / rates.end_to_end)
    if setting.seconds < enough:
        return [f"These rates are of a batch or two per worker, and rough; --seconds {enough} would make them certain."]
    together = (
        f"together they make {rates.end_to_end:,.4g} images/s, {rates.efficiency:.0%} of the {rates.ceiling:,.4g}"
    )
    if rates.efficiency < 0.8:
        return [f"But {together} that both rates allow: something else (another process, a slow disk) takes the rest."]
    if rates.efficiency > 1.1:
        return [
            f"But {together} that both rates allow: this machine was not quiet; measure again, with more --seconds."
        ]
    return []


def _what_limits(rates: Rates, setting: Setting) -> str:
    cores = f"{setting.workers} worker{'s' if setting.workers > 1 else ''}"
    decode, forward = f"{rates.decode:,.4g}", f"{rates.forward:,.4g}"
    if not rates.shared and rates.limit == "decode":
        return f"Decoding limits: {cores} decode {decode} images/s, while the GPU could embed {forward}."
    if not rates.shared:
        return f"The backbone limits: the GPU embeds {forward} images/s, while {cores} could decode {decode}."
    name, rest = ("Decoding", "the backbone") if rates.limit == "decode" else ("The backbone", "decoding")
    part = rates.ceiling / min(rates.decode, rates.forward)
    return (
        f"{name} limits: it takes {part:.0%} of the time of {cores}, {rest} {1 - part:.0%} "
        f"(decoding alone {decode} images/s, the backbone alone {forward})."
    )


def _for_decoding(setting: Setting) -> list[str]:
    remedies = [_more_workers(setting) or "more CPU cores"]
    if not setting.fast_decoder:
        remedies.append("the fast decoder for JPEGs (pip install 'featcache[fast]')")
    if setting.edge > 1.5 * setting.resize:
        remedies.append(
            f"smaller copies of the images (shorter edge {setting.resize} pixels instead of {setting.edge}: that is all "
            "the backbone sees)"
        )
    return remedies


def _for_the_backbone(setting: Setting) -> list[str]:
    remedies = []
    if setting.device == "cpu":
        remedies += [_more_workers(setting) or "more CPU cores", "a GPU"]
        if not setting.bf16 and setting.precision != "fp32":
            remedies.append(f"float32, as this CPU only emulates {setting.precision} (--precision auto)")
        elif not setting.bf16:
            remedies.append("a CPU with bf16 arithmetic")
        elif setting.precision == "fp32":
            remedies.append("bf16, which this CPU multiplies, where it passes the self-check (--precision auto)")
    if not any(part in setting.backbone for part in _SMALL):
        remedies.append("a smaller backbone (mobilenet_v3_large)")
    return remedies


def _more_workers(setting: Setting) -> str | None:
    if setting.workers >= setting.cores:
        return None
    return f"more workers, of which there are {setting.workers} for {setting.cores} usable cores (--workers)"


# ---------------------------------------------------------------------------------------------------- check-up


def check_up(
    images: ImageList | None,
    runtime: Runtime,
    *,
    backbone: str = "resnet50",
    weights: str | None = None,
    precision: str = "auto",
    seconds: float = 20.0,
) -> dict[str, Any]:
    """Measure as ``extract`` would run, and advise.

    Args:
        images: to decode; generated photos when None.
        runtime: where to compute.
        backbone, precision: as in ``ExtractRequest``; likewise ``weights``, random ones (a model's own) when None.
        seconds: of measuring, after everything is loaded.

    Returns:
        Plain values: rates in images per second, precision and self-check, ``advice`` (sentences).

    Raises:
        SourceError: no usable image. BackboneError, ModelError: backbone or weights. UsageError: impossible values.
    """
    asked = ExtractRequest(backbone=backbone, weights=weights or "auto", precision=precision)
    model = asked.model()
    request = asked if weights or model else dataclasses.replace(asked, weights="none")
    loaded = load_requested(request, model)
    with contextlib.ExitStack() as stack:
        if images is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="featcache-"))
            found, source = generated_photos(Path(folder)), "generated photos, for want of --images"
        else:
            found, source = images, str(images.root)
        sample = sample_pixels(found, loaded.preprocess, min(runtime.batch_size, 32))
        if not len(sample):
            raise SourceError(f"not one of {len(found)} images in {source} can be decoded")
        wanted = request.resolved(model).precision if model else precision
        encoder, choice = build_encoder(loaded, runtime, sample, precision=cast("Precision", wanted))
        log.info("measuring for about %g s", seconds)
        rates = measure(found, encoder, runtime, seconds=seconds)
        edge = _median_edge(found)
    facts = {
        "backbone": loaded.name,
        "weights": loaded.weights,
        "source": source,
        "images": len(found),
        "median_shorter_edge": edge,
        **_rounded(rates),
        "precision": choice.precision,
        "precision_reason": choice.reason,
        "self_check": {
            form: {name: value if value is None else round(value, 8) for name, value in figures.items()}
            for form, figures in choice.tried.items()
        },
    }
    if request.weights == "none":
        facts["note"] = "random weights are as fast as trained ones, but the self-check's cosines are not those of them"
    return facts | {"advice": advice(rates, _setting(loaded, runtime, choice.precision, edge, seconds))}


def _rounded(rates: Rates) -> dict[str, Any]:
    values = ("decode", "forward", "end_to_end", "ceiling", "efficiency")
    return {**{name: float(f"{getattr(rates, name):.4g}") for name in values}, "limit": rates.limit}


def _setting(backbone: "Backbone", runtime: Runtime, precision: str, edge: int, seconds: float) -> Setting:
    resize = backbone.preprocess.resize
    return Setting(
        device=runtime.device.type,
        workers=runtime.workers,
        cores=usable_cores(),
        batch_size=runtime.batch_size,
        seconds=seconds,
        backbone=backbone.name,
        precision=precision,
        bf16=has_bf16_arithmetic(),
        fast_decoder=has_fast_decoder(),
        edge=edge,
        resize=resize if isinstance(resize, int) else max(resize),
    )


def _median_edge(images: ImageList, count: int = 15) -> int:
    """Median shorter edge in pixels, of some images spread over the list; one at least can be decoded."""
    rows = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.intp)
    edges = []
    with strict_decoding():
        for row in rows:
            with contextlib.suppress(RefusedImage):
                edges.append(min(decode(read_image(images.root / images.paths[row])[0]).size))
    return int(statistics.median(edges)) if edges else 0
