"""Find the images below a folder, and what its folders mean. In: a folder. Out: a ``Listing``, ordered by path.

Nothing is decoded; a file is opened only if its name does not say what it is. What cannot be followed safely is refused unopened.
"""

import bisect
import errno
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from featcache.errors import Refusal
from featcache.images.layout import Layout, is_system, read_layout, some, split_of
from featcache.spec import SPLITS
from featcache.system.path_kinds import IMAGE_SUFFIXES, begins_like_an_image, head_of, is_model
from featcache.system.workdir import is_work_folder

log = logging.getLogger("featcache")
_METADATA = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's ImageFolder
_BESIDE = (".curves.png", ".train.png", ".val.png", ".test.png", ".all.png")  # curves and contact sheets of models
HIDDEN, _OWN, OTHERS = "hidden or system files and folders", "what featcache made", "files that are no images"


class Entry(NamedTuple):
    """An image: its path below the root, bytes and nanoseconds (-1: unknown), label, position in ``SPLITS``, group."""

    path: str
    size: int
    mtime: int
    label: str | None = None
    split: int = 0
    group: str = ""


class Listing(NamedTuple):
    """What was found: images, classes (also empty ones), what was refused and how many images are listed before each."""

    root: Path
    entries: list[Entry]
    classes: set[str]
    refused: list[Refusal]
    refused_at: list[int]
    metadata: tuple[str, ...] = ()  # tables that describe images of the folder they lie in


def list_folder(root: Path, *, labelled: bool, class_level: int | None) -> Listing:
    """The images below ``root``; if ``labelled`` with classes and splits (see ``layout.read_layout``).

    Raises:
        SourceError: the folders can be read in two ways. UsageError: no image lies as deep as ``class_level``.
    """
    walk = _Walk(root)
    files = sorted(walk, key=lambda entry: entry.path)
    refused = sorted(walk.refused, key=lambda refusal: refusal.path)
    refused_at = [bisect.bisect(files, refusal.path, key=lambda entry: entry.path) for refusal in refused]
    say_passed_over(root, walk.passed)
    if not labelled:
        return Listing(root, files, set(), refused, refused_at)
    metadata = tuple(sorted(walk.metadata))
    filled = {entry.path.rpartition("/")[0] for entry in files}
    layout = read_layout(root, walk.folders, filled, class_level)
    _say_what_splits_are_called(root, walk.folders, layout)
    meant = {folder: meaning(folder, layout) for folder in filled}
    entries = [Entry(*entry[:3], *meant[entry.path.rpartition("/")[0]]) for entry in files]
    classes = {label for label, _ in (meaning(folder, layout) for folder in walk.folders) if label is not None}
    return Listing(root, entries, classes, refused, refused_at, metadata)


def _say_what_splits_are_called(root: Path, folders: set[str], layout: Layout) -> None:
    names = {folder.split("/")[layout.split_at or 0] for folder in folders if folder.count("/") == layout.split_at}
    if renamed := [f"{name} as {SPLITS[split_of(name)]}" for name in sorted(names) if name not in SPLITS]:
        log.info("%s: split folders: %s", root, ", ".join(renamed))


def meaning(folder: str, layout: Layout) -> tuple[str | None, int]:
    """The label and the split of the images in ``folder``."""
    names, split_at = folder.split("/") if folder else [], layout.split_at
    label = names[layout.class_at] if len(names) > layout.class_at else None
    return label, split_of(names[split_at]) if split_at is not None and len(names) > split_at else 0


