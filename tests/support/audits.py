"""Audits to make pages of: images with findings of all kinds, of as many as are asked for, and of names that break things."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.curation.finding import KINDS, Finding
from featcache.curation.neighbours import Nearest
from featcache.reports.audit.items import Subject

REASONS = {
    "outlier": "1.9 times as far from its neighbours as others of its class",
    "off_topic": "its nearest neighbours are 0.31 away, farther than 99.5% of all",
    "dark": "mean brightness 11 of 255",
    "blurred": "variance of the Laplacian 7",
    "blank": "98% of the pixels are of one colour",
    "tiny": "20 x 20 pixels",
    "label": "0.91 for another class, 0.02 for its own; 18 of 20 neighbours agree",
}


def make_subject(folder: Path, *, classes: list[str], images: int = 60, files: int = 24, labelled: bool = True) -> Subject:
    """An audit of ``images`` images, half of them remarkable: two groups of copies, then the other kinds in turn.

    ``folder`` gets ``files`` small pictures; those of further images are the same ones again, under names that are not there.
    """
    random = np.random.default_rng(0)
    paths, digests = [], []
    for number in range(images):
        name = classes[number % len(classes)] if classes else "all"
        paths.append(f"{('train', 'val', 'test')[number % 3]}/{name}/{number}.jpg")
        if number < files:
            place = folder / paths[-1]
            if "/" in name or "\0" in name:
                paths[-1] = f"{number}.jpg"
                place = folder / paths[-1]
            place.parent.mkdir(parents=True, exist_ok=True)
            coarse = random.integers(0, 256, (4, 3 + number % 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((60 + 40 * (number % 5), 120), Image.Resampling.BICUBIC).save(place, quality=80)
            digests.append(hashlib.sha256(place.read_bytes()).digest())
        else:
            digests.append(digests[number % files])
    labels = np.arange(images) % len(classes) if classes and labelled else np.full(images, -1)
    findings = []
    for group, rows in enumerate(([0, 3], [1, 2, 5, 4])):
        kind = KINDS[group]
        across = "pixels agree to 0.98 once aligned, embeddings agree to 0.971" if group else "2 files hold the same bytes, in train"
        findings += [Finding(kind, row, 0.9, across, group=group, verified=True, other=rows[0]) for row in rows]
    for k, row in enumerate(range(6, images // 2 + 6)):
        kind = KINDS[2 + k % (len(KINDS) - 2)] if labelled and classes else KINDS[3 + k % (len(KINDS) - 3)]
        suggested = int((labels[row] + 1) % len(classes)) if kind == "label" else None
        findings.append(Finding(kind, row, 0.95 - 0.9 * k / images, REASONS[kind], suggested=suggested))
    features = random.normal(size=(images, 4)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T - 2 * np.eye(images, dtype=np.float32)
    near = np.argsort(-cosines, axis=1, kind="stable")[:, :20]
    nearest = Nearest(np.arange(images), near, np.take_along_axis(cosines, near, axis=1))

    def opinions(row: int) -> dict[int, float]:
        if not classes or not labelled:
            return {}
        best = (row + 1) % len(classes)
        rest = {k: 0.1 / len(classes) for k in range(len(classes)) if k != best}
        return {best: 0.9, **rest}

    return Subject(
        paths=paths,
        classes=classes if labelled else [],
        labels=labels,
        splits=np.array([1 + k % 3 for k in range(images)]),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
        sizes=np.array([4000 + 7 * k for k in range(images)]),
        findings=findings,
        nearest=nearest,
        opinions=opinions,
    )


if __name__ == "__main__":
    import sys
    import tempfile

    from kitchen import HOSTILE

    from featcache.reports.audit.page import audit_page
    from featcache.reports.elements.page import publish_page

    with tempfile.TemporaryDirectory() as scratch:
        names = HOSTILE if "--hostile" in sys.argv else ["ants", "bees", "cats", "dogs"]
        subject = make_subject(Path(scratch), classes=names, images=int(sys.argv[2]))
        publish_page(Path(sys.argv[1]), audit_page(subject, title="Audit of features.h5", root=Path(scratch)))
