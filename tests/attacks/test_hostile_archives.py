"""Archives that somebody sent: links, paths that lead out, bombs, lies about sizes and names, damage at any byte.

In: an archive with intact images among what is not. Out: the intact ones, byte for byte; a reason for each of the others; nothing
written, nothing else opened, and never the bytes of one under the name of another.
"""

import contextlib
import io
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import Bomb, watched
from packing import FORMS, parquet, tar, zipped

from featcache.errors import FeatcacheError, RefusedImage
from featcache.images.archives import look_through
from featcache.images.read import Paths, read_image
from featcache.images.source import list_images

GOOD = {f"good/{k}.jpg": b"\xff\xd8\xff\xe0" + bytes([k]) * (300 * k + 1) for k in range(4)}


def found(archive: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """name -> bytes of what can be read, name -> reason of what is refused, when looked through or when read."""
    through = look_through(archive)
    refused = dict(through.refused)
    names = tuple(member.name for member in through.members if not member.name.endswith("/"))
    contents = {}
    for read in (read_image(Paths(archive, names), k, bytes) for k in range(len(names))):
        if read.value is None:
            refused[names[read.position]] = read.reason
        else:
            contents[names[read.position]] = read.value
    return contents, refused


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


EVIL_MEMBERS = {
    "symbolic link": (member("bad.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), "a link, which is not read"),
    "link to a good one": (member("bad.jpg", tarfile.SYMTYPE, linkname="good/0.jpg"), "a link, which is not read"),
    "hard link": (member("bad.jpg", tarfile.LNKTYPE, linkname="good/0.jpg"), "a hard link, which"),
    "device": (member("bad.jpg", tarfile.CHRTYPE, devmajor=1, devminor=5), "a device, which"),
    "pipe": (member("bad.jpg", tarfile.FIFOTYPE), "a pipe, which"),
    "traversal": (member("../bad.jpg"), "its path leads out of the archive"),
    "traversal inside": (member("a/../../bad.jpg"), "its path leads out of the archive"),
    "traversal that stays": (member("a/../bad.jpg"), "its path leads out of the archive"),
    "traversal of Windows": (member("a\\..\\..\\bad.jpg"), "its path leads out of the archive"),
    "absolute": (member("/etc/bad.jpg"), "its path leads out of the archive"),
    "drive": (member("C:/bad.jpg"), "its path leads out of the archive"),
    "share": (member("\\\\server\\bad.jpg"), "its path leads out of the archive"),
    "long name": (member("x" * 5000 + ".jpg"), "its name has 5004 bytes, at most 4096 are read"),
    "sparse": (member("bad.jpg", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": str(2**50)}), "a sparse file"),
    "of a kind that nobody knows": (member("bad.jpg", b"Q"), "of an unknown kind"),
    "no name": (member("."), "has no name"),
}  # fmt: skip


@pytest.mark.parametrize("case", EVIL_MEMBERS)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_of_tars(tmp_path: Path, case: str, mode: str) -> None:
    info, reason = EVIL_MEMBERS[case]
    path = tmp_path / "x.tar"
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for place, (name, content) in enumerate(GOOD.items()):
            if place == 2:
                archive.addfile(info)
            archive.addfile(member(name, size=len(content)), io.BytesIO(content))
    before = sorted(os.listdir(tmp_path))
    with watched() as seen:
        contents, refused = found(path)
    assert contents == GOOD
    assert len(refused) == 1 and next(iter(refused.values())).startswith(reason), refused
    assert sorted(os.listdir(tmp_path)) == before
    assert {line for line in seen if str(path) not in line and line.startswith("open /")} == set()


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header as it is not written by anybody decent."""
    head = name.ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"0" * 11 + b"\0" + b" " * 8 + kind
    head = head.ljust(257, b"\0") + b"ustar\0" + b"00"
    head = head.ljust(512, b"\0")
    return head[:148] + f"{sum(head):06o}\0 ".encode() + head[156:]


RAW = {
    "larger than the archive": (header(b"bad.jpg", b"77777777777"), "cut off; nothing is read from byte"),
    "base 256": (header(b"bad.jpg", b"\x80" + b"\xff" * 11), "cut off; nothing is read from byte"),
    "negative": (header(b"bad.jpg", b"\xff" * 12), "damaged: a header has a number that is none"),
    "no number": (header(b"bad.jpg", b"12x"), "damaged: a header has a number that is none"),
    "endless long name": (header(b"L", b"77777777777", b"L"), "damaged: a header of 8589934591 bytes"),
    "endless pax": (header(b"x", b"77777777777", b"x"), "damaged: a header of 8589934591 bytes"),
    "pax that is none": (header(b"x", b"20", b"x") + b"99 path=x\n".ljust(512, b"\0"), "damaged: its pax records"),
    "pax of no length": (header(b"x", b"20", b"x") + b"0 path=x\n".ljust(512, b"\0"), "damaged: its pax records"),
    "pax of a size": (header(b"x", b"20", b"x") + b"13 size=-50\n".ljust(512, b"\0"), "damaged: its pax records"),
    "one name for all": (header(b"x", b"20", b"g") + b"16 path=all.jpg\n".ljust(512, b"\0"), "damaged: one name or size"),
    "sparse that goes on for ever": (header(b"bad.jpg", b"0", b"S")[:482] + b"\1" + bytes(29), "damaged: a header has another checksum"),
    "no header": (b"\x01" * 512, "damaged: a header has"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_headers_of_tars(tmp_path: Path, case: str) -> None:
    """What lies before is read; from there on nothing is trusted."""
    raw, reason = RAW[case]
    path = tar(tmp_path / "x.tar", GOOD)
    end = sum(512 + -(-len(content) // 512) * 512 for content in GOOD.values())
    path.write_bytes(path.read_bytes()[:end] + raw + bytes(1024))
    contents, refused = found(path)
    assert contents == GOOD and [*refused] == [""] and refused[""].startswith(reason), refused
    assert refused[""].endswith(f"nothing is read from byte {end} on")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(header(b"caf\xe9.jpg", b"3") + b"abc".ljust(512, b"\0") + bytes(1024))
    assert found(path) == ({"caf\udce9.jpg": b"abc"}, {})


@pytest.mark.parametrize("form", FORMS)
def test_names_that_come_twice(tmp_path: Path, form: str) -> None:
    """Programs differ in which they take: so neither is."""
    path = tmp_path / form
    if "tar" in form:
        with tarfile.open(path, "w:gz" if form.endswith("gz") else "w") as archive:
            for name, content in [*GOOD.items(), ("./good//1.jpg", b"other"), ("dir/", b""), ("dir/", b"")]:
                kind = tarfile.DIRTYPE if name == "dir/" else tarfile.REGTYPE
                archive.addfile(member(name, kind, size=len(content)), io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w") as archive, contextlib.suppress(UserWarning):
            for name, content in [*GOOD.items(), ("./good//1.jpg", b"other"), ("dir/", b"")]:
                archive.writestr(name, content)
    contents, refused = found(path)
    assert contents == {name: content for name, content in GOOD.items() if name != "good/1.jpg"}
    assert refused == {"good/1.jpg": "2 files of the archive have this name"}


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_that_is_cut_off(tmp_path: Path, form: str) -> None:
    """What lies before the cut is read, of a zip nothing, as its directory is at its end."""
    whole = FORMS[form](tmp_path / form, GOOD).read_bytes()
    for cut in [*range(0, len(whole), max(len(whole) // 40, 1)), len(whole) - 1]:
        (tmp_path / form).write_bytes(whole[:cut])
        try:
            contents, refused = found(tmp_path / form)
        except RefusedImage as reason:
            assert "cut off" in str(reason), reason
            continue
        assert contents.items() <= GOOD.items()
        if not form.endswith("gz") and whole[cut:].strip(b"\0"):
            assert "cut off" in refused[""] or "damaged" in refused[""]
        assert "" in refused or contents == GOOD
    (tmp_path / "a.tar").write_bytes(tar(tmp_path / "b.tar", GOOD).read_bytes()[: 512 * 5 + 100])
    contents, refused = found(tmp_path / "a.tar")
    assert [*contents] == ["good/0.jpg", "good/1.jpg"] and refused == {"": "cut off; nothing is read from byte 2048 on"}
    images = list_images(tmp_path / "a.tar")
    assert images.paths == ("good/0.jpg", "good/1.jpg")
    assert images.refused == (("a.tar", "cut off; nothing is read from byte 2048 on"),) and images.refused_at == (2,)


def test_two_tars_in_one_file(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", GOOD)
    path.write_bytes(2 * path.read_bytes())
    assert "as if two archives were joined" in found(path)[1][""]


def patched(path: Path, at: bytes, offset: int, value: bytes, *, last: bool = False) -> Path:
    """A zip in which bytes behind a signature are others."""
    data = bytearray(path.read_bytes())
    place = (data.rfind(at) if last else data.find(at)) + offset
    data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


def with_link(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in GOOD.items():
            archive.writestr(name, content)
        link = zipfile.ZipInfo("bad.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return path


def plus(path: Path, name: str = "bad.jpg", content: bytes = b"bad", method: int = zipfile.ZIP_STORED) -> Path:
    zipped(path, GOOD)
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr(name, content)
    return path


C, L = b"PK\1\2", b"PK\3\4"
EVIL_ZIPS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "link": (with_link, "a link, which is not read"),
    "traversal": (lambda path: plus(path, "../bad.jpg"), "its path leads out of the archive"),
    "absolute": (lambda path: plus(path, "/bad.jpg"), "its path leads out of the archive"),
    "encrypted": (lambda path: patched(plus(path), C, 8, b"\1\0", last=True), "encrypted; unpack"),
    "packed otherwise": (lambda path: plus(path, method=zipfile.ZIP_LZMA), "packed by method 14 of zip"),
    "bomb": (lambda path: plus(path, content=bytes(2**26 + 2**20), method=zipfile.ZIP_DEFLATED), "a decompression bomb: "),
    "claims too much": (
        lambda path: patched(plus(path, content=b"x" * 9999, method=zipfile.ZIP_DEFLATED), C, 24, struct.pack("<L", 2**31), last=True),
        "too large: 2147483648 bytes",
    ),
    "claims more": (
        lambda path: patched(plus(path, content=b"x" * 9999, method=zipfile.ZIP_DEFLATED), C, 24, struct.pack("<L", 10_000), last=True),
        "damaged: 9999 bytes, the zip says 10000",
    ),
    "claims less": (
        lambda path: patched(plus(path, content=b"x" * 9999, method=zipfile.ZIP_DEFLATED), C, 24, struct.pack("<L", 99), last=True),
        "damaged: it is not of 99 bytes",
    ),
    "another checksum": (lambda path: patched(plus(path), C, 16, b"\0\0\0\0", last=True), "damaged: its checksum is another"),
    "another name where it lies": (lambda path: patched(plus(path), L, 30, b"god.jpg", last=True), "damaged: the zip calls it otherwise"),
    "is where nothing is": (lambda path: patched(plus(path), C, 42, struct.pack("<L", 2), last=True), "lies upon another file"),
    "is behind the end": (lambda path: patched(plus(path), C, 42, struct.pack("<L", 2**30), last=True), "damaged: it does not lie in"),
}  # fmt: skip


@pytest.mark.parametrize("case", EVIL_ZIPS)
def test_files_of_zips(tmp_path: Path, case: str) -> None:
    make, reason = EVIL_ZIPS[case]
    path = make(tmp_path / "x.zip")
    tracemalloc.start()
    contents, refused = found(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    assert next(iter(refused.values())).startswith(reason), refused
    assert contents.items() <= GOOD.items() and len(contents) + len(refused) == 5
    assert len(contents) == (3 if case == "is where nothing is" else 4)  # what it lies upon is not trusted either


def test_files_that_lie_upon_each_other(tmp_path: Path) -> None:
    """The better zip bomb: a thousand entries of one file."""
    path = zipped(tmp_path / "x.zip", {"one.bin": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    start, end = data.find(C), data.rfind(b"PK\5\6")
    entries = b"".join(data[start:end].replace(b"one.bin", f"{k:07}".encode()) for k in range(1000))
    count, length = struct.pack("<2H", 1000, 1000), struct.pack("<L", len(entries))
    path.write_bytes(data[:start] + entries + data[end : end + 8] + count + length + data[end + 16 :])
    contents, refused = found(path)
    assert contents == {} and {*refused.values()} == {"lies upon another file of the zip"} and len(refused) == 1000


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (4, b"\1\0", "a zip of several parts; join them"),
        (8, b"\xff\xff\xff\xff", "the directory of the zip cannot be as long"),
        (12, b"\xff\xff\xff\x7f", "the directory of the zip cannot be as long"),
        (16, b"\xff\xff\xff\x7f", "the directory of the zip cannot be as long"),
        (20, b"\1\0", "the zip has no directory at its end"),
    ],
)
def test_directories_of_zips(tmp_path: Path, offset: int, value: bytes, reason: str) -> None:
    path = patched(zipped(tmp_path / "x.zip", GOOD), b"PK\5\6", offset, value)
    with pytest.raises(RefusedImage, match=reason):
        look_through(path)


def test_fewer_entries_than_a_zip_says(tmp_path: Path) -> None:
    path = patched(zipped(tmp_path / "x.zip", GOOD), b"PK\5\6", 8, b"\3\0\3\0")
    contents, refused = found(path)
    assert contents == GOOD and refused == {"": "damaged: 4 members in its directory can be read, it says 3"}


def test_gzip_bombs(tmp_path: Path) -> None:
    """10 GB of headers, or of one image, in 10 MB: given up after 64 MB, in the memory of a few blocks."""
    packer, path = zlib.compressobj(9, wbits=31), tmp_path / "x.tar.gz"
    with path.open("wb") as file:
        file.write(packer.compress(header(b"zeros.jpg", b"77777777777")))
        for _ in range(70):
            file.write(packer.compress(bytes(2**20)))
        file.write(packer.flush())
    tracemalloc.start()
    contents, refused = found(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents == {} and refused[""].startswith("a decompression bomb: ") and peak < 60e6


def test_archives_in_archives_are_not_opened(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"cats/9.jpg": GOOD["good/0.jpg"]})
    files = {"cats/1.jpg": GOOD["good/1.jpg"], "dogs/1.jpg": GOOD["good/2.jpg"], "cats/inner.zip": inner.read_bytes()}
    path = zipped(tmp_path / "x.zip", files)
    assert list_images(path).paths == ("cats/1.jpg", "dogs/1.jpg")
    with pytest.raises(RefusedImage, match="not in the archive"):
        read = read_image(Paths(None, (str(path / "cats/inner.zip/cats/9.jpg"),)), 0, bytes)
        raise RefusedImage(read.reason)


def test_paths_that_a_table_names_stay_in_the_archive(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(GOOD["good/0.jpg"])
    (tmp_path / "in").mkdir()
    path = zipped(tmp_path / "in" / "x.zip", GOOD)
    (tmp_path / "in" / "list.csv").write_text(
        "path\nx.zip/good/1.jpg\nx.zip/../../secret.jpg\nx.zip/../x.zip/good/2.jpg\n"
    )
    images = list_images(path.with_name("list.csv"))
    assert images.paths == ("x.zip/good/1.jpg", "x.zip/good/2.jpg")
    assert [refusal.reason for refusal in images.refused] == ["lies outside of the table's folder or --root"]
    assert read_image(Paths(path, ("../../secret.jpg",)), 0, bytes).reason == "its path leads out of the folder"


def flips(data: bytes, count: int, seed: str) -> Any:
    """Copies with one to three bytes changed, and where."""
    rng = random.Random(seed)
    for _ in range(count):
        places = sorted({rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 3)))})
        damaged = bytearray(data)
        for place in places:
            damaged[place] ^= rng.randrange(1, 256)
        yield bytes(damaged), places


@pytest.mark.parametrize("form", FORMS)
def test_damage_at_any_byte(tmp_path: Path, form: str) -> None:
    """Every file that can be read has its own bytes; in a plain tar, which has no checksum of them, but for those that were hit."""
    path = FORMS[form](tmp_path / form, GOOD)
    whole, started, read = path.read_bytes(), time.process_time(), 0
    for damaged, places in flips(whole, 150, form):
        path.write_bytes(damaged)
        os.utime(path, ns=(0, read))  # another version
        try:
            contents, refused = found(path)
        except RefusedImage:
            continue
        read += len(contents)
        if form == "a.tar.gz" and refused.get("", "").startswith("cut off"):  # as it then seems: before its checksum
            assert contents.keys() <= GOOD.keys()
            continue
        for name, content in contents.items():
            if form == "a.tar" and content != GOOD[name]:
                at = whole.find(GOOD[name])
                assert {at + k for k, pair in enumerate(zip(content, GOOD[name], strict=True)) if len({*pair}) > 1} <= {
                    *places
                }
            else:
                assert content == GOOD[name]
    assert read > 50 and time.process_time() - started < 30


PARQUET_FUZZ = """
import os, random, sys
from pathlib import Path
from featcache.errors import FeatcacheError, RefusedImage
from featcache.images.source import list_images
from featcache.images.read import read_images
path = Path(sys.argv[1]); whole = path.read_bytes(); rng = random.Random(0); read = 0
for turn in range(200):
    damaged = bytearray(whole)
    damaged[rng.randrange(len(whole)) if turn % 2 else -1 - rng.randrange(len(whole) // 3)] ^= rng.randrange(1, 256)
    path.write_bytes(damaged); os.utime(path, ns=(0, turn))
    try:
        images = list_images(path)
    except FeatcacheError:
        continue
    read += sum(not each.reason for each in read_images(images, range(len(images)), len))
print(read)
"""


@pytest.mark.slow
def test_damage_of_parquet(tmp_path: Path) -> None:
    """pyarrow neither crashes nor hangs: all ends in rows, or in reasons."""
    path = parquet(tmp_path / "x.parquet", [*GOOD.values()] * 5, ("a", "b"), label=[0, 1] * 10)
    done = subprocess.run([sys.executable, "-c", PARQUET_FUZZ, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 100, done.stderr[-2000:]


def test_parquet_runs_nothing_and_stays_small(tmp_path: Path) -> None:
    """Pickles in its metadata are left alone; one large row group is read in blocks; nulls are refused."""
    import pickle

    import pyarrow as pa
    import pyarrow.parquet as pq

    trace = tmp_path / "trace"
    evil = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Bomb(trace))}
    images = [None, b"", *(os.urandom(60_000) for _ in range(298))]
    fields = [pa.field("image", pa.binary()), pa.field("label", pa.int64(), metadata=evil)]
    table = pa.table(
        {"image": images, "label": [0] * 300},
        pa.schema(fields, {"pandas": "[" * 100_000, "huggingface": "{" * 100_000}),
    )
    pq.write_table(table, tmp_path / "x.parquet", compression="none")
    del table
    listed = list_images(tmp_path / "x.parquet")
    files, before = Paths(tmp_path / "x.parquet", listed.paths), pa.total_allocated_bytes()
    peak = 0
    for row in range(300):
        read = read_image(files, row, bytes)
        assert read.value == (images[row] or None) and bool(read.reason) == (row < 2)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert read_image(files, 5, bytes).value == images[5]  # back to the start of its group
    assert peak < 60e6 and not trace.exists()  # twice the page, which is all of it
    for name in ("300", "-1", "01", "²", "1/2", "x"):
        assert "not in the archive" in read_image(Paths(tmp_path / "x.parquet", (name,)), 0, bytes).reason


def test_labels_beyond_reason(tmp_path: Path) -> None:
    deep = {
        "0.jpg": GOOD["good/0.jpg"],
        "0.json": b'{"a":' * 10_000,
        "1.jpg": GOOD["good/1.jpg"],
        "1.cls": b"x" * 10**6,
    }
    assert list_images(tar(tmp_path / "x.tar", deep)).classes == ()
    with pytest.raises(FeatcacheError, match="names 1"):
        list_images(
            tar(tmp_path / "y.tar", {"0.jpg": b"\xff\xd8\xff", "0.cls": b"99999999999999999999", "classes.txt": b"a"})
        )
