"""Files inside of archives: the bytes that Python's own ``tarfile`` and ``zipfile`` give, whatever the order and the threads."""

import gzip
import hashlib
import io
import os
import random
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from conftest import TINY, make_photos
from hostile import watched
from packing import FORMS, SETTLED, parquet, read_folder, tar, zipped

from featcache.cache.cache import FeatureCache
from featcache.curation.split_folders import place_images
from featcache.errors import RefusedImage, StorageError
from featcache.extraction.extract import extract
from featcache.extraction.repair import repair
from featcache.images import gzipped
from featcache.images.archives import archive_in, look_through, read_member
from featcache.images.gzipped import GzipFile
from featcache.images.read import Paths, read_file, read_images
from featcache.images.source import ImageList, Source, list_images
from featcache.images.statistics import measure
from featcache.images.zip import zip_members
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.models.predict import predict

PNG = b"\x89PNG\r\n\x1a\n and so on"
ODD = {
    "a/" + 120 * "x" + ".jpg": b"a name of more than 100 bytes",
    "a/" * 150 + "deep.jpg": b"a path of more than 256",
    "ünïcödé/写真.jpg": b"not ASCII",
    "new\nline/q'uote.jpg": b"odd",
    "empty.jpg": b"",
    "large.bin": os.urandom(3_000_000),
    "./b//c/./d.jpg": b"a name with nothing in it",
}


def content(archive: Path, *, workers: int = 1) -> dict[str, bytes]:
    """name -> bytes, as read here."""
    names = tuple(member.name for member in look_through(archive).members if not member.name.endswith("/"))
    found = read_images(Paths(archive, names), range(len(names)), bytes, workers=workers)
    return {names[read.position]: read.value for read in found if read.value is not None}


