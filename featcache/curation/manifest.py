"""The table of a split: ``path,label,split`` and, where images belong together, ``group``. In: images and splits. Out: a CSV.

It is a source for ``extract``. Written again, it keeps what it says: images that are in it keep their split.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featcache.errors import FeatcacheError, SourceError, StorageError
from featcache.images.deal import Splits
from featcache.images.groups import Indices
from featcache.images.records import csv_line, with_escape, without_escape
from featcache.images.source import ImageList
from featcache.images.tables import Files, entries, read_columns
from featcache.spec import SPLITS
from featcache.system.addresses import parse
from featcache.system.display import printable
from featcache.system.files import check_output, publish_file
from featcache.system.path_advice import typed

_COLUMNS = ("path", "label", "split", "group")


def prefix_of(table: Path, root: Path) -> str | None:
    """What leads from the folder of ``table`` to ``root``, ending in ``/``; None: ``root`` does not lie below it."""
    folder, real = table.parent.resolve(), root.resolve()
    if parse(root) or not real.is_relative_to(folder):
        return None
    between = real.relative_to(folder).as_posix()
    return "" if between == "." else f"{between}/"


def check_manifest(table: Path, source: Path | None) -> None:
    """Raise StorageError, before any work, unless ``table`` can be written: it is new, or one that was written here."""
    check_output(table)
    if table.suffix.lower() != ".csv":
        raise StorageError(f"cannot write {table}: the table is a CSV; call it {typed(table.with_suffix('.csv'))}")
    if table.exists() and source is not None and source.exists() and table.samefile(source):
        raise StorageError(f"cannot write {table}: it is what is read; choose another -o, such as split.csv")
    if table.exists():
        read_manifest(table)


def check_classes(images: ImageList) -> None:
    """Raise SourceError, before any work, if a class would be another one once it is read from the table."""
    for name in images.classes:
        if (cell := with_escape(name)) != cell.strip():
            raise SourceError(
                f"the class {printable(name[:60])!r} cannot be written to a table, where blanks around a label do not count; rename it"
            )


def read_manifest(table: Path) -> dict[str, int]:
    """path -> split, as written in ``table``. Raises StorageError if it is anything else than such a table."""
    otherwise = "it would be replaced; choose another -o, or remove it"
    try:
        read, columns = read_columns(table, Files(table.parent), dict.fromkeys(_COLUMNS))
        if set(read.header) - {*_COLUMNS} or columns.split is None:
            raise StorageError(f"cannot write {table}: it is there, and no table of a split; {otherwise}")
        return {without_escape(entry.path): entry.split for entry, _ in entries(read, columns)}
    except StorageError:
        raise
    except (FeatcacheError, OSError) as error:
        raise StorageError(
            f"cannot write {table}: it is there, and no table of a split ({error}); {otherwise}"
        ) from error


def known_splits(table: Path, images: ImageList, prefix: str) -> Splits:
    """(N,) what an earlier ``table`` says of the images, 0: nothing. Raises StorageError if it names none of them."""
    known = read_manifest(table)
    splits = np.array([known.get(prefix + path, 0) for path in images.paths], np.uint8)
    if known and not any(prefix + path in known for path in images.paths):
        raise StorageError(
            f"cannot write {table}: it is there, and names other images, the first {next(iter(known))}; choose another -o, or "
            "remove it"
        )
    return splits


def write_manifest(table: Path, images: ImageList, groups: Indices, *, prefix: str) -> None:
    """Write one row per image, in the order of ``images``; ``groups``: (N,) the first image of each one's group."""
    numbers = group_numbers(groups)
    labels = ["" if label < 0 else images.classes[label] for label in images.labels.tolist()]
    shown = ["" if not split else SPLITS[split] for split in images.splits.tolist()]
    several = any(numbers)
    with publish_file(table) as file:
        file.write(csv_line(_COLUMNS if several else _COLUMNS[:3]))
        for path, *cells, number in zip(images.paths, labels, shown, numbers, strict=True):
            file.write(csv_line([prefix + path, *cells, *([number] if several else [])]))


def group_numbers(groups: Indices) -> Sequence[str]:
    """(N,) a number from 1 for each group of several images, in their order; "" for those that stand alone."""
    _, where, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    numbers = np.where(sizes > 1, np.cumsum(sizes > 1), 0)[where]
    return ["" if not number else str(number) for number in numbers.tolist()]
