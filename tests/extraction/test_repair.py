"""Repair: what was damaged comes back from the images, byte for byte, or nothing is changed and the reason is said.

The oracle is the undamaged file.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import h5py
import numpy as np
import pytest
from conftest import TINY, make_photos, write_photo
from test_extract import stop_after

from featcache.backbones.backbone import save_weights
from featcache.backbones.load import load_backbone
from featcache.cache import format as cache_format
from featcache.cache.cache import FeatureCache, weights_copy
from featcache.cache.write import write_cache
from featcache.errors import (
    BackboneError,
    CacheError,
    DamagedCacheError,
    FeatcacheError,
    SourceError,
    SpecMismatchError,
    StorageError,
)
from featcache.extraction import parts
from featcache.extraction import repair as repairing
from featcache.extraction.extract import extract
from featcache.extraction.repair import RepairReport, repair
from featcache.system.workdir import work_folder

COLUMNS = tuple(name for name, _, _ in cache_format.COLUMNS)
BLOCK = 8  # rows per checksum in these tests


class Work:
    """A source, a cache of it, and what the cache was before it was damaged."""

    def __init__(self, folder: Path) -> None:
        self.photos, self.cache = folder / "photos", folder / "f.h5"
        self.good = self.cache.read_bytes()

    def data(self, name: str) -> np.ndarray:
        """The bytes of a dataset; changing them changes the file."""
        with h5py.File(self.cache) as file:
            place = file[name].id
            return np.memmap(self.cache, np.uint8, "r+", place.get_offset(), place.get_storage_size())

    def flip(self, name: str, position: int) -> None:
        self.data(name)[position] ^= 0x10

    def flip_row(self, row: int) -> None:
        self.flip("features", row * len(self.data("features")) // len(self))

    def invert(self, name: str) -> None:
        data = self.data(name)
        data[:] = ~data

    def lose_path(self, row: int) -> None:
        self.data("paths").reshape(len(self), -1)[row, 0] = ord("?")

    def __len__(self) -> int:
        return len(FeatureCache.salvage(self.cache))

    @property
    def paths(self) -> tuple[str, ...]:
        return FeatureCache.salvage(self.cache).paths

    def embed_all(self) -> None:
        """Leave behind what an interrupted repair would that had embedded everything."""
        folder = work_folder(self.cache)
        folder.mkdir(exist_ok=True)
        (folder / "0.h5").write_bytes(self.good)

    def mend(self) -> RepairReport:
        return repair(self.cache, self.photos)

    def is_as_before(self) -> bool:
        return self.cache.read_bytes() == self.good and not work_folder(self.cache).exists()

    def refuses(self, error: type[FeatcacheError], words: str) -> str:
        """``repair`` raises, and has changed nothing."""
        damaged = self.cache.read_bytes()
        with pytest.raises(error, match=words) as raised:
            self.mend()
        assert self.cache.read_bytes() == damaged
        assert not work_folder(self.cache).exists()
        return str(raised.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """37 embedded images, of which two have one content, and two that are refused; blocks of 8 rows."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATCACHE_FUSE", "0")  # a backbone is loaded sooner
        photos = make_photos(folder / "photos", splits=("train", "val"))
        shutil.copy(photos / "train" / "red" / "01.jpg", photos / "val" / "blue" / "twin.jpg")
        (photos / "val" / "blue" / "empty.jpg").touch()
        (photos / "val" / "green" / "text.jpg").write_text("no image")
        for number, path in enumerate(sorted(photos.rglob("*.jpg"))):
            os.utime(path, (1e9 + number, 1e9 + number))
        extract(photos, folder / "f.h5", TINY)
        cache = FeatureCache.open(folder / "f.h5")
        assert len(cache) == 37
        write_cache(
            cache.path,
            cache.rows,
            [cache.take(np.arange(37))],
            dim=cache.dim,
            spec=cache.spec,
            classes=cache.classes,
            refused=cache.refused,
            provenance=cache.provenance,
            rows_per_checksum=BLOCK,
        )
        yield folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Work:
    shutil.copytree(made, tmp_path / "w")
    return Work(tmp_path / "w")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the paths of all images that are embedded."""
    seen: list[str] = []
    original = parts.embed_into_parts

    def note(images: object, *arguments: object, **options: object) -> object:
        seen.extend(images.paths)
        return original(images, *arguments, **options)

    monkeypatch.setattr("featcache.extraction.repair.embed_into_parts", note)
    return seen


# ------------------------------------------------------------------------------------------------- features


def test_only_damaged_blocks_are_computed_again(work: Work, embedded: list[str]) -> None:
    work.flip_row(9)
    features = work.data("features")
    features[-min(512, features.size // len(work) * 3) :] = 0  # a sector of the last block, of 5 rows
    with pytest.raises(DamagedCacheError, match=r"rows 8-15, 32-36; `featcache verify \S+ --repair SOURCE` mends it"):
        FeatureCache.open(work.cache).check_features()
    expected = [path for row, path in enumerate(work.paths) if 8 <= row < 16 or row >= 32]
    report = work.mend()
    assert work.is_as_before()
    assert (report.damaged, report.damaged_columns, report.restored_columns) == (((8, 16), (32, 37)), (), ())
    assert report.rows == 37
    # One of the two images of one content lies in an intact block: that one is taken over.
    twin = [path for path in expected if path.endswith(("twin.jpg", "train/red/01.jpg"))]
    assert embedded == [path for path in expected if path not in twin]
    assert report.embedded == len(embedded) >= 12


def test_missing_and_edited_images_are_named_and_nothing_changes(work: Work) -> None:
    work.flip_row(0)
    (work.photos / "train" / "blue" / "00.jpg").unlink()
    write_photo(work.photos / "train" / "blue" / "03.jpg", (1, 2, 3), 77)
    said = work.refuses(SourceError, "^2 images .* are not in .*photos with the content they had")
    assert "train/blue/00.jpg, train/blue/03.jpg; nothing was changed" in said
    assert f"`featcache extract {work.photos} -o {work.cache} --force`" in said


@pytest.mark.parametrize("name", ["features", *COLUMNS])
def test_a_wrong_source_loses_nothing(work: Work, tmp_path: Path, name: str, no_model: None) -> None:
    work.flip(name, 0)
    make_photos(tmp_path / "other" / "photos", each=1)
    (tmp_path / "other" / "photos" / "red").rename(tmp_path / "other" / "photos" / "aardvark")
    for path in (tmp_path / "other" / "photos").rglob("*.jpg"):
        write_photo(path, (1, 2, 3), len(str(path)))
    work.photos = tmp_path / "other" / "photos"
    work.refuses(SourceError, "nothing was changed")
    work.photos = tmp_path / "nowhere"
    work.refuses(SourceError, "does not exist")
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "link.jpg").symlink_to(tmp_path / "gone")
    work.refuses(SourceError, "no image in .* can be read")


def test_other_weights_are_refused(work: Work) -> None:
    work.flip_row(20)
    copy = weights_copy(work.cache, FeatureCache.open(work.cache).spec)
    other = load_backbone("squeezenet1_1", copy)
    with_changes = dict(other.module.named_parameters())["features.0.weight"]
    with_changes.data += 0.01
    copy.unlink()
    save_weights(other, copy)
    work.refuses(SpecMismatchError, r"backbone\.weights_sha256: .* copy the original weights to ")
    copy.unlink()
    work.refuses(BackboneError, "is missing, and no library provides the weights")


def test_images_that_change_while_they_are_embedded(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.flip_row(0)
    damaged, original = work.cache.read_bytes(), parts.embed_into_parts

    def edit_first(images, *arguments, **options):
        write_photo(work.photos / images.paths[3], (5, 5, 5), 5)
        return original(images, *arguments, **options)

    monkeypatch.setattr("featcache.extraction.repair.embed_into_parts", edit_first)
    with pytest.raises(SourceError, match="1 row .* cannot be embedded .* changed meanwhile"):
        work.mend()
    assert work.cache.read_bytes() == damaged


# -------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.usefixtures("no_model")
def test_a_damaged_column_comes_back_from_the_source(work: Work, name: str) -> None:
    """One byte, three bytes, a zeroed sector, all of it: named, and restored without embedding anything."""
    seed = 7
    rng = np.random.default_rng(seed)
    size = work.data(name).size
    for count in (1, 3):
        for position in rng.choice(size, count, replace=False).tolist():
            work.flip(name, position)
        with pytest.raises(DamagedCacheError, match=f"mismatch in its {name}; `featcache verify .* --repair SOURCE`"):
            FeatureCache.open(work.cache)
        report = work.mend()
        assert (report.damaged, report.damaged_columns, report.embedded) == ((), (name,), 0)
        assert report.restored_columns == (name,)
        assert work.is_as_before(), f"seed {seed}"
    for length in (min(size, 512), size):
        work.data(name)[:length] = 255
        assert work.mend().damaged_columns == (name,)
        assert work.is_as_before()


@pytest.mark.parametrize("hidden", ["paths", "digests"])
@pytest.mark.usefixtures("no_model")
def test_columns_and_features_at_once(work: Work, hidden: str) -> None:
    damaged = [name for name in COLUMNS if name not in {"paths", "digests"} - {hidden}]
    for name in damaged:
        work.invert(name)
    work.flip_row(17)
    work.embed_all()
    report = work.mend()
    assert work.is_as_before()
    assert (report.damaged, report.damaged_columns, report.embedded) == (((16, 24),), tuple(damaged), 0)


def test_paths_and_digests_both_damaged_cannot_be_repaired(work: Work) -> None:
    work.flip("paths", 3)
    work.flip("digests", 3)
    said = work.refuses(DamagedCacheError, "beyond repair: checksum mismatch in its paths, digests")
    assert "--force" in said


def test_swapped_digests_attach_no_embedding_to_the_wrong_image(
    work: Work, embedded: list[str], tmp_path: Path
) -> None:
    digests = FeatureCache.open(work.cache).rows.digests
    work.data("digests").reshape(-1, 32)[[4, 12]] = digests[[12, 4]]
    assert work.mend().embedded == 0  # files that have not changed since, by size and time, tell their digests
    assert work.is_as_before()

    work.data("digests").reshape(-1, 32)[[4, 12]] = digests[[12, 4]]
    for row, seed in ((20, 8), (4, 9)):  # of these files nothing tells that they are what was embedded
        write_photo(work.photos / work.paths[row], (3, 3, 3), seed)
    report = work.mend()
    assert report.restored_columns == ("digests",)
    assert embedded == [work.paths[row] for row in (4, 20)]
    extract(work.photos, tmp_path / "fresh.h5", TINY)
    mended, fresh = FeatureCache.open(work.cache), FeatureCache.open(tmp_path / "fresh.h5")
    np.testing.assert_array_equal(mended.X, fresh.X)
    for name in ("paths", "digests", "labels", "splits", "sizes"):
        np.testing.assert_array_equal(getattr(mended.rows, name), getattr(fresh.rows, name))


def test_damaged_labels_are_those_of_the_source_and_intact_ones_stay(work: Work) -> None:
    (work.photos / "train" / "blue" / "00.jpg").rename(work.photos / "train" / "red" / "relabelled.jpg")
    work.flip("splits", 30)
    assert work.mend().restored_columns == ("splits",)
    assert work.is_as_before()  # labels are as they were recorded
    work.data("labels")[:] = 0
    assert work.mend().restored_columns == ("labels",)
    mended = FeatureCache.open(work.cache)
    names = [path.split("/")[1] for path in mended.paths]
    names[mended.paths.index("train/blue/00.jpg")] = "red"
    assert [mended.classes[label] for label in mended.y] == names


def test_a_source_with_other_classes_is_refused(work: Work) -> None:
    for name in ("labels", "classes"):
        work.invert(name)
        for split in ("train", "val"):
            (work.photos / split / "red").rename(work.photos / split / "aardvark")
        work.refuses(SourceError, f"gives other {name} than .* had: .*; nothing was changed; .* --force")
        for split in ("train", "val"):
            (work.photos / split / "aardvark").rename(work.photos / split / "red")
        work.mend()
        assert work.is_as_before()


def test_an_intact_row_whose_image_is_gone_stays(work: Work) -> None:
    """Also one that shares nothing but the file with what is damaged."""
    (work.photos / work.paths[2]).unlink()
    work.flip_row(20)
    assert work.mend().embedded == len(range(16, 24))
    assert work.is_as_before()


def test_a_path_is_where_the_content_is(work: Work) -> None:
    """An image moved since, and its path damaged: content leaves no choice, but there is no way back to the old name."""
    row = work.paths.index("val/green/03.jpg")
    for other in (row - 2, row, row + 2):
        work.lose_path(other)
    for number in (1, 3):
        (work.photos / "val" / "green" / f"0{number}.jpg").rename(work.photos / "val" / "green" / f"moved{number}.jpg")
    report = work.mend()
    assert (report.damaged_columns, report.embedded) == (("paths",), 0)
    mended = FeatureCache.open(work.cache)
    names = [mended.paths[other] for other in (row - 2, row, row + 2)]
    assert names == ["val/green/moved1.jpg", "val/green/moved3.jpg", "val/green/05.jpg"]
    work.cache.write_bytes(work.good)
    np.testing.assert_array_equal(mended.X, FeatureCache.open(work.cache).X)


def test_twins_keep_their_labels(work: Work) -> None:
    """Two files of one content, both names damaged: label and split tell which row was which."""
    rows = [work.paths.index(name) for name in ("train/red/01.jpg", "val/blue/twin.jpg")]
    for row in rows:
        work.lose_path(row)
    work.mend()
    assert work.is_as_before()
    for row in rows:
        work.lose_path(row)
    (work.photos / "train" / "red" / "01.jpg").rename(work.photos / "train" / "red" / "elsewhere.jpg")
    work.mend()
    assert [work.paths[row] for row in rows] == ["train/red/elsewhere.jpg", "val/blue/twin.jpg"]


def test_times_of_files_that_were_copied_are_taken_as_they_are(work: Work) -> None:
    work.flip("mtimes", 0)
    for path in work.photos.rglob("*.jpg"):
        os.utime(path, (1.5e9, 1.5e9))
    report = work.mend()
    assert report.damaged_columns == report.restored_columns == ("mtimes",)
    assert (FeatureCache.open(work.cache).rows.mtimes == int(1.5e18)).all()


@pytest.mark.usefixtures("no_model")
def test_a_damaged_checksum_is_told_from_damaged_data(work: Work) -> None:
    for name in ("metadata_crc32", "column_crc32"):
        with h5py.File(work.cache, "r+") as file:
            value = np.array(file.attrs[name])
            value.reshape(-1)[0] ^= 4
            file.attrs.modify(name, value)
        with pytest.raises(DamagedCacheError, match="mismatch in its checksums"):
            FeatureCache.open(work.cache)
        report = repair(work.cache, work.photos / "not even looked at")
        assert (report.damaged, report.damaged_columns, report.restored_columns) == ((), ("checksums",), ())
        assert work.is_as_before()


# ----------------------------------------------------------------------------------------- what stays as it is


def test_an_intact_file_is_left_alone(work: Work, no_model: None) -> None:
    before = work.cache.stat()
    report = repair(work.cache, work.photos / "not even looked at")
    assert (report.damaged, report.damaged_columns, report.embedded) == ((), (), 0)
    assert work.cache.stat() == before
    assert work.is_as_before()


@pytest.mark.parametrize("what", ["spec", "fingerprint", "provenance", "structure", "truncated"])
def test_what_cannot_be_repaired_says_so(work: Work, what: str) -> None:
    data = bytearray(work.good)
    if what == "truncated":
        del data[-1000:]
    elif what == "structure":
        data[60:100] = bytes(40)
    else:
        with h5py.File(work.cache) as file:
            text = file.attrs[what].encode()
        data[data.index(text) + len(text) // 2] ^= 1
    work.cache.write_bytes(data)
    said = work.refuses(CacheError, f"`featcache extract SOURCE -o {work.cache} --force`|is refused")
    assert "--repair" not in said
    assert "repair" in said  # beyond it


@pytest.mark.usefixtures("no_model")
def test_a_file_of_the_first_release(work: Work) -> None:
    """Without checksums of columns: features can be repaired, and the new file has them."""
    with h5py.File(work.cache, "r+") as file:
        del file.attrs["column_crc32"]
    old = work.cache.read_bytes()
    work.flip_row(30)
    work.embed_all()
    work.mend()
    assert work.is_as_before()
    work.cache.write_bytes(old)
    work.flip("labels", 0)
    work.refuses(DamagedCacheError, "beyond repair: checksum mismatch in its metadata")


# ------------------------------------------------------------------------------------------------ interruption


def test_interrupted_and_called_again_goes_on_with_images_that_were_moved(work: Work, embedded: list[str]) -> None:
    """Finished parts are taken over, the other images found by content; old names are for ``extract`` to change."""
    for row in (0, 8, 16):
        work.flip_row(row)
    damaged = work.cache.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        repair(work.cache, work.photos, workers=1, progress=stop_after(16))
    assert work.cache.read_bytes() == damaged
    embedded.clear()
    (work.photos / "val").rename(work.photos / "validation")
    (work.photos / "validation" / "blue" / "03.jpg").rename(work.photos / "train" / "red" / "renamed.jpg")
    write_photo(work.photos / "train" / "red" / "new.jpg", (9, 9, 9), 99)
    report = work.mend()
    assert work.is_as_before()
    assert {"validation/blue/01.jpg", "train/red/renamed.jpg"} <= set(embedded)
    assert report.embedded == len(embedded) == 23 - 16  # of 24 images, two are alike


def test_finished_parts_are_taken_over_and_others_kept(work: Work, no_model: None) -> None:
    """Of this spec by content; what an interrupted ``extract`` had embedded stays for it."""
    work.embed_all()
    folder = work_folder(work.cache)
    more = work.cache.with_name("more.h5")
    old = FeatureCache.open(work.cache)
    rows = cache_format.Rows(**{name: value[:3].copy() for name, value in vars(old.rows).items()})
    rows.digests[0] ^= 1
    write_cache(more, rows, [old.X[:3]], dim=old.dim, spec=old.spec, classes=old.classes)
    more.rename(folder / "1.h5")
    for row in range(37):
        work.flip_row(row)
    report = work.mend()
    assert (report.embedded, report.damaged[-1]) == (0, (32, 37))
    assert work.cache.read_bytes() == work.good
    assert os.listdir(folder) == ["1.h5"]


def test_a_failing_disk_leaves_the_damaged_file(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.flip("labels", 0)
    damaged = work.cache.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError, match="No space left"):
            work.mend()
    assert work.cache.read_bytes() == damaged
    work.mend()
    assert work.is_as_before()


def test_rot_that_goes_on_during_repair_is_noticed(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.flip("labels", 0)
    original = repairing.restore

    def rot(*arguments: object) -> object:
        work.flip_row(11)
        return original(*arguments)

    monkeypatch.setattr(repairing, "restore", rot)
    with pytest.raises(CacheError, match="changed while it was repaired; nothing was changed"):
        work.mend()


def test_a_second_writer_is_turned_away(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.system.workdir.PATIENCE", 0.1)
    work.flip("labels", 0)
    folder = work_folder(work.cache)
    folder.mkdir()
    with filelock.FileLock(folder / "lock"), pytest.raises(StorageError, match="another featcache is writing"):
        work.mend()
    work.mend()
    assert work.is_as_before()


# ------------------------------------------------------------------------------------------------ command line


def test_command_line(work: Work, run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("verify", work.cache) == (0, f"{work.cache}: 37 rows, all intact\n", "")
    assert run("verify", work.cache, "--repair", work.photos)[1].endswith("37 rows, all intact, nothing to repair\n")
    assert json.loads(run("verify", work.cache, "--repair", work.photos, "--json")[1])["embedded"] == 0

    work.flip_row(5)
    work.flip("splits", 2)
    for command in (("verify", work.cache), ("fit-head", work.cache, "-o", work.cache.with_name("m"))):
        code, _, err = run(*command)
        assert (code, err.count("\n")) == (1, 1)
        assert f"`featcache verify {work.cache} --repair SOURCE` mends it" in err
        assert err.index("--repair") < err.index("--force")
    code, out, err = run("verify", work.cache, "--json")
    assert code == 1
    facts = json.loads(out)
    assert facts.pop("error") == {"type": "DamagedCacheError", "message": err[7:-1], "exit_code": 1}
    assert facts == {
        "cache": str(work.cache),
        "rows": 37,
        "damaged": [[0, 8]],
        "damaged_columns": ["splits"],
    }
    assert "checksum mismatch in rows 0-7, splits; " in err

    code, out, err = run("verify", work.cache, "--repair", work.photos / "train")
    assert (code, out, err.count("error: ")) == (1, "", 1)
    work.embed_all()
    with_damage = work.cache.read_bytes()
    code, out, _ = run("verify", work.cache, "--repair", work.photos)
    assert f"damaged were rows 0-7, splits\n  embedded 0 images again, took splits from {work.photos}" in out
    work.cache.write_bytes(with_damage)
    work.embed_all()
    code, out, err = run("verify", work.cache, "--repair", work.photos, "--workers", 1, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts.pop("seconds") > 0
    assert facts == {
        "cache": str(work.cache),
        "rows": 37,
        "damaged": [[0, 8]],
        "damaged_columns": ["splits"],
        "embedded": 0,
        "restored_columns": ["splits"],
    }
    assert work.is_as_before()
    assert run("verify", work.cache)[0] == 0
    assert run("verify", work.cache, "--workers", 2)[0] == 2
    assert run("verify", work.cache, "--repair", work.photos, "--batch-size", "many")[0] == 2


# --------------------------------------------------------------------------------------------- anything at all


def damage_and_mend(work: Work, seed: int) -> bool:
    """Damage a few random places of the file; whether it could be repaired. It is then as before, else unchanged."""
    rng = np.random.default_rng(seed)
    data = bytearray(work.good)
    for _ in range(int(rng.integers(1, 4))):
        length = int(rng.choice([1, 16, 512, 4096]))
        start = int(rng.integers(0, max(1, len(data) - length)))
        kind = rng.integers(3)
        other = int(rng.integers(0, max(1, len(data) - length)))
        data[start : start + length] = (bytes(length), rng.bytes(length), work.good[other : other + length])[kind]
    work.cache.write_bytes(data)
    work.embed_all()
    try:
        work.mend()
    except CacheError:
        assert work.cache.read_bytes() == bytes(data), f"seed {seed}"
        return False
    intact = (bytes(data), work.good)
    assert work.cache.read_bytes() in intact, f"seed {seed}"  # as it was, if what was hit is read by nobody
    FeatureCache.open(work.cache).check_features()
    return True


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(1000, 3000), marks=pytest.mark.soak)])
@pytest.mark.usefixtures("no_model")
def test_any_damage_is_repaired_or_refused(work: Work, seeds: range) -> None:
    repaired = [damage_and_mend(work, seed) for seed in seeds]
    print(f"{sum(repaired)} of {len(repaired)} repaired")
    assert len(seeds) / 4 < sum(repaired) < len(seeds)
