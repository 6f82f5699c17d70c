"""What limits, and what would help: figures in, sentences out."""

import dataclasses
import math

from featcache.reports.throughput import SLICES, Rates

_SMALL = ("mobile", "squeeze", "shuffle", "mnas", "lite", "b0")  # in names of backbones that have no much faster ones


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
    enough = math.ceil(SLICES * setting.workers * setting.batch_size / rates.end_to_end)
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
