"""Audits to make pages of: images with findings of all kinds, as many as are asked for, of names that may break things."""

import hashlib
from pathlib import Path

import numpy as np
from caches import plain_rows
from conftest import SPEC
from PIL import Image

from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.curation.audit import Found, Opinions
from featcache.curation.finding import KINDS, Finding, Kind
from featcache.curation.honest_score import Score
from featcache.curation.neighbours import nearest_rows

REASONS = {
    "outlier": "1.9 times as far from its neighbours as others of its class",
    "off_topic": "its nearest neighbours are 0.31 away, farther than 99.5% of all",
    "dark": "mean brightness 11 of 255",
    "blurred": "variance of the Laplacian 7",
    "blank": "98% of the pixels are of one colour",
    "tiny": "20 x 20 pixels",
    "label": "0.91 for another class, 0.02 for its own; 18 of 20 neighbours agree",
}
COPIES = ([0, 3], [1, 2, 5, 4])  # exact ones in train, near ones in val and test


def make_audit(
    folder: Path,
    *,
    classes: tuple[str, ...] = ("ants", "bees", "cats", "dogs"),
    images: int = 60,
    files: int = 60,
    findings: int | None = None,
    names: tuple[str, ...] = (),
) -> Found:
    """An audit of ``images`` images, ``findings`` of them (half) remarkable: two groups of copies, then all other kinds in turn.

    ``folder`` gets ``files`` small pictures; later images hold the same bytes as these, but their files are not there.
    ``names``: of the first images, instead of plain ones; these have no file.
    """
    random = np.random.default_rng(0)
    paths, digests = [], []
    for number in range(images):
        paths.append(f"{('train', 'val', 'test')[number % 3]}/{number}.jpg")
        place = folder / paths[-1]
        if number < files:
            place.parent.mkdir(parents=True, exist_ok=True)
            coarse = random.integers(0, 256, (4, 3 + number % 5, 3), dtype=np.uint8)
            size = (60 + 40 * (number % 5), 120)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(place, quality=80)
        if number == COPIES[0][1] < files:
            place.write_bytes((folder / paths[0]).read_bytes())
        digests.append(hashlib.sha256(place.read_bytes()).digest() if number < files else digests[number % files])
    paths[: len(names)] = names
    labels = np.arange(images) % len(classes) if classes else np.full(images, -1)
    rows = plain_rows(
        paths,
        labels=labels.astype(np.int32),
        splits=np.array([1 + k % 3 for k in range(images)], np.uint8),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
        sizes=np.array([4000 + 7 * (k % files) for k in range(images)]),
    )
    X = random.normal(size=(images, 4)).astype(np.float16)
    write_cache(folder / "features.h5", rows, [X], dim=4, spec=SPEC, classes=tuple(sorted(classes)))
    probabilities = np.full((images, len(classes)), 0.1 / max(len(classes) - 1, 1))
    if classes:
        probabilities[np.arange(images), (labels + 1) % len(classes)] = 0.9
    return Found(
        FeatureCache.open(folder / "features.h5"),
        folder,
        _findings(labels, len(classes), images // 2 if findings is None else findings),
        not_done={} if classes else {"label": "the images have no labels"},
        groups=np.arange(images),
        nearest=nearest_rows(X, np.arange(images), k=20),
        opinions=Opinions(np.arange(images), probabilities) if classes else None,
        scores=_scores() if classes else (),
        seconds={"comparing images": 0.21},
    )


def _findings(labels: np.ndarray, classes: int, count: int) -> dict[Kind, list[Finding]]:
    found: dict[Kind, list[Finding]] = {kind: [] for kind in KINDS if classes or kind != "label"}
    for kind, rows in zip(KINDS, COPIES, strict=False):
        why = "2 files hold the same bytes, in train" if kind == "exact_copy" else "pixels agree to 0.98 once aligned"
        if count:
            found[kind] = [Finding(kind, row, 0.9, why, group=0, verified=True, other=rows[0]) for row in rows]
    turns = [kind for kind in found if kind not in KINDS[:2]]
    for k in range(count):
        kind, row = turns[k % len(turns)], k + 6
        suggested = int((labels[row] + 1) % classes) if kind == "label" else None
        found[kind].append(Finding(kind, row, 0.95 - 0.9 * k / count, REASONS[kind], suggested=suggested))
    return found


def _scores() -> tuple[Score, ...]:
    return (
        Score("test", "as_given", 0.9346, [0.882, 0.965], 153, 0),
        Score("test", "without_leaks", 0.921, [0.864, 0.956], 139, 14),
        Score("test", "without_suspects", 0.935, [0.881, 0.966], 139, 21),
    )


if __name__ == "__main__":
    import sys
    import tempfile

    from kitchen import HOSTILE

    from featcache.reports.audit.page import audit_page
    from featcache.reports.elements.page import publish_page

    with tempfile.TemporaryDirectory() as scratch:
        hostile = {"classes": tuple(HOSTILE), "names": tuple(HOSTILE)} if "--hostile" in sys.argv else {}
        page = audit_page(make_audit(Path(scratch), images=int(sys.argv[2]), **hostile))  # type: ignore[arg-type]
        publish_page(Path(sys.argv[1]), page)
