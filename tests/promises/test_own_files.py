"""What featcache writes is known again, wherever it lies and whatever it is called, and is never taken for the user's images."""

import os
import re
import shutil
import sys
from pathlib import Path

import h5py
import pytest
from conftest import TINY, TINY_FLAGS, make_photos, write_photo
from faults import Program

from featcache import export_cache, import_vectors
from featcache.cache.cache import FeatureCache, is_cache, weights_copy
from featcache.errors import StorageError, UsageError
from featcache.extraction.extract import extract
from featcache.images.source import list_images
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.predict import predict
from featcache.system.path_kinds import Kind, kind_of
from featcache.system.workdir import locked, work_folder

NAMES = ("f.h5", "f.hdf5", "f.H5", "features", "f.cache")


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_one_by_any_name(photos: Path, tmp_path: Path, name: str) -> None:
    cache = tmp_path / name
    extract(photos, cache, TINY)
    assert is_cache(cache)
    export_cache(cache, tmp_path / "x.npz")
    import_vectors(tmp_path / "x.npz", cache, force=True)
    extract(photos, cache, TINY, force=True)
    fit_head(cache, tmp_path / "m", C=1.0, folds=0)
    assert sum(prediction.probabilities is not None for prediction in predict(tmp_path / "m", [cache])) == 18
    assert evaluate(tmp_path / "m", cache)["n"] == 18
    with pytest.raises(UsageError, match="cannot be mixed"):
        predict(tmp_path / "m", [cache, photos])


