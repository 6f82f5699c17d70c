"""How a model was trained and chosen: the sections' words and numbers are those of the model and of the rule that chose."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from caches import make_classes, save_head, save_tuned

from featcache.cache.cache import FeatureCache
from featcache.errors import ModelError
from featcache.heads.head import Head
from featcache.heads.learning_curve import learning_curve
from featcache.models.fit import fit_head
from featcache.models.limits import Limits
from featcache.models.model import load_model
from featcache.models.scoring import score_cache, score_held_out
from featcache.reports.elements.numbers import number_text, percent_text
from featcache.reports.elements.page import render_sections
from featcache.reports.elements.pictures import Pictures
from featcache.reports.model_report.learning import (
    choice_section,
    finetuned_section,
    learning_section,
    training_charts,
    training_section,
    why_chosen,
)
from featcache.reports.model_report.subject import Subject, make_subject


def subject_of(folder: Path, cache: Path | None, **options: Any) -> Subject:
    model, opened = load_model(folder), None if cache is None else FeatureCache.open(cache)
    scored = (
        score_held_out(model)
        if opened is None
        else score_cache(model, opened, split=None, limits=Limits(model.classes))
    )
    return make_subject(model, scored, cache=opened, pictures=Pictures(None), **options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on overlapping classes; f.h5 beside it has train and test."""
    folder = tmp_path_factory.mktemp("fitted")
    make_classes(folder / "f.h5", np.arange(300) % 3, np.repeat([1, 3], [180, 120]), spread=4.0)
    fit_head(folder / "f.h5", folder / "m")
    return folder / "m"


# ------------------------------------------------------------------------------------------------------ C and scaling


def test_every_setting_is_drawn_and_the_choice_explained(fitted: Path) -> None:
    section = choice_section(subject_of(fitted, fitted.with_name("f.h5")))
    assert section is not None
    curve = json.loads((fitted / "metrics.json").read_text())["curve"]
    accuracy, loss = section.context["charts"]
    assert [row[:3] for row in accuracy.rows] == [
        (e["scaling"], number_text(e["C"]), percent_text(e["accuracy"])) for e in curve
    ]
    assert [row[2] for row in loss.rows] == [number_text(e["log_loss"]) for e in curve]
    best = max(e["accuracy"] for e in curve)
    good = [e for e in curve if e["accuracy"] >= best - max(np.sqrt(best * (1 - best) / 180), 1 / 180) - 1e-9]
    assert f"{len(good)} of 33 settings lie within one standard error" in section.context["words"]
    training = load_model(fitted).manifest["training"]
    assert f"C {training['C']:g} with scaling {training['scaling']}" in section.context["words"]
    assert "the model uses" not in section.context["words"]  # the rule explains what was chosen
    assert "Choice of C and scaling" in render_sections([section], title="t")


ROWS = [
    {"scaling": "none", "C": 0.1, "accuracy": 0.905, "log_loss": 0.302},
    {"scaling": "none", "C": 0.3, "accuracy": 0.91, "log_loss": 0.301},
    {"scaling": "none", "C": 1.0, "accuracy": 0.91, "log_loss": 0.3},
    {"scaling": "unit", "C": 1.0, "accuracy": 0.92, "log_loss": 0.32},
    {"scaling": "unit", "C": 10.0, "accuracy": 0.7, "log_loss": 0.2},
]


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (
            ("none", 0.1),
            "C 1 with scaling none has the lowest log loss, 0.3; C 0.1 with scaling none equals it to 0.005 nats",
        ),
        (("none", 1.0), "Of these C 1 with scaling none has the lowest log loss, 0.3."),
        (("none", 0.3), "the model uses C 0.3 with scaling none"),
        (("unit", 10.0), "the model uses C 10 with scaling unit"),
        (("unit", 5.0), ""),
    ],
)
def test_why(chosen: tuple[str, float], says: str) -> None:
    words = why_chosen(ROWS, chosen, 200)
    assert says in words
    assert bool(words) == bool(says)
    assert not words or words.startswith(
        "4 of 5 settings lie within one standard error (1.9 points on 200 different images)"
    )


def test_a_given_c_has_bars_and_a_torch_head_no_curve(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(90) % 3)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=2.0)
    section = choice_section(subject_of(tmp_path / "m", None))
    assert section is not None
    assert [row[0] for row in section.context["charts"][0].rows] == [
        "scaling none",
        "scaling standardise",
        "scaling unit",
    ]
    fit_head(tmp_path / "f.h5", tmp_path / "l", clf="linear", epochs=2)
    assert choice_section(subject_of(tmp_path / "l", None)) is None


