"""What a model folder admits: no code, no path, no damage; and what may be replaced by one."""

import json
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from caches import make_classes

from featcache.errors import FeatcacheError, ModelError
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.spec import fingerprint_of


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    labels = np.arange(150) % 3
    make_classes(tmp_path / "f.h5", labels, 1 + np.arange(150) // 50 % 3)
    return tmp_path / "f.h5"


def test_loading_executes_nothing(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m")

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    joblib.dump(Bomb(), tmp_path / "m" / "head.joblib")
    assert evaluate(tmp_path / "m", cache)["accuracy"] > 0.8
    assert not (tmp_path / "exploded").exists()


def tamper(manifest: dict[str, Any], how: str) -> None:
    if how == "version":
        manifest["version"] = 2
    elif how == "format":
        manifest["format"] = "other"
    elif how == "classes":
        manifest["classes"] = manifest["classes"][::-1]
    elif how == "spec":
        manifest["spec"]["preprocess"]["resize"] = 41


@pytest.mark.parametrize("how", ["version", "format", "classes", "spec"])
def test_a_changed_manifest_is_refused(cache: Path, tmp_path: Path, how: str) -> None:
    fit_head(cache, tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "model.json").read_text())
    tamper(manifest, how)
    (tmp_path / "m" / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.json", "head.safetensors"])
def test_damaged_and_missing_files_are_refused(cache: Path, tmp_path: Path, name: str) -> None:
    fit_head(cache, tmp_path / "m")
    path = tmp_path / "m" / name
    data = path.read_bytes()
    for broken in (b"", data[:-2], data[:40] + bytes([data[40] ^ 1]) + data[41:]):
        path.write_bytes(broken)
        with pytest.raises(ModelError):
            load_model(tmp_path / "m")
    path.unlink()
    with pytest.raises(ModelError):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("reload", ["/etc/passwd", "w.pth", 7])
def test_a_model_cannot_name_a_file_to_read(cache: Path, tmp_path: Path, reload: Any) -> None:
    fit_head(cache, tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "model.json").read_text())
    manifest["weights"]["reload"] = reload
    del manifest["sha256"]
    manifest["sha256"] = fingerprint_of(manifest)
    (tmp_path / "m" / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(FeatcacheError, match="no library provides"):
        load_model(tmp_path / "m").load_backbone()


def test_a_head_only_model_is_replaced_and_nothing_else_is(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m", C=1.0)
    fit_head(cache, tmp_path / "m", C=2.0)
    assert load_model(tmp_path / "m").manifest["training"]["C"] == 2.0
    (tmp_path / "link").symlink_to(tmp_path / "m")
    fit_head(cache, tmp_path / "link", C=3.0)
    assert (tmp_path / "link").is_symlink()
    assert load_model(tmp_path / "m").manifest["training"]["C"] == 3.0
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name in ("m", "mine", "file"):
        with pytest.raises(ModelError, match="choose another -o"):
            fit_head(cache, tmp_path / name)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.h5", "file", "link", "m", "mine"]


def test_a_replacement_cut_off_between_its_renames_is_undone(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m", C=1.0)
    (tmp_path / "m").rename(tmp_path / ".m.replaced")
    assert load_model(tmp_path / "m").manifest["training"]["C"] == 1.0
