"""Pages with a map, of points that are made up. In: how many points and cards. Out: a page; with it what is on it."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featcache.reports.elements.cards import Card, cards_data
from featcache.reports.elements.page import Section, publish_page, render_sections
from featcache.reports.elements.projection import Projection
from featcache.reports.elements.thumbnails import thumbnails
from featcache.reports.model_report.embedding_map import Mapped, map_section


class MapPage(NamedTuple):
    """A page, and per point: where it lies, its class, what it was taken for; of the first ones the cards."""

    path: Path
    points: Any
    labels: Any
    predicted: Any
    cards: list[Card]


def make_map(
    folder: Path,
    *,
    count: int = 400,
    classes: list[str],
    pictures: list[Path],
    cards: int | None = None,
    refused: int = 0,
) -> MapPage:
    """``classes``: names; a blob each. ``pictures``: files of the first cards; ``refused`` further cards are on no map."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % len(classes)
    middles = random.normal(size=(len(classes), 2)) * 6
    points = (middles[labels] + random.normal(size=(count, 2))).astype(np.float32)
    predicted = np.where(random.random(count) < 0.1, (labels + 1) % len(classes), labels)
    predicted[count - count // 6 :] = -1  # rows that nobody scored
    small = [one.uri for one in thumbnails(pictures, size=64)] if pictures else []
    number = count if cards is None else cards
    made = [
        Card(
            f"photos/{classes[labels[k]]}/{k}.jpg",
            small[k] if k < len(small) else None,
            label=classes[labels[k]],
            predicted=None if predicted[k] < 0 else classes[predicted[k]],
            probabilities=() if predicted[k] < 0 else ((classes[predicted[k]], 0.9),),
            split="val",
        )
        for k in range(number)
    ]
    made += [Card(f"photos/bad {k}.jpg", status="refused", reason="truncated") for k in range(refused)]
    data = {"cards": cards_data(made, classes)}
    card = np.where(np.arange(count) < number, np.arange(count), -1)
    projection = Projection(points, points, "pca", "Made up.", 0.9, 15, count)
    paths = [f"photos/{classes[label]}/{k}.jpg" for k, label in enumerate(labels.tolist())]
    splits = np.where(card < 0, 1, 2)
    mapped = Mapped(projection, paths, labels, predicted, splits, card, classes)
    wall = [k for k in random.permutation(number).tolist() if made[k].thumbnail is not None]
    sections = [
        map_section(mapped, data, wall=wall),
        Section("pictures", "Pictures", "report_pictures.html", {"cards": made, "lists": [], "notes": []}),
    ]
    publish_page(folder / "map.html", render_sections(sections, title="A map", data=data))
    return MapPage(folder / "map.html", points, labels, predicted, made)
