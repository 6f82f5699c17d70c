"""How fast images are decoded, embedded and trained on, on this machine.

In: images, an encoder, a runtime, some seconds. Out: ``Rates`` in images per second. What is measured is the code that
``extract`` runs, ``backbones.embed`` and the encoder, with a stand-in for the one that is left out; and of training the steps of
``finetune``. Where the user gave no images, photographs are made.
"""

import contextlib
import dataclasses
import itertools
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.backbones.backbone import Backbone
from featcache.backbones.embed import EmbedsPixels, embed, sample_pixels
from featcache.backbones.encoder import Encoder
from featcache.backbones.ring import Change, Features, Lane
from featcache.errors import SourceError, UsageError
from featcache.finetuning.budget import seconds_per_step
from featcache.finetuning.micro_batches import images_at_once
from featcache.finetuning.network import with_new_head
from featcache.finetuning.pixels import decode_in_memory
from featcache.finetuning.recipes import Job, choose_recipe
from featcache.finetuning.trainer import Trainer, choose_training_precision
from featcache.finetuning.training_input import TrainingInput
from featcache.images.decode import Pixels
from featcache.images.fill import start_decoding
from featcache.images.source import ImageList, list_images
from featcache.system.device import Runtime, one_core_each
from featcache.system.distributed import Processes

_ROUNDS = 3
SLICES = 3 * _ROUNDS  # decode, forward, both
_AT_ONCE = 3  # batches with a device: uploaded, computed, downloaded
_FEW = 32  # images that a GPU's memory holds beside all else
_MOST_IMAGES = 200_000  # in one slice
_BATCH, _MOST_STEPS = 32, 10_000  # of training


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


def measure(images: ImageList, encoder: EmbedsPixels, runtime: Runtime, *, seconds: float) -> Rates:
    """Measure the rates of decoding, of the backbone, and of both.

    The three take turns, in slices, so that other programs disturb all alike; medians are returned. The images come in a
    random order, seeded, over and over: what fits into the system's file cache is read from there.

    Args:
        images: if one slice gets through all of them, the three rates are of the very same images.
        encoder, runtime: as ``extract`` would use them.
        seconds: for all slices together, at most 3,600. It takes longer where a batch takes longer than a slice.

    Raises:
        SourceError: not one of the images can be decoded. UsageError: impossible seconds.
    """
    if not 0 < seconds <= 3600:
        raise UsageError(f"the seconds to measure for must lie between 0 and 3600, found {seconds}")
    stopwatch = _Stopwatch(images, encoder, runtime)
    slices = {"decode": stopwatch.decode, "forward": stopwatch.forward, "end_to_end": stopwatch.end_to_end}
    # First calls allocate, build kernels, fill file caches; they also tell how long one batch takes.
    slowest = min(stopwatch.decode(seconds / 40), stopwatch.forward(seconds / 40))
    one_batch = runtime.workers * runtime.batch_size / slowest
    rounds = _ROUNDS if one_batch <= seconds / SLICES else 1
    each = seconds / (rounds * len(slices))
    found = [{name: rate(each) for name, rate in slices.items()} for _ in range(rounds)]
    medians = {name: statistics.median(rates[name] for rates in found) for name in slices}
    return Rates(**medians, shared=runtime.device.type == "cpu")


@dataclasses.dataclass(frozen=True)
class TrainingRate:
    """What was measured of training.

    Attributes:
        step: seconds of one step of ``batch_size`` images: augmentation, forward, backward, update.
        precision: as ``finetune`` chooses it on that device.
    """

    step: float
    batch_size: int
    precision: str

    @property
    def images_per_second(self) -> float:
        """Of training alone."""
        return self.batch_size / self.step


