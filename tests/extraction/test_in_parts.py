"""``extract --part`` and ``merge``, in this process: any N, any order, twice; and all that does not fit together.

Kills and races: ``tests/promises/test_parts.py``.
"""

import dataclasses
import functools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, TINY, make_photos, settle, write_photo
from packing import FORMS, Files, parquet, read_folder, tar

from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.errors import CacheError, SourceError, SpecMismatchError, StorageError, UsageError
from featcache.extraction.external import import_vectors
from featcache.extraction.extract import extract
from featcache.extraction.in_parts import describe_parts, extract_part, merge
from featcache.extraction.job import Job
from featcache.extraction.listing import Listing
from featcache.extraction.parts import check_agreement, open_parts
from featcache.extraction.shares import owners
from featcache.images.source import list_images
from featcache.reports.info import describe
from featcache.system import files, workdir
from featcache.system.workdir import LISTING, locked, shared, work_folder


def columns(path: Path) -> Any:
    """All datasets, byte for byte."""
    cache = FeatureCache.open(path)
    features = cache.take(np.arange(len(cache)))
    rows = {name: (column.dtype, column.tobytes()) for name, column in vars(cache.rows).items()}
    return features.dtype, features.tobytes(), rows, cache.classes, cache.refused, cache.fingerprint


