"""Images too dark, blurred, empty or tiny. In: what ``images.statistics`` measures. Out: findings."""

from featcache.curation.finding import Finding
from featcache.heads.head import Array, Indices


def find_poor_images(rows: Indices, looks: Array, edges: Array) -> list[Finding]:
    """Findings of kind dark, blurred, blank, tiny; an image has one of them at most.

    Args:
        rows: (N,) numbers in the cache. looks: (N, 6), ``images.statistics.LOOKS``, NaN of what was not decoded.
        edges: (N,) shorter edges in pixels, NaN of what cannot be read.
    """
    return []
