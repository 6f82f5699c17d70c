"""Damaged cache files: whatever happened to the bytes, reading gives an error of featcache or exactly the truth.

In: good caches of many shapes. Out: nothing that is silently wrong, hangs, crashes, or takes memory without bound.
"""

import contextlib
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import h5py
import mutation
import numpy as np
import pytest
from conftest import SPEC

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Provenance, Rows, encode_names
from featcache.cache.write import write_cache
from featcache.errors import CacheError

# rows, values per row, length of paths, refused images, type
SHAPES = (
    (0, 1, 8, 0, "float16"),
    (1, 3, 8, 1, "float32"),
    (7, 2, 300, 0, "float16"),
    (7, 2, 300, 5, "float16"),
    (40, 16, 12, 3, "float32"),
    (1300, 1, 10, 2, "float16"),
    (1300, 1, 10, 2, "float16"),  # as the one before, other content
    (2100, 2, 9, 0, "float32"),
)


def write_shape(path: Path, number: int) -> None:
    n, dim, length, refused, storage = SHAPES[number]
    rng = np.random.default_rng(number)
    rows = Rows(
        paths=encode_names([f"{'x' * (length - 8)}{rng.integers(10**7):07d}" for _ in range(n)]),
        labels=rng.integers(-1, 2, n).astype(np.int32),
        splits=rng.integers(0, 4, n).astype(np.uint8),
        digests=rng.integers(0, 256, (n, 32), dtype=np.uint8),
        sizes=rng.integers(0, 10**7, n),
        mtimes=rng.integers(0, 2**62, n),
    )
    write_cache(
        path,
        rows,
        [rng.normal(size=(n, dim)).astype(storage)],
        dim=dim,
        spec=dataclasses.replace(SPEC, storage=storage),
        classes=("ant", f"bee{number}"),
        refused=tuple((f"{k}.jpg", "truncated" * k) for k in range(refused)),
        provenance=Provenance(rest={"number": number, "versions": {"numpy": "x" * 40}}),
    )


def contents(path: Path) -> list[Any]:
    """All that a cache says, read in every way there is."""
    cache = FeatureCache.open(path)
    picked = np.arange(len(cache))[::-2]
    features = [np.asarray(cache.X).tobytes(), cache.take(picked).tobytes(), cache.dtype.str, cache.dim, len(cache)]
    columns = [getattr(cache.rows, name) for name in ("labels", "splits", "digests", "sizes", "mtimes")]
    table = [(column.dtype.str, column.shape, column.tobytes()) for column in columns]
    facts = [cache.paths, cache.classes, cache.refused, cache.spec, cache.fingerprint, cache.provenance]
    return [cache.verify(), *features, *table, *facts]


@functools.cache
def good(folder: Path) -> tuple[list[bytes], list[Any], list[list[int]]]:
    files = [folder / f"good-{number}.h5" for number in range(len(SHAPES))]
    return [f.read_bytes() for f in files], [contents(f) for f in files], [structure(f) for f in files]


def structure(path: Path) -> list[int]:
    """Offsets of libhdf5's own structures: superblock, object headers, B-trees, heaps, symbol tables."""
    data = path.read_bytes()
    found = [*range(0, 96, 8), *mutation.places(data, (b"TREE", b"HEAP", b"SNOD", b"GCOL"))]
    with h5py.File(path) as file:
        names = ["/", "refused", "refused/paths", "refused/reasons", *(name for name in file if name != "refused")]
        headers = [h5py.h5o.get_info(file[name].id).addr for name in names]
    for header in headers:
        found += range(header, header + 256, 32)
    for name in (b"format\0", b"spec\0", b"features_crc32\0", b"metadata_crc32\0", b"rows_per_checksum\0"):
        if (position := data.find(name)) >= 0:
            found += [position - 8, position, position + 16, position + 32]
    return found


# ------------------------------------------------------------------------------------- changes that h5py itself makes


def edit(path: Path, rng: np.random.Generator, other: Path) -> str:
    """Change the structure of ``path`` through h5py; parts may come from ``other``. What h5py refuses stays undone."""
    edits = (rename, retype, resize, move_attribute, retype_attribute, copy_from, rewrite, nest)
    chosen = edits[rng.integers(len(edits))]
    undone = contextlib.suppress(ValueError, KeyError, OSError, TypeError, ArithmeticError)
    with h5py.File(path, "r+") as file, h5py.File(other) as source, undone:
        chosen(file, rng, source)
    return chosen.__name__


def _name(file: h5py.File, rng: np.random.Generator) -> str:
    names = [*sorted(name for name in file if name != "refused"), "refused/paths", "refused/reasons", "refused"]
    return str(names[rng.integers(len(names))])


def _attribute(file: h5py.File, rng: np.random.Generator) -> str:
    names = sorted(file.attrs)
    return str(names[rng.integers(len(names))])