def measure_training(backbone: Backbone, images: ImageList, runtime: Runtime, *, seconds: float) -> TrainingRate:
    """Measure steps of the recipe ``default`` on the whole network, with a head of two classes; ``backbone`` stays as it is.

    Args:
        seconds: to measure for, at most 3,600; two steps take longer on a slow device.

    Raises:
        SourceError: not one of the images that it tries can be decoded.
    """
    rows = np.linspace(0, len(images) - 1, min(len(images), 2 * _BATCH)).round().astype(np.intp)
    found = decode_in_memory(images.take(rows), TrainingInput(backbone.preprocess), workers=runtime.workers)
    if not len(found):
        raise SourceError(f"not one image in {images.root} can be decoded, so that there is nothing to measure")
    repeated = np.arange(2 * _BATCH) % len(found)  # two whole batches, whatever there is
    pictures = [found.pictures[number] for number in repeated]
    data = dataclasses.replace(
        found, kept=np.arange(2 * _BATCH), pictures=pictures, labels=repeated.astype(np.int64) % 2
    )
    recipe = choose_recipe("default", len(data), batch_size=_BATCH, hidden=(), unfreeze="all")
    network = with_new_head(backbone, recipe, 2, seed=0).to(runtime.device)
    precision = choose_training_precision("auto", runtime.device)
    runtime = dataclasses.replace(runtime, batch_size=images_at_once(runtime, network.backbone))
    job = Job(images, Path(), "default", recipe, 0, precision, runtime, Processes())
    step = seconds_per_step(Trainer(network, data, recipe=recipe, job=job), seconds, steps=_MOST_STEPS)
    return TrainingRate(step, _BATCH, precision)


