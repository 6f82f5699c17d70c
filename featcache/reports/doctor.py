"""``doctor``: what this machine can do, how fast it embeds and trains, what limits, and what would help.

In: what ``extract`` would be given, and some seconds. Out: plain values for people and programs; advice in sentences.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from featcache.backbones.backbone import Backbone
from featcache.backbones.choice import AUTO, choose_backbone
from featcache.backbones.embedder import Embedder
from featcache.backbones.encoder import Precision
from featcache.errors import SourceError, UsageError
from featcache.extraction.request import ExtractRequest, load_requested
from featcache.images.decode import decode, fast_jpeg
from featcache.images.read import read_images
from featcache.images.source import ImageList, list_images
from featcache.reports.backbones import columns
from featcache.reports.machine import device_name, device_names, machine
from featcache.reports.throughput import SLICES, Rates, TrainingRate, generated_photos, measure, measure_training
from featcache.system.device import Runtime, choose_runtime, has_bf16_arithmetic
from featcache.system.path_advice import HERE, check_path
from featcache.system.path_kinds import AnyPath
from featcache.system.runtime_options import check_runtime_options, usable_cores

log = logging.getLogger("featcache")
_RATES = ("decode", "forward", "end_to_end", "ceiling", "efficiency")
_COLUMNS = {"decode": "decode", "forward": "backbone", "end_to_end": "extract", "train": "train"}
_SMALL = ("mobile", "squeeze", "shuffle", "mnas", "lite", "b0")  # in names of backbones that have no much faster ones


def doctor(
    images: AnyPath | None = None,
    *,
    backbone: str = AUTO,
    weights: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    seconds: float = 20.0,
    train: bool = False,
) -> dict[str, Any]:
    """Show what this machine and installation can do, and measure how fast ``extract`` would run here.

    Args:
        images: folder or CSV to decode; generated photos when None.
        backbone, precision: as in ``ExtractRequest`` for a new cache; likewise ``weights``, random ones (a model's own) when None.
        device, workers, batch_size: as in ``extract``.
        seconds: of measuring, after everything is loaded; 0: do not measure.
        train: measure steps of ``finetune``, too, for as long again; where no device is asked for, on the CPU and on every GPU.

    Returns:
        Facts (``machine``), and under ``measured`` rates in images per second, precision and self-check, and ``advice``:
        what limits and what would help, in sentences. With ``train``, under ``devices`` a row per device, see ``table_lines``.

    Raises:
        SourceError: no usable image. BackboneError, ModelError: backbone or weights. UsageError: impossible values.
    """
    if train and not seconds:
        raise UsageError("--train measures, and --seconds 0 does not; leave one of them out")
    check_runtime_options(device, workers=workers, batch_size=batch_size)
    request = ExtractRequest(backbone=backbone, weights=weights or "auto", precision=precision)
    request.check_paths()
    if weights != "none":
        request.check_named()
    if images is not None:
        check_path(images, "images", ("doctor", "--images", HERE))
    given = list_images(images, labelled=False) if images is not None else None
    if given is not None:
        given.check_any()
    runtime = choose_runtime(device, workers=workers, batch_size=batch_size)
    facts = machine(runtime)
    if not seconds:
        return facts
    if request.backbone == AUTO:
        name = choose_backbone(runtime.device.type, download=weights == AUTO)
        request = dataclasses.replace(request, backbone=name)
    saved = request.saved()
    random_weights = weights is None and saved is None
    loaded = load_requested(dataclasses.replace(request, weights="none") if random_weights else request, saved)
    precision = (request.resolved(saved.spec) if saved else request).precision
    runtimes = [runtime]
    if train and device == "auto":
        runtimes = [choose_runtime(name, workers=workers, batch_size=batch_size) for name in device_names()]
    with contextlib.ExitStack() as stack:
        source = str(given.root) if given is not None else "generated photos, for want of --images"
        if given is None:
            given = generated_photos(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="featcache-"))))
        measure_with = functools.partial(_measure, loaded, images=given, precision=precision, seconds=seconds)
        rows = [(each, measure_with(runtime=each, source=source)) for each in runtimes]
        measured = next(found for each, found in rows if each.device.type == runtime.device.type)
        if train:
            trained = [measure_training(loaded, given, each, seconds=seconds) for each in runtimes]
            facts["devices"] = [_row(each, found, rate) for (each, found), rate in zip(rows, trained, strict=True)]
    if random_weights:
        measured["note"] = (
            "random weights are as fast as trained ones, but the self-check's cosines are not those of them"
        )
    return facts | {"measured": measured}


def _row(runtime: Runtime, measured: dict[str, Any], training: TrainingRate) -> dict[str, Any]:
    """A device's rates in images per second; ``train_step`` in seconds."""
    return {
        "device": str(runtime.device),
        "name": device_name(runtime.device),
        **{name: measured[name] for name in ("decode", "forward", "end_to_end", "precision")},
        "train": float(f"{training.images_per_second:.4g}"),
        "train_step": float(f"{training.step:.4g}"),
        "train_batch_size": training.batch_size,
        "train_precision": training.precision,
    }


def table_lines(devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows under ``devices`` as a table: rates in images per second, and how long a step of training takes."""
    cells = [["images/s", *_COLUMNS.values(), "step"]]
    for row in devices:
        rates = [f"{row[name]:,.4g}" for name in _COLUMNS]
        cells.append(
            [
                f"{row['device']}, {row['precision']}, training {row['train_precision']}",
                *rates,
                f"{row['train_step']:.3g} s",
            ]
        )
    sizes = {row["train_batch_size"] for row in devices}
    step = f"step: augmentation, forward, backward and update on {', '.join(map(str, sizes))} images, recipe default"
    return [
        *columns(cells, "<" + ">" * (len(cells[0]) - 1)),
        *(f"{row['device']}: {row['name']}" for row in devices),
        step,
    ]


def _measure(
    backbone: Backbone, *, runtime: Runtime, images: ImageList, source: str, precision: str, seconds: float
) -> dict[str, Any]:
    embedder = Embedder.prepare(backbone, images, runtime=runtime, precision=cast("Precision", precision))
    if not len(embedder.sample):
        raise SourceError(f"not one of the images in {images.root} can be decoded, of {len(images):,}")
    log.info("measuring on %s for about %g s", runtime.device, seconds)
    rates, choice = measure(images, embedder.encoder, runtime, seconds=seconds), embedder.choice
    edge, here = _median_edge(images), Abilities(usable_cores(), has_bf16_arithmetic(), fast_jpeg() is not None)
    return {
        "backbone": backbone.name,
        "weights": backbone.weights,
        "source": source,
        "images": len(images),
        "median_shorter_edge": edge,
        **{name: float(f"{getattr(rates, name):.4g}") for name in _RATES},
        "limit": rates.limit,
        "precision": choice.precision,
        "precision_reason": choice.reason,
        "self_check": {
            form: {name: value if value is None else round(value, 8) for name, value in figures.items()}
            for form, figures in choice.tried.items()
        },
        "advice": advice(rates, embedder, here, seconds=seconds, edge=edge),
    }


def _median_edge(images: ImageList, count: int = 15) -> int:
    """Median shorter edge in pixels, of some images spread over the list; one at least can be decoded."""
    rows = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.intp)
    reads = read_images(images, rows.tolist(), lambda data: min(decode(data).size))
    edges = [read.value for read in reads if read.value is not None]
    return int(statistics.median(edges)) if edges else 0


class Abilities(NamedTuple):
    """What the machine can do: usable cores, whether it multiplies bf16, whether JPEGs are decoded fast."""

    cores: int
    bf16: bool
    fast_decoder: bool


def advice(rates: Rates, embedder: Embedder, here: Abilities, *, seconds: float, edge: int) -> list[str]:
    """What limits, in numbers; what would help; what speaks against these rates. Sentences, the most important first.

    Args:
        rates: of ``embedder``, measured in ``seconds``. edge: median shorter edge of the images in pixels.
    """
    remedies = [remedy for helps, remedy in _remedies(rates, embedder, here, edge) if helps]
    doubts = [doubt for applies, doubt in _doubts(rates, embedder.runtime, seconds) if applies]
    what_helps = [f"What would help: {', or '.join(remedies)}."] if remedies else []
    return [_limit(rates, embedder.runtime.workers), *what_helps, *doubts[:1]]


def _limit(rates: Rates, workers: int) -> str:
    cores = f"{workers} worker{'s' if workers > 1 else ''}"
    decode, forward = f"{rates.decode:,.4g}", f"{rates.forward:,.4g}"
    decoding, part = rates.limit == "decode", rates.ceiling / min(rates.decode, rates.forward)
    if rates.shared:
        name, rest = ("Decoding", "the backbone") if decoding else ("The backbone", "decoding")
        shares = f"it takes {part:.0%} of the time of {cores}, {rest} {1 - part:.0%}"
        return f"{name} limits: {shares} (decoding alone {decode} images/s, the backbone alone {forward})."
    if decoding:
        return f"Decoding limits: {cores} decode {decode} images/s, while the GPU could embed {forward}."
    return f"The backbone limits: the GPU embeds {forward} images/s, while {cores} could decode {decode}."


def _remedies(rates: Rates, embedder: Embedder, here: Abilities, edge: int) -> list[tuple[bool, str]]:
    """(whether it would help, what to do), the most effective first."""
    workers, cores, name = embedder.runtime.workers, here.cores, embedder.backbone.name
    precision, bf16 = embedder.choice.precision, here.bf16
    size = embedder.backbone.preprocess.resize
    resize = size if isinstance(size, int) else max(size)
    decoding, backbone, cpu = rates.limit == "decode", rates.limit == "forward", embedder.runtime.device.type == "cpu"
    slow_cpu, few, emulated = backbone and cpu, workers < cores, precision != "fp32" and not bf16
    edges = f"shorter edge {resize} pixels instead of {edge}: that is all the backbone sees"
    auto = "(--precision auto)"
    return [
        ((decoding or cpu) and few, f"more workers, of which there are {workers} for {cores} usable cores (--workers)"),
        ((decoding or cpu) and not few, "more CPU cores"),
        (decoding and not here.fast_decoder, "the fast decoder for JPEGs (pip install 'featcache[fast]')"),
        (decoding and edge > 1.5 * resize, f"smaller copies of the images ({edges})"),
        (slow_cpu, "a GPU"),
        (slow_cpu and emulated, f"float32, as this CPU only emulates {precision} {auto}"),
        (slow_cpu and not bf16 and not emulated, "a CPU with bf16 arithmetic"),
        (
            slow_cpu and bf16 and precision == "fp32",
            f"bf16, which this CPU multiplies, where it passes the self-check {auto}",
        ),
        (backbone and not any(part in name for part in _SMALL), "a smaller backbone (mobilenet_v3_large)"),
    ]


def _doubts(rates: Rates, runtime: Runtime, seconds: float) -> list[tuple[bool, str]]:
    """(whether it applies, what speaks against the rates); the first that applies counts."""
    enough = math.ceil(SLICES * runtime.workers * runtime.batch_size / rates.end_to_end)
    rough = f"These rates are of a batch or two per worker, and rough; --seconds {enough} would make them certain."
    reached = (
        f"{rates.end_to_end:,.4g} images/s, {rates.efficiency:.0%} of the {rates.ceiling:,.4g} that both rates allow"
    )
    less = "something else (another process, a slow disk) takes the rest"
    more = "this machine was not quiet; measure again, with more --seconds"
    return [
        (seconds < enough, rough),
        (rates.efficiency < 0.8, f"But together they make {reached}: {less}."),
        (rates.efficiency > 1.1, f"But together they make {reached}: {more}."),
    ]
