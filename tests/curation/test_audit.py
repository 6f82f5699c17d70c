"""An audit as a whole: from photos to the table, by Python and by the command; bad input; an interruption."""

import csv
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_classes, plain_rows
from conftest import SPEC, TINY, make_photos, write_photo
from PIL import Image

import featcache
from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.curation import audit as curation
from featcache.curation.finding import KINDS
from featcache.curation.honest_score import Score
from featcache.errors import SourceError, StorageError, UsageError
from featcache.images.source import Source, list_images
from featcache.reports.audit.audit import Audit
from featcache.reports.audit.text import how_sure, score_title

HEADER = "path,label,split,kind,score,group,verified,other_path,suggested_label"  # the contract
KEYS = [
    "rows",
    "exact_copies",
    "near_copies",
    "label_suspects",
    "outliers",
    "cross_split",
    "accuracy",
    "accuracy_clean",
    "seconds",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ of three classes in train and val, and f.h5; among them an exact copy, a smaller one, and a tiny picture."""
    folder = tmp_path_factory.mktemp("work")
    photos = make_photos(folder / "photos", each=10, splits=("train", "val"))
    shutil.copy(photos / "train/red/00.jpg", photos / "val/red/copy.jpg")
    structured = np.random.default_rng(5).integers(0, 255, (6, 8, 3), np.uint8)  # a picture that survives being resized
    large = Image.fromarray(structured).resize((96, 72), Image.Resampling.BICUBIC)
    large.save(photos / "train/blue/large.png")
    large.resize((64, 48)).save(photos / "val/green/small.jpg", quality=90)  # under another label
    write_photo(photos / "train/green/tiny.png", (40, 190, 60), 7, size=(9, 8))
    featcache.extract(
        photos, folder / "f.h5", **{field.name: getattr(TINY, field.name) for field in dataclasses.fields(TINY)}
    )
    return folder


@pytest.fixture(scope="module")
def found(work: Path) -> Audit:
    return featcache.audit(work / "f.h5")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_with(found: Audit, kind: str) -> set[str]:
    return {row["path"] for row in found.rows(kind)}  # type: ignore[arg-type]


def test_what_is_planted_is_found(found: Audit, work: Path) -> None:
    assert found.root is not None and found.root.resolve() == (work / "photos").resolve()
    assert rows_with(found, "exact_copy") == {"train/red/00.jpg", "val/red/copy.jpg"}
    assert rows_with(found, "near_copy") == {"train/blue/large.png", "val/green/small.jpg"}
    assert rows_with(found, "tiny") == {"train/green/tiny.png"}
    paths = found.cache.paths
    assert [paths[row] for row in found.across_splits()] == ["val/green/small.jpg", "val/red/copy.jpg"]
    assert found.not_done == {}
    assert {*found.findings} == {*KINDS}
    by_terms = {score.terms: score for score in found.scores}
    assert (by_terms["as_given"].n, by_terms["without_leaks"].n) == (32, 30)
    near = found.findings["near_copy"]
    assert near[0].group == near[1].group and near[0].verified


def test_the_folder_of_an_audit(found: Audit, work: Path, tmp_path: Path) -> None:
    plan = found.save(tmp_path / "audit")
    assert plan == tmp_path / "audit" / "plan.csv"
    assert {path.name for path in plan.parent.iterdir()} == {"audit.csv", "audit.html", "audit.json", "plan.csv"}
    assert (plan.parent / "audit.csv").read_text().splitlines()[0] == HEADER
    rows = read(plan.parent / "audit.csv")
    assert [row["kind"] for row in rows] == [finding.kind for finding in found]
    (small,) = (row for row in rows if row["path"] == "val/green/small.jpg" and row["kind"] == "near_copy")
    assert {
        "label": "green",
        "split": "val",
        "verified": "true",
        "other_path": "train/blue/large.png",
    }.items() <= small.items()
    assert 0 <= float(small["score"]) <= 1
    facts = json.loads((plan.parent / "audit.json").read_text())
    assert {*KEYS} <= {*facts}
    assert len(read(plan)) == len(found.cache)


def test_an_edited_plan_is_never_overwritten(found: Audit, tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    plan = found.save(folder)
    assert found.save(folder) == plan  # nobody worked on it
    edited = plan.read_text().replace(",,blue,", ",drop,blue,")
    plan.write_text(edited)
    assert found.save(folder) == folder / "plan.new.csv"
    assert plan.read_text() == edited
    assert found.save(folder) == folder / "plan.new.csv"
    (folder / "plan.new.csv").write_text(edited)
    assert found.save(folder) == folder / "plan.new2.csv"
    assert plan.read_text() == (folder / "plan.new.csv").read_text() == edited
    plan.write_text("damaged")
    (folder / "audit.json").write_text('{"kind": "audit", ')
    assert found.save(folder) == folder / "plan.new3.csv"  # what cannot be told from an edited plan stays, too


@pytest.mark.parametrize("content", ["notes.txt", "audit.csv", "stats.json", "sub/plan.csv"])
def test_no_other_folder_is_replaced(found: Audit, tmp_path: Path, content: str) -> None:
    (tmp_path / "a" / content).parent.mkdir(parents=True)
    (tmp_path / "a" / content).write_text("mine")
    with pytest.raises(StorageError, match="it holds other things"):
        found.save(tmp_path / "a")
    assert (tmp_path / "a" / content).read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="it is a file"):
        found.save(tmp_path / "file")


def test_no_audit_lies_among_the_images(work: Path) -> None:
    with pytest.raises(StorageError, match="where a folder counts as a class"):
        featcache.audit(work / "f.h5", work / "photos" / "audit", kinds=("exact_copy",))
    assert not (work / "photos" / "audit").exists()


def test_an_audit_may_lie_beside_the_folder_that_a_table_names(work: Path, tmp_path: Path) -> None:
    """As after `split photos -o manifest.csv`: below the table's folder no other folder counts."""
    shutil.copytree(work / "photos", tmp_path / "photos")
    images = list_images(tmp_path / "photos")
    digests = [hashlib.sha256((tmp_path / "photos" / path).read_bytes()).digest() for path in images.paths]
    columns = {"labels": images.labels, "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)}
    rows = plain_rows([f"photos/{path}" for path in images.paths], **columns)
    write_cache(tmp_path / "f.h5", rows, [np.ones((len(images), 8), "f4")], dim=8, spec=SPEC, classes=images.classes)
    made = featcache.audit(tmp_path / "f.h5", tmp_path / "audit", kinds=("exact_copy",))
    assert made.root is not None and (tmp_path / "audit/plan.csv").exists()
    with pytest.raises(StorageError, match="where a folder counts as a class"):
        made.save(tmp_path / "photos/audit")


def test_data_frames(found: Audit) -> None:
    pytest.importorskip("pandas")
    frame = found.frame("near_copy")
    assert list(frame.columns) == [*HEADER.split(","), "reason"]
    assert set(frame["path"]) == rows_with(found, "near_copy")
    assert [found.cache.paths[row] for row in frame.index] == frame["path"].tolist()
    assert len(found.frame()) == len(list(found))
    assert found.frame("blank").empty
    with pytest.raises(UsageError, match="no kind of finding is called 'wrong'"):
        found.frame("wrong")  # type: ignore[arg-type]


def test_an_audit_shows_itself(found: Audit) -> None:
    lines = found.lines()
    assert max(map(len, lines)) <= 80
    assert any(
        line.startswith("  exact copies") and "in 1 group, 1 of val or test in an earlier split, too" in line
        for line in lines
    )
    assert any("val/red/copy.jpg" in line for line in lines)
    assert repr(found).startswith("Audit(")
    assert str(found) == "\n".join(lines)
    assert "<iframe" in found._repr_html_()


def test_the_command_from_a_cache_to_a_clean_one(work: Path, tmp_path: Path, run, no_model: None) -> None:
    code, out, err = run("audit", work / "f.h5", "-o", tmp_path / "audit", "--json")
    facts = json.loads(out)
    assert (code, len(out.splitlines())) == (0, 1)
    assert {*KEYS} <= {*facts}
    assert (facts["rows"], facts["exact_copies"], facts["near_copies"], facts["cross_split"]) == (64, 2, 2, 2)
    assert 0 < facts["accuracy"] <= 1 and 0 < facts["accuracy_clean"] <= 1
    assert f"featcache audit --apply {tmp_path}/audit/plan.csv -o clean.csv`" in err
    plan = tmp_path / "audit" / "plan.csv"
    text = plan.read_text().splitlines(keepends=True)
    text = [line.replace(",,red,", ",drop,red,") if line.startswith("val/red/copy.jpg") else line for line in text]
    text = [line.replace(",,green,", ",relabel,blue,") if line.startswith("val/green/small") else line for line in text]
    plan.write_text("".join(text))
    code, out, _ = run("audit", "--apply", plan, "-o", tmp_path / "clean.csv", "--root", work / "photos", "--json")
    assert code == 0
    assert {"images": 63, "kept": 62, "dropped": 1, "relabelled": 1}.items() <= json.loads(out).items()
    listed = list_images(Source(tmp_path / "clean.csv", root=work / "photos"))
    labels = {path: listed.classes[label] for path, label in zip(listed.paths, listed.labels, strict=True)}
    assert "val/red/copy.jpg" not in labels
    assert labels["val/green/small.jpg"] == "blue"
    code, out, err = run("audit", "--apply", plan, "-o", tmp_path / "clean.csv")
    assert (code, out) == (2, "") and "exists; choose another -o, or give --overwrite" in err


def test_all_problems_of_a_plan_reach_the_terminal(found: Audit, tmp_path: Path, run) -> None:
    plan = found.save(tmp_path / "audit")
    plan.write_text(plan.read_text().replace(",,blue,", ",drpo,blue,"))
    code, out, err = run("audit", "--apply", plan, "-o", tmp_path / "clean.csv", "--json")
    problems = json.loads(out)["problems"]
    assert (code, len(problems)) == (1, 21)
    assert err.count("the decision 'drpo' is unknown (did you mean drop?)") == 21 + 3
    assert not (tmp_path / "clean.csv").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "audit takes a cache, as"),
        (("f.h5",), "say where to write to"),
        (("f.h5", "--root", "photos"), "--root is for --apply"),
        (("f.h5", "--overwrite"), "--overwrite is for --apply"),
        (("f.h5", "--apply", "plan.csv"), "--apply needs the plan alone, found a cache"),
        (("--source", "photos", "--apply", "plan.csv"), "found --source as well; --root says where"),
        (("photos",), "expected a cache"),
        (("f.h5", "--source", "nowhere"), "--source nowhere is no folder"),
    ],
)
def test_wrong_usage(work: Path, run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: str) -> None:
    monkeypatch.chdir(work)
    output = () if words.startswith("say") else ("-o", "../out.csv" if "--apply" in options else "../out")
    code, out, err = run("audit", *options, *output)
    assert (code in (1, 2), out, err.count("\n")) == (True, "", 1)
    assert words in err


