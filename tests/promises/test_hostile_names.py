"""File names that break things: through the whole job and back, exactly, and never raw on a terminal.

In: images and class folders of such names. Out: the same names, each with its own image and label, in the cache, in CSV, JSON
lines and on stdout; messages in which they are harmless.
"""

import csv
import functools
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import COLOURS, TINY_FLAGS, write_photo
from faults import Program

from featcache.cache.cache import FeatureCache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names that other systems forbid")

NAMES = [
    os.fsdecode(b"caf\xe9.jpg"),  # Latin 1
    os.fsdecode(b"\xff\xfe\xed\xa0\x80.jpg"),  # bytes that no UTF-8 has
    "new\nline.jpg",
    "carriage\rreturn.jpg",
    "both\r\n.jpg",
    "\ttab.jpg",
    "'single' 'quotes'.jpg",
    '"double" "quotes".jpg',
    "back\\slash\\n\\x1b.jpg",
    "comma,comma,.jpg",
    "semi;colon.jpg",
    '=HYPERLINK("http:||x"&A1).jpg',
    "+1+1.jpg",
    "-rf.jpg",
    "--help.jpg",
    "@SUM(A1).jpg",
    "\uff1dcmd.jpg",
    "\uff0b1.jpg",
    "\uff0d1.jpg",
    "\uff20x.jpg",
    "'=an apostrophe of its own.jpg",
    "''\uff1dtwo of them.jpg",
    "<script>alert(1)<&amp;.jpg",
    "\u202egpj.exe.jpg",
    "zero\u200b\ufeffwidth.jpg",
    "\x1b[31;5mred\x1b]0;title\x07\x9b2J.jpg",
    "next\x85line\u2028separator\x0b\x0c\x1c.jpg",
    "nul \u2400 %00 \\0.jpg",
    "x" * 251 + ".jpg",
    "  blanks at both ends.jpg ",
    "a.. ..jpg",
    "~.jpg",
    "*?[a]$HOME`id`.jpg",
    "\U0001f9d1\u200d\U0001f680\U0001f3f3\ufe0f.jpg",
    unicodedata.normalize("NFC", "\u00e9\u00f1.jpg"),
    unicodedata.normalize("NFD", "\u00e9\u00f1.jpg"),
    "Case.jpg",
    "case.jpg",
    "CON.jpg",
    "nul.aux.jpg",
    "train.jpg",
    "/".join(["very deep" + "." * 20] * 60) + "/at last.jpg",
]
CLASSES = ["=1+1\n\x1b[2J", os.fsdecode(b'\xe9,"'), "train", "\u202e<b>'"]
HIDDEN = [".dot.jpg", "...jpg"]
MISSING = "not\nthere\x1b[31m\u202e.jpg"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, warm: Program) -> Path:
    """A folder with flat/ (all names), classes/ (the same files in class folders), f.h5 and a model m/."""
    folder = tmp_path_factory.mktemp("hostile")
    colours = [*COLOURS.values(), (200, 200, 30)]
    for number, name in enumerate(NAMES + HIDDEN):
        label = number % len(CLASSES)
        path = folder / "classes" / CLASSES[label] / name
        write_photo(folder / "photo.jpg", colours[label], number)
        for place in (path, folder / "flat" / name):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes((folder / "photo.jpg").read_bytes())
    done = warm.check("extract", folder / "classes", "-o", folder / "f.h5", *TINY_FLAGS, "--json")
    assert_harmless(done.err)
    assert (done.result["embedded"], done.result["refused"]) == (len(NAMES), 0)
    assert_harmless(warm.check("fit-head", folder / "f.h5", "-o", folder / "m", "--C", 1, "--folds", 0).err)
    return folder


def assert_harmless(text: str, lines: int | None = None) -> None:
    """Nothing a terminal would obey or show out of place, and no line of its own for a part of a name."""
    assert "\ufffd" not in text, text
    assert not [character for character in text if not character.isprintable() and character != "\n"], text
    assert lines is None or text.count("\n") == lines, text


