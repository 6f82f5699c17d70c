"""Files are read in the order asked for, not far ahead, each with the digest of its bytes or the reason why it has none."""

import hashlib
import os
import sys
import threading
from pathlib import Path

import pytest
from conftest import make_photos, write_photo

from featcache.errors import RefusedImage
from featcache.images.read import Paths, ReadImage, read_file, read_images, refusals

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file kinds")


def ends(data: bytes) -> bytes:
    """A conversion that refuses some."""
    if not data:
        raise RefusedImage("empty file")
    return data[-3:]


@pytest.fixture
def files(tmp_path: Path) -> Paths:
    """40 files with old time stamps; every fifth is empty, every seventh missing."""
    names = tuple(f"{number:02d}" for number in range(40))
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"" if number % 5 == 0 else name.encode() * number)
        os.utime(tmp_path / name, ns=(0, 10**18 + number))
        if number % 7 == 0:
            (tmp_path / name).unlink()
    return Paths(tmp_path, names)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_as_a_plain_loop(files: Paths, workers: int) -> None:
    indices = [*range(39, -1, -1), 3, 3]
    expected = []
    for index in indices:
        path = files.root / files.paths[index]
        if not path.exists():
            expected.append(ReadImage(index, None, "cannot be read: No such file or directory", b"", -1, -1))
            continue
        data = path.read_bytes()
        value, reason = (data[-3:], "") if data else (None, "empty file")
        expected.append(ReadImage(index, value, reason, hashlib.sha256(data).digest(), len(data), 10**18 + index))
    assert list(read_images(files, indices, ends, workers=workers)) == expected


@pytest.mark.parametrize("workers", [1, 3])
def test_never_far_ahead_of_who_takes_the_images(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a").write_bytes(b"x")
    started: list[int] = []

    def indices() -> object:
        for number in range(10_000):
            started.append(number)
            yield 0

    images = read_images(Paths(tmp_path, ("a",)), indices(), ends, workers=workers)  # type: ignore[arg-type]
    for taken in range(1, 200):
        next(images)
        assert len(started) <= taken + 16 * workers
    images.close()
    assert not [thread for thread in threading.enumerate() if "featcache-read" in thread.name]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "too large for the memory at hand"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "too large for the memory at hand"),
        (RuntimeError("no\nkernel"), "damaged: no kernel"),
        (OSError(), "damaged: OSError"),
    ],
)
def test_whatever_converting_an_image_ends_in_is_a_refusal(files: Paths, error: Exception, reason: str) -> None:
    def convert(data: bytes) -> bytes:
        if data.startswith(b"11"):
            raise error
        return data

    assert [read.reason for read in read_images(files, [11, 12], convert)] == [reason, ""]


def test_refusals_are_those_that_cannot_be_decoded(tmp_path: Path) -> None:
    photos = make_photos(tmp_path, each=1)
    (photos / "red" / "00.jpg").write_text("no image")
    files = Paths(photos, ("blue/00.jpg", "red/00.jpg", "gone.jpg"))
    reasons = {1: "not an image, or of an unsupported format", 2: "cannot be read: No such file or directory"}
    assert refusals(files, range(3)) == refusals(files, range(3), apart={0, 1}) == reasons


@posix
def test_reading_never_hangs_and_says_why(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reasons = {"pipe": "not a regular file", "gone": "cannot be read", "": "not a regular|cannot be read"}
    for name, reason in reasons.items():
        with pytest.raises(RefusedImage, match=reason):
            read_file(tmp_path / name)


def test_a_fresh_time_stamp_is_not_trusted(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.png", (1, 2, 3), 1)
    assert read_file(path)[2] == -1
    os.utime(path, ns=(0, 1_500_000_000_000_000_000))
    assert read_file(path)[1:] == (path.stat().st_size, 1_500_000_000_000_000_000)