# ------------------------------------------------------------------------------------------------------- bad input


def audited(path: Path, **options: Any) -> Audit:
    found = featcache.audit(path, path.with_suffix(".audit"), **options)
    assert (path.with_suffix(".audit") / "audit.html").is_file()
    assert found.lines() and found.to_json()
    return found


def test_without_labels_there_are_copies_and_outliers(tmp_path: Path) -> None:
    rows = plain_rows([f"{k}.jpg" for k in range(60)])
    X = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float16)
    write_cache(tmp_path / "f.h5", rows, [X], dim=8, spec=SPEC, classes=())
    found = audited(tmp_path / "f.h5")
    assert found.not_done["label"] == "there are no labels"
    assert "two classes" in found.not_done["scores"]
    assert {"exact_copy", "near_copy", "outlier", "off_topic"} <= {*found.findings}
    assert found.to_json()["label_suspects"] is None
    assert "--source FOLDER" in found.not_done["dark"]


@pytest.mark.parametrize(
    "labels", [np.arange(20), np.zeros(20, int), np.arange(2), np.zeros(1, int), np.arange(20) // 10], ids=len
)
def test_few_images_and_few_classes(tmp_path: Path, labels: np.ndarray) -> None:
    """One image a class, one class, two rows, one row, and as many as it takes."""
    names = tuple(f"c{k:02d}" for k in range(int(labels.max()) + 1))
    rows = plain_rows([f"{k}.jpg" for k in range(len(labels))], labels=labels.astype(np.int32))
    X = (np.eye(20, 8)[labels] * 4 + np.random.default_rng(0).normal(size=(len(labels), 8))).astype(np.float16)
    write_cache(tmp_path / "f.h5", rows, [X], dim=8, spec=SPEC, classes=names)
    found = audited(tmp_path / "f.h5")
    enough = len(labels) == 20 and len(names) == 2
    assert (("label" in found.findings), bool(found.scores)) == (enough, enough)
    assert ("near_copy" in found.findings) == (len(labels) > 1)
    assert len(labels) > 1 or found.not_done["near_copy"] == "there are no two images to compare"


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    X = make_classes(tmp_path / "f.h5", labels)
    X[[4, 9]] = [[np.nan] * 12, [np.inf] * 12]
    names = tuple("abc")
    rows = plain_rows([f"{k:04d}.jpg" for k in range(60)], labels=labels.astype(np.int32))
    write_cache(tmp_path / "g.h5", rows, [X], dim=12, spec=SPEC, classes=names)
    found = audited(tmp_path / "g.h5")
    assert any(
        "of 2 images are not finite and compared with nothing, the first is 0004.jpg" in note for note in found.notes
    )
    assert not {4, 9} & {finding.row for finding in found}
    assert {score.n for score in found.scores} == {58}


def test_pictures_of_other_files_are_not_looked_at(work: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(work / "photos", tmp_path / "photos")
    write_photo(photos / "train/green/tiny.png", (0, 0, 0), 1, size=(8, 9))
    (photos / "val/red/03.jpg").unlink()
    found = featcache.audit(work / "f.h5", source=photos, kinds=("tiny", "dark"))
    assert not found.findings["tiny"] and not found.findings["dark"]
    assert any(note.startswith("2 images were not found unchanged below") for note in found.notes)
    empty = tmp_path / "empty"
    empty.mkdir()
    found = featcache.audit(work / "f.h5", source=empty, kinds=("tiny",))
    assert found.not_done == {"tiny": f"no image of the cache lies unchanged below {empty}"}


def test_only_some_kinds(work: Path) -> None:
    found = featcache.audit(work / "f.h5", kinds=("exact_copy",))
    assert [*found.findings] == ["exact_copy"] and not found.scores and not found.not_done
    with pytest.raises(UsageError, match="no kind of finding is called 'label_error'; choose from exact_copy, "):
        featcache.audit(work / "f.h5", kinds=("label_error",))  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="is no folder"):
        featcache.audit(work / "f.h5", source=work / "nowhere")


@pytest.fixture
def light(tmp_path: Path) -> dict[str, Any]:
    """Arguments of an audit of 60 rows whose images are not there."""
    make_classes(tmp_path / "f.h5", np.arange(60) % 3)
    (tmp_path / "empty").mkdir()
    return {"cache": tmp_path / "f.h5", "source": tmp_path / "empty"}


@pytest.mark.parametrize("step", ["comparing images", "judging labels", "scores", "pictures"])
def test_an_interruption_keeps_what_is_done(light: dict[str, Any], tmp_path: Path, step: str) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == step:
            raise KeyboardInterrupt

    folder = tmp_path / "audit"
    with pytest.raises(KeyboardInterrupt):
        featcache.audit(output=folder, progress=interrupt, **light)
    facts = json.loads((folder / "audit.json").read_text())
    assert facts["interrupted"] and facts["exact_copies"] == 0
    assert facts["not_done"]["dark"] == "interrupted"
    assert (facts["near_copies"] is None) == (step == "comparing images")
    assert (facts["label_suspects"] is None) == (step in ("comparing images", "judging labels"))
    assert bool(facts["scores"]) == (step == "pictures")
    assert len(read(folder / "plan.csv")) == 60
    featcache.audit(output=folder, kinds=("exact_copy",), **light)  # which replaces it
    assert not json.loads((folder / "audit.json").read_text())["interrupted"]


def test_interrupted_while_pictures_are_made_all_findings_are_kept(work: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == "pictures of the page":
            raise KeyboardInterrupt

    folder = tmp_path / "audit"
    with pytest.raises(KeyboardInterrupt):
        featcache.audit(work / "f.h5", folder, source=work / "photos", kinds=["exact_copy"], progress=interrupt)
    facts = json.loads((folder / "audit.json").read_text())
    assert facts["interrupted"] and (facts["exact_copies"], facts["not_done"]) == (2, {})
    assert len(read(folder / "plan.csv")) == 64 and len(read(folder / "audit.csv")) == 2
    assert "interrupted before they were made" in (folder / "audit.html").read_text()


@pytest.mark.parametrize("source", [(), ("--source", "pictures")])
def test_the_next_command_says_where_the_images_are(tmp_path: Path, source: tuple[str, ...], run) -> None:
    make_classes(tmp_path / "f.h5", np.arange(6) % 2)
    (tmp_path / "pictures").mkdir()
    _, _, err = run("audit", "f.h5", "-o", "my audit", *source)
    place = source[-1] if source else "FOLDER"
    assert f"then `featcache audit --apply 'my audit/plan.csv' -o clean.csv --root {place}`" in err


@pytest.mark.parametrize(
    ("split", "left_out", "title"),
    [
        ("out_of_fold", 15, "without each fold's suspects (about 15)"),
        ("val", 15, "and without 15 suspects of training"),
        ("test", 1, "and without 1 suspect of training"),
    ],
)
def test_suspects_that_training_leaves_out_are_not_those_of_the_list(split: str, left_out: int, title: str) -> None:
    score = Score(split, "without_suspects", 0.9, [0.8, 0.95], 100, left_out)
    assert score_title(score) == title
    assert "label suspects" not in title and len(title) <= 41  # beside figures, in 80 columns


@pytest.mark.parametrize(("wrong", "spread"), [(0.3, 1.0), (0.0, 6.0)], ids=["wrong labels", "overlap"])
def test_disagreement_is_not_taken_for_overlap(tmp_path: Path, wrong: float, spread: float) -> None:
    """Of labels alone the two cannot be told apart: neither is claimed, and the share is that of labels that heads repeat."""
    y = np.arange(150) % 3
    X = make_classes(tmp_path / "f.h5", y, spread=spread)
    given = np.where(np.random.default_rng(0).random(150) < wrong, (y + 1) % 3, y)
    rows = dataclasses.replace(FeatureCache.open(tmp_path / "f.h5").rows, labels=given.astype(np.int32))
    write_cache(tmp_path / "f.h5", rows, [X], dim=X.shape[1], spec=SPEC, classes=("a", "b", "c"))
    (half, sentence, *_) = how_sure(found := curation.examine(FeatureCache.open(tmp_path / "f.h5"), kinds=("label",)))
    assert "half" in half
    agree = (found.opinions.probabilities_of(found.opinions.known).argmax(axis=1) == given[found.opinions.known]).mean()
    assert sentence.startswith(f"Heads answer {agree:.0%} of the labels: either classes overlap, ")
    assert "or many labels are wrong" in sentence


def test_ctrl_c_on_the_command_line(
    light: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, run
) -> None:
    """While it scores: what is done is written, 130, one object. That a signal raises this: tests/system/test_signals.py."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(curation, "honest_scores", interrupt)
    code, out, _ = run("audit", light["cache"], "--source", light["source"], "-o", "audit", "--json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (130, 130)
    assert "interrupted: what is finished is in audit, the rest is named there as not done" in caplog.text
    facts = json.loads(Path("audit/audit.json").read_text())
    assert facts["not_done"]["scores"] == "interrupted" and facts["label_suspects"] is not None


def test_progress_names_every_step_and_the_seed_decides(light: dict[str, Any]) -> None:
    steps: dict[str, None] = {}
    first = featcache.audit(output="audit", progress=lambda done, total, what: steps.setdefault(what), **light)
    assert [*steps] == [
        "exact copies",
        "reading features",
        "comparing images",
        "near copies",
        "off topic",
        "outliers",
        "judging labels",
        "scores",
        "pictures",
        "pictures of the page",
    ]
    again = featcache.audit(FeatureCache.open(light["cache"]), source=light["source"], seed=0)
    assert list(again) == list(first) and again.scores == first.scores


def test_memory_that_is_not_there_is_said_before_work(
    light: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "featcache")
    monkeypatch.setattr(curation, "estimate", lambda *_, **__: (4000.0, 5 * 10**9))
    monkeypatch.setattr(curation, "available_memory", lambda: 2**40)
    featcache.audit(**light, kinds=("near_copy",))
    assert (
        "comparing 60 images on this CPU takes about 67 min and 5.0 GB of memory; Ctrl-C keeps what is finished"
        in caplog.text
    )
    monkeypatch.setattr(curation, "available_memory", lambda: 10**9)
    found = featcache.audit(**light, kinds=("near_copy", "exact_copy"))
    assert found.not_done == {"near_copy": "comparing 60 images needs about 5.0 GB of memory, 1.0 are free"}
    assert "exact_copy" in found.findings


@pytest.mark.filterwarnings("ignore")  # of its own dependencies; as errors it would swallow them
def test_datalab_takes_our_features_and_probabilities(found: Audit) -> None:
    """The recipe of ``featcache.audit``: it judges labels, and what have the same bytes are its near duplicates."""
    cleanlab = pytest.importorskip("cleanlab")
    pytest.importorskip("datasets")
    rows = found.opinions.known  # type: ignore[union-attr]
    lab = cleanlab.Datalab({"y": found.cache.y[rows]}, label_name="y")
    probabilities = found.opinions.probabilities_of(rows)  # type: ignore[union-attr]
    lab.find_issues(features=found.cache.X[rows].astype("f4"), pred_probs=probabilities)
    assert len(lab.get_issues("label")) == len(rows)
    sets = lab.get_issues("near_duplicate")["near_duplicate_sets"]
    places = {row: place for place, row in enumerate(rows.tolist())}
    pairs = [(finding.row, finding.other) for finding in found.findings["exact_copy"]]
    assert pairs and all(places[other] in sets[places[row]] for row, other in pairs if other is not None)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No photos in the working folder that an audit could find by chance."""
    monkeypatch.chdir(tmp_path)
    yield
