"""Numbers as people read them: on axes, in tables, in sentences. In: numbers. Out: short texts, and ticks at round values."""

import math
from collections.abc import Sequence

NONE = "–"


def percent_text(share: float | None, digits: int = 1) -> str:
    """0.9346 as ``93.5%``; never 100% or 0% for what is not quite that."""
    if share is None or not math.isfinite(share):
        return NONE
    text = f"{share:.{digits}%}"
    if share < 1 and text == f"{1:.{digits}%}":
        return f">{1 - 10.0 ** -(digits + 2):.{digits}%}"
    if share > 0 and text == f"{0:.{digits}%}":
        return f"<{10.0 ** -(digits + 2):.{digits}%}"
    return text


def count_text(count: float | None) -> str:
    """12345 as ``12,345``."""
    return NONE if count is None else f"{count:,.0f}"


def number_text(value: float | None, digits: int = 3) -> str:
    """To ``digits`` digits that count: 0.01234 as ``0.0123``, 1234567 as ``1,234,567``, 1e-7 as ``1e-7``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value and not 1e-4 <= abs(value) < 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_without_zeros(mantissa)}e{int(exponent)}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return _without_zeros(f"{value:.{places}f}")


def bytes_text(size: float | None) -> str:
    """1234567 as ``1.23 MB``."""
    if size is None:
        return NONE
    power, unit = next(
        ((p, unit) for p, unit in ((9, "GB"), (6, "MB"), (3, "kB")) if size >= 0.9995 * 10**p), (0, "bytes")
    )
    return f"{number_text(size / 10**power)} {unit}"


def round_ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within ``low``..``high``, about ``about`` of them."""
    if not low < high:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float, *, most: int = 7) -> list[float]:
    """Powers of ten within ``low``..``high``, with 2 and 5 between them where there is room; at least two values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found if len(found) > 1 else [low, high]
    return found[:: math.ceil(len(found) / most)]


def tick_texts(ticks: Sequence[float], *, percent: bool = False) -> list[str]:
    """All with the same number of decimals, as few as tell them apart."""
    values = [100 * tick for tick in ticks] if percent else list(ticks)
    sign = "%" if percent else ""
    if any(value and (abs(value) < 1e-3 or abs(value) >= 1e6) for value in values):
        return [number_text(value, 2) + sign for value in values]
    places = max((len(f"{value:.4f}".rstrip("0").split(".")[1]) for value in values), default=0)
    return [f"{value:,.{places}f}{sign}" for value in values]


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
