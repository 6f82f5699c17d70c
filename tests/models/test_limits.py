"""Predictions know their limits: sets, evidence and abstention, from images and caches, in Python and in files alike."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blobs import blobs
from caches import make_classes
from sklearn.neighbors import NearestNeighbors
from test_training_rows import make_cache, own

from featcache.cache.cache import FeatureCache
from featcache.errors import CacheError, ModelError, SourceError, SpecMismatchError, UsageError
from featcache.heads.logreg import fit_logreg
from featcache.models.evaluate import evaluate
from featcache.models.fit import _seen, fit_head
from featcache.models.limits import exported_limits, sets_of
from featcache.models.model import load_model
from featcache.models.predict import predict, predict_all
from featcache.models.prediction import Prediction, Predictions

N_TRAIN = 160


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with f.h5, 260 rows of four overlapping classes, 160 of them train, and a model m/ fit on it."""
    folder = tmp_path_factory.mktemp("made")
    make_classes(folder / "f.h5", np.arange(260) % 4, 1 + (np.arange(260) >= N_TRAIN), spread=2.5)
    fit_head(folder / "f.h5", folder / "m", C=1.0)
    return folder


def unscaled(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """By hand: labels and 1 - p of each training row's own class, out of fold; labels and p of all rows; no temperature."""
    model, cache = load_model(folder / "m"), FeatureCache.open(folder / "f.h5")
    rows, temperature = model.training_rows(), model.manifest["metrics"]["temperature"]
    assert temperature != 1 and rows is not None and rows.logits is not None
    ways = []
    for logits in (rows.logits, model.head.logits(cache.X)):
        e = np.exp(logits * temperature)
        ways.append(e / e.sum(axis=1, keepdims=True))
    return rows.labels, 1 - ways[0][np.arange(len(rows.labels)), rows.labels], cache.y, ways[1]


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95])
def test_sets_by_hand(made: Path, coverage: float) -> None:
    """0.5 and 0.8 give each class its own threshold (10 and 25 of 40 rows), 0.95 gives all of them one."""
    labels, scores, _, p = unscaled(made)
    of_class = [scores[labels == k] if coverage < 0.9 else scores for k in range(4)]
    odds = [
        np.quantile(np.log(own / (1 - own)), coverage, method="weibull") for own in of_class
    ]  # of logits, as scores are
    expected = np.log((1 - p) / p) <= odds
    found = list(predict(made / "m", made / "f.h5", coverage=coverage))
    for row, inside, values in zip(found, expected, p, strict=True):
        assert row.set == tuple("abcd"[k] for k in np.argsort(-values) if inside[k])
        assert row.status == ("ok" if inside.sum() == 1 else "unsure")
        assert (row.status == "ok") == (row.doubt == "") and row.reason == ""
    sizes = {len(row.set or ()) for row in found}
    assert sizes >= {0.5: {0, 1}, 0.8: {1, 2}, 0.95: {1, 2, 3}}[coverage]


