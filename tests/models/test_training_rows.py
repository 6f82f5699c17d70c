"""A score never counts silently on images that training has seen."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import CLASSES_DIM, make_classes
from conftest import SPEC

from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.errors import ModelError, SourceError
from featcache.heads.head import FittedHead, Head
from featcache.heads.metrics import accuracy
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.model import load_model, save_model
from featcache.models.predict import predict
from featcache.models.training_rows import Compared, HeldOut, TrainingRows, seen_words

N = 90
LABELS, SPLITS = np.arange(N) % 3, np.repeat([1, 2, 3], 30)


def make_cache(path: Path, contents: list[str], labels: Any = LABELS, splits: Any = SPLITS) -> FeatureCache:
    """Overlapping classes; rows of equal content have equal features and digests."""
    X = make_classes(path, labels, splits, spread=4.0)
    first = [contents.index(content) for content in contents]
    digests = np.stack([np.frombuffer(hashlib.sha256(content.encode()).digest(), np.uint8) for content in contents])
    rows = dataclasses.replace(FeatureCache.open(path).rows, digests=digests)
    write_cache(path, rows, [X[first]], dim=CLASSES_DIM, spec=SPEC, classes=("a", "b", "c"))
    return FeatureCache.open(path)


def own(n: int = N) -> list[str]:
    return [f"image {k}" for k in range(n)]


def test_leaked_rows_are_counted_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = own()
    contents[30:42] = contents[:12]  # of val, the same labels
    cache = make_cache(tmp_path / "f.h5", contents)
    report = fit_head(cache.path, tmp_path / "m")
    assert report.copies == {"within": 0, "across_splits": 12, "across_labels": 0}
    assert (
        "12 images of val or test are copies of what an earlier split holds, the first 0030.jpg of 0000.jpg"
        in caplog.text
    )
    head = load_model(tmp_path / "m").head
    new = np.arange(42, 60)
    assert report.val_accuracy == accuracy(LABELS[30:60], head.probabilities(cache.X[30:60]))
    assert report.val_accuracy_without_copies == accuracy(LABELS[new], head.probabilities(cache.X[new]))
    assert report.test_accuracy_without_copies == report.test_accuracy
    scores = evaluate(tmp_path / "m", cache.path, split="val")
    assert scores["copies"] == {"within": 0, "across_splits": 12, "across_labels": 0}
    assert scores["accuracy_without_copies"] == report.val_accuracy_without_copies
    assert "training has seen 12 of the 30 images, the first 0030.jpg" in caplog.text
    with caplog.at_level("INFO", "featcache"):
        list(predict(tmp_path / "m", [cache.path]))
    assert "training has seen 42 of these 90 images, the first 0000.jpg" in caplog.text


@pytest.mark.parametrize(
    ("count", "n", "words"),
    [
        (12, 30, "training has seen 12 of these 30 images, the first a.jpg"),
        (1, 30, "training has seen 1 of these 30 images, a.jpg"),
        (1, 1, "training has seen the only image, a.jpg"),
    ],
)
def test_how_it_is_said(count: int, n: int, words: str) -> None:
    assert seen_words(count, n, "a.jpg") == words


def test_where_all_are_copies_there_is_no_score_without(tmp_path: Path) -> None:
    contents = own()
    contents[30:60] = contents[:30]
    report = fit_head(make_cache(tmp_path / "f.h5", contents).path, tmp_path / "m")
    assert report.val_accuracy is not None
    assert report.val_accuracy_without_copies is None


def test_several_labels_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = own()
    contents[4] = contents[0]
    report = fit_head(make_cache(tmp_path / "f.h5", contents).path, tmp_path / "m")
    assert report.copies == {"within": 1, "across_splits": 0, "across_labels": 1}
    assert "1 image lies under several labels, the first as 0000.jpg and as 0004.jpg" in caplog.text


def test_folds_count_different_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = np.repeat([0, 1, 2], [20, 20, 6])
    contents = own(46)
    contents[41:46] = [contents[40]] * 3 + [contents[45]] * 2
    cache = make_cache(tmp_path / "f.h5", contents, labels, np.ones(46, int))
    with caplog.at_level("INFO", "featcache"):
        fit_head(cache.path, tmp_path / "m")
    assert "folds: 2 instead of 5, the smallest class has that many training images, copies not counted" in caplog.text
    contents[40:46] = [contents[40]] * 6
    cache = make_cache(tmp_path / "g.h5", contents, labels, np.ones(46, int))
    with pytest.raises(SourceError, match="class c has one training image, copies not counted"):
        fit_head(cache.path, tmp_path / "n")


@pytest.mark.parametrize("clf", ["logreg", pytest.param("linear", marks=pytest.mark.slow)])
def test_training_rows_travel_with_the_model(tmp_path: Path, clf: Any) -> None:
    cache = make_cache(tmp_path / "f.h5", own())
    report = fit_head(cache.path, tmp_path / "m", clf=clf)
    rows = load_model(tmp_path / "m").training_rows()
    assert rows is not None and rows.logits is not None
    assert (rows.digests == cache.rows.digests[:30]).all() and (rows.labels == LABELS[:30]).all()
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    right = rows.logits.argmax(axis=1) == rows.labels
    assert metrics["cv_accuracy_uncorrected"] == pytest.approx(right.mean())  # folds of equal size
    assert metrics["cv_accuracy"] == report.cv_accuracy
    assert report.cv_log_loss is not None


def test_damaged_training_rows_are_refused_and_older_models_know_none(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "f.h5", own())
    fit_head(cache.path, tmp_path / "m")
    file = tmp_path / "m" / "training.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="training.safetensors is not the file that was saved"):
        evaluate(tmp_path / "m", cache.path)
    model = load_model(tmp_path / "m")
    del model.manifest["training_rows"]
    scores = evaluate(model, cache.path)
    assert scores["accuracy_without_copies"] is None
    assert scores["copies"] == {"within": 0, "across_splits": None, "across_labels": 0}


DAMAGE: dict[str, dict[str, Any]] = {
    "label beyond": {"labels": np.array([0, 1, 7])},
    "label below": {"labels": np.array([0, 1, -2])},
    "not finite": {"logits": np.array([[0, 1], [np.nan, 0], [1, 0]])},
    "too many classes": {"logits": np.zeros((3, 5))},
    "no rows": {"digests": np.empty((0, 32), np.uint8), "labels": np.empty(0, np.int64), "logits": np.empty((0, 2))},
}


@pytest.mark.parametrize("where", ["rows", "held_out"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_rows_that_do_not_fit_the_classes_are_damage(tmp_path: Path, kind: str, where: str) -> None:
    """As of a file that was made by somebody else, with its checksum."""
    digests = np.random.default_rng(0).integers(0, 256, (3, 32), np.uint8)
    good: dict[str, Any] = {"digests": digests, "labels": np.array([0, 1, 0]), "logits": np.zeros((3, 2))}
    if where == "rows":
        rows = TrainingRows(**good | DAMAGE[kind])
    else:
        rows = TrainingRows(digests, good["labels"], held_out=HeldOut(**good | DAMAGE[kind]))
    head = FittedHead(Head("logreg", "none", np.zeros(3), np.ones(3), ((np.zeros((2, 3)), np.zeros(2)),)), (), {}, [])
    facts: dict[str, Any] = {"spec": SPEC, "weights": {"source": "x"}, "training": {}, "metrics": {}}
    save_model(tmp_path / "m", head, classes=("a", "b"), rows=rows, **facts)
    with pytest.raises(ModelError, match="its scores do not fit its 2 classes"):
        load_model(tmp_path / "m").training_rows()
    save_model(tmp_path / "n", head, classes=("a", "b"), rows=TrainingRows(**good), **facts)
    assert load_model(tmp_path / "n").training_rows() is not None


def test_held_out_rows_travel_along_and_count_once() -> None:
    """They take the place of out-of-fold logits, trained nothing, and a file without them is as it was."""
    rng = np.random.default_rng(0)
    digests, logits = rng.integers(0, 256, (9, 32), np.uint8), rng.normal(size=(9, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, -1, 0, 1, 2, 0, 1])
    plain = TrainingRows(digests[:4], labels[:4], logits[:4])
    assert b"held_out" not in plain.to_bytes()
    found = TrainingRows.from_bytes(plain.to_bytes()).unseen()
    assert found is not None and found.labels.tolist() == [0, 1, 2]  # -1 is no label
    repeated = np.array([4, 5, 4, 6, 5])
    held_out = HeldOut(digests[repeated], labels[repeated], logits[repeated])
    rows = TrainingRows.from_bytes(dataclasses.replace(plain, held_out=held_out).to_bytes())
    assert not rows.contain(digests[4:]).any() and rows.contain(digests[:4]).all()
    found = rows.unseen()
    assert found is not None and (found.logits == logits[[4, 5, 6]]).all() and found.labels.tolist() == [0, 1, 2]
    assert TrainingRows(digests, labels).unseen() is None
    for changes, words in (
        ({"digests": digests[:2]}, "of held-out rows"),
        ({"logits": logits[:2]}, "logits of other rows"),
    ):
        broken = dataclasses.replace(plain, held_out=dataclasses.replace(held_out, **changes))
        with pytest.raises(ModelError, match=words):
            TrainingRows.from_bytes(broken.to_bytes())


def test_answers_of_two_models_survive_and_are_checked() -> None:
    answers = np.arange(4, dtype=np.int64)
    compared = Compared(np.arange(128, dtype=np.uint8).reshape(4, 32), answers, answers[::-1].copy(), answers + 1)
    rows = TrainingRows(np.ones((2, 32), np.uint8), np.zeros(2, np.int64), compared=compared)
    again = TrainingRows.from_bytes(rows.to_bytes()).compared
    assert again is not None
    assert all(np.array_equal(value, getattr(again, name)) for name, value in vars(compared).items())
    for change in ({"head": answers[:3]}, {"tuned": answers.astype(np.int32)}, {"labels": answers.reshape(2, 2)}):
        damaged = dataclasses.replace(rows, compared=dataclasses.replace(compared, **change)).to_bytes()
        with pytest.raises(ModelError, match="answers of other rows"):
            TrainingRows.from_bytes(damaged)
