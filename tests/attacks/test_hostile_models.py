"""Model folders made by somebody who means harm: nothing in them runs, nothing outside them is read.

In: a small model whose manifest says anything, its checksum right. Out: refused in one line, or used as what it is.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import pytest
import safetensors.numpy
from caches import plain_rows
from conftest import SPEC
from hostile import NO_JSON, Bomb, watched
from test_mutated_files import change_manifest, make_head, make_model

from featcache.backbones.saved import SavedBackbone, own_file
from featcache.cache.format import Provenance
from featcache.cache.write import write_cache
from featcache.errors import BackboneError, FeatcacheError, ModelError
from featcache.finetuning import checkpoint
from featcache.finetuning.result import read_report
from featcache.models.evaluate import evaluate
from featcache.models.export import export_model as export
from featcache.models.model import check_replaceable, load_model
from featcache.models.predict import predict
from featcache.reports.info import describe
from featcache.spec import fingerprint_of
from featcache.system.workdir import work_folder

NAMES = (
    "model.json",
    "head.safetensors",
    "backbone.safetensors",
    "metrics.json",
    "head.joblib",
    "run.json",
    "head.pkl",
)


def use(model: Path) -> None:
    """Every way in which a model folder is read, whatever it answers."""
    for read in (load_model, lambda path: load_model(path).load_backbone(), read_report, describe, check_replaceable):
        try:
            read(model)
        except FeatcacheError as error:
            assert "\n" not in str(error)
    assert not checkpoint.is_finished(model)


@pytest.mark.parametrize("name", NAMES)
def test_code_under_any_name_is_never_run(tmp_path: Path, name: str) -> None:
    bomb = Bomb(tmp_path / "exploded")
    stream = io.BytesIO()
    joblib.dump(bomb, stream)
    for number, data in enumerate((pickle.dumps(bomb), pickle.dumps(bomb, 0), stream.getvalue())):
        model = make_model(tmp_path / f"m{number}")
        (model / name).write_bytes(data)
        use(model)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "exploded").exists(), "the bomb is a dud"


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "classes, numbers": ({"classes": [1, 2]}, "classes for 2 outputs|damaged"),
    "classes, lists": ({"classes": [["a"], ["b"]]}, "damaged"),
    "classes, one twice": ({"classes": ["a", "a", "b"]}, "2 classes for 2 outputs"),
    "classes, text": ({"classes": "ab"}, "classes in model.json is no list"),
    "classes, a crowd": ({"classes": [f"c{k}" for k in range(10**5)]}, "100000 classes for 2 outputs"),
    "classes, half a character": ({"classes": ["\ud800", "b"]}, "damaged"),
    "weights, list": ({"weights": []}, "weights in model.json is no dict"),
    "weights, empty": ({"weights": {}}, "weights in model.json have no source"),
    "weights, number": ({"weights": {"source": 1, "reload": None}}, "weights in model.json have no source"),
    "metrics, text": ({"metrics": {"cv_accuracy": "good"}}, "cv_accuracy in model.json is no number"),
    "metrics, list": ({"metrics": {"temperature": [1]}}, "temperature in model.json is no number"),
    "metrics, none": ({"metrics": None}, "metrics in model.json is no dict"),
    "head, text": ({"head": "logreg"}, "head in model.json is no dict"),
    "head, unknown": ({"head": {"kind": "code", "scaling": "none", "sha256": "SAME"}}, "kind code, scaling none"),
    "spec, none": ({"spec": None}, "cannot be used: the spec is not a JSON object"),
    "version": ({"version": 2}, "format version 2, this featcache reads 1"),
    "version, list": ({"version": [1]}, "format version"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_does_not_hold_is_refused(tmp_path: Path, kind: str) -> None:
    changes, words = MANIFESTS[kind]
    model = make_model(tmp_path / "m")
    sha256 = json.loads((model / "model.json").read_text())["head"]["sha256"]
    change_manifest(model, **json.loads(json.dumps(changes).replace("SAME", sha256)))
    with pytest.raises(ModelError, match=words):
        load_model(model)
    use(model)


@pytest.mark.parametrize("kind", NO_JSON)
@pytest.mark.parametrize("name", ["model.json", "metrics.json"])
def test_json_that_is_none_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    model, text = make_model(tmp_path / "m"), NO_JSON[kind]
    (model / name).write_text(text)
    use(model)
    with pytest.raises(ModelError):
        read_report(model) if name == "metrics.json" else load_model(model)
    work_folder(model).mkdir()
    (work_folder(model) / "run.json").write_text(text)
    assert not checkpoint.is_finished(model)


# Paths, addresses, what timm would follow, what Python would.
BACKBONES = ["../../x", "/etc/passwd", "timm/../../x", "timm/hf-hub:timm/resnet18", "timm/hf_hub:a/b"]
BACKBONES += ["timm/local-dir:/etc", "timm/resnet18.hf-hub:x/y", "timm/resnet18/../../x"]
BACKBONES += ["https://example.org/resnet18", "resnet18\0", "", "__class__"]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_by_that_name_is_not_looked_for(tmp_path: Path, name: str) -> None:
    spec = dataclasses.replace(SPEC, backbone=name).to_json()
    model = make_model(
        tmp_path / "m", spec=spec, fingerprint=fingerprint_of(spec), weights={"source": "x", "reload": "auto"}
    )
    loaded = load_model(model)
    with watched() as seen, pytest.raises(BackboneError, match="no backbone is called|no library provides") as error:
        loaded.load_backbone()
    assert "\n" not in str(error.value)
    assert not [entry for entry in seen if "/etc" in entry or (name and entry.endswith(name)) or "Popen" in entry]


@pytest.mark.parametrize("reload", ["/etc/passwd", "https://example.org/w.pth", "../w.pth", "none", 7, ["auto"], {}])
def test_weights_are_reloaded_by_a_library_or_not_at_all(tmp_path: Path, reload: Any) -> None:
    model = make_model(tmp_path / "m", weights={"source": "x", "reload": reload})
    with pytest.raises((ModelError, BackboneError), match="no library provides"):
        load_model(model).load_backbone()


# ------------------------------------------------------------------------------------------------------------- links


OUTSIDE = [(name, "../outside") for name in ("model.json", "head.safetensors", "backbone.safetensors")]
DEVICES = [("head.safetensors", f"/{name}") for name in ("dev/zero", "proc/kmsg", "dev/stdin", "missing")]


@pytest.mark.parametrize(("name", "target"), [*OUTSIDE, *DEVICES])
def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path, name: str, target: str) -> None:
    """The file outside is a good one; followed, a link could as well name any file of the user."""
    model = make_model(tmp_path / "m")
    (model / "backbone.safetensors").write_bytes(b"x")
    (model / name).rename(tmp_path / "outside")
    (model / name).symlink_to(target)
    words = f"is refused: it is a link to .*{Path(target).name}; put a copy of that file in its place"
    with watched() as seen, pytest.raises(ModelError, match=words):
        load_model(model).load_backbone()
    assert not [entry for entry in seen if entry.startswith(("open /dev", "open /proc/kmsg")) or "outside" in entry]


@pytest.mark.parametrize("target", ["missing", "model.json"])
def test_links_within_the_folder_lead_to_what_was_saved(tmp_path: Path, target: str) -> None:
    model = make_model(tmp_path / "m")
    (model / "head.safetensors").unlink()
    (model / "head.safetensors").symlink_to(target)
    with pytest.raises(ModelError, match="is refused: it is a link|is not the file that was saved"):
        load_model(model)


def test_a_model_folder_may_be_a_link_and_hold_links_within(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (model / "head.safetensors").rename(model / "blob")
    (model / "head.safetensors").symlink_to("blob")
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    assert load_model(tmp_path / "link").classes == ("ant", "bee0")


def test_a_pipe_in_a_model_does_not_hang(tmp_path: Path) -> None:
    for name in ("head.safetensors", "model.json"):
        model = make_model(tmp_path / name.split(".")[0])
        (model / name).unlink()
        os.mkfifo(model / name)
        with pytest.raises(ModelError):
            load_model(model)
        assert own_file(model, name) == model / name


# -------------------------------------------------------------------------------------------------------- safetensors


def with_head(path: Path, data: bytes) -> Path:
    """A model whose ``head.safetensors`` is ``data``, its sha256 right."""
    model = make_model(path)
    (model / "head.safetensors").write_bytes(data)
    return change_manifest(
        model, head={"kind": "mlp", "scaling": "standardise", "sha256": hashlib.sha256(data).hexdigest()}
    )


def header(table: dict[str, Any] | str, data: bytes = b"", length: int | None = None) -> bytes:
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F64") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "huge header": header("{}", length=2**63),
    "100 MB of header": header("{}", length=10**8 + 1),
    "header beyond the file": header("{}", length=4000),
    "no JSON": header("{" * 5000),
    "deep": header('{"a":' * 50_000),
    "beyond the file": header({"mean": entry([3], 0, 24)}, bytes(8)),
    "overlapping": header({"mean": entry([1], 0, 8), "scale": entry([1], 4, 12)}, bytes(12)),
    "backwards": header({"mean": entry([1], 8, 0)}, bytes(8)),
    "negative": header({"mean": entry([-1], 0, 8)}, bytes(8)),
    "overflow": header({"mean": entry([2**32, 2**32, 2**32], 0, 8)}, bytes(8)),
    "product that is 0": header({"mean": entry([2**63, 2], 0, 0)}),
    "hole": header({"mean": entry([1], 8, 16)}, bytes(16)),
    "left over": header({"mean": entry([1], 0, 8)}, bytes(80)),
    "name twice": header('{{"mean":{0},"mean":{0}}}'.format(json.dumps(entry([1], 0, 8))), bytes(8)),
    "unknown type": header({"mean": entry([1], 0, 8, "OBJECT")}, bytes(8)),
    "empty": b"",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError, match="damaged|cannot be used: the head's tensors"):
        load_model(with_head(tmp_path / "m", HEADERS[kind]))


def other_head(**changes: Any) -> bytes:
    return safetensors.numpy.save(make_head(0).to_tensors() | changes)


HEADS = {
    "whole numbers": other_head(mean=np.zeros(3, np.int64)),
    "bits": other_head(**{"layers.0.weight": np.ones((4, 3), bool)}),
    "half precision": other_head(**{"layers.0.bias": np.zeros(4, np.float16)}),
    "complex": other_head(**{"layers.0.bias": np.zeros(4, np.complex64)}),
    "not finite": other_head(**{"layers.1.bias": np.array([0, np.nan])}),
    "no scale": other_head(scale=np.zeros(3)),
    "dimensions": other_head(**{"layers.0.weight": np.zeros((4, 3, 1))}),
    "sizes": other_head(**{"layers.1.weight": np.zeros((2, 5))}),
    "gap": other_head(**{"layers.7.weight": np.zeros((2, 2))}),
    "scalars": other_head(mean=np.array(1.0)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_make_no_sense_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError, match="the head's tensors|damaged"):
        load_model(with_head(tmp_path / "m", HEADS[kind]))


def test_heads_of_another_width_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec is that of the embeddings; the head takes others."""
    model = load_model(make_model(tmp_path / "m"))
    rows = plain_rows((f"{k}.jpg" for k in range(4)), labels=np.array([0, 1, 0, 1], np.int32))
    write_cache(tmp_path / "f.h5", rows, [np.eye(4, 5)], dim=5, spec=SPEC, classes=("ant", "bee0"))
    words = "its head takes 3 values, embeddings of its spec have 5"
    for use_it in (lambda: [*predict(model, [tmp_path / "f.h5"])], lambda: evaluate(model, tmp_path / "f.h5")):
        with pytest.raises(ModelError, match=words):
            use_it()
    monkeypatch.setattr(SavedBackbone, "load", lambda self: SimpleNamespace(dim=5))
    for use_it in (model.load_backbone, model.network, lambda: export(model, tmp_path / "x.onnx")):
        with pytest.raises(ModelError, match=words):
            use_it()


