"""The page about a model: its numbers are those of ``evaluate``, its pictures exactly the images that were scored."""

import dataclasses
import html
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_classes, plain_rows, save_head, save_tuned
from conftest import SPEC, TINY, make_photos, write_photo
from kitchen import HOSTILE

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Provenance
from featcache.cache.write import write_cache
from featcache.errors import SourceError, SpecMismatchError, StorageError, UsageError
from featcache.extraction.extract import extract
from featcache.heads.confident import wrong_labels
from featcache.heads.head import FittedHead, Head
from featcache.heads.metrics import mcnemar
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.limits import Limits
from featcache.models.model import load_model, save_model
from featcache.models.scoring import HELD_OUT, Scored, score_cache
from featcache.models.training_rows import TrainingRows
from featcache.reports.elements.pictures import Pictures
from featcache.reports.model_report.advice import advise, suspects
from featcache.reports.model_report.report import page_beside, report, report_beside
from featcache.reports.model_report.subject import choose_rows, make_subject
from featcache.reports.scores import evaluation_lines


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text()
    found: dict[str, Any] = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )  # type: ignore[index]
    return found


def cells_of(page: Path) -> dict[tuple[int, int], int]:
    """What the matrix shows: what a cell selects -> its count."""
    found = re.findall(
        r"""data-select='\{"label": (\d+), "predicted": (\d+)\}'><span class="k">([\d,]+)</span>""", page.read_text()
    )
    return {(int(i), int(j)): int(n.replace(",", "")) for i, j, n in found}


