"""Near copies: rows that show the same picture, edited. In: nearest neighbours, digests, pixels. Out: findings and groups.

Method: neighbours propose, pixels decide (``pixel_check.py``). No similarity of embeddings means the same in two sets, so every
bar is the set's own: a pair is a candidate if it is among the three nearest of either row and nearer than the k-th neighbours of
half of the rows are; pictures are the same if they agree more than unrelated pictures of this set could. Without pixels a pair
counts if it is about three times as near as the tenth neighbours of both.
Groups are complete-link: each picture of one agrees with each other one, so that no chain of frames becomes one group.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from featcache.cache.copies import first_copies
from featcache.curation.finding import Finding
from featcache.curation.neighbours import Nearest
from featcache.curation.pixel_check import PixelCheck
from featcache.heads.head import Indices

_RANKS = 3  # nearest other contents: an edited copy was the nearest of one of the two rows in all of 280 planted pairs
_LOCAL, _NEARER = 10, 0.35  # without pixels: distance as a share of that to the tenth neighbour
_SAME, _SAME_AT_MOST = 0.65, 0.999  # agreement: most edited copies reach 0.9, other photographs 0.58 at most
_UNRELATED, _DEVIATIONS = 200, 8.0  # random pairs, and how many robust deviations beyond their median a copy has to be
_CLOSED = 50  # pictures in a group whose pairs are all compared
Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class NearCopies:
    """What was found among N rows.

    Attributes:
        findings: one for each row whose picture another content shows. ``group`` is numbered from 0; None: a copy of ``other``,
            but not of all of the group of that. ``score``: the agreement of pixels, or of embeddings where ``verified`` is None.
        groups: (N,) a number per place in ``Nearest.rows``: rows of one group of copies, exact or near, share it, others have
            their own. Numbered from 0 in the order of the rows.
        threshold: the cosine similarity from which pairs were candidates. candidates: how many pairs were compared.
        checked: how many of them by their pixels. agreement: of pixels, from which two pictures are the same; NaN: none were read.
    """

    findings: list[Finding]
    groups: Indices
    threshold: float
    candidates: int
    checked: int
    agreement: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs:
    """P pairs: (P, 2) places of their contents, the first is the smaller; (P,) the rest."""

    places: Indices
    similarities: Floats
    nearness: Floats  # distance as a share of that to the tenth neighbour, the larger of the two rows
    agreement: Floats  # NaN: not known
    mirrored: npt.NDArray[np.bool_]

    def where(self, chosen: npt.NDArray[np.bool_]) -> "_Pairs":
        return _Pairs(*(value[chosen] for value in vars(self).values()))

    def __add__(self, other: "_Pairs") -> "_Pairs":
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Pairs(*(np.concatenate(pair) for pair in both))


def find_near_copies(
    nearest: Nearest,
    digests: npt.NDArray[np.uint8],
    *,
    check: PixelCheck | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> NearCopies:
    """Find rows that show the same picture.

    Args:
        nearest: of N rows. digests: (M, 32) of all rows of the cache. check: compares pixels; None: there are none.
        seed: draws unrelated pairs. progress: called with pairs compared and pairs to compare; what it raises ends the search.
    """
    first = first_copies(digests[nearest.rows])
    threshold = float(np.median(nearest.similarities[:, -1])) if nearest.k else 1.0
    pairs = _candidates(nearest, first, threshold)
    bar, count = np.nan, len(pairs.places)
    if check is not None and count:
        pairs = _compared(pairs, nearest.rows, check, progress)
        if not np.isnan(pairs.agreement).all():
            bar = _bar(check, nearest.rows, first, pairs.places, seed)
    same = pairs.where(_are_same(pairs, bar))
    linked = same
    if check is not None and (missing := _missing(same.places)).size:
        more = _compared(_unknown(missing, nearest, first), nearest.rows, check, progress)
        count += len(missing)
        # Of two copies of one picture, whose edits add up, a little less is asked.
        linked, same = same + more.where(more.agreement >= bar - 0.15), same + more.where(more.agreement >= bar)
    groups = _complete_link(first, linked)
    checked = int((~np.isnan(pairs.agreement)).sum()) + count - len(pairs.places)
    return NearCopies(_findings(nearest.rows, first, groups, linked), groups, threshold, count, checked, float(bar))


def _candidates(nearest: Nearest, first: Indices, threshold: float) -> _Pairs:
    """The nearest other contents of each row, each pair once, in the order of the rows."""
    n, k = nearest.places.shape
    others = first[nearest.places]
    differs = others != first[:, None]
    chosen = differs & (np.cumsum(differs, axis=1) <= _RANKS) & (nearest.similarities >= threshold)
    own = 1 - nearest.similarities[:, min(_LOCAL, k) - 1].astype(np.float64) if k else np.ones(n)
    here = np.repeat(np.arange(n), k).reshape(n, k)[chosen]
    places = np.sort(np.stack([first[here], others[chosen]], axis=1), axis=1)
    places, index = np.unique(places, axis=0, return_index=True)
    similarities = nearest.similarities[chosen].astype(np.float64)[index]
    nearness = (1 - similarities) / np.maximum(np.minimum(own[places[:, 0]], own[places[:, 1]]), 1e-6)
    return _Pairs(places, similarities, nearness, np.full(len(places), np.nan), np.zeros(len(places), np.bool_))


def _unknown(places: Indices, nearest: Nearest, first: Indices) -> _Pairs:
    """Pairs that are no candidates; their similarity is that of neighbours if they are, else NaN."""
    found = [
        next(iter(nearest.similarities[one][first[nearest.places[one]] == other]), np.nan)
        for one, other in places.tolist()
    ]
    nothing = np.full(len(places), np.nan)
    return _Pairs(places, np.array(found, np.float64), nothing, nothing, np.zeros(len(places), np.bool_))


def _compared(pairs: _Pairs, rows: Indices, check: PixelCheck, progress: Progress | None) -> _Pairs:
    agreement, mirrored = check.compare(rows[pairs.places], progress=progress)
    return dataclasses.replace(pairs, agreement=agreement, mirrored=mirrored)


def _bar(check: PixelCheck, rows: Indices, first: Indices, candidates: Indices, seed: int) -> float:
    """The agreement from which two pictures are the same: far above that of random pairs of the set, by Fisher's z."""
    contents = np.unique(first)
    drawn = np.sort(np.random.default_rng(seed).choice(contents, (_UNRELATED, 2)), axis=1)
    n = len(first)
    known = np.isin(drawn[:, 0] * n + drawn[:, 1], candidates[:, 0] * n + candidates[:, 1])
    found = check.compare(rows[drawn[~known & (drawn[:, 0] != drawn[:, 1])]], thorough=True).agreement
    z = np.arctanh(np.minimum(found[~np.isnan(found)], _SAME_AT_MOST))
    if len(z) < 20:
        return _SAME
    middle = np.median(z)
    spread = 1.4826 * np.median(np.abs(z - middle))
    return float(np.clip(np.tanh(middle + _DEVIATIONS * spread), _SAME, _SAME_AT_MOST))