@pytest.mark.parametrize("pax", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_as_tarfile_reads_them(tmp_path: Path, pax: int, mode: str) -> None:
    files = {
        name: data for name, data in ODD.items() if pax != tarfile.USTAR_FORMAT or (name.isascii() and len(name) < 99)
    }
    path = tar(tmp_path / "x.tar", files, mode, format=pax)
    with tarfile.open(path) as archive:
        expected = {os.path.normpath(each.name): archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]
    assert content(path) == expected
    assert len(expected) == len(files)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_as_zipfile_reads_them(tmp_path: Path, method: int) -> None:
    path = zipped(tmp_path / "x.zip", ODD, method)
    with zipfile.ZipFile(path) as archive:
        expected = {os.path.normpath(name): archive.read(name) for name in archive.namelist()}
    assert content(path) == expected
    behind = tmp_path / "behind.zip"
    behind.write_bytes(b"a program that unpacks itself" + path.read_bytes())
    with behind.open("rb") as file, zipfile.ZipFile(behind) as archive:
        here = [member.offset for member in zip_members(file, behind.stat().st_size)]  # type: ignore[union-attr]
        assert here == [each.header_offset for each in archive.infolist()]


def test_zips_beyond_32_bits(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(name.encode())
    data = bytearray((tmp_path / "x.zip").read_bytes())
    at, end = data.find(b"PK\1\2"), data.rfind(b"PK\5\6")  # the end record as one that does not fit
    count, length = (2).to_bytes(8, "little"), (end - at).to_bytes(8, "little")
    record = b"PK\6\6" + (44).to_bytes(8, "little") + bytes(12) + 2 * count + length + at.to_bytes(8, "little")
    locator = b"PK\6\7" + bytes(4) + end.to_bytes(8, "little") + (1).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(data[:end] + record + locator + b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2))
    assert content(tmp_path / "x.zip") == {"a.jpg": b"a.jpg", "b.jpg": b"b.jpg"}


def test_names_of_other_systems(tmp_path: Path) -> None:
    """macOS writes UTF-8 and does not say so; DOS has a code page."""
    path = zipped(tmp_path / "x.zip", {"grun.jpg": b"1", "grxn.jpg": b"2"})
    data = path.read_bytes().replace(b"grun", "gr\xfc".encode() + b"").replace(b"grxn", b"gr\x81n")
    path.write_bytes(data)
    assert content(path) == {"grü.jpg": b"1", "grün.jpg": b"2"}


def test_gzip_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any piece, in any order, of several gzip files in one, is what gzip gives."""
    for name, value in (("_BLOCK", 4096), ("_CHUNK", 700), ("_BLOCKS", 3), ("_STARTS", 4)):
        monkeypatch.setattr(gzipped, name, value)
    rng = random.Random(0)
    plain = [rng.randbytes(50_000), b"", bytes(100_000), rng.randbytes(123_457)]
    packed, whole = b"".join(map(gzip.compress, plain)) + bytes(20), b"".join(plain)
    with GzipFile(lambda: io.BytesIO(packed)) as file:
        for _ in range(300):
            at, size = rng.randrange(len(whole) + 9000), rng.choice((1, 512, 4096, 30_000))
            file.seek(at)
            assert file.read(size) == whole[at : at + size]
        assert file.fault == "" and len(file._starts) <= 4
    with GzipFile(lambda: io.BytesIO(packed[:-30])) as cut:
        assert whole.startswith(cut.read()) and cut.fault == "cut off"


@pytest.mark.parametrize("form", FORMS)
def test_what_a_file_is_is_seen_without_reading_it(tmp_path: Path, form: str) -> None:
    """Of any content, also what cannot be packed; a name that says nothing costs no memory for the whole file."""
    noise = random.Random(0).randbytes(100_000)
    files = {
        "noise.a": noise,
        "text.b": b"text " * 9000,
        "short.c": b"12",
        "none.d": b"",
        "png.e": PNG + 320 * noise,
        "x.f": PNG,
    }
    path = FORMS[form](tmp_path / form, files)
    archive = look_through(path)
    for size in (1, 32, 500):
        assert {name: archive.begin(name, size) for name in files} == {
            name: data[:size] for name, data in files.items()
        }
    with pytest.raises(RefusedImage, match="not in the archive"):
        archive.begin("gone", 32)
    tracemalloc.start()
    try:
        assert list_images(path).paths == ("png.e", "x.f")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 2**23 or form == "a.tar.gz"  # of which some is kept


@pytest.mark.parametrize("form", FORMS)
def test_threads_read_what_one_reads(tmp_path: Path, form: str) -> None:
    files = {f"{k:03}.bin": random.Random(k).randbytes(1000 * (k % 7)) for k in range(200)}
    assert content(FORMS[form](tmp_path / form, files), workers=8) == files


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_that_is_replaced_is_looked_through_again(tmp_path: Path, form: str) -> None:
    path = FORMS[form](tmp_path / form, {"a.jpg": b"first", "b.jpg": b"other"})
    assert read_file(path / "a.jpg") == (b"first", 5, SETTLED * 10**9)
    FORMS[form](tmp_path / "new", {"b.jpg": b"other", "a.jpg": b"later"}).replace(path)
    os.utime(path, (SETTLED, SETTLED + 1))
    assert read_file(path / "a.jpg") == (b"later", 5, (SETTLED + 1) * 10**9)
    path.touch()
    assert read_file(path / "a.jpg")[2] == -1  # could be changed again within the same time stamp
    with pytest.raises(RefusedImage, match="not in the archive"):
        read_file(path / "c.jpg")
    path.unlink()
    with pytest.raises(RefusedImage, match="cannot be read"):
        read_member(path, "a.jpg")


def test_only_files_have_something_inside(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "list.csv").write_text("path\n")
    for name in ("photo.jpg/x", "list.csv/x", "nothing/x", "x"):
        assert archive_in(tmp_path / name) is None
    assert archive_in(zipped(tmp_path / "x.zip", {}) / "a" / "b.jpg") == (tmp_path / "x.zip", "a/b.jpg")


def test_a_missing_file_opens_none_of_its_neighbours(photos: Path) -> None:
    """Of a folder whose images are gone each would look into thousands of files."""
    with watched() as reached:
        read = next(read_images(Paths(photos, ("gone/a.jpg",)), [0], bytes))
    assert read.reason == "cannot be read: No such file or directory"
    assert reached == [f"open {photos}/gone/a.jpg"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, f.h5 of it, and all of photos/ as archives."""
    top = tmp_path_factory.mktemp("archives")
    files = read_folder(make_photos(top / "photos", each=3, splits=("train", "test")))
    for form, pack in FORMS.items():
        pack(top / form, files)
    labels = [["blue", "green", "red"].index(name.split("/")[1]) for name in files]
    parquet(
        top / "train.parquet",
        [*files.values()],
        ("blue", "green", "red"),
        label=labels,
        split=[name.split("/")[0] for name in files],
    )
    extract(top / "photos", top / "f.h5", TINY)
    return top


@pytest.mark.parametrize("form", [*FORMS, "train.parquet"])
def test_a_cache_of_an_archive_is_that_of_its_folder(folder: Path, tmp_path: Path, form: str) -> None:
    """Embedded once for both; and an unchanged archive is recognised unread."""
    made = extract(folder / form, tmp_path / "f.h5", TINY, reuse=folder / "f.h5")
    assert (made.embedded, made.reused, made.refused) == (0, 18, 0)
    cache, plain = FeatureCache.open(tmp_path / "f.h5"), FeatureCache.open(folder / "f.h5")
    if form == "train.parquet":
        assert cache.paths == tuple(map(str, range(18)))
    else:
        assert cache.paths == plain.paths
    for name in ("labels", "splits", "digests"):
        assert (getattr(cache.rows, name) == getattr(plain.rows, name)).all()
    assert (cache.X == plain.X).all() and cache.classes == plain.classes
    assert (cache.rows.sizes == plain.rows.sizes).all()
    assert len({*cache.rows.mtimes.tolist()}) == 1 and (
        form == "train.parquet" or cache.rows.mtimes[0] == SETTLED * 10**9
    )
    with watched() as seen:
        again = extract(folder / form, tmp_path / "f.h5", TINY)
    assert sum(form in line for line in seen) < 12  # to look through it, not to read 18 images
    assert (again.embedded, again.reused, again.changed) == (0, 18, 0)


def test_images_of_archives_are_embedded_as_files_are(folder: Path, tmp_path: Path) -> None:
    made = extract(folder / "a.tar.gz", tmp_path / "f.h5", TINY)
    assert made.embedded == 18
    assert (FeatureCache.open(tmp_path / "f.h5").X == FeatureCache.open(folder / "f.h5").X).all()


def test_what_else_opens_images_opens_those_of_archives(folder: Path, tmp_path: Path) -> None:
    images = list_images(folder / "deflated.zip")
    of_files = measure(list_images(folder / "photos"))
    assert measure(images).headers == of_files.headers
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"deflated.zip/{path},x\n" for path in images.paths))
    table = list_images(Source(tmp_path / "list.csv", root=folder))
    assert table.sizes.tolist() == images.sizes.tolist() and not table.refused
    for file in folder.glob("f.h5*"):  # the weights, too
        shutil.copy(file, tmp_path)
    damage(tmp_path / "f.h5")
    assert repair(tmp_path / "f.h5", folder / "stored.zip").embedded > 0
    assert not FeatureCache.open(tmp_path / "f.h5").verify()


