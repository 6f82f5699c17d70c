"""How long do pages take, how large are they, and does the map of many points move smoothly?

    python benchmarks/pages.py FOLDER [--only thumbnails,stats,learning,quick,report,map] [--rows 10000] [--points 100000]

FOLDER holds photographs, 1,000 or more. Of them `--rows` files are made, each with other bytes at its end, so that none is a copy
of another; embeddings are drawn around ten centres, 1,280 values each. Measured is what a user waits for, in the process that
this is: thumbnails of 1,000 images; `stats` of all; a learning curve of 3,000 training rows; the page that `fit-head` writes
beside the model; `report` of all rows with their pictures; and, in Chromium, frames per second while a map of `--points` is
dragged. Parts whose module this checkout lacks are left out, and said. Each budget is that of the design.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from facts import machine_facts

from featcache.cache.cache import FeatureCache
from featcache.cache.copies import first_copies
from featcache.cache.format import Provenance, Rows, encode_names
from featcache.cache.write import write_cache
from featcache.heads.learning_curve import learning_curve
from featcache.models.fit import fit_head
from featcache.reports.elements.thumbnails import thumbnails
from featcache.spec import PreprocessSpec, Spec

DIM, CLASSES, TRAIN = 1280, 10, 3000
PHOTOS = (".jpg", ".jpeg", ".png")
PARTS = ("thumbnails", "stats", "learning", "quick", "report", "map")
NEEDS = {
    "stats": "stats",
    "quick": "report",
    "report": "report",
    "map": "embedding_map",
}  # modules of featcache.reports
# Between two frames the pointer moves, so that every frame draws the map anew.
DRAG = """([x, y, milliseconds]) => new Promise((done) => {
  const canvas = document.querySelector("#map canvas"), times = [];
  const next = (now) => {
    times.push(now);
    const [clientX, clientY] = [x + 150 * Math.sin(times.length / 9), y + 100 * Math.cos(times.length / 7)];
    const where = { clientX, clientY, buttons: 1, pointerId: 1, pointerType: "mouse", isPrimary: true, bubbles: true };
    canvas.dispatchEvent(new PointerEvent("pointermove", where));
    now - times[0] < milliseconds ? requestAnimationFrame(next) : done(times);
  };
  requestAnimationFrame(next);
})"""


def copy_photos(folder: Path, target: Path, count: int, *, first: int = 0) -> list[Path]:
    """``count`` files of ten class folders, all different, and from those of other numbers."""
    photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOS)
    found = []
    for number in range(first, first + count):
        photo = photos[number % len(photos)]
        path = target / f"class {number % CLASSES}" / f"{number:06d}{photo.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, path)
        if number >= len(photos):  # behind the end of the picture
            with path.open("ab") as file:
                file.write(number.to_bytes(4, "big"))
        found.append(path)
    return found


def make_cache(path: Path, files: Sequence[Path] | int, *, root: Path, splits: np.ndarray, dim: int = DIM) -> Path:
    """Overlapping classes; of files their digests, of a number made-up ones."""
    count = files if isinstance(files, int) else len(files)
    names = (
        [f"{k:06d}.jpg" for k in range(count)] if isinstance(files, int) else [str(p.relative_to(root)) for p in files]
    )
    contents = [name.encode() for name in names] if isinstance(files, int) else [file.read_bytes() for file in files]
    digests = np.frombuffer(b"".join(hashlib.sha256(content).digest() for content in contents), np.uint8).reshape(
        -1, 32
    )
    labels = (np.arange(count) % CLASSES).astype(np.int32)
    centres = np.random.default_rng(1).normal(0, 0.14, (CLASSES, dim)).astype(np.float32)
    features = centres[labels] + np.random.default_rng(0).normal(0, 1, (count, dim)).astype(np.float32)
    sizes = np.array([len(content) for content in contents], np.int64)
    rows = Rows(
        encode_names(names),
        labels=labels,
        splits=splits,
        digests=digests,
        sizes=sizes,
        mtimes=np.zeros(count, np.int64),
    )
    write_cache(
        path,
        rows,
        [features.astype(np.float16)],
        dim=dim,
        spec=Spec(
            backbone="mobilenet_v2",
            weights_sha256="0" * 64,
            layer="classifier.1",
            preprocess=PreprocessSpec(
                resize=256, crop=(224, 224), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
            ),
            precision="reference",
            storage="float16",
        ),
        classes=tuple(f"class {k}" for k in range(CLASSES)),
        provenance=Provenance(source="made up", reload="IMAGENET1K_V1"),
    )
    return path


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def measure_thumbnails(files: Sequence[Path], **_: Any) -> dict[str, float]:
    """Of 1,000 files."""
    seconds, found = timed(lambda: thumbnails(files[:1000], size=96))
    return {"images": len(found), "seconds": seconds, "bytes": sum(len(one.webp or b"") for one in found)}


def measure_stats(root: Path, work: Path, files: Sequence[Path], **_: Any) -> dict[str, float]:
    """Of all files but those that train, with the page."""
    from featcache.reports.source_stats.stats import stats

    seconds, _found = timed(lambda: stats(root / "judged", work / "stats"))
    return {"images": len(files), "seconds": seconds, "bytes": (work / "stats/stats.html").stat().st_size}


def measure_learning(cache: Path, **_: Any) -> dict[str, float]:
    """40 fits on parts of 3,000 rows."""
    opened = FeatureCache.open(cache)
    rows, judges = (np.flatnonzero(opened.rows.splits == split) for split in (1, 3))
    options = {"C": 0.01, "copies": first_copies(opened.rows.digests[rows]), "judges": judges[:1000]}
    with opened.reader() as features:
        seconds, found = timed(
            lambda: learning_curve(
                features, rows, opened.y[rows], scaling="standardise", judges_y=opened.y[judges[:1000]], **options
            )
        )
    return {"images": len(rows), "fits": found.right.shape[0] * found.right.shape[1], "seconds": seconds}


def measure_quick(model: Path, cache: Path, root: Path, **_: Any) -> dict[str, float]:
    """The page that is written beside a model on the way."""
    from featcache.reports.model_report.report import report_beside

    seconds, _found = timed(lambda: report_beside(model, cache=cache, pictures=root))
    return {
        "images": len(FeatureCache.open(cache)),
        "seconds": seconds,
        "bytes": _size(model.with_name("m.report.html")),
    }


def measure_report(model: Path, cache: Path, root: Path, work: Path, **_: Any) -> dict[str, float]:
    """Of all files but those that train, with pictures, map and learning curve."""
    from featcache.reports.model_report.report import report

    page = work / "report.html"
    seconds, found = timed(lambda: report(model, cache, pictures=root, output=page))
    return {"images": found.images, "cards": found.cards, "seconds": seconds, "bytes": _size(page)}


def measure_map(work: Path, points: int, **_: Any) -> dict[str, float]:
    """Of points without pictures, by principal components; then in a browser."""
    from featcache.reports.model_report.embedding_map import map as draw_map

    cache = make_cache(work / "map.h5", points, root=work, splits=np.ones(points, np.uint8), dim=32)
    seconds, page = timed(lambda: draw_map(cache, method="pca"))
    return {"points": points, "seconds": seconds, "bytes": _size(page.save(work / "map.html"))} | frames_of(
        work / "map.html"
    )


def frames_of(page_path: Path, *, seconds: float = 3.0) -> dict[str, float]:
    """Frames per second while the map is dragged to and fro, and the longest time between two, in milliseconds."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(page_path.resolve().as_uri())
        canvas = page.locator("#map canvas").first
        canvas.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        box = canvas.bounding_box()
        assert box is not None, "the map is not shown"
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        before = page.screenshot()
        page.mouse.move(x, y)
        page.mouse.down()
        times = page.evaluate(DRAG, [x, y, 1000 * seconds])
        page.mouse.up()
        page.mouse.move(0, 0)
        assert page.screenshot() != before, "the map did not move"
        browser.close()
    gaps = np.diff(times)
    return {"frames_per_second": float(1000 / gaps.mean()), "longest_frame_ms": float(gaps.max())}


