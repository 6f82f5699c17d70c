"""The page of a gallery. In: a ``Draw`` that has seen all predictions. Out: HTML, with pictures as far as they fit."""

import dataclasses
import datetime
import importlib.metadata
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from featcache.cache.cache import FeatureCache
from featcache.images.in_memory import Held
from featcache.images.read import Paths
from featcache.images.records import STDIN
from featcache.models.limits import UNFAMILIAR
from featcache.reports.elements.cards import Card, Evidence, cards_data
from featcache.reports.elements.charts import Chart, histogram, share_bar
from featcache.reports.elements.numbers import NONE, count_text, percent_text
from featcache.reports.elements.page import render_page
from featcache.reports.elements.pictures import Pictures, guess_root
from featcache.reports.elements.thumbnails import Thumbnail, fitting_size, thumbnails
from featcache.reports.gallery import BINS, Draw, Row
from featcache.system.display import quantity
from featcache.system.path_advice import typed

_FULL, _BARS = 400, 2000  # cards up to which bars carry the names of their classes, and are drawn at all
_PAGE, _ALL, _EACH = 3_800_000, 1000, 1200  # bytes of a page of up to so many images, and of each one more
_TEXT, _BAR, _TEXT_FULL = (
    600,
    220,
    1900,
)  # bytes of a card without its picture and path; of its bars; with bars and names
_OF_EVIDENCE = 0.2  # of the bytes of all pictures
_FOUR_THIRDS = 4 / 3  # base64
_LARGE, _BYTES_OF_LARGE = 256, 7000  # pixels and bytes of a picture where there are few
_SMALL, _LEAST = 96, 64  # pixels, of the pictures of evidence; of any: smaller ones show nothing
_MOST_PAIRS = 30
_NONE = Thumbnail(None, "no picture")


def gallery_page(
    draw: Draw, *, pictures: Path | None = None, seconds: float | None = None, budget: int | None = None
) -> str:
    """The page, as text. Files are only read, pictures made of those that are what was labelled.

    Args:
        draw: after the last prediction. pictures: the folder that caches were made of, if that was said. seconds: of the work.
        budget: bytes of the page, about; 4 MB, and of more than 1,000 images 1.2 kB more for each, when None.
    """
    rows = draw.rows
    page = budget or _PAGE + _EACH * max(0, len(rows) - _ALL)
    cards, words = _cards(draw, rows, pictures, page)
    columns = cards_data(cards, draw.model.classes)
    number = {name: k for k, name in enumerate(columns["classes"])}
    return render_page(
        "gallery.html",
        title=f"{_images(draw.images)}, labelled by {draw.model.path.name}",
        data={"cards": columns},
        cards=cards,
        full=len(cards) <= _FULL,
        bars=len(cards) <= _BARS,
        drawn="" if len(rows) == draw.images else _drawn(draw, len(rows)),
        tiles=_tiles(draw),
        classes=_classes(draw),
        numbers=number,
        chart=_how_sure(draw),
        pairs=_pairs(draw, cards, number),
        wrong=any(card.outcome == "wrong" for card in cards),
        words=words,
        refused=draw.refused,
        refused_caption=_refused_caption(draw),
        facts=_facts(draw, pictures, seconds),
    )


def _images(count: int) -> str:
    return quantity(count, "image")


def _refused_caption(draw: Draw) -> str:
    listed, refused = len(draw.refused), draw.status["refused"]
    return f"{f'{count_text(listed)} of ' if listed < refused else ''}{_images(refused)} could not be labelled"


def _drawn(draw: Draw, shown: int) -> str:
    why = "" if draw.asked else "; --sample N shows as many as you like"
    return (
        f"Shown are {count_text(shown)} of the {_images(draw.images)}, drawn at random (seed {draw.seed}){why}. "
        "Numbers above the pictures count all."
    )


def _tiles(draw: Draw) -> list[tuple[str, str, str]]:
    """Headline numbers."""
    refused, unsure = draw.status["refused"], draw.status["unsure"]
    labelled = draw.images - refused
    tiles = [("Labelled", count_text(labelled), f"of {_images(draw.images)}" if refused else "all images")]
    if (n := sum(draw.pairs.values())) and labelled:
        right = sum(count for (label, answer), count in draw.pairs.items() if label == answer)
        others = " that training has not seen" if draw.seen else ""
        tiles.append(("Right", percent_text(right / n), f"{count_text(right)} of {count_text(n)} with a label{others}"))
    elif draw.seen and draw.inputs.labels:
        tiles.append(("Right", NONE, "training has seen every image that has a label"))
    if unsure:
        tiles.append(("Unsure", count_text(unsure), percent_text(unsure / labelled) + " of those labelled"))
    if refused:
        tiles.append(("Refused", count_text(refused), "each with its reason, below"))
    if draw.seen:
        tiles.append(("Seen in training", count_text(draw.seen), "their probabilities flatter"))
    return tiles


