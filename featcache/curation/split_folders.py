"""A split as folders: SPLIT/CLASS/image, copies or hard links of the user's files. In: images and splits. Out: a folder.

It appears whole under its name, or not at all. Links are hard ones: symbolic ones would lead out of the folder, where no source is
read, and break when the images move. The user's files are only read.
"""

import hashlib
import os
import posixpath
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featcache.errors import RefusedImage, SourceError, StorageError
from featcache.images.archives import archive_in, read_member
from featcache.images.layout import is_system
from featcache.images.source import ImageList
from featcache.spec import SPLITS
from featcache.system.display import printable
from featcache.system.files import check_free_space, check_output, publish_folder, target_of

Progress = Callable[[int, int, str], None]


def check_new(folder: Path) -> None:
    """Raise StorageError, before any work, unless ``folder`` is new or empty and can be made."""
    check_output(folder, folder_allowed=True)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"cannot write {folder}: it is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise StorageError(
            f"cannot write {folder}: it is not empty, and nothing in it is replaced; choose another folder"
        )


def place_images(images: ImageList, folder: Path, *, link: bool, progress: Progress | None = None) -> None:
    """Copy or link all images that have a split to ``folder``.

    Raises:
        SourceError: a class cannot be the name of a folder. StorageError: a file cannot be read, linked or written, the disk is
        too small; nothing is left behind then.
    """
    check_new(folder)
    rows = np.flatnonzero(images.splits)
    targets = _targets(images, rows.tolist())
    if not link:
        check_free_space(target_of(folder).parent, int(np.maximum(images.sizes[rows], 0).sum()))
    with publish_folder(folder, replace=False) as temporary:
        for done, (row, target) in enumerate(targets.items(), 1):
            to = temporary / target
            to.parent.mkdir(parents=True, exist_ok=True)
            _place(images.root / images.paths[row], to, link=link)
            if progress:
                progress(done, len(targets), "files")


def _place(file: Path, to: Path, *, link: bool) -> None:
    if inside := archive_in(file):
        if link:
            raise StorageError(
                f"cannot link {file}: it lies in an archive; --copy-to copies it instead; nothing was left behind"
            )
        try:
            to.write_bytes(read_member(*inside)[0])
        except RefusedImage as reason:
            raise StorageError(f"cannot copy {file}: {reason}; nothing was left behind") from reason
        return
    try:
        if link:
            os.link(os.path.realpath(file), to)
        else:
            with file.open("rb") as here, to.open("xb") as there:
                shutil.copyfileobj(here, there, 2**20)
            shutil.copystat(file, to)
    except OSError as error:
        advice = "--copy-to copies instead: hard links need one file system that has them, and a file of yours"
        what = f"cannot link {file}: {error.strerror}; {advice}" if link else f"cannot copy {file}: {error.strerror}"
        raise StorageError(f"{what}; nothing was left behind") from error


def _targets(images: ImageList, rows: list[int]) -> dict[int, str]:
    """row -> where it goes. Images of one name in one folder, as capitals do not tell apart, carry a mark of their paths."""
    folders = ["" if label < 0 else _folder_name(images.classes[label]) for label in range(-1, len(images.classes))]
    plain = {
        row: posixpath.join(
            SPLITS[images.splits[row]], folders[images.labels[row] + 1], posixpath.basename(images.paths[row])
        )
        for row in rows
    }
    count = Counter(map(_folded, plain.values()))
    return {row: _marked(path, images.paths[row], clash=count[_folded(path)] > 1) for row, path in plain.items()}


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _marked(path: str, source: str, *, clash: bool) -> str:
    """``path``, with a mark made of ``source`` where it clashes or is hidden: hidden files are no images of a folder."""
    folder, name = posixpath.split(path)
    if not clash and not name.startswith("."):
        return path
    mark = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    stem, suffix = posixpath.splitext(name.lstrip("."))
    return posixpath.join(folder, f"{stem[:100]}-{mark}{suffix}")


def _folder_name(name: str) -> str:
    """``name``. Raises SourceError if a folder cannot have it, or is passed over with it."""
    size = len(name.encode("utf-8", "surrogateescape"))
    if set(name) & {"/", "\\", "\0"} or name.startswith(".") or is_system(name) or name != name.strip() or size > 255:
        raise SourceError(
            f"the class {printable(name[:60])!r} cannot be the name of a folder of images; write a table with -o alone, or rename it"
        )
    return name
