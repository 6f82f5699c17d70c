"""What is on a path, and what to type instead where that is of no use: one place for every command.

In: a path as somebody typed it. Out: its ``Kind``; or an error that says what is there, what was expected and the command that
was probably meant. Content decides before names. Nothing is decoded, no link out of a model is followed, and no pipe is opened.
"""

import contextlib
import difflib
import enum
import itertools
import os
import re
import shlex
import stat
import urllib.parse
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from featcache.errors import CacheError, FeatcacheError, ModelError, SourceError, StorageError, UsageError
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
_ENOUGH = 10_000  # entries of a folder that are looked at


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


_FOLDERS = (Kind.FOLDER, Kind.BARE, Kind.EMPTY)
_ZIPPED = (Kind.SHEET, Kind.DOCUMENT, Kind.ARRAYS, Kind.WEIGHTS, Kind.IMAGE)  # formats that are archives inside
_SOURCES = (*_FOLDERS, Kind.TABLE, Kind.ARCHIVE, Kind.PARQUET, Kind.PLACE)
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
    if os.path.lexists(manifest) and (manifest.is_symlink() or b"featcache-model" in _head(manifest, 1 << 16)):
        return Kind.MODEL
    found = Kind.EMPTY
    for entry in itertools.islice(_files_below(path), _ENOUGH):
        found = Kind.BARE
        if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES or begins_like_an_image(_head(Path(entry.path), 32)):
            return Kind.FOLDER
    if os.path.lexists(manifest):  # damaged
        return Kind.MODEL
    return Kind.WORK if path.name.endswith(".parts") else found


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
    head, named = _head(path, 512), kind_by_name(path.name)
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
        return Kind.EXPORT if b'"featcache_version"' in _head(path, 1 << 16) else Kind.WEIGHTS
    return Kind.DOCUMENT if head.startswith(b"%PDF-") else named


def _is_gzipped_tar(head: bytes) -> bool:
    """By the first 512 bytes of a gzip file, in which there is enough of the first header."""
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(31).decompress(head, 512)[257:262] == b"ustar"
    return False


def _head(path: Path, size: int) -> bytes:
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


# ------------------------------------------------------------------------------------------------- what to type instead

_INPUTS = (*_SOURCES, Kind.CACHE, Kind.IMAGE, Kind.FILE)
_WANTED: dict[str, tuple[type[FeatcacheError], str, tuple[Kind, ...]]] = {
    "model": (ModelError, "the folder of a model", (Kind.MODEL,)),
    "cache": (CacheError, "a cache", (Kind.CACHE,)),
    "images": (SourceError, "a folder, an archive or a table of images", (*_SOURCES, Kind.FILE)),
    "images or cache": (
        SourceError,
        "a folder, an archive or a table of images, or a cache",
        (*_SOURCES, Kind.FILE, Kind.CACHE),
    ),
    "inputs": (SourceError, "images, a folder, archive or table of them, or a cache", _INPUTS),
    "vectors": (SourceError, "a table of vectors, Parquet or .npz", (Kind.PARQUET, Kind.ARRAYS)),
    "cache or model": (CacheError, "a cache or the folder of a model", (Kind.CACHE, Kind.MODEL)),
}
HERE = ...  # the place of a path among the words of a command
Words = Sequence[object]
_EXPORTED = "it is for other programs to run"
# Of -o.
_EXAMPLES = {
    "extract": "features.h5",
    "fit-head": "model",
    "finetune": "model-ft",
    "export": "model.onnx",
    "import": "features.h5",
    "audit": "audit",
}


