"""An embedder from images to rows and their spec. Oracle: the plain float32 network, one image at a time."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPEC, make_photos

from featcache.backbones.backbone import Backbone
from featcache.backbones.embedder import Embedder
from featcache.backbones.load import load_backbone
from featcache.errors import UsageError
from featcache.images.decode import decode_pixels, fast_jpeg
from featcache.images.preprocess import channel_constants, normalise, to_pixels
from featcache.images.read import Paths
from featcache.images.source import list_images
from featcache.system.device import choose_runtime


def small_backbone() -> Backbone:
    """SqueezeNet with random weights, for images of 32 x 32."""
    return dataclasses.replace(load_backbone("squeezenet1_1", "none"), preprocess=SPEC.preprocess)


def test_images_become_rows_with_a_spec(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=4)
    (photos / "blue" / "01.jpg").write_text("no image")
    images, backbone = list_images(photos), small_backbone()
    embedder = Embedder.prepare(
        backbone, images, runtime=choose_runtime("cpu", workers=2, batch_size=3), precision="fp32"
    )
    preprocess = backbone.preprocess
    readable = [path for path in images.paths if path != "blue/01.jpg"]
    pixels = {path: to_pixels(decode_pixels((photos / path).read_bytes()), preprocess) for path in readable}
    np.testing.assert_array_equal(embedder.sample, [pixels[path] for path in readable[: len(embedder.sample)]])
    assert 0 < len(embedder.sample) <= 3  # a batch
    refused: dict[int, str] = {}
    rows: dict[str, np.ndarray] = {}
    for batch in embedder.embed(images):
        refused |= batch.refused
        rows |= {images.paths[index]: row for index, row in zip(batch.indices, batch.features, strict=True)}
    assert refused == {1: "not an image, or of an unsupported format"}
    assert list(rows) == readable
    for path, picture in pixels.items():
        with torch.inference_mode():
            batch_of_one = normalise(
                torch.from_numpy(picture.copy())[None], *channel_constants(preprocess, torch.device("cpu"))
            )
            expected = backbone.module(batch_of_one)[0].numpy()
        np.testing.assert_allclose(rows[path], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert embedder.spec(storage="float16") == dataclasses.replace(SPEC, weights_sha256=backbone.weights_sha256)
    assert embedder.spec(storage="float32", precision="bf16").precision == "bf16"


@pytest.mark.parametrize(
    ("missing", "asked", "level"),
    [(False, "", "DEBUG"), (True, "", "INFO"), (True, "pillow", "DEBUG")],  # what could be faster is worth a line
)
def test_a_slow_decoder_is_said_with_what_helps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    missing: bool,
    asked: str,
    level: str,
) -> None:
    caplog.set_level("DEBUG", "featcache")
    monkeypatch.setenv("FEATCACHE_DECODER", asked)
    if missing:
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    elif importlib.util.find_spec("simplejpeg") is None:
        pytest.skip("there is none")
    fast_jpeg.cache_clear()
    try:
        Embedder.prepare(small_backbone(), Paths(tmp_path, ()), runtime=choose_runtime("cpu"), precision="fp32")
    finally:
        fast_jpeg.cache_clear()
    [said] = [record for record in caplog.records if record.getMessage().startswith("decoder: ")]
    assert said.levelname == level
    assert ("pip install 'featcache[fast]'" in said.getMessage()) == (level == "INFO")


def test_where_nothing_can_be_decoded_everything_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    files, backbone = Paths(tmp_path, ("a.jpg", "gone.jpg")), small_backbone()
    embedder = Embedder.prepare(backbone, files, runtime=choose_runtime("cpu"), precision="fp32")
    assert embedder.sample.shape[0] == 0
    [batch] = embedder.embed(files)
    assert (len(batch.indices), sorted(batch.refused)) == (0, [0, 1])


def test_an_input_size_that_the_network_does_not_take(tmp_path: Path) -> None:
    backbone = dataclasses.replace(small_backbone(), preprocess=dataclasses.replace(SPEC.preprocess, crop=(8, 8)))
    with pytest.raises(UsageError, match="does not take inputs of 8x8"):
        Embedder.prepare(backbone, Paths(tmp_path, ()), runtime=choose_runtime("cpu"))
