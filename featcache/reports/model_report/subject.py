"""What a report is about. In: a model, scored rows, pictures. Out: a ``Subject``: scores, and the cards of the page.

All parts of a report are made from one ``Subject``; rows are those of ``Subject.scored``, cards are those that the page shows.
"""

import dataclasses
from typing import Any

import numpy as np

from featcache.cache.cache import FeatureCache
from featcache.cache.format import decode_names, encode_names, find
from featcache.errors import SourceError
from featcache.heads.head import Array, Indices
from featcache.heads.neighbours import Neighbours
from featcache.models.evaluate import scores_of
from featcache.models.limits import UNFAMILIAR, Limits, rows_that_trained
from featcache.models.model import Model
from featcache.models.prediction import EVIDENCE
from featcache.models.scoring import HELD_OUT, Scored
from featcache.reports.elements.cards import LIKELIEST, Card, Evidence
from featcache.reports.elements.pictures import Pictures
from featcache.spec import SPLITS

ALL_SHOWN = 1500  # rows up to which every one is a card
MOST_MISTAKES = 4000  # that are cards, the most confident first
_SAMPLE = 1000  # cards of right answers, of more rows: half the least sure, half drawn evenly from the classes
# Bytes of cards' pictures and of evidence: at most, and for each card; as text they take a third more. A thousand cards then
# make a page of 4 MB with pictures of 128 pixels, ten thousand rows one of at most 15 MB.
_PICTURES, _PICTURES_EACH = 6_500_000, 2_100
_EVIDENCE_PICTURES, _EVIDENCE_EACH = 1_000_000, 350
_EVIDENCE_SIZE = 64  # pixels
_FEW = 400  # cards that get the budget of so many
# Cosines that are computed for evidence, times the length of embeddings: some seconds on two cores, and half a second.
_PRODUCTS, _QUICK_PRODUCTS = 4 * 10**11, 10**10


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What a report is about.

    Attributes:
        model, scored: what was scored on what; ``scored.rows`` are rows of ``cache``, if not None.
        scores: as ``evaluate`` returns. seen: (N,) whether training has seen the row; None: not known, or of held-out
            rows, whose scores are of heads that have not.
        cache: the cache that was given, or belongs to the training; None: there is none.
        cards: of the page, in order. rows: (number of cards,) the row of each in ``scored``; -1: it was refused.
        pictures: where pictures come from. quick: whether what takes longer than a second is left out.
    """

    model: Model
    scored: Scored
    scores: dict[str, Any]
    seen: Array | None
    cache: FeatureCache | None
    cards: tuple[Card, ...]
    rows: Indices
    pictures: Pictures
    quick: bool = False

    @property
    def predicted(self) -> Array:
        """(N,) the most probable class of each row."""
        found: Array = self.scored.answers.predicted
        return found

    @property
    def card_of(self) -> dict[int, int]:
        """row -> number of its card, of those that have one."""
        return {row: card for card, row in enumerate(self.rows.tolist()) if row >= 0}


def make_subject(
    model: Model,
    scored: Scored,
    *,
    cache: FeatureCache | None = None,
    evidence: FeatureCache | None = None,
    pictures: Pictures,
    quick: bool = False,
) -> Subject:
    """Score, choose cards, and find their pictures.

    Args:
        cache: what ``scored.rows`` are rows of. evidence: a cache of training images; None: those of ``cache``, if it holds any.
    """
    known = None if scored.split == HELD_OUT else model.training_rows()
    seen = None if known is None else known.contain(scored.digests)
    scores = scores_of(model, scored, Limits(model.classes), seen=seen)
    rows = choose_rows(scored)
    nearest = _nearest(model, scored, rows, cache=cache, evidence=evidence or cache, quick=quick)
    cards, order = _cards(model, scored, rows, cache=cache, nearest=nearest, pictures=pictures)
    return Subject(model, scored, scores, seen, cache, cards, order, pictures, quick)


def choose_rows(scored: Scored) -> Indices:
    """Rows that become cards: mistakes, the most confident first, then right answers, the least sure first."""
    sure, right = scored.answers.confidence, scored.answers.right
    right, wrong = np.flatnonzero(right), np.flatnonzero(~right)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:MOST_MISTAKES]
    right = right[np.argsort(sure[right], kind="stable")]
    if len(scored) > ALL_SHOWN:
        least, others = right[: _SAMPLE // 2], right[_SAMPLE // 2 :]
        drawn = drawn_evenly(others, scored.y[others], _SAMPLE - len(least))
        right = np.concatenate([least, drawn])
    return np.concatenate([wrong, right])


def drawn_evenly(rows: Indices, labels: Array, most: int, *, seed: int = 0) -> Indices:
    """``most`` of the rows, drawn at random, about as many of each class; in their order."""
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    labels = labels[shuffled]
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.empty(len(rows), np.intp)  # a row's place among those of its class
    turn[by_class] = np.arange(len(rows)) - np.repeat(starts, counts)
    drawn: Indices = rows[np.sort(shuffled[np.argsort(turn, kind="stable")[:most]])]
    return drawn


def _nearest(
    model: Model,
    scored: Scored,
    rows: Indices,
    *,
    cache: FeatureCache | None,
    evidence: FeatureCache | None,
    quick: bool,
) -> dict[int, list[tuple[Evidence, bytes]]]:
    """row -> the training images nearest to it, and their digests; of those rows for which they are known or soon found."""
    if evidence is None:
        return {}

    def described(place: int, similarity: float) -> tuple[Evidence, bytes]:
        (path,), label = decode_names(evidence.rows.paths[place : place + 1]), int(evidence.y[place])
        name = evidence.classes[label] if label >= 0 else None
        return Evidence(path, similarity, name), evidence.rows.digests[place].tobytes()

    known = {row: scored.found[row]["nearest"] for row in rows.tolist() if "nearest" in scored.found[row]}
    if known or cache is None or scored.rows is None:
        pairs = [(row, near) for row, found in known.items() for near in found]
        places = find(evidence.rows.paths, encode_names(near.path for _, near in pairs)).tolist()
        described_of: dict[int, list[tuple[Evidence, bytes]]] = {row: [] for row in known}
        for (row, near), place in zip(pairs, places, strict=True):
            described_of[row].append(described(place, near.similarity))
        return described_of
    try:
        trained = rows_that_trained(model, evidence)
    except SourceError:  # none of its images did
        return {}
    wrong = rows[~scored.answers.right[rows]]
    affordable = (_QUICK_PRODUCTS if quick else _PRODUCTS) // max(len(trained) * evidence.dim, 1)
    wanted = next((some for some in (rows, wrong) if len(some) <= affordable), rows[:0])
    if len(trained) < 2 or not len(wanted):
        return {}
    neighbours = Neighbours(evidence.X, trained)
    nearest, similarities = neighbours.nearest(cache.take(scored.rows[wanted]), count=EVIDENCE + 1)
    found = {}
    for row, near, similar in zip(wanted.tolist(), trained[nearest].tolist(), similarities.tolist(), strict=True):
        own = scored.digests[row].tobytes()
        there = [described(k, value) for k, value in zip(near, similar, strict=True)]
        found[row] = [pair for pair in there if pair[1] != own][:EVIDENCE]  # an image is no evidence for itself
    return found


def _cards(
    model: Model,
    scored: Scored,
    rows: Indices,
    *,
    cache: FeatureCache | None,
    nearest: dict[int, list[tuple[Evidence, bytes]]],
    pictures: Pictures,
) -> tuple[tuple[Card, ...], Indices]:
    """Cards of ``rows``, mistakes first, then of what was refused, then right answers; and the row of each."""
    digests = [digest.tobytes() for digest in scored.digests[rows]]
    inside = scored.relative(rows)  # the folder of the pictures
    inside = tuple(name or pictures.path_of(digest) or "" for name, digest in zip(inside, digests, strict=True))
    typed = scored.paths(rows)
    budget = min(_PICTURES, _PICTURES_EACH * max(len(rows), _FEW))
    small = pictures.thumbnails(inside, digests, budget=budget)
    with_pictures = _with_pictures(nearest, rows, pictures)
    splits = [""] * len(rows)
    if cache is not None and scored.rows is not None:
        splits = ["" if not split else SPLITS[split] for split in cache.rows.splits[scored.rows[rows]].tolist()]
    probabilities = scored.probabilities[rows]
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :LIKELIEST]
    cards = []
    for place, row in enumerate(rows.tolist()):
        shares = probabilities[place]
        strange = scored.found[row].get("unfamiliarity", 0) > UNFAMILIAR
        cards.append(
            Card(
                typed[place] or inside[place] or f"sha256 {digests[place].hex()[:16]}",
                small[place].uri,
                small[place].reason,
                model.classes[scored.y[row]],
                model.classes[top[place, 0]],
                tuple((model.classes[k], float(shares[k])) for k in top[place].tolist()),
                "unsure" if strange else "ok",
                "unlike the training images" if strange else "",
                splits[place],
                with_pictures.get(row, ()),
            )
        )
    wrong = int((~scored.answers.right[rows]).sum())
    refused = [
        Card(
            path if scored.root is None else str(scored.root / path),
            label=None if label is None else model.classes[label],
            status="refused",
            reason=reason,
        )
        for (path, reason), label in scored.refused
    ]
    order = np.concatenate([rows[:wrong], np.full(len(refused), -1), rows[wrong:]]).astype(np.intp)
    return (*cards[:wrong], *refused, *cards[wrong:]), order


def _with_pictures(
    nearest: dict[int, list[tuple[Evidence, bytes]]], rows: Indices, pictures: Pictures
) -> dict[int, tuple[Evidence, ...]]:
    """Evidence with thumbnails, each made once: for the first rows as far as they fit."""
    wanted: dict[bytes, str] = {}
    for row in rows.tolist():
        for near, digest in nearest.get(row, ()):
            wanted.setdefault(digest, near.path)
    if pictures.root is None:
        made: dict[bytes, str | None] = {}
    else:
        small = pictures.thumbnails(
            list(wanted.values()),
            list(wanted),
            budget=min(_EVIDENCE_PICTURES, _EVIDENCE_EACH * max(len(rows), _FEW)),
            size=_EVIDENCE_SIZE,
        )
        made = {digest: one.uri for digest, one in zip(wanted, small, strict=True)}
    return {
        row: tuple(dataclasses.replace(near, thumbnail=made.get(digest)) for near, digest in found)
        for row, found in nearest.items()
    }
