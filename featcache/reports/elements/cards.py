"""Pictures with what is known of them. In: rows of predictions, or of a listing. Out: cards of a page, and its data for the script."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from featcache.reports.elements.charts import top_bars
from featcache.reports.elements.numbers import percent_text
from featcache.system.display import printable

STATUSES = ("ok", "unsure", "refused")
LIKELIEST = 5  # classes that a card shows


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A training image near to the card's: path, label, cosine similarity -1..1, and its picture as a data URI, if any."""

    path: str
    similarity: float
    label: str | None = None
    thumbnail: str | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """One image.

    Attributes:
        path: as the user would type it, exactly; surrogate escapes where it is no UTF-8.
        thumbnail: a data URI, see ``thumbnails.Thumbnail.uri``; None: there is none, and ``no_thumbnail`` says why.
        label: the true class; None: not known. predicted: the most probable class; None: no prediction, or refused.
        probabilities: (class, 0..1), the most probable first; the first ``LIKELIEST`` are shown.
        status: one of ``STATUSES``. reason: of a refusal or a doubt.
        split: train, val or test; empty: none, or of no interest here.
        evidence: training images near to it, the most similar first.
        unfamiliarity: the share of training images that are nearer to their neighbours than this one, 0..1; None: not asked for.
        note: what else is to be said, a few words: "darkest", "also under train/bees".
    """

    path: str
    thumbnail: str | None = None
    no_thumbnail: str = ""
    label: str | None = None
    predicted: str | None = None
    probabilities: tuple[tuple[str, float], ...] = ()
    status: str = "ok"
    reason: str = ""
    split: str = ""
    evidence: tuple[Evidence, ...] = ()
    unfamiliarity: float | None = None
    note: str = ""

    @property
    def file(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1] or self.path

    @property
    def outcome(self) -> str:
        """``right`` or ``wrong`` where label and prediction are known; ``refused``; else empty."""
        if self.status == "refused":
            return "refused"
        if self.label is None or self.predicted is None:
            return ""
        return "right" if self.label == self.predicted else "wrong"

    @property
    def probability(self) -> float | None:
        """Of ``predicted``."""
        return self.probabilities[0][1] if self.probabilities else None

    @property
    def second(self) -> tuple[str, float] | None:
        """The second answer."""
        return self.probabilities[1] if len(self.probabilities) > 1 else None

    @property
    def words(self) -> str:
        """All of it that matters, for who does not see the picture."""
        parts = [self.file]
        if self.outcome == "refused":
            parts.append(f"refused: {self.reason}")
        elif self.predicted is not None:
            truth = f"{self.label} taken for " if self.outcome == "wrong" else ""
            sure = "" if self.probability is None else f", {percent_text(self.probability, 0)}"
            parts.append(f"{truth}{self.predicted}{sure}")
        elif self.label is not None:
            parts.append(self.label)
        return printable(", ".join(parts))

    @property
    def bars(self) -> Markup:
        """The likeliest classes as tiny bars; empty if there are none."""
        return top_bars([share for _, share in self.probabilities[:LIKELIEST]]) if self.probabilities else Markup()


def cards_data(cards: Sequence[Card], classes: Sequence[str] = ()) -> dict[str, Any]:
    """What the script needs to know of the cards of a page, a column for each property; missing columns are those all empty.

    Args:
        classes: names in the order in which numbers stand for them; those that only cards name follow.

    Returns:
        ``classes``; ``path``; ``label`` and ``predicted`` (numbers, -1: none); ``correct`` (1, 0, -1: not known); ``status``
        (number among ``STATUSES``); ``split``; ``probability``, ``margin`` (to the second answer) and ``unfamiliarity``, -1 for
        none; ``top``
        (class, probability in ten-thousandths, class, ...); ``reason``, ``note``; ``evidence`` (path, label, similarity,
        number among ``pictures``); ``pictures`` (data URIs, each once). Predicates of ``data-select`` name these columns.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(classes))}

    def number(name: str | None) -> int:
        return -1 if name is None else numbers.setdefault(name, len(numbers))

    pictures: dict[str, int] = {}
    columns: dict[str, list[Any]] = {
        "path": [card.path for card in cards],
        "label": [number(card.label) for card in cards],
        "predicted": [number(card.predicted) for card in cards],
        "correct": [{"right": 1, "wrong": 0}.get(card.outcome, -1) for card in cards],
        "status": [STATUSES.index(card.status) for card in cards],
        "split": [card.split for card in cards],
        "probability": [-1 if card.probability is None else round(card.probability, 6) for card in cards],
        "margin": [_margin(card) for card in cards],
        "unfamiliarity": [-1 if card.unfamiliarity is None else round(card.unfamiliarity, 4) for card in cards],
        "top": [
            _flat((number(name), round(10_000 * p)) for name, p in card.probabilities[:LIKELIEST]) for card in cards
        ],
        "reason": [card.reason or ("" if card.thumbnail else card.no_thumbnail) for card in cards],
        "note": [card.note for card in cards],
        "evidence": [[_evidence(entry, number(entry.label), pictures) for entry in card.evidence] for card in cards],
    }
    kept = {
        name: column
        for name, column in columns.items()
        if name == "path" or any(value not in (-1, "", []) for value in column)
    }
    return {"classes": list(numbers), "statuses": STATUSES, "pictures": list(pictures), **kept}


def card_sorts(columns: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Ways to sort cards that have these columns: keys of the script, and their words."""
    ways = [("order", "as listed", "path"), ("path", "path", "path"), ("label", "label", "label")]
    ways += [("predicted", "prediction", "predicted"), ("-probability", "surest first", "probability")]
    ways += [
        ("probability", "least probable first", "probability"),
        ("margin", "two answers near each other first", "margin"),
        ("-unfamiliarity", "least like the training images first", "unfamiliarity"),
    ]
    return [(key, word) for key, word, column in ways if column in columns]


def card_filters(columns: Mapping[str, Any]) -> list[tuple[str, str, list[tuple[Any, str, int]]]]:
    """Columns to filter by, where there is a choice: name, word, and (value, words, number of cards) for each choice."""
    classes = columns["classes"]
    names = {"label": ("Label", {**dict(enumerate(classes)), -1: "(no label)"})}
    names["predicted"] = ("Prediction", {**dict(enumerate(classes)), -1: "(none)"})
    names["correct"] = ("Outcome", {0: "wrong", 1: "right", -1: "not known"})
    names["status"] = ("Status", dict(enumerate(STATUSES)))
    names["split"] = ("Split", {split: split for split in columns.get("split", ())})
    found = []
    for column, (word, texts) in names.items():
        counts = Counter(columns.get(column, ()))
        if len(counts) > 1:
            found.append(
                (column, word, [(value, text, counts[value]) for value, text in texts.items() if counts[value]])
            )
    return found


def _margin(card: Card) -> float:
    if card.probability is None:
        return -1
    return round(card.probability - (card.second[1] if card.second else 0.0), 6)


def _flat(pairs: Iterable[tuple[int, int]]) -> list[int]:
    return [value for pair in pairs for value in pair]


def _evidence(entry: Evidence, label: int, pictures: dict[str, int]) -> list[Any]:
    picture = -1 if entry.thumbnail is None else pictures.setdefault(entry.thumbnail, len(pictures))
    return [entry.path, label, round(entry.similarity, 4), picture]