def unescape(cell: str) -> str:
    """As documented: a cell that begins with apostrophes before what a spreadsheet would run has one too many."""
    return cell[1:] if re.match("'+[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]", cell) else cell


def class_of(name: str) -> str:
    return CLASSES[NAMES.index(name) % len(CLASSES)]


def test_the_cache_has_every_name_label_and_content(made: Path) -> None:
    cache = FeatureCache.open(made / "f.h5")
    assert sorted(cache.paths) == sorted(f"{class_of(name)}/{name}" for name in NAMES)  # hidden ones are passed over
    assert len({bytes(row.tobytes()) for row in cache.X}) == len(NAMES)
    assert set(cache.classes) == set(CLASSES)
    for path, label, digest in zip(cache.paths, cache.y, cache.rows.digests, strict=True):
        assert path.split("/")[0] == cache.classes[label]
        assert hashlib.sha256((made / "classes" / path).read_bytes()).digest() == bytes(digest)
    assert not {".dot.jpg", "...jpg"} & {path.split("/")[-1] for path in cache.paths}


def test_nothing_changed_is_recognised(made: Path, warm: Program) -> None:
    again = warm.check("extract", made / "classes", "-o", made / "f.h5", *TINY_FLAGS, "--json").result
    assert (again["embedded"], again["reused"], again["added"], again["removed"]) == (0, len(NAMES), 0, 0)


def read_rows(data: bytes, kind: str) -> list[dict[str, str]]:
    """What a reader of the file gets; paths and labels without the apostrophes of CSV."""
    if kind == "jsonl":
        assert data.isascii()
        return [json.loads(line) for line in data.splitlines()]
    text = data.decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    for cell in (cell for row in rows for cell in row.values()):
        assert not cell or cell[0] not in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20", cell
    return [row | {key: unescape(row[key]) for key in ("path", "label", "reason")} for row in rows]


def check_rows(rows: list[dict[str, str]], folder: Path, made: Path) -> None:
    """Paths open the very files, and labels are those that the images had in training."""
    cache = FeatureCache.open(made / "f.h5")
    known = dict(zip(map(bytes, cache.rows.digests), cache.paths, strict=True))
    found = []
    for row in rows:
        assert row["status"] == "ok", row
        trained_as = known[hashlib.sha256((folder / row["path"]).read_bytes()).digest()]
        assert row["label"] == trained_as.split("/")[0], row
        found.append(trained_as)
    assert sorted(found) == sorted(cache.paths)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "stdout"])
def test_predictions_come_back(made: Path, tmp_path: Path, warm: Program, kind: str) -> None:
    """From names typed in their own folder, so that rows begin with them; and from the cache."""
    output = tmp_path / f"out.{kind}"
    options = [] if kind == "stdout" else ["-o", output, "--overwrite"]
    typed = warm.check("predict", *options, made / "m", "--", *NAMES, before=functools.partial(os.chdir, made / "flat"))
    if kind == "stdout":
        assert_harmless(typed.err, 4)
        rows = [unescape(row["path"]) for row in csv.DictReader(io.StringIO(typed.out, newline=""))]
        assert rows == [os.fsencode(name).decode("utf-8", "replace") for name in NAMES]
        return
    assert_harmless(typed.err + typed.out, 4)
    rows = read_rows(output.read_bytes(), kind)
    assert [row["path"] for row in rows] == NAMES
    check_rows(rows, made / "flat", made)
    cached = warm.check("predict", *options, made / "m", made / "f.h5")
    assert_harmless(cached.err + cached.out, 2)
    rows = read_rows(output.read_bytes(), kind)
    assert [row["path"] for row in rows] == list(FeatureCache.open(made / "f.h5").paths)
    check_rows(rows, made / "classes", made)
    warm.check("predict", *options, made / "m", made / "classes")
    check_rows(read_rows(output.read_bytes(), kind), made / "classes", made)


