"""What is on a path: content before names, never waiting; and ``~``."""

import gzip
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.errors import CacheError, FeatcacheError, ModelError, SourceError, UsageError
from featcache.extraction.request import ExtractRequest
from featcache.images.source import Source
from featcache.system.path_advice import HERE, check_path, missing, typed
from featcache.system.path_kinds import Kind, as_path, kind_of


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "content")
    return file.getvalue()


def tarred(mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("photos/1.jpg"))
    return file.getvalue()


def saved_arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, X=np.zeros(3))
    return file.getvalue()


JPEG, HDF5, TEXT = b"\xff\xd8\xff\xe0" + bytes(20), b"\x89HDF\r\n\x1a\n" + bytes(20), b"path,label\na.jpg,b\n"
OURS = b'\x30\0\0\0\0\0\0\0{"__metadata__":{"featcache_version":"0.1.0"}}  '
OTHERS = b'\x10\0\0\0\0\0\0\0{"__metadata__":'
FILES = [
    # content decides
    ("features.h5", JPEG, Kind.IMAGE),
    ("photo.jpg", HDF5, Kind.CACHE),
    ("photo.jpg", tarred("w:"), Kind.ARCHIVE),
    ("list.csv", zipped("list.csv"), Kind.ARCHIVE),
    ("photos", tarred("w:gz"), Kind.ARCHIVE),
    ("photos", tarred("w:xz"), Kind.PACKED),
    ("photos", tarred("w:bz2"), Kind.PACKED),
    ("photos", gzip.compress(b"x"), Kind.PACKED),
    ("photos", b"7z\xbc\xaf\x27\x1c", Kind.PACKED),
    ("photos", b"Rar!\x1a\x07\x01\0", Kind.PACKED),
    ("photos", b"PK\x05\x06" + bytes(18), Kind.ARCHIVE),  # empty
    ("model.bin", OURS, Kind.EXPORT),
    ("model.bin", OTHERS, Kind.WEIGHTS),
    ("model", zipped("archive/data.pkl"), Kind.WEIGHTS),
    ("table", zipped("[Content_Types].xml"), Kind.SHEET),
    ("table", b"PAR1", Kind.PARQUET),
    ("clip", b"\0\0\0\x20ftypisom", Kind.VIDEO),
    ("photo.mp4", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Kind.IMAGE),
    ("text", b"%PDF-1.7", Kind.DOCUMENT),
    # else the name, if content does not object
    ("features.h5", b"damaged", Kind.CACHE),
    ("features.HDF5", b"", Kind.CACHE),
    ("list.csv", TEXT, Kind.TABLE),
    ("list.txt", b"a.jpg\n", Kind.TABLE),
    ("list.xlsx", zipped("docProps/app.xml"), Kind.SHEET),
    ("letter.docx", zipped("[Content_Types].xml"), Kind.DOCUMENT),
    ("X.npz", saved_arrays(), Kind.ARRAYS),
    ("m.onnx", b"\x08\x0a", Kind.EXPORT),
    ("w.pth", b"\x80\x02}q", Kind.WEIGHTS),
    ("photo.JPG", b"damaged", Kind.IMAGE),
    ("phone.heic", b"damaged", Kind.IMAGE),
    ("notes", b"", Kind.FILE),
]