def check_path(path: AnyPath, wanted: str, words: Words) -> None:
    """Raise unless ``path`` holds what a command takes in its place. What is missing is left to whoever opens it.

    Args:
        path: as typed. wanted: a key of ``_WANTED``.
        words: the command as typed, ``HERE`` in the place of ``path``; of options only those that are paths.

    Raises:
        SourceError, ModelError, CacheError: it holds something else. StorageError: it is what ``-o`` names.
    """
    if str(path) == "-":  # what is piped in
        return
    path, kind = as_path(path), kind_of(path)
    error, expected, accepted = _WANTED[wanted]
    if kind in accepted or (wanted == "model" and os.path.lexists(path / "model.json")):
        if words[1:2] == (HERE,) and (output := _output(words)) is not None and _same(path, output):
            raise StorageError(
                f"cannot write {typed(path)}: it is what is read; choose another -o, such as "
                f"{typed(_apart(_EXAMPLES[str(words[0])], path))}"
            )
        return
    if wanted == "model" and kind is not Kind.MISSING and os.path.lexists(path.parent / "model.json"):
        raise error(f"{typed(path)} lies in a model; did you mean {_again(words, path.parent)}?")
    if swapped := _swapped(path, kind, accepted, words):
        raise error(swapped)
    if kind is not Kind.MISSING:
        raise error(f"{typed(path)} is {kind.value}, expected {expected}; {_advice(path, kind, wanted, words)}")


def is_wanted(kind: Kind, wanted: str) -> bool:
    """Whether a command takes a ``kind`` where it wants what ``_WANTED`` calls ``wanted``."""
    return kind in _WANTED[wanted][2]


def missing(path: AnyPath, otherwise: str) -> str:
    """What to say of a path that is not there: the nearest name beside it; without one ``otherwise``."""
    path = as_path(path)
    name = shlex.quote(str(path))
    if os.path.lexists(path):
        return f"{name} is a link that leads nowhere, or cannot be read; {otherwise}"
    first = next((place for place in reversed(path.parents) if not os.path.lexists(place)), path)
    with contextlib.suppress(OSError, ValueError), os.scandir(first.parent) as entries:
        names = {entry.name.lower(): entry.name for entry in itertools.islice(entries, _ENOUGH)}
        for near in difflib.get_close_matches(first.name.lower(), names, n=3):
            if os.path.lexists(guess := first.parent / names[near] / path.relative_to(first)):
                return f"{name} does not exist; did you mean {typed(guess)}?"
    return f"{name} does not exist; {otherwise}"


def place_for(path: Path) -> str:
    """Where a hint has somebody write what was looked for on ``path``: there, unless that is among images. As typed in a shell."""
    among = str(path.parent) != "." and kind_of(path.parent) is Kind.FOLDER
    return typed(path.name if among else path)


def typed(path: object) -> str:
    """A path, or another word, as it is typed in a shell."""
    text = addresses.shown(str(path))
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _again(words: Words, word: object) -> str:
    """The command, ``word`` in the place that is in question."""
    options = ("-o", "--init", "--repair", "--images", "--backbone", "--reuse")
    shown = [str(each) if each in options else typed(word if each is HERE else each) for each in words]
    return f"`featcache {' '.join(shown)}`"


def _output(words: Words) -> Path | None:
    return as_path(str(words[words.index("-o") + 1])) if "-o" in words else None


def _same(path: Path, output: Path) -> bool:
    try:
        return path.samefile(output)
    except OSError:
        return False


def _swapped(path: Path, kind: Kind, accepted: tuple[Kind, ...], words: Words) -> str:
    """Whether another path of the command is what is wanted here: what to say then."""
    fit = (*_SOURCES, Kind.IMAGE, Kind.CACHE, Kind.MODEL)
    for place, other in enumerate(words):
        if not isinstance(other, os.PathLike) or not (kind in fit or kind is Kind.MISSING):
            continue
        written = words[place - 1] == "-o"
        if (kind is Kind.MISSING) == written and kind not in accepted and (found := kind_of(other)) in accepted:
            exchanged = [other if each is HERE else path if at == place else each for at, each in enumerate(words)]
            what = "does not exist" if kind is Kind.MISSING else f"is {kind.value}"
            return f"{typed(path)} {what} and {typed(other)} is {found.value}; did you mean {_again(exchanged, other)}?"
    return ""


def _apart(name: str, *sources: object) -> str:
    """``name`` in the working folder; outside of ``sources`` if that is one of them or lies in one: no place for anything else."""
    with contextlib.suppress(OSError):  # the working folder is gone
        here = Path.cwd()
        for folder in (Path(str(source)).resolve() for source in sources):
            if folder.is_dir() and (folder == here or folder in here.parents):
                return os.path.relpath(folder.parent / name)
    return name


# ------------------------------------------------------------------------------------------------------------- advice


