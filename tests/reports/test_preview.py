"""What is drawn is what training and prediction see, pixel by pixel; of any source, whatever its names are."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_FLAGS, make_photos
from PIL import Image

from featcache.errors import BackboneError, SourceError, StorageError, UsageError
from featcache.finetuning.finetune import finetune
from featcache.finetuning.micro_batches import MicroBatches
from featcache.finetuning.trainer import Trainer
from featcache.images.decode import read_pixels
from featcache.models.model import load_model
from featcache.reports.preview import preview, sample

TIMES = 7  # 224 // 32: how often a pixel of the network is drawn in each direction
Array = Any


def colours(pixels: Array) -> Array:
    """(H, W, 3) uint8 -> (H, W), a number per colour."""
    return pixels.astype(np.int32) @ np.array([1, 256, 65536])


def drawn(png: bytes) -> Array:
    with Image.open(io.BytesIO(png)) as image:
        return colours(np.asarray(image.convert("RGB")))


def shows(picture: Array, view: Array) -> bool:
    """Whether ``view``, enlarged, is in ``picture`` at any place."""
    block = colours(view).repeat(TIMES, 0).repeat(TIMES, 1)
    height, width = block.shape
    found = np.argwhere((picture[:, :-TIMES] == block[0, 0]) & (picture[:, TIMES:] == block[0, TIMES]))
    return any(np.array_equal(picture[y : y + height, x : x + width], block) for y, x in found)


def test_columns_are_what_the_trainer_gives_the_network(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Recorded where a part of a batch enters."""
    seen: list[list[Array]] = []
    run_epoch, logits = Trainer.run_epoch, MicroBatches.logits

    def recorded(trainer: Trainer, **options: Any) -> tuple[float, float]:
        seen.append([])
        return run_epoch(trainer, **options)

    def noted(parts: MicroBatches, pixels: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # not the comparison with the cached head
            seen[-1].extend(pixels.numpy())
        return logits(parts, pixels)

    monkeypatch.setattr(MicroBatches, "logits", noted)
    monkeypatch.setattr(Trainer, "run_epoch", recorded)
    changes = {"epochs": 2, "augmentation": [("resized_crop", 0.3, 1.0, 1.0), ("flip", 0.5), ("jitter", 0.4, 0, 0, 0)]}
    finetune(trained / "photos", tmp_path / "ft", init=trained / "m", changes=changes, precision="fp32", seed=3)
    made = preview(trained / "photos", changes=changes, backbone=trained / "m", n=5, views=2, seed=3)
    picture = drawn(made.png)
    assert made.listed == len(seen[0]) == 21  # of 24, three are held out
    for epoch in seen:
        assert sum(shows(picture, view) for view in epoch) == 5


def test_evaluation_is_what_prediction_sees(trained: Path) -> None:
    made = preview(trained / "photos", backbone=trained / "m", n=4)
    spec = load_model(trained / "m").spec.preprocess
    assert (made.recipe, made.views, made.preprocess) == (None, 0, spec)
    for row in made.images:
        assert shows(drawn(made.png), read_pixels((trained / "photos" / str(row["path"])).read_bytes(), spec))


def test_weights_are_not_needed(photos: Path) -> None:
    """There is no network in the tests, and these weights are nowhere else."""
    made = preview(photos, backbone="mobilenet_v3_small", n=2)
    assert (made.preprocess.resize, made.preprocess.crop) == (256, (224, 224))
    with pytest.raises(BackboneError, match="near: mobilenet_v3_small"):
        preview(photos, backbone="mobilenet_v3_smal")


def test_the_classes_take_turns() -> None:
    labels = np.repeat([0, 1, 2], [40, 3, 1])
    order = sample(labels, seed=1)
    assert sorted(order) == list(range(44))
    assert [sorted(labels[order[a:b]]) for a, b in ((0, 3), (3, 5), (5, 7))] == [[0, 1, 2], [0, 1], [0, 1]]
    assert np.array_equal(order, sample(labels, seed=1)) and not np.array_equal(order, sample(labels, seed=2))


HOSTILE = [
    "<script>alert(1)",
    "line\nbreak \x1b[31m",
    "\u202eright to left",
    "\u05d7\u05ea\u05d5\u05dc 7",
    "猫",
    "bad\udcff",
    "x" * 200,
]


@pytest.mark.parametrize("flat", [False, True])
def test_names_may_hold_anything(tmp_path: Path, flat: bool) -> None:
    for number, name in enumerate(HOSTILE):
        path = tmp_path / "s" / (f"{name}.png" if flat else f"{name}/{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            Image.new("RGB", (50, 40), (30 * number, 0, 0)).save(file, "PNG")
    made = preview(tmp_path / "s", tmp_path / "p.png", recipe="flowers", request=TINY, n=20)
    assert len(made.images) == len(HOSTILE)
    assert {row["label"] for row in made.images} == ({None} if flat else set(HOSTILE))
    assert (tmp_path / "p.png").read_bytes() == made._repr_png_() == made.png


def test_what_cannot_be_decoded_is_said_and_replaced(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=2)
    for path in photos.glob("*/01.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    made = preview(photos, request=TINY, n=6)
    assert len(made.images) == 3 and len(made.refused) == 3
    assert all(row["path"] != "red/01.jpg" for row in made.images) and "red/01.jpg" in made.refused
    for path in photos.glob("*/00.jpg"):
        path.write_bytes(b"")
    with pytest.raises(SourceError, match="all 6 images"):
        preview(photos, request=TINY)


@pytest.mark.parametrize(
    ("size", "request_", "shape"),
    [((3000, 20), TINY, None), ((20, 3000), TINY, None), ((1, 1), TINY, None), ((90, 60), "--crop 400", (400, 400))],
)
def test_odd_sizes(tmp_path: Path, size: tuple[int, int], request_: Any, shape: Any) -> None:
    (tmp_path / "s").mkdir()
    Image.new("RGB", size, "red").save(tmp_path / "s" / "a.png")
    options = {"backbone": "squeezenet1_1", "weights": "none", "crop": 400} if shape else {"request": request_}
    made = preview(tmp_path / "s", recipe="caltech101", **options)
    assert len(made.images) == 1 and (shape is None or made.preprocess.crop == shape)


def test_only_own_pictures_are_replaced(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    for _ in range(2):
        preview(photos, path, request=TINY, n=1)
    before = path.read_bytes()
    Image.new("RGB", (9, 9)).save(tmp_path / "mine.png")
    for name, kind in (("mine.png", StorageError), ("p.jpg", UsageError), ("no/p.png", StorageError)):
        with pytest.raises(kind):
            preview(photos, tmp_path / name, request=TINY)
    assert path.read_bytes() == before
    for wrong in (
        {"n": 0},
        {"views": 0},
        {"n": 1.5},
        {"views": "2"},
        {"seed": None},
        {"seed": -1},
        {"recipe": "flower"},
        {"changes": {"lrr": 1}},
        {"bakbone": "x"},
    ):
        with pytest.raises(UsageError):
            preview(photos, **{"request": TINY, **wrong} if "bakbone" not in wrong else wrong)


def test_command(photos: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("preview", photos, "--recipe", "flowers", "--n", 3, *TINY_FLAGS[:-2])
    assert code == 0 and (tmp_path / "preview.png").is_file()
    assert out.startswith(
        "preview.png: 3 of 15 images as squeezenet1_1 sees them, 4 views of each by the recipe flowers\n"
    )
    assert out.count("\n") == 4
    code, out, _ = run("preview", photos, "-o", "x.png", "--json", *TINY_FLAGS[:-2], "--set", "epochs=1", "--n", 2)
    facts = json.loads(out)
    assert (facts["preview"], facts["recipe"], facts["views"], len(facts["images"])) == ("x.png", "default", 4, 2)
    assert run("preview", photos, "-o", "x.jpg")[0] == 2
    code, out, _ = run("preview", photos, "-o", "x.png", "--views", 2, "--json", *TINY_FLAGS[:-2])  # are of a recipe
    assert [json.loads(out)[name] for name in ("recipe", "views")] == ["default", 2]