def _classes(draw: Draw) -> list[tuple[str, int, Markup, str]]:
    """Per class that was answered: name, images, their share as a bar and as a text; the most frequent first."""
    answered = max(draw.images - draw.status["refused"], 1)
    return [
        (name, count, share_bar(count / answered), percent_text(count / answered))
        for name, count in draw.predicted.most_common()
    ]


def _how_sure(draw: Draw) -> Chart | None:
    """How probable the answers are."""
    if not sum(draw.sure):
        return None
    first = min(int(BINS / len(draw.model.classes)), BINS - 1)  # the likeliest of C classes has 1/C at least
    edges = [k / BINS for k in range(first, BINS + 1)]
    return histogram(
        edges, draw.sure[first:], title="How sure the model is", x_label="probability of the answer", percent_x=True
    )


def _pairs(
    draw: Draw, cards: Sequence[Card], number: Mapping[str, int]
) -> list[tuple[str, str, int, dict[str, int] | None]]:
    """Which class is taken for which, and what selects those that were drawn, if any: the most frequent first."""
    there = {(card.label, card.predicted) for card in cards}
    wrong = [(label, answer, count) for (label, answer), count in draw.pairs.most_common() if label != answer]
    return [
        (
            label,
            answer,
            count,
            {"label": number[label], "predicted": number[answer]} if (label, answer) in there else None,
        )
        for label, answer, count in wrong[:_MOST_PAIRS]
    ]


