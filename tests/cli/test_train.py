"""``finetune`` as a command: the model is what counts, its curves lie beside it."""

import json
import sys
from pathlib import Path

import pytest
from conftest import COLOURS, write_photo
from PIL import Image

from featcache.images.source import list_images

QUICK = ["--epochs", "1", "--batch-size", "6", "--precision", "fp32"]


def test_curves_are_drawn_beside_the_model(trained: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, start = trained / "photos", trained / "m"
    write_photo(photos / "red" / "a.curves.png", COLOURS["red"], 1)  # a photo like any other
    before = list_images(photos).paths
    assert "red/a.curves.png" in before

    model, curves = photos / "ft", photos / "ft.curves.png"  # among the photos, where it must not become one
    code, out, err = run("finetune", photos, "--init", start, "-o", model, *QUICK, "--json")
    assert (code, json.loads(out.splitlines()[-1])["epochs"]) == (0, 1)
    assert err.endswith(f"metrics.json and history.csv\n  curves in {curves}\n")
    with Image.open(curves) as image:
        assert (image.format, image.text["Software"]) == ("PNG", "featcache")
    assert not list(model.glob("*.png"))
    assert list_images(photos).paths == before

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("finetune", photos, "--init", start, "-o", tmp_path / "ft", *QUICK)
    assert code == 0
    remedy = "figures need matplotlib: pip install 'featcache[report]'"
    assert err.endswith(f"history.csv\nno curves of {tmp_path / 'ft'}: {remedy}\n")
    assert (tmp_path / "ft" / "history.csv").is_file()
