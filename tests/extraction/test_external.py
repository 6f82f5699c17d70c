"""Vectors that were made elsewhere: what becomes of them, what is refused, and what such a cache is good for."""

import hashlib
import io
import json
import random
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from caches import CLASSES_DIM, make_cache, make_classes, plain_rows
from conftest import SPEC, make_photos, write_photo

from featcache import (
    FeatureCache,
    describe,
    evaluate,
    export_cache,
    extract,
    fit_head,
    import_vectors,
    load_model,
    predict,
)
from featcache.cache.write import write_cache
from featcache.errors import (
    CacheError,
    FeatcacheError,
    MissingDependencyError,
    ModelError,
    SourceError,
    SpecMismatchError,
    UsageError,
)
from featcache.extraction.repair import repair
from featcache.images.source import Source, list_images

pa, pq, pd = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet", "pandas"))
STATED = "CLIP ViT-L/14 of open_clip, laion2b"


def datasets_of(path: Path) -> dict[str, bytes]:
    """Every dataset, byte for byte, with its type and shape."""
    found: dict[str, bytes] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, it: found.update({name: f"{it.dtype}{it.shape}".encode() + it[()].tobytes()})
                        if isinstance(it, h5py.Dataset) else None)  # fmt: skip
    return found


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_there_and_back_again(tmp_path: Path, ending: str, storage: str) -> None:
    names = ["=cmd().jpg", "caf\udce9.jpg", " spaces ", *(f"{k}.jpg" for k in range(30))]
    X = np.random.default_rng(0).normal(size=(33, 7)).astype(storage)
    rows = plain_rows(
        names,
        labels=np.arange(33, dtype=np.int32) % 4 - 1,
        splits=np.arange(33, dtype=np.uint8) % 4,
        sizes=np.arange(33) * 10**9,
        mtimes=-np.arange(33) * 10**16,
    )
    spec = type(SPEC)(**vars(SPEC) | {"storage": storage})
    classes = (" a", "b\udcff", "c", "nobody")
    write_cache(tmp_path / "f.h5", rows, [X], dim=7, spec=spec, classes=classes, refused=[("x\udce9.jpg", "empty")])
    export_cache(tmp_path / "f.h5", tmp_path / f"x{ending}")
    report = import_vectors(tmp_path / f"x{ending}", tmp_path / "g.h5")
    assert datasets_of(tmp_path / "g.h5") == datasets_of(tmp_path / "f.h5")
    made = FeatureCache.open(tmp_path / "g.h5")
    assert report.stated == made.spec.stated == f"squeezenet1_1, exported by featcache, spec {spec.fingerprint[:12]}"
    assert made.spec.to_json() == {"external": {"stated": report.stated}, "storage": storage, "views": 1}
    export_cache(tmp_path / "g.h5", tmp_path / f"y{ending}")
    import_vectors(tmp_path / f"y{ending}", tmp_path / "h.h5")
    assert FeatureCache.open(tmp_path / "h.h5").spec == made.spec  # a statement does not grow
    assert datasets_of(tmp_path / "h.h5") == datasets_of(tmp_path / "f.h5")


def table_of(n: int = 6, **columns: Any) -> dict[str, Any]:
    X = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    return {"file_name": [f"{k}.jpg" for k in range(n)], "embedding": list(X)} | columns


def test_what_pandas_wrote(tmp_path: Path) -> None:
    frame = pd.DataFrame(table_of(species=[2, 10, None, 2, 10, 2], set=["Training", "val", "test", "", None, "train"]))
    frame["other"] = [{"a": 1}] * 6
    frame.to_parquet(tmp_path / "x.parquet")
    report = import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED)
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert (report.classes, cache.classes, cache.y.tolist()) == (2, ("10", "2"), [1, 0, -1, 1, 0, 1])
    assert cache.rows.splits.tolist() == [1, 2, 3, 0, 0, 1]
    assert cache.paths == tuple(f"{k}.jpg" for k in range(6))
    assert (np.stack(frame["embedding"]) == cache.X).all()
    assert (cache.dtype, cache.spec.storage, report.digests[:10]) == (np.float32, "float32", "of vectors")


