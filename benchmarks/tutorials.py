"""How do five workflows that people copy compare, written the tutorial's way and featcache's way?

    python benchmarks/tutorials.py HYMENOPTERA CATS_DOGS --weights FILE [--workflows T1,T3] [--stages frozen]

HYMENOPTERA holds train and val, CATS_DOGS train and test, each with two class folders. Their images are copied into a
temporary folder once per workflow; what torchvision's ImageFolder passes over (GIF) is left out on both sides:

    T1  ants and bees         hymenoptera, as it is
    T2  cats and dogs         cats_dogs, as it is
    T3  a folder of classes   all images as classes of one folder, split 90/10 into train/val, per class
    T4  three parts           the same, split 50/25/25 into train/valid/test
    T5  any two folders       cats_dogs, its test called val

Each tutorial has a backbone of its own. Here one, --backbone with --weights, stands in for all of them on both sides,
so that accuracies differ by workflow, not by network. Both sides also get the same images, and a process of their own
for each stage, one after the other.

The tutorial's side is plain PyTorch the tutorial's way: ImageFolder, its PIL transforms, a DataLoader with two workers,
eager float32, its head, optimizer, schedule, batch size and number of epochs, a forward pass through the frozen
backbone in every epoch, validation after each (T2: test after every 5 steps), the best epoch kept. Its flaws are kept
as well: ``model.train()`` moves the batch-norm statistics of the "frozen" backbone, the best epoch is reported on the
images by which it was picked (T1, T3, T5), and the loop in T3 that should freeze batch norms freezes other tensors.
Where the tutorials leave something open: T4 has Adam at .001, batches of 128, at most 20 epochs, and stops after 5
without a lower validation loss. T3's fine-tuning has Adam at .001, the .0005 that its script defines being unused.

featcache's side: `extract` and `fit_head`, with their defaults, for the frozen stage; `finetune` from that head for the
fine-tune stage, by the recipe that repeats the tutorial's, and for T1 by the default recipe, too. Seconds of
fine-tuning include those of the frozen stage, which it starts from.

"whole" is the process from start to end, "work" leaves the imports out, "img/s" counts training images while training
(featcache's frozen stage: images embedded, start left out). Accuracies are of test where there is one, else of val. One
JSON line at the end holds everything, with the machine's load before each run. Measure on an idle one: where other
processes share the cores, PyTorch's threads wait for each other, and whatever computes one batch on all cores, as the
loops and fine-tuning do, gets several times slower, but extraction does not.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import logging
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from facts import machine_facts

# What ImageFolder reads, so that both sides have the same images.
_READ = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A training loop of a tutorial.

    Attributes:
        epochs, batch, optimizer (sgd or adam), lr: as named. step_lr: learning rate times .1 every 7 epochs.
        hidden, dropout: layers of the head before the last one. nll: log-softmax and NLL instead of cross entropy.
        every: batches per optimizer step. test_every: steps between tests, 0 for one after every epoch.
        patience: epochs without a lower validation loss before it stops; 0: never, and the best accuracy is kept.
        whole: all weights train.
    """

    epochs: int
    batch: int
    optimizer: str
    lr: float
    step_lr: bool = False
    hidden: tuple[int, ...] = ()
    dropout: tuple[float, ...] = ()
    nll: bool = False
    every: int = 1
    test_every: int = 0
    patience: int = 0
    whole: bool = False


