"""Images unlike their class, and images that belong to no class. In: neighbours and labels. Out: findings."""

from featcache.curation.finding import Finding
from featcache.curation.neighbours import Nearest
from featcache.heads.head import Array, Indices


def find_outliers(nearest: Nearest, y: Array, *, groups: Indices | None = None) -> list[Finding]:
    """Rows far from their neighbours, compared with the rows of their class."""
    return []


def find_off_topic(nearest: Nearest, y: Array, *, groups: Indices | None = None) -> list[Finding]:
    """Rows far from every class."""
    return []