def test_vectors_stand_in_for_digests(tmp_path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(4, 3))
    X[2] = X[0]
    np.savez(tmp_path / "x.npz", X=X, paths=np.array(list("abcd")))
    report = import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=STATED)
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert (report.copies["within"], len(np.unique(cache.rows.digests, axis=0))) == (1, 3)
    assert (X.astype(np.float32) == cache.X).all()


def test_files_of_images_are_hashed(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos", each=2)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    table: dict[str, Any] = {"path": names, "v": list(np.ones((6, 3)))}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED, pictures=folder)
    cache = FeatureCache.open(tmp_path / "f.h5")
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    assert [digest.tobytes().hex() for digest in cache.rows.digests] == digests
    assert cache.rows.sizes.tolist() == [(folder / name).stat().st_size for name in names]
    pq.write_table(pa.table(table | {"sha256": digests}), tmp_path / "x.parquet")
    import_vectors(tmp_path / "x.parquet", tmp_path / "g.h5", stated=STATED, pictures=folder)
    (folder / names[3]).write_bytes(b"another")
    with pytest.raises(SourceError, match=f"{names[3]} is not the image whose sha256 the table has"):
        import_vectors(tmp_path / "x.parquet", tmp_path / "h.h5", stated=STATED, pictures=folder)
    (folder / names[3]).unlink()
    with pytest.raises(SourceError, match=f"{names[3]} cannot be read: No such file"):
        import_vectors(tmp_path / "x.parquet", tmp_path / "h.h5", stated=STATED, pictures=folder)
    pq.write_table(pa.table({"path": ["../f.h5"], "v": [[1.0]]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="leads out of the folder"):
        import_vectors(tmp_path / "x.parquet", tmp_path / "h.h5", stated=STATED, pictures=folder)


def test_names_of_classes_that_datasets_noted(tmp_path: Path) -> None:
    info = {"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}
    table = pa.table(table_of(label=[0, 1, -1, 0, None, 1])).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "x.parquet")
    import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED)
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert (cache.classes, cache.y.tolist()) == (("ant", "zebra"), [1, 0, -1, 1, -1, 0])


CLASSES = [
    ["zebra", "ant"],
    {"0": "zebra", "1": "ant"},
    {"0": "zebra", "2": "ant"},
    ["zebra", "zebra"],
    ["", "ant"],
    [1, 2],
    "no",
]


@pytest.mark.parametrize("names", CLASSES, ids=str)
@pytest.mark.parametrize("labels", [[0, 1, -1], [0.0, 1.0, np.nan], [0, 1, 2], [0, 1, -2], [0.0, 1.0, 0.5]], ids=str)
def test_vectors_paths_and_images_have_the_same_classes(tmp_path: Path, names: object, labels: list[float]) -> None:
    """Of one column that datasets says something of: the same labels, or a refusal that names the column."""
    said = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}
    photos = [write_photo(tmp_path / f"{k}.jpg", (1, 2, 3), k).read_bytes() for k in range(3)]
    path = [f"{k}.jpg" for k in range(3)]
    columns: dict[str, dict[str, Any]] = {
        "x": {"path": path, "v": [[1.0]] * 3},
        "paths": {"path": path},
        "images": {"image": photos},
    }
    for name, more in columns.items():
        pq.write_table(pa.table(more | {"label": labels}).replace_schema_metadata(said), tmp_path / f"{name}.parquet")
    found: list[Any] = []
    for name in columns:
        try:
            if name == "x":
                import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED)
                cache = FeatureCache.open(tmp_path / "f.h5")
                found.append((cache.classes, cache.y.tolist()))
            else:
                images = list_images(tmp_path / f"{name}.parquet")
                found.append((images.classes, images.labels.tolist()))
        except SourceError as error:
            assert re.search(r"row 2: (label is|the column 'label')", str(error))
            found.append("refused")
    assert found[0] == found[1] == found[2]
    known = names in CLASSES[:2]
    if 0.5 in labels or (known and {2, -2} & {*labels}):
        assert found[0] == "refused"
    elif known:
        assert found[0] == (("ant", "zebra"), [1, 0, -1])