# ----------------------------------------------------------------------------------------------------------- terminal

NASTY = "\x1b]0;owned\x07\x1b[2J\r\u202eant"


@pytest.fixture
def nasty(tmp_path: Path) -> tuple[Path, Path]:
    """A model and a cache whose names hold what a terminal obeys."""
    model = make_model(tmp_path / "m", classes=[NASTY, "bee"], versions={NASTY: NASTY}, weights={"source": NASTY})
    rows = plain_rows((f"{NASTY}{k}.jpg" for k in range(4)), labels=np.array([0, 1, 0, 1], np.int32))
    options: dict[str, Any] = {"spec": SPEC, "classes": (NASTY, "bee"), "refused": ((NASTY, NASTY),)}
    options["provenance"] = Provenance(rest={"device": NASTY, NASTY: [NASTY, "\r\n"]})
    write_cache(tmp_path / "f.h5", rows, [np.eye(4, 3)], dim=3, **options)
    return model, tmp_path / "f.h5"


def test_names_reach_no_terminal_raw(nasty: tuple[Path, Path], run: Callable[..., tuple[int, str, str]]) -> None:
    model, cache = nasty
    for arguments in (["info", model], ["info", cache], ["evaluate", model, cache], ["verify", cache]):
        code, out, err = run(*arguments)
        assert code == 0, err
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(out + err), arguments
        assert arguments[0] != "info" or r"\x1b]0;owned\x07" in out
    _, out, _ = run("info", cache, "--json")
    assert json.loads(out)["provenance"]["device"] == NASTY
    assert "\x1b" not in out


def test_predictions_are_escaped_on_a_terminal_and_exact_in_a_pipe(nasty: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "featcache", "predict", *map(str, nasty), "--probs"]
    ours, theirs = pty.openpty()
    try:
        subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, check=True)
        shown = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert r"\x1b]0;owned\x07" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    piped = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    assert piped.count(NASTY) > 4