class _Walk:
    """Every image below a folder, once, in no order; and what was met on the way.

    Attributes:
        folders: all that were entered, relative. refused: what cannot be followed safely, unopened.
        passed: how often what was passed over: (kind, name or suffix). metadata: paths of tables called as Hugging Face does.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.folders, self.metadata = root, set[str](), list[str]()
        self.refused: list[Refusal] = []
        self.passed: Counter[tuple[str, str]] = Counter()

    def __iter__(self) -> Iterator[Entry]:
        real_root = os.path.realpath(self.root)
        pending: list[tuple[str, tuple[str, ...]]] = [("", (real_root,))]
        while pending:
            prefix, ancestors = pending.pop()
            try:
                with os.scandir(os.path.join(self.root, prefix)) as entries:  # noqa: PTH118 - names may be any bytes, speed matters
                    for entry in entries:
                        try:
                            if found := self._met(entry, prefix, ancestors, pending):
                                yield found
                        except FileNotFoundError:  # gone since
                            pass
                        except OSError as error:
                            self.refused.append(Refusal(prefix + entry.name, f"cannot be read: {error.strerror}"))
            except OSError as error:
                self.refused.append(Refusal(prefix.rstrip("/"), f"folder cannot be read: {error.strerror}"))

    def _met(
        self,
        entry: "os.DirEntry[str]",
        prefix: str,
        ancestors: tuple[str, ...],
        pending: list[tuple[str, tuple[str, ...]]],
    ) -> Entry | None:
        """An image; anything else is noted, a folder put into ``pending`` with what it lies in. Raises OSError."""
        path, linked = prefix + entry.name, entry.is_symlink()
        if entry.name.startswith("."):
            self.passed[HIDDEN, entry.name] += 1
        elif linked and (reason := _why_not_follow(entry, ancestors)):
            self.refused.append(Refusal(path, reason))
        elif entry.is_dir():
            if self._enters(entry):
                real = os.path.realpath(entry.path) if linked else f"{ancestors[-1]}/{entry.name}"
                pending.append((path + "/", (*ancestors, real)))
                self.folders.add(path)
        elif not entry.is_file():
            self.refused.append(Refusal(path, "not a regular file (pipe, socket or device)"))
        elif entry.name in _METADATA:
            self.metadata.append(path)
        elif self._takes(entry):
            status = entry.stat()
            return Entry(path, status.st_size, status.st_mtime_ns)
        return None

    def _enters(self, folder: "os.DirEntry[str]") -> bool:
        """Not what a system keeps, nor what featcache writes: parts of caches, unfinished fine-tunings, model folders."""
        if is_system(folder.name):
            self.passed[HIDDEN, folder.name] += 1
        elif is_work_folder(folder.path) or _is_own_model(folder.path):
            self.passed[_OWN, folder.name] += 1
        else:
            return True
        return False

    def _takes(self, file: "os.DirEntry[str]") -> bool:
        """Images, but what featcache draws beside a model."""
        suffix = _suffix(file.name)
        drawn = file.name.endswith(_BESIDE) and file.path.rsplit(".", 2)[0]
        if drawn and _is_own_model(drawn):
            self.passed[_OWN, file.name] += 1
        elif suffix in IMAGE_SUFFIXES or holds_an_image(file):
            return True
        else:
            self.passed[OTHERS, suffix if suffix.startswith(".") else file.name] += 1
        return False


def _is_own_model(folder: str) -> bool:
    """For sure: what a link calls a model may be a class of the user's."""
    return is_model(folder) and not os.path.islink(f"{folder}/model.json")  # noqa: PTH114


def say_passed_over(source: Path | str, passed: Mapping[tuple[str, str], int]) -> None:
    """Say in one line what is no image, by kind, with some names: (kind, name or suffix) -> how often."""
    parts = []
    for kind in (HIDDEN, OTHERS, _OWN):
        names = {name: count for (of, name), count in passed.items() if of == kind}
        if names:
            parts.append(f"{kind}: {sum(names.values())} ({some(names)})")
    if parts:
        log.info("%s: passed over %s", source, "; ".join(parts))


def has_image_suffix(name: str) -> bool:
    """Whether a file of this name is listed whatever it holds."""
    return _suffix(name) in IMAGE_SUFFIXES


def _suffix(name: str) -> str:
    return name[name.rfind(".") :].rstrip().lower()


def _why_not_follow(entry: "os.DirEntry[str]", ancestors: tuple[str, ...]) -> str | None:
    try:
        target = os.path.realpath(entry.path, strict=True)
    except FileNotFoundError:
        return "dangling link"
    except OSError as error:
        return "link loop" if error.errno == errno.ELOOP else f"link that cannot be followed: {error.strerror}"
    if os.path.commonpath([ancestors[0], target]) != ancestors[0]:
        return "link that leaves the source folder"
    return "link loop" if target in ancestors else None


def holds_an_image(file: "os.DirEntry[str] | Path") -> bool:
    """Of a regular file: content counts, not the name."""
    return begins_like_an_image(head_of(file, 32))