def test_evidence_by_hand(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache.open(made / "f.h5")
    X = cache.X.astype(float)
    with caplog.at_level("INFO", "featcache"):
        found = list(predict(made / "m", made / "f.h5", evidence=made / "f.h5"))
    assert f"evidence: {N_TRAIN} training images of {made / 'f.h5'}" in caplog.text
    oracle = NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(X[:N_TRAIN])
    training = oracle.kneighbors()[0].mean(axis=1)
    new = oracle.kneighbors(X[N_TRAIN:])[0].mean(axis=1)
    for k, (row, distance) in enumerate(zip(found, [*training, *new], strict=True)):
        assert row.unfamiliarity == pytest.approx((training < distance - 1e-9).mean(), abs=1e-9)
        assert row.nearest is not None and len(row.nearest) == 3
        if k < N_TRAIN:
            assert row.nearest[0] == (cache.paths[k], pytest.approx(1))
        else:
            similarities, places = oracle.kneighbors(X[k : k + 1], n_neighbors=3)
            assert [near.path for near in row.nearest] == [cache.paths[place] for place in places[0]]
            np.testing.assert_allclose([near.similarity for near in row.nearest], 1 - similarities[0], atol=1e-9)
        assert row.status == ("unsure" if row.unfamiliarity > 0.95 else "ok")
    assert 0 < sum(row.status == "unsure" for row in found) < 40


def test_copies_are_one_training_image(tmp_path: Path) -> None:
    contents = own()
    contents[3:15:3] = [contents[0]] * 4  # five copies in train, and two in test
    contents[60], contents[63] = contents[0], contents[0]
    cache = make_cache(tmp_path / "f.h5", contents)
    fit_head(cache.path, tmp_path / "m", C=1.0)
    sets = sets_of(load_model(tmp_path / "m"), 0.9)
    assert sets.thresholds.n == 26
    rows = list(predict(tmp_path / "m", cache.path, evidence=cache.path))
    first = rows[60]
    assert first.nearest is not None and first.nearest[0] == ("0000.jpg", pytest.approx(1))
    assert first.nearest[1].similarity < 0.999  # not another copy of it
    assert first.unfamiliarity == rows[0].unfamiliarity


def test_abstaining(made: Path) -> None:
    found = list(predict(made / "m", made / "f.h5", abstain_below=0.7, coverage=0.9))
    doubts = [bool(row.probability < 0.7) + (len(row.set or ()) != 1) * 2 for row in found]
    assert set(doubts) == {0, 1, 2, 3} or set(doubts) == {0, 2, 3}
    for row, doubt in zip(found, doubts, strict=True):
        assert ("probability below 0.7" in row.doubt, "in the set" in row.doubt) == (doubt in (1, 3), doubt in (2, 3))
        assert row.label is not None and row.status == ("unsure" if doubt else "ok")


def test_images_and_cache_agree_and_columns_have_their_order(
    trained: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "featcache")
    (tmp_path / "bad.jpg").write_text("no image")
    flags = ["--coverage", "0.9", "--evidence", trained / "f.h5", "--abstain-below", "0.5", "--top-k", "2", "--probs"]
    tables = []
    for source in (trained / "f.h5", trained / "photos"):
        code, out, _ = run("predict", trained / "m", source, *flags)
        assert code == 0
        assert "held-out scores of 24 images; 0 of 3 classes have their own threshold" in caplog.text
        tables.append(list(csv.DictReader(io.StringIO(out))))
    head = ["path", "label", "probability", "status", "reason", "label_2", "probability_2"]
    head += [f"prob:{name}" for name in ("blue", "green", "red")]
    tail = ["set", *(f"{what}_{k}" for k in (1, 2, 3) for what in ("nearest", "similarity")), "unfamiliarity"]
    assert all(list(row) == head + tail for table in tables for row in table)
    for one, other in zip(*tables, strict=True):
        assert [one[name] for name in ("label", "set", "status", "nearest_1")] == [
            *(other[name] for name in ("label", "set", "status", "nearest_1"))
        ]
        assert one["path"] == one["nearest_1"] and float(one["similarity_1"]) == pytest.approx(1, abs=1e-4)
        assert one["label"] in json.loads(one["set"]) or one["set"] == "[]"
    code, out, _ = run(
        "predict", trained / "m", tmp_path / "bad.jpg", trained / "photos", *flags, "-o", tmp_path / "x.jsonl"
    )
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert all(list(row) == head + tail for row in rows)
    assert rows[0]["status"] == "refused" and {rows[0][name] for name in tail} == {None}
    assert isinstance(rows[1]["set"], list)


def test_sets_survive_any_names(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    names = ("a, b", '"; c', "caf\udce9\n")
    make_classes(tmp_path / "f.h5", np.arange(90) % 3, spread=4.0, classes=names)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    expected = [list(row.set or ()) for row in predict(tmp_path / "m", tmp_path / "f.h5", coverage=0.95)]
    assert max(map(len, expected)) == 3
    for name in ("x.csv", "x.jsonl"):
        code, out, _ = run(
            "predict", tmp_path / "m", tmp_path / "f.h5", "--coverage", 0.95, "-o", tmp_path / name, "--json"
        )
        assert code == 0
        unsure = sum(len(entry) != 1 for entry in expected)
        assert json.loads(out.splitlines()[-1])["unsure"] == unsure > 0
        text = (tmp_path / name).read_bytes().decode("utf-8", "surrogateescape")
        if name == "x.csv":
            found = [json.loads(row["set"]) for row in csv.DictReader(io.StringIO(text, newline=""))]
        else:
            found = [json.loads(line)["set"] for line in text.splitlines()]
        assert found == expected


def test_tables_and_notebooks(made: Path) -> None:
    found = predict_all(load_model(made / "m"), made / "f.h5", coverage=0.8, evidence=made / "f.h5")
    frame = found.to_pandas()
    assert list(frame.columns)[5:] == [
        "set",
        *(f"{w}_{k}" for k in (1, 2, 3) for w in ("nearest", "similarity")),
        "unfamiliarity",
    ]
    assert (
        frame["set"].map(len).between(0, 4).all()
        and frame["unfamiliarity"].dtype == frame["similarity_3"].dtype == float
    )
    unsure = sum(row.status == "unsure" for row in found)
    assert f"unsure {unsure}" in repr(found)
    page = found._repr_html_()
    assert "<th>set</th><th>nearest training image</th><th>similarity</th><th>unfamiliarity</th>" in page
    assert str(found[0].nearest[0].path) in page  # type: ignore[index]
    doubtful = next(row for row in found if row.set is not None and len(row.set) > 1)
    assert repr(doubtful).endswith(f", unsure: {doubtful.doubt})")
    refused = Prediction("x", None, "no image", classes=("a",), set=(), nearest=())
    assert refused.to_row() | {"set": None, "nearest_1": None, "unfamiliarity": None} == refused.to_row()
    assert "<td>no image</td><td></td><td></td><td></td><td></td>" in Predictions((refused,))._repr_html_()


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_evaluate_counts_what_predict_says(made: Path, coverage: float) -> None:
    scores = evaluate(made / "m", made / "f.h5", coverage=coverage, abstain_below=0.6, rows=True)
    rows = list(scores["rows"])
    assert list(rows[0])[5:] == ["set", "true_label", "true_probability", "correct", "seen"]
    assert {row["path"]: row["set"] for row in rows}.items() <= {
        row.path: list(row.set or ()) for row in predict(made / "m", made / "f.h5", coverage=coverage)
    }.items()
    found = scores["coverage"]
    holds = [row["true_label"] in row["set"] for row in rows]
    assert (found["asked"], found["n_scores"], found["own_thresholds"]) == (
        coverage,
        N_TRAIN,
        4 if coverage < 0.9 else 0,
    )
    assert (found["empty"] > 0) == (coverage < 0.9)
    assert found["reached"] == np.mean(holds) and found["mean_size"] == np.mean([len(row["set"]) for row in rows])
    answered = [row for row in rows if row["status"] == "ok"]
    assert scores["answered"]["n"] == len(answered) < len(rows) == scores["n"]
    assert scores["answered"]["accuracy"] == np.mean([row["correct"] for row in answered]) > scores["accuracy"]
    _, _, y, p = unscaled(made)
    before = -np.log(p[N_TRAIN:][np.arange(100), y[N_TRAIN:]]).mean()
    assert scores["calibration"]["before"]["log_loss"] == pytest.approx(before)
    after = scores["calibration"]["after"]
    assert (after["log_loss"], after["ece"]) == (scores["log_loss"], scores["ece"])
    assert scores["answer_curve"][0]["accuracy"] == scores["accuracy"]
    plain = evaluate(made / "m", made / "f.h5")
    assert plain["coverage"] is None and plain["answered"] is None and plain["top5_accuracy"] is None


@pytest.mark.parametrize("source", ["photos", "f.h5"])
def test_evaluate_doubts_what_predict_doubts(trained: Path, source: str) -> None:
    """Evidence included, from images as from their cache."""
    options: dict[str, Any] = {"coverage": 0.9, "evidence": trained / "f.h5", "abstain_below": 0.9}
    scores = evaluate(trained / "m", trained / source, **options, rows=True)
    found = {row.path: row for row in predict(trained / "m", trained / source, **options)}
    for row in (rows := list(scores["rows"])):
        expected = found[row["path"]].to_row()
        assert {name: row[name] for name in expected} == expected
    assert scores["answered"]["n"] == sum(row["status"] == "ok" for row in rows)
    assert scores["answered"]["unfamiliar"] == np.mean([row["unfamiliarity"] > 0.95 for row in rows])
    assert evaluate(trained / "m", trained / source, coverage=0.9)["answered"]["unfamiliar"] is None


def test_the_command_evaluates_them(made: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    flags = ["--coverage", 0.9, "--abstain-below", 0.6, "--evidence", made / "f.h5"]
    code, out, _ = run("evaluate", made / "m", made / "f.h5", *flags)
    assert code == 0
    assert "asked for 0.9" in out and "images are answered" in out and "unlike" in out and "on the surest images" in out
    code, out, _ = run("evaluate", made / "m", made / "f.h5", *flags, "--json")
    facts = json.loads(out.splitlines()[-1])
    assert facts["coverage"]["method"].startswith("LAC") and facts["answered"]["abstain_below"] == 0.6
    code, out, _ = run("evaluate", made / "m", made / "f.h5")
    assert "coverage" not in out and "surest" not in out


# ----------------------------------------------------------------------------------------------------------- bad input


def test_evidence_of_another_spec_or_of_other_images_is_refused(made: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SpecMismatchError, match=r"weights_sha256.*give as evidence the cache that the model was fit on"
    ):
        predict(made / "m", made / "f.h5", evidence=trained / "f.h5")
    other = make_cache(tmp_path / "other.h5", own())  # of the same spec
    with pytest.raises(
        SourceError, match=r"no image of \S+other.h5 trained \S+m; give as evidence the cache that it was fit on"
    ):
        predict(made / "m", made / "f.h5", evidence=other.path)
    with pytest.raises(CacheError, match="is a model, expected a cache"):
        predict(made / "m", made / "f.h5", evidence=made / "m")
    with pytest.raises(CacheError, match="does not exist"):
        predict(made / "m", made / "f.h5", evidence=made / "nowhere.h5")


def test_what_is_impossible_is_refused_before_work_starts(
    made: Path, trained: Path, tmp_path: Path, no_model: None, run: Callable[..., tuple[int, str, str]]
) -> None:
    for options, words in (
        ({"coverage": 0.995}, r"needs at least 199 images .*found 160 \(1000 of a class .*at most 0\.99"),
        ({"coverage": 95}, r"for 95 % give 0\.95"),
        ({"abstain_below": 1.5}, "above 0 and at most 1, found 1.5"),
        ({"abstain_below": 0}, "above 0 and at most 1"),
    ):
        for use in (predict, evaluate):
            with pytest.raises(UsageError, match=words):
                use(made / "m", made / "f.h5", **options)
    code, _, err = run("predict", trained / "m", trained / "photos", "--coverage", "0.99")
    assert code == 2 and "coverage 0.99 needs at least 99 images with held-out scores, found 24" in err


def test_models_that_keep_no_scores_say_what_to_do(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit_head(made / "f.h5", made / "unfolded", C=1.0, folds=0)
    older = load_model(made / "m")
    del older.manifest["training_rows"]
    for model in (load_model(made / "unfolded"), older):
        with pytest.raises(
            UsageError, match=r"keeps no scores .* without folds.*; fit it again with fit-head --folds 5$"
        ):
            predict(model, made / "f.h5", coverage=0.9)
        assert exported_limits(model) is None
    older.manifest["finetuned"] = True
    with pytest.raises(UsageError, match="finetune it again$"):
        evaluate(older, made / "f.h5", coverage=0.9)
    found = list(predict(older, made / "f.h5", evidence=made / "f.h5"))  # which it can still be given
    assert found[200].nearest == list(predict(made / "m", made / "f.h5", evidence=made / "f.h5"))[200].nearest
    assert f"taken are {N_TRAIN} labelled images" in caplog.text


def test_of_too_many_scores_those_of_some_rows_are_kept() -> None:
    X, y = blobs(300, spread=3.0)
    few, all_of_them = (fit_logreg(X, np.arange(300), y, grid=(1.0,), max_logits=most) for most in (300, 10**6))
    assert all_of_them.out_of_fold is not None and few.out_of_fold is not None and few.kept is not None
    np.testing.assert_array_equal(few.out_of_fold, all_of_them.out_of_fold[few.kept])
    digests = np.random.default_rng(0).integers(0, 256, (300, 32), np.uint8)
    rows = _seen(digests, y, few)
    found = rows.unseen()
    assert found is not None and (found.digests == digests[::3]).all() and (found.labels == y[::3]).all()
    assert rows.logits is None and len(rows.digests) == 300


def test_scores_that_do_not_fit_the_classes_are_damage(made: Path) -> None:
    model = load_model(made / "m")
    fewer = type(model)(model.path, model.classes[:3], model.head, model.backbone, model.manifest)
    with pytest.raises(ModelError, match="its scores do not fit its 3 classes"):
        sets_of(fewer, 0.9)
