"""What a model says of images in memory is what it says of the same pictures in files; predictions as people use them."""

import io
import logging
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import COLOURS, make_photos
from PIL import Image

from featcache.backbones.saved import SavedBackbone
from featcache.errors import MissingDependencyError, SourceError, UsageError
from featcache.models.model import Model, load_model
from featcache.models.predict import predict
from featcache.models.prediction import Prediction, Predictions

CLASSES = ("ant", "<script>alert(1)</script>", "cat\udce9")
LIKELY = Prediction("a.jpg", np.array([0.2, 0.7, 0.1]), classes=CLASSES)
REFUSED = Prediction("<b>.jpg", None, "empty file", classes=CLASSES)


@pytest.fixture(scope="module")
def model(trained: Path) -> Model:
    return load_model(trained / "m")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six PNG files of three colours, of one size."""
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for path in sorted(make_photos(folder / "jpg", each=2).rglob("*.jpg")):
        paths.append(str(folder / f"{path.parent.name}{path.stem}.png"))
        opened(str(path)).save(paths[-1])
    return paths


def opened(file: str) -> Image.Image:
    return Image.open(io.BytesIO(Path(file).read_bytes()))  # no file is left open


def arrays(files: list[str]) -> list[np.ndarray]:
    return [np.asarray(opened(file)) for file in files]


def scores(predictions: Any) -> np.ndarray:
    return np.stack([prediction.probabilities for prediction in predictions])


def test_the_same_picture_gets_the_same_probabilities(model: Model, files: list[str]) -> None:
    """To the last bit: it goes the same way."""
    expected = model.predict(files, device="cpu")
    assert [prediction.label for prediction in expected] == [name for name in COLOURS for _ in range(2)]
    pictures = [opened(file) for file in files]
    loaded = [Image.fromarray(array) for array in arrays(files)]
    mixed = [files[0], pictures[1], arrays(files)[2], Path(files[3]), loaded[4], np.str_(files[5])]
    column = pd.Series(files)
    for inputs in (
        pictures,
        loaded,
        arrays(files),
        np.stack(arrays(files)),
        mixed,
        column,
        column.to_numpy(),
        iter(files),
    ):
        found = model.predict(inputs, device="cpu")
        np.testing.assert_array_equal(scores(found), scores(expected))
    assert [p.path for p in model.predict(mixed)] == [
        files[0],
        "inputs[1]",
        "inputs[2]",
        files[3],
        "inputs[4]",
        files[5],
    ]
    assert [p.path for p in model.predict([files[0], np.stack(arrays(files[:2]))])] == [
        *(files[0], "inputs[1][0]", "inputs[1][1]")
    ]
    one = model.predict(arrays(files)[0])
    assert (len(one), one[0].path) == (1, "inputs")


def test_greys_and_files_of_pil_images(model: Model, files: list[str], tmp_path: Path) -> None:
    grey = opened(files[0]).convert("L")
    grey.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(scores(model.predict(np.asarray(grey))), scores(model.predict(tmp_path / "grey.png")))
    known, file = model.predict(opened(files[0]))[0].digest, model.predict(files[0])[0].digest
    assert known == file  # so that what training has seen is known
    assert model.predict(np.asarray(grey))[0].digest not in (b"", file)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (np.zeros((4, 4, 3)), r"inputs is an array of float64 \(4, 4, 3\); expected uint8 .* \(255 \* array\)"),
        ([np.zeros((3, 40, 50), np.uint8)], r"inputs\[0\] is an array .*array\.transpose\(1, 2, 0\)"),
        (np.zeros((0, 4, 3), np.uint8), r"array of uint8 \(0, 4, 3\); expected"),
        (np.zeros(4, np.uint8), r"array of uint8 \(4,\)"),
        (torch.zeros(3, 4, 4), r"inputs is a torch\.Tensor; give .* \(255 \* tensor\)"),
        (["x.jpg", torch.zeros(3, 4, 4)], r"inputs\[1\] is a torch\.Tensor"),
        (pd.DataFrame({"path": ["x.jpg"]}), r"give the column of paths, frame\[\"path\"\]"),
        (pd.Series(["x.jpg", float("nan")]), r"inputs\[1\] is a float"),
        ([b"bytes"], r"inputs\[0\] is a bytes; give paths"),
        ([None], r"inputs\[0\] is a NoneType"),
        (7, "inputs is a int"),
        ({"a": 1}, "inputs is a dict"),
    ],
)
def test_what_is_no_image_is_refused_before_work_starts(
    model: Model, inputs: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SavedBackbone, "load", None)
    with pytest.raises(UsageError, match=words):
        predict(model, inputs)


def test_a_pil_image_without_meaning_is_one_refusal(model: Model, files: list[str]) -> None:
    found = model.predict([opened(files[0]).convert("F"), files[0]])
    assert [prediction.label for prediction in found] == [None, "blue"]
    assert found[0].reason.startswith("32-bit pixels")


def test_images_in_memory_among_refused_ones_keep_their_places(model: Model, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\n../outside.jpg\n")  # refused when listed, not when read
    (tmp_path / "broken.jpg").touch()
    inputs = [tmp_path / "list.csv", arrays(files)[0], tmp_path / "broken.jpg", arrays(files)[4], tmp_path / "list.csv"]
    assert [prediction.label for prediction in model.predict(inputs)] == [None, "blue", None, "red", None]


def test_caches_do_not_mix_with_images_in_memory(model: Model, trained: Path, files: list[str]) -> None:
    with pytest.raises(UsageError, match="cannot be mixed"):
        model.predict([trained / "f.h5", arrays(files)[0]])
    cached = model.predict(trained / "f.h5")
    assert (len(cached), {prediction.label for prediction in cached}) == (24, set(COLOURS))
    with pytest.raises(SourceError, match="does not exist"):
        model.predict([arrays(files)[0], "gone.jpg"])


def test_the_backbone_is_loaded_and_checked_once(
    trained: Path, files: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checked once more on the first call that offers enough images; never loaded again."""
    fresh, loads, load = load_model(trained / "m"), [], SavedBackbone.load
    monkeypatch.setattr(SavedBackbone, "load", lambda self: (loads.append(self), load(self))[1])
    with caplog.at_level(logging.DEBUG, "featcache"):
        for inputs in (files[:1], files[1:3], files, files[:1], files):
            fresh.predict(inputs, device="cpu", batch_size=4)
        list(predict(fresh, files, device="cpu", batch_size=4))
    assert len(loads) == 1
    assert sum(message.startswith("precision") for message in caplog.messages) == 2
    assert load_model(pickle.loads(pickle.dumps(fresh)).path).classes == fresh.classes  # a model is still data


