"""``export`` of a cache and ``import`` on the command line, and what is said where something else was meant."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Run = Callable[..., tuple[int, str, str]]


def test_there_and_back(
    cache: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("export", "f.h5", "-o", "x.npz", "--map", "pca")
    assert (code, out.splitlines()[-1]) == (0, "  numpy.load('x.npz')['vector']"), err
    assert out.startswith("x.npz: 150 rows, ")
    code, out, err = run("import", "x.npz", "-o", "g.h5", "--json")
    facts = json.loads(out)
    assert (code, facts["rows"], facts["classes"], facts["splits"]) == (0, 150, 3, {"train": 50, "val": 50, "test": 50})
    assert "path from 'path', label from 'label', split from 'split', sha256 from 'sha256'" in caplog.text
    code, out, _ = run("import", "x.npz", "-o", "g.h5", "--force", "--stated", "CLIP", "--label-column", "none", "-q")
    assert "stated: CLIP\n  0 classes; train 50, val 50, test 50; images identified by sha256 of image files" in out
    assert run("verify", "g.h5")[1] == "g.h5: 150 rows, all intact\n"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, ()) for name in ("x.npz", "x.faiss", "x.fiftyone.json", "x.labelstudio.json")),
        *((name, ("--model", "m", "--map", "pca")) for name in ("x.npz", "x.fiftyone.json")),
        ("x.labelstudio.json", ("--model", "m")),
    ],
)
def test_export_names_what_its_files_hold(
    model: Path, tmp_path: Path, name: str, more: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by reading them, not by asking."""
    monkeypatch.chdir(tmp_path)
    facts = json.loads(run("export", "f.h5", "-o", name, *more, "--json")[1])
    if name == "x.npz":
        held = {*np.load(name)} - {"featcache"}
    elif name == "x.faiss":
        held = {"vector", *json.loads(Path("x.faiss.jsonl").read_text().splitlines()[0])}
    elif name == "x.fiftyone.json":
        held = {*json.loads(Path(name).read_text())["sample_fields"]}
    else:
        (task, *_) = json.loads(Path(name).read_text())
        held = {*task["data"]} | ({"label"} if "annotations" in task else set())
        held |= {"prediction", "probability"} if "predictions" in task else set()
    assert {*facts["columns"]} == held and len(held) == len(facts["columns"])
    out = run("export", "f.h5", "-o", name, *more, "--force")[1]
    assert ("x.faiss.jsonl says which row is which image" in out) == (name == "x.faiss")
    assert ", 0.0 MB" not in out and (" kB in " in out or " MB in " in out)


MIXUPS = {
    "export f.h5 -o x.txt": "cannot tell the format of x.txt; name it .parquet, .npz, .faiss, .fiftyone.json or .labelstudio.json",
    "export f.h5 -o f.h5": "cannot write f.h5: it is what is read; choose another -o, such as features.parquet",
    "export m -o x.parquet": ".parquet is for the rows of a cache; name x.parquet .onnx or .safetensors, or give a cache",
    "export m -o x.onnx --map pca": "--map is for the rows of a cache; leave it out, or give a cache",
    "export m -o x.onnx --model m": "--model is for the rows of a cache; leave it out, or give a cache",
    "export f.h5 -o z.npz --map x": "no map is called 'x'; choose one of auto, pca, tsne, none",
    "export f.h5 -o z.npz --model n": "n does not exist; make one with `featcache fit-head features.h5 -o n`",
    "export f.h5 -o x.faiss --model m": "a .faiss has no place for what --model adds; leave it out, or name the file .parquet or .npz",
    "export f.h5 -o x.faiss --map pca": "a .faiss has no place for what --map adds; leave it out, or name the file .parquet or .npz",
    "export f.h5 -o x.labelstudio.json --map pca": "a .labelstudio.json has no place for what --map adds; leave it out, or name the file "
    ".parquet or .npz",
    "import x.npz -o g.h5": "nothing says what made the vectors of x.npz; say it, as --stated 'CLIP ViT-L/14 of open_clip, laion2b'",
    "import m -o g.h5": "m is a model, expected a table of vectors, Parquet or .npz; "
    "numpy.savez('vectors.npz', vector=X, path=names) makes one",
    "import f.h5 -o g.h5": "f.h5 is a cache, expected a table of vectors, Parquet or .npz; it is one already",
    "import y.npz -o g.h5": "y.npz does not exist; did you mean x.npz?",
    "fit-head x.npz -o n": "x.npz is a file of NumPy arrays, expected a cache; of vectors in it one is made by `featcache import x.npz "
    "-o features.h5`",
    "load x.npz": "no command is called load; did you mean import?",
}  # fmt: skip


def test_what_was_probably_meant(model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", X=np.ones((2, 3)), path=np.array(["a", "b"]))
    for words, message in MIXUPS.items():
        code, out, err = run(*words.split())
        assert (code in (1, 2), out) == (True, ""), words
        assert err.strip().splitlines()[-1] == f"error: {message}", words
