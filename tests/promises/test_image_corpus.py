"""Every image of a corpus ends embedded, as itself, or refused with a reason: alone, and through the whole program."""

import collections
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import corpus
import damage
import numpy as np
import pytest
from conftest import TINY, TINY_FLAGS, settle
from corpus import Case
from decode_apart import Outcome, decode_apart

from featcache.cache.cache import FeatureCache
from featcache.extraction.extract import extract
from featcache.images.source import list_images

Run = Callable[..., tuple[int, str, str]]
Cases = Sequence[tuple[int, Case]]  # with their seed
SEEDS = range(100, 120)  # of the large version
_SECONDS = 20  # for one file; the slowest takes a fraction of that
_MEGABYTES = 900  # at the peak, of the small version
# libtiff and Pillow's log write to stderr on their own; what must not be there is a warning or a traceback.
_LEAK = re.compile(r"Warning|Traceback|Fatal|Timeout")


def draw(seed: int, *, damaged: int) -> Cases:
    """Everything that a seed gives, ``damaged`` images of it by chance."""
    whole = corpus.intact(seed)
    return [(seed, case) for case in (*whole, *damage.odd(seed), *damage.damaged(whole, damaged, seed))]


def close(pixels: np.ndarray | None, case: Case) -> bool:
    """Whether these are the intact image's pixels: exactly, if its format keeps them."""
    if pixels is None or case.pixels is None or pixels.shape != case.pixels.shape:
        return False
    apart = np.abs(pixels.astype(int) - case.pixels)
    return bool(apart.mean() <= case.near and (case.near >= 1 or apart.max() <= 2 * case.near))


def fault(case: Case, outcome: Outcome, intact: dict[str, np.ndarray | None]) -> str:
    """What is wrong with an outcome; empty if nothing is."""
    embedded = outcome.shape is not None
    if embedded == bool(outcome.reason):
        return f"neither embedded nor refused: {outcome.shape}, {outcome.reason!r}"
    if not outcome.agrees:
        return f"the two decoders differ ({outcome.shape}, {outcome.reason!r})"
    words = re.search("[a-z]{3} [a-z]", outcome.reason.removeprefix("damaged: ").lower())
    if "memory" in outcome.reason or (outcome.reason and not words):
        return f"no fit reason: {outcome.reason!r}"
    if case.fate == "embedded" and not embedded:
        return f"refused: {outcome.reason}"
    if case.fate == "refused" and (embedded or not re.search(case.reason, outcome.reason)):
        return f"expected a refusal for {case.reason!r}, found {outcome.shape}, {outcome.reason!r}"
    if embedded and case.fate == "embedded" and not close(outcome.pixels, case):
        return "other pixels than those it was made of"
    whole = intact.get(case.name.split(" cut at ")[0])
    if embedded and case.fate == "cut":
        same = np.array_equal(outcome.pixels, whole) if whole is not None else close(outcome.pixels, case)
        return "" if same or blameless(case, outcome.pixels, whole) else "cut, embedded, and not all its pixels"
    return ""


def blameless(case: Case, pixels: np.ndarray | None, whole: np.ndarray | None) -> bool:
    """The cuts that nothing can notice, as ``featcache.images.jpeg`` and ``featcache.images.integrity`` list them."""
    if pixels is None or whole is None or pixels.shape != whole.shape:
        return False
    if " plain" in case.name and case.suffix != ".jpg":  # the last number lost a digit
        return bool((pixels != whole).any(axis=2).sum() <= 1)
    # libjpeg reads ahead: the last few blocks before a marker, or of a scan that only refines, whose end is then near
    near_end = re.search(rb"\xff[^\0]", case.whole[max(case.at - 1, 0) : case.at + 18])
    return case.suffix == ".jpg" and bool(near_end) and np.abs(pixels.astype(int) - whole).mean() < 4


