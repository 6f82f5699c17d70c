"""What the names of folders mean: classes, splits, or neither. In: names, and which hold images. Out: a ``Layout``, or why not.

Nothing here touches the disk. A name is never guessed at where it may mean two things: the user is asked.
"""

import functools
import logging
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from featcache.errors import SourceError, UsageError
from featcache.spec import SPLITS

log = logging.getLogger("featcache")
CLASS_LEVELS = (1, 2, 3)
# As people write them, small and without what separates words: ``Training_Set``, ``val-images``, ``train2017``, ``1 test``.
_BESIDE = r"(?:data(?:set)?|sets?|images?|imgs?|photos?|pictures?|folder|split){0,2}"
_SPLIT = re.compile(
    rf"\d{{0,4}}{_BESIDE}(?:(?P<train>train(?:ing|val)?)|(?P<test>test(?:ing)?)|"
    rf"(?P<val>val(?:id(?:ation)?)?|dev(?:el(?:opment)?)?|eval(?:uation)?)){_BESIDE}\d{{0,4}}"
)
# Folders that systems, network drives and archives make, of thumbnails, deleted files and caches.
_SYSTEM = frozenset(
    (
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot", "lost+found"),
        *("system volume information", "$recycle.bin", "recycler", "__macosx", "__pycache__"),
    )
)


class Layout(NamedTuple):
    """The positions, among the folders of a path, of those that name its class and its split."""

    class_at: int
    split_at: int | None


@functools.lru_cache(maxsize=4096)
def split_of(name: str) -> int:
    """The position in ``SPLITS`` that a name means: train, val or test as people write them; 0 if it means none."""
    found = _SPLIT.fullmatch(re.sub(r"[\s_.-]", "", name).lower())
    return SPLITS.index(found.lastgroup or "") if found else 0


def is_system(folder: str) -> bool:
    """Whether a folder of this name is one that no user made."""
    return folder.lower() in _SYSTEM


def alike(names: Iterable[str]) -> list[list[str]]:
    """Those of ``names`` that a reader takes for one: other capitals, other Unicode forms, blanks around them."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_plain(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def read_layout(root: Path, folders: Iterable[str], filled: Iterable[str], class_level: int | None) -> Layout:
    """What the folders below ``root`` stand for.

    Args:
        folders: all of them, relative, ``/`` between names. filled: those that hold images themselves.
        class_level: how deep the folder lies that names the class, from 1; decided by the names when None.

    Raises:
        SourceError: there are two ways to read them. UsageError: no image lies that deep.
    """
    paths = [folder.split("/") for folder in filled if folder]
    tops = sorted({folder.split("/")[0] for folder in folders})
    known = any(map(split_of, tops))
    if class_level is None:
        class_level = _class_level(root, tops, {f.split("/")[0] for f in folders if "/" in f}, paths)
        if class_level == 2 and (common := sub_folders_in_common(paths, 2)):
            log.warning(
                "%s: class folders hold folders of the same names (%s); if those are the classes, say --class-level 3",
                root,
                some(common),
            )
    elif not any(len(path) >= class_level for path in paths):
        raise UsageError(
            f"{root} has no image {class_level} folders deep, so --class-level {class_level} finds no class"
        )
    if class_level > 1:
        return Layout(class_level - 1, 0 if known else None)
    return Layout(0, 1 if _are_splits({path[1] for path in paths if len(path) > 1}) else None)


def sub_folders_in_common(paths: list[list[str]], level: int) -> list[str]:
    """Names of folders that lie in several folders of ``level``, if there are others beside them: they may be the classes.

    One name alone (``images`` in each class folder) is no set of classes.
    """
    pairs = {(path[level - 1], path[level]) for path in paths if len(path) > level}
    above: dict[str, set[str]] = {}
    for upper, lower in pairs:
        above.setdefault(_plain(lower), set()).add(upper)
    return sorted({lower for _, lower in pairs if len(above[_plain(lower)]) > 1}) if len(above) > 1 else []


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of ``names``, in order."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _class_level(root: Path, tops: list[str], nested: set[str], paths: list[list[str]]) -> int:
    """1 or 2; ``nested``: top folders that hold folders. Raises SourceError.

    One folder called like a split may be a class (train, bus, ship); several and nothing else, or one that holds class
    folders, are splits.
    """
    splits = [top for top in tops if split_of(top)]
    others = [top for top in tops if not split_of(top)]
    known = {split_of(top) for top in splits}
    inner = {path[1] for path in paths if len(path) > 1}
    if not others:
        if len(known) < 2 and not nested:
            return 1
        if len(splits) > len(known):
            raise _two_readings(root, f"has several folders for one split ({some(splits, 6)})", "rename them, or ")
        return 2
    if len(known) > 1 or (nested and nested <= {*splits}):
        advice = "move those out, rename them to train, val or test, or "
        raise _two_readings(
            root, f"holds {some(splits)}, named like splits, beside other folders ({some(others)})", advice
        )
    if _are_splits(inner):
        holders = {path[0] for path in paths if len(path) > 1}
        alone = f"give {root / min(holders)} itself, or " if len(holders) == 1 else ""
        raise _two_readings(root, f"has splits ({some(inner)}) inside of its folders ({some(holders)})", alone)
    if common := sub_folders_in_common(paths, 1):
        raise _two_readings(root, f"has folders of the same names ({some(common)}) in its folders {some(tops)}")
    return 1


def _are_splits(names: set[str]) -> bool:
    found = {split_of(name) for name in names}
    return len(found) > 1 and 0 not in found


def _two_readings(root: Path, found: str, advice: str = "") -> SourceError:
    return SourceError(
        f"{root} {found} and can be read in two ways; {advice}say --class-level 1 if the top folders are the classes, "
        "--class-level 2 if the folders inside of them are, in splits called train, val and test or in places that mean nothing"
    )


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()
