"""From a cache to a saved model and back: what is chosen on which rows, and what a model folder admits."""

import json
import os
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import SPEC

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Rows, encode_names
from featcache.cache.write import write_cache
from featcache.errors import FeatcacheError, ModelError, SourceError, SpecMismatchError, UsageError
from featcache.heads.head import KINDS
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.models.predict import predict
from featcache.spec import fingerprint_of

D = 12


def make_cache(
    path: Path, labels: Any, splits: Any = None, *, seed: int = 0, spread: float = 1.0, **changes: Any
) -> np.ndarray:
    """A cache of overlapping Gaussian classes a, b, c, ..."""
    labels = np.asarray(labels)
    n = len(labels)
    centres = np.random.default_rng(1).normal(0, 2, (6, D))
    X = (centres[labels] + np.random.default_rng(seed).normal(0, spread, (n, D))).astype(np.float16)
    rows = Rows(
        paths=encode_names(f"{k:04d}.jpg" for k in range(n)),
        labels=labels.astype(np.int32),
        splits=np.zeros(n, np.uint8) if splits is None else np.asarray(splits, np.uint8),
        digests=np.zeros((n, 32), np.uint8),
        sizes=np.zeros(n, np.int64),
        mtimes=np.zeros(n, np.int64),
    )
    classes = tuple("abcdef"[: max(labels.max() + 1, 1)])
    provenance = {"weights": {"source": "torchvision", "reload": "IMAGENET1K_V1"}}
    write_cache(path, rows, [X], **({"dim": D, "spec": SPEC, "classes": classes, "provenance": provenance} | changes))
    return X


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    labels = np.arange(150) % 3
    make_cache(tmp_path / "f.h5", labels, 1 + np.arange(150) // 50 % 3)
    return tmp_path / "f.h5"


@pytest.mark.parametrize("clf", KINDS)
def test_only_training_rows_train_and_the_others_are_scored(tmp_path: Path, clf: Any) -> None:
    labels, splits = np.arange(150) % 3, 1 + np.arange(150) // 50
    X = make_cache(tmp_path / "f.h5", labels, splits)
    report = fit_head(tmp_path / "f.h5", tmp_path / "m", clf=clf)
    assert (report.classes, report.n_train) == (3, 50)
    assert report.cv_accuracy is not None
    assert report.cv_accuracy > 0.9
    wrong = labels.copy()
    wrong[splits != 1] = (labels[splits != 1] + 1) % 3  # other val and test labels must not change the head
    make_cache(tmp_path / "g.h5", labels, splits)
    other = FeatureCache.open(tmp_path / "g.h5").rows
    rows = Rows(**(vars(other) | {"labels": wrong.astype(np.int32)}))
    write_cache(tmp_path / "g.h5", rows, [X], dim=D, spec=SPEC, classes=("a", "b", "c"))
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


def test_without_splits_every_labelled_row_trains(tmp_path: Path) -> None:
    make_cache(tmp_path / "f.h5", [*([0, 1] * 20), -1, -1])
    report = fit_head(tmp_path / "f.h5", tmp_path / "m")
    assert (report.n_train, report.val_accuracy, report.test_accuracy) == (40, None, None)


def test_three_ways_to_probabilities_agree(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m")
    X = FeatureCache.open(cache).X
    from_pipeline = joblib.load(tmp_path / "m" / "head.joblib").predict_proba(X.astype(np.float64))
    from_tensors = load_model(tmp_path / "m").head.probabilities(X)
    from_predict = np.stack([p.probabilities for p in predict(tmp_path / "m", [cache])])
    np.testing.assert_allclose(from_tensors, from_pipeline, atol=1e-9)
    np.testing.assert_array_equal(from_predict, from_tensors)


def test_classes_without_training_images_are_left_out_and_indices_hold(tmp_path: Path) -> None:
    labels = np.array([0, 2, 3] * 20 + [1, 1])
    make_cache(tmp_path / "f.h5", labels, [1] * 60 + [3] * 2)
    report = fit_head(tmp_path / "f.h5", tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert model.classes == ("a", "c", "d")
    assert (report.classes, report.test_accuracy) == (3, None)
    X, y = FeatureCache.open(tmp_path / "f.h5").split("train")
    names = np.array(model.classes)[model.head.probabilities(X).argmax(1)]
    assert (names == np.array(list("abcd"))[y]).mean() > 0.9


def test_evaluate_matches_classes_by_name(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m")
    direct = evaluate(tmp_path / "m", cache, split="test")
    # the same rows, but their classes are b, c only and so have other numbers
    opened = FeatureCache.open(cache)
    keep = np.flatnonzero((opened.rows.splits == 3) & (opened.y > 0))
    rows = Rows(**{name: getattr(opened.rows, name)[keep] for name in vars(opened.rows)})
    rows = Rows(**(vars(rows) | {"labels": rows.labels - 1}))
    write_cache(tmp_path / "g.h5", rows, [opened.X[keep]], dim=D, spec=SPEC, classes=("b", "c"))
    fewer = evaluate(tmp_path / "m", tmp_path / "g.h5")
    assert (direct["split"], fewer["split"]) == ("test", "test")
    for name in "bc":
        assert fewer["per_class"][name]["recall"] == direct["per_class"][name]["recall"]
    write_cache(tmp_path / "h.h5", rows, [opened.X[keep]], dim=D, spec=SPEC, classes=("b", "zebra"))
    with pytest.raises(SourceError, match="zebra, which the model does not know"):
        evaluate(tmp_path / "m", tmp_path / "h.h5")


@pytest.mark.parametrize(
    ("labels", "options", "error", "words"),
    [
        ([-1] * 10, {}, SourceError, "no labels"),
        ([0] * 10, {}, SourceError, "one class only"),
        ([0] * 10 + [1], {}, SourceError, "class b has one training image"),
        ([0, 1] * 10, {"clf": "forest"}, UsageError, "unknown clf"),
        ([0, 1] * 10, {"clf": "mlp", "C": 1.0}, UsageError, "C belongs to logreg"),
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
    make_cache(tmp_path / "f.h5", labels)
    with pytest.raises(error, match=words):
        fit_head(tmp_path / "f.h5", tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_features_that_are_not_finite_are_named(tmp_path: Path) -> None:
    labels = np.arange(20) % 2
    X = make_cache(tmp_path / "f.h5", labels)
    rows = FeatureCache.open(tmp_path / "f.h5").rows
    X[13, 5] = np.nan
    write_cache(tmp_path / "f.h5", rows, [X], dim=D, spec=SPEC, classes=("a", "b"))
    with pytest.raises(SourceError, match=r"row 13 \(0013.jpg\)"):
        fit_head(tmp_path / "f.h5", tmp_path / "m")


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads are counted where there is preadv")
@pytest.mark.parametrize("clf", KINDS)
def test_features_are_read_once_to_check_and_once_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clf: Any
) -> None:
    splits = np.repeat([1, 2, 3], [90, 30, 20])
    make_cache(tmp_path / "f.h5", np.arange(140) % 3, splits)
    counts: list[int] = []
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        counts.append(preadv(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    fit_head(tmp_path / "f.h5", tmp_path / "m", clf=clf, C=1.0 if clf == "logreg" else None, folds=0)
    check, train, score = 140, 90, 50
    assert sum(counts) == (check + train + score) * D * 2


# ------------------------------------------------------------------------------------------------ model folder


def test_loading_executes_nothing(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m")

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    joblib.dump(Bomb(), tmp_path / "m" / "head.joblib")
    assert evaluate(tmp_path / "m", cache)["accuracy"] > 0.8
    assert not (tmp_path / "exploded").exists()


def tamper(manifest: dict[str, Any], how: str) -> None:
    if how == "version":
        manifest["version"] = 2
    elif how == "format":
        manifest["format"] = "other"
    elif how == "classes":
        manifest["classes"] = manifest["classes"][::-1]
    elif how == "spec":
        manifest["spec"]["preprocess"]["resize"] = 41


@pytest.mark.parametrize("how", ["version", "format", "classes", "spec"])
def test_a_changed_manifest_is_refused(cache: Path, tmp_path: Path, how: str) -> None:
    fit_head(cache, tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "model.json").read_text())
    tamper(manifest, how)
    (tmp_path / "m" / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.json", "head.safetensors"])
def test_damaged_and_missing_files_are_refused(cache: Path, tmp_path: Path, name: str) -> None:
    fit_head(cache, tmp_path / "m")
    path = tmp_path / "m" / name
    data = path.read_bytes()
    for broken in (b"", data[:-2], data[:40] + bytes([data[40] ^ 1]) + data[41:]):
        path.write_bytes(broken)
        with pytest.raises(ModelError):
            load_model(tmp_path / "m")
    path.unlink()
    with pytest.raises(ModelError):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("reload", ["/etc/passwd", "w.pth", 7])
def test_a_model_cannot_name_a_file_to_read(cache: Path, tmp_path: Path, reload: Any) -> None:
    fit_head(cache, tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "model.json").read_text())
    manifest["weights"]["reload"] = reload
    del manifest["sha256"]
    manifest["sha256"] = fingerprint_of(manifest)
    (tmp_path / "m" / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(FeatcacheError, match="no library provides"):
        load_model(tmp_path / "m").load_backbone()


def test_a_cache_of_another_spec_is_refused_with_the_difference(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m")
    spec = SPEC | {"preprocess": SPEC["preprocess"] | {"resize": 99}}
    make_cache(tmp_path / "g.h5", [0, 1], spec=spec)
    for use in (
        lambda: list(predict(tmp_path / "m", [tmp_path / "g.h5"])),
        lambda: evaluate(tmp_path / "m", tmp_path / "g.h5"),
    ):
        with pytest.raises(SpecMismatchError, match=r"preprocess\.resize: 99 -> 40"):
            use()


def test_a_head_only_model_is_replaced_and_nothing_else_is(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m", C=1.0)
    fit_head(cache, tmp_path / "m", C=2.0)
    assert load_model(tmp_path / "m").manifest["training"]["C"] == 2.0
    (tmp_path / "link").symlink_to(tmp_path / "m")
    fit_head(cache, tmp_path / "link", C=3.0)
    assert (tmp_path / "link").is_symlink()
    assert load_model(tmp_path / "m").manifest["training"]["C"] == 3.0
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name in ("m", "mine", "file"):
        with pytest.raises(ModelError, match="choose another -o"):
            fit_head(cache, tmp_path / name)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.h5", "file", "link", "m", "mine"]


def test_a_replacement_cut_off_between_its_renames_is_undone(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m", C=1.0)
    (tmp_path / "m").rename(tmp_path / ".m.replaced")
    assert load_model(tmp_path / "m").manifest["training"]["C"] == 1.0