def damage(cache: Path) -> None:
    opened = FeatureCache.open(cache)
    data = bytearray(cache.read_bytes())
    at = data.find(opened.X[3].tobytes())
    data[at : at + 4] = b"\x01\x02\x03\x04"
    cache.write_bytes(data)


def test_dealt_out_images_are_copied_out_of_archives(folder: Path, tmp_path: Path) -> None:
    images: ImageList = list_images(folder / "a.tar")
    place_images(images, tmp_path / "dealt", link=False)
    assert {*map(digest, read_folder(tmp_path / "dealt").values())} == {
        *map(digest, read_folder(folder / "photos").values())
    }
    with pytest.raises(StorageError, match="it lies in an archive; --copy-to"):
        place_images(images, tmp_path / "linked", link=True)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_predictions_of_an_archive(folder: Path, tmp_path: Path) -> None:
    fit_head(folder / "f.h5", tmp_path / "m", C=1.0)
    model = load_model(tmp_path / "m")
    rows = {name: list(predict(model, folder / name)) for name in ("photos", "a.tar", "train.parquet")}
    assert [row.path for row in rows["a.tar"]] == [row.path.replace("photos", "a.tar") for row in rows["photos"]]
    assert [row.path for row in rows["train.parquet"]] == [f"{folder}/train.parquet/{row}" for row in range(18)]
    labels = [[(row.label, row.digest) for row in found] for found in rows.values()]
    assert labels[0] == labels[1] == labels[2]
    alone = [*predict(model, [rows["a.tar"][0].path, rows["train.parquet"][3].path])]
    assert [row.digest for row in alone] == [rows["a.tar"][0].digest, rows["train.parquet"][3].digest]
    scores = [evaluate(model, folder / name, split="test")["accuracy"] for name in ("f.h5", "stored.zip")]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_pages_show_pictures_out_of_archives(folder: Path, tmp_path: Path, run) -> None:
    assert run("audit", folder / "f.h5", "-o", tmp_path / "audit", "--source", folder / "deflated.zip")[0] == 0
    assert run("fit-head", folder / "f.h5", "-o", tmp_path / "m", "--no-report")[0] == 0
    assert run("predict", tmp_path / "m", folder / "a.tar", "--gallery", tmp_path / "g.html")[0] == 0
    for page in ("audit/audit.html", "g.html"):
        assert "data:image/webp" in (tmp_path / page).read_text()
