"""Shards in a bucket: the rows of the same shards on the disk, whatever fails meanwhile; what changes is refused; nothing is lost."""

import io
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import TINY, TINY_FLAGS
from objects import (
    FAULTS,
    Answer,
    Bucket,
    Request,
    allow_this_machine,
    environment,
    files_of,
    forwarded,
    s3_error,
    s3_server,
    serving,
)
from PIL import Image

from featcache.curation.split import split
from featcache.errors import SourceError
from featcache.extraction.extract import extract
from featcache.extraction.in_parts import extract_part, merge
from featcache.images.source import Source, list_images

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
SHARDS, NUMBER = "train-{000..007}.tar", 8  # more than are held between listing and reading
PER_SHARD = 4
Run = Callable[..., tuple[int, str, str]]


def shard(number: int, colour: int = 0) -> bytes:
    file, noise = io.BytesIO(), np.random.default_rng(number + 100 * colour)
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key in range(PER_SHARD):
            image = io.BytesIO()
            Image.fromarray(noise.integers(0, 255, (40, 40, 3), np.uint8)).save(image, "PNG")
            for suffix, data in (("png", image.getvalue()), ("cls", b"%d" % (key % 2))):
                entry = tarfile.TarInfo(f"{number:03d}{key:03d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as port, serving(forwarded(port)) as server:
        for name, value in environment(server).items():
            patch.setenv(name, value)
        yield SimpleNamespace(server=server, port=port)


@pytest.fixture
def bucket(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Bucket]:
    allow_this_machine(monkeypatch)
    bucket = Bucket(f"bucket-{abs(hash(request.node.name))}", server.server, server.port)
    bucket.create()
    for number in range(NUMBER):
        bucket.put(f"train-{number:03d}.tar", shard(number))
    server.server.requests.clear()
    server.server.faults.clear()
    yield bucket
    server.server.plan = lambda _: None


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    for number in range(NUMBER):
        (folder / f"train-{number:03d}.tar").write_bytes(shard(number))
    extract(folder / SHARDS, folder / "f.h5", TINY)
    return folder / "f.h5"


def columns(cache: Path) -> dict[str, bytes]:
    """All but the times, which are those of files here and stand for versions there."""
    with h5py.File(cache) as file:
        found: list[tuple[str, h5py.Dataset]] = []
        file.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
        return {name: repr(item[()].tolist()).encode() for name, item in found if name not in ("mtimes", "provenance")}


def test_the_rows_are_those_of_the_same_shards_here(bucket: Bucket, local: Path, tmp_path: Path) -> None:
    """Also when every fifth request fails; and nothing that is unchanged is read again."""
    chance = random.Random(5)
    bucket.server.plan = lambda _: chance.choice(FAULTS) if chance.random() < 0.2 else None
    report = extract(f"s3://{bucket.name}/{SHARDS}", tmp_path / "f.h5", TINY)
    assert report.embedded == report.images == NUMBER * PER_SHARD
    assert bucket.server.faults.total() > 0
    assert columns(tmp_path / "f.h5") == columns(local)
    bucket.server.plan = lambda _: None
    again = extract(f"s3://{bucket.name}/", tmp_path / "f.h5", TINY)  # the same shards, by their place
    assert (again.embedded, again.reused, again.changed) == (0, NUMBER * PER_SHARD, 0)


def test_the_table_of_a_split_is_a_source(bucket: Bucket, tmp_path: Path) -> None:
    at = f"s3://{bucket.name}/train-000.tar"
    split(at, tmp_path / "m.csv", val=0.5)
    images, listed = list_images(Source(tmp_path / "m.csv", root=at)), list_images(at)
    assert (sorted(images.paths), images.classes) == (sorted(listed.paths), listed.classes)
    assert set(images.sizes.tolist()) == set(listed.sizes.tolist()) and (images.splits > 0).all()


def test_a_run_whose_access_ends_goes_on_where_it_was(bucket: Bucket, local: Path, tmp_path: Path) -> None:
    listed: list[Request] = []

    def plan(request: Request) -> Answer | None:
        if "/train-006.tar" in request.path and request.method == "GET":
            listed.append(request)
            return s3_error(400, "ExpiredToken") if len(listed) > before else None
        return None

    before = 2  # to describe and to look through; the third is for its images
    bucket.server.plan = plan
    with pytest.raises(SourceError, match=r"refuses access \(400 ExpiredToken\); set AWS_ACCESS_KEY_ID"):
        extract(f"s3://{bucket.name}/{SHARDS}", tmp_path / "f.h5", TINY, batch_size=PER_SHARD, workers=1)
    assert list((tmp_path / "f.h5.parts").glob("*.h5"))
    bucket.server.plan = lambda _: None
    report = extract(f"s3://{bucket.name}/{SHARDS}", tmp_path / "f.h5", TINY)
    assert report.reused > 0 and report.embedded + report.reused == NUMBER * PER_SHARD
    assert columns(tmp_path / "f.h5") == columns(local)


def test_a_shard_that_changes_during_the_run_is_refused(bucket: Bucket, local: Path, tmp_path: Path) -> None:
    """And read anew by the next run: no image is from one version, and its label from another."""

    def progress(done: int, total: int, bottleneck: str) -> None:
        if done == 0:
            bucket.put("train-005.tar", shard(5, colour=1))

    source = f"s3://{bucket.name}/{SHARDS}"
    report = extract(source, tmp_path / "f.h5", TINY, progress=progress)
    assert (report.embedded, report.refused) == ((NUMBER - 1) * PER_SHARD, PER_SHARD)
    with h5py.File(tmp_path / "f.h5") as file:
        assert {*file["refused/reasons"].asstr()} == {"changed while it was read"}
    report = extract(source, tmp_path / "f.h5", TINY)
    assert (report.embedded, report.reused, report.refused) == (PER_SHARD, (NUMBER - 1) * PER_SHARD, 0)


def test_nothing_of_a_secret_is_kept(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Shards of a web server: the same rows, and neither the password nor the signature in any file or message."""
    allow_this_machine(monkeypatch)
    with serving(files_of({f"/train-{number:03d}.tar": shard(number) for number in range(NUMBER)})) as web:
        source = f"http://ann:pa55word@127.0.0.1:{web.port}/{SHARDS}?sig=TOPSECRET"
        code, out, err = run("extract", source, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--json")
    assert code == 0
    for request in web.requests:  # what nobody named is asked for without
        assert (
            ("Authorization" in request.headers) == ("sig=TOPSECRET" in request.path) == ("classes" not in request.path)
        )
    assert columns(tmp_path / "f.h5") == columns(local)
    kept = (tmp_path / "f.h5").read_bytes() + out.encode() + err.encode()
    assert not any(secret in kept for secret in (b"pa55word", b"TOPSECRET", b"YW5uOnBhNTV3b3Jk"))


def test_the_command_line(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Addresses are said as they are typed; what a bucket has that is not read is said, with the line that fetches it."""
    monkeypatch.chdir(tmp_path)
    bucket.put("photos/1.jpg", b"x")
    at = f"s3://{bucket.name}"
    for source, said in {
        f"{at}/photos": f"fetch them: `aws s3 sync {at}/photos photos`, and give the folder photos",
        f"{at}/none.tar": f"{at}/none.tar: cannot be read: there is no such object",
        f"{at}/val-*.tar": f"nothing matches '{at}/val-*.tar'",
        "https://ann:pa55word@example.org/f.h5?sig=TOPSECRET": "https://example.org/f.h5 is an address",
    }.items():
        code, _, err = run("extract", source, "-o", "f.h5")
        assert code == 1 and said in err
        assert "pa55word" not in err and "TOPSECRET" not in err
    assert not list(tmp_path.iterdir())


def test_parts_of_shards_there(bucket: Bucket, local: Path, tmp_path: Path, run: Run) -> None:
    """The same rows. A shard that changes, or is cut off, between two parts is refused by name; addresses keep both slashes."""
    source, output = f"s3://{bucket.name}/{SHARDS}", tmp_path / "f.h5"
    said = "".join(run("extract", source, "-o", output, *TINY_FLAGS, "--part", "1/2")[1:])
    before = shard(7)
    other = bytearray(before)
    other[700] ^= 1  # of a picture
    for data, words in (
        (bytes(other), f"s3://{bucket.name}/train-007.tar is of another version"),
        (before[:4000], "refused now: train-007.tar: cut off"),
    ):
        bucket.put("train-007.tar", data)
        code, _, err = run("extract", source, "-o", output, *TINY_FLAGS, "--part", "2/2")
        assert (code, words in err) == (1, True), err
        said += err
    bucket.put("train-007.tar", before)
    said += "".join(run("info", f"{output}.parts")[1:])
    assert extract_part(source, output, "2/2", TINY).images == NUMBER * PER_SHARD // 2
    merge(output)
    assert columns(output) == columns(local)
    bucket.put("broken.tar", b"no archive" * 100)
    code, _, err = run("extract", f"s3://{bucket.name}/broken.tar", "-o", tmp_path / "g.h5", *TINY_FLAGS)
    assert code == 1 and "backbone" not in err and not [*tmp_path.glob("g.h5*")]
    assert f"s3://{bucket.name}" in said and not re.search(r"s3:/[^/]", said + err), said + err