def test_a_prediction_says_what_it_is() -> None:
    assert (LIKELY.label, LIKELY.probability) == (CLASSES[1], 0.7)
    assert LIKELY.top(2) == [(CLASSES[1], 0.7), ("ant", 0.2)]
    assert LIKELY.top(9) == LIKELY.top(3)
    assert (REFUSED.label, REFUSED.probability, REFUSED.top(3)) == (None, None, [])
    assert repr(LIKELY) == "Prediction('a.jpg': '<script>alert(1)</script>' 0.7000)"
    assert repr(REFUSED) == "Prediction('<b>.jpg': refused, empty file)"
    with pytest.raises(UsageError, match="at least one"):
        LIKELY.top(0)


def test_predictions_are_a_sequence() -> None:
    rows = Predictions((LIKELY, REFUSED) * 30)
    assert (len(rows), rows[1], rows[-2], list(rows)[:2]) == (60, REFUSED, LIKELY, [LIKELY, REFUSED])
    assert isinstance(rows[2:5], Predictions) and list(rows[2:5]) == [LIKELY, REFUSED, LIKELY]
    assert repr(rows) == "Predictions(60 images: '<script>alert(1)</script>' 30, refused 30)"
    assert repr(rows[:2]) == f"[{LIKELY!r}, {REFUSED!r}]"
    shown = rows._repr_html_()
    assert shown.count("<tr>") == 22 and "40 images more" in shown
    assert "<script>" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown
    Predictions((Prediction("caf\udce9.jpg", None, "x"),))._repr_html_().encode()  # fit to be saved


def test_predictions_to_pandas() -> None:
    frame = Predictions((LIKELY, REFUSED)).to_pandas(top_k=2, probs=True)
    assert frame.columns.tolist() == [
        *("path", "label", "probability", "status", "reason", "label_2", "probability_2"),
        *(f"prob:{name}" for name in CLASSES),
    ]
    assert frame["path"].tolist() == ["a.jpg", "<b>.jpg"]
    assert frame["status"].tolist() == ["ok", "refused"]
    assert frame["label"].isna().tolist() == [False, True]
    assert frame["probability"].dtype == float and frame["probability"][0] == 0.7
    assert frame[f"prob:{CLASSES[2]}"][0] == 0.1
    assert Predictions(()).to_pandas().columns.tolist() == ["path", "label", "probability", "status", "reason"]


def test_predictions_of_a_column_join_its_frame(model: Model, files: list[str], tmp_path: Path) -> None:
    frame = pd.DataFrame({"path": files}, index=list("abcdef"))
    chosen = frame[frame["path"].str.contains("red|blue")]
    joined = chosen.join(model.predict(chosen["path"]).to_pandas()["label"])
    assert joined["label"].tolist() == ["blue", "blue", "red", "red"]
    assert model.predict(chosen["path"])[1:].to_pandas().index.tolist() == ["b", "e", "f"]
    folders = pd.Series([str(make_photos(tmp_path, each=1))], index=["x"])  # several images for an entry
    assert model.predict(folders).to_pandas().index.tolist() == [0, 1, 2]


def test_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        Predictions((LIKELY,)).to_pandas()


def test_any_number_of_images_is_predicted_lazily(model: Model, files: list[str]) -> None:
    found = predict(model, files * 50, device="cpu", batch_size=2)
    assert isinstance(found, Iterator)
    assert next(found).label == "blue"
    found.close()  # type: ignore[attr-defined]


def test_what_is_known_only_at_the_end_is_said(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Of all images together: that samples of 12 bits came out nearly black."""
    deep = Image.fromarray(np.full((40, 50), 4095, np.uint16))
    with caplog.at_level(logging.WARNING, "featcache"):
        model.predict([deep, deep])
    assert ["images of 16 bits use at most" in message for message in caplog.messages] == [True]


def test_several_threads_share_one_model(trained: Path, files: list[str]) -> None:
    """As a server's do; the first call, which loads the backbone, included."""
    fresh = load_model(trained / "m")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: fresh.predict(opened(files[number % 6]), device="cpu"), range(24)))
    assert [rows[0].label for rows in found] == ["blue", "blue", "green", "green", "red", "red"] * 4
