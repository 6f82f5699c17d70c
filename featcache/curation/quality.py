"""Images too dark, blurred, empty or tiny. In: what ``images.statistics`` measures of N images. Out: findings.

The rules are absolute, after cleanvision's (dark: the 99th percentile of brightness below 0.32; low information; blurred: few
edges), from the means and deviations that ``look_at`` has. Each is relative, too: what more than a tenth of a set has in common
is its way and no fault (cleanlab's Datalab draws the same line), be it digits of 8 pixels or photographs taken at night.
"""

import logging

import numpy as np

from featcache.curation.finding import Finding, Kind
from featcache.heads.head import Array, Indices
from featcache.images.statistics import LOOKS

log = logging.getLogger("featcache")
_TINY = 32  # pixels: what networks see as one to four of their last cells
_SMALL = 0.1  # of the median edge
_BLANK = 4.0  # grey levels, deviation of grey and colours: JPEG's noise on a plain surface has up to 3
_DARK = (
    0.32 * 255
)  # brightest parts: two standard deviations and a third above the mean, of 1 in 100 pixels if grey is normal
_BRIGHTEST = 2.33
# Variance of the Laplacian, by that of grey: 0.2 at the median of photographs, 0.02 at the first percentile; blurred by a
# Gaussian of 1.5 pixels at 256 pixels, most fall below (``benchmarks/LOG.md``). The quotient does not depend on exposure.
_BLURRED = 0.01
_MOST, _FEW = 0.1, 3  # of all images may have a fault, or so many of few


def find_poor_images(rows: Indices, looks: Array, edges: Array) -> list[Finding]:
    """Findings of kind tiny, blank, dark and blurred, the worst first within each; an image has the first of them alone.

    score: 1 - value / limit, so that 0 is just inside.

    Args:
        rows: (N,) numbers in the cache. looks: (N, 6), ``images.statistics.LOOKS``, NaN of what was not decoded.
        edges: (N,) shorter edges in pixels, NaN of what cannot be read.
    """
    look = {name: looks[:, column] for column, name in enumerate(LOOKS)}
    tint = 0.3 * np.hypot(look["redness"], look["yellowness"])  # what colourfulness has of a plain colour
    spread = np.hypot(look["contrast"], np.maximum(look["colourfulness"] - tint, 0))
    brightest = look["brightness"] + _BRIGHTEST * look["contrast"]
    variance = look["contrast"] ** 2
    sharp = np.divide(look["sharpness"], variance, out=np.full(len(rows), np.nan), where=variance > 0)
    known = edges[np.isfinite(edges)]
    smallest = max(_TINY, _SMALL * float(np.median(known))) if len(known) else _TINY
    rules: tuple[tuple[Kind, Array, float, str], ...] = (
        ("tiny", edges, smallest, "shorter edge {0:.0f} pixels, below {1:.0f}"),
        ("blank", spread, _BLANK, "one colour: it varies by {0:.1f} of 255 levels, below {1:.0f}"),
        ("dark", brightest, _DARK, "the brightest hundredth is at {0:.0f} of 255, below {1:.0f}"),
        ("blurred", sharp, _BLURRED, "sharpness {0:.4f} (variance of the Laplacian by that of grey), below {1:g}"),
    )
    found, taken = [], np.zeros(len(rows), bool)
    for kind, values, limit, words in rules:
        below = np.flatnonzero((values < limit) & ~taken)  # NaN is not
        if len(below) > max(_MOST * int(np.isfinite(values).sum()), _FEW):
            log.info("%d of %d images are %s: the way of this set, not a fault", len(below), len(rows), kind)
            continue
        taken[below] = True
        for place in below[np.argsort(values[below], kind="stable")].tolist():
            score = float(np.clip(1 - values[place] / limit, 0, 1))
            found.append(Finding(kind, int(rows[place]), score, words.format(values[place], limit)))
    return found
