"""Damage, made at random from a seed, and a child process in which what reads the damaged file may crash or hang.

In: the bytes of a good file, or the name of a test module with ``attempt(folder, seed)`` and ``good(folder)``, called first.
Out: other bytes; or one ``Outcome`` per seed, also for those that took the child down, which is then started again for the rest.
"""

import collections
import faulthandler
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SIZES = (1, 2, 4, 8)
SECTORS = (512, 4096)
SECONDS = 10.0  # for one seed
GOOD = ("same", "refused")


class Outcome(NamedTuple):
    """What became of one mutation: ``same``, ``refused``, ``wrong``, ``memory``, or ``crashed`` and ``hung``."""

    seed: int
    how: str
    kind: str
    detail: str


# ---------------------------------------------------------------------------------------------------- the damage


def damage(
    data: bytes, rng: np.random.Generator, *, others: Sequence[bytes], aims: Sequence[int] = ()
) -> tuple[str, bytes]:
    """One kind of damage, and the file after it.

    Args:
        data: the good file. rng: decides everything.
        others: further good files, to swap parts with. aims: offsets of what is worth hitting: structure, headers.
    """
    kinds: list[Callable[..., None]] = [flip, truncate, extend, blank, swap, duplicate, splice]
    if aims:  # twice as often: chance alone rarely meets a length or an address
        kinds += [flip_aimed, overwrite] * 3
    kind = kinds[rng.integers(len(kinds))]
    buffer = bytearray(data)
    more = {splice: others, flip_aimed: aims, overwrite: aims}
    kind(buffer, rng, *([more[kind]] if kind in more else []))
    return kind.__name__, bytes(buffer)


def places(data: bytes, marks: Sequence[bytes]) -> list[int]:
    """Where any of ``marks`` stands."""
    return [found.start() for mark in marks for found in re.finditer(re.escape(mark), data)]


def flip(buffer: bytearray, rng: np.random.Generator) -> None:
    """One to eight bits anywhere."""
    for position in rng.integers(len(buffer), size=rng.integers(1, 9)):
        buffer[position] ^= 1 << rng.integers(8)


def flip_aimed(buffer: bytearray, rng: np.random.Generator, aims: Sequence[int]) -> None:
    """One to three bits near an aim."""
    for _ in range(rng.integers(1, 4)):
        position = min(int(rng.choice(aims)) + int(rng.integers(64)), len(buffer) - 1)
        buffer[position] ^= 1 << rng.integers(8)


def overwrite(buffer: bytearray, rng: np.random.Generator, aims: Sequence[int]) -> None:
    """A number near an aim becomes one that breaks assumptions: none, all ones, the file's size, another aim."""
    size = SIZES[rng.integers(len(SIZES))]
    start = min(int(rng.choice(aims)) + int(rng.integers(48)), len(buffer) - size)
    values = [
        0,
        1,
        2**7,
        2**15,
        2**31,
        2**63 - 1,
        2**64 - 1,
        len(buffer),
        int(rng.choice(aims)),
        int(rng.integers(300)),
    ]
    value = int(values[rng.integers(len(values))]) & (2 ** (8 * size) - 1)
    buffer[start : start + size] = value.to_bytes(size, "little")


def truncate(buffer: bytearray, rng: np.random.Generator) -> None:
    """The end is missing."""
    del buffer[rng.integers(len(buffer)) :]


def extend(buffer: bytearray, rng: np.random.Generator) -> None:
    """Something follows the end."""
    tail = bytes(rng.integers(1, 5000)) if rng.integers(2) else rng.bytes(rng.integers(1, 5000))
    buffer += tail


