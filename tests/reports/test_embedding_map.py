"""The map's section and page: rows are what they were, whatever their names, and a picture is of the very bytes."""

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_classes
from conftest import TINY, write_photo
from kitchen import HOSTILE

import featcache
from featcache.cache.cache import FeatureCache
from featcache.errors import SourceError, UsageError
from featcache.extraction.extract import extract
from featcache.models.fit import fit_head
from featcache.reports.elements.cards import Card, cards_data
from featcache.reports.elements.projection import Projection
from featcache.reports.figures import figure_file
from featcache.reports.model_report.embedding_map import Mapped, map_chart, map_section, order_wall
from featcache.reports.model_report.report import report


def data_of(html: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    return found


def unpacked(text: str, kind: str) -> list[int]:
    return np.frombuffer(base64.b64decode(text), kind).tolist()


def projected(points: Any) -> Projection:
    points = np.asarray(points, np.float32)
    return Projection(points, points, "pca", "By hand.", 0.5, 1, len(points))


def test_cards_come_first_and_refused_ones_are_nowhere() -> None:
    cards = [Card("b.jpg", label="y"), Card("bad.jpg", status="refused"), Card("d.jpg", label="x")]
    data: dict[str, Any] = {"cards": cards_data(cards, ["x", "y"])}
    mapped = Mapped(
        projected([[0, 0], [10, 5], [5, 0], [2, 1]]),
        paths=["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
        labels=np.array([0, 1, -1, 0]),
        predicted=np.array([1, 1, 0, 0]),
        splits=np.array([1, 2, 3, 0]),
        card=np.array([-1, 0, -1, 2]),
        classes=["x", "y"],
    )
    section = map_section(mapped, data, wall=[2, 0])
    found = data["map"]
    # b, the refused one, d; then a and c. The longer side, 0..10, is spread over -32767..32767.
    assert unpacked(found["x"], "<i2") == [32767, -32768, round((2 - 5) / 5 * 32767), -32767, 0]
    assert unpacked(found["y"], "<i2") == [16384, -32768, round((1 - 2.5) / 5 * 32767), -16384, -16384]
    assert found["path"] == ["a.jpg", "c.jpg"]
    assert unpacked(found["label"], "<i4") == [0, -1]
    assert unpacked(found["predicted"], "<i4") == [1, 0]
    assert [found["splits"][k] for k in unpacked(found["split"], "<u1")] == ["train", "test"]
    assert found["wall"] == [2, 0]
    assert [key for key, _ in section.context["colours"]] == ["label", "predicted", "correct", "split"]


@pytest.mark.parametrize("count", [1, 50, 9000])
def test_the_picture_is_svg_whatever_the_names(count: int) -> None:
    points = np.random.default_rng(0).normal(size=(count, 2))
    names = [*HOSTILE, *[f"class {k}" for k in range(20)]]
    chart = map_chart(projected(points), [names[k % len(names)] for k in range(count)])
    root = ET.fromstring(figure_file(chart).split("?>", 1)[1])
    dots = root.findall("{http://www.w3.org/2000/svg}path")
    assert sum(path.get("d", "").count("M") for path in dots) == min(count, 4000)
    assert len(dots) <= 11  # ten kinds of mark, and grey
    assert sum(int(n.replace(",", "")) for _, n in chart.rows) == count
    assert ("4,000 of 9,000 images are drawn" in chart.caption) == (count == 9000)


def test_a_wall_holds_pictures_only() -> None:
    X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float16)
    rows, cards = np.arange(10, 40), np.arange(30)[::-1].copy()
    shown = [k % 3 > 0 for k in range(30)]
    assert sorted(order_wall(X, rows, cards, shown)) == [k for k in range(30) if shown[k]]
    assert order_wall(X, rows, cards, [False] * 30) == []


@pytest.fixture
def photographed(tmp_path: Path) -> Path:
    for number in range(12):
        folder = tmp_path / "photos" / ("train" if number % 3 else "val") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write_photo(folder / f"{number}.jpg", (90, 20 * number, 60), number)
    extract(tmp_path / "photos", tmp_path / "f.h5", TINY)
    return tmp_path


def test_a_map_of_a_cache_has_all_its_rows_and_true_pictures(photographed: Path) -> None:
    changed = next((photographed / "photos").rglob("3.jpg"))
    shutil.copy(next((photographed / "photos").rglob("4.jpg")), changed)
    page = featcache.map(photographed / "f.h5", photographed / "photos", method="pca")
    data = data_of(page.html)
    cache = FeatureCache.open(photographed / "f.h5")
    assert data["cards"]["path"] == list(cache.paths)
    assert [data["cards"]["classes"][k] for k in data["cards"]["label"]] == [cache.classes[k] for k in cache.y]
    without = cache.paths.index(str(changed.relative_to(photographed / "photos")))
    assert set(data["map"]["wall"]) == set(range(12)) - {without}
    assert [bool(text) for text in data["cards"]["reason"]] == [k == without for k in range(12)]
    assert page.save(photographed / "map.html").read_text() == page.html
    assert "<iframe" in page._repr_html_()


def test_a_map_without_a_folder_says_where_to_point_it(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(30) % 2)
    page = featcache.map(tmp_path / "f.h5")
    assert "No pictures: give the folder of the images as source." in page.html
    assert '<ul class="wall"' not in page.html
    with pytest.raises(SourceError, match="is no folder"):
        featcache.map(tmp_path / "f.h5", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no map is called 'none'; choose one of auto, pca, tsne"):
        featcache.map(tmp_path / "f.h5", method="none")


def test_of_many_rows_a_sample_has_cards(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [2000, 40, 300])
    make_classes(tmp_path / "f.h5", labels)
    data = data_of(featcache.map(tmp_path / "f.h5", method="pca").html)
    counts = np.bincount(data["cards"]["label"])
    assert (counts.sum(), counts[1], counts[2]) == (1200, 40, 300)
    known = [*data["cards"]["path"], *data["map"]["path"]]
    assert sorted(known) == sorted(FeatureCache.open(tmp_path / "f.h5").paths)


def test_the_map_of_a_report(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(90) % 3, 1 + np.arange(90) // 60, spread=3.0)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    report(tmp_path / "m", tmp_path / "f.h5", output=tmp_path / "r.html", map="pca")
    data = data_of((tmp_path / "r.html").read_text())
    cache = FeatureCache.open(tmp_path / "f.h5")
    val = [cache.paths[row] for row in cache.where("val")]
    assert sorted(data["cards"]["path"]) == val
    assert data["map"]["path"] == [path for path in cache.paths if path not in val]
    assert unpacked(data["map"]["predicted"], "<i4") == [-1] * 60
    report(tmp_path / "m", tmp_path / "f.h5", output=tmp_path / "r.html", map="none")
    assert 'class="map"' not in (tmp_path / "r.html").read_text()
    with pytest.raises(UsageError, match="--map pca needs embeddings: give a cache as SOURCE"):
        report(tmp_path / "m", output=tmp_path / "r.html", map="pca")
