"""Find the images of a source and decode one of them, or say why not.

In: a folder or CSV. Out: an ``ImageList`` (paths, labels, splits, in a stable order) and, per image, an upright 8-bit
RGB picture or a ``RefusedImage`` with the reason. ``hold_out`` makes a val split where the source has none. The user's
files are only ever read.
"""

import bisect
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import os
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, UnidentifiedImageError

from featcache.cache.cache import SPLITS
from featcache.errors import SourceError, UsageError
from featcache.images.integrity import load_whole
from featcache.system.supervisor import DecoderCrashedError, decoding

_SPLIT_FOLDERS = {"train": 1, "val": 2, "valid": 2, "validation": 2, "test": 3}
# fmt: off
_EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif", ".ico",
    # images that nothing here decodes: refused with that reason, not passed over in silence
    ".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
))
# fmt: on
# A list of its own, not "whatever Pillow opens": EPS, for one, would start another program. TGA, which has no signature,
# comes last: some icons would pass for one.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
MAX_FILE_BYTES = 2**30
MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte once decoded


class RefusedImage(Exception):  # noqa: N818 - a state of an image, not an error of the program
    """One image cannot be embedded; ``str()`` is the reason, fit to be stored."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An image that was not embedded: its path relative to the root, and why.

    ``position`` is how many images are listed before it.
    """

    path: str
    reason: str
    position: int = 0


@dataclasses.dataclass(frozen=True)
class ImageList:
    """The images of a source, sorted by path (CSV: in the order of its rows).

    Attributes:
        root: what ``paths`` are relative to.
        paths: N relative paths, POSIX separators; bytes that are not UTF-8 appear as surrogate escapes.
        labels: (N,) int32, index into ``classes``; -1 when unknown.
        classes: sorted class names over all splits, empty class folders included.
        splits: (N,) uint8, index into ``cache.SPLITS``.
        sizes, mtimes: (N,) int64, bytes and nanoseconds, as listed.
        refused: entries that were skipped without opening them, and why.
    """

    root: Path
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    classes: tuple[str, ...]
    splits: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    mtimes: npt.NDArray[np.int64]
    refused: tuple[Refusal, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: npt.NDArray[np.intp]) -> "ImageList":
        """Return the list restricted to ``rows``, same classes and refusals."""
        picked = {name: getattr(self, name)[rows] for name in ("labels", "splits", "sizes", "mtimes")}
        return dataclasses.replace(self, paths=tuple(self.paths[row] for row in rows), **picked)


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
        root, found, names, refused = _list_folder(source, labelled)
    elif source.is_file() and source.suffix.lower() == ".csv":
        root, found, names, refused = _list_csv(source)
    elif source.exists():
        raise SourceError(f"{source} is neither a folder of images nor a .csv file")
    else:
        raise SourceError(f"{source} does not exist; give a folder of images or a CSV with the header path,label,split")
    if not found and not refused:
        expected = "rows below its header" if source.is_file() else f"files such as {source / 'CLASS' / 'photo.jpg'}"
        raise SourceError(f"no image found in {source}; expected {expected}")
    return _image_list(root, found, names, refused)


def _image_list(root: Path, found: list[_Entry], names: set[str], refused: list[Refusal]) -> ImageList:
    classes = tuple(sorted(names | {entry.label for entry in found if entry.label is not None}))
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
    )


