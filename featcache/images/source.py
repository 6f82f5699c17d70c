"""Find the images of a source, without decoding any: their paths, labels and splits.

In: a folder or CSV. Out: an ``ImageList``, in a stable order. The user's files are only ever read.
"""

import bisect
import csv
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.errors import Refusal, RefusedImage, SourceError, UsageError
from featcache.spec import SPLITS
from featcache.system.workdir import is_work_folder

_TRAIN, _VAL, _TEST = (SPLITS.index(name) for name in ("train", "val", "test"))
_SPLIT_FOLDERS = {"train": _TRAIN, "val": _VAL, "valid": _VAL, "validation": _VAL, "test": _TEST}
# fmt: off
_EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif", ".ico",
    # images that nothing here decodes: refused with that reason, not passed over in silence
    ".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
))
# fmt: on
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")


@dataclasses.dataclass(frozen=True)
class ImageList:
    """The images of a source, sorted by path (CSV: in the order of its rows).

    Attributes:
        root: what ``paths`` are relative to.
        paths: N relative paths, POSIX separators; bytes that are not UTF-8 appear as surrogate escapes.
        labels: (N,) int32, index into ``classes``; -1 when unknown.
        classes: sorted class names over all splits, empty class folders included.
        splits: (N,) uint8, index into ``spec.SPLITS``.
        sizes, mtimes: (N,) int64, bytes and nanoseconds, as listed.
        refused: entries that were skipped without opening them, and why.
        refused_at: how many images are listed before each of these.
    """

    root: Path
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    classes: tuple[str, ...]
    splits: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    refused: tuple[Refusal, ...] = ()
    refused_at: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def all_refused(self, refused: Mapping[int, str]) -> str:
        """What to say when not one image is left: those of the list were ``refused`` (number -> reason), too."""
        reasons = [*(Refusal(self.paths[index], reason) for index, reason in refused.items()), *self.refused]
        return (
            f"all {len(reasons)} images of {self.root} were refused, the first, {reasons[0].path}: {reasons[0].reason}"
        )

    def take(self, rows: npt.NDArray[np.intp]) -> "ImageList":
        """Return the list restricted to ``rows``, same classes and refusals."""
        picked = {name: getattr(self, name)[rows] for name in ("labels", "splits", "sizes", "mtimes")}
        at = tuple(np.searchsorted(rows, self.refused_at).tolist()) if len(self.refused_at) else ()
        return dataclasses.replace(self, paths=tuple(self.paths[row] for row in rows), refused_at=at, **picked)


class _Entry(NamedTuple):
    path: str
    size: int
    mtime: int
    label: str | None = None
    split: int = 0


def list_images(source: Path, *, labelled: bool = True) -> ImageList:
    """List the images of ``source`` without decoding any.

    Args:
        source: a folder of class folders; a folder with ``train`` and ``val``/``valid``/``validation``/``test`` on top of
            that; a flat folder (no labels); or a CSV file with the header ``path[,label[,split]]``.
        labelled: whether folders mean classes and splits; if not, any tree of folders will do.

    Raises:
        SourceError: missing, ambiguous, or without a single image.
        UsageError: the CSV's header or a split name is not understood.
    """
    if source.is_dir():
        images = _list_folder(source, labelled)
    elif source.is_file() and source.suffix.lower() == ".csv":
        images = _list_csv(source)
    elif source.exists():
        raise SourceError(f"{source} is neither a folder of images nor a .csv file")
    else:
        raise SourceError(f"{source} does not exist; give a folder of images or a CSV with the header path,label,split")
    if not images.paths and not images.refused:
        expected = "rows below its header" if source.is_file() else f"files such as {source / 'CLASS' / 'photo.jpg'}"
        raise SourceError(f"no image found in {source}; expected {expected}")
    return images


