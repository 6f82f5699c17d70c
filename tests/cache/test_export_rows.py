"""A cache in the files of other programs, read by those programs: every row as h5py finds it in the cache."""

import json
import urllib.parse
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from caches import make_cache, make_classes, plain_rows
from conftest import SPEC

from featcache import FeatureCache, export_cache, fit_head, predict
from featcache.cache.write import write_cache
from featcache.errors import CacheError, ExportError, SpecMismatchError, UsageError
from featcache.spec import SPLITS

pa, pq, pd = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet", "pandas"))
ENDINGS = (".parquet", ".npz", ".faiss", ".fiftyone.json", ".labelstudio.json")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """50 rows, some without label or split, names beyond ASCII."""
    make_cache(tmp_path / "f.h5")
    return tmp_path / "f.h5"


def by_h5py(path: Path) -> dict[str, Any]:
    """The columns, from the definition of the file format."""
    with h5py.File(path) as file:
        found = {name: file[name][()] for name in ("features", "labels", "splits", "digests", "sizes", "mtimes")}
        names = [name.decode() for name in file["classes"][()]]
        return {
            "sha256": [digest.tobytes().hex() for digest in found["digests"]],
            "path": [name.decode() for name in file["paths"][()]],
            "label": [names[label] if label >= 0 else None for label in found["labels"]],
            "split": [SPLITS[split] if split else None for split in found["splits"]],
            "size": found["sizes"].tolist(),
            "mtime": found["mtimes"].tolist(),
            "vector": found["features"],
        }


def assert_same(table: Any, expected: dict[str, Any]) -> None:
    assert table.schema.names == list(expected)
    for name, values in expected.items():
        if name != "vector":
            assert table[name].to_pylist() == values
    vectors = np.concatenate([chunk.flatten().to_numpy() for chunk in table["vector"].chunks])
    assert vectors.tobytes() == expected["vector"].tobytes()


def test_parquet_and_arrow(made: Path, tmp_path: Path) -> None:
    report = export_cache(made, tmp_path / "x.parquet")
    assert (report.rows, report.dim, report.bytes) == (50, 8, (tmp_path / "x.parquet").stat().st_size)
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.schema.field("vector").type.list_size == 8
    assert table.schema.field("vector").type.value_type == pa.float16()
    assert_same(table, by_h5py(made))
    cache = FeatureCache.open(made)
    assert_same(cache.to_arrow(), by_h5py(made))
    assert eval(report.usage, {"pandas": pd}).drop(columns="vector").equals(cache.to_pandas().drop(columns="vector"))
    assert (np.stack(cache.to_pandas()["vector"]) == cache.X).all()


def test_vectors_share_the_memory_of_the_file(tmp_path: Path) -> None:
    make_cache(tmp_path / "f.h5", 5000)  # what is small is not aligned in the file, and copied
    cache = FeatureCache.open(tmp_path / "f.h5")
    values = cache.to_arrow()["vector"].chunk(0).values
    assert values.buffers()[1].address == cache.X.ctypes.data
    assert np.shares_memory(cache.to_pandas()["vector"][7], cache.X)


def test_npz(made: Path, tmp_path: Path) -> None:
    export_cache(made, tmp_path / "x.npz")
    expected = by_h5py(made)
    with np.load(tmp_path / "x.npz") as arrays:
        assert {*arrays} == {*expected, "featcache"}
        for name in set(expected) - {"vector"}:
            assert arrays[name].tolist() == ["" if value is None else value for value in expected[name]]
        assert (arrays["vector"] == expected["vector"]).all()


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_faiss(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr("featcache.cache.export.rows_per_block", lambda cache: block)
    X = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float16)
    X[3], X[7, 2] = 0, np.inf
    write_cache(tmp_path / "f.h5", plain_rows(f"{k}.jpg" for k in range(40)), [X], dim=8, spec=SPEC)
    report = export_cache(tmp_path / "f.h5", tmp_path / "x.faiss")
    ids = np.delete(np.arange(40), [3, 7])
    unit = X[ids].astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    index = faiss.read_index(str(tmp_path / "x.faiss"))
    similarity, found = index.search(unit, 5)
    true = unit.astype(np.float64) @ unit.T.astype(np.float64)
    assert (found == ids[np.argsort(-true, axis=1)[:, :5]]).all()
    assert np.allclose(similarity, -np.sort(-true, axis=1)[:, :5], atol=1e-6)
    own = faiss.IndexIDMap(faiss.IndexFlatIP(8))
    own.add_with_ids(unit, ids)
    ours, theirs = (tmp_path / "x.faiss").read_bytes(), faiss.serialize_index(own).tobytes()
    assert (len(ours), ours[:86]) == (len(theirs), theirs[:86])  # headers; lengths are rounded in another order
    lines = [json.loads(line) for line in (tmp_path / "x.faiss.jsonl").read_text().splitlines()]
    assert [(line["id"], line["path"]) for line in lines] == [(k, f"{k}.jpg") for k in range(40)]
    assert len(report.files) == 2


def test_an_index_of_nothing(tmp_path: Path) -> None:
    write_cache(tmp_path / "f.h5", plain_rows(["a.jpg"]), [np.zeros((1, 8))], dim=8, spec=SPEC)
    with pytest.raises(ExportError, match="no row that an index could hold"):
        export_cache(tmp_path / "f.h5", tmp_path / "x.faiss")
    assert not (tmp_path / "x.faiss").exists()


