"""What limits extraction, and what would help. In: rates that were measured, and with what. Out: sentences."""

import dataclasses
import math

from featcache.reports.throughput import SLICES, Rates
from featcache.system.device import Runtime

_SMALL = ("mobile", "squeeze", "shuffle", "mnas", "lite", "b0")  # in names of backbones that have no much faster ones


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was measured with, as far as it bears on advice.

    Attributes:
        runtime: workers, batch size and device. cores: that may be used. seconds: of measuring. backbone: its name.
        precision: in use. bf16: whether this CPU multiplies bfloat16.
        fast_decoder: whether JPEGs are decoded faster than by Pillow.
        edge, resize: median shorter edge of the images, and what the backbone takes it to, in pixels.
    """

    runtime: Runtime
    cores: int
    seconds: float
    backbone: str
    precision: str
    bf16: bool
    fast_decoder: bool
    edge: int
    resize: int


def advice(rates: Rates, setting: Setting) -> list[str]:
    """What limits, in numbers; what would help; what speaks against these rates. Sentences, the most important first."""
    remedies = [remedy for helps, remedy in _remedies(rates, setting) if helps]
    doubts = [doubt for applies, doubt in _doubts(rates, setting) if applies]
    what_helps = [f"What would help: {', or '.join(remedies)}."] if remedies else []
    return [_limit(rates, setting.runtime.workers), *what_helps, *doubts[:1]]


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


def _remedies(rates: Rates, s: Setting) -> list[tuple[bool, str]]:
    """(whether it would help, what to do), the most effective first."""
    decoding, backbone, cpu = rates.limit == "decode", rates.limit == "forward", s.runtime.device.type == "cpu"
    slow_cpu = backbone and cpu
    few, emulated = s.runtime.workers < s.cores, s.precision != "fp32" and not s.bf16
    there = f"{s.runtime.workers} for {s.cores} usable cores"
    edges = f"shorter edge {s.resize} pixels instead of {s.edge}: that is all the backbone sees"
    auto = "(--precision auto)"
    return [
        ((decoding or cpu) and few, f"more workers, of which there are {there} (--workers)"),
        ((decoding or cpu) and not few, "more CPU cores"),
        (decoding and not s.fast_decoder, "the fast decoder for JPEGs (pip install 'featcache[fast]')"),
        (decoding and s.edge > 1.5 * s.resize, f"smaller copies of the images ({edges})"),
        (slow_cpu, "a GPU"),
        (slow_cpu and emulated, f"float32, as this CPU only emulates {s.precision} {auto}"),
        (slow_cpu and not s.bf16 and not emulated, "a CPU with bf16 arithmetic"),
        (
            slow_cpu and s.bf16 and s.precision == "fp32",
            f"bf16, which this CPU multiplies, where it passes the self-check {auto}",
        ),
        (backbone and not any(part in s.backbone for part in _SMALL), "a smaller backbone (mobilenet_v3_large)"),
    ]


def _doubts(rates: Rates, s: Setting) -> list[tuple[bool, str]]:
    """(whether it applies, what speaks against the rates); the first that applies counts."""
    enough = math.ceil(SLICES * s.runtime.workers * s.runtime.batch_size / rates.end_to_end)
    rough = f"These rates are of a batch or two per worker, and rough; --seconds {enough} would make them certain."
    reached = (
        f"{rates.end_to_end:,.4g} images/s, {rates.efficiency:.0%} of the {rates.ceiling:,.4g} that both rates allow"
    )
    less = "something else (another process, a slow disk) takes the rest"
    more = "this machine was not quiet; measure again, with more --seconds"
    return [
        (s.seconds < enough, rough),
        (rates.efficiency < 0.8, f"But together they make {reached}: {less}."),
        (rates.efficiency > 1.1, f"But together they make {reached}: {more}."),
    ]