def _facts(draw: Draw, pictures: Path | None, seconds: float | None) -> list[tuple[str, str]]:
    """Where it comes from."""
    spec = draw.model.spec
    inputs = [str(each) if each.path == STDIN else typed(each.path) for each in draw.inputs.sources]
    more = f" and {len(inputs) - 5} more" if len(inputs) > 5 else ""
    held = f"{_images(len(draw.inputs.held))} in memory" if draw.inputs.held else ""
    labels = sum(label in draw.model.classes for label in draw.inputs.labels.values())
    pairs = [
        ("model", str(draw.model.path)),
        ("backbone", spec.backbone + (f", weights sha256 {spec.weights_sha256[:12]}" if spec.weights_sha256 else "")),
        ("images", "; ".join(filter(None, [", ".join(inputs[:5]) + more, held]))),
        ("labels", f"of {_images(labels)}, by their folders or table" if labels else ""),
        ("evidence", "" if draw.evidence is None else str(draw.evidence)),
        ("unsure", "" if not draw.status["unsure"] else "the reason stands beside each image"),
        ("unfamiliar", f"farther from the training images than {UNFAMILIAR:.0%} of them" if draw.evidence else ""),
        ("pictures from", "" if pictures is None else str(pictures)),
        ("made", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("seconds", "" if seconds is None else f"{seconds:.1f}"),
        ("featcache", importlib.metadata.version("featcache")),
    ]
    return [(word, value) for word, value in pairs if value]


def _cards(draw: Draw, rows: Sequence[Row], folder: Path | None, page: int) -> tuple[list[Card], str]:
    """A card for each row; and what is to be said of the pictures."""
    each = _TEXT_FULL if len(rows) <= _FULL else _TEXT + _BAR * (len(rows) <= _BARS)
    text = sum(each + 2 * len(row.path) for row in rows)
    left = max(0, page - text) / _FOUR_THIRDS
    of_evidence = int(left * _OF_EVIDENCE) if draw.evidence else 0
    pictures, words = _pictures(draw, rows, folder, int(left) - of_evidence)
    evidence = _evidence(draw, rows, folder, of_evidence) if draw.evidence else {}
    if evidence and not any(each.thumbnail for each in evidence.values()):
        where = "" if folder else f"; --source FOLDER says where those of {draw.evidence} are"
        words = f"{words} The nearest training images have no pictures here{where}.".strip()
    everything_seen = draw.seen == draw.images - draw.status["refused"]
    cards = []
    for row, picture in zip(rows, pictures, strict=True):
        given = draw.inputs.labels.get(row.path)
        label = draw.label(row.path)
        notes = ["" if given == label else f"no class of the model: {given}"]
        notes += ["seen in training"] * (row.seen and not everything_seen)
        cards.append(
            Card(
                path=row.path,
                thumbnail=picture.uri,
                no_thumbnail=picture.reason,
                label=label,
                predicted=row.top[0][0] if row.top else None,
                probabilities=row.top,
                status=row.status,
                reason=row.reason,
                evidence=tuple(
                    dataclasses.replace(evidence[each.path], similarity=each.similarity) for each in row.nearest
                ),
                unfamiliarity=row.unfamiliarity,
                note="; ".join(filter(None, notes)),
            )
        )
    return cards, words


def _pictures(draw: Draw, rows: Sequence[Row], folder: Path | None, budget: int) -> tuple[list[Thumbnail], str]:
    """A picture of each row, made of the very bytes that were labelled; and what is to be said of them."""
    wanted = [k for k, row in enumerate(rows) if row.top]
    random.Random(draw.seed).shuffle(wanted)  # where not all fit, mistakes and doubts come first, and others at random

    def matters(k: int) -> bool:
        row = rows[k]
        return row.status == "unsure" or draw.label(row.path) not in (None, row.top[0][0])

    wanted.sort(key=matters, reverse=True)
    large = len(wanted) * _BYTES_OF_LARGE <= budget
    size = _LARGE if large else max(fitting_size(len(wanted), budget), _LEAST)
    paths, digests = [rows[k].path for k in wanted], [rows[k].digest for k in wanted]
    if draw.inputs.caches:
        cache = FeatureCache.open(draw.inputs.sources[0].path)
        made = Pictures(folder or _root(cache, draw)).thumbnails(paths, digests, size=size, budget=budget)
    else:
        made = _as_typed(paths, digests, draw.inputs.held, size=size, budget=budget)
    found = [_NONE] * len(rows)
    left_out = 0
    for k, picture in zip(wanted, made, strict=True):
        found[k] = picture
        if picture.reason.startswith("left out"):
            found[k], left_out = Thumbnail(None, "left out"), left_out + 1
    words = []
    if left_out:
        first = "every mistake and doubt has one, " if sum(map(matters, wanted)) < len(wanted) - left_out else ""
        words.append(
            f"{quantity(left_out, 'picture is', 'pictures are')} left out, to keep the page small: {first}the others are drawn at random."
        )
    if missing := sum(each.webp is None for each in made) - left_out:
        words.append(
            f"{_images(missing)} {'has' if missing == 1 else 'have'} no picture here, and the reason in its place."
        )
        if draw.inputs.caches and folder is None:
            words.append("--source FOLDER says where the images of a cache are.")
    return found, " ".join(words)


def _evidence(draw: Draw, rows: Sequence[Row], folder: Path | None, budget: int) -> dict[str, Evidence]:
    """Path of a training image -> what is known of it, but for a similarity."""
    if draw.evidence is None:
        return {}
    cache = FeatureCache.open(draw.evidence)
    wanted = {each.path for row in rows for each in row.nearest}
    found = {path: k for k, path in enumerate(cache.paths) if path in wanted}
    digests = [cache.rows.digests[k].tobytes() for k in found.values()]
    root = folder or _root(cache, draw)
    made = Pictures(root, search=False).thumbnails([*found], digests, size=_SMALL, budget=budget)
    labels = [cache.classes[cache.y[k]] if cache.y[k] >= 0 else None for k in found.values()]
    return {
        path: Evidence(path, 0.0, label, picture.uri) for path, label, picture in zip(found, labels, made, strict=True)
    }


def _root(cache: FeatureCache, draw: Draw) -> Path | None:
    """What a cache was probably made of: people label what lies beside what they trained on."""
    near = [place for source in draw.inputs.sources for place in (source.path, *source.path.absolute().parents[:2])]
    return guess_root(cache, near=near)


def _as_typed(
    paths: Sequence[str], digests: Sequence[bytes], held: Mapping[str, Held], *, size: int, budget: int
) -> list[Thumbnail]:
    """Thumbnails of the inputs; of files whose content is what it was."""
    in_memory = {k: held[path] for k, path in enumerate(paths) if path in held}
    made = thumbnails(Paths(None, tuple(paths), in_memory), size=size, budget=budget)
    changed = Thumbnail(None, "the file has changed since")
    return [
        changed if each.digest and each.digest != digest else each for each, digest in zip(made, digests, strict=True)
    ]
