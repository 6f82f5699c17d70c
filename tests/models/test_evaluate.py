"""The rows of an evaluation: one per labelled image, saying what ``predict`` says, and what is true."""

from pathlib import Path

import numpy as np
import pytest
from caches import make_classes
from conftest import TINY, make_photos
from sklearn import metrics as sklearn_metrics

import featcache
from featcache.errors import BackboneError, SourceError, UsageError
from featcache.extraction.extract import extract
from featcache.heads.confident import wrong_labels
from featcache.heads.head import softmax
from featcache.models.evaluate import evaluate, scores_of
from featcache.models.fit import fit_head
from featcache.models.limits import Limits
from featcache.models.model import load_model
from featcache.models.predict import predict
from featcache.models.scoring import score_cache
from featcache.reports.model_report.report import report_beside
from featcache.reports.scores import evaluation_lines

OF_PREDICT = ["path", "label", "probability", "status", "reason"]
OWN = ["true_label", "true_probability", "correct", "seen"]


@pytest.mark.parametrize("split", ["val", "all"])
def test_rows_add_up_to_the_scores(tmp_path: Path, split: str) -> None:
    make_classes(tmp_path / "f.h5", np.arange(150) % 3, 1 + np.arange(150) // 75, spread=3.0)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    scores = evaluate(tmp_path / "m", tmp_path / "f.h5", split=split, rows=True)
    rows = list(scores["rows"])
    assert list(scores["rows"]) == []  # an iterator, which keeps nothing
    assert "rows" not in evaluate(tmp_path / "m", tmp_path / "f.h5", split=split)
    assert np.mean([row["correct"] for row in rows]) == scores["accuracy"] < 1
    losses = -np.log(np.clip([row["true_probability"] for row in rows], 1e-12, 1))
    assert losses.mean() == pytest.approx(scores["log_loss"], rel=1e-3)
    pairs = [(row["true_label"], row["label"]) for row in rows]
    assert [[pairs.count((true, label)) for label in "abc"] for true in "abc"] == scores["confusion"]
    assert all(row["correct"] == (row["label"] == row["true_label"]) for row in rows)
    assert [row["path"] for row in rows if not row["seen"]] == [f"{k:04d}.jpg" for k in range(75, 150)]


def test_rows_can_be_joined_with_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same paths and the same columns, of images and of a cache; what was refused is there, with its reason."""
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"), each=4, splits=("train", "test"))
    (Path("photos") / "test" / "red" / "bad.jpg").write_text("no image")
    (Path("photos") / "test" / "red" / "link.jpg").symlink_to("/etc/hostname")
    extract("photos", "f.h5", TINY)
    fit_head("f.h5", "m", C=1.0)
    for source in ("photos", "f.h5"):
        scores = evaluate("m", source, split="all", rows=True)
        rows = {row["path"]: row for row in scores["rows"]}
        assert {tuple(row) for row in rows.values()} == {(*OF_PREDICT, *OWN)}
        predicted = [prediction.to_row() for prediction in predict("m", source)]
        assert {path: {name: row[name] for name in OF_PREDICT} for path, row in rows.items()} == {
            row["path"]: row for row in predicted
        }
        assert len(predicted) == len(rows) == scores["n"] + scores["refused"] == 24 + 2
        assert sum(row["status"] == "refused" for row in rows.values()) == scores["refused"]
    rows = {row["path"]: row for row in evaluate("m", "photos", split="test", rows=True)["rows"]}
    bad = rows["photos/test/red/bad.jpg"]
    assert [bad[name] for name in OWN] == ["red", None, None, None]
    assert "photos/test/red/link.jpg" not in rows  # its split is not known


def test_refused_images_of_unknown_split_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refused = {"refused": (("a.jpg", "empty file"), ("b.jpg", "empty file"))}
    make_classes(tmp_path / "f.h5", np.arange(60) % 3, np.repeat([1, 3], 30), **refused)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    with caplog.at_level("INFO"):
        scores = evaluate(tmp_path / "m", tmp_path / "f.h5")
    assert (scores["refused"], scores["refused_of_unknown_split"]) == (0, 2)
    assert (
        "2 refused images are not counted: which split they are of is not known; --split all lists them" in caplog.text
    )
    assert evaluation_lines(scores, "abc")[0] == "30 images (test), refused 0, and 2 of a split that is not known"
    everything = evaluate(tmp_path / "m", tmp_path / "f.h5", split="all")
    assert (everything["refused"], everything["refused_of_unknown_split"]) == (2, 0)
    page = tmp_path / "p.html"
    featcache.report(tmp_path / "m", tmp_path / "f.h5", output=page)
    assert (
        "2 refused images are not on this page: which split they are of is not known. --split all shows them."
        in page.read_text()
    )


def test_the_name_of_no_split_is_refused_before_anything_is_listed(
    photos: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        for call in (evaluate, featcache.report):
            with pytest.raises(UsageError, match="^unknown split 'tset'; choose train, val, test or all"):
                call(model, photos, split="tset")
        with pytest.raises(UsageError, match="^--map pca needs embeddings"):
            featcache.report(model, photos, map="pca")
        with pytest.raises(BackboneError, match="no backbone is called 'resnet99'"):
            featcache.preview(photos, backbone="resnet99")
    assert not caplog.messages


def test_a_model_of_an_earlier_version_does_not_know_what_it_has_seen(model: Path, cache: Path) -> None:
    older = load_model(model)
    del older.manifest["training_rows"]
    assert {row["seen"] for row in evaluate(older, cache, split="train", rows=True)["rows"]} == {None}
    assert {row["seen"] for row in evaluate(model, cache, split="train", rows=True)["rows"]} == {True}


@pytest.mark.parametrize("abstain", [None, 0.9])
def test_scores_are_the_same_where_probabilities_are_not_kept(tmp_path: Path, abstain: float | None) -> None:
    """Oracles: all probabilities at once, and scikit-learn. 5,000 rows are three blocks, the last one shorter."""
    y = np.arange(5000) % 6
    make_classes(tmp_path / "f.h5", y, 1 + (np.arange(5000) >= 500), spread=3.0)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    model, cache = load_model(tmp_path / "m"), featcache.FeatureCache.open(tmp_path / "f.h5")
    limits = Limits.of(model, coverage=None if abstain else 0.9, abstain_below=abstain)
    kept, computed = (
        score_cache(model, cache, split="val", limits=limits, most=most) for most in (4500 * 6, 4500 * 6 - 1)
    )
    assert isinstance(kept.probabilities, np.ndarray) and not isinstance(computed.probabilities, np.ndarray)
    p, seen = model.head.probabilities(cache.X[500:]), np.zeros(4500, bool)
    np.testing.assert_allclose(computed.probabilities[np.array([4, 4000, 7])], p[[4, 4000, 7]], rtol=1e-6)
    expected, scores = (scores_of(model, scored, limits, seen=seen) for scored in (kept, computed))
    assert scores == expected and 0 < scores["accuracy"] < 1
    assert scores["label_suspects"] == len(wrong_labels(y[500:], p))
    assert scores["accuracy"] == (p.argmax(axis=1) == y[500:]).mean()
    before = softmax(computed.temperature * np.log(p))
    for way, values in (("before", before), ("after", p)):
        found = sklearn_metrics.log_loss(y[500:], values)
        assert scores["calibration"][way]["log_loss"] == pytest.approx(found, rel=1e-4)
    inside = p.max(axis=1) >= 0.9 if abstain else limits.sets.contain(p).sum(axis=1) == 1
    assert scores["answered"]["n"] == inside.sum()
    if not abstain:
        assert scores["coverage"]["reached"] == limits.sets.contain(p)[np.arange(4500), y[500:]].mean()


def test_classes_that_only_val_has_are_left_out_as_fit_head_left_them_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same rows, and a page of them; of another source they are a mix-up, and refused."""
    labels, splits = np.arange(150) % 3, np.where(np.arange(150) < 100, 1, 2)
    labels[110:120] = 3
    make_classes(tmp_path / "f.h5", labels, splits, spread=4.0)
    report = fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    warning = "10 of 50 val images have no label that training knows and are not scored"
    assert warning in caplog.text
    caplog.clear()
    scores = evaluate(tmp_path / "m", tmp_path / "f.h5", split="val", rows=True)
    assert warning in caplog.text
    assert (scores["n"], scores["accuracy"]) == (40, report.val_accuracy)
    assert [row["path"] for row in scores["rows"]] == [f"{k:04d}.jpg" for k in (*range(100, 110), *range(120, 150))]
    assert any(path.suffix == ".html" for path in report_beside(tmp_path / "m", cache=tmp_path / "f.h5"))
    labels[100:] = 3
    make_classes(tmp_path / "g.h5", labels, splits)
    fit_head(tmp_path / "g.h5", tmp_path / "n", C=1.0)
    with pytest.raises(SourceError, match=r"images of d, which the model does not know"):
        evaluate(tmp_path / "n", tmp_path / "g.h5", split="val")