# ---------------------------------------------------------------------------------------------------- learning curve


def test_the_learning_curve_is_that_of_the_training_rows(fitted: Path) -> None:
    subject = subject_of(fitted, fitted.with_name("f.h5"))
    section = learning_section(subject)
    training, cache = subject.model.manifest["training"], FeatureCache.open(fitted.with_name("f.h5"))
    rows, judges = np.arange(180), np.arange(180, 300)
    options = {"C": training["C"], "scaling": training["scaling"], "copies": rows, "judges": judges}
    found = learning_curve(cache.X, rows, cache.y[:180], judges_y=cache.y[180:], **options)
    (chart,) = section.context["charts"]
    low, high = found.interval
    measured = [row[2:] for row in chart.rows if row[0] == "measured"]
    assert measured == [tuple(map(percent_text, ends)) for ends in zip(found.accuracy, low, high, strict=True)]
    assert "judged by the 120 test images" in section.context["notes"]
    assert f"Accuracy is {percent_text(found.accuracy[-1])} with 180 training images" in section.context["words"]


def test_all_training_images_are_the_model_itself(fitted: Path, tmp_path: Path) -> None:
    """A fit of the same rows may differ by an image on the border, and the page would contradict its own headline."""

    def last(subject: Subject) -> str:
        (chart,) = learning_section(subject).context["charts"]
        return [row[2] for row in chart.rows if row[0] == "measured"][-1]

    subject = subject_of(fitted, fitted.with_name("f.h5"))
    weight, bias = subject.model.head.layers[0]
    other = dataclasses.replace(subject.model.head, layers=((np.roll(weight, 1, axis=0), bias),))  # nearly always wrong
    model = dataclasses.replace(subject.model, head=other)
    scored = score_cache(model, FeatureCache.open(fitted.with_name("f.h5")), split="test", limits=Limits(model.classes))
    right = float((scored.probabilities.argmax(axis=1) == scored.y).mean())
    assert last(dataclasses.replace(subject, model=model)) == percent_text(right) != last(subject)
    relabelled = np.arange(300) % 3
    relabelled[0] = 1
    make_classes(tmp_path / "f.h5", relabelled, np.repeat([1, 3], [180, 120]), spread=4.0)
    with_others = dataclasses.replace(subject, model=model, cache=FeatureCache.open(tmp_path / "f.h5"))
    assert last(with_others) != percent_text(right)  # other training labels: another head


def test_where_there_is_no_learning_curve_the_page_says_why(fitted: Path) -> None:
    cache = fitted.with_name("f.h5")
    subject = subject_of(fitted, cache)
    tuned = dataclasses.replace(subject.model, manifest=subject.model.manifest | {"finetuned": True})
    head = Head("mlp", "none", np.zeros(3), np.ones(3), ((np.eye(2, 3), np.zeros(2)),))
    for other, why in [
        (subject_of(fitted, cache, quick=True), f"<code>featcache report {fitted} {cache}</code> draws it, and a map."),
        (subject_of(fitted, None), f"<code>featcache report {fitted} CACHE</code> draws it, and a map."),
        (dataclasses.replace(subject, model=tuned), "have seen all of its training images"),
        (
            dataclasses.replace(subject, model=dataclasses.replace(subject.model, head=head)),
            "this is of kind mlp: the page of a logreg head",
        ),
    ]:
        section = learning_section(other)
        assert section.context["charts"] == []
        assert "There is no learning curve: " in section.context["words"]
        assert why in render_sections([section], title="t")


def test_folds_that_would_divide_groups_draw_no_curve(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(150) % 3)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0, groups=[f"p{k // 5}" for k in range(150)])
    section = learning_section(subject_of(tmp_path / "m", tmp_path / "f.h5"))
    assert section.context["charts"] == [] and "its folds would divide the groups" in section.context["words"]


def test_too_few_images_are_said(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(40) % 2, np.repeat([1, 3], 20))
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    section = learning_section(subject_of(tmp_path / "m", tmp_path / "f.h5"))
    assert section.context["charts"] == []
    assert (
        "There is no learning curve: 20 different training images of 2 classes are too few" in section.context["words"]
    )


# ------------------------------------------------------------------------------------- epochs, frozen or fine-tuned


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return save_tuned(tmp_path / "m")


