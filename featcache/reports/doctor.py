"""``doctor``: measure as ``extract`` would run, say what limits, and advise."""

import contextlib
import dataclasses
import logging
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from featcache.backbones.embedder import Embedder
from featcache.backbones.encoder import Precision
from featcache.errors import SourceError
from featcache.extraction.request import ExtractRequest, load_requested
from featcache.images.decode import decode, has_fast_decoder
from featcache.images.read import read_images
from featcache.images.source import ImageList
from featcache.reports.advice import Setting, advice
from featcache.reports.throughput import Rates, generated_photos, measure
from featcache.system.device import Runtime, has_bf16_arithmetic, usable_cores

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone

log = logging.getLogger("featcache")


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
    saved = asked.saved()
    request = asked if weights or saved else dataclasses.replace(asked, weights="none")
    loaded = load_requested(request, saved)
    with contextlib.ExitStack() as stack:
        if images is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="featcache-"))
            found, source = generated_photos(Path(folder)), "generated photos, for want of --images"
        else:
            found, source = images, str(images.root)
        wanted = request.resolved(saved).precision if saved else precision
        embedder = Embedder.prepare(loaded, runtime, found, precision=cast("Precision", wanted))
        if not len(embedder.sample):
            raise SourceError(f"not one of {len(found)} images in {source} can be decoded")
        log.info("measuring for about %g s", seconds)
        rates = measure(found, embedder.encoder, runtime, seconds=seconds)
        edge = _median_edge(found)
    choice = embedder.choice
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
    reads = read_images(images, rows.tolist(), lambda data: min(decode(data).size))
    edges = [read.value for read in reads if read.value is not None]
    return int(statistics.median(edges)) if edges else 0