def test_every_class_has_its_column(made: Path, tmp_path: Path, warm: Program) -> None:
    warm.check("predict", made / "m", made / "f.h5", "-o", tmp_path / "out.csv", "--probs", "--top-k", 4)
    text = (tmp_path / "out.csv").read_bytes().decode("utf-8", "surrogateescape")
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    classes = FeatureCache.open(made / "f.h5").classes
    assert header[-4:] == [f"prob:{name}" for name in classes]
    for row in rows:
        named = {unescape(row[1]): row[2], **{unescape(row[k]): row[k + 1] for k in (5, 7, 9)}}
        assert named == dict(zip(classes, row[-4:], strict=True))


def test_what_a_terminal_sees(made: Path, tmp_path: Path, warm: Program) -> None:
    """Facts, scores, errors and warnings about such names, and commands whose own files have them."""
    hostile = tmp_path / "\x1b[31mred\nline\u202e"
    hostile.mkdir()
    (hostile / "broken\n\x1b.jpg").write_text("no image")
    (made / "f.h5").rename(hostile / "f\n\x1b.h5")
    try:
        for command, lines in (
            (("info", hostile / "f\n\x1b.h5"), None),
            (("info", made / "m"), None),
            (("verify", hostile / "f\n\x1b.h5"), 1),
            (("evaluate", made / "m", made / "classes"), None),
            (("fit-head", hostile / "f\n\x1b.h5", "-o", hostile / "m", "--C", "1", "--folds", "0"), None),
            (("extract", made / "classes", "-o", hostile / "f\n\x1b.h5", *TINY_FLAGS), 13),
            (("predict", made / "m", hostile / "f\n\x1b.h5", "-o", hostile / "\x07.csv"), 2),
        ):
            done = warm.check(*command)
            assert_harmless(done.err + done.out, lines)
    finally:
        (hostile / "f\n\x1b.h5").rename(made / "f.h5")
    for command, code in (
        (("predict", made / "m", MISSING), 1),
        (("predict", made / "m", hostile / "broken\n\x1b.jpg", "-o", hostile / "out.csv"), 1),
        (("predict", made / "m", made / "flat", "-o", f"{MISSING}.txt"), 2),
        (("extract", hostile, "-o", tmp_path / "g.h5", *TINY_FLAGS), 1),
        (("extract", MISSING, "-o", tmp_path / "g.h5"), 1),
        (("extract", hostile, "-o", f"{hostile}/{MISSING}/g.h5"), 1),
        (("extract", made / "flat", "-o", tmp_path / "g.h5", "--backbone", MISSING), 1),
        (("extract", made / "flat", "-o", tmp_path / "g.h5", "--backbone", "resnet18", "--weights", MISSING), 1),
        (("info", MISSING), 1),
        (("verify", hostile / "broken\n\x1b.jpg"), 1),
        (("fit-head", MISSING, "-o", hostile / "m"), 1),
        (("backbones", MISSING), 0),
        (("predict", made / "m", "-\x1b[31m\n.jpg"), 2),  # as `predict m *` types it
        (("extract", made / "flat", "-o", tmp_path / "g.h5", f"--max-bad={MISSING}"), 2),
        ((MISSING,), 2),
    ):
        done = warm.run(*command)
        assert done.code == code, (command, done)
        assert_harmless(done.err, None if code == 2 else done.err.count("\n"))
        if code == 1:
            assert done.err.splitlines()[-1].startswith("error: "), done.err
            assert not [line for line in done.err.splitlines() if line.startswith(("there", "line"))], done.err


def test_a_csv_that_lists_such_names(made: Path, warm: Program, tmp_path: Path) -> None:
    """Names and labels in a list, quoted as CSV quotes them; blanks around a label do not count, those of a path do."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("path", "label"), *((name, class_of(name)) for name in NAMES)])
    (made / "flat" / "list.csv").write_bytes(table.getvalue().encode("utf-8", "surrogateescape"))
    warm.check("extract", made / "flat" / "list.csv", "-o", tmp_path / "f.h5", *TINY_FLAGS, "--reuse", made / "f.h5")
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert list(cache.paths) == NAMES
    assert [cache.classes[label] for label in cache.y] == [class_of(name) for name in NAMES]
