"""Several at once: writers and readers of the same files, and folders that change under a running extraction.

In: real processes, brought to the interesting moment by a gate. Out: whatever is read is one complete version, whatever is
refused is refused for a reason that is true, and every row is about the bytes that were embedded. By default each once;
``slow``: with two workers, with other time stamps.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import plain_rows, save_head
from conftest import COLOURS, SPEC, TINY_FLAGS, make_photos, write_photo
from faults import Program, before_next
from test_same_result import assert_same

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Provenance, Rows
from featcache.cache.write import write_cache
from featcache.errors import CacheError, FeatcacheError, ModelError
from featcache.heads.head import Head
from featcache.models.model import load_model
from featcache.models.predict import predict
from featcache.system import files as publish

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and held on Linux only")
REFUSAL = "another featcache is writing"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("concurrent") / "photos", settled=True)


@pytest.fixture(scope="module")
def whole(photos: Path, warm: Program) -> FeatureCache:
    """What a single writer makes of the photos."""
    warm.check("extract", photos, "-o", photos.parent / "whole.h5", *TINY_FLAGS)
    return FeatureCache.open(photos.parent / "whole.h5")


# ------------------------------------------------------------------------------------------------- two writers


def test_a_second_writer_is_refused_and_the_first_unharmed(
    photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program
) -> None:
    command = ("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS)
    with warm.held("extraction.extract.pack", *command) as first:
        second = warm.run(*command, settings={"system.workdir.PATIENCE": 0.3})
    assert (second.code, second.out) == (1, "")
    assert second.err.endswith(f"\nerror: {REFUSAL} {tmp_path / 'f.h5'}; wait for it, or choose another -o\n")
    assert second.seconds > 0.3
    assert first.result().code == 0, first.result().err
    assert_same(tmp_path / "f.h5", whole)
    assert not (tmp_path / "f.h5.parts").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_writer_takes_over_from_one_that_ends(
    photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, killed: bool
) -> None:
    """Whether it ends well or is killed while it holds the lock; what it has finished is not done again."""
    command = ("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--json")
    patient = {"system.workdir.PATIENCE": 60}
    with (
        warm.held("extraction.extract.pack", *command, die=killed) as first,
        warm.held("system.workdir.sync_folder", *command, settings=patient) as second,  # the last step before the lock
    ):
        pass
    assert first.result().code == (-signal.SIGKILL if killed else 0)
    assert second.result().code == 0, second.result().err
    assert (second.result().result["embedded"], second.result().result["reused"]) == (0, 18)
    assert_same(tmp_path / "f.h5", whole)


@pytest.mark.parametrize("rounds", [3, pytest.param(150, marks=pytest.mark.soak)])
def test_writers_in_a_race(photos: Path, tmp_path: Path, warm: Program, rounds: int) -> None:
    """Three at a time, as soon as they can; in every round one image is another one."""
    source, output = tmp_path / "p", tmp_path / "f.h5"
    shutil.copytree(photos, source)
    command = ("extract", source, "-o", output, *TINY_FLAGS, "--json")
    for number in range(rounds):
        write_photo(source / "red" / "00.jpg", COLOURS["red"], 1000 + number)
        with ThreadPoolExecutor(3) as threads:
            running = [
                threads.submit(warm.run, *command, settings={"system.workdir.PATIENCE": patience})
                for patience in (0.0, 0.05, 60.0)
            ]
        ended = [entry.result() for entry in running]
        for outcome in ended:
            assert outcome.code == 0 or (outcome.code == 1 and REFUSAL in outcome.err), (number, outcome)
        assert ended[-1].code == 0, (number, ended[-1].err)  # it had the time to wait
        embedded = [outcome.result["embedded"] for outcome in ended if outcome.code == 0]
        assert sum(embedded) == (1 if number else 18), (number, embedded)
        cache = FeatureCache.open(output)
        expected = [hashlib.sha256((source / path).read_bytes()).digest() for path in cache.paths]
        assert (len(cache), list(map(bytes, cache.rows.digests))) == (18, expected), number
        assert cache.verify() == []
    warm.check("extract", source, "-o", tmp_path / "whole.h5", *TINY_FLAGS)
    assert_same(output, FeatureCache.open(tmp_path / "whole.h5"))


# ------------------------------------------------------------------------------- versions that replace one another


def write_version(folder: Path, version: int) -> None:
    """A cache and a model all of whose values say which version they are of; neighbouring versions differ in size."""
    n = rows_of(version)
    rows = plain_rows(
        (f"{version}/{row}.jpg" for row in range(n)),
        labels=np.arange(n, dtype=np.int32) % 2,
        digests=np.full((n, 32), version % 251, np.uint8),
        sizes=np.full(n, version),
        mtimes=np.full(n, version),
    )
    features = np.full((n, 4), version, np.float16)
    provenance = Provenance(rest={"version": version})
    write_cache(folder / "f.h5", rows, [features], dim=4, spec=SPEC, classes=("a", "b"), provenance=provenance)
    write_model(folder / "m", version)


def rows_of(version: int) -> int:
    return 3 + version * 7919 % 3000


def write_model(path: Path, version: int) -> None:
    classes = tuple(f"{version}-{number}" for number in range(2 + version % 3))
    layer = np.full((len(classes), 4), version, np.float32), np.full(len(classes), version, np.float32)
    save_head(path, Head("linear", "none", np.zeros(4), np.ones(4), (layer,)), classes, version)


def check_cache_version(cache: FeatureCache) -> None:
    """Everything that it shows is of one version."""
    version, n = cache.provenance.rest["version"], rows_of(cache.provenance.rest["version"])
    assert (len(cache), cache.paths[0], cache.paths[-1]) == (n, f"{version}/0.jpg", f"{version}/{n - 1}.jpg")
    assert {*cache.rows.sizes.tolist(), *cache.rows.mtimes.tolist()} == {version}
    for features in (cache.X, cache.take(np.arange(n)[::-1]), *cache.blocks(np.arange(n), size=1000)):
        assert set(features.reshape(-1).tolist()) == {version}, version
    assert cache.verify() == []


def check_model_version(folder: Path) -> None:
    model = load_model(folder / "m")
    version = model.manifest["training"]["number"]
    assert model.classes == tuple(f"{version}-{number}" for number in range(2 + version % 3))
    assert {*model.head.layers[0][0].reshape(-1).tolist(), *model.head.layers[0][1].tolist()} == {version}
    rows = list(predict(model, [folder / "f.h5"]))
    versions = {row.path.split("/")[0] for row in rows}
    assert len(versions) == 1 and len(rows) == rows_of(int(versions.pop()))


def write_versions(folder: str, versions: range, exchange: bool = True) -> None:
    """One version after the other; without ``exchange`` as where folders cannot change their names in one step."""
    if not exchange:
        publish._exchange = lambda *_: False  # type: ignore[assignment]
    for version in versions:
        write_version(Path(folder), version)
    (Path(folder) / f"{versions.start} is done").touch()


def read_versions(folder: str) -> dict[str, int]:
    """Read until two writers are done: how often, and every error with how often it came."""
    seen: collections.Counter[str] = collections.Counter()
    root = Path(folder)
    while len(list(root.glob("* is done"))) < 2 or not seen["cache"]:
        for name, read in (
            ("cache", lambda: check_cache_version(FeatureCache.open(root / "f.h5"))),
            ("model", lambda: check_model_version(root)),
        ):
            try:
                read()
                seen[name] += 1
            except FeatcacheError as error:
                seen[str(error)] += 1
    return dict(seen)


def write_and_read(folder: Path, warm: Program, versions: int, *, readers: int, exchange: bool = True) -> list[Any]:
    """Two write caches and models under the same names, as others read them: what these have seen."""
    hooks = [functools.partial(write_versions, str(folder), range(n, versions, 2), exchange) for n in (1, 2)]
    hooks += [functools.partial(read_versions, str(folder))] * readers
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(warm.check, before=hook, timeout=7200) for hook in hooks]
    results = [entry.result().result for entry in running]
    check_model_version(folder)
    assert sorted(os.listdir(folder)) == ["1 is done", "2 is done", "f.h5", "m"]
    return results[2:]


@pytest.mark.parametrize("versions", [60, pytest.param(2000, marks=pytest.mark.soak)])  # half precision counts to 2,048
def test_readers_meet_writers(tmp_path: Path, warm: Program, versions: int) -> None:
    """Every read is of one version, or is told the truth."""
    write_version(tmp_path, 1)
    allowed = {
        "cache",
        "model",
        f"{tmp_path / 'f.h5'} was replaced or changed since it was opened; run the command again",
        f"{tmp_path / 'f.h5'} ends too early: it was cut off or replaced since it was opened; run the command again",
    }
    for seen in write_and_read(tmp_path, warm, versions, readers=2):
        assert set(seen) <= allowed, seen
        assert seen["cache"] > 5 and seen["model"] > 5, seen
    check_cache_version(FeatureCache.open(tmp_path / "f.h5"))
    assert sorted(os.listdir(tmp_path / "m")) == ["README.md", "head.safetensors", "metrics.json", "model.json"]


@pytest.mark.parametrize("exchange", [True, False])
def test_two_writers_of_models_at_the_same_moments(tmp_path: Path, warm: Program, exchange: bool) -> None:
    write_and_read(tmp_path, warm, 40, readers=0, exchange=exchange)


@pytest.mark.parametrize("versions", [(1, 2), (2, 1)])
@pytest.mark.parametrize(
    "moment",
    ["cache.cache.identity_of", "cache.cache._read", "cache.format.metadata_checksum", "cache.cache.FeatureReader"],
)
def test_a_cache_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, versions: tuple[int, int]
) -> None:
    """At whichever moment: opening gives one version, and reading on what was replaced says that it was."""
    write_version(tmp_path, versions[0])
    before_next(moment, lambda: write_version(tmp_path, versions[1]), patch=monkeypatch.setattr)
    cache = FeatureCache.open(tmp_path / "f.h5")
    for read in (lambda: cache.X, cache.verify):
        if moment == "cache.cache.FeatureReader":
            with pytest.raises(CacheError, match=r"was (cut off or )?replaced .*since it was opened"):
                read()
        else:
            read()
    if moment != "cache.cache.FeatureReader":
        check_cache_version(cache)
    check_cache_version(FeatureCache.open(tmp_path / "f.h5"))


@pytest.mark.parametrize(
    "moment", ["backbones.saved.parse_json", "backbones.saved.fingerprint_of", "backbones.saved.Spec.from_json"]
)
def test_a_model_replaced_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    write_version(tmp_path, 1)
    before_next(moment, lambda: write_version(tmp_path, 4), patch=monkeypatch.setattr)  # as many classes
    check_model_version(tmp_path)


def test_a_model_replaced_before_its_backbone_is_loaded(tmp_path: Path) -> None:
    write_model(tmp_path / "m", 1)
    model = load_model(tmp_path / "m")
    with pytest.raises(ModelError, match="can label caches, not images"):
        model.load_backbone()
    write_model(tmp_path / "m", 2)
    with pytest.raises(ModelError, match="was replaced since it was loaded; run the command again"):
        model.load_backbone()


@pytest.mark.parametrize("moment", ["system.files.sync_folder", "system.files._exchange", "system.files.Path.rename"])
@pytest.mark.parametrize("there", [False, True])
def test_two_models_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, there: bool) -> None:
    """The other one comes first by an instant: the later replaces it, whole."""
    if there:
        write_model(tmp_path / "m", 3)
    before_next(moment, lambda: write_model(tmp_path / "m", 4), patch=monkeypatch.setattr)
    write_model(tmp_path / "m", 1)
    assert load_model(tmp_path / "m").manifest["training"] == {"number": 1}
    assert os.listdir(tmp_path) == ["m"]


def test_a_temporary_folder_that_is_swept_away_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_next("system.files.os.open", lambda: publish.sweep(tmp_path), patch=monkeypatch.setattr)
    write_model(tmp_path / "m", 1)
    assert load_model(tmp_path / "m").manifest["training"] == {"number": 1}
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("command", ["fit-head", "predict"])
def test_two_commands_write_one_name_at_the_same_moment(tmp_path: Path, warm: Program, command: str) -> None:
    write_version(tmp_path, 1)
    if command == "fit-head":
        output, moment = tmp_path / "new", "system.files.sync_folder"
        ways = [("fit-head", tmp_path / "f.h5", "-o", output, "--C", c, "--folds", "0") for c in (1, 50)]
    else:
        output, moment = tmp_path / "new.csv", "reports.predictions_table.write_rows"
        ways = [
            ("predict", tmp_path / "m", tmp_path / "f.h5", "-o", output, "--overwrite", "--top-k", k) for k in (1, 2)
        ]
    alone = [_content(warm, way, output) for way in ways]
    with warm.held(moment, *ways[0]) as first, warm.held(moment, *ways[1]) as second:
        pass
    for entry in (first, second):
        assert entry.result().code == 0, entry.result().err
    assert _read(output) in alone
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def _content(warm: Program, command: tuple[object, ...], output: Path) -> dict[str, bytes]:
    warm.check(*command)
    content = _read(output)
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    return content


def _read(output: Path) -> dict[str, bytes]:
    """Name -> content of a file, or of the files in a folder."""
    files = sorted(output.iterdir()) if output.is_dir() else [output]
    return {file.name: file.read_bytes() for file in files}


# ---------------------------------------------------------------------------------------- the same part, twice


@pytest.mark.parametrize("other_times", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_part_twice(
    photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, other_times: bool
) -> None:
    """As if two runs, or two machines, had done the same work: one row per image."""
    folder = tmp_path / "f.h5.parts"
    folder.mkdir()
    for number, chosen in enumerate((range(18), range(18), range(4, 9), range(0, 18, 3))):
        rows = np.array(chosen)
        columns = {field.name: getattr(whole.rows, field.name)[rows] for field in dataclasses.fields(Rows)}
        columns["mtimes"] = np.full(len(rows), number if other_times else 10**18)
        facts = {"spec": whole.spec, "classes": whole.classes, "provenance": whole.provenance}
        write_cache(folder / f"{number}.h5", Rows(**columns), [whole.X[rows]], dim=whole.dim, **facts)
    shutil.copy(folder / "0.h5", folder / "9.h5")
    done = warm.check("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--json")
    assert (done.result["embedded"], done.result["reused"]) == (0, 18)
    assert_same(tmp_path / "f.h5", whole)
    assert not folder.exists()


# ------------------------------------------------------------------------- a folder that changes during extraction

_CHANGES = ("added", "removed", "other content", "renamed", "exchanged", "regrown", "pipe", "folder", "dangling link")


def change_folder(root: Path, kind: str, name: str) -> None:
    """Do one thing to ``root/NAME.jpg``."""
    path = root / f"{name}.jpg"
    if kind == "added":
        write_photo(root / f"{name}-new.jpg", (9, 9, 200), 77)
    elif kind == "renamed":
        path.rename(root / f"{name}-renamed.jpg")
    elif kind == "exchanged":
        other = next(entry for entry in sorted(path.parent.iterdir()) if entry.is_file() and entry != path)
        path.rename(path.with_name("x"))
        other.rename(path)
        path.with_name("x").rename(other)
    elif kind in ("other content", "regrown"):
        size = path.stat().st_size
        with path.open("r+b") as file:  # in place, as an editor or a copy does
            file.truncate(0)
            file.write(write_photo(root.parent / "other.jpg", (200, 200, 0), len(name) + size).read_bytes())
            if kind == "regrown":
                file.truncate(size)
    else:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "dangling link":
            path.symlink_to("nowhere")


def watch_and_change(root: str, log: str, trigger: str, nth: int, names: dict[str, str], when: str) -> None:
    """Keep a copy and a note of all that is read; when the trigger is read for the nth time, change the folder.

    That is before, while (between its first byte and its last) or after it is read, and before it is decoded.
    """
    from featcache.images import read as reading

    original, status, read_before = reading.read_file, os.fstat, []

    def change(*_: object) -> None:
        os.fstat = status
        for kind, name in names.items():
            change_folder(Path(root), kind, name)

    def read(path: Path) -> tuple[bytes, int, int]:
        name = os.path.relpath(path, root)
        read_before.append(name)
        now = when if name == trigger and read_before.count(name) == nth else ""
        if now == "before":
            change()
        if now == "while":
            calls = iter((status, lambda file: (change(), status(file))[1]))  # before and after reading
            os.fstat = lambda file: next(calls)(file)  # type: ignore[assignment]
        data, size, mtime = original(path)
        if now == "after":
            change()
        digest = hashlib.sha256(data).hexdigest()
        Path(log, f"{digest}.jpg").write_bytes(data)
        with Path(log, "notes").open("a") as file:
            file.write(f"{name}\t{digest}\n")
        return data, size, mtime

    reading.read_file = read


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_that_changes_during_the_run(tmp_path: Path, warm: Program, workers: int) -> None:
    """Every row is about the bytes that were embedded, under a path that had them; the next run makes it right."""
    names = {kind: f"green/{number:02d}" for number, kind in enumerate(_CHANGES)}
    refused = run_while_it_changes(tmp_path, warm, ("green/04.jpg", 1), names, "before", workers)
    if workers == 1:  # those before it were embedded already, and the list was made before that
        reasons = ["not a regular file", "not a regular file", "cannot be read: No such file or directory"]
        assert [refused[f"green/{number:02d}.jpg"] for number in (6, 7, 8)] == reasons
    again = run_again(tmp_path, warm)
    assert 0 < again["embedded"] < 8, again


@pytest.mark.parametrize("when", ["while", "after"])
def test_a_file_that_changes_while_it_is_embedded(tmp_path: Path, warm: Program, when: str) -> None:
    names = {"other content": "blue/03"}
    refused = run_while_it_changes(tmp_path, warm, ("blue/03.jpg", 2), names, when, workers=1)
    assert refused == ({"blue/03.jpg": "changed while it was read"} if when == "while" else {})
    assert run_again(tmp_path, warm)["embedded"] == 1


def run_while_it_changes(
    folder: Path, warm: Program, trigger: tuple[str, int], names: dict[str, str], when: str, workers: int
) -> dict[str, str]:
    """What was refused. Everything else is compared with what was read."""
    root, log = make_photos(folder / "p", each=10, settled=True), folder / "read"
    log.mkdir()
    before = {path: path.lstat() for path in root.rglob("*")}
    hook = functools.partial(watch_and_change, str(root), str(log), *trigger, names, when)
    options = (*TINY_FLAGS, "--max-bad", 1, "--workers", workers, "--json")
    done = warm.check("extract", root, "-o", folder / "f.h5", *options, before=hook)
    changed = [path for path, status in before.items() if not path.exists() or path.lstat() != status]
    assert len(changed) >= len(names), changed
    assert done.result["images"] == done.result["embedded"] + done.result["refused"] == 30
    cache = FeatureCache.open(folder / "f.h5")
    check_against_what_was_read(cache, log, warm)
    return dict(cache.refused)


def run_again(folder: Path, warm: Program) -> dict[str, Any]:
    """Bring the cache up to date, and compare it with one that is made from nothing."""
    options = (*TINY_FLAGS, "--max-bad", 1, "--json")
    again = warm.check("extract", folder / "p", "-o", folder / "f.h5", *options).result
    warm.check("extract", folder / "p", "-o", folder / "fresh.h5", *options)
    assert_same(folder / "f.h5", FeatureCache.open(folder / "fresh.h5"))
    return again


def check_against_what_was_read(cache: FeatureCache, log: Path, warm: Program) -> None:
    """Embed the noted bytes alone, and compare."""
    notes = {tuple(line.split("\t")) for line in (log / "notes").read_text().splitlines()}
    (log / "notes").unlink()
    warm.check("extract", log, "-o", log.with_suffix(".h5"), *TINY_FLAGS, "--max-bad", 1)
    oracle = FeatureCache.open(log.with_suffix(".h5"))
    at = {path.removesuffix(".jpg"): row for row, path in enumerate(oracle.paths)}
    for path, digest, row in zip(cache.paths, cache.rows.digests, cache.X, strict=True):
        assert (path, bytes(digest).hex()) in notes, path
        np.testing.assert_array_equal(row, oracle.X[at[bytes(digest).hex()]], path)


@pytest.mark.parametrize("moment", ["extraction.job.load_requested", "extraction.job._compare_with_full_scale"])
def test_weights_that_are_replaced_during_the_run(
    photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program, moment: str
) -> None:
    """Whichever file was read, a cache never says that it was made with the other."""
    from safetensors.numpy import load_file, save_file

    weights, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    shutil.copy(next(photos.parent.glob("whole.h5.*.safetensors")), weights)
    tensors = load_file(weights)
    save_file({name: value * np.float32(1.25) for name, value in tensors.items()}, other)
    flags = [weights if part == "none" else part for part in TINY_FLAGS]
    original = weights.read_bytes()
    command = ("extract", photos, "-o", tmp_path / "f.h5", *flags)
    with warm.held(moment, *command) as running:
        shutil.copy(other, weights)
    done = running.result()
    if moment == "extraction.job.load_requested":  # after its sha256 was noted, before it is read
        assert (done.code, done.err.splitlines()[-1]) == (
            1,
            "error: the weights of squeezenet1_1 changed while they were read; run the command again",
        )
        assert not (tmp_path / "f.h5").exists()
    else:
        assert done.code == 0, done.err
    weights.write_bytes(original)
    warm.check(*command)
    assert_same(tmp_path / "f.h5", whole)
    shutil.copy(other, weights)
    refused = warm.run(*command)
    assert refused.code == 1 and "another spec (backbone.weights_sha256" in refused.err


def test_a_csv_that_changes_during_the_run(photos: Path, whole: FeatureCache, tmp_path: Path, warm: Program) -> None:
    """It counts as it was when it was read; the next run follows the new one, without embedding anything again."""
    shutil.copytree(photos, tmp_path / "p")
    source, names = tmp_path / "p" / "list.csv", [*whole.paths]
    source.write_text("path,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in names))
    command = ("extract", source, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--json")
    with warm.held("backbones.embedder.embed", *command) as running:
        rows = [f"{name},{'ab'[row % 2]}\n" for row, name in enumerate(names[::-1])]
        source.write_text("path,label\n" + "".join(rows))
    assert running.result().code == 0, running.result().err
    assert_same(tmp_path / "f.h5", whole)
    assert warm.check(*command).result["embedded"] == 0
    cache = FeatureCache.open(tmp_path / "f.h5")
    assert (cache.paths, cache.classes, cache.y.tolist()) == (tuple(names[::-1]), ("a", "b"), [0, 1] * 9)
    np.testing.assert_array_equal(cache.X, whole.X[::-1])