@pytest.mark.parametrize("name", ["nan", "NULL", "?"])
def test_what_is_no_class_is_warned_of(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    savez(tmp_path / "x.npz", path=np.array(["a", "b"]), v=GOOD * [[1], [2]], label=np.array([name, "ant"]))
    image = write_photo(tmp_path / "a.jpg", (1, 2, 3), 1).read_bytes()
    pq.write_table(pa.table({"image": [image] * 2, "label": [name, "ant"]}), tmp_path / "images.parquet")
    (tmp_path / "t.csv").write_text(f"path,label\na.jpg,{name}\n")
    import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=STATED)
    list_images(tmp_path / "images.parquet")
    list_images(tmp_path / "t.csv")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    words = f"{name} is taken for a class; leave the cell empty where there is no label"
    assert said == [f"{tmp_path / file}: {words}" for file in ("x.npz", "images.parquet", "t.csv")]


def test_an_error_of_ours_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savez(tmp_path / "x.npz", path=np.array(["a", "b"]), v=GOOD)
    monkeypatch.setattr("featcache.extraction.external.original_names", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=STATED)


def test_spellings_that_may_be_two_files_stay_two(tmp_path: Path) -> None:
    names = ["a/b", "a\\b", "a/../a/b", "a./b", "a/.b", "/a/b", "../a/b", "..a/b", "//x"]
    savez(tmp_path / "x.npz", path=np.array(names), v=np.ones((len(names), 3)))
    import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=STATED)
    assert FeatureCache.open(tmp_path / "f.h5").paths == tuple(names)


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "list": lambda X: pa.array(list(X)),
    "large list": lambda X: pa.array(list(X), pa.large_list(pa.float32())),
    "fixed": lambda X: pa.array(list(X), pa.list_(pa.float32(), 3)),
    "tensor": lambda X: pa.FixedShapeTensorArray.from_numpy_ndarray(X),
    "float64": lambda X: pa.array([row.astype(np.float64) for row in X]),
    "float16": lambda X: pa.array([row.astype(np.float16) for row in X]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["string", "large_string", "string_view", "dictionary", "binary", "binary_view"])
