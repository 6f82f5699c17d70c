"""From a cache to a saved model: what is chosen on which rows, and what cannot be trained."""

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from caches import CLASSES_DIM, make_classes
from conftest import SPEC

from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.errors import FeatcacheError, SourceError, SpecMismatchError, UsageError
from featcache.heads.head import KINDS
from featcache.heads.validation import stratified_folds
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.models.predict import predict


@pytest.mark.parametrize(
    "clf", ["logreg", *(pytest.param(clf, marks=pytest.mark.slow) for clf in KINDS if clf != "logreg")]
)
def test_only_training_rows_train_and_the_others_are_scored(tmp_path: Path, clf: Any) -> None:
    labels, splits = np.arange(150) % 3, 1 + np.arange(150) // 50
    X = make_classes(tmp_path / "f.h5", labels, splits)
    report = fit_head(tmp_path / "f.h5", tmp_path / "m", clf=clf)
    assert (report.classes, report.n_train) == (3, 50)
    assert report.cv_accuracy is not None
    assert report.cv_accuracy > 0.9
    wrong = labels.copy()
    wrong[splits != 1] = (labels[splits != 1] + 1) % 3  # other val and test labels must not change the head
    rows = dataclasses.replace(FeatureCache.open(tmp_path / "f.h5").rows, labels=wrong.astype(np.int32))
    write_cache(tmp_path / "g.h5", rows, [X], dim=CLASSES_DIM, spec=SPEC, classes=("a", "b", "c"))
    again = fit_head(tmp_path / "g.h5", tmp_path / "n", clf=clf)
    one, two = load_model(tmp_path / "m").head, load_model(tmp_path / "n").head
    for a, b in zip(one.to_tensors().values(), two.to_tensors().values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert report.val_accuracy == pytest.approx(
        float((one.probabilities(X[50:100]).argmax(1) == labels[50:100]).mean())
    )
    assert report.test_accuracy is not None
    assert again.test_accuracy is not None
    assert again.test_accuracy < 0.2 < 0.8 < report.test_accuracy


def test_scores_of_untouched_rows_are_those_of_evaluate(tmp_path: Path) -> None:
    splits = np.repeat([1, 2, 3], [60, 50, 40])
    make_classes(tmp_path / "f.h5", np.arange(150) % 3, splits, spread=3.0)
    report = fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    saved = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert report.class_names == ("a", "b", "c")
    for split in ("val", "test"):
        scores = evaluate(tmp_path / "m", tmp_path / "f.h5", split=split)
        assert scores["accuracy"] < 1
        for name in ("accuracy", "accuracy_interval", "balanced_accuracy", "macro_f1"):
            assert getattr(report, f"{split}_{name}") == saved[f"{split}_{name}"] == scores[name]


def test_a_head_of_any_shape_is_trained_saved_and_labels(tmp_path: Path) -> None:
    splits = np.repeat([1, 3], [90, 60])
    X = make_classes(tmp_path / "f.h5", np.arange(150) % 3, splits)
    options: dict[str, Any] = {"dropout": 0.1, "epochs": 20, "lr": 0.01, "batch_size": 16}
    report = fit_head(tmp_path / "f.h5", tmp_path / "m", clf="mlp", hidden=[20, 10], folds=0, **options)
    model = load_model(tmp_path / "m")
    assert [weight.shape for weight, _ in model.head.layers] == [(20, CLASSES_DIM), (10, 20), (3, 10)]
    settings = options | {"hidden": [20, 10], "dropout": [0.1, 0.1]}
    assert settings.items() <= model.manifest["training"].items()
    assert report.settings == settings | {"scaling": "standardise"}
    assert report.test_accuracy is not None and report.test_accuracy > 0.8
    found = np.stack([each.probabilities for each in predict(tmp_path / "m", tmp_path / "f.h5")])
    np.testing.assert_array_equal(found, model.head.probabilities(X))


def test_how_training_went_is_kept_where_there_are_epochs(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m", clf="mlp", hidden=20, lr=0.05, folds=0)
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    with (tmp_path / "m" / "history.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == metrics["history"]
    assert list(rows[0]) == ["epoch", "train_loss", "train_accuracy", "held_out_loss", "held_out_accuracy"]
    assert "history" not in load_model(tmp_path / "m").manifest["metrics"]
    fit_head(cache, tmp_path / "m", C=1.0)  # in its place
    assert not (tmp_path / "m" / "history.csv").exists()


def test_without_splits_every_labelled_row_trains(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", [*([0, 1] * 20), -1, -1])
    report = fit_head(tmp_path / "f.h5", tmp_path / "m")
    assert (report.n_train, report.val_accuracy, report.test_accuracy) == (40, None, None)


def test_three_ways_to_probabilities_agree(model: Path, cache: Path) -> None:
    X = FeatureCache.open(cache).X
    from_pipeline = joblib.load(model / "head.joblib").predict_proba(X.astype(np.float64))
    from_tensors = load_model(model).head.probabilities(X)
    from_predict = np.stack([p.probabilities for p in predict(model, [cache])])
    np.testing.assert_allclose(from_tensors, from_pipeline, atol=1e-9)
    np.testing.assert_array_equal(from_predict, from_tensors)
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["temperature"] == load_model(model).manifest["metrics"]["temperature"] != 1


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """A table that names a patient for each row of ``cache``: five rows of each, of all classes; the last three of nobody."""
    names = [f"p{k // 5}" if k < 147 else "" for k in range(150)]
    lines = [f"{k:04d}.jpg,{name}" for k, name in enumerate(names)]
    (tmp_path / "p.csv").write_text("path,patient\n" + "\n".join(lines) + "\n")
    return tmp_path / "p.csv"


@pytest.mark.parametrize(
    "clf", ["logreg", *(pytest.param(clf, marks=pytest.mark.slow) for clf in KINDS if clf != "logreg")]
)
def test_groups_lie_in_one_fold(
    cache: Path,
    tmp_path: Path,
    patients: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clf: Any,
) -> None:
    dealt: list[Any] = []

    def spy(*args: Any, **options: Any) -> Any:
        dealt.append(stratified_folds(*args, **options))
        return dealt[-1]

    monkeypatch.setattr("featcache.heads.logreg.stratified_folds", spy)
    monkeypatch.setattr("featcache.heads.minibatch.stratified_folds", spy)
    report = fit_head(cache, tmp_path / "m", clf=clf, groups=patients, group_column="patient")
    assert report.groups == {"column": "patient", "training": 10, "across_splits": 0}
    assert len(dealt[0]) == 5
    for train, held_out in dealt[0]:
        assert not {*(train // 5).tolist()} & {*(held_out // 5).tolist()}
        assert {*(train % 3).tolist()} == {0, 1, 2}
    assert json.loads((tmp_path / "m" / "metrics.json").read_text())["groups"] == report.groups
    assert load_model(tmp_path / "m").manifest["training"]["group_column"] == "patient"
    names = [f"p{k // 7}" for k in range(150)]  # as a list; of one of them images train and others do not
    report = fit_head(cache, tmp_path / "m", clf=clf, groups=names)
    assert report.groups == {"column": "as given", "training": 8, "across_splits": 6}
    assert "6 images of val or test are of groups that train, the first 0050.jpg of p7" in caplog.text
    assert fit_head(cache, tmp_path / "m", clf=clf).groups is None


@pytest.mark.parametrize("none", [None, float("nan"), np.float32("nan"), "", "pandas.NA", "pandas.NaT"])
def test_groups_may_be_numbers_and_what_is_none_stands_alone(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, none: Any
) -> None:
    """0 is a number like any other."""
    if isinstance(none, str) and none:
        none = getattr(pytest.importorskip("pandas"), none.removeprefix("pandas."))
    caplog.set_level("INFO")
    numbers = [none if k % 50 < 4 else k // 10 for k in range(150)]
    report = fit_head(cache, tmp_path / "m", C=1.0, folds=2, groups=numbers)
    names = ["" if k % 50 < 4 else f"p{k // 10}" for k in range(150)]
    assert report.groups == fit_head(cache, tmp_path / "n", C=1.0, folds=2, groups=names).groups
    assert report.groups is not None
    assert report.groups["training"] == 5
    assert (tmp_path / "m" / "head.safetensors").read_bytes() == (tmp_path / "n" / "head.safetensors").read_bytes()
    assert caplog.text.count("4 of 50 training images have no group and stand alone") == 2


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("path,patient\n0000.jpg,a\n", {}, "no row for 49 of 50 images"),
        ("path,patient\n0000.jpg,a\n./0000.jpg,b\n", {}, "line 3: 0000.jpg is listed twice, in the groups 'a' and 'b'"),
        (
            "path,patient\n0000.jpg,a\n",
            {"group_column": "Patents"},
            "no column for --group-column Patents; .*mean patient",
        ),
        ("path,patient\n0000.jpg,a\n", {"group_column": "none"}, "say which, as --group-column patient"),
        ("path,patient\n0000.jpg,a\n", {"group_column": None}, "needs the column"),
        ("0000.jpg,a\n", {}, "has no"),
        (
            "path,patient\n" + "".join(f"{k:04d}.jpg,a\n" for k in range(50)),
            {},
            "classes a, b, c have one training image",
        ),
        (None, {}, "does not exist"),
        (None, {"groups": ["a"] * 7}, "7 names, expected one for each of the 150 images"),
        (None, {"groups": None}, "--group-column patient is of a table"),
    ],
)
def test_groups_that_say_too_little_are_refused(
    cache: Path, tmp_path: Path, text: str | None, options: dict[str, Any], says: str
) -> None:
    if text is not None:
        (tmp_path / "p.csv").write_text(text)
    with pytest.raises(FeatcacheError, match=says):
        fit_head(cache, tmp_path / "m", **({"groups": tmp_path / "p.csv", "group_column": "patient"} | options))
    assert not (tmp_path / "m").exists()


def test_groups_are_given_on_the_command_line(cache: Path, tmp_path: Path, patients: Path, run: Any) -> None:
    flags = ("--no-report", "--C", "1")
    code, out, _ = run(
        "fit-head", cache, "-o", tmp_path / "m", "--groups", patients, "--group-column", "patient", *flags
    )
    assert code == 0 and "    10 groups (patient) in one fold each" in out.splitlines()
    patients.write_text(patients.read_text().replace("path", "Bild"))
    wanted = ("fit-head", cache, "-o", tmp_path / "m", "--groups", patients, "--group-column", "patient")
    assert "--path-column Bild" in run(*wanted, *flags)[2]
    assert run(*wanted, "--path-column", "Bild", *flags)[0] == 0
    assert "--groups TABLE" in run("fit-head", cache, "-o", tmp_path / "m", "--path-column", "Bild", *flags)[2]


def test_classes_without_training_images_are_left_out_and_indices_hold(tmp_path: Path) -> None:
    labels = np.array([0, 2, 3] * 20 + [1, 1])
    make_classes(tmp_path / "f.h5", labels, [1] * 60 + [3] * 2)
    report = fit_head(tmp_path / "f.h5", tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert model.classes == ("a", "c", "d")
    assert (report.classes, report.test_accuracy) == (3, None)
    X, y = FeatureCache.open(tmp_path / "f.h5").split("train")
    names = np.array(model.classes)[model.head.probabilities(X).argmax(1)]
    assert (names == np.array(list("abcd"))[y]).mean() > 0.9


@pytest.mark.parametrize(
    ("labels", "options", "error", "words"),
    [
        ([-1] * 10, {}, SourceError, "no labels"),
        ([0] * 10, {}, SourceError, "one class only"),
        ([0] * 10 + [1], {}, SourceError, "class b has one training image"),
        ([0, 1] * 10, {"clf": "forest"}, UsageError, "unknown clf"),
        ([0, 1] * 10, {"clf": "mlp", "C": 1.0}, UsageError, "C belongs to logreg"),
        ([0, 1] * 10, {"hidden": 8}, UsageError, "hidden belongs to mlp, not to logreg; leave it out"),
        ([0, 1] * 10, {"clf": "linear", "dropout": 0.2}, UsageError, "dropout belongs to mlp, not to linear"),
        ([0, 1] * 10, {"batch_size": 8}, UsageError, "batch_size belongs to linear and mlp, not to logreg"),
        ([0, 1] * 10, {"clf": "mlp", "hidden": [8, 0]}, UsageError, "hidden layer 2 must be a whole number"),
        ([0, 1] * 10, {"clf": "mlp", "hidden": "8"}, UsageError, "hidden layer 1 must"),
        ([0, 1] * 10, {"C": -1.0}, UsageError, "positive"),
        ([0, 1] * 10, {"folds": 1}, UsageError, "folds"),
        ([0, 1] * 10, {"folds": 0}, UsageError, "give --C"),
        ([0, 1] * 10, {"class_weight": "most"}, UsageError, "class weight"),
        ([0, 1] * 10, {"seed": -1}, UsageError, "seed"),
    ],
)
def test_what_cannot_be_trained_is_said(
    tmp_path: Path, labels: list, options: dict, error: type[FeatcacheError], words: str
) -> None:
    make_classes(tmp_path / "f.h5", labels)
    with pytest.raises(error, match=words):
        fit_head(tmp_path / "f.h5", tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_features_that_are_not_finite_are_named(tmp_path: Path) -> None:
    labels = np.arange(20) % 2
    X = make_classes(tmp_path / "f.h5", labels)
    rows = FeatureCache.open(tmp_path / "f.h5").rows
    X[13, 5] = np.nan
    write_cache(tmp_path / "f.h5", rows, [X], dim=CLASSES_DIM, spec=SPEC, classes=("a", "b"))
    with pytest.raises(SourceError, match=r"row 13 \(0013.jpg\)"):
        fit_head(tmp_path / "f.h5", tmp_path / "m")


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads are counted where there is preadv")
@pytest.mark.parametrize("clf", KINDS)
def test_features_are_read_once_to_check_and_once_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clf: Any
) -> None:
    splits = np.repeat([1, 2, 3], [90, 30, 20])
    make_classes(tmp_path / "f.h5", np.arange(140) % 3, splits)
    counts: list[int] = []
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        counts.append(preadv(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    fit_head(tmp_path / "f.h5", tmp_path / "m", clf=clf, C=1.0 if clf == "logreg" else None, folds=0)
    check, train, score = 140, 90, 50
    assert sum(counts) == (check + train + score) * CLASSES_DIM * 2


@pytest.mark.parametrize("use", [lambda model, cache: list(predict(model, [cache])), evaluate])
def test_a_cache_of_another_spec_is_refused_with_the_difference(model: Path, tmp_path: Path, use: Any) -> None:
    spec = dataclasses.replace(SPEC, preprocess=dataclasses.replace(SPEC.preprocess, resize=99))
    make_classes(tmp_path / "g.h5", [0, 1], spec=spec)
    with pytest.raises(SpecMismatchError, match=r"preprocess\.resize: 99 -> 40"):
        use(model, tmp_path / "g.h5")