@pytest.fixture
def overlapping(tmp_path: Path) -> Path:
    """A cache of three classes that are hard to tell apart, half of it val; a model beside it."""
    make_classes(tmp_path / "f.h5", np.arange(240) % 3, 1 + np.arange(240) // 120, spread=3.0)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    return tmp_path


@pytest.mark.parametrize("split", [None, "train", "all"])
def test_numbers_equal_those_of_evaluate(overlapping: Path, split: str | None) -> None:
    page, cache, model = overlapping / "page.html", overlapping / "f.h5", overlapping / "m"
    found = report(model, cache, output=page, split=split)
    scores, data = evaluate(model, cache, split=split), data_of(page)
    confusion = scores.pop("confusion")
    assert data["scores"] == json.loads(json.dumps(scores))
    assert cells_of(page) == {(i, j): n for i, row in enumerate(confusion) for j, n in enumerate(row) if n}
    pairs = list(zip(data["cards"]["label"], data["cards"]["predicted"], strict=True))
    assert [[pairs.count((i, j)) for j in range(3)] for i in range(3)] == confusion
    assert (found.images, found.cards, found.bytes) == (scores["n"], scores["n"], page.stat().st_size)
    text = page.read_text()
    low, high = scores["accuracy_interval"]
    assert f"{scores['accuracy']:.1%}, 95% interval {low:.1%} to {high:.1%}" in text
    assert f"would score {max(map(sum, confusion)) / scores['n']:.1%}, guessing 33.3%" in text
    text = text.split('<section id="classes">')[1]
    for name, entry in scores["per_class"].items():
        row = re.search(rf"<tr><th scope=\"row\">(?:(?!</tr>).)*?<bdi>{name}</bdi>.*?</tr>", text, re.S)[0]  # type: ignore[index]
        assert f"{entry['recall']:.1%}" in row
        assert f"{entry['precision']:.1%}" in row


def test_without_a_source_it_is_about_what_did_not_train(overlapping: Path) -> None:
    model = load_model(overlapping / "m")
    found = report(model)
    assert found.report == overlapping / "m.report.html" == page_beside(overlapping / "m")
    rows = model.training_rows()
    assert rows is not None
    assert rows.logits is not None
    scores = data_of(found.report)["scores"]
    assert scores["n"] == 120
    assert scores["split"] == HELD_OUT
    assert scores["accuracy"] == pytest.approx((rows.logits.argmax(1) == rows.labels).mean())
    assert "held out of the training" in found.report.read_text()
    with pytest.raises(UsageError, match="--split chooses"):
        report(model, split="val")
    fit_head(overlapping / "f.h5", overlapping / "once", C=1.0, folds=0)
    with pytest.raises(UsageError, match="keeps no scores"):
        report(overlapping / "once")


def test_val_of_a_fine_tuned_model_is_no_clean_score(tmp_path: Path) -> None:
    """What ``save_tuned`` keeps of val, with two images more that chose nothing; the count is that of equal digests."""
    model = load_model(save_tuned(tmp_path / "m"))
    known = model.training_rows()
    assert known is not None and known.held_out is not None
    val, labels = known.held_out.digests, known.held_out.labels
    page = report(model, output=tmp_path / "p.html").report
    words = re.sub("<[^>]+>", "", page.read_text())
    assert "of 6 images of val, on which epoch and mixture were chosen, are classified correctly" in words
    assert "Epoch and mixture were chosen on these images: the accuracy is optimistic" in words
    assert "heads that had not seen" not in words and "held out of the training" not in words
    digests = np.concatenate([val, 7 + np.zeros((2, 32), np.uint8)])
    columns = {"labels": np.array([*labels, 0, 1], np.int32), "splits": np.full(8, 2, np.uint8), "digests": digests}
    rows = plain_rows((f"{k}.jpg" for k in range(8)), **columns)
    write_cache(tmp_path / "f.h5", rows, [np.zeros((8, 3), np.float16)], dim=3, spec=SPEC, classes=("a", "b"))
    scores = evaluate(model, tmp_path / "f.h5", split="val")
    assert scores["chosen_on"] == sum(row.tobytes() in {one.tobytes() for one in val} for row in digests) == 6
    assert "  optimistic: epoch and mixture were chosen on 6 of these images" in evaluation_lines(scores, "ab")
    page = report(model, tmp_path / "f.h5", output=tmp_path / "p.html").report
    assert "of 8 images of val, on 6 of which epoch and mixture were chosen, are" in re.sub(
        "<[^>]+>", "", page.read_text()
    )


def test_a_cache_that_all_trained_shows_held_out_rows_with_their_names(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(90) % 3, spread=3.0)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    data = data_of(report(tmp_path / "m", tmp_path / "f.h5", output=tmp_path / "p.html").report)
    assert data["scores"]["split"] == HELD_OUT
    assert sorted(data["cards"]["path"]) == [f"{k:04d}.jpg" for k in range(90)]
    labels = dict(zip(data["cards"]["path"], data["cards"]["label"], strict=True))
    assert all(labels[f"{k:04d}.jpg"] == k % 3 for k in range(90))
    own = [[path for path, *_ in found] for found in data["cards"]["evidence"]]
    assert all(len(near) == 3 and path not in near for path, near in zip(data["cards"]["path"], own, strict=True))
    trained = data_of(report(tmp_path / "m", tmp_path / "f.h5", output=tmp_path / "p.html", split="all").report)
    assert trained["scores"]["copies"]["across_splits"] == 90
    assert "Do not rely on this score" in (tmp_path / "p.html").read_text()


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.fixture
def photographed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"), each=5, splits=("train", "val"))
    extract("photos", "f.h5", TINY)
    fit_head("f.h5", "m", C=1.0)
    return tmp_path


def has_picture(page: Path) -> dict[str, bool]:
    cards = re.findall(r'<li class="card.*?</li>', page.read_text(), re.S)
    return {path: "<img" in card for path, card in zip(data_of(page)["cards"]["path"], cards, strict=True)}


def test_pictures_are_of_the_very_bytes(photographed: Path) -> None:
    """A moved file is found by its digest; a changed or missing one has no picture, and that is said with its number."""
    folder = Path(shutil.copytree("photos", "elsewhere"))
    shutil.rmtree("photos")
    page = Path("p.html")
    moved, changed, gone = (Path(f"val/red/{k:02d}.jpg") for k in range(3))
    (folder / moved).rename(folder / "moved.jpg")
    write_photo(folder / changed, (1, 2, 3), 99)
    (folder / gone).unlink()
    report("m", "f.h5", output=page, pictures=folder)
    without = {path for path, there in has_picture(page).items() if not there}
    assert without == {str(changed), str(gone)}
    assert "2 images are not in elsewhere" in page.read_text()
    shutil.rmtree(folder)
    report("m", "f.h5", output=page)
    assert not any(has_picture(page).values())
    assert "15 images have no picture here: <code>featcache report m f.h5 --source FOLDER</code>" in page.read_text()
    with pytest.raises(SourceError, match="--source elsewhere is no folder"):
        report("m", "f.h5", output=page, pictures="elsewhere")


def test_the_folder_beside_a_cache_is_found_and_images_bring_their_own(photographed: Path) -> None:
    report("m", "f.h5", output="p.html")
    assert all(has_picture(Path("p.html")).values())
    (Path("photos") / "val" / "red" / "bad.jpg").write_text("no image")
    found = report("m", "photos", output="q.html", evidence="f.h5")
    pictures = has_picture(Path("q.html"))
    assert [path for path, there in pictures.items() if not there] == ["photos/val/red/bad.jpg"]
    assert found.images == 15
    data = data_of(Path("q.html"))
    scores = evaluate("m", "photos")
    del scores["confusion"]
    assert data["scores"] == json.loads(json.dumps(scores))
    assert data["selections"]["refused"] == [data["cards"]["path"].index("photos/val/red/bad.jpg")]
    assert all(
        len(near) == 3
        for near, status in zip(data["cards"]["evidence"], data["cards"]["status"], strict=True)
        if status != 2
    )
    report("m", output="r.html", pictures="photos")  # out of fold: names, too, come from the folder
    assert all(path.startswith("train/") for path in data_of(Path("r.html"))["cards"]["path"])


def test_no_time_is_no_picture(photographed: Path) -> None:
    cache = FeatureCache.open("f.h5")
    digests = [digest.tobytes() for digest in cache.rows.digests]
    small = Pictures(Path("photos"), seconds=-1.0).thumbnails(cache.paths, digests, budget=10**6)
    assert {one.webp for one in small} == {None}
    some = Pictures(Path("photos")).thumbnails(cache.paths, digests, budget=3000, size=48)
    sizes = [len(one.webp or b"") for one in some]
    assert 0 < sum(sizes) <= 3000
    assert some[-1].reason.startswith("left out")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("n_classes", [2, 60])
def test_hostile_names_stay_text(tmp_path: Path, n_classes: int) -> None:
    """In labels, paths and the model's own name; in the full matrix and in the part that many classes show."""
    names = sorted({*(name.replace("\0", "") for name in HOSTILE), *(f"class {k}" for k in range(60))})[:n_classes]
    rng = np.random.default_rng(0)
    y = np.arange(4 * n_classes) % n_classes
    centres = rng.normal(0, 1, (n_classes, 8)).astype(np.float32)
    X = (centres[y] + rng.normal(0, 1, (len(y), 8))).astype(np.float16)
    rows = plain_rows(
        (f"{names[k]}/{row}.jpg" for row, k in enumerate(y)),
        labels=y.astype(np.int32),
        splits=np.full(len(y), 2, np.uint8),
    )
    write_cache(tmp_path / "f.h5", rows, [X], dim=8, spec=SPEC, classes=tuple(names), provenance=Provenance())
    head = Head(
        "linear", "none", np.zeros(8, np.float32), np.ones(8, np.float32), ((centres, np.zeros(n_classes, np.float32)),)
    )
    model = save_head(tmp_path / "<img src=x>", head, tuple(names), 0)
    page = report(model, tmp_path / "f.h5", output=tmp_path / "p.html").report.read_text()
    assert page.count("<script") == 2
    assert not re.search(r"<(svg/onload|img src=x|script>document)", page)
    assert not re.search(r"[\u202a-\u202e\u2028\u2029\x00]", page)
    assert data_of(tmp_path / "p.html")["cards"]["classes"] == names


def test_one_class_in_a_split(tmp_path: Path) -> None:
    labels, splits = np.arange(60) % 3, np.where(np.arange(60) % 3 == 0, 1 + np.arange(60) // 30, 1)
    make_classes(tmp_path / "f.h5", labels, splits)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0)
    report(tmp_path / "m", tmp_path / "f.h5", output=tmp_path / "p.html")
    scores = data_of(tmp_path / "p.html")["scores"]
    assert scores["n"] == 10
    assert scores["per_class"]["b"]["recall"] is None


def test_a_thousand_classes_stay_light(tmp_path: Path) -> None:
    n, classes = 2000, 1000
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    centres = rng.normal(0, 1, (classes, 16)).astype(np.float32)
    X = (centres[y] + rng.normal(0, 0.9, (n, 16))).astype(np.float16)
    names = tuple(f"species {k:04d}" for k in range(classes))
    rows = plain_rows(map(str, range(n)), labels=y.astype(np.int32), splits=np.full(n, 3, np.uint8))
    write_cache(tmp_path / "f.h5", rows, [X], dim=16, spec=SPEC, classes=names, provenance=Provenance())
    bias = -(centres**2).sum(1) / 2
    head = Head("linear", "none", np.zeros(16, np.float32), np.ones(16, np.float32), ((centres, bias),))
    found = report(save_head(tmp_path / "m", head, names, 0), tmp_path / "f.h5", output=tmp_path / "p.html")
    assert found.bytes < 4_000_000
    confusion = np.array(evaluate(tmp_path / "m", tmp_path / "f.h5")["confusion"])
    triples = np.array(data_of(tmp_path / "p.html")["confusion"]["cells"]).reshape(-1, 3)
    again = np.zeros_like(confusion)
    again[triples[:, 0], triples[:, 1]] = triples[:, 2]
    assert (again == confusion).all()
    assert "1,000 classes occur" in found.report.read_text()
    shown = cells_of(found.report)
    assert len(shown) < 21**2
    assert all(confusion[place] == count for place, count in shown.items())
    worst = (confusion * ~np.eye(classes, dtype=bool)).max()
    assert worst in [count for (i, j), count in shown.items() if i != j]


def test_refused_before_any_work(overlapping: Path, tmp_path: Path) -> None:
    X = np.zeros((6, 12), np.float32)
    rows, facts = plain_rows("abcdef", labels=np.zeros(6, np.int32)), {"dim": 12, "provenance": Provenance()}
    other = dataclasses.replace(SPEC, storage="float32")
    write_cache(tmp_path / "h.h5", rows, [X], spec=other, classes=("a",), **facts)
    with pytest.raises(SpecMismatchError, match="storage: float32 -> float16"):
        report(overlapping / "m", tmp_path / "h.h5", output=tmp_path / "p.html")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(StorageError, match="no page that featcache wrote"):
        report(overlapping / "m", overlapping / "f.h5", output=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    with pytest.raises(UsageError, match=r"ends in \.html"):
        report(overlapping / "m", overlapping / "f.h5", output=tmp_path / "p.pdf")
    write_cache(tmp_path / "u.h5", plain_rows("abcdef"), [X.astype(np.float16)], spec=SPEC, classes=(), **facts)
    with pytest.raises(SourceError, match="no labelled image"):
        report(overlapping / "m", tmp_path / "u.h5", output=tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("source", ["f.h5", None])
def test_evidence_that_is_none_is_refused(overlapping: Path, source: str | None, monkeypatch: Any) -> None:
    monkeypatch.chdir(overlapping)
    write_cache(Path("other.h5"), plain_rows(["x.jpg"]), [np.zeros((1, 12), np.float16)], dim=12, spec=SPEC, classes=())
    expected, words = (SourceError, "trained m") if source else (UsageError, "goes with images")
    with pytest.raises(expected, match=words):
        report("m", source, output="p.html", evidence="other.h5")
    assert not Path("p.html").exists()


# ------------------------------------------------------------------------------------------------- two models, advice


def test_against_another_model(overlapping: Path, tmp_path: Path) -> None:
    """The exact test on the same rows, classes matched by name, and the images that one alone gets right."""
    cache = overlapping / "f.h5"
    first, (weight, bias) = load_model(overlapping / "m"), (np.random.default_rng(0).normal(0, 1, (3, 12)), np.zeros(3))
    layers = ((weight.astype(np.float32), bias.astype(np.float32)),)
    head = Head("linear", "none", np.zeros(12, np.float32), np.ones(12, np.float32), layers)
    second = load_model(save_head(tmp_path / "other", head, ("c", "a", "b"), 1))
    report(first, cache, output=tmp_path / "p.html", against=second)
    opened = FeatureCache.open(cache)
    ours, theirs = (score_cache(model, opened, split="val", limits=Limits(model.classes)) for model in (first, second))
    expected = mcnemar(ours.y, ours.probabilities, theirs.probabilities[:, [1, 2, 0]])
    data, text = data_of(tmp_path / "p.html"), (tmp_path / "p.html").read_text()
    assert len(data["selections"]["won"]) == expected["only_first_right"] > 0
    assert len(data["selections"]["lost"]) == expected["only_second_right"] > 0
    assert len(data["selections"]["neither"]) == expected["neither"]
    assert all(data["cards"]["correct"][k] == 1 for k in data["selections"]["won"])
    assert f"{np.mean(theirs.probabilities.argmax(1) == theirs.y):.1%}" in text
    differences = text.split("What differs between the models")[-1].split("</table>")[0]
    assert re.search(r"training: C</bdi></th><td><bdi>1</bdi></td><td><bdi>–</bdi>", differences)  # not 1.0 and None
    settings = {"settings": {"lr": 0.0003, "hidden": None, "augmentation": [["flip", 0.5]]}}
    tuned = dataclasses.replace(second, manifest=second.manifest | {"training": settings})
    report(tuned, cache, output=tmp_path / "p.html", against=first)
    differences, provenance = (
        (tmp_path / "p.html").read_text().split("What differs between the models")[-1].split("provenance", 1)
    )
    assert re.search(r"training: settings.lr<.*?>0.0003<.*?>–<", differences)
    assert "settings.lr 0.0003, settings.hidden none, settings.augmentation flip 0.5" in provenance
    assert "{" not in differences + provenance.split("<script")[0]
    two = save_head(
        tmp_path / "two",
        Head("linear", "none", head.mean, head.scale, ((layers[0][0][:2], layers[0][1][:2]),)),
        ("a", "b"),
        2,
    )
    with pytest.raises(UsageError, match="know different classes"):
        report(first, cache, output=tmp_path / "p.html", against=two)


def scored_by_hand(y: Any, probabilities: Any) -> Scored:
    n = len(y)
    digests = np.random.default_rng(5).integers(0, 256, (n, 32), dtype=np.uint8)
    return Scored(
        "val", np.array(y), np.array(probabilities, np.float32), digests, np.array([b"x"] * n), [{}] * n, [], 1.0
    )


def model_by_hand(folder: Path, classes: tuple[str, ...], trained: list[int] | None = None) -> Any:
    layers = ((np.ones((len(classes), 4), np.float32), np.zeros(len(classes), np.float32)),)
    head = Head("linear", "none", np.zeros(4, np.float32), np.ones(4, np.float32), layers)
    labels = np.repeat(np.arange(len(classes)), trained or [60] * len(classes))
    rows = TrainingRows(np.arange(32 * len(labels), dtype=np.uint32).astype(np.uint8).reshape(-1, 32) + 1, labels)
    facts: dict[str, Any] = {"weights": {"source": "x", "reload": None}, "metrics": {"accuracy": 0.5}}
    save_model(folder, FittedHead(head, (), {}, []), classes=classes, spec=SPEC, training={}, rows=rows, **facts)
    return load_model(folder)


def test_suspects_are_those_of_the_one_rule(tmp_path: Path) -> None:
    """Of confident learning; no row that trained the head is one."""
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(3, 0.3), 400)
    y = np.where(rng.random(400) < 0.8, p.argmax(1), rng.integers(0, 3, 400))
    model = model_by_hand(tmp_path / "m", ("a", "b", "c"))
    scored = scored_by_hand(y, p)
    subject = make_subject(model, scored, pictures=Pictures(None))
    found = suspects(subject)
    np.testing.assert_array_equal(found, wrong_labels(y, p.astype(np.float32)))
    assert 0 < len(found) == subject.scores["label_suspects"]
    assert (p.argmax(1) != y)[found].all()
    known = dataclasses.replace(scored, digests=np.repeat(model.training_rows().digests[:1], 400, axis=0))
    assert not len(suspects(make_subject(model, known, pictures=Pictures(None))))


def test_of_one_class_no_more_is_claimed_than_it_shows(tmp_path: Path) -> None:
    """Always answering it is right in 100 %, which no model beats, and says nothing of the model."""
    words = advice_on(tmp_path, [68, 0], [70, 0])
    assert words.startswith("Score images of other classes, too. All of these are a")
    assert "Check labels" not in words
    assert "Keep this model" not in words


def advice_on(tmp_path: Path, right: list[int], n: list[int], *, trained: list[int] | None = None) -> str:
    """Of classes of which so many images are right; the others are called the next class, without certainty."""
    classes = tuple("abcdefghij"[: len(n)])
    y = np.repeat(np.arange(len(n)), n)
    called = np.concatenate(
        [np.where(np.arange(m) < r, k, (k + 1) % len(n)) for k, (r, m) in enumerate(zip(right, n, strict=True))]
    )
    p = np.full((len(y), len(n)), 0.4 / (len(n) - 1))
    p[np.arange(len(y)), called] = 0.6
    scored = scored_by_hand(y, p)
    subject = make_subject(model_by_hand(tmp_path / "m", classes, trained), scored, pictures=Pictures(None))
    return " | ".join(re.sub("<[^>]+>", "", each.words) for each in advise(subject))


@pytest.mark.parametrize(
    ("right", "n", "trained", "said", "unsaid"),
    [
        ([199, 200], [200, 200], None, "Keep this model: 1 mistake in 400 images leaves nothing", "Label more"),
        (
            [40, 190, 190],
            [80, 200, 200],
            None,
            "Label more of a. 50.0% of its 80 images are recognised, 87.5% of all",
            "of b",
        ),
        ([40, 190, 190], [80, 200, 200], None, "Most of the missed are called b (40 of 40)", "Score more images"),
        ([40, 190, 190], [80, 200, 200], [900, 60, 60], "Look at the labels of a", "Label more"),
        ([18, 18], [20, 20], None, "Score more images. 40 fix the accuracy only to within", "Label more"),
        ([190, 5], [200, 10], None, "Accuracy may be no better than always answering a", "Keep"),
        (
            [0, 0],
            [20, 10],
            None,
            "Accuracy is worse than always answering a, which is right in 66.7%: the interval ends",
            "begins",
        ),
        ([200, 200], [200, 200], None, "Keep this model: no mistake in 400 images leaves nothing", "leave n"),
        ([199, 199], [200, 200], None, "Keep this model: 2 mistakes in 400 images leave nothing", "leaves"),
        ([170, 180], [200, 200], [20, 20], "Do not fine-tune yet: 20 training images a class", "worth a try"),
        ([170, 180], [200, 200], [90, 90], "Fine-tuning is worth a try: 50 of 400 are wrong", "Do not fine-tune"),
    ],
)
def test_advice(
    tmp_path: Path, right: list[int], n: list[int], trained: list[int] | None, said: str, unsaid: str
) -> None:
    text = advice_on(tmp_path, right, n, trained=trained)
    assert said in text
    assert unsaid not in text


def test_classes_of_the_same_quality_are_rarely_blamed(tmp_path: Path) -> None:
    """Ten classes that are recognised equally well, chance aside: one in twenty reports may name one."""
    rng = np.random.default_rng(0)
    blamed = 0
    for _ in range(40):
        right = rng.binomial(60, 0.85, 10).tolist()
        blamed += "Label more" in advice_on(tmp_path, right, [60] * 10)
    assert blamed <= 4


def test_which_rows_are_cards() -> None:
    """Every mistake, the most confident first; of right answers the least sure ones and as many of each class."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(5, 0.2), 6000)
    y = np.where(rng.random(6000) < 0.9, p.argmax(1), rng.integers(0, 5, 6000))
    y[y == 4] = np.where(rng.random((y == 4).sum()) < 0.1, 4, 0)  # a rare class
    rows = choose_rows(scored_by_hand(y, p))
    wrong = np.flatnonzero(p.argmax(1) != y)
    first, others = rows[: len(wrong)], rows[len(wrong) :]
    assert set(first) == set(wrong)
    assert (np.diff(p[first].max(1)) <= 1e-6).all()
    assert len(others) == 1000 == len(set(others))
    right = np.setdiff1d(np.arange(6000), wrong)
    assert set(others[:500]) == set(right[np.argsort(p[right].max(1), kind="stable")[:500]])
    counts = np.bincount(y[others[500:]], minlength=5)
    assert counts[:4].min() >= 100
    assert (choose_rows(scored_by_hand(y, p)) == rows).all()


# ------------------------------------------------------------------------------------------------------------ commands


def test_a_folder_without_the_images_is_said(
    overlapping: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    words = ("report", overlapping / "m", overlapping / "f.h5", "-o", tmp_path / "p.html")
    assert run(*words, "--source", tmp_path / "elsewhere")[0] == 0
    said = f"120 images are not in {tmp_path / 'elsewhere'}, or changed since: --source names another folder."
    assert said in caplog.text and said in html.unescape((tmp_path / "p.html").read_text())
    caplog.clear()
    assert run(*words)[0] == 0  # no folder was named
    assert "names another folder" not in caplog.text


@pytest.mark.parametrize("given", [(), ("--C", "10"), ("--C", "10", "--folds", "0")])
def test_the_command_on_the_page_is_the_one_that_was_typed(
    given: tuple[str, ...], cache: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Typed again, it gives the same estimate; that of a C that was given is not corrected for a choice."""
    assert run("fit-head", cache, "-o", cache.with_name("m"), *given)[0] == 0
    page = report(cache.with_name("m"), cache, output=cache.with_name("p.html")).report.read_text()
    line = re.search(r"featcache fit-head f\.h5 .*$", html.unescape(page), re.M)[0]  # type: ignore[index]
    words = shlex.split(line, comments=True)
    assert words == ["featcache", "fit-head", "f.h5", "-o", "m", *sorted_like(words, given)]
    chosen = load_model(cache.with_name("m")).manifest["training"]["C"]
    assert line.endswith(f"  # C was chosen: {chosen:g}") == (not given)


def sorted_like(words: list[str], given: tuple[str, ...]) -> list[str]:
    """Pairs of option and value, in the order of ``words``."""
    pairs = [*zip(given[::2], given[1::2], strict=True)]
    return [text for pair in sorted(pairs, key=lambda pair: words.index(pair[0])) for text in pair]


def test_commands_leave_a_page_beside_the_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(cache.parent)
    code, _, said = run("fit-head", "f.h5", "-o", "m", "--C", "1")
    assert (code, "  report in m.report.html" in said) == (0, True)
    assert data_of(Path("m.report.html"))["scores"]["split"] == "test"
    assert "m.report.html" not in os.listdir("m")
    Path("m.report.html").unlink()
    assert run("fit-head", "f.h5", "-o", "m", "--C", "1", "--no-report")[0] == 0
    assert not Path("m.report.html").exists()
    Path("m.report.html").write_text("mine")
    code, _, said = run("fit-head", "f.h5", "-o", "m", "--C", "1")
    assert code == 0  # the model is what counts
    assert "no report of m: m.report.html exists and is no page" in said
    assert run("evaluate", "m", "f.h5", "--report")[0] == 1
    assert Path("m.report.html").read_text() == "mine"
    Path("m.report.html").unlink()
    facts = json.loads(run("evaluate", "m", "f.h5", "--split", "val", "--report", "--json")[1].splitlines()[-1])
    assert facts["report"] == "m.report.html"
    assert data_of(Path("m.report.html"))["scores"]["accuracy"] == facts["accuracy"]
    facts = json.loads(run("report", "m", "f.h5", "-o", "p.html", "--json")[1].splitlines()[-1])
    assert {"report", "images", "seconds", "bytes"} <= set(facts)
    assert facts["bytes"] == Path("p.html").stat().st_size
    code, _, said = run("report", "f.h5", "m")
    assert (code, "did you mean `featcache report m f.h5`" in said) == (1, True)


def test_whatever_goes_wrong_with_a_page_spares_the_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_head(cache, cache.parent / "m", C=1.0)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="space"):
        report_beside(cache.parent / "m", cache=cache)
    monkeypatch.undo()
    assert load_model(cache.parent / "m").classes == ("a", "b", "c")
    assert not (cache.parent / "m.report.html").exists()