def rename(file: h5py.File, rng: np.random.Generator, _: h5py.File) -> None:
    a, b = _name(file, rng), _name(file, rng)
    file.move(a, "elsewhere")
    if rng.integers(2):
        file.move(b, a)
        file.move("elsewhere", b)


def retype(file: h5py.File, rng: np.random.Generator, _: h5py.File) -> None:
    name = _name(file, rng)
    kind = ("f8", "i2", "S3", "u1", ">i4", "c8", "b1", "V4", h5py.string_dtype())[rng.integers(9)]
    values = file[name][()]
    del file[name]
    file[name] = values.view("u1").astype("i1") if kind == "V4" else values.astype(kind)


def resize(file: h5py.File, rng: np.random.Generator, _: h5py.File) -> None:
    name = _name(file, rng)
    values = file[name][()]
    shapes = (values[:-1], np.concatenate([values, values[:1]]), values[None], values.reshape(-1), values[:0])
    del file[name]
    options = ({}, {"chunks": True}, {"compression": "gzip"}, {"maxshape": (None,)})[rng.integers(4)]
    file.create_dataset(name, data=shapes[rng.integers(5)], **options)


def move_attribute(file: h5py.File, rng: np.random.Generator, _: h5py.File) -> None:
    a, b = _attribute(file, rng), _attribute(file, rng)
    first, second = file.attrs[a], file.attrs[b]
    del file.attrs[a]
    if rng.integers(2):
        file.attrs[b], file.attrs[a] = first, second


def retype_attribute(file: h5py.File, rng: np.random.Generator, _: h5py.File) -> None:
    name = _attribute(file, rng)
    values = (0, -1, 2**63 - 1, 1.5, "text", b"bytes", [1, 2, 3], np.zeros(9000, "u1"), h5py.Empty("f4"), ["a", "b"])
    value = values[rng.integers(len(values))]
    if rng.integers(2):
        value = file.attrs[name].encode() if isinstance(file.attrs[name], str) else file.attrs[name] + 1
    del file.attrs[name]
    file.attrs[name] = value


def copy_from(file: h5py.File, rng: np.random.Generator, source: h5py.File) -> None:
    if rng.integers(2):
        name = _attribute(file, rng)
        file.attrs[name] = source.attrs[name]
    else:
        name = _name(file, rng)
        del file[name]
        source.copy(name, file, name)


def rewrite(file: h5py.File, rng: np.random.Generator, _: h5py.File) -> None:
    name = _name(file, rng)
    values = file[name][()]
    if values.size:
        values.reshape(-1).view("u1")[rng.integers(values.nbytes)] ^= 1 << rng.integers(8)
        file[name][...] = values


def nest(file: h5py.File, rng: np.random.Generator, _: h5py.File) -> None:
    name = _name(file, rng)
    targets = (file["/"], file["refused"], h5py.SoftLink("/" + name), h5py.SoftLink("/paths"), file["sizes"])
    target = targets[rng.integers(5)]
    del file[name]
    file[name] = target


# ---------------------------------------------------------------------------------------------------- the test


def attempt(folder: Path, seed: int) -> tuple[str, str, str]:
    """Damage a cache and read it: (kind of damage, outcome, why it was refused)."""
    files, truths, aims = good(folder)
    rng = np.random.default_rng(seed)
    number, other = rng.integers(len(files), size=2).tolist()
    victim = folder / f"victim-{seed % 4}.h5"
    if rng.integers(8):
        how, data = mutation.damage(files[number], rng, others=[files[other]], aims=aims[number])
        victim.write_bytes(data)
    else:
        victim.write_bytes(files[number])
        how = edit(victim, rng, folder / f"good-{other}.h5")
    # All of another cache is that cache, wherever it lies; a mixture of two is neither.
    accepted = [truths[number]] + [truths[other]] * (how == "splice")
    return how, *judge(victim, accepted)


def judge(path: Path, accepted: list[Any]) -> tuple[str, str]:
    """Whether reading ``path`` gives one of ``accepted``, or a proper refusal."""
    try:
        found = contents(path)
    except CacheError as error:
        if isinstance(error.__cause__, MemoryError):
            return "memory", str(error)
        return "refused", re.sub(r"[-\d]+", "#", str(error).replace(str(path), "FILE").split(";")[0])[:80]
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    return ("same", "") if found in accepted else ("wrong", "other content")


@pytest.mark.parametrize("count", [500, pytest.param(100_000, marks=pytest.mark.soak)])
def test_a_damaged_cache_is_refused_or_read_as_it_was(tmp_path: Path, count: int) -> None:
    for number in range(len(SHAPES)):
        write_shape(tmp_path / f"good-{number}.h5", number)
    mutation.check(__name__, tmp_path, count)