def hold_out(images: ImageList, *, share: float = 0.1, seed: int = 0) -> ImageList:
    """A copy in which a part of each class's training images is val, for a source without a val split.

    Touched are labelled images of the split train, or of none if there are no splits at all: they become train or val.
    The seed and an image's own path decide, not the order of the list, and one more image moves at most one other.

    Args:
        images: as listed.
        share: part of each class to hold out, between 0 and 1; of two images or more at least one is, and one is not.
        seed: another one holds out other images.

    Raises:
        UsageError: impossible share.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to hold out must lie between 0 and 1, found {share}")
    train, val = SPLITS.index("train"), SPLITS.index("val")
    touched = (images.labels >= 0) & (images.splits == (train if images.splits.any() else 0))
    splits = images.splits.copy()
    splits[touched] = train
    for label in np.unique(images.labels[touched]):
        rows = np.flatnonzero(touched & (images.labels == label)).tolist()
        wanted = min(max(round(share * len(rows)), 1), len(rows) - 1)
        rows.sort(key=lambda row: _rank(images.paths[row], seed))
        splits[rows[:wanted]] = val
    return dataclasses.replace(images, splits=splits)


def _rank(path: str, seed: int) -> bytes:
    """A place in a random order that depends on nothing but the path and the seed."""
    return hashlib.sha256(f"{seed} {path}".encode("utf-8", "surrogateescape")).digest()


# ---------------------------------------------------------------------------------------------------- folders


def _list_folder(root: Path, labelled: bool) -> tuple[Path, list[_Entry], set[str], list[Refusal]]:
    unordered: list[Refusal] = []
    files = sorted(_walk(root, unordered), key=lambda entry: entry.path)
    order = [entry.path for entry in files]
    refused = [Refusal(r.path, r.reason, bisect.bisect(order, r.path)) for r in sorted(unordered, key=lambda r: r.path)]
    if not labelled:
        return root, files, set(), refused
    top_folders = _subfolders(root)
    names: set[str] = set()
    if _is_split_layout(root, top_folders):
        for folder in top_folders:
            names.update(_subfolders(root / folder))
        depth = 1
    else:
        names.update(top_folders)
        depth = 0
    found = []
    for entry in files:
        folders = entry.path.split("/")[:-1]
        split = _SPLIT_FOLDERS[folders[0].lower()] if depth and folders else 0
        label = folders[depth] if len(folders) > depth else None
        found.append(_Entry(entry.path, entry.size, entry.mtime, label, split))
    return root, found, names, refused


def _is_split_layout(root: Path, folders: list[str]) -> bool:
    """Whether the top folders are splits; a mixture of splits and others is refused.

    One folder called like a split may be a class (train, bus, ship); several and nothing else, or one that holds class
    folders, are splits.
    """
    splits = [folder for folder in folders if folder.lower() in _SPLIT_FOLDERS]
    others = sorted(set(folders) - set(splits))
    if not others:
        return len(splits) > 1 or any(_subfolders(root / folder) for folder in splits)
    if len(splits) > 1 and any(_subfolders(root / folder) for folder in splits):
        raise SourceError(
            f"{root} holds the splits {', '.join(splits)} beside other folders ({', '.join(others[:3])}); "
            "move those out, or list the images in a CSV with the header path,label,split"
        )
    return False


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not _is_passed_over(e) and e.is_dir(follow_symlinks=False))
    except OSError:
        return []  # walking it gives the reason


def _is_passed_over(entry: "os.DirEntry[str]") -> bool:
    """Hidden entries, and what featcache itself writes: a cache's parts, unfinished fine-tunings and model folders."""
    if _is_hidden(entry.name) or entry.name.endswith(".h5.parts"):
        return True
    marks = ("model.json", "run.json") if entry.name.endswith(".parts") else ("model.json",)
    return entry.is_dir(follow_symlinks=False) and any(os.path.lexists(f"{entry.path}/{mark}") for mark in marks)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


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
                name = entry.name
                path = prefix + name
                if entry.is_file(follow_symlinks=False):  # nearly always: no call that it does not need
                    if not _is_hidden(name) and (_has_extension(name) or _looks_like_image(entry.path)):
                        status = entry.stat()
                        yield _Entry(path, status.st_size, status.st_mtime_ns)
                elif _is_passed_over(entry):
                    continue
                elif entry.is_symlink() and (reason := _why_not_follow(entry, real_root, ancestors)):
                    refused.append(Refusal(path, reason))
                elif entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else f"{ancestors[-1]}/{entry.name}"
                    pending.append((path + "/", (*ancestors, real)))
                elif not entry.is_file():
                    refused.append(Refusal(path, "not a regular file (pipe, socket or device)"))
                elif _has_extension(name) or _looks_like_image(entry.path):
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


def _has_extension(name: str) -> bool:
    return name[name.rfind(".") :].lower() in _EXTENSIONS