_ANTS_BEES = Loop(epochs=25, batch=4, optimizer="sgd", lr=1e-3, step_lr=True)
_FLOWERS = Loop(epochs=20, batch=256, optimizer="adam", lr=1e-3, every=2)
LOOPS = {
    ("T1", "frozen"): _ANTS_BEES,
    ("T1", "finetune"): dataclasses.replace(_ANTS_BEES, whole=True),
    ("T2", "frozen"): Loop(
        epochs=1, batch=64, optimizer="adam", lr=3e-3, hidden=(256,), dropout=(0.2,), nll=True, test_every=5
    ),
    ("T3", "frozen"): _FLOWERS,
    ("T3", "finetune"): dataclasses.replace(_FLOWERS, batch=64, hidden=(512, 256), dropout=(0.25, 0.5), whole=True),
    ("T4", "frozen"): Loop(
        epochs=20, batch=128, optimizer="adam", lr=1e-3, hidden=(256,), dropout=(0.4,), nll=True, patience=5
    ),
    ("T5", "frozen"): _ANTS_BEES,
    ("T5", "finetune"): dataclasses.replace(_ANTS_BEES, whole=True),
}
RECIPES = {"T1": ("ants-bees", "default"), "T3": ("flowers",), "T5": ("ants-bees",)}
TITLES = {"T1": "ants, bees", "T2": "cats, dogs", "T3": "90/10", "T4": "50/25/25", "T5": "two folders"}


# --------------------------------------------------------------------------------------------------- the images


def copy_images(workflow: str, hymenoptera: Path, cats_dogs: Path, limit: int | None, root: Path) -> dict[str, int]:
    """Lay out the images of a workflow below ``root`` as split/class/file; returns how many each split has."""
    counts: dict[str, int] = {}
    for split, name, files in _arranged(workflow, hymenoptera, cats_dogs):
        (root / split / name).mkdir(parents=True)
        for file in files[:limit]:
            shutil.copyfile(file, root / split / name / f"{file.parent.parent.name}-{file.name}")
        counts[split] = counts.get(split, 0) + len(files[:limit])
    return counts