_MADE: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def _each_embedder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes longer than embedding these images; that each process makes the same one is shown elsewhere."""
    make = Job.__dict__["embedder"].func

    def kept(job: Job) -> Any:
        key = job.resolved, job.images.classes
        _MADE[key] = _MADE.get(key) or make(job)
        return _MADE[key]

    monkeypatch.setattr(Job, "embedder", functools.cached_property(kept))
    Job.__dict__["embedder"].__set_name__(Job, "embedder")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 photos, a copy of one under another name, and a file that is no image."""
    root = make_photos(tmp_path_factory.mktemp("parts") / "photos", settled=True)
    shutil.copy2(root / "red" / "00.jpg", root / "blue" / "copy.jpg")
    (root / "green" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    os.utime(root / "green" / "broken.jpg", (1e9, 1e9))
    return root


@pytest.fixture(scope="module")
def whole(photos: Path) -> Any:
    """What one run makes of them."""
    extract(photos, photos.parent / "whole.h5", TINY)
    return columns(photos.parent / "whole.h5")


def parts_of(photos: Path, output: Path, of: int) -> None:
    for number in range(1, of + 1):
        extract_part(photos, output, f"{number}/{of}", TINY)


@pytest.mark.parametrize("of", [1, 7, *(pytest.param(of, marks=pytest.mark.slow) for of in (2, 64))])
def test_parts_in_any_order_and_again_make_what_one_run_makes(
    photos: Path, whole: Any, tmp_path: Path, of: int
) -> None:
    output, numbers = tmp_path / "f.h5", [*range(1, of + 1)]
    random.Random(of).shuffle(numbers)
    reports = [extract_part(photos, output, f"{number}/{of}", TINY) for number in numbers]
    assert sum(report.images for report in reports) == 20
    assert (sum(report.embedded for report in reports), sum(report.refused for report in reports)) == (19, 1)
    again = [extract_part(photos, output, f"{number}/{of}", TINY) for number in numbers[: of // 2 + 1]]
    assert [report.embedded for report in again] == [0] * len(again)
    assert [report.reused for report in again] == [report.embedded for report in reports[: len(again)]]
    report = merge(output)
    assert columns(output) == whole
    assert (report.images, report.embedded, report.refused, report.added) == (20, 19, 1, 19)
    assert not work_folder(output).exists()
    assert merge(output).reused == 19  # again
    assert extract_part(photos, output, f"{numbers[0]}/{of}", TINY).reused == reports[0].images - reports[0].refused
    assert not work_folder(output).exists()  # a straggler that begins too late leaves nothing
    assert extract(photos, output).reused == 19


def _web_dataset(path: Path, files: Files) -> Path:
    """Two shards of ``key.jpg`` beside ``key.cls``."""
    for half in (0, 1):
        members: dict[str, bytes] = {}
        for number, (name, data) in [*enumerate(files.items())][half::2]:
            members |= {f"{number:03d}.jpg": data, f"{number:03d}.cls": name.split("/")[0].encode()}
        tar(path.with_name(f"train-{half}.tar"), members)
    return path


def _rows(path: Path, files: Files) -> Path:
    labels = [name.split("/")[0] for name in files]
    return parquet(
        path, [*files.values()], ("blue", "green", "red"), label=[sorted({*labels}).index(x) for x in labels]
    )


SOURCES = {**FORMS, "train-{0..1}.tar": _web_dataset, "train.parquet": _rows}


def _packed(photos: Path, folder: Path, form: str) -> Path:
    if form.endswith("parquet"):
        pytest.importorskip("pyarrow")
    return SOURCES[form](folder / form, read_folder(photos))


@pytest.mark.parametrize("form", SOURCES)
def test_parts_of_what_is_no_folder(photos: Path, tmp_path: Path, form: str) -> None:
    """Of archives of class folders, shards and rows of Parquet: as one run, in another order, and one of them again."""
    source, output = _packed(photos, tmp_path, form), tmp_path / "f.h5"
    embedded = [extract_part(source, output, f"{number}/3", TINY).embedded for number in (3, 1, 3, 2)]
    assert (embedded[2], sum(embedded)) == (0, 19)
    merge(output)
    assert extract(source, tmp_path / "one.h5", TINY).refused == 1
    assert columns(output) == columns(tmp_path / "one.h5")
    assert {*FeatureCache.open(output).classes} == {"blue", "green", "red"}


def _last_bit(files: Files) -> dict[str, bytes]:
    """Another picture of the same size."""
    data = bytearray(files["red/00.jpg"])
    data[-40] ^= 3
    return {**files, "red/00.jpg": bytes(data)}


CHANGES: dict[str, Any] = {  # what becomes of the files; what is said
    "an image's bytes": (_last_bit, "is of another version, or time"),
    "an image more": (
        lambda files: {**files, "red/new.jpg": files["red/00.jpg"]},
        "20 when the first part was begun; new: ",
    ),
    "an image less": (lambda files: dict([*files.items()][:-1]), "gone: "),
    "another class": (
        lambda files: {name.replace("green/00", "red/zz"): data for name, data in files.items()},
        "20 when the first part was begun; ",
    ),
    "cut off": (None, "refused now: .*cut off"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["a.tar", "deflated.zip", "train-{0..1}.tar", "train.parquet"])
def test_an_archive_that_changes_between_two_parts(photos: Path, tmp_path: Path, form: str, change: str) -> None:
    """It is refused by name, nothing is mixed, and what is said to do helps."""
    if change == "cut off" and form in ("deflated.zip", "train.parquet"):
        return  # which have their index at the end, and are no archives without it
    files, output = read_folder(photos), tmp_path / "f.h5"
    source = _packed(photos, tmp_path, form)
    extract_part(source, output, "1/2", TINY)
    before = sorted(os.listdir(work_folder(output)))
    alter, words = CHANGES[change]
    some = tmp_path / form.replace("{0..1}", "1")
    if alter:
        SOURCES[form](source, alter(files))
    else:
        some.write_bytes(some.read_bytes()[:15_000])
    for path in (some, tmp_path / form.replace("{0..1}", "0")):
        os.utime(path, (1.1e9, 1.1e9))  # what is younger than two seconds has no time yet
    with pytest.raises(SpecMismatchError, match=words) as error:
        extract_part(source, output, "2/2", TINY)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(work_folder(output))) == before
    extract(source, output, TINY, force=change == "cut off")  # or rows of what cannot be read would be lost
    extract(source, tmp_path / "one.h5", TINY)
    assert columns(output) == columns(tmp_path / "one.h5")


def test_what_is_missing_is_named_and_nothing_else_changes(photos: Path, whole: Any, tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    for number in (2, 3, 6):
        extract_part(photos, output, f"{number}/7", TINY)
    before = sorted(path.name for path in work_folder(output).glob("*.h5"))
    with pytest.raises(
        SourceError, match=r"^parts 1, 4-5, 7 of 7 \(\d+ images of 20\) missing in .*f\.h5\.parts; .* --part 1/7"
    ):
        merge(output)
    assert sorted(path.name for path in work_folder(output).glob("*.h5")) == before
    facts = describe(work_folder(output))
    assert (facts["kind"], facts["parts"], facts["complete"], facts["missing"]) == ("parts", 7, 3, "1, 4-5, 7")
    assert facts["embedded"] + facts["refused"] + facts["missing_images"] == facts["images"] == 20
    json.dumps(facts)
    report = extract(photos, output, TINY)  # the rest, without --part
    assert 0 < report.reused < 19
    assert columns(output) == whole
    assert not work_folder(output).exists()


def test_a_damaged_part_is_made_again(
    photos: Path, whole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, run: Any
) -> None:
    output = tmp_path / "f.h5"
    parts_of(photos, output, 2)
    cache = open_parts(work_folder(output), tag="2of2")[0]
    part, data = cache.path, bytearray(cache.path.read_bytes())
    data[data.index(cache.take(np.arange(1)).tobytes())] ^= 1
    part.write_bytes(data)
    caplog.clear()
    assert extract_part(photos, output, "1/2", TINY).embedded == 0  # not its own
    assert describe_parts(work_folder(output))["missing"] == "2"
    assert "\nmissing: part 2\n" in run("info", work_folder(output))[1]  # no count
    assert extract_part(photos, output, "2/2", TINY).embedded > 0
    assert part.exists()  # several write here: none deletes
    assert "is damaged and will be made again (it " in caplog.text and "restore it" not in caplog.text
    merge(output)
    assert columns(output) == whole


def test_a_damaged_listing_costs_no_part(photos: Path, whole: Any, tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    extract_part(photos, output, "1/2", TINY)
    listing = work_folder(output) / LISTING
    listing.write_bytes(listing.read_bytes()[:3000])
    for call in (lambda: merge(output), lambda: extract_part(photos, output, "2/2", TINY)):
        with pytest.raises(
            CacheError, match=r"agreed on, is damaged.*truncated; `featcache extract SOURCE -o .*/f\.h5`, without"
        ):
            call()
    assert extract(photos, output, TINY).reused > 5
    assert columns(output) == whole


@pytest.mark.parametrize(
    ("options", "of", "words"),
    [
        ({"backbone": "mobilenet_v3_small"}, 2, "backbone.name: squeezenet1_1 -> mobilenet_v3_small"),
        ({"resize": 48}, 2, "preprocess.resize: 40 -> 48"),
        ({"dtype": "float32"}, 2, "storage: float16 -> float32"),
        ({}, 3, "holds parts of 2, found --part of 3"),
        ({"limit": 5}, 2, "another list of images"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    photos: Path, tmp_path: Path, options: dict[str, Any], of: int, words: str
) -> None:
    output = tmp_path / "f.h5"
    extract_part(photos, output, "1/2", dataclasses.replace(TINY, dtype="float16"))
    before = sorted(os.listdir(work_folder(output)))
    limit = options.pop("limit", None)
    request = dataclasses.replace(TINY, **options)
    with pytest.raises(SpecMismatchError) as error:
        extract_part(photos, output, f"2/{of}", request, limit=limit)
    assert words in str(error.value)
    assert "--force" not in str(error.value)  # which no part takes
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(work_folder(output))) == before


def test_what_the_first_part_settled_holds_for_those_that_leave_it_open(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    request = dataclasses.replace(TINY, dtype="float32")
    first = extract_part(photos, output, "1/2", request)
    facts = describe(work_folder(output))
    assert facts["fingerprint"] == first.fingerprint
    assert facts["spec"]["storage"] == "float32"
    assert extract_part(photos, output, "2/2").fingerprint == first.fingerprint


def test_another_listing_is_refused_and_the_first_difference_named(photos: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "photos", tmp_path / "f.h5"
    shutil.copytree(photos, source)  # on another disk, with
    for path in source.rglob("*.jpg"):  # other times: the clocks of machines differ, too
        settle(path)
    extract_part(photos, output, "1/2", TINY)
    extract_part(source, output, "2/2", TINY)
    new = write_photo(source / "red" / "new.jpg", COLOURS["red"], 99)
    with pytest.raises(SpecMismatchError, match=r"21 images here, 20 when .* new: red/new\.jpg\); use the same"):
        extract_part(source, output, "2/2", TINY)
    new.unlink()
    moved = (source / "red" / "00.jpg").rename(tmp_path / "00.jpg")
    with pytest.raises(SpecMismatchError, match=r"gone: red/00\.jpg"):
        extract_part(source, output, "2/2", TINY)
    (source / "red" / "00.jpg").write_bytes(moved.read_bytes() + b"\0")
    with pytest.raises(SpecMismatchError, match=r"of another size: red/00\.jpg"):
        extract_part(source, output, "2/2", TINY)
    merge(output)  # what was listed is there
    assert len(FeatureCache.open(output)) == 19


def test_a_newer_version_and_what_is_no_listing(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    extract_part(photos, output, "1/1", TINY)
    path = work_folder(output) / LISTING
    cache = FeatureCache.open(path)

    def again(facts: dict[str, Any]) -> None:
        rest = {**cache.provenance.rest, "parts": facts}
        provenance = dataclasses.replace(cache.provenance, rest=rest)
        blocks = [np.zeros((len(cache), 1), np.float16)]
        write_cache(path, cache.rows, blocks, dim=1, spec=cache.spec, classes=cache.classes, provenance=provenance)

    facts = dict(cache.provenance.rest["parts"])
    for change, words in (({"version": 2}, "version 2 of parts, this featcache reads 1"), ({"of": "x"}, "remove it")):
        again(facts | change)
        for call in (lambda: merge(output), lambda: extract_part(photos, output, "1/1", TINY)):
            with pytest.raises(CacheError, match=words):
                call()


def _altered(part: FeatureCache, change: float, **provenance: Any) -> Path:
    """A copy of a part under another name, with other features."""
    path = part.path.with_name("9" + part.path.name[1:])
    features = part.take(np.arange(len(part))).astype(np.float64)
    features[0] += change * np.abs(features[0]).mean() * np.random.default_rng(0).normal(size=features.shape[1])
    rest = {**part.provenance.rest, **provenance}
    made = dataclasses.replace(part.provenance, rest=rest)
    write_cache(path, part.rows, [features], dim=part.dim, spec=part.spec, provenance=made)
    return path


def test_one_image_with_two_embeddings(photos: Path, whole: Any, tmp_path: Path) -> None:
    """Of machines of one kind that is impossible; of two kinds roundings may differ, and the first by name counts."""
    output = tmp_path / "f.h5"
    parts_of(photos, output, 2)
    part = open_parts(work_folder(output), tag="1of2")[0]
    copy = _altered(part, 0.0)
    check_agreement([part, FeatureCache.open(copy)], contents=True)
    for change, kind, allowed in (
        (1e-3, {}, False),
        (0.3, {"kind": "cuda: other"}, False),
        (1e-3, {"kind": "cuda: other"}, True),
    ):
        copy = _altered(part, change, **kind)
        if allowed:
            continue
        for call in (lambda: merge(output), lambda: extract(photos, output, TINY)):
            with pytest.raises(CacheError) as error:
                call()
            for word in (part.paths[0], part.path.name, copy.name):
                assert word in str(error.value)
    merge(output)
    assert columns(output) == whole


def test_a_file_that_changed_in_between(photos: Path, tmp_path: Path) -> None:
    """To the same size, so that the list is the same: ``merge`` cannot know, ``extract`` looks."""
    source, output = tmp_path / "photos", tmp_path / "f.h5"
    shutil.copytree(photos, source)
    parts_of(source, output, 2)
    path = source / "red" / "00.jpg"
    data = bytearray(path.read_bytes())
    data[-40] ^= 3
    path.write_bytes(data)
    os.utime(path, (2e9, 2e9))
    parts_of(source, output, 2)
    with pytest.raises(CacheError, match=r"red/00\.jpg is in .* its file changed in between"):
        merge(output)
    extract(source, output, TINY)
    extract(source, tmp_path / "one.h5", TINY)
    assert columns(output) == columns(tmp_path / "one.h5")


def test_the_first_that_publishes_counts(
    photos: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race of two first parts, brought about: while one loads its backbone, another agrees with itself on something else."""
    output, original = tmp_path / "f.h5", Listing.publish
    other = dataclasses.replace(TINY, dtype="float16")

    def late(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(Listing, "publish", original)
        extract_part(photos, output, "2/2", other)
        original(*arguments, **options)

    monkeypatch.setattr(Listing, "publish", late)
    assert extract_part(photos, output, "1/2", dataclasses.replace(TINY, dtype="auto")).embedded > 0
    assert sorted(path.name for path in work_folder(output).glob("l*")) == [LISTING, "lock"]
    merge(output)
    assert columns(output) == whole


@pytest.mark.parametrize("links", [True, False])
def test_one_name_is_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert [files.give_name(tmp_path / name, tmp_path / "named") for name in ("a", "b")] == [True, False]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("named", "a")]
    if not links:
        (tmp_path / "c").write_text("c")
        (tmp_path / "other.claim").mkdir()
        monkeypatch.setattr(files, "_PATIENCE", 0.1)
        with pytest.raises(StorageError, match=r"remove .*other\.claim"):
            files.give_name(tmp_path / "c", tmp_path / "other")


def test_reused_rows_are_in_the_parts(photos: Path, whole: Any, tmp_path: Path) -> None:
    output, donor = tmp_path / "f.h5", tmp_path / "donor.h5"
    extract(photos, donor, TINY, limit=9)
    reports = [extract_part(photos, output, f"{number}/2", TINY, reuse=donor) for number in (1, 2)]
    assert sum(report.reused for report in reports) >= 9
    donor.unlink()
    merge(output)
    assert columns(output) == whole


@pytest.mark.slow
def test_limit_is_shared_out(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    assert [extract_part(photos, output, f"{number}/2", TINY, limit=6).images for number in (1, 2)] == [3, 3]
    merge(output)
    extract(photos, tmp_path / "one.h5", TINY, limit=6)
    assert columns(output) == columns(tmp_path / "one.h5")


def test_a_cache_that_is_there(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    extract(photos, output, TINY, limit=6)
    before = output.read_bytes()
    with pytest.raises(StorageError, match=r"exists, and lacks \d+ images of part 1/2; .* --reuse .*f\.h5"):
        extract_part(photos, output, "1/2", TINY)
    with pytest.raises(SpecMismatchError):
        extract_part(photos, output, "1/2", dataclasses.replace(TINY, backbone="mobilenet_v3_small"))
    with pytest.raises(StorageError, match="may be of another spec"):
        extract_part(list_images(photos).take(np.arange(1)), output, "1/1", dataclasses.replace(TINY, resize=48))
    assert output.read_bytes() == before
    names, stated = np.array(["a.jpg", "b.jpg"]), tmp_path / "e.h5"
    np.savez(tmp_path / "x.npz", path=names, vector=np.eye(2, dtype=np.float32))
    import_vectors(tmp_path / "x.npz", stated, stated="elsewhere")
    with pytest.raises(SpecMismatchError, match=r"made elsewhere .*; choose another -o, remove it"):
        extract_part(photos, stated, "1/2")
    assert not work_folder(output).exists()


def test_packed_while_a_straggler_writes(
    photos: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system where the locks of other machines are not seen: what it writes then is not needed, and nothing is lost."""
    output, original = tmp_path / "f.h5", extract_part.__globals__["_publish_known"]
    parts_of(photos, output, 2)
    mine = [part.path for part in open_parts(work_folder(output), tag="1of2")]

    def pack_first(*arguments: Any) -> int:
        monkeypatch.setitem(extract_part.__globals__, "_publish_known", original)
        monkeypatch.setattr("featcache.extraction.in_parts.locked", shared)  # sees no other
        for path in saved:
            shutil.copy2(path, mine[saved.index(path)])
        merge(output)
        (work_folder(output) / "lock").unlink()
        work_folder(output).rmdir()
        return original(*arguments)

    saved = [Path(shutil.copy2(path, tmp_path / path.name)) for path in mine]
    for path in mine:
        path.unlink()
    monkeypatch.setitem(extract_part.__globals__, "_publish_known", pack_first)
    report = extract_part(photos, output, "1/2", TINY)
    assert (report.embedded, report.reused + report.refused) == (0, report.images)
    assert not work_folder(output).exists()
    assert columns(output) == whole


def test_who_writes_alone_and_who_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workdir, "PATIENCE", 0.1)
    folder = tmp_path / "f.h5.parts"
    with shared(folder), shared(folder):
        (folder / LISTING).touch()
        with pytest.raises(StorageError, match=r"parts of .*f\.h5 are being made, or packed"), locked(folder):
            pass
        (folder / LISTING).unlink()
        (folder / ".x.h5.1-00000000.tmp").touch()  # perhaps written on another machine
    assert (folder / ".x.h5.1-00000000.tmp").exists()
    (folder / ".x.h5.1-00000000.tmp").unlink()
    with locked(folder), pytest.raises(StorageError, match=r"another featcache is writing .*f\.h5"), shared(folder):
        pass
    assert not folder.exists()


def test_another_source_does_not_cost_the_work_of_many(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.h5"
    parts_of(photos, output, 2)
    other = make_photos(tmp_path / "other", each=2)
    for path in other.rglob("*.jpg"):
        write_photo(path, (5, 5, 5), hash(path.name) % 97)
    with pytest.raises(StorageError, match=r"holds 19 embeddings made by --part runs, and this source has only 0"):
        extract(other, output, TINY)
    merge(output)


@pytest.mark.parametrize("of", [1, 3])
def test_all_refused(tmp_path: Path, of: int) -> None:
    for name in "ab":
        (tmp_path / "p" / name).mkdir(parents=True)
        (tmp_path / "p" / name / "x.jpg").write_bytes(b"no")
    with pytest.raises(SourceError, match="all 2 images"):
        extract_part(tmp_path / "p", tmp_path / "f.h5", f"1/{of}", TINY)
    assert not (tmp_path / "f.h5.parts").exists()


def test_a_part_of_refusals_alone_is_resumed(photos: Path, whole: Any, tmp_path: Path) -> None:
    """With and without ``--part``: what only says why an image was refused has no rows to compare with."""
    output = tmp_path / "f.h5"
    broken = [*list_images(photos).paths].index("green/broken.jpg")
    images = list_images(photos)
    number = next(n for n in range(1, 21) if (owners(images, 20) == n)[broken])
    assert [extract_part(photos, output, f"{number}/20", TINY).refused for _ in range(2)] == [1, 1]
    assert [len(part) for part in open_parts(work_folder(output))] == [0]
    extract(photos, output, TINY)
    assert columns(output) == whole


def test_nothing_to_merge(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"nothing to merge: .*f\.h5\.parts does not exist; make parts"):
        merge(tmp_path / "f.h5")
    assert not any(tmp_path.iterdir())
    (tmp_path / "f.h5.parts").mkdir()
    with pytest.raises(CacheError, match="holds no listing of parts"):
        merge(tmp_path / "f.h5")
    with pytest.raises(CacheError, match=r"is a folder of parts; .*`featcache merge .*/f\.h5`"):
        merge(tmp_path / "f.h5.parts")
    with pytest.raises(UsageError, match="must be I/N, such as 3/64, or auto, found '3'"):
        extract_part(photos, tmp_path / "f.h5", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [["--force"], ["--max-bad", "0"]])
def test_flags_that_make_no_sense_with_a_part(photos: Path, tmp_path: Path, run: Any, options: list[str]) -> None:
    code, _, err = run("extract", photos, "-o", tmp_path / "f.h5", "--part", "1/2", *options)
    assert code == 2
    assert options[0] in err


def test_the_commands(photos: Path, whole: Any, tmp_path: Path, run: Any) -> None:
    """As in a scheduler's script; of the refused ``merge`` has the last word."""
    flags = [
        "--backbone",
        "squeezenet1_1",
        "--weights",
        "none",
        "--resize",
        "40",
        "--crop",
        "32",
        "--precision",
        "fp32",
    ]
    for number in (1, 2):
        code, out, _ = run("extract", photos, "-o", tmp_path / "f.h5", "--part", f"{number}/2", *flags, "--json")
        found = json.loads(out.splitlines()[-1])
        assert (code, found["part"], found["parts"]) == (0, number, 2)
    code, out, err = run("merge", tmp_path / "f.h5", "--max-bad", "0", "--json")
    assert (code, json.loads(out.splitlines()[-1])["embedded"]) == (3, 19)
    assert "1 of 20 images was refused" in err
    assert columns(tmp_path / "f.h5") == whole
