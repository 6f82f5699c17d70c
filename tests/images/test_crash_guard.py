"""Decoders that really crash: the worker dies of a segmentation fault, the run goes on without that image."""

import functools
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY_FLAGS, make_photos, write_photo
from faults import Program

import featcache
from featcache.cache.cache import FeatureCache
from featcache.errors import RefusedImage
from featcache.images.decode import FATAL, decode, decode_pixels, try_apart
from featcache.system import supervisor
from featcache.system.supervisor import Notes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

# Read by every Python that starts: a decoder that reads address 0 when it meets a certain image; and a list of the starts.
BROKEN = """
import ctypes, io, sys
from pathlib import Path
import PIL.Image
here = Path(__file__).parent
with (here / "starts").open("a") as file:
    print(sys.orig_argv, file=file)
opened, bytes_of = PIL.Image.open, PIL.Image.Image.tobytes
def open(file, *arguments, **options):
    if b"CRASH ME" in file.getvalue():
        ctypes.string_at(0)
    if b"CRASH ONCE" in file.getvalue() and not (here / "crashed").exists():
        (here / "crashed").touch()
        ctypes.string_at(0)
    return opened(file, *arguments, **options)
def tobytes(image, *arguments):
    if image.size == (13, 17):
        ctypes.string_at(0)
    return bytes_of(image, *arguments)
PIL.Image.open, PIL.Image.Image.tobytes = open, tobytes
"""
# Decodes files under supervision without loading torch, and prints what became of each.
DECODE = """
import sys
from pathlib import Path
from featcache.images.decode import decode_pixels
from featcache.errors import RefusedImage
from featcache.system.supervisor import supervised
if (code := supervised()) is not None:
    sys.exit(code)
for path in sys.argv[1:]:
    try:
        print(decode_pixels(Path(path).read_bytes()).shape)
    except RefusedImage as reason:
        print(reason)
"""
# The same of what is listed on stdin, as the command line reads it: once, for all workers.
DECODE_LISTED = DECODE.replace(
    "if (code",
    "from featcache.cli.app import _keep_stdin\nfrom featcache.images.source import list_images\n_keep_stdin(read=True)\nif (code",
    1,
).replace("in sys.argv[1:]", "in list_images('-').paths")


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment in which some images crash the decoder."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BROKEN)
    package = str(Path(featcache.__file__).parents[1])
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{package}"}


def break_here(environment: dict[str, str]) -> None:
    """This process, which has started already, and those that it starts find the broken decoder."""
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)  # which trials are given
    runpy.run_path(f"{sys.path[0]}/sitecustomize.py")
    # PyTorch is loaded here, but no thread is running, which is why a process that has loaded it is not split.
    supervisor.notes.__init__()  # type: ignore[misc]  # not what other children of that process have written
    vars(supervisor)["sys"] = SimpleNamespace(platform=sys.platform, modules={}, exit=sys.exit)


def python(
    environment: dict[str, str], *arguments: object, stdin: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300, input=stdin, cwd=cwd
    )


def mark(path: Path, text: bytes = b"CRASH ME") -> Path:
    """Behind the image's end, where other decoders do not look; a JPEG with a filled marker, so that Pillow reads its header."""
    data = path.read_bytes()
    filled = data[:2] + b"\xff" + data[2:] if data.startswith(b"\xff\xd8") else data
    path.write_bytes(filled + text)
    return path


def test_an_image_that_crashes_its_decoder_is_refused_and_the_run_goes_on(
    tmp_path: Path, broken: dict[str, str], warm: Program
) -> None:
    photos = make_photos(tmp_path / "photos")
    deadly = ["blue/03.jpg", "red/05.jpg"]
    for name in deadly:
        mark(photos / name)
    cache = tmp_path / "f.h5"
    command = ("extract", photos, "-o", cache, *TINY_FLAGS, "--max-bad", "1", "--json")
    done = warm.check(*command, before=functools.partial(break_here, broken))
    assert (done.result["images"], done.result["refused"]) == (18, 2)
    assert "a decoder crashed (SIGSEGV); going on without the image that did it" in done.err
    reason = "its decoder crashed (SIGSEGV)"
    assert FeatureCache.open(cache).refused == tuple((name, reason) for name in deadly)

    again = warm.check(*command, before=functools.partial(break_here, broken))
    assert [again.result[name] for name in ("embedded", "reused", "refused")] == [0, 16, 2]
    assert "crashed" not in again.err  # known to be dangerous: tried apart from the start


def test_the_program_is_split_before_pytorch_is_loaded(tmp_path: Path, broken: dict[str, str]) -> None:
    program = """
import sys, featcache.system.supervisor as supervisor
supervisor.supervised = lambda: 70 + ("torch" in sys.modules)
from featcache.cli.app import main
main()
"""
    assert python(broken, "-c", program, "extract", tmp_path, "-o", tmp_path / "f.h5").returncode == 70