def _image_list(
    root: Path, found: list[_Entry], folders: set[str], refused: list[Refusal], refused_at: list[int]
) -> ImageList:
    """``folders``: classes that may be empty."""
    classes = tuple(sorted(folders | {entry.label for entry in found if entry.label is not None}))
    index = {name: number for number, name in enumerate(classes)}
    return ImageList(
        root=root,
        paths=tuple(entry.path for entry in found),
        labels=np.array([-1 if entry.label is None else index[entry.label] for entry in found], np.int32),
        classes=classes,
        splits=np.array([entry.split for entry in found], np.uint8),
        sizes=np.array([entry.size for entry in found], np.int64),
        mtimes=np.array([entry.mtime for entry in found], np.int64),
        refused=tuple(refused),
        refused_at=tuple(refused_at),
    )


# ---------------------------------------------------------------------------------------------------- folders


def _list_folder(root: Path, labelled: bool) -> ImageList:
    refused: list[Refusal] = []
    files = sorted(_walk(root, refused), key=lambda entry: entry.path)
    refused.sort(key=lambda refusal: refusal.path)
    refused_at = [bisect.bisect(files, refusal.path, key=lambda entry: entry.path) for refusal in refused]
    if not labelled:
        return _image_list(root, files, set(), refused, refused_at)
    classes, depth = _subfolders(root), 0
    if _is_split_layout(root, classes):
        classes, depth = {name for split in classes for name in _subfolders(root / split)}, 1
    found = []
    for entry in files:
        folders = entry.path.split("/")[:-1]
        split = _SPLIT_FOLDERS[folders[0].lower()] if depth and folders else 0
        label = folders[depth] if len(folders) > depth else None
        found.append(_Entry(entry.path, entry.size, entry.mtime, label, split))
    return _image_list(root, found, classes, refused, refused_at)


def _is_split_layout(root: Path, folders: set[str]) -> bool:
    """Whether the top folders are splits; a mixture of splits and others is refused.

    One folder called like a split may be a class (train, bus, ship); several and nothing else, or one that holds class
    folders, are splits.
    """
    splits = sorted(folder for folder in folders if folder.lower() in _SPLIT_FOLDERS)
    others = sorted(folders - set(splits))
    hold_classes = any(_subfolders(root / folder) for folder in splits)
    if others and len(splits) > 1 and hold_classes:
        raise SourceError(
            f"{root} holds the splits {', '.join(splits)} beside other folders ({', '.join(others[:3])}); "
            "move those out, or list the images in a CSV with the header path,label,split"
        )
    return not others and (len(splits) > 1 or hold_classes)