def _are_same(pairs: _Pairs, bar: float) -> npt.NDArray[np.bool_]:
    return np.where(np.isnan(pairs.agreement), pairs.nearness <= _NEARER, pairs.agreement >= bar)


def _linked(places: Indices) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for one, other in places.tolist():
        found.setdefault(one, set()).add(other)
        found.setdefault(other, set()).add(one)
    return found


def _missing(places: Indices) -> Indices:
    """(Q, 2) pairs that nobody proposed, of contents that are copies by way of others."""
    linked, seen, missing = _linked(places), set[int](), list[tuple[int, int]]()
    for start in linked:
        members, pending = set[int](), [] if start in seen else [start]
        while pending:
            members.add(place := pending.pop())
            pending += linked[place] - members
        seen |= members
        if len(members) <= _CLOSED:
            missing += [
                (one, other) for one in sorted(members) for other in sorted(members - linked[one]) if one < other
            ]
    return np.array(missing, np.intp).reshape(-1, 2)


def _complete_link(first: Indices, pairs: _Pairs) -> Indices:
    """(N,) group numbers: groups join by falling agreement, if every content of one agrees with every one of the other."""
    linked = _linked(pairs.places)
    home = {place: {place} for place in linked}
    scores = _scores(pairs)
    for number in np.lexsort((pairs.places[:, 1], pairs.places[:, 0], -scores)).tolist():
        one, other = (home[place] for place in pairs.places[number].tolist())
        if one is not other and all(other <= linked[place] for place in one):
            one |= other
            home |= dict.fromkeys(other, one)
    leader = np.arange(len(first))
    for place, members in home.items():
        leader[place] = min(members)
    return np.unique(leader[first], return_inverse=True)[1].reshape(-1)


def _scores(pairs: _Pairs) -> Floats:
    return np.where(np.isnan(pairs.agreement), pairs.similarities, pairs.agreement).clip(0, 1)


def _findings(rows: Indices, first: Indices, groups: Indices, pairs: _Pairs) -> list[Finding]:
    scores, best = _scores(pairs), dict[int, tuple[bool, float, int]]()  # of each content, in its group first
    together = groups[pairs.places[:, 0]] == groups[pairs.places[:, 1]]
    for number, (one, other) in enumerate(pairs.places.tolist()):
        for place in (one, other):
            best[place] = max(
                best.get(place, (False, -1.0, 0)), (bool(together[number]), float(scores[number]), -number)
            )
    several = dict.fromkeys(sorted(int(groups[place]) for place, found in best.items() if found[0]))
    numbers = {group: number for number, group in enumerate(several)}
    findings = []
    for place, content in enumerate(first.tolist()):
        if content in best:
            in_group, score, number = best[content]
            one, other = pairs.places[-number].tolist()
            findings.append(
                Finding(
                    "near_copy",
                    int(rows[place]),
                    score,
                    _reason(pairs, -number),
                    group=numbers[int(groups[content])] if in_group else None,
                    verified=None if np.isnan(pairs.agreement[-number]) else True,
                    other=int(rows[other if one == content else one]),
                )
            )
    return findings


def _reason(pairs: _Pairs, number: int) -> str:
    similarity, agreement = pairs.similarities[number], pairs.agreement[number]
    if np.isnan(agreement):
        share = pairs.nearness[number]
        return (
            f"embeddings agree to {similarity:.3f}, {share:.0%} as far as the tenth neighbour; no pixels were compared"
        )
    what = f"the same picture{', mirrored' if pairs.mirrored[number] else ''}: pixels agree to {agreement:.2f} once aligned"
    return what if np.isnan(similarity) else f"{what}, embeddings to {similarity:.3f}"