@pytest.mark.slow
def test_rows_already_printed_are_not_printed_again(
    trained: Path, tmp_path: Path, broken: dict[str, str], warm: Program
) -> None:
    mark(trained / "photos" / "red" / "05.jpg")
    command, broken_here = ("predict", trained / "m", trained / "photos"), functools.partial(break_here, broken)
    printed = warm.run(*command, "--json", before=broken_here)
    assert printed.code == 128 + signal.SIGSEGV
    assert "with -o FILE the same command goes on" in printed.err
    assert printed.result["error"]["exit_code"] == printed.code
    warm.check(*command, "-o", tmp_path / "out.csv", before=broken_here)
    rows = (tmp_path / "out.csv").read_text().splitlines()
    assert len(rows) == 25
    assert rows[-3].endswith("red/05.jpg,,,refused,its decoder crashed (SIGSEGV)")


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_suspect_is_tried_once_and_cleared(tmp_path: Path, broken: dict[str, str], name: str) -> None:
    photo = mark(write_photo(tmp_path / name, (1, 2, 3), 1), b"CRASH ONCE")
    done = python(broken | {"FEATCACHE_DECODER": "pillow"}, "-c", DECODE, photo)
    assert (done.stdout, done.returncode) == ("(47, 61, 3)\n", 0), done.stderr
    assert "a decoder crashed (SIGSEGV)" in done.stderr
    assert len((tmp_path / "site" / "starts").read_text().splitlines()) == 2  # the program, and one trial


def test_pixels_are_guarded_until_they_are_there(tmp_path: Path, broken: dict[str, str]) -> None:
    """Also when the file is closed, and they are only copied."""
    deadly, good = (write_photo(tmp_path / f"{size}.png", (1, 2, 3), 1, size) for size in ((13, 17), (17, 13)))
    done = python(broken, "-c", DECODE, deadly, good)
    assert (done.stdout, done.returncode) == ("its decoder crashed (SIGSEGV)\n(13, 17, 3)\n", 0), done.stderr


def test_a_list_on_stdin_outlives_a_worker(tmp_path: Path, broken: dict[str, str]) -> None:
    write_photo(tmp_path / "a.png", (1, 2, 3), 1, (17, 13))
    mark(write_photo(tmp_path / "b.png", (1, 2, 3), 1))
    write_photo(tmp_path / "c.png", (1, 2, 3), 1, (19, 11))
    done = python(broken, "-c", DECODE_LISTED, "-", stdin="a.png\nb.png\nc.png\n", cwd=tmp_path)
    assert done.stderr.count("a decoder crashed (SIGSEGV); going on") == 1, done.stderr
    assert done.stdout.splitlines()[-3:] == ["(13, 17, 3)", "its decoder crashed (SIGSEGV)", "(11, 19, 3)"]


@pytest.fixture
def photo(tmp_path: Path) -> bytes:
    return write_photo(tmp_path / "photo.jpg", (1, 2, 3), 1).read_bytes()


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    monkeypatch.setattr("featcache.images.decode.notes", notes := Notes())
    return notes


def test_only_what_a_worker_crashed_on_is_tried_apart(
    photo: bytes, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[frozenset[int]] = []
    is_noted = functools.partial(frozenset, notes.shared.places)
    monkeypatch.setattr("featcache.images.decode._decode_fast", lambda *_: noted.append(is_noted() - {0}))
    decode_pixels(photo)
    notes.suspects = noted[0]
    decode_pixels(photo)  # tried apart, and cleared
    monkeypatch.setattr("featcache.images.decode._TRIAL", ("-c", "import os; os.abort()"))
    decode_pixels(photo + b"another one")
    assert ([len(keys) for keys in noted], notes.shared.crashed_images) == ([1, 1, 1], 0)
    for data, way in ((photo, decode_pixels), (photo + b"another one", functools.partial(decode, suspect=True))):
        with pytest.raises(RefusedImage, match=r"^its decoder crashed \(SIGABRT\)$"):
            way(data)
    assert (len(noted), notes.take(), notes.shared.crashed_images) == (3, frozenset(), 2)


def test_a_decoder_without_end_is_refused(photo: bytes, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.images.decode._TRIAL", ("-c", "import time; time.sleep(60)"))
    with pytest.raises(RefusedImage, match="^its decoder comes to no end, 0.5 s were not enough$") as refused:
        try_apart(photo, None, patience=0.5)
    assert str(refused.value).startswith(FATAL)
    assert notes.shared.crashed_images == 1


@pytest.mark.parametrize("name", ["JpegImageFile.load", "simplejpeg.decode_jpeg"])
def test_a_suspect_is_tried_by_every_decoder(
    photo: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Fine-tuning decodes by Pillow what extraction decodes faster."""
    program = f"""
import ctypes, simplejpeg
from PIL.JpegImagePlugin import JpegImageFile
original = {name}
def broken(image, *arguments, **options):
    size = image.size if hasattr(image, "size") else len(image)
    if size in ((61, 47), {len(photo)}):
        ctypes.string_at(0)
    return original(image, *arguments, **options)
{name} = broken
"""
    (tmp_path / "sitecustomize.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RefusedImage, match="SIGSEGV"):
        try_apart(photo, None)


def test_a_trial_imports_nothing_from_the_users_folder(
    photo: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "PIL", "featcache"):
        (tmp_path / f"{name}.py").write_text("import os; os.abort()")
    monkeypatch.chdir(tmp_path)
    try_apart(photo, None)


def test_a_trial_needs_no_torch() -> None:
    """Importing it would take seconds."""
    program = (
        "import sys, runpy; sys.argv[1:] = ['0']; runpy.run_module('featcache.images.decode', run_name='__main__')"
    )
    program += "; assert 'PIL' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], input=b"", check=True)