def _advice(path: Path, kind: Kind, wanted: str, words: Words) -> str:
    """What to do about a path of the wrong kind."""
    if kind in (Kind.ADDRESS, Kind.PLACE) or (addresses.parse(path) and wanted == "model"):
        return _download(path, words)
    if kind is Kind.PACKED or (kind is Kind.ARCHIVE and not wanted.startswith(("cache", "images", "inputs"))):
        line, into = _unpack(path)
        return f"unpack it: `{line}`" + ("" if wanted.startswith("cache") else f", then {_again(words, into)}")
    if kind is Kind.WORK:
        return "the command that began it goes on with it when it is run again"
    to = {"model": _to_model, "cache": _to_cache, "cache or model": _to_cache, "vectors": _to_vectors}.get(
        wanted, _to_images
    )
    return to(path, kind, words)


def _to_images(path: Path, kind: Kind, words: Words) -> str:
    given, source = typed(path), _again(words, "SOURCE").rstrip("`")
    option = {"extract": "--backbone", "finetune": "--init"}
    match str(words[0]), kind:
        case "extract", Kind.CACHE:
            return f"did you mean `featcache fit-head {given} -o {typed(_apart('model'))}`?"
        case "finetune", Kind.CACHE:
            return f"fine-tuning takes the images themselves; did you mean `featcache fit-head {given} -o {typed(_output(words))}`?"
        case "extract" | "finetune" as command, Kind.MODEL:
            return f"did you mean {source} {option[command]} {given}`?"
        case "extract" | "finetune", Kind.WEIGHTS:
            return f"did you mean {source} --backbone NAME --weights {given}`?"
        case "evaluate", Kind.IMAGE:
            return f"did you mean `featcache predict {typed(words[1])} {given}`?"
        case _, Kind.CACHE:
            return "give the images that it was made from"
        case _, Kind.MODEL | Kind.WEIGHTS:
            return f"did you mean {source}`?"
        case _, Kind.IMAGE:
            return f"single images are for predict: `featcache predict MODEL {given}`"
        case _, Kind.SHEET:
            return f"save it as CSV, then {_again(words, path.with_suffix('.csv'))}"
        case _, Kind.VIDEO:
            frames = f"`mkdir frames && ffmpeg -i {given} -r 1 frames/%06d.jpg`"
            return f"take frames out of it: {frames}, then {_again(words, 'frames')}"
        case _, Kind.DOCUMENT:
            return "save its pages or pictures as PNG or JPEG files"
        case _, Kind.EXPORT:
            return _EXPORTED
    return "give the name of a folder or file"


def _to_model(path: Path, kind: Kind, words: Words) -> str:
    given, model, again = typed(path), typed(_apart("model", path)), _again(words, _apart("model", path))
    if kind in _FOLDERS and (inside := sorted(path.glob("*/model.json"))):
        return f"there is one in it: {_again(words, inside[0].parent)}"
    if kind is Kind.CACHE:
        return f"train one on it: `featcache fit-head {given} -o {model}`, then {again}"
    if kind in (Kind.FOLDER, Kind.TABLE, Kind.PARQUET):
        cache = typed(_apart("features.h5", path))
        return (
            f"make one: `featcache extract {given} -o {cache}`, `featcache fit-head {cache} -o {model}`, then {again}"
        )
    if kind is Kind.EXPORT:
        return f"{_EXPORTED}; give the folder that it was exported from"
    if kind is Kind.WEIGHTS:
        return (
            f"make one: `featcache extract SOURCE -o features.h5 --backbone NAME --weights {given}`, "
            f"`featcache fit-head features.h5 -o {model}`, then {again}"
        )
    return f"`featcache fit-head features.h5 -o {model}` makes one"


