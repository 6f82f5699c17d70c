"""Predictions from images: every input image has its row, in order, and the row is about that image."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_photo

from featcache.cache.cache import FeatureCache
from featcache.errors import ModelError, SourceError, UsageError
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
    with pytest.raises(ModelError, match="is not a model"):
        predict(tmp_path, [trained / "photos"])


def test_other_backbone_weights_in_the_model_are_refused(trained: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(trained / "m", tmp_path / "m")
    path = tmp_path / "m" / "backbone.safetensors"
    tensors = load_file(path)
    tensors["features.0.bias"] += 1
    save_file(tensors, path)
    with pytest.raises(ModelError, match="trained on other weights"):
        list(predict(tmp_path / "m", [trained / "photos"]))
    path.unlink()
    with pytest.raises(ModelError, match="it can label caches, not images"):
        list(predict(tmp_path / "m", [trained / "photos"]))
    assert len(list(predict(tmp_path / "m", [trained / "f.h5"]))) == 24


def test_python_api_of_the_readme(trained: Path) -> None:
    import featcache

    cache = featcache.FeatureCache.open(trained / "f.h5")
    assert cache.X.shape == (24, 512)
    assert len(cache.paths) == len(cache.y) == 24
    assert isinstance(cache, FeatureCache)
    assert set(featcache.__all__) <= set(dir(featcache))
    for name in featcache.__all__:
        assert getattr(featcache, name) is not None
    with pytest.raises(AttributeError):
        featcache.nothing  # noqa: B018
