"""Near copies: rows that show the same picture, edited. In: nearest neighbours, digests, pixels. Out: findings and groups."""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from featcache.cache.copies import first_copies
from featcache.curation.finding import Finding
from featcache.curation.neighbours import Nearest
from featcache.curation.pixel_check import PixelCheck
from featcache.heads.head import Indices

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class NearCopies:
    """What was found among N rows.

    Attributes:
        findings: one for each row of a group that holds more than one content; groups are numbered from 0.
        groups: (N,) a number per place in ``Nearest.rows``: rows of one group of copies, exact or near, share it, others have
            their own. Numbered from 0 in the order of the rows.
        threshold: the cosine similarity from which pairs were candidates. candidates: how many pairs were compared.
        checked: how many of them by their pixels.
    """

    findings: list[Finding]
    groups: Indices
    threshold: float
    candidates: int
    checked: int


def find_near_copies(
    nearest: Nearest,
    digests: npt.NDArray[np.uint8],
    *,
    check: PixelCheck | None = None,
    progress: Progress | None = None,
) -> NearCopies:
    """Find rows that show the same picture.

    Args:
        nearest: of N rows. digests: (M, 32) of all rows of the cache. check: compares pixels; None: there are none.
        progress: called with pairs compared and pairs to compare.
    """
    first = first_copies(digests[nearest.rows])
    threshold = _threshold(nearest)
    places = np.repeat(np.arange(len(nearest.rows)), nearest.k)
    pairs = first[np.stack([places, nearest.places.ravel()], axis=1)]
    similarities = nearest.similarities.ravel()
    wanted = (similarities >= threshold) & (pairs[:, 0] != pairs[:, 1])
    pairs, index = np.unique(np.sort(pairs[wanted], axis=1), axis=0, return_index=True)
    similarities = similarities[wanted][index]
    agreement = np.full(len(pairs), np.nan)
    if check is not None:
        agreement = check.agreements(nearest.rows[pairs], progress=progress)
    same = np.where(np.isnan(agreement), similarities >= 0.97, agreement >= 0.9)
    groups = _complete_link(first, pairs[same], np.where(np.isnan(agreement), similarities, agreement)[same])
    findings = _findings(nearest.rows, first, groups, pairs[same], agreement[same], similarities[same])
    return NearCopies(findings, groups, threshold, len(pairs), int((~np.isnan(agreement)).sum()))


def _threshold(nearest: Nearest) -> float:
    """Median of the similarities to the nearest plus their robust deviation."""
    best = nearest.similarities[:, 0].astype(np.float64)
    middle = float(np.median(best))
    return middle + 1.4826 * float(np.median(np.abs(best - middle)))


def _complete_link(first: Indices, pairs: Indices, scores: npt.NDArray[np.float64]) -> Indices:
    """(N,) group numbers: pairs join by falling score, if every pair of the two groups' contents is among ``pairs``."""
    linked: dict[int, set[int]] = {}
    for one, other in pairs.tolist():
        linked.setdefault(one, set()).add(other)
        linked.setdefault(other, set()).add(one)
    home = {place: {place} for place in linked}
    for number in np.lexsort((pairs[:, 1], pairs[:, 0], -scores)).tolist():
        one, other = home[int(pairs[number, 0])], home[int(pairs[number, 1])]
        if one is not other and all(other <= linked[place] for place in one):
            one |= other
            home |= dict.fromkeys(other, one)
    leader = np.arange(len(first))
    for place, members in home.items():
        leader[place] = min(members)
    return np.unique(leader[first], return_inverse=True)[1]


def _findings(
    rows: Indices,
    first: Indices,
    groups: Indices,
    pairs: Indices,
    agreement: npt.NDArray[np.float64],
    similarities: npt.NDArray[np.float32],
) -> list[Finding]:
    best: dict[int, tuple[float, int, int]] = {}  # content -> score, the other content, the pair
    for number, (one, other) in enumerate(pairs.tolist()):
        if groups[one] == groups[other]:
            score = float(similarities[number] if np.isnan(agreement[number]) else agreement[number])
            for here, there in ((one, other), (other, one)):
                best[here] = max(best.get(here, (-1.0, -1, -1)), (score, there, number), key=lambda found: found[0])
    numbers = {group: number for number, group in enumerate(sorted({int(groups[place]) for place in best}))}
    findings = []
    for place, content in enumerate(first.tolist()):
        if content in best:
            score, other, number = best[content]
            seen = not np.isnan(agreement[number])
            reason = f"embeddings agree to {similarities[number]:.3f}"
            if seen:
                reason = f"pixels agree to {agreement[number]:.2f} once aligned, {reason}"
            findings.append(
                Finding(
                    "near_copy",
                    int(rows[place]),
                    min(max(score, 0.0), 1.0),
                    reason,
                    group=numbers[int(groups[place])],
                    verified=seen or None,
                    other=int(rows[other]),
                )
            )
    return findings
