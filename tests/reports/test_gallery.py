"""The gallery of predictions: what is counted, drawn, said; pictures of exactly what was labelled, within the budget."""

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_photos, write_photo
from kitchen import HOSTILE
from PIL import Image

import featcache
from featcache.errors import FeatcacheError, SourceError, UsageError
from featcache.heads.head import softmax
from featcache.images.source import Source
from featcache.models.model import Model, load_model
from featcache.models.prediction import Prediction
from featcache.reports.gallery import Draw
from featcache.reports.gallery_page import gallery_page

Run = Callable[..., tuple[int, str, str]]


def data_of(html: str) -> dict[str, Any]:
    """What the page tells its script of the cards."""
    found: dict[str, Any] = json.loads(html.partition('id="data">')[2].partition("</script>")[0])["cards"]
    return found


def pictures_of(html: str) -> list[Image.Image]:
    """Those of the cards, in their order."""
    main = html.partition("data-main")[2].partition('id="origin"')[0]
    texts = re.findall(r'<img src="data:image/webp;base64,([^"]+)"', main)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in texts]


def predictions(model: Model, count: int) -> Iterator[Prediction]:
    """Made up; every tenth refused, every seventh in doubt."""
    rows = softmax(np.random.default_rng(0).normal(0, 2, (count, len(model.classes))))
    for k, row in enumerate(rows):
        doubt = "probability below 0.9" if k % 7 == 0 else ""
        if k % 10 == 9:
            yield Prediction(f"{k}.jpg", None, "empty file", classes=model.classes)
        else:
            yield Prediction(f"{k}.jpg", row, "", bytes([k % 256]) * 32, model.classes, doubt=doubt)


def test_the_page_says_what_predict_says(trained: Path, tmp_path: Path, run: Run) -> None:
    page, table = tmp_path / "out.html", tmp_path / "out.jsonl"
    flags = ["-o", table, "--gallery", page, "--evidence", trained / "f.h5", "--abstain-below", 0.9, "--json"]
    (trained / "photos" / "red" / "broken.jpg").write_bytes(b"no image")
    try:
        code, out, err = run("predict", trained / "m", trained / "photos", *flags)
    finally:
        (trained / "photos" / "red" / "broken.jpg").unlink()
    assert code == 0, err
    facts, rows = json.loads(out), [json.loads(line) for line in table.read_text().splitlines()]
    assert facts["gallery"] == str(page) and facts["images"] == len(rows) == 25
    data = data_of(page.read_text())
    assert data["path"] == [row["path"] for row in rows]
    assert [data["classes"][k] if k >= 0 else "" for k in data["predicted"]] == [row["label"] for row in rows]
    assert [data["statuses"][k] for k in data["status"]] == [row["status"] for row in rows]
    assert data["probability"] == [row["probability"] or -1 for row in rows]
    assert data["unfamiliarity"] == [
        pytest.approx(row["unfamiliarity"] or 0 if row["label"] else -1, abs=1e-4) for row in rows
    ]
    assert [data["classes"][k] for k in data["label"]] == [Path(row["path"]).parent.name for row in rows]  # of folders
    for row, near in zip(rows, data["evidence"], strict=True):
        assert [entry[0] for entry in near] == [row[f"nearest_{k}"] for k in (1, 2, 3)][: len(near)]
        assert all(data["classes"][entry[1]] == entry[0].split("/")[0] and entry[3] >= 0 for entry in near)
    assert len(pictures_of(page.read_text())) == 24
    assert "<td><bdi>not an image, or of an unsupported format</bdi></td>" in page.read_text()


def test_pictures_are_those_of_their_rows(trained: Path, tmp_path: Path) -> None:
    held = np.full((40, 60, 3), (200, 30, 180), np.uint8)
    paths = sorted((trained / "photos").rglob("*.jpg"))[::5]
    html = featcache.gallery(trained / "m", [*paths, held, Image.fromarray(held[:, :30])]).html
    assert data_of(html)["path"] == [*map(str, paths), f"inputs[{len(paths)}]", f"inputs[{len(paths) + 1}]"]
    for path, picture in zip(paths, pictures_of(html), strict=False):
        expected = np.asarray(Image.open(path).convert("RGB"), np.float64).mean((0, 1))
        assert np.abs(np.asarray(picture.convert("RGB"), np.float64).mean((0, 1)) - expected).max() < 6
    assert [picture.size for picture in pictures_of(html)[-2:]] == [(60, 40), (30, 40)]