def _arranged(workflow: str, hymenoptera: Path, cats_dogs: Path) -> Iterator[tuple[str, str, list[Path]]]:
    """(split, class, files), everything in an order that does not depend on the file system."""
    if workflow in ("T1", "T2", "T5"):
        for (split, name), files in sorted(_files(hymenoptera if workflow == "T1" else cats_dogs).items()):
            yield ("val" if workflow == "T5" and split == "test" else split), name, files
        return
    pooled: dict[str, list[Path]] = {}
    for (_, name), files in sorted((_files(hymenoptera) | _files(cats_dogs)).items()):
        pooled.setdefault(name, []).extend(files)
    for name, files in pooled.items():
        random.Random(0).shuffle(files)
        n = len(files)
        ends = {"train": n // 2, "valid": 3 * n // 4, "test": n}
        if workflow == "T3":
            ends = {"train": n - n // 10, "val": n}
        start = 0
        for split, end in ends.items():
            yield split, name, files[start:end]
            start = end


def _files(folder: Path) -> dict[tuple[str, str], list[Path]]:
    found: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.glob("*/*/*")):
        if file.suffix.lower() in _READ:
            found.setdefault((file.parent.parent.name, file.parent.name), []).append(file)
    if not found:
        sys.exit(f"error: no image in {folder}; expected files such as {folder / 'train' / 'CLASS' / 'photo.jpg'}")
    return found


def _epochs(full: int, share: float) -> int:
    return max(1, round(share * full))


# ---------------------------------------------------------------------------------------------- the tutorial's way


def transforms_of(workflow: str) -> tuple[Any, Any]:
    """(for training, for evaluation), as the tutorial lists them."""
    from torchvision import transforms as t

    crop, flip = t.RandomResizedCrop(224), t.RandomHorizontalFlip()
    train = {
        "T2": [t.RandomRotation(30), crop, flip],
        "T3": [crop, flip, t.RandomRotation(90)],
        "T4": [
            t.RandomResizedCrop(256, scale=(0.8, 1.0)),
            t.RandomRotation(15),
            t.ColorJitter(),
            flip,
            t.CenterCrop(224),
        ],
    }.get(workflow, [crop, flip])
    sizes = {"T2": [t.Resize(255), t.CenterCrop(224)], "T3": [t.Resize((224, 224))]}
    end = [t.ToTensor(), t.Normalize(_MEAN, _STD)]
    return t.Compose(train + end), t.Compose(sizes.get(workflow, [t.Resize(256), t.CenterCrop(224)]) + end)


def build_model(job: dict[str, Any], loop: Loop, classes: int) -> Any:
    """The pretrained network with a new head, frozen as the tutorial does it."""
    import torch
    from torch import nn
    from torchvision import models

    model = models.get_model(job["backbone"], weights=None)
    if job["weights"] != "none":
        model.load_state_dict(torch.load(job["weights"], weights_only=True), strict=False)
    place = next(name for name in ("fc", "classifier", "head", "heads") if hasattr(model, name))
    setattr(model, place, nn.Identity())
    if not loop.whole:
        for parameter in model.parameters():
            parameter.requires_grad = False
    elif job["workflow"] == "T3":
        # Meant to freeze the batch norms, but the two sequences have nothing to do with each other.
        for module, parameter in zip(model.modules(), model.parameters(), strict=False):
            if isinstance(module, nn.BatchNorm2d):
                parameter.requires_grad = False
    with torch.no_grad():
        width = model.eval()(torch.zeros(1, 3, 224, 224)).shape[1]
    layers: list[nn.Module] = []
    for size, dropout in zip(loop.hidden, loop.dropout, strict=True):
        layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
        width = size
    layers += [nn.Linear(width, classes)] + ([nn.LogSoftmax(dim=1)] if loop.nll else [])
    setattr(model, place, nn.Sequential(*layers))
    return model


class Tutorial:
    """A tutorial's training loop and what it measures."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from torch import nn
        from torch.utils.data import DataLoader
        from torchvision.datasets import ImageFolder

        torch.manual_seed(0)
        self.loop = loop = LOOPS[job["workflow"], job["stage"]]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        train, evaluation = transforms_of(job["workflow"])
        self.loaders = {}
        for split in sorted(path.name for path in Path(job["folder"]).iterdir()):
            data = ImageFolder(Path(job["folder"]) / split, train if split == "train" else evaluation)
            self.loaders[split] = DataLoader(data, batch_size=loop.batch, shuffle=True, num_workers=2)
        self.test = "test" if "test" in self.loaders else "val"
        self.watched = "valid" if "valid" in self.loaders else self.test
        self.model = build_model(job, loop, len(self.loaders["train"].dataset.classes)).to(self.device)
        self.criterion = nn.NLLLoss() if loop.nll else nn.CrossEntropyLoss()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if loop.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=loop.lr, momentum=0.9)
        else:
            self.optimizer = torch.optim.Adam(parameters, lr=loop.lr)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, 0.1) if loop.step_lr else None
        self.in_training = 0.0  # seconds, evaluation left out

    def evaluate(self, split: str) -> tuple[float, float]:
        """(accuracy, mean loss)."""
        import torch

        self.model.eval()
        loss = hits = 0.0
        with torch.no_grad():
            for images, labels in self.loaders[split]:
                images, labels = images.to(self.device), labels.to(self.device)
                scores = self.model(images)
                loss += self.criterion(scores, labels).item() * len(labels)
                hits += (scores.argmax(1) == labels).sum().item()
        n = len(self.loaders[split].dataset)
        return hits / n, loss / n

    def train_epoch(self) -> list[float]:
        """One epoch; returns the accuracies of tests on the way."""
        tested = []
        self.model.train()
        begun = time.perf_counter()
        loss_sum = hits = 0.0
        for number, (images, labels) in enumerate(self.loaders["train"]):
            images, labels = images.to(self.device), labels.to(self.device)
            scores = self.model(images)
            loss = self.criterion(scores, labels)
            loss.backward()
            if number % self.loop.every == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
            loss_sum += loss.item() * len(labels)
            hits += (scores.argmax(1) == labels).sum().item()
            if self.loop.test_every and (number + 1) % self.loop.test_every == 0:
                self.in_training += time.perf_counter() - begun
                tested.append(self.evaluate(self.test)[0])
                self.model.train()
                begun = time.perf_counter()
        self.in_training += time.perf_counter() - begun
        if self.scheduler:
            self.scheduler.step()
        return tested

    def run(self, share: float) -> dict[str, Any]:
        """Train; returns what there is to report."""
        planned, epoch_seconds = _epochs(self.loop.epochs, share), []
        best, weights, waited, history = -math.inf, {}, 0, []
        for _ in range(planned):
            began = time.perf_counter()
            tested = self.train_epoch()
            if self.loop.test_every:
                history += tested or [self.evaluate(self.test)[0]]
            else:
                accuracy, loss = self.evaluate(self.watched)
                history.append(accuracy)
                score, waited = -loss if self.loop.patience else accuracy, waited + 1
                if score > best:
                    best, weights, waited = score, copy.deepcopy(self.model.state_dict()), 0
            epoch_seconds.append(time.perf_counter() - began)
            if self.loop.patience and waited >= self.loop.patience:
                break
        if weights:
            self.model.load_state_dict(weights)
        accuracy = history[-1] if self.loop.test_every else max(history)
        if self.test != self.watched:
            accuracy = self.evaluate(self.test)[0]
        return {
            "accuracy": accuracy,
            "images_per_second": len(epoch_seconds) * len(self.loaders["train"].dataset) / self.in_training,
            "epochs": len(epoch_seconds),
            "epochs_planned": planned,
            "epochs_full": self.loop.epochs,
            "epoch_seconds": epoch_seconds,
            "history": history,
        }


def tutorial_side(job: dict[str, Any]) -> dict[str, Any]:
    """A stage the tutorial's way."""
    import torch  # noqa: F401 - imports are not work
    import torchvision  # noqa: F401

    started = time.perf_counter()
    facts = Tutorial(job).run(job["share"])
    return facts | {"work": time.perf_counter() - started}


# -------------------------------------------------------------------------------------------------- featcache's way


def featcache_side(job: dict[str, Any]) -> dict[str, Any]:
    """A stage featcache's way."""
    import featcache.backbones.embed
    import featcache.backbones.encoder
    import featcache.heads.logreg
    import featcache.models.fit

    if job["stage"] == "finetune":
        import featcache.finetuning.finetune
        import featcache.finetuning.trainer  # noqa: F401
    started = time.perf_counter()
    facts = featcache_frozen(job) if job["stage"] == "frozen" else featcache_finetune(job)
    return facts | {"work": time.perf_counter() - started}


def featcache_frozen(job: dict[str, Any]) -> dict[str, Any]:
    """Embed and fit a head; the scores on val and test come with it."""
    from featcache import ExtractRequest, extract, fit_head

    request = ExtractRequest(backbone=job["backbone"], weights=job["weights"])
    features = Path(job["head"]).with_suffix(".h5")
    report = extract(job["folder"], features, request)
    fitted = fit_head(features, job["head"])
    return {
        "accuracy": fitted.val_accuracy if fitted.test_accuracy is None else fitted.test_accuracy,
        "images_per_second": report.images_per_second,
        "refused": report.refused,
        "extract_seconds": report.seconds,
        "fit_seconds": fitted.seconds,
        "C": fitted.C,
        "cv_accuracy": fitted.cv_accuracy,
    }


def featcache_finetune(job: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune from the head of the frozen stage."""
    from featcache.finetuning.finetune import finetune
    from featcache.finetuning.recipes import choose_recipe

    full = choose_recipe(job["recipe"], job["images"]["train"]).epochs or 1
    planned = _epochs(full, job["share"])
    first: list[Any] = []  # when the first step was done, and with how many images
    clock = _EpochClock()

    def progress(status: Any) -> None:
        if not first:
            first.extend((time.perf_counter(), status.done))

    output = Path(job["head"]).with_name(f"{job['workflow']}-{job['recipe']}")
    log = logging.getLogger("featcache")
    log.addHandler(clock)
    log.setLevel(logging.INFO)
    log.propagate = False
    changes = {"epochs": planned}
    report = finetune(job["folder"], output, init=job["head"], recipe=job["recipe"], changes=changes, progress=progress)
    moment, done = first
    ends = [moment - done / report.images_per_second, *clock.ends]
    return {
        "accuracy": report.val_accuracy if report.test_accuracy is None else report.test_accuracy,
        "images_per_second": report.images_per_second,
        "epochs": report.epochs,
        "epochs_planned": planned,
        "epochs_full": full,
        "epoch_seconds": [end - start for start, end in itertools.pairwise(ends)],
        "best_epoch": report.best_epoch,
        "alpha": report.alpha,
        "head_accuracy": report.head_val_accuracy,
        "p_value": report.p_value,
        "verdict": report.verdict,
    }


class _EpochClock(logging.Handler):
    """When each epoch, its evaluation included, was over, which featcache says in its log; warnings are printed."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("epoch %d/"):
            self.ends.append(time.perf_counter())
        elif record.levelno >= logging.WARNING:
            print(record.getMessage(), file=sys.stderr)


# ------------------------------------------------------------------------------------------------------ both of them


def run_job(job: dict[str, Any]) -> dict[str, Any] | None:
    """Run a job in a process of its own; None when it failed, after it said why."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    started = time.perf_counter()
    child = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--job", json.dumps(job)], stdout=subprocess.PIPE, check=False
    )
    whole = time.perf_counter() - started
    named = {key: job[key] for key in ("workflow", "stage", "side", "recipe")}
    if child.returncode:
        print(f"failed: {named}", file=sys.stderr, flush=True)
        return None
    facts = named | {"images": job["images"], "load_before": load, "whole": whole}
    facts |= json.loads(child.stdout.splitlines()[-1])
    if job["stage"] == "finetune" and job["side"] == "featcache":
        facts["alone"] = {"whole": facts["whole"], "work": facts["work"]}
        facts["whole"] += job["head_seconds"]["whole"]
        facts["work"] += job["head_seconds"]["work"]
    full, ran = facts.get("epochs_full"), facts.get("epochs")
    if full and ran == facts["epochs_planned"] < full:
        seconds_each = facts["epoch_seconds"][1:] or facts["epoch_seconds"]  # the first one has more to do
        more = (full - ran) * statistics.mean(seconds_each)
        facts["extrapolated"] = {"whole": facts["whole"] + more, "work": facts["work"] + more}
    print(f"{named}: {facts['accuracy']:.2%}, {facts['whole']:.1f} s", file=sys.stderr, flush=True)
    return facts


def run_workflow(workflow: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any] | None]:
    """All stages of a workflow that were asked for, both sides in turn; None for what failed."""
    images = copy_images(workflow, arguments.hymenoptera, arguments.cats_dogs, arguments.limit, folder / workflow)
    common = {"workflow": workflow, "folder": str(folder / workflow), "head": str(folder / f"{workflow}-head")}
    common |= {"images": images, "share": arguments.epochs_share, "recipe": None}
    common |= {"backbone": arguments.backbone, "weights": arguments.weights}
    rows: list[dict[str, Any] | None] = []
    frozen = common | {"stage": "frozen"}
    if "frozen" in arguments.stages:
        rows.append(run_job(frozen | {"side": "tutorial"}))
    tuned = "finetune" in arguments.stages and workflow in RECIPES
    if "frozen" not in arguments.stages and not tuned:
        return rows
    head = run_job(frozen | {"side": "featcache"})  # what fine-tuning starts from
    rows += [head] if "frozen" in arguments.stages else []
    if tuned:
        stage = common | {"stage": "finetune"}
        rows.append(run_job(stage | {"side": "tutorial"}))
        for recipe in RECIPES[workflow] if head else ():
            seconds = {"whole": head["whole"], "work": head["work"]} if head else {}
            rows.append(run_job(stage | {"side": "featcache", "recipe": recipe, "head_seconds": seconds}))
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line per run, and how many times faster than the tutorial's loop featcache was."""
    extrapolated = any("extrapolated" in row for row in rows)
    columns = f"{'accuracy':>10}{'whole s':>10}{'times':>7}{'work s':>10}{'times':>7}{'img/s':>8}{'times':>7}"
    print(f"{'':16}{'stage':10}{'side':22}{columns}" + (f"{'full s':>10}{'times':>7}" if extrapolated else ""))
    loops = {(row["workflow"], row["stage"]): row for row in rows if row["side"] == "tutorial"}
    for row in rows:
        loop = loops.get((row["workflow"], row["stage"])) if row["side"] == "featcache" else None
        training = row["stage"] == "finetune"  # embedded and trained images do not compare
        side = row["side"] + (f" {row['recipe']}" if row["recipe"] else "")
        line = f"{row['workflow'] + ' ' + TITLES[row['workflow']]:16}{row['stage']:10}{side:22}"
        line += f"{row['accuracy']:9.2%}" + ("*" if "extrapolated" in row else " ")
        for key in ("whole", "work"):
            line += f"{row[key]:10.1f}" + (f"{loop[key] / row[key]:7.1f}" if loop else f"{'':7}")
        line += f"{row['images_per_second']:8.1f}"
        line += f"{row['images_per_second'] / loop['images_per_second']:7.1f}" if loop and training else f"{'':7}"
        if extrapolated:
            times = full_seconds(loop) / full_seconds(row) if loop else None
            line += f"{full_seconds(row):10.1f}" + (f"{times:7.1f}" if times else f"{'':7}")
            if "extrapolated" in row:
                line += f"  extrapolated from {row['epochs']} of {row['epochs_full']} epochs"
        print(line.rstrip())
    if extrapolated:
        print("* after fewer epochs than it should have; full s: the whole process, had it run (at most) all of them")
    print("T1, T3, T5: all but featcache's frozen stage report the images by which the best epoch was chosen")


def full_seconds(row: dict[str, Any]) -> float:
    """Of the whole process with all its epochs."""
    return float(row.get("extrapolated", row)["whole"])


def _several(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; choose from {', '.join(allowed)}")
        return chosen

    return parse


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hymenoptera", type=Path)
    parser.add_argument("cats_dogs", type=Path)
    parser.add_argument("--backbone", default="mobilenet_v2", help="a torchvision name")
    parser.add_argument("--weights", default="none", help="a .pth file, or none for random ones")
    parser.add_argument("--workflows", type=_several(tuple(TITLES)), default=list(TITLES), help="T1,T2,T3,T4,T5")
    stages = ("frozen", "finetune")
    parser.add_argument("--stages", type=_several(stages), default=list(stages), help="frozen,finetune")
    parser.add_argument("--epochs-share", type=float, default=1.0, help="run this share of all epochs, at least one")
    parser.add_argument("--limit", type=int, help="only the first so many images of each class in each split")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps((tutorial_side if arguments.job["side"] == "tutorial" else featcache_side)(arguments.job)))
        return
    if not 0 < arguments.epochs_share <= 1:
        parser.error("--epochs-share must lie above 0 and at most at 1")
    started = time.perf_counter()
    rows: list[dict[str, Any] | None] = []
    with tempfile.TemporaryDirectory() as folder:
        for workflow in arguments.workflows:
            rows += run_workflow(workflow, arguments, Path(folder))
    done = [row for row in rows if row is not None]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{arguments.backbone}, {cores} cores; times: how many times faster than the tutorial's loop")
    print_table(done)
    facts = {"backbone": arguments.backbone, "weights": Path(arguments.weights).name, "limit": arguments.limit}
    facts |= {"epochs_share": arguments.epochs_share, "seconds": time.perf_counter() - started}
    print(json.dumps(facts | {"failed": len(rows) - len(done), "runs": done} | machine_facts()))
    sys.exit(len(done) < len(rows))


if __name__ == "__main__":
    main()