def test_types_and_row_groups(tmp_path: Path, kind: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.extraction.vectors._BLOCK", 4)  # rows at a time; row groups have 7
    types = {"dictionary": pa.dictionary(pa.int32(), pa.string())}
    names = pa.array([f"{k}.jpg" for k in range(20)], types.get(text) or getattr(pa, text)())
    labels = pa.array(["b", "a", None, "b"] * 5, types.get(text) or getattr(pa, text)())
    X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    table = pa.table({"path": names, "label": labels, "anything": KINDS[kind](X)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED)
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert (cache.paths[19], cache.classes, cache.y.tolist()[:4]) == ("19.jpg", ("a", "b"), [1, 0, -1, 1])
    assert ((X.astype(np.float16) if kind == "float16" else X) == cache.X).all()


def savez(to: Path, /, **arrays: Any) -> None:
    with to.open("wb") as file:
        np.savez(file, **arrays)


GOOD = np.ones((2, 3), np.float32)
FLOATS = pa.list_(pa.float32())
HEX = "0" * 64
BAD_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"v": list(GOOD)}, "none of them known as one of paths"),
    "no vectors": ({"path": ["a", "b"], "label": ["x", "y"]}, "no column of vectors"),
    "vectors of integers": ({"path": ["a", "b"], "v": [[1, 2], [3, 4]]}, "no column of vectors"),
    "nested": ({"path": ["a", "b"], "v": [[[1.0]], [[2.0]]]}, "no column of vectors"),
    "two kinds of vectors": ({"path": ["a", "b"], "v": list(GOOD), "w": list(GOOD)}, "--vector-column v"),
    "no rows": ({"path": pa.array([], pa.string()), "v": pa.array([], FLOATS)}, "has no rows"),
    "ragged": ({"path": ["a", "b"], "v": pa.array([[1.0], [1.0, 2.0]], FLOATS)}, "differ in length"),
    "ragged, the mean is whole": ({"path": ["a", "b"], "v": pa.array([[1.0], [1.0, 2.0, 3.0]], FLOATS)}, "row 0 has a vector of 1"),
    "a vector is missing": ({"path": ["a", "b"], "v": pa.array([[1.0], None], FLOATS)}, "row 1 has no vector"),
    "a fixed one is missing": (  # which pyarrow 21 cannot read
        {"path": ["a", "b"], "v": pa.array([[1.0], None], pa.list_(pa.float32(), 1))},
        "row 1 has no vector|cannot be read: Expected all lists",
    ),
    "a value is missing": ({"path": ["a", "b"], "v": pa.array([[1.0], [None]], FLOATS)}, "row 1 has a vector with empty values"),
    "empty vectors": ({"path": ["a", "b"], "v": pa.array([[], []], pa.list_(pa.float32(), 0))}, "have 0 values"),
    "not a number": ({"path": ["a", "b"], "v": pa.array([[1.0], [np.nan]], FLOATS)}, r"row 1 \(b\) is not finite"),
    "beyond float32": ({"path": ["a", "b"], "v": [[1.0], [1e300]]}, r"row 1 \(b\) is not finite as float32"),
    "a path twice": ({"path": ["a", "b", "a"], "v": [[1.0]] * 3}, "rows 0 and 2 have the same path, a"),
    "an empty path": ({"path": ["a", " "], "v": list(GOOD)}, "row 1: path is ' ', expected the name of an image"),
    "a path is missing": ({"path": ["a", None], "v": list(GOOD)}, "row 1: path is 'None', expected the name"),
    "NUL": ({"path": ["a", "b\0"], "v": list(GOOD)}, "row 1: path is"),
    "a long path": ({"path": ["a", "b" * 5000], "v": list(GOOD)}, "5,000 bytes, expected names of at most 4,096"),
    "a label of measure": ({"path": ["a", "b"], "v": list(GOOD), "label": [0.5, 1.0]}, "row 0: label is '0.5', expected"),
    "an unknown split": ({"path": ["a", "b"], "v": list(GOOD), "split": ["train", "x"]}, "row 1: split is 'x', expected train"),
    "no sha256": ({"path": ["a", "b"], "v": list(GOOD), "sha256": [HEX, "00"]}, "row 1: sha256 is '00', expected 64"),
    "a sha256 is missing": ({"path": ["a", "b"], "v": list(GOOD), "sha256": [HEX, None]}, "row 1: sha256 is 'None'"),
    "times as paths": ({"path": [pd.Timestamp(0), pd.Timestamp(1)], "v": list(GOOD)}, "the column 'path' is of the type timestamp"),
    "digests as bytes": ({"path": ["a", "b"], "v": list(GOOD), "sha256": pa.array([b"x" * 32] * 2, pa.binary(32))}, "'sha256' is of the"),
    "a label without end": ({"path": ["a", "b"], "v": list(GOOD), "label": [1.0, np.inf]}, "row 1: label is 'inf', expected the name"),
    "one file, two spellings": ({"path": ["a/b", "c", "./a//./b"], "v": [[1.0]] * 3}, "rows 0 and 2 have the same path, a/b"),
    "two columns of paths": ({"path": ["a", "b"], "filename": ["a", "b"], "v": list(GOOD)}, "--path-column"),
}  # fmt: skip


ODD_COLUMNS: dict[str, Any] = {
    "decimal": pa.array([1, 2], pa.decimal128(3, 1)),
    "date": pa.array([1, 2], pa.date32()),
    "list of texts": pa.array([["x"], ["y"]]),
    "list of floats": pa.array([[1.0], [2.0]]),
    "struct": pa.array([{"a": 1}, {"a": 2}]),
}


@pytest.mark.parametrize("case", ODD_COLUMNS)
@pytest.mark.parametrize("role", ["label", "split"])
@pytest.mark.parametrize("named", [False, True])
def test_a_column_of_another_type_is_refused_as_by_a_table_of_images(
    tmp_path: Path, case: str, role: str, named: bool
) -> None:
    columns = {"path": ["a.jpg", "b.jpg"], role: ODD_COLUMNS[case]}
    pq.write_table(pa.table(columns | {"vector": list(GOOD)}), tmp_path / "x.parquet")
    pq.write_table(pa.table(columns), tmp_path / "paths.parquet")
    for name in ("a.jpg", "b.jpg"):
        write_photo(tmp_path / name, (1, 2, 3), 1)
    option: dict[str, Any] = {f"{role}_column": role} if named else {}
    kind = pq.read_schema(tmp_path / "x.parquet").field(role).type
    reason = re.escape(f"the column {role!r} is of the type {kind}; expected text or whole numbers")
    with pytest.raises(SourceError, match=reason):
        list_images(Source(tmp_path / "paths.parquet", **option))
    with pytest.raises(SourceError, match=f"{reason}; name another by --{role}-column, or say --{role}-column none"):
        import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED, **option)
    import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED, **{f"{role}_column": "none"})  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["label", "split"])
