"""What probabilities are worth: every number of the section is one of the scores, or follows from them by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_classes
from sklearn.calibration import calibration_curve

from featcache.cache.cache import FeatureCache
from featcache.heads.metrics import accuracy_interval
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.reports.elements.numbers import percent_text
from featcache.reports.elements.page import render_sections
from featcache.reports.model_report.calibration import calibration_charts, calibration_section


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit on half of overlapping classes, with a temperature that is not 1; the cache is f.h5 beside it."""
    folder = tmp_path_factory.mktemp("calibration")
    make_classes(folder / "f.h5", np.arange(400) % 4, np.repeat([1, 3], 200), spread=5.0)
    fit_head(folder / "f.h5", folder / "m")
    return folder / "m"


@pytest.fixture
def scores(model: Path) -> dict[str, Any]:
    return evaluate(model, model.with_name("f.h5"), abstain_below=0.6)


def test_reliability_after_and_before(model: Path, scores: dict[str, Any]) -> None:
    cache, loaded = FeatureCache.open(model.with_name("f.h5")), load_model(model)
    temperature, logits = scores["calibration"]["temperature"], loaded.head.logits(cache.X[200:].astype(np.float64))
    assert temperature != 1
    chart = calibration_charts(scores)[0]
    for way, scale in (("before temperature", temperature), ("after temperature", 1.0)):
        shifted = np.exp(scale * (logits - logits.max(axis=1, keepdims=True)))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        right = probabilities.argmax(axis=1) == cache.y[200:]
        accuracies, means = calibration_curve(right, probabilities.max(axis=1), n_bins=15)
        rows = [row[1:3] for row in chart.rows if row[0] == way]
        assert rows == [(percent_text(x), percent_text(y)) for x, y in zip(means, accuracies, strict=True)]


def test_coverage_with_its_interval_and_what_was_asked_for(scores: dict[str, Any]) -> None:
    chart = calibration_charts(scores)[1]
    curve = [row[1:] for row in chart.rows if row[0] == "surest"]
    assert len(curve) == len(scores["answer_curve"]) == 7
    for row, point in zip(curve, scores["answer_curve"][::-1], strict=True):
        ends = accuracy_interval(round(point["n"] * point["accuracy"]), point["n"])
        assert row == tuple(map(percent_text, (point["share"], point["accuracy"], *ends)))
    asked = [row for row in chart.rows if row[0] == "as asked"]
    assert [row[1:3] for row in asked] == [
        tuple(percent_text(scores["answered"][key]) for key in ("share", "accuracy"))
    ]
    assert f"As asked, {percent_text(scores['answered']['share'])} are answered" in chart.caption


def test_the_section_says_which_abstention_halves_the_errors(scores: dict[str, Any]) -> None:
    curve = [
        {"share": 1.0, "n": 200, "accuracy": 0.9, "least_probability": 0.3},
        {"share": 0.9, "n": 180, "accuracy": 0.94, "least_probability": 0.51239},
        {"share": 0.8, "n": 160, "accuracy": 0.95, "least_probability": 0.6},
    ]
    html = render_sections([calibration_section(scores | {"answer_curve": curve, "n": 200})], title="t")
    assert "Leaving the 40 least sure images to people" in html
    assert (
        "from 10.0% (20 of 200) to 5.0% (8 of 160). That is <code>featcache predict --abstain-below 0.6</code>" in html
    )
    perfect = [dict(point, accuracy=1.0) for point in curve]
    assert "abstain" not in render_sections([calibration_section(scores | {"answer_curve": perfect})], title="t")


@pytest.mark.parametrize(
    ("error", "chance", "says"), [(0.02, 0.018, "no more than chance explains"), (0.1, 0.02, "Read prob")]
)
def test_an_error_is_compared_with_chance(scores: dict[str, Any], error: float, chance: float, says: str) -> None:
    calibration = scores["calibration"] | {
        "after": scores["calibration"]["after"] | {"ece": error, "ece_by_chance": chance}
    }
    section = calibration_section(scores | {"calibration": calibration})
    assert says in section.context["words"]


def test_without_a_temperature_there_is_no_before(scores: dict[str, Any]) -> None:
    section = calibration_section(
        scores | {"calibration": scores["calibration"] | {"temperature": 1.0}, "answered": None}
    )
    assert len(section.context["rows"]) == 1
    assert section.context["charts"][0].header == ("probability", "accuracy", "images")
    assert dataclasses.asdict(section)["anchor"] == "calibration"