def test_a_file_that_changed_has_no_picture(trained: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "p", each=1)
    model = load_model(trained / "m")
    draw = Draw(model, tmp_path / "p")
    found = list(draw.watch(featcache.predict(model, tmp_path / "p")))
    write_photo(Path(found[0].path), (0, 0, 0), 99)
    Path(found[1].path).unlink()
    html = gallery_page(draw)
    assert len(pictures_of(html)) == 1
    assert "the file has changed since" in html and "2 images have no picture here" in html


@pytest.mark.parametrize("where", ["given", "beside", "nowhere"])
def test_rows_of_a_cache_find_their_pictures_by_digest(where: str, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "f.h5", tmp_path / "f.h5")
    photos = tmp_path / ("photos" if where == "beside" else "elsewhere/photos")
    if where != "nowhere":
        shutil.copytree(trained / "photos", photos)
    page = featcache.gallery(trained / "m", tmp_path / "f.h5", pictures=photos if where == "given" else None)
    assert len(pictures_of(page.html)) == (0 if where == "nowhere" else 24)
    assert ("--source FOLDER says where" in page.html) == (where == "nowhere")
    assert data_of(page.html)["correct"].count(-1) == 0  # labels are the cache's


@pytest.mark.parametrize(
    ("folders", "labels"),
    [(("red", "blue"), {"red", "blue"}), (("red", "misc"), {"red", None}), (("monday", "tuesday"), {None})],
)
def test_labels_are_folders_that_the_model_knows(
    folders: tuple[str, ...], labels: set[str | None], trained: Path, tmp_path: Path
) -> None:
    for folder in folders:
        write_photo(tmp_path / folder / "1.jpg", (200, 40, 30), 1)
    draw = Draw(load_model(trained / "m"), tmp_path)
    paths = [str(tmp_path / folder / "1.jpg") for folder in folders]
    assert {draw.label(path) for path in paths} == labels


def test_a_table_that_contradicts_itself_labels_nothing(trained: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_photo(tmp_path / f"{name}.jpg", (200, 40, 30), 1)
    for number, label in enumerate(("red", "blue")):
        (tmp_path / f"{number}.csv").write_text(f"path,label\na.jpg,{label}\nb.jpg,red\n")
    draw = Draw(load_model(trained / "m"), [tmp_path / "0.csv", tmp_path / "1.csv"])
    assert [draw.label(str(tmp_path / f"{name}.jpg")) for name in "ab"] == [None, "red"]


@pytest.mark.parametrize("sample", [None, 1, 30, 200, 500])
def test_all_are_counted_and_some_drawn(sample: int | None, model: Path) -> None:
    loaded = load_model(model)
    draw = Draw(loaded, np.zeros((5, 5, 3), np.uint8), sample=sample)
    seen = list(draw.watch(predictions(loaded, 200)))
    assert draw.images == len(seen) == 200
    assert draw.status == {
        "refused": 20,
        "unsure": sum(each.status == "unsure" for each in seen),
        "ok": 180 - draw.status["unsure"],
    }
    assert sum(draw.predicted.values()) == sum(draw.sure) == 180 and len(draw.refused) == 20
    numbers = [int(row.path.split(".")[0]) for row in draw.rows]
    assert numbers == sorted(set(numbers)) and len(numbers) == min(sample or 200, 200)
    html = gallery_page(draw)
    assert ("drawn at random (seed 0)" in html) == (len(numbers) < 200)
    assert "20 images could not be labelled" in html and html.count("<td><bdi>empty file</bdi></td>") == 20
    again = Draw(loaded, np.zeros((5, 5, 3), np.uint8), sample=sample)
    list(again.watch(predictions(loaded, 200)))
    assert again.rows == draw.rows


def test_every_image_has_the_same_chance(model: Path) -> None:
    loaded, hits = load_model(model), np.zeros(40)
    for seed in range(300):
        draw = Draw(loaded, np.zeros((5, 5, 3), np.uint8), sample=10, seed=seed)
        list(draw.watch(predictions(loaded, 40)))
        hits[[int(row.path.split(".")[0]) for row in draw.rows]] += 1
    # Chi-square with 39 degrees of freedom, of draws without replacement: 99.9 % lie below 73 (* 0.75).
    assert ((hits - 75) ** 2 / 75).sum() < 73


def test_beyond_the_budget_pictures_are_left_out_and_doubts_come_first(trained: Path) -> None:
    model = load_model(trained / "m")
    draw = Draw(model, trained / "photos")
    limit = sorted(each.probability or 0.0 for each in model.predict(trained / "photos"))[8]
    found = list(draw.watch(model.predict(trained / "photos", abstain_below=limit)))
    rows = [row for row in draw.rows if row.status == "unsure"]
    assert len(rows) == 8 and len(found) == 24
    html = gallery_page(draw, budget=24 * 2100 + len(rows) * 3000)
    shown = pictures_of(html)
    assert len(rows) <= len(shown) < 24
    doubted = [card for card in html.split('<li class="card')[1:] if 'class="unsure"' in card]
    assert len(doubted) == 8 and all("<img" in card for card in doubted)
    assert f"{24 - len(shown)} pictures are left out, to keep the page small: every mistake and doubt has one" in html
    assert len(html) < len(gallery_page(draw))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_names_stay_text(trained: Path, tmp_path: Path) -> None:
    names = [name.replace("/", "|").replace("\0", "")[:80] for name in HOSTILE]
    paths = [tmp_path / "red" / name / f"{name}.png" for name in names]
    for number, path in enumerate(paths):
        write_photo(path, (200, 40, 30), number)
    page = featcache.gallery(trained / "m", tmp_path)
    parser = _Tags()
    parser.feed(page.html)
    assert parser.tags.count("script") == 2
    assert not {name for name in parser.attributes if name.startswith("on") or name == "style"}
    assert sorted(data_of(page.html)["path"]) == sorted(map(str, paths))
    page.save(tmp_path / "page.html").read_text("utf-8")


def test_missing_pictures_of_training_images_are_said(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "f.h5", tmp_path)
    image = Image.new("RGB", (40, 40), (200, 0, 0))
    html = featcache.gallery(trained / "m", [image], evidence=tmp_path / "f.h5").html
    assert "nearest training images have no pictures here; --source FOLDER says where" in html
    page = featcache.gallery(trained / "m", [image], evidence=tmp_path / "f.h5", pictures=trained / "photos")
    assert "nearest training images have no pictures" not in page.html and page.html.count("data:image/webp") == 1 + 3


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--gallery", "out.txt"], "a page is written to a file whose name ends in .html"),
        (["--gallery", "no/out.html"], "no"),
        (["--gallery", "foreign.html"], "is no page that featcache wrote"),
        (["--gallery", "m/out.html"], "is a model folder, which keeps no other files"),
        (["--sample", 3], "--sample is for the page that --gallery names"),
        (["--source", "photos"], "--source is for the page that --gallery names"),
        (["--gallery", "out.html", "--source", "nowhere", "--evidence", "c.h5"], "nowhere is no folder"),
        (["--gallery", "out.html", "--source", "."], "--source . is for images of caches"),
    ],
)
def test_what_cannot_be_is_refused_before_work(
    flags: list[object],
    error: str,
    trained: Path,
    tmp_path: Path,
    run: Run,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "m", "m")
    Path("foreign.html").write_text("<p>mine")
    code, out, err = run("predict", "m", trained / "photos", *flags)
    assert code in (1, 2) and not out and error in err and err.count("\n") == 1
    assert Path("foreign.html").read_text() == "<p>mine" and not Path("out.html").exists()


