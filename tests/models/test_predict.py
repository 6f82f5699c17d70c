"""Every input image has its row, in order, and the row is about that image; scores match classes by name.

Whether images or their cache are given makes no difference.
"""

from pathlib import Path

import numpy as np
import pytest
from caches import CLASSES_DIM
from conftest import SPEC, write_photo

import featcache
from featcache.cache.cache import FeatureCache
from featcache.cache.format import Rows
from featcache.cache.write import write_cache
from featcache.errors import ModelError, SourceError, UsageError
from featcache.models.evaluate import evaluate
from featcache.models.model import load_model
from featcache.models.predict import predict


def test_images_and_cache_agree(trained: Path) -> None:
    from_images = list(predict(trained / "m", [trained / "photos"]))
    from_cache = list(predict(trained / "m", [trained / "f.h5"]))
    assert [p.path for p in from_images] == [str(trained / "photos" / p.path) for p in from_cache]
    a, b = np.stack([p.probabilities for p in from_images]), np.stack([p.probabilities for p in from_cache])
    np.testing.assert_array_equal(a.argmax(1), b.argmax(1))
    np.testing.assert_allclose(a, b, atol=0.02)
    names = np.array(load_model(trained / "m").classes)[a.argmax(1)]
    assert list(names) == [p.path.split("/")[-2] for p in from_images]


@pytest.mark.parametrize("kind", [str, Path])
def test_one_input_needs_no_list(trained: Path, kind: type[str] | type[Path]) -> None:
    photo = next((trained / "photos" / "red").iterdir())
    for entry in (photo, trained / "f.h5"):
        assert [p.path for p in predict(str(trained / "m"), kind(entry))] == [
            p.path for p in predict(trained / "m", [entry])
        ]


def test_refused_images_keep_their_rows(trained: Path, tmp_path: Path) -> None:
    for number in range(20):  # more than a batch, every third unusable, in any order of kinds
        if number % 3 == 0:
            (tmp_path / f"{number:02d}.jpg").write_bytes(b"" if number % 2 else b"text")
        else:
            write_photo(tmp_path / f"{number:02d}.jpg", [(210, 40, 30), (30, 40, 200)][number % 2], number)
    (tmp_path / "07b.jpg").symlink_to(tmp_path / "nowhere")
    results = list(predict(trained / "m", [tmp_path]))
    assert [Path(p.path).name for p in results] == sorted([f"{k:02d}.jpg" for k in range(20)] + ["07b.jpg"])
    classes = load_model(trained / "m").classes
    for result in results:
        number = int(Path(result.path).name[:2])
        if result.probabilities is None:
            assert result.reason in ("empty file", "not an image, or of an unsupported format", "dangling link")
        else:
            assert classes[result.probabilities.argmax()] == ["red", "blue"][number % 2]
    assert sum(p.probabilities is None for p in results) == 8


def test_inputs_in_any_mixture_come_back_as_typed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photo(Path("b.jpg"), (210, 40, 30), 1)
    write_photo(Path("folder/deep/er/a.jpg"), (210, 40, 30), 2)
    write_photo(Path("folder/train/x/a.jpg"), (210, 40, 30), 3)  # no layout is asked of images to label
    Path("list.csv").write_text("path\nb.jpg\nmissing.jpg\nfolder/deep/er/a.jpg\n../outside.jpg\n")
    results = list(predict(trained / "m", ["b.jpg", "folder", "list.csv", "./b.jpg"]))
    assert [p.path for p in results] == [
        *("b.jpg", "folder/deep/er/a.jpg", "folder/train/x/a.jpg"),
        *("b.jpg", "missing.jpg", "folder/deep/er/a.jpg", "../outside.jpg"),
        "b.jpg",
    ]
    assert [p.probabilities is None for p in results] == [False, False, False, False, True, False, True, False]


def test_useless_inputs(trained: Path, tmp_path: Path) -> None:
    for name in ("nowhere.jpg", "x" * 300 + ".jpg"):
        with pytest.raises(SourceError, match="does not exist"):
            predict(trained / "m", [tmp_path / name])
    with pytest.raises(UsageError, match="cannot be mixed"):
        predict(trained / "m", [trained / "f.h5", trained / "photos"])
    with pytest.raises(ModelError, match="expected the folder of a model"):
        predict(tmp_path, [trained / "photos"])


def test_evaluate_images_and_cache_agree(trained: Path) -> None:
    a, b = evaluate(trained / "m", trained / "photos"), evaluate(trained / "m", trained / "f.h5")
    assert a["n"] == b["n"] == 24
    assert a["confusion"] == b["confusion"]
    with pytest.raises(SourceError, match="no split 'test'"):
        evaluate(trained / "m", trained / "f.h5", split="test")


def test_evaluate_matches_classes_by_name(model: Path, cache: Path, tmp_path: Path) -> None:
    direct = evaluate(model, cache, split="test")
    # the same rows, but their classes are b, c only and so have other numbers
    opened = FeatureCache.open(cache)
    keep = np.flatnonzero((opened.rows.splits == 3) & (opened.y > 0))
    columns = {name: column[keep] for name, column in vars(opened.rows).items()}
    rows = Rows(**columns | {"labels": columns["labels"] - 1})
    write_cache(tmp_path / "g.h5", rows, [opened.X[keep]], dim=CLASSES_DIM, spec=SPEC, classes=("b", "c"))
    fewer = evaluate(model, tmp_path / "g.h5")
    assert (direct["split"], fewer["split"]) == ("test", "test")
    for name in "bc":
        assert fewer["per_class"][name]["recall"] == direct["per_class"][name]["recall"]
    write_cache(tmp_path / "h.h5", rows, [opened.X[keep]], dim=CLASSES_DIM, spec=SPEC, classes=("b", "zebra"))
    with pytest.raises(SourceError, match="zebra, which the model does not know"):
        evaluate(model, tmp_path / "h.h5")


def test_the_front_door_has_no_other_names() -> None:
    with pytest.raises(AttributeError):
        featcache.nothing  # noqa: B018