def _subfolders(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {e.name for e in entries if not _is_passed_over(e) and e.is_dir(follow_symlinks=False)}
    except OSError:
        return set()  # walking it gives the reason


def _is_passed_over(entry: "os.DirEntry[str]") -> bool:
    """Hidden entries, and what featcache writes: parts of caches, unfinished fine-tunings, model folders, their curves."""
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        return True
    if entry.is_dir(follow_symlinks=False):
        return is_work_folder(entry.path) or os.path.lexists(f"{entry.path}/model.json")
    if entry.name.endswith(".curves.png") and entry.is_file(follow_symlinks=False):
        return os.path.lexists(f"{entry.path.removesuffix('.curves.png')}/model.json")
    return False


def _walk(root: Path, refused: list[Refusal]) -> Iterator[_Entry]:
    """Yield every image below ``root``; what cannot be followed safely is appended to ``refused``, unopened."""
    real_root = os.path.realpath(root)
    pending: list[tuple[str, tuple[str, ...]]] = [("", (real_root,))]
    while pending:
        prefix, ancestors = pending.pop()
        try:
            entries = os.scandir(os.path.join(root, prefix))  # noqa: PTH118 - names may be any bytes, speed matters
        except OSError as error:
            refused.append(Refusal(prefix.rstrip("/"), f"folder cannot be read: {error.strerror}"))
            continue
        with entries:
            for entry in entries:
                path = prefix + entry.name
                if _is_passed_over(entry):
                    continue
                if entry.is_symlink() and (reason := _why_not_follow(entry, real_root, ancestors)):
                    refused.append(Refusal(path, reason))
                elif entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else f"{ancestors[-1]}/{entry.name}"
                    pending.append((path + "/", (*ancestors, real)))
                elif not entry.is_file():
                    refused.append(Refusal(path, "not a regular file (pipe, socket or device)"))
                elif _looks_like_image(entry):
                    status = entry.stat()
                    yield _Entry(path, status.st_size, status.st_mtime_ns)


def _why_not_follow(entry: "os.DirEntry[str]", real_root: str, ancestors: tuple[str, ...]) -> str | None:
    try:
        target = os.path.realpath(entry.path, strict=True)
    except OSError as error:
        return "dangling link" if isinstance(error, FileNotFoundError) else "link loop"
    if os.path.commonpath([real_root, target]) != real_root:
        return "link that leaves the source folder"
    return "link loop" if target in ancestors else None


def _looks_like_image(entry: "os.DirEntry[str]") -> bool:
    """Whether a regular file has an image's extension, or starts like one: content counts, not the name."""
    if entry.name[entry.name.rfind(".") :].lower() in _EXTENSIONS:
        return True
    try:
        with open(entry, "rb") as file:  # noqa: PTH123
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif"


# -------------------------------------------------------------------------------------------------------- CSV


def _list_csv(source: Path) -> ImageList:
    root = source.parent
    real_root = os.path.realpath(root)
    found: list[_Entry] = []
    refused: list[Refusal] = []
    refused_at: list[int] = []
    seen: dict[str, _Entry] = {}
    for row, where in _csv_rows(source):
        entry = _csv_entry(row, where)
        try:
            entry = _resolved(entry, real_root)
        except RefusedImage as reason:
            refused.append(Refusal(entry.path, str(reason)))
            refused_at.append(len(found))
            continue
        known = seen.setdefault(entry.path, entry)
        if known != entry:
            raise SourceError(f"{where}: {entry.path} is listed twice, with different labels or splits")
        if known is entry:
            found.append(entry)
    return _image_list(root, found, set(), refused, refused_at)


def _csv_rows(source: Path) -> Iterator[tuple[dict[str, str | None], str]]:
    """Each row, and where it stands."""
    with source.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = [column.strip() for column in reader.fieldnames or []]
            unexpected = Counter(columns) - Counter(("path", "label", "split"))  # unknown, or twice
            if "path" not in columns or unexpected:
                raise UsageError(f"{source} has the columns {columns}, expected the header path[,label[,split]]")
            reader.fieldnames = columns
            for row in reader:
                yield row, f"{source}, line {reader.line_num}"
        except csv.Error as error:
            raise SourceError(f"{source}, after line {reader.line_num}: not a CSV row ({error})") from error


def _csv_entry(row: dict[str, str | None], where: str) -> _Entry:
    path, label, split = row.get("path"), (row.get("label") or "").strip() or None, (row.get("split") or "none").strip()
    if not path or None in row:
        raise SourceError(f"{where}: found {len(row)} fields with path {path!r}, expected the header's columns")
    if split.lower() not in (*SPLITS, *_SPLIT_FOLDERS):
        raise UsageError(f"{where}: split {split!r} is not one of train, val, test or empty")
    return _Entry(path, -1, -1, label, _SPLIT_FOLDERS.get(split.lower(), 0))


def _resolved(entry: _Entry, real_root: str) -> _Entry:
    """The entry under its one real path, so that no spelling of it counts twice; refused if that lies elsewhere.

    A missing file stays in the list: reading it gives the reason, in its place.
    """
    try:
        target = os.path.realpath(os.path.join(real_root, entry.path))  # noqa: PTH118 - an absolute path may replace it
        if os.path.commonpath([real_root, target]) != real_root:
            raise RefusedImage("lies outside the folder of the CSV")
    except ValueError as error:  # another drive, or a NUL in the name
        raise RefusedImage(f"cannot be found: {error}") from error
    path = os.path.relpath(target, real_root).replace(os.sep, "/")
    try:
        status = os.stat(target)  # noqa: PTH116
    except OSError:
        return entry._replace(path=path)
    return entry._replace(path=path, size=status.st_size, mtime=status.st_mtime_ns)
