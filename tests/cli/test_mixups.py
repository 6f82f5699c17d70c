"""What is typed in the wrong place: one line that says what it is and which command was probably meant. Written out by hand."""

import os
import re
import shlex
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import typer
from caches import make_classes
from conftest import write_photo

from featcache.cli import app
from featcache.models.fit import fit_head

COMMANDS = typer.main.get_command(app.app).commands
MODEL, IMAGES = "expected the folder of a model", "expected a folder, an archive or a table of images"
SCORED = "expected a folder, an archive or a table of images, or a cache"
INPUTS, EITHER = (
    "expected images, a folder, archive or table of them, or a cache",
    "expected a cache or the folder of a model",
)
EXPORTED = "it is for other programs to run"
MAKE = "make one: `featcache extract photos -o features.h5`, `featcache fit-head features.h5 -o model`, then"
WEIGHTS = "`featcache extract SOURCE -o features.h5 --backbone NAME --weights w.pth`"
# What is typed -> exit code, answer.
MIXUPS = {
    "predict photos model": "photos is a folder of images and model is a model; did you mean `featcache predict model photos`?",
    "predict 'my photos' model": "'my photos' is a folder of images and model is a model; did you mean `featcache predict model 'my photos'`?",
    "predict photos photos": f"photos is a folder of images, {MODEL}; {MAKE} `featcache predict model photos`",
    "predict f.h5 photos": f"f.h5 is a cache, {MODEL}; train one on it: `featcache fit-head f.h5 -o model`, then `featcache predict model photos`",
    "predict f.h5 model": "f.h5 is a cache and model is a model; did you mean `featcache predict model f.h5`?",
    "predict photos/red/0.png model": "photos/red/0.png is an image and model is a model; did you mean `featcache predict model photos/red/0.png`?",
    "predict m.onnx photos": f"m.onnx is an exported model, {MODEL}; {EXPORTED}; give the folder that it was exported from",
    "predict m.safetensors photos": f"m.safetensors is an exported model, {MODEL}; {EXPORTED}; give the folder that it was exported from",
    "predict w.pth photos": f"w.pth is a file of weights, {MODEL}; make one: {WEIGHTS}, `featcache fit-head features.h5 -o model`, then `featcache predict model photos`",
    "predict model/model.json photos": "model/model.json lies in a model; did you mean `featcache predict model photos`?",
    "predict model.zip photos": f"model.zip is an archive, {MODEL}; unpack it: `unzip model.zip -d model-unpacked`, then `featcache predict model-unpacked photos`",
    "predict results photos": f"results is a folder without images, {MODEL}; there is one in it: `featcache predict results/m photos`",
    "verify results": "results is a folder without images, expected a cache; there is one in it: `featcache verify results/f.h5`",
    "predict modle photos": "modle does not exist; did you mean model?",
    "predict model photo": "photo does not exist; did you mean photos?",
    "predict model model": f"model is a model, {INPUTS}; did you mean `featcache predict model SOURCE`?",
    "predict model m.onnx": f"m.onnx is an exported model, {INPUTS}; {EXPORTED}",
    "predict model https://example.org/a%20b.jpg": f"https://example.org/a%20b.jpg is an address, {INPUTS}; download it: "
    "`curl -L -o 'a b.jpg' https://example.org/a%20b.jpg`, then `featcache predict model 'a b.jpg'`",
    "predict model film.mp4": f"film.mp4 is a video, {INPUTS}; take frames out of it: `mkdir frames && ffmpeg -i film.mp4 -r 1 frames/%06d.jpg`, "
    "then `featcache predict model frames`",
    "evaluate photos model": "photos is a folder of images and model is a model; did you mean `featcache evaluate model photos`?",
    "evaluate f.h5 photos": f"f.h5 is a cache, {MODEL}; train one on it: `featcache fit-head f.h5 -o model`, then `featcache evaluate model photos`",
    "evaluate model photos/red/0.png": f"photos/red/0.png is an image, {SCORED}; did you mean `featcache predict model photos/red/0.png`?",
    "evaluate model model": f"model is a model, {SCORED}; did you mean `featcache evaluate model SOURCE`?",
    "export f.h5 -o x.onnx": f"f.h5 is a cache, {MODEL}; train one on it: `featcache fit-head f.h5 -o model`, then `featcache export model -o x.onnx`",
    "export photos -o x.onnx": f"photos is a folder of images, {MODEL}; {MAKE} `featcache export model -o x.onnx`",
    "export f.h5 -o f.h5": "cannot write f.h5: it is what is read; choose another -o, such as features.parquet",
    "stats photos -o photos": "cannot write photos: it is what is read; choose another -o, such as stats",
    "audit f.h5 -o f.h5": "cannot write f.h5: it is what is read; choose another -o, such as audit",
    "export x.onnx -o model": "x.onnx does not exist and model is a model; did you mean `featcache export model -o x.onnx`?",
    "export model -o model": "cannot write model: it is what is read; choose another -o, such as model.onnx",
    "fit-head photos -o m": "photos is a folder of images, expected a cache; make one: `featcache extract photos -o features.h5`, then "
    "`featcache fit-head features.h5 -o m`",
    "fit-head photos -o new.h5": "photos is a folder of images, expected a cache; did you mean `featcache extract photos -o new.h5`?",
    "fit-head model -o m": "model is a model, expected a cache; it is trained already; did you mean `featcache finetune SOURCE -o m --init model`?",
    "fit-head m -o f.h5": "m does not exist and f.h5 is a cache; did you mean `featcache fit-head f.h5 -o m`?",
    "fit-head f.h5 -o photos": "cannot write photos: it is a folder of images, not a featcache model; choose another -o",
    "fit-head f.h5 -o f.h5": "cannot write f.h5: it is what is read; choose another -o, such as model",
    "fit-head w.pth -o m": f"w.pth is a file of weights, expected a cache; {WEIGHTS} makes one with it",
    "fit-head f.h5.gz -o m": "f.h5.gz is a packed file, expected a cache; unpack it: `gunzip -k f.h5.gz`",
    "extract f.h5 -o g.h5": f"f.h5 is a cache, {IMAGES}; did you mean `featcache fit-head f.h5 -o model`?",
    "extract disguised.jpg -o g.h5": f"disguised.jpg is a cache, {IMAGES}; did you mean `featcache fit-head disguised.jpg -o model`?",
    "extract model -o g.h5": f"model is a model, {IMAGES}; did you mean `featcache extract SOURCE -o g.h5 --backbone model`?",
    "extract w.pth -o g.h5": f"w.pth is a file of weights, {IMAGES}; did you mean `featcache extract SOURCE -o g.h5 --backbone NAME --weights w.pth`?",
    "extract m.onnx -o g.h5": f"m.onnx is an exported model, {IMAGES}; {EXPORTED}",
    "extract photos/red/0.png -o g.h5": f"photos/red/0.png is an image, {IMAGES}; single images are for predict: "
    "`featcache predict MODEL photos/red/0.png`",
    "extract birds.tar.gz -o g.h5": f"birds.tar.gz is a packed file, {IMAGES}; unpack it: `mkdir birds && tar -xf birds.tar.gz -C birds`, then "
    "`featcache extract birds -o g.h5`",
    "extract birds.7z -o g.h5": f"birds.7z is a packed file, {IMAGES}; unpack it: `7z x birds.7z -obirds`, then `featcache extract birds -o g.h5`",
    "extract birds.rar -o g.h5": f"birds.rar is a packed file, {IMAGES}; unpack it: `unrar x birds.rar birds/`, then `featcache extract birds -o g.h5`",
    "extract https://example.org/birds.rar -o g.h5": f"https://example.org/birds.rar is an address, {IMAGES}; download it: "
    "`curl -L -o birds.rar https://example.org/birds.rar`, unpack it: `unrar x birds.rar birds/`, then `featcache extract birds -o g.h5`",
    "fit-head s3://bucket/birds.tar -o m": "s3://bucket/birds.tar is an archive, expected a cache; make one: "
    "`featcache extract s3://bucket/birds.tar -o features.h5`, then `featcache fit-head features.h5 -o m`",
    "predict s3://bucket/m.tar photos": "s3://bucket/m.tar is an archive, expected the folder of a model; download it: "
    "`aws s3 cp s3://bucket/m.tar m.tar`, then `featcache predict m.tar photos`",
    "extract https://example.org/gallery -o g.h5": f"https://example.org/gallery is an address, {IMAGES}; save what is there as files first, "
    "and give their folder",
    "extract s3://bucket/birds.csv -o g.h5": f"s3://bucket/birds.csv is an address, {IMAGES}; download it: "
    "`aws s3 cp s3://bucket/birds.csv birds.csv`, then `featcache extract birds.csv -o g.h5`",
    "extract gs://bucket/1.jpg -o g.h5": f"gs://bucket/1.jpg is an address, {IMAGES}; download it: `gcloud storage cp gs://bucket/1.jpg 1.jpg`, "
    "then `featcache extract 1.jpg -o g.h5`",
    "extract hf://datasets/ann/birds -o g.h5": f"hf://datasets/ann/birds is an address, {IMAGES}; download it: "
    "`hf download ann/birds --repo-type dataset --local-dir birds`, then `featcache extract birds -o g.h5`",
    "extract file:///data/birds -o g.h5": f"file:///data/birds is an address, {IMAGES}; did you mean `featcache extract /data/birds -o g.h5`?",
    "extract list.xlsx -o g.h5": f"list.xlsx is a spreadsheet or data file, {IMAGES}; save it as CSV, then `featcache extract list.csv -o g.h5`",
    "extract notes -o g.h5": "notes is a file of another kind; expected a folder of images, or a table called .csv",
    "extract book.pdf -o g.h5": f"book.pdf is a document, {IMAGES}; save its pages or pictures as PNG or JPEG files",
    "extract g.h5.parts -o g.h5": f"g.h5.parts is a folder of unfinished work, {IMAGES}; the command that began it goes on with it when it is run again",
    "extract pipe -o g.h5": f"pipe is a pipe, socket or device, {IMAGES}; give the name of a folder or file",
    "extract empty -o g.h5": "no image found in empty; expected files such as empty/CLASS/photo.jpg",
    "predict model empty": "no image found in empty; expected files such as empty/photo.jpg",
    "extract Photos/red -o g.h5": "Photos/red does not exist; did you mean photos/red?",
    "extract lost -o g.h5": "lost is a link that leads nowhere, or cannot be read; give a folder of images or a CSV with the header path,label,split",
    "extract g.h5 -o photos": "g.h5 does not exist and photos is a folder of images; did you mean `featcache extract photos -o g.h5`?",
    "extract photos -o photos": "cannot write photos: it is what is read; choose another -o, such as features.h5",
    "extract photos -o model": "cannot write model: it is a model; give the name of a file",
    "extract photos -o g.h5 --backbone 'my photos'": "--backbone 'my photos' is a folder of images, expected the folder of a model, or a name that "
    "`featcache backbones` lists",
    "extract photos -o g.h5 --backbone f.h5": "--backbone f.h5 is a cache, expected the folder of a model, or a name that `featcache backbones` lists",
    "extract photos -o g.h5 --backbone w.pth": "--backbone w.pth is a file of weights, expected the folder of a model, or a name that "
    "`featcache backbones` lists; did you mean --backbone NAME --weights w.pth?",
    "extract photos -o g.h5 --backbone runs/modle": "--backbone runs/modle does not exist; `featcache backbones` lists all names",
    "extract photos -o g.h5 --weights model": "--weights model is a model, expected a .pth or .safetensors file; did you mean --backbone model?",
    "extract photos -o g.h5 --weights v.pth": "--weights v.pth does not exist; did you mean w.pth?",
    "extract photos -o g.h5 --weights f.h5": "--weights f.h5 is an HDF5 file, expected a .pth or .safetensors file",
    "finetune f.h5 -o m": f"f.h5 is a cache, {IMAGES}; fine-tuning takes the images themselves; did you mean `featcache fit-head f.h5 -o m`?",
    "finetune model -o m": f"model is a model, {IMAGES}; did you mean `featcache finetune SOURCE -o m --init model`?",
    "finetune model -o m --init photos": "model is a model and photos is a folder of images; did you mean "
    "`featcache finetune photos -o m --init model`?",
    "finetune photos -o m --init f.h5": f"f.h5 is a cache, {MODEL}; train one on it: `featcache fit-head f.h5 -o model`, then "
    "`featcache finetune photos -o m --init model`",
    "finetune photos -o photos": "cannot write photos: it is what is read; choose another -o, such as model-ft",
    "info photos": f"photos is a folder of images, {EITHER}; make one: `featcache extract photos -o features.h5`",
    "info m.onnx": f"m.onnx is an exported model, {EITHER}; {EXPORTED}",
    "info modle": "modle does not exist; did you mean model?",
    "fit-head photo.h5 -o m": "photo.h5 does not exist; make it with `featcache extract SOURCE -o photo.h5`",
    "predict photoss photos": "photoss does not exist; make one with `featcache fit-head features.h5 -o photoss`",
    "evaluate model f.h6": "f.h6 does not exist; did you mean f.h5?",
    "evaluate model photoz": "photoz does not exist; did you mean photos?",
    "extract modle -o g.h5": "modle does not exist; give a folder of images or a CSV with the header path,label,split",
    "export f.h6 -o x.npz": "f.h6 does not exist; did you mean f.h5?",
    "export modle -o x.onnx": "modle does not exist; did you mean model?",
    "audit --apply plan22.csv -o new.csv": "plan22.csv does not exist; did you mean plan.csv?",
    "info photos/f.h5": "photos/f.h5 does not exist; make it with `featcache extract SOURCE -o f.h5`",
    "predict photos/m photos": "photos/m does not exist; make one with `featcache fit-head features.h5 -o m`",
    "info runs/f.h5": "runs/f.h5 does not exist; make it with `featcache extract SOURCE -o runs/f.h5`",
    "info f.h6": "f.h6 does not exist; did you mean f.h5?",
    "verify model": "model is a model, expected a cache; did you mean `featcache info model`?",
    "verify photos --repair f.h5": "photos is a folder of images and f.h5 is a cache; did you mean `featcache verify f.h5 --repair photos`?",
    "verify f.h5 --repair model": f"model is a model, {IMAGES}; did you mean `featcache verify f.h5 --repair SOURCE`?",
    "doctor --images f.h5 --seconds 0": f"f.h5 is a cache, {IMAGES}; give the images that it was made from",
}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind."""
    folder = tmp_path_factory.mktemp("things")
    for name in ("photos/red/0.png", "photos/blue/1.png", "my photos/red/0.png"):
        write_photo(folder / name, (200, 30, 30), 1, size=(8, 8))
    make_classes(folder / "f.h5", np.arange(30) % 3, np.ones(30, np.uint8))
    fit_head(folder / "f.h5", folder / "model", C=1.0)
    (folder / "disguised.jpg").write_bytes((folder / "f.h5").read_bytes())
    (folder / "m.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    (folder / "m.safetensors").write_bytes(
        b'\x39\0\0\0\0\0\0\0{"__metadata__":{"featcache_version":"0.1.0","classes":"[]"}}'
    )
    for name, inside in (
        ("w.pth", "w/data.pkl"),
        ("photos.zip", "red/0.jpg"),
        ("birds.zip", "red/0.jpg"),
        ("model.zip", "a"),
        ("list.xlsx", "[Content_Types].xml"),
    ):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(inside, "content")
    for name, begins in (
        ("birds.7z", b"7z\xbc\xaf\x27\x1c"),
        ("birds.rar", b"Rar!\x1a\x07"),
        ("birds.tar.gz", b"\x1f\x8b"),
        ("f.h5.gz", b"\x1f\x8b"),
    ):
        (folder / name).write_bytes(begins + bytes(9))
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    (folder / "book.pdf").write_bytes(b"%PDF-1.7")
    for name in ("empty", "g.h5.parts", "runs", "results"):
        (folder / name).mkdir()
    fit_head(folder / "f.h5", folder / "results" / "m", C=1.0)
    make_classes(folder / "results" / "f.h5", np.arange(30) % 3)
    (folder / "notes").write_text("to do")
    (folder / "list.csv").write_text("path,label\nphotos/red/0.png,red\nphotos/blue/1.png,blue\n")
    (folder / "plan.csv").write_text("path,sha256,decision,label\n")
    (folder / "plan2.csv").write_text("path,label,split\n")  # nearer, and no plan
    (folder / "g.h5.parts" / "lock").touch()
    if sys.platform != "win32":
        os.mkfifo(folder / "pipe")
        (folder / "lost").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("typed", MIXUPS)
def test_the_answer_names_what_was_meant(things: Path, run, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    if sys.platform == "win32" and ("pipe" in typed or "lost" in typed):
        pytest.skip("Windows has none")
    monkeypatch.chdir(things)
    before = sorted(things.rglob("*"))
    assert run(*shlex.split(typed)) == (1, "", f"error: {MIXUPS[typed]}\n")
    assert sorted(things.rglob("*")) == before
    assert not hints_into(things / "photos", typed, MIXUPS[typed])


@pytest.mark.parametrize(
    "typed",
    [
        "fit-head . -o ../m",
        "fit-head ../photos -o ../m",
        "predict . .",
        "predict .. .",
        "export . -o ../x.onnx",
        "info .",
        "verify .",
        "extract . -o .",
        "finetune . -o .",
        "finetune . -o ../m --init .",
    ],
)
def test_no_hint_writes_into_the_photo_folder_where_people_like_to_begin(
    things: Path, run, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.chdir(things / "photos")
    code, _, err = run(*shlex.split(typed))
    assert (code, err.count("\n")) == (1, 1)
    assert not hints_into(things / "photos", typed, err)


OUTPUTS = [name for name, each in COMMANDS.items() if any("-o" in param.opts for param in each.params)]
MORE = {"predict": ["photos"], "evaluate": ["photos"], "split": ["--val", "0.2"]}  # what a command needs besides


@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize("path", ["photos", "model", "f.h5", "list.csv"])
def test_no_command_writes_over_what_it_reads(
    things: Path, run, monkeypatch: pytest.MonkeyPatch, command: str, path: str
) -> None:
    monkeypatch.chdir(things)
    before = {each: each.read_bytes() for each in things.rglob("*") if each.is_file()}
    code, out, err = run(command, path, *MORE.get(command, []), "-o", path)
    assert (code in (1, 2), out, err.count("\n")) == (True, "", 1) and err.startswith("error: ")
    assert {each: each.read_bytes() for each in things.rglob("*") if each.is_file()} == before


def hints_into(photos: Path, typed: str, answer: str) -> list[str]:
    """What an answer advises to write below ``photos``, other than what was typed."""
    hints = [*re.findall(r"`([^`]+)`", answer), *re.findall(r"choose another (-o, such as \S+)", answer)]
    targets = {
        place for hint in hints for place in re.findall(r"(?:-o,?(?: such as)?|-d|-C|mkdir|--local-dir) ?([^ ]+)", hint)
    }
    among = (Path(target) for target in targets - set(shlex.split(typed)))
    return [str(target) for target in among if photos in (target.resolve(), *target.resolve().parents)]