@pytest.mark.parametrize(("name", "content", "kind"), FILES, ids=[f"{name} {kind.name}" for name, _, kind in FILES])
def test_kinds_of_files(tmp_path: Path, name: str, content: bytes, kind: Kind) -> None:
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name) is kind


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({}, Kind.EMPTY),
        ({".DS_Store": b""}, Kind.EMPTY),
        ({"a/b/readme.txt": b"hello"}, Kind.BARE),
        ({"a/b/c/photo.jpg": b""}, Kind.FOLDER),
        ({"a/b/c/photo": JPEG, "list.csv": b""}, Kind.FOLDER),
        ({"model.json": b'{"format": "featcache-model"', "curves.png": JPEG}, Kind.MODEL),
        ({"model.json": b"damaged", "head.safetensors": b""}, Kind.MODEL),
        ({"model.json": b'{"class_name": "Functional"}', "cat/1.jpg": JPEG}, Kind.FOLDER),  # Keras'
    ],
    ids=str,
)
def test_kinds_of_folders(tmp_path: Path, files: dict[str, bytes], kind: Kind) -> None:
    for name, content in files.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(content)
    (tmp_path / "x").mkdir(exist_ok=True)
    assert kind_of(tmp_path / "x") is kind
    work = (tmp_path / "x").rename(tmp_path / "x.parts")
    assert kind_of(work) is (kind if kind in (Kind.FOLDER, Kind.MODEL) else Kind.WORK)


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    assert [kind_of(tmp_path / name) for name in ("loop", "gone", "nothing", "\0")] == [Kind.MISSING] * 4
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "features.h5")
        os.mkfifo(tmp_path / "model.json")
        assert kind_of(tmp_path / "features.h5") is Kind.SPECIAL  # and does not wait for a writer
        assert kind_of(tmp_path) is Kind.MODEL


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("https://a.b/c.zip", Kind.ARCHIVE),
        ("https://a.b/c", Kind.ADDRESS),
        ("https://a.zip", Kind.ARCHIVE),
        ("s3://bucket/train-{000..003}.tar", Kind.ARCHIVE),
        ("s3://bucket/x.parquet", Kind.PARQUET),
        ("s3://bucket/x.h5", Kind.ADDRESS),
        ("s3://bucket", Kind.PLACE),
        ("GS://bucket/x", Kind.PLACE),
        ("hf://datasets/u/n.tar", Kind.ADDRESS),
        ("file:///x", Kind.ADDRESS),
    ],
)
def test_addresses(address: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of(address) is kind_of(Path(address)) is kind
    assert typed(Path(address)).strip("'") == address  # a Path swallows a slash
    monkeypatch.chdir(tmp_path)
    Path(address).mkdir(parents=True)  # nothing is too odd to be a folder's name
    assert address.startswith("file:///") or kind_of(address) is Kind.EMPTY


def test_names_that_a_shell_would_take_apart() -> None:
    assert [typed(path) for path in ("my photos", "-x", "it's", "plain/a.jpg")] == [
        "'my photos'",
        "./-x",
        "'it'\"'\"'s'",
        "plain/a.jpg",
    ]


def test_the_nearest_name_that_leads_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("photos/train", "phots"):
        Path(folder).mkdir(parents=True)
    for wrong, meant in (
        ("photo", "photos"),
        ("PHOTOS", "photos"),
        ("photoz/train", "photos/train"),
        ("photos/trian", "photos/train"),
    ):
        assert missing(wrong, "") == f"{wrong} does not exist; did you mean {meant}?"
    for path in ("holidays", "photos/x/y"):
        assert missing(path, "give a folder") == f"{path} does not exist; give a folder"


def test_what_is_unfinished_or_locked_away_is_not_called_missing(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("np.h5.parts").mkdir()
    Path("p.h5").write_bytes(HDF5)  # a name that is near
    again = "the command that began it, such as extract, goes on with it when it is run again"
    said = f"error: np.h5 is not finished, and its parts lie in np.h5.parts; {again}"
    for name, packs in (("lock", ""), ("listing.h5", "; `featcache merge np.h5` packs what several made")):
        Path("np.h5.parts", name).touch()
        for command in (("info",), ("verify",), ("fit-head", "-o", "m")):
            assert run(command[0], "np.h5", *command[1:]) == (1, "", f"{said}{packs}\n")

    def locked(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", locked)
    assert missing("photos/cat", "give a folder") == "photos/cat cannot be read: Permission denied; give a folder"


def test_what_is_piped_in_has_no_kind() -> None:
    check_path("-", "images", ("extract", HERE, "-o", "f.h5"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_home_folder(home: Path) -> None:
    assert (as_path("~"), as_path("~/x")) == (home, home / "x")
    assert as_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert as_path("a/~") == Path("a/~")
    Path("~backup").touch()
    assert as_path("~backup") == Path("~backup")  # there is one


PLACES = {
    "source": lambda: Source("~/x").path,
    "root": lambda: Source("a.csv", root="~/x").root,  # type: ignore[arg-type]
    "backbone": lambda: ExtractRequest(backbone="~/x").backbone,
    "weights": lambda: ExtractRequest(weights="~/x").weights,
}
CALLS = {
    "load_model": lambda: featcache.load_model("~/x"),
    "cache": lambda: featcache.FeatureCache.open("~/x"),
    "describe": lambda: featcache.describe("~/x"),
    "fit_head": lambda: featcache.fit_head("~/x", "m"),
    "extract": lambda: featcache.extract("~/x", "f.h5"),
    "output": lambda: featcache.extract(".", "~/x/f.h5"),
    "predict": lambda: featcache.predict("~/x", "a.jpg"),
    "evaluate": lambda: featcache.evaluate("~/x", "."),
    "repair": lambda: featcache.repair("~/x", "."),
    "finetune": lambda: featcache.finetune(".", "~/x/m"),
    "recipe": lambda: featcache.finetune(".", "m", recipe="~/x.toml"),
    "init": lambda: featcache.finetune(".", "m", init="~/x"),
    "export": lambda: featcache.export_model("~/x", "m.onnx"),
    "load_backbone": lambda: featcache.load_backbone("resnet18", "~/x"),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_value_expands_it(home: Path, place: str) -> None:
    assert str(PLACES[place]()) == str(home / "x")


@pytest.mark.parametrize("call", CALLS)
def test_every_function_expands_it(home: Path, call: str) -> None:
    Path("red").mkdir()
    Path("red/1.jpg").touch()
    with pytest.raises(FeatcacheError) as found:
        CALLS[call]()
    assert str(home / "x") in str(found.value)


def test_every_command_expands_it(home: Path, run) -> None:
    for command in (
        ("extract", "~/x", "--output=f.h5"),
        ("extract", ".", "--output=~/x/f.h5"),
        ("extract", ".", "-o", "f.h5", "--backbone=~/x/y"),
        ("extract", ".", "-o", "f.h5", "--weights=~/x/y.pth"),
        ("predict", "~/x", "a.jpg"),
        ("predict", "m", "a.jpg", "--output=~/x/y.csv"),
        ("evaluate", "m", ".", "--output=~/x/y.csv"),
        ("verify", "~/x"),
        ("info", "~/x"),
        ("doctor", "--images=~/x", "--seconds=0"),
    ):
        code, _, err = run(*command)
        assert (code, str(home / "x") in err) == (1, True), (command, err)


def test_python_is_told_like_the_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.h5").write_bytes(HDF5)
    with pytest.raises(SourceError, match=r"^f.h5 is a cache, .* did you mean `featcache fit-head f.h5 -o model`\?$"):
        featcache.extract("f.h5", "g.h5")
    with pytest.raises(SourceError, match=r"^f.h5 is a cache, "):
        featcache.list_images("f.h5")


# Each takes a path in the place of v; m is a model, f a cache, p a folder.
TAKES_A_PATH: dict[str, Callable[[Any, Path, Path, Path], Any]] = {
    "report model": lambda v, m, f, p: featcache.report(v, f),
    "report source": lambda v, m, f, p: featcache.report(m, v),
    "report output": lambda v, m, f, p: featcache.report(m, f, output=v),
    "report pictures": lambda v, m, f, p: featcache.report(m, f, pictures=v),
    "report against": lambda v, m, f, p: featcache.report(m, f, against=v),
    "report evidence": lambda v, m, f, p: featcache.report(m, p, evidence=v),
    "report figures": lambda v, m, f, p: featcache.report(m, f, figures=v),
    "stats source": lambda v, m, f, p: featcache.stats(v),
    "stats output": lambda v, m, f, p: featcache.stats(p, output=v),
    "stats figures": lambda v, m, f, p: featcache.stats(p, figures=v),
    "preview source": lambda v, m, f, p: featcache.preview(v),
    "preview output": lambda v, m, f, p: featcache.preview(p, output=v),
    "gallery model": lambda v, m, f, p: featcache.gallery(v, f),
    "gallery inputs": lambda v, m, f, p: featcache.gallery(m, [v]),
    "gallery pictures": lambda v, m, f, p: featcache.gallery(m, f, pictures=v),
    "gallery evidence": lambda v, m, f, p: featcache.gallery(m, f, evidence=v),
    "map": lambda v, m, f, p: featcache.map(v),
    "audit cache": lambda v, m, f, p: featcache.audit(v),
    "audit output": lambda v, m, f, p: featcache.audit(f, v),
    "audit source": lambda v, m, f, p: featcache.audit(f, source=v),
    "split source": lambda v, m, f, p: featcache.split(v, val=0.1),
    "split output": lambda v, m, f, p: featcache.split(p, v, val=0.1),
    "split group_table output": lambda v, m, f, p: featcache.split(p, val=0.1, group_column="x", group_table=v),
    "split pictures": lambda v, m, f, p: featcache.split(f, val=0.1, pictures=v),
    "split copy_to output": lambda v, m, f, p: featcache.split(p, val=0.1, copy_to=v),
    "split link_to output": lambda v, m, f, p: featcache.split(p, val=0.1, link_to=v),
    "evaluate model": lambda v, m, f, p: featcache.evaluate(v, f),
    "evaluate source": lambda v, m, f, p: featcache.evaluate(m, v),
    "evaluate evidence": lambda v, m, f, p: featcache.evaluate(m, f, evidence=v),
    "predict model": lambda v, m, f, p: featcache.predict(v, f),
    "predict inputs": lambda v, m, f, p: featcache.predict(m, [f, v]),
    "predict evidence": lambda v, m, f, p: featcache.predict(m, f, evidence=v),
    "fit_head cache": lambda v, m, f, p: featcache.fit_head(v, p / "m"),
    "fit_head output": lambda v, m, f, p: featcache.fit_head(f, v),
    "extract source": lambda v, m, f, p: featcache.extract(v, p / "f.h5"),
    "extract output": lambda v, m, f, p: featcache.extract(p, v),
    "extract reuse": lambda v, m, f, p: featcache.extract(p, p / "f.h5", reuse=[v]),
    "finetune source": lambda v, m, f, p: featcache.finetune(v, p / "m", init=m),
    "finetune output": lambda v, m, f, p: featcache.finetune(p, v, init=m),
    "finetune init": lambda v, m, f, p: featcache.finetune(p, p / "m", init=v),
    "export model": lambda v, m, f, p: featcache.export_model(v, p / "m.onnx"),
    "export output": lambda v, m, f, p: featcache.export_model(m, v),
    "describe": lambda v, m, f, p: featcache.describe(v),
    "repair cache": lambda v, m, f, p: featcache.repair(v, p),
    "repair source": lambda v, m, f, p: featcache.repair(f, v),
    "doctor": lambda v, m, f, p: featcache.doctor(v, seconds=0),
    "load_model": lambda v, m, f, p: featcache.load_model(v),
    "load_backbone weights": lambda v, m, f, p: featcache.load_backbone("resnet18", v),
    "list_images": lambda v, m, f, p: featcache.list_images(v),
    "FeatureCache": lambda v, m, f, p: featcache.FeatureCache.open(v),
    "Source": lambda v, m, f, p: featcache.Source(v),
    "Source root": lambda v, m, f, p: featcache.Source(p, root=v),
}
OPTIONAL = {"source", "output", "pictures", "against", "evidence", "figures", "init", "root", "doctor"}


def test_what_is_no_path_is_refused_with_a_sentence(photos: Path, model: Path, cache: Path) -> None:
    said = r"(^found .* where a path was expected; give it as text or|^inputs\[.* give paths)"
    for name, call in TAKES_A_PATH.items():
        for value in (3, ["a"], b"a", object(), *([] if name.split()[-1] in OPTIONAL else [None])):
            with pytest.raises((UsageError, TypeError)) as found:
                call(value, model, cache, photos)
            assert found.type is UsageError and re.match(said, str(found.value)), (name, value)


def test_an_open_cache_and_a_loaded_model_are_paths(model: Path, cache: Path, tmp_path: Path) -> None:
    opened, loaded = featcache.FeatureCache.open(cache), featcache.load_model(model)
    assert featcache.evaluate(loaded, opened) == featcache.evaluate(model, cache)
    assert featcache.report(model, opened).images == featcache.report(loaded, cache).images == 50
    for inputs in (opened, [opened]):
        rows = [row.to_row() for row in featcache.predict(model, inputs)]
        assert rows == [row.to_row() for row in featcache.predict(model, cache)]
    assert featcache.describe(opened) == featcache.describe(cache)
    assert featcache.describe(loaded) == featcache.describe(model)
    assert featcache.fit_head(opened, tmp_path / "again", C=1.0).n_train == 50
    assert featcache.split(opened, val=0.1).counts == featcache.split(cache, val=0.1).counts
    assert len(featcache.audit(opened).cache) == len(featcache.audit(cache).cache)
    with pytest.raises(ModelError, match=r"f\.h5 is a cache and .* did you mean `featcache evaluate "):
        featcache.evaluate(opened, loaded)
    with pytest.raises(CacheError, match=r"m is a model, expected a cache; it is trained already"):
        featcache.fit_head(loaded, tmp_path / "other")
