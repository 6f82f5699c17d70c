"""Are edited copies found across splits, and how long does it take, beside cleanlab and perceptual hashes?

    python benchmarks/audit_copies.py FOLDER... [--weights FILE] [--seeds 5] [--share 0.2] [--digits] [--sizes 10000x1280 100000x384]

FOLDER holds split folders of class folders. For each seed, edited copies of a fifth as many images as there are, drawn from the
first split, are planted in the last one: resized to 50-200 %, saved anew at JPEG quality 30-90, cropped to 90-98 % of each side,
mirrored, darker or brighter, rotated by 1-5 degrees, with a watermark, with a border; half of them by one of these, the others by
two or three. All ways see the same pairs. Hashes: ImageHash, all pairs at a distance of at most 10 of 64 bits. cleanlab: Datalab's
near duplicates from the same embeddings, at its defaults. Precision and recall count pairs, planted ones are the truth. The
untouched set is searched too: what is flagged there is to be looked at. ``--digits``: scikit-learn's digits as images, untouched.
``--sizes``: rows x values of random vectors around 1,000 centres, for the time and memory of neighbours and groups.
"""

import argparse
import contextlib
import io
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from facts import machine_facts
from limits import embed_digits
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from featcache.cache.cache import FeatureCache
from featcache.curation.near_copies import NearCopies, find_near_copies
from featcache.curation.neighbours import estimate, nearest_rows
from featcache.curation.pixel_check import PixelCheck
from featcache.extraction.extract import extract

KINDS = ("resized", "recompressed", "cropped", "mirrored", "brightness", "rotated", "watermark", "border")
HASH_BITS = 10  # of 64, at most, between the hashes of copies
Pairs = set[tuple[int, int]]


def edited(image: Image.Image, kinds: list[str], rng: np.random.Generator) -> bytes:
    """An image, edited and saved as JPEG."""
    quality = 92
    for kind in kinds:
        width, height = image.size
        if kind == "resized":
            factor = 2 ** rng.uniform(-1, 1)
            image = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
        elif kind == "recompressed":
            quality = int(rng.integers(30, 91))
        elif kind == "cropped":
            share = rng.uniform(0.9, 0.98)
            w, h = round(width * share), round(height * share)
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            image = image.crop((x, y, x + w, y + h))
        elif kind == "mirrored":
            image = ImageOps.mirror(image)
        elif kind == "brightness":
            image = ImageEnhance.Brightness(image).enhance(rng.choice([rng.uniform(0.6, 0.85), rng.uniform(1.15, 1.4)]))
        elif kind == "rotated":
            fill = (int(rng.choice([0, 255])),) * 3
            angle = rng.choice([-1, 1]) * rng.uniform(1, 5)
            image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill)
        elif kind == "watermark":
            image = with_watermark(image, rng)
        elif kind == "border":
            edge = max(round(min(width, height) * rng.uniform(0.02, 0.06)), 1)
            image = ImageOps.expand(image, edge, tuple(int(value) for value in rng.integers(0, 256, 3)))
    saved = io.BytesIO()
    image.save(saved, "JPEG", quality=quality)
    return saved.getvalue()