def decode_all(cases: Cases) -> list[Outcome]:
    """The outcomes of all cases, which must be right."""
    outcomes, errors = decode_apart([case.data for _, case in cases], seconds=_SECONDS)
    if len(outcomes) < len(cases):
        seed, case = cases[len(outcomes)]
        pytest.fail(f"seed {seed}: the process ended at {case.name!r}: {errors[-2000:]}")
    faults = [line for line in errors.splitlines() if _LEAK.search(line)]
    intact: dict[str, np.ndarray | None] = {}  # in the order of the list, whole files come before their pieces
    for (seed, case), outcome in zip(cases, outcomes, strict=True):
        if case.fate == "embedded":
            intact.setdefault(case.name, outcome.pixels)
        if found := fault(case, outcome, intact):
            faults.append(f"seed {seed}: {case.name}: {found}")
    assert not faults, f"{len(faults)} of {len(cases)}:\n" + "\n".join(faults[:40])
    return outcomes


@pytest.fixture(scope="module")
def small() -> tuple[Cases, list[Outcome]]:
    """The small version: its cases, and what became of them."""
    cases = draw(0, damaged=920)
    return cases, decode_all(cases)


def test_every_image_is_decoded_as_itself_or_refused(small: tuple[Cases, list[Outcome]]) -> None:
    _, outcomes = small
    assert len(outcomes) > 1150
    assert max(outcome.megabytes for outcome in outcomes) < _MEGABYTES
    embedded = sum(outcome.shape is not None for outcome in outcomes)
    assert 300 < embedded < 700  # neither way is the easy way out


# ------------------------------------------------------------------------------------- through the whole program


def write(cases: Cases, root: Path) -> list[str]:
    """One file per case, in two classes; the paths, in the order in which they are listed."""
    paths = []
    for number, (_, case) in enumerate(cases):
        path = Path("ab"[number % 2]) / f"{number:05d}{case.suffix}"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(case.data)
        settle(root / path)  # times are believed from the first run on
        paths.append(path.as_posix())
    return sorted(paths)


def check_cache(cache: FeatureCache, paths: Sequence[str], report: dict) -> None:
    """Counts add up, the order is the list's, and every refusal has a reason."""
    refused = dict(cache.refused)
    assert report["images"] == len(paths) == report["embedded"] + report["refused"] + report["reused"]
    assert len(cache) == report["embedded"]
    assert len(refused) == len(cache.refused) == report["refused"]
    assert list(cache.paths) == [path for path in paths if path not in refused]
    assert set(refused) <= set(paths)
    assert all(reason.strip() and "\n" not in reason for reason in refused.values())
    assert np.isfinite(cache.X).all()


def check_rows(cache: FeatureCache, root: Path, count: int, folder: Path) -> None:
    """So many rows are, to the bit, what their images get when they are alone in the world."""
    listed = dataclasses.replace(list_images(root, labelled=False), refused=())
    for row in np.random.default_rng(0).permutation(len(cache))[:count].tolist():
        alone = listed.take(np.array([listed.paths.index(cache.paths[row])]))
        extract(alone, folder / f"alone{row}.h5", TINY)
        np.testing.assert_array_equal(FeatureCache.open(folder / f"alone{row}.h5").X[0], cache.X[row], cache.paths[row])


def embed_and_check(cases: Cases, outcomes: Sequence[Outcome], folder: Path, run: Run, *, alone: int) -> None:
    """Through the command line: the same files embedded as decoded alone; ``alone`` so many rows are embedded alone, too."""
    paths = write(cases, folder / "corpus")
    arguments = ("extract", folder / "corpus", "-o", folder / "f.h5", *TINY_FLAGS)
    code, out, errors = run(*arguments, "--json")
    report = json.loads(out.splitlines()[-1])
    assert not _LEAK.search(errors), errors
    refused = sum(outcome.shape is None for outcome in outcomes)
    assert (code, report["refused"]) == (3, refused), "seed of all: " + str(cases[0][0])
    cache = FeatureCache.open(folder / "f.h5")
    check_cache(cache, paths, report)
    reasons = {path: outcomes[int(path[2:7])].reason for path in paths}
    assert dict(cache.refused) == {path: reason for path, reason in reasons.items() if reason}
    before = (folder / "f.h5").read_bytes()
    assert run(*arguments, "--max-bad", 1)[0] == 0
    assert (folder / "f.h5").read_bytes() == before  # the same order, the same refusals
    check_rows(cache, folder / "corpus", alone, folder)