def _looks_like_image(path: str) -> bool:
    """Whether a regular file without an image's extension starts like one: content counts, not the name."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif"


# -------------------------------------------------------------------------------------------------------- CSV


def _list_csv(source: Path) -> tuple[Path, list[_Entry], set[str], list[Refusal]]:
    root = source.parent
    real_root = os.path.realpath(root)
    found: list[_Entry] = []
    refused: list[Refusal] = []
    seen: dict[str, _Entry] = {}
    for row, where in _csv_rows(source):
        entry = _csv_entry(row, where)
        try:
            entry = _resolved(entry, real_root)
        except RefusedImage as reason:
            refused.append(Refusal(entry.path, str(reason), len(found)))
            continue
        known = seen.setdefault(entry.path, entry)
        if known != entry:
            raise SourceError(f"{where}: {entry.path} is listed twice, with different labels or splits")
        if known is entry:
            found.append(entry)
    return root, found, {entry.label for entry in found if entry.label is not None}, refused


def _csv_rows(source: Path) -> Iterator[tuple[dict[str, str | None], str]]:
    """Each row, and where it stands."""
    with source.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = [column.strip() for column in reader.fieldnames or []]
            if (
                "path" not in columns
                or not set(columns) <= {"path", "label", "split"}
                or len(set(columns)) < len(columns)
            ):
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


# ---------------------------------------------------------------------------------------------------- reading


def read_image(path: Path) -> tuple[bytes, int, int]:
    """Read one file whole.

    Returns:
        Its bytes, its size and its modification time (ns; -1 if it is so recent that a later change could carry the
        same time stamp, which makes the next run read the file again instead of trusting the stamp).

    Raises:
        RefusedImage: it cannot be read, is no regular file, or changed meanwhile.
    """
    try:
        # Not blocking: a pipe that took a file's place must not hang the run.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise RefusedImage("not a regular file")
            if before.st_size > MAX_FILE_BYTES:
                raise RefusedImage(f"too large: {before.st_size} bytes, at most {MAX_FILE_BYTES} are read")
            data = file.read()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise RefusedImage(f"cannot be read: {error.strerror}") from error
    except (ValueError, MemoryError) as error:
        raise RefusedImage(f"cannot be read: {error or 'not enough memory'}") from error
    if len(data) != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise RefusedImage("changed while it was read")
    settled = time.time_ns() - after.st_mtime_ns > 2_000_000_000  # FAT, the coarsest in use, counts in 2 s
    return data, len(data), after.st_mtime_ns if settled else -1


@contextlib.contextmanager
def strict_decoding() -> Iterator[None]:
    """Silence Pillow's warnings, about images it considers large (``MAX_PIXELS`` is the limit here) and odd metadata.

    Nor may Pillow load truncated images, as notebooks like to allow it. Such settings are global, so this belongs around a
    whole run, never around one image on one thread.
    """
    allowed, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    with contextlib.ExitStack() as after, warnings.catch_warnings():
        after.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", allowed)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def reduction(shorter_edge: int, at_least: int | None) -> int:
    """1, 2, 4 or 8: the scale at which a JPEG may be decoded if ``at_least`` pixels of its shorter edge are wanted.

    Twice as many are left, so that the filter which resizes the rest, not the decoder, decides what is seen.
    """
    return next((factor for factor in (8, 4, 2) if at_least and shorter_edge >= 2 * factor * at_least), 1)


def decode(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """Decode a file's bytes into an upright 8-bit RGB image.

    Orientation is applied; palettes are expanded, CMYK converted, grey replicated, alpha composited on white, 16 bits
    scaled to 8; of several frames the first counts; colour profiles are ignored, as the backbones' training did.
    Where pixels are missing or known to be damaged the image is refused; ``completeness`` says what goes unnoticed.

    Args:
        data: the file. at_least: JPEGs may be decoded at a reduced scale that leaves their shorter edge twice this.

    Raises:
        RefusedImage: not an image, truncated, too large, or of a kind without a defined conversion.
    """
    if not data:
        raise RefusedImage("empty file")
    try:
        with decoding(data, at_least=at_least), Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RefusedImage(f"too large: {image.width}x{image.height} pixels, at most {MAX_PIXELS} are decoded")
            factor = reduction(min(image.size), at_least)
            if factor > 1 and isinstance(image, JpegImagePlugin.JpegImageFile):
                image.draft(image.mode, (image.width // factor, image.height // factor))
            load_whole(image, data)
            upright = ImageOps.exif_transpose(image) if is_turned(image) else image
            return _to_rgb(upright, image.format)
    except RefusedImage:
        raise
    except DecoderCrashedError as error:
        raise RefusedImage(str(error)) from error
    except UnidentifiedImageError as error:
        raise RefusedImage("not an image, or of an unsupported format") from error
    except Image.DecompressionBombError as error:
        raise RefusedImage(f"too large: more than {MAX_PIXELS} pixels") from error
    except MemoryError as error:
        raise RefusedImage("too large for the memory at hand") from error
    except Exception as error:  # decoders raise nearly anything on damaged files; one image must not end a run
        raise RefusedImage(f"damaged: {' '.join(str(error).split()) or type(error).__name__}"[:300]) from error


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data of an opened image asks for another orientation; none that can be read asks for nothing."""
    try:
        return image.getexif().get(0x0112, 1) in range(2, 9)
    except Exception:  # nearly anything; it says nothing about the pixels
        return False


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65535
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise RefusedImage(f"32-bit pixels (mode {image.mode}) have no defined range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")