def with_watermark(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One to three lines of eight letters, black or white, half transparent."""
    width, height = image.size
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    pen, font = ImageDraw.Draw(layer), ImageFont.load_default(size=max(height * rng.uniform(0.06, 0.12), 8))
    text, grey = "".join(rng.choice(list("ABCDEFGHKLMNOPRSTUVXYZ"), 8)), int(rng.choice([0, 255]))
    for _ in range(int(rng.integers(1, 4))):
        place = (width * rng.uniform(0, 0.5), height * rng.uniform(0, 0.85))
        pen.text(place, text, font=font, fill=(grey, grey, grey, int(rng.integers(90, 200))))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def plant(source: Path, folder: Path, seed: int, share: float) -> dict[tuple[str, str], str]:
    """Copy ``source`` to ``folder`` and plant copies there; (path, path of its copy) -> how it was edited."""
    rng, truth = np.random.default_rng(seed), {}
    shutil.copytree(source, folder)
    splits = sorted(place.name for place in source.iterdir() if place.is_dir())
    first = "train" if "train" in splits else splits[0]
    last = next(split for split in reversed(splits) if split != first)
    files = sorted(path.relative_to(source) for path in source.glob("*/*/*"))
    held = [path for path in files if path.parts[0] == first]
    for number, place in enumerate(rng.choice(len(held), round(share * len(files)), replace=False)):
        count = 1 if rng.random() < 0.5 else int(rng.integers(2, 4))
        kinds = [str(kind) for kind in rng.choice(KINDS, count, replace=False)]
        name = Path(last) / held[place].parts[1] / f"planted{number:04d}.jpg"
        with (
            contextlib.suppress(OSError),
            Image.open(source / held[place]) as image,
        ):  # the sets hold files that are no images
            (folder / name).write_bytes(edited(image.convert("RGB"), kinds, rng))
            truth[str(held[place]), str(name)] = "+".join(kinds)
    return truth


def pairs_of(found: NearCopies) -> Pairs:
    """All pairs within groups, and of every finding with what it is a copy of."""
    members: dict[int, list[int]] = {}
    for place, group in enumerate(found.groups.tolist()):
        members.setdefault(group, []).append(place)
    grouped = {pair for rows in members.values() for pair in itertools.combinations(rows, 2)}
    named = {(min(one.row, one.other), max(one.row, one.other)) for one in found.findings if one.other is not None}
    return grouped | named


def of_hashes(root: Path, paths: tuple[str, ...], name: str) -> Pairs:
    """Pairs whose perceptual hashes are alike."""
    import imagehash

    way = {"phash": imagehash.phash, "dhash": imagehash.dhash}[name]
    hashes = np.stack([way(Image.open(root / path).convert("RGB")).hash.ravel() for path in paths]).astype(np.float32)
    signs = hashes * 2 - 1
    distance = (64 - signs @ signs.T) / 2
    return {(int(i), int(j)) for i, j in np.argwhere(np.triu(distance <= HASH_BITS, 1))}


def of_cleanlab(X: np.ndarray) -> Pairs:
    """Datalab's near duplicates from embeddings, by its own manager, which needs less of it than Datalab itself."""
    from types import SimpleNamespace

    from cleanlab.datalab.internal.issue_manager.duplicate import NearDuplicateIssueManager

    manager = NearDuplicateIssueManager(SimpleNamespace(get_info=lambda _: {}, has_labels=False))
    with contextlib.redirect_stdout(io.StringIO()):
        manager.find_issues(features=X)
    return {(min(i, int(j)), max(i, int(j))) for i, row in enumerate(manager.near_duplicate_sets) for j in row}


def scored(found: Pairs, truth: Pairs) -> dict[str, float]:
    """Precision and recall of pairs."""
    hits = len(found & truth)
    return {"precision": hits / len(found) if found else 1.0, "recall": hits / len(truth), "pairs": len(found)}


def search(cache: FeatureCache, root: Path | None) -> tuple[NearCopies, dict[str, Any]]:
    """Near copies of all rows at defaults, and what it took."""
    rows = np.arange(len(cache))
    check = PixelCheck(root, cache.paths, cache.rows.digests) if root else None
    start = time.perf_counter(), time.process_time()
    with cache.reader() as features:
        nearest = nearest_rows(features, rows)
    middle = time.perf_counter(), time.process_time()
    found = find_near_copies(nearest, cache.rows.digests, check=check)
    end = time.perf_counter(), time.process_time()
    facts = {
        "images": len(cache),
        "flagged": len(found.findings),
        "candidates": found.candidates,
        "bar": found.agreement,
    }
    for name, since, until in (("neighbours", start, middle), ("pixels_and_groups", middle, end)):
        facts |= {f"{name}_s": until[0] - since[0], f"{name}_cpu_s": until[1] - since[1]}
    return found, facts


def untouched(cache: FeatureCache, root: Path) -> dict[str, Any]:
    """What is flagged in a set as it is, with names."""
    found, facts = search(cache, root)
    without, _ = search(cache, None)
    for name, one in (("flagged_pairs", found), ("flagged_pairs_without_pixels", without)):
        facts[name] = [[cache.paths[i], cache.paths[j]] for i, j in sorted(pairs_of(one))]
    return facts | {"flagged_without_pixels": len(without.findings)}


def one_run(source: Path, original: FeatureCache, seed: int, share: float, options: dict[str, Any]) -> dict[str, Any]:
    """All ways on one set with planted copies."""
    with tempfile.TemporaryDirectory() as work:
        folder, file = Path(work) / "images", Path(work) / "features.h5"
        truth = plant(source, folder, seed, share)
        extract(folder, file, reuse=original.path, **options)
        cache = FeatureCache.open(file)
        place = {path: row for row, path in enumerate(cache.paths)}
        pairs = {
            (min(place[one], place[other]), max(place[one], place[other])): kinds
            for (one, other), kinds in truth.items()
        }
        found, facts = search(cache, folder)
        missed = [kinds for pair, kinds in pairs.items() if pair not in pairs_of(found)]
        ways = {"featcache": pairs_of(found), "featcache without pixels": pairs_of(search(cache, None)[0])}
        ways["cleanlab"] = of_cleanlab(cache.take(np.arange(len(cache))).astype(np.float32))
        ways |= {name: of_hashes(folder, cache.paths, name) for name in ("phash", "dhash")}
        return {
            "set": source.name,
            "seed": seed,
            "planted": len(pairs),
            "ways": {name: scored(found, set(pairs)) for name, found in ways.items()},
            "missed": missed,
            **facts,
        }


def measured_neighbours(size: str) -> dict[str, Any]:
    """Time and memory of neighbours and of groups without pixels, of random vectors; in a process of its own."""
    n, dim = map(int, size.split("x"))
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1000, dim)).astype(np.float16)[rng.integers(0, 1000, n)]
    for start in range(0, n, 10000):
        X[start : start + 10000] += rng.normal(size=X[start : start + 10000].shape).astype(np.float16)
    digests = rng.integers(0, 256, (n, 32)).astype(np.uint8)
    before, promised = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, estimate(n, dim)
    start, cpu = time.perf_counter(), time.process_time()
    nearest = nearest_rows(X, np.arange(n))
    middle = time.perf_counter()
    find_near_copies(nearest, digests)
    end = time.perf_counter()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "size": size,
        "neighbours_s": middle - start,
        "groups_s": end - middle,
        "cpu_s": time.process_time() - cpu,
        "promised_s": promised[0],
        "peak_gb": grown / 1e6,
        "grown_gb": (grown - before) / 1e6,
        "promised_gb": promised[1] / 1e9,
    }