def test_images_are_no_caches(photos: Path) -> None:
    others = [photos, *photos.rglob("*.jpg"), photos / "nothing"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(photos / "pipe")  # to open it would wait for someone to write
        others.append(photos / "pipe")
    assert not any(map(is_cache, others))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and held on Linux only")
@pytest.mark.parametrize("name", ["f.h5", "f.hdf5", "features"])
def test_unfinished_work_inside_the_source_is_no_class(tmp_path: Path, warm: Program, name: str) -> None:
    """Killed after its first part, with everything inside the folder of images; the same command goes on, to the same cache."""
    photos = make_photos(tmp_path / "photos")
    command = ("extract", photos, "-o", photos / name, *TINY_FLAGS, "--workers", 1, "--json")
    published, small = "extraction.parts.FeatureCache.open", {"extraction.parts.MAX_ROWS": 4}
    with warm.held(published, *command, die=True, settings=small) as died:
        assert len(list((photos / f"{name}.parts").glob("*.h5"))) == 1
    assert died.result().died
    assert list_images(photos).classes == ("blue", "green", "red")
    facts = warm.check(*command).result
    assert (facts["embedded"] + facts["reused"], facts["reused"] > 0) == (18, True)


def test_folders_of_the_user_that_are_called_alike_stay_classes(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=2)
    shutil.copytree(photos / "red", photos / "engine.parts")
    write_photo(photos / "spare.h5.parts" / "0.jpg", (1, 2, 3), 1)
    assert list_images(photos).classes == ("blue", "engine.parts", "green", "red", "spare.h5.parts")


def test_a_model_of_another_program_hides_no_class(model: Path, tmp_path: Path) -> None:
    """Keras, too, calls a file ``model.json``, and a user may call pictures beside it as ours are called."""
    photos = make_photos(tmp_path / "photos", each=2)
    others = '{"format": "layers-model", "generatedBy": "keras"}'
    (photos / "red" / "model.json").write_text(others)
    (photos / "red" / "inner").mkdir()
    (photos / "red" / "inner" / "model.json").write_text(others)
    for name in ("inner.train.png", "ours.train.png"):
        shutil.copy(photos / "red" / "00.jpg", photos / "red" / name)
    shutil.copytree(model, photos / "red" / "ours")
    (tmp_path / "model.json").write_text(others)
    (photos / "green" / "model.json").symlink_to(tmp_path / "model.json")
    images = list_images(photos)
    kept = [f"{label}/0{k}.jpg" for label in ("blue", "green", "red") for k in (0, 1)]
    assert (images.paths, images.classes) == ((*kept, "red/inner.train.png"), ("blue", "green", "red"))
    assert [kind_of(photos / name) for name in ("red", "red/ours")] == [Kind.FOLDER, Kind.MODEL]


def test_beside_a_model_of_another_program_there_is_room(model: Path, cache: Path, photos: Path, run) -> None:
    (photos / "red" / "model.json").write_text('{"class_name": "Functional"}')
    assert run("predict", model, cache, "-o", photos / "red" / "rows.csv")[0] == 0
    for wrong in (photos, photos / "red" / "00.jpg"):
        code, _, err = run("predict", wrong, cache)
        assert code == 1 and "there is one in it" not in err and "lies in a model" not in err


# Output -> the command that makes it, and what is to be added for it to be replaced.
OUTPUTS = {
    "f.h5": ("extract photos", "--force --resize 44"),
    "i.h5": ("import x.npz", "--force"),
    "x.npz": ("export f.h5", "--force"),
    "m.safetensors": ("export m", "--force"),
    "t.csv": ("predict m f.h5", "--overwrite"),
    "m": ("fit-head f.h5", ""),
    "audit": ("audit f.h5", ""),
    "stats": ("stats photos", ""),
    "split.csv": ("split photos --val 0.25", "--seed 1"),
    "p.png": ("preview photos", ""),
    "r.html": ("report m f.h5", ""),
}


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_link_stays_a_link_and_what_it_leads_to_is_written(trained: Path, tmp_path: Path, run, name: str) -> None:
    command, again = OUTPUTS[name]
    words = [str(trained / word) if (trained / word).exists() else word for word in command.split()]
    if name == "i.h5":
        run("export", trained / "f.h5", "-o", tmp_path / "x.npz")
        words[1] = str(tmp_path / "x.npz")
    flags = {"extract": TINY_FLAGS, "preview": TINY_FLAGS[:-2]}.get(words[0], [])
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    target, link = tmp_path / "real" / name, tmp_path / "links" / name
    assert run(*words, "-o", target, *flags)[0] == 0
    before, there = target.stat(), {path.name for path in target.parent.iterdir()}
    link.symlink_to(target)
    assert run(*words, "-o", link, *flags, *again.split())[0] == 0
    assert link.is_symlink() and not [path.name for path in link.parent.iterdir() if not path.name.startswith(name)]
    assert target.stat().st_ino != before.st_ino or target.stat().st_mtime_ns != before.st_mtime_ns
    assert {path.name for path in target.parent.iterdir()} == there
    if words[0] == "extract":
        assert FeatureCache.open(target).spec.preprocess.resize == 44


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_weights_and_unfinished_work_lie_beside_the_file_that_a_link_leads_to(photos: Path, tmp_path: Path) -> None:
    """So both names of a cache find them, and one process at a time writes it."""
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "f.h5", tmp_path / "link.h5"
    extract(photos, target, TINY)
    (kept,) = tmp_path.glob("real/*.safetensors")
    link.symlink_to(target)
    assert {weights_copy(path, FeatureCache.open(path).spec) for path in (target, link)} == {kept}
    assert {work_folder(path) for path in (target, link)} == {tmp_path / "real" / "f.h5.parts"}
    with locked(work_folder(target)), pytest.raises(StorageError, match="another featcache is writing"):
        extract(photos, link, TINY, force=True)


NOT_REPLACED = {
    "i.h5": ("import x.npz", "--force", "photos/red/00.jpg"),
    "c.h5": ("import x.npz", "--force", "text"),
    "n.h5": ("import x.npz", "--force", "foreign"),
    "x.npz": ("export f.h5", "--force", "photos/red/00.jpg"),
    "m.safetensors": ("export m", "--force", "f.h5"),
    "t.csv": ("predict m f.h5", "--overwrite", "f.h5"),
    "e.csv": ("evaluate m f.h5", "--overwrite", "photos/red/00.jpg"),
}


@pytest.mark.parametrize("name", NOT_REPLACED)
def test_what_is_something_else_is_not_replaced_by_force(trained: Path, tmp_path: Path, run, name: str) -> None:
    command, option, there = NOT_REPLACED[name]
    run("export", trained / "f.h5", "-o", tmp_path / "x.npz")
    words = [str(trained / word) if (trained / word).exists() else word for word in command.split()]
    words = [str(tmp_path / word) if word == "x.npz" else word for word in words]
    output = tmp_path / ("x2.npz" if name == "x.npz" else name)
    if there == "foreign":
        with h5py.File(output, "w") as file:
            file["thesis"] = [1, 2, 3]
    else:
        output.write_bytes(b"ten years of work" if there == "text" else (trained / there).read_bytes())
    before = output.read_bytes()
    code, _, err = run(*words, "-o", output, option)
    assert (code, output.read_bytes()) == (1, before)
    assert re.search(f"which {option} does not replace|expected a cache|not a featcache", err), err