def _size(path: Path) -> int:
    return path.stat().st_size


BUDGETS: dict[str, dict[str, float]] = {
    "thumbnails": {"seconds": 10, "bytes": 4e6},
    "stats": {"seconds": 30},
    "learning": {"seconds": 20},
    "quick": {"seconds": 2},
    "report": {"seconds": 60, "bytes": 15e6},
    "map": {"frames_per_second": 30},
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=100_000)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        root = work / "pictures"
        files = copy_photos(options.folder, root / "judged", options.rows)
        facts: dict[str, Any] = {"files": files, "root": root, "work": work, "points": options.points}
        if {"learning", "quick", "report"} & set(options.only.split(",")):
            more = copy_photos(options.folder, root / "training", min(TRAIN, options.rows), first=options.rows)
            splits = np.repeat(np.array([3, 1], np.uint8), [len(files), len(more)])
            facts["cache"] = make_cache(work / "f.h5", [*files, *more], root=root, splits=splits)
            facts["model"] = work / "m"
            fit_head(facts["cache"], facts["model"], C=0.01)
        for part in options.only.split(","):
            if part in NEEDS and importlib.util.find_spec(f"featcache.reports.{NEEDS[part]}") is None:
                print(f"{part:12} left out: this checkout has no reports/{NEEDS[part]}.py")
                continue
            found[part] = globals()[f"measure_{part}"](**facts)
            say(part, found[part])
    print(json.dumps({"benchmark": "pages", **found, **machine_facts()}))


def say(part: str, numbers: dict[str, float]) -> None:
    """A line for people, with the budget where there is one."""
    words = []
    for name, value in numbers.items():
        budget = BUDGETS[part].get(name)
        more = name == "frames_per_second"
        kept = "" if budget is None else f" ({'at least' if more else 'at most'} {budget:,.0f}: "
        kept += "" if budget is None else ("kept)" if (value >= budget if more else value <= budget) else "MISSED)")
        words.append(
            f"{name.replace('_', ' ')} {value:,.1f}{kept}" if isinstance(value, float) else f"{name} {value:,}{kept}"
        )
    print(f"{part:12} {'; '.join(words)}")


if __name__ == "__main__":
    main()