def _to_cache(path: Path, kind: Kind, words: Words) -> str:
    given, command, output = typed(path), str(words[0]), _output(words)
    if kind is Kind.MODEL and command == "fit-head":
        return f"it is trained already; did you mean `featcache finetune SOURCE -o {typed(output)} --init {given}`?"
    if kind is Kind.MODEL:
        return f"did you mean `featcache info {given}`?"
    if kind is Kind.EXPORT:
        return _EXPORTED
    if kind is Kind.WEIGHTS:
        return f"`featcache extract SOURCE -o features.h5 --backbone NAME --weights {given}` makes one with it"
    if kind in _FOLDERS and (inside := sorted(found for found in path.glob("*.h5") if kind_of(found) is Kind.CACHE)):
        return f"there is one in it: {_again(words, inside[0])}"
    if kind is Kind.ARRAYS:
        return f"of vectors in it one is made by `featcache import {given} -o {typed(_apart('features.h5', path))}`"
    if kind is Kind.PARQUET and command not in ("fit-head", "finetune"):
        made = typed(_apart("features.h5", path))
        return f"of images in it `featcache extract {given} -o {made}` makes one, of vectors `featcache import {given} -o {made}`"
    if kind not in (Kind.FOLDER, Kind.TABLE, Kind.ARCHIVE, Kind.PARQUET):
        return "`featcache extract SOURCE -o features.h5` makes one"
    if command == "fit-head" and output is not None and output.suffix.lower() in CACHE_SUFFIXES:
        return f"did you mean `featcache extract {given} -o {typed(output)}`?"
    cache = _apart("features.h5", path)
    then = f", then {_again(words, cache)}" if command == "fit-head" else ""
    return f"make one: `featcache extract {given} -o {typed(cache)}`{then}"


def _to_vectors(path: Path, kind: Kind, words: Words) -> str:
    if kind in (Kind.FOLDER, Kind.TABLE):
        return f"of images one is made by `featcache extract {typed(path)} -o {typed(_output(words))}`"
    return "it is one already" if kind is Kind.CACHE else "numpy.savez('vectors.npz', vector=X, path=names) makes one"


def _unpack(path: Path) -> tuple[str, str]:
    """Of an archive, by its name: the line that unpacks it, and what it is then."""
    name, given, into = path.name.lower(), typed(path), _apart(re.sub(r"(\.tar)?\.\w+$", "", path.name))
    into += "-unpacked" if os.path.lexists(into) else ""
    tools = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
    if path.suffix.lower() in tools and ".tar." not in name:
        return f"{tools[path.suffix.lower()]} -k {given}", str(path.with_suffix(""))
    if name.endswith(".7z"):
        return f"7z x {given} -o{typed(into)}", into
    if name.endswith(".rar"):
        return f"unrar x {given} {typed(into)}/", into
    if ".tar" in name or name.endswith((".tgz", ".tbz", ".txz")):
        return f"mkdir {typed(into)} && tar -xf {given} -C {typed(into)}", into
    return f"unzip {given} -d {typed(into)}", into


def _download(path: Path, words: Words) -> str:
    """For an address, by its scheme."""
    scheme, rest = addresses.parse(path).groups()  # type: ignore[union-attr]
    if scheme.lower() == "file":
        return f"did you mean {_again(words, urllib.parse.unquote('/' + rest))}?"
    line, target = fetch_line(path)
    if not line:
        return "save what is there as files first, and give their folder"
    if kind_by_name(target) is not Kind.PACKED:
        return f"download it: `{line}`, then {_again(words, target)}"
    unpack, into = _unpack(Path(target))
    return f"download it: `{line}`, unpack it: `{unpack}`, then {_again(words, into)}"


def fetch_line(path: Path) -> tuple[str, str]:
    """Of an address, by its scheme: the line that fetches what is there, empty if none would, and what it is called then."""
    scheme, rest = addresses.parse(path).groups()  # type: ignore[union-attr]
    address, name = typed(path), urllib.parse.unquote(Path(rest.split("?")[0]).name)
    repository = rest.removeprefix("datasets/").split("/")[:2]
    kind, target = _BY_SUFFIX.get(Path(name).suffix.lower()), _apart(name)
    line = {
        "s3": f"aws s3 {'cp' if kind else 'sync'} {address} {typed(target)}",
        "hf": f"hf download {typed('/'.join(repository))} --repo-type dataset --local-dir {typed(target)}",
        **dict.fromkeys(("gs", "gcs"), f"gcloud storage {'cp' if kind else 'rsync -r'} {address} {typed(target)}"),
    }.get(scheme.lower(), f"curl -L -o {typed(target)} {address}" if kind else "")
    return line, target
