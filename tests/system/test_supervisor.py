"""Decoders that really crash: the worker dies of a segmentation fault, the run goes on without that image."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, make_photos

from featcache.cache.cache import FeatureCache
from featcache.errors import RefusedImage
from featcache.images.decode import decode
from featcache.system import supervisor as crashes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

# Read by every Python that starts: a decoder that reads address 0 when it meets a certain image.
BROKEN = """
import ctypes, io
import PIL.Image
opened = PIL.Image.open
def open(file, *arguments, **options):
    if b"CRASH ME" in file.getvalue():
        ctypes.string_at(0)
    return opened(file, *arguments, **options)
PIL.Image.open = open
"""


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment in which some images crash the decoder."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BROKEN)
    package = str(Path(crashes.__file__).parents[2])
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{package}"}


def featcache(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "featcache", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def make_deadly(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"CRASH ME")  # behind the image's end, where other decoders do not look


def test_an_image_that_crashes_its_decoder_is_refused_and_the_run_goes_on(
    tmp_path: Path, broken: dict[str, str]
) -> None:
    photos = make_photos(tmp_path / "photos")
    deadly = ["blue/03.jpg", "red/05.jpg"]
    for name in deadly:
        make_deadly(photos / name)
    cache = tmp_path / "f.h5"
    done = featcache(broken, "extract", photos, "-o", cache, *TINY_FLAGS, "--max-bad", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["images"], report["refused"]) == (18, 2)
    assert "a decoder crashed (SIGSEGV); going on without the image that did it" in done.stderr
    reason = "its decoder crashed (SIGSEGV)"
    assert FeatureCache.open(cache).refused == tuple((name, reason) for name in deadly)

    again = featcache(broken, "extract", photos, "-o", cache, *TINY_FLAGS, "--max-bad", "1", "--json")
    report = json.loads(again.stdout.splitlines()[-1])
    assert (report["embedded"], report["reused"], report["refused"]) == (0, 16, 2)
    assert "crashed" not in again.stderr  # known to be dangerous: tried apart from the start


def test_rows_already_printed_are_not_printed_again(tmp_path: Path, broken: dict[str, str]) -> None:
    photos = make_photos(tmp_path / "photos")
    assert featcache(broken, "extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS).returncode == 0
    assert featcache(broken, "fit-head", tmp_path / "f.h5", "-o", tmp_path / "m").returncode == 0
    make_deadly(photos / "red" / "05.jpg")
    printed = featcache(broken, "predict", tmp_path / "m", photos)
    assert printed.returncode == 128 + signal.SIGSEGV
    assert "with -o FILE the same command goes on" in printed.stderr
    written = featcache(broken, "predict", tmp_path / "m", photos, "-o", tmp_path / "out.csv")
    assert written.returncode == 0
    rows = (tmp_path / "out.csv").read_text().splitlines()
    assert len(rows) == 19
    assert rows[-1].endswith("red/05.jpg,,,refused,its decoder crashed (SIGSEGV)")


CRASHES = """
import ctypes, os, sys
from featcache.system import supervisor as crashes
code = crashes.supervised()
if code is not None:
    print(code)
    sys.exit()
os.write(1, b"worker\\n")
for image in {images}:
    with crashes.decoding(image):
        pass
{then}
"""


@pytest.mark.parametrize(
    ("images", "then", "workers", "code"),
    [
        ([], "sys.exit(3)", 1, 3),
        ([b"a"], "ctypes.string_at(0)", 1, 128 + signal.SIGSEGV),  # nothing was being decoded
        ([], "crashes._notes.write(7); ctypes.string_at(0)", 2, 128 + signal.SIGSEGV),  # twice, and nothing convicted
        ([], "crashes._notes.write(7); crashes.never_again(); os.abort()", 1, 128 + signal.SIGABRT),
        ([], "crashes._notes.write(7); os.kill(os.getpid(), 9)", 1, 137),  # killed: somebody wanted that
        ([], "os.kill(os.getppid(), 15); import time; time.sleep(60)", 1, 143),  # passed on
    ],
)
def test_what_is_worth_another_worker(images: list[bytes], then: str, workers: int, code: int) -> None:
    script = CRASHES.format(images=images, then=then)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["worker"] * workers + [str(code)]


def test_no_worker_outlives_the_process_that_waits(tmp_path: Path) -> None:
    script = CRASHES.format(images=[], then="import time; print(os.getpid(), flush=True); time.sleep(600)")
    waiting = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout
    lines = [waiting.stdout.readline() for _ in range(2)]
    worker = os.pidfd_open(int(lines[1]))
    waiting.kill()
    waiting.wait()
    waiting.stdout.close()
    ended, _, _ = select.select([worker], [], [], 30)
    os.close(worker)
    assert ended, "the worker is still there"


def test_a_suspect_is_tried_in_a_process_of_its_own_and_cleared(tmp_path: Path, monkeypatch) -> None:
    photo = (make_photos(tmp_path, each=1) / "red" / "00.jpg").read_bytes()
    notes = crashes._Notes()
    notes.suspects = frozenset([crashes._key(photo)])
    monkeypatch.setattr(crashes, "_notes", notes)
    tried: list[bytes] = []
    original = crashes.try_apart
    monkeypatch.setattr(crashes, "try_apart", lambda data, **options: (tried.append(data), original(data, **options)))
    assert decode(photo).size == (61, 47)
    assert tried == [photo]
    assert notes.convicted == 0
    assert notes.take() == frozenset()


def test_a_decoder_without_end_is_refused(tmp_path: Path, monkeypatch) -> None:
    photo = (make_photos(tmp_path, each=1) / "red" / "00.jpg").read_bytes()
    notes = crashes._Notes()
    notes.suspects = frozenset([crashes._key(photo)])
    monkeypatch.setattr(crashes, "_notes", notes)
    monkeypatch.setattr(crashes, "_PATIENCE", 0.01)
    with pytest.raises(RefusedImage, match="comes to no end, 0.01 s were not enough"):
        decode(photo)
    assert notes.convicted == 1
