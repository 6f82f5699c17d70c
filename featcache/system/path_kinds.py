"""What is on a path: one place for every command.

In: a path as somebody typed it. Out: its ``Kind``. Content decides before names. Nothing is decoded, no link out of a model or
of a folder of images is followed, and no pipe is opened. What to type instead of a wrong one: ``path_advice.py``.
"""

import contextlib
import enum
import itertools
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from featcache.errors import UsageError
from featcache.system import addresses
from featcache.system.addresses import AnyPath as AnyPath

HDF5 = b"\x89HDF\r\n\x1a\n"
CACHE_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif", ".ico",
    ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".apng", ".jpx", ".jpf", ".j2c", ".jpc",
    ".heic", ".heif", ".hif", ".heics", ".heifs",
    # images that nothing here decodes: refused with that reason, not passed over in silence
    ".avifs", ".jxl", ".jxr", ".wdp", ".hdp", ".pcx", ".pam", ".pfm", ".exr",
    ".qoi", ".dds", ".cur", ".icns", ".svg", ".svgz", ".eps", ".psd", ".psb", ".xcf", ".bpg", ".dcm",
    ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".raw", ".pef", ".srw",
    ".x3f", ".mrw", ".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mef", ".rwl", ".gpr",
))
# How images begin, TGA aside, which begins like anything; strict enough for a text not to pass for one.
_IMAGE = re.compile(b"|".join((
    rb"\xff\xd8\xff", rb"\x89PNG\r\n\x1a\n", rb"GIF8", rb"RIFF.{4}WEBP",
    rb"II[*+]\0", rb"MM\0[*+]",  # TIFF, BigTIFF, and most raw formats
    rb"II(?:U\0|R[OS]|\xbc|\x1a\0)", rb"MMOR", rb"FUJIFILMCCD-RAW", rb"FOVb", rb"\0MRM",  # raw formats, JPEG XR
    rb"BM.{12}[\x0c\x10(48@l|]\0{3}", rb"P[1-6]\s+[\d#]", rb"P7\n", rb"P[Ff]\n\d",
    rb"\0\0\0\x0c(?:jP  |JXL )", rb"\xff\x4f\xff\x51", rb"\xff\x0a",  # JPEG 2000, JPEG XL
    rb".{4}ftyp(?:avi[fs]|he[iv][cxms]|mif1|msf1|crx )",  # AVIF, HEIC, CR3
    rb"\0\0[\1\2]\0[^\0]\0.{3}\0", rb"\n[\0-\5]\x01[\1\2\4\x08]",  # icons, PCX
    rb"\(\0{3}.{8}\x01\0[\1\4\x08\x10\x18 ]\0",  # DIB
    rb"icns", rb"8BPS\0[\1\2]", rb"v/1\x01", rb"qoif", rb"DDS ", rb"%!PS-Adobe-[\d.]+ EPSF", rb"<svg\s",
)), re.DOTALL)
# fmt: on
_ZIP = re.compile(rb"PK\x03\x04|PK\x05\x06")
_PACKED = re.compile(rb"\x1f\x8b|BZh\d|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07")
_TORCH = re.compile(
    rb"PK\x03\x04.{26}[^/]+/(?:data\.pkl|\.format_version|byteorder|version)|\x80\x02\x8a\nl\xfc", re.DOTALL
)
_SHEET = re.compile(rb"ARROW1|SQLite format 3\0|PK\x03\x04.{26}(?:\[Content_Types|_rels|xl/|mimetype)", re.DOTALL)
_VIDEO = re.compile(
    rb".{4}ftyp(?:isom|iso\d|mp4|M4V|qt  |avc1|3gp)|\x1aE\xdf\xa3|RIFF.{4}AVI |.{4}(?:moov|wide)", re.DOTALL
)
ENOUGH = 10_000  # entries of a folder that are looked at


class Kind(enum.Enum):
    """What can be on a path, in words."""

    MISSING = "missing"
    ADDRESS = "an address"
    PLACE = "a place elsewhere"
    SPECIAL = "a pipe, socket or device"
    FOLDER = "a folder of images"
    BARE = "a folder without images"
    EMPTY = "an empty folder"
    WORK = "a folder of unfinished work"
    MODEL = "a model"
    CACHE = "a cache"
    EXPORT = "an exported model"
    WEIGHTS = "a file of weights"
    ARCHIVE = "an archive"
    PARQUET = "a Parquet file"
    PACKED = "a packed file"
    TABLE = "a table"
    SHEET = "a spreadsheet or data file"
    IMAGE = "an image"
    VIDEO = "a video"
    DOCUMENT = "a document"
    ARRAYS = "a file of NumPy arrays"
    FILE = "a file of another kind"


FOLDERS = (Kind.FOLDER, Kind.BARE, Kind.EMPTY)
_ZIPPED = (Kind.SHEET, Kind.DOCUMENT, Kind.ARRAYS, Kind.WEIGHTS, Kind.IMAGE)  # formats that are archives inside
SOURCES = (*FOLDERS, Kind.TABLE, Kind.ARCHIVE, Kind.PARQUET, Kind.PLACE)
_BY_SUFFIX = {
    **dict.fromkeys(IMAGE_SUFFIXES, Kind.IMAGE),
    **dict.fromkeys(CACHE_SUFFIXES, Kind.CACHE),
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt", ".jsonl"), Kind.TABLE),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers", ".feather", ".arrow", ".json", ".db"), Kind.SHEET),
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pkl"), Kind.WEIGHTS),
    **dict.fromkeys((".zip", ".tar", ".tgz"), Kind.ARCHIVE),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"), Kind.PACKED),
    ".parquet": Kind.PARQUET,
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".wmv", ".mpg", ".mpeg", ".mts"), Kind.VIDEO),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".pptx", ".html", ".md"), Kind.DOCUMENT),
    **dict.fromkeys((".npy", ".npz"), Kind.ARRAYS),
    ".onnx": Kind.EXPORT,
}