def test_the_program_embeds_what_can_be_decoded(tmp_path: Path, run: Run, small: tuple[Cases, list[Outcome]]) -> None:
    cases, outcomes = small
    embed_and_check(cases[::5], outcomes[::5], tmp_path, run, alone=2)


def test_exit_codes_of_all_and_nothing(tmp_path: Path, run: Run) -> None:
    whole = [(0, case) for case in corpus.intact(0)][::8]
    write(whole, tmp_path / "whole")
    code, out, _ = run("extract", tmp_path / "whole", "-o", tmp_path / "f.h5", *TINY_FLAGS, "--json")
    assert (code, json.loads(out)["refused"]) == (0, 0)
    write([(0, case) for case in damage.odd(0) if case.fate == "refused"], tmp_path / "bad")
    code, out, errors = run("extract", tmp_path / "bad", "-o", tmp_path / "g.h5", *TINY_FLAGS, "--json")
    assert (code, json.loads(out)["error"]["type"]) == (1, "SourceError")
    assert "were refused, the first" in errors
    assert not (tmp_path / "g.h5").exists()


# ------------------------------------------------------------------------------------------------- large versions


def kinds(outcomes: Sequence[Outcome]) -> str:
    """How many were embedded, and refused for which reasons; the slowest and the hungriest."""
    reasons = collections.Counter(re.sub(r"\d+|b'.*'", "N", outcome.reason)[:60] or "embedded" for outcome in outcomes)
    lines = [f"{count:6d} {reason}" for reason, count in reasons.most_common(30)]
    slowest = max(range(len(outcomes)), key=lambda index: outcomes[index].seconds)
    lines.append(f"slowest: number {slowest}, {outcomes[slowest].seconds:.2f} s")
    lines.append(f"peak memory: {max(outcome.megabytes for outcome in outcomes)} MB")
    return "\n".join(lines)


@pytest.mark.soak
def test_many_images(tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    cases = [case for seed in SEEDS for case in draw(seed, damaged=720)]
    outcomes = []
    for seed in SEEDS:
        found = decode_all([case for case in cases if case[0] == seed])
        outcomes += [dataclasses.replace(outcome, pixels=None) for outcome in found]
    with capfd.disabled():
        print(f"\n{kinds(outcomes)}")
    assert len(outcomes) >= 20_000
    embed_and_check(cases[::4], outcomes[::4], tmp_path, run, alone=60)


def fetch_pillow(folder: Path) -> Path:
    """The installed Pillow's test images, out of its source distribution; skips the test where there is none to be had."""
    wanted = f"pillow=={metadata.version('pillow')}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", wanted, "-d", str(folder)]
    fetched = subprocess.run(command, capture_output=True, text=True, timeout=900)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"the source of {wanted} cannot be fetched: {(fetched.stderr.splitlines() or ['?'])[-1]}")
    subprocess.run(["tar", "xzf", str(archives[0]), "-C", str(folder)], check=True)
    return next(folder.glob("*/Tests/images"))


@pytest.mark.soak
def test_pillows_own_images(tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    source = fetch_pillow(tmp_path)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    outcomes, errors = decode_apart(files, seconds=60)
    assert len(outcomes) == len(files), f"the process ended at {files[len(outcomes)]}: {errors[-2000:]}"
    with capfd.disabled():
        print(f"\n{kinds(outcomes)}")
    assert not [line for line in errors.splitlines() if _LEAK.search(line)]
    assert not [file.name for file, outcome in zip(files, outcomes, strict=True) if not outcome.agrees]
    listed = list_images(source, labelled=False)
    code, out, _ = run("extract", source, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--json")
    report = json.loads(out)
    assert code == 3
    cache = FeatureCache.open(tmp_path / "f.h5")
    skipped = [refusal.path for refusal in listed.refused]
    check_cache(cache, sorted([*listed.paths, *skipped]), report)
    known = {file.relative_to(source).as_posix(): outcome for file, outcome in zip(files, outcomes, strict=True)}
    assert {path for path in listed.paths if known[path].reason} == set(dict(cache.refused)) - set(skipped)
    check_rows(cache, source, 40, tmp_path)