@pytest.mark.parametrize(
    "values", [np.array(["train", "val"])[:, None], np.ones((2, 1)), np.array("train"), np.ones(2, "M8[s]")]
)
def test_an_array_of_another_shape_is_refused(tmp_path: Path, role: str, values: np.ndarray) -> None:
    savez(tmp_path / "x.npz", path=np.array(["a", "b"]), vector=GOOD, **{role: values})
    with pytest.raises(
        SourceError, match=f"the column '{role}' is of the type .*; expected text or whole numbers; name"
    ):
        import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=STATED)


def test_what_is_called_like_a_path_or_holds_the_vectors_is_in_nobodys_way(tmp_path: Path) -> None:
    """As in a table of ``datasets``, whose images are beside their names; all that is not read is said."""
    images = pa.array([{"bytes": b"x", "path": None}] * 2)
    table = {"image": images, "file_name": ["a", "b"], "label": pa.array([None, None]), "target": list(GOOD)}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(
        UsageError, match="one column cannot be two things, see --label-column target --vector-column target"
    ):
        import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED, label_column="target")
    report = import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED)
    assert (FeatureCache.open(tmp_path / "f.h5").paths, report.classes) == (("a", "b"), 0)


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    columns, message = BAD_TABLES[case]
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises((SourceError, UsageError), match=message) as found:
        import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED)
    assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def npz_of(**content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def array(values: Any, **changes: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **changes)
    return file.getvalue()


NAMES = array(np.array(["a", "b"]))
HUGE = array(np.zeros((1, 3))).replace(b"(1, 3)", b"(9999999999999, 3)"[:6])
BAD_FILES = {
    "text": (b"path,label\n", "neither a Parquet file nor a .npz"),
    "empty": (b"", "neither"),
    "half a Parquet file": (b"PAR1" + bytes(100), "cannot be read"),
    "half a zip": (npz_of(path=NAMES, X=array(GOOD))[:200], "cannot be read"),
    "a zip of something else": (npz_of(path=b"hello"), "cannot be read"),
    "Python objects": (npz_of(path=array(np.array(["a", None], object), allow_pickle=True), X=array(GOOD)), "Python objects"),
    "column by column": (npz_of(path=NAMES, X=array(np.asfortranarray(np.eye(2)))), "column by column"),
    "of two lengths": (npz_of(path=NAMES, X=array(np.ones((3, 2)))), r"differ in length \(X 3, path 2\)"),
    "cut off": (npz_of(path=NAMES, X=array(GOOD)[:-4]), "cut off"),
    "longer than it says": (npz_of(path=NAMES, X=array(GOOD) + b"1234"), "more bytes"),
    "names as wide as a house": (npz_of(path=array(np.array(["a", "b"], "U5000")), X=array(GOOD)), "20,000 bytes"),
    "a table of texts": (npz_of(path=NAMES), "no column of vectors"),
    "no paths": (npz_of(X=array(GOOD)), "none of them known as one of paths"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    data, message = BAD_FILES[case]
    path = tmp_path / ("x.parquet" if b"PAR1" in data[:4] else "x.npz")
    path.write_bytes(data)
    with pytest.raises((SourceError, UsageError), match=message):
        import_vectors(path, tmp_path / "f.h5", stated=STATED)
    assert not (tmp_path / "f.h5").exists()


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_flipped_bits_never_crash(tmp_path: Path, ending: str) -> None:
    """What is read is refused in one line, or holds together: as many rows as there were vectors, all of them finite."""
    make_cache(tmp_path / "f.h5", 20)
    export_cache(tmp_path / "f.h5", tmp_path / f"x{ending}")
    data, draw, outcomes = (tmp_path / f"x{ending}").read_bytes(), random.Random(0), set()
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(draw.choice((1, 3, 30))):
            broken[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / f"y{ending}").write_bytes(broken)
        try:
            import_vectors(tmp_path / f"y{ending}", tmp_path / "g.h5", stated=STATED, force=True)
        except FeatcacheError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
        else:
            cache = FeatureCache.open(tmp_path / "g.h5")
            assert np.isfinite(cache.X).all()
            outcomes.add("read")
    assert "refused" in outcomes


@pytest.mark.parametrize("ending", [".parquet", ".npz"])
def test_a_flipped_bit_of_a_vector_is_found(tmp_path: Path, ending: str) -> None:
    X = make_cache(tmp_path / "f.h5", 20)
    export_cache(tmp_path / "f.h5", tmp_path / f"x{ending}")
    data = bytearray((tmp_path / f"x{ending}").read_bytes())
    if ending == ".npz":
        at = data.index(X[7].tobytes())
    else:
        group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
        column = group.column(group.num_columns - 1)
        at = column.data_page_offset + column.total_compressed_size - 9
    data[at] ^= 1
    (tmp_path / f"x{ending}").write_bytes(data)
    with pytest.raises(SourceError, match="cannot be read: .*(?i:crc)"):
        import_vectors(tmp_path / f"x{ending}", tmp_path / "g.h5")


def test_a_text_that_is_repeated_takes_no_memory_for_each_row(tmp_path: Path) -> None:
    n = 50_000
    labels = pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), pa.array(["x" * 100_000]))  # 5 GB
    columns = {
        "path": [f"{k}" for k in range(n)],
        "label": labels,
        "v": pa.array([[1.0]] * n, pa.list_(pa.float32(), 1)),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", store_schema=False)
    with pytest.raises(SourceError, match="label has 100,000 bytes"):
        import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED)


def test_names_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.extraction.external.available_memory", lambda: 3 * 2000)
    for columns, what in (
        ({"path": ["a" * 1001, "b"]}, "paths of up to 1,001 bytes do not fit"),
        ({"path": ["a", "b"], "label": ["c" * 251, "d"]}, "names of 2 classes do not fit"),
    ):
        pq.write_table(pa.table(columns | {"v": list(GOOD)}), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match=what):
            import_vectors(tmp_path / "x.parquet", tmp_path / "f.h5", stated=STATED)


def test_parquet_needs_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"path": ["a", "b"], "v": list(GOOD)}), tmp_path / "x.parquet")
    make_cache(tmp_path / "f.h5")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for attempt in (
        lambda: import_vectors(tmp_path / "x.parquet", tmp_path / "g.h5", stated=STATED),
        lambda: export_cache(tmp_path / "f.h5", tmp_path / "y.parquet"),
        FeatureCache.open(tmp_path / "f.h5").to_arrow,
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install 'featcache\[parquet\]'"):
            attempt()


def test_what_is_stated(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", X=GOOD, path=np.array(["a", "b"]), featcache=np.array('{"spec": {"backbone": 1}}'))
    with pytest.raises(UsageError, match="nothing says what made the vectors"):
        import_vectors(tmp_path / "x.npz", tmp_path / "f.h5")
    for stated in ("", " ", "a\nb", "x" * 501, "\x1b[2J"):
        with pytest.raises(UsageError, match="must be one line of at most 500 characters"):
            import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=stated)
    import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=f" {STATED} ")
    assert FeatureCache.open(tmp_path / "f.h5").spec.stated == STATED
    with pytest.raises(UsageError, match="exists; choose another -o, or give --force"):
        import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=STATED)
    (tmp_path / "f.h5.parts").mkdir()
    with pytest.raises(UsageError, match="unfinished work"):
        import_vectors(tmp_path / "x.npz", tmp_path / "f.h5", stated=STATED, force=True)