def test_an_impossible_sample_is_refused(trained: Path) -> None:
    for sample in (0, 2.5, "3"):
        with pytest.raises(FeatcacheError, match="at least 1, found"):
            featcache.gallery(trained / "m", trained / "photos", sample=sample)


def test_pictures_are_for_caches_and_refused_without(trained: Path, no_model: None) -> None:
    for inputs in (trained / "photos", iter([trained / "photos"]), np.zeros((9, 9, 3), np.uint8)):
        with pytest.raises(UsageError, match=r"^--source \. is for images of caches, of --evidence, too; leave it out"):
            featcache.gallery(trained / "m", inputs, pictures=".")
    with pytest.raises(SourceError, match=r"^--source nowhere is no folder"):
        featcache.gallery(trained / "m", [trained / "f.h5"], pictures="nowhere")


def test_a_gallery_adds_no_note_about_its_inputs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``predict`` has listed them; and stdin is called so on the page."""
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path / "a.jpg", (200, 0, 0), 1)
    (tmp_path / "list.txt").write_text("a.jpg\n")
    inputs = [Source("-"), Source(tmp_path / "list.txt"), Source(trained / "photos")]
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr("os.dup", lambda _: os.open(tmp_path / "list.txt", os.O_RDONLY))
        draw = Draw(load_model(trained / "m"), inputs)
    assert len(draw.inputs.labels) == 24 and not caplog.messages
    assert ">stdin, " in gallery_page(draw).split('id="origin"')[1]


def test_where_all_are_refused_the_page_says_why(trained: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    code, _, err = run("predict", trained / "m", tmp_path / "a.jpg", "--gallery", tmp_path / "out.html")
    assert code == 1 and "not one image could be labelled" in err
    assert "1 image could not be labelled" in (html := (tmp_path / "out.html").read_text()) and "empty file" in html