def test_fiftyone_and_label_studio(made: Path, tmp_path: Path) -> None:
    for ending in ENDINGS[3:]:
        export_cache(made, tmp_path / f"x{ending}")
    expected = by_h5py(made)
    dataset = json.loads((tmp_path / "x.fiftyone.json").read_text())
    assert (dataset["name"], dataset["media_type"]) == ("f", "image")
    for number, sample in enumerate(dataset["samples"]):
        assert {*sample} == {*dataset["sample_fields"]}
        label = sample["ground_truth"]
        assert sample["filepath"] == expected["path"][number]
        assert (label and label["label"]) == expected["label"][number]
        assert sample["embedding"] == expected["vector"][number].tolist()
    tasks = json.loads((tmp_path / "x.labelstudio.json").read_text())
    for number, task in enumerate(tasks):
        address, _, path = task["data"]["image"].partition("?d=")
        assert (address, urllib.parse.unquote(path)) == ("/data/local-files/", expected["path"][number])
        results = [result for annotation in task.get("annotations", []) for result in annotation["result"]]
        label = expected["label"][number]
        assert [result["value"]["choices"] for result in results] == ([] if label is None else [[label]])


def test_names_that_are_not_utf8_and_formulas(tmp_path: Path) -> None:
    names = ["=cmd()|'/C calc'!A0.jpg", "caf\udce9.jpg", "new\nline.jpg", 'quote".jpg']
    X = np.ones((4, 8))
    rows = plain_rows(names, labels=np.array([0, 1, 0, -1], np.int32))
    write_cache(tmp_path / "f.h5", rows, [X], dim=8, spec=SPEC, classes=("+a", "b\udcff"))
    shown = [names[0], "caf\\xe9.jpg", *names[2:]]
    for ending in ENDINGS:
        export_cache(tmp_path / "f.h5", tmp_path / f"x{ending}")
    frame = pd.read_parquet(tmp_path / "x.parquet")
    assert frame["path"].tolist() == shown
    assert frame["path_bytes"].tolist() == [name.encode("utf-8", "surrogateescape") for name in names]
    assert frame["label"].tolist()[:3] == ["+a", "b\\xff", "+a"]
    assert FeatureCache.open(tmp_path / "f.h5").to_pandas()["path"].tolist() == shown
    with np.load(tmp_path / "x.npz") as arrays:
        assert (arrays["path"].tolist(), arrays["path_bytes"].tolist()) == (shown, frame["path_bytes"].tolist())
    tasks = json.loads((tmp_path / "x.labelstudio.json").read_text())
    assert urllib.parse.unquote_to_bytes(tasks[1]["data"]["image"]).endswith(b"caf\xe9.jpg")


def test_predictions_and_places(cache: Path, model: Path, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "x.parquet", model=model, map="pca")
    frame = pd.read_parquet(tmp_path / "x.parquet")
    said = list(predict(model, cache))
    assert frame["prediction"].tolist() == [each.label for each in said]
    assert np.allclose(frame["probability"], [each.probability for each in said])
    X = np.stack(frame["vector"]).astype(np.float64)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    _, values, axes = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    for name, axis in zip("xy", axes, strict=False):
        assert abs(np.corrcoef(frame[name], X @ axis)[0, 1]) > 0.999, values
    export_cache(cache, tmp_path / "x.fiftyone.json", model=model, map="pca")
    sample = json.loads((tmp_path / "x.fiftyone.json").read_text())["samples"][5]
    assert (sample["prediction"]["label"], sample["prediction"]["confidence"]) == (
        said[5].label,
        pytest.approx(said[5].probability, abs=1e-6),
    )
    export_cache(cache, tmp_path / "x.labelstudio.json", model=model)
    task = json.loads((tmp_path / "x.labelstudio.json").read_text())[5]
    assert task["predictions"][0]["model_version"] == model.name
    assert task["predictions"][0]["result"][0]["value"] == {"choices": [said[5].label]}


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_written_of_a_damaged_cache(made: Path, tmp_path: Path, ending: str) -> None:
    with h5py.File(made) as file:
        at = file["features"].id.get_offset()
    data = bytearray(made.read_bytes())
    data[at + 100] ^= 1
    made.write_bytes(data)
    with pytest.raises(CacheError, match="checksum mismatch in rows 0-49"):
        export_cache(made, tmp_path / f"x{ending}")
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5"]


def test_nothing_is_replaced_unasked(made: Path, tmp_path: Path, cache: Path) -> None:
    for ending in ENDINGS:
        output = tmp_path / f"x{ending}"
        output.write_text("precious")
        with pytest.raises(UsageError, match="exists; choose another -o, or give --force to replace it"):
            export_cache(made, output)
        assert output.read_text() == "precious"
        export_cache(made, output, force=True)
    for name in ("x.txt", ".parquet", "x.json"):
        with pytest.raises(UsageError, match="cannot tell the format"):
            export_cache(made, tmp_path / name)
    make_classes(tmp_path / "g.h5", [0, 1] * 20, spec=SPEC.external("other", "float16"))
    fit_head(tmp_path / "g.h5", tmp_path / "m", C=1.0, folds=0)
    with pytest.raises(SpecMismatchError, match="give a cache that was imported with the same statement"):
        export_cache(made, tmp_path / "y.parquet", model=tmp_path / "m")


def test_the_empty_cache(tmp_path: Path) -> None:
    write_cache(tmp_path / "f.h5", plain_rows([]), [], dim=8, spec=SPEC)
    for ending in (".parquet", ".npz", ".fiftyone.json"):
        export_cache(tmp_path / "f.h5", tmp_path / f"x{ending}")
    assert len(pd.read_parquet(tmp_path / "x.parquet")) == len(FeatureCache.open(tmp_path / "f.h5").to_arrow()) == 0
    assert json.loads((tmp_path / "x.fiftyone.json").read_text())["samples"] == []