def as_path(path: AnyPath) -> Path:
    """``path``, with ``~`` or ``~user`` at its start as a shell expands it, unless that is what something here is called.

    Raises:
        UsageError: it is no path.
    """
    try:
        found = Path(path)
    except TypeError:
        what = "None" if path is None else f"a {type(path).__name__}"
        raise UsageError(f"found {what} where a path was expected; give it as text or as a pathlib.Path") from None
    if addresses.parse(path) and not os.path.lexists(found):
        return addresses.without_secrets(path)
    if not str(found).startswith("~") or os.path.lexists(found):
        return found
    try:
        return found.expanduser()
    except RuntimeError:  # there is no such user
        return found


def begins_like_an_image(head: bytes) -> bool:
    """Whether a file is an image by its first 32 bytes."""
    return _IMAGE.match(head) is not None


def kind_by_name(name: str) -> Kind:
    """What a file of this name is to hold; FILE where the name does not say."""
    if name.lower().endswith(".tar.gz"):
        return Kind.ARCHIVE
    return _BY_SUFFIX.get(os.path.splitext(name)[1].rstrip().lower(), Kind.FILE)  # noqa: PTH122


def kind_of(path: AnyPath) -> Kind:
    """What is on ``path``; of a folder or file that cannot be read as much as its name says. Never waits, never fails."""
    path = as_path(path)
    try:
        status = path.stat()
    except (OSError, ValueError):
        return _kind_of_address(path) if addresses.address_of(path) else Kind.MISSING
    if stat.S_ISDIR(status.st_mode):
        return _kind_of_folder(path)
    return _kind_of_file(path) if stat.S_ISREG(status.st_mode) else Kind.SPECIAL


def _kind_of_address(path: Path) -> Kind:
    """By its name: archives are read where they are, and a place that has a listing may hold some."""
    scheme, _ = addresses.parse(path).groups()  # type: ignore[union-attr]
    if scheme.lower() not in ("s3", "gs", "gcs", "http", "https"):
        return Kind.ADDRESS
    kind = kind_by_name(path.name)
    if kind is Kind.FILE and not scheme.lower().startswith("http"):
        return Kind.PLACE
    return kind if kind in (Kind.ARCHIVE, Kind.PARQUET) else Kind.ADDRESS


def _kind_of_folder(path: Path) -> Kind:
    manifest = path / "model.json"
    if is_model(path):
        return Kind.MODEL
    found = Kind.EMPTY
    for entry in itertools.islice(_files_below(path), ENOUGH):
        found = Kind.BARE
        if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            return Kind.FOLDER
        if not entry.is_symlink() and begins_like_an_image(head_of(entry, 32)):  # a link may lead anywhere
            return Kind.FOLDER
    if os.path.lexists(manifest):  # damaged
        return Kind.MODEL
    return Kind.WORK if path.name.endswith(".parts") else found


def is_model(folder: AnyPath) -> bool:
    """Whether the ``model.json`` in a folder is ours, not another program's; a link counts, as a hub's copy has them, unopened."""
    manifest = Path(folder, "model.json")
    return os.path.islink(manifest) or b"featcache-model" in head_of(manifest, 1 << 16)  # noqa: PTH114 - never fails


def _files_below(folder: Path) -> "Iterator[os.DirEntry[str]]":
    """Of a tree, level by level, links to folders and hidden names left out. A folder that cannot be read counts as empty."""
    pending = [str(folder)]
    for path in pending:
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.is_file() or entry.is_dir():
                    yield entry


def _kind_of_file(path: Path) -> Kind:
    head, named = head_of(path, 512), kind_by_name(path.name)
    if head.startswith(HDF5):
        return Kind.CACHE
    if begins_like_an_image(head):
        return Kind.IMAGE
    if head.startswith(b"PAR1"):
        return Kind.PARQUET
    kinds = (Kind.WEIGHTS, Kind.SHEET, Kind.ARCHIVE, Kind.PACKED, Kind.VIDEO)
    for pattern, kind in zip((_TORCH, _SHEET, _ZIP, _PACKED, _VIDEO), kinds, strict=True):
        if pattern.match(head):
            if kind is Kind.PACKED and _is_gzipped_tar(head):
                return Kind.ARCHIVE
            return named if kind in (Kind.SHEET, Kind.ARCHIVE, Kind.PACKED) and named in _ZIPPED else kind
    if head[257:262] == b"ustar":
        return Kind.ARCHIVE
    # Safetensors: the length of its header comes first.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return Kind.EXPORT if b'"featcache_version"' in head_of(path, 1 << 16) else Kind.WEIGHTS
    return Kind.DOCUMENT if head.startswith(b"%PDF-") else named


def _is_gzipped_tar(head: bytes) -> bool:
    """By the first 512 bytes of a gzip file, in which there is enough of the first header."""
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(31).decompress(head, 512)[257:262] == b"ustar"
    return False


def head_of(path: "Path | os.DirEntry[str]", size: int) -> bytes:
    """The first bytes of a regular file; of anything else none."""
    try:
        # Not blocking, in case a pipe takes its place.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            return os.read(descriptor, size) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return b""
