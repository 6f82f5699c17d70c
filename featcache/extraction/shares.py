"""Which images are whose, where several processes embed one list: share I of N, from the list alone.

In: ``I/N`` or ``auto``, what a scheduler says in the environment, an ``ImageList``. Out: a ``Share``, its positions in the list, and
the digest that tells whether two processes mean the same list.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping

import numpy as np

from featcache.cache.format import Indices, bytes_of, encode_names
from featcache.errors import UsageError
from featcache.images.source import ImageList

_MOST = 100_000  # shares; more are a mistake


@dataclasses.dataclass(frozen=True)
class Share:
    """One of several shares.

    Attributes:
        number: from 1 to ``of``. read: where that was found, in words; empty if it was given.

    Raises:
        UsageError: there is no such share.
    """

    number: int
    of: int
    read: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of <= _MOST:
            raise UsageError(
                f"--part {self.number}/{self.of}{f' ({self.read})' if self.read else ''}: expected I/N with I from 1 to N, and N at "
                f"most {_MOST:,}"
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def tag(self) -> str:
        """As names of parts carry it."""
        return f"{self.number}of{self.of}"

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str] = os.environ) -> "Share":
        """``3/64``; ``auto``, or with the count stated ``auto/64``: as the one scheduler says whose variables ``environ`` has.

        Slurm arrays say all; with a count stated, tasks are numbered from 1, so that some can be run again (``--array=4``).
        Jobs of Kubernetes say an index from 0, and the count only where the job sets ``JOB_COMPLETIONS``; ``torchrun`` says both.

        Raises:
            UsageError: neither; no scheduler, or two; numbers that do not fit.
        """
        if found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text):
            return cls(int(found[1]), int(found[2]))
        if not (found := re.fullmatch(r"auto(?:/(\d{1,9}))?", text)):
            raise UsageError(f"--part must be I/N, such as 3/64, or auto, found {text!r}")
        stated = int(found[1]) if found[1] else None
        readers = {"SLURM_ARRAY_TASK_ID": _of_slurm, "JOB_COMPLETION_INDEX": _of_kubernetes, "WORLD_SIZE": _of_torchrun}
        there = [name for name in readers if environ.get(name) and not (name == "WORLD_SIZE" and environ[name] == "1")]
        if len(there) != 1:
            what = f"both {' and '.join(there)} are set" if there else _none_of(readers, environ)
            raise UsageError(f"--part {text}: {what}; give --part I/N")
        return readers[there[0]](environ, stated)


def _none_of(names: Iterable[str], environ: Mapping[str, str]) -> str:
    """Words for no scheduler, or for what is too little of ``torchrun``."""
    if not any(environ.get(name) for name in ("RANK", "WORLD_SIZE")):
        return f"none of {', '.join(names)} is set"
    others = " and ".join(name for name in names if name != "WORLD_SIZE")
    return f"{_torchrun_says(environ)}, and {others} are not set"


def _torchrun_says(environ: Mapping[str, str]) -> str:
    alone = ", one process alone" if environ.get("WORLD_SIZE") == "1" else ""
    found = [f"{name} is {environ.get(name) or 'not set'}" for name in ("RANK", "WORLD_SIZE")]
    return f"{' and '.join(found)} (torchrun sets both){alone}"


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Raises UsageError."""
    text = environ.get(name) or ("" if default is None else str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise UsageError(
            f"--part auto: {name} is {text or 'not set'}, expected a whole number; give --part auto/N or I/N"
        )
    return int(text)


def _of_slurm(environ: Mapping[str, str], stated: int | None) -> Share:
    task = _number(environ, "SLURM_ARRAY_TASK_ID")
    if stated is not None:
        return Share(task, stated, f"SLURM_ARRAY_TASK_ID={task}")
    count, first, step = (
        _number(environ, f"SLURM_ARRAY_TASK_{name}", default)
        for name, default in (("COUNT", None), ("MIN", 1), ("STEP", 1))
    )
    last = _number(environ, "SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
    read = f"SLURM_ARRAY_TASK_ID={task}, {count} tasks from {first} to {last} by {step}"
    if step < 1 or (task - first) % step or last != first + (count - 1) * step:
        raise UsageError(f"--part auto: {read} has gaps; give --part auto/N with an array from 1 to N, or parts of it")
    return Share((task - first) // step + 1, count, read)


def _of_kubernetes(environ: Mapping[str, str], stated: int | None) -> Share:
    index = _number(environ, "JOB_COMPLETION_INDEX")
    count = stated if stated is not None else _number(environ, "JOB_COMPLETIONS")
    return Share(index + 1, count, f"JOB_COMPLETION_INDEX={index}, {count} completions")


def _of_torchrun(environ: Mapping[str, str], stated: int | None) -> Share:
    if not environ.get("RANK"):
        raise UsageError(f"--part auto: {_torchrun_says(environ)}; give --part I/N")
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if stated not in (None, world):
        raise UsageError(f"--part auto/{stated}: WORLD_SIZE is {world}; start as many processes, or give --part I/N")
    return Share(rank + 1, world, f"RANK={rank}, WORLD_SIZE={world}")


def owners(images: ImageList, of: int) -> Indices:
    """(N,) the number, 1 to ``of``, of the share that each image is in: neighbours together, as even as that allows.

    Images weigh what they cost: their bytes, for reading and decoding, and as much again on average, for the network, to which
    all images are alike. Neighbours stay together as they lie together on the disk, or in one archive.
    """
    sizes = np.maximum(images.sizes, 0)
    weights = sizes + max(1, int(sizes.sum()) // max(1, len(sizes)))
    ends = np.cumsum(weights)
    middles = (2 * ends - weights) / (2 * ends[-1]) if len(ends) else np.empty(0)  # exact to the last bit everywhere
    return np.minimum((middles * of).astype(np.intp), of - 1) + 1


def listing_digest(images: ImageList) -> str:
    """sha256 (hex) of what is listed: paths, sizes, labels, classes, splits and what was refused unopened, but no times.

    So copies of the images on disks of several machines are one list.
    """
    digest = hashlib.sha256()
    unopened = [f"{refusal.path}\0{refusal.reason}" for refusal in images.refused]
    for names in (images.paths, images.classes, unopened):
        encoded = encode_names(names)
        digest.update(f"{encoded.dtype.str}{len(encoded)}".encode())
        digest.update(bytes_of(encoded))
    for column, dtype in ((images.sizes, "<i8"), (images.labels, "<i4"), (images.splits, "u1")):
        digest.update(bytes_of(column.astype(dtype)))
    return digest.hexdigest()


def named(numbers: list[int]) -> str:
    """``1, 4-7`` of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