def main() -> None:
    """Print a table for people, and all runs as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of torchvision's mobilenet_v2")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--sizes", nargs="+", default=[], metavar="ROWSxVALUES")
    parser.add_argument("--one-size", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_size:
        print(json.dumps(measured_neighbours(arguments.one_size)))
        return
    options: dict[str, Any] = {"backbone": "timm/tf_efficientnet_lite0"}
    if arguments.weights:
        options = {"backbone": "mobilenet_v2", "weights": str(arguments.weights)}
    runs, clean, sizes = [], [], []
    with tempfile.TemporaryDirectory() as work:
        for number, source in enumerate(arguments.folders):
            extract(source, file := Path(work) / f"{number}.h5", **options)
            original = FeatureCache.open(file)
            clean.append({"set": source.name} | untouched(original, source))
            print_clean(clean[-1])
            runs += [one_run(source, original, seed, arguments.share, options) for seed in range(arguments.seeds)]
            print_runs([run for run in runs if run["set"] == source.name])
        if arguments.digits:
            embed_digits(file := Path(work) / "digits.h5", keep=Path(work) / "digits")
            clean.append({"set": "digits"} | untouched(FeatureCache.open(file), Path(work) / "digits"))
            print_clean(clean[-1])
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--one-size", size]
        sizes.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(
            ", ".join(f"{name} {value:.3g}" if name != "size" else value for name, value in sizes[-1].items()),
            flush=True,
        )
    print(json.dumps({"runs": runs, "untouched": clean, "sizes": sizes} | machine_facts()))


def print_clean(facts: dict[str, Any]) -> None:
    """What is flagged in an untouched set."""
    flagged, without = facts["flagged"], facts["flagged_without_pixels"]
    print(
        f"{facts['set']}, untouched: {flagged} of {facts['images']} images flagged, {without} without pixels",
        flush=True,
    )
    for name in ("flagged_pairs", "flagged_pairs_without_pixels"):
        for pair in facts[name]:
            print(f"  {name}: {pair[0]} {pair[1]}")


def print_runs(runs: list[dict[str, Any]]) -> None:
    """Precision and recall: the mean over seeds, and the lowest."""
    print(f"{runs[0]['set']}, {sum(run['planted'] for run in runs)} pairs planted in {len(runs)} runs:")
    for way in runs[0]["ways"]:
        for name in ("precision", "recall"):
            values = [run["ways"][way][name] for run in runs]
            print(f"  {way:26} {name:9} {np.mean(values):.3f}, at least {min(values):.3f}")
    print(f"  missed: {'; '.join(kinds for run in runs for kinds in run['missed']) or 'none'}")
    for name in ("neighbours", "pixels_and_groups"):
        wall, cpu = (np.mean([run[f"{name}_{kind}"] for run in runs]) for kind in ("s", "cpu_s"))
        print(f"  {name}: {wall:.2f} s, {cpu:.2f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