def test_epochs_are_drawn_as_they_were(tuned: Path) -> None:
    section = training_section(subject_of(tuned, None))
    assert section is not None
    loss, accuracy = section.context["charts"]
    assert [row[1:] for row in loss.rows if row[0] == "train"] == [("1", "1"), ("2", "0.5"), ("3", "0.2")]
    assert [row[2] for row in accuracy.rows if row[0] == "val"] == ["60.0%", "–", "75.0%"]
    assert "best epoch 3" in accuracy.svg
    assert "frozen head, val 50.0%" in accuracy.svg
    assert section.context["words"] == (
        "Epoch 3 of 3 was the best on val: accuracy 75.0%, loss 0.7. It was the last one: more epochs may do better."
    )


def test_scores_between_epochs_are_drawn_by_step(tuned: Path) -> None:
    metrics, model = json.loads((tuned / "metrics.json").read_text()), load_model(tuned)
    for row, epoch, step in zip(metrics["history"], (1, 1, 2), (50, 62, 100), strict=True):
        row |= {"epoch": epoch, "step": step, "seconds": 0.5 * step, "images_per_second": 64.0}
    (tuned / "metrics.json").write_text(json.dumps(metrics))
    model.manifest["training"] |= {"best_epoch": 2, "best_step": 100}
    section = training_section(SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert section is not None
    loss, accuracy = section.context["charts"]
    assert [row[1:] for row in loss.rows if row[0] == "train"] == [("50", "1"), ("62", "0.5"), ("100", "0.2")]
    assert "best step 100" in accuracy.svg
    assert section.context["words"] == (
        "Epoch 2 of 2, at step 100 of 100, was the best on val: accuracy 75.0%, loss 0.7. It was the last one: more epochs may do "
        "better."
    )


def test_a_head_s_held_out_tenth_is_named(tmp_path: Path) -> None:
    head = Head("mlp", "none", np.zeros(3), np.ones(3), ((np.eye(2, 3), np.zeros(2)),))
    model = load_model(save_head(tmp_path / "m", head, ("a", "b"), 1))
    assert training_charts(model) == []
    history = [{"epoch": k, "train_loss": 1 / k, "held_out_loss": 2 / k, "held_out_accuracy": k / 4} for k in (1, 2, 3)]
    (tmp_path / "m/metrics.json").write_text(json.dumps({"history": history}))
    loss, accuracy = training_charts(model)
    assert {row[0] for row in loss.rows} == {"train", "held out of train"}
    assert [row[2] for row in accuracy.rows] == ["25.0%", "50.0%", "75.0%"]


@pytest.mark.parametrize("text", ["", "[]", '{"history": 3}', '{"history": [1, {"epoch": "x"}]}', '{"history": [{}]}'])
def test_a_damaged_history_is_none(tuned: Path, text: str) -> None:
    model = load_model(tuned)
    (tuned / "metrics.json").write_text(text)
    assert training_charts(model) == []


def test_images_that_each_won_are_cards_of_the_page(tuned: Path) -> None:
    subject = subject_of(tuned, None)
    section = finetuned_section(subject)
    assert section is not None
    rows = {name: [subject.rows[card] for card in section.context[name]] for name in ("won", "lost")}
    assert (sorted(rows["won"]), rows["lost"]) == ([4, 5], [2])
    assert section.context["rows"] == [["val, 6 images", "50.0%", "66.7%", "2", "1", "1"]]
    html = render_sections([section], title="t")
    assert "It is so." in html
    assert "2 won by fine-tuning" in html
    older = json.loads((tuned / "metrics.json").read_text()) | {"comparison": None}
    (tuned / "metrics.json").write_text(json.dumps(older))
    assert finetuned_section(subject) is None


@pytest.mark.parametrize(
    "metrics",
    [{"curve": 7}, {"curve": [1]}, {"curve": [{"C": 1.0, "scaling": "none", "accuracy": "good"}]}, {"curve": {}}],
)
def test_metrics_of_another_shape_are_damage(fitted: Path, tmp_path: Path, metrics: dict[str, Any]) -> None:
    folder = shutil.copytree(fitted, tmp_path / "damaged")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    model = load_model(folder)
    subject = cast("Subject", SimpleNamespace(model=model))
    if not metrics["curve"]:
        assert choice_section(subject) is None
        return
    with pytest.raises(ModelError, match=r"its metrics.json is not what was saved"):
        choice_section(subject)