class _Clocked:
    """An encoder that notes when each worker starts, and when each of its batches ends.

    Rates count whole batches of one worker. Results of all workers arrive in bunches: counting them between two moments
    would be wrong by a batch per worker.
    """

    exact: EmbedsPixels | None = None  # forward may give no embeddings at all

    def __init__(self, encoder: EmbedsPixels, forward: Callable[[Pixels], npt.NDArray[np.float32]]) -> None:
        self.preprocess = encoder.preprocess
        self._encoder = encoder
        self._forward = forward
        self._times: dict[int, list[float]] = {}

    def new_buffer(self, batch_size: int) -> Pixels:
        """A worker asks for one before its first batch: its clock starts."""
        buffer = self._encoder.new_buffer(batch_size)
        self._times[threading.get_ident()] = [time.perf_counter()]
        return buffer

    def __call__(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        features = self._forward(pixels)
        self._times[threading.get_ident()].append(time.perf_counter())
        return features

    def rate(self, batch_size: int) -> float:
        """Images per second, summed over workers. Raises SourceError if there was no batch."""
        return _rate(list(self._times.values()), batch_size)


class _ClockedLane:
    """The same of a lane, where batches end one after the other. zeros: what comes instead of features that nothing computes."""

    def __init__(self, lane: Lane, zeros: Features | None = None) -> None:
        self._lane, self._zeros, self._times = lane, zeros, list[float]()
        self.batch_size, self.new_buffer, self.pinned = lane.batch_size, lane.new_buffer, lane.pinned

    def upload(self, pixels: Pixels, change: Change | None = None) -> Any:
        """As the lane's; likewise below. What the device decodes it decodes even if nothing is computed."""
        self._times = self._times or [time.perf_counter()]
        return self._lane.upload(pixels, change) if self._zeros is None or change else None

    def compute(self, uploaded: Any) -> Any:
        """As the lane's."""
        return self._lane.compute(uploaded) if self._zeros is None else None

    def download(self, computed: Any) -> Callable[[], Features]:
        """As the lane's."""
        zeros = self._zeros
        features = self._lane.download(computed) if zeros is None else lambda: zeros

        def wait() -> Features:
            found = features()
            self._times.append(time.perf_counter())
            return found

        return wait

    def rate(self, batch_size: int) -> float:
        """As ``_Clocked.rate``."""
        return _rate([self._times], batch_size)


def _rate(times: list[list[float]], batch_size: int) -> float:
    # The first batch of a thread finds its memory and caches cold.
    runs = [each[1:] if len(each) > 3 else each for each in times]
    rates = [batch_size * (len(each) - 1) / (each[-1] - each[0]) for each in runs if len(each) > 1]
    if not rates:
        raise SourceError("not one image could be decoded, so that there is nothing to measure")
    return sum(rates)


class _Stopwatch:
    """Measures three rates of the same encoder and runtime, on the same images."""

    def __init__(self, images: ImageList, encoder: EmbedsPixels, runtime: Runtime) -> None:
        self._lane = encoder.lane(runtime.batch_size) if isinstance(encoder, Encoder) else None
        batch_size = self._lane.batch_size if self._lane else runtime.batch_size
        sample = sample_pixels(images, encoder.preprocess, batch_size, device=runtime.device)
        if not len(sample):
            raise SourceError(f"not one image in {images.root} can be decoded, so that there is nothing to measure")
        self._images, self._encoder = images, encoder
        self._runtime = dataclasses.replace(runtime, batch_size=batch_size)
        self._pixels = np.resize(sample, (batch_size, *sample.shape[1:]))  # repeated to a whole batch
        some = self._pixels[:_FEW] if self._lane else self._pixels
        self._zeros = np.zeros((batch_size, encoder(some).shape[1]), np.float32)
        if self._lane and (processes := start_decoding(runtime.workers, _MOST_IMAGES)):
            processes.wait()
        self._order = np.random.default_rng(0).permutation(len(images))
        self._next = 0

    def decode(self, seconds: float) -> float:
        """``embed`` with a backbone that takes no time: images per second."""
        lane = _ClockedLane(self._lane, self._zeros) if self._lane else None
        return self._embed(_Clocked(self._encoder, lambda pixels: self._zeros), lane, seconds)

    def end_to_end(self, seconds: float) -> float:
        """``embed`` as it is: images per second."""
        lane = _ClockedLane(self._lane) if self._lane else None
        return self._embed(_Clocked(self._encoder, self._encoder), lane, seconds)

    def forward(self, seconds: float) -> float:
        """Every worker embeds its own full buffer again and again; or a lane a few, in turns: images per second."""
        if self._lane:
            with one_core_each(1, "featcache-worker") as pool:  # as a ring's feeder
                return pool.submit(self._forward_of, _ClockedLane(self._lane), seconds).result()
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

    def _forward_of(self, lane: _ClockedLane, seconds: float) -> float:
        buffers = [lane.new_buffer() for _ in range(_AT_ONCE)]
        for buffer in buffers:
            buffer[:] = self._pixels
        end, waiting = time.perf_counter() + seconds, deque[Callable[[], Features]]()
        for number in itertools.count():
            waiting.append(lane.download(lane.compute(lane.upload(buffers[number % _AT_ONCE]))))
            if len(waiting) == _AT_ONCE:
                waiting.popleft()()
            if number > _AT_ONCE and time.perf_counter() >= end:
                break
        rate = lane.rate(lane.batch_size)  # before the last ones, for which nothing makes way
        for wait in waiting:
            wait()
        return rate

    def _embed(self, clocked: _Clocked, lane: _ClockedLane | None, seconds: float) -> float:
        images = self._more_images(seconds)
        end = time.perf_counter() + seconds
        with contextlib.closing(embed(images, clocked, self._runtime, lane=lane)) as chunks:
            for chunk in chunks:
                self._next += len(chunk)
                if time.perf_counter() >= end:
                    break
        return (lane or clocked).rate(self._runtime.batch_size)

    def _more_images(self, seconds: float) -> ImageList:
        """More whole batches than a slice of ``seconds`` gets through, from where the last slice stopped."""
        batch, workers = self._runtime.batch_size, self._runtime.workers
        wanted = min(int(2000 * workers * seconds), _MOST_IMAGES)  # a core decodes some hundreds a second
        count = batch * max(math.ceil(wanted / batch), 4 * workers)
        return self._images.take(self._order[(self._next + np.arange(count)) % len(self._order)])


def generated_photos(folder: Path, count: int = 64) -> ImageList:
    """Write JPEGs that cost a decoder as much as photographs do. Every call writes the same ones.

    Args:
        folder: exists, and is empty.
        count: of files of 500x375 pixels and some 25 to 60 KB.
    """
    rng = np.random.default_rng(0)
    fine = _noise(rng, (1024, 768), 1) + _noise(rng, (1024, 768), 3)  # costly: each photo gets a part of the same
    for number in range(count):
        pixels = 128 + sum(_noise(rng, (500, 375), step) for step in (8, 20, 50, 125))
        left, top = (int(rng.integers(edge)) for edge in (1024 - 500, 768 - 375))
        pixels += rng.uniform(0.4, 1.6) * fine[top : top + 375, left : left + 500]  # some are smooth, some textured
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        picture.save(folder / f"{number:04d}.jpg", quality=90)
    return list_images(folder, labelled=False)


def _noise(rng: np.random.Generator, size: tuple[int, int], step: int) -> npt.NDArray[np.float32]:
    """Noise (height, width, 3) around 0, smooth over ``step`` pixels; the finer the fainter, as in natural images."""
    width, height = size
    coarse = (height // step + 2, width // step + 2)
    levels = 128 + 40 * rng.standard_normal((*coarse, 1), np.float32)
    levels = levels + 16 * rng.standard_normal((*coarse, 3), np.float32)
    layer = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return (np.asarray(layer, np.float32) - 128) * np.float32(step**0.5 / 14)
