"""In scikit-learn's hands: its own checks of estimators; ``extract`` and ``fit_head`` as oracles, and its logistic regression."""

import doctest
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_classes
from conftest import TINY, make_photos
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

import featcache.sklearn
from featcache.backbones.embedder import Embedder
from featcache.backbones.load import load_backbone
from featcache.cache.cache import FeatureCache
from featcache.errors import BackboneError, FeatcacheError, SourceError, SpecMismatchError, UsageError
from featcache.extraction.extract import extract
from featcache.images.source import list_images
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.sklearn import FeatureExtractor, HeadClassifier

TINY_SETTINGS: dict[str, Any] = {name: getattr(TINY, name) for name in vars(TINY)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ of three classes, among them one twice, f.h5 and a model m/ of them."""
    folder = tmp_path_factory.mktemp("made")
    make_photos(folder / "photos", each=8)
    shutil.copy(folder / "photos" / "red" / "00.jpg", folder / "photos" / "red" / "copy.jpg")
    extract(folder / "photos", folder / "f.h5", TINY)
    fit_head(folder / "f.h5", folder / "m")
    return folder


@pytest.fixture
def images(made: Path) -> tuple[list[str], list[str]]:
    """Paths, and names of classes."""
    found = list_images(made / "photos")
    return [str(found.root / path) for path in found.paths], [found.classes[label] for label in found.labels]


def tiny(**changes: Any) -> FeatureExtractor:
    return FeatureExtractor(**(TINY_SETTINGS | changes))


def kept_rows(folder: Path) -> list[int]:
    """How many embeddings were made, for each spec."""
    return sorted(sum(len(FeatureCache.open(part)) for part in each.glob("*.h5")) for each in folder.glob("*.parts"))


class OfRows(FeatureExtractor):
    """Rows of numbers, as scikit-learn's checks have them, as pictures."""

    def fit(self, X: Any, y: Any = None) -> "OfRows":
        return super().fit(self._pictures(validate_data(self, X)))

    def transform(self, X: Any) -> Any:
        check_is_fitted(self)
        return super().transform(self._pictures(validate_data(self, X, reset=False)))

    def _pictures(self, X: Any) -> list[Any]:
        return [np.resize(np.uint8(128 + 127 * np.tanh(row)), (8, 8, 3)) for row in X]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array = True, False
        return tags


@pytest.mark.parametrize(
    "estimator",
    [
        HeadClassifier(C=1.0, folds=2),
        pytest.param(OfRows(**(TINY_SETTINGS | {"resize": 32})), marks=pytest.mark.slow),
        pytest.param(HeadClassifier(), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_all_of_scikit_learns_checks_pass(estimator: Any) -> None:
    results = check_estimator(estimator, on_skip=None, on_fail="raise")
    assert len(results) > 40
    assert {each["check_name"] for each in results if each["status"] != "passed"} <= {"check_array_api_input"}  # opt-in


@pytest.mark.parametrize("kept", [False, True])
def test_embeddings_are_those_of_extract_to_the_bit(made: Path, images: Any, tmp_path: Path, kept: bool) -> None:
    (X, _), cache = images, FeatureCache.open(made / "f.h5")
    extractor = tiny(cache=tmp_path / "kept" if kept else None)
    found = extractor.fit_transform(X)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, cache.X)
    assert (extractor.spec_, extractor.fingerprint_) == (cache.spec, cache.fingerprint)
    for rows in ([3], [20, 1, 7, 20]):  # whatever lies beside it, in any order
        np.testing.assert_array_equal(extractor.transform([X[k] for k in rows]), cache.X[rows])
    opened = [Image.open(path) for path in X]
    np.testing.assert_array_equal(extractor.transform(opened), cache.X)
    pixels = [np.asarray(image) for image in opened]
    np.testing.assert_array_equal(extractor.transform(np.stack(pixels)), extractor.transform(pixels))
    backbone = load_backbone("squeezenet1_1", "none", size=(32, 32))
    assert extractor.n_features_out_ == backbone.dim == found.shape[1]


def test_float32_embeddings_are_those_of_the_embedder(made: Path, images: Any) -> None:
    files = list_images(made / "photos")
    embedder = Embedder.prepare(load_backbone("squeezenet1_1", "none", size=(32, 32)), files, precision="fp32")
    expected = np.concatenate([batch.features for batch in embedder.embed(files)])
    extractor = FeatureExtractor("squeezenet1_1", weights="none", crop=32, precision="fp32", dtype="float32")
    np.testing.assert_array_equal(extractor.fit_transform(images[0]), expected)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_grid_search_embeds_each_image_once(images: Any, tmp_path: Path, jobs: int) -> None:
    X, y = images
    pipeline = make_pipeline(tiny(cache=tmp_path), HeadClassifier(C=1.0, folds=2))
    grid = {"headclassifier__C": [0.01, 1.0], "featureextractor__crop": np.array([32, 40])}
    search = GridSearchCV(pipeline, grid, cv=3, n_jobs=jobs).fit(X, y)
    assert search.best_score_ > 0.9
    assert kept_rows(tmp_path) == [len(X) - 1] * 2  # of the copy it is the same
    assert cross_val_score(search.best_estimator_, X, y, cv=3, n_jobs=jobs).mean() > 0.9
    assert kept_rows(tmp_path) == [len(X) - 1] * 2


def test_what_is_kept_needs_no_backbone(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny(cache=tmp_path).fit_transform(images[0])
    monkeypatch.setattr(FeatureExtractor, "_embedder", None)
    np.testing.assert_array_equal(tiny(cache=tmp_path).fit_transform(images[0][::-1]), first[::-1])


def test_pipelines_with_memory_names_and_frames(images: Any, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    X, y = images
    pipeline = make_pipeline(tiny(), HeadClassifier(C=1.0), memory=str(tmp_path))
    proba = pipeline.fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(clone(pipeline).fit(X, y).predict_proba(X), proba)
    assert "FeatureExtractor" in pipeline._repr_html_()
    extractor = pipeline[0].set_output(transform="pandas")
    frame = extractor.transform(pandas.Series(X, index=range(5, 5 + len(X))))
    assert list(frame.columns) == list(extractor.get_feature_names_out())
    assert (frame.columns[0], frame.index[0], frame.shape) == ("featureextractor0", 5, (len(X), 512))
    head = HeadClassifier(C=1.0).fit(frame, y)
    assert list(head.feature_names_in_) == list(frame.columns)


def test_a_pickle_holds_no_weights_and_refuses_others(images: Any, tmp_path: Path) -> None:
    X, _ = images
    from featcache.backbones.backbone import save_weights

    backbone, weights = load_backbone("squeezenet1_1", "none"), tmp_path / "w.safetensors"
    save_weights(backbone, weights)
    extractor = tiny(weights=weights)
    before = extractor.fit_transform(X)
    pickled = pickle.dumps(extractor)
    assert len(pickled) < 5000
    np.testing.assert_array_equal(pickle.loads(pickled).transform(X), before)
    next(iter(backbone.module.parameters())).data.mul_(1.5)
    weights.unlink()
    save_weights(backbone, weights)
    with pytest.raises(SpecMismatchError, match="weights_sha256"):
        pickle.loads(pickled).transform(X)
    weights.unlink()
    with pytest.raises(BackboneError, match="does not exist"):
        pickle.loads(pickled).transform(X)
    with pytest.raises(SpecMismatchError, match=r"crop: .*32.* -> .*40"):  # changed, and not fitted again
        tiny(resize=40).fit(X).set_params(crop=40).transform(X)


def test_an_image_that_cannot_be_embedded(images: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("no image")
    X = [images[0][0], tmp_path / "x.jpg", images[0][1], tmp_path / "missing.jpg", tmp_path / "x.jpg"]
    for cache in (None, tmp_path / "kept"):
        extractor = tiny(cache=cache).fit(X)
        with pytest.raises(SourceError, match=r"3 of 5 images.* X\[1\] \(.*x.jpg\): not an image"):
            extractor.transform(X)
        found = extractor.set_params(on_refused="nan").transform(X)
        assert (
            np.isnan(found).all(axis=1).tolist()
            == np.isnan(found).any(axis=1).tolist()
            == [False, True, False, True, True]
        )
        with pytest.raises(ValueError, match="Input X contains NaN"):
            HeadClassifier().fit(found, list("ababa"))
    with pytest.raises(SourceError, match="no image of X can be embedded, the first X"):
        tiny().fit(X[3:])


@pytest.mark.parametrize(
    ("X", "sentence"),
    [
        ([], "X is empty"),
        ("photos", "X is one path"),
        (["."], "is not one image"),
        (["table.csv"], "is not one image"),
        (None, "expected a list"),
        (iter(["x.jpg"]), r"X is a list_iterator, expected a list, .*; give list\(X\)$"),
        ({"a", "b"}, "expected a list"),
        ({"x.jpg": 1}, "give paths"),
        (["x.jpg", 3], r"X\[1\] is a int"),
        (np.zeros((3, 4)), "of float64"),
        (np.zeros((4, 5, 3), np.uint8), "X is one image"),
        ([np.zeros((2, 4, 5, 3), np.uint8)], "array of 2 images"),
        (Image.new("RGB", (3, 3)), "X is one image"),
    ],
)
def test_what_is_no_list_of_images_is_refused(
    X: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("path\nx.jpg\n")
    with pytest.raises(FeatcacheError, match=sentence):
        tiny().fit(X)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": "a"},
        {"crop": 32.5},
        {"resize": [40, "b"]},
        {"workers": 0},
        {"batch_size": 1.5},
        {"on_refused": "skip"},
        {"dtype": "float64"},
        {"device": "tpu"},
        {"layers": 0},
    ],
)
def test_impossible_settings_are_refused_at_fit(images: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", ".")):
        tiny(**wrong).fit(images[0])


@pytest.mark.parametrize(
    ("options", "classes"), [({}, 2), ({"C": 0.1}, 3), ({"class_weight": "balanced", "folds": 3}, 3)]
)
def test_the_classifier_is_the_head_of_fit_head(tmp_path: Path, options: dict[str, Any], classes: int) -> None:
    labels = np.arange(90) ** 2 % 7 % classes
    X = make_classes(tmp_path / "f.h5", labels, spread=3.0)
    report = fit_head(tmp_path / "f.h5", tmp_path / "m", **options)
    model, head = load_model(tmp_path / "m"), HeadClassifier(**options).fit(X, np.array(["x", "y", "z"])[labels])
    expected, found = model.head.to_tensors(), head.head_.to_tensors()
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    assert (head.C_, head.scaling_, head.temperature_) == (report.C, report.scaling, report.temperature)
    assert (head.cv_accuracy_, head.cv_log_loss_) == (report.cv_accuracy, report.cv_log_loss)
    again = HeadClassifier.from_model(tmp_path / "m")
    np.testing.assert_array_equal(again.predict_proba(X), head.predict_proba(X))
    assert set(again.predict(X)) == set("abc"[:classes])


@pytest.mark.parametrize("weight", [None, "balanced", {"x": 3.0, "z": 0.2}])
@pytest.mark.parametrize("folds", [0, 4])
def test_the_classifier_is_scikit_learns_at_its_temperature(weight: Any, folds: int) -> None:
    rng = np.random.default_rng(0)
    y = np.array(["x", "y", "y", "z", "z", "z"] * 20)
    X = rng.normal(size=(120, 6)) + (y == "x")[:, None] - (y == "z")[:, None] * rng.normal(size=6)
    head = HeadClassifier(C=0.3, folds=folds, class_weight=weight).fit(X, y)
    scaler = StandardScaler() if head.scaling_ == "standardise" else None
    length = np.linalg.norm(X, axis=1, keepdims=True) if head.scaling_ == "unit" else 1
    other = make_pipeline(scaler, LogisticRegression(C=0.3, class_weight=weight, tol=1e-8, max_iter=10_000))
    logits = other.fit(X / length, y).decision_function(X / length) / head.temperature_
    np.testing.assert_allclose(
        head.decision_function(X) - head.decision_function(X).mean(axis=1, keepdims=True), logits, atol=2e-3
    )
    assert (head.temperature_ == 1) == (folds == 0)


@pytest.mark.parametrize("labels", [["no", "yes"], [3, 7], [False, True], [1.0, 2.0]])
def test_labels_of_any_type_come_back(labels: list[Any]) -> None:
    rng = np.random.default_rng(0)
    y = np.array(labels)[np.arange(40) % 2]
    head = HeadClassifier(C=1.0, folds=2).fit(rng.normal(size=(40, 3)) + (np.arange(40) % 2)[:, None] * 9, y)
    assert head.classes_.tolist() == labels
    assert head.classes_.dtype == y.dtype
    assert head.predict(rng.normal(size=(3, 3)) + 9).tolist() == labels[1:] * 3


def test_copies_and_groups_stay_in_one_fold() -> None:
    """Of labels that are pure chance, copies across folds would be known by heart."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 40)), rng.integers(2, size=60)
    twice, labels = np.repeat(X, 4, axis=0), np.repeat(y, 4)
    assert HeadClassifier().fit(twice, labels).cv_accuracy_ < 0.7
    nearly = twice + rng.normal(0, 1e-3, twice.shape)
    assert HeadClassifier().fit(nearly, labels).cv_accuracy_ > 0.9
    patients = np.repeat([f"p{number}" for number in range(60)], 4)
    assert HeadClassifier().fit(nearly, labels, groups=patients).cv_accuracy_ < 0.7
    na = pytest.importorskip("pandas").NA
    alone = HeadClassifier().fit(nearly, labels, groups=[None, "", float("nan"), na] * 60)
    assert alone.cv_accuracy_ > 0.9


@pytest.fixture
def routing() -> Iterator[None]:
    import sklearn

    with sklearn.config_context(enable_metadata_routing=True):
        yield


def test_groups_that_cannot_be_divided_are_a_value_error() -> None:
    X = np.random.default_rng(0).normal(size=(10, 4))
    y, patients = [2, 0, 1, 0, 2, 1, 1, 2, 0, 2], ["p0", "p2", "p1", "p3", "p0", "p1", "p3", "p2", "p3", "p0"]
    assert HeadClassifier().fit(X, y, groups=patients).n_folds_ == 2
    with pytest.raises(ValueError, match="3 groups of several classes cannot be divided into 2 folds"):
        HeadClassifier().fit(X[:6], [0, 1, 1, 2, 2, 0], groups=[*"aabbcc"])


def test_groups_are_routed(routing: None) -> None:
    rng = np.random.default_rng(0)
    y, groups = np.arange(80) % 2, np.arange(80) // 4
    X = rng.normal(size=(80, 5)) + y[:, None]
    pipeline = make_pipeline(StandardScaler(), HeadClassifier(C=1.0, folds=2).set_fit_request(groups=True))
    search = GridSearchCV(pipeline, {"headclassifier__folds": [2, 3]}, cv=GroupKFold(3)).fit(X, y, groups=groups)
    expected = HeadClassifier(C=1.0, folds=search.best_params_["headclassifier__folds"])
    expected.fit(StandardScaler().fit_transform(X), y, groups=groups)
    assert search.best_estimator_[-1].cv_accuracy_ == expected.cv_accuracy_


@pytest.mark.parametrize(
    ("options", "y", "sentence"),
    [
        ({}, ["a"] * 6, r"one class only \('a'\)"),
        ({}, ["a"] * 5 + ["b"], "class 'b' has 1 sample"),
        ({}, ["a", None, "b"] * 2, "y holds None where a label is expected"),
        ({}, [0.0, 1.0, float("nan")] * 2, "Input y contains NaN"),
        ({}, [0.5, 1.25, 2.75] * 2, "Unknown label type"),
        ({}, ["a", "b"], "inconsistent numbers"),
        ({"C": -1}, ["a", "b"] * 3, "C must be"),
        ({"C": "auto"}, ["a", "b"] * 3, "C must be"),
        ({"folds": 1}, ["a", "b"] * 3, "folds must be"),
        ({"folds": 0}, ["a", "b"] * 3, "nothing can choose C"),
        ({"class_weight": "even"}, ["a", "b"] * 3, "class_weight must be"),
        ({"class_weight": {"a": -1}}, ["a", "b"] * 3, "class_weight must hold"),
        ({"class_weight": {"a": 0.0}}, ["a", "b"] * 3, "class_weight must hold numbers above 0"),
    ],
)
def test_what_no_classifier_can_learn_from_is_refused(options: dict[str, Any], y: list[Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        HeadClassifier(**options).fit(np.eye(6), y)


def test_a_saved_model_is_a_pipeline(made: Path, images: Any) -> None:
    X, y = images
    model = load_model(made / "m")
    pipeline = make_pipeline(FeatureExtractor.from_model(model), HeadClassifier.from_model(model))
    expected = np.stack([each.probabilities for each in model.predict(X)])
    np.testing.assert_allclose(pipeline.predict_proba(X), expected, atol=1e-6)
    assert pipeline.score(X, y) == np.mean(
        [each.label == label for each, label in zip(model.predict(X), y, strict=True)]
    )
    fitted = FeatureExtractor(os.fspath(made / "m")).fit(X)  # the folder as the name of a backbone
    assert fitted.spec_ == model.spec
    with pytest.raises(UsageError, match="crop is the model's own"):
        FeatureExtractor.from_model(model, crop=40)


def test_the_example_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_photos(tmp_path / "photos", each=4)
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(featcache.sklearn)
    assert (found.failed, found.attempted) == (0, 9)
