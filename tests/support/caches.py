"""Cache files and models that tests write by hand.

In: how many rows, of how many values. Out: the file, and the features in it.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SPEC

from featcache.cache.format import Provenance, Rows, encode_names
from featcache.cache.write import write_cache
from featcache.heads.head import FittedHead, Head
from featcache.models.model import save_model
from featcache.models.training_rows import Compared, HeldOut, TrainingRows

CLASSES_DIM = 12  # of ``make_classes``


def plain_rows(paths: Iterable[str], **columns: Any) -> Rows:
    """Rows of images of which nothing is known but what ``columns`` say."""
    names = encode_names(paths)
    n = len(names)
    unknown = {"labels": np.full(n, -1, np.int32), "splits": np.zeros(n, np.uint8)}
    digests = b"".join(hashlib.sha256(name).digest() for name in names.tolist())  # no two are copies
    unknown |= {"digests": np.frombuffer(digests, np.uint8).reshape(-1, 32)}
    unknown |= {"sizes": np.zeros(n, np.int64), "mtimes": np.zeros(n, np.int64)}
    return Rows(names, **(unknown | columns))


def make_rows(n: int) -> Rows:
    return plain_rows(
        (f"class/ü-{number}.jpg" for number in range(n)),
        labels=(np.arange(n) % 3 - 1).astype(np.int32),
        splits=(np.arange(n) % 4).astype(np.uint8),
        digests=np.random.default_rng(n).integers(0, 256, (n, 32), dtype=np.uint8),
        sizes=np.arange(n, dtype=np.int64) * 1000,
        mtimes=np.arange(n, dtype=np.int64) * 10**18,
    )


def make_cache(path: Path, n: int = 50, dim: int = 8, **changes: Any) -> np.ndarray:
    X = np.random.default_rng(n).normal(size=(n, dim)).astype(np.float16)
    options: dict[str, Any] = {"spec": SPEC, "classes": ("a", "b"), "refused": (("x.jpg", "empty file"),)}
    write_cache(path, make_rows(n), [X[: n // 3], X[n // 3 :]], dim=dim, **(options | changes))
    return X


def make_classes(
    path: Path, labels: Any, splits: Any = None, *, seed: int = 0, spread: float = 1.0, **changes: Any
) -> np.ndarray:
    """A cache of overlapping Gaussian classes a, b, c, ..."""
    labels = np.asarray(labels)
    n = len(labels)
    centres = np.random.default_rng(1).normal(0, 2, (6, CLASSES_DIM))
    X = (centres[labels] + np.random.default_rng(seed).normal(0, spread, (n, CLASSES_DIM))).astype(np.float16)
    splits = np.zeros(n, np.uint8) if splits is None else np.asarray(splits, np.uint8)
    rows = plain_rows((f"{k:04d}.jpg" for k in range(n)), labels=labels.astype(np.int32), splits=splits)
    classes = tuple("abcdef"[: max(labels.max() + 1, 1)])
    provenance = Provenance(source="torchvision", reload="IMAGENET1K_V1")
    options = {"dim": CLASSES_DIM, "spec": SPEC, "classes": classes, "provenance": provenance}
    write_cache(path, rows, [X], **(options | changes))
    return X


def save_head(path: Path, head: Head, classes: tuple[str, ...], number: int) -> Path:
    """A model that consists of this head; ``number`` is all that it says about its training."""
    facts: dict[str, Any] = {"weights": {"source": "x", "reload": None}, "metrics": {"accuracy": 0.5}}
    fitted = FittedHead(head, (), {}, [])
    save_model(path, fitted, classes=classes, spec=SPEC, training={"number": number}, **facts)
    return path


HISTORY: list[dict[str, Any]] = [
    {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 0.9, "val_accuracy": 0.6},
    {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.8, "val_loss": None, "val_accuracy": None},
    {"epoch": 3, "train_loss": 0.2, "train_accuracy": 0.9, "val_loss": 0.7, "val_accuracy": 0.75},
]
COMPARISON = {
    "n": 6,
    "head_accuracy": 0.5,
    "tuned_accuracy": 4 / 6,
    "only_second_right": 2,
    "only_first_right": 1,
    "p_value": 1.0,
}


def save_tuned(path: Path) -> Path:
    """What a fine-tuning leaves: three epochs; answers to six val images, of which it won 4 and 5, and lost 2."""
    digests = np.arange(6 * 32, dtype=np.uint8).reshape(6, 32)
    labels, head, answers = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 1, 0, 0, 1, 0]), np.array([0, 1, 1, 0, 0, 1])
    rows = TrainingRows(
        np.ones((3, 32), np.uint8),
        np.zeros(3, np.int64),
        held_out=HeldOut(digests, labels, np.eye(2)[answers].astype(np.float32)),
        compared=Compared(digests, labels, head, answers),
    )
    save_model(
        path,
        FittedHead(Head("linear", "none", np.zeros(3), np.ones(3), ((np.eye(2, 3), np.zeros(2)),)), (), {}, []),
        classes=("a", "b"),
        spec=SPEC,
        weights={"source": "", "reload": None},
        training={"recipe": "gradual", "best_epoch": 3},
        metrics={
            "history": HISTORY,
            "head_val_accuracy": 0.5,
            "comparison": {"val": COMPARISON},
            "report": {"verdict": "it is so"},
        },
        rows=rows,
        finetuned=True,
    )
    return path