def _sector(buffer: bytearray, rng: np.random.Generator) -> tuple[int, int]:
    size = SECTORS[rng.integers(len(SECTORS))]
    return size, size * int(rng.integers(-(-len(buffer) // size)))


def blank(buffer: bytearray, rng: np.random.Generator) -> None:
    """A sector of zeros or ones, as disks return them."""
    size, start = _sector(buffer, rng)
    length = len(buffer[start : start + size])
    buffer[start : start + size] = (b"\0", b"\xff")[rng.integers(2)] * length


def swap(buffer: bytearray, rng: np.random.Generator) -> None:
    """Two sectors change places."""
    size, first = _sector(buffer, rng)
    second = size * int(rng.integers(-(-len(buffer) // size)))
    a, b = bytes(buffer[first : first + size]), bytes(buffer[second : second + size])
    if len(a) == len(b):
        buffer[first : first + size], buffer[second : second + size] = b, a


def duplicate(buffer: bytearray, rng: np.random.Generator) -> None:
    """A sector holds what belongs into another one."""
    size, first = _sector(buffer, rng)
    second = size * int(rng.integers(-(-len(buffer) // size)))
    part = bytes(buffer[first : first + size])
    buffer[second : second + len(part)] = part


def splice(buffer: bytearray, rng: np.random.Generator, others: Sequence[bytes]) -> None:
    """Sectors of another good file, at the same place: lost writes, blocks of a deleted file."""
    other = others[rng.integers(len(others))]
    size, _ = _sector(buffer, rng)
    count = -(-len(buffer) // size)
    if rng.integers(2):
        first = int(rng.integers(count))
        chosen = range(first, min(count, first + int(rng.integers(1, 9))))
    else:
        chosen = np.flatnonzero(rng.integers(2, size=count)).tolist()
    for number in chosen:
        part = other[number * size : (number + 1) * size]
        buffer[number * size : number * size + len(part)] = part


# ------------------------------------------------------------------------------------------------- the child process


def run_isolated(module: str, folder: Path, seeds: range, *, megabytes: int) -> list[Outcome]:
    """``module.attempt(folder, seed)`` for every seed, in a child with limits on time per seed and on memory."""
    outcomes: list[Outcome] = []
    todo = seeds
    while todo:
        arguments = (module, folder, todo.start, todo.stop, megabytes)
        command = [sys.executable, __file__, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # where the module is
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
        outcomes += [Outcome(*line) for line in lines if len(line) == 4]
        open_ends = [line[0] for line in lines[-1:] if len(line) == 1]
        assert open_ends or done.returncode == 0, f"the child of {module} died: {done.stderr.decode()[-2000:]}"
        if not open_ends:
            break
        error = done.stderr.decode()
        kind = "hung" if "Timeout (" in error else "crashed"
        outcomes.append(Outcome(open_ends[0], "", kind, f"exit {done.returncode}: {error[-1500:]}"))
        todo = range(open_ends[0] + 1, seeds.stop)
    return outcomes


def check(module: str, folder: Path, count: int, *, megabytes: int = 512) -> None:
    """Print the table of outcomes; fail on all that is neither a refusal nor the truth, naming the seeds."""
    outcomes = run_isolated(module, folder, range(count), megabytes=megabytes)
    table = collections.Counter((o.kind, o.detail if o.kind == "refused" else "") for o in outcomes)
    for (kind, detail), times in table.most_common():
        print(f"{times:7} {kind} {detail}")
    bad = [outcome for outcome in outcomes if outcome.kind not in GOOD]
    assert not bad, f"{len(bad)} of {len(outcomes)}: " + "\n".join(map(str, bad[:20]))


def _child(name: str, folder: str, first: str, last: str, megabytes: str) -> None:
    module = importlib.import_module(name)
    module.good(Path(folder))  # imports and caches are paid for before the limits count
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + int(megabytes) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    for seed in range(int(first), int(last)):
        print(json.dumps([seed]), flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        how, kind, detail = module.attempt(Path(folder), seed)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > int(megabytes) / 4:
            kind, detail = "memory", f"{grown:.0f} MiB, {detail}"
        print(json.dumps([seed, how, kind, detail]), flush=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    _child(*sys.argv[1:])