@pytest.fixture(scope="module")
def external(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with f.h5, of vectors made elsewhere, a model m/ and photos/."""
    folder = tmp_path_factory.mktemp("external")
    make_photos(folder / "photos", each=2)
    make_classes(folder / "made.h5", np.arange(90) % 3, 1 + np.arange(90) // 45)
    export_cache(folder / "made.h5", folder / "x.npz")
    import_vectors(folder / "x.npz", folder / "f.h5", stated=STATED)
    fit_head(folder / "f.h5", folder / "m", C=1.0)
    return folder


def test_heads_work_as_on_any_cache(external: Path, tmp_path: Path) -> None:
    fit_head(external / "made.h5", tmp_path / "m", C=1.0)
    ours, theirs = (evaluate(external / "m", external / "f.h5"), evaluate(tmp_path / "m", external / "made.h5"))
    assert (ours["accuracy"], ours["log_loss"]) == (theirs["accuracy"], theirs["log_loss"])
    assert len(list(predict(external / "m", external / "f.h5", evidence=external / "f.h5"))) == 90
    assert describe(external / "f.h5")["spec"]["external"] == {"stated": STATED}
    assert describe(external / "m")["spec"]["external"] == {"stated": STATED}
    assert describe(external / "m")["backbone"] is None


def test_nothing_embeds_images_with_them(external: Path, tmp_path: Path) -> None:
    reason = rf"made elsewhere \(stated: {STATED}\), by a network that featcache does not know"
    model = load_model(external / "m")
    for attempt in (
        lambda: predict(model, external / "photos"),
        lambda: evaluate(model, external / "photos"),
        lambda: extract(external / "photos", tmp_path / "g.h5", backbone=str(external / "m")),
        model.network,
        model.load_backbone,
    ):
        with pytest.raises(ModelError, match=reason):
            attempt()
    with pytest.raises(SpecMismatchError, match=reason):
        extract(external / "photos", external / "f.h5")
    with pytest.raises(SpecMismatchError, match=f"embedded by squeezenet1_1 -> made elsewhere, stated: {STATED}"):
        predict(model, external / "made.h5")


def test_extract_replaces_them_by_force_only(external: Path, tmp_path: Path) -> None:
    import_vectors(external / "x.npz", tmp_path / "f.h5", stated=STATED)
    options: dict[str, Any] = {"backbone": "squeezenet1_1", "weights": "none", "resize": 40, "crop": 32}
    report = extract(
        external / "photos", tmp_path / "f.h5", reuse=external / "f.h5", force=True, precision="fp32", **options
    )
    assert (report.embedded, FeatureCache.open(tmp_path / "f.h5").spec.stated) == (6, None)


def test_damage_is_answered_with_an_import(external: Path, tmp_path: Path) -> None:
    data = bytearray((external / "f.h5").read_bytes())
    with h5py.File(external / "f.h5") as file:
        data[file["features"].id.get_offset() + CLASSES_DIM] ^= 1
    (tmp_path / "f.h5").write_bytes(data)
    for attempt in (
        lambda: fit_head(tmp_path / "f.h5", tmp_path / "m"),
        lambda: repair(tmp_path / "f.h5", external / "photos"),
    ):
        with pytest.raises(CacheError, match="import it again: `featcache import TABLE -o .*f.h5 --force`"):
            attempt()


def test_earlier_versions_refuse_them() -> None:
    """They ask for a backbone first: ``the spec is not a JSON object with a backbone``."""
    spec = SPEC.external(STATED, "float16")
    assert "backbone" not in spec.to_json()
    assert type(spec).from_json(spec.to_json()) == spec
    for wrong in ({"stated": 1}, {"stated": STATED, "more": 1}, {}):
        with pytest.raises(UsageError):
            type(spec).from_json({"external": wrong, "storage": "float16", "views": 1})
    with pytest.raises(UsageError, match="storage"):
        SPEC.external(STATED, "float64")


@pytest.mark.slow
def test_datasets_reads_and_writes_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    make_cache(tmp_path / "f.h5")
    export_cache(tmp_path / "f.h5", tmp_path / "x.parquet")
    files = str(tmp_path / "x.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert (np.array(loaded["vector"], np.float16) == FeatureCache.open(tmp_path / "f.h5").X).all()
    features = datasets.Features(path=datasets.Value("string"), label=datasets.ClassLabel(names=["z", "a"]),
                                 embedding=datasets.Sequence(datasets.Value("float32")))  # fmt: skip
    rows = {"path": ["1", "2"], "label": [0, 1], "embedding": [[1.0, 2.0], [3.0, 4.0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "y.parquet"))
    import_vectors(tmp_path / "y.parquet", tmp_path / "g.h5", stated=STATED)
    cache = FeatureCache.open(tmp_path / "g.h5")
    assert (cache.classes, cache.y.tolist(), cache.X.tolist()) == (("a", "z"), [1, 0], rows["embedding"])
