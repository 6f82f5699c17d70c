"""``doctor``: what this machine can do, how fast it embeds, and what limits.

In: what ``extract`` would be given, and some seconds. Out: plain values for people and programs.
"""

import contextlib
import dataclasses
import logging
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from featcache.backbones.backbone import Backbone
from featcache.backbones.embedder import Embedder
from featcache.backbones.encoder import Precision
from featcache.errors import SourceError
from featcache.extraction.request import DEFAULT_BACKBONE, ExtractRequest, load_requested
from featcache.images.decode import decode, fast_jpeg
from featcache.images.read import read_images
from featcache.images.source import ImageList, list_images
from featcache.reports.advice import Setting, advice
from featcache.reports.machine import machine
from featcache.reports.photos import generated_photos
from featcache.reports.throughput import Rates, measure
from featcache.system.device import Runtime, choose_runtime, has_bf16_arithmetic, usable_cores

log = logging.getLogger("featcache")


def doctor(
    images: str | Path | None = None,
    *,
    backbone: str = DEFAULT_BACKBONE,
    weights: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    seconds: float = 20.0,
) -> dict[str, Any]:
    """Show what this machine and installation can do, and measure how fast ``extract`` would run here.

    Args:
        images: folder or CSV to decode; generated photos when None.
        backbone, precision: as in ``ExtractRequest``; likewise ``weights``, random ones (a model's own) when None.
        device, workers, batch_size: as in ``extract``.
        seconds: of measuring, after everything is loaded; 0: do not measure.

    Returns:
        Facts (``machine``), and under ``measured`` rates in images per second, precision and self-check, and ``advice``:
        what limits and what would help, in sentences.

    Raises:
        SourceError: no usable image. BackboneError, ModelError: backbone or weights. UsageError: impossible values.
    """
    request = ExtractRequest(backbone=backbone, weights=weights or "auto", precision=precision)
    given = list_images(Path(images), labelled=False) if images is not None else None
    runtime = choose_runtime(device, workers=workers, batch_size=batch_size)
    facts = machine(runtime)
    if not seconds:
        return facts
    saved = request.saved()
    random_weights = weights is None and saved is None
    loaded = load_requested(dataclasses.replace(request, weights="none") if random_weights else request, saved)
    precision = (request.resolved(saved) if saved else request).precision
    with _given_or_generated(given) as (found, source):
        measured = {
            "backbone": loaded.name,
            "weights": loaded.weights,
            "source": source,
            "images": len(found),
            **_measure(found, loaded, runtime, precision=precision, seconds=seconds),
        }
    if random_weights:
        measured["note"] = (
            "random weights are as fast as trained ones, but the self-check's cosines are not those of them"
        )
    return facts | {"measured": measured}


@contextlib.contextmanager
def _given_or_generated(given: ImageList | None) -> Iterator[tuple[ImageList, str]]:
    """Images to measure with, and where they are from."""
    if given is not None:
        yield given, str(given.root)
        return
    with tempfile.TemporaryDirectory(prefix="featcache-") as folder:
        yield generated_photos(Path(folder)), "generated photos, for want of --images"


def _measure(
    images: ImageList, backbone: Backbone, runtime: Runtime, *, precision: str, seconds: float
) -> dict[str, Any]:
    embedder = Embedder.prepare(backbone, images, runtime=runtime, precision=cast("Precision", precision))
    if not len(embedder.sample):
        raise SourceError(f"not one of {len(images)} images in {images.root} can be decoded")
    log.info("measuring for about %g s", seconds)
    rates, choice = measure(images, embedder.encoder, runtime, seconds=seconds), embedder.choice
    edge, resize = _median_edge(images), backbone.preprocess.resize
    setting = Setting(
        runtime=runtime,
        cores=usable_cores(),
        seconds=seconds,
        backbone=backbone.name,
        precision=choice.precision,
        bf16=has_bf16_arithmetic(),
        fast_decoder=fast_jpeg() is not None,
        edge=edge,
        resize=resize if isinstance(resize, int) else max(resize),
    )
    return {
        "median_shorter_edge": edge,
        **_rounded(rates),
        "precision": choice.precision,
        "precision_reason": choice.reason,
        "self_check": {
            form: {name: value if value is None else round(value, 8) for name, value in figures.items()}
            for form, figures in choice.tried.items()
        },
        "advice": advice(rates, setting),
    }


def _rounded(rates: Rates) -> dict[str, Any]:
    values = ("decode", "forward", "end_to_end", "ceiling", "efficiency")
    return {**{name: float(f"{getattr(rates, name):.4g}") for name in values}, "limit": rates.limit}


def _median_edge(images: ImageList, count: int = 15) -> int:
    """Median shorter edge in pixels, of some images spread over the list; one at least can be decoded."""
    rows = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.intp)
    reads = read_images(images, rows.tolist(), lambda data: min(decode(data).size))
    edges = [read.value for read in reads if read.value is not None]
    return int(statistics.median(edges)) if edges else 0
