"""Which recipe of ``finetune`` is best, and where? Today's default, one thing changed at a time, on sets far from ImageNet and near.

    python benchmarks/recipes.py HYMENOPTERA CATS_DOGS --weights FILE -o runs.jsonl [--sets digits ...] [--variants base 'rate*' ...]
        [--seeds 0 1 2] [--minutes M] [--table] [--backbone NAME --multiple 14 --precision bf16]

Sets: scikit-learn's digits, 8 x 8 enlarged to 64 (far); ants and bees, cats and dogs at 96 pixels (near), or as many as
``ants-bees@224:80`` says; so many training images per class as the name says. Val and test are the same images for all of a set's
runs; the seed draws the training images and everything random. MobileNetV2, unless told otherwise, in float32 on one thread. A
variant is what it changes of ``BASE``, which is pinned here, whatever the default has become. The row to beat is the frozen head.
Each finished run is a line of ``runs.jsonl`` and is not repeated, so that the script can be ended and started again at any time.
``--table``: only show what is there.

A transformer takes images of whole patches: ``--multiple 14`` enlarges both sizes to such (70 and 98), and ``--precision`` is that
of training. ``dinov2_weights.py`` makes the weights that LOG.md's runs of a transformer had.

Digits mirrored are other shapes, and no digits: no variant mirrors them but ``mirrored``.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import machine_facts
from PIL import Image
from sklearn.datasets import load_digits

from featcache.errors import TrainingError
from featcache.extraction.extract import extract
from featcache.finetuning.finetune import finetune
from featcache.heads.metrics import mcnemar
from featcache.images.source import ImageList, list_images
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.spec import SPLITS

BASE: dict[str, Any] = {  # the default until 2026-11
    "optimizer": "adamw", "lr": 3e-4, "backbone_lr": 3e-5, "layer_decay": 0.9, "weight_decay": 0.01, "schedule": "cosine",
    "warmup": 0.1, "batch_size": 32, "label_smoothing": 0.1, "clip_norm": 1.0, "ema": 0.98, "patience": 5,
    "interpolate": True, "unfreeze": "all", "batchnorm": "frozen", "augmentation": [["resized_crop", 0.35, 1, 1], ["flip", 0.5]],
}  # fmt: skip
MIRROR = ["flip", 0.5]
SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4}
SETS = ["digits:20", "digits:100", "ants-bees:20", "ants-bees:80", "cats-dogs:20", "cats-dogs:100"]
FIELDS = (
    "test_accuracy",
    "head_test_accuracy",
    "val_accuracy",
    "head_val_accuracy",
    "p_value",
    "alpha",
    "epochs",
    "best_epoch",
)


def crop(least: float) -> dict[str, Any]:
    """The change to another random crop."""
    return {"augmentation": [["resized_crop", least, 1, 1], MIRROR]}


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "rate 1e-5": {"backbone_lr": 1e-5},
    "rate 1e-4": {"backbone_lr": 1e-4},
    "rate 3e-4": {"backbone_lr": 3e-4},
    "rate 1e-3": {"backbone_lr": 1e-3, "lr": 1e-3},
    "head 1e-3": {"lr": 1e-3},
    "head 1e-4": {"lr": 1e-4},
    "sgd 1e-3": SGD | {"backbone_lr": 1e-3},
    "sgd 3e-3": SGD | {"backbone_lr": 3e-3},
    "sgd 1e-2": SGD | {"backbone_lr": 1e-2},
    "sgd 3e-2": SGD | {"backbone_lr": 3e-2},
    "warmup 0.3": {"warmup": 0.3},
    "weight decay 0.1": {"weight_decay": 0.1},
    "batches of 8": {"batch_size": 8},
    "batches of 16": {"batch_size": 16},
    "decay 0.75": {"layer_decay": 0.75},
    "decay 1": {"layer_decay": 1.0},
    "epochs 5": {"epochs": 5},
    "epochs 10": {"epochs": 10},
    "epochs 20": {"epochs": 20},
    "epochs 40": {"epochs": 40},
    "no augmentation": {"augmentation": []},
    "crop 0.08": crop(0.08),
    "crop 0.7": crop(0.7),
    "mirrored": {},  # on digits only: as the default does it
    "all but the first stages": {"unfreeze": "most"},
    "freezeout": {"unfreeze": "freezeout"},
    "last stage": {"unfreeze": "last-stage"},
    "gradual": {"unfreeze": "gradual", "patience": 0},
    "no average": {"ema": 0.0},
    "batch norms train": {"batchnorm": "train"},
    "smoothing 0": {"label_smoothing": 0.0},
    "no patience": {"patience": 0},
    "no mixing": {"interpolate": False},
}


@dataclasses.dataclass(frozen=True)
class Set:
    """Images of one kind: pool to train from, val and test, and the network's input."""

    images: ImageList
    resize: int
    crop: int


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as PNG files of 64 x 64: per class 60 for test, 20 for val, the others to train from."""
    digits, rng = load_digits(), np.random.default_rng(0)
    for label in range(10):
        for place, number in enumerate(rng.permutation(np.flatnonzero(digits.target == label))):
            split = "test" if place < 60 else "val" if place < 80 else "train"
            file = folder / split / str(label) / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((digits.images[number] * 255 / 16).round().astype(np.uint8))
            image.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB").save(file)


def photographs(source: Path, *, n_val: int, n_test: int, edge: int = 96) -> Set:
    """Photographs of class folders: the folder's own held-out split is test, filled up to ``n_test`` per class; then val.

    ``edge``: pixels that the network is shown, of a shorter side of 8/7 of it.
    """
    images = list_images(source)
    images = images.take(np.flatnonzero((images.labels >= 0) & [not path.endswith(".gif") for path in images.paths]))
    splits, rng = images.splits.copy(), np.random.default_rng(0)
    splits[splits != SPLITS.index("train")] = SPLITS.index("test")
    for label in np.unique(images.labels):
        mine = images.labels == label
        pool = rng.permutation(np.flatnonzero(mine & (splits == SPLITS.index("train"))))
        more = max(0, n_test - int((mine & (splits == SPLITS.index("test"))).sum()))
        splits[pool[:more]] = SPLITS.index("test")
        splits[pool[more : more + n_val]] = SPLITS.index("val")
    return Set(dataclasses.replace(images, splits=splits), round(edge * 8 / 7), edge)


def subset(images: ImageList, per_class: int, seed: int) -> ImageList:
    """``per_class`` training images of each class, drawn by the seed, with all of val and test."""
    rng, kept = np.random.default_rng([7, seed]), [np.flatnonzero(images.splits != SPLITS.index("train"))]
    for label in np.unique(images.labels):
        pool = rng.permutation(np.flatnonzero((images.labels == label) & (images.splits == SPLITS.index("train"))))
        kept.append(pool[:per_class])
    return images.take(np.sort(np.concatenate(kept)))


def changes_of(name: str, variant: str, n_train: int) -> dict[str, Any]:
    """Everything that decides a run's recipe: ``BASE``, the variant's changes, and no mirroring of digits."""
    changes: dict[str, Any] = BASE | {"epochs": 15 if n_train < 500 else 10}
    for part in variant.split(" + "):
        changes |= VARIANTS[part]
    if name.startswith("digits") and "mirrored" not in variant.split(" + "):
        changes["augmentation"] = [step for step in changes["augmentation"] if step != MIRROR]
    return changes


def key_of(name: str, seed: int, changes: dict[str, Any]) -> str:
    """The same settings are the same run, whatever the variant is called."""
    return hashlib.sha256(json.dumps([name, seed, changes], sort_keys=True).encode()).hexdigest()[:16]


class Starts:
    """What runs start from: cached features of a whole set, made once; the frozen head of each (set, seed), fitted once."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        self.sets: dict[str, Set] = {}

    def images(self, name: str, seed: int) -> ImageList:
        """The images of one run."""
        kind, per_class = name.split(":")
        if kind not in self.sets:
            self.sets[kind] = self._read(kind)
            self._extract(self.sets[kind].images, kind, kind)
        return subset(self.sets[kind].images, int(per_class), seed)

    def head(self, name: str, seed: int) -> Path:
        """The model that a run starts from."""
        folder = self.work / f"{name.replace(':', '-')}-{seed}"
        if not folder.exists():
            kind = name.split(":")[0]
            part = self._extract(self.images(name, seed), kind, folder.name, reuse=[self.work / f"{kind}.h5"])
            fit_head(part, folder, seed=seed)
        return folder

    def _extract(self, images: ImageList, kind: str, file: str, **options: Any) -> Path:
        settings = {"backbone": self.arguments.backbone, "weights": self.arguments.weights, "precision": "fp32"}
        step = self.arguments.multiple
        sizes = {field: -(-getattr(self.sets[kind], field) // step) * step for field in ("resize", "crop")}
        settings |= sizes | {"device": "cpu", "workers": 1}
        extract(images, self.work / f"{file}.h5", **settings, **options)
        return self.work / f"{file}.h5"

    def _read(self, kind: str) -> Set:
        if kind == "digits":
            write_digits(self.work / "digits")
            return Set(list_images(self.work / "digits"), 64, 64)
        kind, _, edge = kind.partition("@")
        if kind == "ants-bees":
            return photographs(self.arguments.hymenoptera, n_val=20, n_test=0, edge=int(edge or 96))
        return photographs(self.arguments.cats_dogs, n_val=50, n_test=200, edge=int(edge or 96))


def run(starts: Starts, name: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune once; scores on test, and image by image who is right, beside the frozen head."""
    images, head, output = starts.images(name, seed), starts.head(name, seed), starts.work / "tuned"
    begun = time.process_time()
    options = {"precision": starts.arguments.precision, "device": "cpu", "workers": 1, "micro_batch": 32}
    try:
        report = finetune(images, output, init=head, changes=changes, seed=seed, overwrite=True, force=True, **options)
    except TrainingError as error:  # it diverges: a result, too
        return {"failed": str(error).partition(" (")[0]}
    rows = load_model(output).training_rows()
    assert rows is not None and rows.compared is not None
    test = slice(int((images.splits == SPLITS.index("val")).sum()), None)  # the answers of val come first
    y, frozen, tuned = (getattr(rows.compared, field)[test] for field in ("labels", "head", "tuned"))
    assert abs((tuned == y).mean() - report.test_accuracy) < 1e-9
    shutil.rmtree(output)
    facts = {field: getattr(report, field) for field in FIELDS}
    right = {
        who: "".join(map(str, (answers == y).astype(int))) for who, answers in (("head", frozen), ("tuned", tuned))
    }
    return facts | {"cpu_seconds": round(time.process_time() - begun, 1), "right": right}


def read_runs(file: Path, network: str) -> dict[str, dict[str, Any]]:
    """Finished runs by key; a line that was cut off is none. Ends the script if they are of another network."""
    runs = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            runs.append(json.loads(line))
    if others := {row["network"] for row in runs} - {network}:
        sys.exit(f"{file} holds runs of {', '.join(others)}, not of {network}; choose another -o")
    return {row["key"]: row for row in runs}


def discordant(first: str, second: str) -> tuple[int, int, float]:
    """Images that only the first, only the second got right, and McNemar's p."""
    a, b = (np.array([[1 - int(c), int(c)] for c in right], float) for right in (first, second))
    facts = mcnemar(np.ones(len(a), int), a, b)
    return facts["only_first_right"], facts["only_second_right"], facts["p_value"]


def spread(values: list[float], *, sign: str = "") -> str:
    """Mean and standard deviation, in percent."""
    if not values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{deviation}"


def summary(variant: str, runs: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """A variant's runs of one set, by seed, as lists; ``over_base``: of the seeds that ``base`` has, too."""
    row: dict[str, Any] = {"variant": variant, "seeds": list(runs)}
    row |= {field: [run[field] for run in runs.values()] for field in (*FIELDS, "cpu_seconds")}
    row["over_head"] = [run["test_accuracy"] - run["head_test_accuracy"] for run in runs.values()]
    row["over_base"] = [
        run["test_accuracy"] - base[seed]["test_accuracy"] for seed, run in runs.items() if seed in base
    ]
    row["mcnemar"] = [discordant(run["right"]["head"], run["right"]["tuned"]) for run in runs.values()]
    return row


def show(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    lost, won, p = zip(*row["mcnemar"], strict=True)
    mean = {field: statistics.mean(row[field]) for field in ("alpha", "best_epoch", "epochs", "cpu_seconds")}
    print(
        f"{row['variant']:34} n {len(row['seeds'])}  frozen head {spread(row['head_test_accuracy']):>10}"
        f"  fine-tuned {spread(row['test_accuracy']):>10}  gain {spread(row['over_head'], sign='+'):>10}"
        f"  won {sum(won):3} lost {sum(lost):3}  p < 0.05 in {sum(value < 0.05 for value in p)}"
        f"  over base {spread(row['over_base'], sign='+'):>10}"
        f"  share {mean['alpha']:.1f}  epoch {mean['best_epoch']:.0f} of {mean['epochs']:.0f}  {mean['cpu_seconds']:.0f} CPU s"
    )


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run."""

    name: str
    seed: int
    variant: str

    @property
    def n_train(self) -> int:
        """Training images."""
        return int(self.name.split(":")[1]) * (10 if self.name.startswith("digits") else 2)

    @property
    def changes(self) -> dict[str, Any]:
        """What makes its recipe of the default."""
        return changes_of(self.name, self.variant, self.n_train)

    @property
    def key(self) -> str:
        """Its name in the file."""
        return key_of(self.name, self.seed, self.changes)


def tables(jobs: list[Planned], runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Print a table per set of the runs that there are; their rows."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    rows: list[dict[str, Any]] = []
    for job in (job for job in jobs if job.key in runs):
        if failed := runs[job.key].get("failed"):
            print(f"{job.name}, seed {job.seed}, {job.variant} failed: {failed}")
            rows.append(dataclasses.asdict(job) | {"failed": failed})
        else:
            found.setdefault(job.name, {}).setdefault(job.variant, {})[job.seed] = runs[job.key]
    for name, variants in found.items():
        print(
            f"\n{name}: % right of test, mean ± sd over n seeds; gain and over base: of pairs of the same images and seed"
        )
        for variant, by_seed in variants.items():
            show(row := summary(variant, by_seed, variants.get("base", {})))
            rows.append({"name": name} | row)
    return rows


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hymenoptera", type=Path)
    parser.add_argument("cats_dogs", type=Path)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="auto", help="its weights, as for extract")
    parser.add_argument("--multiple", type=int, default=1, help="enlarge images to a multiple of so many pixels")
    parser.add_argument("--precision", default="fp32", help="of training")
    parser.add_argument("-o", "--output", type=Path, required=True, help="finished runs, a JSON line each")
    parser.add_argument("--sets", nargs="+", default=SETS, help="KIND:IMAGES_PER_CLASS")
    parser.add_argument(
        "--variants", nargs="+", help="names, 'A + B' for both, or patterns; all, or with --table the file's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--work", type=Path, help="keep features and heads there")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    arguments = parser.parse_args()
    network, begun = f"{arguments.backbone}, weights {Path(arguments.weights).name}", time.monotonic()
    if arguments.precision != "fp32":
        network += f", trained in {arguments.precision}"
    runs = read_runs(arguments.output, network)
    there = [row["variant"] for row in runs.values()] if arguments.table else VARIANTS
    given = [name for pattern in arguments.variants or there for name in fnmatch.filter(VARIANTS, pattern) or [pattern]]
    jobs = [
        Planned(name, seed, variant)
        for seed in arguments.seeds
        for variant in dict.fromkeys(given)
        for name in arguments.sets
        if "mirrored" not in variant.split(" + ") or name.startswith("digits")
    ]
    torch.set_num_threads(1)
    logging.getLogger("featcache").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() if arguments.work is None else contextlib.nullcontext(arguments.work) as work:
        starts = Starts(arguments, Path(work))
        for job in jobs if not arguments.table else []:
            if job.key in runs or time.monotonic() - begun > 60 * arguments.minutes:
                continue
            row = {"key": job.key, "network": network} | dataclasses.asdict(job)
            row |= run(starts, job.name, job.seed, job.changes)
            runs[job.key] = row
            with arguments.output.open("a") as file:
                file.write("\n" + json.dumps(row))  # what was cut off before is a line of its own
            shown = {field: value for field, value in row.items() if field not in ("key", "network", "right")}
            print(json.dumps(shown), file=sys.stderr, flush=True)
    print(json.dumps({"rows": tables(jobs, runs)} | machine_facts()))


if __name__ == "__main__":
    main()
